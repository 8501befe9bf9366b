"""Exact products of integers: by the processor's int8 dot products where it has them, else in float64.

Owns: ``x @ w.T`` as int64 and ``reference.integer_matmul`` for NumPy arrays. Imports: the runtime, ``serve``.
"""

from __future__ import annotations

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite.backends.cpu import runtime, serve
from aqt_lite.backends.cpu.runtime import (
    CHUNKS_PER_CORE,
    LARGE,
    LOADED,
    aligned_empty,
    einsum,
    loops_of_product,
    map_ranges,
    tiles,
)

__all__ = ["exact_matmul", "integer_matmul"]

LONGEST_EXACT = 1 << 13
"""Products of 31 bits and 9 whose sum float64 holds in any order."""


def integer_matmul(x: Array, w: Array) -> Array:
    """``x @ w.T`` over the last axes, in int32."""
    if x.ndim == 2:
        return exact_matmul(x, w).astype(np.int32)
    return np.stack([exact_matmul(a, c).astype(np.int32) for a, c in zip(x, w, strict=True)])


def exact_matmul(x: Array, w: Array) -> Array:
    """``x @ w.T`` of integers below 2^31 and 2^9 as int64. A uint8 ``w`` counts as 128 less."""
    y = np.empty((len(x), len(w)), dtype=np.int64)
    if not serve.exact_dots(x, w):
        _by_floats(x, _as_int8(w, None) if w.dtype == np.uint8 else w, y)
        return y
    dots = runtime.integer_dots()
    digits, most = 1 if x.dtype == np.int8 else dots.DIGITS, dots.ROWS_AT_ONCE
    for some in (slice(first, first + most) for first in range(0, len(x), most)):
        rows, sums = x[some], y[some]
        for part in dots.parts_of_rows(len(rows), digits):
            _by_dots(rows[part], w, sums[part], digits)
    return y


def _by_dots(x: Array, w: Array, y: Array, digits: int) -> None:
    dots, (rows, inner) = runtime.integer_dots(), x.shape
    if rows == 1 and digits == dots.DIGITS:
        planes = dots.pack_one_row(x[0])

        def multiply(w: Array, y: Array) -> None:
            dots.multiply_one_row(w, x[0], planes, y[0])

    else:
        panels = aligned_empty(dots.shape_of_panels(rows, inner, digits), np.uint32, LOADED)
        height = panels.shape[2] // digits

        def pack(start: int, stop: int) -> None:
            dots.pack_rows(x[start:stop], digits, height, panels[start // height :])

        map_ranges(pack, rows, height, x.size)

        def multiply(w: Array, y: Array) -> None:
            dots.multiply_rows(w, panels, digits, height, y)

    def columns(start: int, stop: int) -> None:
        if w.dtype == np.int8 and w.strides[1] == 1:
            multiply(w[start:stop], y[:, start:stop])
            return
        scratch = np.empty((min(dots.STRIP, stop - start), inner), dtype=np.int8)
        for n in range(start, stop, dots.STRIP):
            e = min(n + dots.STRIP, stop)
            multiply(_as_int8(w[n:e], scratch[: e - n]), y[:, n:e])

    multiple, work = dots.STRIP if rows > 1 else dots.HEIGHT_FOR_ONE_ROW, loops_of_product(w.size, rows)
    map_ranges(columns, len(w), multiple, work, CHUNKS_PER_CORE)


def _as_int8(w: Array, out: Array | None) -> Array:
    """Codes of one byte as int8, those of uint8 128 less, in the order of C."""
    out = np.empty(w.shape, dtype=np.int8) if out is None else out
    if w.dtype == np.uint8:
        np.bitwise_xor(w, np.uint8(128), out=out.view(np.uint8))
    else:
        np.copyto(out, w)
    return out


def _by_floats(x: Array, w: Array, y: Array) -> None:
    """In float64 sums, each short enough to be exact."""
    x = np.ascontiguousarray(x, dtype=np.float64)
    rows, inner = w.shape
    y[:] = 0
    runs = [slice(k, k + LONGEST_EXACT) for k in range(0, inner, LONGEST_EXACT)]
    by_einsum = len(x) <= serve.MOST_ROWS_FOR_EINSUM
    loops = runtime.compiled_loops() if w.flags.c_contiguous and len(x) <= serve.MOST_ROWS_FOR_LOOPS else None

    def columns(start: int, stop: int) -> None:
        if loops is not None:
            for part in tiles(start, stop, inner):
                for row, out in zip(x, y, strict=True):
                    loops.exact_rows_times(w[part], row, LONGEST_EXACT, out[part])
            return
        if by_einsum:
            for row, out in zip(x, y[:, start:stop], strict=True):
                for run in runs:
                    out += einsum(w[start:stop, run], row[run], np.empty(stop - start)).astype(np.int64)
            return
        for part in tiles(start, stop, 2 * inner):
            codes = w[part].astype(np.float64)
            for run in runs:
                y[:, part] += (x[:, run] @ codes[:, run].T).astype(np.int64)

    if w.size < LARGE or (loops is None and not by_einsum):  # BLAS has threads of its own
        columns(0, rows)
    else:
        map_ranges(columns, rows, 4)
