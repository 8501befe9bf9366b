"""Matrix products with a quantized weight: the plain form, and the forms with the same bits on every backend.

Owns: the arithmetic that every kernel is tested against. Imports: affine, formats, granularity, packing, the
``Backend`` interface.

Throughout, ``x`` is (M, K), ``contract`` says which axis of the weight is summed over (0 for codes of shape (K, N), 1
for (N, K)), and the result is (M, N).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from aqt_lite import affine
from aqt_lite._blocks import spread
from aqt_lite._dispatch import run
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.elements import float_type
from aqt_lite.formats import FORMATS
from aqt_lite.granularity import Block
from aqt_lite.packing import unpack

__all__ = [
    "LONGEST_PIECE",
    "RUN",
    "as_integers",
    "fixed_point_matmul",
    "flushed",
    "has_integer_sums",
    "in_integers",
    "integer_matmul",
    "matmul",
    "matmul_integer",
    "matmul_reproducible",
    "matmul_reproducible_stored",
    "matmul_stored",
    "of_columns",
    "one_per_column",
    "pieces",
    "scales_belong_to_x",
    "stored_as_integers",
    "sums_of_codes",
    "unpacked",
    "values_stored",
    "with_scales_in_x",
    "with_usable_scales",
]

LONGEST_PIECE = 1 << 16
"""Longest run of the contracted axis with one exponent: an int32 sum holds 2^16 products of 2^7 and 2^8 - 1."""

RUN = 16
"""Pieces that are added up before their sum joins that of the runs before: shorter chains, less error."""

SMALL = 2.0**18
"""Magnitude of an entry in fixed point, of 2^30 for the largest, below which it has fewer than 18 bits."""

MANY = 16
"""One small entry in so many makes a piece be computed a second time, for what the first left out."""

LEAST_DROP = -60
"""Exponent, relative to the row's largest piece, below which a piece counts as zero: its sum would not be seen."""

BITS = 30
"""Bits of the largest entry of a piece in fixed point: with a sign they fill four digits of 8 bits."""

SUMS_AT_A_TIME = 1 << 19
"""Sums of pieces, 80 bytes each with what is made of them, that a reproducible product holds at a time."""

ENTRIES_AT_A_TIME = 1 << 17
"""Entries of x that it has in fixed point at a time."""

MOST_FRACTION = 127 / 64
"""Significand of a piece's largest entry up to which four balanced digits hold it."""

FINEST = 2.0**-37
"""Magnitude, relative to its row's largest, down to which an entry keeps all 24 bits in two passes."""

TERMS_OF_FLOAT32 = 512
"""Products of 8 and 9 bits whose sum float32 holds exactly: 512 * 128 * 255 < 2^24."""

SMALLEST = 2.0**-126
"""Smallest normal float32. Anything below it is zero here, because some compilers flush it."""


def matmul(x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int, b: Backend) -> Array:
    """``x @ dequantize(w) + bias`` in the wider compute dtype of the two, rounded once to the dtype of ``x``."""
    xp = b.xp
    compute = b.dtype("float64" if "float64" in (b.dtype_name(x), b.dtype_name(w.scale)) else "float32")
    weight = affine.dequantize(w, spec=unrounded(spec), out=spec.source.compute, b=b)
    weight = xp.astype(weight, compute)
    y = xp.matmul(xp.astype(x, compute), weight if contract == 0 else xp.permute_dims(weight, (1, 0)))
    if bias is not None:
        y = y + xp.expand_dims(xp.astype(bias, compute), axis=0)
    return xp.astype(y, x.dtype)


def matmul_of_values(x: Array, values: Array, bias: Array | None, *, contract: int, b: Backend) -> Array:
    """The same with the weight's values, where codes are of a format that products do not read."""
    xp = b.xp
    compute = b.dtype("float64" if "float64" in (b.dtype_name(x), b.dtype_name(values)) else "float32")
    weight = xp.astype(values, compute)
    y = xp.matmul(xp.astype(x, compute), weight if contract == 0 else xp.permute_dims(weight, (1, 0)))
    if bias is not None:
        y = y + xp.expand_dims(xp.astype(bias, compute), axis=0)
    return xp.astype(y, x.dtype)


def matmul_stored(
    x: Array,
    w: Coded,
    bias: Array | None,
    *,
    spec: Spec,
    contract: int,
    packed_length: int | None,
    swapped: bool = False,
    b: Backend,
) -> Array:
    """``matmul`` of a weight as it is stored, of any format: codes that may be packed, scales as they are kept.

    NaN takes the place of scales that are plain numbers and 0. ``swapped``: the axes of scales and zero points are in
    the other order than those of the codes, and than ``spec`` says.
    """
    values = usable_values(in_order(w, swapped, b), spec=spec, packed_length=packed_length, b=b)
    return matmul_of_values(x, values, bias, contract=contract, b=b)


def in_order(w: Coded, swapped: bool, b: Backend) -> Coded:
    """A weight whose scales, zero points and offsets have their axes in the order of the codes'."""

    def turned(blocks: Any) -> Any:
        if isinstance(blocks, tuple):
            return Coded(*map(turned, blocks))
        return None if blocks is None else b.xp.permute_dims(blocks, (1, 0))

    return Coded(w.codes, *map(turned, w[1:])) if swapped else w


def usable_values(w: Coded, *, spec: Spec, packed_length: int | None, b: Backend) -> Array:
    """The values of such a weight, NaN where a scale that is a plain number is 0."""
    return values_stored(with_usable_scales(w, b), spec=spec, packed_length=packed_length, b=b)


def values_stored(w: Coded, *, spec: Spec, packed_length: int | None, b: Backend) -> Array:
    """The values of such a weight, as products use them."""
    w = unpacked(w, spec, packed_length, b)
    return run(b, affine.dequantize, w, spec=unrounded(spec), out=spec.source.compute)


def unpacked(w: Coded, spec: Spec, packed_length: int | None, b: Backend) -> Coded:
    """Such a weight with its codes one an item."""
    if packed_length is None:
        return w
    element = spec.element
    signed = not element.storage.startswith("u")
    return w._replace(codes=run(b, unpack, w.codes, bits=element.bits, length=packed_length, signed=signed))


def as_integers(w: Coded, *, spec: Spec, b: Backend) -> tuple[Coded, Spec]:
    """A weight, codes one an item, with integer codes of 8 or 16 bits and plain scales; and what it then means.

    Its numbers are integers, or whole multiples of a power of two.
    """
    element = spec.element
    plain = replace(
        spec, format=FORMATS[element.storage if element.unit in (None, 1.0) and element.zero_points else "int8"]
    )
    if element.zero_points and spec.format.scale is None:
        return w, plain  # as they are
    return run(b, in_integers, w, spec=spec), plain


def stored_as_integers(w: Coded, *, spec: Spec, packed_length: int | None, b: Backend) -> tuple[Coded, Spec]:
    """The same of a weight as it is stored. NaN takes the place of plain scales of no use, such as 0."""
    return as_integers(unpacked(with_usable_scales(w, b), spec, packed_length, b), spec=spec, b=b)


def with_usable_scales(w: Coded, b: Backend) -> Coded:
    """The same, NaN in the place of plain scales of no use."""
    if w.scale is None or isinstance(w.scale, tuple):
        return w
    return w._replace(scale=b.unusable_as_nan(w.scale, positive=False))


def in_integers(w: Coded, *, spec: Spec, b: Backend) -> Coded:
    """A weight of integers, or of whole multiples of a power of two, as integer codes and scales of those multiples."""
    unit = spec.element.unit
    xp, scale = b.xp, affine.usable_scales(w.scale, spec, b)
    numbers = spec.element.decode(w.codes, b)
    if unit is None or (unit == 1 and b.dtype_name(numbers) in ("int8", "uint8")):
        return Coded(numbers, scale, w.zero_point)
    steps = xp.astype(numbers, xp.float32) * (1 / unit)
    return Coded(xp.astype(steps, xp.int8), scale * unit, w.zero_point)


def unrounded(spec: Spec) -> Spec:
    """``spec`` for values as products use them: in the compute dtype, not rounded or clipped to a narrower source's."""
    return replace(spec, source=float_type(spec.source.compute))


def matmul_integer(x: Coded, w: Coded, bias: Array | None, *, contract: int, out: str, b: Backend) -> Array:
    """Both sides quantized, one scale a row of ``x`` and one a column of the weight: an exact integer product.

    The sum is rounded to float32 once and multiplied by each scale's significand, rounded once each; the scales'
    powers of two come last and are exact.
    """
    xp = b.xp
    total = sums_of_codes(x, w, contract=contract, b=b)
    x_fraction, x_exponent = _significand_and_exponent(x.scale, b)
    w_fraction, w_exponent = _significand_and_exponent(_swapped(w.scale, xp) if contract == 1 else w.scale, b)
    y = xp.astype(total, xp.float32) * x_fraction * w_fraction
    return _finish(y, x_exponent + w_exponent, bias, out, b)


def sums_of_codes(x: Coded, w: Coded, *, contract: int, b: Backend) -> Array:
    """``sum (p - u)(q - v) = sum p q - u sum q - v sum p + K u v`` of codes and zero points.

    All in int32, which the caller has made sure holds it.
    """
    xp = b.xp
    if contract == 0:
        w = _transposed(w, xp)
    x, w = _signed(x, b), _signed(w, b)
    rows, columns = x.zero_point, _swapped(w.zero_point, xp)
    total = run(b, integer_matmul, x.codes, w.codes)
    if rows is not None:
        total = total - rows * xp.expand_dims(xp.sum(w.codes, axis=1, dtype=xp.int32), axis=0)
    if columns is not None:
        total = total - columns * xp.sum(x.codes, axis=1, keepdims=True, dtype=xp.int32)
    if rows is not None and columns is not None:
        total = total + rows * columns * x.codes.shape[1]
    return total


def matmul_reproducible(x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int, b: Backend) -> Array:
    """The product whose bits depend on nothing but its inputs (docs/numerics.md, "Reproducible products").

    Rows of ``x`` are cut into pieces along the contracted axis, none crossing a group of the weight's scales, none
    longer than ``LONGEST_PIECE``. For each piece:

    1. with ``f * 2^e`` its largest magnitude, f in [1, 2), its entries become integers ``X = rint(x * 2^(30-e))`` that
       four balanced base-256 digits hold (e is one more where f is so near 2 that a carry would need a fifth);
    2. ``S = sum X * (q - zero_point)`` is an exact integer, ``S = high * 2^24 + low`` with 0 <= low < 2^24;
    3. ``t = (float32(high) * 2^24 + low) * significand(scale)``, each step rounded, times ``2^(e - E)`` with E the
       row's largest e.

    Where more than one in ``MANY`` of a piece's entries that are not 0 have ``|x * 2^(30-e)| < SMALL``, the largest
    says little about the rest. What step 1 rounded away, ``rint((x * 2^(30-e) - X) * 2^31)``, then goes through step 2
    as well, and its ``float32(high) * 2^24 + low`` is added to the first, times 2^-31, before the scale.

    The pieces' ``t`` are added one after the other in runs of ``RUN``, then the runs likewise, and the sum is
    multiplied by ``2^(E - 30 + exponent(scale))``.
    Every product that meets an addition is a product with a power of two, which is exact, so a fused multiply-add
    changes nothing. Sums are multiples of 2^-114, so none is subnormal before the last step, and that flushes.
    """
    (rows, k), n = x.shape, w.codes.shape[1 - contract]
    scales: Array = w.scale
    outer, inner = (spec.block[d] if scales.shape[d] > 1 else None for d in (1 - contract, contract))
    if outer is not None and outer != 1:  # columns share scales: one for each, so that any of them may go by themselves
        w = w._replace(scale=_per_column(scales, n, outer, contract, b))
        if w.zero_point is not None:
            w = w._replace(zero_point=_per_column(w.zero_point, n, outer, contract, b))
    cuts = pieces(k, inner)

    def sizes() -> tuple[int, int]:
        return parts_of_product(rows, n, k, len(cuts)) if isinstance(rows, int) else (rows, n)

    def of_rows(cut: Callable[[Array, int], Array]) -> Array:
        left = _left_side(cut(x, 0), w, inner, contract, b)

        def of_columns(cut: Callable[[Array, int], Array]) -> Array:
            axis = 1 - contract
            part = Coded(*(a if a is None or a.shape[axis] == 1 else cut(a, axis) for a in (w.codes, *w[1:3])))
            return _times_columns(left, part, None if bias is None else cut(bias, 0), inner, contract, b)

        return b.in_parts(of_columns, n, lambda: sizes()[1], axis=1, like=x)

    return b.in_parts(of_rows, rows, lambda: sizes()[0], axis=0, like=x)


def matmul_reproducible_stored(
    x: Array,
    w: Coded,
    bias: Array | None,
    *,
    spec: Spec,
    contract: int,
    packed_length: int | None,
    swapped: bool = False,
    b: Backend,
) -> Array:
    """``matmul_reproducible`` of a weight as it is stored, of any format that has a unit; for the rest, as above."""
    w, plain = stored_as_integers(in_order(w, swapped, b), spec=spec, packed_length=packed_length, b=b)
    return matmul_reproducible(x, w, bias, spec=plain, contract=contract, b=b)


class _Left(NamedTuple):
    """Rows of x as ``matmul_reproducible`` multiplies them: pieces first."""

    scaled: Array
    """``x * 2^(30-e)``."""
    integers: Array
    """The same, rounded."""
    exponent: Array
    many: Array
    """Which pieces of which rows want a second pass."""
    bad_row: Array
    out: str
    """dtype of the result."""


def scales_belong_to_x(scale: Array, inner: int | None) -> bool:
    """Whether there is one scale for each entry of the contracted axis, whatever the column."""
    return inner == 1 and 1 in scale.shape


def with_scales_in_x(x: Array, w: Coded, spec: Spec, contract: int, b: Backend) -> tuple[Array, Coded, Spec] | None:
    """The same product of float32 ``x`` times such scales and of a weight with one scale in all, which is 1.

    None where scales belong to no entries of x, or each of these has a zero point of its own.
    """
    inner = spec.block[contract] if w.scale.shape[contract] > 1 else None
    if not scales_belong_to_x(w.scale, inner) or w.zero_point is not None:
        return None
    xp = b.xp
    x = flushed(flushed(xp.astype(x, xp.float32), xp) * xp.reshape(w.scale, (1, -1)), xp)
    return x, w._replace(scale=xp.ones_like(w.scale[:1, :1])), replace(spec, block=(None, None))


def _left_side(x: Array, w: Coded, inner: int | None, contract: int, b: Backend) -> _Left:
    """Step 1."""
    xp, out = b.xp, b.dtype_name(x)
    x = flushed(xp.astype(x, xp.float32), xp)
    if scales_belong_to_x(w.scale, inner):
        x, inner = flushed(x * xp.reshape(w.scale, (1, -1)), xp), None
    bad_row = ~xp.isfinite(b.largest(xp.abs(x), axis=1, keepdims=True))
    x = xp.where(bad_row, xp.zeros_like(x), x)
    x = _cut(x, pieces(x.shape[1], inner), xp)

    fraction, exponent = b.fraction_and_exponent(xp.max(xp.abs(x), axis=2, keepdims=True))
    exponent = exponent + xp.astype(fraction > MOST_FRACTION, xp.int32)
    scaled = _scaled(x, BITS - exponent, b)
    present = x != 0
    small = present & (xp.abs(scaled) < SMALL)
    many = _count(small, xp) * MANY > _count(present, xp)
    return _Left(scaled, xp.round(scaled), exponent, many, bad_row, out)


def _times_columns(x: _Left, w: Coded, bias: Array | None, inner: int | None, contract: int, b: Backend) -> Array:
    """Steps 2 and 3, and the sum, for some columns of the weight."""
    xp = b.xp
    w = _signed(w if contract == 1 else _transposed(w, xp), b)
    codes, scale, zero_point = w.codes, w.scale, w.zero_point
    k = codes.shape[1]
    if scales_belong_to_x(scale, inner):
        scale, inner = xp.ones_like(scale[:, :1]), None
        if zero_point is not None:
            codes, zero_point = xp.astype(codes, xp.int32) - zero_point, None
    cuts = pieces(k, inner)
    groups = [0 if inner is None else start // inner for start, _ in cuts]
    w_fraction, w_exponent = _significand_and_exponent(scale, b)
    column_exponent = xp.max(w_exponent, axis=1, keepdims=True)  # groups of one column differ: the largest leads
    w_pieces = _cut(codes, cuts, xp)
    row_exponent = xp.max(x.exponent, axis=0, keepdims=True)
    if zero_point is not None:
        zero_point = _per_piece(zero_point, groups, xp)

    def rounded_sum(integers: Array) -> Array:
        high, low = run(b, fixed_point_matmul, xp.astype(integers, xp.int32), w_pieces, zero_point)
        return xp.astype(high, xp.float32) * 2.0**24 + xp.astype(low, xp.float32)

    t = rounded_sum(x.integers)
    finer = b.compute_if_any(x.many, lambda: rounded_sum(xp.round((x.scaled - x.integers) * 2.0**31)), xp.zeros_like(t))
    t = t + xp.where(x.many, finer, xp.zeros_like(finer)) * 2.0**-31
    t = t * _per_piece(w_fraction, groups, xp)
    drop = (x.exponent - row_exponent) + _per_piece(w_exponent - column_exponent, groups, xp)
    total = _ordered_sum(t * b.power_of_two(xp.where(drop < LEAST_DROP, xp.full_like(drop, -999), drop)), b)

    last = row_exponent[0, :, :] + _swapped(column_exponent, xp) - BITS
    total = xp.where(x.bad_row, xp.full_like(total, float("nan")), total)
    return _finish(total, last, bias, x.out, b)


def parts_of_product(rows: int, columns: int, length: int, pieces: int) -> tuple[int, int]:
    """How many rows of x, and columns of the weight, ``matmul_reproducible`` takes at a time.

    Each piece has a sum of its own for each of their products, and those are to take little memory.
    """
    height = min(rows, max(SUMS_AT_A_TIME // (pieces * columns), ENTRIES_AT_A_TIME // max(length, 1), 1))
    return height, min(columns, max(SUMS_AT_A_TIME // (pieces * height), 1))


def _per_column(blocks: Array, columns: int, outer: int, contract: int, b: Backend) -> Array:
    shape = (columns, blocks.shape[1]) if contract == 1 else (blocks.shape[0], columns)
    return spread(blocks, shape, (outer, 1) if contract == 1 else (1, outer), b.xp)


def integer_matmul(x: Array, w: Array, *, b: Backend) -> Array:
    """``x @ w.T`` of integers over the last axes, exact, as int32; callers make sure that the sums fit.

    Through float64, whose products are as fast as a library's best and exact below 2^53; or through float32 where a
    library has no other, in sums of few enough terms.
    """
    xp = b.xp
    if not hasattr(xp, "float64"):
        total = None
        for start in range(0, x.shape[-1], TERMS_OF_FLOAT32):
            part = slice(start, min(start + TERMS_OF_FLOAT32, x.shape[-1]))
            left, right = (xp.astype(v[..., part], xp.float32) for v in (x, w))
            terms = xp.astype(xp.matmul(left, xp.matrix_transpose(right)), xp.int32)
            total = terms if total is None else total + terms
        return total
    product = xp.matmul(xp.astype(x, xp.float64), xp.matrix_transpose(xp.astype(w, xp.float64)))
    return xp.astype(product, xp.int32)


def fixed_point_matmul(x: Array, w: Array, zero_point: Array | None, *, b: Backend) -> tuple[Array, Array]:
    """``sum_k x[p, m, k] * (w[p, n, k] - zero_point[p, 0, n])`` as int32 ``high * 2^24 + low``, 0 <= low < 2^24.

    ``x`` has 31 bits, the codes 8 (or 9, where zero points are taken off already). Each digit of ``x`` gives one sum.
    """
    xp, m = b.xp, x.shape[1]
    digits = []
    for _ in range(3):
        digit = ((x + 128) & 255) - 128
        digits.append(digit)
        x = (x - digit) >> 8
    stacked = xp.astype(xp.concat([*digits, x], axis=1), xp.int8)  # (pieces, 4 * M, width)
    products = run(b, integer_matmul, stacked, w)
    if zero_point is not None:
        products = products - xp.sum(stacked, axis=2, keepdims=True, dtype=xp.int32) * zero_point
    carried = products[:, :m, :]
    low = carried & 255  # what lies below the highest digit becomes one number that is not negative
    for place in (1, 2):
        carried = products[:, place * m : (place + 1) * m, :] + (carried >> 8)
        low = low + ((carried & 255) << (8 * place))
    return products[:, 3 * m :, :] + (carried >> 8), low


def _significand_and_exponent(scale: Array, b: Backend) -> tuple[Array, Array]:
    """``scale = f * 2^e`` with 1 <= |f| < 2: scales that others chose may be negative."""
    fraction, exponent = b.fraction_and_exponent(b.xp.abs(scale))
    return b.xp.where(scale < 0, -fraction, fraction), exponent


def one_per_column(blocks: Array, shape: tuple[int, ...], block: Block, contract: int, xp: Any) -> Array:
    """Scales or zero points of a weight of ``shape``, spread so that each output has its own, or all have one."""
    return spread(blocks, shape, (block[0], None) if contract == 1 else (None, block[1]), xp)


def of_columns(w: Coded, bias: Array | None, *, spec: Spec, b: Backend) -> tuple[Array, Array, Array, Array]:
    """What compiled loops need of each column of a product in one piece, as four vectors; the codes are (N, K).

    The significand and the exponent of its scale, the zero point (of uint8 codes: as if they were int8), and the bias.
    """
    xp, n = b.xp, w.codes.shape[0]

    def vector(blocks: Array) -> Array:
        return xp.broadcast_to(one_per_column(blocks, (n, 1), spec.block, 1, xp)[:, 0], (n,))

    fraction, exponent = _significand_and_exponent(vector(w.scale), b)
    zero = xp.zeros_like(exponent)
    if w.zero_point is not None:
        zero = vector(w.zero_point) - (128 if b.dtype_name(w.codes) == "uint8" else 0)
    bias = xp.zeros_like(fraction) if bias is None else flushed(xp.astype(bias, xp.float32), xp)
    return fraction, exponent, zero, bias


def has_integer_sums(scale: Array, contract: int, contracted_block: int | None) -> bool:
    """Whether several products share a scale, so that a sum of integers is left to be exact.

    Not so where every entry of the contracted axis has a scale of its own that differs between outputs, too.
    """
    return not (contracted_block == 1 and scale.shape[contract] > 1 and scale.shape[1 - contract] > 1)


def fits_fixed_point(x: Array, b: Backend) -> Array:
    """Whether ``matmul_reproducible`` loses nothing of x that a float32 product keeps, whatever the weight is."""
    return b.xp.all(rows_fit_fixed_point(x, b))


def rows_fit_fixed_point(x: Array, b: Backend) -> Array:
    """The same for each row, as a column.

    Two passes hold 62 bits below a row's largest entry; float32 has 24 of them. Infinities, NaN and
    subnormal numbers do not fit.
    """
    xp = b.xp
    magnitude = xp.abs(xp.astype(x, xp.float32))
    largest = xp.max(magnitude, axis=1, keepdims=True)
    enough = (magnitude == 0) | ((magnitude >= largest * FINEST) & (magnitude >= SMALLEST))
    return xp.all(enough & xp.isfinite(largest), axis=1, keepdims=True)


def pieces(length: int, group: int | None) -> list[tuple[int, int]]:
    """Start and stop of every piece: no longer than ``LONGEST_PIECE``, none crossing a multiple of ``group``."""
    size = length if group is None else group
    return [
        (start, min(start + LONGEST_PIECE, first + size, length))
        for first in range(0, length, max(size, 1))
        for start in range(first, min(first + size, length), LONGEST_PIECE)
    ]


def _swapped(x: Any, xp: Any) -> Any:
    """The transpose, or None of None."""
    return None if x is None else xp.permute_dims(x, (1, 0))


def _transposed(w: Coded, xp: Any) -> Coded:
    return Coded(_swapped(w.codes, xp), _swapped(w.scale, xp), _swapped(w.zero_point, xp))


def _signed(w: Coded, b: Backend) -> Coded:
    """Codes and zero points, both 128 less where codes are uint8: the same differences, and int8 is faster."""
    if b.dtype_name(w.codes) != "uint8":
        return w
    xp = b.xp
    assert w.zero_point is not None  # unsigned codes always have one
    codes = xp.astype(xp.astype(w.codes, xp.int16) - 128, xp.int8)
    return w._replace(codes=codes, zero_point=w.zero_point - 128)


def _count(where: Array, xp: Any) -> Array:
    return xp.sum(xp.astype(where, xp.int32), axis=2, keepdims=True, dtype=xp.int32)


def _cut(x: Array, cuts: list[tuple[int, int]], xp: Any) -> Array:
    """(rows, K) as (pieces, rows, width), shorter pieces filled up with zeros."""
    rows, length = x.shape[0], x.shape[1]
    width = max(stop - start for start, stop in cuts)
    if all(start == i * width for i, (start, _) in enumerate(cuts)):
        x = _padded(x, len(cuts) * width - length, xp)
        return xp.permute_dims(xp.reshape(x, (rows, len(cuts), width)), (1, 0, 2))
    return xp.stack([_padded(x[:, start:stop], width - (stop - start), xp) for start, stop in cuts])


def _ordered_sum(t: Array, b: Backend) -> Array:
    """The sum along the first axis, in runs; what fills up the last run is zero and adds nothing."""
    xp, (count, *rest) = b.xp, t.shape
    runs = -(-count // RUN)
    if runs > 1:
        filler = xp.broadcast_to(xp.zeros_like(t[:1, ...]), (runs * RUN - count, *rest))
        t = xp.reshape(xp.concat([t, filler], axis=0), (runs, RUN, *rest))
        t = b.ordered_sum(xp.permute_dims(t, (1, 0, 2, 3)))
    return b.ordered_sum(t)


def _padded(x: Array, missing: int, xp: Any) -> Array:
    if not missing:
        return x
    zeros = xp.broadcast_to(xp.zeros_like(x[:, :1]), (x.shape[0], missing))
    return xp.concat([x, zeros], axis=1)


def _per_piece(columns: Array, groups: list[int], xp: Any) -> Array:
    """(N, groups) as (pieces, 1, N), each piece with its group's entry."""
    if columns.shape[1] == 1 or groups == list(range(columns.shape[1])):
        return xp.expand_dims(xp.permute_dims(columns, (1, 0)), axis=1)
    return xp.expand_dims(xp.stack([columns[:, g] for g in groups]), axis=1)


def flushed(x: Array, xp: Any) -> Array:
    """Subnormal numbers as zeros."""
    return xp.where(xp.abs(x) < SMALLEST, xp.zeros_like(x), x)


def _scaled(x: Array, e: Array, b: Backend) -> Array:
    """``x * 2^e`` for e in [-200, 254]: in two steps of one direction, so that nothing overflows on the way."""
    half = e >> 1
    return x * b.power_of_two(half) * b.power_of_two(e - half)


def _finish(y: Array, exponent: Array, bias: Array | None, out: str, b: Backend) -> Array:
    """``y * 2^exponent + bias``, subnormal numbers flushed, in dtype ``out``."""
    xp = b.xp
    y = flushed(_scaled(y, exponent, b), xp)
    if bias is not None:
        bias = xp.expand_dims(flushed(xp.astype(bias, xp.float32), xp), axis=0)
        y = flushed(y + bias, xp)
    return xp.astype(y, b.dtype(out))
