"""Which name was meant, where one is not known.

Owns: the search, and the errors of arguments that take a name of a closed list. Imports: nothing of this package.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

__all__ = ["did_you_mean", "nearest", "check_integer", "index_of", "not_known", "of_these", "one_of", "shown"]

_ELSEWHERE = {
    here: names.split()
    for here, names in {
        "affine": "asymmetric asym asymm",
        "symmetric": "sym absmax",
        "reproducible": "deterministic",
        "half_even": "nearest rne rint half_to_even",
        "half_away": "half_up",
        "toward_zero": "trunc truncate",
        "stochastic": "random",
        "raise": "error",
        "saturate": "clip clamp",
        "numpy": "np",
        "jax": "jnp",
        "torch": "pytorch",
        "gguf": "ggml llama.cpp",
        "bitsandbytes": "bnb",
        "onnxruntime": "ort",
        "float16": "half fp16 f2 f16",
        "bfloat16": "bf16",
        "float32": "float single fp32 f4 f32",
        "float64": "double fp64 f8 f64",
    }.items()
}
"""What other libraries call names of closed lists here. A list has those that lead to one of its own names."""


def did_you_mean(name: Any, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """``" (did you mean 'int4'?)"``, or nothing where no name is near."""
    near = nearest(name, known, others)
    return f" (did you mean {near!r}?)" if near and near != str(name) else ""


def nearest(
    name: Any, known: Iterable[str], others: Mapping[str, str] | None = None, *, likeness: float = 0.75
) -> str | None:
    """The name that was meant, or None.

    Near are: what ``others``, names elsewhere, are called here; the same letters in capitals; the only name that begins
    so; and a name that has most of its letters.
    """
    names, low = list(known), str(name).lower()
    near = (others or {}).get(low) or next((n for n in names if n.lower() == low), None)
    begun = [n for n in names if n.lower().startswith(low)] if len(low) > 2 else []
    near = near or (begun[0] if len(begun) == 1 else None)
    return near or next(iter(difflib.get_close_matches(low, names, 1, likeness)), None)


def one_of(argument: str, value: Any, known: Iterable[str], also: str = "") -> None:
    """ValueError that lists the names which ``argument`` may have, and what it takes ``also``, where this is none."""
    if not (isinstance(value, str) and value in known):
        raise ValueError(not_known(argument, value, known, also))


def not_known(argument: str, value: Any, known: Iterable[str], also: str = "") -> str:
    """What to say of a value that is none of the names that are ``known``."""
    names = list(known)
    near = of_these(value, names) if isinstance(value, str) else ""
    *most, last = [*map(repr, names), *([also] if also else [])]
    listed = f"{', '.join(most)} or {last}" if most else last
    return f"{argument}={shown(value)} is not known{near}: use {'one of ' if len(names) > 4 else ''}{listed}"


def check_integer(argument: str, value: Any) -> None:
    """TypeError where ``value`` is no integer of Python's or NumPy's."""
    if isinstance(value, bool | np.bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{argument} is a {type(value).__name__}: give an integer")


def index_of(argument: str, value: Any) -> int:
    """A length or an axis as Python's integer; TypeError where ``value`` does not become one."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{argument}={shown(value)}: give an integer") from None


def shown(value: Any) -> str:
    """A value in an error's words: of an array its shape alone."""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and shape:
        return f"<{type(value).__name__} of shape {tuple(shape)}>"
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


def of_these(name: str, known: Iterable[str]) -> str:
    """``did_you_mean`` with what other libraries call the names that are ``known``.

    A number of bits is no misspelling of another.
    """
    names = list(known)
    if re.fullmatch(r"(u?int|b?float)\d+|u?int|bool", name):
        return ""
    return did_you_mean(name, names, {other: here for here in names for other in _ELSEWHERE.get(here, ())})
