"""Numbers that are not subnormal, which backends treat differently, in the dtype of all arithmetic.

Owns: what becomes of the others. Imports: the records, elements, the ``Backend`` interface.
"""

from __future__ import annotations

from typing import Any

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._records import Spec
from aqt_lite.elements import float_type

__all__ = ["computable", "flushed", "without_tiny"]


def computable(x: Array, spec: Spec, b: Backend) -> Array:
    """``x`` in the dtype of all arithmetic."""
    return b.xp.astype(x, b.dtype(spec.source.compute))


def flushed(x: Array, spec: Spec, xp: Any) -> Array:
    """``x``, 0 of its sign where it is subnormal."""
    return xp.where(xp.abs(x) < float_type(spec.source.compute).tiny / 2, x * 0.0, x)


def without_tiny(x: Array, spec: Spec, xp: Any) -> Array:
    """``x``, 0 where it or its half might be subnormal."""
    return xp.where(xp.abs(x) < spec.source.tiny, xp.zeros_like(x), x)
