"""Launcher of the batch8 family: 8-bit activations, Hopper; see batch8_kernels.

`serves` says whether the family computes a product, `candidates` lists the tiles worth measuring,
the one that `microseconds` predicts to be the fastest first, `launches` says what to start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..config import MatmulConfig, MatmulConfigWithSplitK
from ..layouts import FRAGMENT_8, Fragment
from .batch import SWEEP, packed_values
from .byte_decoders import ByteDecoder, byte_decoder, float_decoder
from .decode import GPU, SHARED_BYTES, group_of
from .launch import PROGRAMMATIC_LAUNCH, Launch, Settled, Workspace
from .versions import gluon_available
from .wgmma import (
    ConstantsBase,
    WgmmaTile,
    bucket,
    known,
    results_map,
    tail_maps,
    tma_map,
    words_map,
)

KERNELS = ("batch8",)
_MOST_K = 1 << 17  # sums of products of two bytes fit 32 bits
_MOST_GROUP = 8192
_LEAST_ROWS = 8  # of A that a tile has
# (warpgroups that multiply, blocks on a multiprocessor) -> threads of a block, registers of each
_THREADS = {
    (1, 1): (256, 128),
    (1, 2): (256, 128),
    (2, 1): (384, 168),
    (2, 2): (384, 80),
    (4, 1): (640, 96),
}


@dataclass(frozen=True)
class Tile(WgmmaTile):
    """How a product is cut up; batch_kernels and batch8_kernels explain the terms.

    stage_k: a multiple of 128. unroll: stages of a body that one warpgroup takes. consumers:
    warpgroups with rows of their own, split: those that share them.
    """

    split: int = 1
    per_sm: int = 1
    kernel: str = "batch8"

    @property
    def body_k(self) -> int:
        return self.stage_k * self.unroll * self.split


def serves(config: MatmulConfig, m: int, arch: int) -> bool:
    """Whether this family computes the product of m rows on compute capability arch (90: 9.0).

    Not those of integers alone whose results need sums of A and are floats, or of several groups:
    the portable family has them in int32, exactly.
    """
    return arch // 10 == 9 and _serves(config)


@lru_cache(maxsize=4096)
def _serves(config: MatmulConfig) -> bool:
    if _decoder(config) is None:
        return False
    if isinstance(config, MatmulConfigWithSplitK) and config.k_split > 1:
        return False
    if config.K % 16 or config.K >= _MOST_K:  # rows of A start on 16 bytes, for TMA
        return False
    if config.A_dtype == "e4m3_float8" and config.with_zeros:
        return False
    group = group_of(config)
    if _integers(config) and _needs_sums(config) and (group or not _exact(config)):
        return False  # float32 would round sums that may cancel
    least = max(128, FRAGMENT_8.block_k(config.bits))
    if group and (group & (group - 1) or not least <= group <= _MOST_GROUP):
        return False
    return gluon_available()


def layout(config: MatmulConfig) -> Fragment:
    """The packed layout that the kernels read."""
    return FRAGMENT_8


def _decoder(config: MatmulConfig) -> ByteDecoder | None:
    if config.A_dtype == "int8":
        return byte_decoder(config.format)
    return float_decoder(config.format) if config.A_dtype == "e4m3_float8" else None


def _integers(config: MatmulConfig) -> bool:
    """Whether nothing but integers take part (input_scale aside): then results are exact."""
    zeros = config.with_zeros and config.zeros_mode != "quantized"
    return config.A_dtype == "int8" and not config.with_scaling and not zeros


def _exact(config: MatmulConfig) -> bool:
    """Whether results are integers too: the kernel has sums in int32 to their end then."""
    return _integers(config) and not config.torch_out_dtype.is_floating_point


def _needs_sums(config: MatmulConfig) -> bool:
    """Whether sums of A's rows take part."""
    decoder = _decoder(config)
    return config.with_zeros or (decoder is not None and decoder.shift != 0)


def _extras(config: MatmulConfig) -> int:
    """How many values for each row and group come by way of the ring."""
    return (2 if _needs_sums(config) else 1) if group_of(config) else 0


def _stage_groups(config: MatmulConfig, tile: Tile) -> int:
    group = group_of(config)
    return max(1, tile.stage_k // group) if group else 1


def shared_bytes(config: MatmulConfig, tile: Tile) -> int:
    """Shared memory of a block: the ring, the results on their way out, the sums of warpgroups that
    share rows, and a bit of scratch."""
    extras, groups = _extras(config), _stage_groups(config, tile)
    stage = tile.stage_k * (tile.block_m + tile.rows * config.bits // 8)
    stage += 4 * groups * (extras * tile.rows + (tile.block_m if extras > 1 else 0))
    out = tile.block_m * tile.rows * config.torch_out_dtype.itemsize
    parts = 4 * tile.block_m * tile.rows * (tile.split - 1)
    return tile.stages * (stage + 16) + out + parts + 1024


def stands_for(measured: int, m: int) -> bool:
    """Whether a tile measured with so many rows is taken for m."""
    return _bucket(measured) == _bucket(m)


def _bucket(m: int) -> int:
    """m that share their tiles: up to 256 powers of two, as tiles have rows of A."""
    return max(_LEAST_ROWS, 1 << (m - 1).bit_length()) if m <= 256 else bucket(m, _LEAST_ROWS)


def candidates(config: MatmulConfig, m: int, gpu: GPU | None = None) -> list[Tile]:
    """Tiles worth measuring for m rows, the one that should be the fastest first."""
    return list(_candidates(config, _bucket(m), gpu or GPU()))


# block_m, bands, consumers, values of k in a stage, turns, split, blocks on a multiprocessor
_SHAPES = {
    8: ((8, 1, 1, 1024, 1, 4, 1), (8, 1, 1, 512, 1, 4, 1), (8, 1, 1, 256, 1, 4, 1),
        (8, 1, 1, 256, 1, 2, 2)),
    16: ((16, 1, 1, 128, 2, 4, 1), (16, 1, 1, 256, 1, 4, 1), (16, 1, 1, 256, 1, 2, 2)),
    32: ((32, 1, 1, 256, 1, 4, 1), (32, 1, 1, 256, 1, 2, 1)),
    64: ((64, 1, 1, 256, 1, 2, 1), (64, 1, 2, 128, 1, 2, 1), (64, 1, 2, 256, 1, 1, 1)),
    128: ((128, 1, 1, 128, 2, 2, 1), (128, 1, 2, 128, 2, 1, 1), (64, 1, 1, 256, 1, 2, 1),
          (64, 1, 2, 128, 1, 1, 1)),
    256: ((256, 1, 2, 128, 1, 1, 1), (128, 2, 2, 128, 1, 1, 1), (128, 1, 2, 128, 2, 1, 1),
          (64, 1, 2, 128, 1, 1, 1)),
}  # fmt: skip


@lru_cache(maxsize=4096)
def _candidates(config: MatmulConfig, m: int, gpu: GPU) -> tuple[Tile, ...]:
    tiles = []
    for block_m, bands, consumers, stage_k, turns, split, per_sm in _SHAPES[min(m, 256)]:
        if _fits_registers(config, block_m, bands):
            if _promoted(config) and block_m > 64:  # sums of two turns would not fit registers
                turns = 1
            tiles.append(
                _fitting(config, gpu, block_m, bands, consumers, stage_k, turns, split, per_sm)
            )
    found = dict.fromkeys(tile for tile in tiles if tile is not None)
    return tuple(sorted(found, key=lambda tile: microseconds(config, m, tile, gpu)))


def _promoted(config: MatmulConfig) -> bool:
    """Whether the sums of a body are added to those before in float32."""
    return group_of(config) != 0 or config.A_dtype != "int8"


def _fits_registers(config: MatmulConfig, block_m: int, bands: int) -> bool:
    """Promoted sums take up to as many registers again, sums of A's rows a few for each column."""
    sums = _needs_sums(config)
    if group_of(config) and sums:
        return block_m <= 64 and bands * block_m <= 128
    if _promoted(config):
        return bands * block_m <= 128 or bands == 1
    return block_m <= (128 if sums else 256)


def _fitting(
    config: MatmulConfig, gpu: GPU, block_m: int, bands: int, consumers: int, stage_k: int,
    unroll: int, split: int, per_sm: int,
) -> Tile | None:  # fmt: skip
    """The tile with as many stages as shared memory allows; None where those are too few."""
    stage_k = max(stage_k, FRAGMENT_8.block_k(config.bits))
    blocks = per_sm * gpu.multiprocessors
    least = max(3, 2 * split)  # a warpgroup's next stage arrives while it works on one
    for stages in range(16 // split * split, least - 1, -split):
        tile = Tile(block_m, bands, consumers, stage_k, stages, unroll, blocks, split, per_sm)
        if shared_bytes(config, tile) <= SHARED_BYTES // per_sm - (per_sm - 1) * 1024:
            return tile
    return None


def tiles_of(config: MatmulConfig, m: int, tile: Tile) -> int:
    """How many tiles a product is cut into."""
    return -(-config.N // tile.rows) * -(-m // tile.block_m)


def microseconds(config: MatmulConfig, m: int, tile: Tile, gpu: GPU) -> float:
    """What a product should take, from what 64 values of k cost a block.

    That is the matrix instructions, the chain of waits and decoding that a warpgroup goes through,
    and the bytes that arrive, which overlap, but not wholly (a p-norm of them). The constants are
    a fit to 136 measurements on an H200 (benchmarks/results/h200_batch8_tiles.csv), 10 % off.
    """
    tiles = tiles_of(config, m, tile)
    blocks = min(tile.blocks, tiles)
    waves = -(-tiles // blocks)
    together = -(-blocks // gpu.multiprocessors)
    halves = waves * -(-config.K // tile.body_k) * tile.body_k / 64
    integers = config.A_dtype == "int8"
    sums = tile.bands * tile.block_m / 2  # registers
    chain = 157.0 if integers or config.bits == 8 else 157 + 79 * tile.bands
    if _promoted(config):
        chain += sums * (2.5 if integers else 1.5)
    if group_of(config) and _needs_sums(config):
        chain += sums * 5
    matrix = tile.rows * tile.block_m * together / (73 if integers else 68)
    traffic = (64 * tile.block_m + 8 * tile.rows * config.bits) * together / 116
    step = (matrix**1.8 + (chain / tile.split) ** 1.8 + traffic**1.8) ** (1 / 1.8)
    read = config.N * config.K * config.bits / 8 / (0.85 * gpu.bytes_per_us)
    work = ((halves * step / gpu.cycles_per_us) ** 6 + read**6) ** (1 / 6)
    return 2.5 + work + 0.022 * waves * sums


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

    Operands as for bitblas.kernels.gpu.matmul; A starts on 16 bytes.
    """
    from . import batch8_kernels

    m = A.shape[0]
    tile = tile or candidates(config, m)[0]
    group = group_of(config)
    sums = Workspace((config.num_groups if group else 1, m), torch.int32)
    pdl: dict[str, Any] = {"launch_pdl": True} if PROGRAMMATIC_LAUNCH else {}
    steps = [_row_sums(config, A, sums, group, pdl)] if _needs_sums(config) else []
    arguments = {
        "A": tma_map(A, [tile.block_m, 128]),
        **tail_maps(A, (tile.block_m, 0), 128),
        "W": words_map(W, tile.bands * tile.consumers, tile.stage_k * config.bits // 256),
        "OUT": out,
        "OUT_MAP": results_map(out, [tile.block_m, 64 * tile.bands]),
        "SCALE": scale,
        "ZEROS": zeros,
        "INPUT_SCALE": input_scale,
        "BIAS": bias,
        "SUMS": sums if steps else None,
        "M": m,
        "N": config.N,
        "K": config.K,
        "G": config.num_groups,
        "EARLY": Settled(),
    }
    scale_bytes = max([2, *(x.itemsize for x in (scale, zeros) if x is not None)])
    constants = {"P": _constants(config, tile, scale_bytes, m <= tile.block_m)}
    # registers of a thread before warps are told apart: a block's threads share all of them
    options = {**pdl, "maxnreg": _THREADS[tile.consumers * tile.split, tile.per_sm][1]}
    grid = (min(tile.blocks, tiles_of(config, m, tile)),)
    steps.append(Launch(batch8_kernels.batch8_kernel, grid, arguments, constants, 4, 1, options))
    return steps


def _row_sums(
    config: MatmulConfig, A: torch.Tensor, sums: Workspace, group: int, pdl: dict[str, Any]
) -> Launch:
    from . import batch8_kernels

    m, block = A.shape[0], max(4096, group)
    arguments = {"A": A, "SUMS": sums, "M": m, "K": config.K, "G": config.num_groups}
    constants = {"GROUP": group, "BLOCK": block, "PROGRAMMATIC": bool(pdl)}
    grid = (m, -(-config.K // block) if group else 1)
    return Launch(batch8_kernels.row_sums_kernel, grid, arguments, constants, 4, 1, pdl)


@dataclass(frozen=True)
class Constants(ConstantsBase):
    """What the compiler knows of a product; batch8_kernels and batch_kernels explain the terms."""

    BITS: int
    WIDTH: int
    ASM: str
    CONSTRAINTS: str
    UNIT: float
    UNIT_BITS: int
    SHIFT: int
    SCALED: bool
    ZEROS_KIND: str
    GROUP: int
    FLOAT: bool
    PROMOTED: bool
    EXACT: bool
    BLOCK_M: int
    BANDS: int
    CONSUMERS: int
    SPLIT: int
    STAGES: int
    STAGE_K: int
    TURNS: int
    PROMOTE_HALVES: int
    PIECE_M: int
    PIECES: int
    TWO_SUMS: bool
    EXTRAS: int
    STAGE_GROUPS: int
    RUN: int
    ALIGNED: bool
    BYTES: int
    SWEEP: int
    ONE_M: bool
    REGISTERS: int
    LOADING_REGISTERS: int

    UNROLL = known(lambda c: c.TURNS * c.SPLIT)
    BODY_K = known(lambda c: c.STAGE_K * c.TURNS * c.SPLIT)
    STEPS = known(lambda c: c.STAGE_K // 128)
    STAGE_HALVES = known(lambda c: c.STAGE_K // 64)
    RUN_GROUPS = known(lambda c: max(1, c.RUN * c.STAGE_K // c.GROUP) if c.GROUP else 1)
    PACK = known(lambda c: packed_values(c))  # scales and zero points that are read as one
    K_PARTS = known(lambda c: c.STEPS)  # for batch_kernels.load_boxes: they lie in their order
    DECODED = known(lambda c: max(1, 4 // c.WIDTH))
    STAGE_CHUNKS = known(lambda c: c.STAGE_K * c.WIDTH // 256)


def _registers(config: MatmulConfig, tile: Tile) -> dict[str, int]:
    """Of threads: what a consumer's sums and operands take and 48 more, as far as there are; the
    warps that load get what is left, up to 128, and consumers the rest of it."""
    groups = tile.consumers * tile.split
    threads, each = _THREADS[groups, tile.per_sm]
    total = threads // 128 * each
    sums = tile.bands * tile.block_m // 2 * (2 if _promoted(config) else 1)
    least = (56 if tile.per_sm == 1 else 40) if _extras(config) else 24
    spare = total - groups * (sums + tile.bands * 32 + 48)
    loading = min(max(spare, least), 128 if _extras(config) else least) // 8 * 8
    return {
        "REGISTERS": min((total - loading) // groups // 8 * 8, 240),
        "LOADING_REGISTERS": loading,
    }


@lru_cache(maxsize=4096)
def _constants(config: MatmulConfig, tile: Tile, scale_bytes: int, one_m: bool) -> Constants:
    decoder, group = _decoder(config), group_of(config)
    assert decoder is not None  # _serves has seen to it
    promoted = min(tile.stage_k, group or tile.stage_k)
    piece = min(tile.block_m, 128) if _promoted(config) else tile.block_m
    if config.A_dtype != "int8" or piece < tile.block_m:
        promoted = 128  # the matrix units round sums of e4m3; operands are kept for all pieces
    # Stages whose scales of a row are read at once. One such read is under way at a time: of few
    # groups it would be the slowest of all; of many, registers become scarce.
    aligned = config.num_groups % 16 == 0 and not _needs_sums(config)
    each = 16 if aligned else 8 if tile.consumers * tile.split < 4 else 4
    run = max(1, min(each * group // tile.stage_k, 8)) if group else 1
    return Constants(
        BITS=config.bits,
        WIDTH=config.bits,
        ASM=decoder.asm,
        CONSTRAINTS=",".join(["=&r"] * (32 // config.bits) + ["r"] * 4),
        UNIT=decoder.unit,
        UNIT_BITS=max(0, -int(math.log2(decoder.unit))),
        SHIFT=decoder.shift,
        SCALED=config.with_scaling,
        ZEROS_KIND=config.zeros_mode if config.with_zeros else "none",
        GROUP=group,
        FLOAT=config.A_dtype != "int8",
        PROMOTED=_promoted(config),
        EXACT=_exact(config),
        BLOCK_M=tile.block_m,
        BANDS=tile.bands,
        CONSUMERS=tile.consumers,
        SPLIT=tile.split,
        STAGES=tile.stages,
        STAGE_K=tile.stage_k,
        TURNS=tile.unroll,
        PROMOTE_HALVES=promoted // 64,
        PIECE_M=piece,
        PIECES=tile.block_m // piece,
        TWO_SUMS=tile.block_m <= 64,
        EXTRAS=_extras(config),
        STAGE_GROUPS=_stage_groups(config, tile),
        RUN=run,
        ALIGNED=group != 0 and config.num_groups % max(1, run * tile.stage_k // group) == 0,
        BYTES=scale_bytes,
        SWEEP=SWEEP,
        ONE_M=one_m,
        **_registers(config, tile),
    )
