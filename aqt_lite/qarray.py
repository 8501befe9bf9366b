"""The container of a quantized array.

Owns: ``QArray``, its invariants, its slicing and its moves between backends. Imports: elements, granularity, affine
(to dequantize), the registry.

Invariants, for ``q`` with ``n`` dimensions:

- ``q.qvalue`` has the array's shape and the integer type ``q.dtype``; ``q.storage`` is how it is kept: the same, or
  with its last two axes swapped where ``q.transposed``.
- ``q.block`` has n entries, each a block length or None for the whole axis.
- ``q.scale`` has shape ``ceil(shape / block)`` (1 for None), dtype float32, or float64 for float64 sources.
- ``q.zero_point`` is None (all zeros) or an int32 array of the same shape as ``q.scale``.
- the values are ``(q.qvalue - q.zero_point) * q.scale``, each scale serving its block.
- storage, scale and zero point are arrays of one backend.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from aqt_lite import affine
from aqt_lite._dispatch import run
from aqt_lite._foreign import refusal
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._qparams import check_scale, check_zero_point
from aqt_lite._registry import backend_of, get_backend, register_container
from aqt_lite.elements import element_type, float_type
from aqt_lite.granularity import Block, Granularity, PerTensor, block_of, granularity_of, grid_of

__all__ = ["QArray"]


@dataclass(frozen=True, eq=False, repr=False)
class QArray:
    """A quantized array: integer codes, a scale for each block of them, and perhaps a zero point.

    Made by :func:`aqt_lite.quantize`, or by :meth:`from_codes` from codes that exist already. Frozen. A pytree in
    JAX and in torch: it passes through ``jit``, ``vmap``, ``scan``, ``torch.compile`` and the like, where ``storage``,
    ``scale`` and ``zero_point`` are the leaves and the rest is static.

    Parameters
    ----------
    storage : array
        The codes as they are kept.
    scale : array
        float32 or float64, shape of the grid of blocks.
    zero_point : array or None
        int32, same shape as ``scale``.
    dtype : str
        Format of the codes, for instance "int8".
    block : tuple
        Block length along each axis, None for the whole axis. Counted from the last axis when leading axes have
        been mapped over (``vmap``, ``scan``) or added by mapping.
    float_dtype : str
        Type of the values that were quantized, and of what :meth:`dequantize` returns.
    transposed : bool
        Whether ``storage`` keeps the last two axes swapped (see :meth:`for_dense`).

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> q = aqt_lite.quantize(np.asarray([[1.0, -2.0], [0.5, 4.0]], "float32"), granularity=aqt_lite.PerChannel(0))
    >>> q
    QArray(int8, shape=(2, 2), PerChannel(axis=0), of float32, numpy)
    qvalue: [[  64 -127]
     [  16  127]]
    scale: [[0.01574803]
     [0.03149606]]
    >>> q[1:].shape, q[1:].scale.shape
    ((1, 2), (1, 1))
    """

    storage: Array
    scale: Array
    zero_point: Array | None = None
    dtype: str = "int8"
    block: Block = field(default=())
    float_dtype: str = "float32"
    transposed: bool = False

    @classmethod
    def from_codes(
        cls,
        qvalue: Array,
        scale: Array,
        zero_point: Array | None = None,
        *,
        granularity: Granularity = PerTensor(),  # noqa: B008 - frozen, so one default object is safe
        float_dtype: str = "float32",
    ) -> QArray:
        """Wrap codes, scales and zero points made elsewhere, after checking every invariant.

        Parameters
        ----------
        qvalue : array
            Integer codes of a type in the table of element types; any shape.
        scale, zero_point : array, or None for the zero point
            Of the same backend and device, with the shape that ``granularity`` gives for ``qvalue``. Scales are
            positive, finite and within the range that :func:`aqt_lite.quantize` keeps; zero points are codes, and
            unsigned codes need them. Under a tracing compiler values are not known, and not checked.

        Raises
        ------
        TypeError, ValueError
            Naming the argument, what it was and what it must be.

        Examples
        --------
        >>> import numpy as np, aqt_lite
        >>> codes, scale = np.asarray([-127, 0, 64], "int8"), np.asarray([0.5], "float32")
        >>> aqt_lite.QArray.from_codes(codes, scale).dequantize()
        array([-63.5,   0. ,  32. ], dtype=float32)
        """
        b = backend_of(qvalue)
        if b is None:
            what = f"qvalue is a {type(qvalue).__name__}: give an array of integer codes"
            raise TypeError(refusal(qvalue, "qvalue") or what)
        source, element = float_type(float_dtype, "float_dtype"), element_type(b.dtype_name(qvalue))
        if zero_point is None and element.middle:
            raise ValueError(
                f"qvalue has dtype {element.name} but no zero_point (the code of 0.0): give int32 zeros if that is 0"
            )
        block = block_of(granularity, qvalue.ndim)
        grid = grid_of(tuple(qvalue.shape), block)
        wanted = [("scale", scale, source.compute)]
        if zero_point is not None:
            wanted.append(("zero_point", zero_point, "int32"))
        for name, value, dtype in wanted:
            other = backend_of(value)
            if other is not b:
                what = f"{name} is {_kind(value)} but qvalue is {b.name}: give arrays of one backend"
                raise TypeError(refusal(value, name) or what)
            if tuple(value.shape) != grid:
                raise ValueError(
                    f"{name} has shape {tuple(value.shape)}: {granularity} of {tuple(qvalue.shape)} is {grid}"
                )
            if b.dtype_name(value) != dtype:
                raise TypeError(f"{name} has dtype {b.dtype_name(value)}: it must be {dtype}")
            if not b.can_meet(value, qvalue):
                raise ValueError(
                    f"{name} is on device {b.device(value)} but qvalue on {b.device(qvalue)}: move one of them"
                )
        scale = _checked(scale, partial(check_scale, source=source), b)
        if zero_point is not None:
            zero_point = _checked(zero_point, partial(check_zero_point, element=element), b)
        return cls(qvalue, scale, zero_point, element.name, block, source.name)

    # ---- what it is

    @property
    def qvalue(self) -> Array:
        """The integer codes, one an element."""
        return self._backend.xp.matrix_transpose(self.storage) if self.transposed else self.storage

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that was quantized."""
        shape = tuple(self.storage.shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale, in the plainest words."""
        return granularity_of(self._aligned().block)

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points together."""
        return sum(_nbytes(leaf, self._backend) for leaf in self._leaves() if leaf is not None)

    @property
    def backend(self) -> str:
        """Name of the backend that holds it."""
        return self._backend.name

    def dequantize(self, dtype: Any = None) -> Array:
        """The values, as :func:`aqt_lite.dequantize`.

        Examples
        --------
        >>> import aqt_lite
        >>> aqt_lite.quantize([0.0, 2.0, -127.0]).dequantize()
        array([   0.,    2., -127.], dtype=float32)
        """
        b, q = self._backend, self._aligned()
        source = float_type(self.float_dtype)
        out = source if dtype is None else float_type(dtype)
        spec = affine.Spec(element_type(self.dtype), source, symmetric=False, block=q.block)
        values = run(b, "dequantize", affine.dequantize, q.qvalue, q.scale, q.zero_point, spec=spec, out=out.name)
        if out.max < source.max and not b.is_traced(values):
            values = b.check_no_overflow(values, out.name)
        return values

    # ---- what can be done with it

    def to_backend(self, name: str) -> QArray:
        """The same bits as arrays of another backend.

        Examples
        --------
        >>> import aqt_lite
        >>> aqt_lite.quantize([1.0, 2.0]).to_backend("array_api_strict").backend
        'array_api_strict'
        """
        b, target = self._backend, get_backend(name)
        if b is target:
            return self
        if any(b.is_traced(leaf) for leaf in self._leaves() if leaf is not None):
            raise TypeError(f"to_backend({name!r}) inside a traced function: move the QArray before or after it")
        storage, scale, zero_point = (
            None if leaf is None else target.asarray(b.to_numpy(leaf)) for leaf in b.computed(*self._leaves())
        )
        return replace(self, storage=storage, scale=scale, zero_point=zero_point)

    def for_dense(self) -> QArray:
        """The same array, its codes stored as (..., out, in): the order in which :func:`aqt_lite.dense` reads fastest.

        Shapes, scales and everything else stay as they are: only ``storage`` is laid out anew, once. A weight for
        :func:`aqt_lite.linear` is in that order already.

        Examples
        --------
        >>> import aqt_lite
        >>> w = aqt_lite.quantize([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).for_dense()
        >>> w.shape, w.storage.shape, aqt_lite.dense([1.0, 1.0], w).shape
        ((2, 3), (3, 2), (3,))
        """
        if self.ndim < 2:
            raise ValueError(f"for_dense() of shape {self.shape}: a weight has at least 2 dimensions, (in, out)")
        if self.transposed:
            return self
        b = self._backend
        return replace(self, storage=b.contiguous(b.xp.matrix_transpose(self.storage)), transposed=True)

    def __getitem__(self, index: Any) -> QArray:
        """Basic indexing: integers, slices and an ellipsis.

        An axis on which every element has its own scale, or all share one, can be indexed freely. An axis with groups
        takes slices that cut between groups.
        """
        q = replace(self._aligned(), storage=self.qvalue, transposed=False)
        block: list[int | None] = []
        of_codes: list[Any] = []
        of_blocks: list[Any] = []
        for axis, item in enumerate(_full_index(index, self.ndim)):
            length, size = self.shape[axis], q.block[axis]
            if size is not None and size > 1 and size >= length:
                size = None
            if isinstance(item, slice):
                of_codes.append(item)
                of_blocks.append(_slice_of_blocks(item, axis, length, size))
                block.append(size)
                continue
            position = _position(item, axis, length)
            if size is not None and size > 1:
                raise IndexError(
                    f"axis {axis} has groups of {size}: slice it at multiples of {size}, or dequantize first"
                )
            of_codes.append(position)
            of_blocks.append(position if size == 1 else 0)
        codes, blocks = tuple(of_codes), tuple(of_blocks)
        zero_point = None if q.zero_point is None else q.zero_point[blocks]
        return replace(q, storage=q.storage[codes], scale=q.scale[blocks], zero_point=zero_point, block=tuple(block))

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("len() of a 0-dimensional QArray")
        return self.shape[0]

    def __iter__(self) -> Iterator[QArray]:
        """Slices along the first axis; TypeError where groups run along it: no single index can be taken there."""
        if not self.shape:
            raise TypeError("iteration over a 0-dimensional QArray")
        size = self._aligned().block[0]
        if size is not None and 1 < size < len(self):
            raise TypeError(f"axis 0 has groups of {size}: iterate over slices of {size}, or dequantize first")
        return (self[i] for i in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """NumPy sees the dequantized values."""
        if copy is False:
            raise ValueError("a QArray has to be dequantized to become a NumPy array: copy=False is not possible")
        values = self._backend.to_numpy(self.dequantize())
        return values if dtype is None else values.astype(dtype)

    def __repr__(self) -> str:
        try:
            b = self._backend
            head = f"{self.dtype}, shape={self.shape}, {self.granularity}, of {self.float_dtype}, {b.name}"
            if any(b.is_traced(leaf) for leaf in self._leaves() if leaf is not None):
                return f"QArray({head}, traced)"
            if any(b.is_deferred(leaf) for leaf in self._leaves() if leaf is not None):
                return f"QArray({head}, deferred)"
            lines = [f"QArray({head})"]
            for name, leaf in [("qvalue", self.qvalue), ("scale", self.scale), ("zero_point", self.zero_point)]:
                if leaf is not None:
                    lines.append(f"{name}: {np.array2string(b.to_numpy(leaf), threshold=20, edgeitems=3)}")
            return "\n".join(lines)
        except (AttributeError, TypeError, ValueError):  # leaves replaced by a tree utility: specs, shardings, ...
            return (
                f"QArray({self.dtype}, storage={self.storage!r}, scale={self.scale!r}, zero_point={self.zero_point!r})"
            )

    # ---- inside

    def _leaves(self) -> tuple[Array, Array, Array | None]:
        return self.storage, self.scale, self.zero_point

    @property
    def _backend(self) -> Backend:
        b = backend_of(self.storage)
        if b is None:
            raise TypeError(f"this QArray holds a {type(self.storage).__name__}, not an array")
        return b

    def _aligned(self) -> QArray:
        """With one block entry for each axis: mapping drops or adds leading axes, one block each."""
        shape, block = self.shape, self.block
        extra = len(shape) - len(block)
        if extra:
            block = (1,) * extra + block[max(0, -extra) :]
        grid = grid_of(shape, block)
        if tuple(self.scale.shape) != grid:
            raise ValueError(
                f"this QArray has codes of shape {shape} in blocks {block}, so its scale should have shape "
                f"{grid}, not {tuple(self.scale.shape)}: map over leading axes only, and over codes and scales alike"
            )
        return self if extra == 0 else replace(self, block=block)


def _full_index(index: Any, ndim: int) -> list[Any]:
    items = list(index) if isinstance(index, tuple) else [index]
    for item in items:
        if not (item is Ellipsis or isinstance(item, slice) or _is_integer(item)):
            raise IndexError(f"index {item!r}: a QArray takes integers, slices and '...'; dequantize it for others")
    dots = sum(item is Ellipsis for item in items)
    missing = ndim - (len(items) - dots)
    if dots > 1 or missing < 0:
        raise IndexError(f"index {index!r}: too many entries for {ndim} dimensions")
    if not dots:
        items.append(Ellipsis)
    at = next(i for i, item in enumerate(items) if item is Ellipsis)
    return items[:at] + [slice(None)] * missing + items[at + 1 :]


def _is_integer(item: Any) -> bool:
    if isinstance(item, bool) or getattr(item, "ndim", None):
        return False
    try:
        operator.index(item)
    except TypeError:
        return False
    return True


def _position(item: Any, axis: int, length: int) -> int:
    position = operator.index(item)
    if not -length <= position < length:
        raise IndexError(f"index {position} is out of range for axis {axis} of length {length}")
    return position % length


def _slice_of_blocks(item: slice, axis: int, length: int, size: int | None) -> slice:
    if size is None:
        return slice(None)
    if size == 1:
        return item
    start, stop, step = item.indices(length)
    if step != 1 or start % size or (stop % size and stop != length):
        raise IndexError(
            f"slice {start}:{stop}:{step} cuts through the groups of {size} along axis {axis}: use multiples of {size}"
        )
    return slice(start // size, -(-stop // size))


def _nbytes(leaf: Array, b: Backend) -> int:
    name = b.dtype_name(leaf)
    bits = float_type(name).bits if name in ("float32", "float64") else b.int_limits(name).bits
    return int(np.prod(tuple(leaf.shape), dtype=np.int64)) * bits // 8


def _checked(values: Array, check: Callable[[Any], None], b: Backend) -> Array:
    """``values``, checked now where they are known, or else, if the library can, when they are computed."""
    if b.is_traced(values) or b.is_deferred(values):
        return b.check_when_computed(values, lambda part, start: check(part))
    check(b.to_numpy(values))
    return values


def _kind(value: Any) -> str:
    b = backend_of(value)
    return type(value).__name__ if b is None else b.name


# ---- trees


def _flatten(q: QArray) -> tuple[tuple[Any, ...], Any]:
    return q._leaves(), (q.dtype, q.block, q.float_dtype, q.transposed)


def _unflatten(static: Any, leaves: Any) -> QArray:
    return QArray(*leaves, *static)


register_container(QArray, _flatten, _unflatten, ("storage", "scale", "zero_point"))
