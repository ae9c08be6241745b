"""Weights that are stored as the value itself: the product is torch's own."""

from __future__ import annotations

from typing import ClassVar

import torch

from .base import WeightFormat


class _Dense(WeightFormat):
    is_dense = True
    torch_dtype: ClassVar[torch.dtype]

    def to_codes(self, weight: torch.Tensor) -> torch.Tensor:
        """The stored form of a dense weight is the value in the format's dtype."""
        if weight.is_complex():
            raise TypeError(f"weight: {self.name} takes real values, got {weight.dtype}")
        return weight.to(self.torch_dtype)

    def to_values(self, codes: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return codes.to(dtype)


class Float16(_Dense):
    name, bits, source_format, torch_dtype = "float16", 16, "fp", torch.float16


class BFloat16(_Dense):
    name, bits, source_format, torch_dtype = "bfloat16", 16, "bf", torch.bfloat16


class Float32(_Dense):
    name, bits, source_format, torch_dtype = "float32", 32, "fp", torch.float32


FORMATS = (Float16, BFloat16, Float32)
