"""Kernels for floating-point activations, emitted as vector IR.

Two ways through a weight, by the number of rows m of A:

fused: a block of 16 weight rows is decoded in registers and meets all m rows at once (m small).
panel: 16 rows x CHUNK values of k are decoded into a buffer that stays in the first-level cache,
    and every tile of packed A meets it there; the decoding is paid once for all m. A panel kernel
    is three functions that call one another through `Field`s, so that only `decode_panel` is
    compiled anew for each format.

All kernels hand their float accumulators [rows of A][16] to an epilogue (epilogue.py).
"""

from __future__ import annotations

from llvmlite import ir

from .decode import (
    Extras,
    Weights,
    index_bits,
    is_placed,
    load_words,
    lookup,
    placed_values,
    sum_tables,
    weight_values,
)
from .ir import F32, I64, LANES, VF, Builder, Field, Value, floats, i64
from .target import Target

PREFETCH = 4096  # bytes ahead of the words being read: about the latency of memory at full rate


def blocks_of(b: Builder, item: Value) -> tuple[Value, Value]:
    """The range of 16-row blocks of a work item."""
    per_item = b.field(Field.BLOCKS)
    first = b.mul(item, per_item)
    total = b.udiv(b.add(b.field(Field.N), i64(LANES - 1)), i64(LANES))
    return first, b.smaller(b.add(first, per_item), total)


def word_address(b: Builder, block: Value, k: Value | None, bits: int) -> Value:
    """Where the words of a block begin, at value k of its rows."""
    start = b.mul(block, b.field(Field.K_PADDED))
    if k is not None:
        start = b.add(start, k)
    return b.add(b.field(Field.W), b.times(start, 2 * bits))  # 16 rows * bits / 8


def chains(rows: int) -> int:
    """Independent accumulators per row: enough that latency (4 cycles, 2 a cycle) is hidden."""
    return {1: 4, 2: 2}.get(rows, 1)


def fused(target: Target, weights: Weights, rows: int, unit: int) -> ir.Module:
    """void fused(fields): exactly `rows` rows of float32 A, A_STRIDE bytes apart, K_PADDED long.

    Where index_bits says so, A is the tables that pack_tables makes of one row.
    """
    b = Builder("fused")
    tile = b.variable(ir.ArrayType(VF, rows))
    tile_address = b.ptrtoint(tile, I64)
    per_value_scale = weights.zeros_mode == "rescale"
    width = index_bits(target, weights, rows)
    with b.work_items() as item, b.loop(*blocks_of(b, item)) as block:
        word = b.variable(I64, word_address(b, block, None, weights.bits))
        a = b.variable(I64, b.field(Field.A))
        stride = b.field(Field.A_STRIDE)
        extras = Extras(b, target, weights, block)
        totals = [b.variable(VF, floats(0.0)) for _ in range(rows)]
        parts = [[b.variable(VF) for _ in range(chains(rows))] for _ in range(rows)]
        with b.loop(0, b.field(Field.GROUPS)) as group:
            scale, zero = extras.load(group)
            if is_placed(weights):
                value = placed_values(b, weights, zero)
            else:
                value = weight_values(b, target, weights, zero)
            for row in parts:
                for part in row:
                    b.store(floats(0.0), part)
            with b.loop(0, b.field(Field.GROUP), unit):
                address, first_row = b.get(word), b.get(a)
                words = load_words(b, address, weights.bits, unit)
                for i in range(len(words)):
                    b.prefetch(b.offset(address, PREFETCH + 64 * i))
                if width:
                    used = _add_lookups(b, weights, width, words, first_row, parts[0])
                else:
                    used = 4 * unit
                    for j in range(unit):
                        x = value(words, unit, j)
                        if per_value_scale:
                            x = b.fsub(b.fmul(x, scale) if scale else x, zero)
                        start = first_row
                        for row in parts:
                            activation = b.splat(b.load_at(b.offset(start, 4 * j), F32, 4))
                            part = row[j % len(row)]
                            b.store(b.fma(x, activation, b.get(part)), part)
                            start = b.add(start, stride)
                b.store(b.offset(address, 64 * len(words)), word)
                b.store(b.offset(first_row, used), a)
            for row, total in zip(parts, totals, strict=True):
                values = [b.get(part) for part in row]
                while len(values) > 1:
                    values = [b.fadd(x, y) for x, y in zip(values[::2], values[1::2], strict=True)]
                if scale and not per_value_scale:
                    b.store(b.fma(values[0], scale, b.get(total)), total)
                else:
                    b.store(b.fadd(values[0], b.get(total)), total)
        for i, total in enumerate(totals):
            b.store_at(b.get(total), b.offset(tile_address, 64 * i), 4)
        b.call_field(Field.EPILOGUE, [tile_address, block, i64(0), b.field(Field.M)])
    return b.finish()


def _add_lookups(
    b: Builder, weights: Weights, width: int, words: list[Value], tables: Value, parts: list[Value]
) -> int:
    """Add to the parts what the tables hold for these words; the bytes of tables read."""
    kind, address = ir.VectorType(F32, 1 << width), tables
    for word in words:
        for i, (first, _) in enumerate(sum_tables(width, weights)):
            index = b.shift_right(word, first * weights.bits)
            part = parts[i % len(parts)]
            x = lookup(b, b.load_at(address, kind, 4), index)
            b.store(b.fadd(x, b.get(part)), part)
            address = b.offset(address, 4 << width)
    return len(words) * len(sum_tables(width, weights)) * (4 << width)


def pack_tables(target: Target, weights: Weights) -> ir.Module:
    """void pack_tables(fields): one row of float32 A -> OUT [word][table][entry]; items are groups.

    An entry is the sum over a few columns of their activations times their values (sum_tables).
    """
    b = Builder("pack_tables")
    width = index_bits(target, weights, 1)
    kind = ir.VectorType(F32, 1 << width)
    tables, per_word = sum_tables(width, weights), 32 // weights.bits
    length = b.field(Field.GROUP)
    with b.work_items() as item, b.loop(0, length, per_word) as k:
        k = b.add(b.mul(item, length), k)
        a = b.add(b.field(Field.A), b.times(k, 4))
        word = b.udiv(k, i64(per_word))
        out = b.add(b.field(Field.OUT), b.times(word, len(tables) * (4 << width)))
        for i, (first, entries) in enumerate(tables):
            total = None
            for j in range(len(entries[0])):
                scalar = b.load_at(b.offset(a, 4 * (first + j)), F32, 4)
                factors = ir.Constant(kind, [entry[j] for entry in entries])
                product = b.fmul(b.splat(scalar, kind), factors)
                total = b.fadd(total, product) if total else product
            b.store_at(total, b.offset(out, i * (4 << width)), 4)
    return b.finish()


def decode_panel(target: Target, weights: Weights, unit: int) -> ir.Module:
    """void decode_panel(fields, block, k0, k1, panel): final weights as float32 [k1 - k0][16]."""
    b = Builder("decode_panel", [I64] * 4)
    block, k0, k1, panel = b.arguments
    extras = Extras(b, target, weights, block)
    word = b.variable(I64, word_address(b, block, k0, weights.bits))
    out = b.variable(I64, panel)
    run, length = b.field(Field.RUN), b.field(Field.GROUP)
    with b.loop(k0, k1, run) as k:
        scale, zero = extras.load(b.udiv(k, length))
        value = weight_values(b, target, weights, zero)
        with b.loop(k, b.smaller(b.add(k, run), k1), unit):
            address, to = b.get(word), b.get(out)
            words = load_words(b, address, weights.bits, unit)
            for j in range(unit):
                x = value(words, unit, j)
                x = b.fmul(x, scale) if scale else x
                x = b.fsub(x, zero) if weights.zeros_mode == "rescale" else x
                b.store_at(x, b.offset(to, 64 * j), 4)
            b.store(b.offset(address, 64 * len(words)), word)
            b.store(b.offset(to, 64 * unit), out)
    return b.finish()


def tile_widths(target: Target) -> tuple[int, ...]:
    """Rows of A in a register tile, the last the full one: accumulators must fit the registers."""
    return (4, 8, 12) if target.has("avx512f") else (2, 4, 6)


GEMM_UNROLL = 4


def gemm(target: Target) -> ir.Module:
    """void gemm(fields, panel, a, acc, count, first, rows): acc[rows][16] (+)= a . panel.

    panel: float32 [count][16]; a: tiles of float32 [count][width], as `pack` leaves them; count: a
    multiple of 4; first: nonzero where acc is to be set rather than added to.
    """
    b = Builder("gemm", [I64] * 6)
    panel, a, acc, count, first, rows = b.arguments
    full = tile_widths(target)[-1]
    tiles = b.udiv(rows, i64(full))
    a_tile = b.mul(count, i64(4 * full))
    with b.loop(0, tiles) as tile:
        _tile(
            b,
            full,
            panel,
            b.add(a, b.mul(tile, a_tile)),
            b.add(acc, b.times(tile, 64 * full)),
            count,
            first,
        )
    rest = b.sub(rows, b.times(tiles, full))
    a_rest, acc_rest = b.add(a, b.mul(tiles, a_tile)), b.add(acc, b.times(tiles, 64 * full))
    lower = 0
    for width in tile_widths(target):
        above = b.icmp_signed(">", rest, i64(lower))
        with b.if_then(b.and_(above, b.icmp_signed("<=", rest, i64(width)))):
            _tile(b, width, panel, a_rest, acc_rest, count, first)
        lower = width
    return b.finish()


def _tile(
    b: Builder, width: int, panel: Value, a: Value, acc: Value, count: Value, first: Value
) -> None:
    totals = [b.variable(VF, floats(0.0)) for _ in range(width)]
    with b.if_then(b.icmp_unsigned("==", first, i64(0))):
        for i, total in enumerate(totals):
            b.store(b.load_at(b.offset(acc, 64 * i), VF, 4), total)
    weight, activation = b.variable(I64, panel), b.variable(I64, a)
    with b.loop(0, count, GEMM_UNROLL):
        w, x = b.get(weight), b.get(activation)
        for step in range(GEMM_UNROLL):
            vector = b.load_at(b.offset(w, 64 * step), VF, 4)
            for i, total in enumerate(totals):
                scalar = b.load_at(b.offset(x, 4 * (step * width + i)), F32, 4)
                b.store(b.fma(vector, b.splat(scalar), b.get(total)), total)
        b.store(b.offset(w, 64 * GEMM_UNROLL), weight)
        b.store(b.offset(x, 4 * width * GEMM_UNROLL), activation)
    for i, total in enumerate(totals):
        b.store_at(b.get(total), b.offset(acc, 64 * i), 4)


def padded_rows(b: Builder, target: Target, rows: Value) -> Value:
    """Rows as packed: full tiles and one narrower one that holds the rest (plan.padded_rows)."""
    widths = tile_widths(target)
    rest = b.urem(rows, i64(widths[-1]))
    padded = i64(0)
    for lower, width in reversed(list(zip((0, *widths), widths, strict=False))):
        within = b.and_(b.icmp_signed(">", rest, i64(lower)), b.icmp_signed("<=", rest, i64(width)))
        padded = b.select(within, i64(width), padded)
    return b.add(b.sub(rows, rest), padded)


def packed_offset(b: Builder, m0: Value, k0: Value, padded: Value) -> Value:
    """Bytes before the packed chunk (m0, k0): blocks of M_BLOCK rows, within them chunks of k."""
    return b.times(b.add(b.mul(m0, b.field(Field.K_USED)), b.mul(k0, padded)), 4)


def panel(target: Target) -> ir.Module:
    """void panel(fields): items are (block of A rows, range of weight blocks), A rows outermost."""
    b = Builder("panel")
    slot = b.mul(b.take(Field.SLOT), b.field(Field.SCRATCH_STRIDE))
    buffer = b.add(b.field(Field.SCRATCH), slot)
    chunk, m_block = b.field(Field.CHUNK), b.field(Field.M_BLOCK)
    sums = b.add(buffer, b.times(chunk, 64))
    k_used, m = b.field(Field.K_USED), b.field(Field.M)
    weight_items = _weight_items(b)
    with b.work_items() as item:
        m0 = b.mul(b.udiv(item, weight_items), m_block)
        m1 = b.smaller(b.add(m0, m_block), m)
        rows = b.sub(m1, m0)
        padded = padded_rows(b, target, rows)
        first, stop = blocks_of(b, b.urem(item, weight_items))
        pitch = b.times(padded, 64)
        with b.loop(0, k_used, chunk) as k0:
            k1 = b.smaller(b.add(k0, chunk), k_used)
            a = b.add(b.field(Field.A), packed_offset(b, m0, k0, padded))
            is_first = b.zext(b.icmp_unsigned("==", k0, i64(0)), I64)
            with b.loop(first, stop) as block:
                b.call_field(Field.DECODE, [block, k0, k1, buffer])
                acc = b.add(sums, b.mul(b.sub(block, first), pitch))
                b.call_field(Field.GEMM, [buffer, a, acc, b.sub(k1, k0), is_first, rows])
        with b.loop(first, stop) as block:
            acc = b.add(sums, b.mul(b.sub(block, first), pitch))
            b.call_field(Field.EPILOGUE, [acc, block, m0, m1])
    return b.finish()


def _weight_items(b: Builder) -> Value:
    per_item = b.field(Field.BLOCKS)
    blocks = b.udiv(b.add(b.field(Field.N), i64(LANES - 1)), i64(LANES))
    return b.udiv(b.add(blocks, b.sub(per_item, i64(1))), per_item)


def pack(target: Target) -> ir.Module:
    """void pack(fields): float32 A [M][K] -> OUT, tiles of [k][width] within (M_BLOCK, CHUNK).

    Items are (block of rows, chunk of k). Rows beyond M repeat the last one (their products are
    never stored); values of k beyond K are zero.
    """
    b = Builder("pack")
    chunk, m_block = b.field(Field.CHUNK), b.field(Field.M_BLOCK)
    k, k_used, m = b.field(Field.K), b.field(Field.K_USED), b.field(Field.M)
    chunks = b.udiv(b.add(k_used, b.sub(chunk, i64(1))), chunk)
    full, last_row = tile_widths(target)[-1], b.sub(m, i64(1))
    with b.work_items() as item:
        m0, k0 = b.mul(b.udiv(item, chunks), m_block), b.mul(b.urem(item, chunks), chunk)
        k1 = b.smaller(b.add(k0, chunk), k_used)
        rows = b.sub(b.smaller(b.add(m0, m_block), m), m0)
        padded = padded_rows(b, target, rows)
        start = b.add(b.field(Field.OUT), packed_offset(b, m0, k0, padded))
        valid = b.smaller(b.sub(k1, k0), b.sub(k, k0))
        count = b.sub(k1, k0)
        with b.loop(0, padded, full) as tile:
            width = b.smaller(i64(full), b.sub(padded, tile))
            to = b.add(start, b.times(b.mul(tile, count), 4))
            with b.loop(0, width) as i:
                row = b.smaller(b.add(b.add(m0, tile), i), last_row)
                source = b.add(b.field(Field.A), b.times(b.add(b.mul(row, k), k0), 4))
                target_address = b.add(to, b.times(i, 4))
                with b.loop(0, valid) as j:
                    x = b.load_at(b.add(source, b.times(j, 4)), F32, 4)
                    b.store_at(x, b.add(target_address, b.times(b.mul(j, width), 4)), 4)
                with b.loop(b.select(b.icmp_signed("<", valid, i64(0)), i64(0), valid), count) as j:
                    zero = ir.Constant(F32, 0.0)
                    b.store_at(zero, b.add(target_address, b.times(b.mul(j, width), 4)), 4)
    return b.finish()
