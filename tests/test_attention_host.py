"""The host side of attention on a GPU, on a driver that runs nothing: what is started with what,
and what calls keep."""

from functools import partial

import pytest
import torch
from attention_cases import draw, meta_operands
from fake_cuda import FakeCuda, install

from bitblas import attention_ops

pytest.importorskip("triton")
from bitblas.kernels import attention, versions
from bitblas.kernels.compile import Source


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    install(monkeypatch, fake)
    monkeypatch.setattr(attention, "current_device", lambda: 0)
    monkeypatch.setattr(attention, "architecture", lambda device: 90)
    monkeypatch.setattr(attention, "_multiprocessors", lambda device: 132)
    monkeypatch.setattr(attention, "_prepared", {})
    return fake


def operands(k_len, longest=64, offset=0, **fields):
    """The first k_len tokens of a cache for `longest`."""
    problem = draw(1, 1, 8, 2, longest, 64, lengths=[k_len], **fields)
    Q, K, V = problem.tensors
    extras = {name: x[:, offset:k_len] for name, x in problem.extras.items() if name != "kv_len"}
    cut = slice(offset, k_len)
    return attention.Operands(Q, K[:, cut], V[:, cut], **extras, lengths=problem.extras["kv_len"])


def arguments(launched, launch):
    """name -> what the kernel of a launch was given."""
    names = [name for name, kind in Source(launch).signature.items() if kind != "constexpr"]
    return dict(zip(names, launched.values))


def test_kernels_get_their_operands(cuda):
    given = operands(3300, longest=4096, caches=("int4", "int8"))
    out = torch.empty_like(given.Q)
    attention.run(given, out, causal=True)
    tile = attention.tile_for(given, 90, 132, 4096)
    attend, combine = attention.launches(given, out, True, tile, 90)
    first, second = cuda.launched
    found = arguments(first, attend)
    for name, x in (("Q", given.Q), ("K", given.K), ("V", given.V), ("K_SCALE", given.k_scale),
                    ("K_ZEROS", given.k_zeros), ("V_SCALE", given.v_scale),
                    ("LENGTHS", given.lengths)):  # fmt: skip
        assert found[name] == x.data_ptr()
    assert found["k_len"] == 3300
    assert first.grid == (1, 2, tile.splits) and first.threads == 32 * tile.num_warps
    assert arguments(second, combine)["OUT"] == out.data_ptr()
    assert arguments(second, combine)["PARTS"] == found["OUT"]
    assert (first.attributes, second.attributes) == (0, 1)  # programmatic launch


def test_programmatic_launch_can_be_switched_off(monkeypatch):
    monkeypatch.setattr(attention, "PROGRAMMATIC_LAUNCH", False)
    given = operands(3300, longest=4096)
    tile = attention.Tile(16, 64, 4, 2, splits=3)
    steps = attention.launches(given, torch.empty_like(given.Q), True, tile, 90)
    assert len(steps) == 2
    assert not any(x.constants["PDL"] or "launch_pdl" in x.options for x in steps)


def test_a_growing_cache_keeps_its_call(cuda):
    given = operands(64, caches=("int8", "int8"))
    out = torch.empty_like(given.Q)
    for k_len in (33, 40, 64):
        shorter = [None if x is None else x[:, :k_len] for x in given[1:7]]
        attention.run(attention.Operands(given.Q, *shorter, given.lengths), out, causal=False)
    assert len(attention._prepared) == 1
    tile = attention.tile_for(given, 90, 132, 64)
    launches = attention.launches(given, out, False, tile, 90)
    steps = cuda.launched[:: len(launches)]
    assert [arguments(x, launches[0])["k_len"] for x in steps] == [33, 40, 64]


def test_maps_of_a_growing_cache_end_where_it_does(cuda):
    problem = draw(1, 40, 2, 2, 1000, 64, caches=("int8", "int4"))
    Q, K, V = problem.tensors
    for k_len in (700, 1000, 700):
        extras = {name: x[:, :k_len] for name, x in problem.extras.items()}
        given = attention.Operands(Q, K[:, :k_len], V[:, :k_len], **extras)
        assert attention.tile_for(given, 90, 132, 1024).kernel == "rows"
        attention.run(given, torch.empty_like(Q), causal=False)
    assert len(attention._prepared) == 1
    found = [(x.address, x.shape, x.strides, x.box) for x in cuda.encoded]
    assert found == [
        (x.data_ptr(), (width, 2, k_len, 1), (width, 2 * width, width), (width, 1, 64, 1))
        for k_len in (700, 1000, 700) for x, width in ((K, 64), (V, 32))
    ]  # fmt: skip


def test_misaligned_caches_are_not_for_the_kernel_that_reads_words(cuda):
    given = operands(63, offset=1, caches=("int8", "int8"))  # scales from the second on
    attention.run(given, torch.empty_like(given.Q), causal=False)
    assert not attention._prepared
    tile = attention.tile_for(given, 0, 132, 64)
    assert tile.kernel == "many"
    launch = attention.launches(given, torch.empty_like(given.Q), False, tile, 90)[0]
    assert arguments(cuda.launched[0], launch)["K_SCALE"] == given.k_scale.data_ptr()


def test_expanding_gets_its_operands(cuda):
    given = operands(40, caches=("int4", "int4"))
    out = attention.expand(given.K, given.Q, given.k_scale, given.k_zeros)
    assert out.shape == (1, 40, 2, 64) and out.dtype == torch.float16
    launch = attention.expand_launch(given.K, out, given.k_scale, given.k_zeros, 90)
    found = arguments(cuda.launched[0], launch)
    assert found["X"] == given.K.data_ptr() and found["OUT"] == out.data_ptr()
    assert found["SCALES"] == given.k_scale.data_ptr() and found["length"] == 40


def test_expanding_copies_what_neither_tokens_nor_dims_have_contiguous(cuda):
    given = operands(40)
    K = torch.zeros(1, 40, 2, 128, dtype=torch.float16)[..., ::2]
    attention.expand(K, given.Q)
    launch = attention.expand_launch(K.contiguous(), torch.empty(1, 40, 2, 64), None, None, 90)
    found = arguments(cuda.launched[0], launch)
    assert found["X"] != K.data_ptr()
    assert (found["x_token"], found["x_head"]) == (128 // 8, 64 // 8)


@pytest.mark.parametrize(
    "cache, layout, q_len",
    [("int4", "nnn", 1), ("float16", "nnn", 3), ("int8", "nnn", 200), ("float16", "ntn", 200)],
)
def test_warm_up_finds_the_kernels_that_calls_start(cuda, monkeypatch, cache, layout, q_len):
    monkeypatch.setattr(attention_ops, "_cudnn_serves", lambda *_: True)
    started = set()

    def spy(make, *arguments):
        steps = make(*arguments)
        started.update(Source(x).key for x in (steps if isinstance(steps, list) else [steps]))
        return steps

    for name in ("launches", "expand_launch"):
        monkeypatch.setattr(attention, name, partial(spy, getattr(attention, name)))
    problem = draw(2, q_len, 8, 2, 300, 64, "bfloat16", (cache, cache), layout)
    device = torch.device("cuda", 0)
    found = {x.key for x in attention_ops.sources(problem.config, "auto", q_len, device)}
    started.clear()
    Q, K, V = problem.tensors
    if layout == "ntn":
        K = K.permute(0, 3, 2, 1)
    given = attention.Operands(Q, K, V, **problem.extras)
    if q_len == 200:  # 16-bit copies for cuDNN, and where Triton serves but quantised caches not
        attention.expand(K, Q, given.k_scale, None)
        if cache == "int8":
            attention.expand(V, Q, given.v_scale, None)
            given = attention.Operands(Q, *(torch.empty(2, 300, 2, 64).bfloat16() for _ in "KV"))
    else:
        attention.run(given, torch.empty_like(Q), False)
    lengths = torch.ones(2, dtype=torch.int32)
    attention.run(given._replace(lengths=lengths), torch.empty_like(Q), False)
    assert started == found


@pytest.mark.parametrize(
    ("cache", "dim", "keys"), [("int8", 256, 32), ("e4m3_float8", 128, 64), ("int8", 128, 128)]
)
def test_tiles_for_releases_that_take_more_registers(monkeypatch, cache, dim, keys):
    """Triton 3.8 on: plain kernels over quantised caches of wide rows and e4m3 are cut smaller."""
    given = meta_operands(cache, 8, dim, torch.float16, layout="ntn")
    monkeypatch.setattr(versions, "takes_more_registers", lambda: True)
    tile = attention.tile_for(given, 90, 132, 32768)
    assert tile.kernel == "many" and tile.block_n == keys
    assert tile.num_warps == (4 if (cache, dim) == ("int8", 128) else 8)
