"""Quantisation helpers: rounding to nearest, packing, the interleaved order of BitBLAS 0.1."""

from .rounding import QuantizedWeight, quantize_weight
from .utils import gen_quant4, general_compress, interleave_weight

__all__ = [
    "QuantizedWeight",
    "gen_quant4",
    "general_compress",
    "interleave_weight",
    "quantize_weight",
]
