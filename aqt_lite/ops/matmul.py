"""``dense`` and ``linear``: they check arguments and choose the form of the product.

Owns: validation, the choice between float and integer products, and leading axes. Imports: everything below it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from aqt_lite import affine
from aqt_lite._arguments import as_float_array, check_floats
from aqt_lite._blocks import spread
from aqt_lite._dispatch import kernel_for, kernel_of_weight, run
from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Array, Numbers
from aqt_lite._near import nearest, one_of
from aqt_lite._protocol import Backend
from aqt_lite._registry import backend_of
from aqt_lite._shapes import register_products
from aqt_lite._ways import not_a_qarray
from aqt_lite.formats import FORMATS, element_type
from aqt_lite.ops import reference
from aqt_lite.qarray import QArray

__all__ = ["Mode", "as_operand", "as_stored", "dense", "in_integers", "linear", "may_go_as_stored", "product"]

Mode = Literal["fast", "reproducible", "integer"]
_MODES: tuple[Mode, ...] = ("fast", "reproducible", "integer")


@naming_the_argument
def dense(x: Numbers | QArray, w: QArray, bias: Numbers | None = None, *, mode: Mode = "fast") -> Array:
    """``x @ w + bias`` with a quantized weight of shape (in, out), as in Flax and Keras.

    Parameters
    ----------
    x : array, list or QArray, shape (..., in)
        Floating-point activations: products accumulate in float32, or in float64 where ``x`` or ``w`` is float64. A
        QArray with one scale a row (or one in all) is multiplied in integers where the weight, too, has one scale a
        column; otherwise it is dequantized.
    w : QArray, shape (in, out)
        Any granularity.
    bias : array, shape (out,), optional
    mode : {"fast", "reproducible", "integer"}
        "fast": as exact as the backend's own float32 product. "reproducible": the same bits on every backend and
        in every order of summation (docs/numerics.md), for numbers that are integers of up to 8 bits, times a unit, and
        float16, bfloat16 or float32 values. "integer": of two QArrays, the exact int32 sums of codes less their zero
        points, before any scale.

    Returns
    -------
    array, shape (..., out)
        In the dtype of ``x`` (of the values it stands for, where ``x`` is a QArray).

    Raises
    ------
    TypeError
        ``w`` is no QArray; arguments of different backends; dtypes that are no floats.
    ValueError
        Shapes or devices that do not fit; a float16 result that overflows; a mode that this weight cannot have.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> w = aqt_lite.quantize(np.asarray([[1.0, -2.0], [0.5, 4.0], [0.0, 1.0]], "float32"))  # 3 in, 2 out
    >>> aqt_lite.dense([1.0, 2.0, 3.0], w).shape
    (2,)
    """
    return product("dense", x, w, bias, mode, contract=0)


@naming_the_argument
def linear(x: Numbers | QArray, w: QArray, bias: Numbers | None = None, *, mode: Mode = "fast") -> Array:
    """``x @ w.T + bias`` with a quantized weight of shape (out, in), as in torch; all else as :func:`dense`.

    Examples
    --------
    >>> import aqt_lite
    >>> w = aqt_lite.quantize([[-2, -1.13, 0.42], [-1.51, 0.25, 1.62], [0.23, 1.35, 2.15]])
    >>> aqt_lite.linear([1, 2, 3], w).round(4)
    array([-2.9965,  3.8768,  9.3957], dtype=float32)
    """
    return product("linear", x, w, bias, mode, contract=1)


def product(name: str, x: Any, w: Any, bias: Any, mode: str, contract: int) -> Array:
    """``dense`` or ``linear``, by the axis of ``w`` that is summed over; ``name`` is who asks."""
    one_of("mode", mode, _MODES)
    if isinstance(bias, str):
        raise TypeError(
            f"bias={bias!r} is text: the third argument of {name} is the bias, an array of shape (out,), or None; mode "
            f"goes by name, {name}(x, w, mode={nearest(bias, _MODES) or 'fast'!r})"
        )
    if not isinstance(w, QArray):
        raise TypeError(not_a_qarray("w", w))
    b = w._backend
    ready = _ready(w, b)
    if ready is None:
        w = w._checked()
    w_shape = w.shape if ready is None else ready.shape
    if name in _OTHER and len(w_shape) == 2 and w_shape[0] == w_shape[1]:
        _warn_of_the_other(name, w, contract)
    if len(w_shape) != 2:
        raise ValueError(
            f"w has shape {w_shape}: {name} takes a 2-dimensional weight; map over leading axes (vmap, scan)"
        )
    if mode == "integer" and (not isinstance(x, QArray) or bias is not None):
        what = "x is an array of floats" if bias is None else "a bias is added to scaled sums"
        raise ValueError(f"mode='integer' is the product of the codes of two QArrays, without a bias: {what}")
    if not isinstance(x, QArray):
        x = as_operand(x, "x", w, b)
    elif x.backend != b.name:
        raise TypeError(f"x is a {x.backend} QArray but w is a {b.name} one: move one with .to_backend()")
    inside, outside = w_shape[contract], w_shape[1 - contract]
    shape = tuple(x.shape)
    if not shape or shape[-1] != inside:
        roles = "(in, out)" if contract == 0 else "(out, in)"
        others = "linear(x, w), or x @ w.T, reads w as (out, in)", "dense(x, w), or x @ w, reads w as (in, out)"
        way = f"; aqt_lite.{others[contract]}" if shape and shape[-1] == outside else ""
        raise ValueError(
            f"x has shape {shape} and w {w_shape} {roles}: the last axis of x must have length {inside}{way}"
        )
    if bias is not None:
        bias = as_operand(bias, "bias", w, b)
        if tuple(bias.shape) != (outside,):
            raise ValueError(f"bias has shape {tuple(bias.shape)}: for w of shape {w_shape} it must be ({outside},)")
    if isinstance(x, QArray):
        y = _quantized_product(x, w, bias, mode, contract, b)
    else:
        rows = x if len(shape) == 2 else b.xp.reshape(x, (math.prod(shape[:-1]), inside))
        y = _float_product(rows, w, bias, mode, contract, b, ready)
    if len(shape) != 2:
        y = b.xp.reshape(y, (*shape[:-1], outside))
    if b.dtype_name(y) == "float16" and not b.is_traced(y):
        y = _without_overflow(y, x, bias, b)
    return y


def _without_overflow(y: Array, x: Any, bias: Array | None, b: Backend) -> Array:
    """``y``; ValueError where it has infinities that are none of its operands'."""
    xp, own = b.xp, y
    if not b.is_deferred(y):
        if not bool(xp.any(xp.isinf(y))):
            return y
        if not isinstance(x, QArray) and bool(xp.any(xp.isinf(x))):
            own = xp.where(xp.all(xp.isfinite(x), axis=-1, keepdims=True), own, xp.zeros_like(own))
        if bias is not None and bool(xp.any(xp.isinf(bias))):
            own = xp.where(xp.isfinite(bias), own, xp.zeros_like(own))
    checked = b.check_no_overflow(own, "float16")
    return checked if own is y else y


_OTHER = {
    "dense": ("linear", "(in, out)", "(out, in)", "x @ w"),
    "linear": ("dense", "(out, in)", "(in, out)", "x @ w.T"),
}
"""Which function a square weight may have been made for, how each of the two reads it, and what leaves no doubt."""


def _warn_of_the_other(name: str, w: QArray, contract: int) -> None:
    """A warning where a square weight looks as if it had been made for the other of ``dense`` and ``linear``."""
    other, here, there, plainly = _OTHER[name]
    size, length = w.block[1 - contract], w.shape[0]
    for_each_input = w.scale is not None and w.block[contract] == 1 and length > 1
    if w.transposed:
        if name == "dense" or "_turned" in w.__dict__:
            return
        why = "is stored as for_dense() does"
    elif for_each_input and size is not None and 1 < size < length:
        why = f"then has groups of {size} along its outputs, and a scale for each input"
    elif for_each_input and (size is None or size >= length):
        why = "then has a scale for each input, and none for each output"
    else:
        return
    warnings.warn(
        f"{name} reads w, which {why}, as {here}; its shape {w.shape} does not tell whether that is meant: "
        f"{other}(x, w) reads it as {there}, and {plainly} leaves no doubt that it is meant as {here}",
        stacklevel=5,
    )


class _Ready(NamedTuple):
    """What products need of a weight that an eager one has checked: small products take microseconds in all."""

    state: tuple[Any, ...]
    shape: tuple[int, ...]
    weight: affine.Coded
    kernels: list[Callable[..., Any] | None]
    """``call(x, weight, bias)`` of ``reference.matmul``, or of ``matmul_stored`` where codes are packed, by the axis
    that is contracted."""
    reproducible: list[Callable[..., Any] | None]
    """The same of their reproducible forms; None where there is none, or none of this weight."""


def _state(w: QArray) -> tuple[Any, ...]:
    """What may change of arrays under one's hands (``t.data = ...``)."""
    codes, scale, zero = w.storage, w.scale, w.zero_point
    if isinstance(scale, QArray):
        scale = scale.storage
    of_scale = None if scale is None else (scale.dtype, scale.shape)
    return codes.dtype, codes.shape, of_scale, None if zero is None else (zero.dtype, zero.shape)


def _ready(w: QArray, b: Backend) -> _Ready | None:
    """Kept with a weight of plain integers or packed, from its first product on.

    Its scales are plain, too, or codes and nothing else where it is packed. None where it has to be looked at (again).
    """
    if b.is_traced(w.storage) or b.is_deferred(w.storage):
        return None
    known: _Ready | None = w.__dict__.get("_ready")
    if known is not None:
        trains = not isinstance(w.scale, QArray) and b.differentiates(w.scale)
        return known if known.state == _state(w) and not trains else None
    kept = w.scale
    if isinstance(kept, QArray) and (w.packed_length is None or kept.packed_length is not None or _has_more(kept)):
        return None
    if kept is None or w.offset is not None or w._checked() is not w or len(w.shape) != 2:
        return None
    operation: Callable[..., Any]
    if w.packed_length is None:
        operation, found, static = reference.matmul, in_integers(w), dict[str, Any]()
    else:
        operation, (found, static) = reference.matmul_stored, _packed(w)
    if found is None or found[0].codes is not w.storage:
        return None
    weight, spec = found
    numbers, own = (weight.scale.codes, kept.storage) if isinstance(kept, QArray) else (weight.scale, kept)
    if not _is_seen(numbers, own) or not _is_seen(weight.zero_point, w.zero_point):  # other arrays would be kept
        return None

    def kernels(operation: Callable[..., Any]) -> list[Callable[..., Any] | None]:
        return [kernel_of_weight(b, operation, weight, {"spec": spec, "contract": c, **static}) for c in (0, 1)]

    of_same_bits = reference.matmul_reproducible_stored if static else reference.matmul_reproducible
    axes = (1, 0) if w.transposed else (0, 1)  # of the weight as it looks, where codes lie along these
    reproducible = [
        kernel if 0 not in w.shape and _why_not_reproducible(w, axis) is None else None
        for kernel, axis in zip(kernels(of_same_bits), axes, strict=True)
    ]
    w.__dict__["_ready"] = known = _Ready(_state(w), w.shape, weight, kernels(operation), reproducible)
    return known


def _is_seen(array: Array | None, own: Array | None) -> bool:
    """Whether one array is the other, or a view of its memory that stays one: whatever is written there, both have."""
    base = getattr(array, "base", None)
    return array is own or (base is not None and (base is own or base is getattr(own, "base", None)))


def _has_more(scale: QArray) -> bool:
    """Whether scales that are kept as codes are more than these, one for each of the weight's."""
    return scale._has_groups or any(leaf is not None for leaf in (scale.scale, scale.zero_point, scale.offset))


def as_stored(w: QArray, *, packed: bool = False) -> tuple[affine.Coded, affine.Spec]:
    """A weight's arrays and their meaning, in the order in which codes are stored.

    ``packed``: codes as they are kept, and traced scales unseen. Else codes are one an item, and scales that are not
    positive NaN.
    """
    weight, spec = _as_kept(w, packed=packed)
    return reference.in_order(weight, bool(w.transposed), w._backend), spec


def _as_kept(w: QArray, *, packed: bool) -> tuple[affine.Coded, affine.Spec]:
    """The same with scales as they are: of ``w.transposed``, their axes are in the other order."""
    scale, zero_point, offset, _ = w._qparams(masked=not packed or w.trainable)
    spec = replace(w._spec, block=w._spec.block[::-1]) if w.transposed else w._spec
    return affine.Coded(w.storage if packed else w._stored_codes(), scale, zero_point, offset), spec


def _keeps_scales_swapped(w: QArray) -> bool:
    """Whether scales lie in memory with their axes in the other order than those of the codes.

    Not those of a transposed array, ``q.T``: turned back, they are what they were, which a compiler knows. Nor where
    ``for_dense`` could lay them out as it does codes.
    """
    if not w.transposed or "_turned" in w.__dict__ or (isinstance(w.scale, QArray) and bool(w.scale.transposed)):
        return False
    numbers = w.scale.storage if isinstance(w.scale, QArray) else w.scale
    return numbers is None or not w._backend.is_by_columns(numbers)


def in_integers(w: QArray) -> tuple[affine.Coded, affine.Spec] | None:
    """The same with integer codes of 8 or 16 bits and plain scales, where all numbers are whole multiples of a unit."""
    element = element_type(w.dtype)
    native = FORMATS.get(element.storage)
    whole = element.unit is not None or (native is not None and native.element == element)
    if not whole or w.scale is None or w.offset is not None:
        return None
    weight, spec = as_stored(w)
    return reference.as_integers(weight, spec=spec, b=w._backend)


def may_go_as_stored(w: QArray, mode: str, contract: int) -> bool:
    """Whether a product may read packed codes and kept scales as they are.

    So it is where codes are packed, in groups, or look up numbers that are no multiples of one.
    """
    if w.scale is None or (isinstance(w.scale, QArray) and w.scale._has_groups):  # groups' scales must not become 0
        return False
    if w.packed_length is not None or not w.scale.ndim:
        return w.packed_length is not None
    return bool(w.scale.shape[contract] > 1) or (mode == "fast" and element_type(w.dtype).unit is None)


def _stored_product(
    operation: Callable[..., Any], x: Array, w: QArray, bias: Array | None, contract: int, b: Backend
) -> Any:
    """The product with packed codes and kept scales as they are, where the backend has a kernel for that."""
    kernel = kernel_for(b, operation, {"contract": contract})
    if kernel is None:
        return NotImplemented
    (weight, spec), static = _packed(w)
    return kernel(x, weight, bias, spec=spec, contract=contract, **static)


def _packed(w: QArray) -> tuple[tuple[affine.Coded, affine.Spec], dict[str, Any]]:
    """A weight as it is stored, and what ``reference.matmul_stored`` is told of that."""
    swapped = _keeps_scales_swapped(w)
    weight = _as_kept(w, packed=True) if swapped else as_stored(w, packed=True)
    return weight, {"packed_length": w.packed_length, "swapped": swapped}


def _float_product(
    x: Array, w: QArray, bias: Array | None, mode: str, contract: int, b: Backend, ready: _Ready | None = None
) -> Array:
    stored = 1 - contract if w.transposed else contract
    declined = False  # by the kernel that would be asked below
    if mode == "reproducible":
        kernel = None if ready is None else ready.reproducible[stored]
        if kernel is not None and not _any_is_float64(x, bias, b) and x.shape[0]:
            y = kernel(x, ready.weight, bias)  # type: ignore[union-attr]
            if y is not NotImplemented:
                return y
            declined = w.packed_length is None
        _check_reproducible(x, w, bias, contract, b)
    if ready is not None and mode == "fast":
        kernel = ready.kernels[stored]
        y = NotImplemented if kernel is None else kernel(x, ready.weight, bias)
        if y is not NotImplemented:
            return y
    elif not declined and may_go_as_stored(w, mode, contract):
        of_stored = reference.matmul_stored if mode == "fast" else reference.matmul_reproducible_stored
        y = _stored_product(of_stored, x, w, bias, stored, b)
        if y is not NotImplemented:
            return y
    found = in_integers(w)
    if found is None:
        weight, spec = as_stored(w)
        values = run(b, affine.dequantize, weight, spec=reference.unrounded(spec), out=spec.source.compute)
        return run(b, reference.matmul_of_values, x, values, bias, contract=stored)
    operation: Callable[..., Array] = reference.matmul
    if mode == "reproducible" and 0 not in (*x.shape, *w.shape):
        operation = reference.matmul_reproducible
    weight, spec = found
    if declined:
        return b.compiled(operation)(x, weight, bias, spec=spec, contract=stored, b=b)
    return run(b, operation, x, weight, bias, spec=spec, contract=stored)


def _quantized_product(x: QArray, w: QArray, bias: Array | None, mode: str, contract: int, b: Backend) -> Array:
    x = x._checked()
    rows, inside = math.prod(x.shape[:-1]), x.shape[-1]

    def product_of_values(mode: str) -> Array:
        return _float_product(b.xp.reshape(x.dequantize(), (rows, inside)), w, bias, mode, contract, b)

    integers = (
        element_type(x.dtype).unit is not None
        and element_type(w.dtype).unit is not None
        and x.scale is not None
        and w.scale is not None
        and x.offset is None
        and w.offset is None
        and x.scale.shape[-1] == w.scale.shape[contract] == 1
        and "float64" not in (x.float_dtype, w.float_dtype)
        and inside < (1 << 31) // (1 << (7 + (x.zero_point is not None)) + (7 + (w.zero_point is not None)))
        and 0 not in (*x.shape, *w.shape)
    )
    if not integers and mode == "integer":
        raise ValueError(
            f"mode='integer' is not possible: x is {x.dtype} with {x.granularity}, w {w.dtype} with {w.granularity}; "
            f"it takes integers of up to 8 bits, one scale a row of x and one an output of w, and sums that int32 holds"
        )
    if not integers:
        return product_of_values(mode)
    left, right = in_integers(replace(x, storage=x.qvalue, transposed=False, packed_length=None)), in_integers(w)
    assert left is not None
    assert right is not None
    (of_x, x_spec), (of_w, w_spec) = left, right
    stored = 1 - contract if w.transposed else contract

    def per_row(blocks: Array) -> Array:
        lead = spread(blocks, x.shape, x_spec.block, b.xp)
        return b.xp.reshape(b.xp.broadcast_to(lead, (*x.shape[:-1], 1)), (rows, 1))

    def per_column(blocks: Array) -> Array:
        return reference.one_per_column(blocks, tuple(of_w.codes.shape), w_spec.block, stored, b.xp)

    lhs = affine.Coded(
        b.xp.reshape(of_x.codes, (rows, inside)), per_row(of_x.scale), _unless_none(per_row, of_x.zero_point)
    )
    rhs = affine.Coded(of_w.codes, per_column(of_w.scale), _unless_none(per_column, of_w.zero_point))
    if mode == "integer":
        return run(b, reference.sums_of_codes, lhs, rhs, contract=stored)
    y = run(b, reference.matmul_integer, lhs, rhs, bias, contract=stored, out=x.float_dtype)
    if b.differentiates(of_x.scale, of_w.scale, bias):  # integers have no derivative: that of the values they stand for
        values = product_of_values("fast")
        y = b.straight_through(values, y, b.xp.isfinite(values))
    return y


def _unless_none(function: Callable[[Array], Array], array: Array | None) -> Array | None:
    return None if array is None else function(array)


def _any_is_float64(x: Array, bias: Array | None, b: Backend) -> bool:
    return b.dtype_name(x) == "float64" or (bias is not None and b.dtype_name(bias) == "float64")


def _check_reproducible(x: Array, w: QArray, bias: Array | None, contract: int, b: Backend) -> None:
    why = _why_not_reproducible(w, contract)
    if why is not None:
        size, way = w.block[1 - contract] or 0, "quantize w otherwise"
        if w.float_dtype == "float64":
            way = "quantize w from float32"
        elif why == _EACH_ITS_OWN.format(w.granularity):
            way = f"quantize w along its inputs, granularity=PerGroup({size if size > 1 else 32}, {contract})"
    else:
        wide = [name for name, a in (("x", x), ("bias", bias)) if a is not None and b.dtype_name(a) == "float64"]
        if not wide:
            return
        why = f"{' and '.join(wide)} {'has' if len(wide) == 1 else 'have'} dtype float64, which not every backend has"
        way = f"convert {' and '.join(wide)} to float32 first"
    raise ValueError(f"mode='reproducible' is not possible: {why}. Use mode='fast', or {way}")


_EACH_ITS_OWN = "w has {}: every product has a scale of its own, so that no sum of integers is left"


def _why_not_reproducible(w: QArray, contract: int) -> str | None:
    """Why a weight, whatever it is multiplied with, has no products with the same bits everywhere; None if it has."""
    why = None
    element = element_type(w.dtype)
    if element.bits > 8:
        why = f"w has {w.dtype} codes: sums of products with more than 8 bits do not fit 32-bit integers"
    elif element.missing is not None:
        why = f"w has {w.dtype} codes, one of which is a missing value: sums of integers have no NaN"
    elif element.unit is None:
        why = f"w has {w.dtype} codes, whose numbers are no whole multiples, of 8 bits, of a power of two"
    elif w.offset is not None or w.scale is None:
        why = "w has a real offset, which is added to every product" if w.offset is not None else "w has no scales"
    elif w.float_dtype == "float64":
        why = "w was quantized from float64, so that its scales have dtype float64, which not every backend has"
    elif not reference.has_integer_sums(w.scale, contract, w.block[contract]):
        why = _EACH_ITS_OWN.format(w.granularity)
    return why


def as_operand(value: Any, argument: str, w: QArray, b: Backend) -> Array:
    """``value`` as a floating-point array of the weight's backend, on its device."""
    other = backend_of(value)
    if other is not None and other is not b:
        way = f"move one of them, for instance with w.to_backend({other.name!r})"
        if argument == "bias":  # x lies where w does
            way = f"give bias as an array of {b.name}"
        raise TypeError(f"{argument} is a {other.name} array but w is a {b.name} QArray: {way}")
    if other is None:  # a list belongs where the weight is
        return b.asarray(as_float_array(value, argument)[0], like=w.storage)
    check_floats(value, argument, b)
    if not b.share_a_device(value, w.storage):
        raise ValueError(f"{argument} is on device {b.device(value)} but w on {b.device(w.storage)}: move one of them")
    return value


def _right_product(x: Any, w: QArray) -> Array:
    """``x @ w``: ``dense``, of a weight that is (in, out) without a doubt."""
    return product("x @ q", x, w, None, "fast", contract=0)


def _left_product(w: QArray, x: Any) -> Array:
    """``w @ x`` of a vector or a matrix: ``linear``, whatever way the codes are stored."""
    b = w._backend
    x = as_operand(x, "x", w, b)
    if x.ndim not in (1, 2):
        raise ValueError(
            f"q @ x of a quantized matrix: x has shape {tuple(x.shape)}: give a vector or a matrix, or map (vmap)"
        )
    if x.ndim == 1:
        return product("q @ x", x, w, None, "fast", contract=1)
    return b.xp.permute_dims(product("q @ x", b.xp.permute_dims(x, (1, 0)), w, None, "fast", contract=1), (1, 0))


register_products(_right_product, _left_product)
