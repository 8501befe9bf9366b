"""Which values lie outside the numbers that their codes can be.

Owns: telling and counting them. Imports: the contract, the records, blocks of arrays, the ``Backend`` interface.
"""

from __future__ import annotations

from typing import Any

from aqt_lite._blocks import spread
from aqt_lite._namespace import Array
from aqt_lite._normal import computable
from aqt_lite._protocol import Backend
from aqt_lite._records import QParams, Recipe, Spec
from aqt_lite.affine import encode_and_tell, together

__all__ = ["beyond", "clipped", "count_beyond", "count_clipped", "reaches_an_end"]


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
        inside = together(x, spec, recipe, b)[2]
    else:
        inside = encode_and_tell(x, QParams(*qparams), key, spec, recipe, first, b)[1]
    outside = ~inside
    passes = recipe.ignore_nonfinite or spec.element.missing is not None
    return outside & ~b.xp.isnan(x) if passes else outside


def reaches_an_end(codes: Array, *, spec: Spec, recipe: Recipe, b: Backend) -> Array:
    """Whether a code is that of the smallest or the largest number: without one, nothing was clipped."""
    ends = spec.element.end_codes(recipe.centred(spec))
    return b.xp.any(codes == codes if ends is None else (codes == ends[0]) | (codes == ends[1]))


def beyond(x: Array, low: Array, high: Array, *, spec: Spec, b: Backend) -> Array:
    """Where ``x`` is finite and outside the range of its block."""
    xp, v, shape = b.xp, computable(x, spec, b), tuple(x.shape)
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
