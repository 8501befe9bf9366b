"""Exact products in groups with weights that lie (in, out): of bytes, or of two codes of 4 bits a byte, as they lie.

Owns: those loops, and the numba intrinsic in them. Imports: ``groups``, for what rows of x become and what is made of
sums, and ``pool``. They hold no lock and start no thread. ``fixed_point`` calls them, and JAX's ``groups``.

``groups`` adds codes of 16 columns of the result, four of each in a vector, wherever they came from. Here they are
exchanged as in ``across``: of four rows of the weight and as many columns as a vector has bytes (codes of 4 bits: those
at even places, then those at odd ones). So are groups of a strip of columns, which stay in a cache until all rows of x
have met them; sums of columns, of which there are few, wait for the next groups. Memory is read along rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from aqt_lite.backends.cpu.emit import byte_turns, counted_loop, item_at, load, read_ahead, shuffled
from aqt_lite.backends.cpu.groups import (
    COLUMNS,
    LANES,
    LARGEST_FALL,
    LARGEST_SUM,
    LARGEST_ZERO,
    LEAST_POWER,
    RUN,
    add_to_rows,
    add_to_rows_twice,
    end_run,
    finish_tile,
    numbers_for_dots,
    put_next_wanted,
    told_of_codes,
)
from aqt_lite.backends.cpu.lines import LINE, on_lines
from aqt_lite.backends.cpu.native import apart, check_c_order, task_of
from aqt_lite.backends.cpu.pool import in_parts

__all__ = ["PART", "STRIP", "multiply_columns", "multiply_columns_apart", "multiply_columns_in_parts"]

BLOCK = 4 * LANES
"""Bytes of a row that are exchanged at a time."""

TILES = BLOCK // COLUMNS
"""Tiles that so many codes of a byte make."""

STRIP = 256
"""Columns of a strip: whole blocks, of either kind of codes."""

PART = 2 * BLOCK
"""Columns that parts have a multiple of: whole blocks likewise."""

DEPTH, DEPTH_OF_MANY = 64, 128
"""Rows of the weight whose codes wait in a cache for rows of x, or those of one group: 16 KB, and 32 for many rows of
x, each of which meets as much of them in one call."""

MANY_ROWS = 16

ONE = np.int32(127 << 23)
"""The bits of 1, for columns that are not there."""

_INT, _ADDRESS = ir.IntType(32), ir.IntType(64)
_WORDS: Any = ir.VectorType(_INT, LANES)
_BYTES: Any = ir.VectorType(ir.IntType(8), BLOCK)


def _exchanged(builder: Any, rows: list[Any]) -> list[Any]:
    """Four vectors of bytes as four vectors of words, of the columns in their order.

    Bytes are mixed within every 16. So first a vector's fours of bytes are put where they are to end: the v-th of every
    16 bytes becomes those of vector v.
    """
    quarters = BLOCK // 16
    order = [4 * (quarters * v + q) + i for q in range(quarters) for v in range(4) for i in range(4)]
    rows = [shuffled(builder, row, row, order) for row in rows]
    pairs = [[byte_turns(builder, *two, 1, upper) for two in (rows[:2], rows[2:])] for upper in (False, True)]
    return [byte_turns(builder, *pair, 2, upper) for pair in pairs for upper in (False, True)]


def _unsigned_of_columns(halves: bool, looked_up: bool = False) -> Any:
    """An intrinsic: unsigned numbers of ``blocks`` times BLOCK bytes of four rows, as ``groups`` has them.

    Those of a tile go to ``out``, those of the next tile ``to_tile`` bytes from there. ``table`` and ``flip`` are as
    ``numbers_for_dots`` has them; ``ahead`` bytes from what is read, memory is fetched meanwhile.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def exchange(
        _: Any, w: Any, stride: Any, blocks: Any, table: Any, flip: Any, ahead: Any, out: Any, to_tile: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, stride, blocks, table, flip, ahead, out, to_tile = arguments
            numbers_of = numbers_for_dots(builder, halves, looked_up, table, flip)
            kinds = 2 if halves else 1

            def block(i: Any, none: list[Any]) -> list[Any]:
                found: list[list[Any]] = [[] for _ in range(kinds)]
                for r in range(4):
                    place = item_at(builder, builder.add(w, builder.mul(stride, _ADDRESS(r))), i, BLOCK)
                    read_ahead(builder, builder.add(place, ahead))
                    for to, numbers in zip(found, numbers_of(load(builder, place, _WORDS)), strict=True):
                        to.append(builder.bitcast(numbers, _BYTES))
                start = builder.add(out, builder.mul(builder.mul(i, to_tile), _ADDRESS(TILES * kinds)))
                for one, rows in enumerate(found):
                    for v, vector in enumerate(_exchanged(builder, rows)):
                        tile, part = divmod(v * LANES, COLUMNS)
                        at = builder.mul(to_tile, _ADDRESS(one * TILES + tile))
                        place = builder.add(builder.add(start, at), _ADDRESS(4 * part))
                        builder.store(vector, builder.inttoptr(place, _BYTES.as_pointer()), align=4)
                return none

            counted_loop(builder, blocks, [], block)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return exchange


_of_bytes, _of_halves = _unsigned_of_columns(False), _unsigned_of_columns(True)
_by_table = _unsigned_of_columns(True, True)


@njit(nogil=True, cache=True)
def _exchange(
    halves: Any, tabled: Any, w: Any, stride: Any, blocks: Any, table: Any, word: Any, ahead: Any, out: Any, to: Any
) -> None:  # pragma: no cover - compiled
    if tabled:
        _by_table(w, stride, blocks, table, word, ahead, out, to)
    elif halves:
        _of_halves(w, stride, blocks, table, word, ahead, out, to)
    else:
        _of_bytes(w, stride, blocks, table, word, ahead, out, to)


@njit(nogil=True, cache=True)
def _put_numbers(
    w: Any, halves: Any, tabled: Any, table: Any, word: Any, k: Any, stop: Any, first: Any, bytes_: Any, edge: Any,
    numbers: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Unsigned numbers of rows ``k`` to ``stop`` - 1, a multiple of 4 first, and so many bytes of each from ``first``.

    ``numbers`` is (tiles, steps, 64). What is beyond the weight's end are numbers of zero bits, and meets zeros of x or
    goes unread.
    """
    inner, length = w.shape
    tiles, ahead = TILES * (2 if halves else 1), (stop - k) * w.strides[0]
    whole = min(bytes_, length - first) // BLOCK
    for r in range(k, stop, 4):
        out, there = numbers.ctypes.data + (r - k) // 4 * numbers.strides[1], min(4, inner - r)
        if there == 4 and whole > 0:
            start = w.ctypes.data + r * w.strides[0] + first
            _exchange(halves, tabled, start, w.strides[0], whole, table, word, ahead, out, numbers.strides[0])
        for block in range(whole if there == 4 else 0, (bytes_ + BLOCK - 1) // BLOCK):
            edge[:] = 0
            at = first + block * BLOCK
            for i in range(there):
                row, to = w[r + i], edge[i]
                for c in range(at, min(at + BLOCK, length)):
                    to[c - at] = row[c]
            place = out + block * tiles * numbers.strides[0]
            _exchange(halves, tabled, edge.ctypes.data, BLOCK, 1, table, word, 0, place, numbers.strides[0])


@njit(nogil=True, cache=True)
def _column(tile: Any, lane: Any, halves: Any) -> Any:  # pragma: no cover - compiled
    """Of a strip's columns the one that a lane of a tile is."""
    if not halves:
        return tile * COLUMNS + lane
    block, rest = tile // (2 * TILES), tile % (2 * TILES)
    return block * 2 * BLOCK + 2 * (rest % TILES * COLUMNS + lane) + rest // TILES


@njit(nogil=True, cache=True)
def _put_of_columns(
    rows: Any, first: Any, columns: Any, halves: Any, missing: Any, tiles: Any, out: Any
) -> None:  # pragma: no cover - compiled
    """``out[tile, i, lane] = rows[i, column]`` for a strip's columns; ``missing`` where there is none."""
    one = rows.shape[1] == 1
    for i in range(rows.shape[0]):
        row = rows[i]
        for tile in range(tiles):
            to, start = out[tile, i], _column(tile, 0, halves)
            step, last = 2 if halves else 1, _column(tile, COLUMNS - 1, halves)
            if last < columns and not one:
                for lane in range(COLUMNS):
                    to[lane] = row[first + start + step * lane]
            else:
                for lane in range(COLUMNS):
                    n = start + step * lane
                    to[lane] = missing if n >= columns else row[0 if one else first + n]


@njit(nogil=True, cache=True)
def _extremes(rows: Any, mask: Any, first: Any, columns: Any, most: Any, least: Any) -> None:  # pragma: no cover
    """The largest and the least, in each of a strip's columns, of what ``mask`` leaves."""
    one = rows.shape[1] == 1
    most[:], least[:] = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)
    for i in range(rows.shape[0]):
        here = rows[i, 0 if one else first : 1 if one else first + columns]
        for n in range(here.shape[0]):
            value = here[n] & mask
            most[n], least[n] = max(most[n], value), min(least[n], value)
    if one:
        most[:], least[:] = most[0], least[0]


@njit(nogil=True, cache=True)
def multiply_columns(
    w: Any, halves: Any, flip: Any, table: Any, scale: Any, zero: Any, size: Any, inner: Any, x: Any, finer: Any,
    of_x: Any, of_finer: Any, row_exponent: Any, row_power: Any, many: Any, again: Any, bad: Any, powers: Any,
    bias: Any, start: Any, stop: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """Columns ``start``, the first of a block, to ``stop`` - 1 of the result; whether they are served.

    ``w`` (K, bytes); scales are (groups, N or 1), zero points likewise or empty. The others are those of
    ``groups.multiply``, of groups for which ``groups.in_dots`` says that bytes are multiplied so.
    """
    check_c_order(w)
    rows, groups, step = y.shape[0], of_x.shape[1], 2 if halves else 1
    unsigned = np.zeros(64, dtype=np.uint8)
    tabled, word, lowest, largest = told_of_codes(halves, flip, table, unsigned)
    less, shifted = lowest + flip, zero.shape[0] > 0
    following = np.empty(groups + 1, dtype=np.int64)
    put_next_wanted(many, following)
    lowest_power = np.float32(1)
    for m in range(rows):
        for g in range(groups):
            lowest_power = min(lowest_power, row_power[m, g])
    several = max((DEPTH if rows < MANY_ROWS else DEPTH_OF_MANY) // size, 1)
    while RUN % several != 0:  # runs end where blocks do
        several -= 1
    tiles = STRIP // COLUMNS
    steps = (several * size + 3) // 4
    numbers = on_lines(tiles * steps, LINE, np.uint8).reshape(tiles, steps, LINE)
    bits = on_lines(tiles * several, COLUMNS, np.int32).reshape(tiles, several, COLUMNS)
    zeros = np.zeros((tiles, several if shifted else 1, COLUMNS), dtype=np.int32)
    edge = np.zeros((4, BLOCK), dtype=np.uint8)
    sums = np.zeros((tiles, 2, rows, COLUMNS), dtype=np.float32)
    most, least = np.empty(STRIP, dtype=np.int32), np.empty(STRIP, dtype=np.int32)
    highest, deepest = np.zeros(STRIP, dtype=np.int32), np.zeros(STRIP, dtype=np.int32)
    leading = np.empty((tiles, COLUMNS), dtype=np.int32)
    near, short = np.empty(tiles, dtype=np.int64), np.empty(tiles, dtype=np.bool_)
    of_scale, of_exponent, every_bit = scale.view(np.int32), np.int32(0x7F800000), np.int32(-1)
    for first in range(start, stop, STRIP):
        columns = min(STRIP, stop - first)
        bytes_ = (columns + step - 1) // step
        blocks = (bytes_ + BLOCK - 1) // BLOCK
        used = blocks * TILES * step
        _extremes(of_scale, of_exponent, first, columns, most, least)
        if shifted:
            _extremes(zero, every_bit, first, columns, highest, deepest)
        for n in range(columns):
            if least[n] == 0 or most[n] == of_exponent:
                return False
            if shifted and (highest[n] - flip > LARGEST_ZERO or deepest[n] - flip < -LARGEST_ZERO):
                return False
        for tile in range(used):
            near[tile] = np.int64(lowest_power >= LEAST_POWER)
            number = np.int64(0)  # the largest there can be, zero points taken off
            for lane in range(COLUMNS):
                n = _column(tile, lane, halves)
                leading[tile, lane] = most[n] if n < columns else ONE
                if n < columns:
                    if most[n] - least[n] > LARGEST_FALL:
                        near[tile] = np.int64(0)
                    number = max(number, largest - (deepest[n] - less), highest[n] - less)
            short[tile] = number * size <= LARGEST_SUM
        sums[:] = 0
        for g in range(0, groups, several):
            count = min(several, groups - g)
            k, last = g * size, min((g + count) * size, inner)
            _put_numbers(w, halves, tabled, unsigned.ctypes.data, word, k, last, first // step, bytes_, edge, numbers)
            _put_of_columns(of_scale[g : g + count], first, columns, halves, ONE, used, bits)
            if shifted:
                _put_of_columns(zero[g : g + count], first, columns, halves, np.int32(0), used, zeros)
            for tile in range(used):
                run, total = sums[tile, 0].ctypes.data, sums[tile, 1].ctypes.data
                done = 0
                while done < last - k:
                    i = done // size
                    here = max((last - k - done) // size, 1)  # whole groups, then the last one
                    each = (min(size, last - k - done) + 3) // 4
                    at, c = g + i, numbers[tile].ctypes.data + done * COLUMNS
                    s, lead = bits[tile, i].ctypes.data, leading[tile].ctypes.data
                    z, by = zeros[tile].ctypes.data + (i * 4 * COLUMNS if shifted else 0), 4 * COLUMNS if shifted else 0
                    e, f = x.ctypes.data + (k + done) * 4, finer.ctypes.data + (k + done) * 4
                    o, p = of_x.ctypes.data + at * 8, row_power.ctypes.data + at * 4
                    if following[at] < at + here:
                        add_to_rows_twice(
                            c, each, here, short[tile], e, f, x.strides[0], s, lead, near[tile], z, by, less, o,
                            of_finer.ctypes.data + at * 8, p, run, many, at,
                        )  # fmt: skip
                    else:
                        add_to_rows(
                            c, each, here, short[tile], e, x.strides[0], s, lead, near[tile], z, by, less, o, p, groups,
                            run, rows,
                        )  # fmt: skip
                    done += here * size
                if (g + count) % RUN == 0 or g + count == groups:
                    end_run(run, total, rows)
        for tile in range(used):
            at = _column(tile, 0, halves)
            there = min(COLUMNS, (columns - at + step - 1) // step)
            for lane in range(COLUMNS):
                leading[tile, lane] = (leading[tile, lane] >> 23) - 127
            if there > 0:
                finish_tile(
                    sums[tile, 1], row_exponent, leading[tile], powers, bias[first + at : stop : step], bad,
                    y[:, first + at : stop : step][:, :there],
                )  # fmt: skip
    return True


multiply_columns_apart = apart(
    multiply_columns,
    "boolean(uint8[:,::1], boolean, int64, float32[::1], float32[:,::1], int32[:,::1], int64, int64, float64[:,::1], "
    "float64[:,::1], float64[:,::1], float64[:,::1], int32[::1], float32[:,::1], uint8[:,::1], boolean, uint8[::1], "
    "float32[::1], float32[::1], int64, int64, float32[:,::1])",
)


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    of_product, served, y = given
    if not multiply_columns_apart((*of_product, start, stop, y)):
        served[0] = False


_task = task_of(_part)


@njit(nogil=True, cache=True)
def multiply_columns_in_parts(
    pool: Any, ends: Any, w: Any, halves: Any, flip: Any, table: Any, scale: Any, zero: Any, size: Any, inner: Any,
    x: Any, finer: Any, of_x: Any, of_finer: Any, row_exponent: Any, row_power: Any, many: Any, again: Any, bad: Any,
    powers: Any, bias: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``multiply_columns`` for columns from each of ``ends``, multiples of PART, to the next, by a pool's threads."""
    of_product = (
        w, halves, flip, table, scale, zero, size, inner, x, finer, of_x, of_finer, row_exponent, row_power, many,
        again, bad, powers, bias,
    )  # fmt: skip
    served = np.ones(1, dtype=np.bool_)
    in_parts(pool, ends, _task((of_product, served, y)))
    return served[0]
