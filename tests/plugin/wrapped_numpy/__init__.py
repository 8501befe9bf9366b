"""An array library with a type of its own: NumPy's arrays in a wrapper, seen through the Array API standard alone."""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy as _library
import numpy as np


class Array:
    """One array. It is no ``numpy.ndarray`` and does not turn into one by itself."""

    __array_ufunc__ = None  # NumPy leaves operators to this class

    def __init__(self, data: Any) -> None:
        self._data = np.asarray(data)

    dtype = property(lambda self: self._data.dtype)
    shape = property(lambda self: self._data.shape)
    ndim = property(lambda self: self._data.ndim)
    size = property(lambda self: self._data.size)
    device = "cpu"

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        import wrapped_numpy

        return wrapped_numpy

    def to_device(self, device: str, /) -> Array:
        return self

    def __getitem__(self, index: Any) -> Array:
        return Array(self._data[index])

    def __bool__(self) -> bool:
        return bool(self._data)


def _unwrapped(x: Any) -> Any:
    if isinstance(x, Array):
        return x._data
    return [_unwrapped(item) for item in x] if isinstance(x, list) else x


def _function(f: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            result = f(*map(_unwrapped, args), **{name: _unwrapped(value) for name, value in kwargs.items()})
        return Array(result) if isinstance(result, np.ndarray | np.generic) else result

    return call


_BINARY = ("add", "sub", "mul", "truediv", "and", "or", "xor")
_OTHERS = ("lshift", "rshift", "lt", "le", "gt", "ge", "eq", "ne", "neg", "invert")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHERS):
    setattr(Array, f"__{_name}__", _function(getattr(np.ndarray, f"__{_name}__")))


def __getattr__(name: str) -> Any:
    """The standard's functions, constants and dtypes."""
    found = getattr(_library, name)
    return _function(found) if callable(found) and not isinstance(found, type) else found
