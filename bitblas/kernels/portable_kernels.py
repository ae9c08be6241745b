"""Device code of the portable family: plain Triton, sm_80 and up, also Triton's interpreter.

Names that recur:
    KIND, D0..D3: the decoder. "affine": step, offset, flip; "minifloat": exponent bits, mantissa
        bits, bias, special; "table": the tuple of 16 entries.
    ELEMENT_BITS: 16 or 8, the fragment layout (bitblas.layouts.Fragment). A register of it holds
        PER = 32 / ELEMENT_BITS values of k; `slot` and `h` count as they do there.
    GROUPS: "one" (scales apply to the whole row, in the epilogue), "tile" (a K tile lies in one
        group) or "any" (a K tile may touch several groups).
    SCALE_KIND: "none", "float", "e8m0", "e4m3".  ZEROS_KIND: "none", "original", "rescale",
        "quantized".

Decoded weights are exact in the dtype they are multiplied in, except table entries and fractional
zero points, which are rounded once. Scales multiply float32 (or int32) accumulators, never
weights, so that no scale, however extreme, costs accuracy or overflows float16.
"""

# Triton gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter has neither inline assembly nor bfloat16 arithmetic.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
MAGIC = tl.constexpr(0x4B000000)  # 2^23 as a float32: its low mantissa bits count in ones


# --- numbers ---------------------------------------------------------------------------------


@triton.jit
def minifloat_to_float32(
    code, BITS: tl.constexpr, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr, BIAS: tl.constexpr,
    SPECIAL: tl.constexpr,
):  # fmt: skip
    """Fields moved into a float32 whose exponent is then corrected by one exact multiply.

    Subnormal codes become subnormal float32 values, which the multiply normalises.
    """
    LARGEST: tl.constexpr = (1 << (BITS - 1)) - 1
    magnitude = code & LARGEST
    sign = (code >> (BITS - 1)) << 31
    moved = magnitude << (23 - MANTISSA)
    bits = (moved.to(tl.float32, bitcast=True) * 2.0 ** (127 - BIAS)).to(tl.int32, bitcast=True)
    if SPECIAL == "nan":
        bits = tl.where(magnitude == LARGEST, 0x7FC00000, bits)
    elif SPECIAL == "ieee":
        TOP: tl.constexpr = ((1 << EXPONENT) - 1) << MANTISSA
        bits = tl.where(magnitude >= TOP, moved | 0x7F800000, bits)
    return (bits | sign).to(tl.float32, bitcast=True)


@triton.jit
def look_up(code, VALUES: tl.constexpr):
    """VALUES[code] of 16 entries, by selects: a gather took 1.6 times as long (H200, m = 1)."""
    low = code & 1 != 0
    second = code & 2 != 0
    third = code & 4 != 0
    v0 = tl.where(low, VALUES[1], VALUES[0])
    v1 = tl.where(low, VALUES[3], VALUES[2])
    v2 = tl.where(low, VALUES[5], VALUES[4])
    v3 = tl.where(low, VALUES[7], VALUES[6])
    v4 = tl.where(low, VALUES[9], VALUES[8])
    v5 = tl.where(low, VALUES[11], VALUES[10])
    v6 = tl.where(low, VALUES[13], VALUES[12])
    v7 = tl.where(low, VALUES[15], VALUES[14])
    lower = tl.where(third, tl.where(second, v3, v2), tl.where(second, v1, v0))
    upper = tl.where(third, tl.where(second, v7, v6), tl.where(second, v5, v4))
    return tl.where(code & 8 != 0, upper, lower)


@triton.jit
def decode_float(
    code, BITS: tl.constexpr, KIND: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    D2: tl.constexpr, D3: tl.constexpr,
):  # fmt: skip
    """int32 codes -> exact float32 values."""
    if KIND == "affine":
        value = ((code ^ D2) | MAGIC).to(tl.float32, bitcast=True)
        if D0 == 1:
            return value - (8388608.0 - D1)
        return (value - 8388608.0) * D0 + D1
    elif KIND == "minifloat":
        return minifloat_to_float32(code, BITS, D0, D1, D2, D3)
    else:
        return look_up(code, D0)


@triton.jit
def round_half_even(x):
    """For |x| < 2^23 adding 2^23 leaves no bits below one; larger values are integers already."""
    rounded = (tl.abs(x) + 8388608.0) - 8388608.0
    return tl.where(tl.abs(x) < 8388608.0, tl.where(x < 0, -rounded, rounded), x)


@triton.jit
def group_of(k, GROUP, GROUP_BITS: tl.constexpr):
    """k // GROUP; a shift where GROUP = 2^GROUP_BITS, as division costs some 20 instructions."""
    if GROUP_BITS >= 0:
        return k >> GROUP_BITS
    else:
        return k // GROUP


@triton.jit
def load_raw(pointer, n, group, G, mask):
    """Element [n, group] of an (N, G) array as it is stored."""
    return tl.load(pointer + n.to(tl.int64) * G + group, mask=mask, other=0)


@triton.jit
def decode_scale(raw, SCALE_KIND: tl.constexpr):
    """Scales in any encoding -> float32."""
    if SCALE_KIND == "e8m0":
        byte = raw.to(tl.int32)
        bits = tl.where(byte == 0, 0x00400000, byte << 23)  # 2^-127 is subnormal in float32
        return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    elif SCALE_KIND == "e4m3":
        return minifloat_to_float32(raw.to(tl.int32), 8, 4, 3, 7, "nan")
    else:
        return raw.to(tl.float32)


@triton.jit
def load_quantized_zero(pointer, n, group, N, mask, BITS: tl.constexpr):
    """Zero point of row n in a (G, N*BITS/8) bit-packed array, as int32."""
    row_bytes = (N * BITS + 7) // 8
    bit = n * BITS
    byte = bit // 8
    row = pointer + tl.cast(group, tl.int64) * row_bytes
    value = tl.load(row + byte, mask=mask, other=0).to(tl.int32) & 0xFF
    if 8 % BITS != 0:  # codes may cross into the next byte
        high = tl.load(row + byte + 1, mask=mask & (byte + 1 < row_bytes), other=0)
        value |= (high.to(tl.int32) & 0xFF) << 8
    return (value >> (bit % 8)) & ((1 << BITS) - 1)


@triton.jit
def load_zero(
    pointer, n, group, N, G, mask, BITS: tl.constexpr, ZEROS_KIND: tl.constexpr
):  # fmt: skip
    """Zero points: int32 where they are packed codes, else as they are stored."""
    if ZEROS_KIND == "quantized":
        return load_quantized_zero(pointer, n, group, N, mask, BITS)
    else:
        return load_raw(pointer, n, group, G, mask)


# --- the packed weight -----------------------------------------------------------------------


@triton.jit
def load_words(
    W, n0, k0, N, K, BITS: tl.constexpr, WIDTH: tl.constexpr, FIRST_CHUNK: tl.constexpr,
    TILE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The words of one plane of a [BLOCK_N, BLOCK_K] tile: [KC, NT, band 4, g 8, c 4, NW].

    KC 16-byte chunks along K (one, of which NW < 4 words are read, where BLOCK_K is narrower than
    a chunk), NT layout tiles along N. The flat load below gives each lane whole chunks.
    """
    CHUNK_K: tl.constexpr = 256 // WIDTH
    CHUNKS: tl.constexpr = TILE_K * BITS // 256
    PER_TILE: tl.constexpr = TILE_K // CHUNK_K
    KC: tl.constexpr = BLOCK_K // CHUNK_K if BLOCK_K >= CHUNK_K else 1
    NW: tl.constexpr = 4 if BLOCK_K >= CHUNK_K else 4 * BLOCK_K // CHUNK_K
    NT: tl.constexpr = BLOCK_N // 64
    part = tl.arange(0, KC * NT)[:, None]
    chunk = k0 // CHUNK_K + part // NT
    tile_n = n0 // 64 + part % NT
    tile_k = chunk // PER_TILE
    tiles_k = tl.cdiv(K, TILE_K)
    inside = (tile_n < tl.cdiv(N, 64)) & (tile_k < tiles_k)
    tile = tile_n.to(tl.int64) * tiles_k + tile_k
    base = (tile * CHUNKS + FIRST_CHUNK + chunk % PER_TILE) * 512
    lane_word = tl.arange(0, 128 * NW)[None, :]
    if NW < 4:
        lane_word = lane_word // NW * 4 + k0 % CHUNK_K // (CHUNK_K // 4) + lane_word % NW
    words = tl.load(W + base + lane_word, mask=inside, other=0)
    return words.reshape([KC, NT, 4, 8, 4, NW])


@triton.jit
def to_rows(
    x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, PER: tl.constexpr
):  # fmt: skip
    """Elements in word order (word and slot count step, x, r3) -> [BLOCK_N, BLOCK_K]."""
    KC: tl.constexpr = BLOCK_K // (STEPS * PER * 8)
    x = x.reshape([KC, BLOCK_N // 64, 4, 8, 4, STEPS, 2, 2, PER])
    x = x.permute((1, 2, 7, 3, 0, 5, 6, 4, 8))
    return x.reshape([BLOCK_N, BLOCK_K])


@triton.jit
def plane_codes(
    W, n0, k0, N, K, BITS: tl.constexpr, WIDTH: tl.constexpr, FIRST_CHUNK: tl.constexpr,
    ELEMENT_BITS: tl.constexpr, TILE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One plane of the codes, int32 [BLOCK_N, BLOCK_K]."""
    SLOTS: tl.constexpr = ELEMENT_BITS // WIDTH
    PER: tl.constexpr = 32 // ELEMENT_BITS
    words = load_words(W, n0, k0, N, K, BITS, WIDTH, FIRST_CHUNK, TILE_K, BLOCK_N, BLOCK_K)
    NW: tl.constexpr = words.shape[5]
    slot_h = tl.arange(0, SLOTS * PER)
    shift = slot_h // PER * WIDTH + slot_h % PER * ELEMENT_BITS
    codes = (words.reshape([words.numel, 1]) >> shift[None, :]) & ((1 << WIDTH) - 1)
    return to_rows(codes, BLOCK_N, BLOCK_K, NW * SLOTS // 4, PER)


@triton.jit
def add_plane(
    codes, W, n0, k0, N, K, BITS: tl.constexpr, WIDTH: tl.constexpr, FIRST_BIT: tl.constexpr,
    ELEMENT_BITS: tl.constexpr, TILE_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes with the plane of that width added, if the format has one."""
    if BITS & WIDTH:
        plane = plane_codes(
            W, n0, k0, N, K, BITS, WIDTH, TILE_K * FIRST_BIT // 256, ELEMENT_BITS, TILE_K, BLOCK_N,
            BLOCK_K,
        )  # fmt: skip
        codes |= plane << FIRST_BIT
    return codes


@triton.jit
def load_codes(
    W, n0, k0, N, K, BITS: tl.constexpr, ELEMENT_BITS: tl.constexpr, TILE_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Codes of a tile as int32 [BLOCK_N, BLOCK_K], 0 beyond the packed weight."""
    if BITS & (BITS - 1) == 0:
        return plane_codes(
            W, n0, k0, N, K, BITS, BITS, 0, ELEMENT_BITS, TILE_K, BLOCK_N, BLOCK_K
        )  # fmt: skip
    else:
        codes = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
        codes = add_plane(
            codes, W, n0, k0, N, K, BITS, 4, 0, ELEMENT_BITS, TILE_K, BLOCK_N, BLOCK_K
        )  # fmt: skip
        codes = add_plane(
            codes, W, n0, k0, N, K, BITS, 2, BITS & 4, ELEMENT_BITS, TILE_K, BLOCK_N, BLOCK_K
        )  # fmt: skip
        return add_plane(
            codes, W, n0, k0, N, K, BITS, 1, BITS & 6, ELEMENT_BITS, TILE_K, BLOCK_N, BLOCK_K
        )  # fmt: skip


@triton.jit
def pair_halves(operands, ASM: tl.constexpr, CONSTRAINTS: tl.constexpr, DTYPE: tl.constexpr):
    """The two 16-bit results of ASM, which dtypes in a tuple can name by literals only."""
    if DTYPE == tl.float16:
        return tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, operands, dtype=(tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            ASM, CONSTRAINTS, operands, dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=1
        )


@triton.jit
def interleave_halves(low, high):
    """tl.join without its name: Triton takes a join before a dot for 4-bit unpacking and then wants
    four consecutive k in a lane, which costs a shuffle per register. The select folds away.
    """
    h = tl.arange(0, 2).reshape([1, 2])
    both = tl.where(h == 0, low.reshape([low.numel, 1]), high.reshape([high.numel, 1]))
    return both


@triton.jit
def load_pairs(
    W, zero, n0, k0, N, K, BITS: tl.constexpr, TILE_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, DTYPE: tl.constexpr, PAIR_ASM: tl.constexpr, WITH_ZERO: tl.constexpr,
):  # fmt: skip
    """Affine weights of at most 8 bits straight to packed 16-bit pairs: [BLOCK_N, BLOCK_K] DTYPE.

    One logic instruction puts the two codes of a register into the mantissas of 1024 (float16) or
    128 (bfloat16), one packed subtraction removes it: 1.5 instructions per weight against 3.5
    through float32. PAIR_ASM comes from bitblas.kernels.portable.pair_assembly.
    """
    SLOTS: tl.constexpr = 16 // BITS
    words = load_words(W, n0, k0, N, K, BITS, BITS, 0, TILE_K, BLOCK_N, BLOCK_K)
    NW: tl.constexpr = words.shape[5]
    KC: tl.constexpr = words.shape[0]
    NT: tl.constexpr = BLOCK_N // 64
    shift = tl.arange(0, SLOTS) * BITS
    shifted = words.reshape([words.numel, 1]) >> shift[None, :]
    shifted = shifted.reshape([KC, NT, 4, 8, 4, NW * SLOTS // 2, 2])
    if WITH_ZERO:
        half = zero.to(DTYPE).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        both = (half | (half << 16)).reshape([1, NT, 4, 2, 8, 1, 1]).permute((0, 1, 2, 4, 5, 6, 3))
        operands = (shifted, tl.broadcast_to(both, shifted.shape))
        low, high = pair_halves(operands, PAIR_ASM, "=h,=h,r,r", DTYPE)
    else:
        low, high = pair_halves((shifted,), PAIR_ASM, "=h,=h,r", DTYPE)
    return to_rows(interleave_halves(low, high), BLOCK_N, BLOCK_K, NW * SLOTS // 4, 2)


# --- activations and results -----------------------------------------------------------------


@triton.jit
def load_activation(pointer, k, mask, A_KIND: tl.constexpr):
    """A at row pointers `pointer` and columns k, in the dtype it is multiplied in; 0 where masked.

    fp8 becomes float16, exactly, so that GPUs without fp8 instructions serve too.
    """
    if A_KIND == "int4":
        byte = tl.load(pointer + k // 2, mask=mask, other=0).to(tl.int32)
        nibble = (byte >> (k % 2 * 4)) & 15
        return ((nibble ^ 8) - 8).to(tl.int8)
    elif A_KIND == "e4m3_float8":
        byte = tl.load(pointer + k, mask=mask, other=0).to(tl.int32)
        return minifloat_to_float32(byte, 8, 4, 3, 7, "nan").to(tl.float16)
    elif A_KIND == "e5m2_float8":
        byte = tl.load(pointer + k, mask=mask, other=0).to(tl.int32)
        return minifloat_to_float32(byte, 8, 5, 2, 15, "ieee").to(tl.float16)
    else:
        return tl.load(pointer + k, mask=mask, other=0)


@triton.jit
def store_result(
    OUT, BIAS, INPUT_SCALE, GLOBAL_SCALE, result, m, n, N, m_inside, inside
):  # fmt: skip
    """Epilogue: global scale, row scale, bias, conversion with saturation, store."""
    if GLOBAL_SCALE is not None:
        result = result.to(tl.float32) * tl.load(GLOBAL_SCALE)
    if INPUT_SCALE is not None:
        result = result.to(tl.float32) * tl.load(INPUT_SCALE + m, mask=m_inside, other=0)
    if BIAS is not None:
        bias = tl.load(BIAS + n, mask=inside, other=0)
        if bias.dtype.is_int() and result.dtype.is_int():
            result += bias.to(tl.int32)
        else:
            result = result.to(tl.float32) + bias.to(tl.float32)
    OUT_DTYPE: tl.constexpr = OUT.dtype.element_ty
    if OUT_DTYPE.is_int():
        if result.dtype.is_floating():
            rounded = round_half_even(result)
            clamped = tl.minimum(tl.maximum(rounded, -2147483648.0), 2147483520.0)
            whole = clamped.to(tl.int32)
            result = tl.where(rounded >= 2147483648.0, 2147483647, whole)
        if OUT_DTYPE == tl.int8:
            result = tl.minimum(tl.maximum(result, -128), 127)
    tl.store(OUT + m.to(tl.int64) * N + n, result.to(OUT_DTYPE), mask=inside)


# --- matrix product --------------------------------------------------------------------------


@triton.jit
def accumulate(
    acc, product, sums, scale, zero, SHIFT: tl.constexpr, ZEROS: tl.constexpr,
    WITH_SCALE: tl.constexpr,
):  # fmt: skip
    """acc + the product of one group with its scale and zero applied.

    product: sum of v*a; sums: sum of a over the same k (used where ZEROS or SHIFT ask for it);
    scale, zero, sums broadcast against product. SHIFT: what was subtracted from the values so
    that they fit int8.
    """
    if SHIFT != 0:
        product += SHIFT * sums
    if ZEROS == "quantized":
        product -= zero.to(product.dtype) * sums
    elif ZEROS == "original":
        product = product.to(tl.float32) - zero.to(tl.float32) * sums.to(tl.float32)
    if WITH_SCALE:
        product = product.to(tl.float32) * scale
    if ZEROS == "rescale":
        product = product.to(tl.float32) - zero.to(tl.float32) * sums.to(tl.float32)
    return acc + product.to(acc.dtype)


@triton.jit(do_not_specialize=["M", "N", "K", "GROUP"])
def gemm_kernel(
    A, W, OUT, SCALE, ZEROS, BIAS, INPUT_SCALE, GLOBAL_SCALE,
    M, N, K, GROUP,
    BITS: tl.constexpr, ELEMENT_BITS: tl.constexpr, TILE_K: tl.constexpr,
    KIND: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    A_KIND: tl.constexpr, K_ALIGNED: tl.constexpr, GROUPS: tl.constexpr, GROUP_BITS: tl.constexpr,
    SCALE_KIND: tl.constexpr, ZEROS_KIND: tl.constexpr, ZERO_IN_WEIGHT: tl.constexpr,
    PAIR_ASM: tl.constexpr, TWO_TERMS: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """OUT[M, N] on the matrix units; weights are the row operand, as the layout was made for.

    SPLIT_K: with more than 1, part p of the tiles along K goes to OUT[p, M, N], a float32 or int32
    workspace that sum_parts_kernel adds up in order.

    ZERO_IN_WEIGHT: zero points are subtracted from the decoded weight (exact for packed ones,
    rounded once otherwise) instead of through the sums of A. TWO_TERMS: weights that the operand
    dtype cannot hold are split into a rounded value and the rest. PAIR_ASM: None or the packed
    decoder of load_pairs.
    """
    if K_ALIGNED:  # lets the compiler see that rows of A start on 16 elements
        K = K // 16 * 16
    INTEGER: tl.constexpr = A_KIND == "int8" or A_KIND == "int4"
    FLOAT_ZEROS: tl.constexpr = ZEROS_KIND == "original" or ZEROS_KIND == "rescale"
    WITH_SCALE: tl.constexpr = SCALE_KIND != "none"
    ACC_DTYPE: tl.constexpr = (
        tl.int32 if INTEGER and not WITH_SCALE and not FLOAT_ZEROS else tl.float32
    )
    DOT_DTYPE: tl.constexpr = tl.int32 if INTEGER else tl.float32
    LATE_ZEROS: tl.constexpr = "none" if ZERO_IN_WEIGHT else ZEROS_KIND
    NEED_SUMS: tl.constexpr = LATE_ZEROS != "none" or SHIFT != 0

    # Blocks in bands of 8 along M: neighbours share weights and activations in L2.
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    band_first = pid // (8 * blocks_n) * 8
    band_rows = tl.minimum(blocks_m - band_first, 8)
    m0 = (band_first + pid % (8 * blocks_n) % band_rows) * BLOCK_M
    n0 = pid % (8 * blocks_n) // band_rows * BLOCK_N

    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    m_inside, n_inside = m < M, n < N
    G = K // GROUP
    row_length = K // 2 if A_KIND == "int4" else K
    rows = A + m.to(tl.int64)[None, :] * row_length

    tiles = tl.cdiv(K, BLOCK_K)
    first_tile, last_tile = 0, tiles
    first_group = 0
    if SPLIT_K > 1:
        first_tile = tiles * tl.program_id(1) // SPLIT_K
        last_tile = tiles * (tl.program_id(1) + 1) // SPLIT_K
        if GROUPS == "tile":
            first_group = group_of(first_tile * BLOCK_K, GROUP, GROUP_BITS)

    # Scales of a tile are loaded one tile ahead, since nothing else hides their latency.
    scale = tl.zeros([BLOCK_N], tl.int32)
    zero = tl.zeros([BLOCK_N], tl.int32)
    if WITH_SCALE:
        scale = load_raw(SCALE, n, first_group, G, n_inside)
    if ZEROS_KIND != "none":
        zero = load_zero(ZEROS, n, first_group, N, G, n_inside, BITS, ZEROS_KIND)

    acc = tl.zeros([BLOCK_N, BLOCK_M], DOT_DTYPE if GROUPS == "one" else ACC_DTYPE)
    sums = tl.zeros([BLOCK_M], DOT_DTYPE)
    for tile in tl.range(first_tile, last_tile, num_stages=STAGES):
        k0 = tile * BLOCK_K
        k = k0 + tl.arange(0, BLOCK_K)
        a = load_activation(
            rows, k[:, None], (k < K)[:, None] & m_inside[None, :], A_KIND
        )  # fmt: skip

        tile_scale = scale
        tile_zero = zero
        if GROUPS == "tile":
            group = group_of(k0 + BLOCK_K, GROUP, GROUP_BITS)
            inside = n_inside & (group < G)
            if WITH_SCALE:
                scale = load_raw(SCALE, n, group, G, inside)
            if ZEROS_KIND != "none":
                zero = load_zero(ZEROS, n, group, N, G, inside, BITS, ZEROS_KIND)

        if PAIR_ASM is not None:
            w = load_pairs(
                W, tile_zero.to(tl.float32), n0, k0, N, K, BITS, TILE_K, BLOCK_N, BLOCK_K, a.dtype,
                PAIR_ASM, ZERO_IN_WEIGHT,
            )  # fmt: skip
        else:
            codes = load_codes(W, n0, k0, N, K, BITS, ELEMENT_BITS, TILE_K, BLOCK_N, BLOCK_K)
            if INTEGER:
                value = (codes ^ D2) * D0 + (D1 - SHIFT)
                if ZERO_IN_WEIGHT:
                    value -= tile_zero[:, None]
                w = value.to(tl.int8)
            else:
                exact = decode_float(codes, BITS, KIND, D0, D1, D2, D3)
                if ZERO_IN_WEIGHT:
                    exact -= tile_zero.to(tl.float32)[:, None]
                w = exact.to(a.dtype)
                if TWO_TERMS:
                    rest = (exact - w.to(tl.float32)).to(a.dtype)

        if INTERPRETED and a.dtype == tl.bfloat16:
            a, w = a.to(tl.float32), w.to(tl.float32)
            if TWO_TERMS:
                rest = rest.to(tl.float32)

        if GROUPS == "any":
            last = (tl.minimum(k0 + BLOCK_K, K) - 1) // GROUP
            for group in range(k0 // GROUP, last + 1):
                member = (k // GROUP == group)[:, None]
                part = tl.where(member, a, tl.zeros_like(a))
                product = tl.dot(w, part, out_dtype=DOT_DTYPE, input_precision=PRECISION)
                if not INTEGER and TWO_TERMS:
                    product = tl.dot(rest, part, product, input_precision=PRECISION)
                if NEED_SUMS:
                    sums = tl.sum(part.to(DOT_DTYPE), axis=0)
                if WITH_SCALE:
                    scale = load_raw(SCALE, n, group, G, n_inside)
                if ZEROS_KIND != "none":
                    zero = load_zero(ZEROS, n, group, N, G, n_inside, BITS, ZEROS_KIND)
                acc = accumulate(
                    acc, product, sums[None, :], decode_scale(scale, SCALE_KIND)[:, None],
                    zero[:, None], SHIFT, LATE_ZEROS, WITH_SCALE,
                )  # fmt: skip
        elif GROUPS == "tile":
            product = tl.dot(w, a, out_dtype=DOT_DTYPE, input_precision=PRECISION)
            if not INTEGER and TWO_TERMS:
                product = tl.dot(rest, a, product, input_precision=PRECISION)
            if NEED_SUMS:
                sums = tl.sum(a.to(DOT_DTYPE), axis=0)
            acc = accumulate(
                acc, product, sums[None, :], decode_scale(tile_scale, SCALE_KIND)[:, None],
                tile_zero[:, None], SHIFT, LATE_ZEROS, WITH_SCALE,
            )  # fmt: skip
        else:
            acc = tl.dot(w, a, acc, out_dtype=DOT_DTYPE, input_precision=PRECISION)
            if not INTEGER and TWO_TERMS:
                acc = tl.dot(rest, a, acc, input_precision=PRECISION)
            if NEED_SUMS:
                sums += tl.sum(a.to(DOT_DTYPE), axis=0)

    if GROUPS == "one":
        acc = accumulate(
            tl.zeros([BLOCK_N, BLOCK_M], ACC_DTYPE), acc, sums[None, :],
            decode_scale(scale, SCALE_KIND)[:, None], zero[:, None], SHIFT, LATE_ZEROS, WITH_SCALE,
        )  # fmt: skip
    inside = m_inside[:, None] & n_inside[None, :]
    if SPLIT_K > 1:
        part = tl.program_id(1).to(tl.int64) * M * N + m.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(OUT + part, tl.trans(acc), mask=inside)
    else:
        store_result(
            OUT, BIAS, INPUT_SCALE, GLOBAL_SCALE, tl.trans(acc), m[:, None], n[None, :], N,
            m_inside[:, None], inside,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "N"])
def sum_parts_kernel(
    PARTS, OUT, BIAS, INPUT_SCALE, GLOBAL_SCALE, M, N, SPLIT_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """OUT[M, N] from PARTS[SPLIT_K, M, N], always added in the same order."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    offset = m.to(tl.int64) * N + n
    total = tl.load(PARTS + offset, mask=inside, other=0)
    for _ in tl.static_range(1, SPLIT_K):
        offset += tl.cast(M, tl.int64) * N
        total += tl.load(PARTS + offset, mask=inside, other=0)
    store_result(OUT, BIAS, INPUT_SCALE, GLOBAL_SCALE, total, m, n, N, True, inside)


# --- few rows: K split over the warps of a block ------------------------------------------------


@triton.jit
def unit_rows(
    x, KC: tl.constexpr, BANDS: tl.constexpr, DEEP: tl.constexpr, PAIRS: tl.constexpr,
    PER: tl.constexpr,
):  # fmt: skip
    """Elements in word order, [BANDS, DEEP, KC, lane, ...] -> [KC, rows, values of k in a unit]."""
    x = x.reshape([BANDS, DEEP, KC, 8, 4, PAIRS, 2, PER]).permute((2, 0, 6, 3, 1, 5, 4, 7))
    return x.reshape([KC, BANDS * 16, DEEP * PAIRS * 4 * PER])


@triton.jit(do_not_specialize=["M", "N", "K", "GROUP"])
def gemv_kernel(
    A, W, OUT, SCALE, ZEROS, BIAS, INPUT_SCALE, GLOBAL_SCALE,
    M, N, K, GROUP,
    BITS: tl.constexpr, ELEMENT_BITS: tl.constexpr, TILE_K: tl.constexpr,
    KIND: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    A_KIND: tl.constexpr, K_ALIGNED: tl.constexpr, GROUPS: tl.constexpr, GROUP_BITS: tl.constexpr,
    SCALE_KIND: tl.constexpr, ZEROS_KIND: tl.constexpr, ZERO_IN_WEIGHT: tl.constexpr,
    PAIR_ASM: tl.constexpr, TWO_TERMS: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NW: tl.constexpr,
    DEEP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of A (program axis 1) against BLOCK_N rows of W; `gemm_kernel` says the rest.

    A batched product whose batch is K: each warp owns one unit of k at a time and an accumulator
    of its own; a lane loads DEEP times NW words (16 bytes for NW = 4) of a 16-row band for it. The
    warps are added once, at the end, in a fixed order. So a block that is only 16 rows high keeps
    several warps reading, which N = 8192 needs to fill a large GPU.
    """
    CHUNKS: tl.constexpr = TILE_K * BITS // 256
    PER: tl.constexpr = 32 // ELEMENT_BITS
    SLOTS: tl.constexpr = ELEMENT_BITS // BITS
    UNIT_K: tl.constexpr = DEEP * NW * 64 // BITS
    KC: tl.constexpr = BLOCK_K // UNIT_K
    FLAT: tl.constexpr = DEEP * KC * 32 * NW
    BANDS: tl.constexpr = BLOCK_N // 16
    PAIRS: tl.constexpr = NW * SLOTS // 2
    INTEGER: tl.constexpr = A_KIND == "int8" or A_KIND == "int4"
    FLOAT_ZEROS: tl.constexpr = ZEROS_KIND == "original" or ZEROS_KIND == "rescale"
    WITH_SCALE: tl.constexpr = SCALE_KIND != "none"
    DOT_DTYPE: tl.constexpr = tl.int32 if INTEGER else tl.float32
    ACC_DTYPE: tl.constexpr = (
        tl.int32 if INTEGER and not WITH_SCALE and not FLOAT_ZEROS else tl.float32
    )
    LATE_ZEROS: tl.constexpr = "none" if ZERO_IN_WEIGHT else ZEROS_KIND
    NEED_SUMS: tl.constexpr = LATE_ZEROS != "none" or SHIFT != 0
    if K_ALIGNED:
        K = K // 16 * 16

    n0 = tl.program_id(0) * BLOCK_N
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_inside = m < M
    n = n0 + tl.arange(0, BLOCK_N)
    n_inside = n < N
    G = K // GROUP
    tiles_k = tl.cdiv(K, TILE_K)
    row_length = K // 2 if A_KIND == "int4" else K
    rows = A + (m.to(tl.int64) * row_length)[None, None, :]

    band = n0 // 16 + tl.arange(0, BANDS)[:, None]
    band = tl.minimum(band, tl.cdiv(N, 64) * 4 - 1)  # reads stay inside; such rows are not stored
    band_base = (band // 4).to(tl.int64) * tiles_k * (CHUNKS * 512) + band % 4 * 128
    flat = tl.arange(0, FLAT)[None, :]  # (DEEP, KC, lane, word): the warps of a load spread over KC
    flat_unit = flat // (32 * NW) % KC
    flat_deep = flat // (32 * NW * KC)
    lane_word = flat % 128 if NW == 4 else flat // NW % 32 * 4 + flat % NW
    units = tl.arange(0, KC)

    # Scales of a tile are loaded one tile ahead, since nothing else hides their latency.
    first = units * UNIT_K if GROUPS == "tile" else tl.zeros([1], tl.int32)
    group = group_of(first, GROUP, GROUP_BITS)[:, None]
    inside = n_inside[None, :] & (group < G)
    scale = tl.zeros_like(group + n[None, :])
    zero = tl.zeros_like(group + n[None, :])
    if WITH_SCALE:
        scale = load_raw(SCALE, n[None, :], group, G, inside)
    if ZEROS_KIND != "none":
        zero = load_zero(ZEROS, n[None, :], group, N, G, inside, BITS, ZEROS_KIND)

    acc = tl.zeros([KC, BLOCK_N, BLOCK_M], DOT_DTYPE if GROUPS == "one" else ACC_DTYPE)
    sums = tl.zeros([KC, BLOCK_M], DOT_DTYPE)
    for tile in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        unit = tile * KC + flat_unit
        chunk = unit // (4 // NW) * DEEP + flat_deep
        offset = band_base + chunk * 512 + lane_word
        if NW < 4:
            offset += unit % (4 // NW) * NW
        words = tl.load(W + offset, mask=chunk < tiles_k * CHUNKS, other=0)

        k = tile * BLOCK_K + units[:, None] * UNIT_K + tl.arange(0, UNIT_K)[None, :]
        k_inside = (k < K)[:, :, None]
        a = load_activation(rows, k[:, :, None], k_inside & m_inside[None, None, :], A_KIND)

        tile_scale = scale
        tile_zero = zero
        if GROUPS == "tile":
            group = group_of((tile * KC + KC + units) * UNIT_K, GROUP, GROUP_BITS)[:, None]
            inside = n_inside[None, :] & (group < G)
            if WITH_SCALE:
                scale = load_raw(SCALE, n[None, :], group, G, inside)
            if ZEROS_KIND != "none":
                zero = load_zero(ZEROS, n[None, :], group, N, G, inside, BITS, ZEROS_KIND)

        if PAIR_ASM is not None:
            shift = tl.arange(0, SLOTS) * BITS
            shifted = words.reshape([BANDS * FLAT, 1]) >> shift[None, :]
            shifted = shifted.reshape([BANDS, DEEP, KC, 8, 4, PAIRS, 2])
            if ZERO_IN_WEIGHT:
                half = tile_zero.to(tl.float32).to(a.dtype).to(tl.int16, bitcast=True)
                half = half.to(tl.int32) & 0xFFFF
                both = (half | (half << 16)).reshape([half.shape[0], BANDS, 2, 8, 1, 1, 1])
                both = tl.broadcast_to(both.permute((1, 4, 0, 3, 5, 6, 2)), shifted.shape)
                low, high = pair_halves((shifted, both), PAIR_ASM, "=h,=h,r,r", a.dtype)
            else:
                low, high = pair_halves((shifted,), PAIR_ASM, "=h,=h,r", a.dtype)
            w = unit_rows(interleave_halves(low, high), KC, BANDS, DEEP, PAIRS, PER)
        else:
            slot_h = tl.arange(0, SLOTS * PER)
            shift = slot_h // PER * BITS + slot_h % PER * ELEMENT_BITS
            codes = words.reshape([BANDS * FLAT, 1]) >> shift[None, :]
            codes = unit_rows(codes & ((1 << BITS) - 1), KC, BANDS, DEEP, PAIRS, PER)
            if INTEGER:
                value = (codes ^ D2) * D0 + (D1 - SHIFT)
                if ZERO_IN_WEIGHT:
                    value -= tile_zero[:, :, None]
                w = value.to(tl.int8)
            else:
                exact = decode_float(codes, BITS, KIND, D0, D1, D2, D3)
                if ZERO_IN_WEIGHT:
                    exact -= tile_zero.to(tl.float32)[:, :, None]
                w = exact.to(a.dtype)
                if TWO_TERMS:
                    rest = (exact - w.to(tl.float32)).to(a.dtype)

        if INTERPRETED and a.dtype == tl.bfloat16:
            a, w = a.to(tl.float32), w.to(tl.float32)
            if TWO_TERMS:
                rest = rest.to(tl.float32)

        if GROUPS == "tile":
            product = tl.dot(w, a, out_dtype=DOT_DTYPE, input_precision=PRECISION)
            if not INTEGER and TWO_TERMS:
                product = tl.dot(rest, a, product, input_precision=PRECISION)
            if NEED_SUMS:
                sums = tl.sum(a.to(DOT_DTYPE), axis=1)
            acc = accumulate(
                acc, product, sums[:, None, :],
                decode_scale(tile_scale, SCALE_KIND)[:, :, None], tile_zero[:, :, None],
                SHIFT, LATE_ZEROS, WITH_SCALE,
            )  # fmt: skip
        else:
            acc = tl.dot(w, a, acc, out_dtype=DOT_DTYPE, input_precision=PRECISION)
            if not INTEGER and TWO_TERMS:
                acc = tl.dot(rest, a, acc, input_precision=PRECISION)
            if NEED_SUMS:
                sums += tl.sum(a.to(DOT_DTYPE), axis=1)

    result = tl.sum(acc, axis=0)
    if GROUPS == "one":
        total = tl.sum(sums, axis=0)[None, :]
        result = accumulate(
            tl.zeros([BLOCK_N, BLOCK_M], ACC_DTYPE), result, total,
            tl.trans(decode_scale(scale, SCALE_KIND)), tl.trans(zero), SHIFT, LATE_ZEROS,
            WITH_SCALE,
        )  # fmt: skip
    store_result(
        OUT, BIAS, INPUT_SCALE, GLOBAL_SCALE, tl.trans(result), m[:, None], n[None, :], N,
        m_inside[:, None], m_inside[:, None] & n_inside[None, :],
    )  # fmt: skip


# --- dequantisation --------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N", "K", "GROUP"])
def dequantize_kernel(
    W, OUT, SCALE, ZEROS, GLOBAL_SCALE,
    N, K, GROUP,
    BITS: tl.constexpr, ELEMENT_BITS: tl.constexpr, TILE_K: tl.constexpr,
    KIND: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, D3: tl.constexpr,
    SCALE_KIND: tl.constexpr, ZEROS_KIND: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """OUT[N, K]: the weight in float32, rounded once to OUT's dtype."""
    blocks_k = tl.cdiv(K, BLOCK_K)
    n0 = tl.program_id(0) // blocks_k * BLOCK_N
    k0 = tl.program_id(0) % blocks_k * BLOCK_K
    n = n0 + tl.arange(0, BLOCK_N)[:, None]
    k = k0 + tl.arange(0, BLOCK_K)[None, :]
    inside = (n < N) & (k < K)
    G = K // GROUP
    group = k // GROUP
    codes = load_codes(W, n0, k0, N, K, BITS, ELEMENT_BITS, TILE_K, BLOCK_N, BLOCK_K)
    value = decode_float(codes, BITS, KIND, D0, D1, D2, D3)
    zero = tl.zeros_like(value)
    if ZEROS_KIND != "none":
        zero = load_zero(ZEROS, n, group, N, G, inside, BITS, ZEROS_KIND).to(tl.float32)
    if ZEROS_KIND == "original" or ZEROS_KIND == "quantized":
        value -= zero
    if SCALE_KIND != "none":
        value *= decode_scale(load_raw(SCALE, n, group, G, inside), SCALE_KIND)
    if ZEROS_KIND == "rescale":
        value -= zero
    if GLOBAL_SCALE is not None:
        value *= tl.load(GLOBAL_SCALE)
    tl.store(OUT + n.to(tl.int64) * K + k, value.to(OUT.dtype.element_ty), mask=inside)
