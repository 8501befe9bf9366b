"""What torch's functions do where they are given a container for a tensor.

Owns: the hook by which they ask, and what has to be refused because of it. Imports: the words; the products when one is
asked for.

``torch.matmul``, ``torch.mm`` and ``F.linear`` are the products that the container has. All else raises TypeError with
the way; operators of tensors (``x * q``) take that for an answer, and ask the container's own. What has the hook is
taken for a tensor by modules that register buffers, which goes wrong when they are moved or saved; as an attribute it
would be neither.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.utils._pytree as pytree

from aqt_lite._callers import caller, warn
from aqt_lite._ways import no_array_of

__all__ = ["look_for_a_module", "serve"]

_OF_MODELS = "aqt_lite.torch.quantize_(model, rules)"
_KEEPS = "qarray"  # what a module has whose buffers are the arrays of a container


def serve(cls: type) -> None:
    """Make torch's functions ask what to do with a ``cls``."""
    cls.__torch_function__ = classmethod(_answer)  # type: ignore[attr-defined]

    def refuse(module: torch.nn.Module, name: str, buffer: Any) -> None:
        if isinstance(buffer, cls):
            raise TypeError(
                f"buffer {name!r} is a QArray, which a module would neither move nor save: self.{name} = "
                f"aqt_lite.torch.QuantizedWeight(q) keeps it, and {_OF_MODELS} makes layers that do"
            )

    # torch asks nobody about plain attributes: those that are there are looked at when it asks about something else
    hooks = torch.nn.modules.module
    hooks.register_module_buffer_registration_hook(refuse)
    hooks.register_module_parameter_registration_hook(lambda module, *_: _tell_of(module, cls))
    hooks.register_module_module_registration_hook(
        lambda _, name, module: None if module is None else _tell_of(module, cls)
    )


_told = weakref.WeakSet[torch.nn.Module]()  # export, for one, makes a module part of another, too


def _tell_of(module: torch.nn.Module, cls: type) -> None:
    """Warn of a container that is a plain attribute of a module."""
    for name, value in list(vars(module).items()):
        if isinstance(value, cls) and module not in _told and not hasattr(type(module), _KEEPS):
            _told.add(module)
            warn(
                f"aqt_lite: {type(module).__name__}.{name} is a QArray, which no state_dict holds, and which does "
                f"not move with the module: self.{name} = aqt_lite.torch.QuantizedWeight(q) keeps it, and "
                f"{_OF_MODELS} makes layers that do"
            )


_LOOKS = "_looks_for_a_module"
_MOST_LOOKS = 16  # of a container, which may have been used before it became an attribute; two microseconds each


def look_for_a_module(q: Any) -> None:
    """Warn where ``q``, which is about to be used, is a plain attribute of a module that its user knows."""
    looks = q.__dict__.get(_LOOKS, 0)
    if looks == _MOST_LOOKS or torch.compiler.is_compiling():
        return
    q.__dict__[_LOOKS] = looks + 1
    for value in list(caller().f_locals.values()):  # a list, since a module's names change by other threads
        if issubclass(type(value), torch.nn.Module) and any(own is q for own in list(vars(value).values())):
            _tell_of(value, type(q))


def _answer(cls: type, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    options = kwargs or {}
    if function is torch.nn.functional.linear:
        from aqt_lite.ops import linear  # builds on the container, whose import may be what calls `serve`

        return linear(*args, **_renamed(options))
    if function in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
        return _matmul(*args, **options)
    if function in (torch.mm, torch.Tensor.mm):
        return _mm(*args, **options)
    leaves = pytree.tree_leaves((args, options), is_leaf=lambda node: isinstance(node, cls))
    raise TypeError(no_array_of("torch", next(node for node in leaves if isinstance(node, cls)), _OF_MODELS))


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    names = {"input": "x", "weight": "w"}
    return {names.get(name, name): value for name, value in options.items()}


def _matmul(input: Any, other: Any, *, out: Any = None) -> Any:
    if out is not None:
        raise TypeError("a product with a QArray makes an array of its own: write y = x @ q, without out=")
    if isinstance(input, torch.Tensor):
        return other.__rmatmul__(input)  # input @ other would come back here
    return input.__matmul__(other)


def _mm(input: Any, mat2: Any, *, out: Any = None) -> Any:
    if input.ndim != 2 or mat2.ndim != 2:
        raise ValueError(
            f"mm has operands of shapes {tuple(input.shape)} and {tuple(mat2.shape)}: give matrices, or write x @ q"
        )
    return _matmul(input, mat2, out=out)
