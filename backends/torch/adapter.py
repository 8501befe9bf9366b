"""The adapter of torch: eager, compiled, exported, and under autograd."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from aqt_lite import _exact
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu.runtime import LARGE, aligned_empty
from aqt_lite.backends.torch import functions, trees
from aqt_lite.backends.torch.namespace import namespace
from aqt_lite.backends.torch.tensors import (
    has_its_memory,
    has_no_values,
    is_functorch,
    is_inside_grad,
    outside_transformations,
    without_memory,
    wraps_tensors,
)
from aqt_lite.elements import Codebook, Float, FloatOrMissing, Integer, IntegerOrMissing
from aqt_lite.formats import Format


class TorchBackend(Backend):
    """torch on CPU and CUDA."""

    name = "torch"
    array_modules = ("torch",)
    weights_are = "linear"
    permutes_views = True
    xp = namespace()

    def asarray(self, values: np.ndarray[Any, Any], like: Array | None = None) -> Array:
        device = None if like is None else like.device
        dtype = getattr(torch, values.dtype.name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"torch has no dtype {values.dtype.name}: convert it to float32 or float64 first")
        native = aligned_empty(values.shape, values.dtype.newbyteorder("="))
        native[...] = values
        if _is_of_ml_dtypes(values.dtype):
            return torch.from_numpy(native.view(f"i{native.itemsize}")).view(dtype).to(device)
        return torch.from_numpy(native).to(device)

    def constant(self, value: float | Sequence[float], dtype: str, like: Array) -> Array:
        return torch.tensor(value, dtype=self.dtype(dtype), device=like.device)  # torch.compile knows no NumPy scalar

    def bits_of(self, x: Array) -> Array:
        return _bitcast(x, getattr(torch, "uint8" if x.element_size() == 1 else f"int{8 * x.element_size()}"))

    def floats_of(self, bits: Array, name: str) -> Array:
        if name == "float32" and makes_onnx():
            return _by_arithmetic(bits)
        return _bitcast(bits, getattr(torch, name))

    def to_device(self, x: Array, device: Any) -> Array:
        return x.to(device)

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        if not wraps_tensors(x) and not has_its_memory(x):
            raise ValueError(f"a tensor {without_memory(x)}")
        with outside_transformations():
            return self._in_memory(x)

    def _in_memory(self, x: Array) -> np.ndarray[Any, Any]:
        x = x.detach().cpu()
        own = getattr(ml_dtypes, self.dtype_name(x), None)
        if own is not None:
            bits = x.resolve_neg().view(torch.int16 if x.element_size() == 2 else torch.uint8)
            return np.asarray(bits).view(own)
        return np.asarray(x.resolve_neg())

    def contiguous(self, x: Array) -> Array:
        return x.contiguous()

    def by_columns(self, x: Array) -> Array:
        return x.t().contiguous().t()

    def is_by_columns(self, x: Array) -> bool:
        return bool(x.ndim == 2 and x.t().is_contiguous())

    def to_pickle(self, x: Array) -> Array:
        signed = _SIGNED.get(x.dtype)  # torch 2.13 writes pickles of unsigned types that it then fails to read
        return x if signed is None else x.view(signed)

    def from_pickle(self, x: Array, dtype: str) -> Array:
        wanted = getattr(torch, dtype)
        return x.view(wanted) if _SIGNED.get(wanted) == x.dtype else x

    def number_of_elements(self, shape: tuple[int, ...]) -> int:
        number = math.prod(shape)  # which stays one, and no symbol's copy, where shapes are symbols
        if torch.compiler.is_compiling() or type(number) is not int:
            return number
        return _Size(number, shape)

    def dtype_name(self, x: Array) -> str:
        return _NAMES.get(x.dtype) or super().dtype_name(x)

    def device(self, x: Array) -> Any:
        return x.device

    def share_a_device(self, x: Array, y: Array) -> bool:
        return bool(x.device == y.device)  # known even where values are not

    def is_traced(self, x: Array) -> bool:
        recording = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        return recording or has_no_values(x)

    def why_unusable(self, x: Array) -> str | None:
        if not isinstance(x, torch.Tensor):
            return f"is a {type(x).__name__}: give the .qarray that it holds"
        if x.layout != torch.strided:
            return f"is a tensor of layout {x.layout}: make it dense first with x.to_dense()"
        if x.is_nested:
            return "is a nested tensor: quantize its parts, or make it dense first with x.to_padded_tensor(0)"
        if (
            torch.compiler.is_compiling()
            or is_functorch(x)
            or has_its_memory(x)
            or has_no_values(x)
            or wraps_tensors(x)
        ):
            return None
        return without_memory(x)

    def reciprocal(self, x: Array) -> Array:
        if x.dtype == torch.float64:
            return 1.0 / x  # correctly rounded on every device; only float32 division is approximated
        return _exact.reciprocal(x, xp=self.xp, bitcast=_bitcast, integer=torch.int64, bits=torch.int32)

    def quotient(self, x: Array, y: Array) -> Array:
        if x.dtype == torch.float64 or x.device.type == "cpu":
            return x / y
        return _exact.quotient(x, y, xp=self.xp, bitcast=_bitcast, integer=torch.int64, bits=torch.int32)

    def fraction_and_exponent(self, x: Array) -> tuple[Array, Array]:
        x = self.computed_once(x)
        # zero and NaN stay what they are
        integer, mantissa, bias = (torch.int32, 23, 127) if x.dtype == torch.float32 else (torch.int64, 52, 1023)
        bits = _bitcast(x, integer)
        fraction = _bitcast((bits & ((1 << mantissa) - 1)) | (bias << mantissa), x.dtype)
        exponent = ((bits >> mantissa) - bias).to(torch.int32)
        return self.computed_once(torch.where(x > 0, fraction, x)), self.computed_once(exponent)

    def power_of_two(self, e: Array) -> Array:
        if makes_onnx():
            powers = torch.tensor([0.0, *(2.0**e for e in range(-100, 128))])
            return powers[(torch.clamp(e, -101, 127) + 101).to(torch.int64)]
        power = _bitcast((torch.clamp(e, -100, 127) + 127) << 23, torch.float32)
        return torch.where(e < -100, 0.0, power)

    def computed_once(self, x: Array) -> Array:
        """Inductor copies expressions to where they are used, and walks every copy: a chain takes it exponential time.

        What ``as_strided`` reads it puts into memory. A program for export is left as it is.
        """
        if not torch.compiler.is_compiling() or (HAS_IS_EXPORTING and torch.compiler.is_exporting()):
            return x
        x = x.contiguous()
        return torch.as_strided(x, x.shape, x.stride(), 0)

    def stop_gradient(self, x: Array) -> Array:
        return x.detach()

    def differentiates(self, *arrays: Array | None) -> bool:
        if not torch.is_grad_enabled():
            return False
        if torch.compiler.is_compiling():  # inside it, what torch.func.grad wraps says that it requires none
            inside = is_inside_grad()
            return any(a is not None and (inside or a.requires_grad) for a in arrays)
        return any(a is not None and (a.requires_grad or is_functorch(a)) for a in arrays)

    def has_nan(self, x: Array) -> bool:
        listened_to = is_functorch(x) or _get_current_dispatch_mode() is not None
        if listened_to or type(x) is not torch.Tensor or not x.is_cpu or x.numel() < LARGE:
            return super().has_nan(x)
        return get_backend("numpy").has_nan(self.to_numpy(x))  # torch's threads would go on spinning beside the loops

    def memory_of(self, x: Array) -> Any:
        if has_no_values(x) or wraps_tensors(x) or x.numel() == 0:
            return id(x)
        return x.data_ptr(), x.device, x.dtype, tuple(x.shape), x.stride()  # ``state_dict`` makes new tensors

    def look_ups_raise(self) -> bool:
        return not makes_onnx()

    def straight_through(self, x: Array, y: Array, inside: Array) -> Array:
        if not (self.differentiates(x) or torch.compiler.is_compiling()):
            return y.detach()
        # -(x.detach() - x) is -0.0, with the derivative 1, and y + -0.0 has the bits of y
        return y.detach() + torch.where(inside, -(x.detach() - x), -0.0)

    def unusable_as_nan(self, scale: Array, positive: bool) -> Array:
        """Inside what torch.compile makes, one call of NumPy.

        A loop of its own would start the compiler's threads, which go on spinning while the product runs.
        """
        compiles = torch.compiler.is_compiling() and HAS_IS_EXPORTING and not torch.compiler.is_exporting()
        if not compiles or scale.device.type != "cpu" or scale.dtype != torch.float32 or self.differentiates(scale):
            return super().unusable_as_nan(scale, positive)
        return _unusable_as_nan(scale, positive)

    def register_container(self, cls: type, flatten: Any, unflatten: Any, names: tuple[str, ...]) -> None:
        trees.register(cls, flatten, unflatten, names)
        functions.serve(cls)
        # torch.load(weights_only=True) trusts them: fields, and no code
        kinds = Codebook, Float, Integer, FloatOrMissing, IntegerOrMissing
        torch.serialization.add_safe_globals([cls, Format, *kinds])


class _Size(int):
    """``q.size``, which torch's own functions call, as in words about a state dict that they cannot load."""

    shape: tuple[int, ...]

    def __new__(cls, number: int, shape: tuple[int, ...]) -> _Size:
        size = super().__new__(cls, number)
        size.shape = shape
        return size

    def __call__(self, dim: int | None = None) -> Any:
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def __reduce__(self) -> Any:
        return int, (int(self),)


def _is_of_ml_dtypes(dtype: np.dtype[Any]) -> bool:
    """Whether NumPy knows the type through ml_dtypes, and torch's conversions do not."""
    return hasattr(ml_dtypes, dtype.name)


HAS_IS_EXPORTING = hasattr(torch.compiler, "is_exporting")  # of torch 2.7


_SIGNED = {torch.uint16: torch.int16}

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}
"""Of what products ask for: to make such a name takes a good part of the time of a small one."""


@torch.library.custom_op("aqt_lite::unusable_as_nan", mutates_args=())
def _unusable_as_nan(scale: torch.Tensor, positive: bool) -> torch.Tensor:
    values = scale.numpy(force=True)
    wrong = (values <= 0 if positive else values == 0) | np.isinf(values)
    return torch.from_numpy(np.ascontiguousarray(np.where(wrong, np.float32(np.nan), values)))


@_unusable_as_nan.register_fake
def _(scale: Any, positive: Any) -> Any:
    return torch.empty_like(scale, memory_format=torch.contiguous_format)


@_unusable_as_nan.register_vmap
def _(info: Any, axes: Any, scale: Any, positive: Any) -> Any:
    return _unusable_as_nan(scale, positive), axes[0]


def makes_onnx() -> bool:
    """Whether what is being traced is for ONNX."""
    return HAS_IS_EXPORTING and torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def _bitcast(x: Array, dtype: Any) -> Array:
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise NotImplementedError(
            "torch.jit.trace cannot record this: it has no operator that reads a float's bits, which quantization and "
            "reproducible products need. Use torch.export.export or torch.compile; products with mode='fast' it records"
        )
    if makes_onnx():
        warnings.warn(  # an error would make the exporter begin anew in a way that does not say what it is
            "ONNX has no operator that reads a float's bits, which quantizing inside the program (of activations, for "
            "instance) and mode='reproducible' need, and the exporter will fail over it: export a model whose weights "
            "alone are quantized, with mode='fast'",
            stacklevel=2,
        )
    return x.view(dtype)


def _by_arithmetic(bits: Array) -> Array:
    """The float32 numbers of these patterns, for a program that cannot read them as floats."""
    exponent, fraction = bits >> 23 & 255, bits & (1 << 23) - 1
    powers = torch.tensor([2.0 ** (max(e, 1) - 127) for e in range(255)] + [float("inf")])
    significand = fraction.to(torch.float32) * 2.0**-23 + torch.where(exponent > 0, 1.0, 0.0)  # 24 bits: exact
    size = significand * powers[exponent.to(torch.int64)]
    size = torch.where((exponent == 255) & (fraction != 0), float("nan"), size)
    return torch.where(bits < 0, -size, size)
