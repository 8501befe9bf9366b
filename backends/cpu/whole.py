"""Loops that make whole numbers of codes, one a byte, in the order in which the codes lie or turned.

Owns: those loops, and the numba intrinsic in them. Imports: ``native``, ``decoding``, for the numbers of codes,
``groups``, for those of 4 bits, and ``turning``. They hold no lock and start no thread. ``rows`` calls them, and JAX's
``whole``.

Exact products sum bytes along rows. Codes that are packed, or look up numbers that are whole multiples of a unit,
become such bytes first, and where a weight lies (in, out) its columns become rows. Both are done to ``HEIGHT`` rows at
a time, between loops that have all of it in a cache: numbers as floats, the same as bytes, and then those in lines.
Codes of 4 bits, of which there are 16, look their bytes up in a vector.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from aqt_lite.backends.cpu.decoding import BYTES, HALVES, LANES, dequantize_apart, width_of
from aqt_lite.backends.cpu.emit import byte_turns, counted_loop, item_at, load, shuffled, store
from aqt_lite.backends.cpu.groups import DOTS, numbers_for_dots
from aqt_lite.backends.cpu.native import apart, task_of
from aqt_lite.backends.cpu.pool import in_parts
from aqt_lite.backends.cpu.turning import turn_plane

__all__ = ["HEIGHT", "in_bytes", "in_bytes_apart", "in_bytes_in_parts"]

HEIGHT = 64
"""Rows that are turned at a time: a line of the cache in every column."""

FLOATS = 1 << 15
"""Numbers that are floats at a time: 128 KB."""

BLOCK = 4 * LANES
"""Bytes of a vector."""

_ADDRESS, _BYTES = ir.IntType(64), ir.VectorType(ir.IntType(8), BLOCK)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_IN_ORDER = [BLOCK * (place // 16 % 2) + place // 32 * 16 + place % 16 for place in range(2 * BLOCK)]
"""Places in two vectors, of which 16 bytes of the one and 16 of the other follow each other."""


@intrinsic
def _look_halves_up(_: Any, codes: Any, vectors: Any, table: Any, out: Any) -> Any:
    """What a table of 16 bytes, four times over, has of codes of 4 bits, of so many vectors: by addresses."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes, vectors, table, out = arguments
        numbers_of = numbers_for_dots(builder, True, True, table, _ADDRESS(0))

        def step(i: Any, none: list[Any]) -> list[Any]:
            words = load(builder, item_at(builder, codes, i, BLOCK), _WORDS)
            found = [builder.bitcast(numbers, _BYTES) for numbers in numbers_of(words)]
            turns = [byte_turns(builder, *found, 1, upper) for upper in (False, True)]
            to = item_at(builder, out, i, 2 * BLOCK)
            for first in (0, BLOCK):
                store(builder, shuffled(builder, *turns, _IN_ORDER[first : first + BLOCK]), to)
                to = builder.add(to, _ADDRESS(BLOCK))
            return none

        counted_loop(builder, vectors, [], step, least=0)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@njit(nogil=True, cache=True)
def _decode_halves(codes: Any, inner: Any, table: Any, per_unit: Any, out: Any) -> None:  # pragma: no cover - compiled
    numbers = np.zeros(BLOCK, dtype=np.uint8)
    for i in range(BLOCK):
        if table[i & 15] == table[i & 15]:
            numbers[i] = np.uint8(np.int32(table[i & 15] * per_unit) & 255)
    for n in range(codes.shape[0]):
        row, bytes_, done = codes[n], out[n], 0
        if DOTS:
            vectors = inner // (2 * BLOCK)
            _look_halves_up(row.ctypes.data, vectors, numbers.ctypes.data, bytes_.ctypes.data)
            done = vectors * 2 * BLOCK
        for k in range(done, inner):
            bytes_[k] = numbers[(row[k >> 1] >> ((k & 1) * 4)) & 15]


@njit(nogil=True, cache=True)
def _narrow(numbers: Any, out: Any) -> None:  # pragma: no cover - compiled
    for n in range(numbers.shape[0]):
        row, bytes_ = numbers[n], out[n]
        for k in range(row.shape[0]):
            bytes_[k] = np.uint8(np.int32(row[k]) & 255)


@njit(nogil=True, cache=True)
def _decode(
    codes: Any, inner: Any, kind: Any, flip: Any, table: Any, per_unit: Any, numbers: Any
) -> None:  # pragma: no cover - compiled
    scale, nothing = np.full((1, 1), per_unit, dtype=np.float32), np.empty(0, dtype=np.float32)
    no_codes, no_zeros = np.empty((0, 0), dtype=np.uint8), np.empty((0, 0), dtype=np.int32)
    size = (inner + 2 * LANES - 1) // (2 * LANES) * (2 * LANES)
    dequantize_apart((codes, inner, kind, flip, table, scale, no_codes, nothing, no_zeros, size, 0, numbers))


@njit(nogil=True, cache=True)
def _of_long_row(
    row: Any, inner: Any, kind: Any, flip: Any, table: Any, per_unit: Any, numbers: Any, out: Any
) -> None:  # pragma: no cover - compiled
    """Numbers of a row of more codes than are floats at a time: parts of it that begin with a byte."""
    bits = 8 if kind == BYTES else 4
    if table.ndim == 2:
        bits = width_of(kind, table[0])
    for first in range(0, inner, FLOATS):
        count = min(FLOATS, inner - first)
        part = row[first * bits // 8 : ((first + count) * bits + 7) // 8]
        some = numbers[:count].reshape(1, count)
        _decode(part.reshape(1, part.shape[0]), count, kind, flip, table, per_unit, some)
        _narrow(some, out[first : first + count].reshape(1, count))


@njit(nogil=True, cache=True)
def in_bytes(
    codes: Any, inner: Any, known: Any, kind: Any, flip: Any, table: Any, per_unit: Any, turned: Any, start: Any,
    stop: Any, out: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """``out[n, k] = number[n, k] * per_unit`` for rows of codes ``start`` to ``stop`` - 1; turned: ``out[k, n]``.

    ``known``: codes are such bytes, and are turned. Else ``kind``, ``flip`` and ``table`` are as
    ``decoding`` has them, of rows with one scale.
    """
    if known:
        for first in range(start, stop, HEIGHT):
            height = min(HEIGHT, stop - first)
            turn_plane(
                codes[first:].ctypes.data, codes.strides[0], height, inner, out.ctypes.data + first, out.strides[0], 1
            )  # fmt: skip
        return
    together = HEIGHT if turned else max(stop - start, 1)
    some = min(max(FLOATS // inner, 1), together)
    numbers = np.empty((min(some, stop - start), min(inner, FLOATS)), dtype=np.float32)
    lines = np.empty((min(HEIGHT, stop - start) if turned else 0, inner), dtype=np.uint8)
    for first in range(start, stop, together):
        last = min(first + together, stop)
        for n in range(first, last, some):
            here = min(n + some, last)
            whole = lines[n - first : here - first] if turned else out[n:here]
            if kind == HALVES:
                _decode_halves(codes[n:here], inner, table.reshape(-1), per_unit, whole)
            elif inner > FLOATS:
                _of_long_row(codes[n], inner, kind, flip, table, per_unit, numbers[0], whole[0])
            else:
                _decode(codes[n:here], inner, kind, flip, table, per_unit, numbers[: here - n])
                _narrow(numbers[: here - n], whole)
        if turned:
            turn_plane(lines.ctypes.data, inner, last - first, inner, out.ctypes.data + first, out.strides[0], 1)


in_bytes_apart = apart(
    in_bytes,
    *(
        f"void(uint8[:,::1], int64, boolean, int64, int64, float32[{table}], float32, boolean, int64, int64, "
        "uint8[:,::1])"
        for table in ("::1", ":,::1")
    ),
)


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    codes, inner, known, kind, flip, table, per_unit, turned, out = given
    in_bytes_apart((codes, inner, known, kind, flip, table, per_unit, turned, start, stop, out))


_task = task_of(_part)


@njit(nogil=True, cache=True)
def in_bytes_in_parts(
    pool: Any, ends: Any, codes: Any, inner: Any, known: Any, kind: Any, flip: Any, table: Any, per_unit: Any,
    turned: Any, out: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``in_bytes`` for rows from each of ``ends`` to the next, on the threads of a pool."""
    given = codes, inner, known, kind, flip, table, per_unit, turned, out
    in_parts(pool, ends, _task(given))
    return True
