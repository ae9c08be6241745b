"""What Linear refuses to load: operands and checkpoints of another form."""

import pytest
import torch

from bitblas import Linear
from bitblas.layouts import LAYOUT_VERSION

N, K, G = 48, 64, 2
HALF = torch.float16


def linear(**arguments):
    defaults = {"W_dtype": "uint4", "with_scaling": True, "group_size": K // G}
    return Linear(K, N, **{**defaults, **arguments})


def tagged(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


# --- load_and_transform_weight and forward


def load(arguments, weight, *extras, **named):
    return lambda: linear(**arguments).load_and_transform_weight(weight, *extras, **named)


W = torch.zeros((N, K), dtype=torch.int8)
S = torch.ones((N, G), dtype=HALF)
LOADS = [  # (id, exception, regex of the message, the call)
    (
        "weight shape",
        ValueError,
        r"weight: got shape \(64, 48\), expected \(48, 64\)",
        load({}, W.T, S),
    ),
    (
        "weight range",
        ValueError,
        r"weight: uint4 .*0\.\.15, got values from -1",
        load({}, W - 1, S),
    ),
    ("weight list", TypeError, r"weight: got list, expected a tensor", load({}, [[1]], S)),
    ("scales missing", ValueError, r"scale: missing, .*\(48, 2\)", load({}, W)),
    (
        "scales shape",
        ValueError,
        r"scale: got shape \(2, 48\), expected \(48, 2\)",
        load({}, W, S.T),
    ),
    (
        "scales overflow",
        ValueError,
        r"scales: has values beyond the range of torch\.float16",
        load({}, W, S.float() * 1e6),
    ),
    ("scales list", TypeError, r"scales: got list, expected a tensor", load({}, W, [1.0])),
    (
        "scales integers",
        TypeError,
        r"scale: got torch\.int64, expected torch\.float16",
        load({}, W, S.long()),
    ),
    (
        "scales unexpected",
        ValueError,
        r"scale: .*with_scaling=False",
        load({"with_scaling": False}, W, S),
    ),
    ("zeros missing", ValueError, r"zeros: missing", load({"with_zeros": True}, W, S)),
    ("zeros unexpected", ValueError, r"zeros: .*with_zeros=False", load({}, W, S, S)),
    ("bias missing", ValueError, r"bias: missing", load({"bias": True}, W, S)),
    (
        "bias shape",
        ValueError,
        r"bias: got shape \(64,\), expected \(48,\)",
        load({"bias": True}, W, S, bias=torch.zeros(K)),
    ),
    (
        "bias unexpected",
        ValueError,
        r"bias: .*with_bias=False",
        load({}, W, S, bias=torch.zeros(N)),
    ),
    (
        "mxfp4 float scales",
        TypeError,
        r"scale: got torch\.float32, expected torch\.float8_e8m0fnu",
        load({"W_dtype": "mxfp4", "group_size": -1}, W, S.float()),
    ),
    (
        "nvfp4 global_scale",
        ValueError,
        r"global_scale: missing, nvfp4",
        load({"W_dtype": "nvfp4", "group_size": -1}, W, torch.ones(N, 4).to(torch.float8_e4m3fn)),
    ),
    ("in_features", ValueError, r"K: got 0, expected a positive", lambda: Linear(0, N)),
    ("out_features", ValueError, r"N: got -1, expected a positive", lambda: Linear(K, -1)),
    (
        "group size",
        ValueError,
        r"group_size: 48 does not divide K=64",
        lambda: linear(group_size=48),
    ),
    ("opt_M", ValueError, r"M: got 0, expected a positive", lambda: linear(opt_M=[0])),
    (
        "zeros_mode",
        ValueError,
        r"zeros_mode: got 'packed', .*original",
        lambda: linear(zeros_mode="packed"),
    ),
    (
        "input features",
        ValueError,
        r"A: got shape \(1, 48\), expected \(\.\.\., 64\)",
        lambda: linear()(torch.zeros((1, N), dtype=HALF)),
    ),
    (
        "input dtype",
        TypeError,
        r"A: got torch\.float32, expected torch\.float16",
        lambda: linear()(torch.zeros(1, K)),
    ),
    (
        "cast to float64",
        ValueError,
        r"A_dtype: got 'torch\.float64', expected",
        lambda: linear().double(),
    ),
]

# --- checkpoints


def checkpoint(change, **arguments):
    """Load a state_dict of linear() into linear(**arguments) after `change` edited it."""

    def run():
        state = linear().state_dict()
        change(state)
        linear(**arguments).load_state_dict(state)

    return run


def put(name, value):
    return checkpoint(
        lambda state: state.update({name: value(state) if callable(value) else value})
    )


def other(**arguments):
    return lambda: linear().load_state_dict(linear(**arguments).state_dict())


FORMAT = rf"the checkpoint holds 'bitblas layout {LAYOUT_VERSION}: "
THIS = r"this module is '.*uint4, group 32, zeros none'"
STATES = [
    ("int4", RuntimeError, rf"{FORMAT}int4, group 32.*{THIS}", other(W_dtype="int4")),
    ("uint2", RuntimeError, rf"{FORMAT}uint2, .*{THIS}", other(W_dtype="uint2")),
    ("group size", RuntimeError, rf"{FORMAT}uint4, group 16.*{THIS}", other(group_size=16)),
    ("zeros", RuntimeError, rf"{FORMAT}.*zeros original.*{THIS}", other(with_zeros=True)),
    (
        "version",
        RuntimeError,
        r"holds 'bitblas layout 99: .*this module is .*dequantise and call",
        put("weight_format", tagged("bitblas layout 99: uint4, group 32, zeros none")),
    ),
    (
        "empty tag",
        RuntimeError,
        rf"the checkpoint holds '', {THIS}",
        put("weight_format", tagged("")),
    ),
    (
        "binary tag",
        RuntimeError,
        rf"the checkpoint holds .*{THIS}",
        put("weight_format", torch.tensor([255, 254], dtype=torch.uint8)),
    ),
    (
        "float tag",
        RuntimeError,
        r"weight_format: got shape \(3,\) torch\.float32, expected uint8",
        put("weight_format", torch.zeros(3)),
    ),
    (
        "no tag",
        RuntimeError,
        r"no `weight_format`.*load_original_state_dict",
        checkpoint(lambda state: state.pop("weight_format")),
    ),
    (
        "no qweight",
        RuntimeError,
        r"Missing key.*qweight",
        checkpoint(lambda state: state.pop("qweight")),
    ),
    (
        "no scales",
        RuntimeError,
        r"Missing key.*scales",
        checkpoint(lambda state: state.pop("scales")),
    ),
    ("extra zeros", RuntimeError, r"Unexpected key.*zeros", put("zeros", S)),
    (
        "sizes",
        RuntimeError,
        r"qweight: got shape \(48, 16\).*N=48, K=64",
        put("qweight", torch.zeros((N, 16), dtype=torch.int8)),
    ),
    (
        "row count",
        RuntimeError,
        r"qweight: got shape \(16, 32\).*N=48, K=64",
        put("qweight", torch.zeros((16, 32), dtype=torch.int8)),
    ),
    (
        "rank",
        RuntimeError,
        r"dimensions, got shape \(1536,\)",
        put("qweight", lambda state: state["qweight"].flatten()),
    ),
    (
        "qweight dtype",
        RuntimeError,
        r"qweight: got torch\.int32, expected torch\.int8",
        put("qweight", lambda state: state["qweight"].int()),
    ),
    ("scales shape", RuntimeError, r"size mismatch for scales", put("scales", torch.zeros(N, 1))),
    (
        "perm repeats",
        RuntimeError,
        r"perm: not a permutation of 0\.\.63",
        put("perm", torch.zeros(K).long()),
    ),
    (
        "perm short",
        RuntimeError,
        r"perm: not a permutation of 0\.\.63",
        put("perm", torch.arange(K - 1)),
    ),
    (
        "perm range",
        RuntimeError,
        r"perm: not a permutation of 0\.\.63",
        put("perm", torch.arange(1, K + 1)),
    ),
    (
        "dense dtype of size",
        RuntimeError,
        r"size mismatch for weight",
        lambda: Linear(K, N).load_state_dict(Linear(K, 2 * N).state_dict()),
    ),
    (
        "mxfp4 scales",
        RuntimeError,
        r"scales: got torch\.float32, expected torch\.float8_e8m0fnu",
        lambda: Linear(K, N, W_dtype="mxfp4").load_state_dict(
            {**Linear(K, N, W_dtype="mxfp4").state_dict(), "scales": torch.ones(N, 2)}
        ),
    ),
    (
        "original qweight",
        ValueError,
        r"qweight: got shape \(48, 64\), expected \(48, 32\)",
        lambda: linear().load_original_state_dict({"qweight": W, "scales": S}),
    ),
]


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [pytest.param(*row[1:], id=row[0]) for row in LOADS],
)
def test_bad_operand_is_refused_by_name(error, message, call):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [pytest.param(*row[1:], id=row[0]) for row in STATES],
)
def test_bad_checkpoint_is_refused_by_name(error, message, call):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_unchanged_checkpoint_loads():
    checkpoint(lambda state: None)()


@pytest.mark.parametrize(
    "load",
    [
        lambda module: module.load_and_transform_weight(W + 1, S.T),
        lambda module: module.load_and_transform_weight(W + 16, S),
        lambda module: module.load_state_dict(linear(W_dtype="int4").state_dict()),
        lambda module: module.load_original_state_dict({"qweight": W, "scales": S}),
    ],
    ids=["scales", "weight", "checkpoint", "original checkpoint"],
)
def test_what_is_refused_leaves_the_module_as_it_was(load):
    module = linear()
    module.load_and_transform_weight(torch.randint(0, 16, (N, K)), S)
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError)):
        load(module)
    after = module.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], x) for name, x in before.items())
