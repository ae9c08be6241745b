"""warmup: what it compiles, in which processes, and what it says of bad arguments."""

import os

import compat
import pytest
import torch
import triton
from conftest import DEVICE
from layers import make_layer
from problems import draw

import bitblas
from bitblas import plan, precompile
from bitblas.kernels import compile as compiler
from bitblas.kernels import gpu, portable, worker

CONFIG = bitblas.MatmulConfig(N=64, K=128, W_dtype="int4", group_size=64, with_scaling=True)


@pytest.fixture
def cold(monkeypatch, tmp_path):
    """No kernel is known to this process or on disk."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_binaries", {})
    return tmp_path


@pytest.fixture
def planned(monkeypatch):
    """Products are planned for a GPU that need not be there."""
    monkeypatch.setattr(plan, "pick", lambda config, m, device: (portable, None))
    monkeypatch.setattr(portable, "_roomy", lambda: True)


def sources(config=CONFIG, rows=(1, 20), dtypes=(torch.float16, None, None)):
    device = torch.device("cuda", 0)
    found = [x for m in rows for x in gpu.sources(config, m, device, dtypes)]
    return list({source.key: source for source in found}.values())


def refuse(*arguments, **options):
    raise AssertionError("compiled again")


def test_workers_leave_kernels_where_this_process_and_the_next_find_them(
    cold, planned, monkeypatch
):
    wanted = sources()
    assert len(wanted) > 1
    steps = []
    worker.compile_all(wanted, 90, 2, lambda: steps.append(1))
    assert len(steps) == len(wanted)
    monkeypatch.setattr(triton, "compile", refuse)
    binaries = [source.binary(90) for source in wanted]
    assert all(binary.cubin and binary.num_warps for binary in binaries)


def test_a_kernel_is_compiled_once(cold, planned, monkeypatch):
    wanted = sources(rows=(1,))
    precompile.compile_sources(wanted, 80, workers=1)
    monkeypatch.setattr(compiler, "_binaries", {})  # as in a new process
    monkeypatch.setattr(triton, "compile", refuse)
    precompile.compile_sources(wanted, 80, workers=4)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{")])
def test_without_a_sound_index_entry_triton_finds_the_kernel(cold, planned, monkeypatch, damage):
    (source,) = sources(rows=(1,))
    first = source.binary(80)
    for entry in cold.glob("bitblas/*.json"):
        damage(entry)
    monkeypatch.setattr(compiler, "_binaries", {})
    assert not source.on_disk(80)
    assert source.binary(80) == first
    assert len(list(cold.glob("*/*.cubin"))) == 1


def test_the_index_leads_to_what_triton_itself_finds(cold, planned):
    (source,) = sources(rows=(1,))
    binary = source.binary(90)
    assert source.compiled(90).asm["cubin"] == binary.cubin
    assert len(list(cold.glob("*/*.cubin"))) == 1


def test_rows_with_the_same_kernel_share_it(planned):
    assert len(sources(rows=(1, 2, 3, 5, 8))) == 1


def test_8_bit_activations_are_prepared_for_with_and_without_input_scale(planned):
    config = bitblas.MatmulConfig(
        N=64, K=128, A_dtype="int8", W_dtype="int4", out_dtype="float32", with_scaling=True
    )
    signatures = [source.signature["INPUT_SCALE"] for source in sources(config, rows=(1,))]
    assert sorted(signatures) == ["*fp32", "constexpr"]


def test_planned_sources_are_those_of_the_call(planned, seed):
    problem = draw(CONFIG, 3, seed)
    W = portable.layout(CONFIG).pack(problem.codes, CONFIG.bits)
    out = torch.empty((3, CONFIG.N), dtype=torch.float16)
    steps = portable.launches(CONFIG, problem.A, W, out, **problem.extras())
    assert [compiler.Source(step).key for step in steps] == [x.key for x in sources(rows=(3,))]


def test_a_layer_that_quantises_is_prepared_for_with_its_quantiser(planned, monkeypatch):
    from bitblas.kernels import prepared, quantize

    seen = []
    monkeypatch.setattr(precompile, "compile_sources", lambda found, *rest: seen.extend(found))
    monkeypatch.setattr(precompile, "_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(prepared, "architecture", lambda index: 90)
    monkeypatch.setattr(prepared, "load", lambda source, index: None)
    layer = bitblas.Linear(
        128, 64, A_dtype="int8", W_dtype="int4", out_dtype="bfloat16", quantize_activation=True
    )
    bitblas.warmup(layer, m=5, progress=False)
    x, q = (compat.meta((5, 128), dtype) for dtype in (torch.bfloat16, torch.int8))
    launch = quantize.launch(x, q, compat.meta((5,), torch.float32), "int8", 90)
    assert compiler.Source(launch).key in [source.key for source in seen]


def test_a_kernel_that_does_not_compile_is_an_error(cold, planned):
    (source,) = sources(rows=(1,))
    source.constants["BLOCK_M"] = 7
    with pytest.raises(RuntimeError, match=r"(?s)gemv_kernel did not compile.*power of 2"):
        worker.compile_all([source], 90, 1, lambda: None)


def test_a_worker_that_dies_is_an_error(cold, planned, monkeypatch):
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended with 1"):
        worker.compile_all(sources(rows=(1,)), 90, 1, lambda: None)


@pytest.mark.parametrize("what", ["config", "operator", "layer", "model", "list"])
def test_warms_whatever_holds_products(seed, what):
    layer, _ = make_layer(seed, W_dtype="int4", with_scaling=True)
    things = {
        "config": CONFIG,
        "operator": bitblas.Matmul(CONFIG),
        "layer": layer,
        "model": torch.nn.Sequential(torch.nn.ReLU(), layer),
        "list": [CONFIG, layer],
    }
    bitblas.warmup(things[what], m=(1, 3), progress=False)


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the CPU's kernels")
def test_after_warmup_the_cpu_compiles_nothing(seed, monkeypatch, tmp_path):
    from bitblas.cpu import jit

    monkeypatch.setenv("BITBLAS_CACHE_DIR", str(tmp_path))
    config = bitblas.MatmulConfig(N=80, K=96, W_dtype="uint3", with_scaling=True, M=(1, 2, 40))
    jit.compiler.cache_clear()
    bitblas.warmup(config, progress=False)
    monkeypatch.setattr(jit, "optimize", refuse)
    problem = draw(config, 40, seed)
    matmul = bitblas.Matmul(config)
    packed = matmul.weight_transform(problem.codes)
    for m in (1, 2, 40):
        matmul(problem.A[:m], packed, **problem.extras())


def test_shows_progress(capsys):
    bitblas.warmup(CONFIG, m=1)
    assert "1/1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (dict(what="model"), TypeError, "what: got str"),
        (dict(what=3), TypeError, "what: got int"),
        (dict(what=torch.nn.ReLU()), ValueError, "what: ReLU holds no bitblas.Linear"),
        (dict(what=CONFIG, m=0), ValueError, "m: got 0"),
        (dict(what=CONFIG, m=()), ValueError, r"m: got \(\)"),
        (dict(what=CONFIG, m=1.5), ValueError, "m: got 1.5"),
        (dict(what=CONFIG, workers=0), ValueError, "workers: got 0"),
        (dict(what=CONFIG, device="meta"), ValueError, "device: got 'meta'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, text):
    with pytest.raises(error, match=text):
        bitblas.warmup(**arguments, progress=False)


def test_workers_see_no_gpu(cold, monkeypatch):
    seen = {}

    def popen(command, **options):
        seen.update(options["env"])
        raise OSError("not started")

    monkeypatch.setattr(worker.subprocess, "Popen", popen)
    with pytest.raises(OSError, match="not started"):
        worker.compile_all([object()], 90, 1, lambda: None)
    assert seen["CUDA_VISIBLE_DEVICES"] == "" and seen["PATH"] == os.environ["PATH"]


def test_attention_has_no_kernels_on_the_cpu():
    config = bitblas.FlashAttenConfig(1, 8, 2, 100, 64, K_dtype="int4", V_dtype="int4")
    bitblas.warmup([config, bitblas.FlashAtten(config)], device="cpu")
