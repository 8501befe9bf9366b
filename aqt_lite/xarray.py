"""xarray: quantized variables with their labels, and packing that keeps a bound, for ``to_netcdf`` and ``to_zarr``.

Owns: labelled arrays in and out: the accessor ``.aqt``, and what a Dataset of codes says of them. Imports: xarray; the
public functions, the CF arithmetic (``cf``), the container's words. Import it as ``import aqt_lite.xarray``;
``import aqt_lite`` alone imports no xarray.

A quantized variable is a few variables of a Dataset, so that everything xarray does with Datasets works on it: the
codes, under the name of the variable; the scales, zero points or offsets beside them, along the same dimensions where
there is one for each index, along dimensions of their own elsewhere; and an attribute that says what the codes mean,
and the attributes of the values, units for instance, which are not those of codes. xarray's own ``to_netcdf`` and
``to_zarr`` store such a Dataset as it is.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Hashable, Iterable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from aqt_lite import __version__, api, cf, significant
from aqt_lite._callers import warn
from aqt_lite._document import unique
from aqt_lite._extras import installed_by
from aqt_lite._keywords import naming_the_argument
from aqt_lite.granularity import Granularity, PerBlock
from aqt_lite.qarray import QArray, described, rebuilt

with installed_by("pip install 'aqt_lite[science]'", __name__):
    import xarray as xr

__all__ = [
    "DataArrayAccessor",
    "DatasetAccessor",
    "RepackedWarning",
    "bitround",
    "cf_encoding",
    "dequantize",
    "open_dataset",
    "quantize",
    "to_netcdf",
    "to_zarr",
]

ATTRIBUTE = "aqt_lite"
"""Of a variable of codes: what they mean, in JSON. (In ``encoding``: that of the variable that was quantized.)"""

BOUND = "max_abs_error"
"""Attribute of a packed variable: the largest error allowed when it was packed, in units of the data; the sum of them
where it was packed more than once."""

UNPACKED = "unpacked_dtype"
"""Attribute of a packed variable of zarr, whose JSON loses that of ``scale_factor``: the type of the values."""

BITROUND = "quantization_bitround"
"""The variable that says how variables were rounded; those have its name in the attribute ``quantization``."""

KEPT = "quantization_nsb"
"""Attribute of a rounded variable: the bits of the significand that were kept, after the leading one."""

_RELATED = (
    *("bounds", "cell_measures", "climatology", "formula_terms", "geometry", "grid_mapping"),
    *("interior_ring", "node_coordinates", "node_count", "part_node_count"),
)
"""What xarray keeps in ``encoding`` of other variables that belong to one, and would lose with another ``encoding``."""

_LIMITS = ("valid_min", "valid_max", "valid_range")
_OF_PACKED = ("scale_factor", "add_offset", "_FillValue", "missing_value", *_LIMITS)
"""Attributes that speak of the codes once a variable is packed."""

_OF_ZARR = ("compressor", "compressors", "filters", "serializer", "shards")
"""Encoding that only stores of the same version take; the target has what zarr chooses, or ``encoding`` says."""

_MARKS_OF_STORES = ("zarr.json", ".zgroup", ".zarray")
"""Files by which a folder is known to be a zarr store."""


class RepackedWarning(UserWarning):
    """Values that were packed before are packed again: errors add up.

    Examples
    --------
    >>> import warnings, xarray as xr
    >>> from aqt_lite.xarray import RepackedWarning, cf_encoding
    >>> t = xr.DataArray([1.0, 2.0], name="t", attrs={"max_abs_error": 0.25})
    >>> with warnings.catch_warnings(record=True) as found:
    ...     warnings.simplefilter("always")
    ...     encoding = cf_encoding(t, max_abs_err=0.5)
    >>> found[0].category is RepackedWarning
    True
    """


@naming_the_argument
def cf_encoding(
    obj: xr.DataArray | xr.Dataset,
    *,
    max_abs_err: float | Mapping[Hashable, float],
    dtype: Any = "auto",
    value_range: tuple[float, float] | Mapping[Hashable, tuple[float, float]] | None = None,
) -> dict[Any, Any]:
    """How to pack a variable, or those of a Dataset, so that what is read again is within ``max_abs_err``.

    The result is xarray's ``encoding``: integers, ``scale_factor``, ``add_offset`` and a ``_FillValue`` for NaN, as the
    CF conventions have them, which every reader of netCDF unpacks. The bound is on what it makes of them, its rounding
    included, and is checked on every element, chunk by chunk. :mod:`aqt_lite.cf` says how the numbers are chosen.

    It is for the values of ``obj`` and those in ``value_range``. Other values that are written with it may have no
    code, and xarray then writes some other code without a word: the bound is not kept, by any amount. For data that are
    not at hand yet, state their range; :meth:`aqt_lite.cf.Packing.pack` refuses what is beyond the codes.

    Parameters
    ----------
    obj : DataArray or Dataset
        float32 or float64; arrays of Dask are computed twice, for the range and for the check, and never held whole.
    max_abs_err : float, or mapping of names of variables to floats
        The largest error allowed, in units of the data. One number serves all floating-point variables of a Dataset
        (but for coordinates, times since a date, and integers of a file that have a fill value); a mapping says which
        are packed.
    dtype : {"auto", "int8", "int16", "int32", "uint8", "uint16"}
        Of the codes. "auto": the smallest of int8, int16 and int32 that keeps the bound.
    value_range : (float, float), or mapping of names of variables to pairs, optional
        The least and the greatest value that the encoding is for, beside those of ``obj``. Of a Dataset, a mapping.

    Returns
    -------
    dict
        Of a DataArray, its encoding. Of a Dataset, one encoding a variable, as ``encoding=`` takes them.

    Raises
    ------
    ValueError
        A bound that the type cannot keep, with the smallest that it can; infinities; attributes that would come to mean
        something else.

    Warns
    -----
    RepackedWarning
        The attribute ``max_abs_error`` says that the values were packed before: errors add up, and :func:`to_netcdf`
        and :func:`to_zarr` write the sum. Whoever writes with the encoding sets the attribute.

    Examples
    --------
    >>> import numpy as np, xarray as xr
    >>> from aqt_lite.xarray import cf_encoding
    >>> t = xr.DataArray(np.linspace(180, 330, 7, dtype="float32"), dims="x", name="t")
    >>> cf_encoding(t, max_abs_err=0.05)["dtype"]
    dtype('int16')
    >>> list(cf_encoding(t.to_dataset(), max_abs_err={"t": 0.05}))  # ds.to_netcdf(path, encoding=this)
    ['t']
    """
    if isinstance(obj, xr.Dataset):
        bounds, ranges = bounds_of(obj, max_abs_err), {} if value_range is None else value_range
        if not isinstance(ranges, Mapping):
            raise TypeError(f"value_range={ranges!r}: give a mapping from names of variables for a Dataset")
        unknown = [name for name in ranges if name not in bounds]
        if unknown:
            raise ValueError(f"value_range names {unknown[0]!r}; {list(bounds)} are packed")
        return {
            name: cf_encoding(obj[name], max_abs_err=bound, dtype=dtype, value_range=ranges.get(name))
            for name, bound in bounds.items()
        }
    if not isinstance(obj, xr.DataArray):
        raise TypeError(f"obj is a {type(obj).__name__}, not a DataArray or Dataset; for other arrays see aqt_lite.cf")
    if isinstance(max_abs_err, Mapping):
        raise TypeError("max_abs_err is a mapping, which is for Datasets: give one number for a DataArray")
    if isinstance(value_range, Mapping):
        raise TypeError("value_range is a mapping, which is for Datasets: give two numbers for a DataArray")
    said = [name for name in _OF_PACKED if name in obj.attrs]
    if said:
        raise ValueError(
            f"{_called(obj)} has the attribute {said[0]}={_plain(obj.attrs[said[0]])}, which readers would compare "
            "with codes: take it out of attrs first"
        )
    try:
        packing = cf.choose_packing(_readable(obj), max_abs_err=max_abs_err, dtype=dtype, value_range=value_range)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_called(obj)}: {error}") from None
    _sum_of_bounds(obj, max_abs_err)
    return {**packing.encoding, **related(obj)}


def _sum_of_bounds(da: xr.DataArray, bound: float) -> float:
    """The largest error of packing a variable and of its earlier packing, of which a warning is given."""
    bound = float(bound)
    if BOUND not in da.attrs:
        return bound
    try:
        numbers = np.asarray(da.attrs[BOUND], np.float64)  # some libraries read a list of one
    except (TypeError, ValueError):
        numbers = np.zeros(0)
    earlier = numbers.item() if numbers.size == 1 else math.nan
    if not 0 <= earlier < math.inf:
        warn(
            f"{_called(da)} has the attribute {BOUND}={_plain(da.attrs[BOUND])}, which is no bound: "
            f"{bound!r} replaces it",
            RepackedWarning,
        )
        return bound
    total = earlier + bound
    if Fraction(total) < Fraction(earlier) + Fraction(bound):
        total = math.nextafter(total, math.inf)
    warn(
        f"{_called(da)} has the attribute {BOUND}={earlier!r}: it was packed before, and is packed again with "
        f"max_abs_err={bound!r}. Errors add up, to {total!r} at most: pack from the original; or remove the attribute, "
        "if these are other values",
        RepackedWarning,
    )
    return total


def _plain(value: Any) -> str:
    """The repr of an attribute, numbers of NumPy, which files give, as numbers."""
    return repr(value.item() if isinstance(value, np.generic) else value)


def related(da: xr.DataArray) -> dict[str, Any]:
    """What the encoding of a variable says of others, its grid mapping for instance.

    But for ``coordinates``, which xarray takes from the variable itself, and refuses in ``encoding=``.
    """
    return {name: da.encoding[name] for name in _RELATED if name in da.encoding}


def named_by(attributes: Mapping[Any, Any]) -> list[str]:
    """The variables that attributes of CF speak of, as coordinates, bounds of cells and the like."""
    found = []
    for attribute in ("coordinates", *_RELATED):
        words = str(attributes.get(attribute, "")).replace(" :", ":").split()
        roles = attribute != "grid_mapping"  # what stands before a colon, and is no variable
        found += [word.removesuffix(":") for word in words if not (roles and word.endswith(":"))]
    return found


def _called(obj: xr.DataArray) -> str:
    return "the DataArray" if obj.name is None else f"variable {obj.name!r}"


def bounds_of(ds: xr.Dataset, max_abs_err: Any) -> dict[Hashable, float]:
    """A bound for each variable that is to be packed."""
    if isinstance(max_abs_err, Mapping):
        unknown = [name for name in max_abs_err if name not in ds.data_vars]
        if unknown:
            raise ValueError(f"max_abs_err names {unknown[0]!r}; the Dataset has the variables {list(ds.data_vars)}")
        return dict(max_abs_err)
    cf.check_bound(max_abs_err)
    found = floats_of(ds)
    if not found:
        raise ValueError("the Dataset has no floating-point variable to pack")
    return dict.fromkeys(found, max_abs_err)


def floats_of(ds: xr.Dataset) -> list[Hashable]:
    """The variables that are numbers of the data, in units of their own."""
    floats = [name for name, variable in ds.data_vars.items() if variable.dtype.kind == "f"]
    return [name for name in floats if not is_time(ds[name]) and not _is_integer(ds[name])]


def is_time(da: xr.DataArray) -> bool:
    """Whether it is days or seconds since a date, in units that a bound for all others does not speak of."""
    return " since " in str(da.attrs.get("units", ""))


def _is_integer(da: xr.DataArray) -> bool:
    """Whether it is one in the file that it came from, where a fill value alone made floats of it."""
    packed = "scale_factor" in da.encoding or "add_offset" in da.encoding
    return np.dtype(da.encoding.get("dtype", da.dtype)).kind in "iub" and not packed


class _Lazy:
    """A variable whose values are still in a file: what is looked at is read, and not kept."""

    def __init__(self, variable: xr.Variable) -> None:
        self._variable = variable
        self.shape, self.ndim, self.dtype = variable.shape, variable.ndim, variable.dtype
        chunks = variable.encoding.get("chunksizes") or variable.encoding.get("chunks")
        self.chunks = tuple(chunks) if chunks and len(chunks) == variable.ndim else None

    def __getitem__(self, key: tuple[slice, ...]) -> np.ndarray[Any, Any]:
        return self._variable[key].values


def _readable(obj: xr.DataArray) -> Any:
    """The values, part by part if they have to be read first."""
    variable = obj.variable
    if obj.chunks is not None or variable._in_memory:
        return variable.data
    return _Lazy(variable)


# ---- fewer significant bits


@naming_the_argument
def bitround(
    obj: xr.DataArray | xr.Dataset,
    keepbits: int | Mapping[Hashable, int] | None = None,
    *,
    max_abs_err: float | Mapping[Hashable, float] | None = None,
    max_rel_err: float | Mapping[Hashable, float] | None = None,
    information: float | Mapping[Hashable, float] | None = None,
    dim: Hashable | None = None,
) -> xr.DataArray | xr.Dataset:
    """Round a variable, or the floating-point variables of a Dataset, to few significant bits, for a compressor.

    Values stay floats of their type, with their labels; files of netCDF and zarr become small where they are
    compressed, and every reader has the same numbers. The attribute ``quantization_nsb`` says how many bits were kept,
    as the CF conventions (8.4.2, lossy compression via quantization) have it.

    Parameters
    ----------
    obj : DataArray or Dataset
        Arrays of Dask stay lazy where ``keepbits`` is given; where bits are chosen they are computed once for that.
    keepbits : int, or mapping of names of variables to int, optional
        As for :func:`aqt_lite.bitround`.
    max_abs_err, max_rel_err, information : float, or mapping of names to floats, optional
        In place of ``keepbits``: it is chosen for each variable by :func:`aqt_lite.keepbits_for`. A mapping says which
        variables are rounded; one number serves all floating-point variables of a Dataset, but for times since a date.
    dim : str, optional
        For ``information``: neighbours along this dimension are compared; by default along each, and most bits win.

    Returns
    -------
    DataArray or Dataset
        A Dataset has one variable more, which says what was done, as CF has it, and rounded variables name it in their
        attribute ``quantization``; a DataArray has no place for it. In files values are floats, NaN where missing.

    Warns
    -----
    RepackedWarning
        Values were packed before: errors add up.

    Examples
    --------
    >>> import numpy as np, xarray as xr, aqt_lite.xarray
    >>> t = xr.DataArray(np.linspace(270, 305, 5, dtype="float32"), dims="x", name="t")
    >>> t.aqt.bitround(max_rel_err=0.001).values
    array([270. , 279. , 287.5, 296. , 305. ], dtype=float32)
    >>> t.aqt.bitround(7).attrs["quantization_nsb"]
    np.int32(7)
    """
    if isinstance(obj, xr.DataArray):
        for argument, value in (("keepbits", keepbits), ("max_abs_err", max_abs_err), ("max_rel_err", max_rel_err)):
            if isinstance(value, Mapping):
                raise TypeError(f"{argument} is a mapping, which is for Datasets: give one number for a DataArray")
        return _bitrounded(obj, keepbits, max_abs_err, max_rel_err, information, dim=dim)
    if not isinstance(obj, xr.Dataset):
        raise TypeError(f"obj is a {type(obj).__name__}, not a DataArray or Dataset; aqt_lite.bitround takes arrays")
    given = (keepbits, max_abs_err, max_rel_err, information)
    names = _to_round(obj, [value for value in given if value is not None])

    def of(name: Hashable) -> list[Any]:
        return [value.get(name) if isinstance(value, Mapping) else value for value in given]

    rounded = {name: _bitrounded(obj[name], *of(name), dim=dim if dim in obj[name].dims else None) for name in names}
    for da in rounded.values():
        da.attrs["quantization"] = BITROUND
    said = xr.Variable((), np.int8(0), {"algorithm": "bitround", "implementation": f"aqt_lite {__version__}"})
    return obj.assign({**rounded, BITROUND: said})


def _to_round(ds: xr.Dataset, given: list[Any]) -> list[Hashable]:
    if len(given) == 1 and isinstance(given[0], Mapping):
        unknown = [name for name in given[0] if name not in ds.data_vars]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is named; the Dataset has the variables {list(ds.data_vars)}")
        return list(given[0])
    found = floats_of(ds)
    if not found:
        raise ValueError("the Dataset has no floating-point variable to round")
    return found


def _bitrounded(
    da: xr.DataArray, keepbits: Any, max_abs_err: Any, max_rel_err: Any, information: Any, *, dim: Hashable | None
) -> xr.DataArray:
    chosen = {"max_abs_err": max_abs_err, "max_rel_err": max_rel_err, "information": information}
    wanted = {name: value for name, value in chosen.items() if value is not None}
    if (keepbits is not None) + len(wanted) != 1:
        raise ValueError("give one of keepbits, max_abs_err, max_rel_err and information")
    if dim is not None and (dim not in da.dims or "information" not in wanted):
        raise ValueError(
            f"dim={dim!r} is for information=, and a dimension of {_called(da)}, which has {list(da.dims)}"
        )
    try:
        if keepbits is None:
            axis = None if dim is None else da.dims.index(dim)
            keepbits = significant.keepbits_for(da.data, axis=axis, **wanted)
        values = significant.bitround(da.data, keepbits)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_called(da)}: {error}") from None
    rounded = without_packing(da).copy(data=values)
    if BOUND in rounded.attrs:
        warn(
            f"{_called(da)} has the attribute {BOUND}={_plain(rounded.attrs.pop(BOUND))}: it was packed before, and "
            "rounding adds to that error, so that the attribute is left out: round the original, or remove it",
            RepackedWarning,
        )
    rounded.attrs.pop("quantization", None)  # it names a variable that a DataArray does not have
    rounded.attrs[KEPT] = np.int32(keepbits)
    return rounded


# ---- quantized variables


def quantize(
    obj: xr.DataArray | xr.Dataset,
    dtype: Any = "int8",
    *,
    granularity: Granularity | Mapping[Hashable, int] | None = None,
    **how: Any,
) -> xr.Dataset:
    """Quantize a variable, or the floating-point variables of a Dataset, and keep all labels.

    Parameters
    ----------
    obj : DataArray or Dataset
        Of NumPy, Dask or any other array that :func:`aqt_lite.quantize` takes. Dask's stay lazy; what is still in a
        file that was opened without ``chunks=`` is loaded.
    dtype : str or format
        As for :func:`aqt_lite.quantize`.
    granularity : mapping, PerTensor, PerChannel, PerGroup or PerBlock, optional
        Who shares a scale: a mapping from names of dimensions to lengths of blocks, in which those without a name share
        along all of it. ``{"time": 1}``: a scale for each time; ``{"time": 1, "lon": 32}``: one for each time and 32
        longitudes. Of a Dataset, variables without such a dimension go without it.
    **how
        The other arguments of :func:`aqt_lite.quantize`. A ``mask`` that is a DataArray, or a Dataset with one for each
        variable, goes by its names and labels.

    Returns
    -------
    Dataset
        Codes, scales, zero points and offsets as variables, and, where codes are packed or in blocks, their order.
        :func:`dequantize` makes values of them again, with their attributes, which the codes do not show: they are not
        in kelvin. Selecting along dimensions works where blocks stay whole; what arithmetic, new names of dimensions
        and so on make of codes is refused.

    Examples
    --------
    >>> import numpy as np, xarray as xr, aqt_lite.xarray
    >>> t = xr.DataArray(np.ones((3, 4), "float32"), {"time": [1, 2, 3]}, ("time", "x"), name="t", attrs={"units": "K"})
    >>> q = t.aqt.quantize("int4", granularity={"time": 1})
    >>> dict(q.sizes)
    {'time': 3, 't_x_bytes': 2, 't_x_blocks': 1}
    >>> bool(q.isel(time=slice(1, 3)).aqt.dequantize().t.identical(t[1:]))
    True
    """
    if isinstance(obj, xr.DataArray):
        return _quantized(obj, dtype, granularity, how, set(obj.coords))
    names = [name for name, variable in obj.data_vars.items() if variable.dtype.kind == "f"]
    if not names:
        raise ValueError("the Dataset has no floating-point variable to quantize")
    if isinstance(granularity, Mapping):
        _check_dimensions(granularity, obj.dims, "the Dataset")
    found = obj.drop_vars(names)
    for name in names:
        wanted = granularity
        if isinstance(granularity, Mapping):
            wanted = {dim: n for dim, n in granularity.items() if dim in obj[name].dims}
        taken = (set(obj.variables) | set(found.variables)) - {name}
        found = found.merge(_quantized(obj[name], dtype, wanted, how, taken), combine_attrs="override")
    return found


@naming_the_argument
def dequantize(ds: xr.Dataset, dtype: Any = None) -> xr.Dataset:
    """The Dataset with values in place of codes; the inverse of :func:`quantize`.

    Parameters
    ----------
    ds : Dataset
    dtype : str, optional
        Type of the values, as for :func:`aqt_lite.dequantize`.

    Raises
    ------
    ValueError
        Codes that were cut across their blocks, put in another order there, or have lost their scales; that were
        computed with; that have other dimensions, or other names; that were joined where they share a scale.
    """
    if not isinstance(ds, xr.Dataset):
        raise TypeError(f"ds is a {type(ds).__name__}, not a Dataset: codes and their scales are variables of one")
    names = [name for name in ds.data_vars if ATTRIBUTE in ds[name].attrs]
    if not names:
        raise ValueError("the Dataset has no quantized variable")
    used: set[Hashable] = set()
    values = {}
    for name in names:
        said = _said(ds, name)
        values[said["name"] or name] = _values(ds, name, said, dtype, used)
    return ds.drop_vars([*names, *used]).assign(values)


def _quantized(
    da: xr.DataArray,
    dtype: Any,
    granularity: Granularity | Mapping[Hashable, int] | None,
    how: dict[str, Any],
    taken: set[Any],
) -> xr.Dataset:
    if not all(isinstance(name, str) for name in da.dims):
        raise TypeError(f"{_called(da)} has the dimensions {da.dims}: rename them, so that all are strings")
    if ATTRIBUTE in da.attrs:
        raise TypeError(f"{_called(da)} is quantized already")
    if isinstance(granularity, Mapping):
        _check_dimensions(granularity, da.dims, _called(da))
        granularity = PerBlock(tuple(granularity.get(dim, -1) for dim in da.dims))
    how = {argument: _by_name(argument, value, da) for argument, value in how.items()}
    try:
        q = api.quantize(da.data, dtype, granularity=granularity, **how)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_called(da)}: {error}") from None
    name = "values" if da.name is None else str(da.name)
    variables: dict[str, xr.Variable] = {}
    dims = [str(dim) for dim in da.dims]
    name = unique(name, taken)
    said: dict[str, Any] = {
        "name": None if da.name is None else name,
        "along": dict(zip(dims, q.shape, strict=True)),
        "codes": _taken_apart(q, name, dims, variables, taken),
        "order": {},
    }
    for dim, length in _ordered(q, said, [*variables.values(), *da.coords.variables.values()]).items():
        said["order"][dim] = here = unique(f"{name}_{dim}_order" if dim in dims else f"{dim}_order", taken)
        variables[here] = xr.Variable(dim, _order_of(length))
    for variable in variables.values():
        variable.encoding = {ATTRIBUTE: {}}
    codes = variables[name]
    said["attributes"], left = _in_words(da.attrs)
    codes.attrs = {**left, ATTRIBUTE: json.dumps(said)}
    codes.encoding = {ATTRIBUTE: dict(da.encoding)}
    return xr.Dataset(variables, da.coords)


def _by_name(argument: str, value: Any, da: xr.DataArray) -> Any:
    """An argument as an array along the dimensions of ``da``, where it has names and labels of its own."""
    if isinstance(value, xr.Variable):
        value = xr.DataArray(value)
    if isinstance(value, xr.Dataset):
        if da.name not in value.data_vars:
            raise ValueError(f"{argument} is a Dataset without {da.name!r}: give one that has it, or a DataArray")
        value = value[da.name]
    if not isinstance(value, xr.DataArray):
        return value
    if argument != "mask":
        raise TypeError(f"{argument} is a DataArray, whose names are not looked at: give its values, along {da.dims}")
    unknown = [dim for dim in value.dims if dim not in da.dims]
    if unknown:
        raise ValueError(f"{argument} has the dimension {unknown[0]!r}; {_called(da)} has {list(da.dims)}")
    try:
        value, _ = xr.align(value, da, join="exact")
    except ValueError as error:
        raise ValueError(f"{argument} has other labels than {_called(da)}: {error}") from None
    return value.broadcast_like(da).transpose(*da.dims).data


def _taken_apart(
    q: QArray, name: str, dims: list[str], variables: dict[str, xr.Variable], taken: set[Any]
) -> dict[str, Any]:
    """The arrays of ``q``, which has these dimensions, as variables; and what they are, in JSON's types."""
    kept = list(dims)
    if q.packed_length is not None:
        kept[-1] = f"{name}_{dims[-1]}_bytes"
    variables[name] = xr.Variable(kept, _in_even_chunks(q.storage))
    grid = [dim if size == 1 else f"{name}_{dim}_blocks" for dim, size in zip(dims, q._checked().block, strict=True)]
    parts: dict[str, Any] = {}
    for part in ("scale", "zero_point", "offset"):
        array = getattr(q, part)
        if array is None:
            continue
        here = unique(f"{name}_{part}", taken)
        if isinstance(array, QArray):
            parts[part] = _taken_apart(array, here, grid, variables, taken)
        else:
            variables[here] = xr.Variable(grid, _in_even_chunks(array))
            parts[part] = {"variable": here, "dims": grid}
    return {"variable": name, "dims": kept, "qarray": described(q), "parts": parts}


def _ordered(q: QArray, said: dict[str, Any], variables: list[xr.Variable]) -> dict[str, int]:
    """Dimensions, and their lengths, along which codes only mean something in the order that they were made in.

    Those in blocks of several, of blocks and of packed codes; where codes are packed, that of their labels, too.
    """
    sizes = {str(dim): n for variable in variables for dim, n in variable.sizes.items()}
    found = {dim for dim in sizes if dim not in said["along"]}
    for dim, kept, size in zip(said["along"], said["codes"]["dims"], q._checked().block, strict=True):
        if size not in (None, 1) or kept != dim:
            found.add(dim)
    return {dim: n for dim, n in sizes.items() if dim in found and n > 1}


def _order_of(length: int) -> np.ndarray[Any, Any]:
    """Places along a dimension, in a byte each: moving by a multiple of this prime is all that they would not show."""
    return (np.arange(length) % 251).astype(np.uint8)


def _in_words(attributes: Mapping[Any, Any]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """Attributes in JSON's types, each as the type of its NumPy array and a list, or as it is; and those without."""
    words: dict[str, Any] = {}
    left: dict[Any, Any] = {}
    for name, value in attributes.items():
        if isinstance(value, float) and not math.isfinite(value):
            value = np.float64(value)
        typed = isinstance(value, np.generic | np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8
        word = {"dtype": value.dtype.str, "values": _numbers(value)} if typed else {"is": value}
        try:
            same = isinstance(name, str) and (typed or json.loads(json.dumps(value)) == value)
        except (TypeError, ValueError):
            same = False
        if same:
            words[name] = word
        else:
            left[name] = value
    return words, left


def _numbers(value: Any) -> Any:
    """In JSON, which has neither NaN nor infinities: beside those, numbers are the shortest text that means them."""
    return value.tolist() if np.isfinite(value).all() else np.asarray(value).astype(str).tolist()


def _of_words(words: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that :func:`_in_words` was given."""
    return {
        name: word["is"] if "is" in word else np.asarray(word["values"], word["dtype"])[()]
        for name, word in words.items()
    }


def _in_even_chunks(array: Any) -> Any:
    """An array of Dask in chunks of one size, as zarr needs them: packing makes others."""
    chunks = getattr(array, "chunks", None)
    if chunks is None or all(len({*sizes[:-1], max(sizes, default=0)}) <= 1 for sizes in chunks):
        return array
    return array.rechunk(tuple(max(sizes) for sizes in chunks))


def _said(ds: xr.Dataset, name: Hashable) -> dict[str, Any]:
    try:
        said = json.loads(ds[name].attrs[ATTRIBUTE])
        known = {"name", "along", "codes"} <= set(said) and {"dims", "qarray", "parts"} <= set(said["codes"])
    except (TypeError, ValueError):
        known = False
    if not known:
        raise ValueError(f"variable {name!r}: the attribute {ATTRIBUTE} is not what quantize wrote")
    return dict(said)


def _values(ds: xr.Dataset, name: Hashable, said: dict[str, Any], dtype: Any, used: set[Hashable]) -> xr.Variable:
    """A variable's values; the names of those that were needed for them join ``used``."""
    words, codes = said["codes"], ds[name].variable
    if words["variable"] != name:
        raise ValueError(f"variable {name!r} was {words['variable']!r} when it was quantized: dequantize, then rename")
    static = words["qarray"]
    foreign = [dim for dim in codes.dims if dim not in words["dims"]]
    if foreign:
        raise ValueError(
            f"variable {name!r} has the dimension {foreign[0]!r}, and was quantized along {list(said['along'])}: "
            "rename, add, stack and join dimensions before quantizing, or dequantize first"
        )
    dropped = []
    for dim, kept, size, length in zip(
        said["along"], words["dims"], static["block"], said["along"].values(), strict=True
    ):
        now = codes.sizes.get(dim)
        if kept != dim and kept in codes.dims:  # packed: the dimension itself is known from coordinates alone
            now = ds.sizes.get(dim, None if dim in ds.variables else length)
        if now is None and size in (None, 1):
            dropped.append(dim)
        elif now != length and (kept != dim or size not in (None, 1)):
            raise ValueError(
                f"variable {name!r} has {now or 'none'} of {length} along {dim!r}, where its codes are packed or in "
                "blocks of several: dequantize before selecting there"
            )
        elif now is not None and size is None and now > length:
            raise ValueError(
                f"variable {name!r} has {now} along {dim!r}, where {length} shared a scale: dequantize before joining"
            )
    _check_order(ds, name, said.get("order", {}), used)
    if dropped:
        words = _without(words, name, [list(said["along"]).index(dim) for dim in dropped])
    values = _put_together(ds, words, name, used).dequantize(dtype)
    used.discard(name)
    attrs = _of_words(said.get("attributes", {}))
    attrs |= {key: value for key, value in codes.attrs.items() if key != ATTRIBUTE}  # what was said of it since
    dims = [dim for dim in said["along"] if dim not in dropped]
    return xr.Variable(dims, values, attrs, codes.encoding.get(ATTRIBUTE))


def _check_order(ds: xr.Dataset, name: Hashable, order: dict[str, str], used: set[Hashable]) -> None:
    """ValueError where what only means something as it was has been put in another order, or cut."""
    for dim, of_dim in order.items():
        if of_dim not in ds.variables:
            raise ValueError(f"variable {name!r} has lost {of_dim!r}, which tells the order of its codes along {dim!r}")
        used.add(of_dim)
        variable = ds[of_dim].variable
        if dim not in variable.dims:
            raise ValueError(
                f"variable {name!r} has lost the dimension {dim!r}, where its codes are packed or in blocks: "
                "dequantize before selecting there, and rename before quantizing"
            )
        places = np.moveaxis(variable.values, variable.dims.index(dim), -1)
        if not np.array_equal(places, np.broadcast_to(_order_of(places.shape[-1]), places.shape)):
            raise ValueError(
                f"variable {name!r} is in another order along {dim!r}, where its codes are packed or in blocks of "
                "several: dequantize before sorting or selecting there"
            )


def _without(words: dict[str, Any], name: Hashable, axes: list[int]) -> dict[str, Any]:
    """What is said of codes from which axes have been selected away."""
    if any("qarray" in part for part in words["parts"].values()):
        raise ValueError(
            f"variable {name!r} has quantized scales: dequantize before selecting one index of a dimension"
        )

    def left(items: list[Any] | tuple[Any, ...]) -> list[Any]:
        return [item for axis, item in enumerate(items) if axis not in axes]

    static = words["qarray"]
    parts = {part: {**of_part, "dims": left(of_part["dims"])} for part, of_part in words["parts"].items()}
    fewer = {**static, "block": left(static["block"]), "ragged": left(static["ragged"])}
    return {**words, "dims": left(words["dims"]), "parts": parts, "qarray": fewer}


def _put_together(ds: xr.Dataset, words: dict[str, Any], name: Hashable, used: set[Hashable]) -> QArray:
    def array(said: dict[str, Any]) -> Any:
        if said["variable"] not in ds.variables:
            raise ValueError(f"variable {name!r} has lost {said['variable']!r}, which belongs to its codes")
        used.add(said["variable"])
        variable = ds[said["variable"]].variable
        if not variable.encoding:
            raise ValueError(
                f"variable {said['variable']!r} has lost its encoding, as arithmetic, reductions and drop_encoding "
                "leave it: what was computed of codes means nothing, so dequantize first"
            )
        for dim in [dim for dim in variable.dims if dim not in said["dims"]]:  # of axes that are not there any more
            first = variable.isel({dim: 0})
            if variable.sizes[dim] > 1 and not bool((variable == first).all()):
                raise ValueError(
                    f"variable {said['variable']!r} differs along {dim!r}, where {name!r} has one for all: dequantize "
                    "before joining or selecting"
                )
            variable = variable.isel({dim: 0})
        lost = [dim for dim in said["dims"] if dim not in variable.dims]
        if lost:
            raise ValueError(
                f"variable {said['variable']!r} has no dimension {lost[0]!r}, which belongs to {name!r}: dequantize "
                "before selecting or renaming"
            )
        return variable.transpose(*said["dims"]).data

    parts = {
        part: _put_together(ds, said, name, used) if "qarray" in said else array(said)
        for part, said in words["parts"].items()
    }
    parts["storage"] = array(words)
    deferred = hasattr(parts["storage"], "__dask_graph__")  # values would have to be computed for a look at them
    try:
        return rebuilt(words["qarray"], parts, check_values=not deferred)
    except (TypeError, ValueError) as error:
        raise type(error)(f"variable {name!r}: {error}") from None


def _check_dimensions(granularity: Mapping[Hashable, int], dims: Any, owner: str) -> None:
    unknown = [dim for dim in granularity if dim not in dims]
    if unknown:
        raise ValueError(f"granularity names the dimension {unknown[0]!r}; {owner} has {list(dims)}")


# ---- files


def open_dataset(path: Any, **kwargs: Any) -> xr.Dataset:
    """``xarray.open_dataset``, with values in place of the codes of quantized variables.

    Parameters
    ----------
    path : str or path
        A file or store that ``to_netcdf`` or ``to_zarr`` wrote, quantized, packed or neither.
    **kwargs
        Of ``xarray.open_dataset``. With ``chunks={}``, values are made of codes chunk by chunk, when they are computed.
    """
    ds = xr.open_dataset(path, **kwargs)
    if any(ATTRIBUTE in variable.attrs for variable in ds.data_vars.values()):
        return dequantize(ds)
    return ds


def packed(
    obj: xr.DataArray | xr.Dataset,
    max_abs_err: Any,
    dtype: Any,
    encoding: Mapping[Hashable, Any] | None = None,
    *,
    says_type: bool = False,
) -> tuple[xr.Dataset, dict[Hashable, Any]]:
    """A Dataset whose attributes say what they have to once it is packed, and the encoding that packs it.

    ``says_type``: whether they say the type of the values, too, as stores of zarr need it.
    """
    ds = _as_dataset(obj)
    bounds = bounds_of(ds, max_abs_err)
    bare = ds.assign({name: without_packing(ds[name]) for name in bounds})
    for name in bounds:
        for said in (*_LIMITS, BOUND):
            bare[name].attrs.pop(said, None)
    found = cf_encoding(bare, max_abs_err=bounds, dtype=dtype)
    for name, bound in bounds.items():
        packing = cf.Packing.from_attributes(found[name], found[name]["dtype"])
        bare[name].attrs.update({**_limits_in_codes(ds[name], packing), BOUND: _sum_of_bounds(ds[name], bound)})
        if says_type:
            bare[name].attrs[UNPACKED] = packing.unpack(np.zeros(0, packing.dtype)).dtype.name
        chosen = (encoding or {}).get(name, {})
        clash = [key for key in found[name] if key in chosen]
        if clash:
            raise ValueError(f"encoding of {name!r} has {clash[0]!r}, which max_abs_err chooses: leave one of them out")
        found[name] |= chosen
    return bare, {**(encoding or {}), **found}


def _as_dataset(obj: xr.DataArray | xr.Dataset) -> xr.Dataset:
    if isinstance(obj, xr.Dataset):
        return obj
    return obj.to_dataset(name="values" if obj.name is None else obj.name)


def without_packing(da: xr.DataArray) -> xr.DataArray:
    """Without what speaks of codes in the file that it came from; its valid limits in units of the values."""
    bare = da.copy(deep=False)
    kept = {key: value for key, value in da.attrs.items() if key not in (*_OF_PACKED, UNPACKED)}
    bare.attrs = {**kept, **{name: limits.astype(da.dtype) for name, limits in _valid_limits(da).items()}}
    bare.encoding = {key: value for key, value in da.encoding.items() if key not in (*_OF_PACKED, "dtype")}
    return bare


def in_its_type(da: xr.DataArray) -> xr.DataArray:
    """As float32 what xarray has decoded in float64 of a store of zarr that says so, where no value changes by it."""
    numbers = [da.encoding.get(key, np.nan) for key in ("scale_factor", "add_offset")]
    codes = np.dtype(da.encoding.get("dtype", da.dtype))
    if da.attrs.get(UNPACKED) != "float32" or codes.kind not in "iu" or codes.itemsize > 2:
        return da
    with np.errstate(over="ignore"):
        exact = all(np.all(np.float32(number) == np.float64(number)) for number in numbers)
    return da.copy(data=da.data.astype(np.float32)) if exact else da


def _valid_limits(da: xr.DataArray) -> dict[str, Any]:
    """``valid_min`` and the like in units of the values. CF has them in codes, where they are integers."""
    scale, offset = da.encoding.get("scale_factor", 1.0), da.encoding.get("add_offset", 0.0)
    found = {}
    for name in _LIMITS:
        if name in da.attrs:
            limits = np.asarray(da.attrs[name])
            coded = limits.dtype.kind in "iu"
            found[name] = limits.astype(np.float64) * scale + offset if coded else limits.astype(np.float64)
    return found


def _limits_in_codes(da: xr.DataArray, packing: cf.Packing) -> dict[str, Any]:
    """As CF has them. Rounding is monotone: what was inside them stays inside."""
    least, most = cf.limits_of(packing.dtype)
    return {
        name: np.clip(np.rint((limits - packing.add_offset) / packing.scale_factor), least, most).astype(packing.dtype)
        for name, limits in _valid_limits(da).items()
    }


def written(path: Any, write: Callable[[str], Any], *, store: bool, sources: Iterable[str] = ()) -> None:
    """Have ``write`` make a file or folder beside ``path``, and put it in its place when it is whole.

    What is there already is replaced where ``check_replaceable`` lets it.
    """
    check_replaceable(path, store=store, sources=sources)
    final = os.path.realpath(os.fspath(path))
    folder, name = os.path.split(final)
    beside = os.path.join(folder, f".{secrets.token_hex(8)}.{name}")  # the end of a name says how it is written
    try:
        write(beside)
        if os.path.isfile(beside):
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
        check_replaceable(path, store=store, sources=sources)  # writing takes a while
        if os.path.isdir(final):
            _swap(beside, final)
        else:
            os.replace(beside, final)
    finally:
        if os.path.isdir(beside):
            shutil.rmtree(beside)
        elif os.path.exists(beside):
            os.unlink(beside)


def _swap(beside: str, final: str) -> None:
    """A folder in place of another, which cannot be done at once: it is whole under one name or the other."""
    old = f"{beside}.old"
    os.rename(final, old)
    try:
        os.rename(beside, final)
    except BaseException:
        os.rename(old, final)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Any, *, store: bool, sources: Iterable[str] = ()) -> None:
    """An error where something is at ``path`` that a file, or a zarr ``store``, must not take the place of.

    A folder is replaced by a store alone, if it is one itself, and if none of the ``sources`` is in it.
    """
    final, said = os.path.realpath(os.fspath(path)), os.fspath(path)
    if not os.path.isdir(final):
        if store and os.path.exists(final):
            raise FileExistsError(f"{said} is a file, and a store of zarr is a folder: give another path")
        return
    if not store:
        raise IsADirectoryError(f"{said} is a folder, and a file is to be written: give the path of a file")
    if not any(os.path.isfile(os.path.join(final, name)) for name in _MARKS_OF_STORES):
        raise FileExistsError(f"{said} is a folder that is no store of zarr, and is not replaced: give another path")
    for source in sources:
        if os.path.commonpath([final, os.path.realpath(source)]) == final:
            raise ValueError(f"{source}, which is read, lies in {said}, which would be replaced: give another path")


def without_codecs(ds: xr.Dataset) -> xr.Dataset:
    """Without the codecs of the store that it came from, which another may not take."""
    bare = ds.copy(deep=False)
    for variable in bare.variables.values():
        variable.encoding = {name: value for name, value in variable.encoding.items() if name not in _OF_ZARR}
    return bare


def _sources(ds: xr.Dataset) -> set[str]:
    """The files and folders that a Dataset was opened from."""
    said = [ds.encoding.get("source"), *(variable.encoding.get("source") for variable in ds.variables.values())]
    return {source for source in said if isinstance(source, str) and os.path.exists(source)}


def check_within(
    x: xr.DataArray, y: xr.DataArray, bound: float, progress: Callable[[int, int], None] = lambda done, of: None
) -> None:
    """ValueError where a value of ``y`` is further than ``bound`` from that of ``x``, or missing where it is not.

    A warning where ``y`` is one number and ``x`` is not: a bound for all variables may be too wide for one. Both are
    read chunk by chunk as ``x`` is cut; ``progress`` hears how many elements are done, and of how many.
    """
    if x.dims != y.dims or x.shape != y.shape:
        raise ValueError(f"{_called(x)} is read again as {dict(y.sizes)}, and was {dict(x.sizes)}")
    ends = [np.cumsum(sizes) for sizes in x.chunks] if x.chunks else [np.asarray([n]) for n in x.shape]
    done, ranges = 0, [(math.inf, -math.inf)] * 2
    for index in np.ndindex(*map(len, ends)):
        starts = tuple(int(end[i - 1]) if i else 0 for end, i in zip(ends, index, strict=True))
        box = tuple(slice(s, int(end[i])) for s, end, i in zip(starts, ends, index, strict=True))
        here, read = x.variable[box].values, y.variable[box].values
        try:
            cf.check_within(here, read, bound, starts)
        except ValueError as error:
            raise ValueError(f"{_called(x)}: {error}") from None
        ranges = [_widened(*of, values) for of, values in zip(ranges, (here, read), strict=True)]
        done += here.size
        progress(done, x.size)
    (least, most), (low, high) = ranges
    if low == high and least < most:
        warn(
            f"{_called(x)}: its values, from {least:g} to {most:g}, all became {low:g}: {bound:g} is too wide a bound "
            "for it; give it one of its own, as name=bound, or leave it out"
        )


def _widened(least: float, most: float, values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """A range that takes in those values that are not missing, too."""
    low, high = np.fmin.reduce(values, axis=None, initial=least), np.fmax.reduce(values, axis=None, initial=most)
    return float(low), float(high)


_OF_PARTS = {"mode": ("w", "w-"), "group": (), "compute": (True,), "append_dim": (), "region": ()}
"""Arguments of xarray's writers that could leave something in place or undone, and what of them is the whole."""


def _the_bound(max_abs_err: Any, kwargs: Mapping[str, Any]) -> Any:
    """``max_abs_err``, or TypeError with the way where it is not given, or another bound is."""
    relative = next((name for name in ("max_rel_err", "rtol", "rel_tol", "relative_error") if name in kwargs), None)
    if max_abs_err is None or relative is not None:
        given = "no bound is given" if relative is None else f"{relative}={kwargs[relative]!r} is given"
        raise TypeError(
            f"{given}: max_abs_err= is the bound to keep, in units of the values; integers keep no relative one: for "
            "that write obj.aqt.bitround(max_rel_err=...) by xarray's own to_netcdf or to_zarr, which compress it"
        )
    return max_abs_err


def _check_whole(kwargs: Mapping[str, Any]) -> None:
    for name, values in _OF_PARTS.items():
        if kwargs.get(name) is not None and kwargs[name] not in values:
            raise ValueError(
                f"{name}={kwargs[name]!r}: what is written here replaces all that was at the path, at once; for parts, "
                "give cf_encoding(...) to xarray's own writer as encoding="
            )


_DEFLATED = {"zlib": True, "shuffle": True, "complevel": 1}
"""How packed variables are compressed where nobody says how: as the command line does it."""
_SAYS_STORAGE = {"zlib", "compression", "contiguous"}
"""Entries of an encoding that say whether a variable is compressed."""


def _compresses(engine: Any, form: Any) -> bool:
    """Whether files that xarray writes so may be compressed: netCDF-4, by an engine that has it."""
    if engine is None:
        order = xr.get_options().get(  # type: ignore[no-untyped-call]
            "netcdf_engine_order", ("netcdf4", "h5netcdf", "scipy")
        )
        modules = {"netcdf4": "netCDF4", "h5netcdf": "h5netcdf", "scipy": "scipy"}
        engine = next((name for name in order if importlib.util.find_spec(modules[name])), "scipy")
    return engine in ("netcdf4", "h5netcdf") and form in (None, "NETCDF4", "NETCDF4_CLASSIC")


def to_netcdf(
    obj: xr.DataArray | xr.Dataset,
    path: str | os.PathLike[str],
    *,
    max_abs_err: float | Mapping[Hashable, float] | None = None,
    dtype: Any = "auto",
    encoding: Mapping[Hashable, Any] | None = None,
    **kwargs: Any,
) -> None:
    """Write a packed netCDF file, which every reader unpacks to within ``max_abs_err``.

    The file is whole or not there. ``valid_min``, ``valid_max`` and ``valid_range`` are written in codes, as CF has
    them, and the bound as the attribute ``max_abs_error``; where values have that attribute, since they were packed
    before, the sum of both, with a :class:`RepackedWarning`.

    Parameters
    ----------
    obj : DataArray or Dataset
    path : str or path
    max_abs_err, dtype
        As for :func:`cf_encoding`.
    encoding : mapping, optional
        Of xarray, for the rest: ``{"t": {"complevel": 4}}``, or ``{"t": {"zlib": False}}`` for codes as they are.
    **kwargs
        Of xarray's ``to_netcdf``, but for ``mode="a"``, ``group`` and ``compute=False``: the file is made as a whole.
    """
    bound = _the_bound(max_abs_err, kwargs)
    _check_whole(kwargs)
    check_replaceable(path, store=False)
    ds, chosen = packed(obj, bound, dtype, encoding)
    if _compresses(kwargs.get("engine"), kwargs.get("format")):
        for name in bounds_of(ds, bound):
            if ds[name].ndim and not _SAYS_STORAGE & chosen[name].keys():
                chosen[name] = {**_DEFLATED, **chosen[name]}
    written(path, lambda beside: ds.to_netcdf(beside, encoding=chosen, **kwargs), store=False)


def to_zarr(
    obj: xr.DataArray | xr.Dataset,
    path: str | os.PathLike[str],
    *,
    max_abs_err: float | Mapping[Hashable, float] | None = None,
    dtype: Any = "auto",
    encoding: Mapping[Hashable, Any] | None = None,
    overwrite: bool = False,
    **kwargs: Any,
) -> None:
    """Write a packed zarr store, as :func:`to_netcdf` does a file.

    With ``overwrite`` a store at ``path`` is replaced; any other folder is not, and no store that ``obj`` is read from.
    xarray decodes it in float64, since JSON has no float32: the values are the same numbers. The attribute
    ``unpacked_dtype`` says their type, to which ``aqt-lite unpack`` returns.
    """
    bound = _the_bound(max_abs_err, kwargs)
    _check_whole(kwargs)
    if os.path.exists(path) and not overwrite:
        raise FileExistsError(f"{os.fspath(path)} exists: give another path, or overwrite=True")
    sources = _sources(_as_dataset(obj))
    check_replaceable(path, store=True, sources=sources)
    ds, chosen = packed(obj, bound, dtype, encoding, says_type=True)
    written(
        path, lambda beside: without_codecs(ds).to_zarr(beside, encoding=chosen, **kwargs), store=True, sources=sources
    )


# ---- the accessor


class _Accessor:
    """What a DataArray and a Dataset share."""

    def __init__(self, obj: Any) -> None:
        self._obj = obj

    def quantize(
        self, dtype: Any = "int8", *, granularity: Granularity | Mapping[Hashable, int] | None = None, **how: Any
    ) -> xr.Dataset:
        """Codes and scales, with all labels: :func:`aqt_lite.xarray.quantize`."""
        return quantize(self._obj, dtype, granularity=granularity, **how)

    def bitround(self, keepbits: Any = None, **how: Any) -> Any:
        """The same values with few significant bits: :func:`aqt_lite.xarray.bitround`."""
        return bitround(self._obj, keepbits, **how)

    def cf_encoding(self, *, max_abs_err: Any, dtype: Any = "auto", value_range: Any = None) -> dict[Any, Any]:
        """How to pack it: :func:`aqt_lite.xarray.cf_encoding`."""
        return cf_encoding(self._obj, max_abs_err=max_abs_err, dtype=dtype, value_range=value_range)

    def to_netcdf(self, path: Any, *, max_abs_err: Any = None, dtype: Any = "auto", **kwargs: Any) -> None:
        """Write a packed file: :func:`aqt_lite.xarray.to_netcdf`."""
        to_netcdf(self._obj, path, max_abs_err=max_abs_err, dtype=dtype, **kwargs)

    def to_zarr(self, path: Any, *, max_abs_err: Any = None, dtype: Any = "auto", **kwargs: Any) -> None:
        """Write a packed store: :func:`aqt_lite.xarray.to_zarr`."""
        to_zarr(self._obj, path, max_abs_err=max_abs_err, dtype=dtype, **kwargs)


@xr.register_dataarray_accessor("aqt")  # type: ignore[no-untyped-call]
class DataArrayAccessor(_Accessor):
    """``da.aqt``: quantize a DataArray, pack it, write it."""


@xr.register_dataset_accessor("aqt")  # type: ignore[no-untyped-call]
class DatasetAccessor(_Accessor):
    """``ds.aqt``: quantize a Dataset, dequantize one, pack it, write it."""

    def dequantize(self, dtype: Any = None) -> xr.Dataset:
        """Values in place of codes: :func:`aqt_lite.xarray.dequantize`."""
        return dequantize(self._obj, dtype)
