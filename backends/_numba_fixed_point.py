"""A product of floats in fixed point: rows of x to integers, exact integer products, and back with the scales.

Owns: ``aqt_lite.ops.reference.matmul_reproducible`` for a contracted axis in one piece and rows that want no second
pass, as loops that NumPy's kernel and XLA's call share: the same steps in the same order, hence the same bits, but a
strip of the result at a time, so that nothing between x and the result goes through memory but the packed rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from aqt_lite.backends._numba_dots import (
    STRIP,
    multiply_one_row,
    multiply_rows,
    pack_one_row,
    pack_rows,
    rows_of_a_panel,
)

__all__ = ["ROWS_AT_ONCE", "finish_columns", "prepare_rows", "shape_of_panels"]

ROWS_AT_ONCE = 512
"""Rows of x whose sums are in memory at a time: a multiple of every panel's height."""


def shape_of_panels(rows: int, inner: int) -> tuple[int, int, int]:
    """Shape of the uint32 array that ``prepare_rows`` packs ``rows`` rows into; empty for one row, which needs none."""
    height = rows_of_a_panel(rows, 4)
    return (-(-rows // height), inner // 4, 4 * height) if rows > 1 else (0, 0, 0)


@njit(nogil=True, cache=True)
def _to_fixed_point(
    x: Any, powers: Any, integers: Any, exponent: Any, total: Any, kind: Any
) -> None:  # pragma: no cover
    """Rows of float32 as integers ``rint(x * 2^(30 - exponent))``, their sums, and what kind of row each is.

    Kind: bit 0 has a value that is not finite (integers 0); bit 1 wants a second pass for what was rounded away; bit 2
    has entries more than 2^37 below its largest. ``powers[i]`` is 2^(i - 256), 0 far below.
    """
    bits = x.view(np.int32)
    for m in range(x.shape[0]):
        most, least = np.int32(0), np.int32(0x7FFFFFFF)
        pattern = bits[m]
        for k in range(pattern.shape[0]):
            magnitude = pattern[k] & np.int32(0x7FFFFFFF)
            most = max(most, magnitude)
            least = min(least, magnitude if magnitude > 0 else np.int32(0x7FFFFFFF))
        if most >= np.int32(0x7F800000):
            kind[m], exponent[m], total[m] = 1, 0, 0
            integers[m, :] = 0
            continue
        if most < np.int32(0x00800000):  # nothing but subnormal numbers and zeros, which count as zeros
            kind[m], exponent[m], total[m] = 0, -127, 0
            integers[m, :] = 0
            continue
        e = (most >> 23) - 127
        if (most & np.int32(0x7FFFFF)) > np.int32(0x7E0000):  # a fraction above 127/64 would carry into a fifth digit
            e += 1
        half = (30 - e) >> 1
        first, second = powers[half + 256], powers[30 - e - half + 256]
        row, out = x[m], integers[m]
        present, small, added = np.int32(0), np.int32(0), np.int64(0)
        for k in range(row.shape[0]):
            v = row[k] if abs(row[k]) >= np.float32(2.0**-126) else np.float32(0)
            scaled = v * first * second
            value = np.int32(np.rint(scaled))
            out[k] = value
            added += value
            there = np.int32(v != 0)
            present += there
            small += there & np.int32(abs(scaled) < np.float32(2.0**18))
        exponent[m], total[m] = e, added
        ends = np.array([most, least], dtype=np.int32).view(np.float32)
        kind[m] = (2 if np.int64(small) * 16 > present else 0) | (4 if ends[1] < ends[0] * np.float32(2.0**-37) else 0)


@njit(nogil=True, cache=True)
def _from_fixed_point(
    sums: Any, total: Any, zero: Any, fraction: Any, row_exponent: Any, exponent: Any, powers: Any, bias: Any, y: Any
) -> None:  # pragma: no cover - compiled
    """The last steps: sums (int64, zero points not yet taken off) to float32, times the scales, plus the bias."""
    smallest = np.float32(2.0**-126)
    for m in range(y.shape[0]):
        row, out = sums[m], y[m]
        for n in range(row.shape[0]):
            s = row[n] - total[m] * zero[n]
            t = np.float32(np.int32(s >> 24)) * np.float32(2.0**24) + np.float32(np.int32(s & 0xFFFFFF))
            e = row_exponent[m] + exponent[n] - 30
            half = e >> 1
            v = t * fraction[n] * powers[half + 256] * powers[e - half + 256]
            v = (np.float32(0) if abs(v) < smallest else v) + bias[n]  # asked so that NaN stays NaN
            out[n] = np.float32(0) if abs(v) < smallest else v


@njit(nogil=True, cache=True)
def prepare_rows(
    x: Any, powers: Any, exponent: Any, total: Any, kind: Any, panels: Any, tail: Any
) -> None:  # pragma: no cover - compiled
    """Rows of x, the first of which begins a panel: their exponents, sums and kinds, and their integers as panels.

    ``tail`` gets the integers that no panel holds: those beyond a multiple of four, or all where there are no panels.
    """
    rows, inner = x.shape
    whole = 4 * panels.shape[1]
    height = max(1, panels.shape[2] // 4)
    integers = np.empty((min(height, rows), inner), dtype=np.int32)
    for first in range(0, rows, height):
        last = min(first + height, rows)
        some = integers[: last - first]
        _to_fixed_point(x[first:last], powers, some, exponent[first:last], total[first:last], kind[first:last])
        if whole:
            pack_rows(some, 4, height, panels[first // height : first // height + 1])
        tail[first:last] = some[:, whole:]


@njit(nogil=True, cache=True)
def finish_columns(
    w: Any,
    unsigned: Any,
    panels: Any,
    tail: Any,
    row_exponent: Any,
    total: Any,
    kind: Any,
    fraction: Any,
    exponent: Any,
    zero: Any,
    bias: Any,
    powers: Any,
    y: Any,
) -> None:  # pragma: no cover - compiled
    """Columns of the result for rows of the weight ``w``; ``unsigned`` says that its bytes are uint8, 128 too large."""
    rows, (columns, inner) = y.shape[0], w.shape
    height = max(1, panels.shape[2] // 4)
    as_it_lies = w.strides[1] == 1 and not unsigned
    strip = np.empty((0 if as_it_lies else STRIP, inner), dtype=np.int8)
    sums = np.empty((min(rows, ROWS_AT_ONCE), STRIP), dtype=np.int64)
    planes = pack_one_row(tail[0]) if rows == 1 else np.empty((0, 0), dtype=np.uint8)
    for start in range(0, columns, STRIP):
        stop = min(start + STRIP, columns)
        if as_it_lies:
            codes = w[start:stop]
        else:
            codes = strip[: stop - start]
            for n in range(stop - start):
                for k in range(inner):
                    codes[n, k] = w[start + n, k] ^ np.int8(-128) if unsigned else w[start + n, k]
        own = slice(start, stop)
        for first in range(0, rows, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, rows)
            found, out = sums[: last - first, : stop - start], y[first:last, own]
            if rows == 1:
                multiply_one_row(codes, tail[0], planes, found[0])
            else:
                near = panels[first // height : (last + height - 1) // height]
                multiply_rows(codes, tail[first:last], near, 4, height, found)
            exponents = row_exponent[first:last]
            _from_fixed_point(
                found, total[first:last], zero[own], fraction[own], exponents, exponent[own], powers, bias[own], out
            )
            for m in range(first, last):
                if kind[m] & 1:
                    out[m - first, :] = np.float32(np.nan)
