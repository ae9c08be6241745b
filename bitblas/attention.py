"""FlashAtten: softmax(Q · K^T / sqrt(dim)) · V through torch's own attention kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .config import TORCH_DTYPES
from .matmul import Operator

_DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class FlashAttenConfig:
    """Attention over `heads` query heads and `kv_heads` (None: as many) key and value heads.

    Q, V and the output are [batch, seq, heads, dim]; K the same for layout "nnn" and
    [batch, dim, heads, seq] for "ntn". batch, seq_len: hints; calls take any. All tensors have one
    dtype, float16 or bfloat16. Raises ValueError naming the field, the value and what is valid.
    """

    batch: int = None  # type: ignore[assignment]
    heads: int = None  # type: ignore[assignment]
    kv_heads: int | None = None
    seq_len: int = None  # type: ignore[assignment]
    dim: int = None  # type: ignore[assignment]
    Q_dtype: str = "float16"
    K_dtype: str = "float16"
    V_dtype: str = "float16"
    Accu_dtype: str = "float32"
    Out_dtype: str = "float16"
    layout: str = "nnn"
    is_causal: bool = False

    def __post_init__(self) -> None:
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        for field in ("batch", "heads", "kv_heads", "seq_len", "dim"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field}: got {value!r}, expected a positive integer")
        if self.heads % (self.kv_heads or 1):
            raise ValueError(f"kv_heads: {self.kv_heads} does not divide heads={self.heads}")
        if self.Q_dtype not in _DTYPES:
            raise ValueError(f"Q_dtype: got {self.Q_dtype!r}, expected one of {', '.join(_DTYPES)}")
        for field in ("K_dtype", "V_dtype", "Out_dtype"):
            if getattr(self, field) != self.Q_dtype:
                raise ValueError(
                    f"{field}: got {getattr(self, field)!r}, expected Q_dtype, {self.Q_dtype!r}"
                )
        if self.Accu_dtype != "float32":
            raise ValueError(f"Accu_dtype: got {self.Accu_dtype!r}, expected 'float32'")
        if self.layout not in ("nnn", "ntn"):
            raise ValueError(f"layout: got {self.layout!r}, expected 'nnn' or 'ntn'")


class FlashAtten(Operator):
    """A FlashAttenConfig's operator; enable_tuning and backend are accepted, without effect."""

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
        super().__init__(config, name, target)

    def forward(
        self,
        Q: torch.Tensor,
        K: torch.Tensor,
        V: torch.Tensor,
        output: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Q: [batch, q_len, heads, dim], V: [batch, k_len, kv_heads, dim] -> like Q.

        Causal masking is aligned to the end: the last query sees every key. `output` is written and
        returned. Raises ValueError or TypeError that names the operand.
        """
        config = self.config
        self._check("Q", Q, heads=2, dim=3, count=config.heads)
        if config.layout == "ntn":
            self._check("K", K, heads=2, dim=1, count=config.kv_heads)
            K = K.permute(0, 3, 2, 1)
        else:
            self._check("K", K, heads=2, dim=3, count=config.kv_heads)
        self._check("V", V, heads=2, dim=3, count=config.kv_heads)
        if not (Q.shape[0] == K.shape[0] == V.shape[0]) or K.shape[1] != V.shape[1]:
            raise ValueError(
                f"K, V: got batch {K.shape[0]}, {V.shape[0]} and length {K.shape[1]}, "
                f"{V.shape[1]}, "
                f"expected Q's batch {Q.shape[0]} and one length"
            )
        q_len, k_len = Q.shape[1], K.shape[1]
        mask = None
        if config.is_causal and q_len != k_len:
            if q_len > k_len:
                raise ValueError(f"Q: {q_len} causal queries need as many keys, got {k_len}")
            mask = torch.ones((q_len, k_len), dtype=torch.bool, device=Q.device)
            mask = mask.tril(k_len - q_len)
        product = scaled_dot_product_attention(
            Q.transpose(1, 2),
            K.transpose(1, 2),
            V.transpose(1, 2),
            attn_mask=mask,
            is_causal=config.is_causal and mask is None,
            enable_gqa=config.heads != config.kv_heads,
        ).transpose(1, 2)
        if output is None:
            return product.contiguous()
        if output.shape != Q.shape or output.dtype != Q.dtype or output.device != Q.device:
            raise ValueError(
                f"output: got shape {tuple(output.shape)} {output.dtype} on {output.device}, "
                f"expected {tuple(Q.shape)} {Q.dtype} on {Q.device}"
            )
        return output.copy_(product)

    def _check(self, name: str, x: torch.Tensor, heads: int, dim: int, count: int | None) -> None:
        """Raise unless x is a 4-D tensor of the config's dtype with `count` heads on axis `heads`
        and the head dimension on axis `dim`."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor")
        if x.dtype != TORCH_DTYPES[self.config.Q_dtype]:
            raise TypeError(f"{name}: got {x.dtype}, expected {self.config.Q_dtype}")
        if x.dim() != 4 or x.shape[heads] != count or x.shape[dim] != self.config.dim:
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected 4 dimensions with {count} on axis "
                f"{heads} (heads) and {self.config.dim} on axis {dim} (dim)"
            )
