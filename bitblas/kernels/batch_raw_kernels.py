"""Device code of the batch family for raw operands: codes that the matrix units multiply as they
come, whose sums are corrected. batch_kernels explains the terms.

With index r3, which says in which half of 16 rows a weight lies (bitblas.kernels.decoders),

    sum of weight * a = factor * sum of raw * a + offset * sum of a
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .device import decode_scale, extras_layout, of_rows
from .versions import gl, gluon, reinterpret, warpgroup_mma, warpgroup_mma_wait


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


@gluon.jit
def sum_activations(a_smem, ones_smem, totals_smem, buffer, P: gl.constexpr):
    """Sums of A over each part of a stage's k, by matrix instructions: 64 rows of boxes that lie
    one after the other, of as many parts, times a column operand of ones."""
    TILES: gl.constexpr = P.STEPS * P.FIRST_M // 64
    SUMS: gl.constexpr = P.K_PARTS * P.FIRST_M // 64
    MMA: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16]
    )  # fmt: skip
    a = reinterpret(
        a_smem, a_smem.dtype, [P.STAGES * TILES, 64, 64], gl.NVMMASharedLayout(128, 16, 2)
    )  # fmt: skip
    totals = reinterpret(
        totals_smem, gl.float32, [SUMS, 64], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )  # fmt: skip
    ones = ones_smem.permute((1, 0))
    sums = ()
    for i in gl.static_range(SUMS):
        one = gl.zeros([64, 8], gl.float32, MMA)
        for tile in gl.static_range(i, TILES, SUMS):
            one = warpgroup_mma(
                a.index(buffer * TILES + tile), ones, one, use_acc=tile > i, is_async=True
            )  # fmt: skip
        sums = sums + (one,)
    if SUMS == 1:
        sums = (warpgroup_mma_wait(0, deps=sums),)
    else:
        sums = warpgroup_mma_wait(0, deps=sums)
    for i in gl.static_range(SUMS):
        totals.index(i).store(gl.max(sums[i], axis=1))  # columns are all alike


@gluon.jit
def correction(smem, ROW: gl.constexpr, K: gl.constexpr, like, P: gl.constexpr):
    """What belongs to the group of a stage's k: [64 * BANDS, 1] of float32."""
    x = smem.slice(K // P.GROUP, 1, 0).slice(ROW * 4 * P.BANDS, 4 * P.BANDS, 1)
    x = x.load(extras_layout(1, P.BANDS)).reshape([64 * P.BANDS])
    return of_rows(x, like).to(gl.float32, bitcast=True)


@gluon.jit
def add_offsets(acc, a_smem, ones_smem, totals_smem, e_smem, buffer, P: gl.constexpr):
    """acc plus the offsets of a stage's groups times the sums of A over them."""
    sum_activations(a_smem, ones_smem, totals_smem, buffer, P)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, acc.type.layout)
    for part in gl.static_range(P.K_PARTS):
        offset = correction(
            e_smem.index(buffer * P.EXTRAS + 1), 0, part * (P.STAGE_K // P.K_PARTS), acc, P
        )  # fmt: skip
        total = totals_smem.index(part).load(COLUMNS).expand_dims(0)
        total, acc = gl.broadcast(total, acc)
        acc = gl.fma(total, gl.broadcast(offset, acc)[0], acc)
    return acc


# --- raw products ----------------------------------------------------------------------------


@gluon.jit
def multiply_raw(
    a, b, parts, factors, acc, STEP: gl.constexpr, LAST: gl.constexpr, P: gl.constexpr
):
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
