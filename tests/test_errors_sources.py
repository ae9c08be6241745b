"""What GPTQ repacking and the quantisation helpers refuse."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bitblas import Linear
from bitblas.quantization import gen_quant4, general_compress, interleave_weight, quantize_weight

N, K, G = 48, 64, 2
HALF = torch.float16


def linear(**arguments):
    defaults = {"W_dtype": "uint4", "with_scaling": True, "group_size": K // G}
    return Linear(K, N, **{**defaults, **arguments})


def gptq(v2=False, arguments=None, **changes):
    """Repack a valid layer with some of its tensors changed."""

    def run():
        module = linear(**(arguments or {"with_zeros": True}))
        layer = {
            "qweight": torch.zeros((K // 8, N), dtype=torch.int32),
            "qzeros": torch.zeros((G, N // 8), dtype=torch.int32),
            "scales": torch.ones((G, N), dtype=HALF),
            "g_idx": torch.arange(K, dtype=torch.int32) // (K // G),
            "bias": None,
        }
        repack = module.repack_from_gptq_v2 if v2 else module.repack_from_gptq
        repack(SimpleNamespace(**{**layer, **changes}))

    return run


def int32(*shape):
    return torch.zeros(shape, dtype=torch.int32)


LAYERS = [
    (
        "8-bit weight",
        ValueError,
        r"qweight: got shape \(16, 48\) .*expected \(8, 48\) int32 for 4 bits",
        gptq(qweight=int32(K // 4, N)),
    ),
    (
        "transposed weight",
        ValueError,
        r"qweight: got shape \(48, 8\)",
        gptq(qweight=int32(N, K // 8)),
    ),
    (
        "int64 weight",
        ValueError,
        r"qweight: got .*torch\.int64, expected .*int32",
        gptq(qweight=int32(K // 8, N).long()),
    ),
    ("other N", ValueError, r"qweight: got shape \(8, 40\)", gptq(qweight=int32(K // 8, 40))),
    (
        "scales shape",
        ValueError,
        r"scale: got shape \(48, 4\), expected \(48, 2\)",
        gptq(scales=torch.ones((4, N), dtype=HALF)),
    ),
    (
        "zeros shape",
        ValueError,
        r"qzeros: got \(1, 48\) zero points, expected \(2, 48\)",
        gptq(qzeros=int32(1, 6)),
    ),
    (
        "zeros of 8 bits",
        ValueError,
        r"qzeros: got \(2, 96\) zero points, expected \(2, 48\)",
        gptq(qzeros=int32(G, N // 4)),
    ),
    (
        "zeros dtype",
        ValueError,
        r"qzeros: got torch\.float32, expected torch\.int32",
        gptq(qzeros=torch.zeros(G, N // 8)),
    ),
    ("zeros missing", ValueError, r"qzeros: missing .*with_zeros=True", gptq(qzeros=None)),
    (
        "zeros not wanted",
        ValueError,
        r"qzeros: with_zeros=False .*int4 to be 8, got 1 to 1",
        gptq(arguments={"W_dtype": "int4"}),
    ),
    (
        "zeros not wanted, v2",
        ValueError,
        r"qzeros: with_zeros=False .*int4 to be 8, got 0 to 0",
        gptq(v2=True, arguments={"W_dtype": "int4"}),
    ),
    (
        "signed quantized zeros",
        ValueError,
        r"zeros_mode: 'quantized' .*unsigned W_dtype, got 'int4'",
        gptq(arguments={"W_dtype": "int4", "with_zeros": True, "zeros_mode": "quantized"}),
    ),
    ("g_idx length", ValueError, r"g_idx: got 63 entries, expected K=64", gptq(g_idx=int32(K - 1))),
    ("g_idx groups", ValueError, r"g_idx: expected 2 groups of 32 values", gptq(g_idx=int32(K))),
    (
        "g_idx range",
        ValueError,
        r"g_idx: expected 2 groups of 32 values",
        gptq(g_idx=torch.arange(K)),
    ),
    (
        "g_idx negative",
        ValueError,
        r"g_idx: got -1, expected groups 0\.\.1",
        gptq(g_idx=torch.arange(K) // 32 - 1),
    ),
    (
        "bias not wanted",
        ValueError,
        r"bias: the GPTQ layer has one",
        gptq(bias=torch.ones(N, dtype=HALF)),
    ),
    (
        "bias missing",
        ValueError,
        r"bias: missing",
        gptq(arguments={"with_zeros": True, "bias": True}),
    ),
    (
        "nf4 Linear",
        ValueError,
        r"W_dtype: a GPTQ layer needs .*'nf4'",
        gptq(arguments={"W_dtype": "nf4"}),
    ),
    (
        "uint1 Linear",
        ValueError,
        r"W_dtype: a GPTQ layer needs .*'uint1'",
        gptq(arguments={"W_dtype": "uint1"}),
    ),
    (
        "Linear without scales",
        ValueError,
        r"W_dtype: .*with_scaling=False",
        gptq(arguments={"with_scaling": False, "group_size": -1}),
    ),
    (
        "no qweight",
        AttributeError,
        r"qweight",
        lambda: linear().repack_from_gptq(SimpleNamespace()),
    ),
]

X = torch.ones(N, K)
CODES = np.ones((2, 8), dtype=np.int8)
HELPERS = [
    (
        "quantize list",
        TypeError,
        r"weight: got list, expected a tensor",
        lambda: quantize_weight([[1.0]], "int4"),
    ),
    (
        "quantize integers",
        TypeError,
        r"weight: got torch\.int64, expected a floating dtype",
        lambda: quantize_weight(X.long(), "int4"),
    ),
    (
        "quantize NaN",
        ValueError,
        r"weight: expected finite",
        lambda: quantize_weight(torch.full((N, K), float("nan")), "int4"),
    ),
    (
        "quantize inf",
        ValueError,
        r"weight: expected finite",
        lambda: quantize_weight(torch.full((N, K), float("inf")), "nf4"),
    ),
    (
        "quantize rank",
        ValueError,
        r"weight: got shape \(3072,\), expected \(N, K\)",
        lambda: quantize_weight(X.flatten(), "int4"),
    ),
    (
        "quantize dense",
        ValueError,
        r"W_dtype: 'float16' is not quantised",
        lambda: quantize_weight(X, "float16"),
    ),
    (
        "quantize unknown",
        ValueError,
        r"W_dtype: .*'int5'; known",
        lambda: quantize_weight(X, "int5"),
    ),
    (
        "quantize zeros",
        ValueError,
        r"with_zeros: .*W_dtype is 'nf4'",
        lambda: quantize_weight(X, "nf4", with_zeros=True),
    ),
    (
        "quantize groups",
        ValueError,
        r"group_size: 48 does not divide K=64",
        lambda: quantize_weight(X, "int4", 48),
    ),
    (
        "quantize no group",
        ValueError,
        r"group_size: 0 does not divide K=64",
        lambda: quantize_weight(X, "int4", 0),
    ),
    (
        "quantize fixed groups",
        ValueError,
        r"group_size: mxfp4 has groups of 32, got 64",
        lambda: quantize_weight(X, "mxfp4", 64),
    ),
    (
        "from_float format",
        ValueError,
        r"W_dtype: .*'int5'; known",
        lambda: Linear.from_float(torch.nn.Linear(K, N), "int5"),
    ),
    (
        "from_float NaN",
        ValueError,
        r"weight: expected finite",
        lambda: Linear.from_float(
            SimpleNamespace(weight=X / 0 * 0, bias=None, in_features=K, out_features=N), "int4"
        ),
    ),
    (
        "from_float dtype",
        ValueError,
        r"A_dtype: got 'torch\.float64', expected",
        lambda: Linear.from_float(torch.nn.Linear(K, N).double(), "int4"),
    ),
    (
        "gen_quant4 groups",
        ValueError,
        r"groupsize: 48 does not divide k=64",
        lambda: gen_quant4(K, N, 48),
    ),
    (
        "gen_quant4 negative",
        ValueError,
        r"groupsize: -2 does not divide k=64",
        lambda: gen_quant4(K, N, -2),
    ),
    (
        "compress bits",
        ValueError,
        r"source_bits: got 0, expected 1 to 8",
        lambda: general_compress(CODES, 0),
    ),
    (
        "compress many bits",
        ValueError,
        r"source_bits: got 9, expected 1 to 8",
        lambda: general_compress(CODES, 9),
    ),
    (
        "compress fractions",
        TypeError,
        r"got torch\.float64, expected codes",
        lambda: general_compress(CODES * 0.5),
    ),
    (
        "compress ragged",
        ValueError,
        r"8 codes of 4 bits does not fill whole int64 elements",
        lambda: general_compress(CODES, 4, np.int64),
    ),
    (
        "interleave type",
        ValueError,
        r"target_dtype: got 'bfloat16', expected 'float16' or 'int8'",
        lambda: interleave_weight(CODES, 4, "bfloat16"),
    ),
    (
        "interleave bits",
        ValueError,
        r"bits: .*1, 2 and 4 bits, got 3",
        lambda: interleave_weight(CODES, 3),
    ),
    (
        "interleave length",
        ValueError,
        r"K: .*multiple of 8, got 6",
        lambda: interleave_weight(CODES[:, :3], 4),
    ),
]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [pytest.param(*row[1:], id=row[0]) for row in LAYERS],
)
def test_bad_gptq_layer_is_refused_by_name(error, message, call):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [pytest.param(*row[1:], id=row[0]) for row in HELPERS],
)
def test_bad_argument_of_a_helper_is_refused_by_name(error, message, call):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_unchanged_gptq_layer_loads():
    gptq()()
