"""From a Launch to a binary, with or without a GPU: Triton's compiler, its disk cache, an index.

    binary = compile_launch(portable.launches(config, A, W, out)[0], arch=90)
    statistics(binary).spills

Operands may live on any device, meta included: only their dtypes and alignment matter. The call,
the warm-up and the tests all compile here, so they find each other's kernels on disk.

Triton finds a kernel on disk by a key that takes 0.4 s to compute in a new process: it hashes its
compiler library. The index, a file for each kernel in Triton's cache directory, leads there from a
key of ours, in which the size and time of that library stand for its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import triton

from .driver import Binary
from .launch import Launch, Settled, Varying, Workspace

ARCHITECTURES = (80, 89, 90)

_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Statistics:
    """What ptxas made of a kernel. local_bytes: stack and spilled registers, per thread."""

    registers: int
    shared_bytes: int
    local_bytes: int
    opcodes: Counter[str]  # with their modifiers, such as "LDG.E.128"

    def count(self, *prefixes: str) -> int:
        """Instructions whose opcode starts with one of the prefixes."""
        return sum(n for name, n in self.opcodes.items() if name.startswith(prefixes))


class Source:
    """What is compiled for a Launch: equal keys, equal binaries.

    Pointers are specialised on being multiples of 16, where they are; ints are not specialised: a
    family passes as a constant what the compiler is to know.
    """

    def __init__(self, launch: Launch) -> None:
        self.function = function = launch.function
        self.extra_shared = launch.extra_shared
        self.signature: dict[str, str] = {}
        self.constants: dict[str, Any] = {}
        self.attributes: dict[tuple[int, ...], list[list[Any]]] = {}
        self.options = {
            "num_warps": launch.num_warps,
            "num_stages": launch.num_stages,
            "enable_fp_fusion": True,  # Triton 3.9 warns where it is left open
            **launch.options,
        }
        for index, name in enumerate(function.arg_names):
            value = launch.arguments.get(name, launch.constants.get(name))
            if isinstance(value, (torch.Tensor, Workspace)):
                self.signature[name] = _POINTERS[value.dtype]
                if not isinstance(value, torch.Tensor) or value.data_ptr() % 16 == 0:
                    self.attributes[(index,)] = _ALIGNED
            elif value is None or name in launch.constants:
                self.signature[name] = "constexpr"
                self.constants[name] = value
            elif isinstance(value, (Settled, Varying)):
                self.signature[name] = "i32"
            elif isinstance(value, int):
                self.signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            else:
                self.signature[name] = _descriptor_type(name, value)

    @cached_property
    def key(self) -> str:
        """Which kernel this is, among those of this process."""
        function = self.function.fn
        fields = (self.signature, self.attributes, self.constants, self.options, self.extra_shared)
        return f"{function.__module__}.{function.__qualname__} {fields}"

    def compiled(self, arch: int) -> Any:
        """Triton's CompiledKernel, from its disk cache or new."""
        from triton.backends.compiler import GPUTarget

        from . import versions

        source = versions.source_class(self.function)(
            self.function, self.signature, self.constants, self.attributes
        )
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=self.options)

    def binary(self, arch: int) -> Binary:
        """The kernel for compute capability `arch`: known, on disk, or compiled now."""
        known = (self.key, arch)
        if known not in _binaries:
            with _lock:
                if known not in _binaries:
                    _binaries[known] = self._find(arch) or self._compile(arch)
        return _binaries[known]

    def on_disk(self, arch: int) -> bool:
        """Whether the kernel is there already, in this process or on disk."""
        known = (self.key, arch)
        if known not in _binaries and (binary := self._find(arch)) is not None:
            _binaries[known] = binary
        return known in _binaries

    def _compile(self, arch: int) -> Binary:
        compiled = self.compiled(arch)
        if _index_holds():
            path = self._index_path(arch)
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
            with os.fdopen(handle, "w") as file:
                json.dump({"hash": compiled.hash, "file": compiled.src.name[:150]}, file)
            os.replace(temporary, path)
        return self._with_metadata(compiled.metadata._asdict(), compiled.asm["cubin"])

    def _find(self, arch: int) -> Binary | None:
        """The binary that the index leads to; None where any part of it is gone."""
        from triton.runtime.cache import get_cache_manager

        if not _index_holds():
            return None
        try:
            entry = json.loads(self._index_path(arch).read_bytes())
            name = f"{entry['file']}.json"
            group = get_cache_manager(entry["hash"]).get_group(name) or {}
            metadata = json.loads(Path(group[name]).read_bytes())
            cubin = Path(group[f"{entry['file']}.cubin"]).read_bytes()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self._with_metadata(metadata, cubin)

    def _with_metadata(self, metadata: dict[str, Any], cubin: bytes) -> Binary:
        shared = -(-metadata["shared"] // 16) * 16 + self.extra_shared
        return Binary.from_metadata({**metadata, "shared": shared}, cubin)

    def _index_path(self, arch: int) -> Path:
        from triton import knobs

        text = f"{_toolchain()} {_environment()} {self._code()} {arch} {self.key}"
        digest = hashlib.sha256(text.encode()).hexdigest()
        return Path(knobs.cache.dir) / "bitblas" / f"{digest[:40]}.json"

    def _code(self) -> str:
        """A hash of all that the kernel's code comes from."""
        own = self.function.fn.__module__.startswith(f"{__package__}.")
        return _kernels_hash() if own else self.function.cache_key


_lock = threading.RLock()  # two threads do not compile at once: it would not be faster
_binaries: dict[tuple[str, int], Binary] = {}


def _descriptor_type(name: str, value: Any) -> str:
    from . import versions

    kind = versions.descriptor_type(value)
    if kind is None:
        raise TypeError(f"{name}: no kernel argument can be a {type(value).__name__}")
    return kind


def _index_holds() -> bool:
    """Whether nothing asks for Triton's own way of finding kernels (its debugging settings)."""
    from triton import knobs

    settings = knobs.compilation
    return not (settings.always_compile or settings.override or settings.dump_ir)


@cache
def _toolchain() -> str:
    from triton import _C

    libraries = sorted(Path(_C.__path__[0]).glob("libtriton*"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in libraries]
    return f"{triton.__version__} {stats}"


def _environment() -> str:
    """What of the environment may decide how kernels come out."""
    names = ("TRITON_", "LLVM_", "MLIR_", "DISABLE_")
    places = ("TRITON_CACHE_DIR", "TRITON_HOME")
    found = {k: v for k, v in os.environ.items() if k.startswith(names) and k not in places}
    return str(sorted(found.items()))


@cache
def _kernels_hash() -> str:
    """Of this folder's files: kernels take their code and constants from nowhere else."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def compile_launch(launch: Launch, arch: int) -> Any:
    """The launch's kernel, Triton or Gluon, compiled for compute capability `arch` (90 for 9.0)."""
    return Source(launch).compiled(arch)


def statistics(binary: Any) -> Statistics:
    """Registers, shared and local memory, and the machine instructions of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(path))
        listing = _tool("nvdisasm", "-c", str(path))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found is not None, f"cuobjdump printed no resource usage: {usage}"
    registers, stack, _, local = map(int, found.groups())
    opcodes = Counter(re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", listing))
    return Statistics(registers, binary.metadata.shared, stack + local, opcodes)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
