"""AVX2 decoders of a whole register of codes at once, for formats costly to decode lane by lane.

8 rows of words are first put into an order (one byte shuffle) from which unpacking leaves each row
in its own lane again:

    4-bit table: 32 codes index four tables of one byte each, the bytes of the floats; two levels of
        unpacking put them together. 13 shuffles for 32 weights, where lookups of 8 entries take 16
        slow lane-crossing ones (Zen 3, m = 1: 1.0 against 1.8 ms).
    8-bit float: 16 codes at a time become halves, which the hardware converts.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from llvmlite import ir

from ..formats import MiniFloat, Table
from .ir import F16, F32, I8, I16, I32, Builder, Value

V8F, V8I = ir.VectorType(F32, 8), ir.VectorType(I32, 8)
V16S, V32B = ir.VectorType(I16, 16), ir.VectorType(I8, 32)


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
            values = _minifloat_values(b, decoder, word)
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
    tables = [
        ir.Constant(V32B, [p[t] - 256 * (p[t] > 127) for p in patterns] * 2) for t in range(4)
    ]
    halves: list[list[Value]] = []
    for half in b.halves(word):
        values: list[Value] = [None] * 8
        # bytes of a row in a word hold k = (0, 1), (2, 3) ...: gather the rows of each byte
        ordered = _shuffle_bytes(
            b, b.bitcast(half, V32B), [4 * r + i for i in range(4) for r in range(4)]
        )
        for nibble in (0, 1):
            index = b.bitcast(ordered, V8I)
            index = b.lshr(index, ir.Constant(V8I, [4] * 8)) if nibble else index
            index = b.bitcast(b.and_(index, ir.Constant(V8I, [0x0F0F0F0F] * 8)), V32B)
            byte = [b.intrinsic("llvm.x86.avx2.pshuf.b", V32B, [table, index]) for table in tables]
            low = [_unpack(b, byte[0], byte[1], V16S, high) for high in (0, 1)]
            top = [_unpack(b, byte[2], byte[3], V16S, high) for high in (0, 1)]
            for i in range(4):
                values[2 * i + nibble] = _unpack(b, low[i // 2], top[i // 2], V8F, i % 2)
        halves.append(values)
    return [b.join(low, high) for low, high in zip(*halves, strict=True)]


def _minifloat_values(b: Builder, decoder: MiniFloat, word: Value) -> list[Value]:
    """The 4 codes of one word of 16 rows -> 4 float vectors, by their k."""

    def sixteen(value: int) -> Value:
        return ir.Constant(V16S, [value - 0x10000 * (value > 0x7FFF)] * 16)

    halves: list[list[Value]] = []
    for half in b.halves(word):
        # 16-bit pairs (k = 0, 1) of four rows, then (2, 3)
        order = [4 * r + 2 * pair + i for pair in (0, 1) for r in range(4) for i in (0, 1)]
        pairs = b.bitcast(_shuffle_bytes(b, b.bitcast(half, V32B), order), V16S)
        values: list[Value] = [None] * 4
        for odd in (0, 1):
            bits = pairs if odd else b.shl(pairs, sixteen(8))
            if decoder.exponent_bits == 4:
                bits = b.and_(b.ashr(bits, sixteen(1)), sixteen(0xBF80))
                is_nan = b.icmp_unsigned("==", b.and_(bits, sixteen(0x3F80)), sixteen(0x3F80))
                bits = b.or_(bits, b.and_(b.sext(is_nan, V16S), sixteen(0x7FFF)))
            elif odd:
                bits = b.and_(bits, sixteen(0xFF00))
            # rows 0..3 of two k, and rows 4..7 of the same
            eight = ir.VectorType(F16, 8)
            low, high = (b.fpext(b.bitcast(x, eight), V8F) for x in b.halves(bits))
            values[odd] = b.shuffle(low, high, [0, 1, 2, 3, 8, 9, 10, 11])
            values[2 + odd] = b.shuffle(low, high, [4, 5, 6, 7, 12, 13, 14, 15])
        halves.append(values)
    factor = 2.0 ** (15 - decoder.bias)
    result = [b.join(low, high) for low, high in zip(*halves, strict=True)]
    if factor == 1.0:
        return result
    return [b.fmul(x, ir.Constant(x.type, [factor] * 16)) for x in result]
