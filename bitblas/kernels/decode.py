"""Launcher of the decode family: m <= 16, 16-bit activations, Hopper; see decode_kernels.

`serves` says whether the family computes a product, `candidates` lists the tiles worth measuring,
the one that `microseconds` predicts to be the fastest first, `launches` says what to start.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..config import MatmulConfig, MatmulConfigWithSplitK
from ..formats import Table
from ..layouts import FRAGMENT_16, Fragment, planes
from .decoders import PairDecoder, pair_decoder
from .launch import PROGRAMMATIC_LAUNCH, Launch, Settled, Workspace
from .versions import gluon_available

KERNELS = ("decode",)
MAX_ROWS = 16
SHARED_BYTES = 227 * 1024  # of a block, on Hopper
# What blocks take at least that are fewer than multiprocessors. Of a kernel that starts while those
# ahead of it still run, two blocks would else come to lie on one multiprocessor and none on another
# (int8, 1280 x 3584, m = 4, H200, in a chain: 7.3 us instead of 4.5).
_ALONE = 120 * 1024


@dataclass(frozen=True)
class Tile:
    """How a product is cut up; decode_kernels explains the terms.

    blocks: thread blocks, each walking over row tiles. max_registers: of a thread, so that two
    blocks fit on a multiprocessor; None leaves it to the compiler.
    """

    warps: int
    bands: int
    unit_k: int
    depth: int
    blocks: int
    slabs: int = 1
    max_registers: int | None = None
    kernel: str = "decode"


@dataclass(frozen=True)
class GPU:
    """What the cost model knows of a device; the defaults are an H200's, measured."""

    multiprocessors: int = 132
    bytes_per_us: float = 4.56e6  # of a plain read kernel
    cycles_per_us: float = 1755.0


def serves(config: MatmulConfig, m: int, arch: int) -> bool:
    """Whether this family computes the product of m rows on compute capability arch (90: 9.0)."""
    return arch // 10 == 9 and 1 <= m <= MAX_ROWS and _serves(config)


@lru_cache(maxsize=4096)
def _serves(config: MatmulConfig) -> bool:
    if config.A_dtype not in ("float16", "bfloat16"):
        return False
    if pair_decoder(config.format, config.A_dtype) is None or not gluon_available():
        return False
    if isinstance(config, MatmulConfigWithSplitK) and config.k_split > 1:
        return False
    # entries rounded to the operand dtype are not exact enough for a finer result
    finer = config.out_dtype == "float32" or config.out_dtype != config.A_dtype == "bfloat16"
    if isinstance(config.format.decoder, Table) and finer:
        return False
    group = group_of(config)
    return group == 0 or (group >= 16 and group & (group - 1) == 0)


def layout(config: MatmulConfig) -> Fragment:
    """The packed layout that the kernels read."""
    return FRAGMENT_16


def _decoder(config: MatmulConfig) -> PairDecoder:
    decoder = pair_decoder(config.format, config.A_dtype)
    assert decoder is not None  # _serves has seen to it
    return decoder


def group_of(config: MatmulConfig) -> int:
    """Values of k that share a scale or zero point; 0 where all of a row do."""
    if config.num_groups == 1 or not (config.with_scaling or config.with_zeros):
        return 0
    return config.group_length


def _scaled_operand(config: MatmulConfig) -> bool:
    """Whether scales multiply the decoded weight: where that is exact. Groups of 16 values would
    cost as much in the accumulator of 8 rows of A, and twice that in one of 16."""
    e4m3 = config.with_scaling and config.format.scale_encoding == "e4m3"
    return e4m3 and group_of(config) == 16 and _decoder(config).scalable


def _needs_sums(config: MatmulConfig) -> bool:
    """Whether products need the sums of A."""
    return config.with_zeros or _decoder(config).shift != (0.0, 0.0)


def _shared_k(config: MatmulConfig, tile: Tile) -> int:
    """Values of k that a warp multiplies before it turns to the next scales, in groups."""
    return min(group_of(config), tile.depth * tile.unit_k)


def _sums_ahead(config: MatmulConfig, m: int, tile: Tile) -> bool:
    """Whether a block adds A up before it starts, for all its tiles: not where products for a tile
    or two, which overlap with the rest, take less, nor where reading the weights takes longest."""
    if not _needs_sums(config) or group_of(config) == 0:
        return False
    if rows_of_a(m) == 1:
        return config.bits < 4
    return config.bits <= 4 and -(-config.N // (16 * tile.bands)) > 2 * tile.blocks


def rows_of_a(m: int) -> int:
    """Rows of A that a block stages: 1, 8 or 16."""
    return 1 if m == 1 else 8 if m <= 8 else 16


def smallest_unit(config: MatmulConfig) -> int:
    return 256 // planes(config.bits)[-1][0]


def iterations(config: MatmulConfig, tile: Tile) -> int:
    """Of a block, along its slab of K."""
    return -(-config.K // (tile.slabs * tile.warps * tile.depth * tile.unit_k))


def shared_bytes(config: MatmulConfig, m: int, tile: Tile) -> int:
    """Shared memory of a block: what it uses, or what keeps others off its multiprocessor."""
    used = _used_bytes(config, m, tile)
    alone = tile.max_registers is None and -(-config.N // (16 * tile.bands)) <= tile.blocks
    return max(used, _ALONE) if alone else used


def _used_bytes(config: MatmulConfig, m: int, tile: Tile) -> int:
    """A block's slab of A, the partial sums of its warps, a decoder's table."""
    rows = rows_of_a(m)
    iteration = tile.depth * tile.warps * tile.unit_k
    slab = iterations(config, tile) * iteration
    table = _decoder(config).table_bytes
    totals = 4 * slab // _shared_k(config, tile) * rows if _sums_ahead(config, m, tile) else 0
    return 2 * slab * rows + totals + 4 * tile.warps * rows * 16 * tile.bands + table


# (warps, bands, bands * depth, blocks on a multiprocessor), by rows of A that a block stages: those
# that were the fastest for some shape or format on an H200. Two blocks hide each other's starts and
# ends, one has more registers for words on their way.
_SHAPES = {
    1: ((8, 1, 4, 2), (8, 1, 8, 2), (8, 2, 4, 2), (8, 2, 8, 2), (8, 1, 16, 1), (8, 2, 16, 1)),
    8: ((8, 1, 4, 2), (8, 2, 8, 2), (8, 1, 16, 1), (8, 2, 16, 1), (16, 1, 8, 1), (16, 2, 8, 1)),
    16: (
        *((16, 1, 4, 1), (16, 2, 4, 1)),
        *((8, 1, 8, 1), (8, 2, 16, 1), (8, 4, 8, 1), (8, 4, 16, 1)),
    ),
}


def _limit(tile: Tile) -> int:
    """Registers that a thread can have."""
    return 128 if tile.max_registers or tile.warps == 16 else 255


def _registers_of_groups(tile: Tile, rows: int, count: int) -> int:
    """What the sums of all groups of an iteration would take."""
    return count * tile.bands * (8 if rows == 16 else 4)


def stands_for(measured: int, m: int) -> bool:
    """Whether a tile measured with so many rows is taken for m: where A is staged alike, so that a
    row's result does not depend on the batch."""
    return rows_of_a(measured) == rows_of_a(m)


def candidates(config: MatmulConfig, m: int, gpu: GPU | None = None) -> list[Tile]:
    """Tiles worth measuring for m rows, the one that should be the fastest first."""
    return list(_candidates(config, rows_of_a(m), gpu or GPU()))


@lru_cache(maxsize=4096)
def _candidates(config: MatmulConfig, rows: int, gpu: GPU) -> tuple[Tile, ...]:
    tiles = [
        tile
        for warps, bands, units, per_sm in _SHAPES[rows]
        if (tile := _fitting(config, rows, gpu, warps, bands, units // bands, per_sm))
    ]
    tiles = list(dict.fromkeys(tiles))
    return tuple(sorted(tiles, key=lambda tile: microseconds(config, rows, tile, gpu)))


def _fitting(
    config: MatmulConfig,
    rows: int,
    gpu: GPU,
    warps: int,
    bands: int,
    depth: int,
    per_sm: int,
) -> Tile | None:
    """The tile with as few slabs of K as shared memory allows; None where that is none."""
    unit = smallest_unit(config)
    crowded = per_sm == 2 or warps == 16  # 128 registers in a thread
    heavy = rows == 16 and _decoder(config).instructions_per_weight > 1.5
    if (crowded and heavy) or (warps == 16 and bands == 2 and rows > 1 and unit > 64):
        return None  # spills
    group, wide_scales = group_of(config), config.format.scale_encoding is None
    # registers of a lane, in fours, for an iteration's words, and bytes for its groups' scales
    most_words = 8 if crowded or (heavy and bands == 4) else 16
    most_scales = (16 if crowded else 32) * (2 if _scaled_operand(config) else 1)
    words = len(planes(config.bits)) * bands
    while depth > 1 and (
        depth * words > most_words
        or warps * unit * depth > config.K
        or bands * _scale_bytes(config, unit * depth) > most_scales
        or (rows == 16 and wide_scales and group and unit * depth > 8 * group)
    ):
        depth //= 2
    if bands > 1 and bands * _scale_bytes(config, unit * depth) > max(40, most_scales):
        return None  # groups of a few values: spills
    blocks = min(-(-config.N // (16 * bands)), gpu.multiprocessors * per_sm)
    registers = 128 if blocks > gpu.multiprocessors else None  # two blocks share one's registers
    while depth:
        for slabs in range(1, -(-config.K // (warps * unit * depth)) + 1):
            tile = Tile(warps, bands, unit, depth, blocks, slabs, registers)
            if _used_bytes(config, rows, tile) * per_sm <= SHARED_BYTES:
                return tile
        depth //= 2
    return None


def _scale_bytes(config: MatmulConfig, k: int) -> float:
    """Of the scales and zero points of a row's groups in k values of k, in registers."""
    group = group_of(config)
    if not group:
        return 0
    each = (2 if config.format.scale_encoding is None else 1) * config.with_scaling
    each += config.with_zeros * (4 if config.zeros_mode == "quantized" else 2)
    return max(1, k // group) * each


def microseconds(config: MatmulConfig, m: int, tile: Tile, gpu: GPU) -> float:
    """What a product should take, from counts of instructions and bytes.

    Four things overlap, but not wholly (a p-norm of them): the instructions of the busiest
    multiprocessor, the reads of all, and two that a warp waits for however few there are: words on
    their way, since it loads an iteration ahead, and each matrix instruction's sum, which the next
    one adds to. Staging A, the ends of tiles and the start do not overlap. The constants are a
    fit to 632 timings of 120 random products on an H200, with plain launches: the error is 10 % in
    the mean, and of products left out of the fit 94 % get a tile within 10 % of their best.
    """
    rows = rows_of_a(m)
    columns = 2 if rows == 16 else 1  # in units of 8
    decoder = _decoder(config)
    sums, ahead = int(_needs_sums(config)), _sums_ahead(config, m, tile)
    products = sums and not ahead  # by which the sums come
    group, warp_k = group_of(config), tile.depth * tile.unit_k
    tiles = -(-config.N // (16 * tile.bands))
    per_sm = -(-tile.blocks // gpu.multiprocessors)
    waves = -(-tiles // tile.blocks)
    # tiles of the busiest multiprocessor: the last wave's blocks are spread over all of them
    rest = -(-(tiles % tile.blocks) // gpu.multiprocessors)
    walked = tiles // tile.blocks * per_sm + rest
    steps = iterations(config, tile) * tile.slabs

    folds = (4 * columns * (1 + sums) + 6) / (min(group, warp_k) / 2) if group else 0
    instructions = (  # for a lane's weight
        decoder.instructions_per_weight
        + 2.63 * columns * (1 + products / tile.bands) / 8  # matrix instructions
        + (0.65 if _scaled_operand(config) else folds)
        + columns / (16 * tile.bands)
        + 120 / (warp_k * tile.bands)
    )
    weights = walked * steps * tile.warps * warp_k * 16 * tile.bands / 128  # of a lane
    arithmetic = weights * instructions / (0.473 * gpu.cycles_per_us)
    extras = 2 * (1 + config.with_zeros) / group if group else 0.0
    reads = config.N * config.K * (config.bits / 8 + extras) / gpu.bytes_per_us
    words = 0.657 * waves * steps
    chain = 62.5 * waves * steps * (warp_k / 16) / gpu.cycles_per_us
    body = sum(part**2.785 for part in (arithmetic, reads, words, chain)) ** (1 / 2.785)

    staged = rows * config.K * 2 / 1024 * per_sm * (0.0022 + 0.0086 * ahead)
    several = tile.slabs if tiles > tile.blocks else 1  # ends of each tile, one for each slab
    return 1.06 + body + staged + 0.308 * (tile.slabs - 1) + 0.086 * waves * several


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

    Operands as for bitblas.kernels.gpu.matmul.
    """
    m = A.shape[0]
    tile = tile or candidates(config, m)[0]
    tiles = -(-config.N // (16 * tile.bands))
    aligned = config.K % 8 == 0 and A.data_ptr() % 16 == 0
    several = tile.slabs > 1 and tiles > tile.blocks  # slabs whose sums leave the registers
    parts = Workspace((m, config.N), torch.float32) if several else None
    arguments = {
        "A": A,
        "W": W.view(torch.int32),
        "OUT": out,
        "SCALE": _as_read(config, tile, scale),
        "ZEROS": zeros,
        "BIAS": bias,
        "GLOBAL_SCALE": global_scale,
        "PARTS": parts,
        "M": m,
        "N": config.N,
        "K": config.K,
        "G": config.num_groups,
        "EARLY": Settled(),
    }
    constants = _constants(
        config, tile, rows_of_a(m), scale is not None, zeros is not None, aligned
    )
    options: dict[str, Any] = {"launch_pdl": True} if PROGRAMMATIC_LAUNCH else {}
    if tile.max_registers is not None:
        options["maxnreg"] = tile.max_registers
    from .decode_kernels import decode_kernel

    grid, table = (min(tile.blocks, tiles),), _decoder(config).table_bytes
    extra = table + shared_bytes(config, m, tile) - _used_bytes(config, m, tile)
    return [Launch(decode_kernel, grid, arguments, constants, tile.warps, 1, options, extra)]


def _as_read(config: MatmulConfig, tile: Tile, scale: torch.Tensor | None) -> torch.Tensor | None:
    """Scales of a byte: four in a word where a warp reads so many of a row, which fewer registers
    hold, else bytes."""
    if scale is None or scale.itemsize > 1:
        return scale
    groups = tile.depth * tile.unit_k // group_of(config) if group_of(config) else 1
    words = groups % 4 == config.num_groups % 4 == scale.data_ptr() % 4 == 0 and groups > 0
    return scale.view(torch.int32 if words else torch.uint8)


@lru_cache(maxsize=4096)
def _constants(
    config: MatmulConfig,
    tile: Tile,
    rows: int,
    with_scale: bool,
    with_zeros: bool,
    aligned: bool,
) -> dict[str, Any]:
    decoder = _decoder(config)
    widths = [width for width, _ in planes(config.bits)]
    group = group_of(config)
    steps = iterations(config, tile)
    warp_k = tile.depth * tile.unit_k
    count = max(1, warp_k // group) if group else 1
    ahead, one, factors = _sums_ahead(config, rows, tile), decoder.one, (1.0, 1.0)
    if ahead:
        one, factors = factors, one
    return {
        "BITS": config.bits,
        "WIDTH": widths[0],
        "EXTRA": widths[1] if len(widths) > 1 else 0,
        "TILE_K": FRAGMENT_16.block_k(config.bits),
        "ASM": decoder.asm,
        "CONSTRAINTS": decoder.constraints,
        "FILL": decoder.fill(tile.warps),
        "UNIT": decoder.unit,
        "ONE": one,
        "SHIFT": tuple(x * o for x, o in zip(decoder.shift, factors)),
        "ZERO": tuple(x * o for x, o in zip(decoder.zero, factors)),
        "SUMS": _needs_sums(config),
        "AHEAD": ahead,
        "SCALED": _scaled_operand(config),
        "IN_PLACE": group != 0 and 5 * _registers_of_groups(tile, rows, count) > 2 * _limit(tile),
        "SCALE_KIND": (config.format.scale_encoding or "float") if with_scale else "none",
        "ZEROS_KIND": config.zeros_mode if with_zeros else "none",
        "GROUP": group,
        "GROUPS_ALIGNED": config.num_groups % count == 0,
        "EXACT": config.K == steps * tile.warps * warp_k * tile.slabs,
        "ROWS_EXACT": config.N % (16 * tile.bands) == 0,
        "VECTOR": 8 if aligned else 1,
        "ROWS_A": rows,
        "WARPS": tile.warps,
        "BANDS": tile.bands,
        "UNIT_K": tile.unit_k,
        "DEPTH": tile.depth,
        "ITERATIONS": steps,
        "SLABS": tile.slabs,
        "ONE_TILE": -(-config.N // (16 * tile.bands)) <= tile.blocks,
    }
