"""Matmul's interface: packing, calling conventions, views, output=, inspection."""

import pytest
import torch
from calls import check, logical_weight
from conftest import DEVICE
from problems import draw, relative_error, tolerance

import bitblas
from bitblas import layouts
from bitblas.config import STORAGE_DTYPES
from bitblas.formats import FORMATS

FIELDS = dict(M=1, N=48, K=128, A_dtype="float16", W_dtype="uint4", out_dtype="float16")
EXTRAS = dict(group_size=32, with_scaling=True, with_zeros=True, zeros_mode="original")
PACKED = [name for name, fmt in FORMATS.items() if not fmt.is_dense]


def setup(seed, m=3, **fields):
    """An operator, a problem for it, and its packed weight."""
    config = bitblas.MatmulConfig(**{**FIELDS, **fields})
    problem = draw(config, m, seed, DEVICE)
    matmul = bitblas.Matmul(config)
    return matmul, problem, matmul.transform_weight(logical_weight(problem))


# packing


@pytest.mark.parametrize("W_dtype", PACKED)
@pytest.mark.parametrize("layout", ["nt", "nn"])
def test_inverse_transform_gives_the_codes(seed, W_dtype, layout):
    matmul, problem, packed = setup(seed, W_dtype=W_dtype, layout=layout, N=37, K=96)
    assert torch.equal(matmul.inverse_transform_weight(packed).view(torch.uint8), problem.codes)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dense_weight_packs_to_itself(seed, dtype):
    matmul, problem, packed = setup(seed, A_dtype=dtype, W_dtype=dtype, out_dtype=dtype)
    assert torch.equal(packed, problem.codes)
    assert torch.equal(matmul.inverse_transform_weight(packed), problem.codes)


@pytest.mark.parametrize("W_dtype", FORMATS)
@pytest.mark.parametrize("layout", ["nt", "tn"])
def test_retrieve_weight_shape(seed, W_dtype, layout):
    matmul, _, packed = setup(seed, W_dtype=W_dtype, layout=layout, N=37, K=96)
    assert matmul.retrieve_weight_shape() == list(packed.shape)
    assert isinstance(matmul.retrieve_weight_shape(), list)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("W_dtype", PACKED)
def test_weight_transform_packs_codes(seed, W_dtype, dtype):
    matmul, problem, packed = setup(seed, W_dtype=W_dtype)
    assert torch.equal(matmul.weight_transform(problem.codes.view(dtype)), packed)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float16, torch.float32], ids=str)
def test_logical_weight_in_any_dtype(seed, dtype):
    matmul, problem, packed = setup(seed, W_dtype="int4")
    assert torch.equal(matmul.transform_weight(logical_weight(problem).to(dtype)), packed)


def test_transform_weight_takes_a_view(seed):
    matmul, problem, packed = setup(seed)
    columns_first = logical_weight(problem).T.contiguous()
    assert torch.equal(matmul.transform_weight(columns_first.T), packed)


def test_transform_weight_with_extras_returns_the_weight_alone(seed):
    matmul, problem, packed = setup(seed, with_bias=True, **EXTRAS)
    returned = matmul.transform_weight(logical_weight(problem), **problem.extras())
    assert torch.equal(returned, packed)


def test_transform_weight_leaves_its_input_alone(seed):
    matmul, problem, _ = setup(seed)
    weight = logical_weight(problem)
    before = weight.clone()
    matmul.transform_weight(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("storage", STORAGE_DTYPES)
def test_storage_dtypes_hold_the_same_bytes(seed, storage):
    _, _, expected = setup(seed)
    matmul, problem, packed = setup(seed, storage_dtype=storage)
    assert packed.dtype == STORAGE_DTYPES[storage]
    assert list(packed.shape) == matmul.retrieve_weight_shape()
    assert torch.equal(packed.view(torch.int8), expected)
    check(problem, matmul(problem.A, packed))
    assert torch.equal(matmul.inverse_transform_weight(packed).view(torch.uint8), problem.codes)


@pytest.mark.parametrize("W_dtype", ["uint1", "int3", "nf4", "int8"])
def test_plain_rows_are_accepted(seed, W_dtype):
    matmul, problem, _ = setup(seed, W_dtype=W_dtype)
    plain = layouts.PLAIN.pack(problem.codes, matmul.config.bits)
    check(problem, matmul(problem.A, plain))
    assert torch.equal(matmul.inverse_transform_weight(plain).view(torch.uint8), problem.codes)


# what forward takes


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 4), (0, 3), (2, 0)])
@pytest.mark.parametrize("W_dtype", ["uint4", "float16"])
def test_leading_dimensions(seed, W_dtype, leading):
    rows = torch.Size(leading).numel()
    matmul, problem, packed = setup(seed, m=rows, W_dtype=W_dtype)
    out = matmul(problem.A.reshape(*leading, 128), packed)
    assert out.shape == (*leading, 48)
    check(problem, out.reshape(rows, 48))


@pytest.mark.parametrize("W_dtype", ["int4", "float16"])
def test_leading_dimensions_of_a_transposed_A(seed, W_dtype):
    matmul, problem, packed = setup(seed, m=6, W_dtype=W_dtype, layout="tt")
    batched = torch.stack((problem.A[:, :3], problem.A[:, 3:]))
    check(problem, matmul(batched, packed).reshape(6, 48))


POSITIONAL = [
    dict(with_bias=True),
    dict(with_scaling=True),
    dict(with_zeros=True),
    dict(with_scaling=True, with_bias=True),
    dict(with_zeros=True, with_bias=True),
    dict(with_scaling=True, with_zeros=True),
    dict(with_scaling=True, with_zeros=True, with_bias=True),
]


@pytest.mark.parametrize("features", POSITIONAL, ids=lambda f: "+".join(f))
def test_positional_extras_bind_to_the_enabled_features(seed, features):
    matmul, problem, packed = setup(seed, **features)
    operands = list(problem.extras().values())
    assert len(operands) == len(features)
    check(problem, matmul(problem.A, packed, *operands))
    check(problem, matmul.forward(problem.A, packed, *operands))


@pytest.mark.parametrize("features", POSITIONAL, ids=lambda f: "+".join(f))
def test_positional_extras_in_the_full_signature(seed, features):
    matmul, problem, packed = setup(seed, **features)
    check(problem, matmul(problem.A, packed, problem.scale, problem.zeros, problem.bias))


def test_output_by_position_in_the_full_signature(seed):
    matmul, problem, packed = setup(seed, with_bias=True)
    output = torch.empty(3, 48, dtype=torch.float16, device=DEVICE)
    assert matmul(problem.A, packed, None, None, problem.bias, output) is output
    check(problem, output)


def test_extra_given_twice_is_refused(seed):
    matmul, problem, packed = setup(seed, with_bias=True)
    with pytest.raises(TypeError, match="bias: given twice"):
        matmul(problem.A, packed, problem.bias, bias=problem.bias)


# output=


@pytest.mark.parametrize("W_dtype", ["uint4", "float16"])
def test_output_is_written_and_returned(seed, W_dtype):
    matmul, problem, packed = setup(seed, W_dtype=W_dtype)
    output = torch.full((3, 48), float("nan"), dtype=torch.float16, device=DEVICE)
    assert matmul(problem.A, packed, output=output) is output
    check(problem, output)


@pytest.mark.parametrize("W_dtype", ["uint4", "float16"])
def test_output_may_be_a_view(seed, W_dtype):
    matmul, problem, packed = setup(seed, W_dtype=W_dtype)
    around = torch.full((48, 7), 5.0, dtype=torch.float16, device=DEVICE)
    output = around[:, 2:5].T
    assert matmul(problem.A, packed, output=output) is output
    check(problem, output)
    assert (around[:, :2] == 5).all() and (around[:, 5:] == 5).all()


def test_output_with_no_rows(seed):
    matmul, problem, packed = setup(seed, m=0)
    output = torch.empty(0, 48, dtype=torch.float16, device=DEVICE)
    assert matmul(problem.A, packed, output=output) is output


def test_output_of_a_slice_of_rows(seed):
    matmul, problem, packed = setup(seed)
    around = torch.full((9, 48), 5.0, dtype=torch.float16, device=DEVICE)
    matmul(problem.A, packed, output=around[3:6])
    check(problem, around[3:6])
    assert (around[:3] == 5).all() and (around[6:] == 5).all()


# not touching the operands


def test_operands_are_left_alone(seed):
    matmul, problem, packed = setup(seed, with_bias=True, **EXTRAS)
    given = {"A": problem.A, "W": packed, **problem.extras()}
    before = {name: x.clone() for name, x in given.items()}
    matmul(**given)
    assert all(torch.equal(x, before[name]) for name, x in given.items())


def test_inference_mode(seed):
    with torch.inference_mode():
        matmul, problem, packed = setup(seed, **EXTRAS)
        check(problem, matmul(problem.A, packed, **problem.extras()))


def test_construction_under_the_meta_device_allocates_nothing():
    with torch.device("meta"):
        matmul = bitblas.Matmul(bitblas.MatmulConfig(**FIELDS))
    weight = torch.zeros(48, 128, dtype=torch.int8, device=DEVICE)
    packed = matmul.transform_weight(weight)
    assert packed.device.type == DEVICE
    assert matmul(torch.ones(1, 128).half().to(DEVICE), packed).abs().max() == 0


def test_meta_tensors_give_a_meta_result():
    matmul = bitblas.Matmul(bitblas.MatmulConfig(**FIELDS))
    packed = matmul.transform_weight(torch.empty(48, 128, dtype=torch.int8, device="meta"))
    out = matmul(torch.empty(2, 3, 128, dtype=torch.float16, device="meta"), packed)
    assert out.device.type == "meta" and out.shape == (2, 3, 48) and out.dtype == torch.float16


# gradients


@pytest.mark.parametrize("W_dtype", ["uint4", "nf4", "float32"])
def test_gradients_of_A_and_bias(seed, W_dtype):
    extras = EXTRAS if W_dtype == "uint4" else {}
    fields = dict(A_dtype="float32", out_dtype="float32", W_dtype=W_dtype, with_bias=True, **extras)
    matmul, problem, packed = setup(seed, **fields)
    problem.A.requires_grad_()
    problem.bias.requires_grad_()
    incoming = torch.randn(3, 48, device=DEVICE)
    matmul(problem.A, packed, **problem.extras()).backward(incoming)
    got = problem.A.grad, problem.bias.grad
    problem.A.grad = problem.bias.grad = None
    problem.reference().backward(incoming.double())
    assert relative_error(got[0], problem.A.grad) <= tolerance(matmul.config)
    assert relative_error(got[1], problem.bias.grad) <= tolerance(matmul.config)


# targets and inspection


def test_two_targets_in_one_process(seed):
    config = bitblas.MatmulConfig(**FIELDS)
    on_cpu, on_gpu = bitblas.Matmul(config, target="cpu"), bitblas.Matmul(config, target="cuda")
    problem = draw(config, 3, seed)
    packed = (
        on_cpu.transform_weight(logical_weight(problem)),
        on_gpu.transform_weight(logical_weight(problem)),
    )
    assert list(packed[0].shape) == on_cpu.retrieve_weight_shape()
    assert list(packed[1].shape) == on_gpu.retrieve_weight_shape() != list(packed[0].shape)
    for operator, W in zip((on_cpu, on_gpu), packed):  # each runs wherever A lies
        check(problem, operator(problem.A, W))
        assert torch.equal(operator.inverse_transform_weight(W).view(torch.uint8), problem.codes)


def test_two_operators_do_not_disturb_each_other(seed):
    first, second = setup(seed, W_dtype="int4"), setup(seed + 1, W_dtype="nf4", N=96)
    for matmul, problem, packed in (first, second, first):
        check(problem, matmul(problem.A, packed))


OPERATORS = [
    dict(),
    dict(W_dtype="float16"),
    dict(W_dtype="nvfp4"),
    dict(layout="tt", with_bias=True, **EXTRAS),
    dict(A_dtype="int8", out_dtype="int32"),
    dict(A_dtype="int4", W_dtype="int2", out_dtype="float32"),
    dict(A_dtype="e4m3_float8", W_dtype="e5m2_float8", M=None),
]


@pytest.mark.parametrize("fields", OPERATORS, ids=lambda f: "-".join(map(str, f.values())))
def test_profile_latency_is_in_milliseconds(fields):
    matmul = bitblas.Matmul(bitblas.MatmulConfig(**{**FIELDS, **fields}))
    latency = matmul.profile_latency()
    assert isinstance(latency, float) and 0 < latency < 1000
    assert matmul.profile_latency(dynamic_symbolic_constraints={"m": 2}) > 0


@pytest.mark.parametrize("fields", OPERATORS, ids=lambda f: "-".join(map(str, f.values())))
def test_finetune_then_run(seed, fields):
    matmul, problem, packed = setup(seed, **{**fields, "M": [1, 16]})
    matmul.hardware_aware_finetune(topk=2, parallel_build=True)
    check(problem, matmul(problem.A, packed, **problem.extras()))


@pytest.mark.parametrize("fields", OPERATORS, ids=lambda f: "-".join(map(str, f.values())))
def test_get_source_is_code(fields):
    source = bitblas.Matmul(bitblas.MatmulConfig(**{**FIELDS, **fields})).get_source()
    compile(source, "source", "exec")
    assert "def " in source


def test_usable_after_cleanup(seed):
    matmul, problem, packed = setup(seed)
    matmul.cleanup()
    check(problem, matmul(problem.A, packed))
