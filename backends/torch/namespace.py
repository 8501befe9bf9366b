"""The Array API namespace of torch, with what programs of ``torch.compile`` want otherwise.

Owns: the functions that differ from array-api-compat's. Imports: its wrapper, as ``_namespace`` gives it.
"""

from __future__ import annotations

from typing import Any

import torch

from aqt_lite._namespace import Array, wrapped_namespace

__all__ = ["namespace"]


def namespace() -> Any:
    """The wrapper, with the functions below."""
    return wrapped_namespace("torch", clip=clip)


def clip(x: Array, /, min: Any = None, max: Any = None) -> Array:
    """The standard's, of bounds that are no NaN: array-api-compat asks that of numbers.

    In a program with dynamic sizes numbers are symbols, too, of which that cannot be asked.
    """
    if not (x.is_floating_point() or x.dtype == torch.bool):
        limits = torch.iinfo(x.dtype)
        min = None if _is_number(min) and min <= limits.min else min
        max = None if _is_number(max) and max >= limits.max else max
    if min is None and max is None:
        return x.clone()
    if (min is None or _is_number(min)) and (max is None or _is_number(max)):
        return torch.clamp(x, min, max)
    return torch.clamp(
        x, *(torch.as_tensor(v, dtype=x.dtype, device=x.device) if _is_number(v) else v for v in (min, max))
    )


def _is_number(bound: Any) -> bool:
    return isinstance(bound, int | float | torch.SymInt | torch.SymFloat)
