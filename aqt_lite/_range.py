"""The range that codes can represent, block by block, in float64 on NumPy.

Owns: ``representable_range``, ``range_of``, and the margin of what rounds into it. Imports: the container.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aqt_lite._registry import get_backend
from aqt_lite.elements import ElementType
from aqt_lite.granularity import grid_of
from aqt_lite.qarray import QArray

__all__ = ["range_of", "representable_range", "scales_of_blocks", "with_margin"]

_Numbers = np.ndarray[Any, Any]


def representable_range(q: QArray, *, slack: bool = False) -> tuple[_Numbers, _Numbers]:
    """Values of the smallest and the largest code of every block, on the grid of blocks, in float64.

    With ``slack``, wider at each end by half the distance between the format's two outermost numbers: what lies in
    between rounds to the outermost code, and what lies beyond is clipped to it.
    """
    zero_point = None if q.zero_point is None else q._backend.to_numpy(q.zero_point)
    offset = None if q.offset is None else _numbers(q.offset, q)
    return range_of(q._element, scales_of_blocks(q), zero_point, offset, slack=slack)


def range_of(
    element: ElementType, scale: _Numbers, zero_point: _Numbers | None, offset: _Numbers | None, *, slack: bool
) -> tuple[_Numbers, _Numbers]:
    """The same from parameters that are known, as NumPy has them."""
    low, after_low, before_high, high = element.outermost(get_backend("numpy"))
    zero, scale = 0 if zero_point is None else zero_point, scale.astype(np.float64)
    added = 0.0 if offset is None else offset.astype(np.float64)
    with np.errstate(over="ignore"):
        bottom, top = (low - zero) * scale + added, (high - zero) * scale + added
        if slack:
            bottom, top = bottom - (after_low - low) / 2 * scale, top + (high - before_high) / 2 * scale
    return np.minimum(bottom, top), np.maximum(bottom, top)  # scales may be negative


def scales_of_blocks(q: QArray) -> _Numbers:
    """A number for every block, in float64."""
    if q.scale is None:
        return np.ones(grid_of(q.shape, q._checked().block))
    return _numbers(q.scale, q)


def _numbers(kept: Any, q: QArray) -> _Numbers:
    values = kept.dequantize() if isinstance(kept, QArray) else kept
    return np.asarray(q._backend.to_numpy(values)).astype(np.float64)


def with_margin(low: _Numbers, high: _Numbers, compute: str) -> tuple[_Numbers, _Numbers]:
    """A range with what may have rounded to its ends: the scale's reciprocal and two products round, in ``compute``."""
    margin = 4 * float(np.finfo(compute).eps) * np.maximum(np.abs(low), np.abs(high))
    return low - margin, high + margin
