"""The border of attention: what the tensors of a call must look like."""

from __future__ import annotations

import torch

from .attention_config import FlashAttenConfig
from .config import TORCH_DTYPES
from .operands import check_tensor

Optional = torch.Tensor | None


def check_call(
    config: FlashAttenConfig,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    numbers: tuple[Optional, ...],
    kv_len: Optional,
) -> torch.Tensor:
    """Raise ValueError or TypeError unless the operands fit the config. Returns K as [batch,
    tokens, heads, dim]."""
    heads, kv_heads, dim = config.heads, config.kv_heads, config.dim
    assert kv_heads is not None
    _check_tensor("Q", Q, config.Q_dtype, 2, 3, heads, dim)
    k_dim = dim // 2 if config.K_dtype == "int4" else dim
    v_dim = dim // 2 if config.V_dtype == "int4" else dim
    if config.layout == "ntn":
        _check_tensor("K", K, config.K_dtype, 2, 1, kv_heads, k_dim)
        K = K.permute(0, 3, 2, 1)
    else:
        _check_tensor("K", K, config.K_dtype, 2, 3, kv_heads, k_dim)
    _check_tensor("V", V, config.V_dtype, 2, 3, kv_heads, v_dim)
    if not (Q.shape[0] == K.shape[0] == V.shape[0]) or K.shape[1] != V.shape[1]:
        raise ValueError(
            f"K, V: got batch {K.shape[0]}, {V.shape[0]} and length {K.shape[1]}, {V.shape[1]}, "
            f"expected Q's batch {Q.shape[0]} and one length"
        )
    for name, x in (("K", K), ("V", V)):
        _check_device(name, x, Q)
    if kv_len is not None:
        check_tensor("kv_len", kv_len)
        if kv_len.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"kv_len: got {kv_len.dtype}, expected torch.int32 or torch.int64")
        if tuple(kv_len.shape) != (Q.shape[0],):
            raise ValueError(
                f"kv_len: got shape {tuple(kv_len.shape)}, expected {(Q.shape[0],)}, the batch"
            )
        _check_device("kv_len", kv_len, Q)
    elif config.is_causal and Q.shape[1] > V.shape[1]:
        raise ValueError(f"Q: {Q.shape[1]} causal queries need as many keys, got {V.shape[1]}")
    _check_numbers("k", "K_dtype", config.K_dtype, numbers[:2], Q, V)
    _check_numbers("v", "V_dtype", config.V_dtype, numbers[2:], Q, V)
    return K


def _check_tensor(
    name: str, x: torch.Tensor, dtype: str, heads_axis: int, dim_axis: int, heads: int, dim: int
) -> None:
    """Raise unless x is a 4-D tensor of `dtype` with so many heads and dims."""
    check_tensor(name, x)
    if x.dtype != TORCH_DTYPES[dtype]:
        raise TypeError(f"{name}: got {x.dtype}, expected {TORCH_DTYPES[dtype]} for {dtype}")
    if x.dim() != 4 or x.shape[heads_axis] != heads or x.shape[dim_axis] != dim:
        packed = ", two int4 codes in a byte" if dtype == "int4" else ""
        raise ValueError(
            f"{name}: got shape {tuple(x.shape)}, expected 4 dimensions with {heads} on axis "
            f"{heads_axis} (heads) and {dim} on axis {dim_axis} (dim{packed})"
        )


def _check_numbers(
    which: str,
    field: str,
    dtype: str,
    numbers: tuple[Optional, ...],
    Q: torch.Tensor,
    V: torch.Tensor,
) -> None:
    """Raise unless scale and zeros are those that a dtype of keys or values needs."""
    scale, zeros = numbers
    quantised = dtype in ("int8", "e4m3_float8", "int4")
    for name, x, needed in (
        (f"{which}_scale", scale, quantised),
        (f"{which}_zeros", zeros, dtype == "int4"),
    ):
        if x is None:
            if needed:
                raise ValueError(f"{name}: missing, {field} is {dtype!r}")
            continue
        if not needed:
            raise ValueError(f"{name}: got a tensor, but {field} is {dtype!r}")
        check_tensor(name, x)
        if tuple(x.shape) != tuple(V.shape[:3]):
            raise ValueError(
                f"{name}: got shape {tuple(x.shape)}, expected {tuple(V.shape[:3])}, one for "
                f"each token and head"
            )
        if x.dtype not in (Q.dtype, torch.float32):
            raise TypeError(f"{name}: got {x.dtype}, expected {Q.dtype} or torch.float32")
        _check_device(name, x, Q)
    if scale is not None and zeros is not None:
        if zeros.stride() != scale.stride() or zeros.dtype != scale.dtype:
            raise ValueError(
                f"{which}_zeros: got strides {zeros.stride()} {zeros.dtype}, expected those of "
                f"{which}_scale, {scale.stride()} {scale.dtype}"
            )


def _check_device(name: str, x: torch.Tensor, Q: torch.Tensor) -> None:
    if x.device != Q.device:
        raise ValueError(f"{name}: is on {x.device}, expected {Q.device}, where Q is")


def check_output(Q: torch.Tensor, out: torch.Tensor) -> None:
    check_tensor("output", out)
    if out.shape != Q.shape or out.dtype != Q.dtype or out.device != Q.device:
        raise ValueError(
            f"output: got shape {tuple(out.shape)} {out.dtype} on {out.device}, "
            f"expected {tuple(Q.shape)} {Q.dtype} on {Q.device}"
        )
    if any(stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride())):
        raise ValueError(
            f"output: got strides {out.stride()} for shape {tuple(out.shape)}, expected a tensor "
            f"whose elements do not share memory"
        )
