"""Write bitblas/shipped/<GPU>.json: the measured choices that come with the library.

    python benchmarks/ship_choices.py benchmarks/results/h200_decode_tiles.csv "NVIDIA H200"

Only where the fastest tile measured is more than 2 % ahead of the one that the plan would take by
itself, or that one was not measured; for products without a bias whose results are in A's dtype.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections import defaultdict
from pathlib import Path

import bitblas
from bitblas.config import MatmulConfig
from bitblas.formats import FORMATS
from bitblas.kernels import decode

FIELDS = [field.name for field in dataclasses.fields(decode.Tile)][:-1]  # all but the kernel


def main(results: str, device: str) -> None:
    measured: dict[tuple[MatmulConfig, int], dict[decode.Tile, float]] = defaultdict(dict)
    with open(results) as file:
        for row in csv.DictReader(file):
            w, _, zeros = row["w"].partition(" ")
            config = MatmulConfig(
                N=int(row["n"]), K=int(row["k"]), A_dtype=row["a"], W_dtype=w, out_dtype=row["a"],
                group_size=FORMATS[w].fixed_group_size or int(row["group"]), with_scaling=True,
                with_zeros=bool(zeros),
            )  # fmt: skip
            values = [None if x == "None" else int(x) for x in row["kernel"].split()[1:]]
            tile = decode.Tile(**dict(zip(FIELDS, values)))
            measured[config, int(row["m"])][tile] = float(row["us"])
    shipped: dict[str, dict[str, dict[str, object]]] = defaultdict(dict)
    for (config, m), times in measured.items():
        best = min(times, key=times.__getitem__)
        planned = decode.candidates(config, m)[0]
        if times.get(planned, float("inf")) > 1.02 * times[best]:
            shipped[config.problem_key][str(m)] = dataclasses.asdict(best)
    path = Path(bitblas.__file__).parent / "shipped" / f"{device.replace(' ', '_')}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(shipped, indent=1) + "\n")
    print(f"{sum(map(len, shipped.values()))} choices of {len(measured)} products: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
