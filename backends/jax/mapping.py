"""What primitives around compiled loops share.

Owns: how one is mapped over (vmap), and the version of what numba caches of it. Imports: nothing of this package.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["one_after_the_other", "version_of"]


def one_after_the_other(bind: Any, arrays: Any, axes: Any) -> tuple[Any, list[int]]:
    """The rule for ``bind`` where more than its rows are mapped over; what is not mapped over is not copied either."""
    every = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True)]
    mapped = tuple(a for a, axis in zip(every, axes, strict=True) if axis is not None)

    def one(slices: Any) -> Any:
        found = iter(slices)
        return bind(*(a if axis is None else next(found) for a, axis in zip(every, axes, strict=True)))

    results = jax.lax.map(one, mapped)
    return results, [0] * len(results)


def version_of(*modules: Any) -> int:
    """A number that changes with their sources: numba looks at one file alone when it reads what it has cached."""
    try:
        return zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in modules))
    except OSError:  # no sources, and then numba caches nothing
        return 0
