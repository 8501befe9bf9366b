"""Quantized arrays as trees of JAX arrays: their leaves, what those say of their structure, and training beside them.

Owns: the leaf ``mark`` (see ``aqt_lite._mark``), its life through transformations, the serialized form of the
structure, and the split of a tree into what is trained and what is not. Imports: the registry, ``eager``.

The mark is made when a tree is flattened. Where leaves are no arrays (shardings, specs, None, shapes), or derivatives
of integers, it is what the tree's maker put there. Read back, the mark of another structure is refused at once. Other
faults are told at first use, since what is never used (a part of a tree, what an optimizer keeps beside it) may have
them: that parts are missing which the mark says, and bytes that are no mark, because something was computed with all
leaves. Zeros, which optimizers begin with, say nothing; nor do values that a compiler traces, of which the shape does.
"""

from __future__ import annotations

import enum
import functools
import json
from dataclasses import fields
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aqt_lite import _mark
from aqt_lite._protocol import DOUBT, Doubt, Node, Ways
from aqt_lite._registry import backend_of
from aqt_lite.backends.jax.eager import is_tracing
from aqt_lite.formats import element_type

__all__ = ["combine", "opened", "partition", "register", "ways_of"]

MARK = "mark"
_KEPT, _CHECKED = "_mark", "_mark_is_checked"  # where a container keeps its leaf, beside its fields


def register(cls: type, flatten: Any, unflatten: Any, names: tuple[str, ...]) -> None:
    """Make ``cls`` a node of JAX's trees, with one leaf more than it has."""
    keys = tuple(jax.tree_util.GetAttrKey(name) for name in (*names, MARK))

    def with_mark(node: Any) -> Any:
        leaves, static = flatten(node)
        return (*leaves, _leaf_of(node)), static

    def with_keys(node: Any) -> Any:
        leaves, static = with_mark(node)
        return tuple(zip(keys, leaves, strict=True)), static

    def without_mark(static: Any, leaves: Any) -> Any:
        *own, mark = leaves
        node = unflatten(static, own)
        _receive(node, mark)
        return node

    jax.tree_util.register_pytree_with_keys(cls, with_keys, without_mark, with_mark)
    _register_serialization(cls, names)


# ---- the mark


class _Says(enum.Enum):
    """What a leaf says of the container that it came with."""

    NOTHING = enum.auto()
    LATER = enum.auto()  # it is not computed yet
    THE_SAME = enum.auto()
    NONSENSE = enum.auto()


def _leaf_of(q: Any) -> Any:
    of_node, storage = q.__dict__, q.storage
    kept = of_node.get(_KEPT)
    if not _holds_codes(storage):
        return _like(q) if kept is None and storage is not None else kept
    if kept is None and DOUBT in of_node and of_node[DOUBT].settled() is not None:
        return of_node[DOUBT].leaf
    if kept is not None:
        gone = isinstance(kept, jax.Array) and not isinstance(kept, jax.core.Tracer) and kept.is_deleted()
        if gone:
            if storage.is_deleted():  # donated, like the others
                return kept
        elif of_node.get(_CHECKED):
            return kept
        else:  # received before it was computed
            says = _said_by(kept, q)
            if says is not _Says.NOTHING:
                of_node[_CHECKED] = says is not _Says.LATER
                return kept
    mark = _made_for(q)
    if _may_stay(q, mark):
        of_node[_KEPT], of_node[_CHECKED] = mark, True
    return mark


def _receive(q: Any, mark: Any) -> None:
    """Keep a leaf with the container that was made of its tree, or raise where it is the mark of another structure."""
    of_node = q.__dict__
    if not _holds_codes(q.storage):
        of_node[_KEPT] = mark
        return
    missing = _missing(q, mark)
    if isinstance(mark, jax.core.Tracer):  # kept, so that what carries it through a loop finds it where it lay
        if mark.dtype == np.uint8 and _may_stay(q, mark):
            of_node[_KEPT], of_node[_CHECKED] = mark, True
    else:
        says = _said_by(mark, q)
        if says is _Says.NOTHING:
            missing = ()
        elif _may_stay(q, mark):
            of_node[_KEPT], of_node[_CHECKED] = mark, says is not _Says.LATER
        if says is _Says.NONSENSE:
            of_node[DOUBT] = Doubt(_NO_MARK, mark)
            return
        if says is _Says.LATER and not missing:
            of_node[DOUBT] = Doubt(functools.partial(_in_doubt, mark, _mark.of(q)), mark)
            return
    if missing:
        words = (
            f"this QArray holds no {' and no '.join(missing)}, but its codes were made with such: it was read into a "
            "template that has none (make the template as the saved one was made), or is a part of a tree, to be "
            "used when it is together again; dataclasses.replace(q) gives the same array without that"
        )
        of_node[DOUBT] = Doubt(words, mark)


def _parts_by_length(mark: Any) -> tuple[str, ...] | None:
    """What lies beside the codes according to the length of their mark; None where that is no mark's."""
    shape = getattr(mark, "shape", None)
    return _mark.parts_said(shape[-1]) if shape and mark.dtype == np.uint8 else None


def _missing(q: Any, mark: Any) -> tuple[str, ...]:
    """What lies beside the codes according to the length of their mark, and is not there."""
    return tuple(name for name in _parts_by_length(mark) or () if getattr(q, name) is None)


def _in_doubt(mark: Any, own: bytes) -> str | None:
    """Words for the first use of an array whose mark was not computed when it came; None where it is right."""
    if isinstance(mark, jax.Array) and mark.is_deleted():
        return None
    try:
        return _NO_MARK if _read(mark, own) is _Says.NONSENSE else None
    except ValueError as error:
        return str(error)


_NO_MARK = (
    "the leaf `mark` of this QArray is none: something was computed with all leaves of a tree (jax.tree.map), codes "
    "and scales alike, or another leaf was read in its place; compute with q.dequantize(), or leave it as a whole with "
    "is_leaf=lambda leaf: isinstance(leaf, aqt_lite.QArray)"
)


def _of_another(other: str, own: bytes) -> str:
    return (
        f"a QArray was saved as {other}, and is read into a template of {_mark.in_words(own)}: its codes would stand "
        "for other numbers; make the template as the saved one was made, and convert afterwards"
    )


def _first(mark: np.ndarray[Any, Any]) -> bytes:
    return bytes(mark.reshape(-1, mark.shape[-1])[0, : _mark.LENGTH].tobytes()) if mark.ndim and mark.size else b""


def _may_stay(q: Any, mark: Any) -> bool:
    """Whether a mark is the leaf that would be made, but for its bytes, wherever the container is flattened next.

    It is not where a trace made it for arrays that outlive it, and where it was not mapped over as the codes were.
    """
    storage, traced = q.storage, isinstance(mark, jax.core.Tracer)
    if traced != isinstance(storage, jax.core.Tracer) or isinstance(mark, jax.Array) != isinstance(storage, jax.Array):
        return False
    return tuple(mark.shape) == _shape_of(q)


def _said_by(leaf: Any, q: Any) -> _Says:
    """What a leaf that is not traced says of ``q``.

    Raises where it is the mark of another structure.
    """
    if not isinstance(leaf, jax.Array | np.ndarray):
        return _Says.NOTHING
    if isinstance(leaf, jax.Array) and (leaf.is_deleted() or not leaf.is_fully_addressable):
        return _Says.NOTHING
    if leaf.dtype != np.uint8:  # where all leaves were cast to the type of the codes, those are what they were
        return _Says.NOTHING if leaf.dtype in (jax.dtypes.float0, q.storage.dtype) else _Says.NONSENSE
    said = _parts_by_length(leaf)
    if said is None or leaf.size == 0:  # joined or cut along the last axis
        return _Says.NOTHING
    if isinstance(leaf, jax.Array) and not leaf.is_ready():  # type: ignore[attr-defined]
        return _Says.LATER
    says = _read(leaf, _mark.of(q))
    return _Says.NOTHING if says is _Says.THE_SAME and not set(_mark.parts_of(q)) <= set(said) else says


def _read(leaf: Any, own: bytes) -> _Says:
    """What the bytes of a leaf say, where ``own`` would be the mark.

    Raises where they are the mark of another structure.
    """
    with jax.transfer_guard_device_to_host("allow"):
        values = np.asarray(leaf)
    found = _first(values)
    if found == own:
        return _Says.THE_SAME
    other = _mark.in_words(found)
    if other is not None:
        raise ValueError(_of_another(other, own))
    return _Says.NONSENSE if values.any() else _Says.NOTHING


def _holds_codes(storage: Any) -> bool:
    """Whether the container is one of arrays, and not of specs, shapes or derivatives."""
    if isinstance(storage, jax.Array):
        return True
    if isinstance(storage, np.ndarray):
        return bool(storage.dtype != jax.dtypes.float0)
    b = backend_of(storage)
    return b is not None and b.name != "jax"  # of JAX's other things with a shape, none holds values


def _shape_of(q: Any) -> tuple[int, ...]:
    grid = getattr(q.scale, "shape", None)  # None where there are no scales, or where they are elsewhere for now
    length = _mark.LENGTH + _mark.surplus(_mark.parts_of(q))
    return _mark.shape_of(tuple(q.storage.shape if grid is None else grid), q.block, length)


def _made_for(q: Any) -> Any:
    storage, shape = q.storage, _shape_of(q)
    if not all(isinstance(n, int) for n in shape):  # symbolic dimensions of jax.export
        return jax.numpy.broadcast_to(_mark.repeated(_mark.of(q), shape[-1:]), shape)
    mark = _mark.repeated(_mark.of(q), shape)
    if isinstance(storage, jax.Array) and is_tracing():
        typed = _typed_sharding(q, mark.ndim)
        return mark if typed is None else jax.sharding.reshard(mark, typed)  # type: ignore[no-untyped-call]
    if isinstance(storage, np.ndarray):
        return mark
    if not isinstance(storage, jax.Array):
        b = backend_of(storage)
        assert b is not None
        return b.asarray(np.array(mark), like=storage)
    place: Any = None
    if isinstance(storage.sharding, NamedSharding):
        typed = _typed_sharding(q, mark.ndim)
        spec = PartitionSpec() if typed is None else typed.spec  # type: ignore[no-untyped-call]
        place = NamedSharding(storage.sharding.mesh, spec)
        if not storage.is_fully_addressable:
            return jax.make_array_from_callback(mark.shape, place, lambda index: np.array(mark[index]))
    elif storage.committed and len(storage.devices()) == 1:
        place = storage.sharding
    return jax.device_put(mark.copy(), place)  # of its own, which may be donated


def _typed_sharding(q: Any, ndim: int) -> NamedSharding | None:
    """How a mark of ``ndim`` axes lies where shardings are part of types: its leading axes as those of the scales."""
    like = q.storage if q.scale is None else q.scale.storage if hasattr(q.scale, "_checked") else q.scale
    sharding = jax.typeof(like).sharding if isinstance(like, jax.Array) else None
    if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
        return None
    leading = tuple(sharding.spec[: ndim - 1])
    spec = PartitionSpec(*leading, *(None,) * (ndim - len(leading)))  # type: ignore[no-untyped-call]
    return NamedSharding(sharding.mesh, spec)


def _like(q: Any) -> Any:
    """The leaf beside those of a container that was made by hand of things that are no arrays."""
    like = q.storage if q.scale is None or hasattr(q.scale, "_checked") else q.scale
    if isinstance(like, PartitionSpec):
        return _leading(like, q)
    if isinstance(like, NamedSharding):
        return NamedSharding(like.mesh, _leading(like.spec, q))
    if isinstance(like, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(_shape_of(q), np.uint8)  # type: ignore[no-untyped-call]
    if isinstance(like, np.ndarray):
        return np.zeros(_shape_of(q), like.dtype)
    return like


def _leading(spec: PartitionSpec, q: Any) -> PartitionSpec:
    return PartitionSpec(*spec[: max(len(q.block) - 1, 0)])  # type: ignore[no-untyped-call]


# ---- the structure in a file


def _register_serialization(cls: type, names: tuple[str, ...]) -> None:
    """So that a function that ``jax.export`` keeps may have ``cls`` among its arguments and results."""
    static_names = tuple(f.name for f in fields(cls) if f.name not in names)

    def serialize(static: Any) -> bytes:
        return json.dumps(dict(zip(static_names, static, strict=True))).encode()

    def deserialize(data: bytes) -> Any:
        said = json.loads(bytes(data))
        unknown = sorted(set(said) - set(static_names))
        if unknown:
            raise ValueError(
                f"a QArray was exported with {', '.join(unknown)}, which this version of aqt_lite does not know"
            )
        element_type(said["dtype"])  # raises where this process does not know it
        defaults = {f.name: f.default for f in fields(cls)}
        values = (said.get(name, defaults[name]) for name in static_names)
        return tuple(tuple(v) if isinstance(v, list) else v for v in values)

    jax.export.register_pytree_node_serialization(
        cls, serialized_name=f"aqt_lite.{cls.__name__}", serialize_auxdata=serialize, deserialize_auxdata=deserialize
    )


# ---- containers of others


def opened(node: Any) -> Node | None:
    """One level of a node that is registered with JAX: a module of Equinox, a state of NNX, a dataclass."""
    if jax.tree_util.all_leaves([node]):
        return None
    pairs, structure = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda inside: inside is not node)
    names = tuple(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs)
    return Node(names, tuple(child for _, child in pairs), lambda children: jax.tree.unflatten(structure, children))


_OF_NNX = Ways(
    "its layers have to know that a weight is quantized: aqt_lite.nnx.quantize_(model) changes a model of Flax NNX in "
    "place",
    "of a model of Flax NNX save nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))), and nnx.update(model, "
    "aqt_lite.load(path, backend='jax')) puts it into a model that is quantized by the same rules",
)
_OF_EQUINOX = Ways(
    to_save="of a module of Equinox save the leaves of its arrays: tree, static = eqx.partition(model, eqx.is_array), "
    "and jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, aqt_lite.QArray)), with which jax.tree.unflatten "
    "and eqx.combine make it anew; docs/files.md has the code",
)
_WAYS = {  # by package, and the name of a class of it
    ("flax.nnx", "Module"): _OF_NNX,
    ("flax.nnx", "State"): _OF_NNX,
    ("equinox", "Module"): _OF_EQUINOX,
}


def ways_of(node: Any) -> Ways:
    """What to do with models of the libraries that are built on JAX; none of them is imported for it."""
    for cls in type(node).__mro__:
        for (package, name), ways in _WAYS.items():
            if cls.__name__ == name and f"{cls.__module__}.".startswith(f"{package}."):
                return ways
    return Ways()


# ---- training


def partition(tree: Any) -> tuple[Any, Any]:
    """Split a tree of arrays into what derivatives may reach and the rest, each with None where the other has a leaf.

    Trainable are floating-point arrays; of a QArray only the scales and offsets of one made by
    :meth:`~aqt_lite.QArray.with_trainable_scales`. So an optimizer neither meets integers, whose derivatives have a
    type of their own (``float0``), nor decays scales that are constants. :func:`combine` puts the parts together.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, aqt_lite
    >>> from aqt_lite.backends.jax import combine, partition
    >>> params = {"w": aqt_lite.quantize(jnp.ones((4, 4))), "bias": jnp.zeros(4)}
    >>> trainable, rest = partition(params)
    >>> loss = lambda t: aqt_lite.dense(jnp.ones(4), **combine(t, rest)).sum()
    >>> jax.tree.map(lambda g: g.shape, jax.grad(loss)(trainable)["bias"])
    (4,)
    """
    chosen = _trainable(tree)
    leaves, structure = jax.tree.flatten(tree)
    first = [leaf if wanted else None for leaf, wanted in zip(leaves, chosen, strict=True)]
    second = [None if wanted else leaf for leaf, wanted in zip(leaves, chosen, strict=True)]
    return jax.tree.unflatten(structure, first), jax.tree.unflatten(structure, second)


def combine(*trees: Any) -> Any:
    """The tree whose leaves are, each, the first that is not None; undoes :func:`partition`."""

    def first(*leaves: Any) -> Any:
        return next((leaf for leaf in leaves if leaf is not None), None)

    return jax.tree.map(first, *trees, is_leaf=lambda leaf: leaf is None)


def _trainable(tree: Any) -> list[bool]:
    """For each leaf, whether derivatives may reach it."""
    found = []
    for node in jax.tree.leaves(tree, is_leaf=_is_container):
        if _is_container(node):  # its own floats are scales and offsets; those of quantized scales lie deeper
            of_parts = jax.tree_util.tree_leaves_with_path(node)
            found += [node.trainable and len(path) == 1 and _is_float(leaf) for path, leaf in of_parts]
        else:
            found.append(_is_float(node))
    return found


def _is_container(node: Any) -> bool:
    return hasattr(type(node), "_checked")


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and bool(jax.numpy.issubdtype(leaf.dtype, np.inexact))
