"""Quantized arrays as trees of torch's tensors: their leaves, and what those say of their structure.

Owns: the leaf ``mark`` (see ``aqt_lite._mark``) of ``torch.utils._pytree``, and the structure as torch writes it.
Imports: the mark.

The mark is made when a tree is taken apart, in the memory of the CPU, so that no device is waited for. Read back, the
mark of another structure is refused at once; bytes that are no mark, because something was computed with all leaves,
and marks that were moved to another device, at first use. Zeros say nothing, nor do tensors that have no values yet.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree

from aqt_lite import _mark
from aqt_lite._protocol import DOUBT, Doubt
from aqt_lite._registry import backend_of
from aqt_lite.backends.torch.tensors import is_inside_grad, outside_transformations

__all__ = ["register"]

_MARK = "mark"
_KEPT = "_mark_in_torch"  # where a container that holds no arrays keeps what its maker put in the place of the mark


def register(cls: type, flatten: Any, unflatten: Any, names: tuple[str, ...]) -> None:
    """Make ``cls`` a node of torch's trees, with one leaf more than it has."""
    keys = tuple(pytree.GetAttrKey(name) for name in (*names, _MARK))

    def with_keys(node: Any) -> Any:  # None is a leaf to torch, but no tensor: it becomes part of the structure
        own, static = flatten(node)
        leaves = (*own, _leaf_of(node))
        present = tuple(leaf is not None for leaf in leaves)
        return [pair for pair in zip(keys, leaves, strict=True) if pair[1] is not None], (static, present)

    def without_keys(node: Any) -> Any:
        pairs, context = with_keys(node)
        return [leaf for _, leaf in pairs], context

    def rebuild(leaves: Any, context: Any) -> Any:
        static, present = context
        found = iter(leaves)
        *own, mark = [next(found) if there else None for there in present]
        node = unflatten(static, own)
        _receive(node, mark)
        return node

    pytree.register_pytree_node(
        cls,
        without_keys,
        rebuild,
        serialized_type_name=f"{cls.__module__}.{cls.__qualname__}",
        to_dumpable_context=list,
        from_dumpable_context=_as_tuples,
        flatten_with_keys_fn=with_keys,
    )


def _leaf_of(q: Any) -> Any:
    if torch.compiler.is_compiling():
        if not isinstance(q.storage, torch.Tensor) or is_inside_grad():  # which would wrap a new tensor, and once more
            return q.storage
        structure = q.dtype, q.block, q.float_dtype, q.transposed, q.packed_length, q.version
        shape = _mark.shape_beside(q)
        return torch.tensor(_numbers(structure, shape[-1]), dtype=torch.uint8).expand(shape)
    doubt: Doubt | None = q.__dict__.get(DOUBT)
    if doubt is not None:
        return doubt.leaf
    b = backend_of(q.storage)
    if b is None:  # numbers of axes, shapes, None
        scale = q.scale
        return q.__dict__.get(_KEPT, q.storage if scale is None or backend_of(scale) is not None else scale)
    mark = np.array(_mark.repeated(_mark.of(q), _mark.shape_beside(q)))
    if b.name != "torch":
        return b.asarray(mark, like=q.storage)
    with outside_transformations():  # which wrap it themselves
        return torch.from_numpy(mark)


def _receive(q: Any, mark: Any) -> None:
    """Look at a leaf that came with the tree of which the container was made.

    Raises where it is the mark of another structure.
    """
    if torch.compiler.is_compiling():
        return
    if backend_of(q.storage) is None:
        q.__dict__[_KEPT] = mark
        return
    b = backend_of(mark)
    if b is None or not mark.ndim or 0 in mark.shape or _is_of_codes(mark, q):
        return
    if b.dtype_name(mark) != "uint8":
        q.__dict__[DOUBT] = Doubt(_NO_MARK, mark)
        return
    said = _mark.parts_said(mark.shape[-1])
    if said is None or not b.has_values(mark):  # joined or cut along the last axis; seen by a compiler
        return
    if said != _mark.parts_of(q):
        raise ValueError(
            f"a QArray was taken apart into codes and {', '.join(said)}, and is put together as one "
            f"of codes and {', '.join(_mark.parts_of(q))}: use the structure that came with the leaves"
        )
    if isinstance(mark, torch.Tensor) and mark.device.type != "cpu":
        q.__dict__[DOUBT] = Doubt(functools.partial(_in_doubt, mark, _mark.of(q)), mark)
    elif _mark.read(b.to_numpy(mark), _mark.of(q)) is _mark.Says.NONSENSE:
        q.__dict__[DOUBT] = Doubt(_NO_MARK, mark)


def _is_of_codes(mark: Any, q: Any) -> bool:
    """Whether all leaves were cast to one type, of which the codes speak themselves."""
    return bool(mark.dtype == q.storage.dtype) and backend_of(mark).dtype_name(mark) != "uint8"  # type: ignore[union-attr]


def _in_doubt(mark: torch.Tensor, own: bytes) -> str | None:
    """Words for the first use of an array whose mark lies on another device; None where it is right."""
    try:
        return _NO_MARK if _mark.read(mark.numpy(force=True), own) is _mark.Says.NONSENSE else None
    except ValueError as error:
        return str(error)


_NO_MARK = _mark.no_mark("tree_map")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _numbers(structure: tuple[Any, ...], length: int) -> list[int]:
    """The bytes of a mark, for compilers."""
    return list(_mark.encoded(*structure).ljust(length, b"\0"))


def _as_tuples(kept: Any) -> Any:
    return tuple(_as_tuples(k) for k in kept) if isinstance(kept, list) else kept
