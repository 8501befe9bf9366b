"""Noise for stochastic rounding: the same whole numbers on every backend, from a key and a position.

Owns: ``noise``. Imports: the ``Backend`` interface.

The generator is the block cipher Speck32/64 in counter mode (Beaulieu et al. 2013, ePrint 2013/404): the position of an
element in the array is enciphered with the key. Its words have 16 bits, so 32-bit integers hold every step without
overflow, about which libraries differ.
"""

from __future__ import annotations

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend

__all__ = ["MOST_ELEMENTS", "ROUNDS", "encipher", "key_words", "noise"]

ROUNDS = 22
WORD = 0xFFFF
MOST_ELEMENTS = 1 << 31
"""Positions that a 32-bit integer can number."""


def key_words(key: int) -> list[int]:
    """The four words of a key of 64 bits, lowest first."""
    return [key >> (16 * i) & WORD for i in range(4)]


def noise(shape: tuple[int, ...], key: Array, first: int, b: Backend) -> Array:
    """int32, uniform in [0, 2^16): for each position of an array, counted in the order of C from ``first``.

    ``key`` holds four words of 16 bits as int32.
    """
    xp, size = b.xp, 1
    for n in shape:
        size *= n
    position = b.arange(first, first + size, like=key)
    high, _ = encipher(position >> 16 & WORD, position & WORD, [key[i, ...] for i in range(4)], b)
    return xp.reshape(high, shape)


def encipher(x: Array, y: Array, key: list[Array], b: Backend) -> tuple[Array, Array]:
    """One block of two words under a key of four (lowest first)."""
    k, rest = key[0], key[1:]
    for i in range(ROUNDS):
        x = (_right(x, 7) + y & WORD) ^ k
        y = _left(y, 2) ^ x
        mixed = (k + _right(rest[0], 7) & WORD) ^ i
        k, rest = _left(k, 2) ^ mixed, [*rest[1:], mixed]
        x, y, k = map(b.computed_once, (x, y, k))  # each is mentioned several times: 2^ROUNDS times in all
    return x, y


def _right(word: Array, bits: int) -> Array:
    return (word >> bits | word << (16 - bits)) & WORD


def _left(word: Array, bits: int) -> Array:
    return _right(word, 16 - bits)
