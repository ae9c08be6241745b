"""Device code of the batch family for raw operands: codes that the matrix units multiply as they
come, whose sums are corrected. batch_kernels explains the terms.

With index r3, which says in which half of 16 rows a weight lies (bitblas.kernels.decoders),

    sum of weight * a = factor * sum of raw * a + offset * sum of a
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .device import decode_scale, extras_layout, of_rows
from .versions import gl, gluon, mbarrier, mma_v2, reinterpret, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def corrections(scale, zero, P: gl.constexpr, L: gl.constexpr):
    """What the sum of a group's raw products is multiplied by, and the sum of its A, to be added:
    (factor, offset), the bits of float32, shaped as what load_extras returns."""
    r3 = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))
    r3 = r3.expand_dims(0).expand_dims(1).expand_dims(3)
    unit = gl.where(r3 == 0, P.UNITS[0], P.UNITS[1]) + gl.zeros(scale.shape, gl.float32, L)
    zero = zero.to(gl.float32) * gl.where(r3 == 0, P.ZERO[0], P.ZERO[1])
    offset = gl.where(r3 == 0, -P.SHIFT[0], -P.SHIFT[1])
    if P.ZEROS_KIND == "original" or P.ZEROS_KIND == "quantized":
        offset = offset + zero
    factor = unit
    if P.SCALED:
        scale = decode_scale(scale, P.SCALE_KIND)
        offset = offset * scale
        factor = scale * unit
    if P.ZEROS_KIND == "rescale":
        offset = offset + zero
    return factor.to(gl.int32, bitcast=True), (offset * unit).to(gl.int32, bitcast=True)


@gluon.constexpr_function
def products_layout():
    """[16 rows of A, 8 rows of W, 8 times 8 of these] in one warp: as mma.sync's accumulators."""
    registers = [[0, 1, 0], [8, 0, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    lanes = [[0, 2, 0], [0, 4, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [16, 8, 8])


@gluon.constexpr_function
def offsets_layout(GROUPS):
    """[GROUPS, 4, 2 row halves, 8]: what a lane of products_layout has of W's rows."""
    registers = [[0, 0, 0, 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 2, 0, 0]]
    if GROUPS == 2:
        registers = [[1, 0, 0, 0], *registers]
    lanes = [[0, 0, 0, 2], [0, 0, 0, 4], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [], [], [GROUPS, 4, 2, 8])


@gluon.jit
def read_offsets(smem, K: gl.constexpr, BOX_K: gl.constexpr, P: gl.constexpr):
    """Of the group of a stage's k, or of two groups for the halves of 16 rows: [16 or 1, 8, 8]."""
    L: gl.constexpr = products_layout()
    GROUPS: gl.constexpr = 2 if P.GROUP > 0 and P.GROUP < BOX_K else 1
    FIRST: gl.constexpr = K // P.GROUP if P.GROUP > 0 else 0
    x = smem.slice(FIRST, GROUPS, 0).load(offsets_layout(GROUPS)).to(gl.float32, bitcast=True)
    x = x.reshape([GROUPS, 8, 8]).permute([0, 2, 1])
    if GROUPS == 1:
        x = gl.convert_layout(x.reshape([8, 8]), gl.SliceLayout(0, L), assert_trivial=True)
        return x.expand_dims(0)
    else:
        x = gl.broadcast(x.expand_dims(1), gl.zeros([2, 8, 8, 8], gl.float32, x.type.layout))
        return gl.convert_layout(x.reshape([16, 8, 8]), L, assert_trivial=True)


@gluon.jit
def add_offsets(acc, a_smem, e_smem, buffer, P: gl.constexpr):
    """acc plus the offsets of a stage's groups times the sums of A, which are products
    with a column operand of ones. Boxes of 8 rows of A are taken in twos, as 16 rows."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]
    )  # fmt: skip
    ones = gl.full([64, 8], 1.0, a_smem.dtype, gl.DotOperandLayout(1, MMA, 2))
    BOXES: gl.constexpr = P.STEPS * P.FIRST_M // 16
    boxes = reinterpret(
        a_smem, a_smem.dtype, [P.STAGES * BOXES, 16, 64], gl.NVMMASharedLayout(128, 16, 2)
    )  # fmt: skip
    BOX_K: gl.constexpr = 64 * (16 // P.FIRST_M)
    FOLD: gl.constexpr = max(1, P.FOLD_K // BOX_K)
    for fold in gl.static_range(BOXES // FOLD):
        sums = gl.zeros([16, 8], gl.float32, MMA)
        for i in gl.static_range(FOLD):
            box = boxes.index(buffer * BOXES + (fold * FOLD + i)).load(gl.DotOperandLayout(0, MMA, 2))
            sums = mma_v2(box, ones, sums)
        sums = gl.convert_layout(
            sums, gl.SliceLayout(2, acc.type.layout), assert_trivial=True
        ).expand_dims(2)  # fmt: skip
        offsets = read_offsets(
            e_smem.index(buffer * P.EXTRAS + 1), fold * FOLD * BOX_K, BOX_K, P
        )  # fmt: skip
        sums, offsets = gl.broadcast(sums, offsets)
        acc = gl.fma(sums, offsets, acc)
    return acc


@gluon.jit
def by_threads_of_consumers(x, P: gl.constexpr):
    """Products as batch_kernels.by_threads has those of a consumer."""
    if P.FIRST_M == 8:
        x = gl.sum(x.reshape([2, 8, 8, 8]), axis=0)
    x = x.reshape([P.FIRST_M // 8, 4, 2, 8, 4, 2]).permute([0, 4, 3, 1, 5, 2])
    return x.reshape([64 * P.FIRST_M])


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
