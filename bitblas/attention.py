"""FlashAtten: softmax(Q · K^T / sqrt(dim)) · V, with keys and values of 16, 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import torch

from .attention_config import FlashAttenConfig
from .attention_ops import BACKENDS, Optional, choose, differentiable
from .matmul import Operator
from .operands import check_no_tangent, check_tensor

__all__ = ["FlashAtten", "FlashAttenConfig"]

_NAMES = ("Q", "K", "V", "k_scale", "k_zeros", "v_scale", "v_zeros", "output")
_FORMER_BACKENDS = ("tl", "tir", "tilelang")  # names of BitBLAS 0.1: all mean "auto"


class FlashAtten(Operator):
    """A FlashAttenConfig's operator.

    backend says what serves calls: "auto" (so do the names of BitBLAS 0.1, such as "tl") takes
    what should be fastest; "triton" this library's kernels, "cudnn" and "flash" torch's, all three
    on GPUs only; "math" torch's plain one, "torch" what torch chooses. "cudnn" and "flash" get
    16-bit keys and values, contiguous along dim: of others, as keys of layout "ntn", copies.
    `choice` tells which it is for a call; the logger "bitblas" says so once, at level INFO.
    enable_tuning and from_database are accepted, without effect.

    Raises ValueError for an unknown backend.
    """

    config: FlashAttenConfig

    def __init__(
        self,
        config: FlashAttenConfig,
        name: str = "flashatten",
        target: str | None = None,
        enable_tuning: bool = False,
        from_database: bool = False,
        backend: Any = "tl",
    ) -> None:
        if not isinstance(config, FlashAttenConfig):
            raise TypeError(f"config: got {type(config).__name__}, expected a FlashAttenConfig")
        chosen = str(getattr(backend, "value", backend))
        if chosen not in BACKENDS + _FORMER_BACKENDS:
            raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(BACKENDS)}")
        super().__init__(config, name, target)
        self.backend = "auto" if chosen in _FORMER_BACKENDS else chosen
        self._key = config.key

    def forward(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        output: torch.Tensor | None = None,
        *,
        k_scale: torch.Tensor | None = None,
        k_zeros: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        v_zeros: torch.Tensor | None = None,
        kv_len: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Q: [batch, q_len, heads, dim], V: [batch, k_len, kv_heads, dim] -> like Q.

        Causal masking is aligned to the end: the last query sees every key. `output` is written and
        returned. kv_len: how many of the keys there are, where K and V are longer: one for the
        batch, or a tensor [batch] of int32 or int64, which is not copied to the host; a query that
        sees no key gives zeros then. k_scale, k_zeros, v_scale, v_zeros: of quantised K and V,
        [batch, k_len, kv_heads], Q's dtype or float32 (bitblas.quantize_kv makes them).

        16-bit Q, K and V may require gradients: torch's own operators serve then. Raises ValueError
        or TypeError that names the operand; ValueError for gradients that there are not: of
        quantised calls and their scales, with a tensor as kv_len, in forward mode.
        """
        numbers: tuple[Optional, ...] = (k_scale, k_zeros, v_scale, v_zeros)
        for name, x in zip(_NAMES, (Q, K, V, *numbers, output)):
            if x is not None or name in ("Q", "K", "V"):
                check_tensor(name, x)
                check_no_tangent(name, x)  # type: ignore[arg-type]
        if kv_len is not None and not isinstance(kv_len, torch.Tensor):
            K, V, numbers = self._shorten(K, V, numbers, kv_len)
            kv_len = None
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (Q, K, V, *numbers)
        ):
            return differentiable(self.config, self.backend, Q, K, V, numbers, kv_len, output)
        operands = (Q, K, V, *numbers, kv_len, self._key, self.backend)
        if output is None:
            return torch.ops.bitblas.attention(*operands)
        torch.ops.bitblas.attention_out(*operands, output)
        return output

    def choice(self, Q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, kv_len: Any = None) -> str:
        """What serves a call with such operands: "triton", "cudnn", "flash", "math", "torch"."""
        return choose(self.config, self.backend, Q, K, V, isinstance(kv_len, torch.Tensor))

    def _shorten(
        self, K: torch.Tensor, V: torch.Tensor, numbers: tuple[Optional, ...], kv_len: int
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Optional, ...]]:
        """Their first kv_len tokens."""
        axis = 3 if self.config.layout == "ntn" else 1
        for name, x in zip(_NAMES[1:], (K, V, *numbers)):
            rank = 4 if name in ("K", "V") else 3
            if x is not None and x.dim() != rank:
                raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {rank} dimensions")
        if isinstance(kv_len, bool) or not isinstance(kv_len, int):
            raise TypeError(f"kv_len: got {kv_len!r}, expected an integer or a tensor")
        longest = min(K.shape[axis], V.shape[1])
        if not 0 <= kv_len <= longest:
            raise ValueError(f"kv_len: got {kv_len}, expected 0 to {longest}, K's and V's length")
        shorter = tuple(None if x is None else x[:, :kv_len] for x in numbers)
        return K.narrow(axis, 0, kv_len), V[:, :kv_len], shorter
