"""Eager calls on arrays that lie in this process's own memory.

Owns: whether the program runs eagerly, and forms of operations that work on such arrays without XLA, which compiles
anew for every shape. Imports: the CPU library.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from aqt_lite._dispatch import run
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import runtime

__all__ = ["in_memory", "is_tracing"]


try:
    _state: Any = importlib.import_module("jax.extend.core").get_opaque_trace_state
except AttributeError:  # JAX 0.9
    _state = importlib.import_module("jax.core").get_opaque_trace_state


@functools.cache
def _eager_state() -> Any:
    """What JAX says of a thread that traces nothing."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(_state()))
    thread.start()
    thread.join()
    return found[0]


def is_tracing() -> bool:
    """Whether an operation would be recorded, or mapped, now: even one whose arrays all have values."""
    return bool(_state() != _eager_state())


def in_memory(operation: Callable[..., Any], form: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """``operation`` on arrays that have values and lie on one CPU: small ones as NumPy does it, large ones by ``form``.

    For small ones XLA would take a thousand times longer to compile than to run. For large ones it takes most of its
    time to touch fresh output memory for the first time, which the CPU library does on every core.
    """

    def kernel(*arrays: Any, **static: Any) -> Any:
        found = runtime.arrays_in(arrays)
        if not all(isinstance(a, jax.Array) and not isinstance(a, jax.core.Tracer) for a in found) or is_tracing():
            return NotImplemented
        place = _common_place(found)
        if place is NotImplemented:
            return NotImplemented
        small = max(a.size for a in found) < runtime.LARGE
        if not small and form is None:
            return NotImplemented
        given = runtime.on_each(np.asarray, arrays)
        if small:
            result = run(get_backend("numpy"), operation, *given, **static)
        else:
            assert form is not None
            result = form(*given, **static)
        if result is NotImplemented:
            return NotImplemented
        memory = runtime.arrays_in(given)
        known = {id(m): a for m, a in zip(memory, found, strict=True)}

        def placed(a: Array) -> Array:
            if id(a) in known:  # returned as it was given
                return known[id(a)]
            a = np.asarray(a)
            if small or any(np.may_share_memory(a, m) for m in memory):  # JAX shares it, whatever may_alias says
                a = a.copy()
            return jax.device_put(a, place)

        return runtime.on_each(placed, result)

    return kernel


def _common_place(arrays: list[Any]) -> Any:
    """Where results go: the sharding of what is committed to one CPU, None where nothing is; else NotImplemented."""
    place = None
    for a in arrays:
        devices = a.devices()
        if len(devices) > 1 or next(iter(devices)).platform != "cpu":
            return NotImplemented
        if a.committed:
            if place is not None and place.device_set != devices:
                return NotImplemented
            place = a.sharding if place is None else place
        elif devices != {_default_device()}:
            return NotImplemented  # JAX's default device was changed after they were made
    return place


def _default_device() -> Any:
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    if chosen is None:
        return jax.local_devices()[0]
    return jax.local_devices(backend=chosen)[0] if isinstance(chosen, str) else chosen
