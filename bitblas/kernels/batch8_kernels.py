"""Device code of the batch8 family: the batch family's scheme for 8-bit A, on Hopper.

What differs from batch_kernels: weights are decoded to bytes, four of them by one or two logic
instructions, and wgmma sums their products with int8 A in int32, exactly. A byte holds its weight
times 1 / UNIT, a power of two: a field of a signed format stays at the byte's top, where flipping
its highest bit gives the two's complement. What is left over for a weight of

    (v - z) * s  or  v * s - z,   v = UNIT * byte + SHIFT,

comes in with the sums of products, P, and of A, S (row_sums), over a group:

    s * UNIT * P - (s * (z - SHIFT)) * S   or   s * UNIT * P - (z - s * SHIFT) * S

in float32, after each group where rows have several, else once at the end. Integer results of
integers alone (EXACT) are all in int32.

    step     128 values of k, a row of A in a swizzled tile of shared memory
    half     64 of them, what one call multiplies: two instructions' depth
    DECODED  halves that the words of one chunk (two of 8-bit codes) cover
    GROUP    values of k that share a scale, a power of two from 128 up; 0: one group
    SPLIT    warpgroups that share rows: each takes every SPLIT-th stage, the first adds their sums
    UNROLL   stages of a body, for all of these; TURNS: those that one of them takes

e4m3 A (FLOAT) is multiplied by e4m3 bytes in the same way. There the matrix units keep few bits of
a sum that grows, so sums of PROMOTE_HALVES halves are added to those before in float32 (PROMOTED),
as rows of several groups want anyway. What those are multiplied with, and the sums of A, are read
by two warps that leave them in the ring (`prepare`): a consumer that loads them waits for them.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .batch_kernels import chunk_layout, load_rows, place, store_results
from .device import (
    decode_scale,
    keep_loads_here,
    let_next_kernel_start,
    packed_zeros,
    powers,
    take,
    wait_for_previous_kernel,
)
from .quantize_kernels import follow_previous_kernel
from .scales_kernels import load_extras, of_stage, preparing_layout, unpack_extras
from .versions import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    tma,
    tma_load,
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
def factors(scale, zero, P: gl.constexpr):
    """What multiplies sums of products, and what the sums of A times which is subtracted, in
    float32; of scales and zero points as they are stored."""
    factor = scale.to(gl.float32) + P.UNIT  # of 0: there is no scale
    base = zero.to(gl.float32) - P.SHIFT
    if P.SCALED:
        real = decode_scale(scale, "float")
        factor = real * P.UNIT
        if P.ZEROS_KIND == "rescale":
            base = zero.to(gl.float32) - real * P.SHIFT
        else:
            base = real * base
    return factor, base


@gluon.constexpr_function
def sums_layout(GROUPS, BLOCK_M):
    """[GROUPS, BLOCK_M], columns across two warps: the sums of A's rows over groups."""
    lanes = [*powers(min(BLOCK_M, 32), 2, 1), *([[0, 0]] * (5 - min(BLOCK_M, 32).bit_length() + 1))]
    warp = [[0, 32]] if BLOCK_M > 32 else [[0, 0]]
    registers = powers(GROUPS, 2, 0) + [[0, 64 << i] for i in range(5) if 64 << i < BLOCK_M]
    return gl.DistributedLinearLayout(registers, lanes, warp, [], [GROUPS, BLOCK_M])


@gluon.jit
def load_sums_of_run(SUMS, tile_m, first, M, G, P: gl.constexpr):
    """The sums of a tile's rows of A over the groups of a run, from SUMS[G, M]."""
    L: gl.constexpr = sums_layout(P.RUN_GROUPS, P.BLOCK_M)
    group = (first + gl.arange(0, P.RUN_GROUPS, gl.SliceLayout(1, L))).expand_dims(1)
    m = (tile_m * P.BLOCK_M + gl.arange(0, P.BLOCK_M, gl.SliceLayout(0, L))).expand_dims(0)
    return gl.load(SUMS + group.to(gl.int64) * M + m, mask=(m < M) & (group < G), other=0)


@gluon.jit
def sums_of_stage(x, STAGE: gl.constexpr, P: gl.constexpr):
    """What a stage of a run takes of load_sums_of_run."""
    STAGES: gl.constexpr = P.RUN_GROUPS // P.STAGE_GROUPS
    x = x.reshape([STAGES, P.STAGE_GROUPS, P.BLOCK_M]).permute([1, 2, 0])
    x = take(x, STAGE * P.RUN_GROUPS // (P.RUN * P.STAGE_GROUPS))
    return gl.convert_layout(x, sums_layout(P.STAGE_GROUPS, P.BLOCK_M), assert_trivial=True)


@gluon.jit
def prepare(operands, P: gl.constexpr):
    """Fills the ring with factors, and with bases and sums of A where these take part.

    As batch_kernels.prepare: those of RUN stages are read at once, a run ahead.
    """
    SCALE, ZEROS, SUMS, e_smem, s_smem, ready, empty, M, N, G, tiles_n, tiles_m, bodies = operands
    BANDS: gl.constexpr = P.BANDS * P.CONSUMERS
    RUN: gl.constexpr = P.RUN
    L: gl.constexpr = preparing_layout(P.STAGE_GROUPS, BANDS)
    LR: gl.constexpr = preparing_layout(P.RUN_GROUPS, BANDS)
    if SUMS is not None:
        wait_for_previous_kernel()
    stages = bodies * P.UNROLL
    buffer = 0
    phase = 1
    for tile in range(gl.program_id(0), tiles_n * tiles_m, gl.num_programs(0)):
        tile_n, tile_m = place(tile, tiles_n, tiles_m, P)
        row = tile_n * (64 * BANDS)
        first = tile * 0
        extras = load_extras(SCALE, ZEROS, row, first, N, G, P.RUN_GROUPS, BANDS, P, LR)
        sums = extras
        if SUMS is not None:
            sums = load_sums_of_run(SUMS, tile_m, first, M, G, P)
        for run in range((stages + RUN - 1) // RUN):
            first = (run + 1) * (RUN * P.STAGE_K) // P.GROUP
            ahead = load_extras(SCALE, ZEROS, row, first, N, G, P.RUN_GROUPS, BANDS, P, LR)
            next_sums = ahead
            if SUMS is not None:
                next_sums = load_sums_of_run(SUMS, tile_m, first, M, G, P)
            keep_loads_here()
            for i in gl.static_range(RUN):
                stage = run * RUN + i
                if stage < stages:
                    scales, zeros = unpack_extras(extras, SCALE, ZEROS, BANDS, P, LR)
                    scale, zero = of_stage(scales, i, P, L), of_stage(zeros, i, P, L)
                    factor, base = factors(scale, zero, P)
                    mbarrier.wait(empty.index(buffer), phase)
                    slot = buffer * P.EXTRAS
                    ROWS: gl.constexpr = 64 * BANDS
                    e_smem.index(slot).store(factor.reshape([P.STAGE_GROUPS, ROWS]))
                    if SUMS is not None:
                        # of a group, those are subtracted once
                        base = gl.where(stage * P.STAGE_K % P.GROUP == 0, base, 0.0)
                        e_smem.index(slot + 1).store(base.reshape([P.STAGE_GROUPS, ROWS]))
                        s_smem.index(buffer).store(sums_of_stage(sums, i, P).to(gl.float32))
                    mbarrier.arrive(ready.index(buffer))
                    buffer += 1
                    if buffer == P.STAGES:
                        buffer = 0
                        phase ^= 1
            extras = ahead
            sums = next_sums


@gluon.constexpr_function
def rows_layout(BANDS):
    """[1, 64 * BANDS]: a lane has the rows that it has of a tile of results."""
    registers = [[0, 8], *[[0, 64 << i] for i in range(5) if 1 << i < BANDS]]
    lanes = [[0, 0], [0, 0], *powers(8, 2, 1)]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 16], [0, 32]], [], [1, 64 * BANDS])


@gluon.constexpr_function
def columns_layout(BLOCK_M):
    """[1, BLOCK_M]: a lane has the columns that it has of a tile of results."""
    registers = [[0, 1], *[[0, 8 << i] for i in range(5) if 8 << i < BLOCK_M]]
    lanes = [[0, 2], [0, 4], [0, 0], [0, 0], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0], [0, 0]], [], [1, BLOCK_M])


@gluon.jit
def read_rows(smem, GROUP: gl.constexpr, WHO: gl.constexpr, P: gl.constexpr, MMA: gl.constexpr):
    """A consumer's share of what `prepare` has stored of a group for each row."""
    ROWS: gl.constexpr = 64 * P.BANDS
    x = smem.slice(GROUP, 1, 0).slice(WHO * ROWS, ROWS, 1).load(rows_layout(P.BANDS))
    return gl.convert_layout(x.reshape([ROWS]), gl.SliceLayout(1, MMA), assert_trivial=True)


@gluon.jit
def read_columns(
    smem, GROUP: gl.constexpr, PIECE: gl.constexpr, P: gl.constexpr, MMA: gl.constexpr
):
    """The sums of a group of A's rows that `prepare` has stored, of a piece."""
    COLUMNS: gl.constexpr = P.PIECE_M
    L: gl.constexpr = columns_layout(COLUMNS)
    x = smem.slice(GROUP, 1, 0).slice(PIECE * COLUMNS, COLUMNS, 1).load(L).reshape([COLUMNS])
    return gl.convert_layout(x, gl.SliceLayout(0, MMA), assert_trivial=True)


@gluon.jit
def promoted(SUMS, total, acc, factor, base, sums, ONCE: gl.constexpr, P: gl.constexpr):
    """total and what sums of products add to it. ONCE: whether the sums of A do too."""
    if P.GROUP == 0:
        total += acc
    else:
        total += acc.to(gl.float32) * factor.expand_dims(1)
        if SUMS is not None and ONCE:
            total -= base.expand_dims(1) * sums.expand_dims(0)
    return total


@gluon.jit
def with_piece(
    SUMS, totals, acc, factor, base, sums, PIECE: gl.constexpr, BLOCK: gl.constexpr,
    P: gl.constexpr,
):  # fmt: skip
    """The totals with what the sums of a piece's block of halves add to them."""
    # a group's sums of A are subtracted with its first, or a stage's first, products
    ONCE: gl.constexpr = BLOCK * P.PROMOTE_HALVES % P.STAGE_HALVES * 64 % max(1, P.GROUP) == 0
    total = promoted(SUMS, totals[PIECE], acc, factor, base, sums, ONCE, P)
    return totals[:PIECE] + (total,) + totals[PIECE + 1 :]


@gluon.constexpr_function
def group_of_block(BLOCK, P):
    """Which of a stage's groups a block of PROMOTE_HALVES halves is in."""
    return BLOCK * P.PROMOTE_HALVES % P.STAGE_HALVES * 64 // P.GROUP


@gluon.jit
def side_by_side(pieces, P: gl.constexpr, MMA: gl.constexpr):
    """The columns of all pieces."""
    x = pieces[0]
    if P.PIECES == 2:
        x = gl.join(pieces[0], pieces[1]).permute([0, 2, 1])
    return gl.convert_layout(x.reshape([64 * P.BANDS, P.BLOCK_M]), MMA, assert_trivial=True)


@gluon.jit
def add_up(
    x_smem, given, taken, acc, phase, WHO: gl.constexpr, PART: gl.constexpr, P: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """The first of the warpgroups that share rows gets the sums of all of them, in their order."""
    OTHERS: gl.constexpr = P.SPLIT - 1
    if PART == 0:
        mbarrier.wait(given.index(WHO), phase)
        for other in gl.static_range(OTHERS):
            acc += x_smem.index(WHO * OTHERS + other).load(MMA)
        mbarrier.arrive(taken.index(WHO))
    else:
        mbarrier.wait(taken.index(WHO), phase ^ 1)
        x_smem.index(WHO * OTHERS + (PART - 1)).store(acc)
        mbarrier.arrive(given.index(WHO))
    return acc


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
def finish(
    OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, c_smem, sums, row, tile_m, M, N, G,
    P: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Stores rows of a tile. sums: of products, those of several groups with their factors."""
    n = row + gl.arange(0, 64 * P.BANDS, gl.SliceLayout(1, MMA))
    result = sums
    if P.GROUP == 0:
        group = tile_m * 0
        scale, zero = load_factors(SCALE, ZEROS, n, group, N, G, P)
        if P.EXACT:
            result = sums >> P.UNIT_BITS
            if SUMS is not None:
                sums_of_a = load_sums(SUMS, tile_m, group, M, P, MMA)
                result = result - (zero - P.SHIFT).expand_dims(1) * sums_of_a
        else:
            factor, base = factors(scale, zero, P)
            result = sums.to(gl.float32) * factor.expand_dims(1)
            if SUMS is not None:
                sums_of_a = load_sums(SUMS, tile_m, group, M, P, MMA)
                result = result - base.expand_dims(1) * sums_of_a.to(gl.float32)
    if INPUT_SCALE is not None:
        token = tile_m * P.BLOCK_M + gl.arange(0, P.BLOCK_M, gl.SliceLayout(0, MMA))
        factor = gl.load(INPUT_SCALE + token, mask=token < M, other=0)
        result = result * factor.expand_dims(0)
    result = with_bias(BIAS, result, n, N, OUT.dtype.element_ty)
    store_results(OUT, OUT_MAP, c_smem, result, row, tile_m * P.BLOCK_M, M, N)


@gluon.jit
def load_words(W, barrier, w_smem, buffer, tile_n, stage, P: gl.constexpr):
    where = [tile_n * (P.BANDS * P.CONSUMERS), stage * (4 * P.STAGE_CHUNKS), 0]
    tma_load(W, where, barrier, w_smem.index(buffer))


@gluon.constexpr_function
def stage_bytes(A, W, P):
    return W.block_type.nbytes + P.STEPS * A.block_type.nbytes


@gluon.jit
def produce(operands, P: gl.constexpr):
    """Fills the ring with A and the packed words. Words of the first stages are on their way since
    before what precedes this kernel was complete, A only after it."""
    A, TAIL, FILL, W, a_smem, w_smem, ready, empty, M, tiles_n, tiles_m, bodies = operands
    BYTES: gl.constexpr = stage_bytes(A, W, P)
    stages = bodies * P.UNROLL
    first = gl.program_id(0)
    tile_n, tile_m = place(first, tiles_n, tiles_m, P)
    early = gl.minimum(stages, P.STAGES)
    wait_for_previous_kernel()
    for i in range(early):
        load_rows(A, TAIL, FILL, ready.index(i), a_smem, i, tile_m * P.BLOCK_M, i, M, P)
    buffer = early % P.STAGES
    phase = gl.where(early == P.STAGES, 0, 1)
    for tile in range(first, tiles_n * tiles_m, gl.num_programs(0)):
        tile_n, tile_m = place(tile, tiles_n, tiles_m, P)
        for stage in range(gl.where(tile == first, early, 0), stages):
            barrier = ready.index(buffer)
            mbarrier.wait(empty.index(buffer), phase)
            mbarrier.expect(barrier, BYTES)
            load_words(W, barrier, w_smem, buffer, tile_n, stage, P)
            load_rows(A, TAIL, FILL, barrier, a_smem, buffer, tile_m * P.BLOCK_M, stage, M, P)
            buffer += 1
            if buffer == P.STAGES:
                buffer = 0
                phase ^= 1


@gluon.jit
def read_chunk(w_smem, buffer, CHUNK: gl.constexpr, WHO: gl.constexpr, P: gl.constexpr):
    """A consumer's words of a stage's chunk: [4 * BANDS, 8, 4, 4]."""
    w = w_smem.index(buffer).slice(WHO * P.BANDS, P.BANDS, 0).slice(CHUNK * 4, 4, 1)
    return w.load(chunk_layout(P.BANDS)).reshape([4 * P.BANDS, 8, 4, 4])


@gluon.jit
def words_of(w_smem, buffer, HALF: gl.constexpr, WHO: gl.constexpr, P: gl.constexpr):
    """The decoded chunks that begin with a half of a stage: one, or two of 8-bit codes."""
    if P.WIDTH == 8:
        one = decode(read_chunk(w_smem, buffer, 2 * HALF, WHO, P), P)
        return one + decode(read_chunk(w_smem, buffer, 2 * HALF + 1, WHO, P), P)
    else:
        return decode(read_chunk(w_smem, buffer, HALF // P.DECODED, WHO, P), P)


@gluon.jit
def operand_of(o, HALF: gl.constexpr, P: gl.constexpr, DOT: gl.constexpr):
    """A half of decoded chunks as the row operand."""
    FIRST: gl.constexpr = 8 * (HALF % P.DECODED)
    return row_operand(step_registers(o, FIRST), step_registers(o, FIRST + 4), P, DOT)


@gluon.jit
def columns_of(
    a_smem, buffer, HALF: gl.constexpr, FIRST: gl.constexpr, COUNT: gl.constexpr, P: gl.constexpr
):  # fmt: skip
    """64 values of k of rows of A, as the column operand."""
    b = a_smem.index(buffer * P.STEPS + HALF // 2).slice(HALF % 2 * 64, 64, 1)
    return b.slice(FIRST, COUNT, 0).permute((1, 0))


@gluon.jit
def following(buffer, phase, P: gl.constexpr):
    """The stage that a warpgroup takes next."""
    buffer += P.SPLIT
    if buffer >= P.STAGES:
        buffer -= P.STAGES
        phase ^= 1
    return buffer, phase


@gluon.jit
def multiply(
    a_smem, w_smem, ready, empty, buffer, phase, bodies, WHO: gl.constexpr, P: gl.constexpr,
    MMA: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """A tile's sums of products, one sum from end to end: (sums, next buffer, its phase)."""
    HALVES: gl.constexpr = P.TURNS * P.STAGE_HALVES
    acc = gl.zeros([64 * P.BANDS, P.BLOCK_M], gl.float32 if P.FLOAT else gl.int32, MMA)
    for _ in range(bodies):
        previous = buffer
        for half in gl.static_range(HALVES):
            if half % P.STAGE_HALVES == 0:
                mbarrier.wait(ready.index(buffer), phase)
            if half % P.DECODED == 0:
                o = words_of(w_smem, buffer, half % P.STAGE_HALVES, WHO, P)
            acc = warpgroup_mma(
                operand_of(o, half, P, DOT),
                columns_of(a_smem, buffer, half % P.STAGE_HALVES, 0, P.BLOCK_M, P), acc,
                is_async=True,
            )  # fmt: skip
            if half == HALVES - 1:
                acc = warpgroup_mma_wait(0, deps=(acc,))
            elif half > 0:
                acc = warpgroup_mma_wait(1, deps=(acc,))
            if half > 0 and half % P.STAGE_HALVES == 0:
                mbarrier.arrive(empty.index(previous))
            if half % P.STAGE_HALVES == P.STAGE_HALVES - 1:
                if half == HALVES - 1:
                    mbarrier.arrive(empty.index(buffer))
                previous = buffer
                buffer, phase = following(buffer, phase, P)
    return acc, buffer, phase


@gluon.jit
def multiply_promoted(
    SUMS, a_smem, w_smem, e_smem, s_smem, ready, empty, buffer, phase, bodies, WHO: gl.constexpr,
    P: gl.constexpr, MMA: gl.constexpr, DOT: gl.constexpr,
):  # fmt: skip
    """As `multiply`, with sums of PROMOTE_HALVES halves added up in float32.

    A tile's columns are summed in PIECES, one after the other, which share the registers of acc.
    TWO_SUMS: acc and what is `pending` have registers of their own, so that one is added to its
    total while the other is multiplied.
    """
    PROMOTE: gl.constexpr = P.PROMOTE_HALVES
    BLOCKS: gl.constexpr = P.TURNS * P.STAGE_HALVES // PROMOTE
    PIECES: gl.constexpr = P.PIECES
    COLUMNS: gl.constexpr = P.PIECE_M
    nothing = gl.zeros([64 * P.BANDS, COLUMNS], gl.float32 if P.FLOAT else gl.int32, MMA)
    totals = (gl.zeros([64 * P.BANDS, COLUMNS], gl.float32, MMA),) * PIECES
    for _ in range(bodies):
        pending = nothing
        factor = nothing
        base = nothing
        sums = nothing
        for block in gl.static_range(BLOCKS):
            if block * PROMOTE % P.STAGE_HALVES == 0:
                previous = buffer
                if block > 0:
                    buffer, phase = following(buffer, phase, P)
                mbarrier.wait(ready.index(buffer), phase)
            # the first piece is multiplied as the weights are decoded
            operands = ()
            acc = nothing
            for i in gl.static_range(PROMOTE):
                if (block * PROMOTE + i) % P.DECODED == 0:
                    o = words_of(w_smem, buffer, (block * PROMOTE + i) % P.STAGE_HALVES, WHO, P)
                a = operand_of(o, block * PROMOTE + i, P, DOT)
                b = columns_of(
                    a_smem, buffer, (block * PROMOTE + i) % P.STAGE_HALVES, 0, COLUMNS, P
                )  # fmt: skip
                if i == 0 and block > 0 and not P.TWO_SUMS:
                    pending = warpgroup_mma_wait(0, deps=(pending,))
                    totals = with_piece(
                        SUMS, totals, pending, factor, base, sums, PIECES - 1, block - 1, P
                    )  # fmt: skip
                acc = warpgroup_mma(a, b, acc, use_acc=i > 0, is_async=True)
                operands = operands + (a,)
                if i > 0:
                    acc = warpgroup_mma_wait(1, deps=(acc,))
                if i == 0 and block > 0 and P.TWO_SUMS:
                    pending = warpgroup_mma_wait(1, deps=(pending,))
                    totals = with_piece(
                        SUMS, totals, pending, factor, base, sums, PIECES - 1, block - 1, P
                    )  # fmt: skip
                if i == 0 and block > 0 and block * PROMOTE % P.STAGE_HALVES == 0:
                    mbarrier.arrive(empty.index(previous))
            if P.GROUP != 0:
                factor = read_rows(
                    e_smem.index(buffer * P.EXTRAS), group_of_block(block, P), WHO, P, MMA
                )  # fmt: skip
                if SUMS is not None:
                    base = read_rows(
                        e_smem.index(buffer * P.EXTRAS + 1), group_of_block(block, P), WHO, P, MMA
                    )  # fmt: skip
                    sums = read_columns(
                        s_smem.index(buffer), group_of_block(block, P), 0, P, MMA
                    )  # fmt: skip
            pending = acc
            for piece in gl.static_range(1, PIECES):
                pending = warpgroup_mma_wait(0, deps=(pending,))
                totals = with_piece(
                    SUMS, totals, pending, factor, base, sums, piece - 1, block, P
                )  # fmt: skip
                if SUMS is not None:
                    sums = read_columns(
                        s_smem.index(buffer), group_of_block(block, P), piece, P, MMA
                    )  # fmt: skip
                acc = nothing
                for i in gl.static_range(PROMOTE):
                    b = columns_of(
                        a_smem, buffer, (block * PROMOTE + i) % P.STAGE_HALVES, piece * COLUMNS,
                        COLUMNS, P,
                    )  # fmt: skip
                    acc = warpgroup_mma(operands[i], b, acc, use_acc=i > 0, is_async=True)
                pending = acc
        pending = warpgroup_mma_wait(0, deps=(pending,))
        mbarrier.arrive(empty.index(buffer))
        buffer, phase = following(buffer, phase, P)
        totals = with_piece(
            SUMS, totals, pending, factor, base, sums, PIECES - 1, BLOCKS - 1, P
        )  # fmt: skip
    return side_by_side(totals, P, MMA), buffer, phase


@gluon.jit
def consume(operands, INDEX: gl.constexpr, P: gl.constexpr):
    (
        OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, a_smem, w_smem, e_smem, s_smem,
        x_smem, c_smem, ready, empty, given, taken, M, N, G, tiles_n, tiles_m, bodies,
    ) = operands  # fmt: skip
    # Triton 3.6 knows no 256 columns of 8-bit elements
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(P.PIECE_M, 128), 32]
    )  # fmt: skip
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 4)
    WHO: gl.constexpr = INDEX // P.SPLIT
    PART: gl.constexpr = INDEX % P.SPLIT
    buffer = gl.to_tensor(PART)
    phase = gl.to_tensor(0)
    tile_phase = 0
    for tile in range(gl.program_id(0), tiles_n * tiles_m, gl.num_programs(0)):
        tile_n, tile_m = place(tile, tiles_n, tiles_m, P)
        row = (tile_n * P.CONSUMERS + WHO) * (64 * P.BANDS)
        if P.PROMOTED:
            result, buffer, phase = multiply_promoted(
                SUMS, a_smem, w_smem, e_smem, s_smem, ready, empty, buffer, phase, bodies, WHO, P,
                MMA, DOT,
            )  # fmt: skip
        else:
            result, buffer, phase = multiply(
                a_smem, w_smem, ready, empty, buffer, phase, bodies, WHO, P, MMA, DOT
            )  # fmt: skip
        if P.SPLIT > 1:
            result = add_up(x_smem, given, taken, result, tile_phase, WHO, PART, P, MMA)
            tile_phase ^= 1
        if PART == 0:
            # the operands of what follows may come from the kernel before this one
            wait_for_previous_kernel()
            finish(
                OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, c_smem.index(WHO), result,
                row, tile_m, M, N, G, P, MMA,
            )  # fmt: skip
    if PART == 0 and OUT_MAP is not None:
        tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "K", "G", "EARLY"])
def batch8_kernel(
    A, TAIL, FILL, W, OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, M, N, K, G, EARLY,
    P: gl.constexpr,
):  # fmt: skip
    """OUT[M, N], as batch_kernels.batch_kernel, each tile by one block. Grid: any number of blocks.

    A: a TMA map of (M, K), [BLOCK_M, 128] at a time; TAIL, FILL: see wgmma.tail_maps. INPUT_SCALE:
    of A's rows. SUMS: what row_sums_kernel gives, where it is needed. P: batch8.Constants.
    """
    ROWS: gl.constexpr = 64 * P.BANDS
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    a_smem = gl.allocate_shared_memory(A.dtype, [P.STAGES * P.STEPS, P.BLOCK_M, 128], A.layout)
    w_smem = gl.allocate_shared_memory(
        gl.int32, [P.STAGES, P.BANDS * P.CONSUMERS, 4 * P.STAGE_CHUNKS, 128], W.layout
    )  # fmt: skip
    e_smem = gl.allocate_shared_memory(
        gl.float32, [max(1, P.STAGES * P.EXTRAS), P.STAGE_GROUPS, ROWS * P.CONSUMERS],
        PLAIN,
    )  # fmt: skip
    s_smem = gl.allocate_shared_memory(
        gl.float32, [P.STAGES if P.EXTRAS == 2 else 1, P.STAGE_GROUPS, P.BLOCK_M],
        PLAIN,
    )  # fmt: skip
    x_smem = gl.allocate_shared_memory(
        gl.float32 if P.FLOAT or P.PROMOTED else gl.int32,
        [max(1, P.CONSUMERS * (P.SPLIT - 1)), ROWS, P.BLOCK_M],
        gl.SwizzledSharedLayout(2, 1, 8, [1, 0]),
    )  # fmt: skip
    c_smem = gl.allocate_shared_memory(
        OUT.dtype.element_ty, [P.CONSUMERS, P.BLOCK_M, ROWS],
        gl.NVMMASharedLayout.get_default_for([P.BLOCK_M, ROWS], OUT.dtype.element_ty),
    )  # fmt: skip
    ready = gl.allocate_shared_memory(gl.int64, [P.STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [P.STAGES, 1], mbarrier.MBarrierLayout())
    given = gl.allocate_shared_memory(gl.int64, [P.CONSUMERS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [P.CONSUMERS, 1], mbarrier.MBarrierLayout())
    STAGES: gl.constexpr = P.STAGES
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=2 if P.EXTRAS > 0 else 1)
        mbarrier.init(empty.index(i), count=P.CONSUMERS)
    CONSUMERS: gl.constexpr = P.CONSUMERS
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(given.index(i), count=max(1, P.SPLIT - 1))
        mbarrier.init(taken.index(i), count=1)
    fence_async_shared()
    # as in batch_kernel: weights that may be read early, and what the next kernel may do
    if EARLY == 0:
        wait_for_previous_kernel()
    bodies = (K + P.BODY_K - 1) // P.BODY_K
    tiles_m = (M + P.BLOCK_M - 1) // P.BLOCK_M
    tiles_n = (N + P.CONSUMERS * ROWS - 1) // (P.CONSUMERS * ROWS)
    tile_n, _ = place(gl.program_id(0), tiles_n, tiles_m, P)
    for i in range(gl.minimum(bodies * P.UNROLL, STAGES)):
        mbarrier.expect(ready.index(i), stage_bytes(A, W, P))
        load_words(W, ready.index(i), w_smem, i, tile_n, i, P)
    let_next_kernel_start()
    consuming = (
        OUT, OUT_MAP, SCALE, ZEROS, INPUT_SCALE, BIAS, SUMS, a_smem, w_smem, e_smem, s_smem,
        x_smem, c_smem, ready, empty, given, taken, M, N, G, tiles_n, tiles_m, bodies,
    )  # fmt: skip
    producing = (A, TAIL, FILL, W, a_smem, w_smem, ready, empty, M, tiles_n, tiles_m, bodies)
    preparing = (
        SCALE, ZEROS, SUMS, e_smem, s_smem, ready, empty, M, N, G, tiles_n, tiles_m, bodies,
    )  # fmt: skip
    R: gl.constexpr = P.REGISTERS
    L: gl.constexpr = P.LOADING_REGISTERS
    if P.CONSUMERS * P.SPLIT == 1:
        if P.EXTRAS == 0:
            gl.warp_specialize(
                [(consume, (consuming, 0, P)), (produce, (producing, P))], [1], [L]
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (consume, (consuming, 0, P)), (produce, (producing, P)),
                    (prepare, (preparing, P)),
                ], [1, 2], [L, L],
            )  # fmt: skip
    elif P.CONSUMERS * P.SPLIT == 2:
        if P.EXTRAS == 0:
            gl.warp_specialize(
                [
                    (consume, (consuming, 0, P)), (consume, (consuming, 1, P)),
                    (produce, (producing, P)),
                ], [4, 1], [R, L],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (consume, (consuming, 0, P)), (consume, (consuming, 1, P)),
                    (produce, (producing, P)), (prepare, (preparing, P)),
                ], [4, 1, 2], [R, L, L],
            )  # fmt: skip
    else:
        if P.EXTRAS == 0:
            gl.warp_specialize(
                [
                    (consume, (consuming, 0, P)), (consume, (consuming, 1, P)),
                    (consume, (consuming, 2, P)), (consume, (consuming, 3, P)),
                    (produce, (producing, P)),
                ], [4, 4, 4, 1], [R, R, R, L],
            )  # fmt: skip
        else:
            gl.warp_specialize(
                [
                    (consume, (consuming, 0, P)), (consume, (consuming, 1, P)),
                    (consume, (consuming, 2, P)), (consume, (consuming, 3, P)),
                    (produce, (producing, P)), (prepare, (preparing, P)),
                ], [4, 4, 4, 1, 2], [R, R, R, L, L],
            )  # fmt: skip


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
