"""Time the GPU kernels beside cuBLAS fp16 and a plain read of the weight, all in one run.

    python benchmarks/gpu.py [--n 8192 --k 8192] [--m 1 16 64 1024] [--w uint4 int2] [--all-tiles]

Each figure is the median replay of a CUDA graph that runs over rotating copies of the weight, more
bytes together than the L2 holds. Every result is checked against the float64 reference before it is
timed. Prints a table and writes results/<name>.csv (one row a case) and results/<name>.md.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import platform
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import triton
import triton.language as tl

from bitblas import reference
from bitblas.config import INTEGER_ACTIVATIONS, MatmulConfig
from bitblas.formats import FORMATS
from bitblas.kernels import portable

RESULTS = Path(__file__).parent / "results"
COPIES = 8
CHECKED_ROWS = 64  # of A: float64 products of more are slow


@triton.jit
def read_kernel(source, sums, words, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0)
    for i in range(first, words // (BLOCK * UNROLL), tl.num_programs(0)):
        base = source + i.to(tl.int64) * (BLOCK * UNROLL) + tl.arange(0, BLOCK)
        for u in tl.static_range(UNROLL):
            total ^= tl.load(base + u * BLOCK)
    tl.store(sums + first, tl.xor_sum(total, 0))


def graph_microseconds(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Median time of one call; `calls` are captured one after the other."""
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


def read_microseconds(size: int) -> float:
    """A kernel that only reads `size` bytes, rotating over copies."""
    words = torch.randint(0, 2**31 - 1, (COPIES, size // 4), dtype=torch.int32, device="cuda")
    sums = torch.empty(132 * 4, dtype=torch.int32, device="cuda")
    return graph_microseconds(
        [
            lambda w=w: read_kernel[(132 * 4,)](w, sums, w.numel(), 1024, 8, num_warps=8)
            for w in words
        ]
    )


def operands(config: MatmulConfig) -> dict[str, torch.Tensor]:
    """A random packed weight with its extras."""
    count = 1 << config.bits
    codes = torch.randint(0, count, (config.N, config.K), dtype=torch.uint8, device="cuda")
    values = torch.tensor(config.format.code_values(), device="cuda")
    modest = values.abs() <= 448  # no NaN, and sums that float16 holds
    codes = torch.where(modest[codes.int()], codes, 0)
    result = {"codes": codes, "W": portable.layout(config).pack(codes, config.bits)}
    groups = (config.N, config.num_groups)
    if config.with_scaling:
        scale = torch.rand(groups, device="cuda") * 0.1 + 0.01
        result["scale"] = scale.to(config.scale_dtypes[0])
    if config.with_zeros:
        zeros = torch.randint(0, count, groups, device="cuda")
        result["zeros"] = zeros.to(config.scale_dtypes[0])
    if config.format.has_global_scale:
        result["global_scale"] = torch.ones(1, device="cuda")
    return result


def activation(config: MatmulConfig, m: int) -> torch.Tensor:
    if config.A_dtype in INTEGER_ACTIVATIONS:
        width = config.K // (2 if config.A_dtype == "int4" else 1)
        return torch.randint(-128, 128, (m, width), dtype=torch.int8, device="cuda")
    return torch.randn(m, config.K, device="cuda").to(config.torch_A_dtype)


def time_config(config: MatmulConfig, rows: list[int], all_tiles: bool) -> list[dict[str, object]]:
    """One row for each m (and tile), without the columns that compare."""
    copies = [operands(config) for _ in range(COPIES)]
    codes = copies[0]["codes"]
    for one in copies:
        del one["codes"]
    result = []
    for m in rows:
        A = activation(config, m)
        out = torch.empty((m, config.N), dtype=config.torch_out_dtype, device="cuda")
        extras = {name: x for name, x in copies[0].items() if name != "W"}
        expected = reference.matmul(config, A[:CHECKED_ROWS], codes, **extras)
        tiles = portable.candidates(config, m)
        for tile in tiles if all_tiles else tiles[:1]:

            def call(one: dict[str, torch.Tensor], tile: portable.Tile = tile) -> None:
                portable.matmul(config, A, out=out, tile=tile, **one)  # noqa: B023

            out.fill_(77)
            call(copies[0])
            got = out[:CHECKED_ROWS].double()
            error = float((got - expected).norm() / expected.norm())
            if not error < 1e-3:
                raise SystemExit(f"wrong result: {config} m={m} {tile}: relative error {error}")
            micro = graph_microseconds([lambda one=one: call(one) for one in copies])
            zeros = " zeros" if config.with_zeros else ""
            result.append(
                {
                    "w": config.W_dtype + zeros,
                    "a": config.A_dtype,
                    "group": config.group_length,
                    "n": config.N,
                    "k": config.K,
                    "m": m,
                    "us": round(micro, 2),
                    "rel_err": f"{error:.1e}",
                    "kernel": " ".join(str(x) for x in dataclasses.astuple(tile)),
                }
            )
            print(result[-1], flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=8192)
    parser.add_argument("--k", type=int, default=8192)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 64, 1024])
    quantized = [name for name, fmt in FORMATS.items() if not fmt.is_dense]
    parser.add_argument("--w", nargs="+", default=quantized)
    parser.add_argument("--a", default="float16")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--all-tiles", action="store_true", help="not only the default tile")
    parser.add_argument("--name", default="gpu")
    options = parser.parse_args()
    n, k = options.n, options.k

    cublas = {}
    dense = [torch.randn(n, k, device="cuda", dtype=torch.float16) for _ in range(2)]
    for m in options.m:
        A = torch.randn(m, k, device="cuda", dtype=torch.float16)
        cublas[m] = graph_microseconds([lambda d=d: torch.mm(A, d.t()) for d in dense])  # noqa: B023
    del dense
    reads: dict[int, float] = {}
    rows = []
    for w in options.w:
        fmt = FORMATS[w]
        config = MatmulConfig(
            N=n,
            K=k,
            A_dtype=options.a,
            W_dtype=w,
            group_size=fmt.fixed_group_size or options.group,
            with_scaling=True,
            with_zeros=w.startswith("uint") and options.a not in INTEGER_ACTIVATIONS,
        )
        if config.bits not in reads:
            reads[config.bits] = read_microseconds(n * k * config.bits // 8)
        for row in time_config(config, options.m, options.all_tiles):
            row["cublas_us"] = round(cublas[row["m"]], 2)
            row["read_us"] = round(reads[config.bits], 2)
            rows.append(row)

    columns = ["w", "a", "group", "n", "k", "m"]
    columns += ["us", "cublas_us", "read_us", "rel_err", "kernel"]
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{options.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        f"# GPU products, N = {n}, K = {k}",
        "",
        f"{date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}, "
        f"Triton {triton.__version__}, Python {platform.python_version()}. Microseconds, cold "
        f"weights, median of CUDA-graph replays. Command: `python {' '.join(sys.argv)}`",
        "",
        "| W | A | group | m | bitblas | cuBLAS fp16 | read of W | relative error | tile |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shown = ("w", "a", "group", "m", "us", "cublas_us", "read_us", "rel_err", "kernel")
        lines.append("| " + " | ".join(str(row[column]) for column in shown) + " |")
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{options.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
