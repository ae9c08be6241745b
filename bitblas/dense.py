"""Products through a temporary dense copy of the weight, where the caller allows it.

With many rows of A it can be faster to dequantise a weight to 16 bits and to call torch's product
(cuBLAS) than to decode it tile by tile: on GPUs without a kernel family of their own, and for
formats that take many instructions to decode. The copy takes 2 * N * K bytes during the call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import torch

from . import cache, plan
from .config import MatmulConfig

_allowed = False

# Of an H200, measured; only their ratios matter, and these vary little between GPUs.
_DEQUANTIZED_BYTES_PER_US = 2.8e6  # read and written
_PRODUCT_FLOPS_PER_US = 7.2e8
# Time of the portable family over cuBLAS's at m = 1024, for the formats that it serves best
_PORTABLE_SLOWDOWN = 1.55


def allow_dense_copies(allow: bool = True) -> None:
    """Whether products on a GPU may make a temporary 16-bit copy of a weight (2 * N * K bytes).

    Off by default. Where allowed, float16 and bfloat16 products of many rows that are planned to be
    faster that way dequantise their weight, rounding it once, and call torch's matmul; a value
    beyond the 16-bit dtype's range becomes infinite in the copy. For the whole process.
    """
    global _allowed
    if _allowed != bool(allow):
        _allowed = bool(allow)
        cache.choices_changed()  # prepared calls do not know of it


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """No dense copies within: what is timed is a kernel."""
    before = _allowed
    allow_dense_copies(False)
    try:
        yield
    finally:
        allow_dense_copies(before)


def is_faster(config: MatmulConfig, m: int, device: torch.device) -> bool:
    """Whether m rows should go through a dense copy, and are allowed to."""
    if not _allowed or config.is_dense:
        return False
    if config.A_dtype not in ("float16", "bfloat16") or config.out_dtype != config.A_dtype:
        return False
    return _planned_faster(config, m, device, cache.generation())


@lru_cache(maxsize=4096)
def _planned_faster(config: MatmulConfig, m: int, device: torch.device, generation: int) -> bool:
    """generation: of the recorded choices, which the plan goes by."""
    product = 2 * m * config.N * config.K / _PRODUCT_FLOPS_PER_US
    copy = config.N * config.K * (2 + config.bits / 8) / _DEQUANTIZED_BYTES_PER_US
    ours = plan.microseconds(config, plan.sections(config, m, device), device)
    return copy + product < (_PORTABLE_SLOWDOWN * product if ours is None else ours)


def matmul(
    A: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """out (m, N) = A (m, K) times weight (N, K) transposed, plus bias (N,)."""
    if bias is None:
        torch.mm(A, weight.T, out=out)
    else:
        torch.addmm(bias.to(out.dtype), A, weight.T, out=out)
