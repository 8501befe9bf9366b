"""What numba compiles here is told through ``logging``: a line for each compilation that takes a second and longer.

Owns: the listener to numba. Imports: numba. Calls of what is compiled, and loads from the cache, do not come here.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from numba.core import event

from aqt_lite._log import announce_unless_done

PATIENCE = 1.0
"""Seconds that nobody wonders about."""


class _Teller(event.Listener):
    """Numba compiles one function at a time, and what that calls inside: the outermost is told."""

    def __init__(self) -> None:
        self._depth, self._done = 0, _nothing

    def on_start(self, event: Any) -> None:
        if _is_ours(event):
            if not self._depth:
                self._done = announce_unless_done(in_words(event.data), PATIENCE)
            self._depth += 1

    def on_end(self, event: Any) -> None:
        if _is_ours(event):
            self._depth -= 1
            if not self._depth:
                self._done()


def _nothing() -> None:
    pass


def _is_ours(event: Any) -> bool:
    return str(event.data["dispatcher"].py_func.__module__).startswith("aqt_lite.")


def in_words(compiled: dict[str, Any]) -> str:
    """What is compiled, for what, and why it is."""
    dispatcher = compiled["dispatcher"]
    function = dispatcher.py_func
    about = (getattr(sys.modules.get(function.__module__), "__doc__", None) or "").partition("\n")[0].rstrip(".")
    dtypes = dict.fromkeys(str(a.dtype) for a in compiled["args"] if hasattr(a, "dtype"))
    cache = dispatcher.stats.cache_path
    return (
        f"compiling {function.__module__}.{function.__qualname__}"
        + (f" for arrays of {', '.join(dtypes)}" if dtypes else "")
        + (f" ({about})" if about else "")
        + ": this is its first use with such arguments"
        + (f", and {cache} holds none yet; it will, and later processes load it" if cache else "")
    )


@functools.cache
def begin() -> None:
    """Listen, from now on."""
    event.register("numba:compile", _Teller())  # type: ignore[no-untyped-call]
