"""Which kernel serves (config, m, device): a recorded choice, else what should be the fastest.

Nothing is measured to plan a product. The families that serve it list their tiles, and the one that
their cost models expect to be the fastest is taken; `portable`, which has none, serves what no
other family does. Recorded choices (hardware_aware_finetune, the database) come before.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from functools import cache as cached
from types import ModuleType
from typing import Any

import torch

from . import cache
from .config import MatmulConfig
from .kernels.launch import EQUAL_BITS
from .log import logger

_MOST_IN_SECTIONS = 0.975  # of the time in one section that two should take at most
_SECTION_ROWS = 256  # of A: the first has a multiple of them, the second at most four times

Sections = tuple[tuple[ModuleType, Any, int], ...]  # (kernel family, tile, rows of A)


def sections(config: MatmulConfig, m: int, device: torch.device) -> Sections:
    """What computes m rows on a GPU: kernels that take so many rows each, one after the other.

    Mostly one. Tiles of many rows of A are the fastest, and an m that fills the last of them badly
    pays for what it lacks (uint4, 8192 x 8192, H200: m = 1024 177 us, 1040 230): then the rows
    beyond are a product of their own.
    """
    best: Sections = ((*pick(config, m, device), m),)
    if m <= EQUAL_BITS or _recorded_pick(config, m, device):
        return best
    time = microseconds(config, best, device)
    if time is None:
        return best
    least = _MOST_IN_SECTIONS * time
    last = (m - 1) // _SECTION_ROWS * _SECTION_ROWS
    for first in range(max(last - 3 * _SECTION_ROWS, _SECTION_ROWS), last + 1, _SECTION_ROWS):
        two = tuple((*pick(config, rows, device), rows) for rows in (first, m - first))
        time = microseconds(config, two, device)
        if time is not None and time < least:
            best, least = two, time
    return best


def microseconds(config: MatmulConfig, sections: Sections, device: torch.device) -> float | None:
    """What the sections should take; None where a family has no cost model."""
    if not all(hasattr(family, "microseconds") for family, *_ in sections):
        return None
    gpu = _gpu(device)
    return float(sum(each.microseconds(config, rows, tile, gpu) for each, tile, rows in sections))


def pick(config: MatmulConfig, m: int, device: torch.device) -> tuple[ModuleType, Any]:
    """The kernel family for m rows on a GPU in one section, and its tile."""
    return _recorded_pick(config, m, device) or candidates(config, m, device)[0]


def _recorded_pick(
    config: MatmulConfig, m: int, device: torch.device
) -> tuple[ModuleType, Any] | None:
    choices = cache.recorded_choices(config, cache.device_name(device))
    for rows in sorted(choices):
        family, tile = _recorded(choices[rows]) or (None, None)
        if (
            family is not None
            and family.stands_for(rows, m)
            and family.serves(config, m, _architecture(device))
        ):
            return family, tile
    return None


def candidates(config: MatmulConfig, m: int, device: torch.device) -> list[tuple[ModuleType, Any]]:
    """(family, tile) worth measuring for m rows, the one that should be the fastest first."""
    serving = [f for f in families() if f.serves(config, m, _architecture(device))]
    return ranked(config, m, serving, _gpu(device))


def ranked(
    config: MatmulConfig, m: int, serving: list[ModuleType], gpu: Any
) -> list[tuple[ModuleType, Any]]:
    """The candidates of these families for m rows, family by family, in the order of the time that
    the best of each should take; those of `portable`, which has no cost model, last."""
    found = [(family, _tiles(family, config, m, gpu)) for family in serving]

    def expected(candidates: tuple[ModuleType, list[Any]]) -> float:
        family, tiles = candidates
        model = getattr(family, "microseconds", None)
        return float("inf") if model is None else float(model(config, m, tiles[0], gpu))

    return [(family, tile) for family, tiles in sorted(found, key=expected) for tile in tiles]


@cached
def families() -> tuple[ModuleType, ...]:
    """The GPU kernel families."""
    from .kernels import batch, batch8, decode, portable

    return decode, batch, batch8, portable


def _tiles(family: ModuleType, config: MatmulConfig, m: int, gpu: Any) -> list[Any]:
    from .kernels import portable

    return list(family.candidates(config, m, *(() if family is portable else (gpu,))))


def _recorded(choice: dict[str, Any]) -> tuple[ModuleType, Any] | None:
    """The family and the tile of a choice; None of one that the kernels no longer know."""
    for family in families():
        if choice.get("kernel") in family.KERNELS:
            try:
                return family, family.Tile(**choice)
            except (TypeError, ValueError) as error:
                logger.info("a recorded choice is not taken: %s", error)
    return None


def _architecture(device: torch.device) -> int:
    """A GPU's compute capability, 90 for 9.0."""
    from .kernels import prepared

    return prepared.architecture(
        prepared.current_device() if device.index is None else device.index
    )


@cached
def _gpu(device: torch.device) -> Any:
    """What cost models know of a device."""
    from .kernels.decode import GPU

    return GPU(torch.cuda.get_device_properties(device).multi_processor_count)


def tune(config: MatmulConfig, m: int, topk: int, call: Callable[[], Any]) -> None:
    """Time `call`, of m rows, with the first `topk` candidates; record the fastest.

    Where two sections are planned, they are timed too, and nothing is recorded if they are faster.
    """
    from triton.runtime.errors import OutOfResources

    from . import dense

    device = torch.device("cuda", torch.cuda.current_device())
    choices = cache.recorded_choices(config, cache.device_name(device))
    best: tuple[float, dict[str, Any] | None] = (float("inf"), None)
    tried: list[dict[str, Any] | None] = [
        dataclasses.asdict(tile) for _, tile in candidates(config, m, device)[:topk]
    ]
    try:
        choices.pop(m, None)
        if len(sections(config, m, device)) > 1:
            tried.insert(0, None)  # first, while nothing is recorded
        for tile in tried:
            if tile is not None:
                choices[m] = tile
            cache.choices_changed()
            try:
                with dense.switched_off():
                    milliseconds = gpu_milliseconds(call)
            except OutOfResources as error:  # a tile for GPUs with more shared memory
                logger.debug("m=%d %s: %s", m, tile, error)
                continue
            logger.debug("m=%d %s: %.4f ms", m, tile, milliseconds)
            best = min(best, (milliseconds, tile), key=lambda pair: pair[0])
    finally:  # never leave a choice behind that was only being tried
        choices.pop(m, None)
        if best[1] is not None:
            choices[m] = best[1]
        cache.choices_changed()


def gpu_milliseconds(call: Callable[[], Any]) -> float:
    """The median time of a call on the current GPU."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


def kernel_source(device_type: str) -> str:
    """The Python source of the modules that a device's kernels are written in."""
    if device_type == "cpu":
        from .cpu import microkernel

        return inspect.getsource(microkernel)
    from .kernels import portable_kernels

    return inspect.getsource(portable_kernels)
