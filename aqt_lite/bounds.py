"""Bounds that hold: the type that keeps every value within an error, and the proof.

Owns: what a bound is, which types are tried for it, and errors that no rounding understates. Imports: the container,
formats, parts of arrays. Everything is measured on NumPy, on the result itself, and nothing is estimated.

How to quantize is an argument: this module tries, measures, and says what was kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from aqt_lite._log import announce
from aqt_lite._namespace import Array
from aqt_lite._parts import boxes, memory_order, part_of, part_of_array
from aqt_lite._progress import over
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
    x: Array,
    b: Backend,
    dtype: Any,
    bound: Bound,
    asked: Way,
    make: Make,
    *,
    missing: bool = False,
    offsets: bool = True,
) -> QArray:
    """What ``make`` gives of ``dtype``, or of the narrowest type, so that every finite value keeps the bound.

    ``asked`` is the way that the caller insists on; empty where any will do. ``missing``: whether values may miss;
    ``offsets``: whether the dialect has offsets. A way that ``make`` refuses is passed by. ValueError, with what can be
    kept, where the bound cannot; that of ``make`` where it refuses all.
    """
    auto = isinstance(dtype, str) and dtype == AUTO
    asked_for = None if auto else format_of(dtype)
    if asked_for is not None:
        missing = missing or asked_for.element.missing is not None
        asked_for = with_missing(asked_for) if missing else asked_for
    known = candidates(bound, missing, offsets)
    tried = known if asked_for is None else [asked_for]
    refusals: list[ValueError] = []

    def ways(form: Format) -> list[Way]:
        return [asked] if asked else ways_of(form, bound, offsets)

    def made(form: Format) -> Iterator[QArray]:
        for way in ways(form):
            try:
                q = make(form, way)
            except ValueError as error:
                refusals.append(error)
            else:
                yield q

    def kept(form: Format) -> QArray | None:
        errors = ((largest_error(x, q, b, relative=bound.relative, enough=bound.value), q) for q in made(form))
        return next((q for error, q in errors if error <= bound.value), None)

    for form in tried:
        found = kept(form)
        if found is not None:
            announce(f"{bound}: {found.dtype} keeps it, in {found.nbytes} bytes")
            return found
    if len(refusals) == sum(len(ways(form)) for form in tried):
        raise _refusal(refusals, tried)
    errors = {form.name: [largest_error(x, q, b, relative=bound.relative) for q in made(form)] for form in tried}
    least = {name: min(each) for name, each in errors.items() if each}
    best, reached = min(least.items(), key=lambda pair: pair[1])
    words = f"keeps {bound.argument}={reached!r} here"
    if math.isinf(reached):
        words = "keeps no bound at all, since 0 does not stay 0, or a value does not stay finite"
    smaller = "use smaller blocks (granularity=), or keep x as it is"
    if auto:
        raise ValueError(f"none of {', '.join(least)} can keep {bound}: {best} {words}; {smaller}")
    wider = (f for f in known if f.element.bits >= tried[0].element.bits and f.name != tried[0].name)
    better = next((f for f in wider if kept(f) is not None), None)
    way = smaller if better is None else f"dtype={better.name!r} does, and dtype={AUTO!r} finds the narrowest"
    raise ValueError(f"{best} cannot keep {bound}: it {words}; {way}")


def _refusal(refusals: list[ValueError], tried: list[Format]) -> ValueError:
    """What to raise where no way serves: what all say, or, of several types, what is said of the widest."""
    if len(tried) == 1 or len(set(map(str, refusals))) == 1:
        return refusals[0]
    names = ", ".join(form.name for form in tried)
    return ValueError(f"dtype={AUTO!r}: none of {names} can be had as asked; of {tried[-1].name}: {refusals[-1]}")


_SIZES = (2, 3, 4, 5, 6, 7, 8, 16)
_UNSIGNED, _SIGNED = ([FORMATS[f"{sign}int{bits}"] for bits in _SIZES] for sign in ("u", ""))
_FLOATS = [form for form in FORMATS.values() if type(form.element) is Float and form.scale is None]


def candidates(bound: Bound, missing: bool = False, offsets: bool = True) -> list[Format]:
    """Types from the narrowest on: integers, and for relative errors the floats of 8 bits before the integers of 8.

    Unsigned ones use every code. Where values may be ``missing``, signed ones do, but for the code of those. Where
    there are no ``offsets``, as in dialects, which may have either, both are tried.
    """
    integers = _SIGNED if missing else _UNSIGNED if offsets else [*_UNSIGNED, *_SIGNED]
    found = sorted([*(_FLOATS if bound.relative else ()), *integers], key=_bits)
    return [with_missing(f) for f in found if f.element.bits >= 8 or f in _SIGNED] if missing else found


def _bits(form: Format) -> int:
    return form.element.bits


def ways_of(form: Format, bound: Bound, offsets: bool = True) -> list[Way]:
    """Where the numbers of a type may lie: over the range of the values alone, or with 0 among them, exactly.

    An offset is what code 0 stands for: where that is what is missing, a zero point serves instead.
    """
    element = form.element
    offsets = offsets and element.missing != 0  # with an offset the lowest code is needed, and must not mean missing
    ways: list[Way] = []
    if bound.relative or not offsets:
        if element.signed or not offsets:
            ways.append({})
        if element.zero_points:
            ways.append({"scheme": "affine"})
    return [*ways, {"offset": "data"}] if offsets else ways


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
    worst = 0.0
    with np.errstate(all="ignore"):
        for box in over(boxes(q.shape, MOST_ELEMENTS, memory_order(array), codes._checked().block), q.size):
            values, part = part_of_array(array, box).astype(np.float64), part_of(codes, box)
            finite = np.isfinite(values)
            for dtype in dict.fromkeys((source.name, source.compute)):
                error = error_of(values, part.dequantize(dtype).astype(np.float64), relative=relative)
                error = np.where(np.isnan(error), math.inf, error)
                worst = max(worst, float(error.max(where=finite, initial=0.0)))
            if worst > enough:
                break
    return worst


def error_of(x: _Numbers, y: _Numbers, *, relative: bool) -> _Numbers:
    """The error of each of ``y``, which stands for ``x``, rounded up; both are float64."""
    return _relative(x, y) if relative else _absolute(x, y)


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
