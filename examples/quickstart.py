"""A product with 4-bit weights: pack, multiply, check against torch, compare times."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch

import bitblas


def milliseconds(call: Callable[[], object], device: str) -> float:
    """The median time of a call; on a GPU, of its kernels, replayed from a CUDA graph."""
    repeat = 1
    if device == "cuda":
        repeat, graph = 20, torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeat):
                call()
        call = graph.replay
    times = []
    for _ in range(30):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3 / repeat)
    return statistics.median(times)


def main() -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 4096
    torch.manual_seed(0)

    config = bitblas.MatmulConfig(
        M=1, N=size, K=size, A_dtype="float16", W_dtype="int4", out_dtype="float16"
    )
    started = time.perf_counter()
    matmul = bitblas.Matmul(config)
    weight = torch.randint(-8, 8, (size, size), dtype=torch.int8, device=device)
    activations = torch.rand((1, size), dtype=torch.float16, device=device) - 0.5
    packed = matmul.transform_weight(weight)
    output = matmul(activations, packed)
    if device == "cuda":
        torch.cuda.synchronize()
    ready = time.perf_counter() - started

    exact = activations.double() @ weight.double().T
    error = ((output.double() - exact).norm() / exact.norm()).item()
    dense = weight.to(torch.float32 if device == "cpu" else torch.float16)
    dense_input = activations.to(dense.dtype)
    ours = milliseconds(lambda: matmul(activations, packed), device)
    theirs = milliseconds(lambda: dense_input @ dense.T, device)

    print(f"int4 weight {size} x {size}, float16 activations, m = 1, on {matmul.target}")
    print(f"  relative error against float64   {error:.1e}")
    print(
        f"  packed weight                    {packed.nbytes / 2**20:.1f} MiB ({dense.dtype} "
        f"{dense.nbytes / 2**20:.1f} MiB)"
    )
    print(f"  construct, pack and first call   {ready:.2f} s")
    print(
        f"  bitblas / torch {dense.dtype}    {ours:.3f} / {theirs:.3f} ms  ({theirs / ours:.1f} x)"
    )
    return 0 if error < 1e-3 else 1


if __name__ == "__main__":
    sys.exit(main())
