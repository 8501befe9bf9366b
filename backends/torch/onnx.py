"""Weights inside programs that torch exports to ONNX: integers, and what makes numbers of them there.

Owns: ``affine.dequantize`` and ``packing.unpack`` as such a program has them. ONNX's exporter computes ahead of time
whatever depends on constants alone, which would make float32 of every weight; what has passed DequantizeLinear it
leaves. Imports: the adapter, affine, packing, elements.

Of integers with plain scales it is DequantizeLinear, with a scale for each row: of a tensor, a channel, or, codes
reshaped so that a block is a row, a block. Other codes, and scales that are kept in few bits, are made positions by
that operator, and looked up in a table of their numbers; a block a row, too, so that scales are not spread over it. So
any opset that has the operator serves. Bytes that hold several codes are positions, too, in a table of these codes: so
they stay packed, whatever the opset has to say of 4 bits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from aqt_lite import affine, packing
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.torch.adapter import makes_onnx
from aqt_lite.formats import Format
from aqt_lite.granularity import Block

__all__ = ["makes_onnx_of_codes", "values_in_onnx", "with_codes_in_onnx", "with_streams_in_onnx"]


def makes_onnx_of_codes() -> bool:
    """Whether a program for ONNX is being made, by a torch that can say DequantizeLinear in it.

    NotImplementedError where it is made of a trace, which has no words for codes.
    """
    if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():  # type: ignore[attr-defined, no-untyped-call]
        raise NotImplementedError(
            "torch.onnx.export(..., dynamo=False) would make float32 of quantized weights: "
            "say torch.onnx.export(model, inputs, dynamo=True), which keeps codes"
        )
    return makes_onnx() and hasattr(torch.onnx, "ops")  # of torch 2.8


def with_codes_in_onnx(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``affine.dequantize``: by ``kernel``, or by codes that stay codes, where a program for ONNX is being made."""

    def call(w: Coded, *, spec: Spec, out: str | None = None) -> Any:
        return values_in_onnx(w, spec, out) if makes_onnx_of_codes() else kernel(w, spec=spec, out=out)

    return call


def with_streams_in_onnx(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """``packing.unpack``: by ``kernel``, or by a table of a byte's codes, where a program for ONNX is being made."""

    def call(stream: Array, *, bits: int, length: int, signed: bool) -> Any:
        if not makes_onnx_of_codes():
            return kernel(stream, bits=bits, length=length, signed=signed)
        if bits > 8:
            return packing.unpack(stream, bits=bits, length=length, signed=signed, b=get_backend("torch"))
        return (_of_whole_codes if 8 % bits == 0 else _of_any_bits)(stream, bits, length, signed)

    return call


def _of_whole_codes(stream: Any, bits: int, length: int, signed: bool) -> Array:
    """Codes of bytes that hold whole ones."""
    found = _looked_up_in(_codes_of_a_byte(bits, signed), stream)
    return found.reshape(*stream.shape[:-1], stream.shape[-1] * (8 // bits))[..., :length]


def _of_any_bits(stream: Any, bits: int, length: int, signed: bool) -> Array:
    """Others, without a sign as the exporter computes them, in a byte each: signs would make it four bytes each."""
    codes = packing.unpack(stream, bits=bits, length=length, signed=False, b=get_backend("torch"))
    return _looked_up_in(_codes_of_a_byte(bits, signed)[: 1 << bits, 0], codes) if signed else codes


def _codes_of_a_byte(bits: int, signed: bool) -> Any:
    every = np.arange(256, dtype=np.uint8)[:, None]
    return torch.from_numpy(
        packing.unpack(every, bits=bits, length=8 // bits, signed=signed, b=get_backend("numpy")).copy()
    )


def _looked_up_in(table: Any, positions: Any, first: int = 0) -> Any:
    """Rows of ``table``, of which the one for position ``first`` is the first."""
    at = _as_float(positions).to(torch.int64)
    rows = torch.index_select(table, 0, (at - first if first else at).reshape(-1))
    return rows.reshape(*positions.shape, *table.shape[1:])


def values_in_onnx(w: Coded, spec: Spec, out: str | None = None) -> Array:
    """``affine.dequantize`` by operators of ONNX."""
    b = get_backend("torch")
    spec = replace(spec, format=_in_onnx(spec.format))
    if w.scale is not None:
        w = w._replace(scale=affine.usable_scales(w.scale, spec, b))
        spec = replace(spec, format=replace(spec.format, scale=None))
    grouped = any(size not in (None, 1) for size in spec.block)
    if not grouped:
        return _values(w, spec, out, b)
    rows, back = _blocks_as_rows(tuple(w.codes.shape), spec.block)
    each = [a if a is None else a.reshape(-1, 1) for a in w[1:]]
    return back(_values(Coded(rows(w.codes), *each), replace(spec, block=(1, None)), out, b))


def _values(w: Coded, spec: Spec, out: str | None, b: Backend) -> Array:
    """The same where no axis is cut in groups."""
    scale: Any = w.scale
    is_one_call = (
        spec.element.zero_points
        and spec.element.missing is None
        and w.codes.dtype in (torch.int8, torch.uint8)
        and w.offset is None
        and scale is not None
        and scale.dtype == torch.float32
        and spec.source.name == "float32"
    )
    along = [axis for axis, n in enumerate(spec.block) if n == 1 and w.codes.shape[axis] != 1]
    if not is_one_call or len(along) > 1:
        return affine.dequantize(w, spec=spec, out=out, b=b)
    zero: Any = w.zero_point
    scale, zero = (None if a is None else a.reshape(-1 if along else ()) for a in (scale, zero))
    values = _dequantize_linear(w.codes, scale, zero, along)
    return values if out is None else values.to(getattr(torch, out))


def _dequantize_linear(codes: Array, scale: Any, zero: Any = None, along: Any = ()) -> Array:
    """ONNX's operator, of one scale, or one for each index of an axis."""
    inputs = (codes, scale) if zero is None else (codes, scale, zero.to(codes.dtype))
    attributes: Any = {"axis": along[0]} if along else {}
    values: Array = torch.onnx.ops.symbolic(
        "DequantizeLinear", inputs, attributes, dtype=torch.float32, shape=tuple(codes.shape), version=13
    )
    return values


def _blocks_as_rows(shape: tuple[int, ...], block: Block) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Arrays of that shape as a matrix with a block in each row, shorter last ones filled up with 0; and back."""
    split: list[int] = []
    counts: list[int] = []
    sizes: list[int] = []
    whole: list[int] = []
    for length, size in zip(shape, block, strict=True):
        if size == 1:
            counts.append(len(split))
            split.append(length)
        elif size is None or length <= size:
            sizes.append(len(split))
            split.append(length)
        else:
            counts.append(len(split))
            sizes.append(len(split) + 1)
            split += [-(-length // size), size]
        whole.append(length if size is None or size == 1 or length <= size else -(-length // size) * size)
    order = [*counts, *sizes]
    inverse = [order.index(axis) for axis in range(len(order))]
    row = math.prod(split[axis] for axis in sizes)
    fills = any(full is not length for full, length in zip(whole, shape, strict=True))

    def rows(a: Any) -> Array:
        if fills:
            ends = [end for full, n in zip(reversed(whole), reversed(shape), strict=True) for end in (0, full - n)]
            a = torch.nn.functional.pad(a, ends)
        return a.reshape(split).permute(order).reshape(-1, row)

    def back(a: Any) -> Array:
        a = a.reshape([split[axis] for axis in order]).permute(inverse).reshape(whole)
        return a[tuple(slice(0, n) for n in shape)] if fills else a

    return rows, back


# ---- codes that are no numbers


@functools.cache
def _looked_up(kind: Any) -> Any:
    """A kind of element type whose codes are positions in a table of its numbers, looked up when the program runs."""

    class InOnnx(kind):  # type: ignore[misc]
        def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
            if compute != "float32":
                return super().decode(codes, b, compute)
            if self.zero_points and self.missing is None:
                return _as_float(codes)
            if self.own_range:  # patterns of float32, which no table has
                return super().decode(_of_bytes(codes, self.bits), b, compute)
            if codes.dtype not in (torch.int8, torch.uint8):  # scales of 16 bits: a table is longer than they are
                return super().decode(codes, b, compute)
            first, last = self.codes
            known = np.arange(first, last + 1).astype(self.storage)
            table = torch.from_numpy(np.asarray(super().decode(known, get_backend("numpy")), np.float32))
            return _looked_up_in(table, codes, first)

    return InOnnx


def _as_float(codes: Any) -> Array:
    """Codes as numbers of float32; of 16 bits, of which opsets before 21 know none, by their bytes."""
    one = torch.ones((), dtype=torch.float32)
    if codes.dtype not in (torch.int16, torch.uint16):
        return _dequantize_linear(codes, one)
    byte = torch.int8 if codes.dtype == torch.int16 else torch.uint8
    codes = codes.to(torch.int32)  # in 16 bits onnxruntime does next to nothing
    high, low = (codes >> 8).to(byte), (codes & 255).to(torch.uint8)
    return _dequantize_linear(high, one) * 256.0 + _dequantize_linear(low, one)


def _of_bytes(codes: Any, bits: int) -> Array:
    """Codes of that many bits as int32, put together from their bytes when the program runs."""
    codes = codes.to(torch.int32)
    parts = [(codes >> start & 255).to(torch.uint8) for start in range(0, bits, 8)]
    whole = [_as_float(part).to(torch.int32) << 8 * i for i, part in enumerate(parts)]
    return functools.reduce(torch.bitwise_or, whole)


def _in_onnx(form: Format) -> Format:
    element: Any = form.element  # a dataclass of its kind
    kind: Any = type(element)
    numbers = _looked_up(kind)(**{f.name: getattr(element, f.name) for f in fields(element) if f.init})
    return replace(form, element=numbers, scale=None if form.scale is None else _in_onnx(form.scale))
