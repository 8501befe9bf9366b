"""What layers of JAX's frameworks call in the place of JAX's own functions, where their weight is quantized.

Owns: the promotion of dtypes around a QArray, hooks with activations of few bits, rows that are looked up, what axes
of weights are for, and what rules may say of layers. Imports: the functions, the rules. ``nnx``, ``linen`` and
``equinox`` beside it say which layer takes what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from aqt_lite._namespace import Array
from aqt_lite._rules import Axes, Leaf, Planned, Rules, planned
from aqt_lite.backends.jax import functions
from aqt_lite.qarray import QArray

__all__ = ["Hook", "axes_of_einsum", "behind", "embedded", "has_quantized", "planned_layers", "promoted", "with_values"]


@dataclass(frozen=True)
class Hook:
    """One of ``functions``, for a layer whose rule has ``activations``. Two that do the same are equal."""

    function: Callable[..., Array]
    activations: str

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """Call it: with whatever arguments a layer has for it."""
        quantized = any(isinstance(a, QArray) for a in args)
        return self.function(*args, **kwargs, **({"activations": self.activations} if quantized else {}))


def has_quantized(arrays: Sequence[Any]) -> bool:
    """Whether one of a layer's arrays is a QArray."""
    return any(isinstance(a, QArray) for a in arrays)


def promoted(arrays: Sequence[Any], dtype: Any, inexact: bool = True) -> tuple[Any, ...]:
    """What Flax's ``promote_dtype`` makes of arrays, with QArrays as they are: they count as the values they stand for.

    A product with one is as exact as if it were of float32, whatever it is promoted to.
    """
    if dtype is None:
        kinds = [jnp.dtype(a.float_dtype) if isinstance(a, QArray) else jnp.asarray(a) for a in arrays if a is not None]
        dtype = jnp.result_type(*kinds)
        if inexact and not jnp.issubdtype(dtype, jnp.inexact):
            dtype = jnp.promote_types(jnp.float32, dtype)
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(f"dtype={dtype}: products are of floating-point numbers")
    return tuple(a if a is None or isinstance(a, QArray) else jnp.asarray(a, dtype) for a in arrays)


def with_values(arrays: Sequence[Any]) -> tuple[Any, ...]:
    """Arrays with values in the place of QArrays, for layers that nothing better exists for."""
    return tuple(a.dequantize() if isinstance(a, QArray) else a for a in arrays)


def embedded(table: QArray, ids: Any, dtype: Any) -> Array:
    """Rows of a table, as Flax's ``Embed`` looks them up."""
    if not jnp.issubdtype(jnp.asarray(ids).dtype, jnp.integer):
        raise ValueError("Input type must be an integer or unsigned integer.")
    if table.shape[0] == 1:  # whatever the index, as Flax has it
        ids = jnp.zeros_like(ids)
    rows = functions.take(table, ids, axis=0)
    return rows if dtype is None else rows.astype(dtype)


def axes_of_einsum(subscripts: str | None) -> Axes | None:
    """What the axes of the second operand, a weight, are for; None where that is not known before a call."""
    if subscripts is None:
        return None
    left, arrow, out = subscripts.replace(" ", "").partition("->")
    of_x, _, of_w = left.partition(",")
    if not arrow or "..." in of_w:
        return None
    places = enumerate(of_w)
    kinds = [(at, c in of_x, c in out) for at, c in places]
    return Axes(
        outputs=tuple(at for at, in_x, in_out in kinds if in_out and not in_x),
        inputs=tuple(at for at, in_x, in_out in kinds if in_x and not in_out),
        each=tuple(at for at, in_x, in_out in kinds if in_x and in_out),
    )


def behind(axes: Axes, lead: int) -> Axes:
    """The same of a weight with so many axes before it, along each of which there is one after the other."""

    def shifted(of: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(a + lead for a in of)

    return Axes(shifted(axes.outputs), shifted(axes.inputs), (*range(lead), *shifted(axes.each)))


def planned_layers(leaves: Sequence[Leaf], rules: Rules | None, already: Sequence[str] = ()) -> list[Planned]:
    """``planned`` for weights of layers: by default those whose axes are known, and rules may ask for activations."""
    return planned(
        leaves,
        rules,
        layout=None,
        by_default=lambda leaf: leaf.axes is not None and not leaf.why_not,
        extra=("activations",),
        already=already,
    )
