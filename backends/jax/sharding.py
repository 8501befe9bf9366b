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
from aqt_lite.affine import Coded

__all__ = ["keeping_shardings"]


def keeping_shardings(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, also where its arguments are sharded over explicit mesh axes.

    Elementwise results are sharded as the first argument is. An axis of blocks keeps the leading mesh axes that
    divide it. A product, whose static arguments say which axis it will ``contract``, has the rows' sharding of its
    first argument and the columns' of the second; it sums over the contracted axis, however that is sharded.
    """

    @wraps(function)
    def call(*arrays: Any, **static: Any) -> Any:
        mesh = _explicit_mesh(jax.tree.leaves(arrays))
        if mesh is None:
            return function(*arrays, **static)
        bound = partial(function, **static)
        plain = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)  # type: ignore[no-untyped-call]
        axes = _axes_of(_codes(arrays[0]))
        if "contract" in static:
            axes = [axes[0], _axes_of(_codes(arrays[1]))[1 - static["contract"]]]
        declined = []

        def attempt(*arrays: Any) -> Any:
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


def _codes(argument: Any) -> Array:
    return argument.codes if isinstance(argument, Coded) else argument


def _explicit_mesh(arrays: list[Array]) -> Any:
    """The mesh over whose explicit axes an argument is sharded, or None."""
    for a in arrays:
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
    if not shape:  # a scale or offset of the whole array
        return PartitionSpec()  # type: ignore[no-untyped-call]
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
