"""The batch8 family on a GPU: results against float64, the same bits however it is started."""

import random
from dataclasses import replace

import pytest
import torch
from calls import logical_weight
from compat import make_config
from decode_cases import Product, Repeated, surrounded
from problems import draw, tolerance

import bitblas
from bitblas.config import ZEROS_MODES
from bitblas.formats import FORMATS

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bitblas import plan
from bitblas.kernels import batch8
from bitblas.kernels.batch8 import Tile
from bitblas.kernels.byte_decoders import float_decoder
from bitblas.layouts import FRAGMENT_8

if torch.cuda.get_device_capability()[0] != 9 or not batch8.gluon_available():
    pytest.skip("needs Hopper and Gluon", allow_module_level=True)

pytestmark = pytest.mark.gpu

COMBINATIONS = [
    ("int8", w, zeros)
    for w, fmt in FORMATS.items()
    if batch8.byte_decoder(fmt) is not None
    for zeros in (None, *ZEROS_MODES)
]
COMBINATIONS += [
    ("e4m3_float8", w, None) for w, fmt in FORMATS.items() if float_decoder(fmt) is not None
]
OUTS = ("float16", "bfloat16", "float32", "int32", "int8")


class Product8(Product):
    family = batch8

    def out(self, m=None):
        if self.config.torch_out_dtype.is_floating_point:
            return super().out(m)
        shape = (self.A.shape[0] if m is None else m, self.config.N)
        return surrounded(torch.full(shape, 77, dtype=self.config.torch_out_dtype, device="cuda"))

    def check(self, out, note=""):
        allowed = tolerance(self.config, with_input_scale=self.problem.input_scale is not None)
        assert self.error(out) <= allowed, f"{note} {self.config}"
        return out


def drawn_config(rng: random.Random, a: str, w: str, zeros: str | None):
    """Any product of the combination that the family serves, of odd sizes mostly."""
    group = rng.choice((max(128, FRAGMENT_8.block_k(FORMATS[w].bits)), 256, 512, -1, -1))
    scaled = rng.random() < 0.75
    outs = OUTS if a == "int8" else OUTS[:3]
    if not scaled or FORMATS[w].bits == 8:
        outs = outs[2:]  # sums beyond the largest float16
    if not scaled and (zeros == "quantized" or (w, zeros) == ("uint8", None)):
        outs, group = OUTS[3:], -1  # exact, as float32 would not be
    k = 16 * rng.choice((1, 2, 9, 70, 131, 261)) if group == -1 else group * rng.choice((1, 3, 9))
    config = make_config(
        a, w, zeros, N=rng.choice((1, 17, 64, 200, 1003)), K=k, group_size=group,
        with_scaling=scaled, with_bias=rng.random() < 0.5, out_dtype=rng.choice(outs),
    )  # fmt: skip
    assert batch8.serves(config, 17, 90)
    return config


def drawn_tile(rng: random.Random, config) -> Tile:
    """Any tile of the planned shapes, with any number of stages and blocks."""
    tile = rng.choice(batch8.candidates(config, rng.choice((1, 30, 60, 100, 4000))))
    turns = max(1, 2 // tile.split)  # a ring has stages for all warpgroups that share rows
    stages = tile.split * rng.randint(turns, tile.stages // tile.split)
    return replace(tile, stages=stages, blocks=rng.choice((1, 3, 11, 70, 264)))


@pytest.mark.parametrize(("a", "w", "zeros"), COMBINATIONS)
def test_any_product_in_any_tile(a, w, zeros, seed):
    rng = random.Random(seed)
    for m in (rng.randint(1, 16), rng.randint(17, 64), rng.randint(65, 700)):
        config = drawn_config(rng, a, w, zeros)
        problem = draw(config, m, seed, "cuda", with_input_scale=rng.random() < 0.7)
        product, tile = Product8(problem), drawn_tile(rng, config)
        product.check(product(tile), tile)


@pytest.mark.parametrize(("a", "w", "zeros"), COMBINATIONS)
def test_planned_tiles(a, w, zeros, seed):
    rng = random.Random(seed)
    config = drawn_config(rng, a, w, zeros)
    m = rng.choice((1, 16, 17, 50, 128, 200, 513))
    product = Product8(draw(config, m, seed, "cuda", with_input_scale=True))
    matmul = bitblas.Matmul(config)
    W, extras = matmul.transform_weight(logical_weight(product.problem)), product.problem.extras()
    assert plan.pick(config, m, W.device)[0] is batch8
    first = matmul(product.problem.A, W, **extras)
    product.check(first)
    for _ in range(3):
        assert torch.equal(matmul(product.problem.A, W, **extras), first)


UNALIKE = [
    (dict(w="int4", K=4096), 64, None),
    (dict(w="int8", K=4096), 200, Tile(128, 2, 2, 128, 2, 1, 9)),
    (dict(w="int4", K=4096, group_size=128), 100, Tile(128, 1, 2, 128, 5, 1, 132)),
    (dict(w="uint4", zeros="original", K=4096, group_size=256), 40, Tile(64, 1, 1, 256, 3, 1, 30)),
    (dict(w="int2", K=4096), 1, Tile(16, 1, 1, 512, 3, 1, 40)),
    (dict(w="int2", K=4096), 5, Tile(8, 1, 1, 256, 8, 1, 40, split=4)),
    (
        dict(w="uint4", zeros="original", K=4096, group_size=128),
        60,
        Tile(64, 1, 1, 256, 4, 1, 9, 2),
    ),
    (dict(a="e4m3_float8", w="int4", K=4096, group_size=128), 70, None),
    (dict(a="e4m3_float8", w="e4m3_float8", K=2064), 200, Tile(128, 1, 2, 128, 5, 2, 21)),
    (dict(w="uint8", zeros="quantized", K=2064), 300, Tile(128, 1, 2, 128, 3, 2, 11)),
]


def unalike(case, seed) -> tuple[Product8, Tile]:
    fields, m, tile = case
    fields = {"group_size": -1, "N": 1040, **fields}
    config = make_config(
        fields.pop("a", "int8"), fields.pop("w"), fields.pop("zeros", None), **fields
    )
    product = Product8(draw(config, m, seed, "cuda", with_input_scale=True))
    return product, tile or batch8.candidates(config, m)[0]


def rolled(A, shift):
    # on a GPU torch rolls no 8-bit floats
    return A.view(torch.int8).roll(shift, dims=-1).view(A.dtype)


each_unalike = pytest.mark.parametrize("case", UNALIKE, ids=str)


@each_unalike
def test_a_hundred_launches_give_the_same_bits(case, seed):
    product, tile = unalike(case, seed)
    once = Repeated(product, tile)
    outs = [product.out() for _ in range(100)]
    for out in outs:
        once.start(out)
    product.check(outs[0], tile)
    assert all(torch.equal(out, outs[0]) for out in outs)


@each_unalike
def test_graph_replays_with_changing_inputs(case, seed):
    product, tile = unalike(case, seed)
    once, out = Repeated(product, tile), product.out()
    inputs = [rolled(product.A, shift) for shift in range(5)]
    expected = [product(tile, A) for A in inputs]
    product.check(expected[0], tile)
    graph, A = torch.cuda.CUDAGraph(), product.A
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(2):
            once.start(out)
    for _ in range(5):
        for given, wanted in zip(inputs, expected):
            A.copy_(given)
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, wanted)


@each_unalike
def test_an_input_written_just_before(case, seed):
    product, tile = unalike(case, seed)
    once, A = Repeated(product, tile), product.A.clone()
    inputs = [rolled(A, shift) for shift in range(20)]
    expected = [product(tile, given) for given in inputs]
    outs = [product.out() for _ in inputs]
    torch.cuda.synchronize()
    for given, out in zip(inputs, outs):
        A.view(torch.int8).fill_(77)
        A.view(torch.int8).copy_(given.view(torch.int8))
        once.start(out, A)
    assert all(torch.equal(out, wanted) for out, wanted in zip(outs, expected))


def test_a_batch_that_starts_off_16_bytes(seed):
    config = make_config("int8", "int4", N=200, K=320, group_size=-1)
    product = Product8(draw(config, 40, seed, "cuda", with_input_scale=True), shift=1)
    matmul = bitblas.Matmul(config)
    W = matmul.transform_weight(logical_weight(product.problem))
    product.check(matmul(product.A, W, **product.problem.extras()))
