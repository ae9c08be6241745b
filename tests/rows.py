"""Rows to quantise, what quantising them must give, and how far from exact it may be."""

import torch

from bitblas.config import QUANTIZED_ACTIVATIONS

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
HALF_ULP = 2.0**-24  # of a float32, relative


def draw_rows(m: int, k: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> torch.Tensor:
    """(m, k) values around N(0, 1) times a size for each row, from 2^-8 to 2^8."""
    rng = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(torch.rand((m, 1), generator=rng) * 16 - 8)
    return (torch.randn((m, k), generator=rng) * sizes).to(dtype).to(device)


def exact(x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / scale, scale) of finite rows, in float64."""
    wide = x.double()
    scale = wide.abs().amax(-1).clamp(min=2.0**-100) / QUANTIZED_ACTIVATIONS[dtype]
    return wide / scale.unsqueeze(-1), scale


def worst(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, dtype: str) -> float:
    """The greatest error of any element of (q, scale), in parts of what is allowed.

    The scale is rounded once. Then three roundings, of the scale, of its reciprocal and of the
    product, each by half a unit of float32, come before the one to the nearest q: half a step of
    int8; of e4m3 half of 2^-3 of the value, or half of 2^-9.
    """
    target, exact_scale = exact(x, dtype)
    scale_error = ((scale.double() - exact_scale).abs() / exact_scale / HALF_ULP).max()
    size = target.abs()
    half_step = 0.5
    if dtype == "e4m3_float8":
        half_step = torch.exp2(size.clamp(min=2.0**-6).log2().floor() - 4)
    allowed = half_step + size * 4 * HALF_ULP
    error = ((q.double() - target).abs() / allowed).max()
    return float(torch.maximum(scale_error, error))


def as_bytes(q: torch.Tensor) -> torch.Tensor:
    """8-bit numbers as bytes, which can be compared on every device."""
    return q.view(torch.uint8)
