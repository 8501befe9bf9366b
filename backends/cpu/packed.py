"""Codes in fewer bits and back: eight at a time, as the bytes of one 64-bit word.

Owns: the forms of ``packing.pack`` and ``packing.unpack`` for NumPy arrays. Imports: packing, the runtime.

With one code in each byte of a word, three steps push them together: neighbouring bytes inside 16 bits, those pairs
inside 32, those inside 64. The word's lowest ``bits`` bytes then are the stream's. Unpacking goes the other way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from aqt_lite import packing
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu.rows import unpacked
from aqt_lite.backends.cpu.runtime import BLOCK, CHUNKS_PER_CORE, LARGE, aligned_empty, map_ranges

__all__ = ["FORMS", "pack", "packed_rows", "unpack", "unpacked_rows"]

TILE = BLOCK // 4
"""Codes at a time, whole words: the arrays made on the way fit a core's cache."""

WORD = np.dtype("<u8")

_OF_HALF_WORDS: dict[int, Any] = {1: np.dtype("u1"), 2: np.dtype("<u2"), 4: np.dtype("<u4")}
"""The integer that a word's worth of the stream is, where there is one."""


def pack(codes: Array, *, bits: int) -> Any:
    """``packing.pack`` of codes of one byte."""
    if not codes.size or codes.dtype.itemsize != 1:
        return NotImplemented
    if codes.size < LARGE:
        return packed_rows(codes, bits)
    stream = aligned_empty((*codes.shape[:-1], packing.bytes_of(codes.shape[-1], bits)), np.uint8)
    _for_tiles(lambda c, s: _pack(c.view(np.uint8), bits, s), np.ascontiguousarray(codes), stream, bits)
    return stream


def unpack(stream: Array, *, bits: int, length: int, signed: bool) -> Any:
    """``packing.unpack``."""
    if not length or not stream.size or stream.dtype != np.uint8 or bits > 8:
        return NotImplemented
    if stream.size * 8 // bits < LARGE:
        return unpacked_rows(stream, bits, length, signed)
    if (found := unpacked(stream, bits, length, signed)) is not NotImplemented:
        return found
    codes = aligned_empty((*stream.shape[:-1], length), np.int8 if signed else np.uint8)
    _for_tiles(lambda c, s: _unpack(s, bits, signed, c.view(np.uint8)), codes, np.ascontiguousarray(stream), bits)
    return codes


def packed_rows(codes: Array, bits: int) -> Array:
    """Codes as streams along the last axis: of few codes, at once."""
    if bits > 8:
        return packing.pack(codes, bits=bits, b=get_backend("numpy"))
    rows = np.ascontiguousarray(codes).view(np.uint8).reshape(-1, codes.shape[-1])
    stream = np.empty((len(rows), packing.bytes_of(codes.shape[-1], bits)), np.uint8)
    _pack(rows, bits, stream)
    return stream.reshape(*codes.shape[:-1], -1)


def unpacked_rows(stream: Array, bits: int, length: int, signed: bool) -> Array:
    """The inverse."""
    if bits > 8:
        return packing.unpack(stream, bits=bits, length=length, signed=signed, b=get_backend("numpy"))
    rows = np.ascontiguousarray(stream).reshape(-1, stream.shape[-1])
    codes = np.empty((len(rows), length), np.uint8)
    _unpack(rows, bits, signed, codes)
    return codes.reshape(*stream.shape[:-1], length).view(np.int8 if signed else np.uint8)


def _for_tiles(work: Callable[[Array, Array], None], codes: Array, stream: Array, bits: int) -> None:
    """``work(codes, stream)`` on the parts of some rows, each of which begins with a word."""
    length = codes.shape[-1]
    if length % 8 == 0:  # rows join without a gap
        length = codes.size
    codes, stream = codes.reshape(-1, length), stream.reshape(codes.size // length, -1)
    rows = max(1, TILE // length)
    tiles = [(n, k) for n in range(0, len(codes), rows) for k in range(0, length, TILE)]

    def some(start: int, stop: int) -> None:
        for n, k in tiles[start:stop]:
            work(codes[n : n + rows, k : k + TILE], stream[n : n + rows, k * bits // 8 : (k + TILE) * bits // 8])

    map_ranges(some, len(tiles), 1, chunks_per_core=CHUNKS_PER_CORE)


@functools.cache
def _steps(bits: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    """For lanes of 16, 32 and 64 bits: how far the upper half moves down, and the masks of both halves then."""
    found = []
    for lane in (16, 32, 64):
        width, places = bits * lane // 16, range(0, 64, lane)
        low = sum(((1 << width) - 1) << place for place in places)
        found.append((np.uint64(lane // 2 - width), np.uint64(low), np.uint64(low << width)))
    return found


def _pack(codes: Array, bits: int, out: Array) -> None:
    rows, length = codes.shape
    words = -(-length // 8)
    if length % 8:
        whole = np.zeros((rows, words * 8), np.uint8)
        whole[:, :length] = codes
    else:
        whole = codes
    w = whole.view(WORD)
    for shift, low, high in _steps(bits):
        w = (w & low) | ((w >> shift) & high)
    if bits in _OF_HALF_WORDS:
        stream = w.astype(_OF_HALF_WORDS[bits]).view(np.uint8)
    else:
        stream = np.empty((rows, words, bits), np.uint8)
        columns = w.view(np.uint8).reshape(rows, words, 8)
        for j in range(
            bits
        ):  # a byte at a time: NumPy takes longer to start an inner loop of a few bytes than to run it
            stream[:, :, j] = columns[:, :, j]
        stream = stream.reshape(rows, words * bits)
    out[...] = stream[:, : out.shape[1]]


def _unpack(stream: Array, bits: int, signed: bool, out: Array) -> None:
    rows, length = out.shape
    words = -(-length // 8)
    stream = stream[:, : words * bits]
    if stream.shape[1] != words * bits:
        whole = np.zeros((rows, words * bits), np.uint8)
        whole[:, : stream.shape[1]] = stream
        stream = whole
    if bits in _OF_HALF_WORDS:
        w = stream.view(_OF_HALF_WORDS[bits]).astype(WORD)
    else:
        w = np.zeros((rows, words), WORD)
        columns, parts = w.view(np.uint8).reshape(rows, words, 8), stream.reshape(rows, words, bits)
        for j in range(bits):
            columns[:, :, j] = parts[:, :, j]
    for shift, low, high in reversed(_steps(bits)):
        w = (w & low) | ((w & high) << shift)
    codes = w.view(np.uint8)[:, :length]
    if signed:
        half = np.uint8(1 << (bits - 1))
        codes = (codes ^ half) - half
    out[...] = codes


FORMS: dict[Callable[..., Any], Callable[..., Any]] = {packing.pack: pack, packing.unpack: unpack}
"""The forms, each under its operation."""
