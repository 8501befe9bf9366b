"""What a quantized array has in common with other arrays: indexing, iteration, transposes, reshaping, operators.

Owns: how each of those keeps codes, blocks and layout true to each other, or is refused. Imports: packing, for the
length of streams, and the registry.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from numbers import Number
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._near import check_integer, index_of
from aqt_lite._protocol import Backend
from aqt_lite._registry import backend_of
from aqt_lite.packing import bytes_of

if TYPE_CHECKING:
    from aqt_lite.qarray import QArray

__all__ = [
    "ArrayShapes",
    "Swapped",
    "axes_of_layout",
    "concatenate",
    "lengths_swapped",
    "register_products",
    "stack",
    "swapped_back",
    "swapped_forth",
    "taken_from",
]

Swapped = bool | tuple[int, int]
"""Of the array's last axes, which runs storage keeps swapped: none, the last two axes, or runs of so many."""

_T = TypeVar("_T")

_product: list[Callable[..., Array]] = []


def register_products(of_right: Callable[..., Array], of_left: Callable[..., Array]) -> None:
    """What ``x @ q`` and ``q @ x`` mean: the products build on the container, and not the other way round."""
    _product[:] = [of_right, of_left]


def lengths_swapped(swapped: Swapped) -> tuple[int, int]:
    """How many axes each run has, in the order of the array."""
    return swapped if isinstance(swapped, tuple) else (1, 1) if swapped else (0, 0)


def swapped_back(of_storage: Sequence[_T], swapped: Swapped) -> tuple[_T, ...]:
    """What there is for each axis of storage, in the order of the array's axes."""
    first, second = lengths_swapped(swapped)
    lead = len(of_storage) - first - second
    return (*of_storage[:lead], *of_storage[lead + second :], *of_storage[lead : lead + second])


def swapped_forth(of_array: Sequence[_T], swapped: Swapped) -> tuple[_T, ...]:
    """What there is for each axis of the array, in the order of storage."""
    first, second = lengths_swapped(swapped)
    return swapped_back(of_array, (second, first))


def axes_of_layout(q: QArray) -> int:
    """How many of the last axes the layout of the codes is about."""
    return sum(lengths_swapped(q.transposed)) or (q.packed_length is not None)


class ArrayShapes:
    """The part of ``QArray`` that is about shapes."""

    # ---- indexing

    def __getitem__(self: QArray, index: Any) -> QArray:  # type: ignore[misc]
        """Integers, slices, an ellipsis and None; or an array of integers, for rows by their index.

        An axis on which every element has its own scale, or all share one, can be indexed freely. An axis with groups
        takes integers, each with the scale of its group, and slices that cut between groups. The layout of the codes is
        kept.
        """
        if _is_index_array(index):
            return self.take(index)
        q = self._checked()
        items = _full_index(index, q.ndim)
        if all(isinstance(item, slice) and item == slice(None) for item in items):
            return q
        block: list[int | None] = []
        of_blocks: list[Any] = []
        axis = 0
        for at, item in enumerate(items):
            if item is None:
                block.append(None)
                of_blocks.append(None)
                continue
            length, size = q.shape[axis], q.block[axis]
            if size is not None and size > 1 and size >= length > 0:
                size = None
            if isinstance(item, slice):
                items[at] = range(*item.indices(length))
                of_blocks.append(_span_of_blocks(items[at], axis, length, size))
                block.append(size)
            else:
                position = _position(item, axis, length)
                of_blocks.append(0 if size is None else position // size)
            axis += 1
        b = q._backend
        try:
            blocks = _on_blocks(q, lambda a: a[_as_index(of_blocks)] if _is_quantized(a) else _cut(a, of_blocks, b))
        except IndexError as error:
            raise IndexError(
                f"scales of {q.dtype} have groups themselves, of blocks of {q.granularity}: {error}"
            ) from None
        cut = replace(_indexed(q, items), **blocks, block=tuple(block), ragged=())
        return replace(cut, ragged=cut._ragged_axes())

    def take(self: QArray, indices: Any, axis: int = 0) -> QArray:  # type: ignore[misc]
        """Slices along one axis by their index, as ``numpy.take``: rows of an embedding, whose table stays quantized.

        Parameters
        ----------
        indices : array of integers, of any shape, or a list of them
            Negative ones count from the end. What lies outside is an IndexError, of Dask's when they are computed.
            Where values are not known because a compiler traces, it is torch's error when the program runs, and in JAX,
            where no program raises, the nearest slice that there is.
        axis : int
            Where it has groups, each slice has the scale of its own.

        Examples
        --------
        >>> import numpy as np, aqt_lite
        >>> table = aqt_lite.quantize(np.eye(3, dtype="float32"), granularity=aqt_lite.PerChannel(0))
        >>> table[np.asarray([2, 0])].dequantize()
        array([[0., 0., 1.],
               [1., 0., 0.]], dtype=float32)
        """
        return taken_from(self._checked(), indices, axis)

    def __len__(self: QArray) -> int:  # type: ignore[misc]
        if not self.shape:
            raise TypeError("a 0-dimensional QArray has no len(): q.dequantize() is the array of its value")
        return self.shape[0]

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a QArray is neither true nor false: ask for what is meant, len(q) or q.size, or for values, q.dequantize()"
        )

    def __iter__(self: QArray) -> Iterator[QArray]:  # type: ignore[misc]
        """Slices along the first axis."""
        if not self.shape:
            raise TypeError("iteration over a 0-dimensional QArray")
        return (self[i] for i in range(len(self)))

    # ---- shapes

    @property
    def T(self: QArray) -> QArray:  # type: ignore[misc] # noqa: N802 - what arrays call it
        """The transpose of two dimensions. No code is moved: the layout is remembered."""
        if self.ndim != 2:
            raise ValueError(f"T of shape {self.shape}: it is for 2 dimensions; mT swaps the last two of more")
        return self.mT

    @property
    def mT(self: QArray) -> QArray:  # type: ignore[misc] # noqa: N802 - what arrays call it
        """The last two axes swapped. No code is moved: the layout is remembered."""
        q = self._checked()
        if q.ndim < 2:
            raise ValueError(f"mT of shape {q.shape}: it takes at least 2 dimensions")
        xp = q._backend.xp
        blocks = _on_blocks(q, lambda a: a.mT if _is_quantized(a) else xp.matrix_transpose(a))
        block, ragged = ((*e[:-2], e[-1], e[-2]) if e else () for e in (q.block, q.ragged))
        if isinstance(q.transposed, tuple):
            return _laid_out_anew(replace(q, storage=xp.matrix_transpose(q.qvalue), **blocks, block=block), q)
        turned = replace(q, **blocks, block=block, ragged=ragged, transposed=not q.transposed)
        turned.__dict__["_turned"] = True  # by hand: whoever wrote it knows what a square weight is for
        return turned

    def transpose(self: QArray, *axes: Any) -> QArray:  # type: ignore[misc]
        """Axes in another order; reversed by default, as in NumPy."""
        q = self._checked()
        given = axes[0] if len(axes) == 1 and isinstance(axes[0], tuple | list) else axes
        order = tuple(reversed(range(q.ndim))) if not given else tuple(index_of("axis", a) for a in given)
        if sorted(a + q.ndim if a < 0 else a for a in order) != list(range(q.ndim)):
            raise ValueError(f"axes {order} are no order of the {q.ndim} axes: give each once, 0 to {q.ndim - 1}")
        order = tuple(a % q.ndim for a in order)
        if order == tuple(range(q.ndim)):
            return q
        if order == (*range(q.ndim - 2), q.ndim - 1, q.ndim - 2):
            return q.mT
        xp = q._backend.xp
        blocks = _on_blocks(q, lambda a: a.transpose(order) if _is_quantized(a) else xp.permute_dims(a, order))
        codes, block = xp.permute_dims(q.qvalue, order), tuple(q.block[a] for a in order)
        return _laid_out_anew(replace(q, storage=codes, **blocks, block=block), q)

    def _as_stored(self: QArray) -> QArray:  # type: ignore[misc]
        """The array whose axes are in the order of the storage: what ``swapped_back`` orders again."""
        q = self._checked()
        order = swapped_forth(range(q.ndim), q.transposed)
        xp = q._backend.xp
        blocks = _on_blocks(q, lambda a: a.transpose(order) if _is_quantized(a) else xp.permute_dims(a, order))
        block, ragged = (tuple(of_axes[a] for a in order) if of_axes else () for of_axes in (q.block, q.ragged))
        return replace(q, **blocks, block=block, ragged=ragged, transposed=False)

    def reshape(self: QArray, *shape: Any, order: str = "C") -> QArray:  # type: ignore[misc]
        """Another shape in which blocks stay blocks.

        Axes may be merged or split where each of their elements has a scale, or all together, or where groups stay runs
        of elements. ``order`` is there for ``np.reshape`` and ``jnp.reshape``.

        Examples
        --------
        >>> import numpy as np, aqt_lite
        >>> q = aqt_lite.quantize(np.ones((2, 3, 64), "float32"), granularity=aqt_lite.PerGroup(32))
        >>> q.reshape(6, 64).scale.shape
        (6, 2)
        >>> q.reshape(2, 3, 4, 16).granularity
        PerBlock(shape=(1, 1, 2, -1))
        """
        if order != "C":
            raise ValueError(
                f"order={order!r}: elements are read with the last axis fastest, order='C'; transpose first"
            )
        q = self._checked()
        given = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape
        wanted = _resolved(tuple(index_of("length", n) for n in given), q.size)
        if wanted == q.shape:
            return q
        tail = 0  # axes at the end that stay
        while tail < min(q.ndim, len(wanted)) and q.shape[q.ndim - 1 - tail] == wanted[len(wanted) - 1 - tail]:
            tail += 1
        lead, new_lead = q.ndim - tail, wanted[: len(wanted) - tail]
        pairs = list(zip(q.block[:lead], q.shape[:lead], strict=True))
        each = all(size == 1 or length == 1 for size, length in pairs)
        together = all(size is None or size >= length > 0 for size, length in pairs)
        block_lead: tuple[int | None, ...] | None = ((1,) if each else (None,)) * len(new_lead)
        if not (each or together):
            block_lead = _runs_of(pairs, new_lead)
        if block_lead is None:
            raise ValueError(
                f"reshape of {q.shape} in blocks {q.block} to {wanted} would tear blocks apart: dequantize first, or "
                "reshape before quantizing"
            )
        xp = q._backend.xp
        grid_lead = [1 if size is None else n // size for size, n in zip(block_lead, new_lead, strict=True)]
        blocks = _on_blocks(q, lambda a: _reshaped(a, (*grid_lead, *tuple(a.shape)[lead:]), xp))
        block = block_lead + q.block[lead:]
        if tail >= (axes_of_layout(q) or 1):
            stored = tuple(q.storage.shape)[lead:]
            cut = replace(q, storage=xp.reshape(q.storage, (*new_lead, *stored)), **blocks, block=block, ragged=())
            return replace(cut, ragged=cut._ragged_axes())
        codes = xp.reshape(q.qvalue, wanted)
        return _laid_out_anew(replace(q, storage=codes, **blocks, block=block), q)

    def broadcast_to(self: QArray, shape: tuple[int, ...]) -> QArray:  # type: ignore[misc]
        """Axes of length 1, and new leading axes, repeated; what is repeated shares its scale."""
        q, shape = self._checked(), tuple(shape)
        extra = len(shape) - q.ndim
        if extra < 0 or any(n not in (1, m) for n, m in zip(q.shape, shape[extra:], strict=True)):
            raise ValueError(f"broadcast_to({shape}): shape {q.shape} does not broadcast to it")
        repeated = (n != m for n, m in zip(q.shape, shape[extra:], strict=True))
        block = (None,) * extra + tuple(None if new else n for new, n in zip(repeated, q.block, strict=True))
        blocks = _on_blocks(q, lambda a: a[((None,) * extra + (...,))] if extra else a)
        codes = q._backend.xp.broadcast_to(q.qvalue, shape)
        return _laid_out_anew(replace(q, storage=codes, **blocks, block=block), q)

    def astype(self: QArray, dtype: Any) -> Array:  # type: ignore[misc]
        """The values as an array of a floating-point type: ``dequantize(dtype)``; another format takes ``quantize``."""
        return self.dequantize(dtype)

    # ---- operators

    def __rmatmul__(self: QArray, x: Any) -> Array:  # type: ignore[misc]
        """``x @ q`` is ``aqt_lite.dense(x, q)``."""
        return _product[0](x, self)

    def __matmul__(self: QArray, other: Any) -> Any:  # type: ignore[misc]
        """``q @ w`` of two QArrays is ``aqt_lite.dense(q, w)``; ``q @ x`` is ``aqt_lite.linear(x.T, q).T``."""
        return _product[0](self, other) if _is_quantized(other) else _product[1](self, other)

    def __eq__(self, other: object) -> Any:
        if self is other:
            return True
        if _is_quantized(other) or isinstance(other, Number) or backend_of(other) is not None:
            raise TypeError(
                "quantized arrays are not compared by ==: compare their values, q.dequantize(), or their bits, with "
                "aqt_lite.testing.assert_same_bits"
            )
        return NotImplemented

    def __contains__(self, value: object) -> NoReturn:
        raise TypeError("a QArray does not look for values in itself: write `value in q.dequantize()`")

    __hash__ = object.__hash__

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """NumPy's functions, and operators of its arrays: ``np.matmul`` is ``@``, others are refused with the way."""
        if method == "__call__" and not options and len(inputs) == 2:
            first, second = inputs
            if ufunc is np.matmul:
                return first @ second if _is_quantized(first) else second.__rmatmul__(first)
            if ufunc in (np.equal, np.not_equal):
                return first == second if _is_quantized(first) else second == first
        if ufunc is np.matmul:
            raise TypeError("a product with a QArray makes an array of its own: write y = x @ q, without out=")
        name = ufunc.__name__ if method == "__call__" else f"{ufunc.__name__}.{method}"
        return _refused(f"np.{name}")(self)


def _refused(symbol: str) -> Callable[..., NoReturn]:
    def refuse(self: Any, *_: Any) -> NoReturn:
        raise TypeError(
            f"arithmetic with a QArray ({symbol}) would dequantize all of it at every call: write q.dequantize() where "
            "you want that; x @ q stays quantized"
        )

    return refuse


for _name, _symbol in {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**"
}.items():  # fmt: skip
    setattr(ArrayShapes, f"__{_name}__", _refused(_symbol))
    setattr(ArrayShapes, f"__r{_name}__", _refused(_symbol))
for _name, _symbol in {"neg": "-", "abs": "abs", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}.items():
    setattr(ArrayShapes, f"__{_name}__", _refused(_symbol))


# ---- several arrays


def concatenate(arrays: Any, axis: int = 0) -> QArray:
    """QArrays of one format joined along an axis: one without blocks of its own, or between groups.

    Parameters
    ----------
    arrays : sequence of QArray
        Of one backend, format, granularity and layout, and of the same shape but along ``axis``.
    axis : int

    Raises
    ------
    ValueError, TypeError
        They differ, or share one scale along ``axis``, or a group that is shorter than the others would come to lie
        inside.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> q = aqt_lite.quantize(np.ones((2, 64), "float32"), "int4", granularity=aqt_lite.PerGroup(32))
    >>> aqt_lite.concatenate([q, q], axis=1).scale.shape
    (2, 4)
    """
    qs = [q._checked() for q in _quantized(arrays)]
    first = qs[0]
    check_integer("axis", axis)
    if not -first.ndim <= axis < first.ndim:
        n = first.ndim
        raise ValueError(f"axis={axis} is out of range for {n} dimensions: use {-n} to {n - 1}")
    axis %= first.ndim
    for q in qs[1:]:
        if kind_in_words(q) != kind_in_words(first):
            raise ValueError(
                f"concatenate of {kind_in_words(first)} and {kind_in_words(q)}: bring them to one format first"
            )
        if q.ndim != first.ndim or any(q.shape[d] != first.shape[d] for d in range(q.ndim) if d != axis):
            raise ValueError(
                f"concatenate of shapes {first.shape} and {q.shape} along axis {axis}: the others must agree"
            )
    size = first.block[axis]
    if size is None and len(qs) > 1 and first.scale is not None:
        raise ValueError(
            f"concatenate along axis {axis}, all of which shares a scale: quantize with a scale for each index or "
            "group there, or join the values before quantizing"
        )
    if size is not None and any(q.shape[axis] % size for q in qs[:-1]):
        raise ValueError(
            f"concatenate along axis {axis}: a last group shorter than {size} would come to lie inside; join the "
            "values before quantizing"
        )
    xp = first._backend.xp
    new: dict[str, Any] = {}
    for name in ("scale", "zero_point", "offset"):
        parts = [getattr(q, name) for q in qs]
        if parts[0] is None:
            new[name] = None
        elif _is_quantized(parts[0]):
            new[name] = _joined_scales(parts, axis)
        else:
            new[name] = xp.concat(parts, axis=axis)
    codes = xp.concat([q.qvalue for q in qs], axis=axis)
    return _laid_out_anew(replace(first, storage=codes, **new, ragged=()), first)


def stack(arrays: Any, axis: int = 0) -> QArray:
    """QArrays of one format and shape along a new axis, each with its own scales: for ``scan`` and ``vmap``.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> q = aqt_lite.quantize(np.ones((2, 64), "float32"), "nf4", granularity=aqt_lite.PerGroup(32))
    >>> aqt_lite.stack([q, q, q]).shape
    (3, 2, 64)
    """
    qs = [q._checked() for q in _quantized(arrays)]
    first = qs[0]
    check_integer("axis", axis)
    if not 0 <= axis <= max(first.ndim - 2, 0):
        raise ValueError(f"axis={axis}: a new axis may stand before the last two, at 0 to {max(first.ndim - 2, 0)}")
    for q in qs[1:]:
        if kind_in_words(q) != kind_in_words(first) or q.shape != first.shape:
            raise ValueError(
                f"stack of {kind_in_words(first)}, {first.shape} and {kind_in_words(q)}, {q.shape}: they must agree"
            )
    each = [q[(slice(None),) * axis + (None,)] for q in qs]
    return concatenate([_with_an_entry_each(q, axis) for q in each], axis)


def _with_an_entry_each(q: QArray, axis: int) -> QArray:
    """The same, an axis of length 1 being one whose elements have scales of their own."""
    nested = _on_blocks(q, lambda a: _with_an_entry_each(a, axis) if _is_quantized(a) else a)
    return replace(q, **nested, block=(*q.block[:axis], 1, *q.block[axis + 1 :]))


def _joined_scales(parts: list[Any], axis: int) -> Any:
    """Quantized scales: joined as they are where each number stands for itself, else with one scale for each part."""
    first = parts[0]
    if first.scale is None:
        parts = [replace(p, block=(1,) * p.ndim) for p in parts]
        return replace(concatenate(parts, axis), block=first.block)
    if first.block[axis] == 1:
        return concatenate(parts, axis)
    raise ValueError("concatenate of arrays whose scales share a scale themselves: join the values before quantizing")


def _quantized(arrays: Any) -> list[Any]:
    found = list(arrays) if isinstance(arrays, Iterable) else []
    if not found or not all(map(_is_quantized, found)):
        raise TypeError("give a sequence of one QArray or more; arrays of floats have their own library's functions")
    if len({q.backend for q in found}) > 1:
        raise TypeError("QArrays of several backends: move them to one with .to_backend()")
    return found


def kind_in_words(q: Any) -> str:
    """Format, blocks and parts of a QArray."""
    kept = q.scale.dtype if _is_quantized(q.scale) else "no" if q.scale is None else "plain"
    block = ", ".join("whole axis" if n is None else str(n) for n in q.block)
    parts = [p for p in ("zero_point", "offset") if getattr(q, p) is not None]
    return f"{q.dtype} of {q.float_dtype} in blocks of ({block}), {kept} scales{''.join(', ' + p for p in parts)}"


def _laid_out_anew(q: QArray, like: QArray) -> QArray:
    """``q``, whose storage holds plain codes in the order of its axes, packed where ``like`` is."""
    q = replace(q, transposed=False, packed_length=None, ragged=())
    q = replace(q, ragged=q._ragged_axes())
    return q.packed() if like.packed_length is not None else q


def _is_quantized(a: Any) -> bool:
    return isinstance(a, ArrayShapes)


def _on_blocks(q: QArray, function: Callable[[Any], Any]) -> dict[str, Any]:
    """``function`` of everything that has an entry for each block."""
    leaves = {"scale": q.scale, "zero_point": q.zero_point, "offset": q.offset}
    return {name: None if leaf is None else function(leaf) for name, leaf in leaves.items()}


def _reshaped(a: Any, shape: tuple[int, ...], xp: Any) -> Any:
    return a.reshape(shape) if _is_quantized(a) else xp.reshape(a, shape)


def _resolved(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    """``shape`` with the one -1 replaced by the length that is left."""
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) == 1 and known and size % known == 0:
        shape = tuple(size // known if n == -1 else n for n in shape)
    if -1 in shape or math.prod(shape) != size:
        raise ValueError(f"reshape to {shape}: the array has {size} elements")
    return shape


# ---- indices


def _runs_of(pairs: list[tuple[int | None, int]], wanted: tuple[int, ...]) -> tuple[int | None, ...] | None:
    """Blocks of the axes of lengths ``wanted`` that hold what those of ``pairs`` (block, length) do; None if none do.

    Axes that go into as many elements are looked at together. Their blocks have to be runs: axes that blocks span
    whole, before these one of which they take a part, and before that one axes of one index a block.
    """
    block: list[int | None] = []
    pairs, left = list(pairs), list(wanted)
    if 0 in left:
        return None
    while pairs or left:
        of_old, new = ([pairs.pop(0)] if pairs else []), ([left.pop(0)] if left else [])
        while (old := math.prod(n for _, n in of_old)) != (made := math.prod(new)):
            if not (pairs if old < made else left):
                return None
            if old < made:
                of_old.append(pairs.pop(0))
            else:
                new.append(left.pop(0))
        run, whole = 1, True
        for size, length in reversed(of_old):
            taken = length if size is None else min(size, length)
            if length % taken or (taken > 1 and not whole):
                return None
            run, whole = run * taken, whole and taken == length
        found: list[int | None] = []
        for length in reversed(new):
            taken = math.gcd(run, length)
            if taken != min(run, length):
                return None
            found.insert(0, None if taken == length > 1 else taken)
            run //= taken
        block += found
    return tuple(block)


def taken_from(q: QArray, indices: Any, axis: int = 0, *, from_end: bool = True) -> QArray:
    """``QArray.take``; negative indices count ``from_end`` or lie outside."""
    if not -q.ndim <= axis < q.ndim:
        raise ValueError(f"axis={axis} is out of range for {q.ndim} dimensions")
    axis %= q.ndim
    length, size = q.shape[axis], q.block[axis]
    if size is not None and size > 1 and size >= length > 0:
        size = None
    shape, flat = _positions(indices, axis, length, q, from_end)
    xp = q._backend.xp

    def taken(a: Any, flat: Array = flat) -> Any:
        a = a.take(flat, axis) if _is_quantized(a) else xp.take(a, flat, axis=axis)
        if len(shape) == 1:  # a compiler may not know how many, and a QArray asks before it reshapes
            return a
        return _reshaped(a, (*a.shape[:axis], *shape, *a.shape[axis + 1 :]), xp)

    def shared(a: Any) -> Any:  # by the whole axis: one scale for each of its new axes
        return _reshaped(a, (*a.shape[:axis], *((1,) * len(shape)), *a.shape[axis + 1 :]), xp)

    plain = q if _is_leading(q, axis) else replace(q, storage=q.qvalue, transposed=False, packed_length=None)
    block = (*q.block[:axis], *((None if size is None else 1,) * len(shape)), *q.block[axis + 1 :])
    if size is None:
        blocks = _on_blocks(q, shared)
    else:
        of_groups = flat if size == 1 else flat // size
        blocks = _on_blocks(q, lambda a: taken(a, of_groups))
    cut = replace(plain, storage=taken(plain.storage), **blocks, block=block, ragged=())
    cut = replace(cut, ragged=cut._ragged_axes())
    return cut.packed() if q.packed_length is not None else cut


def _positions(indices: Any, axis: int, length: int, q: QArray, from_end: bool) -> tuple[tuple[int, ...], Array]:
    """The shape of ``indices``, and all of them counted from the beginning, in one dimension."""
    b, xp, ids = q._backend, q._backend.xp, indices
    if backend_of(ids) is b:
        name, known = b.dtype_name(ids), b.to_numpy(ids) if b.has_values(ids) else None
    else:
        known = np.asarray(ids)
        ids = known = known if known.size else known.astype(np.int32)  # an empty list has floats
        name = known.dtype.name
    if not name.lstrip("u").startswith("int"):
        raise IndexError(f"indices have dtype {name}: give integers")
    check = partial(_check_inside, axis=axis, length=length, first=-length if from_end else 0)
    if known is not None:
        check(known)
        counted = known.reshape(-1).astype(np.int64)
        counted = np.where(counted < 0, counted + length, counted).astype(np.int32)
        return tuple(ids.shape), b.asarray(counted, like=q.storage)
    if b.is_deferred(ids):
        ids = b.check_when_computed(ids, lambda part, _: check(part))
    flat, last = xp.reshape(ids, (-1,)), max(length - 1, 0)
    if b.look_ups_raise():
        flat = xp.astype(flat, xp.int64)
        flat = xp.where(flat < 0, flat + length, flat) if from_end else flat
        return tuple(ids.shape), xp.where(flat < 0, length, flat)  # which is outside to every library
    if name in ("uint32", "uint64"):
        return tuple(ids.shape), xp.astype(xp.clip(flat, 0, last), xp.int32)
    flat = xp.astype(flat, xp.int64 if name == "int64" else xp.int32)  # which is cut before it wraps
    flat = xp.where(flat < 0, flat + length, flat) if from_end else flat
    return tuple(ids.shape), xp.astype(xp.clip(flat, 0, last), xp.int32)


def _check_inside(ids: np.ndarray[Any, Any], axis: int, length: int, first: int) -> None:
    """IndexError where one of ``ids`` is none of an axis, which are those from ``first`` on."""
    bad = (ids < first) | (ids >= length)
    if bad.any():
        raise IndexError(f"index {ids.flat[np.argmax(bad)]} is out of range for axis {axis} of length {length}")


def _is_index_array(index: Any) -> bool:
    if isinstance(index, list):
        return bool(index) and all(_is_integer(i) for i in index)
    if isinstance(index, tuple | int | slice) or not hasattr(index, "ndim"):
        return False
    b = backend_of(index)
    if b is None or (not index.ndim and b.has_values(index)):  # one index that is known is an integer
        return False
    return b.dtype_name(index).lstrip("u").startswith("int")


def _is_leading(q: QArray, axis: int) -> bool:
    """Whether no layout is about the axis."""
    return axis < q.ndim - axes_of_layout(q)


def _cut(a: Array, items: list[Any], b: Backend) -> Array:
    """``a`` indexed by integers, ranges and None; the standard has no steps backwards, and so no slices of them."""
    flipped, axis, index = [], 0, []
    for item in items:
        if isinstance(item, range):
            if item.step < 0:
                flipped.append(axis)
                item = item[::-1]
            item = slice(item[0], item[-1] + 1, item.step) if item else slice(0, 0)
        index.append(item)
        axis += not isinstance(item, int)
    a = b.part(a, tuple(index))
    return b.xp.flip(a, axis=tuple(flipped)) if flipped else a


def _as_index(items: list[Any]) -> tuple[Any, ...]:
    """The same as Python writes it."""
    return tuple(_as_slice(i) if isinstance(i, range) else i for i in items)


def _as_slice(span: range) -> slice:
    return slice(span.start, span.stop if span.stop >= 0 else None, span.step) if span else slice(0, 0)


def _indexed(q: QArray, items: list[Any]) -> QArray:
    """``q`` with its codes indexed, in its own layout where that survives.

    Items: one an axis, and None for new axes.
    """
    tail, b = axes_of_layout(q), q._backend
    if not tail:
        return replace(q, storage=_cut(q.storage, items, b))
    if q.ndim >= tail and all(isinstance(i, range) for i in items[-tail:]):
        if q.transposed:
            items = list(swapped_forth(items, q.transposed))
        if q.packed_length is None:
            return replace(q, storage=_cut(q.storage, items, b))
        whole = range(int(q.storage.shape[-1]))
        return _of_stream(replace(q, storage=_cut(q.storage, [*items[:-1], whole], b)), items[-1])
    plain = replace(q, storage=_cut(q.qvalue, items, b), transposed=False, packed_length=None)
    return plain.packed() if q.packed_length is not None else plain


def _of_stream(q: QArray, span: range) -> QArray:
    """``q`` with some of the last axis of its packed storage, of which no more is unpacked than the span covers."""
    assert q.packed_length is not None
    if span == range(q.packed_length):
        return q
    low, high = (min(span), max(span) + 1) if span else (0, 0)
    first = low // 8 * 8  # where a byte begins with a code
    window = q._backend.part(q.storage, (..., slice(first * q.bits // 8, bytes_of(high, q.bits))))
    codes = replace(q, storage=window, packed_length=high - first)._stored_codes()
    every = [range(int(n)) for n in codes.shape[:-1]]
    inside = range(span.start - first, span.stop - first, span.step)
    return replace(q, storage=_cut(codes, [*every, inside], q._backend), packed_length=None).packed()


def _full_index(index: Any, ndim: int) -> list[Any]:
    items = list(index) if isinstance(index, tuple) else [index]
    for item in items:
        if not (item is Ellipsis or item is None or isinstance(item, slice) or _is_integer(item)):
            kind = f"an array of shape {tuple(item.shape)}" if hasattr(item, "shape") else repr(item)[:60]
            raise IndexError(
                f"index {kind}: a QArray takes integers, slices, '...' and None, or one array of integers for its "
                "first axis; q.take(ids, axis) for another; dequantize it for masks"
            )
    dots = sum(item is Ellipsis for item in items)
    entries = sum(item is not Ellipsis and item is not None for item in items)
    if dots > 1 or entries > ndim:
        raise IndexError(f"index {index!r}: too many entries for {ndim} dimensions")
    if not dots:
        items.append(Ellipsis)
    at = next(i for i, item in enumerate(items) if item is Ellipsis)
    return items[:at] + [slice(None)] * (ndim - entries) + items[at + 1 :]


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


def _span_of_blocks(span: range, axis: int, length: int, size: int | None) -> range:
    if size is None:
        return range(1)
    if size == 1 or not span:
        return span if size == 1 else range(0)
    start, stop, step = span.start, span.stop, span.step
    if step != 1 or start % size or (stop % size and stop != length):
        raise IndexError(
            f"slice {start}:{stop}:{step} cuts through the groups of {size} along axis {axis}: use multiples of {size}"
        )
    return range(start // size, -(-stop // size))
