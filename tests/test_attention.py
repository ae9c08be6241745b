"""FlashAtten against softmax attention in float64."""

import pytest
import torch

import bitblas

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(Q, K, V, causal):
    q, k, v = (x.double().transpose(1, 2) for x in (Q, K, V))
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        visible = visible.tril(scores.shape[-1] - scores.shape[-2])
        scores = scores.masked_fill(~visible, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["nnn", "ntn"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len, k_len, kv_heads", [(33, 33, 4), (1, 40, 2), (7, 19, 1)])
def test_matches_float64(dtype, layout, causal, q_len, k_len, kv_heads):
    torch_dtype = getattr(torch, dtype)
    config = bitblas.FlashAttenConfig(
        2, 4, kv_heads, k_len, 32, dtype, dtype, dtype, "float32", dtype, layout, causal
    )
    Q = torch.randn(2, q_len, 4, 32, dtype=torch_dtype, device=DEVICE)
    K = torch.randn(2, k_len, kv_heads, 32, dtype=torch_dtype, device=DEVICE)
    V = torch.randn(2, k_len, kv_heads, 32, dtype=torch_dtype, device=DEVICE)
    given = K.permute(0, 3, 2, 1).contiguous() if layout == "ntn" else K
    output = torch.full_like(Q, float("nan"))
    returned = bitblas.FlashAtten(config)(Q, given, V, output=output)
    expected = reference(Q, K, V, causal)
    assert returned is output
    error = (output.double() - expected).norm() / expected.norm()
    assert error < (2e-3 if dtype == "float16" else 1e-2)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(heads=3, kv_heads=2), "kv_heads: 2 does not divide"),
        (dict(layout="ttt"), "layout: got 'ttt'"),
        (dict(Q_dtype="float64"), "Q_dtype: got 'float64'"),
        (dict(K_dtype="int8"), "K_dtype: got 'int8'"),
        (dict(dim=0), "dim: got 0"),
    ],
)
def test_bad_config_is_named(change, match):
    fields = dict(batch=1, heads=2, seq_len=8, dim=32) | change
    with pytest.raises(ValueError, match=match):
        bitblas.FlashAttenConfig(**fields)


def test_bad_operand_is_named():
    operator = bitblas.FlashAtten(bitblas.FlashAttenConfig(1, 2, None, 8, 32))
    Q = torch.zeros(1, 8, 2, 32, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"K: got shape \(1, 8, 2, 16\)"):
        operator(Q, Q[..., :16], Q)
    with pytest.raises(TypeError, match="V: got torch.float32"):
        operator(Q, Q, Q.float())
