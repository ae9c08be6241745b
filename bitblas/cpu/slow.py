"""The same operators in plain torch, for what the kernels do not take: groups that end inside a
word of packed weights (say, of 5 values). Weights are decoded a panel of rows at a time and handed
to torch's product; right for everything, at the speed of an eager decode.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..config import INTEGER_ACTIVATIONS, MatmulConfig
from ..layouts import ROW16, unpack_rows

PANEL_ROWS = 1024


def unpack_int4(A: torch.Tensor) -> torch.Tensor:
    """int4 activations (m, K/2), low nibble first -> int8 (m, K)."""
    return torch.stack(((A << 4) >> 4, A >> 4), dim=-1).flatten(-2)


def _panels(
    config: MatmulConfig,
    W: torch.Tensor,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(rows, the decoded weight of those rows)."""
    encoding = config.format.scale_encoding
    if scale is not None and encoding is not None:
        scale = scale.view(config.scale_dtypes[0])
    if zeros is not None and config.zeros_mode == "quantized":
        zeros = unpack_rows(zeros, config.bits, config.N).T

    def each(x: torch.Tensor, rows: slice) -> torch.Tensor:
        return x[rows].to(dtype).repeat_interleave(config.group_length, dim=1)

    for first in range(0, config.N, PANEL_ROWS):
        rows = slice(first, min(first + PANEL_ROWS, config.N))
        packed = W[first // 16 : -(-rows.stop // 16)]
        codes = ROW16.unpack(packed, config.bits, rows.stop - first, config.K)
        weight = config.format.to_values(codes, dtype)
        if zeros is not None and config.zeros_mode != "rescale":
            weight -= each(zeros, rows)
        if scale is not None:
            weight *= each(scale, rows)
        if zeros is not None and config.zeros_mode == "rescale":
            weight -= each(zeros, rows)
        if global_scale is not None:
            weight *= global_scale.to(dtype)
        yield rows, weight


def matmul_slow(
    config: MatmulConfig,
    A: torch.Tensor,
    W: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    input_scale: torch.Tensor | None,
    global_scale: torch.Tensor | None,
) -> None:
    # float64 holds every int32 sum exactly
    dtype = torch.float64 if config.A_dtype in INTEGER_ACTIVATIONS else torch.float32
    A = A.to(dtype)
    for rows, weight in _panels(config, W, scale, zeros, global_scale, dtype):
        product = A @ weight.T
        if input_scale is not None:
            product *= input_scale[:, None]
        if bias is not None:
            product += bias[rows]
        if not out.dtype.is_floating_point:
            limits = torch.iinfo(out.dtype)
            product = product.to(torch.float64).round().clamp(limits.min, limits.max)
        out[:, rows] = product.to(out.dtype)


def dequantize_slow(
    config: MatmulConfig,
    W: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None,
    zeros: torch.Tensor | None,
    global_scale: torch.Tensor | None,
) -> None:
    for rows, weight in _panels(config, W, scale, zeros, global_scale, torch.float32):
        out[rows] = weight.to(out.dtype)
