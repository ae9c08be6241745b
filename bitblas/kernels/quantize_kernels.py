"""Device code of the activation quantiser: plain Triton, sm_80 and up, also its interpreter."""

# Triton gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F800000)  # of float32; the patterns above it are NaN
ROUND_AT_ONE = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it ends in the rounded integer


@triton.jit
def follow_previous_kernel():
    """Of a kernel that is started early (programmatic launch): wait until the one ahead is
    complete, and let the next be started."""
    tl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )  # fmt: skip


@triton.jit
def magnitude_bits(x):
    """|x| as the int32 pattern of a float32, which orders as the value does, NaN last."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def to_int8(y):
    """Round half to even, |y| <= 127: the low byte of the sum is the integer's two's complement."""
    return (y + ROUND_AT_ONE).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def to_e4m3(y):
    """The byte of the nearest e4m3 number, half to even, |y| <= 448, where no instruction gives it.

    From 2^-6 up the exponent's bias changes by 120 and 20 mantissa bits are rounded away; a carry
    goes into the exponent, as it should. Below, codes count in units of 2^-9.
    """
    bits = y.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = (tl.abs(y) + 16384.0).to(tl.int32, bitcast=True) & 0xFF  # 2^14 has units of 2^-9
    code = tl.where(size < 0x3C800000, small, normal)  # 2^-6
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantized(x, inverse, finite, KIND: tl.constexpr, CONVERTS: tl.constexpr):
    """x / scale, rounded; 0 in rows that are not finite."""
    y = tl.where(finite, x.to(tl.float32) * inverse, 0.0)
    if KIND == "int8":
        return to_int8(y)
    elif CONVERTS:
        return y.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return to_e4m3(y)


@triton.jit(do_not_specialize=["M", "K"])
def quantize_kernel(
    X, Q, SCALE, M, K,
    KIND: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, K_ALIGNED: tl.constexpr,
    CONVERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
    PROGRAMMATIC: tl.constexpr,
):  # fmt: skip
    """Q[M, K] and SCALE[M] of X[M, K], ROWS rows a block, BLOCK columns at a time.

    ONE_BLOCK: a row fits and stays in registers; otherwise it is read twice, the second time from
    the L2 cache. CONVERTS: the GPU has instructions for e4m3 (sm_89 and up).

    To be compiled without contraction of products and sums: a result is then that of float32
    arithmetic in the order of the source, the same as on the CPU.
    """
    if PROGRAMMATIC:  # X may be what the kernel ahead is writing
        follow_previous_kernel()
    if K_ALIGNED:  # lets the compiler see that rows start on 16 elements
        K = K // 16 * 16
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < M)[:, None]
    start = row.to(tl.int64)[:, None] * K
    column = tl.arange(0, BLOCK)[None, :]
    mask = inside & (column < K)
    x = tl.load(X + start + column, mask=mask, other=0)
    bits = magnitude_bits(x)
    if not ONE_BLOCK:
        for first in range(BLOCK, K, BLOCK):
            mask = inside & (first + column < K)
            x = tl.load(X + start + first + column, mask=mask, other=0)
            bits = tl.maximum(bits, magnitude_bits(x))
    greatest = tl.max(bits, axis=1)
    finite = greatest < INFINITY
    scale = tl.div_rn(tl.maximum(greatest.to(tl.float32, bitcast=True), LEAST), LARGEST)
    tl.store(SCALE + row, tl.where(finite, scale, float("nan")), mask=row < M)
    inverse = tl.div_rn(1.0, scale)[:, None]
    finite = finite[:, None]
    if ONE_BLOCK:
        tl.store(Q + start + column, quantized(x, inverse, finite, KIND, CONVERTS), mask=mask)
    else:
        for first in range(0, K, BLOCK):
            mask = inside & (first + column < K)
            x = tl.load(X + start + first + column, mask=mask, other=0)
            q = quantized(x, inverse, finite, KIND, CONVERTS)
            tl.store(Q + start + first + column, q, mask=mask)
