"""Values that are missing: masks, fill values and NaN, on the way into an array of numbers.

Owns: how users say what is missing, and the array that says it by NaN; the warning of a fill value that nobody named.
Imports: the checks of arguments and parameters, the container, the registry.

Inside the library a value is missing where it is NaN and its format has a code for that (``ElementType.missing``). So
here masks and fill values become NaN; and NaN that nobody calls missing becomes infinite, which every format refuses.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from aqt_lite._arguments import as_float_array
from aqt_lite._dispatch import run
from aqt_lite._namespace import Array
from aqt_lite._near import one_of
from aqt_lite._parts import boxes
from aqt_lite._protocol import Backend
from aqt_lite._qparams import number_of_type
from aqt_lite._registry import backend_of, get_backend
from aqt_lite.qarray import QArray

__all__ = ["Marked", "SuspectValueWarning", "marked", "warn_of_fill_values"]

_SUSPECT = 1e15
"""How many times the median magnitude a value is that was hardly measured."""

_ALONE = 1e6
"""How many times the magnitude of every other value it is, too: what has a neighbour belongs to the data."""

_EXTREME = 1e9
"""Largest magnitude of an array up to which nobody looks for such values."""

_FEWEST = 100
"""Values of an array from which on one may stand apart."""

_SAMPLE = 1 << 16
"""Values that the median is taken of."""


_TOGETHER = 1 << 20
"""Elements of an array of NumPy up to which its missing values are marked in a copy."""


class SuspectValueWarning(UserWarning):
    """A value lies so far from all others that it may be a fill value, which stands for what is missing.

    Examples
    --------
    >>> import numpy as np, warnings, aqt_lite
    >>> kelvin = np.linspace(270, 305, 200, dtype="float32")
    >>> kelvin[7] = 1e20
    >>> with warnings.catch_warnings(record=True) as found:
    ...     warnings.simplefilter("always")
    ...     q = aqt_lite.quantize(kelvin)
    >>> found[0].category.__name__
    'SuspectValueWarning'
    >>> np.flatnonzero(aqt_lite.quantize(kelvin, fill_value=1e20).mask)
    array([7])
    """


def marked(x: Any, mask: Any, fill_value: Any, missing: str | None, *, tolerant: bool) -> tuple[Any, bool]:
    """``x`` with NaN where it is missing, and whether anybody said that it may be.

    ``tolerant``: NaN that nobody calls missing is missing, too, instead of infinite.
    """
    if missing is not None:
        one_of("missing", missing, ("nan",))
    if isinstance(x, np.ma.MaskedArray):
        if mask is not None:
            raise ValueError("mask is given, but x is a masked array, which has its own: give x.data with the mask")
        x, mask = np.asarray(x.data), np.ma.getmaskarray(x)
    if mask is None and fill_value is None and missing is None:
        return x, False
    x, b = as_float_array(x, "x")
    fills = _fills(fill_value, b.dtype_name(x))
    nan = missing is not None or tolerant or any(value != value for value in fills)
    mask = None if mask is None else _mask_of(mask, x, b)
    if nan and mask is None and not fills:
        return x, True
    if isinstance(x, np.ndarray) and x.size > _TOGETHER:
        return Marked(x, mask, fills, nan, b), True
    return run(b, _with_nan, x, mask, fills=fills, nan_is_missing=nan), True


class Marked:
    """A large array of NumPy as it is with NaN where values are missing: made part by part, for whom parts will do."""

    def __init__(
        self, x: np.ndarray[Any, Any], mask: Any, fills: tuple[float, ...], nan_is_missing: bool, b: Backend
    ) -> None:
        self.source = x
        self.shape, self.ndim, self.size, self.dtype = x.shape, x.ndim, x.size, x.dtype.newbyteorder("=")
        self.flags = np.empty(0).flags  # as those of the parts
        self._mask = None if mask is None else np.broadcast_to(mask, x.shape)
        self._how: dict[str, Any] = {"fills": fills, "nan_is_missing": nan_is_missing, "b": b}

    def __getitem__(self, at: Any) -> np.ndarray[Any, Any]:
        with np.errstate(all="ignore"):
            part: np.ndarray[Any, Any] = _with_nan(
                self.source[at], None if self._mask is None else self._mask[at], **self._how
            )
        return part

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        return self[...] if dtype is None else self[...].astype(dtype)


def _with_nan(x: Array, mask: Array | None, *, fills: tuple[float, ...], nan_is_missing: bool, b: Backend) -> Array:
    xp, name = b.xp, b.dtype_name(x)
    gone = [] if mask is None else [mask]
    gone += [x == b.constant(value, name, like=x) for value in fills]
    if not nan_is_missing:
        x = xp.where(xp.isnan(x), xp.full_like(x, float("inf")), x)
    for places in gone:
        x = xp.where(places, xp.full_like(x, float("nan")), x)
    return x


def _fills(fill_value: Any, dtype: str) -> tuple[float, ...]:
    """Fill values as numbers of the array's type, in which files have them."""
    values = () if fill_value is None else fill_value if isinstance(fill_value, list | tuple) else (fill_value,)
    return tuple(number_of_type("fill_value", value, dtype) for value in values)


def _mask_of(mask: Any, x: Array, b: Backend) -> Array:
    other = backend_of(mask)
    if other is None:
        mask, other = np.asarray(mask), get_backend("numpy")
    if other.dtype_name(mask) != "bool":
        raise TypeError(f"mask has dtype {other.dtype_name(mask)}: give bools, True where a value is missing")
    if other is not b and other.name != "numpy":
        raise TypeError(f"mask is a {other.name} array but x is {b.name}: give both from one library")
    if other is not b:
        mask = b.asarray(np.asarray(mask), like=x)
    shape, whole = tuple(mask.shape), tuple(x.shape)
    lead = len(whole) - len(shape)
    if lead < 0 or any(n not in (1, m) for n, m in zip(shape, whole[lead:], strict=True)):
        raise ValueError(f"mask has shape {shape}: it must be, or broadcast to, that of x, {whole}")
    return mask


# ---- values that nobody called missing


def warn_of_fill_values(x: Any, q: QArray | None, stacklevel: int) -> None:
    """Warn where one value of ``x`` is far from all others; ``q`` was calibrated from it, if that went well.

    The scales tell whether there can be one; only then, or where there are none, ``x`` is looked at.
    """
    if q is not None and not _is_extreme(q):
        return
    if not isinstance(x, Marked):
        array, own = as_float_array(x, "x")
        x = np.asarray(own.to_numpy(array)) if own.has_values(array) else None
    if x is not None:
        found = _suspect(x)
        if found is not None:
            warnings.warn(found, SuspectValueWarning, stacklevel=stacklevel)


def _is_extreme(q: QArray) -> bool:
    """Whether there are scales in which a fill value may be."""
    b = q._backend
    if q.scale is None or isinstance(q.scale, QArray) or not b.has_values(q.scale) or not q.size:
        return False
    element, scale = q._element, b.to_numpy(q.scale)
    return max(float(scale.max()), -float(scale.min())) * max(element.max, -element.min) >= _EXTREME


def _suspect(values: Any) -> str | None:
    """What to say of a value that is far from all others; part by part, for the array may be larger than memory."""
    with np.errstate(all="ignore"):
        count, largest = 0, 0.0
        for _, size in _magnitudes(values):
            count, largest = count + size.size, max(largest, size.max(initial=0))
        if count < _FEWEST:
            return None
        step, first = -(-count // _SAMPLE), 0
        sample, places = [], []
        rest = 0.0
        for part, size in _magnitudes(values):
            sample.append(size[first::step].astype(np.float64))
            first = (first - size.size) % step
            rest = max(rest, size[size != largest].max(initial=0))
            far = part[np.abs(part) == largest]
            places.append((far.size, far[:1], bool((far != far[:1]).any())))
        median = float(np.median(np.concatenate(sample)))
    if not (float(largest) > _SUSPECT * median and float(largest) > _ALONE * float(rest) and rest):
        return None
    kinds = np.concatenate([one for _, one, _ in places])
    if any(several for *_, several in places) or (kinds != kinds[0]).any():
        return None
    value, times, number = str(kinds[0]), float(largest) / median, sum(n for n, *_ in places)
    return (
        f"x has {number} values of {value}, {times:.0e} times the median magnitude, and the scale is "
        f"theirs: if that stands for what is missing, pass fill_value={value}"
    )


def _magnitudes(values: Any) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Parts of an array, and the magnitudes of their numbers that are neither 0 nor infinite."""
    for box in boxes(tuple(values.shape), _TOGETHER, range(values.ndim)) if values.size else ():
        part = np.asarray(values[tuple(slice(*ends) for ends in box)])
        size = np.abs(part).ravel()
        yield part, size[np.isfinite(size) & (size != 0)]
