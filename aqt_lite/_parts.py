"""Walking through large arrays part by part.

Owns: boxes of an array of any backend, and of the QArray that stands for it. Imports: the container, the registry,
granularity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._registry import backend_of
from aqt_lite.granularity import Block
from aqt_lite.qarray import QArray

__all__ = ["Box", "boxes", "dequantized", "memory_order", "part_of", "part_of_array", "touched"]

Box = tuple[tuple[int, int], ...]
"""Start and stop along each axis."""

_Numbers = np.ndarray[Any, Any]


def memory_order(array: Array) -> list[int]:
    """Axes from the one with the longest steps in memory to the one with the shortest; as they are where unknown."""
    strides = array.strides if isinstance(array, np.ndarray) else ()
    return sorted(range(array.ndim), key=lambda axis: (-abs(strides[axis]) if strides else 0, axis))


def boxes(shape: tuple[int, ...], most: int, order: Sequence[int], block: Block | None = None) -> Iterator[Box]:
    """Boxes of about ``most`` elements that together are the whole array, along the last axes of ``order`` first.

    They cut blocks that are larger than themselves, and then each lies in one row of blocks along the axis it cuts.
    """
    cuts: dict[int, list[tuple[int, int]]] = {}
    for axis in reversed(order):
        length, size = shape[axis], (block[axis] if block else None) or 1
        whole = length if size >= length or size == 1 else size  # what may be cut anywhere
        if whole == size <= most:
            taken, whole = _even(length, most, size), length
        else:
            taken = _even(whole, most, 1)
        starts = range(0, length, whole)
        cuts[axis] = [
            (start, min(start + taken, at + whole, length))
            for at in starts
            for start in range(at, min(at + whole, length), taken)
        ]
        most = max(most // taken, 1)
    for chosen in itertools.product(*(cuts[axis] for axis in order)):
        of_axis = dict(zip(order, chosen, strict=True))
        yield tuple(of_axis[axis] for axis in range(len(shape)))


def _even(length: int, most: int, multiple: int) -> int:
    """Length of equal pieces, in whole multiples, of which ``most`` holds one."""
    units, fit = -(-length // multiple), most // multiple
    return -(-units // -(-units // fit)) * multiple


def touched(box: Box, sizes: tuple[int, ...]) -> tuple[slice, ...]:
    """The blocks of the given lengths that a box has a share in."""
    return tuple(slice(start // size, -(-stop // size)) for (start, stop), size in zip(box, sizes, strict=True))


def part_of_array(array: Array, box: Box) -> Array:
    """A box of an array of any backend."""
    if _is_whole(box, tuple(array.shape)):
        return array
    b = backend_of(array)
    return array[_slices(box)] if b is None else b.part(array, _slices(box))


def part_of(q: QArray, box: Box) -> QArray:
    """A box of a quantized array, which may cut blocks if along each axis where it does it lies in one."""
    if _is_whole(box, q.shape):
        return q
    around, inside = [], []
    for (start, stop), size, length in zip(box, q._checked().block, q.shape, strict=True):
        size = size or length
        first = start // size * size
        around.append((first, min(-(-stop // size) * size, length)))
        inside.append((start - first, stop - first))
    q = q[_slices(around)]
    return q if _is_whole(inside, q.shape) else q[_slices(inside)]


def dequantized(q: QArray, box: Box) -> _Numbers:
    """The values of any box of a quantized array, on NumPy."""
    around = []
    for axis, ((start, stop), size, length) in enumerate(zip(box, q._checked().block, q.shape, strict=True)):
        size = size or length
        cuts = start // size != (stop - 1) // size
        if cuts and size > stop - start:  # a block may be far larger than the box
            middle = stop // size * size
            halves = ((*box[:axis], half, *box[axis + 1 :]) for half in ((start, middle), (middle, stop)))
            return np.concatenate([dequantized(q, half) for half in halves], axis=axis)
        around.append((start // size * size, min(-(-stop // size) * size, length)) if cuts else (start, stop))
    values = np.asarray(q._backend.to_numpy(part_of(q, tuple(around)).dequantize()))
    return values[tuple(slice(i - first, j - first) for (i, j), (first, _) in zip(box, around, strict=True))]


def _is_whole(box: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> bool:
    return all(limits == (0, length) for limits, length in zip(box, shape, strict=True))


def _slices(box: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
