"""From a drawn problem to the public operators: what a caller would pass, and the check."""

import torch
from problems import Problem, relative_error, tolerance

import bitblas


def logical_weight(problem: Problem) -> torch.Tensor:
    """The problem's weight as transform_weight takes it, (N, K), or (K, N) for "nn" and "tn"."""
    config, weight = problem.config, problem.codes
    if config.format.is_integer:
        weight = config.format.to_values(weight, torch.int16)
    return weight.T if config.layout[1] == "n" else weight


def multiply(problem: Problem, **kwargs) -> torch.Tensor:
    """The product through Matmul, weight packed by transform_weight."""
    matmul = bitblas.Matmul(problem.config)
    packed = matmul.transform_weight(logical_weight(problem))
    return matmul(problem.A, packed, **problem.extras(), **kwargs)


def check(problem: Problem, out: torch.Tensor) -> None:
    """out has the shape, dtype and values that the problem's product must have."""
    expected = problem.expected()
    assert out.shape == expected.shape
    assert out.dtype == problem.config.torch_out_dtype
    error = relative_error(out, expected)
    assert error <= tolerance(problem.config), error
