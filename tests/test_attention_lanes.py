"""The Gluon kernels for few queries on the CPU, by the stand-in of lanes.py: results of every kind
of cache and number of queries, and that no address lies outside an operand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import lanes
import pytest
import torch
from attention_cases import CACHES, Problem, draw

pytest.importorskip("triton")
from bitblas.kernels import attention, versions
from bitblas.kernels.launch import Workspace

if versions.why_no_gluon() is not None:
    pytest.skip(f"no Gluon: {versions.why_no_gluon()}", allow_module_level=True)

FOLDER = Path(attention.__file__).parent
MODULES = [FOLDER / f"attention_{name}_kernels.py" for name in ("decode", "codes", "rows")]
INTEGERS = [("int8", "int8"), ("int4", "int4"), ("int4", "int8"), ("int8", "int4")]


def run(problem: Problem, tile: attention.Tile) -> torch.Tensor:
    """By the kernel, and where it splits keys, its parts added as `combine` does."""
    Q, K, V = problem.tensors
    extras = {name: x for name, x in problem.extras.items() if name != "kv_len"}
    operands = attention.Operands(Q, K, V, **extras, lengths=problem.extras.get("kv_len"))
    assert attention._takes_words(operands, 90)
    out = torch.full_like(Q, float("nan"))
    attend = attention.launches(operands, out, problem.config.is_causal, tile, 90)[0]
    given = {
        name: torch.full(x.shape, float("nan"), dtype=x.dtype) if isinstance(x, Workspace) else x
        for name, x in attend.arguments.items()
    }
    lanes.run(MODULES, f"attend_{tile.kernel}", attend.grid, given | attend.constants)
    if tile.splits == 1:
        return out
    parts, lse = given["OUT"], given["LSE"]
    weights = torch.exp2(lse - lse.amax(0).nan_to_num(neginf=0))
    weights /= weights.sum(0).clamp(min=1e-30)
    return (parts * weights[..., None]).sum(0)


def tile_of(rows: int, cache: str, splits: int, dim: int = 64) -> attention.Tile:
    """The default tile of a kind of cache, in so many parts."""
    kind = {"float16": "dense", "e4m3_float8": "e4m3"}.get(cache, cache)
    return replace(attention._tile_for_few(rows, dim, kind, 2, 132, 64), splits=splits)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_odd_lengths_behind_which_lies_poison(cache, dtype):
    shape = dict(heads=6, k_len=203, dim=64, dtype=dtype, lengths=[203, 77])
    problem = draw(caches=(cache, cache), **shape)
    problem.check(run(problem, tile_of(3, cache, 2)))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_dims(cache, dim):
    problem = draw(1, 1, 4, 1, 90, dim, caches=(cache, cache))
    problem.check(run(problem, tile_of(4, cache, 1, dim)))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("q_len", [2, 5])
def test_causal_queries(cache, q_len):
    """Five queries of four heads are two tiles of 16 rows."""
    problem = draw(1, q_len, 4, 1, 131, 64, caches=(cache, cache), causal=True)
    problem.check(run(problem, tile_of(4 * q_len, cache, 3)))


@pytest.mark.parametrize("caches", [("int4", "int8"), ("float16", "int4"), ("e4m3_float8", "int4")])
def test_keys_and_values_of_different_kinds(caches):
    problem = draw(heads=4, k_len=70, dim=64, caches=caches, lengths=[70, 0])
    problem.check(run(problem, tile_of(2, caches[0], 2)))


@pytest.mark.parametrize("cache", CACHES[1:])
def test_tiny_values_keep_their_digits(cache):
    problem = draw(k_len=100, dim=64, caches=(cache, cache), value_scale=1e-4)
    problem.check(run(problem, tile_of(2, cache, 1)))


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("keys", [16, 32, 64])
def test_steps_of_any_size_and_order(stages, keys):
    problem = draw(heads=4, k_len=300, dim=64, caches=("int4", "int4"))
    problem.check(run(problem, attention.Tile(8, keys, 2, stages, 2, "few")))


def codes_tile(splits: int, keys: int = 32) -> attention.Tile:
    return attention.Tile(4, keys, 2, 1, splits, "codes")


@pytest.mark.parametrize("caches", INTEGERS)
@pytest.mark.parametrize("dim, keys", [(64, 32), (128, 64)])
def test_integer_codes(caches, dim, keys):
    problem = draw(2, 1, 6, 2, 203, dim, caches=caches, lengths=[203, 77])
    problem.check(run(problem, codes_tile(3, keys)))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("caches", INTEGERS[:2])
def test_integer_codes_of_causal_queries(caches, splits):
    """Five queries of two heads are three tiles."""
    problem = draw(1, 5, 4, 2, 131, 64, "bfloat16", caches=caches, causal=True)
    problem.check(run(problem, codes_tile(splits)))


@pytest.mark.parametrize("caches", INTEGERS[:2])
def test_integer_codes_of_large_dims(caches):
    problem = draw(1, 1, 4, 1, 90, 256, caches=caches)
    problem.check(run(problem, codes_tile(1)))


@pytest.mark.parametrize("caches", INTEGERS[:2])
def test_weights_of_integer_codes_keep_their_digits(caches):
    """One key has almost all of the weight, scales of values are tiny and differ widely, a query is
    zero, a sequence has no keys."""
    problem = draw(2, 1, 8, 2, 300, 64, caches=caches, lengths=[300, 0], value_scale=1e-3)
    Q, _, _ = problem.tensors
    problem.extras["k_scale"][0, 7] *= 8
    problem.extras["v_scale"][0, ::3] /= 50
    Q[0, 0, 3] = 0
    problem.check(run(problem, codes_tile(2)))


@pytest.mark.parametrize("spoilt", ["k_scale", "v_scale", "Q"])
def test_integer_codes_do_not_hide_what_is_no_number(spoilt):
    problem = draw(1, 1, 4, 2, 100, 64, caches=("int4", "int8"))
    if spoilt == "Q":
        problem.tensors[0][0, 0, 1, 5] = float("inf")
    else:
        problem.extras[spoilt][0, 50, 0] = float("nan")
    out = run(problem, codes_tile(2))
    assert out[0, 0, 1].isnan().all() and out[0, 0, 2:].isfinite().all()


ROWS = attention.Tile(32, 64, 4, 2, 2, "rows")


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("block_m", [32, 64, 128])
def test_rows_of_a_tile(cache, dim, dtype, block_m):
    problem = draw(2, 5, 10, 2, 203, dim, dtype, caches=(cache, cache), lengths=[203, 77])
    tile = replace(ROWS, block_m=block_m)
    if block_m == 128 and dim == 128:
        tile = replace(tile, block_n=128, num_warps=8)
    problem.check(run(problem, tile))


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("k_len", [150, 450])
def test_rows_of_causal_queries(cache, k_len):
    """70 rows are two tiles. Of 450 keys some rows see all."""
    problem = draw(2, 35, 4, 2, k_len, 64, caches=(cache, cache), causal=True, lengths=[k_len, 20])
    problem.check(run(problem, replace(ROWS, splits=1)))


def test_rows_of_keys_and_values_of_different_kinds():
    for caches in (("int4", "int8"), ("e4m3_float8", "int4")):
        problem = draw(heads=40, k_len=150, dim=128, caches=caches, lengths=[150, 0])
        problem.check(run(problem, ROWS))


@pytest.mark.parametrize("cache", CACHES[1:])
def test_rows_of_tiny_values_keep_their_digits(cache):
    problem = draw(q_len=20, k_len=100, dim=64, caches=(cache, cache), value_scale=1e-4)
    problem.check(run(problem, replace(ROWS, splits=1)))


@pytest.mark.parametrize("cache", CACHES[1:])
def test_rows_whose_scores_and_scales_rise(cache):
    """By far more than weights may exceed what they are relative to, step after step."""
    problem = draw(1, 20, 2, 1, 500, 64, caches=(cache, cache), causal=True)
    rising = torch.arange(500)[None, :, None]
    problem.extras["k_scale"] *= (1 + rising / 20).half()
    problem.extras["v_scale"] *= torch.exp2(rising / 64.0).half()
    problem.check(run(problem, replace(ROWS, splits=1)))
    problem.check(run(problem, replace(ROWS, block_m=64)))


@pytest.mark.parametrize("spoilt", ["k_scale", "v_scale", "Q"])
def test_rows_do_not_hide_what_is_no_number(spoilt):
    problem = draw(1, 20, 2, 2, 100, 64, caches=("int8", "int4"))
    if spoilt == "Q":
        problem.tensors[0][0, 3, 0, 5] = float("inf")
    else:
        problem.extras[spoilt][0, 50, 0] = float("nan")
    out = run(problem, ROWS)
    assert out[0, 3, 0].isnan().all() and out[0, :, 1].isfinite().all()
    if spoilt == "Q":
        assert out[0, 4:].isfinite().all()
