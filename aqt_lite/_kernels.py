"""What a kernel is: a faster form of an operation, and a statement of what it serves.

Owns: ``Kernel``, tables of them, and the statements that most kernels make. Imports: nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = ["Kernel", "Kernels", "anything", "plain_integers"]


def plain_integers(static: Mapping[str, Any]) -> bool:
    """Codes that are the integers they stand for, with scales that are kept as they are, chosen by the plain rules.

    A dtype does not tell: codes of other formats are kept in the same arrays, and mean other numbers.
    """
    spec, recipe = static["spec"], static.get("recipe")
    element = spec.element
    plain: bool = element.zero_points and element.missing is None and spec.format.scale is None and spec.headroom == 1
    return plain and (recipe is None or (recipe.plain and not spec.floor))  # scales that are not 0 have codes above 0


def anything(static: Mapping[str, Any]) -> bool:
    """Whatever the arguments: for forms that know every format, and operations whose arrays are no codes."""
    return True


class Kernel(NamedTuple):
    """A faster twin of an operation: the same arguments without ``b``, and the same bits where the contract has them.

    It returns NotImplemented for arrays that it does not serve; the operation itself then runs.
    """

    call: Callable[..., Any]
    serves: Callable[[Mapping[str, Any]], bool] = plain_integers
    """Whether it serves these static arguments; it is not offered others."""
    of_weight: Callable[..., Callable[..., Any]] | None = None
    """Of products: given a weight and the static arguments, ``call(x, w, bias)`` for weights of its types and shapes.

    What these say is decided once so. It keeps nothing of the arrays.
    """


Kernels = Mapping[Callable[..., Any], Kernel]
"""A backend's kernels, each under the operation that it is a twin of."""
