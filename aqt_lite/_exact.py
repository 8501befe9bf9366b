"""Arithmetic that is exact on hardware whose division is not.

Owns: the correctly rounded reciprocal and quotient, and what a fused multiply-add rounds to. Imports: nothing of this
package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aqt_lite._namespace import Array

__all__ = ["quotient", "reciprocal", "rounded_fused"]


def reciprocal(
    x: Array,
    *,
    xp: Any,
    bitcast: Callable[[Array, Any], Array],
    integer: Any,
    bits: Any,
    divide: Callable[[Array], Array] = lambda m: 1.0 / m,
) -> Array:
    """``1/x`` rounded to nearest, from an approximation that may be two units in the last place off.

    Compilers for accelerators replace division by something faster: XLA's GPU division and Triton's are up to 2 ulp
    off (openxla/xla#37181), and a code at a near tie then differs from the CPU's. So ``divide`` is only a guess here,
    and integers, which every device gets right, decide.

    Write ``x = m * 2^e`` with ``m`` in [1, 2) and p mantissa bits (24 for float32). With the integers
    ``M = m * 2^(p-1)`` and ``C = c * 2^p`` for a guess ``c`` of ``1/m``, the wanted mantissa is the integer nearest to
    ``2^(2p-1) / M``. The residual ``R = 2^(2p-1) - M*C`` tells how far the guess is off: the nearest integer is
    ``C + k`` where ``k`` counts how many half-odd multiples of ``M`` lie below ``R``. No tie exists, because
    ``2^(2p) / M`` is an odd integer for no M. ``|R| < 2^(p+3)`` fits an integer as wide as the float, although ``M*C``
    does not: modular arithmetic gives R exactly, because ``2^(2p-1)`` is 0 modulo ``2^w`` for both float widths.

    Parameters
    ----------
    x : array
        float32 or float64, in [2^-125, 2^126] (float64: [2^-1021, 2^1022]); NaN gives NaN.
    integer : dtype
        Signed integer for the residual: as wide as ``x`` if its overflow wraps by definition, else wider.
    bits : dtype
        Signed integer of the width of ``x``.
    divide : callable
        The guess of ``1/m`` for ``m`` in [1, 2).
    """
    width = xp.finfo(x.dtype).bits
    p, exponent_bias = (24, 127) if width == 32 else (53, 1023)
    fraction = p - 1

    pattern = bitcast(x, bits)
    mantissa = (pattern & ((1 << fraction) - 1)) | (1 << fraction)  # M, in [2^(p-1), 2^p)
    exponent = pattern >> fraction  # biased; x is positive, so there is no sign bit to mask
    m = bitcast((pattern & ((1 << fraction) - 1)) | (exponent_bias << fraction), x.dtype)

    guess = xp.minimum(divide(m), xp.ones_like(m))  # above 1 a unit in the last place is twice as large
    guess = xp.astype(guess * float(1 << p), integer)  # C
    big_m = xp.astype(mantissa, integer)
    total = 1 << (2 * p - 1)
    modulus_is_exact = xp.iinfo(integer).bits <= 2 * p - 1
    residual = (0 if modulus_is_exact else total) - big_m * guess
    twice = 2 * residual

    def count(condition: Array) -> Array:
        return xp.astype(condition, integer)

    k = count(twice > big_m) + count(twice > 3 * big_m) - count(twice < -big_m) - count(twice < -3 * big_m)
    mantissa_of_inverse = xp.astype(guess + k, x.dtype) * (0.5**p)  # at most 2^p: exact
    power = bitcast((2 * exponent_bias - exponent) << fraction, x.dtype)  # 2^-e, a normal number
    return xp.where(xp.isnan(x), x, mantissa_of_inverse * power)


def quotient(
    x: Array,
    y: Array,
    *,
    xp: Any,
    bitcast: Callable[[Array, Any], Array],
    integer: Any,
    bits: Any,
) -> Array:
    """``x/y`` rounded to nearest, from an approximation that may be two units in the last place off.

    The same as ``reciprocal``, for any dividend: with ``x = mx * 2^i``, ``y = my * 2^j`` and the integers
    ``Mx = mx * 2^(p-1)``, ``My = my * 2^(p-1)``, the wanted mantissa is the integer nearest to ``Mx * 2^k / My``, where
    k is p - 1, or p where ``mx < my``, so that it has p bits. The residual ``R = Mx * 2^k - My * C`` of a guess C is
    small, and so exact in modular arithmetic. No tie exists: a quotient of two numbers of p bits never lies halfway
    between two such numbers. What follows is products with powers of two, which nothing can be fused to wrongly.

    Parameters
    ----------
    x : array
        float32 or float64. What is subnormal counts as 0. NaN and infinities give what IEEE division gives.
    y : array
        Of the same shape and dtype: positive and normal, or NaN, which gives NaN.
    integer, bits : dtype
        As in ``reciprocal``.
    """
    width = xp.finfo(x.dtype).bits
    p, bias, most = (24, 127, 250) if width == 32 else (53, 1023, 2040)
    fraction = p - 1

    def taken_apart(v: Array) -> tuple[Array, Array, Array]:
        pattern = bitcast(v, bits)
        low = pattern & ((1 << fraction) - 1)
        whole = xp.astype(low | (1 << fraction), integer)
        return whole, bitcast(low | (bias << fraction), v.dtype), (pattern >> fraction) & (2 * bias + 1)

    big_x, m_x, i = taken_apart(x)
    big_y, m_y, j = taken_apart(y)
    less = big_x < big_y
    guess = xp.minimum(m_x / m_y, xp.where(less, xp.ones_like(m_x), xp.full_like(m_x, 2.0)))
    shift = xp.where(less, xp.full_like(big_x, 1 << p), xp.full_like(big_x, 1 << (p - 1)))
    guess = xp.astype(guess * xp.astype(shift, x.dtype), integer)  # may be cut off by less than 1
    residual = big_x * shift - big_y * guess  # modulo 2^width; itself below 2^(p+2)
    twice = 2 * residual

    def count(condition: Array) -> Array:
        return xp.astype(condition, integer)

    k = sum(count(twice > n * big_y) - count(twice < -n * big_y) for n in (1, 3, 5))
    mantissa = xp.astype(guess + k, x.dtype)  # at most 2^p: exact
    exponent = xp.clip(i - j - xp.astype(xp.where(less, p, p - 1), i.dtype), -most, most)
    half = exponent >> 1  # in two steps: beyond the range of exponents lies 0, or infinity
    for e in (half, exponent - half):
        mantissa = mantissa * bitcast((e + bias) << fraction, x.dtype)
    size = xp.where(i == 0, xp.zeros_like(mantissa), mantissa)
    size = xp.where(xp.isfinite(x), size, xp.abs(x))
    return xp.where(xp.isnan(y), y, xp.where(bitcast(x, bits) < 0, -size, size))  # of -0, too


def rounded_fused(
    x: Array, y: Array, z: Array, *, xp: Any, bits_of: Callable[[Array], Array], floats_of: Callable[[Array], Array]
) -> Array:
    """``round(x * y + z)`` of float32, the sum rounded once as a fused multiply-add does, and then half to even.

    Product and sum rounded one after the other tell all apart but sums next to a tie, half an odd number. There the
    distance of ``x * y`` from ``tie - z`` decides, which is exact: 24 bits are cut into twice 12, so that no product is
    rounded (and none can be fused wrongly), and ``x_high * y_high - (tie - z)`` and what follows cancel without a rest.
    A sum within half a unit in the last place of the tie is rounded to it, and that to the even neighbour.

    Parameters
    ----------
    x, y, z : array
        float32 of one shape; ``y`` positive and normal, ``z`` whole numbers below 2^16. Where ``x * y`` is beyond 2^20,
        or NaN, so is the result, about.
    bits_of, floats_of : callable
        Bit patterns of float32 as int32, and back.
    """
    large, small = y > 2.0**32, y < 2.0**-32  # brought near 1, so that halves of numbers are normal
    factor = xp.where(large, xp.full_like(y, 2.0**-64), xp.where(small, xp.full_like(y, 2.0**64), xp.ones_like(y)))
    inverse = xp.where(large, xp.full_like(y, 2.0**64), xp.where(small, xp.full_like(y, 2.0**-64), xp.ones_like(y)))
    x, y = x * inverse, y * factor
    product = xp.clip(x * y, -_FAR, _FAR)  # the clip keeps the product from being fused with the addition
    near = xp.abs(product) < _FAR
    x = xp.where(near, x, xp.zeros_like(x))
    below = xp.floor(product + z)
    tie = below + 0.5
    x_high, y_high = (floats_of(bits_of(v) & -4096) for v in (x, y))
    x_low, y_low = x - x_high, y - y_high
    distance = ((x_high * y_high - (tie - z)) + x_high * y_low) + x_low * y_high  # but for x_low * y_low
    half = floats_of(bits_of(tie) & 0x7F800000) * 2.0**-24  # of a unit in the last place of the tie
    closer = half * 0.5  # on the side of zero of a power of two
    up = xp.where(tie == -0.5, closer, half)
    down = xp.where(tie == 0.5, closer, half)
    rest = x_low * y_low
    above, under = (distance - up) + rest > 0, (distance + down) + rest < 0
    even = below - 2 * xp.floor(below * 0.5) == 0
    goes_up = above | ~(under | even)
    found = below + xp.where(goes_up, xp.ones_like(below), xp.zeros_like(below))
    return xp.where(near, found, product + z)


_FAR = 2.0**20
