"""JAX's functions of arrays, any of which may be quantized: what models call, with the same arguments.

Owns: ``dot_general``, ``einsum``, ``conv_general_dilated`` and ``take``, and ``dequantize`` for programs that want all
values. Imports: the products over any axes, the container. ``aqt_lite.jax`` is where users find them.

Without a QArray among the arguments each of JAX's functions is what it is. ``precision`` says nothing here: products
with a quantized array are as exact as those of float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from aqt_lite import ops
from aqt_lite._dispatch import offered
from aqt_lite._into import dequantize_at_once
from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Array
from aqt_lite.backends.jax.eager import is_tracing
from aqt_lite.elements import float_type
from aqt_lite.qarray import QArray

__all__ = ["conv_general_dilated", "dequantize", "dot_general", "einsum", "take"]


@naming_the_argument
def dot_general(
    lhs: Any,
    rhs: Any,
    dimension_numbers: ops.DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    mode: ops.Mode = "fast",
    activations: str | None = None,
) -> Array:
    """``jax.lax.dot_general``, of which one side may be a QArray.

    Parameters
    ----------
    lhs, rhs, dimension_numbers, precision, preferred_element_type
        As JAX has them. The result has the dtype of the side that is an array, unless ``preferred_element_type`` says
        otherwise.
    out_sharding
        None, where a side is quantized: constrain the result instead.
    mode, activations
        As for :func:`aqt_lite.ops.dot_general`, which says what stays quantized.

    Examples
    --------
    >>> import jax.numpy as jnp, aqt_lite.jax
    >>> w = aqt_lite.quantize(jnp.ones((8, 4, 16)), granularity=aqt_lite.PerBlock((-1, 1, 1)))
    >>> aqt_lite.jax.dot_general(jnp.ones((3, 8)), w, (((1,), (0,)), ((), ()))).shape
    (3, 4, 16)
    """
    if not isinstance(lhs, QArray) and not isinstance(rhs, QArray):
        return lax.dot_general(
            lhs, rhs, dimension_numbers, precision, preferred_element_type, out_sharding=out_sharding
        )
    check_no_sharding("dot_general", out_sharding)
    if not isinstance(lhs, QArray):
        y = ops.dot_general(jnp.asarray(lhs), rhs, dimension_numbers, mode=mode, activations=activations)
        return _as_asked(y, preferred_element_type)
    _check_one("dot_general", lhs, rhs)
    turned: Any = tuple(tuple(reversed(pair)) for pair in dimension_numbers)
    y = ops.dot_general(jnp.asarray(rhs), lhs, turned, mode=mode, activations=activations)
    batch, free = len(turned[1][0]), jnp.ndim(rhs) - sum(len(axes[0]) for axes in turned)
    y = jnp.moveaxis(y, range(batch, batch + free), range(y.ndim - free, y.ndim))  # those of the left side come first
    return _as_asked(y, preferred_element_type)


@naming_the_argument
def einsum(
    subscripts: str,
    /,
    *operands: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
    mode: ops.Mode = "fast",
    activations: str | None = None,
    **others: Any,
) -> Array:
    """``jax.numpy.einsum``, of which one of two operands may be a QArray; see :func:`aqt_lite.einsum`.

    Examples
    --------
    >>> import jax.numpy as jnp, aqt_lite.jax
    >>> w = aqt_lite.quantize(jnp.ones((8, 4, 16)), granularity=aqt_lite.PerBlock((-1, 1, 1)))
    >>> aqt_lite.jax.einsum("bi,ihd->bhd", jnp.ones((3, 8)), w).shape
    (3, 4, 16)
    """
    if not any(isinstance(a, QArray) for a in operands):
        settings = {"precision": precision, "preferred_element_type": preferred_element_type, **others}
        plain: Any = jnp.einsum  # whose overloads tell apart what is passed on here
        y: Array = plain(subscripts, *operands, out_sharding=out_sharding, **settings)
        return y
    check_no_sharding("einsum", out_sharding)
    if others:
        raise TypeError(f"einsum with a QArray has no argument {next(iter(others))!r}")
    if len(operands) != 2:
        raise TypeError(f"einsum with a QArray takes two operands, not {len(operands)}: multiply the others before")
    operands = tuple(a if isinstance(a, QArray) else jnp.asarray(a) for a in operands)
    return _as_asked(ops.einsum(subscripts, *operands, mode=mode, activations=activations), preferred_element_type)


@naming_the_argument
def dequantize(q: QArray, dtype: Any = None) -> Array:
    """``q.dequantize(dtype)`` where a program wants all values, in memory of their own: the same bits.

    ``q.dequantize()`` in a program is XLA's own code, and fuses with what follows: with a look-up, a part, a cast, XLA
    makes no more than is asked for. Where all values are read, as by a product, most of its time goes into memory that
    nobody has touched. Compiled loops take a quarter of it: on one CPU, for float32, 2^17 codes of up to
    8 bits and more, in groups of 8 and more along the last axis or with a scale for each row or for all, in the order
    in which they were quantized. Elsewhere, and where this is differentiated, mapped over or exported, it is
    ``q.dequantize(dtype)``.

    Parameters
    ----------
    q : QArray
    dtype : float type, optional
        Of the values; by default that of those that were quantized.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, aqt_lite.jax
    >>> w = aqt_lite.quantize(jnp.eye(2), granularity=aqt_lite.PerChannel(0))
    >>> jax.jit(lambda x, w: x @ aqt_lite.jax.dequantize(w))(jnp.ones((1, 2)), w)
    Array([[1., 1.]], dtype=float32)
    """
    if not isinstance(q, QArray):
        raise TypeError(f"dequantize: q is a {type(q).__name__}: give a QArray, as aqt_lite.quantize makes it")
    b, q = q._backend, q._checked()
    traced = b.name == "jax" and (is_tracing() or any(map(b.is_traced, q._arrays())))
    if traced and not q.transposed and (dtype is None or float_type(dtype).name == q.float_dtype):
        w, length = q._qparams().beside(q.storage), q.packed_length
        values = offered(b, dequantize_at_once, w, spec=q._spec, length=length, out=q.float_dtype)
        if values is not NotImplemented:
            return values
    return q.dequantize(dtype)


@naming_the_argument
def take(a: Any, indices: Any, axis: int | None = None) -> Array:
    """``jax.numpy.take``: rows of a quantized table, of which only those that are looked up are dequantized.

    Parameters
    ----------
    a : array or QArray
    indices : integers, of any shape
        Negative ones count from the end. What lies outside is an IndexError, or, where values are not known because JAX
        traces, NaN, as in ``jax.numpy.take``.
    axis : int
        Where it has groups, each slice has the scale of its own.

    Returns
    -------
    array
        In the dtype of the values that were quantized.

    Examples
    --------
    >>> import jax.numpy as jnp, aqt_lite.jax
    >>> table = aqt_lite.quantize(jnp.eye(3), granularity=aqt_lite.PerChannel(0))
    >>> aqt_lite.jax.take(table, jnp.asarray([2, 0]), axis=0)
    Array([[0., 0., 1.],
           [1., 0., 0.]], dtype=float32)
    """
    if not isinstance(a, QArray):
        return jnp.take(a, indices, axis=axis)
    if axis is None:
        raise ValueError("take of a QArray: say axis=; without it, rows would be torn apart")
    indices = jnp.asarray(indices)
    rows = a.take(indices, axis).dequantize()
    if not isinstance(indices, jax.core.Tracer):
        return rows
    length = a.shape[axis]
    inside = (indices >= -length) & (indices < length)
    at = axis % a.ndim
    return jnp.where(jnp.expand_dims(inside, [*range(at), *range(at + inside.ndim, rows.ndim)]), rows, jnp.nan)


@naming_the_argument
def conv_general_dilated(
    lhs: Any,
    rhs: Any,
    window_strides: Any,
    padding: Any,
    lhs_dilation: Any = None,
    rhs_dilation: Any = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
    activations: str | None = None,
) -> Array:
    """``jax.lax.conv_general_dilated``, whose kernel ``rhs`` may be a QArray.

    Parameters
    ----------
    lhs, rhs, window_strides, ...
        As JAX has them.
    out_sharding
        None, where the kernel is quantized.
    activations : str, optional
        As for :func:`aqt_lite.ops.dot_general`; only where windows do not overlap.

    Notes
    -----
    Where windows neither overlap nor are padded (kernels of one element, patches of an image) the convolution is a
    product, and the kernel stays quantized. Any other is dequantized at each call: that saves memory, not time.

    Examples
    --------
    >>> import jax.numpy as jnp, aqt_lite.jax
    >>> kernel = aqt_lite.quantize(jnp.ones((8, 3, 4, 4)), granularity=aqt_lite.PerChannel(0))
    >>> aqt_lite.jax.conv_general_dilated(jnp.ones((1, 3, 32, 32)), kernel, (4, 4), "VALID").shape
    (1, 8, 8, 8)
    """
    settings = {
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
    }
    if isinstance(lhs, QArray):
        raise TypeError("conv_general_dilated: lhs is a QArray; the kernel, rhs, may be one: pass lhs.dequantize()")
    if not isinstance(rhs, QArray):
        return lax.conv_general_dilated(lhs, rhs, window_strides, padding, out_sharding=out_sharding, **settings)
    check_no_sharding("conv_general_dilated", out_sharding)
    lhs = jnp.asarray(lhs)
    ones = (1,) * (rhs.ndim - 2)
    plain = feature_group_count == batch_group_count == 1
    if plain and tuple(lhs_dilation or ones) == ones and tuple(rhs_dilation or ones) == ones:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        window = tuple(rhs.shape[a] for a in numbers.rhs_spec[2:])
        lengths = tuple(lhs.shape[a] for a in numbers.lhs_spec[2:])
        pads = lax.padtype_to_pads(lengths, window, window_strides, padding) if isinstance(padding, str) else padding
        if window == tuple(window_strides) and not np.any(pads):
            y = _of_windows(lhs, rhs, numbers, window, activations)
            return _as_asked(y, preferred_element_type)
    if activations is not None:
        raise ValueError(
            f"activations={activations!r}: this convolution is no product of rows, since its windows overlap, are "
            "padded or dilated, or its channels are grouped"
        )
    values = dequantize(rhs).astype(lhs.dtype)
    return lax.conv_general_dilated(lhs, values, window_strides, padding, **settings)


def _of_windows(x: Array, w: QArray, numbers: Any, window: tuple[int, ...], activations: str | None) -> Array:
    """The convolution whose windows lie side by side: each axis of space in two, of which the second is summed over."""
    batch, feature, *space = numbers.lhs_spec
    _, of_feature, *of_space = numbers.rhs_spec
    counts = [x.shape[a] // n for a, n in zip(space, window, strict=True)]
    for a, n, count in zip(space, window, counts, strict=True):
        x = lax.slice_in_dim(x, 0, n * count, axis=a)
    x = jnp.transpose(x, (batch, *space, feature))
    pairs = [length for pair in zip(counts, window, strict=True) for length in pair]
    x = x.reshape(x.shape[0], *pairs, x.shape[-1])
    inside = (*range(2, 2 * len(window) + 1, 2), x.ndim - 1)
    y = ops.dot_general(x, w, ((inside, (*of_space, of_feature)), ((), ())), activations=activations)
    place = numbers.out_spec  # batch, feature, space
    return jnp.moveaxis(y, (0, y.ndim - 1, *range(1, y.ndim - 1)), place)


def _as_asked(y: Array, dtype: Any) -> Array:
    return y if dtype is None else y.astype(dtype)


def check_no_sharding(name: str, out_sharding: Any) -> None:
    """ValueError where it is given to what has no such argument for a quantized array."""
    if out_sharding is not None:
        raise ValueError(
            f"{name} with a QArray has no out_sharding: use jax.lax.with_sharding_constraint, or jax.reshard, of the "
            "result"
        )


def _check_one(name: str, lhs: Any, rhs: Any) -> None:
    if isinstance(lhs, QArray) and isinstance(rhs, QArray):
        raise TypeError(f"{name} of two QArrays: dequantize one of them, or use aqt_lite.dense")
