"""Matmul computes the product: every pair of dtypes, every combination of extras."""

import pytest
import torch
from calls import check, logical_weight, multiply
from conftest import DEVICE
from problems import draw

import bitblas
from bitblas.config import A_DTYPES, FLOAT_ACTIVATIONS, INTEGER_ACTIVATIONS, weight_dtypes
from bitblas.formats import FORMATS, get_format

PAIRS = [(A, W) for A in A_DTYPES for W in weight_dtypes(A)]
ROWS = (0, 1, 3, 17)


def modes(A_dtype: str, W_dtype: str) -> list[str]:
    """The combinations of scale and zeros that a pair takes."""
    fmt = get_format(W_dtype)
    if fmt.scale_encoding:
        return ["scale"]
    if not fmt.is_integer:
        return ["plain", "scale"]
    return ["plain", "scale", "zeros only", "original", "rescale", "quantized"]


def make_config(A_dtype: str, W_dtype: str, mode: str, **fields) -> bitblas.MatmulConfig:
    scaled, zeros = mode not in ("plain", "zeros only"), mode not in ("plain", "scale")
    fields.setdefault("N", 37)
    fields.setdefault("K", 96)
    fields.setdefault("out_dtype", A_dtype if A_dtype in FLOAT_ACTIVATIONS else "float32")
    return bitblas.MatmulConfig(
        A_dtype=A_dtype,
        W_dtype=W_dtype,
        group_size=get_format(W_dtype).fixed_group_size or (48 if mode != "plain" else -1),
        with_scaling=scaled,
        with_zeros=zeros,
        zeros_mode=mode if mode in ("rescale", "quantized") else "original",
        **fields,
    )


@pytest.mark.parametrize("A_dtype, W_dtype, mode", [(*p, m) for p in PAIRS for m in modes(*p)])
def test_every_pair_and_mode(seed, A_dtype, W_dtype, mode):
    config = make_config(A_dtype, W_dtype, mode)
    for m in ROWS if mode in ("plain", "scale") else (1, 17):  # each compiles its own kernels
        problem = draw(config, m, seed, DEVICE)
        check(problem, multiply(problem))


@pytest.mark.parametrize("A_dtype, W_dtype", PAIRS)
def test_every_pair_with_bias(seed, A_dtype, W_dtype):
    config = make_config(A_dtype, W_dtype, modes(A_dtype, W_dtype)[0], with_bias=True)
    for m in ROWS:
        problem = draw(config, m, seed, DEVICE)
        check(problem, multiply(problem))


@pytest.mark.parametrize("mode", modes("float16", "uint4"))
def test_bias_beside_scale_and_zeros(seed, mode):
    config = make_config("float16", "uint4", mode, with_bias=True)
    problem = draw(config, 3, seed, DEVICE)
    check(problem, multiply(problem))


def test_bias_in_the_activations_dtype(seed):
    config = make_config("float16", "uint4", "plain", with_bias=True, out_dtype="float32")
    problem = draw(config, 3, seed, DEVICE, bias_dtype=torch.float16)
    check(problem, multiply(problem))


@pytest.mark.parametrize("out_dtype", FLOAT_ACTIVATIONS)
@pytest.mark.parametrize("A_dtype", A_DTYPES)
def test_every_floating_out_dtype(seed, A_dtype, out_dtype):
    config = make_config(A_dtype, "int2", "scale", out_dtype=out_dtype)
    problem = draw(config, 3, seed, DEVICE)
    check(problem, multiply(problem))


@pytest.mark.parametrize("mode", ["plain", "scale", "quantized"])
@pytest.mark.parametrize("out_dtype", ["int32", "int8"])
@pytest.mark.parametrize("A_dtype", INTEGER_ACTIVATIONS)
def test_integer_out_dtypes(seed, A_dtype, out_dtype, mode):
    config = make_config(A_dtype, "int4", mode, out_dtype=out_dtype)
    problem = draw(config, 3, seed, DEVICE)
    check(problem, multiply(problem))


def test_int8_results_saturate():
    config = bitblas.MatmulConfig(N=2, K=64, A_dtype="int8", W_dtype="int8", out_dtype="int8")
    matmul = bitblas.Matmul(config)
    weight = torch.stack((torch.full((64,), 100), torch.full((64,), -100))).to(DEVICE)
    A = torch.ones(1, 64, dtype=torch.int8, device=DEVICE)
    assert matmul(A, matmul.transform_weight(weight)).tolist() == [[127, -128]]


@pytest.mark.parametrize("N, K", [(1, 1), (1, 33), (33, 1), (5, 7), (63, 65), (130, 257)])
@pytest.mark.parametrize("A_dtype, W_dtype", [("float16", "uint3"), ("int8", "int4")])
def test_odd_sizes(seed, A_dtype, W_dtype, N, K):
    config = bitblas.MatmulConfig(
        N=N,
        K=K,
        A_dtype=A_dtype,
        W_dtype=W_dtype,
        out_dtype="float32",
        with_scaling=True,
        with_zeros=True,
        zeros_mode="quantized",
    )
    for m in ROWS:
        problem = draw(config, m, seed, DEVICE)
        check(problem, multiply(problem))


@pytest.mark.parametrize("W_dtype", FORMATS)
def test_columns_of_one(seed, W_dtype):
    fmt = get_format(W_dtype)
    K = fmt.fixed_group_size or 1
    config = bitblas.MatmulConfig(N=1, K=K, W_dtype=W_dtype, out_dtype="float32")
    problem = draw(config, 1, seed, DEVICE)
    check(problem, multiply(problem))


@pytest.mark.parametrize("group_size", [1, 3, 16, 40, 80, 240, -1])
@pytest.mark.parametrize("A_dtype", ["float16", "int8"])
def test_group_sizes(seed, A_dtype, group_size):
    config = bitblas.MatmulConfig(
        N=33,
        K=240,
        A_dtype=A_dtype,
        W_dtype="uint4",
        out_dtype="float32",
        group_size=group_size,
        with_scaling=True,
        with_zeros=True,
    )
    problem = draw(config, 5, seed, DEVICE)
    check(problem, multiply(problem))


@pytest.mark.parametrize("m", [2, 4, 8, 31, 64, 200])
@pytest.mark.parametrize("A_dtype, W_dtype", [("float16", "uint4"), ("int8", "int2")])
def test_more_rows(seed, A_dtype, W_dtype, m):
    config = make_config(A_dtype, W_dtype, "scale", N=130, K=384)
    problem = draw(config, m, seed, DEVICE)
    check(problem, multiply(problem))


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("A_dtype, W_dtype", [("float16", "int4"), ("int8", "uint2")])
def test_layouts(seed, A_dtype, W_dtype, layout):
    config = make_config(A_dtype, W_dtype, "scale", layout=layout)
    problem = draw(config, 5, seed, DEVICE)
    check(problem, multiply(problem))


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
@pytest.mark.parametrize("dtype", FLOAT_ACTIVATIONS)
def test_dense_layouts(seed, dtype, layout):
    config = make_config(dtype, dtype, "plain", layout=layout)
    problem = draw(config, 5, seed, DEVICE)
    check(problem, multiply(problem))


@pytest.mark.parametrize("A_dtype", ["int8", "e4m3_float8", "e5m2_float8"])
@pytest.mark.parametrize("mode", ["plain", "scale"])
def test_input_scale_multiplies_each_row(seed, A_dtype, mode):
    config = make_config(A_dtype, "int4", mode, with_bias=True)
    problem = draw(config, 5, seed, DEVICE, with_input_scale=True)
    check(problem, multiply(problem))


@pytest.mark.parametrize("A_dtype", ["float16", "e4m3_float8"])
def test_global_scale_of_nvfp4(seed, A_dtype):
    problem = draw(make_config(A_dtype, "nvfp4", "scale"), 3, seed, DEVICE)
    doubled = multiply(problem)
    problem.global_scale *= 2
    check(problem, multiply(problem))
    assert torch.allclose(multiply(problem), 2 * doubled, rtol=2e-3)


@pytest.mark.parametrize("W_dtype", ["mxfp4", "nvfp4"])
def test_encoded_scales_as_bytes(seed, W_dtype):
    problem = draw(make_config("float16", W_dtype, "scale"), 3, seed, DEVICE)
    as_numbers = multiply(problem)
    problem.scale = problem.scale.view(torch.uint8)
    assert torch.equal(multiply(problem), as_numbers)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("A_dtype", ["int8", "int4", "e4m3_float8", "e5m2_float8"])
def test_scale_dtypes_beside_narrow_activations(seed, A_dtype, scale_dtype):
    config = make_config(A_dtype, "int4", "original")
    problem = draw(config, 3, seed, DEVICE, scale_dtype=scale_dtype)
    check(problem, multiply(problem))


def test_result_is_the_same_on_every_call(seed):
    problem = draw(make_config("float16", "uint4", "original", N=200, K=960), 7, seed, DEVICE)
    matmul = bitblas.Matmul(problem.config)
    packed = matmul.transform_weight(logical_weight(problem))
    first = matmul(problem.A, packed, **problem.extras())
    for _ in range(20):
        assert torch.equal(matmul(problem.A, packed, **problem.extras()), first)
