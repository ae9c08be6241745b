"""quantize_kv and QuantizedKV: rounding, layout, writing."""

import pytest
import torch

from bitblas import QuantizedKV, quantize_kv
from bitblas.quantization.kv_cache import KV_DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# of the step between codes; e4m3 has 3 bits of mantissa, so half a step is 1/16 of the value
STEPS = {"int8": 1 / 254, "int4": 1 / 15}


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_values_are_rounded_to_nearest(dtype, kind):
    x = torch.randn(2, 7, 3, 64, device=DEVICE).to(kind)
    x[0, 0] = 0
    cache = quantize_kv(x, dtype)
    assert cache.dtype == dtype
    assert cache.scale.dtype == (torch.float16 if kind == torch.float32 else kind)
    error = (cache.dequantize(torch.float64) - x.double()).abs()
    wide = x.double()
    if dtype == "e4m3_float8":
        largest = wide.abs().amax(-1, keepdim=True)
        limit = torch.maximum(wide.abs() / 16, largest * 2.0**-17)
    elif dtype == "int8":
        limit = wide.abs().amax(-1, keepdim=True) * STEPS[dtype]
    else:
        span = wide.amax(-1, keepdim=True).clamp(min=0) - wide.amin(-1, keepdim=True).clamp(max=0)
        limit = span / 2 * STEPS[dtype]
    # the rounded scale may cut the largest values by its own rounding, of 8 bits in bfloat16
    slack = wide.abs().amax(-1, keepdim=True) * 2.0**-7
    assert (error <= 1.01 * limit + slack).all()
    assert cache.dequantize()[0, 0].eq(0).all()


def test_int4_codes_of_both_halves_share_a_byte():
    x = torch.zeros(1, 1, 1, 8, device=DEVICE)
    x[..., 1], x[..., 6] = 15, 3
    codes = quantize_kv(x, "int4").codes
    assert codes.shape == (1, 1, 1, 4)
    assert codes.flatten().tolist() == [0, 15, 3 << 4, 0]


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize("position", [3, [0, 5]])
def test_tokens_are_written_where_they_belong(dtype, position):
    cache = QuantizedKV.empty(2, 9, 3, 32, dtype, device=DEVICE)
    x = torch.randn(2, 4, 3, 32, device=DEVICE).half()
    at = torch.tensor(position, device=DEVICE) if isinstance(position, list) else position
    cache.write(x, at)
    values, expected = cache.dequantize(), quantize_kv(x, dtype).dequantize()
    for b, first in enumerate(position if isinstance(position, list) else [position] * 2):
        assert torch.equal(values[b, first : first + 4], expected[b])
        assert values[b, :first].eq(0).all() and values[b, first + 4 :].eq(0).all()


@pytest.mark.parametrize(
    "x, dtype, error, match",
    [
        (torch.zeros(1, 1, 1, 8), "int3", ValueError, "dtype: got 'int3', expected one of int8"),
        (torch.zeros(1, 1, 1, 7), "int4", ValueError, "dim: got 7, int4 needs an even one"),
        (torch.zeros(1, 1, 8), "int8", ValueError, r"x: got shape \(1, 1, 8\)"),
        (torch.zeros(1, 1, 1, 8).int(), "int8", ValueError, "x: got shape .* torch.int32"),
        ([1.0], "int8", TypeError, "x: got list, expected a tensor"),
    ],
)
def test_bad_arguments_are_named(x, dtype, error, match):
    with pytest.raises(error, match=match):
        quantize_kv(x, dtype)
