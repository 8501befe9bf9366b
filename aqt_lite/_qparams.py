"""Scales, zero points and offsets that users give: made into arrays on the grid of blocks, or refused.

Owns: those conversions and the checks of values. Imports: affine (for what a format can use), the registry,
granularity.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aqt_lite._foreign import refusal
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import backend_of, get_backend
from aqt_lite.affine import Spec
from aqt_lite.elements import FLOAT_TYPES, INTEGER_TYPES, ElementType
from aqt_lite.formats import Format
from aqt_lite.granularity import Granularity, PerChannel, grid_of

__all__ = [
    "check_codes",
    "check_offset",
    "check_scale",
    "check_without_scale",
    "check_zero_point",
    "every_pattern_is_a_code",
    "number_of_type",
    "on_grid",
    "unusable_codes",
]


def check_scale(scale: Any, spec: Spec, least: float, *, signed: bool = False) -> None:
    """ValueError where a scale is none that ``quantize`` could have chosen: ``least`` is the least of those.

    ``signed``: whether it may be negative, as some libraries' are.
    """
    greatest = spec.greatest
    if _is_number(scale) and (
        least <= (abs(scale) if signed else scale) <= greatest or (scale == 0 and spec.zero_scale == 0)
    ):
        return
    kind = "finite and not 0, its magnitude" if signed else "positive and finite,"
    expected = f"{kind} between {least:.3g} and {greatest:.3g} for {spec.source.name} values"
    wide = _real("scale", scale)
    size = np.abs(wide) if signed else wide
    bad = ~((size >= least) & (size <= greatest))
    if spec.zero_scale == 0:
        bad &= wide != 0
    if not bad.any():
        return
    first, count = wide[bad].flat[0], f" ({int(bad.sum())} of {bad.size} are not)" if wide.ndim else ""
    shown = scale if isinstance(scale, int | float) else first
    way = ""
    if first == 0:
        way = "; for a block of zeros give scale 1 and the code of zero"
    elif first < 0 and not signed:
        way = "; a negative scale is a positive one with every code negated"
    which = "it" if not wide.ndim else "every scale"
    raise ValueError(f"scale={shown}: {which} must be {expected}{count}{way}")


def check_offset(offset: Any, spec: Spec) -> None:
    """ValueError where an offset is not finite."""
    if _is_number(offset) and abs(offset) <= spec.source.max:
        return
    wide = _real("offset", offset)
    bad = ~(np.abs(wide) <= spec.source.max)
    if bad.any():
        raise ValueError(f"offset={wide[bad].flat[0]}: every offset must be finite, within {spec.source.name}")


_WHOLE = (
    "it must be an integer, the code of 0.0: where all are whole, .astype('int32') of them; a real one is "
    "offset=-zero_point * scale"
)


def check_zero_point(zero_point: Any, spec: Spec) -> None:
    """ValueError where a zero point is no code."""
    low, high = spec.element.zero_codes
    codes = f"a code of {spec.element.name}, {low} to {high}"
    if not spec.element.zero_points:
        raise ValueError(
            f"zero_point is given, but {spec.element.name} has none: its codes are no evenly spaced integers"
        )
    if isinstance(zero_point, int) and _is_number(zero_point) and low <= zero_point <= high:
        return
    if isinstance(zero_point, float):
        raise TypeError(f"zero_point={zero_point} is a float: {_WHOLE}")
    values = np.asarray(zero_point)
    if values.dtype.name not in INTEGER_TYPES:
        raise TypeError(f"zero_point has dtype {values.dtype.name}: {_WHOLE}")
    bad = (values < low) | (values > high)
    if bad.any():
        raise ValueError(f"zero_point={values[bad].flat[0]}: must be {codes}")


def number_of_type(argument: str, value: Any, dtype: str) -> float:
    """A number as an array of float type ``dtype`` holds it: rounded; TypeError or ValueError where it cannot."""
    if isinstance(value, bool | np.bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{argument} is a {type(value).__name__}: give a number")
    wide, source = float(value), FLOAT_TYPES[dtype]
    with np.errstate(over="ignore"):
        narrow = float(np.asarray(wide).astype(get_backend("numpy").dtype(dtype)))
    if math.isinf(narrow) and not math.isinf(wide):
        raise ValueError(f"{argument}={value} is beyond {dtype}, whose largest number is {source.max:.6g}")
    return narrow


def every_pattern_is_a_code(element: ElementType, *, packed: bool) -> bool:
    """Whether whatever bits an array holds, each code stands for a finite number."""
    if packed:
        signed, bits = not element.storage.startswith("u"), element.bits
        low = -(1 << (bits - 1)) if signed else 0
        most = low + (1 << bits) - 1
    else:
        limits = np.iinfo(element.storage)
        low, most = int(limits.min), int(limits.max)
    return element.codes == (low, most) and element.bits <= _MOST_LISTED and not _no_number(element).any()


_MOST_LISTED = 16
"""Bits of codes up to which there is a table of them all. Wider ones are floats, of which some are NaN."""


def unusable_codes(codes: np.ndarray[Any, Any], element: ElementType) -> np.ndarray[Any, Any]:
    """Where a code, in NumPy's memory, stands for no finite number."""
    low, high = element.codes
    bad: np.ndarray[Any, Any] = (codes < low) | (codes > high)
    if element.bits > _MOST_LISTED:
        none: np.ndarray[Any, Any] = bad | _stand_for_nothing(codes, element)
        return none
    table = _no_number(element)
    if table.any() and not bad.any():
        bad = table[codes.astype(np.intp) - low]
    return bad


def check_without_scale(form: Format, source: str, said: Mapping[str, Any]) -> None:
    """ValueError where something is said of scales, or where values are of a type that the numbers are not for."""
    words = form.element.refusal(source)
    if words is not None:
        raise ValueError(words)
    for name, value in said.items():
        if value is not None:
            raise ValueError(f"{name} is given, but numbers of {form.name} are floats without a scale: leave it out")


@functools.lru_cache(maxsize=256)
def _no_number(element: ElementType) -> np.ndarray[Any, Any]:
    """For each code from the smallest on, whether it stands for no finite number, nor for one that is missing."""
    low, high = element.codes
    return _stand_for_nothing(np.arange(low, high + 1).astype(element.storage), element)


def _stand_for_nothing(codes: np.ndarray[Any, Any], element: ElementType) -> np.ndarray[Any, Any]:
    with np.errstate(all="ignore"):
        numbers = element.decode(codes, get_backend("numpy"), "float64")
    known = np.isfinite(np.asarray(numbers, dtype=np.float64))
    return ~known if element.missing is None else ~(known | (codes == element.missing))


def check_codes(codes: np.ndarray[Any, Any], spec: Spec) -> None:
    """ValueError where a code stands for no finite number of the format."""
    low, high = spec.element.codes
    bad = unusable_codes(codes, spec.element)
    if bad.any():
        first = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), bad.shape))
        what = f"codes of {spec.format.name} are {low} to {high}"
        if low <= codes[first] <= high:
            what = f"{spec.format.name} has no finite number of that code"
        raise ValueError(f"qvalue has {int(bad.sum())} unusable codes, the first at {first}: {codes[first]}; {what}")


def _is_number(value: Any) -> bool:
    """Numbers that are in order are let through without NumPy, which compilers that trace cannot follow."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _real(argument: str, value: Any) -> np.ndarray[Any, Any]:
    values = np.asarray(value)
    if values.dtype.name not in (*FLOAT_TYPES, *INTEGER_TYPES):
        raise TypeError(f"{argument} has dtype {values.dtype.name}: give real numbers")
    return values.astype(np.float64)


def on_grid(
    argument: str,
    value: Any,
    x: Array,
    name_of_x: str,
    shape: tuple[int, ...],
    granularity: Granularity,
    spec: Spec,
    b: Backend,
    dtype: str,
    check: Callable[[Any], None],
    *,
    exact: bool = False,
) -> Array:
    """A given scale, zero point or offset as an array of the grid's shape and of ``dtype``, on the device of ``x``.

    ``exact``: an array of a wider type must convert without losing a bit. (Numbers and lists are rounded: they are
    text.)
    """
    plain = isinstance(value, int | float | list | tuple) and not isinstance(value, bool | np.generic)
    other = None if plain else backend_of(value)
    if plain and isinstance(value, int | float):
        check(value)
        value = b.constant(value, dtype, like=x)
    elif plain or isinstance(value, np.generic):  # numbers and lists belong to no backend
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"{argument} is a list that is no array: {error}") from None
        check(value)
        value = b.asarray(value.astype(dtype), like=x)
    elif other is None:
        raise TypeError(
            refusal(value, argument) or f"{argument} is a {type(value).__name__}: give a number or an array"
        )
    elif other is not b:
        raise TypeError(f"{argument} is a {other.name} array but {name_of_x} is {b.name}: give both from one backend")
    elif not b.share_a_device(value, x):
        raise ValueError(
            f"{argument} is on device {b.device(value)} but {name_of_x} on {b.device(x)}: move one of them"
        )
    elif b.has_values(value):
        given = b.to_numpy(value)
        check(given)
        if exact and given.dtype.name != dtype and not np.array_equal(given.astype(dtype).astype(given.dtype), given):
            raise ValueError(
                f"{argument} has dtype {given.dtype.name}, and {dtype}, in which it is kept, cannot hold every value: "
                f"round it first, with astype"
            )
    elif b.dtype_name(value) not in (FLOAT_TYPES if dtype != "int32" else INTEGER_TYPES):
        raise TypeError(f"{argument} has dtype {b.dtype_name(value)}: it must convert to {dtype}")
    elif b.is_deferred(value):
        value = b.check_when_computed(value, lambda values, start: check(values))
    value = b.xp.astype(value, b.dtype(dtype))

    grid = grid_of(shape, spec.block)
    if isinstance(granularity, PerChannel) and tuple(value.shape) == (shape[granularity.axis],):
        value = b.xp.reshape(value, grid)
    if value.ndim == 0:
        value = b.xp.broadcast_to(value, grid)
    if tuple(value.shape) != grid:
        raise ValueError(
            f"{argument} has shape {tuple(value.shape)}: {granularity} of an array of shape {shape} needs {grid} "
            f"or a single number"
        )
    return value
