"""Codes by compiled loops, of every kind of number and every layout in which groups lie side by side.

Owns: what the loops of ``encoding`` are told of an element type, the view of an array as rows of groups, and the forms
made of both: statistics, codes, and the two at once. Imports: the operations, the runtime, ``serve``. ``quantize``
calls it, and has other forms for what is not served here.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from aqt_lite import _statistics, _steps, affine
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._records import Kept
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, QParams, Recipe, Spec
from aqt_lite.backends.cpu import runtime, serve
from aqt_lite.backends.cpu.runtime import (
    CHUNKS_PER_CORE,
    LARGE,
    aligned_empty,
    ends_of_parts,
    in_parts,
    loops_of_elements,
    map_ranges,
    steps_of_elements,
)
from aqt_lite.elements import Codebook, ElementType, Float, Integer
from aqt_lite.granularity import grid_of
from aqt_lite.packing import bytes_of

__all__ = ["ROWS_OF_A_PART", "Numbers", "choose", "dtype_of_scales", "encode", "extrema", "kept_as", "kept_of",
           "lies_in_order", "numbers_at_once", "numbers_for", "numbers_of", "quantize", "rule_of", "serves", "steps_of",
           "view_of"]  # fmt: skip


class Numbers(NamedTuple):
    """What the loops are told of an element type."""

    kind: int
    bits: int
    """Of a code in memory: its own, or those of the integer that it is kept in."""
    parameters: Array
    """int32, or the patterns of floats."""
    step: float
    """A power of two that values are multiplied by before they are rounded."""


def numbers_of(element: ElementType, narrow: bool, packed: bool, zero: int | None = None) -> Numbers | None:
    """What the loops are told, or None where they do not know such numbers; ``packed``: as a stream of bits.

    ``zero``: the zero point, if all have the same. They do less for whole numbers then.
    """
    if element.missing is not None or runtime.encoding_loops() is None:
        return None
    return _numbers_of(element, narrow, packed, zero)


@functools.lru_cache(64)
def _numbers_of(element: ElementType, narrow: bool, packed: bool, zero: int | None) -> Numbers | None:
    loops = runtime.encoding_loops()
    found = _told(element, narrow, loops)
    if found is None:
        return None
    kind, parameters, step = found
    if kind == loops.INTEGER and zero is not None and zero % 2 == 0:
        least, most = parameters.view(np.float32) - np.float32(zero)
        kind, parameters = loops.WHOLE_NUMBERS, _floats(least, most, 1.5 * 2.0**23 + zero)
    bits = element.bits if packed else 8 * np.dtype(element.storage).itemsize
    return Numbers(kind, bits, parameters, step) if bits in loops.BITS[kind] else None


def _told(element: ElementType, narrow: bool, loops: Any) -> tuple[int, Array, float] | None:
    """Kind, parameters, step."""
    if isinstance(element, Integer):
        return loops.INTEGER, _floats(*element.code_range(narrow)), 1 / element.step
    if isinstance(element, Float):
        m, lowest = element.mantissa, element.lowest
        if m < 1 or lowest < -100 or not (element.signed and element.subnormal):
            return None
        drop = 23 - m
        whole = [drop, (1 << (drop - 1)) - 1 - ((lowest + 126) << 23)]
        patterns = _floats(element.max, 2.0**lowest, 2.0 ** (lowest + drop)).tolist()
        signs = [1 << (element.bits - 1), -1 if element.negative_zero else 0]
        return loops.FLOAT, np.asarray(whole + patterns + signs, np.int32), 1.0
    if isinstance(element, Codebook) and len(element.numbers) <= loops.MOST_CUTS + 1:
        cuts = [*element.cuts("float32", "half_even")]
        order = element._order
        words = [sum(order[min(8 * w + i, len(order) - 1)] << (4 * i) for i in range(8)) for w in range(2)]
        words = [*np.asarray(words, np.uint32).view(np.int32), order[element._nearest_zero]]
        filled = cuts + [math.inf] * (loops.MOST_CUTS - len(cuts))
        return loops.CODEBOOK, np.concatenate([_floats(*filled), np.asarray(words, np.int32)]), 1.0
    return None


def _floats(*numbers: float) -> Array:
    return np.asarray(numbers, np.float32).view(np.int32)


# ---- views


ROWS_OF_A_PART = 256
"""Of columns: the extrema of so many rows take a small part of their memory."""


class _View(NamedTuple):
    """An array as rows of groups; or as rows of as many groups as there are columns, each a column."""

    rows: int
    length: int
    size: int
    shared: bool
    """Whether there is one group in all, of which rows are parts."""
    of_columns: bool = False
    """Whether groups are columns; their size is then 1."""

    @property
    def groups(self) -> int:
        return -(-self.length // self.size)

    @property
    def parts(self) -> int:
        """How many extrema a group is given, from as many parts of it."""
        return -(-self.rows // ROWS_OF_A_PART) if self.of_columns else self.rows


def view_of(shape: tuple[int, ...], spec: Spec, bits: int = 8) -> _View | None:
    """Rows of groups that lie side by side, whose streams of codes of so many bits begin with whole bytes."""
    if not shape or 0 in shape:
        return None
    grid, last = grid_of(shape, spec.block), shape[-1]
    size, joined = math.prod(shape), last * bits % 8 == 0
    if math.prod(grid) == 1:  # any cut will do
        width = math.gcd(size, 1 << 12)
        if not (joined and width >= serve.SHORTEST_ROW_TO_ENCODE):
            width = last
        return _View(size // width, width, width, True)
    rows = serve.rows_of_blocks(shape, grid, spec.block)
    if rows is not None and joined and rows[1] >= serve.SHORTEST_ROW and rows[1] * bits % 8 == 0:
        return _View(*rows, rows[1], False)
    if last >= serve.SHORTEST_ROW_TO_ENCODE and serve.one_scale_an_index_of_the_last_axis(shape, grid):
        return _View(size // last, last, 1, False, True)
    group = spec.block[-1] or last
    if grid[:-1] == shape[:-1] and group >= serve.SHORTEST_ROW and (group * bits % 8 == 0 or group >= last):
        return _View(size // last, last, min(group, last), False)
    return None


def _lies_right(x: Any) -> bool:
    """Whether loops may read it as it lies, and are worth being loaded."""
    if not isinstance(x, np.ndarray) or x.size < LARGE or x.dtype != np.float32 or not x.dtype.isnative:
        return False
    return x.flags.c_contiguous and x.flags.aligned and runtime.encoding_loops() is not None


def _rows(x: Any, spec: Spec, bits: int = 8) -> tuple[_View, Array] | None:
    """A view of x and x in it, where the loops serve."""
    if not _lies_right(x):
        return None
    view = view_of(x.shape, spec, bits)
    return None if view is None else (view, np.asarray(x).reshape(view.rows, view.length))


# ---- forms


def serves(x: Array, spec: Spec) -> bool:
    """Whether there are loops for extrema and codes of plain integers."""
    return _rows(x, spec) is not None


def extrema(x: Array, spec: Spec, recipe: Recipe, magnitudes: bool) -> Array | None:
    """(1, *grid) largest magnitudes, or (2, *grid) smallest and largest values, if the loops serve."""
    found = None if recipe.ignore_nonfinite or spec.element.missing is not None else _rows(x, spec)
    if found is None:
        return None
    (view, rows), loops = found, runtime.encoding_loops()
    ends = np.empty((1 if magnitudes else 2, view.parts, view.groups), np.int32)
    if view.of_columns:
        loop, size = loops.magnitudes_of_columns if magnitudes else loops.ranges_of_columns, ROWS_OF_A_PART
    else:
        loop, size = loops.magnitudes if magnitudes else loops.ranges, view.size
    high = size if view.of_columns else 1  # rows of x for one of the ends

    def some(lo: int, hi: int) -> None:
        loop(rows[lo * high : hi * high], size, *ends[:, lo:hi])

    map_ranges(some, view.parts, 1, loops_of_elements(x.size), CHUNKS_PER_CORE)
    of_groups = ends.view(np.float32)
    if view.shared or view.of_columns:
        axis = (1, 2) if view.shared else 1
        low = [np.min(of_groups[:-1], axis=axis)] if not magnitudes else []
        of_groups = np.concatenate([*low, np.max(of_groups[-1:], axis=axis)])
    return of_groups.reshape(-1, *grid_of(x.shape, spec.block))


def steps_of(scale: Array, spec: Spec, step: float, b: Backend) -> tuple[Array, Array | None]:
    """What values are multiplied by, in turn, to be codes' numbers; the second, a power of two, may be None."""
    inverse, factor = _steps.inverse_of(scale, spec, b)
    if factor is None:
        return inverse, None if step == 1.0 else b.xp.full_like(inverse, step)
    return inverse, factor * step


@np.errstate(all="ignore")
def encode(x: Array, qparams: QParams, spec: Spec, recipe: Recipe, packed: bool, out: Array | None = None) -> Any:
    """Codes, packed or not, into ``out`` if it is given; NotImplemented where the loops do not serve."""
    zero_point = 0 if qparams.zero_point is None else None
    numbers = numbers_for(qparams, spec, recipe, packed, zero_point) if _lies_right(x) else None
    found = None if numbers is None else _rows(x, spec, numbers.bits)
    if numbers is None or found is None or not (out is None or lies_in_order(out)):
        return NotImplemented
    b, (view, rows), loops = get_backend("numpy"), found, runtime.encoding_loops()
    codes = _memory(x.shape, spec, packed) if out is None else np.asarray(out)
    stream, grid = codes.reshape(view.rows, -1).view(np.uint8), grid_of(x.shape, spec.block)
    shape = (1, 1) if view.shared else (view.rows, view.groups)
    if kept_as(spec) is not None and not (view.shared or view.of_columns):
        kept, plain = qparams.scale, spec.format.scale is None
        scale = _of_grid(kept if plain else kept.codes, grid, dtype_of_scales(spec)).reshape(shape).view(np.uint8)
        zero = np.zeros((1, 1), np.float32)
        if qparams.zero_point is not None:
            zero = _of_grid(qparams.zero_point, grid, np.float32).reshape(shape)
        steps = np.empty((2, 0), np.float32) if plain else _steps_of_codes(spec, numbers.step)
        beside = np.asarray([spec.headroom, numbers.step, spec.zero_scale], np.float32)

        def from_kept(lo: int, hi: int) -> None:
            own = zero if zero.size == 1 else zero[lo:hi]
            told = *numbers[:3], beside, steps, scale[lo:hi], own
            loops.encode_kept(rows[lo:hi], view.size, *told, stream[lo:hi])

        map_ranges(from_kept, view.rows, 1, loops_of_elements(x.size), CHUNKS_PER_CORE)
        return codes
    inverse, factor = steps_of(affine.scales(qparams.scale, spec, b), spec, numbers.step, b)
    of_each = (inverse, 1), (factor, 1), (qparams.zero_point, 0)
    if view.of_columns:
        of_groups = [_of_vectors(absent if a is None else a, view.groups, loops.LANES) for a, absent in of_each]
    else:
        of_groups = [
            np.full((1, 1), absent, np.float32) if a is None else _of_grid(a, grid, np.float32).reshape(shape)
            for a, absent in of_each
        ]

    def some(lo: int, hi: int) -> None:
        if view.of_columns:
            loops.encode_columns(rows[lo:hi], *numbers[:3], *of_groups, stream[lo:hi])
            return
        own = (a if a.shape[0] < 2 else a[lo:hi] for a in of_groups)
        loops.encode(rows[lo:hi], view.size, *numbers[:3], *own, stream[lo:hi])

    map_ranges(some, view.rows, 1, loops_of_elements(x.size), CHUNKS_PER_CORE)
    return codes


@functools.lru_cache(8)
def _steps_of_codes(spec: Spec, step: float) -> Array:
    """``steps_of`` every code of scales that are kept in a byte or two: a row of each."""
    dtype, b = dtype_of_scales(spec), get_backend("numpy")
    codes = np.arange(1 << (8 * dtype.itemsize), dtype=f"u{dtype.itemsize}").view(dtype)
    kept = Coded(codes.reshape(*(1,) * (len(spec.block) - 1), -1), None)
    inverse, factor = steps_of(affine.scales(kept, spec, b), spec, step, b)
    return np.stack([a.reshape(-1) for a in (inverse, np.ones_like(inverse) if factor is None else factor)])


def _of_grid(a: Array, grid: tuple[int, ...], dtype: Any) -> Array:
    """One for each block, in the order of C."""
    return np.ascontiguousarray(np.broadcast_to(a, grid), dtype)


def _of_vectors(numbers: Any, count: int, lanes: int) -> Array:
    """So many numbers, filled up to whole vectors."""
    found = np.zeros(-(-count // lanes) * lanes, np.float32)
    found[:count] = np.asarray(numbers).reshape(-1)
    return found


@np.errstate(all="ignore")
def quantize(x: Array, spec: Spec, recipe: Recipe, packed: bool) -> Any:
    """Scales and codes at once, where a scale is a product and its group a part of a row; else NotImplemented."""
    found = _at_once(x, spec, recipe, packed)
    return found if found is NotImplemented else Coded(*found)


@np.errstate(all="ignore")
def choose(x: Array, spec: Spec, recipe: Recipe) -> Any:
    """The parameters that ``quantize`` chooses, and no codes; NotImplemented where it is."""
    found = _at_once(x, spec, recipe, packed=None)
    return found if found is NotImplemented else QParams(*found[1:])


def _at_once(x: Array, spec: Spec, recipe: Recipe, packed: bool | None) -> Any:
    """Codes, or None where ``packed`` is None, scales and zero points; NotImplemented where the loop does not serve."""
    numbers = numbers_at_once(spec, recipe, bool(packed)) if _lies_right(x) else None
    found = None if numbers is None else _rows(x, spec, 8 if packed is None else numbers.bits)
    if numbers is None or found is None or found[0].shared or found[0].of_columns:
        return NotImplemented
    (view, rows), loops, grid = found, runtime.encoding_loops(), grid_of(x.shape, spec.block)
    codes = None if packed is None else _memory(x.shape, spec, packed)
    scale = aligned_empty((view.rows, view.groups), dtype_of_scales(spec))
    stream = np.empty((view.rows, 0), np.uint8) if codes is None else codes.reshape(view.rows, -1).view(np.uint8)
    bits, bytes_of_scales = 0 if codes is None else numbers.bits, scale.reshape(view.rows, -1).view(np.uint8)
    how = numbers.kind, bits, numbers.parameters, rule_of(spec, recipe, numbers), kept_as(spec)
    steps = steps_of_elements(x.size)
    ends = ends_of_parts(view.rows, 1, steps)
    if not in_parts(loops.quantize_in_parts, steps, ends, rows, view.size, *how, bytes_of_scales, stream):
        return NotImplemented  # whoever knows what becomes of NaN and infinities does it again
    middles = np.full(grid, spec.element.middle, np.int32) if spec.element.middle else None
    return codes, kept_of(scale.reshape(grid), spec), middles


def numbers_for(qparams: QParams, spec: Spec, recipe: Recipe, packed: bool, zero: int | None = None) -> Numbers | None:
    """What ``encode`` is told, or None where the loops do not know the rules; ``zero`` as for ``numbers_of``."""
    plain = recipe.plain and spec.source.compute == "float32" and not spec.floor and spec.element.has_zero
    if not (plain and spec.format.scaled) or qparams.offset is not None or qparams.steps is not None:
        return None
    return numbers_of(spec.element, recipe.narrow(spec), packed, zero)


def numbers_at_once(spec: Spec, recipe: Recipe, packed: bool) -> Numbers | None:
    """What ``quantize`` is told, or None: scales have to be products, kept in a way that the loops know."""
    if not recipe.of_magnitudes or recipe.ignore_nonfinite or kept_as(spec) is None:
        return None
    return numbers_for(QParams(None), spec, recipe, packed, spec.element.middle)


def rule_of(spec: Spec, recipe: Recipe, numbers: Numbers) -> Array:
    """How the loops choose scales."""
    tiny, least = spec.source.tiny, _statistics.least_scale(spec, recipe)
    by_most, of_zeros = _statistics.inverse_of_largest(spec, recipe), spec.zero_scale
    beside = spec.headroom, numbers.step
    return np.asarray([by_most, tiny, least, of_zeros, *beside, spec.element.middle], np.float32)


_PARTS: dict[Any, tuple[float, int, int]] = {
    "half_even": (0.5, 1, 1),
    "half_away": (0.5, 0, 0),
    "half_toward_zero": (0.5, 1, 0),
    "toward_zero": (1.0, 0, 0),
    "up": (0.0, 1, 0),
}
"""From where on a scale is rounded up: a part of the way to the next number; units beyond that; units less, where the
number below is odd. A unit is the last bit of the scale."""


def kept_as(spec: Spec) -> Array | None:
    """How the loops keep scales: as they are, or as floats of few bits; None where they know no such way."""
    kept, rounding = spec.format.scale, spec.format.scale_rounding
    if kept is None:
        return np.asarray([4], np.int32)
    e, rule = kept.element, (rounding, 0, 0) if isinstance(rounding, float) else _PARTS.get(rounding)
    if rule is None or kept.scaled or not isinstance(e, Float) or e.missing is not None or e.nan is None:
        return None
    drop, (part, over, even) = 23 - e.mantissa, rule
    units = part * 2.0**drop
    if units != int(units) or e.lowest < -127 or e.max > spec.source.max:
        return None
    smallest, largest = _floats(e.smallest, e.max).tolist()
    with np.errstate(over="ignore"):  # none is too large
        beyond = max(int(_floats(spec.first_too_large_scale)[0]), largest + 1)
    hidden, width = 0 if e.subnormal else 1 << e.mantissa, np.dtype(e.storage).itemsize
    told = [width, drop, e.lowest, hidden, int(units), over, even, max(smallest, 1), beyond, largest, e.nan]
    return np.asarray(told, np.int32)


def dtype_of_scales(spec: Spec) -> Any:
    """Of what scales are kept in."""
    kept = spec.format.scale
    return np.dtype(np.float32 if kept is None else kept.element.storage)


def kept_of(scale: Array, spec: Spec) -> Kept:
    """What the loops have made, as ``affine.keep`` has it."""
    return scale if spec.format.scale is None else Coded(scale, None)


def lies_in_order(out: Array) -> bool:
    """Whether loops may write to it as it lies."""
    return bool(out.flags.c_contiguous and out.flags.aligned and out.dtype.isnative)


def _memory(shape: tuple[int, ...], spec: Spec, packed: bool) -> Array:
    """For the codes of an array."""
    if packed:
        return aligned_empty((*shape[:-1], bytes_of(shape[-1], spec.element.bits)), np.uint8)
    return aligned_empty(shape, spec.element.storage)
