"""The contract in exact arithmetic: an oracle that shares no code and no floating-point operation with the library.

Written from docs/numerics.md. Numbers are ``fractions.Fraction``; ``nearest`` is the only rounding, and it is done on
integers. NumPy appears at the two ends, where arrays of floats become fractions and back, both exactly. Slow (some 10
microseconds an element), and meant to be read beside the rules.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from dataclasses import dataclass, replace
from fractions import Fraction

import ml_dtypes
import numpy as np
from oracles import formats

PRECISION = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
"""Bits of a significand, the leading one included."""

EXPONENTS = {"float16": (-14, 15), "bfloat16": (-126, 127), "float32": (-126, 127), "float64": (-1022, 1023)}
"""Smallest and largest exponent of a normal number."""

NAN, INFINITY = math.nan, math.inf


# ---- numbers


def power(exponent):
    """2^exponent."""
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def floor_log2(value):
    """The e of ``2^e <= value < 2^(e+1)``."""
    n, d = value.numerator, value.denominator
    e = n.bit_length() - d.bit_length()
    return e if (n >= d << e if e >= 0 else n << -e >= d) else e - 1


def nearest(value, dtype):
    """The number of ``dtype`` nearest to ``value``, ties to even, as if there were no largest exponent."""
    if not value:
        return value
    unit = max(floor_log2(abs(value)), EXPONENTS[dtype][0]) - (PRECISION[dtype] - 1)
    n, d = value.numerator, value.denominator
    n, d = (n << -unit, d) if unit < 0 else (n, d << unit)
    whole, rest = divmod(n, d)
    whole += 2 * rest > d or (2 * rest == d and whole & 1)
    return whole * power(unit)


def largest(dtype):
    """The largest finite number of ``dtype``."""
    return (2 - power(1 - PRECISION[dtype])) * power(EXPONENTS[dtype][1])


def rint(value):
    """The nearest integer, ties to even."""
    whole, rest = divmod(value.numerator, value.denominator)
    return whole + (2 * rest > value.denominator or (2 * rest == value.denominator and whole & 1))


def exactly(x):
    """Elements of an array of floats: Fractions, and floats where they are not finite."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = np.asarray(x).astype(np.float64)
    return [Fraction(v) if math.isfinite(v) else v for v in wide.ravel().tolist()]


def as_array(values, dtype, shape):
    """Numbers of ``dtype`` as an array, every bit kept; above the largest one, infinity."""
    limit = largest(dtype)
    floats = [
        float(v) if not isinstance(v, Fraction) or abs(v) <= limit else math.copysign(INFINITY, v) for v in values
    ]
    wide = np.asarray(floats, dtype=np.float64).reshape(shape)
    narrow = wide.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    assert np.array_equal(narrow.astype(np.float64), wide, equal_nan=True)
    return narrow


# ---- blocks


def grid(shape, block):
    """Number of blocks along every axis; ``block`` has a length for each, or None for all of it."""
    return tuple(1 if size is None else -(-length // size) for length, size in zip(shape, block, strict=True))


def block_numbers(shape, block):
    """For every element in C order, the number of its block, also counted in C order."""
    blocks = grid(shape, block)
    numbers = []
    for index in itertools.product(*map(range, shape)):
        number = 0
        for i, size, count in zip(index, block, blocks, strict=True):
            number = number * count + (0 if size is None else i // size)
        numbers.append(number)
    return numbers


# ---- quantization


@dataclass(frozen=True)
class Exact:
    """What quantization and dequantization have to give, as NumPy arrays."""

    codes: np.ndarray
    scale: np.ndarray | Exact | None
    """Exact itself where scales are kept in a format of their own."""
    zero_point: np.ndarray | None
    values: np.ndarray
    offset: np.ndarray | None = None
    storage: np.ndarray | None = None
    """The codes as they are kept."""


def compute_dtype(dtype):
    """The dtype of scales and of all roundings."""
    return "float64" if dtype == "float64" else "float32"


@dataclass(frozen=True)
class Form:
    """A format: its numbers, how the largest magnitude maps onto them, and how scales are kept."""

    element: str
    kept: str | None = None
    """Format of the scales."""
    own_scale: bool = False
    """Whether the kept scales have a scale themselves."""
    power_of_two: bool = False
    """Whether the largest magnitude becomes the largest power of two among the numbers, not the largest number."""
    scale_rounding: object = "up"

    @functools.cached_property
    def numbers(self):
        return formats.ELEMENTS.get(self.element) or formats.SCALES[self.element]

    @property
    def middle(self):
        """The code of zero that unsigned integers have in a symmetric scheme."""
        return 1 << (formats.BITS[self.element] - 1) if self.element.startswith("uint") else 0

    @functools.cached_property
    def by_size(self):
        """Numbers that are not negative, by code; they grow with their codes."""
        return {code: n for code, n in self.numbers.items() if n > 0 or code == 0}

    @functools.cached_property
    def in_order(self):
        """Codes by their numbers; of two of one number the lower."""
        order = sorted(self.numbers, key=lambda code: (self.numbers[code], code))
        return [code for i, code in enumerate(order) if not i or self.numbers[code] != self.numbers[order[i - 1]]]

    @functools.cached_property
    def extremes(self):
        """Smallest and largest number."""
        return min(self.numbers.values()), max(self.numbers.values())

    @functools.cached_property
    def smallest(self):
        return min(abs(v) for v in self.numbers.values() if v)

    def ends(self, symmetric):
        """Smallest and largest number that quantization gives."""
        low, high = self.extremes
        if symmetric and self.element in formats.INTEGERS:
            low = 2 * self.middle - high
        return low, high

    def largest(self, symmetric=True):
        """What the largest magnitude of a block becomes; half the range where it need not be symmetric."""
        low, high = self.ends(symmetric)
        if not symmetric:
            return (high - low) / 2
        top = high - self.middle if low >= 0 else min(-low, high)
        return power(floor_log2(top)) if self.power_of_two else top


@functools.cache
def form_of(dtype, scale_dtype=None, scale_mode=None):
    """The format that the arguments of ``quantize`` mean."""
    if dtype == "nvfp4":
        return Form("float4_e2m1fn", "float8_e4m3fn", own_scale=True, scale_rounding="half_even")
    if dtype in formats.BLOCK_FORMATS:
        element = formats.BLOCK_FORMATS[dtype]
        power_of_two, rounding = {
            "floor": (True, "toward_zero"),
            "ceil": (True, "up"),
            "even": (True, 1 - power(-formats.MANTISSA[element] - 1)),
            "rceil": (False, "up"),
        }[scale_mode or "floor"]
        return Form(element, "float8_e8m0fnu", power_of_two=power_of_two, scale_rounding=rounding)
    if scale_dtype is None:
        return Form(dtype)
    return Form(dtype, scale_dtype, own_scale=scale_dtype not in formats.SCALES)


def rounded(size, rounding, noise=None, c="float32"):
    """A number that is not negative as a whole number."""
    whole = size.numerator // size.denominator
    part = size - whole
    if rounding == "half_even":
        return rint(size)
    if rounding == "toward_zero":
        return whole
    if rounding == "up":
        return whole + (part > 0)
    if rounding == "stochastic":
        return whole + (size >= nearest(whole + 1 - Fraction(noise, 1 << 16), c))
    return whole + (part >= (Fraction(1, 2) if rounding == "half_away" else rounding))


def integer_code(v, form, zero, symmetric, rounding, noise, c):
    numbers, step = form.numbers, form.smallest
    low, high = (end / step for end in form.ends(symmetric))
    if not isinstance(v, Fraction):
        return zero if math.isnan(v) else int(high if v > 0 else low)
    size = rounded(abs(v) / step, rounding, noise, c)
    code = int(min(max((size if v > 0 else -size) + zero, low), high))
    assert code in numbers
    return code


def float_code(v, negative, form, rounding, noise, c):
    """The code next to ``v``, found among all of one sign; of two as near the even one."""
    numbers, most = form.by_size, form.extremes[1]
    if not isinstance(v, Fraction):
        size = Fraction(0) if math.isnan(v) else most
        negative = negative and not math.isnan(v)
    else:
        size = min(abs(v), most)
    size = size if size >= power(EXPONENTS[c][0]) else Fraction(0)
    codes = list(numbers)
    at = bisect.bisect_right(codes, size, key=numbers.__getitem__)  # numbers grow with their codes
    if at == 0:
        code = codes[0]
    elif numbers[codes[at - 1]] == size or at == len(codes):
        code = codes[at - 1]
    else:
        low, high = codes[at - 1], codes[at]
        # in steps of the gap, counted from zero in the lower number's binade, of which even codes are even multiples
        gap = numbers[high] - numbers[low]
        steps = size / gap
        assert (numbers[low] / gap).denominator == 1
        if rounding == "half_even":
            part = steps - numbers[low] / gap
            code = high if part > Fraction(1, 2) or (part == Fraction(1, 2) and low & 1) else low
        else:
            code = high if rounded(steps, rounding, noise, c) > numbers[low] / gap else low
    mirrored = code + (1 << (formats.BITS.get(form.element, 8) - 1))
    return mirrored if negative and mirrored in form.numbers else code


def codebook_code(v, form, rounding, c):
    """Above the midpoint, rounded, to the larger number, at it to the smaller."""
    assert rounding != "stochastic"
    order = form.in_order
    if not isinstance(v, Fraction):
        if math.isnan(v):
            return min(order, key=lambda code: abs(form.numbers[code]))
        return order[-1] if v > 0 else order[0]
    chosen = order[0]
    for left, right in itertools.pairwise(order):
        low, high = form.numbers[left], form.numbers[right]
        cut = nearest((low + high) / 2, c)
        if rounding == "half_away":
            larger = v >= cut if low + high > 0 else v > cut
        elif rounding == "toward_zero" and not low < 0 < high:
            larger = v >= high if low >= 0 else v > low
        elif rounding == "up":
            larger = v > low if low >= 0 else v >= high if high <= 0 else v > 0
        else:
            larger = v > cut
        if larger:
            chosen = right
    return chosen


def without_tiny(value, c):
    return value if abs(value) >= power(EXPONENTS[c][0] + 1) else Fraction(0)


def least_scale(form, c, offset, floor=Fraction(0)):
    """Below it a product with the smallest number, or the reciprocal of a scale, might be subnormal."""
    smallest = min(form.smallest, Fraction(1), Fraction(1) if form.largest() >= 4 else Fraction(1, 4))
    tiny = power(EXPONENTS[c][0] + 1)
    least = max(tiny * power(-floor_log2(smallest)), floor / form.smallest)
    return max(least, tiny * power(25)) if offset else least


def zero_scale(form):
    """Scale of a block of zeros."""
    if form.kept is None:
        return Fraction(1)
    return Fraction(0) if 0 in form_of(form.kept).numbers.values() else Fraction(1)


def calibrate(values, form, symmetric, offset, c, floor=Fraction(0)):
    """Scale of one block from its finite values, its smallest value, and its offset."""
    tiny = power(EXPONENTS[c][0] + 1)
    inverse = lambda centred: nearest(1 / form.largest(centred), c)
    lo = hi = Fraction(0)
    if symmetric:
        amax = without_tiny(max((abs(v) for v in values), default=Fraction(0)), c)
        scale = nearest(amax * inverse(True), c)
    else:
        bounds = values if offset and values else [*values, Fraction(0)]
        lo, hi = without_tiny(min(bounds), c), without_tiny(max(bounds), c)
        signed = form.extremes[0] < 0
        scale = nearest(nearest(hi / 2 - lo / 2, c) * inverse(offset and signed), c)
        middle = without_tiny(nearest(hi / 2 + lo / 2, c), c) if signed else lo
    least = least_scale(form, c, offset, floor)
    of_zeros = zero_scale(form)
    if 0 not in form.numbers.values():
        of_zeros = min(of_zeros, max(least, form_of(form.kept).smallest if form.kept else 0))
    scale = of_zeros if scale < tiny else max(scale, least)
    return scale, lo, (middle if offset else None)


def keep(scales, form, c, grid_shape, offset):
    """Scales as the format keeps them (arrays), and the numbers that these stand for."""
    if form.kept is None:
        return as_array(scales, c, grid_shape), scales
    floor = least_scale(form, c, offset=False)
    wide = as_array(scales, c, grid_shape)
    if form.own_scale:
        kept = quantize(
            wide, form.kept, block=own_block(form.kept, grid_shape), rounding=form.scale_rounding, floor=floor
        )
        return kept, exactly(kept.values)
    codes, numbers, there = [], [], formats.SCALES[form.kept]
    for scale in scales:
        down = (
            2 if form.scale_rounding == "toward_zero" else 1
        )  # up to the number after the largest, had there been one
        assert not scale or min(filter(None, there.values())) <= scale <= down * max(there.values()), "no such scale"
        codes.append(float_code(scale, False, form_of(form.kept), form.scale_rounding, None, c))
        numbers.append(there[codes[-1]])
    storage = "int16" if form.kept in ("float16", "bfloat16") else "uint8"  # bit patterns
    codes = np.asarray(codes, dtype=storage).reshape(grid_shape)
    return Exact(codes, None, None, as_array(numbers, c, grid_shape), storage=codes), numbers


def quantize(
    x,
    dtype="int8",
    scheme="symmetric",
    block=None,
    scale=None,
    zero_point=None,
    *,
    offset=None,
    scale_dtype=None,
    scale_mode=None,
    rounding="half_even",
    key=None,
    floor=Fraction(0),
):
    """Quantize and dequantize; non-finite values as with ``nonfinite="ignore"``.

    Parameters
    ----------
    x : numpy.ndarray
        float16, bfloat16, float32 or float64.
    block : tuple
        Length of a block along every axis, None for all of it; by default a single block, or the format's own.
    scale, zero_point : numpy.ndarray
        On the grid of blocks: nothing is calibrated then.
    offset : "data" or numpy.ndarray
    scale_dtype, scale_mode, rounding, key
        As in ``aqt_lite.quantize``.
    floor : Fraction
        Where x are scales themselves: the least that is of use, below which none but 0 is kept.
    """
    if dtype in formats.BITROUND:
        return bitround(x, formats.BITROUND[dtype], rounding, key)
    source, shape = x.dtype.name, x.shape
    c = compute_dtype(source)
    form = form_of(dtype, scale_dtype, scale_mode)
    block = own_block(dtype, shape) if block is None else block
    numbers = block_numbers(shape, block)
    has_offset = offset is not None
    symmetric = scheme == "symmetric" and zero_point is None and not has_offset
    centred = symmetric or (has_offset and form.extremes[0] < 0)
    values, negative = exactly(x), np.signbit(x).ravel().tolist()

    on_grid = grid(shape, block)
    blocks = math.prod(on_grid)
    offsets, lows = [None] * blocks, None
    if scale is None:
        members = [[] for _ in range(blocks)]
        for value, number in zip(values, numbers, strict=True):
            if isinstance(value, Fraction):
                members[number].append(value)
        chosen = [calibrate(m, form, symmetric, has_offset, c, floor) for m in members]
        scales, lows = [s for s, _, _ in chosen], [low for _, low, _ in chosen]
        offsets = [o for _, _, o in chosen]
    else:
        scales = [nearest(s, c) for s in exactly(scale)]
        if has_offset:
            offsets = [without_tiny(nearest(o, c), c) for o in exactly(offset)]
    up = scale is not None and form.kept is not None and not form.own_scale  # given scales are rounded up
    kept, scales = keep(scales, replace(form, scale_rounding="up") if up else form, c, on_grid, has_offset)
    inverses = [nearest(1 / s, c) if s else Fraction(0) for s in scales]

    middle = form.middle
    if zero_point is not None:
        zeros = [int(z) for z in np.asarray(zero_point).ravel()]
    elif symmetric or has_offset:
        zeros = [middle if symmetric else 0] * blocks
    else:
        low, high = int(form.extremes[0]), int(form.extremes[1])
        zeros = [
            min(max(low - rint(nearest(v * inverse, c)), low), high) for v, inverse in zip(lows, inverses, strict=True)
        ]

    codes, back = [], []
    known: dict[tuple[int, int], object] = {}  # a code has the same value wherever it occurs in a block
    for position, (value, n) in enumerate(zip(values, numbers, strict=True)):
        minus, inverse = negative[position], inverses[n]
        v = value
        if rounding == "stochastic" and isinstance(v, Fraction) and abs(v) < power(EXPONENTS[c][0]):
            v = Fraction(0)  # subnormal
        if offsets[n] is not None and isinstance(v, Fraction):
            v = without_tiny(nearest(without_tiny(v, c) / 2 - offsets[n] / 2, c), c) * 2
            minus = v < 0
        if isinstance(v, Fraction):
            v = nearest(v * inverse, c)
            if floor and value > 0:
                v = max(v, form.smallest)
        noise = None if rounding != "stochastic" else noise_at(position, key)
        if form.element in formats.INTEGERS:
            code = integer_code(v, form, zeros[n], centred, rounding, noise, c)
        elif form.element in formats.CODEBOOKS:
            code = codebook_code(v, form, rounding, c)
        else:
            code = float_code(v, minus, form, rounding, noise, c)
        codes.append(code)
        if (code, n) not in known:
            known[code, n] = value_of(code, zeros[n], scales[n], offsets[n], form, source)
        back.append(known[code, n])

    bits = formats.BITS[form.element]
    signed = form.element in formats.INTEGERS and not form.element.startswith("uint")
    stored = np.asarray(codes, dtype=f"{'' if signed else 'u'}int{8 if bits <= 8 else 16}").reshape(shape)
    storage = stored
    if bits < 8 and shape:
        rows = formats.packed(stored.reshape(-1, shape[-1]).tolist() if stored.size else [], bits)
        storage = np.asarray(rows, dtype="uint8").reshape(*shape[:-1], -(-shape[-1] * bits // 8))
    has_zero_point = not has_offset and (not symmetric or middle != 0)
    return Exact(
        codes=stored,
        scale=kept,
        zero_point=np.asarray(zeros, dtype=np.int32).reshape(on_grid) if has_zero_point else None,
        values=as_array(back, source, shape),
        offset=as_array(offsets, c, on_grid) if has_offset else None,
        storage=storage,
    )


def bitround(x, keepbits, rounding="half_even", key=None):
    """Float32 with so many bits after the leading one: codes that count its numbers from zero, and no scale."""
    least, bits = EXPONENTS["float32"][0], 9 + keepbits
    most = (255 << keepbits) - 1
    codes, back = [], []
    for position, (value, minus) in enumerate(zip(exactly(x), np.signbit(x).ravel().tolist(), strict=True)):
        code = 0
        if isinstance(value, Fraction):
            size = abs(value)
            if rounding == "stochastic" and size < power(least):
                size = Fraction(0)
            e = max(floor_log2(size), least) if size else least
            steps = size / power(e - keepbits)
            whole = steps.numerator // steps.denominator
            part, below = steps - whole, ((e - least) << keepbits) + whole
            if rounding == "half_even":
                away = part > Fraction(1, 2) or (part == Fraction(1, 2) and below & 1)
            else:
                away = rounded(part, rounding, noise_at(position, key) if rounding == "stochastic" else None)
            code = min(below + int(away), most)
        elif not math.isnan(value):
            code = most
        else:
            minus = False
        field, rest = code >> keepbits, code & ((1 << keepbits) - 1)
        number = (rest + (1 << keepbits if field else 0)) * power(max(field, 1) - 1 + least - keepbits)
        back.append((-number or -0.0) if minus else number)
        codes.append(code - (1 << (bits - 1)) if minus else code)
    stored = np.asarray(codes, dtype="int16" if bits <= 16 else "int32").reshape(x.shape)
    storage = stored
    if bits not in (16, 32) and x.ndim:
        unsigned = [[code % (1 << bits) for code in row] for row in stored.reshape(-1, x.shape[-1]).tolist()]
        rows = formats.packed(unsigned, bits)
        storage = np.asarray(rows, dtype="uint8").reshape(*x.shape[:-1], -(-x.shape[-1] * bits // 8))
    return Exact(stored, None, None, as_array(back, x.dtype.name, x.shape), storage=storage)


def value_of(code, zero, scale, offset, form, source):
    """What a code stands for: a product, perhaps with an offset, clipped to the type's largest, converted to it."""
    c, limit = compute_dtype(source), largest(source)
    number = form.numbers[code] - zero
    negative = number < 0 or (number == 0 and form.element in formats.FLOATS and code != 0)
    if offset is None:
        product = nearest(number * scale, c)
    else:
        product = min(max(nearest(number * scale / 2, c), -limit), limit)
        product = without_tiny(nearest(product + offset / 2, c), c) * 2
        negative = product < 0
    value = nearest(min(max(product, -limit), limit), source)
    return value if value or not negative else -0.0


def own_block(dtype, shape):
    """Blocks where none are asked for: groups along the last axis, or one."""
    group = 32 if dtype in formats.BLOCK_FORMATS else 16 if dtype == "nvfp4" else None
    return (None,) * len(shape) if group is None else (*(1,) * (len(shape) - 1), group)


# ---- noise: Speck32/64 (Beaulieu et al. 2013) in counter mode


def turned(word, bits):
    """A word of 16 bits, rotated to the right."""
    return (word >> bits | word << (16 - bits)) % (1 << 16)


def speck(x, y, key):
    """A block of two words under a key of four, the lowest first."""
    a, *b = key
    for i in range(22):
        x = ((turned(x, 7) + y) % (1 << 16)) ^ a
        y = turned(y, 14) ^ x
        b.append(((a + turned(b[0], 7)) % (1 << 16)) ^ i)
        a = turned(a, 14) ^ b[-1]
        b = b[1:]
    return x, y


def noise_at(position, key):
    """The noise of an element, by its position in C order."""
    words = [key >> (16 * i) & 0xFFFF for i in range(4)]
    return speck(position >> 16, position & 0xFFFF, words)[0]


# ---- reproducible products

LONGEST_PIECE = 1 << 16
RUN = 16
NORMAL = power(-126)


def single(value):
    """Rounded to float32."""
    return nearest(value, "float32")


def flushed(value):
    """Zero where the float32 would be subnormal."""
    return value if abs(value) >= NORMAL else Fraction(0)


def exponent_of(value):
    """Exponent of a float32, as if zero were just below the smallest normal number."""
    return floor_log2(value) if value else -127


def significand(value):
    """The f in [1, 2) of ``value = f * 2^e``."""
    return value / power(exponent_of(value))


def ordered_sum(terms):
    """((a + b) + c) + ..., every sum rounded to float32."""
    total = terms[0]
    for term in terms[1:]:
        total = single(total + term)
    return total


def finish(total, exponent, bias):
    """``total * 2^exponent + bias`` in float32, or None where that overflows."""
    y = flushed(total * power(exponent))
    if bias is not None:
        if abs(y) > largest("float32"):
            return math.copysign(INFINITY, y)
        y = flushed(single(y + flushed(bias)))
    return y


def rounded_sum(integers, steps):
    """``sum integers * steps`` as the float32 number that its upper bits and its lower 24 bits add up to."""
    high, low = divmod(sum(i * q for i, q in zip(integers, steps, strict=True)), 1 << 24)
    return single(single(Fraction(high)) * power(24) + low)


def dot(x, steps, scales, groups, bias=None):
    """One output of a reproducible product.

    ``x`` are the activations (or None for a row that is not finite), ``steps`` the codes less their zero points,
    ``scales`` the scale of every group and ``groups`` the (start, stop) of each along the contracted axis.
    """
    if x is None:
        return NAN
    pieces = [
        (start, min(start + LONGEST_PIECE, stop), scale)
        for (start, stop), scale in zip(groups, scales, strict=True)
        for start in range(start, stop, LONGEST_PIECE)
    ]
    exponents = []
    for start, stop, _ in pieces:
        amax = max(abs(v) for v in x[start:stop])
        e = exponent_of(amax)
        exponents.append(e + 1 if amax and amax / power(e) > Fraction(127, 64) else e)
    top, top_of_scales = max(exponents), max(map(exponent_of, scales))
    terms = []
    for (start, stop, scale), e in zip(pieces, exponents, strict=True):
        scaled = [v * power(30 - e) for v in x[start:stop]]
        t = rounded_sum([rint(v) for v in scaled], steps[start:stop])
        present = [v for v in scaled if v]
        if sum(abs(v) < 1 << 18 for v in present) * 16 > len(present):
            t = single(
                t + rounded_sum([rint((v - rint(v)) * power(31)) for v in scaled], steps[start:stop]) * power(-31)
            )
        drop = e - top + exponent_of(scale) - top_of_scales
        terms.append(single(t * significand(scale)) * (power(drop) if drop >= -60 else 0))
    runs = [terms[i : i + RUN] for i in range(0, len(terms), RUN)]
    return finish(ordered_sum([ordered_sum(run) for run in runs]), top + top_of_scales - 30, bias)


def linear(x, codes, scale, zero_point=None, block=(None, None), bias=None, contract=1):
    """``x @ w.T + bias`` (``x @ w + bias`` for ``contract=0``) in ``mode="reproducible"``, in the dtype of ``x``.

    Parameters
    ----------
    x : numpy.ndarray, shape (M, K)
        float16, bfloat16 or float32.
    codes : numpy.ndarray, shape (N, K), or (K, N) for contract=0
        int8 or uint8.
    scale, zero_point : numpy.ndarray
        On the grid of ``block``.
    """
    if contract == 0:
        codes, scale, block = codes.T, scale.T, block[::-1]
        zero_point = None if zero_point is None else zero_point.T
    (outputs, k), (outer, inner) = codes.shape, block
    scales = np.asarray(exactly(scale), dtype=object).reshape(scale.shape)
    biases = None if bias is None else exactly(bias)

    rows = []
    for row in x:
        values = [flushed(v) if isinstance(v, Fraction) else v for v in exactly(row)]
        rows.append(values if all(isinstance(v, Fraction) for v in values) else None)
    into_x = inner == 1 and scale.shape[0] == 1 and scale.shape[1] > 1
    if into_x:  # a scale for each entry of the contracted axis belongs to x
        rows = [
            None if r is None else [flushed(single(v * s)) for v, s in zip(r, scales[0], strict=True)] for r in rows
        ]
        rows = [r if r is not None and all(abs(v) <= largest("float32") for v in r) else None for r in rows]

    size = k if into_x or inner is None else inner
    groups = [(start, min(start + size, k)) for start in range(0, k, size)]
    y = []
    for row in rows:
        for n in range(outputs):
            at = 0 if outer is None else n // outer
            zeros = 0 if zero_point is None else np.repeat(zero_point[at], 1 if inner is None else inner)[:k]
            steps = [int(q) for q in codes[n].astype(np.int64) - zeros]
            own = [Fraction(1)] if into_x else list(scales[at])
            y.append(dot(row, steps, own, groups, None if biases is None else biases[n]))
    dtype = x.dtype.name
    return as_array([nearest(v, dtype) if isinstance(v, Fraction) else v for v in y], dtype, (len(x), outputs))


def integer_product(x_codes, x_scale, x_zero_point, codes, scale, zero_point=None, bias=None, dtype="float32"):
    """A quantized row by row (M, K) times a quantized (N, K), one scale a row of each: an exact sum, then scales."""

    def steps(q, zero):
        return q.astype(np.int64) - (0 if zero is None else zero)

    totals = steps(x_codes, x_zero_point) @ steps(codes, zero_point).T
    left, right = exactly(x_scale), exactly(scale)
    biases = [None] * len(codes) if bias is None else exactly(bias)
    y = []
    for m, n in itertools.product(range(len(x_codes)), range(len(codes))):
        t = single(single(single(Fraction(int(totals[m, n]))) * significand(left[m])) * significand(right[n]))
        y.append(finish(t, exponent_of(left[m]) + exponent_of(right[n]), biases[n]))
    return as_array([nearest(v, dtype) if isinstance(v, Fraction) else v for v in y], dtype, totals.shape)
