"""Device code of the batch8 family: the batch family's scheme for int8 A, on Hopper.

What differs from batch_kernels: weights are decoded to bytes, four of them by one or two logic
instructions, and wgmma adds their products with int8 A up in int32, exactly. A byte holds its weight
times 1 / UNIT, a power of two: a field of a signed format stays at the byte's top, where flipping its
highest bit gives the two's complement. Scales of rows of W and of rows of A multiply the sums.

    step     128 values of k, a row of A in a swizzled tile of shared memory
    half     64 of them, what one call multiplies: two instructions' depth
    DECODED  halves that the words of one chunk (two of 8-bit codes) cover
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .batch_kernels import place, produce, read_words, segment, segments, store_results
from .device import let_next_kernel_start, wait_for_previous_kernel
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
def finish_segment(
    OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, c_smem, acc, row, tile_m, slot, complete, M, N,
    WHO: gl.constexpr, P: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Stores a consumer's rows of a tile, or its part of their sum."""
    ROWS: gl.constexpr = 64 * P.BANDS
    n = gl.arange(0, ROWS, gl.SliceLayout(1, MMA))
    m = gl.arange(0, P.BLOCK_M, gl.SliceLayout(0, MMA))
    result = acc.to(gl.float32)
    if SCALE is not None:
        scale = gl.load(SCALE + (row + n), mask=row + n < N, other=0).to(gl.float32)
        result = result * (scale * P.UNIT).expand_dims(1)
    elif P.UNIT != 1:
        result = result * P.UNIT
    if INPUT_SCALE is not None:
        token = tile_m * P.BLOCK_M + m
        factor = gl.load(INPUT_SCALE + token, mask=token < M, other=0)
        result = result * factor.expand_dims(0)
    if complete:
        if BIAS is not None:
            bias = gl.load(BIAS + (row + n), mask=row + n < N, other=0).to(gl.float32)
            result = result + bias.expand_dims(1)
        store_results(OUT, OUT_MAP, c_smem, result, row, tile_m, M, N, P)
    elif P.SHARED:
        first = (slot * P.CONSUMERS + WHO).to(gl.int64) * (ROWS * P.BLOCK_M)
        where = n.expand_dims(1) * P.BLOCK_M + m.expand_dims(0)
        gl.store(PARTS + first + where, result)


@gluon.jit
def consume(
    OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, a_smem, w_smem, c_smem, ready, empty,
    M, N, tiles_n, tiles_m, whole, bodies, WHO: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    # Triton 3.6 knows no 256 columns of 8-bit elements
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(P.BLOCK_M, 128), 32]
    )  # fmt: skip
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    HALVES: gl.constexpr = P.BODY_HALVES
    alone, count, share_first, share_last = segments(tiles_n * tiles_m, whole, bodies)
    buffer = 0
    phase = 0
    for s in range(count):
        tile, start, end = segment(s, whole, bodies, alone, share_first, share_last)
        tile_n, tile_m = place(tile, tiles_n, tiles_m, P.SWEEP)
        row = (tile_n * P.CONSUMERS + WHO) * (64 * P.BANDS)
        acc = gl.zeros([64 * P.BANDS, P.BLOCK_M], gl.int32, MMA)
        for _body in range(start, end):
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
                acc = warpgroup_mma(a, b.permute((1, 0)), acc, is_async=True)
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
        # the operands of what follows may come from the kernel before this one
        wait_for_previous_kernel()
        slot = 2 * gl.program_id(0) + gl.where(s > alone, 1, 0)
        complete = (start == 0) & (end == bodies)
        finish_segment(
            OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, c_smem, acc, row, tile_m, slot,
            complete, M, N, WHO, P, MMA,
        )  # fmt: skip
    if OUT_MAP is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "WHOLE", "EARLY"])
def batch8_kernel(
    A, W, OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, M, N, K, WHOLE, EARLY, P: gl.constexpr
):  # fmt: skip
    """OUT[M, N], as batch_kernels.batch_kernel. A: a TMA map of (M, K), [BLOCK_M, 128] at a time;
    INPUT_SCALE: of A's rows. P: batch8.Constants."""
    ROWS: gl.constexpr = 64 * P.BANDS
    a_smem = gl.allocate_shared_memory(gl.int8, [P.STAGES * P.STEPS, P.BLOCK_M, 128], A.layout)
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
    if EARLY == 0:
        wait_for_previous_kernel()
    let_next_kernel_start()
    bodies = (K + P.BODY_K - 1) // P.BODY_K
    tiles_m = (M + P.BLOCK_M - 1) // P.BLOCK_M
    tiles_n = (N + P.CONSUMERS * ROWS - 1) // (P.CONSUMERS * ROWS)
    R: gl.constexpr = P.REGISTERS
    if P.CONSUMERS == 2:
        gl.warp_specialize([
            (consume, (
                OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, a_smem, w_smem, c_smem.index(0),
                ready, empty, M, N, tiles_n, tiles_m, WHOLE, bodies, 0, P,
            )),
            (consume, (
                OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, a_smem, w_smem, c_smem.index(1),
                ready, empty, M, N, tiles_n, tiles_m, WHOLE, bodies, 1, P,
            )),
            (produce, (
                A, W, a_smem, w_smem, ready, empty, tiles_n, tiles_m, WHOLE, bodies, P,
            )),
        ], [4, 1], [R, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (
                OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, a_smem, w_smem, c_smem.index(0),
                ready, empty, M, N, tiles_n, tiles_m, WHOLE, bodies, 0, P,
            )),
            (consume, (
                OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, a_smem, w_smem, c_smem.index(1),
                ready, empty, M, N, tiles_n, tiles_m, WHOLE, bodies, 1, P,
            )),
            (consume, (
                OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, a_smem, w_smem, c_smem.index(2),
                ready, empty, M, N, tiles_n, tiles_m, WHOLE, bodies, 2, P,
            )),
            (consume, (
                OUT, OUT_MAP, SCALE, INPUT_SCALE, BIAS, PARTS, a_smem, w_smem, c_smem.index(3),
                ready, empty, M, N, tiles_n, tiles_m, WHOLE, bodies, 3, P,
            )),
            (produce, (
                A, W, a_smem, w_smem, ready, empty, tiles_n, tiles_m, WHOLE, bodies, P,
            )),
        ], [4, 4, 4, 1], [R, R, R, 24])  # fmt: skip
