"""What MatmulConfig, Matmul's constructor and the packing operators refuse, and how they say it."""

import dataclasses

import pytest
import torch

from bitblas import Matmul, MatmulConfig, MatmulConfigWithSplitK, MatmulWithSplitK, testing
from bitblas.ops import (
    LadderPermutate,
    LadderPermutateConfig,
    LOP3Permutate,
    LOP3PermutateConfig,
    QuantCompress,
    QuantCompressConfig,
)
from bitblas.utils import auto_detect_nvidia_target


def config(**fields):
    return lambda: MatmulConfig(**{"M": 1, "N": 32, "K": 64, **fields})


def matmul(**arguments):
    return lambda: Matmul(**{"config": MatmulConfig(1, 32, 64), "target": "cpu", **arguments})


FIELDS = [  # (id, exception, regex of the message, the call)
    ("no N", ValueError, r"N: required", config(N=None)),
    ("no K", ValueError, r"K: required", config(K=None)),
    ("nothing given", ValueError, r"N: required", MatmulConfig),
    ("N zero", ValueError, r"N: got 0, expected a positive", config(N=0)),
    ("N negative", ValueError, r"N: got -16, expected a positive", config(N=-16)),
    ("K zero", ValueError, r"K: got 0, expected a positive", config(K=0)),
    ("N fraction", TypeError, r"N: got 32\.0, expected a positive integer", config(N=32.0)),
    ("N string", TypeError, r"N: got '32', expected a positive integer", config(N="32")),
    ("K list", TypeError, r"K: got \[64\], expected a positive integer", config(K=[64])),
    ("K bool", TypeError, r"K: got True, expected a positive integer", config(K=True)),
    ("M zero", ValueError, r"M: got 0, expected a positive", config(M=0)),
    ("M negative", ValueError, r"M: got -1, expected a positive", config(M=[16, -1])),
    ("M empty", ValueError, r"M: got an empty list; give positive", config(M=[])),
    ("M fraction", TypeError, r"M: got 1\.5, expected a positive integer", config(M=[1.5])),
    ("M string", TypeError, r"M: got '16', expected a positive integer", config(M="16")),
    ("M dict", TypeError, r"M: got \{'m': 16\}, expected", config(M={"m": 16})),
    ("A_dtype unknown", ValueError, r"A_dtype: got 'fp16', .*float16", config(A_dtype="fp16")),
    ("A_dtype None", ValueError, r"A_dtype: got None, .*float16", config(A_dtype=None)),
    (
        "A_dtype of torch",
        ValueError,
        r"A_dtype: got torch\.float16, .*float16",
        config(A_dtype=torch.float16),
    ),
    ("W_dtype unknown", ValueError, r"W_dtype: .*'int5'; known: .*int4", config(W_dtype="int5")),
    ("W_dtype None", ValueError, r"W_dtype: .*None; known: .*int4", config(W_dtype=None)),
    ("W_dtype list", ValueError, r"W_dtype: .*\['int4'\]; known:", config(W_dtype=["int4"])),
    ("out unknown", ValueError, r"out_dtype: got 'int16', .*int32", config(out_dtype="int16")),
    ("out None", ValueError, r"out_dtype: got None, .*float16", config(out_dtype=None)),
    ("accum unknown", ValueError, r"accum_dtype: got 'int8', .*int32", config(accum_dtype="int8")),
    ("layout unknown", ValueError, r"layout: got 'NT', .*nt, nn, tn, tt", config(layout="NT")),
    ("layout None", ValueError, r"layout: got None, .*nt, nn, tn, tt", config(layout=None)),
    (
        "zeros_mode unknown",
        ValueError,
        r"zeros_mode: got 'none', .*original, rescale, quantized",
        config(W_dtype="uint4", zeros_mode="none"),
    ),
    (
        "storage unknown",
        ValueError,
        r"storage_dtype: got 'int64', .*int8",
        config(storage_dtype="int64"),
    ),
    ("bias flag", TypeError, r"with_bias: got 'yes', expected True", config(with_bias="yes")),
    ("scaling flag", TypeError, r"with_scaling: got 2, expected True", config(with_scaling=2)),
    (
        "zeros flag is a tensor",
        TypeError,
        r"with_zeros: got tensor\(.*expected True or False",
        config(with_zeros=torch.ones(2)),
    ),
    (
        "fast_decoding",
        TypeError,
        r"fast_decoding: got 'on', expected True, False or None",
        config(fast_decoding="on"),
    ),
    ("propagate_a", ValueError, r"propagate_a: got 4, .*0\.\.3", config(propagate_a=4)),
    ("propagate_b", ValueError, r"propagate_b: got 'x', .*0\.\.3", config(propagate_b="x")),
    (
        "optimize_stratety",
        ValueError,
        r"optimize_stratety: got 9, expected an OptimizeStrategy",
        config(optimize_stratety=9),
    ),
    ("unknown field", TypeError, r"group_sise", config(group_sise=32)),
]

GROUPS = [
    ("does not divide", ValueError, r"group_size: 48 .*K=64", config(group_size=48)),
    ("larger than K", ValueError, r"group_size: 128 .*K=64", config(group_size=128)),
    ("zero", ValueError, r"group_size: got 0, .*divisor of K=64", config(group_size=0)),
    ("negative", ValueError, r"group_size: got -2, .*divisor of K=64", config(group_size=-2)),
    ("fraction", ValueError, r"group_size: got 32\.0, .*K=64", config(group_size=32.0)),
    ("string", ValueError, r"group_size: got '32', .*K=64", config(group_size="32")),
    ("bool", ValueError, r"group_size: got True, .*K=64", config(group_size=True)),
    (
        "mxfp4",
        ValueError,
        r"group_size: mxfp4 has groups of 32, got 16",
        config(W_dtype="mxfp4", group_size=16),
    ),
    (
        "nvfp4",
        ValueError,
        r"group_size: nvfp4 has groups of 16, got 32",
        config(W_dtype="nvfp4", group_size=32),
    ),
    ("mxfp4 ragged K", ValueError, r"group_size: 32 .*K=48", config(W_dtype="mxfp4", K=48)),
]

COMBINATIONS = [
    (
        "float W with int8 A",
        ValueError,
        r"W_dtype: 'float16' .* A_dtype 'int8'; valid: .*uint4",
        config(A_dtype="int8"),
    ),
    (
        "uint4 with fp8 A",
        ValueError,
        r"W_dtype: 'uint4' .* A_dtype 'e4m3_float8'; valid: .*int4",
        config(A_dtype="e4m3_float8", W_dtype="uint4"),
    ),
    (
        "int8 out of float A",
        ValueError,
        r"out_dtype: 'int8' .*A_dtype is 'float16'; valid: float16",
        config(W_dtype="int4", out_dtype="int8"),
    ),
    (
        "int32 out of fp8 A",
        ValueError,
        r"out_dtype: 'int32' .*A_dtype is 'e5m2_float8'; valid: float16",
        config(A_dtype="e5m2_float8", W_dtype="e5m2_float8", out_dtype="int32"),
    ),
    *(
        (
            f"zeros with {name}",
            ValueError,
            rf"with_zeros: .*integer formats only, W_dtype is '{name}'",
            config(W_dtype=name, with_scaling=True, with_zeros=True),
        )
        for name in ("nf4", "fp4_e2m1", "mxfp4", "nvfp4", "e4m3_float8", "e5m2_float8", "float16")
    ),
    (
        "int4 A, odd K",
        ValueError,
        r"K: int4 .*even.*got K=63",
        config(A_dtype="int4", W_dtype="int4", out_dtype="int32", K=63),
    ),
    (
        "int4 A, transposed",
        ValueError,
        r"int4 .*'nt' or 'nn'; .*layout 'tn'",
        config(A_dtype="int4", W_dtype="int4", out_dtype="int32", layout="tn"),
    ),
]

OPERATORS = [
    ("config type", TypeError, r"config: got dict, expected a MatmulConfig", matmul(config={})),
    (
        "split-K config",
        TypeError,
        r"config: got MatmulConfig, expected a MatmulConfigWithSplitK",
        lambda: MatmulWithSplitK(MatmulConfig(1, 32, 64), target="cpu"),
    ),
    (
        "k_split zero",
        ValueError,
        r"k_split: got 0, expected a positive",
        lambda: MatmulConfigWithSplitK(1, 32, 64, k_split=0),
    ),
    (
        "backend",
        ValueError,
        r"backend: got 'cutlass', expected 'tir' or",
        matmul(backend="cutlass"),
    ),
    ("target", ValueError, r"target: got 'rocm', expected None, 'cpu'", matmul(target="rocm")),
    ("target number", ValueError, r"target: got '90', expected None, 'cpu'", matmul(target=90)),
    ("target empty", ValueError, r"target: got '', expected None, 'cpu'", matmul(target="")),
    (
        "source target",
        ValueError,
        r"target: got 'rocm', expected",
        lambda: Matmul(MatmulConfig(1, 32, 64, W_dtype="int4"), target="cpu").get_source("rocm"),
    ),
    (
        "topk",
        ValueError,
        r"topk: got 0, expected a positive",
        lambda: matmul()().hardware_aware_finetune(topk=0),
    ),
    (
        "finetune target",
        ValueError,
        r"target: got 'tpu', expected",
        lambda: matmul()().hardware_aware_finetune(target="tpu"),
    ),
    (
        "latency rows",
        ValueError,
        r"m: got -1, expected a positive",
        lambda: matmul()().profile_latency({"m": -1}),
    ),
    (
        "attribute",
        AttributeError,
        r"'Matmul' object has no attribute 'fuse'",
        lambda: matmul()().fuse,
    ),
    (
        "replaced with a bad value",
        ValueError,
        r"group_size: 48 does not divide K=64",
        lambda: dataclasses.replace(MatmulConfig(1, 32, 64), group_size=48),
    ),
    (
        "compress bits",
        ValueError,
        r"dequantize_bits: got 9, expected 1 to 8",
        lambda: QuantCompressConfig(2, 8, dequantize_bits=9),
    ),
    (
        "compress storage",
        ValueError,
        r"storage_dtype: got 'float16', expected int8",
        lambda: QuantCompressConfig(2, 8, storage_dtype="float16"),
    ),
    (
        "compress shape",
        ValueError,
        r"weight: got shape \(2, 16\), expected \(2, 8\)",
        lambda: QuantCompress(QuantCompressConfig(2, 8), target="cpu")(torch.ones(2, 16).char()),
    ),
    (
        "compress fractions",
        TypeError,
        r"weight: got torch\.float32, expected codes",
        lambda: QuantCompress(QuantCompressConfig(2, 8), target="cpu")(torch.ones(2, 8)),
    ),
    (
        "compress list",
        TypeError,
        r"weight: got list, expected a tensor",
        lambda: QuantCompress(QuantCompressConfig(1, 2), target="cpu")([[1, 2]]),
    ),
    (
        "interleave bits",
        ValueError,
        r"dequantize_bits: got 3, expected 1, 2 or 4",
        lambda: LOP3PermutateConfig(2, 8, dequantize_bits=3),
    ),
    (
        "interleave datatype",
        ValueError,
        r"datatype: got 'float32', expected float16 or int8",
        lambda: LOP3PermutateConfig(2, 8, datatype="float32"),
    ),
    (
        "interleave list",
        TypeError,
        r"weight: got list, expected a tensor",
        lambda: LOP3Permutate(LOP3PermutateConfig(1, 8), target="cpu")([[1, 2, 3, 4]]),
    ),
    (
        "interleave shape",
        ValueError,
        r"weight: got shape \(2, 8\), expected \(2, 4\)",
        lambda: LOP3Permutate(LOP3PermutateConfig(2, 8), target="cpu")(torch.ones(2, 8).char()),
    ),
    (
        "ladder kind",
        ValueError,
        r"transform_kind: got 3, expected 0 or 1",
        lambda: LadderPermutateConfig(16, 16, transform_kind=3),
    ),
    (
        "ladder sizes",
        ValueError,
        r"M, N: got 16, 24, expected multiples of 16 and 16",
        lambda: LadderPermutateConfig(16, 24),
    ),
    (
        "ladder datatype",
        ValueError,
        r"datatype: got 'half', expected one of float16",
        lambda: LadderPermutateConfig(16, 32, datatype="half"),
    ),
    (
        "ladder shape",
        ValueError,
        r"weight: got shape \(32, 16\), expected \(16, 32\)",
        lambda: LadderPermutate(LadderPermutateConfig(16, 32), target="cpu")(torch.ones(32, 16)),
    ),
    (
        "close shapes",
        AssertionError,
        r"shapes differ: \(2,\) and \(1, 2\)",
        lambda: testing.torch_assert_close(torch.ones(2), torch.ones(1, 2)),
    ),
]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        pytest.param(*row[1:], id=f"{table} {row[0]}")
        for table, rows in (
            ("field", FIELDS),
            ("group_size", GROUPS),
            ("combination", COMBINATIONS),
            ("operator", OPERATORS),
        )
        for row in rows
    ],
)
def test_bad_config_is_refused_by_name(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_negative_gpu_is_refused():
    with pytest.raises(ValueError, match="gpu_id: got -1, expected 0 or more"):
        auto_detect_nvidia_target(-1)


def test_gpu_that_the_process_does_not_see_means_the_first():
    assert auto_detect_nvidia_target(999) == auto_detect_nvidia_target()
