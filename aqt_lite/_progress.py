"""How far long work is: a bar on a terminal, or a callback.

Owns: :func:`progress`, and who is told inside of it. Imports: nothing of this package.
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

__all__ = ["over", "over_tasks", "progress", "told"]

Told = Callable[[int, int], None]
"""Called with how much is done, and of how much."""

_told: ContextVar[Told | None] = ContextVar("aqt_lite_progress", default=None)


@contextmanager
def progress(callback: Told | None = None) -> Iterator[None]:
    """Inside, work on large NumPy arrays says how far it is: on a terminal, or to a callback.

    So does what Dask is asked to compute by one of its own schedulers; of a cluster's, its dashboard tells.

    Parameters
    ----------
    callback : callable, optional
        Called as ``callback(done, of)`` after each part, of each pass over an array anew: two for most calls. Perhaps
        from another thread, one at a time. What it raises ends the call. By default a bar is drawn on standard error
        where that is a terminal, and nothing elsewhere.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> seen = []
    >>> with aqt_lite.progress(lambda done, of: seen.append(done / of)):
    ...     q = aqt_lite.quantize(np.ones((1000, 1000), "float32"))
    >>> seen[-1]
    1.0
    """
    if callback is not None and not callable(callback):
        raise TypeError(
            f"callback is a {type(callback).__name__}: give a function of two numbers, done and of how many"
        )
    bar = _Bar() if callback is None and sys.stderr.isatty() else None
    token = _told.set(bar if callback is None else callback)
    try:
        yield
    finally:
        _told.reset(token)
        if bar is not None:
            bar.end()


def told() -> Told | None:
    """Who wants to know in this context."""
    return _told.get()


def over(boxes: Iterator[Any], size: int) -> Iterator[Any]:
    """``boxes``, start and stop along each axis, of an array of ``size`` elements, telling when each is done."""
    listener, done = _told.get(), 0
    if listener is None:
        yield from boxes
        return
    for box in boxes:
        yield box
        done += math.prod(stop - start for start, stop in box)
        listener(done, size)


@contextmanager
def untold() -> Iterator[None]:
    """Inside, nobody is told: what is done there is a part of what is told of already."""
    token = _told.set(None)
    try:
        yield
    finally:
        _told.reset(token)


@contextmanager
def over_tasks(tasks: Iterable[Any]) -> Iterator[None]:
    """Inside, tasks of Dask that are computed are told when they are done; what they do themselves is not."""
    listener, keys = _told.get(), {task.key for task in tasks}
    if listener is None or not keys:
        yield
        return
    done: set[Any] = set()

    def after(key: Any, *_: Any) -> None:
        if key in keys:
            done.add(key)
            listener(len(done), len(keys))

    token = _told.set(None)
    try:
        with importlib.import_module("dask.callbacks").Callback(posttask=after):
            yield
    finally:
        _told.reset(token)


class _Bar:
    """A line on standard error, drawn ten times a second at most."""

    WIDTH = 40

    def __init__(self) -> None:
        self._next, self._drawn = 0.0, False

    def __call__(self, done: int, of: int) -> None:
        now = time.monotonic()
        if now >= self._next or done >= of:
            self._next, self._drawn = now + 0.1, True
            filled = self.WIDTH * done // max(of, 1)
            line = "#" * filled + "." * (self.WIDTH - filled)
            print(f"\r[{line}] {100 * done // max(of, 1):3d}%", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Leave the line."""
        if self._drawn:
            print(file=sys.stderr)
