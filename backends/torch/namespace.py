"""torch as the Array API standard has it, in a form that torch's compiler can follow.

Owns: what differs from array-api-compat's namespace, whose names are all here. Imports: the door to it.
"""

from __future__ import annotations

import builtins
from typing import Any

import torch

from aqt_lite._namespace import Array, wrapped_namespace

_standard = wrapped_namespace("torch")
globals().update({name: getattr(_standard, name) for name in dir(_standard) if not name.startswith("_")})


def clip(x: Array, /, min: Any = None, max: Any = None) -> Array:
    """``x`` between two limits.

    The other namespace asks whether limits are NaN, which the compiler cannot where they are symbols
    (``dynamic=True``); ours never are.
    """
    number = builtins.float  # ``float`` is torch's here
    if isinstance(min, number) and isinstance(max, number):
        return torch.clamp(x, min, max)
    return _standard.clip(x, min, max)
