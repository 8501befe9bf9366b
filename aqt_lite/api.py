"""The public functions: they check arguments, find the backend, and call the contract in ``affine``.

Owns: validation and the error messages. Imports: everything below it.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np

from aqt_lite import _clipping, _given, _statistics, affine, ggml, hqq, mlx  # noqa: F401 - they add their dialects
from aqt_lite._arguments import as_float_array
from aqt_lite._blocks import spread
from aqt_lite._dispatch import offered, run
from aqt_lite._into import (
    can_write,
    check_out,
    choose_of_extrema,
    encode_into,
    extrema,
    extrema_are_of,
    is_packed,
    look_at_values,
    quantize_stored,
    storage_of,
)
from aqt_lite._keywords import naming_the_argument
from aqt_lite._missing import Marked, marked, warn_of_fill_values
from aqt_lite._namespace import AnyArray, Array, Numbers
from aqt_lite._near import check_integer, one_of, shown
from aqt_lite._noise import MOST_ELEMENTS, key_words
from aqt_lite._parts import boxes
from aqt_lite._protocol import Backend, IntLimits
from aqt_lite._qparams import check_offset, check_scale, check_without_scale, check_zero_point, on_grid
from aqt_lite._range import range_of, representable_range, with_margin
from aqt_lite._registry import backend_of, get_backend
from aqt_lite._ways import not_a_qarray
from aqt_lite.bounds import AUTO, Attempt, Bound, Held, Largest, Later, Way, bound_of, quantize_within
from aqt_lite.dialects import AQT_LITE, Dialect, dialect_of
from aqt_lite.elements import Integer, float_type, integer_type
from aqt_lite.formats import (
    FAMILIES,
    FORMATS,
    SCALE_FORMATS,
    SCALE_MODES,
    Format,
    format_of,
    scale_format_of,
    with_missing,
)
from aqt_lite.granularity import Granularity, block_of, grid_of
from aqt_lite.qarray import QArray

__all__ = ["ClippingWarning", "choose_qparams", "dequantize", "fake_quantize", "int_limits", "quantize"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
Scheme = Literal["symmetric", "affine"]
Nonfinite = Literal["raise", "ignore"]
RoundingMode = Literal["half_even", "half_away", "toward_zero", "stochastic"]
ScaleMode = Literal["floor", "ceil", "even", "rceil"]
OnClip = Literal["saturate", "warn", "raise"]

ROUNDINGS = ("half_even", "half_away", "toward_zero", "stochastic")


class ClippingWarning(UserWarning):
    """Values lie beyond the numbers that a format has at a given scale, and became the number next to them.

    Examples
    --------
    >>> import warnings, aqt_lite
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", aqt_lite.ClippingWarning)
    ...     try:
    ...         aqt_lite.quantize([270.0, 305.0], scale=0.1)
    ...     except aqt_lite.ClippingWarning as warning:
    ...         print(str(warning).partition(",")[0])
    x has 2 values of 2 beyond the numbers that int8 has at this scale
    """


# ---- dialects that make whole arrays


def _whole(rules: Dialect, x: Any, dtype: Any, backend: str | None) -> QArray:
    assert rules.whole is not None
    made: QArray = rules.whole(x, dtype if isinstance(dtype, str) else format_of(dtype).name, backend=backend)
    return made


def _qparams_of_whole(rules: Dialect, x: Any, dtype: Any, backend: str | None) -> tuple[Any, Array | None]:
    q = _whole(rules, x, dtype, backend)
    return q.scale, q.zero_point if q.offset is None else q.offset


def _values_of_whole(rules: Dialect, x: Any, dtype: Any, backend: str | None) -> Array:
    x, b = as_float_array(x, "x", backend, may_detach=False)
    values = _whole(rules, b.stop_gradient(x), dtype, None).dequantize()
    return b.straight_through(x, values, b.xp.ones_like(x, dtype=b.xp.bool))


def _or_whole(of_whole: Callable[..., _R]) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorator: ``of_whole`` in place of the function where its dialect makes whole arrays and chooses all else.

    ValueError where an argument says anything but its default, whichever arguments there are.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        free = ("x", "dtype", "dialect", "backend")
        unsaid = {p.name: (None, p.default) for p in signature.parameters.values() if p.name not in free}
        if "on_clip" in unsaid:
            unsaid["on_clip"] = (None, "saturate")

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            rules = dialect_of(kwargs.get("dialect", AQT_LITE))
            if rules.whole is None:
                return function(*args, **kwargs)
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            for name, known in unsaid.items():
                value = given.arguments[name]
                if not (any(value is k for k in known) or (isinstance(value, str) and value in known)):
                    raise ValueError(
                        f"{name} is given, but dialect={rules.name!r} chooses all but the dtype itself: leave it out"
                    )
            return of_whole(rules, *(given.arguments[name] for name in ("x", "dtype", "backend")))

        return call

    return decorate


@naming_the_argument
@_or_whole(_whole)
def quantize(
    x: Numbers,
    dtype: Any = "int8",
    *,
    scheme: Scheme = "symmetric",
    granularity: Granularity | None = None,
    scale: Numbers | QArray | None = None,
    zero_point: Numbers | None = None,
    offset: Numbers | Literal["data"] | None = None,
    scale_dtype: Any = None,
    scale_mode: ScaleMode | None = None,
    rounding: RoundingMode = "half_even",
    key: int | AnyArray | None = None,
    dialect: str | Dialect = "aqt_lite",
    nonfinite: Nonfinite = "raise",
    mask: AnyArray | None = None,
    fill_value: float | Sequence[float] | None = None,
    missing: Literal["nan"] | None = None,
    on_clip: OnClip | None = None,
    max_abs_err: float | None = None,
    max_rel_err: float | None = None,
    keepbits: int | None = None,
    out: AnyArray | None = None,
    backend: str | None = None,
) -> QArray:
    """Quantize an array: a code for each element, and a scale, perhaps a zero point or an offset, for each block.

    Codes are those of the format's numbers next to ``(x - offset) / scale``; for integers ``clip(rint(x / scale) +
    zero_point)``. The same bits on every backend (docs/numerics.md). Not differentiable; :func:`fake_quantize` is.

    Parameters
    ----------
    x : array of any backend, or nested list of numbers
        float16, bfloat16, float32 or float64, of any shape. Lists are taken as float32.
    dtype : str, or a dtype or format object
        A format: int2 to int8, uint2 to uint8, int16, uint16, ternary, float8_e4m3fn and other floats of few bits, nf4
        and other codebooks (or a :class:`aqt_lite.Codebook` of your own), mxfp4, nvfp4 and other block formats,
        bitround0 to bitround23, which are float32 with so many significant bits and no scale: docs/formats.md. With
        ``max_abs_err`` or ``max_rel_err`` also "auto": the narrowest type that keeps it; and "bitround": the fewest
        bits that do.
    scheme : {"symmetric", "affine"}
        Symmetric: zero has code 0 (the middle code of unsigned types) and numbers reach equally far on both sides.
        Affine: the codes cover [min(x, 0), max(x, 0)], with a zero point; integers only.
    granularity : PerTensor, PerChannel, PerGroup or PerBlock, optional
        Which elements share a scale. By default all do; block formats have groups along the last axis.
    scale, zero_point, offset : number or array, optional
        Use these and calibrate nothing. A number serves all blocks; an array has the shape of the grid of blocks (a
        1-dimensional one will do for ``PerChannel``). With a zero point, codes use the type's whole range. ``offset``
        is what code 0 stands for; with ``scheme="affine"``, ``offset="data"`` chooses it from the data, so that the
        codes cover [min x, max x], with or without zero.
    scale_dtype : str, optional
        Format that scales are kept in, instead of float32: "float16", "bfloat16", "float8_e8m0fnu" (powers of two),
        "float8_e4m3fn", or any other format, which then has a scale itself. Codes are made from the scales as kept.
    scale_mode : {"floor", "ceil", "even", "rceil"}, optional
        How scales that are powers of two are chosen, by the names that torchao gives the rules; block formats: "floor".
    rounding : {"half_even", "half_away", "toward_zero", "stochastic"}
        By default halves to even, or as the dialect has it. Stochastic: away from zero with the probability of the part
        that is left, by noise made from ``key``.
    key : int, or array of two 32-bit integers
        For stochastic rounding: the same key gives the same codes on every backend. An array holds the upper and the
        lower half of the integer; of a key of ``jax.random`` give ``jax.random.key_data(key)``.
    dialect : str
        Whose conventions; "aqt_lite" are this library's own.
    nonfinite : {"raise", "ignore"}
        NaN and infinities in ``x``: an error (under a tracing compiler, which cannot raise: NaN for the whole block;
        with Dask: when the chunk is computed), or statistics over the finite values, NaN coded as zero, and infinities
        saturating.
    mask : array of bools, optional
        True where a value is missing; its shape is that of ``x``, or broadcasts to it. A NumPy masked array says so
        itself. What is missing has a code of its own, is left out of all statistics, and reads back as NaN: the format
        is then "int8_nan" for "int8", and so on.
    fill_value : number or list of numbers, optional
        Values equal to it are missing. ``q.dequantize(fill_value=...)`` puts it back.
    missing : {"nan"}, optional
        NaN are missing values.
    on_clip : {"saturate", "warn", "raise"}, optional
        What becomes of values beyond the numbers of the format, where a scale is given or a block format does not cover
        them: the number next to them; the same, and a :class:`ClippingWarning` that counts them, which is the default
        where a scale is given, or the format has none; or a ValueError that counts them. With Dask a chunk warns or
        raises when it is computed. Where values are not known, as under a compiler, nothing warns.
    max_abs_err, max_rel_err : float, optional
        A bound on the error of every finite element, in units of ``x`` or relative to the element itself (0 is then
        exact). It is checked on the result: ``q.dequantize()`` keeps it, in its own type or a wider one. Scales are
        chosen with ``offset="data"``, unless ``scheme`` or ``offset`` say otherwise; in dialects, which have no
        offsets, in either scheme that the dialect has for the type. With Dask each chunk is checked when it is
        computed, and where there is a choice (of "auto", and of relative bounds) ``x`` is computed once to choose.
        docs/science.md.
    keepbits : int, optional
        With ``dtype="bitround"``: bits after the leading one that are kept, as of :func:`aqt_lite.bitround`, whose
        numbers these are. ``quantize(x, "bitround", keepbits=7)`` is ``quantize(x, "bitround7")``.
    out : numpy.ndarray, optional
        Write the codes here, part by part: an array or a memory map, which becomes ``storage`` of the result. Of the
        shape of ``x`` and the type that codes are kept in, int8 for "int8"; of packed codes, uint8 and as many bytes a
        row as they take. Nothing is written where the call raises an error. With a bound and "auto", the narrowest type
        that ``out`` can hold. NumPy only.
    backend : str, optional
        Move ``x`` to this backend first.

    Returns
    -------
    QArray
        On the backend and device of ``x``.

    Raises
    ------
    TypeError
        ``x`` is no floating-point array; arguments from different backends; a bound where values are not known.
    ValueError
        Non-finite values; unusable scale or zero point; an unknown dtype, scheme, dialect or backend; a bound that the
        dtype cannot keep, with the least that it can.
    RuntimeError
        Codes in ``out`` that do not keep the bound, because ``x`` or ``out`` changed while they were written.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> x = np.asarray([[191.6, -13.5, 728.6], [92.14, 295.5, -184], [0, 684.6, 245.5]], "float32")
    >>> aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0)).qvalue
    array([[ 33,  -2, 127],
           [ 40, 127, -79],
           [  0, 127,  46]], dtype=int8)
    >>> aqt_lite.quantize(x, scale=3.5, zero_point=-70, on_clip="saturate").qvalue[0]
    array([-15, -74, 127], dtype=int8)
    >>> aqt_lite.quantize(x, "float8_e4m3fn", scale=1.0, on_clip="saturate").dequantize()[1]  # the saturating cast
    array([  96.,  288., -192.], dtype=float32)
    >>> kelvin = np.linspace(270, 305, 1000, dtype="float32")
    >>> q = aqt_lite.quantize(kelvin, "auto", max_abs_err=0.1)
    >>> q.dtype, bool(abs(q.dequantize() - kelvin).max() <= 0.1)
    ('uint8', True)
    """
    bound = bound_of(max_abs_err, max_rel_err)
    if keepbits is not None:
        dtype = _with_keepbits(dtype, keepbits)
    read = (x, mask, getattr(x, "mask", None))
    x, may_miss = marked(x, mask, fill_value, missing, tolerant=nonfinite == "ignore")
    rest = {
        "granularity": granularity, "scale_dtype": scale_dtype, "scale_mode": scale_mode, "rounding": rounding,
        "key": key, "dialect": dialect, "nonfinite": nonfinite, "on_clip": on_clip, "backend": backend,
    }  # fmt: skip
    if bound is not None:
        _check_free(bound, scale, zero_point, offset)
        try:
            q = _within(bound, x, dtype, scheme, offset, may_miss, out, read, rest)
        except ValueError:
            warn_of_fill_values(x, None, stacklevel=5)  # which no scale that keeps the bound may have room for
            raise
    else:
        if isinstance(dtype, str) and dtype == AUTO:
            raise ValueError(
                "dtype='auto' is the narrowest type that keeps a bound: give max_abs_err or max_rel_err, too"
            )
        if may_miss:
            dtype = with_missing(format_of(dtype))
        given: dict[str, Any] = {"scheme": scheme, "scale": scale, "zero_point": zero_point, "offset": offset}
        q = _quantized(x, dtype, **given, out=out, read=read, **rest)
    if scale is None:
        warn_of_fill_values(x, q, stacklevel=5)
    return q


def _with_keepbits(dtype: Any, keepbits: Any) -> str:
    """The format of a family that keeps so many bits."""
    family = FAMILIES.get(dtype) if isinstance(dtype, str) else None
    if family is None:
        raise ValueError(
            f"keepbits={keepbits!r} is given with dtype={dtype!r}, which has the bits that it has: it goes with "
            f"dtype={next(iter(FAMILIES))!r}"
        )
    check_integer("keepbits", keepbits)
    if not 0 <= keepbits < len(family):
        raise ValueError(f"keepbits={keepbits}: float32 has {len(family) - 1}, give 0 to {len(family) - 1}")
    return family[int(keepbits)].name


_LOOKED_AT = 1 << 20
"""Elements that are searched together for values that are not finite, or kept in codes that may not do."""

_MOST_UNPACKED = 1 << 27
"""Codes that may lie unpacked in memory for a while, a byte each, before they are packed."""


def _quantized(
    x: Any, dtype: Any, *, on_clip: str | None, out: Any = None, read: tuple[Any, ...] = (), **how: Any
) -> QArray:
    """``read``: what ``out`` must not overlap with."""
    call, on_clip = _prepared(x, dtype, on_clip=on_clip, **how)
    x, b, static = call.x, call.b, {"spec": call.spec, "recipe": call.recipe}
    constant = b.stop_gradient(x)
    large = is_packed(call.spec, x.ndim) and math.prod(x.shape) > _MOST_UNPACKED if b.has_values(x) else False
    if out is not None or (large and can_write(b) and not call.together):
        return _quantized_into(out, constant, call, on_clip, read)
    if call.given is None and on_clip == "saturate" and is_packed(call.spec, x.ndim):
        w = offered(b, quantize_stored, constant, call.key, **static)
        if w is not NotImplemented:
            _check_finite(x, w.scale, call)
            return QArray._kept(w.codes, affine.QParams(*w[1:]), call.spec, tuple(x.shape))
    if call.given is None:
        w = run(b, affine.quantize, constant, call.key, **static)
    else:
        w = run(b, _given.quantize_with, constant, call.given, call.key, **static)
    _check_finite(x, w.scale, call)
    q = QArray._of(w, call.spec)
    if on_clip != "saturate" and b.is_deferred(x):
        return QArray._of(w._replace(codes=_checked_when_computed(constant, w, q, call, on_clip)), call.spec)
    if on_clip != "saturate":
        _check_clipped(constant, w, q, call, on_clip)
    return q


def _prepared(x: Any, dtype: Any, *, on_clip: str | None, **how: Any) -> tuple[_Call, str]:
    """The call, of a ``Marked`` array by parts where it stays, and what becomes of values beyond the numbers."""
    call = _prepare(x.source if isinstance(x, Marked) else x, dtype, **how)
    if isinstance(x, Marked):
        here = call.x is x.source and not call.together
        call = replace(call, x=x) if here else _prepare(np.asarray(x), dtype, **how)
    if on_clip is None:
        on_clip = "saturate" if call.given is None and call.spec.format.scaled else "warn"
    one_of("on_clip", on_clip, ("saturate", "warn", "raise"))
    return call, on_clip


def _quantized_into(
    out: Any,
    x: Array,
    call: _Call,
    on_clip: str,
    read: tuple[Any, ...],
    qparams: affine.QParams | None = None,
    look: Callable[..., bool] | None = None,
) -> QArray:
    """Codes part by part into ``out``, or into memory for them as they are kept: nothing before all is checked.

    ``qparams``: what was chosen for ``x``, and checked, before. ``look`` hears of what is read of each part.
    """
    b, static = call.b, {"spec": call.spec, "recipe": call.recipe}
    shape, dtype = storage_of(tuple(x.shape), call.spec)
    if out is None:
        out = b.xp.empty(shape, dtype=b.dtype(dtype))
    else:
        source = x.source if isinstance(x, Marked) else x
        check_out(out, shape, dtype, f"codes of {call.spec.format.name}", b, source, *read)
    if call.together:
        w = run(b, affine.quantize, x, **static)
        _check_finite(x, w.scale, call)
        q = QArray._of(w, call.spec)
        if on_clip != "saturate":
            _check_clipped(x, w, q, call, on_clip, stacklevel=7)
        out[...] = q.storage
        return replace(q, storage=out)
    if qparams is None:
        qparams = _checked_qparams(x, call)
    if on_clip == "raise":
        _check_counted(run(b, _clipping.count_clipped, x, qparams, call.key, **static), x, call, on_clip)
    run(b, encode_into, x, qparams, call.key, out, look, **static)
    q = QArray._kept(out, qparams, call.spec, tuple(x.shape))
    if on_clip == "warn":
        _check_clipped(x, qparams.beside(q.storage), q, call, on_clip, stacklevel=7)
    return q


@dataclass
class _Seen:
    """What was learnt of an array for which several formats are tried: it is read a few times, and not for each."""

    extrema: dict[Any, Any] = field(default_factory=dict)
    """Ends of blocks, by what they depend on."""
    failed: int = 0
    """Where the last format broke the bound: the next one may do so there, too."""


def _checked_qparams(x: Array, call: _Call, seen: _Seen | None = None) -> affine.QParams:
    static = {"spec": call.spec, "recipe": call.recipe}
    ends = None
    if seen is not None and call.given is None:
        of = extrema_are_of(call.spec, call.recipe)
        if of not in seen.extrema:
            seen.extrema[of] = run(call.b, extrema, x, **static)
        ends = seen.extrema[of]
    if ends is not None:
        qparams = run(call.b, choose_of_extrema, ends, **static)
    elif call.given is None:
        qparams = run(call.b, affine.choose_qparams, x, **static)
    else:
        qparams = run(call.b, _given.usable_qparams, x, call.given, **static)
    _check_finite(x, qparams.scale, call)
    return qparams  # type: ignore[no-any-return]


@naming_the_argument
@_or_whole(_qparams_of_whole)
def choose_qparams(
    x: Numbers,
    dtype: Any = "int8",
    *,
    scheme: Scheme = "symmetric",
    granularity: Granularity | None = None,
    offset: Literal["data"] | None = None,
    scale_dtype: Any = None,
    scale_mode: ScaleMode | None = None,
    dialect: str | Dialect = "aqt_lite",
    nonfinite: Nonfinite = "raise",
    backend: str | None = None,
) -> tuple[Array | QArray, Array | None]:
    """Scale, and zero point or offset, that :func:`quantize` would use for ``x``; parameters as there.

    Both are None for formats without scales, bitround7 for instance.

    Given back to :func:`quantize` they make the same codes, except in dialects that compute the inverse of a scale
    first (int4 of keras and modelopt, hqq), where codes at ties may differ.

    Returns
    -------
    scale : array or QArray
        float32 (float64 for float64 input), in units of ``x`` per code, shape of the grid of blocks. A QArray where the
        format keeps scales in fewer bits.
    zero_point : array or None
        int32, the code of 0.0, same shape; None where it is always 0. With ``offset="data"`` the offset instead.

    Examples
    --------
    >>> import aqt_lite
    >>> scale, zero_point = aqt_lite.choose_qparams([-1.0, 0.0, 3.0], "uint8", scheme="affine")
    >>> print(scale, zero_point)
    [0.01568628] [64]
    """
    if not (offset is None or (isinstance(offset, str) and offset == "data")):
        raise ValueError(f"offset={shown(offset)}: it is chosen here; give 'data', or None for a zero point")
    call = _prepare(
        x, dtype, scheme, granularity, dialect, nonfinite, backend,
        offset=offset, scale_dtype=scale_dtype, scale_mode=scale_mode,
    )  # fmt: skip
    constant = call.b.stop_gradient(call.x)
    found = run(call.b, affine.choose_qparams, constant, spec=call.spec, recipe=call.recipe)
    _check_finite(call.x, found.scale, call)
    kept = found.scale
    if isinstance(kept, tuple):
        kept = QArray._of(affine.Coded(*kept), call.spec.of_scales)
    return kept, found.zero_point if found.offset is None else found.offset


@naming_the_argument
def dequantize(q: QArray, dtype: Any = None, *, fill_value: float | None = None, out: AnyArray | None = None) -> Array:
    """The values that the codes stand for: ``(number - zero_point) * scale``, or ``number * scale + offset``.

    Parameters
    ----------
    q : QArray
    dtype : str, optional
        Floating-point type of the result; by default the type that was quantized. A wider type shows the product before
        it was rounded to a narrower source type.
    fill_value : float, optional
        What missing values become, instead of NaN; rounded to the type of the result.
    out : numpy.ndarray, optional
        Write the values here, part by part: an array or a memory map of the result's shape and type, which is returned.
        NumPy only.

    Raises
    ------
    ValueError
        A narrower ``dtype`` than the source's cannot hold a value (eager calls; traced ones give infinity): ``out`` has
        been written to then. ``out`` has another shape or type, is read-only, or overlaps with ``q``.

    Examples
    --------
    >>> import aqt_lite
    >>> aqt_lite.dequantize(aqt_lite.quantize([0.0, 0.5, -127.0]))
    array([   0.,    0., -127.], dtype=float32)
    """
    if not isinstance(q, QArray):
        raise TypeError(f"{not_a_qarray('q', q)}, or use QArray.from_codes")
    return q.dequantize(dtype, fill_value=fill_value, out=out)


@naming_the_argument
@_or_whole(_values_of_whole)
def fake_quantize(
    x: Numbers,
    dtype: Any = "int8",
    *,
    scheme: Scheme = "symmetric",
    granularity: Granularity | None = None,
    scale: Numbers | QArray | None = None,
    zero_point: Numbers | None = None,
    offset: Numbers | Literal["data"] | None = None,
    scale_dtype: Any = None,
    scale_mode: ScaleMode | None = None,
    rounding: RoundingMode = "half_even",
    key: int | AnyArray | None = None,
    dialect: str | Dialect = "aqt_lite",
    nonfinite: Nonfinite = "raise",
    backend: str | None = None,
) -> Array:
    """Quantize and dequantize, for training with quantization: the same bits as ``dequantize(quantize(x, ...))``.

    The gradient with respect to ``x`` goes straight through (Bengio et al. 2013, arXiv:1308.3432): 1 where ``x`` lies
    inside the range of the numbers, 0 where it was clipped, as in ``torch.fake_quantize_per_tensor_affine``.
    Nothing flows into the scale, zero point or offset, given or calibrated. Parameters as in :func:`quantize`.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> aqt_lite.fake_quantize(np.asarray([0.26, 1.0, -9.0], "float32"), scale=0.5, dtype="int8")
    array([ 0.5,  1. , -9. ], dtype=float32)
    """
    call = _prepare(
        x, dtype, scheme, granularity, dialect, nonfinite, backend, scale, zero_point, offset, scale_dtype, scale_mode,
        rounding, key, may_detach=False,
    )  # fmt: skip
    y, s = run(call.b, _given.fake_quantize, call.x, call.given, call.key, spec=call.spec, recipe=call.recipe)
    _check_finite(call.x, s, call, kept=False)
    return y


@naming_the_argument
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
    return get_backend(backend).int_limits(integer_type(dtype))


# ---- arguments


@dataclass(frozen=True)
class _Call:
    """Checked arguments."""

    x: Array
    b: Backend
    spec: affine.Spec
    recipe: affine.Recipe
    given: affine.QParams | None
    key: Array | None

    @property
    def together(self) -> bool:
        """Whether a rule of the dialect makes codes and scales together, of the whole array."""
        return self.given is None and self.recipe.dialect.together is not None


def _prepare(
    x: Any,
    dtype: Any,
    scheme: str = "symmetric",
    granularity: Granularity | None = None,
    dialect: str | Dialect = "aqt_lite",
    nonfinite: str = "raise",
    backend: str | None = None,
    scale: Any = None,
    zero_point: Any = None,
    offset: Any = None,
    scale_dtype: Any = None,
    scale_mode: str | None = None,
    rounding: str = "half_even",
    key: Any = None,
    *,
    may_detach: bool = True,
) -> _Call:
    rules = dialect_of(dialect)
    form = _format_asked_for(dtype, scale_dtype, scale_mode, rules)
    one_of("scheme", scheme, ("symmetric", "affine"))
    one_of("nonfinite", nonfinite, ("raise", "ignore"))
    one_of("rounding", rounding, ROUNDINGS)
    from_data = isinstance(offset, str)
    if from_data:
        one_of("offset", offset, ("data",))
        scheme = "affine"
        if scale is not None:
            raise ValueError(
                "offset='data' chooses the offset together with the scale: it needs scheme='affine' and no scale"
            )
    element = form.element
    if from_data and element.missing == 0:
        raise ValueError(
            f"offset='data' is where code 0 lies, but of {form.name} that is what is missing: use int{element.bits}"
        )
    if not element.signed and not element.middle and offset is None and scale is None:
        raise ValueError(f"{form.name} has no number below zero: give offset='data', or a scale for values above zero")
    if scheme == "affine" and offset is None and not element.zero_points:
        raise ValueError(
            f"scheme='affine' is not possible: {form.name} has no zero points; offset='data' may serve instead"
        )
    x, b = as_float_array(x, "x", backend, may_detach=may_detach)
    source = float_type(b.dtype_name(x))
    if not form.scaled:
        _check_unscaled(form, source.name, x.ndim, scheme, granularity, rules, scale, zero_point, offset, scale_dtype)
    if nonfinite == "raise" and b.is_deferred(x):
        x = b.check_when_computed(x, partial(_check_chunk, may_miss=element.missing is not None))
    granularity = form.granularity if granularity is None else granularity
    if x.ndim == 0 and form.group is not None and granularity == form.granularity:
        raise ValueError(
            f"x is 0-dimensional: {form.name} has groups along the last axis; give an array of 1 dimension"
        )
    spec = affine.Spec(form, source, block_of(granularity, x.ndim))
    has_offset = offset is not None
    recipe = affine.Recipe(
        symmetric=scheme == "symmetric" and zero_point is None and not has_offset,
        offset=has_offset,
        rounding=rules.for_format(form).rounding if rounding == "half_even" else rounding,  # type: ignore[arg-type]
        ignore_nonfinite=nonfinite == "ignore",
        dialect=rules.for_format(form),
    )
    if rules is not AQT_LITE:
        _check_dialect(rules, form, recipe, scale_dtype, scale is not None)
    made_of = _key_of(key, rounding, x, b)
    if scale is None:
        for name, value in (("zero_point", zero_point), ("offset", None if from_data else offset)):
            if value is not None:
                chosen = (
                    "offset='data' has it chosen with the scale" if name == "offset" else "scheme='affine' chooses both"
                )
                raise ValueError(f"{name} is given without scale: give both, or neither; {chosen}")
        return _Call(x, b, spec, recipe, None, made_of)
    if zero_point is not None and has_offset:
        raise ValueError("zero_point and offset are both given: a block has one of them")
    if zero_point is None and not has_offset and (scheme == "affine" or element.middle):
        why = "scheme='affine'" if scheme == "affine" else f"dtype='{form.name}', which has no negative codes,"
        raise ValueError(f"{why} with a given scale needs its zero_point too (the code of 0.0)")

    def placed(argument: str, value: Any, kept_as: str, check: Callable[..., None]) -> Array:
        return on_grid(argument, value, x, "x", tuple(x.shape), granularity, spec, b, kept_as, check)

    if isinstance(scale, QArray):
        scale = _kept_scale(scale, spec, grid_of(tuple(x.shape), spec.block), b)
    else:
        scale = placed(
            "scale",
            scale,
            source.compute,
            partial(
                check_scale,
                spec=spec,
                least=_statistics.least_scale(spec, recipe),
                signed=recipe.dialect.signed_scales,
            ),
        )
    if zero_point is not None:
        zero_point = placed("zero_point", zero_point, "int32", partial(check_zero_point, spec=spec))
    if has_offset:
        offset = placed("offset", offset, source.compute, partial(check_offset, spec=spec))
    return _Call(x, b, spec, recipe, affine.QParams(scale, zero_point, offset), made_of)


def _check_unscaled(
    form: Format,
    source: str,
    ndim: int,
    scheme: str,
    granularity: Granularity | None,
    rules: Dialect,
    scale: Any,
    zero_point: Any,
    offset: Any,
    scale_dtype: Any,
) -> None:
    """ValueError where something is said of the scales of numbers that have none."""
    dialect = None if rules is AQT_LITE else rules.name
    scheme_said = None if scheme == "symmetric" else scheme
    apart = granularity is not None and any(size is not None for size in block_of(granularity, ndim))
    shared = granularity if apart else None
    said = {"scale": scale, "zero_point": zero_point, "offset": offset, "scale_dtype": scale_dtype,
            "dialect": dialect, "scheme": scheme_said, "granularity": shared}  # fmt: skip
    check_without_scale(form, source, said)


def _check_dialect(rules: Dialect, form: Format, recipe: affine.Recipe, scale_dtype: Any, given: bool) -> None:
    """ValueError where the original has no such thing."""
    restricted = any(known is not None for known in (rules.symmetric, rules.affine, rules.given))
    if form.element.missing is not None and restricted:
        raise ValueError(
            f"dialect={rules.name!r} has no codes for missing values: leave mask, fill_value and missing out, or use "
            "dialect='aqt_lite', which has"
        )
    if recipe.offset and form.name not in rules.offsets:
        if rules.offsets:
            raise ValueError(
                f"dialect={rules.name!r} has no offsets for {form.name}: take one of {', '.join(rules.offsets)}, or "
                "leave offset out"
            )
        raise ValueError(f"dialect={rules.name!r} has zero points, and no offsets: leave offset out")
    if scale_dtype is not None:
        raise ValueError(f"dialect={rules.name!r} keeps scales in the dtype of its arithmetic: leave scale_dtype out")
    scheme = "given" if given else "symmetric" if recipe.symmetric else "affine"
    known = None if recipe.offset else rules.formats(scheme)
    known_codebook = scheme == "symmetric" and rules.takes_codebook(form)
    if known is not None and form.name not in known and not known_codebook:
        what = "scales for" if given else scheme
        with_offsets = f"{', '.join(rules.offsets)} with offset='data'" if rules.offsets else ""
        has = ", and ".join(filter(None, (", ".join(known), with_offsets))) or "none"
        raise ValueError(f"dialect={rules.name!r} has no {what} {form.name}: it has {has}; 'aqt_lite' has all")
    if recipe.dialect.together is not None and recipe.rounding != "half_even":
        raise ValueError(f"dialect={rules.name!r} rounds {form.name} as its original does: leave rounding out")
    if given and recipe.dialect.together is not None and form.name not in (rules.given or ()):
        raise ValueError(
            f"dialect={rules.name!r} makes codes of {form.name} together with their scales: leave scale out"
        )


def _check_free(bound: Bound, scale: Any, zero_point: Any, offset: Any) -> None:
    """ValueError where something is given that a bound is to choose."""
    for name, value in (("scale", scale), ("zero_point", zero_point), ("offset", offset)):
        if value is not None and not (name == "offset" and isinstance(value, str)):
            raise ValueError(
                f"{name} and {bound.argument} are both given: the bound chooses it; to check one of your own, "
                "see the largest error of error_report(x, q)"
            )


def _within(
    bound: Bound,
    x: Any,
    dtype: Any,
    scheme: str,
    offset: Any,
    may_miss: bool,
    out: Any,
    read: tuple[Any, ...],
    rest: dict[str, Any],
) -> QArray:
    """``out``: nothing is written into it before a way is known that keeps the bound."""
    source, b = as_float_array(x.source if isinstance(x, Marked) else x, "x", rest["backend"])
    if isinstance(x, Marked) and source is not x.source:
        x = as_float_array(np.asarray(x), "x", rest["backend"])[0]
    elif not isinstance(x, Marked):
        x = source
    if b.is_traced(source):
        raise TypeError(
            f"{bound} is checked on values, but those of x are not known yet: quantize outside the compiled function"
        )
    deferred = b.is_deferred(source)
    asked: Way = {}  # where the default may be replaced
    if offset is not None or scheme != "symmetric":
        asked = {"scheme": scheme, "offset": offset}
    if out is not None:
        _check_out_of(out, dtype, tuple(source.shape), b, (source, *read))

    auto = isinstance(dtype, str) and (dtype == AUTO or dtype in FAMILIES)
    seen = _Seen()
    unwritten = out is not None or (auto and can_write(b) and math.prod(source.shape) > _LOOKED_AT)

    def make(form: Format, way: Way) -> Attempt:
        if unwritten:
            call, on_clip = _prepared(x, form, **way, **rest)
            if not call.together:
                return _Unwritten(out, call, on_clip, read, bound, _checked_qparams(call.x, call, seen), seen)
        q = _quantized(x, form, **way, **rest)
        if deferred:
            return Later(x, q, b, bound)
        held = Held(x, q, b, bound.relative)
        return held if out is None else _Copied(held, out)

    rules = dialect_of(rest["dialect"])
    return quantize_within(
        dtype,
        bound,
        asked,
        make,
        missing=may_miss,
        offsets=rules is AQT_LITE or bool(rules.offsets),
        fits=None if out is None else partial(_is_kept_as, tuple(source.shape), out),
        later=b if deferred else None,
    )


def _is_kept_as(shape: tuple[int, ...], out: Any, form: Format) -> bool:
    """Whether codes of a format are kept in an array of the shape and type of ``out``."""
    kept_as, name = storage_of(shape, affine.Spec(form, float_type("float32"), (1,) * len(shape)))
    return bool(out.shape == kept_as and out.dtype == name)


def _check_out_of(out: Any, dtype: Any, shape: tuple[int, ...], b: Backend, read: tuple[Any, ...]) -> None:
    """An error where nothing could be written into ``out``, before anything is tried."""
    form, what = None, f"codes of {dtype}"
    if isinstance(dtype, str) and dtype in FAMILIES:
        fitting = (known for known in FAMILIES[dtype] if isinstance(out, np.ndarray) and _is_kept_as(shape, out, known))
        form = next(fitting, FAMILIES[dtype][0])
        what = f"codes of {form.name}"
    elif not (isinstance(dtype, str) and dtype == AUTO):
        form = format_of(dtype)
    elif isinstance(out, np.ndarray):
        integers = (known for known in FORMATS.values() if type(known.element) is Integer)
        form = next((known for known in integers if _is_kept_as(shape, out, known)), None)
    if form is None:
        form, what = format_of("uint8"), "codes of uint8"
    kept_as, name = storage_of(shape, affine.Spec(form, float_type("float32"), (1,) * len(shape)))
    check_out(out, kept_as, name, what, b, *read)


@dataclass(frozen=True)
class _Unwritten:
    """An array whose codes are to be in ``out``, or in memory of their own: measured before one is written."""

    out: Any
    call: _Call
    on_clip: str
    read: tuple[Any, ...]
    bound: Bound
    qparams: affine.QParams
    seen: _Seen

    @property
    def dtype(self) -> str:
        return self.call.spec.format.name

    def error(self, enough: float) -> float:
        call, largest = self.call, Largest(self.bound.relative, enough)
        static = {"spec": call.spec, "recipe": call.recipe}
        self.seen.failed = run(
            call.b, look_at_values, call.x, self.qparams, call.key, largest, self.seen.failed, **static
        )
        return largest.error

    def take(self) -> QArray:
        """What was written is measured once more: nobody else knows what is in a file by now."""
        call, largest = self.call, Largest(self.bound.relative, self.bound.value)
        q = _quantized_into(self.out, call.x, call, self.on_clip, self.read, self.qparams, largest)
        if largest.error > self.bound.value:
            raise RuntimeError(
                f"out has codes that do not keep {self.bound}: an error is {largest.error!r}; did x or out change "
                "meanwhile?"
            )
        return q


@dataclass(frozen=True)
class _Copied:
    """An array that a dialect makes as a whole, to be copied into ``out``."""

    held: Held
    out: Any

    @property
    def dtype(self) -> str:
        return self.held.dtype

    def error(self, enough: float) -> float:
        return self.held.error(enough)

    def take(self) -> QArray:
        self.out[...] = self.held.q.storage
        return replace(self.held.q, storage=self.out)


def _format_asked_for(dtype: Any, scale_dtype: Any, scale_mode: str | None, rules: Dialect) -> Format:
    form = format_of(dtype)
    own = rules.for_format(form)
    if scale_mode is None and form.top == "power of two":
        scale_mode = own.scale_mode
    part = own.power_rounding
    if part is not None and scale_mode is None and form.top == "power of two":
        form = replace(form, scale_rounding=part)
    if own.plain_scales and form.scale is not None and form.scale.name in SCALE_FORMATS:
        form = replace(form, scale=SCALE_FORMATS[form.scale.name])
    if scale_dtype is not None and form.scaled:
        plain = scale_dtype in ("float32", "float64")
        form = replace(form, scale=None if plain else scale_format_of(scale_dtype))
    if scale_mode is not None:
        one_of("scale_mode", scale_mode, tuple(SCALE_MODES))
        kept = form.scale
        if kept is None or kept.scaled or getattr(kept.element, "mantissa", None) != 0:
            raise ValueError(
                f"scale_mode={scale_mode!r} is for scales that are powers of two: use a block format such as mxfp4, or "
                f"scale_dtype='float8_e8m0fnu'"
            )
        form = form.with_mode(scale_mode)
    return form


def _key_of(key: Any, rounding: str, x: Array, b: Backend) -> Array | None:
    """The key of stochastic rounding as four words of 16 bits."""
    if rounding != "stochastic":
        if key is not None:
            raise ValueError(f"key is given, but rounding={rounding!r} uses none: pass rounding='stochastic'")
        return None
    if key is None:
        raise ValueError(
            "rounding='stochastic' needs a key, so that the same call gives the same codes: give an integer"
        )
    known = [n for n in x.shape if isinstance(n, int)]  # jax.export has symbols, too
    if math.prod(known) >= MOST_ELEMENTS:
        raise ValueError(f"rounding='stochastic' numbers up to {MOST_ELEMENTS} elements: quantize x in parts")
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if not 0 <= int(key) < 1 << 64:
            raise ValueError(f"key={key}: it must be an integer of 64 bits, 0 to 2^64 - 1")
        return b.constant(key_words(int(key)), "int32", like=x)
    other = backend_of(key)
    if other is not None and other is not b:
        raise TypeError(f"key is a {other.name} array but x is {b.name}: give an integer, or an array of {b.name}")
    if other is None or b.dtype_name(key) not in ("int32", "uint32") or tuple(key.shape) != (2,):
        kind = type(key).__name__ if other is None else f"{b.dtype_name(key)} array of shape {tuple(key.shape)}"
        raise TypeError(
            f"key is a {kind}: give an integer, or an array of two 32-bit integers (jax.random.key_data(key))"
        )
    halves = b.xp.astype(key, b.xp.int32)  # the upper one first, as jax.random.key_data has it
    low, high = halves & 0xFFFF, (halves >> 16) & 0xFFFF
    return b.xp.stack([low[1, ...], high[1, ...], low[0, ...], high[0, ...]])


def _kept_scale(scale: QArray, spec: affine.Spec, grid: tuple[int, ...], b: Backend) -> affine.Coded:
    wanted = spec.format.scale
    if wanted is None or (scale.dtype, scale.scale is not None) != (wanted.name, wanted.scaled):
        kept = (
            "plain numbers"
            if wanted is None
            else f"{wanted.name}{'' if wanted.scaled else ' without a scale of their own'}"
        )
        raise TypeError(
            f"scale is a QArray of {scale.dtype}, but {spec.format.name} keeps its scales as {kept}: give the same "
            f"scale_dtype as to choose_qparams, or numbers: scale.dequantize()"
        )
    if scale.backend != b.name:
        raise TypeError(f"scale is a {scale.backend} QArray but x is {b.name}: move one with .to_backend()")
    if scale.shape != grid:
        raise ValueError(f"scale has shape {scale.shape}: with this granularity it must be {grid}")
    return scale._checked()._coded()


def _check_finite(x: Array, scale: Any, call: _Call, *, kept: bool = True) -> None:
    """Raise where a NaN scale tells that its block of ``x`` has non-finite values, or does not fit its own format."""
    b, spec = call.b, call.spec
    if not spec.format.scaled:
        _check_all_finite(x, call)
        return
    numbers = scale
    if kept and spec.format.scale is not None:
        unusable = run(b, affine.any_unusable, scale, spec=spec)
        if not (b.has_values(unusable) and bool(b.to_numpy(unusable))):
            return
        numbers = run(b, affine.scales_of, scale, spec=spec)
    elif not (b.has_values(numbers) and b.has_nan(numbers)):
        return
    if not call.recipe.ignore_nonfinite:
        _check_chunk(x if isinstance(x, Marked) else b.to_numpy(x), may_miss=spec.element.missing is not None)
    form = spec.format.scale
    if form is not None:
        count = int(b.to_numpy(b.xp.sum(b.xp.astype(b.xp.isnan(numbers), b.xp.int32))))
        raise ValueError(
            f"scale_dtype={form.name!r} cannot hold {count} of the scales: without a scale of their own they must lie "
            f"between {form.element.smallest:.3g} and {form.element.max:.3g}; use 'bfloat16', 'float32' or "
            "'float8_e8m0fnu'"
        )
    rules = call.recipe.dialect
    if rules is not AQT_LITE:  # with nonfinite="ignore", too: statistics are then of finite values
        raise ValueError(
            f"dialect={rules.name!r}: the range of a block overflows {spec.source.compute}, as in the original: "
            "divide x by a power of two, or use dialect='aqt_lite', which has no such limit"
        )


def _check_all_finite(x: Array, call: _Call) -> None:
    """The same where no scale could tell."""
    b, may_miss = call.b, call.spec.element.missing is not None
    if call.recipe.ignore_nonfinite or not (isinstance(x, Marked) or b.has_values(x)):
        return
    if not (isinstance(x, Marked) or may_miss or can_write(b)) and bool(b.to_numpy(b.xp.all(b.xp.isfinite(x)))):
        return
    _check_chunk(x if isinstance(x, Marked) else b.to_numpy(x), may_miss=may_miss)


def _check_chunk(values: Any, start: tuple[int, ...] | None = None, *, may_miss: bool = False) -> None:
    """ValueError where ``x``, or its chunk that begins at index ``start``, has values that are not finite.

    Where values ``may_miss``, NaN says that they do. Part by part: the array may be larger than memory.
    """
    count, first, infinite = 0, None, False
    for box in boxes(tuple(values.shape), _LOOKED_AT, range(values.ndim)) if values.size else ():
        part = values[tuple(slice(*ends) for ends in box)]
        with np.errstate(invalid="ignore"):  # 16-bit types are converted first, which a signalling NaN disturbs
            bad = np.isinf(part) if may_miss else ~np.isfinite(part)
            infinite = infinite or (bad.any() and bool(np.isinf(part).any()))
        count += int(bad.sum())
        if first is None and bad.any():
            at = np.unravel_index(np.argmax(bad), bad.shape)
            first = tuple(int(i) + n for i, (n, _) in zip(at, box, strict=True))
    if first is None:
        return
    where = "" if start is None else f" in the chunk at {start}"
    first = tuple(i + n for i, n in zip(first, start or (0,) * len(first), strict=True))
    kind, way = "non-finite values", "pass nonfinite='ignore' (NaN is coded as zero, infinities as the largest)"
    if not infinite and not may_miss:
        way = f"pass missing='nan' to quantize where NaN stands for missing values, or {way.removeprefix('pass ')}"
    if may_miss:
        kind = "values that are infinite, or NaN and not said to be missing,"
        way = "pass missing='nan' for NaN, or nonfinite='ignore' (infinities become the largest code)"
    raise ValueError(f"x has {count} {kind} of {values.size}{where}, the first at index {first}: mend them, or {way}")


def _check_clipped(x: Array, w: affine.Coded, q: QArray, call: _Call, on_clip: str, stacklevel: int = 6) -> None:
    """Warn or raise where values were clipped.

    A warning counts those that lost more than rounding takes: half of the step at the end.
    """
    b, static = call.b, {"spec": call.spec, "recipe": call.recipe}
    if not b.has_values(w.codes) or not b.has_values(w.codes if isinstance(x, Marked) else x):
        if on_clip == "warn":
            return
        raise TypeError("on_clip='raise' needs values, but x is being traced: check outside the compiled function")
    unpacked = q.packed_length is None or tuple(w.codes.shape) == q.shape
    if unpacked and not bool(b.to_numpy(run(b, _clipping.reaches_an_end, w.codes, **static))):
        return
    if on_clip == "raise":
        qparams = None if call.together else affine.QParams(*w[1:])
        counted = run(b, _clipping.count_clipped, x, qparams, call.key, **static)
    else:
        compute = call.spec.source.compute
        ends = with_margin(*representable_range(q, slack=True), compute)
        with np.errstate(over="ignore"):
            like = w.codes if isinstance(x, Marked) else x
            low, high = (b.asarray(end.astype(compute), like=like) for end in ends)
        counted = run(b, _clipping.count_beyond, x, low, high, spec=call.spec)
    _check_counted(counted, x, call, on_clip, stacklevel + 1)


def _check_counted(counted: Any, x: Array, call: _Call, on_clip: str, stacklevel: int = 6) -> None:
    b = call.b
    count, position = (int(b.to_numpy(number)) for number in counted)
    if not count:
        return
    first = tuple(int(i) for i in np.unravel_index(position, tuple(x.shape)))
    value = (x if isinstance(x, Marked) else b.to_numpy(x))[first]
    words = f"x has {count} values of {math.prod(x.shape)}"
    _say_clipped(words, f"{first}: {value}", call.spec.format, on_clip, stacklevel + 1)


def _say_clipped(how_many: str, first: str, form: Format, on_clip: str, stacklevel: int) -> None:
    here, way = (" at this scale", "use a larger scale") if form.scaled else ("", "use a format with more bits")
    words = f"{how_many} beyond the numbers that {form.name} has{here}, the first at index {first}"
    if on_clip == "raise":
        raise ValueError(f"{words}; {way}, or on_clip='saturate'")
    warnings.warn(
        f"{words}; they became the number next to them: {way}, or on_clip='saturate' where that is meant",
        ClippingWarning,
        stacklevel=stacklevel,
    )


def _checked_when_computed(x: Array, w: affine.Coded, q: QArray, call: _Call, on_clip: str) -> Array:
    """Deferred codes of ``x``, whose chunks warn or raise as ``_check_clipped`` does when they are computed."""
    b, shape = call.b, tuple(x.shape)
    static: dict[str, Any] = {"spec": call.spec, "recipe": call.recipe}
    if not math.prod(shape):
        return w.codes
    beside: dict[str, Any] = {"x": x}
    if on_clip == "raise":
        qparams = None if call.together else affine.QParams(*w[1:])
        beside["flags"] = run(b, _clipping.clipped, x, qparams, call.key, **static)
    else:
        for name, kept in (("scale", q.scale), ("zero_point", q.zero_point), ("offset", q.offset)):
            if kept is not None:
                numbers = kept.dequantize() if isinstance(kept, QArray) else kept
                beside[name] = b.xp.broadcast_to(spread(numbers, shape, call.spec.block, b.xp), shape)
    look = partial(_check_clipped_chunk, names=tuple(beside), on_clip=on_clip, **static)
    return b.check_when_computed(w.codes, look, *beside.values())


def _check_clipped_chunk(
    codes: Any, start: tuple[int, ...], *arrays: Any, names: tuple[str, ...], on_clip: str, spec: Any, recipe: Any
) -> None:
    """``_check_clipped`` of a chunk that begins at an index, with parameters for each element; or flags that say it."""
    b, beside = get_backend("numpy"), dict(zip(names, arrays, strict=True))
    x, flags = beside["x"], beside.get("flags")
    if flags is None:
        if not bool(_clipping.reaches_an_end(codes, spec=spec, recipe=recipe, b=b)):
            return
        scale = beside["scale"] if "scale" in beside else np.ones(x.shape)
        ends = range_of(spec.element, scale, beside.get("zero_point"), beside.get("offset"), slack=True)
        compute, spec = spec.source.compute, replace(spec, block=(1,) * x.ndim)
        with np.errstate(all="ignore"):  # as where the whole array is looked at
            low, high = (end.astype(compute) for end in with_margin(*ends, compute))
            flags = _clipping.beyond(x, low, high, spec=spec, b=b)
    if flags.any():
        at = np.unravel_index(np.argmax(flags), flags.shape)
        first = tuple(int(i) + n for i, n in zip(at, start, strict=True))
        words = f"x has {int(flags.sum())} values of {x.size} in the chunk at {start}"
        _say_clipped(words, f"{first}: {x[at]}", spec.format, on_clip, stacklevel=2)
