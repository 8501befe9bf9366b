"""ggml's searches for scales, those of its K-quants and of its codebook, with the same bits on every backend.

Owns: these rules, as functions of arrays in blocks. Imports: what ggml's encoders have in common, the protocol.

Blocks of 256 have 8 or 16 parts, each with a scale that is an integer, of which the float16 scale of the block is the
step; so have the minima of some. Every part is searched on its own, by sums of squares in float32 that run in order:

- ``signed_parts`` (q6_k): of 19 inverse scales near -32 / (entry of largest magnitude) the one whose codes leave the
  least error, weighted by x squared, with the scale that least squares then gives;
- ``descended_parts`` (q3_k): from -4 / (that entry) on, codes one by one take the place that lowers that error, in five
  rounds;
- ``parts_with_minima`` (q2_k, q4_k, q5_k): of 16 or 21 inverse scales the one of least error, each with scale and
  minimum by least squares, weighted by magnitudes, and for q2_k of absolute values instead of squares;
- ``codebook`` and ``codebook_parts`` (iq4_nl, iq4_xs): of 16 inverse scales the one of least squared error.

Then scales become integers and float16, and the codes of parts whose scale is not 0 are found anew; others keep those
of the search. These are the rules of C as they are written there, each operation rounded to float32. Products that meet
a sum are clipped in between, so that no compiler fuses the two, and products below 2^-120 count as 0.

The rules do not depend on the unit, so that parts below 2^-10 are searched in units of a power of two next to their
largest magnitude, where nothing is subnormal. C has products of six or eight such numbers subnormal, and may find
otherwise: below 2^-15 in q3_k, and elsewhere where scales are 0 in float16 in any case, so that codes mean nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from aqt_lite._ggml_steps import Coded, as_integers, first, in_float16, inverse, quotient, square_root, through_float16
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend

__all__ = ["codebook", "codebook_parts", "descended_parts", "parts_with_minima", "signed_parts"]

_MOST = float(np.finfo(np.float32).max)
_TRIES = 7
_BLOCKS_AT_A_TIME = 1 << 12
"""Blocks whose tries are computed in one go."""
_LEAST_SEARCHED = 2.0**-20
"""Largest magnitude of a block of a codebook below which its scale is 0 in float16 whatever the search finds."""
_LEAST_WEIGHED = 2.0**-40
"""Magnitude whose cube, times a number of the table, is still normal."""
_NORMAL = 2.0**-126
_LEAST_PART = float(np.float32(1e-15))
"""Largest magnitude of a part below which ggml takes it for zeros."""
_RAISED_BELOW = 2.0**-10
_NOTHING = 2.0**-120
_NOTHING_BESIDE = 2.0**-50
"""Error whose square is not worth counting."""
_WHOLE = float((1 << 22) - 1)
"""What ggml's way of rounding, by adding 2^23 * 1.5, takes at most; beyond it gives other numbers."""


# ---- steps


def _rows(x: Array, size: int, b: Backend) -> Array:
    """(..., blocks, elements) as (``size`` elements of a part, parts); those of a block are neighbours."""
    return b.xp.matrix_transpose(b.xp.reshape(x, (-1, size)))


def _back(rows: Array, shape: tuple[int, ...], b: Backend) -> Array:
    return b.xp.reshape(b.xp.matrix_transpose(rows), shape)


def _is_negative(rows: Array, largest: Array, b: Backend) -> Array:
    """Whether the first of the entries that are ``largest`` is negative, for every column."""
    xp = b.xp
    these = xp.matrix_transpose(first(xp.matrix_transpose(largest), b))
    return xp.any(these & (rows < 0), axis=0, keepdims=True)


def _raised(rows: Array, least: float, b: Backend) -> tuple[Array, Array, Array, Array]:
    """Parts in units in which nothing is subnormal, their largest magnitudes, the unit, and which are no zeros.

    Those of less than ``least`` are zeros. What is not finite counts as zeros: its block has no scale.
    """
    xp = b.xp
    amax = b.largest(xp.abs(rows), axis=0, keepdims=True) if rows.shape[1] else xp.abs(rows[:1, :])
    used = (amax >= least) & xp.isfinite(amax)
    ones = xp.ones_like(amax)
    _, e = b.fraction_and_exponent(xp.where(used & (amax < _RAISED_BELOW), amax, ones))
    by, unit = b.power_of_two(-e), b.power_of_two(e)
    rows = xp.where(used, rows * by, xp.zeros_like(rows))
    return b.computed_once(rows), xp.where(used, amax * by, ones), unit, used


def _term(product: Array, b: Backend) -> Array:
    """A product that something is added to, or taken from: the clip keeps a compiler from fusing the two."""
    xp = b.xp
    kept = xp.where(xp.abs(product) < _NOTHING, xp.zeros_like(product), product)
    return b.computed_once(xp.clip(kept, -_MOST, _MOST))


def _ratio(x: Array, by: Array, b: Backend) -> Array:
    """``x / by`` of either sign, 0 where ``by`` is 0."""
    xp = b.xp
    there = by != 0
    size = quotient(x, xp.where(there, xp.abs(by), xp.ones_like(by)), b)
    return b.computed_once(xp.where(there, xp.where(by < 0, -size, size), xp.zeros_like(size)))


def _nearest_integer(x: Array, b: Backend) -> Array:
    """As ggml rounds: beyond 2^22 with what is left of the bits of a sum."""
    xp = b.xp
    fraction, _ = b.fraction_and_exponent(xp.abs(x + 12582912.0))
    return xp.where(xp.abs(x) <= _WHOLE, xp.round(x), (fraction - 1.5) * 2.0**23)


def _codes_of_scales(x: Array, d: Array, low: float, high: float, otherwise: Array, b: Backend) -> Array:
    """``x / d`` rounded and clipped, and ``otherwise`` where ``d`` is 0."""
    xp = b.xp
    found = xp.clip(_nearest_integer(_ratio(x, xp.broadcast_to(d, tuple(x.shape)), b), b), low, high)
    return xp.where(d != 0, found, otherwise)


def _found_in_parts(search: Callable[[Array], Array], rows: Array, b: Backend) -> Array:
    """``search`` of some columns at a time: codes, then further rows."""
    return b.in_parts(
        lambda cut: search(cut(rows, 1)), int(rows.shape[1]), lambda: _BLOCKS_AT_A_TIME, axis=1, like=rows
    )


def _step_of(scales: Array, lowest: int, b: Backend) -> tuple[Array, Array]:
    """The inverse of the step in which the scale of largest magnitude, the first of several, is ``lowest``; float16."""
    xp = b.xp
    size = xp.abs(scales)
    amax = b.largest(size, axis=-1, keepdims=True)
    negative = xp.any(first(size == amax, b) & (scales < 0), axis=-1, keepdims=True)
    inverse_step = _ratio(xp.full_like(amax, float(lowest)), xp.where(negative, -amax, amax), b)
    return inverse_step, in_float16(inverse(inverse_step, b), b)


# ---- q6_k and q3_k


def signed_parts(x: Array, b: Backend, *, size: int, top: int, lowest: int) -> Coded:
    """Codes from ``-top`` on, times a scale of either sign for ``size`` of them."""
    return _with_steps(x, b, _tried, size, top, lowest)


def descended_parts(x: Array, b: Backend, *, size: int, top: int, lowest: int) -> Coded:
    """As ``signed_parts``, by another search."""
    return _with_steps(x, b, _descended, size, top, lowest)


def _with_steps(x: Array, b: Backend, search: Callable[..., Array], size: int, top: int, lowest: int) -> Coded:
    """The scales that were found as integers from ``lowest`` on, times a step, and the codes of these."""
    xp, shape = b.xp, tuple(x.shape)
    rows = _rows(x, size, b)
    found = _found_in_parts(lambda part: search(part, top, b), rows, b)
    grid = (*shape[:-1], shape[-1] // size)
    scales = _back(found[size:, :], grid, b)
    inverse_step, step = _step_of(scales, lowest, b)
    steps = xp.clip(xp.round(inverse_step * scales), float(lowest), float(-lowest - 1))
    d = _rows(through_float16(step, b) * steps, 1, b)
    codes = _codes_of_scales(rows, d, float(-top), float(top - 1), found[:size, :], b)
    return Coded(as_integers(_back(codes, shape, b), "int8", b), step, scales=as_integers(steps, "int8", b))


def _sums(rows: Array, weight: Array, codes: Array, b: Backend) -> tuple[Array, Array]:
    """``sum(w x l)`` and ``sum(w l l)``."""
    return tuple(b.computed_once(b.ordered_sum(_term(weight * a * codes, b)))[None, :] for a in (rows, codes))


def _began(rows: Array, top: int, b: Backend) -> tuple[Array, Array, Array, Array, Array]:
    """Raised rows, weights, the entry of largest magnitude, the unit, and which parts are no zeros."""
    xp = b.xp
    rows, amax, unit, used = _raised(rows, _LEAST_PART, b)
    end = xp.where(_is_negative(rows, xp.abs(rows) == amax, b), -amax, amax)
    weight = xp.where(xp.abs(rows) < _LEAST_WEIGHED, xp.zeros_like(rows), rows * rows)
    return rows, b.computed_once(weight), end, unit, used


def _tried(rows: Array, top: int, b: Backend) -> Array:
    """Codes, and the scale that least squares give them."""
    xp = b.xp
    rows, weight, end, unit, used = _began(rows, top, b)
    steps = [i for i in range(-9, 10) if i]
    dividends = b.constant(
        [-top, *(float(-(np.float32(top) + np.float32(0.1) * np.float32(i))) for i in steps)], "float32", rows
    )

    def tried(i: Any) -> tuple[Array, Array, Array]:
        by = _ratio(xp.zeros_like(end) + dividends[i, ...], end, b)
        codes = b.computed_once(xp.clip(xp.round(by * rows), float(-top), float(top - 1)))
        return codes, *_sums(rows, weight, codes, b)

    def step(i: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        codes, scale, best = state
        these, xl, ll = tried(i + 1)
        better = (ll > 0) & (xl * xl > best * ll)
        other = quotient(xl, ll, b)
        scale = b.computed_once(xp.where(better, other, scale))
        return xp.where(better, these, codes), scale, b.computed_once(xp.where(better, other * xl, best))

    codes, xl, ll = tried(0)
    scale = b.computed_once(quotient(xl, xp.where(used, ll, xp.ones_like(ll)), b))
    codes, scale, _ = b.repeated(len(steps), step, (codes, scale, scale * xl))
    codes = xp.where(used, codes, xp.full_like(codes, float(-top)))
    return xp.concat([codes, xp.where(used, scale * unit, xp.zeros_like(scale))], axis=0)


def _descended(rows: Array, top: int, b: Backend) -> Array:
    """The same of codes that are improved one at a time."""
    xp, size = b.xp, int(rows.shape[0])
    rows, weight, end, unit, used = _began(rows, top, b)
    by = _ratio(xp.full_like(end, float(-top)), end, b)
    codes = b.computed_once(xp.clip(xp.round(by * rows), float(-top), float(top - 1)))
    index = xp.reshape(b.arange(0, size, like=rows), (size, 1))

    def step(i: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        codes, xl, ll = state
        at = i % size
        x, w, code = (a[at, ...][None, :] for a in (rows, weight, codes))
        xl_without, ll_without = xl - _term(w * x * code, b), ll - _term(w * code * code, b)
        positive = xl_without > 0
        place = _ratio(x * ll_without, xp.where(positive, xl_without, xp.ones_like(xl_without)), b)
        new = xp.clip(xp.round(place), float(-top), float(top - 1))
        xl_new, ll_new = xl_without + _term(w * x * new, b), ll_without + _term(w * new * new, b)
        better = positive & (new != code) & (ll_new > 0) & (xl_new * xl_new * ll > xl * xl * ll_new)
        codes = xp.where(better & (index == at), new, codes)
        xl, ll = xp.where(better, xl_new, xl), xp.where(better, ll_new, ll)
        return b.computed_once(codes), b.computed_once(xl), b.computed_once(ll)

    codes, xl, ll = b.repeated(5 * size, step, (codes, *_sums(rows, weight, codes, b)))
    scale = quotient(xl, xp.where(ll > 0, ll, xp.ones_like(ll)), b)
    codes = xp.where(used, codes, xp.full_like(codes, float(-top)))
    return xp.concat([codes, xp.where(used & (ll > 0), scale * unit, xp.zeros_like(scale))], axis=0)


# ---- q2_k, q4_k and q5_k


def parts_with_minima(
    x: Array, b: Backend, *, size: int, top: int, most: int, start: float, tries: int, absolute: bool
) -> Coded:
    """Codes from 0 to ``top``, times a scale, less a minimum, for ``size`` of them; both of 0 to ``most`` steps."""
    xp, shape = b.xp, tuple(x.shape)
    rows = _rows(x, size, b)
    found = _found_in_parts(lambda part: _fitted(part, top, start, tries, b, absolute=absolute), rows, b)
    grid = (*shape[:-1], shape[-1] // size)
    steps, halves = [], []
    for row in (size, size + 1):
        these = _back(found[row : row + 1, :], grid, b)
        largest = b.largest(these, axis=-1, keepdims=True)
        largest = xp.where(largest > 0, largest, xp.zeros_like(largest))
        scaled = _ratio(xp.full_like(largest, float(most)), largest, b) * these
        scaled = xp.round(xp.where(scaled < -0.5, xp.full_like(scaled, float(most)), scaled))  # C casts to unsigned
        steps.append(xp.clip(scaled, 0.0, float(most)))
        halves.append(in_float16(quotient(largest, xp.full_like(largest, float(most)), b), b))
    d, less = (_rows(through_float16(h, b) * s, 1, b) for h, s in zip(halves, steps, strict=True))
    codes = _codes_of_scales(rows + less, d, 0.0, float(top), found[:size, :], b)
    scales, minima = (as_integers(s, "int8", b) for s in steps)
    codes = as_integers(_back(codes, shape, b), "uint8", b)
    negative = in_float16(-through_float16(halves[1], b), b)
    return Coded(codes, halves[0], negative, scales, minima)


def _fitted(rows: Array, top: int, start: float, tries: int, b: Backend, *, absolute: bool) -> Array:
    """Codes, scale and minimum (its negative) of least error."""
    xp, size = b.xp, int(rows.shape[0])
    rows, _, unit, used = _raised(rows, _NORMAL, b)
    weight = xp.abs(rows)
    if not absolute:
        mean = b.ordered_sum(_term(rows * rows, b))[None, :] * (1 / size)
        weight = weight + square_root(mean, b)
    weight = b.computed_once(weight)
    sum_w, sum_x = (b.computed_once(b.ordered_sum(a))[None, :] for a in (weight, _term(weight * rows, b)))
    high, low = xp.max(rows, axis=0, keepdims=True), xp.min(rows, axis=0, keepdims=True)
    low = xp.where(low > 0, xp.zeros_like(low), low)
    wide = high != low
    dividends = b.constant(
        [top, *(float(np.float32(start) + np.float32(0.1) * np.float32(i) + np.float32(top)) for i in range(tries))],
        "float32", rows,
    )  # fmt: skip

    def coded(i: Any, low: Array) -> tuple[Array, Array]:
        by = _ratio(xp.zeros_like(high) + dividends[i, ...], high - low, b)
        return by, b.computed_once(xp.clip(xp.round(by * (rows - low)), 0.0, float(top)))

    def error(codes: Array, scale: Array, low: Array) -> Array:
        apart = xp.abs(_term(scale * codes, b) + low - rows)
        apart = xp.where(apart < _NOTHING_BESIDE, xp.zeros_like(apart), apart)
        return b.ordered_sum(_term(weight * (apart if absolute else apart * apart), b))[None, :]

    def step(i: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        codes, scale, low, least = state
        these = coded(i + 1, low)[1]
        wl = weight * these
        wl_sum, ll, xl = (b.computed_once(b.ordered_sum(_term(a, b)))[None, :] for a in (wl, wl * these, wl * rows))
        det = _term(sum_w * ll, b) - _term(wl_sum * wl_sum, b)
        fits = det > 0
        det = xp.where(fits, det, xp.ones_like(det))
        new = _ratio(_term(sum_w * xl, b) - _term(sum_x * wl_sum, b), det, b)
        new_low = _ratio(_term(ll * sum_x, b) - _term(wl_sum * xl, b), det, b)
        above = new_low > 0
        new = b.computed_once(xp.where(above, _ratio(xl, ll, b), new))
        new_low = b.computed_once(xp.where(above, xp.zeros_like(new_low), new_low))
        error_now = error(these, new, new_low)
        better = fits & (error_now < least)
        kept = ((these, codes), (new, scale), (new_low, low), (error_now, least))
        return tuple(b.computed_once(xp.where(better, a, before)) for a, before in kept)

    by, codes = coded(0, low)
    scale = inverse(by, b)
    codes, scale, low, _ = b.repeated(tries, step, (codes, scale, low, error(codes, scale, low)))
    used = used & wide
    codes, scale = (xp.where(used, a, xp.zeros_like(a)) for a in (codes, scale))
    return xp.concat([codes, scale * unit, -low * unit], axis=0)


# ---- iq4_nl and iq4_xs


def codebook(x: Array, b: Backend, numbers: tuple[float, ...]) -> Coded:
    """The scale of least squared error, weighted by x squared, among those whose inverse is tried."""
    xp, shape = b.xp, tuple(x.shape)
    rows = xp.matrix_transpose(xp.reshape(x, (-1, shape[-1])))  # (elements, blocks)
    count = int(rows.shape[1])
    d = b.in_parts(lambda cut: _search(cut(rows, 1), numbers, b), count, lambda: _BLOCKS_AT_A_TIME, axis=0, like=rows)
    codes = xp.matrix_transpose(_in_table(rows * xp.expand_dims(inverse(d, b), axis=0), numbers, b))
    return Coded(xp.reshape(xp.astype(codes, xp.uint8), shape), xp.reshape(in_float16(d, b), (*shape[:-1], 1)))


def codebook_parts(x: Array, b: Backend, *, numbers: tuple[float, ...], size: int, lowest: int) -> Coded:
    """The same for parts, whose scales are integers from ``lowest`` on, times a step."""
    xp, shape = b.xp, tuple(x.shape)
    rows = _rows(x, size, b)
    count = int(rows.shape[1])
    d = b.in_parts(lambda cut: _search(cut(rows, 1), numbers, b), count, lambda: _BLOCKS_AT_A_TIME, axis=0, like=rows)
    scales = xp.reshape(d, (*shape[:-1], shape[-1] // size))
    size_of = xp.abs(scales)
    amax = b.largest(size_of, axis=-1, keepdims=True)
    negative = xp.any(first(size_of == amax, b) & (scales < 0), axis=-1, keepdims=True)
    step = xp.where(negative, -amax, amax) * (1 / lowest)
    steps = xp.clip(xp.round(inverse(step, b) * scales), float(lowest), float(-lowest - 1))
    codes = _in_table(rows * inverse(_rows(step * steps, 1, b), b), numbers, b)
    codes = xp.astype(_back(codes, shape, b), xp.uint8)
    return Coded(codes, in_float16(step, b), scales=as_integers(steps, "int8", b))


def _search(rows: Array, numbers: tuple[float, ...], b: Backend) -> Array:
    """Scales of (elements, blocks).

    With ``q`` the numbers next to ``x`` times what is tried, and weights ``w = x^2``, each try gives
    ``d = sum(w q x) / sum(w q q)``. Sums run in order, each term rounded before it is added: the clip keeps a compiler
    from fusing the two.
    """
    xp = b.xp
    size = xp.abs(rows)
    amax = b.largest(size, axis=0, keepdims=True) if rows.shape[1] else size[:1, :]
    used = (amax >= _LEAST_SEARCHED) & xp.isfinite(amax)
    rows, amax = xp.where(used, rows, xp.zeros_like(rows)), xp.where(used, amax, xp.ones_like(amax))
    negative = _is_negative(rows, size == amax, b)

    top = -numbers[0]
    tries = tuple(top - step for step in range(-_TRIES, _TRIES + 1))
    above = xp.expand_dims(b.constant(tries, "float32", like=rows), axis=1)
    wide = xp.broadcast_to(amax, (len(tries), int(amax.shape[1])))
    tried = -quotient(xp.broadcast_to(above, tuple(wide.shape)), wide, b)
    tried = xp.concat([inverse(quotient(amax, xp.full_like(amax, top), b), b), tried], axis=0)
    tried = b.computed_once(xp.where(negative, -tried, tried))  # (tries, blocks)

    rows = xp.expand_dims(rows, axis=1)  # (elements, tries, blocks) from here on
    weight = xp.where(xp.abs(rows) < _LEAST_WEIGHED, xp.zeros_like(rows), rows * rows)
    at = _in_table(rows * xp.expand_dims(tried, axis=0), numbers, b)
    q = xp.reshape(xp.take(b.constant(numbers, "float32", like=rows), xp.reshape(at, (-1,)), axis=0), tuple(at.shape))
    q = b.computed_once(q)
    qx, qq = (b.ordered_sum(b.computed_once(xp.clip(weight * q * a, -_MOST, _MOST))) for a in (rows, q))
    qx, qq = b.computed_once(qx), b.computed_once(xp.where(used, qq, xp.ones_like(qq)))
    found = b.computed_once(quotient(qx, qq, b))
    d = found[0, :]
    best = d * qx[0, :]
    for i in range(1, 1 + len(tries)):
        better = qx[i, :] * qx[i, :] > best * qq[i, :]
        d = b.computed_once(xp.where(better, found[i, :], d))
        best = b.computed_once(xp.where(better, found[i, :] * qx[i, :], best))
    return xp.where(used[0, :], d, xp.zeros_like(d))


def _in_table(x: Array, numbers: tuple[float, ...], b: Backend) -> Array:
    """Codes of the nearest of ``numbers``, which increase; of two the larger one."""
    xp = b.xp
    cuts = b.constant(tuple((low + high) / 2 for low, high in itertools.pairwise(numbers)), "float32", like=x)
    return xp.reshape(xp.searchsorted(cuts, xp.reshape(x, (-1,)), side="right"), tuple(x.shape))
