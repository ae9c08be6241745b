"""Write bitblas/shipped/<GPU>.json: the measured choices that come with the library.

    python benchmarks/ship_choices.py "NVIDIA H200" benchmarks/results/h200_decode_tiles.csv

Only where the fastest tile measured is more than 2 % ahead of the one that the plan would take by
itself, or that one was not measured; for products without a bias whose results are in A's dtype.
Choices of products that are not in the tables stay.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import bitblas
from bitblas import plan
from bitblas.config import MatmulConfig
from bitblas.formats import FORMATS
from bitblas.kernels import batch, decode

FAMILIES: dict[str, ModuleType] = {"decode": decode, "batch": batch}


def tile_of(kernel: str) -> tuple[ModuleType, Any]:
    """The family and the tile of "family field field ...", as bitblas.bench.measure.tile_name
    writes them; fields may be missing at the end."""
    name, *values = kernel.split()
    family = FAMILIES[name]
    known = {"None": None, "True": True, "False": False}
    found = {}
    for field, value in zip(dataclasses.fields(family.Tile), values):
        number = known[value] if value in known else value
        if isinstance(number, str) and field.type != "str":
            number = int(number)
        found[field.name] = bool(number) if field.type == "bool" else number
    return family, family.Tile(**found)


def main(device: str, *results: str) -> None:
    measured: dict[tuple[MatmulConfig, int], dict[Any, float]] = defaultdict(dict)
    for table in results:
        for row in csv.DictReader(open(table)):
            if " + " in row["kernel"]:  # two sections of rows: no choice of a tile
                continue
            w, _, zeros = row["w"].partition(" ")
            config = MatmulConfig(
                N=int(row["n"]), K=int(row["k"]), A_dtype=row["a"], W_dtype=w, out_dtype=row["a"],
                group_size=FORMATS[w].fixed_group_size or int(row["group"]), with_scaling=True,
                with_zeros=bool(zeros),
            )  # fmt: skip
            measured[config, int(row["m"])][tile_of(row["kernel"])] = float(row["us"])
    path = Path(bitblas.__file__).parent / "shipped" / f"{device.replace(' ', '_')}.json"
    shipped = json.loads(path.read_text()) if path.exists() else {}
    chosen = 0
    for (config, m), times in measured.items():
        best = min(times, key=times.__getitem__)
        serving = [family for family in FAMILIES.values() if family.serves(config, m, 90)]
        planned = plan.ranked(config, m, serving, decode.GPU())[0]
        choices = shipped.setdefault(config.problem_key, {})
        choices.pop(str(m), None)
        if times.get(planned, float("inf")) > 1.02 * times[best]:
            choices[str(m)] = dataclasses.asdict(best[1])
            chosen += 1
    path.parent.mkdir(exist_ok=True)
    found = {key: choices for key, choices in shipped.items() if choices}
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{chosen} choices of {len(measured)} products: {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
