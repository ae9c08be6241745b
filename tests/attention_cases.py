"""Random attention problems for the tests: operands, and what they should give, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bitblas import FlashAttenConfig, QuantizedKV, quantize_kv, reference

CACHES = ("float16", "int8", "e4m3_float8", "int4")
# Rounding of weights to 16 bits, then of the result; scores are float32.
TOLERANCE = {"float16": 2e-3, "bfloat16": 1e-2}


@dataclass
class Problem:
    config: FlashAttenConfig
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # Q, K, V
    extras: dict[str, Any]

    def expected(self) -> torch.Tensor:
        return reference.attention(self.config, *self.tensors, **self.extras)

    def check(self, out: torch.Tensor) -> None:
        expected = self.expected()
        error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-30)
        assert error < TOLERANCE[self.config.Q_dtype], f"relative error {error}, {self.config}"


def draw(
    batch: int = 2,
    q_len: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    k_len: int = 33,
    dim: int = 32,
    dtype: str = "float16",
    caches: tuple[str, str] = ("float16", "float16"),
    layout: str = "nnn",
    causal: bool = False,
    lengths: list[int] | None = None,
    device: str = "cpu",
    value_scale: float = 1.0,
) -> Problem:
    """caches: of K and V, "float16" meaning `dtype`. lengths: of kv_len; what lies behind is
    poison."""
    torch_dtype = getattr(torch, dtype)
    kinds = [dtype if cache == "float16" else cache for cache in caches]
    config = FlashAttenConfig(
        max(batch, 1), heads, kv_heads, max(k_len, 1), dim, dtype, *kinds, Out_dtype=dtype,
        layout=layout, is_causal=causal,
    )  # fmt: skip
    Q = torch.randn(batch, q_len, heads, dim, device=device).to(torch_dtype)
    extras: dict[str, Any] = {}
    tensors = []
    for name, kind, size in (("k", kinds[0], 1.0), ("v", kinds[1], value_scale)):
        x = (torch.randn(batch, k_len, kv_heads, dim, device=device) * size).to(torch_dtype)
        if kind != dtype:
            cache = quantize_kv(x, kind)
            x, extras[f"{name}_scale"] = cache.codes, cache.scale
            if cache.zeros is not None:
                extras[f"{name}_zeros"] = cache.zeros
        tensors.append(x)
    if lengths is not None:
        extras["kv_len"] = torch.tensor(lengths, dtype=torch.int32, device=device)
        for b, length in enumerate(lengths):
            for x in (*tensors, *(extras[name] for name in extras if name != "kv_len")):
                if x.dtype == torch.int8:
                    x[b, length:] = 77
                elif x.dtype == torch.float8_e4m3fn:
                    x.view(torch.int8)[b, length:] = 127
                else:
                    x[b, length:] = float("nan")
    K, V = tensors
    if layout == "ntn":
        K = K.permute(0, 3, 2, 1).contiguous()
    return Problem(config, (Q, K, V), extras)


def meta_operands(
    cache: str,
    q_len: int,
    dim: int,
    dtype: torch.dtype = torch.float16,
    heads: int = 32,
    layout: str = "nnn",
) -> Any:
    """A kernel's, without data: of a batch of 8 with 8 key heads and 32768 keys."""
    from bitblas.kernels import attention

    def meta(shape: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    kinds = {"int8": torch.int8, "int4": torch.int8, "e4m3_float8": torch.float8_e4m3fn}
    width = dim // 2 if cache == "int4" else dim
    keys = meta((8, 32768, 8, width), kinds.get(cache, dtype))
    number = None if cache == "float16" else meta((8, 8, 32768), dtype).transpose(1, 2)
    zeros = number if cache == "int4" else None
    K = keys
    if layout == "ntn":
        K = meta((8, width, 8, 32768), keys.dtype).permute(0, 3, 2, 1)
    Q = meta((8, q_len, heads, dim), dtype)
    return attention.Operands(Q, K, keys, number, zeros, number, zeros)


def cache_of(problem: Problem, which: str) -> QuantizedKV:
    """The quantised keys ("k") or values ("v") of a problem of layout "nnn"."""
    codes = problem.tensors[1 if which == "k" else 2]
    return QuantizedKV(
        codes, problem.extras[f"{which}_scale"], problem.extras.get(f"{which}_zeros")
    )
