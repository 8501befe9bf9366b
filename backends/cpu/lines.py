"""Arrays that loops compute in, which begin where a line of the cache does.

Owns: how loops come by such arrays. Imports: numba alone.

numba's own begin at multiples of 32 bytes. Vectors of 64 bytes then lie in two lines each, and some processors load
them at half the speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

__all__ = ["LINE", "on_lines"]

LINE = 64
"""Bytes of a line, on every processor that there are loops for."""


@njit(nogil=True)
def on_lines(rows: Any, columns: Any, dtype: Any) -> Any:  # pragma: no cover - compiled
    """An uninitialized matrix."""
    size = rows * columns * np.empty(0, dtype).itemsize
    raw = np.empty(size + LINE, dtype=np.uint8)
    start = -raw.ctypes.data & (LINE - 1)
    return raw[start : start + size].view(dtype).reshape(rows, columns)
