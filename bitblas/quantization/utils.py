"""Packing and rounding helpers under the names that callers of BitBLAS 0.1 use."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ..layouts import interleave, pack_rows, slot_order, unpack_rows
from .rounding import quantize_weight


def gen_quant4(
    k: int, n: int, groupsize: int = -1
) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A random weight and its symmetric 4-bit rounding.

    Returns (weight (k, n) float16; an nn.Linear(k, n) whose weight is the dequantised value
    transposed, float16; scales (G, n) float16; q (k, n) int32 in -8..7).
    """
    length = k if groupsize == -1 else groupsize
    if length < 1 or k % length:
        raise ValueError(f"groupsize: {groupsize} does not divide k={k}")
    weight = torch.randn((k, n), dtype=torch.float16)
    q, scale, _, _ = quantize_weight(weight.T.contiguous().float(), "int4", length)
    scale = scale.half()
    dequantized = q * scale.float().repeat_interleave(length, dim=1)
    linear = torch.nn.Linear(k, n, bias=False)
    linear.weight = torch.nn.Parameter(dequantized.half(), requires_grad=False)
    return weight, linear, scale.T.contiguous(), q.T.contiguous().to(torch.int32)


def general_compress(
    lowprecision_weight: Any, source_bits: int = 4, storage_dtype: Any = np.int8
) -> Any:
    """Pack codes of `source_bits` bits along the last axis, lowest bits first.

    A numpy array (..., L) -> (..., L * bits / (8 * itemsize)) of storage_dtype; a torch tensor
    gives an int8 tensor. ValueError where the packed row does not fill whole storage elements or
    for bits other than 1 to 8, TypeError for codes that are not integers.
    """
    if source_bits not in range(1, 9):
        raise ValueError(f"source_bits: got {source_bits!r}, expected 1 to 8")
    if isinstance(lowprecision_weight, torch.Tensor):
        return pack_rows(_codes(lowprecision_weight, source_bits), source_bits)
    codes = _codes(torch.from_numpy(np.ascontiguousarray(lowprecision_weight)), source_bits)
    storage = np.dtype(storage_dtype)
    if codes.shape[-1] * source_bits % (8 * storage.itemsize):
        raise ValueError(
            f"a row of {codes.shape[-1]} codes of {source_bits} bits does not fill whole "
            f"{storage} elements"
        )
    return pack_rows(codes, source_bits).numpy().view(storage)


def interleave_weight(qweight: Any, nbits: int = 4, target_dtype: str = "float16") -> Any:
    """The slot permutation of BitBLAS 0.1's fast decoding, on packed rows (numpy or torch).

    qweight: (..., bytes) as general_compress packs them; target_dtype: the activation's, "float16"
    or "int8". Returns the permuted rows in the same dtype and shape.
    """
    if target_dtype not in ("float16", "int8"):
        raise ValueError(f"target_dtype: got {target_dtype!r}, expected 'float16' or 'int8'")
    activation_bits = 8 if target_dtype == "int8" else 16
    slot_order(nbits, activation_bits)  # raises for widths that have no such layout
    if isinstance(qweight, torch.Tensor):
        data = qweight.contiguous().view(torch.int8)
        codes = unpack_rows(data, nbits, data.shape[-1] * 8 // nbits)
        return pack_rows(interleave(codes, nbits, activation_bits), nbits).view(qweight.dtype)
    array = np.ascontiguousarray(qweight)
    permuted = interleave_weight(torch.from_numpy(array.view(np.int8)), nbits, target_dtype)
    return permuted.numpy().view(array.dtype)


def _codes(x: torch.Tensor, bits: int) -> torch.Tensor:
    if x.is_floating_point() or x.is_complex():
        raise TypeError(f"lowprecision_weight: got {x.dtype}, expected codes in an integer dtype")
    return (x.to(torch.int64) & ((1 << bits) - 1)).to(torch.uint8)
