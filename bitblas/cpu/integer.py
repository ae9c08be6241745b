"""Kernels for int8 activations: exact int32 products of each group, then scaled in float32.

A word holds four bytes, and a byte 8/b codes. Masking one code out of each byte ("a step") gives
four unsigned bytes, which meet four activations in one dot-product instruction. Which k they are
follows from the layout, so the activations are put into the same order once per call:

    2-bit word, 16 codes:  step q takes k = q, 4+q, 8+q, 12+q of the word, q = 0..3

A value is step * u + offset for an unsigned u, so its products need step * sum(u*a) and
offset * sum(a); the sums of the activations come with the packing.
"""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import ir

from ..formats import Affine
from ..layouts import planes
from .decode import Extras, Weights, load_words
from .ir import I8, I16, I32, I64, VF, VI, Builder, Field, Value, floats, i64, ints
from .microkernel import PREFETCH, blocks_of, word_address
from .target import Target

UNIT = 32  # values of k taken at once; groups are multiples of it


class Step(NamedTuple):
    """One dot product: word `word` of a unit shifted right by `shift`, masked; its four k."""

    word: int
    shift: int
    mask: int
    ks: tuple[int, ...]


def steps(bits: int) -> list[Step]:
    """The byte-wise steps of a unit of 32 values of k."""
    result, start = [], 0
    for width, first in planes(bits):
        per_byte = 8 // width
        for word in range(width):
            for q in range(per_byte):
                ks = tuple(word * 32 // width + i * per_byte + q for i in range(4))
                mask = ((1 << width) - 1) << first
                result.append(Step(start + word, width * q - first, mask, ks))
        start += width
    return result


def is_wide(target: Target, bits: int) -> bool:
    """8-bit weights on AVX2: products of bytes would saturate int16 sums, so they are widened."""
    return bits == 8 and target.has("avx2") and not target.has("avx512vnni")


def activation_order(target: Target, bits: int) -> list[int]:
    """The k of a unit in the order in which the packed activations hold them."""
    if is_wide(target, bits):  # bytes 0 and 2 of a word, then 1 and 3, as pairs of int16
        return [4 * word + k for word in range(8) for k in (0, 2, 1, 3)]
    return [k for step in steps(bits) for k in step.ks]


def unit_bytes(target: Target, bits: int) -> int:
    """Bytes of packed activations of one row and unit."""
    return len(activation_order(target, bits)) * (2 if is_wide(target, bits) else 1)


def pack_integer(target: Target, bits: int, tile: int) -> ir.Module:
    """void pack_integer(fields): int8 A [M], A_STRIDE apart -> OUT [M/tile][unit][step][tile].

    SUMS [M/tile][group][tile] gets the sums of A over each group. Items are tiles; rows beyond M
    repeat the last one.
    """
    b = Builder("pack_integer")
    order = activation_order(target, bits)
    size = unit_bytes(target, bits)
    k, groups, length = b.field(Field.K_PADDED), b.field(Field.GROUPS), b.field(Field.GROUP)
    units = b.udiv(k, i64(UNIT))
    row_bytes, last = b.times(units, size), b.sub(b.field(Field.M), i64(1))
    with b.work_items() as item, b.loop(0, i64(tile)) as i:
        row = b.smaller(b.add(b.times(item, tile), i), last)
        source = b.variable(I64, b.add(b.field(Field.A), b.mul(row, b.field(Field.A_STRIDE))))
        lane = b.times(i, 4)
        to = b.add(b.field(Field.OUT), b.add(b.times(b.mul(item, row_bytes), tile), lane))
        to = b.variable(I64, to)
        sums = b.add(b.field(Field.SUMS), b.add(b.times(b.mul(item, groups), 4 * tile), lane))
        with b.loop(0, groups) as group:
            total = b.variable(I32, I32(0))
            with b.loop(0, length, UNIT):
                address = b.get(source)
                bytes_ = b.load_at(address, ir.VectorType(I8, UNIT), 1)
                wide = b.sext(bytes_, ir.VectorType(I32, UNIT))
                reduced = b.intrinsic("llvm.vector.reduce.add.v32i32", I32, [wide])
                b.store(b.add(b.get(total), reduced), total)
                packed = b.shuffle(bytes_, bytes_, order)
                if is_wide(target, bits):
                    packed = b.sext(packed, ir.VectorType(I16, len(order)))
                packed = b.bitcast(packed, ir.VectorType(I32, size // 4))
                place = b.get(to)
                for j in range(size // 4):
                    b.store_at(b.extract_element(packed, I32(j)), b.offset(place, 4 * tile * j), 4)
                b.store(b.offset(address, UNIT), source)
                b.store(b.offset(place, size * tile), to)
            b.store_at(b.get(total), b.add(sums, b.times(group, 4 * tile)), 4)
    return b.finish()


class Dot:
    """Sums of products of one unit of weights with any number of rows of activations."""

    def __init__(self, b: Builder, target: Target, affine: Affine, bits: int, words: list[Value]):
        self.b, self.target, self.bits = b, target, bits
        self.signed = is_wide(target, bits) and is_twos_complement(affine)
        flip = 0 if self.signed else affine.flip
        if is_wide(target, bits):
            self.vectors = [v for word in words for v in self._widen(word, flip)]
        else:
            self.vectors = [self._select(words, step, flip) for step in steps(bits)]

    def _select(self, words: list[Value], step: Step, flip: int) -> Value:
        b, word = self.b, words[step.word]
        word = (
            b.shift_right(word, step.shift) if step.shift >= 0 else b.shift_left(word, -step.shift)
        )
        if step.mask != 0xFF:
            word = b.mask(word, step.mask * 0x01010101)
        pattern = flip & step.mask
        return b.xor(word, ints(pattern * 0x01010101)) if pattern else word

    def _widen(self, word: Value, flip: int) -> tuple[Value, Value]:
        """The even and the odd bytes as int16."""
        b, vector = self.b, ir.VectorType(I16, 32)
        eight = ir.Constant(vector, [8] * 32)
        if flip:
            word = b.xor(word, ints(flip * 0x01010101))
        pairs = b.bitcast(word, vector)
        if self.signed:
            return b.ashr(b.shl(pairs, eight), eight), b.ashr(pairs, eight)
        return b.and_(pairs, ir.Constant(vector, [255] * 32)), b.lshr(pairs, eight)

    def add(self, total: Value, activations: list[Value]) -> Value:
        """total + the products with packed activations, one i32 scalar for each vector."""
        if is_wide(self.target, self.bits):
            for vector, a in zip(self.vectors, activations, strict=True):
                splat = self.b.bitcast(self.b.splat(a), vector.type)
                total = self.b.add(total, self._madd_words(vector, splat))
            return total
        if self.target.has("avx512vnni"):
            for vector, a in zip(self.vectors, activations, strict=True):
                total = self._vpdpbusd(total, vector, self.b.splat(a))
            return total
        if self.target.has("avx2"):
            return self._madd_bytes(total, activations)
        return self._portable(total, activations)

    def _vpdpbusd(self, total: Value, u: Value, a: Value) -> Value:
        name, kind = "llvm.x86.avx512.vpdpbusd.512", ir.VectorType(I8, 64)
        return self.b.intrinsic(name, VI, [total, self.b.bitcast(u, kind), self.b.bitcast(a, kind)])

    def _madd_words(self, x: Value, y: Value) -> Value:
        """32 int16 products, pairs summed: 16 int32."""
        halves = zip(self.b.halves(x), self.b.halves(y), strict=True)
        kind = ir.VectorType(I32, 8)
        low, high = (self.b.intrinsic("llvm.x86.avx2.pmadd.wd", kind, [p, q]) for p, q in halves)
        return self.b.join(low, high)

    def _madd_bytes(self, total: Value, activations: list[Value]) -> Value:
        """vpmaddubsw sums two products of u <= 15 and |a| <= 128 in int16: at most 3840; the eight
        steps of a unit reach 30720 (3-bit: eight of 768 and eight of 1024), which still fits."""
        b, bytes_ = self.b, ir.VectorType(I8, 32)
        sums: list[Value] | None = None
        for vector, a in zip(self.vectors, activations, strict=True):
            splat = self.b.splat(a)
            products = [
                b.intrinsic("llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16),
                            [b.bitcast(u, bytes_), b.bitcast(s, bytes_)])
                for u, s in zip(b.halves(vector), b.halves(splat), strict=True)
            ]  # fmt: skip
            sums = [b.add(x, y) for x, y in zip(sums, products, strict=True)] if sums else products
        assert sums is not None
        ones = ir.Constant(ir.VectorType(I16, 32), [1] * 32)
        return b.add(total, self._madd_words(b.join(*sums), ones))

    def _portable(self, total: Value, activations: list[Value]) -> Value:
        b = self.b
        for vector, a in zip(self.vectors, activations, strict=True):
            for byte in range(4):
                u = b.mask(b.shift_right(vector, 8 * byte), 255)
                s = b.ashr(b.shl(a, I32(24 - 8 * byte)), I32(24))
                total = b.add(total, b.mul(u, b.splat(s)))
        return total


def is_twos_complement(affine: Affine) -> bool:
    return affine == Affine(step=1, offset=-128, flip=0x80)


def fused_integer(target: Target, weights: Weights, tile: int, exact: bool) -> ir.Module:
    """void fused_integer(fields): any m, in tiles of `tile` rows of A as pack_integer leaves them.

    exact: no scales and no zeros but packed ones; the accumulators are int32. Otherwise float32.
    """
    b = Builder("fused_integer")
    affine, bits = weights.decoder.decoder, weights.bits
    assert isinstance(affine, Affine)
    offset = 0 if is_wide(target, bits) and is_twos_complement(affine) else affine.offset
    size = unit_bytes(target, bits)
    kind, nothing = (VI, ints(0)) if exact else (VF, floats(0.0))
    buffer = b.variable(ir.ArrayType(VI, tile))
    buffer_address = b.ptrtoint(buffer, I64)
    m, groups, length = b.field(Field.M), b.field(Field.GROUPS), b.field(Field.GROUP)
    with b.work_items() as item, b.loop(*blocks_of(b, item)) as block:
        extras = Extras(b, target, weights, block)
        a = b.variable(I64, b.field(Field.A))
        sums = b.variable(I64, b.field(Field.SUMS))
        with b.loop(0, m, tile) as m0:
            word = b.variable(I64, word_address(b, block, None, bits))
            totals = [b.variable(kind, nothing) for _ in range(tile)]
            with b.loop(0, groups) as group:
                parts = [b.variable(VI, ints(0)) for _ in range(tile)]
                with b.loop(0, length, UNIT):
                    address, activation = b.get(word), b.get(a)
                    words = load_words(b, address, bits, UNIT)
                    for i in range(len(words)):
                        b.prefetch(b.offset(address, PREFETCH + 64 * i))
                    dot = Dot(b, target, affine, bits, words)
                    for i, part in enumerate(parts):
                        row = [
                            b.load_at(b.offset(activation, 4 * (j * tile + i)), I32, 4)
                            for j in range(len(dot.vectors))
                        ]
                        b.store(dot.add(b.get(part), row), part)
                    b.store(b.offset(address, 64 * len(words)), word)
                    b.store(b.offset(activation, size * tile), a)
                scale, zero = extras.load(group)
                sum_address = b.get(sums)
                for i, (part, total) in enumerate(zip(parts, totals, strict=True)):
                    a_sum = b.splat(b.load_at(b.offset(sum_address, 4 * i), I32, 4))
                    product = b.get(part)
                    if affine.step != 1:
                        product = b.mul(product, ints(affine.step))
                    shift = ints(offset) if offset else None
                    if weights.zeros_mode == "quantized":
                        shift = b.sub(ints(offset), zero)
                    if shift is not None:
                        product = b.add(product, b.mul(a_sum, shift))
                    if exact:
                        b.store(b.add(b.get(total), product), total)
                        continue
                    x = b.sitofp(product, VF)
                    if weights.zeros_mode == "original":
                        x = b.fsub(x, b.fmul(zero, b.sitofp(a_sum, VF)))
                    x = b.fmul(x, scale) if scale else x
                    if weights.zeros_mode == "rescale":
                        x = b.fsub(x, b.fmul(zero, b.sitofp(a_sum, VF)))
                    b.store(b.fadd(b.get(total), x), total)
                b.store(b.offset(sum_address, 4 * tile), sums)
            for i, total in enumerate(totals):
                raw = b.get(total) if exact else b.bitcast(b.get(total), VI)
                b.store_at(raw, b.offset(buffer_address, 64 * i), 4)
            m1 = b.smaller(b.add(m0, i64(tile)), m)
            b.call_field(Field.EPILOGUE, [buffer_address, block, m0, m1])
    return b.finish()
