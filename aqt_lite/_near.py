"""Which name was meant, where one is not known.

Owns: the search. Imports: nothing of this package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["did_you_mean"]


def did_you_mean(name: Any, known: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """``" (did you mean 'int4'?)"``, or nothing where no name is near.

    Near are: what ``others``, names elsewhere, are called here; the same letters in capitals; and a name that has most
    of its letters.
    """
    names, said = list(known), str(name)
    low = said.lower()
    near = (others or {}).get(low) or next((n for n in names if n.lower() == low), None)
    if near is None:
        near = next(iter(difflib.get_close_matches(low, names, 1, 0.75)), None)
    return f" (did you mean {near!r}?)" if near and near != said else ""
