"""Dynamic quantisation of activations, a scale for each token."""

from __future__ import annotations

from typing import Any

import torch

from ..config import QUANTIZED_ACTIVATIONS
from ..operands import check_no_tangent, check_tensor
from ..repeat import MOST_CALLS, kind_of, plain_eager
from ..torch_ops import Quantizer, prepare_quantizer

_calls: dict[Any, Quantizer | None] = {}  # kinds of x -> what repeats the call, past the dispatcher


def quantize_activation(x: torch.Tensor, dtype: str = "int8") -> tuple[torch.Tensor, torch.Tensor]:
    """(q, scale) with x about q * scale[..., None]: the A and input_scale of a product with W.

    x: (..., K) float16, bfloat16 or float32. dtype: "int8" or "e4m3_float8". q: of x's shape, in
    `dtype`. scale: (...) float32, the greatest magnitude of the row over 127 (e4m3_float8: 448);
    a row of zeros has a tiny one. Values are rounded half to even; float32 arithmetic, the same
    bits on every device. A row with a NaN or an infinity has the scale NaN, and so NaN products.

    No gradient is passed on; Linear with quantize_activation=True has one.

    Raises ValueError or TypeError for another dtype of x or q, and for rows without values.
    """
    if not isinstance(dtype, str):
        raise TypeError(f"dtype: got {dtype!r}, expected {' or '.join(QUANTIZED_ACTIVATIONS)}")
    kind = None
    if plain_eager():
        kind = (dtype, kind_of((x,)))
        if (call := _calls.get(kind)) is not None and (result := call(x)) is not None:
            return result
    check_tensor("x", x)
    check_no_tangent("x", x)
    q, scale = torch.ops.bitblas.quantize_activation(x.detach(), dtype)
    if kind is not None and kind not in _calls:
        if len(_calls) >= MOST_CALLS:
            _calls.clear()
        _calls[kind] = prepare_quantizer(x, dtype)
    return q, scale
