"""Device code of attention with few queries, at the speed of memory: Gluon, one lane at a time.

Time is what reading the cache takes, if nothing stands in the way: so no shared memory and no
barrier within the loop, codes go from global memory into the registers of the matrix instruction,
and every warp walks over keys of its own. Keys and values are loaded a step ahead.

Tensors are [WARPS, 32], an element for each lane; a tuple of them is what a lane has in registers.
mma.m16n8k16 multiplies rows by columns; with lane = 4 * g + c it wants

    rows      g, g + 8       of k = 2c, 2c+1 and 2c+8, 2c+9   (4 registers of two)
    columns   g              of k = 2c, 2c+1 and 2c+8, 2c+9   (2 registers of two)
    results   rows g, g + 8  of columns 2c, 2c+1              (4 registers)

Columns are queries in both products, for the cache is what there is much of.
Scores: rows g and g + 8 are keys 2g and 2g + 1, k is the dim. Which dims k means is free as long as
queries and keys agree, so lane c reads 16-byte pieces of its keys and takes codes as they come.
Values: rows are dims, k is the key: 2c, 2c+1, 2c+8, 2c+9 are keys 4c, 4c+2, 4c+1, 4c+3. Weights
get there by a transpose of 8 x 8 in the registers of a warp. Lane g reads pieces of its keys' rows
and puts codes of two keys side by side; which dim a row means is free, and is settled when stored.

Codes as float16: keys of int4 and int8 stay what they are in low mantissa bits, a subnormal 2^-24
as large as the code; what they miss is put right in the scores. Values, of which sums go over all
keys, are centred. An int4 of a byte's high nibble is 16 times as large, for which its query, or its
sum, is divided by 16.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

from .device import keep_loads_here, let_next_kernel_start
from .versions import gl, gluon

TINY = gl.constexpr(1e-37)


# --- one instruction each --------------------------------------------------------------------


@gluon.jit
def multiply(a, b0, b1, d, BF16: gl.constexpr):
    """d + a * b; a, d: tuples of 4."""
    ASM: gl.constexpr = (
        "mma.sync.aligned.m16n8k16.row.col.f32."
        + ("bf16.bf16" if BF16 else "f16.f16")
        + ".f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    return gl.inline_asm_elementwise(
        ASM, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [a[0], a[1], a[2], a[3], b0, b1, d[0], d[1], d[2], d[3]],
        dtype=(gl.float32, gl.float32, gl.float32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def permute_bytes(x, y, SELECTOR: gl.constexpr):
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,n", [x, y, SELECTOR], dtype=gl.int32, is_pure=True,
        pack=1,
    )  # fmt: skip


@gluon.jit
def subtract_halves(x, y):
    """Of two float16 in a register."""
    return gl.inline_asm_elementwise(
        "sub.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.int32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def from_e4m3(x):
    """Four e4m3 -> two registers of two float16."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 $0, l; "
        "cvt.rn.f16x2.e4m3x2 $1, h; }",
        "=r,=r,r", [x], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def pack_halves(low, high, BF16: gl.constexpr):
    """Two float32 -> a register."""
    if BF16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True,
            pack=1,
        )  # fmt: skip


@gluon.jit
def unpack_halves(x, BF16: gl.constexpr):
    """A register -> two float32."""
    if BF16:
        low = (x << 16).to(gl.float32, bitcast=True)
        high = (x & -65536).to(gl.float32, bitcast=True)
        return low, high
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
            "=f,=f,r", [x], dtype=(gl.float32, gl.float32), is_pure=True, pack=1,
        )  # fmt: skip


@gluon.jit
def power_of_two(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def log2(x):
    return gl.inline_asm_elementwise(
        "lg2.approx.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )  # fmt: skip


@gluon.jit
def valid_pair(x, n, end):
    """A word of numbers of tokens n and n + 1, of which what lies behind the end is zero."""
    return gl.where(n + 1 < end, x, gl.where(n < end, x & 0xFFFF, 0))


@gluon.jit
def from_lane(x, MASK: gl.constexpr):
    """x of lane ^ MASK."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,n", [x, MASK], dtype=gl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def of_lane(x, lane):
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;", "=f,f,r", [x, lane], dtype=gl.float32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def transpose(x):
    """Row g, columns 2c, 2c+1 of 8 x 8 in a register -> row g, columns 2c, 2c+1 transposed."""
    return gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=gl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def quad_max(x):
    """The largest of the four lanes of equal g."""
    x = gl.maximum(x, from_lane(x, 1))
    return gl.maximum(x, from_lane(x, 2))


@gluon.jit
def quad_sum(x):
    x += from_lane(x, 1)
    return x + from_lane(x, 2)


@gluon.jit
def keys_max(x):
    """The largest of the eight lanes of equal c."""
    x = gl.maximum(x, from_lane(x, 4))
    x = gl.maximum(x, from_lane(x, 8))
    return gl.maximum(x, from_lane(x, 16))


@gluon.jit
def keys_sum(x):
    x += from_lane(x, 4)
    x += from_lane(x, 8)
    return x + from_lane(x, 16)


# --- loads -----------------------------------------------------------------------------------


@gluon.constexpr_function
def lanes_layout(WARPS):
    """[WARPS, 32]."""
    return gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])


@gluon.constexpr_function
def every_layout(WARPS):
    """[WARPS, 32], all of them in every warp's registers."""
    return gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])


@gluon.jit
def load_piece(pointer, inside, WORDS: gl.constexpr, STREAM: gl.constexpr):
    """A tuple of WORDS consecutive words, 1, 2 or 4; zeros where not inside. STREAM: they are read
    once."""
    # L2 fetches whole lines: where a key is 64 bytes long, as with int4 and dim 128, another block
    # soon reads the other half (H200, 8 x 32768 keys of 8 heads: 81 us in place of 98). Of numbers
    # a warp's step reads 64 bytes, a block's 256.
    LOAD: gl.constexpr = "ld.global" + (".L1::no_allocate.L2::128B" if STREAM else ".L2::256B")
    pointer = pointer.to(gl.int64, bitcast=True)
    inside = inside.to(gl.int32)
    if WORDS == 1:
        x = gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p " + LOAD + ".b32 $0, [$1]; }",
            "=&r,l,r", [pointer, inside], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        return (x,)
    elif WORDS == 2:
        return gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; mov.b32 $1, 0; "
            "@p " + LOAD + ".v2.b32 {$0, $1}, [$2]; }",
            "=&r,=&r,l,r", [pointer, inside], dtype=(gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; "
            "mov.b32 $3, 0; @p " + LOAD + ".v4.b32 {$0, $1, $2, $3}, [$4]; }",
            "=&r,=&r,=&r,=&r,l,r", [pointer, inside],
            dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def of_head(X, batch, head, x_batch, x_head, UNIT: gl.constexpr):
    """Where a key head's part of X begins, as words; strides are in units of UNIT words."""
    X = X.to(gl.pointer_type(gl.int32), bitcast=True)
    return X + (batch * (x_batch * UNIT) + head * (x_head * UNIT))


@gluon.jit
def load_tokens(
    POINTER, first, run, lane, length, TOKEN: gl.constexpr, KEYS: gl.constexpr,
    WORDS: gl.constexpr, RUN: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """KEYS * RUN / 16 tuples of WORDS words, for RUN keys from first + RUN * run on, 16 further,
    ....: of each token the pieces of the lane-th of LANES lanes."""
    PIECE: gl.constexpr = min(4, WORDS)
    first = first + RUN * run
    pointer = POINTER + first.to(gl.int64) * TOKEN + lane * PIECE
    result = ()
    for t in gl.static_range(KEYS * RUN // 16):
        key = t // RUN * 16 + t % RUN
        words = ()
        for p in gl.static_range(WORDS // PIECE):
            words = words + load_piece(
                pointer + (key * TOKEN + LANES * PIECE * p), first + key < length, PIECE, True
            )  # fmt: skip
        result = result + (words,)
    return result


@gluon.jit
def load_keys(
    K, first, g, c, length, TOKEN: gl.constexpr, KEYS: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """KEYS / 8 tuples of WORDS words, for keys first + 2g, first + 2g + 1, 16 further, ...."""
    return load_tokens(K, first, g, c, length, TOKEN, KEYS, WORDS, 2, 4)


@gluon.jit
def load_values(
    V, first, g, c, length, TOKEN: gl.constexpr, KEYS: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """KEYS / 4 tuples of WORDS words, for keys first + 4c, ..., first + 4c + 3, 16 further, ...."""
    return load_tokens(V, first, c, g, length, TOKEN, KEYS, WORDS, 4, 8)


@gluon.jit
def load_pairs(POINTER, first, g, length, KEYS: gl.constexpr):
    """Words of two 16-bit numbers: those of keys first + 2g and the one behind, 16 further, ...."""
    result = ()
    for x in gl.static_range(KEYS // 16):
        inside = first + 16 * x + 2 * g < length
        result = result + load_piece(POINTER + (first // 2 + 8 * x + g), inside, 1, False)
    return result


@gluon.jit
def load_fours(POINTER, first, c, length, KEYS: gl.constexpr):
    """Two words: the numbers of keys first + 4c, ..., first + 4c + 3, 16 further, ...."""
    result = ()
    for x in gl.static_range(KEYS // 16):
        inside = first + 16 * x + 4 * c < length
        pointer = POINTER + (first // 4 + 4 * x + c) * 2
        result = result + load_piece(pointer, inside, 2, False)
    return result


@gluon.jit
def load_key_step(
    K, K_SCALE, K_ZEROS, first, g, c, length, KIND: gl.constexpr, TOKEN: gl.constexpr,
    KEYS: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """What a warp needs for the scores of a step: (keys, scales, zeros)."""
    scales = ()
    zeros = ()
    if KIND != "dense":
        scales = load_pairs(K_SCALE, first, g, length, KEYS)
    if KIND == "int4":
        zeros = load_pairs(K_ZEROS, first, g, length, KEYS)
    return load_keys(K, first, g, c, length, TOKEN, KEYS, WORDS), scales, zeros


@gluon.jit
def load_value_step(
    V, V_SCALE, V_ZEROS, first, g, c, length, KIND: gl.constexpr, TOKEN: gl.constexpr,
    KEYS: gl.constexpr, WORDS: gl.constexpr,
):  # fmt: skip
    """What a warp needs to add up a step: (values, scales, zeros)."""
    scales = ()
    zeros = ()
    if KIND != "dense":
        scales = load_pairs(V_SCALE, first, g, length, KEYS)
    if KIND == "int4":
        zeros = load_fours(V_ZEROS, first, c, length, KEYS)
    return load_values(V, first, g, c, length, TOKEN, KEYS, WORDS), scales, zeros


# --- codes to operands -----------------------------------------------------------------------


@gluon.jit
def key_operands(words, KIND: gl.constexpr):
    """Registers of a key's words, two for each product, in the order of query_operands."""
    result = ()
    for w in gl.static_range(len(words)):
        x = words[w]
        if KIND == "int4":  # low nibbles of bytes 0, 2 and 1, 3; high ones, 16 times as large
            y = (x >> 8) & 0x00FFFFFF
            result = result + (x & 0x000F000F, y & 0x000F000F, x & 0x00F000F0, y & 0x00F000F0)
        elif KIND == "int8":  # bytes 0, 2 and 1, 3, plus 128
            y = permute_bytes(x, x, 0x4341)
            result = result + ((x & 0x00FF00FF) ^ 0x00800080, (y & 0x00FF00FF) ^ 0x00800080)
        elif KIND == "e4m3":
            result = result + from_e4m3(x)
        else:
            result = result + (x,)
    return result


@gluon.jit
def centred_nibbles(x):
    """code - 8 of a word's low nibbles and 16 * (code - 8) of its high ones, in float16.

    Sums of codes that are off by their mean would lose digits: a tensor core cuts off what a sum
    has no room for, which over many keys amounts to more than values that nearly cancel.
    """
    y = (x >> 8) & 0x00FFFFFF
    low = gl.full(x.shape, 0x64086408, gl.int32, x.type.layout)  # 1024 + 8
    high = gl.full(x.shape, 0x64806480, gl.int32, x.type.layout)  # 1024 + 16 * 8
    return (
        subtract_halves((x & 0x000F000F) | 0x64006400, low),
        subtract_halves((x & 0x00F000F0) | 0x64006400, high),
        subtract_halves((y & 0x000F000F) | 0x64006400, low),
        subtract_halves((y & 0x00F000F0) | 0x64006400, high),
    )


@gluon.jit
def value_operands(even, odd, KIND: gl.constexpr):
    """Registers of the words of two keys: one for each dim that the words hold."""
    result = ()
    for w in gl.static_range(len(even)):
        a = even[w]
        b = odd[w]
        if KIND == "int4":
            result = result + centred_nibbles(permute_bytes(a, b, 0x5410))
            result = result + centred_nibbles(permute_bytes(a, b, 0x7632))
        elif KIND == "int8":
            # 1024 + 128 + code, less 1152: sums of codes that are off by 128 would lose digits
            a = a ^ -2139062144  # 0x80808080
            b = b ^ -2139062144
            high = gl.full(a.shape, 0x64646464, gl.int32, a.type.layout)
            offset = gl.full(a.shape, 0x64806480, gl.int32, a.type.layout)
            x = permute_bytes(a, b, 0x5410)
            y = permute_bytes(a, b, 0x7632)
            result = result + (
                subtract_halves(permute_bytes(x, high, 0x4240), offset),
                subtract_halves(permute_bytes(x, high, 0x4341), offset),
                subtract_halves(permute_bytes(y, high, 0x4240), offset),
                subtract_halves(permute_bytes(y, high, 0x4341), offset),
            )
        elif KIND == "e4m3":
            result = result + from_e4m3(permute_bytes(a, b, 0x5140))
            result = result + from_e4m3(permute_bytes(a, b, 0x7362))
        else:
            result = result + (permute_bytes(a, b, 0x5410), permute_bytes(a, b, 0x7632))
    return result


@gluon.jit
def load_query(
    Q, c, live, KIND: gl.constexpr, WORDS: gl.constexpr, DIM: gl.constexpr,
):  # fmt: skip
    """A row's words in the order of products: for each, the words of its four dims."""
    PIECE: gl.constexpr = min(4, WORDS)
    result = ()
    for p in gl.static_range(WORDS // PIECE):
        first = (4 * p + c) * PIECE  # the lane's first word of this piece of a key
        if KIND == "dense":
            for w in gl.static_range(PIECE // 2):
                result = result + load_piece(Q + (first + 2 * w), live, 2, False)
        else:
            for w in gl.static_range(PIECE):
                result = result + load_piece(Q + 2 * (first + w), live, 2, False)
                if KIND == "int4":
                    high = Q + (DIM // 4 + 2 * (first + w))
                    result = result + load_piece(high, live, 2, False)
    return result


@gluon.jit
def query_operands(words, KIND: gl.constexpr, BF16: gl.constexpr):
    """(registers, factor, sum): a row of queries as float16, times a power of two, `factor`, that
    brings its largest element to 1 or a little above; the sum of those. As it is for dense keys."""
    zero = gl.full(words[0].shape, 0.0, gl.float32, words[0].type.layout)
    if KIND == "dense":
        return words, zero + 1.0, zero
    else:
        largest = zero
        for i in gl.static_range(len(words)):
            low, high = unpack_halves(words[i], BF16)
            largest = gl.maximum(largest, gl.maximum(gl.abs(low), gl.abs(high)))
        largest = quad_max(largest)
        exponent = (largest.to(gl.int32, bitcast=True) >> 23) & 255
        factor = ((254 - gl.minimum(exponent, 253)) << 23).to(gl.float32, bitcast=True)
        total = zero
        result = ()
        for i in gl.static_range(len(words) // 2):
            d0, d1 = unpack_halves(words[2 * i], BF16)
            d2, d3 = unpack_halves(words[2 * i + 1], BF16)
            total += (d0 + d1 + d2 + d3) * factor
            if KIND == "int4" and i % 2 == 1:
                part = factor * 0.0625
            else:
                part = factor
            if KIND == "e4m3":
                result = result + (
                    pack_halves(d0 * part, d1 * part, False),
                    pack_halves(d2 * part, d3 * part, False),
                )
            else:
                result = result + (
                    pack_halves(d0 * part, d2 * part, False),
                    pack_halves(d1 * part, d3 * part, False),
                )
        return result, factor, quad_sum(total)


# --- the kernel ------------------------------------------------------------------------------


@gluon.jit
def over_warps(values, WARPS: gl.constexpr):
    """A tuple's tensors as all warps have them: [WARPS, 32] with the warps in registers."""
    COUNT: gl.constexpr = 4 if len(values) <= 4 else 8
    smem = gl.allocate_shared_memory(
        gl.float32, [COUNT * WARPS, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )  # fmt: skip
    padded = values
    for _ in gl.static_range(COUNT - len(values)):
        padded = padded + (values[0],)
    smem.reshape([COUNT, WARPS, 32]).permute((1, 2, 0)).store(join_all(padded))
    result = ()
    for i in gl.static_range(len(values)):
        result = result + (smem.slice(i * WARPS, WARPS, 0).load(every_layout(WARPS)),)
    return result


@gluon.jit
def join_all(values):
    """[WARPS, 32] each -> [WARPS, 32, how many]."""
    COUNT: gl.constexpr = len(values)
    if COUNT == 2:
        return gl.join(values[0], values[1])
    else:
        even = ()
        odd = ()
        for i in gl.static_range(COUNT // 2):
            even = even + (values[2 * i],)
            odd = odd + (values[2 * i + 1],)
        both = gl.join(join_all(even), join_all(odd))
        return both.reshape([both.shape[0], both.shape[1], COUNT])


@gluon.jit
def for_lanes(x, WARPS: gl.constexpr):
    """[32] -> [1, 32], the same for all warps."""
    L: gl.constexpr = lanes_layout(WARPS)
    return gl.convert_layout(x, gl.SliceLayout(0, L), assert_trivial=True).expand_dims(0)


@gluon.jit
def row_dim(j, n, KIND: gl.constexpr, WORDS: gl.constexpr, DIM: gl.constexpr):
    """The dim of lane n's j-th register, as load_values and value_operands have it."""
    PIECE: gl.constexpr = min(4, WORDS)
    PER_WORD: gl.constexpr = 2 if KIND == "dense" else (8 if KIND == "int4" else 4)
    word = j // PER_WORD
    part = j % PER_WORD
    place = (word // PIECE * 8 + n) * PIECE + word % PIECE  # of the word in its row
    if KIND == "int4":
        return place * 4 + part // 2 + part % 2 * (DIM // 2)
    else:
        return place * PER_WORD + part


@gluon.constexpr_function
def score_place(q, i, HALVES):
    """Where attend_few has the score of query q = 2h + e and key i = 2x + t."""
    return (i // 2 * HALVES + q // 2) * 4 + i % 2 * 2 + q % 2


@gluon.jit
def zeros_of(COUNT: gl.constexpr, WARPS: gl.constexpr):
    """COUNT tuples of four registers."""
    zero = gl.full([WARPS, 32], 0.0, gl.float32, lanes_layout(WARPS))
    return ((zero, zero, zero, zero),) * COUNT


@gluon.jit
def score_step(
    step, queries, sums, limits, first, g, hi, KIND: gl.constexpr, BF16: gl.constexpr,
    ROW_LIMITS: gl.constexpr, HALVES: gl.constexpr, KEYS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Scores of a step, not yet times `factors`; where they are: score_place."""
    k, ks, kz = step
    scores = ()
    for x in gl.static_range(KEYS // 16):
        n = first + 16 * x + 2 * g
        s = zeros_of(HALVES, WARPS)
        near = key_operands(k[2 * x], KIND)
        far = key_operands(k[2 * x + 1], KIND)
        for i in gl.static_range(len(near) // 2):
            a = (near[2 * i], far[2 * i], near[2 * i + 1], far[2 * i + 1])
            added = ()
            for h in gl.static_range(HALVES):
                product = multiply(
                    a, queries[h][2 * i], queries[h][2 * i + 1], s[h], BF16 and KIND == "dense"
                )
                added = added + (product,)
            s = added
        if KIND == "int4":
            zeros = unpack_halves(valid_pair(kz[x], n, hi), BF16)
        if KIND == "int8":
            zeros = (128.0, 128.0)
        if KIND != "dense":
            scales = unpack_halves(valid_pair(ks[x], n, hi), BF16)
        for h in gl.static_range(HALVES):
            for t in gl.static_range(2):
                if not ROW_LIMITS:
                    bias = gl.where(n + t < hi, 0.0, float("-inf"))
                for e in gl.static_range(2):
                    one = s[h][2 * t + e]
                    if KIND == "int4" or KIND == "int8":
                        one -= zeros[t] * sums[2 * h + e]
                    if ROW_LIMITS:
                        if KIND != "dense":
                            one *= scales[t]
                        one = gl.where(n + t < limits[2 * h + e], one, float("-inf"))
                    elif KIND != "dense":
                        one = gl.fma(one, scales[t], bias)
                    else:
                        one += bias
                    scores = scores + (one,)
    return scores


@gluon.jit
def weigh_step(
    scores, vs, factors, m, norm, unit, first, g, hi, KIND: gl.constexpr, BF16: gl.constexpr,
    HALVES: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Weights of a step, that of query q = 2h + e and key i = 2x + t at q * KEYS / 8 + i; what sums
    so far are to be multiplied by; the new largest scores, sums of weights and unit."""
    if KIND != "dense":
        value_scales = ()
        for x in gl.static_range(KEYS // 16):
            n = first + 16 * x + 2 * g
            value_scales = value_scales + unpack_halves(valid_pair(vs[x], n, hi), BF16)
        largest = gl.abs(value_scales[0])
        for i in gl.static_range(1, KEYS // 8):
            largest = gl.maximum(largest, gl.abs(value_scales[i]))
        largest = gl.maximum(unit, keys_max(largest))
        shrink = unit / largest
        inverse = 1.0 / largest
        unit = largest
    new_m = ()
    new_norm = ()
    alphas = ()
    weights = ()
    for q in gl.static_range(2 * HALVES):
        top = scores[score_place(q, 0, HALVES)]
        for i in gl.static_range(1, KEYS // 8):
            top = gl.maximum(top, scores[score_place(q, i, HALVES)])
        top = gl.maximum(m[q], keys_max(top) * factors[q])
        shift = gl.where(top == float("-inf"), 0.0, top)
        alpha = power_of_two(m[q] - shift)
        total = norm[q] * alpha
        for i in gl.static_range(KEYS // 8):
            p = gl.fma(scores[score_place(q, i, HALVES)], factors[q], 0.0 - shift)
            p = power_of_two(p)
            total += p
            if KIND != "dense":
                p = p * (value_scales[i] * inverse)
            weights = weights + (p,)
        if KIND != "dense":
            alpha = alpha * shrink
        new_m = new_m + (top,)
        new_norm = new_norm + (total,)
        alphas = alphas + (alpha,)
    return weights, alphas, new_m, new_norm, unit


@gluon.jit
def add_step(
    step, weights, alphas, acc, zero_acc, first, c, hi, KIND: gl.constexpr, BF16: gl.constexpr,
    HALVES: gl.constexpr, KEYS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """acc, zero_acc: the weighted sums of values, of zero points, with those of a step."""
    v, _, vz = step
    rescaled = ()
    for j in gl.static_range(ROWS):
        for h in gl.static_range(HALVES):
            old = acc[j * HALVES + h]
            rescaled = rescaled + ((
                old[0] * alphas[2 * h], old[1] * alphas[2 * h + 1],
                old[2] * alphas[2 * h], old[3] * alphas[2 * h + 1],
            ),)  # fmt: skip
    acc = rescaled
    if KIND == "int4":
        rescaled = ()
        for h in gl.static_range(HALVES):
            old = zero_acc[h]
            rescaled = rescaled + (
                (old[0] * alphas[2 * h], old[1] * alphas[2 * h + 1], old[2], old[3]),
            )
        zero_acc = rescaled
    for x in gl.static_range(KEYS // 16):
        near = value_operands(v[4 * x], v[4 * x + 2], KIND)
        far = value_operands(v[4 * x + 1], v[4 * x + 3], KIND)
        columns = ()
        for h in gl.static_range(HALVES):
            for t in gl.static_range(2):
                pair = pack_halves(
                    weights[2 * h * (KEYS // 8) + 2 * x + t],
                    weights[(2 * h + 1) * (KEYS // 8) + 2 * x + t],
                    BF16 and KIND == "dense",
                )
                columns = columns + (transpose(pair),)
        added = ()
        for j in gl.static_range(ROWS):
            a = (near[2 * j], near[2 * j + 1], far[2 * j], far[2 * j + 1])
            for h in gl.static_range(HALVES):
                product = multiply(
                    a, columns[2 * h], columns[2 * h + 1], acc[j * HALVES + h],
                    BF16 and KIND == "dense",
                )  # fmt: skip
                added = added + (product,)
        acc = added
        if KIND == "int4":
            n = first + 16 * x + 4 * c
            z0 = valid_pair(vz[2 * x], n, hi)
            z1 = valid_pair(vz[2 * x + 1], n + 2, hi)
            if BF16:
                low, high = unpack_halves(z0, True)
                z0 = pack_halves(low, high, False)
                low, high = unpack_halves(z1, True)
                z1 = pack_halves(low, high, False)
            eight = gl.full(z0.shape, 0x48004800, gl.int32, z0.type.layout)
            z0 = subtract_halves(z0, eight)
            z1 = subtract_halves(z1, eight)
            near = permute_bytes(z0, z1, 0x5410)
            far = permute_bytes(z0, z1, 0x7632)
            nil = gl.full(near.shape, 0, gl.int32, near.type.layout)
            added = ()
            for h in gl.static_range(HALVES):
                product = multiply(
                    (near, nil, far, nil), columns[2 * h], columns[2 * h + 1], zero_acc[h], False
                )
                added = added + (product,)
            zero_acc = added
    return acc, zero_acc


@gluon.jit
def attend_few(
    Q, K, V, OUT, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS, LENGTHS, LSE,
    q_len, k_len, tiles, splits, q_batch, q_token, q_head, k_batch, k_head, v_batch, v_head,
    ks_batch, ks_head, vs_batch, vs_head, o_split, o_batch, o_token, o_head,
    SCALE: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    ROW_LIMITS: gl.constexpr, K_KIND: gl.constexpr, V_KIND: gl.constexpr, BF16: gl.constexpr,
    K_TOKEN: gl.constexpr, V_TOKEN: gl.constexpr, SPLIT: gl.constexpr, HALVES: gl.constexpr,
    KEYS: gl.constexpr, WARPS: gl.constexpr, AHEAD: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """8 * HALVES rows of one key head against a part of its keys; see attend, whose grid this has.

    Everything is read as words of 32 bits. Strides of Q, K and V are in units of 16 bytes, those of
    scales and zeros, whose tokens are contiguous, of 8. ROW_LIMITS: rows see different keys
    (causal). KEYS: of a warp in a step. AHEAD: scores are those of the next step, so that their
    products and the exponentials of this one do not wait for each other.
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
    if K_KIND != "dense":
        K_SCALE = of_head(K_SCALE, batch, head, ks_batch, ks_head, 2)
    if K_KIND == "int4":
        K_ZEROS = of_head(K_ZEROS, batch, head, ks_batch, ks_head, 2)
    if V_KIND != "dense":
        V_SCALE = of_head(V_SCALE, batch, head, vs_batch, vs_head, 2)
    if V_KIND == "int4":
        V_ZEROS = of_head(V_ZEROS, batch, head, vs_batch, vs_head, 2)
    # words of a row: a quarter of a key's, an eighth of a value's
    K_WORDS: gl.constexpr = DIM // 32 if K_KIND == "int4" else (
        DIM // 8 if K_KIND == "dense" else DIM // 16
    )  # fmt: skip
    V_WORDS: gl.constexpr = DIM // 64 if V_KIND == "int4" else (
        DIM // 16 if V_KIND == "dense" else DIM // 32
    )  # fmt: skip

    last = length
    if ROW_LIMITS:
        final = gl.minimum((tile * (8 * HALVES) + 8 * HALVES - 1) // GROUP, q_len - 1)
        last = gl.maximum(length - q_len + 1 + final, 0)
    STRIDE: gl.constexpr = WARPS * KEYS
    per_split = (last + STRIDE * splits - 1) // (STRIDE * splits) * STRIDE
    lo = split * per_split
    hi = gl.minimum(lo + per_split, last)
    first = lo + warp * KEYS
    keys = load_key_step(
        K, K_SCALE, K_ZEROS, first, g, c, hi, K_KIND, K_TOKEN, KEYS, K_WORDS
    )  # fmt: skip
    values = load_value_step(
        V, V_SCALE, V_ZEROS, first, g, c, hi, V_KIND, V_TOKEN, KEYS, V_WORDS
    )  # fmt: skip
    keep_loads_here()

    # what the matrix unit multiplied: subnormals are to be multiplied by 2^24
    UNIT: gl.constexpr = SCALE * (16777216.0 if K_KIND == "int4" or K_KIND == "int8" else 1.0)
    queries = ()  # registers of query columns 8h + g
    factors = ()  # of queries 8h + 2c + e, at 2h + e, as everything below
    sums = ()
    limits = ()
    for h in gl.static_range(HALVES):
        r = tile * (8 * HALVES) + 8 * h + g
        query = r // GROUP
        pointer = Q + batch * (q_batch * 4) + query.to(gl.int64) * (q_token * 4)
        pointer += (head * GROUP + r % GROUP) * (q_head * 4)
        words = load_query(pointer, c, query < q_len, K_KIND, K_WORDS, DIM)
        registers, factor, total = query_operands(words, K_KIND, BF16)
        queries = queries + (registers,)
        for e in gl.static_range(2):
            factors = factors + (UNIT / of_lane(factor, 4 * (2 * c + e)),)
            sums = sums + (of_lane(total, 4 * (2 * c + e)) * (1.0 / 16777216.0),)
            query = (tile * (8 * HALVES) + 8 * h + 2 * c + e) // GROUP
            seen = gl.minimum(length - q_len + 1 + query, hi)
            limits = limits + (gl.where(query < q_len, seen, 0),)

    zero = gl.full([WARPS, 32], 0.0, gl.float32, L)
    ROWS: gl.constexpr = DIM // 16  # products that make up the dims
    acc = zeros_of(ROWS * HALVES, WARPS)
    zero_acc = zeros_of(HALVES, WARPS)
    m = (zero - float("inf"),) * (2 * HALVES)
    norm = (zero,) * (2 * HALVES)
    unit = zero + (TINY if V_KIND != "dense" else 1.0)

    steps = (hi - lo + STRIDE - 1) // STRIDE
    if AHEAD:
        scores = score_step(
            keys, queries, sums, limits, first, g, hi, K_KIND, BF16, ROW_LIMITS, HALVES, KEYS, WARPS
        )  # fmt: skip
        keys = load_key_step(
            K, K_SCALE, K_ZEROS, first + STRIDE, g, c, hi, K_KIND, K_TOKEN, KEYS, K_WORDS
        )  # fmt: skip
    for _ in range(steps):
        if AHEAD:
            next_keys = load_key_step(
                K, K_SCALE, K_ZEROS, first + 2 * STRIDE, g, c, hi, K_KIND, K_TOKEN, KEYS, K_WORDS
            )  # fmt: skip
        else:
            scores = score_step(
                keys, queries, sums, limits, first, g, hi, K_KIND, BF16, ROW_LIMITS, HALVES, KEYS,
                WARPS,
            )  # fmt: skip
            next_keys = load_key_step(
                K, K_SCALE, K_ZEROS, first + STRIDE, g, c, hi, K_KIND, K_TOKEN, KEYS, K_WORDS
            )  # fmt: skip
        next_values = load_value_step(
            V, V_SCALE, V_ZEROS, first + STRIDE, g, c, hi, V_KIND, V_TOKEN, KEYS, V_WORDS
        )  # fmt: skip
        keep_loads_here()
        if AHEAD:
            next_scores = score_step(
                keys, queries, sums, limits, first + STRIDE, g, hi, K_KIND, BF16, ROW_LIMITS,
                HALVES, KEYS, WARPS,
            )  # fmt: skip
        weights, alphas, m, norm, unit = weigh_step(
            scores, values[1], factors, m, norm, unit, first, g, hi, V_KIND, BF16, HALVES, KEYS
        )  # fmt: skip
        acc, zero_acc = add_step(
            values, weights, alphas, acc, zero_acc, first, c, hi, V_KIND, BF16, HALVES, KEYS, ROWS
        )  # fmt: skip
        if AHEAD:
            scores = next_scores
        keys = next_keys
        values = next_values
        first += STRIDE

    # the warps' parts, in units of the largest score and scale of all of them
    shared = over_warps((unit,) + m, WARPS)
    units = gl.max(shared[0], axis=0)
    tops = ()
    weights = ()
    parts_of_totals = ()
    for q in gl.static_range(2 * HALVES):
        top = gl.max(shared[1 + q], axis=0)
        tops = tops + (top,)
        shift = for_lanes(gl.where(top == float("-inf"), 0.0, top), WARPS)
        weight = power_of_two(m[q] - shift)
        parts_of_totals = parts_of_totals + (keys_sum(norm[q]) * weight,)
        weights = weights + (weight * (unit / for_lanes(units, WARPS)),)
    shared = over_warps(parts_of_totals, WARPS)
    totals = ()
    for q in gl.static_range(2 * HALVES):
        totals = totals + (gl.sum(shared[q], axis=0),)
    REGISTERS: gl.constexpr = ROWS * HALVES * 4
    parts = gl.allocate_shared_memory(
        gl.float32, [WARPS, REGISTERS, 32], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    )  # fmt: skip
    scaled = ()
    for j in gl.static_range(ROWS):
        for h in gl.static_range(HALVES):
            for e in gl.static_range(4):
                value = acc[j * HALVES + h][e]
                if V_KIND == "int4":  # the even rows are low nibbles
                    value = value * (1.0 if e < 2 else 0.0625) - zero_acc[h][e % 2]
                scaled = scaled + (value * weights[2 * h + e % 2],)
    parts.permute((0, 2, 1)).store(join_all(scaled))
    SUM: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    RESULT: gl.constexpr = gl.SliceLayout(0, SUM)
    result = gl.sum(parts.load(SUM), axis=0)
    lane = gl.arange(0, 32, gl.SliceLayout(0, RESULT)).expand_dims(0)
    register = gl.arange(0, REGISTERS, gl.SliceLayout(1, RESULT)).expand_dims(1)
    q = register // 4 % HALVES * 2 + register % 2
    total = gl.full([REGISTERS, 32], 0.0, gl.float32, RESULT)
    for i in gl.static_range(2 * HALVES):
        mine = gl.convert_layout(totals[i], gl.SliceLayout(0, RESULT)).expand_dims(0)
        total = gl.where(q == i, mine, total)
    unit = gl.convert_layout(units, gl.SliceLayout(0, RESULT)).expand_dims(0)
    result = result * gl.where(total > 0, unit / total, 0.0)
    row = register // (4 * HALVES) * 2 + register // 2 % 2
    d = row_dim(row, lane // 4, V_KIND, V_WORDS, DIM)
    r = tile * (8 * HALVES) + q // 2 * 8 + lane % 4 * 2 + q % 2
    query = r // GROUP
    pointer = OUT + batch * o_batch + query.to(gl.int64) * o_token
    pointer += (head * GROUP + r % GROUP) * o_head
    if SPLIT:
        pointer += split.to(gl.int64) * o_split
    gl.store(pointer + d, result.to(OUT.dtype.element_ty), mask=query < q_len)
    if SPLIT:
        heads: gl.constexpr = KV_HEADS * GROUP
        lane = gl.arange(0, 32, EVERY)
        for i in gl.static_range(2 * HALVES):
            r = tile * (8 * HALVES) + i // 2 * 8 + lane * 2 + i % 2
            query = r // GROUP
            index = (split * (gl.num_programs(2) // splits) + batch) * q_len + query
            index = index * heads + head * GROUP + r % GROUP
            lse = gl.where(totals[i] > 0, tops[i] + log2(totals[i]), float("-inf"))
            gl.store(LSE + index, lse, mask=(lane < 4) & (query < q_len))
