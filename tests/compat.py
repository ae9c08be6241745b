"""Every kernel family compiled without a GPU, for the Triton releases that users have.

    python tests/compat.py .compat/3.6.0 .compat/3.8.0     folders that hold a triton package
    python tests/compat.py                                 the Triton of this environment

Each case is compiled and its machine code read: registers spilt, shared memory, matrix
instructions, 16-byte loads of the weight. A case that fails or breaks a rule makes the exit status
1. The cases are a sample, the same for all releases: each format with each zeros mode, twice for
each family, over activations, group sizes, row counts and architectures; --all takes the product.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import inspect
import itertools
import json
import os
import pkgutil
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from attention_cases import CACHES, meta_operands

import bitblas.kernels
from bitblas.config import (
    A_DTYPES,
    FLOAT_ACTIVATIONS,
    QUANTIZED_ACTIVATIONS,
    TORCH_DTYPES,
    ZEROS_MODES,
    MatmulConfig,
    weight_dtypes,
)
from bitblas.formats import FORMATS

SIZES = ((4096, 4096),) * 3 + ((1000, 1440),)  # N, K; the last needs every mask
GROUPS = (128, 128, 64, 32, -1)
ROWS = {"few": (1, 4, 8, 16), "tens": (32, 64, 96), "many": (192, 512, 4096)}
# bytes of shared memory that a block can have
SHARED = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}
MATRIX = ("HMMA", "IMMA", "HGMMA", "IGMMA", "QGMMA")
COUNTED = {"mma": MATRIX, "ldg": (), "lds": ("LDS",), "bar": ("BAR",)}  # ldg: of 16 bytes, or TMA

# (activation, weight, zeros mode) of every product that is not dense
COMBINATIONS = [
    (a, w, zeros)
    for a in A_DTYPES
    for w in weight_dtypes(a)
    if not FORMATS[w].is_dense
    for zeros in (None, *(ZEROS_MODES if FORMATS[w].is_integer else ()))
]


def make_config(a: str, w: str, zeros: str | None = None, **fields: Any) -> MatmulConfig:
    """A small product of any combination, with scales; fields replace its defaults."""
    fixed = FORMATS[w].fixed_group_size
    defaults = dict(
        N=70, K=96, A_dtype=a, W_dtype=w, out_dtype=a if a in FLOAT_ACTIVATIONS else "float32",
        group_size=fixed or 32, with_scaling=True, with_zeros=zeros is not None, zeros_mode=zeros,
    )  # fmt: skip
    return MatmulConfig(**(defaults | fields))


@dataclass(frozen=True)
class Case:
    """A product of m rows by the default tile of a family, a module of bitblas.kernels."""

    family: str
    config: MatmulConfig
    m: int
    arch: int

    def launches(self) -> list[Any]:
        """What it starts, with operands on the meta device."""
        module = importlib.import_module(f"bitblas.kernels.{self.family}")
        config, m = self.config, self.m
        roomy = {"roomy": self.arch == 90}
        takes = inspect.signature(module.candidates).parameters
        tile = module.candidates(config, m, **{k: v for k, v in roomy.items() if k in takes})[0]
        width = config.K // 2 if config.A_dtype == "int4" else config.K
        return module.launches(
            config,
            meta((m, width), config.torch_A_dtype),
            meta(module.layout(config).shape(config.bits, config.N, config.K), torch.int8),
            meta((m, config.N), config.torch_out_dtype),
            **extras(config),
            tile=tile,
        )

    def complaints(self, kernel: str, found: Any, wide: list[str]) -> list[str]:
        """What is wrong with one of its kernels, besides spilling and too much shared memory."""
        if kernel in ("sum_parts_kernel", "row_sums_kernel", "dequantize_kernel"):
            return []
        wrong = []
        if self.config.A_dtype != "float32" and not found.count(*MATRIX):
            wrong.append("no matrix instructions")
        # the portable gemm serves what gemv cannot, 3-bit codes among them: known to be slow
        if self.m <= 16 and kernel != "gemm_kernel" and not wide:
            wrong.append("no 16-byte loads")
        return wrong

    def __str__(self) -> str:
        c = self.config
        group = f" g{c.group_length}" if c.num_groups > 1 else ""
        zeros = f" {c.zeros_mode}" if c.with_zeros else ""
        name = f"{c.A_dtype} x {c.W_dtype}{zeros}{group}".replace("_float8", "")
        return f"{self.family} sm_{self.arch} {name} {self.m}x{c.N}x{c.K}"


@dataclass(frozen=True)
class Rows:
    """m rows of k float activations, quantised."""

    given: str
    dtype: str
    m: int
    k: int
    arch: int
    family = "quantize"

    def launches(self) -> list[Any]:
        from bitblas.kernels import quantize

        x, q = (
            meta((self.m, self.k), TORCH_DTYPES[name]) for name in (self.given, self.dtype)
        )  # fmt: skip
        return [quantize.launch(x, q, meta((self.m,), torch.float32), self.dtype, self.arch)]

    def complaints(self, kernel: str, found: Any, wide: list[str]) -> list[str]:
        return [] if wide or self.k % 16 else ["no 16-byte loads"]

    def __str__(self) -> str:
        return f"quantize sm_{self.arch} {self.given} to {self.dtype} {self.m}x{self.k}"


@dataclass(frozen=True)
class Attention:
    """A call of FlashAtten with keys and values of one kind, 32768 of them."""

    cache: str
    dtype: str
    dim: int
    q_len: int
    layout: str
    arch: int
    family = "attention"

    def launches(self) -> list[Any]:
        from bitblas.kernels import attention

        dtype = TORCH_DTYPES[self.dtype]
        given = meta_operands(self.cache, self.q_len, self.dim, dtype, layout=self.layout)
        tile = attention.tile_for(given, self.arch, 132, 32768)
        found = attention.launches(given, torch.empty_like(given.Q), True, tile, self.arch)
        if self.cache != "float16" or self.layout == "ntn":
            wide = meta((*given.V.shape[:3], self.dim), dtype)
            numbers = given.k_scale, given.k_zeros
            found.append(attention.expand_launch(given.K, wide, *numbers, self.arch))
        return found

    def complaints(self, kernel: str, found: Any, wide: list[str]) -> list[str]:
        if kernel in ("combine", "expand"):
            return []
        wrong = [] if found.count(*MATRIX) else ["no matrix instructions"]
        narrow = self.dim % 64 or (self.cache, self.dim) == ("int4", 64)  # a piece of 8 bytes
        if kernel != "attend" and not wide and not narrow:
            wrong.append("no 16-byte loads")
        return wrong

    def __str__(self) -> str:
        return (
            f"attention sm_{self.arch} {self.dtype}, cache {self.cache} {self.layout}, "
            f"{self.q_len} queries, dim {self.dim}"
        )


Examined = Case | Rows | Attention


@dataclass(frozen=True)
class Finding:
    """What became of one kernel of a case; complaints: the rules that it breaks."""

    kernel: str
    registers: int
    local_bytes: int
    shared_bytes: int
    counts: dict[str, int]
    complaints: tuple[str, ...]


def families() -> list[str]:
    """The modules of bitblas.kernels with the interface that kernels/launch.py describes."""
    found = []
    for info in pkgutil.iter_modules(bitblas.kernels.__path__):
        if info.name.endswith("_kernels"):
            continue
        module = importlib.import_module(f"bitblas.kernels.{info.name}")
        if all(hasattr(module, name) for name in ("serves", "candidates", "launches")):
            found.append(info.name)
    return found


def rows() -> list[Rows]:
    """What to compile of the quantiser."""
    sizes = ((1, 4096), (4096, 1000), (256, 14336), (16, 40960), (3, 1001))
    drawn = itertools.product(sizes, FLOAT_ACTIVATIONS, QUANTIZED_ACTIVATIONS, SHARED)
    return [Rows(given, dtype, m, k, arch) for (m, k), given, dtype, arch in drawn][::4]


def attentions(everything: bool = False) -> list[Attention]:
    """What to compile of attention."""
    queries = (1, 3, 8, 24, 512)
    drawn = itertools.product(
        CACHES, ("float16", "bfloat16"), (128, 64, 256, 72), queries, ("nnn", "ntn"), SHARED
    )
    found = [Attention(*fields) for fields in drawn]
    return found if everything else random.Random(0).sample(found, 60)


def cases(family: str, everything: bool = False) -> Iterator[Case]:
    """What to compile of a family: a sample, or every combination for every row count."""
    seed = random.Random(0)
    activations: dict[tuple[str, str | None], list[str]] = {}
    for a, w, zeros in COMBINATIONS:
        activations.setdefault((w, zeros), []).append(a)
    for (w, zeros), valid in activations.items():
        drawn = [
            Case(family, _drawn(a, w, zeros, seed), m, arch)
            for a in valid
            for rows in ROWS.values()
            for arch in SHARED
            for m in (rows if everything else [seed.choice(rows)])
        ]
        found = [case for case in drawn if served(case)]
        yield from found if everything else _spread(found, seed)


def _drawn(a: str, w: str, zeros: str | None, seed: random.Random) -> MatmulConfig:
    n, k = seed.choice(SIZES)
    group = FORMATS[w].fixed_group_size or seed.choice(GROUPS)
    if group > 0 and k % group:
        group = 32
    scaled = zeros is not None or FORMATS[w].fixed_group_size is not None or seed.random() < 0.8
    return make_config(a, w, zeros, N=n, K=k, group_size=group, with_scaling=scaled)


def _spread(found: list[Case], seed: random.Random) -> list[Case]:
    """Two of them, of different row counts where that can be."""
    if not found:
        return []
    first = seed.choice(found)
    others = [case for case in found if case.m != first.m] or [first]
    return list(dict.fromkeys([first, seed.choice(others)]))


def served(case: Case) -> bool:
    """Whether the family computes it."""
    module = importlib.import_module(f"bitblas.kernels.{case.family}")
    return bool(module.serves(case.config, case.m, case.arch))


def extras(config: MatmulConfig) -> dict[str, torch.Tensor]:
    """scale, zeros and global_scale on the meta device, as far as the config has them."""
    found = {}
    if config.with_scaling:
        found["scale"] = meta((config.N, config.num_groups), config.scale_dtypes[0])
    if config.with_zeros:
        found["zeros"] = meta(config.zeros_shape, config.zeros_dtypes[0])
    if config.format.has_global_scale:
        found["global_scale"] = meta((1,), torch.float32)
    return found


def meta(shape: Any, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def most_local_bytes(family: str, kernel: str = "") -> int:
    """Of stack and spilled registers. Large-m tiles of the portable family can fill all registers:
    up to 80 bytes then pass through memory, in a dozen of some thousand instructions. Decode tiles
    are chosen so that they fit; a few miss it by 2 to 20 words. In the batch families the warps
    that prepare scales keep what does not change in memory: up to 112 bytes. Of attention, 64 rows
    of int8 and dim 256 of 16 bits spill, more from 3.8 on, and attend_rows with three blocks on a
    multiprocessor."""
    import triton

    release = triton.__version__.rpartition(".")[0]
    attention = 96 if release in ("3.6", "3.7") else 160
    if kernel == "attend_rows":
        attention = 160
    most = {
        "portable": 96, "decode": 80, "batch": 128, "batch8": 144, "attention": attention,
    }  # fmt: skip
    return most.get(family, 0)


def examine(case: Examined) -> list[Finding]:
    """Compile the kernels of a case and read their machine code."""
    from bitblas.kernels import compile as compiler

    found = []
    for launch in case.launches():
        statistics = compiler.statistics(compiler.compile_launch(launch, case.arch))
        kernel = launch.function.__name__
        wide = [op for op in statistics.opcodes if op.startswith(("LDG", "LDGSTS", "UTMALDG"))]
        wide = [op for op in wide if op.endswith(".128") or op.startswith("UTMALDG")]
        complaints = []
        if statistics.local_bytes > most_local_bytes(case.family, kernel):
            complaints.append(f"{statistics.local_bytes} bytes of local memory")
        shared = statistics.shared_bytes + launch.extra_shared
        if shared > SHARED[case.arch]:
            complaints.append(f"{shared} bytes of shared memory")
        complaints += case.complaints(kernel, statistics, wide)
        counts = {name: statistics.count(*prefixes) for name, prefixes in COUNTED.items()}
        counts["ldg"] = sum(statistics.opcodes[op] for op in wide)
        found.append(
            Finding(
                kernel,
                statistics.registers,
                statistics.local_bytes,
                shared,
                counts,
                tuple(complaints),
            )
        )
    return found


def _row(case: Examined) -> dict[str, Any]:
    """The findings of a case as JSON can hold them, or what went wrong."""
    try:
        return {"case": str(case), "findings": [vars(finding) for finding in examine(case)]}
    except Exception as error:
        return {"case": str(case), "error": _reason(error)}


def _reason(error: BaseException) -> str:
    """The innermost error, and the kernel's lines that a compiler error ends with."""
    where = ""
    while error.__cause__ is not None:
        where, error = str(error), error.__cause__
    text = f"{type(error).__name__}: {error}"
    return "\n    ".join([*where.splitlines()[-5:], *text.splitlines()[-8:]])


def _examined(chosen: Sequence[Examined]) -> Iterator[dict[str, Any]]:
    """The rows of the cases, in parallel; one by one those left when the compiler aborts."""
    left = dict.fromkeys(chosen)
    with (
        contextlib.suppress(BrokenProcessPool),
        concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool,
    ):
        futures = {pool.submit(_row, case): case for case in chosen}
        for done in concurrent.futures.as_completed(futures):
            row = done.result()
            del left[futures[done]]
            yield row
    for case in left:
        try:
            with concurrent.futures.ProcessPoolExecutor(1) as pool:
                yield pool.submit(_row, case).result()
        except BrokenProcessPool:
            yield {"case": str(case), "error": "the compiler aborted"}


def worker(family: str | None, everything: bool) -> None:
    """Examine all cases with this process's Triton: the number of cases, then a line for each."""
    import triton

    torch.set_num_threads(1)
    chosen: list[Examined] = [
        case for name in families() if family in (None, name) for case in cases(name, everything)
    ]
    chosen += rows() if family in (None, Rows.family) else []
    chosen += attentions(everything) if family in (None, Attention.family) else []
    print(json.dumps({"version": triton.__version__, "cases": len(chosen)}), flush=True)
    for row in _examined(chosen):
        print(json.dumps(row), flush=True)


def survey(folder: str | None, options: list[str]) -> tuple[str, list[dict[str, Any]]]:
    """The version of the Triton in a folder, and the rows of its worker; prints progress."""
    root = Path(__file__).parent.parent
    paths = [*([folder] if folder else []), str(root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, __file__, "--worker", *options]
    start, rows = time.monotonic(), []
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdout is not None
        lines = (json.loads(line) for line in process.stdout if line.startswith("{"))
        head = next(lines, {"version": str(folder), "cases": 0})
        for row in lines:
            rows.append(row)
            for complaint in complaints(row):
                print(f"{head['version']}  {row['case']}: {complaint}", flush=True)
            if len(rows) % 20 == 0 or len(rows) == head["cases"]:
                seconds = time.monotonic() - start
                print(
                    f"{head['version']}  {len(rows)} of {head['cases']}, {seconds:.0f} s",
                    flush=True,
                )
        if process.wait() or not rows:
            errors.seek(0)
            tail = errors.read()[-3000:]
            rows.append({"case": "worker", "error": f"{tail}\nexit status {process.returncode}"})
            print(head["version"], rows[-1]["error"], flush=True)
    return head["version"], rows


def complaints(row: dict[str, Any]) -> list[str]:
    """What is wrong with a case."""
    if "error" in row:
        return [row["error"].strip()]
    return [f"{f['kernel']}: {text}" for f in row["findings"] for text in f["complaints"]]


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each kernel of each case; for each release its numbers, in the heading's order."""
    cells: dict[str, dict[str, str]] = {}
    for version, rows in results.items():
        for row in rows:
            for f in row.get("findings", ()):
                numbers = [f["registers"], f["local_bytes"], f["shared_bytes"] / 1024]
                numbers += [f["counts"][name] for name in COUNTED]
                text = "".join(f"{number:>5.0f}" for number in numbers)
                cells.setdefault(f"{f['kernel']:<17} {row['case']}", {})[version] = text
    heading = "".join(f"{name:>5}" for name in ("reg", "loc", "KiB", *COUNTED))
    width = max(map(len, cells), default=0)
    lines = [" " * width + "".join(f" |{version:<{len(heading)}}" for version in results)]
    lines.append(" " * width + f" |{heading}" * len(results))
    for name, found in sorted(cells.items()):
        row = "".join(f" |{found.get(version, '-'):<{len(heading)}}" for version in results)
        lines.append(f"{name:<{width}}{row}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folders", nargs="*", help="each holds a triton package")
    parser.add_argument("--family", help="only this module of bitblas.kernels")
    parser.add_argument("--all", action="store_true", help="the whole product of cases")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.family, arguments.all)
        return 0
    options = ["--all"] if arguments.all else []
    options += ["--family", arguments.family] if arguments.family else []
    results = dict(survey(folder, options) for folder in arguments.folders or [None])
    print(table(results))
    wrong = {version: sum(map(bool, map(complaints, rows))) for version, rows in results.items()}
    for version, rows in results.items():
        print(f"{version}: {len(rows)} cases, {wrong[version]} wrong")
    return 1 if any(wrong.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
