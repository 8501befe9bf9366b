"""Loops for reproducible products with groups along the contracted axis: exact sums of integers.

Owns: the loops, and the numba intrinsics in them. One file but for the words of ``emit``, because what numba caches of
a function is renewed when its own file changes, and not when another does; what the contract's constants are is written
here once more. The loops hold no lock and start no thread. ``fixed_point`` calls them, and JAX's ``groups``; ``serve``
says what they are for.

A row of x, in fixed point, is integers of 31 bits, a group of them at a time; codes less their zero points have 9, the
sign among them. The sum of up to 512 products is an integer below 2^48: float64 holds it, and every partial sum,
exactly, in whatever order. Rounding it once to float32 is what the contract's ``float32(high) * 2^24 + low`` does, for
then ``high`` is below 2^24.

Lanes are columns of the result. 16 rows of the weight, ``CHUNK`` bytes of each, are transposed in registers, and their
codes become float64: (codes, 16). An entry of x, in all lanes, times one such row is added to 16 sums at once, so no
sum crosses lanes, and what follows a group (scale, powers of two, the ordered sum of groups) is done to whole vectors.
Multiplications and additions may be fused or not: they are exact.

**By integer dot products** (``in_dots``) the same sums take a half to a quarter of the time. An integer of 31 bits is
four signed digits of 8, and codes become unsigned bytes by taking ``lowest`` off: those of 4 bits by a mask, or by a
table where they are no plain integers. The words of 16 rows, transposed, hold four codes of each of 16 columns, which
``vpdpbusd`` multiplies with four digits that all lanes share. A digit's sum, of up to 512 products, is at most
``512 * 255 * 128 < 2^24``; the four together are the same integer as above, and what follows a group is the same, too.
Codes of 4 bits leave their bytes as those at even and those at odd positions, so digits lie in that order. Where two
digits' sums fit one int32 (``LARGEST_SUM``), as they do but for long groups of 8 bits, no float64 is needed: the two
integers left become the contract's ``high`` and ``low``, vectors of 16 lanes.

A scale relative to its column's largest and the power of a row's group are one factor: what the contract multiplies by
the significand, and then by the power, is the same, for only the significand's product rounds. A call of an intrinsic
with arrays costs more than the arithmetic of a group, so that what is called for each span takes addresses, and for one
row of x a run of 16 groups is one call (``_spans_of``), or each part of it beside a group that wants a second pass.

**One row, codes in the order in which they lie** (``in_order``; vectors of 64 bytes). A vector of a row's codes meets
the digits of as many entries of x, so that no word is transposed and none is stored. A group is a quarter of a vector,
a half, or whole ones. Sums of two digits are one int32 in each lane; those of a vector and four rows are added up, the
lanes of a quarter, by six shuffles, and become four columns of four quarters; those of four times four rows are
transposed. Lanes are 16 columns then, and all that follows is as above. A partial sum may pass the ends of int32, where
the whole is within.

Without that instruction, ``vpmaddwd`` adds two products of shorts: an integer is two signed digits of 16 bits, and the
four bytes of a word become two pairs of shorts in registers, the even ones and the odd ones. A digit's sum, of up to
256 products, is at most ``256 * 255 * 2^15 < 2^31``. Vectors are of 16 lanes or, for 16 columns, two of 8.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from aqt_lite.backends.cpu.emit import counted_loop, function, in_all_lanes, item_at, load, read_ahead, shuffled, store
from aqt_lite.backends.cpu.lines import on_lines
from aqt_lite.backends.cpu.native import apart, load64, task_of
from aqt_lite.backends.cpu.pool import in_parts

__all__ = [
    "COLUMNS",
    "DOTS",
    "LANES",
    "LARGEST_FALL",
    "LARGEST_SUM",
    "LARGEST_ZERO",
    "LEAST_POWER",
    "ROWS_AT_ONCE",
    "RUN",
    "TABLES",
    "add_to_rows",
    "add_to_rows_twice",
    "end_run",
    "finish_tile",
    "in_dots",
    "multiply",
    "multiply_apart",
    "multiply_in_parts",
    "numbers_for_dots",
    "prepare",
    "prepare_apart",
    "put_next_wanted",
    "refine_apart",
    "told_of_codes",
    "width_of_rows",
]


def _features() -> set[str]:
    """Of the processor that numba compiles for; NUMBA_CPU_FEATURES may say another."""
    return set(str(cpu_target.target_context.codegen().magic_tuple()[-1]).split(","))


_WIDE = "+avx512f" in _features()

LANES = 16 if {"+avx512f", "+avx512bw"} <= _features() and "+prefer-256-bit" not in _features() else 8
"""Sums of a vector of integer dot products."""

_OF_BYTES = {"+avx512bw", "+avx512vl", "+avx512vnni"} <= _features() or {"+avx2", "+avxvnni"} <= _features()

DOTS = "+avx2" in _features()
"""Whether the processor adds up products of bytes, or of shorts, in int32, and looks bytes up."""

BITS_OF_DIGIT = 8 if _OF_BYTES else 16
"""Of integers in fixed point: what that product multiplies unsigned bytes, or shorts, with."""

ORDERED = LANES == 16 and BITS_OF_DIGIT == 8
"""Whether one row of x meets codes in the order in which they lie."""

HALF = 0x8080 if BITS_OF_DIGIT == 8 else 0x8000
"""What ``lower`` is at least minus: integers are ``upper * 2^16 + lower``, each two bytes or a short."""

LARGEST_SUM = 65280
"""Length of a group times its largest number, zero points taken off, up to which sums of ``lower`` fit int32: it is
below 2^31 / 32896. Those of ``upper``, at most 32513, do so as well, and may be one 65536th of the others' larger."""

LONGEST_OF_SHORTS = 256
"""Length of groups up to which sums of digits of 16 bits fit int32, whatever the codes: a 255th of that."""

MOST_IN_DOTS = 4 if LANES == 16 else 2
"""Rows of x whose sums, 16 a digit, fit the registers."""

LONGEST_SPAN = 4096
"""Codes of 16 columns that are decoded before rows of x come by, at most: 64 KB."""

LONGEST_OF_ROWS = 512
"""Codes of 16 columns that several rows of x meet in one call, where a span is not longer: 8 KB."""

COLUMNS = 16
"""Columns of the result, which are rows of the weight, in a tile."""

CHUNK = 64
"""Bytes of a row of the weight that are transposed at a time."""

STRIP = 64
"""Columns of the result whose codes are decoded before rows of x come by: they are read from memory once for all."""

ROWS = 8 if _WIDE else 2
"""Rows of x in a tile: the sums of each, 16 float64 numbers, are to fit the registers."""

FEWER_ROWS = 4 if _WIDE else 2
"""The same for what is left of a block of rows."""

ROWS_AT_ONCE = 128
"""Rows of x that are in fixed point at a time."""

LARGEST_ZERO = 128
"""Magnitude of a zero point, as of signed codes, up to which codes less their zero points have 9 bits with the sign."""

# Those of aqt_lite.ops.reference, as the loops' types; the tests hold them against it.
RUN = 16
SMALLEST = np.float32(2.0**-126)
SMALL = np.float32(2.0**18)
MANY = 16
MOST_FRACTION = np.int32(0x7E0000)  # of 127/64: its bits below the exponent's
BITS = 30
LEAST_DROP = np.float32(2.0**-60)
FINER = 2.0**31

LEAST_FACTOR = int(LEAST_DROP.view(np.int32))
"""The bits of the least product of a scale, relative to its column's largest, and a row's power that counts: its power
is at least that, since its significand is at least 1."""

LARGEST_FALL = np.int32(40 << 23)
LEAST_POWER = np.float32(2.0**-20)
"""Where a column's scales fall no further below its largest, in bits of exponents, and no power of a row is smaller,
every product of the two counts: it is at least ``LEAST_DROP``."""

_LOOKED_UP_IN = 16 if _WIDE else 8 if "+avx2" in _features() else 0

TABLES = _LOOKED_UP_IN > 0
"""Whether the processor permutes vectors of floats by other vectors, as codes of 4 bits want it."""

_INT, _ADDRESS, _FLOAT, _DOUBLE = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
_INTS, _FLOATS, _DOUBLES = (ir.VectorType(item, COLUMNS) for item in (_INT, _FLOAT, _DOUBLE))
_EXACT = ("contract",)


def _same(vector: Any, number: float) -> Any:
    return ir.Constant(vector, [number] * vector.count)


def _rows_of_tile(builder: Any, start: Any, stride: Any, there: Any) -> list[Any]:
    """Addresses of 16 rows; after the last one that is there it comes again."""
    last, found = builder.sub(there, _ADDRESS(1)), []
    for i in range(COLUMNS):
        r = builder.select(builder.icmp_signed("<", _ADDRESS(i), last), _ADDRESS(i), last)
        found.append(builder.add(start, builder.mul(r, stride)))
    return found


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 words, rows for columns: in four rounds, which swap halves of pairs 8, 4, 2 and 1 apart.

    Or 8 of 8, in three.
    """
    count = len(rows)
    for distance in (8, 4, 2, 1)[-count.bit_length() + 1 :]:
        first = [i if i // distance % 2 == 0 else count + i - distance for i in range(count)]
        second = [i + distance if i // distance % 2 == 0 else count + i for i in range(count)]
        new = list(rows)
        for i in range(count):
            if i // distance % 2 == 0:
                new[i] = shuffled(builder, rows[i], rows[i + distance], first)
                new[i + distance] = shuffled(builder, rows[i], rows[i + distance], second)
        rows = new
    return rows


def _numbers_of_bytes(builder: Any, words: Any, table: Any) -> list[Any]:
    """Of the four signed bytes of each word, as float64."""
    found = []
    for byte in range(4):
        up = builder.shl(words, _same(_INTS, 24 - 8 * byte)) if byte < 3 else words
        found.append(builder.sitofp(builder.ashr(up, _same(_INTS, 24)), _DOUBLES))
    return found


def _numbers_of_halves(builder: Any, words: Any, table: Any) -> list[Any]:
    """Of the eight codes of 4 bits of each word: positions in a table of 16 floats."""
    lanes = _LOOKED_UP_IN
    floats, ints = ir.VectorType(_FLOAT, lanes), ir.VectorType(_INT, lanes)
    name = "llvm.x86.avx512.permvar.sf.512" if lanes == 16 else "llvm.x86.avx2.permps"
    permute = function(builder, name, floats, [floats, ints])
    parts = [load(builder, item_at(builder, table, _ADDRESS(i), 4), floats) for i in range(0, 16, lanes)]

    def looked_up(positions: Any) -> Any:
        """The instruction itself looks at no more bits of a position than it has lanes for."""
        if lanes == 16:
            return builder.call(permute, [parts[0], positions])
        eighth = builder.icmp_signed("==", builder.and_(positions, _same(ints, 8)), _same(ints, 0))
        return builder.select(eighth, *(builder.call(permute, [part, positions]) for part in parts))

    numbers = []
    for half in range(8):
        positions = builder.lshr(words, _same(_INTS, 4 * half)) if half else words
        cut = [shuffled(builder, positions, positions, list(range(i, i + lanes))) for i in range(0, COLUMNS, lanes)]
        values = [looked_up(part) for part in cut]
        whole = values[0] if len(values) == 1 else shuffled(builder, *values, list(range(COLUMNS)))
        numbers.append(builder.fpext(whole, _DOUBLES))
    return numbers


def _decoder(numbers_of: Any) -> Any:
    """Numbers of ``CHUNK`` bytes of up to 16 rows, as float64 (codes, 16); after the last row that one again.

    Arguments: addresses and the stride of rows in bytes, how many there are, a table of 16 floats, and the word that
    words differ by, bit by bit, from what is meant.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def decode(_: Any, w: Any, stride: Any, there: Any, table: Any, flip: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, stride, there, table, flip, out = arguments
            rows = [load(builder, start, _INTS) for start in _rows_of_tile(builder, w, stride, there)]
            flipped = in_all_lanes(builder, builder.trunc(flip, _INT), _INTS)
            place = out
            for words in _transposed(builder, rows):
                for number in numbers_of(builder, builder.xor(words, flipped), table):
                    store(builder, number, place)
                    place = builder.add(place, _ADDRESS(8 * COLUMNS))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), generate

    return decode


_decode_bytes = _decoder(_numbers_of_bytes)
_decode_halves = _decoder(_numbers_of_halves) if TABLES else _decode_bytes


def _adder(rows: int, several: int = 1) -> Any:
    """``sums[m, lane] += sum_k x[m, k] numbers[k, lane]`` over ``steps`` codes, in float64.

    ``several``: codes in a step, each with sums of its own, so that additions need not wait for one another.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def add(_: Any, numbers: Any, x: Any, x_stride: Any, steps: Any, sums: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            numbers, x, x_stride, steps, sums = arguments
            of_x = [builder.add(x, builder.mul(x_stride, _ADDRESS(m))) for m in range(rows)]
            places = [builder.add(sums, _ADDRESS(8 * COLUMNS * m)) for m in range(rows)]
            totals = [load(builder, place, _DOUBLES) for place in places]
            totals += [_same(_DOUBLES, 0)] * (several - 1)

            def step(i: Any, totals: list[Any]) -> list[Any]:
                new = []
                for part in range(several):
                    k = builder.add(builder.mul(i, _ADDRESS(several)), _ADDRESS(part))
                    codes = load(builder, item_at(builder, numbers, k, 8 * COLUMNS), _DOUBLES)
                    for m in range(rows):
                        entry = in_all_lanes(builder, load(builder, item_at(builder, of_x[m], k, 8), _DOUBLE), _DOUBLES)
                        product = builder.fmul(entry, codes, flags=_EXACT)
                        new.append(builder.fadd(totals[m + part], product, flags=_EXACT))
                return new

            found = counted_loop(builder, steps, totals, step)
            for extra in found[rows:]:  # of one row
                found[0] = builder.fadd(found[0], extra)
            for place, total in zip(places, found[:rows], strict=True):
                store(builder, total, place)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 5), generate

    return add


_add_one, _add_one_by_fours, _add_fewer, _add_rows = _adder(1), _adder(1, 4), _adder(FEWER_ROWS), _adder(ROWS)


def _ender() -> Any:
    """Add the sums of a group, of one row of x, to ``run``; the sums are 0 then.

    Addresses of the sums and of those of the second pass, which count where ``twice`` is not 0; of zero points
    (float64); sums of the group's entries of x in either pass; addresses of the scales' significands and powers; the
    power of the row's group; and the address of the sum of groups.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def end(
        _: Any, sums: Any, finer: Any, twice: Any, zero: Any, of_x: Any, of_finer: Any, fraction: Any, power: Any,
        row_power: Any, run: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            sums, finer, twice, zero, of_x, of_finer, fraction, power, row_power, run = arguments
            zeros = load(builder, zero, _DOUBLES)

            def rounded(place: Any, entries: Any) -> Any:
                shift = builder.fmul(zeros, in_all_lanes(builder, entries, _DOUBLES), flags=_EXACT)
                total = builder.fsub(load(builder, place, _DOUBLES), shift, flags=_EXACT)
                store(builder, _same(_DOUBLES, 0), place)
                return builder.fptrunc(total, _FLOATS)

            once = rounded(sums, of_x)
            before, second, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.cbranch(builder.icmp_signed("!=", twice, _ADDRESS(0)), second, after)
            builder.position_at_end(second)
            small = builder.fmul(rounded(finer, of_finer), _same(_FLOATS, 1 / FINER))
            both = builder.fadd(once, small)
            builder.branch(after)
            builder.position_at_end(after)
            t = builder.phi(_FLOATS)
            t.add_incoming(once, before)
            t.add_incoming(both, second)
            t = builder.fmul(t, load(builder, fraction, _FLOATS))
            factor = builder.fmul(load(builder, power, _FLOATS), in_all_lanes(builder, row_power, _FLOATS))
            seen = builder.fcmp_ordered(">=", factor, _same(_FLOATS, float(LEAST_DROP)))
            t = builder.fmul(t, builder.select(seen, factor, _same(_FLOATS, 0)))
            store(builder, builder.fadd(load(builder, run, _FLOATS), t), run)
            return context.get_dummy_value()

        return types.void(
            *[types.intp] * 4, *[types.float64] * 2, *[types.intp] * 2, types.float32, types.intp
        ), generate

    return end


_end_group = _ender()


# ---- rows of x


def width_of_rows(inner: int, halves: bool) -> int:
    """Length of rows of x in fixed point: whole chunks of codes, zeros beyond K."""
    chunk = CHUNK * (2 if halves else 1)
    return -(-inner // chunk) * chunk


@njit(nogil=True, cache=True)
def _span(size: Any, chunk: Any) -> Any:  # pragma: no cover - compiled
    """Codes after which groups and chunks end together, at most ``LONGEST_SPAN`` and a group; else 0."""
    span = size
    while span % chunk != 0 and span < LONGEST_SPAN:
        span += size
    return span if span % chunk == 0 else 0


@njit(nogil=True, cache=True)
def in_dots(size: Any, halves: Any) -> Any:  # pragma: no cover - compiled
    """Whether groups are multiplied by the int8 dot product: whole steps of it, and soon whole chunks again."""
    if not DOTS:
        return False
    if BITS_OF_DIGIT == 16 and size > LONGEST_OF_SHORTS:
        return False
    step, chunk = (8, 2 * CHUNK) if halves else (4, CHUNK)
    return size % step == 0 and _span(size, chunk) > 0


@njit(nogil=True, cache=True)
def in_order(size: Any, halves: Any) -> Any:  # pragma: no cover - compiled
    """Whether one row of x meets codes in the order in which they lie: groups are whole vectors, halves or quarters."""
    length = size // 2 if halves else size
    return ORDERED and (length % CHUNK == 0 or length == CHUNK // 2 or length == CHUNK // 4)


def _reduced(builder: Any, vector: Any, how: str) -> Any:
    return builder.call(function(builder, f"llvm.vector.reduce.{how}.v16i32", _INT, [_INTS]), [vector])


@intrinsic  # type: ignore[untyped-decorator]
def _most_of_blocks(_: Any, bits: Any, blocks: Any) -> Any:
    """The largest magnitude of 16 float32 numbers a block: its bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits, blocks = arguments

        def block(i: Any, totals: list[Any]) -> list[Any]:
            found = builder.and_(load(builder, item_at(builder, bits, i, 4 * COLUMNS), _INTS), _same(_INTS, 0x7FFFFFFF))
            return [builder.select(builder.icmp_signed(">", found, totals[0]), found, totals[0])]

        return _reduced(builder, counted_loop(builder, blocks, [_same(_INTS, 0)], block)[0], "smax")

    return types.int32(types.intp, types.intp), generate


@intrinsic  # type: ignore[untyped-decorator]
def _round_blocks(_: Any, row: Any, blocks: Any, first: Any, second: Any, out: Any) -> Any:
    """``_round_group`` of 16 entries a block: how many are there in the lower 32 bits, how many are small above."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row, blocks, *factors, out = arguments
        first, second = (in_all_lanes(builder, factor, _FLOATS) for factor in factors)
        magnitude_of = function(builder, "llvm.fabs.v16f32", _FLOATS, [_FLOATS])
        rounded = function(builder, "llvm.rint.v16f32", _FLOATS, [_FLOATS])
        zero = _same(_FLOATS, 0)

        def block(i: Any, totals: list[Any]) -> list[Any]:
            v = load(builder, item_at(builder, row, i, 4 * COLUMNS), _FLOATS)
            there = builder.fcmp_ordered(">=", builder.call(magnitude_of, [v]), _same(_FLOATS, float(SMALLEST)))
            scaled = builder.fmul(builder.fmul(builder.select(there, v, zero), first), second)
            value = builder.fptosi(builder.call(rounded, [scaled]), _INTS)
            store(builder, value, item_at(builder, out, i, 4 * COLUMNS))
            below = builder.fcmp_ordered("<", builder.call(magnitude_of, [scaled]), _same(_FLOATS, float(SMALL)))
            counted = [builder.sext(lanes, _INTS) for lanes in (there, builder.and_(there, below))]
            return [builder.sub(total, one) for total, one in zip(totals, counted, strict=True)]

        totals = counted_loop(builder, blocks, [_same(_INTS, 0)] * 2, block)
        present, small = (builder.zext(_reduced(builder, total, "add"), _ADDRESS) for total in totals)
        return builder.or_(present, builder.shl(small, _ADDRESS(32)))

    return types.int64(types.intp, types.intp, types.float32, types.float32, types.intp), generate


@njit(nogil=True, cache=True)
def _most_of(bits: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    """The largest magnitude of float32 numbers, as bits."""
    blocks, most = (stop - start) // COLUMNS, np.int32(0)
    if blocks > 0:
        most = _most_of_blocks(bits.ctypes.data + 4 * start, blocks)
    for k in range(start + blocks * COLUMNS, stop):
        most = max(most, bits[k] & np.int32(0x7FFFFFFF))
    return np.int32(most)


@njit(nogil=True, cache=True)
def _round_group(
    row: Any, start: Any, stop: Any, first: Any, second: Any, out: Any
) -> Any:  # pragma: no cover - compiled
    """Entries of a group as integers, ``first * second`` times what they are; how many are not 0, and are small.

    Subnormal numbers count as zeros.
    """
    present, small, blocks = 0, 0, (stop - start) // COLUMNS
    if out.itemsize == 4 and blocks > 0:
        counts = _round_blocks(row.ctypes.data + 4 * start, blocks, first, second, out.ctypes.data + 4 * start)
        present, small = counts & 0xFFFFFFFF, counts >> 32
        start += blocks * COLUMNS
    for k in range(start, stop):
        v = row[k] if abs(row[k]) >= SMALLEST else np.float32(0)
        scaled = v * first * second
        out[k] = np.rint(scaled)
        there = np.int32(v != 0)
        present += there
        small += there & np.int32(abs(scaled) < SMALL)
    return present, small


@njit(nogil=True, cache=True)
def _sum_of(out: Any, start: Any, stop: Any) -> Any:  # pragma: no cover - compiled
    total = np.float64(0)
    for k in range(start, stop):
        total += out[k]
    return total


@njit(nogil=True, cache=True)
def prepare(
    x: Any, size: Any, halves: Any, powers: Any, integers: Any, sums: Any, exponent: Any, row_exponent: Any,
    row_power: Any, many: Any, wants: Any, bad: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Groups of ``size`` entries of float32 rows as integers ``rint(x * 2^(30 - exponent))``, and their sums.

    Of the integers of a row whose groups are multiplied ``in_dots``, four digits each, and two int32 of each sum.
    ``row_power`` is 2^(exponent - row_exponent), the latter the largest of a row. ``powers[i]`` is 2^(i - 256), 0 far
    below. ``many`` says which groups of which rows want a second pass, ``wants`` which rows have such a group, ``bad``
    which have a value that is not finite: they become zeros.
    """
    rows, inner = x.shape
    groups, dots = sums.shape[1], in_dots(size, halves)
    bits = x.view(np.int32)
    for m in range(rows):
        pattern, row, out = bits[m], x[m], integers[m]
        words = out.view(np.int32)  # for digits, that many bytes from the row's beginning
        most = np.int32(0)
        for g in range(groups):
            exponent[m, g] = _most_of(pattern, g * size, min(g * size + size, inner))
            most = max(most, exponent[m, g])
        bad[m] = most >= np.int32(0x7F800000)
        wants[m] = 0
        if dots:
            words[inner : out.shape[0]] = 0
        else:
            out[inner:] = 0
        leading = np.int32(-127)
        for g in range(groups):
            start, stop = g * size, min(g * size + size, inner)
            most = exponent[m, g]
            many[m, g] = 0
            if bad[m] or most < np.int32(0x00800000):  # subnormal numbers count as zeros
                exponent[m, g], sums[m, g] = -127, 0
                if dots:
                    words[start:stop] = 0
                else:
                    out[start:stop] = 0
                continue
            e = (most >> 23) - 127
            if (most & np.int32(0x7FFFFF)) > MOST_FRACTION:  # a larger one would carry into a fifth digit
                e += 1
            half = (BITS - e) >> 1
            first, second = powers[half + 256], powers[BITS - e - half + 256]
            if dots:
                present, small = _round_group(row, start, stop, first, second, words)
            else:
                present, small = _round_group(row, start, stop, first, second, out)
                sums[m, g] = _sum_of(out, start, stop)
            exponent[m, g] = e
            leading = max(leading, np.int32(e))
            if small * MANY > present:
                many[m, g] = wants[m] = 1
        row_exponent[m] = leading
        for g in range(groups):
            e = exponent[m, g]
            row_power[m, g] = powers[e - leading + 256] if e > -127 else np.float32(1)  # zeros: none is small
        if dots:
            _split(words, inner, halves, size, sums[m].view(np.int32))
            if rows == 1 and in_order(size, halves):
                _put_in_order(words, halves)


prepare_apart = apart(
    prepare,
    "void(float32[:,::1], int64, boolean, float32[::1], float64[:,::1], float64[:,::1], int32[:,::1], int32[::1], "
    "float32[:,::1], uint8[:,::1], uint8[::1], uint8[::1])",
)


@njit(nogil=True, cache=True)
def refine(
    x: Any, size: Any, halves: Any, powers: Any, exponent: Any, many: Any, finer: Any, sums: Any
) -> None:  # pragma: no cover - compiled
    """``finer``: what ``prepare`` rounded away, times 2^31, where ``many`` asks for it; and its sums.

    Of rows of which no group asks, nothing is written that is read.
    """
    dots = in_dots(size, halves)
    for m in range(x.shape[0]):
        row, out = x[m], finer[m]
        words = out.view(np.int32)
        if not many[m].any():
            if not dots:  # multiplied with the others, and unread
                out[:] = 0
            continue
        out[:] = 0
        for g in range(sums.shape[1]):
            start, stop = g * size, min(g * size + size, x.shape[1])
            sums[m, g] = 0
            if many[m, g]:
                half = (BITS - exponent[m, g]) >> 1
                first, second = powers[half + 256], powers[BITS - exponent[m, g] - half + 256]
                for k in range(start, stop):
                    v = row[k] if abs(row[k]) >= SMALLEST else np.float32(0)
                    scaled = v * first * second
                    value = np.rint((scaled - np.rint(scaled)) * np.float32(FINER))
                    if dots:
                        words[k] = np.int32(value)
                    else:
                        out[k] = value
                if not dots:
                    sums[m, g] = _sum_of(out, start, stop)
        if dots:
            _split(words, x.shape[1], halves, size, sums[m].view(np.int32))


refine_apart = apart(
    refine,
    "void(float32[:,::1], int64, boolean, float32[::1], int32[:,::1], uint8[:,::1], float64[:,::1], float64[:,::1])",
)


# ---- what both forms of the product do


@njit(nogil=True, cache=True)
def _chunk_of_rows(w: Any, first: Any, here: Any, at: Any, rest: Any) -> Any:  # pragma: no cover - compiled
    """Address and stride of ``CHUNK`` bytes, from ``at`` on, of rows of the weight; of a copy where fewer are left."""
    if at + CHUNK <= w.shape[1]:
        return w.ctypes.data + first * w.strides[0] + at, w.strides[0]
    for n in range(here):
        for i in range(at, w.shape[1]):
            rest[n, i - at] = w[first + n, i]
    return rest.ctypes.data, CHUNK


@intrinsic  # type: ignore[untyped-decorator]
def end_run(_: Any, run: Any, total: Any, rows: Any) -> Any:
    """Add the sums of up to ``RUN`` groups, 16 of each of ``rows``, to those of all, and begin anew."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        run, total, rows = arguments

        def row(m: Any, none: list[Any]) -> list[Any]:
            at = [item_at(builder, start, m, 4 * COLUMNS) for start in (run, total)]
            both = builder.fadd(*(load(builder, place, _FLOATS) for place in at))
            for place, vector in zip(at, (_same(_FLOATS, 0), both), strict=True):
                store(builder, vector, place)
            return none

        counted_loop(builder, rows, [], row)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@njit(nogil=True, cache=True)
def finish_tile(
    total: Any, row_exponent: Any, exponent: Any, powers: Any, bias: Any, bad: Any, y: Any
) -> None:  # pragma: no cover - compiled
    """Columns of the result: sums times their powers of two, and the bias."""
    for m in range(y.shape[0]):
        for lane in range(y.shape[1]):
            e = row_exponent[m] + exponent[lane] - BITS
            half = e >> 1
            v = total[m, lane] * powers[half + 256] * powers[e - half + 256]
            # NaN < t is False, so this order keeps NaN
            v = (np.float32(0) if abs(v) < SMALLEST else v) + bias[lane]
            v = np.float32(0) if abs(v) < SMALLEST else v
            y[m, lane] = np.float32(np.nan) if bad[m] else v


# ---- by the processor's int8 dot product


_LOOK_UP = "llvm.x86.avx512.pshuf.b.512" if LANES == 16 else "llvm.x86.avx2.pshuf.b"
_BYTE, _SHORT = ir.IntType(8), ir.IntType(16)
_WORDS, _BYTES, _SHORTS = (ir.VectorType(item, LANES * n) for item, n in ((_INT, 1), (_BYTE, 4), (_SHORT, 2)))
DIGITS = 32 // BITS_OF_DIGIT
_BASE = float(1 << BITS_OF_DIGIT)
_PARTS = range(0, COLUMNS, LANES)


def _in_parts(builder: Any, columns: Any) -> list[Any]:
    """Vectors of as many lanes as the processor has."""
    if LANES == COLUMNS:
        return [columns]
    return [shuffled(builder, columns, columns, list(range(i, i + LANES))) for i in _PARTS]


def _as_one(builder: Any, parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else shuffled(builder, *parts, list(range(COLUMNS)))


def _pairs_of(builder: Any, codes: Any) -> list[Any]:
    """What of four unsigned bytes a lane meets digits at a time: all, or as shorts the even ones, and the odd ones."""
    if BITS_OF_DIGIT == 8:
        return [codes]
    shorts = builder.bitcast(codes, _SHORTS)
    return [builder.and_(shorts, _same(_SHORTS, 255)), builder.lshr(shorts, _same(_SHORTS, 8))]


def _dot(builder: Any, total: Any, codes: Any, digit: Any) -> Any:
    """``vpdpbusd`` adds four products of an unsigned byte and a signed one, ``vpmaddwd`` two of shorts."""
    if BITS_OF_DIGIT == 8:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * LANES}"
        return builder.call(function(builder, name, _WORDS, [_WORDS] * 3), [total, codes, digit])
    name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
    multiply = function(builder, name, _WORDS, [_SHORTS] * 2)
    return builder.add(total, builder.call(multiply, [codes, builder.bitcast(digit, _SHORTS)]))


def numbers_for_dots(builder: Any, halves: bool, looked_up: bool, table: Any, flip: Any) -> Any:
    """What makes unsigned numbers of a vector of codes; of codes of 4 bits those at even and at odd positions.

    ``table`` and ``flip`` are as ``_decoder`` has them, but that the table holds 64 bytes, of which ``looked_up`` makes
    use.
    """
    look_up = function(builder, _LOOK_UP, _BYTES, [_BYTES, _BYTES])
    numbers, low = load(builder, table, _BYTES), _same(_WORDS, 0x0F0F0F0F)
    flipped = in_all_lanes(builder, builder.trunc(flip, _INT), _WORDS)

    def numbers_of(words: Any) -> list[Any]:
        found = [words, builder.lshr(words, _same(_WORDS, 4))] if halves else [words]
        if not looked_up:
            found = [builder.xor(part, flipped) for part in found]  # and the next step: one instruction
        if halves:
            found = [builder.and_(part, low) for part in found]
        if looked_up:
            places = [builder.bitcast(c, _BYTES) for c in found]
            found = [builder.bitcast(builder.call(look_up, [numbers, p]), _WORDS) for p in places]
        return found

    return numbers_of


def _put_unsigned(
    builder: Any, halves: bool, looked_up: bool, starts: list[Any], table: Any, flip: Any, ahead: Any, out: Any
) -> None:
    """``CHUNK`` bytes of 16 rows as unsigned numbers, four codes of each of 16 columns in a vector.

    ``ahead`` says how far ahead memory is read into the second cache. A tile of the weight whose rows are a power of
    two apart does not fit the first one.
    """
    for start in starts:
        read_ahead(builder, builder.add(start, ahead))
    numbers_of = numbers_for_dots(builder, halves, looked_up, table, flip)
    for first, column in itertools.product(range(0, CHUNK // 4, LANES), _PARTS):
        block = [builder.add(start, _ADDRESS(4 * first)) for start in starts[column : column + LANES]]
        for i, words in enumerate(_transposed(builder, [load(builder, at, _WORDS) for at in block])):
            found = numbers_of(words)
            for v, vector in enumerate(found):
                place = CHUNK * ((first + i) * len(found) + v) + 4 * column
                store(builder, vector, builder.add(out, _ADDRESS(place)))


def _unsigned_of(halves: bool, looked_up: bool = False) -> Any:
    """``_put_unsigned`` of up to 16 rows: after the last that is there it comes again."""

    @intrinsic  # type: ignore[untyped-decorator]
    def decode(_: Any, w: Any, stride: Any, there: Any, table: Any, flip: Any, ahead: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, stride, there, table, flip, ahead, out = arguments
            starts = _rows_of_tile(builder, w, stride, there)
            _put_unsigned(builder, halves, looked_up, starts, table, flip, ahead, out)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return decode


def _rounded(builder: Any, digits: list[Any], short: bool, less: Any, entries: list[Any]) -> Any:
    """The sum of digits times powers of their base, rounded once to float32.

    ``short``: the sums of upper and lower digits fit int32. ``upper * 2^16 + lower`` is then ``high * 2^24 + low``,
    ``0 <= low < 2^24``, both of them floats. Else what zero points are more than unsigned codes, ``less``, times the
    entries' sums, as upper and lower digits, is still to be added.
    """
    if short:
        pairs = len(digits) // 2
        lower, upper = (
            digits[i] if pairs == 1 else builder.add(builder.shl(digits[i + 1], _same(_INTS, BITS_OF_DIGIT)), digits[i])
            for i in (0, pairs)
        )
        upper = builder.add(upper, builder.ashr(lower, _same(_INTS, 16)))
        low = builder.or_(builder.shl(upper, _same(_INTS, 16)), builder.and_(lower, _same(_INTS, 0xFFFF)))
        low = builder.and_(low, _same(_INTS, 0xFFFFFF))
        high = builder.sitofp(builder.ashr(upper, _same(_INTS, 8)), _FLOATS)
        scaled = builder.fmul(high, _same(_FLOATS, 2.0**24), flags=_EXACT)
        return builder.fadd(scaled, builder.sitofp(low, _FLOATS), flags=_EXACT)
    total = builder.sitofp(digits[-1], _DOUBLES)
    for digit in digits[-2::-1]:
        scaled = builder.fmul(total, _same(_DOUBLES, _BASE), flags=_EXACT)
        total = builder.fadd(scaled, builder.sitofp(digit, _DOUBLES), flags=_EXACT)
    lower, upper = (builder.sitofp(v, _DOUBLE) for v in entries)
    of_x = builder.fadd(builder.fmul(upper, _DOUBLE(65536.0), flags=_EXACT), lower, flags=_EXACT)
    shift = builder.fmul(builder.sitofp(less, _DOUBLES), in_all_lanes(builder, of_x, _DOUBLES), flags=_EXACT)
    return builder.fptrunc(builder.fadd(total, shift, flags=_EXACT), _FLOATS)


class _OfGroups(NamedTuple):
    """Addresses and numbers of the groups of some columns and rows of x, in registers."""

    x: Any
    """Of digits of x, ``x_stride`` bytes from one row to the next."""
    finer: Any
    """The same of what a second pass multiplies."""
    x_stride: Any
    scale: Any
    """Of the bits of scales, 16 a group."""
    leading: Any
    """Of those of the exponents that they are relative to."""
    near: Any
    """Whether no scale, times a power of a row, is so far below them that it counts as 0."""
    zero: Any
    """Of zero points, 16 a group, ``z_step`` bytes from one to the next."""
    z_step: Any
    lowest: Any
    """What unsigned codes are less than meant."""
    of_x: Any
    """Of sums of the groups' entries of x, rows ``groups`` of them apart; ``of_finer`` in the second pass."""
    of_finer: Any
    row_power: Any
    """Of powers of the row's groups, likewise."""
    groups: Any
    run: Any
    """Of the sums of groups, 16 a row."""

    def after(self, builder: Any, count: Any, steps: Any) -> _OfGroups:
        """Those of one row from a group on, for codes of ``steps`` vectors a group."""
        return self._replace(
            x=item_at(builder, self.x, builder.mul(count, steps), 16),
            scale=item_at(builder, self.scale, count, 4 * COLUMNS),
            zero=builder.add(self.zero, builder.mul(count, self.z_step)),
            of_x=item_at(builder, self.of_x, count, 8),
            row_power=item_at(builder, self.row_power, count, 4),
        )


def _factors(builder: Any, of_groups: _OfGroups, g: Any, of_rows: list[Any]) -> list[Any]:
    """What rounded sums of a group are multiplied with: scales of 16 columns, times the powers of two of rows.

    Scales are divided by the powers of two of their columns' largest. What is far below counts as 0, of which nothing
    is where ``near``.
    """
    bits = load(builder, item_at(builder, of_groups.scale, g, 4 * COLUMNS), _INTS)
    largest = load(builder, of_groups.leading, _INTS)
    powers = [in_all_lanes(builder, of_row, _FLOATS) for of_row in of_rows]
    relative = builder.sub(bits, builder.sub(largest, _same(_INTS, 0x3F800000)))
    far, near, after = (builder.append_basic_block() for _ in range(3))
    builder.cbranch(builder.icmp_signed("!=", of_groups.near, _ADDRESS(0)), near, far)

    builder.position_at_end(near)
    scales = builder.bitcast(relative, _FLOATS)
    all_near = [builder.fmul(scales, power) for power in powers]
    builder.branch(after)

    builder.position_at_end(far)
    below = builder.sub(largest, builder.and_(bits, _same(_INTS, 0x7F800000)))
    seen = builder.icmp_signed("<=", below, _same(_INTS, 100 << 23))
    scales = builder.bitcast(builder.select(seen, relative, _same(_INTS, 0)), _FLOATS)
    some_near = []
    for power in powers:
        factor = builder.fmul(scales, power)
        magnitude = builder.and_(builder.bitcast(factor, _INTS), _same(_INTS, 0x7FFFFFFF))
        seen = builder.icmp_signed(">=", magnitude, _same(_INTS, LEAST_FACTOR))
        some_near.append(builder.select(seen, factor, _same(_FLOATS, 0)))
    builder.branch(after)

    builder.position_at_end(after)
    found = []
    for one, other in zip(all_near, some_near, strict=True):
        found.append(builder.phi(_FLOATS))
        found[-1].add_incoming(one, near)
        found[-1].add_incoming(other, far)
    return found


def _add_groups(
    builder: Any, rows: int, short: bool, twice: bool, numbers: Any, steps: Any, count: Any, of_groups: _OfGroups
) -> None:
    """Add ``count`` groups, of ``rows`` rows of x, to their run: ``steps`` vectors of four codes of 16 columns each.

    A sum of integers may pass the ends of int32 on its way, and is right where it ends within. So zero points times
    entries are what it begins with.
    """
    x, finer, x_stride, _, _, _, zero, z_step, lowest, of_x, of_finer, row_power, groups, run = of_groups
    of_rows = [builder.add(x, builder.mul(x_stride, _ADDRESS(m))) for m in range(rows)]
    in_sums = [item_at(builder, of_x, builder.mul(groups, _ADDRESS(m)), 8) for m in range(rows)]
    powers = [item_at(builder, row_power, builder.mul(groups, _ADDRESS(m)), 4) for m in range(rows)]
    if twice:
        of_rows.append(finer)
        in_sums.append(of_finer)
    lowest = in_all_lanes(builder, builder.trunc(lowest, _INT), _INTS)
    nothing = _same(_INTS, 0)
    runs = [builder.add(run, _ADDRESS(4 * COLUMNS * m)) for m in range(rows)]

    def group(g: Any, added: list[Any]) -> list[Any]:
        before = builder.mul(g, steps)

        def step(i: Any, totals: list[Any]) -> list[Any]:
            i = builder.add(before, i)
            start, at, new = item_at(builder, numbers, i, CHUNK), builder.shl(i, _ADDRESS(4)), list(totals)
            loaded = [load(builder, builder.add(start, _ADDRESS(4 * column)), _WORDS) for column in _PARTS]
            codes = [_pairs_of(builder, words) for words in loaded]
            for m, row in enumerate(of_rows):
                entry = builder.add(row, at)
                for word in range(4):  # digits of bytes, or the even and the odd ones of a digit of shorts
                    of_entry = load(builder, builder.add(entry, _ADDRESS(4 * word)), _INT)
                    digit = in_all_lanes(builder, of_entry, _WORDS)
                    d, pair = divmod(word, 4 // DIGITS)
                    for part in range(len(_PARTS)):
                        place = (m * DIGITS + d) * len(_PARTS) + part
                        new[place] = _dot(builder, new[place], codes[part][pair], digit)
            return new

        less = builder.sub(lowest, load(builder, builder.add(zero, builder.mul(g, z_step)), _INTS))
        entries, starts = [], []
        for place in in_sums:
            place = item_at(builder, place, g, 8)
            entries.append([load(builder, builder.add(place, _ADDRESS(4 * i)), _INT) for i in (0, 1)])
            for d in range(DIGITS):
                half, first = divmod(d, DIGITS // 2)
                start = builder.mul(less, in_all_lanes(builder, entries[-1][half], _INTS))
                starts += _in_parts(builder, start if short and first == 0 else nothing)
        sums = counted_loop(builder, steps, starts, step)
        found = [_as_one(builder, sums[i : i + len(_PARTS)]) for i in range(0, len(sums), len(_PARTS))]
        factors = _factors(builder, of_groups, g, [load(builder, item_at(builder, at, g, 4), _FLOAT) for at in powers])

        def rounded(m: int) -> Any:
            return _rounded(builder, found[m * DIGITS : m * DIGITS + DIGITS], short, less, entries[m])

        new = []
        for m in range(rows):
            t = rounded(m)
            if twice:
                t = builder.fadd(t, builder.fmul(rounded(rows), _same(_FLOATS, 1 / FINER)))
            new.append(builder.fadd(added[m], builder.fmul(t, factors[m])))
        return new

    for place, vector in zip(
        runs, counted_loop(builder, count, [load(builder, place, _FLOATS) for place in runs], group), strict=True
    ):
        store(builder, vector, place)


def _groups_of(rows: int, short: bool, twice: bool = False) -> Any:
    """``_add_groups`` of codes that are unsigned numbers in memory."""

    @intrinsic  # type: ignore[untyped-decorator]
    def groups_of(
        _: Any, numbers: Any, steps: Any, count: Any, x: Any, finer: Any, x_stride: Any, scale: Any, leading: Any,
        near: Any, zero: Any, z_step: Any, lowest: Any, of_x: Any, of_finer: Any, row_power: Any, groups: Any, run: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            numbers, steps, count, *others = arguments
            _add_groups(builder, rows, short, twice, numbers, steps, count, _OfGroups(*others))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 17), generate

    return groups_of


def _spans_of(halves: bool, looked_up: bool = False) -> Any:
    """``_put_unsigned`` and ``_add_groups`` in turns, for one row of x, 16 rows of the weight and short sums.

    That is what ``_add_strip`` does, ``spans`` times ``pieces`` chunks and then ``count`` groups, without the calls,
    which take a third of the time.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def spans_of(
        _: Any, w: Any, stride: Any, table: Any, flip: Any, ahead: Any, spans: Any, pieces: Any, numbers: Any,
        steps: Any, count: Any, x: Any, scale: Any, leading: Any, near: Any, zero: Any, z_step: Any, lowest: Any,
        of_x: Any, row_power: Any, run: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, stride, table, flip, ahead, spans, pieces, numbers, steps, count, x, *others = arguments
            *others, of_x, row_power, run = others
            no = _ADDRESS(0)
            of_groups = _OfGroups(x, no, no, *others, of_x, no, row_power, no, run)
            fours = [builder.add(w, builder.mul(stride, _ADDRESS(4 * i))) for i in range(COLUMNS // 4)]
            chunk = COLUMNS * CHUNK * (2 if halves else 1)

            def span(s: Any, none: list[Any]) -> list[Any]:
                def piece(i: Any, none: list[Any]) -> list[Any]:
                    at = builder.shl(builder.add(builder.mul(s, pieces), i), _ADDRESS(CHUNK.bit_length() - 1))
                    here = [builder.add(four, at) for four in fours]
                    starts = [builder.add(four, builder.mul(stride, _ADDRESS(i))) for four in here for i in range(4)]
                    _put_unsigned(
                        builder, halves, looked_up, starts, table, flip, ahead, item_at(builder, numbers, i, chunk)
                    )
                    return none

                counted_loop(builder, pieces, [], piece)
                first = builder.mul(s, count)
                _add_groups(builder, 1, True, False, numbers, steps, count, of_groups.after(builder, first, steps))
                return none

            counted_loop(builder, spans, [], span)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 20), generate

    return spans_of


def _sums_of_fours(builder: Any, rows: list[Any]) -> Any:
    """Of each four lanes of four vectors the sum: those of the first four lanes, of the four vectors, come first."""
    pairs, fours = [], range(0, COLUMNS, 4)
    for two in (rows[:2], rows[2:]):  # lanes 0 and 2 of the first vector and of the second, then lanes 1 and 3
        order = [lane for q in fours for lane in (q, COLUMNS + q, q + 1, COLUMNS + q + 1)]
        pairs.append(builder.add(*(shuffled(builder, *two, [lane + i for lane in order]) for i in (0, 2))))
    order = [lane for q in fours for lane in (q, q + 1, COLUMNS + q, COLUMNS + q + 1)]
    return builder.add(*(shuffled(builder, *pairs, [lane + i for lane in order]) for i in (0, 2)))


def _fours_transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Four vectors of four times four lanes, rows for columns."""
    found = []
    for half in (0, 8):
        order = [first + half + lane for first in (0, COLUMNS) for lane in range(8)]
        pairs = [shuffled(builder, *two, order) for two in (rows[:2], rows[2:])]
        for i in (0, 4):
            order = [first + i + lane for first in range(0, 2 * COLUMNS, 8) for lane in range(4)]
            found.append(shuffled(builder, *pairs, order))
    return found


def _in_order(groups: int, halves: bool, looked_up: bool = False) -> Any:
    """Add groups of one row of x and 16 rows of the weight to their run, codes met in the order in which they lie.

    ``units`` of ``vectors`` vectors of a row's codes, which are one group; or of one vector, which is 2 or 4
    ``groups``. ``ordered`` are digits of x as ``_put_in_order`` leaves them; ``sums`` is room for 8 vectors. It makes
    the sums of four rows a step of a loop, for which registers suffice.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def in_order(
        _: Any, w: Any, stride: Any, table: Any, flip: Any, ahead: Any, units: Any, vectors: Any, sums: Any,
        ordered: Any, scale: Any, leading: Any, near: Any, zero: Any, z_step: Any, lowest: Any, of_x: Any,
        row_power: Any, run: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, stride, table, flip, ahead, units, vectors, sums, ordered, *others = arguments
            scale, leading, near, zero, z_step, lowest, of_x, row_power, run = others
            no = _ADDRESS(0)
            of_groups = _OfGroups(no, no, no, scale, leading, near, zero, z_step, lowest, of_x, no, row_power, no, run)
            numbers_of = numbers_for_dots(builder, halves, looked_up, table, flip)
            lowest, nothing = in_all_lanes(builder, builder.trunc(lowest, _INT), _INTS), _same(_INTS, 0)
            parts = 2 if halves else 1

            def codes_and_digits(starts: list[Any], vector: Any, v: Any) -> tuple[list[Any], list[Any]]:
                entry = item_at(builder, ordered, vector, 4 * parts * CHUNK)
                places = [builder.add(entry, _ADDRESS(CHUNK * i)) for i in range(4 * parts)]
                numbers = []
                for start in starts:
                    here = item_at(builder, start, v, CHUNK)
                    read_ahead(builder, builder.add(here, ahead))
                    numbers.append(numbers_of(load(builder, here, _INTS)))
                return numbers, [load(builder, place, _INTS) for place in places]

            def dots(total: Any, numbers: list[Any], digits: list[Any]) -> Any:
                for codes, digit in zip(numbers, digits, strict=True):
                    total = _dot(builder, total, codes, digit)
                return total

            def sums_of_digits(starts: list[Any], first: Any) -> list[Any]:
                """Of the lower two digits of x and four rows, then of the upper two: each pair as one int32."""
                if groups > 1:
                    numbers, digits = codes_and_digits(starts, first, _ADDRESS(0))
                    found = []
                    for d in (0, 2):
                        for row in numbers:
                            upper, lower = (dots(nothing, row, digits[d + i :: 4]) for i in (1, 0))
                            found.append(builder.add(builder.shl(upper, _same(_INTS, 8)), lower))
                    return found

                def vector(v: Any, totals: list[Any]) -> list[Any]:
                    numbers, digits = codes_and_digits(starts, builder.add(first, v), v)
                    return [dots(total, numbers[i // 4], digits[i % 4 :: 4]) for i, total in enumerate(totals)]

                found = counted_loop(builder, vectors, [nothing] * 16, vector)
                return [
                    builder.add(builder.shl(found[i + 1], _same(_INTS, 8)), found[i])
                    for d in (0, 2)
                    for i in range(d, 16, 4)
                ]

            def unit(u: Any, totals: list[Any]) -> list[Any]:
                first = builder.mul(u, vectors)

                def four(r: Any, none: list[Any]) -> list[Any]:
                    start = builder.add(
                        item_at(builder, w, first, CHUNK), item_at(builder, _ADDRESS(0), builder.mul(r, stride), 4)
                    )
                    starts = [builder.add(start, builder.mul(stride, _ADDRESS(i))) for i in range(4)]
                    found = sums_of_digits(starts, first)
                    for half in (0, 1):
                        place = item_at(builder, builder.add(sums, _ADDRESS(4 * CHUNK * half)), r, CHUNK)
                        store(builder, _sums_of_fours(builder, found[4 * half : 4 * half + 4]), place)
                    return none

                counted_loop(builder, _ADDRESS(COLUMNS // 4), [], four)
                places = [builder.add(sums, _ADDRESS(CHUNK * i)) for i in range(8)]
                loaded = [load(builder, place, _INTS) for place in places]
                quarters = [_fours_transposed(builder, loaded[i : i + 4]) for i in (0, 4)]
                [total] = totals
                for i in range(groups):
                    g = builder.add(builder.mul(u, _ADDRESS(groups)), _ADDRESS(i))
                    less = builder.sub(lowest, load(builder, builder.add(zero, builder.mul(g, z_step)), _INTS))
                    digits, entries = [], []
                    for half, of_half in enumerate(quarters):
                        place = item_at(builder, builder.add(of_x, _ADDRESS(4 * half)), g, 8)
                        entries.append(load(builder, place, _INT))
                        digit = builder.mul(less, in_all_lanes(builder, entries[-1], _INTS))
                        for quarter in of_half[i * 4 // groups : (i + 1) * 4 // groups]:
                            digit = builder.add(digit, quarter)
                        digits.append(digit)
                    t = _rounded(builder, digits, True, less, entries)
                    of_row = load(builder, item_at(builder, row_power, g, 4), _FLOAT)
                    [factor] = _factors(builder, of_groups, g, [of_row])
                    total = builder.fadd(total, builder.fmul(t, factor))
                return [total]

            store(builder, counted_loop(builder, units, [load(builder, run, _FLOATS)], unit)[0], run)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 18), generate

    return in_order


@intrinsic  # type: ignore[untyped-decorator]
def _columns_of(
    _: Any, of_rows: Any, stride: Any, there: Any, blocks: Any, mask: Any, out: Any, most: Any, least: Any
) -> Any:
    """Words of up to 16 rows as (words, 16), ``blocks`` of 16 of them.

    ``most`` and ``least`` become each column's largest and least of what ``mask`` leaves, and of what they are before.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        of_rows, stride, there, blocks, mask, out, most, least = arguments
        starts = _rows_of_tile(builder, of_rows, stride, there)
        masks = in_all_lanes(builder, builder.trunc(mask, _INT), _INTS)

        def block(i: Any, totals: list[Any]) -> list[Any]:
            high, low = totals
            at = builder.mul(i, _ADDRESS(4 * COLUMNS))
            place = builder.add(out, builder.mul(i, _ADDRESS(4 * COLUMNS * COLUMNS)))
            here = [builder.add(start, at) for start in starts]
            for words in _transposed(builder, [load(builder, address, _INTS) for address in here]):
                store(builder, words, place)
                place = builder.add(place, _ADDRESS(4 * COLUMNS))
                part = builder.and_(words, masks)
                high = builder.select(builder.icmp_signed(">", part, high), part, high)
                low = builder.select(builder.icmp_signed("<", part, low), part, low)
            return [high, low]

        firsts = [load(builder, place, _INTS) for place in (most, least)]
        for place, total in zip((most, least), counted_loop(builder, blocks, firsts, block), strict=True):
            store(builder, total, place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate


@intrinsic  # type: ignore[untyped-decorator]
def _read_rows_ahead(_: Any, start: Any, stride: Any) -> Any:
    """What ``_columns_of`` is to read of 16 rows, a block; beyond an array that does no harm."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        start, stride = arguments
        for i in range(COLUMNS):
            read_ahead(builder, builder.add(start, builder.mul(stride, _ADDRESS(i))))
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


_unsigned_of_bytes, _unsigned_of_halves = _unsigned_of(False), _unsigned_of(True)
_unsigned_by_table = _unsigned_of(True, True)
_long_of_one, _long_of_two, _long_of_four = (_groups_of(rows, short=False) for rows in (1, 2, 4))
_short_of_one, _short_of_two, _short_of_four = (_groups_of(rows, short=True) for rows in (1, 2, 4))
_spans_of_bytes, _spans_of_halves, _spans_by_table = _spans_of(False), _spans_of(True), _spans_of(True, True)
_bytes_of_one_group, _bytes_of_two, _bytes_of_four = (_in_order(groups, False) for groups in (1, 2, 4))
_halves_of_one_group, _halves_of_two, _halves_of_four = (_in_order(groups, True) for groups in (1, 2, 4))
_one_group_by_table, _two_by_table, _four_by_table = (_in_order(groups, True, True) for groups in (1, 2, 4))
_long_twice, _short_twice = _groups_of(1, short=False, twice=True), _groups_of(1, short=True, twice=True)


def _digits_of(halves: bool) -> Any:
    """Words of 31 bits and a sign, 16 a block, as their signed digits, where they lie: 16 bytes for four codes.

    Of bytes, four of a digit lie together, of shorts the first and third, then the second and fourth. Of ``halves`` the
    four at even positions of eight come before those at odd ones. ``value + 0x808080`` has in its bytes the digits, 128
    more than they are but for the uppermost, since what is above 127 carries; so do shorts with ``0x8000``.
    """
    bias = 0x808080 if BITS_OF_DIGIT == 8 else 0x8000
    place_of = [4 * four + i for four in range(4) for i in range(4)]
    if halves:
        place_of = [8 * eight + 2 * i + odd for eight in range(2) for odd in range(2) for i in range(4)]
    order: list[int] = []
    for four in range(0, 16, 4):
        codes = place_of[four : four + 4]
        if BITS_OF_DIGIT == 8:
            order += [4 * code + digit for digit in range(4) for code in codes]
        else:
            order += [4 * codes[i] + 2 * digit + byte for digit in range(2) for i in (0, 2, 1, 3) for byte in range(2)]

    @intrinsic  # type: ignore[untyped-decorator]
    def digits_of(_: Any, words: Any, blocks: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            words, blocks = arguments
            several = ir.VectorType(ir.IntType(8), 4 * COLUMNS)

            def block(i: Any, none: list[Any]) -> list[Any]:
                place = item_at(builder, words, i, 4 * COLUMNS)
                value = builder.add(load(builder, place, _INTS), _same(_INTS, bias))
                digits = builder.bitcast(builder.xor(value, _same(_INTS, bias)), several)
                store(builder, shuffled(builder, digits, digits, order), place)
                return none

            counted_loop(builder, blocks, [], block)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), generate

    return digits_of


def _apart(count: int) -> Any:
    """Of ``count`` words that lie side by side again and again, each in a vector of its own, 16 times."""

    @intrinsic  # type: ignore[untyped-decorator]
    def apart(_: Any, words: Any, out: Any, blocks: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            words, out, blocks = arguments

            def block(i: Any, none: list[Any]) -> list[Any]:
                here, there = (item_at(builder, start, i, 4 * COLUMNS * count) for start in (words, out))
                found = [load(builder, builder.add(here, _ADDRESS(4 * COLUMNS * v)), _INTS) for v in range(count)]
                vectors = [found]
                while len(vectors) < count:  # those at even places, and those at odd ones, of twice as many
                    vectors = [
                        [
                            shuffled(builder, a, b, list(range(odd, 2 * COLUMNS, 2)))
                            for a, b in zip(some[::2], some[1::2], strict=True)
                        ]
                        for odd in range(2)
                        for some in vectors
                    ]
                for v, [vector] in enumerate(vectors):
                    store(builder, vector, builder.add(there, _ADDRESS(4 * COLUMNS * v)))
                return none

            counted_loop(builder, blocks, [], block)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 3), generate

    return apart


_digits_of_bytes, _digits_of_halves = _digits_of(False), _digits_of(True)
_apart_by_four, _apart_by_eight = _apart(4), _apart(8)


@intrinsic  # type: ignore[untyped-decorator]
def _sums_of_blocks(_: Any, words: Any, blocks: Any) -> Any:
    """The sum of lower digits of 16 integers a block, and above 32 bits that of upper ones."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words, blocks = arguments
        half = _same(_INTS, HALF)

        def block(i: Any, totals: list[Any]) -> list[Any]:
            value = load(builder, item_at(builder, words, i, 4 * COLUMNS), _INTS)
            low = builder.sub(builder.and_(builder.add(value, half), _same(_INTS, 0xFFFF)), half)
            upper = builder.ashr(builder.sub(value, low), _same(_INTS, 16))
            return [builder.add(total, one) for total, one in zip(totals, (low, upper), strict=True)]

        totals = counted_loop(builder, blocks, [_same(_INTS, 0)] * 2, block)
        lower, upper = (_reduced(builder, total, "add") for total in totals)
        return builder.or_(builder.zext(lower, _ADDRESS), builder.shl(builder.zext(upper, _ADDRESS), _ADDRESS(32)))

    return types.int64(types.intp, types.intp), generate


@njit(nogil=True, cache=True)
def _split(words: Any, inner: Any, halves: Any, size: Any, sums: Any) -> None:  # pragma: no cover - compiled
    """Integers of 31 bits, in the first half of ``words``, as signed digits, as ``_digits_of`` leaves them.

    ``sums`` become those of lower and of upper digits, two for each group of ``size``.
    """
    for g in range(sums.shape[0] // 2):
        start, stop = g * size, min(g * size + size, inner)
        lower, upper, blocks = np.int32(0), np.int32(0), (stop - start) // COLUMNS
        if blocks > 0:
            both = _sums_of_blocks(words.ctypes.data + 4 * start, blocks)
            lower, upper = np.int32(both), np.int32(both >> 32)
        for k in range(start + blocks * COLUMNS, stop):
            value = words[k]
            low = ((value + np.int32(HALF)) & np.int32(0xFFFF)) - np.int32(HALF)
            lower += low
            upper += (value - low) >> np.int32(16)
        sums[2 * g], sums[2 * g + 1] = lower, upper
    blocks = words.shape[0] // (2 * COLUMNS)
    if halves:
        _digits_of_halves(words.ctypes.data, blocks)
    else:
        _digits_of_bytes(words.ctypes.data, blocks)


@njit(nogil=True, cache=True)
def _put_in_order(words: Any, halves: Any) -> None:  # pragma: no cover - compiled
    """Digits that ``_split`` has left in the first half of a row, in the other half, a vector of each digit.

    Those of as many codes as ``CHUNK`` bytes have; those at even positions before those at odd ones, where bytes have
    two.
    """
    length = words.shape[0] // 2
    start = words.ctypes.data
    if halves:
        _apart_by_eight(start, start + 4 * length, length // (8 * COLUMNS))
    else:
        _apart_by_four(start, start + 4 * length, length // (4 * COLUMNS))


@njit(nogil=True, cache=True)
def _in_columns(
    of_rows: Any, by: Any, here: Any, groups: Any, last: Any, mask: Any, out: Any, most: Any, least: Any
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """``_columns_of`` of rows of any length, all by addresses; ``last`` is of what ``_put_last`` makes of them."""
    whole = groups // COLUMNS
    if whole > 0:
        _columns_of(of_rows, by, here, whole, mask, out, most, least)
    if groups % COLUMNS > 0:
        _columns_of(last, 4 * COLUMNS, here, 1, mask, out + whole * 4 * COLUMNS * COLUMNS, most, least)


@njit(nogil=True, cache=True)
def _put_last(of_rows: Any, first: Any, here: Any, last: Any) -> None:  # pragma: no cover - compiled
    """What no block of 16 words holds of 16 rows, or of the only one there is; then the last word again."""
    groups = of_rows.shape[1]
    for n in range(here):
        for i in range(COLUMNS):
            last[n, i] = of_rows[min(first + n, of_rows.shape[0] - 1), min(groups // COLUMNS * COLUMNS + i, groups - 1)]


@njit(nogil=True, cache=True)
def add_to_rows(
    codes: Any, steps: Any, count: Any, short: Any, x: Any, by: Any, scale: Any, leading: Any, near: Any, zero: Any,
    z_step: Any, lowest: Any, of_x: Any, row_power: Any, groups: Any, run: Any, rows: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """``count`` groups of ``rows`` rows of x, of which none wants a second pass; operands are ``_groups_of``'s."""
    while rows > 0:
        several = 4 if rows >= 4 and MOST_IN_DOTS == 4 else 2 if rows >= 2 else 1
        if short and several == 4:
            _short_of_four(
                codes, steps, count, x, 0, by, scale, leading, near, zero, z_step, lowest, of_x, 0, row_power, groups,
                run,
            )  # fmt: skip
        elif short and several == 2:
            _short_of_two(
                codes, steps, count, x, 0, by, scale, leading, near, zero, z_step, lowest, of_x, 0, row_power, groups,
                run,
            )  # fmt: skip
        elif short:
            _short_of_one(
                codes, steps, count, x, 0, by, scale, leading, near, zero, z_step, lowest, of_x, 0, row_power, groups,
                run,
            )  # fmt: skip
        elif several == 4:
            _long_of_four(
                codes, steps, count, x, 0, by, scale, leading, near, zero, z_step, lowest, of_x, 0, row_power, groups,
                run,
            )  # fmt: skip
        elif several == 2:
            _long_of_two(
                codes, steps, count, x, 0, by, scale, leading, near, zero, z_step, lowest, of_x, 0, row_power, groups,
                run,
            )  # fmt: skip
        else:
            _long_of_one(
                codes, steps, count, x, 0, by, scale, leading, near, zero, z_step, lowest, of_x, 0, row_power, groups,
                run,
            )  # fmt: skip
        x, of_x, row_power = x + several * by, of_x + several * groups * 8, row_power + several * groups * 4
        run, rows = run + several * 4 * COLUMNS, rows - several


@njit(nogil=True, cache=True)
def add_to_rows_twice(
    codes: Any, steps: Any, count: Any, short: Any, x: Any, finer: Any, by: Any, scale: Any, leading: Any, near: Any,
    zero: Any, z_step: Any, lowest: Any, of_x: Any, of_finer: Any, row_power: Any, run: Any, many: Any, first: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """The same where groups, from ``first`` on, may want a second pass: one row and one group at a time."""
    rows, groups = many.shape
    for m in range(rows):
        for i in range(count):
            c, e, s, z = (
                codes + i * steps * CHUNK,
                x + m * by + i * steps * 16,
                scale + i * 4 * COLUMNS,
                zero + i * z_step,
            )
            at, r = m * groups + i, run + m * 4 * COLUMNS
            o, p = of_x + at * 8, row_power + at * 4
            f, second = finer + m * by + i * steps * 16, of_finer + at * 8
            if many[m, first + i] == 0:
                add_to_rows(c, steps, 1, short, e, by, s, leading, near, z, z_step, lowest, o, p, groups, r, 1)
            elif short:
                _short_twice(c, steps, 1, e, f, by, s, leading, near, z, z_step, lowest, o, second, p, groups, r)
            else:
                _long_twice(c, steps, 1, e, f, by, s, leading, near, z, z_step, lowest, o, second, p, groups, r)


@njit(nogil=True, cache=True)
def _add_in_order(
    w: Any, stride: Any, table: Any, flip: Any, ahead: Any, halves: Any, tabled: Any, size: Any, count: Any, sums: Any,
    ordered: Any, scale: Any, leading: Any, near: Any, zero: Any, z_step: Any, lowest: Any, of_x: Any, row_power: Any,
    run: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """``count`` groups of one row, whole vectors of codes; operands are ``_in_order``'s."""
    length = size // 2 if halves else size
    if tabled and length >= CHUNK:
        _one_group_by_table(
            w, stride, table, flip, ahead, count, length // CHUNK, sums, ordered, scale, leading, near, zero, z_step,
            lowest, of_x, row_power, run,
        )  # fmt: skip
    elif tabled and length == CHUNK // 2:
        _two_by_table(
            w, stride, table, flip, ahead, count // 2, 1, sums, ordered, scale, leading, near, zero, z_step,
            lowest, of_x, row_power, run,
        )  # fmt: skip
    elif tabled:
        _four_by_table(
            w, stride, table, flip, ahead, count // 4, 1, sums, ordered, scale, leading, near, zero, z_step,
            lowest, of_x, row_power, run,
        )  # fmt: skip
    elif halves and length >= CHUNK:
        _halves_of_one_group(
            w, stride, table, flip, ahead, count, length // CHUNK, sums, ordered, scale, leading, near, zero, z_step,
            lowest, of_x, row_power, run,
        )  # fmt: skip
    elif halves and length == CHUNK // 2:
        _halves_of_two(
            w, stride, table, flip, ahead, count // 2, 1, sums, ordered, scale, leading, near, zero, z_step,
            lowest, of_x, row_power, run,
        )  # fmt: skip
    elif halves:
        _halves_of_four(
            w, stride, table, flip, ahead, count // 4, 1, sums, ordered, scale, leading, near, zero, z_step,
            lowest, of_x, row_power, run,
        )  # fmt: skip
    elif length >= CHUNK:
        _bytes_of_one_group(
            w, stride, table, flip, ahead, count, length // CHUNK, sums, ordered, scale, leading, near, zero, z_step,
            lowest, of_x, row_power, run,
        )  # fmt: skip
    elif length == CHUNK // 2:
        _bytes_of_two(
            w, stride, table, flip, ahead, count // 2, 1, sums, ordered, scale, leading, near, zero, z_step,
            lowest, of_x, row_power, run,
        )  # fmt: skip
    else:
        _bytes_of_four(
            w, stride, table, flip, ahead, count // 4, 1, sums, ordered, scale, leading, near, zero, z_step,
            lowest, of_x, row_power, run,
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _by_nothing(*arguments: Any) -> Any:  # pragma: no cover - compiled
    """In place of a form whose instructions the processor lacks, which nothing then asks for."""
    return False


_by_order = _add_in_order if ORDERED else _by_nothing


@njit(nogil=True, cache=True)
def put_next_wanted(many: Any, following: Any) -> None:  # pragma: no cover - compiled
    """For each group, and after the last: the first from it on that wants a second pass of any row, or ``groups``."""
    groups = many.shape[1]
    following[:] = groups
    for m in range(many.shape[0]):
        for g in range(groups):
            if many[m, g] != 0:
                following[g] = g
    for g in range(groups - 1, -1, -1):
        following[g] = min(following[g], following[g + 1])


@njit(nogil=True, cache=True)
def _add_span(
    w: Any, stride: Any, length: Any, here: Any, rest: Any, halves: Any, tabled: Any, unsigned: Any, word: Any,
    size: Any, part: Any, numbers: Any, short: Any, x: Any, finer: Any, by: Any, scale: Any, leading: Any, near: Any,
    zero: Any, z_step: Any, lowest: Any, of_x: Any, of_finer: Any, row_power: Any, many: Any, twice: Any, first: Any,
    run: Any, total: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Groups from ``first`` on, of ``part`` codes: decoded, then all rows of x; ``twice`` if any wants a second pass.

    ``w`` and the other addresses are of that group; ``length`` are the bytes from there to the end of a row.
    """
    rows, groups = many.shape
    chunk, step, ahead = CHUNK * 2 if halves else CHUNK, 8 if halves else 4, COLUMNS * stride
    out = numbers
    for at in range(0, (part + 1) // 2 if halves else part, CHUNK):
        start, apart = w + at, stride
        if at + CHUNK > length:
            start, apart = rest, CHUNK
        if tabled:
            _unsigned_by_table(start, apart, here, unsigned, word, ahead, out)
        elif halves:
            _unsigned_of_halves(start, apart, here, unsigned, word, ahead, out)
        else:
            _unsigned_of_bytes(start, apart, here, unsigned, word, ahead, out)
        out += chunk * COLUMNS
    done = 0
    while done < part:
        i = done // size
        count = max((part - done) // size, 1)  # of which sixteen end a run, as whole spans do
        steps = (min(size, part - done) + step - 1) // step * step // 4
        codes, e, f = numbers + done * COLUMNS, x + done * 4, finer + done * 4
        s, z, o, second, p = (
            scale + i * 4 * COLUMNS,
            zero + i * z_step,
            of_x + i * 8,
            of_finer + i * 8,
            row_power + i * 4,
        )
        if twice:
            add_to_rows_twice(
                codes, steps, count, short, e, f, by, s, leading, near, z, z_step, lowest, o, second, p, run, many,
                first + i,
            )  # fmt: skip
        else:
            add_to_rows(codes, steps, count, short, e, by, s, leading, near, z, z_step, lowest, o, p, groups, run, rows)
        done += count * size
        if (first + i + count) % RUN == 0 or first + i + count == groups:
            end_run(run, total, rows)


@njit(nogil=True, cache=True)
def _add_strip(
    w: Any, stride: Any, length: Any, here: Any, rest: Any, halves: Any, tabled: Any, unsigned: Any, word: Any,
    size: Any, inner: Any, numbers: Any, short: Any, x: Any, finer: Any, by: Any, scale: Any, leading: Any, near: Any,
    zero: Any, z_step: Any, lowest: Any, of_x: Any, of_finer: Any, row_power: Any, many: Any, following: Any,
    coming: Any, run: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """All groups of 16 columns of the result. All but ``many`` are addresses and numbers, which cost a call nothing.

    A call takes a run of groups, or what is before and after a group that wants a second pass; of several rows of x as
    many as fit the first cache. ``following`` is what ``put_next_wanted`` makes of ``many``; ``coming`` where scales
    and zero points of the next 16 columns are, and how far apart those of a column are: read ahead a run at a time,
    while there is much to do, they need not be waited for.
    """
    rows = many.shape[0]
    total = run + rows * 4 * COLUMNS
    chunk, ahead = CHUNK * 2 if halves else CHUNK, COLUMNS * stride
    span, k = _span(size, chunk), 0
    several, pieces, steps = span // size, span // chunk, size // 4
    ordered, at_once = in_order(size, halves), rows == 1 and short and here == COLUMNS
    most = RUN if at_once else max(LONGEST_OF_ROWS // size, 1)
    while k < inner:
        g, start = k // size, w + (k // 2 if halves else k)
        wanted = load64(following + 8 * g)
        stop = min(g // RUN * RUN + RUN, inner // size, g + most, wanted)
        spans = (stop - g) // several
        if g % RUN == 0:
            _read_rows_ahead(load64(coming) + 4 * g, load64(coming + 8))
            if z_step != 0:
                _read_rows_ahead(load64(coming + 16) + 4 * g, load64(coming + 24))
        if spans <= 0 or not at_once:
            part = min(max(spans, 1) * span, inner - k)
            _add_span(
                start, stride, length - (start - w), here, rest, halves, tabled, unsigned, word, size, part, numbers,
                short, x + k * 4, finer + k * 4, by, scale + g * 4 * COLUMNS, leading, near, zero + g * z_step, z_step,
                lowest, of_x + g * 8, of_finer + g * 8, row_power + g * 4, many, spans <= 0 and wanted < g + several, g,
                run, total,
            )  # fmt: skip
            k += part
            continue
        count = spans * several
        e, s, z, o, p = x + k * 4, scale + g * 4 * COLUMNS, zero + g * z_step, of_x + g * 8, row_power + g * 4
        if ordered:
            _by_order(
                start, stride, unsigned, word, ahead, halves, tabled, size, count, numbers, e + by // 2, s, leading,
                near, z, z_step, lowest, o, p, run,
            )  # fmt: skip
        elif tabled:
            _spans_by_table(
                start, stride, unsigned, word, ahead, spans, pieces, numbers, steps, several, e, s, leading, near, z,
                z_step, lowest, o, p, run,
            )  # fmt: skip
        elif halves:
            _spans_of_halves(
                start, stride, unsigned, word, ahead, spans, pieces, numbers, steps, several, e, s, leading, near, z,
                z_step, lowest, o, p, run,
            )  # fmt: skip
        else:
            _spans_of_bytes(
                start, stride, unsigned, word, ahead, spans, pieces, numbers, steps, several, e, s, leading, near, z,
                z_step, lowest, o, p, run,
            )  # fmt: skip
        k += count * size
        if (g + count) % RUN == 0 or g + count == many.shape[1]:
            end_run(run, total, rows)


_add_strip_apart = apart(
    _add_strip,
    f"void({'int64, ' * 5}boolean, boolean, {'int64, ' * 5}boolean, {'int64, ' * 12}uint8[:,::1], int64, int64, int64)",
)


@njit(nogil=True, cache=True)
def told_of_codes(halves: Any, flip: Any, table: Any, unsigned: Any) -> Any:  # pragma: no cover - compiled
    """Whether codes look up what is put in ``unsigned``, or else by which word they differ, bit by bit, from that.

    And what unsigned numbers are less than meant, and the largest of them.
    """
    tabled, word, lowest, largest = np.bool_(False), (flip ^ 128) * 0x01010101, np.int64(-128), np.int64(255)
    if halves:
        low = np.float32(0)
        for i in range(16):
            low = min(low, table[i])
        for i in range(64):
            unsigned[i] = np.uint8(table[i & 15] - low)
        lowest, largest = np.int64(low), np.int64(unsigned.max())
        for i in range(16):  # plain integers, signed or not, want no table
            tabled |= np.int64(unsigned[i]) != i ^ np.int64(unsigned[0])
        word = np.int64(unsigned[0]) * 0x11111111
    return tabled, word, lowest, largest


@njit(nogil=True, cache=True)
def _multiply_by_dots(
    w: Any, halves: Any, flip: Any, table: Any, scale: Any, zero: Any, size: Any, inner: Any, x: Any, finer: Any,
    of_x: Any, of_finer: Any, row_exponent: Any, row_power: Any, many: Any, again: Any, bad: Any, powers: Any,
    bias: Any, first_row: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``multiply`` where ``in_dots`` says so."""
    (rows, columns), groups = y.shape, of_x.shape[1]
    wide = (groups + COLUMNS - 1) // COLUMNS * COLUMNS
    span = _span(size, CHUNK * 2 if halves else CHUNK)
    numbers = on_lines(1, max(span, LONGEST_OF_ROWS) * COLUMNS + 64, np.uint8)[0]
    following = np.empty(groups + 1, dtype=np.int64)
    put_next_wanted(many, following)
    unsigned = np.zeros(64, dtype=np.uint8)
    tabled, word, lowest, largest = told_of_codes(halves, flip, table, unsigned)
    shifted = zero.shape[0] > 0
    less = lowest + flip
    lowest_power = np.float32(1)
    for m in range(rows):
        for g in range(groups):
            lowest_power = min(lowest_power, row_power[m, g])
    sums = np.zeros((2, rows, COLUMNS), dtype=np.float32)  # of a run of groups, and of all
    bits = on_lines(wide, COLUMNS, np.int32)
    zeros = np.zeros((wide if shifted else 1, COLUMNS), dtype=np.int32)
    last = np.empty((COLUMNS, COLUMNS), dtype=np.int32)
    most, least = np.empty(COLUMNS, dtype=np.int32), np.empty(COLUMNS, dtype=np.int32)
    highest, deepest = np.zeros(COLUMNS, dtype=np.int32), np.zeros(COLUMNS, dtype=np.int32)
    rest = np.zeros((COLUMNS, CHUNK), dtype=np.uint8)  # of the last chunk: no loop reads beyond the weight
    whole = w.shape[1] // CHUNK * CHUNK
    of_scale = scale.view(np.int32)
    coming = np.zeros(4, dtype=np.int64)
    of_exponent, every_bit = np.int64(0x7F800000), np.int64(-1)  # no literals, for each of which numba compiles
    for first in range(0, columns, COLUMNS):
        here = min(COLUMNS, columns - first)
        if groups % COLUMNS > 0:
            _put_last(of_scale, first_row + first, here, last)
        most[:], least[:] = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)
        _in_columns(
            scale.ctypes.data + min(first_row + first, scale.shape[0] - 1) * scale.strides[0],
            scale.strides[0] if scale.shape[0] > 1 else 0, here, groups, last.ctypes.data, of_exponent,
            bits.ctypes.data, most.ctypes.data, least.ctypes.data,
        )  # fmt: skip
        for lane in range(COLUMNS):
            if least[lane] == 0 or most[lane] == 0x7F800000:
                return False
        if shifted:
            if groups % COLUMNS > 0:
                _put_last(zero, first_row + first, here, last)
            highest[:], deepest[:] = np.int32(-(1 << 31)), np.int32((1 << 31) - 1)
            _in_columns(
                zero.ctypes.data + min(first_row + first, zero.shape[0] - 1) * zero.strides[0],
                zero.strides[0] if zero.shape[0] > 1 else 0, here, groups, last.ctypes.data, every_bit,
                zeros.ctypes.data, highest.ctypes.data, deepest.ctypes.data,
            )  # fmt: skip
        near = np.int64(lowest_power >= LEAST_POWER)
        number = np.int64(0)  # the largest there can be, zero points taken off
        for lane in range(COLUMNS):
            if most[lane] - least[lane] > LARGEST_FALL:
                near = np.int64(0)
            if shifted and (highest[lane] - flip > LARGEST_ZERO or deepest[lane] - flip < -LARGEST_ZERO):
                return False
            number = max(number, largest - (deepest[lane] - less), highest[lane] - less)
        for n in range(here if whole < w.shape[1] else 0):
            for i in range(whole, w.shape[1]):
                rest[n, i - whole] = w[first + n, i]
        sums[1] = 0
        after = first_row + first + COLUMNS
        coming[0], coming[1] = scale.ctypes.data + after * scale.strides[0], scale.strides[0]
        coming[2], coming[3] = zero.ctypes.data + after * zero.strides[0], zero.strides[0]
        numbers_at = (numbers.ctypes.data + 63) & -64  # here, as numba frees an array after its last use
        _add_strip_apart((
            w.ctypes.data + first * w.strides[0], w.strides[0], w.shape[1], here, rest.ctypes.data, halves, tabled,
            unsigned.ctypes.data, word, size, inner, numbers_at, number * size <= LARGEST_SUM, x.ctypes.data,
            finer.ctypes.data, x.strides[0], bits.ctypes.data, most.ctypes.data, near,
            zeros.ctypes.data, 4 * COLUMNS if shifted else 0, less, of_x.ctypes.data, of_finer.ctypes.data,
            row_power.ctypes.data, many, following.ctypes.data, coming.ctypes.data, sums.ctypes.data,
        ))  # fmt: skip
        for lane in range(COLUMNS):
            most[lane] = (most[lane] >> 23) - 127
        stop = first + here
        finish_tile(
            sums[1], row_exponent, most, powers, bias[first_row + first : first_row + stop], bad, y[:, first:stop]
        )
    return True


_MULTIPLY = (
    "boolean(uint8[:,::1], boolean, int64, float32[::1], float32[:,::1], int32[:,::1], int64, int64, float64[:,::1], "
    "float64[:,::1], float64[:,::1], float64[:,::1], int32[::1], float32[:,::1], uint8[:,::1], boolean, uint8[::1], "
    "float32[::1], float32[::1], int64, float32[:,:])"
)
"""The types of ``multiply``, and of both of its forms."""

_by_dots = apart(_multiply_by_dots, _MULTIPLY) if DOTS else _by_nothing


# ---- the product


@njit(nogil=True, cache=True)
def _prepare_columns(
    scale: Any, zero: Any, less: Any, first: Any, here: Any, powers: Any, fraction: Any, power: Any, zeros: Any,
    exponent: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """Scales of a tile as significands and powers of two, by group and lane, and zero points; whether they are served.

    ``exponent`` is the largest of a column, which ``power`` is relative to.
    """
    groups, served = fraction.shape[0], True
    bits = scale.view(np.int32)
    for lane in range(COLUMNS):
        n = first + min(lane, here - 1)
        row = bits[n if scale.shape[0] > 1 else 0]
        largest = np.int32(0)
        for g in range(groups):
            of_exponent = row[g] & np.int32(0x7F800000)
            largest = max(largest, of_exponent)
            served &= (of_exponent != 0) & (of_exponent != np.int32(0x7F800000))
        leading = largest >> 23
        exponent[lane] = leading - 127
        for g in range(groups):
            of_exponent = (row[g] & np.int32(0x7F800000)) >> 23
            power[g, lane] = powers[of_exponent - leading + 256]
            fraction[g, lane] = np.int32((row[g] & np.int32(-0x7F800001)) | np.int32(0x3F800000))
        if zero.shape[0] > 0:
            points = zero[n if zero.shape[0] > 1 else 0]
            for g in range(groups):
                point = points[g] - less
                zeros[g, lane] = point
                served &= (point <= LARGEST_ZERO) & (point >= -LARGEST_ZERO)
    return served


@njit(nogil=True, cache=True)
def _add_group(numbers: Any, x: Any, k: Any, steps: Any, sums: Any) -> None:  # pragma: no cover - compiled
    """``sums[m, lane]`` of a part of a group of all rows of x."""
    rows, by = x.shape[0], x.strides[0]
    start, m = x.ctypes.data + 8 * k, 0
    while m < rows:
        entries, out = start + m * by, sums.ctypes.data + m * sums.strides[0]
        if rows - m >= ROWS:
            _add_rows(numbers, entries, by, steps, out)
            m += ROWS
        elif rows - m >= FEWER_ROWS:
            _add_fewer(numbers, entries, by, steps, out)
            m += FEWER_ROWS
        elif steps % 4 == 0:
            _add_one_by_fours(numbers, entries, by, steps // 4, out)
            m += 1
        else:
            _add_one(numbers, entries, by, steps, out)
            m += 1


@njit(nogil=True, cache=True)
def _multiply_by_floats(
    w: Any, halves: Any, flip: Any, table: Any, scale: Any, zero: Any, size: Any, inner: Any, x: Any, finer: Any,
    of_x: Any, of_finer: Any, row_exponent: Any, row_power: Any, many: Any, again: Any, bad: Any, powers: Any,
    bias: Any, first_row: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``multiply`` where ``in_dots`` does not say so."""
    (rows, columns), groups = y.shape, of_x.shape[1]
    chunk = CHUNK * 2 if halves else CHUNK
    word, less = flip * 0x01010101, flip
    tiles = STRIP // COLUMNS
    numbers = on_lines(tiles, chunk * COLUMNS, np.float64).reshape(tiles, chunk, COLUMNS)
    sums = np.zeros((tiles, rows, COLUMNS), dtype=np.float64)
    sums_of_finer = np.zeros((tiles, rows if again else 0, COLUMNS), dtype=np.float64)
    run = np.zeros((tiles, rows, COLUMNS), dtype=np.float32)
    total = np.empty((tiles, rows, COLUMNS), dtype=np.float32)
    fraction = np.empty((tiles, groups, COLUMNS), dtype=np.int32)
    power = np.empty((tiles, groups, COLUMNS), dtype=np.float32)
    zeros = np.zeros((tiles, groups if zero.shape[0] > 0 else 1, COLUMNS), dtype=np.float64)
    exponent = np.empty((tiles, COLUMNS), dtype=np.int32)
    rest = np.zeros((COLUMNS, CHUNK), dtype=np.uint8)  # of the last chunk: no loop reads beyond the weight
    for strip in range(0, columns, STRIP):
        used = (min(STRIP, columns - strip) + COLUMNS - 1) // COLUMNS
        for t in range(used):
            first = strip + t * COLUMNS
            here = min(COLUMNS, columns - first)
            if not _prepare_columns(
                scale, zero, less, first_row + first, here, powers, fraction[t], power[t], zeros[t], exponent[t]
            ):
                return False
        total[:] = 0
        k = 0
        while k < inner:
            if k % chunk == 0:
                at = k // 2 if halves else k
                for t in range(used):
                    first = strip + t * COLUMNS
                    here = min(COLUMNS, columns - first)
                    start, by = _chunk_of_rows(w, first, here, at, rest)
                    out = numbers[t].ctypes.data
                    if halves:
                        _decode_halves(start, by, here, table.ctypes.data, 0, out)
                    else:
                        _decode_bytes(start, by, here, table.ctypes.data, word, out)
            g = k // size
            stop = min((g + 1) * size, (k // chunk + 1) * chunk, inner)
            for t in range(used):
                of_codes = numbers[t].ctypes.data + (k % chunk) * 8 * COLUMNS
                _add_group(of_codes, x, k, stop - k, sums[t])
                if again:
                    _add_group(of_codes, finer, k, stop - k, sums_of_finer[t])
            k = stop
            if k % size and k < inner:
                continue
            last_of_run = (g + 1) % RUN == 0 or k == inner
            for t in range(used):
                z = zeros[t].ctypes.data + (g * 8 * COLUMNS if zero.shape[0] > 0 else 0)
                f, p = fraction[t, g].ctypes.data, power[t, g].ctypes.data
                for m in range(rows):
                    twice = np.int64(many[m, g])
                    other = sums_of_finer[t, m].ctypes.data if again else 0
                    left = of_finer[m, g] if again else 0.0
                    _end_group(
                        sums[t, m].ctypes.data, other, twice, z, of_x[m, g], left, f, p, row_power[m, g],
                        run[t, m].ctypes.data,
                    )  # fmt: skip
                if last_of_run:
                    end_run(run[t].ctypes.data, total[t].ctypes.data, rows)
        for t in range(used):
            first = strip + t * COLUMNS
            last = min(first + COLUMNS, columns)
            of_columns = powers, bias[first_row + first : first_row + last], bad, y[:, first:last]
            finish_tile(total[t], row_exponent, exponent[t], *of_columns)
    return True


_by_floats = apart(_multiply_by_floats, _MULTIPLY)


@njit(nogil=True, cache=True)
def multiply(
    w: Any, halves: Any, flip: Any, table: Any, scale: Any, zero: Any, size: Any, inner: Any, x: Any, finer: Any,
    of_x: Any, of_finer: Any, row_exponent: Any, row_power: Any, many: Any, again: Any, bad: Any, powers: Any,
    bias: Any, first_row: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """Columns of the result for the bytes ``w`` of as many rows of the weight; whether they are served.

    ``x`` to ``bad`` are what ``prepare`` and ``refine`` made of rows of x. Codes are bytes that differ from signed ones
    by ``flip``, or of 4 bits, ``halves``, with numbers in ``table``. Scales are (N or 1, groups), zero points likewise
    or empty; ``first_row`` is the row of them, and of the bias, that ``w`` begins with. ``again``: whether there are
    rows of ``finer``. Not served are scales that are not normal numbers, and zero points that no code is.
    """
    given = (
        w, halves, flip, table, scale, zero, size, inner, x, finer, of_x, of_finer, row_exponent, row_power, many,
        again, bad, powers, bias, first_row, y,
    )  # fmt: skip
    return _by_dots(given) if in_dots(size, halves) else _by_floats(given)


multiply_apart = apart(multiply, _MULTIPLY)


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    w, others, served, y = given
    if not multiply_apart((w[start:stop], *others, start, y[:, start:stop])):
        served[0] = False


_task = task_of(_part)


@njit(nogil=True, cache=True)
def multiply_in_parts(
    pool: Any, ends: Any, w: Any, halves: Any, flip: Any, table: Any, scale: Any, zero: Any, size: Any, inner: Any,
    x: Any, finer: Any, of_x: Any, of_finer: Any, row_exponent: Any, row_power: Any, many: Any, again: Any, bad: Any,
    powers: Any, bias: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``multiply`` for rows of the weight from each of ``ends`` to the next, on the threads of a pool."""
    others = (
        halves, flip, table, scale, zero, size, inner, x, finer, of_x, of_finer, row_exponent, row_power, many, again,
        bad, powers, bias,
    )  # fmt: skip
    served = np.ones(1, dtype=np.bool_)
    in_parts(pool, ends, _task((w, others, served, y)))
    return served[0]
