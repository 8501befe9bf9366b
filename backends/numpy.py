"""NumPy, and everything whose arrays are NumPy's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from aqt_lite._namespace import Array, wrapped_namespace
from aqt_lite._protocol import Backend


def without_warnings(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` without NumPy's warnings: the contract says what overflow and NaN become, and they become that."""

    @functools.wraps(function)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return quiet


@functools.cache
def _of_arrays_in_memory(operation: Callable[..., Any]) -> Callable[..., Any]:
    """``operation``, quiet: arrays on disks are read whole here; kernels read them in parts."""

    @functools.wraps(operation)
    def call(*arrays: Any, **static: Any) -> Any:
        with np.errstate(all="ignore"):
            return operation(*(np.asarray(a) if hasattr(a, "__array__") else a for a in arrays), **static)

    return call


@functools.cache
def _name(dtype: Any) -> str:
    return str(dtype.name)  # the same for either byte order


class NumpyBackend(Backend):
    """NumPy on the CPU."""

    name = "numpy"
    array_modules = ("numpy", "ml_dtypes")
    permutes_views = True
    xp = wrapped_namespace("numpy", clip=np.clip)  # bounds are numbers of the array's type here: nothing is promoted

    def asarray(self, values: np.ndarray[Any, Any], like: Array | None = None) -> Array:
        return np.array(values)  # a copy: what another library gave may be written to there

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        return np.asarray(x)

    def floats_of(self, bits: Array, name: str) -> Array:
        return bits.view(self.dtype(name))

    def fraction_and_exponent(self, x: Array) -> tuple[Array, Array]:
        fraction, exponent = np.frexp(x)
        zero = np.int32(-127 if x.dtype.itemsize == 4 else -1023)
        return fraction * x.dtype.type(2), np.where(x == 0, zero, exponent - np.int32(1))

    def power_of_two(self, e: Array) -> Array:
        return np.ldexp(np.float32(1), np.where(e < -100, np.int32(-1000), e))

    def contiguous(self, x: Array) -> Array:
        return np.ascontiguousarray(x)

    def by_columns(self, x: Array) -> Array:
        return np.asfortranarray(x)

    def is_by_columns(self, x: Array) -> bool:
        return bool(x.flags.f_contiguous)

    def arange(self, start: int, stop: int, like: Array) -> Array:
        return np.arange(start, stop, dtype=np.int32)

    def has_nan(self, x: Array) -> bool:
        return bool(x.size and np.isnan(x.max()))  # which needs no memory

    def to_device(self, x: Array, device: Any) -> Array:
        if device != "cpu":
            raise ValueError(f"device={device!r}: NumPy has one device, 'cpu'")
        return x

    def dtype(self, name: str) -> Any:
        return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)

    def dtype_name(self, x: Array) -> str:
        return _name(x.dtype)

    def device(self, x: Array) -> Any:
        return "cpu"

    def share_a_device(self, x: Array, y: Array) -> bool:
        return True

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return _of_arrays_in_memory(function)

    def why_unusable(self, x: Array) -> str | None:
        if isinstance(x, np.ma.MaskedArray):
            return "is a masked array, which only quantize and error_report take: give x.filled(np.nan), for instance"
        if isinstance(x, np.matrix):
            return "is a numpy.matrix, which is never other than two-dimensional: use np.asarray(x)"
        return None
