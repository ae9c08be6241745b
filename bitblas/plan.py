"""Which kernel choice serves (config, m, device): a recorded one, else the family's default."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch

from . import cache
from .config import MatmulConfig
from .log import logger


def pick(config: MatmulConfig, m: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments for the backend's matmul: {} leaves the choice to the kernel family."""
    if device.type != "cuda":
        return {}
    choices = cache.recorded_choices(config, cache.device_name(device))
    if not choices:
        return {}
    measured = min((rows for rows in choices if m <= rows <= 2 * m), default=None)
    if measured is None:
        return {}
    from .kernels.portable import Tile

    return {"tile": Tile(**choices[measured])}


def tune(config: MatmulConfig, m: int, topk: int, call: Callable[[], Any]) -> None:
    """Time `call`, of m rows, with the first `topk` candidates; record the fastest."""
    from triton.runtime.errors import OutOfResources

    from .kernels import portable

    choices = cache.recorded_choices(config, cache.device_name(torch.device("cuda")))
    best: tuple[float, dict[str, Any] | None] = (float("inf"), None)
    try:
        for tile in portable.candidates(config, m)[:topk]:
            choices[m] = dataclasses.asdict(tile)
            cache.choices_changed()
            try:
                milliseconds = gpu_milliseconds(call)
            except OutOfResources as error:  # a tile for GPUs with more shared memory
                logger.debug("m=%d %s: %s", m, tile, error)
                continue
            logger.debug("m=%d %s: %.4f ms", m, tile, milliseconds)
            best = min(best, (milliseconds, choices[m]), key=lambda pair: pair[0])
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
