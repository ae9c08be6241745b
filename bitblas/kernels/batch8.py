"""Launcher of the batch8 family: int8 activations, Hopper; see batch8_kernels.

`serves` says whether the family computes a product, `candidates` lists the tiles worth measuring,
the one that `microseconds` predicts to be the fastest first, `launches` says what to start.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from triton.language import constexpr

from ..config import FLOAT_ACTIVATIONS, MatmulConfig, MatmulConfigWithSplitK
from ..layouts import FRAGMENT_8, Fragment
from . import batch
from .decode import GPU, SHARED_BYTES
from .launch import PROGRAMMATIC_LAUNCH, Launch, Settled, Workspace
from .versions import gluon_available

KERNELS = ("batch8",)
_MOST_K = 1 << 17  # sums of products of two bytes fit 32 bits


@dataclass(frozen=True)
class Tile(batch.Tile):
    """As the batch family's; stage_k is a multiple of 128."""

    kernel: str = "batch8"


def serves(config: MatmulConfig, m: int, arch: int) -> bool:
    """Whether this family computes the product of m rows on compute capability arch (90: 9.0)."""
    return arch // 10 == 9 and _serves(config)


@lru_cache(maxsize=4096)
def _serves(config: MatmulConfig) -> bool:
    if config.A_dtype != "int8" or config.out_dtype not in FLOAT_ACTIVATIONS:
        return False
    if isinstance(config, MatmulConfigWithSplitK) and config.k_split > 1:
        return False
    if config.K % 16 or config.K >= _MOST_K:  # rows of A start on 16 bytes, for TMA
        return False
    if config.with_zeros or (config.with_scaling and config.num_groups > 1):
        return False
    return byte_decoder(config) is not None and gluon_available()


def layout(config: MatmulConfig) -> Fragment:
    """The packed layout that the kernels read."""
    return FRAGMENT_8


@lru_cache
def byte_decoder(config: MatmulConfig) -> tuple[str, float] | None:
    """(PTX from the four words of a chunk, the operands behind the registers, to registers of four
    bytes; what a byte's unit is worth). None for formats that it is not there for.

    (word & mask) ^ flip, of a shifted word, leaves (code << up & mask) ^ flip in each byte.
    """
    bits, values = config.bits, config.format.code_values()
    if bits not in (1, 2, 4, 8):
        return None
    field, count, per = (1 << bits) - 1, 32 // bits, 8 // bits
    # codes at a byte's top, as signed formats want them, with 1 bit for -1 and 1; or at its bottom
    for up, flip, unit in (
        (8 - bits, 0x80 if bits < 8 else 0, 2.0 ** (bits - 8)),
        (7, 0xC0, 2.0**-6),
        (0, 0, 1.0),
    ):
        codes = torch.tensor([(code << up & 0xFF) ^ flip for code in range(1 << bits)])
        if (codes.to(torch.uint8).view(torch.int8) * unit).tolist() == list(values):
            break
    else:
        return None
    mask = (field << up & 0xFF) * 0x01010101
    lines = ["{ .reg .b32 t;"]
    for r in range(count):
        word, left = f"${count + r // per}", up - r % per * bits
        if left:
            lines.append(f"{'shl.b32' if left > 0 else 'shr.u32'} t, {word}, {abs(left)};")
            word = "t"
        lines.append(f"lop3.b32 ${r}, {word}, {mask:#x}, {flip * 0x01010101:#x}, 0x6a;")
    return " ".join(lines) + " }", unit


def shared_bytes(config: MatmulConfig, tile: Tile) -> int:
    """Shared memory of a block: the ring, and the results on their way out."""
    stage = tile.stage_k * (tile.block_m + tile.rows * config.bits // 8)
    out = tile.block_m * tile.rows * config.torch_out_dtype.itemsize
    return tile.stages * (stage + 16) + out


def stands_for(measured: int, m: int) -> bool:
    """Whether a tile measured with so many rows is taken for m."""
    return _bucket(measured) == _bucket(m)


def _bucket(m: int) -> int:
    return 16 if m <= 16 else batch._bucket(m)


def candidates(config: MatmulConfig, m: int, gpu: GPU | None = None) -> list[Tile]:
    """Tiles worth measuring for m rows, the one that should be the fastest first."""
    return list(_candidates(config, _bucket(m), gpu or GPU()))


# block_m, bands, consumers, values of k in a stage, stages that are unrolled
_SHAPES = {
    16: ((16, 1, 4, 256, 1), (16, 1, 2, 256, 2), (16, 2, 2, 256, 1)),
    32: ((32, 1, 4, 256, 1), (32, 1, 2, 256, 2), (32, 2, 2, 256, 1)),
    64: ((64, 1, 4, 256, 1), (64, 1, 2, 256, 2), (64, 2, 2, 256, 1)),
    128: ((128, 2, 2, 128, 2), (128, 1, 2, 128, 2)),
    256: ((256, 1, 2, 128, 2), (128, 2, 2, 128, 2)),
}


@lru_cache(maxsize=4096)
def _candidates(config: MatmulConfig, m: int, gpu: GPU) -> tuple[Tile, ...]:
    tiles = []
    for shape in _SHAPES[min(m, 256)]:
        tile = _fitting(config, gpu, *shape)
        if tile is not None:
            tiles += [tile, Tile(**{**tile.__dict__, "share": False})]
    return tuple(sorted(tiles, key=lambda tile: microseconds(config, m, tile, gpu)))


def _fitting(
    config: MatmulConfig, gpu: GPU, block_m: int, bands: int, consumers: int, stage_k: int,
    unroll: int,
) -> Tile | None:  # fmt: skip
    """The tile with as many stages as shared memory allows; None where those are too few."""
    stage_k = max(stage_k, FRAGMENT_8.block_k(config.bits))
    for stages in range(8, 1, -1):
        tile = Tile(block_m, bands, consumers, stage_k, stages, unroll, gpu.multiprocessors)
        if shared_bytes(config, tile) <= SHARED_BYTES:
            return tile
    return None


def microseconds(config: MatmulConfig, m: int, tile: Tile, gpu: GPU) -> float:
    """What a product should take, from counts of instructions and bytes."""
    tiles_n, tiles_m = batch.tiles_of(config, m, tile)
    blocks, bodies = batch._blocks(config, m, tile), batch._bodies(config, tile)
    shared = batch.shared_tiles(config, m, tile)
    steps = -(-(tiles_n * tiles_m - shared) // blocks) * bodies + -(-shared * bodies // blocks)
    weights = tile.rows * tile.body_k
    cycles = max(
        weights * tile.block_m / 4096 / 0.8,
        (tile.body_k * tile.block_m + weights * config.bits / 8) / 30,
    )
    serial = 4.0 + (2.0 if shared else 0.0)
    parts = batch.parts(shared, bodies, blocks) if shared else 0
    summed = 2 * shared * parts * tile.rows * tile.block_m * 4 / 5e6
    return steps * cycles / gpu.cycles_per_us + serial + summed


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
    from . import batch8_kernels
    from .versions import TensorDescriptor, gl

    m = A.shape[0]
    tile = tile or candidates(config, m)[0]
    tiles_n, tiles_m = batch.tiles_of(config, m, tile)
    blocks, bodies = batch._blocks(config, m, tile), batch._bodies(config, tile)
    shared = batch.shared_tiles(config, m, tile)
    most = batch.parts(shared, bodies, blocks) if shared else 1
    partial = Workspace((2 * blocks, tile.rows, tile.block_m), torch.float32) if most > 1 else None
    swizzled = gl.NVMMASharedLayout.get_default_for([tile.block_m, 128], gl.int8)
    arguments = {
        "A": TensorDescriptor.from_tensor(A, [tile.block_m, 128], swizzled),
        "W": batch._words(config, W, tile),
        "OUT": out,
        "OUT_MAP": batch._results(out, tile),
        "SCALE": scale,
        "INPUT_SCALE": input_scale,
        "BIAS": bias,
        "PARTS": partial,
        "M": m,
        "N": config.N,
        "K": config.K,
        "WHOLE": tiles_n * tiles_m - shared,
        "EARLY": Settled(),
    }
    constants: dict[str, Any] = {"P": _constants(config, tile, partial is not None)}
    pdl: dict[str, Any] = {"launch_pdl": True} if PROGRAMMATIC_LAUNCH else {}
    # registers of a thread before warps are told apart: a block's threads share all of them
    options = {**pdl, "maxnreg": {2: 168, 4: 96}[tile.consumers]}
    steps = [Launch(batch8_kernels.batch8_kernel, (blocks,), arguments, constants, 4, 1, options)]
    if partial is not None:
        steps.append(batch.sum_step(config, m, tile, partial, out, bias, None))
    return steps


@dataclass(frozen=True)
class Constants:
    """What the compiler knows of a product, as batch.Constants; batch8_kernels explains them."""

    WIDTH: int
    ASM: str
    CONSTRAINTS: str
    UNIT: float
    BLOCK_M: int
    BANDS: int
    CONSUMERS: int
    STAGES: int
    STAGE_K: int
    UNROLL: int
    SWEEP: int
    SHARED: bool
    REGISTERS: int

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, constexpr(getattr(self, field.name)))

    BODY_K = batch._known(lambda c: c.STAGE_K * c.UNROLL)
    STEPS = batch._known(lambda c: c.STAGE_K // 128)
    STAGE_HALVES = batch._known(lambda c: c.STAGE_K // 64)
    BODY_HALVES = batch._known(lambda c: c.STAGE_K * c.UNROLL // 64)
    DECODED = batch._known(lambda c: max(1, 4 // c.WIDTH))
    STAGE_CHUNKS = batch._known(lambda c: c.STAGE_K * c.WIDTH // 256)


@lru_cache(maxsize=4096)
def _constants(config: MatmulConfig, tile: Tile, in_parts: bool) -> Constants:
    decoder = byte_decoder(config)
    assert decoder is not None  # _serves has seen to it
    asm, unit = decoder
    count = 32 // config.bits
    return Constants(
        WIDTH=config.bits,
        ASM=asm,
        CONSTRAINTS=",".join(["=&r"] * count + ["r"] * 4),
        UNIT=unit,
        BLOCK_M=tile.block_m,
        BANDS=tile.bands,
        CONSUMERS=tile.consumers,
        STAGES=tile.stages,
        STAGE_K=tile.stage_k,
        UNROLL=tile.unroll,
        SWEEP=batch.SWEEP,
        SHARED=in_parts,
        REGISTERS={2: 240, 4: 112}[tile.consumers],
    )
