"""Objects that notice who asks for their class.

Owns: the one question that ``isinstance`` puts to an object of another class. Imports: nothing.

Python's documentation of ``isinstance`` has it that ``__class__`` may be a property. Some libraries decide by
``isinstance`` alone what becomes of a value, and call no hook of its class: there an adapter can listen.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ClassVar

__all__ = ["Asked"]


class Asked:
    """Something whose class is no secret, but whoever asks for it is known to ``listeners``."""

    listeners: ClassVar[list[Callable[[Any, FrameType], None]]] = []
    """Called with the object and the frame that asks."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        for listener in Asked.listeners:
            listener(self, sys._getframe(1))
        return type(self)
