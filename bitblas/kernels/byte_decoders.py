"""PTX that turns packed words into bytes of 8-bit matrix instructions; decoders.py has those for 16
bits.

A decoder takes the four words of a chunk of the fragment layout for 8-bit activations
(bitblas.layouts.FRAGMENT_8) and writes registers of four int8 or e4m3 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from ..formats import WeightFormat


@dataclass(frozen=True)
class ByteDecoder:
    """Weights as bytes: value = unit * byte + shift. asm: PTX from the four words of a chunk, the
    operands behind the registers, to registers of four bytes."""

    asm: str
    unit: float
    shift: int


@cache
def byte_decoder(fmt: WeightFormat) -> ByteDecoder | None:
    """The decoder of a format; None where it has none.

    (word & mask) ^ flip, of a shifted word, leaves (code << up & mask) ^ flip in each byte.
    """
    bits = fmt.bits
    if not fmt.is_integer or bits not in (1, 2, 4, 8):
        return None
    codes = torch.arange(1 << bits)
    for up, flip, unit, shift in (
        # at a byte's top, as signed formats want them, with 1 bit for -1 and 1; at its bottom
        (8 - bits, 0x80 if bits < 8 else 0, 2.0 ** (bits - 8), 0),
        (7, 0xC0, 2.0**-6, 0),
        (0, 0, 1.0, 0),
        (0, 0x80, 1.0, 128),
    ):
        found = ((codes << up & 0xFF) ^ flip).to(torch.uint8).view(torch.int8) * unit + shift
        if found.tolist() == list(fmt.code_values()):
            break
    else:
        return None
    mask, count, per = (((1 << bits) - 1) << up & 0xFF) * 0x01010101, 32 // bits, 8 // bits
    lines = ["{ .reg .b32 t;"]
    for r in range(count):
        word, left = f"${count + r // per}", up - r % per * bits
        if left:
            kind = "shl.b32" if left > 0 else "shr.u32"
            lines.append(f"{kind} t, {word}, {abs(left)};")
            word = "t"
        lines.append(f"lop3.b32 ${r}, {word}, {mask:#x}, {flip * 0x01010101:#x}, 0x6a;")
    return ByteDecoder(" ".join(lines) + " }", unit, shift)


@cache
def float_decoder(fmt: WeightFormat) -> ByteDecoder | None:
    """The decoder of a format to e4m3 bytes; None where it has none.

    Small e4m3 numbers are evenly spaced, by 2^-9: the byte c is c * 2^-9 up to 15. So codes of
    signed integers become a sign and a magnitude, and those of E2M1, moved to the same place, are
    2^-6 times their value.
    """
    bits = fmt.bits
    if bits not in (2, 4, 8):
        return None
    count, per = 32 // bits, 8 // bits
    if fmt.name == "e4m3_float8":
        moves = " ".join(f"mov.b32 ${r}, ${count + r};" for r in range(4))
        return ByteDecoder("{ " + moves + " }", 1.0, 0)
    half = 1 << (bits - 1)
    signed = bits < 8 and list(fmt.code_values()) == [c - half for c in range(1 << bits)]
    if not signed and fmt.name != "fp4_e2m1":
        return None

    def move(target: str, word: str, left: int) -> str:
        kind = "shl.b32" if left >= 0 else "shr.u32"
        return f"{kind} {target}, {word}, {abs(left)};"

    lines = ["{ .reg .b32 t, s, zero, middle;"]
    lines.append(f"mov.b32 zero, 0; mov.b32 middle, {half * 0x01010101:#x};")
    for r in range(count):
        word, at = f"${count + r // per}", r % per * bits
        lines.append(move("s", word, 8 - bits - at))  # sign bits to the top
        if signed:
            field = ((1 << bits) - 1) * 0x01010101
            lines += [
                move("t", word, -at),
                f"and.b32 t, t, {field:#x};",
                "vabsdiff4.u32.u32.u32 t, t, middle, zero;",
                f"lop3.b32 ${r}, t, s, 0x80808080, 0xf2;",  # t | ~s & 0x80808080
            ]
        else:
            lines += [
                move("t", word, 2 - at),
                "and.b32 t, t, 0x1c1c1c1c;",
                f"lop3.b32 ${r}, s, 0x80808080, t, 0xea;",
            ]
    return ByteDecoder(" ".join(lines) + " }", 2.0**9 if signed else 2.0**6, 0)
