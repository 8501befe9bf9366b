"""The public functions: they check arguments, find the backend, and call the contract in ``affine``.

Owns: validation and the error messages. Imports: everything below it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from aqt_lite import affine
from aqt_lite._arguments import as_float_array, one_of
from aqt_lite._dispatch import run
from aqt_lite._foreign import refusal
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend, IntLimits
from aqt_lite._qparams import check_scale, check_zero_point
from aqt_lite._registry import backend_of, get_backend
from aqt_lite.elements import FLOAT_TYPES, INTEGER_TYPES, element_type, integer_type
from aqt_lite.granularity import Block, Granularity, PerChannel, PerTensor, block_of, grid_of
from aqt_lite.qarray import QArray

__all__ = ["choose_qparams", "dequantize", "fake_quantize", "int_limits", "quantize"]

Scheme = Literal["symmetric", "affine"]
Nonfinite = Literal["raise", "ignore"]

DIALECTS = ("aqt_lite",)
_PER_TENSOR = PerTensor()


def quantize(
    x: Any,
    dtype: Any = "int8",
    *,
    scheme: Scheme = "symmetric",
    granularity: Granularity = _PER_TENSOR,
    scale: Any = None,
    zero_point: Any = None,
    dialect: str = "aqt_lite",
    nonfinite: Nonfinite = "raise",
    backend: str | None = None,
) -> QArray:
    """Quantize an array to integer codes with a scale, and perhaps a zero point, for each block.

    Codes are ``clip(rint(x / scale) + zero_point)``, halves to even: the same bits on every backend (docs/numerics.md).
    Not differentiable; :func:`fake_quantize` is.

    Parameters
    ----------
    x : array of any backend, or nested list of numbers
        float16, bfloat16, float32 or float64, of any shape. Lists are taken as float32.
    dtype : str
        "int8", "uint8", "int16" or "uint16".
    scheme : {"symmetric", "affine"}
        Symmetric: zero has code 0 (the middle code of unsigned types) and codes reach equally far on both sides.
        Affine: the codes cover [min(x, 0), max(x, 0)], with a zero point.
    granularity : PerTensor, PerChannel, PerGroup or PerBlock
        Which elements share a scale.
    scale, zero_point : number or array, optional
        Use these and calibrate nothing. A number serves all blocks; an array has the shape of the grid of blocks (a
        1-dimensional one will do for ``PerChannel``). With a zero point, codes use the type's whole range.
    dialect : str
        Whose conventions; "aqt_lite" are this library's own.
    nonfinite : {"raise", "ignore"}
        NaN and infinities in ``x``: an error (under a tracing compiler, which cannot raise: NaN for the whole block;
        with Dask: when the chunk is computed), or statistics over the finite values, NaN coded as the zero point, and
        infinities saturating.
    backend : str, optional
        Move ``x`` to this backend first.

    Returns
    -------
    QArray
        On the backend and device of ``x``.

    Raises
    ------
    TypeError
        ``x`` is no floating-point array; arguments from different backends.
    ValueError
        Non-finite values; unusable scale or zero point; an unknown dtype, scheme, dialect or backend.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> x = np.asarray([[191.6, -13.5, 728.6], [92.14, 295.5, -184], [0, 684.6, 245.5]], "float32")
    >>> aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0)).qvalue
    array([[ 33,  -2, 127],
           [ 40, 127, -79],
           [  0, 127,  46]], dtype=int8)
    >>> aqt_lite.quantize(x, scale=3.5, zero_point=-70).qvalue[0]
    array([-15, -74, 127], dtype=int8)
    """
    call = _prepare(x, dtype, scheme, granularity, dialect, nonfinite, backend, scale, zero_point)
    x, b, spec = call.x, call.b, call.spec
    constant = b.stop_gradient(x)
    if call.scale is None:
        codes, s, z = run(b, "quantize", affine.quantize, constant, spec=spec)
    else:
        codes, s, z = run(b, "quantize_with", affine.quantize_with, constant, call.scale, call.zero_point, spec=spec)
    _check_finite(x, s, spec, b)
    return QArray(codes, s, z, spec.element.name, spec.block, spec.source.name)


def choose_qparams(
    x: Any,
    dtype: Any = "int8",
    *,
    scheme: Scheme = "symmetric",
    granularity: Granularity = _PER_TENSOR,
    dialect: str = "aqt_lite",
    nonfinite: Nonfinite = "raise",
    backend: str | None = None,
) -> tuple[Array, Array | None]:
    """Scale and zero point that :func:`quantize` would use for ``x``; parameters as there.

    Returns
    -------
    scale : array
        float32 (float64 for float64 input), in units of ``x`` per code, shape of the grid of blocks.
    zero_point : array or None
        int32, the code of 0.0, same shape; None where it is always 0.

    Examples
    --------
    >>> import aqt_lite
    >>> scale, zero_point = aqt_lite.choose_qparams([-1.0, 0.0, 3.0], "uint8", scheme="affine")
    >>> print(scale, zero_point)
    [0.01568628] [64]
    """
    call = _prepare(x, dtype, scheme, granularity, dialect, nonfinite, backend)
    constant = call.b.stop_gradient(call.x)
    scale, zero_point = run(call.b, "choose_qparams", affine.choose_qparams, constant, spec=call.spec)
    _check_finite(call.x, scale, call.spec, call.b)
    return scale, zero_point


def dequantize(q: QArray, dtype: Any = None) -> Array:
    """The values that the codes stand for: ``(qvalue - zero_point) * scale``.

    Parameters
    ----------
    q : QArray
    dtype : str, optional
        Floating-point type of the result; by default the type that was quantized. A wider type shows the product before
        it was rounded to a narrower source type.

    Raises
    ------
    ValueError
        A narrower ``dtype`` than the source's cannot hold a value (eager calls; traced ones give infinity).

    Examples
    --------
    >>> import aqt_lite
    >>> aqt_lite.dequantize(aqt_lite.quantize([0.0, 0.5, -127.0]))
    array([   0.,    0., -127.], dtype=float32)
    """
    if not isinstance(q, QArray):
        raise TypeError(f"q is a {type(q).__name__}, not a QArray: quantize it first, or use QArray.from_codes")
    return q.dequantize(dtype)


def fake_quantize(
    x: Any,
    dtype: Any = "int8",
    *,
    scheme: Scheme = "symmetric",
    granularity: Granularity = _PER_TENSOR,
    scale: Any = None,
    zero_point: Any = None,
    dialect: str = "aqt_lite",
    nonfinite: Nonfinite = "raise",
    backend: str | None = None,
) -> Array:
    """Quantize and dequantize, for training with quantization: the same bits as ``dequantize(quantize(x, ...))``.

    The gradient with respect to ``x`` goes straight through (Bengio et al. 2013, arXiv:1308.3432): 1 where ``x`` lies
    inside the range of the codes, 0 where it was clipped, as in ``torch.fake_quantize_per_tensor_affine``.
    Nothing flows into the scale or zero point, given or calibrated. Parameters as in :func:`quantize`.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> aqt_lite.fake_quantize(np.asarray([0.26, 1.0, -9.0], "float32"), scale=0.5, dtype="int8")
    array([ 0.5,  1. , -9. ], dtype=float32)
    """
    call = _prepare(x, dtype, scheme, granularity, dialect, nonfinite, backend, scale, zero_point, constant=False)
    arrays = (call.x, call.scale, call.zero_point)
    y, s = run(call.b, "fake_quantize", affine.fake_quantize, *arrays, spec=call.spec)
    _check_finite(call.x, s, call.spec, call.b)
    return y


def int_limits(dtype: Any, backend: str = "numpy") -> IntLimits:
    """Limits of an integer type, asked of a backend.

    Parameters
    ----------
    dtype : str
        "int8" to "int64", or "uint8" to "uint64".
    backend : str

    Raises
    ------
    ValueError
        Another type, or one that the backend does not have.

    Examples
    --------
    >>> import aqt_lite
    >>> aqt_lite.int_limits("uint16", backend="array_api_strict").max
    65535
    """
    b, name = get_backend(backend), integer_type(dtype)
    try:
        return b.int_limits(name)
    except AttributeError:
        raise ValueError(f"backend={backend!r} has no dtype {name}") from None


# ---- arguments


@dataclass(frozen=True)
class _Call:
    """Checked arguments."""

    x: Array
    b: Backend
    spec: affine.Spec
    scale: Array | None
    zero_point: Array | None


def _prepare(
    x: Any,
    dtype: Any,
    scheme: str,
    granularity: Granularity,
    dialect: str,
    nonfinite: str,
    backend: str | None,
    scale: Any = None,
    zero_point: Any = None,
    *,
    constant: bool = True,
) -> _Call:
    element = element_type(dtype)
    one_of("scheme", scheme, ("symmetric", "affine"))
    one_of("nonfinite", nonfinite, ("raise", "ignore"))
    one_of("dialect", dialect, DIALECTS)
    x, b = as_float_array(x, "x", backend, constant=constant)
    source = FLOAT_TYPES[b.dtype_name(x)]
    block = block_of(granularity, x.ndim)
    if nonfinite == "raise" and b.is_deferred(x):
        x = b.check_when_computed(x, _check_chunk)
    symmetric = scheme == "symmetric" and zero_point is None
    spec = affine.Spec(element, source, symmetric, block, nonfinite == "ignore")
    if scale is None:
        if zero_point is not None:
            raise ValueError("zero_point is given without scale: give both, or neither to have them chosen")
        return _Call(x, b, spec, None, None)
    if zero_point is None and (scheme == "affine" or element.middle):
        why = "scheme='affine'" if scheme == "affine" else f"dtype='{element.name}', which has no negative codes,"
        raise ValueError(f"{why} with a given scale needs its zero_point too (the code of 0.0)")
    scale = _on_grid("scale", scale, x, granularity, block, b, source.compute, partial(check_scale, source=source))
    if zero_point is not None:
        check = partial(check_zero_point, element=element)
        zero_point = _on_grid("zero_point", zero_point, x, granularity, block, b, "int32", check)
    return _Call(x, b, spec, scale, zero_point)


def _on_grid(
    argument: str,
    value: Any,
    x: Array,
    granularity: Granularity,
    block: Block,
    b: Backend,
    dtype: str,
    check: Callable[[Any], None],
) -> Array:
    """A given scale or zero point as an array of the grid's shape and of ``dtype``, on the device of ``x``."""
    if isinstance(value, QArray):
        raise TypeError(f"{argument} is a QArray: give a number or an array")
    plain = isinstance(value, int | float | list | tuple) and not isinstance(value, bool | np.generic)
    other = None if plain else backend_of(value)
    if plain and isinstance(value, int | float):
        check(value)
        value = b.number(value, dtype, like=x)
    elif plain or isinstance(value, np.generic):  # numbers and lists belong to no backend
        try:
            value = np.asarray(value)
        except ValueError as error:
            raise TypeError(f"{argument} is a list that is no array: {error}") from None
        check(value)
        value = b.asarray(value.astype(dtype), like=x)
    elif other is None:
        what = refusal(value, argument) or f"{argument} is a {type(value).__name__}: give a number or an array"
        raise TypeError(what)
    elif other is not b:
        raise TypeError(f"{argument} is a {other.name} array but x is {b.name}: give both from one backend")
    elif not b.can_meet(value, x):
        raise ValueError(f"{argument} is on device {b.device(value)} but x on {b.device(x)}: move one of them")
    elif not (b.is_traced(value) or b.is_deferred(value)):
        check(b.to_numpy(value))
    elif b.dtype_name(value) not in (FLOAT_TYPES if dtype != "int32" else INTEGER_TYPES):
        raise TypeError(f"{argument} has dtype {b.dtype_name(value)}: it must convert to {dtype}")
    else:
        value = b.check_when_computed(value, lambda values, start: check(values))
    value = b.xp.astype(value, b.dtype(dtype))

    shape, grid = tuple(x.shape), grid_of(tuple(x.shape), block)
    if isinstance(granularity, PerChannel) and tuple(value.shape) == (shape[granularity.axis],):
        value = b.xp.reshape(value, grid)
    if value.ndim == 0:
        value = b.xp.broadcast_to(value, grid)
    if tuple(value.shape) != grid:
        raise ValueError(
            f"{argument} has shape {tuple(value.shape)}: {granularity} of an array of shape {shape} needs {grid} "
            f"or a single number"
        )
    return value


def _check_finite(x: Array, scale: Array, spec: affine.Spec, b: Backend) -> None:
    """Raise where a NaN scale tells that its block of ``x`` has non-finite values."""
    if spec.ignore_nonfinite or b.is_traced(scale) or b.is_deferred(scale):
        return
    if bool(b.xp.any(b.xp.isnan(scale))):
        raise _nonfinite_values(b.to_numpy(x))


def _check_chunk(values: np.ndarray[Any, Any], start: tuple[int, ...]) -> None:
    """The same for the values of one chunk of x, which begins at index ``start``."""
    if not _are_finite(values).all():
        raise _nonfinite_values(values, start)


def _are_finite(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with np.errstate(invalid="ignore"):  # 16-bit types are converted first, which a signalling NaN disturbs
        finite: np.ndarray[Any, Any] = np.isfinite(values)
        return finite


def _nonfinite_values(values: np.ndarray[Any, Any], start: tuple[int, ...] | None = None) -> ValueError:
    """The error of an x with ``values``, or of its chunk that begins at ``start``."""
    bad = ~_are_finite(values)
    where = "" if start is None else f" in the chunk at {start}"
    offsets = start or (0,) * bad.ndim
    first = tuple(int(i) + o for i, o in zip(np.unravel_index(np.argmax(bad), bad.shape), offsets, strict=True))
    return ValueError(
        f"x has {int(bad.sum())} non-finite values of {bad.size}{where}, the first at index {first}: "
        f"mend them, or pass nonfinite='ignore' (NaN becomes 0, infinities the largest code)"
    )
