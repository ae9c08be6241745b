"""Round-to-nearest quantisation into any registered format."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..formats import WeightFormat, get_format


class QuantizedWeight(NamedTuple):
    """What quantize_weight returns; the fields are the operands of a Matmul."""

    weight: torch.Tensor  # (N, K) as transform_weight takes it: integer values, codes, or fp8 bytes
    scale: torch.Tensor  # (N, G) float32; mxfp4: float8_e8m0fnu; nvfp4: float8_e4m3fn
    zeros: torch.Tensor | None  # (N, G) float32 integers, for zeros_mode "original"
    global_scale: torch.Tensor | None  # one float32, for nvfp4


def quantize_weight(
    weight: torch.Tensor, W_dtype: str, group_size: int = -1, with_zeros: bool = False
) -> QuantizedWeight:
    """Round a weight (N, K) to the nearest representable values, a scale for each group along K.

    with_zeros maps each group's range [min, max], widened to hold 0, onto the format's; without,
    the greatest magnitude of a group maps onto the format's greatest value. Of several clippings
    of that range each group takes the one of least squared error. group_size -1 is one group a
    row, or the format's own size for mxfp4 and nvfp4.

    Raises ValueError for a dense format, a shape that is not (N, K), a group size that does not
    divide K, or zeros with a format that takes none.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"weight: got {type(weight).__name__}, expected a tensor")
    fmt = get_format(W_dtype)
    if fmt.is_dense:
        raise ValueError(f"W_dtype: {W_dtype!r} is not quantised")
    if with_zeros and not fmt.is_integer:
        raise ValueError(
            f"with_zeros: zero points go with integer formats only, W_dtype is {W_dtype!r}"
        )
    if not weight.is_floating_point():
        raise TypeError(f"weight: got {weight.dtype}, expected a floating dtype")
    if not bool(weight.float().isfinite().all()):
        raise ValueError("weight: expected finite values, got NaN or infinity")
    if weight.dim() != 2:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected (N, K)")
    n, k = weight.shape
    length = fmt.fixed_group_size or k if group_size in (-1, None) else group_size
    if fmt.fixed_group_size not in (None, length):
        raise ValueError(
            f"group_size: {W_dtype} has groups of {fmt.fixed_group_size}, got {length}"
        )
    if length < 1 or k % length:
        raise ValueError(f"group_size: {length} does not divide K={k}")
    groups = weight.float().view(n, k // length, length)
    best = _round(fmt, groups, 1.0, with_zeros)
    for step in range(1, _CLIP_STEPS + 1):
        clip = 1 - step * (1 - _LEAST_CLIP.get(fmt.bits, 0.75)) / _CLIP_STEPS
        best = _better(best, _round(fmt, groups, clip, with_zeros))
    codes = best.codes.view(n, k)
    rounded = fmt.to_values(codes, torch.int16) if fmt.is_integer else codes
    return QuantizedWeight(rounded, best.scale, best.zeros, best.global_scale)


# Clipping the range of a group lowers its squared error: the fewer codes, the more clipping pays.
_CLIP_STEPS = 10
_LEAST_CLIP = {1: 0.1, 2: 0.4, 3: 0.6}


class _Rounded(NamedTuple):
    codes: torch.Tensor  # (N, G, group) uint8
    scale: torch.Tensor  # (N, G), as it is stored
    zeros: torch.Tensor | None  # (N, G)
    global_scale: torch.Tensor | None
    error: torch.Tensor  # (N, G), squared


def _round(fmt: WeightFormat, groups: torch.Tensor, clip: float, with_zeros: bool) -> _Rounded:
    """Round groups (N, G, group) whose range is `clip` times that of their values."""
    values = fmt.to_values(
        torch.arange(1 << fmt.bits, dtype=torch.uint8, device=groups.device), torch.float32
    )
    finite = values[values.isfinite()]
    low, high = finite.min(), finite.max()
    zeros = global_scale = None
    if with_zeros:
        least, greatest = groups.amin(-1).clamp(max=0) * clip, groups.amax(-1).clamp(min=0) * clip
        scale = _positive((greatest - least) / (high - low))
        zeros = (low - least / scale).round()
    else:
        scale = _positive(groups.abs().amax(-1) * clip / high)
    stored = scale
    if fmt.scale_encoding == "e8m0":
        stored = torch.exp2(scale.log2().ceil().clamp(-127, 127)).to(torch.float8_e8m0fnu)
        scale = stored.float()
    elif fmt.scale_encoding == "e4m3":
        largest = torch.finfo(torch.float8_e4m3fn).max
        global_scale = (_positive(groups.abs().amax() / high) / largest).reshape(1)
        stored = (scale / global_scale).clamp(max=largest).to(torch.float8_e4m3fn)
        scale = _positive(stored.float() * global_scale)
    target = groups / scale.unsqueeze(-1)
    if zeros is not None:
        target = target + zeros.unsqueeze(-1)
    codes = _nearest(target, values)
    error = ((values[codes.int()] - target) * scale.unsqueeze(-1)).square().sum(-1)
    return _Rounded(codes, stored, zeros, global_scale, error)


def _better(a: _Rounded, b: _Rounded) -> _Rounded:
    """For each group, the rounding of less squared error; both have one global scale."""
    pick = b.error < a.error
    scale = torch.where(pick, b.scale.float(), a.scale.float()).to(a.scale.dtype)
    zeros = None
    if a.zeros is not None and b.zeros is not None:
        zeros = torch.where(pick, b.zeros, a.zeros)
    codes = torch.where(pick.unsqueeze(-1), b.codes, a.codes)
    return _Rounded(codes, scale, zeros, a.global_scale, torch.minimum(a.error, b.error))


def _positive(scale: torch.Tensor) -> torch.Tensor:
    """1 in place of the scale of an all-zero group."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _nearest(target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The code of the nearest of `values` (NaN and infinite ones never) for each element."""
    order = torch.argsort(values.masked_fill(~values.isfinite(), torch.inf), stable=True)
    order = order[: int(values.isfinite().sum())]
    table = values[order]
    middles = (table[1:] + table[:-1]) / 2
    return order[torch.bucketize(target.contiguous(), middles)].to(torch.uint8)
