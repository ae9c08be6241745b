"""Helpers for tests of this library and of projects on top of it."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch


def main() -> None:
    """Run the calling file's tests with pytest and exit with its status."""
    import pytest

    caller = inspect.getsourcefile(sys._getframe(1))
    sys.exit(pytest.main([str(caller), *sys.argv[1:]]))


def torch_assert_close(
    tensor_a: torch.Tensor,
    tensor_b: torch.Tensor,
    rtol: float = 1e-2,
    atol: float = 1e-3,
    max_mismatched_ratio: float = 0.001,
    verbose: bool = False,
) -> bool:
    """AssertionError when more than max_mismatched_ratio of the elements differ by more than
    atol + rtol * |b|, or where one is NaN and the other is not; True otherwise."""
    if tensor_a.shape != tensor_b.shape:
        raise AssertionError(f"shapes differ: {tuple(tensor_a.shape)} and {tuple(tensor_b.shape)}")
    a, b = tensor_a.detach().double(), tensor_b.detach().double().to(tensor_a.device)
    mismatched = int((~torch.isclose(a, b, rtol=rtol, atol=atol, equal_nan=True)).sum())
    allowed = int(max_mismatched_ratio * a.numel())
    message = (
        f"{mismatched} of {a.numel()} elements differ by more than {atol} + {rtol} * |b|, "
        f"{allowed} allowed"
    )
    if verbose:
        print(message, file=sys.stderr)
    if mismatched > allowed:
        worst = (a - b).abs().nan_to_num(0).max().item()
        raise AssertionError(f"{message}; greatest difference {worst}")
    return True


def requires_cuda_compute_version(
    major_version: int, minor_version: int = 0
) -> Callable[[Any], Any]:
    """Decorator: skip a test without a GPU of at least that compute capability."""
    import pytest

    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    needed = (major_version, minor_version)
    return pytest.mark.skipif(
        found < needed, reason=f"needs compute capability {needed}, found {found}"
    )


def requires_package(*names: str) -> Callable[[Any], Any]:
    """Decorator: skip a test where one of the packages is not installed."""
    import pytest

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")
