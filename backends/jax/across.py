"""Exact products with weights (in, out) of a byte a code inside programs that XLA compiles, on a CPU with numba.

Owns: the primitive ``exact_in_out_product``, and what it becomes: on a CPU a call of the compiled loops that NumPy's
form uses, which XLA makes without Python; elsewhere, and in programs that are exported, the reference in XLA's own
operations. The bits are the same. Imports: the CPU library, the operations, ``ffi``, ``primitives``.
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
from aqt_lite.backends.cpu import across, decoding, dots, native, pool
from aqt_lite.backends.cpu.across import (
    STRIP,
    add_across_apart,
    finish_apart,
    prepare_apart,
    refine_apart,
    words_of,
)
from aqt_lite.backends.cpu.dots import DIGITS
from aqt_lite.backends.cpu.fixed_point import powers_of_two, shares_of_rows
from aqt_lite.backends.cpu.native import address_of, in_huge_pages
from aqt_lite.backends.cpu.rows import turned_over
from aqt_lite.backends.jax import ffi
from aqt_lite.backends.jax.ffi import OK, array, attribute, data, describe, dim, operand, parallel_for, result
from aqt_lite.backends.jax.primitives import primitive, version_of
from aqt_lite.elements import FLOAT_TYPES
from aqt_lite.formats import FORMATS
from aqt_lite.ops import reference

__all__ = ["product", "register"]

TARGET = "aqt_lite_exact_in_out_product"

# ---- what XLA calls. Operands: x (M, K) float32, w (K, N) of bytes, then for each column of the result the significand
# of its scale, the exponent, the zero point of signed bytes and the bias, and the table of powers of two. Attributes,
# by name: each (rows of the weight with sums of their own) and flip. Results: y (M, N) float32; then scratch outputs:
# the rows' exponents, their sums and flags, the sums of second passes, how many rows of digits there are, these, and
# the sums of each part of the weight's rows.


@njit(nogil=True)
def _of_rows(frame: Any) -> Any:  # pragma: no cover - compiled
    """What becomes of the rows of x: exponents, sums, flags, sums of second passes, how many digits, digits."""
    rows, digits = dim(operand(frame, 0), 0), result(frame, 6)
    return (
        array(result(frame, 1), (rows,), np.int32),
        array(result(frame, 2), (rows,), np.int64),
        array(result(frame, 3), (rows,), np.int32),
        array(result(frame, 4), (rows,), np.int64),
        array(result(frame, 5), (1,), np.int32),
        array(digits, (dim(digits, 0), dim(digits, 1), dim(digits, 2)), np.uint32),
    )


@njit(nogil=True)
def _x_and_powers(frame: Any) -> Any:  # pragma: no cover - compiled
    x = operand(frame, 0)
    return array(x, (dim(x, 0), dim(x, 1)), np.float32), array(operand(frame, 6), (512,), np.float32)


@njit(nogil=True)
def _prepare(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    x, powers = _x_and_powers(frame)
    exponent, total, flags, _, _, digits = _of_rows(frame)
    these = slice(start, stop)
    prepare_apart((x[these], powers, exponent[these], total[these], flags[these], digits[these]))


@njit(nogil=True)
def _refine(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """All rows that want a second pass, one after the other."""
    x, powers = _x_and_powers(frame)
    exponent, _, flags, finer_total, wanted, digits = _of_rows(frame)
    rows = x.shape[0]
    wanted[0] = rows + refine_apart((x, powers, exponent, flags, finer_total, digits[rows:]))


@njit(nogil=True)
def _sums(frame: Any) -> Any:  # pragma: no cover - compiled
    sums = result(frame, 7)
    return array(sums, (dim(sums, 0), dim(sums, 1), dim(sums, 2), dim(sums, 3)), np.int32)


@njit(nogil=True)
def _multiply(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """Some parts of the weight's rows."""
    w, each = operand(frame, 1), attribute(frame, 0)
    codes, (_, _, _, _, wanted, digits), sums = (
        array(w, (dim(w, 0), dim(w, 1)), np.uint8),
        _of_rows(frame),
        _sums(frame),
    )
    these = digits[: wanted[0]]
    for part in range(start, stop):
        first = part * each
        last = min(first + each, codes.shape[0])
        add_across_apart((codes, attribute(frame, 1), these, first, last, sums[part][: wanted[0]]))


@njit(nogil=True)
def _finish(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """Some columns of the result."""
    exponent, total, flags, finer_total, _, _ = _of_rows(frame)
    columns = dim(operand(frame, 1), 1)
    finish_apart((
        _sums(frame),
        exponent,
        total,
        flags,
        finer_total,
        array(operand(frame, 2), (columns,), np.float32),
        array(operand(frame, 3), (columns,), np.int32),
        array(operand(frame, 4), (columns,), np.int32),
        array(operand(frame, 5), (columns,), np.float32),
        array(operand(frame, 6), (512,), np.float32),
        start,
        stop,
        array(result(frame, 0), (exponent.shape[0], columns), np.float32),
    ))  # fmt: skip


_prepare_address, _refine_address = address_of(_prepare, 3), address_of(_refine, 3)
_multiply_address, _finish_address = address_of(_multiply, 3), address_of(_finish, 3)


def _handler(version: int) -> Any:
    """What XLA calls. What numba caches of it is of this ``version`` of the sources."""

    def handler(frame: Any) -> Any:  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        sums = result(frame, 7)
        in_huge_pages(data(sums), 4 * dim(sums, 0) * dim(sums, 1) * dim(sums, 2) * dim(sums, 3))
        error = parallel_for(frame, _prepare_address(), dim(operand(frame, 0), 0), 1)
        if error == 0:
            error = parallel_for(frame, _refine_address(), 1, 1)
        if error == 0:
            error = parallel_for(frame, _multiply_address(), dim(sums, 0), 1)
        return error if error != 0 else parallel_for(frame, _finish_address(), dim(operand(frame, 1), 1), STRIP)

    return handler


@functools.cache
def register() -> bool:
    """Offer XLA these loops, before it asks; whether it has taken them."""
    version = version_of(sys.modules[__name__], across, dots, decoding, ffi, native, pool)
    return ffi.register(TARGET, _handler(version))


# ---- what JAX sees


def _plain(
    x: Array, w: Array, fraction: Array, exponent: Array, zero: Array, bias: Array, _: Array, *, each: int, flip: int
) -> list[Array]:
    """The same in XLA's own operations."""
    b = get_backend("jax")
    half = exponent >> 1  # in two steps: a scale may be smaller than the smallest power that there is
    scale = (fraction * b.power_of_two(half) * b.power_of_two(exponent - half))[None]
    spec = Spec(FORMATS[w.dtype.name], FLOAT_TYPES["float32"], block=(None, 1))
    y = reference.matmul_reproducible(x, Coded(w, scale, zero[None] + (128 - flip)), bias, spec=spec, contract=0, b=b)
    return [y, *(jnp.zeros(a.shape, a.dtype) for a in _results(x, w, each=each, flip=flip)[1:])]


def _results(x: Any, w: Any, *_: Any, each: int, flip: int) -> list[Any]:
    (rows, inner), columns = x.shape, w.shape[1]
    shapes = [
        ((rows, columns), jnp.float32),
        ((rows,), jnp.int32),
        ((rows, 2), jnp.int32),  # an int64 each, which JAX does not always have
        ((rows,), jnp.int32),
        ((rows, 2), jnp.int32),
        ((1,), jnp.int32),
        ((2 * rows, -(-inner // 4), DIGITS), jnp.uint32),
        ((-(-inner // each), 2 * rows, DIGITS, words_of(columns)), jnp.int32),
    ]
    return [jax.core.ShapedArray(*shape) for shape in shapes]


_bind = primitive(TARGET, _plain, _results, register)


def product(x: Array, w: Coded, bias: Array | None, spec: Spec) -> Array:
    """``reference.matmul_reproducible`` of a weight (K, N) in one piece."""
    b, (length, columns) = get_backend("jax"), w.codes.shape
    own, plain = turned_over(w, spec, b)  # of whose codes the shape alone is asked for
    fraction, exponent, zero, bias = reference.of_columns(own, bias, spec=plain, b=b)
    _, each = shares_of_rows(length, columns)
    flip = 128 * (w.codes.dtype == jnp.int8)
    operands = (x.astype(jnp.float32), w.codes, fraction, exponent, zero, bias, powers_of_two())
    return _bind(*operands, each=each, flip=int(flip))[0].astype(x.dtype)
