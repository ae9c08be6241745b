"""Attention on a GPU: every kind of cache through every kernel, against float64."""

import pytest
import torch
from attention_cases import CACHES, Problem, draw

import bitblas
from bitblas import FlashAtten, QuantizedKV, quantize_kv, reference

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bitblas.kernels import compile as compiler

pytestmark = pytest.mark.gpu


def run(problem, backend="auto"):
    output = torch.full_like(problem.tensors[0], float("nan"))
    FlashAtten(problem.config, backend=backend)(*problem.tensors, output, **problem.extras)
    problem.check(output)
    return output


FEW = [
    *((cache, cache, dim) for cache in CACHES for dim in (64, 128)),
    ("int4", "int4", 256), ("int8", "int8", 256), ("int4", "int8", 128), ("float16", "int4", 128),
]  # fmt: skip


@pytest.mark.parametrize("k_cache, v_cache, dim", FEW)
def test_few_queries(k_cache, v_cache, dim):
    dtype = "bfloat16" if dim == 128 else "float16"
    shape = dict(heads=8, dim=dim, dtype=dtype, caches=(k_cache, v_cache), device="cuda")
    run(draw(q_len=1, k_len=1003, **shape))
    run(draw(q_len=1, k_len=1003, lengths=[1003, 77], causal=True, **shape))
    run(draw(q_len=3, k_len=517, causal=True, **shape))


@pytest.mark.parametrize("k_cache, v_cache, dim", FEW)
def test_some_dozens_of_rows(k_cache, v_cache, dim):
    """17, 20, 32, 33, 64 and 160 rows of a key head."""
    dtype = "bfloat16" if dim == 128 else "float16"
    shape = dict(kv_heads=2, dim=dim, dtype=dtype, caches=(k_cache, v_cache), device="cuda")
    run(draw(q_len=17, heads=2, k_len=1003, causal=True, **shape))
    run(draw(q_len=5, heads=8, k_len=517, lengths=[517, 0], **shape))
    run(draw(q_len=8, heads=8, k_len=1003, lengths=[1003, 77], causal=True, **shape))
    run(draw(q_len=33, heads=2, k_len=4001, **shape))
    run(draw(q_len=16, heads=8, k_len=1003, causal=True, **shape))
    run(draw(q_len=40, heads=8, k_len=301, lengths=[301, 35], causal=True, **shape))


@pytest.mark.parametrize("cache", CACHES[1:])
@pytest.mark.parametrize("q_len, dim", [(8, 128), (16, 128), (32, 128), (16, 64)])
def test_some_dozens_of_rows_whose_scores_and_scales_rise(cache, q_len, dim):
    """Every launch gives the same bits."""
    shape = dict(heads=8, kv_heads=2, dim=dim, caches=(cache, cache), device="cuda")
    problem = draw(q_len=q_len, k_len=3001, causal=True, **shape)
    rising = torch.arange(3001, device="cuda")[None, :, None]
    problem.extras["k_scale"] *= (1 + rising / 100).half()
    problem.extras["v_scale"] *= torch.exp2(rising / 400.0).half()
    first = run(problem)
    for _ in range(100):
        assert torch.equal(run_again(problem), first)


def run_again(problem):
    output = torch.full_like(problem.tensors[0], float("nan"))
    return FlashAtten(problem.config)(*problem.tensors, output, **problem.extras)


@pytest.mark.parametrize("cache", CACHES[1:])
def test_some_dozens_of_rows_over_a_growing_cache(cache):
    """Of one prepared call; what lies behind is no part of the tensors. And one cache for all."""
    whole = draw(q_len=16, heads=8, k_len=1000, dim=128, caches=(cache, cache), device="cuda")
    Q, K, V = whole.tensors
    for k_len in (700, 1000, 801, 65):
        extras = {name: x[:, :k_len] for name, x in whole.extras.items()}
        run(Problem(whole.config, (Q, K[:, :k_len], V[:, :k_len]), extras))
    same = [x[:1].expand_as(x) for x in (K, V, *whole.extras.values())]
    run(Problem(whole.config, (Q, *same[:2]), dict(zip(whole.extras, same[2:]))))


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("dim, q_len", [(128, 1), (256, 1), (128, 4), (128, 8), (128, 16)])
def test_many_keys_whose_values_nearly_cancel(cache, dim, q_len):
    shape = dict(batch=1, heads=8, kv_heads=2, dim=dim, caches=(cache, cache), device="cuda")
    run(draw(q_len=q_len, k_len=131001, **shape))


def test_after_warmup_nothing_is_compiled(monkeypatch):
    problem = draw(batch=1, heads=8, k_len=700, dim=128, caches=("int4", "int8"), device="cuda")
    bitblas.warmup(problem.config, m=1, progress=False)

    def refuse(*arguments):
        raise AssertionError("compiled")

    monkeypatch.setattr(compiler.Source, "_compile", refuse)
    run(problem)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("layout, dim", [("nnn", 72), ("ntn", 128)])
def test_odd_lengths_and_dims(cache, layout, dim):
    shape = dict(dim=dim, layout=layout, caches=(cache, cache), device="cuda")
    run(draw(q_len=33, k_len=47, causal=True, **shape))
    run(draw(q_len=257, k_len=257, **shape))
    run(draw(q_len=70, k_len=301, lengths=[301, 69], causal=True, **shape))


@pytest.mark.parametrize("backend", ["triton", "cudnn", "flash", "torch"])
@pytest.mark.parametrize("cache", ["float16", "int4"])
@pytest.mark.parametrize("layout", ["nnn", "ntn"])
def test_backends_that_are_asked_for(backend, cache, layout):
    for causal, q_len in ((False, 70), (True, 130 if backend == "cudnn" else 70)):
        shape = dict(q_len=q_len, k_len=130, dim=64, layout=layout, causal=causal)
        run(draw(**shape, caches=(cache, cache), device="cuda"), backend)


def test_cudnn_masks_equal_lengths_only():
    problem = draw(q_len=3, k_len=9, causal=True, device="cuda")
    with pytest.raises(ValueError, match="backend: 'cudnn' masks causally for equal lengths only"):
        run(problem, "cudnn")


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("q_len", [1, 8, 40])
def test_equal_calls_give_equal_bits(cache, q_len):
    problem = draw(q_len=q_len, heads=8, k_len=3001, dim=128, caches=(cache, cache), device="cuda")
    first = run(problem)
    operator = FlashAtten(problem.config)
    for _ in range(100):
        assert torch.equal(operator(*problem.tensors, **problem.extras), first)


@pytest.mark.parametrize("cache", CACHES)
def test_misaligned_operands(cache):
    """Views whose first byte is no multiple of 16 take kernels of their own."""
    problem = draw(heads=8, k_len=300, dim=64, caches=(cache, cache), device="cuda")
    Q, K, V = problem.tensors
    problem.tensors = (Q, K[:, 3:, 1:], V[:, 3:, 1:])
    for name, x in problem.extras.items():
        problem.extras[name] = x[:, 3:, 1:]
    fields = {name: getattr(problem.config, name) for name in problem.config.__dataclass_fields__}
    problem.config = type(problem.config)(**{**fields, "kv_heads": 1})
    run(problem)


@pytest.mark.parametrize("cache", CACHES)
def test_a_graph_follows_a_growing_cache(cache):
    """One captured step serves all lengths: kv_len is read on the GPU, tokens are written there."""
    batch, longest, heads, dim = 2, 64, 2, 64
    problem = draw(batch, 1, 4, heads, longest, dim, caches=(cache, cache), device="cuda")
    operator = FlashAtten(problem.config)
    kv_len = torch.zeros(batch, dtype=torch.int32, device="cuda")
    Q, new = (torch.randn(batch, 1, n, dim, device="cuda").half() for n in (4, heads))
    if cache == "float16":
        K, V = (torch.zeros(batch, longest, heads, dim, device="cuda").half() for _ in range(2))
        extras = {}
    else:
        caches = [QuantizedKV.empty(batch, longest, heads, dim, cache, device="cuda") for _ in "kv"]
        K, V = (each.codes for each in caches)
        extras = {f"{n}_scale": each.scale for n, each in zip("kv", caches)}
        if cache == "int4":
            extras |= {f"{n}_zeros": each.zeros for n, each in zip("kv", caches)}

    def step():
        if cache == "float16":
            rows = torch.arange(batch, device="cuda")
            K[rows, kv_len], V[rows, kv_len] = new[:, 0], -new[:, 0]
        else:
            caches[0].write(new, kv_len)
            caches[1].write(-new, kv_len)
        kv_len.add_(1)
        return operator(Q, K, V, **extras, kv_len=kv_len)

    step()
    kv_len.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    kv_len.copy_(torch.tensor([0, 5]))
    for _ in range(9):
        new.copy_(torch.randn_like(new))
        Q.copy_(torch.randn_like(Q))
        graph.replay()
        expected = reference.attention(problem.config, Q, K, V, **extras, kv_len=kv_len)
        assert (out.double() - expected).norm() / expected.norm() < 2e-3
    assert kv_len.tolist() == [9, 14]


def test_quantisation_is_that_of_the_cpu():
    x = torch.randn(2, 33, 3, 64).half()
    for dtype in CACHES[1:]:
        for ours, theirs in zip(quantize_kv(x.cuda(), dtype), quantize_kv(x, dtype)):
            if ours is not None:
                difference = (ours.cpu().float() - theirs.float()).abs()
                assert (difference > 0).float().mean() < 1e-3
