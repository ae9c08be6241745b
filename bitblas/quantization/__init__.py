"""Quantisation helpers: rounding to nearest, packing, the interleaved order of BitBLAS 0.1."""

from .kv_cache import QuantizedKV, quantize_kv
from .rounding import QuantizedWeight, quantize_weight
from .utils import gen_quant4, general_compress, interleave_weight

__all__ = [
    "QuantizedKV",
    "QuantizedWeight",
    "gen_quant4",
    "general_compress",
    "interleave_weight",
    "quantize_kv",
    "quantize_weight",
]
