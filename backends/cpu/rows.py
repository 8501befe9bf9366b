"""Weights as rows of whole numbers, one a byte, along which exact products sum, however their codes are stored.

Owns: numbers of codes as bytes, and the form of ``reference.in_integers``, for NumPy arrays. Imports: the operations,
the runtime, ``kinds``. ``whole`` has the loops; ``fixed_point`` and ``packed`` call this, and JAX's ``whole`` what is
told of codes.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import runtime
from aqt_lite.backends.cpu.kinds import are_multiples, kind_of
from aqt_lite.backends.cpu.operands import scales_in
from aqt_lite.backends.cpu.runtime import LARGE, aligned_empty, ends_of_parts, in_parts, steps_of_elements
from aqt_lite.elements import ElementType
from aqt_lite.formats import FORMATS, element_type
from aqt_lite.packing import bytes_of

__all__ = [
    "Told",
    "as_rows",
    "dtype_of",
    "in_bytes",
    "in_integers",
    "rows_of_columns",
    "told_of",
    "turned_over",
    "unpacked",
]


LONGEST_ROW, SHORTEST_ROW = 1 << 15, 1 << 10
"""Codes of rows that a stream is cut to, where it may be cut anywhere."""


class Told(NamedTuple):
    """What the loops are told of codes."""

    known: bool
    """Codes are such multiples, one a byte."""
    kind: int
    flip: int
    table: Array
    per_unit: float


def told_of(element: ElementType, packed: bool) -> Told:
    """Of an element whose numbers are whole multiples of a unit, its codes one a byte or packed."""
    assert element.unit is not None
    return Told(not packed and are_multiples(element), *kind_of(element, packed, None), 1 / element.unit)


def dtype_of(element: ElementType) -> str:
    """Of the bytes: signed, but for codes that are not."""
    return "uint8" if element.zero_points and element.max > 127 else "int8"


def in_bytes(codes: Array, element: ElementType, inner: int, packed: bool, turned: bool = False) -> Any:
    """Whole multiples of the element's unit that rows of ``inner`` codes stand for; ``turned``, they are columns.

    NotImplemented where there are no loops.
    """
    loops = runtime.whole_loops()
    if loops is None:
        return NotImplemented
    told, rows = told_of(element, packed), len(codes)
    if told.known and not turned:
        return codes
    given = np.ascontiguousarray(codes).view(np.uint8)
    out = aligned_empty((inner, rows) if turned else (rows, inner), np.uint8)
    steps = steps_of_elements(out.size)
    in_parts(loops.in_bytes_in_parts, steps, ends_of_parts(rows, loops.HEIGHT, steps), given, inner, *told, turned, out)
    return out.view(dtype_of(element))


def unpacked(stream: Array, bits: int, length: int, signed: bool) -> Any:
    """``packing.unpack`` of a stream of fewer than 8 bits a code; NotImplemented where there are no loops."""
    if bits == 1 or stream.shape[-1] < bytes_of(length, bits):  # the loops would read beyond the last of its bytes
        return NotImplemented
    element, shape = element_type(f"{'' if signed else 'u'}int{bits}"), (*stream.shape[:-1], length)
    alike = math.gcd(math.prod(shape), LONGEST_ROW)
    if length % 8 == 0 and alike >= SHORTEST_ROW:  # rows join without a gap: all are cut alike, that threads share them
        stream, length = stream.reshape(-1, alike * bits // 8), alike
    codes = in_bytes(stream.reshape(-1, stream.shape[-1]), element, length, packed=True)
    return codes if codes is NotImplemented else codes.reshape(shape).view(element.storage)


def in_integers(w: Coded, *, spec: Spec) -> Any:
    """``reference.in_integers``, where codes are bytes."""
    element, codes = spec.element, w.codes
    if element.unit is None or codes.ndim != 2 or codes.size < LARGE:
        return NotImplemented
    numbers = in_bytes(codes, element, codes.shape[1], packed=False)
    if numbers is NotImplemented:
        return NotImplemented
    return Coded(numbers, scales_in(element.unit, w.scale, spec, get_backend("numpy")), w.zero_point)


def as_rows(numbers: Array, w: Coded, spec: Spec, contract: int, b: Backend) -> tuple[Coded, Spec]:
    """A weight of such ``numbers`` (N, K), and what it means, of one as it is stored, whose axis ``contract`` is K."""
    element, plain = spec.element, replace(spec, format=FORMATS[dtype_of(spec.element)])
    assert element.unit is not None
    if not (element.zero_points and spec.format.scale is None):
        w = w._replace(scale=scales_in(element.unit, w.scale, spec, b))
    if contract == 1:
        return w._replace(codes=numbers), plain
    turned, plain = turned_over(w, plain, b)
    return turned._replace(codes=numbers), plain


def turned_over(w: Coded, spec: Spec, b: Backend) -> tuple[Coded, Spec]:
    """A weight (K, N) and what it means as (N, K), as far as shapes go: its codes lie as they did."""
    arrays = [None if a is None else b.xp.permute_dims(a, (1, 0)) for a in w[:3]]
    return Coded(*arrays), replace(spec, block=spec.block[::-1])


def rows_of_columns(w: Coded, spec: Spec, columns: int) -> tuple[Coded | None, Spec]:
    """A weight (K, N) and what it means as (N, K), of which there are no codes but their shape.

    Scales and zero points have the order that they had. None where there are offsets, or no scales.
    """
    if w.scale is None or w.offset is not None:
        return None, spec
    shape = np.broadcast_to(np.empty((), spec.element.storage), (columns, w.codes.shape[0]))
    return w._replace(codes=shape), replace(spec, block=spec.block[::-1])
