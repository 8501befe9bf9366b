"""The adapter of any other Array API library: what the standard gives, and what a few libraries need beyond it.

Owns: ``GenericBackend``, one instance a library. Imports: the ``Backend`` interface; no library before an array of it
turns up.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from aqt_lite._foreign import refusal
from aqt_lite._kernels import Kernel, Kernels
from aqt_lite._namespace import Array, array_namespace, device_of, is_lazy
from aqt_lite._progress import over_tasks
from aqt_lite._protocol import Backend, IntLimits, overflow_of

__all__ = ["GenericBackend"]


class GenericBackend(Backend):
    """One library known only by its namespace; its name is the namespace's.

    The contract then rests on the library's own division being correctly rounded and on its compiler, if it has one,
    keeping each rounding: ``aqt_lite.testing.check_backend`` tells.
    """

    array_modules = ()
    _known: ClassVar[dict[str, GenericBackend]] = {}

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self.name = _library(xp)  # type: ignore[misc]

    @classmethod
    def for_array(cls, x: Array) -> GenericBackend:
        """The one adapter of the library of ``x``."""
        xp = array_namespace(x)
        return cls._known.setdefault(xp.__name__, _ADAPTERS.get(_library(xp), cls)(xp))

    @property
    def xp(self) -> Any:
        return self._xp

    def asarray(self, values: np.ndarray[Any, Any], like: Array | None = None) -> Array:
        name = values.dtype.name
        dtype = self.dtype(name)
        native = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")  # a copy: it may become the array
        device = None if like is None else self.device(like)
        where = {} if device is None else {"device": device}
        try:
            return self._xp.asarray(native, dtype=dtype, **where)
        except (TypeError, ValueError):  # a library that does not know NumPy; numbers become Python's without rounding
            return self._xp.asarray(native.tolist(), dtype=dtype, **where)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        if self.dtype_name(x) == "bfloat16":  # no exchange format knows it, and float32 holds it exactly
            wide = np.asarray(self.to_numpy(self._xp.astype(x, self.dtype("float32"))))
            return wide.astype(ml_dtypes.bfloat16)
        try:
            values = np.asarray(x)
        except (TypeError, ValueError, RuntimeError) as error:  # arrays on another device answer through DLPack alone
            return self._by_dlpack(x, error)
        return self._by_dlpack(x, None) if values.dtype == object else values  # of what NumPy does not know

    def _by_dlpack(self, x: Array, why: Exception | None) -> np.ndarray[Any, Any]:
        if not hasattr(x, "__dlpack__"):
            said = "" if why is None else f" ({why})"
            raise TypeError(
                f"arrays of {self.name} become none of NumPy's: they have no __dlpack__, and no __array__ that answers"
                f"{said}. They need an adapter, a class of about 20 lines: CONTRIBUTING.md, Add a backend"
            ) from why
        return np.from_dlpack(x, device="cpu", copy=True)

    def dtype_name(self, x: Array) -> str:
        return str(getattr(x.dtype, "name", x.dtype)).rsplit(".", 1)[-1]  # NumPy's str() shows the byte order

    def int_limits(self, dtype: str) -> IntLimits:
        info = self._xp.iinfo(self.dtype(dtype))
        least, largest = int(info.min), int(info.max)
        return IntLimits(bits=(largest - least).bit_length(), min=least, max=largest)

    def device(self, x: Array) -> Any:
        try:
            return device_of(x)
        except AttributeError:  # a library of one memory, whose arrays have no device
            return None

    def is_traced(self, x: Array) -> bool:
        return is_lazy(x)

    def why_unusable(self, x: Array) -> str | None:
        if not all(isinstance(n, int) for n in x.shape):
            return f"has shape {tuple(x.shape)}: the length of every axis must be known"
        return None


class _Dask(GenericBackend):
    """Dask: a graph of tasks over NumPy arrays, one a chunk; nothing is computed before somebody asks for values.

    Nothing here asks. What other libraries check at once is checked when the chunk is computed.
    """

    def dtype(self, name: str) -> Any:
        return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        return np.asarray(x)

    def is_traced(self, x: Array) -> bool:
        return False

    def is_deferred(self, x: Array) -> bool:
        return True

    def computed(self, *arrays: Array | None) -> tuple[Array | None, ...]:
        return tuple(importlib.import_module("dask").persist(*arrays))

    def kernel(self, operation: Callable[..., Any]) -> Kernel | None:
        kernels: Kernels = importlib.import_module("aqt_lite.backends.dask").KERNELS
        return kernels.get(operation)

    def on_chunks(self, look: Callable[..., Any], *arrays: Array) -> list[Any]:
        dask: Any = importlib.import_module("dask")
        first, *rest = arrays
        cut = [first, *(a.rechunk(first.chunks) for a in rest)]
        chunks = [a.to_delayed().ravel() for a in cut]
        tasks = [dask.delayed(look)(*parts) for parts in zip(*chunks, strict=True)]
        with over_tasks(tasks):
            return list(dask.compute(*tasks))

    def largest_of_chunks(self, look: Callable[..., float], *arrays: Array) -> Array:
        first, *rest = arrays
        numbers = first.map_blocks(
            _number_of,
            *(a.rechunk(first.chunks) for a in rest),
            look=look,
            chunks=tuple((1,) * n for n in first.numblocks),
            dtype=np.float64,
            meta=np.empty((0,) * first.ndim),
        )
        return numbers.max()

    def check_when_computed(self, x: Array, check: Callable[..., None], *beside: Array) -> Array:
        cut = (a.rechunk(x.chunks) for a in beside)
        return x.map_blocks(_checked, *cut, check=check, dtype=x.dtype, meta=x._meta)

    def check_no_overflow(self, values: Array, argument: str) -> Array:
        return self.check_when_computed(values, partial(_no_infinity, argument=argument))

    def why_unusable(self, x: Array) -> str | None:
        if any(n != n for n in x.shape):
            return f"has chunks of unknown size (shape {tuple(x.shape)}): call x.compute_chunk_sizes() first"
        if isinstance(x._meta, np.ma.MaskedArray):
            return "has masked chunks, and codes have no mask: fill them first, as with x.map_blocks(np.ma.filled)"
        why = refusal(x._meta, "a chunk")
        return None if why is None else f"has chunks of another library ({why}): convert them with x.map_blocks"


class _Ndonnx(GenericBackend):
    """ndonnx: a graph of ONNX operators; arrays have values unless they stand for an input of the graph."""

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        return np.asarray(x.unwrap_numpy())

    def bits_of(self, x: Array) -> Array:
        if self.is_traced(x):
            raise TypeError(f"{self.name} has no operator that reads a float's bits: round arrays with values")
        return super().bits_of(x)

    def is_traced(self, x: Array) -> bool:
        try:
            x.unwrap_numpy()
        except ValueError:
            return True
        return False


class _Mlx(GenericBackend):
    """MLX: the standard's names, without the dtype of a sum; and derivatives."""

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        self._xp = _MlxNamespace(xp)

    def stop_gradient(self, x: Array) -> Array:
        return self._xp.stop_gradient(x)

    def straight_through(self, x: Array, y: Array, inside: Array) -> Array:
        xp = self._xp

        def chosen(x: Array, y: Array, inside: Array) -> Array:
            return y

        def vjp(primals: Any, cotangent: Array, output: Array) -> tuple[Array, Array, Array]:
            _, y, inside = primals
            return xp.where(inside, cotangent, xp.zeros_like(cotangent)), xp.zeros_like(y), xp.zeros_like(inside)

        function = xp.custom_function(chosen)
        function.vjp(vjp)
        return function(x, y, inside)


class _MlxNamespace:
    """``mlx.core`` with what it lacks."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def sum(self, x: Array, *, axis: Any = None, dtype: Any = None, keepdims: bool = False) -> Array:
        """The sum over ``axis``, computed in ``dtype``."""
        return self._core.sum(x if dtype is None else x.astype(dtype), axis=axis, keepdims=keepdims)

    def signbit(self, x: Array) -> Array:
        """Where numbers are negative, or -0.0."""
        return (x < 0) | ((x == 0) & (1 / x < 0))


_ADAPTERS: dict[str, type[GenericBackend]] = {"dask": _Dask, "mlx": _Mlx, "ndonnx": _Ndonnx}
"""Libraries whose arrays need more than the standard says."""


def _library(xp: Any) -> str:
    name: str = xp.__name__
    return name.removeprefix("array_api_compat.").partition(".")[0]


def _checked(
    chunk: np.ndarray[Any, Any],
    *beside: np.ndarray[Any, Any],
    check: Callable[..., None],
    block_info: Any = None,
) -> np.ndarray[Any, Any]:
    """``chunk``, after ``check``, which is told where it begins; Dask fills in ``block_info`` by its name."""
    check(chunk, tuple(start for start, _ in block_info[0]["array-location"]), *beside)
    return chunk


def _number_of(*chunks: np.ndarray[Any, Any], look: Callable[..., float]) -> np.ndarray[Any, Any]:
    """What ``look`` says of chunks of several arrays, with their axes."""
    return np.full((1,) * chunks[0].ndim, look(*chunks))


def _no_infinity(values: np.ndarray[Any, Any], start: tuple[int, ...], argument: str) -> None:
    if np.isinf(values).any():
        raise overflow_of(argument)
