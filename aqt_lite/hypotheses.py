"""Conventions that make two quantized arrays of the same numbers differ, each a record.

Owns: ``Hypothesis`` and ``HYPOTHESES``, what may have been done to codes and scales; ``Rule`` and the lists of rules,
how they may have been chosen from floats. Imports: sides, the tables of dialects, layouts and formats, ``quantize``.

One more convention is one more record here: ``comparison`` tries all of them, alone and in pairs, and asks for no name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from aqt_lite._registry import get_backend
from aqt_lite._sides import Side
from aqt_lite.api import ROUNDINGS, quantize
from aqt_lite.dialects import DIALECTS, Dialect
from aqt_lite.elements import Integer, float_type
from aqt_lite.formats import SCALE_FORMATS, SCALE_MODES
from aqt_lite.granularity import granularity_of
from aqt_lite.layouts import LAYOUTS, Family, Layout
from aqt_lite.packing import pack, unpack
from aqt_lite.qarray import QArray

__all__ = ["HYPOTHESES", "Hypothesis", "Rule", "given_rules", "named_rules", "nearby_rules"]

_Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Hypothesis:
    """What may have been done to codes, scales and zero points on the way.

    Parameters
    ----------
    name : str
        A few words, which ``Comparison.explanation.name`` is.
    says : str
        A clause with ``{one}`` and ``{other}``: what is so of ``one`` if the hypothesis holds, which has been undone in
        it. ``{note}`` is what ``note`` says.
    apply : callable
        ``apply(one, other)``: what ``one`` becomes, to be compared with ``other``; None where it does not apply.
    both_ways : bool
        Whether doing and undoing are two things, so that both arrays are to be tried as ``one``.
    opens : bool
        Whether another hypothesis may have to be applied before anything looks better.
    note : callable, optional
        ``note(one, other)``: a number or word that the clause needs.
    """

    name: str
    says: str
    apply: Callable[[Side, Side], Side | None]
    both_ways: bool = True
    opens: bool = False
    note: Callable[[Side, Side], str] | None = None

    def in_words(self, one: str, other: str, before: Side, against: Side) -> str:
        """The clause."""
        note = self.note(before, against) if self.note is not None else ""
        return self.says.format(one=one, other=other, note=note)


# ---- axes and blocks


def _last_two_swapped(side: Side, other: Side, *, codes: bool = True, grids: bool = True) -> Side | None:
    ndim = len(side.shape)
    if ndim < 2 or (codes != grids and side.shape[-1] != side.shape[-2]):
        return None
    order = [*range(ndim - 2), ndim - 1, ndim - 2]
    return side.with_axes(order, codes=codes, grids=grids)


def _axes_reversed(side: Side, other: Side) -> Side | None:
    return side.with_axes(range(len(side.shape))[::-1]) if len(side.shape) > 2 else None


_KERNELS = (
    *(("HWIO", "OIHW"), ("OIHW", "HWIO"), ("OHWI", "OIHW"), ("OIHW", "OHWI")),
    *(("HWIO", "OHWI"), ("OHWI", "HWIO"), ("IOHW", "OIHW"), ("HWOI", "OIHW")),
)
"""Orders of the axes of convolutions' kernels, of JAX, torch, TensorFlow Lite, and of transposed ones."""


def _kernel_axes(side: Side, other: Side, *, mine: str, its: str) -> Side | None:
    """Axes in the order of the other's kernels; HW stands for all spatial axes."""
    ndim = len(side.shape)
    if ndim < 3:
        return None
    spatial = "abcdefgh"[: ndim - 2]
    before, after = (name.replace("HW", spatial) for name in (mine, its))
    order = [before.index(axis) for axis in after]
    same = list(range(ndim))
    if order in (same, same[::-1], [*same[:-2], ndim - 1, ndim - 2]) or ndim > 10:  # these are other records
        return None
    return side.with_axes(order)


def _reshaped(side: Side, other: Side) -> Side | None:
    """The same memory in the other's shape, where scales are of the first or the last axis, or one for all."""
    if len(side.shape) == len(other.shape) or side.size != other.size or side.maps or not (side.shape and other.shape):
        return None
    wide = [axis for axis, count in enumerate(side.grid) if count > 1]
    if len(wide) > 1 or 0 in side.shape:
        return None
    grid, block = [1] * len(other.shape), [None] * len(other.shape)
    for axis in wide:
        at = 0 if axis == 0 else -1
        if axis not in (0, len(side.shape) - 1) or not side.grid[axis] == side.shape[axis] == other.shape[at]:
            return None
        grid[at], block[at] = side.grid[axis], 1  # type: ignore[call-overload]
    made = side.with_grids(lambda g: g.reshape(grid), tuple(block))
    return replace(made, codes=np.reshape(side.codes, other.shape))


def _scales_of_other_axis(side: Side, other: Side, *, turned: bool) -> Side | None:
    """The same scales on the other side's grid: in the order of memory, or transposed."""
    if side.shape != other.shape or side.sizes == other.sizes or side.scale.size != other.scale.size:
        return None
    if side.scale.size < 2:
        return None
    return side.with_grids(lambda g: (g.T if turned else g).reshape(other.grid), other.block)


def _blocks_of_other(side: Side, other: Side) -> Side | None:
    """The scales repeated for smaller blocks."""
    if side.shape != other.shape or side.sizes == other.sizes or 0 in side.shape:
        return None
    if any(mine % its for mine, its in zip(side.sizes, other.sizes, strict=True)):
        return None
    index = [np.arange(n) * size // own for n, size, own in zip(other.grid, other.sizes, side.sizes, strict=True)]
    return side.with_grids(lambda g: g[np.ix_(*index)], other.block)


def _size_in_words(side: Side, other: Side) -> str:
    return f"{granularity_of(side.block)} for {granularity_of(other.block)}"


# ---- the order of codes


def _reordered(
    side: Side,
    other: Side,
    *,
    order: Callable[[int, int], tuple[int, ...] | None],
    axis: int,
    of: tuple[str, ...] = (),
) -> Side | None:
    """Codes along an axis in another order, which repeats; and so what ``of`` names, where it has an entry for each."""
    if len(side.shape) < -axis:
        return None
    length = side.shape[axis]
    period = order(side.element.bits, length)
    if period is None or length % len(period) or period == tuple(range(len(period))):
        return None
    made = side.with_codes(lambda codes, at: _permuted(codes, period, at), axis, len(period))
    if of and side.grid[axis] != length:
        return None
    at = axis % len(side.shape)
    changed: dict[str, Any] = {name: _permuted(getattr(side, name), period, at) for name in of}
    return replace(made, **changed)


def _permuted(a: _Numbers, period: tuple[int, ...], axis: int) -> _Numbers:
    index = np.arange(a.shape[axis]).reshape(-1, len(period))[:, list(period)].reshape(-1)
    return np.take(a, index, axis=axis)


def _reversed_in(word: int, bits: int, length: int) -> tuple[int, ...] | None:
    return tuple(range(word // bits))[::-1] if word % bits == 0 and bits < word else None


def _planes(block: int | None, bits: int, length: int) -> tuple[int, ...] | None:
    """Where a byte holds one code of every plane of a block: of 4 bits, codes i and i + half the block."""
    block = length if block is None else block
    if 8 % bits or bits == 8 or block % (8 // bits) or block == 8 // bits:
        return None
    planes = 8 // bits
    return tuple(i + j * (block // planes) for i in range(block // planes) for j in range(planes))


def _awq(bits: int, length: int) -> tuple[int, ...] | None:
    return (0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else None


def _rows_of_heads(side: Side, other: Side, *, length: int) -> Side | None:
    """Rows of each head, halves of which were side by side, in turns; with their scales."""
    if len(side.shape) < 2 or side.grid[-2] not in (1, side.shape[-2]):
        return None
    parts = ("zero_point", "scale", "offset") if side.grid[-2] == side.shape[-2] else ()
    halves = tuple(i + j * (length // 2) for i in range(length // 2) for j in range(2))
    return _reordered(side, other, order=lambda bits, rows: halves, axis=-2, of=parts)


def _restreamed(side: Side, other: Side, *, again: Callable[[_Numbers, int], _Numbers], axis: int) -> Side | None:
    """Codes along an axis written as one layout has it and read as another has it."""
    bits = side.element.bits
    if len(side.shape) < -axis or 32 % bits == 0 or bits > 8:
        return None
    return side.with_codes(_as_patterns(side, again), axis, side.shape[axis])


def _as_patterns(side: Side, again: Callable[[_Numbers, int], _Numbers]) -> Callable[[_Numbers, int], _Numbers]:
    """A function of bit patterns along the last axis as one of codes along any."""
    bits, signed = side.element.bits, side.element.codes[0] < 0

    def read_again(codes: _Numbers, at: int) -> _Numbers:
        rows = np.moveaxis(codes, at, -1).astype(np.int64) & ((1 << bits) - 1)
        found = again(rows, bits).astype(np.int64)
        if signed:
            found = (found ^ (1 << (bits - 1))) - (1 << (bits - 1))
        return np.moveaxis(found, -1, at)

    return read_again


def _in_words_read_as_stream(rows: _Numbers, bits: int) -> _Numbers:
    """32 // bits codes in each word of 32 bits, the rest of it empty, read as if none were."""
    count, length = 32 // bits, rows.shape[-1]
    filled = np.concatenate([rows, np.zeros((*rows.shape[:-1], -length % count), np.int64)], axis=-1)
    words = filled.reshape(*rows.shape[:-1], -1, count) << (np.arange(count) * bits)
    stream = np.ascontiguousarray(words.sum(-1).astype("<u4")).view("uint8")
    needed = -(-length * bits // 8)
    return np.asarray(unpack(stream[..., :needed], bits=bits, length=length, signed=False, b=get_backend("numpy")))


def _stream_in_other_bit_order(rows: _Numbers, bits: int) -> _Numbers:
    """A stream of bits whose bytes begin with the lowest bit, read as if they began with the highest."""
    b, length = get_backend("numpy"), rows.shape[-1]
    stream = np.asarray(pack(rows.astype(np.uint8), bits=bits, b=b))
    each = np.unpackbits(stream, axis=-1, bitorder="big")[..., : length * bits]
    weights = 1 << np.arange(bits)[::-1]
    return np.asarray(each.reshape(*rows.shape[:-1], length, bits).astype(np.int64) @ weights)


def _stored_otherwise(side: Side, other: Side, *, layout: Layout | Family) -> Side | None:
    """Codes stored in a layout, and read as a stream along the axis that it runs along."""
    bits, ndim = side.element.bits, len(side.shape)
    held = layout.layouts if isinstance(layout, Family) else (layout,)
    found = next((a for a in held if len(a.leaves) == 1 and a.bits == bits and not a.flat), None)
    if found is None or not ndim or bits > 8 or [len(field.parts) for field in found.fields] == [1]:
        return None
    leaf = replace(found.leaves[0], low=None, add=0)  # the order of bits alone
    plain, length = replace(found, leaves=(leaf,), axis=-1), side.shape[found.axis]
    try:
        plain.stored_shape((length,))
    except ValueError:  # blocks that do not divide the axis
        return None

    def again(rows: _Numbers, bits: int) -> _Numbers:
        stored = plain.packed({"codes": rows})
        stream = np.ascontiguousarray(stored.astype(stored.dtype.newbyteorder("<"))).view(np.uint8)
        missing = max(-(-length * bits // 8) - stream.shape[-1], 0)
        stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, missing)])[..., : -(-length * bits // 8)]
        return np.asarray(unpack(stream, bits=bits, length=length, signed=False, b=get_backend("numpy")))

    return side.with_codes(_as_patterns(side, again), found.axis, length)


# ---- codes and zero points


def _half(side: Side) -> int:
    return 1 << (side.element.bits - 1)


def _in_other_sign(side: Side, other: Side, *, zero: bool, bits_only: bool = False) -> Side | None:
    """Codes 2^(bits-1) further on; or the same bits read as codes of the other sign."""
    mine, its = side.element, other.element
    if (
        not (isinstance(mine, Integer) and isinstance(its, Integer))
        or mine.signed == its.signed
        or mine.bits != its.bits
    ):
        return None
    shift = -_half(side) if its.signed else _half(side)
    mask = (1 << mine.bits) - 1

    def moved(codes: _Numbers, axis: int) -> _Numbers:
        wide = codes.astype(np.int64)
        if not bits_only:
            return wide + shift
        wide = wide & mask
        return np.where(wide >= _half(side), wide - mask - 1, wide) if its.signed else wide

    made = replace(side.with_codes(moved), format=other.format)
    return replace(made, zero_point=side.zero_point + shift) if zero else made


def _negated(side: Side, other: Side, *, scale: bool) -> Side | None:
    if not side.element.signed or not isinstance(side.element, Integer):
        return None
    made = side.with_codes(lambda codes, axis: -codes.astype(np.int64))
    made = replace(made, zero_point=-side.zero_point)
    return replace(made, scale=-side.scale) if scale else made


def _steps_between_zeros(side: Side, other: Side) -> int:
    """By how much all zero points of the other are larger, where it is one number and too much for a chance; else 0."""
    if side.grid != other.grid or not side.zero_point.size:
        return 0
    apart = other.zero_point - side.zero_point
    step = int(apart.flat[0])
    several = np.unique(side.zero_point).size >= _MANY
    return step if (apart == step).all() and (several or step in (1, -1, _half(side), -_half(side))) else 0


def _zeros_moved(side: Side, other: Side, *, codes: bool) -> Side | None:
    step = _steps_between_zeros(side, other)
    if not step or not side.element.zero_points:
        return None
    made = replace(side, zero_point=side.zero_point + step)
    return made.with_codes(lambda c, axis: c.astype(np.int64) + step) if codes else made


def _step_in_words(side: Side, other: Side) -> str:
    step = _steps_between_zeros(side, other)
    return f"{abs(step)} {'lower' if step > 0 else 'higher'}"


def _codes_moved(side: Side, other: Side, *, step: int) -> Side | None:
    return side.with_codes(lambda c, axis: c.astype(np.int64) + step) if side.element.zero_points else None


def _offset_for_zero(side: Side, other: Side) -> Side | None:
    if not side.zero_point.any() or not other.offset.any() or side.grid != other.grid:
        return None
    offset = (-side.zero_point * side.scale).astype(_compute(side)).astype(np.float64)
    return replace(side, zero_point=np.zeros_like(side.zero_point), offset=offset)


def _zeros_left_out(side: Side, other: Side) -> Side | None:
    """Zero points that one of them has and the other not."""
    if not side.zero_point.any() or other.zero_point.any() or other.offset.any():
        return None
    return replace(side, zero_point=np.zeros_like(side.zero_point))


def _of_other_format(side: Side, other: Side) -> Side | None:
    return replace(side, format=other.format) if side.element != other.element else None


# ---- scales

_MANY = 4
"""Numbers of a kind from which on a rule that has one free number cannot hold of them by chance."""
_CLOSE = 3 * 2.0**-24
"""What two roundings of float32 leave of a ratio, in parts of it."""


def _compute(side: Side) -> str:
    return float_type(side.source or "float32").compute


def _with_scales(side: Side, other: Side, *, of: Callable[[_Numbers], _Numbers]) -> Side:
    with np.errstate(all="ignore"):
        return replace(side, scale=of(side.scale.astype(_compute(side))).astype(np.float64))


def _factor(side: Side, other: Side) -> float | None:
    """What all scales of ``side`` are to be multiplied by; None where it is not one number."""
    if side.grid != other.grid or not side.scale.size:
        return None
    with np.errstate(all="ignore"):
        ratios = other.scale / side.scale
        middle = float(np.median(ratios))
        close = np.abs(ratios / middle - 1) <= 2 * _CLOSE
    if not (0 < abs(middle) < math.inf and close.all() and (other.scale != side.scale).any()):
        return None
    return middle


def _reach_of_dialects(side: Side) -> dict[float, str]:
    """Ratios of scales that differ in what the largest magnitude becomes, and what that is in the dividend."""
    numbers = {side.element.top, *(n for d in DIALECTS.values() if (n := d.largest(side.element)))}
    if side.element.signed:
        numbers.add(-side.element.min)
    return {i / j: f"{j:g} instead of {i:g}" for i in sorted(numbers) for j in sorted(numbers) if i != j}


def _factors(side: Side, other: Side) -> Iterator[tuple[float, str]]:
    """Ratios that are known to occur, and what each says of ``other``'s scales."""
    for outer in (side.outer, other.outer):
        if outer and outer != 1.0:
            yield outer, f"times the tensor scale, {outer:.6g}"
            yield 1 / outer, f"without the tensor scale, {outer:.6g}"
            yield 1 / outer**2, f"divided by the tensor scale instead of multiplied, {outer:.6g}"
            yield outer**2, f"multiplied by the tensor scale instead of divided, {outer:.6g}"
    for ratio, words in _reach_of_dialects(side).items():
        yield ratio, f"for a range to {words}"
    for power in range(1, 17):
        yield 2.0**power, f"times 2^{power}"
        yield 2.0**-power, f"times 2^-{power}"


def _why_factor(side: Side, other: Side) -> str | None:
    factor = _factor(side, other)
    if factor is None:
        return None
    for known, words in _factors(side, other):
        if abs(factor / known - 1) <= _CLOSE:
            return words
    if abs(factor - 1) <= _CLOSE:
        return "but for their last places: other roundings of the same numbers"
    return f"times {factor:.9g}" if np.unique(side.scale).size >= _MANY else None


def _times_factor(side: Side, other: Side) -> Side | None:
    return replace(side, scale=other.scale) if _why_factor(side, other) is not None else None


def _factor_in_words(side: Side, other: Side) -> str:
    return str(_why_factor(side, other))


def _cut_to_bfloat16(scale: _Numbers) -> _Numbers:
    bits = scale.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return np.asarray(bits.view(np.float32))


def _inverse(scale: _Numbers) -> _Numbers:
    return np.asarray(1 / scale)


def _rounded_to(scale: _Numbers, dtype: Any) -> _Numbers:
    return scale.astype(dtype).astype(scale.dtype)


# ---- the table


def _orders(axis: int) -> Iterator[Hypothesis]:
    along = "the last axis" if axis == -1 else "the last axis but one"
    for word, what in ((8, "byte"), (32, "word of 32 bits")):
        name = {8: "order of codes in a byte", 32: "order of codes in a word"}[word]
        order = partial(_reversed_in, word)
        yield Hypothesis(
            f"{name}, along {along}",
            f"codes of {{one}} lie in each {what} along {along} in the opposite order of those of {{other}}",
            partial(_reordered, order=order, axis=axis),
            both_ways=False,
        )
    for block in (32, 64, 128, 256, None):
        of = f"blocks of {block}" if block else "the whole axis"
        yield Hypothesis(
            f"halves of {of}, along {along}",
            f"{{other}} is {{one}} stored with a code of each half (or quarter) of {of} in a byte along {along}, and "
            "read as if neighbours were there",
            partial(_reordered, order=partial(_planes, block), axis=axis),
        )
    for parts in ((), ("zero_point",), ("zero_point", "scale", "offset")):
        with_these = {0: "codes", 1: "codes and zero points", 3: "codes, zero points and scales"}[len(parts)]
        yield Hypothesis(
            f"order of AWQ, {with_these}, along {along}",
            f"{with_these} of {{other}} along {along} are those of {{one}} in AWQ's order, 0 2 4 6 1 3 5 7",
            partial(_reordered, order=_awq, axis=axis, of=parts),
        )
    yield Hypothesis(
        f"codes across words, along {along}",
        f"{{other}} is {{one}} stored with whole codes in words of 32 bits along {along}, and read as a stream without "
        "gaps",
        partial(_restreamed, again=_in_words_read_as_stream, axis=axis),
    )
    yield Hypothesis(
        f"order of bits, along {along}",
        f"the stream of bits along {along} begins in {{one}} with a byte's lowest bit, in {{other}} with its highest",
        partial(_restreamed, again=_stream_in_other_bit_order, axis=axis),
    )


HYPOTHESES: tuple[Hypothesis, ...] = (
    # axes and blocks
    Hypothesis("transposed", "{one} is {other} transposed", _last_two_swapped, both_ways=False, opens=True),
    Hypothesis(
        "axes reversed",
        "axes of {one} are those of {other} in reverse order",
        _axes_reversed,
        both_ways=False,
        opens=True,
    ),
    *(
        Hypothesis(
            f"kernel axes {mine} for {its}",
            f"axes of {{one}} are in the order {mine} (HW: all spatial ones), those of {{other}} in the order {its}",
            partial(_kernel_axes, mine=mine, its=its),
            opens=True,
        )
        for mine, its in _KERNELS
    ),
    Hypothesis(
        "reshaped",
        "{one} has the shape of {other} in the same order of memory, some axes being one",
        _reshaped,
        both_ways=False,
        opens=True,
    ),
    Hypothesis(
        "codes transposed",
        "codes of {one} are transposed, its scales are not",
        partial(_last_two_swapped, grids=False),
        both_ways=False,
        opens=True,
    ),
    Hypothesis(
        "axis of scales",
        "scales of {one} lie along another axis: {note}",
        partial(_scales_of_other_axis, turned=False),
        both_ways=False,
        opens=True,
        note=_size_in_words,
    ),
    Hypothesis(
        "axis of scales, transposed",
        "scales of {one} lie along another axis, transposed: {note}",
        partial(_scales_of_other_axis, turned=True),
        both_ways=False,
        opens=True,
        note=_size_in_words,
    ),
    Hypothesis(
        "size of groups",
        "{other} repeats the scales of {one} for smaller blocks: {note}",
        _blocks_of_other,
        note=_size_in_words,
    ),
    # codes and zero points
    Hypothesis("format", "the same codes are read as another format", _of_other_format, both_ways=False),
    Hypothesis(
        "signed and unsigned codes",
        "codes and zero points of {one} lie 2^(bits-1) apart from those of {other}: the same numbers in codes of the "
        "other sign",
        partial(_in_other_sign, zero=True),
        both_ways=False,
    ),
    Hypothesis(
        "signed and unsigned codes, zero points as they are",
        "codes of {one} lie 2^(bits-1) apart from those of {other}, and its zero points do not",
        partial(_in_other_sign, zero=False),
        both_ways=False,
    ),
    Hypothesis(
        "bits of signed codes read as unsigned",
        "codes of {one} have the bits of those of {other}, read with the other sign",
        partial(_in_other_sign, zero=False, bits_only=True),
        both_ways=False,
    ),
    Hypothesis(
        "zero points moved",
        "zero points of {one} are all {note} than those of {other}",
        partial(_zeros_moved, codes=False),
        both_ways=False,
        note=_step_in_words,
    ),
    Hypothesis(
        "codes and zero points moved",
        "codes and zero points of {one} are all {note} than those of {other}",
        partial(_zeros_moved, codes=True),
        both_ways=False,
        note=_step_in_words,
    ),
    *(
        Hypothesis(
            "codes moved by one",
            f"codes of {{one}} are all 1 {'lower' if step > 0 else 'higher'} than those of {{other}}",
            partial(_codes_moved, step=step),
            both_ways=False,
        )
        for step in (1, -1)
    ),
    Hypothesis("zero points left out", "{one} has zero points, and {other} none, with the same codes", _zeros_left_out),
    Hypothesis(
        "offset for zero point",
        "{other} has real offsets, -zero_point * scale, for zero points of {one}",
        _offset_for_zero,
    ),
    Hypothesis(
        "sign of codes",
        "codes of {one} are those of {other} with the sign changed",
        partial(_negated, scale=False),
        both_ways=False,
    ),
    Hypothesis(
        "sign of codes and scales",
        "codes and scales of {one} are those of {other} with the sign changed",
        partial(_negated, scale=True),
        both_ways=False,
    ),
    # scales
    Hypothesis(
        "inverse scale",
        "scales of {other} are the reciprocals of those of {one}",
        partial(_with_scales, of=_inverse),
    ),
    *(
        Hypothesis(
            f"scales in {dtype}",
            f"scales of {{other}} are those of {{one}} rounded to {dtype}",
            partial(_with_scales, of=partial(_rounded_to, dtype=kind)),
        )
        for dtype, kind in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16))
    ),
    Hypothesis(
        "scales cut to bfloat16",
        "scales of {other} are those of {one} cut to bfloat16, not rounded",
        partial(_with_scales, of=_cut_to_bfloat16),
    ),
    Hypothesis(
        "factor of scales",
        "scales of {other} are those of {one} {note}",
        _times_factor,
        both_ways=False,
        note=_factor_in_words,
    ),
    # the order of codes
    *_orders(-1),
    *_orders(-2),
    *(
        Hypothesis(
            f"rotary rows, heads of {length}",
            f"rows of {{other}} are those of {{one}} with the two halves of each head of {length} in turns, as rotary "
            "embeddings of other libraries want them",
            partial(_rows_of_heads, length=length),
        )
        for length in (64, 96, 128, 256)
    ),
    *(
        Hypothesis(
            f"layout {name}",
            f"{{other}} is {{one}} stored in layout {name!r} and read as a stream without gaps",
            partial(_stored_otherwise, layout=layout),
        )
        for name, layout in LAYOUTS.items()
    ),
)
"""What is tried, in this order: of several that explain everything, the first is reported."""


# ---- how codes and scales may have been chosen


@dataclass(frozen=True)
class Rule:
    """How codes, scales and zero points may have been chosen from floats.

    Parameters
    ----------
    name : str
        A few words.
    says : str
        A clause with ``{one}`` and ``{x}``, the floats: how it was made.
    made : callable
        ``made(x, side)``: what the rule makes of ``x`` in the format and blocks of ``side``. ValueError where the
        rule has no such thing.
    missing : str
        What the rule leaves open.
    of_all : bool
        Whether some of the blocks alone would not be made alike.
    """

    name: str
    says: str
    made: Callable[[_Numbers, Side], QArray]
    missing: str = ""
    of_all: bool = False


def _quantized(x: _Numbers, side: Side, **how: Any) -> QArray:
    how = {"granularity": granularity_of(side.block), "nonfinite": "ignore", "on_clip": "saturate", **how}
    return quantize(x, side.format, **how)


def _scheme(side: Side) -> str:
    """What the zero points suggest."""
    return "symmetric" if (side.zero_point == side.element.middle).all() else "affine"


def _by_dialect(x: _Numbers, side: Side, *, dialect: Dialect, scheme: str | None = None, **how: Any) -> QArray:
    if dialect.whole is not None:  # along the last axis, whichever it was
        turned = [axis for axis, size in enumerate(side.sizes) if size > 1][-1:] or [x.ndim - 1]
        order = [*(axis for axis in range(x.ndim) if axis not in turned), *turned]
        q = quantize(np.ascontiguousarray(np.transpose(x, order)), side.format.name, dialect=dialect)
        return q.transpose(*(order.index(axis) for axis in range(x.ndim)))
    own = (
        {"scale_dtype": side.scale_dtype}
        if side.scale_dtype and not dialect.for_format(side.format).plain_scales
        else {}
    )
    if dialect.offsets and side.offset.any():
        return _quantized(x, side, dialect=dialect, scheme="affine", offset="data", **own, **how)
    return _quantized(x, side, dialect=dialect, scheme=scheme or _scheme(side), **own, **how)


def _in_sixteen_bits(x: _Numbers, side: Side, *, dialect: Dialect, dtype: Any, first: bool) -> QArray:
    """Scales rounded to nearest, before codes are made of them or after."""
    q = _by_dialect(x, side, dialect=dialect)
    if q.scale is None:
        return q
    scale = np.asarray(q.scales).astype(dtype).astype(q.scales.dtype)
    if not first:
        return replace(q, scale=scale)
    zero = {} if q.zero_point is None else {"zero_point": q.zero_point}
    return _quantized(x, side, scale=scale, dialect=dialect, **zero)


def _with_mode(x: _Numbers, side: Side, *, mode: str) -> QArray:
    own = {"scale_dtype": side.scale_dtype} if side.scale_dtype else {}
    return _quantized(x, side, scale_mode=mode, **own)


def _kept_in(x: _Numbers, side: Side, *, kept: str) -> QArray:
    return _quantized(x, side, scheme=_scheme(side), scale_dtype=kept)


def _with_offset(x: _Numbers, side: Side) -> QArray:
    return _quantized(x, side, offset="data")


def _with_given(x: _Numbers, side: Side, *, dialect: Dialect, rounding: str) -> QArray:
    """Codes alone: scales and zero points are what they are."""
    given: dict[str, Any] = {"offset": side.offset} if side.offset.any() else {}
    if not given and (side.element.middle or side.zero_point.any()):
        given = {"zero_point": side.zero_point.astype(np.int32)}
    return _quantized(x, side, scale=side.scale, dialect=dialect, rounding=rounding, **given)


def _by_fields() -> list[Dialect]:
    """Dialects that their fields describe."""
    return [d for d in DIALECTS.values() if d.whole is None and d.together is None]


def named_rules() -> Iterator[Rule]:
    """The dialects of the table, and rules for scales of few bits."""
    for d in DIALECTS.values():
        says = f"{{one}} is what dialect {d.name!r} makes of {{x}}"
        yield Rule(d.name, says, partial(_by_dialect, dialect=d), of_all=d.whole is not None)
    for mode in SCALE_MODES:
        yield Rule(
            f"scale_mode {mode}",
            f"{{one}} is {{x}} with scales chosen by scale_mode={mode!r}",
            partial(_with_mode, mode=mode),
        )
    yield Rule("offset of the data", "{one} is {x} with offset='data'", _with_offset)
    for kept in SCALE_FORMATS:
        says = f"{{one}} is {{x}} with scale_dtype={kept!r}"
        yield Rule(f"scale_dtype {kept}", says, partial(_kept_in, kept=kept))
    for name, kind in (("float16", np.float16), ("bfloat16", ml_dtypes.bfloat16)):
        for d in _by_fields():
            for first in (True, False):
                when = "before codes are made" if first else "after codes were made"
                yield Rule(
                    f"{d.name}, scales in {name} {when}",
                    f"{{one}} is what dialect {d.name!r} makes of {{x}}, its scales rounded to {name} {when}",
                    partial(_in_sixteen_bits, dialect=d, dtype=kind, first=first),
                )


_FIELDS: dict[str, tuple[Any, ...]] = {
    "reach": ("top", "half range", "each side", "lowest"),
    "narrow_from": (2, 8, None),
    "divides_range": (False, True),
    "divides": (False, True),
    "zero_first": (False, True),
    "divides_zero": (False, True),
    "power_rounding": (None, 0.5, 0.75),
}
"""Fields of a dialect that decide numbers, and what they may be."""


def nearby_rules() -> Iterator[Rule]:
    """Dialects that differ from one of the table in a single field, in the rounding, or in two of this library's."""
    for d in _by_fields():
        for changed in _changes(d):
            yield _changed(d, changed)
    own = DIALECTS["aqt_lite"]
    single = list(_changes(own))
    for i, first in enumerate(single):
        for second in single[i + 1 :]:
            if not set(first) & set(second):
                yield _changed(own, {**first, **second})


def _changes(d: Dialect) -> Iterator[dict[str, Any]]:
    for field, values in _FIELDS.items():
        yield from ({field: value} for value in values if value != getattr(d, field))
    yield from ({"rounding": rounding} for rounding in ROUNDINGS if rounding not in ("half_even", "stochastic"))


def _changed(d: Dialect, changed: dict[str, Any]) -> Rule:
    words = ", ".join(f"{field}={value!r}" for field, value in changed.items())
    fields: dict[str, Any] = {field: value for field, value in changed.items() if field != "rounding"}
    how = {"rounding": changed["rounding"]} if "rounding" in changed else {}
    if "reach" in fields:
        fields["reaches"] = ()
    every: dict[str, Any] = {"of_floats": None, "of_blocks": None, "of_formats": (), "of_codebooks": None}
    dialect = replace(d, **{**every, **fields, "name": f"{d.name}, {words}"})
    return Rule(
        dialect.name,
        f"{{one}} is what dialect {d.name!r} with {words} makes of {{x}}",
        partial(_by_dialect, dialect=dialect, **how),
    )


def given_rules() -> Iterator[Rule]:
    """Codes from the scales that are there: what is left to try where no rule chooses those."""
    for rounding in ROUNDINGS[:3]:
        for divides in (False, True):
            for first in (False, True):
                own = replace(DIALECTS["aqt_lite"], name="given", divides=divides, zero_first=first)
                words = f"{'x / scale' if divides else 'x * (1 / scale)'}, rounded {rounding}"
                words += ", the zero point added first" if first else ""
                yield Rule(
                    f"codes of given scales: {words}",
                    f"codes of {{one}} are those of {{x}} with its own scales ({words})",
                    partial(_with_given, dialect=own, rounding=rounding),
                    missing="which rule chose the scales",
                )
