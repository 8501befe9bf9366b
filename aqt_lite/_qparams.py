"""Which scales and zero points are usable.

Owns: the checks of their values. Imports: elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aqt_lite.elements import FLOAT_TYPES, INTEGER_TYPES, ElementType, FloatType

__all__ = ["check_scale", "check_zero_point"]


def check_scale(scale: Any, source: FloatType) -> None:
    expected = f"positive and finite, between {source.tiny:.3g} and {source.huge:.3g} for {source.name} values"
    if isinstance(scale, int | float):
        if not source.tiny <= scale <= source.huge:
            raise ValueError(f"scale={scale}: it must be {expected}")
        return
    if scale.dtype.name not in (*FLOAT_TYPES, *INTEGER_TYPES):
        raise TypeError(f"scale has dtype {scale.dtype.name}: give real numbers")
    wide = scale.astype(np.float64)
    bad = ~((wide >= source.tiny) & (wide <= source.huge))
    if bad.any():
        raise ValueError(
            f"scale={wide[bad].flat[0]}: every scale must be {expected} ({int(bad.sum())} of {bad.size} are not)"
        )


def check_zero_point(zero_point: Any, element: ElementType) -> None:
    codes = f"a code of {element.name}, {element.min} to {element.max}"
    if isinstance(zero_point, int | float):
        if not isinstance(zero_point, int):
            raise TypeError(f"zero_point={zero_point} is a float: it must be an integer, the code of 0.0")
        if not element.min <= zero_point <= element.max:
            raise ValueError(f"zero_point={zero_point}: must be {codes}")
        return
    if zero_point.dtype.name not in INTEGER_TYPES:
        raise TypeError(f"zero_point has dtype {zero_point.dtype.name}: it must be an integer, the code of 0.0")
    bad = (zero_point < element.min) | (zero_point > element.max)
    if bad.any():
        raise ValueError(f"zero_point={zero_point[bad].flat[0]}: must be {codes}")
