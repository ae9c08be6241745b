"""Gluon kernels that work lane by lane, run on the CPU: a stand-in for the names of Gluon and for
the PTX instructions that the attention kernels use, in NumPy.

Tensors are arrays, whatever their layout; an element of [WARPS, 32] is what a lane has. Every load
and store is checked to lie within its operand.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

BFLOAT16 = "bfloat16"
LANE = np.arange(32)


class Tensor:
    """A NumPy array with the methods of a Gluon tensor."""

    type = SimpleNamespace(layout=None)

    def __init__(self, data: Any) -> None:
        self.data = np.asarray(data)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def to(self, dtype: Any, bitcast: bool = False) -> Tensor:
        if bitcast:
            return Tensor(self.data.view(dtype))
        if dtype == BFLOAT16:
            return Tensor(torch.from_numpy(self.data).bfloat16().view(torch.int16).numpy())
        return Tensor(self.data.astype(dtype))

    def reshape(self, shape: Sequence[int]) -> Tensor:
        return Tensor(self.data.reshape(shape))

    def expand_dims(self, axis: int) -> Tensor:
        return Tensor(np.expand_dims(self.data, axis))

    def permute(self, order: Sequence[int]) -> Tensor:
        return Tensor(self.data.transpose(order))

    def __bool__(self) -> bool:
        return bool(self.data)

    def __index__(self) -> int:
        return int(self.data)


def _operation(name: str) -> Any:
    function = getattr(np.ndarray, name)

    def apply(self: Tensor, other: Any) -> Any:
        if isinstance(other, Pointer):
            return NotImplemented
        with np.errstate(all="ignore"):
            return Tensor(function(self.data, getattr(other, "data", other)))

    return apply


for _name in "add sub mul truediv floordiv mod and or xor lshift rshift".split():
    setattr(Tensor, f"__{_name}__", _operation(f"__{_name}__"))
    if _name not in ("lshift", "rshift"):
        setattr(Tensor, f"__r{_name}__", _operation(f"__r{_name}__"))
for _name in "lt le gt ge eq ne".split():
    setattr(Tensor, f"__{_name}__", _operation(f"__{_name}__"))


class Pointer:
    """Addresses within one operand, in bytes."""

    def __init__(self, memory: np.ndarray, element: Any, offset: Any = 0) -> None:
        self.memory, self.element, self.offset = memory, element, np.asarray(offset, np.int64)
        self.dtype = SimpleNamespace(element_ty=element)

    def to(self, element: Any, bitcast: bool) -> Pointer:
        return Pointer(self.memory, element, self.offset)

    def __add__(self, other: Any) -> Pointer:
        step = np.asarray(getattr(other, "data", other)).astype(np.int64) * self.itemsize
        return Pointer(self.memory, self.element, self.offset + step)

    @property
    def itemsize(self) -> int:
        return 2 if self.element == BFLOAT16 else np.dtype(self.element).itemsize

    def expand_dims(self, axis: int) -> Pointer:
        return Pointer(self.memory, self.element, np.expand_dims(self.offset, axis))

    def places(self, mask: np.ndarray) -> np.ndarray:
        """Element indices, 0 where masked."""
        assert (self.offset[mask] % self.itemsize == 0).all(), "misaligned"
        index = np.where(mask, self.offset, 0) // self.itemsize
        assert (index >= 0).all() and (index * self.itemsize < self.memory.nbytes).all(), "outside"
        return index

    def elements(self) -> np.ndarray:
        size = self.itemsize
        usable = self.memory[: self.memory.nbytes // size * size]
        return usable.view(np.int16 if self.element == BFLOAT16 else self.element)


class Shared:
    """Shared memory, and views of it."""

    def __init__(self, data: np.ndarray) -> None:
        self.data = data

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.reshape(shape))

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.transpose(order))

    def slice(self, start: int, length: int, axis: int) -> Shared:
        return Shared(self.data[(slice(None),) * axis + (slice(start, start + length),)])

    def matrix(self) -> np.ndarray:
        return self.data

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def store(self, value: Tensor) -> None:
        self.data[...] = value.data

    def load(self, layout: Any) -> Tensor:
        return Tensor(self.data.copy())


def reinterpret(words: Shared, dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
    return Shared(words.data.reshape(-1).view(dtype).reshape(shape))


class Map:
    """A TMA map."""

    def __init__(self, descriptor: Any) -> None:
        self.box, self.layout = descriptor.block_shape, None
        self.block_type = SimpleNamespace(nbytes=descriptor.base.element_size() * np.prod(self.box))
        # raises where the shape does not fit the memory
        self.data = descriptor.base.as_strided(descriptor.shape, descriptor.strides).numpy()


class Barrier:
    """mbarrier, for copies that are complete at once: it counts them."""

    MBarrierLayout = SimpleNamespace

    @staticmethod
    def init(barrier: Shared, count: int) -> None:
        barrier.data[:] = 0

    @staticmethod
    def expect(barrier: Shared, bytes: int, needed: Any) -> None:
        barrier.data[:] += bool(needed)

    @staticmethod
    def wait(barrier: Shared, phase: Any, needed: Any = True) -> None:
        count = int(barrier.data[0])
        assert not needed or count > 0 and (count - 1) % 2 == int(phase), "would wait for ever"


def tma_load(source: Map, where: Sequence[Any], barrier: Shared, to: Shared, needed: Any) -> None:
    """Zeros beyond the edges."""
    if needed:
        starts = [int(i) for i in where]
        found = source.data[tuple(slice(i, i + n) for i, n in zip(starts, source.box))]
        to.data[...] = 0
        to.data[tuple(slice(n) for n in found.shape)] = found


# --- instructions ----------------------------------------------------------------------------


def halves(x: Any, bf16: bool = False) -> np.ndarray:
    """[..., 2] float32 of the two 16-bit numbers of a register."""
    data = np.ascontiguousarray(np.asarray(x.data, np.int32))
    if bf16:
        return np.stack((data << 16, data & -65536), -1).view(np.float32)
    return data[..., None].view(np.float16).astype(np.float32)


def register(pair: np.ndarray, bf16: bool = False) -> Tensor:
    """[..., 2] -> a register of two float16 or bfloat16."""
    pair = np.ascontiguousarray(pair, dtype=np.float32)
    if bf16:
        bits = torch.from_numpy(pair).bfloat16().view(torch.int16).numpy()
    else:
        bits = pair.astype(np.float16)
    return Tensor(bits.view(np.int32)[..., 0])


def mma(bf16: bool, *registers: Any) -> tuple[Tensor, ...]:
    a, b, c = registers[:4], registers[4:6], registers[6:]
    group, quad = LANE // 4, LANE % 4
    warps = a[0].data.shape[0]
    rows = np.zeros((warps, 16, 16), np.float32)
    columns = np.zeros((warps, 16, 8), np.float32)
    for i, x in enumerate(a):
        for h in range(2):
            rows[:, group + 8 * (i % 2), 2 * quad + h + 8 * (i // 2)] = halves(x, bf16)[..., h]
    for i, x in enumerate(b):
        for h in range(2):
            columns[:, 2 * quad + h + 8 * i, group] = halves(x, bf16)[..., h]
    product = rows @ columns
    return tuple(
        Tensor(x.data + product[:, group + 8 * (i // 2), 2 * quad + i % 2]) for i, x in enumerate(c)
    )


def integer_mma(unsigned: bool, *registers: Any) -> tuple[Tensor, ...]:
    """m16n8k32 of bytes; the columns' are signed."""
    a, b, c = registers[:4], registers[4:6], registers[6:]
    group, quad = LANE // 4, LANE % 4
    warps = a[0].data.shape[0]
    rows = np.zeros((warps, 16, 32), np.int64)
    columns = np.zeros((warps, 32, 8), np.int64)
    for i, x in enumerate(a):
        for h in range(4):
            taken = bytes_of(x).view(np.uint8 if unsigned else np.int8)
            rows[:, group + 8 * (i % 2), 4 * quad + h + 16 * (i // 2)] = taken[..., h]
    for i, x in enumerate(b):
        for h in range(4):
            columns[:, 4 * quad + h + 16 * i, group] = bytes_of(x)[..., h]
    product = rows @ columns
    assert np.abs(product).max() < 2**31
    return tuple(
        Tensor((x.data + product[:, group + 8 * (i // 2), 2 * quad + i % 2]).astype(np.int32))
        for i, x in enumerate(c)
    )


def bytes_of(x: Any) -> np.ndarray:
    return np.ascontiguousarray(x.data, np.int32)[..., None].view(np.int8)


def prmt(x: Tensor, y: Tensor, selector: int) -> Tensor:
    both = [np.ascontiguousarray(v.data, np.int32)[..., None].view(np.uint8) for v in (x, y)]
    table = np.concatenate(np.broadcast_arrays(*both), -1)
    chosen = table[..., [selector >> 4 * i & 7 for i in range(4)]]
    return Tensor(np.ascontiguousarray(chosen).view(np.int32)[..., 0])


def from_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    codes = np.ascontiguousarray(x.data)[..., None].view(np.int8)
    values = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy()
    return register(values[..., :2]), register(values[..., 2:])


def key_codes(values: Any) -> Any:
    """Codes of pairs of words, along the last axis: each of the registers' two halves."""

    def apply(x: Tensor) -> tuple[Tensor, ...]:
        found = values(np.ascontiguousarray(x.data, np.int32))  # [..., 2 words, 4 or 2 registers]
        return tuple(
            Tensor(found[..., word, i, :].astype(np.float16)) for word in range(2) for i in range(2)
        )

    return apply


def value_codes(values: Any, further: int) -> Any:
    """Codes of a word, in a tensor each: all four, or the two that a selector among the further
    operands says."""

    def apply(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        found = values(np.ascontiguousarray(x.data, np.int32), *others[len(others) - further :])
        if len(others) > further:
            found = np.where(others[0].data[..., None] & 15 == 0, found[..., :2], found[..., 2:])
        return tuple(Tensor(found[..., i].astype(np.float16)) for i in range(found.shape[-1]))

    return apply


def bytes_in_order(x: np.ndarray) -> np.ndarray:
    return x[..., None].view(np.int8).astype(np.float32)


def e4m3_in_order(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x[..., None].view(np.int8)).view(torch.float8_e4m3fn).float().numpy()


def nibbles(x: np.ndarray, high: bool) -> np.ndarray:
    """Registers of bytes 0, 2 and 1, 3."""
    codes = x[..., None].view(np.uint8) & (0xF0 if high else 15)
    return np.stack((codes[..., ::2], codes[..., 1::2]), -2) * 2.0**-24


def centred_nibbles(x: np.ndarray, mask: Tensor, factor: Tensor, zeros: Tensor) -> np.ndarray:
    """Keys are the first dimension; zeros: of both of a pair for each."""
    codes = (x[..., None].view(np.uint8) & (mask.data[..., None] & 0xFF)) * 2.0**-24
    zero = halves(zeros)[np.arange(len(x)), ..., np.arange(len(x)) % 2]
    return (codes * halves(factor)[..., :1] + zero[..., None]).astype(np.float32)


def movmatrix(x: Tensor) -> Tensor:
    matrix = np.ascontiguousarray(x.data)[..., None].view(np.int16).reshape(-1, 8, 8)
    turned = np.ascontiguousarray(matrix.transpose(0, 2, 1)).reshape(-1, 32, 2)
    return Tensor(turned.view(np.int32)[..., 0])


def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
    pair = halves(x)
    return Tensor(pair[..., 0]), Tensor(pair[..., 1])


def pack(bf16: bool, low: Tensor, high: Tensor) -> Tensor:
    return register(np.stack((low.data, high.data), -1), bf16)


def of_lane(x: Tensor, lane: Tensor) -> Tensor:
    return Tensor(np.take_along_axis(x.data, np.broadcast_to(lane.data, x.data.shape), 1))


def load_words(count: int, pointer: Pointer, inside: Tensor) -> Any:
    mask = Tensor(inside.data != 0)
    words = Pointer(pointer.memory, np.int32, pointer.offset)
    assert (np.broadcast_to(words.offset, mask.data.shape)[mask.data] % (4 * count) == 0).all()
    found = tuple(load(words + i, mask) for i in range(count))
    return found[0] if count == 1 else found


def register_pairs(values: Any) -> Any:
    """Four numbers of a word -> [2 registers, 2]."""
    return lambda x: values(x).reshape(*x.shape, 2, 2)


def powers(*_: Any) -> list[Any]:
    """For layouts, of which there are none here."""
    return []


INSTRUCTIONS = {  # the first whose name occurs in the text
    "c, 0x64806480; xor.b32 u, $4": key_codes(register_pairs(bytes_in_order)),
    "{ .reg .b16 l, h; mov.b32 {l, h}, $4": key_codes(register_pairs(e4m3_in_order)),
    "shr.b32 u, $4, 8; and.b32 $0, $4, 0x000F000F": key_codes(lambda x: nibbles(x, False)),
    "shr.b32 u, $4, 8; and.b32 $0, $4, 0x00F000F0": key_codes(lambda x: nibbles(x, True)),
    "{ .reg .b32 u, c, x; ": value_codes(bytes_in_order, 0),
    "{ .reg .b16 l, h; .reg .b32 x; ": value_codes(e4m3_in_order, 0),
    "{ .reg .b32 x, y; ": value_codes(centred_nibbles, 3),
    "mma.sync.aligned.m16n8k32.row.col.s32.u8": lambda *x: integer_mma(True, *x),
    "mma.sync.aligned.m16n8k32.row.col.s32.s8": lambda *x: integer_mma(False, *x),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16": lambda *x: mma(True, *x),
    "mma.sync.aligned.m16n8k16.row.col.f32.f16": lambda *x: mma(False, *x),
    "prmt.b32": prmt,
    "sub.f16x2": lambda x, y: register(halves(x) - halves(y)),
    "cvt.rn.f16x2.e4m3x2": from_e4m3,
    "cvt.rn.bf16x2.f32": lambda x, y: pack(True, x, y),
    "cvt.rn.f16x2.f32": lambda x, y: pack(False, x, y),
    "cvt.f32.f16": unpack,
    "max.NaN": lambda x, y: Tensor(np.maximum(x.data, y.data)),
    "rcp.approx": lambda x: Tensor(1 / x.data),
    "ex2.approx": lambda x: Tensor(np.exp2(x.data)),
    "lg2.approx": lambda x: Tensor(np.log2(x.data)),
    "redux.sync.max.s32": lambda x: Tensor(np.full_like(x.data, x.data.max())),
    "shfl.sync.bfly": lambda x, mask: Tensor(x.data[:, LANE ^ mask]),
    "shfl.sync.idx": of_lane,
    "movmatrix": movmatrix,
    ".b32 $0, [": lambda *x: load_words(1, *x),
    ".v2.b32": lambda *x: load_words(2, *x),
    ".v4.b32": lambda *x: load_words(4, *x),
    "bar.warp.sync": lambda: None,
    "griddepcontrol": lambda: None,
}


def inline_asm(text: str, constraints: str, operands: list[Any], **_: Any) -> Any:
    apply = next(f for name, f in INSTRUCTIONS.items() if name in text)
    with np.errstate(all="ignore"):
        return apply(*operands)


# --- the language ----------------------------------------------------------------------------


def _data(x: Any) -> Any:
    return getattr(x, "data", x)


def where(condition: Tensor, x: Any, y: Any) -> Tensor:
    found = np.where(_data(condition), _data(x), _data(y))
    kinds = {np.float64: np.float32}
    if not any(isinstance(v, Tensor) and v.data.dtype == np.int64 for v in (x, y)):
        kinds[np.int64] = np.int32
    return Tensor(found.astype(kinds.get(found.dtype.type, found.dtype)))


def load(pointer: Pointer, mask: Any = None, other: Any = 0, **_: Any) -> Tensor:
    inside = np.broadcast_to(True if mask is None else mask.data, pointer.offset.shape)
    pointer = Pointer(
        pointer.memory, pointer.element, np.broadcast_to(pointer.offset, inside.shape)
    )
    values = pointer.elements()[pointer.places(inside)]
    if pointer.element == BFLOAT16:  # which NumPy lacks
        values = (values.astype(np.int32) << 16).view(np.float32)
    return Tensor(np.where(inside, values, np.asarray(other, values.dtype)))


def store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    shape = np.broadcast_shapes(pointer.offset.shape, value.data.shape)
    inside = np.broadcast_to(True if mask is None else mask.data, shape)
    pointer = Pointer(pointer.memory, pointer.element, np.broadcast_to(pointer.offset, shape))
    places = pointer.places(inside)[inside]
    assert len(np.unique(places)) == len(places), "written twice"
    pointer.elements()[places] = np.broadcast_to(value.data, shape)[inside]


def fma(x: Any, y: Any, z: Any) -> np.ndarray:
    """In float64, as good as with one rounding."""
    return (np.float64(x) * np.float64(y) + np.float64(z)).astype(np.float32)


def namespace(grid: Sequence[int], position: Sequence[int]) -> SimpleNamespace:
    """What stands in for gluon.language in one block."""
    nothing = lambda *_, **__: None  # noqa: E731
    elementwise = {
        name: lambda *x, f=function: Tensor(f(*map(_data, x)))
        for name, function in {
            "maximum": np.fmax, "minimum": np.minimum, "abs": np.abs,
            "fma": fma,
        }.items()
    }  # fmt: skip
    return SimpleNamespace(
        **elementwise,
        int8=np.int8, int32=np.int32, int64=np.int64, float32=np.float32, float16=np.float16,
        constexpr=lambda x: x, pointer_type=lambda element: element, static_range=range,
        program_id=lambda axis: Tensor(np.int32(position[axis])),
        num_programs=lambda axis: Tensor(np.int32(grid[axis])),
        BlockedLayout=nothing, SliceLayout=nothing, SwizzledSharedLayout=nothing,
        arange=lambda start, end, layout: Tensor(np.arange(start, end, dtype=np.int32)),
        full=lambda shape, value, dtype, layout: Tensor(np.full(shape, value, dtype)),
        where=where, load=load, store=store, inline_asm_elementwise=inline_asm,
        broadcast=lambda *x: [Tensor(v) for v in np.broadcast_arrays(*map(_data, x))],
        convert_layout=lambda x, layout, assert_trivial=False: x,
        join=lambda x, y: Tensor(np.stack((x.data, y.data), -1)),
        split=lambda x: (Tensor(x.data[..., 0]), Tensor(x.data[..., 1])),
        zeros=lambda shape, dtype, layout: Tensor(np.zeros(shape, dtype)),
        to_tensor=lambda x: Tensor(np.float32(x)), bfloat16=BFLOAT16,
        DistributedLinearLayout=nothing, NVMMADistributedLayout=nothing,
        DotOperandLayout=nothing, NVMMASharedLayout=nothing,
        max=lambda x, axis: Tensor(x.data.max(axis)),
        sum=lambda x, axis: Tensor(x.data.sum(axis)),
        allocate_shared_memory=allocate_shared_memory,
    )  # fmt: skip


def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any) -> Shared:
    return Shared(np.full(shape, np.nan if dtype in (np.float16, np.float32) else 77, dtype))


def warpgroup_mma(a: Any, b: Any, c: Tensor, use_acc: bool = True, is_async: bool = True) -> Tensor:
    """At once, though what it reads may still change before the wait for it."""
    product = a.data.astype(np.float32) @ b.matrix().astype(np.float32)
    return Tensor(product + c.data if use_acc else product)


def span_of_tensors(*bounds: Any) -> Any:
    """A range, whose numbers are scalars of the kernel where it has a step."""
    if len(bounds) < 3:
        return range(*map(int, bounds))
    return (Tensor(np.int32(i)) for i in range(*map(int, bounds)))


IMPORT = re.compile(r"^from \.\S+ import (\([^)]*\)|.*$)", re.MULTILINE)


def run(
    modules: Sequence[Path], kernel: str, grid: Sequence[int], arguments: dict[str, Any]
) -> None:
    """Start a kernel of modules' source texts, each of which may use those before it, block after
    block. Tensors become pointers."""
    codes = [compile(IMPORT.sub("", x.read_text()), str(x), "exec") for x in modules]
    elements = {torch.bfloat16: BFLOAT16, torch.float8_e4m3fn: np.int8}
    given = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            storage = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
            element = elements.get(value.dtype)
            if element is None:
                element = torch.empty(0, dtype=value.dtype).numpy().dtype.type
            start = value.storage_offset() * value.element_size()
            value = Pointer(storage.numpy(), element, start)
        elif hasattr(value, "block_shape"):
            value = Map(value)
        elif isinstance(value, int) and not isinstance(value, bool) and name.islower():
            value = Tensor(np.int32(value))
        given[name] = value
    for position in itertools.product(*map(range, grid)):
        names: dict[str, Any] = {
            "gl": namespace(grid, position),
            "gluon": SimpleNamespace(jit=lambda f: f, constexpr_function=lambda f: f),
            "range": span_of_tensors,
            "reinterpret": reinterpret,
            "mbarrier": Barrier,
            "tma_load": tma_load,
            "powers": powers,
            "take": lambda x, index: Tensor(x.data[..., index]),
            "warpgroup_mma": warpgroup_mma,
            "warpgroup_mma_wait": lambda _, deps: deps[0],
            "fence_async_shared": lambda: None,
            "thread_barrier": lambda: None,
            "let_next_kernel_start": lambda: None,
            "keep_loads_here": lambda: None,
        }
        for code in codes:
            exec(code, names)
        with np.errstate(all="ignore"):
            names[kernel](**given)
