"""Linear layers filled from drawn problems, for the tests of Linear."""

import torch
from calls import logical_weight
from conftest import DEVICE
from problems import Problem, draw

import bitblas


def make_layer(seed: int, m: int = 3, device: str = DEVICE, **fields):
    """(a loaded Linear, the problem it was loaded from); fields are the constructor's."""
    fields = {"in_features": 96, "out_features": 40, "W_dtype": "uint4", **fields}
    layer = bitblas.Linear(**fields).to(device)
    problem = draw(layer.config, m, seed, device)
    load(layer, problem)
    return layer, problem


def load(layer: bitblas.Linear, problem: Problem) -> None:
    extras = problem.extras()
    if "scale" in extras:
        extras["scales"] = extras.pop("scale")
    layer.load_and_transform_weight(logical_weight(problem), **extras)


def empty_like(layer: bitblas.Linear, device: str = DEVICE) -> bitblas.Linear:
    """A new Linear of the same config, with nothing loaded."""
    config = layer.config
    with torch.device(device):
        return bitblas.Linear(
            config.K,
            config.N,
            bias=config.with_bias,
            A_dtype=config.A_dtype,
            W_dtype=config.W_dtype,
            accum_dtype=config.accum_dtype,
            out_dtype=config.out_dtype,
            group_size=config.group_size,
            with_scaling=config.with_scaling,
            with_zeros=config.with_zeros,
            zeros_mode=config.zeros_mode,
        )


FULL = dict(bias=True, group_size=32, with_scaling=True, with_zeros=True, zeros_mode="original")
KINDS = {  # what state_dict, copies and moves must preserve
    "plain": dict(),
    "dense": dict(W_dtype="float16", bias=True),
    "original": FULL,
    "rescale": {**FULL, "zeros_mode": "rescale"},
    "quantized": {**FULL, "zeros_mode": "quantized"},
    "int3": dict(W_dtype="int3", with_scaling=True),
    "nf4": dict(W_dtype="nf4", group_size=48, with_scaling=True),
    "mxfp4": dict(W_dtype="mxfp4"),
    "nvfp4": dict(W_dtype="nvfp4", bias=True),
    "fp8": dict(W_dtype="e4m3_float8", with_scaling=True),
    "int8 A": dict(A_dtype="int8", W_dtype="int4", out_dtype="float32", with_scaling=True),
}
