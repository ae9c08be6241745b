"""The quantiser's kernel on a GPU: the bits that the CPU gives, whatever runs before and beside."""

import pytest
import torch
from rows import FLOATS, as_bytes, draw_rows, worst

import bitblas
from bitblas import quantize_activation
from bitblas.config import QUANTIZED_ACTIVATIONS, TORCH_DTYPES

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bitblas.kernels import driver, gpu

pytestmark = pytest.mark.gpu
every_dtype = pytest.mark.parametrize("dtype", QUANTIZED_ACTIVATIONS)

SIZES = [  # one value, rows that share a block, masks, each number of warps, rows walked over
    (1, 1), (3, 7), (2049, 33), (4096, 64), (4096, 1000), (2050, 2048), (5, 129), (16, 512),
    (7, 3000), (300, 4096), (33, 8191), (1, 8192), (9, 14336), (3, 16384), (2, 28672), (5, 32768),
    (3, 32769), (1, 65536), (2, 100003),
]  # fmt: skip


def run(x: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's results, written over poison."""
    q = torch.full(x.shape, 0x55, dtype=torch.uint8, device="cuda").view(TORCH_DTYPES[dtype])
    scale = torch.full(x.shape[:1], -7.0, device="cuda")
    gpu.quantize_activation(x, q, scale, dtype)
    return q, scale


def assert_same(got, expected) -> None:
    (q, scale), (expected_q, expected_scale) = got, expected
    assert torch.equal(as_bytes(q), as_bytes(expected_q).to(q.device))
    expected_scale = expected_scale.to(scale.device)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)


@every_dtype
@pytest.mark.parametrize("given", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bits_are_those_of_the_cpu(seed, size, given, dtype):
    x = draw_rows(*size, given, seed, "cuda")
    q, scale = run(x, dtype)
    assert worst(x, q, scale, dtype) <= 1
    assert_same((q, scale), quantize_activation(x.cpu(), dtype))


@every_dtype
@pytest.mark.parametrize("k", [5, 600, 8192, 40000])
def test_special_rows(seed, k, dtype):
    x = draw_rows(8, k, torch.float32, seed, "cuda")
    x[0], x[1], x[2, k - 1] = 0, -0.0, float("nan")
    x[3, 0], x[4, k // 2] = float("inf"), float("-inf")
    x[5] *= 1e-37
    x[6] *= 1e34
    assert_same(run(x, dtype), quantize_activation(x.cpu(), dtype))


@every_dtype
def test_a_hundred_launches_give_the_same_bits(seed, dtype):
    x = draw_rows(700, 5120, torch.bfloat16, seed, "cuda")
    expected = run(x, dtype)
    for _ in range(100):
        assert_same(run(x, dtype), expected)


def test_unaligned_and_strided_rows(seed):
    x = draw_rows(40, 256, torch.float16, seed, "cuda")
    shifted = torch.empty(40 * 256 + 1, dtype=x.dtype, device="cuda")[1:].view(40, 256).copy_(x)
    expected = quantize_activation(x)
    assert_same(quantize_activation(shifted), expected)
    assert_same(quantize_activation(x.T.contiguous().T), expected)


@pytest.mark.parametrize("size", [(1, 4096), (300, 4096)], ids=str)
def test_graph_replays_with_new_inputs(seed, size):
    x = draw_rows(*size, torch.float16, seed, "cuda")
    quantize_activation(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantize_activation(x)
    for turn in range(3):
        x.copy_(draw_rows(*size, torch.float16, seed + turn, "cuda"))
        out[0].fill_(99), out[1].fill_(float("nan"))
        graph.replay()
        assert_same(out, quantize_activation(x.clone()))


def test_input_written_just_before(seed):
    """The kernel is started early and must wait for the one ahead of it."""
    source = draw_rows(64, 8192, torch.float16, seed, "cuda")
    inputs = [torch.roll(source, shift, dims=0) for shift in range(30)]
    expected = [quantize_activation(x) for x in inputs]
    x, found = torch.empty_like(source), []
    for given in inputs:
        x.fill_(float("nan"))
        torch.add(given, 0, out=x)
        found.append(quantize_activation(x))
    for got, wanted in zip(found, expected):
        assert_same(got, wanted)


def test_a_chain_of_quantising_layers(seed):
    """Quantiser and product take turns, each reading what the one ahead wrote."""
    linears = [torch.nn.Linear(1024, 1024, device="cuda").half() for _ in range(6)]
    layers = [
        bitblas.Linear.from_float(linear, "int4", 128, quantize_activation=True)
        for linear in linears
    ]

    def run_all(x, wait):
        for layer in layers:
            x = layer(x)
            if wait:
                torch.cuda.synchronize()
        return x

    for m in (1, 20, 300):
        x = torch.randn(m, 1024, device="cuda").half()
        with torch.no_grad():
            expected = run_all(x, wait=True)
            for _ in range(20):
                assert torch.equal(run_all(x, wait=False), expected)


def test_warmup_loads_what_a_layer_needs(seed, monkeypatch):
    linear = torch.nn.Linear(640, 192, device="cuda").half()
    layer = bitblas.Linear.from_float(linear, "int4", 64, quantize_activation=True)
    bitblas.warmup(layer, m=(2, 60), workers=4, progress=False)
    monkeypatch.setattr(driver, "Kernel", None)
    for m in (2, 60):
        layer(torch.randn(m, 640, device="cuda").half())
