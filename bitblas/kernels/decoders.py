"""PTX that turns packed words into operand registers of 16-bit matrix instructions.

A decoder takes a *pair* of 32-bit words of the fragment layout (of the widest plane of the code;
for 3-bit codes also the word of the 1-bit plane that covers the same values) and writes the
registers R = 4*step + 2*x + r3 that lie in them (bitblas.layouts.Fragment), two values each.

What it writes is a raw value, to be corrected in the accumulator. With index r3, which says in
which half of the 16 rows a register lies,

    sum of value * a = unit * (sum of raw * a + (zero * zero point - shift) * sum of one * a)

float16 codes stay where they are in the word, as subnormals (code * 2^-24 times a power of two, one
for each row half), and cost one logic instruction for two weights; bfloat16, whose products would
underflow, gets 128 + code. int1 is the sign of 1. Small floats move their fields into place
and leave the exponent bias to `unit`. Tables are looked up in shared memory, where the block's
threads have written what a slower decoder, of byte permutes, makes of each byte. Zero points and a
non-zero `shift` need the sums of A over each group, of which the kernel has `one` times.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..formats import Affine, MiniFloat, Table, WeightFormat
from ..layouts import planes


@dataclass(frozen=True)
class Decoder:
    """asm: reads two words per plane, and what its kind of decoder says, writes `registers`
    registers. instructions: that it takes, as the cost models count them. entry: where asm looks
    codes up, PTX that makes the table's entries; then asm reads 4 * lane as third and fourth input.
    """

    asm: str
    constraints: str
    registers: int
    instructions: float
    entry: str = ""

    @property
    def instructions_per_weight(self) -> float:
        return self.instructions / (2 * self.registers)

    @property
    def table_bytes(self) -> int:
        """Of shared memory, behind all other, for the table that `asm` looks codes up in."""
        return 256 * ROW_BYTES if self.entry else 0

    def fill(self, warps: int) -> str:
        """PTX by which the threads of so many warps write the table; "" where there is none."""
        return _fill(self.entry, 32 * warps) if self.entry else ""


@dataclass(frozen=True)
class PairDecoder(Decoder):
    """To raw values; see the module's docstring. scalable: whether they, times e4m3 scales, are
    exact in the operand's dtype."""

    scalable: bool = False
    unit: tuple[float, float] = (1.0, 1.0)
    one: tuple[float, float] = (-1.0, -1.0)
    shift: tuple[float, float] = (0.0, 0.0)
    zero: tuple[float, float] = (1.0, 1.0)


@lru_cache(maxsize=256)
def pair_decoder(fmt: WeightFormat, A_dtype: str) -> PairDecoder | None:
    """The decoder of a format for float16 or bfloat16 operands; None where there is none."""
    if A_dtype not in ("float16", "bfloat16") or fmt.is_dense:
        return None
    widths = tuple(width for width, _ in planes(fmt.bits))
    if widths not in ((8,), (4,), (2,), (1,), (2, 1)):
        return None
    half = A_dtype == "float16"
    decoder = fmt.decoder
    if isinstance(decoder, Affine):
        if decoder.flip and fmt.bits != 8:
            return None
        if fmt.bits == 8 and not half:
            return _assemble(_bytes_to_bfloat16(decoder), widths) if decoder.step == 1 else None
        if fmt.bits == 1 and decoder.values(1) == [-1.0, 1.0]:
            return _assemble(_signs(half), widths)
        lines, lifts, base = _affine(decoder, fmt.bits, half)
        raised = tuple(float(1 << lift) for lift in lifts)
        one = tuple(-r * 2.0**-24 for r in raised) if half else (-1.0, -1.0)
        unit = tuple(decoder.step * (2.0**24 if half else 1.0) / r for r in raised)
        zero = tuple(-1.0 / (u * o) for u, o in zip(unit, one))
        shift = tuple(decoder.offset * z - base for z in zero)
        return _assemble(lines, widths, unit=unit, one=one, shift=shift, zero=zero)
    if isinstance(decoder, MiniFloat) and len(widths) == 1 and fmt.bits >= 4:
        if decoder.special == "ieee" and decoder.exponent_bits != 5:
            return None
        unit = (2.0 ** (15 - decoder.bias),) * 2 if half else (1.0, 1.0)
        lines = _minifloat(decoder, fmt.bits, half)
        raw = torch.tensor(fmt.code_values(), dtype=torch.float64) / unit[0]
        scalable = fmt.bits == 4 and _takes_scales(raw, half)
        # in float16 a table is no gain: half of the shifts go to an idle pipe
        assemble = _looked_up if fmt.bits == 4 and not half else _assemble
        return assemble(lines, widths, unit=unit, scalable=scalable)
    if isinstance(decoder, Table) and fmt.bits == 4:
        return _looked_up(_table(decoder, A_dtype), widths)
    return None


def _takes_scales(raw: torch.Tensor, half: bool) -> bool:
    """Whether raw values times e4m3 scales are exact in float16 (half) or bfloat16."""
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    products = raw[:, None] * scales[scales.isfinite()]
    return torch.equal(products.to(torch.float16 if half else torch.bfloat16).double(), products)


def _assemble(lines: list[str], widths: tuple[int, ...], **fields: Any) -> PairDecoder:
    registers, words = 2 * 16 // widths[0], 2 * len(widths)
    return PairDecoder(
        _block(lines),
        _constraints(registers, words),
        registers,
        **{"instructions": _instructions(lines), **fields},
    )


def _block(lines: list[str]) -> str:
    """The instructions with the temporaries that they use."""
    return "{ .reg .b32 t, u, v, c0, c1; .reg .f32 f0, f1, f2; " + " ".join(lines) + " }"


def _constraints(outputs: int, inputs: int) -> str:
    # outputs are written before the last input is read
    return ",".join(["=&r"] * outputs + ["r"] * inputs)


def _instructions(lines: list[str]) -> float:
    """Of the pipe that logic shares: to shift to the left the compiler multiplies, by another.
    A table's address, which is equal in all lanes, is added by the load itself."""
    each = [line for line in " ".join(lines).split(";") if line.strip() and "table" not in line]
    cheaper = {".reg": 0.0, "mov.b32": 0.0, "shl.b32": 0.5}
    return sum(cheaper.get(line.split()[0], 1.0) for line in each)


# --- tables in shared memory ----------------------------------------------------------------------

# A byte of two codes leads to a register of their two values. An entry lies 32 times in half of its
# row, once in each bank, so that no two lanes meet in one; the other half is not used: with rows of
# 256 bytes the address is made by one byte permute, [lane * 4, code byte, 0, 0].
ROW_BYTES = 256
_TABLE = (  # the end of all shared memory
    ".reg .b32 table, size; mov.b32 table, global_smem; mov.b32 size, %dynamic_smem_size;"
    "add.u32 table, table, size;"
)


def _looked_up(lines: list[str], widths: tuple[int, ...], **fields: Any) -> PairDecoder:
    """The decoder of 4-bit codes that reads a table of what `lines`, a slower one, makes of them.

    Its further inputs: lane * 4. The table is the last in the block's shared memory.
    """
    entry = _assemble(lines, widths).asm
    return _assemble(_lookup(), (*widths, *widths), entry=entry, **fields)


def _lookup() -> list[str]:
    found = [_TABLE, ".reg .b32 e0, e1, e2, e3;"]
    for word in range(2):
        source, outs = f"${8 + word}", [f"${4 * word + slot}" for slot in range(4)]
        for byte in range(4):
            found.append(f"prmt.b32 t, {source}, $10, 0x77{byte}4; add.u32 t, t, table;")
            found.append(f"ld.shared.b32 e{byte}, [t + {-256 * ROW_BYTES}];")
        # bytes 0 and 1 hold the codes of one k, 2 and 3 those of the next, for both row halves each
        for slot, out in enumerate(outs):
            selector = "0x7632" if slot % 2 else "0x5410"
            found.append(f"prmt.b32 {out}, e{slot // 2}, e{slot // 2 + 2}, {selector};")
    return found


def _fill(entry: str, threads: int) -> str:
    """PTX: each of 128, 256 or 512 threads decodes a byte or two, by `entry`, and writes copies of
    the result. Each lane begins with another copy, so that those of a warp do not meet in a bank.
    """
    outputs = ", ".join(f"o{i}" for i in range(8))
    entry = re.sub(r"\$([0-7])\b", r"o\1", entry).replace("$8", "word").replace("$9", "word")
    lines = [f"{_TABLE} .reg .b32 thread, row, word, copy, place, {outputs};"]
    for first in range(0, 256, threads):
        lines += [
            f"mov.b32 thread, %tid.x; add.u32 row, thread, {first}; and.b32 row, row, 255;",
            "and.b32 word, row, 15;",
            "shr.u32 copy, row, 4; shl.b32 copy, copy, 16; or.b32 word, word, copy;",
            f"{entry} shl.b32 row, row, 8; add.u32 row, row, table;",
            # of 512 threads, the second half writes the second half of the copies
            "shr.u32 copy, thread, 8; shl.b32 copy, copy, 2; add.u32 copy, copy, thread;",
        ]
        for _ in range(256 * 8 // max(threads, 256)):
            lines.append("and.b32 place, copy, 7; shl.b32 place, place, 4;")
            lines.append("add.u32 place, place, row;")
            lines.append(f"st.shared.v4.b32 [place + {-256 * ROW_BYTES}], {{o0, o0, o0, o0}};")
            lines.append("add.u32 copy, copy, 1;")
    return "{ " + " ".join(lines) + " mov.b32 $0, 0; }"


def _twice(half_word: int) -> str:
    """A 16-bit pattern in both halves of a register."""
    return f"0x{half_word * 0x10001:08x}"


def _shifted(target: str, source: str, left: int) -> str:
    """target = source << left (right for a negative `left`)."""
    if left == 0:
        return f"mov.b32 {target}, {source};"
    return f"{'shl.b32' if left > 0 else 'shr.u32'} {target}, {source}, {abs(left)};"


def _slots(width: int) -> list[tuple[str, str, int]]:
    """(output, input word, slot) of every register of a pair of words, in order."""
    slots = 16 // width
    return [
        (f"${word * slots + slot}", f"${2 * slots + word}", slot)
        for word in range(2)
        for slot in range(slots)
    ]


def _affine(decoder: Affine, bits: int, half: bool) -> tuple[list[str], tuple[int, int], int]:
    """(instructions, bits that codes of the two row halves are raised by, value of code 0)."""
    magic, base = (0, 0) if half else (0x4300, 128)
    lifts = _lifts(bits, 10 if half else 7)
    return _codes(decoder, bits, magic, lifts), lifts, base


def _lifts(bits: int, room: int) -> tuple[int, int]:
    """By how many bits codes of the two row halves are raised, in so many bits.

    Both decode from one shifted word where their codes fit. They lie as high there as a word that
    is not shifted at all lets them: shifts to the left are multiplies, by a pipe that has nothing
    else to do, those to the right share one with the logic.
    """
    width = planes(bits)[0][0]
    row_shift = width if 2 * bits <= room else 0
    lowest = (room - row_shift - bits) // (2 * width) * (2 * width) if row_shift else 0
    return lowest, lowest + row_shift


def _codes(decoder: Affine, bits: int, magic: int, lifts: tuple[int, int]) -> list[str]:
    """Codes of the two row halves at these bits of each half register, `| magic`."""
    width = planes(bits)[0][0]
    lines, mask = [], (1 << width) - 1
    for index, (out, word, slot) in enumerate(_slots(width)):
        raised = lifts[slot % 2]
        if lifts[0] == lifts[1] or slot % 2 == 0:
            lines.append(_shifted("t", word, raised - width * slot))
        low = _twice(mask << raised)
        if bits == 3:
            # bit 2 of the code: bit `index` of the other plane's word, to just above bits 0 and 1
            if magic:
                lines.append(f"mov.b32 c0, {_twice(magic)}; lop3.b32 v, t, {low}, c0, 0xea;")
            else:
                lines.append(f"and.b32 v, t, {low};")
            lines.append(_shifted("u", "$18", 2 + raised - index))
            lines.append(f"lop3.b32 {out}, u, {_twice(4 << raised)}, v, 0xea;")
        elif decoder.flip or magic:
            lines.append(f"mov.b32 c0, {_twice((decoder.flip << raised) ^ magic)};")
            lines.append(f"lop3.b32 {out}, t, {low}, c0, 0x6a;")  # (t & low) ^ c0
        else:
            lines.append(f"and.b32 {out}, t, {low};")
    return lines


def _signs(half: bool) -> list[str]:
    """-1 and 1 differ in the sign alone: no offset, so no sums of A."""
    lines = [f"mov.b32 c0, {_twice(0xBC00 if half else 0xBF80)};"]
    for out, word, slot in _slots(1):
        lines.append(_shifted("t", word, 15 - slot))
        lines.append(f"lop3.b32 {out}, t, 0x80008000, c0, 0x6a;")  # (t & 0x80008000) ^ c0
    return lines


def _bytes_to_bfloat16(decoder: Affine) -> list[str]:
    """8-bit codes have a bit more than 128 + code can hold: through float32, to exact values."""
    lines = [
        "mov.b32 c0, 0x4b000000;",
        f"mov.b32 f2, 0x{_float_bits(8388608.0 - decoder.offset):08x};",
    ]
    for out, word, slot in _slots(8):
        lines.append(f"xor.b32 t, {word}, 0x{decoder.flip * 0x01010101:08x};")
        for h in range(2):
            lines.append(f"prmt.b32 u, t, c0, 0x744{slot + 2 * h};")
            lines.append(f"mov.b32 f{h}, u; sub.rn.f32 f{h}, f{h}, f2;")
        lines.append(f"cvt.rn.bf16x2.f32 {out}, f1, f0;")
    return lines


def _float_bits(value: float) -> int:
    return int(torch.tensor(value, dtype=torch.float32).view(torch.int32))


def _minifloat(decoder: MiniFloat, bits: int, half: bool) -> list[str]:
    """Sign to the top, exponent and mantissa to just below the operand's mantissa point."""
    E, M = decoder.exponent_bits, decoder.mantissa_bits
    mantissa, lines = (10 if half else 7), []
    place = mantissa - M  # of the lowest magnitude bit
    field = ((1 << (bits - 1)) - 1) << place
    if not half:
        lines.append(f"mov.b32 c0, {_twice((127 + 127 - decoder.bias) << 7)};")  # 2^(127 - bias)
        lines.append("mov.b32 c1, 0x80008000;")
    for out, word, slot in _slots(bits):
        first = bits * slot
        lines.append(_shifted("t", word, 16 - bits - first))  # sign at bit 15
        lines.append(_shifted("u", word, place - first))
        lines.append(f"and.b32 u, u, {_twice(field)};")
        if half:
            if decoder.special == "nan":  # all ones: the carry out of the field fills the exponent
                lines.append(f"add.u32 v, u, {_twice(1 << place)};")
                lines.append(f"lop3.b32 u, v, {_twice(1 << (place + E + M))}, u, 0xea;")
            lines.append(f"lop3.b32 {out}, t, 0x80008000, u, 0xea;")
            continue
        if decoder.special != "finite":
            # infinities and NaNs: the carry out of the field (or its exponent) becomes 0x7f80
            step, top = (place if decoder.special == "nan" else 7), place + E + M
            lines.append(f"add.u32 v, u, {_twice(1 << step)}; and.b32 v, v, {_twice(1 << top)};")
            lines.append("fma.rn.bf16x2 u, u, c0, c1;")
            lines.append(f"shl.b32 c1, v, {15 - top}; shr.u32 v, v, {top - 7};")
            lines.append("sub.u32 v, c1, v; or.b32 u, u, v; mov.b32 c1, 0x80008000;")
        else:
            lines.append("fma.rn.bf16x2 u, u, c0, c1;")
        lines.append(f"lop3.b32 {out}, t, 0x80008000, u, 0xea;")
    return lines


def _table(decoder: Table, A_dtype: str) -> list[str]:
    """16 entries of two bytes: a byte permute looks 4 codes up among 8 bytes, a third one chooses
    between the halves of the table, and more of them put the bytes together."""
    dtype = torch.float16 if A_dtype == "float16" else torch.bfloat16
    patterns = torch.tensor(decoder.entries, dtype=torch.float64).to(dtype).view(torch.int16)
    entries = [int(x) & 0xFFFF for x in patterns]

    def table(byte: int, quarter: int) -> str:
        part = entries[4 * quarter : 4 * quarter + 4]
        return f"0x{sum(((x >> 8 * byte) & 255) << 8 * i for i, x in enumerate(part)):08x}"

    names = [f"{kind}{i}" for kind in ("s", "m", "lo", "hi") for i in range(2)]
    lines = [f".reg .b32 {', '.join(names)}, a, b, k0, k1, k2, k3;"]
    for word in range(2):
        source, outs = f"${8 + word}", [f"${4 * word + slot}" for slot in range(4)]
        lines += [
            f"and.b32 s0, {source}, 0x77777777; shr.u32 t, {source}, 1;",
            "mov.b32 c0, 0x32103210; lop3.b32 m0, t, 0x44444444, c0, 0xea;",
            "shr.u32 s1, s0, 16; shr.u32 m1, m0, 16;",
        ]
        for byte, kind in enumerate(("lo", "hi")):
            for quarter in range(4):
                lines.append(f"mov.b32 k{quarter}, {table(byte, quarter)};")
            for h in range(2):
                lines.append(f"prmt.b32 a, k0, k1, s{h}; prmt.b32 b, k2, k3, s{h};")
                lines.append(f"prmt.b32 {kind}{h}, a, b, m{h};")
        for pair, selector in ((0, "0x5140"), (1, "0x7362")):
            lines.append(f"prmt.b32 t, lo0, hi0, {selector}; prmt.b32 u, lo1, hi1, {selector};")
            lines.append(f"prmt.b32 {outs[2 * pair]}, t, u, 0x5410;")
            lines.append(f"prmt.b32 {outs[2 * pair + 1]}, t, u, 0x7632;")
    return lines


# --- operands without the scale -----------------------------------------------------------------


@dataclass(frozen=True)
class RawDecoder(Decoder):
    """To (code's value - zero point) / unit, which has a value for each half of 16 rows. If zero
    points are taken off, asm reads two registers for each half, one for each word, each holding
    -zero point / unit twice."""

    unit: tuple[float, float] = (1.0, 1.0)


@lru_cache(maxsize=256)
def raw_operand_decoder(fmt: WeightFormat, A_dtype: str, zeros: bool) -> RawDecoder | None:
    """The decoder of a format to a float16 or bfloat16 operand that lacks the scale; None where
    there is none. zeros: whether it takes zero points off.

    Codes stay where they are, as subnormals (a bit pattern below 2^8 is a multiple of 2^-133 in
    bfloat16), to be raised by a multiply-add that takes off the offset or zero point as well.
    """
    pair, decoder, half = pair_decoder(fmt, A_dtype), fmt.decoder, A_dtype == "float16"
    if pair is None:
        return None
    if pair.shift == (0.0, 0.0) and not zeros:
        fields = (pair.asm, pair.constraints, pair.registers, pair.instructions, pair.entry)
        return RawDecoder(*fields, pair.unit)
    if not isinstance(decoder, Affine):
        return None
    width, words = planes(fmt.bits)[0][0], 2 * len(planes(fmt.bits))
    registers = 2 * 16 // width
    lifts = _lifts(fmt.bits, 10 if half else 8)
    lines = _codes(decoder, fmt.bits, 0, lifts)
    unit = decoder.step * 2.0 ** ((9 if half else 6) - lifts[0])
    raised = [2.0 ** ((15 if half else 127) + lifts[0] - lift) for lift in lifts]
    fma, add = ("fma.rn.f16x2", "add.f16x2") if half else ("fma.rn.bf16x2", "add.rn.bf16x2")
    lines.append(f".reg .b32 m0, m1; mov.b32 c0, {_pattern(decoder.offset / unit, A_dtype)};")
    lines += [f"mov.b32 m{r3}, {_pattern(raised[r3], A_dtype)};" for r3 in range(2)]
    for out, word, slot in _slots(width):
        r3 = slot % 2
        minus = f"${registers + words + 2 * r3 + int(word[1:]) - registers}"
        if zeros and not decoder.offset:
            lines.append(f"{fma} {out}, {out}, m{r3}, {minus};")
            continue
        lines.append(f"{fma} {out}, {out}, m{r3}, c0;")
        if zeros:
            lines.append(f"{add} {out}, {out}, {minus};")
    return RawDecoder(
        _block(lines),
        _constraints(registers, words + 4 * zeros),
        registers,
        _instructions(lines),
        unit=(unit, unit),
    )


# --- operands that are the weight itself --------------------------------------------------------


@dataclass(frozen=True)
class OperandDecoder(Decoder):
    """To (code's value - integer zero point) * scale + addend, times 1 / unit. asm reads two
    registers (one for each word, each holding a value twice) of every extra for each half of 16
    rows, in this order:

        minus:  minus(base + integer zero point), if `based`
        scale:  if `scaled`
        addend: if `added`

    most: the largest integer zero point, up or down, that stays exact.
    """

    base: tuple[float, float] = (0.0, 0.0)
    most: float = 0.0
    unit: float = 1.0


@lru_cache(maxsize=256)
def operand_decoder(
    fmt: WeightFormat, A_dtype: str, based: bool, scaled: bool, added: bool, lookup: bool = False
) -> OperandDecoder | None:
    """The decoder of a format to a float16 or bfloat16 operand that needs no correction but `unit`;
    None where there is none. The extras are explained in OperandDecoder. lookup: whether tables are
    looked up in shared memory, with fewer instructions, or permuted in registers."""
    if pair_decoder(fmt, A_dtype) is None:
        return None
    half, decoder = A_dtype == "float16", fmt.decoder
    width = planes(fmt.bits)[0][0]
    registers, words = 32 // width, 2 * len(planes(fmt.bits))
    base, lowered, most, unit, entry = (0.0, 0.0), (1.0, 1.0), 0.0, 1.0, ""
    if isinstance(decoder, Affine) and (half or fmt.bits != 8):
        place = decoder.step.bit_length() - 1  # a step of 2: codes count from bit 1 on
        # both row halves decode from one shifted word where their codes fit the mantissa
        row_shift = width if place + 2 * fmt.bits <= (10 if half else 7) else 0
        lifts = (place, place + row_shift)
        lines = _codes(decoder, fmt.bits, 0x6400 if half else 0x4300, lifts)
        lowered, one = (1.0, 2.0**-row_shift), 1024 if half else 128
        base = (one * lowered[0] - decoder.offset, one * lowered[1] - decoder.offset)
        most = one / 2
    elif isinstance(decoder, Affine):
        lines, most = _bytes_to_bfloat16(decoder), 255.0
    elif isinstance(decoder, MiniFloat):
        lines = _minifloat(decoder, fmt.bits, half)
        unit = 2.0 ** (15 - decoder.bias) if half else 1.0
    else:
        lines = _table(decoder, A_dtype)
        if lookup:
            entry, lines, words = _assemble(lines, (4,)).asm, _lookup(), words + 2

    kind = "f16x2" if half else "rn.bf16x2"
    fma = "fma.rn.f16x2" if half else "fma.rn.bf16x2"
    first, extras = registers + words, {}
    for name, given in (("minus", based), ("scale", scaled), ("addend", added)):
        if given:
            extras[name] = first
            first += 4
    lines.append(
        f"mov.b32 l0, {_pattern(unit, A_dtype)}; mov.b32 l1, {_pattern(lowered[1], A_dtype)};"
    )
    lines += [f"mov.b32 n{r3}, {_pattern(-base[r3], A_dtype)};" for r3 in range(2)]
    for out, word, slot in _slots(width):
        r3 = slot % 2
        place_in = {
            name: f"${index + 2 * r3 + int(word[1:]) - registers}" for name, index in extras.items()
        }
        minus = place_in.get("minus", f"n{r3}" if base[r3] else None)
        if lowered[r3] != 1:
            lines.append(f"{fma} {out}, {out}, l1, {minus};")
        elif minus is not None:
            lines.append(f"add.{kind} {out}, {out}, {minus};")
        if scaled and unit != 1:
            lines.append(f"mul.{kind} {out}, {out}, l0;")
        if scaled and added:
            lines.append(f"{fma} {out}, {out}, {place_in['scale']}, {place_in['addend']};")
        elif scaled:
            lines.append(f"mul.{kind} {out}, {out}, {place_in['scale']};")
        elif added:
            lines.append(f"add.{kind} {out}, {out}, {place_in['addend']};")
    return OperandDecoder(
        _block([".reg .b32 l0, l1, n0, n1;", *lines]),
        _constraints(registers, first - registers),
        registers,
        _instructions(lines),
        entry,
        base,
        most,
        1.0 if scaled else unit,
    )


def _pattern(value: float, A_dtype: str) -> str:
    """A value of the operand dtype in both halves of a register."""
    dtype = torch.float16 if A_dtype == "float16" else torch.bfloat16
    return _twice(int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF)
