"""Arrays whose sharding is part of their type (``AxisType.Explicit``, what ``jax.make_mesh`` makes).

Owns: which sharding a result has there. Where the compiler places arrays itself (``AxisType.Auto``) nothing is needed.
In explicit mode JAX refuses every reshape and contraction whose sharding it cannot derive, and splitting an axis into
groups is such a reshape. So each operation runs in automatic mode inside, and says here what comes out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aqt_lite._namespace import Array

__all__ = ["keeping_shardings"]

_CODES_OF_WEIGHT = {"matmul": 1, "matmul_reproducible": 1, "matmul_integer": 3}
"""Which argument of a product holds the weight's codes."""


def keeping_shardings(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, also where its arguments are sharded over explicit mesh axes.

    Elementwise results are sharded as the first argument is. An axis of blocks keeps the leading mesh axes that
    divide it. A product has the rows' sharding of ``x`` and the columns' of the weight; it sums over the contracted
    axis, however that is sharded.
    """

    @wraps(function)
    def call(*arrays: Array | None, **static: Any) -> Any:
        mesh = _explicit_mesh(arrays)
        if mesh is None:
            return function(*arrays, **static)
        bound = partial(function, **static)
        plain: list[Any] = [None if a is None else jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]  # type: ignore[no-untyped-call]
        axes = _axes_of(arrays[0])
        if op in _CODES_OF_WEIGHT:
            axes = [axes[0], _axes_of(arrays[_CODES_OF_WEIGHT[op]])[1 - static["contract"]]]
        declined = []

        def attempt(*arrays: Array | None) -> Any:
            result = bound(*arrays)
            if result is NotImplemented:  # a kernel that serves only arrays with values, on one device
                declined.append(result)
                return ()
            return result

        shapes = jax.eval_shape(attempt, *plain)
        if declined:
            return NotImplemented
        out = jax.tree.map(lambda o: NamedSharding(mesh, _spec(o.shape, axes, mesh)), shapes)
        return jax.sharding.auto_axes(bound, axes=mesh.explicit_axes, out_sharding=out)(*arrays)

    return call


def _explicit_mesh(arrays: tuple[Array | None, ...]) -> Any:
    """The mesh over whose explicit axes an argument is sharded, or None."""
    for a in arrays:
        if a is None:
            continue
        mesh = jax.typeof(a).sharding.mesh
        if AxisType.Explicit in mesh.axis_types:
            return mesh if isinstance(a, jax.core.Tracer) else a.sharding.mesh
    return None


def _axes_of(a: Array) -> list[tuple[str, ...]]:
    """For each axis of ``a``, the mesh axes that it is sharded over."""
    spec = jax.typeof(a).sharding.spec
    return [(s,) if isinstance(s, str) else tuple(s or ()) for s in spec]


def _spec(shape: tuple[int, ...], axes: list[tuple[str, ...]], mesh: Any) -> PartitionSpec:
    """Along each axis the longest run of its mesh axes that divides it, and that no earlier axis has taken."""
    taken: set[str] = set()
    spec: list[tuple[str, ...] | None] = []
    for length, wanted in zip(shape, axes, strict=True):
        kept, shards = [], 1
        for name in wanted:
            shards *= mesh.shape[name]
            if name in taken or length % shards or length < shards:
                break
            kept.append(name)
        taken.update(kept)
        spec.append(tuple(kept) or None)
    return PartitionSpec(*spec)  # type: ignore[no-untyped-call]
