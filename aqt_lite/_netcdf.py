"""Files of netCDF, copied as they are but for some variables: groups, dimensions, types, attributes and filters.

Owns: the copy, and the comparison of what is to be the same. Imports: netCDF4, xarray's encoding of what is replaced,
boxes of arrays. Only the command line imports it.

Nothing is decoded, so that nothing is lost that a decoder does not know: dimensions that no variable has or that groups
inherit, text of either kind, enumerations, compounds and ragged arrays. What netCDF4 itself cannot read is refused.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import netCDF4
import numpy as np
import xarray as xr

from aqt_lite._parts import boxes

__all__ = ["Changes", "composed", "copy", "difference"]

Changes = Mapping[str, Mapping[Any, "xr.Variable | None"]]
"""By the path of a group and the name of a variable: what it is to be, with its encoding; None: it is left out."""

_MOST_ELEMENTS = 1 << 21
"""Elements that are copied together."""

_OF_XARRAY = {"least_significant_digit"}
"""Attributes that it takes away, and hands to netCDF4 as an instruction to round once more."""

_COMPRESSIONS = ("zlib", "zstd", "bzip2")
"""Those that take a level and nothing else; what is compressed in another way is so by zlib in the copy."""


def composed(path: str) -> dict[str, list[str]]:
    """By the paths of all groups, "/" first: variables whose elements are compounds or ragged arrays."""
    with _opened(path) as file:
        return {
            group.path: [name for name, variable in group.variables.items() if _is_composed(variable)]
            for group in _walk(file)
        }


def copy(source: str, target: str, changes: Changes) -> None:
    """Write the file ``target`` as ``source`` is, but for ``changes``, of which ``source`` may still be read."""
    with _opened(source) as a, _opened(target, "w") as b:
        for group in _walk(a):
            _copy_group(group, b if group.path == "/" else b.createGroup(group.path), changes.get(group.path, {}))


def difference(source: str, target: str, changed: Mapping[str, Collection[Any]]) -> str | None:
    """What of ``source`` is not in ``target``, but for variables that changed; None where all is.

    Groups, dimensions and variables, each with its type, its dimensions and every bit.
    """
    with _opened(source) as a, _opened(target) as b:
        there = {group.path: group for group in _walk(b)}
        for group in _walk(a):
            if group.path not in there:
                return f"group {group.path} is not written"
            found = _difference(group, there[group.path], changed.get(group.path, ()))
            if found is not None:
                return found if group.path == "/" else f"group {group.path}: {found}"
    return None


@contextmanager
def _opened(path: str, mode: Any = "r") -> Iterator[Any]:
    """A file whose values are read and written as they lie there."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(unsupported|skipping).*")  # a type that netCDF4 would leave out
        try:
            file = netCDF4.Dataset(path, mode)
        except UserWarning as warning:
            raise ValueError(f"{path} has what netCDF4 cannot read: {warning}") from None
    with file:
        file.set_auto_maskandscale(False)
        file.set_auto_chartostring(False)
        yield file


def _walk(group: Any) -> Iterator[Any]:
    yield group
    for inner in group.groups.values():
        yield from _walk(inner)


def _is_composed(variable: Any) -> bool:
    return variable.dtype is not str and isinstance(variable.datatype, netCDF4.CompoundType | netCDF4.VLType)


# ---- copying


def _copy_group(a: Any, b: Any, changes: Mapping[Any, xr.Variable | None]) -> None:
    left_out = {name for name, variable in changes.items() if variable is None}
    kept = {dim for name, variable in a.variables.items() if name not in left_out for dim in variable.dimensions}
    gone = {dim for name in left_out for dim in a.variables[name].dimensions} - kept
    for name, dim in a.dimensions.items():
        if name not in gone:
            b.createDimension(name, None if dim.isunlimited() else len(dim))
    _copy_types(a, b)
    _set_attributes(a, b)
    for name, variable in a.variables.items():
        if name not in changes:
            _copy_variable(variable, b)
        elif (anew := changes[name]) is not None:
            created = _write_variable(name, anew, b)
            for key in _OF_XARRAY & {*variable.ncattrs()}:
                created.setncattr(key, variable.getncattr(key))
    for name, new in changes.items():
        if name not in a.variables and new is not None:
            _write_variable(name, new, b)


def _copy_types(a: Any, b: Any) -> None:
    for name, enum in a.enumtypes.items():
        b.createEnumType(enum.dtype, name, enum.enum_dict)
    for name, compound in a.cmptypes.items():
        b.createCompoundType(compound.dtype, name)
    for name, ragged in a.vltypes.items():
        b.createVLType(ragged.dtype, name)


def _type_in(group: Any, datatype: Any) -> Any:
    """The type of that name in a group or those that it lies in; what is no type of a file is itself."""
    if not isinstance(datatype, netCDF4.EnumType | netCDF4.CompoundType | netCDF4.VLType):
        return datatype
    while group is not None:
        for kind in (group.enumtypes, group.cmptypes, group.vltypes):
            if datatype.name in kind:
                return kind[datatype.name]
        group = group.parent
    raise ValueError(f"the type {datatype.name!r} is used outside of the group that has it, which is not copied")


def _set_attributes(a: Any, b: Any) -> None:
    for name in a.ncattrs():
        if name != "_FillValue":
            b.setncattr(name, a.getncattr(name))


def _copy_variable(a: Any, group: Any) -> None:
    chunks = a.chunking()
    filters = a.filters() or {}
    method = next((name for name in _COMPRESSIONS if filters.get(name)), None)
    other = any(filters.get(name) for name in ("szip", "blosc"))
    created = group.createVariable(
        a.name,
        str if a.dtype is str else _type_in(group, a.datatype),
        a.dimensions,
        compression="zlib" if other else method,
        complevel=filters.get("complevel", 4),
        shuffle=bool(filters.get("shuffle")),
        fletcher32=bool(filters.get("fletcher32")),
        contiguous=chunks == "contiguous",
        chunksizes=chunks if isinstance(chunks, list) else None,
        endian=a.endian() if not _is_composed(a) and a.dtype is not str else "native",
        fill_value=a.getncattr("_FillValue") if "_FillValue" in a.ncattrs() else None,
    )
    _quiet(created)
    _set_attributes(a, created)
    for box in _boxes(a):
        created[box] = a[box]


def _write_variable(name: Any, variable: xr.Variable, group: Any) -> Any:
    """A variable of xarray by its encoding, chunk by chunk as Dask has it."""
    from xarray.conventions import encode_cf_variable

    chunks, how = variable.encoding.get("chunksizes"), dict(variable.encoding)
    encoded = encode_cf_variable(variable, name=name)
    attributes = dict(encoded.attrs)
    for dim, length in encoded.sizes.items():
        if not _has_dimension(group, dim):
            group.createDimension(dim, length)
    created = group.createVariable(
        name,
        encoded.dtype,
        encoded.dims,
        compression="zlib" if how.get("zlib") else None,
        complevel=how.get("complevel", 4),
        shuffle=bool(how.get("shuffle")),
        chunksizes=chunks,
        fill_value=attributes.pop("_FillValue", None),
    )
    _quiet(created)
    for key, value in attributes.items():
        created.setncattr(key, value)
    ends = [np.cumsum((0, *sizes)) for sizes in encoded.chunks or [(n,) for n in encoded.shape]]
    for index in np.ndindex(*(len(of_axis) - 1 for of_axis in ends)):
        box = tuple(slice(int(of_axis[i]), int(of_axis[i + 1])) for of_axis, i in zip(ends, index, strict=True))
        if encoded.size:
            created[box] = encoded[box].values
    return created


def _quiet(variable: Any) -> None:
    variable.set_auto_maskandscale(False)
    variable.set_auto_chartostring(False)


def _has_dimension(group: Any, name: Any) -> bool:
    while group is not None:
        if name in group.dimensions:
            return True
        group = group.parent
    return False


def _boxes(variable: Any) -> Iterator[Any]:
    """Slices that together are the whole variable, in whole chunks where those are not larger than what is read."""
    if not variable.ndim:
        yield ...
    elif math.prod(variable.shape):
        chunks = variable.chunking()
        block = tuple(chunks) if isinstance(chunks, list) else None
        for box in boxes(tuple(variable.shape), _MOST_ELEMENTS, range(variable.ndim), block):
            yield tuple(slice(*ends) for ends in box)


# ---- comparing


def _difference(a: Any, b: Any, changed: Collection[Any]) -> str | None:
    used = set(itertools.chain.from_iterable(v.dimensions for name, v in a.variables.items() if name not in changed))
    for name, dim in a.dimensions.items():
        there = b.dimensions.get(name)
        if there is None and name not in used:
            continue  # it may have been that of what changed, and others write none that they do not need
        if there is None or len(there) != len(dim):
            return f"dimension {name!r} is not read again as it was written"
    for name, variable in a.variables.items():
        if name not in changed and not (name in b.variables and _same(variable, b.variables[name])):
            return f"variable {name!r} is not read again as it was written"
    return None


def _same(a: Any, b: Any) -> bool:
    if (a.dimensions, a.shape) != (b.dimensions, b.shape) or not _same_type(a, b):
        return False
    return all(_same_values(a[box], b[box]) for box in _boxes(a))


def _same_type(a: Any, b: Any) -> bool:
    """Whether types are the same but for the order of bytes, which is a matter of how they are kept."""
    if a.dtype is str or b.dtype is str:
        return bool(a.dtype is b.dtype)
    return bool(a.dtype.newbyteorder("=") == b.dtype.newbyteorder("=") and _is_composed(a) == _is_composed(b))


def _same_values(x: Any, y: Any) -> bool:
    """Bit for bit. Ragged arrays are arrays of arrays."""
    if isinstance(x, str):
        return bool(x == y)
    x, y = np.asarray(x), np.asarray(y)
    if x.dtype == object:
        pairs = zip(x.ravel(), y.ravel(), strict=True)
        return x.shape == y.shape and all(_same_values(left, right) for left, right in pairs)
    return bool(x.shape == y.shape and x.tobytes() == y.astype(x.dtype).tobytes())
