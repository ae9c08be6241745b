"""quantize_activation: values, rows that are special, errors, and the registered operator."""

import re

import pytest
import torch
from conftest import DEVICE
from rows import FLOATS, as_bytes, draw_rows, worst

import bitblas
from bitblas import quantize_activation
from bitblas.config import QUANTIZED_ACTIVATIONS, TORCH_DTYPES

every_dtype = pytest.mark.parametrize("dtype", QUANTIZED_ACTIVATIONS)
every_float = pytest.mark.parametrize("given", FLOATS.values(), ids=FLOATS)


@every_dtype
@every_float
@pytest.mark.parametrize("sizes", [(1, 1), (3, 7), (5, 128), (17, 1000), (2, 4099), (1, 40000)])
def test_values_are_the_nearest(seed, sizes, given, dtype):
    x = draw_rows(*sizes, given, seed, DEVICE)
    q, scale = quantize_activation(x, dtype)
    assert q.shape == x.shape and q.dtype == TORCH_DTYPES[dtype] and q.is_contiguous()
    assert scale.shape == x.shape[:-1] and scale.dtype == torch.float32
    assert worst(x, q, scale, dtype) <= 1


@every_dtype
def test_every_float16_of_a_row_whose_scale_is_one(dtype):
    """Among them every tie between neighbours, and every e4m3 subnormal."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    largest = QUANTIZED_ACTIVATIONS[dtype]
    x = x[x.abs() <= largest].to(DEVICE)
    q, scale = quantize_activation(x, dtype)
    assert scale.item() == 1
    expected = x.float().round() if dtype == "int8" else x.float().to(torch.float8_e4m3fn)
    assert torch.equal(q.float(), expected.float())


@every_dtype
def test_the_greatest_magnitude_becomes_the_greatest_number(seed, dtype):
    x = draw_rows(300, 9, torch.float32, seed, DEVICE)
    q, _ = quantize_activation(x, dtype)
    assert (q.float().abs().amax(-1) == QUANTIZED_ACTIVATIONS[dtype]).all()
    mirrored, _ = quantize_activation(-x, dtype)
    assert torch.equal(mirrored.float(), -q.float())


def test_leading_dimensions(seed):
    x = draw_rows(12, 33, torch.float16, seed, DEVICE)
    q, scale = quantize_activation(x)
    for lead in ((12,), (2, 6), (2, 3, 2), (1, 12, 1)):
        deep_q, deep_scale = quantize_activation(x.view(*lead, 33))
        assert deep_q.shape == (*lead, 33) and deep_scale.shape == lead
        assert torch.equal(deep_q.view(12, 33), q) and torch.equal(deep_scale.flatten(), scale)
    one_q, one_scale = quantize_activation(x[4])
    assert one_scale.shape == () and one_scale == scale[4] and torch.equal(one_q, q[4])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape):
    q, scale = quantize_activation(torch.empty(shape, device=DEVICE))
    assert q.shape == shape and scale.shape == shape[:-1]


def test_strided_rows(seed):
    x = draw_rows(64, 24, torch.float16, seed, DEVICE)
    for view in (x.T, x[:, ::2], x[::3], x[1:, 3:]):
        for got, expected in zip(quantize_activation(view), quantize_activation(view.clone())):
            assert torch.equal(got, expected)


@every_dtype
@every_float
def test_rows_of_zeros(dtype, given):
    x = torch.zeros(3, 50, dtype=given, device=DEVICE)
    x[1, 7] = 3
    q, scale = quantize_activation(x, dtype)
    assert scale.isfinite().all() and (scale > 0).all()
    assert torch.count_nonzero(q.float()).item() == 1 and q[1, 7].float() > 0


@every_dtype
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-33, 1e38, 3.4e38])
def test_extreme_rows_of_float32(dtype, size):
    x = torch.tensor([[1.0, -0.5, 0.25, 0.0]], device=DEVICE) * size
    q, scale = quantize_activation(x, dtype)
    assert scale.isfinite().all() and (scale >= torch.finfo(torch.float32).tiny).all()
    assert worst(x, q, scale, dtype) <= 1


@every_dtype
@every_float
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_a_row_that_is_not_finite_has_nan_products(seed, bad, given, dtype):
    x = draw_rows(4, 70, given, seed, DEVICE)
    clean_q, clean_scale = quantize_activation(x, dtype)
    x[2, 69] = float(bad)
    q, scale = quantize_activation(x, dtype)
    assert scale[2].isnan() and (q[2].float() == 0).all()
    others = [0, 1, 3]
    assert torch.equal(scale[others], clean_scale[others])
    assert torch.equal(as_bytes(q)[others], as_bytes(clean_q)[others])
    config = bitblas.MatmulConfig(
        N=16, K=70, A_dtype=dtype, W_dtype="int4", out_dtype="float32", with_bias=True
    )
    matmul = bitblas.Matmul(config)
    W = matmul.transform_weight(torch.ones(16, 70, dtype=torch.int8, device=DEVICE))
    bias = torch.ones(16, device=DEVICE)
    out = matmul(q, W, bias=bias, input_scale=scale)
    assert out[2].isnan().all() and out[others].isfinite().all()


def test_input_is_left_alone(seed):
    for given in FLOATS.values():
        x = draw_rows(4, 64, given, seed, DEVICE)
        x[0, 0] = float("inf")
        before = x.clone()
        quantize_activation(x), quantize_activation(x, "e4m3_float8")
        assert torch.equal(x, before)


def test_no_gradient_is_passed_on(seed):
    x = draw_rows(4, 64, torch.float32, seed, DEVICE).requires_grad_()
    q, scale = quantize_activation(x, "e4m3_float8")
    assert not q.requires_grad and not scale.requires_grad


def test_parameters_and_subclasses(seed):
    class Wrapped(torch.Tensor):
        pass

    x = draw_rows(4, 64, torch.float32, seed, DEVICE)
    expected, _ = quantize_activation(x)
    for same in (torch.nn.Parameter(x), x.as_subclass(Wrapped)):
        q, _ = quantize_activation(same)
        assert torch.equal(q.as_subclass(torch.Tensor), expected)


def test_tangents_are_refused():
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2, 4, device=DEVICE), torch.ones(2, 4, device=DEVICE))
        with pytest.raises(ValueError, match="x: carries a tangent"):
            quantize_activation(x)


BAD = {
    "no tensor": (TypeError, "x: got list, expected a tensor", [1.0], "int8"),
    "integers": (TypeError, "x: got torch.int8, expected one of float16", torch.zeros(2, 4).char()),
    "float64": (TypeError, "x: got torch.float64", torch.zeros(2, 4).double(), "int8"),
    "no dimension": (ValueError, r"x: got shape \(\)", torch.tensor(1.0), "int8"),
    "no columns": (ValueError, r"x: got shape \(3, 0\)", torch.zeros(3, 0), "int8"),
    "dtype": (
        ValueError,
        "dtype: got 'int4', expected int8 or e4m3_float8",
        torch.zeros(2),
        "int4",
    ),
    "sparse": (TypeError, "x: got a torch.sparse_coo tensor", torch.eye(4).to_sparse(), "int8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused_by_name(name):
    error, message, *arguments = BAD[name]
    with pytest.raises(error, match=message):
        quantize_activation(*arguments)
    if isinstance(arguments[0], torch.Tensor) and not arguments[0].is_sparse:
        with pytest.raises(error, match=message):
            torch.ops.bitblas.quantize_activation(*(*arguments, "int8")[:2])


@pytest.mark.parametrize("dtype", [torch.int8, ["int8"], None], ids=str)
def test_a_dtype_that_is_no_name_is_refused(dtype):
    message = re.escape(f"dtype: got {dtype!r}, expected int8 or e4m3_float8")
    with pytest.raises(TypeError, match=message):
        quantize_activation(torch.ones(2, 4, device=DEVICE), dtype)


# the registered operator


@every_dtype
def test_opcheck(seed, dtype):
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for x in (draw_rows(4, 33, torch.float16, seed, DEVICE), torch.empty(0, 8, device=DEVICE)):
        if dtype == "int8":  # opcheck cannot compare 8-bit floats
            torch.library.opcheck(torch.ops.bitblas.quantize_activation.default, (x, dtype))
        else:
            torch.library.opcheck(
                torch.ops.bitblas.quantize_activation.default, (x, dtype), test_utils=tests
            )


@every_dtype
def test_compiled_once_for_all_batches(seed, dtype):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(
        lambda x: quantize_activation(x, dtype), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for m in (2, 5, 9):
        x = draw_rows(m, 48, torch.float16, seed, DEVICE)
        for got, expected in zip(compiled(x), quantize_activation(x, dtype)):
            assert torch.equal(got.float(), expected.float())
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_under_autocast_and_inference_mode(seed):
    x = draw_rows(4, 48, torch.float32, seed, DEVICE)
    expected = quantize_activation(x)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        autocast = quantize_activation(x)
    with torch.inference_mode():
        inference = quantize_activation(x)
    for got in (autocast, inference):
        assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("threads", [1, 2])
def test_results_do_not_depend_on_the_batch(seed, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = draw_rows(64, 1000, torch.bfloat16, seed, DEVICE)
        q, scale = quantize_activation(x)
        for i in (0, 17, 63):
            one_q, one_scale = quantize_activation(x[i])
            assert torch.equal(one_q, q[i]) and torch.equal(one_scale, scale[i])
    finally:
        torch.set_num_threads(before)
