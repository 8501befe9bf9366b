"""Who called this package.

Owns: warnings that name the line of a call from outside. Imports: nothing.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["warn"]

_INSIDE = ("aqt_lite.", "torch.")  # torch asks for what its own functions were called with


def _caller() -> FrameType:
    """The frame of who called this package, by way of torch or not."""
    frame: FrameType = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_INSIDE):
        frame = frame.f_back
    return frame


def warn(words: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the line of who called this package, however many functions lie between."""
    frame = _caller()
    warnings.warn_explicit(words, category, frame.f_code.co_filename, frame.f_lineno)
