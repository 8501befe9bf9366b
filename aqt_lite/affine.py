"""The numeric contract: scale, zero point, codes, and back. docs/numerics.md says it in words.

Owns: the arithmetic of linear quantization, and nothing else: no validation, no containers, no framework. Imports:
formats, elements, dialects, granularity, blocks of arrays, noise, the marking of operations, the ``Backend`` interface.

Reading aid. Every function takes arrays of one backend ``b`` and static records, branches on no value, and so runs
eagerly and under any tracing compiler. Bits are the same everywhere because of four rules kept throughout:

- maxima and minima are exact in any order; no sum is ever taken;
- constants are multiplied by, never divided by; the one division is ``b.reciprocal``, correctly rounded, or
  ``b.quotient``, likewise, in dialects that divide;
- a product is rounded to a number of the format (or clipped, or is the result) before anything is added to it, so no
  fused multiply-add can form and skip a rounding;
- nothing that matters is ever subnormal, so flushing subnormals to zero changes nothing.

A scale is a number, so it may be quantized itself: a format whose scales are kept in another format is this page
applied to its scales, and nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._blocks import reduced, spread
from aqt_lite._dispatch import run
from aqt_lite._exact import rounded_fused
from aqt_lite._namespace import Array
from aqt_lite._noise import noise
from aqt_lite._protocol import Backend
from aqt_lite.dialects import AQT_LITE, Dialect
from aqt_lite.elements import ElementType, FloatType, Rounding, float_type, rounded
from aqt_lite.formats import Format
from aqt_lite.granularity import Block, block_of

__all__ = [
    "Coded",
    "QParams",
    "Recipe",
    "Spec",
    "beyond",
    "choose_qparams",
    "clipped",
    "counted",
    "dequantize",
    "encode",
    "fake_quantize",
    "inverse_of",
    "inverse_of_largest",
    "least_scale",
    "quantize",
    "quantize_with",
    "reaches_an_end",
    "scales",
    "scales_of",
    "usable_qparams",
    "usable_scales",
    "without_too_small",
]


Kept = Any
"""Numbers as they are kept: an array, or ``Coded`` where they are quantized themselves; None where there are none."""


class Coded(NamedTuple):
    """The arrays of a quantized array: what compilers see as a tree of leaves."""

    codes: Array
    """One code an element."""
    scale: Kept
    """A number for each block, on the grid of blocks; coded itself where the format says so; None where it has none."""
    zero_point: Array | None = None
    """int32 on the same grid: the code of 0.0, where that is not 0."""
    offset: Kept = None
    """A number for each block, added to the block's values."""


class Steps(NamedTuple):
    """``x * factor + shift``: what libraries round that compute the inverse of a scale first."""

    factor: Array
    shift: Array | None = None


class QParams(NamedTuple):
    """All of ``Coded`` but the codes."""

    scale: Kept
    zero_point: Array | None = None
    offset: Kept = None
    steps: Steps | None = None
    """How codes are made, where that is not from the others."""

    def beside(self, codes: Array) -> Coded:
        """With codes that were made by them."""
        return Coded(codes, *self[:3])


@dataclass(frozen=True)
class Spec:
    """What codes mean: all of a quantized array that is not an array. Hashable, so that compilers specialize on it."""

    format: Format
    """Element type, and how scales are kept."""
    source: FloatType
    """Type of the values; its ``compute`` is the dtype of all arithmetic."""
    block: Block
    """Block shape, one entry for each axis."""
    floor: float = 0.0
    """Where the numbers are scales themselves: the least scale that is of use."""

    @property
    def element(self) -> ElementType:
        """Which numbers codes stand for."""
        return self.format.element

    @property
    def headroom(self) -> float:
        """What scales are multiplied by before their reciprocal is taken: it would be subnormal for the largest."""
        return 1.0 if self.format.largest() >= 4 else 0.25

    @property
    def least(self) -> float:
        """Least scale whose products with the numbers, and whose reciprocal, are normal; of scales: of use, too."""
        smallest = min(self.element.smallest, self.headroom, 1.0)
        least = self.source.tiny * 2.0 ** -math.floor(math.log2(smallest))
        return max(least, self.floor / self.element.smallest)

    @property
    def least_with_offset(self) -> float:
        """The same where an offset is added: what is lost of subnormal numbers is then less than 2^-24 of a step."""
        return max(self.least, self.source.tiny * 2.0**25)

    def least_to_choose(self, with_offset: bool) -> float:
        """The least scale that is chosen, or may be given."""
        return self.least_with_offset if with_offset else self.least

    def least_to_keep(self, with_offset: bool) -> float:
        """The least scale that may come with codes: other libraries go down to the smallest normal number."""
        kept = max(self.source.tiny / 2 / min(self.element.smallest, 1.0), self.floor / self.element.smallest)
        return self.least_with_offset if with_offset else min(self.least, kept)

    @property
    def greatest(self) -> float:
        """Largest scale whose reciprocal is normal."""
        return min(self.source.huge / self.headroom, float_type(self.source.compute).max)

    @property
    def zero_scale(self) -> float:
        """Scale of a block of zeros: 0 where scales are kept in a format that has it, since 1 might be out of place."""
        kept = self.format.scale
        return 1.0 if kept is None or not kept.element.has_zero else 0.0

    @property
    def first_too_large_scale(self) -> float:
        """The least scale that is not rounded to a number of its format any more, where those have no scale."""
        kept, rounding = self.format.scale, self.format.scale_rounding
        assert isinstance(kept, Format)
        part = {"up": 0.0, "toward_zero": 1.0}.get(rounding, 0.5) if isinstance(rounding, str) else rounding
        largest = kept.element.max
        step = math.ldexp(1.0, math.frexp(largest)[1] - 1 - getattr(kept.element, "mantissa", 0))
        return largest + part * step

    @property
    def of_scales(self) -> Spec:
        """What the codes of the scales mean: one block in all, or groups along the last axis."""
        kept, ndim = self.format.scale, len(self.block)
        assert kept is not None
        block = block_of(kept.granularity, ndim) if ndim else ()
        return Spec(kept, float_type(self.source.compute), block, floor=self.least)


@dataclass(frozen=True)
class Recipe:
    """How codes are chosen. It is forgotten once they are."""

    symmetric: bool = True
    """Numbers as far below zero as above it, the zero point fixed."""
    offset: bool = False
    """A real offset for each block, so that its numbers cover [min x, max x], with or without zero."""
    rounding: Rounding = "half_even"
    """How values are rounded to numbers."""
    ignore_nonfinite: bool = False
    """Take statistics over finite values only, instead of marking a block that has others with a NaN scale."""
    dialect: Dialect = AQT_LITE
    """Whose rules."""

    @property
    def plain(self) -> bool:
        """Whether the rules are the plain ones, which compiled loops know."""
        return self.rounding == "half_even" and not self.offset and self.dialect is AQT_LITE

    @property
    def keeps_tiny(self) -> bool:
        """Whether what is subnormal may be rounded to another number than 0: then it is flushed, on every backend."""
        return self.rounding == "stochastic" or self.dialect is not AQT_LITE

    @property
    def of_magnitudes(self) -> bool:
        """Whether scales are chosen from magnitudes alone."""
        return self.symmetric and self.dialect.reach not in ("each side", "lowest") and not self.dialect.one_sided

    @property
    def may_lack_zero(self) -> bool:
        """Whether a range is that of the values alone, which may all lie on one side of zero."""
        return self.offset or not (self.symmetric or self.dialect.zero_in_range)

    def centred(self, spec: Spec) -> bool:
        """Whether numbers reach as far below zero (or the offset) as above it."""
        return self.symmetric or (self.offset and spec.element.signed)

    def narrow(self, spec: Spec) -> bool:
        """Whether codes leave out what has no opposite."""
        return self.centred(spec) and self.dialect.narrow(spec.element)


def choose_qparams(x: Array, *, spec: Spec, recipe: Recipe, b: Backend) -> QParams:
    """Scale, and zero point or offset, of every block: arrays of the grid's shape."""
    xp, source, rules = b.xp, spec.source, recipe.dialect
    if rules.together is not None:
        return _together(x, spec, recipe, b)[0]
    x = _computable(x, spec, b)
    known = counted(x, spec, recipe, xp)
    if known is not None:
        x = xp.where(known, x, xp.zeros_like(x))

    lo: Any = None
    hi: Any = None
    offset: Any = None
    steps: Steps | None = None
    if recipe.of_magnitudes:
        amax = reduced(xp.abs(x), spec.block, b.largest, xp)
        statistic = xp.where(amax < source.tiny, xp.zeros_like(amax), amax)
        if rules.range_of_zeros is not None:
            instead = xp.full_like(statistic, max(map(abs, rules.range_of_zeros)))
            statistic = xp.where(statistic == 0, instead, statistic)
        if rules.inverse:
            steps = Steps(_factor(statistic, largest_of(spec, recipe), recipe, spec, b))
            scale = _inverted(steps.factor, b)
        else:
            scale = _over(statistic, largest_of(spec, recipe), recipe, spec, b)
    else:
        lo, hi = _ends(x, known, spec, recipe, b)
        if recipe.symmetric:
            scale = _of_both_sides(lo, hi, recipe, spec, b)
        elif recipe.offset and rules.of_range is not None:
            first, last = spec.element.codes
            scale, offset, *others = rules.of_range(lo, hi, last - first, b)
            steps = Steps(*others) if others else None
        elif rules.divides_range:
            scale = _over(hi - lo, 2 * largest_of(spec, recipe), recipe, spec, b)
        else:  # halved first: cannot overflow
            scale = _over(hi * 0.5 - lo * 0.5, largest_of(spec, recipe), recipe, spec, b)

    finite, of_nothing = xp.isfinite(scale), scale == 0
    negative = scale <= -float_type(source.compute).tiny / 2  # subnormal ones are those of nothing
    scale = _usable_scale(xp.abs(scale) if rules.signed_scales else scale, spec, recipe, b)
    if rules.signed_scales:
        scale = xp.where(negative, -scale, scale)
    scale = xp.where(finite, scale, xp.full_like(scale, float("nan")))  # loud: dequantizes to NaN
    kept = _keep(scale, spec, b, saturates=rules.plain_scales)
    if rules.kept_of_zeros is not None and isinstance(kept, Coded) and kept.scale is None:
        code = xp.full_like(kept.codes, rules.kept_of_zeros)
        kept = kept._replace(codes=xp.where(of_nothing, code, kept.codes))

    if recipe.offset:
        if offset is None:
            # halves are exact; two constants, since XLA makes one product of equal ones, of a sum that overflows
            offset = _without_tiny(hi * 0.5 - lo * -0.5, spec, xp) if spec.element.signed else lo
        return QParams(kept, None, xp.where(finite, offset, xp.zeros_like(offset)), steps)
    if recipe.symmetric:
        middle = spec.element.middle
        return QParams(kept, xp.full_like(scale, middle, dtype=xp.int32) if middle else None, None, steps)
    shift = _zero_point(lo, hi, scales(kept, spec, b), recipe, spec, b)
    return QParams(kept, xp.astype(xp.where(finite, shift, xp.zeros_like(shift)), xp.int32))


def _ends(x: Array, known: Array | None, spec: Spec, recipe: Recipe, b: Backend) -> tuple[Array, Array]:
    """The range of each block, with 0 in it or without."""
    xp, tiny = b.xp, spec.source.tiny
    low = high = x
    if recipe.may_lack_zero and known is not None:  # 0 might lie far from the values that are there
        low, high = (xp.where(known, x, xp.full_like(x, end)) for end in (math.inf, -math.inf))
    lo, hi = reduced(low, spec.block, xp.min, xp), reduced(high, spec.block, b.largest, xp)
    if recipe.may_lack_zero:
        if known is not None:
            lo, hi = (xp.where(lo > hi, xp.zeros_like(end), end) for end in (lo, hi))
        lo, hi = _without_tiny(lo, spec, xp), _without_tiny(hi, spec, xp)
    else:  # zero belongs to the range: it is then represented exactly
        lo = xp.where(lo > -tiny, xp.zeros_like(lo), lo)
        hi = xp.where(hi < tiny, xp.zeros_like(hi), hi)
    if recipe.dialect.range_of_zeros is not None:
        nothing = (lo == 0) & (hi == 0)
        ends = zip((lo, hi), recipe.dialect.range_of_zeros, strict=True)
        lo, hi = (xp.where(nothing, xp.full_like(end, instead), end) for end, instead in ends)
    return lo, hi


def _of_both_sides(lo: Array, hi: Array, recipe: Recipe, spec: Spec, b: Backend) -> Array:
    """Scales of symmetric codes, where the sign of the largest entry matters."""
    xp, rules = b.xp, recipe.dialect
    if rules.reach == "each side":
        low, most = spec.element.range_of(recipe.narrow(spec))
        below, above = _over(-lo, -low, recipe, spec, b), _over(hi, most, recipe, spec, b)
        return xp.where(below > above, below, above)
    positive = hi > -lo
    scale = _over(xp.where(positive, hi, -lo), largest_of(spec, recipe), recipe, spec, b)
    if rules.reach == "lowest":
        scale = xp.where(positive, -scale, scale)
    return xp.where(lo < 0, scale, scale * 0.5) if rules.one_sided else scale


def _zero_point(lo: Array, hi: Array, scale: Array, recipe: Recipe, spec: Spec, b: Backend) -> Array:
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


def largest_of(spec: Spec, recipe: Recipe) -> float:
    """What the largest magnitude of a block becomes, or half its range."""
    of_dialect = recipe.dialect.largest(spec.element) if recipe.symmetric else None
    return spec.format.largest(recipe.centred(spec)) if of_dialect is None else of_dialect


def counted(x: Array, spec: Spec, recipe: Recipe, xp: Any) -> Array | None:
    """Where values count for statistics: those that are not passed over, nor missing. None where all do."""
    if recipe.ignore_nonfinite:
        return xp.isfinite(x)
    return None if spec.element.missing is None else ~xp.isnan(x)


def inverse_of_largest(spec: Spec, recipe: Recipe) -> float:
    """What a statistic is multiplied by to give the scale: rounded to the compute dtype here, not by a compiler."""
    return _inverse(largest_of(spec, recipe), spec)


def least_scale(spec: Spec, recipe: Recipe) -> float:
    """The least scale that is used: a dialect may go a little farther down."""
    least = spec.least_to_choose(recipe.offset)
    return min(least, recipe.dialect.least_scale or least)


def _inverse(number: float, spec: Spec) -> float:
    return float(np.dtype(spec.source.compute).type(1 / number))


def _over(statistic: Array, number: float, recipe: Recipe, spec: Spec, b: Backend) -> Array:
    """The scale at which a statistic becomes that number."""
    rules, xp = recipe.dialect, b.xp
    statistic = _amended(statistic, recipe, spec, xp)
    if rules.divides_range:
        return b.quotient(statistic, xp.full_like(statistic, number))
    return statistic * _inverse(number, spec)


def _factor(statistic: Array, number: float, recipe: Recipe, spec: Spec, b: Backend) -> Array:
    """The inverse of that scale, where it is what is computed; NaN where it is subnormal."""
    rules, xp = recipe.dialect, b.xp
    statistic = _amended(statistic, recipe, spec, xp)
    most = min(spec.source.huge * (number if rules.divides_range else 1.0), float_type(spec.source.compute).max)
    usable = (statistic > 0) & (statistic <= most)
    statistic = xp.where(usable, statistic, xp.ones_like(statistic))
    if rules.divides_range:
        factor = b.quotient(xp.full_like(statistic, number), statistic)
    else:
        factor = b.quotient(xp.ones_like(statistic), statistic) * number
    return xp.where(usable, factor, xp.full_like(factor, float("nan")))


def _amended(statistic: Array, recipe: Recipe, spec: Spec, xp: Any) -> Array:
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


def _usable_scale(scale: Array, spec: Spec, recipe: Recipe, b: Backend) -> Array:
    """Scales, none of them too small."""
    xp, rules = b.xp, recipe.dialect
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


def scales(kept: Kept, spec: Spec, b: Backend) -> Array:
    """The numbers that scales stand for, however they are kept."""
    return kept if spec.format.scale is None else dequantize(kept, spec=spec.of_scales, b=b)


def usable_scales(kept: Kept, spec: Spec, b: Backend) -> Array:
    """The same for reading codes: what was kept in few bits is 0 where its product with a number could be subnormal.

    No scale that is chosen here is so small, and ``from_codes`` refuses plain ones; others' kept ones may be, as e8m0's
    code 0, which is 2^-127.
    """
    numbers = scales(kept, spec, b)
    return without_too_small(numbers, spec, b) if isinstance(kept, tuple) else numbers


def without_too_small(numbers: Array, spec: Spec, b: Backend) -> Array:
    """Scales, 0 in place of those whose product with the smallest number would be subnormal."""
    return b.xp.where(b.xp.abs(numbers) < spec.least_to_keep(False), b.xp.zeros_like(numbers), numbers)


def scales_of(kept: Coded, *, spec: Spec, b: Backend) -> Array:
    """``scales`` as an operation of its own."""
    return scales(kept, spec, b)


def clipped(
    x: Array,
    qparams: QParams | None,
    key: Array | None = None,
    *,
    spec: Spec,
    recipe: Recipe,
    first: int = 0,
    b: Backend,
) -> Array:
    """Where ``x`` lies outside the range of the numbers, and so was not rounded but clipped.

    Without parameters: by a dialect's rule that makes them and the codes together.
    """
    if qparams is None:
        inside = _together(x, spec, recipe, b)[2]
    else:
        inside = _encoded(x, QParams(*qparams), key, spec, recipe, first, b)[1]
    outside = ~inside
    passes = recipe.ignore_nonfinite or spec.element.missing is not None
    return outside & ~b.xp.isnan(x) if passes else outside


def reaches_an_end(codes: Array, *, spec: Spec, recipe: Recipe, b: Backend) -> Array:
    """Whether a code is that of the smallest or the largest number: without one, nothing was clipped."""
    ends = spec.element.end_codes(recipe.centred(spec))
    return b.xp.any(codes == codes if ends is None else (codes == ends[0]) | (codes == ends[1]))


def beyond(x: Array, low: Array, high: Array, *, spec: Spec, b: Backend) -> Array:
    """Where ``x`` is finite and outside the range of its block."""
    xp, v, shape = b.xp, _computable(x, spec, b), tuple(x.shape)
    outside = (v < spread(low, shape, spec.block, xp)) | (v > spread(high, shape, spec.block, xp))
    return outside & xp.isfinite(v)


def count_clipped(
    x: Array, qparams: QParams | None, key: Array | None = None, *, spec: Spec, recipe: Recipe, b: Backend
) -> tuple[Array, Array]:
    """How many values are ``clipped``, and the position of the first."""
    return _counted(clipped(x, qparams, key, spec=spec, recipe=recipe, b=b), b.xp)


def count_beyond(x: Array, low: Array, high: Array, *, spec: Spec, b: Backend) -> tuple[Array, Array]:
    """How many values are ``beyond``, and the position of the first."""
    return _counted(beyond(x, low, high, spec=spec, b=b), b.xp)


def _counted(flags: Array, xp: Any) -> tuple[Array, Array]:
    flat = xp.astype(xp.reshape(flags, (-1,)), xp.int32)
    return xp.sum(flat), xp.argmax(flat)


def _keep(scale: Array, spec: Spec, b: Backend, *, saturates: bool = False) -> Kept:
    """Scales as the format keeps them. What it has no number for becomes NaN, or, if it ``saturates``, the next one."""
    xp, form = b.xp, spec.format.scale
    if form is None:
        return scale
    inner, recipe = spec.of_scales, Recipe(rounding=spec.format.scale_rounding, dialect=AQT_LITE)
    if form.scaled:
        return Coded(*run(b, quantize, scale, spec=inner, recipe=recipe))
    element, beyond = form.element, spec.first_too_large_scale
    fits = (scale == 0) | ((scale >= element.smallest) & (scale <= element.max))
    if beyond > element.max:  # what is rounded down to the largest number
        most = float_type(spec.source.compute).max
        fits = fits | ((scale > element.max) & (scale < beyond if beyond <= most else scale <= most))
    if saturates:
        fits, inner = xp.isfinite(scale), replace(inner, floor=0.0)
    scale = xp.where(fits, scale, xp.full_like(scale, float("nan")))
    codes = encode(scale, QParams(None), spec=inner, recipe=recipe, b=b)
    return Coded(xp.where(fits, codes, xp.full_like(codes, element.nan)), None)


def quantize(x: Array, key: Array | None = None, *, spec: Spec, recipe: Recipe, b: Backend) -> Coded:
    """Codes, scale, zero point and offset, calibrated on ``x`` itself."""
    if recipe.dialect.together is not None:
        made, codes, _ = _together(x, spec, recipe, b)
        return made.beside(codes)
    qparams = choose_qparams(x, spec=spec, recipe=recipe, b=b)
    return qparams.beside(encode(x, qparams, key, spec=spec, recipe=recipe, b=b))


def _together(x: Array, spec: Spec, recipe: Recipe, b: Backend) -> tuple[QParams, Array, Array]:
    """Parameters, codes, and where clipping left them unchanged, by a dialect's rule that makes them together."""
    assert recipe.dialect.together is not None
    v = _flushed(_computable(x, spec, b), spec, b.xp)
    known = counted(v, spec, recipe, b.xp)

    def encode_numbers(numbers: Array) -> tuple[Array, Array]:
        return spec.element.encode(numbers, None, recipe.narrow(spec), recipe.rounding, None, b)

    there = v if known is None else b.xp.where(known, v, b.xp.zeros_like(v))
    codes, inside, scale, zero, offset = recipe.dialect.together(v, there, encode_numbers, spec, b)
    return QParams(Coded(*scale) if isinstance(scale, tuple) else scale, zero, offset), codes, inside


def usable_qparams(x: Array, given: QParams, *, spec: Spec, recipe: Recipe, b: Backend) -> QParams:
    """Given parameters as the format keeps them, the scale NaN in blocks where they cannot be used.

    Unusable are a scale outside [least, greatest] (but for a dialect's own of a block of zeros), a zero point that is
    no code, an offset that is not finite, and a block with a non-finite value.
    """
    xp = b.xp
    scale, zero_point, offset, _ = given
    numbers = scales(scale, spec, b) if isinstance(scale, tuple) else scale
    least, size = least_scale(spec, recipe), xp.abs(numbers) if recipe.dialect.signed_scales else numbers
    usable = (size >= least) & (size <= spec.greatest)
    if spec.zero_scale == 0:
        usable = usable | (numbers == 0)
    if zero_point is not None:
        low, high = spec.element.zero_codes
        usable = usable & (zero_point >= low) & (zero_point <= high)
        zero_point = xp.clip(zero_point, low, high)
    if offset is not None:
        usable = usable & xp.isfinite(offset)
        offset = xp.where(xp.isfinite(offset), _without_tiny(offset, spec, xp), xp.zeros_like(offset))
    of_zeros = recipe.dialect.kept_of_zeros if isinstance(scale, tuple) and scale[1] is None else None
    if not recipe.ignore_nonfinite or of_zeros is not None:
        size = xp.abs(_computable(x, spec, b))
        known = counted(size, spec, recipe, xp)
        size = size if known is None else xp.where(known, size, xp.zeros_like(size))
        amax = reduced(size, spec.block, b.largest, xp)
        if of_zeros is not None:  # which may be subnormal
            usable = usable | ((scale[0] == of_zeros) & (amax < spec.source.tiny))
        usable = usable & xp.isfinite(amax)
    if isinstance(scale, tuple):
        return QParams(_marked(Coded(*scale), ~usable, spec, b), zero_point, offset)
    scale = xp.where(usable, scale, xp.full_like(scale, float("nan")))
    if spec.format.scale is not None and not spec.format.scale.scaled:  # so that what fits the scale still does
        spec = replace(spec, format=replace(spec.format, scale_rounding="up"))
    return QParams(_keep(scale, spec, b), zero_point, offset)


def _marked(kept: Coded, bad: Array, spec: Spec, b: Backend) -> Coded:
    """Kept scales, NaN where ``bad``: by a code of their own, or through their own scale."""
    xp, inner = b.xp, spec.of_scales
    if not inner.format.scaled:
        return kept._replace(codes=xp.where(bad, xp.full_like(kept.codes, inner.element.nan), kept.codes))
    bad = reduced(xp.astype(bad, xp.float32), inner.block, xp.max, xp) > 0
    if isinstance(kept.scale, tuple):
        return kept._replace(scale=_marked(Coded(*kept.scale), bad, inner, b))
    return kept._replace(scale=xp.where(bad, xp.full_like(kept.scale, float("nan")), kept.scale))


def quantize_with(
    x: Array, given: QParams, key: Array | None = None, *, spec: Spec, recipe: Recipe, b: Backend
) -> Coded:
    """Codes for a given scale, and zero point or offset."""
    qparams = usable_qparams(x, given, spec=spec, recipe=recipe, b=b)
    return qparams.beside(encode(x, qparams, key, spec=spec, recipe=recipe, b=b))


def encode(
    x: Array, qparams: QParams, key: Array | None = None, *, spec: Spec, recipe: Recipe, first: int = 0, b: Backend
) -> Array:
    """The codes of the numbers next to ``(x - offset) / scale``; NaN becomes the code of zero.

    ``key`` is that of stochastic rounding; ``first`` is the position of ``x`` in the array that it is a part of.
    """
    return _encoded(x, qparams, key, spec, recipe, first, b)[0]


def dequantize(w: Coded, *, spec: Spec, out: str | None = None, b: Backend) -> Array:
    """``(number - zero_point) * scale + offset`` in dtype ``out`` (default: the source's).

    It saturates at the source type's largest value: rounding the zero point can put the outermost code half a step
    beyond it, where the product, or its conversion to a narrow source type, would overflow.
    """
    xp, source, shape = b.xp, spec.source, tuple(w.codes.shape)
    steps = spec.element.decode(w.codes, b, source.compute)
    if w.zero_point is not None:  # as integers: exact, and the codes' own type would overflow
        zero = spread(w.zero_point, shape, spec.block, xp)
        if spec.element.missing is None:
            steps = xp.astype(steps, xp.int32) - zero
        else:  # floats have NaN, and are as exact
            steps = steps - xp.astype(zero, steps.dtype)
    x = xp.astype(steps, b.dtype(source.compute))
    if w.scale is not None:
        scale = usable_scales(w.scale, spec, b)
        if w.offset is None:
            x = x * spread(scale, shape, spec.block, xp)
        else:  # in halves, which cannot overflow; the clip keeps the addition from being fused with the product
            x = xp.clip(x * spread(scale * 0.5, shape, spec.block, xp), -source.max, source.max)
            x = _without_tiny(x + spread(w.offset * 0.5, shape, spec.block, xp), spec, xp) * 2.0
    return xp.astype(xp.clip(x, -source.max, source.max), b.dtype(out or source.name))


def fake_quantize(
    x: Array,
    given: QParams | None = None,
    key: Array | None = None,
    *,
    spec: Spec,
    recipe: Recipe,
    b: Backend,
) -> tuple[Array, Array]:
    """Quantize and dequantize with the given or the calibrated parameters; also the scale, NaN for a bad block.

    The gradient goes straight through where ``x`` lies inside the range of the numbers, and is 0 where it is clipped.
    """
    constant = b.stop_gradient(x)
    if given is None and recipe.dialect.together is not None:
        qparams, codes, inside = _together(constant, spec, recipe, b)
        values = dequantize(qparams.beside(codes), spec=spec, b=b)
        return b.straight_through(x, values, inside), scales(qparams.scale, spec, b)
    if given is None:
        qparams = choose_qparams(constant, spec=spec, recipe=recipe, b=b)
    else:
        qparams = usable_qparams(constant, QParams(*given), spec=spec, recipe=recipe, b=b)
    codes, inside = _encoded(constant, qparams, key, spec, recipe, 0, b)
    values = dequantize(qparams.beside(codes), spec=spec, b=b)
    return b.straight_through(x, values, inside), scales(qparams.scale, spec, b)


def _encoded(
    x: Array, qparams: QParams, key: Array | None, spec: Spec, recipe: Recipe, first: int, b: Backend
) -> tuple[Array, Array]:
    """Codes, and where clipping left them unchanged."""
    xp, shape = b.xp, tuple(x.shape)
    scale, zero, offset, steps = qparams
    v = _computable(x, spec, b)
    normal = float_type(spec.source.compute).tiny / 2
    if recipe.keeps_tiny or not spec.element.has_zero:  # numbers next to each other on both sides of 0 tell them apart
        v = _flushed(v, spec, xp)
    if steps is not None:
        v = v * spread(steps[0], shape, spec.block, xp)
        if steps[1] is not None:  # the clip keeps the addition from being fused with the product
            most = float_type(spec.source.compute).max
            v = xp.clip(v, -most, most) + spread(steps[1], shape, spec.block, xp)
    elif scale is not None:
        scale = scales(scale, spec, b)
        if recipe.dialect.kept_of_zeros is not None:  # the scale of zeros may be subnormal
            nothing = scale < normal
            scale = xp.where(nothing, xp.ones_like(scale), scale)
            v = xp.where(spread(nothing, shape, spec.block, xp), v * 0.0, v)
        if offset is not None:  # in halves, as in dequantize
            v = _without_tiny(v, spec, xp) * 0.5 - spread(offset * 0.5, shape, spec.block, xp)
            v, scale = _without_tiny(v, spec, xp), scale * 0.5
        rules = recipe.dialect
        v = _in_steps(v, scale, spec.block, spec, rules.divides, b, signed=rules.signed_scales)
    if spec.floor:  # a scale that is not 0 is not kept as 0
        v = xp.where((x > 0) & (v < spec.element.smallest), xp.full_like(v, spec.element.smallest), v)
    if zero is not None:
        zero = spread(xp.astype(zero, v.dtype), shape, spec.block, xp)
        if recipe.dialect.fused and steps is None and spec.source.compute == "float32":
            v, zero = _fused(x, scale, zero, spec, b), xp.zeros_like(zero)
        elif recipe.dialect.zero_first:  # clipped far off, so that a product is not fused with the addition
            v = xp.where(xp.isnan(v), zero, xp.clip(v, -_FAR, _FAR) + zero)
            zero = xp.zeros_like(zero)
    drawn = noise(shape, key, first, b) if recipe.rounding == "stochastic" and key is not None else None
    codes, inside = spec.element.encode(v, zero, recipe.narrow(spec), recipe.rounding, drawn, b)
    if not recipe.dialect.minus_zero and spec.element.minus_zero is not None:
        codes = xp.where(codes == spec.element.minus_zero, xp.zeros_like(codes), codes)
    return codes, inside


_FAR = 2.0**22
"""Farther from zero than any code, and near enough for what is added to be exact."""


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


def _fused(x: Array, scale: Array, zero: Array, spec: Spec, b: Backend) -> Array:
    """``x * (1 / scale) + zero``, rounded to float32 at once and then to a whole number; ``zero`` for NaN."""
    xp, shape = b.xp, tuple(x.shape)
    v = _flushed(_computable(x, spec, b), spec, xp)
    inverse = xp.broadcast_to(spread(b.reciprocal(scale), shape, spec.block, xp), shape)
    zero, floats = xp.broadcast_to(zero, shape), partial(b.floats_of, name="float32")
    found = rounded_fused(v, inverse, zero, xp=xp, bits_of=b.bits_of, floats_of=floats)
    return xp.where(xp.isnan(found), zero, found)


def _flushed(x: Array, spec: Spec, xp: Any) -> Array:
    """``x``, 0 of its sign where it is subnormal."""
    return xp.where(xp.abs(x) < float_type(spec.source.compute).tiny / 2, x * 0.0, x)


def _without_tiny(x: Array, spec: Spec, xp: Any) -> Array:
    """``x``, 0 where it or its half might be subnormal."""
    return xp.where(xp.abs(x) < spec.source.tiny, xp.zeros_like(x), x)


def _computable(x: Array, spec: Spec, b: Backend) -> Array:
    return b.xp.astype(x, b.dtype(spec.source.compute))
