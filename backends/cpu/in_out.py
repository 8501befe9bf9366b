"""Products in float32 with a weight that lies (in, out), as the kernels of JAX do, by loops that read it as it lies.

Owns: what those loops are told of such a weight and of its parts. Imports: the runtime, ``serve``, which says what it
is for, and ``operands``, for how scales are kept. ``outer`` has the loops, and ``stored`` calls it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import runtime, serve
from aqt_lite.backends.cpu.operands import Operands, adds_nothing, operands_of, operands_of_columns
from aqt_lite.backends.cpu.runtime import LOADED, aligned_empty, in_parts, map_ranges, steps_of_product

__all__ = ["LEAST_CODES", "are_few", "has_columns", "matmul_in_out", "operands_of_rows", "parts_of_rows"]

MOST_PARTS, FEWER_PARTS = 16, 8
"""Parts of K whose sums are added up at the end, and how many there are where all would have many sums."""

MANY_SUMS = 1 << 21
"""Floats that those are: 8 MB."""

LEAST_CODES = 1 << 15
"""Codes of a part, for which its sums are worth a place of their own."""

ROWS_AT_A_TIME = 32
"""Rows of the weight that a part has a multiple of."""

SHORTEST_COLUMN = 8
"""Codes of a column with one scale from which on numbers are made in registers: all of them read it once."""


def matmul_in_out(x: Array, w: Coded, bias: Array | None, *, spec: Spec, columns: int, packed: bool) -> Any:
    """``x @ dequantize(w) + bias`` in float32, where ``serve.decodes_in_out``; NotImplemented for some scales.

    ``columns``: of the weight, which of codes that are ``packed`` has no array for an axis of that length.
    """
    loops, length, of_columns = runtime.outer_loops(), len(w.codes), has_columns(spec)
    operands = operands_of_rows(w, spec, columns, packed, get_backend("numpy"))
    x = np.ascontiguousarray(x, dtype=np.float32)
    codes = np.ascontiguousarray(w.codes).view(np.uint8)
    bias = adds_nothing(columns) if bias is None else np.ascontiguousarray(bias, dtype=np.float32)
    width, few = loops.width_of_sums(columns), are_few(len(x), operands, of_columns)
    ends, each = parts_of_rows(length, len(x), columns, width)
    sums = aligned_empty((len(ends) - 1, len(x), width), np.float32, LOADED)
    steps = steps_of_product(length * columns, len(x))
    given = codes, x, columns, *operands, of_columns, few, each, sums
    if not in_parts(loops.multiply_in_parts, steps, ends, *given):
        return NotImplemented
    y = np.empty((len(x), columns), dtype=np.float32)

    def add_up(start: int, stop: int) -> None:
        loops.add_up(sums, start, operands.kind, few, bias, y[start:stop])

    map_ranges(add_up, len(x), 1, sums.size)
    return y


def has_columns(spec: Spec) -> bool:
    """Whether every column of a weight has scales of its own."""
    return spec.block[1] == 1


def operands_of_rows(w: Coded, spec: Spec, columns: int, packed: bool, b: Backend) -> Operands:
    """What the loops read of a weight, whose rows they meet one after the other."""
    return operands_of_columns(w, spec, packed, b) if has_columns(spec) else operands_of(w, spec, columns, packed, b)


def are_few(rows: int, operands: Operands, of_columns: bool) -> bool:
    """Whether codes become numbers in registers, for each few rows of x anew."""
    decoding = runtime.decoding_loops()
    if rows > serve.MOST_ROWS_IN_REGISTERS or operands.kind not in (decoding.BYTES, decoding.HALVES):
        return False
    return bool(np.isfinite(operands.table).all()) and (not of_columns or operands.size >= SHORTEST_COLUMN)


@functools.lru_cache(maxsize=64)
def parts_of_rows(length: int, rows: int, columns: int, width: int) -> tuple[Array, int]:
    """Where parts of the weight's rows end, and how many rows each has, but for the last: by shapes alone."""
    most = min(MOST_PARTS, max(MANY_SUMS // (rows * width), FEWER_PARTS))
    parts = max(1, min(most, length * columns // LEAST_CODES))
    each = -(-length // (parts * ROWS_AT_A_TIME)) * ROWS_AT_A_TIME
    return np.array([*range(0, length, each), length]), each
