"""Time the CPU backend beside torch's own products, everything interleaved in one run.

    python benchmarks/cpu.py [--n 11008] [--k 4096] [--m 1 4 16 128 512] [--name cpu_x86_64]

Weights are cold: each case rotates over a pool of copies larger than the caches. Results are
checked against the float64 reference before anything is timed. The cases of one m take turns,
round by round, so that another load on the machine meets all of them; the figure is the median
over the rounds (`min` is the fastest one). With --thread-time one thread runs and its own CPU time
is taken: on a machine that others load, that is what can be compared. Writes results/<name>.csv
and results/<name>.md.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import llvmlite
import torch

from bitblas import cpu, reference
from bitblas.config import MatmulConfig
from bitblas.layouts import ROW16

RESULTS = Path(__file__).parent / "results"
POOL_BYTES = 100_000_000  # of each case: three times the last-level cache of a large core complex
CHECKED_ROWS = 256
ROUNDS = {1: 21, 4: 15, 16: 9, 128: 5, 512: 3}


@dataclass
class Case:
    """One line of the table; `call(m, i)` runs it once on the i-th weight of its pool."""

    w: str
    a: str
    group: int
    kernel: str
    weight_bytes: int
    call: Callable[[int, int], object]
    error: Callable[[int], float] = lambda m: 0.0
    most_rows: int = 1 << 30
    times: dict[int, list[float]] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)


def pool_size(weight_bytes: int) -> int:
    return max(2, min(40, POOL_BYTES // weight_bytes))


def our_case(w: str, a: str, n: int, k: int, group: int, zeros: bool, scaled: bool = True) -> Case:
    out_dtype = "float32" if scaled else "int32"
    config = MatmulConfig(
        1, n, k, a, w, out_dtype, group_size=group, with_scaling=scaled, with_zeros=zeros
    )
    scale = torch.rand(n, config.num_groups) * 0.09 + 0.01 if scaled else None
    zero = torch.full((n, config.num_groups), float(1 << config.bits - 1)) if zeros else None
    weight_bytes = n * k * config.bits // 8
    shape = ROW16.shape(config.bits, n, k)
    packed = [
        torch.randint(-128, 128, shape, dtype=torch.int8) for _ in range(pool_size(weight_bytes))
    ]
    if w == "e4m3_float8":  # a NaN would poison every sum
        for weight in packed:
            weight[(weight & 127) == 127] = 0
    out: dict[int, torch.Tensor] = {}

    def call(m: int, i: int) -> torch.Tensor:
        if m not in out:
            out[m] = torch.empty(m, n, dtype=config.torch_out_dtype)
        cpu.matmul(config, activations(a, m, k), packed[i % len(packed)], out[m], scale, zero)
        return out[m]

    def error(m: int) -> float:
        small = MatmulConfig(
            1, CHECKED_ROWS, k, a, w, out_dtype, group_size=group, with_scaling=scaled,
            with_zeros=zeros,
        )  # fmt: skip
        codes = ROW16.unpack(packed[0][: CHECKED_ROWS // 16], config.bits, CHECKED_ROWS, k)
        first = slice(0, CHECKED_ROWS)
        exact = reference.matmul(
            small, activations(a, m, k), codes, scale[first] if scaled else None,  # type: ignore
            zero[first] if zero is not None else None,
        )  # fmt: skip
        result = call(m, 0)[:, first].to(torch.float64)
        return float((result - exact).norm() / exact.norm())

    name = f"{w}{' zeros' if zeros else ''}"
    return Case(name, a, group if scaled else -1, "bitblas", weight_bytes, call, error)


_ACTIVATIONS: dict[tuple[str, int, int], torch.Tensor] = {}


def activations(a: str, m: int, k: int) -> torch.Tensor:
    key = (a, m, k)
    if key not in _ACTIVATIONS:
        if a == "int8":
            _ACTIVATIONS[key] = torch.randint(-128, 128, (m, k), dtype=torch.int8)
        else:
            _ACTIVATIONS[key] = torch.randn(m, k).to(getattr(torch, a))
    return _ACTIVATIONS[key]


def torch_cases(n: int, k: int) -> list[Case]:
    cases = []
    for a, most_rows in (("float32", 1 << 30), ("bfloat16", 16), ("float16", 16)):
        dtype = getattr(torch, a)
        weights = [torch.randn(n, k).to(dtype) for _ in range(2)]

        def product(m: int, i: int, a: str = a, weights: list[torch.Tensor] = weights) -> object:
            return activations(a, m, k) @ weights[i % 2].T

        size = n * k * dtype.itemsize
        cases.append(Case(a, a, 0, "torch", size, product, most_rows=most_rows))

    int8 = [torch.randint(-128, 128, (n, k), dtype=torch.int8) for _ in range(2)]
    cases.append(Case("int8", "int8", 0, "torch._int_mm", n * k,
                      lambda m, i: torch._int_mm(activations("int8", m, k), int8[i % 2].T),
                      most_rows=16))  # fmt: skip
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    int4 = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1) for _ in range(4)]
    extras = torch.rand(k // 128, n, 2).to(torch.bfloat16)
    cases.append(
        Case("uint4 zeros", "bfloat16", 128, "torch int4pack", n * k // 2,
             lambda m, i: torch.ops.aten._weight_int4pack_mm_for_cpu(
                 activations("bfloat16", m, k), int4[i % 4], 128, extras))
    )  # fmt: skip
    return cases


def read_case(weight_bytes: int) -> Case:
    """A sum over the same bytes, cold, on all threads: the limit of reading."""
    pool = [torch.ones(weight_bytes // 4) for _ in range(pool_size(weight_bytes))]
    return Case("read", "", 0, "sum", weight_bytes, lambda m, i: pool[i % len(pool)].sum())


def all_cases(n: int, k: int) -> list[Case]:
    ours = [("uint4", 128, True), ("int4", 128, False), ("int2", 128, False),
            ("uint1", 128, False), ("nf4", 128, False), ("fp4_e2m1", 128, False),
            ("e4m3_float8", 128, False), ("int8", 128, False)]  # fmt: skip
    cases = [our_case(w, "float32", n, k, group, zeros) for w, group, zeros in ours]
    cases += [our_case(w, "int8", n, k, 128, False) for w in ("int4", "int2")]
    cases += [our_case("int8", "int8", n, k, -1, False, scaled=False)]
    return cases + torch_cases(n, k)


def measure(cases: list[Case], reads: list[Case], m: int, clock: Callable[[], float]) -> None:
    cases = [case for case in cases if m <= case.most_rows]
    for case in cases:
        case.call(m, 0)  # compiles
        case.errors[m] = case.error(m)
        allowed = 1e-5 if case.kernel == "bitblas" else 1.0
        assert case.errors[m] <= allowed, (case.w, case.a, m, case.errors[m])
    taking_turns = cases + (reads if m == 1 else [])
    for i in range(ROUNDS.get(m, 5)):
        for case in taking_turns:
            start = clock()
            case.call(m, i + 1)
            case.times.setdefault(m, []).append(1e6 * (clock() - start))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def rows_of(
    cases: list[Case], reads: list[Case], sizes: tuple[int, int]
) -> list[dict[str, object]]:
    read_us = {case.weight_bytes: statistics.median(case.times[1]) for case in reads}
    torch_us: dict[tuple[str, int], float] = {}
    for case in cases:
        if case.kernel in ("torch", "torch._int_mm"):
            for m, times in case.times.items():
                torch_us[case.a, m] = statistics.median(times)
    rows = []
    for case in cases:
        for m, times in case.times.items():
            beside = torch_us.get((case.a, m))
            read = read_us.get(case.weight_bytes)
            rows.append({
                "w": case.w, "a": case.a, "group": case.group, "n": sizes[0], "k": sizes[1],
                "m": m, "us": round(statistics.median(times)), "torch_us": round(beside or 0) or "",
                "read_us": round(read) if read else "", "rel_err": f"{case.errors[m]:.1e}",
                "kernel": case.kernel, "min_us": round(min(times)),
            })  # fmt: skip
    return rows


def write(rows: list[dict[str, object]], cases: list[Case], reads: list[Case], ms: list[int],
          name: str) -> None:  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        f"# CPU products, N = {rows[0]['n']}, K = {rows[0]['k']}",
        "",
        f"{datetime.date.today()}, {cpu_name()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, llvmlite {llvmlite.__version__}, Python "
        f"{platform.python_version()}. Milliseconds, median (fastest) of interleaved rounds, cold "
        f"weights. Command: `python {' '.join(sys.argv)}`",
        "",
        "| kernel | W | A | group | read limit | " + " | ".join(f"m = {m}" for m in ms) + " |",
        "|---" * (5 + len(ms)) + "|",
    ]
    read_us = {case.weight_bytes: case.times[1] for case in reads}

    def cell(times: list[float] | None) -> str:
        return f"{statistics.median(times) / 1e3:.2f} ({min(times) / 1e3:.2f})" if times else ""

    for case in cases:
        cells = [cell(read_us.get(case.weight_bytes)), *(cell(case.times.get(m)) for m in ms)]
        lines.append(
            f"| {case.kernel} | {case.w} | {case.a} | {case.group} | " + " | ".join(cells) + " |"
        )
    text = "\n".join(lines) + "\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--n", type=int, default=11008)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--name", default="cpu_" + platform.machine())
    parser.add_argument("--thread-time", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    clock = time.perf_counter
    if options.thread_time:
        clock = time.thread_time
        torch.set_num_threads(1)
    cases = all_cases(options.n, options.k)
    sizes = sorted({case.weight_bytes for case in cases if case.kernel == "bitblas"})
    reads = [read_case(size) for size in sizes]
    for m in options.m:
        measure(cases, reads, m, clock)
        print(f"m = {m} done", file=sys.stderr)
    rows = rows_of(cases, reads, (options.n, options.k))
    write(rows, cases, reads, options.m, options.name)


if __name__ == "__main__":
    main()
