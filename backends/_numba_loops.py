"""Loops that numba compiles for NumPy arrays: what a ufunc cannot say in one pass.

Owns: nothing but the loops. They hold no lock and start no thread; ``_numpy_kernels`` runs them on every core.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_REORDER = {"contract", "reassoc"}  # sums may be taken in any order: that is what lets them use vector registers


@njit(nogil=True, cache=True)
def quantize_rows(x: Any, factor: Any, codes: Any, scale: Any) -> Any:  # pragma: no cover - compiled
    """Symmetric codes and scales of the rows of x; False where a value is not finite.

    The largest magnitude is taken of the bit patterns as integers, which order as the magnitudes do and put infinities
    and NaN on top.
    """
    bits = x.view(np.int32)
    tiny = np.float32(2.0**-125)
    finite = True
    for r in range(x.shape[0]):
        most = np.int32(0)
        for c in range(x.shape[1]):
            most = max(most, bits[r, c] & np.int32(0x7FFFFFFF))
        if most >= np.int32(0x7F800000):
            finite = False
        amax = np.array([most], dtype=np.int32).view(np.float32)[0]
        if amax < tiny:
            amax = np.float32(0)
        s = np.float32(amax * factor)
        if s < tiny:
            s = np.float32(1)
        scale[r] = s
        inverse = np.float32(1) / s
        for c in range(x.shape[1]):
            codes[r, c] = np.int32(np.rint(x[r, c] * inverse))
    return finite


@njit(nogil=True, cache=True, fastmath=_REORDER)
def rows_times(w: Any, x: Any, y: Any) -> None:  # pragma: no cover - compiled
    """``y[n, m] = sum_k w[n, k] x[m, k]``: two rows of x share a row of the weight, or four rows of it one of x."""
    rows, inner = w.shape
    zero = np.float32(0)
    for m in range(0, x.shape[0] - 1, 2):
        for n in range(rows):
            a = zero
            b = zero
            for k in range(inner):
                q = np.float32(w[n, k])
                a += q * x[m, k]
                b += q * x[m + 1, k]
            y[n, m] = a
            y[n, m + 1] = b
    if x.shape[0] % 2:
        m = x.shape[0] - 1
        whole = rows - rows % 4
        for n in range(0, whole, 4):
            a = zero
            b = zero
            c = zero
            d = zero
            for k in range(inner):
                v = x[m, k]
                a += np.float32(w[n, k]) * v
                b += np.float32(w[n + 1, k]) * v
                c += np.float32(w[n + 2, k]) * v
                d += np.float32(w[n + 3, k]) * v
            y[n, m] = a
            y[n + 1, m] = b
            y[n + 2, m] = c
            y[n + 3, m] = d
        for n in range(whole, rows):
            a = zero
            for k in range(inner):
                a += np.float32(w[n, k]) * x[m, k]
            y[n, m] = a


@njit(nogil=True, cache=True, fastmath=_REORDER)
def exact_rows_times(w: Any, x: Any, y: Any) -> None:  # pragma: no cover - compiled
    """``y[n, m] = sum_k w[n, k] x[m, k]``, integers in float64 (x) and int64 (y): exact, so the order is free."""
    rows, inner = w.shape
    for first in range(0, inner, 8192):
        last = min(first + 8192, inner)
        for n in range(rows):
            m = 0
            while m + 4 <= x.shape[0]:
                a = 0.0
                b = 0.0
                c = 0.0
                d = 0.0
                for k in range(first, last):
                    q = np.float64(w[n, k])
                    a += q * x[m, k]
                    b += q * x[m + 1, k]
                    c += q * x[m + 2, k]
                    d += q * x[m + 3, k]
                y[n, m] += np.int64(a)
                y[n, m + 1] += np.int64(b)
                y[n, m + 2] += np.int64(c)
                y[n, m + 3] += np.int64(d)
                m += 4
            while m < x.shape[0]:
                a = 0.0
                for k in range(first, last):
                    a += np.float64(w[n, k]) * x[m, k]
                y[n, m] += np.int64(a)
                m += 1


@njit(nogil=True, cache=True, fastmath={"contract"})
def _add_four_rows(y: Any, w0: Any, w1: Any, w2: Any, w3: Any, x: Any) -> None:  # pragma: no cover - compiled
    for n in range(y.shape[0]):
        low = np.float32(w0[n]) * x[0] + np.float32(w1[n]) * x[1]
        high = np.float32(w2[n]) * x[2] + np.float32(w3[n]) * x[3]
        y[n] += low + high


@njit(nogil=True, cache=True, fastmath={"contract"})
def columns_times(w: Any, x: Any) -> Any:  # pragma: no cover - compiled
    """``y[m, n] = sum_k x[m, k] w[k, n]``: rows of the weight stream by, the row of y stays in cache."""
    inner, columns = w.shape
    y = np.zeros((x.shape[0], columns), dtype=np.float32)
    whole = inner - inner % 4
    for k in range(0, whole, 4):
        for m in range(x.shape[0]):
            _add_four_rows(y[m], w[k], w[k + 1], w[k + 2], w[k + 3], x[m, k : k + 4])
    for k in range(whole, inner):
        for m in range(x.shape[0]):
            for n in range(columns):
                y[m, n] += np.float32(w[k, n]) * x[m, k]
    return y
