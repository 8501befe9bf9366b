"""Quantization by compiled loops, inside programs that XLA compiles, on a CPU with numba installed.

Owns: the primitives around the loops of ``cpu.encoding`` and what they become: on a CPU calls of the loops that NumPy's
forms use, which XLA makes without Python; elsewhere, and in programs that are exported, XLA's own
operations. Imports: the CPU library, ``ffi``, ``primitives``.

Where groups lie along rows and a scale is a product, one call makes scales and codes, so that memory is read once. Else
one call finds extrema, XLA chooses the scales of the grid by the operations of the contract, whatever the format keeps,
and another call makes the codes.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit

from aqt_lite import affine, packing
from aqt_lite._blocks import reduced
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, QParams, Recipe, Spec
from aqt_lite.backends.cpu import encoders, encoding, native, pool
from aqt_lite.backends.cpu.native import address_of, in_huge_pages
from aqt_lite.backends.cpu.quantize import scales_can_be_cut
from aqt_lite.backends.jax import ffi
from aqt_lite.backends.jax.ffi import (
    OK,
    array,
    attribute,
    data,
    describe,
    dim,
    operand,
    parallel_for,
    result,
)
from aqt_lite.backends.jax.primitives import primitive, version_of
from aqt_lite.granularity import grid_of
from aqt_lite.packing import bytes_of

__all__ = ["quantize", "register", "serves"]

AT_A_TIME = 1 << 16
"""Values that a thread claims at a time, at least."""

# ---- what XLA calls. The first operand is x as rows of groups (cpu.encoders.view_of), float32; the attribute that all
# have is the size of a group.


@njit(nogil=True)
def _rows_of(buffer: Any, start: Any, stop: Any, dtype: Any) -> Any:  # pragma: no cover - compiled
    return array(buffer, (dim(buffer, 0), dim(buffer, 1)), dtype)[start:stop]


@njit(nogil=True)
def _streams(frame: Any, bits: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    """Rows of the bytes of codes: the first result, of whatever type."""
    x = operand(frame, 0)
    return array(result(frame, 0), (dim(x, 0), (dim(x, 1) * bits + 7) // 8), np.uint8)[start:stop]


@njit(nogil=True)
def _of_all_or(buffer: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    """Rows of numbers of groups; those that all share, where there is one of them."""
    several = dim(buffer, 0) * dim(buffer, 1) > 1
    return _rows_of(buffer, start if several else 0, stop if several else 1, np.float32)


@njit(nogil=True)
def _find(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    # Attributes by name: magnitudes, size. Results: smallest values (no row of them if magnitudes are asked for), and
    # largest, as patterns.
    x, size = _rows_of(operand(frame, 0), start, stop, np.float32), attribute(frame, 1)
    high = _rows_of(result(frame, 1), start, stop, np.int32)
    if attribute(frame, 0) != 0:
        encoding.magnitudes_apart((x, size, high))
    else:
        encoding.ranges_apart((x, size, _rows_of(result(frame, 0), start, stop, np.int32), high))


@njit(nogil=True)
def _find_of_columns(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    # The same; size: how many rows are a part, of which each column has its own.
    x, size = operand(frame, 0), attribute(frame, 1)
    rows = _rows_of(x, start * size, min(stop * size, dim(x, 0)), np.float32)
    high = _rows_of(result(frame, 1), start, stop, np.int32)
    if attribute(frame, 0) != 0:
        encoding.magnitudes_of_columns_apart((rows, size, high))
    else:
        encoding.ranges_of_columns_apart((rows, size, _rows_of(result(frame, 0), start, stop, np.int32), high))


@njit(nogil=True)
def _encode_columns(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    # As of groups, but numbers of columns, filled up to whole vectors.
    told = operand(frame, 1)
    encoding.encode_columns_apart((
        _rows_of(operand(frame, 0), start, stop, np.float32),
        attribute(frame, 1),
        attribute(frame, 0),
        array(told, (dim(told, 0),), np.int32),
        _rows_of(operand(frame, 2), 0, 1, np.float32),
        _rows_of(operand(frame, 3), 0, 1, np.float32),
        _rows_of(operand(frame, 4), 0, 1, np.float32),
        _streams(frame, attribute(frame, 0), start, stop),
    ))  # fmt: skip


@njit(nogil=True)
def _encode(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    # Operands: x, parameters, reciprocals, powers of two, zero points. Attributes: bits, kind, size. Result: codes.
    told = operand(frame, 1)
    encoding.encode_apart((
        _rows_of(operand(frame, 0), start, stop, np.float32),
        attribute(frame, 2),
        attribute(frame, 1),
        attribute(frame, 0),
        array(told, (dim(told, 0),), np.int32),
        _of_all_or(operand(frame, 2), start, stop),
        _of_all_or(operand(frame, 3), start, stop),
        _of_all_or(operand(frame, 4), start, stop),
        _streams(frame, attribute(frame, 0), start, stop),
    ))  # fmt: skip


@njit(nogil=True)
def _quantize(frame: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    # Operands: x, parameters, the rule, how scales are kept. Attributes: bits, kind, size. Results: codes, scales.
    told, kept, scale = operand(frame, 1), operand(frame, 3), result(frame, 1)
    how = array(kept, (dim(kept, 0),), np.int32)
    encoding.quantize_apart((
        _rows_of(operand(frame, 0), start, stop, np.float32),
        attribute(frame, 2),
        attribute(frame, 1),
        attribute(frame, 0),
        array(told, (dim(told, 0),), np.int32),
        array(operand(frame, 2), (7,), np.float32),
        how,
        array(scale, (dim(scale, 0), dim(scale, 1) * how[0]), np.uint8)[start:stop],
        _streams(frame, attribute(frame, 0), start, stop),
    ))  # fmt: skip


_find_address, _encode_address, _quantize_address = (address_of(loop, 3) for loop in (_find, _encode, _quantize))
_find_of_columns_address, _encode_columns_address = (
    address_of(loop, 3) for loop in (_find_of_columns, _encode_columns)
)


def _handler(address: Any, version: int) -> Any:
    """What XLA calls. What numba caches of it is of this ``version`` of the sources."""

    def handler(frame: Any) -> Any:  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        x, found = operand(frame, 0), result(frame, 0)
        in_huge_pages(data(found), dim(found, 0) * dim(found, 1))  # an item has a byte or more
        return parallel_for(frame, address(), dim(x, 0), max(1, AT_A_TIME // dim(x, 1)))

    return handler


def _handler_of_parts(address: Any, version: int) -> Any:
    """The same where an item is one of the rows of the last result, each from several of x."""

    def handler(frame: Any) -> Any:  # pragma: no cover - compiled
        if describe(frame) or version < 0:
            return OK
        return parallel_for(frame, address(), dim(result(frame, 1), 0), 1)

    return handler


_HANDLERS = {
    "aqt_lite_extrema": (_handler, _find_address),
    "aqt_lite_extrema_of_columns": (_handler_of_parts, _find_of_columns_address),
    "aqt_lite_encode": (_handler, _encode_address),
    "aqt_lite_encode_columns": (_handler, _encode_columns_address),
    "aqt_lite_quantize": (_handler, _quantize_address),
}


@functools.cache
def _is_registered(target: str) -> bool:
    version = version_of(sys.modules[__name__], encoding, ffi, native, pool)
    handler, address = _HANDLERS[target]
    return ffi.register(target, handler(address, version))


def register() -> bool:
    """Offer XLA all of them now; whether it has taken them."""
    taken = [_is_registered(target) for target in _HANDLERS]
    return all(taken)


# ---- what JAX sees


@functools.cache
def _extrema_call(spec: Spec, shape: tuple[int, ...]) -> Any:
    view = encoders.view_of(shape, spec)
    assert view is not None

    def results(x: Any, *, magnitudes: int, size: int) -> list[Any]:
        rows = (0 if magnitudes else view.parts, view.parts)
        return [jax.core.ShapedArray((n, view.groups), jnp.int32) for n in rows]

    def plain(x: Array, *, magnitudes: int, size: int) -> list[Array]:
        rows, b = jnp.abs(x) if magnitudes else x, get_backend("jax")
        block = (size, 1) if view.of_columns else (1, size)
        ends = [reduced(rows, block, end, jnp) for end in (jnp.min, b.largest)]
        found = [jax.lax.bitcast_convert_type(end, jnp.int32) for end in ends]
        return [found[0][: 0 if magnitudes else view.parts], found[1]]

    target = "aqt_lite_extrema_of_columns" if view.of_columns else "aqt_lite_extrema"
    return primitive(target, plain, results, functools.partial(_is_registered, target))


@functools.cache
def _encode_call(spec: Spec, recipe: Recipe, packed: bool, shape: tuple[int, ...], numbers_bits: int) -> Any:
    view = encoders.view_of(shape, spec, numbers_bits)
    assert view is not None

    def results(*_: Any, **__: int) -> list[Any]:
        return [_shape_of_codes(view, spec, packed)]

    def plain(x: Array, told: Array, inverse: Array, factor: Array, zero: Array, *kept: Array, **_: int) -> list[Array]:
        qparams = jax.tree.unflatten(_structure(spec, recipe), kept)
        codes = affine.encode(x.reshape(shape), qparams, spec=spec, recipe=recipe, b=get_backend("jax"))
        return [_as_kept(codes, spec, packed).reshape(view.rows, -1)]

    target = "aqt_lite_encode_columns" if view.of_columns else "aqt_lite_encode"
    return primitive(target, plain, results, functools.partial(_is_registered, target))


@functools.cache
def _quantize_call(spec: Spec, recipe: Recipe, packed: bool, shape: tuple[int, ...], numbers_bits: int) -> Any:
    view = encoders.view_of(shape, spec, numbers_bits)
    assert view is not None

    def results(*_: Any, **__: int) -> list[Any]:
        return [
            _shape_of_codes(view, spec, packed),
            jax.core.ShapedArray((view.rows, view.groups), encoders.dtype_of_scales(spec)),
        ]

    def plain(x: Array, told: Array, rule: Array, kept: Array, **_: int) -> list[Array]:
        w = affine.quantize(x.reshape(shape), spec=spec, recipe=recipe, b=get_backend("jax"))
        scale = w.scale if spec.format.scale is None else w.scale.codes
        return [_as_kept(w.codes, spec, packed).reshape(view.rows, -1), scale.reshape(view.rows, view.groups)]

    target = "aqt_lite_quantize"
    return primitive(target, plain, results, functools.partial(_is_registered, target))


@functools.cache
def _structure(spec: Spec, recipe: Recipe) -> Any:
    """How the parameters of a format are nested."""
    x: Any = jax.ShapeDtypeStruct((1,) * len(spec.block), jnp.float32)  # type: ignore[no-untyped-call]
    of_one = replace(spec, block=(1,) * len(spec.block))
    chosen = functools.partial(affine.choose_qparams, spec=of_one, recipe=recipe, b=get_backend("jax"))
    return jax.tree.structure(jax.eval_shape(chosen, x))


def _shape_of_codes(view: Any, spec: Spec, packed: bool) -> Any:
    """Of the type that they are kept in: XLA copies what becomes another."""
    if packed:
        return jax.core.ShapedArray((view.rows, bytes_of(view.length, spec.element.bits)), jnp.uint8)
    return jax.core.ShapedArray((view.rows, view.length), np.dtype(spec.element.storage))


def _as_kept(codes: Array, spec: Spec, packed: bool) -> Array:
    return packing.pack(codes, bits=spec.element.bits, b=get_backend("jax")) if packed else codes


def serves(x: Array, spec: Spec, recipe: Recipe, packed: bool) -> bool:
    """Whether ``quantize`` does, of what is traced."""
    if x.dtype != jnp.float32 or not all(isinstance(n, int) for n in x.shape) or recipe.ignore_nonfinite:
        return False
    if recipe.dialect.together is not None or not scales_can_be_cut(spec):
        return False
    numbers = encoders.numbers_for(QParams(None), spec, recipe, packed)
    return numbers is not None and encoders.view_of(tuple(x.shape), spec, numbers.bits) is not None


@functools.partial(jax.jit, static_argnames=("spec", "recipe", "packed"))
def quantize(x: Array, *, spec: Spec, recipe: Recipe, packed: bool) -> Coded:
    """``affine.quantize`` where the loops serve, codes ``packed`` or not."""
    shape, grid = tuple(x.shape), grid_of(x.shape, spec.block)
    at_once = encoders.numbers_at_once(spec, recipe, packed)
    numbers = encoders.numbers_for(QParams(None), spec, recipe, packed)
    assert numbers is not None
    view = encoders.view_of(shape, spec, numbers.bits)
    assert view is not None
    rows = x.reshape(view.rows, view.length)
    how, static = (spec, recipe, packed, shape, numbers.bits), {"bits": numbers.bits, "size": view.size}
    if at_once is not None and not view.shared and not view.of_columns:
        rule, kept = (jnp.asarray(a) for a in (encoders.rule_of(spec, recipe, at_once), encoders.kept_as(spec)))
        told = jnp.asarray(at_once.parameters)
        codes, scale = _quantize_call(*how)(rows, told, rule, kept, kind=at_once.kind, **static)
        middle = spec.element.middle
        zero = jnp.full(grid, middle, jnp.int32) if middle else None
        return Coded(codes.reshape(*shape[:-1], -1), encoders.kept_of(scale.reshape(grid), spec), zero)
    qparams = _chosen(x, spec, recipe)
    if qparams.zero_point is None:
        numbers = encoders.numbers_for(qparams, spec, recipe, packed, 0)
        assert numbers is not None
    b = get_backend("jax")
    inverse, factor = encoders.steps_of(affine.scales(qparams.scale, spec, b), spec, numbers.step, b)
    of_each = (inverse, 1), (factor, 1), (qparams.zero_point, 0)
    if view.of_columns:
        of_groups = [_of_vectors(absent if a is None else a, view.groups) for a, absent in of_each]
    else:
        of_groups = [
            jnp.full((1, 1), absent, jnp.float32)
            if a is None
            else jnp.broadcast_to(a, grid).astype(jnp.float32).reshape((1, 1) if view.shared else (view.rows, -1))
            for a, absent in of_each
        ]
    told = jnp.asarray(numbers.parameters)
    (codes,) = _encode_call(*how)(rows, told, *of_groups, *jax.tree.leaves(qparams), kind=numbers.kind, **static)
    return qparams.beside(codes.reshape(*shape[:-1], -1))


def _of_vectors(numbers: Any, count: int) -> Array:
    """A row of so many numbers, filled up to whole vectors."""
    found = jnp.broadcast_to(jnp.asarray(numbers, jnp.float32).reshape(1, -1), (1, count))
    return jnp.pad(found, ((0, 0), (0, -count % encoding.LANES)))


def _chosen(x: Array, spec: Spec, recipe: Recipe) -> QParams:
    """``affine.choose_qparams`` from the extrema of groups."""
    shape = tuple(x.shape)
    view, grid = encoders.view_of(shape, spec), grid_of(shape, spec.block)
    assert view is not None
    magnitudes, size = int(recipe.of_magnitudes), encoders.ROWS_OF_A_PART if view.of_columns else view.size
    found = _extrema_call(spec, shape)(x.reshape(view.rows, view.length), magnitudes=magnitudes, size=size)
    low, high = (jax.lax.bitcast_convert_type(end, jnp.float32) for end in found)
    if view.shared or view.of_columns:
        b, axis = get_backend("jax"), 0 if view.of_columns else None
        low, high = jnp.min(low, axis=axis, initial=jnp.inf), b.largest(high, axis=axis, keepdims=False)
    ends = jnp.stack([end.reshape(grid) for end in ([high] if magnitudes else [low, high])])
    of_rows = replace(spec, block=(None, *((1,) * len(grid))))
    chosen = affine.choose_qparams(ends, spec=of_rows, recipe=recipe, b=get_backend("jax"))
    return QParams(*jax.tree.map(lambda a: a[0], tuple(chosen)))
