"""The same numbers in another convention, without going through floats.

Owns: ``convert``, and when it is exact. Imports: the container, dialects and formats, and sides, which hold what was
made against what was given.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Array
from aqt_lite._near import shown
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite._shapes import lengths_swapped
from aqt_lite._sides import Side, differences, read_side, values_that_differ
from aqt_lite._ways import not_a_qarray
from aqt_lite.dialects import Dialect, dialect_of
from aqt_lite.elements import ElementType
from aqt_lite.formats import FORMATS, Format, format_of
from aqt_lite.granularity import Granularity, block_of, granularity_of, grid_of
from aqt_lite.qarray import QArray

__all__ = ["convert"]

_Numbers = np.ndarray[Any, Any]


@naming_the_argument
def convert(
    q: QArray,
    dtype: Any = None,
    *,
    granularity: Granularity | None = None,
    scale_dtype: Any = None,
    offset: bool | None = None,
    dialect: str | Dialect | None = None,
) -> QArray:
    """Express a quantized array in another convention, exactly, or say why that cannot be.

    Parameters
    ----------
    q : QArray
        On any backend, where the result is too. Its layout in memory is kept.
    dtype : str, or a dtype or format object, optional
        Another format. Integers become integers of the other sign or another width: codes and zero points move from
        one middle code to the other (int8 to uint8: by 128). Of others each number that occurs must be a number of the
        new format, or, for integers, a whole number of the old one's steps, by which scales are then multiplied.
    granularity : PerTensor, PerChannel, PerGroup or PerBlock, optional
        Other blocks: smaller ones repeat scales; larger ones are possible where all that become one have the same.
    scale_dtype : str, optional
        How scales are kept: "float32" (float64 for float64 values), "float16", "bfloat16", "float8_e8m0fnu", ..., where
        that holds every scale.
    offset : bool, optional
        True: real offsets, ``-zero_point * scale``, instead of zero points. False: zero points instead of offsets.
    dialect : str or Dialect, optional
        What that library can store: one of its formats (the same, if it has it, else the narrowest that holds all
        codes), scales as plain numbers or as a block format has them, zero points. How codes and scales were chosen
        stays what it was.

    Returns
    -------
    QArray
        Of the same real numbers, ``(number - zero_point) * scale + offset``. A negative zero becomes zero in formats
        that have none; and sums with an offset are rounded once more by ``dequantize``.

    Raises
    ------
    ValueError
        It cannot be exact: with how many codes, scales or zero points do not fit.
    TypeError
        ``q`` is no QArray, or is being traced.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> q = aqt_lite.quantize(np.asarray([[1.0, -2.0], [0.5, 4.0]], "float32"), granularity=aqt_lite.PerChannel(0))
    >>> u = aqt_lite.convert(q, "uint8")
    >>> u.qvalue, u.zero_point.reshape(-1), bool((u.dequantize() == q.dequantize()).all())
    (array([[192,   1],
           [144, 255]], dtype=uint8), array([128, 128], dtype=int32), True)
    >>> aqt_lite.convert(q, scale_dtype="float16")
    Traceback (most recent call last):
    ValueError: scale_dtype='float16': scale=0.0157480314 is no number of float16, in which scales are kept: round it
    first, as NumPy's scale.astype('float16').astype('float32') does
    """
    if not isinstance(q, QArray):
        raise TypeError(f"{not_a_qarray('q', q)}, or use QArray.from_codes, which makes one of codes and scales")
    b = q._backend
    if any(b.is_traced(a) for a in q._arrays()):
        raise TypeError("convert needs values, but q is being traced: call it outside the compiled function")
    if q.scale is None:
        raise ValueError(f"q is an array of {q.dtype}, whose numbers have no scale: there is nothing to convert")
    if not (offset is None or isinstance(offset, bool | np.bool)):
        raise TypeError(
            f"offset={shown(offset)}: give True, False or None; the offsets are those of the same real numbers"
        )
    given = read_side(q, "q")
    rules = None if dialect is None else dialect_of(dialect)
    if rules is not None and (scale_dtype is not None or offset):
        raise ValueError(f"dialect={rules.name!r} keeps plain scales and zero points: leave scale_dtype and offset out")
    if rules is not None and rules.whole is not None:
        if q.dtype in (rules.symmetric or ()) and dtype is None and granularity is None:
            return q
        raise ValueError(
            f"dialect={rules.name!r} stores blocks of its own: quantize the floats with it; or name one of its formats "
            "as dtype= alone, with the granularity and scale_dtype that it has"
        )
    if rules is not None:
        scale_dtype, offset = "float32", None if rules.offsets and given.offset.any() else False
    made = _with_other_blocks(given, granularity)
    made = _with_zeros(made, offset)
    form = _format_for(made, rules) if dtype is None else format_of(dtype)
    if rules is not None and dtype is not None:
        _check_stored(rules, form, made)
    if rules is not None and form.scale is not None and form.name == given.format.name:
        scale_dtype = form.scale.name if rules.for_format(form).plain_scales else None  # as the format has them
    codes, made = _in_format(q, made, form, b)
    result = _assembled(q, codes, made, scale_dtype, b)
    _check_exact(given, read_side(result, "the result"))
    return result


# ---- blocks


def _with_other_blocks(side: Side, granularity: Granularity | None) -> Side:
    if granularity is None:
        return side
    block = block_of(granularity, len(side.shape))
    grid = grid_of(side.shape, block)
    sizes = tuple(max(min(n or length, length), 1) for n, length in zip(block, side.shape, strict=True))
    index = [
        np.minimum(np.arange(n) * size // own, max(old - 1, 0))
        for n, size, own, old in zip(grid, sizes, side.sizes, side.grid, strict=True)
    ]
    made = side.with_grids(lambda g: g[np.ix_(*index)], block)
    left = differences(side, made)
    apart = () if left is None else zip(("scales", "zero points", "offsets"), left[1:4], strict=True)
    for what, count in apart:
        if count:
            raise ValueError(
                f"granularity={granularity}: {count} {what} of {granularity_of(side.block)} differ from those of the "
                "block that they would lie in: only blocks of equal ones can be joined; quantize the floats again"
            )
    return made


# ---- zero points and offsets


def _with_zeros(side: Side, offset: bool | None) -> Side:
    """Offsets for zero points, or the reverse."""
    if offset is None or (not side.zero_point.any() and not side.offset.any()):
        return side
    compute = np.float64 if side.source == "float64" else np.float32
    if offset and side.zero_point.any():
        exact = -side.zero_point * side.scale
        kept = exact.astype(compute).astype(np.float64)
        _all_fit(kept == exact, exact, "offset=True", f"offsets are no numbers of {np.dtype(compute).name}")
        return replace(side, zero_point=np.zeros_like(side.zero_point), offset=kept)
    if not offset and side.offset.any():
        if not side.element.zero_points:
            raise ValueError(f"offset=False: {side.format.name} has no zero points: leave it out")
        zero = np.rint(-side.offset / side.scale)
        low, high = side.element.codes
        fits = (-zero * side.scale == side.offset) & (zero >= low) & (zero <= high)
        _all_fit(fits, side.offset, "offset=False", f"offsets are no code of {side.format.name} times their scale")
        return replace(side, zero_point=zero.astype(np.int64), offset=np.zeros_like(side.offset))
    return side


def _all_fit(fits: _Numbers, numbers: _Numbers, argument: str, what: str) -> None:
    """ValueError unless all do."""
    if not fits.all():
        first = numbers[~fits].reshape(-1)[0]
        raise ValueError(f"{argument}: {int((~fits).sum())} of {fits.size} {what}, the first {first:.9g}")


# ---- formats


def _stored(rules: Dialect, side: Side) -> tuple[str, ...] | None:
    """Formats that a library stores in the scheme of a side; None: all."""
    if side.offset.any() and rules.offsets:
        return rules.offsets
    scheme = "symmetric" if (side.zero_point == side.element.middle).all() else "affine"
    if side.offset.any():
        scheme = "offsets"
    found = [rules.formats(s) for s in (scheme, "given")]
    if found[0] == ():
        return ()
    known = [names for names in found if names is not None]
    return tuple(dict.fromkeys(n for names in known for n in names)) if len(known) == len(found) else None


def _check_stored(rules: Dialect, form: Format, side: Side) -> None:
    names = _stored(rules, side)
    if names is not None and form.name not in names:
        raise ValueError(f"dialect={rules.name!r} does not store {form.name}: it has {', '.join(names) or 'none'}")


def _format_for(side: Side, rules: Dialect | None) -> Format:
    """The same format, where a library has it; else its narrowest that holds all codes."""
    names = None if rules is None else _stored(rules, side)
    if names is None or side.format.name in names:
        return side.format
    known = sorted((FORMATS[n] for n in names), key=lambda f: (f.element.bits, f.element.signed != side.element.signed))
    problems = []
    for form in known:
        try:
            _table(side, form)
        except ValueError as error:
            problems.append(str(error))
        else:
            return form
    assert rules is not None
    has = f"dialect={rules.name!r} stores {', '.join(names) or 'no such formats'}"
    raise ValueError("; ".join([f"{has}, and none holds this {side.format.name} exactly", *problems[-1:]]))


def _moves(side: Side, form: Format) -> bool:
    """Whether codes and zero points move together from one middle code to the other."""
    return side.element.zero_points and form.element.zero_points


def _table(side: Side, form: Format) -> tuple[_Numbers, float]:
    """The new code of every code from the smallest on, and what scales are multiplied by."""
    old, new = side.element, form.element
    (low, high), (least, most) = old.codes, new.codes
    every = np.arange(low, high + 1)
    if old == new:
        return every, 1.0
    if side.offset.any() and (new.middle if not _moves(side, form) else new.middle - old.middle):
        raise ValueError(f"dtype={new.name!r}: {old.name} has offsets here, and would need zero points as well")
    used = np.zeros(every.size, bool)
    used[np.unique(side.codes).astype(np.int64) - low] = True
    if _moves(side, form):
        step = new.middle - old.middle
        zero = side.zero_point + step
        fits = (zero >= least) & (zero <= most)
        _all_fit(fits, side.zero_point, f"dtype={new.name!r}", "zero points have no code in it")
        moved = every + step
        missing = used & ((moved < least) | (moved > most))
        factor = 1.0
    else:
        if side.zero_point.any():
            raise ValueError(f"dtype={new.name!r}: {old.name} has zero points here, which {new.name} has not")
        numbers = _numbers(old)
        exact = {n: int(c) for n, c in zip(_numbers(new)[::-1], np.arange(least, most + 1)[::-1], strict=True)}
        factor = old.unit if old.unit is not None and new.zero_points else 1.0
        moved = np.asarray([exact.get(n / factor + (new.middle if new.zero_points else 0), least - 1) for n in numbers])
        missing = used & (moved < least)
    if missing.any():
        raise ValueError(
            f"dtype={new.name!r}: {int(missing.sum())} of the {int(used.sum())} codes of {old.name} that occur have no "
            f"code in it, the first {every[missing][0]}: quantize the floats again"
        )
    return moved, factor


def _numbers(element: ElementType) -> _Numbers:
    low, high = element.codes
    codes = np.arange(low, high + 1).astype(element.storage)
    with np.errstate(all="ignore"):
        return np.asarray(element.decode(codes, get_backend("numpy"), "float64"), dtype=np.float64)


def _in_format(q: QArray, side: Side, form: Format, b: Backend) -> tuple[Array, Side]:
    """Codes on their backend, and all else."""
    table, factor = _table(side, form)
    zero = side.zero_point
    new = form.element
    if side.element == new:
        codes = q.qvalue
    else:
        low = b.constant(side.element.codes[0], "int32", like=q.storage)
        looked_up = b.asarray(np.clip(table, *new.codes).astype(np.int32), like=q.storage)
        index = b.xp.astype(b.xp.reshape(q.qvalue, (-1,)), b.xp.int32) - low
        codes = b.xp.reshape(b.xp.astype(b.xp.take(looked_up, index, axis=0), b.dtype(new.storage)), q.shape)
        zero = zero + (new.middle - side.element.middle if _moves(side, form) else new.middle if new.zero_points else 0)
    return codes, replace(side, scale=side.scale * factor, zero_point=zero, format=form)


# ---- the result


def _assembled(q: QArray, codes: Array, side: Side, scale_dtype: Any, b: Backend) -> QArray:
    compute = "float64" if q.float_dtype == "float64" else "float32"
    kept = q.scale if isinstance(q.scale, QArray) else None
    scale: Any = b.asarray(side.scale.astype(compute), like=q.storage)
    zeros: dict[str, Any] = {}
    if scale_dtype is None and isinstance(q.offset, QArray) and _unchanged(q.offset, side.offset):
        zeros["offset"] = q.offset  # in as few bits
    elif side.offset.any():
        zeros["offset"] = b.asarray(side.offset.astype(compute), like=q.storage)
    elif side.zero_point.any() or side.element.middle:
        zeros["zero_point"] = b.asarray(side.zero_point.astype(np.int32), like=q.storage)
    if scale_dtype is None and kept is not None:
        if kept.scale is None:
            scale_dtype = kept.dtype
        elif _unchanged(kept, side.scale):
            scale = kept
        else:
            raise ValueError(
                f"scales are kept in {kept.dtype}, with scales of their own, and would change: give "
                "scale_dtype='float32' to have them as plain numbers"
            )
    how: dict[str, Any] = {"dtype": side.format.name, "granularity": granularity_of(side.block)}
    try:
        made = QArray.from_codes(codes, scale, **zeros, **how, scale_dtype=scale_dtype, float_dtype=q.float_dtype)
    except ValueError as error:
        said = scale_dtype is None or str(error).startswith("scale_dtype=")
        raise ValueError(str(error) if said else f"scale_dtype={scale_dtype!r}: {error}") from None
    made = made.with_trainable_scales(q.trainable)
    made = made.for_dense(*lengths_swapped(q.transposed)) if q.transposed else made
    return made if q.packed_length is not None or not q._element.packs else made.unpacked()


def _unchanged(kept: QArray, numbers: _Numbers) -> bool:
    """Whether what is kept in few bits has these numbers."""
    return tuple(kept.shape) == numbers.shape and bool((kept._backend.to_numpy(kept.dequantize()) == numbers).all())


def _check_exact(given: Side, made: Side) -> None:
    """ValueError unless what was made stands for the same real numbers: held against them, not concluded."""
    count, _ = values_that_differ(given, made)
    if count:
        raise ValueError(
            f"{count} of {given.size} values would be others as {made.in_words()}: quantize the floats again"
        )
