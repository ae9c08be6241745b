"""The activation quantiser of the CPU: torch's own operators."""

from __future__ import annotations

import torch

from ..config import LEAST_MAGNITUDE, QUANTIZED_ACTIVATIONS


def quantize_activation(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, dtype: str) -> None:
    """q (m, K) of `dtype` and scale (m,) of x (m, K); torch_ops says what they are."""
    wide = x.float()
    low, high = wide.aminmax(dim=1)
    greatest = torch.maximum(-low, high)  # both are NaN where there is one
    finite = greatest.isfinite()
    divisor = torch.tensor(QUANTIZED_ACTIVATIONS[dtype])
    torch.div(greatest.clamp(min=LEAST_MAGNITUDE), divisor, out=scale)
    values = wide * scale.reciprocal().unsqueeze(1)
    values[~finite] = 0
    q.copy_(values.round() if dtype == "int8" else values)
    scale[~finite] = torch.nan
