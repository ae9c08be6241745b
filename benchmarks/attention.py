"""Times attention beside torch's cuDNN and flash backends: CUDA-graph replay, cold caches.

    python benchmarks/attention.py FOLDER            writes FOLDER/h200_attention.csv and .md
    python benchmarks/attention.py --report FOLDER   the .md alone, from the .csv; needs no GPU

What a row is compared with takes turns with it in one run. Decode rotates over copies of the cache
that exceed the L2 several times. Before anything is timed, the last queries of the first sequence
are compared with attention in float64 over the same cache; the error is a column of the table.
"""

from __future__ import annotations

import copy
import csv
import math
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import bitblas
from bitblas import reference
from bitblas.kernels import attention as kernels
from bitblas.precompile import compile_sources

NAME = "h200_attention"
Call = Callable[[], torch.Tensor]
Candidate = tuple[str, str, str, str]  # implementation, dtype of the cache, layout of K, backend
Write = Callable[[dict[str, object]], None]
COLD_BYTES = 300_000_000
TORCH = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SHAPE = ("batch", "heads", "kv_heads", "q_len", "k_len", "dim", "causal")
FIELDS = (
    "part", *SHAPE, "layout", "cache",
    "implementation", "serves", "microseconds", "tflops", "terabytes_per_s", "error",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    causal: bool = False

    @property
    def flops(self) -> float:
        pairs = self.q_len * self.k_len
        if self.causal:
            pairs -= self.q_len * (self.q_len - 1) // 2
        return 4.0 * self.batch * self.heads * self.dim * pairs


class Cache:
    """Keys and values of one shape in one dtype; `layout` is that of 16-bit keys."""

    def __init__(self, shape: Shape, dtype: str, layout: str, device: str = "cuda") -> None:
        size = (shape.batch, shape.k_len, shape.kv_heads, shape.dim)
        self.K, self.V = (torch.randn(size, dtype=torch.float16, device=device) for _ in range(2))
        self.extras: dict[str, torch.Tensor] = {}
        if dtype != "float16":
            for which in ("k", "v"):
                cache = bitblas.quantize_kv(self.K if which == "k" else self.V, dtype)
                setattr(self, which.upper(), cache.codes)
                self.extras[f"{which}_scale"] = cache.scale
                if cache.zeros is not None:
                    self.extras[f"{which}_zeros"] = cache.zeros
        if layout == "ntn":
            self.K = self.K.permute(0, 3, 2, 1).contiguous()

    @property
    def bytes(self) -> int:
        tensors = (self.K, self.V, *self.extras.values())
        return sum(x.numel() * x.element_size() for x in tensors)

    def copy(self) -> Cache:
        """The same in other memory."""
        other = copy.copy(self)
        other.K, other.V = self.K.clone(), self.V.clone()
        other.extras = {name: x.clone() for name, x in self.extras.items()}
        return other


def config_of(shape: Shape, dtype: str, layout: str) -> bitblas.FlashAttenConfig:
    return bitblas.FlashAttenConfig(
        shape.batch, shape.heads, shape.kv_heads, shape.k_len, shape.dim, K_dtype=dtype,
        V_dtype=dtype, layout=layout, is_causal=shape.causal,
    )  # fmt: skip


def error_of(out: torch.Tensor, shape: Shape, dtype: str, Q: torch.Tensor, cache: Cache) -> float:
    """Relative, of the last queries of the first sequence; cache: its keys in layout "nnn"."""
    some = min(16, shape.q_len)
    first = {name: x[:1] for name, x in cache.extras.items()}
    exact = reference.attention(
        config_of(shape, dtype, "nnn"), Q[:1, -some:], cache.K[:1], cache.V[:1], **first
    )
    return float((out[:1, -some:].double() - exact).norm() / exact.norm())


def operator(
    shape: Shape, dtype: str, layout: str, backend: str
) -> tuple[bitblas.FlashAtten, Callable[[torch.Tensor, Cache], torch.Tensor]]:
    made = bitblas.FlashAtten(config_of(shape, dtype, layout), backend=backend)
    return made, lambda Q, cache: made(Q, cache.K, cache.V, **cache.extras)


def torch_call(shape: Shape, name: str) -> Callable[[torch.Tensor, Cache], torch.Tensor]:
    """torch's attention by one of its backends."""
    oblique = shape.causal and shape.q_len != shape.k_len
    mask = causal_lower_right(shape.q_len, shape.k_len) if oblique else None

    def call(Q: torch.Tensor, cache: Cache) -> torch.Tensor:
        with sdpa_kernel(TORCH[name]):
            product = scaled_dot_product_attention(
                Q.transpose(1, 2), cache.K.transpose(1, 2), cache.V.transpose(1, 2),
                attn_mask=mask, is_causal=shape.causal and not oblique,
                enable_gqa=shape.heads != shape.kv_heads,
            )  # fmt: skip
        return product.transpose(1, 2)

    return call


def graph_of(calls: list[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph, len(calls)


def in_turn(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, float]:
    """Microseconds of a call of each, median over rounds in which every graph is replayed once.
    Each round begins with another, as a graph is slower after one that took much power."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for first in range(rounds):
        turn = list(graphs.items())
        for name, (graph, calls) in turn[first % len(turn) :] + turn[: first % len(turn)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    part: str, shape: Shape, candidates: list[Candidate], rounds: int, write: Write
) -> None:
    Q = torch.randn(shape.batch, shape.q_len, shape.heads, shape.dim, device="cuda").half()
    rows: dict[str, dict[str, object]] = {}
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    caches: dict[tuple[str, str], list[Cache]] = {}
    for name, dtype, layout, backend in candidates:
        label = f"{name} {dtype} {layout}"
        try:
            if (dtype, layout) not in caches:
                torch.manual_seed(0)
                first = Cache(shape, dtype, layout)
                copies = max(2, math.ceil(COLD_BYTES / first.bytes)) if part == "decode" else 1
                caches[dtype, layout] = [first, *(first.copy() for _ in range(copies - 1))]
            group = caches[dtype, layout]
            serves = name
            if backend in TORCH:
                call = torch_call(shape, backend)
            else:
                made, call = operator(shape, dtype, layout, backend)
                serves = made.choice(Q, group[0].K, group[0].V)
            plain = caches.get((dtype, "nnn"), group)[0]
            error = error_of(call(Q, group[0]), shape, dtype, Q, plain)
            if not error < 2e-3:
                print(f"WRONG: {part} {shape} {label}: error {error:.1e}", flush=True)
                continue
            graphs[label] = graph_of([partial(call, Q, cache) for cache in group])
        except (RuntimeError, ValueError) as problem:  # torch has no such kernel, or no memory
            print(f"FAILED: {part} {shape} {label}: {str(problem).splitlines()[0]}", flush=True)
            continue
        rows[label] = {
            "part": part, "batch": shape.batch, "heads": shape.heads, "kv_heads": shape.kv_heads,
            "q_len": shape.q_len, "k_len": shape.k_len, "dim": shape.dim,
            "causal": int(shape.causal), "layout": layout, "cache": dtype,
            "implementation": name, "serves": serves, "error": f"{error:.1e}",
        }  # fmt: skip
    for label, us in in_turn(graphs, rounds).items():
        row = rows[label]
        size = caches[str(row["cache"]), str(row["layout"])][0].bytes
        row["microseconds"] = round(us, 1)
        row["tflops"] = round(shape.flops / us / 1e6, 1)
        row["terabytes_per_s"] = round(size / us / 1e6, 2)
        write(row)
    torch.cuda.empty_cache()


QUANTISED = [("bitblas", dtype, "nnn", "auto") for dtype in ("int8", "e4m3_float8", "int4")]
OURS = ("bitblas", "float16", "nnn", "auto")
CUDNN = ("cuDNN", "float16", "nnn", "cuDNN")
FLASH = ("flash", "float16", "nnn", "flash")


def plan() -> list[tuple[str, Shape, list[Candidate], int]]:
    """(part, shape, candidates, rounds)."""
    jobs: list[tuple[str, Shape, list[Candidate], int]] = []
    lengths = {8: (4096, 32768, 131072), 1: (4096, 32768, 131072), 32: (4096, 32768)}
    shapes = [Shape(batch, 32, 8, 1, n, 128) for batch in lengths for n in lengths[batch]]
    shapes += [Shape(8, 32, 8, 1, 32768, dim) for dim in (64, 256)]
    shapes += [Shape(8, heads, 8, 1, 32768, 128) for heads in (8, 64)]
    jobs += [("decode", shape, [CUDNN, FLASH, OURS, *QUANTISED], 9) for shape in shapes]
    for batch, length, dim in (
        (1, 16384, 64), (1, 16384, 128), (1, 16384, 256), (4, 4096, 128), (16, 1024, 128),
    ):  # fmt: skip
        for causal in (False, True):
            candidates = [
                CUDNN, FLASH, OURS, ("bitblas", "float16", "ntn", "auto"),
                ("bitblas triton", "float16", "nnn", "triton"),
                ("bitblas triton", "float16", "ntn", "triton"),
            ]  # fmt: skip
            shape = Shape(batch, 16, 16, length, length, dim, causal)
            jobs.append(("prefill", shape, candidates, 12))
    whole, chunk = (Shape(1, 32, 8, q, k, 128, True) for q, k in ((8192, 8192), (512, 32768)))
    for shape in (whole, Shape(1, 64, 8, 8192, 8192, 128, True), Shape(1, 8, 8, 8192, 8192, 128)):
        jobs.append(("prefill", shape, [CUDNN, FLASH, OURS, *QUANTISED], 7))
    jobs.append(("chunk", chunk, [FLASH, OURS, *QUANTISED], 7))
    for q_len in (2, 4, 8, 16):
        shape = Shape(8, 32, 8, q_len, 32768, 128, True)
        jobs.append(("decode", shape, [FLASH, OURS, *QUANTISED], 9))
    jobs.append(("decode", Shape(8, 64, 8, 16, 32768, 128, True), [FLASH, OURS, *QUANTISED], 9))
    return jobs


def compile_ahead(jobs: list[tuple[str, Shape, list[Candidate], int]]) -> None:
    """This library's kernels for all jobs, in parallel."""
    properties = torch.cuda.get_device_properties(0)
    arch, found = 10 * properties.major + properties.minor, {}
    with torch.device("meta"):
        for _, shape, candidates, _ in jobs:
            for _, dtype, layout, backend in candidates:
                if backend in TORCH:
                    continue
                cache = Cache(shape, dtype, layout, "meta")
                Q = torch.empty(shape.batch, shape.q_len, shape.heads, shape.dim).half()
                K = cache.K.permute(0, 3, 2, 1) if layout == "ntn" else cache.K
                given = kernels.Operands(Q, K, cache.V, **cache.extras)
                for source in kernels.sources(given, shape.causal, torch.device("cuda", 0)):
                    found[source.key] = source
    compile_sources(list(found.values()), arch, os.cpu_count() or 1)


def report(folder: Path) -> None:
    """h200_attention.md from h200_attention.csv: a line for each shape, in microseconds."""
    with open(folder / f"{NAME}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "# Attention on an H200",
        "",
        "Microseconds, CUDA-graph replay, every line's figures measured in turn in one run; decode "
        "over cold caches. `python benchmarks/attention.py benchmarks/results` measures again; the "
        "[CSV](h200_attention.csv) has what served, TFLOP/s, TB/s and the error against float64.",
        "",
    ]
    columns = {
        "decode": ["cuDNN float16 nnn", "flash float16 nnn", "bitblas float16 nnn",
                   "bitblas int8 nnn", "bitblas e4m3_float8 nnn", "bitblas int4 nnn"],
        "prefill": ["cuDNN float16 nnn", "flash float16 nnn", "bitblas float16 nnn",
                    "bitblas float16 ntn", "bitblas triton float16 nnn",
                    "bitblas triton float16 ntn", "bitblas int8 nnn", "bitblas int4 nnn"],
    }  # fmt: skip
    columns["chunk"] = columns["decode"]
    for part, labels in columns.items():
        table: dict[tuple[str, ...], dict[str, str]] = {}
        for row in rows:
            if row["part"] == part:
                key = tuple(row[name] for name in SHAPE)
                label = f"{row['implementation']} {row['cache']} {row['layout']}"
                table.setdefault(key, {})[label] = row["microseconds"]
        used = [label for label in labels if any(label in cells for cells in table.values())]
        head = [name.replace("_", " ") for name in SHAPE]
        head += [label.replace(" nnn", "").replace("_float8", "") for label in used]
        lines += [f"## {part.capitalize()}", "", "| " + " | ".join(head) + " |"]
        lines.append("|" + "---|" * len(head))
        for key, cells in table.items():
            lines.append("| " + " | ".join([*key, *(cells.get(x, "") for x in used)]) + " |")
        lines.append("")
    (folder / f"{NAME}.md").write_text("\n".join(lines))


def main() -> int:
    folder = Path(next((x for x in sys.argv[1:] if x != "--report"), "benchmarks/results"))
    if "--report" not in sys.argv:
        jobs = plan()
        try:
            compile_ahead(jobs)
        except RuntimeError as problem:  # then it fails again in its own row
            print(f"FAILED: {str(problem)[:500]}", flush=True)
        with open(folder / f"{NAME}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()

            def write(row: dict[str, object]) -> None:
                writer.writerow(row)
                file.flush()
                print(*(row[field] for field in FIELDS), flush=True)

            for job in jobs:
                try:
                    measure(*job, write)
                except Exception as problem:  # the rest is still worth having
                    print(f"FAILED: {job[0]} {job[1]}: {problem}", flush=True)
    report(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
