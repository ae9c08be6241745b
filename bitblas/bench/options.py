"""The options of `python -m bitblas bench`, with the defaults that depend on one another."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from ..config import A_DTYPES, FLOAT_ACTIVATIONS, TORCH_DTYPES, MatmulConfig
from ..formats import FORMATS
from .cases import SWEEP, make_config, quantised_formats
from .chain import MODELS
from .measure import dense_dtype

DESCRIPTION = """\
Times products beside torch's own product of the dequantised weight (cuBLAS on a GPU), a plain read
of the weight's bytes, and other libraries' products of the same weight, as far as they are
installed: side by side in one run, on cold weights, after each result is checked against the
float64 reference. Writes NAME.csv (a row a case, as it comes), NAME.md and NAME.png.

A wrong result or an error is reported, its case is not timed, the others are; the exit status is
then 1. Other libraries' products that are wrong, or have no kernel, are left out with the reason.
"""

EPILOG = """\
examples:
  python -m bitblas bench                                      every format, 8192 x 8192 on a GPU
  python -m bitblas bench --w uint4 nf4 --shapes 4096x4096 28672x8192 --m 1 16 64
  python -m bitblas bench --sweep --w uint4 int2 nf4           time against m, 1 to 16384
  python -m bitblas bench --chain llama-8b --w uint4           microseconds a layer
"""


def shape(text: str) -> tuple[int, int]:
    """ "4096x11008" -> (N, K)."""
    try:
        n, k = map(int, text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NxK, e.g. 4096x4096") from None
    return n, k


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add `bench` to the commands of argparse."""
    parser = commands.add_parser(
        "bench",
        help="time products beside torch's and other libraries'",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    quantised = [name for name, fmt in FORMATS.items() if not fmt.is_dense]
    what = parser.add_argument_group("what is timed")
    what.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    what.add_argument("--n", type=int, help="output features (default: 8192; CPU 11008)")
    what.add_argument("--k", type=int, help="input features (default: 8192; CPU 4096)")
    what.add_argument("--shapes", type=shape, nargs="+", metavar="NxK", help="instead of --n, --k")
    what.add_argument("--m", type=int, nargs="+", help="rows of A (1 16 64 1024; CPU 1 4 16 128)")
    what.add_argument(
        "--w",
        nargs="+",
        choices=quantised,
        metavar="FORMAT",
        help=f"weight formats (default: all that go with --a): {' '.join(quantised)}",
    )
    what.add_argument(
        "--a",
        choices=A_DTYPES,
        metavar="DTYPE",
        help=f"activations: {' '.join(A_DTYPES)} (default: float16; CPU float32)",
    )
    what.add_argument("--out-dtype", help="of results (default: as --a; 8-bit A: float16)")
    what.add_argument(
        "--group",
        type=int,
        help="group size, -1: one for a row (default: 128, nf4 "
        "64, fp8 -1; mxfp4 and nvfp4 have their own)",
    )
    what.add_argument(
        "--zeros",
        action=argparse.BooleanOptionalAction,
        help="zero points for integer formats (default: for uint formats)",
    )
    what.add_argument(
        "--scaling",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="scales (default: yes)",
    )
    what.add_argument(
        "--all-tiles",
        action="store_true",
        help="GPU: time every tile of the kernel family, not what serves a call",
    )
    kinds = parser.add_argument_group("other pictures").add_mutually_exclusive_group()
    kinds.add_argument(
        "--sweep", action="store_true", help="time against m, 1 to 16384 (CPU: 1024)"
    )
    kinds.add_argument(
        "--chain",
        choices=MODELS,
        metavar="MODEL",
        help=f"time the products of a model's layers: {' '.join(MODELS)}",
    )
    parser.add_argument("--layers", type=int, help="of the chain (default: 4, or more to be cold)")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--quick",
        action="store_true",
        help="a first look: N = K = 2048, m 1 16, uint4 int2 nf4, unless they are "
        "given, and fewer measurements",
    )
    how.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no further case after this time"
    )
    how.add_argument(
        "--thread-time",
        action="store_true",
        help="CPU: one thread, and its own time: for a machine that others load",
    )
    how.add_argument("--as-json", action="store_true", help=argparse.SUPPRESS)  # chain's rows
    how.add_argument("--no-peers", action="store_true", help="none of the other libraries")
    how.add_argument("--name", help="of the files (default: gpu, cpu, ..._sweep, ..._llama-8b)")
    how.add_argument(
        "--out",
        type=Path,
        help="folder of the files (default: benchmarks/results where there is one, else results)",
    )
    parser.set_defaults(parser=parser)
    return parser


def complete(options: argparse.Namespace) -> None:
    """Put in the defaults that depend on the device and on other options."""
    error = options.parser.error
    try:
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        error(f"--device: got {options.device!r}, expected cpu, cuda or cuda:INDEX")
    if (
        device.type not in ("cpu", "cuda")
        or device.type == "cuda"
        and not torch.cuda.is_available()
    ):
        error(f"--device: {device} is not there")
    gpu = device.type == "cuda"
    options.device = torch.device("cuda", device.index or 0) if gpu else device
    if (options.n is None) != (options.k is None) or options.shapes and options.n:
        error("give --n and --k together, or --shapes")
    if options.n:
        options.shapes = [(options.n, options.k)]
    quick = options.quick and not options.sweep and not options.chain
    if not options.shapes:
        options.shapes = [(2048, 2048) if quick else (8192, 8192) if gpu else (11008, 4096)]
    if options.sweep and not options.m:
        options.m = SWEEP if gpu else [m for m in SWEEP if m <= 1024]
    if options.chain and not options.m:
        options.m = [1]
    options.m = options.m or ([1, 16] if quick else [1, 16, 64, 1024] if gpu else [1, 4, 16, 128])
    if min(options.m) < 1:
        error(f"--m: got {min(options.m)}, expected positive numbers of rows")
    options.a = options.a or ("float16" if gpu else "float32")
    if options.chain and options.a not in FLOAT_ACTIVATIONS:
        error(f"--chain: needs floating activations, --a is {options.a}")
    options.w = options.w or (
        ["uint4"]
        if options.chain
        else ["uint4", "int2", "nf4"]
        if quick or options.sweep
        else quantised_formats(options.a)
    )
    kind = "_sweep" if options.sweep else f"_{options.chain}" if options.chain else ""
    options.name = options.name or ("gpu" if gpu else "cpu") + kind
    if options.out is None:
        results = Path("benchmarks/results")
        options.out = results if results.is_dir() else Path("results")


def configs_of(options: argparse.Namespace) -> list[MatmulConfig]:
    """The products that are asked for; raises ValueError for what does not go together."""
    return [
        make_config(
            w,
            options.a,
            n,
            k,
            group=options.group,
            zeros=options.zeros,
            scaling=options.scaling,
            out_dtype=options.out_dtype,
        )
        for n, k in options.shapes
        for w in options.w
    ]


def dense_name(options: argparse.Namespace) -> str:
    """What the dense product is called: the library and its dtype."""
    dtype = str(dense_dtype(TORCH_DTYPES[options.a], options.device)).removeprefix("torch.")
    return f"{'cuBLAS' if options.device.type == 'cuda' else 'torch'} {dtype}"
