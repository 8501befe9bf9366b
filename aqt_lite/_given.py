"""Scales, zero points and offsets that somebody gives: what of them can be used, codes by them, fake quantization.

Owns: that. Imports: the contract, the records, statistics, blocks of arrays, the ``Backend`` interface.
"""

from __future__ import annotations

from dataclasses import replace

from aqt_lite._blocks import reduced
from aqt_lite._namespace import Array
from aqt_lite._normal import computable, without_tiny
from aqt_lite._protocol import Backend
from aqt_lite._records import Coded, QParams, Recipe, Spec
from aqt_lite._statistics import counted, least_scale
from aqt_lite.affine import choose_qparams, dequantize, encode, encode_and_tell, keep, scales, together

__all__ = ["fake_quantize", "quantize_with", "usable_qparams"]


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
        offset = xp.where(xp.isfinite(offset), without_tiny(offset, spec, xp), xp.zeros_like(offset))
    of_zeros = recipe.dialect.kept_of_zeros if isinstance(scale, tuple) and scale[1] is None else None
    if not recipe.ignore_nonfinite or of_zeros is not None:
        size = xp.abs(computable(x, spec, b))
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
    return QParams(keep(scale, spec, b), zero_point, offset)


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
        qparams, codes, inside = together(constant, spec, recipe, b)
        values = dequantize(qparams.beside(codes), spec=spec, b=b)
        return b.straight_through(x, values, inside), scales(qparams.scale, spec, b)
    if given is None:
        qparams = choose_qparams(constant, spec=spec, recipe=recipe, b=b)
    else:
        qparams = usable_qparams(constant, QParams(*given), spec=spec, recipe=recipe, b=b)
    codes, inside = encode_and_tell(constant, qparams, key, spec, recipe, 0, b)
    values = dequantize(qparams.beside(codes), spec=spec, b=b)
    return b.straight_through(x, values, inside), scales(qparams.scale, spec, b)
