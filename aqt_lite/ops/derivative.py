"""The derivative of a product with a quantized weight, once for every framework that differentiates.

Owns: its arithmetic; how a framework is told of it is the framework's. Imports: affine, the products.

With respect to ``x`` it is the same product with the other axis contracted, so that it, too, reads codes and not a
float copy of the weight; with respect to the scale, what ``affine.dequantize`` pulls back from the weight's own
derivative. Codes and zero points are integers and have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aqt_lite import affine
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.ops import reference

__all__ = ["of_bias", "of_scale", "of_x"]


def of_x(product: Callable[..., Array], dy: Array, w: Coded, *, reproducible: bool, spec: Spec, contract: int) -> Array:
    """``dy @ w`` for ``x @ w.T``, and the reverse, by ``product(reproducible, spec, contract, x, w, bias)``."""
    other = 1 - contract
    possible = reproducible and reference.has_integer_sums(w.scale, other, spec.block[other])
    return product(possible, spec, other, dy, w, None)


def of_scale(x: Array, dy: Array, w: Coded, *, spec: Spec, contract: int, vjp: Callable[..., Any], b: Backend) -> Array:
    """The scale's derivative; ``vjp(function, primal)`` is the framework's own, (value, pullback)."""
    xp, compute = b.xp, w.scale.dtype
    left, right = (x, dy) if contract == 0 else (dy, x)
    of_weight = xp.matmul(xp.permute_dims(xp.astype(left, compute), (1, 0)), xp.astype(right, compute))

    def weight(scale: Array) -> Array:
        return affine.dequantize(w._replace(scale=scale), spec=spec, out=spec.source.compute, b=b)

    return vjp(weight, w.scale)[1](of_weight)[0]


def of_bias(dy: Array, compute: Any, dtype: Any, b: Backend) -> Array:
    """The sum over rows in the dtype ``compute``, rounded once to that of the bias."""
    return b.xp.astype(b.xp.sum(b.xp.astype(dy, compute), axis=0), dtype)
