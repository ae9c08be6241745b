"""Linear with quantize_activation: 8-bit products of float activations, rounded row by row."""

import copy

import pytest
import torch
from conftest import DEVICE
from layers import load
from problems import draw, relative_error, tolerance
from rows import FLOATS, HALF_ULP, draw_rows
from torch import nn

import bitblas
from bitblas import quantize_activation, reference
from bitblas.config import QUANTIZED_ACTIVATIONS, weight_dtypes

PAIRS = [(a, w) for a in QUANTIZED_ACTIVATIONS for w in weight_dtypes(a)]
every_pair = pytest.mark.parametrize(("A_dtype", "W_dtype"), PAIRS)
every_float = pytest.mark.parametrize("given", FLOATS.values(), ids=FLOATS)
FIELDS = dict(in_features=96, out_features=40, W_dtype="int4", with_scaling=True, bias=True)


def make(seed, m=5, given=torch.float16, **fields):
    """(a loaded Linear that quantises, its drawn operands, x)."""
    fields = {"A_dtype": "int8", "quantize_activation": True, **FIELDS, **fields}
    layer = bitblas.Linear(**fields).to(DEVICE)
    problem = draw(layer.config, m, seed, DEVICE)
    load(layer, problem)
    return layer, problem, draw_rows(m, layer.in_features, given, seed, DEVICE)


def check(layer, problem, x, out):
    """out is the product of x's quantised rows, and as near that of x as half a step allows."""
    config = layer.config
    problem.A, problem.input_scale = quantize_activation(x.flatten(0, -2), config.A_dtype)
    problem.config = config
    expected = problem.reference().view(out.shape)
    assert out.dtype == config.torch_out_dtype
    assert relative_error(out, expected) <= tolerance(config, with_input_scale=True)

    weight = reference.dequantize(config, problem.codes, problem.scale, problem.zeros,
                                  problem.global_scale)  # fmt: skip
    exact = x.double() @ weight.T + (0 if problem.bias is None else problem.bias.double())
    scale = problem.input_scale.double().view(*x.shape[:-1], 1)
    step = scale * (0.5 + 127 * 4 * HALF_ULP)
    if config.A_dtype == "e4m3_float8":  # half of 2^-3 of the value, or half of 2^-9 of the scale
        step = torch.maximum(x.double().abs() / 16, scale / 1024) * (1 + 64 * HALF_ULP)
    allowed = step.expand(x.shape) @ weight.abs().T
    error = (out.double() - exact).abs()
    assert (error <= allowed + tolerance(config) * exact.abs().max()).all()


@every_pair
def test_every_format(seed, A_dtype, W_dtype):
    # sums of uint8 codes can be beyond the largest float16
    out_dtype = "float32" if W_dtype == "uint8" else "float16"
    layer, problem, x = make(seed, A_dtype=A_dtype, W_dtype=W_dtype, out_dtype=out_dtype)
    check(layer, problem, x, layer(x))


@every_float
@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("A_dtype", QUANTIZED_ACTIVATIONS)
def test_every_float_in_and_out(seed, A_dtype, out_dtype, given):
    layer, problem, x = make(seed, given=given, A_dtype=A_dtype, out_dtype=out_dtype)
    check(layer, problem, x, layer(x))


@pytest.mark.parametrize("zeros_mode", ["original", "rescale", "quantized"])
def test_groups_and_zeros(seed, zeros_mode):
    fields = dict(W_dtype="uint4", group_size=32, with_zeros=True, zeros_mode=zeros_mode)
    layer, problem, x = make(seed, out_dtype="float32", **fields)
    check(layer, problem, x, layer(x))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 7, 40), (33, 65, 3), (20, 96, 1)])
def test_odd_sizes(seed, sizes):
    m, k, n = sizes
    layer, problem, x = make(seed, m, in_features=k, out_features=n)
    check(layer, problem, x, layer(x))


def test_leading_dimensions_and_output(seed):
    layer, problem, x = make(seed, m=6)
    out = layer(x.view(2, 3, 96))
    assert out.shape == (2, 3, 40)
    check(layer, problem, x, out.view(6, 40))
    output = torch.full((6, 40), float("nan"), dtype=torch.float16, device=DEVICE)
    assert layer(x, output=output) is output
    assert torch.equal(output, out.view(6, 40))
    assert layer(x[:0]).shape == (0, 40)


def test_permuted_features(seed):
    """perm of an act-order checkpoint applies before rows are quantised."""
    layer, problem, x = make(seed)
    expected = layer(x)
    perm = torch.randperm(96, device=DEVICE)
    layer.perm = torch.argsort(perm)
    assert torch.equal(layer(x[:, perm]), expected)


def test_a_row_that_is_not_finite_stays_alone(seed):
    layer, _, x = make(seed)
    clean = layer(x)
    x[1, 5] = float("inf")
    out = layer(x)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2, 3, 4]], clean[[0, 2, 3, 4]])


# modes


@pytest.mark.parametrize("autocast", [torch.float16, torch.bfloat16], ids=str)
@every_float
def test_autocast_takes_floats_as_they_are(seed, given, autocast):
    layer, problem, x = make(seed, given=given, out_dtype="bfloat16")
    with torch.autocast(DEVICE, dtype=autocast):
        out = layer(x)
    assert torch.equal(out, layer(x))


@every_float
@pytest.mark.parametrize("A_dtype", QUANTIZED_ACTIVATIONS)
def test_gradient_is_that_of_the_unrounded_product(seed, A_dtype, given):
    layer, problem, x = make(seed, given=given, A_dtype=A_dtype, out_dtype="float32")
    x.requires_grad_()
    layer.bias.requires_grad_()
    out = layer(x)
    assert torch.equal(out, layer(x.detach()))
    incoming = torch.randn(5, 40, device=DEVICE)
    out.backward(incoming)
    weight = reference.dequantize(layer.config, problem.codes, problem.scale)
    allowed = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[given]
    assert x.grad.dtype == given and x.grad.shape == x.shape
    assert relative_error(x.grad, incoming.double() @ weight) <= allowed
    assert relative_error(layer.bias.grad, incoming.double().sum(0)) <= 1e-5


def test_gradient_with_output_is_refused(seed):
    layer, _, x = make(seed)
    output = torch.empty(5, 40, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match="output: not with an A that requires grad"):
        layer(x.requires_grad_(), output=output)
    layer.bias.requires_grad_()
    with pytest.raises(ValueError, match="output: not with a bias that requires grad"):
        layer(x.detach(), output=output)
    with torch.no_grad():
        assert torch.equal(layer(x, output=output), layer(x))


def test_tangents_are_refused(seed):
    from torch.autograd import forward_ad

    layer, _, x = make(seed)
    with forward_ad.dual_level(), pytest.raises(ValueError, match="carries a tangent"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.fixture
def model(seed):
    first, _, _ = make(seed)
    second, _, _ = make(seed, A_dtype="e4m3_float8", in_features=40, out_features=24)
    return nn.Sequential(first, nn.Unflatten(-1, (1, 40)), second)


@pytest.mark.parametrize("with_gradient", [False, True])
def test_compiled_model_equals_eager(seed, model, with_gradient):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for m in (2, 7, 33):
        x = draw_rows(m, 96, torch.float16, seed, DEVICE).requires_grad_(with_gradient)
        out = compiled(x)
        assert torch.equal(out, model(x))
        if with_gradient:
            out.sum().backward()
            grad, x.grad = x.grad, None
            model(x).sum().backward()
            assert torch.equal(x.grad, grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_opcheck(seed):
    layer, _, x = make(seed)
    x.requires_grad_()
    args = (x, layer.qweight, layer.scales, None, layer.bias, None, layer.config.key)
    torch.library.opcheck(torch.ops.bitblas.quantized_matmul.default, args)


@pytest.mark.gpu
def test_cuda_graph_replays_with_new_inputs(seed):
    layer, _, x = make(seed)
    layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = layer(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, layer(x))


# state, moves, construction


def test_state_dict_round_trip(seed):
    layer, problem, x = make(seed)
    fresh = bitblas.Linear(A_dtype="int8", quantize_activation=True, **FIELDS).to(DEVICE)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_checkpoint_of_16_bit_activations_serves(seed):
    """The packed rows of a file depend on neither activations nor device."""
    source = bitblas.Linear(A_dtype="float16", **FIELDS).to(DEVICE)
    problem = draw(source.config, 5, seed, DEVICE)
    load(source, problem)
    layer = bitblas.Linear(A_dtype="int8", quantize_activation=True, **FIELDS).to(DEVICE)
    layer.load_state_dict(source.state_dict())
    x = draw_rows(5, 96, torch.float16, seed, DEVICE)
    check(layer, problem, x, layer(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_cast_changes_what_comes_out(seed, dtype):
    layer, problem, x = make(seed)
    scales = layer.scales.clone()
    assert layer.to(FLOATS[dtype]) is layer
    assert (layer.config.A_dtype, layer.config.out_dtype) == ("int8", dtype)
    assert torch.equal(layer.scales, scales) and layer.bias.dtype == FLOATS[dtype]
    problem.bias = layer.bias.clone()
    check(layer, problem, x, layer(x))
    with pytest.raises(ValueError, match="out_dtype: got 'torch.float64'"):
        layer.double()


@pytest.mark.gpu
def test_moves_between_devices(seed):
    layer, _, x = make(seed)
    on_gpu = layer(x)
    on_cpu = layer.cpu()(x.cpu())
    assert relative_error(on_gpu, on_cpu) <= tolerance(layer.config, with_input_scale=True)
    assert torch.equal(layer.cuda()(x), on_gpu)


@pytest.mark.parametrize(
    ("A_dtype", "W_dtype"), [(None, "int4"), ("int8", "uint4"), ("e4m3_float8", "e4m3_float8")]
)
def test_from_float(seed, A_dtype, W_dtype):
    linear = nn.Linear(96, 40).to(DEVICE, torch.bfloat16)
    kwargs = {} if A_dtype is None else {"A_dtype": A_dtype}
    layer = bitblas.Linear.from_float(linear, W_dtype, 32, quantize_activation=True, **kwargs)
    assert (layer.config.A_dtype, layer.config.out_dtype) == (A_dtype or "int8", "bfloat16")
    x = draw_rows(5, 96, torch.bfloat16, seed, DEVICE)
    exact = bitblas.Linear.from_float(linear, W_dtype, 32)(x)
    assert relative_error(layer(x), exact) <= 0.05  # of rounding rows of 96 to 8 bits


def test_what_it_says_of_itself(seed):
    layer, _, _ = make(seed)
    assert layer.quantize_activation is True and "quantize_activation=True" in repr(layer)
    plain = bitblas.Linear(8, 8, W_dtype="int4")
    assert plain.quantize_activation is False and "quantize" not in repr(plain)


BAD = {
    "A_dtype: got 'float16', quantize_activation needs int8 or e4m3": dict(A_dtype="float16"),
    "A_dtype: got 'int4', quantize_activation": dict(A_dtype="int4"),
    "A_dtype: got 'e5m2_float8', quantize": dict(A_dtype="e5m2_float8"),
    "out_dtype: got 'int32', quantize_activation needs": dict(out_dtype="int32"),
}


@pytest.mark.parametrize("message", BAD)
def test_what_cannot_quantise_is_refused(message):
    with pytest.raises(ValueError, match=message):
        make(0, **BAD[message])


def test_another_switch_is_refused():
    with pytest.raises(TypeError, match="quantize_activation: got 'int8', expected True or False"):
        make(0, quantize_activation="int8")


def test_bad_input_is_refused(seed):
    layer, _, x = make(seed)
    for error, message, bad in (
        (TypeError, "x: got torch.int8", x.char()),
        (TypeError, "x: got torch.float64", x.double()),
        (ValueError, r"A: got shape \(5, 95\), expected \(..., 96\)", x[:, :95]),
    ):
        with pytest.raises(error, match=message):
            layer(bad)
