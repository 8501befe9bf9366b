"""Products of floats made of exact products of integers: the reproducible ones, and fast ones where that is faster.

Owns: the forms of ``reference.matmul_reproducible`` and ``reference.fixed_point_matmul`` for NumPy arrays, with their
bits. Imports: the operations, the runtime, ``integers``, and ``serve``, which says what each is for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._dispatch import run
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import runtime, serve
from aqt_lite.backends.cpu.in_out import LEAST_CODES
from aqt_lite.backends.cpu.integers import exact_matmul
from aqt_lite.backends.cpu.kinds import numbers_of_codes
from aqt_lite.backends.cpu.operands import blocks_of_rows, in_c_order, scales_in
from aqt_lite.backends.cpu.rows import as_rows, in_bytes, rows_of_columns, turned_over
from aqt_lite.backends.cpu.runtime import (
    CHUNKS_PER_CORE,
    LOADED,
    aligned_empty,
    ends_of_parts,
    in_parts,
    map_ranges,
    steps_of_product,
)
from aqt_lite.elements import ElementType
from aqt_lite.ops import reference

__all__ = [
    "Groups",
    "fixed_point_matmul",
    "groups_of",
    "matmul_by_dots",
    "matmul_in_groups",
    "matmul_reproducible",
    "matmul_reproducible_stored",
    "powers_of_two",
    "reproducible_of_weight",
    "reproducible_stored_of_weight",
    "shares_of_rows",
]


LONGEST_IN_FLOATS = 256
"""Width of pieces up to which BLAS multiplies them in float64, exactly; from there on integer products gain more."""

MOST_SHARES, ROWS_OF_SHARES = 16, 64
"""Parts of a weight (in, out) that have exact sums of their own, at most, and rows that each has a multiple of."""

FIXING = 4
"""Steps of other loops that an entry of x in fixed point takes the time of."""

FEWEST_FOR_BLAS_THREADS = 1 << 18
"""Products up to which BLAS starts no threads, which would be in the way of ours."""


_FLOAT32 = np.dtype(np.float32)


@functools.cache
def powers_of_two() -> Array:
    """``2^(i - 256)`` for i in [0, 512), as ``Backend.power_of_two``: 0 below 2^-100."""
    return get_backend("numpy").power_of_two(np.clip(np.arange(-256, 256, dtype=np.int32), None, 127))


@np.errstate(all="ignore")
def _by_dots(x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int, fast: bool) -> Any:
    """``reference.matmul_reproducible`` where the contracted axis is one piece.

    What the reference does to whole arrays in some thirty steps happens here in two loops around the integer product.
    ``fast``: only rows of which fixed point loses nothing that a float32 product keeps.
    """
    if not serve.dots(x, x.dtype.name, w, spec, contract):
        return NotImplemented
    if fast and (not serve.dots_beat_floats() or serve.is_worth_floats(len(x), w.codes.size, by_digits=True)):
        return NotImplemented
    if fast and serve.decoding_beats_dots(len(x), x.dtype.name, w, spec, contract):
        return NotImplemented
    return _multiply_by_dots(x, w, bias, spec, fast)


def _multiply_by_dots(x: Array, w: Coded, bias: Array | None, spec: Spec, fast: bool) -> Any:
    """The same where it is known to serve."""
    (rows, _), columns, x_dtype = x.shape, len(w.codes), x.dtype
    dots, powers = runtime.integer_dots(), powers_of_two()
    x = np.ascontiguousarray(x, dtype=np.float32)
    parts = []
    for part in dots.parts_of_rows(rows, dots.DIGITS):
        prepared = _prepared(x[part], powers)
        if fast and (prepared.flags & dots.ANY_FLAG).any():
            return NotImplemented
        parts.append((part, prepared, _refined(x[part], prepared, powers)))
    vectors = _of_columns(w, bias, spec)
    codes, unsigned = in_c_order(w.codes.view(np.uint8)).view(np.int8), w.codes.dtype == np.uint8
    y = np.empty((rows, columns), dtype=np.float32)

    height = dots.HEIGHT_FOR_ONE_ROW if rows == 1 else dots.STRIP
    for part, prepared, refined in parts:
        steps = steps_of_product(codes.size, len(prepared.flags))
        ends = ends_of_parts(columns, height, steps)
        in_parts(dots.finish_in_parts, steps, ends, codes, unsigned, *prepared, *refined, *vectors, powers, y[part])
    return y.astype(x_dtype, copy=False)


def _of_columns(w: Coded, bias: Array | None, spec: Spec) -> list[Array]:
    """``reference.of_columns``, in order: compiled loops check no bounds, and are compiled anew for another layout.

    Where each row has a scale of its own, and no zero point, in the fewest steps.
    """
    scale = w.scale
    if len(scale) != len(w.codes) or w.zero_point is not None or scale.dtype != _FLOAT32:
        return [np.ascontiguousarray(v) for v in reference.of_columns(w, bias, spec=spec, b=get_backend("numpy"))]
    scale = np.ascontiguousarray(scale).reshape(-1)
    fraction, exponent = get_backend("numpy").fraction_and_exponent(np.abs(scale))
    np.negative(fraction, out=fraction, where=scale < 0)
    return [fraction, exponent, np.zeros(len(scale), np.int32), _bias_of(bias, len(scale))]


def _bias_of(bias: Array | None, columns: int) -> Array:
    if bias is None:
        return np.zeros(columns, np.float32)
    return np.ascontiguousarray(reference.flushed(bias.astype(np.float32, copy=False), np))


class Groups(NamedTuple):
    """What ``groups.multiply`` takes of a weight (N, K) whose groups lie along K, beside its codes."""

    halves: bool
    """Whether two codes lie in a byte."""
    flip: int
    """What bytes differ by, bit by bit, from signed numbers."""
    table: Array
    """Numbers of codes of 4 bits, in multiples of their unit."""
    scale: Array
    """Of those multiples: for each row of the weight, or for all, and each group."""
    zero: Array
    """Zero points likewise, int32; empty where all are 0."""
    size: int
    """Codes in a group."""


def groups_of(w: Coded, spec: Spec, packed: bool, b: Backend, swapped: bool = False) -> Groups:
    """The operands of a weight whose codes are packed two a byte, or lie one a byte and are integers.

    ``swapped``: scales and zero points have their axes in the other order, and so have the operands.
    """
    xp, rows, unit = b.xp, w.codes.shape[0], spec.element.unit
    size = spec.block[1]
    assert size is not None
    assert unit is not None
    scale = scales_in(unit, w.scale, spec, b)

    def of_rows(blocks: Array) -> Array:
        return blocks_of_rows(blocks, rows, spec, b, swapped)

    zero = b.asarray(np.empty((0, 0), np.int32)) if w.zero_point is None else xp.astype(w.zero_point, xp.int32)
    flip = 128 if not packed and b.dtype_name(w.codes) == "uint8" else 0
    return Groups(packed, flip, multiples_of_codes(spec.element, packed), of_rows(scale), of_rows(zero), size)


@functools.lru_cache(maxsize=64)
def multiples_of_codes(element: ElementType, packed: bool) -> Array:
    """The numbers of 16 codes of 4 bits in multiples of their unit; 0 for those that stand for none. Else zeros."""
    if not packed:
        return np.zeros(16, np.float32)
    assert element.unit is not None
    return np.nan_to_num(numbers_of_codes(element) / np.float32(element.unit))


class Rows(NamedTuple):
    """Rows of x in fixed point, a group at a time: what ``groups.multiply`` takes of them."""

    integers: Array
    finer: Array
    """What a second pass multiplies; empty where no group wants one."""
    sums: Array
    finer_sums: Array
    row_exponent: Array
    row_power: Array
    many: Array
    again: bool
    bad: Array


@np.errstate(all="ignore")
def matmul_in_groups(x: Array, w: Coded, bias: Array | None, *, spec: Spec, packed: bool) -> Any:
    """``reference.matmul_reproducible`` of a weight (N, K) whose groups lie along K, to the bit."""
    loops, powers, of_weight = runtime.group_loops(), powers_of_two(), groups_of(w, spec, packed, get_backend("numpy"))
    (rows, inner), columns, x_dtype = x.shape, len(w.codes), x.dtype
    codes = np.ascontiguousarray(w.codes).view(np.uint8)
    x = np.ascontiguousarray(x, dtype=np.float32)
    bias = _bias_of(bias, columns)
    y = np.empty((rows, columns), dtype=np.float32)
    steps = steps_of_product(columns * inner, min(rows, loops.ROWS_AT_ONCE))
    ends = ends_of_parts(columns, loops.COLUMNS, steps)
    for first in range(0, rows, loops.ROWS_AT_ONCE):
        these = slice(first, first + loops.ROWS_AT_ONCE)
        of_rows = _rows_in_groups(x[these], of_weight, powers)
        if not in_parts(
            loops.multiply_in_parts, steps, ends, codes, *of_weight, inner, *of_rows, powers, bias, y[these]
        ):
            return NotImplemented
    return y.astype(x_dtype, copy=False)


def _rows_in_groups(x: Array, w: Groups, powers: Array) -> Rows:
    loops, rows, size, groups = runtime.group_loops(), len(x), w.size, -(-x.shape[1] // w.size)
    integers = aligned_empty((rows, loops.width_of_rows(x.shape[1], w.halves)), np.float64, LOADED)
    sums, row_power = np.empty((rows, groups), np.float64), np.empty((rows, groups), np.float32)
    exponent, row_exponent = np.empty((rows, groups), np.int32), np.empty(rows, np.int32)
    many, wants, bad = np.empty((rows, groups), np.uint8), np.empty(rows, np.uint8), np.empty(rows, np.uint8)

    def prepare(a: int, b: int) -> None:
        parts = (v[a:b] for v in (integers, sums, exponent, row_exponent, row_power, many, wants, bad))
        loops.prepare(x[a:b], size, w.halves, powers, *parts)

    _on_ranges(prepare, rows, 1, x.size)
    again = 1 in wants.tobytes()  # a tenth of the time of any(), which one row notices
    finer, finer_sums = (np.empty_like(a) if again else np.empty((0, 0), np.float64) for a in (integers, sums))

    def refine(a: int, b: int) -> None:
        loops.refine(x[a:b], size, w.halves, powers, exponent[a:b], many[a:b], finer[a:b], finer_sums[a:b])

    if again:
        map_ranges(refine, rows, 1, x.size)
    return Rows(integers, finer, sums, finer_sums, row_exponent, row_power, many, again, bad)


@np.errstate(all="ignore")
def matmul_reproducible(x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int) -> Any:
    """``reference.matmul_reproducible`` by the loops that serve, which sum along rows of codes."""
    scaled = reference.with_scales_in_x(x, w, spec, contract, get_backend("numpy"))
    if scaled is not None:
        own, w, spec = scaled
        y = matmul_reproducible(own, w, bias, spec=spec, contract=contract)
        return y if y is NotImplemented else y.astype(x.dtype, copy=False)
    if serve.sums_across(x, x.dtype.name, w, spec, contract):
        return _across(x, w, bias, spec)
    if contract == 0:
        y = _groups_of_columns(x, w, bias, spec, w.codes.shape[1], packed=False)
        if y is not NotImplemented:
            return y
    if serve.become_rows(x.dtype.name, w, spec, contract, packed=False):
        return _along_rows(x, w, bias, spec, contract, None)
    if serve.sums_of_groups(x.dtype.name, w, spec, contract, packed=False):
        return matmul_in_groups(x, w, bias, spec=spec, packed=False)
    return _by_dots(x, w, bias, spec=spec, contract=contract, fast=False)


@functools.lru_cache(maxsize=64)
def shares_of_rows(length: int, columns: int) -> tuple[Array, int]:
    """Where parts of a weight's rows end that have sums of their own, and how many rows each has, but for the last."""
    parts = max(1, min(2 * runtime.cores(), MOST_SHARES, length * columns // LEAST_CODES))
    each = -(-length // (parts * ROWS_OF_SHARES)) * ROWS_OF_SHARES
    return np.array([*range(0, length, each), length]), each


def _across(x: Array, w: Coded, bias: Array | None, spec: Spec) -> Any:
    """``reference.matmul_reproducible`` of a weight (K, N) of integers, a byte each: ``serve.sums_across``."""
    loops, powers, (length, columns), rows = runtime.across_loops(), powers_of_two(), w.codes.shape, len(x)
    turned, plain = turned_over(w, spec, get_backend("numpy"))
    vectors = _of_columns(turned, bias, plain)
    codes = np.ascontiguousarray(w.codes)
    of_x = np.ascontiguousarray(x, dtype=np.float32)
    row_exponent, total, flags = np.empty(rows, np.int32), np.empty(rows, np.int64), np.empty(rows, np.int32)
    digits, finer_total = np.empty((2 * rows, -(-length // 4), loops.DIGITS), np.uint32), np.zeros(rows, np.int64)

    def prepare(a: int, b: int) -> None:
        loops.prepare(of_x[a:b], powers, row_exponent[a:b], total[a:b], flags[a:b], digits[a:b])

    _on_ranges(prepare, rows, 1, x.size * FIXING)
    wanted = rows + loops.refine(of_x, powers, row_exponent, flags, finer_total, digits[rows:])

    width = loops.words_of(columns)
    ends, each = shares_of_rows(length, columns)
    sums = aligned_empty((len(ends) - 1, wanted, loops.DIGITS, width), np.int32, LOADED)
    flip, steps = 128 * (codes.dtype == np.int8), steps_of_product(codes.size, wanted)
    in_parts(loops.multiply_in_parts, steps, ends, codes.view(np.uint8), flip, digits[:wanted], each, sums)

    y = np.empty((rows, columns), dtype=np.float32)
    steps = steps_of_product(sums.size, 1)
    given = sums, row_exponent, total, flags, finer_total, *vectors, powers, y
    in_parts(loops.finish_in_parts, steps, ends_of_parts(columns, loops.STRIP, steps), *given)
    return y.astype(x.dtype, copy=False)


@np.errstate(all="ignore")
def _groups_of_columns(x: Array, w: Coded, bias: Array | None, spec: Spec, columns: int, packed: bool) -> Any:
    """``reference.matmul_reproducible`` of a weight (K, N) in groups along K, as it lies: ``serve.sums_of_columns``."""
    own, plain = rows_of_columns(w, spec, columns)
    if own is None or not serve.sums_of_columns(len(x), x.dtype.name, own, plain, packed):
        return NotImplemented
    loops, of_weight = runtime.strip_loops(), groups_of(own, plain, packed, get_backend("numpy"), swapped=True)
    codes, of_x = np.ascontiguousarray(w.codes).view(np.uint8), np.ascontiguousarray(x, dtype=np.float32)
    (rows, inner), powers, bias = x.shape, powers_of_two(), _bias_of(bias, columns)
    y, at_once = np.empty((rows, columns), dtype=np.float32), runtime.group_loops().ROWS_AT_ONCE
    steps = steps_of_product(columns * inner, min(rows, at_once))
    ends = ends_of_parts(columns, loops.PART, steps)
    for first in range(0, rows, at_once):
        these = slice(first, first + at_once)
        of_rows = _rows_in_groups(of_x[these], of_weight._replace(halves=False), powers)
        given = codes, *of_weight, inner, *of_rows, powers, bias, y[these]
        if not in_parts(loops.multiply_columns_in_parts, steps, ends, *given):
            return NotImplemented
    return y.astype(x.dtype, copy=False)


def _along_rows(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int, packed_length: int | None) -> Any:
    """``reference.matmul_reproducible`` of the weight as rows (N, K) of integers, one a byte: ``serve.become_rows``."""
    b, inner, packed = get_backend("numpy"), packed_length or w.codes.shape[1], packed_length is not None
    codes = in_bytes(w.codes, spec.element, inner, packed, turned=contract == 0)
    own, plain = as_rows(codes, reference.with_usable_scales(w, b) if packed else w, spec, contract, b)
    return run(b, reference.matmul_reproducible, x, own, bias, spec=plain, contract=1)


@np.errstate(all="ignore")
def matmul_reproducible_stored(
    x: Array,
    w: Coded,
    bias: Array | None,
    *,
    spec: Spec,
    contract: int,
    packed_length: int | None,
    swapped: bool = False,
) -> Any:
    """``reference.matmul_reproducible_stored`` of codes as they are kept, where loops read them so.

    Other packed ones become bytes first, in the order in which loops read those.
    """
    if not len(x):
        return NotImplemented
    w, x_name, packed = reference.in_order(w, swapped, get_backend("numpy")), x.dtype.name, packed_length is not None
    if contract == 0:
        y = _groups_of_columns(x, w, bias, spec, packed_length or w.codes.shape[1], packed)
        if y is not NotImplemented:
            return y
    if serve.sums_of_groups(x_name, w, spec, contract, packed):
        return matmul_in_groups(x, w, bias, spec=spec, packed=packed)
    if packed and serve.become_rows(x_name, w, spec, contract, packed):
        return _along_rows(x, w, bias, spec, contract, packed_length)
    return NotImplemented


def reproducible_of_weight(w: Coded, *, spec: Spec, contract: int) -> Callable[[Array, Coded, Array | None], Any]:
    """``matmul_reproducible`` for a weight of these types and shapes."""
    form: Callable[..., Any] | None = None
    one = np.empty((1, w.codes.shape[contract]), np.float32)
    if serve.sums_of_groups("float32", w, spec, contract, packed=False):
        form = functools.partial(matmul_in_groups, spec=spec, packed=False)
    elif serve.dots(one, "float32", w, spec, contract):
        form = np.errstate(all="ignore")(functools.partial(_multiply_by_dots, spec=spec, fast=False))
    otherwise = functools.partial(matmul_reproducible, spec=spec, contract=contract)
    return _decided(form, otherwise)


def reproducible_stored_of_weight(
    w: Coded, *, spec: Spec, contract: int, packed_length: int | None, swapped: bool = False
) -> Callable[[Array, Coded, Array | None], Any]:
    """``matmul_reproducible_stored`` for a weight of these types and shapes."""
    static: dict[str, Any] = {"spec": spec, "contract": contract, "packed_length": packed_length, "swapped": swapped}
    serves = packed_length is not None and not swapped and serve.sums_of_groups("float32", w, spec, contract, True)
    form = functools.partial(matmul_in_groups, spec=spec, packed=True) if serves else None
    return _decided(form, functools.partial(matmul_reproducible_stored, **static))


def _decided(form: Callable[..., Any] | None, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """A form that is known to serve a weight, for float32; otherwise what asks again."""
    loops = runtime.compiled_loops()

    def call(x: Array, w: Coded, bias: Array | None) -> Any:
        plain = x.dtype == _FLOAT32 and len(x) > 0 and (bias is None or bias.dtype == _FLOAT32)
        if form is None or not plain or runtime.compiled_loops() is not loops:  # tests and benchmarks do without
            return otherwise(x, w, bias)
        return form(x, w, bias)

    return call


matmul_by_dots = functools.partial(_by_dots, fast=True)


class _Prepared(NamedTuple):
    """What ``dots.prepare_rows`` makes of rows of x."""

    panels: Array
    one: Array
    """The integers that no panel holds."""
    exponent: Array
    total: Array
    flags: Array


class _Refined(NamedTuple):
    """What ``dots.refine_rows`` makes of them for a second pass; empty where no row wants one."""

    panels: Array
    one: Array
    total: Array


def _on_ranges(work: Callable[[int, int], None], rows: int, multiple: int, elements: int) -> None:
    """``map_ranges``, which few elements need not go through."""
    if elements < runtime.LARGE:
        work(0, rows)
    else:
        map_ranges(work, rows, multiple, elements)


def _prepared(x: Array, powers: Array) -> _Prepared:
    dots, (rows, inner) = runtime.integer_dots(), x.shape
    exponent, total, flags = np.empty(rows, np.int32), np.empty(rows, np.int64), np.empty(rows, np.int32)
    panels = aligned_empty(dots.shape_of_panels(rows, inner, dots.DIGITS), np.uint32, LOADED)
    one = np.empty((0 if panels.size else 1, inner), dtype=np.int32)
    height = max(1, panels.shape[2] // dots.DIGITS)

    def prepare(a: int, b: int) -> None:
        of_rows = panels[a // height : -(-b // height)]
        dots.prepare_rows(x[a:b], powers, exponent[a:b], total[a:b], flags[a:b], of_rows, one)

    _on_ranges(prepare, rows, height, x.size)
    return _Prepared(panels, one, exponent, total, flags)


def _refined(x: Array, made: _Prepared, powers: Array) -> _Refined:
    dots = runtime.integer_dots()
    if not (made.flags & dots.SECOND_PASS).any():
        return _Refined(made.panels[:0], made.one[:0], made.total[:0])
    panels = aligned_empty(made.panels.shape, np.uint32, LOADED)
    one, total = np.empty_like(made.one), np.empty_like(made.total)
    height = max(1, panels.shape[2] // dots.DIGITS)

    def refine(a: int, b: int) -> None:
        of_rows = panels[a // height : -(-b // height)]
        dots.refine_rows(x[a:b], powers, made.exponent[a:b], made.flags[a:b], total[a:b], of_rows, one)

    map_ranges(refine, len(x), height, x.size)
    return _Refined(panels, one, total)


def fixed_point_matmul(x: Array, w: Array, zero_point: Array | None) -> tuple[Array, Array]:
    """``reference.fixed_point_matmul`` without digits: an int64 holds a sum, and a float64 that of a short piece."""
    if len(x) > 1 and x.shape[2] <= LONGEST_IN_FLOATS:
        return _of_short_pieces(x, w, zero_point)
    total = np.stack([exact_matmul(a, c) for a, c in zip(x, w, strict=True)])
    if zero_point is not None:
        total -= x.sum(axis=2, keepdims=True, dtype=np.int64) * zero_point
    return (total >> 24).astype(np.int32), (total & 0xFFFFFF).astype(np.int32)


def _of_short_pieces(x: Array, w: Array, zero_point: Array | None) -> tuple[Array, Array]:
    (pieces, rows, width), columns = x.shape, w.shape[1]
    high, low = (np.empty((pieces, rows, columns), np.int32) for _ in range(2))
    height = max(1, FEWEST_FOR_BLAS_THREADS // max(1, width * columns))

    def some(start: int, stop: int) -> None:
        for p in range(start, stop):
            right = w[p].astype(np.float64).T
            for n in range(0, rows, height):
                part = slice(n, n + height)
                left = x[p, part].astype(np.float64)
                total = left @ right
                if zero_point is not None:
                    total -= left.sum(axis=1, keepdims=True) * zero_point[p]
                upper = np.floor(total * 2.0**-24)
                total -= upper * 2.0**24
                high[p, part], low[p, part] = upper, total

    map_ranges(some, pieces, 1, high.size, CHUNKS_PER_CORE)
    return high, low
