"""Integer formats: unsigned, and signed ones in offset binary (int8: two's complement)."""

from __future__ import annotations

import torch

from .base import Affine, WeightFormat, check_range, comparable


class _Integer(WeightFormat):
    is_integer = True

    def to_codes(self, weight: torch.Tensor) -> torch.Tensor:
        """Integer values in any dtype -> codes."""
        if weight.is_complex() or weight.dtype == torch.bool:
            raise TypeError(f"weight: {self.name} takes integer values, got {weight.dtype}")
        values = self.code_values()
        check_range(weight, int(min(values)), int(max(values)), self.name, "values")
        affine = self.decoder
        assert isinstance(affine, Affine)
        return ((weight.to(torch.int16) - affine.offset) // affine.step ^ affine.flip).to(
            torch.uint8
        )


class _Unsigned(_Integer):
    source_format = "uint"
    decoder = Affine(step=1, offset=0)


class _Signed(_Integer):
    source_format = "int"


class UInt1(_Unsigned):
    name, bits = "uint1", 1


class UInt2(_Unsigned):
    name, bits = "uint2", 2


class UInt3(_Unsigned):
    name, bits = "uint3", 3


class UInt4(_Unsigned):
    name, bits = "uint4", 4


class UInt8(_Unsigned):
    name, bits = "uint8", 8


class Int1(_Signed):
    """Codes 0 and 1 mean -1 and +1; there is no zero."""

    name, bits = "int1", 1
    decoder = Affine(step=2, offset=-1)

    def to_codes(self, weight: torch.Tensor) -> torch.Tensor:
        if weight.device.type != "meta" and bool((comparable(weight) == 0).any()):
            raise ValueError("weight: int1 takes values -1 and +1, got 0")
        return super().to_codes(weight)


class Int2(_Signed):
    name, bits = "int2", 2
    decoder = Affine(step=1, offset=-2)


class Int3(_Signed):
    name, bits = "int3", 3
    decoder = Affine(step=1, offset=-4)


class Int4(_Signed):
    name, bits = "int4", 4
    decoder = Affine(step=1, offset=-8)


class Int8(_Signed):
    name, bits = "int8", 8
    decoder = Affine(step=1, offset=-128, flip=0x80)


FORMATS = (UInt1, UInt2, UInt3, UInt4, UInt8, Int1, Int2, Int3, Int4, Int8)
