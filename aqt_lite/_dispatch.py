"""Runs an operation of the contract: the backend's kernel where one serves, else the operation itself.

Owns: that choice. Imports: the registry, the ``Backend`` interface.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from aqt_lite._kernels import Kernel
from aqt_lite._protocol import Backend
from aqt_lite._registry import kernels_of

__all__ = ["kernel_for", "kernel_of_weight", "offered", "run"]


def run(b: Backend, operation: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
    """``operation(*arrays, **static, b=b)``, by the fastest way that gives the same bits."""
    kernel = kernel_for(b, operation, static)
    if kernel is not None:
        result = kernel(*arrays, **static)
        if result is not NotImplemented:
            return result
    return b.compiled(operation)(*arrays, **static, b=b)


def offered(b: Backend, operation: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
    """What the backend's kernel gives; NotImplemented where there is none, or none that serves."""
    kernel = kernel_for(b, operation, static)
    return NotImplemented if kernel is None else kernel(*arrays, **static)


def kernel_for(b: Backend, operation: Callable[..., Any], static: Mapping[str, Any]) -> Callable[..., Any] | None:
    """The kernel that serves these static arguments, if there is one."""
    kernel = _offered_kernel(b, operation, static)
    return None if kernel is None else kernel.call


def kernel_of_weight(b: Backend, operation: Callable[..., Any], w: Any, static: Mapping[str, Any]) -> Any:
    """The same as ``call(x, w, bias)`` for weights of the types and shapes of ``w``."""
    kernel = _offered_kernel(b, operation, static)
    if kernel is None:
        return None
    return functools.partial(kernel.call, **static) if kernel.of_weight is None else kernel.of_weight(w, **static)


def _offered_kernel(b: Backend, operation: Callable[..., Any], static: Mapping[str, Any]) -> Kernel | None:
    kernel = kernels_of(b.name).get(operation) or b.kernel(operation)
    return kernel if kernel is not None and kernel.serves(static) else None
