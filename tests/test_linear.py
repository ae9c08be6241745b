"""Linear: loading, the call, gradients, casts."""

import pytest
import torch
from calls import check
from conftest import DEVICE
from layers import FULL, KINDS, empty_like, load, make_layer
from problems import draw, relative_error, tolerance
from torch import nn

import bitblas
from bitblas import reference
from bitblas.config import weight_dtypes
from bitblas.formats import FORMATS

PACKED = [name for name, fmt in FORMATS.items() if not fmt.is_dense]


@pytest.mark.parametrize("kind", KINDS)
def test_forward(seed, kind):
    layer, problem = make_layer(seed, **KINDS[kind])
    check(problem, layer(problem.A))


@pytest.mark.parametrize("W_dtype", weight_dtypes("float16"))
def test_every_format(seed, W_dtype):
    layer, problem = make_layer(seed, W_dtype=W_dtype, bias=True)
    check(problem, layer(problem.A))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 40), (96, 1), (7, 5), (33, 65)])
@pytest.mark.parametrize("W_dtype", ["uint1", "int3", "uint4", "float16"])
def test_odd_sizes(seed, sizes, W_dtype):
    layer, problem = make_layer(
        seed, in_features=sizes[0], out_features=sizes[1], W_dtype=W_dtype, bias=True
    )
    check(problem, layer(problem.A))


def test_leading_dimensions(seed):
    layer, problem = make_layer(seed, m=6)
    out = layer(problem.A.view(2, 3, 96))
    assert out.shape == (2, 3, 40)
    check(problem, out.view(6, 40))


def test_output_is_written_and_returned(seed):
    layer, problem = make_layer(seed, **FULL)
    output = torch.full((3, 40), float("nan"), dtype=torch.float16, device=DEVICE)
    assert layer(problem.A, output=output) is output
    check(problem, output)


def test_loading_again_replaces_everything(seed):
    layer, _ = make_layer(seed, **FULL)
    problem = draw(layer.config, 3, seed + 1, DEVICE)
    load(layer, problem)
    check(problem, layer(problem.A))


def test_loaded_operands_are_not_shared(seed):
    layer, problem = make_layer(seed, **FULL)
    before = layer(problem.A)
    for x in problem.extras().values():
        x.zero_()
    assert torch.equal(layer(problem.A), before)


def test_scales_and_bias_in_another_float_dtype(seed):
    """Loading casts them to the dtype of their buffer."""
    layer, problem = make_layer(seed, **FULL)
    problem.scale, problem.bias = problem.scale.double(), problem.bias.float()
    load(layer, problem)
    assert layer.scales.dtype == layer.bias.dtype == torch.float16
    check(problem, layer(problem.A))


@pytest.mark.parametrize("W_dtype", ["float32", "int4"])
def test_loaded_parameter_becomes_a_buffer(W_dtype):
    layer = bitblas.Linear(64, 8, A_dtype="float32", W_dtype=W_dtype, out_dtype="float32")
    weight = nn.Parameter(torch.ones(8, 64, device=DEVICE))
    layer.load_and_transform_weight(weight)
    assert not list(layer.parameters())
    assert layer(torch.ones(1, 64, device=DEVICE)).requires_grad is False
    with torch.no_grad():
        weight.zero_()
    assert (layer(torch.ones(1, 64, device=DEVICE)) == 64).all()


def test_module_on_the_cpu_follows_its_weight_from_meta(seed):
    with torch.device("meta"):
        layer = bitblas.Linear(96, 40, W_dtype="uint4", **FULL)
    assert all(b.device.type == "meta" for b in layer.buffers())
    problem = draw(layer.config, 3, seed, DEVICE)
    load(layer, problem)
    check(problem, layer(problem.A))


# casts


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("how", ["to", "method"])
def test_cast_changes_the_activation_dtype(seed, dtype, how):
    layer, problem = make_layer(seed, **FULL)
    torch_dtype = getattr(torch, dtype)
    method = {"float16": layer.half, "bfloat16": layer.bfloat16, "float32": layer.float}[dtype]
    returned = layer.to(torch_dtype) if how == "to" else method()
    assert returned is layer
    assert layer.config.A_dtype == layer.config.out_dtype == dtype
    assert layer.torch_dtype == layer.scales.dtype == layer.bias.dtype == torch_dtype
    problem.config = layer.config
    problem.A = problem.A.to(torch_dtype)
    for name in ("scale", "zeros", "bias"):
        setattr(problem, name, getattr(problem, name).to(torch_dtype))
    check(problem, layer(problem.A))


def test_cast_leaves_packed_bytes_alone(seed):
    layer, problem = make_layer(seed, **{**FULL, "zeros_mode": "quantized"})
    packed, zeros = layer.qweight.clone(), layer.zeros.clone()
    layer.float().half()
    assert torch.equal(layer.qweight, packed) and torch.equal(layer.zeros, zeros)
    check(problem, layer(problem.A))


def test_cast_of_a_dense_layer(seed):
    layer, problem = make_layer(seed, W_dtype="float16", bias=True)
    layer.float()
    assert layer.weight.dtype == torch.float32
    assert layer.config.W_dtype == layer.config.A_dtype == layer.config.out_dtype == "float32"
    out = layer(problem.A.float())
    assert relative_error(out, problem.reference()) <= tolerance(layer.config)


def test_cast_keeps_a_wider_out_dtype(seed):
    layer, problem = make_layer(seed, out_dtype="float32", bias=True)
    layer.bfloat16()
    assert (layer.config.A_dtype, layer.config.out_dtype) == ("bfloat16", "float32")
    assert layer(problem.A.bfloat16()).dtype == torch.float32


def test_cast_does_not_touch_integer_activations(seed):
    layer, problem = make_layer(seed, **KINDS["int8 A"])
    before = layer.scales.clone()
    layer.bfloat16()
    assert layer.config.A_dtype == "int8" and torch.equal(layer.scales, before)
    check(problem, layer(problem.A))


@pytest.mark.parametrize("W_dtype", ["mxfp4", "nvfp4"])
def test_cast_does_not_touch_encoded_scales(seed, W_dtype):
    layer, problem = make_layer(seed, W_dtype=W_dtype)
    before = layer.scales.view(torch.uint8).clone()
    layer.float().half()
    assert torch.equal(layer.scales.view(torch.uint8), before)
    check(problem, layer(problem.A))


def test_cast_to_a_dtype_without_kernels_is_refused(seed):
    layer, problem = make_layer(seed)
    with pytest.raises(ValueError, match="A_dtype: got 'torch.float64'"):
        layer.double()
    check(problem, layer(problem.A))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_moves_between_devices(seed, kind):
    layer, problem = make_layer(seed, device="cpu", **KINDS[kind])
    on_gpu = draw(layer.config, 3, seed, "cuda")
    for device, there in (("cuda", on_gpu), ("cpu", problem), ("cuda", on_gpu)):
        layer.to(device)
        assert all(b.device.type == device for b in layer.buffers())
        check(there, layer(there.A))


class WithAdapter(bitblas.Linear):
    """A layer that holds a trainable low-rank pair, as adapter libraries build them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.down = nn.Linear(self.in_features, 4, bias=False)
        self.up = nn.Linear(4, self.out_features, bias=False)

    def forward(self, A, output=None):
        return super().forward(A, output) + self.up(self.down(A))


def test_child_modules_cast_and_move_too(seed):
    layer = WithAdapter(96, 40, W_dtype="uint4").to(DEVICE)
    problem = draw(layer.config, 3, seed, DEVICE)
    load(layer, problem)
    layer.half()
    assert layer.down.weight.dtype == torch.float16 and layer.down.weight.device.type == DEVICE
    adapted = problem.A.double() @ (layer.up.weight.double() @ layer.down.weight.double()).T
    expected = problem.reference() + adapted
    assert relative_error(layer(problem.A), expected) < 2e-3
    layer.float()
    assert layer.down.weight.dtype == torch.float32
    assert relative_error(layer(problem.A.float()), expected) < 2e-3


def test_adapter_trains_and_the_packed_weight_does_not(seed):
    layer = WithAdapter(96, 40, W_dtype="uint4", A_dtype="float32", out_dtype="float32")
    assert [name for name, _ in layer.named_parameters()] == ["down.weight", "up.weight"]
    layer(torch.randn(3, 96)).sum().backward()
    assert layer.up.weight.grad is not None and layer.down.weight.grad is not None


# gradients


@pytest.mark.parametrize("zeros_mode", ["original", "rescale", "quantized"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_input_gradient(seed, dtype, zeros_mode):
    fields = {**FULL, "zeros_mode": zeros_mode}
    layer, problem = make_layer(seed, A_dtype=dtype, out_dtype=dtype, **fields)
    A = problem.A.requires_grad_()
    incoming = torch.randn(3, 40, device=DEVICE).to(A.dtype)
    layer(A).backward(incoming)
    weight = reference.dequantize(layer.config, problem.codes, problem.scale, problem.zeros)
    expected = incoming.double() @ weight
    assert A.grad.dtype == A.dtype
    assert relative_error(A.grad, expected) <= tolerance(layer.config)


def test_input_gradient_of_a_dense_layer(seed):
    layer, problem = make_layer(seed, W_dtype="float16")
    A = problem.A.requires_grad_()
    layer(A).backward(torch.ones(3, 40, dtype=torch.float16, device=DEVICE))
    expected = problem.codes.double().sum(0).expand(3, 96)
    assert relative_error(A.grad, expected) <= tolerance(layer.config)


def test_input_gradient_is_shaped_as_the_input(seed):
    layer, problem = make_layer(seed, m=6)
    A = problem.A.view(2, 3, 96).requires_grad_()
    layer(A).sum().backward()
    assert A.grad.shape == (2, 3, 96)


def test_bias_gradient(seed):
    layer, problem = make_layer(seed, A_dtype="float32", out_dtype="float32", bias=True)
    layer.bias.requires_grad_()
    incoming = torch.randn(3, 40, device=DEVICE)
    layer(problem.A).backward(incoming)
    assert relative_error(layer.bias.grad, incoming.double().sum(0)) <= tolerance(layer.config)


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_autocast_casts_the_input(seed, given):
    layer, problem = make_layer(seed, A_dtype="bfloat16", out_dtype="bfloat16")
    problem.A = problem.A.to(given)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = layer(problem.A)
    problem.A = problem.A.bfloat16()
    check(problem, out)


@pytest.mark.parametrize("A_dtype", ["int8", "e4m3_float8"])
def test_autocast_does_not_turn_floats_into_8_bits(A_dtype):
    layer = bitblas.Linear(64, 32, A_dtype=A_dtype, W_dtype="int4").to(DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        with pytest.raises(TypeError, match="A: got torch.float32"):
            layer(torch.randn(2, 64, device=DEVICE))


def test_gradient_flows_through_autocast(seed):
    layer, problem = make_layer(seed, A_dtype="bfloat16", out_dtype="bfloat16")
    A = problem.A.float().requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        layer(A).float().sum().backward()
    weight = reference.dequantize(layer.config, problem.codes)
    assert A.grad.dtype == torch.float32
    assert relative_error(A.grad, weight.sum(0).expand(3, 96)) <= tolerance(layer.config)


# from_float

# half the largest step between neighbouring values, as a part of the range that the scale maps:
# from the least to the greatest value for unsigned formats, the greatest magnitude for the others
HALF_STEP = {f"uint{b}": 0.5 / (2**b - 1) for b in (1, 2, 3, 4, 8)}
HALF_STEP |= {f"int{b}": 0.5 / (2 ** (b - 1) - 1) for b in (2, 3, 4, 8)}
HALF_STEP |= {
    "int1": 1.0,
    "nf4": 0.5 * (1 - 0.6961928),
    "fp4_e2m1": 1 / 6,
    "mxfp4": 2 / 6,  # the scale is a power of two, up to twice what the group needs
    "nvfp4": 1.0625 / 6,  # the scale is rounded to 3 bits
    "e4m3_float8": 16 / 448,
    "e5m2_float8": 4096 / 57344,
}


@pytest.mark.parametrize("W_dtype", PACKED)
def test_from_float_is_as_close_as_the_bits_allow(W_dtype):
    """Root mean square of each group: rounding to nearest never does worse than half a step."""
    linear = nn.Linear(96, 40, bias=False).to(DEVICE)
    group_size = -1 if W_dtype in ("mxfp4", "nvfp4") else 32
    layer = bitblas.Linear.from_float(linear, W_dtype, group_size)
    groups = linear.weight.detach().view(40, -1, layer.group_size)
    got = layer(torch.eye(96, device=DEVICE)).T.reshape(groups.shape)
    span = groups.abs().amax(-1)
    if W_dtype.startswith("uint"):
        span = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    error = (got - groups).square().mean(-1).sqrt()
    assert (error <= span * HALF_STEP[W_dtype] * 1.0001).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_from_float_takes_the_dtype_of_the_weight(dtype):
    linear = nn.Linear(64, 8).to(DEVICE, getattr(torch, dtype))
    layer = bitblas.Linear.from_float(linear, "int8")
    assert layer.config.A_dtype == layer.config.out_dtype == dtype
    x = torch.randn(3, 64, device=DEVICE).to(getattr(torch, dtype))
    assert relative_error(layer(x), linear(x)) < 0.02


def test_from_float_without_bias():
    layer = bitblas.Linear.from_float(nn.Linear(64, 8, bias=False), "int4")
    assert layer.bias is None


def test_empty_like_starts_at_code_0(seed):
    layer, problem = make_layer(seed)
    fresh = empty_like(layer)
    assert torch.equal(fresh(problem.A), torch.zeros(3, 40, dtype=torch.float16, device=DEVICE))
