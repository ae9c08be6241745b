"""What the launchers of the batch families share: tiles, TMA maps, constants in one argument."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from triton.language import constexpr


@dataclass(frozen=True)
class WgmmaTile:
    """How a product is cut up; batch_kernels explains the terms. blocks: thread blocks."""

    block_m: int
    bands: int
    consumers: int
    stage_k: int
    stages: int
    unroll: int
    blocks: int

    @property
    def rows(self) -> int:
        """Of W."""
        return 64 * self.bands * self.consumers

    @property
    def body_k(self) -> int:
        return self.stage_k * self.unroll


def bucket(m: int, least: int) -> int:
    """m that share their tiles, from `least` up: multiples of 32 up to 192, of 64 up to 512, above
    of a quarter of the power of two below."""
    step = _bucket_step(m)
    return max(least, -(-m // step) * step)


def bucket_start(m: int, least: int) -> int:
    """The smallest m that shares its tiles with the largest one of a bucket."""
    return 1 if m <= least else m - _bucket_step(m) + 1


def _bucket_step(m: int) -> int:
    return 32 if m <= 192 else max(64, 1 << ((m - 1).bit_length() - 3))


def tma_map(
    x: torch.Tensor, block: list[int], box: list[int] | None = None, swizzled: bool = True
) -> Any:
    """A TMA map of a row-major matrix, swizzled as wgmma reads it or not at all. box: what is
    loaded at a time, where that is not the block that the kernel is told of."""
    from .versions import TensorDescriptor, gl

    # the layout depends on the size alone
    kind = {1: gl.int8, 2: gl.float16, 4: gl.float32}[x.itemsize]
    if swizzled:
        layout = gl.NVMMASharedLayout.get_default_for(block, kind)
    else:
        layout = gl.NVMMASharedLayout(0, kind.primitive_bitwidth, len(block))
    found = TensorDescriptor.from_tensor(x, block, layout)
    if box is not None:
        found.box = box  # for driver.TensorMap
    return found


def tail_maps(A: torch.Tensor, pieces: tuple[int, int], columns: int) -> dict[str, Any]:
    """The maps by which the last rows of A (m, K) are loaded where they do not fill a piece of a
    tile. TAIL: the rows that there are, FILL: words of as many others as a piece lacks. The kernel,
    which is the same for every m, is told of 8 rows and of 1. None for tiles of up to 16 rows,
    where zeros from beyond the edge cost less than a second box (int4 x int8, m = 9: 10.4 and 12.5
    us)."""
    first, more = pieces
    if first <= 16:
        return {"TAIL": None, "FILL": None}
    tail, piece = A.shape[0] % (first + more), first
    if more and tail >= first:
        tail, piece = tail - first, more
    rows, others = ([tail, columns], [piece - tail, 32]) if tail else (None, None)
    return {
        "TAIL": tma_map(A, [8, columns], rows),
        "FILL": tma_map(A.view(torch.int32), [1, 32], others, swizzled=False),
    }


def results_map(out: torch.Tensor, block: list[int]) -> Any:
    """The map of the results, None where TMA cannot write them: rows have to start on 16 bytes."""
    if out.shape[1] * out.itemsize % 16 or out.data_ptr() % 16:
        return None
    return tma_map(out, block)


def words_map(W: torch.Tensor, tiles: int, chunks: int = 1) -> Any:
    """The map of a packed weight as (row tiles of the layout, chunks along K * 4, 128) words, by so
    many row tiles and chunks."""
    from .versions import TensorDescriptor, gl

    words = W.view(torch.int32).view(W.shape[0], -1, 128)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=3)
    return TensorDescriptor.from_tensor(words, [tiles, 4 * chunks, 128], layout)


def known(rule: Callable[[Any], Any]) -> Any:
    """An attribute of a ConstantsBase that follows from its fields."""
    return property(lambda self: constexpr(rule(self)))


class ConstantsBase:
    """Base of frozen dataclasses that tell a kernel in one argument all that the compiler knows of
    a product: an attribute is a constant to the compiler as it is a constexpr here."""

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # those derived are dataclasses
            object.__setattr__(self, field.name, constexpr(getattr(self, field.name)))
