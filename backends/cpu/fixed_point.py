"""Products of floats made of exact products of integers: the reproducible ones, and fast ones where that is faster.

Owns: the forms of ``reference.matmul_reproducible`` and ``reference.fixed_point_matmul`` for NumPy arrays, with their
bits. Imports: the operations, the runtime, ``integers``, and ``serve``, which says what each is for.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import runtime, serve
from aqt_lite.backends.cpu.integers import exact_matmul
from aqt_lite.backends.cpu.runtime import CHUNKS_PER_CORE, aligned_empty, map_ranges
from aqt_lite.ops import reference

__all__ = ["fixed_point_matmul", "matmul_by_dots", "matmul_reproducible", "powers_of_two"]


LONGEST_IN_FLOATS = 256
"""Width of pieces up to which BLAS multiplies them in float64, exactly; from there on integer products gain more."""

FEWEST_FOR_BLAS_THREADS = 1 << 18
"""Products up to which BLAS starts no threads, which would be in the way of ours."""


@functools.cache
def powers_of_two() -> Array:
    """``2^(i - 256)`` for i in [0, 512), as ``Backend.power_of_two``: 0 below 2^-100."""
    return get_backend("numpy").power_of_two(np.clip(np.arange(-256, 256, dtype=np.int32), None, 127))


@np.errstate(all="ignore")
def _by_dots(x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int, fast: bool) -> Any:
    """``reference.matmul_reproducible`` where the contracted axis is one piece and no row wants a second pass.

    What the reference does to whole arrays in some thirty steps happens here in two loops around the integer product.
    ``fast``: only rows of which fixed point loses nothing that a float32 product keeps.
    """
    if not serve.dots(x, x.dtype.name, w, spec, contract):
        return NotImplemented
    (rows, _), columns, x_dtype = x.shape, len(w.codes), x.dtype
    dots, powers = runtime.integer_dots(), powers_of_two()
    x = np.ascontiguousarray(x, dtype=np.float32)
    parts = []
    for part in dots.parts_of_rows(rows, 4):
        prepared = _prepared(x[part], powers)
        if (prepared[2] & (dots.ANY_FLAG if fast else dots.SECOND_PASS)).any():
            return NotImplemented
        parts.append((part, *prepared))
    # compiled loops check no bounds, and are compiled anew for another layout
    vectors = [np.ascontiguousarray(v) for v in reference.of_columns(w, bias, spec=spec, b=get_backend("numpy"))]
    codes, unsigned = w.codes.view(np.int8), w.codes.dtype == np.uint8
    y = np.empty((rows, columns), dtype=np.float32)

    def finish(start: int, stop: int) -> None:
        of_columns = [v[start:stop] for v in vectors]
        for part, row_exponent, total, flags, panels, tail in parts:
            of_rows = (panels, tail, row_exponent, total, flags)
            dots.finish_columns(codes[start:stop], unsigned, *of_rows, *of_columns, powers, y[part, start:stop])

    map_ranges(finish, columns, 5 if rows == 1 else dots.STRIP, codes.size, CHUNKS_PER_CORE)
    return y.astype(x_dtype, copy=False)


matmul_reproducible = functools.partial(_by_dots, fast=False)
matmul_by_dots = functools.partial(_by_dots, fast=True)


def _prepared(x: Array, powers: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Exponents, sums and flags of the rows of x, their panels, and the integers that no panel holds."""
    dots, (rows, inner) = runtime.integer_dots(), x.shape
    exponent, total, flags = np.empty(rows, np.int32), np.empty(rows, np.int64), np.empty(rows, np.int32)
    panels = aligned_empty(dots.shape_of_panels(rows, inner, 4), np.uint32)
    tail = np.empty((rows, inner - 4 * panels.shape[1]), dtype=np.int32)
    height = max(1, panels.shape[2] // 4)

    def prepare(a: int, b: int) -> None:
        of_rows = panels[a // height : -(-b // height)]
        dots.prepare_rows(x[a:b], powers, exponent[a:b], total[a:b], flags[a:b], of_rows, tail[a:b])

    map_ranges(prepare, rows, height, x.size)
    return exponent, total, flags, panels, tail


def fixed_point_matmul(x: Array, w: Array, zero_point: Array | None) -> tuple[Array, Array]:
    """``reference.fixed_point_matmul`` without digits: an int64 holds a sum, and a float64 that of a short piece."""
    if len(x) > 1 and x.shape[2] <= LONGEST_IN_FLOATS:
        return _of_short_pieces(x, w, zero_point)
    total = np.stack([exact_matmul(a, c) for a, c in zip(x, w, strict=True)])
    if zero_point is not None:
        total -= x.sum(axis=2, keepdims=True, dtype=np.int64) * zero_point
    return (total >> 24).astype(np.int32), (total & 0xFFFFFF).astype(np.int32)


def _of_short_pieces(x: Array, w: Array, zero_point: Array | None) -> tuple[Array, Array]:
    (pieces, rows, width), columns = x.shape, w.shape[1]
    high, low = (np.empty((pieces, rows, columns), np.int32) for _ in range(2))
    height = max(1, FEWEST_FOR_BLAS_THREADS // max(1, width * columns))

    def some(start: int, stop: int) -> None:
        for p in range(start, stop):
            right = w[p].astype(np.float64).T
            for n in range(0, rows, height):
                part = slice(n, n + height)
                left = x[p, part].astype(np.float64)
                total = left @ right
                if zero_point is not None:
                    total -= left.sum(axis=1, keepdims=True) * zero_point[p]
                upper = np.floor(total * 2.0**-24)
                total -= upper * 2.0**24
                high[p, part], low[p, part] = upper, total

    map_ranges(some, pieces, 1, high.size, CHUNKS_PER_CORE)
    return high, low
