"""Reading GPTQ checkpoints: a layer's packed tensors -> the operands of a MatmulConfig.

The layout is the one that AutoGPTQ's CUDA layers write: qweight (K*b/32, N) int32 packed along K,
qzeros (G, N*b/32) int32 packed along N, lowest bits first, scales (G, N), and for act-order g_idx
(K,), the group of each k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .config import MatmulConfig
from .layouts import pack_rows, unpack_rows


def unpack_qweight(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ's qweight (K*b/32, N) int32 -> int8 codes (N, K)."""
    rows = qweight.T.contiguous().view(torch.int8)
    return unpack_rows(rows, bits, rows.shape[-1] * 8 // bits).view(torch.int8)


def unpack_qzeros_v2(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """GPTQ's qzeros (G, N*b/32) int32 -> int8 codes (G, N), as stored."""
    rows = qzeros.contiguous().view(torch.int8)
    return unpack_rows(rows, bits, rows.shape[-1] * 8 // bits).view(torch.int8)


def unpack_qzeros(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """As unpack_qzeros_v2, for zero points stored minus one (modulo 2^b) -> the zero points."""
    stored = unpack_qzeros_v2(qzeros, bits).view(torch.uint8)
    return ((stored + 1) & ((1 << bits) - 1)).view(torch.int8)


class GPTQOperands(NamedTuple):
    """Logical operands for Linear.load_and_transform_weight, and the order of k they are in."""

    weight: torch.Tensor  # (N, K) integers
    scales: torch.Tensor  # (N, G)
    zeros: torch.Tensor | None  # in the form of the config's zeros_mode
    bias: torch.Tensor | None
    perm: torch.Tensor | None  # (K,): position k of the weight is the layer's input perm[k]


def read_gptq(
    config: MatmulConfig,
    layer: Any,
    unpack_zeros: Callable[[torch.Tensor, int], torch.Tensor],
    device: torch.device | str | None = None,
) -> GPTQOperands:
    """Unpack a GPTQ layer for `config` on `device` (None: where its qweight is).

    Raises ValueError where the layer's bits, sizes, groups or zero points are not the config's.
    """
    if not config.format.is_integer or config.bits == 1 or not config.with_scaling:
        raise ValueError(
            f"W_dtype: a GPTQ layer needs an integer format of 2 to 8 bits and with_scaling=True, "
            f"got {config.W_dtype!r} and with_scaling={config.with_scaling}"
        )
    qweight = layer.qweight if device is None else layer.qweight.to(device)
    expected = (config.K * config.bits // 32, config.N)
    if tuple(qweight.shape) != expected or qweight.dtype != torch.int32:
        raise ValueError(
            f"qweight: got shape {tuple(qweight.shape)} {qweight.dtype}, expected {expected} int32 "
            f"for {config.bits} bits"
        )
    codes = unpack_qweight(qweight, config.bits).view(torch.uint8)
    scales = layer.scales.to(codes.device).T
    perm = _group_order(config, getattr(layer, "g_idx", None))
    if perm is not None:
        perm = perm.to(codes.device)
        codes = codes.index_select(1, perm)
    zeros = None
    if (qzeros := getattr(layer, "qzeros", None)) is not None:
        if qzeros.dtype != torch.int32:
            raise ValueError(f"qzeros: got {qzeros.dtype}, expected torch.int32")
        points = unpack_zeros(qzeros.to(codes.device), config.bits).view(torch.uint8)
        zeros = _zeros(config, points, scales)
    elif config.with_zeros:
        raise ValueError("qzeros: missing in the GPTQ layer, but with_zeros=True")
    weight = codes.to(torch.int16) - _middle(config)
    return GPTQOperands(weight, scales, zeros, _bias(config, getattr(layer, "bias", None)), perm)


def _middle(config: MatmulConfig) -> int:
    """What a signed format's values are below GPTQ's codes: 2^(b-1)."""
    return 1 << (config.bits - 1) if config.format.source_format == "int" else 0


def _bias(config: MatmulConfig, bias: torch.Tensor | None) -> torch.Tensor | None:
    if config.with_bias:
        if bias is None:
            raise ValueError("bias: missing in the GPTQ layer, but with_bias=True")
        return bias
    if bias is not None and bool(bias.any()):
        raise ValueError("bias: the GPTQ layer has one, but with_bias=False")
    return None


def _group_order(config: MatmulConfig, g_idx: torch.Tensor | None) -> torch.Tensor | None:
    """The order of k that makes the groups contiguous, or None where they are."""
    if g_idx is None or g_idx.numel() == 0:
        return None
    if g_idx.numel() != config.K:
        raise ValueError(f"g_idx: got {g_idx.numel()} entries, expected K={config.K}")
    if bool((g_idx < 0).any()):
        raise ValueError(
            f"g_idx: got {int(g_idx.min())}, expected groups 0..{config.num_groups - 1}"
        )
    counts = torch.bincount(g_idx.long().cpu(), minlength=config.num_groups)
    if counts.numel() != config.num_groups or bool((counts != config.group_length).any()):
        raise ValueError(
            f"g_idx: expected {config.num_groups} groups of {config.group_length} values, "
            f"got groups of {sorted(set(counts.tolist()))}"
        )
    if bool((g_idx[1:] >= g_idx[:-1]).all()):
        return None
    return torch.argsort(g_idx, stable=True)


def _zeros(config: MatmulConfig, points: torch.Tensor, scales: torch.Tensor) -> torch.Tensor | None:
    """Zero points (G, N) uint8 in the form that the config's zeros_mode wants."""
    expected, middle = (config.num_groups, config.N), _middle(config)
    if tuple(points.shape) != expected:
        raise ValueError(f"qzeros: got {tuple(points.shape)} zero points, expected {expected}")
    centred = points.to(torch.int16) - middle
    if not config.with_zeros:
        if bool(centred.any()):
            raise ValueError(
                f"qzeros: with_zeros=False needs every zero point of {config.W_dtype} to be "
                f"{middle}, got {int(points.min())} to {int(points.max())}"
            )
        return None
    if config.zeros_mode == "quantized":
        if middle:
            raise ValueError(
                f"zeros_mode: 'quantized' zero points of GPTQ need an unsigned W_dtype, "
                f"got {config.W_dtype!r}"
            )
        return pack_rows(points, config.bits)
    zeros = centred.T.to(scales.dtype)
    return zeros * scales if config.zeros_mode == "rescale" else zeros
