"""The instruction set that kernels are compiled for."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from functools import cache

import llvmlite.binding as llvm

# The features that kernels ask for; the rest only reaches LLVM.
KNOWN = ("avx2", "f16c", "avx512f", "avx512bw", "avx512vnni")


@dataclass(frozen=True)
class Target:
    """A CPU name and feature string for LLVM, and the features whose intrinsics kernels may use.

    With no such features kernels are portable IR, which LLVM lowers to whatever the CPU has.
    """

    cpu: str = ""
    llvm_features: str = ""
    features: frozenset[str] = frozenset()

    def has(self, feature: str) -> bool:
        return feature in self.features

    @staticmethod
    @cache
    def host() -> Target:
        """This machine."""
        found = llvm.get_host_cpu_features()
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")
        used = frozenset(f for f in KNOWN if is_x86 and found.get(f, False))
        # LLVM would split 512-bit vectors on some CPUs that run them at full rate
        flags = found.flatten() + (",-prefer-256-bit" if "avx512f" in used else "")
        return Target(llvm.get_host_cpu_name(), flags, used)

    @staticmethod
    def generic() -> Target:
        """Portable IR only, compiled for this machine."""
        host = Target.host()
        return Target(host.cpu, host.llvm_features)

    @staticmethod
    def avx512() -> Target:
        """A server CPU with AVX-512 and VNNI, whatever this machine is."""
        flags = ",".join("+" + f for f in (*KNOWN, "fma", "avx512vl", "avx512dq", "avx512cd"))
        return Target("cascadelake", flags + ",-prefer-256-bit", frozenset(KNOWN))
