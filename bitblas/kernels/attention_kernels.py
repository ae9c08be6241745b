"""Device code of attention: plain Triton, sm_80 and up, also Triton's interpreter.

A program of `attend` holds BLOCK_M rows: the queries of all query heads that share one key head,
so that grouped-query attention reads a key once. Row r is query r // GROUP of head r % GROUP.

K_KIND, V_KIND say how a cache is stored:
    "dense": the queries' dtype.
    "int8", "e4m3": a byte for each value.
    "int4": a byte for the codes of d (low nibble) and of d + DIM / 2, so that unpacking gives two
        tiles, each the operand of a product of its own, and nothing is shuffled.
Codes go to the matrix unit as they are, exact in float16; scales, one for a token and head,
multiply columns of scores (K) or of probabilities (V), and zero points go through row sums. Queries
are made float16 for that: where they are bfloat16, each row is first scaled by a power of two.
"""

# Triton gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

# Four bytes to four float16: a byte becomes the low bits of 1024 + byte, 1024 and the offset of
# its code are subtracted.
_INT8 = tl.constexpr("""{
.reg .b32 u, c;
xor.b32 u, $2, 0x80808080;
mov.b32 c, 0x64806480;
prmt.b32 $0, u, 0x64646464, 0x4140;
prmt.b32 $1, u, 0x64646464, 0x4342;
sub.f16x2 $0, $0, c;
sub.f16x2 $1, $1, c;
}""")
_INT4 = tl.constexpr("""{
.reg .b32 low, high, c;
and.b32 low, $4, 0x0f0f0f0f;
shr.b32 high, $4, 4;
and.b32 high, high, 0x0f0f0f0f;
mov.b32 c, 0x64086408;
prmt.b32 $0, low, 0x64646464, 0x4140;
prmt.b32 $1, low, 0x64646464, 0x4342;
prmt.b32 $2, high, 0x64646464, 0x4140;
prmt.b32 $3, high, 0x64646464, 0x4342;
sub.f16x2 $0, $0, c;
sub.f16x2 $1, $1, c;
sub.f16x2 $2, $2, c;
sub.f16x2 $3, $3, c;
}""")


@triton.jit
def int8_values(codes):
    if INTERPRETED:
        return codes.to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _INT8, "=&r,=&r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )


@triton.jit
def int4_values(codes):
    """Both nibbles less 8: those of d, those of d + DIM / 2."""
    if INTERPRETED:
        bits = codes.to(tl.int32)
        return (bits & 15).to(tl.float16) - 8.0, ((bits >> 4) & 15).to(tl.float16) - 8.0
    else:
        return tl.inline_asm_elementwise(
            _INT4, "=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.float16, tl.float16), is_pure=True,
            pack=4,
        )  # fmt: skip


@triton.jit
def e4m3_values(codes, NATIVE: tl.constexpr):
    """NATIVE: the GPU has an instruction for it (sm_89); else the fields are moved into a float16
    2^-8 times as large. NaN stays NaN."""
    if NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        bits = codes.to(tl.int16)
        magnitude = bits & 0x7F
        moved = (magnitude << 7) | tl.where(magnitude == 0x7F, 0x7C00, 0).to(tl.int16)
        return ((bits & -128) << 8 | moved).to(tl.int16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def load_tile(pointers, mask, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(pointers, mask=mask, other=0)
    else:
        return tl.load(pointers)


@triton.jit
def per_token(pointer, n, stride, length):
    """A scale or zero point of each token, float32; 0 behind the last."""
    return tl.load(pointer + n.to(tl.int64) * stride, mask=n < length, other=0).to(tl.float32)


@triton.jit
def attend_span(
    lo, hi, length, limit, q, q_high, q_sum, row_scale, m, norm, acc, acc_high, zero_sum, unit,
    K, V, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS,
    k_token, k_dim, v_token, ks_token, vs_token,
    DIM: tl.constexpr, D: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys lo..hi, in steps of BLOCK_N. MASKED: some rows do not see
    some of these keys, or keys end before hi.

    m: largest score so far, in units of log2. norm: sum of 2^(score - m). acc: sum of the weighted
    values, in units of `unit`, the largest scale of V so far, which keeps weights times scales in
    the range of float16. zero_sum: sum of weighted zero points, the same for all of a row's dims.
    """
    K_BYTES: tl.constexpr = DIM // 2 if K_KIND == "int4" else DIM
    V_BYTES: tl.constexpr = DIM // 2 if V_KIND == "int4" else DIM
    K_D: tl.constexpr = D // 2 if K_KIND == "int4" else D
    V_D: tl.constexpr = D // 2 if V_KIND == "int4" else D
    step = tl.arange(0, BLOCK_N)
    k_d = tl.arange(0, K_D)
    v_d = tl.arange(0, V_D)
    k_offsets = k_d[:, None] * k_dim + step[None, :] * k_token
    # 64 bits where a cache is longer than 32 reach; within a step they do
    k_wide = tl.full([], 1, tl.int64) * k_token
    v_wide = tl.full([], 1, tl.int64) * v_token
    v_offsets = step[:, None] * v_token + v_d[None, :]
    # Scales are too small for asynchronous copies, so they are loaded one step ahead here.
    if K_KIND != "dense":
        next_ks = per_token(K_SCALE, lo + step, ks_token, length)
    if K_KIND == "int4":
        next_kz = per_token(K_ZEROS, lo + step, ks_token, length)
    if V_KIND != "dense":
        next_vs = per_token(V_SCALE, lo + step, vs_token, length)
    if V_KIND == "int4":
        next_vz = per_token(V_ZEROS, lo + step, vs_token, length)
    for start in tl.range(lo, hi, BLOCK_N):
        n = start + step
        k_mask = (k_d[:, None] < K_BYTES) & (n[None, :] < length)
        codes = load_tile(K + start * k_wide + k_offsets, k_mask, MASKED or K_BYTES != K_D)
        if K_KIND == "int4":
            low, high = int4_values(codes)
            s = tl.dot(q_high, high, tl.dot(q, low))
            s -= q_sum[:, None] * (next_kz[None, :] - 8.0)
        elif K_KIND == "int8":
            s = tl.dot(q, int8_values(codes))
        elif K_KIND == "e4m3":
            s = tl.dot(q, e4m3_values(codes, NATIVE_FP8))
        else:
            s = tl.dot(q, codes)
        if K_KIND != "dense":
            s *= next_ks[None, :]
            next_ks = per_token(K_SCALE, n + BLOCK_N, ks_token, length)
        if K_KIND == "int4":
            next_kz = per_token(K_ZEROS, n + BLOCK_N, ks_token, length)
        if MASKED:
            s = tl.where(n[None, :] < limit[:, None], s, float("-inf"))
        larger = tl.maximum(m, tl.max(s, 1) * row_scale)
        if MASKED:  # a row that has seen no key yet
            shift = tl.where(larger == float("-inf"), 0.0, larger)
        else:
            shift = larger
        p = tl.math.exp2(s * row_scale[:, None] - shift[:, None])
        alpha = tl.math.exp2(m - shift)
        norm = norm * alpha + tl.sum(p, 1)
        m = larger
        if V_KIND != "dense":
            largest = tl.maximum(unit, tl.max(tl.abs(next_vs), 0))
            alpha *= unit / largest
            unit = largest
            p *= (next_vs / largest)[None, :]
            next_vs = per_token(V_SCALE, n + BLOCK_N, vs_token, length)
        if V_KIND == "int4":
            zero_sum = zero_sum * alpha + tl.sum(p * (next_vz - 8.0)[None, :], 1)
            next_vz = per_token(V_ZEROS, n + BLOCK_N, vs_token, length)
        v_mask = (n[:, None] < length) & (v_d[None, :] < V_BYTES)
        codes = load_tile(V + start * v_wide + v_offsets, v_mask, MASKED or V_BYTES != V_D)
        if V_KIND == "dense":
            acc = tl.dot(p.to(codes.dtype), codes, acc * alpha[:, None])
        elif V_KIND == "int4":
            low, high = int4_values(codes)
            acc = tl.dot(p.to(tl.float16), low, acc * alpha[:, None])
            acc_high = tl.dot(p.to(tl.float16), high, acc_high * alpha[:, None])
        elif V_KIND == "int8":
            acc = tl.dot(p.to(tl.float16), int8_values(codes), acc * alpha[:, None])
        else:
            values = e4m3_values(codes, NATIVE_FP8)
            acc = tl.dot(p.to(tl.float16), values, acc * alpha[:, None])
    return m, norm, acc, acc_high, zero_sum, unit


@triton.jit
def attend(
    Q, K, V, OUT, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS, LENGTHS, LSE,
    q_len, k_len, tiles, splits, q_batch, q_token, q_head, k_batch, k_token, k_head, k_dim,
    v_batch, v_token, v_head, ks_batch, ks_token, ks_head, vs_batch, vs_token, vs_head,
    o_split, o_batch, o_token, o_head,
    SCALE: tl.constexpr, GROUP: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr,
    D: tl.constexpr, CAUSAL: tl.constexpr, K_KIND: tl.constexpr, V_KIND: tl.constexpr,
    UNIT_Q: tl.constexpr, UNIT_K: tl.constexpr, UNIT_V: tl.constexpr, K_DIM_MAJOR: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PEEL: tl.constexpr,
    NATIVE_FP8: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of one key head against a part of its keys.

    Strides of Q, K and V are given in units of UNIT_* elements: what the compiler knows of them
    is that they are multiples. K_DIM_MAJOR: keys are contiguous along dim (else along tokens).
    LENGTHS: how many keys of each batch entry there are; None: k_len. D: DIM padded to a power of
    two. SCALE: log2(e) / sqrt(dim). PEEL: keys that every row sees are not masked.
    SPLIT: OUT is float32 [splits, ...] of the parts' own results and LSE the log2 of their sums,
    [splits, batch, q_len, heads]. LSE is None otherwise.
    """
    if PDL:
        gdc_launch_dependents()
    # the last rows first: of causal ones, they take longest
    tile = tiles - 1 - tl.program_id(0)
    head = tl.program_id(1)
    batch = (tl.program_id(2) // splits).to(tl.int64)
    split = tl.program_id(2) % splits
    length = k_len
    if LENGTHS is not None:
        length = tl.minimum(tl.load(LENGTHS + batch).to(tl.int32), k_len)

    r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = r // GROUP
    row_head = head * GROUP + r % GROUP
    live = query < q_len
    last = length  # one behind the last key that a row of this tile sees
    all_see = length
    limit = tl.where(live, length, 0)
    if CAUSAL:
        limit = tl.where(live, length - q_len + 1 + query, 0)
        final = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // GROUP, q_len - 1)
        last = tl.maximum(length - q_len + 1 + final, 0)
        all_see = length - q_len + 1 + (tile * BLOCK_M) // GROUP
    per_split = tl.cdiv(tl.cdiv(last, BLOCK_N), splits) * BLOCK_N
    lo = split * per_split
    hi = tl.minimum(lo + per_split, last)

    q_offsets = query.to(tl.int64) * (q_token * UNIT_Q) + row_head * (q_head * UNIT_Q)
    q_rows = Q + batch * q_batch * UNIT_Q + q_offsets
    Q_D: tl.constexpr = D // 2 if K_KIND == "int4" else D
    Q_DIM: tl.constexpr = DIM // 2 if K_KIND == "int4" else DIM
    d = tl.arange(0, Q_D)
    q_mask = live[:, None] & (d[None, :] < Q_DIM)
    q = tl.load(q_rows[:, None] + d[None, :], mask=q_mask, other=0)
    q_high = q
    if K_KIND == "int4":
        q_high = tl.load(q_rows[:, None] + Q_DIM + d[None, :], mask=q_mask, other=0)
    row_scale = tl.full([BLOCK_M], SCALE, tl.float32)
    q_sum = tl.zeros([BLOCK_M], tl.float32)
    if K_KIND != "dense":
        if q.dtype == tl.bfloat16:
            wide, wide_high = q.to(tl.float32), q_high.to(tl.float32)
            largest = tl.maximum(tl.max(tl.abs(wide), 1), tl.max(tl.abs(wide_high), 1))
            exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
            factor = ((254 - tl.minimum(exponent, 253)) << 23).to(tl.float32, bitcast=True)
            q = (wide * factor[:, None]).to(tl.float16)
            q_high = (wide_high * factor[:, None]).to(tl.float16)
            row_scale = row_scale / factor
        if K_KIND == "int4":
            q_sum = tl.sum(q.to(tl.float32), 1) + tl.sum(q_high.to(tl.float32), 1)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    V_D: tl.constexpr = D // 2 if V_KIND == "int4" else D
    acc = tl.zeros([BLOCK_M, V_D], tl.float32)
    acc_high = tl.zeros([BLOCK_M, V_D], tl.float32) if V_KIND == "int4" else 0.0
    zero_sum = tl.zeros([BLOCK_M], tl.float32) if V_KIND == "int4" else 0.0
    unit = 1e-37  # so that no scale at all is no division by zero

    if K_DIM_MAJOR:
        token_stride, dim_stride = k_token * UNIT_K, 1
    else:
        token_stride, dim_stride = 1, k_dim * UNIT_K
    K += batch * k_batch * UNIT_K + head.to(tl.int64) * (k_head * UNIT_K)
    V += batch * v_batch * UNIT_V + head.to(tl.int64) * (v_head * UNIT_V)
    if K_KIND != "dense":
        K_SCALE += batch * ks_batch + head * ks_head
    if K_KIND == "int4":
        K_ZEROS += batch * ks_batch + head * ks_head
    if V_KIND != "dense":
        V_SCALE += batch * vs_batch + head * vs_head
    if V_KIND == "int4":
        V_ZEROS += batch * vs_batch + head * vs_head
    middle = lo
    if PEEL:
        middle = tl.minimum(tl.maximum(all_see // BLOCK_N * BLOCK_N, lo), hi)
        m, norm, acc, acc_high, zero_sum, unit = attend_span(
            lo, middle, length, limit, q, q_high, q_sum, row_scale, m, norm, acc, acc_high,
            zero_sum, unit, K, V, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS,
            token_stride, dim_stride, v_token * UNIT_V, ks_token, vs_token,
            DIM, D, K_KIND, V_KIND, BLOCK_N, False, NATIVE_FP8,
        )  # fmt: skip
    m, norm, acc, acc_high, zero_sum, unit = attend_span(
        middle, hi, length, limit, q, q_high, q_sum, row_scale, m, norm, acc, acc_high, zero_sum,
        unit, K, V, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS,
        token_stride, dim_stride, v_token * UNIT_V, ks_token, vs_token,
        DIM, D, K_KIND, V_KIND, BLOCK_N, True, NATIVE_FP8,
    )  # fmt: skip

    factor = tl.where(norm > 0, 1 / norm, 0.0)  # a row without a key is zero
    if V_KIND != "dense":
        factor *= unit
    if V_KIND == "int4":
        acc -= zero_sum[:, None]
        acc_high -= zero_sum[:, None]
    rows = OUT + batch * o_batch + query.to(tl.int64) * o_token + row_head * o_head
    if SPLIT:
        rows += split.to(tl.int64) * o_split
        heads = KV_HEADS * GROUP
        index = ((split * (tl.num_programs(2) // splits) + batch) * q_len + query) * heads
        lse = tl.where(norm > 0, m + tl.math.log2(norm), float("-inf"))
        tl.store(LSE + index + row_head, lse, mask=live)
    d = tl.arange(0, V_D)
    V_DIM: tl.constexpr = DIM // 2 if V_KIND == "int4" else DIM
    o_mask = live[:, None] & (d[None, :] < V_DIM)
    kind = OUT.dtype.element_ty
    tl.store(rows[:, None] + d[None, :], (acc * factor[:, None]).to(kind), mask=o_mask)
    if V_KIND == "int4":
        high = (acc_high * factor[:, None]).to(kind)
        tl.store(rows[:, None] + V_DIM + d[None, :], high, mask=o_mask)


@triton.jit
def combine(
    PARTS, LSE, OUT, rows, q_len, splits, o_batch, o_token, o_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row of OUT from its parts, [splits, rows, DIM] float32, and the log2 of their sums.

    CHUNK: how many parts are read at a time. Parts are always added in the same order. PDL: started
    while the parts are still being computed.
    """
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, D)
    acc = tl.zeros([D], tl.float32)
    largest = float("-inf")
    total = 0.0
    for start in range(0, splits, CHUNK):
        part = start + tl.arange(0, CHUNK)
        lse = tl.load(LSE + part * rows + row, mask=part < splits, other=float("-inf"))
        mask = (part[:, None] < splits) & (d[None, :] < DIM)
        offsets = (part[:, None] * rows.to(tl.int64) + row) * DIM + d[None, :]
        values = tl.load(PARTS + offsets, mask=mask, other=0)
        top = tl.maximum(largest, tl.max(lse, 0))
        unit = tl.where(top == float("-inf"), 0.0, top)
        factor = tl.math.exp2(largest - unit)
        weight = tl.math.exp2(lse - unit)
        total = total * factor + tl.sum(weight, 0)
        acc = acc * factor + tl.sum(values * weight[:, None], 0)
        largest = top
    acc *= tl.where(total > 0, 1 / total, 0.0)
    head = row % HEADS
    token = row // HEADS
    out = OUT + token // q_len * o_batch + token % q_len * o_token + head * o_head
    tl.store(out + d, acc.to(OUT.dtype.element_ty), mask=d < DIM)


@triton.jit
def expand(
    X, OUT, SCALES, ZEROS, length, x_batch, x_token, x_head, x_dim,
    s_batch, s_token, s_head,
    UNIT: tl.constexpr, DIM_MAJOR: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NATIVE_FP8: tl.constexpr,
):  # fmt: skip
    """OUT [batch, length, HEADS, DIM], contiguous, in 16 bits: keys or values of any kind, order.

    For dense ones, which may be contiguous along tokens, that is a transposing copy.
    """
    BYTES: tl.constexpr = DIM // 2 if KIND == "int4" else DIM
    PARTS: tl.constexpr = (BYTES + BLOCK_D - 1) // BLOCK_D
    n = tl.program_id(0) // PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.program_id(0) % PARTS * BLOCK_D + tl.arange(0, BLOCK_D)
    if DIM_MAJOR:
        offsets = n.to(tl.int64)[:, None] * (x_token * UNIT) + d[None, :]
    else:
        offsets = n[:, None] + d.to(tl.int64)[None, :] * (x_dim * UNIT)
    inside = (n[:, None] < length) & (d[None, :] < BYTES)
    X += batch * x_batch * UNIT + head.to(tl.int64) * (x_head * UNIT)
    codes = tl.load(X + offsets, mask=inside, other=0)
    OUT += (batch * length * HEADS + head) * DIM
    targets = OUT + n.to(tl.int64)[:, None] * (HEADS * DIM) + d[None, :]
    kind = OUT.dtype.element_ty
    if KIND == "dense":
        tl.store(targets, codes, mask=inside)
    else:
        SCALES += batch * s_batch + head * s_head
        scale = per_token(SCALES, n, s_token, length)[:, None]
        if KIND == "int4":
            ZEROS += batch * s_batch + head * s_head
            zero = per_token(ZEROS, n, s_token, length)[:, None] - 8.0
            low, high = int4_values(codes)
            tl.store(targets, ((low - zero) * scale).to(kind), mask=inside)
            tl.store(targets + BYTES, ((high - zero) * scale).to(kind), mask=inside)
        elif KIND == "int8":
            tl.store(targets, (int8_values(codes) * scale).to(kind), mask=inside)
        else:
            tl.store(targets, (e4m3_values(codes, NATIVE_FP8) * scale).to(kind), mask=inside)
