"""Keys and values of attention in 8 or 4 bits: a scale, and for int4 a zero point, for every token
and head."""

from __future__ import annotations

from typing import NamedTuple

import torch

KV_DTYPES = ("int8", "e4m3_float8", "int4")
_LARGEST = {"int8": 127.0, "e4m3_float8": 448.0}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # of values and scales
_TOKENS = 8  # scales are allocated in multiples: kernels read those of several tokens at once


class QuantizedKV(NamedTuple):
    """Keys or values [batch, length, heads, dim] as FlashAtten takes them.

    codes: int8 or float8_e4m3fn like the values; int4: int8 [batch, length, heads, dim / 2], where
    a byte holds the codes 0..15 of d (low nibble) and of d + dim / 2.
    scale, zeros (int4 only): [batch, length, heads], contiguous along length.
    A value is code * scale; int4: (code - zero) * scale.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor | None = None

    @classmethod
    def empty(
        cls,
        batch: int,
        length: int,
        heads: int,
        dim: int,
        dtype: str,
        scale_dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ) -> QuantizedKV:
        """A cache of zeros, to be written to. Raises ValueError for a dtype not in KV_DTYPES, and a
        scale_dtype other than float16, bfloat16 and float32."""
        _check_dtype(dtype, dim)
        if scale_dtype not in _FLOATS:
            valid = ", ".join(str(kind) for kind in _FLOATS)
            raise ValueError(f"scale_dtype: got {scale_dtype}, expected one of {valid}")
        kind = torch.float8_e4m3fn if dtype == "e4m3_float8" else torch.int8
        shape = (batch, length, heads, dim // 2 if dtype == "int4" else dim)
        codes = torch.zeros(shape, dtype=torch.int8, device=device).view(kind)
        numbers = [
            torch.zeros(
                (batch, heads, -(-length // _TOKENS) * _TOKENS), dtype=scale_dtype, device=device
            )[:, :, :length].transpose(1, 2)
            for _ in range(2 if dtype == "int4" else 1)
        ]
        return cls(codes, *numbers)

    @property
    def dtype(self) -> str:
        if self.codes.dtype == torch.float8_e4m3fn:
            return "e4m3_float8"
        return "int8" if self.zeros is None else "int4"

    def write(self, x: torch.Tensor, position: int | torch.Tensor) -> None:
        """Quantise x [batch, new, heads, dim] into the tokens from `position` on.

        position: one for the whole batch, or a tensor [batch] of int32 or int64, which is not
        copied to the host: whether its tokens lie within the cache is not checked. Raises
        ValueError or TypeError naming x or position.
        """
        new = quantize_kv(x, self.dtype, self.scale.dtype)
        self._check_write(x, new.codes, position)
        for cache, values in zip(self, new):
            if cache is None or values is None:
                continue
            if cache.dtype == torch.float8_e4m3fn:
                cache, values = cache.view(torch.int8), values.view(torch.int8)
            if isinstance(position, int):
                cache[:, position : position + x.shape[1]] = values
            else:
                batch = torch.arange(x.shape[0], device=x.device)[:, None]
                tokens = position[:, None] + torch.arange(x.shape[1], device=x.device)
                cache[batch, tokens] = values

    def _check_write(
        self, x: torch.Tensor, codes: torch.Tensor, position: int | torch.Tensor
    ) -> None:
        """Raise unless x, whose codes are given, fits the cache from `position` on."""
        batch, length, heads, _ = self.codes.shape
        count = x.shape[1]
        if (codes.shape[0], *codes.shape[2:]) != (batch, *self.codes.shape[2:]) or count > length:
            dim = self.codes.shape[3] * (1 if self.zeros is None else 2)
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected [{batch}, up to {length}, {heads}, {dim}]"
            )
        if isinstance(position, torch.Tensor):
            if position.dtype not in (torch.int32, torch.int64):
                raise TypeError(
                    f"position: got {position.dtype}, expected torch.int32 or torch.int64"
                )
            if tuple(position.shape) != (batch,):
                raise ValueError(
                    f"position: got shape {tuple(position.shape)}, expected {(batch,)}, the batch"
                )
        elif isinstance(position, bool) or not isinstance(position, int):
            raise TypeError(f"position: got {position!r}, expected an integer or a tensor")
        elif not 0 <= position <= length - count:
            raise ValueError(
                f"position: got {position}, expected 0 to {length - count} for {count} tokens in a "
                f"cache of {length}"
            )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values [batch, length, heads, dim], computed in float32 (float64: in float64)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if self.zeros is None:
            values = self.codes.to(wide)
        else:
            bits = self.codes.view(torch.uint8)
            values = torch.cat((bits & 15, bits >> 4), dim=-1).to(wide)
            values -= self.zeros.to(wide).unsqueeze(-1)
        return (values * self.scale.to(wide).unsqueeze(-1)).to(dtype)


def quantize_kv(x: torch.Tensor, dtype: str, scale_dtype: torch.dtype | None = None) -> QuantizedKV:
    """Round x [batch, length, heads, dim], float16, bfloat16 or float32, to 8 or 4 bits.

    dtype: "int8" and "e4m3_float8": symmetric, the largest magnitude of a token and head becomes
    127 or 448. "int4": its range, extended to hold 0, becomes 0..15. scale_dtype: x's, or float16
    for float32; one of those three. Rounding knows the rounded scale and zero point. Raises
    ValueError or TypeError.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a tensor")
    if x.dtype not in _FLOATS or x.dim() != 4:
        valid = ", ".join(str(kind) for kind in _FLOATS)
        raise ValueError(
            f"x: got shape {tuple(x.shape)} {x.dtype}, expected [batch, length, heads, dim], one "
            f"of {valid}"
        )
    _check_dtype(dtype, x.shape[-1])
    if scale_dtype is None:
        scale_dtype = torch.float16 if x.dtype == torch.float32 else x.dtype
    batch, length, heads, dim = x.shape
    cache = QuantizedKV.empty(batch, length, heads, dim, dtype, scale_dtype, x.device)
    wide = x.to(torch.float32)
    if dtype != "int4":
        cache.scale.copy_(wide.abs().amax(-1) / _LARGEST[dtype])
        codes = wide / _divisor(cache.scale)
        codes = codes.clamp(-_LARGEST[dtype], _LARGEST[dtype])
        cache.codes.copy_(codes.round() if dtype == "int8" else codes)
        return cache
    assert cache.zeros is not None
    low, high = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
    cache.scale.copy_((high - low) / 15)
    divisor = _divisor(cache.scale)
    cache.zeros.copy_((-low / divisor.squeeze(-1)).clamp(0, 15))
    codes = (wide / divisor + cache.zeros.to(torch.float32).unsqueeze(-1)).round().clamp(0, 15)
    low_half, high_half = codes.to(torch.uint8).chunk(2, dim=-1)
    cache.codes.copy_((low_half | (high_half << 4)).view(torch.int8))
    return cache


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """The scale of each value, 1 where there are only zeros."""
    wide = scale.to(torch.float32).unsqueeze(-1)
    return torch.where(wide == 0, 1.0, wide)


def _check_dtype(dtype: str, dim: int) -> None:
    if dtype not in KV_DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {', '.join(KV_DTYPES)}")
    if dtype == "int4" and dim % 2:
        raise ValueError(f"dim: got {dim}, int4 needs an even one")
