"""BitRound a part at a time, while it is in cache, on every core.

Owns: the form of ``significant.bitrounded`` for NumPy arrays. Imports: the operation, the tiles of ``quantize``.
"""

from __future__ import annotations

from typing import Any

from aqt_lite import significant
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu.quantize import for_tiles
from aqt_lite.backends.cpu.runtime import LARGE, aligned_empty

__all__ = ["bitrounded"]


def bitrounded(x: Array, *, keepbits: int) -> Any:
    """``significant.bitrounded`` on tiles."""
    if x.size < LARGE:
        return NotImplemented
    numpy, rounded = get_backend("numpy"), aligned_empty(x.shape, x.dtype)

    def work(at: tuple[slice, ...]) -> None:
        rounded[at] = significant.bitrounded(x[at], keepbits=keepbits, b=numpy)

    for_tiles(lambda tile: work(tile.at), x.shape, (1,) * x.ndim)
    return rounded
