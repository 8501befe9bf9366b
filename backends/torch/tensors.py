"""Which tensors have memory and values of their own, and where.

Owns: what torch wraps tensors with (transformations, compilers, other devices' classes), as questions. Imports: torch.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses import FakeTensor

from aqt_lite._namespace import Array

__all__ = [
    "has_its_memory",
    "has_no_values",
    "is_functorch",
    "is_inside_grad",
    "outside_transformations",
    "without_memory",
    "wraps_tensors",
]

_NO_TRANSFORMATION: Any = contextlib.nullcontext()


def has_no_values(x: Array) -> bool:
    """Whether x is on the meta device, a fake tensor, or wrapped by a functorch transformation."""
    return bool(x.is_meta or isinstance(x, FakeTensor) or is_functorch_wrapped_tensor(x))


def has_its_memory(x: Array) -> bool:
    """Whether the storage is as large as the tensor says; torch lets one take it away, and reads on regardless."""
    present = x.untyped_storage().nbytes()
    if present >= x.nbytes and x.is_contiguous() and not x.storage_offset():
        return True
    if 0 in x.shape:
        return True
    last = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return bool(present >= (last + 1) * x.element_size())


def without_memory(x: Array) -> str:
    """What is wrong with a tensor without its memory."""
    return (
        f"has shape {tuple(x.shape)}, but its storage was freed or cut, to {x.untyped_storage().nbytes()} bytes (as "
        f"FSDP does between uses): gather its values first"
    )


def wraps_tensors(x: Array) -> bool:
    """Whether x has no memory of its own, as DTensor has none: a class that answers every operator itself."""
    cls = type(x)
    return (
        cls is not torch.Tensor
        and cls is not torch.nn.Parameter
        and cls.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    )


def is_functorch(x: Array) -> bool:
    """Whether a functorch transformation (vmap, grad) wraps the tensor."""
    return bool(is_functorch_wrapped_tensor(x))


def outside_transformations() -> Any:
    """A context in which plain tensors have memory, also where a function is transformed (``torch.func``)."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return _NO_TRANSFORMATION
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_inside_grad() -> bool:
    """Whether ``torch.func.grad``, ``vjp`` or ``jvp`` surrounds what a compiler traces, which asks while it does."""
    kinds = torch._C._functorch.TransformType
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() in (kinds.Grad, kinds.Jvp) for level in stack)
