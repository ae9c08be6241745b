"""The portable kernels on a GPU: every format, activation and zeros mode against float64."""

from dataclasses import replace

import pytest
import torch
from problems import Problem, draw, relative_error, tolerance

from bitblas import reference
from bitblas.config import (
    A_DTYPES,
    FLOAT_ACTIVATIONS,
    TORCH_DTYPES,
    ZEROS_MODES,
    MatmulConfig,
    weight_dtypes,
)
from bitblas.formats import FORMATS

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bitblas.kernels import portable
from bitblas.kernels.prepared import execute

pytestmark = pytest.mark.gpu

COMBINATIONS = [
    (a, w, zeros)
    for a in A_DTYPES
    for w in weight_dtypes(a)
    if not FORMATS[w].is_dense
    for zeros in (None, *(ZEROS_MODES if FORMATS[w].is_integer else ()))
]
FLOAT_PAIRS = [(a, w) for a, w, zeros in COMBINATIONS if a in FLOAT_ACTIVATIONS and zeros is None]
POISON = 77


def make_config(a, w, zeros=None, **fields) -> MatmulConfig:
    # float32: int8 sums overflow float16, and products of small fp8 numbers are subnormal in it
    out = a if a in FLOAT_ACTIVATIONS else "float32"
    fixed = FORMATS[w].fixed_group_size
    defaults = dict(
        N=200, K=320, A_dtype=a, W_dtype=w, out_dtype=out, group_size=fixed or 64,
        with_scaling=True, with_zeros=zeros is not None, zeros_mode=zeros,
    )  # fmt: skip
    merged = defaults | fields
    if fixed and "group_size" in fields:
        merged["group_size"] = fixed
    return MatmulConfig(**merged)


def run(problem: Problem, tile=None, out=None) -> torch.Tensor:
    config = problem.config
    m = problem.A.shape[0]
    if out is None:
        out = torch.full((m, config.N), POISON, dtype=config.torch_out_dtype, device="cuda")
    W = portable.layout(config).pack(problem.codes, config.bits)
    execute(portable.launches(config, problem.A, W, out, tile=tile, **problem.extras()), out.device)
    return out


def check(problem: Problem, tile=None) -> torch.Tensor:
    out = run(problem, tile)
    error = relative_error(out, problem.expected())
    assert error <= tolerance(problem.config), f"relative error {error} for {problem.config}"
    return out


@pytest.mark.parametrize(("a", "w", "zeros"), COMBINATIONS)
def test_every_combination_agrees_with_float64(a, w, zeros, seed):
    for shape in (dict(N=200, K=320, group_size=64), dict(N=77, K=96, group_size=32)):
        for m in (1, 3, 16, 17, 100, 257):
            check(draw(make_config(a, w, zeros, **shape), m, seed, "cuda"))


@pytest.mark.parametrize(("a", "w", "zeros"), COMBINATIONS[::5])
def test_split_k_agrees_with_float64_and_repeats_its_bits(a, w, zeros, seed):
    config = make_config(a, w, zeros, N=136, K=640, with_bias=True)
    for m, split_k in ((1, 4), (33, 3), (5, 16)):
        problem = draw(config, m, seed, "cuda")
        gemm = next(tile for tile in portable.candidates(config, m) if tile.kernel == "gemm")
        tile = replace(gemm, split_k=split_k)
        assert torch.equal(check(problem, tile), run(problem, tile))


@pytest.mark.parametrize(("a", "w"), [(a, w) for a, w, zeros in COMBINATIONS if zeros is None])
def test_odd_groups_single_elements_and_no_scale(a, w, seed):
    zeros = "quantized" if FORMATS[w].is_integer else None
    if FORMATS[w].fixed_group_size is None:
        step = 2 if a == "int4" else 1
        odd = make_config(a, w, zeros, N=33, K=45 * step, group_size=5 * step)
        check(draw(odd, 7, seed, "cuda"))
        check(draw(make_config(a, w, zeros, N=1, K=step, group_size=-1), 1, seed, "cuda"))
        check(draw(make_config(a, w, None, with_scaling=False, with_bias=True), 2, seed, "cuda"))
        check(draw(make_config(a, w, zeros, group_size=-1), 20, seed, "cuda"))
    else:
        size = FORMATS[w].fixed_group_size
        check(draw(make_config(a, w, N=1, K=size), 1, seed, "cuda"))


@pytest.mark.parametrize("zeros", [None, *ZEROS_MODES])
@pytest.mark.parametrize("w", [w for w in weight_dtypes("int8")])
@pytest.mark.parametrize("out", ["int32", "int8", "float32"])
def test_integer_products_without_scaling_are_exact(w, zeros, out, seed):
    for m in (1, 40):
        config = make_config("int8", w, zeros, with_scaling=False, out_dtype=out)
        problem = draw(config, m, seed, "cuda")
        if zeros in (None, "quantized"):
            assert torch.equal(run(problem).double(), problem.expected().clamp(-(2.0**31), 2.0**31))
        else:
            check(problem)


@pytest.mark.parametrize("a", ["int8", "e4m3_float8"])
@pytest.mark.parametrize("m", [1, 70])
def test_input_scale_and_bias(a, m, seed):
    config = make_config(a, "int4", with_bias=True, out_dtype="bfloat16")
    check(draw(config, m, seed, "cuda", with_input_scale=True))


@pytest.mark.parametrize("a", ["float16", "bfloat16"])
def test_outputs_finer_than_the_activations(a, seed):
    """nf4 in bfloat16 would cost three bits: the table entry is multiplied in two terms."""
    for out, limit in (("float16", 1e-3), ("float32", 2e-5)):
        problem = draw(make_config(a, "nf4", out_dtype=out), 24, seed, "cuda")
        assert relative_error(run(problem), problem.expected()) <= limit
        problem = draw(make_config(a, "uint4", "original", out_dtype=out), 24, seed, "cuda")
        assert relative_error(run(problem), problem.expected()) <= limit


@pytest.mark.parametrize(("m", "a"), [(1, "float16"), (16, "float16"), (256, "bfloat16")])
def test_every_candidate_tile(m, a, seed):
    problem = draw(make_config(a, "uint4", "original", N=320, K=512), m, seed, "cuda")
    for tile in portable.candidates(problem.config, m):
        check(problem, tile)


@pytest.mark.parametrize("w", ["e4m3_float8", "e5m2_float8"])
@pytest.mark.parametrize("a", ["float16", "bfloat16", "float32", "e4m3_float8", "e5m2_float8"])
def test_every_fp8_byte(w, a):
    """Row n holds byte n at k = n % 64 and zeros elsewhere; row k of A picks it out."""
    K = 64
    n = torch.arange(256, device="cuda")
    codes = torch.zeros((256, K), dtype=torch.uint8, device="cuda")
    codes[n, n % K] = n.to(torch.uint8)
    A = torch.eye(K, device="cuda").to(TORCH_DTYPES[a])
    out_dtype = a if a in FLOAT_ACTIVATIONS else "float32"
    config = make_config(a, w, N=256, K=K, group_size=-1, with_scaling=False, out_dtype=out_dtype)
    problem = Problem(config, A, codes)
    out = torch.full((K, 256), float(POISON), dtype=config.torch_out_dtype, device="cuda")
    run(problem, out=out)
    picked, values = out[n % K, n], config.format.to_values(n.to(torch.uint8))
    finite = values.isfinite()
    assert torch.equal(picked[finite].double(), values[finite])
    assert torch.equal(picked.isnan(), values.isnan())
    assert torch.equal(picked.isinf(), values.isinf())


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("w", ["int1", "int4", "e4m3_float8", "nf4"])
def test_nan_and_inf_stay_in_their_rows(m, w, seed):
    """Padding (K = 70 in tiles of 64 and more) must not turn an infinity into NaN."""
    problem = draw(make_config("float16", w, K=70, N=65, group_size=-1), m, seed, "cuda")
    clean = run(problem)
    problem.A[m // 2, 69] = float("inf")
    out = run(problem)
    values = problem.config.format.to_values(problem.codes)[:, 69]
    expected = values * float("inf")  # the scales are positive
    row = out[m // 2]
    assert torch.equal(row.isnan(), expected.isnan())
    assert torch.equal(row[~row.isnan()].double(), expected[~expected.isnan()])
    others = torch.arange(m, device="cuda") != m // 2
    assert torch.equal(out[others], clean[others])


def test_extreme_scales_do_not_overflow(seed):
    problem = draw(make_config("float16", "uint4"), 20, seed, "cuda")
    problem.scale.fill_(60000.0)
    problem.A.mul_(1e-3)
    check(problem)
    problem.scale.fill_(1e-7)
    problem.A.mul_(1e5)
    check(problem)


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_results_do_not_change_between_runs(m, seed):
    problem = draw(make_config("float16", "uint4", "original", N=1000, K=4096), m, seed, "cuda")
    first = run(problem)
    for _ in range(5):
        assert torch.equal(run(problem), first)


@pytest.mark.parametrize(("m", "w"), [(1, "uint4"), (50, "nf4")])
def test_cuda_graph_replays_with_new_inputs(m, w, seed):
    config = make_config("float16", w)
    one, two = draw(config, m, seed, "cuda"), draw(config, m, seed + 1, "cuda")
    W = portable.layout(config).pack(one.codes, config.bits)
    out = torch.empty((m, config.N), dtype=torch.float16, device="cuda")
    execute(portable.launches(config, one.A, W, out, scale=one.scale), out.device)  # compiles
    expected_one = one.expected()
    expected_two = Problem(config, two.A, one.codes, one.scale).expected()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        execute(portable.launches(config, one.A, W, out, scale=one.scale), out.device)
    for A, expected in ((one.A.clone(), expected_one), (two.A, expected_two)):
        one.A.copy_(A)
        out.fill_(POISON)
        graph.replay()
        assert relative_error(out, expected) <= tolerance(config)


def test_runs_on_the_current_stream(seed):
    config = make_config("float16", "nf4", N=512, K=2048)
    problem = draw(config, 3, seed, "cuda")
    expected = problem.expected()
    A = torch.zeros_like(problem.A)
    W = portable.layout(config).pack(problem.codes, config.bits)
    out = torch.empty((3, config.N), dtype=torch.float16, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        A.copy_(problem.A)  # seen only by work that is ordered behind it
        execute(portable.launches(config, A, W, out, scale=problem.scale), out.device)
    torch.cuda.synchronize()
    assert relative_error(out, expected) <= tolerance(config)


@pytest.mark.parametrize(("a", "w", "zeros"), COMBINATIONS)
def test_dequantize_rounds_once(a, w, zeros, seed):
    config = make_config(a, w, zeros)
    problem = draw(config, 1, seed, "cuda")
    W = portable.layout(config).pack(problem.codes, config.bits)
    extras = {k: v for k, v in problem.extras().items() if k in ("scale", "zeros", "global_scale")}
    expected = reference.dequantize(config, problem.codes, **extras)
    for dtype, limit in ((torch.float32, 3e-7), (torch.float16, 4e-4), (torch.bfloat16, 3e-3)):
        out = torch.full((config.N, config.K), POISON, dtype=dtype, device="cuda")
        portable.dequantize(config, W, out, **extras)
        assert relative_error(out, expected) <= limit


def test_offsets_beyond_32_bits(seed):
    """m * N > 2^31: the last rows are compared, and every element is written."""
    m, n, k = 70_000, 32_768, 64
    config = make_config(
        "int8", "int4", N=n, K=k, group_size=-1, with_scaling=False, out_dtype="int8"
    )
    problem = draw(config, m, seed, "cuda")
    problem.A.remainder_(2)
    out = run(problem, out=torch.full((m, n), 127, dtype=torch.int8, device="cuda"))
    last = Problem(config, problem.A[-100:], problem.codes)
    assert torch.equal(out[-100:].double(), last.expected())
    first = Problem(config, problem.A[:100], problem.codes)
    assert torch.equal(out[:100].double(), first.expected())
