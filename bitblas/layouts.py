"""Where the bits of a packed weight lie, with exact inverses.

A packed weight is an int8 tensor whose rank says its layout:

| layout   | shape                                    | read by                             |
|----------|------------------------------------------|-------------------------------------|
| plain    | [N, ceil(K*b/8)]                         | checkpoints, other tools            |
| row16    | [N/16, K/32*b, 64]                       | the CPU backend                     |
| fragment | [N/64, K/BK, chunk, 128, 16]             | GPU kernels, 16-bit and fp32 A      |
| fragment | [N/64, K/BK, chunk, 4, 32, 16]           | GPU kernels, 8-bit and int4 A       |

N and K are padded with code 0 up to the tile. The last dimension holds little-endian 32-bit words.
Codes whose width is not a power of two are split into planes of 4, 2 and 1 bits (3 = 2 + 1), the
low bits first. docs/design.md draws one fragment word.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LAYOUT_VERSION = 1  # of all layouts together: raised when the meaning of any packed byte changes


def planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, first bit) of the power-of-two planes of a code: 3 -> ((2, 0), (1, 2))."""
    result, first = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            result.append((width, first))
            first += width
    return tuple(result)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _pad(codes: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    n, k = codes.shape
    return torch.nn.functional.pad(codes, (0, -k % columns, 0, -n % rows))


def _plane(codes: torch.Tensor, width: int, first: int) -> torch.Tensor:
    return (codes >> first) & ((1 << width) - 1)


def _to_bytes(words: torch.Tensor) -> torch.Tensor:
    return words.contiguous().view(torch.int8)


def _to_words(packed: torch.Tensor) -> torch.Tensor:
    return aligned(packed).view(torch.int32)


def aligned(packed: torch.Tensor) -> torch.Tensor:
    """The same bytes, contiguous and at an address that any vector load may read."""
    packed = packed.contiguous()
    return packed.clone() if packed.storage_offset() * packed.itemsize % 16 else packed


class Plain:
    """Rows along K, lowest bits first: code k of a row fills bits k*b .. k*b+b-1 of its bytes."""

    name = "plain"

    def shape(self, bits: int, n: int, k: int) -> tuple[int, ...]:
        return (n, _ceil_div(k * bits, 8))

    def pack(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        """uint8 codes [N, K] -> int8 [N, ceil(K*b/8)]."""
        return pack_rows(codes, bits)

    def unpack(self, packed: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
        return unpack_rows(packed, bits, k)


class Row16:
    """16 rows side by side, so that a full vector load meets one broadcast activation.

    [N/16, K/32 * b, 16] words. Every 32 values of k take b words: for each plane of width p, p
    words of 32/p consecutive k each, the first k in the lowest bits.
    """

    name = "row16"

    def shape(self, bits: int, n: int, k: int) -> tuple[int, ...]:
        return (_ceil_div(n, 16), _ceil_div(k, 32) * bits, 64)

    def pack(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        codes = _pad(codes, 16, 32)
        n, k = codes.shape
        parts = []
        for width, first in planes(bits):
            slots = _plane(codes, width, first).view(n // 16, 16, k // 32, width, 32 // width)
            words = torch.zeros(slots.shape[:-1], dtype=torch.int32, device=codes.device)
            for slot in range(32 // width):
                words |= slots[..., slot].to(torch.int32) << (width * slot)
            parts.append(words.permute(0, 2, 3, 1))
        return _to_bytes(torch.cat(parts, dim=2).view(n // 16, k // 32 * bits, 16))

    def unpack(self, packed: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
        rows, k32 = packed.shape[0] * 16, packed.shape[1] // bits
        words = _to_words(packed).view(rows // 16, k32, bits, 16)
        codes = torch.zeros((rows, k32 * 32), dtype=torch.uint8, device=packed.device)
        word = 0
        for width, first in planes(bits):
            source = words[:, :, word : word + width].permute(0, 3, 1, 2)
            target = codes.view(rows // 16, 16, k32, width, 32 // width)
            for slot in range(32 // width):
                value = (source >> (width * slot)) & ((1 << width) - 1)
                target[..., slot] |= (value << first).to(torch.uint8)
            word += width
        return codes[:n, :k].contiguous()


@dataclass(frozen=True)
class Fragment:
    """Each 32-bit word holds, per lane, what registers of one matrix-instruction operand need.

    Both mma.sync (sm_80 and up) and wgmma (sm_90) want, as their row operand, 16 rows x one k-step
    (16 values of k for 16-bit elements, 32 for 8-bit ones) in four registers of a lane; register
    r = 2*x + r3 holds row r3*8 + lane//4 and the P = 32/element_bits consecutive k from
    x*(step/2) + (lane%4)*P.

    A tile is 64 rows (four 16-row bands, one per warp) by BK values of k. For a plane of width p
    one 16-byte chunk of a lane covers 256/p values of k. Counting the registers R = 4*step + r in a
    chunk, its code for the h-th element of register R lies in word R // F, at bit
    h*element_bits + p*(R % F), where F = element_bits/p: `(word >> p*(R % F)) & mask` leaves the P
    codes of one register in place.
    """

    element_bits: int  # 16 or 8

    name = "fragment"
    ROWS = 64

    def block_k(self, bits: int) -> int:
        """BK: the values of k that a tile spans."""
        return max(64, 256 // planes(bits)[-1][0])

    def chunks(self, bits: int) -> int:
        """16-byte chunks that a lane reads for one tile."""
        return self.block_k(bits) * bits // 256

    def _lanes(self) -> tuple[int, ...]:
        return (128,) if self.element_bits == 16 else (4, 32)

    def shape(self, bits: int, n: int, k: int) -> tuple[int, ...]:
        tiles = (_ceil_div(n, self.ROWS), _ceil_div(k, self.block_k(bits)))
        return (*tiles, self.chunks(bits), *self._lanes(), 16)

    def _split(self, codes: torch.Tensor, width: int) -> torch.Tensor:
        """A view of [N, K] as [tile n, tile k, chunk, band, g, c, word, slot, h]."""
        per_register = 32 // self.element_bits
        slots = self.element_bits // width
        steps = self.element_bits // width
        n, k = codes.shape
        chunk = 256 // width
        view = codes.view(n // 64, 4, 2, 8, k // chunk, steps, 2, 4, per_register)
        #        n tile, band, r3, g, k chunk, step, x, c, h -> ..., (step, x, r3), h
        view = view.permute(0, 4, 1, 3, 7, 5, 6, 2, 8)
        return view.reshape(n // 64, k // chunk, 4, 8, 4, 4, slots, per_register)

    def pack(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        block = self.block_k(bits)
        codes = _pad(codes, self.ROWS, block)
        n, k = codes.shape
        parts = []
        for width, first in planes(bits):
            slots = self._split(_plane(codes, width, first), width)
            words = torch.zeros(slots.shape[:-2], dtype=torch.int32, device=codes.device)
            for slot in range(slots.shape[-2]):
                for h in range(slots.shape[-1]):
                    shift = h * self.element_bits + width * slot
                    words |= slots[..., slot, h].to(torch.int32) << shift
            parts.append(words.view(n // 64, k // block, block * width // 256, 128, 4))
        return _to_bytes(torch.cat(parts, dim=2)).view(self.shape(bits, n, k))

    def unpack(self, packed: torch.Tensor, bits: int, n: int, k: int) -> torch.Tensor:
        tiles_n, tiles_k = packed.shape[:2]
        words = _to_words(packed).view(tiles_n, tiles_k, -1, 4, 8, 4, 4)
        shape = (tiles_n * 64, tiles_k * self.block_k(bits))
        codes = torch.zeros(shape, dtype=torch.uint8, device=packed.device)
        per_register, chunk = 32 // self.element_bits, 0
        for width, first in planes(bits):
            slots = steps = self.element_bits // width
            chunks = self.block_k(bits) * width // 256
            source = words[:, :, chunk : chunk + chunks]
            source = source.reshape(tiles_n, tiles_k * chunks, 4, 8, 4, 4)
            split = torch.empty(
                (*source.shape, slots, per_register), dtype=torch.uint8, device=packed.device
            )
            for slot in range(slots):
                for h in range(per_register):
                    shift = h * self.element_bits + width * slot
                    split[..., slot, h] = (source >> shift) & ((1 << width) - 1)
            split = split.view(tiles_n, tiles_k * chunks, 4, 8, 4, steps, 2, 2, per_register)
            plane = split.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).reshape(shape)
            codes |= plane << first
            chunk += chunks
        return codes[:n, :k].contiguous()


PLAIN, ROW16 = Plain(), Row16()
FRAGMENT_16, FRAGMENT_8 = Fragment(16), Fragment(8)
FRAGMENTS = {16: FRAGMENT_16, 8: FRAGMENT_8}  # by the width of the matrix instruction's elements
Layout = Plain | Row16 | Fragment
_BY_RANK: dict[int, Layout] = {2: PLAIN, 3: ROW16, 5: FRAGMENT_16, 6: FRAGMENT_8}


def layout_of(packed: torch.Tensor) -> Layout:
    """The layout of a packed weight, told by its rank; ValueError for any other tensor."""
    try:
        return _BY_RANK[packed.dim()]
    except KeyError:
        raise ValueError(
            f"W: a packed weight has 2 (plain), 3 (row16), 5 or 6 (fragment) dimensions, "
            f"got shape {tuple(packed.shape)}"
        ) from None


def convert(packed: torch.Tensor, bits: int, n: int, k: int, target: Layout) -> torch.Tensor:
    """The same codes in another layout, on the same device; the tensor itself where it is in it."""
    source = layout_of(packed)
    if source is target:
        return packed
    return target.pack(source.unpack(packed, bits, n, k), bits)


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., L] -> int8 [..., ceil(L*b/8)], lowest bits first."""
    per = 8 // bits if 8 % bits == 0 else 8  # codes in the smallest whole number of bytes
    length = codes.shape[-1]
    groups = torch.nn.functional.pad(codes, (0, -length % per)).unflatten(-1, (-1, per))
    if per * bits == 8:
        packed = torch.zeros(groups.shape[:-1], dtype=torch.uint8, device=codes.device)
        for i in range(per):
            packed |= groups[..., i] << (bits * i)
    else:
        wide = torch.zeros(groups.shape[:-1], dtype=torch.int64, device=codes.device)
        for i in range(per):
            wide |= groups[..., i].to(torch.int64) << (bits * i)
        shifts = torch.arange(0, 8 * bits, 8, device=codes.device)
        packed = ((wide.unsqueeze(-1) >> shifts) & 255).to(torch.uint8).flatten(-2)
    return packed[..., : _ceil_div(length * bits, 8)].contiguous().view(torch.int8)


def unpack_rows(packed: torch.Tensor, bits: int, length: int) -> torch.Tensor:
    """The inverse of pack_rows: int8 [..., ceil(L*b/8)] -> uint8 codes [..., L]."""
    data, mask = packed.contiguous().view(torch.uint8), (1 << bits) - 1
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = (data.unsqueeze(-1) >> shifts) & mask
    else:
        data = torch.nn.functional.pad(data, (0, -data.shape[-1] % bits)).unflatten(-1, (-1, bits))
        wide = torch.zeros(data.shape[:-1], dtype=torch.int64, device=packed.device)
        for i in range(bits):
            wide |= data[..., i].to(torch.int64) << (8 * i)
        shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
        codes = ((wide.unsqueeze(-1) >> shifts) & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :length].contiguous()


# The layout of BitBLAS 0.1, for import and export: plain rows whose b-bit slots are permuted inside
# each unit. Key: (activation is 8-bit, b) -> element index held by each slot, lowest slot first.
_SLOT_ORDERS: dict[tuple[bool, int], tuple[int, ...]] = {
    (False, 4): (0, 2, 4, 6, 1, 3, 5, 7),
    (False, 2): (0, 2, 4, 6, 1, 3, 5, 7),
    (False, 1): (0, 2, 4, 6, 1, 3, 5, 7),
    (True, 4): (0, 4, 1, 5, 2, 6, 3, 7),
    (True, 2): tuple(byte + 4 * slot for byte in range(4) for slot in range(4)),
    (True, 1): (0, 4, 8, 12, 2, 6, 10, 14, 1, 5, 9, 13, 3, 7, 11, 15),
}


def slot_order(bits: int, activation_bits: int) -> tuple[int, ...]:
    """The order of BitBLAS 0.1's fast decoding; ValueError where it had none."""
    try:
        return _SLOT_ORDERS[activation_bits == 8, bits]
    except KeyError:
        raise ValueError(
            f"bits: the interleaved layout exists for 1, 2 and 4 bits, got {bits}"
        ) from None


def interleave(codes: torch.Tensor, bits: int, activation_bits: int) -> torch.Tensor:
    """Permute codes [..., K] so that packing them gives BitBLAS 0.1's fast-decoding words."""
    order = slot_order(bits, activation_bits)
    if codes.shape[-1] % len(order):
        raise ValueError(
            f"K: interleaving {bits}-bit weights needs a multiple of {len(order)}, got "
            f"{codes.shape[-1]}"
        )
    return codes.unflatten(-1, (-1, len(order)))[..., list(order)].flatten(-2)


def deinterleave(codes: torch.Tensor, bits: int, activation_bits: int) -> torch.Tensor:
    """The inverse of interleave."""
    order = slot_order(bits, activation_bits)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return codes.unflatten(-1, (-1, len(order)))[..., inverse].flatten(-2)


def export_original(
    codes: torch.Tensor, bits: int, activation_bits: int, fast_decoding: bool
) -> torch.Tensor:
    """uint8 codes [N, K] -> the packed int8 [N, K*b/8] that BitBLAS 0.1 reads."""
    return pack_rows(interleave(codes, bits, activation_bits) if fast_decoding else codes, bits)


def import_original(
    packed: torch.Tensor, bits: int, k: int, activation_bits: int, fast_decoding: bool
) -> torch.Tensor:
    """A weight packed by BitBLAS 0.1, int8 [N, K*b/8] -> uint8 codes [N, K]."""
    codes = unpack_rows(packed, bits, k)
    return deinterleave(codes, bits, activation_bits) if fast_decoding else codes
