"""From the values of each block to its scale: ranges, magnitudes, and what they are multiplied by.

Owns: statistics, and the rules of dialects about them. Imports: the records, blocks of arrays, the ``Backend``
interface.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from aqt_lite._blocks import reduced
from aqt_lite._namespace import Array
from aqt_lite._normal import without_tiny
from aqt_lite._protocol import Backend
from aqt_lite._records import Recipe, Spec, Steps
from aqt_lite.elements import float_type

__all__ = [
    "counted",
    "ends",
    "inverse_of_largest",
    "largest_of",
    "least_scale",
    "of_magnitudes",
    "of_ranges",
    "usable_scale",
]


def counted(x: Array, spec: Spec, recipe: Recipe, xp: Any) -> Array | None:
    """Where values count for statistics: those that are not passed over, nor missing. None where all do."""
    if recipe.ignore_nonfinite:
        return xp.isfinite(x)
    return None if spec.element.missing is None else ~xp.isnan(x)


def largest_of(spec: Spec, recipe: Recipe) -> float:
    """What the largest magnitude of a block becomes, or half its range."""
    of_dialect = recipe.dialect.largest(spec.element) if recipe.symmetric else None
    return spec.format.largest(recipe.centred(spec)) if of_dialect is None else of_dialect


def inverse_of_largest(spec: Spec, recipe: Recipe) -> float:
    """What a statistic is multiplied by to give the scale: rounded to the compute dtype here, not by a compiler."""
    return _inverse(largest_of(spec, recipe), spec)


def _inverse(number: float, spec: Spec) -> float:
    return float(np.dtype(spec.source.compute).type(1 / number))


def least_scale(spec: Spec, recipe: Recipe) -> float:
    """The least scale that is used: a dialect may go a little farther down."""
    least = spec.least_to_choose(recipe.offset)
    return min(least, recipe.dialect.least_scale or least)


def ends(x: Array, known: Array | None, spec: Spec, recipe: Recipe, b: Backend) -> tuple[Array, Array]:
    """The range of each block, with 0 in it or without."""
    xp, tiny = b.xp, spec.source.tiny
    low = high = x
    if recipe.may_lack_zero and known is not None:  # 0 might lie far from the values that are there
        low, high = (xp.where(known, x, xp.full_like(x, end)) for end in (math.inf, -math.inf))
    lo, hi = reduced(low, spec.block, xp.min, xp), reduced(high, spec.block, b.largest, xp)
    if recipe.may_lack_zero:
        if known is not None:
            lo, hi = (xp.where(lo > hi, xp.zeros_like(end), end) for end in (lo, hi))
        lo, hi = without_tiny(lo, spec, xp), without_tiny(hi, spec, xp)
    else:  # zero belongs to the range: it is then represented exactly
        lo = xp.where(lo > -tiny, xp.zeros_like(lo), lo)
        hi = xp.where(hi < tiny, xp.zeros_like(hi), hi)
    if recipe.dialect.range_of_zeros is not None:
        nothing = (lo == 0) & (hi == 0)
        of_zeros = zip((lo, hi), recipe.dialect.range_of_zeros, strict=True)
        lo, hi = (xp.where(nothing, xp.full_like(end, instead), end) for end, instead in of_zeros)
    return lo, hi


def of_magnitudes(amax: Array, spec: Spec, recipe: Recipe, b: Backend) -> tuple[Array, None, Steps | None]:
    """Scales, no offsets, and how codes are made, from the largest magnitude of each block."""
    xp, rules, most = b.xp, recipe.dialect, largest_of(spec, recipe)
    amax = xp.where(amax < spec.source.tiny, xp.zeros_like(amax), amax)
    if rules.range_of_zeros is not None:
        instead = xp.full_like(amax, max(map(abs, rules.range_of_zeros)))
        amax = xp.where(amax == 0, instead, amax)
    if not rules.inverse:
        return _over(amax, most, spec, recipe, b), None, None
    factor = _factor(amax, most, spec, recipe, b)
    return _inverted(factor, b), None, Steps(factor)


def of_ranges(lo: Array, hi: Array, spec: Spec, recipe: Recipe, b: Backend) -> tuple[Array, Array | None, Steps | None]:
    """Scales, offsets and how codes are made, from the range of each block."""
    rules, most = recipe.dialect, largest_of(spec, recipe)
    if recipe.symmetric:
        return _of_both_sides(lo, hi, spec, recipe, b), None, None
    if recipe.offset and rules.of_range is not None:
        first, last = spec.element.codes
        scale, offset, *others = rules.of_range(lo, hi, last - first, b)
        return scale, offset, Steps(*others) if others else None
    if rules.divides_range:
        scale = _over(hi - lo, 2 * most, spec, recipe, b)
    else:  # halved first: cannot overflow
        scale = _over(hi * 0.5 - lo * 0.5, most, spec, recipe, b)
    if not recipe.offset:
        return scale, None, None
    # halves are exact; two constants, since XLA makes one product of equal ones, of a sum that overflows
    return scale, without_tiny(hi * 0.5 - lo * -0.5, spec, b.xp) if spec.element.signed else lo, None


def _of_both_sides(lo: Array, hi: Array, spec: Spec, recipe: Recipe, b: Backend) -> Array:
    """Scales of symmetric codes, where the sign of the largest entry matters."""
    xp, rules = b.xp, recipe.dialect
    if rules.reach == "each side":
        low, most = spec.element.range_of(recipe.narrow(spec))
        below, above = _over(-lo, -low, spec, recipe, b), _over(hi, most, spec, recipe, b)
        return xp.where(below > above, below, above)
    positive = hi > -lo
    scale = _over(xp.where(positive, hi, -lo), largest_of(spec, recipe), spec, recipe, b)
    if rules.reach == "lowest":
        scale = xp.where(positive, -scale, scale)
    return xp.where(lo < 0, scale, scale * 0.5) if rules.one_sided else scale


def _over(statistic: Array, number: float, spec: Spec, recipe: Recipe, b: Backend) -> Array:
    """The scale at which a statistic becomes that number."""
    rules, xp = recipe.dialect, b.xp
    statistic = _amended(statistic, spec, recipe, xp)
    if rules.divides_range:
        return b.quotient(statistic, xp.full_like(statistic, number))
    return statistic * _inverse(number, spec)


def _factor(statistic: Array, number: float, spec: Spec, recipe: Recipe, b: Backend) -> Array:
    """The inverse of that scale, where it is what is computed; NaN where it is subnormal."""
    rules, xp = recipe.dialect, b.xp
    statistic = _amended(statistic, spec, recipe, xp)
    most = min(spec.source.huge * (number if rules.divides_range else 1.0), float_type(spec.source.compute).max)
    usable = (statistic > 0) & (statistic <= most)
    statistic = xp.where(usable, statistic, xp.ones_like(statistic))
    if rules.divides_range:
        factor = b.quotient(xp.full_like(statistic, number), statistic)
    else:
        factor = b.quotient(xp.ones_like(statistic), statistic) * number
    return xp.where(usable, factor, xp.full_like(factor, float("nan")))


def _amended(statistic: Array, spec: Spec, recipe: Recipe, xp: Any) -> Array:
    """Statistics that a dialect replaces, or adds something to."""
    rules, number = recipe.dialect, np.dtype(spec.source.compute).type
    if rules.least_range:
        least = float(number(rules.least_range))
        instead = least if rules.range_instead is None else rules.range_instead
        statistic = xp.where(statistic < least, xp.full_like(statistic, instead), statistic)
    return statistic + float(number(rules.added)) if rules.added else statistic


def _inverted(x: Array, b: Backend) -> Array:
    """``1/x``; NaN where that is too large."""
    usable = x >= float_type(b.dtype_name(x)).tiny / 2
    inverse = b.quotient(b.xp.ones_like(x), b.xp.where(usable, x, b.xp.ones_like(x)))
    return b.xp.where(usable, inverse, b.xp.full_like(x, float("nan")))


def usable_scale(scale: Array, spec: Spec, recipe: Recipe, b: Backend) -> Array:
    """Scales, none of them too small, and NaN in place of what is not finite: loud, since it dequantizes to NaN."""
    xp, finite = b.xp, b.xp.isfinite(scale)
    if recipe.dialect.signed_scales:
        negative = scale <= -float_type(spec.source.compute).tiny / 2  # subnormal ones are those of nothing
        scale = _large_enough(xp.abs(scale), spec, recipe, xp)
        scale = xp.where(negative, -scale, scale)
    else:
        scale = _large_enough(scale, spec, recipe, xp)
    return xp.where(finite, scale, xp.full_like(scale, float("nan")))


def _large_enough(scale: Array, spec: Spec, recipe: Recipe, xp: Any) -> Array:
    rules = recipe.dialect
    if rules.least_scale is not None:
        instead = rules.least_scale if rules.instead is None else rules.instead
        return xp.where(scale < rules.least_scale, xp.full_like(scale, instead), scale)
    zero_block = scale < spec.source.tiny
    least = spec.least_to_choose(recipe.offset)
    if least > spec.source.tiny:
        scale = xp.where(scale < least, xp.full_like(scale, least), scale)
    of_zeros = spec.zero_scale
    if not spec.element.has_zero:  # the number next to zero is to stand for as little as it can
        smallest = 0.0 if spec.format.scale is None else spec.format.scale.element.smallest
        of_zeros = min(of_zeros, max(least, smallest))
    return xp.where(zero_block, xp.full_like(scale, of_zeros), scale)
