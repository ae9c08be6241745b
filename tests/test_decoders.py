"""The decode family's PTX, executed here instruction by instruction on words of the packed layout.

No GPU: a few PTX instructions in numpy, on vectors of 32-bit registers. What a decoder makes of
the words that FRAGMENT_16.pack writes is compared with the format's values, so the decoder and the
layout are checked against each other.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bitblas.formats import FORMATS, Table
from bitblas.kernels.decoders import (
    Decoder,
    PairDecoder,
    operand_decoder,
    pair_decoder,
    raw_operand_decoder,
)
from bitblas.layouts import FRAGMENT_16, planes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DECODERS = [
    (name, dtype)
    for name, fmt in FORMATS.items()
    for dtype in DTYPES
    if pair_decoder(fmt, dtype) is not None
]
TABLES = [(name, dtype) for name, dtype in DECODERS if isinstance(FORMATS[name].decoder, Table)]
INTEGERS = [(name, dtype) for name, dtype in DECODERS if FORMATS[name].is_integer]


# --- a small PTX machine: every register is a uint32 vector, one element for each lane -----------


SHARED = 4096, 1024  # where a block's dynamic shared memory ends, and where it starts


def execute(
    asm: str, inputs: dict[str, np.ndarray], memory: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """All registers after the instructions. KeyError where one is read that was never written.

    memory: words of shared memory up to its end; inputs may be special registers.
    """
    like = np.zeros_like(next(iter(inputs.values())))
    size = like + np.uint32(SHARED[0] - SHARED[1])
    registers = {**inputs, "%dynamic_smem_size": size, "global_smem": like + np.uint32(SHARED[1])}
    declared = set()

    def places(operand: str) -> np.ndarray:
        """[register + bytes] -> which words of memory."""
        register, offset = operand.strip("[]").split(" + ")
        address = registers[register].astype(np.int64) + int(offset)
        assert memory is not None and (address % 4 == 0).all()
        return (address - SHARED[0]) // 4 + len(memory)

    def read(operand: str) -> np.ndarray:
        if operand.startswith("0x"):
            return like + np.uint32(int(operand, 16))
        return like + np.uint32(int(operand)) if operand.isdigit() else registers[operand]

    for line in filter(None, (line.strip("{} ") for line in asm.split(";"))):
        opcode, rest = line.split(None, 1)
        operands = [operand.strip() for operand in rest.split(",")]
        if opcode == ".reg":
            operands[0] = operands[0].split()[-1]
            declared.update(operands)
            continue
        target, sources = operands[0], operands[1:]
        if opcode == "st.shared.v4.b32":
            for i, source in enumerate(sources):
                memory[places(target) + i] = read(source.strip("{} "))
            continue
        if opcode == "ld.shared.b32":
            registers[target] = memory[places(sources[0])]
            continue
        assert re.fullmatch(r"\$\d+", target) or target in declared, line
        assert target not in inputs, f"an input is overwritten: {line}"
        registers[target] = OPERATIONS[opcode](*map(read, sources)).astype(np.uint32)
    return registers


def _shift(operation: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """PTX shifts by 32 and more give zero, numpy's do not."""
    return lambda a, n: np.where(n < 32, operation(a, np.minimum(n, 31)), 0)


def _lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    result = np.zeros_like(a)
    for index in range(8):
        if int(table.flat[0]) >> index & 1:
            terms = zip((a, b, c), (index & 4, index & 2, index & 1))
            x, y, z = (operand if wanted else ~operand for operand, wanted in terms)
            result |= x & y & z
    return result


def _prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    source = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = source >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64)) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), 255, 0)  # what bit 3 of a selector asks for
        chosen = np.where(nibble & np.uint32(8), sign, byte).astype(np.uint32)
        result |= chosen << np.uint32(8 * i)
    return result


def _absolute_differences(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    bytes_of = [np.ascontiguousarray(x).view(np.uint8).astype(np.int16) for x in (a, b)]
    return np.abs(bytes_of[0] - bytes_of[1]).astype(np.uint8).view(np.uint32) + c


def halves(register: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """float64 [..., 2] of packed 16-bit values, low half first."""
    words = torch.from_numpy(np.ascontiguousarray(register).view(np.int32))
    return words.unsqueeze(-1).view(dtype).double()


def _pairs(values: torch.Tensor, dtype: torch.dtype) -> np.ndarray:
    """float64 [..., 2], rounded, in registers."""
    rounded = values.to(dtype).contiguous()
    return rounded.view(torch.int32).squeeze(-1).numpy().view(np.uint32)


def _rounded(operation: Callable[..., torch.Tensor], dtype: torch.dtype) -> Any:
    """An instruction on packed 16-bit values: exact in float64, rounded once."""
    return lambda *operands: _pairs(operation(*(halves(x, dtype) for x in operands)), dtype)


def _pack_bfloat16(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    values = np.stack([low.view(np.float32), high.view(np.float32)], axis=-1)
    return _pairs(torch.from_numpy(values).double(), torch.bfloat16)


def _subtract_floats(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a.view(np.float32) - b.view(np.float32)).view(np.uint32)


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": _shift(lambda a, n: a << n),
    "shr.u32": _shift(lambda a, n: a >> n),
    "add.u32": lambda a, b: a + b,
    "sub.u32": lambda a, b: a - b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "vabsdiff4.u32.u32.u32": _absolute_differences,
    "sub.rn.f32": _subtract_floats,
    "cvt.rn.bf16x2.f32": _pack_bfloat16,
}
for kind, dtype in (("f16x2", torch.float16), ("rn.bf16x2", torch.bfloat16)):
    OPERATIONS[f"add.{kind}"] = _rounded(torch.add, dtype)
    OPERATIONS[f"mul.{kind}"] = _rounded(torch.mul, dtype)
    OPERATIONS[f"fma.rn.{kind[-6:].lstrip('.')}"] = _rounded(lambda a, b, c: a * b + c, dtype)


def test_the_machine_knows_ptx():
    """Examples of the PTX manual's semantics, computed by hand."""

    def result(line: str, *inputs: int) -> int:
        registers = {f"${i + 1}": np.array([x], dtype=np.uint32) for i, x in enumerate(inputs)}
        return int(execute("{ " + line + " }", registers)["$0"][0])

    assert result("prmt.b32 $0, $1, $2, 0x5410;", 0x33221100, 0x77665544) == 0x55441100
    assert result("prmt.b32 $0, $1, $1, 0x000b;", 0x80221100) == 0x000000FF
    assert result("lop3.b32 $0, $1, $2, $3, 0xea;", 0b1100, 0b1010, 0b0001) == 0b1001
    assert result("lop3.b32 $0, $1, $2, $3, 0x6a;", 0b1100, 0b1010, 0b0011) == 0b1011
    assert result("shr.u32 $0, $1, 32;", 0xFFFFFFFF) == 0
    assert result("sub.u32 $0, $1, $2;", 0, 1) == 0xFFFFFFFF
    assert result("cvt.rn.bf16x2.f32 $0, $1, $2;", 0x3F800000, 0xC0000000) == 0x3F80C000
    assert result("fma.rn.bf16x2 $0, $1, $2, $3;", 0x3F804000, 0x40004040, 0x80003F80) == 0x400040E0


# --- packed words through a decoder ---------------------------------------------------------------


def every_code_everywhere(bits: int, seed: int) -> torch.Tensor:
    """Codes (N, BK), N whole tiles: each place of a tile meets each code, beside random others."""
    rng = torch.Generator().manual_seed(seed)
    rounds = max(2 ** (3 - bits), 1)
    place = (rounds, 1, FRAGMENT_16.ROWS, FRAGMENT_16.block_k(bits))
    base = torch.randint(0, 1 << bits, place, generator=rng)
    codes = (base + torch.arange(1 << bits)[:, None, None]) % (1 << bits)
    return codes.to(torch.uint8).view(-1, place[-1])


def pairs_of_words(codes: torch.Tensor, bits: int) -> dict[str, np.ndarray]:
    """The inputs that the kernel gives a decoder, from the packed weight.

    By name, behind the outputs; each [tile, 128 lanes, pair of words along K].
    """
    words = FRAGMENT_16.pack(codes, bits).view(torch.int32).squeeze(-1)
    words = words.view(words.shape[0], -1, 128, 4)  # tile, chunk, lane, word
    widths = [width for width, _ in planes(bits)]
    registers, chunks = 2 * 16 // widths[0], FRAGMENT_16.block_k(bits) * widths[0] // 256
    main = words[:, :chunks].permute(0, 2, 1, 3).reshape(words.shape[0], 128, -1, 2)
    found = {f"${registers}": main[..., 0], f"${registers + 1}": main[..., 1]}
    if len(widths) > 1:  # a word of the second plane for each pair, twice
        extra = words[:, chunks:].permute(0, 2, 1, 3).reshape(words.shape[0], 128, -1)
        found |= {f"${registers + 2}": extra, f"${registers + 3}": extra}
    return {name: x.contiguous().numpy().view(np.uint32) for name, x in found.items()}


def decoded(name: str, dtype: str, seed: int) -> tuple[PairDecoder, torch.Tensor, torch.Tensor]:
    """(decoder, raw values, codes), both [r3, any]: the decoder's outputs and where they belong."""
    fmt = FORMATS[name]
    decoder = pair_decoder(fmt, dtype)
    assert decoder is not None
    codes = every_code_everywhere(fmt.bits, seed)
    inputs = pairs_of_words(codes, fmt.bits)
    inputs |= lanes(decoder, inputs)
    assert decoder.constraints == ",".join(["=&r"] * decoder.registers + ["r"] * len(inputs))
    outputs = execute(decoder.asm, inputs, filled(decoder))
    return decoder, *by_place(outputs, codes, inputs, decoder.registers, dtype)


def lanes(decoder: Decoder, words: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What decoders that look codes up read besides words."""
    like = next(iter(words.values()))
    lane = np.zeros_like(like) + 4 * np.arange(like.shape[1], dtype=np.uint32)[:, None] % 128
    return {f"${decoder.registers + 2 + i}": lane for i in range(2 * bool(decoder.table_bytes))}


def by_place(
    outputs: dict[str, np.ndarray],
    codes: torch.Tensor,
    inputs: dict[str, np.ndarray],
    registers: int,
    dtype: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(what a decoder wrote, codes that it should have read), both [r3, any]."""
    tiles, lanes, pairs = next(iter(inputs.values())).shape
    span = 4 * registers  # values of k in a pair
    row = torch.arange(lanes)[:, None] // 32 * 16 + torch.arange(lanes)[:, None] // 4 % 8
    k = torch.arange(pairs) * span + torch.arange(lanes)[:, None] % 4 * 2
    by_tile = codes.view(tiles, FRAGMENT_16.ROWS, -1)
    raw: tuple[list[torch.Tensor], ...] = ([], [])
    wanted: tuple[list[torch.Tensor], ...] = ([], [])
    for register in range(registers):
        step, x, r3 = register // 4, register // 2 % 2, register % 2
        both = halves(outputs[f"${register}"], DTYPES[dtype])
        for h in range(2):
            raw[r3].append(both[..., h].flatten())
            wanted[r3].append(by_tile[:, row + 8 * r3, k + step * 16 + x * 8 + h].flatten())
    return torch.stack([*map(torch.cat, raw)]), torch.stack([*map(torch.cat, wanted)])


def filled(decoder: Decoder, warps: int = 8) -> np.ndarray:
    """The table that the threads of a block write; all ones where nothing is."""
    memory = np.full(decoder.table_bytes // 4, 0xFFFFFFFF, dtype=np.uint32)
    if decoder.table_bytes:
        threads = np.arange(32 * warps, dtype=np.uint32)
        execute(decoder.fill(warps), {"%tid.x": threads}, memory)
    return memory


def by_row_half(pair: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(pair, dtype=torch.float64)[:, None]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0), b.nan_to_num(0))


EXTRAS = {"minus": (3, 1), "scale": (0.3, 1.7), "addend": (-0.15, 0.6)}  # in the two row halves


@pytest.mark.parametrize(
    ("based", "scaled", "added"),
    [(False, False, False), (False, True, False), (True, True, False), (True, True, True),
     (True, False, True), (False, True, True)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("name", "dtype", "lookup"),
    [(*pair, False) for pair in DECODERS] + [(*pair, True) for pair in TABLES],
)
def test_operands_are_scaled_weights(name, dtype, lookup, based, scaled, added, seed):
    """Rounded once, from a code less an integer zero point, which is exact."""
    fmt = FORMATS[name]
    if (based or added) and not fmt.is_integer:
        pytest.skip("only integers have zero points")
    decoder = operand_decoder(fmt, dtype, based, scaled, added, lookup)
    assert bool(decoder.table_bytes) == lookup
    codes = every_code_everywhere(fmt.bits, seed)
    inputs = pairs_of_words(codes, fmt.bits)
    words = dict(inputs)
    inputs |= lanes(decoder, words)
    first = decoder.registers + len(inputs)
    given = {key: by_row_half(EXTRAS[key]).to(DTYPES[dtype]).double() for key in EXTRAS}
    for key, there in (("minus", based), ("scale", scaled), ("addend", added)):
        if there:
            given_here = -(given[key] + by_row_half(decoder.base)) if key == "minus" else given[key]
            for r3 in range(2):
                both = _pairs(given_here[r3].expand(*words[f"${decoder.registers}"].shape, 2),
                              DTYPES[dtype])  # fmt: skip
                inputs |= {f"${first}": both, f"${first + 1}": both}
                first += 2
    assert decoder.constraints == ",".join(["=&r"] * decoder.registers + ["r"] * len(inputs))
    outputs = execute(decoder.asm, inputs, filled(decoder, 4))
    found, codes = by_place(outputs, codes, words, decoder.registers, dtype)
    values = fmt.to_values(codes, DTYPES[dtype]).double() - based * given["minus"]
    values = values / decoder.unit * (given["scale"] if scaled else 1)
    values = values + added * given["addend"]
    assert same(found, values.to(DTYPES[dtype]).double())


@pytest.mark.parametrize(
    ("name", "dtype", "zeros"),
    [(*pair, False) for pair in DECODERS] + [(*pair, True) for pair in INTEGERS],
)
def test_raw_operands_are_weights_without_the_scale(name, dtype, zeros, seed):
    """With a zero point of any value, (code - zero point) rounded once."""
    fmt = FORMATS[name]
    decoder = raw_operand_decoder(fmt, dtype, zeros)
    codes = every_code_everywhere(fmt.bits, seed)
    words = pairs_of_words(codes, fmt.bits)
    inputs = words | lanes(decoder, words)
    first = decoder.registers + len(inputs)
    zero = by_row_half((2.25, 1.0)).to(DTYPES[dtype]).double() * zeros
    for r3 in range(2 * zeros):
        like = words[f"${decoder.registers}"]
        both = _pairs((-zero[r3] / decoder.unit[r3]).expand(*like.shape, 2), DTYPES[dtype])
        inputs |= {f"${first}": both, f"${first + 1}": both}
        first += 2
    assert decoder.constraints == ",".join(["=&r"] * decoder.registers + ["r"] * len(inputs))
    outputs = execute(decoder.asm, inputs, filled(decoder, 4))
    found, codes = by_place(outputs, codes, words, decoder.registers, dtype)
    values = (fmt.to_values(codes, DTYPES[dtype]).double() - zero).to(DTYPES[dtype]).double()
    assert same(found * by_row_half(decoder.unit), values)


def test_every_packed_format_has_a_decoder():
    packed = {name for name, fmt in FORMATS.items() if not fmt.is_dense}
    assert set(DECODERS) == {(name, dtype) for name in packed for dtype in DTYPES}


@pytest.mark.parametrize(("name", "dtype"), DECODERS)
def test_decoded_registers_are_the_values_of_their_rows_and_k(name, dtype, seed):
    decoder, raw, codes = decoded(name, dtype, seed)
    unit, one, shift = map(by_row_half, (decoder.unit, decoder.one, decoder.shift))
    values = FORMATS[name].to_values(codes, DTYPES[dtype]).double()  # table entries: rounded once
    assert same(unit * (raw - shift * one), values)


@pytest.mark.parametrize(("name", "dtype"), [x for x in DECODERS if x not in INTEGERS])
def test_signs_of_zeros_survive(name, dtype, seed):
    """-0 is a code of the small floats; a zero that a correction makes has no sign of its own."""
    _, raw, codes = decoded(name, dtype, seed)
    values = FORMATS[name].to_values(codes)
    zeros = values == 0
    assert torch.equal(raw[zeros].signbit(), values[zeros].signbit())


@pytest.mark.parametrize("name", ["nf4", "fp4_e2m1"])
def test_a_table_does_not_depend_on_how_many_warps_fill_it(name):
    decoder = pair_decoder(FORMATS[name], "float16")
    assert np.array_equal(filled(decoder, 16), filled(decoder, 8))
    assert np.array_equal(filled(decoder, 4), filled(decoder, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoded_nvfp4_times_any_scale_is_exact(dtype):
    """Which is why the kernel multiplies the weight instead of the sums of a group."""
    decoder = pair_decoder(FORMATS["nvfp4"], dtype)
    assert decoder.scalable
    raw = torch.tensor(FORMATS["nvfp4"].code_values(), dtype=torch.float64) / decoder.unit[0]
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(DTYPES[dtype])
    products = raw.to(DTYPES[dtype])[:, None] * scales
    assert same(products.double(), raw[:, None] * scales.double())


@pytest.mark.parametrize(("name", "dtype"), INTEGERS)
def test_a_zero_point_is_subtracted_once(name, dtype):
    """In the docstring's formula, zero * (zero point) * one * unit is minus the zero point."""
    decoder = pair_decoder(FORMATS[name], dtype)
    unit, one, zero = map(by_row_half, (decoder.unit, decoder.one, decoder.zero))
    assert torch.equal(unit * zero * one, torch.full((2, 1), -1.0, dtype=torch.float64))


@pytest.mark.parametrize(("name", "dtype"), DECODERS)
def test_the_row_operand_of_sums_is_exact(name, dtype):
    """The operand that sums A is made in the dtype of A."""
    decoder = pair_decoder(FORMATS[name], dtype)
    for one in decoder.one:
        assert float(torch.tensor(one).to(DTYPES[dtype])) == one
