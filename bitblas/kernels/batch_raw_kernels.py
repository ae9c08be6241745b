"""Device code of the batch family for raw operands: codes that the matrix units multiply as they
come, whose sums are corrected. batch_kernels explains the terms.

With index r3, which says in which half of 16 rows a weight lies (bitblas.kernels.decoders),

    sum of weight * a = factor * sum of raw * a + offset * sum of a
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .device import decode_scale, extras_layout, of_rows, powers
from .versions import gl, gluon, mbarrier, mma_v2, reinterpret, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def corrections(scale, zero, P: gl.constexpr, L: gl.constexpr):
    """What the sum of a group's raw products is multiplied by, and the sum of its A, to be added:
    (factor, offset), the bits of float32, shaped as what load_extras returns."""
    r3 = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))
    r3 = r3.expand_dims(0).expand_dims(1).expand_dims(3)
    factor = gl.where(r3 == 0, P.UNITS[0], P.UNITS[1]) + gl.zeros(scale.shape, gl.float32, L)
    zero = zero.to(gl.float32) * gl.where(r3 == 0, P.ZERO[0], P.ZERO[1])
    if P.ZEROS_KIND == "rescale":
        zero = zero * factor
    if P.SCALED:
        factor = factor * decode_scale(scale, P.SCALE_KIND)
    offset = gl.where(r3 == 0, -P.SHIFT[0], -P.SHIFT[1])
    if P.ZEROS_KIND == "original" or P.ZEROS_KIND == "quantized":
        offset = offset + zero
    offset = offset * factor
    if P.ZEROS_KIND == "rescale":
        offset = offset + zero
    return factor.to(gl.int32, bitcast=True), offset.to(gl.int32, bitcast=True)


# --- sums of A times offsets -----------------------------------------------------------------


@gluon.constexpr_function
def sums_layout():
    """Accumulators of mma.sync, of one warp."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def offsets_layout(GROUPS):
    """[GROUPS, parts of a group, 4, 2 row halves, 8], 4 parts in all: as the column operand of
    mma.sync, for half of its values of k."""
    parts = 4 // GROUPS
    registers = [[0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [0, 0, 2, 0, 0]]
    lanes = powers(parts, 5, 1) + powers(GROUPS, 5, 0) + powers(8, 5, 4)
    return gl.DistributedLinearLayout(registers, lanes, [], [], [GROUPS, parts, 4, 2, 8])


@gluon.jit
def halves(x):
    """A float32 as the sum of two that the matrix units take for what they are (tf32)."""
    high = (x.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    return high, x - high


@gluon.jit
def side_by_side(x, y, DIM: gl.constexpr):
    """Two matrices as one: y follows x along the dimension, 0 or 1."""
    z = gl.join(x, y)
    if DIM == 0:
        return z.permute([2, 0, 1]).reshape([2 * x.shape[0], x.shape[1]])
    else:
        return z.permute([0, 2, 1]).reshape([x.shape[0], 2 * x.shape[1]])


@gluon.jit
def sum_parts(a_smem, buffer, KTH: gl.constexpr, P: gl.constexpr):
    """Sums of A over each eighth of a stage, those of its KTH-th half: [16, 4]. Products with a
    column operand of ones; boxes of 8 rows of A are taken in twos, as 16 rows."""
    MMA: gl.constexpr = sums_layout()
    DOT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    ones = gl.full([64, 8], 1.0, a_smem.dtype, gl.DotOperandLayout(1, MMA, 2))
    BOXES: gl.constexpr = P.STEPS * P.FIRST_M // 16
    boxes = reinterpret(
        a_smem, a_smem.dtype, [P.STAGES * BOXES, 16, 64], gl.NVMMASharedLayout(128, 16, 2)
    )  # fmt: skip
    EACH: gl.constexpr = max(1, BOXES // 8)  # boxes of a part
    PARTS: gl.constexpr = min(4, BOXES // 2)  # 2: the halves of 16 rows are different parts
    each = ()  # box by box, as a matrix instruction waits for the one whose sums it adds to
    for i in gl.static_range(PARTS * EACH):
        box = boxes.index(buffer * BOXES + (KTH * PARTS * EACH + i)).load(DOT)
        sums = mma_v2(box, ones, gl.zeros([16, 8], gl.float32, MMA))
        sums, _ = gl.split(sums.reshape([16, 4, 2]))  # of columns that are all alike
        each = each + (sums,)
    found = gl.zeros_like(each[0])
    row = gl.arange(0, 16, gl.SliceLayout(1, found.type.layout)).expand_dims(1)
    column = gl.arange(0, 4, gl.SliceLayout(0, found.type.layout)).expand_dims(0)
    for part in gl.static_range(PARTS):
        sums = each[part * EACH]
        for i in gl.static_range(1, EACH):
            sums += each[part * EACH + i]
        if PARTS == 4:
            found = gl.where(column + 0 * row == part, sums, found)
        else:
            found = gl.where(column == 2 * part + row // 8, sums, found)
    return found


@gluon.jit
def add_offsets(acc, a_smem, e_smem, buffer, KTH: gl.constexpr, P: gl.constexpr):
    """acc, [16, 64 rows of W], plus the offsets of the KTH-th half of a stage times sums of A."""
    MMA: gl.constexpr = sums_layout()
    GROUPS: gl.constexpr = max(1, P.STAGE_GROUPS // 2)
    FIRST: gl.constexpr = KTH * GROUPS if P.STAGE_GROUPS > 1 else 0
    L: gl.constexpr = offsets_layout(GROUPS)
    high, low = halves(sum_parts(a_smem, buffer, KTH, P))
    sums = side_by_side(high, low, 1)
    sums = side_by_side(sums, sums, 1)
    x = e_smem.index(buffer * P.EXTRAS + 1).slice(FIRST, GROUPS, 0).load(gl.SliceLayout(1, L))
    x = gl.broadcast(x.expand_dims(1), gl.zeros([GROUPS, 4 // GROUPS, 4, 2, 8], x.dtype, L))[0]
    high, low = halves(x.reshape([4, 64]).to(gl.float32, bitcast=True))
    offsets = side_by_side(side_by_side(high, high, 0), side_by_side(low, low, 0), 0)
    return mma_v2(
        gl.convert_layout(sums, gl.DotOperandLayout(0, MMA, 1), assert_trivial=True),
        gl.convert_layout(offsets, gl.DotOperandLayout(1, MMA, 1), assert_trivial=True),
        acc, input_precision="tf32",
    )  # fmt: skip


@gluon.jit
def by_threads_of_consumers(x, P: gl.constexpr):
    """What add_offsets has found as batch_kernels.by_threads has a consumer's products."""
    if P.FIRST_M == 8:
        x = gl.sum(x.reshape([2, 8, 64]), axis=0)
    x = x.reshape([P.FIRST_M // 8, 4, 2, 4, 2, 8]).permute([0, 3, 5, 1, 4, 2])
    return x.reshape([64 * P.FIRST_M])


# --- raw products ----------------------------------------------------------------------------


@gluon.jit
def read_factor(e_smem, buffer, like, ROW: gl.constexpr, K: gl.constexpr, P: gl.constexpr):
    """What the products of the group of a stage's k are multiplied by: [64 * BANDS, 1]."""
    GROUP: gl.constexpr = K // P.GROUP if P.GROUP > 0 else 0
    x = e_smem.index(buffer * P.EXTRAS).slice(GROUP, 1, 0)
    x = x.slice(ROW * 4 * P.BANDS, 4 * P.BANDS, 1)
    x = x.load(extras_layout(1, P.BANDS)).reshape([64 * P.BANDS])
    return of_rows(x, like).to(gl.float32, bitcast=True)


@gluon.jit
def multiply_raw(a, b, parts, factors, acc, STEP: gl.constexpr, LAST: gl.constexpr, P: gl.constexpr):
    """The STEP-th of a body's steps of 64 k with raw operands: (parts, acc). Products go to one of
    two parts, while the other, where it is complete, is added to acc, multiplied by its factor."""
    EACH: gl.constexpr = P.FOLD_K // 64  # steps of a part
    WHICH: gl.constexpr = STEP // EACH % 2
    part = warpgroup_mma(a, b, parts[WHICH], use_acc=STEP % EACH != 0, is_async=True)
    other = parts[1 - WHICH]
    if STEP > 0:
        part, other = warpgroup_mma_wait(1, deps=(part, other))
    if STEP % EACH == 0 and STEP > 0:
        acc = gl.fma(other, gl.broadcast(factors[1 - WHICH], other)[0], acc)
    if STEP == LAST:
        part = warpgroup_mma_wait(0, deps=(part,))
        acc = gl.fma(part, gl.broadcast(factors[WHICH], part)[0], acc)
    if WHICH == 0:
        return (part, other), acc
    else:
        return (other, part), acc
