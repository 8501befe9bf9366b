"""Objects that look like arrays and are none that can be quantized: their libraries, and how to get an array.

Owns: that table. Imports: nothing of this package.
"""

from __future__ import annotations

from typing import Any

__all__ = ["refusal"]

_CARRIES_A_UNIT = "carries a unit, which codes cannot"
_HAS_LABELS = "has labels, which codes cannot keep"
_ON_DISK = "is a file, not an array in memory"
_OTHER = "is not an array of the Array API standard"
_SPARSE = "is sparse, and codes are not"

_WAYS: dict[str, tuple[str, str]] = {  # module that defines the type: why not, and the way
    "astropy.units": (_CARRIES_A_UNIT, "{x}.value"),
    "awkward": ("may be ragged", "awkward.to_numpy({x})"),
    "blosc2": ("is compressed, and computes by its own rules", "{x}[...]"),
    "cupyx": (_SPARSE, "{x}.toarray()"),
    "dask.dataframe": (_HAS_LABELS, "{x}.to_dask_array(lengths=True)"),
    "h5py": (_ON_DISK, "{x}[...]"),
    "paddle": (_OTHER, "{x}.numpy()"),
    "pandas": (_HAS_LABELS, "{x}.to_numpy()"),
    "pint": (_CARRIES_A_UNIT, "{x}.magnitude"),
    "polars": (_OTHER, "{x}.to_numpy()"),
    "pyarrow": (_OTHER, "np.asarray({x})"),
    "scipy.sparse": (_SPARSE, "{x}.toarray()"),
    "sparse": (_SPARSE, "{x}.todense()"),
    "tensorflow": (_OTHER, "{x}.numpy()"),
    "unyt": (_CARRIES_A_UNIT, "{x}.value"),
    "xarray": (_HAS_LABELS, "{x}.values (or {x}.data, to keep Dask's arrays)"),
    "zarr": (_ON_DISK, "{x}[...]"),
}


def refusal(x: Any, argument: str) -> str | None:
    """What ``x`` is and what to pass instead, where its library is in the table; else None."""
    for cls in type(x).__mro__:
        root, _, rest = cls.__module__.partition(".")
        module = root if root in _WAYS else f"{root}.{rest.partition('.')[0]}"
        if module in _WAYS:
            why, way = _WAYS[module]
            name = f"{root}.{type(x).__name__}"
            return f"{argument} is of type {name}, which {why}: pass {way.format(x=argument)}"
    return None
