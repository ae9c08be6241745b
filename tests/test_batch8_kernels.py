"""The batch8 family without a GPU: its decoders on words of the layout, the machine code of its
planned tiles. What its kernels compute is tested on a GPU, in test_batch8_gpu.py.
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

from test_decoders import execute

from bitblas.formats import FORMATS
from bitblas.kernels import batch8
from bitblas.kernels import compile as compiler
from bitblas.kernels.byte_decoders import byte_decoder, float_decoder
from bitblas.layouts import FRAGMENT_8


def make_config(w: str, zeros: str | None = None, **fields):
    fields = {"N": 4096, "K": 4096, "group_size": -1, "out_dtype": "float16", **fields}
    return compat.make_config(fields.pop("a", "int8"), w, zeros, **fields)


DECODED = [name for name, fmt in FORMATS.items() if byte_decoder(fmt) is not None]


def test_formats_that_are_served():
    signs = ("int", "uint")
    assert set(DECODED) == {f"{sign}{bits}" for sign in signs for bits in (1, 2, 4, 8)}


FLOATS = [name for name, fmt in FORMATS.items() if float_decoder(fmt) is not None]


def test_formats_that_e4m3_activations_are_served_with():
    assert set(FLOATS) == {"e4m3_float8", "int4", "int2", "fp4_e2m1"}


@pytest.mark.parametrize(
    ("a", "w"), [("int8", w) for w in DECODED] + [("e4m3_float8", w) for w in FLOATS]
)
def test_decoded_bytes_are_the_values_in_their_unit(a, w):
    """Every register of every chunk against the format's values, where the layout puts them."""
    fmt = FORMATS[w]
    decoder = byte_decoder(fmt) if a == "int8" else float_decoder(fmt)
    dtype = {"int8": torch.int8, "e4m3_float8": torch.float8_e4m3fn}[a]
    count, block = 32 // fmt.bits, FRAGMENT_8.block_k(fmt.bits)
    codes = torch.randint(0, 1 << fmt.bits, (64, block), dtype=torch.uint8)
    values = fmt.to_values(codes)
    words = FRAGMENT_8.pack(codes, fmt.bits).view(torch.int32).view(-1, 4, 32, 4)
    for chunk, band, lane in itertools.product(range(words.shape[0]), range(4), range(32)):
        four = words[chunk, band, lane].numpy().view("uint32")
        found = execute(decoder.asm, {f"${count + i}": four[i : i + 1] for i in range(4)})
        for register in range(count):
            got = torch.from_numpy(found[f"${register}"].view("int8")).view(dtype)
            got = got.double() * decoder.unit
            step, x, r3 = register // 4, register % 4 // 2, register % 2
            row = band * 16 + r3 * 8 + lane // 4
            k = chunk * 256 // fmt.bits + step * 32 + x * 16 + lane % 4 * 4
            assert torch.equal(
                (got + decoder.shift).nan_to_num(7e7), values[row, k : k + 4].nan_to_num(7e7)
            )


LEFT = [
    ("int3", {}),
    ("int4", dict(group_size=64)),
    ("int4", dict(K=4224, group_size=1056)),
    ("uint1", dict(group_size=128)),
    ("int4", dict(K=4104)),
    ("int8", dict(K=1 << 17)),
]
EXACT = dict(N=4096, K=4096, group_size=128, with_scaling=False, out_dtype="int32")


@pytest.mark.parametrize(("w", "fields"), LEFT, ids=str)
def test_what_is_left_to_others(w, fields):
    assert not batch8.serves(make_config(w, **fields), 64, 90)


def test_exact_integers_of_groups_are_left_to_others():
    assert not batch8.serves(compat.make_config("int8", "uint4", "quantized", **EXACT), 64, 90)
    assert batch8.serves(compat.make_config("int8", "uint4", "original", **EXACT), 64, 90)


@pytest.mark.parametrize("out_dtype", ["float16", "bfloat16", "float32"])
def test_exact_integers_that_cancel_before_they_are_floats_are_left_to_others(out_dtype):
    for w in DECODED:
        for zeros in (None, "quantized"):
            fields = dict(group_size=-1, with_scaling=False)
            cancels = zeros is not None or w == "uint8"
            config = make_config(w, zeros, **fields, out_dtype=out_dtype)
            assert batch8.serves(config, 64, 90) is not cancels
            assert batch8.serves(make_config(w, zeros, **fields, out_dtype="int32"), 64, 90)


@pytest.mark.parametrize("w", ["int8", "uint8", "int4"])
def test_any_number_of_rows_is_served(w):
    assert all(batch8.serves(make_config(w), m, 90) for m in (1, 16, 17, 5000))


def test_only_hopper_is_served():
    assert [batch8.serves(make_config("int4"), 64, arch) for arch in (80, 89, 90, 100)] == [
        False,
        False,
        True,
        False,
    ]


CASES = [
    ("int4", None, 1, {}),
    ("int4", None, 64, {}),
    ("int4", None, 4096, {}),
    ("int8", None, 4096, {}),
    ("int8", None, 33, {}),
    ("int2", None, 4096, {}),
    ("int1", None, 16, {}),
    ("uint8", None, 300, dict(N=1000, K=1440)),
    ("int4", None, 300, dict(out_dtype="float32", with_bias=True)),
    ("int8", None, 64, dict(out_dtype="bfloat16", with_scaling=False)),
    ("int2", None, 1, dict(out_dtype="int32", with_scaling=False)),
    ("int8", None, 4096, dict(out_dtype="int8", with_bias=True)),
    ("int4", None, 4096, dict(group_size=128)),
    ("uint4", "original", 64, dict(group_size=128)),
    ("uint4", "rescale", 4096, dict(group_size=256)),
    ("uint2", "quantized", 256, {}),
    ("e4m3_float8", None, 4096, {"a": "e4m3_float8"}),
    ("int4", None, 64, {"a": "e4m3_float8", "group_size": 128}),
    ("fp4_e2m1", None, 1, {"a": "e4m3_float8", "out_dtype": "float32"}),
]


@pytest.mark.parametrize(("w", "zeros", "m", "fields"), CASES)
def test_planned_tiles_stay_in_registers_and_use_wgmma(w, zeros, m, fields):
    config = make_config(w, zeros, **fields)
    instruction = "IGMMA" if config.A_dtype == "int8" else "QGMMA"
    assert batch8.serves(config, m, 90)
    tile = batch8.candidates(config, m)[0]
    assert batch8.shared_bytes(config, tile) <= batch8.SHARED_BYTES
    matrix = 0
    for step in compat.Case("batch8", config, m, 90).launches():
        found = compiler.statistics(compiler.compile_launch(step, 90))
        assert found.local_bytes <= compat.most_local_bytes("batch8"), tile
        assert found.shared_bytes <= compat.SHARED[90]
        matrix += found.count(instruction)
        assert not found.count(instruction) or found.count("UTMALDG") > 0
    assert matrix > 0


@pytest.mark.parametrize("m", [1, 16, 17, 64, 90, 150, 256, 300, 4096, 100_000])
def test_candidates_fit_and_are_all_different(m):
    kinds = [("int8", w, out) for w in DECODED for out in ("int8", "float16")]
    kinds += [("e4m3_float8", w, out) for w in FLOATS for out in ("float16", "float32")]
    sizes = ((4096, 4096, -1), (16, 65536, -1), (128256, 16384, 256))
    for (a, w, out), (n, k, group) in itertools.product(kinds, sizes):
        config = make_config(w, a=a, N=n, K=k, group_size=group, out_dtype=out)
        tiles = batch8.candidates(config, m)
        assert tiles and len(set(tiles)) == len(tiles)
        for tile in tiles:
            assert batch8.shared_bytes(config, tile) <= batch8.SHARED_BYTES
            assert tile.stage_k % 128 == 0 and tile.stages % tile.split == 0
            assert tile.stage_k % FRAGMENT_8.block_k(config.bits) == 0
