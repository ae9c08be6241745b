"""The batch family on a GPU: results against float64, the same bits however it is started.

Tiles of every kind are given to the family itself; the planned one is reached through Matmul.
"""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from calls import logical_weight
from compat import make_config
from problems import draw, relative_error, tolerance

import bitblas

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from batch_cases import COMBINATIONS, DTYPES, BatchProduct, Repeated, drawn, drawn_config

from bitblas import plan
from bitblas.kernels import batch
from bitblas.kernels.batch import Tile
from bitblas.kernels.prepared import Prepared

if torch.cuda.get_device_capability()[0] != 9 or not batch.gluon_available():
    pytest.skip("needs Hopper and Gluon", allow_module_level=True)

pytestmark = pytest.mark.gpu

# format, dtype, zeros mode, group, rows, tile; N = 1040 is no whole number of tiles
UNALIKE = [
    ("uint4", "float16", "original", 128, 64, Tile(64, 1, 2, 64, 10, 4, 132)),
    ("uint4", "float16", "original", 128, 200, Tile(128, 2, 2, 64, 6, 2, 9)),
    ("uint4", "bfloat16", "quantized", 32, 32, Tile(32, 1, 2, 64, 3, 2, 40)),
    ("int4", "float16", None, 64, 250, Tile(256, 1, 2, 64, 4, 2, 132)),
    ("int4", "bfloat16", None, 128, 90, Tile(96, 1, 2, 128, 4, 1, 132)),
    ("uint4", "float16", "original", 64, 310, Tile(320, 1, 2, 64, 3, 2, 17)),
    ("uint4", "float16", "original", 256, 150, Tile(192, 1, 2, 64, 4, 4, 60)),
    ("int4", "bfloat16", None, 128, 160, Tile(160, 1, 2, 64, 5, 2, 30)),
    ("uint4", "float16", "quantized", 128, 190, Tile(192, 1, 2, 128, 3, 1, 132)),
    ("uint3", "float16", "rescale", 256, 100, Tile(128, 1, 2, 256, 2, 1, 33)),
    ("int2", "bfloat16", None, 128, 40, Tile(64, 2, 2, 128, 4, 2, 11)),
    ("int1", "float16", None, -1, 300, Tile(64, 1, 2, 256, 3, 1, 132, share=False)),
    ("uint8", "bfloat16", "original", 64, 129, Tile(192, 1, 2, 64, 4, 2, 7)),
    ("nf4", "bfloat16", None, 64, 64, Tile(64, 2, 2, 64, 6, 2, 132)),
    ("nvfp4", "float16", None, 16, 17, Tile(32, 1, 2, 64, 8, 2, 132)),
    ("e4m3_float8", "float16", None, 128, 1000, Tile(256, 1, 2, 64, 3, 2, 20)),
    # consumers along k; up to 16 rows of A, raw operands
    ("uint4", "float16", "original", 128, 8, Tile(8, 1, 4, 1024, 4, 1, 132, along_k=4)),
    ("uint4", "bfloat16", "quantized", 64, 5, Tile(8, 1, 4, 512, 5, 1, 40, along_k=4)),
    ("uint3", "float16", "rescale", 512, 7, Tile(8, 1, 4, 1024, 3, 1, 13, along_k=4)),
    ("int1", "float16", None, 128, 3, Tile(8, 1, 4, 1024, 4, 1, 17, share=False, along_k=4)),
    ("uint4", "float16", "rescale", 128, 16, Tile(16, 1, 4, 512, 5, 1, 132, along_k=4)),
    ("uint3", "bfloat16", "original", 128, 11, Tile(16, 1, 4, 1024, 3, 1, 33, along_k=4)),
    ("uint4", "float16", "quantized", 128, 13, Tile(16, 1, 4, 1024, 3, 1, 132, along_k=4)),
    ("nf4", "float16", None, 64, 32, Tile(32, 1, 4, 512, 2, 1, 21, along_k=4)),
    ("int2", "bfloat16", None, -1, 64, Tile(64, 1, 4, 256, 3, 1, 132, along_k=2)),
]


def unalike(case, seed, k=4096) -> tuple[BatchProduct, Tile]:
    w, a, zeros, group, m, tile = case
    config = make_config(a, w, zeros, N=1040, K=k, group_size=group)
    return BatchProduct(draw(config, m, seed, "cuda")), tile


def each_unalike(test):
    return pytest.mark.parametrize("case", UNALIKE, ids=lambda case: "-".join(map(str, case[:5])))(
        test
    )


# --- against float64 ------------------------------------------------------------------------------


@pytest.mark.parametrize(("a", "w", "zeros"), COMBINATIONS)
def test_any_product_in_any_tile(a, w, zeros, seed):
    rng = random.Random(seed)
    for rows in ((2, 16), (17, 64), (65, 700)):
        product, tile = drawn(rng, a, w, zeros, rng.randint(*rows))
        product.check(product(tile), tile)


@pytest.mark.parametrize(("a", "w", "zeros"), COMBINATIONS)
def test_planned_tiles(a, w, zeros, seed):
    rng = random.Random(seed)
    config = drawn_config(rng, a, w, zeros)
    product = BatchProduct(draw(config, rng.choice((17, 32, 50, 128, 200, 513)), seed, "cuda"))
    matmul = bitblas.Matmul(config)
    W = matmul.transform_weight(logical_weight(product.problem))
    assert plan.pick(config, product.A.shape[0], W.device)[0] is batch
    first = matmul(product.problem.A, W, **product.problem.extras())
    product.check(first)
    assert torch.equal(matmul(product.problem.A, W, **product.problem.extras()), first)


@pytest.mark.parametrize(
    ("a", "w", "m"),
    [("float16", "uint4", 1040), ("bfloat16", "uint4", 800), ("int8", "int4", 1100)],
)
def test_a_product_in_two_sections(a, w, m, seed):
    zeros = "original" if w == "uint4" else None
    group = 128 if a != "int8" else -1
    config = make_config(a, w, zeros, N=8192, K=2048, group_size=group, with_bias=True)
    problem = draw(config, m, seed, "cuda", with_input_scale=a == "int8")
    matmul = bitblas.Matmul(config)
    W = matmul.transform_weight(logical_weight(problem))
    assert len(plan.sections(config, m, W.device)) == 2
    first = matmul(problem.A, W, **problem.extras())
    BatchProduct(problem).check(first)
    for _ in range(2):  # by way of the prepared call
        assert torch.equal(matmul(problem.A, W, **problem.extras()), first)


def test_a_batch_that_starts_off_16_bytes(seed):
    config = make_config("float16", "uint4", "original", N=200, K=320, group_size=64)
    product = BatchProduct(draw(config, 40, seed, "cuda"), shift=2)
    matmul = bitblas.Matmul(config)
    W = matmul.transform_weight(logical_weight(product.problem))
    product.check(matmul(product.A, W, **product.problem.extras()))


@pytest.mark.parametrize("a", DTYPES)
@pytest.mark.parametrize("zeros", ["original", "quantized"])
def test_integer_zero_points_lose_nothing(a, zeros, seed):
    """With zero points far larger than the weights that they leave: (code - zero) * scale is as
    exact as one rounding makes it."""
    config = make_config(a, "uint4", zeros, N=256, K=1024, group_size=128)
    problem = draw(config, 64, seed, "cuda")
    problem.A.abs_()  # so that errors of the same sign would add up
    if zeros == "original":
        problem.zeros.round_()
    product = BatchProduct(problem)
    product.check(product(Tile(64, 1, 2, 64, 6, 2, 132)))


@pytest.mark.parametrize("w", ["int1", "uint3", "int4", "nf4", "e4m3_float8"])
def test_an_infinity_stays_in_its_row(w, seed):
    product, tile = unalike((w, "float16", None, -1, 40, Tile(64, 1, 2, 256, 3, 1, 9)), seed, k=72)
    clean = product(tile)
    product.A[3, 69] = float("inf")
    out, others = product(tile), torch.arange(40, device="cuda") != 3
    assert torch.equal(out[others], clean[others])


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
    products = [unalike(case, seed + i) for i, case in enumerate(UNALIKE[:3])]
    expected = [product(tile) for product, tile in products]
    repeated = [Repeated(product, tile) for product, tile in products]
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[tuple[int, torch.Tensor]] = []
    outs = [[[p.out() for p, _ in products] for _ in range(30)] for _ in streams]
    torch.cuda.synchronize()
    for turn in range(30):
        for stream, mine in zip(streams, outs):
            with torch.cuda.stream(stream):
                for i, once in enumerate(repeated):
                    once.start(mine[turn][i])
                    results.append((i, mine[turn][i]))
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected[i]) for i, out in results)


@pytest.mark.parametrize("results", [20, 2])
@pytest.mark.parametrize("m", [6, 24, 100])
def test_each_kernel_waits_for_the_one_that_writes_its_input(m, results, seed):
    """Twenty products in a row, with results of their own, NaN until written; and with two, each
    read before it is written again."""
    chain = []
    for i in range(20):
        w, zeros, tile = (
            ("uint4", "original", Tile(8 if m <= 8 else 16, 1, 4, 1024, 3, 1, 16, along_k=4)),
            ("uint4", "original", Tile(128, 1, 2, 64, 6, 2, 132)),
            ("int4", None, Tile(32, 1, 2, 64, 6, 4, 20)),
            ("nf4", None, Tile(64, 2, 2, 64, 4, 2, 132, share=False)),
        )[i % 4]
        config = make_config("float16", w, zeros, N=1024, K=1024, group_size=128)
        problem = draw(config, m, seed + i, "cuda")
        problem.scale.mul_(problem.A.double().norm() / problem.expected().norm())
        chain.append((BatchProduct(problem), tile))
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


@pytest.mark.parametrize("name", ["W", "scale", "zeros"])
@pytest.mark.parametrize("m", [20, 256])
def test_weights_written_just_before(name, m, seed, monkeypatch):
    flags: list[bool] = []
    run = Prepared.run

    def recorded(self, addresses, settled=False):
        flags.append(bool(settled))
        run(self, addresses, settled)

    monkeypatch.setattr(Prepared, "run", recorded)
    config = make_config("float16", "uint4", "original", N=1024, K=4096, group_size=128)
    problems = [draw(config, m, seed + i, "cuda") for i in range(2)]
    field = "codes" if name == "W" else name
    problems[1] = replace(problems[0], **{field: getattr(problems[1], field)})
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


# --- the same bits for a row, whatever rows are beside it -----------------------------------------


@each_unalike
def test_a_row_has_the_same_bits_in_every_place(case, seed):
    """Of a tile: where tiles of A's rows share a product's work, they do it in different parts."""
    product, tile = unalike(case, seed)
    product = product.first_rows(min(product.A.shape[0], tile.block_m))
    whole = product(tile)
    for shift in (1, 7, 16):
        assert torch.equal(product(tile, product.A.roll(shift, 0)), whole.roll(shift, 0))
    for m in (17, whole.shape[0] - 1):
        assert torch.equal(product(tile, product.A[:m]), whole[:m])


@pytest.mark.parametrize("w", ["uint4", "nf4", "uint3"])
def test_planned_products_of_a_row_do_not_depend_on_the_batch(w, seed):
    """Within each of the ranges of m whose tiles, and so the parts of K, are the same."""
    config = make_config("float16", w, N=1000, K=4096, group_size=128)
    problem = draw(config, 320, seed, "cuda")
    matmul = bitblas.Matmul(config)
    W = matmul.transform_weight(logical_weight(problem))
    ranges = itertools.groupby(range(2, 321), batch.rows_of_bucket)
    for least, *_, most in (list(rows) for _, rows in ranges):
        whole = matmul(problem.A[:most], W, **problem.extras())
        for m in (least, (least + most) // 2, most - 1):
            assert torch.equal(matmul(problem.A[:m], W, **problem.extras()), whole[:m])
