"""Launcher of the decode family: m <= 16, 16-bit activations, Hopper; see decode_kernels.

`launches` says what to start, `candidates` lists the tiles worth measuring, `serves` whether the
family computes a product at all. The portable family computes everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..config import MatmulConfig
from ..formats import Table
from ..layouts import FRAGMENT_16, Fragment, planes
from .decoders import pair_decoder
from .launch import Launch, Workspace

MAX_ROWS = 16
SHARED_BYTES = 227 * 1024  # of a block, on Hopper


@dataclass(frozen=True)
class Tile:
    """How a product is cut up; decode_kernels explains the terms.

    blocks: thread blocks along N, each walking over row tiles.
    """

    warps: int
    bands: int
    unit_k: int
    depth: int
    blocks: int
    slabs: int = 1
    buffers: int = 1
    max_registers: int | None = None

    kernel = "decode"


def serves(config: MatmulConfig, m: int, arch: int) -> bool:
    """Whether this family computes the product of m rows on compute capability arch (90: 9.0)."""
    return arch // 10 == 9 and 1 <= m <= MAX_ROWS and _serves(config)


@lru_cache(maxsize=4096)
def _serves(config: MatmulConfig) -> bool:
    if config.A_dtype not in ("float16", "bfloat16"):
        return False
    if pair_decoder(config.format, config.A_dtype) is None:
        return False
    # entries rounded to the operand dtype are not exact enough for a finer result
    finer = config.out_dtype == "float32" or config.out_dtype != config.A_dtype == "bfloat16"
    if isinstance(config.format.decoder, Table) and finer:
        return False
    group = _group(config)
    return group == 0 or (group >= 16 and group & (group - 1) == 0)


def layout(config: MatmulConfig) -> Fragment:
    """The packed layout that the kernels read."""
    return FRAGMENT_16


def _group(config: MatmulConfig) -> int:
    """Values of k that share a scale or zero point; 0 where all of a row do."""
    if config.num_groups == 1 or not (config.with_scaling or config.with_zeros):
        return 0
    return config.group_length


def rows_of_a(m: int) -> int:
    """Rows of A that a block stages: 1, 8 or 16."""
    return 1 if m == 1 else 8 if m <= 8 else 16


def smallest_unit(config: MatmulConfig) -> int:
    return 256 // planes(config.bits)[-1][0]


def iterations(config: MatmulConfig, tile: Tile) -> int:
    """Of a block, along its slab of K."""
    return -(-config.K // (tile.slabs * tile.warps * tile.depth * tile.unit_k))


def shared_bytes(config: MatmulConfig, m: int, tile: Tile) -> int:
    """Shared memory of a block: its slab of A and the partial sums of its warps."""
    rows = rows_of_a(m)
    iteration = tile.depth * tile.warps * tile.unit_k
    slab = iterations(config, tile) * iteration
    return 2 * tile.buffers * slab * rows + 4 * tile.warps * rows * 16 * tile.bands


def candidates(config: MatmulConfig, m: int, multiprocessors: int = 132) -> list[Tile]:
    """Tiles worth measuring for m rows."""
    result = []
    unit = max(smallest_unit(config), 128)
    for warps in (16, 8):
        for bands in (4, 2, 1):
            for depth in (4, 2, 1):
                for split_k in (1, 2, 4):
                    tiles = -(-config.N // (16 * bands))
                    blocks = min(tiles, multiprocessors // split_k)
                    tile = Tile(warps, bands, unit, depth, blocks, split_k)
                    if shared_bytes(config, m, tile) <= SHARED_BYTES:
                        result.append(tile)
    return result


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
    early: bool = False,
) -> list[Launch]:
    """What computes out (m, N) = A (m, K) times the packed weight, transposed.

    Operands as for bitblas.kernels.portable.matmul. early: W, scale and zeros were written before
    the kernel that precedes this one in the stream, so that they may be read while it still runs.
    """
    m = A.shape[0]
    tile = tile or candidates(config, m)[0]
    tiles = -(-config.N // (16 * tile.bands))
    several = tile.slabs > 1 and tiles > tile.blocks  # slabs whose sums leave the registers
    parts = Workspace((m, config.N), torch.float32) if several else None
    arguments = {
        "A": A,
        "W": W.view(torch.int32),
        "OUT": out,
        "SCALE": scale.view(torch.uint8) if scale is not None and scale.itemsize == 1 else scale,
        "ZEROS": zeros,
        "BIAS": bias,
        "GLOBAL_SCALE": global_scale,
        "PARTS": parts,
        "M": m,
        "N": config.N,
        "K": config.K,
        "G": config.num_groups,
        "EARLY": int(early),
    }
    constants = _constants(config, tile, rows_of_a(m), scale is not None, zeros is not None)
    options: dict[str, Any] = {"launch_pdl": True}
    if tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    from . import decode_kernels

    grid = (min(tile.blocks, tiles),)
    return [
        Launch(decode_kernels.decode_kernel, grid, arguments, constants, tile.warps, 1, options)
    ]


@lru_cache(maxsize=4096)
def _constants(
    config: MatmulConfig, tile: Tile, rows: int, with_scale: bool, with_zeros: bool
) -> dict[str, Any]:
    decoder = pair_decoder(config.format, config.A_dtype)
    assert decoder is not None
    widths = [width for width, _ in planes(config.bits)]
    group = _group(config)
    steps = iterations(config, tile)
    warp_k = tile.depth * tile.unit_k
    count = max(1, warp_k // group) if group else 1
    return {
        "BITS": config.bits,
        "WIDTH": widths[0],
        "EXTRA": widths[1] if len(widths) > 1 else 0,
        "TILE_K": FRAGMENT_16.block_k(config.bits),
        "ASM": decoder.asm,
        "CONSTRAINTS": decoder.constraints,
        "UNIT": decoder.unit,
        "ONE": decoder.one,
        "SHIFT": decoder.shift,
        "ZERO": decoder.zero,
        "SUMS": with_zeros or decoder.shift != (0.0, 0.0),
        "SCALE_KIND": (config.format.scale_encoding or "float") if with_scale else "none",
        "ZEROS_KIND": config.zeros_mode if with_zeros else "none",
        "GROUP": group,
        "GROUPS_ALIGNED": config.num_groups % count == 0,
        "EXACT": config.K == steps * tile.warps * warp_k * tile.slabs,
        "ROWS_EXACT": config.N % (16 * tile.bands) == 0,
        "VECTOR": 8 if config.K % 8 == 0 else 1,
        "ROWS_A": rows,
        "WARPS": tile.warps,
        "BANDS": tile.bands,
        "UNIT_K": tile.unit_k,
        "DEPTH": tile.depth,
        "ITERATIONS": steps,
        "SLABS": tile.slabs,
        "BUFFERS": tile.buffers,
        "ONE_TILE": -(-config.N // (16 * tile.bands)) <= tile.blocks,
    }
