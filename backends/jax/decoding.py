"""Codes that become numbers inside programs that XLA compiles, on a CPU with numba: in registers, or in memory.

Owns: the primitives ``decoding_product``, and ``decoded_values``, which XLA itself multiplies, and what they become:
on a CPU a call of the compiled loops that NumPy's form uses, which XLA makes without Python;
elsewhere, and in programs that are exported, XLA's own operations. Imports: the CPU library, ``ffi``, ``primitives``.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numba import njit

from aqt_lite import affine
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import decoding, native, panels, pool, serve, turning
from aqt_lite.backends.cpu.decoders import SHORTEST_GROUP, SHORTEST_ROW
from aqt_lite.backends.cpu.decoding import (
    HALVES,
    STRIP,
    arrange_apart,
    dequantize_apart,
    multiply_apart,
    shape_of_arranged,
)
from aqt_lite.backends.cpu.native import address_of, in_huge_pages
from aqt_lite.backends.cpu.operands import Operands, operands_of
from aqt_lite.backends.cpu.turning import blocks_of
from aqt_lite.backends.jax import ffi
from aqt_lite.backends.jax.ffi import OK, array, attribute, data, describe, dim, operand, parallel_for, result
from aqt_lite.backends.jax.primitives import instead_on_cpu, primitive, version_of
from aqt_lite.ops import reference
from aqt_lite.packing import unpack

__all__ = ["dequantize", "dequantized", "plain_values", "product", "register", "serves_values", "values"]

TARGETS = "aqt_lite_decoding_product", "aqt_lite_decoding_product_in_order"
TARGETS_OF_VALUES = "aqt_lite_decoded_values", "aqt_lite_decoded_values_in_order"
"""Of kinds up to ``HALVES``, and of the others, whose loops are compiled where such a kind is used."""

AT_ONCE = 2 * STRIP
"""Columns whose scales are turned at a time, where their axes are swapped: the more, the longer are the runs read."""

CODES_AT_ONCE = 1 << 16
"""Codes that a thread turns to floats at a time: some microseconds of work, as threads may begin late."""

# ---- what XLA calls. Operands: x (M, K) float32, the codes (bytes), the table of their numbers, then scales, codes of
# scales, the numbers of those, zero points and the bias, as cpu.operands.Operands has them. Attributes, by name: flip,
# kind, size, swapped (scales, their codes and zero points then have groups first), width (bits from one code to the
# next, for XLA's own operations). Results: y (M, N) float32, for each strip of columns 1 where a scale is too large;
# scratch: x arranged, or nothing where panels of floats meet it as it lies.


@njit(nogil=True)
def _of_x(frame: Any) -> Any:  # pragma: no cover - compiled
    x, arranged = operand(frame, 0), result(frame, 2)
    return (
        array(x, (dim(x, 0), dim(x, 1)), np.float32),
        array(arranged, (dim(arranged, 0), dim(arranged, 1)), np.float32),
    )


@njit(nogil=True)
def _arrange(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    x, arranged = _of_x(frame)
    last = arranged.shape[0] if stop == x.shape[0] else stop
    table, shifted = operand(frame, 2), dim(operand(frame, 6), 0) > 0
    told = x[start:stop], attribute(frame, 1), attribute(frame, 2)
    numbers = array(table, (dim(table, 0),), np.float32)  # no more than the first of those that have two axes: unread
    arrange_apart((*told, numbers, shifted, arranged[start:last]))


@njit(nogil=True)
def _numbers(table: Any) -> Any:  # pragma: no cover - compiled
    return array(table, (dim(table, 0),), np.float32)


@njit(nogil=True)
def _numbers_in_order(table: Any) -> Any:  # pragma: no cover - compiled
    return array(table, (1, dim(table, 1)), np.float32)


@njit(nogil=True)
def _weight_of(frame: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    """What ``multiply`` is told before the table of numbers, and after it; and x as it lies."""
    x, arranged = _of_x(frame)
    swapped = attribute(frame, 3) != 0
    codes, scale, kept = operand(frame, 1), operand(frame, 3), operand(frame, 4)
    numbers, zero, bias = operand(frame, 5), operand(frame, 6), operand(frame, 7)
    columns = dim(codes, 0)
    y = array(result(frame, 0), (x.shape[0], columns), np.float32)
    told = (
        array(codes, (columns, dim(codes, 1)), np.uint8)[start:stop],
        arranged,
        x.shape[1],
        attribute(frame, 1),
        attribute(frame, 0),
    )
    others = (
        blocks_of(array(scale, (dim(scale, 0), dim(scale, 1)), np.float32), swapped, start, stop),
        blocks_of(array(kept, (dim(kept, 0), dim(kept, 1)), np.uint8), swapped, start, stop),
        array(numbers, (dim(numbers, 0),), np.float32),
        blocks_of(array(zero, (dim(zero, 0), dim(zero, 1)), np.int32), swapped, start, stop),
        attribute(frame, 2),
        array(bias, (columns,), np.float32)[start:stop],
        0,
        y[:, start:stop],
    )
    return told, others, x


@njit(nogil=True)
def _in_registers(told: Any, numbers: Any, others: Any, x: Any) -> Any:  # pragma: no cover - compiled
    return multiply_apart((*told, numbers, *others))


@njit(nogil=True)
def _in_panels(told: Any, numbers: Any, others: Any, x: Any) -> Any:  # pragma: no cover - compiled
    codes, _, inner, kind, flip = told
    scale, kept, of_scales, zero, size, bias, first_row, y = others
    operands = inner, kind, flip, numbers, scale, kept, of_scales, zero, size
    return panels.multiply_apart((codes, x, *operands, first_row, bias, y))


def _multiply(product: Any, numbers: Any) -> Any:
    @njit(nogil=True)
    def multiply(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
        """A chunk of columns, or all where there is one thread: so many at a time that turned scales stay in cache."""
        flags = array(result(frame, 1), (dim(result(frame, 1), 0),), np.int32)
        for first in range(start, stop, AT_ONCE):
            last = min(first + AT_ONCE, stop)
            told, others, x = _weight_of(frame, first, last)
            small = product(told, numbers(operand(frame, 2)), others, x)
            for strip in range(first // STRIP, (last + STRIP - 1) // STRIP):
                flags[strip] = 0 if small else 1

    return address_of(multiply, 3)


_arrange_address = address_of(_arrange, 3)
_multiply_address, _multiply_in_order_address = (_multiply(_in_registers, n) for n in (_numbers, _numbers_in_order))
_in_panels_address, _in_order_in_panels_address = (_multiply(_in_panels, n) for n in (_numbers, _numbers_in_order))


def _handler(version: int, in_order: bool) -> Any:
    """What XLA calls. What numba caches of it is of this ``version`` of the sources."""

    def handler(frame: Any) -> Any:  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        in_panels = dim(result(frame, 2), 0) == 0
        if not in_panels:
            error = parallel_for(frame, _arrange_address(), dim(operand(frame, 0), 0), 64)
            if error != 0:
                return error
        at_once = AT_ONCE if attribute(frame, 3) != 0 else STRIP
        columns = dim(operand(frame, 1), 0)  # a thread's columns lie together, as memory is read ahead in order
        part = max(columns // 16 // at_once, 1) * at_once
        if in_order:
            loops = _in_order_in_panels_address() if in_panels else _multiply_in_order_address()
        else:
            loops = _in_panels_address() if in_panels else _multiply_address()
        return parallel_for(frame, loops, columns, part)

    return handler


# ---- the values. Operands: the codes, the table, scales, codes of scales, the numbers of those and zero points, as
# above. Attributes, by name: flip, inner, kind, size, width. Results: values (N, K) float32, for each row 1 where
# a scale is too large.


@njit(nogil=True)
def _codes_of(frame: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    """What ``dequantize`` is told before the table of numbers, and after it."""
    codes, scale, kept = operand(frame, 0), operand(frame, 2), operand(frame, 3)
    numbers, zero = operand(frame, 4), operand(frame, 5)
    rows, inner = dim(codes, 0), attribute(frame, 1)
    told = array(codes, (rows, dim(codes, 1)), np.uint8)[start:stop], inner, attribute(frame, 2), attribute(frame, 0)
    others = (
        array(scale, (dim(scale, 0), dim(scale, 1)), np.float32),
        array(kept, (dim(kept, 0), dim(kept, 1)), np.uint8),
        array(numbers, (dim(numbers, 0),), np.float32),
        array(zero, (dim(zero, 0), dim(zero, 1)), np.int32),
        attribute(frame, 3),
        start,
        array(result(frame, 0), (rows, inner), np.float32)[start:stop],
    )
    return told, others


def _decode(numbers: Any) -> Any:
    @njit(nogil=True)
    def decode(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
        told, others = _codes_of(frame, start, stop)
        small = dequantize_apart((*told, numbers(operand(frame, 1)), *others))
        array(result(frame, 1), (dim(operand(frame, 0), 0),), np.int32)[start:stop] = 0 if small else 1

    return address_of(decode, 3)


_decode_address, _decode_in_order_address = _decode(_numbers), _decode(_numbers_in_order)


def _handler_of_values(version: int, in_order: bool) -> Any:
    def handler(frame: Any) -> Any:  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        rows, inner, made = dim(operand(frame, 0), 0), attribute(frame, 1), result(frame, 0)
        in_huge_pages(data(made), 4 * rows * inner)
        height = max(CODES_AT_ONCE // inner, 1)
        if in_order:
            return parallel_for(frame, _decode_in_order_address(), rows, height)
        return parallel_for(frame, _decode_address(), rows, height)

    return handler


@functools.cache
def _is_registered(target: str) -> bool:
    """Whether XLA has taken the loops, which are offered to it on the first call."""
    version = version_of(sys.modules[__name__], decoding, panels, turning, ffi, native, pool)
    if target in TARGETS:
        return ffi.register(target, _handler(version, target == TARGETS[1]))
    return ffi.register(target, _handler_of_values(version, target == TARGETS_OF_VALUES[1]))


def register() -> bool:
    """Offer XLA all of these loops, before it asks; whether it has taken them."""
    taken = [_is_registered(target) for target in (*TARGETS, *TARGETS_OF_VALUES)]
    return all(taken)


# ---- what JAX sees


def _plain(
    x: Array, codes: Array, table: Array, scale: Array, kept: Array, numbers: Array, zero: Array, bias: Array,
    *, flip: int, kind: int, size: int, swapped: bool, width: int,
) -> list[Array]:  # fmt: skip
    """The same in XLA's own operations."""
    if swapped:
        scale, kept, zero = scale.T, kept.T, zero.T
    of_weight = codes, table, scale, kept, numbers, zero
    values, unserved = _plain_values(*of_weight, flip=flip, inner=x.shape[1], kind=kind, size=size, width=width)
    flags, *scratch = _results(x, codes, kind=kind, size=size)[1:]
    flag = jnp.full(flags.shape, jnp.any(unserved != 0), jnp.int32)
    return [x @ values.T + bias, flag, *(jnp.zeros(a.shape, a.dtype) for a in scratch)]


def _plain_values(
    codes: Array, table: Array, scale: Array, kept: Array, numbers: Array, zero: Array,
    *, flip: int, inner: int, kind: int, size: int, width: int,
) -> list[Array]:  # fmt: skip
    return plain_values(codes, table, scale, kept, numbers, zero, flip, inner, kind, size, width)


def plain_values(
    codes: Array, table: Array, scale: Array, kept: Array, numbers: Array, zero: Array, flip: int, inner: int,
    kind: int, size: int, width: int, by_columns: bool = False,
) -> list[Array]:  # fmt: skip
    """The same in XLA's own operations. ``by_columns``: ``size`` codes of a column share a scale, and not of a row."""
    axis, length = (0, len(codes)) if by_columns else (1, inner)

    def spread(groups: Array) -> Array:
        repeated = jnp.repeat(groups, size, axis=axis, total_repeat_length=groups.shape[axis] * size)
        return lax.slice_in_dim(repeated, 0, length, axis=axis)

    if kind == decoding.BYTES:
        values = codes.astype(jnp.float32) - flip
    else:
        patterns = codes if width == 8 else unpack(codes, bits=width, length=inner, signed=False, b=get_backend("jax"))
        values = table.reshape(-1)[patterns.view(jnp.uint8).astype(jnp.int32)]
    if zero.size:
        values = values - spread(zero - flip).astype(jnp.float32)
    scale = numbers[kept.astype(jnp.int32)] if numbers.size else scale
    small = jnp.all((jnp.abs(scale) < 2.0**100) & ((scale != 0) | (numbers.size > 0)))
    values = values * spread(scale)
    return [values, (~small | jnp.isinf(values).any(axis=1)).astype(jnp.int32)]


def _results(x: Any, codes: Any, *_: Any, kind: int, size: int, **others: int) -> list[Any]:
    (rows, inner), columns = x.shape, codes.shape[0]
    in_panels = serve.are_for_panels(rows, columns, inner, panels.WIDTH, panels.depth_of.py_func(inner, size))
    shapes = [
        ((rows, columns), jnp.float32),
        ((-(-columns // STRIP),), jnp.int32),
        ((0, 0) if in_panels else shape_of_arranged(rows, inner, kind), jnp.float32),
    ]
    return [jax.core.ShapedArray(*shape) for shape in shapes]


def _results_of_values(codes: Any, *_: Any, inner: int, **others: int) -> list[Any]:
    rows = codes.shape[0]
    return [jax.core.ShapedArray((rows, inner), jnp.float32), jax.core.ShapedArray((rows,), jnp.int32)]


_bind = tuple(primitive(t, _plain, _results, functools.partial(_is_registered, t)) for t in TARGETS)
_bind_values = tuple(
    primitive(t, _plain_values, _results_of_values, functools.partial(_is_registered, t)) for t in TARGETS_OF_VALUES
)


def product(
    x: Array, w: Coded, bias: Array | None, spec: Spec, packed: bool, swapped: bool = False
) -> tuple[Array, Array]:
    """``reference.matmul_stored`` of a weight (N, K), and whether it has to be done otherwise.

    So it is where a scale is 0, or so large that values might have to be clipped.
    """
    kind, flip, table, *others, size = operands_of(w, spec, x.shape[1], packed, get_backend("jax"), swapped)
    bias = jnp.full(len(w.codes), -0.0, jnp.float32) if bias is None else bias.astype(jnp.float32)
    operands = (x.astype(jnp.float32), w.codes, table, *others, bias)
    width = spec.element.bits if packed else 8
    y, flags, _ = _bind[kind > HALVES](*operands, flip=flip, kind=kind, size=size, swapped=swapped, width=width)
    return y.astype(x.dtype), jnp.any(flags != 0)


def values(w: Coded, spec: Spec, inner: int, packed: bool) -> tuple[Array, Array]:
    """The values (N, ``inner``) of such a weight, groups of any length, and whether they have to be made otherwise."""
    return _values(w.codes, operands_of(w, spec, inner, packed, get_backend("jax")), spec, inner, packed)


def _values(codes: Array, of_weight: Operands, spec: Spec, inner: int, packed: bool) -> tuple[Array, Array]:
    kind, flip, table, *others, size = of_weight
    static = {"flip": flip, "inner": inner, "kind": kind, "size": size, "width": spec.element.bits if packed else 8}
    made, flags = _bind_values[kind > HALVES](codes, table, *others, **static)
    return made, jnp.any(flags != 0)


# ---- all values of an array of any number of axes


def _dequantized(*leaves: Array, spec: Spec, length: int | None, tree: Any) -> Array:
    """``affine.dequantize`` in XLA's own operations, of codes that are packed where there is a ``length``."""
    b = get_backend("jax")
    w = reference.unpacked(jax.tree.unflatten(tree, leaves), spec, length, b)
    return affine.dequantize(w, spec=spec, out="float32", b=b)


def _dequantized_by_loops(*leaves: Array, spec: Spec, length: int | None, tree: Any) -> Array:
    made, unserved = dequantized(jax.tree.unflatten(tree, leaves), spec=spec, length=length)
    return lax.cond(unserved, lambda: _dequantized(*leaves, spec=spec, length=length, tree=tree), lambda: made)


_bind_dequantized = instead_on_cpu("aqt_lite_dequantized", _dequantized, _dequantized_by_loops)


def serves_values(w: Coded, spec: Spec, length: int | None, out: str) -> bool:
    """Whether the loops serve: rows of codes along the last axis, whose scales are of each row, or of all."""
    if not (spec.source.name == out == "float32" and w.codes.ndim > 1):
        return False
    size = spec.block[-1]
    if (size or SHORTEST_GROUP) < SHORTEST_GROUP or (length or w.codes.shape[-1]) < SHORTEST_ROW:
        return False
    packed = length is not None
    if not serve.decodes("float32", w, spec, 1, packed):
        return False
    blocks = jax.tree.leaves((w.scale, w.zero_point))
    if w.codes.ndim == 2:
        return all(a.ndim in (0, 2) for a in blocks)
    leading = w.codes.shape[:-1]
    return all(a.ndim == w.codes.ndim for a in blocks) and (
        all(a.shape[:-1] == leading for a in blocks) or all(set(a.shape[:-1]) == {1} for a in blocks)
    )


def dequantize(w: Coded, spec: Spec, length: int | None) -> Array:
    """``affine.dequantize``, in programs; of codes that are packed, ``length`` along the last axis, or one an item."""
    leaves, tree = jax.tree.flatten(w)
    return _bind_dequantized(*leaves, spec=spec, length=length, tree=tree)


@functools.partial(jax.jit, static_argnames=("spec", "length"))
def dequantized(w: Coded, *, spec: Spec, length: int | None) -> tuple[Array, Array]:
    """The same by loops, and whether it has to be done otherwise."""
    shape, b = w.codes.shape, get_backend("jax")
    inner = shape[-1] if length is None else length
    if len(shape) > 2:
        w = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), w)
        each = len(jax.tree.leaves(w.scale)[0]) > 1
        spec = replace(spec, block=(1 if each else None, spec.block[-1]))
    of_weight, few_bits = operands_of(w, spec, inner, length is not None, b), isinstance(w.scale, tuple)
    if few_bits:
        scale, of_scales = (affine.without_too_small(a, spec, b) for a in (of_weight.scale, of_weight.of_scales))
        of_weight = of_weight._replace(scale=scale, of_scales=of_scales)
    made, unserved = _values(w.codes, of_weight, spec, inner, length is not None)
    if not few_bits:  # on XLA's threads loops, too, take subnormal numbers for 0
        unserved |= jnp.any(jnp.abs(w.scale) < spec.least_to_keep(False))
    return made.reshape(*shape[:-1], inner), unserved
