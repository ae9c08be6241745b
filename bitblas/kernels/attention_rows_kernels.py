"""Device code of attention with some dozens of rows over quantised caches: Gluon, Hopper.

Such calls have too much arithmetic for mma.sync and too little for decoding to be free: a code is
decoded once for all rows of a tile, to float16 in shared memory, while the matrix unit works:

    K[i] in shared memory                            codes of K[i+1], V[i] in registers
    scores = Q K[i]^T        meanwhile V[i] is decoded, V[i+1] loaded
    weights of the scores
    sums += weights V[i]     meanwhile K[i+1] is decoded, K[i+2] loaded

A warpgroup's products have 64 rows, of which a thread has two: g and g + 8 of its warp, the first
and second half here, [4 warps, 8] rows each. Up to 32 rows are all in the first half (HALVES = 1),
so that nothing is computed for what is not there but products.

Dims are in the order in which threads that read 16 bytes of a cache each store their values without
bank conflicts, keys in the one in which a thread's columns of scores are four times four successive
ones: so it reads what belongs to them, which is prepared once for all rows, in few pieces.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

from .attention_decode_kernels import (
    TINY,
    from_e4m3,
    log2,
    of_head,
    power_of_two,
    subtract_halves,
    unpack_halves,
)
from .device import keep_loads_here, let_next_kernel_start
from .versions import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

KEYS = gl.constexpr(64)  # of a step
SLACK = gl.constexpr(8.0)  # how much, as a power of two, scores exceed what weights are relative to


# --- layouts ---------------------------------------------------------------------------------


@gluon.constexpr_function
def product_layout(COLUMNS):
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16]
    )


@gluon.constexpr_function
def words_layout(PIECES):
    """[64 keys, PIECES * 4 words], 16 bytes of a key in a thread, keys as key_of has them."""
    bases = [[0, 4 << i] for i in range(PIECES.bit_length() - 1)]
    bases = bases + [[key, 0] for key in (1, 4, 8, 2, 16, 32)]
    return gl.DistributedLinearLayout(
        [[0, 1], [0, 2], *bases[7:]], bases[:5], bases[5:7], [], [64, PIECES * 4]
    )


@gluon.constexpr_function
def pairs_layout():
    """[32] of two keys each, in every warp."""
    return gl.BlockedLayout([1], [32], [4], [0])


@gluon.constexpr_function
def columns_layout():
    """[64 keys]: those of a thread's columns of scores."""
    return gl.DistributedLinearLayout(
        [[1], [2], [16], [32]], [[4], [8], [0], [0], [0]], [[0], [0]], [], [64]
    )


@gluon.jit
def key_of(n):
    """The key of a step that column n of the scores is."""
    return n // 16 * 16 + n // 2 % 4 * 4 + n // 8 % 2 * 2 + n % 2


@gluon.jit
def dim_of(p, KIND: gl.constexpr, DIM: gl.constexpr):
    """The dim that is p-th in shared memory: as in_order has them."""
    PART: gl.constexpr = DIM // 2 if KIND == "int4" else DIM
    if KIND == "int4":  # of a word's bytes the second and third change places
        p = p // 4 * 4 + p % 2 * 2 + p // 2 % 2
    if PART >= 128:
        return p // 128 * 128 + p // 8 % 8 * 16 + p // 64 % 2 * 8 + p % 8
    else:
        return p


@gluon.jit
def in_order(x, PART: gl.constexpr):
    """[64, PART / 2] words of dims -> panels of 64 dims, [PART, 32]: a thread's 16 dims are 8 of a
    panel and 8 of the next, or 16 of one if there are no two."""
    if PART >= 128:
        x = x.reshape([64, PART // 128, 8, 2, 4]).permute((1, 3, 0, 2, 4))
    return x.reshape([PART // 64 * 64, 32])


# --- loads and codes -------------------------------------------------------------------------


PANELS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))


@gluon.jit
def start_copy(CODES, ring, ready, slot, batch, key, head, needed, EACH: gl.constexpr):
    """Has 64 keys copied into a slot of the ring, which is EACH of its tiles, if they are needed."""
    barrier = ready.index(slot)
    mbarrier.expect(barrier, CODES.block_type.nbytes, needed)
    tma_load(CODES, [batch, key, head, 0], barrier, ring.index(slot * EACH), needed)


@gluon.jit
def read_codes(ring, slot, WORDS: gl.constexpr, EACH: gl.constexpr):
    """A slot's words, [64, WORDS]."""
    x = ring.index(slot * EACH).load(words_layout(WORDS // 4))
    x = x.reshape([4, 4, 2, 2, WORDS]).permute((0, 2, 1, 3, 4))
    return x.reshape([64, WORDS])


@gluon.jit
def next_slot(slot, phase, SLOTS: gl.constexpr):
    slot += 1
    around = slot == SLOTS
    return gl.where(around, 0, slot), gl.where(around, phase ^ 1, phase)


@gluon.jit
def load_number_pairs(pointer, left):
    """Words of a step's scales or zero points, two in each."""
    pair = gl.arange(0, 32, pairs_layout())
    return gl.load(pointer + pair, mask=2 * pair < left, other=0)


@gluon.jit
def store_pairs(smem, low, high):
    """The numbers of a step's keys, for load_columns."""
    smem.store(gl.join(low, high).reshape([64]))


@gluon.jit
def load_columns(smem, L: gl.constexpr):
    """[1, 1, 64] as scores have columns."""
    x = smem.load(columns_layout()).reshape([4, 4, 2, 2]).permute((0, 2, 1, 3)).reshape([64])
    x = gl.convert_layout(x, gl.SliceLayout(0, gl.SliceLayout(0, L)), assert_trivial=True)
    return x.expand_dims(0).expand_dims(0)


@gluon.jit
def warp_max(x):
    """The largest of a warp's numbers, which are not negative."""
    x = x.to(gl.int32, bitcast=True)
    largest = gl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip
    return largest.to(gl.float32, bitcast=True)


@gluon.jit
def load_numbers(pointers, first: gl.constexpr, left):
    """Words of the numbers of a step `first` keys on; left: keys from where pointers are."""
    result = ()
    for i in gl.static_range(len(pointers)):
        result = result + (load_number_pairs(pointers[i] + first // 2, left - first),)
    return result


@gluon.jit
def advanced(pointers, WORDS: gl.constexpr):
    result = ()
    for i in gl.static_range(len(pointers)):
        result = result + (pointers[i] + WORDS,)
    return result


@gluon.jit
def allocate_numbers(K_KIND: gl.constexpr, V_KIND: gl.constexpr):
    """For what `prepare` says."""
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    scales = gl.allocate_shared_memory(gl.float32, [64], ONE)
    result = (scales, gl.allocate_shared_memory(gl.float32, [64], ONE), scales, scales)
    if K_KIND == "int4":
        zeros = gl.allocate_shared_memory(gl.float32, [64], ONE)
        result = (result[0], result[1], zeros, scales)
    if V_KIND == "int4":
        zeros = gl.allocate_shared_memory(gl.float32, [64], ONE)
        result = (result[0], result[1], result[2], zeros)
    return result + (gl.allocate_shared_memory(gl.float32, [32], ONE),)


@gluon.jit
def prepare(
    numbers, smem, unit, left, K_KIND: gl.constexpr, V_KIND: gl.constexpr, BF16: gl.constexpr
):
    """A step's numbers for `weigh`: what scores are multiplied by; the scales of values in units of
    the largest so far; what times a query's sum is added to scores; zero points of values; the unit
    before divided by that one, which is returned."""
    LAST: gl.constexpr = len(smem) - 1
    pair = 2 * gl.arange(0, 32, pairs_layout())
    low, high = unpack_halves(numbers[0], BF16)
    store_pairs(smem[0], low, high)
    if K_KIND == "int4":
        low_zero, high_zero = unpack_halves(numbers[2], BF16)
        store_pairs(smem[2], (0.0 - low_zero) * low, (0.0 - high_zero) * high)
    low, high = unpack_halves(numbers[1], BF16)
    low = gl.where(pair < left, low, 0.0)
    high = gl.where(pair + 1 < left, high, 0.0)
    largest = warp_max(gl.maximum(unit, gl.maximum(gl.abs(low), gl.abs(high))))
    inverse = 1.0 / largest
    store_pairs(smem[1], low * inverse, high * inverse)
    if V_KIND == "int4":
        low, high = unpack_halves(numbers[len(numbers) - 1], BF16)
        low = gl.where(pair < left, low - 8.0, 0.0)
        high = gl.where(pair + 1 < left, high - 8.0, 0.0)
        store_pairs(smem[3], low, high)
    smem[LAST].store(unit * inverse)
    return largest


@gluon.jit
def centred_bytes(x):
    """A word's four codes as two registers: 1024 + 128 + code, less 1152."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 u, c; xor.b32 u, $2, 0x80808080; mov.b32 c, 0x64806480; "
        "prmt.b32 $0, u, 0x64646464, 0x4140; prmt.b32 $1, u, 0x64646464, 0x4342; "
        "sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c; }",
        "=&r,=&r,r", [x], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def masked_or(x, MASK: gl.constexpr, BITS: gl.constexpr):
    """x & MASK | BITS"""
    return gl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,n,n", [x, MASK, BITS], dtype=gl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def nibbles(x, CENTRED: gl.constexpr):
    """A word's low nibbles of bytes 0, 2 and of 1, 3; its high ones, 16 times as large: as float16
    that are 2^-24 as large, subnormal, or CENTRED: code - 8."""
    y = x >> 8
    if CENTRED:
        low = gl.full(x.shape, 0x64086408, gl.int32, x.type.layout)  # 1024 + 8
        high = gl.full(x.shape, 0x64806480, gl.int32, x.type.layout)  # 1024 + 16 * 8
        return (
            subtract_halves(masked_or(x, 0x000F000F, 0x64006400), low),
            subtract_halves(masked_or(y, 0x000F000F, 0x64006400), low),
            subtract_halves(masked_or(x, 0x00F000F0, 0x64006400), high),
            subtract_halves(masked_or(y, 0x00F000F0, 0x64006400), high),
        )
    else:
        return x & 0x000F000F, y & 0x000F000F, x & 0x00F000F0, y & 0x00F000F0


@gluon.jit
def decode(words, smem, KIND: gl.constexpr, CENTRED: gl.constexpr, DIM: gl.constexpr):
    """A step's codes -> float16 in shared memory, [DIM / 64 * 64, 32] words. CENTRED: int4 are
    code - 8, as sums over many keys need, of which the matrix unit would lose digits else."""
    if KIND == "int4":
        l0, l1, h0, h1 = nibbles(words, CENTRED)
        low = gl.join(l0, l1).reshape([64, DIM // 4])
        high = gl.join(h0, h1).reshape([64, DIM // 4])
        if DIM == 64:  # halves of the one panel
            smem.store(gl.join(low, high).permute((0, 2, 1)).reshape([64, 32]))
        else:
            both = gl.join(in_order(low, DIM // 2), in_order(high, DIM // 2))
            smem.store(both.permute((2, 0, 1)).reshape([DIM, 32]))
    else:
        if KIND == "int8":
            first, second = centred_bytes(words)
        else:
            first, second = from_e4m3(words)
        smem.store(in_order(gl.join(first, second).reshape([64, DIM // 2]), DIM))


# --- the kernel ------------------------------------------------------------------------------


@gluon.jit
def halves_of(x):
    """[64, columns] -> its rows' halves, [4, 8, columns] each."""
    return gl.split(x.reshape([4, 2, 8, x.shape[1]]).permute((0, 2, 3, 1)))


@gluon.jit
def of_halves(halves, L: gl.constexpr):
    """The inverse."""
    x = gl.join(halves[0], halves[1]).permute((0, 3, 1, 2)).reshape([64, halves[0].shape[2]])
    return gl.convert_layout(x, L, assert_trivial=True)


@gluon.jit
def as_in(x, other):
    """Numbers of rows, [4, 8, 1], as a tensor of other columns has them."""
    L: gl.constexpr = gl.SliceLayout(2, other.type.layout)
    return gl.convert_layout(x.reshape([4, 8]), L, assert_trivial=True).expand_dims(2)


@gluon.jit
def lane_sum(x):
    """[4, 8, 64] -> [4, 8, 4]: sums over the columns of each of the four lanes of a row."""
    return gl.sum(gl.sum(x.reshape([4, 8, 8, 4, 2]), axis=4), axis=2)


@gluon.jit
def whole(sums, L: gl.constexpr):
    """lane_sum's of halves -> [4, 8, 1] of all lanes."""
    result = ()
    for h in gl.static_range(len(sums)):
        x = gl.convert_layout(gl.sum(sums[h], axis=2), gl.SliceLayout(2, L), assert_trivial=True)
        result = result + (x.expand_dims(2),)
    return result


@gluon.jit
def limited(scores, n, limits):
    result = ()
    for h in gl.static_range(len(scores)):
        result = result + (gl.where(n < limits[h], scores[h], float("-inf")),)
    return result


@gluon.jit
def weigh(
    product, smem, flags, rows, m, norm, zero_sums, first, all_see, K_KIND: gl.constexpr,
    V_KIND: gl.constexpr,
):  # fmt: skip
    """(weights of a step's keys, zeros for a half without rows; what sums so far are to be
    multiplied by; the new largest scores, sums of weights, and weighted sums of zero points)."""
    totals, factors, limits = rows
    HALVES: gl.constexpr = len(m)
    halves = halves_of(product)
    L: gl.constexpr = halves[0].type.layout
    shrink = smem[len(smem) - 1].reshape([4, 8]).load(gl.SliceLayout(2, L)).expand_dims(2)
    scales = load_columns(smem[0], L)
    if K_KIND == "int4":
        zeros = load_columns(smem[2], L)
    scores = ()
    for h in gl.static_range(HALVES):
        if K_KIND == "int4":
            one = gl.fma(halves[h], scales, zeros * totals[h].expand_dims(2))
        else:
            one = halves[h] * scales
        scores = scores + (one,)
    if first + KEYS > all_see:
        n = key_of(gl.arange(0, 64, gl.SliceLayout(0, gl.SliceLayout(0, L))))
        scores = limited(scores, first + n.expand_dims(0).expand_dims(0), limits)
    value_scales = load_columns(smem[1], L)
    if V_KIND == "int4":
        value_zeros = load_columns(smem[3], L)
    weights = ()
    alphas = ()
    tops = ()
    new_norm = ()
    new_zero_sums = ()
    rising = shrink != 1.0
    for h in gl.static_range(HALVES):
        top = gl.max(scores[h], axis=2).expand_dims(2) * factors[h]
        rises = top > m[h] + SLACK
        rising = rising | rises
        top = gl.where(rises, top, m[h])
        shift = gl.where(top == float("-inf"), 0.0, top)
        p = power_of_two(gl.fma(scores[h], factors[h], 0.0 - shift))
        alpha = power_of_two(m[h] - shift)
        new_norm = new_norm + (norm[h] * as_in(alpha, norm[h]) + lane_sum(p),)
        alpha = alpha * shrink
        p = p * value_scales
        if V_KIND == "int4":
            added = lane_sum(p * value_zeros)
            new_zero_sums = new_zero_sums + (zero_sums[h] * as_in(alpha, added) + added,)
        else:
            new_zero_sums = zero_sums
        weights = weights + (p.to(gl.float16),)
        alphas = alphas + (alpha,)
        tops = tops + (top,)
    if HALVES == 1:
        weights = weights + (gl.full([4, 8, 64], 0.0, gl.float16, L),)
    flags.store(rising.to(gl.int32).reshape([32]))
    return weights, alphas, tops, new_norm, new_zero_sums


@gluon.jit
def rescaled(sums, alphas, L: gl.constexpr):
    halves = halves_of(sums)
    result = ()
    for h in gl.static_range(len(alphas)):
        result = result + (halves[h] * as_in(alphas[h], halves[h]),)
    if len(alphas) == 1:
        result = result + (halves[1],)
    return of_halves(result, L)


@gluon.jit
def row_of(tile, h, L: gl.constexpr, HALVES: gl.constexpr):
    """[4, 8]: the row that is in each place of a half."""
    warp = gl.arange(0, 4, gl.SliceLayout(1, L)).expand_dims(1)
    g = gl.arange(0, 8, gl.SliceLayout(0, L)).expand_dims(0)
    return tile * (32 * HALVES) + warp * (8 * HALVES) + h * 8 + g


@gluon.jit
def load_queries(
    Q, q_smem, tile, head, q_len, q_token, q_head, GROUP: gl.constexpr, DIM: gl.constexpr,
    K_KIND: gl.constexpr, HALVES: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """A tile's rows as float16 into shared memory, times powers of two that bring their largest
    elements to 1 or a little above. For each half, [4, 8]: what brings scores back; the sums of
    rows as scores have them."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [32 // min(32, DIM // 8), min(32, DIM // 8)],
                                          [4, 1], [1, 0])  # fmt: skip
    place = gl.arange(0, 64, gl.SliceLayout(1, LOAD))
    if HALVES == 1:
        r = tile * 32 + place // 16 * 8 + place % 8
        live = (r // GROUP < q_len) & (place // 8 % 2 == 0)
    else:
        r = tile * 64 + place
        live = r // GROUP < q_len
    d = dim_of(gl.arange(0, DIM, gl.SliceLayout(0, LOAD)), K_KIND, DIM)
    offsets = (r // GROUP).to(gl.int64) * q_token + (head * GROUP + r % GROUP) * q_head
    q = gl.load(Q + (offsets.expand_dims(1) + d.expand_dims(0)), mask=live.expand_dims(1), other=0)
    wide = q.to(gl.float32)
    largest = gl.max(gl.abs(wide), axis=1)
    exponent = (largest.to(gl.int32, bitcast=True) >> 23) & 255
    factor = ((254 - gl.minimum(exponent, 253)) << 23).to(gl.float32, bitcast=True)
    wide = wide * factor.expand_dims(1)
    total = gl.sum(wide, axis=1)
    if K_KIND == "int4":  # for the high nibbles
        wide = gl.where(d.expand_dims(0) < DIM // 2, wide, wide * 0.0625)
        total = total * (1.0 / 16777216.0)
    q = wide.to(gl.float16)
    back = (16777216.0 if K_KIND == "int4" else 1.0) / factor
    q_smem.store(q)
    backs = ()
    totals = ()
    for h in gl.static_range(HALVES):
        backs = backs + (of_rows(back, h, L),)
        totals = totals + (of_rows(total, h, L),)
    return backs, totals


@gluon.jit
def of_rows(x, h: gl.constexpr, L: gl.constexpr):
    """[64] -> [4, 8] of the h-th half, in the layout of the scores' rows."""
    x = gl.convert_layout(x, gl.SliceLayout(1, product_layout(64)))
    first, second = gl.split(x.reshape([4, 2, 8]).permute((0, 2, 1)))
    if h == 0:
        return gl.convert_layout(first, gl.SliceLayout(2, L), assert_trivial=True)
    else:
        return gl.convert_layout(second, gl.SliceLayout(2, L), assert_trivial=True)


@gluon.jit
def scaled_back(x, DIM: gl.constexpr):
    """Sums of int4, of which those of high nibbles are 16 times as large."""
    R: gl.constexpr = x.type.layout
    p = gl.arange(0, DIM, gl.SliceLayout(0, gl.SliceLayout(0, R))).expand_dims(0).expand_dims(0)
    return gl.where(p < DIM // 2, x, x * 0.0625)


@gluon.jit
def store_rows(
    OUT, x, r, head, q_len, o_token, o_head, GROUP: gl.constexpr, KIND: gl.constexpr,
    DIM: gl.constexpr,
):  # fmt: skip
    """r: [4, 8], the rows of x."""
    R: gl.constexpr = x.type.layout
    p = gl.arange(0, DIM, gl.SliceLayout(0, gl.SliceLayout(0, R))).expand_dims(0).expand_dims(0)
    r = r.expand_dims(2)
    pointer = OUT + (r // GROUP).to(gl.int64) * o_token + (head * GROUP + r % GROUP) * o_head
    live = (r // GROUP < q_len) & (p >= 0)
    gl.store(pointer + dim_of(p, KIND, DIM), x.to(OUT.dtype.element_ty), mask=live)


@gluon.jit
def attend_rows(
    Q, K, V, OUT, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS, LENGTHS, LSE,
    q_len, k_len, tiles, splits, q_batch, q_token, q_head,
    ks_batch, ks_head, vs_batch, vs_head, o_split, o_batch, o_token, o_head,
    SCALE: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    ROW_LIMITS: gl.constexpr, K_KIND: gl.constexpr, V_KIND: gl.constexpr, BF16: gl.constexpr,
    SPLIT: gl.constexpr, HALVES: gl.constexpr, SLOTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """32 * HALVES rows of one key head against a part of its keys; see attend_few, whose arguments
    these are. LATE: values are loaded behind the weights, half a step ahead, for fewer registers.
    """
    if PDL:
        let_next_kernel_start()
    SCORES: gl.constexpr = product_layout(64)
    SUMS: gl.constexpr = product_layout(DIM)
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    K_WORDS: gl.constexpr = DIM // 8 if K_KIND == "int4" else DIM // 4
    V_WORDS: gl.constexpr = DIM // 8 if V_KIND == "int4" else DIM // 4
    tile = tiles - 1 - gl.program_id(0)
    head = gl.program_id(1)
    batch = gl.program_id(2) // splits
    split = gl.program_id(2) % splits
    length = k_len
    if LENGTHS is not None:
        length = gl.minimum(gl.load(LENGTHS + batch).to(gl.int32), k_len)
    Q += batch.to(gl.int64) * (q_batch * 8)
    K_SCALE = of_head(K_SCALE, batch.to(gl.int64), head, ks_batch, ks_head, 2)
    V_SCALE = of_head(V_SCALE, batch.to(gl.int64), head, vs_batch, vs_head, 2)
    if K_KIND == "int4":
        K_ZEROS = of_head(K_ZEROS, batch.to(gl.int64), head, ks_batch, ks_head, 2)
    if V_KIND == "int4":
        V_ZEROS = of_head(V_ZEROS, batch.to(gl.int64), head, vs_batch, vs_head, 2)

    last = length  # one behind the last key that a row of this tile sees
    all_see = length
    if ROW_LIMITS:
        final = gl.minimum((tile * (32 * HALVES) + 32 * HALVES - 1) // GROUP, q_len - 1)
        last = gl.maximum(length - q_len + 1 + final, 0)
        all_see = length - q_len + 1 + tile * (32 * HALVES) // GROUP
    per_split = (last + KEYS * splits - 1) // (KEYS * splits) * KEYS
    lo = split * per_split
    hi = gl.minimum(lo + per_split, last)
    all_see = gl.minimum(all_see, hi)

    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_smem = gl.allocate_shared_memory(gl.float16, [64, DIM], TILE)
    k_words = gl.allocate_shared_memory(gl.int32, [DIM, 32], PANELS)
    v_words = gl.allocate_shared_memory(gl.int32, [DIM, 32], PANELS)
    k_smem = reinterpret(k_words, gl.float16, [64, DIM], TILE).permute((1, 0))
    v_smem = reinterpret(v_words, gl.float16, [64, DIM], TILE)
    prepared = allocate_numbers(K_KIND, V_KIND)
    flags = gl.allocate_shared_memory(gl.int32, [32], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    # a ring of codes: those of keys and of values of a step in turn, in slots for the wider
    WIDEST: gl.constexpr = max(K_WORDS, V_WORDS)
    K_EACH: gl.constexpr = WIDEST // K_WORDS
    V_EACH: gl.constexpr = WIDEST // V_WORDS
    WIDE: gl.constexpr = gl.NVMMASharedLayout(4 * WIDEST, 8, 4)
    ring = gl.allocate_shared_memory(gl.int8, [SLOTS, 1, 64, 1, 4 * WIDEST], WIDE)
    k_ring = reinterpret(ring, gl.int8, [SLOTS * K_EACH, 1, 64, 1, 4 * K_WORDS], K.layout)
    v_ring = reinterpret(ring, gl.int8, [SLOTS * V_EACH, 1, 64, 1, 4 * V_WORDS], V.layout)
    K_TILE: gl.constexpr = gl.NVMMASharedLayout(4 * K_WORDS, 32, 2)
    V_TILE: gl.constexpr = gl.NVMMASharedLayout(4 * V_WORDS, 32, 2)
    k_codes = reinterpret(ring, gl.int32, [SLOTS * K_EACH, 64, K_WORDS], K_TILE)
    v_codes = reinterpret(ring, gl.int32, [SLOTS * V_EACH, 64, V_WORDS], V_TILE)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()

    for i in gl.static_range(SLOTS):
        first = lo + i // 2 * KEYS
        if i % 2 == 0:
            start_copy(K, k_ring, ready, i, batch, first, head, first < hi, K_EACH)
        else:
            start_copy(V, v_ring, ready, i, batch, first, head, first < hi, V_EACH)
    left = hi - lo  # keys from here on
    pointers = (K_SCALE + lo // 2, V_SCALE + lo // 2)
    if K_KIND == "int4":
        pointers = pointers + (K_ZEROS + lo // 2,)
    if V_KIND == "int4":
        pointers = pointers + (V_ZEROS + lo // 2,)
    first_numbers = load_numbers(pointers, 0, left)
    numbers = load_numbers(pointers, KEYS, left)
    keep_loads_here()

    sums = gl.zeros([64, DIM], gl.float32, SUMS)
    zero_scores = gl.zeros([64, 64], gl.float32, SCORES)
    L: gl.constexpr = halves_of(zero_scores)[0].type.layout
    backs, totals = load_queries(
        Q, q_smem, tile, head, q_len, q_token * 8, q_head * 8, GROUP, DIM, K_KIND, HALVES, L
    )  # fmt: skip
    factors = ()
    limits = ()
    m = ()
    norm = ()
    for h in gl.static_range(HALVES):
        r = row_of(tile, h, gl.SliceLayout(2, L), HALVES)
        query = r // GROUP
        seen = gl.minimum(length - q_len + 1 + query, hi) if ROW_LIMITS else query * 0 + hi
        limits = limits + (gl.where(query < q_len, seen, 0).expand_dims(2),)
        factors = factors + ((backs[h] * SCALE).expand_dims(2),)
        zero = gl.full([4, 8, 1], 0.0, gl.float32, L)
        m = m + (zero - float("inf"),)
        norm = norm + (lane_sum(gl.full([4, 8, 64], 0.0, gl.float32, L)),)
    zero_sums = norm
    rows = (totals, factors, limits)
    unit = gl.full([32], TINY, gl.float32, pairs_layout())
    unit = prepare(first_numbers, prepared, unit, left, K_KIND, V_KIND, BF16)
    slot = 0
    phase = 0
    mbarrier.wait(ready.index(0), 0, left > 0)
    decode(read_codes(k_codes, 0, K_WORDS, K_EACH), k_words, K_KIND, False, DIM)
    for first in range(lo, hi, KEYS):
        left = hi - first - KEYS  # of the next step
        pointers = advanced(pointers, KEYS // 2)
        fence_async_shared()
        product = warpgroup_mma(q_smem, k_smem, zero_scores, use_acc=False, is_async=True)
        # a slot is filled anew as soon as its codes are decoded
        later = first + SLOTS // 2 * KEYS
        if SLOTS % 2 == 0:
            start_copy(K, k_ring, ready, slot, batch, later, head, later < hi, K_EACH)
        else:
            start_copy(V, v_ring, ready, slot, batch, later, head, later < hi, V_EACH)
        slot, phase = next_slot(slot, phase, SLOTS)
        mbarrier.wait(ready.index(slot), phase)
        words = read_codes(v_codes, slot, V_WORDS, V_EACH)
        if V_KIND == "e4m3":  # what lies behind the end may be no number
            if left < 0:
                key = key_of(gl.arange(0, 64, gl.SliceLayout(1, words.type.layout)))
                words = gl.where(key.expand_dims(1) < left + KEYS, words, 0)
        decode(words, v_words, V_KIND, True, DIM)
        product = warpgroup_mma_wait(0, deps=(product,))
        weights, alphas, m, norm, zero_sums = weigh(
            product, prepared, flags, rows, m, norm, zero_sums, first, all_see, K_KIND, V_KIND
        )  # fmt: skip
        fence_async_shared()
        if gl.max(flags.load(pairs_layout()), 0) != 0:
            sums = rescaled(sums, alphas, SUMS)
        sums = warpgroup_mma(of_halves(weights, WEIGHTS), v_smem, sums, is_async=True)
        later = first + (SLOTS + 1) // 2 * KEYS
        if SLOTS % 2 == 0:
            start_copy(V, v_ring, ready, slot, batch, later, head, later < hi, V_EACH)
        else:
            start_copy(K, k_ring, ready, slot, batch, later, head, later < hi, K_EACH)
        slot, phase = next_slot(slot, phase, SLOTS)
        if left > 0:
            mbarrier.wait(ready.index(slot), phase)
        decode(read_codes(k_codes, slot, K_WORDS, K_EACH), k_words, K_KIND, False, DIM)
        unit = prepare(numbers, prepared, unit, left, K_KIND, V_KIND, BF16)
        numbers = load_numbers(pointers, KEYS, left)
        keep_loads_here()
        sums = warpgroup_mma_wait(0, deps=(sums,))

    unit = gl.max(unit, 0)
    norm = whole(norm, L)
    zero_sums = whole(zero_sums, L)
    found = halves_of(sums)
    OUT += batch.to(gl.int64) * o_batch
    if SPLIT:
        OUT += split.to(gl.int64) * o_split
        LSE += (split * (gl.num_programs(2) // splits) + batch) * q_len * (KV_HEADS * GROUP)
    for h in gl.static_range(HALVES):
        x = found[h]
        if V_KIND == "int4":
            x = scaled_back(x, DIM) - as_in(zero_sums[h], x)
        x = x * as_in(gl.where(norm[h] > 0, unit / norm[h], 0.0), x)
        store_rows(
            OUT, x, row_of(tile, h, gl.SliceLayout(2, x.type.layout), HALVES), head, q_len,
            o_token, o_head, GROUP, V_KIND, DIM,
        )  # fmt: skip
        if SPLIT:
            r = row_of(tile, h, gl.SliceLayout(2, L), HALVES).expand_dims(2)
            index = r // GROUP * (KV_HEADS * GROUP) + head * GROUP + r % GROUP
            lse = gl.where(norm[h] > 0, m[h] + log2(norm[h]), float("-inf"))
            gl.store(LSE + index, lse, mask=r // GROUP < q_len)
