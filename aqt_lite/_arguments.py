"""Turns what users pass into arrays of a known backend, or says what is wrong with it.

Owns: the checks that several public functions share. Imports: elements, the container, the registry.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aqt_lite._foreign import refusal
from aqt_lite._namespace import Array
from aqt_lite._near import shown
from aqt_lite._protocol import Backend
from aqt_lite._registry import backend_of, get_backend
from aqt_lite.elements import FLOAT_TYPES
from aqt_lite.qarray import QArray

__all__ = ["as_float_array", "check_floats"]


def as_float_array(
    x: Any, argument: str, backend: str | None = None, *, may_detach: bool = True
) -> tuple[Array, Backend]:
    """``x`` as a floating-point array of a backend, without changing a bit of it.

    Unless it ``may_detach``, an array whose derivatives are tracked stays on its backend.
    """
    if isinstance(x, QArray):
        raise TypeError(f"{argument} is a QArray already: use it as it is, or pass {argument}.dequantize()")
    b = backend_of(x)
    if b is None:
        x, b = _from_list(x, argument), get_backend("numpy")
    check_floats(x, argument, b)
    if backend is not None and backend != b.name:
        target = get_backend(backend)
        if b.is_traced(x):
            raise TypeError(f"backend={backend!r}: {argument} is being traced by {b.name} and cannot leave it")
        if not may_detach and b.differentiates(x):
            raise TypeError(
                f"backend={backend!r}: {argument} tracks derivatives, which cannot leave {b.name}: "
                f"pass {argument}.detach() if none are needed"
            )
        x, b = target.asarray(b.to_numpy(x)), target
    return x, b


def check_floats(x: Array, argument: str, b: Backend) -> None:
    """TypeError where ``x``, an array of ``b``, is no dense array of floating-point numbers."""
    problem = b.why_unusable(x)
    if problem:
        raise TypeError(f"{argument} {problem}")
    name = b.dtype_name(x)
    if name not in FLOAT_TYPES:
        raise TypeError(
            f"{argument} has dtype {name}: a floating-point array is needed ({', '.join(FLOAT_TYPES)}); "
            f"convert it first, for instance to float32"
        )


def _from_list(x: Any, argument: str) -> np.ndarray[Any, Any]:
    if not isinstance(x, int | float | list | tuple) or isinstance(x, bool):
        raise TypeError(
            refusal(x, argument)
            or f"{argument} is a {type(x).__name__}: give an array of NumPy, JAX, torch or another library, or a list"
        )
    try:
        wide = np.asarray(x)
    except ValueError as error:
        raise TypeError(f"{argument} is a list that is no array: {error}") from None
    if wide.size and wide.dtype.kind not in "iuf":
        first = shown(wide.reshape(-1)[:1].tolist()[0])
        raise TypeError(f"{argument} is a list of {wide.dtype.name}, {first} for one: give real numbers")
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float32)
    if not np.array_equal(np.isfinite(narrow), np.isfinite(wide)):
        raise ValueError(f"{argument} is a list with numbers beyond float32: make it a float64 array")
    return narrow
