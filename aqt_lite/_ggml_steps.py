"""Steps that ggml's encoders have in common, with the same bits on every backend.

Owns: ``Coded``, what an encoder makes; quotients, and how a scale becomes float16. Imports: formats, the protocol.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite.formats import SCALE_FORMATS

__all__ = [
    "HALF",
    "Coded",
    "as_integers",
    "bounded",
    "first",
    "in_float16",
    "inverse",
    "quotient",
    "square_root",
    "through_float16",
]

HALF = SCALE_FORMATS["float16"].element
_LEAST = 2.0**-125
_LARGEST = 2.0**126
_TOO_LARGE = 65520.0
"""The least number that float16 rounds to infinity."""


class Coded(NamedTuple):
    """What an encoder makes of (..., blocks, elements): codes, and those of scales and offsets, (..., blocks, 1)."""

    codes: Array
    scale: Array
    offset: Array | None = None
    scales: Array | None = None
    """Codes of the scales of the parts of blocks, (..., blocks, parts), where there are some: ``scale`` is theirs."""
    offsets: Array | None = None
    """The same of offsets."""


def first(these: Array, b: Backend) -> Array:
    """The first of ``these`` in each block."""
    xp, length = b.xp, int(these.shape[-1])
    index = xp.broadcast_to(b.arange(0, length, like=these), tuple(these.shape))
    at = xp.where(these, index, xp.full_like(index, length))
    return index == xp.min(at, axis=-1, keepdims=True)


def bounded(product: Array, xp: Any) -> Array:
    """A product that something is added to: the clip, far outside, keeps a compiler from fusing the two."""
    return xp.clip(product, -1024.0, 1024.0)


def inverse(d: Array, b: Backend) -> Array:
    """``1/d``, 0 for 0."""
    xp = b.xp
    size = xp.abs(d)
    there = size >= _LEAST
    found = b.reciprocal(xp.clip(size, _LEAST, _LARGEST))
    found = xp.where(there, found, xp.zeros_like(found))
    return xp.where(d < 0, -found, found)


def quotient(x: Array, by: Array, b: Backend) -> Array:
    """``x / by``; ``x`` itself where that is not finite, or ``by`` not positive and finite."""
    xp = b.xp
    known = xp.isfinite(x) & xp.isfinite(by) & (by > 0)
    found = b.quotient(xp.where(known, x, xp.zeros_like(x)), xp.where(known, by, xp.ones_like(by)))
    return xp.where(known, found, x)


def square_root(x: Array, b: Backend) -> Array:
    """Of float32 from 0 on, rounded to nearest, from an approximation that may be two units in the last place off.

    torch's on a CPU is off by one for every seventh number. With ``x = f * 4^n``, f in [1, 4), and the integers
    ``V = f * 2^46`` and ``C = c * 2^23`` for a guess c, the residual ``R = V - C^2`` tells whether the root lies beyond
    ``C + 1/2``: then ``R > C``. R is small, and so exact in integers modulo 2^32. No root lies halfway.
    """
    xp = b.xp
    positive = x > 0
    f, e = b.fraction_and_exponent(xp.where(positive, x, xp.ones_like(x)))
    f = f * xp.astype(1 + (e & 1), x.dtype)
    guess = xp.astype(xp.round(xp.sqrt(f) * 2.0**23), xp.int32)
    residual = xp.astype(f * 2.0**23, xp.int32) * (1 << 23) - guess * guess

    def count(condition: Array) -> Array:
        return xp.astype(condition, xp.int32)

    more = count(residual > guess) + count(residual > 3 * guess + 2)
    less = count(residual <= -guess) + count(residual <= 2 - 3 * guess)
    root = xp.astype(guess + more - less, x.dtype) * 2.0**-23 * b.power_of_two(e >> 1)
    return xp.where(positive, root, xp.zeros_like(x))


def in_float16(d: Array, b: Backend) -> Array:
    """Bit patterns of float16, halves to even; NaN for what it has no number for."""
    xp = b.xp
    codes = HALF.encode(d, None, True, "half_even", None, b)[0]
    return xp.where(xp.abs(d) < _TOO_LARGE, codes, xp.full_like(codes, HALF.nan))


def as_integers(codes: Array, dtype: str, b: Backend) -> Array:
    """Whole numbers as integers; what is NaN, in a block that is refused, as 0."""
    xp = b.xp
    return xp.astype(xp.where(xp.isnan(codes), xp.zeros_like(codes), codes), b.dtype(dtype))


def through_float16(codes: Array, b: Backend) -> Array:
    """The float32 numbers of what ``in_float16`` gave."""
    return HALF.decode(codes, b)
