"""Loops that numba compiles for NumPy arrays: what a ufunc cannot say in one pass.

Owns: nothing but the loops. They hold no lock and start no thread; ``runtime.map_ranges`` runs them on every core, or
``pool`` where their names say so. Each works on one-dimensional views, whose indices the compiler need not check for a
second axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from aqt_lite.backends.cpu.native import task_of
from aqt_lite.backends.cpu.pool import in_parts

_REORDER = {"contract", "reassoc"}  # sums may be taken in any order: that is what lets them use vector registers


@njit(nogil=True, cache=True)
def encode_columns(x: Any, inverse: Any, zero: Any, least: Any, most: Any, codes: Any) -> None:  # pragma: no cover
    """Codes of finite x, with a scale (as its reciprocal) and a zero point for each column."""
    for r in range(x.shape[0]):
        values, out = x[r], codes[r]
        for c in range(values.shape[0]):
            code = np.rint(values[c] * inverse[c]) + zero[c]
            out[c] = np.int32(min(max(code, least), most))


@njit(nogil=True)
def _decode_rows(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    codes, scale, zero, values = given
    for r in range(start, stop):
        row, out, s, z = codes[r], values[r], scale[r], zero[r]
        for c in range(row.shape[0]):
            out[c] = np.float32(np.int32(row[c]) - z) * s


_decode_task = task_of(_decode_rows)


@njit(nogil=True, cache=True)
def decode_rows_in_parts(
    pool: Any, ends: Any, codes: Any, scale: Any, zero: Any, values: Any
) -> Any:  # pragma: no cover - compiled
    """``(codes - zero) * scale`` with a scale and a zero point for each row, on the threads of a pool."""
    in_parts(pool, ends, _decode_task((codes, scale, zero, values)))
    return True


@njit(nogil=True)
def _add_offsets(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    halves, offsets, size, tiny, most = given
    for n in range(start, stop):
        row, of_row = halves[n], offsets[n if offsets.shape[0] > 1 else 0]
        for g in range(of_row.shape[0]):
            offset, group = of_row[g], row[g * size : (g + 1) * size]
            for k in range(group.shape[0]):
                v = group[k] + offset
                v = (np.float32(0) if abs(v) < tiny else v) * np.float32(2)
                v = most if v > most else v
                group[k] = -most if v < -most else v


_offsets_task = task_of(_add_offsets)


@njit(nogil=True, cache=True)
def add_offsets_in_parts(
    pool: Any, ends: Any, halves: Any, offsets: Any, size: Any, tiny: Any, most: Any
) -> Any:  # pragma: no cover - compiled
    """``2 (halves + offsets)`` in place, an offset for ``size`` of a row: 0 where it is tiny, none beyond ``most``."""
    in_parts(pool, ends, _offsets_task((halves, offsets, size, tiny, most)))
    return True


@njit(nogil=True, cache=True)
def widen(codes: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Codes as floats: a ufunc's cast from int8 takes three times as long."""
    for r in range(codes.shape[0]):
        row, values = codes[r], out[r]
        for c in range(row.shape[0]):
            values[c] = row[c]


@njit(nogil=True, cache=True, fastmath=_REORDER)
def rows_times(w: Any, x: Any, y: Any) -> None:  # pragma: no cover - compiled
    """``y[n] = sum_k w[n, k] x[k]``: four rows of the weight at a time share each load of x."""
    rows, inner = w.shape
    zero = np.float32(0)
    whole = rows - rows % 4
    for n in range(0, whole, 4):
        w0, w1, w2, w3 = w[n], w[n + 1], w[n + 2], w[n + 3]
        a, b, c, d = zero, zero, zero, zero
        for k in range(inner):
            v = x[k]
            a += np.float32(w0[k]) * v
            b += np.float32(w1[k]) * v
            c += np.float32(w2[k]) * v
            d += np.float32(w3[k]) * v
        y[n], y[n + 1], y[n + 2], y[n + 3] = a, b, c, d
    for n in range(whole, rows):
        w0, a = w[n], zero
        for k in range(inner):
            a += np.float32(w0[k]) * x[k]
        y[n] = a


@njit(nogil=True, cache=True, fastmath=_REORDER)
def grouped_rows_times(w: Any, scale: Any, size: Any, x: Any, y: Any) -> None:  # pragma: no cover - compiled
    """``y[n] = sum_g scale[n, g] sum_k w[n, k] x[k]``, k over the group g of ``size`` (the last may be shorter)."""
    rows, inner = w.shape
    zero = np.float32(0)
    for n in range(rows):
        row, total = w[n], zero
        for g in range(scale.shape[1]):
            first, last = g * size, min(g * size + size, inner)
            part, values = row[first:last], x[first:last]
            a = zero
            for k in range(last - first):
                a += np.float32(part[k]) * values[k]
            total += a * scale[n, g]
        y[n] = total


@njit(nogil=True, cache=True, fastmath=_REORDER)
def exact_rows_times(w: Any, x: Any, longest: Any, y: Any) -> None:  # pragma: no cover - compiled
    """``y[n] += sum_k w[n, k] x[k]`` of integers, in float64 (x) and int64 (y): exact in runs of ``longest``."""
    for first in range(0, w.shape[1], longest):
        _exact_rows_times(w, x[first : first + longest], first, y)


@njit(nogil=True, cache=True, fastmath=_REORDER)
def _exact_rows_times(w: Any, x: Any, first: Any, y: Any) -> None:  # pragma: no cover - compiled
    rows, inner = w.shape[0], x.shape[0]
    last = first + inner
    whole = rows - rows % 4
    for n in range(0, whole, 4):
        w0, w1, w2, w3 = w[n][first:last], w[n + 1][first:last], w[n + 2][first:last], w[n + 3][first:last]
        a, b, c, d = 0.0, 0.0, 0.0, 0.0
        for k in range(inner):
            v = x[k]
            a += np.float64(w0[k]) * v
            b += np.float64(w1[k]) * v
            c += np.float64(w2[k]) * v
            d += np.float64(w3[k]) * v
        y[n] += np.int64(a)
        y[n + 1] += np.int64(b)
        y[n + 2] += np.int64(c)
        y[n + 3] += np.int64(d)
    for n in range(whole, rows):
        w0, a = w[n][first:last], 0.0
        for k in range(inner):
            a += np.float64(w0[k]) * x[k]
        y[n] += np.int64(a)


@njit(nogil=True, cache=True, fastmath={"contract"})
def _add_eight_rows(
    y: Any, w0: Any, w1: Any, w2: Any, w3: Any, w4: Any, w5: Any, w6: Any, w7: Any, x: Any
) -> None:  # pragma: no cover - compiled
    for n in range(y.shape[0]):
        a = np.float32(w0[n]) * x[0] + np.float32(w1[n]) * x[1]
        b = np.float32(w2[n]) * x[2] + np.float32(w3[n]) * x[3]
        c = np.float32(w4[n]) * x[4] + np.float32(w5[n]) * x[5]
        d = np.float32(w6[n]) * x[6] + np.float32(w7[n]) * x[7]
        y[n] += (a + b) + (c + d)


@njit(nogil=True, cache=True, fastmath={"contract"})
def columns_times(w: Any, x: Any) -> Any:  # pragma: no cover - compiled
    """``y[n] = sum_k x[k] w[k, n]``: rows of the weight stream by, the row of y stays in cache.

    In runs of 128 rows, each summed by itself first: shorter chains of additions, less error.
    """
    inner, columns = w.shape
    y = np.zeros(columns, dtype=np.float32)
    part = np.zeros(columns, dtype=np.float32)
    for first in range(0, inner, 128):
        last = min(first + 128, inner)
        part[:] = 0
        whole = last - (last - first) % 8
        for k in range(first, whole, 8):
            r = w[k : k + 8]
            _add_eight_rows(part, r[0], r[1], r[2], r[3], r[4], r[5], r[6], r[7], x[k : k + 8])
        for k in range(whole, last):
            row, v = w[k], x[k]
            for n in range(columns):
                part[n] += np.float32(row[n]) * v
        for n in range(columns):
            y[n] += part[n]
    return y


@njit(nogil=True, cache=True, fastmath=_REORDER)
def small_product(w: Any, scale: Any, x: Any, bias: Any, contract: Any, y: Any) -> Any:  # pragma: no cover - compiled
    """``y = (x @ w) * scale + bias``, or with ``w.T``, in one call; False where a sum, before its scale, is not finite.

    ``scale`` and ``bias`` have one entry for all outputs or one for each.
    """
    zero, scales, biases = np.float32(0), scale.shape[0] > 1, bias.shape[0] > 1
    total = zero
    for m in range(x.shape[0]):
        out = y[m]
        if contract == 1:
            rows_times(w, x[m], out)
        else:
            out[:] = columns_times(w, x[m])
        for n in range(out.shape[0]):
            total += out[n] * zero  # NaN from the first infinity or NaN on
            out[n] = out[n] * scale[n if scales else 0] + bias[n if biases else 0]
    return total == zero
