"""Launcher of the batch family: m > 16, 16-bit activations, Hopper; see batch_kernels.

`serves` says whether the family computes a product, `candidates` lists the tiles worth measuring,
the one that `microseconds` predicts to be the fastest first, `launches` says what to start.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ..config import MatmulConfig, MatmulConfigWithSplitK
from ..formats import Table
from ..layouts import FRAGMENT_16, Fragment, planes
from .decode import GPU, MAX_ROWS, SHARED_BYTES, group_of
from .decoders import OperandDecoder, operand_decoder
from .launch import EQUAL_BITS, PROGRAMMATIC_LAUNCH, Launch, Settled, Workspace
from .versions import gluon_available
from .wgmma import (
    ConstantsBase,
    WgmmaTile,
    bucket,
    bucket_start,
    known,
    results_map,
    tail_maps,
    tma_map,
    words_map,
)

KERNELS = ("batch",)
_LEAST_ROWS = 32  # of A that a tile has
MOST_PARTS = 128  # of a shared tile: flags that a warpgroup looks at
# what flags hold when a part is there
_TAG = 0x2545F4914F6CDD1D
SWEEP = 4  # tiles of A's rows that are done before the next ones of W's
# blocks on a multiprocessor -> registers of each of a block's 384 threads
_REGISTERS = {1: 168, 2: 80}


@dataclass(frozen=True)
class Tile(WgmmaTile):
    """How a product is cut up; batch_kernels explains the terms.

    share: whether blocks share the tiles that are left when each has done the same number of whole
    ones. per_sm: blocks for which a multiprocessor has room.
    """

    share: bool = True
    per_sm: int = 1
    kernel: str = "batch"

    def __post_init__(self) -> None:
        if self.consumers != 2:
            raise ValueError(f"consumers: got {self.consumers}, expected 2")

    @property
    def pieces(self) -> tuple[int, int]:
        """block_m as a power of two and what is left, which is one, too, or 0."""
        first = 1 << (self.block_m.bit_length() - 1)
        return first, self.block_m - first


def serves(config: MatmulConfig, m: int, arch: int) -> bool:
    """Whether this family computes the product of m rows on compute capability arch (90: 9.0)."""
    return arch // 10 == 9 and m > MAX_ROWS and _serves(config)


@lru_cache(maxsize=4096)
def _serves(config: MatmulConfig) -> bool:
    if config.A_dtype not in ("float16", "bfloat16") or config.K % 8:
        return False  # rows of A start on 16 bytes, for TMA
    if (
        not gluon_available()
        or operand_decoder(config.format, config.A_dtype, *[False] * 3) is None
    ):
        return False
    if isinstance(config, MatmulConfigWithSplitK) and config.k_split > 1:
        return False
    # operands rounded to A's dtype are not exact enough for a finer result
    finer = config.out_dtype == "float32" or config.out_dtype != config.A_dtype == "bfloat16"
    if finer and (config.A_dtype == "bfloat16" or isinstance(config.format.decoder, Table)):
        return False
    group = group_of(config)
    return group == 0 or (group >= _smallest_group(config) and group & (group - 1) == 0)


def _smallest_group(config: MatmulConfig) -> int:
    """The values of k in a word; of 3 bits, whose stages are long, what leaves enough registers."""
    widths = [width for width, _ in planes(config.bits)]
    return 64 if len(widths) > 1 else max(16, 64 // widths[0])


def layout(config: MatmulConfig) -> Fragment:
    """The packed layout that the kernels read."""
    return FRAGMENT_16


@dataclass(frozen=True)
class _Extras:
    """What of scales and zero points goes into the operand."""

    based: bool
    scaled: bool
    added: bool


def _extras(config: MatmulConfig) -> _Extras:
    kind = config.zeros_mode if config.with_zeros else None
    # a scale for whole rows is left to the end, unless zero points were scaled before
    scaled = config.with_scaling and (group_of(config) != 0 or kind == "rescale")
    return _Extras(kind in ("original", "quantized"), scaled, kind in ("original", "rescale"))


def _decoder(config: MatmulConfig) -> OperandDecoder:
    extras = _extras(config)
    decoder = operand_decoder(
        config.format, config.A_dtype, extras.based, extras.scaled, extras.added
    )
    assert decoder is not None  # _serves has seen to it
    return decoder


def tiles_of(config: MatmulConfig, m: int, tile: Tile) -> tuple[int, int]:
    """(tiles of W's rows, tiles of A's rows)."""
    return -(-config.N // tile.rows), -(-m // tile.block_m)


def shared_tiles(config: MatmulConfig, m: int, tile: Tile) -> int:
    """Tiles whose bodies are dealt out to all blocks; none if there are fewer bodies than blocks,
    or too many parts of a tile."""
    tiles_n, tiles_m = tiles_of(config, m, tile)
    blocks, bodies = _blocks(config, m, tile), _bodies(config, tile)
    shared = tiles_n * tiles_m % blocks if tile.share else 0
    few = shared * bodies >= blocks and parts(shared, bodies, blocks) <= MOST_PARTS
    return shared if few else 0


def _bodies(config: MatmulConfig, tile: Tile) -> int:
    return -(-config.K // tile.body_k)


def _blocks(config: MatmulConfig, m: int, tile: Tile) -> int:
    """Those that have something to do."""
    tiles_n, tiles_m = tiles_of(config, m, tile)
    each = _bodies(config, tile) if tile.share else 1
    return min(tile.blocks, tiles_n * tiles_m * each)


def parts(shared: int, bodies: int, blocks: int) -> int:
    """The most parts that a shared tile is in."""
    units, most = shared * bodies, 1
    for tile in range(shared):
        first = ((tile * bodies + 1) * blocks - 1) // units
        last = ((tile + 1) * bodies * blocks - 1) // units
        most = max(most, last - first + 1)
    return most


def shared_bytes(config: MatmulConfig, tile: Tile) -> int:
    """Shared memory of a block: the ring, the results on their way out, and a bit of scratch."""
    stage = tile.stage_k * (2 * tile.block_m + tile.rows * config.bits // 8)
    group, extras = group_of(config), _extras(config)
    if group:
        kinds = extras.based + extras.scaled + extras.added
        stage += 4 * kinds * max(1, tile.stage_k // group) * tile.rows
    out = tile.block_m * tile.rows * config.torch_out_dtype.itemsize
    return tile.stages * (stage + 16) + out + 1024


def stands_for(measured: int, m: int) -> bool:
    """Whether a tile measured with so many rows is taken for m."""
    return bucket(measured, _LEAST_ROWS) == bucket(m, _LEAST_ROWS)


def candidates(config: MatmulConfig, m: int, gpu: GPU | None = None) -> list[Tile]:
    """Tiles worth measuring for m rows, the one that should be the fastest first."""
    return list(_candidates(config, bucket(m, _LEAST_ROWS), gpu or GPU()))


# block_m, values of k in a stage, stages that are unrolled, blocks on a multiprocessor: those that
# were the fastest for some shape on an H200
_SHAPES = (
    *((32, 256, 1, 1), (32, 128, 1, 2), (64, 256, 1, 1), (64, 128, 1, 2), (96, 128, 1, 1)),
    *((128, 128, 1, 1), (160, 64, 2, 1), (192, 128, 1, 1), (256, 64, 2, 1), (320, 64, 2, 1)),
)
_MOST_IDLE = 1.35  # rows of A's tiles over A's, so that tiles much too large are not looked at


@lru_cache(maxsize=4096)
def _candidates(config: MatmulConfig, m: int, gpu: GPU) -> tuple[Tile, ...]:
    tiles = []
    for block_m, *shape in _SHAPES:
        if -(-m // block_m) * block_m > _MOST_IDLE * m or block_m < min(m, 256) / 4:
            continue
        if block_m > 256 and m > block_m:  # pays where it saves a second tile only
            continue
        tile = _fitting(config, gpu, block_m, *shape)
        if tile is not None:
            tiles += _dealt(config, m, tile)
    tiles = list(dict.fromkeys(tiles))
    if m <= EQUAL_BITS:  # parts of shared tiles may depend on how many tiles there are
        start = bucket_start(m, _LEAST_ROWS)
        tiles = [
            tile
            for tile in tiles
            if not tile.share or tiles_of(config, start, tile) == tiles_of(config, m, tile)
        ]
    return tuple(sorted(tiles, key=lambda tile: microseconds(config, m, tile, gpu)))


def _dealt(config: MatmulConfig, m: int, tile: Tile) -> list[Tile]:
    """The tile with its work dealt out to blocks in each way that may be the best."""
    tiles_n, tiles_m = tiles_of(config, m, tile)
    tiles, blocks = tiles_n * tiles_m, tile.blocks
    alone = replace(tile, share=False)
    if tile.per_sm > 1 and tiles < 0.75 * blocks:
        return []  # fuller multiprocessors take longer than the parts would save
    if tiles <= blocks // 2:  # as many blocks for each tile, not so many that the sum takes long
        counts = {min(blocks // tiles, most) for most in (4, 8, 16)}
        return [replace(tile, blocks=count * tiles) for count in sorted(counts)] + [tile]
    return [alone, tile] if tiles % blocks else [alone]


def _fitting(
    config: MatmulConfig,
    gpu: GPU,
    block_m: int,
    stage_k: int,
    unroll: int,
    per_sm: int,
) -> Tile | None:
    """The tile with as many stages as shared memory allows; None where those are too few."""
    least, group = FRAGMENT_16.block_k(config.bits), group_of(config)
    body_k, blocks = stage_k * unroll, per_sm * gpu.multiprocessors
    if group:
        stage_k = min(stage_k, 4 * group)  # what is prepared for more groups takes registers
    stage_k = max(stage_k, least)
    while stage_k >= least:
        for stages in range(16, 2 if stage_k > least else 1, -1):
            unroll = max(1, body_k // stage_k)
            if stages > 2 * unroll and stages % unroll:
                continue  # a ring of whole bodies: see Constants.EVERY
            tile = Tile(block_m, 1, 2, stage_k, stages, unroll, blocks, per_sm=per_sm)
            if shared_bytes(config, tile) <= SHARED_BYTES // per_sm:
                return tile
        stage_k //= 2
    return None


def microseconds(config: MatmulConfig, m: int, tile: Tile, gpu: GPU) -> float:
    """What a product should take, from counts of instructions and bytes.

    The busiest block decides: its matrix instructions, its others, what all blocks read of weights
    for the first time and what they read of anything overlap, but not wholly (a p-norm of them);
    the ends of segments do not. The constants are a fit to 640 measurements on an H200
    (benchmarks/results/h200_batch_tiles.csv), 9 % off.
    """
    tiles_n, tiles_m = tiles_of(config, m, tile)
    blocks, bodies = _blocks(config, m, tile), _bodies(config, tile)
    shared = shared_tiles(config, m, tile)
    waves = (
        (tiles_n * tiles_m - shared) // blocks if tile.share else -(-tiles_n * tiles_m // blocks)
    )
    most = parts(shared, bodies, blocks) if shared else 1
    steps = (waves * bodies - (-shared * bodies // blocks)) * tile.body_k
    per_sm = -(-blocks // gpu.multiprocessors)

    # for a value of k, in microseconds
    rows = tile.rows * per_sm / gpu.cycles_per_us
    matrix = rows * tile.block_m / 2048 / 0.818
    instructions = rows * (_decoder(config).instructions_per_weight + 3.62) / 128
    weights = tile.rows * (config.bits + 0.25) / 8
    read = blocks * weights / gpu.bytes_per_us / min(tiles_m, SWEEP)
    cached = blocks * (weights + 2 * tile.block_m) / (2.06 * gpu.bytes_per_us)
    step = sum(part**2.59 for part in (matrix, instructions, read, cached)) ** (1 / 2.59)

    registers = tile.bands * tile.block_m / 2  # of the accumulator
    even = shared and blocks % shared == 0 and bodies * shared % blocks == 0
    segments = waves + (0 if not shared else 1 if even else 2)
    summed = 3.23 + (most - 1) * 0.0127 * registers if most > 1 else 0.0
    return 1.61 + steps * step + segments * 0.0064 * registers + summed


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

    Operands as for bitblas.kernels.portable.matmul.
    """
    from . import batch_kernels

    m = A.shape[0]
    tile = tile or candidates(config, m)[0]
    tiles_n, tiles_m = tiles_of(config, m, tile)
    blocks, bodies = _blocks(config, m, tile), _bodies(config, tile)
    shared = shared_tiles(config, m, tile)
    whole = tiles_n * tiles_m - shared
    in_parts = shared > 0 and parts(shared, bodies, blocks) > 1
    slots = (blocks, tile.consumers)
    first, more = tile.pieces
    part = (64 * tile.bands, tile.block_m)
    arguments = {
        "A": tma_map(A, [first, 64]),
        "MORE": tma_map(A, [more, 64]) if more else None,
        **tail_maps(A, tile.pieces, 64),
        "W": words_map(W, tile.bands * tile.consumers),
        "OUT": out,
        "OUT_MAP": results_map(out, [first, 64 * tile.bands]),
        "MORE_MAP": results_map(out, [more, 64 * tile.bands]) if more else None,
        "SCALE": scale.view(torch.uint8) if scale is not None and scale.itemsize == 1 else scale,
        "ZEROS": zeros,
        "BIAS": bias,
        "GLOBAL_SCALE": global_scale,
        "PARTS": Workspace((*slots, *part), torch.float32) if in_parts else None,
        "FLAGS": Workspace(slots, torch.int64) if in_parts else None,
        "M": m,
        "N": config.N,
        "K": config.K,
        "G": config.num_groups,
        "WHOLE": whole,
        "EARLY": Settled(),
    }
    constants = {"P": _constants(config, tile, in_parts)}
    # registers of a thread before warps are told apart
    options: dict[str, Any] = {"maxnreg": _REGISTERS[tile.per_sm]}
    if PROGRAMMATIC_LAUNCH:
        options["launch_pdl"] = True
    return [Launch(batch_kernels.batch_kernel, (blocks,), arguments, constants, 4, 1, options)]


@dataclass(frozen=True)
class Constants(ConstantsBase):
    """What the compiler knows of a product; batch_kernels explains the terms. Kernels take all of
    them in one argument; an attribute is a constant to the compiler as it is a constexpr here."""

    BITS: int
    WIDTH: int
    EXTRA: int
    TILE_K: int
    ASM: str
    CONSTRAINTS: str
    BASE: tuple[float, float]
    MOST: float
    UNIT: float
    SCALE_KIND: str
    ZEROS_KIND: str
    MINUS: bool
    SCALED: bool
    ADDED: bool
    GROUP: int
    ALIGNED: bool
    BLOCK_M: int
    FIRST_M: int
    MORE_M: int
    BANDS: int
    CONSUMERS: int
    MOST_PARTS: int
    TAG: int
    STAGES: int
    STAGE_K: int
    UNROLL: int
    SWEEP: int
    SHARED: bool
    REGISTERS: int
    LOADING_REGISTERS: int

    BODY_K = known(lambda c: c.STAGE_K * c.UNROLL)
    STEPS = known(lambda c: c.STAGE_K // 64)
    # a pair of words of 1-bit codes covers 128 values of k
    UNIT_K = known(lambda c: 128 if c.WIDTH == 1 else 64)
    TILE_UNITS = known(lambda c: c.TILE_K // c.UNIT_K)
    STAGE_UNITS = known(lambda c: c.STAGE_K // c.UNIT_K)
    BODY_UNITS = known(lambda c: c.BODY_K // c.UNIT_K)
    MAIN_CHUNKS = known(lambda c: c.TILE_K * c.WIDTH // 256)
    TILE_CHUNKS = known(lambda c: c.TILE_K * (c.WIDTH + c.EXTRA) // 256)
    STAGE_CHUNKS = known(lambda c: c.STAGE_K // c.TILE_K * c.TILE_CHUNKS)
    WORDS = known(lambda c: c.UNIT_K * c.WIDTH // 64)  # of a lane, of a unit
    # groups of a stage, of a unit, and what decoders take of them by way of shared memory
    STAGE_GROUPS = known(lambda c: max(1, c.STAGE_K // c.GROUP) if c.GROUP else 1)
    # stages that share the extras that lie in the ring with the first of them
    EVERY = known(lambda c: _stages_of_group(c))
    # stages whose scales of a row are read at once, and the groups that they are of
    RUN = known(lambda c: max(1, min(4 * c.GROUP // c.STAGE_K, 8)) if c.GROUP else 1)
    RUN_GROUPS = known(lambda c: max(1, c.RUN * c.STAGE_K // c.GROUP) if c.GROUP else 1)
    GROUPS = known(lambda c: max(1, c.UNIT_K // c.GROUP) if c.GROUP else 1)
    PART = known(lambda c: 64 * c.BANDS * c.BLOCK_M)  # of a tile, what a consumer sends
    EXTRAS = known(lambda c: (c.MINUS + c.SCALED + c.ADDED) * (1 if c.GROUP else 0))


def _stages_of_group(c: Any) -> int:
    """Stages of a group, where bodies and the ring hold whole groups; else 1."""
    group, stage_k, unroll = (x.value for x in (c.GROUP, c.STAGE_K, c.UNROLL))
    stages = max(1, group // stage_k)
    whole = group and stage_k * unroll % group == 0 and c.STAGES.value % stages == 0
    return stages if whole else 1


def _registers(tile: Tile, grouped: bool) -> dict[str, int]:
    """Of threads: what a consumer's accumulators and operands take and 40 more, as far as there
    are; the warps that load get what is left, up to 128, and consumers the rest of it."""
    total = 3 * _REGISTERS[tile.per_sm]
    least = (56 if tile.per_sm == 1 else 40) if grouped else 24
    spare = total - tile.consumers * (tile.bands * (tile.block_m // 2 + 32) + 40)
    loading = min(max(spare, least), 128 if grouped else least) // 8 * 8
    consumers = (total - loading) // tile.consumers // 8 * 8
    return {"REGISTERS": min(consumers, 240), "LOADING_REGISTERS": loading}


@lru_cache(maxsize=4096)
def _constants(config: MatmulConfig, tile: Tile, in_parts: bool) -> Constants:
    decoder, extras, group = _decoder(config), _extras(config), group_of(config)
    widths = [width for width, _ in planes(config.bits)]
    found = Constants(
        BITS=config.bits,
        WIDTH=widths[0],
        EXTRA=widths[1] if len(widths) > 1 else 0,
        TILE_K=FRAGMENT_16.block_k(config.bits),
        ASM=decoder.asm,
        CONSTRAINTS=decoder.constraints,
        BASE=decoder.base,
        MOST=decoder.most,
        UNIT=decoder.unit,
        SCALE_KIND=config.format.scale_encoding or "float",
        ZEROS_KIND=(config.zeros_mode or "original") if config.with_zeros else "none",
        MINUS=extras.based,
        SCALED=extras.scaled,
        ADDED=extras.added,
        GROUP=group,
        ALIGNED=False,
        BLOCK_M=tile.block_m,
        FIRST_M=tile.pieces[0],
        MORE_M=tile.pieces[1],
        BANDS=tile.bands,
        CONSUMERS=tile.consumers,
        MOST_PARTS=MOST_PARTS,
        TAG=_TAG,
        STAGES=tile.stages,
        STAGE_K=tile.stage_k,
        UNROLL=tile.unroll,
        SWEEP=SWEEP,
        SHARED=in_parts,
        **_registers(tile, group != 0),
    )
    return replace(found, ALIGNED=config.num_groups % found.RUN_GROUPS.value == 0)
