"""Bounds that hold: the type that keeps every value within an error, and the proof.

Owns: what a bound is, which types are tried for it, and errors that no rounding understates. Imports: the container,
formats, parts of arrays. Everything is measured on NumPy, on the result itself, and nothing is estimated.

How to quantize is an argument: this module tries, measures, and says what was kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from aqt_lite._log import announce
from aqt_lite._namespace import Array
from aqt_lite._parts import boxes, memory_order, part_of, part_of_array
from aqt_lite._protocol import Backend
from aqt_lite.elements import Float, float_type
from aqt_lite.formats import FORMATS, Format, format_of, with_missing
from aqt_lite.qarray import QArray

__all__ = ["AUTO", "Bound", "bound_of", "largest_error", "quantize_within"]

AUTO = "auto"
"""The dtype that stands for the narrowest type that keeps a bound."""

MOST_ELEMENTS = 1 << 16
"""Elements looked at together: what is made of them stays in a core's cache."""

_MARGIN = 1 + 2.0**-50
"""More than what a quotient of two rounded numbers loses: a difference and a division, each half a unit."""

_Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Bound:
    """The largest error that is allowed."""

    argument: str
    """What users call it."""
    value: float
    relative: bool
    """Whether in units of each value itself, 0 being exact; else in units of ``x``."""

    def __str__(self) -> str:
        return f"{self.argument}={self.value!r}"


def bound_of(max_abs_err: Any, max_rel_err: Any) -> Bound | None:
    """The bound that users give, checked; None where they give none."""
    if max_abs_err is not None and max_rel_err is not None:
        raise ValueError("max_abs_err and max_rel_err are both given: one bound at a time")
    for argument, value in (("max_abs_err", max_abs_err), ("max_rel_err", max_rel_err)):
        if value is not None:
            return Bound(argument, _number(argument, value), argument == "max_rel_err")
    return None


def _number(argument: str, value: Any) -> float:
    if isinstance(value, bool | np.bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{argument} is a {type(value).__name__}: give a number")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{argument}={value}: a bound is finite and not negative")
    return number


# ---- which type


Way = dict[str, Any]
"""Arguments of ``quantize`` that say where the numbers of a type lie."""


Make = Callable[[Format, Way], QArray]
"""Quantizes into a format, in a way."""


def quantize_within(
    x: Array, b: Backend, dtype: Any, bound: Bound, asked: Way, make: Make, *, missing: bool = False
) -> QArray:
    """What ``make`` gives of ``dtype``, or of the narrowest type, so that every finite value keeps the bound.

    ``asked`` is the way that the caller insists on; empty where any will do. ``missing``: whether values may miss.
    ValueError, with what can be kept, where the bound cannot.
    """
    auto = isinstance(dtype, str) and dtype == AUTO
    asked_for = None if auto else format_of(dtype)
    if asked_for is not None:
        missing = missing or asked_for.element.missing is not None
        asked_for = with_missing(asked_for) if missing else asked_for
    known = candidates(bound, missing)
    tried = known if asked_for is None else [asked_for]
    for form in tried:
        found = _try(x, b, form, bound, asked, make)
        if found is not None:
            announce(f"{bound}: {found.dtype} keeps it, in {found.nbytes} bytes")
            return found
    least = {form.name: _least(x, b, form, bound, asked, make) for form in tried}
    best, reached = min(least.items(), key=lambda pair: pair[1])
    words = f"keeps {bound.argument}={reached!r} here"
    if math.isinf(reached):
        words = "keeps no bound at all, since 0 does not stay 0, or a value does not stay finite"
    smaller = "use smaller blocks (granularity=), or keep x as it is"
    if auto:
        raise ValueError(f"none of {', '.join(least)} can keep {bound}: {best} {words}; {smaller}")
    bits = tried[0].element.bits
    wider = [f for f in known if f.element.bits >= bits and f.name != tried[0].name and _serves(f, asked)]
    better = next((f for f in wider if _try(x, b, f, bound, asked, make) is not None), None)
    way = smaller if better is None else f"dtype={better.name!r} does, and dtype={AUTO!r} finds the narrowest"
    raise ValueError(f"{best} cannot keep {bound}: it {words}; {way}")


_SIZES = (2, 3, 4, 5, 6, 7, 8, 16)
_UNSIGNED, _SIGNED = ([FORMATS[f"{sign}int{bits}"] for bits in _SIZES] for sign in ("u", ""))
_FLOATS = [form for form in FORMATS.values() if type(form.element) is Float and form.scale is None]


def candidates(bound: Bound, missing: bool = False) -> list[Format]:
    """Types from the narrowest on: integers, and for relative errors the floats of 8 bits before the integers of 8.

    Unsigned ones use every code. Where values may be ``missing``, signed ones do, but for the code of those.
    """
    found = sorted([*(_FLOATS if bound.relative else ()), *(_SIGNED if missing else _UNSIGNED)], key=_bits)
    return [with_missing(f) for f in found if f.element.bits >= 8 or f in _SIGNED] if missing else found


def _bits(form: Format) -> int:
    return form.element.bits


def ways_of(form: Format, bound: Bound) -> list[Way]:
    """Where the numbers of a type may lie: over the range of the values alone, or with 0 among them, exactly.

    An offset is what code 0 stands for: where that is what is missing, a zero point serves instead.
    """
    element = form.element
    takes_offset = element.missing != 0
    found: list[Way] = []
    if bound.relative and element.signed:
        found.append({})
    if element.zero_points and (bound.relative or not takes_offset):
        found.append({"scheme": "affine"})
    return [*found, {"offset": "data"}] if takes_offset else found


def _try(x: Array, b: Backend, form: Format, bound: Bound, asked: Way, make: Make) -> QArray | None:
    """A QArray that keeps the bound."""
    for way in [asked] if asked else ways_of(form, bound):
        q = make(form, way)
        if largest_error(x, q, b, relative=bound.relative, enough=bound.value) <= bound.value:
            return q
    return None


def _least(x: Array, b: Backend, form: Format, bound: Bound, asked: Way, make: Make) -> float:
    """The least bound that is kept."""
    ways = [asked] if asked else ways_of(form, bound)
    return min(largest_error(x, make(form, way), b, relative=bound.relative) for way in ways)


def _serves(form: Format, asked: Way) -> bool:
    return asked.get("scheme") != "affine" or asked["offset"] is not None or form.element.zero_points


# ---- the proof


def largest_error(x: Array, q: QArray, b: Backend, *, relative: bool = False, enough: float = math.inf) -> float:
    """The least float64 that no error is above: of ``q.dequantize()``, in its own type or a wider one.

    Of finite values of ``x``; infinite where one of them is not finite in ``q``, or, ``relative``, where 0 is not 0.
    Rounding cannot hide anything: a difference of two float64 is taken with what its rounding lost. Above ``enough``
    the search ends, with an error that there is.
    """
    if not q.size:
        return 0.0
    array, codes = b.to_numpy(x), q.to_backend("numpy").unpacked()
    source = float_type(q.float_dtype)
    measure = _relative if relative else _absolute
    worst = 0.0
    with np.errstate(all="ignore"):
        for box in boxes(q.shape, MOST_ELEMENTS, memory_order(array), codes._checked().block):
            values, part = part_of_array(array, box).astype(np.float64), part_of(codes, box)
            finite = np.isfinite(values)
            for dtype in dict.fromkeys((source.name, source.compute)):
                error = measure(values, part.dequantize(dtype).astype(np.float64))
                error = np.where(np.isnan(error), math.inf, error)
                worst = max(worst, float(error.max(where=finite, initial=0.0)))
            if worst > enough:
                break
    return worst


def _absolute(x: _Numbers, y: _Numbers) -> _Numbers:
    """``|x - y|``, rounded up.

    ``s + t`` is the difference exactly (Knuth, The Art of Computer Programming, volume 2, 4.2.2): the rounded one and
    what its rounding lost, which is NaN only beside numbers that overflow.
    """
    s = x - y
    back = s - x
    t = (x - (s - back)) - (y + back)
    size = np.abs(s)
    lost = np.where(s < 0, -t, t)
    up: _Numbers = np.where((lost <= 0) | np.isinf(size), size, np.nextafter(size, math.inf))
    return up


def _relative(x: _Numbers, y: _Numbers) -> _Numbers:
    """``|x - y| / |x|``, rounded up; of 0: 0 where it is exact, else infinite."""
    return np.where(x == y, 0.0, np.abs(x - y) / np.abs(x) * _MARGIN)
