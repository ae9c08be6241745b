"""Operators and modules: what construction costs, under which modes it works, and duplicates."""

import copy
import pickle

import pytest
import torch
from problems import draw, relative_error, tolerance
from torch.utils._python_dispatch import TorchDispatchMode

from bitblas import Linear, Matmul, MatmulConfig


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that are made off the meta device."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                self.bytes += x.numel() * x.element_size()
        return result


CONSTRUCTED = [
    {"W_dtype": "uint4", "with_scaling": True, "with_zeros": True, "group_size": 32},
    {"W_dtype": "nf4", "with_scaling": True},
    {"W_dtype": "nvfp4"},
    {"W_dtype": "float16", "with_bias": True},
]
constructed = pytest.mark.parametrize("fields", CONSTRUCTED, ids=lambda f: f["W_dtype"])


@constructed
def test_operator_construction_allocates_nothing(fields):
    with Allocations() as counted:
        Matmul(MatmulConfig(1, 4096, 4096, **fields))
    assert counted.bytes == 0


@constructed
def test_linear_construction_under_meta_allocates_nothing(fields):
    names = {k: v for k, v in fields.items() if k != "with_bias"}
    with Allocations() as counted, torch.device("meta"):
        module = Linear(4096, 4096, bias="with_bias" in fields, **names)
    assert counted.bytes == 0
    assert {x.device.type for x in module.buffers()} == {"meta"}


@constructed
def test_construction_in_inference_mode(fields, seed):
    config = MatmulConfig(1, 32, 64, **fields)
    drawn = draw(config, 2, seed)
    with torch.inference_mode():
        operator = Matmul(config, target="cpu")
        W = drawn.codes if config.is_dense else operator.weight_transform(drawn.codes)
        out = operator(drawn.A, W, **drawn.extras())
    assert relative_error(out, drawn.expected()) <= tolerance(config)


def test_module_on_the_meta_device_takes_a_checkpoint_by_assignment(seed):
    fields = {"W_dtype": "uint4", "with_scaling": True, "group_size": 32}
    module = Linear(64, 32, **fields)
    module.load_and_transform_weight(torch.randint(0, 16, (32, 64)), torch.rand(32, 2).half())
    with torch.device("meta"):
        other = Linear(64, 32, **fields)
    with pytest.raises(RuntimeError, match="meta device; use assign=True"):
        other.load_state_dict(module.state_dict())
    other.load_state_dict(module.state_dict(), assign=True)
    A = torch.randn(3, 64).half()
    assert torch.equal(other(A), module(A))


def test_checkpoint_loads_where_meta_is_the_default_device(seed):
    fields = {"W_dtype": "uint4", "with_scaling": True}
    module, other = Linear(64, 32, **fields), Linear(64, 32, **fields)
    module.load_and_transform_weight(torch.randint(0, 16, (32, 64)), torch.rand(32, 1).half())
    state, A = module.state_dict(), torch.randn(3, 64).half()
    with torch.device("meta"):
        other.load_state_dict(state)
    assert torch.equal(other(A), module(A))


DUPLICATES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}
duplicated = pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=DUPLICATES)


@constructed
@duplicated
def test_duplicated_operator_computes_the_same(fields, duplicate, seed):
    config = MatmulConfig(1, 32, 64, **fields)
    operator, drawn = Matmul(config, name="mine", target="cpu"), draw(config, 2, seed)
    other = duplicate(operator)
    assert (other.config, other.name, other.target) == (config, "mine", "cpu")
    assert other.target.arch == "cpu"
    W = drawn.codes if config.is_dense else other.weight_transform(drawn.codes)
    assert torch.equal(other(drawn.A, W, **drawn.extras()), operator(drawn.A, W, **drawn.extras()))


@duplicated
def test_duplicated_linear_computes_the_same_and_shares_nothing(duplicate):
    module = Linear(64, 32, bias=True, W_dtype="int4", with_scaling=True, group_size=32)
    weight = torch.randint(-8, 8, (32, 64))
    scales, bias = torch.rand(32, 2).half(), torch.randn(32).half()
    module.load_and_transform_weight(weight, scales, bias=bias)
    A = torch.randn(3, 64).half()
    other, expected = duplicate(module), module(A)
    module.load_and_transform_weight(-1 - weight, scales, bias=bias)
    assert torch.equal(other(A), expected)
    assert not torch.equal(module(A), expected)
