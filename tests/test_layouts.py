"""Packed layouts: exact inverses, and every bit where the layout's description puts it."""

import numpy as np
import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

from bitblas import layouts
from bitblas.layouts import FRAGMENT_8, FRAGMENT_16, PLAIN, ROW16, pack_rows, unpack_rows
from bitblas.quantization import general_compress, interleave_weight

LAYOUTS = {"plain": PLAIN, "row16": ROW16, "fragment16": FRAGMENT_16, "fragment8": FRAGMENT_8}
BITS = range(1, 9)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_width = pytest.mark.parametrize("bits", BITS)
rows, columns = st.integers(1, 70), st.integers(1, 300)
drawn = settings(max_examples=10, deadline=None, print_blob=True)


def draw_codes(shape, bits, seed=None):
    rng = None if seed is None else torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.int16, generator=rng)
    return codes.to(torch.uint8).to(DEVICE)


# the layouts' descriptions, an element at a time: code (n, k) -> [(word or byte index, bit, part)]


def powers_of_two(bits):
    """(width, first bit) of each plane, low bits first: widths fall from 4 to 1."""
    found, first = [], 0
    for width in (8, 4, 2, 1):
        if bits // width % 2:
            found.append((width, first))
            first += width
    return found


def part(code, width, first):
    return code // 2**first % 2**width


def slow_plain(codes, bits):
    n, k = codes.shape
    packed = bytearray()
    for row in codes.tolist():
        stream = sum(code * 2 ** (bits * i) for i, code in enumerate(row))
        packed += stream.to_bytes((k * bits + 7) // 8, "little")
    return np.frombuffer(bytes(packed), np.int8).reshape(n, -1)


def slow_row16(codes, bits):
    n, k = codes.shape
    words = np.zeros((-(-n // 16), -(-k // 32) * bits, 16), np.uint32)
    for (row, column), code in np.ndenumerate(codes.numpy()):
        plane_word = 0
        for width, first in powers_of_two(bits):
            per_word = 32 // width
            word = column // 32 * bits + plane_word + column % 32 // per_word
            value = part(int(code), width, first) << (column % 32 % per_word * width)
            words[row // 16, word, row % 16] |= np.uint32(value)
            plane_word += width
    return words.view(np.int8)


def slow_fragment(codes, bits, element_bits):
    n, k = codes.shape
    step_size, consecutive = 256 // element_bits, 32 // element_bits  # of k, in a register
    block = max(64, 256 // (bits & -bits))
    words = np.zeros((-(-n // 64), -(-k // block), block * bits // 256, 128, 4), np.uint32)
    for (row, column), code in np.ndenumerate(codes.numpy()):
        band, r3, g = row % 64 // 16, row % 16 // 8, row % 8
        plane_chunk = 0
        for width, first in powers_of_two(bits):
            span, fields = 256 // width, element_bits // width
            inside = column % block
            chunk, inside = plane_chunk + inside // span, inside % span
            step, inside = inside // step_size, inside % step_size
            x, inside = inside // (step_size // 2), inside % (step_size // 2)
            c, h = inside // consecutive, inside % consecutive
            register = 4 * step + 2 * x + r3
            bit = h * element_bits + width * (register % fields)
            word = (row // 64, column // block, chunk, 32 * band + 4 * g + c, register // fields)
            words[word] |= np.uint32(part(int(code), width, first) << bit)
            plane_chunk += block // span
    lanes = (128,) if element_bits == 16 else (4, 32)
    return words.view(np.int8).reshape(*words.shape[:3], *lanes, 16)


SLOW = {
    "plain": slow_plain,
    "row16": slow_row16,
    "fragment16": lambda codes, bits: slow_fragment(codes, bits, 16),
    "fragment8": lambda codes, bits: slow_fragment(codes, bits, 8),
}


@every_width
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(67, 300), (1, 1)], ids=str)
def test_every_bit_lies_where_the_description_says(name, bits, shape):
    codes = draw_codes(shape, bits)
    packed = LAYOUTS[name].pack(codes, bits)
    expected = torch.from_numpy(SLOW[name](codes.cpu(), bits).copy())
    assert torch.equal(packed.cpu(), expected)


@every_layout
@every_width
@given(n=rows, k=columns, seed=st.integers(0, 2**31))
@drawn
def test_unpack_inverts_pack(layout, bits, n, k, seed):
    codes = draw_codes((n, k), bits, seed)
    packed = layout.pack(codes, bits)
    assert packed.dtype == torch.int8
    assert tuple(packed.shape) == layout.shape(bits, n, k)
    assert torch.equal(layout.unpack(packed, bits, n, k), codes)


@every_layout
@every_width
@pytest.mark.parametrize("n, k", [(1, 1), (1, 3), (17, 33), (65, 257)])
def test_padding_holds_code_0(layout, bits, n, k):
    full = torch.full((n, k), (1 << bits) - 1, dtype=torch.uint8, device=DEVICE)
    packed = layout.pack(full, bits)
    set_bits = np.unpackbits(packed.cpu().numpy().view(np.uint8)).sum()
    assert set_bits == n * k * bits


@every_width
@given(n=rows, k=columns, seed=st.integers(0, 2**31), order=st.permutations(list(LAYOUTS)))
@drawn
def test_conversion_between_layouts_is_exact(bits, n, k, seed, order):
    codes = draw_codes((n, k), bits, seed)
    packed = LAYOUTS[order[0]].pack(codes, bits)
    for name in order[1:]:
        packed = layouts.convert(packed, bits, n, k, LAYOUTS[name])
        assert torch.equal(packed, LAYOUTS[name].pack(codes, bits)), name


@every_layout
def test_rank_tells_the_layout(layout):
    assert layouts.layout_of(layout.pack(draw_codes((3, 5), 4), 4)) is layout


def test_tensor_of_no_layout_is_refused():
    with pytest.raises(ValueError, match="W: a packed weight has 2 .plain."):
        layouts.layout_of(torch.zeros(4, dtype=torch.int8))


@every_layout
@every_width
def test_pack_takes_a_transposed_view(layout, bits):
    codes = draw_codes((40, 30), bits)
    assert torch.equal(layout.pack(codes.T, bits), layout.pack(codes.T.contiguous(), bits))


@every_width
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 70)), seed=st.integers(0, 2**31))
@drawn
def test_packed_zeros_invert(bits, shape, seed):
    """Zero points (G, N) are packed along N by the same rule."""
    codes = draw_codes(shape, bits, seed)
    packed = pack_rows(codes, bits)
    assert tuple(packed.shape) == (shape[0], -(-shape[1] * bits // 8))
    assert torch.equal(packed.cpu(), torch.from_numpy(slow_plain(codes, bits).copy()))
    assert torch.equal(unpack_rows(packed, bits, shape[1]), codes)


# the original's layout: slots of each unit from the least significant up, as specified

ORIGINAL = {  # (activation bits, b): (bits of a unit, elements)
    (16, 4): (32, [0, 2, 4, 6, 1, 3, 5, 7]),
    (16, 2): (16, [0, 2, 4, 6, 1, 3, 5, 7]),
    (16, 1): (8, [0, 2, 4, 6, 1, 3, 5, 7]),
    (8, 4): (32, [0, 4, 1, 5, 2, 6, 3, 7]),
    (8, 2): (32, [0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15]),
    (8, 1): (16, [0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15]),
}
every_original = pytest.mark.parametrize("activation_bits, bits", ORIGINAL)


@every_original
def test_interleaved_words(activation_bits, bits):
    unit_bits, elements = ORIGINAL[activation_bits, bits]
    codes = draw_codes((3, 64), bits)
    packed = layouts.export_original(codes, bits, activation_bits, fast_decoding=True)
    words = packed.cpu().numpy().view(f"<u{unit_bits // 8}")
    units = codes.cpu().numpy().reshape(3, -1, unit_bits // bits).astype(np.int64)
    expected = sum(units[..., e] << (bits * slot) for slot, e in enumerate(elements))
    assert np.array_equal(words, expected)


@every_original
@pytest.mark.parametrize("fast_decoding", [True, False])
def test_import_inverts_export(activation_bits, bits, fast_decoding):
    codes = draw_codes((5, 48), bits)
    packed = layouts.export_original(codes, bits, activation_bits, fast_decoding)
    back = layouts.import_original(packed, bits, 48, activation_bits, fast_decoding)
    assert torch.equal(back, codes)


def test_without_fast_decoding_the_original_is_plain():
    codes = draw_codes((5, 48), 4)
    assert torch.equal(layouts.export_original(codes, 4, 16, False), PLAIN.pack(codes, 4))


def test_partial_unit_cannot_be_interleaved():
    with pytest.raises(ValueError, match="K: .*multiple of 8, got 12"):
        layouts.interleave(draw_codes((2, 12), 4), 4, 16)


@pytest.mark.parametrize("bits", [3, 8])
def test_other_widths_have_no_interleaved_layout(bits):
    with pytest.raises(ValueError, match=f"1, 2 and 4 bits, got {bits}"):
        layouts.interleave(draw_codes((2, 16), bits), bits, 16)


# helpers under the original's names, on vectors worked out by hand

COMPRESSED = [
    (4, [1, 2, 3, 4], [0x21, 0x43]),
    (4, [-8, -1, 7, 0], [0xF8, 0x07]),  # negative values: their low bits
    (2, [0, 1, 2, 3, 3, 2, 1, 0], [0xE4, 0x1B]),
    (1, [1, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0], [0x81, 0x02]),
    (8, [-1, 5], [0xFF, 0x05]),
    (3, [1, 2, 3, 4, 5, 6, 7, 0], [0xD1, 0x58, 0x1F]),
]


@pytest.mark.parametrize("bits, values, expected", COMPRESSED)
def test_general_compress_numpy(bits, values, expected):
    packed = general_compress(np.array([values], dtype=np.int8), bits, np.int8)
    assert packed.dtype == np.int8
    assert packed.view(np.uint8).tolist() == [expected]


@pytest.mark.parametrize("bits, values, expected", COMPRESSED)
def test_general_compress_torch(bits, values, expected):
    packed = general_compress(torch.tensor([values], dtype=torch.int8), source_bits=bits)
    assert packed.dtype == torch.int8
    assert packed.view(torch.uint8).tolist() == [expected]


def test_general_compress_into_words():
    packed = general_compress(np.arange(8, dtype=np.int8)[None], 4, np.int32)
    assert packed.dtype == np.int32 and packed.tolist() == [[0x76543210]]


def test_general_compress_refuses_a_partial_word():
    with pytest.raises(ValueError, match="6 codes of 4 bits"):
        general_compress(np.zeros((1, 6), dtype=np.int8), 4, np.int32)


INTERLEAVED = [
    (4, "float16", "<u4", 0x76543210, 0x75316420),
    (4, "int8", "<u4", 0x76543210, 0x73625140),
    (2, "float16", "<u2", 0x1BE4, 0x2D78),  # codes 0 1 2 3 3 2 1 0
    (2, "int8", "<u4", 0xFFAA5500, 0xE4E4E4E4),  # four of each code: each byte gets one of each
    (1, "float16", "<u1", 0x55, 0x0F),  # the even elements come first
    (1, "int8", "<u2", 0x1111, 0x000F),  # elements 0, 4, 8, 12
]


@pytest.mark.parametrize("bits, target, word, plain, expected", INTERLEAVED)
def test_interleave_weight_numpy(bits, target, word, plain, expected):
    packed = np.array([[plain, plain]], dtype=word).view(np.int8)
    permuted = interleave_weight(packed, bits, target)
    assert permuted.dtype == np.int8
    assert permuted.view(word).tolist() == [[expected, expected]]


@pytest.mark.parametrize("bits, target, word, plain, expected", INTERLEAVED)
def test_interleave_weight_torch(bits, target, word, plain, expected):
    packed = torch.from_numpy(np.array([[plain, plain]], dtype=word).view(np.int8))
    permuted = interleave_weight(packed, nbits=bits, target_dtype=target)
    assert permuted.dtype == torch.int8
    assert permuted.numpy().view(word).tolist() == [[expected, expected]]
