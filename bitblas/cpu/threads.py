"""Run a kernel on several threads: those of torch's OpenMP pool, never more beside them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import torch

from .ir import Field

FieldArray = ctypes.c_int64 * len(Field)
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _gomp_parallel() -> Callable[..., None] | None:
    """GOMP_parallel(body, data, threads, flags) of the OpenMP runtime that torch is linked with.

    A symbol is searched in a library and in what it depends on, so this finds the very runtime
    (libgomp, or libomp, which has the same entry) whose threads torch uses. None on platforms
    where torch is built otherwise.
    """
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*")):
        try:
            function = ctypes.CDLL(str(library)).GOMP_parallel
        except (OSError, AttributeError):
            continue
        function.restype = None
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        return function
    return None


GOMP_PARALLEL = _gomp_parallel()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="bitblas")


@cache
def _direct(address: int) -> Callable[[int], None]:
    return KERNEL(address)


def run(address: int, values: Sequence[int], threads: int) -> None:
    """Call the kernel at `address` with these fields on that many threads, and wait for all.

    Threads share the fields and take work items from them, so the call is complete whichever
    threads come.
    """
    fields = FieldArray(*values)
    data = ctypes.addressof(fields)
    if threads == 1:
        _direct(address)(data)
    elif GOMP_PARALLEL is not None:
        GOMP_PARALLEL(address, data, threads, 0)
    else:
        body = _direct(address)
        others = [_pool(threads - 1).submit(body, data) for _ in range(threads - 1)]
        body(data)
        wait(others)
