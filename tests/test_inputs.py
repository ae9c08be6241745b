"""Operands in unusual but legal form give the right result: strides, expansion, no rows, NaN."""

import pytest
import torch
from problems import draw, relative_error, tolerance

from bitblas import Matmul, MatmulConfig
from bitblas.layouts import PLAIN, convert

N, K, M = 40, 96, 5
CONFIGS = {
    "uint4": {"W_dtype": "uint4", "with_scaling": True, "with_zeros": True, "group_size": 32},
    "quantized zeros": {
        "W_dtype": "uint2",
        "with_scaling": True,
        "with_zeros": True,
        "zeros_mode": "quantized",
        "group_size": 24,
    },
    "int3 float32": {
        "A_dtype": "float32",
        "W_dtype": "int3",
        "with_scaling": True,
        "out_dtype": "float32",
    },
    "nf4 bfloat16": {
        "A_dtype": "bfloat16",
        "W_dtype": "nf4",
        "with_scaling": True,
        "group_size": 48,
        "out_dtype": "bfloat16",
    },
    "nvfp4": {"W_dtype": "nvfp4"},
    "fp8": {"A_dtype": "e4m3_float8", "W_dtype": "e5m2_float8", "with_scaling": True},
    "int8 x int4": {"A_dtype": "int8", "W_dtype": "int4", "out_dtype": "int32"},
    "int4 x int2": {"A_dtype": "int4", "W_dtype": "int2", "out_dtype": "int32"},
    "dense": {"with_scaling": True, "group_size": 32},
}
every_config = pytest.mark.parametrize("fields", CONFIGS.values(), ids=CONFIGS)
with_scales = pytest.mark.parametrize(
    "fields",
    [f for f in CONFIGS.values() if f.get("with_scaling")],
    ids=[name for name, f in CONFIGS.items() if f.get("with_scaling")],
)


def problem(fields, seed, m=M, **changes):
    config = MatmulConfig(**{"M": 1, "N": N, "K": K, "with_bias": True, **fields, **changes})
    operator, drawn = Matmul(config, target="cpu"), draw(config, m, seed)
    W = drawn.codes if config.is_dense else operator.weight_transform(drawn.codes)
    return operator, drawn, {"A": drawn.A, "W": W, **drawn.extras()}


def assert_close(out, expected, config):
    assert out.dtype == config.torch_out_dtype
    assert relative_error(out, expected) <= tolerance(config)


def assert_right(out, drawn):
    assert_close(out, drawn.expected(), drawn.config)


def strided(x):
    """The same values at every other place of each dimension of a larger tensor full of ones."""
    larger = torch.ones([2 * size for size in x.shape], dtype=torch.float32).to(x.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x)
    return view


def transposed(x):
    """The same values with the first two dimensions swapped in memory."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else strided(x)


def offset(x):
    """The same values, one element into a larger tensor: data that is not aligned."""
    flat = torch.ones(x.numel() + 1, dtype=torch.float32).to(x.dtype)
    flat[1:].copy_(x.flatten())
    return flat[1:].view(x.shape)


@every_config
@pytest.mark.parametrize("form", [strided, transposed, offset])
def test_operands_of_any_strides(fields, form, seed):
    operator, drawn, operands = problem(fields, seed)
    assert_right(operator(**{name: form(x) for name, x in operands.items()}), drawn)


@every_config
def test_expanded_operands(fields, seed):
    operator, drawn, operands = problem(fields, seed)
    drawn.A = drawn.A[:1].expand_as(drawn.A)
    drawn.codes = drawn.codes[:1].expand_as(drawn.codes)
    for name in ("scale", "bias"):
        if (x := getattr(drawn, name)) is not None:
            setattr(drawn, name, x[:1].expand_as(x))
    if not drawn.config.is_dense:
        operands["W"] = operator.weight_transform(drawn.codes)
    else:
        operands["W"] = drawn.codes
    assert_right(operator(**{**operands, "A": drawn.A, **drawn.extras()}), drawn)


@every_config
@pytest.mark.parametrize("form", [strided, transposed, offset])
def test_output_of_any_strides_is_written_and_returned(fields, form, seed):
    operator, drawn, operands = problem(fields, seed)
    output = form(torch.zeros((M, N), dtype=drawn.config.torch_out_dtype))
    assert operator(**operands, output=output) is output
    assert_right(output, drawn)


def test_output_of_strides_leaves_what_lies_between_alone(seed):
    operator, drawn, operands = problem(CONFIGS["uint4"], seed)
    larger = torch.full((2 * M, 2 * N), 7.0, dtype=torch.float16)
    operator(**operands, output=larger[::2, ::2])
    assert_right(larger[::2, ::2], drawn)
    assert bool((larger[1::2] == 7).all()) and bool((larger[:, 1::2] == 7).all())


IN_PLACE = {
    "float16": {"W_dtype": "int4", "with_scaling": True},
    "float32": {
        "A_dtype": "float32",
        "W_dtype": "int4",
        "with_scaling": True,
        "out_dtype": "float32",
    },
    "int8": {"A_dtype": "int8", "W_dtype": "int2", "out_dtype": "int8"},
    "dense": {},
}
in_place = pytest.mark.parametrize("fields", IN_PLACE.values(), ids=IN_PLACE)


@in_place
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_output_may_be_the_input(fields, rows, seed):
    operator, drawn, operands = problem(fields, seed, N=K, with_bias=False, m=rows)
    expected = drawn.expected()
    assert_close(operator(**operands, output=drawn.A), expected, drawn.config)


@in_place
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_output_may_overlap_the_input(fields, rows, seed):
    operator, drawn, operands = problem(fields, seed, N=K, with_bias=False, m=rows)
    expected, storage = drawn.expected(), torch.zeros((rows + 1, K)).to(drawn.A.dtype)
    storage[1:].copy_(drawn.A)
    out = operator(**{**operands, "A": storage[1:]}, output=storage[:-1])
    assert_close(out, expected, drawn.config)


@every_config
@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
def test_no_rows_give_an_empty_result(fields, leading, seed):
    operator, drawn, operands = problem(fields, seed)
    A = drawn.A.new_empty((*leading, drawn.A.shape[-1]))
    out = operator(**{**operands, "A": A})
    assert out.shape == (*leading, N)
    assert out.dtype == drawn.config.torch_out_dtype


@pytest.mark.parametrize("layout", ["tn", "tt"])
def test_no_rows_of_a_transposed_input_give_an_empty_result(layout, seed):
    operator, drawn, operands = problem(CONFIGS["uint4"], seed, layout=layout)
    assert operator(**{**operands, "A": drawn.A[:, :0]}).shape == (0, N)


@every_config
def test_a_vector_gives_a_vector(fields, seed):
    operator, drawn, operands = problem(fields, seed)
    out = operator(**{**operands, "A": drawn.A[0]})
    assert out.shape == (N,)
    assert relative_error(out, drawn.expected()[0]) <= tolerance(drawn.config)


@every_config
def test_any_leading_dimensions(fields, seed):
    operator, drawn, operands = problem(fields, seed)
    A = torch.stack([drawn.A, drawn.A.flip(0)]).unsqueeze(1)
    out = operator(**{**operands, "A": A})
    expected = torch.stack([drawn.expected(), drawn.expected().flip(0)]).unsqueeze(1)
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= tolerance(drawn.config)


@pytest.mark.parametrize("name", [n for n, f in CONFIGS.items() if n != "dense"])
@pytest.mark.parametrize("form", ["plain", "fragment"])
def test_weight_in_the_layout_of_another_device(name, form, seed):
    operator, drawn, operands = problem(CONFIGS[name], seed)
    config = operator.config
    if form == "plain":
        W = convert(operands["W"], config.bits, config.N, config.K, PLAIN)
    else:
        W = Matmul(config, target="cuda -arch=sm_90").weight_transform(drawn.codes)
    assert_right(operator(**{**operands, "W": W}), drawn)


@with_scales
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_nan_scale_reaches_its_output_feature_only(fields, rows, seed):
    operator, drawn, operands = problem(fields, seed, m=rows)
    drawn.scale[17, -1] = float("nan")
    out = operator(**operands)
    wanted = torch.zeros(rows, N, dtype=torch.bool)
    wanted[:, 17] = True
    assert torch.equal(out.isnan(), wanted)
    assert relative_error(out[~wanted], drawn.expected()[~wanted]) <= tolerance(drawn.config)


@pytest.mark.parametrize("encoding", ["mxfp4", "nvfp4"])
def test_nan_encoded_scale_reaches_its_output_feature_only(encoding, seed):
    operator, drawn, operands = problem({"W_dtype": encoding}, seed)
    nan = 0xFF if encoding == "mxfp4" else 0x7F
    drawn.scale.view(torch.uint8)[17, 1] = nan
    out = operator(**operands)
    assert bool(out[:, 17].isnan().all())
    assert int(out.isnan().sum()) == M


@pytest.mark.parametrize("zeros_mode", ["original", "rescale"])
def test_nan_zero_point_reaches_its_output_feature_only(zeros_mode, seed):
    operator, drawn, operands = problem(CONFIGS["uint4"], seed, zeros_mode=zeros_mode)
    drawn.zeros[17, 1] = float("nan")
    out = operator(**operands)
    assert bool(out[:, 17].isnan().all())
    assert int(out.isnan().sum()) == M


@pytest.mark.parametrize("rows", [5, 40])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["uint4", "int3 float32", "nf4 bfloat16", "nvfp4", "dense"])
def test_special_activation_reaches_its_row_only(name, value, rows, seed):
    operator, drawn, operands = problem(CONFIGS[name], seed, m=rows)
    drawn.A[2, 3] = value
    out = operator(**operands)
    others = torch.arange(rows) != 2
    assert bool((~out[2].isfinite()).any())
    assert relative_error(out[others], drawn.expected()[others]) <= tolerance(drawn.config)
