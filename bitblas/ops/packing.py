"""The packing steps of BitBLAS 0.1 as operators of their own, for code that calls them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..base import TransformKind
from ..config import TORCH_DTYPES
from ..layouts import pack_rows
from ..matmul import Operator
from ..operands import check_tensor
from ..quantization import interleave_weight


@dataclass(frozen=True)
class OperatorConfig:
    """Base of the configs of these operators."""


def _check_rows(x: Any, shape: tuple[int, int]) -> None:
    check_tensor("weight", x)
    if tuple(x.shape) != shape:
        raise ValueError(f"weight: got shape {tuple(x.shape)}, expected {shape}")


@dataclass(frozen=True)
class QuantCompressConfig(OperatorConfig):
    """Codes (M, N) int8 -> packed rows (M, N*bits/8) int8, lowest bits first."""

    M: int
    N: int
    input_dtype: str = "int8"
    storage_dtype: str = "int8"
    dequantize_bits: int = 4

    def __post_init__(self) -> None:
        if self.storage_dtype not in ("int8", "uint8"):
            raise ValueError(f"storage_dtype: got {self.storage_dtype!r}, expected int8 or uint8")
        if self.dequantize_bits not in range(1, 9):
            raise ValueError(f"dequantize_bits: got {self.dequantize_bits}, expected 1 to 8")


class QuantCompress(Operator):
    """QuantCompressConfig's operator."""

    config: QuantCompressConfig

    def __init__(
        self,
        config: QuantCompressConfig,
        name: str = "quant_compress",
        target: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config, name, target)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: (M, N), codes of which the low bits count."""
        config = self.config
        _check_rows(weight, (config.M, config.N))
        if weight.is_floating_point() or weight.is_complex():
            raise TypeError(f"weight: got {weight.dtype}, expected codes in an integer dtype")
        codes = (weight.to(torch.int16) & ((1 << config.dequantize_bits) - 1)).to(torch.uint8)
        return pack_rows(codes, config.dequantize_bits).view(getattr(torch, config.storage_dtype))


@dataclass(frozen=True)
class LOP3PermutateConfig(OperatorConfig):
    """Packed rows (M, N*bits/8) -> the same with the slots of fast decoding; N counts codes."""

    M: int
    N: int
    datatype: str = "float16"
    storage_dtype: str = "int8"
    dequantize_bits: int = 4

    def __post_init__(self) -> None:
        if self.datatype not in ("float16", "int8"):
            raise ValueError(f"datatype: got {self.datatype!r}, expected float16 or int8")
        if self.dequantize_bits not in (1, 2, 4):
            raise ValueError(f"dequantize_bits: got {self.dequantize_bits}, expected 1, 2 or 4")


class LOP3Permutate(Operator):
    """LOP3PermutateConfig's operator."""

    config: LOP3PermutateConfig

    def __init__(
        self,
        config: LOP3PermutateConfig,
        name: str = "lop3_permutate",
        target: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config, name, target)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: (M, N*bits/8), one byte an element (or as wider words of the same bytes)."""
        config = self.config
        check_tensor("weight", weight)
        _check_rows(
            weight, (config.M, config.N * config.dequantize_bits // (8 * weight.dtype.itemsize))
        )
        return interleave_weight(weight, config.dequantize_bits, config.datatype)


@dataclass(frozen=True)
class LadderPermutateConfig(OperatorConfig):
    """A matrix (M, N) -> 16x16 tiles (16x32 for 8-bit types), for transform_kind 1.

    transform_kind 0 is the identity. The intra-warp kinds (2, 3) fed kernels that this library does
    not have: asking for one is a ValueError.
    """

    M: int
    N: int
    datatype: str = "float16"
    dequantize_bits: int = -1
    storage_dtype: str = "float16"
    propagate_kind: str = "B"
    transpose_matrix: bool = False
    transform_kind: int = 0
    target_instruction: str = "nvidia-mma"

    def __post_init__(self) -> None:
        if self.datatype not in TORCH_DTYPES:
            raise ValueError(
                f"datatype: got {self.datatype!r}, expected one of {', '.join(TORCH_DTYPES)}"
            )
        if self.transform_kind not in (0, 1):
            raise ValueError(
                f"transform_kind: got {self.transform_kind}, expected 0 or 1; this library's "
                "kernels take "
                f"weights from Matmul.transform_weight"
            )
        if self.M % 16 or self.N % self.tile_columns:
            raise ValueError(
                f"M, N: got {self.M}, {self.N}, expected multiples of 16 and {self.tile_columns}"
            )

    @property
    def tile_columns(self) -> int:
        return 16 if self.datatype in ("float16", "bfloat16") else 32


class LadderPermutate(Operator):
    """LadderPermutateConfig's operator."""

    config: LadderPermutateConfig

    def __init__(
        self,
        config: LadderPermutateConfig,
        name: str = "ladder_permutate",
        target: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config, name, target)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (M, N), or (N, M) where transpose_matrix -> (M/16, N/T, 16, T); kind 0: x itself."""
        config = self.config
        check_tensor("weight", x)
        if config.transpose_matrix:
            x = x.T
        _check_rows(x, (config.M, config.N))
        if config.transform_kind == TransformKind.NonTransform:
            return x
        columns = config.tile_columns
        tiles = x.reshape(config.M // 16, 16, config.N // columns, columns)
        return tiles.transpose(1, 2).contiguous()
