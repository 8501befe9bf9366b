"""The processor's int8 dot products inside programs that XLA compiles, on a CPU with numba installed.

Owns: the primitive ``fixed_point_product`` and what it becomes: on a CPU a call of the compiled loops that NumPy's
kernel uses, which XLA makes without Python; elsewhere, and in programs that are exported, the
reference in XLA's own operations. The bits are the same.
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
from aqt_lite.backends.cpu import dots, native, pool
from aqt_lite.backends.cpu.dots import (
    DIGITS,
    NOT_FINITE,
    OUT_OF_RANGE,
    STRIP,
    finish_columns_apart,
    parts_of_rows,
    prepare_rows_apart,
    refine_rows_apart,
    shape_of_panels,
)
from aqt_lite.backends.cpu.fixed_point import powers_of_two
from aqt_lite.backends.cpu.native import address_of
from aqt_lite.backends.jax import ffi
from aqt_lite.backends.jax.ffi import OK, array, attribute, describe, dim, operand, parallel_for, result
from aqt_lite.backends.jax.primitives import primitive, version_of
from aqt_lite.elements import FLOAT_TYPES
from aqt_lite.formats import FORMATS
from aqt_lite.ops import reference

__all__ = ["is_registered", "product"]

TARGET = "aqt_lite_fixed_point_product"

# ---- what XLA calls. Operands: x (M, K) float32, w (N, K) of bytes, then for each column of the result the significand
# of its scale, the exponent, the zero point and the bias, and the table of powers of two. Attributes, by name: twice
# (whether rows that want a second pass get it) and unsigned. Results: y (M, N) float32 and the flags of each row; then
# scratch outputs: the rows' exponents, their sums, their panels and what no panel holds, and the last three once more
# for a second pass, empty where there is none.


@njit(nogil=True)
def _of_rows(frame: Any) -> Any:  # pragma: no cover - compiled
    """What becomes of the rows of x: panels, or the integers of one row, exponents, sums and flags."""
    rows, panels, one = dim(result(frame, 0), 0), result(frame, 4), result(frame, 5)
    return (
        array(panels, (dim(panels, 0), dim(panels, 1), dim(panels, 2)), np.uint32),
        array(one, (dim(one, 0), dim(one, 1)), np.int32),
        array(result(frame, 2), (rows,), np.int32),
        array(result(frame, 3), (rows,), np.int64),
        array(result(frame, 1), (rows,), np.int32),
    )


@njit(nogil=True)
def _of_finer(frame: Any) -> Any:  # pragma: no cover - compiled
    """The same for a second pass: panels, or integers, and sums."""
    total, panels, one = result(frame, 6), result(frame, 7), result(frame, 8)
    return (
        array(panels, (dim(panels, 0), dim(panels, 1), dim(panels, 2)), np.uint32),
        array(one, (dim(one, 0), dim(one, 1)), np.int32),
        array(total, (dim(total, 0),), np.int64),
    )


@njit(nogil=True)
def _prepare(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    panels, one, exponent, total, flags = _of_rows(frame)
    x = array(operand(frame, 0), (dim(operand(frame, 0), 0), dim(operand(frame, 0), 1)), np.float32)
    height, powers = max(1, panels.shape[2] // DIGITS), array(operand(frame, 6), (512,), np.float32)
    these, of_these = slice(start, stop), panels[start // height : (stop + height - 1) // height]
    prepare_rows_apart((x[these], powers, exponent[these], total[these], flags[these], of_these, one))
    if attribute(frame, 0) != 0:
        panels, one, total = _of_finer(frame)
        of_these = panels[start // height : (stop + height - 1) // height]
        refine_rows_apart((x[these], powers, exponent[these], flags[these], total[these], of_these, one))


@njit(nogil=True)
def _finish(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    panels, one, row_exponent, total, flags = _of_rows(frame)
    finer, finer_one, finer_total = _of_finer(frame)
    columns, inner = dim(operand(frame, 1), 0), dim(operand(frame, 1), 1)
    y = array(result(frame, 0), (dim(result(frame, 0), 0), columns), np.float32)
    finish_columns_apart((
        array(operand(frame, 1), (columns, inner), np.int8)[start:stop],
        attribute(frame, 1) != 0,
        panels,
        one,
        row_exponent,
        total,
        flags,
        finer,
        finer_one,
        finer_total,
        array(operand(frame, 2), (columns,), np.float32)[start:stop],
        array(operand(frame, 3), (columns,), np.int32)[start:stop],
        array(operand(frame, 4), (columns,), np.int32)[start:stop],
        array(operand(frame, 5), (columns,), np.float32)[start:stop],
        array(operand(frame, 6), (512,), np.float32),
        y[:, start:stop],
    ))  # fmt: skip


_prepare_address, _finish_address = address_of(_prepare, 3), address_of(_finish, 3)


def _handler(version: int) -> Any:
    """What XLA calls. What numba caches of it is of this ``version`` of the sources."""

    def handler(frame: Any) -> Any:  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        rows, columns = dim(operand(frame, 0), 0), dim(operand(frame, 1), 0)
        error = parallel_for(frame, _prepare_address(), rows, max(1, dim(result(frame, 4), 2) // DIGITS))
        return error if error != 0 else parallel_for(frame, _finish_address(), columns, STRIP)

    return handler


@functools.cache
def is_registered() -> bool:
    """Whether XLA has taken the loops, which are offered to it on the first call."""
    version = version_of(sys.modules[__name__], dots, ffi, native, pool)
    return ffi.register(TARGET, _handler(version))


# ---- what JAX sees


def _plain(
    x: Array,
    w: Array,
    fraction: Array,
    exponent: Array,
    zero: Array,
    bias: Array,
    _: Array,
    *,
    twice: int,
    unsigned: int,
) -> list[Array]:
    """The same in XLA's own operations."""
    b = get_backend("jax")
    half = exponent >> 1  # in two steps: a scale may be smaller than the smallest power that there is
    scale = (fraction * b.power_of_two(half) * b.power_of_two(exponent - half))[:, None]
    zero_point = zero[:, None] + 128 * unsigned
    spec = Spec(FORMATS[w.dtype.name], FLOAT_TYPES["float32"], block=(1, None))
    y = reference.matmul_reproducible(x, Coded(w, scale, zero_point), bias, spec=spec, contract=1, b=b)
    flags = jnp.where(
        reference.rows_fit_fixed_point(x, b)[:, 0], 0, NOT_FINITE | OUT_OF_RANGE
    )  # no second pass is left
    scratch = [jnp.zeros(a.shape, a.dtype) for a in _results(x, w, twice=twice, unsigned=unsigned)[2:]]
    return [y, flags.astype(jnp.int32), *scratch]


def _results(x: Any, w: Any, *_: Any, twice: int, unsigned: int) -> list[Any]:
    (rows, inner), columns = x.shape, w.shape[0]
    panels = shape_of_panels(rows, inner, DIGITS)
    shapes = [
        ((rows, columns), jnp.float32),
        ((rows,), jnp.int32),
        ((rows,), jnp.int32),
        ((rows, 2), jnp.int32),  # an int64 each, which JAX does not always have
        (panels, jnp.uint32),
        ((1 - min(panels[0], 1), inner), jnp.int32),
    ]
    shapes += [((s[0] * twice, *s[1:]), dtype) for s, dtype in shapes[3:]]
    return [jax.core.ShapedArray(*shape) for shape in shapes]


_bind = primitive(TARGET, _plain, _results, is_registered)


def product(x: Array, w: Coded, bias: Array | None, spec: Spec, twice: bool) -> tuple[Array, Array]:
    """``reference.matmul_reproducible`` of a weight (N, K) in one piece, and the flags of each row of x.

    Flags are those of ``cpu.dots``; rows that want a second pass get it where ``twice`` is set.
    """
    vectors = reference.of_columns(w, bias, spec=spec, b=get_backend("jax"))
    arrays = (w.codes, *vectors, powers_of_two())
    static = {"twice": int(twice), "unsigned": int(w.codes.dtype == jnp.uint8)}
    parts = [_bind(x[part].astype(jnp.float32), *arrays, **static)[:2] for part in parts_of_rows(x.shape[0], DIGITS)]
    y, flags = (jnp.concatenate(found) for found in zip(*parts, strict=True))
    return y.astype(x.dtype), flags
