"""The meaning of every operator, in plain float64 torch: the oracle of all tests.

Nothing here is fast, and nothing here shares code with the kernels beyond the formats' tables.
"""

from __future__ import annotations

import torch

from .attention_config import FlashAttenConfig
from .config import MatmulConfig
from .layouts import unpack_rows


def decode_scale(config: MatmulConfig, scale: torch.Tensor) -> torch.Tensor:
    """Scales (N, G) in any accepted dtype -> float64."""
    encoding = config.format.scale_encoding
    if encoding is not None and scale.dtype == torch.uint8:
        scale = scale.view(config.scale_dtypes[0])
    return scale.to(torch.float64)


def dequantize(
    config: MatmulConfig,
    codes: torch.Tensor,
    scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The weight (N, K) in float64 that uint8 codes (N, K) (dense: values) and extras stand for."""
    weight = config.format.to_values(codes)
    length = config.group_length

    def per_value(x: torch.Tensor) -> torch.Tensor:  # (N, G) -> (N, K)
        return x.repeat_interleave(length, dim=1)

    zero: torch.Tensor | None = None
    if zeros is not None:
        if config.zeros_mode == "quantized":
            zero = per_value(unpack_rows(zeros, config.bits, config.N).to(torch.float64).T)
        else:
            zero = per_value(zeros.to(torch.float64))
    if zero is not None and config.zeros_mode != "rescale":
        weight = weight - zero
    if scale is not None:
        weight = weight * per_value(decode_scale(config, scale))
    if zero is not None and config.zeros_mode == "rescale":
        weight = weight - zero
    if global_scale is not None:
        weight = weight * global_scale.to(torch.float64)
    return weight


def unpack_int4(A: torch.Tensor) -> torch.Tensor:
    """int4 activations packed two per byte, low nibble first -> int8 values."""
    low, high = (A << 4) >> 4, A >> 4
    return torch.stack((low, high), dim=-1).flatten(-2)


def pack_int4(A: torch.Tensor) -> torch.Tensor:
    """int8 values in -8..7 [..., K] -> int4 activations [..., K/2]."""
    pairs = A.unflatten(-1, (-1, 2))
    return (pairs[..., 0] & 15) | (pairs[..., 1] << 4)


def matmul(
    config: MatmulConfig,
    A: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product in float64, before conversion to out_dtype. A: (..., K), or as `layout` says."""
    if config.layout in ("tn", "tt"):
        A = A.transpose(-1, -2)
    if config.A_dtype == "int4":
        A = unpack_int4(A)
    product = A.to(torch.float64) @ dequantize(config, codes, scale, zeros, global_scale).T
    if input_scale is not None:
        product = product * input_scale.to(torch.float64).reshape(*product.shape[:-1], 1)
    if bias is not None:
        product = product + bias.to(torch.float64)
    return product


def dequantize_kv(
    codes: torch.Tensor, scale: torch.Tensor | None = None, zeros: torch.Tensor | None = None
) -> torch.Tensor:
    """Keys or values [batch, tokens, heads, dim] in float64; zeros: int4, two codes in a byte."""
    if zeros is not None:
        low, high = codes.to(torch.int64) & 15, (codes.to(torch.int64) >> 4) & 15
        values = torch.cat((low, high), dim=-1).to(torch.float64)
        values = values - zeros.to(torch.float64)[..., None]
    else:
        values = codes.to(torch.float64)
    return values if scale is None else values * scale.to(torch.float64)[..., None]


def attention(
    config: FlashAttenConfig,
    Q: torch.Tensor,
    K: torch.Tensor,
    V: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    k_zeros: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    v_zeros: torch.Tensor | None = None,
    kv_len: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """softmax(Q K^T / sqrt(dim)) V in float64, [batch, q_len, heads, dim]. kv_len: how many keys
    there are, for each of the batch or all; the last query sees all of them, causal or not."""
    if config.layout == "ntn":
        K = K.permute(0, 3, 2, 1)
    batch, q_len, heads, dim = Q.shape
    lengths = torch.as_tensor(V.shape[1] if kv_len is None else kv_len).expand(batch).tolist()
    out = torch.zeros(Q.shape, dtype=torch.float64, device=Q.device)
    group = heads // V.shape[2]

    def shorten(x: torch.Tensor | None, b: int, length: int) -> torch.Tensor | None:
        return None if x is None else x[b, :length]

    for b, length in enumerate(lengths):
        keys = dequantize_kv(
            K[b, :length], shorten(k_scale, b, length), shorten(k_zeros, b, length)
        )
        values = dequantize_kv(
            V[b, :length], shorten(v_scale, b, length), shorten(v_zeros, b, length)
        )
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        scores = torch.einsum("qhd,khd->hqk", Q[b].to(torch.float64), keys) / dim**0.5
        if config.is_causal:
            hidden = torch.ones(q_len, length, dtype=torch.bool, device=Q.device)
            scores = scores.masked_fill(hidden.triu(length - q_len + 1), float("-inf"))
        weights = scores.softmax(-1).nan_to_num(0)  # of a query that sees no key
        out[b] = torch.einsum("hqk,khd->qhd", weights, values)
    return out
