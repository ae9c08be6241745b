"""Device code of attention with up to four rows over int8 and int4 caches: Gluon, lane by lane.

As attention_decode_kernels, whose loads and order of keys and dims this has, but codes stay
integers. mma.m16n8k32 multiplies their bytes by 16-bit fixed point: a row of queries has its
largest element for a unit, a step's weights the largest of them. The two digits of such a number
are columns side by side, so that a lane has both of one query:

    scores   lane 4g + c: query c, keys 2g and 2g + 1 of each 16
    sums     lane 4g + c: query c, rows (dims) g and g + 8 of each product

Bytes of keys are operands as they come, nibbles after a mask, values after a transpose of bytes:
218 instructions for 16 keys of int4 and dim 128, where float16 operands take 362. Sums of products
are exact, so nothing need be centred.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment, misc, var-annotated"

from __future__ import annotations

from .attention_decode_kernels import (
    every_layout,
    for_lanes,
    from_lane,
    join_all,
    keys_max,
    keys_sum,
    lanes_layout,
    load_keys,
    load_pairs,
    load_query,
    load_values,
    log2,
    of_head,
    of_lane,
    over_warps,
    permute_bytes,
    power_of_two,
    quad_max,
    quad_sum,
    row_dim,
    transpose,
    unpack_halves,
)
from .device import keep_loads_here, let_next_kernel_start
from .versions import gl, gluon

LARGEST = gl.constexpr(32639.0)  # 127 * 256 + 127
SMALLEST_UNIT = gl.constexpr(1e-33)  # of weights: LARGEST / unit is no infinity
FAR_SMALLER = gl.constexpr(2.0**-24)
# 1.5 * 2^23: a float whose low bits are an integer that is added to it; as bits; plus 128
ONE_AND_A_HALF = gl.constexpr(12582912.0)
ONE_AND_A_HALF_BITS = gl.constexpr(0x4B400000)
ROUNDING = gl.constexpr(12583040.0)


@gluon.jit
def multiply_codes(a, b0, b1, d, UNSIGNED: gl.constexpr):
    """d + a * b in int32; a: bytes, four registers of four, b: signed ones."""
    ASM: gl.constexpr = (
        "mma.sync.aligned.m16n8k32.row.col.s32."
        + ("u8" if UNSIGNED else "s8")
        + ".s8.s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return gl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
        [a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def larger(x, y):
    """NaN if one of them is."""
    return gl.inline_asm_elementwise(
        "max.NaN.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def reciprocal(x):
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def to_fixed(x, unit):
    """Bits whose lowest two bytes are the digits of round(x * unit): the high one, and the low one
    with its sign flipped; it takes -128 to 127."""
    return gl.fma(x, unit, ROUNDING).to(gl.int32, bitcast=True)


@gluon.jit
def bytes_of_keys(a, b, c, d):
    """Registers of the first, second, third and fourth bytes of four words."""
    x = permute_bytes(a, b, 0x5140)
    y = permute_bytes(c, d, 0x5140)
    z = permute_bytes(a, b, 0x7362)
    w = permute_bytes(c, d, 0x7362)
    return (
        permute_bytes(x, y, 0x5410), permute_bytes(x, y, 0x7632),
        permute_bytes(z, w, 0x5410), permute_bytes(z, w, 0x7632),
    )  # fmt: skip


@gluon.jit
def fixed_query(words, digit, KIND: gl.constexpr, BF16: gl.constexpr):
    """(registers, factor, sum): a digit of a row of queries, 0 the high one, in the order of words
    of keys, of int4 the registers of low nibbles and of high ones in turn; what integers are to be
    multiplied by, NaN if the row has infinities; their sum."""
    zero = gl.full(words[0].shape, 0.0, gl.float32, words[0].type.layout)
    largest = zero
    finite = zero
    for i in gl.static_range(len(words)):
        low, high = unpack_halves(words[i], BF16)
        largest = gl.maximum(largest, gl.maximum(gl.abs(low), gl.abs(high)))
        finite = gl.fma(low, zero, gl.fma(high, zero, finite))
    largest = gl.maximum(quad_max(largest), 1e-20)
    unit = LARGEST / largest
    total = zero
    result = ()
    for i in gl.static_range(len(words) // 2):
        d0, d1 = unpack_halves(words[2 * i], BF16)
        d2, d3 = unpack_halves(words[2 * i + 1], BF16)
        x0 = to_fixed(d0, unit)
        x1 = to_fixed(d1, unit)
        x2 = to_fixed(d2, unit)
        x3 = to_fixed(d3, unit)
        four = (x0, x1, x2, x3)
        for t in gl.static_range(4):
            total += four[t].to(gl.float32, bitcast=True) - ROUNDING
        high = permute_bytes(permute_bytes(x0, x1, 0x5151), permute_bytes(x2, x3, 0x5151), 0x5410)
        low = permute_bytes(permute_bytes(x0, x1, 0x4040), permute_bytes(x2, x3, 0x4040), 0x5410)
        result = result + (gl.where(digit == 0, high, low ^ -2139062144),)  # 0x80808080
    return result, largest / LARGEST + quad_sum(finite), quad_sum(total)


@gluon.jit
def load_codes(
    K, V, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS, first, g, c, hi,
    K_KIND: gl.constexpr, V_KIND: gl.constexpr, K_TOKEN: gl.constexpr, V_TOKEN: gl.constexpr,
    KEYS: gl.constexpr, K_WORDS: gl.constexpr, V_WORDS: gl.constexpr,
):  # fmt: skip
    """What a warp needs for a step: (keys, their scales, zeros, values, their scales, zeros)."""
    k_zeros = ()
    v_zeros = ()
    k_scales = load_pairs(K_SCALE, first, g, hi, KEYS)
    if K_KIND == "int4":
        k_zeros = load_pairs(K_ZEROS, first, g, hi, KEYS)
    keys = load_keys(K, first, g, c, hi, K_TOKEN, KEYS, K_WORDS)
    v_scales = load_pairs(V_SCALE, first, g, hi, KEYS)
    if V_KIND == "int4":
        v_zeros = load_pairs(V_ZEROS, first, g, hi, KEYS)
    values = load_values(V, first, g, c, hi, V_TOKEN, KEYS, V_WORDS)
    return keys, k_scales, k_zeros, values, v_scales, v_zeros


@gluon.jit
def integer_scores(near, far, queries, nil, KIND: gl.constexpr):
    """Products of two keys' words, those of near and of far, with a group of four queries."""
    WORDS: gl.constexpr = len(near)
    none = (nil, nil, nil, nil)
    if KIND == "int8":
        s = none
        for i in gl.static_range(WORDS // 2):
            a = (near[2 * i], far[2 * i], near[2 * i + 1], far[2 * i + 1])
            s = multiply_codes(a, queries[2 * i], queries[2 * i + 1], s, False)
        return s[0] * 256 + s[1], s[2] * 256 + s[3]
    else:
        low = none
        high = none
        for i in gl.static_range(WORDS // 2):
            a = (
                near[2 * i] & 0x0F0F0F0F, far[2 * i] & 0x0F0F0F0F,
                near[2 * i + 1] & 0x0F0F0F0F, far[2 * i + 1] & 0x0F0F0F0F,
            )  # fmt: skip
            low = multiply_codes(a, queries[4 * i], queries[4 * i + 2], low, True)
            a = (
                near[2 * i] & -252645136, far[2 * i] & -252645136,  # 0xF0F0F0F0
                near[2 * i + 1] & -252645136, far[2 * i + 1] & -252645136,
            )  # fmt: skip
            high = multiply_codes(a, queries[4 * i + 1], queries[4 * i + 3], high, True)
        return (
            (low[0] * 256 + low[1]) * 16 + (high[0] * 256 + high[1]),
            (low[2] * 256 + low[3]) * 16 + (high[2] * 256 + high[3]),
        )


@gluon.jit
def step_numbers(
    step, first, g, hi, K_KIND: gl.constexpr, V_KIND: gl.constexpr, BF16: gl.constexpr,
    KEYS: gl.constexpr,
):  # fmt: skip
    """Of a lane's keys: (whether they are inside, scales and zeros of keys, of values)."""
    _, ks, kz, _, vs, vz = step
    inside = ()
    k_scales = ()
    k_zeros = ()
    v_scales = ()
    v_zeros = ()
    for x in gl.static_range(KEYS // 16):
        n = first + 16 * x + 2 * g
        inside = inside + (n < hi, n + 1 < hi)
        k_scales = k_scales + unpack_halves(ks[x], BF16)
        v_scales = v_scales + unpack_halves(vs[x], BF16)
        if K_KIND == "int4":
            k_zeros = k_zeros + unpack_halves(kz[x], BF16)
        if V_KIND == "int4":
            v_zeros = v_zeros + unpack_halves(vz[x], BF16)
    return inside, k_scales, k_zeros, v_scales, v_zeros


@gluon.jit
def score_codes(
    keys, numbers, queries, total, limit, first, g, nil, KIND: gl.constexpr,
    ROW_LIMITS: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Scores of a lane's KEYS / 8 keys and its query of one group, not yet times its factor."""
    inside, scales, zeros, _, _ = numbers
    result = ()
    for i in gl.static_range(KEYS // 16):
        pair = integer_scores(keys[2 * i], keys[2 * i + 1], queries, nil, KIND)
        for t in gl.static_range(2):
            one = pair[t].to(gl.float32)
            if KIND == "int4":
                one = gl.fma(0.0 - zeros[2 * i + t], total, one)
            one = one * scales[2 * i + t]
            seen = inside[2 * i + t]
            if ROW_LIMITS:
                seen = first + (16 * i + t) + 2 * g < limit
            result = result + (gl.where(seen, one, float("-inf")),)
    return result


@gluon.jit
def weigh_codes(
    scores, numbers, factor, m, norm, unit, zero_acc, KIND: gl.constexpr, KEYS: gl.constexpr
):
    """Registers of columns of a group's weights; what sums so far are to be multiplied by; the new
    largest score, sum of weights, unit of sums, and sum of zero points of this lane's keys."""
    inside, _, _, scales, zeros = numbers
    top = scores[0]
    for i in gl.static_range(1, KEYS // 8):
        top = gl.maximum(top, scores[i])
    top = gl.maximum(m, keys_max(top) * factor)
    shift = gl.where(top == float("-inf"), 0.0, top)
    alpha = power_of_two(m - shift)
    norm = norm * alpha
    weights = ()
    for i in gl.static_range(KEYS // 8):
        p = power_of_two(gl.fma(scores[i], factor, 0.0 - shift))
        norm += p
        weights = weights + (gl.where(inside[i], p * scales[i], 0.0),)
    largest = gl.abs(weights[0])
    for i in gl.static_range(1, KEYS // 8):
        largest = larger(largest, gl.abs(weights[i]))
    largest = larger(largest, from_lane(largest, 4))
    largest = larger(largest, from_lane(largest, 8))
    largest = larger(largest, from_lane(largest, 16))
    # weights that are far smaller than those before need no digits of their own
    known = unit * alpha
    largest = larger(largest, gl.maximum(known * FAR_SMALLER, SMALLEST_UNIT))
    inverse = reciprocal(largest)
    ratio = known * inverse
    zero_acc = zero_acc * ratio
    fixed = ()
    for i in gl.static_range(KEYS // 8):
        x = to_fixed(weights[i], inverse * LARGEST)
        fixed = fixed + (x,)
        if KIND == "int4":
            rounded = x.to(gl.float32, bitcast=True) - ROUNDING
            zero_acc = gl.fma(rounded, gl.where(inside[i], zeros[i], 0.0), zero_acc)
    columns = ()
    for i in gl.static_range(KEYS // 16):
        digits = permute_bytes(fixed[2 * i], fixed[2 * i + 1], 0x4051)
        columns = columns + (transpose(digits ^ -2139095040),)  # 0x80800000
    return columns, ratio, top, norm, largest, zero_acc


@gluon.jit
def add_codes(values, columns, ratio, acc, magic, KIND: gl.constexpr, KEYS: gl.constexpr):
    """acc: the weighted sums of values, with those of a step."""
    added = ()
    for w in gl.static_range(len(values[0])):
        rows = ()  # of each 16 keys
        for x in gl.static_range(KEYS // 16):
            v = bytes_of_keys(
                values[4 * x][w], values[4 * x + 1][w], values[4 * x + 2][w], values[4 * x + 3][w]
            )  # fmt: skip
            if KIND == "int4":  # odd rows are 16 times as large
                v = (
                    v[0] & 0x0F0F0F0F, v[0] & -252645136, v[1] & 0x0F0F0F0F, v[1] & -252645136,
                    v[2] & 0x0F0F0F0F, v[2] & -252645136, v[3] & 0x0F0F0F0F, v[3] & -252645136,
                )  # fmt: skip
            rows = rows + (v,)
        for i in gl.static_range(len(rows[0]) // 2):
            d = (magic, magic, magic, magic)
            for y in gl.static_range(KEYS // 32):
                near = rows[2 * y]
                far = rows[2 * y + 1]
                a = (near[2 * i], near[2 * i + 1], far[2 * i], far[2 * i + 1])
                d = multiply_codes(a, columns[2 * y], columns[2 * y + 1], d, KIND == "int4")
            for e in gl.static_range(2):
                high = d[2 * e].to(gl.float32, bitcast=True)
                low = d[2 * e + 1].to(gl.float32, bitcast=True)
                both = gl.fma(high, 256.0, -257.0 * ONE_AND_A_HALF) + low
                added = added + (gl.fma(acc[len(added)], ratio, both),)
    return added


@gluon.jit
def attend_codes(
    Q, K, V, OUT, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS, LENGTHS, LSE,
    q_len, k_len, tiles, splits, q_batch, q_token, q_head, k_batch, k_head, v_batch, v_head,
    ks_batch, ks_head, vs_batch, vs_head, o_split, o_batch, o_token, o_head,
    SCALE: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    ROW_LIMITS: gl.constexpr, K_KIND: gl.constexpr, V_KIND: gl.constexpr, BF16: gl.constexpr,
    K_TOKEN: gl.constexpr, V_TOKEN: gl.constexpr, SPLIT: gl.constexpr, KEYS: gl.constexpr,
    WARPS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Four rows of one key head against a part of its keys; otherwise as attend_few.

    KEYS: of a warp in a step, 32 or 64.
    """
    if PDL:
        let_next_kernel_start()
    Q = Q.to(gl.pointer_type(gl.int32), bitcast=True)
    L: gl.constexpr = lanes_layout(WARPS)
    EVERY: gl.constexpr = gl.SliceLayout(0, every_layout(WARPS))
    tile = tiles - 1 - gl.program_id(0)
    head = gl.program_id(1)
    batch = (gl.program_id(2) // splits).to(gl.int64)
    split = gl.program_id(2) % splits
    length = k_len
    if LENGTHS is not None:
        length = gl.minimum(gl.load(LENGTHS + batch).to(gl.int32), k_len)
    lane = gl.arange(0, 32, gl.SliceLayout(0, L)).expand_dims(0)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, L)).expand_dims(1)
    lane, warp = gl.broadcast(lane, warp)
    g = lane // 4
    c = lane % 4

    K = of_head(K, batch, head.to(gl.int64), k_batch, k_head, 4)
    V = of_head(V, batch, head.to(gl.int64), v_batch, v_head, 4)
    K_SCALE = of_head(K_SCALE, batch, head, ks_batch, ks_head, 2)
    if K_KIND == "int4":
        K_ZEROS = of_head(K_ZEROS, batch, head, ks_batch, ks_head, 2)
    V_SCALE = of_head(V_SCALE, batch, head, vs_batch, vs_head, 2)
    if V_KIND == "int4":
        V_ZEROS = of_head(V_ZEROS, batch, head, vs_batch, vs_head, 2)
    # words of a row: a quarter of a key's, an eighth of a value's
    K_WORDS: gl.constexpr = DIM // 32 if K_KIND == "int4" else DIM // 16
    V_WORDS: gl.constexpr = DIM // 64 if V_KIND == "int4" else DIM // 32

    last = length
    if ROW_LIMITS:
        final = gl.minimum((tile * 4 + 3) // GROUP, q_len - 1)
        last = gl.maximum(length - q_len + 1 + final, 0)
    STRIDE: gl.constexpr = WARPS * KEYS
    per_split = (last + STRIDE * splits - 1) // (STRIDE * splits) * STRIDE
    lo = split * per_split
    hi = gl.minimum(lo + per_split, last)
    first = lo + warp * KEYS
    step = load_codes(
        K, V, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS, first, g, c, hi,
        K_KIND, V_KIND, K_TOKEN, V_TOKEN, KEYS, K_WORDS, V_WORDS,
    )  # fmt: skip
    keep_loads_here()

    TIMES: gl.constexpr = 16.0 if K_KIND == "int4" else 1.0  # how large integer scores are
    r = tile * 4 + g // 2  # columns: query g // 2, digit g % 2
    query = r // GROUP
    pointer = Q + batch * (q_batch * 4) + query.to(gl.int64) * (q_token * 4)
    pointer += (head * GROUP + r % GROUP) * (q_head * 4)
    words = load_query(pointer, c, query < q_len, K_KIND, K_WORDS, DIM)
    queries, factor, total = fixed_query(words, g % 2, K_KIND, BF16)
    factor = of_lane(factor, 8 * c) * (SCALE / TIMES)  # of query c, as everything below
    total = of_lane(total, 8 * c) * TIMES
    query = (tile * 4 + c) // GROUP
    limit = gl.where(query < q_len, gl.minimum(length - q_len + 1 + query, hi), 0)

    zero = gl.full([WARPS, 32], 0.0, gl.float32, L)
    nil = gl.full([WARPS, 32], 0, gl.int32, L)
    magic = gl.full([WARPS, 32], ONE_AND_A_HALF_BITS, gl.int32, L)
    ROWS: gl.constexpr = DIM // 16  # products that make up the dims
    acc = (zero,) * (2 * ROWS)  # weighted sums of values, in `unit`s
    zero_acc = zero  # of zero points, of a lane's keys
    m = zero - float("inf")
    norm = zero
    unit = zero + SMALLEST_UNIT  # of weights, times LARGEST

    for _ in range((hi - lo + STRIDE - 1) // STRIDE):
        next_step = load_codes(
            K, V, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS, first + STRIDE, g, c, hi,
            K_KIND, V_KIND, K_TOKEN, V_TOKEN, KEYS, K_WORDS, V_WORDS,
        )  # fmt: skip
        keep_loads_here()
        numbers = step_numbers(step, first, g, hi, K_KIND, V_KIND, BF16, KEYS)
        scores = score_codes(
            step[0], numbers, queries, total, limit, first, g, nil, K_KIND, ROW_LIMITS, KEYS
        )
        columns, ratio, m, norm, unit, zero_acc = weigh_codes(
            scores, numbers, factor, m, norm, unit, zero_acc, V_KIND, KEYS
        )
        acc = add_codes(step[3], columns, ratio, acc, magic, V_KIND, KEYS)
        step = next_step
        first += STRIDE

    # the warps' parts, in units of the largest score of all of them
    tops = gl.max(over_warps((m,), WARPS)[0], axis=0)
    weight = power_of_two(m - for_lanes(gl.where(tops == float("-inf"), 0.0, tops), WARPS))
    totals = gl.sum(over_warps((keys_sum(norm) * weight,), WARPS)[0], axis=0)
    weight = weight * (unit * (1.0 / LARGEST))
    zeros = keys_sum(zero_acc)
    scaled = ()
    for i in gl.static_range(2 * ROWS):
        value = acc[i]
        if V_KIND == "int4":
            value = value * (1.0 if i % 2 == 0 else 0.0625) - zeros
        scaled = scaled + (value * weight,)
    parts = gl.allocate_shared_memory(
        gl.float32, [WARPS, 2 * ROWS, 32], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )  # fmt: skip
    parts.permute((0, 2, 1)).store(join_all(scaled))
    SUM: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    RESULT: gl.constexpr = gl.SliceLayout(0, SUM)
    result = gl.sum(parts.load(SUM), axis=0)
    lane = gl.arange(0, 32, gl.SliceLayout(0, RESULT)).expand_dims(0)
    register = gl.arange(0, 2 * ROWS, gl.SliceLayout(1, RESULT)).expand_dims(1)
    total = gl.convert_layout(totals, gl.SliceLayout(0, RESULT)).expand_dims(0)
    result = result * gl.where(total == 0, 0.0, 1.0 / total)
    d = row_dim(register, lane // 4, V_KIND, V_WORDS, DIM)
    r = tile * 4 + lane % 4
    query = r // GROUP
    pointer = OUT + batch * o_batch + query.to(gl.int64) * o_token
    pointer += (head * GROUP + r % GROUP) * o_head
    if SPLIT:
        pointer += split.to(gl.int64) * o_split
    gl.store(pointer + d, result.to(OUT.dtype.element_ty), mask=query < q_len)
    if SPLIT:
        lane = gl.arange(0, 32, EVERY)
        r = tile * 4 + lane
        query = r // GROUP
        index = (split * (gl.num_programs(2) // splits) + batch) * q_len + query
        index = index * (KV_HEADS * GROUP) + head * GROUP + r % GROUP
        lse = gl.where(totals == 0, float("-inf"), tops + log2(totals))
        gl.store(LSE + index, lse, mask=(lane < 4) & (query < q_len))
