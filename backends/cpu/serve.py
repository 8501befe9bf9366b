"""Which form serves which arguments.

Owns: every such rule, under a name that says what it asks, and the sizes at which one form overtakes another on every
framework alike. Imports: granularity, the operations' limits, the runtime. What only one framework asks (is it tracing,
where does an array lie) its own modules say.

That codes are plain integers no rule asks: kernels say so in their tables, and are not offered others.
"""

from __future__ import annotations

import math

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite.affine import Coded, Recipe, Spec
from aqt_lite.backends.cpu import runtime
from aqt_lite.backends.cpu.kinds import are_multiples, numbers_of_codes
from aqt_lite.granularity import Block
from aqt_lite.ops import reference

SHORTEST_ROW = 8
"""Elements with one scale from which on a row is worth a step of its own for each of its statistics."""

SHORTEST_ROW_TO_DECODE = 16
"""Elements of a row from which on the compiled loop beats ufuncs on many rows at once."""

SHORTEST_ROW_TO_ENCODE = 64
"""The same for the loop that gives each column its own scale."""

MOST_ROWS_FOR_LOOPS = 8
"""Rows of x for which compiled loops beat BLAS on a dequantized block."""

MOST_ROWS_TO_DECODE = 4
"""Rows of x for which loops that decode codes beat the int8 dot products of one scale an output: one tile of them."""

MOST_CODES_AT_ONCE = 1 << 20
"""Codes of a weight, or of a part of one, whose floats (4 MB) stay in a cache until BLAS has read them."""

CODES_A_ROW = 1 << 13
"""Codes of such a weight that a row of x pays for: turning them to floats takes less time than BLAS gains."""

CODES_A_ROW_OF_DIGITS = 4 * CODES_A_ROW
"""The same where digits are what else would multiply: of codes of 8 bits that have a scale for each output."""

CODES_OF_MANY_ROWS = 3 * CODES_A_ROW
"""The same of each of ``MANY_ROWS`` or more, which BLAS gains more on: what it does before it begins, they share."""

MANY_ROWS = 24
"""How many those are, by measurement."""

ROWS_FOR_PANELS = 24
"""Rows of x from which on panels beat all other loops, whatever the weight's size up to the one above."""

CODES_A_ROW_OF_PANELS = CODES_A_ROW, 8 * CODES_A_ROW
"""Codes of such a weight that each of fewer rows pays for: where they are decoded else, and where digits multiply."""

MOST_ROWS_FOR_PANELS = 512
"""Rows of x from which on nothing is gained over BLAS on such floats, which a cache holds all."""

DEEPEST_PANEL = 6144
"""Codes of a row at a time beyond which caches hold no panel: long groups that no part of 2048 codes divides."""

ROWS_FOR_PANELS_OF_LARGE = 144
"""Rows of x from which on panels beat loops that decode, of larger weights."""

MOST_ROWS_FOR_EINSUM = 2
"""Rows of x for which einsum, which converts codes as it goes, beats BLAS on a dequantized block."""

MOST_ROWS_ON_THE_RIGHT = 64
"""Rows of x up to which BLAS is faster with the weight on the left, though its result has to be transposed then."""

MOST_ROWS_FOR_PIECES = 64
"""Rows of x for which, without compiled loops, small products on each thread beat large ones on all."""

LEAST_CODES_FOR_PIECES = 1 << 22
"""The same of codes that have a scale for each output: for smaller weights those large ones are as fast."""

MOST_ROWS_IN_REGISTERS = 16
"""Rows of x up to which codes of a weight (in, out) are decoded in registers for every few, and not in a cache."""

MOST_ROWS_ACROSS, FEW_ROWS_ACROSS, CODES_A_ROW_ACROSS = 16, 4, 128
"""Rows of x up to which exact sums of such a weight are those of its codes as they lie, and not in rows; up to which
they are whatever its length, and codes of a column for each other row: its sums take more memory than short columns."""

MOST_ROWS_IN_OUT = 128
"""Rows of x up to which such a weight is read as it lies, and not dequantized for BLAS."""

MOST_RESULTS_IN_OUT = 1 << 20
"""Floats of the result up to which each part of the weight has sums of its own."""

FEWEST_COLUMNS_IN_OUT = 16
"""Columns of such a weight from which on: of fewer BLAS keeps more sums side by side, and errs half as much or less."""

NARROWEST_BLOCK = 8
"""Columns of such a weight with one scale: a loop decodes them in one step."""

LONGEST_GROUP = 512
"""Length of groups up to which their sums are below 2^48: what rounds them to float32 then rounds once."""

LARGEST_UNSCALED = 2.0**100
"""Magnitude of x below which sums of ``x * q`` stay finite for every length that memory can hold."""

LARGEST_NUMBER = 2.0**12
"""Magnitude of numbers of codes below which their products with scales below 2^100 are finite."""

SMALLEST_SCALED = 2.0**-100
"""Magnitude of entries of x times a scale from which on their products with numbers of codes lose nothing."""

LARGEST_DECODED = 2.0**20
"""The same where nothing is added up before it meets its scale."""

_FLOAT32, _INT8 = np.dtype(np.float32), np.dtype(np.int8)


# ---- quantization


def float32_as_it_lies(x: Array, recipe: Recipe) -> bool:
    """Whether the forms that read memory in order serve: float32 of this machine's byte order, no value passed over."""
    plain = x.dtype == np.float32 and x.dtype.isnative and x.flags.c_contiguous
    return bool(plain and not recipe.ignore_nonfinite)


def has_fixed_zero(spec: Spec, recipe: Recipe) -> bool:
    """Whether zero has code 0: no zero points are made."""
    return recipe.symmetric and not spec.element.middle


def one_scale_an_index_of_the_last_axis(shape: tuple[int, ...], grid: tuple[int, ...]) -> bool:
    """Whether every index of the last axis, where that is not the only one, has one scale for all of its elements."""
    return len(shape) > 0 and grid[-1] == shape[-1] > 1 and math.prod(grid) == grid[-1]


def rows_of_one_scale(x: Array, grid: tuple[int, ...], block: Block) -> tuple[int, int] | None:
    """(rows, columns) of the view of ``x`` in which every row has one scale, or None where there is no such view."""
    if not (x.size and x.flags.c_contiguous and x.dtype.isnative):
        return None
    return rows_of_blocks(x.shape, grid, block)


def rows_of_blocks(shape: tuple[int, ...], grid: tuple[int, ...], block: Block) -> tuple[int, int] | None:
    """The same for an array of that shape that lies in the order of C."""
    lead, size = 0, math.prod(shape)
    while lead < len(shape) and grid[lead] == shape[lead]:  # axes with a scale for each index
        lead += 1
    if lead < len(shape) and all(n == 1 for n in grid[lead + 1 :]):
        groups, length = grid[lead], block[lead]
        if groups == 1 or (length is not None and shape[lead] % length == 0):
            rows = math.prod(shape[:lead]) * groups
            return rows, size // rows
    return (size, 1) if lead == len(shape) else None


# ---- products: x of (M, K), the weight of (K, N) where axis 0 is contracted and of (N, K) where axis 1 is


def bytes_and_float32(x: Array, x_dtype: str, w: Coded, spec: Spec) -> bool:
    """What every form but the reference's own asks for: codes of 8 bits, nothing in float64, and nothing empty."""
    return (
        spec.element.bits == 8
        and "float64" not in (x_dtype, spec.source.compute)
        and 0 not in (*x.shape, *w.codes.shape)
    )


def is_of_wide_codes(x: Array, x_dtype: str, w: Coded, spec: Spec) -> bool:
    """Whether a large weight has codes of more than 8 bits, for which no loop multiplies; nothing float64 or empty."""
    large = w.codes.shape[0] * w.codes.shape[1] >= runtime.LARGE
    return large and spec.element.bits > 8 and "float64" not in (x_dtype, spec.source.compute) and 0 not in x.shape


def one_scale_a_column(w: Coded, contract: int) -> bool:
    """Whether the axis that is contracted comes last and is one block: a sum of integers meets its scale at the end."""
    return bool(contract == 1 and w.scale.shape[1] == 1)


def dots(x: Array, x_dtype: str, w: Coded, spec: Spec, contract: int) -> bool:
    """Whether the fixed-point product by the processor's int8 dot products serves."""
    return (
        bytes_and_float32(x, x_dtype, w, spec)
        and one_scale_a_column(w, contract)
        and w.codes.shape[1] <= reference.LONGEST_PIECE
        and runtime.integer_dots() is not None
    )


def sums_across(x: Array, x_dtype: str, w: Coded, spec: Spec, contract: int) -> bool:
    """Whether they serve for a weight (in, out) as it lies."""
    plain = spec.element.zero_points and not isinstance(w.scale, tuple)
    return (
        contract == 0
        and plain
        and _in_scaled_codes(x_dtype, w, spec, 1)
        and bytes_and_float32(x, x_dtype, w, spec)
        and w.scale.shape[0] == 1
        and _are_few_across(len(x), *w.codes.shape)
        and w.codes.shape[0] <= reference.LONGEST_PIECE
        and runtime.across_loops() is not None
    )


def _are_few_across(rows: int, length: int, columns: int) -> bool:
    few = rows <= max(FEW_ROWS_ACROSS, length // CODES_A_ROW_ACROSS) or length * columns < runtime.LARGE
    return few and rows <= MOST_ROWS_ACROSS


def dots_beat_floats() -> bool:
    """Whether products that may round as floats do are faster by the int8 dot products, where those serve."""
    loops = runtime.integer_dots()
    return loops is not None and bool(loops.FASTER_THAN_FLOATS)


def decoding_beats_dots(rows: int, x_dtype: str, w: Coded, spec: Spec, contract: int) -> bool:
    """Whether so few rows of x meet codes faster where those become numbers in registers, in products of floats."""
    return rows <= MOST_ROWS_TO_DECODE and w.codes.size >= runtime.LARGE and decodes(x_dtype, w, spec, contract, False)


def sums_of_groups(x_dtype: str, w: Coded, spec: Spec, contract: int, packed: bool) -> bool:
    """Whether the loops serve that add up groups exactly: of codes of 4 bits, packed, or of 8 that are integers.

    Or multiples of a unit other than 1.
    """
    loops, bits = runtime.group_loops(), spec.element.bits
    if loops is None or not (bits == 4 and loops.TABLES if packed else bits == 8 and are_multiples(spec.element)):
        return False
    return in_short_groups(x_dtype, w, spec, contract)


def sums_of_columns(rows: int, x_dtype: str, w: Coded, spec: Spec, packed: bool) -> bool:
    """Whether loops add up groups of a weight (in, out) as it lies; ``w`` is that as ``rows.rows_of_columns``."""
    loops, size = runtime.strip_loops(), spec.block[1]
    if loops is None or not rows or size is None:
        return False
    large = w.codes.size >= runtime.LARGE
    return large and sums_of_groups(x_dtype, w, spec, 1, packed) and bool(runtime.group_loops().in_dots(size, False))


def in_short_groups(x_dtype: str, w: Coded, spec: Spec, contract: int) -> bool:
    """Whether groups lie along the axis that is contracted, which lies last, and have sums that float64 holds."""
    group = spec.block[1]
    if not _in_scaled_codes(x_dtype, w, spec, contract) or spec.element.unit is None:
        return False
    return group is not None and 1 < group <= LONGEST_GROUP


def has_scales_of_columns(w: Coded, spec: Spec) -> bool:
    """Whether every column of a weight, as it lies, has scales of its own, whichever way the axes of these are."""
    return spec.block[1] == 1 and max(_shape_of_scales(w)) > 1


def sums_single_codes(w: Coded, spec: Spec, contract: int) -> bool:
    """Whether every code along the axis that is contracted, which lies last, has a scale of its own."""
    return contract == 1 and w.scale is not None and has_scales_of_columns(w, spec)


def scales_may_meet_x(w: Coded, spec: Spec, contract: int) -> bool:
    """Whether these scales may be multiplied into x: there is nothing else, and all outputs have the same.

    Not where codes stand for infinities, which dequantizing clips.
    """
    plain = not isinstance(w.scale, tuple) and w.zero_point is None and w.offset is None
    finite = spec.element.bits > 8 or not np.isinf(numbers_of_codes(spec.element)).any()
    return plain and finite and sums_single_codes(w, spec, contract) and w.scale.shape[0] == 1


def largest_scale_to_meet_x(spec: Spec) -> float:
    """Magnitude up to which no value, which would be clipped otherwise, is beyond float32."""
    return spec.source.max / max(abs(spec.element.min), abs(spec.element.max), 1.0)


def _shape_of_scales(w: Coded) -> tuple[int, ...]:
    shape: tuple[int, ...] = (Coded(*w.scale).codes if isinstance(w.scale, tuple) else w.scale).shape
    return shape


def become_rows(x_dtype: str, w: Coded, spec: Spec, contract: int, packed: bool) -> bool:
    """Whether loops make bytes, and rows of them, of codes that exact products do not sum along as they lie."""
    if runtime.whole_loops() is None or not (packed or contract == 0):
        return False
    return become_rows_by_loops(x_dtype, w, spec, packed)


def become_rows_by_loops(x_dtype: str, w: Coded, spec: Spec, packed: bool) -> bool:
    """The same where loops are known to be there: compilers trace no search."""
    element, (rows, length) = spec.element, w.codes.shape
    large = rows * (length * 8 // element.bits if packed else length) >= runtime.LARGE
    return large and element.unit is not None and element.bits <= 8 and _in_scaled_codes(x_dtype, w, spec, 1)


def _in_scaled_codes(x_dtype: str, w: Coded, spec: Spec, contract: int) -> bool:
    """Whether numbers times scales are all that there is, nothing of it float64 or empty, and are summed along rows."""
    plain = w.scale is not None and w.offset is None and spec.element.missing is None
    return plain and contract == 1 and "float64" not in (x_dtype, spec.source.compute) and 0 not in w.codes.shape


def decodes(x_dtype: str, w: Coded, spec: Spec, contract: int, packed: bool) -> bool:
    """Whether the loops serve in which codes become numbers: of up to 8 bits, one a byte or packed.

    The axis that is contracted lies last.
    """
    loops = contract == 1 and runtime.decoding_loops() is not None
    return loops and decodes_by_loops(x_dtype, w, spec, contract, packed)


def decodes_by_loops(x_dtype: str, w: Coded, spec: Spec, contract: int, packed: bool) -> bool:
    """The same where loops are known to be there, and of a weight that lies either way: compilers trace no search."""
    element = spec.element
    small = element.bits <= 8 and max(abs(element.min), abs(element.max)) < LARGEST_DECODED
    return small and (contract == 1 or _in_wide_blocks(spec)) and _in_scaled_codes(x_dtype, w, spec, 1)


def are_in_out(rows: int, columns: int) -> bool:
    """Whether so many rows of x meet a weight (in, out) as it lies; ``columns`` are those of the result."""
    small = 0 < rows <= MOST_ROWS_IN_OUT and rows * columns <= MOST_RESULTS_IN_OUT
    return small and columns >= FEWEST_COLUMNS_IN_OUT


def decodes_in_out(x_dtype: str, w: Coded, spec: Spec, contract: int, packed: bool) -> bool:
    """Whether loops serve that read a weight (in, out) as it lies, of what ``decodes`` is for where it lies (out, in).

    Scales follow rows, or are those of columns: not of blocks that are narrower than a loop's step but for one column.
    """
    loops = contract == 0 and runtime.decoding_loops() is not None
    return loops and decodes_by_loops(x_dtype, w, spec, contract, packed)


def _in_wide_blocks(spec: Spec) -> bool:
    columns = spec.block[1]
    return columns is None or columns == 1 or columns >= NARROWEST_BLOCK


def is_worth_floats(rows: int, codes: int, by_digits: bool = False) -> bool:
    """Whether so many rows of x meet a weight so small that its floats stay in cache, where BLAS is faster.

    ``by_digits``: whether its codes are multiplied by digits of x else.
    """
    a_row = CODES_A_ROW_OF_DIGITS if by_digits else CODES_A_ROW if rows < MANY_ROWS else CODES_OF_MANY_ROWS
    return rows > MOST_ROWS_FOR_LOOPS and codes <= min(rows * a_row, MOST_CODES_AT_ONCE)


def is_worth_panels(rows: int, length: int, inner: int, width: int, depth: int, by_digits: bool) -> bool:
    """Whether so many rows of x, more than ``MOST_ROWS_FOR_LOOPS``, meet a weight (``length``, ``inner``) in panels.

    Panels, ``width`` high, are multiplied whole: a half at least of what they hold is to be there. ``depth``: codes of
    a row that become floats at a time. ``by_digits`` as above.
    """
    codes, a_row = length * inner, CODES_A_ROW_OF_PANELS[by_digits]
    if codes > MOST_CODES_AT_ONCE:
        return not by_digits and are_for_panels(rows, length, inner, width, depth)
    few = rows >= ROWS_FOR_PANELS or codes <= rows * a_row
    return few and rows <= MOST_ROWS_FOR_PANELS and fit_panels(length, width, depth)


def are_for_panels(rows: int, length: int, inner: int, width: int, depth: int) -> bool:
    """The same of a weight that is not small, and multiplied by no digits else."""
    many = rows >= ROWS_FOR_PANELS_OF_LARGE and length * inner > MOST_CODES_AT_ONCE
    return many and fit_panels(length, width, depth)


def fit_panels(length: int, width: int, depth: int) -> bool:
    """Whether a cache holds a panel, and half of the rows of all, and so of what is multiplied, are of the weight."""
    return depth <= DEEPEST_PANEL and 2 * length >= -(-length // width) * width


def by_digits(rows: int, w: Coded, contract: int, packed: bool) -> bool:
    """Whether that is how several rows of x meet a weight of a code a byte and a scale an output, if not floats."""
    if rows <= MOST_ROWS_FOR_LOOPS:  # nobody asks, and it would take a good part of the time of a small product
        return False
    plain = w.scale is not None and not isinstance(w.scale, tuple) and not packed
    return plain and one_scale_a_column(w, contract) and dots_beat_floats()


def is_worth_decoding(rows: int, w: Coded, contract: int) -> bool:
    """Whether so many rows of x meet a weight small enough to go by NumPy's own steps, for which loops pay even so.

    NumPy scales every code of a group, or takes zero points off all, in steps of their own; without either, one call of
    a compiled loop does all for few rows.
    """
    steps = w.zero_point is not None or w.scale.shape[contract] > 1 or rows > MOST_ROWS_FOR_LOOPS
    work = w.codes.shape[0] * w.codes.shape[1] * (rows if w.zero_point is None else MOST_ROWS_FOR_LOOPS)
    return steps and contract == 1 and work >= runtime.LARGE and runtime.decoding_loops() is not None


def tiles(x_dtype: str, w: Coded, spec: Spec, packed: bool) -> bool:
    """Whether NumPy's own steps turn tiles of codes to floats: of 8 bits, or of fewer and packed."""
    element, codes = spec.element, w.codes
    plain = w.scale is not None and w.offset is None and element.missing is None
    if not plain or "float64" in (x_dtype, spec.source.compute) or 0 in codes.shape:
        return False
    known = element.bits < 8 if packed else codes.dtype.itemsize == 1
    return known and max(abs(element.min), abs(element.max)) < LARGEST_NUMBER


def is_worth_tiles(rows: int, w: Coded, spec: Spec, contract: int, packed: bool) -> bool:
    """Whether they are better than what there is else.

    That is better for integers of a code an item that have a compiled loop; or a scale for each output, unless the
    weight is so large that no cache holds a block of its floats until BLAS's own threads have met it.
    """
    if packed or not spec.element.zero_points or w.scale is None or isinstance(w.scale, tuple):
        return True
    if row_loops(rows, w, contract):
        return False
    codes = w.codes.shape[0] * w.codes.shape[1]
    return bool(w.scale.shape[contract] > 1) or (codes >= LEAST_CODES_FOR_PIECES and rows <= MOST_ROWS_FOR_PIECES)


def shortest_sum(rows: int) -> float:
    """Codes with one scale from which on NumPy's steps had better scale their sums than each of them."""
    return 16 if rows <= 4 else 128 if rows <= 16 else math.inf


def fits_16_bits(zero_point: Array) -> bool:
    """Whether differences of codes of up to 8 bits and zero points are integers of 16 bits: others' may be anything."""
    return bool(np.max(zero_point) < 1 << 14) and bool(np.min(zero_point) > -(1 << 14))


def exact_dots(x: Array, w: Array) -> bool:
    """Whether exact sums of integers ``x`` with ``w`` fit the lanes of the processor's dot product."""
    loops = runtime.integer_dots()
    if loops is None or w.dtype.itemsize != 1 or w.shape[1] > reference.LONGEST_PIECE:
        return False
    return bool(np.max(x, initial=0) <= loops.LARGEST)


def row_loops(rows: int, w: Coded, contract: int) -> bool:
    """Whether there is a compiled float32 loop: no zero points, few rows of x, scales that a row can share."""
    shape = w.scale.shape
    return bool(
        w.zero_point is None
        and rows <= MOST_ROWS_FOR_LOOPS
        and (shape[contract] == 1 or (contract == 1 and shape[0] == w.codes.shape[0]))
        and runtime.compiled_loops() is not None
    )


def one_compiled_call(x: Array, w: Coded, bias: Array, outputs: int, contract: int) -> bool:
    """Whether one call of a compiled loop does all: float32 beside int8, a scale for each output or one in all."""
    scale = w.scale
    serves: bool = (
        w.zero_point is None
        and x.dtype == scale.dtype == bias.dtype == _FLOAT32
        and w.codes.dtype == _INT8
        and scale.shape[contract] == 1
        and (scale.size == outputs or scale.size == 1)
        and len(x) <= MOST_ROWS_FOR_LOOPS
        and runtime.compiled_loops() is not None
    )
    return serves


def values_may_overflow(w: Coded) -> bool:
    """Whether a value may lie beyond float32, where the reference clips it.

    That is the outermost of a zero point, or any where the scale was not made of data.
    """
    return not is_not_huge(w.scale)


def scale_may_come_last(x: Array, w: Coded) -> bool:
    """Whether sums of ``x * q`` cannot overflow before their scale does: no zero points, and x not huge."""
    return w.zero_point is None and is_not_huge(x)


def is_not_huge(x: Array) -> bool:
    """Whether sums of ``x * q`` stay finite whatever their length."""
    return bool(np.maximum.reduce(np.abs(x), axis=None) < LARGEST_UNSCALED)
