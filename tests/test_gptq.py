"""Loading GPTQ layers: packed here, element by element, as AutoGPTQ's CUDA layers pack them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICE
from problems import relative_error

import bitblas

K, N = 128, 64


def pack_down(codes: np.ndarray, bits: int) -> torch.Tensor:
    """(L, X) codes -> (L*bits/32, X) int32: code i fills bits i*bits.. of its column."""
    length, width = codes.shape
    words = np.zeros((length * bits // 32, width), np.uint64)
    for i in range(length):
        word, shift = divmod(i * bits, 32)
        words[word] |= (codes[i].astype(np.uint64) << np.uint64(shift)) & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            words[word + 1] |= codes[i].astype(np.uint64) >> np.uint64(32 - shift)
    return torch.from_numpy(words.astype(np.uint32).view(np.int32)).to(DEVICE)


def make_gptq(
    bits: int,
    group: int,
    symmetric: bool = False,
    act_order: bool = False,
    version: int = 1,
    bias: bool = False,
    n: int = N,
    k: int = K,
) -> tuple[SimpleNamespace, torch.Tensor]:
    """A GPTQ layer and the float64 weight (N, K) that it stands for."""
    groups = k // group
    codes = torch.randint(0, 2**bits, (k, n)).numpy()
    zeros = torch.randint(0, 2**bits, (groups, n)).numpy()
    if version == 1:
        zeros = np.maximum(zeros, 1)  # stored minus one: 1 .. 2^b - 1 are what quantisers emit
    if symmetric:
        zeros[:] = 2 ** (bits - 1)
    scales = (torch.rand(groups, n) * 0.09 + 0.01).half()
    g_idx = torch.arange(k) // group
    if act_order:
        g_idx = g_idx[torch.randperm(k)]
    stored = (zeros - 1) % 2**bits if version == 1 else zeros
    layer = SimpleNamespace(
        qweight=pack_down(codes, bits),
        qzeros=pack_down(stored.T, bits).T.contiguous(),
        scales=scales.to(DEVICE),
        g_idx=g_idx.to(torch.int32).to(DEVICE),
        bias=(torch.randn(n) * 4).half().to(DEVICE) if bias else None,
    )
    points = torch.from_numpy(codes - zeros[g_idx.numpy()]).double()
    return layer, (points * scales.double()[g_idx]).T.to(DEVICE)


def repack(layer, W_dtype, group, version=1, zeros_mode="original", n=N, k=K, **fields):
    fields = {"with_scaling": True, "with_zeros": True, "zeros_mode": zeros_mode, **fields}
    module = bitblas.Linear(k, n, W_dtype=W_dtype, group_size=group, **fields).to(DEVICE)
    (module.repack_from_gptq if version == 1 else module.repack_from_gptq_v2)(layer)
    return module


def check(module, layer, weight):
    A = torch.randn(5, weight.shape[1], device=DEVICE).half()
    expected = A.double() @ weight.T
    if layer.bias is not None:
        expected += layer.bias.double()
    # rescale stores zero * scale in float16: one more rounding of numbers as big as the weight
    assert relative_error(module(A), expected) <= (2e-3 if module.zeros_mode == "rescale" else 1e-3)


@pytest.mark.parametrize("zeros_mode", ["original", "rescale", "quantized"])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_asymmetric(bits, group, zeros_mode, version):
    layer, weight = make_gptq(bits, group, version=version)
    check(repack(layer, f"uint{bits}", group, version, zeros_mode), layer, weight)


@pytest.mark.parametrize("zeros_mode", ["original", "rescale", "quantized"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_group_a_row(bits, zeros_mode):
    layer, weight = make_gptq(bits, K)
    check(repack(layer, f"uint{bits}", -1, zeros_mode=zeros_mode), layer, weight)


@pytest.mark.parametrize("zeros_mode", ["original", "rescale", "quantized"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", [1, 2])
def test_act_order(bits, zeros_mode, version):
    layer, weight = make_gptq(bits, 32, act_order=True, version=version)
    check(repack(layer, f"uint{bits}", 32, version, zeros_mode), layer, weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_as_signed_weights(bits, act_order, version):
    layer, weight = make_gptq(bits, 64, symmetric=True, act_order=act_order, version=version)
    module = repack(layer, f"int{bits}", 64, version, with_zeros=False)
    assert module.zeros is None
    check(module, layer, weight)


@pytest.mark.parametrize("zeros_mode", ["original", "rescale"])
def test_asymmetric_as_signed_weights(zeros_mode):
    layer, weight = make_gptq(4, 64)
    check(repack(layer, "int4", 64, zeros_mode=zeros_mode), layer, weight)


@pytest.mark.parametrize("zeros_mode", ["original", "rescale", "quantized"])
def test_symmetric_as_unsigned_weights(zeros_mode):
    layer, weight = make_gptq(4, 64, symmetric=True)
    check(repack(layer, "uint4", 64, zeros_mode=zeros_mode), layer, weight)


def test_asymmetric_without_zeros_is_refused():
    layer, _ = make_gptq(4, 64)
    with pytest.raises(ValueError, match="qzeros: with_zeros=False"):
        repack(layer, "int4", 64, with_zeros=False)


@pytest.mark.parametrize("version, zero", [(1, 0), (2, 0), (2, 15)])
def test_extreme_zero_points(version, zero):
    """v1 stores a zero point of 0 as 2^b - 1."""
    layer, _ = make_gptq(4, 32, version=version)
    stored = np.full((N, K // 32), (zero - 1) % 16 if version == 1 else zero)
    layer.qzeros = pack_down(stored, 4).T.contiguous()
    module = repack(layer, "uint4", 32, version)
    assert (module.zeros == zero).all()


def test_bias():
    layer, weight = make_gptq(4, 64, bias=True)
    check(repack(layer, "uint4", 64, bias=True), layer, weight)


def test_bias_that_the_module_does_not_take_is_refused():
    layer, _ = make_gptq(4, 64, bias=True)
    with pytest.raises(ValueError, match="bias: the GPTQ layer has one"):
        repack(layer, "uint4", 64)


def test_g_idx_in_order_needs_no_permutation():
    layer, weight = make_gptq(4, 32)
    assert repack(layer, "uint4", 32).perm is None
    del layer.g_idx
    check(repack(layer, "uint4", 32), layer, weight)


@pytest.mark.parametrize("assign", [False, True])
def test_act_order_survives_state_dict(assign):
    layer, weight = make_gptq(4, 32, act_order=True)
    module = repack(layer, "uint4", 32)
    with torch.device("meta" if assign else DEVICE):
        fresh = bitblas.Linear(
            K, N, W_dtype="uint4", group_size=32, with_scaling=True, with_zeros=True
        )
    fresh.load_state_dict(module.state_dict(), assign=assign)
    check(fresh.to(DEVICE), layer, weight)


def test_checkpoint_in_order_clears_the_permutation():
    ordered, weight = make_gptq(4, 32)
    module = repack(make_gptq(4, 32, act_order=True)[0], "uint4", 32)
    module.load_state_dict(repack(ordered, "uint4", 32).state_dict())
    check(module, ordered, weight)


def test_act_order_input_gradient():
    layer, weight = make_gptq(4, 32, act_order=True)
    module = repack(layer, "uint4", 32)
    A = torch.randn(3, K, device=DEVICE).half().requires_grad_()
    incoming = torch.randn(3, N, device=DEVICE).half()
    module(A).backward(incoming)
    assert relative_error(A.grad, incoming.double() @ weight) <= 1e-3


def test_odd_number_of_outputs():
    """N = 40 with 2 bits: a row of zero points does not fill its last word in other layouts."""
    layer, weight = make_gptq(2, 32, n=48)
    check(repack(layer, "uint2", 32, n=48, zeros_mode="quantized"), layer, weight)


def test_bfloat16_module():
    layer, weight = make_gptq(4, 32)
    module = repack(layer, "uint4", 32, A_dtype="bfloat16", out_dtype="bfloat16")
    A = torch.randn(5, K, device=DEVICE).bfloat16()
    scales = layer.scales.bfloat16().double() / layer.scales.double()  # the module's are rounded
    weight = weight * scales.T.repeat_interleave(32, dim=1)
    assert relative_error(module(A), A.double() @ weight.T) <= 4e-3


def test_device_argument_places_the_result():
    layer, weight = make_gptq(4, 32)
    module = bitblas.Linear(
        K, N, W_dtype="uint4", group_size=32, with_scaling=True, with_zeros=True
    )
    module.repack_from_gptq(layer, device=DEVICE)
    assert all(buffer.device.type == DEVICE for buffer in module.buffers())
    check(module, layer, weight)
