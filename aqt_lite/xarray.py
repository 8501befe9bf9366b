"""xarray: packing that keeps a bound, for ``to_netcdf`` and ``to_zarr``.

Owns: labelled arrays in and out. Imports: xarray; the CF arithmetic (``cf``). Import it as ``import aqt_lite.xarray``;
``import aqt_lite`` alone imports no xarray.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from aqt_lite import cf

__all__ = ["cf_encoding"]

_OF_PACKED = ("scale_factor", "add_offset", "_FillValue", "missing_value", "valid_min", "valid_max", "valid_range")
"""Attributes that speak of the codes once a variable is packed."""


def cf_encoding(
    obj: xr.DataArray | xr.Dataset, *, max_abs_err: float | Mapping[Hashable, float], dtype: Any = "auto"
) -> dict[Any, Any]:
    """How to pack a variable, or those of a Dataset, so that what is read again is within ``max_abs_err``.

    The result is xarray's ``encoding``: integers, ``scale_factor``, ``add_offset`` and a ``_FillValue`` for NaN, as the
    CF conventions have them, which every reader of netCDF unpacks. The bound is on what it makes of them, its rounding
    included, and is checked on every element, chunk by chunk. :mod:`aqt_lite.cf` says how the numbers are chosen.

    Parameters
    ----------
    obj : DataArray or Dataset
        float32 or float64; arrays of Dask are computed twice, for the range and for the check, and never held whole.
    max_abs_err : float, or mapping of names of variables to floats
        The largest error allowed, in units of the data. One number serves all floating-point variables of a Dataset;
        a mapping says which are packed.
    dtype : {"auto", "int8", "int16", "int32", "uint8", "uint16"}
        Of the codes. "auto": the smallest of int8, int16 and int32 that keeps the bound.

    Returns
    -------
    dict
        Of a DataArray, its encoding. Of a Dataset, one encoding a variable, as ``encoding=`` takes them.

    Raises
    ------
    ValueError
        A bound that the type cannot keep, with the smallest that it can; infinities; attributes that would come to mean
        something else.

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
        bounds = _bounds(obj, max_abs_err)
        return {name: cf_encoding(obj[name], max_abs_err=bound, dtype=dtype) for name, bound in bounds.items()}
    if not isinstance(obj, xr.DataArray):
        raise TypeError(f"obj is a {type(obj).__name__}, not a DataArray or Dataset; for other arrays see aqt_lite.cf")
    if isinstance(max_abs_err, Mapping):
        raise TypeError("max_abs_err is a mapping, which is for Datasets: give one number for a DataArray")
    said = [name for name in _OF_PACKED if name in obj.attrs]
    if said:
        raise ValueError(
            f"{_called(obj)} has the attribute {said[0]}={obj.attrs[said[0]]!r}, which readers would compare with "
            "codes: take it out of attrs first"
        )
    try:
        return cf.choose_packing(_readable(obj), max_abs_err=max_abs_err, dtype=dtype).encoding
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_called(obj)}: {error}") from None


def _called(obj: xr.DataArray) -> str:
    return "the DataArray" if obj.name is None else f"variable {obj.name!r}"


def _bounds(ds: xr.Dataset, max_abs_err: Any) -> dict[Hashable, float]:
    """A bound for each variable that is to be packed."""
    if isinstance(max_abs_err, Mapping):
        unknown = [name for name in max_abs_err if name not in ds.data_vars]
        if unknown:
            raise ValueError(f"max_abs_err names {unknown[0]!r}; the Dataset has the variables {list(ds.data_vars)}")
        return dict(max_abs_err)
    cf.check_bound(max_abs_err)
    found = [name for name, variable in ds.data_vars.items() if variable.dtype.kind == "f"]
    if not found:
        raise ValueError("the Dataset has no floating-point variable to pack")
    return dict.fromkeys(found, max_abs_err)


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
