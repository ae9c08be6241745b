"""Launcher of the portable kernels: every weight format on every GPU from sm_80 up.

`candidates` lists the tiles worth measuring for a product, `launches` says what to start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch

from ..config import INTEGER_ACTIVATIONS, MatmulConfig, MatmulConfigWithSplitK
from ..formats import Affine, MiniFloat, Table
from ..layouts import FRAGMENTS, Fragment, planes
from . import portable_kernels as kernels
from .launch import Launch, Workspace
from .prepared import execute

KERNELS = ("gemv", "gemm")
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)


@dataclass(frozen=True)
class Tile:
    """What a block computes: block_m x block_n results, block_k values of k at a time."""

    kernel: str  # "gemv" or "gemm"
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1  # parts of K that different blocks sum up ("gemm" only)


def serves(config: MatmulConfig, m: int = 1, arch: int = 80) -> bool:
    """Whether this family computes the product of m rows on sm_`arch`: any but a dense one."""
    return not config.is_dense


def layout(config: MatmulConfig) -> Fragment:
    """The packed layout that the kernels read."""
    return FRAGMENTS[config.element_bits]


def dequantize(
    config: MatmulConfig,
    W: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> None:
    """out (N, K), float16, bfloat16 or float32: the weight in float32, rounded once."""
    execute([dequantize_launch(config, W, out, scale, zeros, global_scale)], W.device)


def stands_for(measured: int, m: int) -> bool:
    """Whether a tile measured with so many rows is taken for m."""
    return m <= measured <= 2 * m


def candidates(config: MatmulConfig, m: int, roomy: bool | None = None) -> list[Tile]:
    """Tiles worth measuring for m rows; the first is the default.

    roomy: for a GPU with Hopper's shared memory (227 KiB a block); None asks the current one.
    """
    roomy = _roomy() if roomy is None else roomy
    return list(_candidates(config, 1 << (max(m, 1) - 1).bit_length(), roomy))


@cache
def _roomy() -> bool:
    if not torch.cuda.is_available():
        return False
    properties = torch.cuda.get_device_properties()
    return getattr(properties, "shared_memory_per_block_optin", 0) >= 200_000


@lru_cache(maxsize=4096)
def _candidates(config: MatmulConfig, m: int, roomy: bool) -> tuple[Tile, ...]:
    if config.A_dtype == "float32":  # no matrix unit: operands live in registers, so small tiles
        block_m = min(max(m, 16), 32)
        tiles = [Tile("gemm", block_m, 64, _block_k(config, 32), 4, 2)]
    elif m <= 16:
        tiles = [
            Tile("gemm", 16, 64, _block_k(config, 128), 4, 4),
            Tile("gemm", 16, 64, _block_k(config, 64), 4, 5),
        ]
    elif m <= 64:
        tiles = [
            Tile("gemm", m, 64, _block_k(config, 128), 4, 3),
            Tile("gemm", 32, 64, _block_k(config, 128), 4, 4),
            Tile("gemm", m, 64, _block_k(config, 64), 4, 4),
        ]
        split = [replace(tile, split_k=parts) for tile in tiles[:2] for parts in (2, 4)]
        # H200, uint4, 8192 x 8192, m = 64: 32.6 us in two parts, 44.9 in one (128 blocks)
        tiles = split + tiles if config.N <= 12288 and config.K >= 2048 else tiles + split
    else:
        tiles = [
            Tile("gemm", 128, 64, _block_k(config, 128), 4, 3),
            Tile("gemm", 128, 128, _block_k(config, 128), 8, 3),
            Tile("gemm", 128, 64, _block_k(config, 64), 4, 3),
            Tile("gemm", 64, 64, _block_k(config, 64), 4, 3),
        ]
        if _crowded(config):  # larger tiles spill
            tiles = tiles[3:]
        elif not roomy:  # 110 KiB and more; the first also spills on sm_80
            tiles = tiles[2:]
    if m <= 16 and (unit := _gemv_unit(config)) is not None:
        rows = 8 if m <= 8 else 16
        tiles = [
            Tile("gemv", rows, 16, unit * 4, 4, 3),
            Tile("gemv", rows, 16, unit * 4, 4, 4),
            Tile("gemv", rows, 16, unit * 8, 8, 3),
            Tile("gemv", rows, 32, unit * 4, 4, 3),
            *tiles,
        ]
    k_split = config.k_split if isinstance(config, MatmulConfigWithSplitK) else 1
    if k_split > 1:
        tiles = [replace(tile, split_k=k_split) for tile in tiles if tile.kernel == "gemm"]
    return tuple(dict.fromkeys(tiles))


def _crowded(config: MatmulConfig) -> bool:
    """Whether a block keeps more in registers than weights, activations and results."""
    several_groups = _groups_mode(config, _block_k(config, 64)) == "any"
    row_sums = config.with_zeros and config.zeros_mode == "rescale"
    unpacked_here = config.A_dtype == "int4"  # nibbles of A pass through registers
    return several_groups or row_sums or unpacked_here or len(planes(config.bits)) > 1


def _smallest_block_k(config: MatmulConfig) -> int:
    """The fewest values of k whose words can be read apart: whole k-steps in whole words."""
    element_bits = config.element_bits
    return max(64 // width * max(1, 4 * width // element_bits) for width, _ in planes(config.bits))


def _block_k(config: MatmulConfig, wanted: int) -> int:
    """The largest power of two up to `wanted` (at least the layout's smallest) within one group."""
    smallest = _smallest_block_k(config)
    block = max(wanted, smallest)
    if not _grouped(config):
        return block
    while block > smallest and config.group_length % block:
        block //= 2
    # A group that no block fits into: each block then meets several groups in turn.
    return block if config.group_length % block == 0 else max(smallest, min(wanted, 64))


def _grouped(config: MatmulConfig) -> bool:
    return config.num_groups > 1 and (config.with_scaling or config.with_zeros)


def _groups_mode(config: MatmulConfig, block_k: int) -> str:
    if not _grouped(config):
        return "one"
    return "tile" if config.group_length % block_k == 0 else "any"


def _gemv_unit(config: MatmulConfig) -> int | None:
    """Values of k that a warp multiplies at a time; None where the gemv kernel cannot serve."""
    if len(planes(config.bits)) > 1 or config.A_dtype == "float32":
        return None
    # Up to 128 values: then one scale and zero serve two loads of 4-bit weights (24 -> 19 us at
    # m = 1, 8192 x 8192 on an H200).
    unit = max(128, 256 // config.bits)
    if _grouped(config):
        while config.group_length % unit:
            unit //= 2
    return unit if unit >= _smallest_block_k(config) else None


def launches(
    config: MatmulConfig,
    A: torch.Tensor,
    W: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> list[Launch]:
    """What computes out (m, N) = A (m, K) times the packed weight, transposed.

    Operands as for bitblas.kernels.gpu.matmul, W packed in layout(config).
    """
    m = A.shape[0]
    if tile is None:
        tile = _candidates(config, 1 << (m - 1).bit_length(), _roomy())[0]
    if tile.split_k > 1:
        tile = replace(tile, split_k=min(tile.split_k, -(-config.K // tile.block_k)))
    epilogue = {"BIAS": bias, "INPUT_SCALE": input_scale, "GLOBAL_SCALE": global_scale}
    target: torch.Tensor | Workspace = out
    if tile.split_k > 1:
        exact = config.A_dtype in INTEGER_ACTIVATIONS and scale is None
        exact = exact and (zeros is None or zeros.dtype == torch.int8)
        parts_dtype = torch.int32 if exact else torch.float32
        target = Workspace((tile.split_k, m, config.N), parts_dtype)
    arguments = {
        "A": _bytes(A),
        "W": W.view(torch.int32),
        "OUT": target,
        "SCALE": _bytes(scale),
        "ZEROS": zeros,
        **(epilogue if tile.split_k == 1 else dict.fromkeys(epilogue)),
        "M": m,
        "N": config.N,
        "K": config.K,
        "GROUP": config.group_length if _grouped(config) else config.K,
    }
    blocks_m, blocks_n = -(-m // tile.block_m), -(-config.N // tile.block_n)
    tf32 = out.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    constants = _matmul_constants(
        config, tile, scale is not None, zeros is not None, out.dtype, bool(tf32)
    )
    if tile.kernel == "gemv":
        function, grid = kernels.gemv_kernel, (blocks_n, blocks_m)  # type: Any, tuple[int, ...]
    else:
        function, grid = kernels.gemm_kernel, (blocks_m * blocks_n, tile.split_k)
    steps = [Launch(function, grid, arguments, constants, tile.num_warps, tile.num_stages)]
    if tile.split_k > 1:
        assert isinstance(target, Workspace)
        steps.append(_sum_parts(target, out, epilogue))
    return steps


def _sum_parts(
    parts: Workspace, out: torch.Tensor, epilogue: dict[str, torch.Tensor | None]
) -> Launch:
    """The second step of a product whose K was split."""
    split_k, m, n = parts.shape
    block = 512
    arguments = {"PARTS": parts, "OUT": out, **epilogue, "M": m, "N": n}
    constants = {"SPLIT_K": split_k, "BLOCK": block}
    return Launch(kernels.sum_parts_kernel, (m, -(-n // block)), arguments, constants, 4, 1)


def dequantize_launch(
    config: MatmulConfig,
    W: torch.Tensor,
    out: torch.Tensor,
    scale: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    global_scale: torch.Tensor | None = None,
) -> Launch:
    """What `dequantize` starts."""
    block_k = max(64, _smallest_block_k(config))
    arguments = {
        "W": W.view(torch.int32),
        "OUT": out,
        "SCALE": _bytes(scale),
        "ZEROS": zeros,
        "GLOBAL_SCALE": global_scale,
        "N": config.N,
        "K": config.K,
        "GROUP": config.group_length,
    }
    constants = {
        **_format_constants(config),
        **_extras_constants(config, scale is not None, zeros is not None),
        "BLOCK_N": 64,
        "BLOCK_K": block_k,
    }
    grid = (-(-config.N // 64) * -(-config.K // block_k),)
    return Launch(kernels.dequantize_kernel, grid, arguments, constants, 4, 1)


@lru_cache(maxsize=4096)
def _matmul_constants(
    config: MatmulConfig,
    tile: Tile,
    with_scale: bool,
    with_zeros: bool,
    out_dtype: torch.dtype,
    tf32: bool,
) -> dict[str, Any]:
    unit = _gemv_unit(config) if tile.kernel == "gemv" else None
    groups = _groups_mode(config, unit or tile.block_k)
    extras = _extras_constants(config, with_scale, with_zeros)
    integer = config.A_dtype in INTEGER_ACTIVATIONS
    zero_in_weight = groups != "any" and _zero_in_weight(config, extras["ZEROS_KIND"], out_dtype)
    decoder = config.format.decoder
    pair_asm = None
    if isinstance(decoder, Affine) and not bool(kernels.INTERPRETED.value):
        pair_asm = pair_assembly(decoder, config.bits, config.A_dtype, zero_in_weight)
    return {
        **_format_constants(config),
        **extras,
        "A_KIND": config.A_dtype,
        "K_ALIGNED": config.K % 16 == 0,
        "GROUPS": groups,
        "GROUP_BITS": _log2(config.group_length) if groups != "one" else -1,
        "ZERO_IN_WEIGHT": zero_in_weight,
        "PAIR_ASM": pair_asm,
        "TWO_TERMS": isinstance(decoder, Table) and not _holds(config.A_dtype, out_dtype),
        "SHIFT": 128 if integer and max(config.format.code_values()) > 127 else 0,
        "PRECISION": "tf32" if tf32 and config.A_dtype == "float32" else "ieee",
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        **({"SPLIT_K": tile.split_k} if unit is None else _unit_constants(config.bits, unit)),
    }


def _unit_constants(bits: int, unit: int) -> dict[str, int]:
    """Words of a load, and loads, that a lane needs for `unit` values of k."""
    words = unit * bits // 64
    return {"NW": min(words, 4), "DEEP": max(words // 4, 1)}


def _log2(value: int) -> int:
    """The exponent of a power of two, -1 for other numbers."""
    return value.bit_length() - 1 if value & (value - 1) == 0 else -1


def _holds(A_dtype: str, out_dtype: torch.dtype) -> bool:
    """Whether a weight rounded to the operand dtype is as exact as the result's dtype asks for."""
    if A_dtype == "float32":
        return True
    if A_dtype == "bfloat16":
        return out_dtype == torch.bfloat16
    return out_dtype != torch.float32


def _zero_in_weight(config: MatmulConfig, zeros_kind: str, out_dtype: torch.dtype) -> bool:
    """Whether zero points are subtracted from the weight rather than through the sums of A."""
    if zeros_kind == "quantized":  # exact: |v - zq| <= 255, and it fits int8 up to 4 bits
        return config.A_dtype not in INTEGER_ACTIVATIONS or config.bits <= 4
    if zeros_kind == "original":
        return config.A_dtype not in INTEGER_ACTIVATIONS and _holds(config.A_dtype, out_dtype)
    return False


@lru_cache(maxsize=4096)
def _format_constants(config: MatmulConfig) -> dict[str, Any]:
    fmt = config.format
    decoder = fmt.decoder
    fields: tuple[str, Any, Any, Any, Any]
    if isinstance(decoder, Affine):
        fields = ("affine", decoder.step, decoder.offset, decoder.flip, 0)
    elif isinstance(decoder, MiniFloat):
        fields = (
            "minifloat",
            decoder.exponent_bits,
            decoder.mantissa_bits,
            decoder.bias,
            decoder.special,
        )
    else:
        fields = ("table", decoder.entries, 0, 0, 0)
    return {
        "BITS": fmt.bits,
        "ELEMENT_BITS": config.element_bits,
        "TILE_K": layout(config).block_k(fmt.bits),
        **dict(zip(("KIND", "D0", "D1", "D2", "D3"), fields, strict=True)),
    }


def _extras_constants(config: MatmulConfig, with_scale: bool, with_zeros: bool) -> dict[str, Any]:
    return {
        "SCALE_KIND": (config.format.scale_encoding or "float") if with_scale else "none",
        "ZEROS_KIND": config.zeros_mode if with_zeros else "none",
    }


def pair_assembly(decoder: Affine, bits: int, A_dtype: str, with_zero: bool) -> str | None:
    """PTX that turns the codes at bits 0 and 16 of $2 into two values $0, $1 of A_dtype.

    `code | magic` is magic's value plus the code, as long as the code fits the mantissa: 1024 for
    float16, 128 for bfloat16. $3, if any, holds the zero point twice. None where it does not serve.
    """
    if bits not in (1, 2, 4, 8):
        return None
    if A_dtype == "float16":
        magic, base = 0x6400, 1024
    elif A_dtype == "bfloat16" and bits <= 4:
        magic, base = 0x4300, 128
    else:
        return None
    dtype = torch.float16 if A_dtype == "float16" else torch.bfloat16

    def twice(value: float) -> str:
        pattern = int(torch.tensor(value, dtype=dtype).view(torch.int16)) & 0xFFFF
        return f"0x{pattern * 0x10001:08x}"

    def fma(factor: float, addend: str) -> str:
        # bfloat16 has packed fma from sm_80 on, packed add and sub from sm_90 on
        kind = "f16x2" if A_dtype == "float16" else "bf16x2"
        return f"mov.b32 c, {twice(factor)}; mov.b32 d, {addend}; fma.rn.{kind} t, t, c, d;"

    mask, xor = ((1 << bits) - 1) * 0x10001, (magic ^ decoder.flip) * 0x10001
    # (codes & mask) ^ magic in one instruction, which takes one constant from a register
    lines = [f"mov.b32 c, 0x{xor:08x}; lop3.b32 t, $2, 0x{mask:08x}, c, 0x6a;"]
    if decoder.step == 1:
        lines.append(fma(1.0, twice(decoder.offset - base)))
    else:
        lines += [fma(1.0, twice(-base)), fma(decoder.step, twice(decoder.offset))]
    if with_zero:
        lines.append("xor.b32 z, $3, 0x80008000;")
        lines.append(fma(1.0, "z"))
    return "{ .reg .b32 t, c, d, z; " + " ".join(lines) + " mov.b32 {$0, $1}, t; }"


def _bytes(x: torch.Tensor | None) -> torch.Tensor | None:
    """fp8 tensors as bytes: Triton takes fp8 pointers only where the GPU has the type."""
    return x.view(torch.uint8) if x is not None and x.dtype in _FP8 else x
