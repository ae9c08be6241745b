"""MatmulConfig: the public order of its fields, defaults, equality, keys and the valid pairs."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from bitblas import MatmulConfig, MatmulConfigWithSplitK
from bitblas.base import OptimizeStrategy, TransformKind
from bitblas.formats import FORMATS

DEFAULT_M = (1, 16, 32, 64, 128, 256, 512, 1024)
ORDER_AND_DEFAULTS = {
    "M": DEFAULT_M,
    "N": 32,
    "K": 64,
    "A_dtype": "float16",
    "W_dtype": "float16",
    "out_dtype": "float16",
    "accum_dtype": "float16",
    "layout": "nt",
    "with_bias": False,
    "group_size": -1,
    "with_scaling": False,
    "with_zeros": False,
    "zeros_mode": "original",
    "storage_dtype": "int8",
    "fast_decoding": False,
    "propagate_a": TransformKind.NonTransform,
    "propagate_b": TransformKind.NonTransform,
    "optimize_stratety": OptimizeStrategy.SingleBatchDecodeOnly,
}
FULL = {
    "M": [16, 1, 256],
    "N": 96,
    "K": 128,
    "A_dtype": "bfloat16",
    "W_dtype": "uint4",
    "out_dtype": "float32",
    "accum_dtype": "float32",
    "layout": "tn",
    "with_bias": True,
    "group_size": 32,
    "with_scaling": True,
    "with_zeros": True,
    "zeros_mode": "quantized",
    "storage_dtype": "int32",
    "fast_decoding": True,
    "propagate_a": 1,
    "propagate_b": 3,
    "optimize_stratety": OptimizeStrategy.ContiguousBatching,
}

FLOATS = ("float16", "bfloat16", "float32")
FP8 = ("e4m3_float8", "e5m2_float8")
INTEGERS = ("uint1", "uint2", "uint3", "uint4", "uint8", "int1", "int2", "int3", "int4", "int8")
FP4 = ("fp4_e2m1", "mxfp4", "nvfp4")
A_DTYPES = (*FLOATS, "int8", *FP8, "int4")
W_DTYPES = (*INTEGERS, "nf4", *FP4, *FP8, *FLOATS)
VALID_PAIRS = {
    *((a, w) for a in FLOATS for w in W_DTYPES),
    *(("int8", w) for w in INTEGERS),
    *((a, w) for a in FP8 for w in (*FP8, "int4", "int2", *FP4)),
    ("int4", "int4"),
    ("int4", "int2"),
}
PAIRS = [(a, w) for a in A_DTYPES for w in W_DTYPES]


def test_fields_in_public_order():
    assert [f.name for f in dataclasses.fields(MatmulConfig)] == list(ORDER_AND_DEFAULTS)


def test_split_k_appends_its_field():
    assert [f.name for f in dataclasses.fields(MatmulConfigWithSplitK)] == [
        *ORDER_AND_DEFAULTS,
        "k_split",
    ]


def test_positional_construction():
    assert MatmulConfig(*FULL.values()) == MatmulConfig(**FULL)


@pytest.mark.parametrize("field", ORDER_AND_DEFAULTS)
def test_default(field):
    assert getattr(MatmulConfig(N=32, K=64), field) == ORDER_AND_DEFAULTS[field]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("M", DEFAULT_M),
        ("with_bias", False),
        ("with_scaling", False),
        ("with_zeros", False),
        ("group_size", -1),
        ("zeros_mode", "original"),
        ("fast_decoding", True),
        ("propagate_a", TransformKind.NonTransform),
        ("propagate_b", TransformKind.NonTransform),
    ],
)
def test_none_means(field, value):
    config = MatmulConfig(**{"N": 32, "K": 64, "W_dtype": "int4", field: None})
    assert getattr(config, field) == value
    assert type(getattr(config, field)) is type(value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (1, 1),
        (np.int64(7), 7),
        ([1], (1,)),
        ((16, 1), (1, 16)),
        ([256, 1, 16], (1, 16, 256)),
        ([16, 16, 1], (1, 16)),
        (None, DEFAULT_M),
    ],
)
def test_m_is_kept_as(given, kept):
    assert MatmulConfig(given, 32, 64).M == kept


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"group_size": -1}, {"group_size": 64}),
        ({"group_size": None}, {"group_size": 64}),
        ({"M": [1, 16]}, {"M": (16, 1)}),
        ({"M": None}, {"M": list(reversed(DEFAULT_M))}),
        ({"with_bias": None}, {"with_bias": False}),
        ({"with_bias": 1}, {"with_bias": True}),
        ({"zeros_mode": None}, {"zeros_mode": "original"}),
        ({"fast_decoding": None}, {"fast_decoding": True}),
        ({"propagate_b": True}, {"propagate_b": TransformKind.InterWarpTransform}),
        ({"propagate_a": False}, {"propagate_a": None}),
        ({"optimize_stratety": 1}, {"optimize_stratety": OptimizeStrategy.ContigousBatching}),
        ({"group_size": np.int64(32)}, {"group_size": 32}),
        ({"N": np.int32(32)}, {"N": 32}),
        ({"W_dtype": "mxfp4"}, {"W_dtype": "mxfp4", "group_size": 32, "with_scaling": True}),
        ({"W_dtype": "nvfp4"}, {"W_dtype": "nvfp4", "group_size": 16}),
    ],
)
def test_same_meaning_is_equal_and_hashes_alike(one, other):
    base = {"M": 1, "N": 32, "K": 64, "W_dtype": "int4"}
    a, b = MatmulConfig(**{**base, **one}), MatmulConfig(**{**base, **other})
    assert a == b
    assert hash(a) == hash(b)
    assert a.key == b.key


@pytest.mark.parametrize("field", FULL)
def test_configs_that_differ_in_a_field_are_unequal(field):
    config = MatmulConfig(**FULL)
    changes = {
        "M": 1,
        "N": 48,
        "K": 256,
        "A_dtype": "float16",
        "W_dtype": "uint2",
        "out_dtype": "float16",
        "accum_dtype": "int32",
        "layout": "nt",
        "with_bias": False,
        "group_size": 64,
        "with_scaling": False,
        "with_zeros": False,
        "zeros_mode": "rescale",
        "storage_dtype": "int8",
        "fast_decoding": False,
        "propagate_a": 0,
        "propagate_b": 0,
        "optimize_stratety": 0,
    }
    changed = dataclasses.replace(config, **{field: changes[field]})
    assert changed != config
    assert changed.key != config.key


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_fixed_group_is_no_whole_row(name):
    """One group of a format with a fixed group size stays that, so that K is free to differ."""
    config = MatmulConfig(1, 16, FORMATS[name].fixed_group_size, W_dtype=name)
    assert config.group_size == FORMATS[name].fixed_group_size
    assert config.num_groups == 1


@pytest.mark.parametrize(("A_dtype", "W_dtype"), PAIRS)
def test_pair_is_accepted_or_refused(A_dtype, W_dtype):
    def make():
        return MatmulConfig(1, 32, 64, A_dtype, W_dtype, "float32")

    if (A_dtype, W_dtype) in VALID_PAIRS:
        config = make()
        assert (config.A_dtype, config.W_dtype) == (A_dtype, W_dtype)
    else:
        with pytest.raises(ValueError, match=rf"W_dtype: '{W_dtype}' .* A_dtype '{A_dtype}'"):
            make()


def test_every_registered_format_is_in_the_table_of_pairs():
    assert set(FORMATS) == set(W_DTYPES)


@pytest.mark.parametrize("out_dtype", [*FLOATS, "int32", "int8"])
@pytest.mark.parametrize("A_dtype", A_DTYPES)
def test_out_dtype_is_accepted_or_refused(A_dtype, out_dtype):
    if out_dtype in FLOATS or A_dtype in ("int8", "int4"):
        config = MatmulConfig(1, 32, 64, A_dtype, "int4", out_dtype)
        assert config.out_dtype == out_dtype
    else:
        with pytest.raises(ValueError, match=rf"out_dtype: '{out_dtype}' .*'{A_dtype}'"):
            MatmulConfig(1, 32, 64, A_dtype, "int4", out_dtype)


@pytest.mark.parametrize("layout", ["nt", "nn", "tn", "tt"])
def test_every_layout_is_accepted(layout):
    assert MatmulConfig(1, 32, 64, W_dtype="int4", layout=layout).layout == layout


@pytest.mark.parametrize("accum_dtype", [*FLOATS, "int32"])
def test_every_accum_dtype_is_accepted(accum_dtype):
    assert MatmulConfig(1, 32, 64, accum_dtype=accum_dtype).accum_dtype == accum_dtype


@pytest.mark.parametrize(
    ("A_dtype", "W_dtype"),  # BitBLAS 0.1 had no 3-bit weights
    [(a, w) for a, w in PAIRS if (a, w) in VALID_PAIRS and a not in FP8 and "int3" not in w],
)
def test_default_of_fast_decoding(A_dtype, W_dtype):
    sub_byte_integer = W_dtype in INTEGERS and not W_dtype.endswith("8")
    four_bit_with_int8 = A_dtype == "int8" and W_dtype in ("int4", "uint4")
    expected = (
        sub_byte_integer and W_dtype != A_dtype and A_dtype != "bfloat16" and not four_bit_with_int8
    )
    config = MatmulConfig(1, 32, 64, A_dtype, W_dtype, "float32")
    assert config.fast_decoding is expected


@pytest.mark.parametrize("given", [True, False])
def test_fast_decoding_that_is_given_stays(given):
    assert MatmulConfig(1, 32, 64, W_dtype="uint4", fast_decoding=given).fast_decoding is given


@pytest.mark.parametrize("fields", [{"N": 32, "K": 64}, FULL, {**FULL, "group_size": 128}])
def test_key_round_trip(fields):
    config = MatmulConfig(**fields)
    assert MatmulConfig.from_key(config.key) == config


@pytest.mark.parametrize("fields", [{"N": 32, "K": 64}, FULL], ids=["defaults", "full"])
@pytest.mark.parametrize(
    "duplicate",
    [lambda c: pickle.loads(pickle.dumps(c)), copy.copy, copy.deepcopy, dataclasses.replace],
    ids=["pickle", "copy", "deepcopy", "replace"],
)
def test_duplicate_is_equal(fields, duplicate):
    config = MatmulConfig(**fields)
    hash(config), config.key, config.format, config.num_groups  # fill what is cached
    other = duplicate(config)
    assert other == config
    assert hash(other) == hash(config)
    assert other.key == config.key


def test_replace_recomputes_what_follows_from_the_fields():
    config = MatmulConfig(1, 32, 64, W_dtype="int4", group_size=16)
    assert (config.num_groups, config.bits, config.zeros_shape) == (4, 4, (32, 4))
    other = dataclasses.replace(config, W_dtype="int2", group_size=32, N=48)
    assert (other.num_groups, other.bits, other.zeros_shape) == (2, 2, (48, 2))


@pytest.mark.parametrize("field", ORDER_AND_DEFAULTS)
def test_fields_cannot_be_assigned(field):
    config = MatmulConfig(1, 32, 64)
    with pytest.raises(dataclasses.FrozenInstanceError, match=field):
        setattr(config, field, None)


def test_list_given_for_m_is_copied():
    rows = [1, 16]
    config = MatmulConfig(rows, 32, 64)
    rows.append(32)
    assert config.M == (1, 16)


@pytest.mark.parametrize("strategy", OptimizeStrategy)
def test_correctly_spelt_alias_of_optimize_stratety(strategy):
    config = MatmulConfig(1, 32, 64, optimize_stratety=strategy)
    assert config.optimize_strategy is config.optimize_stratety is strategy


def test_split_k_config_is_a_matmul_config():
    config = MatmulConfigWithSplitK(1, 32, 64, W_dtype="int4", k_split=4)
    assert isinstance(config, MatmulConfig)
    assert config.k_split == 4
    assert config != dataclasses.replace(config, k_split=2)


@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"zeros_mode": "original"}, (36, 2)),
        ({"zeros_mode": "rescale"}, (36, 2)),
        ({"zeros_mode": "quantized"}, (2, 18)),
        ({"zeros_mode": "quantized", "W_dtype": "uint3"}, (2, 14)),
        ({"zeros_mode": "quantized", "W_dtype": "uint1", "group_size": -1}, (1, 5)),
    ],
)
def test_shape_of_zeros(fields, shape):
    base = {"M": 1, "N": 36, "K": 64, "W_dtype": "uint4", "group_size": 32}
    assert MatmulConfig(**{**base, **fields}, with_zeros=True).zeros_shape == shape
