"""The CPU backend against the float64 reference."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from problems import Problem, draw, relative_error, tolerance

from bitblas import cpu, reference
from bitblas.config import A_DTYPES, INTEGER_ACTIVATIONS, MatmulConfig, weight_dtypes
from bitblas.cpu import epilogue, integer, microkernel, threads
from bitblas.cpu.decode import Weights
from bitblas.cpu.jit import Compiler, assembly
from bitblas.cpu.target import Target
from bitblas.formats import FORMATS, get_format
from bitblas.layouts import ROW16

PACKED_FORMATS = [name for name, f in FORMATS.items() if not f.is_dense]
PAIRS = [(a, w) for a in A_DTYPES for w in weight_dtypes(a) if not FORMATS[w].is_dense]
ROWS = (1, 2, 3, 5, 8, 17, 40)
SHAPES = (  # N, K, group size: rows and values of k that fill no block, one and several groups
    (37, 128, 32), (1, 64, -1), (50, 70, -1), (16, 192, 96), (33, 96, 32), (5, 2, -1),
)  # fmt: skip
SEED = int(os.environ.get("BITBLAS_TEST_SEED") or random.SystemRandom().randrange(1 << 30))


@pytest.fixture(autouse=True)
def _print_seed() -> None:
    print(f"BITBLAS_TEST_SEED={SEED} (of this file)")


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compile afresh rather than trust what an earlier version left in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITBLAS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


def make_config(w: str, a: str, n: int, k: int, group: int = -1, **fields: object) -> MatmulConfig:
    fmt = get_format(w)
    if fmt.fixed_group_size:
        k, group = -(-k // fmt.fixed_group_size) * fmt.fixed_group_size, -1
    defaults: dict[str, object] = {"out_dtype": "float32", "with_scaling": True}
    defaults.update(fields)
    return MatmulConfig(1, n, k, a, w, group_size=group, **defaults)  # type: ignore[arg-type]


def run(problem: Problem, target: Target | None = None) -> torch.Tensor:
    config = problem.config
    dtype = config.torch_out_dtype
    m = problem.A.shape[0]
    out = torch.full((m, config.N), float("nan") if dtype.is_floating_point else 77, dtype=dtype)
    W = ROW16.pack(problem.codes, config.bits)
    cpu.matmul(config, problem.A, W, out, **problem.extras(), target=target)
    return out


def check(problem: Problem, target: Target | None = None) -> None:
    error = relative_error(run(problem, target), problem.expected())
    allowed = tolerance(problem.config, with_input_scale=problem.input_scale is not None)
    assert error <= allowed, problem.config


def zeros_fields(w: str) -> list[dict[str, object]]:
    modes = ("original", "rescale", "quantized") if get_format(w).is_integer else ()
    return [{}, *({"with_zeros": True, "zeros_mode": mode} for mode in modes)]


@pytest.mark.parametrize(("a", "w"), PAIRS)
def test_product_with_every_format_and_activation(a: str, w: str) -> None:
    # every zeros mode, with m, shape, output and extras rotating through their values
    outs = ["float32", "float16", "bfloat16"]
    outs += ["int32", "int8"] if a in INTEGER_ACTIVATIONS else []
    start = PAIRS.index((a, w))
    for i, fields in enumerate(zeros_fields(w), start):
        n, k, group = SHAPES[i % len(SHAPES)]
        config = make_config(
            w, a, n, k, group, out_dtype=outs[i % len(outs)], with_bias=i % 3 == 0,
            with_scaling=i % 4 != 1 or get_format(w).fixed_group_size is not None, **fields,
        )  # fmt: skip
        scaled_input = i % 3 == 1 and a not in ("float16", "bfloat16", "float32")
        m = ROWS[i % len(ROWS)]
        check(draw(config, m, SEED + i, with_input_scale=scaled_input))


@pytest.mark.parametrize("m", [*ROWS, 200])
@pytest.mark.parametrize(("a", "w"), [("float16", "uint4"), ("int8", "int2"), ("float32", "nf4")])
def test_every_number_of_rows(a: str, w: str, m: int) -> None:
    check(draw(make_config(w, a, 83, 320, 64), m, SEED))


@pytest.mark.parametrize("group", [1, 3, 5, 7, 15, 35, 105])
@pytest.mark.parametrize(("a", "w"), [("float32", "uint4"), ("int8", "uint3"), ("bfloat16", "nf4")])
def test_groups_of_any_length(a: str, w: str, group: int) -> None:
    for fields in zeros_fields(w):
        check(draw(make_config(w, a, 19, 105, group, **fields), 3, SEED))


@pytest.mark.parametrize("group", [8, 16, 64, 128, 352, -1])
def test_group_lengths_of_the_kernels(group: int) -> None:
    for m in (2, 9):
        check(
            draw(make_config("int4", "float32", 40, 1408 if group == 352 else 384, group), m, SEED)
        )


def test_one_by_one() -> None:
    for w, m in itertools.product(("int4", "uint8", "nf4"), (1, 6)):
        check(draw(make_config(w, "float32", 1, 1), m, SEED))


@pytest.mark.parametrize("w", PACKED_FORMATS)
def test_dequantize(w: str) -> None:
    for i, fields in enumerate(zeros_fields(w)):
        out_dtype = (torch.float32, torch.float16, torch.bfloat16)[(i + len(w)) % 3]
        config = make_config(w, "float32", 37, 100, 50 if i == 3 else -1, **fields)
        problem = draw(config, 1, SEED + i)
        extras = problem.extras()
        expected = reference.dequantize(config, problem.codes, **extras)
        out = torch.full(expected.shape, float("nan"), dtype=out_dtype)
        cpu.dequantize(config, ROW16.pack(problem.codes, config.bits), out, **extras)
        allowed = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[out_dtype]
        assert relative_error(out, expected) <= allowed


@pytest.mark.parametrize("target", [Target.host(), Target.generic()], ids=["host", "generic"])
@pytest.mark.parametrize("w", [w for w in PACKED_FORMATS if get_format(w).bits == 8])
def test_every_byte_of_8_bit_formats(w: str, target: Target) -> None:
    config = make_config(w, "float32", 256, 4, with_scaling=False)
    codes = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 4).contiguous()
    packed = ROW16.pack(codes, 8)
    out = torch.full((256, 4), 77.0)
    cpu.dequantize(config, packed, out, target=target)
    exact = torch.tensor(get_format(w).code_values())[:, None].expand(256, 4)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.nan_to_num(), exact.nan_to_num())
    for m in (1, 2, 7):
        A = torch.zeros(m, 4)
        A[:, 2] = 1.0
        problem = Problem(config, A, codes)
        assert relative_error(run(problem, target), problem.reference()) == 0


@pytest.mark.parametrize("out", ["int32", "int8"])
def test_integer_outputs_saturate_and_round_half_to_even(out: str) -> None:
    config = make_config("uint8", "int8", 21, 64, out_dtype=out, with_bias=True)
    problem = draw(config, 5, SEED, scale_dtype=torch.float32)
    assert problem.scale is not None and problem.bias is not None
    problem.scale[:5], problem.scale[5:10], problem.scale[10:] = 1e6, -1e6, 0.5
    problem.bias.zero_()
    expected = problem.reference().round()
    limits = torch.iinfo(config.torch_out_dtype)
    assert expected.max() > limits.max and expected.min() < limits.min
    assert relative_error(run(problem), problem.expected()) < 1e-6


def test_unscaled_integer_products_are_exact() -> None:
    for w, k in (("uint8", 4096), ("int8", 4096), ("uint4", 1024), ("uint3", 96)):
        config = make_config(w, "int8", 18, k, with_scaling=False, out_dtype="int32")
        problem = draw(config, 3, SEED)
        problem.codes.fill_((1 << config.bits) - 1)
        problem.A.fill_(-128)
        assert torch.equal(run(problem).to(torch.float64), problem.expected())


@pytest.mark.parametrize("m", [1, 3, 20])
@pytest.mark.parametrize(("a", "w"), [("float32", "int4"), ("float16", "nf4"), ("int8", "int4")])
def test_nan_and_extreme_scales(a: str, w: str, m: int) -> None:
    problem = draw(make_config(w, a, 34, 128, 32), m, SEED, scale_dtype=None)
    assert problem.scale is not None
    problem.scale[3, 1] = float("nan")
    # partial sums stay within float32
    problem.scale[7] = min(torch.finfo(problem.scale.dtype).max, 1e33)
    problem.scale[8] = torch.finfo(problem.scale.dtype).tiny
    out, expected = run(problem), problem.reference()
    weight = reference.dequantize(problem.config, problem.codes, problem.scale)
    assert out[:, 3].isnan().all() and not out[:, :3].isnan().any()
    for row in (7, 8):
        fits = expected[:, row].abs() < torch.finfo(torch.float32).max
        error = (out[fits, row].double() - expected[fits, row]).abs()
        # a sum can cancel to a small part of its terms, which are what float32 rounds
        terms = problem.A[fits].double().abs() @ weight[row].abs()
        assert (error <= 1e-6 * terms).all(), (error / terms).max()


@pytest.mark.parametrize("m", [1, 9])
def test_nan_activations_stay_in_their_row(m: int) -> None:
    problem = draw(make_config("uint4", "float32", 20, 64), m, SEED)
    problem.A[0, 5] = float("nan")
    out = run(problem)
    assert out[0].isnan().all() and not out[1:].isnan().any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("w", ["uint1", "int1", "int2", "int4"])
def test_special_activations_reach_every_output_of_one_row(w: str, bad: float) -> None:
    problem = draw(make_config(w, "float32", 20, 96, 32), 1, SEED)
    problem.A[0, 37] = bad
    out, expected = run(problem).double(), problem.reference()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(0, 1, -1).abs() == 1, expected.isinf())


@pytest.mark.parametrize("w", [w for w in PACKED_FORMATS if not get_format(w).fixed_group_size])
@pytest.mark.parametrize("m", [1, 4])
def test_each_column_meets_its_own_activation(w: str, m: int) -> None:
    config = make_config(w, "float32", 16, 32, with_scaling=False)
    problem = draw(config, m, SEED)
    for k in range(config.K):
        problem.A.zero_()
        problem.A[:, k] = 1.0
        assert torch.equal(run(problem).double(), problem.reference())


@pytest.mark.parametrize("scale_dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_every_e8m0_scale(scale_dtype: torch.dtype) -> None:
    config = make_config("mxfp4", "float32", 256, 32)
    codes = torch.full((256, 32), 2, dtype=torch.uint8)  # 1.0
    scale = torch.arange(256, dtype=torch.uint8)[:, None].view(scale_dtype)
    for m in (1, 7):
        A = torch.zeros(m, 32)
        A[:, 0] = 1.0
        problem = Problem(config, A, codes, scale=scale)
        out, expected = run(problem), problem.reference()
        assert relative_error(out[:, 1:], expected[:, 1:]) == 0  # 2^-127 is subnormal: apart
        assert (out[:, 0].double() - expected[:, 0]).abs().max() <= 2.0**-149


def test_zero_points_lose_no_digits_on_shifted_activations() -> None:
    config = make_config("uint8", "float32", 64, 4096, 128, with_zeros=True)
    problem = draw(config, 2, SEED)
    assert problem.zeros is not None
    problem.A += 10.0
    problem.zeros.fill_(127.5)
    check(problem)


@pytest.mark.parametrize("w", ["uint4", "int1", "uint3", "nf4", "e4m3_float8", "e5m2_float8"])
def test_generic_kernels(w: str) -> None:
    for i, fields in enumerate(zeros_fields(w)[::3]):
        for m in (1, 5):
            config = make_config(w, "float16", 35, 96, 32, out_dtype="float16", **fields)
            check(draw(config, m, SEED + i), Target.generic())
    if get_format(w).is_integer:
        check(draw(make_config(w, "int8", 35, 96, 32), 3, SEED), Target.generic())


def test_avx512_kernels_use_its_instructions() -> None:
    target, weights = Target.avx512(), Weights("uint4", "float16")
    text = assembly(integer.fused_integer(target, weights, 4, False), target)
    assert "vpdpbusd" in text and "zmm" in text
    text = assembly(microkernel.fused(target, Weights("nf4", "float16"), 1, 32), target)
    assert "vpermps" in text or "vpermd" in text
    assert "zmm" in text
    for weights in (Weights("uint1", "float16"), Weights("int2", "float16")):
        text = assembly(microkernel.fused(target, weights, 1, 32), target)
        assert "vpermps" in text or "vpermd" in text
        assert "zmm" in assembly(microkernel.pack_tables(target, weights), target)
    assert "zmm" in assembly(microkernel.gemm(target), target)
    assert "zmm" in assembly(epilogue.epilogue(target, "float32", "float16", False), target)


def test_avx2_kernels_use_its_instructions() -> None:
    flags = "+avx2,+fma,+f16c"
    target = Target("haswell", flags, frozenset(("avx2", "f16c")))
    text = assembly(integer.fused_integer(target, Weights("uint4"), 4, True), target)
    assert "vpmaddubsw" in text and "vpmaddwd" in text
    text = assembly(integer.fused_integer(target, Weights("int8"), 4, True), target)
    assert "vpmaddubsw" not in text and "vpmaddwd" in text
    assert "vfmadd" in assembly(microkernel.gemm(target), target)
    text = assembly(microkernel.fused(target, Weights("nf4"), 1, 32), target)
    assert "vpshufb" in text


def test_damaged_cache_files_are_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITBLAS_CACHE_DIR", str(tmp_path))
    assert Compiler(Target.host()).address(microkernel.gemm)
    (path,) = (tmp_path / "cpu").glob("*.o")
    good = path.read_bytes()
    for damage in (b"", b"garbage", good[:-1], good[:100] + b"\x00" + good[101:]):
        path.write_bytes(damage)
        assert Compiler(Target.host()).address(microkernel.gemm)
        assert path.read_bytes() == good


def test_cache_that_cannot_be_written_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("BITBLAS_CACHE_DIR", str(tmp_path / "file"))
    assert Compiler(Target.host()).address(microkernel.gemm)


@pytest.mark.parametrize("m", [1, 30])
def test_several_python_threads_at_once(m: int) -> None:
    problems = [draw(make_config("uint4", "float32", 512, 512, 128), m, SEED + i) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for problem, out in zip(problems * 8, pool.map(run, problems * 8), strict=True):
            assert relative_error(out, problem.reference()) <= 1e-5


@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize(("a", "w"), [("float32", "uint4"), ("int8", "int4"), ("float32", "nf4")])
def test_the_number_of_threads_changes_nothing(a: str, w: str, m: int) -> None:
    problem = draw(make_config(w, a, 1000, 512, 128), m, SEED)
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(problem))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results[1:])


def test_pool_where_there_is_no_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "GOMP_PARALLEL", None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for m in (1, 30):
            check(draw(make_config("uint4", "float32", 1000, 512, 128), m, SEED))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="Linux only")
def test_kernels_run_on_the_openmp_of_torch() -> None:
    assert threads.GOMP_PARALLEL is not None


def test_inference_mode() -> None:
    with torch.inference_mode():
        for a, w in (("float16", "uint4"), ("int8", "int4")):
            for m in (1, 9):
                check(draw(make_config(w, a, 33, 100, with_bias=True), m, SEED))


def test_scratch_ignores_the_default_device() -> None:
    problems = [draw(make_config("uint4", a, 33, 96, 32), 9, SEED) for a in ("float16", "int8")]
    packed = [ROW16.pack(problem.codes, 4) for problem in problems]
    outs = [torch.empty(9, 33) for _ in problems]
    with torch.device("meta"):
        for problem, W, out in zip(problems, packed, outs, strict=True):
            cpu.matmul(problem.config, problem.A, W, out, **problem.extras())
    for problem, out in zip(problems, outs, strict=True):
        assert relative_error(out, problem.reference()) <= tolerance(problem.config)
