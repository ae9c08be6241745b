"""The host side of GPU calls: streams, threads, graphs, alignment, devices, and what is kept."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from calls import logical_weight
from problems import draw, relative_error, tolerance

import bitblas
import bitblas.reference

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from bitblas.kernels import driver, prepared

pytestmark = pytest.mark.gpu

FIELDS = dict(N=512, K=1024, W_dtype="uint4", group_size=128, with_scaling=True, with_zeros=True)


class Product:
    def __init__(self, seed, m=1, device="cuda", **fields):
        self.config = bitblas.MatmulConfig(**{**FIELDS, **fields})
        self.problem = draw(self.config, m, seed, device)
        self.matmul = bitblas.Matmul(self.config)
        self.W = self.matmul.transform_weight(logical_weight(self.problem))
        self.extras = self.problem.extras()

    def __call__(self, A=None):
        return self.matmul(self.problem.A if A is None else A, self.W, **self.extras)

    def expected(self, A=None):
        problem = copy.copy(self.problem)
        problem.A = self.problem.A if A is None else A
        return problem.expected()

    def assert_right(self, product, A=None):
        assert relative_error(product, self.expected(A)) <= tolerance(self.config)

    def assert_repeats(self):
        """Whether a call of this kind is prepared."""
        assert any(call is not None for call in self.matmul._calls.values())


@pytest.mark.parametrize("m", [1, 5, 16, 33, 64, 200])
@pytest.mark.parametrize(
    "fields",
    [
        dict(),
        dict(W_dtype="nf4", with_zeros=False, with_bias=True),
        dict(A_dtype="int8", W_dtype="int4", out_dtype="float32", with_zeros=False),
        dict(A_dtype="float32", out_dtype="float32"),
        dict(W_dtype="nvfp4", group_size=16, with_zeros=False),
        dict(zeros_mode="quantized"),
    ],
    ids=str,
)
def test_repeated_calls_equal_the_first(seed, m, fields):
    product = Product(seed, m, **fields)
    first = product()
    product.assert_right(first)
    for _ in range(3):
        assert torch.equal(product(), first)
    product.assert_repeats()
    A = torch.roll(product.problem.A, 1, dims=-1)
    product.assert_right(product(A), A)


def test_weights_mutated_and_replaced_are_seen(seed):
    product = Product(seed)
    product(), product()
    product.extras["scale"].mul_(2)
    product.assert_right(product())
    product.W.zero_()
    product.problem.codes.zero_()
    product.assert_right(product())
    product.extras["scale"] = product.problem.scale = torch.rand_like(product.problem.scale)
    product.assert_right(product())


def test_unaligned_and_strided_operands(seed):
    product = Product(seed, m=3)
    A = product.problem.A
    product(), product()
    shifted = torch.empty(A.numel() + 1, dtype=A.dtype, device="cuda")[1:].view(A.shape).copy_(A)
    strided = torch.empty(3, 2048, dtype=A.dtype, device="cuda")[:, ::2].copy_(A)
    for same in (shifted, strided):
        for _ in range(2):
            product.assert_right(product(same))
    scale = product.extras["scale"]
    moved = torch.empty(scale.numel() + 1, dtype=scale.dtype, device="cuda")[1:]
    product.extras["scale"] = moved.view(scale.shape).copy_(scale)
    product.assert_right(product())


def test_leading_dimensions_output_and_no_rows(seed):
    product = Product(seed, m=6)
    A = product.problem.A
    for _ in range(2):
        product.assert_right(product(A.view(2, 3, -1)).view(6, -1))
    output = torch.full((6, 512), 7.0, dtype=torch.float16, device="cuda")
    assert product.matmul(A, product.W, output=output, **product.extras) is output
    product.assert_right(output)
    assert product(A[:0]).shape == (0, 512)


@pytest.mark.parametrize("m", [1, 40])
def test_graph_replays_with_new_inputs(seed, m):
    product = Product(seed, m)
    A = product.problem.A.clone()
    product(A), product(A)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [product(A) for _ in range(3)]
    for shift in range(3):
        new = torch.roll(product.problem.A, shift, dims=-1)
        A.copy_(new)
        graph.replay()
        for out in outs:
            product.assert_right(out, new)


@pytest.mark.parametrize("m", [1, 40])
def test_graph_beside_the_stream_it_was_captured_from(seed, m):
    """Replays on one stream and eager calls on another share no counters and no workspace."""
    product = Product(seed, m, K=4096)
    A = product.problem.A.clone()
    expected = product(A)
    product(A)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = product(A)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    for _ in range(50):
        with torch.cuda.stream(side):
            graph.replay()
        eager = product(A)
        torch.cuda.synchronize()
        assert torch.equal(out, expected) and torch.equal(eager, expected)


def test_two_streams_at_once(seed):
    product = Product(seed, m=40, K=4096)
    expected = product()
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    results = []
    for _ in range(100):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(product())
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


def test_work_is_ordered_behind_the_current_stream(seed):
    product = Product(seed, m=3)
    product(), product()
    A = torch.zeros_like(product.problem.A)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(20_000_000)
        A.copy_(product.problem.A)
        out = product(A)
    torch.cuda.synchronize()
    product.assert_right(out)


def test_threads_with_streams_of_their_own(seed):
    product = Product(seed, m=2)
    product(), product()
    inputs = [torch.roll(product.problem.A, i, dims=-1) for i in range(4)]
    torch.cuda.synchronize()
    failures = []

    def work(A):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                results = [product(A) for _ in range(200)]
                torch.cuda.current_stream().synchronize()
            for result in results[::20]:
                product.assert_right(result, A)
            assert all(torch.equal(result, results[0]) for result in results)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(A,)) for A in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_first_use_of_cuda_by_a_thread(seed):
    """The thread has no context of its own yet."""
    product = Product(seed)
    product(), product()
    torch.cuda.synchronize()
    out = []
    thread = threading.Thread(target=lambda: out.append(product()))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    product.assert_right(out[0])


def test_operands_on_a_device_that_is_not_current(seed, monkeypatch):
    """With one GPU: the device is entered, and left, where it is not the current one."""
    index = torch.cuda.device_count() - 1
    product = Product(seed, device=f"cuda:{index}")
    product(), product()
    entered = []

    class Guard(torch.cuda.device):
        def __enter__(self):
            entered.append(self.idx)
            super().__enter__()

    if index == 0:
        monkeypatch.setattr(prepared, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    product.assert_right(product())
    assert entered == [index] and torch.cuda.current_device() == 0


def test_a_layer_repeats_its_call(seed):
    linear = torch.nn.Linear(256, 96, dtype=torch.float16, device="cuda")
    layer = bitblas.Linear.from_float(linear, group_size=64)
    A = torch.randn(4, 256, device="cuda").half()
    first = layer(A)
    assert torch.equal(layer(A), first) and torch.equal(copy.deepcopy(layer)(A), first)
    assert any(layer.bitblas_matmul._calls.values())
    with torch.inference_mode():
        assert torch.equal(layer(A), first)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(A), first)
    A.requires_grad_()
    layer(A).sum().backward()
    assert A.grad is not None


def test_tuned_choices_take_the_place_of_prepared_ones(seed):
    product = Product(seed, M=1)
    product(), product()
    product.matmul.hardware_aware_finetune(topk=3)
    product.assert_right(product())
    product.assert_right(product())
    product.assert_repeats()


@pytest.mark.skipif(torch.cuda.get_device_capability() < (9, 0), reason="TMA is of sm_90")
def test_tensor_descriptors():
    from descriptor_kernel import read_tile_launch

    out = torch.empty(16, 64, dtype=torch.float16, device="cuda")
    sources = [torch.randn(64, 64, device="cuda").half() for _ in range(2)]
    step = read_tile_launch(sources[0], out, 32)
    prepared.execute([step], out.device)
    assert torch.equal(out, sources[0][32:48])
    order = {id(sources[0]): 0, id(out): 1}
    call = prepared.Prepared([step], out.device, 2, lambda x: order[id(x)])
    for source in (sources[1], sources[0], sources[1]):
        call.run([source.data_ptr(), out.data_ptr()])
        assert torch.equal(out, source[32:48])


def test_dequantising_for_gradients_repeats(seed):
    product = Product(seed, m=4)
    A = product.problem.A.clone().requires_grad_()
    grads = []
    for _ in range(3):
        A.grad = None
        product(A).sum().backward()
        grads.append(A.grad.clone())
    weight = bitblas.reference.dequantize(product.config, product.problem.codes, **product.extras)
    assert relative_error(grads[0], weight.sum(dim=0).expand(4, -1)) <= 3e-3
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_every_device_has_kernels_of_its_own(seed):
    """In turn, while device 0 is current: each kernel is loaded in the context of its device."""
    products = [Product(seed, device=f"cuda:{i}") for i in range(torch.cuda.device_count())]
    for _ in range(3):
        for product in products:
            product.assert_right(product())
    assert torch.cuda.current_device() == 0


def test_tf32_is_followed(seed):
    product = Product(seed, m=32, A_dtype="float32", out_dtype="float32")
    exact, _ = product(), product()
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        rounded = product()
        assert not torch.equal(rounded, exact) and torch.equal(product(), rounded)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert torch.equal(product(), exact)


def test_triton_compiles_no_launcher():
    """Neither a C compiler nor Triton's driver is asked for anything."""
    program = """
import torch, bitblas
config = bitblas.MatmulConfig(N=64, K=128, W_dtype="int4")
matmul = bitblas.Matmul(config)
W = matmul.transform_weight(torch.zeros(64, 128, dtype=torch.int8, device="cuda"))
A = torch.zeros(1, 128, dtype=torch.float16, device="cuda")
matmul(A, W), matmul(A, W)
from triton.runtime.build import compile_module_from_src
from triton.runtime.driver import driver
assert driver._active is None if hasattr(driver, "_active") else True
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_warmup_loads_what_calls_need(seed, monkeypatch):
    config = bitblas.MatmulConfig(**{**FIELDS, "W_dtype": "uint2", "N": 256})
    bitblas.warmup(config, m=(1, 2, 60), workers=4, progress=False)
    monkeypatch.setattr(driver, "Kernel", None)
    for m in (1, 2, 60):
        product = Product(seed, m, W_dtype="uint2", N=256)
        product.assert_right(product())
