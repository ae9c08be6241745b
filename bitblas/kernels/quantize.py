"""Launcher of the activation quantiser: see quantize_kernels."""

from __future__ import annotations

from typing import Any

import torch

from ..config import LEAST_MAGNITUDE, QUANTIZED_ACTIVATIONS
from . import quantize_kernels as kernels
from .launch import PROGRAMMATIC_LAUNCH, Launch

MOST_COLUMNS = 32768  # that a block keeps in registers, 64 a thread; of longer rows 8192 at a time
_COLUMNS_PER_THREAD = 32  # H200, 4096 x 8192 float16 to int8: 24.7 us, with 16 or 8 27.3


def launch(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, dtype: str, arch: int) -> Launch:
    """q (m, K) of `dtype` and scale (m,) of x (m, K) on compute capability arch (90 for 9.0).

    All are contiguous, m and K at least 1.
    """
    m, k = x.shape
    block = max(1 << (k - 1).bit_length(), 64) if k <= MOST_COLUMNS else 8192
    rows = 1 if m < 2048 else max(1, 4096 // block)  # short rows share a block if there are many
    warps = min(max(rows * block // (32 * _COLUMNS_PER_THREAD), 1), 16)
    programmatic = PROGRAMMATIC_LAUNCH and arch >= 90
    arguments = {
        "X": x,
        "Q": q if dtype == "int8" else q.view(torch.uint8),
        "SCALE": scale,
        "M": m,
        "K": k,
    }
    constants = {
        "KIND": dtype,
        "LARGEST": QUANTIZED_ACTIVATIONS[dtype],
        "LEAST": LEAST_MAGNITUDE,
        "K_ALIGNED": k % 16 == 0,
        "CONVERTS": arch >= 89,
        "ROWS": rows,
        "BLOCK": block,
        "ONE_BLOCK": k <= block,
        "PROGRAMMATIC": programmatic,
    }
    options: dict[str, Any] = {"enable_fp_fusion": False}
    if programmatic:
        options["launch_pdl"] = True
    return Launch(
        kernels.quantize_kernel, (-(-m // rows),), arguments, constants, warps, 1, options
    )
