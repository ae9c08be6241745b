"""Products through a temporary dense copy: when they are taken, and what they give."""

from __future__ import annotations

import pytest
import torch
from problems import draw, relative_error, tolerance

import bitblas
from bitblas import MatmulConfig, cache, dense, plan
from bitblas.kernels import decode

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def allowed():
    bitblas.allow_dense_copies()
    yield
    bitblas.allow_dense_copies(False)


@pytest.fixture
def ampere(monkeypatch):
    monkeypatch.setattr(cache, "device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(plan, "_architecture", lambda device: 80)
    monkeypatch.setattr(plan, "_gpu", lambda device: decode.GPU(108))
    monkeypatch.setattr("bitblas.kernels.portable._roomy", lambda: False)


def product(**fields):
    fields = {"A_dtype": "float16", "W_dtype": "uint4", "out_dtype": "float16", **fields}
    return MatmulConfig(N=4096, K=4096, group_size=128, with_scaling=True, **fields)


def test_never_unless_allowed(ampere):
    assert not dense.is_faster(product(), 4096, DEVICE)


def test_for_many_rows_where_the_portable_family_serves(ampere, allowed):
    assert dense.is_faster(product(), 4096, DEVICE)
    assert not dense.is_faster(product(), 64, DEVICE)


@pytest.mark.parametrize(
    "fields",
    [
        {"A_dtype": "int8"},
        {"A_dtype": "float32", "out_dtype": "float32"},
        {"out_dtype": "float32"},
        {"A_dtype": "e4m3_float8", "W_dtype": "int4"},
    ],
)
def test_not_where_a_16_bit_copy_would_change_the_result(ampere, allowed, fields):
    assert not dense.is_faster(product(**fields), 4096, DEVICE)


def test_allowing_drops_prepared_calls():
    before = cache.generation()
    bitblas.allow_dense_copies(False)
    assert cache.generation() == before
    try:
        bitblas.allow_dense_copies()
        assert cache.generation() != before
    finally:
        bitblas.allow_dense_copies(False)


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_of_a_copy(bias):
    A, weight = torch.randn(5, 7), torch.randn(3, 7)
    added = torch.randn(3) if bias else None
    out = torch.full((5, 3), float("nan"))
    dense.matmul(A, weight, added, out)
    assert torch.equal(out, torch.nn.functional.linear(A, weight, added))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("w", ["uint4", "nf4", "nvfp4", "uint3", "e4m3_float8"])
def test_results_on_a_gpu(allowed, monkeypatch, w):
    calls = []
    genuine = dense.matmul
    monkeypatch.setattr(dense, "matmul", lambda *args: (calls.append(1), genuine(*args)))
    monkeypatch.setattr(dense, "is_faster", lambda config, m, device: m >= 512)
    config = MatmulConfig(
        N=1000, K=1024, A_dtype="float16", W_dtype=w, out_dtype="float16",
        group_size=16 if w == "nvfp4" else 128, with_scaling=True, with_bias=True,
    )  # fmt: skip
    operator = bitblas.Matmul(config)
    problem = draw(config, 700, 3, "cuda")
    W = operator.weight_transform(problem.codes)
    for _ in range(3):
        out = operator(problem.A, W, **problem.extras())
        assert relative_error(out, problem.expected()) <= tolerance(config)
    assert len(calls) == 3
    operator(problem.A[:5], W, **problem.extras())
    assert len(calls) == 3
