"""What a backend is: the adapter that supplies what the Array API standard lacks.

Owns: the ``Backend`` interface and ``IntLimits``. Imports: NumPy, for the one exchange format between backends.

An adapter must say five things (``name``, ``array_modules``, ``xp``, ``asarray``, ``to_numpy``). Everything else has
a default that is right for an eager library on a CPU with IEEE arithmetic, and is overridden where that is not so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from aqt_lite._namespace import Array, device_of

__all__ = ["Backend", "IntLimits", "overflow_of"]


@dataclass(frozen=True)
class IntLimits:
    """The limits of an integer type, as the backend that stores it states them.

    Examples
    --------
    >>> import aqt_lite
    >>> aqt_lite.int_limits("int8")
    IntLimits(bits=8, min=-128, max=127)
    """

    bits: int
    min: int
    max: int


def overflow_of(argument: str) -> ValueError:
    """The error of a dtype that is too narrow for a result."""
    return ValueError(f"{argument} cannot hold every result, which overflow to infinity: ask for a wider type")


class Backend(ABC):
    """One array library, seen through the Array API standard plus what that lacks."""

    name: ClassVar[str]
    """What users write as ``backend=``."""

    array_modules: ClassVar[tuple[str, ...]]
    """Top-level modules that define the library's array types; how an array finds its adapter."""

    # ---- an adapter must define these

    @property
    @abstractmethod
    def xp(self) -> Any:
        """The library's Array API namespace. Importing the library happens here and not before."""

    @abstractmethod
    def asarray(self, values: np.ndarray[Any, Any], like: Array | None = None) -> Array:
        """The same bits as an array of this library, on the device of ``like`` or on the default one.

        Raises ValueError where the library cannot hold the dtype: it never rounds or narrows.
        """

    @abstractmethod
    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        """The same bits as a NumPy array (bfloat16 as ``ml_dtypes.bfloat16``)."""

    # ---- defaults: an eager library, IEEE arithmetic, no gradients

    def number(self, value: float, dtype: str, like: Array) -> Array:
        """A 0-dimensional array of that dtype, rounded to nearest, on the device of ``like``."""
        return self.asarray(np.asarray(value).astype(dtype), like=like)

    def dtype(self, name: str) -> Any:
        """The library's dtype object of that name."""
        return getattr(self.xp, name)

    def dtype_name(self, x: Array) -> str:
        """The dtype's name as NumPy and ml_dtypes spell it: 'float32', 'bfloat16', 'int8'."""
        return str(x.dtype).rsplit(".", 1)[-1]

    def int_limits(self, dtype: str) -> IntLimits:
        """Limits of an integer type, asked of the library itself."""
        info = self.xp.iinfo(self.dtype(dtype))
        return IntLimits(bits=int(info.bits), min=int(info.min), max=int(info.max))

    def device(self, x: Array) -> Any:
        """The device that holds ``x``; None where arrays have no single device."""
        return device_of(x)

    def can_meet(self, x: Array, y: Array) -> bool:
        """Whether one operation may take both ``x`` and ``y``, as far as their devices go."""
        return self.is_traced(x) or self.is_traced(y) or bool(self.device(x) == self.device(y))

    def is_traced(self, x: Array) -> bool:
        """Whether ``x`` has no values (a compiler is tracing), so that no branch may depend on them."""
        return False

    def is_deferred(self, x: Array) -> bool:
        """Whether looking at values of ``x`` would run a computation that was put off (Dask): only who asks pays."""
        return False

    def computed(self, *arrays: Array | None) -> tuple[Array | None, ...]:
        """``arrays`` with their deferred computations run, all in one go; None stays None."""
        return arrays

    def check_when_computed(self, x: Array, check: Callable[[np.ndarray[Any, Any], tuple[int, ...]], None]) -> Array:
        """``x``, whose values go through ``check`` when they are computed, where the library can be told so.

        Called with each part of the values, and the index in ``x`` of its first element. Raises what ``check`` raises.
        """
        return x

    def refuse(self, x: Array) -> str | None:
        """Why an array of this library cannot be used (sparse, masked), or None."""
        return None

    def reciprocal(self, x: Array) -> Array:
        """``1/x``, correctly rounded, for normal positive ``x``.

        The default trusts division between two arrays, which IEEE 754 makes correctly rounded on every CPU.
        Override where a compiler may replace it (see ``aqt_lite._exact``).
        """
        return self.xp.ones_like(x) / x

    def largest(self, x: Array, *, axis: Any, keepdims: bool) -> Array:
        """Largest values along ``axis``, of floats; where there is a NaN, that or infinity, never a finite number."""
        return self.xp.max(x, axis=axis, keepdims=keepdims)

    def integer_matmul(self, x: Array, w: Array) -> Array:
        """``x @ w.T`` of integers over the last axes, exact, as int32; callers make sure that the sums fit.

        The default goes through float64, whose products are as fast as the library's best and exact below 2^53.
        """
        xp = self.xp
        product = xp.matmul(xp.astype(x, xp.float64), xp.matrix_transpose(xp.astype(w, xp.float64)))
        return xp.astype(product, xp.int32)

    def fraction_and_exponent(self, x: Array) -> tuple[Array, Array]:
        """``x = f * 2^e`` with f in [1, 2) and e int32, for normal positive float32; zero gives f = 0 and e = -127.

        By comparisons and products with powers of two, all exact: the standard has no frexp, and log2 is inexact.
        """
        xp = self.xp
        f, e = x, xp.zeros_like(x, dtype=xp.int32)
        for k in (64, 32, 16, 8, 4, 2, 1):
            large = f >= 2.0**k
            f, e = xp.where(large, f * 2.0**-k, f), xp.where(large, e + k, e)
        for k in (64, 32, 16, 8, 4, 2, 1):
            small = f < 2.0 ** (1 - k)
            f, e = xp.where(small, f * 2.0**k, f), xp.where(small, e - k, e)
        return f, e

    def power_of_two(self, e: Array) -> Array:
        """``2^e`` as float32 for e in [-100, 127], and 0 below."""
        xp = self.xp
        up, down = xp.clip(e, 0, 127), xp.clip(-e, 0, 127)
        p = xp.ones_like(e, dtype=xp.float32)
        for k in (1, 2, 4, 8, 16, 32, 64):
            p = xp.where((up & k) != 0, p * 2.0**k, p)
            p = xp.where((down & k) != 0, p * 2.0**-k, p)
        return xp.where(e < -100, xp.zeros_like(p), p)

    def when_any(self, flags: Array, compute: Callable[[], Array], otherwise: Array) -> Array:
        """``compute()`` if any of ``flags``, else ``otherwise``. Callers mask the result: always computing is right."""
        return compute() if self.is_traced(flags) or self.is_deferred(flags) or bool(self.xp.any(flags)) else otherwise

    def ordered_sum(self, x: Array) -> Array:
        """``((x[0] + x[1]) + x[2]) + ...`` along the first axis, in exactly that order."""
        total = x[0, ...]
        for i in range(1, int(x.shape[0])):
            total = total + x[i, ...]
        return total

    def contiguous(self, x: Array) -> Array:
        """``x`` laid out in memory in the order of its axes, where the library lets one choose."""
        return x

    def check_no_overflow(self, values: Array, argument: str) -> Array:
        """``values``; ValueError where they have infinities. ``argument`` says what was too narrow for them."""
        if bool(self.xp.any(self.xp.isinf(values))):
            raise overflow_of(argument)
        return values

    def differentiates(self, *arrays: Array | None) -> bool:
        """Whether a derivative with respect to one of ``arrays`` may be asked for."""
        return False

    def stop_gradient(self, x: Array) -> Array:
        """``x`` as a constant for automatic differentiation."""
        return x

    def straight_through(self, x: Array, y: Array, inside: Array) -> Array:
        """``y``, whose derivative with respect to ``x`` is 1 where ``inside`` and 0 elsewhere."""
        return y

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function(*arrays, static=...)`` in the form that is fast when called eagerly."""
        return function

    def kernel(self, op: str) -> Callable[..., Any] | None:
        """A faster twin of the reference ``op``, same signature and same bits, or None.

        A kernel returns NotImplemented for arguments it does not serve; the reference then runs.
        """
        return None

    def register_container(
        self,
        cls: type,
        flatten: Callable[[Any], tuple[tuple[Any, ...], Any]],
        unflatten: Callable[[Any, Any], Any],
        names: tuple[str, ...],
    ) -> None:
        """Teach the library's tree utilities that ``cls`` is a node with static metadata."""
