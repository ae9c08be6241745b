"""What an attention operator is for: FlashAttenConfig."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cache, cached_property

from .quantization.kv_cache import KV_DTYPES

_DTYPES = ("float16", "bfloat16")
_MOST_QUANTISED_DIM = 256


@dataclass(frozen=True)
class FlashAttenConfig:
    """Attention over `heads` query heads and `kv_heads` (None: as many) key and value heads.

    Q, V and the output are [batch, seq, heads, dim]; K the same for layout "nnn" and
    [batch, dim, heads, seq] for "ntn". batch, seq_len: hints; calls take any. Q and the output are
    float16 or bfloat16; K and V have that dtype too or, each for itself, are quantised: "int8",
    "e4m3_float8" or "int4" (bitblas.quantize_kv), dim up to 256. Raises ValueError naming the
    field, the value and what is valid.
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
        for field in ("K_dtype", "V_dtype"):
            value = getattr(self, field)
            if value not in (self.Q_dtype, *KV_DTYPES):
                raise ValueError(
                    f"{field}: got {value!r}, expected Q_dtype, {self.Q_dtype!r}, or one of "
                    f"{', '.join(KV_DTYPES)}"
                )
            if value in KV_DTYPES and self.dim > _MOST_QUANTISED_DIM:
                raise ValueError(
                    f"dim: got {self.dim}, expected at most {_MOST_QUANTISED_DIM} with {field} "
                    f"{value!r}"
                )
            if value == "int4" and self.dim % 2:
                raise ValueError(f"dim: got {self.dim}, expected an even one with {field} 'int4'")
        if self.Out_dtype != self.Q_dtype:
            raise ValueError(
                f"Out_dtype: got {self.Out_dtype!r}, expected Q_dtype, {self.Q_dtype!r}"
            )
        if self.Accu_dtype != "float32":
            raise ValueError(f"Accu_dtype: got {self.Accu_dtype!r}, expected 'float32'")
        if self.layout not in ("nnn", "ntn"):
            raise ValueError(f"layout: got {self.layout!r}, expected 'nnn' or 'ntn'")

    @property
    def is_quantized(self) -> bool:
        """Whether keys or values are."""
        return self.K_dtype != self.Q_dtype or self.V_dtype != self.Q_dtype

    @cached_property
    def key(self) -> str:
        """The fields as a JSON object: what the registered operator carries; see from_key."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @staticmethod
    @cache
    def from_key(key: str) -> FlashAttenConfig:
        """The config that `key` describes."""
        return FlashAttenConfig(**json.loads(key))
