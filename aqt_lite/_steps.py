"""Values in steps of their block's scale, before they are rounded.

Owns: division by scales, and the zero point, which is such a number of steps. Imports: the records, blocks of arrays,
exact sums, the ``Backend`` interface.
"""

from __future__ import annotations

from functools import partial

from aqt_lite._blocks import spread
from aqt_lite._exact import rounded_fused
from aqt_lite._namespace import Array
from aqt_lite._normal import computable, flushed, without_tiny
from aqt_lite._protocol import Backend
from aqt_lite._records import Recipe, Spec, Steps
from aqt_lite.elements import float_type, rounded
from aqt_lite.granularity import Block

__all__ = ["before_rounding", "by_factor", "by_scale", "inverse_of", "zero_point_of"]

_FAR = 2.0**22
"""Farther from zero than any code, and near enough for what is added to be exact."""


def by_factor(x: Array, steps: Steps, spec: Spec, b: Backend) -> Array:
    """``x * factor + shift``, where a dialect says how codes are made."""
    xp, shape = b.xp, tuple(x.shape)
    v = x * spread(steps[0], shape, spec.block, xp)
    if steps[1] is None:
        return v
    most = float_type(spec.source.compute).max  # the clip keeps the addition from being fused with the product
    return xp.clip(v, -most, most) + spread(steps[1], shape, spec.block, xp)


def by_scale(x: Array, scale: Array, offset: Array | None, spec: Spec, recipe: Recipe, b: Backend) -> Array:
    """``(x - offset) / scale``."""
    xp, shape, rules = b.xp, tuple(x.shape), recipe.dialect
    if rules.kept_of_zeros is not None:  # the scale of zeros may be subnormal
        nothing = scale < float_type(spec.source.compute).tiny / 2
        scale = xp.where(nothing, xp.ones_like(scale), scale)
        x = xp.where(spread(nothing, shape, spec.block, xp), x * 0.0, x)
    if offset is not None:  # in halves, which cannot overflow
        x = without_tiny(x, spec, xp) * 0.5 - spread(offset * 0.5, shape, spec.block, xp)
        x, scale = without_tiny(x, spec, xp), scale * 0.5
    return _in_steps(x, scale, spec.block, spec, rules.divides, b, signed=rules.signed_scales)


def before_rounding(
    x: Array, v: Array, scale: Array, zero: Array, with_steps: bool, spec: Spec, recipe: Recipe, b: Backend
) -> tuple[Array, Array]:
    """Steps, and zero points to be added once they are rounded: all, but for dialects that add them before."""
    xp, rules = b.xp, recipe.dialect
    if rules.fused and not with_steps and spec.source.compute == "float32":
        return _fused(x, scale, zero, spec, b), xp.zeros_like(zero)
    if rules.zero_first:  # clipped far off, so that a product is not fused with the addition
        return xp.where(xp.isnan(v), zero, xp.clip(v, -_FAR, _FAR) + zero), xp.zeros_like(zero)
    return v, zero


def _in_steps(
    x: Array, scale: Array, block: Block, spec: Spec, divides: bool, b: Backend, *, signed: bool = False
) -> Array:
    """``x / scale``; 0 where the scale was kept as 0. ``signed``: scales may be negative."""
    xp = b.xp
    if signed:  # the sign changes no rounding
        turned = spread(scale < 0, tuple(x.shape), block, xp)
        x, scale = xp.where(turned, -x, x), xp.abs(scale)
    if divides:
        may_be_zero, zero = spec.zero_scale == 0, scale == 0
        scale = xp.where(zero, xp.ones_like(scale), scale) if may_be_zero else scale
        v = b.quotient(x, spread(scale, tuple(x.shape), block, xp))
        return xp.where(spread(zero, tuple(x.shape), block, xp), xp.zeros_like(v), v) if may_be_zero else v
    inverse, factor = inverse_of(scale, spec, b)
    v = x * spread(inverse, tuple(x.shape), block, xp)
    return v if factor is None else v * spread(factor, tuple(x.shape), block, xp)


def inverse_of(scale: Array, spec: Spec, b: Backend) -> tuple[Array, Array | None]:
    """``1/scale``, correctly rounded, or 0 where that was kept as 0; and a power of two that a product with it meets.

    The second is None where it is 1 throughout.
    """
    xp, headroom, factor = b.xp, spec.headroom, None
    zero = scale == 0 if spec.zero_scale == 0 else None
    if zero is not None:
        scale = xp.where(zero, xp.ones_like(scale), scale)
    if headroom != 1:
        factor = xp.where(scale > 1, xp.full_like(scale, headroom), xp.ones_like(scale))
    inverse = b.reciprocal(scale if factor is None else scale * factor)
    return (inverse if zero is None else xp.where(zero, xp.zeros_like(inverse), inverse)), factor


def zero_point_of(lo: Array, hi: Array, scale: Array, spec: Spec, recipe: Recipe, b: Backend) -> Array:
    """The code of zero for a range, as a whole float."""
    xp, rules = b.xp, recipe.dialect
    qmin, qmax = spec.element.zero_codes
    divides = rules.divides_range if rules.divides_zero is None else rules.divides_zero
    steps = _in_steps(lo, scale, (1,) * lo.ndim, spec, divides, b)
    if rules.zero_first:  # the clip keeps a product from being fused with the subtraction
        shift = rounded(qmin - xp.clip(steps, -_FAR, _FAR), rules.rounding, xp)
    else:
        shift = qmin - rounded(steps, rules.rounding, xp)
    shift = xp.clip(shift, float(qmin), float(qmax))
    if rules.zero_of_zeros is not None:
        shift = xp.where((lo == 0) & (hi == 0), xp.full_like(shift, rules.zero_of_zeros), shift)
    return shift


def _fused(x: Array, scale: Array, zero: Array, spec: Spec, b: Backend) -> Array:
    """``x * (1 / scale) + zero``, rounded to float32 at once and then to a whole number; ``zero`` for NaN."""
    xp, shape = b.xp, tuple(x.shape)
    v = flushed(computable(x, spec, b), spec, xp)
    inverse = xp.broadcast_to(spread(b.reciprocal(scale), shape, spec.block, xp), shape)
    zero, floats = xp.broadcast_to(zero, shape), partial(b.floats_of, name="float32")
    found = rounded_fused(v, inverse, zero, xp=xp, bits_of=b.bits_of, floats_of=floats)
    return xp.where(xp.isnan(found), zero, found)
