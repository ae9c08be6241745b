"""What it costs to start: import, first call with cold and warm disk caches, host time of a call.

    python benchmarks/startup.py --name startup_h200

Every figure is from a fresh process. "First call" is construction of the Matmul, planning,
compiling or loading the kernel, and the product, with weights packed and torch's own device
start-up done beforehand; "later" is the same for an operator that is not the process's first, whose
compiler libraries are loaded. Host time is that of a repeated eager call without waiting for the
GPU, 200 in a row; products and layers of bitblas and torch take turns.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

FORMATS = ("uint4", "uint2", "nf4", "int8", "e4m3_float8")
SIZE = 1024


def measure_import() -> dict[str, float]:
    start = time.perf_counter()
    import torch  # noqa: F401

    middle = time.perf_counter()
    import bitblas  # noqa: F401

    return {"torch_s": middle - start, "bitblas_s": time.perf_counter() - middle}


def measure_call(W_dtype: str, m: int, primed: bool) -> dict[str, float]:
    import torch

    import bitblas
    from bitblas.formats import get_format

    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_integer = get_format(W_dtype).is_integer
    config = bitblas.MatmulConfig(
        N=SIZE,
        K=SIZE,
        W_dtype=W_dtype,
        group_size=128,
        with_scaling=True,
        with_zeros=is_integer,
    )
    codes = torch.randint(0, 1 << config.bits, (SIZE, SIZE), dtype=torch.uint8, device=device)
    packed = bitblas.Matmul(config).weight_transform(codes)
    scale = torch.rand((SIZE, SIZE // 128), device=device).half()
    zeros = scale.clone() if is_integer else None
    A = torch.randn((m, SIZE), device=device).half()
    dense = torch.randn((SIZE, SIZE), device=device).half()
    torch.matmul(A, dense)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    if primed:
        other = bitblas.Matmul(bitblas.MatmulConfig(N=64, K=64, W_dtype="int2"))
        zero = torch.zeros((64, 64), dtype=torch.int8, device=device)
        other(torch.zeros((1, 64), device=device).half(), other.transform_weight(zero))
    wait()

    def call(matmul: bitblas.Matmul) -> torch.Tensor:
        return matmul(A, packed, scale=scale, zeros=zeros)

    start = time.perf_counter()
    matmul = bitblas.Matmul(config)
    call(matmul)
    wait()
    first = time.perf_counter() - start
    return {"first_call_s": first}


def measure_host(m: int) -> dict[str, float]:
    import torch

    import bitblas

    size, fields = 4 * SIZE, dict(W_dtype="uint4", group_size=128)
    float_layer = torch.nn.Linear(size, size, bias=False, device="cuda", dtype=torch.float16)
    layer = bitblas.Linear.from_float(float_layer, **fields)
    matmul, qweight = layer.bitblas_matmul, layer.qweight
    scale, zeros, weight = layer.scales, layer.zeros, float_layer.weight.detach()
    A = torch.randn((m, size), device="cuda").half()
    calls = {
        "Matmul": lambda: matmul(A, qweight, scale=scale, zeros=zeros),
        "torch.matmul": lambda: torch.matmul(A, weight),
        "Linear": lambda: layer(A),
        "torch.nn.Linear": lambda: float_layer(A),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(15):
            for name, call in calls.items():
                call()
                torch.cuda.synchronize()
                begun = time.perf_counter()
                for _ in range(200):
                    call()
                times[name].append((time.perf_counter() - begun) * 1e6 / 200)
                torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in times.items()}


def fresh_process(arguments: list[str], cache: str | None) -> dict[str, float]:
    environment = dict(os.environ)
    if cache is not None:
        environment["BITBLAS_CACHE_DIR"] = f"{cache}/bitblas"
        environment["TRITON_CACHE_DIR"] = f"{cache}/triton"
    command = [sys.executable, __file__, *arguments]
    output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--name", default="startup", help="name of the files in benchmarks/results")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, *rest = options.measure
        if kind == "import":
            measured = measure_import()
        elif kind == "host":
            measured = measure_host(int(rest[0]))
        else:
            measured = measure_call(rest[0], int(rest[1]), rest[2] == "primed")
        print(json.dumps(measured))
        return

    import torch

    imports = [fresh_process(["--measure", "import"], None) for _ in range(3)]
    best = min(imports, key=lambda row: row["bitblas_s"])
    rows = []
    for W_dtype in options.formats:
        for m in options.m:
            with tempfile.TemporaryDirectory() as cache:
                arguments = ["--measure", "call", W_dtype, str(m)]
                cold = fresh_process([*arguments, "first"], cache)
                warm = fresh_process([*arguments, "first"], cache)
                later = fresh_process([*arguments, "primed"], cache)
            rows.append(
                {
                    "w": W_dtype,
                    "m": m,
                    "cold_s": round(cold["first_call_s"], 3),
                    "warm_s": round(warm["first_call_s"], 4),
                    "later_warm_s": round(later["first_call_s"], 4),
                }
            )
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    with open(results / f"{options.name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else platform.processor() or "CPU"
    lines = [
        "# Start-up",
        "",
        f"{date.today()}, {device}, torch {torch.__version__}, Python {platform.python_version()}. "
        f"N = K = {SIZE}, group 128. Command: `python {' '.join(sys.argv)}`",
        "",
        f"`import torch` {best['torch_s']:.2f} s, then `import bitblas` {best['bitblas_s']:.3f} s.",
        "",
        "| W | m | first call, cold cache (s) | warm cache (s) | later, warm cache (s) |",
        "|---|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    if has_gpu:
        host = {m: fresh_process(["--measure", "host", str(m)], None) for m in (1, 16)}
        lines += [
            "",
            f"Host time of a repeated eager call (us), uint4 and float16, N = K = {4 * SIZE}:",
            "",
            "| m | " + " | ".join(host[1]) + " |",
            "|---|" + "---|" * len(host[1]),
        ]
        for m, times in host.items():
            lines.append(f"| {m} | " + " | ".join(f"{x:.1f}" for x in times.values()) + " |")
    text = "\n".join(lines) + "\n"
    (results / f"{options.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
