"""Products over any axes: ``einsum`` and ``dot_general`` of an array and a quantized one.

Owns: how such a product becomes one of matrices, and when it cannot. Imports: ``dense`` and ``linear``, quantize, the
container.

A product of arrays of many axes is one of matrices whose axes are merged: those that are summed over, and those that
are not. Codes may be reshaped freely; their scales where the blocks of the merged axes, one after the other, are blocks
again. Scales that outputs share are repeated to one for each of them. What is left then, blocks that merging would tear
apart along the axes that are summed over, is dequantized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aqt_lite import affine
from aqt_lite._dispatch import run
from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Array, Numbers
from aqt_lite._near import one_of
from aqt_lite._protocol import Backend
from aqt_lite._shapes import axes_of_layout, swapped_forth
from aqt_lite._ways import not_a_qarray
from aqt_lite.api import fake_quantize, quantize
from aqt_lite.elements import float_type
from aqt_lite.formats import format_of
from aqt_lite.granularity import PerGroup
from aqt_lite.ops import reference
from aqt_lite.ops.matmul import Mode, as_operand, product
from aqt_lite.packing import bytes_of
from aqt_lite.qarray import QArray

__all__ = ["DimensionNumbers", "dot_general", "einsum"]

DimensionNumbers = tuple[tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]]
"""As ``jax.lax.dot_general`` has it: the axes of each side that are summed over, and those that are mapped over."""


@naming_the_argument
def dot_general(
    x: Numbers,
    w: QArray,
    dimension_numbers: DimensionNumbers,
    *,
    mode: Mode = "fast",
    activations: str | None = None,
) -> Array:
    """The product of an array and a quantized one over any of their axes, as ``jax.lax.dot_general``.

    Parameters
    ----------
    x : array or list
        Floating-point numbers.
    w : QArray
        Of any shape and granularity.
    dimension_numbers : ((x contracting, w contracting), (x batch, w batch))
        Axes, each of ``x`` with its partner of ``w``.
    mode : {"fast", "reproducible"}
        As for :func:`aqt_lite.dense`.
    activations : str, optional
        A format, in which each row of ``x`` (what is summed over) is quantized first: with "int8", and a weight of
        integers with a scale for each output, sums are of integers. Derivatives pass straight through.

    Returns
    -------
    array
        Axes: batch, those left of ``x``, those left of ``w``; in the dtype of ``x``.

    Raises
    ------
    TypeError, ValueError
        As :func:`aqt_lite.dense`; axes that do not fit each other; a mode that these blocks cannot have.

    Notes
    -----
    The weight stays quantized where blocks along the axes that are summed over are blocks of the merged axis: one scale
    for each output, or groups that the last of them holds whole. Others are dequantized for the call.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> w = aqt_lite.quantize(np.ones((8, 4, 16), "float32"), granularity=aqt_lite.PerBlock((-1, 1, 1)))
    >>> aqt_lite.ops.dot_general(np.ones((3, 8), "float32"), w, (((1,), (0,)), ((), ()))).shape
    (3, 4, 16)
    """
    one_of("mode", mode, ("fast", "reproducible"))
    if activations is not None:
        format_of(activations, "activations")
    if not isinstance(w, QArray):
        raise TypeError(not_a_qarray("w", w))
    w = w._checked()
    left: Array = as_operand(x, "x", w, w._backend)
    (x_in, w_in), (x_batch, w_batch) = (
        (_axes(of_x, len(left.shape), "x"), _axes(of_w, w.ndim, "w")) for of_x, of_w in _pairs(dimension_numbers)
    )
    for of_x, of_w, side in ((x_in, w_in, "contracting"), (x_batch, w_batch, "batch")):
        if [left.shape[a] for a in of_x] != [w.shape[a] for a in of_w]:
            raise ValueError(
                f"x has shape {tuple(left.shape)} and w {w.shape}: their {side} axes {of_x} and {of_w} differ in length"
            )
    if set(x_in) & set(x_batch) or set(w_in) & set(w_batch):
        raise ValueError(f"dimension_numbers={dimension_numbers}: an axis is contracting and batch at once")
    x_in, w_in = (tuple(p[i] for p in sorted(zip(x_in, w_in, strict=True), key=lambda p: p[1])) for i in (0, 1))
    return _contracted(left, w, (x_in, w_in), (x_batch, w_batch), mode, activations)


@naming_the_argument
def einsum(subscripts: str, x: Any, w: Any, *, mode: Mode = "fast", activations: str | None = None) -> Array:
    """A product in the words of ``numpy.einsum``, of an array and a quantized one, in either order.

    Parameters
    ----------
    subscripts : str
        Of two operands: ``"...i,io->...o"``, ``"bthd,hdo->bto"``, ``"bi,bio->bo"``. Each letter once an operand; one
        that is not in the result is to be in both, or it is summed over in the array.
    x, w : array and QArray
        One of each, in the order of the subscripts.
    mode, activations
        As for :func:`aqt_lite.ops.dot_general`, which see for what stays quantized.

    Returns
    -------
    array
        In the dtype of the array.

    Raises
    ------
    TypeError
        Not one array and one QArray.
    ValueError
        Subscripts that are none of such a product, naming the letter.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> w = aqt_lite.quantize(np.ones((4, 16, 32), "float32"), granularity=aqt_lite.PerChannel(2))
    >>> aqt_lite.einsum("bthd,hdo->bto", np.ones((2, 7, 4, 16), "float32"), w).shape
    (2, 7, 32)
    """
    if isinstance(x, QArray) == isinstance(w, QArray):
        kinds = f"a {type(x).__name__} and a {type(w).__name__}"
        held = " (a layer's weight holds one, .qarray)" if any(hasattr(a, "qarray") for a in (x, w)) else ""
        raise TypeError(f"einsum of {kinds}: give one array and one QArray{held}; q.dequantize() is an array")
    operands, result = _subscripts(subscripts)
    if isinstance(x, QArray):
        x, w, operands = w, x, operands[::-1]
    x = as_operand(x, "x", w, w._backend)
    of_x, of_w, out = _letters(operands, result, len(x.shape), w.ndim, subscripts)
    xp = w._backend.xp
    alone = [a for a, letter in enumerate(of_x) if letter not in of_w + out]
    if alone:
        x, of_x = xp.sum(x, axis=tuple(alone)), "".join(c for a, c in enumerate(of_x) if a not in alone)
    lost = [c for c in of_w if c not in of_x + out]
    if lost:
        raise ValueError(
            f"einsum({subscripts!r}): {lost[0]!r} is of the QArray alone and not in the result: sums of its values "
            "without a factor need q.dequantize()"
        )
    lengths = dict(zip(of_x, x.shape, strict=True))
    for letter, length in zip(of_w, w.shape, strict=True):
        if lengths.setdefault(letter, length) != length:
            raise ValueError(f"einsum({subscripts!r}): {letter!r} has length {lengths[letter]} and {length}")
    summed, mapped = ([c for c in of_x if c in of_w and (c in out) == is_out] for is_out in (False, True))
    of_axes = tuple((tuple(map(of_x.index, each)), tuple(map(of_w.index, each))) for each in (summed, mapped))
    y = dot_general(x, w, of_axes, mode=mode, activations=activations)  # type: ignore[arg-type]
    made = [*mapped, *(c for c in of_x if c not in of_w), *(c for c in of_w if c not in of_x)]
    return y if made == list(out) else xp.permute_dims(y, tuple(map(made.index, out)))


# ---- subscripts


def _subscripts(subscripts: Any) -> tuple[list[str], str | None]:
    if not isinstance(subscripts, str):
        raise TypeError(f"subscripts is a {type(subscripts).__name__}: give a string, such as '...i,io->...o'")
    left, arrow, right = subscripts.replace(" ", "").partition("->")
    operands = left.split(",")
    for part in (*operands, right):
        letters = part.replace("...", "", 1)
        if not all(c.isalpha() for c in letters) or len(set(letters)) != len(letters):
            raise ValueError(
                f"einsum({subscripts!r}): {part!r} is not made of letters, each once, and one '...': diagonals are not "
                "products"
            )
    if len(operands) != 2:
        raise ValueError(f"einsum({subscripts!r}): it has {len(operands)} operands, and takes an array and a QArray")
    return operands, right if arrow else None


def _letters(operands: list[str], result: str | None, of_x: int, of_w: int, shown: str) -> tuple[str, str, str]:
    """The letters of x, w and the result, with letters of their own in the place of each '...'."""
    dots: list[str] = []
    longest = ""
    for part, ndim in zip(operands, (of_x, of_w), strict=True):
        rest = ndim - len(part.replace("...", ""))
        if rest < 0 or (rest and "..." not in part):
            raise ValueError(f"einsum({shown!r}): {part!r} is said of an operand of {ndim} dimensions")
        dots.append("".join(map(chr, range(0xE000 + 64 - rest, 0xE000 + 64))))  # counted from the last axis
        longest = max(longest, dots[-1] if "..." in part else "", key=len)
    x, w = (part.replace("...", own) for part, own in zip(operands, dots, strict=True))
    if result is None:
        once = sorted(c for c in x + w if (x + w).count(c) == 1 and c not in longest)
        return x, w, longest + "".join(once)
    out = result.replace("...", longest)
    for c in out:
        if c not in x + w:
            raise ValueError(f"einsum({shown!r}): {c!r} is in the result and in no operand")
    return x, w, out


def _pairs(given: Any) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Axes of both that are contracting, and that are batch; TypeError where they are no such pairs."""
    try:
        (x_in, w_in), (x_batch, w_batch) = given
        return (tuple(x_in), tuple(w_in)), (tuple(x_batch), tuple(w_batch))
    except (TypeError, ValueError):
        raise TypeError(
            f"dimension_numbers={given!r}: give ((x contracting, w contracting), (x batch, w batch)), each a tuple of "
            "axes, such as (((1,), (0,)), ((), ()))"
        ) from None


def _axes(given: Any, ndim: int, argument: str) -> tuple[int, ...]:
    axes = tuple(int(a) for a in given)
    if any(not -ndim <= a < ndim for a in axes) or len({a % ndim for a in axes}) != len(axes):
        raise ValueError(f"dimension_numbers: {axes} are no axes of {argument}, which has {ndim} dimensions")
    return tuple(a % ndim for a in axes)


# ---- products


_Pairs = tuple[tuple[int, ...], tuple[int, ...]]


def _contracted(x: Array, w: QArray, summed: _Pairs, mapped: _Pairs, mode: Mode, activations: str | None) -> Array:
    """The product; axes have been looked at."""
    b, xp = w._backend, w._backend.xp
    (x_in, w_in), (x_batch, w_batch) = summed, mapped
    x_free, w_free = ([a for a in range(n) if a not in used] for n, used in (
        (len(x.shape), (*x_in, *x_batch)), (w.ndim, (*w_in, *w_batch))
    ))  # fmt: skip
    batch, rows, outs = ([x.shape[a] for a in x_batch], [x.shape[a] for a in x_free], [w.shape[a] for a in w_free])
    x = _ordered(x, (*x_batch, *x_free, *x_in), xp)
    inside = math.prod([w.shape[a] for a in w_in])
    if not batch:
        x = xp.reshape(x, (*rows, inside))
        y = _of_matrices(x, w, w_in, tuple(w_free), mode, activations, b)
        return xp.reshape(y, (*rows, *outs))
    count = math.prod(batch)
    x = xp.reshape(x, (count, *rows, inside))
    stack = _stacked(w, w_batch)
    place = {a: i for i, a in enumerate(a for a in range(w.ndim) if a not in w_batch)}
    own = tuple(place[a] for a in w_in), tuple(place[a] for a in w_free)

    def one(row: Array, matrix: QArray) -> Array:
        return _of_matrices(row, matrix._checked(), *own, mode, activations, b)

    if stack is None:
        y = _of_values(x, w, w_batch, w_in, tuple(w_free), mode, b)
    elif count == 0:
        y = xp.zeros((0, *rows, math.prod(outs)), dtype=x.dtype)
    else:
        y = b.mapped(one, x, stack, count)
    return xp.reshape(y, (*batch, *rows, *outs))


def _of_matrices(
    x: Array, w: QArray, w_in: tuple[int, ...], w_out: tuple[int, ...], mode: Mode, activations: str | None, b: Backend
) -> Array:
    """``x``, whose last axis is what is summed over, times ``w``: its outputs along one last axis."""
    found = _as_matrix(w, w_in, w_out)
    if found is None:
        return _of_values(x, w, (), w_in, w_out, mode, b)
    matrix, contract = found

    def of(x: Any, mode: Mode = mode) -> Array:
        return product("dot_general", x, matrix, None, mode, contract=contract)

    if activations is None:
        return of(x)
    per_row: dict[str, Any] = {"dtype": activations, "granularity": PerGroup(max(int(x.shape[-1]), 1))}
    y = of(quantize(x, **per_row))
    if b.differentiates(x):  # straight through, as if the values were multiplied
        values = of(fake_quantize(x, **per_row), "fast")
        y = b.straight_through(values, y, b.xp.isfinite(values))
    return y


def _of_values(
    x: Array, w: QArray, w_batch: tuple[int, ...], w_in: tuple[int, ...], w_out: tuple[int, ...], mode: Mode, b: Backend
) -> Array:
    """The same with the weight's values, as products use them."""
    if mode == "reproducible":
        raise ValueError(
            f"mode='reproducible' is not possible: merging axes {w_in} of w would tear apart its blocks of "
            f"{w.granularity}. Use mode='fast', or quantize w with blocks that are whole along all but one of them"
        )
    spec = reference.unrounded(w._spec)
    values = run(b, affine.dequantize, w._coded(), spec=spec, out=spec.source.compute)
    count, inside, outs = [math.prod([w.shape[a] for a in axes]) for axes in (w_batch, w_in, w_out)]
    values = b.xp.reshape(_ordered(values, (*w_batch, *w_in, *w_out), b.xp), (count, inside, outs))
    shape = tuple(x.shape)
    rows = b.xp.reshape(x, (count, math.prod(shape[1 if w_batch else 0 : -1]), inside))
    compute = b.dtype("float64" if "float64" in (b.dtype_name(x), b.dtype_name(values)) else "float32")
    y = b.xp.matmul(b.xp.astype(rows, compute), b.xp.astype(values, compute))
    return b.xp.reshape(b.xp.astype(y, x.dtype), (*shape[:-1], outs))


def _ordered(x: Array, order: tuple[int, ...], xp: Any) -> Array:
    return x if order == tuple(range(len(order))) else xp.permute_dims(x, order)


# ---- weights as matrices


def _as_matrix(w: QArray, w_in: tuple[int, ...], w_out: tuple[int, ...]) -> tuple[QArray, int] | None:
    """The weight with both kinds of axes merged, in the order in which they lie, and which of them is summed over.

    None where that would tear blocks apart.
    """
    if len(w_in) == len(w_out) == 1:
        return w, w_in[0]
    parts = [w_in, w_out] if not w_out or not w_in or min(w_in) < min(w_out) else [w_out, w_in]
    outputs_torn = _merged_block(w, w_out) is _TORN
    if _merged_block(w, w_in) is _TORN:
        return None
    w = _one_scale_each(w, w_out) if outputs_torn else w
    return _regrouped(w, parts), parts.index(w_in)


_TORN = -1


def _merged_block(w: QArray, axes: tuple[int, ...]) -> int | None:
    """The block along some axes when they become one: None for all of it, ``_TORN`` where blocks are none of it.

    From the last axis on: axes that are whole, then one that is cut in blocks, then axes whose elements stand alone.
    """
    size, cut = 1, False
    pairs = [(w.shape[a], w.block[a]) for a in axes if w.shape[a] != 1]
    for at, (length, block) in reversed(list(enumerate(pairs))):
        is_whole = block is None or block >= length
        if cut:
            if block != 1:
                return _TORN
        elif is_whole:
            size *= length
        else:
            assert block is not None
            if length % block and at:  # a shorter last block would come to lie inside
                return _TORN
            size, cut = size * block, True
    return size if cut else None


def _one_scale_each(w: QArray, axes: tuple[int, ...]) -> QArray:
    """The same with a scale for each index of these axes."""
    b, kept, w = w._backend, w, _with_plain_scales(w)
    parts = {name: getattr(w, name) for name in ("scale", "zero_point", "offset")}
    for axis in axes:
        length, block = w.shape[axis], w.block[axis]
        if block == 1:
            continue
        of_index = np.zeros(length, np.int32) if block is None else (np.arange(length) // block).astype(np.int32)
        places = b.asarray(of_index, like=w.storage)
        parts = {name: None if a is None else b.xp.take(a, places, axis=axis) for name, a in parts.items()}
    block_of_each = tuple(1 if a in axes else n for a, n in enumerate(w.block))
    return _as_kept(replace(w, **parts, block=block_of_each, ragged=()), kept)


def _with_plain_scales(w: QArray) -> QArray:
    """The same with scales and offsets as numbers, however they were kept."""
    parts = {name: getattr(w, name) for name in ("scale", "offset")}
    plain = {
        name: a.dequantize(float_type(w.float_dtype).compute) for name, a in parts.items() if isinstance(a, QArray)
    }
    return replace(w, **plain) if plain else w


def _as_kept(w: QArray, was: QArray) -> QArray:
    """``w`` with its plain scales as signs times magnitudes, where those of ``was`` were kept in few bits.

    Such scales may be 0, as NVFP4 has it for a block of zeros, or negative, as ggml has them. Plain ones may not be 0,
    nor, trained, negative: there it is training that has moved them.
    """
    scale: Any = w.scale
    if not isinstance(was.scale, QArray) or isinstance(scale, QArray):
        return w
    xp = w._backend.xp
    ones = xp.ones_like(scale)
    signs = xp.where(scale == 0, ones * 0, xp.where(scale < 0, -ones, ones))  # 1 of NaN, which the magnitude says
    sizes, each = xp.where(scale == 0, ones, xp.abs(scale)), (1,) * len(scale.shape)
    compute = float_type(w.float_dtype).compute
    kept = QArray(xp.astype(signs, xp.int8), sizes, None, "int8", each, compute, trainable=was.scale.trainable)
    return replace(w, scale=kept)


def _regrouped(w: QArray, parts: list[tuple[int, ...]]) -> QArray:
    """The matrix of two runs of axes: codes and scales reshaped alike, and permuted where they lie otherwise.

    Codes that are stored run after run stay as they are stored, packed or not.
    """
    xp, order = w._backend.xp, tuple(a for part in parts for a in part)
    block = tuple(_merged_block(w, part) for part in parts)

    def merged(shape: Sequence[int]) -> tuple[int, ...]:
        return tuple([math.prod([shape[axis] for axis in part]) for part in parts])

    def laid_out(a: Any) -> Any:
        if isinstance(a, QArray) and order == tuple(range(w.ndim)) and a.scale is None and not a._has_groups:
            return replace(a, block=(None,) * a.ndim).reshape(merged(a.shape))
        a = a.dequantize(float_type(w.float_dtype).compute) if isinstance(a, QArray) else a
        return xp.reshape(_ordered(a, order, xp), merged(a.shape))

    blocks: dict[str, Any] = {
        name: None if getattr(w, name) is None else laid_out(getattr(w, name))
        for name in ("scale", "zero_point", "offset")
    }
    stored = _as_it_lies(w, parts)
    if stored is None:
        codes = xp.reshape(_ordered(w.qvalue, order, xp), merged(w.shape))
        stored = {"storage": codes, "transposed": False, "packed_length": None}
    made = replace(w, **stored, **blocks, block=block, ragged=())
    return _as_kept(replace(made, ragged=made._ragged_axes()), w)


def _as_it_lies(w: QArray, parts: list[tuple[int, ...]]) -> dict[str, Any] | None:
    """How its codes are those of the matrix already, in either order of the runs; None where they lie otherwise."""
    of_storage = swapped_forth(range(w.ndim), w.transposed)
    if of_storage not in ((*parts[0], *parts[1]), (*parts[1], *parts[0])):
        return None
    transposed = of_storage != (*parts[0], *parts[1])
    runs = parts[::-1] if transposed else parts
    first, last = (math.prod([w.shape[a] for a in run]) for run in runs)
    packed = w.packed_length is not None
    if packed and last != w.packed_length and (not runs[1] or w.packed_length * w.bits % 8):  # type: ignore[operator]
        return None  # rows that fill up their last byte, or that there are none of
    storage = w._backend.xp.reshape(w.storage, (first, bytes_of(last, w.bits) if packed else last))
    return {"storage": storage, "transposed": transposed, "packed_length": last if packed else None}


def _stacked(w: QArray, axes: tuple[int, ...]) -> QArray | None:
    """The weight with these axes as one, in front, each index of it with scales of its own; None where groups forbid.

    Every array that it holds has that axis in front, so that compilers may loop over it. The layout of the others stays
    where it can.
    """
    if any(w.block[a] not in (None, 1) and (w.block[a] or 0) < w.shape[a] for a in axes):
        return None
    if any(w.block[a] != 1 for a in axes):
        w = _one_scale_each(w, axes)
    rest = [a for a in range(w.ndim) if a not in axes]
    w = w.transpose((*axes, *rest))
    w = w if len(axes) == 1 else w.reshape((math.prod(w.shape[: len(axes)]), *w.shape[len(axes) :]))
    nested = [a for a in (w.scale, w.offset) if isinstance(a, QArray)]
    if not all(w.ndim > 1 and a.scale is None and _in_front(a) for a in nested):
        w = _as_kept(_with_plain_scales(w), w)
    return w if _in_front(w) else replace(w, storage=w.qvalue, transposed=False, packed_length=None)


def _in_front(w: QArray) -> bool:
    """Whether the first axis is the first of the storage, too: no layout is about it."""
    return w.ndim > axes_of_layout(w)
