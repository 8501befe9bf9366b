"""Weights inside programs that torch exports to ONNX: integers, and what makes numbers of them there.

Owns: both ways to say that. ONNX's exporter computes ahead of time whatever depends on constants alone, which would
make float32 of every weight; what has passed DequantizeLinear it leaves. Imports: the adapter, affine, elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from aqt_lite import affine
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.torch.adapter import makes_onnx
from aqt_lite.formats import Format

__all__ = ["dequantized_in_onnx", "with_codes_in_onnx"]


def dequantized_in_onnx(w: Coded, spec: Spec) -> Array | None:
    """ONNX's DequantizeLinear of the codes, which its exporter would fold to floats; None for other blocks."""
    scale: Any = w.scale
    zero = w.zero_point
    along = [axis for axis, n in enumerate(scale.shape) if n > 1]
    attributes: Any = {}
    version = 13
    if spec.element.bits != 8 or not hasattr(torch.onnx, "ops"):  # torch.onnx.ops: of torch 2.8
        return None
    if not along:
        scale, zero = (None if a is None else a.reshape(()) for a in (scale, zero))
    elif len(along) == 1 and spec.block[along[0]] == 1:
        attributes["axis"] = along[0]
        scale, zero = (None if a is None else a.reshape(-1) for a in (scale, zero))
    elif spec.block.count(1) == 1 and None not in spec.block:
        grouped = 1 - spec.block.index(1)
        size, version = spec.block[grouped], 21
        assert size is not None
        attributes.update(axis=grouped, block_size=size)
    else:
        return None
    inputs: Any = (w.codes, scale) if zero is None else (w.codes, scale, zero.to(w.codes.dtype))
    values: Array = torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=tuple(w.codes.shape), version=version
    )
    return values


@functools.cache
def _looked_up(kind: Any) -> Any:
    """A kind of element type whose codes are positions in a table of its numbers, looked up when the program runs."""

    class InOnnx(kind):  # type: ignore[misc]
        def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
            if codes.dtype not in (torch.int8, torch.uint8) or compute != "float32":
                return super().decode(codes, b, compute)
            one = torch.ones((), dtype=torch.float32)
            position: Any = torch.onnx.ops.symbolic(
                "DequantizeLinear", (codes, one), {}, dtype=torch.float32, shape=tuple(codes.shape), version=13
            )
            if self.zero_points and self.unit == 1 and self.missing is None:
                return position  # the codes are the numbers
            every = np.arange(256) - (128 if codes.dtype == torch.int8 else 0)
            known = np.clip(every, *self.codes).astype(self.storage)
            table = torch.from_numpy(np.asarray(super().decode(known, get_backend("numpy")), np.float32))
            return table[(position - int(every[0])).to(torch.int64)]

    return InOnnx


def _in_onnx(form: Format) -> Format:
    element: Any = form.element  # a dataclass of its kind
    kind: Any = type(element)
    numbers = _looked_up(kind)(**{f.name: getattr(element, f.name) for f in fields(element) if f.init})
    return replace(form, element=numbers, scale=None if form.scale is None else _in_onnx(form.scale))


def with_codes_in_onnx(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``affine.dequantize``: by ``kernel``, or by codes that stay codes, where a program for ONNX is being made."""

    def call(w: Coded, *, spec: Spec, out: str | None = None) -> Any:
        if not makes_onnx() or not hasattr(torch.onnx, "ops"):  # of torch 2.8
            return kernel(w, spec=spec, out=out)
        return affine.dequantize(w, spec=replace(spec, format=_in_onnx(spec.format)), out=out, b=get_backend("torch"))

    return call
