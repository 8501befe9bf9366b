"""A loop that turns scales and zero points which lie in the other order than the codes they belong to.

Owns: that loop, and the numba intrinsic in it. Imports: ``decoding``, for how wide vectors are. It holds no lock and
starts no thread.

Codes of a weight (in, out) are stored as (out, in), so that a product reads them in order; its scales stay (groups,
out), as the weight's shape has them. Loops that read a row of codes at a time want them (out, groups). Turned by the
library, all of them are written to memory and read again at each call; here it is those of a strip of rows, which stay
in cache until they are used.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from aqt_lite.backends.cpu.decoding import LANES

__all__ = ["blocks_of", "turn"]

SQUARE = LANES
"""Rows and columns that are turned in registers at a time: a line of the cache, where vectors are as wide."""


_ADDRESS: Any = ir.IntType(64)  # type: ignore[no-untyped-call]
_PLACES: Any = ir.VectorType(ir.IntType(32), SQUARE)  # type: ignore[no-untyped-call]

DISTANCES = tuple(SQUARE >> i for i in range(1, SQUARE.bit_length()))


def _square(bits: int) -> Any:
    """``out[i, j] = source[j, i]`` for a square of items of so many bits, by addresses, and strides in bytes.

    In steps, of which each exchanges what is off the diagonal of squares half as large as those before.
    """
    item: Any = ir.IntType(bits)  # type: ignore[no-untyped-call]
    vector: Any = ir.VectorType(item, SQUARE)  # type: ignore[no-untyped-call]

    def turned(builder: Any, rows: list[Any], distance: int) -> list[Any]:
        lanes = range(SQUARE)
        upper = [SQUARE + i - distance if i & distance else i for i in lanes]
        lower = [SQUARE + i if i & distance else i + distance for i in lanes]
        made = [*rows]
        for i in (i for i in lanes if not i & distance):
            for to, places in ((i, upper), (i + distance, lower)):
                mask: Any = ir.Constant(_PLACES, places)  # type: ignore[no-untyped-call]
                made[to] = builder.shuffle_vector(rows[i], rows[i + distance], mask)
        return made

    @intrinsic
    def square(_: Any, source: Any, source_stride: Any, out: Any, out_stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, source_stride, out, out_stride = arguments

            def place(base: Any, stride: Any, i: int) -> Any:
                return builder.inttoptr(builder.add(base, builder.mul(stride, _ADDRESS(i))), vector.as_pointer())

            rows = [builder.load(place(source, source_stride, i), align=1) for i in range(SQUARE)]
            for distance in DISTANCES:
                rows = turned(builder, rows, distance)
            for i, row in enumerate(rows):
                builder.store(row, place(out, out_stride, i), align=1)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), generate

    return square


_square_of_bytes, _square_of_words = _square(8), _square(32)


@njit(nogil=True, cache=True)
def turn(blocks: Any, start: Any, stop: Any, out: Any) -> None:  # pragma: no cover - compiled
    """``out[n, g] = blocks[g, start + n]``; both lie in the order of C, and have items of 1 byte, or of 4."""
    item, by, to = blocks.itemsize, blocks.strides[0], out.strides[0]
    first, there = blocks.ctypes.data + start * item, out.ctypes.data
    groups, rows = blocks.shape[0], stop - start
    whole_groups, whole_rows = groups - groups % SQUARE, rows - rows % SQUARE
    for g in range(0, whole_groups, SQUARE):
        for n in range(0, whole_rows, SQUARE):
            source, square = first + g * by + n * item, there + n * to + g * item
            if item == 1:
                _square_of_bytes(source, by, square, to)
            else:
                _square_of_words(source, by, square, to)
        for n in range(whole_rows, rows):
            for i in range(g, g + SQUARE):
                out[n, i] = blocks[i, start + n]
    for g in range(whole_groups, groups):
        for n in range(rows):
            out[n, g] = blocks[g, start + n]


@njit(nogil=True, cache=True)
def blocks_of(blocks: Any, swapped: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    """Scales or zero points (rows, groups) of the weight's rows ``start`` to ``stop`` - 1.

    ``blocks`` has them, or one row for all, or nothing; ``swapped``: as (groups, rows).
    """
    if not swapped:
        return blocks[start:stop] if blocks.shape[0] > 1 else blocks
    if blocks.shape[1] > 1:
        out = np.empty((stop - start, blocks.shape[0]), dtype=blocks.dtype)
        turn(blocks, start, stop, out)
        return out
    return blocks.reshape((blocks.shape[1], blocks.shape[0]))
