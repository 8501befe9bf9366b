"""Arrays in blocks: what ``granularity`` says of shapes, done to arrays.

Owns: ``spread`` (one value a block to one an element) and ``reduced`` (the other way). Imports: granularity.
"""

from __future__ import annotations

from typing import Any

from aqt_lite._namespace import Array
from aqt_lite.granularity import Block, grid_of, group_axes

__all__ = ["reduced", "spread"]


def spread(blocks: Array, shape: tuple[int, ...], block: Block, xp: Any) -> Array:
    """An array of the grid's shape, repeated so that it broadcasts against an array of ``shape``."""
    for axis in group_axes(shape, block):
        size = block[axis]
        assert size is not None
        before, after = tuple(blocks.shape[:axis]), tuple(blocks.shape[axis + 1 :])
        whole, rest = shape[axis] // size, shape[axis] % size  # divmod of a symbolic length is not traced
        last = blocks[(slice(None),) * axis + (slice(whole, None), ...)]
        if rest:
            blocks = blocks[(slice(None),) * axis + (slice(0, whole), ...)]
        wide = xp.broadcast_to(xp.expand_dims(blocks, axis=axis + 1), (*before, whole, size, *after))
        blocks = xp.reshape(wide, (*before, whole * size, *after))
        if rest:
            # A shorter last group is joined on. Repeating it in full and cutting the surplus off is what torch's
            # compiler gets wrong: 2.13 leaves the elements after the last whole group unset (inductor's cpp.py,
            # try_loop_split, divides the length of a loop by the group's without regard to a remainder).
            blocks = xp.concat([blocks, xp.broadcast_to(last, (*before, rest, *after))], axis=axis)
    return blocks


def reduced(x: Array, block: Block, reduction: Any, xp: Any) -> Array:
    """``reduction`` (largest or smallest) over every block: an array of the grid's shape. Empty blocks give 0."""
    shape = tuple(x.shape)
    if 0 in shape:
        return xp.broadcast_to(xp.sum(x), grid_of(shape, block))
    grouped = group_axes(shape, block)
    for axis in grouped:  # a shorter last group is filled up with its own last value, which no extremum notices
        size = block[axis]
        assert size is not None
        missing = -shape[axis] % size
        if missing:
            last = x[(slice(None),) * axis + (slice(-1, None), ...)]
            filled = (*last.shape[:axis], missing, *last.shape[axis + 1 :])
            x = xp.concat([x, xp.broadcast_to(last, filled)], axis=axis)
    split: list[int] = []
    reduced: list[int] = []
    for axis, (length, size) in enumerate(zip(x.shape, block, strict=True)):
        if axis in grouped:
            assert size is not None
            split += [length // size, size]
            reduced.append(len(split) - 1)
        else:
            split.append(length)
            if size is None or size > 1:
                reduced.append(len(split) - 1)
    if not reduced:
        return x
    x = reduction(xp.reshape(x, tuple(split)), axis=tuple(reduced), keepdims=True)
    return xp.reshape(x, grid_of(shape, block))
