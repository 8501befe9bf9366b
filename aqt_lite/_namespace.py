"""The only door to array-api-compat.

Owns: which standard-conforming namespace speaks for an array. Imports: array-api-compat alone.
"""

from __future__ import annotations

import importlib
import types
from typing import Any, Protocol

import array_api_compat

Array = Any
"""An array of any backend, computed with. The standard has no runtime type for it yet."""


class AnyArray(Protocol):
    """What every library's arrays have, so that a type checker tells them from a file's name."""

    @property
    def shape(self) -> Any:
        """Length of each axis."""

    @property
    def dtype(self) -> Any:
        """The library's dtype object."""

    def __getitem__(self, key: Any, /) -> Any:
        """Indexing."""


Numbers = AnyArray | float | list[Any] | tuple[Any, ...]
"""What users give where an array is wanted: an array of any library, a number, or nested lists of numbers."""


def array_namespace(x: Array) -> Any:
    """The Array API namespace of one array; TypeError where the array has none."""
    return array_api_compat.array_namespace(x)


def wrapped_namespace(library: str, **functions: Any) -> Any:
    """array-api-compat's wrapper of a library that does not speak the whole standard itself, with other ``functions``.

    A module, as Dynamo traces functions of no other object as well.
    """
    found = types.ModuleType(f"aqt_lite.{library}")
    wrapper = vars(importlib.import_module(f"array_api_compat.{library}"))
    vars(found).update({name: value for name, value in wrapper.items() if name[:2] != "__"} | functions)
    return found


def is_array(x: object) -> bool:
    """Whether any Array API library known to array-api-compat, or conforming by itself, made ``x``."""
    return bool(array_api_compat.is_array_api_obj(x))


def is_lazy(x: Array) -> bool:
    """Whether looking at a value of ``x`` would run a deferred computation (Dask, ndonnx)."""
    return bool(array_api_compat.is_lazy_array(x))


def device_of(x: Array) -> Any:
    """The device that holds ``x``, in the library's own words."""
    return array_api_compat.device(x)
