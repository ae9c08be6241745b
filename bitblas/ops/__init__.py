"""Operators: the product, and the packing steps of BitBLAS 0.1 as operators."""

from ..config import MatmulConfig
from ..matmul import Matmul, Operator
from .packing import (
    LadderPermutate,
    LadderPermutateConfig,
    LOP3Permutate,
    LOP3PermutateConfig,
    OperatorConfig,
    QuantCompress,
    QuantCompressConfig,
)

__all__ = [
    "LOP3Permutate",
    "LOP3PermutateConfig",
    "LadderPermutate",
    "LadderPermutateConfig",
    "Matmul",
    "MatmulConfig",
    "Operator",
    "OperatorConfig",
    "QuantCompress",
    "QuantCompressConfig",
]
