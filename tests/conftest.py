"""What every test shares: the device, the seed, and the skipping of tests that need a GPU."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def seed() -> int:
    """A fresh seed for torch, printed with a failing test; set BITBLAS_TEST_SEED to repeat it."""
    value = int(os.environ.get("BITBLAS_TEST_SEED") or random.SystemRandom().randrange(2**31))
    print(f"BITBLAS_TEST_SEED={value}")
    torch.manual_seed(value)
    return value


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
