"""Products with weights that lie (in, out) inside programs that XLA compiles, on a CPU with numba.

Owns: the primitive ``in_out_product``, and what it becomes: on a CPU a call of the compiled loops that NumPy's form
uses, which XLA makes without Python; elsewhere, and in programs that are exported, XLA's own operations. Imports: the
CPU library, ``ffi``, ``primitives``, and ``decoding``, for values in XLA's operations.
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
from aqt_lite.backends.cpu import decoding, in_out, native, outer, pool
from aqt_lite.backends.cpu.native import address_of, in_huge_pages
from aqt_lite.backends.cpu.outer import add_few_apart, add_many_apart, add_up, width_of_sums
from aqt_lite.backends.jax import ffi
from aqt_lite.backends.jax.decoding import plain_values
from aqt_lite.backends.jax.ffi import OK, array, attribute, data, describe, dim, operand, parallel_for, result
from aqt_lite.backends.jax.primitives import primitive, version_of

__all__ = ["product", "register"]

TARGETS = "aqt_lite_in_out_product", "aqt_lite_in_out_product_in_order"
"""Of kinds up to ``HALVES``, and of the others, whose loops are compiled where such a kind is used."""

# ---- what XLA calls. Operands: x (M, K) float32, the codes (bytes) of the weight (K, N), the table of their numbers,
# then scales, codes of scales, the numbers of those, zero points and the bias, as cpu.operands.Operands has them.
# Attributes, by name: by_columns (columns have scales of their own), each (rows of the weight with sums of their own),
# few (numbers are made in registers), flip, kind, size, width (bits from one code to the next, for XLA's own
# operations). Results: y (M, N) float32, for each part of the rows 1 where a scale is too large; scratch: sums.


@njit(nogil=True)
def _sums(frame: Any) -> Any:  # pragma: no cover - compiled
    sums = result(frame, 2)
    return array(sums, (dim(sums, 0), dim(sums, 1), dim(sums, 2)), np.float32)


@njit(nogil=True)
def _weight_of(frame: Any) -> Any:  # pragma: no cover - compiled
    """What the loops are told before the table of numbers, and after it, but for the part."""
    x, codes, scale, kept = operand(frame, 0), operand(frame, 1), operand(frame, 3), operand(frame, 4)
    numbers, zero = operand(frame, 5), operand(frame, 6)
    told = (
        array(codes, (dim(codes, 0), dim(codes, 1)), np.uint8),
        array(x, (dim(x, 0), dim(x, 1)), np.float32),
        dim(result(frame, 0), 1),
        attribute(frame, 4),
        attribute(frame, 3),
    )
    others = (
        array(scale, (dim(scale, 0), dim(scale, 1)), np.float32),
        array(kept, (dim(kept, 0), dim(kept, 1)), np.uint8),
        array(numbers, (dim(numbers, 0),), np.float32),
        array(zero, (dim(zero, 0), dim(zero, 1)), np.int32),
        attribute(frame, 5),
        attribute(frame, 0) != 0,
    )
    return told, others


@njit(nogil=True)
def _bounds(frame: Any, part: Any) -> Any:  # pragma: no cover - compiled
    each, length = attribute(frame, 1), dim(operand(frame, 1), 0)
    return part * each, min((part + 1) * each, length)


@njit(nogil=True)
def _multiply(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """Some parts of the rows of codes whose table has one axis."""
    told, others = _weight_of(frame)
    table, sums = operand(frame, 2), _sums(frame)
    flags = array(result(frame, 1), (sums.shape[0],), np.int32)
    numbers = array(table, (dim(table, 0),), np.float32)
    for part in range(start, stop):
        sums[part] = 0
        given = (*told, numbers, *others, *_bounds(frame, part), sums[part])
        small = add_few_apart(given) if attribute(frame, 2) != 0 else add_many_apart(given)
        flags[part] = 0 if small else 1


@njit(nogil=True)
def _multiply_in_order(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """The same of codes whose table has two axes."""
    told, others = _weight_of(frame)
    table, sums = operand(frame, 2), _sums(frame)
    flags = array(result(frame, 1), (sums.shape[0],), np.int32)
    numbers = array(table, (1, dim(table, 1)), np.float32)
    for part in range(start, stop):
        sums[part] = 0
        small = add_many_apart((*told, numbers, *others, *_bounds(frame, part), sums[part]))
        flags[part] = 0 if small else 1


@njit(nogil=True)
def _add_up(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """Some rows of the result."""
    columns, sums = dim(result(frame, 0), 1), _sums(frame)
    y, bias = array(result(frame, 0), (sums.shape[1], columns), np.float32), operand(frame, 7)
    add_up(
        sums, start, attribute(frame, 4), attribute(frame, 2) != 0, array(bias, (columns,), np.float32), y[start:stop]
    )


_multiply_address, _multiply_in_order_address = address_of(_multiply, 3), address_of(_multiply_in_order, 3)
_add_up_address = address_of(_add_up, 3)


def _handler(version: int, in_order: bool) -> Any:
    """What XLA calls. What numba caches of it is of this ``version`` of the sources."""

    def handler(frame: Any) -> Any:  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        parts, sums = dim(result(frame, 1), 0), result(frame, 2)
        in_huge_pages(data(sums), 4 * parts * dim(sums, 1) * dim(sums, 2))
        if in_order:
            error = parallel_for(frame, _multiply_in_order_address(), parts, 1)
        else:
            error = parallel_for(frame, _multiply_address(), parts, 1)
        if error != 0:
            return error
        return parallel_for(frame, _add_up_address(), dim(operand(frame, 0), 0), 1)

    return handler


@functools.cache
def _is_registered(target: str) -> bool:
    """Whether XLA has taken the loops, which are offered to it on the first call."""
    version = version_of(sys.modules[__name__], outer, decoding, ffi, native, pool)
    return ffi.register(target, _handler(version, target == TARGETS[1]))


def register() -> bool:
    """Offer XLA these loops, before it asks; whether it has taken them."""
    taken = [_is_registered(target) for target in TARGETS]
    return all(taken)


# ---- what JAX sees


def _plain(
    x: Array, codes: Array, table: Array, scale: Array, kept: Array, numbers: Array, zero: Array, bias: Array,
    *, by_columns: int, each: int, few: int, flip: int, kind: int, size: int, width: int,
) -> list[Array]:  # fmt: skip
    """The same in XLA's own operations."""
    of_weight = codes, table, scale, kept, numbers, zero
    values, unserved = plain_values(*of_weight, flip, len(bias), kind, size, width, bool(by_columns))
    _, flags, scratch = _results(x, codes, *of_weight[1:], bias, each=each)
    flag = jnp.full(flags.shape, jnp.any(unserved != 0), jnp.int32)
    return [x @ values + bias, flag, jnp.zeros(scratch.shape, scratch.dtype)]


def _results(x: Any, codes: Any, *others: Any, each: int, **told: int) -> list[Any]:
    rows, columns, parts = x.shape[0], others[-1].shape[0], -(-codes.shape[0] // each)
    shapes = (rows, columns), (parts,), (parts, rows, width_of_sums(columns))
    return [jax.core.ShapedArray(*of) for of in zip(shapes, (jnp.float32, jnp.int32, jnp.float32), strict=True)]


_bind = tuple(primitive(t, _plain, _results, functools.partial(_is_registered, t)) for t in TARGETS)


def product(x: Array, w: Coded, bias: Array | None, spec: Spec, columns: int, packed: bool) -> tuple[Array, Array]:
    """``reference.matmul_stored`` of a weight (K, ``columns``), and whether it has to be done otherwise.

    So it is where a scale is 0, or so large that values might have to be clipped.
    """
    of_weight = in_out.operands_of_rows(w, spec, columns, packed, get_backend("jax"))
    kind, flip, table, *others, size = of_weight
    by_columns = in_out.has_columns(spec)
    few = in_out.are_few(len(x), of_weight, by_columns)
    _, each = in_out.parts_of_rows(len(w.codes), len(x), columns, width_of_sums(columns))
    bias = jnp.full(columns, -0.0, jnp.float32) if bias is None else bias.astype(jnp.float32)
    static = {"by_columns": int(by_columns), "each": each, "few": int(few), "flip": flip, "kind": kind, "size": size}
    width = spec.element.bits if packed else 8
    operands = (x.astype(jnp.float32), w.codes, table, *others, bias)
    y, flags, _ = _bind[kind > decoding.HALVES](*operands, **static, width=width)
    return y.astype(x.dtype), jnp.any(flags != 0)
