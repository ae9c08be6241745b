"""The decode family without a GPU: the machine code of its planned tiles, and its early reads.

What its kernels compute is tested on a GPU, in test_decode_gpu.py.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import compat
import pytest
import torch

pytest.importorskip("triton")
from bitblas.kernels import versions

if versions.why_no_gluon() is not None:
    pytest.skip(f"no Gluon: {versions.why_no_gluon()}", allow_module_level=True)

from bitblas.formats import FORMATS
from bitblas.kernels import compile as compiler
from bitblas.kernels import decode, gpu

# each format once; the rest takes turns, so that a run stays within a minute
SHAPES = ((4096, 4096), (1000, 1440), (28672, 8192), (4096, 14336), (1003, 4096 + 160))
EXTREMES = ((1, 32), (16, 53248), (128256, 16384))
COMBINATIONS = [x for x in compat.COMBINATIONS if x[0] in ("float16", "bfloat16")]
PACKED = [name for name, fmt in FORMATS.items() if not fmt.is_dense]
TURNS = zip(
    PACKED,
    itertools.cycle(("float16", "bfloat16", "bfloat16", "float16", "float16")),
    itertools.cycle((1, 8, 16)),
    itertools.cycle(SHAPES),
    itertools.cycle(("original", "quantized", None, "rescale")),
    itertools.cycle((128, 32, 64, -1)),
)
CASES = [
    (a, w, zeros if FORMATS[w].is_integer else None, m, n, k, 32 if k % group else group)
    for w, a, m, (n, k), zeros, group in TURNS
]
CASES += [  # the common products, for each number of rows of A that a block stages
    ("float16", "uint4", "original", 1, 4096, 4096, 128),
    ("bfloat16", "uint4", "original", 16, 14336, 4096, 128),
    ("float16", "int4", None, 8, 4096, 11008, 128),
    ("float16", "nf4", None, 16, 4096, 4096, 64),
]


def compiled(config, m, tile):
    operands = (
        compat.meta((m, config.K), config.torch_A_dtype),
        compat.meta(decode.layout(config).shape(config.bits, config.N, config.K), torch.int8),
    )
    out = compat.meta((m, config.N), config.torch_out_dtype)
    (launch,) = decode.launches(config, *operands, out, **compat.extras(config), tile=tile)
    found = compiler.statistics(compiler.compile_launch(launch, 90))
    return replace(found, shared_bytes=found.shared_bytes + launch.extra_shared)


def weight_loads(found):
    """The weights are all that is read as evict-first."""
    return {op: n for op, n in found.opcodes.items() if op.startswith("LDG") and ".EF" in op}


@pytest.mark.parametrize(("a", "w", "zeros", "m", "n", "k", "group"), CASES)
def test_planned_tiles_stay_in_registers_and_read_16_bytes(a, w, zeros, m, n, k, group):
    group = FORMATS[w].fixed_group_size or group
    config = compat.make_config(a, w, zeros, N=n, K=k, group_size=group)
    assert decode.serves(config, m, 90)
    tile = decode.candidates(config, m)[0]
    found = compiled(config, m, tile)
    assert found.local_bytes <= compat.most_local_bytes("decode"), tile
    assert found.shared_bytes == decode.shared_bytes(config, m, tile) <= decode.SHARED_BYTES, tile
    assert found.count("HMMA") > 0
    assert weight_loads(found)
    assert all(op.endswith(".128") for op in weight_loads(found)), weight_loads(found)


@pytest.mark.parametrize(
    ("a", "w", "most"),
    [
        ("float16", "uint4", 1.13),
        ("bfloat16", "uint4", 1.38),
        ("float16", "int1", 1.10),
        ("float16", "nf4", 1.88),
        ("float16", "nvfp4", 3.13),
    ],
)
def test_instructions_for_a_weight(a, w, most):
    """Of the main loop, from what its second unit adds to it; most: as measured with Triton 3.6, a
    quarter more is allowed."""
    zeros = "original" if w == "uint4" else None
    group = FORMATS[w].fixed_group_size or 128
    config = compat.make_config(a, w, zeros, N=8192, K=16384, group_size=group)
    unit = decode.smallest_unit(config)
    totals = [
        sum(compiled(config, 8, decode.Tile(8, 2, unit, depth, 132)).opcodes.values())
        for depth in (1, 2)
    ]
    assert (totals[1] - totals[0]) / unit <= 1.25 * most


@pytest.mark.parametrize("m", [1, 2, 8, 9, 16])
def test_candidates_fit_and_are_all_different(m):
    for (a, w, zeros), (n, k), group in itertools.product(
        COMBINATIONS, (*SHAPES, *EXTREMES), (-1, 16)
    ):
        group = FORMATS[w].fixed_group_size or group
        config = compat.make_config(a, w, zeros, N=n, K=k, group_size=group)
        tiles = decode.candidates(config, m)
        assert tiles and len(set(tiles)) == len(tiles)
        for tile in tiles:
            assert decode.shared_bytes(config, m, tile) <= decode.SHARED_BYTES
            covered = tile.slabs * decode.iterations(config, tile) * tile.warps
            assert covered * tile.depth * tile.unit_k >= k


def test_blocks_that_are_fewer_than_multiprocessors_keep_others_off_theirs():
    few = compat.make_config("float16", "uint4", "original", N=1024, K=4096, group_size=128)
    many = compat.make_config("float16", "uint4", "original", N=28672, K=4096, group_size=128)
    alone, two = decode.Tile(8, 1, 64, 4, 132), decode.Tile(8, 1, 64, 4, 264, max_registers=128)
    a_multiprocessors = decode.SHARED_BYTES + 1024
    assert 2 * decode.shared_bytes(few, 1, alone) > a_multiprocessors
    assert 2 * compiled(few, 1, alone).shared_bytes > a_multiprocessors
    assert 2 * decode.shared_bytes(many, 1, alone) <= a_multiprocessors  # as many as there are
    assert 2 * decode.shared_bytes(few, 1, two) <= a_multiprocessors


# --- whether W, scale and zeros may be read before the kernel ahead in the stream is done ---------


@pytest.fixture
def operands():
    return {name: torch.ones(64) for name in ("W", "scale", "zeros")}


def settled(operands) -> bool:
    W, scale, zeros = operands.values()
    return gpu._settled((torch.ones(1), W, scale, zeros, None, None, None))


def test_weights_are_settled_from_the_second_call_on(operands):
    assert not settled(operands)
    assert settled(operands)
    assert settled(operands)


@pytest.mark.parametrize("name", ["W", "scale", "zeros"])
def test_weights_written_in_place_are_not_settled(operands, name):
    settled(operands), settled(operands)
    operands[name].mul_(2)
    assert not settled(operands)
    assert settled(operands)


@pytest.mark.parametrize("name", ["W", "scale", "zeros"])
def test_weights_in_the_place_of_freed_ones_are_not_settled(operands, name):
    """A new tensor often has the address of the one that it replaces."""
    memory = operands[name].numpy()
    operands[name] = torch.from_numpy(memory)
    settled(operands), settled(operands)
    operands[name] = torch.from_numpy(memory)
    assert not settled(operands)


def test_a_written_weight_beside_a_new_scale_is_not_settled(operands):
    """The scale's changes are counted from zero again, which W's may make up for."""
    operands["scale"].mul_(2)
    settled(operands), settled(operands)
    operands["W"].mul_(2)
    operands["scale"] = torch.from_numpy(operands["scale"].numpy())
    assert not settled(operands)


def test_weights_made_in_inference_mode_are_never_settled():
    with torch.inference_mode():
        operands = {name: torch.ones(64) for name in ("W", "scale", "zeros")}
    assert not settled(operands)
    assert not settled(operands)
