"""Launcher of the batch family: m > 1, 16-bit activations, Hopper; see batch_kernels.

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
from .decode import GPU, SHARED_BYTES, group_of
from .decoders import OperandDecoder, RawDecoder, operand_decoder, raw_operand_decoder
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
_FEW_ROWS = 16  # of A, for which tiles are no larger
_LEAST_ROWS = 32  # of A that the others have
_MOST_ROWS_OF_LOOKUPS = 64  # of A, beside which there is room for a table to look codes up in
MOST_PARTS = 128  # of a shared tile: flags that a warpgroup looks at
# what flags hold when a part is there
_TAG = 0x2545F4914F6CDD1D
SWEEP = 4  # tiles of A's rows that are done before the next ones of W's
_CONSUMERS = ((2, 1), (4, 2), (4, 4))  # warpgroups that multiply, and those that divide a stage's k


@dataclass(frozen=True)
class Tile(WgmmaTile):
    """How a product is cut up; batch_kernels explains the terms.

    share: whether blocks share the tiles that are left when each has done the same number of whole
    ones. per_sm: blocks for which a multiprocessor has room. along_k: consumers that have the same
    rows of W and divide the k of a stage.
    """

    share: bool = True
    per_sm: int = 1
    along_k: int = 1
    kernel: str = "batch"

    def __post_init__(self) -> None:
        if (self.consumers, self.along_k) not in _CONSUMERS:
            got = (self.consumers, self.along_k)
            raise ValueError(f"(consumers, along_k): got {got}, expected one of {_CONSUMERS}")
        if self.along_k > 1 and self.unroll > 1:
            raise ValueError(f"unroll: got {self.unroll}, expected 1 where consumers divide k")

    @property
    def rows(self) -> int:
        """Of W."""
        return 64 * self.bands * (self.consumers // self.along_k)

    @property
    def pieces(self) -> tuple[int, int]:
        """block_m as a power of two and what is left, which is one, too, or 0."""
        first = 1 << (self.block_m.bit_length() - 1)
        return first, self.block_m - first


def serves(config: MatmulConfig, m: int, arch: int) -> bool:
    """Whether this family computes the product of m rows on compute capability arch (90: 9.0)."""
    return arch // 10 == 9 and m > 1 and _serves(config) and bool(candidates(config, m))


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


def _decoder(config: MatmulConfig, tile: Tile) -> OperandDecoder:
    extras = _extras(config)
    decoder = operand_decoder(
        config.format, config.A_dtype, extras.based, extras.scaled, extras.added,
        lookup=tile.block_m <= _MOST_ROWS_OF_LOOKUPS,
    )  # fmt: skip
    assert decoder is not None  # _serves has seen to it
    return decoder


def raw_decoder(config: MatmulConfig, tile: Tile) -> RawDecoder | None:
    """The decoder of a tile whose operands are raw: without the scales, which the sums of each
    group are multiplied by instead; None for other tiles. For few rows of A that is less work."""
    if tile.block_m > _FEW_ROWS or tile.along_k != 4:
        return None
    zeros = config.zeros_mode if config.with_zeros else None
    # a group is at least what is decoded at a time; of many in a stage, the registers are too few
    least = 128 if planes(config.bits)[0][0] == 1 else 64
    if zeros == "rescale" or max(least, tile.stage_k // 8) > group_of(config):
        return None
    return raw_operand_decoder(config.format, config.A_dtype, zeros is not None)


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


@lru_cache(maxsize=4096)
def parts(shared: int, bodies: int, blocks: int) -> int:
    """The most parts that a shared tile is in."""
    each, rest = divmod(shared * bodies, blocks)

    def owner(body: int) -> int:
        more = rest * (each + 1)
        return body // (each + 1) if body < more else rest + (body - more) // each

    ends = range(bodies, (shared + 1) * bodies, bodies)
    return max((owner(end - 1) - owner(end - bodies) + 1 for end in ends), default=1)


def shared_bytes(config: MatmulConfig, tile: Tile) -> int:
    """Shared memory of a block: the ring, the results on their way out, and a bit of scratch."""
    stage = tile.stage_k * (2 * tile.block_m + tile.rows * config.bits // 8)
    group, extras, raw = group_of(config), _extras(config), raw_decoder(config, tile)
    kinds, sums = extras.based + extras.scaled + extras.added, tile.along_k - 1
    if raw is not None:
        kinds, sums = 1 + extras.based, sums + 1
    if group:
        stage += 4 * kinds * max(1, tile.stage_k // group) * tile.rows
    out = tile.block_m * tile.rows * (config.torch_out_dtype.itemsize + 4 * sums)
    return tile.stages * (stage + 16) + out + 1024 + _table_bytes(config, tile)


def _table_bytes(config: MatmulConfig, tile: Tile) -> int:
    """Of shared memory, for a table that codes are looked up in."""
    if tile.block_m > _MOST_ROWS_OF_LOOKUPS:
        return 0
    return (raw_decoder(config, tile) or _decoder(config, tile)).table_bytes


def stands_for(measured: int, m: int) -> bool:
    """Whether a tile measured with so many rows is taken for m."""
    return rows_of_bucket(measured) == rows_of_bucket(m)


def rows_of_bucket(m: int) -> int:
    """The largest of those m that share their tiles."""
    return 8 if m <= 8 else 16 if m <= 16 else bucket(m, _LEAST_ROWS)


def candidates(config: MatmulConfig, m: int, gpu: GPU | None = None) -> list[Tile]:
    """Tiles worth measuring for m rows, the one that should be the fastest first."""
    return list(_candidates(config, rows_of_bucket(m), gpu or GPU()))


# block_m, values of k in a stage, stages that are unrolled, blocks on a multiprocessor, consumers,
# those of them along k: those that were the fastest for some shape on an H200
_SHAPES = (
    *((8, 1024, 1, 1, 4, 4), (16, 1024, 1, 1, 4, 4), (32, 512, 1, 1, 4, 4), (64, 512, 1, 1, 4, 4)),
    *((32, 256, 1, 1, 2, 1), (32, 128, 1, 2, 2, 1), (64, 256, 1, 1, 2, 1), (64, 128, 1, 2, 2, 1)),
    *((64, 256, 1, 1, 4, 2), (96, 128, 1, 1, 2, 1), (128, 128, 1, 1, 2, 1), (160, 64, 2, 1, 2, 1)),
    *((192, 128, 1, 1, 2, 1), (256, 64, 2, 1, 2, 1), (320, 64, 2, 1, 2, 1)),
)
_MOST_IDLE = 1.35  # rows of A's tiles over A's, so that tiles much too large are not looked at


@lru_cache(maxsize=4096)
def _candidates(config: MatmulConfig, m: int, gpu: GPU) -> tuple[Tile, ...]:
    tiles: list[Tile] = []
    if m <= _FEW_ROWS and config.format.scale_encoding == "e8m0":
        return ()  # decode has its whole range of scales
    for block_m, *shape in _SHAPES:
        if -(-m // block_m) * block_m > _MOST_IDLE * m or block_m < min(m, 256) / 4:
            continue
        if block_m != m if m <= _FEW_ROWS else block_m <= _FEW_ROWS:
            continue  # few rows have tiles of their own
        if block_m > 256 and m > block_m:  # pays where it saves a second tile only
            continue
        tile = _fitting(config, gpu, block_m, *shape)
        if tile is not None and (tile.along_k == 1 or _few(config, m, tile)):
            tiles += _dealt(config, m, tile)
    tiles = list(dict.fromkeys(tiles))
    if _FEW_ROWS < m <= EQUAL_BITS:  # parts of shared tiles may depend on how many tiles there are
        start = bucket_start(m, _LEAST_ROWS)
        tiles = [
            tile
            for tile in tiles
            if not tile.share or tiles_of(config, start, tile) == tiles_of(config, m, tile)
        ]
    return tuple(sorted(tiles, key=lambda tile: microseconds(config, m, tile, gpu)))


def _few(config: MatmulConfig, m: int, tile: Tile) -> bool:
    """Whether rows of A are few enough to divide k: one tile of them, or, for four consumers, up to
    128 in as many tiles as run at a time."""
    tiles_n, tiles_m = tiles_of(config, m, tile)
    if tiles_m == 1:
        return True
    return tile.along_k == 4 and m <= 128 and tiles_n * tiles_m <= tile.blocks


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
    consumers: int,
    along_k: int,
) -> Tile | None:
    """The tile with as many stages as shared memory allows; None where those are too few."""
    least, group = along_k * FRAGMENT_16.block_k(config.bits), group_of(config)
    body_k, blocks = stage_k * unroll, per_sm * gpu.multiprocessors
    if group:  # what is prepared for more groups takes registers
        stage_k = min(stage_k, 2 * consumers * group)
        if along_k > 1 and least > along_k * along_k * group:
            return None
        if block_m <= _FEW_ROWS and group < 64:
            return None  # decode is faster: nvfp4, 8192 x 8192, m = 16, H200: 16.6 us, here 20.9
    stage_k = max(stage_k, least)
    while stage_k >= least:
        unroll = max(1, body_k // stage_k) if along_k == 1 else 1
        shape = (block_m, 1, consumers, stage_k, 1, unroll, blocks)
        tile = Tile(*shape, per_sm=per_sm, along_k=along_k)
        if block_m < _FEW_ROWS and raw_decoder(config, tile) is None:
            return None
        first = shared_bytes(config, tile)
        another = shared_bytes(config, replace(tile, stages=2)) - first
        most = min(16, 1 + (SHARED_BYTES // per_sm - first) // another)
        for stages in range(most, 2 if stage_k > least else 1, -1):
            if stages <= 3 * unroll or stages % unroll == 0:
                return replace(tile, stages=stages)  # a long ring has whole bodies: Constants.EVERY
        stage_k //= 2
    return None


@dataclass(frozen=True)
class _Costs:
    """Constants of the cost model. matrix: of the rate that the matrix units have on paper; weight,
    decoding: instructions for a lane's weight, and for each that its decoder has; cached: what the
    L2 gives, in reads of DRAM; power: of the norm; start, summed: microseconds, of a kernel, of a
    tile that is shared."""

    matrix: float
    weight: float
    decoding: float
    cached: float
    power: float
    start: float
    summed: float


# fits to measurements on an H200 (h200_batch_tiles.csv in benchmarks/results): of tiles whose
# consumers have rows of W each (509, 8 % off), of those that divide k (279, 7 %), and of those with
# raw operands (186, 8 %); those of nf4 with codes looked up came later
_COSTS = {
    "rows": _Costs(0.999, 0.95, 2.15, 1.68, 2.65, 2.11, 1.38),
    "k": _Costs(0.594, 0.0, 2.36, 2.58, 3.49, 1.91, 1.51),
    "raw": _Costs(0.620, 0.0, 2.46, 2.68, 4.98, 2.43, 1.47),
}


def microseconds(config: MatmulConfig, m: int, tile: Tile, gpu: GPU) -> float:
    """What a product should take, from counts of instructions and bytes.

    The busiest block decides: its matrix instructions, its others, what all blocks read of weights
    for the first time and what they read of anything overlap, but not wholly (a p-norm of them).
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
    raw = raw_decoder(config, tile)
    costs = _COSTS["rows" if tile.along_k == 1 else "k" if raw is None else "raw"]

    # for a value of k, in microseconds
    rows = tile.rows * per_sm / gpu.cycles_per_us
    matrix = rows * max(tile.block_m, 26) / 2048 / costs.matrix  # of 26 columns or fewer
    decoding = costs.decoding * (raw or _decoder(config, tile)).instructions_per_weight
    instructions = rows * (decoding + costs.weight) / 128
    weights = tile.rows * (config.bits + 0.25) / 8
    read = blocks * weights / gpu.bytes_per_us / min(tiles_m, SWEEP)
    cached = blocks * (weights + 2 * tile.block_m) / (costs.cached * gpu.bytes_per_us)
    parts_of_step = (matrix, instructions, read, cached)
    step = sum(part**costs.power for part in parts_of_step) ** (1 / costs.power)

    registers = tile.bands * tile.block_m / 2  # of the accumulator
    summed = costs.summed + (most - 1) * 0.0127 * registers if most > 1 else 0.0
    return costs.start + steps * step + summed


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
    in_parts = shared > 0 and parts(shared, bodies, blocks) > 1
    if not in_parts:
        shared, blocks = 0, min(blocks, tiles_n * tiles_m)
    each, rest = divmod(shared * bodies, blocks)
    slots = (blocks, tile.consumers // tile.along_k)
    first, more = tile.pieces
    part = (64 * tile.bands, tile.block_m)
    arguments = {
        "A": tma_map(A, [first, 64]),
        "MORE": tma_map(A, [more, 64]) if more else None,
        **tail_maps(A, tile.pieces, 64),
        "W": words_map(W, tile.rows // 64, _box_chunks(tile.stage_k * config.bits // 256)),
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
        "G": config.num_groups,
        "TILES_N": tiles_n,
        "TILES_M": tiles_m,
        "BODIES": bodies,
        "WAVES": (tiles_n * tiles_m - shared) // blocks,
        "EACH": each,
        "REST": rest,
        "EARLY": Settled(),
    }
    constants = {"P": _constants(config, tile, in_parts, tiles_m == 1)}
    # registers of a thread before warps are told apart
    options: dict[str, Any] = {"maxnreg": _registers_of_thread(config, tile)}
    if PROGRAMMATIC_LAUNCH:
        options["launch_pdl"] = True
    table = _table_bytes(config, tile)
    return [
        Launch(batch_kernels.batch_kernel, (blocks,), arguments, constants, 4, 1, options, table)
    ]


@dataclass(frozen=True)
class Constants(ConstantsBase):
    """What the compiler knows of a product; batch_kernels explains the terms. Kernels take all of
    them in one argument; an attribute is a constant to the compiler as it is a constexpr here."""

    BITS: int
    WIDTH: int
    EXTRA: int
    TILE_K: int
    ASM: str
    FILL: str
    CONSTRAINTS: str
    BASE: tuple[float, float]
    MOST: float
    UNIT: float
    SCALE_KIND: str
    ZEROS_KIND: str
    MINUS: bool
    SCALED: bool
    ADDED: bool
    RAW: bool
    UNITS: tuple[float, float]
    GROUP: int
    ALIGNED: bool
    BYTES: int
    BLOCK_M: int
    FIRST_M: int
    MORE_M: int
    BANDS: int
    CONSUMERS: int
    ALONG_K: int
    MOST_PARTS: int
    TAG: int
    STAGES: int
    STAGE_K: int
    UNROLL: int
    SWEEP: int
    SHARED: bool
    ONE_M: bool
    REGISTERS: int
    LOADING_REGISTERS: int

    ALONG_ROWS = known(lambda c: c.CONSUMERS // c.ALONG_K)
    TILE_BANDS = known(lambda c: c.BANDS * c.ALONG_ROWS)
    BODY_K = known(lambda c: c.STAGE_K * c.UNROLL)
    STEPS = known(lambda c: c.STAGE_K // 64)
    # a pair of words of 1-bit codes covers 128 values of k
    UNIT_K = known(lambda c: 128 if c.WIDTH == 1 else 64)
    TILE_UNITS = known(lambda c: c.TILE_K // c.UNIT_K)
    STAGE_UNITS = known(lambda c: c.STAGE_K // c.UNIT_K)
    MAIN_CHUNKS = known(lambda c: c.TILE_K * c.WIDTH // 256)
    TILE_CHUNKS = known(lambda c: c.TILE_K * (c.WIDTH + c.EXTRA) // 256)
    STAGE_CHUNKS = known(lambda c: c.STAGE_K // c.TILE_K * c.TILE_CHUNKS)
    BOX_CHUNKS = known(lambda c: _box_chunks(c.STAGE_CHUNKS))
    WORDS = known(lambda c: c.UNIT_K * c.WIDTH // 64)  # of a lane, of a unit
    # groups of a stage, of a unit, and what decoders take of them by way of shared memory
    STAGE_GROUPS = known(lambda c: max(1, c.STAGE_K // c.GROUP) if c.GROUP else 1)
    # stages that share the extras that lie in the ring with the first of them
    EVERY = known(lambda c: _stages_of_group(c))
    # stages whose scales of a row are read at once, and the groups that they are of
    RUN = known(lambda c: max(1, min(4 * c.GROUP // c.STAGE_K, 8)) if c.GROUP else 1)
    RUN_GROUPS = known(lambda c: max(1, c.RUN * c.STAGE_K // c.GROUP) if c.GROUP else 1)
    # scales and zero points that are read as one
    PACK = known(lambda c: packed_values(c))
    GROUPS = known(lambda c: max(1, c.UNIT_K // c.GROUP) if c.GROUP else 1)
    PART = known(lambda c: 64 * c.BANDS * c.BLOCK_M)  # of a tile, what a consumer sends
    EXTRAS = known(
        lambda c: 1 + c.MINUS if c.RAW else (c.MINUS + c.SCALED + c.ADDED) * (1 if c.GROUP else 0)
    )
    # of raw operands: values of k whose products are corrected together
    FOLD_K = known(lambda c: min(c.GROUP or c.STAGE_K, c.STAGE_K // c.ALONG_K))


def packed_values(c: Any) -> int:
    """Scales of so many BYTES, and zero points, that make an int32, where groups come in such."""
    pack: int = 4 // c.BYTES.value
    return pack if c.ALIGNED and c.RUN_GROUPS.value % pack == 0 else 1


def _box_chunks(chunks: int) -> int:
    """Of a stage's chunks, those that TMA loads at a time: a power of two."""
    return chunks & -chunks


def _warpgroups(config: MatmulConfig, tile: Tile) -> int:
    """Of a block: those that multiply, one that loads, and one that finishes raw tiles."""
    raw = raw_decoder(config, tile)
    return tile.consumers + 1 + (raw is not None)


def _registers_of_thread(config: MatmulConfig, tile: Tile) -> int:
    """Before warps are told apart."""
    return 65536 // tile.per_sm // (128 * _warpgroups(config, tile)) // 8 * 8


def _stages_of_group(c: Any) -> int:
    """Stages of a group, where bodies and the ring hold whole groups; else 1."""
    group, stage_k, unroll = (x.value for x in (c.GROUP, c.STAGE_K, c.UNROLL))
    stages = max(1, group // stage_k)
    whole = group and stage_k * unroll % group == 0 and c.STAGES.value % stages == 0
    return stages if whole else 1


def _registers(config: MatmulConfig, tile: Tile) -> dict[str, int]:
    """Of threads: what a consumer's accumulators and operands take and 40 more, as far as there
    are; the warps that load get what is left, up to 128, and consumers the rest of it."""
    grouped, raw = group_of(config) != 0, raw_decoder(config, tile) is not None
    total = _warpgroups(config, tile) * _registers_of_thread(config, tile)
    others = _warpgroups(config, tile) - tile.consumers
    least = (56 if tile.per_sm == 1 else 40) if grouped else 24
    each = tile.bands * (tile.block_m // (1 if raw else 2) + 32) + 40
    spare = (total - tile.consumers * each) // others
    loading = min(max(spare, least), 128 if grouped else least) // 8 * 8
    consumers = (total - others * loading) // tile.consumers // 8 * 8
    return {"REGISTERS": min(consumers, 240), "LOADING_REGISTERS": loading}


@lru_cache(maxsize=4096)
def _constants(config: MatmulConfig, tile: Tile, in_parts: bool, one_m: bool) -> Constants:
    decoder, extras, group = _decoder(config, tile), _extras(config), group_of(config)
    widths = [width for width, _ in planes(config.bits)]
    raw = raw_decoder(config, tile)
    found = Constants(
        BITS=config.bits,
        WIDTH=widths[0],
        EXTRA=widths[1] if len(widths) > 1 else 0,
        TILE_K=FRAGMENT_16.block_k(config.bits),
        ASM=(raw or decoder).asm,
        FILL=(raw or decoder).fill(4),
        CONSTRAINTS=(raw or decoder).constraints,
        BASE=decoder.base,
        MOST=decoder.most,
        UNIT=decoder.unit if raw is None else 1.0,
        SCALE_KIND=config.format.scale_encoding or "float",
        ZEROS_KIND=(config.zeros_mode or "original") if config.with_zeros else "none",
        MINUS=extras.based,
        SCALED=extras.scaled,
        ADDED=extras.added and raw is None,
        RAW=raw is not None,
        UNITS=raw.unit if raw is not None else (1.0, 1.0),
        GROUP=group,
        ALIGNED=False,
        BYTES=2 if config.format.scale_encoding is None else 1,
        BLOCK_M=tile.block_m,
        FIRST_M=tile.pieces[0],
        MORE_M=tile.pieces[1],
        BANDS=tile.bands,
        CONSUMERS=tile.consumers,
        ALONG_K=tile.along_k,
        MOST_PARTS=MOST_PARTS,
        TAG=_TAG,
        STAGES=tile.stages,
        STAGE_K=tile.stage_k,
        UNROLL=tile.unroll,
        SWEEP=SWEEP,
        SHARED=in_parts,
        ONE_M=one_m,
        **_registers(config, tile),
    )
    return replace(found, ALIGNED=config.num_groups % found.RUN_GROUPS.value == 0)
