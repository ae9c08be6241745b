"""Device code of the batch family: more than one row of 16-bit A, on Hopper.

C^T = W A^T: weights, decoded in registers, are the row operand of wgmma, a tile of A in shared
memory is the other. A block has warps that fill a ring of stages, one by TMA with A and the packed
words, two with what decoders take of scales and zero points; and CONSUMERS warpgroups, which
decode and multiply. The decoding of one step of 64 k runs beside the matrix instructions of the one
before, and of the other warpgroups.

    tile     64 * TILE_BANDS rows of W by BLOCK_M rows of A: these are a power of two, FIRST_M, and
             MORE_M, a smaller one or 0, each with its own buffers and accumulators. ALONG_ROWS
             consumers have 64 * BANDS rows of W each; where A has few rows, ALONG_K of them have
             the same and divide the k of a stage among themselves, and their sums are added at the
             end: so there are more warps, and fewer ends of tiles
    stage    STAGE_K values of k, what one fill of the ring holds
    body     UNROLL stages, what the loop of a consumer is unrolled to: matrix instructions that
             take their row operand from registers cannot be in flight over a loop's edge
    run      RUN stages, whose scales of a row are read at once
    segment  bodies of one tile that one block does, one after the other

Tiles are done whole, in turns: WAVES of as many as there are blocks, if those that are left are
shared. Their bodies, in the order of tiles and k, are dealt out to all blocks, EACH of them or, to
the first REST blocks, one more, so what a block gets may be a part of a tile, or parts of two and
whole ones between. It begins with its last segment, which may lack the end of a tile: that part
goes to PARTS, and its flag is raised. Who has a tile's last body adds the parts of the blocks
before it, in their order, so that equal calls give equal bits; when it comes to that, they have
mostly been there for long. Blocks wait for none but those of lower numbers, which have been
started before.

A stage is handed back without a fence between the proxies that read and fill it: its words have
been multiplied by then, and who waits for a product has waited for its operands.

Names that recur (see also bitblas.layouts.Fragment and bitblas.kernels.decoders):
    WIDTH, EXTRA: widths of the code's planes (EXTRA: 1 for 3-bit codes, else 0).
    TILE_K: values of k in a tile of the packed layout, UNIT_K: those that are decoded at a time.
    GROUP: values of k that share a scale, a power of two; 0: one scale for a row.
    MINUS, SCALED, ADDED: which extras the decoder takes, EXTRAS: how many by way of the ring.
    PACK: scales and zero points that are loaded as one.
    RAW: operands lack the scale: the products of FOLD_K values of k are a sum of their own, which
        is multiplied by the group's factor and added. Such tiles have a warpgroup of their own that
        adds the consumers' sums, `finish`.
    ONE_M: whether A's rows are one tile.
    ROW, KTH: which of the consumers along W's rows, and along k, a warpgroup is.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .batch_raw_kernels import factor_of_sum, multiply_raw, raw_extras
from .device import (
    decode_scale,
    extras_layout,
    keep_loads_here,
    lane_offset,
    let_next_kernel_start,
    of_rows,
    powers,
    take,
    twice,
    wait_for_previous_kernel,
)
from .scales_kernels import load_extras, of_stage, preparing_layout, unpack_extras
from .versions import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    thread_barrier,
    tma,
    tma_load,
    tma_store,
    warpgroup_mma,
    warpgroup_mma_wait,
)

# --- layouts ---------------------------------------------------------------------------------


@gluon.constexpr_function
def chunk_layout(BANDS):
    """[BANDS, 4 warps, 128 words] of shared memory: a lane owns 16 bytes of each band."""
    registers = [[0, 0, 1], [0, 0, 2], *powers(BANDS, 3, 0)]
    lanes = [[0, 0, 4 << i] for i in range(5)]
    return gl.DistributedLinearLayout(registers, lanes, powers(4, 3, 1), [], [BANDS, 4, 128])


@gluon.constexpr_function
def words_layout(BANDS, GROUPS, WORDS):
    """[4 * BANDS, 8, 4 lanes of a row, GROUPS, WORDS of a group]: what is decoded at a time."""
    registers = powers(WORDS, 5, 4) + powers(GROUPS, 5, 3)
    registers = registers + [[4 << i, 0, 0, 0, 0] for i in range(5) if 1 << i < BANDS]
    lanes = powers(4, 5, 2) + powers(8, 5, 1)
    shape = [4 * BANDS, 8, 4, GROUPS, WORDS]
    return gl.DistributedLinearLayout(registers, lanes, powers(4, 5, 0), [], shape)


@gluon.constexpr_function
def accumulator_layout(COLUMNS):
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )


# --- who does what ---------------------------------------------------------------------------


@gluon.jit
def work_of(tiles, waves, each, rest, bodies, P: gl.constexpr):
    """What this block does: the numbers of its segments, (first, end, step), and what `segment` and
    `owner` take besides: (whole tiles of all blocks; of shared tiles: segments of this block, the
    last tile, first and last body; bodies of each block, blocks that have one more)."""
    block, blocks = gl.program_id(0), gl.num_programs(0)
    if P.SHARED:
        first = block * each + gl.minimum(block, rest)
        last = first + each + (block < rest).to(gl.int32)
        top = (last - 1) // bodies
        shared = top - first // bodies + 1
        return 0, shared + waves, 1, waves * blocks, shared, top, first, last, each, rest
    else:
        return block, tiles, blocks, tiles, 0, 0, 0, 0, 0, 0


@gluon.jit
def segment(i, work, bodies, P: gl.constexpr):
    """A segment: (tile, first body, last body). Those in shared tiles come first, in reverse."""
    _, _, _, whole, shared, top, first, last, _, _ = work
    if P.SHARED:
        nth = top - i
        alone = i >= shared
        tile = gl.where(alone, gl.program_id(0) + (i - shared) * gl.num_programs(0), whole + nth)
        start = gl.where(alone, 0, gl.maximum(first - nth * bodies, 0))
        end = gl.where(alone, bodies, gl.minimum(last - nth * bodies, bodies))
        return tile, start, end
    else:
        return i, 0, bodies


@gluon.jit
def owner(tile, bodies, work):
    """The block that has a shared tile's first body."""
    _, _, _, whole, _, _, _, _, each, rest = work
    body = (tile - whole) * bodies
    more = rest * (each + 1)  # bodies of the blocks that have one more
    return gl.where(body < more, body // (each + 1), rest + (body - more) // each)


@gluon.jit
def place(tile, tiles_n, tiles_m, P: gl.constexpr):
    """(tile of W's rows, tile of A's rows): SWEEP of the latter are done before the next of W's, so
    that what runs at a time shares both in the L2."""
    if P.ONE_M:
        return tile, gl.to_tensor(0)
    else:
        sweep = tile // (P.SWEEP * tiles_n)
        first = sweep * P.SWEEP
        rows = gl.minimum(tiles_m - first, P.SWEEP)
        rest = tile - first * tiles_n
        return rest // rows, first + rest % rows


# --- the warp that loads ---------------------------------------------------------------------


@gluon.constexpr_function
def single_rows_layout():
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


@gluon.jit
def single_rows(a_smem):
    """A ring of boxes as [rows of all boxes, 1, 32 words]."""
    ROWS: gl.constexpr = a_smem.shape[0] * a_smem.shape[1]
    return reinterpret(a_smem, gl.int32, [ROWS, 1, 32], single_rows_layout())


@gluon.jit
def load_words(W, barrier, w_smem, buffer, tile_n, stage, P: gl.constexpr):
    BOXES: gl.constexpr = P.STAGE_CHUNKS // P.BOX_CHUNKS
    for box in gl.static_range(BOXES):
        where = [tile_n * P.TILE_BANDS, (stage * BOXES + box) * (4 * P.BOX_CHUNKS), 0]
        tma_load(W, where, barrier, w_smem.index(buffer * BOXES + box))


@gluon.jit
def load_boxes(A, barrier, a_smem, buffer, row, stage, P: gl.constexpr):
    STEPS: gl.constexpr = P.STEPS
    for step in gl.static_range(STEPS):
        where = [row, (stage * STEPS + step) * A.block_type.shape[1]]
        tma_load(A, where, barrier, a_smem.index(buffer * STEPS + step))


@gluon.jit
def load_rows(A, TAIL, FILL, barrier, a_smem, buffer, row, stage, M, P: gl.constexpr):
    """Loads a stage of A's rows from `row` on. In place of those beyond the last come the first:
    they have no part in any result that is stored, and TMA takes about six cycles for 128 bytes
    that are not there, more than for those that it reads (int4 x int8, 8192 x 8192, m = 84, tiles
    of 128 rows, H200: 26.5 us with zeros from beyond the edge, 16.2 this way)."""
    if TAIL is None:
        load_boxes(A, barrier, a_smem, buffer, row, stage, P)
    else:
        STEPS: gl.constexpr = P.STEPS
        ROWS: gl.constexpr = A.block_type.shape[0]
        SOME: gl.constexpr = TAIL.block_type.shape[0]
        left = M - row
        if left > 0 and left < ROWS:
            rows = single_rows(a_smem)
            for step in gl.static_range(STEPS):
                box = buffer * STEPS + step
                k = (stage * STEPS + step) * A.block_type.shape[1]
                tma_load(TAIL, [row, k], barrier, a_smem.index(box).slice(0, SOME, 0))
                word = (stage * STEPS + step) * FILL.block_type.shape[1]
                tma_load(FILL, [0, word], barrier, rows.index(box * ROWS + left))
        else:
            load_boxes(A, barrier, a_smem, buffer, gl.where(left > 0, row, 0), stage, P)


@gluon.jit
def load_activations(
    A, MORE, TAIL, FILL, barrier, a_smem, more_smem, buffer, tile_m, stage, M, P: gl.constexpr
):  # fmt: skip
    row = tile_m * P.BLOCK_M
    load_rows(A, TAIL, FILL, barrier, a_smem, buffer, row, stage, M, P)
    if MORE is not None:
        row += A.block_type.shape[0]
        load_rows(MORE, TAIL, FILL, barrier, more_smem, buffer, row, stage, M, P)


@gluon.constexpr_function
def stage_bytes(A, MORE, W, P):
    boxes = P.STAGE_CHUNKS // P.BOX_CHUNKS
    rows = A.block_type.nbytes + (0 if MORE is None else MORE.block_type.nbytes)
    return boxes * W.block_type.nbytes + P.STEPS * rows


@gluon.jit
def produce(operands, P: gl.constexpr):
    """Fills the ring for all segments. Words of the first stages are on their way since before what
    precedes this kernel was complete, A only after it."""
    (
        A, MORE, TAIL, FILL, W, a_smem, more_smem, w_smem, ready, empty, M, tiles_n, tiles_m,
        bodies, work,
    ) = operands  # fmt: skip
    BYTES: gl.constexpr = stage_bytes(A, MORE, W, P)
    tile, start, end = segment(work[0], work, bodies, P)
    tile_n, tile_m = place(tile, tiles_n, tiles_m, P)
    early = gl.minimum((end - start) * P.UNROLL, P.STAGES)  # stages whose words are on their way
    wait_for_previous_kernel()
    for i in range(early):
        load_activations(
            A, MORE, TAIL, FILL, ready.index(i), a_smem, more_smem, i, tile_m,
            start * P.UNROLL + i, M, P,
        )  # fmt: skip
    buffer = early % P.STAGES
    phase = gl.where(early == P.STAGES, 0, 1)
    for s in range(work[0], work[1], work[2]):
        tile, start, end = segment(s, work, bodies, P)
        tile_n, tile_m = place(tile, tiles_n, tiles_m, P)
        done = gl.where(s == work[0], early, 0)
        for stage in range(start * P.UNROLL + done, end * P.UNROLL):
            barrier = ready.index(buffer)
            mbarrier.wait(empty.index(buffer), phase)
            mbarrier.expect(barrier, BYTES)
            load_words(W, barrier, w_smem, buffer, tile_n, stage, P)
            load_activations(
                A, MORE, TAIL, FILL, barrier, a_smem, more_smem, buffer, tile_m, stage, M, P
            )  # fmt: skip
            buffer += 1
            if buffer == P.STAGES:
                buffer = 0
                phase ^= 1


# --- scales and zero points ------------------------------------------------------------------


@gluon.jit
def nearest(x):
    """float32 rounded to an integer."""
    return gl.inline_asm_elementwise(
        "cvt.rni.f32.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def decoder_extras(scale, zero, DTYPE: gl.constexpr, P: gl.constexpr, L: gl.constexpr):
    """(minus, scale, addend) of the decoder, shaped as what load_extras returns; those it takes.

    A zero point's integer part is subtracted from the code, exactly, and the rest of it, scaled,
    from the product: so zero points that are integers cost no precision.
    """
    minus = gl.zeros(scale.shape, gl.int32, L)
    addend = minus
    factor = minus
    if P.SCALED:
        scale = decode_scale(scale, P.SCALE_KIND)
        factor = twice(scale, DTYPE)
    zero = zero.to(gl.float32)
    integer = zero
    if P.ZEROS_KIND == "rescale":
        addend = twice(-zero, DTYPE)
    elif P.ZEROS_KIND == "original":
        integer = gl.minimum(gl.maximum(nearest(zero), -P.MOST), P.MOST)
        if P.SCALED:
            addend = twice((integer - zero) * scale, DTYPE)
        else:
            addend = twice(integer - zero, DTYPE)
    if P.MINUS:
        r3 = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))
        r3 = r3.expand_dims(0).expand_dims(1).expand_dims(3)
        minus = twice(-(gl.where(r3 == 0, P.BASE[0], P.BASE[1]) + integer), DTYPE)
    return minus, factor, addend


@gluon.jit
def hand_over(
    extras, rings, buffer, phase, STAGE: gl.constexpr, DTYPE: gl.constexpr, P: gl.constexpr
):  # fmt: skip
    """Stores what consumers take of the STAGE-th of a run's stages, once they have done with what
    lies there. Returns the next place in the ring."""
    L: gl.constexpr = preparing_layout(P.STAGE_GROUPS, P.TILE_BANDS)
    LR: gl.constexpr = preparing_layout(P.RUN_GROUPS, P.TILE_BANDS)
    SCALE, ZEROS, e_smem, ready, empty = rings
    scales, zeros = unpack_extras(extras, SCALE, ZEROS, P.TILE_BANDS, P, LR)
    scale = of_stage(scales, STAGE, P, L)
    zero = of_stage(zeros, STAGE, P, L)
    slot = buffer // P.EVERY * P.EXTRAS
    if P.RAW:
        minus, factor = raw_extras(scale, zero, DTYPE, P, L)
    else:
        minus, factor, addend = decoder_extras(scale, zero, DTYPE, P, L)
    mbarrier.wait(empty.index(buffer), phase)
    if P.MINUS:
        e_smem.index(slot).store(minus)
        slot += 1
    if P.SCALED or P.RAW:
        e_smem.index(slot).store(factor)
        slot += 1
    if P.ADDED:
        e_smem.index(slot).store(addend)
    mbarrier.arrive(ready.index(buffer))
    buffer += P.EVERY
    if buffer == P.STAGES:
        buffer = 0
        phase ^= 1
    return buffer, phase


@gluon.jit
def load_run(operands, row, run, P: gl.constexpr):
    """Scales and zero points of a run of stages, of a tile's rows from `row` on."""
    SCALE, ZEROS, N, G = operands
    L: gl.constexpr = preparing_layout(P.RUN_GROUPS, P.TILE_BANDS)
    first = run * (P.RUN * P.STAGE_K) // P.GROUP
    return load_extras(SCALE, ZEROS, row, first, N, G, P.RUN_GROUPS, P.TILE_BANDS, P, L)


@gluon.jit
def prepare(operands, P: gl.constexpr):
    """Fills the ring with what decoders take besides words, where groups of k have their own.

    Warps of their own do it, well ahead: consumers that load scales would wait for them at each
    fence. A row's scales of RUN stages are read at once, a run ahead: they lie beside each other,
    and 32 bytes come from the L2 for any of them. Where a run is one stage, two runs ahead, into
    one set of registers and another in turns: to move them would be to wait for them.
    """
    (
        SCALE, ZEROS, a_smem, e_smem, ready, empty, N, G, tiles_n, tiles_m, bodies, work,
    ) = operands  # fmt: skip
    RUN: gl.constexpr = P.RUN
    DTYPE: gl.constexpr = a_smem.dtype
    loading = (SCALE, ZEROS, N, G)
    rings = (SCALE, ZEROS, e_smem, ready, empty)
    buffer = 0
    phase = 1
    for s in range(work[0], work[1], work[2]):
        tile, start, end = segment(s, work, bodies, P)
        tile_n, tile_m = place(tile, tiles_n, tiles_m, P)
        row = tile_n * (64 * P.TILE_BANDS)
        begin = start * P.UNROLL
        stop = end * P.UNROLL
        if RUN == 1:
            even = load_run(loading, row, begin, P)
            odd = load_run(loading, row, begin + 1, P)
            for stage in range(begin, stop, 2):
                buffer, phase = hand_over(even, rings, buffer, phase, 0, DTYPE, P)
                even = load_run(loading, row, stage + 2, P)
                if stage + 1 < stop:
                    buffer, phase = hand_over(odd, rings, buffer, phase, 0, DTYPE, P)
                odd = load_run(loading, row, stage + 3, P)
        else:
            extras = load_run(loading, row, begin // RUN, P)
            for run in range(begin // RUN, (stop + RUN - 1) // RUN):
                ahead = load_run(loading, row, run + 1, P)
                keep_loads_here()
                for i in gl.static_range(0, RUN, P.EVERY):
                    if (run * RUN + i >= begin) & (run * RUN + i < stop):
                        buffer, phase = hand_over(extras, rings, buffer, phase, i, DTYPE, P)
                extras = ahead


@gluon.jit
def read_extras(e_smem, slot, ROW: gl.constexpr, FIRST: gl.constexpr, P: gl.constexpr):
    """A consumer's share of what `prepare` has stored, for a unit's groups: (minus, scale, addend).

    Those that the decoder does not take are any."""
    minus = share_of_extras(e_smem.index(slot), ROW, FIRST, P)
    scale = minus
    addend = minus
    if P.MINUS and P.SCALED and not P.RAW:
        scale = share_of_extras(e_smem.index(slot + 1), ROW, FIRST, P)
    if P.ADDED:
        addend = share_of_extras(e_smem.index(slot + P.EXTRAS - 1), ROW, FIRST, P)
    return minus, scale, addend


@gluon.jit
def share_of_extras(smem, ROW: gl.constexpr, FIRST: gl.constexpr, P: gl.constexpr):
    x = smem.slice(FIRST, P.GROUPS, 0).slice(ROW * 4 * P.BANDS, 4 * P.BANDS, 1)
    return x.load(extras_layout(P.GROUPS, P.BANDS))


@gluon.jit
def of_half(x, HALF: gl.constexpr, LAYOUT: gl.constexpr):
    """One row half of extras: [4 * BANDS, 8, 1, GROUPS, 1]."""
    x = take(x.permute([1, 3, 0, 2]), HALF)
    x = gl.convert_layout(x, gl.SliceLayout(2, gl.SliceLayout(4, LAYOUT)), assert_trivial=True)
    return x.expand_dims(2).expand_dims(4)


# --- decoding --------------------------------------------------------------------------------


@gluon.jit
def read_chunk(w_smem, buffer, CHUNK: gl.constexpr, ROW: gl.constexpr, P: gl.constexpr):
    """A chunk of a stage, for the ROW-th consumer along W's rows: [4 * BANDS, 8, 4, 4]."""
    box = w_smem.index(buffer * (P.STAGE_CHUNKS // P.BOX_CHUNKS) + CHUNK // P.BOX_CHUNKS)
    words = box.slice(ROW * P.BANDS, P.BANDS, 0).slice(4 * (CHUNK % P.BOX_CHUNKS), 4, 1)
    return words.load(chunk_layout(P.BANDS)).reshape([4 * P.BANDS, 8, 4, 4])


@gluon.jit
def read_tile(w_smem, buffer, TILE: gl.constexpr, ROW: gl.constexpr, P: gl.constexpr):
    """Both planes of the TILE-th tile of the packed layout in a stage, for the ROW-th consumer
    along W's rows: [4 * BANDS, 8, 4, 4 * chunks]."""
    main = read_chunk(w_smem, buffer, TILE * P.TILE_CHUNKS, ROW, P)
    if P.MAIN_CHUNKS == 2:
        more = read_chunk(w_smem, buffer, TILE * P.TILE_CHUNKS + 1, ROW, P)
        main = gl.join(main, more).permute([0, 1, 2, 4, 3]).reshape([4 * P.BANDS, 8, 4, 8])
    if P.EXTRA != 0:
        return main, read_chunk(w_smem, buffer, TILE * P.TILE_CHUNKS + P.MAIN_CHUNKS, ROW, P)
    else:
        return main, main


@gluon.jit
def decode_unit(
    main, extra, lane, minus, scale, addend, UNIT: gl.constexpr, DTYPE: gl.constexpr,
    P: gl.constexpr,
):  # fmt: skip
    """The registers of a body's unit, a tuple in the decoder's order, [4 * BANDS, 8, 4, GROUPS,
    words of a group]."""
    L: gl.constexpr = words_layout(P.BANDS, P.GROUPS, P.WORDS // P.GROUPS)
    w = main.reshape([4 * P.BANDS, 8, 4, P.TILE_UNITS, P.WORDS]).permute([0, 1, 2, 4, 3])
    w = take(w, UNIT % P.TILE_UNITS).reshape([4 * P.BANDS, 8, 4, P.GROUPS, P.WORDS // P.GROUPS])
    w = gl.convert_layout(w, L, assert_trivial=True)
    operands = [w]
    if P.EXTRA != 0:  # a word of the 1-bit plane covers a pair of words of the 2-bit plane
        e = take(extra, UNIT % P.TILE_UNITS)
        e = gl.join(e, e).reshape([4 * P.BANDS, 8, 4, P.GROUPS, P.WORDS // P.GROUPS])
        operands = operands + [gl.convert_layout(e, L, assert_trivial=True)]
    if P.FILL != "":
        operands = operands + [lane]
    if P.MINUS:
        for half in gl.static_range(2):
            operands = operands + [gl.broadcast(of_half(minus, half, L), w)[0]]
    if P.SCALED and not P.RAW:
        for half in gl.static_range(2):
            operands = operands + [gl.broadcast(of_half(scale, half, L), w)[0]]
    if P.ADDED:
        for half in gl.static_range(2):
            operands = operands + [gl.broadcast(of_half(addend, half, L), w)[0]]
    if DTYPE == gl.float16:
        return gl.inline_asm_elementwise(
            P.ASM, P.CONSTRAINTS, operands, dtype=(gl.float16,) * (32 // P.WIDTH), is_pure=True,
            pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            P.ASM, P.CONSTRAINTS, operands, dtype=(gl.bfloat16,) * (32 // P.WIDTH), is_pure=True,
            pack=2,
        )  # fmt: skip


@gluon.jit
def step_registers(o, STEP: gl.constexpr, PAIRS: gl.constexpr):
    """The four registers of each pair's STEP-th step of 16 k: [.., PAIRS, h, r3, x]."""
    a = gl.join(gl.join(o[4 * STEP], o[4 * STEP + 1]), gl.join(o[4 * STEP + 2], o[4 * STEP + 3]))
    return a.reshape([a.shape[0], 8, 4, PAIRS, 2, 2, 2])


@gluon.jit
def row_operand(o, FIRST: gl.constexpr, P: gl.constexpr, DOT: gl.constexpr):
    """64 values of k of decoded registers, from step FIRST of a pair on: [64 * BANDS, 64].

    Joins append what two registers differ in: r3 and x, then the step of 16 k, lowest bit first.
    """
    STEPS: gl.constexpr = 8 // P.WIDTH if P.WIDTH > 1 else 4  # of a pair that lie in 64 k
    PAIRS: gl.constexpr = 4 // STEPS
    a = step_registers(o, FIRST, PAIRS)
    if STEPS > 1:
        a = gl.join(a, step_registers(o, FIRST + 1, PAIRS))
    if STEPS > 2:
        more = gl.join(
            step_registers(o, FIRST + 2, PAIRS), step_registers(o, FIRST + 3, PAIRS)
        )  # fmt: skip
        a = gl.join(a, more)
    if STEPS == 1:
        a = a.permute([0, 5, 1, 3, 6, 2, 4])
    elif STEPS == 2:
        a = a.permute([0, 5, 1, 3, 7, 6, 2, 4])
    else:
        a = a.permute([0, 5, 1, 3, 8, 7, 6, 2, 4])
    return gl.convert_layout(a.reshape([64 * P.BANDS, 64]), DOT, assert_trivial=True)


# --- the warpgroups that multiply ------------------------------------------------------------


@gluon.jit
def store_results(OUT, OUT_MAP, c_smem, acc, row, first_m, M, N):
    """Results of a consumer's rows of W, from `row` on, and A's, from first_m on; by way of shared
    memory, so that they are written along N."""
    if OUT_MAP is not None:
        tma.store_wait(0)
    thread_barrier()
    c_smem.permute((1, 0)).store(acc.to(OUT.dtype.element_ty))
    if OUT_MAP is not None:
        fence_async_shared()
        tma_store(OUT_MAP, [first_m, row], c_smem)
    else:
        thread_barrier()
        PIECE: gl.constexpr = min(32, acc.shape[1])
        L: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
        m = gl.arange(0, PIECE, gl.SliceLayout(1, L)).expand_dims(1)
        n = (row + gl.arange(0, acc.shape[0], gl.SliceLayout(0, L))).expand_dims(0)
        for piece in gl.static_range(acc.shape[1] // PIECE):
            first = first_m + piece * PIECE
            pointer = OUT + first.to(gl.int64) * N + (m * N + n)
            value = c_smem.slice(piece * PIECE, PIECE, 0).load(L)
            gl.store(pointer, value, mask=(first + m < M) & (n < N))


@gluon.jit
def fence():
    """What this thread did and knows of comes before what it does next, to all threads of the
    GPU."""
    gl.inline_asm_elementwise(
        "fence.acq_rel.gpu; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )  # fmt: skip


@gluon.jit
def by_threads(acc):
    """An accumulator as [512 * registers / 4]: four of a thread's registers, which it can load and
    store at once, then those of the next thread. Costs no instruction."""
    x = acc.reshape([acc.shape[0] // 64, 4, 2, 8, acc.shape[1] // 8, 4, 2])
    return x.permute([0, 4, 1, 3, 5, 2, 6]).reshape([acc.numel])


@gluon.jit
def by_rows(x, like):
    """The inverse of by_threads, shaped as `like`."""
    x = x.reshape([like.shape[0] // 64, like.shape[1] // 8, 4, 8, 4, 2, 2])
    x = x.permute([0, 2, 5, 3, 1, 4, 6]).reshape(like.shape)
    return gl.convert_layout(x, like.type.layout, assert_trivial=True)


@gluon.jit
def store_part(pointer, acc):
    x = by_threads(acc)
    gl.store(pointer + gl.arange(0, acc.numel, x.type.layout), x)


@gluon.jit
def send_part(PARTS, FLAGS, acc, more, ROW: gl.constexpr, P: gl.constexpr):
    """Stores this block's part of a shared tile and raises its flag."""
    slot = gl.program_id(0) * P.ALONG_ROWS + ROW
    part = PARTS + slot.to(gl.int64) * P.PART
    store_part(part, acc)
    if P.MORE_M > 0:
        store_part(part + acc.numel, more)
    thread_barrier()
    fence()
    gl.store(FLAGS + slot, P.TAG)


@gluon.jit
def add_parts(PARTS, FLAGS, acc, more, first, ROW: gl.constexpr, P: gl.constexpr):
    """acc and more with the parts of the blocks from `first` to the one before this, once they are
    there.

    Flags need no initial value but any other than TAG, which memory that was something else holds
    by a chance of 2^-64 only; here they are lowered again.
    """
    L: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    block = first + gl.arange(0, P.MOST_PARTS, L)
    some = block < gl.program_id(0)
    where = FLAGS + (block * P.ALONG_ROWS + ROW)
    missing = 1
    while missing != 0:
        flag = gl.load(where, mask=some, other=P.TAG, volatile=True)
        missing = gl.sum((flag != P.TAG).to(gl.int32), axis=0)
    fence()
    gl.store(where, gl.zeros([P.MOST_PARTS], gl.int64, L), mask=some)
    part = PARTS + ROW * P.PART
    # of loads that are under way, a few registers where accumulators take most
    PIECE: gl.constexpr = 8192 if P.PART <= 8192 else 4096
    x = with_parts(by_threads(acc), part, P.ALONG_ROWS * P.PART, first, gl.program_id(0), PIECE)
    acc = by_rows(x, acc)
    if P.MORE_M > 0:
        part += acc.numel
        x = with_parts(
            by_threads(more), part, P.ALONG_ROWS * P.PART, first, gl.program_id(0), PIECE
        )  # fmt: skip
        more = by_rows(x, more)
    return acc, more


@gluon.jit
def with_parts(x, pointer, STRIDE: gl.constexpr, first, last, PIECE: gl.constexpr):
    """x plus what lies at pointer + STRIDE * block, for blocks in order: of at most PIECE values at
    a time, for which PIECE / 128 of a thread's registers are being loaded."""
    COUNT: gl.constexpr = x.shape[0]
    if COUNT > PIECE:
        low, high = gl.split(x.reshape([2, COUNT // 2]).permute([1, 0]))
        low = with_parts(low, pointer, STRIDE, first, last, PIECE)
        high = with_parts(high, pointer + COUNT // 2, STRIDE, first, last, PIECE)
        return gl.join(low, high).permute([1, 0]).reshape([COUNT])
    else:
        each = gl.arange(0, COUNT, x.type.layout)
        for block in range(first, last, PIECE // COUNT):
            part = pointer + gl.to_tensor(block).to(gl.int64) * STRIDE
            for i in gl.static_range(PIECE // COUNT):
                mask = each + (block + i - last) * COUNT < 0  # whether there is such a block
                x += gl.load(
                    part + i * STRIDE + each, mask=mask, other=0.0, cache_modifier=".cg"
                )  # fmt: skip
        return x


@gluon.jit
def wait_for_products(UNDER_WAY: gl.constexpr, acc, more, P: gl.constexpr):
    """Until no more than so many matrix instructions are under way."""
    if P.MORE_M > 0:
        return warpgroup_mma_wait(UNDER_WAY, deps=(acc, more))
    else:
        return warpgroup_mma_wait(UNDER_WAY, deps=(acc,)), more


@gluon.jit
def finish_segment(
    OUT, OUT_MAP, MORE_MAP, SCALE, BIAS, GLOBAL_SCALE, PARTS, FLAGS, c_smem, more_c_smem, acc, more,
    row, tile, tile_m, start, end, bodies, work, M, N, ROW: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Stores a consumer's rows of a tile, or its part of their sum. start, end: bodies."""
    n = gl.arange(0, 64 * P.BANDS, gl.SliceLayout(1, acc.type.layout))
    if SCALE is not None and not P.SCALED and not P.RAW:
        scale = decode_scale(gl.load(SCALE + (row + n), mask=row + n < N, other=0), P.SCALE_KIND)
        scale = scale * P.UNIT
        acc = acc * of_rows(scale, acc)
        more = more * of_rows(scale, more)
    elif P.UNIT != 1:
        acc = acc * P.UNIT
        more = more * P.UNIT
    if P.SHARED:
        if start > 0 and end == bodies:
            first = owner(tile, bodies, work)
            acc, more = add_parts(PARTS, FLAGS, acc, more, first, ROW, P)
        if end < bodies:
            send_part(PARTS, FLAGS, acc, more, ROW, P)
    if end == bodies:
        if GLOBAL_SCALE is not None:
            factor = gl.load(GLOBAL_SCALE)
            acc = acc * factor
            more = more * factor
        if BIAS is not None:
            bias = gl.load(BIAS + (row + n), mask=row + n < N, other=0).to(gl.float32)
            acc = acc + of_rows(bias, acc)
            more = more + of_rows(bias, more)
        store_results(OUT, OUT_MAP, c_smem, acc, row, tile_m * P.BLOCK_M, M, N)
        if P.MORE_M > 0:
            first_m = tile_m * P.BLOCK_M + P.FIRST_M
            store_results(OUT, MORE_MAP, more_c_smem, more, row, first_m, M, N)


@gluon.jit
def hand_over_sum(sum_smem, there, taken, acc, odd, SLOT: gl.constexpr):
    """Leaves a consumer's sum along its k to who adds them. odd: whether it is the second, the
    fourth, .."""
    mbarrier.wait(taken, odd ^ 1)
    sum_smem.index(SLOT).store(by_threads(acc))
    mbarrier.arrive(there)


@gluon.jit
def sum_along_k(sum_smem, there, taken, acc, odd, FIRST: gl.constexpr, COUNT: gl.constexpr):
    """acc and the sums that COUNT consumers have left, in their order."""
    mbarrier.wait(there, odd)
    x = by_threads(acc)
    for k in gl.static_range(COUNT):
        x += sum_smem.index(FIRST + k).load(x.type.layout)
    mbarrier.arrive(taken)
    return by_rows(x, acc)


@gluon.jit
def finish(operands, P: gl.constexpr):
    """Adds the sums along k of raw tiles' consumers and stores the results, while they are at the
    next segment."""
    (
        OUT, OUT_MAP, SCALE, BIAS, GLOBAL_SCALE, PARTS, FLAGS, c_smem, sum_smem, there, taken, M, N,
        tiles_n, tiles_m, bodies, work,
    ) = operands  # fmt: skip
    odd = 0
    # the operands of what follows may come from the kernel before this one
    wait_for_previous_kernel()
    for s in range(work[0], work[1], work[2]):
        tile, start, end = segment(s, work, bodies, P)
        tile_n, tile_m = place(tile, tiles_n, tiles_m, P)
        acc = gl.zeros([64, P.FIRST_M], gl.float32, accumulator_layout(P.FIRST_M))
        acc = sum_along_k(sum_smem, there.index(0), taken.index(0), acc, odd, 0, P.ALONG_K)
        odd ^= 1
        finish_segment(
            OUT, OUT_MAP, None, SCALE, BIAS, GLOBAL_SCALE, PARTS, FLAGS, c_smem.index(0),
            c_smem.index(0), acc, acc, tile_n * 64, tile, tile_m, start, end, bodies, work, M, N, 0,
            P,
        )  # fmt: skip
    if OUT_MAP is not None:
        tma.store_wait(0)


@gluon.jit
def consume(operands, WHO: gl.constexpr, P: gl.constexpr):
    (
        OUT, OUT_MAP, MORE_MAP, SCALE, ZEROS, BIAS, GLOBAL_SCALE, PARTS, FLAGS, a_smem, more_smem,
        w_smem, e_smem, c_smem, more_c_smem, sum_smem, ready, empty, there, taken, M, N, G, tiles_n,
        tiles_m, bodies, work,
    ) = operands  # fmt: skip
    ROW: gl.constexpr = WHO % P.ALONG_ROWS
    KTH: gl.constexpr = WHO // P.ALONG_ROWS
    OWN: gl.constexpr = P.STAGE_UNITS // P.ALONG_K  # units of a stage, from FIRST on
    FIRST: gl.constexpr = KTH * OWN
    MMA: gl.constexpr = accumulator_layout(P.FIRST_M)
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    # of no columns would be 8 that nothing uses
    MORE_M: gl.constexpr = P.MORE_M if P.MORE_M > 0 else 8
    MORE_MMA: gl.constexpr = accumulator_layout(MORE_M)
    MORE_DOT: gl.constexpr = gl.DotOperandLayout(0, MORE_MMA, 2)
    # matrix instructions of a step that are waited for together
    EACH: gl.constexpr = 2 if P.MORE_M > 0 else 1
    ROW_EXTRAS: gl.constexpr = extras_layout(1, P.BANDS)
    UNITS: gl.constexpr = P.UNROLL * OWN
    HALVES: gl.constexpr = P.UNIT_K // 64
    lane = lane_offset() if P.FILL != "" else 0
    buffer = 0
    phase = 0
    odd = 0
    for s in range(work[0], work[1], work[2]):
        tile, start, end = segment(s, work, bodies, P)
        tile_n, tile_m = place(tile, tiles_n, tiles_m, P)
        row = (tile_n * P.ALONG_ROWS + ROW) * (64 * P.BANDS)
        if P.RAW and not P.MINUS:
            minus, scale, addend = 0, 0, 0
        elif P.GROUP == 0:
            extras = load_extras(SCALE, ZEROS, row, 0, N, G, 1, P.BANDS, P, ROW_EXTRAS)
            scales, zeros = unpack_extras(extras, SCALE, ZEROS, P.BANDS, P, ROW_EXTRAS)
            minus, scale, addend = decoder_extras(scales, zeros, a_smem.dtype, P, ROW_EXTRAS)
        acc = gl.zeros([64 * P.BANDS, P.FIRST_M], gl.float32, MMA)
        more = gl.zeros([64 * P.BANDS, MORE_M], gl.float32, MORE_MMA)
        for _ in range(start, end):
            parts = (acc, acc)  # of raw operands
            factors = (acc, acc)
            previous = buffer
            for unit in gl.static_range(UNITS):
                if unit % OWN == 0:
                    mbarrier.wait(ready.index(buffer), phase)
                if unit % P.TILE_UNITS == 0:
                    main, extra = read_tile(
                        w_smem, buffer, (unit % OWN + FIRST) // P.TILE_UNITS, ROW, P
                    )  # fmt: skip
                if P.RAW:
                    if unit * P.UNIT_K % P.FOLD_K == 0:
                        factor = factor_of_sum(
                            e_smem.index(buffer * P.EXTRAS + P.MINUS),
                            (unit % OWN + FIRST) * P.UNIT_K, acc, P,
                        )  # fmt: skip
                        if unit * P.UNIT_K // P.FOLD_K % 2 == 0:
                            factors = (factor, factors[1])
                        else:
                            factors = (factors[0], factor)
                if P.EXTRAS > 0 and (P.MINUS or not P.RAW):
                    if unit % (P.EVERY * OWN) == 0 or (
                        (unit % (P.EVERY * OWN) + FIRST) * P.UNIT_K % P.GROUP == 0
                    ):
                        minus, scale, addend = read_extras(
                            e_smem, buffer // P.EVERY * P.EXTRAS, ROW,
                            (unit % OWN + FIRST) * P.UNIT_K // P.GROUP, P,
                        )  # fmt: skip
                o = decode_unit(main, extra, lane, minus, scale, addend, unit, a_smem.dtype, P)
                for half in gl.static_range(HALVES):
                    a = row_operand(o, 4 * half, P, DOT)
                    step = buffer * P.STEPS + (unit % OWN + FIRST) * HALVES + half
                    b = a_smem.index(step).permute((1, 0))
                    if P.RAW:
                        parts, acc = multiply_raw(
                            a, b, parts, factors, acc, unit * HALVES + half, UNITS * HALVES - 1, P
                        )  # fmt: skip
                    else:
                        acc = warpgroup_mma(a, b, acc, is_async=True)
                    if P.MORE_M > 0:
                        a = gl.convert_layout(a, MORE_DOT, assert_trivial=True)
                        b = more_smem.index(step).permute((1, 0))
                        more = warpgroup_mma(a, b, more, is_async=True)
                    if unit + half > 0 and not P.RAW:
                        acc, more = wait_for_products(EACH, acc, more, P)
                    if unit > 0 and unit % OWN == 0 and half == 0:
                        mbarrier.arrive(empty.index(previous))
                    if unit == UNITS - 1 and half == HALVES - 1 and not P.RAW:
                        acc, more = wait_for_products(0, acc, more, P)
                if unit % OWN == OWN - 1:
                    if unit == UNITS - 1:
                        mbarrier.arrive(empty.index(buffer))
                    previous = buffer
                    buffer += 1
                    if buffer == P.STAGES:
                        buffer = 0
                        phase ^= 1
        if P.RAW:
            hand_over_sum(sum_smem, there.index(0), taken.index(0), acc, odd, KTH)
        elif KTH > 0:
            slot: gl.constexpr = ROW * (P.ALONG_K - 1) + KTH - 1
            hand_over_sum(sum_smem, there.index(ROW), taken.index(ROW), acc, odd, slot)
        else:
            # the operands of what follows may come from the kernel before this one
            wait_for_previous_kernel()
            if P.ALONG_K > 1:
                acc = sum_along_k(
                    sum_smem, there.index(ROW), taken.index(ROW), acc, odd, ROW * (P.ALONG_K - 1),
                    P.ALONG_K - 1,
                )  # fmt: skip
            finish_segment(
                OUT, OUT_MAP, MORE_MAP, SCALE, BIAS, GLOBAL_SCALE, PARTS, FLAGS, c_smem.index(ROW),
                more_c_smem.index(ROW), acc, more, row, tile, tile_m, start, end, bodies, work, M,
                N, ROW, P,
            )  # fmt: skip
        odd ^= 1
    if OUT_MAP is not None and KTH == 0 and not P.RAW:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=[
        "M", "N", "G", "TILES_N", "TILES_M", "BODIES", "WAVES", "EACH", "REST", "EARLY"
    ]
)  # fmt: skip
def batch_kernel(
    A, MORE, TAIL, FILL, W, OUT, OUT_MAP, MORE_MAP, SCALE, ZEROS, BIAS, GLOBAL_SCALE, PARTS, FLAGS,
    M, N, G, TILES_N, TILES_M, BODIES, WAVES, EACH, REST, EARLY, P: gl.constexpr,
):  # fmt: skip
    """OUT[M, N]. Grid: any number of blocks, best as many as run at a time.

    A: a TMA map of (M, K), [FIRST_M, 64] at a time; MORE: [MORE_M, 64] at a time; TAIL, FILL: see
    wgmma.tail_maps; W: of the words as (row tiles of the layout, chunks along K * 4, 128). OUT_MAP,
    MORE_MAP: of OUT, where TMA can write it. TILES_N, TILES_M: tiles of W's rows and of A's, BODIES
    of a tile. EARLY: whether the weights may be read before the previous kernel in the stream is
    complete. P: batch.Constants.
    """
    ROWS: gl.constexpr = 64 * P.BANDS
    a_smem = gl.allocate_shared_memory(A.dtype, [P.STAGES * P.STEPS, P.FIRST_M, 64], A.layout)
    more_smem = a_smem
    if MORE is not None:
        more_smem = gl.allocate_shared_memory(
            A.dtype, [P.STAGES * P.STEPS, P.MORE_M, 64], MORE.layout
        )  # fmt: skip
    w_smem = gl.allocate_shared_memory(
        gl.int32,
        [P.STAGES * P.STAGE_CHUNKS // P.BOX_CHUNKS, P.TILE_BANDS, 4 * P.BOX_CHUNKS, 128], W.layout,
    )  # fmt: skip
    e_smem = gl.allocate_shared_memory(
        gl.int32,
        [max(1, P.STAGES // P.EVERY * P.EXTRAS), P.STAGE_GROUPS, 4 * P.TILE_BANDS, 2, 8],
        gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0]),
    )  # fmt: skip
    c_smem = gl.allocate_shared_memory(
        OUT.dtype.element_ty, [P.ALONG_ROWS, P.FIRST_M, ROWS],
        gl.NVMMASharedLayout.get_default_for([P.FIRST_M, ROWS], OUT.dtype.element_ty),
    )  # fmt: skip
    more_c_smem = c_smem
    if MORE is not None:
        more_c_smem = gl.allocate_shared_memory(
            OUT.dtype.element_ty, [P.ALONG_ROWS, P.MORE_M, ROWS],
            gl.NVMMASharedLayout.get_default_for([P.MORE_M, ROWS], OUT.dtype.element_ty),
        )  # fmt: skip
    ready = gl.allocate_shared_memory(gl.int64, [P.STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [P.STAGES, 1], mbarrier.MBarrierLayout())
    sum_smem = gl.allocate_shared_memory(
        gl.float32, [max(1, (P.ALONG_K - 1) * P.ALONG_ROWS + P.RAW), ROWS * P.FIRST_M],
        gl.SwizzledSharedLayout(1, 1, 1, [0]),
    )  # fmt: skip
    there = gl.allocate_shared_memory(gl.int64, [P.ALONG_ROWS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [P.ALONG_ROWS, 1], mbarrier.MBarrierLayout())
    if P.ALONG_K > 1:
        ALONG_ROWS: gl.constexpr = P.ALONG_ROWS
        for i in gl.static_range(ALONG_ROWS):
            mbarrier.init(there.index(i), count=P.ALONG_K - 1 + P.RAW)
            mbarrier.init(taken.index(i), count=1)
    STAGES: gl.constexpr = P.STAGES
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=2 if P.EXTRAS > 0 and i % P.EVERY == 0 else 1)
        mbarrier.init(empty.index(i), count=P.CONSUMERS)
    fence_async_shared()

    # Before what precedes is complete, only weights that it cannot have written may be read; the
    # next kernel may do so because this one has waited.
    if EARLY == 0:
        wait_for_previous_kernel()
    work = work_of(TILES_N * TILES_M, WAVES, EACH, REST, BODIES, P)
    tile, start, end = segment(work[0], work, BODIES, P)
    tile_n, _ = place(tile, TILES_N, TILES_M, P)
    for i in range(gl.minimum((end - start) * P.UNROLL, STAGES)):
        mbarrier.expect(ready.index(i), stage_bytes(A, MORE, W, P))
        load_words(W, ready.index(i), w_smem, i, tile_n, start * P.UNROLL + i, P)
    let_next_kernel_start()
    if P.FILL != "":
        gl.inline_asm_elementwise(P.FILL, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    consuming = (
        OUT, OUT_MAP, MORE_MAP, SCALE, ZEROS, BIAS, GLOBAL_SCALE, PARTS, FLAGS, a_smem, more_smem,
        w_smem, e_smem, c_smem, more_c_smem, sum_smem, ready, empty, there, taken, M, N, G, TILES_N,
        TILES_M, BODIES, work,
    )  # fmt: skip
    producing = (
        A, MORE, TAIL, FILL, W, a_smem, more_smem, w_smem, ready, empty, M, TILES_N, TILES_M,
        BODIES, work,
    )  # fmt: skip
    preparing = (
        SCALE, ZEROS, a_smem, e_smem, ready, empty, N, G, TILES_N, TILES_M, BODIES, work,
    )  # fmt: skip
    finishing = (
        OUT, OUT_MAP, SCALE, BIAS, GLOBAL_SCALE, PARTS, FLAGS, c_smem, sum_smem, there, taken, M, N,
        TILES_N, TILES_M, BODIES, work,
    )  # fmt: skip
    # registers of a consumer's thread, and of one that loads
    R: gl.constexpr = P.REGISTERS
    LOADING: gl.constexpr = P.LOADING_REGISTERS
    # functions cannot be put together in a variable, so each set of roles stands here
    if P.RAW:
        gl.warp_specialize([
            (consume, (consuming, 0, P)), (consume, (consuming, 1, P)),
            (consume, (consuming, 2, P)), (consume, (consuming, 3, P)),
            (finish, (finishing, P)), (produce, (producing, P)), (prepare, (preparing, P)),
        ], [4, 4, 4, 4, 1, 2], [R, R, R, LOADING, LOADING, LOADING])  # fmt: skip
    elif P.EXTRAS > 0:
        if P.CONSUMERS == 4:
            gl.warp_specialize([
                (consume, (consuming, 0, P)), (consume, (consuming, 1, P)),
                (consume, (consuming, 2, P)), (consume, (consuming, 3, P)),
                (produce, (producing, P)), (prepare, (preparing, P)),
            ], [4, 4, 4, 1, 2], [R, R, R, LOADING, LOADING])  # fmt: skip
        else:
            gl.warp_specialize([
                (consume, (consuming, 0, P)), (consume, (consuming, 1, P)),
                (produce, (producing, P)), (prepare, (preparing, P)),
            ], [4, 1, 2], [R, LOADING, LOADING])  # fmt: skip
    elif P.CONSUMERS == 4:
        gl.warp_specialize([
            (consume, (consuming, 0, P)), (consume, (consuming, 1, P)),
            (consume, (consuming, 2, P)), (consume, (consuming, 3, P)),
            (produce, (producing, P)),
        ], [4, 4, 4, 1], [R, R, R, LOADING])  # fmt: skip
    else:
        gl.warp_specialize([
            (consume, (consuming, 0, P)), (consume, (consuming, 1, P)),
            (produce, (producing, P)),
        ], [4, 1], [R, LOADING])  # fmt: skip
