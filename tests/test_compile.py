"""The registered operators under torch.compile, opcheck and the grad modes.

Compiled functions hold operators and Linear layers with torch's own matmul and views between them:
on the CPU such a graph needs no C++ compiler, which element-wise arithmetic would.
"""

import pytest
import torch
from calls import logical_weight
from conftest import DEVICE
from layers import FULL, make_layer
from problems import draw, relative_error
from torch import nn

import bitblas

CONFIGS = {
    "plain": dict(W_dtype="int4"),
    "full": dict(
        W_dtype="uint4",
        group_size=32,
        with_scaling=True,
        with_zeros=True,
        zeros_mode="quantized",
        with_bias=True,
    ),
    "nvfp4": dict(W_dtype="nvfp4"),
    "dense": dict(W_dtype="float16", with_bias=True),
    "int8": dict(A_dtype="int8", W_dtype="int4", out_dtype="float32", with_scaling=True),
}
every_config = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def setup(name, seed, m=3):
    config = bitblas.MatmulConfig(N=48, K=64, **CONFIGS[name])
    problem = draw(config, m, seed, DEVICE)
    if config.format.scale_encoding:  # as bytes: opcheck cannot compare 8-bit floats
        problem.scale = problem.scale.view(torch.uint8)
    matmul = bitblas.Matmul(config)
    return matmul, problem, matmul.transform_weight(logical_weight(problem))


def operands(matmul, problem, packed):
    """The arguments of bitblas::matmul."""
    names = ("scale", "zeros", "bias", "input_scale", "global_scale")
    return (problem.A, packed, *(getattr(problem, name) for name in names), matmul.config.key)


@every_config
def test_opcheck_matmul(seed, name):
    args = operands(*setup(name, seed))
    if args[0].is_floating_point():
        args[0].requires_grad_()
    torch.library.opcheck(torch.ops.bitblas.matmul.default, args)


@pytest.mark.parametrize("name", ["plain", "full", "dense"])
def test_opcheck_matmul_out(seed, name):
    matmul, problem, packed = setup(name, seed)
    out = torch.empty(3, 48, dtype=torch.float16, device=DEVICE)
    args = (*operands(matmul, problem, packed), out)
    torch.library.opcheck(torch.ops.bitblas.matmul_out.default, args)


@pytest.mark.parametrize("name", ["plain", "full", "nvfp4", "dense"])
def test_opcheck_dequantize(seed, name):
    matmul, problem, packed = setup(name, seed)
    args = (packed, problem.scale, problem.zeros, problem.global_scale, matmul.config.key)
    torch.library.opcheck(torch.ops.bitblas.dequantize.default, args)


@every_config
def test_compiled_call_equals_eager(seed, name):
    matmul, problem, packed = setup(name, seed)

    @torch.compile(fullgraph=True)
    def call(A):
        return matmul(A, packed, **problem.extras())

    expected = matmul(problem.A, packed, **problem.extras())
    assert torch.equal(call(problem.A), expected)


def test_compiled_output_argument(seed):
    matmul, problem, packed = setup("plain", seed)

    @torch.compile(fullgraph=True)
    def call(A, output):
        return matmul(A, packed, output=output)

    output = torch.zeros(3, 48, dtype=torch.float16, device=DEVICE)
    returned = call(problem.A, output)
    assert returned.data_ptr() == output.data_ptr()
    assert torch.equal(output, matmul(problem.A, packed))


@pytest.fixture
def model(seed):
    """Two layers with a reshape and a dense product between, and inputs of m rows for it."""
    first, problem = make_layer(seed, m=1, **FULL)
    second, _ = make_layer(seed + 1, in_features=40, out_features=24, W_dtype="nf4")
    mixer = nn.Linear(40, 40, bias=False, device=DEVICE, dtype=torch.float16)
    return nn.Sequential(first, mixer, nn.Unflatten(-1, (1, 40)), second)


def test_compiled_model_equals_eager(model):
    A = torch.randn(5, 96, device=DEVICE).half()
    compiled = torch.compile(model, fullgraph=True)
    assert torch.equal(compiled(A), model(A))


def test_dynamic_batch_compiles_once(model):
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for m in (2, 7, 33):
            A = torch.randn(m, 96, device=DEVICE).half()
            assert torch.equal(compiled(A), model(A))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_compiled_input_gradient_equals_eager(model):
    A = torch.randn(5, 96, device=DEVICE).half()
    incoming = torch.randn(5, 1, 24, device=DEVICE).half()
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True)):
        leaf = A.clone().requires_grad_()
        forward(leaf).backward(incoming)
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


@pytest.mark.skipif(DEVICE == "cpu" and not has_cpp_compiler(), reason="needs a C++ compiler")
def test_compiled_with_elementwise_arithmetic(seed):
    """Inductor generates kernels around the operators: results agree to the rounding of float16."""
    first, _ = make_layer(seed, **FULL)
    second, _ = make_layer(seed + 1, in_features=40, out_features=24, W_dtype="nf4")
    model = nn.Sequential(first, nn.GELU(), second, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for m in (3, 17):
        A = torch.randn(m, 96, device=DEVICE).half()
        results = []
        for forward in (compiled, model):
            leaf = A.clone().requires_grad_()
            out = forward(leaf)
            out.sum().backward()
            results.append((out.detach(), leaf.grad))
        for got, expected in zip(*results):
            assert relative_error(got, expected) < 2e-3


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_compiled_without_gradients(seed, mode):
    matmul, problem, packed = setup("full", seed)

    @torch.compile(fullgraph=True)
    def call(A):
        return matmul(A, packed, **problem.extras())

    expected = matmul(problem.A, packed, **problem.extras())
    with mode():
        got = call(problem.A)
    assert not got.requires_grad and torch.equal(got, expected)


@pytest.mark.gpu
def test_cuda_graph_replay(seed):
    matmul, problem, packed = setup("full", seed)
    extras, static = problem.extras(), problem.A.clone()
    matmul(static, packed, **extras)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = matmul(static, packed, **extras)
    for _ in range(3):
        static.copy_(torch.randn_like(static))
        graph.replay()
        assert torch.equal(out, matmul(static, packed, **extras))
