"""What a backend is: the adapter that supplies what the Array API standard lacks.

Owns: the ``Backend`` interface, ``IntLimits``, ``Node``, ``Ways`` and ``Doubt``. Imports: NumPy, for the one exchange
format between backends; the arithmetic that every backend inherits; what a kernel is.

An adapter must say five things (``name``, ``array_modules``, ``xp``, ``asarray``, ``to_numpy``). Everything else has
a default that is right for an eager library on a CPU with IEEE arithmetic, and is overridden where that is not so.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import ml_dtypes
import numpy as np

from aqt_lite._arithmetic import ExactArithmetic
from aqt_lite._kernels import Kernel
from aqt_lite._namespace import Array, device_of

__all__ = ["DOUBT", "Backend", "Doubt", "IntLimits", "Node", "Ways", "overflow_of"]


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


class Node(NamedTuple):
    """A container in a tree of arrays: what is in it, and how another is made of other children."""

    names: tuple[str, ...]
    children: tuple[Any, ...]
    rebuilt: Callable[[Sequence[Any]], Any]


class Ways(NamedTuple):
    """What to do with a model that is no tree of arrays, though it may look like one; None where a tree will do."""

    to_quantize: str | None = None
    to_save: str | None = None


DOUBT = "_doubt"
"""Where a backend whose trees hold a ``QArray`` leaves a ``Doubt`` in its ``__dict__``."""


class Doubt(NamedTuple):
    """Why leaves that came with a tree may not be used together, which is told at first use."""

    words: str | Callable[[], str | None]
    """Of the error; a function where that cannot be known yet, which gives None where all is well."""
    leaf: Any
    """What says so, to be passed on where the tree is taken apart again."""

    def settled(self) -> str | None:
        """The words, now."""
        return self.words() if callable(self.words) else self.words


def overflow_of(argument: str) -> ValueError:
    """The error of a dtype that is too narrow for a result."""
    way = "take a wider type, such as float32 (products have that of x)"
    return ValueError(f"{argument} cannot hold every result, which overflow to infinity: {way}")


class Backend(ExactArithmetic, ABC):
    """One array library, seen through the Array API standard plus what that lacks."""

    name: ClassVar[str]
    """What users write as ``backend=``."""

    array_modules: ClassVar[tuple[str, ...]]
    """Top-level modules that define the library's array types; how an array finds its adapter."""

    weights_are: ClassVar[str | None] = None
    """"linear" where the library's weights are (out, in), "dense" where (in, out); None where it has no say."""

    permutes_views: ClassVar[bool] = False
    """Whether an array whose axes are permuted is a view of the same memory, which takes no time."""

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

    def constant(self, value: float | Sequence[float], dtype: str, like: Array) -> Array:
        """A number, or numbers, as an array of that dtype, rounded to nearest, on the device of ``like``."""
        return self.asarray(np.asarray(value).astype(dtype), like=like)

    def arange(self, start: int, stop: int, like: Array) -> Array:
        """int32 numbers from ``start`` to ``stop - 1``, on the device of ``like``."""
        device = self.device(like)
        where = {} if device is None else {"device": device}  # a library of one device may know no such argument
        return self.xp.arange(start, stop, dtype=self.xp.int32, **where)

    def bits_of(self, x: Array) -> Array:
        """The bit patterns of floats of 8 bits, as uint8, or of 16, 32 or 64, as signed integers."""
        values = self.to_numpy(x)
        integer = np.dtype("uint8" if values.dtype.itemsize == 1 else f"i{values.dtype.itemsize}")
        return self.asarray(values.view(integer.newbyteorder(values.dtype.byteorder)), like=x)

    def floats_of(self, bits: Array, name: str) -> Array:
        """The inverse, for floats of 16, 32 or 64 bits: those of type ``name`` that have the bit patterns."""
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        return self.asarray(self.to_numpy(bits).view(dtype), like=bits)

    def part(self, x: Array, index: tuple[Any, ...]) -> Array:
        """``x[index]``, of integers and slices that the program says: no values of the user's are moved by that."""
        return x[index]

    def to_device(self, x: Array, device: Any) -> Array:
        """``x`` on another device."""
        return self.xp.to_device(x, device) if hasattr(self.xp, "to_device") else x.to_device(device)

    def dtype(self, name: str) -> Any:
        """The library's dtype object of that name; ValueError where it has none."""
        try:
            return getattr(self.xp, name)
        except AttributeError:
            raise ValueError(
                f"{self.name} has no dtype {name}: convert to float32, or to another that it has"
            ) from None

    def dtype_name(self, x: Array) -> str:
        """The dtype's name as NumPy and ml_dtypes spell it: 'float32', 'bfloat16', 'int8'."""
        return str(x.dtype).rsplit(".", 1)[-1]

    def int_limits(self, dtype: str) -> IntLimits:
        """Limits of an integer type, asked of the library itself."""
        info = self.xp.iinfo(self.dtype(dtype))
        return IntLimits(bits=int(info.bits), min=int(info.min), max=int(info.max))

    def number_of_elements(self, shape: tuple[int, ...]) -> int:
        """What a container of this library's arrays has as ``size``: a number, but for libraries where it is called."""
        return math.prod(shape)

    def device(self, x: Array) -> Any:
        """The device that holds ``x``; None where arrays have no single device."""
        return device_of(x)

    def share_a_device(self, x: Array, y: Array) -> bool:
        """Whether one operation may take both ``x`` and ``y``: on one device, or where the library moves one itself."""
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

    def on_chunks(self, look: Callable[..., Any], *arrays: Array) -> list[Any]:
        """What ``look`` says of each chunk of deferred arrays of one shape, as arrays of NumPy, all in one go."""
        return [look(*(self.to_numpy(a) for a in arrays))]

    def largest_of_chunks(self, look: Callable[..., float], *arrays: Array) -> Array:
        """The largest number that ``look`` gives of a chunk, as ``on_chunks``: float64, deferred as they are."""
        return np.asarray(max(self.on_chunks(look, *arrays), default=0.0))

    def check_when_computed(self, x: Array, check: Callable[..., None], *beside: Array) -> Array:
        """``x``, whose values go through ``check`` when they are computed, where the library can be told so.

        Called with each part of the values, the index in ``x`` of its first element, and the same part of each of
        ``beside``, which have the shape of ``x``. Raises what ``check`` raises.
        """
        return x

    def look_ups_raise(self) -> bool:
        """Whether the library itself raises, when a program runs, where positions not known before lie outside."""
        return False

    def has_values(self, x: Array) -> bool:
        """Whether values of ``x`` may be looked at without more ado."""
        return not (self.is_traced(x) or self.is_deferred(x))

    def why_unusable(self, x: Array) -> str | None:
        """Why an array of this library cannot be quantized or multiplied (sparse, masked), or None."""
        return None

    def compute_if_any(self, flags: Array, compute: Callable[[], Array], otherwise: Array) -> Array:
        """``compute()`` if any of ``flags`` is set, else ``otherwise``; both have one shape and dtype.

        Only to save time: callers take from the result what is flagged, so that always computing is right, too. That is
        what the default does where a compiler is tracing; override where a program can branch on a value.
        """
        return compute() if not self.has_values(flags) or bool(self.xp.any(flags)) else otherwise

    def in_parts(
        self,
        compute: Callable[[Callable[[Array, int], Array]], Array],
        length: int,
        size_of_part: Callable[[], int],
        axis: int,
        like: Array,
    ) -> Array:
        """``compute(cut)`` for ``size_of_part()`` indices of ``length`` at a time, joined along ``axis``.

        ``cut(a, axis)`` is an array's part for these indices. Only to save memory: no part depends on another. So a
        compiler that traces, and would unroll the loop, is given all at once, whatever the length, which it may not
        know; override where it has loops.
        """
        if not self.has_values(like) or (size := size_of_part()) >= length:
            return compute(lambda a, _: a)
        parts = []
        for start in range(0, length, size):
            here = slice(start, min(start + size, length))
            parts.append(compute(lambda a, axis, here=here: a[(slice(None),) * axis + (here, ...)]))  # type: ignore[misc]
        return self.xp.concat(parts, axis=axis)

    def mapped(self, function: Callable[[Any, Any], Array], x: Array, stack: Any, length: int) -> Array:
        """``function`` of each of ``length`` slices of ``x`` and of ``stack``, an array or QArray, results stacked.

        Override where a compiler has loops.
        """
        return self.xp.stack([function(x[i, ...], stack[i, ...]) for i in range(length)])

    def repeated(self, times: int, step: Callable[[Any, Any], Any], state: tuple[Array, ...]) -> tuple[Array, ...]:
        """``state`` after ``step(i, state)`` for i from 0 to ``times - 1``; shapes and dtypes stay what they are.

        Override where a compiler has loops.
        """
        for i in range(times):
            state = step(i, state)
        return state

    def contiguous(self, x: Array) -> Array:
        """``x`` laid out in memory in the order of its axes, where the library lets one choose."""
        return x

    def by_columns(self, x: Array) -> Array:
        """A matrix laid out in memory column after column, where the library lets one choose."""
        return x

    def is_by_columns(self, x: Array) -> bool:
        """Whether a matrix lies so."""
        return False

    def to_pickle(self, x: Array) -> Array:
        """The bits of ``x`` in a dtype whose pickles the library can read."""
        return x

    def from_pickle(self, x: Array, dtype: str) -> Array:
        """What ``to_pickle`` was given, which had that dtype."""
        return x

    def has_nan(self, x: Array) -> bool:
        """Whether a value of ``x`` is NaN; only asked where values are known."""
        return bool(self.xp.any(self.xp.isnan(x)))

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

    def unusable_as_nan(self, scale: Array, positive: bool) -> Array:
        """Traced scales with NaN for 0, for infinite ones and, if they are to be ``positive``, for negative ones."""
        wrong = scale <= 0 if positive else scale == 0
        return self.xp.where(wrong | self.xp.isinf(scale), self.xp.full_like(scale, float("nan")), scale)

    def computed_once(self, x: Array) -> Array:
        """``x``, for a compiler that would otherwise compute it anew at every mention."""
        return x

    def memory_of(self, x: Array) -> Hashable:
        """The same for arrays that are one: one object, or several of one memory where the library makes them."""
        return id(x)

    def opened(self, node: Any) -> Node | None:
        """``node`` as a container of the library's trees; None where it is none."""
        return None

    def ways_of(self, node: Any) -> Ways:
        """What to do with a model of the library, or of one that is built on it, where it is no tree of arrays."""
        return Ways()

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function(*arrays, static=...)`` in the form that is fast when called eagerly."""
        return function

    def kernel(self, operation: Callable[..., Any]) -> Kernel | None:
        """A faster twin of ``operation``, a function of ``affine`` or ``ops.reference``, or None.

        For adapters outside this package; the kernels of those inside are named in the registry's table.
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
