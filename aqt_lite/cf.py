"""Packed data as the CF conventions have it: integers with ``scale_factor``, ``add_offset`` and ``_FillValue``.

Owns: the choice of a packing that keeps a bound, the arithmetic of the readers and writers that everybody has (xarray,
netCDF4), and the proof, element by element. Imports: walking through arrays (``_parts``), the container. It needs NumPy
alone; :mod:`aqt_lite.xarray` has it for labelled arrays.

A reader computes ``code * scale_factor + add_offset``, rounding twice, in float32 or float64, fused or not, as its
language has it. Here the step and the offset are so short that nothing is rounded: the step is ``m * 2^k`` with few
bits in ``m``, the offset a whole multiple of the step, so that every product and every sum fits the significand. All
readers then have the same bits, and zero is among the values wherever it lies in the range.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np

from aqt_lite._foreign import refusal
from aqt_lite._keywords import naming_the_argument
from aqt_lite._near import not_known
from aqt_lite._parts import boxes, memory_order
from aqt_lite._progress import over, over_tasks
from aqt_lite.qarray import QArray

__all__ = ["DTYPES", "Packing", "check_bound", "check_within", "choose_packing", "limits_of"]

DTYPES = ("int8", "uint8", "int16", "uint16", "int32")
"""Types of codes, the widest last. Files of netCDF before version 4 have no unsigned ones."""

_BY_ITSELF = ("int8", "int16", "int32")  # what "auto" tries, in this order
_MOST_ELEMENTS = 1 << 18
"""Elements looked at together: a few MB with all that is made of them."""

_Numbers = np.ndarray[Any, Any]
_R = TypeVar("_R")


@dataclass(frozen=True)
class Packing:
    """How an array is packed: ``value = code * scale_factor + add_offset``, and a code that means *missing*.

    Examples
    --------
    >>> import numpy as np
    >>> from aqt_lite import cf
    >>> packing = cf.choose_packing(np.asarray([273.15, 280.0, np.nan], "float32"), max_abs_err=0.05)
    >>> packing.dtype.name, packing.scale_factor, packing.add_offset
    ('int8', np.float32(0.099975586), np.float32(276.53247))
    >>> packing.unpack(packing.pack(np.asarray([280.0, np.nan], "float32")))
    array([280.03162,       nan], dtype=float32)
    """

    dtype: np.dtype[Any]
    """Of the codes."""
    scale_factor: Any
    """float32 or float64 of NumPy, in units of the data per code. The values that a reader makes are of this type."""
    add_offset: Any
    """The value of code 0, of the same type."""
    fill_value: Any
    """The code of NaN, which no number has."""

    @property
    def encoding(self) -> dict[str, Any]:
        """The four, by the names that CF gives them, as ``encoding=`` of xarray's ``to_netcdf`` and ``to_zarr``."""
        return {"dtype": self.dtype, **self.attributes}

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the variable in a file, beside the codes."""
        return {"scale_factor": self.scale_factor, "add_offset": self.add_offset, "_FillValue": self.fill_value}

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], dtype: Any) -> Packing:
        """What the attributes of a packed variable say; ``dtype`` is that of its codes.

        Raises
        ------
        ValueError
            Without a step, a ``_FillValue`` or floats of one type: what readers do then differs.

        Examples
        --------
        >>> import numpy as np
        >>> from aqt_lite import cf
        >>> said = {"scale_factor": np.float32(0.5), "add_offset": np.float32(10), "_FillValue": np.int8(-128)}
        >>> cf.Packing.from_attributes(said, "int8").unpack(np.asarray([3, -128], "int8"))
        array([11.5,  nan], dtype=float32)
        """
        names = ("scale_factor", "add_offset", "_FillValue")
        lacking = [name for name in names if name not in attributes]
        if lacking:
            raise ValueError(f"the variable has no {', '.join(lacking)}: it needs {', '.join(names)}")
        codes = _type_of_codes(dtype)
        scale, offset, fill = (np.asarray(attributes[name]).reshape(-1)[0] for name in names)
        if scale.dtype != offset.dtype or scale.dtype not in (np.float32, np.float64):
            raise ValueError(
                f"scale_factor is {scale.dtype} and add_offset {offset.dtype}: CF wants both float32, or both float64"
            )
        if fill != codes.type(fill):
            raise ValueError(f"_FillValue={fill!r} is no code of {codes}")
        return cls(codes, scale, offset, codes.type(fill))

    def pack(self, x: Any) -> _Numbers:
        """Codes of the float array ``x``, bit for bit those that xarray writes of it.

        Raises
        ------
        ValueError
            Infinities, and values beyond the codes.
        """
        x = _filled(x)
        _refuse_infinities(x, (0,) * x.ndim)
        codes = _rounded(x, self.scale_factor, self.add_offset, in_place=True)
        least, most = limits_of(self.dtype)
        outside = (codes < least) | (codes > most)
        if outside.any():
            first = _index(outside)
            raise ValueError(
                f"x has {int(outside.sum())} values of {x.size} beyond the codes of this packing, the first at index "
                f"{first}: {x[first]}; choose the packing from all that is to be packed"
            )
        return np.where(np.isnan(codes), self.fill_value, codes).astype(self.dtype)

    def unpack(self, codes: Any) -> _Numbers:
        """Values of ``codes``, in the type of ``scale_factor`` (float64 for codes of 32 bits), NaN where missing."""
        codes = np.asarray(codes)
        if codes.dtype != self.dtype:
            raise TypeError(f"codes have dtype {codes.dtype}, and the packing is of {self.dtype}")
        values = codes.astype(np.float64 if self.dtype.itemsize > 2 else self.scale_factor.dtype)
        missing = codes == self.fill_value
        values *= self.scale_factor
        values += self.add_offset
        values[missing] = np.nan
        return np.asarray(values)

    def to_qarray(self, codes: Any) -> QArray:
        """``codes`` as a :class:`aqt_lite.QArray`, whose values are those of :meth:`unpack`.

        Where values are missing, of a format that has a code for that, "int8_nan" or "int16_nan".

        Raises
        ------
        ValueError
            Codes of 32 bits; missing values of unsigned types, whose formats keep another code for them.

        Examples
        --------
        >>> import numpy as np
        >>> from aqt_lite import cf
        >>> x = np.asarray([273.15, 280.0, np.nan], "float32")
        >>> packing = cf.choose_packing(x, max_abs_err=0.05)
        >>> codes = packing.pack(x)
        >>> np.array_equal(packing.to_qarray(codes).dequantize(), packing.unpack(codes), equal_nan=True)
        True
        """
        codes, form = np.asarray(codes), self.dtype.name
        count = int((codes == self.fill_value).sum())
        if count and self.dtype.kind == "u":
            raise ValueError(
                f"{count} of {codes.size} values are missing, and {form} keeps code 0 for that: pack as a signed type"
            )
        return QArray.from_codes(
            codes,
            self.scale_factor,
            offset=self.add_offset,
            dtype=f"{form}_nan" if count else form,
            float_dtype=self.scale_factor.dtype.name,
        )


@naming_the_argument
def choose_packing(
    x: Any,
    *,
    max_abs_err: float,
    dtype: Any = "auto",
    powers_of_two: bool = False,
    value_range: tuple[float, float] | None = None,
) -> Packing:
    """The packing of an array that keeps every value within ``max_abs_err``, with the largest step that does.

    The bound is on what readers make of the codes, their rounding included, and is checked on every element: ``x`` is
    read twice, part by part, never whole.

    Parameters
    ----------
    x : array
        float32 or float64, of any shape: of NumPy, a memory map, a dataset of HDF5 or zarr, or an array of Dask, which
        is computed. NaN and masked elements are *missing*, and get the code ``_FillValue``.
    max_abs_err : float
        The largest error allowed, in units of ``x``.
    dtype : {"auto", "int8", "int16", "int32", "uint8", "uint16"}
        Of the codes. "auto": the smallest of int8, int16 and int32 that keeps the bound.
    powers_of_two : bool
        Take a step that is a power of two, whose reciprocal is exact, too.
    value_range : (float, float), optional
        The least and the greatest value that the packing is for, beside those of ``x``: other data in this range may be
        packed with it, within the same bound.

    Returns
    -------
    Packing
        With attributes of float32 where ``x`` is and float32 decodes exactly, else of float64.

    Raises
    ------
    ValueError
        Infinities; a bound that the type cannot keep, with the smallest that it can.
    TypeError
        ``x`` is no array of float32 or float64.

    Examples
    --------
    >>> import numpy as np
    >>> from aqt_lite import cf
    >>> x = np.linspace(0, 8, 1001, dtype="float32")
    >>> packing = cf.choose_packing(x, max_abs_err=0.01)
    >>> bool(abs(x.astype(float) - packing.unpack(packing.pack(x))).max() <= 0.01)
    True
    >>> cf.choose_packing(x, max_abs_err=0.01, dtype="int8")
    Traceback (most recent call last):
    ...
    ValueError: int8 cannot keep max_abs_err=0.01 over [0.0, 8.0]: the smallest is 0.0157486; or take a wider dtype
    """
    bound = check_bound(max_abs_err)
    source = _source_of(x)
    ranges = _each(x, _range)
    ends = _ends_of(value_range, source)
    low = min((*(r.low for r in ranges if r.low is not None), *ends.tolist()), default=0.0)
    high = max((*(r.high for r in ranges if r.high is not None), *ends.tolist()), default=0.0)
    found = _chosen(low, high, bound, dtype, source, 1 if powers_of_two else None)
    proof = partial(_broken, packing=found, bound=bound)
    for broken in (*_each(x, proof), proof(ends, (0,))):
        if broken is not None:
            raise ValueError(broken)
    return found


def check_bound(value: Any) -> float:
    """``max_abs_err`` as a float, which is positive and finite."""
    try:
        bound = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"max_abs_err={value!r}: give a number, in units of the data") from None
    if isinstance(value, bool) or not 0 < bound < math.inf:
        raise ValueError(f"max_abs_err={value!r}: give a positive, finite number, in units of the data")
    return bound


def _ends_of(value_range: Any, source: np.dtype[Any]) -> _Numbers:
    """The least and the greatest value in the type of the data; of None, no values."""
    if value_range is None:
        return np.zeros(0, source)
    try:
        least, greatest = map(float, value_range)
    except (TypeError, ValueError):
        raise TypeError(f"value_range={value_range!r}: give two numbers, the least and the greatest value") from None
    with np.errstate(over="ignore"):
        ends = np.asarray([least, greatest]).astype(source)
    if not (np.isfinite(ends).all() and least <= greatest):
        raise ValueError(f"value_range={value_range!r}: give the least and the greatest value, finite in {source}")
    return ends


# ---- the arithmetic of writers and readers


def _rounded(x: _Numbers, scale: Any, offset: Any, *, in_place: bool) -> _Numbers:
    """Codes before they become integers. xarray writes over float32 data, netCDF4 and Dask take the wider type."""
    with np.errstate(over="ignore", invalid="ignore"):
        v = np.subtract(x, offset)
        if in_place:
            v = v.astype(x.dtype)
        v = np.divide(v, scale)
        if in_place:
            v = v.astype(x.dtype)
        return np.asarray(np.rint(v))


def limits_of(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The least and the largest code of a number. The one beyond is that of missing values."""
    info = np.iinfo(dtype)
    return (int(info.min) + 1, int(info.max)) if info.min else (0, int(info.max) - 1)


def _fill_of(dtype: np.dtype[Any]) -> Any:
    info = np.iinfo(dtype)
    return dtype.type(info.min if info.min else info.max)


# ---- the choice


def _chosen(low: float, high: float, bound: float, dtype: Any, source: np.dtype[Any], most_bits: int | None) -> Packing:
    names = _BY_ITSELF if isinstance(dtype, str) and dtype == "auto" else (_type_of_codes(dtype).name,)
    for name in names:
        found = _fitted(low, high, bound, np.dtype(name), source, most_bits)
        if found is not None:
            return found
    least = _least_bound(low, high, bound, np.dtype(names[-1]), source, most_bits)
    ends = np.finfo(source)
    why = "small are the values" if max(abs(low), abs(high)) < float(ends.smallest_normal) else "wide is the range"
    way = f"the smallest is {least!r}" if least else f"it keeps none, so {why}"
    wider = "" if names[-1] == DTYPES[-1] else "; or take a wider dtype"
    raise ValueError(f"{names[-1]} cannot keep max_abs_err={bound!r} over [{low!r}, {high!r}]: {way}{wider}")


def _fitted(
    low: float, high: float, bound: float, dtype: np.dtype[Any], source: np.dtype[Any], most_bits: int | None
) -> Packing | None:
    """The packing with the largest step, of float32 attributes if those will do, or None."""
    narrow = source == np.float32 and dtype.itemsize <= 2  # readers decode codes of 32 bits in float64 in any case
    for kind in (np.float32, np.float64) if narrow else (np.float64,):
        found = _grid(low, high, bound, limits_of(dtype), source, np.dtype(kind), most_bits)
        if found is not None:
            return Packing(dtype, *found, _fill_of(dtype))
    return None


def _grid(
    low: float,
    high: float,
    bound: float,
    limits: tuple[int, int],
    source: np.dtype[Any],
    kind: np.dtype[Any],
    most_bits: int | None = None,
) -> tuple[Any, Any] | None:
    """A step ``m * 2^k`` and an offset of whole steps with which ``kind`` decodes every code within limits exactly.

    The writer's difference and quotient are each off by half a unit in the last place, so a value is no further from
    what its code stands for than ``step / 2 + 2 u |x - offset|``: decoding adds nothing. Of subnormal differences half
    a unit is half the smallest number.
    """
    least, most = limits
    first_value, last_value, error = Fraction(low), Fraction(high), Fraction(bound)
    reach = (last_value - first_value) / (2 if least < 0 else 1) + 2 * error
    of_source = np.finfo(source)
    half_unit = max(Fraction(float(of_source.eps)) * reach, Fraction(float(of_source.smallest_subnormal))) / 2
    slack = 2 * (error - 2 * half_unit * Fraction(1025, 1024))
    if slack <= 0:
        return None
    info = np.finfo(kind)
    for bits in range(most_bits or info.nmant + 1, 0, -1):
        exponent = _floor_log2(slack) - bits + 1
        significand = math.floor(slack / Fraction(2) ** exponent)
        step = significand * Fraction(2) ** exponent
        first, last = round(first_value / step), round(last_value / step)
        if (last_value - first_value) > step * (most - least):
            return None  # and fewer bits are a smaller step
        multiple = (first + last) // 2 if least < 0 else first
        largest = max(abs(first), abs(last), abs(multiple), last - first) + 2
        if significand * largest >= 1 << (info.nmant + 1) or exponent < info.minexp:
            continue
        if step * largest > Fraction(float(np.finfo(source if source.itemsize < kind.itemsize else kind).max)):
            return None
        for near in (multiple, multiple - 1, multiple + 1):  # where the ends fall on the other side of a tie
            scale, offset = kind.type(float(step)), kind.type(float(step * near))
            ends = np.asarray([low, high], source)
            codes = [_rounded(ends, scale, offset, in_place=how) for how in (True, False)]
            if all((c >= least).all() and (c <= most).all() for c in codes):
                return scale, offset
    return None


def _least_bound(
    low: float, high: float, bound: float, dtype: np.dtype[Any], source: np.dtype[Any], most_bits: int | None
) -> float | None:
    """The smallest bound that is kept, of six digits."""

    def kept(e: float) -> bool:
        return math.isfinite(e) and _fitted(low, high, e, dtype, source, most_bits) is not None

    above = max(high - low, abs(low), abs(high), 2 * bound, 4 * float(np.finfo(source).smallest_subnormal))
    if not kept(above):
        return None
    below, above = math.log2(bound), math.log2(above) + 1e-9
    for _ in range(40):
        middle = (below + above) / 2
        below, above = (below, middle) if kept(2.0**middle) else (middle, above)
    digits = 5 - math.floor(math.log10(2.0**above))
    for more in range(100):
        candidate = float(
            Fraction(math.ceil(Fraction(2.0**above) * Fraction(10) ** digits) + more) / Fraction(10) ** digits
        )
        if kept(candidate):
            return candidate
    return None


class Codes(NamedTuple):
    """Unsigned codes of a part of an array, of as few bits as its range asks for: ``value = code * step + offset``."""

    codes: _Numbers
    bits: int
    missing: bool
    """Whether the largest code of so many bits stands for NaN."""
    step: float
    offset: float


def codes_within(x: _Numbers, bound: float) -> Codes | None:
    """Codes that stand for every value of ``x`` within ``bound``; None where there are none of up to 32 bits.

    The values are exact in the type of ``x``, as those of a :class:`Packing` are.
    """
    x = x.astype(_source_of(x), copy=False)
    if np.isinf(x).any():
        return None
    missing = np.isnan(x)
    low, high = _range(x, (0,) * x.ndim)
    wide = np.dtype(np.float64)  # in which the codes are computed; the values are exact in the type of x
    grid = _grid(low or 0.0, high or 0.0, bound, (0, (1 << 32) - 2), wide, x.dtype)
    if grid is None:
        return None
    step, offset = grid
    rounded = np.where(missing, 0.0, _rounded(x.astype(wide), step, offset, in_place=False))
    values = (rounded * float(step) + float(offset)).astype(x.dtype)
    if _difference_beyond(np.where(missing, 0, x), np.where(missing, 0, values), bound, (0,) * x.ndim) is not None:
        return None
    bits = (int(rounded.max(initial=0)) + bool(missing.any())).bit_length()
    fill = (1 << bits) - 1
    return Codes(
        np.where(missing, fill, rounded).astype(np.uint32), bits, bool(missing.any()), float(step), float(offset)
    )


def _floor_log2(value: Fraction) -> int:
    """The exponent of the largest power of two that is not above a positive number."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


# ---- looking at every element


class _Range(NamedTuple):
    low: float | None
    high: float | None


def _range(x: _Numbers, start: tuple[int, ...]) -> _Range:
    """The least and the largest number; None where all are missing. Infinities are refused."""
    if not x.size:
        return _Range(None, None)
    low, high = np.fmin.reduce(x, axis=None), np.fmax.reduce(x, axis=None)
    if np.isinf(low) or np.isinf(high):
        _refuse_infinities(x, start)
    return _Range(None, None) if np.isnan(low) else _Range(float(low), float(high))


def _broken(x: _Numbers, start: tuple[int, ...], packing: Packing, bound: float) -> str | None:
    """What is wrong where one element, written and read again, is further away than ``bound``."""
    least, most = limits_of(packing.dtype)
    missing = np.isnan(x)
    for in_place in (True, False):
        codes = np.where(missing, 0, _rounded(x, packing.scale_factor, packing.add_offset, in_place=in_place))
        inside = np.clip(codes, least, most)  # a value beyond the codes is clipped, and found by the check of the bound
        written = np.where(missing, packing.fill_value, inside).astype(packing.dtype)
        broken = _difference_beyond(x, packing.unpack(written), bound, start)
        if broken is not None:
            return f"{broken}. Did x change while it was read?"
    return None


def _difference_beyond(x: _Numbers, read: _Numbers, bound: float, start: tuple[int, ...]) -> str | None:
    """What is wrong where a value of ``read`` is further than ``bound`` from that of ``x``, or missing unlike it.

    ``start`` is the index that the first element has in the whole array.
    """
    wide, values = x.astype(np.float64), read.astype(np.float64)
    far = _further(wide, values, bound) | (np.isnan(wide) != np.isnan(values))
    if not far.any():
        return None
    at = _index(far)
    place = tuple(i + j for i, j in zip(at, start, strict=True))
    return (
        f"{int(far.sum())} values of {far.size} are further than {bound!r} from what is read again, the first at index "
        f"{place}: {float(wide[at])!r} becomes {float(values[at])!r}"
    )


def _further(a: _Numbers, b: _Numbers, bound: float) -> _Numbers:
    """Where ``|a - b| > bound``, exactly: of a rounded difference that is equal to the bound, what it lost decides."""
    with np.errstate(invalid="ignore"):
        difference = np.asarray(a - b)  # of arrays without axes NumPy makes scalars, which cannot be written to
        size = np.abs(difference)
        far, even = np.asarray(size > bound), np.asarray(size == bound)
    if even.any():
        p, q, d = a[even], -b[even], difference[even]
        around = d - p  # what follows is the difference's rounding error (Knuth's two-sum)
        lost = (p - (d - around)) + (q - around)
        far[even] = lost * np.sign(d) > 0
    return far


def _refuse_infinities(x: _Numbers, start: tuple[int, ...]) -> None:
    infinite = np.isinf(x)
    if infinite.any():
        place = tuple(i + j for i, j in zip(_index(infinite), start, strict=True))
        raise ValueError(
            f"x has {int(infinite.sum())} infinite values, the first at index {place}: a packed file has no code for "
            "them; mend them, or make them NaN"
        )


def _index(mask: _Numbers) -> tuple[int, ...]:
    """Of the first element that is true."""
    return tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))


def _each(x: Any, look: Callable[[_Numbers, tuple[int, ...]], _R]) -> list[_R]:
    """What ``look`` says of each part of ``x`` and the index of its first element; Dask's chunks where they are."""
    return _each_chunk(x, look) if hasattr(x, "__dask_graph__") else _each_part(x, look, (0,) * x.ndim)


def _each_part(x: Any, look: Callable[[_Numbers, tuple[int, ...]], _R], start: tuple[int, ...]) -> list[_R]:
    shape = tuple(x.shape)
    if 0 in shape:
        return []
    found = []
    stored = getattr(x, "chunks", None)  # of HDF5 and zarr: each is read once
    for box in over(boxes(shape, _MOST_ELEMENTS, memory_order(x), stored), math.prod(shape)):
        part = x[tuple(slice(*limits) for limits in box)]
        found.append(look(_filled(part), tuple(s + first for s, (first, _) in zip(start, box, strict=True))))
    return found


def _each_chunk(x: Any, look: Callable[[_Numbers, tuple[int, ...]], _R]) -> list[_R]:
    dask: Any = importlib.import_module("dask")
    if any(n != n for n in x.shape):
        raise TypeError(f"x has chunks of unknown size (shape {tuple(x.shape)}): call x.compute_chunk_sizes() first")
    starts = [np.cumsum((0, *sizes[:-1])) for sizes in x.chunks]
    chunks = x.to_delayed()
    tasks = [
        dask.delayed(_each_part)(chunks[index], look, tuple(int(s[i]) for s, i in zip(starts, index, strict=True)))
        for index in np.ndindex(chunks.shape)
    ]
    with over_tasks(tasks):
        return [result for results in dask.compute(*tasks) for result in results]


def check_within(x: _Numbers, read: _Numbers, bound: float, start: tuple[int, ...] = ()) -> None:
    """ValueError where a value of ``read`` is further than ``bound`` from that of ``x``, or missing unlike it.

    ``start`` is the index of the first element in an array of which these are a part. It takes little memory beside.
    """

    def look(part: _Numbers, first: tuple[int, ...]) -> str | None:
        there = read[tuple(slice(i, i + n) for i, n in zip(first, part.shape, strict=True))]
        return _difference_beyond(part, there, bound, tuple(map(sum, zip(start or (0,) * x.ndim, first, strict=True))))

    for broken in _each_part(x, look, (0,) * x.ndim):
        if broken is not None:
            raise ValueError(broken)


def _filled(x: Any) -> _Numbers:
    """An array of NumPy, NaN where it is masked."""
    _source_of(x)
    return np.ma.filled(x, np.nan) if isinstance(x, np.ma.MaskedArray) else np.asarray(x)


def _source_of(x: Any) -> np.dtype[Any]:
    """The type of a float array, in the machine's byte order."""
    dtype = getattr(x, "dtype", None)
    if not hasattr(x, "chunks"):  # which arrays on disks and of Dask have: they are read here, part by part
        why = refusal(x, "x")
        if why is not None:
            raise TypeError(why)
    if not isinstance(dtype, np.dtype) or dtype.name not in ("float32", "float64"):
        what = f"x has dtype {dtype}" if isinstance(dtype, np.dtype) else f"x is a {type(x).__name__}"
        raise TypeError(
            f"{what}: arrays of NumPy of float32 or float64 are packed; convert it, to float32 for instance"
        )
    found: np.dtype[Any] = np.dtype(dtype.name)
    return found


def _type_of_codes(dtype: Any) -> np.dtype[Any]:
    try:
        name = np.dtype(dtype).name
    except TypeError:
        name = None
    if name not in DTYPES:
        raise ValueError(not_known("dtype", dtype, ("auto", *DTYPES)))
    found: np.dtype[Any] = np.dtype(name)
    return found
