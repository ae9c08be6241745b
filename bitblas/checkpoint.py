"""What a checkpoint of Linear says of its bytes, and how those of BitBLAS 0.1 are read."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .config import MatmulConfig
from .layouts import LAYOUT_VERSION, PLAIN, import_original, layout_of


def format_text(config: MatmulConfig) -> str:
    """What the packed bytes of a Linear with this config mean."""
    zeros = config.zeros_mode if config.with_zeros else "none"
    text = f"bitblas layout {LAYOUT_VERSION}: {config.W_dtype}, group {config.group_length}"
    return text + f", zeros {zeros}"


def format_tag(config: MatmulConfig, device: torch.device | None = None) -> torch.Tensor:
    """format_text as ASCII in a uint8 tensor (device None: the default device)."""
    return torch.tensor(list(format_text(config).encode()), dtype=torch.uint8, device=device)


def refusal(config: MatmulConfig, entries: Mapping[str, torch.Tensor]) -> str | None:
    """Why a checkpoint's entries do not fit a Linear of this config, or None where they do."""
    tag, wanted = entries.get("weight_format"), format_text(config)
    if tag is None:
        return (
            "the checkpoint has no `weight_format`, so its packed bytes are of another library or "
            "layout version. One written by BitBLAS 0.1 loads with "
            "Linear.load_original_state_dict; from any other, unpack the weight and call "
            "load_and_transform_weight"
        )
    if tag.dtype != torch.uint8 or tag.dim() != 1:
        return f"weight_format: got shape {tuple(tag.shape)} {tag.dtype}, expected uint8 text"
    found = bytes(tag.tolist()).decode(errors="replace")
    if found != wanted:
        return (
            f"the checkpoint holds {found!r}, this module is {wanted!r}. Build the module with the "
            f"checkpoint's format, or dequantise and call load_and_transform_weight"
        )
    packed, here = entries["qweight"], f"this module has N={config.N}, K={config.K}"
    if packed.dtype != torch.int8:
        return f"qweight: got {packed.dtype}, expected torch.int8; {here}"
    try:
        layout = layout_of(packed)
    except ValueError as error:
        return f"qweight: {error}; {here}"
    if tuple(packed.shape) != layout.shape(config.bits, config.N, config.K):
        return f"qweight: got shape {tuple(packed.shape)} in the {layout.name} layout; {here}"
    scales, valid = entries.get("scales"), config.scale_dtypes
    encoded = config.format.scale_encoding is not None  # bytes, not numbers to round
    if encoded and scales is not None and scales.dtype not in valid:
        return f"scales: got {scales.dtype}, expected {' or '.join(map(str, valid))}"
    perm = entries.get("perm")
    if perm is not None and perm.device.type != "meta":
        if sorted(perm.flatten().tolist()) != list(range(config.K)):
            return f"perm: not a permutation of 0..{config.K - 1}"
    return None


def read_original(config: MatmulConfig, packed: torch.Tensor) -> torch.Tensor:
    """The logical weight (N, K) in BitBLAS 0.1's qweight, interleaved if config.fast_decoding."""
    expected = PLAIN.shape(config.bits, config.N, config.K)
    if tuple(packed.shape) != expected:
        raise ValueError(f"qweight: got shape {tuple(packed.shape)}, expected {expected}")
    activation_bits = 8 * config.torch_A_dtype.itemsize
    codes = import_original(
        packed.view(torch.int8), config.bits, config.K, activation_bits, bool(config.fast_decoding)
    )
    return config.format.to_values(codes, torch.int16) if config.format.is_integer else codes
