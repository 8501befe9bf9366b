"""What torch's functions do where they are given a container for a tensor.

Owns: the hook by which they ask, and what has to be refused because of it. Imports: the words; the products when one is
asked for.

``torch.matmul``, ``torch.mm`` and ``F.linear`` are the products that the container has. All else raises TypeError with
the way; operators of tensors (``x * q``) take that for an answer, and ask the container's own. What has the hook is
taken for a tensor by modules that register buffers, which goes wrong when they are moved or saved, and is refused; as
an attribute it would be neither, and there is a warning.
"""

from __future__ import annotations

from types import FrameType
from typing import Any

import torch
import torch.utils._pytree as pytree

from aqt_lite._asked import Asked
from aqt_lite._callers import warn
from aqt_lite._ways import no_array_of

__all__ = ["serve"]

_OF_MODELS = "aqt_lite.torch.quantize_(model, rules)"


def serve(cls: type) -> None:
    """Make torch's functions ask what to do with a ``cls``."""
    cls.__torch_function__ = classmethod(_answer)  # type: ignore[attr-defined]

    def refuse(module: torch.nn.Module, name: str, buffer: Any) -> None:
        if isinstance(buffer, cls):
            raise TypeError(
                f"buffer {name!r} is a QArray, which a module would neither move nor save: self.{name} = "
                f"aqt_lite.torch.QuantizedWeight(q) keeps it, and {_OF_MODELS} makes layers that do"
            )

    torch.nn.modules.module.register_module_buffer_registration_hook(refuse)
    Asked.listeners.append(_tell_of_attributes)


def _tell_of_attributes(q: Any, asking: FrameType) -> None:
    """Warn of a container that becomes a plain attribute of a module, for which torch has no hook.

    Raises where it would be a parameter, which torch refuses, too, but without a word of what to do.
    """
    of_parameters = asking.f_code is _ASKS_FOR_PARAMETERS
    setting = asking.f_back if of_parameters else asking
    if setting is None or setting.f_code is not _SETS_ATTRIBUTES:
        return
    module, name = setting.f_locals["self"], setting.f_locals["name"]
    own, held = f"{type(module).__name__}.{name}", vars(module)
    if name in held.get("_parameters", ()):
        raise TypeError(
            f"aqt_lite: {own} is a parameter, and a QArray is none: del self.{name}, and then self.{name} = "
            f"aqt_lite.torch.QuantizedWeight(q); {_OF_MODELS} makes layers that have one"
        )
    refused = any(name in held.get(kept, ()) for kept in ("_buffers", "_modules"))
    if not (of_parameters or refused):
        place = f"self.{name} = " if name.isidentifier() else ""
        warn(
            f"aqt_lite: {own} is a QArray, which no state_dict holds, and which does not move with the module: "
            f"{place}aqt_lite.torch.QuantizedWeight(q) keeps it, and {_OF_MODELS} makes layers that do"
        )


# None where somebody has put something else in their place: then nobody is told
_SETS_ATTRIBUTES = getattr(torch.nn.Module.__setattr__, "__code__", None)
_ASKS_FOR_PARAMETERS = getattr(type(torch.nn.Parameter).__instancecheck__, "__code__", None)


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
