"""The batch family without a GPU: the machine code of its planned tiles, and how work is dealt out.

What its kernels compute is tested on a GPU, in test_batch_gpu.py.
"""

from __future__ import annotations

import itertools

import compat
import pytest
import torch

pytest.importorskip("triton")
from bitblas.kernels import versions

if versions.why_no_gluon() is not None:
    pytest.skip(f"no Gluon: {versions.why_no_gluon()}", allow_module_level=True)

from bitblas.formats import FORMATS
from bitblas.kernels import batch, wgmma
from bitblas.kernels import compile as compiler

# each format once; the rest takes turns, so that a run stays within a minute
SHAPES = ((4096, 4096), (1000, 1440), (28672, 8192), (1003, 4096 + 160))
EXTREMES = ((1, 32), (16, 53248), (128256, 16384))
COMBINATIONS = [x for x in compat.COMBINATIONS if x[0] in ("float16", "bfloat16")]
PACKED = [name for name, fmt in FORMATS.items() if not fmt.is_dense]
TURNS = zip(
    PACKED,
    itertools.cycle(("float16", "bfloat16", "bfloat16", "float16", "float16")),
    itertools.cycle((64, 20, 256, 100)),
    itertools.cycle(SHAPES),
    itertools.cycle(("original", "quantized", None, "rescale")),
    itertools.cycle((128, 64, 128, -1)),
)
CASES = [
    (a, w, zeros if FORMATS[w].is_integer else None, m, n, k, 32 if k % group else group)
    for w, a, m, (n, k), zeros, group in TURNS
    if not (FORMATS[w].bits in (1, 3) and k % group)
]
CASES += [  # the common products
    ("float16", "uint4", "original", 32, 4096, 4096, 128),
    ("bfloat16", "uint4", "original", 128, 8192, 8192, 128),
    ("float16", "int4", None, 4096, 4096, 11008, 128),
    # consumers along k, and raw operands
    ("float16", "uint4", "original", 8, 8192, 28672, 128),
    ("bfloat16", "uint2", "quantized", 5, 8192, 16384, 64),
    ("float16", "int8", None, 16, 8192, 8192, 128),
    ("float16", "uint3", "original", 12, 8192, 8192, 128),
]


def compiled(config, m, tile):
    operands = (
        compat.meta((m, config.K), config.torch_A_dtype),
        compat.meta(batch.layout(config).shape(config.bits, config.N, config.K), torch.int8),
    )
    out = compat.meta((m, config.N), config.torch_out_dtype)
    steps = batch.launches(config, *operands, out, **compat.extras(config), tile=tile)
    return [compiler.statistics(compiler.compile_launch(step, 90)) for step in steps]


@pytest.mark.parametrize(("a", "w", "zeros", "m", "n", "k", "group"), CASES)
def test_planned_tiles_use_wgmma_and_stay_in_registers(a, w, zeros, m, n, k, group):
    group = FORMATS[w].fixed_group_size or group
    config = compat.make_config(a, w, zeros, N=n, K=k, group_size=group)
    assert batch.serves(config, m, 90)
    tile = batch.candidates(config, m)[0]
    main, *rest = compiled(config, m, tile)
    assert main.count("HGMMA") > 0
    assert main.count("LDS.128") > 0  # the words
    assert main.local_bytes <= compat.most_local_bytes("batch"), tile
    assert main.shared_bytes <= batch.SHARED_BYTES, tile
    assert all(found.local_bytes == 0 for found in rest)


def test_instructions_for_a_uint4_weight():
    """Of the main loop, from what unrolling it twice as far adds to it. 1.63 of them decode; those
    that load and prepare scales and zero points, and barriers, are for 256 rows of A shared by 64
    of W. Measured with Triton 3.6: 2.6; a quarter more is allowed."""
    config = compat.make_config("float16", "uint4", "original", N=8192, K=8192, group_size=128)
    totals = [
        sum(compiled(config, 64, batch.Tile(64, 1, 2, 64, 8, steps, 132))[0].opcodes.values())
        for steps in (2, 4)
    ]
    weights = 2 * 2 * 64 * 64 / 128  # of a lane, by both consumers
    assert (totals[1] - totals[0]) / weights <= 1.25 * 2.6


@pytest.mark.parametrize(
    ("group", "stage_k", "stages", "unroll", "every"),
    [
        (128, 64, 4, 2, 2),
        (128, 64, 6, 2, 2),
        (256, 64, 4, 4, 4),
        (128, 64, 3, 2, 1),  # the ring would begin in the middle of a group
        (256, 64, 4, 2, 1),  # a body, too
        (128, 128, 3, 1, 1),
        (32, 64, 4, 2, 1),
        (-1, 64, 4, 2, 1),
    ],
)
def test_stages_that_share_a_groups_extras(group, stage_k, stages, unroll, every):
    config = compat.make_config("float16", "uint4", "original", N=4096, K=4096, group_size=group)
    tile = batch.Tile(128, 1, 2, stage_k, stages, unroll, 132)
    assert batch._constants(config, tile, False, True).EVERY.value == every


@pytest.mark.parametrize(
    "shape, wrong",
    [({"consumers": 3}, "along_k"), ({"along_k": 3}, "along_k"), ({"unroll": 2}, "unroll")],
)
def test_tiles_that_no_kernel_computes_are_refused(shape, wrong):
    valid = {"consumers": 4, "along_k": 4, "unroll": 1}
    fixed = {"block_m": 16, "bands": 1, "stage_k": 512, "stages": 4, "blocks": 132}
    assert batch.Tile(**fixed, **valid).rows == 64
    with pytest.raises(ValueError, match=wrong):
        batch.Tile(**fixed, **(valid | shape))


@pytest.mark.parametrize(
    ("w", "group", "block_m", "stage_k", "raw"),
    [
        ("uint4", 128, 16, 1024, True),
        ("uint4", 128, 8, 512, True),
        ("uint4", 128, 32, 512, False),  # too many registers for sums of a group
        ("uint4", 64, 16, 1024, False),  # more groups than warps prepare
        ("uint1", 64, 16, 512, False),  # decoded 128 values of k at a time
        ("uint4", 32, 16, 256, False),
        ("uint4", -1, 16, 1024, False),
        ("nf4", 64, 16, 512, True),  # a table
    ],
)
def test_tiles_with_raw_operands(w, group, block_m, stage_k, raw):
    config = compat.make_config("float16", w, None, N=4096, K=4096, group_size=group)
    tile = batch.Tile(block_m, 1, 4, stage_k, 3, 1, 132, along_k=4)
    assert (batch.raw_decoder(config, tile) is not None) == raw
    constants = batch._constants(config, tile, False, True)
    assert constants.RAW.value == raw
    if raw:  # what is summed is of one group and one consumer
        assert group % constants.FOLD_K.value == 0
        assert stage_k // 4 % constants.FOLD_K.value == 0


@pytest.mark.parametrize(
    ("w", "zeros", "group", "k", "pack"),
    [
        ("uint4", "original", 128, 4096, 2),
        ("uint4", "quantized", 128, 4096, 2),
        ("uint4", None, 128, 128 * 33, 1),  # an odd number of groups
        ("nvfp4", None, 16, 4096, 4),
        ("nvfp4", None, 16, 16 * 33, 1),
        ("uint4", None, -1, 4096, 1),
    ],
)
def test_scales_that_are_loaded_as_one(w, zeros, group, k, pack):
    config = compat.make_config("float16", w, zeros, N=4096, K=k, group_size=group)
    tile = batch.Tile(64, 1, 2, 256, 3, 1, 132)
    assert batch._constants(config, tile, False, True).PACK.value == pack


@pytest.mark.parametrize("m", [2, 9, 17, 33, 100, 256, 1000, 5000])
def test_candidates_fit_and_are_all_different(m):
    for (a, w, zeros), (n, k), group in itertools.product(
        COMBINATIONS, (*SHAPES, *EXTREMES), (-1, 32)
    ):
        group = FORMATS[w].fixed_group_size or group
        config = compat.make_config(a, w, zeros, N=n, K=k, group_size=group)
        if not batch.serves(config, m, 90):
            assert m <= 16 or (FORMATS[w].bits in (1, 3) and group == 32)
            continue
        tiles = batch.candidates(config, m)
        assert tiles and len(set(tiles)) == len(tiles)
        assert all(batch.shared_bytes(config, tile) <= batch.SHARED_BYTES for tile in tiles)


@pytest.mark.parametrize("n, k", [(1000, 4096), (8192, 8192), (14336, 4096)])
def test_shared_tiles_are_as_many_for_all_m_that_share_them(n, k):
    """Else a row's bits would depend on how many rows are beside it."""
    config = compat.make_config("float16", "uint4", "original", N=n, K=k, group_size=128)
    buckets = itertools.groupby(range(2, 513), batch.rows_of_bucket)
    for _, rows in buckets:
        first, *_, last = rows
        assert batch.candidates(config, first) == batch.candidates(config, last)
        for tile in batch.candidates(config, last):
            if batch.shared_tiles(config, last, tile):
                assert batch.tiles_of(config, first, tile) == batch.tiles_of(config, last, tile)


@pytest.mark.parametrize(
    ("shared", "bodies", "blocks"),
    [(1, 1, 1), (3, 7, 5), (16, 32, 132), (5, 3, 132), (111, 64, 132)],
)
def test_the_parts_of_a_tile_are_counted_as_the_kernels_deal_them_out(shared, bodies, blocks):
    each, rest = divmod(shared * bodies, blocks)
    owner = [block for block in range(blocks) for _ in range(each + (block < rest))]
    spans = [owner[i * bodies : (i + 1) * bodies] for i in range(shared)]
    most = max(owners[-1] - owners[0] + 1 for owners in spans)
    assert batch.parts(shared, bodies, blocks) == most


@pytest.mark.parametrize(
    ("m", "pieces", "tail", "fill"),
    [
        (84, (128, 0), 84, 44),
        (1552, (256, 0), 16, 240),
        (150, (128, 32), 22, 10),
        (290, (128, 32), 2, 30),
        (250, (128, 32), 90, 38),
    ],
)
def test_the_last_rows_and_what_fills_up_are_a_piece(m, pieces, tail, fill):
    A = torch.empty(m, 256, dtype=torch.float16, device="meta")
    maps = wgmma.tail_maps(A, pieces, 64)
    assert maps["TAIL"].box == [tail, 64] and maps["TAIL"].block_shape == [8, 64]
    assert maps["FILL"].box == [fill, 32] and maps["FILL"].block_shape == [1, 32]


@pytest.mark.parametrize("m", [128, 320, 448])
def test_full_pieces_need_no_boxes_of_their_own(m):
    A = torch.empty(m, 256, dtype=torch.float16, device="meta")
    maps = wgmma.tail_maps(A, (128, 32) if m > 128 else (128, 0), 64)
    assert not any(hasattr(x, "box") for x in maps.values())


def test_small_tiles_leave_what_they_lack_to_tma():
    A = torch.empty(9, 256, dtype=torch.int8, device="meta")
    assert wgmma.tail_maps(A, (16, 0), 128) == {"TAIL": None, "FILL": None}
