"""Packed words, scales and zero points -> vectors of 16 rows: the three decoders of the formats.

One vector of words holds the codes of 16 rows for some consecutive k (layouts.Row16), so a decoder
only shifts and masks; every row stays in its lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from ..formats import Affine, MiniFloat, WeightFormat, get_format
from ..layouts import planes
from . import bytewise
from .ir import F16, I8, I16, I32, LANES, VF, VI, Builder, Field, Value, floats, i64, ints
from .target import Target

V16 = ir.VectorType(I16, LANES)


@dataclass(frozen=True)
class Weights:
    """What a kernel decodes: the format's name and the dtypes of the extras (None: absent)."""

    format: str
    scale: str | None = None  # float32, float16, bfloat16, e8m0, e4m3
    zeros_mode: str | None = None
    zeros: str | None = None  # as scale; None for packed ("quantized") zeros

    @property
    def decoder(self) -> WeightFormat:
        return get_format(self.format)

    @property
    def bits(self) -> int:
        return self.decoder.bits


SCALE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "e8m0": 1, "e4m3": 1}
E4M3 = MiniFloat(exponent_bits=4, mantissa_bits=3, bias=7, special="nan")


def is_supported(weight_format: WeightFormat) -> bool:
    """Whether the kernels decode the format: not tables of more than 16 entries."""
    return isinstance(weight_format.decoder, (Affine, MiniFloat)) or weight_format.bits <= 4


def smallest_unit(bits: int) -> int:
    """The fewest consecutive k that fill whole words of every plane."""
    return max(32 // width for width, _ in planes(bits))


# ---------------------------------------------------------------------------------- words -> values


def load_words(b: Builder, address: Value, bits: int, unit: int) -> list[Value]:
    """The words of `unit` consecutive k (a divisor or the whole of a block of 32)."""
    return [b.load_at(b.offset(address, 64 * i), VI, 4) for i in range(bits * unit // 32)]


def code(b: Builder, words: Sequence[Value], bits: int, unit: int, j: int, flip: int = 0) -> Value:
    """The j-th code of the unit, as unsigned i32 lanes; flip: bits to invert."""
    result, start = None, 0
    for width, first in planes(bits):
        position = j % (32 // width) * width - first
        word = words[start + j // (32 // width)]
        if flip:
            pattern = (flip >> first) & ((1 << width) - 1)
            word = b.xor(word, ints(_repeat(pattern, width)))
        word = b.shift_right(word, position) if position >= 0 else b.shift_left(word, -position)
        last = position + first + width == 32 and position >= 0 and first == 0
        part = word if last else b.mask(word, ((1 << width) - 1) << first)
        result = part if result is None else b.or_(result, part)
        start += width * unit // 32
    return result


def _repeat(pattern: int, width: int) -> int:
    return sum(pattern << shift for shift in range(0, 32, width))


def integer_value(
    b: Builder, affine: Affine, words: Sequence[Value], bits: int, unit: int, j: int
) -> Value:
    """The j-th value of an Affine format, as i32 lanes."""
    sign = 1 << (bits - 1)
    if _is_signed(affine, bits):
        # one xor for a whole word, then two shifts extend the sign; no subtraction per value
        per_word = 32 // bits
        word, slot = words[j // per_word], j % per_word
        if affine.flip != sign:
            word = b.xor(word, ints(_repeat(affine.flip ^ sign, bits)))
        return b.ashr(b.shift_left(word, 32 - bits * (slot + 1)), ints(32 - bits))
    value = code(b, words, bits, unit, j, affine.flip)
    if affine.step != 1:
        value = b.mul(value, ints(affine.step))
    return b.add(value, ints(affine.offset)) if affine.offset else value


def is_placed(weights: Weights) -> bool:
    """Whether `placed_values` serves: integers in one plane, less their zeros before any scale."""
    affine, bits = weights.decoder.decoder, weights.bits
    if not isinstance(affine, Affine) or weights.zeros_mode == "rescale":
        return False
    return affine.step == 1 and len(planes(bits)) == 1


def placed_shift(weights: Weights, k: int) -> int:
    """The power of two that `placed_values` leaves in the value of the k-th column."""
    affine, bits = weights.decoder.decoder, weights.bits
    assert isinstance(affine, Affine)
    if _is_signed(affine, bits) and weights.zeros_mode != "quantized":
        return 32 - bits
    position = bits * (k % (32 // bits))
    return 0 if position + bits == 32 else position


def _is_signed(affine: Affine, bits: int) -> bool:
    """Offset binary is two's complement with the top bit flipped."""
    return affine.step == 1 and affine.offset == -(1 << (bits - 1)) and len(planes(bits)) == 1


def placed_values(
    b: Builder, weights: Weights, zero: Value | None
) -> Callable[[Sequence[Value], int, int], Value]:
    """As weight_values, but each value times 2^placed_shift, which the activations make good.

    A code is masked where it lies in its word (signed ones are brought to the top): as a float it
    is as exact there.
    """
    affine, bits = weights.decoder.decoder, weights.bits
    assert isinstance(affine, Affine)
    per_word, all_ones = 32 // bits, (1 << bits) - 1

    def value(words: Sequence[Value], unit: int, j: int) -> Value:
        word, slot = words[j // per_word], j % per_word
        shift = placed_shift(weights, j)
        if shift == 32 - bits:
            flip = affine.flip ^ 1 << (bits - 1)
            word = b.xor(word, ints(_repeat(flip, bits))) if flip else word
            x = b.mask(b.shift_left(word, shift - bits * slot), all_ones << shift)
        else:
            word = b.xor(word, ints(_repeat(affine.flip, bits))) if affine.flip else word
            if shift == bits * slot:
                x = b.mask(word, all_ones << shift)
            else:  # the highest, which would be negative
                x = b.shift_right(word, bits * slot)
            offset = ints(affine.offset) if affine.offset else None
            if weights.zeros_mode == "quantized":
                offset = b.sub(offset or ints(0), zero)
            x = b.add(x, b.shift_left(offset, shift)) if offset else x
        x = b.sitofp(x, VF)
        return b.fsub(x, b.fmul(zero, floats(2.0**shift))) if weights.zeros else x

    return value


def index_bits(target: Target, weights: Weights, rows: int) -> int:
    """Bits of a word that one lookup takes in tables of sums of activations; 0: no such tables.

    Of one row of A and narrow codes, the sums over a few columns for every combination of codes are
    tabulated once for all rows of weights; one lookup then replaces decoding and several products.
    """
    width = 4 if target.has("avx512f") else 3
    is_narrow = target.has("avx2") and 2 * weights.bits <= width
    return width if is_narrow and rows == 1 and weights.zeros_mode is None else 0


def sum_tables(width: int, weights: Weights) -> list[tuple[int, list[list[float]]]]:
    """The tables of one word: the first of their columns, and the values of each entry's codes."""
    bits, values = weights.bits, weights.decoder.code_values()
    result = []
    for first in range(0, 32 // bits, width // bits):
        count = min(width // bits, 32 // bits - first)
        codes = [[e >> bits * i & (1 << bits) - 1 for i in range(count)] for e in range(1 << width)]
        result.append((first, [[values[code] for code in entry] for entry in codes]))
    return result


def float_value(
    b: Builder, target: Target, weights: Weights, words: Sequence[Value], unit: int, j: int
) -> Value:
    """The j-th value of any format, as float lanes."""
    decoder, bits = weights.decoder.decoder, weights.bits
    if isinstance(decoder, Affine):
        if decoder == Affine(step=2, offset=-1) and bits == 1:
            # -1 and +1 differ in the sign bit only: no conversion from integer
            sign = b.mask(b.shift_left(words[0], 31 - j), 0x80000000)
            return b.bitcast(b.xor(sign, ints(0xBF800000)), VF)
        return b.sitofp(integer_value(b, decoder, words, bits, unit, j), VF)
    per_lane = target.has("avx512f") or not (target.has("avx2") and target.has("f16c"))
    if not per_lane and bytewise.serves(decoder, bits):
        per_word = 32 // bits
        return bytewise.values_of_word(b, decoder, bits, words[j // per_word])[j % per_word]
    if bits > 4:
        assert isinstance(decoder, MiniFloat)
        return minifloat(b, target, decoder, code(b, words, bits, unit, j))
    entries = list(decoder.values(bits)) * (16 >> bits)
    if bits == 4:  # the lookup reads four bits and ignores those above
        return lookup16(b, target, b.shift_right(words[j // 8], 4 * (j % 8)), entries)
    return lookup16(b, target, code(b, words, bits, unit, j), entries)


def lookup(b: Builder, table: Value, index: Value) -> Value:
    """table[index modulo its length] in each lane: 8 floats with AVX2, 16 with AVX-512."""
    if table.type.count == LANES:
        return b.intrinsic("llvm.x86.avx512.permvar.sf.512", VF, [table, index])
    name = "llvm.x86.avx2.permps"
    return b.join(*(b.intrinsic(name, table.type, [table, half]) for half in b.halves(index)))


def lookup16(b: Builder, target: Target, index: Value, entries: Sequence[float]) -> Value:
    """entries[index & 15] in each lane."""
    if target.has("avx512f"):
        return lookup(b, floats(entries), index)
    layer = [floats(entry) for entry in entries]
    for bit in range(4):
        is_set = b.icmp_unsigned("!=", b.mask(index, 1 << bit), ints(0))
        layer = [b.select(is_set, layer[i + 1], layer[i]) for i in range(0, len(layer), 2)]
    return layer[0]


def minifloat(b: Builder, target: Target, decoder: MiniFloat, codes: Value) -> Value:
    """Values of up to 8 bits in i32 lanes -> floats, exact for every code."""
    bits = 1 + decoder.exponent_bits + decoder.mantissa_bits
    magnitude = b.mask(codes, (1 << (bits - 1)) - 1)
    is_nan = b.icmp_unsigned("==", magnitude, ints((1 << (bits - 1)) - 1))
    if target.has("f16c") and decoder.exponent_bits <= 5:
        # as a half with too small an exponent, made good by one product: the hardware conversion
        # handles subnormals, and where the exponents are equal infinity and NaN too
        shift, sign = 10 - decoder.mantissa_bits, 16 - bits
        half = b.or_(
            b.shift_left(magnitude, shift), b.shift_left(b.mask(codes, 1 << (bits - 1)), sign)
        )
        value = half_to_float(b, target, b.trunc(half, V16))
        if decoder.bias != 15:
            value = b.fmul(value, floats(2.0 ** (15 - decoder.bias)))
        if decoder.special == "nan":
            value = b.select(is_nan, floats(float("nan")), value)
        return value
    fraction, top = decoder.mantissa_bits, (1 << decoder.exponent_bits) - 1
    field = b.shift_left(magnitude, 23 - fraction)
    normal = b.add(field, ints((127 - decoder.bias) << 23))
    # subnormals: with the exponent of the smallest normal the implicit one is too much; take it off
    smallest = floats(2.0 ** (1 - decoder.bias))
    shifted = b.bitcast(b.add(field, ints((128 - decoder.bias) << 23)), VF)
    subnormal = b.bitcast(b.fsub(shifted, smallest), VI)
    result = b.select(b.icmp_signed("<", field, ints(1 << 23)), subnormal, normal)
    if decoder.special == "nan":
        result = b.select(is_nan, ints(0x7FC00000), result)
    elif decoder.special == "ieee":
        special = b.icmp_signed(">=", field, ints(top << 23))
        result = b.select(special, b.or_(field, ints(0x7F800000)), result)
    sign = b.shift_left(b.mask(codes, 1 << (bits - 1)), 32 - bits)
    return b.bitcast(b.or_(result, sign), VF)


def half_to_float(b: Builder, target: Target, half: Value) -> Value:
    """<16 x i16> bits of halves -> floats."""
    if target.has("f16c"):
        return b.fpext(b.bitcast(half, ir.VectorType(F16, LANES)), VF)
    # without the instruction LLVM would call a library function for each lane
    ieee = MiniFloat(exponent_bits=5, mantissa_bits=10, bias=15, special="ieee")
    return minifloat(b, Target.generic(), ieee, b.zext(half, VI))


# ---------------------------------------------------------------------------------- extras


def row_indices(b: Builder, block: Value) -> list[Value]:
    """The 16 rows of a block; the last block repeats row N - 1, so that nothing beyond is read."""
    first, last = b.times(block, LANES), b.sub(b.field(Field.N), i64(1))
    return [b.smaller(b.add(first, i64(lane)), last) for lane in range(LANES)]


def gather(b: Builder, addresses: Sequence[Value], type_: ir.Type) -> Value:
    """16 scalars as one vector."""
    vector = ir.Constant(ir.VectorType(type_, LANES), ir.Undefined)
    for lane, address in enumerate(addresses):
        scalar = b.load_at(address, type_, 1)
        vector = b.insert_element(vector, scalar, I32(lane))
    return vector


def to_float(b: Builder, target: Target, dtype: str, raw: Value) -> Value:
    """Raw bits (i32, i16 or i8 lanes) of a scale dtype -> floats."""
    if dtype == "float32":
        return b.bitcast(raw, VF)
    if dtype == "float16":
        return half_to_float(b, target, raw)
    wide = b.zext(raw, VI)
    if dtype == "bfloat16":
        return b.bitcast(b.shift_left(wide, 16), VF)
    if dtype == "e4m3":
        return minifloat(b, target, E4M3, wide)
    assert dtype == "e8m0"
    bits = b.shift_left(wide, 23)
    bits = b.select(b.icmp_unsigned("==", wide, ints(0)), ints(0x00400000), bits)  # 2^-127
    bits = b.select(b.icmp_unsigned("==", wide, ints(255)), ints(0x7FC00000), bits)
    return b.bitcast(bits, VF)


class Extras:
    """The scales and zeros of one block of rows; `load(group)` gives the vectors of a group."""

    def __init__(self, b: Builder, target: Target, weights: Weights, block: Value):
        self.b, self.target, self.weights = b, target, weights
        rows = row_indices(b, block) if weights.scale or weights.zeros else []
        groups = b.field(Field.GROUPS)

        def row_addresses(field: Field, dtype: str) -> list[Value]:
            base, pitch = b.field(field), b.times(groups, SCALE_BYTES[dtype])
            return [b.add(base, b.mul(row, pitch)) for row in rows]

        if weights.scale:
            self.scale_rows = row_addresses(Field.SCALE, weights.scale)
        if weights.zeros:
            self.zeros_rows = row_addresses(Field.ZEROS, weights.zeros)
        if weights.zeros_mode == "quantized":
            # 16 codes are 2*bits whole bytes; a short last block must not read beyond its row
            self.stride = b.field(Field.ZEROS_STRIDE)
            last = b.sub(self.stride, i64(1))
            first, base = b.times(block, 2 * weights.bits), b.field(Field.ZEROS)
            offsets = [b.smaller(b.add(first, i64(t)), last) for t in range(2 * weights.bits)]
            self.zeros_bytes = [b.add(base, offset) for offset in offsets]

    def load(self, group: Value) -> tuple[Value | None, Value | None]:
        """(scale as floats, zero point as floats, or as i32 where packed); None where absent."""
        scale = zero = None
        if self.weights.scale:
            scale = self._column(self.scale_rows, self.weights.scale, group)
        if self.weights.zeros:
            zero = self._column(self.zeros_rows, self.weights.zeros, group)
        if self.weights.zeros_mode == "quantized":
            zero = self._packed(group)
        return scale, zero

    def _column(self, rows: Sequence[Value], dtype: str, group: Value) -> Value:
        size = SCALE_BYTES[dtype]
        offset = self.b.times(group, size)
        addresses = [self.b.add(row, offset) for row in rows]
        return to_float(self.b, self.target, dtype, gather(self.b, addresses, ir.IntType(8 * size)))

    def _packed(self, group: Value) -> Value:
        b, bits = self.b, self.weights.bits
        offset = b.mul(group, self.stride)
        data = [b.zext(b.load_at(b.add(a, offset), I8, 1), I32) for a in self.zeros_bytes]
        vector, shifts = ir.Constant(VI, ir.Undefined), []
        for lane in range(LANES):
            byte, shift = divmod(lane * bits, 8)
            scalar = data[byte]
            if shift + bits > 8:
                scalar = b.or_(scalar, b.shl(data[byte + 1], I32(8)))
            vector = b.insert_element(vector, scalar, I32(lane))
            shifts.append(shift)
        return b.mask(b.lshr(vector, ints(shifts)), (1 << bits) - 1)


def weight_values(
    b: Builder, target: Target, weights: Weights, zero: Value | None
) -> Callable[[Sequence[Value], int, int], Value]:
    """A function (words, unit, j) -> value less its zero point, exact before any product.

    "rescale" zeros come off after the scale instead, so they are not taken here.
    """
    decoder = weights.decoder.decoder

    def value(words: Sequence[Value], unit: int, j: int) -> Value:
        if weights.zeros_mode == "quantized":
            assert isinstance(decoder, Affine)
            integer = integer_value(b, decoder, words, weights.bits, unit, j)
            return b.sitofp(b.sub(integer, zero), VF)
        x = float_value(b, target, weights, words, unit, j)
        return b.fsub(x, zero) if weights.zeros_mode == "original" else x

    return value
