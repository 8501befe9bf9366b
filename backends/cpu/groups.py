"""Loops for reproducible products with groups along the contracted axis: exact sums of integers, in float64.

Owns: the loops, and the numba intrinsics in them. One file, because what numba caches of a function is renewed when its
own file changes, and not when another does; what the contract's constants are is written here once more. The loops hold
no lock and start no thread. ``fixed_point`` calls them, and JAX's ``groups``; ``serve`` says what they are for.

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
Codes of 4 bits leave their bytes as those at even and those at odd positions, so digits lie in that order.

Without that instruction, ``vpmaddwd`` adds two products of shorts: an integer is two signed digits of 16 bits, and the
four bytes of a word become two pairs of shorts in registers, the even ones and the odd ones. A digit's sum, of up to
256 products, is at most ``256 * 255 * 2^15 < 2^31``. Vectors are of 16 lanes or, for 16 columns, two of 8.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

__all__ = ["COLUMNS", "ROWS_AT_ONCE", "TABLES", "multiply", "prepare", "width_of_rows"]


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

LARGEST_SUM = 65281
"""Sum of a group's unsigned codes up to which 257 times 128 of it, two digits' sums in one, fit int32; and 2^15 of it,
one sum of digits of 16 bits."""

LONGEST_OF_SHORTS = 256
"""Length of groups up to which sums of digits of 16 bits fit int32, whatever the codes: a 255th of that."""

MOST_IN_DOTS = 4 if LANES == 16 else 2
"""Rows of x whose sums, 16 a digit, fit the registers."""

LONGEST_SPAN = 4096
"""Codes of 16 columns that are decoded before rows of x come by, at most: 64 KB."""

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

_LOOKED_UP_IN = 16 if _WIDE else 8 if "+avx2" in _features() else 0

TABLES = _LOOKED_UP_IN > 0
"""Whether the processor permutes vectors of floats by other vectors, as codes of 4 bits want it."""

_INT, _ADDRESS, _FLOAT, _DOUBLE = ir.IntType(32), ir.IntType(64), ir.FloatType(), ir.DoubleType()
_INTS, _FLOATS, _DOUBLES = (ir.VectorType(item, COLUMNS) for item in (_INT, _FLOAT, _DOUBLE))
_EXACT = ("contract",)


def _function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    found = builder.module.globals.get(name)
    return ir.Function(builder.module, ir.FunctionType(result, arguments), name) if found is None else found


def _load(builder: Any, address: Any, its_type: Any) -> Any:
    return builder.load(builder.inttoptr(address, its_type.as_pointer()), align=1)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def _at(builder: Any, base: Any, index: Any, size: int) -> Any:
    return builder.add(base, builder.mul(index, _ADDRESS(size)))


def _same(vector: Any, number: float) -> Any:
    return ir.Constant(vector, [number] * vector.count)


def _in_all_lanes(builder: Any, value: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(_INT, vector.count), [0] * vector.count))


def _shuffled(builder: Any, a: Any, b: Any, order: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(order)), order))


def _loop(builder: Any, count: Any, totals: list[Any], step: Any) -> list[Any]:
    """``totals = step(i, totals)`` for i from 0 to count - 1, the totals in registers; count is at least 1."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(_ADDRESS)
    carried = [builder.phi(total.type) for total in totals]
    new = step(i, carried)
    following = builder.add(i, _ADDRESS(1))
    for phi, first, next_one in zip([i, *carried], [_ADDRESS(0), *totals], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(next_one, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return new


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
    for apart in (8, 4, 2, 1)[-count.bit_length() + 1 :]:
        first = [i if i // apart % 2 == 0 else count + i - apart for i in range(count)]
        second = [i + apart if i // apart % 2 == 0 else count + i for i in range(count)]
        new = list(rows)
        for i in range(count):
            if i // apart % 2 == 0:
                new[i] = _shuffled(builder, rows[i], rows[i + apart], first)
                new[i + apart] = _shuffled(builder, rows[i], rows[i + apart], second)
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
    permute = _function(builder, name, floats, [floats, ints])
    parts = [_load(builder, _at(builder, table, _ADDRESS(i), 4), floats) for i in range(0, 16, lanes)]

    def looked_up(positions: Any) -> Any:
        """The instruction itself looks at no more bits of a position than it has lanes for."""
        if lanes == 16:
            return builder.call(permute, [parts[0], positions])
        eighth = builder.icmp_signed("==", builder.and_(positions, _same(ints, 8)), _same(ints, 0))
        return builder.select(eighth, *(builder.call(permute, [part, positions]) for part in parts))

    numbers = []
    for half in range(8):
        positions = builder.lshr(words, _same(_INTS, 4 * half)) if half else words
        cut = [_shuffled(builder, positions, positions, list(range(i, i + lanes))) for i in range(0, COLUMNS, lanes)]
        values = [looked_up(part) for part in cut]
        whole = values[0] if len(values) == 1 else _shuffled(builder, *values, list(range(COLUMNS)))
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
            rows = [_load(builder, start, _INTS) for start in _rows_of_tile(builder, w, stride, there)]
            flipped = _in_all_lanes(builder, builder.trunc(flip, _INT), _INTS)
            place = out
            for words in _transposed(builder, rows):
                for number in numbers_of(builder, builder.xor(words, flipped), table):
                    _store(builder, number, place)
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
            totals = [_load(builder, place, _DOUBLES) for place in places]
            totals += [_same(_DOUBLES, 0)] * (several - 1)

            def step(i: Any, totals: list[Any]) -> list[Any]:
                new = []
                for part in range(several):
                    k = builder.add(builder.mul(i, _ADDRESS(several)), _ADDRESS(part))
                    codes = _load(builder, _at(builder, numbers, k, 8 * COLUMNS), _DOUBLES)
                    for m in range(rows):
                        entry = _in_all_lanes(builder, _load(builder, _at(builder, of_x[m], k, 8), _DOUBLE), _DOUBLES)
                        product = builder.fmul(entry, codes, flags=_EXACT)
                        new.append(builder.fadd(totals[m + part], product, flags=_EXACT))
                return new

            found = _loop(builder, steps, totals, step)
            for extra in found[rows:]:  # of one row
                found[0] = builder.fadd(found[0], extra)
            for place, total in zip(places, found[:rows], strict=True):
                _store(builder, total, place)
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
            zeros = _load(builder, zero, _DOUBLES)

            def rounded(place: Any, entries: Any) -> Any:
                shift = builder.fmul(zeros, _in_all_lanes(builder, entries, _DOUBLES), flags=_EXACT)
                total = builder.fsub(_load(builder, place, _DOUBLES), shift, flags=_EXACT)
                _store(builder, _same(_DOUBLES, 0), place)
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
            t = builder.fmul(t, _load(builder, fraction, _FLOATS))
            factor = builder.fmul(_load(builder, power, _FLOATS), _in_all_lanes(builder, row_power, _FLOATS))
            seen = builder.fcmp_ordered(">=", factor, _same(_FLOATS, float(LEAST_DROP)))
            t = builder.fmul(t, builder.select(seen, factor, _same(_FLOATS, 0)))
            _store(builder, builder.fadd(_load(builder, run, _FLOATS), t), run)
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
def prepare(
    x: Any, size: Any, halves: Any, powers: Any, integers: Any, sums: Any, exponent: Any, row_exponent: Any,
    row_power: Any, many: Any, wants: Any, bad: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Groups of ``size`` entries of float32 rows as integers ``rint(x * 2^(30 - exponent))``, and their sums.

    Of the integers of a row whose groups are multiplied ``in_dots``, four digits each.
    ``row_power`` is 2^(exponent - row_exponent), the latter the largest of a row. ``powers[i]`` is 2^(i - 256), 0 far
    below. ``many`` says which groups of which rows want a second pass, ``wants`` which rows have such a group, ``bad``
    which have a value that is not finite: they become zeros.
    """
    rows, inner = x.shape
    groups, dots = sums.shape[1], in_dots(size, halves)
    bits = x.view(np.int32)
    for m in range(rows):
        pattern, row, out = bits[m], x[m], integers[m]
        most = np.int32(0)
        for k in range(inner):
            most = max(most, pattern[k] & np.int32(0x7FFFFFFF))
        bad[m] = most >= np.int32(0x7F800000)
        wants[m] = 0
        out[inner:] = 0
        leading = np.int32(-127)
        for g in range(groups):
            start, stop = g * size, min(g * size + size, inner)
            most = np.int32(0)
            for k in range(start, stop):
                most = max(most, pattern[k] & np.int32(0x7FFFFFFF))
            many[m, g] = 0
            if bad[m] or most < np.int32(0x00800000):  # subnormal numbers count as zeros
                exponent[m, g], sums[m, g] = -127, 0
                out[start:stop] = 0
                continue
            e = (most >> 23) - 127
            if (most & np.int32(0x7FFFFF)) > MOST_FRACTION:  # a larger one would carry into a fifth digit
                e += 1
            half = (BITS - e) >> 1
            first, second = powers[half + 256], powers[BITS - e - half + 256]
            present, small, total = np.int32(0), np.int32(0), np.float64(0)
            for k in range(start, stop):
                v = row[k] if abs(row[k]) >= SMALLEST else np.float32(0)
                scaled = v * first * second
                value = np.float64(np.rint(scaled))
                out[k] = value
                total += value
                there = np.int32(v != 0)
                present += there
                small += there & np.int32(abs(scaled) < SMALL)
            exponent[m, g], sums[m, g] = e, total
            leading = max(leading, np.int32(e))
            if small * MANY > present:
                many[m, g] = wants[m] = 1
        row_exponent[m] = leading
        for g in range(groups):
            row_power[m, g] = powers[exponent[m, g] - leading + 256]
        if dots:
            _split(out, halves)


@njit(nogil=True, cache=True)
def refine(
    x: Any, size: Any, halves: Any, powers: Any, exponent: Any, many: Any, finer: Any, sums: Any
) -> None:  # pragma: no cover - compiled
    """``finer``: what ``prepare`` rounded away, times 2^31, where ``many`` asks for it; and its sums."""
    dots = in_dots(size, halves)
    for m in range(x.shape[0]):
        row, out = x[m], finer[m]
        for g in range(sums.shape[1]):
            start, stop = g * size, min(g * size + size, x.shape[1])
            total = np.float64(0)
            if many[m, g]:
                half = (BITS - exponent[m, g]) >> 1
                first, second = powers[half + 256], powers[BITS - exponent[m, g] - half + 256]
                for k in range(start, stop):
                    v = row[k] if abs(row[k]) >= SMALLEST else np.float32(0)
                    scaled = v * first * second
                    value = np.float64(np.rint((scaled - np.rint(scaled)) * np.float32(FINER)))
                    out[k] = value
                    total += value
            else:
                out[start:stop] = 0
            sums[m, g] = total
        out[x.shape[1] :] = 0
        if dots:
            _split(out, halves)


# ---- what both forms of the product do


@njit(nogil=True, cache=True)
def _chunk_of_rows(w: Any, first: Any, here: Any, at: Any, rest: Any) -> Any:  # pragma: no cover - compiled
    """Address and stride of ``CHUNK`` bytes, from ``at`` on, of rows of the weight; of a copy where fewer are left."""
    if at + CHUNK <= w.shape[1]:
        return w.ctypes.data + first * w.strides[0] + at, w.strides[0]
    for n in range(here):
        rest[n, : w.shape[1] - at] = w[first + n, at:]
    return rest.ctypes.data, CHUNK


@njit(nogil=True, cache=True)
def _end_run(run: Any, total: Any) -> None:  # pragma: no cover - compiled
    """Add the sums of up to ``RUN`` groups to those of all, and begin anew."""
    for m in range(run.shape[0]):
        for lane in range(COLUMNS):
            total[m, lane] += run[m, lane]
            run[m, lane] = 0


@njit(nogil=True, cache=True)
def _finish(
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
    return [_shuffled(builder, columns, columns, list(range(i, i + LANES))) for i in _PARTS]


def _as_one(builder: Any, parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else _shuffled(builder, *parts, list(range(COLUMNS)))


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
        return builder.call(_function(builder, name, _WORDS, [_WORDS] * 3), [total, codes, digit])
    name = "llvm.x86.avx512.pmaddw.d.512" if LANES == 16 else "llvm.x86.avx2.pmadd.wd"
    multiply = _function(builder, name, _WORDS, [_SHORTS] * 2)
    return builder.add(total, builder.call(multiply, [codes, builder.bitcast(digit, _SHORTS)]))


def _unsigned_of(halves: bool, looked_up: bool = False) -> Any:
    """``CHUNK`` bytes of up to 16 rows as unsigned numbers, four codes of each of 16 columns in a vector.

    Arguments as ``_decoder`` has them, but that the table holds 64 bytes, of which ``looked_up`` makes use, and that
    ``ahead`` says how far ahead memory is read into the second cache. A tile of the weight whose rows are a power of
    two apart does not fit the first one; reading past the weight's end that way is harmless.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def decode(_: Any, w: Any, stride: Any, there: Any, table: Any, flip: Any, ahead: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, stride, there, table, flip, ahead, out = arguments
            starts = _rows_of_tile(builder, w, stride, there)
            pointer = ir.PointerType(_BYTE)
            fetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, _INT, _INT, _INT])
            for start in starts:
                line = builder.inttoptr(builder.add(start, ahead), pointer)
                builder.call(fetch, [line, _INT(0), _INT(2), _INT(1)])
            look_up = _function(builder, _LOOK_UP, _BYTES, [_BYTES, _BYTES])
            numbers, low = _load(builder, table, _BYTES), _same(_WORDS, 0x0F0F0F0F)
            flipped = _in_all_lanes(builder, builder.trunc(flip, _INT), _WORDS)
            for first, column in itertools.product(range(0, CHUNK // 4, LANES), _PARTS):
                block = [builder.add(start, _ADDRESS(4 * first)) for start in starts[column : column + LANES]]
                for i, words in enumerate(_transposed(builder, [_load(builder, at, _WORDS) for at in block])):
                    found = [words if looked_up else builder.xor(words, flipped)]
                    if halves:
                        upper = builder.lshr(found[0], _same(_WORDS, 4))
                        found = [builder.and_(found[0], low), builder.and_(upper, low)]
                    if looked_up:
                        found = [builder.call(look_up, [numbers, builder.bitcast(c, _BYTES)]) for c in found]
                    for v, vector in enumerate(found):
                        place = CHUNK * ((first + i) * len(found) + v) + 4 * column
                        _store(builder, vector, builder.add(out, _ADDRESS(place)))
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return decode


def _exact_sum(builder: Any, digits: list[Any], short: bool) -> Any:
    """The sum of digits times powers of their base, in float64; ``short``: pairs of bytes fit int32."""
    if short and BITS_OF_DIGIT == 8:
        pairs = [builder.add(builder.shl(digits[i + 1], _same(_INTS, 8)), digits[i]) for i in (0, 2)]
        parts, base = pairs, 65536.0
    else:
        parts, base = digits, _BASE
    total = builder.sitofp(parts[-1], _DOUBLES)
    for part in parts[-2::-1]:
        scaled = builder.fmul(total, _same(_DOUBLES, base), flags=_EXACT)
        total = builder.fadd(scaled, builder.sitofp(part, _DOUBLES), flags=_EXACT)
    return total


def _group_of(rows: int, short: bool, twice: bool = False) -> Any:
    """Add a group, of ``rows`` rows of x, to ``run``: ``steps`` vectors of four codes of each of 16 columns.

    Addresses: of those; of digits of x, and of what a second pass multiplies; of the bits of scales, the exponents that
    they are relative to, and zero points, 16 each; of sums of the group's entries of x, in either pass, and of powers
    of its rows, each ``groups`` apart; and of the sum of groups. ``lowest`` is what unsigned codes are less than meant.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def group(
        _: Any, numbers: Any, steps: Any, x: Any, finer: Any, x_stride: Any, scale: Any, leading: Any, zero: Any,
        lowest: Any, of_x: Any, of_finer: Any, row_power: Any, groups: Any, run: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            numbers, steps, x, finer, x_stride, scale, leading, zero, lowest, *others = arguments
            of_x, of_finer, row_power, groups, run = others
            of_rows = [builder.add(x, builder.mul(x_stride, _ADDRESS(m))) for m in range(rows)]
            if twice:
                of_rows.append(finer)

            def step(i: Any, totals: list[Any]) -> list[Any]:
                start, at, new = _at(builder, numbers, i, CHUNK), builder.shl(i, _ADDRESS(4)), list(totals)
                loaded = [_load(builder, builder.add(start, _ADDRESS(4 * column)), _WORDS) for column in _PARTS]
                codes = [_pairs_of(builder, words) for words in loaded]
                for m, row in enumerate(of_rows):
                    entry = builder.add(row, at)
                    for word in range(4):  # digits of bytes, or the even and the odd ones of a digit of shorts
                        of_x = _load(builder, builder.add(entry, _ADDRESS(4 * word)), _INT)
                        digit = _in_all_lanes(builder, of_x, _WORDS)
                        d, pair = divmod(word, 4 // DIGITS)
                        for part in range(len(_PARTS)):
                            place = (m * DIGITS + d) * len(_PARTS) + part
                            new[place] = _dot(builder, new[place], codes[part][pair], digit)
                return new

            zeros = [_same(_WORDS, 0)] * (DIGITS * len(of_rows) * len(_PARTS))
            sums = _loop(builder, steps, zeros, step)
            found = [_as_one(builder, sums[i : i + len(_PARTS)]) for i in range(0, len(sums), len(_PARTS))]
            bits = _load(builder, scale, _INTS)
            one = _same(_INTS, 0x3F800000)
            fraction = builder.or_(builder.and_(bits, _same(_INTS, -0x7F800001)), one)
            fraction = builder.bitcast(fraction, _FLOATS)
            exponent = builder.and_(bits, _same(_INTS, 0x7F800000))
            below = builder.sub(_load(builder, leading, _INTS), exponent)
            near = builder.icmp_signed("<=", below, _same(_INTS, 100 << 23))
            power = builder.select(near, builder.sub(one, below), _same(_INTS, 0))
            power = builder.bitcast(power, _FLOATS)
            zeros = builder.sitofp(_load(builder, zero, _INTS), _DOUBLES)
            zeros = builder.fsub(zeros, _in_all_lanes(builder, lowest, _DOUBLES))

            def rounded(digits: list[Any], entries: Any) -> Any:
                shift = builder.fmul(zeros, _in_all_lanes(builder, entries, _DOUBLES), flags=_EXACT)
                return builder.fptrunc(builder.fsub(_exact_sum(builder, digits, short), shift, flags=_EXACT), _FLOATS)

            for m in range(rows):
                at = builder.mul(groups, _ADDRESS(m))
                entries = _load(builder, builder.add(of_x, builder.shl(at, _ADDRESS(3))), _DOUBLE)
                t = rounded(found[m * DIGITS : m * DIGITS + DIGITS], entries)
                if twice:
                    small = rounded(found[DIGITS:], _load(builder, of_finer, _DOUBLE))
                    t = builder.fadd(t, builder.fmul(small, _same(_FLOATS, 1 / FINER)))
                t = builder.fmul(t, fraction)
                of_row = _load(builder, builder.add(row_power, builder.shl(at, _ADDRESS(2))), _FLOAT)
                factor = builder.fmul(power, _in_all_lanes(builder, of_row, _FLOATS))
                seen = builder.fcmp_ordered(">=", factor, _same(_FLOATS, float(LEAST_DROP)))
                t = builder.fmul(t, builder.select(seen, factor, _same(_FLOATS, 0)))
                place = builder.add(run, _ADDRESS(4 * COLUMNS * m))
                _store(builder, builder.fadd(_load(builder, place, _FLOATS), t), place)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8, types.float64, *[types.intp] * 5), generate

    return group


@intrinsic  # type: ignore[untyped-decorator]
def _columns_of(
    _: Any, of_rows: Any, stride: Any, there: Any, blocks: Any, mask: Any, out: Any, most: Any, least: Any
) -> Any:
    """Words of up to 16 rows as (words, 16), ``blocks`` of 16 of them, and each column's largest and least ``mask``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        of_rows, stride, there, blocks, mask, out, most, least = arguments
        starts = _rows_of_tile(builder, of_rows, stride, there)
        masks = _in_all_lanes(builder, builder.trunc(mask, _INT), _INTS)

        def block(i: Any, totals: list[Any]) -> list[Any]:
            high, low = totals
            at = builder.mul(i, _ADDRESS(4 * COLUMNS))
            place = builder.add(out, builder.mul(i, _ADDRESS(4 * COLUMNS * COLUMNS)))
            for words in _transposed(builder, [_load(builder, builder.add(start, at), _INTS) for start in starts]):
                _store(builder, words, place)
                place = builder.add(place, _ADDRESS(4 * COLUMNS))
                part = builder.and_(words, masks)
                high = builder.select(builder.icmp_signed(">", part, high), part, high)
                low = builder.select(builder.icmp_signed("<", part, low), part, low)
            return [high, low]

        firsts = [_same(_INTS, -(1 << 31)), _same(_INTS, (1 << 31) - 1)]
        for place, total in zip((most, least), _loop(builder, blocks, firsts, block), strict=True):
            _store(builder, total, place)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate


_unsigned_of_bytes, _unsigned_of_halves = _unsigned_of(False), _unsigned_of(True)
_unsigned_by_table = _unsigned_of(True, True)
_long_of_one, _long_of_two, _long_of_four = (_group_of(rows, short=False) for rows in (1, 2, 4))
_short_of_one, _short_of_two, _short_of_four = (_group_of(rows, short=True) for rows in (1, 2, 4))
_long_twice, _short_twice = _group_of(1, short=False, twice=True), _group_of(1, short=True, twice=True)


@njit(nogil=True, cache=True)
def _split(row: Any, halves: Any) -> None:  # pragma: no cover - compiled
    """Integers of 31 bits, float64, as signed digits, in the first half of the row: 16 bytes for those of four codes.

    Of bytes, four of a digit lie together, of shorts the first and third, then the second and fourth.
    """
    out, shorts = row.view(np.int8), row.view(np.int16)
    found = np.empty(8, dtype=np.int64)
    for start in range(0, row.shape[0], 8):
        for i in range(8):
            found[i] = np.int64(row[start + i])
        for i in range(8):
            value = found[i]
            place = (i & 1) * 4 + (i >> 1) if halves else i
            four, code = 4 * start + (place >> 2) * 16, place & 3
            if BITS_OF_DIGIT == 8:
                for d in range(4):
                    digit = ((value + 128) & 255) - 128
                    out[four + 4 * d + code] = digit
                    value = (value - digit) >> 8
            else:
                lower = ((value + 32768) & 65535) - 32768
                at = (four >> 1) + (code & 1) * 2 + (code >> 1)
                shorts[at] = lower
                shorts[at + 4] = (value - lower) >> 16


@njit(nogil=True, cache=True)
def _in_columns(of_rows: Any, first: Any, here: Any, mask: Any, padded: Any, out: Any, most: Any, least: Any) -> None:
    """``_columns_of`` of rows from ``first`` on, or of the only one there is, of any length."""
    groups = of_rows.shape[1]  # pragma: no cover - compiled
    one = of_rows.shape[0] == 1
    start, by = of_rows.ctypes.data + (0 if one else first * of_rows.strides[0]), 0 if one else of_rows.strides[0]
    if groups % COLUMNS != 0:
        for n in range(here):
            row = of_rows[0 if one else first + n]
            padded[n, :groups] = row
            padded[n, groups:] = row[groups - 1]
        start, by = padded.ctypes.data, padded.strides[0]
    blocks = (groups + COLUMNS - 1) // COLUMNS
    _columns_of(start, by, here, blocks, mask, out.ctypes.data, most.ctypes.data, least.ctypes.data)


@njit(nogil=True, cache=True)
def _add_to_rows(
    codes: Any, steps: Any, short: Any, x: Any, finer: Any, by: Any, g: Any, scale: Any, leading: Any, zero: Any,
    lowest: Any, of_x: Any, of_finer: Any, row_power: Any, many: Any, again: Any, run: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Group ``g`` of all rows of x, as many at a time as want no second pass, up to ``MOST_IN_DOTS``."""
    (rows, groups), m = of_x.shape, 0
    while m < rows:
        several = 4 if rows - m >= 4 and MOST_IN_DOTS == 4 else 2 if rows - m >= 2 else 1
        wanted = False
        if again:
            for i in range(several):
                wanted |= many[m + i, g] != 0
            several = 1 if wanted else several
        e, f = x + m * by, finer + m * by
        o, p, r = of_x[m, g:].ctypes.data, row_power[m, g:].ctypes.data, run[m].ctypes.data
        if wanted and many[m, g] != 0:
            second = of_finer[m, g:].ctypes.data
            if short:
                _short_twice(codes, steps, e, f, by, scale, leading, zero, lowest, o, second, p, groups, r)
            else:
                _long_twice(codes, steps, e, f, by, scale, leading, zero, lowest, o, second, p, groups, r)
        elif short:
            if several == 4:
                _short_of_four(codes, steps, e, 0, by, scale, leading, zero, lowest, o, 0, p, groups, r)
            elif several == 2:
                _short_of_two(codes, steps, e, 0, by, scale, leading, zero, lowest, o, 0, p, groups, r)
            else:
                _short_of_one(codes, steps, e, 0, by, scale, leading, zero, lowest, o, 0, p, groups, r)
        elif several == 4:
            _long_of_four(codes, steps, e, 0, by, scale, leading, zero, lowest, o, 0, p, groups, r)
        elif several == 2:
            _long_of_two(codes, steps, e, 0, by, scale, leading, zero, lowest, o, 0, p, groups, r)
        else:
            _long_of_one(codes, steps, e, 0, by, scale, leading, zero, lowest, o, 0, p, groups, r)
        m += several


@njit(nogil=True, cache=True)
def _multiply_by_dots(
    w: Any, halves: Any, flip: Any, table: Any, scale: Any, zero: Any, size: Any, inner: Any, x: Any, finer: Any,
    of_x: Any, of_finer: Any, row_exponent: Any, row_power: Any, many: Any, again: Any, bad: Any, powers: Any,
    bias: Any, first_row: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``multiply`` where ``in_dots`` says so."""
    (rows, columns), groups = y.shape, of_x.shape[1]
    chunk = CHUNK * 2 if halves else CHUNK
    word = (flip ^ 128) * 0x01010101
    span = _span(size, chunk)
    wide = (groups + COLUMNS - 1) // COLUMNS * COLUMNS
    numbers = np.empty(span * COLUMNS + 64, dtype=np.uint8)
    unsigned, tabled, largest = np.zeros(64, dtype=np.uint8), False, 255
    lowest = np.float64(-128)
    if halves:
        low = np.float32(0)
        for i in range(16):
            low = min(low, table[i])
        for i in range(64):
            unsigned[i] = np.uint8(table[i & 15] - low)
        lowest = np.float64(low)
        largest = np.int64(unsigned.max())
        for i in range(16):  # plain integers, signed or not, want no table
            tabled |= np.int64(unsigned[i]) != i ^ np.int64(unsigned[0])
        word = np.int64(unsigned[0]) * 0x11111111
    less = np.float64(lowest + flip)
    short = largest * size <= LARGEST_SUM
    run = np.zeros((rows, COLUMNS), dtype=np.float32)
    total = np.empty((rows, COLUMNS), dtype=np.float32)
    bits = np.empty((wide, COLUMNS), dtype=np.int32)
    zeros = np.zeros((wide if zero.shape[0] > 0 else 1, COLUMNS), dtype=np.int32)
    padded = np.empty((COLUMNS, wide), dtype=np.int32)
    most, least = np.empty(COLUMNS, dtype=np.int32), np.empty(COLUMNS, dtype=np.int32)
    highest, deepest = np.empty(COLUMNS, dtype=np.int32), np.empty(COLUMNS, dtype=np.int32)
    rest = np.zeros((COLUMNS, CHUNK), dtype=np.uint8)  # of the last chunk: no loop reads beyond the weight
    of_scale = scale.view(np.int32)
    ahead = COLUMNS * w.strides[0]
    step = 8 if halves else 4
    for first in range(0, columns, COLUMNS):
        here = min(COLUMNS, columns - first)
        _in_columns(of_scale, first_row + first, here, 0x7F800000, padded, bits, most, least)
        for lane in range(COLUMNS):
            if least[lane] == 0 or most[lane] == 0x7F800000:
                return False
        if zero.shape[0] > 0:
            _in_columns(zero, first_row + first, here, -1, padded, zeros, highest, deepest)
            for lane in range(COLUMNS):
                if highest[lane] - flip > LARGEST_ZERO or deepest[lane] - flip < -LARGEST_ZERO:
                    return False
        total[:] = 0
        numbers_at = (numbers.ctypes.data + 63) & -64  # here, as numba frees an array after its last use
        k = 0
        while k < inner:
            part = min(span, inner - k)
            pieces = (part + chunk - 1) // chunk
            for piece in range(pieces):
                at = (k + piece * chunk) // 2 if halves else k + piece * chunk
                start, by = _chunk_of_rows(w, first, here, at, rest)
                out = numbers_at + piece * chunk * COLUMNS
                if tabled:
                    _unsigned_by_table(start, by, here, unsigned.ctypes.data, word, ahead, out)
                elif halves:
                    _unsigned_of_halves(start, by, here, unsigned.ctypes.data, word, ahead, out)
                else:
                    _unsigned_of_bytes(start, by, here, unsigned.ctypes.data, word, ahead, out)
            g = k // size
            done = 0
            while done < part:
                steps = (min(size, part - done) + step - 1) // step * step // 4
                codes, s = numbers_at + done * COLUMNS, bits.ctypes.data + g * 4 * COLUMNS
                z = zeros.ctypes.data + (g * 4 * COLUMNS if zero.shape[0] > 0 else 0)
                for_rows = x.ctypes.data + (k + done) * 4, finer.ctypes.data + (k + done) * 4
                _add_to_rows(
                    codes, steps, short, *for_rows, x.strides[0], g, s, most.ctypes.data, z, less, of_x, of_finer,
                    row_power, many, again, run,
                )  # fmt: skip
                done += size
                g += 1
                if g % RUN == 0 or g == groups:
                    _end_run(run, total)
            k += span
        for lane in range(COLUMNS):
            most[lane] = (most[lane] >> 23) - 127
        last = first + here
        _finish(total, row_exponent, most, powers, bias[first_row + first : first_row + last], bad, y[:, first:last])
    return True


@njit(nogil=True, cache=True)
def _by_nothing(*arguments: Any) -> Any:  # pragma: no cover - compiled
    """In place of ``_multiply_by_dots`` where the processor lacks the instruction, which nothing then asks for."""
    return False


_by_dots = _multiply_by_dots if DOTS else _by_nothing


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
    if in_dots(size, halves):
        return _by_dots(
            w, halves, flip, table, scale, zero, size, inner, x, finer, of_x, of_finer, row_exponent, row_power, many,
            again, bad, powers, bias, first_row, y,
        )  # fmt: skip
    (rows, columns), groups = y.shape, of_x.shape[1]
    chunk = CHUNK * 2 if halves else CHUNK
    word, less = flip * 0x01010101, flip
    tiles = STRIP // COLUMNS
    numbers = np.empty((tiles, chunk, COLUMNS), dtype=np.float64)
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
                    _end_run(run[t], total[t])
        for t in range(used):
            first = strip + t * COLUMNS
            last = min(first + COLUMNS, columns)
            of_columns = powers, bias[first_row + first : first_row + last], bad, y[:, first:last]
            _finish(total[t], row_exponent, exponent[t], *of_columns)
    return True
