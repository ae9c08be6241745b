"""Logging, and the helpers of bitblas.testing."""

import logging

import pytest
import torch

import bitblas


@pytest.fixture
def logger(monkeypatch):
    """The library's logger; its level and handlers are put back afterwards."""
    found = logging.getLogger("bitblas")
    level, handlers, propagate = found.level, list(found.handlers), found.propagate
    yield found
    found.setLevel(level)
    found.handlers[:], found.propagate = handlers, propagate


@pytest.mark.parametrize(
    ("given", "level"),
    [
        ("Debug", logging.DEBUG),
        ("WARNING", logging.WARNING),
        ("error", logging.ERROR),
        (logging.CRITICAL, logging.CRITICAL),
        (15, 15),
        ("verbose", logging.INFO),
        ("", logging.INFO),
    ],
)
def test_set_log_level(given, level, logger):
    bitblas.set_log_level(given)
    assert logger.level == level


def test_messages_go_to_stderr_once_and_never_to_stdout(logger, capfd):
    logger.handlers[:] = [logging.NullHandler()]
    bitblas.set_log_level("info")
    bitblas.set_log_level("INFO")
    logger.info("a message of this test")
    out, err = capfd.readouterr()
    assert "a message of this test" not in out
    assert err.count("a message of this test") == 1


def test_messages_below_the_level_are_dropped(logger, capfd):
    logger.handlers[:] = [logging.NullHandler()]
    bitblas.set_log_level("error")
    logger.warning("a message of this test")
    assert "a message of this test" not in "".join(capfd.readouterr())


# --- testing helpers


def test_close_tensors_pass():
    a = torch.randn(1000)
    assert bitblas.testing.torch_assert_close(a, a + 1e-4)


@pytest.mark.parametrize("kind", [1.0, float("nan"), float("inf")])
def test_too_many_mismatches_fail(kind):
    a = torch.randn(1000)
    b = a.clone()
    b[:2] += kind
    with pytest.raises(AssertionError, match="2 of 1000 elements differ"):
        bitblas.testing.torch_assert_close(a, b)


def test_a_share_of_mismatches_is_allowed():
    a = torch.randn(1000)
    b = a.clone()
    b[0] += 1
    bitblas.testing.torch_assert_close(a, b, max_mismatched_ratio=0.001)
    with pytest.raises(AssertionError):
        bitblas.testing.torch_assert_close(a, b, max_mismatched_ratio=0.0005)


def test_relative_tolerance_is_of_the_second_tensor():
    a, b = torch.tensor([1.0]), torch.tensor([2.0])
    bitblas.testing.torch_assert_close(a, b, rtol=0.5, atol=1e-6, max_mismatched_ratio=0)
    with pytest.raises(AssertionError):
        bitblas.testing.torch_assert_close(b, a, rtol=0.5, atol=1e-6, max_mismatched_ratio=0)


def skips(mark):
    return mark.mark.args[0]


def test_requires_package_skips_what_is_not_installed():
    assert not skips(bitblas.testing.requires_package("torch", "json"))
    assert skips(bitblas.testing.requires_package("torch", "no_such_package"))


def test_requires_cuda_compute_version_skips_without_such_a_gpu():
    assert skips(bitblas.testing.requires_cuda_compute_version(99))
    assert skips(bitblas.testing.requires_cuda_compute_version(0, 1)) is (
        not torch.cuda.is_available()
    )
