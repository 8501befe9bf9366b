"""Reproducible products with groups, inside programs that XLA compiles, on a CPU with numba installed.

Owns: the primitive ``group_product`` and what it becomes: on a CPU a call of the compiled loops that NumPy's form
uses, which XLA makes without Python; elsewhere, and in programs that are exported, XLA's own
operations. Imports: the CPU library, the operations, ``ffi``, ``primitives``.
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
from aqt_lite.backends.cpu import groups, native, pool, turning
from aqt_lite.backends.cpu.fixed_point import groups_of, powers_of_two
from aqt_lite.backends.cpu.groups import (
    ROWS_AT_ONCE,
    STRIP,
    multiply_apart,
    prepare_apart,
    refine_apart,
    width_of_rows,
)
from aqt_lite.backends.cpu.native import address_of
from aqt_lite.backends.cpu.turning import blocks_of
from aqt_lite.backends.jax import ffi
from aqt_lite.backends.jax.ffi import OK, array, attribute, describe, dim, operand, parallel_for, result
from aqt_lite.backends.jax.primitives import primitive, version_of
from aqt_lite.elements import FLOAT_TYPES
from aqt_lite.formats import FORMATS
from aqt_lite.ops import reference

__all__ = ["product"]

TARGET = "aqt_lite_group_product"

AT_ONCE = 4 * STRIP
"""Columns whose scales are turned at a time, where their axes are swapped: what goes before the loops takes as long as
some dozens of columns."""

# ---- what XLA calls. Operands: x (M, K) float32, the codes (bytes), then the table of their numbers, scales and zero
# points as cpu.fixed_point.Groups has them, the bias, and powers of two. Attributes, by name: flip, halves, size,
# swapped (scales and zero points then have groups first).
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
def _multiply_strip(frame: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    x, integers, finer, sums, finer_sums, _, row_exponent, row_power, many, wants, bad = _rows(frame)
    codes, table, scale, zero = operand(frame, 1), operand(frame, 2), operand(frame, 3), operand(frame, 4)
    columns, swapped = dim(codes, 0), attribute(frame, 3) != 0
    y = array(result(frame, 0), (x.shape[0], columns), np.float32)
    return multiply_apart((
        array(codes, (columns, dim(codes, 1)), np.uint8)[start:stop],
        attribute(frame, 1) != 0,
        attribute(frame, 0),
        array(table, (dim(table, 0),), np.float32),
        blocks_of(array(scale, (dim(scale, 0), dim(scale, 1)), np.float32), swapped, start, stop),
        blocks_of(array(zero, (dim(zero, 0), dim(zero, 1)), np.int32), swapped, start, stop),
        attribute(frame, 2),
        x.shape[1],
        integers,
        finer,
        sums,
        finer_sums,
        row_exponent,
        row_power,
        many,
        _want_a_second_pass(wants),
        bad,
        _powers(frame),
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


_prepare_address, _refine_address = address_of(_prepare, 3), address_of(_refine, 3)
_multiply_address = address_of(_multiply, 3)


def _handler(version: int) -> Any:
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
        columns = dim(operand(frame, 1), 0)  # a thread's columns lie together, as memory is read ahead in order
        part = max(columns // 16 // AT_ONCE, 1) * AT_ONCE if columns > 16 * STRIP else STRIP
        return parallel_for(frame, _multiply_address(), columns, part)

    return handler


@functools.cache
def is_registered() -> bool:
    """Whether XLA has taken the loops, which are offered to it on the first call."""
    version = version_of(sys.modules[__name__], groups, turning, ffi, native, pool)
    return ffi.register(TARGET, _handler(version))


# ---- what JAX sees


def _plain(
    x: Array, codes: Array, table: Array, scale: Array, zero: Array, bias: Array, _: Array,
    *, flip: int, halves: bool, size: int, swapped: bool,
) -> list[Array]:  # fmt: skip
    """The same in XLA's own operations."""
    if swapped:
        scale, zero = scale.T, zero.T
    if halves:
        positions = jnp.stack([codes & 15, codes >> 4], axis=2).reshape(codes.shape[0], -1)
        codes = table[positions[:, : x.shape[1]].astype(jnp.int32)].astype(jnp.int8)
    spec = Spec(FORMATS[codes.dtype.name], FLOAT_TYPES["float32"], block=(None if scale.shape[0] == 1 else 1, size))
    w = Coded(codes, scale, zero if zero.size else None)
    y = reference.matmul_reproducible(x, w, bias, spec=spec, contract=1, b=get_backend("jax"))
    flags, *scratch = _results(x, codes, flip=flip, halves=halves, size=size, swapped=swapped)[1:]
    unserved = jnp.any((scale == 0) | ~jnp.isfinite(scale))  # the caller has another form for those
    return [y, jnp.full(flags.shape, unserved, jnp.int32), *(jnp.zeros(a.shape, a.dtype) for a in scratch)]


def _results(x: Any, codes: Any, *_: Any, flip: int, halves: bool, size: int, swapped: bool) -> list[Any]:
    (rows, inner), columns = x.shape, codes.shape[0]
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


_bind = primitive(TARGET, _plain, _results, is_registered)


def product(
    x: Array, w: Coded, bias: Array | None, spec: Spec, packed: bool, swapped: bool = False
) -> tuple[Array, Array]:
    """``reference.matmul_reproducible`` of a weight (N, K) in groups, and whether it has to be done otherwise."""
    halves, flip, table, scale, zero, size = groups_of(w, spec, packed, get_backend("jax"), swapped)
    bias = jnp.zeros(len(w.codes), jnp.float32) if bias is None else reference.flushed(bias.astype(jnp.float32), jnp)
    operands = (w.codes, table, scale, zero, bias, powers_of_two())
    static = {"flip": flip, "halves": halves, "size": size, "swapped": swapped}
    parts = [
        _bind(x[first : first + ROWS_AT_ONCE].astype(jnp.float32), *operands, **static)[:2]
        for first in range(0, x.shape[0], ROWS_AT_ONCE)
    ]
    y, flags = (jnp.concatenate(found) for found in zip(*parts, strict=True))
    return y.astype(x.dtype), jnp.any(flags != 0)
