"""Device code that the Gluon families share."""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from .versions import gl, gluon


@gluon.constexpr_function
def powers(count, dims, dim):
    """Bases 1, 2, .. count/2 along one of `dims` dimensions."""
    bases, step = [], 1
    while step < count:
        basis = [0] * dims
        basis[dim] = step
        bases.append(basis)
        step *= 2
    return bases


@gluon.jit
def wait_for_previous_kernel():
    """Until the kernels before this one in the stream are complete (programmatic launch).

    The volatile assembly is also where the compiler stops moving loads down.
    """
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def let_next_kernel_start():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def keep_loads_here():
    """No load moves across: else the compiler gathers all loads of an iteration at its end."""
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def lane_offset():
    """4 * lane: a scalar to the compiler, which need not know that lanes differ.

    What decoders read of their table depends on it, so nothing is read before it is written.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; mov.u32 t, %laneid; shl.b32 $0, t, 2; }", "=r", [], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def twice(x, DTYPE: gl.constexpr):
    """float32 -> int32 that holds it as DTYPE in both halves."""
    if DTYPE == gl.float16:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $1, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
        )  # fmt: skip


@gluon.jit
def take(x, INDEX: gl.constexpr):
    """x[..., INDEX] of a register dimension: splits cost no instruction."""
    COUNT: gl.constexpr = x.shape[len(x.shape) - 1]
    if COUNT == 1:
        return x.reshape(x.shape[: len(x.shape) - 1])
    else:
        even, odd = gl.split(x.reshape(x.shape[: len(x.shape) - 1] + [COUNT // 2, 2]))
        if INDEX % 2 == 0:
            return take(even, INDEX // 2)
        else:
            return take(odd, INDEX // 2)


@gluon.jit
def decode_scale(raw, SCALE_KIND: gl.constexpr):
    """Scales in any encoding -> float32."""
    if SCALE_KIND == "e8m0":
        # 2^-127 is subnormal in float32; infinity, which 255 gives, times zero is NaN
        bits = gl.maximum(raw.to(gl.int32) << 23, 0x00400000)
        scale = bits.to(gl.float32, bitcast=True)
        return gl.fma(scale, gl.zeros_like(scale), scale)
    elif SCALE_KIND == "e4m3":
        return raw.to(gl.float8e4nv, bitcast=True).to(gl.float32)
    else:
        return raw.to(gl.float32)


@gluon.jit
def packed_zeros(POINTER, n, group, N, mask, BITS: gl.constexpr):
    """Zero points from a bit-packed (G, ceil(N*BITS/8)) array, as int32."""
    row_bytes = (N * BITS + 7) // 8
    bit = n * BITS
    byte = bit // 8
    pointer = POINTER + (group.to(gl.int64) * row_bytes + byte)
    value = gl.load(pointer, mask=mask, other=0).to(gl.int32) & 0xFF
    if 8 % BITS != 0:  # codes may cross into the next byte
        high = gl.load(pointer + 1, mask=mask & (byte + 1 < row_bytes), other=0)
        value = value | ((high.to(gl.int32) & 0xFF) << 8)
    return (value >> (bit % 8)) & ((1 << BITS) - 1)


@gluon.constexpr_function
def extras_layout(GROUPS, BANDS):
    """[GROUPS, 4 * BANDS, 2 row halves, 8]: of groups; in a lane of four warps the rows of W that
    it has in the row operand of wgmma and in its accumulator."""
    registers = [*powers(GROUPS, 4, 0), [0, 0, 1, 0]]
    registers = registers + [[0, 4 << i, 0, 0] for i in range(5) if 1 << i < BANDS]
    lanes = [[0, 0, 0, 0], [0, 0, 0, 0], *powers(8, 4, 3)]
    shape = [GROUPS, 4 * BANDS, 2, 8]
    return gl.DistributedLinearLayout(registers, lanes, powers(4, 4, 1), [], shape)


@gluon.jit
def of_rows(x, acc):
    """What W's rows have one of each, [64 * BANDS], for an accumulator."""
    x = gl.convert_layout(x, gl.SliceLayout(1, acc.type.layout), assert_trivial=True)
    return x.expand_dims(1)
