"""Who called this package.

Owns: the frame of a call from outside, and warnings that name its line. Imports: nothing.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType

__all__ = ["caller", "warn"]

_INSIDE = ("aqt_lite.", "torch.")  # torch asks for what its own functions were called with


def caller() -> FrameType:
    """The frame of who called this package, by way of torch or not."""
    frame: FrameType = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(_INSIDE):
        frame = frame.f_back
    return frame


def warn(words: str, category: type[Warning] = UserWarning) -> None:
    """A warning at the line of who called this package, however many functions lie between."""
    frame = caller()
    warnings.warn_explicit(words, category, frame.f_code.co_filename, frame.f_lineno)
