"""The attention kernels without a GPU: the portable ones in Triton's interpreter, the machine code
of all.

The interpreter has neither bfloat16 arithmetic nor Gluon: those run in test_attention_gpu.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial

import compat
import pytest
import torch
from attention_cases import CACHES, cache_of, draw, meta_operands
from interpreter import interpret_all, print_results

pytest.importorskip("triton")
from bitblas.kernels import versions

SHARDS = 2
INTERPRETED = {
    f"{cache}-{case}": dict(caches=(cache, cache)) | fields
    for cache in CACHES
    for case, fields in {
        "decode": dict(heads=6, k_len=45, dim=64, lengths=[45, 7], splits=3),
        "prefill": dict(q_len=20, kv_heads=4, k_len=45, dim=72, causal=True, block_m=32),
        "ntn": dict(q_len=3, k_len=37, dim=40, layout="ntn", causal=True, splits=2),
    }.items()
}
INTERPRETED |= {
    "mixed-int4-int8": dict(caches=("int4", "int8"), q_len=2, k_len=33, lengths=[2, 0], splits=5),
    "mixed-float16-int4": dict(caches=("float16", "int4"), q_len=2, k_len=33, causal=True),
    "tiny-values": dict(caches=("int8", "int8"), k_len=33, value_scale=1e-4),
    "one-dim": dict(q_len=3, heads=8, kv_heads=8, k_len=33, dim=1),
    "one-dim-ntn": dict(q_len=3, heads=8, kv_heads=8, k_len=40, dim=1, layout="ntn"),
    "more-queries-than-keys": dict(q_len=9, k_len=16, lengths=[16, 4], causal=True),
}


def interpret(block_m: int = 16, splits: int = 1, **fields) -> float:
    """The relative error of a case."""
    from bitblas.kernels import attention
    from bitblas.kernels.prepared import execute

    problem = draw(**fields)
    Q, K, V = problem.tensors
    if problem.config.layout == "ntn":
        K = K.permute(0, 3, 2, 1)
    extras = {name: x for name, x in problem.extras.items() if name != "kv_len"}
    operands = attention.Operands(Q, K, V, **extras, lengths=problem.extras.get("kv_len"))
    out = torch.full_like(Q, float("nan"))
    tile = attention.Tile(block_m, 16, 4, 2, splits)
    execute(attention.launches(operands, out, problem.config.is_causal, tile, 80), out.device)
    expected = problem.expected()
    return float((out.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def expand(cache: str, layout: str) -> float:
    """The relative error of the 16-bit copy of keys."""
    from bitblas.kernels import attention
    from bitblas.kernels.prepared import execute

    problem = draw(caches=(cache, "float16"), k_len=37, dim=72)
    Q, K, _ = problem.tensors
    exact = K.double() if cache == "float16" else cache_of(problem, "k").dequantize(torch.float64)
    if layout == "ntn":
        K = K.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    out = torch.full((*K.shape[:3], 72), float("nan"), dtype=torch.float16)
    numbers = (problem.extras.get("k_scale"), problem.extras.get("k_zeros"))
    execute([attention.expand_launch(K, out, *numbers, 80)], out.device)
    return float((out.double() - exact).norm() / exact.norm())


EXPANDED = {
    f"expand-{cache}-{layout}": (cache, layout) for cache in CACHES for layout in ("nnn", "ntn")
}


def main(shard: int) -> None:
    """Print the results of a shard's cases: numbers, or the text of an exception."""
    cases = {name: partial(interpret, **fields) for name, fields in INTERPRETED.items()}
    cases |= {name: partial(expand, *fields) for name, fields in EXPANDED.items()}
    print_results(dict(list(cases.items())[shard::SHARDS]))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, object]:
    return interpret_all(__file__, SHARDS)


@pytest.mark.parametrize("name", [*INTERPRETED, *EXPANDED])
def test_interpreted_kernels_agree_with_float64(name, interpreted):
    result = interpreted[name]
    assert not isinstance(result, str), result
    assert result < (1e-3 if name in INTERPRETED else 5e-4)


# --- machine code ----------------------------------------------------------------------------


def compiled(given, arch, causal=False):
    """Statistics of the launches of the default tile."""
    from bitblas.kernels import attention
    from bitblas.kernels import compile as compiler

    tile = attention.tile_for(given, arch, 132, 32768)
    steps = attention.launches(given, torch.empty_like(given.Q), causal, tile, arch)
    found = [compiler.statistics(compiler.compile_launch(step, arch)) for step in steps]
    for statistics in found:
        assert statistics.shared_bytes <= compat.SHARED[arch], tile
        # more only where fewer rows or keys at a time are slower: 64 rows of int8 (H200), or fewer
        # blocks on a multiprocessor: "rows"
        most = 128 if tile.kernel == "rows" else (96 if tile.block_m == 64 else 64)
        assert statistics.local_bytes <= most, tile
    return tile, found


FEW = [(cache, 128, 1, torch.float16, 90) for cache in CACHES]
FEW += [("int4", 64, 1, torch.bfloat16, 90), ("int4", 256, 1, torch.float16, 90)]
FEW += [("int8", 128, 4, torch.float16, 90), ("int4", 128, 1, torch.float16, 80)]
FEW += [("int4", 128, 2, torch.bfloat16, 90)]


@pytest.mark.skipif(versions.why_no_gluon() is not None, reason="no Gluon")
@pytest.mark.parametrize("cache, dim, q_len, dtype, arch", FEW)
def test_few_queries_read_caches_in_large_pieces(cache, dim, q_len, dtype, arch):
    tile, (attend, *_) = compiled(meta_operands(cache, q_len, dim, dtype), arch, causal=True)
    integers = cache in ("int8", "int4") and q_len == 1
    assert tile.kernel == ("codes" if integers else "few")
    assert attend.count("IMMA" if integers else "HMMA") > 0
    piece = ".64" if (cache, dim) == ("int4", 64) else ".128"  # a quarter of a key
    # L2 is asked for whole lines
    assert any(op.startswith("LDG") and op.endswith("LTC128B" + piece) for op in attend.opcodes)
    assert not attend.count("LDGSTS")


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    "cache, dim, layout", [("float16", 128, "ntn"), ("float16", 64, "nnn"), ("int8", 128, "ntn")]
)
def test_prefill_stays_in_registers(cache, dim, layout, arch):
    given = meta_operands(cache, 24, dim, heads=32, layout=layout)
    tile, (attend, *_) = compiled(given, arch, causal=True)
    assert tile.kernel == "many"
    assert attend.count("HGMMA" if arch == 90 else "HMMA") > 0


@pytest.mark.skipif(versions.why_no_gluon() is not None, reason="no Gluon")
@pytest.mark.parametrize("q_len", [8, 16])
@pytest.mark.parametrize("cache", CACHES[1:])
def test_products_of_some_dozens_of_rows_run_while_codes_are_decoded(cache, q_len):
    """A compiler that finds no registers for that waits behind every instruction of a product."""
    tile, (attend, *_) = compiled(meta_operands(cache, q_len, 128), 90, causal=True)
    assert tile.kernel == "rows" and tile.block_m == 4 * q_len
    assert attend.count("HGMMA") == 8 + 8 + (cache == "int4")
    assert attend.count("WARPGROUP.DEPBAR") == 4 + 4
    assert attend.count("UTMALDG") == 2 * tile.num_stages + 2
    assert attend.local_bytes <= 16 or tile.registers == 168


def test_rows_that_fill_half_a_tile_are_served_by_wgmma():
    tile, (attend, *_) = compiled(meta_operands("float16", 8, 128), 90, causal=True)  # 32 rows
    assert tile.block_m == 64 and attend.count("HGMMA") > 0


def test_parts_cover_the_keys_evenly():
    from bitblas.kernels import attention

    assert attention._parts(49, 32768, 128) == 43  # 6 steps each; with 49 the longest has 6 too
    assert attention._parts(1000, 100, 64) == 2
    assert attention._parts(0, 32768, 128) == 1
    assert attention._parts(500, 10**6, 16) <= 128


def test_caches_that_grow_keep_their_kernels():
    from bitblas.kernels import attention
    from bitblas.kernels.compile import Source

    given = meta_operands("int8", 1, 128)
    tile = attention.tile_for(given, 80, 132, 32768)
    steps = [
        attention.launches(given, torch.empty_like(given.Q), False, replace(tile, splits=n), 80)
        for n in (2, 9)
    ]
    keys = [{Source(step).key for step in launches} for launches in steps]
    assert keys[0] == keys[1]


if __name__ == "__main__":
    main(int(sys.argv[1]))


@pytest.mark.skipif(versions.why_no_gluon() is not None, reason="no Gluon")
def test_a_ring_of_one_stage_is_refused():
    """Its kernel would wait for a step that is never copied."""
    from bitblas.kernels import attention

    given = meta_operands("int8", 8, 128)
    tile = replace(attention.tile_for(given, 90, 132, 32768), num_stages=1)
    with pytest.raises(ValueError, match="num_stages"):
        attention.launches(given, torch.empty_like(given.Q), True, tile, 90)
