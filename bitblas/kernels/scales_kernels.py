"""Device code of the batch families: scales and zero points on their way from memory, which two
warps prepare for those that multiply. batch_kernels explains the terms.

A stage's groups are laid out as [GROUPS, 4 * BANDS, 2 row halves, 8]: of groups, the rows of W as
they lie in the row operand of wgmma.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .device import powers, take
from .versions import gl, gluon


@gluon.constexpr_function
def preparing_layout(GROUPS, BANDS):
    """Rows across two warps."""
    registers = powers(GROUPS, 4, 0) + [[0, 4 << i, 0, 0] for i in range(5) if 1 << i < BANDS]
    lanes = [*powers(8, 4, 3), [0, 0, 1, 0], [0, 1, 0, 0]]
    shape = [GROUPS, 4 * BANDS, 2, 8]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 2, 0, 0]], [], shape)


@gluon.constexpr_function
def in_packs(L, PACK):
    """The layout of a preparing_layout's groups, so many at a time."""
    registers = [[basis[0] // PACK, *basis[1:]] for basis in L.reg_bases]
    registers = [basis for basis in registers if any(basis)]
    shape = [L.shape[0] // PACK, *L.shape[1:]]
    return gl.DistributedLinearLayout(registers, L.lane_bases, L.warp_bases, [], shape)


@gluon.jit
def load_stored(
    POINTER, row, n, first, N, G, GROUPS: gl.constexpr, PACK: gl.constexpr, P: gl.constexpr,
    L: gl.constexpr,
):  # fmt: skip
    """What is stored of GROUPS groups from `first` on in rows row + n, PACK values in an int32 if
    that is more than one; 0 beyond the edges."""
    each = gl.arange(0, GROUPS // PACK, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))
    each = each.expand_dims(1).expand_dims(2).expand_dims(3)
    if P.ALIGNED:  # lets the compiler see that all groups of a row can be read at once
        G = G // GROUPS * (GROUPS // PACK)
        first = first // GROUPS * (GROUPS // PACK)
    mask = (row + n < N) & (first + each < G)
    if PACK > 1:
        POINTER = POINTER.to(gl.pointer_type(gl.int32), bitcast=True)
    start = row.to(gl.int64) * G + first
    return gl.load(POINTER + start + (n * G + each), mask=mask, other=0)


@gluon.jit
def load_byte(pointer, mask):
    """Bytes, 0 where the mask is not set, each in a register of its own."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u8 $0, [$1]; }",
        "=r,l,r", [pointer.to(gl.int64), mask.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def rows_of(BANDS: gl.constexpr, L: gl.constexpr):
    """The rows of a tile, [1, 4 * BANDS, 2, 8]."""
    L1: gl.constexpr = gl.SliceLayout(0, L)
    band = gl.arange(0, 4 * BANDS, gl.SliceLayout(1, gl.SliceLayout(2, L1)))
    r3 = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, L1)))
    g = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, L1)))
    n = band.expand_dims(1).expand_dims(2) * 16 + r3.expand_dims(0).expand_dims(2) * 8
    return (n + g.expand_dims(0).expand_dims(1)).expand_dims(0)


@gluon.jit
def load_extras(
    SCALE, ZEROS, row, first, N, G, GROUPS: gl.constexpr, BANDS: gl.constexpr, P: gl.constexpr,
    L: gl.constexpr,
):  # fmt: skip
    """Scales and zero points of GROUPS groups from `first` on, of 64 * BANDS rows from `row` on, as
    they are stored and `unpack_extras` takes them; 0 beyond the edges.

    They may be loaded well ahead, for a loop's next iteration: values of 8 and 16 bits would then
    be waited for at once, to be put together in registers. So P.PACK of them are loaded as one, and
    bytes of packed zero points with 32 bits each.
    """
    scale = gl.zeros([GROUPS, 4 * BANDS, 2, 8], gl.int32, L)
    zero = scale
    PACK: gl.constexpr = P.PACK if GROUPS > 1 else 1
    STORED: gl.constexpr = in_packs(L, PACK)
    n = rows_of(BANDS, STORED)
    if P.SCALED:
        scale = load_stored(SCALE, row, n, first, N, G, GROUPS, PACK, P, STORED)
    if P.ZEROS_KIND == "quantized":
        n = rows_of(BANDS, L)
        each = gl.arange(0, GROUPS, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L))))
        group = first + each.expand_dims(1).expand_dims(2).expand_dims(3)
        mask = (row + n < N) & (group < G)
        row_bytes = (N * P.BITS + 7) // 8
        byte = (row + n) * P.BITS // 8
        pointer = ZEROS + (group.to(gl.int64) * row_bytes + byte)
        zero = load_byte(pointer, mask)
        if 8 % P.BITS != 0:  # codes may cross into the next byte
            zero = zero | (load_byte(pointer + 1, mask & (byte + 1 < row_bytes)) << 8)
    elif P.ZEROS_KIND != "none":
        zero = load_stored(ZEROS, row, n, first, N, G, GROUPS, PACK, P, STORED)
    return scale, zero


@gluon.jit
def unpack_extras(
    extras, SCALE, ZEROS, BANDS: gl.constexpr, P: gl.constexpr, L: gl.constexpr
):  # fmt: skip
    """(scales, zero points) of load_extras, each by itself: [GROUPS, 4 * BANDS, 2, 8]."""
    scale, zero = extras
    if P.SCALED:
        scale = unpacked(scale, SCALE, L)
    if P.ZEROS_KIND == "quantized":
        zero = (zero >> (rows_of(BANDS, L) * P.BITS % 8)) & ((1 << P.BITS) - 1)
    elif P.ZEROS_KIND != "none":
        zero = unpacked(zero, ZEROS, L)
    return scale, zero


@gluon.jit
def unpacked(x, POINTER, L: gl.constexpr):
    """Values that were loaded as one, each by itself."""
    if x.dtype == POINTER.dtype.element_ty:
        return x
    else:
        if POINTER.dtype.element_ty.primitive_bitwidth == 16:
            x = gl.join(x & 0xFFFF, x >> 16).permute([0, 4, 1, 2, 3])
            x = x.to(gl.int16).to(POINTER.dtype.element_ty, bitcast=True)
        else:
            low, high = gl.join(x, x >> 8), gl.join(x >> 16, x >> 24)
            x = gl.join(low, high).permute([0, 5, 4, 1, 2, 3]).to(POINTER.dtype.element_ty)
        x = x.reshape([L.shape[0], L.shape[1], L.shape[2], L.shape[3]])
        return gl.convert_layout(x, L, assert_trivial=True)


@gluon.jit
def of_stage(x, STAGE: gl.constexpr, P: gl.constexpr, L: gl.constexpr):
    """What a stage of a run takes of load_extras."""
    x = x.permute([1, 2, 3, 0])
    x = x.reshape(x.shape[:3] + [P.RUN_GROUPS // P.STAGE_GROUPS, P.STAGE_GROUPS])
    x = take(x.permute([0, 1, 2, 4, 3]), STAGE * P.RUN_GROUPS // (P.RUN * P.STAGE_GROUPS))
    return gl.convert_layout(x.permute([3, 0, 1, 2]), L, assert_trivial=True)
