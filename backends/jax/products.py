"""Products for XLA, with derivatives.

Owns: which form of the product XLA runs fast, how JAX is told of its derivative, and the table of JAX's kernels.
Imports: the CPU library, the operations. docs/performance-tried.md says what was tried and what each gave.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from aqt_lite import _clipping, affine, packing, significant
from aqt_lite._dispatch import offered
from aqt_lite._into import dequantize_at_once, dequantize_stored, quantize_stored
from aqt_lite._kernels import Kernel, Kernels, anything
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Recipe, Spec
from aqt_lite.backends.cpu import quantize, runtime, serve
from aqt_lite.backends.cpu.floats import in_whole_groups
from aqt_lite.backends.cpu.rows import as_rows, in_integers, rows_of_columns
from aqt_lite.backends.jax.eager import in_memory, is_tracing
from aqt_lite.backends.jax.sharding import keeping_shardings
from aqt_lite.ops import derivative, reference

MOST_ROWS_AS_DIGITS = 16
"""Up to this many rows of x, four int8 products are faster than one float32 product."""

SMALLEST_FOR_LOOPS = 1 << 16
"""Codes of a weight below which XLA's own product takes no longer than a call of the compiled loops."""

SMALLEST_TO_UNPACK = 1 << 13
"""Packed codes below which XLA unpacks them in no longer than a call of a loop takes."""

SMALLEST_FOR_XLA = 1 << 23
"""Bytes of codes whose values XLA makes sooner, for all that it compiles a program, than it copies those of NumPy."""

ROWS_TO_ONE_OF_NUMPY = 2
"""Rows of x for each that NumPy needs for floats to pay: threads share what other forms do, too."""

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


def _fast(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Array:
    """The form that is fastest here, at no more than twice the error of a float32 product."""
    b = get_backend("jax")
    # XLA on a GPU or TPU fuses the dequantization into the product, and blocks would gather a sharded weight
    if _is_one_cpu() and serve.is_of_wide_codes(x, x.dtype.name, w, spec):
        return _blockwise(x, w, bias, spec, contract)
    if not _is_one_cpu() or not serve.bytes_and_float32(x, x.dtype.name, w, spec):
        return reference.matmul(x, w, bias, spec=spec, contract=contract, b=b)
    if serve.sums_single_codes(w, spec, contract):
        return _of_single_codes(x, w, bias, spec, contract)
    y = _of_values(x, w, bias, spec, contract, None)
    if y is not NotImplemented:
        return y
    if _is_known(x.shape[0]) and serve.decoding_beats_dots(x.shape[0], x.dtype.name, w, spec, contract):
        return _by_floats(x, w, bias, spec, contract)
    dots = _dots_for(x, w, spec, contract) if serve.dots_beat_floats() else None
    if dots is not None:
        y, flags = dots.product(x, w, bias, spec, twice=False)
        return _unless(jnp.any(flags != 0), y, lambda: _by_floats(x, w, bias, spec, contract))
    has_few_rows = _is_known(x.shape[0]) and x.shape[0] <= MOST_ROWS_AS_DIGITS
    if serve.one_scale_a_column(w, contract) and has_few_rows:
        return lax.cond(
            reference.fits_fixed_point(x, b),
            lambda: reference.matmul_reproducible(x, w, bias, spec=spec, contract=contract, b=b),
            lambda: _by_floats(x, w, bias, spec, contract),
        )
    return _by_floats(x, w, bias, spec, contract)


def _of_single_codes(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Array:
    """The product with a weight that has a scale for each input: that of x times these, where nothing is lost so."""

    def otherwise() -> Array:
        return _blockwise(x, w, bias, spec, contract)

    if not serve.scales_may_meet_x(w, spec, contract) or jax.sharding.get_abstract_mesh().manual_axes:
        return otherwise()
    own = x.astype(jnp.float32) * w.scale
    size = jnp.abs(own)
    fits = (size < serve.LARGEST_UNSCALED) & ((size >= serve.SMALLEST_SCALED) | (x == 0))
    small = jnp.abs(w.scale) <= serve.largest_scale_to_meet_x(spec)
    one = w._replace(scale=jnp.ones_like(w.scale[:, :1]))
    y = _fast(own, one, bias, replace(spec, block=(None, None)), contract).astype(x.dtype)
    return _unless(~(jnp.all(fits) & jnp.all(small)), y, otherwise)


def _by_floats(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Array:
    def blockwise() -> Array:
        return _blockwise(x, w, bias, spec, contract)

    y = _by_loops(False, x, w, bias, spec, contract, None, blockwise)
    return blockwise() if y is NotImplemented else y


def _blockwise(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Array:
    """``x @ dequantize(w)``, a block of rows of the weight at a time, so that the float block stays in cache.

    The larger operand of a product is on the left: blocks of the weight, but not of one that has fewer rows than x.
    """
    b = get_backend("jax")
    group, height = spec.block[0] or 1, in_whole_groups(ROWS_OF_A_BLOCK, spec.block)
    length = w.codes.shape[0]
    x_dtype, x, plain = x.dtype, x.astype(jnp.float32), reference.unrounded(spec)

    def weight(start: Any, rows: int) -> Array:
        def part(a: Array | None) -> Array | None:
            if a is None or a.shape[0] == 1:
                return a
            return lax.dynamic_slice_in_dim(a, start // group, -(-rows // group))

        codes = lax.dynamic_slice_in_dim(w.codes, start, rows)
        own = Coded(codes, part(w.scale), part(w.zero_point))
        return affine.dequantize(own, spec=plain, out="float32", b=b)

    if contract == 1 and length <= height and _is_known(x.shape[0]) and length <= x.shape[0]:
        y = lax.dot_general(x, weight(0, length), (((1,), (1,)), ((), ())))
    elif contract == 1:  # each block of rows gives some columns of the result

        def columns(start: Any, rows: int) -> Array:
            return lax.dot_general(weight(start, rows), x, (((1,), (1,)), ((), ())))

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
            return jnp.matmul(lax.dynamic_slice_in_dim(x, start, rows, axis=1), weight(start, rows))

        pairs, tail = divmod(length, 2 * height)

        def step(i: Any, totals: tuple[Array, Array]) -> tuple[Array, Array]:  # two at a time: one for each core
            first = 2 * i * height
            return totals[0] + product(first, height), totals[1] + product(first + height, height)

        parts = []
        if pairs:  # which begin with the first: zeros would not vary over a mesh, inside shard_map, as sums do
            parts += lax.fori_loop(1, pairs, step, (product(0, height), product(height, height)))
        if tail:
            parts.append(product(2 * pairs * height, tail))
        y = functools.reduce(jnp.add, parts)
    if bias is not None:
        y = y + bias.astype(jnp.float32)[None, :]
    return y.astype(x_dtype)


def _cut(w: Coded, axis: int, group: int, start: Any, length: int) -> Coded:
    """Part of a weight along an axis, of which ``group`` indices share what is shared: whole groups, but at the end."""

    def part(a: Array) -> Array:
        return a if a.shape[axis] == 1 else lax.dynamic_slice_in_dim(a, start // group, -(-length // group), axis)

    codes = lax.dynamic_slice_in_dim(w.codes, start, length, axis)
    return cast(Coded, jax.tree.map(part, w._replace(codes=None)))._replace(codes=codes)


def _in_blocks(
    product: Callable[..., Array], x: Array, w: Coded, bias: Array | None, spec: Spec, outputs: int = 0
) -> Array:
    """``product(x, w, bias)`` with a weight whose axis ``outputs`` they are, a block of these at a time.

    For what programs hold beside compiled loops, and hardly ever run: XLA takes memory for it at every call, 64 MB for
    the values of 4096 x 4096, which is a tenth of a millisecond.
    """
    group, height = spec.block[outputs] or 1, in_whole_groups(ROWS_OF_A_BLOCK, spec.block[outputs:])
    length = w.codes.shape[outputs]
    blocks, tail = divmod(length, height)
    whole = (1, -(-length // group))
    cut = all(a.shape[outputs] in whole for a in jax.tree.leaves(w[1:]))  # and no blocks of scales' own

    def columns(start: Any, rows: int) -> Array:
        of_columns = None if bias is None else lax.dynamic_slice_in_dim(bias, start, rows)
        return product(x, _cut(w, outputs, group, start, rows), of_columns)

    if not (blocks and cut):
        return product(x, w, bias)
    y = lax.map(lambda i: columns(i * height, height), jnp.arange(blocks))
    y = jnp.moveaxis(y, 0, 1).reshape(x.shape[0], blocks * height)
    return jnp.concatenate([y, columns(blocks * height, tail)], axis=1) if tail else y


def _added_in_blocks(product: Callable[..., Array], x: Array, w: Coded, bias: Array | None, spec: Spec) -> Array:
    """The same in float32 with a weight (K, N), whose blocks meet some columns of x each, and are added up.

    Beyond 32 MB all that a program writes beside its results, in compiled loops too, comes in fresh pages each time.
    """
    height, length = in_whole_groups(ROWS_OF_A_BLOCK, spec.block), w.codes.shape[0]
    group, (blocks, tail) = spec.block[0] or length, divmod(length, height)
    if not blocks or not all(a.shape[0] in (1, -(-length // group)) for a in jax.tree.leaves(w[1:])):
        return product(x, w, bias)

    def of_block(start: Any, rows: int) -> Array:
        return product(lax.dynamic_slice_in_dim(of_x, start, rows, axis=1), _cut(w, 0, group, start, rows), None)

    of_x = x.astype(jnp.float32)
    y = lax.fori_loop(1, blocks, lambda i, y: y + of_block(i * height, height), of_block(0, height))
    if tail:
        y = y + of_block(blocks * height, tail)
    return (y if bias is None else y + bias.astype(y.dtype)[None, :]).astype(x.dtype)


def _reproducible(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Array:
    scaled = reference.with_scales_in_x(x, w, spec, contract, get_backend("jax"))
    if scaled is not None:
        own, w, spec = scaled
        return _reproducible(own, w, bias, spec, contract).astype(x.dtype)
    across = _across_for(x, w, spec, contract)
    if across is not None:
        return across.product(x, w, bias, spec)
    plain = partial(reference.matmul_reproducible, spec=spec, contract=contract, b=get_backend("jax"))
    if contract == 0:
        y = _by_columns(x, w, bias, spec, None, plain)
        if y is not NotImplemented:
            return y
    if contract == 0 and _become_rows(w, spec):
        return _along_rows(True, x, w, bias, spec, contract)
    dots = _dots_for(x, w, spec, contract)
    if dots is not None:
        return dots.product(x, w, bias, spec, twice=True)[0]

    def in_blocks() -> Array:
        return _in_blocks(plain, x, w, bias, spec)

    y = _by_loops(True, x, w, bias, spec, contract, None, in_blocks)
    return plain(x, w, bias) if y is NotImplemented else y


def _across_for(x: Array, w: Coded, spec: Spec, contract: int) -> Any:
    """The primitive around such dot products for a weight (in, out), where it serves and is there; None otherwise."""
    known = all(map(_is_known, (*x.shape, *w.codes.shape)))
    if contract == 1 or not known or w.codes.size < SMALLEST_FOR_LOOPS:
        return None
    inside = jax.sharding.get_abstract_mesh().manual_axes
    return across_loops() if serve.sums_across(x, x.dtype.name, w, spec, contract) and not inside else None


def _by_columns(
    x: Array,
    w: Coded,
    bias: Array | None,
    spec: Spec,
    packed_length: int | None,
    by_reference: Callable[[Array, Coded, Array | None], Array],
) -> Any:
    """Exact sums of groups along K of a weight (K, N) as it lies, of codes of 4 bits packed.

    Scales that loops do not serve: by the reference a block of columns at a time, or of packed codes by the rows that
    other weights become. The reference's memory for all of them would be so much that it comes in fresh pages. Whether
    a scale of 0 is one of use depends on where it comes from, and so on which operation of the reference this is.
    """
    if not _goes_by_columns(x, w, spec, packed_length):
        return NotImplemented
    own, plain = rows_of_columns(w, spec, packed_length or w.codes.shape[1])
    y, unserved = group_loops().product_of_columns(x, w.codes, own, bias, plain, packed_length is not None)

    def otherwise() -> Array:
        if packed_length is not None:
            return _along_rows(True, x, w, bias, spec, 0, packed_length)
        return _in_blocks(by_reference, x, w, bias, spec, outputs=1)

    return _unless(unserved, y, otherwise)


def _goes_by_columns(x: Array, w: Coded, spec: Spec, packed_length: int | None) -> bool:
    known = all(map(_is_known, (*x.shape, *w.codes.shape)))
    if group_loops() is None or not known or not _become_rows(w, spec):
        return False
    own, plain = rows_of_columns(w, spec, packed_length or w.codes.shape[1])
    return own is not None and serve.sums_of_columns(x.shape[0], x.dtype.name, own, plain, packed_length is not None)


def _become_rows(w: Coded, spec: Spec) -> bool:
    """Whether loops that make rows of integers of a weight are there, and worth a call."""
    if whole_loops() is None or jax.sharding.get_abstract_mesh().manual_axes or spec.element.unit is None:
        return False
    large = all(map(_is_known, w.codes.shape)) and w.codes.size >= SMALLEST_FOR_LOOPS
    return bool(large and w.codes.dtype.itemsize == 1)


def _goes_along_rows(reproducible: bool, x: Array, w: Coded, spec: Spec, contract: int, packed: bool) -> bool:
    """Whether such rows are multiplied: exactly, or where codes have scales of their own, that no loop serves."""
    rows = x.shape[0]
    if not _is_known(rows) or not rows or not (reproducible or serve.sums_single_codes(w, spec, contract)):
        return False
    return not _is_served(_FORMS[reproducible, contract], x, w, spec, contract, packed) and _become_rows(w, spec)


def _along_rows(
    reproducible: bool,
    x: Array,
    w: Coded,
    bias: Array | None,
    spec: Spec,
    contract: int,
    packed_length: int | None = None,
) -> Array:
    """The product with the weight as such rows (N, K), an integer a byte."""
    b, inner, packed = get_backend("jax"), packed_length or w.codes.shape[1], packed_length is not None
    codes = whole_loops().in_bytes(w.codes, spec.element, inner, packed, contract == 0)
    own, plain = as_rows(codes, reference.with_usable_scales(w, b) if packed else w, spec, contract, b)
    return (_reproducible if reproducible else _fast)(x, own, bias, plain, 1)


def _in_order(w: Coded, swapped: bool) -> Coded:
    return reference.in_order(w, swapped, get_backend("jax"))


def _is_known(length: Any) -> bool:
    """Whether a length is a number: ``jax.export`` has symbols, too, about which no form may decide."""
    return isinstance(length, int)


def _is_one_cpu() -> bool:
    return jax.default_backend() == "cpu" and jax.device_count() == 1


@functools.cache
def integer_dots() -> Any:
    """The primitive around the processor's int8 dot product, or None where that or numba is missing."""
    if not _is_one_cpu() or runtime.integer_dots() is None:
        return None
    from aqt_lite.backends.jax import dots

    return dots


def _unless(flag: Array, y: Array, otherwise: Callable[[], Array]) -> Array:
    """``y``, or the other form of it where ``flag`` is set.

    Both branches return vectors, which have only one layout: for matrices XLA takes the layout that suits the other
    form, and transposes ``y`` into it and back.
    """
    return lax.cond(flag, lambda: otherwise().reshape(-1), lambda: y.reshape(-1)).reshape(y.shape)


@functools.cache
def decoding_loops() -> Any:
    """The primitive whose codes become numbers in registers, or None where the loops are missing."""
    if not _is_one_cpu() or runtime.decoding_loops() is None:
        return None
    from aqt_lite.backends.jax import decoding

    return decoding


@functools.cache
def across_loops() -> Any:
    """The primitive for exact products with weights that lie (in, out), or None where the loops are missing."""
    if not _is_one_cpu() or runtime.across_loops() is None:
        return None
    from aqt_lite.backends.jax import across

    return across


@functools.cache
def whole_loops() -> Any:
    """The primitive that makes whole numbers of codes, or None where the loops are missing."""
    if not _is_one_cpu() or runtime.whole_loops() is None:
        return None
    from aqt_lite.backends.jax import whole

    return whole


@functools.cache
def in_out_loops() -> Any:
    """The primitive for weights that lie (in, out), or None where the loops are missing."""
    if not _is_one_cpu() or runtime.outer_loops() is None:
        return None
    from aqt_lite.backends.jax import in_out

    return in_out


@functools.cache
def group_loops() -> Any:
    """The primitive around exact sums of groups, or None where numba is missing."""
    if not _is_one_cpu() or runtime.group_loops() is None:
        return None
    from aqt_lite.backends.jax import groups

    return groups


class _Form(NamedTuple):
    """Of a product with a stored weight: what does it where that serves, and what it is."""

    loops: Callable[[], Any]
    serves: Callable[..., bool]
    reference: Callable[..., Array]


_FORMS = {
    (False, 1): _Form(decoding_loops, serve.decodes, reference.matmul_stored),
    (False, 0): _Form(in_out_loops, serve.decodes_in_out, reference.matmul_stored),
    **dict.fromkeys(
        ((True, 0), (True, 1)), _Form(group_loops, serve.sums_of_groups, reference.matmul_reproducible_stored)
    ),
}
"""By whether the product is reproducible, and the axis of the weight that is contracted."""


def _is_served(form: _Form, x: Array, w: Coded, spec: Spec, contract: int, packed: bool) -> bool:
    """Whether loops do what a form is for, and are worth a call."""
    rows = x.shape[0]
    if form.loops() is None or not _is_known(rows) or not rows or w.codes.size < SMALLEST_FOR_LOOPS:
        return False
    if serve.sums_single_codes(w, spec, contract):
        return False
    if contract == 0:  # more rows meet integers of a byte each faster in XLA's own product of blocks
        columns = w.codes.shape[1] * 8 // spec.element.bits if packed else w.codes.shape[1]
        by_xla = rows > serve.MOST_ROWS_FOR_LOOPS and not packed and spec.element.zero_points
        if by_xla or not serve.are_in_out(rows, columns):
            return False
    return form.serves(x.dtype.name, w, spec, contract, packed)


def _by_loops(
    reproducible: bool,
    x: Array,
    w: Coded,
    bias: Array | None,
    spec: Spec,
    contract: int,
    packed_length: int | None,
    otherwise: Callable[[], Array],
    swapped: bool = False,
) -> Any:
    """The product by those loops; ``otherwise`` where they find a scale that they do not serve, such as 0."""
    form, packed = _FORMS[reproducible, contract], packed_length is not None
    if jax.sharding.get_abstract_mesh().manual_axes or not _is_served(form, x, w, spec, contract, packed):
        return NotImplemented
    if contract == 0:
        w, columns = _in_order(w, swapped), packed_length or w.codes.shape[1]
        y, unserved = form.loops().product(x, w, bias, spec, columns, packed)
    else:
        y, unserved = form.loops().product(x, w, bias, spec, packed, swapped)
    return _unless(unserved, y, otherwise)


def _of_values(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int, packed_length: int | None) -> Any:
    """XLA's own product with the values of a small weight, which loops make, where that is faster than other forms."""
    loops = decoding_loops()
    if (
        loops is None
        or jax.sharding.get_abstract_mesh().manual_axes
        or not _is_worth_values(x, w, spec, contract, packed_length is not None)
    ):
        return NotImplemented
    values, unserved = loops.values(w, spec, x.shape[1], packed_length is not None)
    b = get_backend("jax")

    def otherwise() -> Array:
        return reference.usable_values(w, spec=spec, packed_length=packed_length, b=b)

    values = lax.cond(unserved, otherwise, lambda: values)
    return reference.matmul_of_values(x, values, bias, contract=contract, b=b)


def _is_worth_values(x: Array, w: Coded, spec: Spec, contract: int, packed: bool) -> bool:
    """Whether loops serve that make values, and are worth a call.

    So they are where many rows meet few codes; and for any rows where no loop multiplies packed codes, for XLA unpacks
    them in many steps.
    """
    rows = x.shape[0]
    if not _is_known(rows) or not rows or not serve.decodes(x.dtype.name, w, spec, contract, packed):
        return False
    if serve.sums_single_codes(w, spec, contract):
        return False
    codes = w.codes.shape[0] * x.shape[1]
    if codes < (SMALLEST_TO_UNPACK if packed else SMALLEST_FOR_LOOPS):
        return False
    rows_as_numpy = rows // ROWS_TO_ONE_OF_NUMPY
    if serve.is_worth_floats(rows_as_numpy, codes, serve.by_digits(rows_as_numpy, w, contract, packed)):
        return True
    multiplied = w.codes.size >= SMALLEST_FOR_LOOPS and serve.decodes(x.dtype.name, w, spec, contract, packed)
    return packed and not multiplied and codes <= serve.MOST_CODES_AT_ONCE


def _dots_for(x: Array, w: Coded, spec: Spec, contract: int) -> Any:
    """``integer_dots`` where they serve and the product is large enough to be worth the call; else None."""
    worth_a_call = w.codes.size >= SMALLEST_FOR_LOOPS and w.codes.shape[1] >= 64
    if not _is_known(x.shape[0]) or not worth_a_call or not serve.dots(x, x.dtype.name, w, spec, contract):
        return None
    if jax.sharding.get_abstract_mesh().manual_axes:  # inside shard_map both forms would have to vary alike
        return None
    return integer_dots()


# ---- what is mapped over


def _rows_at_once(form: Callable[[Array, Coded, Array | None], Array]) -> Callable[..., Array]:
    """The product, of which ``vmap`` over x alone makes one of more rows: a layer of Equinox takes one vector.

    Mapped as it is written, each row would have a condition of its own, and so both branches.
    """
    product = jax.custom_batching.custom_vmap(form)

    @product.def_vmap
    def of_rows(size: int, batched: Any, x: Array, w: Coded, bias: Array | None) -> tuple[Array, bool]:
        if batched[0] and not any(jax.tree.leaves(batched[1:])):
            y = product(x.reshape(-1, x.shape[-1]), w, bias)
            return y.reshape(*x.shape[:2], y.shape[-1]), True
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, batched)
        return jax.vmap(form, in_axes=tuple(axes), axis_size=size)(x, w, bias), True

    return product


@functools.cache
def _mapping(reproducible: bool, spec: Spec, contract: int) -> Callable[..., Array]:
    return _rows_at_once(partial(_reproducible if reproducible else _fast, spec=spec, contract=contract))


# ---- the derivative


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(reproducible: bool, spec: Spec, contract: int, x: Array, w: Coded, bias: Array | None) -> Array:
    return _mapping(reproducible, spec, contract)(x, w, bias)


def _forward(reproducible: bool, spec: Spec, contract: int, *primals: Any) -> Any:
    x, w, bias = jax.tree.map(lambda p: p.value, primals, is_leaf=lambda p: hasattr(p, "perturbed"))
    wants_scale = primals[1].scale.perturbed
    y = _product(reproducible, spec, contract, x, w, bias)
    return y, (x if wants_scale else x[:0], w, bias)


def _backward(reproducible: bool, spec: Spec, contract: int, kept: Any, dy: Any) -> Any:
    """``ops.derivative`` as ``custom_vjp`` wants it: integers have a derivative of their own type there, of zeros."""
    x, w, bias = kept
    rows, b = dy.shape[0], get_backend("jax")
    dw = jax.tree.map(lambda a: jnp.zeros(a.shape, jax.dtypes.float0), w)._replace(scale=jnp.zeros_like(w.scale))
    if isinstance(dy, SymbolicZero):
        return jnp.zeros((rows, x.shape[1]), x.dtype), dw, None if bias is None else jnp.zeros_like(bias)
    dx = derivative.of_x(_product, dy, w, reproducible=reproducible, spec=spec, contract=contract)
    if x.shape[0] == rows:
        dw = dw._replace(scale=derivative.of_scale(x, dy, w, spec=spec, contract=contract, vjp=jax.vjp, b=b))
    return dx, dw, None if bias is None else derivative.of_bias(dy, w.scale.dtype, bias.dtype, b)


_product.defvjp(_forward, _backward, symbolic_zeros=True)


# ---- weights as they are stored


class _Stored(NamedTuple):
    """What such a product is told beside its operands: as ``reference.matmul_stored`` is."""

    spec: Spec
    contract: int
    packed_length: int | None
    swapped: bool


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stored_product(reproducible: bool, static: _Stored, x: Array, w: Coded, bias: Array | None) -> Array:
    return _mapping_of_stored(reproducible, static)(x, w, bias)


@functools.cache
def _mapping_of_stored(reproducible: bool, static: _Stored) -> Callable[..., Array]:
    def product(x: Array, w: Coded, bias: Array | None) -> Array:
        spec, contract, packed_length, swapped = static
        ordered = _in_order(w, swapped)
        plain = partial(_FORMS[reproducible, contract].reference, **static._asdict(), b=get_backend("jax"))
        of_ordered = partial(plain, swapped=False)
        y = NotImplemented
        if not reproducible:
            y = _of_values(x, ordered, bias, spec, contract, packed_length)
        elif contract == 0:
            y = _by_columns(x, ordered, bias, spec, packed_length, of_ordered)
        if y is not NotImplemented:
            return y
        if _goes_along_rows(reproducible, x, w, spec, contract, packed_length is not None):
            return _along_rows(reproducible, x, ordered, bias, spec, contract, packed_length)

        def otherwise() -> Array:
            in_blocks = _added_in_blocks if contract == 0 else _in_blocks  # turned here: else it would be at each call
            return in_blocks(of_ordered, x, _in_order(w, swapped), bias, spec)

        y = _by_loops(reproducible, x, w, bias, spec, contract, packed_length, otherwise, swapped)
        return plain(x, w, bias) if y is NotImplemented else y

    return _rows_at_once(product)


def _stored_in_steps(reproducible: bool, static: _Stored, x: Array, w: Coded, bias: Array | None) -> Array:
    """The same in operations that have derivatives."""
    b = get_backend("jax")
    if not reproducible:
        return reference.matmul_stored(x, w, bias, **static._asdict(), b=b)
    w = reference.in_order(w, static.swapped, b)
    w, plain = reference.stored_as_integers(w, spec=static.spec, packed_length=static.packed_length, b=b)
    return _product(True, plain, static.contract, x, w, bias)


def _stored_forward(reproducible: bool, static: _Stored, *operands: Any) -> Any:
    return _stored_product(reproducible, static, *operands), operands


def _stored_backward(reproducible: bool, static: _Stored, operands: Any, dy: Any) -> Any:
    return jax.vjp(partial(_stored_in_steps, reproducible, static), *operands)[1](dy)


_stored_product.defvjp(_stored_forward, _stored_backward)
_jitted_stored = jax.jit(_stored_product, static_argnums=(0, 1))


def _stored(reproducible: bool) -> Callable[..., Any]:
    """A product with a stored weight: as NumPy does it where all is small and in memory, else where the loops serve."""

    def as_numpy_does(*arrays: Any, b: Backend, **static: Any) -> Any:
        return offered(b, _FORMS[reproducible, 1].reference, *arrays, **static)

    of_small = in_memory(as_numpy_does)

    def kernel(
        x: Array,
        w: Coded,
        bias: Array | None,
        *,
        spec: Spec,
        contract: int,
        packed_length: int | None,
        swapped: bool = False,
    ) -> Any:
        static = _Stored(spec, contract, packed_length, swapped)
        if reproducible or w.codes.size < SMALLEST_FOR_LOOPS:
            y = of_small(x, w, bias, **static._asdict())
            if y is not NotImplemented:
                return y
        told = w, spec, contract, packed_length is not None
        form = _FORMS[reproducible, contract]
        served = _is_served(form, x, *told)
        if packed_length is None and reproducible:  # others are integers with plain scales first
            served = served or (contract == 0 and _goes_by_columns(x, _in_order(w, swapped), spec, None))
        else:
            served = served or _goes_along_rows(reproducible, x, *told)
        if not served and (reproducible or form.loops() is None or not _is_worth_values(x, *told)):
            return NotImplemented
        return _jitted_stored(reproducible, static, x, w, bias)

    return kernel


# ---- the table


_jitted = jax.jit(_product, static_argnums=(0, 1, 2))


def _kernel(reproducible: bool) -> Callable[..., Array]:
    # XLA would compile most of a second for them
    of_small = in_memory(reference.matmul_reproducible if reproducible else reference.matmul)

    def serves(x: Array, w: Coded, contract: int) -> bool:
        if (
            reproducible or w.codes.size >= SMALLEST_FOR_LOOPS
        ):  # fast ones by loops have the bits of the same in programs
            return reproducible
        few = _is_known(x.shape[0]) and x.shape[0] <= serve.MOST_ROWS_FOR_LOOPS
        return few and w.zero_point is None and w.scale.shape[contract] == 1  # others take NumPy longer than XLA

    def kernel(x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int) -> Array:
        y = of_small(x, w, bias, spec=spec, contract=contract) if serves(x, w, contract) else NotImplemented
        if y is not NotImplemented:
            return y
        return _jitted(reproducible, spec, contract, x, w, bias)

    return kernel


def _quantized(operation: Callable[..., Any], form: Callable[..., Any], packed: bool) -> Callable[..., Any]:
    """Quantization of arrays in memory, and of what is traced, by the loops where they serve."""
    eager = in_memory(operation, form)

    def kernel(x: Array, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
        w = eager(x, key, spec=spec, recipe=recipe)
        traced = isinstance(x, jax.core.Tracer) or is_tracing()
        if w is not NotImplemented or not traced or not all(map(_is_known, x.shape)) or x.size < runtime.LARGE:
            return w
        loops = encoding_loops()
        if loops is None or not loops.serves(x, spec, recipe, packed):
            return NotImplemented
        return loops.quantize(x, spec=spec, recipe=recipe, packed=packed)

    return kernel


def _loops_of_values(w: Coded, spec: Spec, length: int | None, out: str | None) -> Any:
    """The loops that make all values, where they serve and these are worth it; else None."""
    shape = w.codes.shape if length is None else (*w.codes.shape[:-1], length)
    if not all(map(_is_known, shape)) or math.prod(shape) < runtime.LARGE:
        return None
    loops = decoding_loops()
    if loops is None or jax.sharding.get_abstract_mesh().manual_axes:
        return None
    return loops if loops.serves_values(w, spec, length, out or spec.source.name) else None


def _at_once(w: Coded, *, spec: Spec, length: int | None, out: str) -> Any:
    loops = _loops_of_values(w, spec, length, out)
    return NotImplemented if loops is None else loops.dequantize(w, spec, length)


def _is_traced(w: Coded) -> bool:
    return is_tracing() or any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves(w))


def _dequantized(operation: Callable[..., Any], form: Callable[..., Any]) -> Callable[..., Any]:
    """Values of arrays in memory: of large ones by loops that XLA calls, which then copies nothing."""
    eager = in_memory(operation, form)

    def kernel(w: Coded, **static: Any) -> Any:
        if not isinstance(w.codes, jax.core.Tracer) and w.codes.size >= SMALLEST_FOR_XLA and not _is_traced(w):
            spec, length, out = (static.get(name) for name in ("spec", "length", "out"))
            assert spec is not None
            if (loops := _loops_of_values(w, spec, length, out)) is not None:
                values, unserved = loops.dequantized(w, spec=spec, length=length)
                if not unserved:
                    return values
        return eager(w, **static)

    return kernel


@functools.cache
def encoding_loops() -> Any:
    """The primitives around the loops that make codes, or None without numba."""
    if not _is_one_cpu() or runtime.encoding_loops() is None:
        return None
    from aqt_lite.backends.jax import encoding

    return encoding


_IN_MEMORY: dict[Callable[..., Any], Callable[..., Any] | None] = {
    **quantize.FORMS,
    affine.scales_of: None,
    significant.bitrounded: None,
    reference.in_integers: in_integers,
    reference.sums_of_codes: None,
    reference.matmul_integer: None,
    _clipping.clipped: None,
    _clipping.beyond: None,
    _clipping.count_clipped: None,
    _clipping.count_beyond: None,
    packing.pack: None,
    packing.unpack: None,
}

KERNELS: Kernels = {
    **{op: Kernel(keeping_shardings(in_memory(op, form)), anything) for op, form in _IN_MEMORY.items()},
    affine.quantize: Kernel(keeping_shardings(_quantized(affine.quantize, quantize.quantize, False)), anything),
    affine.dequantize: Kernel(keeping_shardings(_dequantized(affine.dequantize, quantize.dequantize)), anything),
    dequantize_at_once: Kernel(keeping_shardings(_at_once), anything),
    dequantize_stored: Kernel(keeping_shardings(_dequantized(dequantize_stored, quantize.dequantize_stored)), anything),
    quantize_stored: Kernel(keeping_shardings(_quantized(quantize_stored, quantize.quantize_stored, True)), anything),
    reference.matmul: Kernel(keeping_shardings(_kernel(reproducible=False))),
    reference.matmul_stored: Kernel(_stored(reproducible=False), anything),
    reference.matmul_reproducible_stored: Kernel(_stored(reproducible=True), anything),
    reference.matmul_reproducible: Kernel(keeping_shardings(_kernel(reproducible=True))),
    reference.integer_matmul: Kernel(integer_matmul, anything),
}
