"""The five members that an adapter must have; the defaults are right for an eager library on a CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

import wrapped_numpy
from aqt_lite.testing import Backend


class WrappedBackend(Backend):
    """The library ``wrapped_numpy``."""

    name = "wrapped_numpy"
    array_modules = ("wrapped_numpy",)
    xp = wrapped_numpy

    def asarray(self, values: np.ndarray[Any, Any], like: Any = None) -> Any:
        if values.dtype.name == "bfloat16":
            raise ValueError("wrapped_numpy has no dtype bfloat16: convert it to float32 first")
        return wrapped_numpy.Array(values.astype(values.dtype.newbyteorder("=")))

    def to_numpy(self, x: Any) -> np.ndarray[Any, Any]:
        return x._data
