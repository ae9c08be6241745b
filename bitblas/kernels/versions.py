"""Every difference between Triton releases that the kernels meet (docs/triton_versions.md).

Triton is the one that the user's PyTorch pins, and Gluon is experimental: names and calling
conventions move between releases. Kernels take Gluon's names from here; nothing else imports
triton.experimental. Where Gluon cannot serve, these names are missing, so ask first:

    if versions.gluon_available():
        from . import decode_kernels
"""

from __future__ import annotations

from functools import cache
from typing import Any

import triton
from triton.compiler import ASTSource

from ..log import logger

TESTED = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")  # each kernel compiled: make compat

_MISSING: str | None = None
try:
    from triton._utils import canonicalize_dtype
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # Renamed in 3.7 (barrier), 3.8 and 3.9 (reinterpret, which takes the shared memory first).
    thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
    if hasattr(tma, "async_load"):
        tma_load, tma_store = tma.async_load, tma.async_store
    else:
        tma_load, tma_store = tma.async_copy_global_to_shared, tma.async_copy_shared_to_global
    if hasattr(async_copy, "async_load"):
        copy_async = async_copy.async_load
    else:
        copy_async = async_copy.async_copy_global_to_shared
    if hasattr(gl.shared_memory_descriptor, "reinterpret"):
        reinterpret = gl.shared_memory_descriptor.reinterpret
    else:
        reinterpret = gl.shared_memory_descriptor._reinterpret
except (ImportError, AttributeError) as error:
    _MISSING = str(error)

__all__ = [
    "TESTED",
    "GluonASTSource",
    "TensorDescriptor",
    "async_copy",
    "copy_async",
    "descriptor_type",
    "fence_async_shared",
    "gl",
    "gluon",
    "gluon_available",
    "is_gluon",
    "mbarrier",
    "mma_v2",
    "refuse_gluon",
    "reinterpret",
    "source_class",
    "thread_barrier",
    "tma",
    "tma_load",
    "tma_store",
    "warpgroup_mma",
    "warpgroup_mma_wait",
    "why_no_gluon",
]

_refused: str | None = None


def gluon_available() -> bool:
    """Whether Gluon kernels can be used; the first time they cannot, one line is logged."""
    reason = why_no_gluon()
    if reason is not None:
        _report(reason)
    return reason is None


def why_no_gluon() -> str | None:
    """Why Gluon kernels cannot be used; None if they can."""
    if _refused is not None:
        return _refused
    if _release(triton.__version__) < _release(TESTED[0]):
        return f"needs Triton {TESTED[0]} or later"
    return _MISSING


def refuse_gluon(reason: str) -> None:
    """Have no Gluon kernel used from here on: for a release that does not compile them."""
    global _refused
    _refused = reason
    gluon_available()


@cache
def _report(reason: str) -> None:
    logger.warning(
        "Gluon kernels are off, portable ones serve: %s (Triton %s; tested with %s)",
        reason, triton.__version__, ", ".join(TESTED),
    )  # fmt: skip


def _release(version: str) -> tuple[int, ...]:
    """(3, 6) of "3.6.0+git1234"."""
    return tuple(int(part) for part in version.split(".")[:2])


def takes_more_registers() -> bool:
    """Whether plain kernels over quantised caches take more registers than with the releases that
    their tiles were timed with: from 3.8 on they would spill 170 to 1000 bytes."""
    return _release(triton.__version__) >= (3, 8)


def is_gluon(function: Any) -> bool:
    """Whether a jitted function is a Gluon kernel."""
    return _MISSING is None and bool(function.is_gluon())


def source_class(function: Any) -> Any:
    """What triton.compile takes: source_class(f)(f, signature, constants, attributes)."""
    return GluonASTSource if is_gluon(function) else ASTSource


def descriptor_type(value: Any) -> str | None:
    """The type of a TensorDescriptor in a source's signature; None for other values."""
    if _MISSING is not None or not isinstance(value, TensorDescriptor):
        return None
    shape = ",".join(map(str, value.block_shape))
    return f"tensordesc<{canonicalize_dtype(value.base.dtype)}[{shape}],{value.layout!r}>"
