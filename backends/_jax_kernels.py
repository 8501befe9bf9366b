"""Products for XLA, with derivatives.

Owns: which form of the product XLA runs fast, and the custom derivative that all forms share. docs/performance.md says
what was tried and what each gave.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from aqt_lite import affine
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Spec
from aqt_lite.backends import _numpy_kernels
from aqt_lite.ops import reference

MOST_ROWS_AS_DIGITS = 16
"""Up to this many rows of x, four int8 products are faster than one float32 product."""

SMALLEST_FOR_LOOPS = 1 << 16
"""Codes of a weight below which XLA's own product takes no longer than a call of the compiled loops."""

ROWS_OF_A_BLOCK = 256
"""Rows of the weight that are dequantized at a time: with 8192 columns, 8 MB of float32, which stays in cache."""


def integer_matmul(x: Array, w: Array) -> Array:
    """``x @ w.T`` over the last axes, in int32, with the weight on the left and at least two rows in x.

    XLA's fast int8 product on CPU wants both operands contracted over their last axes and more than one row, and is
    fastest with the larger operand on the left. The barrier keeps XLA from folding the transpose back into the product.
    """
    rows = x.shape[-2]
    if rows == 1:
        x = jnp.concatenate([x, jnp.zeros_like(x)], axis=-2)
    if x.ndim == 3 and x.shape[0] == 1:
        return integer_matmul(x[0], w[0])[None, :rows]
    batch = tuple(range(x.ndim - 2))
    dimensions = (((w.ndim - 1,), (x.ndim - 1,)), (batch, batch))
    product = lax.dot_general(w, x, dimensions, preferred_element_type=jnp.int32)
    kept = lax.optimization_barrier(product)  # type: ignore[no-untyped-call]
    return jnp.swapaxes(kept, -1, -2)[..., :rows, :]


def _fast(
    x: Array, codes: Array, scale: Array, zero_point: Array | None, bias: Array | None, spec: Spec, contract: int
) -> Array:
    """The form that is fastest here, at no more than twice the error of a float32 product."""
    b = get_backend("jax")
    arguments = (x, codes, scale, zero_point, bias)
    single = codes.dtype.itemsize == 1 and "float64" not in (x.dtype.name, spec.source.compute)
    # XLA on a GPU or TPU fuses the dequantization into the product, and blocks would gather a sharded weight
    if not _is_one_cpu() or not single or 0 in (*x.shape, *codes.shape):
        return reference.matmul(*arguments, spec=spec, contract=contract, b=b)
    dots = _dots_for(x, codes, scale, contract)
    if dots is not None:
        y, kind = dots.product(*arguments, spec)
        return _unless(jnp.any(kind != 0), y, lambda: _blockwise(*arguments, spec, contract))
    if contract == 1 and scale.shape[1] == 1 and x.shape[0] <= MOST_ROWS_AS_DIGITS:
        return lax.cond(
            reference.fits_fixed_point(x, b),
            lambda: reference.matmul_reproducible(*arguments, spec=spec, contract=contract, b=b),
            lambda: _blockwise(*arguments, spec, contract),
        )
    return _blockwise(*arguments, spec, contract)


def _blockwise(
    x: Array, codes: Array, scale: Array, zero_point: Array | None, bias: Array | None, spec: Spec, contract: int
) -> Array:
    """``x @ dequantize(w)``, a block of rows of the weight at a time, so that the float block stays in cache."""
    b = get_backend("jax")
    grain = spec.block[0] or 1  # blocks begin where a group begins
    height = -(-ROWS_OF_A_BLOCK // grain) * grain
    length = codes.shape[0]
    wide, plain = x.astype(jnp.float32), reference.unrounded(spec)

    def weight(start: Any, rows: int) -> Array:
        def part(a: Array | None) -> Array | None:
            if a is None or a.shape[0] == 1:
                return a
            return lax.dynamic_slice_in_dim(a, start // grain, -(-rows // grain))

        w = lax.dynamic_slice_in_dim(codes, start, rows)
        return affine.dequantize(w, part(scale), part(zero_point), spec=plain, out="float32", b=b)

    if contract == 1:  # each block of rows gives some columns of the result

        def columns(start: Any, rows: int) -> Array:
            return lax.dot_general(weight(start, rows), wide, (((1,), (1,)), ((), ())))

        blocks, tail = divmod(length, height)
        parts = []
        if blocks:
            parts.append(
                lax.map(lambda i: columns(i * height, height), jnp.arange(blocks)).reshape(blocks * height, -1)
            )
        if tail:
            parts.append(columns(blocks * height, tail))
        kept = lax.optimization_barrier(jnp.concatenate(parts))  # type: ignore[no-untyped-call]
        y = jnp.swapaxes(kept, 0, 1)
    else:  # each block of rows meets some columns of x, and the products add up

        def product(start: Any, rows: int) -> Array:
            return jnp.matmul(lax.dynamic_slice_in_dim(wide, start, rows, axis=1), weight(start, rows))

        pairs, tail = divmod(length, 2 * height)

        def step(i: Any, totals: tuple[Array, Array]) -> tuple[Array, Array]:  # two at a time: one for each core
            first = 2 * i * height
            return totals[0] + product(first, height), totals[1] + product(first + height, height)

        y = jnp.zeros((x.shape[0], codes.shape[1]), jnp.float32)
        if pairs:
            y = sum(lax.fori_loop(0, pairs, step, (y, y)))
        if tail:
            y = y + product(2 * pairs * height, tail)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None, :]
    return y.astype(x.dtype)


def _reproducible(
    x: Array, codes: Array, scale: Array, zero_point: Array | None, bias: Array | None, spec: Spec, contract: int
) -> Array:
    b, arguments = get_backend("jax"), (x, codes, scale, zero_point, bias)

    def plain() -> Array:
        return reference.matmul_reproducible(*arguments, spec=spec, contract=contract, b=b)

    dots = _dots_for(x, codes, scale, contract)
    if dots is None:
        return plain()
    y, kind = dots.product(*arguments, spec)
    return _unless(jnp.any((kind & dots.SECOND_PASS) != 0), y, plain)


def _is_one_cpu() -> bool:
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@functools.cache
def integer_dots() -> Any:
    """The primitive around the processor's int8 dot product, or None where that or numba is missing."""
    if not _is_one_cpu() or _numpy_kernels.integer_dots() is None:
        return None
    from aqt_lite.backends import _jax_dots

    return _jax_dots


def _unless(flag: Array, y: Array, otherwise: Callable[[], Array]) -> Array:
    """``y``, or the other form of it where ``flag`` is set.

    As vectors, which have one layout: XLA would give both the one that it finds best for the other form, and turn ``y``
    there and back.
    """
    return lax.cond(flag, lambda: otherwise().reshape(-1), lambda: y.reshape(-1)).reshape(y.shape)


def _dots_for(x: Array, codes: Array, scale: Array, contract: int) -> Any:
    """``integer_dots`` where they serve: one piece, 8 bits, and large enough to be worth the call; else None."""
    rows, inner = x.shape
    serve = (
        contract == 1
        and scale.shape[1] == 1
        and codes.dtype.itemsize == 1
        and "float64" not in (x.dtype.name, scale.dtype.name)
        and 64 <= inner <= reference.LONGEST_PIECE
        and rows > 0
        and codes.size >= SMALLEST_FOR_LOOPS
        and not jax.sharding.get_abstract_mesh().manual_axes  # inside shard_map both forms would have to vary alike
    )
    return integer_dots() if serve else None


_FORMS: dict[str, Callable[..., Array]] = {"matmul": _fast, "matmul_reproducible": _reproducible}


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(
    op: str, spec: Spec, contract: int, x: Array, codes: Array, scale: Array, zero_point: Any, bias: Any
) -> Array:
    return _FORMS[op](x, codes, scale, zero_point, bias, spec, contract)


def _forward(op: str, spec: Spec, contract: int, *primals: Any) -> Any:
    x, codes, scale, zero_point, bias = jax.tree.map(
        lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed")
    )
    wants_scale = primals[2].perturbed
    y = _product(op, spec, contract, x, codes, scale, zero_point, bias)
    return y, (x if wants_scale else x[:0], codes, scale, zero_point, bias)


def _backward(op: str, spec: Spec, contract: int, kept: Any, dy: Any) -> Any:
    """With respect to x: the same product with the other axis contracted, so it, too, reads int8 codes alone."""
    x, codes, scale, zero_point, bias = kept
    rows = dy.shape[0]
    no_codes = jnp.zeros(codes.shape, jax.dtypes.float0)
    no_zero = None if zero_point is None else jnp.zeros(zero_point.shape, jax.dtypes.float0)
    if isinstance(dy, SymbolicZero):
        no_bias = None if bias is None else jnp.zeros_like(bias)
        return jnp.zeros((rows, x.shape[1]), x.dtype), no_codes, jnp.zeros_like(scale), no_zero, no_bias
    if not reference.has_integer_sums(scale, 1 - contract, spec.block[1 - contract]):
        op = "matmul"
    dx = _product(op, spec, 1 - contract, dy, codes, scale, zero_point, None)
    dscale = jnp.zeros_like(scale)
    if x.shape[0] == rows:
        left, right = (x, dy) if contract == 0 else (dy, x)
        dw = jnp.matmul(left.astype(scale.dtype).T, right.astype(scale.dtype))
        _, pullback = jax.vjp(
            lambda s: affine.dequantize(codes, s, zero_point, spec=spec, out=scale.dtype.name, b=get_backend("jax")),
            scale,
        )
        (dscale,) = pullback(dw)
    dbias = None if bias is None else dy.astype(scale.dtype).sum(axis=0).astype(bias.dtype)
    return dx, no_codes, dscale, no_zero, dbias


_product.defvjp(_forward, _backward, symbolic_zeros=True)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _jitted(op: str, spec: Spec, contract: int, *arrays: Any) -> Array:
    return _product(op, spec, contract, *arrays)


def _kernel(op: str) -> Callable[..., Array]:
    def kernel(*arrays: Any, spec: Spec, contract: int) -> Array:
        return _jitted(op, spec, contract, *arrays)

    return kernel


def _of_large(op: str) -> Callable[..., Any]:
    """NumPy's kernel on the memory of large arrays that have values and lie on one CPU.

    XLA takes most of its time to touch fresh output memory for the first time, which NumPy's kernel does on every core.
    """

    def kernel(x: Array, *rest: Any, **static: Any) -> Any:
        arrays = (x, *rest)
        if any(isinstance(a, jax.core.Tracer) for a in arrays) or x.size < _numpy_kernels.LARGE:
            return NotImplemented
        devices = x.devices()
        if len(devices) > 1 or next(iter(devices)).platform != "cpu":
            return NotImplemented
        if not x.committed and devices != jnp.zeros(()).devices():
            return NotImplemented  # placed by a default device that has changed since
        result = _numpy_kernels.KERNELS[op](*(None if a is None else np.asarray(a) for a in arrays), **static)
        if result is NotImplemented:
            return NotImplemented
        place = x.sharding if x.committed else None  # what nobody has placed stays so
        return jax.tree.map(lambda a: jax.device_put(a, place, may_alias=True), result)

    return kernel


KERNELS = {
    "quantize": _of_large("quantize"),
    "dequantize": _of_large("dequantize"),
    **{op: _kernel(op) for op in _FORMS},
}
