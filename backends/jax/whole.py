"""Whole numbers of codes, one a byte, inside programs that XLA compiles, on a CPU with numba.

Owns: the primitive ``whole_numbers``, and what it becomes: on a CPU a call of the compiled loops that NumPy's form
uses, which XLA makes without Python; elsewhere, and in programs that are exported, XLA's own operations. Imports: the
CPU library, ``ffi``, ``primitives``.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit

from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import decoding, native, pool, turning, whole
from aqt_lite.backends.cpu.native import address_of, in_huge_pages
from aqt_lite.backends.cpu.rows import dtype_of, told_of
from aqt_lite.backends.cpu.whole import HEIGHT, in_bytes_apart
from aqt_lite.backends.jax import ffi
from aqt_lite.backends.jax.ffi import OK, array, attribute, data, describe, dim, operand, parallel_for, result
from aqt_lite.backends.jax.primitives import primitive, version_of
from aqt_lite.elements import ElementType
from aqt_lite.packing import unpack

__all__ = ["in_bytes", "register"]

TARGETS = "aqt_lite_whole_numbers", "aqt_lite_whole_numbers_in_order"
"""Of kinds up to ``HALVES``, and of the others, whose tables have two axes."""

# ---- what XLA calls. Operands: the codes (bytes), the table of their numbers. Attributes, by name: flip, inner, kind,
# known, per_unit, turned, unsigned, width (bits from one code to the next, for XLA's own operations). Result: numbers.


@njit(nogil=True)
def _convert_with(table: Any, frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    codes, numbers = operand(frame, 0), result(frame, 0)
    in_bytes_apart((
        array(codes, (dim(codes, 0), dim(codes, 1)), np.uint8),
        attribute(frame, 1),
        attribute(frame, 3) != 0,
        attribute(frame, 2),
        attribute(frame, 0),
        table,
        np.float32(attribute(frame, 4)),
        attribute(frame, 5) != 0,
        start,
        stop,
        array(numbers, (dim(numbers, 0), dim(numbers, 1)), np.uint8),
    ))  # fmt: skip


@njit(nogil=True)
def _convert(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    _convert_with(array(operand(frame, 1), (dim(operand(frame, 1), 0),), np.float32), frame, start, stop)


@njit(nogil=True)
def _convert_in_order(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    _convert_with(array(operand(frame, 1), (1, dim(operand(frame, 1), 1)), np.float32), frame, start, stop)


_convert_address, _convert_in_order_address = address_of(_convert, 3), address_of(_convert_in_order, 3)


def _handler(version: int, in_order: bool) -> Any:
    """What XLA calls. What numba caches of it is of this ``version`` of the sources."""

    def handler(frame: Any) -> Any:  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        rows, made = dim(operand(frame, 0), 0), result(frame, 0)
        in_huge_pages(data(made), dim(made, 0) * dim(made, 1))
        part = max(rows // 16 // HEIGHT, 1) * HEIGHT
        if in_order:
            return parallel_for(frame, _convert_in_order_address(), rows, part)
        return parallel_for(frame, _convert_address(), rows, part)

    return handler


@functools.cache
def _is_registered(target: str) -> bool:
    """Whether XLA has taken the loops, which are offered to it on the first call."""
    version = version_of(sys.modules[__name__], whole, decoding, turning, ffi, native, pool)
    return ffi.register(target, _handler(version, target == TARGETS[1]))


def register() -> bool:
    """Offer XLA these loops, before it asks; whether it has taken them."""
    taken = [_is_registered(target) for target in TARGETS]
    return all(taken)


# ---- what JAX sees


def _plain(codes: Array, table: Array, *, width: int, **told: int) -> list[Array]:
    """The same in XLA's own operations."""
    if told["known"]:
        numbers = codes
    else:
        b, inner = get_backend("jax"), told["inner"]
        patterns = codes if width == 8 else unpack(codes, bits=width, length=inner, signed=False, b=b)
        numbers = table.reshape(-1)[patterns.view(jnp.uint8).astype(jnp.int32)] * told["per_unit"]
    return [(numbers.T if told["turned"] else numbers).astype(jnp.uint8 if told["unsigned"] else jnp.int8)]


def _results(codes: Any, table: Any, *, inner: int, turned: int, unsigned: int, **others: int) -> list[Any]:
    shape = (inner, codes.shape[0]) if turned else (codes.shape[0], inner)
    return [jax.core.ShapedArray(shape, jnp.uint8 if unsigned else jnp.int8)]


_bind = tuple(primitive(t, _plain, _results, functools.partial(_is_registered, t)) for t in TARGETS)


def in_bytes(codes: Array, element: ElementType, inner: int, packed: bool, turned: bool) -> Array:
    """``cpu.rows.in_bytes``."""
    told = told_of(element, packed)
    if told.known and not turned:
        return codes
    static = {
        "flip": told.flip,
        "inner": inner,
        "kind": told.kind,
        "known": int(told.known),
        "per_unit": int(told.per_unit),
        "turned": int(turned),
        "unsigned": int(dtype_of(element) == "uint8"),
        "width": element.bits if packed else 8,
    }
    (numbers,) = _bind[told.kind > decoding.HALVES](codes, told.table, **static)
    return numbers
