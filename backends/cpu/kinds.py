"""What loops are told of the codes of an element type: which kind they are, and a table of their numbers.

Owns: the choice, by the numbers that codes stand for, and the tables. Imports: the constants of ``decoding``, through
the runtime. ``stored`` passes on what is found here; ``tiles``, which has no loops, looks numbers up in such a table.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import runtime
from aqt_lite.elements import ElementType

__all__ = ["Kind", "are_multiples", "kind_of", "numbers_of_codes"]

_LEAST_HALF = 2.0**-24
"""The smallest float of 16 bits: what their patterns count below the smallest with a leading 1."""

_EVERY_BIT, _WITHOUT_SIGN = 0xFFFF, 0x7FFF


class Kind(NamedTuple):
    """What loops are told."""

    kind: int
    """One of ``decoding``'s kinds."""
    flip: int
    """What bytes differ by, bit by bit, from signed numbers."""
    table: Array
    """Numbers of codes, float32; of streams ``decoding.NUMBERS`` of them, and then what moves codes.

    Of codes that meet x in order it has a first axis of length 1.
    """


class _Moves(NamedTuple):
    """How codes become words: places in a table, or floats of 16 bits (``decoding._Moved``)."""

    shift: int
    """To the right, of words whose highest bits are a code; the sign is copied."""
    mask: int
    flip: int = 0
    of_nan: int = _EVERY_BIT
    """Bits in which a word is ``nan`` where its number is NaN, though the float is not."""
    nan: int = 0
    factor: float = 1.0
    low: float = 0.0
    """Numbers are ``factor * float + low``."""


def kind_of(element: ElementType, packed: bool, size: int | None) -> Kind:
    """Of codes that are packed, or lie one a byte, in groups of ``size``; None: one for each row."""
    loops = runtime.decoding_loops()
    in_vectors = size is None or size % (loops.LANES * (2 if packed else 1)) == 0
    if packed and element.bits == 4:
        numbers = numbers_of_codes(element)
        return Kind(loops.HALVES, 0, numbers) if in_vectors else Kind(loops.IN_ORDER, 0, numbers[None])
    if not packed and element.zero_points and in_vectors:
        return Kind(loops.BYTES, 128 if element.storage.startswith("u") else 0, _NO_NUMBERS)
    return _of_stream(element, element.bits if packed else 8)


_NO_NUMBERS = np.empty(0, dtype=np.float32)


@functools.lru_cache(maxsize=64)
def _of_stream(element: ElementType, width: int) -> Kind:
    """Of codes so many bits from one to the next."""
    loops, numbers, bits = runtime.decoding_loops(), numbers_of_codes(element), element.bits
    places = _Moves(16 - bits, (1 << bits) - 1)
    kind, moves = next(_moves_to_floats(numbers, bits, _known(element)), (loops.LOOKED_UP, places))
    every = np.resize(numbers, loops.NUMBERS)
    return Kind(kind, 0, np.concatenate([every, np.asarray([width, bits, *moves], np.float32)])[None])


@functools.lru_cache(maxsize=64)
def numbers_of_codes(element: ElementType) -> Array:
    """Numbers of codes by their bits; NaN for those that stand for none."""
    codes, known = _codes(element), _known(element)
    numbers = np.asarray(element.decode(np.where(known, codes, codes[:1]), get_backend("numpy")), dtype=np.float32)
    return np.where(known, numbers, np.float32(np.nan))


@functools.lru_cache(maxsize=64)
def are_multiples(element: ElementType) -> bool:
    """Whether codes are what their numbers are in multiples of the element's unit."""
    if element.unit is None or element.bits > 8:
        return False
    known = _known(element)
    return bool((numbers_of_codes(element)[known] == _codes(element)[known] * np.float32(element.unit)).all())


def _codes(element: ElementType) -> Array:
    """Every pattern of an element's bits, as a code; the first one is a code of them all."""
    bits = np.arange(1 << element.bits, dtype=np.uint8)
    if element.storage.startswith("u"):
        return bits
    sign = 1 << (element.bits - 1)
    return ((bits ^ np.uint8(sign)).astype(np.int16) - sign).astype(np.int8)


def _known(element: ElementType) -> Array:
    codes, (least, most) = _codes(element), element.codes
    return (codes >= least) & (codes <= most)


def _moves_to_floats(numbers: Array, bits: int, known: Array) -> Iterator[tuple[int, _Moves]]:
    """Ways to move codes so that they are the numbers that are ``known``, as integers or as floats; the best first."""
    loops = runtime.decoding_loops()
    patterns, sign = np.arange(1 << bits), 1 << (bits - 1)
    for flip in (0, sign):  # two's complement with its highest bit turned over counts from the lowest number on
        places = (patterns ^ flip)[known]
        a, b = np.argmin(places), np.argmax(places)
        first, last = (float(numbers[known][i]) for i in (a, b))
        step = (last - first) / float(places[b] - places[a])
        low = first - step * float(places[a])
        factor = np.float32(step / _LEAST_HALF)
        exact = _same(places * step + low, numbers[known]).all() and np.float32(low) == low
        if exact and _is_near_one(np.float32(step)):
            integers = _Moves(16 - bits, (1 << bits) - 1, flip, nan=_EVERY_BIT, factor=float(factor), low=low)
            yield loops.INTEGERS, integers
    aligned = (patterns << (16 - bits)).astype(np.uint16).view(np.int16)
    for kind, of_float in ((loops.MOVED, 5), (loops.MOVED_WIDE, 8)):
        for signed, exponent in itertools.product((True, False), range(1, of_float + 1)):
            shift = of_float - exponent + (not signed)
            mask = (0x8000 if signed else 0) | _WITHOUT_SIGN >> (of_float - exponent)
            mask &= -1 << max(16 - bits - shift, 0)  # below are bits of the next code
            words = ((aligned >> shift) & np.uint16(mask).view(np.int16)).view(np.uint16)
            floats = words.view(np.float16).astype(np.float32) if of_float == 5 else _of_upper_halves(words)
            found = _moves_of_floats(numbers, words, floats, known, shift, mask)
            if found is not None and (kind == loops.MOVED_WIDE or _is_near_one(np.float32(found.factor * 2.0**-14))):
                yield kind, found


def _is_near_one(factor: Array) -> bool:
    """Whether a number is a power of two that may be multiplied with any scale that loops serve."""
    return bool(np.frexp(factor)[0] == 0.5 and 2.0**-14 <= factor <= 1)


def _same(a: Array, b: Array) -> Array:
    """Whether numbers are the same, and zeros of one sign."""
    return (a == b) & (np.signbit(a) == np.signbit(b))


def _of_upper_halves(words: Array) -> Array:
    return (words.astype(np.uint32) << 16).view(np.float32)


@np.errstate(all="ignore")
def _moves_of_floats(numbers: Array, words: Array, floats: Array, known: Array, shift: int, mask: int) -> _Moves | None:
    """The same of words that are ``floats``, but for a factor and for one that is NaN."""
    normal = known & np.isfinite(numbers) & np.isfinite(floats) & (floats != 0)
    if not normal.any():
        return None
    factor = np.float32(numbers[normal][0] / floats[normal][0])
    if not (np.isfinite(factor) and np.frexp(factor)[0] == 0.5):
        return None
    found = floats * factor
    wrong = known & ~_same(found, numbers) & ~(np.isnan(found) & np.isnan(numbers))
    if not np.isnan(numbers[wrong]).all():
        return None
    of_nan, nan = _EVERY_BIT, next(word for word in range(1 << 16) if word not in set(words.tolist()))
    if wrong.any():
        nan = int(words[wrong][0])
        of_nan = _EVERY_BIT if wrong.sum() == 1 else _WITHOUT_SIGN
        nan &= of_nan
        if not (((words & of_nan) == nan) == wrong).all():
            return None
    return _Moves(shift, mask, 0, of_nan, nan, float(factor))
