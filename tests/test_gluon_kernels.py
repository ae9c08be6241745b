"""What the kernels need of Triton, and the machine code of Gluon kernels, without a GPU."""

from __future__ import annotations

import logging

import compat
import pytest

pytest.importorskip("triton")
from bitblas.kernels import versions

SAMPLE = [  # activation, weight, zeros mode, group size, m: each decoder, one and two planes
    ("float16", "uint4", "original", 128, 1),
    ("bfloat16", "int2", None, 64, 16),
    ("float16", "uint3", "rescale", 128, 8),
    ("bfloat16", "nf4", None, 64, 1),
    ("float16", "e4m3_float8", None, 128, 4),
    ("bfloat16", "nvfp4", None, 16, 16),
    ("float16", "uint4", "original", 128, 64),
    ("bfloat16", "int2", None, 64, 32),
    ("float16", "uint3", "rescale", 128, 128),
    ("bfloat16", "nf4", None, 64, 256),
    ("float16", "nvfp4", None, 16, 4096),
    ("int8", "int4", None, -1, 64),
    ("int8", "uint2", "quantized", 256, 1000),
    ("e4m3_float8", "e4m3_float8", None, -1, 256),
]
GLUON_FAMILIES = [name for name in compat.families() if name != "portable"]
needs_gluon = pytest.mark.skipif(
    versions.why_no_gluon() is not None, reason=f"no Gluon: {versions.why_no_gluon()}"
)


def gluon_cases():
    """The sample's products in each family that serves them."""
    for a, w, zeros, group, m in SAMPLE:
        config = compat.make_config(a, w, zeros, N=4096, K=4096, group_size=group)
        for family in GLUON_FAMILIES:
            case = compat.Case(family, config, m, 90)
            if compat.served(case):
                yield case


@needs_gluon
@pytest.mark.parametrize("case", list(gluon_cases()), ids=str)
def test_gluon_kernels_compile_without_spills(case):
    for finding in compat.examine(case):
        assert finding.complaints == ()


@needs_gluon
def test_the_sample_reaches_every_gluon_family():
    assert {case.family for case in gluon_cases()} == set(GLUON_FAMILIES)


def test_the_sample_of_make_compat_reaches_every_format_and_zeros_mode():
    cases = list(compat.cases("portable"))
    configs = [case.config for case in cases]
    reached = {(c.W_dtype, c.zeros_mode if c.with_zeros else None) for c in configs}
    assert reached == {(w, zeros) for _, w, zeros in compat.COMBINATIONS}
    assert len(cases) == len(set(cases))


@pytest.fixture
def refused(monkeypatch):
    monkeypatch.setattr(versions, "_refused", None)
    versions._report.cache_clear()
    yield
    versions._report.cache_clear()


@needs_gluon
def test_refusing_gluon_is_logged_once(refused, caplog):
    assert versions.gluon_available()
    with caplog.at_level(logging.WARNING, "bitblas"):
        versions.refuse_gluon("kernel did not compile")
        assert not versions.gluon_available()
    assert [record.message for record in caplog.records if "kernel did not" in record.message]
    assert len(caplog.records) == 1


def test_an_old_triton_has_no_gluon(refused, monkeypatch):
    monkeypatch.setattr(versions.triton, "__version__", "3.5.1")
    assert versions.why_no_gluon() == "needs Triton 3.6.0 or later"
    assert not versions.gluon_available()
