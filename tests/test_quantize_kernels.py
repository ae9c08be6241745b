"""The quantiser's kernel without a GPU: its results in Triton's interpreter, its machine code."""

from __future__ import annotations

import sys

import pytest
import torch
from compat import meta
from fake_cuda import FakeCuda, install
from interpreter import interpret_all, print_results
from rows import FLOATS, as_bytes, draw_rows

from bitblas import quantize_activation
from bitblas.config import QUANTIZED_ACTIVATIONS, TORCH_DTYPES

# a row in one block, several rows in one, and a row that a block walks over
SIZES = {"one": (3, 1), "short": (2050, 7), "odd": (5, 129), "long": (2, 40003)}
INTERPRETED = {
    f"{size}-{given}-{dtype}": (size, given, dtype)
    for size in SIZES
    for given in FLOATS
    for dtype in QUANTIZED_ACTIVATIONS
}


def interpret(size: str, given: str, dtype: str) -> bool:
    """Whether the kernel's results are those of the CPU, bit for bit."""
    from bitblas.kernels import prepared, quantize

    m, k = SIZES[size]
    x = draw_rows(m, k, FLOATS[given], seed=m + k)
    x[0] = 0
    if m > 2:
        x[1, k - 1], x[2, 0] = float("nan"), float("-inf")
    q = torch.full((m, k), 77.0).to(TORCH_DTYPES[dtype])
    scale = torch.full((m,), 77.0)
    prepared.execute([quantize.launch(x, q, scale, dtype, 80)], x.device)
    expected_q, expected_scale = quantize_activation(x, dtype)
    torch.testing.assert_close(scale, expected_scale, rtol=0, atol=0, equal_nan=True)
    return torch.equal(as_bytes(q), as_bytes(expected_q))


def main(shard: int) -> None:
    print_results({name: lambda case=case: interpret(*case) for name, case in INTERPRETED.items()})


@pytest.fixture(scope="module")
def interpreted() -> dict[str, object]:
    return interpret_all(__file__, 1)


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_agrees_with_the_cpu(name, interpreted):
    assert interpreted[name] is True, interpreted[name]


def compiled(m: int, k: int, given: str, dtype: str, arch: int):
    from bitblas.kernels import compile as compiler
    from bitblas.kernels import quantize

    operands = (
        meta((m, k), FLOATS[given]), meta((m, k), TORCH_DTYPES[dtype]), meta((m,), torch.float32)
    )  # fmt: skip
    launch = quantize.launch(*operands, dtype, arch)
    return compiler.statistics(compiler.compile_launch(launch, arch))


COMPILED = [  # (m, k, activation, arch)
    (1, 4096, "float16", 80),
    (4096, 512, "float16", 89),
    (4096, 8192, "float16", 90),
    (1, 28672, "bfloat16", 80),
    (16, 65536, "float16", 90),
    (256, 14336, "bfloat16", 90),
    (16, 28672, "float32", 90),
    (1, 40960, "float32", 80),
]


@pytest.mark.parametrize("dtype", QUANTIZED_ACTIVATIONS)
@pytest.mark.parametrize(("m", "k", "given", "arch"), COMPILED)
def test_kernel_stays_in_registers_and_moves_16_bytes(m, k, given, arch, dtype):
    found = compiled(m, k, given, dtype, arch)
    assert found.local_bytes == 0
    moves = [op for op in found.opcodes if op.startswith(("LDG", "STG"))]
    assert all(op.endswith(".128") for op in moves if op != "STG.E"), moves  # STG.E: the scale
    assert found.count("LDG.E.128") > 0 and found.count("STG.E.128") > 0


@pytest.mark.parametrize("arch", [80, 90])
def test_rows_that_are_not_aligned_compile(arch):
    assert compiled(3, 1001, "float16", "int8", arch).local_bytes == 0


def test_only_hopper_starts_early(monkeypatch):
    from bitblas.kernels import quantize

    operands = meta((2, 64), torch.float16), meta((2, 64), torch.int8), meta((2,), torch.float32)
    for arch, early in ((80, False), (89, False), (90, True)):
        launch = quantize.launch(*operands, "int8", arch)
        assert launch.options.get("launch_pdl", False) == early
        assert launch.constants["PROGRAMMATIC"] == early
    monkeypatch.setattr(quantize, "PROGRAMMATIC_LAUNCH", False)
    assert "launch_pdl" not in quantize.launch(*operands, "int8", 90).options


@pytest.fixture
def cuda(monkeypatch):
    """A driver that launches nothing; CPU tensors stand in for the GPU's."""
    from bitblas.kernels import gpu
    from bitblas.quantization import activation

    if torch.cuda.is_available():
        pytest.skip("CPU tensors stand in for the GPU's")
    fake = FakeCuda()
    install(monkeypatch, fake)
    monkeypatch.setattr(gpu, "architecture", lambda device: 90)
    monkeypatch.setattr(gpu, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "_prepared", {})
    monkeypatch.setattr(activation, "prepare_quantizer", gpu.prepare_quantizer)
    monkeypatch.setattr(activation, "_calls", {})
    return fake


def test_calls_of_a_kind_share_a_prepared_launch(cuda):
    from bitblas.kernels import gpu

    for m, k in ((2, 64), (2, 64), (2, 128), (4, 32)):
        x, q, scale = torch.zeros(m, k), torch.zeros(m, k, dtype=torch.int8), torch.zeros(m)
        gpu.quantize_activation(x, q, scale, "int8")
        pointers = tuple(t.data_ptr() for t in (x, q, scale))
        assert cuda.launched[-1].values == (*pointers, m, k, 0, 0)  # and Triton's scratch pointers
        assert cuda.launched[-1].attributes == 1
    assert len(gpu._prepared) == 3
    unaligned = torch.zeros(129)[1:].view(2, 64)
    gpu.quantize_activation(unaligned, q := torch.zeros(2, 64).char(), torch.zeros(2), "int8")
    assert cuda.launched[-1].values[:2] == (unaligned.data_ptr(), q.data_ptr())
    assert len(gpu._prepared) == 3


def test_a_repeated_call_hands_the_driver_its_operands(cuda, seed):
    x = draw_rows(6, 64, torch.float16, seed).view(2, 3, 64)
    quantize_activation(x)
    assert cuda.launched == []  # the first goes through the registered operator
    for given in (x, x + 1):
        q, scale = quantize_activation(given)
        assert q.shape == x.shape and q.dtype == torch.int8
        assert scale.shape == (2, 3) and scale.dtype == torch.float32
        pointers = tuple(t.data_ptr() for t in (given, q, scale))
        assert cuda.launched[-1].values[:5] == (*pointers, 6, 64)
    quantize_activation(x.requires_grad_())
    q, scale = quantize_activation(x)
    assert len(cuda.launched) == 3 and not scale.requires_grad


def test_what_needs_conversion_takes_the_long_way(cuda, seed):
    x = draw_rows(4, 64, torch.float16, seed)
    expected = quantize_activation(x)
    unaligned = torch.empty(257, dtype=x.dtype)[1:].view(4, 64).copy_(x)
    for same in (x.T.contiguous().T, unaligned):
        for _ in range(2):
            assert all(map(torch.equal, quantize_activation(same), expected))
    bad = torch.zeros(4, 64).double()
    for _ in range(2):
        with pytest.raises(TypeError, match="x: got torch.float64"):
            quantize_activation(bad)
        assert quantize_activation(x[:0])[0].shape == (0, 64)
    assert cuda.launched == []


if __name__ == "__main__":
    main(int(sys.argv[1]))
