"""What a weight format is: how many bits, what each code means, which extras it takes.

A format says what its codes mean by naming one of three decoders (`Affine`, `MiniFloat`,
`Table`). Every backend implements these three once, so a new format is data, not kernel code.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch


@dataclass(frozen=True)
class Affine:
    """value = step * (code ^ flip) + offset, an integer for every code."""

    step: int
    offset: int
    flip: int = 0

    def values(self, bits: int) -> list[float]:
        return [float(self.step * (code ^ self.flip) + self.offset) for code in range(1 << bits)]


@dataclass(frozen=True)
class MiniFloat:
    """Sign, exponent and mantissa fields, most significant first, with subnormals.

    special: "finite" (every code is a number), "nan" (all ones is NaN, no infinity: e4m3fn) or
    "ieee" (the top exponent holds infinity and NaN).
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    special: str

    def values(self, bits: int) -> list[float]:
        return [self._value(code, bits) for code in range(1 << bits)]

    def _value(self, code: int, bits: int) -> float:
        magnitude = code & ((1 << (bits - 1)) - 1)
        sign = -1.0 if code >> (bits - 1) else 1.0
        exponent, mantissa = magnitude >> self.mantissa_bits, magnitude % (1 << self.mantissa_bits)
        top = (1 << self.exponent_bits) - 1
        if self.special == "nan" and magnitude == (1 << (bits - 1)) - 1:
            return math.nan
        if self.special == "ieee" and exponent == top:
            return math.nan if mantissa else sign * math.inf
        fraction = mantissa / (1 << self.mantissa_bits)
        if exponent == 0:
            return sign * math.ldexp(fraction, 1 - self.bias)
        return sign * math.ldexp(1 + fraction, exponent - self.bias)


@dataclass(frozen=True)
class Table:
    """An arbitrary value for each code."""

    entries: tuple[float, ...]

    def values(self, bits: int) -> list[float]:
        if len(self.entries) != 1 << bits:
            raise ValueError(
                f"a {bits}-bit table needs {1 << bits} entries, got {len(self.entries)}"
            )
        return list(self.entries)


Decoder = Affine | MiniFloat | Table


class WeightFormat:
    """A weight format: subclass, set the class attributes, register. Instances are stateless.

    name: the W_dtype string.           bits: width of a code.
    source_format: the family name that callers of the library read ("uint", "int", "nf", ...).
    decoder: the meaning of the codes.
    is_integer: the values are integers, so the format takes zeros and integer activations.
    scale_encoding: None where scales have the activation's dtype, else "e8m0" or "e4m3".
    fixed_group_size: the group size that belongs to the format, else None.
    has_global_scale: one float32 scale for the whole tensor goes with it.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    source_format: ClassVar[str]
    decoder: ClassVar[Decoder]
    is_integer: ClassVar[bool] = False
    is_dense: ClassVar[bool] = False
    scale_encoding: ClassVar[str | None] = None
    fixed_group_size: ClassVar[int | None] = None
    has_global_scale: ClassVar[bool] = False

    def code_values(self) -> Sequence[float]:
        """The value of every code, as exact Python floats."""
        return self.decoder.values(self.bits)

    def to_codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Logical weight values -> uint8 codes of the same shape; ValueError out of range."""
        raise NotImplementedError(f"{type(self).__name__} does not define to_codes")

    def check_codes(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes in any integer dtype -> uint8; ValueError beyond 2^bits - 1."""
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise TypeError(
                f"weight: {self.name} takes codes 0..{(1 << self.bits) - 1} in an integer dtype, "
                f"got {codes.dtype}"
            )
        if codes.dtype in (torch.int8, torch.uint8) and self.bits == 8:
            return codes.view(torch.uint8)
        check_range(codes, 0, (1 << self.bits) - 1, self.name, "codes")
        return codes.to(torch.uint8)

    def to_values(self, codes: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """uint8 codes -> values in `dtype`."""
        table = torch.tensor(self.code_values(), dtype=torch.float64, device=codes.device)
        return table.to(dtype)[codes.to(torch.int32)]


def comparable(weight: torch.Tensor) -> torch.Tensor:
    """The same values in a dtype that torch can compare and round: not uint16 and up, not fp8."""
    if weight.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return weight.to(torch.float64)
    if weight.is_floating_point() and weight.dtype.itemsize == 1:
        return weight.to(torch.float32)
    return weight


def check_range(weight: torch.Tensor, low: int, high: int, name: str, what: str) -> None:
    """Raise ValueError unless every element is an integer in low..high (meta tensors pass)."""
    if weight.device.type == "meta" or weight.numel() == 0:
        return
    weight = comparable(weight)
    if weight.is_floating_point() and not bool((weight == weight.round()).all()):
        raise ValueError(f"weight: {name} takes integer {what} {low}..{high}, got fractions or NaN")
    lowest, highest = weight.min().item(), weight.max().item()
    if lowest < low or highest > high:
        raise ValueError(
            f"weight: {name} takes {what} {low}..{high}, got values from {lowest} to {highest}"
        )
