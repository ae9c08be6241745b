"""The portable kernels without a GPU: their results in Triton's interpreter, their machine code.

The interpreter is chosen when triton is imported, so its cases run in two processes of their own,
which this module starts and which run its `main`.
"""

from __future__ import annotations

import dataclasses
import sys

import compat
import pytest
import torch
from compat import COMBINATIONS, make_config
from interpreter import interpret_all, print_results
from problems import draw, relative_error, tolerance

from bitblas.config import MatmulConfig, MatmulConfigWithSplitK

SHARDS = 2


# m = 1 and m = 20 reach both kernels; alternating keeps the interpreter's time down.
INTERPRETED = {
    "-".join(map(str, case)): (case, 1 if index % 2 else 20, 1)
    for index, case in enumerate(COMBINATIONS)
}
SPLIT = [
    ("float16", "uint4", "rescale"),
    ("int8", "uint8", "original"),
    ("float32", "nf4", None),
    ("bfloat16", "uint1", "quantized"),
]
INTERPRETED |= {f"split-{'-'.join(map(str, case))}": (case, 5, 2) for case in SPLIT}


def interpret(
    case: tuple[str, str, str | None], m: int, split_k: int
) -> tuple[float, float, float]:
    """(error, allowed error of the product; error of dequantize) of one case."""
    from bitblas import reference
    from bitblas.kernels import portable
    from bitblas.kernels.prepared import execute

    config = make_config(*case)
    problem = draw(config, m, seed=m)
    W = portable.layout(config).pack(problem.codes, config.bits)
    out = torch.full((m, config.N), 77, dtype=config.torch_out_dtype)
    tile = None
    if split_k > 1:
        gemm = next(tile for tile in portable.candidates(config, m) if tile.kernel == "gemm")
        tile = dataclasses.replace(gemm, split_k=split_k)
    execute(portable.launches(config, problem.A, W, out, **problem.extras(), tile=tile), out.device)
    weight = torch.full((config.N, config.K), 77.0)
    extras = {name: x for name, x in problem.extras().items() if name != "bias"}
    portable.dequantize(config, W, weight, **extras)
    exact = reference.dequantize(config, problem.codes, **extras)
    # the interpreter truncates where a GPU rounds to bfloat16
    slack = 2 if config.A_dtype == "bfloat16" else 1
    error = relative_error(out, problem.expected())
    return error, slack * tolerance(config), relative_error(weight, exact)


def main(shard: int) -> None:
    cases = dict(list(INTERPRETED.items())[shard::SHARDS])
    print_results({name: lambda case=case: interpret(*case) for name, case in cases.items()})


@pytest.fixture(scope="module")
def interpreted() -> dict[str, object]:
    return interpret_all(__file__, SHARDS)


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernels_agree_with_float64(name, interpreted):
    result = interpreted[name]
    assert not isinstance(result, str), result
    error, allowed, weight_error = result
    assert error <= allowed
    assert weight_error <= 3e-7


def compiled(config: MatmulConfig, m: int, arch: int, step: int = 0):
    """Statistics of a step of the default product of m rows; operands are meta tensors."""
    from bitblas.kernels import compile as compiler

    launch = compat.Case("portable", config, m, arch).launches()[step]
    return compiler.statistics(compiler.compile_launch(launch, arch))


LARGE = dict(N=4096, K=4096)
COMPILED = {  # each decoder with each activation dtype at least once
    "float16-uint4": make_config("float16", "uint4", "original", group_size=128, **LARGE),
    "float16-int1": make_config("float16", "int1", "rescale", group_size=128, **LARGE),
    "float16-nf4": make_config("float16", "nf4", group_size=64, **LARGE),
    "bfloat16-uint4": make_config("bfloat16", "uint4", "quantized", group_size=128, **LARGE),
    "bfloat16-nvfp4": make_config("bfloat16", "nvfp4", **LARGE),
    "bfloat16-uint3": make_config("bfloat16", "uint3", group_size=128, **LARGE),
    "float32-e4m3": make_config("float32", "e4m3_float8", group_size=128, **LARGE),
    "int8-int4": make_config("int8", "int4", group_size=-1, **LARGE),
    "int8-uint8": make_config("int8", "uint8", group_size=-1, with_scaling=False, **LARGE),
    "int4-int2": make_config("int4", "int2", group_size=128, **LARGE),
    "e4m3-mxfp4": make_config("e4m3_float8", "mxfp4", **LARGE),
    "e5m2-e5m2": make_config("e5m2_float8", "e5m2_float8", group_size=-1, **LARGE),
}


TARGETS = [(name, arch) for name in COMPILED for arch in (80, 90)]
TARGETS += [("float16-uint4", 89), ("bfloat16-uint4", 89), ("int8-int4", 89)]


@pytest.mark.parametrize("m", [1, 1024])
@pytest.mark.parametrize(("name", "arch"), TARGETS)
def test_kernels_compile_without_spills(name, m, arch):
    config = COMPILED[name]
    found = compiled(config, m, arch)
    assert found.local_bytes <= compat.most_local_bytes("portable")
    if config.A_dtype != "float32":
        assert found.count("HMMA", "IMMA", "HGMMA", "IGMMA") > 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["float16-uint4", "bfloat16-uint4", "int8-int4", "e5m2-e5m2"])
def test_few_rows_read_the_weight_16_bytes_at_a_time(name, arch):
    loads = [op for op in compiled(COMPILED[name], 1, arch).opcodes if op.startswith("LDG")]
    assert any(op.startswith(("LDG.E", "LDGSTS.E")) and op.endswith(".128") for op in loads), loads


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("step", [0, 1])
def test_split_k_compiles_without_spills(step, arch):
    config = MatmulConfigWithSplitK(
        W_dtype="uint4", group_size=128, with_scaling=True, k_split=4, **LARGE
    )
    assert compiled(config, 16, arch, step).local_bytes <= compat.most_local_bytes("portable")


if __name__ == "__main__":
    main(int(sys.argv[1]))
