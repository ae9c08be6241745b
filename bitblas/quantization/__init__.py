"""Quantisation of weights and activations, packing, the interleaved order of BitBLAS 0.1."""

from .activation import quantize_activation
from .rounding import QuantizedWeight, quantize_weight
from .utils import gen_quant4, general_compress, interleave_weight

__all__ = [
    "QuantizedWeight",
    "gen_quant4",
    "general_compress",
    "interleave_weight",
    "quantize_activation",
    "quantize_weight",
]
