"""The numeric contract: scale, zero point, codes, and back. docs/numerics.md says it in words.

Owns: the arithmetic of linear quantization, and nothing else: no validation, no containers, no framework. Imports: the
records, statistics, steps, elements, dialects, blocks of arrays, noise, the choice of kernels, the ``Backend``
interface.

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

Rows of docs/numerics.md that other modules compute: *scale*, *zero block* and ranges are in ``_statistics``,
*reciprocal* and zero points in ``_steps``, numbers and their rounding in ``elements``. The first two have the rules of
dialects, too, which are the library's own unless ``recipe.dialect`` says otherwise. Words used here: a *grid* has one
entry a block, and ``spread`` repeats it for the block's elements; ``known`` says where values count; ``floor`` is the
least scale of use, where the numbers are scales themselves; ``first`` is where in an array a part of it begins.
"""

from __future__ import annotations

from dataclasses import replace

from aqt_lite._blocks import reduced, spread
from aqt_lite._dispatch import run
from aqt_lite._namespace import Array
from aqt_lite._noise import noise
from aqt_lite._normal import computable, flushed, without_tiny
from aqt_lite._protocol import Backend
from aqt_lite._records import Coded, Kept, QParams, Recipe, Spec
from aqt_lite._statistics import counted, ends, of_magnitudes, of_ranges, usable_scale
from aqt_lite._steps import before_rounding, by_factor, by_scale, zero_point_of
from aqt_lite.dialects import AQT_LITE
from aqt_lite.elements import float_type

__all__ = [
    "Coded",
    "QParams",
    "Recipe",
    "Spec",
    "any_unusable",
    "choose_qparams",
    "dequantize",
    "encode",
    "encode_and_tell",
    "keep",
    "quantize",
    "scales",
    "scales_of",
    "together",
    "usable_scales",
    "without_too_small",
]


def quantize(x: Array, key: Array | None = None, *, spec: Spec, recipe: Recipe, b: Backend) -> Coded:
    """Codes, scale, zero point and offset, calibrated on ``x`` itself."""
    if recipe.dialect.together is not None:
        made, codes, _ = together(x, spec, recipe, b)
        return made.beside(codes)
    qparams = choose_qparams(x, spec=spec, recipe=recipe, b=b)
    return qparams.beside(encode(x, qparams, key, spec=spec, recipe=recipe, b=b))


def choose_qparams(x: Array, *, spec: Spec, recipe: Recipe, b: Backend) -> QParams:
    """Scale, and zero point or offset, of every block: arrays of the grid's shape."""
    xp, lo, hi = b.xp, None, None
    if not spec.format.scaled:
        return QParams(None)
    if recipe.dialect.together is not None:
        return together(x, spec, recipe, b)[0]
    x = computable(x, spec, b)
    known = counted(x, spec, recipe, xp)
    if known is not None:
        x = xp.where(known, x, xp.zeros_like(x))
    if recipe.of_magnitudes:
        scale, offset, steps = of_magnitudes(reduced(xp.abs(x), spec.block, b.largest, xp), spec, recipe, b)
    else:
        lo, hi = ends(x, known, spec, recipe, b)
        scale, offset, steps = of_ranges(lo, hi, spec, recipe, b)

    finite = xp.isfinite(scale)
    kept = keep_chosen(scale, spec, recipe, b)
    if recipe.offset:
        return QParams(kept, None, xp.where(finite, offset, xp.zeros_like(offset)), steps)
    if recipe.symmetric:
        middle = spec.element.middle
        return QParams(kept, xp.full_like(scale, middle, dtype=xp.int32) if middle else None, None, steps)
    shift = zero_point_of(lo, hi, scales(kept, spec, b), spec, recipe, b)
    return QParams(kept, xp.astype(xp.where(finite, shift, xp.zeros_like(shift)), xp.int32))


def encode(
    x: Array, qparams: QParams, key: Array | None = None, *, spec: Spec, recipe: Recipe, first: int = 0, b: Backend
) -> Array:
    """The codes of the numbers next to ``(x - offset) / scale``; NaN becomes the code of zero.

    ``key`` is that of stochastic rounding; ``first`` is the position of ``x`` in the array that it is a part of.
    """
    return encode_and_tell(x, qparams, key, spec, recipe, first, b)[0]


def encode_and_tell(
    x: Array, qparams: QParams, key: Array | None, spec: Spec, recipe: Recipe, first: int, b: Backend
) -> tuple[Array, Array]:
    """Codes, and where clipping left them unchanged."""
    xp, shape = b.xp, tuple(x.shape)
    scale, zero, offset, steps = qparams
    v = computable(x, spec, b)
    if recipe.keeps_tiny or not spec.element.has_zero:  # numbers next to each other on both sides of 0 tell them apart
        v = flushed(v, spec, xp)
    if steps is not None:
        v = by_factor(v, steps, spec, b)
    elif scale is not None:
        scale = scales(scale, spec, b)
        v = by_scale(v, scale, offset, spec, recipe, b)
    if spec.floor:  # a scale that is not 0 is not kept as 0
        v = xp.where((x > 0) & (v < spec.element.smallest), xp.full_like(v, spec.element.smallest), v)
    if zero is not None:
        zero = spread(xp.astype(zero, v.dtype), shape, spec.block, xp)
        v, zero = before_rounding(x, v, scale, zero, steps is not None, spec, recipe, b)
    drawn = noise(shape, key, first, b) if recipe.rounding == "stochastic" and key is not None else None
    codes, inside = spec.element.encode(v, zero, recipe.narrow(spec), recipe.rounding, drawn, b)
    if not (spec.format.scaled or recipe.ignore_nonfinite):  # no scale can say so
        codes = xp.where(xp.isfinite(v), codes, xp.full_like(codes, spec.element.nan))
    if not recipe.dialect.minus_zero and spec.element.minus_zero is not None:
        codes = xp.where(codes == spec.element.minus_zero, xp.zeros_like(codes), codes)
    return codes, inside


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
    if w.scale is None and spec.element.max <= source.max:  # nothing to clip, and subnormal numbers stay
        return xp.astype(x, b.dtype(out or source.name))
    if w.scale is not None:
        scale = usable_scales(w.scale, spec, b)
        if w.offset is None:
            x = x * spread(scale, shape, spec.block, xp)
        else:  # in halves, which cannot overflow; the clip keeps the addition from being fused with the product
            x = xp.clip(x * spread(scale * 0.5, shape, spec.block, xp), -source.max, source.max)
            x = without_tiny(x + spread(w.offset * 0.5, shape, spec.block, xp), spec, xp) * 2.0
    return xp.astype(xp.clip(x, -source.max, source.max), b.dtype(out or source.name))


def together(x: Array, spec: Spec, recipe: Recipe, b: Backend) -> tuple[QParams, Array, Array]:
    """Parameters, codes, and where clipping left them unchanged, by a dialect's rule that makes them together."""
    assert recipe.dialect.together is not None
    v = flushed(computable(x, spec, b), spec, b.xp)
    known = counted(v, spec, recipe, b.xp)

    def encode_numbers(numbers: Array) -> tuple[Array, Array]:
        return spec.element.encode(numbers, None, recipe.narrow(spec), recipe.rounding, None, b)

    there = v if known is None else b.xp.where(known, v, b.xp.zeros_like(v))
    codes, inside, scale, zero, offset = recipe.dialect.together(v, there, encode_numbers, spec, b)
    return QParams(Coded(*scale) if isinstance(scale, tuple) else scale, zero, offset), codes, inside


def keep_chosen(scale: Array, spec: Spec, recipe: Recipe, b: Backend) -> Kept:
    """Scales that were computed, as the format keeps them: none too small, NaN in place of what is not finite."""
    xp, rules = b.xp, recipe.dialect
    of_nothing = scale == 0
    kept = keep(usable_scale(scale, spec, recipe, b), spec, b, saturates=rules.plain_scales)
    if rules.kept_of_zeros is not None and isinstance(kept, Coded) and kept.scale is None:
        code = xp.full_like(kept.codes, rules.kept_of_zeros)
        kept = kept._replace(codes=xp.where(of_nothing, code, kept.codes))
    return kept


def keep(scale: Array, spec: Spec, b: Backend, *, saturates: bool = False) -> Kept:
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


def any_unusable(kept: Coded, *, spec: Spec, b: Backend) -> Array:
    """Whether one of the scales that are kept in another format is NaN."""
    return b.xp.any(b.xp.isnan(scales(kept, spec, b)))


def scales_of(kept: Coded, *, spec: Spec, b: Backend) -> Array:
    """``scales`` as an operation of its own."""
    return scales(kept, spec, b)
