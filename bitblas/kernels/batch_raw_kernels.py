"""Device code of the batch family for raw operands: weights that lack the scale, which the sums of
products are multiplied by instead. batch_kernels explains the terms.
"""

# Gluon gives these functions' parameters their types.
# mypy: disable-error-code="no-untyped-def, assignment"

from __future__ import annotations

from .device import decode_scale, extras_layout, of_rows, twice
from .versions import gl, gluon, warpgroup_mma, warpgroup_mma_wait


@gluon.jit
def raw_extras(scale, zero, DTYPE: gl.constexpr, P: gl.constexpr, L: gl.constexpr):
    """What goes into a group's operands, if anything does, and what their products' sum is
    multiplied by: (minus, factor), 32 bits each, shaped as what load_extras returns."""
    minus = scale.to(gl.int32)
    if P.MINUS:
        minus = twice(zero.to(gl.float32) * (-1.0 / P.UNITS[0]), DTYPE)
    r3 = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, L))))
    r3 = r3.expand_dims(0).expand_dims(1).expand_dims(3)
    factor = gl.where(r3 == 0, P.UNITS[0], P.UNITS[1]) + gl.zeros(scale.shape, gl.float32, L)
    if P.SCALED:
        factor = factor * decode_scale(scale, P.SCALE_KIND)
    return minus, factor.to(gl.int32, bitcast=True)


@gluon.jit
def factor_of_sum(smem, K: gl.constexpr, like, P: gl.constexpr):
    """What belongs to the group of a stage's k: [64 * BANDS, 1] of float32."""
    x = smem.slice(K // P.GROUP, 1, 0).load(extras_layout(1, P.BANDS)).reshape([64 * P.BANDS])
    return of_rows(x, like).to(gl.float32, bitcast=True)


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
