"""The repeated call: what reaches the driver, and which calls must not take the short way.

A driver that launches nothing stands in for the GPU, and CPU tensors for those on it; the calls
that go through the registered operator compute on the CPU.
"""

import copy
import pickle
import threading

import pytest
import torch
from calls import logical_weight
from descriptor_kernel import read_tile_launch
from fake_cuda import FakeCuda, install
from problems import draw, relative_error, tolerance
from torch.utils._python_dispatch import TorchDispatchMode

import bitblas
from bitblas import cache, plan
from bitblas import matmul as matmul_module
from bitblas.kernels import batch, driver, gpu, portable, prepared
from bitblas.kernels.launch import Launch, Workspace

if torch.cuda.is_available():
    pytest.skip("CPU tensors stand in for the GPU's", allow_module_level=True)

FIELDS = dict(
    N=64, K=128, W_dtype="int4", group_size=64, with_scaling=True, with_zeros=True, with_bias=True
)
EXTRAS = ("scale", "zeros", "bias")


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    install(monkeypatch, fake)
    monkeypatch.setattr(matmul_module, "prepare", gpu.prepare)
    monkeypatch.setattr(plan, "pick", lambda config, m, device: (portable, None))
    monkeypatch.setattr(gpu, "_prepared", {})
    return fake


class Repeated:
    """An operator with operands; called once, so that the next call is a repeated one."""

    def __init__(self, seed, m=3, **fields):
        self.config = bitblas.MatmulConfig(**{**FIELDS, **fields})
        self.problem = draw(self.config, m, seed)
        self.matmul = bitblas.Matmul(self.config, target="cuda -arch=sm_90")
        self.W = self.matmul.transform_weight(logical_weight(self.problem))
        self.extras = self.problem.extras()
        self()

    def __call__(self, A=None, W=None, **changed):
        A = self.problem.A if A is None else A
        return self.matmul(A, self.W if W is None else W, **{**self.extras, **changed})

    def assert_right(self, product, A=None):
        expected = self.problem.expected() if A is None else draw_with(self.problem, A).expected()
        assert relative_error(product, expected) <= tolerance(self.config)


def draw_with(problem, A):
    other = copy.copy(problem)
    other.A = A
    return other


@pytest.fixture
def repeated(cuda, seed):
    return Repeated(seed)


def test_a_repeated_call_hands_the_driver_its_operands(repeated, cuda):
    assert cuda.launched == []
    out = repeated()
    (launched,) = cuda.launched
    operands = [repeated.problem.A, repeated.W, out]
    operands += [repeated.extras[name] for name in EXTRAS]
    assert {x.data_ptr() for x in operands} <= set(launched.values)
    assert launched.stream == 7
    assert out.shape == (3, 64) and out.dtype == torch.float16


def test_arguments_are_in_the_order_of_the_kernel(repeated, cuda):
    out = repeated()
    problem, extras = repeated.problem, repeated.extras
    (step,) = portable.launches(repeated.config, problem.A, repeated.W, out, **extras)
    values = [step.arguments.get(name) for name in step.function.arg_names]
    expected = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in values if x is not None]
    assert cuda.launched[0].values == (*expected, 0, 0)  # Triton's scratch pointers
    assert cuda.launched[0].grid == (*step.grid, 1, 1)[:3]
    assert cuda.launched[0].threads == 32 * step.num_warps


def test_addresses_are_never_kept(repeated, cuda):
    first = repeated()
    A, W = repeated.problem.A.clone(), repeated.W.clone()
    second = repeated(A, W)
    assert {A.data_ptr(), W.data_ptr(), second.data_ptr()} <= set(cuda.launched[1].values)
    stale = {x.data_ptr() for x in (repeated.problem.A, repeated.W, first)}
    assert not stale & set(cuda.launched[1].values)


def test_positional_extras_are_the_same_call(repeated, cuda):
    out = repeated.matmul(repeated.problem.A, repeated.W, *map(repeated.extras.get, EXTRAS))
    named = repeated()
    one, two = cuda.launched
    assert [x for x in one.values if x != out.data_ptr()] == [
        x for x in two.values if x != named.data_ptr()
    ]


def test_leading_dimensions_are_kept(cuda, seed):
    repeated = Repeated(seed, m=6)
    A = repeated.problem.A.view(2, 3, -1)
    repeated.assert_right(repeated(A).view(6, -1))
    out = repeated(A)
    assert out.shape == (2, 3, 64) and len(cuda.launched) == 1


def test_split_k_shares_a_workspace_between_its_steps(cuda, seed, monkeypatch):
    tile = portable.Tile("gemm", 16, 64, 64, 4, 3, split_k=2)
    monkeypatch.setattr(plan, "pick", lambda config, m, device: (portable, tile))
    repeated = Repeated(seed, m=20)
    out = repeated()
    first, second = cuda.launched
    assert out.data_ptr() in second.values and out.data_ptr() not in first.values
    assert second.values[0] in first.values and second.values[0] != 0


def test_dequantize_is_prepared_too(repeated, cuda):
    out = torch.empty(64, 128, dtype=torch.float16)
    scale, zeros = repeated.extras["scale"], repeated.extras["zeros"]
    for _ in range(2):
        gpu.dequantize(repeated.config, repeated.W, out, scale, zeros)
    one, two = cuda.launched
    assert one == two and one.values[:4] == tuple(
        x.data_ptr() for x in (repeated.W, out, scale, zeros)
    )


BAD = {
    "dtype of A": dict(A=torch.zeros(3, 128)),
    "shape of A": dict(A=torch.zeros(3, 64).half()),
    "A no tensor": dict(A=[1.0]),
    "sparse A": dict(A=torch.zeros(3, 128).half().to_sparse()),
    "dtype of W": dict(W=torch.zeros(1, 2, 1, 128, 16)),
    "shape of W": dict(W=torch.zeros(1, 1, 1, 128, 16, dtype=torch.int8)),
    "shape of scale": dict(scale=torch.zeros(64, 1).half()),
    "dtype of zeros": dict(zeros=torch.zeros(64, 2)),
    "missing bias": dict(bias=None),
    "input_scale": dict(input_scale=torch.ones(3)),
    "global_scale": dict(global_scale=torch.ones(1)),
    "device of scale": dict(scale=torch.zeros(64, 2, device="meta").half()),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD)
def test_a_bad_operand_is_refused_as_in_a_first_call(repeated, cuda, change):
    fresh = bitblas.Matmul(repeated.config)
    operands = dict(A=repeated.problem.A, W=repeated.W, **repeated.extras) | change
    with pytest.raises((TypeError, ValueError)) as expected:
        fresh(**operands)
    for _ in range(2):
        with pytest.raises(type(expected.value)) as raised:
            repeated(**change)
        assert str(raised.value) == str(expected.value)
    assert cuda.launched == []


def test_operands_that_need_conversion_take_the_long_way(repeated, cuda):
    A = repeated.problem.A
    storage = torch.empty(A.numel() + 1, dtype=A.dtype)
    unaligned = storage[1:].view(A.shape).copy_(A)
    strided = torch.empty(3, 256, dtype=A.dtype)[:, ::2].copy_(A)
    for same in (unaligned, strided):
        for _ in range(2):
            repeated.assert_right(repeated(same))
    assert cuda.launched == []


def test_no_rows(repeated, cuda):
    for _ in range(2):
        assert repeated(torch.empty(0, 128).half()).shape == (0, 64)
    assert cuda.launched == []


def test_gradients_are_not_lost(repeated, cuda):
    A = repeated.problem.A.clone().requires_grad_()
    for _ in range(2):
        repeated(A).sum().backward()
    bias = repeated.extras["bias"].clone().requires_grad_()
    assert repeated(bias=bias).requires_grad
    assert A.grad is not None and cuda.launched == []


def test_output_argument_is_written(repeated, cuda):
    output = torch.empty(3, 64, dtype=torch.float16)
    assert repeated(output=output) is output
    repeated.assert_right(output)


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def test_modes_see_the_registered_operator(repeated, cuda):
    with Watching() as mode:
        repeated()
    assert "bitblas.matmul.default" in mode.seen and cuda.launched == []


def test_subclasses_are_dispatched(repeated, cuda):
    class Wrapped(torch.Tensor):
        pass

    A = repeated.problem.A.as_subclass(Wrapped)
    for _ in range(2):
        assert type(repeated(A)) is Wrapped
    assert cuda.launched == []


def test_new_choices_are_used(repeated, cuda, monkeypatch):
    repeated()
    tile = portable.Tile("gemm", 16, 64, 64, 4, 3)
    monkeypatch.setattr(plan, "pick", lambda config, m, device: (portable, tile))
    repeated()
    assert cuda.launched[0].grid == cuda.launched[1].grid
    cache.choices_changed()
    repeated.assert_right(repeated())  # prepares
    repeated()
    assert cuda.launched[2].grid != cuda.launched[0].grid


def test_copies_prepare_their_own_calls(repeated):
    for other in (copy.deepcopy(repeated.matmul), pickle.loads(pickle.dumps(repeated.matmul))):
        assert other._calls == {} and repeated.matmul._calls


def test_linear_repeats_its_call(cuda, seed, monkeypatch):
    monkeypatch.setattr(
        "bitblas.linear.Matmul",
        lambda config, **options: bitblas.Matmul(config, target="cuda -arch=sm_90"),
    )
    monkeypatch.setattr(
        "bitblas.linear.native_layout", lambda config, device: portable.layout(config)
    )
    layer = bitblas.Linear(128, 64, W_dtype="int4", with_scaling=True)
    A = torch.zeros(1, 128).half()
    layer(A)
    layer(A)
    assert layer.qweight.data_ptr() in cuda.launched[0].values


def test_threads_do_not_mix_their_operands(repeated, cuda):
    """Each thread's A and out meet in one launch."""
    pairs, lock = [], threading.Lock()

    def work():
        for _ in range(200):
            A = repeated.problem.A.clone()
            out = repeated(A)
            with lock:
                pairs.append((A, out))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launched = {tuple(x.values) for x in cuda.launched}
    together = {(A.data_ptr(), out.data_ptr()) for A, out in pairs}
    assert len(cuda.launched) == 800
    assert together == {(values[0], values[2]) for values in launched}


def test_a_thread_without_a_context_gets_one(repeated, cuda):
    cuda.contexts_set, cuda.codes = 0, [201]
    repeated()
    assert len(cuda.launched) == 1 and cuda.contexts_set == 1


def test_a_failed_launch_is_an_error(repeated, cuda):
    cuda.codes = [719]
    with pytest.raises(RuntimeError, match="719"):
        repeated()


# --- launches ------------------------------------------------------------------------------


def steps_with(**arguments):
    from bitblas.kernels import portable_kernels

    out = torch.empty(2, 8)
    base = {"PARTS": None, "OUT": out, "BIAS": None, "INPUT_SCALE": None, "GLOBAL_SCALE": None}
    constants = {"SPLIT_K": 2, "BLOCK": 16}
    launch = Launch(
        portable_kernels.sum_parts_kernel,
        (2, 1),
        {**base, "M": 2, "N": 8, **arguments},
        constants,
        4,
        1,
    )
    return launch, out


def test_unaligned_pointers_are_another_kernel():
    from bitblas.kernels.compile import Source

    storage = torch.zeros(20)
    aligned, _ = steps_with(PARTS=storage[:16])
    unaligned, _ = steps_with(PARTS=storage[1:17])
    assert storage.data_ptr() % 16 == 0
    facts = [
        Source(x).compiled(80).asm["ttir"].count("tt.divisibility") for x in (aligned, unaligned)
    ]
    assert facts[0] == facts[1] + 1


def test_scales_that_are_read_in_packs_start_on_16_bytes(monkeypatch, seed):
    config = bitblas.MatmulConfig(**{**FIELDS, "with_bias": False})
    problem, tile = draw(config, 40, seed), batch.Tile(64, 1, 2, 64, 3, 2, 2)
    monkeypatch.setattr(plan, "sections", lambda *_: ((batch, tile, 40),))

    def off(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    scale, zeros = off(problem.scale), off(problem.zeros)
    assert scale.data_ptr() % 16 and zeros.data_ptr() % 16
    W = batch.layout(config).pack(problem.codes, config.bits)
    operands = (problem.A, W, scale, zeros, None, None, None)
    (step,) = gpu._launches(config, operands, problem.A.new_empty(40, 64), 40, W.device)
    for name, given in (("SCALE", scale), ("ZEROS", zeros)):
        assert step.arguments[name].data_ptr() % 16 == 0
        assert torch.equal(step.arguments[name], given)


def test_compile_options_reach_the_driver(cuda):
    launch, out = steps_with(PARTS=Workspace((2, 2, 8), torch.float32))
    launch.options["launch_pdl"] = True
    prepared.execute([launch], out.device)
    assert cuda.launched[0].attributes == 1


def test_descriptors_follow_their_tensors(cuda):
    """The address goes into the descriptor, encoded anew only when it changes."""
    out = torch.empty(16, 64, dtype=torch.float16)
    sources = [torch.zeros(64, 64, dtype=torch.float16) for _ in range(2)]
    step = read_tile_launch(sources[0], out, 32)
    order = {id(sources[0]): 0, id(out): 1}
    call = prepared.Prepared([step], out.device, 2, lambda x: order[id(x)])
    for source in (sources[0], sources[0], sources[1]):
        call.run([source.data_ptr(), out.data_ptr()])
    first, second = cuda.encoded
    assert [first.address, second.address] == [x.data_ptr() for x in sources]
    assert first.where == second.where and first.where % 64 == 0
    assert first.shape == (64, 64) and first.strides == (128,) and first.box == (64, 16)
    launched = cuda.launched[0]
    assert launched.values[1:] == (64, 64, 64, 1, out.data_ptr(), 32, 0, 0)
    assert launched.pointers[0] == first.where


def test_a_step_may_take_later_rows_of_an_operand(cuda):
    """As the sections of a product do: pointers and descriptors begin that much further on."""
    operands = [torch.empty(80, 64, dtype=torch.float16, device="meta") for _ in range(2)]
    order = {x.untyped_storage()._cdata: i for i, x in enumerate(operands)}
    step = read_tile_launch(operands[0][16:], operands[1][64:], 32)
    call = prepared.Prepared(
        [step], torch.device("cpu"), 2, lambda x: order[x.untyped_storage()._cdata]
    )
    for addresses in ([1 << 20, 1 << 21], [1 << 22, 1 << 23]):
        call.run(addresses)
    assert [x.address for x in cuda.encoded] == [(1 << 20) + 2048, (1 << 22) + 2048]
    assert [x.values[5] for x in cuda.launched] == [(1 << 21) + 8192, (1 << 23) + 8192]


def test_too_much_shared_memory_is_out_of_resources(cuda):
    from triton.runtime.errors import OutOfResources

    binary = driver.Binary("f", b"", 4, 1, 300_000, 0, 0, False, False)
    with pytest.raises(OutOfResources):
        driver.Kernel(binary, 0)


def test_launch_attributes_are_those_of_the_binary():
    binary = driver.Binary("f", b"", 4, 2, 0, 0, 0, True, True)
    attributes = driver._attributes(binary)
    assert len(attributes) == 4 * 72
    assert [attributes[i * 72] for i in range(4)] == [6, 2, 4, 5]
