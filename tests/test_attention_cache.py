"""The border of the quantised caches: what QuantizedKV.write and the dtypes refuse."""

import pytest
import torch

from bitblas import QuantizedKV, quantize_kv
from bitblas.quantization.kv_cache import KV_DTYPES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def tokens(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.float16, device=DEVICE)


def at(*positions: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(positions, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", KV_DTYPES)
@pytest.mark.parametrize(
    "shape, position, error, match",
    [
        ((2, 3, 3, 32), 7, ValueError, "position: got 7, expected 0 to 6 for 3 tokens"),
        ((2, 1, 3, 32), 9, ValueError, "position: got 9, expected 0 to 8"),
        ((2, 1, 3, 32), -1, ValueError, "position: got -1, expected 0 to 8"),
        ((2, 1, 3, 32), True, TypeError, "position: got True, expected an integer or a tensor"),
        ((2, 1, 3, 32), 1.0, TypeError, "position: got 1.0, expected an integer or a tensor"),
        ((2, 1, 3, 32), at(0, 1, dtype=torch.float32), TypeError, "position: got torch.float32"),
        ((2, 1, 3, 32), at(0), ValueError, r"position: got shape \(1,\), expected \(2,\)"),
        ((1, 1, 3, 32), 0, ValueError, r"x: got shape \(1, 1, 3, 32\), expected \[2, up to 9, 3"),
        ((2, 1, 1, 32), 0, ValueError, r"x: got shape \(2, 1, 1, 32\)"),
        ((2, 1, 3, 2), 0, ValueError, r"x: got shape .*, expected \[2, up to 9, 3, 32\]"),
        ((2, 10, 3, 32), at(0, 0), ValueError, r"x: got shape \(2, 10, 3, 32\)"),
    ],
)
def test_bad_write_is_named_and_writes_nothing(dtype, shape, position, error, match):
    cache = QuantizedKV.empty(2, 9, 3, 32, dtype, device=DEVICE)
    with pytest.raises(error, match=match):
        cache.write(tokens(*shape), position)
    assert cache.scale.eq(0).all()


@pytest.mark.parametrize("position", [0, 6])
def test_a_cache_is_written_up_to_its_ends(position):
    cache = QuantizedKV.empty(2, 9, 3, 32, "int8", device=DEVICE)
    cache.write(tokens(2, 3, 3, 32), position)
    assert cache.scale.ne(0).sum() == 2 * 3 * 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_values_of_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"x: got shape .* {dtype}, expected .* torch.float16"):
        quantize_kv(tokens(1, 1, 1, 8).to(dtype), "int8")


@pytest.mark.parametrize("scale_dtype", [torch.float64, torch.int8])
def test_scales_of_other_dtypes_are_refused(scale_dtype):
    match = f"scale_dtype: got {scale_dtype}, expected one of torch.float16"
    with pytest.raises(ValueError, match=match):
        quantize_kv(tokens(1, 1, 1, 8), "int8", scale_dtype)
    with pytest.raises(ValueError, match=match):
        QuantizedKV.empty(1, 1, 1, 8, "int8", scale_dtype)
