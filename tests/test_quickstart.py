"""The documented uses of BitBLAS, as its quick start has them."""

import torch
from conftest import DEVICE
from test_gptq import make_gptq

import bitblas


def test_matmul_int4_without_scales():
    config = bitblas.MatmulConfig(
        M=1,
        N=2048,
        K=1024,
        A_dtype="float16",
        W_dtype="int4",
        accum_dtype="float16",
        out_dtype="float16",
        layout="nt",
        with_bias=False,
        group_size=None,
        with_scaling=False,
        with_zeros=False,
        zeros_mode=None,
    )
    matmul = bitblas.Matmul(config=config)
    A = torch.rand((1, 1024), dtype=torch.float16, device=DEVICE)
    weight = torch.randint(0, 7, (2048, 1024), dtype=torch.int8, device=DEVICE)
    weight_int4 = matmul.transform_weight(weight)
    output = matmul(A, weight_int4)
    expected = torch.matmul(A.float(), weight.T.float()).half()
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-0)


def test_matmul_uint4_with_scales_and_zeros():
    in_features, out_features, group_size = 1024, 1024, 128
    config = bitblas.MatmulConfig(
        M=1,
        N=out_features,
        K=in_features,
        A_dtype="float16",
        W_dtype="uint4",
        accum_dtype="float16",
        out_dtype="float16",
        layout="nt",
        with_bias=False,
        group_size=group_size,
        with_scaling=True,
        with_zeros=True,
        zeros_mode="original",
    )
    matmul = bitblas.Matmul(config=config)
    A = torch.rand((1, in_features), dtype=torch.float16, device=DEVICE)
    weight = torch.randint(0, 15, (out_features, in_features), dtype=torch.int8, device=DEVICE)
    groups = in_features // group_size
    scaling = torch.rand((out_features, groups), dtype=torch.float16, device=DEVICE)
    zeros = torch.randint(0, 16, (out_features, groups), device=DEVICE).half()
    output = matmul(A, matmul.transform_weight(weight), scale=scaling, zeros=zeros)

    rescaled = torch.zeros(out_features, in_features, dtype=torch.float32, device=DEVICE)
    for i in range(in_features):
        group = i // group_size
        rescaled[:, i] = (weight[:, i].float() - zeros[:, group].float()) * scaling[
            :, group
        ].float()
    expected = torch.matmul(A.float(), rescaled.T)
    torch.testing.assert_close(output.float(), expected, rtol=1e-2, atol=1e-0)


def test_linear_saved_and_loaded(tmp_path):
    def construct():
        return bitblas.Linear(
            in_features=1024,
            out_features=2048,
            bias=False,
            A_dtype="float16",
            W_dtype="int4",
            accum_dtype="float16",
            out_dtype="float16",
            group_size=None,
            with_scaling=False,
            with_zeros=False,
            zeros_mode=None,
            opt_M=[1, 16, 32, 64, 128],
        ).to(DEVICE)

    model = construct()
    weight = torch.randint(-8, 8, (2048, 1024), dtype=torch.int8, device=DEVICE)
    model.load_and_transform_weight(weight)
    torch.save(model.state_dict(), tmp_path / "model.pth")
    fresh = construct()
    fresh.load_state_dict(torch.load(tmp_path / "model.pth"))
    fresh.eval()
    A = torch.randn(1, 1024, dtype=torch.float16, device=DEVICE)
    assert torch.equal(fresh(A), model(A))
    expected = torch.matmul(A.float(), weight.T.float())
    torch.testing.assert_close(fresh(A).float(), expected, rtol=1e-2, atol=1e-0)


def test_linear_from_gptq():
    in_features, out_features, group_size = 1024, 1024, 128
    gptq_layer, weight = make_gptq(4, group_size, n=out_features, k=in_features)
    linear = bitblas.Linear(
        in_features=in_features,
        out_features=out_features,
        bias=False,
        A_dtype="float16",
        W_dtype="uint4",
        accum_dtype="float16",
        out_dtype="float16",
        group_size=group_size,
        with_scaling=True,
        with_zeros=True,
        zeros_mode="quantized",
    ).to(DEVICE)
    linear.repack_from_gptq(gptq_layer)
    A = torch.rand(1, in_features, dtype=torch.float16, device=DEVICE)
    expected = (A.double() @ weight.T).half()
    torch.testing.assert_close(linear(A), expected, rtol=1e-2, atol=1e-2)
