"""How near the untuned pick comes to the best candidate, on random products.

    python benchmarks/plan_quality.py --seed 1 --rows 1 16 --out plan_quality.csv

Draws products of the kinds that models have (formats, groups, sizes, rows of A), times all
candidates of the families that serve each (of `portable` only where no other does), taking turns in
one run, and compares the plan's pick, shipped and recorded choices left out, with the fastest. One
CSV row for each candidate; the last line printed says how many picks were within 10 % of the best.
"""

from __future__ import annotations

import argparse
import csv
import random
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from bitblas import plan
from bitblas.bench.cases import draw_activation, make_config
from bitblas.bench.measure import Products, TileProduct, compile_tiles, tile_name
from bitblas.bench.timing import Timer, timer_for
from bitblas.config import MatmulConfig
from bitblas.kernels import portable

# as often as they are met: 4-bit integers most
WEIGHTS = ("uint4",) * 6 + ("int4",) * 3 + (
    "int2", "uint2", "int1", "int8", "uint8", "nf4", "e4m3_float8", "nvfp4", "mxfp4", "uint3",
    "fp4_e2m1",
)  # fmt: skip
FEATURES = (
    *(1024, 1280, 1536, 2048, 2560, 2816, 3072, 3584, 4608, 5120, 6144, 6912, 7168, 9216, 10240),
    *(11008, 12288, 13824, 16384, 17920, 18944, 22016, 25600, 27648),
)
MOST_WEIGHTS = 220e6


@dataclass
class Case:
    """A product and the candidates for it, the plan's pick first."""

    config: MatmulConfig
    m: int
    candidates: list[tuple[ModuleType, Any]]

    def products(self, device: torch.device) -> list[tuple[str, TileProduct]]:
        """The candidates by name; those of `portable` only where the pick is one of them."""
        return [
            (tile_name(family, tile), TileProduct(self.config, device, family, tile))
            for family, tile in self.candidates
            if family is not portable or self.candidates[0][0] is portable
        ]


def draw_product(rng: random.Random, rows: tuple[int, int]) -> tuple[MatmulConfig, int]:
    """A product with rows[0] <= m <= rows[1], small m as often as large ones."""
    while True:
        n, k = rng.choice(FEATURES), rng.choice(FEATURES)
        if n * k <= MOST_WEIGHTS:
            break
    a = rng.choice(("float16", "float16", "bfloat16"))
    low, high = rows
    m = round(low * (high / low) ** rng.random())
    return make_config(rng.choice(WEIGHTS), a, n, k, group=rng.choice((None, None, 64))), m


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rows", type=int, nargs=2, default=(1, 16), metavar=("LOW", "HIGH"))
    parser.add_argument("--out", default="plan_quality.csv")
    parser.add_argument("--budget", type=float, default=1e9, metavar="SECONDS")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    device = torch.device("cuda", torch.cuda.current_device())
    cases = [
        Case(config, m, plan.candidates(config, m, device))
        for config, m in (draw_product(rng, tuple(options.rows)) for _ in range(options.count))
    ]
    compile_tiles((product, case.m) for case in cases for _, product in case.products(device))
    timer = timer_for(device, rounds=9)
    stop, ratios = time.monotonic() + options.budget, []
    with open(options.out, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow("w,a,group,n,k,m,us,rel_err,kernel".split(","))
        for case in cases:
            if time.monotonic() > stop:
                print("budget spent")
                break
            ratios.append(run(case, timer, writer))
            file.flush()
    within = sum(ratio <= 1.1 for ratio in ratios)
    print(f"{within} of {len(ratios)} picks within 10 % of the best; worst {max(ratios):.2f}")


def run(case: Case, timer: Timer, writer: Any) -> float:
    """Time of the pick, which is the first candidate, over that of the best."""
    config, m = case.config, case.m
    failures: list[Exception] = []
    products = Products(config, timer, peers=())
    A = draw_activation(config, m, timer.device)
    variants = products.ours(A, case.products(timer.device), failures.append)
    if failures:
        raise failures[0]
    times = timer.medians([variant.prepared for variant in variants])
    w = config.W_dtype + (" zeros" if config.with_zeros else "")
    for variant, us in zip(variants, times):
        writer.writerow(
            [w, config.A_dtype, config.group_length, config.N, config.K, m, f"{us:.2f}",
             f"{variant.error:.1e}", variant.kernel]
        )  # fmt: skip
    best = min(range(len(times)), key=times.__getitem__)
    ratio = times[0] / times[best]
    mark = f"  {variants[0].kernel}"
    if ratio > 1.1:
        mark += f" instead of {variants[best].kernel}"
    size = f"{config.N}x{config.K}"
    print(f"{ratio:.2f}  {w} {config.A_dtype} {size} m={m} {times[0]:.1f} us{mark}", flush=True)
    return ratio


if __name__ == "__main__":
    main()
