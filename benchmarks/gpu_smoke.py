"""Time the portable kernels on one GPU: every candidate tile, cuBLAS fp16 and a plain read.

    python benchmarks/gpu_smoke.py [--size 8192] [--m 1 16 64 1024 4096] [--W_dtype uint4 ...]

Each figure is the median replay of a CUDA graph that runs over rotating copies of the weight, more
bytes together than the L2 holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from bitblas.config import MatmulConfig
from bitblas.kernels import portable

COPIES = 8


@triton.jit
def read_kernel(source, sums, words, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0)
    for i in range(first, words // (BLOCK * UNROLL), tl.num_programs(0)):
        base = source + i.to(tl.int64) * (BLOCK * UNROLL) + tl.arange(0, BLOCK)
        for u in tl.static_range(UNROLL):
            total ^= tl.load(base + u * BLOCK)
    tl.store(sums + first, tl.xor_sum(total, 0))


def graph_time(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Median microseconds of one call; `calls` are captured one after the other."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times)


def operands(config: MatmulConfig) -> list[dict[str, torch.Tensor]]:
    """COPIES random packed weights with their extras."""
    result = []
    for _ in range(COPIES):
        shape = portable.layout(config).shape(config.bits, config.N, config.K)
        one = {"W": torch.randint(-128, 128, shape, dtype=torch.int8, device="cuda")}
        if config.with_scaling:
            scale = torch.rand(config.N, config.num_groups, device="cuda") * 0.1 + 0.01
            one["scale"] = scale.to(config.scale_dtypes[0])
        if config.with_zeros:
            zeros = torch.randint(0, 1 << config.bits, (config.N, config.num_groups), device="cuda")
            one["zeros"] = zeros.to(config.scale_dtypes[0])
        if config.format.has_global_scale:
            one["global_scale"] = torch.ones(1, device="cuda")
        result.append(one)
    return result


def activation(config: MatmulConfig, m: int) -> torch.Tensor:
    if config.A_dtype in ("int8", "int4"):
        width = config.K // (2 if config.A_dtype == "int4" else 1)
        return torch.randint(-128, 128, (m, width), dtype=torch.int8, device="cuda")
    return torch.randn(m, config.K, device="cuda").to(config.torch_A_dtype)


def time_config(config: MatmulConfig, rows: list[int], all_tiles: bool) -> None:
    weights = operands(config)
    for m in rows:
        A = activation(config, m)
        out = torch.empty((m, config.N), dtype=config.torch_out_dtype, device="cuda")
        tiles = portable.candidates(config, m)
        for tile in tiles if all_tiles else tiles[:1]:

            def call(one: dict[str, torch.Tensor], tile: portable.Tile = tile) -> None:
                portable.matmul(config, A, out=out, tile=tile, **one)  # noqa: B023

            micro = graph_time([lambda one=one: call(one) for one in weights])
            rate = 2e-6 * m * config.N * config.K / micro
            name = " ".join(str(x) for x in dataclasses.astuple(tile))
            zeros = config.zeros_mode if config.with_zeros else "-"
            what = f"{config.A_dtype:9} {config.W_dtype:8} {zeros:9} m={m:<5} {name:22}"
            print(f"{what} {micro:9.2f} us {rate:6.1f} TFLOP/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=8192)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 64, 1024, 4096])
    parser.add_argument("--W_dtype", nargs="+", default=["uint4"])
    parser.add_argument("--A_dtype", default="float16")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--default-tiles", action="store_true")
    options = parser.parse_args()
    n = options.size
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)

    words = torch.randint(0, 2**31 - 1, (COPIES, n * n // 8), dtype=torch.int32, device="cuda")
    sums = torch.empty(4096, dtype=torch.int32, device="cuda")
    read = [
        lambda w=w: read_kernel[(132 * 4,)](w, sums, w.numel(), 1024, 8, num_warps=8) for w in words
    ]
    print(f"read of {n * n // 2 / 1e6:.1f} MB: {graph_time(read):.2f} us")
    dense = [torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2)]
    for m in options.m:
        A = torch.randn(m, n, device="cuda", dtype=torch.float16)
        micro = graph_time([lambda d=d: torch.mm(A, d.t()) for d in dense])  # noqa: B023
        print(f"cuBLAS float16 m={m:<5} {micro:9.2f} us {2e-6 * m * n * n / micro:6.1f} TFLOP/s")
    for w in options.W_dtype:
        integer = w.startswith(("int", "uint"))
        config = MatmulConfig(
            N=n, K=n, A_dtype=options.A_dtype, W_dtype=w, out_dtype="float16",
            group_size=options.group if not w.endswith("fp4") else -1, with_scaling=True,
            with_zeros=integer and options.A_dtype == "float16",
        )  # fmt: skip
        time_config(config, options.m, not options.default_tiles)


if __name__ == "__main__":
    main()
