"""Quantized arrays in what ``flax.serialization`` writes: state dicts, and their bytes in msgpack.

Owns: the state of a ``QArray``, and what restoring holds it against. Imports: the container, Flax. ``nnx`` and
``linen`` beside it import this.

A state has the arrays by their names, and under ``structure`` what they mean, in JSON: so that a template of another
format, block, layout or dtype is refused, and who has no template can read it all the same.
"""

from __future__ import annotations

import json
from typing import Any

import jax
from flax import serialization

from aqt_lite.qarray import QArray, described, in_words

__all__ = ["register"]

_PARTS = ("storage", "scale", "zero_point", "offset")
_STRUCTURE = "structure"


def register() -> None:
    """Make Flax know the container. A second call does nothing."""
    serialization.register_serialization_state(  # type: ignore[no-untyped-call]
        QArray, _to_state, _from_state, override=True
    )


def _to_state(q: QArray) -> dict[str, Any]:
    parts = {name: getattr(q, name) for name in _PARTS}
    state = {name: serialization.to_state_dict(part) for name, part in parts.items() if part is not None}
    return {**state, _STRUCTURE: json.dumps(described(q))}


def _from_state(template: QArray, state: Any) -> QArray:
    path, own = str(serialization.current_path()), described(template)  # type: ignore[no-untyped-call]
    if not isinstance(state, dict) or _STRUCTURE not in state:
        found = f"a dict of {', '.join(map(str, state))}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise ValueError(f"{path}: the template is a QArray, {in_words(template)}, and the state has {found} there")
    said, wanted = json.loads(state[_STRUCTURE]), json.loads(json.dumps(own))
    if said != wanted:
        differing = [
            f"{name} {said.get(name)} and {value}" for name, value in wanted.items() if said.get(name) != value
        ]
        raise ValueError(
            f"{path}: the codes of the state mean other numbers than those of the template, {in_words(template)}: "
            f"{', '.join(differing) or 'it says more than this version knows'}; make the template as the saved one was "
            "made, and convert afterwards"
        )
    parts: dict[str, Any] = {"scale": None}
    for name in _PARTS:
        array = getattr(template, name)
        if (array is None) != (name not in state):
            raise ValueError(f"{path}: {'the template' if array is None else 'the state'} has no {name}")
        if array is not None:
            parts[name] = _restored(name, array, state[name], path)
    return QArray(**parts, **own)


def _restored(name: str, template: Any, state: Any, path: str) -> Any:
    found = serialization.from_state_dict(template, state, name=name)
    if isinstance(template, QArray):
        return found
    for what in ("shape", "dtype"):
        its, own = getattr(found, what, None), getattr(template, what)
        if its != own:
            raise ValueError(f"{path}: {name} has {what} {its} in the state, and {own} in the template")
    return jax.numpy.asarray(found) if isinstance(template, jax.Array) else found
