"""The decode family on a GPU: results against float64, the same bits however it is started.

Tiles of every kind are given to the family itself; the planned one is reached through Matmul.
"""

import random
from dataclasses import replace

import pytest
import torch
from calls import logical_weight
from compat import make_config
from problems import Problem, draw, relative_error, tolerance

import bitblas

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from decode_cases import COMBINATIONS, ROWS, Product, Repeated, drawn, fits

from bitblas.kernels import decode
from bitblas.kernels.decode import Tile
from bitblas.kernels.prepared import Prepared

if torch.cuda.get_device_capability()[0] != 9 or not decode.gluon_available():
    pytest.skip("needs Hopper and Gluon", allow_module_level=True)

pytestmark = pytest.mark.gpu

TILES = [  # those whose words fit in registers, with units of 64 values of uint4
    (warps, bands, depth)
    for warps in (8, 16)
    for bands in (1, 2, 4)
    for depth in (1, 2, 4, 8)
    if bands * depth <= 128 // warps
]
# format, dtype, zeros mode, group, rows, tile; N = 1040 is 65 bands: most blocks of one have none
UNALIKE = [
    ("uint4", "float16", "original", 128, 1, Tile(8, 2, 64, 4, 132)),
    ("uint4", "float16", "original", 128, 8, Tile(8, 1, 128, 2, 20)),
    ("uint4", "bfloat16", "quantized", 32, 16, Tile(16, 1, 64, 2, 7, slabs=2)),
    ("int4", "float16", None, 64, 8, Tile(16, 2, 64, 2, 33, slabs=2)),
    ("uint3", "float16", "rescale", 256, 1, Tile(8, 1, 256, 1, 65, slabs=3)),
    ("int2", "bfloat16", None, 128, 16, Tile(8, 2, 128, 2, 11, slabs=3)),
    ("int1", "float16", None, -1, 8, Tile(8, 1, 256, 2, 40)),
    ("uint8", "bfloat16", "original", 64, 1, Tile(16, 1, 32, 4, 9)),
    ("nf4", "bfloat16", None, 64, 8, Tile(8, 1, 128, 1, 65, slabs=2)),
    ("nf4", "float16", None, -1, 16, Tile(8, 4, 64, 1, 5, slabs=2)),
    ("nvfp4", "float16", None, 16, 1, Tile(16, 1, 64, 1, 30, slabs=2)),
    ("nvfp4", "bfloat16", None, 16, 16, Tile(8, 2, 64, 4, 11, slabs=2)),
    ("mxfp4", "bfloat16", None, 32, 8, Tile(8, 2, 64, 2, 33)),
    ("uint2", "float16", "original", 64, 1, Tile(8, 2, 128, 2, 11)),
    ("e4m3_float8", "float16", None, 128, 8, Tile(8, 2, 64, 2, 17)),
]


def unalike(case, seed, k=4096) -> tuple[Product, Tile]:
    w, a, zeros, group, rows, tile = case
    config = make_config(a, w, zeros, N=1040, K=k, group_size=group)
    assert fits(config, rows, tile)
    return Product(draw(config, rows, seed, "cuda")), tile


def each_unalike(test):
    return pytest.mark.parametrize("case", UNALIKE, ids=lambda case: "-".join(map(str, case[:5])))(
        test
    )


def called(problem: Problem) -> torch.Tensor:
    """The product through the public operator, twice: the second call repeats the first."""
    matmul = bitblas.Matmul(problem.config)
    W = matmul.transform_weight(logical_weight(problem))
    first = matmul(problem.A, W, **problem.extras())
    assert torch.equal(matmul(problem.A, W, **problem.extras()), first)
    return first


# --- against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "w", "zeros"), COMBINATIONS)
def test_any_product_in_any_tile(a, w, zeros, seed):
    rng = random.Random(seed)
    for rows in rng.sample(list(ROWS), 2):
        product, tile = drawn(rng, a, w, zeros, rows)
        for m in ROWS[rows]:
            few = product.first_rows(m)
            few.check(few(tile), tile)


@pytest.mark.parametrize(("a", "w", "zeros"), COMBINATIONS)
def test_planned_tiles(a, w, zeros, seed):
    rng = random.Random(seed)
    product, _ = drawn(rng, a, w, zeros, 16)
    m = rng.choice((1, 2, 5, 8, 9, 16))
    few = product.first_rows(m)
    tile = decode.candidates(few.problem.config, m)[0]
    few.check(few(tile), tile)
    few.check(called(few.problem), f"m={m}")  # by the family that is planned


@pytest.mark.parametrize(("warps", "bands", "depth"), TILES)
def test_tiles_of_every_shape(warps, bands, depth, seed):
    """Blocks with one, some and all of the row tiles; whole slabs of K and a part of one."""
    rng = random.Random(seed)
    tile = Tile(warps, bands, 64, depth, blocks=1)
    n, whole = rng.choice((200, 256)), warps * 64 * depth
    tiles = -(-n // (16 * bands))
    for slabs in rng.sample((1, 2, 3), 2):
        k = whole * slabs * rng.choice((1, 2)) - rng.choice((0, 128))
        config = make_config("float16", "uint4", "original", N=n, K=k, group_size=128)
        rows = rng.choice((1, 8, 16))
        tile = replace(tile, slabs=slabs)
        if not fits(config, rows, tile):
            rows = 1
        product = Product(draw(config, rows, seed, "cuda"))
        for blocks in (1, -(-tiles // 2), tiles):
            tile = replace(tile, blocks=blocks)
            product.check(product(tile), tile)


@pytest.mark.parametrize("a", ["float16", "bfloat16"])
@pytest.mark.parametrize("w", ["e4m3_float8", "e5m2_float8"])
def test_every_fp8_byte(w, a):
    """Row n holds byte n at k = n % 16 and zeros elsewhere; row k of A picks it out."""
    n = torch.arange(256, device="cuda")
    codes = torch.zeros((256, 16), dtype=torch.uint8, device="cuda")
    codes[n, n % 16] = n.to(torch.uint8)
    A = torch.eye(16, device="cuda").to(getattr(torch, a))
    config = make_config(a, w, N=256, K=16, group_size=-1, with_scaling=False, out_dtype="float32")
    product = Product(Problem(config, A, codes))
    picked = product(Tile(8, 1, 128, 1, 16))[n % 16, n].double()
    values = config.format.to_values(n.to(torch.uint8))
    assert torch.equal(picked.isnan(), values.isnan())
    assert torch.equal(picked[~picked.isnan()], values[~values.isnan()])


@pytest.mark.parametrize("w", ["int1", "uint3", "int4", "nf4", "e4m3_float8"])
def test_an_infinity_stays_in_its_row(w, seed):
    product, tile = unalike((w, "float16", None, -1, 8, Tile(8, 1, 256, 1, 65)), seed, k=70)
    clean = product(tile)
    product.A[3, 69] = float("inf")
    out, others = product(tile), torch.arange(8, device="cuda") != 3
    assert torch.equal(out[others], clean[others])
    values = product.config.format.to_values(product.problem.codes)[:, 69]
    assert bool(out[3][values != 0].isfinite().logical_not().all())


@pytest.mark.parametrize("a", ["float16", "bfloat16"])
def test_extreme_scales_neither_overflow_nor_vanish(a, seed):
    for size, scale in ((1e-3, 60000.0), (100.0, 1e-7)):
        problem = draw(make_config(a, "uint4", "original", N=200, K=320), 8, seed, "cuda")
        problem.A.mul_(size)
        problem.scale.fill_(scale)
        product = Product(replace(problem, config=replace(problem.config, out_dtype="float32")))
        product.check(product(Tile(8, 1, 64, 1, 13)))


# --- the same bits, whatever runs before and beside -----------------------------------------------


@each_unalike
def test_a_hundred_launches_give_the_same_bits(case, seed):
    product, tile = unalike(case, seed)
    once = Repeated(product, tile)
    outs = [product.out() for _ in range(100)]
    for out in outs:
        once.start(out)
    product.check(outs[0], tile)
    wrong = [i for i, out in enumerate(outs) if not torch.equal(out, outs[0])]
    assert wrong == []


@each_unalike
def test_graph_replays_with_changing_inputs(case, seed):
    product, tile = unalike(case, seed)
    once, out = Repeated(product, tile), product.out()
    inputs = [torch.roll(product.A, shift, dims=-1) for shift in range(10)]
    expected = []
    for A in inputs:
        expected.append(product(tile, A))
    product.check(expected[0], tile)
    graph = torch.cuda.CUDAGraph()
    A, outs = product.A, [product.out() for _ in range(3)]
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for out in outs:
            once.start(out)
    for _ in range(5):
        for given, wanted in zip(inputs, expected):
            A.copy_(given)
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            assert all(torch.equal(out, wanted) for out in outs)


def test_two_streams_at_once(seed):
    products = [unalike(case, seed + i) for i, case in enumerate(UNALIKE[1:4])]
    expected = [product(tile) for product, tile in products]
    for (product, tile), out in zip(products, expected):
        product.check(out, tile)
    repeated = [Repeated(product, tile) for product, tile in products]
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[tuple[int, torch.Tensor]] = []
    outs = [[[p.out() for p, _ in products] for _ in range(50)] for _ in streams]
    torch.cuda.synchronize()
    for turn in range(50):
        for stream, mine in zip(streams, outs):
            with torch.cuda.stream(stream):
                for i, once in enumerate(repeated):
                    once.start(mine[turn][i])
                    results.append((i, mine[turn][i]))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i]) for i, out in results)


def layers(seed, m) -> list[tuple[Product, Tile]]:
    """Twenty square products of unlike formats and tiles whose results stay about as large as A."""
    found = []
    for i in range(20):
        w, zeros, tile = (
            ("uint4", "original", Tile(8, 2, 64, 4, 32)),
            ("int4", None, Tile(8, 1, 128, 1, 20, slabs=2)),
            ("nf4", None, Tile(16, 1, 64, 1, 64)),
        )[i % 3]
        config = make_config("float16", w, zeros, N=1024, K=1024, group_size=128)
        problem = draw(config, m, seed + i, "cuda")
        problem.scale.mul_(problem.A.double().norm() / problem.expected().norm())
        found.append((Product(problem), tile))
    return found


@pytest.mark.parametrize("results", [20, 2])
@pytest.mark.parametrize("m", [1, 8])
def test_each_kernel_waits_for_the_one_that_writes_its_input(m, results, seed):
    """With results of their own, NaN until written; and with two, each read before it is
    written again."""
    chain = layers(seed, m)
    repeated = [Repeated(product, tile) for product, tile in chain]
    first = chain[0][0].A

    def run(outs: list[torch.Tensor], wait: bool) -> torch.Tensor:
        A = first
        for i, once in enumerate(repeated):
            out = outs[i % len(outs)]
            once.start(out, A, settled=not wait)
            if wait:
                torch.cuda.synchronize()
            A = out
        return A.clone()

    expected = run([chain[0][0].out() for _ in range(20)], wait=True)
    assert bool(expected.isfinite().all())
    for _ in range(20):
        outs = [chain[0][0].out() for _ in range(results)]
        assert torch.equal(run(outs, wait=False), expected)


@pytest.mark.parametrize("case", UNALIKE[:4], ids=str)
def test_an_input_written_just_before(case, seed):
    product, tile = unalike(case, seed)
    once, A = Repeated(product, tile), product.A.clone()
    inputs = [torch.roll(A, shift, dims=-1) for shift in range(30)]
    expected = [product(tile, given) for given in inputs]
    outs = [product.out() for _ in inputs]
    torch.cuda.synchronize()
    for given, out in zip(inputs, outs):
        A.fill_(float("nan"))
        torch.add(given, 0, out=A)
        once.start(out, A)
    assert all(torch.equal(out, wanted) for out, wanted in zip(outs, expected))


@pytest.fixture
def flags(monkeypatch):
    """What each prepared call was told of its weights: whether they may be read early."""
    seen: list[bool] = []
    run = Prepared.run

    def recorded(self, addresses, settled=False):
        seen.append(bool(settled))
        run(self, addresses, settled)

    monkeypatch.setattr(Prepared, "run", recorded)
    return seen


@pytest.mark.parametrize("name", ["W", "scale", "zeros"])
@pytest.mark.parametrize("m", [1, 8, 16])
def test_weights_written_just_before(name, m, seed, flags):
    config = make_config("float16", "uint4", "original", N=1024, K=4096, group_size=128)
    problems = [draw(config, m, seed + i, "cuda") for i in range(2)]
    problems[1] = replace(problems[0], **_drawn_anew(name, problems[1]))
    matmul = bitblas.Matmul(config)
    sets = []
    for problem in problems:
        W = matmul.transform_weight(logical_weight(problem))
        sets.append({"W": W, **problem.extras()})
    operands = {key: x.clone() for key, x in sets[0].items()}
    A, outs = problems[0].A, []
    matmul(A, **operands), matmul(A, **operands), matmul(A, **operands)
    assert (flags[0], flags[-1]) == (False, True)
    for turn in range(20):
        operands[name].copy_(sets[turn % 2][name])
        outs.append(matmul(A, **operands))
        assert flags[-1] is False
    expected = [problem.expected() for problem in problems]
    for turn, out in enumerate(outs):
        assert relative_error(out, expected[turn % 2]) <= tolerance(config)


def _drawn_anew(name: str, other: Problem) -> dict[str, torch.Tensor]:
    field = "codes" if name == "W" else name
    return {field: getattr(other, field)}


# --- the same bits for a row, whatever rows are beside it: 2..8 of A, or 9..16 --------------------


@each_unalike
def test_a_row_has_the_same_bits_in_every_place(case, seed):
    """Of a batch of up to 8 rows, or of 9 to 16: they share a kernel."""
    rows = 16 if case[4] == 16 else 8
    product, tile = unalike((*case[:4], rows, case[5]), seed)
    whole = product(tile)
    product.check(whole, tile)
    for shift in range(1, rows):
        assert torch.equal(product(tile, product.A.roll(shift, 0)), whole.roll(shift, 0))
    for m in range(2 if rows == 8 else 9, rows):
        assert torch.equal(product(tile, product.A[:m]), whole[:m])


@pytest.mark.parametrize("w", ["uint4", "nf4", "uint3"])
def test_planned_products_of_a_row_do_not_depend_on_the_batch(w, seed):
    config = make_config("float16", w, N=1000, K=4096, group_size=128)
    problem = draw(config, 16, seed, "cuda")
    matmul = bitblas.Matmul(config)
    W = matmul.transform_weight(logical_weight(problem))
    for least, most in ((2, 8), (9, 16)):
        whole = matmul(problem.A[:most], W, **problem.extras())
        for m in range(least, most):
            assert torch.equal(matmul(problem.A[:m], W, **problem.extras()), whole[:m])
    alone = matmul(problem.A[:1], W, **problem.extras())
    assert relative_error(alone, replace(problem, A=problem.A[:1]).expected()) <= tolerance(config)
