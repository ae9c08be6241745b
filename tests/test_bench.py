"""`python -m bitblas bench` on the CPU, with products too small to mean anything."""

from __future__ import annotations

import csv
import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from bitblas import plan
from bitblas.bench import cases, chain, measure, peers, plot, timing
from bitblas.bench.report import COLUMNS
from bitblas.cli import main
from bitblas.formats import FORMATS
from bitblas.matmul import Matmul

CPU = torch.device("cpu")
QUANTISED = [name for name, fmt in FORMATS.items() if not fmt.is_dense]
HEADER = "w,a,group,n,k,m,us,cublas_us,read_us,rel_err,kernel"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Runs the command on 64 x 128 weights, on two copies; gives (status, rows, folder)."""
    monkeypatch.setattr(timing, "MOST_COPIES", 2)
    monkeypatch.setattr(plot, "measured_roofs", lambda timer, dtype: (1e10, 1e11))

    def run(*arguments: str) -> SimpleNamespace:
        command = ["bench", "--device", "cpu", "--quick", "--out", str(tmp_path), "--name", "x"]
        if "--chain" not in arguments:
            command += ["--n", "64", "--k", "128"]
        status = main([*command, *arguments])
        path = tmp_path / "x.csv"
        text = path.read_text() if path.exists() else ""
        rows = list(csv.DictReader(text.splitlines()))
        page = (tmp_path / "x.md").read_text()
        return SimpleNamespace(status=status, text=text, rows=rows, page=page, folder=tmp_path)

    return run


def draw(W_dtype: str, A_dtype: str, n: int = 64, k: int = 128, **fields) -> cases.Weight:
    config = cases.make_config(W_dtype, A_dtype, n, k, **fields)
    return cases.draw_weight(config, Matmul(config, target="cpu"), CPU)


# --- the files --------------------------------------------------------------------------------


def test_writes_one_row_for_every_case_and_kernel(bench):
    result = bench("--w", "uint4", "int2", "--m", "1", "5", "--no-peers")
    assert result.status == 0
    assert result.text.splitlines()[0] == HEADER == ",".join(COLUMNS)
    assert [(row["w"], row["m"], row["kernel"]) for row in result.rows] == [
        ("uint4 zeros", "1", "bitblas"), ("uint4 zeros", "5", "bitblas"),
        ("int2", "1", "bitblas"), ("int2", "5", "bitblas"),
    ]  # fmt: skip
    for row in result.rows:
        assert (row["a"], row["group"], row["n"], row["k"]) == ("float32", "128", "64", "128")
        assert min(float(row[name]) for name in ("us", "cublas_us", "read_us")) > 0
        assert float(row["rel_err"]) < 1e-5


def test_page_has_the_command_and_a_line_for_every_row(bench):
    result = bench("--w", "int4", "--m", "1", "3")
    assert "Command: `python -m bitblas bench --device cpu" in result.page
    assert f"torch {torch.__version__}" in result.page
    assert sum(line.startswith("| int4 ") for line in result.page.splitlines()) == len(result.rows)


def test_torch_int4_is_timed_beside_ours(bench):
    result = bench("--w", "uint4", "--a", "bfloat16", "--m", "2")
    assert [row["kernel"] for row in result.rows] == ["bitblas", "torch int4"]


def test_int8_without_scales_is_exact_and_beside_int_mm(bench):
    result = bench("--w", "int8", "--a", "int8", "--no-scaling", "--m", "3")
    assert [row["kernel"] for row in result.rows] == ["bitblas", "torch._int_mm"]
    assert all(float(row["rel_err"]) == 0 for row in result.rows)


def test_without_matplotlib_a_message_says_what_to_install(bench, monkeypatch, capsys):
    monkeypatch.setattr(plot, "available", lambda: False)
    result = bench("--w", "int4", "--m", "1")
    assert result.status == 0
    assert "pip install 'bitblas[bench]'" in capsys.readouterr().out
    assert not (result.folder / "x.png").exists()


@pytest.mark.parametrize("kind", ["--w int4 nf4 --m 1 16", "--sweep --w int4 --m 1 2"])
def test_pictures(bench, kind):
    pytest.importorskip("matplotlib", reason="needs the extra 'bench'")
    result = bench(*kind.split())
    assert result.status == 0
    assert (result.folder / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_import_bitblas_imports_nothing_of_the_command():
    code = (
        "import bitblas, sys; "
        "sys.exit(any(name.startswith(('bitblas.bench', 'bitblas.cli')) for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- what goes wrong --------------------------------------------------------------------------


def broken(W_dtype, change, monkeypatch):
    """Our product of W_dtype, with its result changed."""
    genuine = measure.our_products

    def products(operator, m, device, all_tiles):
        if operator.config.W_dtype != W_dtype:
            return genuine(operator, m, device, all_tiles)

        def product(A, W, out, extras):
            operator(A, W, output=out, **extras)
            change(out)

        return [("bitblas", product)]

    monkeypatch.setattr(measure, "our_products", products)


@pytest.mark.parametrize(
    "change",
    [lambda out: out[-1, -1].add_(1.0), lambda out: out[0].fill_(float("nan"))],
    ids=["one value", "nan"],
)
def test_a_wrong_result_is_not_timed_and_fails_the_run(bench, monkeypatch, capsys, change):
    broken("int4", change, monkeypatch)
    result = bench("--w", "int4", "int2", "--m", "1", "80", "--no-peers")
    assert result.status == 1
    assert [row["w"] for row in result.rows] == ["int2", "int2"]
    assert "FAILED int4 x float32, N=64, K=128, m=80" in capsys.readouterr().out
    assert "FAILED int4 x float32" in result.page


def test_a_product_that_writes_nothing_is_found(bench, monkeypatch):
    lazy = [("bitblas", lambda A, W, out, extras: None)]
    monkeypatch.setattr(measure, "our_products", lambda *arguments: lazy)
    result = bench("--w", "int4", "--m", "1", "--no-peers")
    assert result.status == 1
    assert not result.rows


def test_a_result_that_goes_wrong_while_it_is_timed_is_found(bench, monkeypatch):
    calls = iter(range(1000))
    broken("int4", lambda out: out[0, 0].add_(next(calls) // 3), monkeypatch)
    result = bench("--w", "int4", "--m", "1", "--no-peers")
    assert result.status == 1
    assert "after it was timed: relative error" in result.page
    assert not result.rows


def test_an_exception_loses_no_other_case(bench, monkeypatch):
    def fail(out):
        raise RuntimeError("no such kernel")

    broken("int4", fail, monkeypatch)
    result = bench("--w", "int2", "int4", "uint4", "--m", "1", "--no-peers")
    assert result.status == 1
    assert [row["w"] for row in result.rows] == ["int2", "uint4 zeros"]
    assert "no such kernel" in result.page


def test_a_spent_budget_starts_no_case(bench):
    result = bench("--w", "int4", "int2", "--m", "1", "2", "--budget", "0")
    assert result.status == 0
    assert not result.rows
    assert "4 of 4 cases not started" in result.page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--n 64", "--n and --k"),
        ("--shapes 64", "expected NxK"),
        ("--w int4 --n 64 --k 128 --group 48", "group_size: 48 does not divide K=128"),
        ("--w nf4 --a int8", "'nf4' does not go with A_dtype 'int8'"),
        ("--m 0", "--m: got 0"),
        ("--device nowhere", "--device"),
    ],
)
def test_bad_options_are_refused(tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(["bench", "--out", str(tmp_path), *arguments.split()])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# --- what is timed ----------------------------------------------------------------------------


@pytest.mark.parametrize("W_dtype", QUANTISED)
def test_operands_of_every_format_give_results_that_float16_holds(W_dtype):
    weight = draw(W_dtype, "float16", k=1024)
    A = cases.draw_activation(weight.config, 20, CPU)
    exact = A.double() @ weight.exact.T
    assert torch.isfinite(exact.half()).all()
    assert exact.norm() > 0
    assert cases.relative_error(exact.half(), A, weight) <= cases.tolerance(weight.config)
    assert weight.nbytes >= 64 * 1024 * weight.config.bits // 8 + weight.extras["scale"].nbytes


@pytest.mark.parametrize("A_dtype", ["int8", "int4", "e4m3_float8"])
def test_relative_error_takes_8_bit_activations(A_dtype):
    weight = draw("int4", A_dtype)
    A = cases.draw_activation(weight.config, 70, CPU)
    operator = Matmul(weight.config, target="cpu")
    got = operator(A, weight.packed, **weight.extras)
    assert cases.relative_error(got, A, weight) <= cases.tolerance(weight.config)
    got[-1] *= 2
    assert cases.relative_error(got, A, weight) > 1e-2


def test_groups_are_the_usual_ones_of_each_format():
    groups = {w: cases.make_config(w, "float16", 64, 1024).group_length for w in QUANTISED}
    assert {groups[w] for w in QUANTISED if FORMATS[w].is_integer} == {128}
    assert (groups["nf4"], groups["mxfp4"], groups["nvfp4"]) == (64, 32, 16)
    assert groups["e4m3_float8"] == groups["e5m2_float8"] == 1024


@pytest.mark.parametrize("m", [1, 100])
def test_kernels_are_named_by_family_and_tile(monkeypatch, m):
    pytest.importorskip("triton")
    from bitblas.kernels import portable

    monkeypatch.setattr(
        plan, "pick", lambda config, m, device: (portable, portable.candidates(config, m)[0])
    )
    monkeypatch.setattr(plan, "_architecture", lambda device: 80)
    monkeypatch.setattr(plan, "_gpu", lambda device: None)
    operator = Matmul(cases.make_config("uint4", "float16", 256, 512), target="cuda -arch=sm_90")
    device = torch.device("cuda")
    [(name, _)] = measure.our_products(operator, m, device, all_tiles=False)
    names = [name for name, _ in measure.our_products(operator, m, device, all_tiles=True)]
    assert name == names[0]
    assert len(set(names)) == len(names) > 1
    assert all(name.startswith(("portable gemv", "portable gemm")) for name in names)


def test_sweep_goes_from_1_to_16384_in_about_60_steps():
    assert (cases.SWEEP[0], cases.SWEEP[-1]) == (1, 16384)
    assert 55 <= len(cases.SWEEP) <= 65


def test_calls_rotate_over_more_bytes_than_the_cache_holds():
    timer = timing.CpuTimer(CPU, rounds=3)
    size = 3_000_000
    assert timer.copies(size) * size >= 4 * timing.last_cache_bytes()


# --- other libraries --------------------------------------------------------------------------


def test_libraries_that_are_not_installed_are_left_out(bench, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = bench("--w", "int4", "--m", "1")
    assert result.status == 0
    assert "not installed, left out: torchao, bitsandbytes, gemlite" in capsys.readouterr().out


def test_a_wrong_peer_is_left_out_with_the_reason(bench, monkeypatch):
    class Wrong(peers.Peer):
        name = "wrong"

        def prepare(self, weight):
            return lambda A: torch.zeros(A.shape[0], weight.config.N)

    monkeypatch.setattr("bitblas.bench.command.PEERS", (Wrong(),))
    result = bench("--w", "int4", "--m", "1")
    assert result.status == 0
    assert [row["kernel"] for row in result.rows] == ["bitblas"]
    assert "wrong left out (int4, m = 1): wrong: relative error 1.0e+00" in result.page


def fake_gemlite(monkeypatch):
    """A gemlite whose layer computes what its documentation says: (W_q - zeros) * scales."""

    class GemLiteLinearTriton:
        def __init__(self, W_nbits, group_size, in_features, out_features, input_dtype,
                     output_dtype):  # fmt: skip
            self.group_size, self.shape = group_size, (out_features, in_features)

        def pack(self, W_q, scales, zeros, bias):
            assert W_q.dtype == torch.uint8 and W_q.shape == self.shape and bias is None
            scale, zero = (
                x.double().repeat_interleave(self.group_size, dim=1) for x in (scales, zeros)
            )
            self.weight = (W_q.double() - zero) * scale

        def __call__(self, x):
            return (x.double() @ self.weight.T).to(x.dtype)

    package, core = ModuleType("gemlite"), ModuleType("gemlite.core")
    core.GemLiteLinearTriton = GemLiteLinearTriton
    core.DType = SimpleNamespace(FP16=1, BF16=2)
    monkeypatch.setitem(sys.modules, "gemlite", package)
    monkeypatch.setitem(sys.modules, "gemlite.core", core)


def fake_bitsandbytes(monkeypatch):
    """A bitsandbytes that reads its own layout: high nibble first, rows one after the other."""

    def matmul_4bit(A, B, quant_state):
        flat = B.t().flatten()
        codes = torch.stack((flat >> 4, flat & 15), dim=1).flatten()
        values = quant_state.code.double()[codes.int()].view(-1, quant_state.blocksize)
        weight = (values * quant_state.absmax.double()[:, None]).view(quant_state.shape)
        return (A.double() @ weight.T).to(A.dtype)

    package, functional = ModuleType("bitsandbytes"), ModuleType("bitsandbytes.functional")
    package.matmul_4bit = matmul_4bit
    functional.QuantState = SimpleNamespace
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)


GIVEN = [
    (peers.GemLite(), w, zeros)
    for w in QUANTISED
    if FORMATS[w].is_integer and FORMATS[w].bits != 3
    for zeros in (False, True)
] + [(peers.BitsAndBytes(), "nf4", False)]


@pytest.mark.parametrize(("peer", "W_dtype", "zeros"), GIVEN)
def test_the_weight_handed_to_a_library_means_the_same_there(monkeypatch, peer, W_dtype, zeros):
    fake_gemlite(monkeypatch)
    fake_bitsandbytes(monkeypatch)
    weight = draw(W_dtype, "float16", n=128, k=256, zeros=zeros)
    A = cases.draw_activation(weight.config, 4, CPU)
    error = cases.relative_error(peer.prepare(weight)(A), A, weight)
    assert error <= peers.LEEWAY * cases.tolerance(weight.config)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("W_dtype", ["int4", "uint4"])
def test_torch_int4_gets_the_same_weight(W_dtype, zeros):
    weight = draw(W_dtype, "bfloat16", zeros=zeros)
    A = cases.draw_activation(weight.config, 4, CPU)
    error = cases.relative_error(peers.TorchInt4().prepare(weight)(A), A, weight)
    assert error <= peers.LEEWAY * cases.tolerance(weight.config)


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_libraries_refuse_what_they_have_no_kernel_for(peer):
    with pytest.raises(peers.UnsupportedError):
        peer.prepare(draw("uint3", "float16"))


# --- the chain --------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(chain.MODELS, "tiny", chain.Model(hidden=128, kv=64, mlp=256))


def test_chain_times_a_layer_of_every_format_and_m(bench, tiny):
    result = bench("--chain", "tiny", "--w", "uint4", "nf4", "--m", "1", "3", "--layers", "2")
    assert result.status == 0
    lines = [line for line in result.page.splitlines() if line.startswith("| tiny")]
    assert [line.split(" | ")[1:5] for line in lines] == [
        ["uint4", "float32", "1", "2"], ["uint4", "float32", "3", "2"],
        ["nf4", "float32", "1", "2"], ["nf4", "float32", "3", "2"],
    ]  # fmt: skip
    assert not result.text  # the chain has no CSV


def test_chain_feeds_each_product_from_its_predecessor():
    model = chain.Model(hidden=8, kv=4, mlp=16)
    weights = {name: torch.randn(shape) / 4 for name, shape in model.shapes().items()}
    linears = {
        name: lambda x, out, weight=weight: torch.mm(x, weight.T, out=out)
        for name, weight in weights.items()
    }
    x = torch.randn(2, 8)
    layer = chain.Layer(model, x, linears)
    layer.run()
    q, k, v = (x @ weights[name].T for name in "qkv")
    middle = x + (q + (k * v).repeat(1, 2)) @ weights["o"].T
    act = torch.nn.functional.silu(middle @ weights["gate"].T) * (middle @ weights["up"].T)
    torch.testing.assert_close(layer.end, middle + act @ weights["down"].T)


def test_chain_stops_at_a_wrong_product(bench, tiny, monkeypatch, capsys):
    genuine = chain._our_linear

    def wrong(operator, weight):
        linear = genuine(operator, weight)
        return lambda x, out: (linear(x, out), out[0, 0].add_(1.0))

    monkeypatch.setattr(chain, "_our_linear", wrong)
    assert bench("--chain", "tiny", "--m", "1", "--layers", "2").status == 1
    assert "FAILED uint4, m=1" in capsys.readouterr().out


# --- on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
def test_the_command_on_a_gpu(tmp_path):
    arguments = ["bench", "--quick", "--shapes", "256x512", "--out", str(tmp_path), "--name", "x"]
    assert main([*arguments, "--w", "uint4", "nf4", "--m", "1", "100"]) == 0
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert len(rows) >= 4


@pytest.mark.gpu
def test_every_tile_on_a_gpu(tmp_path):
    arguments = ["bench", "--quick", "--shapes", "256x512", "--out", str(tmp_path), "--name", "x"]
    assert main([*arguments, "--w", "uint4", "--m", "1", "--all-tiles", "--no-peers"]) == 0
    rows = list(csv.DictReader((tmp_path / "x.csv").read_text().splitlines()))
    assert len({row["kernel"] for row in rows}) == len(rows) > 1
