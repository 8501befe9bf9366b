"""Element types as NumPy arrays want them: the same codes and numbers in fewer passes, by bit patterns and tables.

Owns: a twin for each kind of element type that has something to gain, and ``with_twins``. Imports: elements, formats.

What a twin has no shorter way for (roundings that are rare, float64), it leaves to the element type itself.
"""

from __future__ import annotations

import functools
from dataclasses import fields, replace
from typing import Any

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.affine import Spec
from aqt_lite.elements import Codebook, ElementType, Float, Rounding
from aqt_lite.formats import Format

__all__ = ["with_twins"]

INFINITY = np.int32(0x7F800000)

MOST_CUTS = 15
"""Cuts of a codebook that are compared with one after the other; a search is faster where there are more."""


class _Float(Float):
    def encode(
        self, v: Array, zero: Array | None, symmetric: bool, rounding: Rounding, noise: Array | None, b: Backend
    ) -> tuple[Array, Array]:
        """Half to even on bit patterns: a carry out of the mantissa moves into the exponent, as it should.

        Below the smallest number with a leading 1, the sum with a power of two whose units are this type's smallest
        number rounds in the same way. With no mantissa at all, ties go up instead, which these steps do not do.
        """
        m, lowest = self.mantissa, self.lowest
        if rounding != "half_even" or v.dtype != np.float32 or not v.ndim or m < 1 or lowest < -100:
            return super().encode(v, zero, symmetric, rounding, noise, b)
        bits, drop = v.view(np.int32), 23 - m
        u = bits & np.int32(0x7FFFFFFF)
        number = u <= INFINITY
        if not self.signed:
            number &= (bits >= 0) | (u == 0)
        np.multiply(u, number, out=u)
        inside = u <= _bits(self.max)
        np.minimum(u, _bits(self.max), out=u)
        code = (u >> drop) & np.int32(1)
        code += u
        code += np.int32((1 << (drop - 1)) - 1)
        code >>= drop
        code -= np.int32((lowest + 127 - self.subnormal) << m)
        if self.subnormal:
            magic = np.float32(2.0 ** (lowest + drop))
            small = (u.view(np.float32) + magic).view(np.int32)
            small -= _bits(magic)
            np.copyto(code, small, where=u < _bits(2.0**lowest))
        else:
            np.maximum(code, np.int32(0), out=code)
        if self.signed:
            sign = bits >> 31
            sign &= np.int32(1 << (self.bits - 1))
            np.multiply(sign, number if self.negative_zero else code > 0, out=sign)
            code |= sign
        inside &= number
        return code.astype(self.storage), inside

    def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
        by_table = self.bits <= 8 and compute == "float32"
        return _looked_up(self, codes) if by_table else super().decode(codes, b, compute)


class _Codebook(Codebook):
    def encode(
        self, v: Array, zero: Array | None, symmetric: bool, rounding: Rounding, noise: Array | None, b: Backend
    ) -> tuple[Array, Array]:
        """The position of a number is how many cuts lie below it."""
        if rounding == "stochastic" or not v.ndim or len(self._order) > MOST_CUTS + 1:
            return super().encode(v, zero, symmetric, rounding, noise, b)
        position, above = np.zeros(v.shape, np.uint8), np.empty(v.shape, np.bool_)
        for cut in self.cuts(v.dtype.name, rounding):
            np.greater(v, v.dtype.type(cut), out=above)
            position += above.view(np.uint8)
        numbers = np.asarray([self.numbers[c] for c in self._order])
        np.copyto(position, np.uint8(np.argmin(np.abs(numbers))), where=np.isnan(v))
        if self._order != tuple(range(len(self._order))):
            position = np.take(np.asarray(self._order, np.uint8), position)
        return position, (v >= self.min) & (v <= self.max)

    def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
        return _looked_up(self, codes) if compute == "float32" else super().decode(codes, b, compute)


def _bits(x: Any) -> np.int32:
    found: np.int32 = np.float32(x).view(np.int32)
    return found


@functools.cache
def _table(element: Float | Codebook) -> Array:
    """The numbers of all codes of a byte; of a codebook: of those that it has."""
    codes = np.arange(element.codes[1] + 1).astype(element.storage)
    kind = Float if isinstance(element, Float) else Codebook
    with np.errstate(all="ignore"):
        found: Array = kind.decode(element, codes, get_backend("numpy"))  # type: ignore[arg-type]
    found.flags.writeable = False
    return found


@functools.cache
def _table_of_pairs(element: Float | Codebook) -> Array:
    """Two numbers as one item of 64 bits, for each two codes as one integer of 16."""
    table = _table(element)
    pair, rest = np.divmod(np.arange((len(table) - 1) * 257 + 1), 256)
    last = len(table) - 1  # entries beyond the last pair of codes only pad the table
    found = np.stack([table[np.minimum(rest, last)], table[np.minimum(pair, last)]], axis=1).view(np.uint64)[:, 0]
    found.flags.writeable = False
    return found


def _looked_up(element: Float | Codebook, codes: Array) -> Array:
    if codes.flags.c_contiguous and codes.ndim and codes.shape[-1] % 2 == 0:
        pairs = np.take(_table_of_pairs(element), codes.view("<u2"))
        return pairs.view(np.float32)
    return np.take(_table(element), codes)


@functools.cache
def _twin(element: ElementType) -> ElementType:
    for kind, twin in ((Float, _Float), (Codebook, _Codebook)):
        if type(element) is kind:
            return twin(**{f.name: getattr(element, f.name) for f in fields(element) if f.init})
    return element


def _with_twin(form: Format) -> Format:
    return replace(form, element=_twin(form.element), scale=None if form.scale is None else _with_twin(form.scale))


@functools.cache
def with_twins(spec: Spec) -> Spec:
    """``spec`` with twins for its element type and that of its scales: what codes mean is the same."""
    return replace(spec, format=_with_twin(spec.format))
