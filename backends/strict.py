"""array-api-strict: the standard and nothing but the standard, to prove that the contract needs no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite.backends.numpy import without_warnings


class StrictBackend(Backend):
    """array-api-strict on its CPU device."""

    name = "array_api_strict"
    array_modules = ("array_api_strict",)
    xp = array_api_strict

    def asarray(self, values: np.ndarray[Any, Any], like: Array | None = None) -> Array:
        if not hasattr(array_api_strict, values.dtype.name):
            raise ValueError(f"array_api_strict has no dtype {values.dtype.name}: convert to float32 or float64 first")
        native = np.array(values, dtype=values.dtype.newbyteorder("="))  # a copy: a view of a buffer may be written to
        return array_api_strict.asarray(native, device=None if like is None else like.device)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return without_warnings(function)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        return np.asarray(x.to_device(array_api_strict.Device("CPU_DEVICE")))
