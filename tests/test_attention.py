"""FlashAtten, on the GPU if there is one, else the CPU: results, border, choice, compilation."""

import logging

import pytest
import torch
from attention_cases import CACHES, Problem, draw
from torch.autograd import forward_ad

import bitblas
from bitblas import FlashAtten, FlashAttenConfig, attention_ops, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def call(problem: Problem, backend: str = "auto", **more) -> torch.Tensor:
    operator = FlashAtten(problem.config, backend=backend)
    return operator(*problem.tensors, **problem.extras, **more)


# --- results


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["nnn", "ntn"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len, k_len, kv_heads", [(33, 33, 4), (1, 40, 2), (7, 19, 1)])
def test_matches_float64(dtype, layout, causal, q_len, k_len, kv_heads):
    shape = dict(q_len=q_len, k_len=k_len, kv_heads=kv_heads)
    problem = draw(dtype=dtype, layout=layout, causal=causal, device=DEVICE, **shape)
    output = torch.full_like(problem.tensors[0], float("nan"))
    assert call(problem, output=output) is output
    problem.check(output)


MIXED = [("int8", "int4"), ("float16", "e4m3_float8"), ("int4", "float16")]


@pytest.mark.parametrize("caches", [*zip(CACHES, CACHES), *MIXED])
@pytest.mark.parametrize("q_len, layout", [(1, "nnn"), (5, "ntn"), (90, "nnn")])
def test_quantised_keys_and_values_match_float64(caches, q_len, layout):
    dtype = "bfloat16" if q_len == 5 else "float16"
    shape = dict(q_len=q_len, k_len=95, kv_heads=1, dim=64)
    problem = draw(dtype=dtype, caches=caches, layout=layout, causal=True, device=DEVICE, **shape)
    problem.check(call(problem))


@pytest.mark.parametrize("caches", list(zip(CACHES, CACHES)))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len", [1, 6])
def test_lengths_in_a_tensor(caches, causal, q_len):
    """What lies behind a length is not read; a query without a key gives zeros."""
    lengths = [3, 0, 41, 17]
    problem = draw(4, q_len, k_len=41, caches=caches, causal=causal, lengths=lengths, device=DEVICE)
    out = call(problem)
    problem.check(out)
    assert out[1].eq(0).all()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len", [1, 6])
def test_torch_takes_lengths_that_nothing_copies_to_the_host(cache, causal, q_len):
    """Meta tensors have no values to copy."""
    problem = draw(3, q_len, k_len=9, caches=(cache, cache), causal=causal, lengths=[9, 0, 4])
    names = ("k_scale", "k_zeros", "v_scale", "v_zeros", "kv_len")
    given = [*problem.tensors, *(problem.extras.get(name) for name in names)]
    Q, K, V, *numbers, kv_len = (None if x is None else x.to("meta") for x in given)
    out = attention_ops._by_torch(problem.config, "math", Q, K, V, tuple(numbers), kv_len)
    assert out.shape == Q.shape and out.dtype == Q.dtype


@pytest.mark.parametrize("backend", ["math", "torch"])
def test_lengths_out_of_range_are_clamped(backend):
    problem = draw(2, 6, k_len=9, causal=True, device=DEVICE)
    lengths = torch.tensor([11, -2], device=DEVICE)
    out = call(problem, backend, kv_len=lengths)
    problem.extras["kv_len"] = lengths.clamp(0, 9)
    problem.check(out)


@pytest.mark.parametrize("layout", ["nnn", "ntn"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_length_for_the_whole_batch(layout, cache):
    problem = draw(k_len=40, caches=(cache, cache), layout=layout, device=DEVICE)
    problem.extras["kv_len"] = 21
    problem.check(call(problem))


def test_no_keys_give_zeros():
    problem = draw(q_len=2, k_len=0, device=DEVICE)
    assert call(problem).eq(0).all()


@pytest.mark.parametrize("empty", [dict(batch=0), dict(q_len=0)])
def test_no_queries_give_nothing(empty):
    problem = draw(**empty, device=DEVICE)
    assert call(problem).shape == problem.tensors[0].shape


def test_strided_operands_and_output():
    problem = draw(q_len=9, k_len=21, device=DEVICE)
    wide = [torch.randn(*x.shape[:3], 2 * x.shape[3], device=DEVICE) for x in problem.tensors]
    views = [x.to(torch.float16)[..., ::2].copy_(y) for x, y in zip(wide, problem.tensors)]
    output = torch.zeros(2, 4, 9, 32, dtype=torch.float16, device=DEVICE).transpose(1, 2)
    assert FlashAtten(problem.config)(*views, output=output) is output
    problem.check(output)


def test_output_may_be_an_operand():
    problem = draw(q_len=21, k_len=21, kv_heads=4, device=DEVICE)
    expected = problem.expected()
    V = problem.tensors[2]
    call(problem, output=V)
    assert (V.double() - expected).norm() / expected.norm() < 2e-3


def test_tiny_values_keep_their_digits():
    """Scales times weights would be subnormal in float16."""
    for cache in CACHES[1:]:
        problem = draw(k_len=200, dim=64, caches=(cache, cache), value_scale=1e-4, device=DEVICE)
        problem.check(call(problem))


# --- the config


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(heads=3, kv_heads=2), "kv_heads: 2 does not divide"),
        (dict(layout="ttt"), "layout: got 'ttt'"),
        (dict(Q_dtype="float64"), "Q_dtype: got 'float64'"),
        (dict(K_dtype="uint4"), "K_dtype: got 'uint4'"),
        (dict(V_dtype="bfloat16"), "V_dtype: got 'bfloat16', expected Q_dtype"),
        (dict(Out_dtype="float32"), "Out_dtype: got 'float32'"),
        (dict(K_dtype="int8", dim=264), "dim: got 264, expected at most 256 with K_dtype 'int8'"),
        (dict(V_dtype="int4", dim=33), "dim: got 33, expected an even one with V_dtype 'int4'"),
        (dict(dim=0), "dim: got 0"),
    ],
)
def test_bad_config_is_named(change, match):
    fields = dict(batch=1, heads=2, seq_len=8, dim=32) | change
    with pytest.raises(ValueError, match=match):
        FlashAttenConfig(**fields)


def test_config_survives_its_key():
    config = FlashAttenConfig(1, 8, 2, 64, 128, K_dtype="int4", V_dtype="int8", is_causal=True)
    assert FlashAttenConfig.from_key(config.key) == config


# --- the border


def plain(**fields) -> Problem:
    return draw(1, 8, 2, 2, 8, device=DEVICE, **fields)


BAD_OPERANDS = [
    ("Q", TypeError, r"Q: got list, expected a tensor", lambda Q: [1]),
    ("K", ValueError, r"K: got shape \(1, 8, 2, 16\)", lambda K: K[..., :16]),
    ("K", ValueError, r"K: got shape \(1, 2, 8, 32\)", lambda K: K.transpose(1, 2)),
    ("V", TypeError, r"V: got torch.float32", lambda V: V.float()),
    ("V", ValueError, r"length 8, 7", lambda V: V[:, :7]),
    ("V", ValueError, r"batch 1, 2", lambda V: V.repeat(2, 1, 1, 1)),
]


@pytest.mark.parametrize("name, error, match, change", BAD_OPERANDS)
def test_bad_operand_is_named(name, error, match, change):
    operands = dict(zip("QKV", plain().tensors))
    operands[name] = change(operands[name])
    with pytest.raises(error, match=match):
        FlashAtten(plain().config)(**operands)


@pytest.mark.parametrize(
    "name, error, match, change",
    [
        ("k_scale", ValueError, "k_scale: missing, K_dtype is 'int4'", lambda x: None),
        ("v_zeros", ValueError, "v_zeros: missing, V_dtype is 'int4'", lambda x: None),
        ("k_scale", ValueError, r"k_scale: got shape \(1, 7, 2\)", lambda x: x[:, :7]),
        ("v_scale", TypeError, "v_scale: got torch.float64", lambda x: x.double()),
        ("k_zeros", ValueError, "k_zeros: got strides", lambda x: x.contiguous().clone()),
        ("kv_len", ValueError, r"kv_len: got 9, expected 0 to 8", lambda x: 9),
        ("kv_len", TypeError, r"kv_len: got 1.5", lambda x: 1.5),
        ("kv_len", TypeError, r"kv_len: got torch.float32", lambda x: torch.ones(1)),
        ("kv_len", ValueError, r"kv_len: got shape \(2,\)", lambda x: torch.ones(2).int()),
        ("output", ValueError, r"output: got shape \(1, 8, 2, 16\)",
         lambda x: torch.ones(1, 8, 2, 16)),
    ],
)  # fmt: skip
def test_bad_extra_is_named(name, error, match, change):
    problem = plain(caches=("int4", "int4"))
    extras = {**problem.extras, name: change(problem.extras.get(name))}
    with pytest.raises(error, match=match):
        FlashAtten(problem.config)(*problem.tensors, **extras)


def test_numbers_of_16_bit_keys_are_refused():
    problem = plain()
    with pytest.raises(ValueError, match="k_scale: got a tensor, but K_dtype is 'float16'"):
        call(problem, k_scale=torch.ones(1, 8, 2, dtype=torch.float16, device=DEVICE))


@pytest.mark.parametrize(
    "name, match, change",
    [
        ("K", r"K: got shape \(8,\), expected 4 dimensions", lambda K: K[0, :, 0, 0]),
        ("V", r"V: got shape \(8, 2, 16\), expected 4 dimensions", lambda V: V[0]),
        ("k_scale", r"k_scale: got shape \(\), expected 3 dimensions", lambda x: x[0, 0, 0]),
        ("v_zeros", r"v_zeros: got shape \(8, 2\), expected 3 dimensions", lambda x: x[0]),
    ],
)
def test_ranks_are_checked_before_a_length_shortens(name, match, change):
    problem = plain(caches=("int4", "int4"))
    operands = dict(zip("QKV", problem.tensors)) | problem.extras
    operands[name] = change(operands[name])
    with pytest.raises(ValueError, match=match):
        FlashAtten(problem.config)(**operands, kv_len=5)


def test_more_causal_queries_than_keys_are_refused():
    with pytest.raises(ValueError, match="Q: 5 causal queries need as many keys, got 4"):
        call(draw(q_len=5, k_len=4, causal=True, device=DEVICE))


# --- what serves


def test_unknown_backend_is_named():
    with pytest.raises(ValueError, match="backend: got 'fast', expected one of auto, triton"):
        FlashAtten(plain().config, backend="fast")


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU")
@pytest.mark.parametrize("backend", ["triton", "cudnn", "flash"])
def test_gpu_backends_are_refused_on_the_cpu(backend):
    with pytest.raises(ValueError, match=f"backend: '{backend}' runs on GPUs, Q is on cpu"):
        call(plain(), backend=backend)


@pytest.mark.parametrize("which", range(3))
def test_cudnn_gets_aligned_operands_only(monkeypatch, which):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tensors = list(plain().tensors)
    assert attention_ops._cudnn_serves(*tensors, tensors[0].device)
    x = tensors[which]
    tensors[which] = x.new_zeros(x.numel() + 1)[1:].view(x.shape)
    assert not attention_ops._cudnn_serves(*tensors, tensors[0].device)


@pytest.mark.parametrize("backend", ["math", "torch"])
@pytest.mark.parametrize("cache", CACHES)
def test_torch_can_be_asked_for(backend, cache):
    problem = draw(q_len=3, k_len=9, causal=True, caches=(cache, cache), device=DEVICE)
    assert FlashAtten(problem.config, backend=backend).choice(*problem.tensors) == backend
    problem.check(call(problem, backend))


def test_the_choice_is_logged_once(caplog):
    problem = draw(k_len=47, heads=6, kv_heads=3, device=DEVICE)
    operator = FlashAtten(problem.config)
    assert operator.backend == "auto"
    choice = operator.choice(*problem.tensors)
    with caplog.at_level(logging.INFO, logger="bitblas"):
        bitblas.log.logger.addHandler(caplog.handler)
        operator(*problem.tensors)
        operator(*problem.tensors)
        bitblas.log.logger.removeHandler(caplog.handler)
    lines = {record.getMessage() for record in caplog.records if "attention" in record.message}
    assert len(lines) == 1
    assert f"decode, backend 'auto': {choice}" in lines.pop()


# --- torch


@pytest.mark.parametrize("cache", ["float16", "int4"])
def test_operator_passes_opcheck(cache):
    problem = draw(caches=(cache, cache), device=DEVICE)
    names = ("k_scale", "k_zeros", "v_scale", "v_zeros", "kv_len")
    arguments = [*problem.tensors, *(problem.extras.get(name) for name in names)]
    arguments += [problem.config.key, "auto"]
    torch.library.opcheck(torch.ops.bitblas.attention.default, arguments)
    out = torch.empty_like(problem.tensors[0])
    torch.library.opcheck(torch.ops.bitblas.attention_out.default, [*arguments, out])


@pytest.mark.parametrize("cache", ["float16", "int8"])
def test_torch_compile_sees_one_graph(cache):
    problem = draw(k_len=50, caches=(cache, cache), device=DEVICE)
    operator = FlashAtten(problem.config)

    @torch.compile(fullgraph=True)
    def step(Q, K, V, output):
        return operator(2 * Q, K, V, output, **problem.extras) + operator(Q, K, V, **problem.extras)

    Q, K, V = problem.tensors
    output = torch.empty_like(Q)
    found = step(Q, K, V, output)
    doubled = reference.attention(problem.config, 2 * Q, K, V, **problem.extras)
    expected = doubled + problem.expected()
    assert (found.double() - expected).norm() / expected.norm() < 2e-3
    assert (output.double() - doubled).norm() / doubled.norm() < 2e-3


@pytest.mark.parametrize("layout", ["nnn", "ntn"])
@pytest.mark.parametrize("q_len", [4, 12])
def test_gradients_are_those_of_torch(layout, q_len):
    problem = draw(q_len=q_len, k_len=12, layout=layout, causal=True, device=DEVICE)
    leaves = [x.detach().clone().requires_grad_() for x in problem.tensors]
    out = FlashAtten(problem.config)(*leaves)
    problem.check(out.detach())
    grad = torch.randn_like(out)
    out.backward(grad)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    reference.attention(problem.config, *exact).backward(grad.double())
    for ours, theirs in zip(leaves, exact):
        assert (ours.grad.double() - theirs.grad).norm() / theirs.grad.norm() < 5e-3


def test_gradients_of_quantised_keys_are_refused():
    problem = draw(caches=("int8", "int8"), device=DEVICE)
    problem.tensors[0].requires_grad_()
    with pytest.raises(ValueError, match="Q: requires a gradient"):
        call(problem)
    with torch.no_grad():
        problem.check(call(problem))


@pytest.mark.parametrize("name", ["k_scale", "v_zeros"])
def test_gradients_of_scales_are_refused(name):
    problem = draw(caches=("int4", "int4"), device=DEVICE)
    problem.extras[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{name}: requires a gradient"):
        call(problem)


@pytest.mark.parametrize(
    "name, match",
    [
        ("output", r"output: got shape \(1, 8, 2, 32\) torch.float32"),
        ("k_scale", "k_scale: got a tensor, but K_dtype is 'float16'"),
        ("v_zeros", "v_zeros: got a tensor, but V_dtype is 'float16'"),
    ],
)
def test_bad_operand_is_named_where_gradients_are_wanted(name, match):
    problem = plain()
    problem.tensors[0].requires_grad_()
    given = {name: torch.ones(1, 8, 2, 32, device=DEVICE)}
    with pytest.raises(ValueError, match=match):
        call(problem, **given)


def test_gradients_pass_an_output():
    problem = plain()
    problem.tensors[0].requires_grad_()
    output = torch.empty_like(problem.tensors[0], requires_grad=False)
    assert call(problem, output=output) is output
    problem.check(output.detach())
    output.sum().backward()
    assert problem.tensors[0].grad.ne(0).any()


@pytest.mark.parametrize("name", ["Q", "K", "V", "k_scale", "v_zeros"])
def test_forward_mode_is_refused(name):
    cache = "float16" if name in ("Q", "K", "V") else "int4"
    problem = plain(caches=(cache, cache))
    operands = dict(zip("QKV", problem.tensors)) | problem.extras
    with forward_ad.dual_level():
        x = operands[name]
        operands[name] = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ValueError, match=f"{name}: carries a tangent"):
            FlashAtten(problem.config)(**operands)
