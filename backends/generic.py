"""Any other Array API library (CuPy, Dask, ndonnx, ...): what the standard gives, and nothing more."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from aqt_lite._namespace import Array, array_namespace, is_lazy
from aqt_lite._protocol import Backend


class GenericBackend(Backend):
    """One library known only by its namespace; its name is the namespace's.

    The contract then rests on the library's own division being correctly rounded and on its compiler, if it has one,
    keeping each rounding: ``aqt_lite.testing.check_backend`` tells.
    """

    array_modules = ()
    _known: ClassVar[dict[str, GenericBackend]] = {}

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self.name = xp.__name__.removeprefix("array_api_compat.").partition(".")[0]  # type: ignore[misc]

    @classmethod
    def for_array(cls, x: Array) -> GenericBackend:
        """The one adapter of the library of ``x``."""
        xp = array_namespace(x)
        return cls._known.setdefault(xp.__name__, cls(xp))

    @property
    def xp(self) -> Any:
        return self._xp

    def asarray(self, values: np.ndarray[Any, Any], like: Array | None = None) -> Array:
        name = values.dtype.name
        if not hasattr(self._xp, name):
            raise ValueError(f"{self.name} has no dtype {name}: convert to one that it has")
        native = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")).reshape(values.shape)
        try:
            return self._xp.asarray(native, dtype=self.dtype(name))
        except (TypeError, ValueError):
            return self._xp.asarray(native.tolist(), dtype=self.dtype(name))

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        try:
            return np.asarray(x)
        except (TypeError, ValueError, RuntimeError):  # arrays on another device answer through DLPack alone
            return np.from_dlpack(x, device="cpu", copy=True)

    def is_traced(self, x: Array) -> bool:
        return is_lazy(x)
