"""Exact products with weights of a byte a code that lie (in, out), by dot products of bytes, as they lie.

Owns: those loops, and the numba intrinsics in them. Imports: ``dots``, for what fixed point makes of rows of x and what
becomes of its sums, ``decoding`` for loops of an intrinsic, and ``pool``. They hold no lock and start no thread.
``fixed_point`` calls them, and JAX's ``across``.

A dot product adds four products in each lane. Lanes are columns here: the bytes of four rows of the weight are
exchanged until those of a column lie side by side, a *word*, which happens within 16 bytes (``_join`` says
which column a lane then is). Words of some rows and columns stay in a cache, until each row of x has met them::

    sum[m, d, lane]  +=  the four bytes of word[k, lane]  .  the four digits d of x[m, 4k : 4k + 4]

Codes are the unsigned operand, 128 more than int8 is. An integer of fixed point is four signed digits, ``X = sum 256^d
X_d``: but for the highest, the bytes of ``X + 0x808080``, less 128. A digit's sum over at most 2^16 codes is within
``2^16 * 255 * 128``, which int32 holds; so all sums are exact in any order, and the total an exact int64.

Parts of K have sums of their own, so that every thread reads rows of codes that lie one after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from aqt_lite.backends.cpu.dots import (
    DIGITS,
    INSTRUCTIONS,
    NOT_FINITE,
    SECOND_PASS,
    from_fixed_point,
    to_finer,
    to_fixed_point,
)
from aqt_lite.backends.cpu.emit import byte_turns, counted_loop, in_all_lanes, load, read_ahead
from aqt_lite.backends.cpu.lines import on_lines
from aqt_lite.backends.cpu.native import apart, check_c_order, task_of
from aqt_lite.backends.cpu.pool import in_parts

__all__ = [
    "SERVES",
    "add_across_apart",
    "finish_apart",
    "finish_in_parts",
    "multiply_in_parts",
    "prepare",
    "prepare_apart",
    "refine",
    "refine_apart",
    "words_of",
]

SERVES = INSTRUCTIONS.bits == 8 and not INSTRUCTIONS.signed_planes
"""Whether the processor's dot product is of unsigned with signed bytes."""

LANES = INSTRUCTIONS.lanes

QUARTER = 4
"""Words within which bytes of a vector are exchanged: 16 bytes."""

TILE = 4 * LANES
"""Columns whose words are made at a time: a vector of each of four rows, which becomes four vectors of words."""

WORDS = 1 << 13
"""How many a cache holds: 32 KB."""

DEPTH, DEPTH_OF_FEW = 64, 16
"""Rows of the weight whose words are made before rows of x meet them. Of one and two rows of x sums are soon back in
memory, and stretches of ``WORDS`` are the longer; more rows keep theirs in registers for longer."""

FEW = 2

STRIP = 256
"""Columns whose results are finished at a time: whole tiles."""

ROWS = 3
"""Rows of x in a tile, at most: their sums, of some vectors and four digits, fit the registers."""

_WIDE = LANES == 16
_BYTE, _INT, _ADDRESS = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_BYTES: Any = ir.VectorType(_BYTE, 4 * LANES)
_WORDS: Any = INSTRUCTIONS.vector


@intrinsic
def _make_words(_: Any, w: Any, stride: Any, tiles: Any, flip: Any, ahead: Any, ahead_stride: Any, out: Any) -> Any:
    """Words of four rows from ``w`` on, ``tiles`` times TILE columns of them, one at least: addresses and strides.

    Bits of codes are turned over by those of the byte ``flip``. What is read next, four lines for each TILE columns
    from ``ahead`` on, is fetched meanwhile.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        w, stride, tiles, flip, ahead, ahead_stride, out = arguments
        flips = in_all_lanes(builder, builder.trunc(flip, _BYTE), _BYTES)

        def step(i: Any, totals: list[Any]) -> list[Any]:
            at, rows = builder.mul(i, _ADDRESS(TILE)), []
            for r in range(4):
                there = builder.add(builder.add(ahead, builder.mul(ahead_stride, _ADDRESS(r))), at)
                read_ahead(builder, there)
                here = builder.add(builder.add(w, builder.mul(stride, _ADDRESS(r))), at)
                rows.append(builder.xor(load(builder, here, _BYTES), flips))
            pairs = [[byte_turns(builder, rows[r], rows[r + 1], 1, upper) for r in (0, 2)] for upper in (False, True)]
            words = [byte_turns(builder, *pair, 2, upper) for pair in pairs for upper in (False, True)]
            to = builder.add(out, builder.mul(at, _ADDRESS(4)))
            for v, word in enumerate(words):
                place = builder.inttoptr(builder.add(to, _ADDRESS(TILE * v)), _BYTES.as_pointer())
                builder.store(word, place, align=64)
            return totals

        counted_loop(builder, tiles, [], step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 7), generate


def _across(rows: int, vectors: int) -> Any:
    """An intrinsic: what ``steps`` words of each lane of some vectors add to the sums of ``rows`` rows of x.

    Arguments are the address of the words and the distance of one step's and the next's, the address of the digits
    (four words, one a digit, for each step) and the distance of those of one row of x and the next, the steps (one at
    least), the address of the sums, and the distances of those of one digit and the next, and of one row and the next.
    """

    @intrinsic
    def tile(
        _: Any, words: Any, stride: Any, digits: Any, to_row: Any, steps: Any, out: Any, to_digit: Any, out_row: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            words, stride, digits, to_row, steps, out, to_digit, out_row = arguments

            def place(base: Any, offset: Any, kind: Any) -> Any:
                return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

            of_rows = [builder.add(digits, builder.mul(to_row, _ADDRESS(m))) for m in range(rows)]

            def step(k: Any, sums: list[Any]) -> list[Any]:
                at = builder.add(words, builder.mul(k, stride))
                codes = [builder.load(place(at, _ADDRESS(4 * LANES * v), _WORDS), align=64) for v in range(vectors)]
                new = list[Any]()
                for m in range(rows):
                    four = builder.add(of_rows[m], builder.mul(k, _ADDRESS(4 * DIGITS)))
                    for d in range(DIGITS):
                        word = builder.load(place(four, _ADDRESS(4 * d), _INT), align=4)
                        digit = in_all_lanes(builder, word, _WORDS)
                        for code in codes:
                            new.append(INSTRUCTIONS.dot(builder, sums[len(new)], code, digit))
                return new

            sums = counted_loop(builder, steps, [_WORDS([0] * LANES)] * (rows * DIGITS * vectors), step)
            places = [
                place(
                    builder.add(out, builder.mul(out_row, _ADDRESS(m))),
                    builder.add(builder.mul(to_digit, _ADDRESS(d)), _ADDRESS(4 * LANES * v)),
                    _WORDS,
                )
                for m in range(rows)
                for d in range(DIGITS)
                for v in range(vectors)
            ]
            for total, p in zip(sums, places, strict=True):
                builder.store(builder.add(builder.load(p, align=4), total), p, align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return tile


# as many sums as hide how long a dot product takes, and leave registers for words and a digit
_OF_ONE, _OF_MORE = (4, 2) if _WIDE else (2, 1)
_tile_1, _tile_2, _tile_3 = _across(1, _OF_ONE), _across(2, _OF_MORE), _across(3, _OF_MORE)


@njit(nogil=True, cache=True)
def words_of(columns: Any) -> Any:
    """Columns, and what fills the last tile."""
    return (columns + TILE - 1) // TILE * TILE  # pragma: no cover - compiled


@njit(nogil=True, cache=True)
def _put_digits(integers: Any, digits: Any) -> None:  # pragma: no cover - compiled
    """``digits[k, d]``: the digits d of four integers, bytes of a word; 0 beyond the last."""
    for k in range(digits.shape[0]):
        four = digits[k]
        four[:] = 0
        for i in range(min(4, integers.shape[0] - 4 * k)):
            bits = (np.uint32(integers[4 * k + i]) + np.uint32(0x808080)) ^ np.uint32(0x808080)
            for d in range(DIGITS):
                four[d] |= ((bits >> np.uint32(8 * d)) & np.uint32(255)) << np.uint32(8 * i)


@njit(nogil=True, cache=True)
def prepare(
    x: Any, powers: Any, exponent: Any, total: Any, flags: Any, digits: Any
) -> None:  # pragma: no cover - compiled
    """Rows of x in fixed point: their exponents, sums and flags, as ``dots`` has them, and digits (rows, K / 4, 4)."""
    integers = np.empty((1, x.shape[1]), dtype=np.int32)
    for m in range(x.shape[0]):
        one = slice(m, m + 1)
        to_fixed_point(x[one], powers, integers, exponent[one], total[one], flags[one])
        _put_digits(integers[0], digits[m])


@njit(nogil=True, cache=True)
def refine(
    x: Any, powers: Any, exponent: Any, flags: Any, total: Any, digits: Any
) -> Any:  # pragma: no cover - compiled
    """The same for a second pass of rows that want one, whose digits lie one after the other; how many there are."""
    integers, found = np.empty((1, x.shape[1]), dtype=np.int32), 0
    for m in range(x.shape[0]):
        one = slice(m, m + 1)
        if flags[m] & SECOND_PASS:
            to_finer(x[one], powers, exponent[one], flags[one], integers, total[one])
            _put_digits(integers[0], digits[found])
            found += 1
    return found


_OF_X = "float32[:,::1], float32[::1], int32[::1]"
prepare_apart = apart(prepare, f"void({_OF_X}, int64[::1], int32[::1], uint32[:,:,::1])")
refine_apart = apart(refine, f"int64({_OF_X}, int32[::1], int64[::1], uint32[:,:,::1])")


@njit(nogil=True, cache=True)
def _add_block(
    words: Any, first: Any, steps: Any, strip: Any, digits: Any, at: Any, sums: Any
) -> None:  # pragma: no cover - compiled
    """What the words of a strip of columns, from word ``first`` of rows of x on, add to sums from column ``at`` on."""
    rows, to_digit, to_row = digits.shape[0], sums.strides[1], sums.strides[0]
    by, stride, of_x = words.strides[0], digits.strides[0], digits.ctypes.data + first * digits.strides[1]
    for m in range(0, rows, ROWS):
        there, lanes = min(ROWS, rows - m), LANES * (_OF_ONE if rows - m == 1 else _OF_MORE)
        x, out = of_x + m * stride, sums.ctypes.data + m * to_row + 4 * at
        for n in range(0, strip, lanes):
            if there == 1:
                _tile_1(words.ctypes.data + 4 * n, by, x, stride, steps, out + 4 * n, to_digit, to_row)
            elif there == 2:
                _tile_2(words.ctypes.data + 4 * n, by, x, stride, steps, out + 4 * n, to_digit, to_row)
            else:
                _tile_3(words.ctypes.data + 4 * n, by, x, stride, steps, out + 4 * n, to_digit, to_row)


@njit(nogil=True, cache=True)
def add_across(w: Any, flip: Any, digits: Any, start: Any, stop: Any, sums: Any) -> None:  # pragma: no cover - compiled
    """Sums (rows, digits, ``words_of`` columns) of rows ``start`` to ``stop`` - 1 of the weight, a multiple of 4 first.

    ``flip``: what bytes differ by, bit by bit, from unsigned numbers.
    """
    check_c_order(w)
    inner, columns = w.shape
    whole, stride = columns - columns % TILE, w.strides[0]
    depth = DEPTH_OF_FEW if digits.shape[0] <= FEW else DEPTH
    strip = WORDS * 4 // depth
    words, edge = on_lines(depth // 4, strip, np.uint32), np.zeros((4, TILE), dtype=np.uint8)
    sums[:] = 0
    for at in range(0, sums.shape[2], strip):
        width = min(strip, sums.shape[2] - at)
        for k in range(start, stop, depth):
            last = min(k + depth, stop)
            for r in range(k, last, 4):
                out, there = words[(r - k) // 4].ctypes.data, min(4, inner - r)
                tiles, row = (min(at + width, whole) - at) // TILE, w.ctypes.data + r * stride + at
                ahead = row + depth * stride  # beyond the part's end the next strip of its first rows
                if r + depth >= stop:
                    ahead = w.ctypes.data + (start + (r - k)) * stride + at + strip
                if tiles > 0 and there == 4:
                    _make_words(row, stride, tiles, flip, ahead, stride, out)
                    if at + width <= whole:
                        continue
                for n in range(at if there < 4 else whole, at + width, TILE):
                    for i in range(there):
                        codes, to = w[r + i, n : n + TILE], edge[i]
                        for c in range(codes.shape[0]):
                            to[c] = codes[c]
                    _make_words(edge.ctypes.data, TILE, 1, flip, ahead, 0, out + 4 * (n - at))
            _add_block(words, k // 4, (last - k + 3) // 4, width, digits, at, sums)


add_across_apart = apart(add_across, "void(uint8[:,::1], int64, uint32[:,:,::1], int64, int64, int32[:,:,::1])")


@njit(nogil=True, cache=True)
def _join(parts: Any, m: Any, first: Any, integers: Any, out: Any) -> None:  # pragma: no cover - compiled
    """``out[n]``: the sum for column ``first + n``, a tile's first, of all digits of a row and all parts.

    Of signed codes: 128 times the sum of the row's ``integers`` less.
    """
    columns, quarters = out.shape[0], LANES // QUARTER
    total, of_digit = np.empty(TILE, dtype=np.int64), np.empty(TILE, dtype=np.int32)
    for start in range(0, columns, TILE):
        total[:] = -128 * integers
        for d in range(DIGITS):
            of_digit[:] = 0
            for p in range(parts.shape[0]):
                digit = parts[p, m, d, first + start : first + start + TILE]
                for i in range(TILE):
                    of_digit[i] += digit[i]
            for i in range(TILE):
                total[i] += np.int64(of_digit[i]) << (8 * d)
        for n in range(start, min(start + TILE, columns)):  # lane QUARTER * b + j of vector i is such a column
            column = n - start
            b, i, j = column // 16, column % 16 // QUARTER, column % QUARTER
            out[n] = total[(i * quarters + b) * QUARTER + j]


@njit(nogil=True, cache=True)
def finish(
    parts: Any, row_exponent: Any, total: Any, flags: Any, finer_total: Any, fraction: Any, exponent: Any, zero: Any,
    bias: Any, powers: Any, start: Any, stop: Any, y: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Columns ``start``, a tile's first, to ``stop`` - 1 of the result; zero points are those of signed bytes.

    Sums of second passes come after those of all rows, in the order of the rows that want one.
    """
    rows, refined = y.shape[0], 0
    for first in range(start, stop, STRIP):
        these = slice(first, min(first + STRIP, stop))
        refined, width = 0, these.stop - these.start
        sums, finer = np.empty((1, width), dtype=np.int64), np.empty((1, width), dtype=np.int64)
        for m in range(rows):
            one, again = slice(m, m + 1), flags[m] & SECOND_PASS != 0
            _join(parts, m, first, total[m], sums[0])
            if again:
                _join(parts, rows + refined, first, finer_total[m], finer[0])
                refined += 1
            from_fixed_point(
                sums, total[one], finer[: 1 if again else 0], finer_total[one], flags[one], zero[these],
                fraction[these], row_exponent[one], exponent[these], powers, bias[these], y[one, these],
            )  # fmt: skip
            if flags[m] & NOT_FINITE:
                y[m, these] = np.float32(np.nan)


finish_apart = apart(
    finish,
    "void(int32[:,:,:,::1], int32[::1], int64[::1], int32[::1], int64[::1], float32[::1], int32[::1], int32[::1], "
    "float32[::1], float32[::1], int64, int64, float32[:,::1])",
)


@njit(nogil=True)
def _multiply_part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    w, flip, digits, each, sums = given
    for first in range(start, stop, each):
        add_across_apart((w, flip, digits, first, min(first + each, stop), sums[first // each]))


@njit(nogil=True)
def _finish_part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    parts, row_exponent, total, flags, finer_total, fraction, exponent, zero, bias, powers, y = given
    finish_apart((
        parts, row_exponent, total, flags, finer_total, fraction, exponent, zero, bias, powers, start, stop, y
    ))  # fmt: skip


_multiply_task, _finish_task = task_of(_multiply_part), task_of(_finish_part)


@njit(nogil=True, cache=True)
def multiply_in_parts(
    pool: Any, ends: Any, w: Any, flip: Any, digits: Any, each: Any, sums: Any
) -> Any:  # pragma: no cover - compiled
    """``add_across`` for ``each`` rows of the weight at a time, of which ``ends`` are those that one thread takes."""
    given = w, flip, digits, each, sums
    in_parts(pool, ends, _multiply_task(given))
    return True


@njit(nogil=True, cache=True)
def finish_in_parts(
    pool: Any, ends: Any, parts: Any, row_exponent: Any, total: Any, flags: Any, finer_total: Any, fraction: Any,
    exponent: Any, zero: Any, bias: Any, powers: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``finish`` for columns from each of ``ends`` to the next."""
    given = parts, row_exponent, total, flags, finer_total, fraction, exponent, zero, bias, powers, y
    in_parts(pool, ends, _finish_task(given))
    return True
