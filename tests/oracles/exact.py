"""The contract in exact arithmetic: an oracle that shares no code and no floating-point operation with the library.

Written from docs/numerics.md. Numbers are ``fractions.Fraction``; ``nearest`` is the only rounding, and it is done on
integers. NumPy appears at the two ends, where arrays of floats become fractions and back, both exactly. Slow (some 10
microseconds an element), and meant to be read beside the rules.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

import ml_dtypes
import numpy as np

PRECISION = {"float16": 11, "bfloat16": 8, "float32": 24, "float64": 53}
"""Bits of a significand, the leading one included."""

EXPONENTS = {"float16": (-14, 15), "bfloat16": (-126, 127), "float32": (-126, 127), "float64": (-1022, 1023)}
"""Smallest and largest exponent of a normal number."""

CODES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535)}
"""Smallest and largest integer."""

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
    scale: np.ndarray
    zero_point: np.ndarray | None
    values: np.ndarray


def compute_dtype(dtype):
    """The dtype of scales and of all roundings."""
    return "float64" if dtype == "float64" else "float32"


def code_range(element, symmetric):
    """Smallest code, largest code, and the code of zero in a symmetric scheme."""
    least, most = CODES[element]
    middle = 0 if least else (most + 1) // 2
    return (middle - (most - middle), most, middle) if symmetric else (least, most, middle)


def calibrate(values, element, symmetric, dtype):
    """Scale and zero point of one block, from its finite values."""
    c = compute_dtype(dtype)
    tiny = power(EXPONENTS[c][0] + 1)
    qmin, qmax, middle = code_range(element, symmetric)
    if symmetric:
        amax = max((abs(v) for v in values), default=Fraction(0))
        amax = amax if amax >= tiny else Fraction(0)
        scale = nearest(amax * nearest(Fraction(1, qmax - middle), c), c)
        return (scale if scale >= tiny else Fraction(1)), middle
    lo, hi = min([Fraction(0), *values]), max([Fraction(0), *values])
    lo, hi = (lo if -lo >= tiny else Fraction(0)), (hi if hi >= tiny else Fraction(0))
    scale = nearest(nearest(hi / 2 - lo / 2, c) * nearest(Fraction(2, qmax - qmin), c), c)
    scale = scale if scale >= tiny else Fraction(1)
    return scale, min(max(qmin - rint(nearest(lo * nearest(1 / scale, c), c)), qmin), qmax)


def code_of(value, inverse, zero_point, qmin, qmax, c):
    """The code of one value."""
    if not isinstance(value, Fraction):
        return zero_point if math.isnan(value) else (qmax if value > 0 else qmin)
    return min(max(rint(nearest(value * inverse, c)) + zero_point, qmin), qmax)


def value_of(steps, scale, dtype):
    """What ``steps`` (code minus zero point) stand for: a product, clipped to the type's largest, converted to it."""
    product = nearest(steps * scale, compute_dtype(dtype))
    limit = largest(dtype)
    return nearest(min(max(product, -limit), limit), dtype)


def quantize(x, element="int8", scheme="symmetric", block=None, scale=None, zero_point=None):
    """Quantize and dequantize; non-finite values as with ``nonfinite="ignore"``.

    Parameters
    ----------
    x : numpy.ndarray
        float16, bfloat16, float32 or float64.
    block : tuple
        Length of a block along every axis, None for all of it; by default a single block.
    scale, zero_point : numpy.ndarray
        On the grid of blocks: nothing is calibrated then.
    """
    dtype, shape = x.dtype.name, x.shape
    c = compute_dtype(dtype)
    block = (None,) * x.ndim if block is None else block
    numbers = block_numbers(shape, block)
    symmetric = scheme == "symmetric" and zero_point is None
    qmin, qmax, middle = code_range(element, symmetric)
    values = exactly(x)

    blocks = math.prod(grid(shape, block))
    if scale is None:
        members = [[] for _ in range(blocks)]
        for value, number in zip(values, numbers, strict=True):
            if isinstance(value, Fraction):
                members[number].append(value)
        chosen = [calibrate(m, element, symmetric, dtype) for m in members]
        scales, zeros = [s for s, _ in chosen], [z for _, z in chosen]
    else:
        scales = [nearest(s, c) for s in exactly(scale)]
        zeros = [middle] * blocks if zero_point is None else [int(z) for z in np.asarray(zero_point).ravel()]

    inverses = [nearest(1 / s, c) for s in scales]
    codes = [code_of(v, inverses[n], zeros[n], qmin, qmax, c) for v, n in zip(values, numbers, strict=True)]
    back: dict[tuple[int, int], Fraction] = {}  # a code has the same value wherever it occurs in a block
    for code, n in zip(codes, numbers, strict=True):
        if (code, n) not in back:
            back[code, n] = value_of(code - zeros[n], scales[n], dtype)

    on_grid = grid(shape, block)
    has_zero_point = not symmetric or middle != 0
    return Exact(
        codes=np.asarray(codes, dtype=element).reshape(shape),
        scale=as_array(scales, c, on_grid),
        zero_point=np.asarray(zeros, dtype=np.int32).reshape(on_grid) if has_zero_point else None,
        values=as_array([back[code, n] for code, n in zip(codes, numbers, strict=True)], dtype, shape),
    )


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
