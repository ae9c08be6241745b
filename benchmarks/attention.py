"""Times attention beside torch's cuDNN and flash backends: CUDA-graph replay, cold caches.

    python benchmarks/attention.py FOLDER      writes FOLDER/h200_attention.csv and .md

What a row compares takes turns in one run. Decode rotates over copies of the cache that exceed the
L2 several times; results are checked against the first implementation of the row's group.
"""

from __future__ import annotations

import csv
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

import bitblas

Call = Callable[[], torch.Tensor]
COLD_BYTES = 300_000_000
TORCH = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
FIELDS = (
    "part", "batch", "heads", "kv_heads", "q_len", "k_len", "dim", "causal", "layout", "cache",
    "implementation", "serves", "microseconds", "tflops", "terabytes_per_s", "difference",
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

    def __init__(self, shape: Shape, dtype: str, layout: str = "nnn") -> None:
        size = (shape.batch, shape.k_len, shape.kv_heads, shape.dim)
        self.K, self.V = (torch.randn(size, device="cuda").half() for _ in range(2))
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


def operator(
    shape: Shape, dtype: str, layout: str, backend: str
) -> tuple[bitblas.FlashAtten, Callable[[torch.Tensor, Cache], torch.Tensor]]:
    config = bitblas.FlashAttenConfig(
        shape.batch, shape.heads, shape.kv_heads, shape.k_len, shape.dim, K_dtype=dtype,
        V_dtype=dtype, layout=layout, is_causal=shape.causal,
    )  # fmt: skip
    made = bitblas.FlashAtten(config, backend=backend)
    return made, lambda Q, cache: made(Q, cache.K, cache.V, **cache.extras)


def torch_call(shape: Shape, name: str) -> Callable[[torch.Tensor, Cache], torch.Tensor]:
    """torch's attention; one query: of the heads that share keys as rows, if that is faster."""
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
    """Microseconds of a call of each, median over rounds in which every graph is replayed once."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, calls) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) * 1e3 / calls)
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    part: str, shape: Shape, candidates: list[tuple[str, str, str, str]], rounds: int
) -> list[dict[str, object]]:
    """candidates: (implementation, cache dtype, layout of K, backend)."""
    Q = torch.randn(shape.batch, shape.q_len, shape.heads, shape.dim, device="cuda").half()
    rows: list[dict[str, object]] = []
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]] = {}
    kept: list[object] = []
    caches: dict[tuple[str, str], list[Cache]] = {}
    results: dict[str, torch.Tensor] = {}
    for name, dtype, layout, backend in candidates:
        if (dtype, layout) not in caches:
            torch.manual_seed(0)
            first = Cache(shape, dtype, layout)
            cold = part.startswith("decode")
            copies = max(2, math.ceil(COLD_BYTES / first.bytes)) if cold else 1
            more = [Cache(shape, dtype, layout) for _ in range(copies - 1)]
            caches[dtype, layout] = [first, *more]
        serves = name
        if backend in TORCH:
            call = torch_call(shape, backend)
        else:
            made, call = operator(shape, dtype, layout, backend)
            given = caches[dtype, layout][0]
            serves = made.choice(Q, given.K, given.V)
        group = caches[dtype, layout]
        label = f"{name} {dtype} {layout}"
        try:
            results[label] = call(Q, group[0]).float()
            graphs[label] = graph_of([lambda c=c, call=call: call(Q, c) for c in group])
        except RuntimeError as error:  # torch has no such kernel
            print(f"{part} {shape} {label}: {str(error).splitlines()[0]}", flush=True)
            continue
        kept.append(call)
        rows.append({
            "part": part, "batch": shape.batch, "heads": shape.heads, "kv_heads": shape.kv_heads,
            "q_len": shape.q_len, "k_len": shape.k_len, "dim": shape.dim,
            "causal": int(shape.causal), "layout": layout, "cache": dtype,
            "implementation": name, "serves": serves, "label": label, "bytes": group[0].bytes,
        })  # fmt: skip
    times = in_turn(graphs, rounds)
    exact = next(iter(results.values()))
    for row in rows:
        label, us = str(row.pop("label")), times[str(row["label"])]
        row["microseconds"] = round(us, 1)
        row["tflops"] = round(shape.flops / us / 1e6, 1)
        row["terabytes_per_s"] = round(float(str(row.pop("bytes"))) / us / 1e6, 2)
        row["difference"] = f"{float((results[label] - exact).norm() / exact.norm()):.1e}"
        print(" ".join(str(row[field]) for field in FIELDS), flush=True)
    return rows


def prefill() -> list[dict[str, object]]:
    rows = []
    shapes = [(1, 16384, dim) for dim in (64, 128, 256)] + [(4, 4096, 128), (16, 1024, 128)]
    for batch, length, dim in shapes:
        for causal in (False, True):
            shape = Shape(batch, 16, 16, length, length, dim, causal)
            rows += measure("prefill", shape, [
                ("cuDNN", "float16", "nnn", "cuDNN"), ("flash", "float16", "nnn", "flash"),
                ("bitblas", "float16", "nnn", "auto"), ("bitblas", "float16", "ntn", "auto"),
                ("bitblas triton", "float16", "nnn", "triton"),
                ("bitblas triton", "float16", "ntn", "triton"),
            ], 7)  # fmt: skip
    shape = Shape(1, 32, 8, 8192, 8192, 128, True)
    rows += measure("prefill, quantised", shape, [
        ("cuDNN", "float16", "nnn", "cuDNN"),
        *(("bitblas", dtype, "nnn", "auto") for dtype in ("int8", "e4m3_float8", "int4")),
    ], 7)  # fmt: skip
    shape = Shape(1, 32, 8, 512, 32768, 128, True)
    rows += measure("chunk", shape, [
        ("flash", "float16", "nnn", "flash"), ("bitblas", "float16", "nnn", "auto"),
        *(("bitblas", dtype, "nnn", "auto") for dtype in ("int8", "e4m3_float8", "int4")),
    ], 7)  # fmt: skip
    return rows


def decode() -> list[dict[str, object]]:
    rows = []
    lengths = {1: (4096, 32768, 131072), 8: (4096, 32768, 131072), 32: (4096, 32768)}
    shapes = [Shape(batch, 32, 8, 1, n, 128) for batch in lengths for n in lengths[batch]]
    shapes += [Shape(8, 32, 8, 1, 32768, dim) for dim in (64, 256)]
    shapes += [Shape(8, 32, 8, q_len, 32768, 128, True) for q_len in (4, 8, 16)]
    for shape in shapes:
        part = "decode" if shape.q_len == 1 else "decode, several queries"
        torch_ones = [("flash", "float16", "nnn", "flash")]
        if shape.q_len == 1:
            torch_ones.insert(0, ("cuDNN", "float16", "nnn", "cuDNN"))
        rows += measure(part, shape, [
            *torch_ones, ("bitblas", "float16", "nnn", "auto"),
            *(("bitblas", dtype, "nnn", "auto") for dtype in ("int8", "e4m3_float8", "int4")),
        ], 9)  # fmt: skip
        torch.cuda.empty_cache()
    return rows


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results")
    rows = decode() + prefill()
    with open(folder / "h200_attention.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
