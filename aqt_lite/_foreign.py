"""Objects that look like arrays and are none that can be quantized: their libraries, and how to get an array.

Owns: that table. Imports: nothing of this package.
"""

from __future__ import annotations

from typing import Any

__all__ = ["refusal"]

_DISK = "which is read from storage when it is indexed"
_LABELS = "and its labels would be lost"
_OTHER = "which does not follow the Array API standard"
_SPARSE = "which is sparse, and codes are dense"
_UNIT = "and its unit would be lost"

_WAYS: dict[str, tuple[str, str]] = {  # module that defines the type: why not, and what to pass
    "astropy.units": (_UNIT, "{x}.value"),
    "awkward": ("which may be ragged", "awkward.to_numpy({x})"),
    "blosc2": ("which is compressed", "{x}[...]"),
    "cupyx": (_SPARSE, "{x}.toarray()"),
    "dask.dataframe": (_LABELS, "{x}.to_dask_array(lengths=True)"),
    "h5py": (_DISK, "{x}[...]"),
    "paddle": (_OTHER, "{x}.numpy()"),
    "pandas": (_LABELS, "{x}.to_numpy()"),
    "pint": (_UNIT, "{x}.magnitude"),
    "polars": (_OTHER, "{x}.to_numpy()"),
    "pyarrow": (_OTHER, "np.asarray({x})"),
    "scipy.sparse": (_SPARSE, "{x}.toarray()"),
    "sparse": (_SPARSE, "{x}.todense()"),
    "tensorflow": (_OTHER, "{x}.numpy()"),
    "unyt": (_UNIT, "{x}.value"),
    "xarray": (_LABELS, "{x}.values (or {x}.data, to keep an array of Dask)"),
    "zarr": (_DISK, "{x}[...]"),
}


def refusal(x: Any, argument: str) -> str | None:
    """What ``x`` is and what to pass instead, where its library is in the table; else None."""
    for cls in type(x).__mro__:
        root, _, rest = cls.__module__.partition(".")
        module = root if root in _WAYS else f"{root}.{rest.partition('.')[0]}"
        if module in _WAYS:
            why, way = _WAYS[module]
            return f"{argument} is of type {root}.{type(x).__name__}, {why}: pass {way.format(x=argument)}"
    return None
