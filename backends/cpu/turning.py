"""Loops that turn arrays which lie in the other order than is wanted, and that widen float16.

Owns: those loops, and the numba intrinsics in them. Imports: ``native``, and ``decoding`` for how wide vectors are.
They hold no lock and start no thread.

**Scales and zero points** may lie in the other order than the codes they belong to. Codes of a weight (in, out) are
stored as (out, in), so that a product reads them in order; its scales stay (groups, out), as the weight's shape has
them. Loops that read a row of codes at a time want them (out, groups). Turned by the library, all of them are written
to memory and read again at each call; here it is those of a strip of rows, which stay in cache until they are used.

**Values and codes**: ``boxes`` turns parts of arrays whose groups lie along another axis than memory does. Of float16
they become float32 first, which takes NumPy as long as all that comes after.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from aqt_lite.backends.cpu.decoding import LANES
from aqt_lite.backends.cpu.native import apart

__all__ = ["blocks_of", "pack_across", "turn", "turn_apart", "turn_plane", "widen"]

SQUARE = LANES
"""Rows and columns that are turned in registers at a time: a line of the cache, where vectors are as wide."""


_ADDRESS: Any = ir.IntType(64)  # type: ignore[no-untyped-call]
_PLACES: Any = ir.VectorType(ir.IntType(32), SQUARE)  # type: ignore[no-untyped-call]

DISTANCES = tuple(SQUARE >> i for i in range(1, SQUARE.bit_length()))


def _square(bits: int) -> Any:
    """``out[i, j] = source[j, i]`` for a square of items of so many bits, by addresses, and strides in bytes.

    In steps, of which each exchanges what is off the diagonal of squares half as large as those before.
    """
    item: Any = ir.IntType(bits)  # type: ignore[no-untyped-call]
    vector: Any = ir.VectorType(item, SQUARE)  # type: ignore[no-untyped-call]

    def turned(builder: Any, rows: list[Any], distance: int) -> list[Any]:
        lanes = range(SQUARE)
        upper = [SQUARE + i - distance if i & distance else i for i in lanes]
        lower = [SQUARE + i if i & distance else i + distance for i in lanes]
        made = [*rows]
        for i in (i for i in lanes if not i & distance):
            for to, places in ((i, upper), (i + distance, lower)):
                mask: Any = ir.Constant(_PLACES, places)  # type: ignore[no-untyped-call]
                made[to] = builder.shuffle_vector(rows[i], rows[i + distance], mask)
        return made

    @intrinsic
    def square(_: Any, source: Any, source_stride: Any, out: Any, out_stride: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, source_stride, out, out_stride = arguments

            def place(base: Any, stride: Any, i: int) -> Any:
                return builder.inttoptr(builder.add(base, builder.mul(stride, _ADDRESS(i))), vector.as_pointer())

            rows = [builder.load(place(source, source_stride, i), align=1) for i in range(SQUARE)]
            for distance in DISTANCES:
                rows = turned(builder, rows, distance)
            for i, row in enumerate(rows):
                builder.store(row, place(out, out_stride, i), align=1)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), generate

    return square


def _one(bits: int) -> Any:
    """An item of so many bits from one address to another."""
    item: Any = ir.IntType(bits)  # type: ignore[no-untyped-call]

    @intrinsic
    def one(_: Any, source: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            source, out = (builder.inttoptr(address, item.as_pointer()) for address in arguments)
            builder.store(builder.load(source, align=1), out, align=1)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return one


_square_of_bytes, _square_of_words = _square(8), _square(32)
_one_byte, _one_word = _one(8), _one(32)


@njit(nogil=True, cache=True)
def turn(blocks: Any, start: Any, stop: Any, out: Any) -> None:  # pragma: no cover - compiled
    """``out[n, g] = blocks[g, start + n]``; both lie in the order of C, and have items of 1 byte, or of 4."""
    item, by, to = blocks.itemsize, blocks.strides[0], out.strides[0]
    first, there = blocks.ctypes.data + start * item, out.ctypes.data
    groups, rows = blocks.shape[0], stop - start
    whole_groups, whole_rows = groups - groups % SQUARE, rows - rows % SQUARE
    for g in range(0, whole_groups, SQUARE):
        for n in range(0, whole_rows, SQUARE):
            source, square = first + g * by + n * item, there + n * to + g * item
            if item == 1:
                _square_of_bytes(source, by, square, to)
            else:
                _square_of_words(source, by, square, to)
        for n in range(whole_rows, rows):
            for i in range(g, g + SQUARE):
                out[n, i] = blocks[i, start + n]
    for g in range(whole_groups, groups):
        for n in range(rows):
            out[n, g] = blocks[g, start + n]


turn_apart = apart(
    turn, *(f"void({kind}[:,::1], int64, int64, {kind}[:,::1])" for kind in ("float32", "uint8", "int32"))
)


@njit(nogil=True, cache=True)
def blocks_of(blocks: Any, swapped: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    """Scales or zero points (rows, groups) of the weight's rows ``start`` to ``stop`` - 1.

    ``blocks`` has them, or one row for all, or nothing; ``swapped``: as (groups, rows).
    """
    if not swapped:
        return blocks[start:stop] if blocks.shape[0] > 1 else blocks
    if blocks.shape[1] > 1:
        out = np.empty((stop - start, blocks.shape[0]), dtype=blocks.dtype)
        turn_apart((blocks, start, stop, out))
        return out
    return blocks.reshape((blocks.shape[1], blocks.shape[0]))


@njit(nogil=True, cache=True)
def turn_plane(
    source: Any, by: Any, height: Any, width: Any, out: Any, to: Any, item: Any
) -> None:  # pragma: no cover - compiled
    """``out[j, i] = source[i, j]`` for ``height`` rows of ``width`` items of 1 byte, or of 4, side by side.

    By addresses, and distances of rows in bytes. Squares follow each other along the shorter side: whichever array has
    the longer one as its rows' distance has each line of its memory read or written at once.
    """
    whole_height, whole_width = height - height % SQUARE, width - width % SQUARE
    down, across = whole_height // SQUARE, whole_width // SQUARE
    for square in range(down * across):
        if down <= across:
            i, j = square % down * SQUARE, square // down * SQUARE
        else:
            i, j = square // across * SQUARE, square % across * SQUARE
        if item == 1:
            _square_of_bytes(source + i * by + j, by, out + j * to + i, to)
        else:
            _square_of_words(source + i * by + 4 * j, by, out + j * to + 4 * i, to)
    for i in range(height):
        for j in range(whole_width if i < whole_height else 0, width):
            if item == 1:
                _one_byte(source + i * by + j, out + j * to + i)
            else:
                _one_word(source + i * by + 4 * j, out + j * to + 4 * i)


@njit(nogil=True, cache=True)
def pack_across(codes: Any, bits: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Streams along the middle axis of bytes, each a code of fewer bits: 8 codes are as many bytes as they have bits.

    Whatever comes after lies side by side, so that a vector has codes of as many streams.
    """
    mask = np.uint8((1 << bits) - 1)
    for a in range(out.shape[0]):
        for byte in range(out.shape[1]):
            stream, first = out[a, byte], 8 * byte // bits
            stream[:] = 0
            for i in range(first, min((8 * byte + 7) // bits + 1, codes.shape[1])):
                code, up = codes[a, i], i * bits - 8 * byte
                if up >= 0:
                    for k in range(stream.shape[0]):
                        stream[k] |= (code[k] & mask) << np.uint8(up)
                else:
                    for k in range(stream.shape[0]):
                        stream[k] |= (code[k] & mask) >> np.uint8(-up)


_SIGN, _MAGNITUDE, _INFINITE = np.uint32(0x8000), np.uint32(0x7FFF), np.uint32(0x7C00)
_REBIASED = np.uint32((127 - 15) << 23)
_OF_INFINITE = np.uint32((255 - 31 - (127 - 15)) << 23)


@njit(nogil=True, cache=True)
def widen(halves: Any, out: Any) -> None:  # pragma: no cover - compiled
    """float32 of float16, both by their patterns.

    The exponent moves by the difference of the biases; from infinity on, by what is left to the largest. Below the
    smallest normal number the significand counts units of 2^-24.
    """
    values = out.view(np.float32)
    for i in range(halves.shape[0]):
        half = np.uint32(halves[i])
        magnitude = half & _MAGNITUDE
        word = (magnitude << np.uint32(13)) + _REBIASED
        word += _OF_INFINITE if magnitude >= _INFINITE else np.uint32(0)
        values[i] = np.float32(np.int32(magnitude)) * np.float32(2.0**-24)
        small = out[i]
        word = small if magnitude < np.uint32(0x0400) else word
        out[i] = word | ((half & _SIGN) << np.uint32(16))
