"""Device code of attention with some dozens of rows over quantised caches: Gluon, Hopper.

Such calls have too much arithmetic for mma.sync and too little for decoding to be free. So a code
is decoded once for all rows of a tile, into the registers from which wgmma takes its row operand:

    scores^T = K Q^T          rows are keys, columns the tile's rows of Q
    sums^T += V^T weights^T   rows are dims, columns the same

Through shared memory, whose bandwidth is what tiles of decoded codes would be short of, go but the
codes, which TMA copies into a ring of steps, Q, and the weights. A block takes a step of keys after
the other; what hides its waits is the other blocks on the multiprocessor, for which registers are
kept few.

The 16 * WARPS keys of a step are the rows of scores^T in their order: with lane = 4 * g + c a
thread of warp w has keys 16w + g and 16w + g + 8, and columns 2c, 2c + 1, 8 further, .... So what
keys have of their own, scales and zero points, is in a thread's own registers. Which dims the
products' k means is free as long as K and Q agree: a lane takes codes as they come (`dim_of`). V's
rows are dims: a thread has two or four successive ones, of keys 2c, 2c + 1, 8 further, ....

Codes of int4 are float16 by their bits, subnormal. Keys' zero points times sums of the rows of Q
are one more step of k; those of values are taken off at once, as sums over many keys would lose
digits to what their codes are off by.

A column's maximum over keys, which are spread over all lanes and warps, would take longer than all
else. So exponentials are relative to one that is raised only where scores exceed it by more than
SLACK, as a power of two: after the first steps that is rare. Weights times scales of values are in
units of about the largest scale, raised alike, else small scales would leave float16's range.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

from __future__ import annotations

from .attention_decode_kernels import TINY, log2, power_of_two
from .device import keep_loads_here, let_next_kernel_start, powers, take
from .versions import (
    fence_async_shared,
    gl,
    gluon,
    mbarrier,
    reinterpret,
    thread_barrier,
    tma_load,
    warpgroup_mma,
    warpgroup_mma_wait,
)

SLACK = gl.constexpr(8.0)  # weights are at most 2^8
SCALE_SLACK = gl.constexpr(16.0)  # and scales of values at most so many units


# --- layouts ---------------------------------------------------------------------------------


@gluon.constexpr_function
def product_layout(COLUMNS, WARPS):
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16]
    )


@gluon.constexpr_function
def key_words_layout(WORDS, WARPS):
    """[16 * WARPS keys, WORDS]: a thread has a quarter of the words of a warp's keys g, g + 8."""
    own = WORDS // 4
    bits = own.bit_length() - 1
    registers = [[0, 1 << i] for i in range(bits)] + [[8, 0]]
    lanes = [[0, own], [0, 2 * own], [1, 0], [2, 0], [4, 0]]
    warps = [[16 * warp, 0] for warp, _ in powers(WARPS, 2, 0)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [16 * WARPS, WORDS])


@gluon.constexpr_function
def value_words_layout(KIND, DIM, WARPS):
    """[16 * WARPS keys, threads that share a word, words]: a word of a thread's keys, whose warp
    and g are what the dims are in the order of. Where threads have two dims two share a word, one
    takes the first bytes and one the last; of int4 two warps, one takes low nibbles, one high ones.
    """
    bits = 3 + WARPS.bit_length() - 1
    others = []  # of g and the warp
    share, word = 1, 1
    for bit in range(bits):
        if bit == 0 and DIM == 16 * WARPS or bit == bits - 1 and KIND == "int4":
            others.append([0, share, 0])
            share *= 2
        else:
            others.append([0, 0, word])
            word *= 2
    registers = [[1, 0, 0], [8, 0, 0]]
    registers = registers + [[16 * step, 0, 0] for step, _, _ in powers(WARPS, 3, 0)]
    lanes = [[2, 0, 0], [4, 0, 0], *others[:3]]
    shape = [16 * WARPS, share, word]
    return gl.DistributedLinearLayout(registers, lanes, others[3:], [], shape)


@gluon.jit
def dim_of(k, KIND: gl.constexpr, DIM: gl.constexpr):
    """The dim that the products' k means, in the order of key_operand's pieces."""
    c = k // 2 % 4
    within = k // 16 % 2 * 4
    if KIND == "int4":
        within += k // 8 % 2 + k % 2 * 2
        return k // 32 % 2 * (DIM // 2) + c * (DIM // 8) + k // 64 * 8 + within
    else:
        return c * (DIM // 4) + k // 32 * 8 + within + k // 8 % 2 * 2 + k % 2


# --- codes to operands -----------------------------------------------------------------------


@gluon.constexpr_function
def bytes_asm(first, x):
    """PTX: the four codes of register x as float16 in operands first and first + 1."""
    return (
        f"xor.b32 u, {x}, 0x80808080; "
        f"prmt.b32 ${first}, u, 0x64646464, 0x4140; prmt.b32 ${first + 1}, u, 0x64646464, 0x4342; "
        f"sub.f16x2 ${first}, ${first}, c; sub.f16x2 ${first + 1}, ${first + 1}, c; "
    )


@gluon.constexpr_function
def e4m3_asm(first, x):
    return (
        f"mov.b32 {{l, h}}, {x}; "
        f"cvt.rn.f16x2.e4m3x2 ${first}, l; cvt.rn.f16x2.e4m3x2 ${first + 1}, h; "
    )


@gluon.constexpr_function
def key_asm(KIND, high):
    """Two words' codes; of int4, low or high nibbles."""
    if KIND == "int8":
        text = "{ .reg .b32 u, c; mov.b32 c, 0x64806480; "
        return text + bytes_asm(0, "$4") + bytes_asm(2, "$5") + "}"
    if KIND == "e4m3":
        return "{ .reg .b16 l, h; " + e4m3_asm(0, "$4") + e4m3_asm(2, "$5") + "}"
    # float16 that are 2^-24 as large as the codes, subnormal; high nibbles 16 times as large
    mask = "0x00F000F0" if high else "0x000F000F"
    text = "{ .reg .b32 u; "
    for word in range(2):
        x, o = f"${4 + word}", 2 * word
        text += f"shr.b32 u, {x}, 8; and.b32 ${o}, {x}, {mask}; and.b32 ${o + 1}, u, {mask}; "
    return text + "}"


@gluon.constexpr_function
def value_asm(KIND, count):
    """Codes of two keys' words, side by side, in as many registers as a thread has dims; where two
    threads share a word, of the bytes that the first of the further operands selects. Then for
    int4, whose nibbles are subnormal at first: their mask, a factor that makes them 2^-9 of the
    code, and the keys' zero points, negative and as small. Sums over many keys need codes that are
    centred."""
    a = count  # the first word
    further = a + 4 if count == 2 else a + 2
    selectors = [f"${a + 2}"] if count == 2 else ["0x5140", "0x7362"]
    if KIND == "int4" and count == 4:
        selectors = ["0x5410", "0x7632"]
    text = {
        "int8": "{ .reg .b32 u, c, x; mov.b32 c, 0x64806480; ",
        "e4m3": "{ .reg .b16 l, h; .reg .b32 x; ",
        "int4": "{ .reg .b32 x, y; ",
    }[KIND]
    for i, selector in enumerate(selectors):
        o = 2 * i
        text += f"prmt.b32 x, ${a}, ${a + 1}, {selector}; "
        if KIND == "int8":
            text += bytes_asm(o, "x")
        elif KIND == "e4m3":
            text += e4m3_asm(o, "x")
        else:
            text += "shr.b32 y, x, 8; "
            for r, half in ((f"${o}", "x"), (f"${o + 1}", "y")):
                text += f"and.b32 {r}, {half}, ${further}; "
                text += f"fma.rn.f16x2 {r}, {r}, ${further + 2}, ${further + 4}; "
    return text + "}"


@gluon.constexpr_function
def constraints(outputs, inputs):
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


@gluon.jit
def join_four(a, b, c, d):
    """The last dimension is the lowest of what they differ in."""
    return gl.join(gl.join(a, b), gl.join(c, d))


@gluon.jit
def key_operand(x, KIND: gl.constexpr, HIGH: gl.constexpr, OPERAND: gl.constexpr):
    """[keys, 4, 2] words of lanes -> [keys, 32]."""
    ASM: gl.constexpr = key_asm(KIND, HIGH)
    o = gl.inline_asm_elementwise(
        ASM, "=&r,=&r,=&r,=&r,r,r", [x], dtype=(gl.float16,) * 4, is_pure=True, pack=2
    )
    # of a word: which register, which half of it; then which word
    y = join_four(o[0], o[1], o[2], o[3]).permute((0, 4, 3, 1, 2))
    return gl.convert_layout(y.reshape([x.shape[0], 32]), OPERAND, assert_trivial=True)


@gluon.jit
def value_operand(x, zeros, KIND: gl.constexpr, DIM: gl.constexpr, OPERAND: gl.constexpr):
    """[16 keys, threads that share a word, words] of lanes -> [DIM, 16]. zeros: of int4, as many
    registers for value_asm."""
    L: gl.constexpr = x.type.layout
    WORDS: gl.constexpr = x.shape[2]
    NIBBLES: gl.constexpr = 2 if KIND == "int4" else 1
    PAIRS: gl.constexpr = x.shape[1] // NIBBLES
    THREADS: gl.constexpr = x.shape[1] * WORDS  # that have different dims
    DIMS: gl.constexpr = DIM // THREADS
    share = gl.arange(0, x.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, L)))
    share = share.expand_dims(0).expand_dims(2)
    operands = [x]
    if PAIRS == 2:
        FIRST: gl.constexpr = 0x5410 if KIND == "int4" else 0x5140
        LAST: gl.constexpr = 0x7632 if KIND == "int4" else 0x7362
        operands = operands + [gl.broadcast(gl.where(share % 2 == 0, FIRST, LAST), x)[0]]
    if KIND == "int4":
        high = share // PAIRS == 1
        operands = operands + [gl.broadcast(gl.where(high, 0x00F000F0, 0x000F000F), x)[0]]
        operands = operands + [gl.broadcast(gl.where(high, 0x68006800, 0x78007800), x)[0]]
        operands = operands + [zeros]
    o = gl.inline_asm_elementwise(
        value_asm(KIND, DIMS), constraints(DIMS, 2 * len(operands)), operands,
        dtype=(gl.float16,) * DIMS, is_pure=True, pack=2,
    )  # fmt: skip
    y = gl.join(o[0], o[1])
    if DIMS == 4:
        y = gl.join(y, gl.join(o[2], o[3]))
    y = y.reshape([16, NIBBLES, PAIRS, WORDS, 2, DIMS // 2]).permute((0, 1, 3, 2, 4, 5))
    y = y.reshape([16, THREADS // 8, 8, 2, DIMS // 2]).permute((4, 1, 3, 2, 0))
    return gl.convert_layout(y.reshape([DIM, 16]), OPERAND, assert_trivial=True)


# --- pieces of a step ------------------------------------------------------------------------


@gluon.jit
def start_copies(K, V, k_ring, v_ring, ready, stage, batch, key, head, needed):
    """Has a step's keys and their values copied into a stage of the ring, if they are needed."""
    barrier = ready.index(stage)
    mbarrier.expect(barrier, K.block_type.nbytes + V.block_type.nbytes, needed)
    tma_load(K, [batch, key, head, 0], barrier, k_ring.index(stage), needed)
    tma_load(V, [batch, key, head, 0], barrier, v_ring.index(stage), needed)


@gluon.jit
def read_values(codes, left, KIND: gl.constexpr, DIM: gl.constexpr, WARPS: gl.constexpr):
    """[keys, threads that share a word, words] of a stage."""
    L: gl.constexpr = value_words_layout(KIND, DIM, WARPS)
    KEYS: gl.constexpr = codes.shape[0]
    words = codes.load(gl.SliceLayout(1, L)).expand_dims(1)
    if KIND == "e4m3":  # what lies behind the end may be no number
        if left < KEYS:
            n = gl.arange(0, KEYS, gl.SliceLayout(1, gl.SliceLayout(2, L)))
            words = gl.where(n.expand_dims(1).expand_dims(2) < left, words, 0)
    all = gl.full([KEYS, 8 * WARPS // words.shape[2], words.shape[2]], 0, gl.int32, L)
    return gl.broadcast(words, all)[0]


@gluon.constexpr_function
def pair_words_layout(PAIRS):
    """[PAIRS]: numbers of pairs of keys, those of a thread's values."""
    registers = [[4 * pair] for (pair,) in powers(PAIRS // 4, 1, 0)]
    warps = [[0]] * (PAIRS.bit_length() - 4)
    return gl.DistributedLinearLayout(registers, [[1], [2], [0], [0], [0]], warps, [], [PAIRS])


@gluon.jit
def read_zeros(pairs, words):
    """The zero points of a step's values as value_asm takes them, beside their words: both of a
    pair of keys for each of the two."""
    L: gl.constexpr = words.type.layout
    x = pairs.load(pair_words_layout(pairs.shape[0]))
    x = gl.join(x, x).reshape([words.shape[0]])
    x = gl.convert_layout(x, gl.SliceLayout(1, gl.SliceLayout(2, L)), assert_trivial=True)
    return gl.broadcast(x.expand_dims(1).expand_dims(2), words)[0]


@gluon.jit
def multiply_keys(words, zeros, q_smem, t_smem, product, KIND: gl.constexpr, DIM: gl.constexpr):
    """Scores of a step before scaling, [keys, rows]. What is decoded next is decoded while the
    products of the piece before are under way. Zero points are one more k, times sums of rows."""
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, product.type.layout, 2)
    PAIRS: gl.constexpr = words.shape[1] // 8
    EACH: gl.constexpr = 2 if KIND == "int4" else 1
    KEYS: gl.constexpr = words.shape[0]
    x = words.reshape([KEYS, 4, PAIRS, 2]).permute((0, 1, 3, 2))
    for i in gl.static_range(DIM // 32):
        a = key_operand(take(x, i // EACH), KIND, i % EACH == 1, OPERAND)
        product = warpgroup_mma(
            a, q_smem.index(i).permute((1, 0)), product, use_acc=i > 0, is_async=True
        )
        if i > 0:
            product = warpgroup_mma_wait(1, deps=(product,))
    if KIND == "int4":
        z = (zeros.to(gl.float32) * (-1.0 / 16384.0)).to(gl.float16)
        z = gl.convert_layout(z, gl.SliceLayout(1, OPERAND), assert_trivial=True).expand_dims(1)
        z = gl.broadcast(z, gl.full([KEYS, 16], 0.0, gl.float16, OPERAND))[0]
        product = warpgroup_mma(z, t_smem.permute((1, 0)), product, is_async=True)
    return warpgroup_mma_wait(0, deps=(product,))


@gluon.jit
def add_values(words, zeros, p_smem, sums, KIND: gl.constexpr, DIM: gl.constexpr):
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, sums.type.layout, 2)
    SHAPE: gl.constexpr = [words.shape[0] // 16, 16, words.shape[1], words.shape[2]]
    x = words.reshape(SHAPE).permute((1, 2, 3, 0))
    z = zeros.reshape(SHAPE).permute((1, 2, 3, 0))
    for i in gl.static_range(words.shape[0] // 16):
        a = value_operand(take(x, i), take(z, i), KIND, DIM, OPERAND)
        sums = warpgroup_mma(a, p_smem.slice(16 * i, 16, 0), sums, is_async=True)
        if i > 0:
            sums = warpgroup_mma_wait(1, deps=(sums,))
    return warpgroup_mma_wait(0, deps=(sums,))


@gluon.jit
def of_thread(x):
    """[keys, columns] -> [warps, 2, 8 g, columns / 8, 4 c, 2]."""
    return x.reshape([x.shape[0] // 16, 2, 8, x.shape[1] // 8, 4, 2])


@gluon.jit
def of_columns(x, like):
    """What columns have one of each, as of_thread's sums over keys have columns."""
    L: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, like.type.layout))
    x = gl.convert_layout(x.reshape([x.shape[0] // 8, 4, 2]), L, assert_trivial=True)
    return x.expand_dims(0).expand_dims(0)


@gluon.jit
def exceeds(arg, scales, unit):
    """[warps, 32]: whether any of its weights or scales is too large."""
    top = gl.max(gl.max(gl.max(of_thread(arg), axis=5), axis=3), axis=1)  # [warps, 8, 4]
    wide = gl.max(gl.abs(scales).reshape([scales.shape[0] // 16, 2, 8]), axis=1)
    wide = gl.convert_layout(wide, gl.SliceLayout(2, top.type.layout), assert_trivial=True)
    found = (top > SLACK) | (wide.expand_dims(2) > SCALE_SLACK * unit)
    found = gl.inline_asm_elementwise(
        "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [found.to(gl.int32)], dtype=gl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip
    return found.reshape([scales.shape[0] // 16, 32])


@gluon.jit
def load_keys_numbers(pointer, left, KEYS: gl.constexpr, L: gl.constexpr):
    """What a step's keys have one of each; zeros behind those that are left."""
    n = gl.arange(0, KEYS, gl.SliceLayout(1, L))
    return gl.load(pointer + n, mask=n < left, other=0)


@gluon.jit
def load_numbers(pointers, first, left, KEYS: gl.constexpr, L: gl.constexpr):
    result = ()
    for i in gl.static_range(len(pointers)):
        result = result + (load_keys_numbers(pointers[i] + first, left, KEYS, L),)
    return result


@gluon.jit
def largest_of(x):
    """The largest finite size in a tile."""
    size = gl.abs(x)
    size = gl.where(size < float("inf"), size, 0.0)
    return gl.max(gl.max(size, axis=1), axis=0)


@gluon.jit
def attend_rows(
    Q, K, V, OUT, K_SCALE, K_ZEROS, V_SCALE, V_ZEROS, LENGTHS, LSE,
    q_len, k_len, tiles, splits, q_batch, q_token, q_head,
    ks_batch, ks_head, vs_batch, vs_head, o_split, o_batch, o_token, o_head,
    SCALE: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr, DIM: gl.constexpr,
    ROW_LIMITS: gl.constexpr, K_KIND: gl.constexpr, V_KIND: gl.constexpr, BF16: gl.constexpr,
    SPLIT: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr, STAGES: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """ROWS rows of one key head against a part of its keys; see attend_few, whose arguments these
    are but for K and V, TMA maps of [1, 16 * WARPS, 1, bytes] tiles of codes."""
    if PDL:
        let_next_kernel_start()
    L: gl.constexpr = product_layout(ROWS, WARPS)
    KEYS: gl.constexpr = 16 * WARPS  # of a step
    COLUMNS: gl.constexpr = gl.SliceLayout(0, L)
    OF_KEYS: gl.constexpr = gl.SliceLayout(1, L)
    K_WORDS: gl.constexpr = DIM // 8 if K_KIND == "int4" else DIM // 4
    V_WORDS: gl.constexpr = DIM // 8 if V_KIND == "int4" else DIM // 4
    PANELS: gl.constexpr = DIM // 32
    tile = tiles - 1 - gl.program_id(0)
    head = gl.program_id(1)
    batch = gl.program_id(2) // splits
    split = gl.program_id(2) % splits
    length = k_len
    if LENGTHS is not None:
        length = gl.minimum(gl.load(LENGTHS + batch).to(gl.int32), k_len)
    wide_batch = batch.to(gl.int64)
    Q += wide_batch * (q_batch * 8)
    k_offset = wide_batch * (ks_batch * 4) + head * (ks_head * 4)
    v_offset = wide_batch * (vs_batch * 4) + head * (vs_head * 4)

    last = length  # one behind the last key that a row of this tile sees
    all_see = length
    if ROW_LIMITS:
        final = gl.minimum((tile * ROWS + ROWS - 1) // GROUP, q_len - 1)
        last = gl.maximum(length - q_len + 1 + final, 0)
        all_see = length - q_len + 1 + tile * ROWS // GROUP
    per_split = (last + KEYS * splits - 1) // (KEYS * splits) * KEYS
    lo = split * per_split
    hi = gl.minimum(lo + per_split, last)
    all_see = gl.minimum(all_see, hi)

    q_smem = gl.allocate_shared_memory(
        gl.float16, [PANELS, ROWS, 32], gl.NVMMASharedLayout(64, 16, 2)
    )
    p_smem = gl.allocate_shared_memory(
        gl.float16, [KEYS, ROWS], gl.NVMMASharedLayout(min(128, 2 * ROWS), 16, 2)
    )
    k_ring = gl.allocate_shared_memory(gl.int8, [STAGES, 1, KEYS, 1, 4 * K_WORDS], K.layout)
    v_ring = gl.allocate_shared_memory(gl.int8, [STAGES, 1, KEYS, 1, 4 * V_WORDS], V.layout)
    k_codes = reinterpret(
        k_ring, gl.int32, [STAGES, KEYS, K_WORDS], gl.NVMMASharedLayout(4 * K_WORDS, 32, 2)
    )
    v_codes = reinterpret(
        v_ring, gl.int32, [STAGES, KEYS, V_WORDS], gl.NVMMASharedLayout(4 * V_WORDS, 32, 2)
    )
    t_smem = q_smem
    if K_KIND == "int4":
        t_smem = gl.allocate_shared_memory(gl.float16, [ROWS, 16], gl.NVMMASharedLayout(32, 16, 2))
    if V_KIND == "int4":
        z_smem = gl.allocate_shared_memory(
            gl.float16, [KEYS], gl.SwizzledSharedLayout(1, 1, 1, [0])
        )
        z_pairs = reinterpret(z_smem, gl.int32, [KEYS // 2], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    flags = gl.allocate_shared_memory(
        gl.int32, [WARPS, 32], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    for i in gl.static_range(STAGES):
        first = lo + i * KEYS
        start_copies(K, V, k_ring, v_ring, ready, i, batch, first, head, first < hi)
    pointers = (K_SCALE + k_offset, V_SCALE + v_offset)
    if K_KIND == "int4":
        pointers = pointers + (K_ZEROS + k_offset,)
    if V_KIND == "int4":
        pointers = pointers + (V_ZEROS + v_offset,)
    numbers = load_numbers(pointers, lo, hi - lo, KEYS, L)

    # the tile's rows as float16, times a power of two that brings the largest element near 2^8
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    r = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LOAD))
    offsets = (r // GROUP).to(gl.int64) * (q_token * 8) + (head * GROUP + r % GROUP) * (q_head * 8)
    live = (r // GROUP < q_len).expand_dims(1)
    largest = gl.to_tensor(0.0)
    for panel in gl.static_range(PANELS):
        k = 32 * panel + gl.arange(0, 32, gl.SliceLayout(0, LOAD))
        where = offsets.expand_dims(1) + dim_of(k, K_KIND, DIM).expand_dims(0)
        largest = gl.maximum(
            largest, largest_of(gl.load(Q + where, mask=live, other=0).to(gl.float32))
        )
    exponent = (largest.to(gl.int32, bitcast=True) >> 23) & 255
    factor = ((262 - gl.minimum(gl.maximum(exponent, 10), 252)) << 23).to(gl.float32, bitcast=True)
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOAD))
    for panel in gl.static_range(PANELS):
        k = 32 * panel + gl.arange(0, 32, gl.SliceLayout(0, LOAD))
        d = dim_of(k, K_KIND, DIM).expand_dims(0)
        q = gl.load(Q + (offsets.expand_dims(1) + d), mask=live, other=0).to(gl.float32) * factor
        total += gl.sum(q, axis=1)
        if K_KIND == "int4":  # for the high nibbles
            q = gl.where(d < DIM // 2, q, q * 0.0625)
        q_smem.index(panel).store(q.to(gl.float16))
    back = SCALE / factor
    if K_KIND == "int4":
        back = back * 16777216.0
        # sums of rows as two float16, with which zero points are multiplied, 2^-14 as large
        total = total * (1.0 / 1024.0)
        large = total.to(gl.float16)
        small = (total - large.to(gl.float32)).to(gl.float16)
        column = gl.arange(0, 16, gl.SliceLayout(0, LOAD)).expand_dims(0)
        none = gl.zeros([ROWS, 16], gl.float16, LOAD)
        large = gl.where(column == 0, large.expand_dims(1), none)
        t_smem.store(gl.where(column == 1, small.expand_dims(1), large))
    ONE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    limits_smem = gl.allocate_shared_memory(gl.int32, [ROWS], ONE)
    # less the maximum that exponentials are relative to, for which there are no registers
    shift_smem = gl.allocate_shared_memory(gl.float32, [ROWS], ONE)
    seen = length - q_len + 1 + r // GROUP if ROW_LIMITS else r * 0 + hi
    limits_smem.store(gl.minimum(seen, hi))

    sums = gl.zeros([DIM, ROWS], gl.float32, L)
    zero = gl.zeros([KEYS, ROWS], gl.float32, L)
    norm = gl.sum(of_thread(zero), axis=1)
    shift_smem.store(gl.zeros([ROWS], gl.float32, COLUMNS))
    unit = gl.to_tensor(TINY)
    inverse = 1.0 / unit
    stage = 0
    phase = 0
    fence_async_shared()
    thread_barrier()  # else the compiler has one in each step
    for first in range(lo, hi, KEYS):
        mbarrier.wait(ready.index(stage), phase)
        words = k_codes.index(stage).load(key_words_layout(K_WORDS, WARPS))
        LAST: gl.constexpr = len(numbers) - 1  # zero points of values, if there are any
        key_zeros = numbers[2 if K_KIND == "int4" else 0]
        scores = multiply_keys(words, key_zeros, q_smem, t_smem, zero, K_KIND, DIM)
        key_scales = (numbers[0].to(gl.float32) * back).expand_dims(1)
        scales = numbers[1].to(gl.float32)
        arg = gl.fma(scores, key_scales, shift_smem.load(COLUMNS).expand_dims(0))
        if first + KEYS > all_see:
            n = first + gl.arange(0, KEYS, OF_KEYS)
            limits = limits_smem.load(COLUMNS)
            arg = gl.where(n.expand_dims(1) < limits.expand_dims(0), arg, float("-inf"))
        flags.store(exceeds(arg, scales, unit))
        fence_async_shared()
        EVERY: gl.constexpr = gl.BlockedLayout([WARPS, 1], [1, 32], [1, WARPS], [1, 0])
        some = gl.max(flags.slice(0, 1, 1).load(EVERY).reshape([WARPS]), axis=0)
        # the stage before this one has been read by all
        before = gl.where(stage == 0, STAGES, stage) - 1
        later = first + (STAGES - 1) * KEYS
        start_copies(
            K, V, k_ring, v_ring, ready, before, batch, later, head, (first > lo) & (later < hi)
        )
        if (some != 0) | (first == lo):
            top = gl.max(arg, axis=0)  # of keys that are seen; none may be
            rise = gl.where(first == lo, top, gl.maximum(top, 0.0))
            rise = gl.where(top == float("-inf"), 0.0, rise)
            shift_smem.store(shift_smem.load(COLUMNS) - rise)
            arg -= rise.expand_dims(0)
            largest = gl.maximum(gl.max(gl.abs(scales), axis=0), unit)
            alpha = power_of_two(0.0 - gl.maximum(rise, 0.0))  # below, the first time: of zeros
            norm = norm * of_columns(alpha, norm)
            alpha = alpha * (unit / largest)
            sums = sums * alpha.expand_dims(0)
            unit = largest
            inverse = 1.0 / unit
        weights = power_of_two(arg)
        norm += gl.sum(of_thread(weights), axis=1)
        weights = weights * (scales * inverse).expand_dims(1)
        if V_KIND == "int4":
            z_smem.store((numbers[LAST].to(gl.float32) * (-1.0 / 512.0)).to(gl.float16))
        p_smem.store(weights.to(gl.float16))
        fence_async_shared()
        left = hi - first - KEYS
        numbers = load_numbers(pointers, first + KEYS, left, KEYS, L)
        keep_loads_here()
        words = read_values(v_codes.index(stage), left + KEYS, V_KIND, DIM, WARPS)
        value_zeros = words
        if V_KIND == "int4":
            value_zeros = read_zeros(z_pairs, words)
        sums = add_values(words, value_zeros, p_smem, sums, V_KIND, DIM)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1

    # columns' sums over lanes and warps
    norm = gl.convert_layout(gl.sum(gl.sum(norm, axis=1), axis=0).reshape([ROWS]), COLUMNS)
    if V_KIND == "int4":
        unit = unit * 512.0
    sums = sums * gl.where(norm > 0, unit / norm, 0.0).expand_dims(0)
    OUT += wide_batch * o_batch
    if SPLIT:
        OUT += split.to(gl.int64) * o_split
    x = sums.reshape([DIM // KEYS, WARPS, 2, 8, ROWS]).permute((4, 1, 3, 0, 2)).reshape([ROWS, DIM])
    X: gl.constexpr = x.type.layout
    r = tile * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, X)).expand_dims(1)
    d = gl.arange(0, DIM, gl.SliceLayout(0, X)).expand_dims(0)
    pointer = OUT + (r // GROUP).to(gl.int64) * o_token + (head * GROUP + r % GROUP) * o_head
    gl.store(pointer + d, x.to(OUT.dtype.element_ty), mask=(r // GROUP < q_len) & (d >= 0))
    if SPLIT:
        LSE += (split * (gl.num_programs(2) // splits) + batch) * q_len * (KV_HEADS * GROUP)
        r = tile * ROWS + gl.arange(0, ROWS, COLUMNS)
        index = r // GROUP * (KV_HEADS * GROUP) + head * GROUP + r % GROUP
        lse = gl.where(norm > 0, log2(norm) - shift_smem.load(COLUMNS), float("-inf"))
        gl.store(LSE + index, lse, mask=r // GROUP < q_len)
