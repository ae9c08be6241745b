"""What packing a weight refuses: values that the format cannot hold, wrong shapes and kinds."""

import pytest
import torch

from bitblas import Matmul, MatmulConfig
from bitblas.formats import FORMATS

N, K = 48, 64
ROW = torch.zeros(N, dtype=torch.float16)


def operator(W_dtype="uint4"):
    return Matmul(MatmulConfig(1, N, K, W_dtype=W_dtype), target="cpu")


def full(value, dtype=torch.float32):
    return torch.full((N, K), value, dtype=dtype)


def pack(W_dtype, weight, **extras):
    return lambda: operator(W_dtype).transform_weight(weight, **extras)


RANGES = {
    name: (min(v), max(v)) for name, f in FORMATS.items() if f.is_integer for v in [f.code_values()]
}
CODED = ("nf4", "fp4_e2m1", "mxfp4", "nvfp4")
WEIGHTS = [
    *(
        (
            f"{name} {value}",
            ValueError,
            rf"weight: {name} takes values .*got values from {value}",
            pack(name, full(value, torch.int64)),
        )
        for name, (low, high) in RANGES.items()
        for value in (int(low) - 1, int(high) + 1, 2**40)
    ),
    *(
        (
            f"{name} {value}",
            ValueError,
            rf"weight: {name} takes integer values .*fractions or NaN",
            pack(name, full(value)),
        )
        for name in RANGES
        for value in (0.5, float("nan"))
    ),
    *(
        (
            f"{name} inf",
            ValueError,
            rf"weight: {name} takes values .*inf",
            pack(name, full(float("inf"))),
        )
        for name in RANGES
    ),
    (
        "int1 zero",
        ValueError,
        r"weight: int1 takes values -1 and \+1, got 0",
        pack("int1", full(0.0)),
    ),
    *(
        (
            f"{name} {value}",
            ValueError,
            rf"weight: {name} takes codes 0\.\.15, got values from {value}",
            pack(name, full(value, torch.int32)),
        )
        for name in CODED
        for value in (-1, 16)
    ),
    *(
        (
            f"{name} floats",
            TypeError,
            rf"weight: {name} takes codes 0\.\.15 .*torch\.float32",
            pack(name, full(1.0)),
        )
        for name in CODED
    ),
    (
        "e4m3 floats",
        TypeError,
        r"weight: e4m3_float8 .*float8_e4m3fn.*got torch\.float32",
        pack("e4m3_float8", full(1.0)),
    ),
    (
        "e5m2 as e4m3",
        TypeError,
        r"weight: e5m2_float8 .*got torch\.float8_e4m3fn",
        pack("e5m2_float8", full(1.0, torch.float8_e4m3fn)),
    ),
    (
        "uint64 max",
        ValueError,
        r"weight: int4 takes values -8\.\.7",
        pack("int4", full(2**64 - 1, torch.uint64)),
    ),
    (
        "bool",
        TypeError,
        r"weight: uint4 takes integer values, got torch\.bool",
        pack("uint4", full(True, torch.bool)),
    ),
    (
        "complex",
        TypeError,
        r"weight: float16 takes real values, got torch\.complex64",
        pack("float16", full(1j, torch.complex64)),
    ),
    (
        "shape",
        ValueError,
        r"weight: got shape \(64, 48\), expected \(48, 64\)",
        pack("uint4", full(1.0).T),
    ),
    (
        "rank",
        ValueError,
        r"weight: got shape \(3072,\), expected \(48, 64\)",
        pack("uint4", full(1.0).flatten()),
    ),
    (
        "dense shape",
        ValueError,
        r"weight: got shape \(64, 48\), expected",
        pack("float16", full(1.0).T),
    ),
    ("list", TypeError, r"weight: got list, expected a tensor", pack("uint4", [[1]])),
    ("list and scale", TypeError, r"weight: got list, expected", pack("uint4", [[1]], scale=ROW)),
    ("sparse", TypeError, r"weight: got a torch\.sparse_coo", pack("uint4", full(1.0).to_sparse())),
    (
        "dense sparse",
        TypeError,
        r"weight: got a torch\.sparse",
        pack("float16", full(1.0).to_sparse()),
    ),
    ("scale", ValueError, r"scale: .*with_scaling=False", pack("uint4", full(1.0), scale=ROW)),
    ("bias", ValueError, r"bias: .*with_bias=False", pack("uint4", full(1.0), bias=ROW)),
    (
        "codes shape",
        ValueError,
        r"codes of shape \(1, 64\), expected \(48, 64\)",
        lambda: operator().weight_transform(full(1, torch.int8)[:1]),
    ),
    (
        "codes range",
        ValueError,
        r"weight: uint4 takes codes 0\.\.15, got values from -1",
        lambda: operator().weight_transform(full(-1, torch.int8)),
    ),
    (
        "codes list",
        TypeError,
        r"weight: got list, expected",
        lambda: operator().weight_transform([1]),
    ),
    (
        "unpack shape",
        ValueError,
        r"W: got shape \(48, 64\), expected \(48, 32\)",
        lambda: operator().inverse_transform_weight(full(1, torch.int8)),
    ),
    (
        "unpack dtype",
        TypeError,
        r"W: got torch\.float32, expected a packed weight",
        lambda: operator().inverse_transform_weight(full(1.0)),
    ),
]


@pytest.mark.parametrize(
    ("error", "message", "run"), [pytest.param(*r[1:], id=r[0]) for r in WEIGHTS]
)
def test_bad_weight_is_refused(error, message, run):
    with pytest.raises(error, match=message):
        run()
