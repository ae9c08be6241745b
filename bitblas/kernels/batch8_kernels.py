"""Device code of the batch8 family: the batch family's scheme for 8-bit A, on Hopper.

What differs from batch_kernels: weights are decoded to bytes, four of them by one or two logic
instructions, and wgmma sums their products with int8 A in int32, exactly. A byte holds its weight
times 1 / UNIT, a power of two: a field of a signed format stays at the byte's top, where flipping
its highest bit gives the two's complement. What is left over for a weight of

    (v - z) * s  or  v * s - z,   v = UNIT * byte + SHIFT,

comes in with the sums of products, P, and of A, S (row_sums), over a group:

    s * UNIT * P - (s * (z - SHIFT)) * S   or   s * UNIT * P - (z - s * SHIFT) * S

in float32, once a body where rows have several groups, else once at the end. Integer results of
integers alone (EXACT) are all in int32.

    step     128 values of k, a row of A in a swizzled tile of shared memory
    half     64 of them, what one call multiplies: two instructions' depth
    DECODED  halves that the words of one chunk (two of 8-bit codes) cover
    GROUP    values of k that share a scale, a multiple of a body; 0: one group

e4m3 A (FLOAT) is multiplied by e4m3 bytes in the same way. There the matrix units keep few bits of
a sum that grows, so the sums of a body are added to those before in float32 (PROMOTED), which rows
of several groups want anyway.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .batch_kernels import place, produce, read_words, store_results
from .device import (
    decode_scale,
    keep_loads_here,
    let_next_kernel_start,
    packed_zeros,
    wait_for_previous_kernel,
)
from .quantize_kernels import follow_previous_kernel
from .versions import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def decode(w, P: gl.constexpr):
    """A chunk's words [4 * BANDS, 8, 4, 4] -> registers of four bytes each, in the order of k-steps
    and their four registers; what was the index of a word counts bytes then."""
    if P.FLOAT:
        return gl.inline_asm_elementwise(
            P.ASM, P.CONSTRAINTS, [w], dtype=(gl.float8e4nv,) * (32 // P.WIDTH), is_pure=True,
            pack=4,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            P.ASM, P.CONSTRAINTS, [w], dtype=(gl.int8,) * (32 // P.WIDTH), is_pure=True, pack=4
        )  # fmt: skip


@gluon.jit
def step_registers(o, FIRST: gl.constexpr):
    """The four registers of a k-step of 32: [4 * BANDS, 8, 4, 4 bytes, r3, x]."""
    low = gl.join(o[FIRST], o[FIRST + 1])
    return gl.join(low, gl.join(o[FIRST + 2], o[FIRST + 3]))


@gluon.jit
def row_operand(first, second, P: gl.constexpr, DOT: gl.constexpr):
    """Two k-steps as [64 * BANDS, 64]."""
    a = gl.join(first, second).permute([0, 4, 1, 6, 5, 2, 3])
    return gl.convert_layout(a.reshape([64 * P.BANDS, 64]), DOT, assert_trivial=True)


@gluon.jit
def load_factors(SCALE, ZEROS, n, group, N, G, P: gl.constexpr):
    """(scale, zero point) of rows n, as they are stored; 0 for what is not there."""
    mask = n < N
    where = n.to(gl.int64) * G + group
    scale = n * 0
    zero = n * 0
    if SCALE is not None:
        scale = gl.load(SCALE + where, mask=mask & (group < G), other=0)
    if P.ZEROS_KIND == "quantized":
        zero = packed_zeros(ZEROS, n, group, N, mask & (group < G), P.BITS)
    elif P.ZEROS_KIND != "none":
        zero = gl.load(ZEROS + where, mask=mask & (group < G), other=0)
    return scale, zero


@gluon.jit
def load_sums(SUMS, tile_m, group, M, P: gl.constexpr, MMA: gl.constexpr):
    """The sums over a group of a tile's rows of A, from SUMS[G, M]."""
    m = tile_m * P.BLOCK_M + gl.arange(0, P.BLOCK_M, gl.SliceLayout(0, MMA))
    return gl.load(SUMS + group.to(gl.int64) * M + m, mask=m < M, other=0).expand_dims(0)


@gluon.jit
def with_factors(
    SUMS, acc, scale, zero, tile_m, group, once, M, P: gl.constexpr, MMA: gl.constexpr
):  # fmt: skip
    """Sums of products with the scale and zero points of their group applied, in float32. once:
    whether they are those that take the sums of A, which are of a whole group, with them (None:
    they are)."""
    factor = scale.to(gl.float32) + P.UNIT  # of 0: there is no scale
    base = zero.to(gl.float32) - P.SHIFT
    if P.SCALED:
        real = decode_scale(scale, "float")
        factor = real * P.UNIT
        if P.ZEROS_KIND == "rescale":
            base = zero.to(gl.float32) - real * P.SHIFT
        else:
            base = real * base
    result = acc.to(gl.float32) * factor.expand_dims(1)
    if SUMS is not None:
        sums = load_sums(SUMS, tile_m, group, M, P, MMA)
        if once is not None:
            base = gl.where(once, base, 0.0)
        result = result - base.expand_dims(1) * sums.to(gl.float32)
    return result


@gluon.jit
def to_integer(x):
    """float32 rounded half to even, saturated."""
    return gl.inline_asm_elementwise(
        "cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def with_bias(BIAS, result, n, N, DTYPE: gl.constexpr):
    """Results of rows n of W with their bias, as DTYPE can hold them."""
    if BIAS is not None:
        bias = gl.load(BIAS + n, mask=n < N, other=0).expand_dims(1)
        if result.dtype.is_int() and bias.dtype.is_int():
            result = result + bias.to(gl.int32)
        else:
            result = result.to(gl.float32) + bias.to(gl.float32)
    if DTYPE.is_int():
        if result.dtype.is_floating():
            result = to_integer(result)
        if DTYPE == gl.int8:
            result = gl.minimum(gl.maximum(result, -128), 127)
    return result


@gluon.jit
def consume(
    OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, a_smem, w_smem, c_smem, ready, empty,
    M, N, G, tiles_n, tiles_m, bodies, WHO: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    # Triton 3.6 knows no 256 columns of 8-bit elements
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(P.BLOCK_M, 128), 32]
    )  # fmt: skip
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    HALVES: gl.constexpr = P.BODY_HALVES
    buffer = 0
    phase = 0
    if P.GROUP != 0 and SUMS is not None:
        wait_for_previous_kernel()
    for tile in range(gl.program_id(0), tiles_n * tiles_m, gl.num_programs(0)):
        tile_n, tile_m = place(tile, tiles_n, tiles_m, P.SWEEP)
        row = (tile_n * P.CONSUMERS + WHO) * (64 * P.BANDS)
        n = row + gl.arange(0, 64 * P.BANDS, gl.SliceLayout(1, MMA))
        acc = gl.zeros([64 * P.BANDS, P.BLOCK_M], gl.float32 if P.FLOAT else gl.int32, MMA)
        total = gl.zeros([64 * P.BANDS, P.BLOCK_M], gl.float32, MMA) if P.PROMOTED else acc
        for body in range(bodies):
            if P.GROUP != 0:
                group = body * P.BODY_K // P.GROUP
                scale, zero = load_factors(SCALE, ZEROS, n, group, N, G, P)
                keep_loads_here()
            previous = buffer
            for half in gl.static_range(HALVES):
                if half % P.STAGE_HALVES == 0:
                    mbarrier.wait(ready.index(buffer), phase)
                if P.WIDTH == 8:
                    chunk = buffer * P.STAGE_CHUNKS + 2 * (half % P.STAGE_HALVES)
                    one = decode(read_words(w_smem, chunk, WHO, 1, P.BANDS), P)
                    two = decode(read_words(w_smem, chunk + 1, WHO, 1, P.BANDS), P)
                    a = row_operand(step_registers(one, 0), step_registers(two, 0), P, DOT)
                else:
                    if half % P.DECODED == 0:
                        chunk = buffer * P.STAGE_CHUNKS + half % P.STAGE_HALVES // P.DECODED
                        o = decode(read_words(w_smem, chunk, WHO, 1, P.BANDS), P)
                    a = row_operand(
                        step_registers(o, 8 * (half % P.DECODED)),
                        step_registers(o, 8 * (half % P.DECODED) + 4), P, DOT,
                    )  # fmt: skip
                b = a_smem.index(buffer * P.STEPS + half % P.STAGE_HALVES // 2)
                b = b.slice(half % 2 * 64, 64, 1)
                acc = warpgroup_mma(
                    a, b.permute((1, 0)), acc, use_acc=not P.PROMOTED or half > 0, is_async=True
                )  # fmt: skip
                if half == HALVES - 1:
                    acc = warpgroup_mma_wait(0, deps=(acc,))
                elif half > 0:
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                if half > 0 and half % P.STAGE_HALVES == 0:
                    # the words were read through another proxy than TMA writes by
                    fence_async_shared()
                    mbarrier.arrive(empty.index(previous))
                if half % P.STAGE_HALVES == P.STAGE_HALVES - 1:
                    if half == HALVES - 1:
                        fence_async_shared()
                        mbarrier.arrive(empty.index(buffer))
                    previous = buffer
                    buffer += 1
                    if buffer == P.STAGES:
                        buffer = 0
                        phase ^= 1
            if P.GROUP != 0:
                once = body * P.BODY_K % P.GROUP == 0
                total += with_factors(SUMS, acc, scale, zero, tile_m, group, once, M, P, MMA)
            elif P.PROMOTED:
                total += acc
        # the operands of what follows may come from the kernel before this one
        wait_for_previous_kernel()
        if P.GROUP != 0:
            result = total
        else:
            group = tile * 0
            scale, zero = load_factors(SCALE, ZEROS, n, group, N, G, P)
            if P.EXACT:
                result = acc >> P.UNIT_BITS
                if SUMS is not None:
                    sums = load_sums(SUMS, tile_m, group, M, P, MMA)
                    result = result - (zero - P.SHIFT).expand_dims(1) * sums
            else:
                sums_of_products = total if P.PROMOTED else acc
                result = with_factors(
                    SUMS, sums_of_products, scale, zero, tile_m, group, None, M, P, MMA
                )
        if INPUT_SCALE is not None:
            token = tile_m * P.BLOCK_M + gl.arange(0, P.BLOCK_M, gl.SliceLayout(0, MMA))
            factor = gl.load(INPUT_SCALE + token, mask=token < M, other=0)
            result = result * factor.expand_dims(0)
        result = with_bias(BIAS, result, n, N, OUT.dtype.element_ty)
        store_results(OUT, OUT_MAP, c_smem, result, row, tile_m, M, N, P)
    if OUT_MAP is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "G", "EARLY"])
def batch8_kernel(
    A, W, OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, M, N, K, G, EARLY, P: gl.constexpr
):  # fmt: skip
    """OUT[M, N], as batch_kernels.batch_kernel, each tile by one block. Grid: any number of blocks.

    A: a TMA map of (M, K), [BLOCK_M, 128] at a time. INPUT_SCALE: of A's rows. SUMS: what
    row_sums_kernel gives, where it is needed. P: batch8.Constants.
    """
    ROWS: gl.constexpr = 64 * P.BANDS
    a_smem = gl.allocate_shared_memory(A.dtype, [P.STAGES * P.STEPS, P.BLOCK_M, 128], A.layout)
    w_smem = gl.allocate_shared_memory(
        gl.int32, [P.STAGES * P.STAGE_CHUNKS, P.BANDS * P.CONSUMERS, 4, 128], W.layout
    )  # fmt: skip
    c_smem = gl.allocate_shared_memory(
        OUT.dtype.element_ty, [P.CONSUMERS, P.BLOCK_M, ROWS],
        gl.NVMMASharedLayout.get_default_for([P.BLOCK_M, ROWS], OUT.dtype.element_ty),
    )  # fmt: skip
    ready = gl.allocate_shared_memory(gl.int64, [P.STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [P.STAGES, 1], mbarrier.MBarrierLayout())
    STAGES: gl.constexpr = P.STAGES
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=P.CONSUMERS)
    fence_async_shared()
    # as in batch_kernel: weights that may be read early, and what the next kernel may do
    if EARLY == 0:
        wait_for_previous_kernel()
    let_next_kernel_start()
    bodies = (K + P.BODY_K - 1) // P.BODY_K
    tiles_m = (M + P.BLOCK_M - 1) // P.BLOCK_M
    tiles_n = (N + P.CONSUMERS * ROWS - 1) // (P.CONSUMERS * ROWS)
    if P.CONSUMERS == 1:
        gl.warp_specialize([
            (consume, (
                OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, a_smem, w_smem,
                c_smem.index(0), ready, empty, M, N, G, tiles_n, tiles_m, bodies, 0, P,
            )),
            (produce, (
                A, W, a_smem, w_smem, ready, empty, tiles_n, tiles_m, tiles_n * tiles_m, bodies, P,
            )),
        ], [1], [24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (
                OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, a_smem, w_smem,
                c_smem.index(0), ready, empty, M, N, G, tiles_n, tiles_m, bodies, 0, P,
            )),
            (consume, (
                OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, a_smem, w_smem,
                c_smem.index(1), ready, empty, M, N, G, tiles_n, tiles_m, bodies, 1, P,
            )),
            (produce, (
                A, W, a_smem, w_smem, ready, empty, tiles_n, tiles_m, tiles_n * tiles_m, bodies, P,
            )),
        ], [4, 1], [240, 24])  # fmt: skip


@triton.jit(do_not_specialize=["M", "K", "G"])
def row_sums_kernel(
    A, SUMS, M, K, G, GROUP: tl.constexpr, BLOCK: tl.constexpr, PROGRAMMATIC: tl.constexpr
):  # fmt: skip
    """SUMS[G, M] of A[M, K]. Grid: (M, blocks along K, one where GROUP is 0: the whole row)."""
    if PROGRAMMATIC:
        follow_previous_kernel()
    K = K // 16 * 16
    row = tl.program_id(0)
    pointer = A + row.to(tl.int64) * K
    if GROUP == 0:
        column = tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.int32)
        for first in range(0, K, BLOCK):
            inside = first + column < K
            total += tl.load(pointer + first + column, mask=inside, other=0).to(tl.int32)
        tl.store(SUMS + row, tl.sum(total, axis=0))
    else:
        COUNT: tl.constexpr = BLOCK // GROUP
        group = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
        column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        total = tl.sum(tl.load(pointer + column, mask=column < K, other=0).to(tl.int32), axis=1)
        tl.store(SUMS + group.to(tl.int64) * M + row, total, mask=group < G)
