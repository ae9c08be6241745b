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


@gluon.jit
def sum_activations(a_smem, totals_smem, buffer, P: gl.constexpr):
    """Sums of each box of a stage of A, 64 k, by matrix instructions: two warps, a box each."""
    COUNT: gl.constexpr = P.STEPS * P.FIRST_M // 32  # 16 rows a warp: of one box or of several
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[2, 0], warps_per_cta=[2, 1, 1], instr_shape=[1, 16, 8]
    )  # fmt: skip
    ones = gl.full([2, 64, 8], 1.0, a_smem.dtype, gl.DotOperandLayout(1, MMA, 2))
    pairs = reinterpret(
        a_smem, a_smem.dtype, [P.STAGES * COUNT, 2, 16, 64], gl.NVMMASharedLayout(128, 16, 3)
    )  # fmt: skip
    totals = reinterpret(
        totals_smem, gl.float32, [P.STAGES * COUNT, 2, 16],
        gl.SwizzledSharedLayout(1, 1, 1, [1, 0]),
    )  # fmt: skip
    TOGETHER: gl.constexpr = min(COUNT, 4)  # a sum's matrix instructions wait for each other
    for first in gl.static_range(0, COUNT, TOGETHER):
        boxes = ()
        for i in gl.static_range(TOGETHER):
            box = pairs.index(buffer * COUNT + (first + i))
            boxes = boxes + (box.load(gl.DotOperandLayout(0, MMA, 2)),)
        sums = ()
        for i in gl.static_range(TOGETHER):
            sums = sums + (mma_v2(boxes[i], ones, gl.zeros([2, 16, 8], gl.float32, MMA)),)
        for i in gl.static_range(TOGETHER):  # columns are all alike
            totals.index(buffer * COUNT + (first + i)).store(gl.max(sums[i], axis=2))


@gluon.jit
def correction(smem, ROW: gl.constexpr, GROUP: gl.constexpr, acc, P: gl.constexpr):
    """[64 * BANDS, 1] of float32."""
    x = smem.slice(GROUP, 1, 0).slice(ROW * 4 * P.BANDS, 4 * P.BANDS, 1)
    x = x.load(extras_layout(1, P.BANDS)).reshape([64 * P.BANDS])
    return of_rows(x, acc).to(gl.float32, bitcast=True)


@gluon.jit
def correct(
    acc, part, e_smem, totals_smem, buffer, ROW: gl.constexpr, FOLD: gl.constexpr, P: gl.constexpr
):  # fmt: skip
    """acc plus the raw products of the FOLD-th share of a stage's k, with what belongs to them."""
    MMA: gl.constexpr = acc.type.layout
    GROUP: gl.constexpr = FOLD * P.FOLD_K // P.GROUP
    factor = correction(e_smem.index(buffer * P.EXTRAS), ROW, GROUP, acc, P)
    acc = gl.fma(part, gl.broadcast(factor, part)[0], acc)
    if P.SUMS:
        offset = correction(e_smem.index(buffer * P.EXTRAS + 1), ROW, GROUP, acc, P)
        BOXES: gl.constexpr = P.FOLD_K // 64
        totals = totals_smem.index(buffer * P.STEPS + FOLD * BOXES).load(gl.SliceLayout(0, MMA))
        for i in gl.static_range(1, BOXES):
            box = totals_smem.index(buffer * P.STEPS + (FOLD * BOXES + i))
            totals += box.load(gl.SliceLayout(0, MMA))
        totals, acc = gl.broadcast(totals.expand_dims(0), acc)
        acc = gl.fma(totals, gl.broadcast(offset, acc)[0], acc)
    return acc


@gluon.jit
def multiply_raw(
    a, b, parts, acc, e_smem, totals_smem, summed, buffer, phase, STEP: gl.constexpr,
    STEPS: gl.constexpr, KTH: gl.constexpr, ROW: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """The STEP-th of a consumer's STEPS in a stage, of 64 k, with raw operands: (parts, acc). Their
    products go to one of two parts, while the other, where it is complete, is corrected."""
    EACH: gl.constexpr = P.FOLD_K // 64  # steps that share corrections
    WHICH: gl.constexpr = STEP // EACH % 2
    part = warpgroup_mma(a, b, parts[WHICH], use_acc=STEP % EACH != 0, is_async=True)
    other = parts[1 - WHICH]
    if STEP > 0:
        part, other = warpgroup_mma_wait(1, deps=(part, other))
    if STEP % EACH == 0 and STEP > 0:
        if STEP == EACH and P.SUMS:
            mbarrier.wait(summed.index(buffer), phase)
        FOLD: gl.constexpr = KTH * STEPS // EACH + STEP // EACH - 1
        acc = correct(acc, other, e_smem, totals_smem, buffer, ROW, FOLD, P)
    if STEP == STEPS - 1:
        part = warpgroup_mma_wait(0, deps=(part,))
        if STEPS == EACH and P.SUMS:
            mbarrier.wait(summed.index(buffer), phase)
        LAST: gl.constexpr = KTH * STEPS // EACH + STEP // EACH
        acc = correct(acc, part, e_smem, totals_smem, buffer, ROW, LAST, P)
    if WHICH == 0:
        return (part, other), acc
    else:
        return (other, part), acc
