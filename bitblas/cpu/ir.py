"""Small helpers over llvmlite's IR builder: addresses as i64, loops, 16-lane vectors.

Every kernel takes one pointer to an array of 64-bit fields (`Field`), so all of them share one
calling convention, `void kernel(ptr fields)`, which is also that of an OpenMP outlined body.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum, auto
from typing import Any

from llvmlite import ir

LANES = 16  # rows of a block: the width of every vector here

F16, F32 = ir.HalfType(), ir.FloatType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
VF, VI = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
VOID, PTR = ir.VoidType(), ir.PointerType()
Value = Any  # llvmlite's values carry no static types


class Field(IntEnum):
    """The 64-bit fields that a kernel reads; addresses and sizes, 0 where not needed."""

    @staticmethod
    def _generate_next_value_(name: str, start: int, count: int, last: list[int]) -> int:
        return count

    TICKET = auto()  # the next work item: threads take items by an atomic add
    SLOT = auto()  # the next scratch slot: each thread takes one
    ITEMS = auto()  # work items in all
    BLOCKS = auto()  # blocks of 16 rows in one item
    M = auto()
    N = auto()
    K = auto()
    K_PADDED = auto()  # K rounded up to 32: what the packed weight spans
    K_USED = auto()  # what kernels walk over: K_PADDED where there is one group, else K
    GROUP = auto()  # group length, or K_PADDED where there is one group
    GROUPS = auto()
    RUN = auto()  # values of k for which the panel decoder keeps one scale
    CHUNK = auto()  # values of k in a panel
    M_BLOCK = auto()  # rows of A that meet a panel before the next is decoded
    A = auto()
    A_STRIDE = auto()  # bytes between rows (fused kernels)
    SUMS = auto()  # int32 sums of A over each group
    W = auto()
    SCALE = auto()
    ZEROS = auto()
    ZEROS_STRIDE = auto()  # bytes between rows of packed zeros
    BIAS = auto()
    ROW_SCALE = auto()  # one float per row of A
    TENSOR_SCALE = auto()  # one float
    OUT = auto()
    SCRATCH = auto()
    SCRATCH_STRIDE = auto()  # bytes in a slot
    DECODE = auto()  # function addresses
    GEMM = auto()
    EPILOGUE = auto()


class Builder(ir.IRBuilder):
    """An IRBuilder positioned in a new function whose first argument is the field array."""

    def __init__(self, name: str, extra: Sequence[ir.Type] = (), module: ir.Module | None = None):
        self.ir_module = module or ir.Module(name)
        function_type = ir.FunctionType(VOID, [PTR, *extra])
        function = ir.Function(self.ir_module, function_type, name)
        super().__init__(function.append_basic_block("entry"))
        self.fields, *self.arguments = function.args
        self.decoded_words: dict[int, tuple[Value, list[Value]]] = {}  # see bytewise.py

    # -- scalars and memory
    def field(self, field: Field) -> Value:
        return self.load_at(self.field_address(field), I64, 8)

    def field_address(self, field: Field) -> Value:
        return self.add(self.ptrtoint(self.fields, I64), i64(8 * field))

    def take(self, field: Field) -> Value:
        """Atomically read a field and add one to it."""
        pointer = self.inttoptr(self.field_address(field), PTR)
        return self.atomic_rmw("add", pointer, i64(1), "monotonic")

    def load_at(self, address: Value, type_: ir.Type, align: int) -> Value:
        return self.load(self.inttoptr(address, PTR), align=align, typ=type_)

    def store_at(self, value: Value, address: Value, align: int) -> None:
        self.store(value, self.inttoptr(address, PTR), align=align)

    def variable(self, type_: ir.Type, initial: Value | None = None) -> Value:
        with self.goto_entry_block():
            pointer = self.alloca(type_)
        if initial is not None:
            self.store(initial, pointer)
        return pointer

    def get(self, variable: Value) -> Value:
        return self.load(variable)

    def offset(self, base: Value, *terms: Value | int) -> Value:
        """base + the terms, in bytes."""
        for term in terms:
            if isinstance(term, int):
                if term == 0:
                    continue
                term = i64(term)
            base = self.add(base, term)
        return base

    def times(self, value: Value, factor: int) -> Value:
        return self.mul(value, i64(factor))

    def smaller(self, a: Value, b: Value) -> Value:
        return self.select(self.icmp_signed("<", a, b), a, b)

    def given(self, field: Field) -> Value:
        """i1: the field is not zero."""
        return self.icmp_unsigned("!=", self.field(field), i64(0))

    # -- control flow
    @contextmanager
    def loop(self, start: Value | int, stop: Value, step: Value | int = 1) -> Iterator[Value]:
        start, step = (i64(x) if isinstance(x, int) else x for x in (start, step))
        counter = self.variable(I64, start)
        head, body, end = (self.append_basic_block(s) for s in ("head", "body", "end"))
        self.branch(head)
        self.position_at_end(head)
        value = self.load(counter)
        self.cbranch(self.icmp_signed("<", value, stop), body, end)
        self.position_at_end(body)
        yield value
        self.store(self.add(value, step), counter)
        self.branch(head)
        self.position_at_end(end)

    @contextmanager
    def work_items(self) -> Iterator[Value]:
        """Loop over the items this thread takes; ends when none is left."""
        head, body, end = (self.append_basic_block(s) for s in ("next", "item", "done"))
        items = self.field(Field.ITEMS)
        self.branch(head)
        self.position_at_end(head)
        item = self.take(Field.TICKET)
        self.cbranch(self.icmp_signed("<", item, items), body, end)
        self.position_at_end(body)
        yield item
        self.branch(head)
        self.position_at_end(end)

    # -- calls
    def intrinsic(self, name: str, result: ir.Type, arguments: Sequence[Value]) -> Value:
        function = self.ir_module.globals.get(name)
        if function is None:
            signature = ir.FunctionType(result, [a.type for a in arguments])
            function = ir.Function(self.ir_module, signature, name)
        return self.call(function, arguments)

    def call_field(self, field: Field, arguments: Sequence[Value]) -> None:
        """Call the kernel function whose address the field holds."""
        self.call_address(self.field(field), [self.fields, *arguments])

    def call_address(self, address: Value, arguments: Sequence[Value]) -> None:
        signature = ir.FunctionType(VOID, [a.type for a in arguments])
        self.call(self.inttoptr(address, signature.as_pointer()), arguments)

    def finish(self) -> ir.Module:
        self.ret_void()
        return self.ir_module

    # -- vectors
    def splat(self, scalar: Value, vector: ir.VectorType | None = None) -> Value:
        vector = vector or ir.VectorType(scalar.type, LANES)
        undefined = ir.Constant(vector, ir.Undefined)
        one = self.insert_element(undefined, scalar, I32(0))
        return self.shuffle(one, undefined, [0] * vector.count)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))
        return self.shuffle_vector(a, b, mask)

    def halves(self, vector: Value) -> list[Value]:
        """A vector of any width as its lower and upper half."""
        n = vector.type.count
        return [self.shuffle(vector, vector, range(h, h + n // 2)) for h in (0, n // 2)]

    def join(self, low: Value, high: Value) -> Value:
        return self.shuffle(low, high, range(2 * low.type.count))

    def fma(self, x: Value, y: Value, z: Value) -> Value:
        return self.intrinsic("llvm.fmuladd.v16f32", VF, [x, y, z])

    def shift_left(self, x: Value, bits: int) -> Value:
        return self.shl(x, ints(bits)) if bits else x

    def shift_right(self, x: Value, bits: int) -> Value:
        return self.lshr(x, ints(bits)) if bits else x

    def mask(self, x: Value, mask: int) -> Value:
        return self.and_(x, ints(mask))

    def prefetch(self, address: Value) -> None:
        pointer = self.inttoptr(address, PTR)
        self.intrinsic("llvm.prefetch.p0", VOID, [pointer, I32(0), I32(3), I32(1)])


def i64(value: int) -> Value:
    return ir.Constant(I64, value)


def ints(value: int | Sequence[int]) -> Value:
    """A 16-lane i32 constant."""
    values = [value] * LANES if isinstance(value, int) else list(value)
    return ir.Constant(VI, [(v + 2**31) % 2**32 - 2**31 for v in values])


def floats(value: float | Sequence[float]) -> Value:
    """A 16-lane float constant."""
    values = [value] * LANES if isinstance(value, (int, float)) else list(value)
    return ir.Constant(VF, [struct.unpack("f", struct.pack("f", v))[0] for v in values])
