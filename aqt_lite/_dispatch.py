"""Runs an operation of the contract: the backend's kernel where one serves, else the operation itself.

Owns: that choice. Imports: the registry, the ``Backend`` interface.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aqt_lite._protocol import Backend
from aqt_lite._registry import kernels_of

__all__ = ["run"]


def run(b: Backend, operation: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
    """``operation(*arrays, **static, b=b)``, by the fastest way that gives the same bits."""
    kernel = kernels_of(b.name).get(operation) or b.kernel(operation)
    if kernel is not None and kernel.serves(static):
        result = kernel.call(*arrays, **static)
        if result is not NotImplemented:
            return result
    return b.compiled(operation)(*arrays, **static, b=b)
