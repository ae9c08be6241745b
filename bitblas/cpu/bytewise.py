"""AVX2 decoders of a whole register of codes at once, for formats costly to decode lane by lane.

8 rows of words are where needed first put into an order (one byte shuffle) from which unpacking
leaves each row in its own lane again:

    4-bit table: 32 codes index four tables of one byte each, the bytes of the floats; two levels of
        unpacking put them together. 13 shuffles for 32 weights, where lookups of 8 entries take 16
        slow lane-crossing ones (Zen 3, m = 1: 1.0 against 1.8 ms). Where the lower two bytes of all
        entries are zero (fp4), two tables do, and nothing need be put into an order.
    e4m3: the upper two bytes of the floats, again by tables (Zen 3: products of subnormal floats,
        the other way without F16C, take several times as long as others).
    e5m2: 16 codes at a time become halves, which the hardware converts.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from llvmlite import ir

from ..formats import MiniFloat, Table
from .ir import F16, F32, I8, I16, I32, Builder, Value

V8F, V8I = ir.VectorType(F32, 8), ir.VectorType(I32, 8)
V16S, V32B = ir.VectorType(I16, 16), ir.VectorType(I8, 32)


def _bytes(values: Sequence[int]) -> Value:
    """32 constant bytes, 0..255."""
    return ir.Constant(V32B, [value - 256 * (value > 127) for value in values])


def _shuffle_bytes(b: Builder, x: Value, order: Sequence[int]) -> Value:
    """The same byte order within each 128-bit half."""
    return b.shuffle(x, x, [half + i for half in (0, 16) for i in order])


def _unpack(b: Builder, x: Value, y: Value, result: ir.Type, high: int) -> Value:
    """Interleave the low or high halves of each 128-bit lane, as vpunpckl* and vpunpckh* do."""
    count = x.type.count
    order = []
    for lane in (0, count // 2):
        for i in range(lane + high * count // 4, lane + (high + 1) * count // 4):
            order += [i, count + i]
    return b.bitcast(b.shuffle(x, y, order), result)


def values_of_word(b: Builder, decoder: MiniFloat | Table, bits: int, word: Value) -> list[Value]:
    """All codes of one word of 16 rows as float vectors, by their k; emitted once for each word."""
    memo = b.decoded_words
    if id(word) not in memo:
        if bits == 4:
            values = _table_values(b, decoder.values(bits), word)
        else:
            assert isinstance(decoder, MiniFloat)
            is_e4m3 = decoder.exponent_bits == 4
            entries = decoder.values(bits)
            values = _e4m3_values(b, entries, word) if is_e4m3 else _e5m2_values(b, word)
        memo[id(word)] = (word, values)  # the word is kept, so that its id stays its own
    return memo[id(word)][1]


def serves(decoder: object, bits: int) -> bool:
    """Formats that values_of_word takes: 4-bit tables and small floats, halves with fewer bits."""
    if isinstance(decoder, MiniFloat):
        fields = (decoder.exponent_bits, decoder.mantissa_bits, decoder.special)
        return bits == 4 or fields in ((4, 3, "nan"), (5, 2, "ieee"))
    return isinstance(decoder, Table) and bits == 4


def _table_values(b: Builder, entries: Sequence[float], word: Value) -> list[Value]:
    """The 8 codes of one word of 16 rows -> 8 float vectors, by their k."""
    patterns = [struct.pack("<f", entry) for entry in entries]
    tables = [_bytes([p[t] for p in patterns] * 2) for t in range(4)]
    is_short = not any(any(p[:2]) for p in patterns)
    halves: list[list[Value]] = []
    for half in b.halves(word):
        if is_short:
            pairs = [_pair(b, *_look_up(b, tables[2:], half, nibble)) for nibble in (0, 1)]
            halves.append([x for both in zip(*pairs, strict=True) for x in both])
            continue
        values: list[Value] = [None] * 8
        # bytes of a row in a word hold k = (0, 1), (2, 3) ...: gather the rows of each byte
        ordered = _shuffle_bytes(
            b, b.bitcast(half, V32B), [4 * r + i for i in range(4) for r in range(4)]
        )
        for nibble in (0, 1):
            byte = _look_up(b, tables, b.bitcast(ordered, V8I), nibble)
            low = [_unpack(b, byte[0], byte[1], V16S, high) for high in (0, 1)]
            top = [_unpack(b, byte[2], byte[3], V16S, high) for high in (0, 1)]
            for i in range(4):
                values[2 * i + nibble] = _unpack(b, low[i // 2], top[i // 2], V8F, i % 2)
        halves.append(values)
    return [b.join(low, high) for low, high in zip(*halves, strict=True)]


def _look_up(b: Builder, tables: Sequence[Value], word: Value, nibble: int) -> list[Value]:
    """Of each table the bytes at the low or the high nibbles of 8 words."""
    index = b.lshr(word, ir.Constant(V8I, [4] * 8)) if nibble else word
    index = b.bitcast(b.and_(index, ir.Constant(V8I, [0x0F0F0F0F] * 8)), V32B)
    return [b.intrinsic("llvm.x86.avx2.pshuf.b", V32B, [table, index]) for table in tables]


def _pair(b: Builder, low: Value, top: Value) -> list[Value]:
    """Bytes 2 and 3 of floats whose other two are zero, 4 in each of 8 words -> 4 float vectors.

    Put together within their words by shifts and blends: no rows to reorder.
    """
    eight, sixteen = ir.Constant(V16S, [8] * 16), ir.Constant(V8I, [16] * 8)
    alternate = [i + 32 * (i % 2) for i in range(32)]
    raised = b.bitcast(b.shl(b.bitcast(top, V16S), eight), V32B)
    lowered = b.bitcast(b.lshr(b.bitcast(low, V16S), eight), V32B)
    even = b.bitcast(b.shuffle(low, raised, alternate), V8I)
    odd = b.bitcast(b.shuffle(lowered, top, alternate), V8I)
    firsts = [b.shl(pair, sixteen) for pair in (even, odd)]
    seconds = [b.and_(pair, ir.Constant(V8I, [-0x10000] * 8)) for pair in (even, odd)]
    return [b.bitcast(x, V8F) for x in firsts + seconds]


def _e5m2_values(b: Builder, word: Value) -> list[Value]:
    """The 4 codes of one word of 16 rows, upper bytes of halves -> 4 float vectors, by their k."""
    halves: list[list[Value]] = []
    for half in b.halves(word):
        # 16-bit pairs (k = 0, 1) of four rows, then (2, 3)
        order = [4 * r + 2 * pair + i for pair in (0, 1) for r in range(4) for i in (0, 1)]
        pairs = b.bitcast(_shuffle_bytes(b, b.bitcast(half, V32B), order), V16S)
        values: list[Value] = [None] * 4
        for odd in (0, 1):
            eight = ir.Constant(V16S, [8] * 16)
            bits = b.and_(pairs, ir.Constant(V16S, [-0x100] * 16)) if odd else b.shl(pairs, eight)
            # rows 0..3 of two k, and rows 4..7 of the same
            kind = ir.VectorType(F16, 8)
            low, high = (b.fpext(b.bitcast(x, kind), V8F) for x in b.halves(bits))
            values[odd] = b.shuffle(low, high, [0, 1, 2, 3, 8, 9, 10, 11])
            values[2 + odd] = b.shuffle(low, high, [4, 5, 6, 7, 12, 13, 14, 15])
        halves.append(values)
    return [b.join(low, high) for low, high in zip(*halves, strict=True)]


def _e4m3_values(b: Builder, entries: Sequence[float], word: Value) -> list[Value]:
    """The 4 codes of one word of 16 rows -> 4 float vectors, by their k.

    Of a normal number the upper byte of the float follows from the upper nibble of the code, the
    next from the lower; codes with a magnitude below 16, subnormal or not, are looked up whole.
    """
    patterns = [struct.pack("<f", entry) for entry in entries]
    top_table = _bytes([patterns[16 * high + 8][3] for high in range(16)] * 2)
    low_table = _bytes([patterns[16 + low][2] for low in range(16)] * 2)
    small_low, small_top = (_bytes([patterns[i][t] for i in range(16)] * 2) for t in (2, 3))

    def equal(x: Value, mask: int, value: int) -> Value:
        return b.icmp_unsigned("==", b.and_(x, _bytes([mask] * 32)), _bytes([value] * 32))

    halves: list[list[Value]] = []
    for half in b.halves(word):
        code = b.bitcast(half, V32B)
        low, from_small_low, from_small_top = _look_up(
            b, [low_table, small_low, small_top], half, 0
        )
        (top,) = _look_up(b, [top_table], half, 1)
        is_small = equal(code, 0x70, 0)
        signed = b.or_(from_small_top, b.and_(code, _bytes([0x80] * 32)))
        top = b.select(is_small, signed, top)
        low = b.select(is_small, from_small_low, low)
        top = b.or_(top, b.sext(equal(code, 0x7F, 0x7F), V32B))
        halves.append(_pair(b, low, top))
    return [b.join(low, high) for low, high in zip(*halves, strict=True)]
