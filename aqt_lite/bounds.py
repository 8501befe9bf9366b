"""Bounds that hold: the type that keeps every value within an error, and the proof.

Owns: what a bound is, which types are tried for it, and errors that no rounding understates. Imports: the container,
formats, parts of arrays. Everything is measured on NumPy, on the result itself, and nothing is estimated.

How to quantize is an argument: this module tries, measures, and says what was kept. What is tried is an ``Attempt``: an
array with its codes (``Held``), one whose codes will be computed (``Later``), or what a caller makes of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from aqt_lite._dispatch import run
from aqt_lite._into import can_write, look_at_codes
from aqt_lite._log import announce
from aqt_lite._namespace import Array
from aqt_lite._parts import boxes, memory_order, part_of, part_of_array
from aqt_lite._progress import over
from aqt_lite._protocol import Backend
from aqt_lite._registry import backend_of
from aqt_lite.elements import Float, float_type
from aqt_lite.formats import FAMILIES, FORMATS, Format, family_of, format_of, with_missing
from aqt_lite.qarray import QArray

__all__ = ["AUTO", "Attempt", "Bound", "Held", "Largest", "Later", "bound_of", "largest_error", "quantize_within"]

AUTO = "auto"
"""The dtype that stands for the narrowest type that keeps a bound."""

MOST_ELEMENTS = 1 << 16
"""Elements looked at together: what is made of them stays in a core's cache."""

_PIECE = 1 << 14
"""Elements of float64 that are worked on together: four times as many take four times as long an element."""

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
        raise ValueError(
            f"max_abs_err={max_abs_err!r} and max_rel_err={max_rel_err!r} are both given, which some read as both and "
            "others as the wider of the two: give one; where both are meant, the one that the values make the tighter"
        )
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


# ---- what is tried


class Attempt(Protocol):
    """A way of quantizing that is measured before anybody has it."""

    @property
    def dtype(self) -> str:
        """Name of the format."""

    def error(self, enough: float) -> float:
        """The largest error, as ``largest_error`` has it: where there is one above ``enough``, any of those."""

    def take(self) -> QArray:
        """The array."""


@dataclass(frozen=True)
class Held:
    """An array whose codes are in memory."""

    x: Array
    q: QArray
    b: Backend
    relative: bool

    @property
    def dtype(self) -> str:
        """Name of the format."""
        return self.q.dtype

    def error(self, enough: float) -> float:
        """Of the codes as they are."""
        return largest_error(self.x, self.q, self.b, relative=self.relative, enough=enough)

    def take(self) -> QArray:
        """The array itself."""
        return self.q


class Later:
    """An array whose codes are computed when somebody asks: they are checked then, chunk by chunk."""

    def __init__(self, x: Array, q: QArray, b: Backend, bound: Bound) -> None:
        self._x, self._q, self._b, self._bound = x, q, b, bound
        self._known: float | None = None

    @property
    def dtype(self) -> str:
        """Name of the format."""
        return self._q.dtype

    def error(self, enough: float) -> float:
        """Of all chunks, which are computed if nobody has measured them yet."""
        if self._known is None:
            self.measure([self], self._b)
        assert self._known is not None
        return self._known

    def take(self) -> QArray:
        """The array, whose chunks raise an error when they are computed and do not keep the bound."""
        q = self._q.unpacked()
        check = partial(_check_chunk, dtype=q.dtype, bound=self._bound)
        return replace(q, storage=self._b.check_when_computed(q.storage, check, self._x, *_read(q))).packed()

    @staticmethod
    def measure(attempts: list[Later], b: Backend) -> None:
        """Compute the errors of all, in one go over the array."""
        look = [partial(_error_of_chunk, relative=a._bound.relative) for a in attempts]
        errors = [
            b.largest_of_chunks(f, a._x, *_read(a._q)) if a._q.size else None
            for f, a in zip(look, attempts, strict=True)
        ]
        for attempt, error in zip(attempts, b.computed(*errors), strict=True):
            attempt._known = 0.0 if error is None else float(b.to_numpy(error))


def _error_of_chunk(x: _Numbers, *read: _Numbers, relative: bool) -> float:
    boxes_of = boxes(x.shape, MOST_ELEMENTS, memory_order(x)) if x.size else ()
    return max((error_of_part(*(part_of_array(a, box) for a in (x, *read)), relative=relative) for box in boxes_of),
               default=0.0)  # fmt: skip


def _check_chunk(
    codes: _Numbers, start: tuple[int, ...], x: _Numbers, *read: _Numbers, dtype: str, bound: Bound
) -> None:
    error = _error_of_chunk(x, *read, relative=bound.relative)
    if error > bound.value:
        raise ValueError(
            f"{dtype} cannot keep {bound}: in the chunk at {start} an error is {error!r}; use a wider dtype, smaller "
            f"blocks (granularity=), or dtype={AUTO!r}, which computes the array to find the narrowest"
        )


# ---- which type


Way = dict[str, Any]
"""Arguments of ``quantize`` that say where the numbers of a type lie."""


Make = Callable[[Format, Way], Attempt]
"""Tries a format, in a way."""


def quantize_within(
    dtype: Any,
    bound: Bound,
    asked: Way,
    make: Make,
    *,
    missing: bool = False,
    offsets: bool = True,
    fits: Callable[[Format], bool] | None = None,
    later: Backend | None = None,
) -> QArray:
    """What ``make`` gives of ``dtype``, or of the narrowest type, so that every finite value keeps the bound.

    (Of all types, or of a family.)

    ``asked`` is the way that the caller insists on; empty where any will do. ``missing``: whether values may miss;
    ``offsets``: whether the dialect has offsets; ``fits``: which of the types that nobody asked for will do. A way that
    ``make`` refuses is passed by. ValueError, with what can be kept, where the bound cannot; that of ``make`` where it
    refuses all. ``later``: the backend of attempts whose codes are computed later. A single one is taken as it is, and
    errors of several are computed together.
    """
    auto = isinstance(dtype, str) and (dtype == AUTO or dtype in FAMILIES)
    asked_for = None if auto else format_of(dtype)
    finder = (dtype if asked_for is None else family_of(asked_for)) or AUTO
    if asked_for is not None:
        missing = missing or asked_for.element.missing is not None
        asked_for = with_missing(asked_for) if missing else asked_for
    family = FAMILIES.get(finder, ())
    known = [with_missing(f) if missing else f for f in family if fits is None or fits(f)]
    if not family:
        known = candidates(bound, missing, offsets, fits)
    tried = known if asked_for is None else [asked_for]
    if not tried:
        names = ", ".join(form.name for form in family or candidates(bound, missing, offsets))
        raise ValueError(
            f"out is an array for codes of none of {names}, which dtype={dtype!r} tries: give one for those"
        )
    refusals: list[ValueError] = []

    def ways(form: Format) -> list[Way]:
        return [asked] if asked else ways_of(form, bound, offsets)

    def made(forms: Iterable[Format]) -> Iterator[Attempt]:
        for form in forms:
            for way in ways(form):
                try:
                    attempt = make(form, way)
                except ValueError as error:
                    refusals.append(error)
                else:
                    yield attempt

    def measured(forms: Iterable[Format]) -> Iterable[Attempt]:
        if later is None:
            return made(forms)
        attempts = list(made(forms))
        Later.measure(attempts, later)  # type: ignore[arg-type]  # what make gives then
        return attempts

    def kept(attempts: Iterable[Attempt]) -> Attempt | None:
        return next((a for a in attempts if a.error(bound.value) <= bound.value), None)

    count = sum(len(ways(form)) for form in tried)
    if later is not None and count == 1:
        found = next(made(tried), None)
    else:
        attempts = measured(tried)
        found = kept(attempts)
    if found is not None:
        q = found.take()
        announce(f"{bound}: {q.dtype} {'is to keep' if later is not None else 'keeps'} it, in {q.nbytes} bytes")
        return q
    if len(refusals) == count:
        raise _refusal(refusals, tried, dtype)
    least: dict[str, float] = {}
    for attempt in made(tried) if later is None else attempts:
        least[attempt.dtype] = min(attempt.error(math.inf), least.get(attempt.dtype, math.inf))
    best, reached = min(least.items(), key=lambda pair: pair[1])
    words = f"keeps {bound.argument}={reached!r} here"
    if math.isinf(reached):
        words = "keeps no bound at all, since 0 does not stay 0, or a value does not stay finite"
    smaller = "use smaller blocks (granularity=), or keep x as it is"
    if bound.relative and not family:  # floats, whose errors are relative by themselves
        smaller = f"use dtype={next(iter(FAMILIES))!r}, {smaller.removeprefix('use ')}"
    if auto:
        raise ValueError(f"none of {', '.join(least)} can keep {bound}: {best} {words}; {smaller}")
    wider = (f for f in known if f.element.bits >= tried[0].element.bits and f.name != tried[0].name)
    better = kept(measured(wider))
    way = smaller if better is None else f"dtype={better.dtype!r} does, and dtype={finder!r} finds the narrowest"
    raise ValueError(f"{best} cannot keep {bound}: it {words}; {way}")


def _refusal(refusals: list[ValueError], tried: list[Format], dtype: Any) -> ValueError:
    """What to raise where no way serves: what all say, or, of several types, what is said of the widest."""
    if len(tried) == 1 or len(set(map(str, refusals))) == 1:
        return refusals[0]
    if dtype in FAMILIES:
        return refusals[-1]
    names = ", ".join(form.name for form in tried)
    return ValueError(f"dtype={dtype!r}: none of {names} can be had as asked; of {tried[-1].name}: {refusals[-1]}")


_SIZES = (2, 3, 4, 5, 6, 7, 8, 16)
_UNSIGNED, _SIGNED = ([FORMATS[f"{sign}int{bits}"] for bits in _SIZES] for sign in ("u", ""))
_FLOATS = [form for form in FORMATS.values() if type(form.element) is Float and form.scale is None]


def candidates(
    bound: Bound, missing: bool = False, offsets: bool = True, fits: Callable[[Format], bool] | None = None
) -> list[Format]:
    """Types from the narrowest on: integers, and for relative errors the floats of 8 bits before the integers of 8.

    Unsigned ones use every code. Where values may be ``missing``, signed ones do, but for the code of those. Where
    there are no ``offsets``, as in dialects, which may have either, both are tried; where not all ``fits``, too.
    """
    integers = _SIGNED if missing else _UNSIGNED if offsets and fits is None else [*_UNSIGNED, *_SIGNED]
    found = sorted([*(_FLOATS if bound.relative else ()), *integers], key=_bits)
    found = [f for f in found if fits is None or fits(f)]
    return [with_missing(f) for f in found if f.element.bits >= 8 or f in _SIGNED] if missing else found


def _bits(form: Format) -> int:
    return form.element.bits


def ways_of(form: Format, bound: Bound, offsets: bool = True) -> list[Way]:
    """Where the numbers of a type may lie: over the range of the values alone, or with 0 among them, exactly.

    An offset is what code 0 stands for: where that is what is missing, a zero point serves instead.
    """
    element = form.element
    if not form.scaled:
        return [{}]
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
    array = x if backend_of(x) is None else b.to_numpy(x)  # what is no array makes its parts itself
    largest = Largest(relative, enough)
    if can_write(b) and q.size > MOST_ELEMENTS and memory_order(array) == list(range(q.ndim)) and not q.transposed:
        parts = q._checked()
        static = {"spec": parts._spec, "packed": q.packed_length is not None}
        run(b, look_at_codes, array, q.storage, parts._qparams(), largest, **static)
        return largest.error
    codes = q.to_backend("numpy").unpacked()
    for box in over(boxes(q.shape, MOST_ELEMENTS, memory_order(array), codes._checked().block), q.size):
        if not largest(part_of_array(array, box), *_read(part_of(codes, box))):
            break
    return largest.error


class Largest:
    """The largest error of parts that are looked at one after the other, or by several threads."""

    def __init__(self, relative: bool, enough: float = math.inf) -> None:
        self._relative, self._enough = relative, enough
        self._found: list[float] = [0.0]

    def __call__(self, x: _Numbers, *read: _Numbers) -> bool:
        """Whether nothing above ``enough`` was seen, and it is worth going on."""
        error = error_of_part(x, *read, relative=self._relative)
        self._found.append(error)  # atomic
        return error <= self._enough

    @property
    def error(self) -> float:
        """Of all that were seen."""
        return max(self._found)


def _read(q: QArray) -> list[Array]:
    """Values of ``q`` in its own type, and in the wider one of the arithmetic if that is another."""
    source = float_type(q.float_dtype)
    return [q.dequantize(dtype) for dtype in dict.fromkeys((source.name, source.compute))]


def error_of_part(x: _Numbers, *read: _Numbers, relative: bool) -> float:
    """The largest error of the values of ``x`` that are finite, in any of ``read``.

    Rounded errors are taken first, for they are fast. Only the largest of those can be the largest error.
    """
    flat, *others = (np.asarray(a).reshape(-1) for a in (x, *read))
    found = [0.0]
    for start in range(0, flat.size, _PIECE):
        values = flat[start : start + _PIECE].astype(np.float64)
        found += [_error_of(values, y[start : start + _PIECE].astype(np.float64), relative) for y in others]
    return max(found)


def _error_of(x: _Numbers, y: _Numbers, relative: bool) -> float:
    with np.errstate(all="ignore"):
        size = np.asarray(np.abs(x - y))
        if relative:
            np.divide(size, np.abs(x), out=size, where=size != 0)
        largest = float(size.max(initial=0.0))
        if not math.isfinite(largest):
            np.copyto(size, 0, where=~np.isfinite(x))
            largest = float(size.max())
            if not math.isfinite(largest):
                return math.inf
        here = (size == largest) & np.isfinite(x) if not largest else size == largest
        return float(error_of(x[here], y[here], relative=relative).max(initial=0.0))


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
