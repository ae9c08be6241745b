"""What a Linear is made of survives checkpoints, copies and construction on the meta device."""

import copy
import io
import pickle

import pytest
import torch
from calls import check
from conftest import DEVICE
from layers import FULL, KINDS, empty_like, load, make_layer
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import nn

import bitblas
from bitblas import layouts


def through_torch_save(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state):
    return safetensors_load(safetensors_save(state))


WAYS = {"torch": through_torch_save, "safetensors": through_safetensors}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_into_a_fresh_module(seed, kind, way):
    layer, problem = make_layer(seed, **KINDS[kind])
    fresh = empty_like(layer)
    assert not torch.equal(fresh(problem.A), layer(problem.A))
    fresh.load_state_dict(way(layer.state_dict()))
    assert torch.equal(fresh(problem.A), layer(problem.A))
    check(problem, fresh(problem.A))


@every_way
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_assigned_to_a_meta_module(seed, kind, way):
    layer, problem = make_layer(seed, **KINDS[kind])
    fresh = empty_like(layer, "meta")
    fresh.load_state_dict(way(layer.state_dict()), assign=True)
    fresh.to(DEVICE)
    assert all(buffer.device.type == DEVICE for buffer in fresh.buffers())
    assert torch.equal(fresh(problem.A), layer(problem.A))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_module_made_real_then_loaded(seed, kind):
    layer, problem = make_layer(seed, **KINDS[kind])
    fresh = empty_like(layer, "meta").to_empty(device=DEVICE)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(problem.A), layer(problem.A))


def test_state_dict_of_a_whole_model(seed):
    layer, problem = make_layer(seed, **FULL)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(40, 4, device=DEVICE).half())
    fresh = nn.Sequential(empty_like(layer), nn.ReLU(), nn.Linear(40, 4, device=DEVICE).half())
    fresh.load_state_dict(through_torch_save(model.state_dict()))
    assert torch.equal(fresh(problem.A), model(problem.A))


def test_checkpoint_holds_plain_rows(seed):
    """The layout in a file is the one of every device and of other tools."""
    layer, problem = make_layer(seed, W_dtype="int3")
    assert torch.equal(layer.state_dict()["qweight"], layouts.PLAIN.pack(problem.codes, 3))


@pytest.mark.parametrize("layout", ["ROW16", "FRAGMENT_16"])
def test_checkpoint_in_a_device_layout_loads(seed, layout):
    layer, problem = make_layer(seed)
    state = layer.state_dict()
    state["qweight"] = getattr(layouts, layout).pack(problem.codes, 4)
    fresh = empty_like(layer)
    fresh.load_state_dict(state)
    check(problem, fresh(problem.A))


def test_loading_leaves_the_given_state_alone(seed):
    layer, _ = make_layer(seed, **FULL)
    state = layer.state_dict()
    before = {name: x.clone() for name, x in state.items()}
    empty_like(layer).load_state_dict(state)
    assert state.keys() == before.keys()
    assert all(torch.equal(x, before[name]) for name, x in state.items())


def test_buffers_of_the_config_and_no_others():
    names = {"qweight", "scales", "zeros", "bias", "weight_format"}
    assert set(bitblas.Linear(96, 40, W_dtype="uint4", **FULL).state_dict()) == names
    assert set(bitblas.Linear(96, 40).state_dict()) == {"weight"}
    assert set(bitblas.Linear(96, 40, W_dtype="int4").state_dict()) == {"qweight", "weight_format"}


def test_missing_and_unexpected_keys_are_reported(seed):
    layer, _ = make_layer(seed, **FULL)
    state = layer.state_dict()
    del state["bias"]
    state["other"] = torch.zeros(1)
    result = empty_like(layer).load_state_dict(state, strict=False)
    assert result.missing_keys == ["bias"] and result.unexpected_keys == ["other"]
    with pytest.raises(RuntimeError, match="bias"):
        empty_like(layer).load_state_dict(state)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(W_dtype="int4"), "int4"),
        (dict(group_size=48), "group 48"),
        (dict(zeros_mode="rescale"), "zeros rescale"),
    ],
    ids=str,
)
def test_checkpoint_of_another_format_is_refused(seed, change, message):
    layer, _ = make_layer(seed, **FULL)
    other = bitblas.Linear(
        **{"in_features": 96, "out_features": 40, "W_dtype": "uint4"} | FULL | change
    )
    with pytest.raises(RuntimeError, match=message):
        other.load_state_dict(layer.state_dict())


def test_checkpoint_of_another_layout_version_says_how_to_convert(seed):
    layer, _ = make_layer(seed)
    state = layer.state_dict()
    text = bytes(state["weight_format"].tolist()).replace(b"layout 1", b"layout 9")
    state["weight_format"] = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="load_and_transform_weight"):
        empty_like(layer).load_state_dict(state)


def test_checkpoint_without_a_version_names_the_importer(seed):
    layer, _ = make_layer(seed)
    state = layer.state_dict()
    del state["weight_format"]
    with pytest.raises(RuntimeError, match="load_original_state_dict"):
        empty_like(layer).load_state_dict(state)


@pytest.mark.parametrize("W_dtype", ["mxfp4", "nvfp4"])
def test_encoded_scales_as_numbers_in_a_checkpoint(seed, W_dtype):
    layer, problem = make_layer(seed, W_dtype=W_dtype)
    state = layer.state_dict()
    assert state["scales"].dtype == torch.uint8
    state["scales"] = state["scales"].view(layer.config.scale_dtypes[0])
    fresh = empty_like(layer)
    fresh.load_state_dict(state)
    check(problem, fresh(problem.A))


# whatever defaults the caller has set


@pytest.mark.parametrize("kind", KINDS)
def test_loading_and_casting_under_the_meta_device(seed, kind):
    layer, problem = make_layer(seed, **KINDS[kind])
    loaded, restored = empty_like(layer), empty_like(layer)
    with torch.device("meta"):
        load(loaded, problem)
        restored.load_state_dict(layer.state_dict())
        out = [fresh(problem.A) for fresh in (loaded, restored)]
        restored.float().half()
    expected = layer(problem.A)
    assert torch.equal(out[0], expected) and torch.equal(out[1], expected)
    assert all(buffer.device.type == DEVICE for buffer in restored.buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_default_dtype_does_not_matter(seed, kind, dtype):
    layer, problem = make_layer(seed, **KINDS[kind])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        fresh = empty_like(layer)
        load(fresh, problem)
        out = fresh(problem.A)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(out, layer(problem.A))
    assert all(b.dtype == layer.get_buffer(name).dtype for name, b in fresh.named_buffers())


# copies

COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "torch.save": lambda layer: _load_module(layer),
}


def _load_module(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_copy_computes_the_same(seed, kind, way):
    layer, problem = make_layer(seed, **KINDS[kind])
    twin = COPIES[way](layer)
    assert twin is not layer and twin.config == layer.config
    assert torch.equal(twin(problem.A), layer(problem.A))


@pytest.mark.parametrize("way", COPIES)
def test_copy_shares_no_memory(seed, way):
    layer, problem = make_layer(seed, **FULL)
    before = layer(problem.A)
    for buffer in COPIES[way](layer).buffers():
        buffer.zero_()
    assert torch.equal(layer(problem.A), before)


def test_operator_can_be_pickled(seed):
    layer, problem = make_layer(seed)
    operator = pickle.loads(pickle.dumps(layer.bitblas_matmul))
    assert operator.config == layer.config and str(operator.target) == str(
        layer.bitblas_matmul.target
    )
    check(problem, operator(problem.A, layer.qweight))


# the original's checkpoints

ORIGINAL = [
    ("float16", "uint4", "original"),
    ("float16", "int4", "rescale"),
    ("float16", "uint2", "quantized"),
    ("float16", "int2", "original"),
    ("float16", "uint1", "original"),
    ("bfloat16", "uint4", "original"),
    ("int8", "int2", "original"),
    ("int8", "int4", "original"),
    ("float16", "int8", "original"),
    ("float16", "nf4", None),
    ("float16", "e4m3_float8", None),
]
INTERLEAVED = {("float16", 4), ("float16", 2), ("float16", 1), ("int8", 2), ("int8", 1)}


@pytest.mark.parametrize("A_dtype, W_dtype, zeros_mode", ORIGINAL)
def test_original_state_dict(seed, A_dtype, W_dtype, zeros_mode):
    fields = dict(FULL, with_zeros=zeros_mode is not None, zeros_mode=zeros_mode)
    out_dtype = "float32" if A_dtype == "int8" else A_dtype
    layer, problem = make_layer(
        seed, A_dtype=A_dtype, W_dtype=W_dtype, out_dtype=out_dtype, **fields
    )
    fast = problem.config.format.is_integer and (A_dtype, layer.bits) in INTERLEAVED
    activation_bits = 8 if A_dtype == "int8" else 16
    state = {
        "qweight": layouts.export_original(problem.codes, layer.bits, activation_bits, fast),
        "scales": problem.scale,
        "zeros": problem.zeros,
        "bias": problem.bias,
    }
    fresh = empty_like(layer)
    fresh.load_original_state_dict({name: x for name, x in state.items() if x is not None})
    check(problem, fresh(problem.A))


@pytest.mark.parametrize("fast", [True, False])
def test_original_state_dict_with_fast_decoding_given(seed, fast):
    fields = dict(W_dtype="uint4", with_scaling=True)
    layer, problem = make_layer(seed, **fields)
    fresh = bitblas.Linear(96, 40, fast_decoding=fast, **fields).to(DEVICE)
    packed = layouts.export_original(problem.codes, 4, 16, fast)
    fresh.load_original_state_dict({"qweight": packed, "scales": problem.scale})
    check(problem, fresh(problem.A))
