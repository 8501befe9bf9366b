"""Reproducible products with groups, inside programs that XLA compiles, on a CPU with numba installed.

Owns: the primitives ``group_product``, of weights (out, in), and ``group_product_in_out``, of others, and what they
become: on a CPU a call of the compiled loops that NumPy's forms use, which XLA makes without Python; elsewhere, and in
programs that are exported, XLA's own operations. Imports: the CPU library, the operations, ``ffi``, ``primitives``.
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
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import groups, native, pool, strips, turning
from aqt_lite.backends.cpu.fixed_point import Groups, groups_of, powers_of_two
from aqt_lite.backends.cpu.groups import (
    ROWS_AT_ONCE,
    STRIP,
    multiply_apart,
    prepare_apart,
    refine_apart,
    width_of_rows,
)
from aqt_lite.backends.cpu.native import address_of
from aqt_lite.backends.cpu.strips import multiply_columns_apart
from aqt_lite.backends.cpu.turning import blocks_of
from aqt_lite.backends.jax import ffi
from aqt_lite.backends.jax.ffi import OK, array, attribute, describe, dim, operand, parallel_for, result
from aqt_lite.backends.jax.primitives import primitive, version_of
from aqt_lite.elements import FLOAT_TYPES
from aqt_lite.formats import FORMATS
from aqt_lite.ops import reference

__all__ = ["product", "product_of_columns", "register"]

TARGETS = "aqt_lite_group_product", "aqt_lite_group_product_in_out"

AT_ONCE = 4 * STRIP
"""Columns whose scales are turned at a time, where their axes are swapped: what goes before the loops takes as long as
some dozens of columns."""

# ---- what XLA calls. Operands: x (M, K) float32, the codes (bytes), then the table of their numbers, scales and zero
# points as cpu.fixed_point.Groups has them, the bias, and powers of two. Attributes, by name: flip, halves, size,
# swapped (scales and zero points then have groups first); of a weight (in, out), where that is so, also two_a_byte,
# whether codes are halves of bytes, as which halves says what order digits of x have.
# Results: y (M, N) float32, and for each strip of columns 1 where it is not served; scratch: what rows of x become, of
# whose words two make a float64, which JAX does not always have.


@njit(nogil=True)
def _rows(frame: Any) -> Any:  # pragma: no cover - compiled
    """Rows of x and what they become: integers, finer, sums, finer sums, exponents, those of rows, powers, flags."""
    x = operand(frame, 0)
    m, width, pieces = dim(x, 0), dim(result(frame, 2), 1) // 2, dim(result(frame, 6), 1)
    return (
        array(x, (m, dim(x, 1)), np.float32),
        array(result(frame, 2), (m, width), np.float64),
        array(result(frame, 3), (m, width), np.float64),
        array(result(frame, 4), (m, pieces), np.float64),
        array(result(frame, 5), (m, pieces), np.float64),
        array(result(frame, 6), (m, pieces), np.int32),
        array(result(frame, 7), (m,), np.int32),
        array(result(frame, 8), (m, pieces), np.float32),
        array(result(frame, 9), (m, pieces), np.uint8),
        array(result(frame, 10), (m,), np.uint8),
        array(result(frame, 11), (m,), np.uint8),
    )


@njit(nogil=True)
def _powers(frame: Any) -> Any:  # pragma: no cover - compiled
    return array(operand(frame, 6), (dim(operand(frame, 6), 0),), np.float32)


@njit(nogil=True)
def _want_a_second_pass(wants: Any) -> Any:  # pragma: no cover - compiled
    found = np.uint8(0)
    for m in range(wants.shape[0]):
        found |= wants[m]
    return found != 0


@njit(nogil=True)
def _prepare(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    x, integers, _, sums, _, exponent, row_exponent, row_power, many, wants, bad = _rows(frame)
    rows = slice(start, stop)
    prepare_apart((
        x[rows], attribute(frame, 2), attribute(frame, 1) != 0, _powers(frame), integers[rows], sums[rows],
        exponent[rows], row_exponent[rows], row_power[rows], many[rows], wants[rows], bad[rows],
    ))  # fmt: skip


@njit(nogil=True)
def _refine(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    x, _, finer, _, finer_sums, exponent, _, _, many, wants, _ = _rows(frame)
    rows = slice(start, stop)
    if _want_a_second_pass(wants):
        refine_apart((
            x[rows], attribute(frame, 2), attribute(frame, 1) != 0, _powers(frame), exponent[rows], many[rows],
            finer[rows], finer_sums[rows],
        ))  # fmt: skip


@njit(nogil=True)
def _of_rows(frame: Any) -> Any:  # pragma: no cover - compiled
    """What the loops take of rows of x, from the length of a group on to the powers of two."""
    x, integers, finer, sums, finer_sums, _, row_exponent, row_power, many, wants, bad = _rows(frame)
    again = _want_a_second_pass(wants)
    return (
        attribute(frame, 2), x.shape[1], integers, finer, sums, finer_sums, row_exponent, row_power, many, again, bad,
        _powers(frame),
    )  # fmt: skip


@njit(nogil=True)
def _multiply_strip(frame: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    codes, table, scale, zero = operand(frame, 1), operand(frame, 2), operand(frame, 3), operand(frame, 4)
    columns, swapped = dim(codes, 0), attribute(frame, 3) != 0
    y = array(result(frame, 0), (dim(result(frame, 0), 0), columns), np.float32)
    return multiply_apart((
        array(codes, (columns, dim(codes, 1)), np.uint8)[start:stop],
        attribute(frame, 1) != 0,
        attribute(frame, 0),
        array(table, (dim(table, 0),), np.float32),
        blocks_of(array(scale, (dim(scale, 0), dim(scale, 1)), np.float32), swapped, start, stop),
        blocks_of(array(zero, (dim(zero, 0), dim(zero, 1)), np.int32), swapped, start, stop),
        *_of_rows(frame),
        array(operand(frame, 5), (columns,), np.float32)[start:stop],
        0,
        y[:, start:stop],
    ))  # fmt: skip


@njit(nogil=True)
def _multiply(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    flags = array(result(frame, 1), (dim(result(frame, 1), 0),), np.int32)
    at_once = AT_ONCE if attribute(frame, 3) != 0 else stop - start
    for first in range(start, stop, at_once):
        last = min(first + at_once, stop)
        unserved = 0 if _multiply_strip(frame, first, last) else 1
        flags[first // STRIP : (last + STRIP - 1) // STRIP] = unserved


@njit(nogil=True)
def _multiply_columns(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """The same of a weight (in, out)."""
    codes, table, scale, zero = operand(frame, 1), operand(frame, 2), operand(frame, 3), operand(frame, 4)
    rows, columns = dim(result(frame, 0), 0), dim(result(frame, 0), 1)
    served = multiply_columns_apart((
        array(codes, (dim(codes, 0), dim(codes, 1)), np.uint8),
        attribute(frame, 4) != 0,
        attribute(frame, 0),
        array(table, (dim(table, 0),), np.float32),
        array(scale, (dim(scale, 0), dim(scale, 1)), np.float32),
        array(zero, (dim(zero, 0), dim(zero, 1)), np.int32),
        *_of_rows(frame),
        array(operand(frame, 5), (columns,), np.float32),
        start,
        stop,
        array(result(frame, 0), (rows, columns), np.float32),
    ))  # fmt: skip
    flags = array(result(frame, 1), (dim(result(frame, 1), 0),), np.int32)
    flags[start // STRIP : (stop + STRIP - 1) // STRIP] = 0 if served else 1


_prepare_address, _refine_address = address_of(_prepare, 3), address_of(_refine, 3)
_multiply_address, _multiply_columns_address = address_of(_multiply, 3), address_of(_multiply_columns, 3)


def _handler(version: int, in_out: bool) -> Any:
    """What XLA calls. What numba caches of it is of this ``version`` of the sources."""

    def handler(frame: Any) -> Any:  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        rows = dim(operand(frame, 0), 0)
        error = parallel_for(frame, _prepare_address(), rows, 16)
        if error == 0:
            error = parallel_for(frame, _refine_address(), rows, 16)
        if error != 0:
            return error
        if in_out:
            columns = dim(result(frame, 0), 1)
            part = strips.STRIP if columns >= 8 * strips.STRIP else strips.PART
            return parallel_for(frame, _multiply_columns_address(), columns, part)
        columns = dim(operand(frame, 1), 0)  # a thread's columns lie together, as memory is read ahead in order
        part = max(columns // 16 // AT_ONCE, 1) * AT_ONCE if columns > 16 * STRIP else STRIP
        return parallel_for(frame, _multiply_address(), columns, part)

    return handler


@functools.cache
def _is_registered(target: str) -> bool:
    """Whether XLA has taken the loops, which are offered to it on the first call."""
    version = version_of(sys.modules[__name__], groups, strips, turning, ffi, native, pool)
    return ffi.register(target, _handler(version, target == TARGETS[1]))


def register() -> bool:
    """Offer XLA these loops, before it asks; whether it has taken them."""
    offered = TARGETS if groups.DOTS else TARGETS[:1]
    taken = [_is_registered(target) for target in offered]
    return all(taken)


# ---- what JAX sees


def _plain(
    x: Array, codes: Array, table: Array, scale: Array, zero: Array, bias: Array, _: Array,
    *, flip: int, halves: bool, size: int, swapped: bool, two_a_byte: bool | None = None,
) -> list[Array]:  # fmt: skip
    """The same in XLA's own operations."""
    in_out, length = two_a_byte is not None, x.shape[1]
    if swapped:
        scale, zero = scale.T, zero.T
    if two_a_byte or halves:
        positions = jnp.stack([codes & 15, codes >> 4], axis=2).reshape(codes.shape[0], -1)
        codes = table[positions[:, : len(bias) if in_out else length].astype(jnp.int32)].astype(jnp.int8)
    if in_out:
        codes = codes.T
    spec = Spec(FORMATS[codes.dtype.name], FLOAT_TYPES["float32"], block=(None if scale.shape[0] == 1 else 1, size))
    w = Coded(codes, scale, zero if zero.size else None)
    y = reference.matmul_reproducible(x, w, bias, spec=spec, contract=1, b=get_backend("jax"))
    flags, *scratch = _results(x, codes, table, scale, zero, bias, _, halves=halves, size=size)[1:]
    unserved = jnp.any((scale == 0) | ~jnp.isfinite(scale))  # the caller has another form for those
    return [y, jnp.full(flags.shape, unserved, jnp.int32), *(jnp.zeros(a.shape, a.dtype) for a in scratch)]


def _results(x: Any, *others: Any, halves: bool, size: int, **told: Any) -> list[Any]:
    (rows, inner), columns = x.shape, others[4].shape[0]
    pieces, width = -(-inner // size), width_of_rows(inner, halves)
    shapes = [
        ((rows, columns), jnp.float32),
        ((-(-columns // STRIP),), jnp.int32),
        ((rows, 2 * width), jnp.uint32),
        ((rows, 2 * width), jnp.uint32),
        ((rows, 2 * pieces), jnp.uint32),
        ((rows, 2 * pieces), jnp.uint32),
        ((rows, pieces), jnp.int32),
        ((rows,), jnp.int32),
        ((rows, pieces), jnp.float32),
        ((rows, pieces), jnp.uint8),
        ((rows,), jnp.uint8),
        ((rows,), jnp.uint8),
    ]
    return [jax.core.ShapedArray(*shape) for shape in shapes]


_bind, _bind_in_out = (primitive(t, _plain, _results, functools.partial(_is_registered, t)) for t in TARGETS)


def product(
    x: Array, w: Coded, bias: Array | None, spec: Spec, packed: bool, swapped: bool = False
) -> tuple[Array, Array]:
    """``reference.matmul_reproducible`` of a weight (N, K) in groups, and whether it has to be done otherwise."""
    of_weight = groups_of(w, spec, packed, get_backend("jax"), swapped)
    static = {"flip": of_weight.flip, "halves": of_weight.halves, "size": of_weight.size, "swapped": swapped}
    return _product(_bind, x, w.codes, of_weight, bias, len(w.codes), static)


def product_of_columns(
    x: Array, codes: Array, w: Coded, bias: Array | None, spec: Spec, packed: bool
) -> tuple[Array, Array]:
    """The same of a weight (K, N) with these codes; ``w`` and ``spec`` are of it as ``rows_of_columns`` has it."""
    of_weight = groups_of(w, spec, packed, get_backend("jax"), swapped=True)
    static = {"flip": of_weight.flip, "halves": False, "size": of_weight.size, "swapped": True}
    return _product(_bind_in_out, x, codes, of_weight, bias, len(w.codes), {**static, "two_a_byte": packed})


def _product(
    bind: Any, x: Array, codes: Array, of_weight: Groups, bias: Array | None, columns: int, static: dict[str, Any]
) -> tuple[Array, Array]:
    bias = jnp.zeros(columns, jnp.float32) if bias is None else reference.flushed(bias.astype(jnp.float32), jnp)
    operands = (codes, of_weight.table, of_weight.scale, of_weight.zero, bias, powers_of_two())
    parts = [
        bind(x[first : first + ROWS_AT_ONCE].astype(jnp.float32), *operands, **static)[:2]
        for first in range(0, x.shape[0], ROWS_AT_ONCE)
    ]
    y, flags = (jnp.concatenate(found) for found in zip(*parts, strict=True))
    return y.astype(x.dtype), jnp.any(flags != 0)
