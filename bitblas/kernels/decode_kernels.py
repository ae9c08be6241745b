"""Device code of the decode family: at most 16 rows of 16-bit A, weights read once, on Hopper.

A block walks over row tiles of W. A is staged in shared memory; the weights go straight from global
memory to registers, each lane holding the words of the units it will multiply next. K is split over
the warps of a block, so between two tiles no warp waits for another: the only barriers are those of
the sum over warps that ends a tile.

    unit       UNIT_K values of k for the 16 * BANDS rows of a tile: what a warp decodes at a time
    iteration  DEPTH units of a warp, DEPTH being also how many units ahead it loads
    slab       ITERATIONS * WARPS * DEPTH * UNIT_K values of k, what shared memory holds of A; where
               K has several, a block walks over its tiles once for each

Names that recur (see also bitblas.layouts.Fragment and bitblas.kernels.decoders):
    WIDTH, EXTRA: widths of the code's planes (EXTRA: 1 for 3-bit codes, else 0).
    SPAN: values of k in a pair of words, STEPS = SPAN / 16 of the matrix instruction's k-steps.
    GROUP: values of k that share a scale, a power of two from 16 up; 0: one scale for a row.
    SUMS: whether the sums of A are needed (zero points, or codes with an offset).
    AHEAD: they are added up before, for all tiles of a block, not by a product in each. ONE is 1.
    SCALED: scales multiply the row operand, where that is exact, instead of the sums of a group.
    IN_PLACE: those are multiplied one group after the other, for want of registers.
    raw value, UNIT, ONE, SHIFT, ZERO: from the decoder, a value for each half of 16 rows:
        sum of value * a = UNIT * (sum of raw * a + (ZERO * zero point - SHIFT) * sum of ONE * a).
        Everything but the factor UNIT is applied group by group; that one is left to the end.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .device import (
    decode_scale,
    keep_loads_here,
    lane_offset,
    let_next_kernel_start,
    packed_zeros,
    powers,
    take,
    wait_for_previous_kernel,
)
from .versions import async_copy, copy_async, gl, gluon, mma_v2, reinterpret, thread_barrier

# --- layouts ---------------------------------------------------------------------------------


@gluon.constexpr_function
def words_layout(WARPS, BANDS, CHUNKS):
    """[WARPS, BANDS, CHUNKS, 128 words]: a lane owns whole 16-byte chunks."""
    lanes = [[0, 0, 0, 4 << i] for i in range(5)]
    registers = [[0, 0, 0, 1], [0, 0, 0, 2]] + powers(CHUNKS, 4, 2) + powers(BANDS, 4, 1)
    shape = [WARPS, BANDS, CHUNKS, 128]
    return gl.DistributedLinearLayout(registers, lanes, powers(WARPS, 4, 0), [], shape)


@gluon.constexpr_function
def scales_layout(WARPS, BANDS, COUNT):
    """[WARPS, 16 * BANDS rows, COUNT groups]: as the accumulator holds its rows."""
    registers = powers(COUNT, 3, 2) + [[0, 8 << i, 0] for i in range(5) if 8 << i < 16 * BANDS]
    lanes = [[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    shape = [WARPS, 16 * BANDS, COUNT]
    return gl.DistributedLinearLayout(registers, lanes, powers(WARPS, 3, 0), [], shape)


@gluon.constexpr_function
def partial_sums_layout(WARPS, ROWS, COLUMNS):
    """[WARPS, COLUMNS of A, ROWS of W], every warp's part in registers; lanes along W's rows."""
    lanes = powers(min(32, ROWS), 3, 2)
    rest = powers(COLUMNS, 3, 1)
    while len(lanes) < 5 and rest:
        lanes = lanes + [rest[0]]
        rest = rest[1:]
    while len(lanes) < 5:
        lanes = lanes + [[0, 0, 0]]
    more = [[0, 0, 32 << i] for i in range(5) if 32 << i < ROWS] + rest
    warps = []
    while len(warps) < len(powers(WARPS, 1, 0)):
        if more:
            warps = warps + [more[0]]
            more = more[1:]
        else:
            warps = warps + [[0, 0, 0]]
    shape = [WARPS, COLUMNS, ROWS]
    return gl.DistributedLinearLayout(powers(WARPS, 3, 0) + more, lanes, warps, [], shape)


@gluon.constexpr_function
def unit_layout(ROWS):
    """Shared memory of A, [WARPS, ROWS, UNIT_K], as it is read; swizzled for matrix loads."""
    return gl.SwizzledSharedLayout(8, 1, 8 if ROWS > 1 else 1, [2, 1, 0])


@gluon.constexpr_function
def whole_layout(ROWS):
    """The same of several units, [units, WARPS, ROWS, UNIT_K], as it is written."""
    return gl.SwizzledSharedLayout(8, 1, 8 if ROWS > 1 else 1, [3, 2, 1, 0])


@gluon.constexpr_function
def staging_layout(WARPS, ROWS, UNIT_K, VECTOR):
    """[units, WARPS, ROWS of A, UNIT_K] with VECTOR consecutive k in a thread."""
    along_k = min(32, UNIT_K // VECTOR)
    across = min(32 // along_k, ROWS)
    return gl.BlockedLayout(
        [1, 1, 1, VECTOR], [32 // along_k // across, 1, across, along_k], [1, WARPS, 1, 1],
        [3, 2, 1, 0],
    )  # fmt: skip


# --- small pieces ----------------------------------------------------------------------------


@gluon.jit
def per_row(VALUES: gl.constexpr, WARPS: gl.constexpr, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """[WARPS, ROWS]: VALUES[0] in the first eight rows of sixteen, VALUES[1] in the others."""
    row = gl.arange(0, ROWS, gl.SliceLayout(0, LAYOUT)).expand_dims(0)
    both = gl.where((row // 8) % 2 == 0, VALUES[0], VALUES[1])
    return both + gl.zeros([WARPS, ROWS], gl.float32, LAYOUT)


@gluon.jit
def ones_operand(
    M, N, ONE: gl.constexpr, DTYPE: gl.constexpr, WARPS: gl.constexpr, dA: gl.constexpr
):  # fmt: skip
    """[WARPS, 16, 16]: a row operand whose product gives the sums of A.

    (row + M) >> 31 and (row + N) >> 31 are zero, which the compiler cannot know: it would rather
    build the operand's four registers, two and two equal, anew before each use than keep them.
    """
    row = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, dA))).expand_dims(0).expand_dims(2)
    both = gl.where((row // 8) % 2 == 0, ONE[0], ONE[1]).to(DTYPE)
    both, like = gl.broadcast(both, gl.full([WARPS, 16, 16], 0.0, DTYPE, dA))
    k = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, dA))).expand_dims(0).expand_dims(1)
    zero = gl.full([WARPS, 16, 16], 0, gl.int32, dA) + ((row + gl.where(k < 8, M, N)) >> 31)
    if DTYPE == gl.float16:
        return gl.inline_asm_elementwise(
            "add.u32 $0, $1, $2; // $3", "=r,r,r,r", [both, zero], dtype=gl.float16, is_pure=True,
            pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "add.u32 $0, $1, $2; // $3", "=r,r,r,r", [both, zero], dtype=gl.bfloat16, is_pure=True,
            pack=2,
        )  # fmt: skip


@gluon.jit
def stored_scale(scales, INDEX: gl.constexpr, SCALE_KIND: gl.constexpr):
    """scales[..., INDEX] as it is stored; encoded ones may come four in a word."""
    if SCALE_KIND == "e8m0" and scales.dtype == gl.int32:
        return (take(scales, INDEX // 4) >> (8 * (INDEX % 4))) & 0xFF
    else:
        return take(scales, INDEX)


# --- loads -----------------------------------------------------------------------------------


@gluon.jit
def plane_pointers(
    W, tile, first_chunk, warp_chunks, chunks,
    PLANE_CHUNK: gl.constexpr, TILE_CHUNKS: gl.constexpr, PER_TILE: gl.constexpr,
    WARPS: gl.constexpr, BANDS: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """Where each warp's words of a plane begin in an iteration: (pointers, chunks along K).

    Both broadcast to [WARPS, BANDS, CHUNKS, 128]. first_chunk: of warp 0, counted along K in this
    plane; warp w starts w * warp_chunks later. chunks: those that the packed weight holds. PER_TILE
    chunks of the plane lie in a layout tile of TILE_CHUNKS chunks, from PLANE_CHUNK on.
    """
    L: gl.constexpr = words_layout(WARPS, BANDS, CHUNKS)
    L3: gl.constexpr = gl.SliceLayout(3, L)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, L3)))
    word = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))
    warp = warp.expand_dims(1).expand_dims(2).expand_dims(3)
    word = word.expand_dims(0).expand_dims(1).expand_dims(2)
    along_k = first_chunk + warp * warp_chunks
    # a layout tile has 64 rows, 4 bands; a plane's iteration starts on one where there are several
    block = tile * BANDS
    rows = (block // 4) * (chunks // PER_TILE)
    pointer = W + rows.to(gl.int64) * (512 * TILE_CHUNKS) + (block % 4) * 128
    if PER_TILE == TILE_CHUNKS:
        in_row = along_k
    else:
        in_row = along_k // PER_TILE * TILE_CHUNKS + PLANE_CHUNK
    return pointer + (in_row * 512 + word), along_k


@gluon.jit
def load_plane(
    pointer, along_k, chunks, valid, old, FIRST: gl.constexpr,
    TILE_CHUNKS: gl.constexpr, PER_TILE: gl.constexpr, EXACT: gl.constexpr,
    WARPS: gl.constexpr, BANDS: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    """CHUNKS chunks of a plane from its FIRST-th in an iteration on: [WARPS, BANDS, CHUNKS, 128].

    Whatever differs between the registers of a lane is constant, so it becomes the loads' immediate
    offset. old: what registers keep where nothing is loaded.
    """
    L: gl.constexpr = words_layout(WARPS, BANDS, CHUNKS)
    L3: gl.constexpr = gl.SliceLayout(3, L)
    band = gl.arange(0, BANDS, gl.SliceLayout(0, gl.SliceLayout(2, L3)))
    chunk = FIRST + gl.arange(0, CHUNKS, gl.SliceLayout(0, gl.SliceLayout(1, L3)))
    band = band.expand_dims(0).expand_dims(2).expand_dims(3)
    chunk = chunk.expand_dims(0).expand_dims(1).expand_dims(3)
    place = chunk // PER_TILE * TILE_CHUNKS + chunk % PER_TILE
    mask = valid & gl.full([WARPS, BANDS, CHUNKS, 128], 1, gl.int1, L)
    if EXACT:
        return gl.load(
            pointer + (place * 512 + band * 128), mask=mask, other=old,
            eviction_policy="evict_first",
        )  # fmt: skip
    else:
        mask = mask & (along_k + chunk < chunks)
        return gl.load(
            pointer + (place * 512 + band * 128), mask=mask, other=0,
            eviction_policy="evict_first",
        )  # fmt: skip


@gluon.jit
def iteration_pointers(
    W, tile, first_k, padded_k,
    WIDTH: gl.constexpr, EXTRA: gl.constexpr, TILE_K: gl.constexpr,
    WARPS: gl.constexpr, BANDS: gl.constexpr, UNIT_K: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """plane_pointers of both planes. first_k: of warp 0; padded_k: K of the packed weight."""
    TILE_CHUNKS: gl.constexpr = TILE_K * (WIDTH + EXTRA) // 256
    CHUNK_K: gl.constexpr = 256 // WIDTH
    main, along_k = plane_pointers(
        W, tile, first_k // CHUNK_K, DEPTH * UNIT_K // CHUNK_K, padded_k // CHUNK_K,
        0, TILE_CHUNKS, TILE_K // CHUNK_K, WARPS, BANDS, UNIT_K // CHUNK_K,
    )  # fmt: skip
    if EXTRA != 0:
        extra, extra_along_k = plane_pointers(
            W, tile, first_k // 256, DEPTH * UNIT_K // 256, padded_k // 256,
            TILE_K // CHUNK_K, TILE_CHUNKS, TILE_K // 256, WARPS, BANDS, UNIT_K // 256,
        )  # fmt: skip
        return main, along_k, extra, extra_along_k
    else:
        return main, along_k, main, along_k


@gluon.jit
def load_unit(
    pointers, d: gl.constexpr, padded_k, valid, old,
    WIDTH: gl.constexpr, EXTRA: gl.constexpr, TILE_K: gl.constexpr, EXACT: gl.constexpr,
    WARPS: gl.constexpr, BANDS: gl.constexpr, UNIT_K: gl.constexpr,
):  # fmt: skip
    """The words of the d-th unit of an iteration, a tensor for each plane."""
    TILE_CHUNKS: gl.constexpr = TILE_K * (WIDTH + EXTRA) // 256
    CHUNK_K: gl.constexpr = 256 // WIDTH
    main = load_plane(
        pointers[0], pointers[1], padded_k // CHUNK_K, valid, old[0], d * UNIT_K // CHUNK_K,
        TILE_CHUNKS, TILE_K // CHUNK_K, EXACT, WARPS, BANDS, UNIT_K // CHUNK_K,
    )  # fmt: skip
    if EXTRA != 0:
        extra = load_plane(
            pointers[2], pointers[3], padded_k // 256, valid, old[1], d * UNIT_K // 256,
            TILE_CHUNKS, TILE_K // 256, EXACT, WARPS, BANDS, UNIT_K // 256,
        )  # fmt: skip
        return main, extra
    else:
        return main, main


@gluon.jit
def load_groups(
    POINTER, tile, first_k, N, G, valid,
    GROUP: gl.constexpr, ALIGNED: gl.constexpr, EXACT: gl.constexpr, ROWS_EXACT: gl.constexpr,
    COUNT: gl.constexpr, WARPS: gl.constexpr, BANDS: gl.constexpr, WARP_K: gl.constexpr,
):  # fmt: skip
    """Elements of an (N, G) array for the groups that each warp meets: [WARPS, rows, COUNT]."""
    L: gl.constexpr = scales_layout(WARPS, BANDS, COUNT)
    L2: gl.constexpr = gl.SliceLayout(2, L)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, L2)).expand_dims(1).expand_dims(2)
    row = gl.arange(0, 16 * BANDS, gl.SliceLayout(0, L2)).expand_dims(0).expand_dims(2)
    each = gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    each = each.expand_dims(0).expand_dims(1)
    if ALIGNED:  # lets the compiler see that COUNT elements can be read at once
        G = G // COUNT * COUNT
    if GROUP == 0:
        first, group = 0, each + warp * 0
    elif GROUP <= WARP_K:
        first, group = first_k // (GROUP * COUNT) * COUNT, warp * COUNT + each
    else:
        first, group = 0, (first_k + warp * WARP_K) // GROUP + each
    n = tile * (16 * BANDS) + row
    mask = valid & gl.full([WARPS, 16 * BANDS, COUNT], 1, gl.int1, L)
    if not ROWS_EXACT:
        mask = mask & (n < N)
    if not EXACT:
        mask = mask & (first + group < G)
    pointer = POINTER + (tile * (16 * BANDS) * G + first)
    return gl.load(pointer + (row * G + group), mask=mask, other=0)


@gluon.jit
def load_packed_zeros(
    POINTER, tile, first_k, N, G, valid,
    BITS: gl.constexpr, GROUP: gl.constexpr, COUNT: gl.constexpr,
    WARPS: gl.constexpr, BANDS: gl.constexpr, WARP_K: gl.constexpr,
):  # fmt: skip
    """The same from a bit-packed (G, ceil(N*BITS/8)) array, as int32."""
    L: gl.constexpr = scales_layout(WARPS, BANDS, COUNT)
    L2: gl.constexpr = gl.SliceLayout(2, L)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, L2)).expand_dims(1).expand_dims(2)
    row = gl.arange(0, 16 * BANDS, gl.SliceLayout(0, L2)).expand_dims(0).expand_dims(2)
    each = gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, L)))
    each = each.expand_dims(0).expand_dims(1)
    if GROUP == 0:
        group = each + warp * 0
    else:
        group = (first_k + warp * WARP_K) // GROUP + each
    n = tile * (16 * BANDS) + row
    mask = valid & (n < N) & (group < G)
    return packed_zeros(POINTER, n, group, N, mask, BITS)


@gluon.jit
def load_scales_and_zeros(
    SCALE, ZEROS, tile, first_k, N, G, valid,
    BITS: gl.constexpr, SCALE_KIND: gl.constexpr, ZEROS_KIND: gl.constexpr, GROUP: gl.constexpr,
    ALIGNED: gl.constexpr, EXACT: gl.constexpr, ROWS_EXACT: gl.constexpr, COUNT: gl.constexpr,
    WARPS: gl.constexpr, BANDS: gl.constexpr, WARP_K: gl.constexpr,
):  # fmt: skip
    """(scales, zeros) for COUNT groups of each warp, as they are stored; 0 where there are none."""
    nothing = gl.zeros([WARPS, 16 * BANDS, COUNT], gl.int32, scales_layout(WARPS, BANDS, COUNT))
    if SCALE_KIND == "none":
        scale = nothing
    elif SCALE.dtype.element_ty == gl.int32:  # four bytes each
        scale = load_groups(
            SCALE, tile, first_k, N, G // 4, valid, 4 * GROUP, ALIGNED, EXACT, ROWS_EXACT,
            COUNT // 4, WARPS, BANDS, WARP_K,
        )  # fmt: skip
    else:
        scale = load_groups(
            SCALE, tile, first_k, N, G, valid, GROUP, ALIGNED, EXACT, ROWS_EXACT, COUNT,
            WARPS, BANDS, WARP_K,
        )  # fmt: skip
    if ZEROS_KIND == "none":
        zero = nothing
    elif ZEROS_KIND == "quantized":
        zero = load_packed_zeros(
            ZEROS, tile, first_k, N, G, valid, BITS, GROUP, COUNT, WARPS, BANDS, WARP_K
        )  # fmt: skip
    else:
        zero = load_groups(
            ZEROS, tile, first_k, N, G, valid, GROUP, ALIGNED, EXACT, ROWS_EXACT, COUNT,
            WARPS, BANDS, WARP_K,
        )  # fmt: skip
    return scale, zero


@gluon.jit
def stage_units(
    A, target, first_k, M, K, FIRST: gl.constexpr, COUNT: gl.constexpr,
    ROWS: gl.constexpr, DEPTH: gl.constexpr, WARPS: gl.constexpr, UNIT_K: gl.constexpr,
    VECTOR: gl.constexpr, EXACT: gl.constexpr,
):  # fmt: skip
    """COUNT (a power of two) units of A, from unit FIRST after first_k on; zero beyond K."""
    L: gl.constexpr = staging_layout(WARPS, ROWS, UNIT_K, 8 if VECTOR == 8 else 2)
    L3: gl.constexpr = gl.SliceLayout(3, L)
    unit = FIRST + gl.arange(0, COUNT, gl.SliceLayout(1, gl.SliceLayout(2, L3)))
    warp = gl.arange(0, WARPS, gl.SliceLayout(0, gl.SliceLayout(2, L3)))
    m = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, L3)))
    kk = gl.arange(0, UNIT_K, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))
    unit = unit.expand_dims(1).expand_dims(2).expand_dims(3)
    warp = warp.expand_dims(0).expand_dims(2).expand_dims(3)
    m = m.expand_dims(0).expand_dims(1).expand_dims(3)
    kk = kk.expand_dims(0).expand_dims(1).expand_dims(2)
    if VECTOR == 8:  # lets the compiler see that rows start on 16 bytes
        K = K // 8 * 8
    k = warp * (DEPTH * UNIT_K) + kk
    unit_k = unit // DEPTH * (WARPS * DEPTH * UNIT_K) + unit % DEPTH * UNIT_K
    # Rows beyond A, columns of the product that are never stored, are not read. When they
    # repeated the last one, all blocks asked for it at once (8192 x 8192: 18.9 us for m = 9, 14.2
    # for 16).
    pointer = (A + first_k) + (m * K + k) + unit_k
    mask = gl.full([COUNT, WARPS, ROWS, UNIT_K], 1, gl.int1, L)
    if ROWS > 1:
        mask = mask & (m < M)
    if not EXACT:
        mask = mask & (first_k + k + unit_k < K)
    if VECTOR == 8:
        copy_async(target, pointer, mask=mask)
    else:
        target.store(gl.load(pointer, mask=mask, other=0.0))


@gluon.jit
def stage_activations(
    A, a_smem, first_k, M, K, PIECES: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr,
    DEPTH: gl.constexpr, WARPS: gl.constexpr, UNIT_K: gl.constexpr, VECTOR: gl.constexpr,
    EXACT: gl.constexpr,
):  # fmt: skip
    """A slab of A in shared memory, [PIECES, COUNT units, WARPS, ROWS, UNIT_K]; zero beyond K."""
    for piece in gl.static_range(PIECES):
        stage_units(
            A, a_smem.index(piece), first_k, M, K, piece * COUNT, COUNT, ROWS, DEPTH, WARPS, UNIT_K,
            VECTOR, EXACT,
        )  # fmt: skip
    if VECTOR == 8:
        async_copy.commit_group()
        async_copy.wait_group(0)
    thread_barrier()


@gluon.constexpr_function
def units_added_at_once(ROWS, UNIT_K, units, PER_SUM):
    """Of the `units` of a piece: whole sums, of 32 values in a thread where that can be."""
    return max(PER_SUM, min(units, 1024 // (ROWS * UNIT_K)))


@gluon.jit
def sum_activations(
    a_smem, totals_smem, PER_SUM: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr,
    UNIT_K: gl.constexpr,
):  # fmt: skip
    """Sums of a slab of A over the k of PER_SUM units, or of equal parts of a unit.

    To totals_smem, [chunks, sums of a chunk, WARPS, ROWS].
    """
    UNITS: gl.constexpr = a_smem.shape[1]
    CHUNKS: gl.constexpr = totals_smem.shape[0] // a_smem.shape[0]  # of a piece
    CHUNK: gl.constexpr = UNITS // CHUNKS  # units
    PARTS: gl.constexpr = totals_smem.shape[1] * PER_SUM // CHUNK  # of a unit, a sum for each
    ALONG: gl.constexpr = 32 // ROWS
    L: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, UNIT_K // ALONG], [1, 1, ROWS, ALONG], [1, WARPS, 1, 1], [3, 2, 1, 0]
    )  # fmt: skip
    COUNT: gl.constexpr = totals_smem.shape[0]
    for i in gl.static_range(COUNT):
        chunk = a_smem.index(i // CHUNKS).slice(i % CHUNKS * CHUNK, CHUNK, 0)
        values = chunk.load(L).to(gl.float32)
        values = values.reshape([CHUNK // PER_SUM, PER_SUM, WARPS, ROWS, PARTS, UNIT_K // PARTS])
        totals = gl.sum(gl.sum(values, axis=1), axis=4)
        totals = totals.permute([0, 3, 1, 2]).reshape([totals_smem.shape[1], WARPS, ROWS])
        totals_smem.index(i).store(totals)
    thread_barrier()


# --- the product -----------------------------------------------------------------------------


@gluon.jit
def load_totals(totals_smem, which, MMA: gl.constexpr):
    """What sum_activations found, as columns of the accumulator: [WARPS, 1, columns]."""
    COUNT: gl.constexpr = totals_smem.shape[0] * totals_smem.shape[1]
    totals = reinterpret(
        totals_smem, gl.float32, [COUNT, totals_smem.shape[2], totals_smem.shape[3]],
        gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
    ).index(which)  # fmt: skip
    if totals.shape[1] == 1:
        one = totals.reshape([totals.shape[0]]).load(gl.SliceLayout(1, gl.SliceLayout(2, MMA)))
        return one.expand_dims(1).expand_dims(2)
    else:
        return totals.load(gl.SliceLayout(1, MMA)).expand_dims(1)


@gluon.jit
def multiply_add(x, y, z, IN_PLACE: gl.constexpr):
    """x * y + z. LLVM gathers those of all groups at the end of an iteration, where the sums of
    each group wait for it in registers of their own: not IN_PLACE, where it happens here."""
    if IN_PLACE:
        return gl.inline_asm_elementwise(
            "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [x, y, z], dtype=gl.float32, is_pure=False,
            pack=1,
        )  # fmt: skip
    else:
        return gl.fma(x, y, z)


@gluon.jit
def fold(
    acc, part, sums, scale, zero,
    SCALE_KIND: gl.constexpr, ZEROS_KIND: gl.constexpr, SUMS: gl.constexpr,
    ONE: gl.constexpr, SHIFT: gl.constexpr, ZERO: gl.constexpr,
    IN_PLACE: gl.constexpr, WARPS: gl.constexpr, BANDS: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """acc + the sums of raw products of one group, with everything that applies to the group.

    part: [WARPS, rows, columns]; sums: of A, [WARPS, 16, columns], or from load_totals; scale,
    zero: [WARPS, rows], as they are stored.
    """
    ROWS: gl.constexpr = 16 * BANDS
    SL: gl.constexpr = gl.SliceLayout(2, MMA)
    scale = gl.convert_layout(scale, SL, assert_trivial=True)
    zero = gl.convert_layout(zero, SL, assert_trivial=True).to(gl.float32)
    if ZERO[0] != 1 or ZERO[1] != 1:
        zero = zero * per_row(ZERO, WARPS, ROWS, SL)
    offset = -per_row(SHIFT, WARPS, ROWS, SL)
    if ZEROS_KIND == "original" or ZEROS_KIND == "quantized":
        offset = zero if SHIFT[0] == 0 and SHIFT[1] == 0 else zero + offset
    if SCALE_KIND != "none":
        scale = decode_scale(scale, SCALE_KIND)
        offset = offset * scale
    if ZEROS_KIND == "rescale":
        offset = offset + zero
    if SCALE_KIND == "none":
        acc = acc + part
    else:
        factor, part = gl.broadcast(scale.expand_dims(2), part)
        acc = multiply_add(part, factor, acc, IN_PLACE)
    if SUMS:
        if BANDS > 1 and sums.shape[1] > 1:
            COLUMNS: gl.constexpr = sums.shape[2]
            wide = acc.reshape([WARPS, BANDS, 16, COLUMNS])
            sums = gl.convert_layout(
                sums.reshape([WARPS, 1, 16, COLUMNS]), wide.type.layout, assert_trivial=True
            )  # fmt: skip
            sums, wide = gl.broadcast(sums, wide)
            sums = gl.convert_layout(sums.reshape([WARPS, ROWS, COLUMNS]), MMA, assert_trivial=True)
        offset, acc = gl.broadcast(offset.expand_dims(2), acc)
        sums, acc = gl.broadcast(sums, acc)
        acc = multiply_add(sums, offset, acc, IN_PLACE)
    return acc


@gluon.jit
def words_of_bytes(bytes):
    """uint8 [.., 4 * words] -> int32 [.., words]."""
    SHAPE: gl.constexpr = bytes.shape[:2] + [bytes.shape[2] // 4, 2, 2]
    even, odd = gl.split(bytes.to(gl.int32).reshape(SHAPE))
    low, high = gl.split(even | (odd << 8))
    return low | (high << 16)


@gluon.jit
def scale_pair(words, HIGH: gl.constexpr, DTYPE: gl.constexpr):
    """Two of the four e4m3 scales in a word -> a register of them in the operand's dtype."""
    CHOSEN: gl.constexpr = "{ .reg .b16 a, b; .reg .b32 t; .reg .f32 x, y; mov.b32 {a, b}, $1; " + (
        "cvt.rn.f16x2.e4m3x2 t, b; " if HIGH else "cvt.rn.f16x2.e4m3x2 t, a; "
    )
    if DTYPE == gl.float16:
        return gl.inline_asm_elementwise(
            CHOSEN + "mov.b32 $0, t; }", "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            CHOSEN + "mov.b32 {a, b}, t; cvt.f32.f16 x, a; cvt.f32.f16 y, b; "
            "cvt.rn.bf16x2.f32 $0, y, x; }",
            "=r,r", [words], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@gluon.jit
def times_scales(a, pairs, ODD: gl.constexpr, MMA: gl.constexpr):
    """The row operand times its rows' scales, the ODD ones or the others of pairs [WARPS, rows]."""
    dA: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    pairs = gl.convert_layout(pairs, gl.SliceLayout(2, dA), assert_trivial=True).expand_dims(2)
    like = gl.full(a.shape, 0, gl.int32, dA)
    pairs, like = gl.broadcast(pairs, like)
    CHOSEN: gl.constexpr = "{ .reg .b16 a, b; .reg .b32 t; mov.b32 {a, b}, $2; mov.b32 t, " + (
        "{b, b}; " if ODD else "{a, a}; "
    )
    if a.dtype == gl.float16:
        return gl.inline_asm_elementwise(
            CHOSEN + "mul.rn.f16x2 $0, $1, t; }", "=r,r,r,r", [a, pairs], dtype=gl.float16,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            CHOSEN + "mul.rn.bf16x2 $0, $1, t; }", "=r,r,r,r", [a, pairs], dtype=gl.bfloat16,
            is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def load_operand(a_smem, unit, SINGLE: gl.constexpr, dB: gl.constexpr):
    """A of a unit as the column operand: [WARPS, UNIT_K, columns]."""
    if SINGLE:  # one row: every column reads it, the others' results are never stored
        single = a_smem.index(unit)
        row = single.reshape([single.shape[0], single.shape[2]]).load(gl.SliceLayout(2, dB))
        row = row.expand_dims(2)
        like = gl.full([row.shape[0], row.shape[1], 8], 0, row.dtype, dB)
        row, like = gl.broadcast(row, like)
        return row
    else:
        return a_smem.index(unit).permute((0, 2, 1)).load(dB)


@gluon.jit
def multiply_unit(
    main, extra, lane, b, scales, zeros, ones, totals_smem, first_total, acc, part, sums,
    ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, LOOKUP: gl.constexpr, SCALED: gl.constexpr,
    AHEAD: gl.constexpr, IN_PLACE: gl.constexpr,
    WIDTH: gl.constexpr, EXTRA: gl.constexpr,
    SCALE_KIND: gl.constexpr, ZEROS_KIND: gl.constexpr, SUMS: gl.constexpr, GROUP: gl.constexpr,
    ONE: gl.constexpr, SHIFT: gl.constexpr, ZERO: gl.constexpr,
    WARPS: gl.constexpr, BANDS: gl.constexpr, UNIT_K: gl.constexpr, WARP_K: gl.constexpr,
    COLUMNS: gl.constexpr, FIRST: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """acc, part and sums with the products of one unit added.

    part, sums: of the group that is not complete yet (without groups: of the row), acc: of the
    groups before; SCALED: of odd steps. main, extra: words as load_plane returns them; lane: as
    lane_offset gives it; b: [WARPS, UNIT_K, columns]; scales, zeros: [WARPS, rows, groups of an
    iteration], e8m0 and SCALED ones in words of four where they were read so; ones: as ones_operand
    gives it. FIRST: the unit's first k in its iteration; first_total: the iteration's first sum.
    """
    ROWS: gl.constexpr = 16 * BANDS
    dA: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    dB: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    CHUNKS: gl.constexpr = UNIT_K * WIDTH // 256
    SPAN: gl.constexpr = 512 // WIDTH // 4
    STEPS: gl.constexpr = SPAN // 16
    PAIRS: gl.constexpr = UNIT_K // SPAN
    SHARED: gl.constexpr = WARP_K if GROUP == 0 or GROUP > WARP_K else GROUP
    IN_UNIT: gl.constexpr = UNIT_K if SHARED > UNIT_K else SHARED
    PER_PART: gl.constexpr = IN_UNIT // SPAN if IN_UNIT > SPAN else 1  # pairs decoded together
    PARTS: gl.constexpr = PAIRS // PER_PART
    DTYPE: gl.constexpr = b.dtype
    FOLDED: gl.constexpr = GROUP != 0 and not SCALED

    w = main.reshape([WARPS, BANDS, CHUNKS, 8, 4, 2, 2]).permute([0, 1, 3, 4, 2, 5, 6])
    w = w.reshape([WARPS, BANDS, 8, 4, PARTS, PER_PART, 2]).permute([0, 1, 2, 3, 5, 6, 4])
    if EXTRA != 0:
        # a word of the 1-bit plane covers a pair of words of the 2-bit plane
        e = extra.reshape([WARPS, BANDS, CHUNKS // 2, 8, 4, 4]).permute([0, 1, 3, 4, 2, 5])
        e = e.reshape([WARPS, BANDS, 8, 4, PARTS, PER_PART]).permute([0, 1, 2, 3, 5, 4])
    b = b.reshape([WARPS, PARTS, PER_PART, STEPS, 16, COLUMNS]).permute([0, 2, 4, 5, 3, 1])
    if PER_PART > 1:
        wide = gl.full([WARPS, 16, PER_PART * 16], 0.0, DTYPE, dA)
        wide = wide.reshape([WARPS, 16, PER_PART, 16])
        ones = gl.convert_layout(
            ones.reshape([WARPS, 16, 1, 16]), wide.type.layout, assert_trivial=True
        )  # fmt: skip
        ones, wide = gl.broadcast(ones, wide)
        ones = ones.reshape([WARPS, 16, PER_PART * 16])
        ones = gl.convert_layout(ones, dA, assert_trivial=True)
    for p in gl.static_range(PARTS):
        words = take(w, p)
        operands = [words]
        if EXTRA != 0:
            both = gl.join(take(e, p), take(e, p))
            operands = [words, gl.convert_layout(both, words.type.layout, assert_trivial=True)]
        if LOOKUP:
            operands = [words, lane]
        if DTYPE == gl.float16:
            o = gl.inline_asm_elementwise(
                ASM, CONSTRAINTS, operands, dtype=(gl.float16,) * (32 // WIDTH), is_pure=True,
                pack=2,
            )  # fmt: skip
        else:
            o = gl.inline_asm_elementwise(
                ASM, CONSTRAINTS, operands, dtype=(gl.bfloat16,) * (32 // WIDTH), is_pure=True,
                pack=2,
            )  # fmt: skip
        bp = take(b, p)
        for t in gl.static_range(STEPS):
            # the two halves of a register are the two words of a pair to the compiler: dimension 5
            # is h from here on; joins add r3 and x
            a = gl.join(gl.join(o[4 * t], o[4 * t + 1]), gl.join(o[4 * t + 2], o[4 * t + 3]))
            a = a.permute([0, 1, 6, 2, 4, 7, 3, 5]).reshape([WARPS, ROWS, PER_PART * 16])
            a = gl.convert_layout(a, dA, assert_trivial=True)
            bt = take(bp, t).reshape([WARPS, PER_PART * 16, COLUMNS])
            bt = gl.convert_layout(bt, dB, assert_trivial=True)
            if FOLDED and (FIRST + p * PER_PART * SPAN + t * 16) % SHARED == 0:
                part = gl.zeros([WARPS, ROWS, COLUMNS], gl.float32, MMA)
                sums = gl.zeros([WARPS, 16, COLUMNS], gl.float32, MMA)
            if SCALED:
                words = take(scales, (FIRST + p * SPAN) // (4 * GROUP))
                pair = scale_pair(words, (FIRST + p * SPAN) // (2 * GROUP) % 2, DTYPE)
                a = times_scales(a, pair, t % 2, MMA)
            if SCALED and t % 2 == 1:  # two chains of products
                acc = mma_v2(a, bt, acc)
            else:
                part = mma_v2(a, bt, part)
            if SUMS and not AHEAD:
                sums = mma_v2(ones, bt, sums)
            # k up to which this step completes the iteration: its last pair's, its own
            if (
                FOLDED
                and (FIRST + (p * PER_PART + PER_PART - 1) * SPAN + t * 16 + 16) % SHARED == 0
            ):
                known = sums
                if AHEAD:
                    known = load_totals(
                        totals_smem, first_total + (FIRST + p * PER_PART * SPAN + t * 16) // SHARED,
                        MMA,
                    )  # fmt: skip
                acc = fold(
                    acc, part, known,
                    stored_scale(
                        scales, (FIRST + p * PER_PART * SPAN + t * 16) // SHARED, SCALE_KIND
                    ),
                    take(zeros, (FIRST + p * PER_PART * SPAN + t * 16) // SHARED),
                    SCALE_KIND, ZEROS_KIND, SUMS, ONE, SHIFT, ZERO, IN_PLACE, WARPS, BANDS,
                    MMA,
                )  # fmt: skip
    return acc, part, sums


@gluon.jit
def successor(
    slab, tile, i, tiles, SLABS: gl.constexpr, ITERATIONS: gl.constexpr, STRIDE_K: gl.constexpr
):  # fmt: skip
    """(tile, first k, whether there is one) of a block's iteration after iteration i."""
    here = i + 1 < ITERATIONS
    next_tile = gl.where(here, tile, tile + gl.num_programs(0))
    next_i = gl.where(here, i + 1, 0)
    if SLABS == 1:
        return next_tile, next_i * STRIDE_K, next_tile < tiles
    else:
        over = next_tile >= tiles
        next_tile = gl.where(over, gl.program_id(0), next_tile)
        next_slab = gl.where(over, slab + 1, slab)
        return next_tile, (next_slab * ITERATIONS + next_i) * STRIDE_K, next_slab < SLABS


@gluon.jit
def store_rows(
    OUT, BIAS, GLOBAL_SCALE, result, m, n, N, inside
):  # fmt: skip
    """Epilogue of a tile: global scale, bias, conversion, store."""
    if GLOBAL_SCALE is not None:
        result = result * gl.load(GLOBAL_SCALE)
    if BIAS is not None:
        result = result + gl.load(BIAS + n, mask=inside, other=0).to(gl.float32)
    gl.store(OUT + (m * N + n), result.to(OUT.dtype.element_ty), mask=inside)


@gluon.jit
def finish_tile(
    OUT, BIAS, GLOBAL_SCALE, PARTS, sum_smem, acc, part, sums, scales, zeros, slab, tile, M, N,
    SCALE_KIND: gl.constexpr, ZEROS_KIND: gl.constexpr, SUMS: gl.constexpr, GROUP: gl.constexpr,
    UNIT: gl.constexpr, ONE: gl.constexpr, SHIFT: gl.constexpr, ZERO: gl.constexpr,
    ROWS_A: gl.constexpr, WARPS: gl.constexpr, BANDS: gl.constexpr, SLABS: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """The sum over warps, and over slabs through PARTS; stores the tile's results."""
    ROWS: gl.constexpr = 16 * BANDS
    if GROUP == 0:
        acc = fold(
            acc, part, sums, take(scales, 0), take(zeros, 0), SCALE_KIND, ZEROS_KIND, SUMS, ONE,
            SHIFT, ZERO, False, WARPS, BANDS, MMA,
        )  # fmt: skip
    unit = per_row(UNIT, WARPS, ROWS, gl.SliceLayout(2, MMA)).expand_dims(2)
    unit, acc = gl.broadcast(unit, acc)
    acc = acc * unit
    if ROWS_A == 1:  # all columns are equal
        sum_smem.reshape([WARPS, ROWS]).store(gl.max(acc, axis=2))
    else:
        sum_smem.permute((0, 2, 1)).store(acc)
    SUM: gl.constexpr = partial_sums_layout(WARPS, ROWS, ROWS_A)
    OUTPUT: gl.constexpr = gl.SliceLayout(0, SUM)
    result = gl.sum(sum_smem.load(SUM), axis=0)
    m = gl.arange(0, ROWS_A, gl.SliceLayout(1, OUTPUT)).expand_dims(1)
    n = (tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(0, OUTPUT))).expand_dims(0)
    inside = (m < M) & (n < N)
    if SLABS == 1:
        store_rows(OUT, BIAS, GLOBAL_SCALE, result, m, n, N, inside)
    else:
        result += gl.load(PARTS + (m * N + n), mask=inside & (slab > 0), other=0.0)
        if slab == SLABS - 1:
            store_rows(OUT, BIAS, GLOBAL_SCALE, result, m, n, N, inside)
        else:
            gl.store(PARTS + (m * N + n), result, mask=inside)


@gluon.jit(do_not_specialize=["M", "N", "K", "G", "EARLY"])
def decode_kernel(
    A, W, OUT, SCALE, ZEROS, BIAS, GLOBAL_SCALE, PARTS,
    M, N, K, G, EARLY,
    BITS: gl.constexpr, WIDTH: gl.constexpr, EXTRA: gl.constexpr, TILE_K: gl.constexpr,
    ASM: gl.constexpr, CONSTRAINTS: gl.constexpr, FILL: gl.constexpr,
    UNIT: gl.constexpr, ONE: gl.constexpr, SHIFT: gl.constexpr, ZERO: gl.constexpr,
    SUMS: gl.constexpr, AHEAD: gl.constexpr, SCALED: gl.constexpr, IN_PLACE: gl.constexpr,
    SCALE_KIND: gl.constexpr, ZEROS_KIND: gl.constexpr, GROUP: gl.constexpr,
    GROUPS_ALIGNED: gl.constexpr, EXACT: gl.constexpr, ROWS_EXACT: gl.constexpr,
    VECTOR: gl.constexpr, ROWS_A: gl.constexpr,
    WARPS: gl.constexpr, BANDS: gl.constexpr, UNIT_K: gl.constexpr, DEPTH: gl.constexpr,
    ITERATIONS: gl.constexpr, SLABS: gl.constexpr, ONE_TILE: gl.constexpr,
):  # fmt: skip
    """OUT[M, N], M <= ROWS_A (1, 8 or 16). Grid: at most one block for each row tile of W.

    EARLY: whether the weights may be read before the previous kernel in the stream is complete.
    EXACT: K is a whole number of slabs; ROWS_EXACT: N of tiles. GROUPS_ALIGNED: a warp's scales of
    an iteration can be read at once. VECTOR: values of A that can be copied at once, 8 or 1.
    ONE_TILE: no block has more than one tile, so its sums stay in registers from slab to slab; else
    they go to PARTS, float32 (M, N). A thread reads there what it wrote itself, so the order of
    summation is always the same.
    """
    ROWS: gl.constexpr = 16 * BANDS
    COLUMNS: gl.constexpr = 16 if ROWS_A == 16 else 8
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8]
    )  # fmt: skip
    dB: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    UNITS: gl.constexpr = ITERATIONS * DEPTH
    WARP_K: gl.constexpr = DEPTH * UNIT_K  # of a warp in an iteration
    STRIDE_K: gl.constexpr = WARPS * WARP_K
    SLAB_K: gl.constexpr = ITERATIONS * STRIDE_K
    COUNT: gl.constexpr = WARP_K // GROUP if GROUP != 0 and GROUP < WARP_K else 1
    # what applies to a whole row, and is left to the end
    LEFT_GROUP: gl.constexpr = 0 if SCALED else GROUP
    LEFT_SCALE: gl.constexpr = "none" if SCALED else SCALE_KIND

    # Tensors go in powers of two: a slab is copied in one piece if its units are one, else one for
    # each iteration, with a barrier in between.
    PIECES: gl.constexpr = 1 if UNITS & (UNITS - 1) == 0 else ITERATIONS
    a_smem = gl.allocate_shared_memory(
        A.dtype.element_ty, [PIECES, UNITS // PIECES, WARPS, ROWS_A, UNIT_K], whole_layout(ROWS_A)
    )  # fmt: skip
    SHARED: gl.constexpr = GROUP if COUNT > 1 else WARP_K  # k of a group in an iteration of a warp
    PER_SUM: gl.constexpr = SHARED // UNIT_K if SHARED > UNIT_K else 1  # units
    CHUNK: gl.constexpr = units_added_at_once(ROWS_A, UNIT_K, UNITS // PIECES, PER_SUM)
    totals_smem = a_smem
    if AHEAD:
        totals_smem = gl.allocate_shared_memory(
            gl.float32, [UNITS // CHUNK, CHUNK * UNIT_K // SHARED, WARPS, ROWS_A],
            gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]),
        )  # fmt: skip
    # [warp, row of A, row of W], swizzled so that neither the writes of accumulator fragments nor
    # the reads along rows meet in a bank
    sum_smem = gl.allocate_shared_memory(
        gl.float32, [WARPS, ROWS_A, ROWS],
        gl.SwizzledSharedLayout(8, 2, min(4, ROWS // 8), [2, 1, 0])
        if ROWS_A > 1
        else gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]),
    )  # fmt: skip

    # Before what precedes is complete, only weights that it cannot have written may be read; the
    # next kernel may do so because this one has waited.
    if EARLY == 0:
        wait_for_previous_kernel()
    let_next_kernel_start()
    ones = ones_operand(M, N, ONE, A.dtype.element_ty, WARPS, gl.DotOperandLayout(0, MMA, 2))
    padded_k = (K + TILE_K - 1) // TILE_K * TILE_K
    tiles = (N + ROWS - 1) // ROWS
    first_tile = gl.program_id(0)
    pointers = iteration_pointers(
        W, first_tile, 0, padded_k, WIDTH, EXTRA, TILE_K, WARPS, BANDS, UNIT_K, DEPTH
    )  # fmt: skip
    ring = ()
    for d in gl.static_range(DEPTH):
        ring = ring + (load_unit(
            pointers, d, padded_k, True, (0, 0),
            WIDTH, EXTRA, TILE_K, EXACT, WARPS, BANDS, UNIT_K,
        ),)  # fmt: skip
    keep_loads_here()
    scale, zero = load_scales_and_zeros(
        SCALE, ZEROS, first_tile, 0, N, G, True, BITS, SCALE_KIND, ZEROS_KIND, GROUP,
        GROUPS_ALIGNED, EXACT, ROWS_EXACT, COUNT, WARPS, BANDS, WARP_K,
    )  # fmt: skip
    LOOKUP: gl.constexpr = FILL != ""
    if LOOKUP:
        gl.inline_asm_elementwise(FILL, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    wait_for_previous_kernel()

    acc = gl.zeros([WARPS, ROWS, COLUMNS], gl.float32, MMA)
    part = gl.zeros([WARPS, ROWS, COLUMNS], gl.float32, MMA)
    sums = gl.zeros([WARPS, 16, COLUMNS], gl.float32, MMA)
    for slab in range(SLABS):
        stage_activations(
            A, a_smem, slab * SLAB_K, M, K, PIECES, UNITS // PIECES, ROWS_A, DEPTH, WARPS, UNIT_K,
            VECTOR, EXACT,
        )  # fmt: skip
        if AHEAD:
            sum_activations(a_smem, totals_smem, PER_SUM, ROWS_A, WARPS, UNIT_K)
        lane = lane_offset() if LOOKUP else 0
        tile = first_tile
        while tile < tiles:
            if not ONE_TILE:
                acc = gl.zeros([WARPS, ROWS, COLUMNS], gl.float32, MMA)
                part = gl.zeros([WARPS, ROWS, COLUMNS], gl.float32, MMA)
                sums = gl.zeros([WARPS, 16, COLUMNS], gl.float32, MMA)
            scales = scale
            zeros = zero
            for i in range(ITERATIONS):
                next_tile, next_k, more = successor(
                    slab, tile, i, tiles, SLABS, ITERATIONS, STRIDE_K
                )  # fmt: skip
                scales = scale
                zeros = zero
                factors = scale
                if SCALED and scale.dtype == gl.uint8:
                    factors = words_of_bytes(scale)
                pointers = iteration_pointers(
                    W, next_tile, next_k, padded_k, WIDTH, EXTRA, TILE_K, WARPS, BANDS, UNIT_K,
                    DEPTH,
                )  # fmt: skip
                units = reinterpret(
                    a_smem.index(0 if PIECES == 1 else i), a_smem.dtype,
                    [UNITS // PIECES, WARPS, ROWS_A, UNIT_K], unit_layout(ROWS_A),
                )  # fmt: skip
                first_unit = i * DEPTH if PIECES == 1 else 0
                refilled = ()
                for d in gl.static_range(DEPTH):
                    if d == DEPTH // 2:  # half of this iteration's have served and free registers
                        scale, zero = load_scales_and_zeros(
                            SCALE, ZEROS, next_tile, next_k, N, G, more, BITS, SCALE_KIND,
                            ZEROS_KIND, GROUP, GROUPS_ALIGNED, EXACT, ROWS_EXACT, COUNT, WARPS,
                            BANDS, WARP_K,
                        )  # fmt: skip
                    b = load_operand(
                        units, first_unit + d, ROWS_A == 1, dB
                    )  # fmt: skip
                    acc, part, sums = multiply_unit(
                        ring[d][0], ring[d][1], lane, b, factors, zeros, ones, totals_smem,
                        i * (WARP_K // SHARED), acc, part, sums,
                        ASM, CONSTRAINTS, LOOKUP, SCALED, AHEAD, IN_PLACE, WIDTH, EXTRA, SCALE_KIND,
                        ZEROS_KIND, SUMS, GROUP, ONE, SHIFT, ZERO, WARPS, BANDS, UNIT_K, WARP_K,
                        COLUMNS, d * UNIT_K, MMA,
                    )  # fmt: skip
                    # a unit's registers are refilled as soon as it is decoded
                    refilled = refilled + (load_unit(
                        pointers, d, padded_k, more, ring[d],
                        WIDTH, EXTRA, TILE_K, EXACT, WARPS, BANDS, UNIT_K,
                    ),)  # fmt: skip
                    keep_loads_here()
                ring = refilled
            if SLABS == 1 or not ONE_TILE:
                finish_tile(
                    OUT, BIAS, GLOBAL_SCALE, PARTS, sum_smem, acc, part, sums, scales, zeros, slab,
                    tile, M, N, LEFT_SCALE, ZEROS_KIND, SUMS, LEFT_GROUP, UNIT, ONE, SHIFT, ZERO,
                    ROWS_A, WARPS, BANDS, 1 if ONE_TILE else SLABS, MMA,
                )  # fmt: skip
            elif slab == SLABS - 1:
                finish_tile(
                    OUT, BIAS, GLOBAL_SCALE, PARTS, sum_smem, acc, part, sums, scales, zeros, slab,
                    tile, M, N, LEFT_SCALE, ZEROS_KIND, SUMS, LEFT_GROUP, UNIT, ONE, SHIFT, ZERO,
                    ROWS_A, WARPS, BANDS, 1, MMA,
                )  # fmt: skip
            tile += gl.num_programs(0)
