"""Which name was meant, where one is not known.

Owns: the search. Imports: nothing of this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["did_you_mean", "nearest"]


def did_you_mean(name: Any, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """``" (did you mean 'int4'?)"``, or nothing where no name is near."""
    near = nearest(name, known, others)
    return f" (did you mean {near!r}?)" if near and near != str(name) else ""


def nearest(
    name: Any, known: Iterable[str], others: Mapping[str, str] | None = None, *, likeness: float = 0.75
) -> str | None:
    """The name that was meant, or None.

    Near are: what ``others``, names elsewhere, are called here; the same letters in capitals; and a name that has most
    of its letters.
    """
    names, low = list(known), str(name).lower()
    near = (others or {}).get(low) or next((n for n in names if n.lower() == low), None)
    return near or next(iter(difflib.get_close_matches(low, names, 1, likeness)), None)
