"""Triton kernels that are measured beside the products, not part of them."""

# Triton gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

READ_BLOCK = 1024
READ_UNROLLS = (2, 4, 8)  # small weights want many short programs, large ones few long ones


@triton.jit
def read_kernel(source, sums, words, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Read `words` int32, whole blocks of BLOCK * UNROLL; the sum keeps the loads alive."""
    total = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0)
    for i in range(first, words // (BLOCK * UNROLL), tl.num_programs(0)):
        offset = tl.cast(i, tl.int64) * (BLOCK * UNROLL)
        base = source + offset + tl.arange(0, BLOCK)
        for u in tl.static_range(UNROLL):
            total ^= tl.load(base + u * BLOCK)
    tl.store(sums + first, tl.xor_sum(total, 0))


def read(words: torch.Tensor, sums: torch.Tensor, unroll: int) -> None:
    """Start a read of all of `words`, int32, a multiple of READ_BLOCK * unroll of them."""
    read_kernel[(len(sums),)](words, sums, words.numel(), READ_BLOCK, unroll, num_warps=8)


@triton.jit
def silu_mul_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(gate + at, mask, 0.0).to(tl.float32)
    u = tl.load(up + at, mask, 0.0).to(tl.float32)
    tl.store(out + at, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """out = silu(gate) * up, all contiguous and of one shape."""
    grid = (triton.cdiv(out.numel(), 1024),)
    silu_mul_kernel[grid](gate, up, out, out.numel(), 1024, num_warps=4)
