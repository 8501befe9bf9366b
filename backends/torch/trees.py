"""Quantized arrays as trees of torch's tensors: their leaves, and what those say of their structure.

Owns: the node of ``torch.utils._pytree``, its structure as torch writes it, and what codes remember. Imports: the mark.

JAX's trees have a leaf that says what the others mean (``aqt_lite._mark``). Torch's transformations map over any axis
of all leaves, and put results of theirs along any other, for which a leaf of another shape is in the way. So the tensor
of the codes itself remembers, as an attribute, of which structures it has been a part; ``torch.save`` keeps that. What
is computed of it is a new tensor, which remembers nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.utils._pytree as pytree

from aqt_lite import _mark
from aqt_lite.backends.torch.tensors import has_no_values, wraps_tensors

__all__ = ["register"]

_REMEMBERED = "aqt_lite_codes_of"


def register(cls: type, flatten: Any, unflatten: Any, names: tuple[str, ...]) -> None:
    """Make ``cls`` a node of torch's trees."""
    keys = tuple(pytree.GetAttrKey(name) for name in names)

    def with_keys(node: Any) -> Any:  # None is a leaf to torch, but no tensor: it becomes part of the structure
        _remember(node)
        leaves, static = flatten(node)
        present = tuple(leaf is not None for leaf in leaves)
        return [pair for pair in zip(keys, leaves, strict=True) if pair[1] is not None], (static, present)

    def without_keys(node: Any) -> Any:
        pairs, context = with_keys(node)
        return [leaf for _, leaf in pairs], context

    def rebuild(leaves: Any, context: Any) -> Any:
        static, present = context
        found = iter(leaves)
        node = unflatten(static, [next(found) if there else None for there in present])
        _check(node)
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


def _remember(q: Any) -> None:
    if _is_plain(q.storage):
        known, own = _remembered(q.storage), _structure_of(q)
        if own not in known:
            setattr(q.storage, _REMEMBERED, (*known, own))


def _check(q: Any) -> None:
    """Raise ValueError where codes have been a part of other structures, and of this one never."""
    if not _is_plain(q.storage):
        return
    known, own = _remembered(q.storage), _structure_of(q)
    if known and own not in known:
        raise ValueError(
            f"leaves of a QArray that was taken apart as {_in_words(known[-1])}, are put together as "
            f"{_in_words(own)}: its codes would stand for other numbers; use the structure that came with the leaves"
        )


def _is_plain(storage: Any) -> bool:
    if torch.compiler.is_compiling() or not isinstance(storage, torch.Tensor):
        return False
    return not (has_no_values(storage) or wraps_tensors(storage))


def _remembered(storage: torch.Tensor) -> tuple[str, ...]:
    return getattr(storage, _REMEMBERED, ())


def _structure_of(q: Any) -> str:
    """The structure in letters, since ``torch.load(weights_only=True)`` reads no bytes."""
    return " ".join((_mark.of(q).hex(), *_mark.parts_of(q)))


def _in_words(structure: str) -> str:
    mark, *parts = structure.split(" ")
    said = _mark.in_words(bytes.fromhex(mark)) or "something unknown"
    return f"{said}, with {' and '.join(parts) or 'nothing beside the codes'}"


def _as_tuples(kept: Any) -> Any:
    return tuple(_as_tuples(k) for k in kept) if isinstance(kept, list) else kept
