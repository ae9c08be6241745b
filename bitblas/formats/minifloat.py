"""Small floating-point formats, alone and with the shared scales of the OCP and NVIDIA recipes."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import MiniFloat, WeightFormat


class FP4E2M1(WeightFormat):
    """OCP E2M1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives; given as codes 0..15."""

    name, bits, source_format = "fp4_e2m1", 4, "fp"
    decoder = MiniFloat(exponent_bits=2, mantissa_bits=1, bias=1, special="finite")

    def to_codes(self, weight: torch.Tensor) -> torch.Tensor:
        return self.check_codes(weight)


class MXFP4(FP4E2M1):
    """E2M1 with one E8M0 scale (a power of two) for every 32 weights (OCP Microscaling 1.0)."""

    name = "mxfp4"
    scale_encoding = "e8m0"
    fixed_group_size = 32


class NVFP4(FP4E2M1):
    """E2M1 with one E4M3 scale for every 16 weights and one float32 scale for the tensor."""

    name = "nvfp4"
    scale_encoding = "e4m3"
    fixed_group_size = 16
    has_global_scale = True


class _FP8(WeightFormat):
    bits = 8
    torch_dtype: ClassVar[torch.dtype]

    def to_codes(self, weight: torch.Tensor) -> torch.Tensor:
        """A tensor of the fp8 dtype, or its bytes as int8 or uint8."""
        if weight.dtype not in (self.torch_dtype, torch.int8, torch.uint8):
            raise TypeError(
                f"weight: {self.name} takes a {self.torch_dtype} tensor or its bytes "
                f"(int8, uint8), got {weight.dtype}"
            )
        return weight.view(torch.uint8)


class FP8E4M3(_FP8):
    """torch.float8_e4m3fn: no infinity, NaN at 0x7f and 0xff."""

    name, source_format = "e4m3_float8", "fp_e4m3"
    decoder = MiniFloat(exponent_bits=4, mantissa_bits=3, bias=7, special="nan")
    torch_dtype = torch.float8_e4m3fn


class FP8E5M2(_FP8):
    """torch.float8_e5m2: IEEE-like, with infinities."""

    name, source_format = "e5m2_float8", "fp_e5m2"
    decoder = MiniFloat(exponent_bits=5, mantissa_bits=2, bias=15, special="ieee")
    torch_dtype = torch.float8_e5m2


FORMATS = (FP4E2M1, MXFP4, NVFP4, FP8E4M3, FP8E5M2)
