"""From accumulators to the output: scales of rows and tensor, bias, conversion, the ragged edge."""

from __future__ import annotations

from llvmlite import ir

from .decode import gather, row_indices
from .ir import F16, F32, I8, I16, I32, I64, LANES, VF, VI, Builder, Field, Value, floats, i64, ints
from .target import Target

OUT_TYPES: dict[str, ir.Type] = {
    "float32": F32, "float16": I16, "bfloat16": I16, "int32": I32, "int8": I8,
}  # the 16-bit floats as their bits  # fmt: skip


def epilogue(target: Target, accumulator: str, out: str, exact: bool) -> ir.Module:
    """void epilogue(fields, acc, block, m0, m1): acc [m1 - m0][16] -> OUT[m0:m1, block's rows].

    accumulator: "float32" or "int32". exact: all integer, with an int32 bias and no row scale;
    otherwise bias is float32 and the arithmetic float32.
    """
    b = Builder("epilogue", [I64] * 4)
    acc, block, m0, m1 = b.arguments
    vector, scalar = (VI, I32) if exact else (VF, F32)
    bias = b.variable(vector, ints(0) if exact else floats(0.0))
    with b.if_then(b.given(Field.BIAS)):
        base = b.field(Field.BIAS)
        rows = row_indices(b, block)
        b.store(gather(b, [b.add(base, b.times(row, 4)) for row in rows], scalar), bias)
    tensor_scale = b.variable(F32, ir.Constant(F32, 1.0))
    with b.if_then(b.given(Field.TENSOR_SCALE)):
        b.store(b.load_at(b.field(Field.TENSOR_SCALE), F32, 4), tensor_scale)
    n, first = b.field(Field.N), b.times(block, LANES)
    count = b.smaller(b.sub(n, first), i64(LANES))
    is_full = b.icmp_signed("==", count, i64(LANES))
    element = OUT_TYPES[out]
    size = 4 if element in (F32, I32) else 1 if element is I8 else 2
    edge = b.variable(ir.ArrayType(ir.VectorType(element, LANES), 1))
    with b.loop(m0, m1) as m:
        raw = b.load_at(b.add(acc, b.times(b.sub(m, m0), 64)), VI, 4)
        if exact:
            result = _from_int(b, b.add(raw, b.get(bias)), out)
        else:
            x = b.bitcast(raw, VF) if accumulator == "float32" else b.sitofp(raw, VF)
            factor = b.variable(F32, b.get(tensor_scale))
            with b.if_then(b.given(Field.ROW_SCALE)):
                row_scale = b.load_at(b.add(b.field(Field.ROW_SCALE), b.times(m, 4)), F32, 4)
                b.store(b.fmul(b.get(factor), row_scale), factor)
            x = b.fma(x, b.splat(b.get(factor)), b.get(bias))
            result = convert(b, target, x, out)
        to = b.add(b.field(Field.OUT), b.times(b.add(b.mul(m, n), first), size))
        with b.if_else(is_full) as (whole, ragged):
            with whole:
                b.store_at(result, to, size)
            with ragged:
                edge_address = b.ptrtoint(edge, I64)
                b.store_at(result, edge_address, size)
                with b.loop(0, count) as lane:
                    offset = b.times(lane, size)
                    value = b.load_at(b.add(edge_address, offset), element, size)
                    b.store_at(value, b.add(to, offset), size)
    return b.finish()


def dequantize(target: Target, out: str) -> ir.Module:
    """void dequantize(fields): panels from DECODE, turned to rows of OUT (N, K)."""
    b = Builder("dequantize")
    chunk, k, n = b.field(Field.CHUNK), b.field(Field.K), b.field(Field.N)
    slot = b.mul(b.take(Field.SLOT), b.field(Field.SCRATCH_STRIDE))
    panel = b.add(b.field(Field.SCRATCH), slot)
    element = OUT_TYPES[out]
    size = 4 if element is F32 else 2
    factor = b.variable(F32, ir.Constant(F32, 1.0))
    with b.if_then(b.given(Field.TENSOR_SCALE)):
        b.store(b.load_at(b.field(Field.TENSOR_SCALE), F32, 4), factor)
    with b.work_items() as item:
        chunks = b.udiv(b.add(b.field(Field.K_USED), b.sub(chunk, i64(1))), chunk)
        block, k0 = b.udiv(item, chunks), b.mul(b.urem(item, chunks), chunk)
        k1 = b.smaller(b.add(k0, chunk), b.field(Field.K_USED))
        b.call_field(Field.DECODE, [block, k0, k1, panel])
        first = b.times(block, LANES)
        valid = b.sub(b.smaller(k1, k), k0)
        with b.loop(0, b.smaller(b.sub(n, first), i64(LANES))) as row:
            source = b.add(panel, b.times(row, 4))
            to = b.add(b.field(Field.OUT), b.times(b.add(b.mul(b.add(first, row), k), k0), size))
            whole = b.and_(valid, i64(-LANES))
            with b.loop(0, whole, LANES) as j:
                start = b.add(source, b.times(j, 64))
                x = gather(b, [b.offset(start, 64 * i) for i in range(LANES)], F32)
                x = b.fmul(x, b.splat(b.get(factor)))
                b.store_at(convert(b, target, x, out), b.add(to, b.times(j, size)), size)
            with b.loop(whole, valid) as j:
                x = b.splat(b.load_at(b.add(source, b.times(j, 64)), F32, 4))
                x = convert(b, target, b.fmul(x, b.splat(b.get(factor))), out)
                b.store_at(b.extract_element(x, I32(0)), b.add(to, b.times(j, size)), size)
    return b.finish()


def convert(b: Builder, target: Target, x: Value, out: str) -> Value:
    """Floats -> the bits of the output dtype, rounded half to even; integers saturate."""
    if out == "float32":
        return x
    if out == "float16":
        return _to_half(b, target, x)
    if out == "bfloat16":
        return _to_bfloat16(b, x)
    rounded = b.intrinsic("llvm.roundeven.v16f32", VF, [x])
    return _from_int(b, b.intrinsic("llvm.fptosi.sat.v16i32.v16f32", VI, [rounded]), out)


def _from_int(b: Builder, x: Value, out: str) -> Value:
    if out == "int32":
        return x
    assert out == "int8"
    x = b.select(b.icmp_signed("<", x, ints(127)), x, ints(127))
    x = b.select(b.icmp_signed(">", x, ints(-128)), x, ints(-128))
    return b.trunc(x, ir.VectorType(I8, LANES))


def _to_bfloat16(b: Builder, x: Value) -> Value:
    bits = b.bitcast(x, VI)
    odd = b.mask(b.shift_right(bits, 16), 1)
    rounded = b.add(b.add(bits, ints(0x7FFF)), odd)
    is_nan = b.fcmp_unordered("uno", x, x)  # rounding could carry a NaN's mantissa into the sign
    rounded = b.select(is_nan, ints(0x7FC00000), rounded)
    return b.trunc(b.shift_right(rounded, 16), ir.VectorType(I16, LANES))


def _to_half(b: Builder, target: Target, x: Value) -> Value:
    half = ir.VectorType(I16, LANES)
    if target.has("f16c"):
        return b.bitcast(b.fptrunc(x, ir.VectorType(F16, LANES)), half)
    bits = b.bitcast(x, VI)
    magnitude = b.mask(bits, 0x7FFFFFFF)
    odd = b.mask(b.shift_right(magnitude, 13), 1)
    rebiased = b.sub(b.add(b.add(magnitude, ints(0xFFF)), odd), ints(112 << 23))
    normal = b.shift_right(rebiased, 13)
    # below the normal range: adding 0.5 leaves the rounded subnormal in the lowest bits
    small = b.bitcast(b.fadd(b.bitcast(magnitude, VF), floats(0.5)), VI)
    small = b.sub(small, ints(0x3F000000))
    result = b.select(b.icmp_signed("<", magnitude, ints(0x38800000)), small, normal)
    result = b.select(b.icmp_signed(">=", magnitude, ints(0x477FF000)), ints(0x7C00), result)
    result = b.select(b.icmp_signed(">", magnitude, ints(0x7F800000)), ints(0x7E00), result)
    sign = b.mask(b.shift_right(bits, 16), 0x8000)
    return b.trunc(b.or_(result, sign), half)
