"""Loops that make codes of float32 values, in registers: statistics of groups, scales, numbers of any kind, packing.

Owns: the loops, and the numba intrinsics in them. One file but for the words of ``emit``, because what numba caches of
a function is renewed when its own file changes, and not when another does; what the contract's constants are comes in
as arguments. The loops hold no lock, and run on the threads of ``pool`` where their names say so. ``encoders`` calls
them, and says what they are for; so does what XLA calls.

An array is rows of ``size`` values that share a scale, the last of a row perhaps fewer; or each column has a scale.
Four pieces combine, each a few instructions on a vector of 16 values, which LLVM cuts into what the processor has:

- **statistics**: the largest magnitude, or the smallest and the largest value, as integers: patterns of floats order as
  the floats do, once those below zero are turned over, and NaN lies beyond infinity;
- **the scale of a group** from its largest magnitude, kept as it is or as a float of few bits;
- **numbers**: whole ones, floats of few bits, or the places between cuts, as lanes of 32 bits;
- **packing**: lanes become bytes, and neighbours that have fewer than 8 bits move together, twice as wide each time.

A vector that is not full goes through memory of its own, so that no loop looks one value at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from aqt_lite.backends.cpu.emit import function, in_all_lanes, read_ahead
from aqt_lite.backends.cpu.native import apart, task_of
from aqt_lite.backends.cpu.pool import in_parts

__all__ = ["BITS", "CODEBOOK", "FLOAT", "INTEGER", "LANES", "MOST_CUTS", "WHOLE_NUMBERS", "encode", "encode_apart",
           "encode_columns", "encode_columns_apart", "encode_kept", "magnitudes", "magnitudes_apart",
           "magnitudes_of_columns", "magnitudes_of_columns_apart", "quantize", "quantize_apart", "quantize_in_parts",
           "ranges", "ranges_apart", "ranges_of_columns", "ranges_of_columns_apart"]  # fmt: skip

LANES = 16

INTEGER, FLOAT, CODEBOOK, WHOLE_NUMBERS = 0, 1, 2, 3
"""Kinds of numbers; ``encoders`` says what each is told of."""

BITS = {INTEGER: (2, 4, 8, 16), FLOAT: (4, 8), CODEBOOK: (4, 8), WHOLE_NUMBERS: (2, 4, 8, 16)}
"""Of a code in memory."""

MOST_CUTS = 15
"""Cuts of a codebook, which a loop compares with one after the other: fewer are filled up with infinity."""

_BYTE, _INT, _ADDRESS, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)


def _all(number: float, vector: Any = _INTS) -> Any:
    return ir.Constant(vector, [number] * LANES)


def _place(builder: Any, base: Any, index: Any, size: int, its_type: Any) -> Any:
    address = builder.add(base, builder.mul(index, _ADDRESS(size)))
    return builder.inttoptr(address, its_type.as_pointer())


def _parameter(builder: Any, base: Any, i: int, vector: Any) -> Any:
    """One of the numbers at ``base``, in all lanes."""
    item = _FLOAT if vector is _FLOATS else _INT
    return in_all_lanes(builder, builder.load(_place(builder, base, _ADDRESS(i), 4, item), align=4), vector)


def _extreme(builder: Any, a: Any, b: Any, relation: str) -> Any:
    return builder.select(builder.icmp_signed(relation, a, b), a, b)


def _for_vectors(builder: Any, x: Any, count: Any, filler: Any, work: Any) -> None:
    """``work(i, vector, there)`` on the floats at ``x``; ``there`` is 16, or how many of the last vector there are.

    The rest of that one is ``filler``.
    """
    with cgutils.for_range(builder, builder.ashr(count, _ADDRESS(4))) as loop:
        work(loop.index, builder.load(_place(builder, x, loop.index, 64, _FLOATS), align=4), None)
    rest = builder.and_(count, _ADDRESS(LANES - 1))
    with builder.if_then(builder.icmp_signed(">", rest, _ADDRESS(0)), likely=False):
        whole = builder.ashr(count, _ADDRESS(4))
        buffer = cgutils.alloca_once(builder, _FLOATS)
        builder.store(filler, buffer, align=4)
        own, first = builder.ptrtoint(buffer, _ADDRESS), builder.mul(whole, _ADDRESS(LANES))
        with cgutils.for_range(builder, rest) as loop:
            value = builder.load(_place(builder, x, builder.add(first, loop.index), 4, _FLOAT), align=4)
            builder.store(value, _place(builder, own, loop.index, 4, _FLOAT), align=4)
        work(whole, builder.load(buffer, align=4), rest)


# ---- statistics


def _ordered(builder: Any, bits: Any) -> Any:
    """Patterns of floats as integers of the same order; its own inverse."""
    below = builder.and_(builder.ashr(bits, _all(31)), _all(0x7FFFFFFF))
    return builder.xor(bits, below)


def _for_groups(builder: Any, x: Any, size: Any, length: Any, work: Any) -> None:
    """``work(g, address, count)`` for the groups of a row of ``length`` floats at ``x``."""
    last = builder.sub(builder.add(length, size), _ADDRESS(1))
    with cgutils.for_range(builder, builder.udiv(last, size)) as loop:
        first = builder.mul(loop.index, size)
        rest = builder.sub(length, first)
        count = builder.select(builder.icmp_signed("<", rest, size), rest, size)
        work(loop.index, builder.add(x, builder.mul(first, _ADDRESS(4))), count)


def _within(builder: Any, there: Any) -> Any:
    """Which lanes come before that one."""
    number = ir.Constant(_INTS, list(range(LANES)))
    return builder.icmp_signed("<", number, in_all_lanes(builder, builder.trunc(there, _INT), _INTS))


WHOLE = 1, 2, 4, 8
"""Vectors of the groups that usual formats have: their statistics are taken without a loop inside the loop."""


def _across(builder: Any, lanes: Any, relation: str) -> Any:
    """The extreme of all lanes: halves against each other, each half as wide a vector as the one before."""
    width = LANES
    while width > 1:
        width //= 2
        lower, upper = (
            builder.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(_INT, width), list(range(a, a + width))))
            for a in (0, width)
        )
        lanes = _extreme(builder, lower, upper, relation)
    return builder.extract_element(lanes, _INT(0))


def _statistic(of: Any, relation: str, first: int) -> Any:
    """The extreme of ``of(builder, patterns)`` of each group of a row of floats, as integers into memory."""

    @intrinsic
    def statistic(_: Any, x: Any, size: Any, length: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, size, length, out = arguments
            found, done = cgutils.alloca_once(builder, _INTS), cgutils.alloca_once(builder, _ADDRESS)

            def put(g: Any, lanes: Any, out: Any) -> None:
                builder.store(_across(builder, lanes, relation), _place(builder, out, g, 4, _INT), align=4)

            builder.store(_ADDRESS(0), done)
            for vectors in WHOLE:
                with builder.if_then(builder.icmp_signed("==", size, _ADDRESS(vectors * LANES))):
                    groups = builder.udiv(length, _ADDRESS(vectors * LANES))
                    with cgutils.for_range(builder, groups) as loop:
                        of_group = builder.mul(loop.index, _ADDRESS(vectors))
                        places = [builder.add(of_group, _ADDRESS(v)) for v in range(vectors)]
                        keys = [
                            of(builder, builder.load(_place(builder, x, place, 4 * LANES, _INTS), align=4))
                            for place in places
                        ]
                        while len(keys) > 1:
                            keys = [
                                _extreme(builder, a, b, relation) for a, b in zip(keys[::2], keys[1::2], strict=True)
                            ]
                        put(loop.index, keys[0], out)
                    builder.store(groups, done)

            def group(g: Any, here: Any, count: Any) -> None:
                builder.store(_all(first), found)

                def work(_: Any, values: Any, there: Any) -> None:
                    keys = of(builder, builder.bitcast(values, _INTS))
                    if there is not None:
                        keys = builder.select(_within(builder, there), keys, _all(first))
                    builder.store(_extreme(builder, builder.load(found), keys, relation), found)

                _for_vectors(builder, here, count, _all(0.0, _FLOATS), work)
                put(g, builder.load(found), rest_of_out)

            before = builder.load(done)
            passed = builder.mul(before, size)
            rest_of_x = builder.add(x, builder.mul(passed, _ADDRESS(4)))
            rest_of_out = builder.add(out, builder.mul(before, _ADDRESS(4)))
            _for_groups(builder, rest_of_x, size, builder.sub(length, passed), group)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 4), generate

    return statistic


def _magnitude(builder: Any, bits: Any) -> Any:
    return builder.and_(bits, _all(0x7FFFFFFF))


_largest_magnitude = _statistic(_magnitude, ">", 0)
_smallest, _largest = _statistic(_ordered, "<", 0x7FFFFFFF), _statistic(_ordered, ">", -0x80000000)


@njit(nogil=True, cache=True)
def magnitudes(x: Any, size: Any, most: Any) -> None:  # pragma: no cover - compiled
    """The pattern of the largest magnitude of each group, an int32; beyond infinity's where NaN is among them."""
    if x.shape[1] == size:  # rows of one group are groups of one row
        _largest_magnitude(x.ctypes.data, size, x.size, most.ctypes.data)
        return
    for r in range(x.shape[0]):
        _largest_magnitude(x[r].ctypes.data, size, x.shape[1], most[r].ctypes.data)


magnitudes_apart = apart(magnitudes, "void(float32[:,::1], int64, int32[:,::1])")


@njit(nogil=True, cache=True)
def ranges(x: Any, size: Any, low: Any, high: Any) -> None:  # pragma: no cover - compiled
    """The patterns of the smallest and the largest value of each group; NaN is one of them where it is among them."""
    for r in range(x.shape[0]):
        _smallest(x[r].ctypes.data, size, x.shape[1], low[r].ctypes.data)
        _largest(x[r].ctypes.data, size, x.shape[1], high[r].ctypes.data)
        for ends in (low[r], high[r]):
            for g in range(ends.shape[0]):
                ends[g] ^= (ends[g] >> np.int32(31)) & np.int32(0x7FFFFFFF)


ranges_apart = apart(ranges, "void(float32[:,::1], int64, int32[:,::1], int32[:,::1])")


# ---- numbers: ``v`` as lanes of codes; what they are told comes in ``types_of_parameters``, in all lanes


def _integers(builder: Any, v: Any, zero: Any, least: Any, most: Any) -> Any:
    """Smallest and largest code. Halves to even; the zero point is added to what is whole already."""
    code = builder.fadd(builder.call(function(builder, "llvm.rint.v16f32", _FLOATS, [_FLOATS]), [v]), zero)
    clipped = builder.select(builder.fcmp_ordered(">", code, least), code, least)
    clipped = builder.select(builder.fcmp_ordered("<", clipped, most), clipped, most)
    return builder.fptosi(builder.select(builder.fcmp_unordered("uno", code, code), zero, clipped), _INTS)


def _whole_numbers(builder: Any, v: Any, zero: Any, least: Any, most: Any, magic: Any) -> Any:
    """Integers of one zero point, ``least`` and ``most`` below it: the last bits of a sum whose last bit is 1.

    ``magic`` is 1.5 * 2^23 and the zero point, an even number: the sum is rounded as the value alone would be, halves
    to even. NaN gets the code of zero.
    """
    clipped = builder.select(builder.fcmp_ordered(">", v, least), v, least)
    clipped = builder.select(builder.fcmp_ordered("<", clipped, most), clipped, most)
    clipped = builder.select(builder.fcmp_ordered("ord", v, v), clipped, _all(0.0, _FLOATS))
    return builder.bitcast(builder.fadd(clipped, magic), _INTS)


def _floats(
    builder: Any, v: Any, zero: Any, drop: Any, half: Any, most: Any, lowest: Any, magic: Any, sign_bit: Any, above: Any
) -> Any:
    """By bit patterns, as ``twins._Float`` does, where each step is explained; ``half`` has the bias in it.

    NaN is made 0 first. Codes get a sign that are ``above`` 0, or -1 where zero has one.
    """
    v = builder.select(builder.fcmp_ordered("ord", v, v), v, _all(0.0, _FLOATS))
    bits = builder.bitcast(v, _INTS)
    u = _extreme(builder, builder.and_(bits, _all(0x7FFFFFFF)), most, "<")
    code = builder.add(builder.and_(builder.ashr(u, drop), _all(1)), builder.add(u, half))
    small = builder.bitcast(builder.fadd(builder.bitcast(u, _FLOATS), builder.bitcast(magic, _FLOATS)), _INTS)
    code = builder.select(builder.icmp_signed("<", u, lowest), builder.sub(small, magic), builder.ashr(code, drop))
    sign = builder.and_(builder.ashr(bits, _all(31)), sign_bit)
    return builder.or_(code, builder.select(builder.icmp_signed(">", code, above), sign, _all(0)))


def _places(builder: Any, v: Any, zero: Any, *told: Any) -> Any:
    """How many cuts lie below, and which code that is: two words of 8 codes of 4 bits; then the code of NaN."""
    place = _all(0)
    *cuts, low, high, of_nan = told
    for cut in cuts:
        above = builder.fcmp_ordered(">", v, cut)
        place = builder.sub(place, builder.sext(above, _INTS))
    shift = builder.shl(builder.and_(place, _all(7)), _all(2))
    word = builder.select(builder.icmp_signed("<", place, _all(8)), low, high)
    code = builder.and_(builder.lshr(word, shift), _all(15))
    return builder.select(builder.fcmp_unordered("uno", v, v), of_nan, code)


_TOLD = {
    _integers: [_FLOATS] * 2,
    _whole_numbers: [_FLOATS] * 3,
    _floats: [_INTS] * 7,
    _places: [_FLOATS] * MOST_CUTS + [_INTS] * 3,
}

# ---- packing


def _packed(builder: Any, lanes: Any, bits: int) -> Any:
    """16 codes as the fewest bytes: a vector of integers whose bytes are the stream."""
    if bits >= 8:
        return builder.trunc(lanes, ir.VectorType(ir.IntType(bits), LANES))
    codes, width, count = builder.and_(lanes, _all((1 << bits) - 1)), 32, LANES
    while bits < 8:
        count //= 2
        pairs = ir.VectorType(ir.IntType(2 * width), count)
        both = builder.bitcast(codes, pairs)
        both = builder.or_(both, builder.lshr(both, ir.Constant(pairs, [width - bits] * count)))
        bits, width = 2 * bits, 8
        codes = builder.trunc(both, ir.VectorType(_BYTE, count))
        if bits < 8:
            codes = builder.and_(codes, ir.Constant(ir.VectorType(_BYTE, count), [(1 << bits) - 1] * count))
    return codes


_CODES = [
    *((INTEGER, _integers, bits) for bits in BITS[INTEGER]),
    *((FLOAT, _floats, bits) for bits in BITS[FLOAT]),
    *((CODEBOOK, _places, bits) for bits in BITS[CODEBOOK]),
    *((WHOLE_NUMBERS, _whole_numbers, bits) for bits in BITS[WHOLE_NUMBERS]),
]


def _encoder(of_columns: bool) -> Any:
    """Codes of ``x * inverse * factor``, ``zero`` further on, of the groups of a row; or of columns, each with its own.

    Arguments: kind and bits of codes; the addresses of the floats, and the lengths of a group and of the row; addresses
    of the three numbers of the first group, each with the distance in bytes to those of the next; of what ``numbers``
    is told; of the stream; and how many bytes ahead lies what is read next, which is fetched meanwhile. Of columns a
    vector is a group, and its three numbers are vectors.
    """

    @intrinsic
    def encode(
        _: Any, kind: Any, bits: Any, x: Any, size: Any, length: Any, inverse: Any, factor: Any, zero: Any, by: Any,
        by_factor: Any, by_zero: Any, parameters: Any, out: Any, ahead: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            kind, bits, *others = arguments
            for its_kind, numbers, its_bits in _CODES:
                same = builder.icmp_signed("==", kind, _ADDRESS(its_kind))
                with builder.if_then(builder.and_(same, builder.icmp_signed("==", bits, _ADDRESS(its_bits)))):
                    _encode_groups(builder, numbers, its_bits, of_columns, *others)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 14), generate

    return encode


def _encode_groups(
    builder: Any, numbers: Any, bits: int, of_columns: bool, x: Any, size: Any, length: Any, inverse: Any, factor: Any,
    zero: Any, by: Any, by_factor: Any, by_zero: Any, parameters: Any, out: Any, ahead: Any,
) -> None:  # fmt: skip
    """Groups of whole vectors in one loop, which counts those ``left`` of a group; others one after the other.

    A loop of its own for each group took longer than the codes of 32 values.
    """
    told = [_parameter(builder, parameters, i, vector) for i, vector in enumerate(_TOLD[numbers])]
    buffer, left = cgutils.alloca_once(builder, _INTS), cgutils.alloca_once(builder, _ADDRESS)
    places = [(inverse, by), (factor, by_factor), (zero, by_zero)]
    own = [cgutils.alloca_once(builder, _ADDRESS) for _ in places]
    follow = builder.icmp_signed("==", builder.and_(size, _ADDRESS(LANES - 1)), _ADDRESS(0))
    run, vectors = builder.select(follow, length, size), builder.select(follow, builder.lshr(size, _ADDRESS(4)), length)

    def several(r: Any, here: Any, count: Any) -> None:
        for (start, step), place in zip(places, own, strict=True):
            builder.store(builder.add(start, builder.mul(r, step)), place)
        builder.store(vectors, left)
        stream_of_run = builder.add(out, builder.lshr(builder.mul(builder.mul(r, run), _ADDRESS(bits)), _ADDRESS(3)))

        def work(i: Any, values: Any, there: Any) -> None:
            read_ahead(builder, builder.add(here, builder.add(builder.mul(i, _ADDRESS(64)), ahead)))
            by_inverse, by_factor, zero = (
                builder.load(_place(builder, builder.load(place), _ADDRESS(0), 0, _FLOATS), align=4)
                if of_columns
                else _parameter(builder, builder.load(place), 0, _FLOATS)
                for place in own
            )
            v = builder.fmul(builder.fmul(values, by_inverse), by_factor)
            lanes = numbers(builder, v, zero, *told)
            at = builder.add(stream_of_run, builder.mul(i, _ADDRESS(2 * bits)))
            if there is None:
                stream = _packed(builder, lanes, bits)
                builder.store(stream, builder.inttoptr(at, stream.type.as_pointer()), align=1)
                others = builder.sub(builder.load(left), _ADDRESS(1))
                none = builder.icmp_signed("==", others, _ADDRESS(0))
                builder.store(builder.select(none, vectors, others), left)
                for (_, step), place in zip(places, own, strict=True):
                    passed = builder.select(none, step, _ADDRESS(0))
                    builder.store(builder.add(builder.load(place), passed), place)
                return
            # a stream is filled up with zeros
            stream = _packed(builder, builder.select(_within(builder, there), lanes, _all(0)), bits)
            memory = builder.bitcast(buffer, stream.type.as_pointer())
            builder.store(stream, memory, align=1)
            filled = builder.add(builder.mul(there, _ADDRESS(bits)), _ADDRESS(7))
            with cgutils.for_range(builder, builder.lshr(filled, _ADDRESS(3))) as loop:
                byte = _place(builder, builder.ptrtoint(buffer, _ADDRESS), loop.index, 1, _BYTE)
                builder.store(builder.load(byte, align=1), _place(builder, at, loop.index, 1, _BYTE), align=1)

        _for_vectors(builder, here, count, _all(0.0, _FLOATS), work)

    _for_groups(builder, x, run, length, several)


_groups, _columns = _encoder(False), _encoder(True)


@njit(nogil=True, cache=True)
def _encode(
    kind: Any, bits: Any, x: Any, size: Any, length: Any, inverse: Any, factor: Any, zero: Any, by: Any,
    by_factor: Any, by_zero: Any, told: Any, out: Any, ahead: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    _groups(kind, bits, x, size, length, inverse, factor, zero, by, by_factor, by_zero, told, out, ahead)


_encode_apart = apart(_encode, f"void({', '.join(['int64'] * 14)})")


@njit(nogil=True, cache=True)
def encode(
    x: Any, size: Any, kind: Any, bits: Any, parameters: Any, inverse: Any, factor: Any, zero: Any, out: Any
) -> None:  # pragma: no cover - compiled
    """Codes of rows of groups, each with a reciprocal of its scale, a power of two beside it, and a zero point.

    Those three are float32, (rows, groups) or (1, 1), the last two perhaps where the first is not. ``out`` is bytes, a
    row of them for each row of x.
    """
    by = 4 if inverse.size > 1 else 0
    by_factor, by_zero = 4 if factor.size > 1 else 0, 4 if zero.size > 1 else 0
    rows, length = x.shape
    if length == size and by and 8 * out.shape[1] == length * bits:  # rows of one group are groups of one row
        rows, length = 1, x.size
    groups = (length + size - 1) // size
    start, at, told = x.ctypes.data, out.ctypes.data, parameters.ctypes.data
    for r in range(rows):
        g = r * groups
        _encode_apart((
            kind, bits, start + 4 * r * length, size, length, inverse.ctypes.data + g * by,
            factor.ctypes.data + g * by_factor, zero.ctypes.data + g * by_zero, by, by_factor, by_zero, told,
            at + r * out.strides[0], 0,
        ))  # fmt: skip


encode_apart = apart(
    encode,
    "void(float32[:,::1], int64, int64, int64, int32[::1], float32[:,::1], float32[:,::1], "
    "float32[:,::1], uint8[:,::1])",
)


# ---- columns

ACROSS = 8192
"""Columns at a time: the three numbers of each stay in the second cache, and memory is read in long runs."""


@njit(nogil=True, cache=True)
def magnitudes_of_columns(x: Any, size: Any, most: Any) -> None:  # pragma: no cover - compiled
    """As ``magnitudes``, of the columns of each ``size`` rows."""
    patterns = x.view(np.int32)
    for part in range(most.shape[0]):
        for c in range(0, x.shape[1], ACROSS):
            own = most[part, c : c + ACROSS]
            own[:] = 0
            for r in range(part * size, min(part * size + size, x.shape[0])):
                row = patterns[r, c : c + ACROSS]
                for i in range(own.shape[0]):
                    own[i] = max(own[i], row[i] & np.int32(0x7FFFFFFF))


magnitudes_of_columns_apart = apart(magnitudes_of_columns, "void(float32[:,::1], int64, int32[:,::1])")


@njit(nogil=True, cache=True)
def ranges_of_columns(x: Any, size: Any, low: Any, high: Any) -> None:  # pragma: no cover - compiled
    """As ``ranges``, of the columns of each ``size`` rows."""
    patterns = x.view(np.int32)
    for part in range(low.shape[0]):
        for c in range(0, x.shape[1], ACROSS):
            least, most = low[part, c : c + ACROSS], high[part, c : c + ACROSS]
            least[:], most[:] = 0x7FFFFFFF, -0x80000000
            for r in range(part * size, min(part * size + size, x.shape[0])):
                row = patterns[r, c : c + ACROSS]
                for i in range(least.shape[0]):
                    key = row[i] ^ ((row[i] >> np.int32(31)) & np.int32(0x7FFFFFFF))
                    least[i], most[i] = min(least[i], key), max(most[i], key)
            for ends in (least, most):
                for i in range(ends.shape[0]):
                    ends[i] ^= (ends[i] >> np.int32(31)) & np.int32(0x7FFFFFFF)


ranges_of_columns_apart = apart(ranges_of_columns, "void(float32[:,::1], int64, int32[:,::1], int32[:,::1])")


@njit(nogil=True, cache=True)
def encode_columns(
    x: Any, kind: Any, bits: Any, parameters: Any, inverse: Any, factor: Any, zero: Any, out: Any
) -> None:  # pragma: no cover - compiled
    """As ``encode``, where each column has the three numbers; these are filled up to whole vectors."""
    rows, length = x.shape
    start, at, step = x.ctypes.data, out.ctypes.data, out.strides[0]
    for c in range(0, length, ACROSS):
        count = min(ACROSS, length - c)
        for r in range(rows):
            _columns(
                kind, bits, start + 4 * (r * length + c), LANES, count, inverse.ctypes.data + 4 * c,
                factor.ctypes.data + 4 * c, zero.ctypes.data + 4 * c, 64, 64, 64, parameters.ctypes.data,
                at + r * step + ((c * bits) >> 3), 4 * length,
            )  # fmt: skip


encode_columns_apart = apart(
    encode_columns,
    "void(float32[:,::1], int64, int64, int32[::1], float32[:,::1], float32[:,::1], float32[:,::1], uint8[:,::1])",
)


# ---- scales and codes at once

TOGETHER = 2048
"""Values whose statistics are taken before their codes are made, at least: a part of the first cache."""

_NAN, _SIGNIFICAND, _LEADING = (np.int32(n) for n in (0x7FC00000, 0x7FFFFF, 0x800000))
_NOTHING, _ONE = np.int32(0), np.int32(1)


@njit(nogil=True, cache=True)
def _choose(most: Any, count: Any, rule: Any, scale: Any) -> Any:  # pragma: no cover - compiled
    """Scales of ``count`` groups from their largest magnitudes; whether all of these are finite."""
    by_most, tiny, least, of_zeros, finite = rule[0], rule[1], rule[2], rule[3], True
    for i in range(count):
        s = np.float32((most[i] if most[i] >= tiny else np.float32(0)) * by_most)
        s = of_zeros if s < tiny else max(s, least)
        scale[i] = s if most[i] < np.float32(np.inf) else np.float32(np.nan)
        finite &= most[i] < np.float32(np.inf)
    return finite


@njit(nogil=True, cache=True)
def _keep(kept: Any, patterns: Any, count: Any, codes: Any) -> Any:  # pragma: no cover - compiled
    """Codes of scales, and in place of these the numbers that the codes stand for; whether all have such a number.

    As ``Float.encode``, of what is not below 0: a scale is ``whole * 2^(e - mantissa)``, and what it has beyond that,
    its last ``shift`` bits, adds 1 to ``whole`` from ``threshold`` on. Scales are normal floats or 0, and a scale below
    the smallest number has none: ``shift`` is 23 at most, and the pattern without those bits is the number's.
    """
    drop, lowest, hidden, part, over, even = kept[1], kept[2], kept[3], kept[4], kept[5], kept[6]
    smallest, beyond, largest, nan = kept[7], kept[8], kept[9], kept[10]
    without = _NOTHING
    for i in range(count):
        pattern = patterns[i]
        fits, is_zero = smallest <= pattern < beyond, pattern == _NOTHING
        u = min(pattern, largest) if fits else largest
        own = (u >> np.int32(23)) - np.int32(127)
        e = max(own, lowest)
        shift, significand = drop + (e - own), (u & _SIGNIFICAND) | _LEADING
        threshold = (part << (e - own)) + over - (even & (significand >> shift))
        carry = (_ONE << shift) - threshold
        code = ((significand + carry) >> shift) + ((e - lowest) << (np.int32(23) - drop)) - hidden
        codes[i] = code if fits else (_NOTHING if is_zero else nan)
        patterns[i] = (u + carry) >> shift << shift if fits else (_NOTHING if is_zero else _NAN)
        without |= _NOTHING if fits or is_zero else _ONE
    return without == _NOTHING


@njit(nogil=True, cache=True)
def _store(codes: Any, count: Any, width: Any, out: Any) -> None:  # pragma: no cover - compiled
    """The lowest bytes of codes, as many as they are kept in."""
    if width == 1:
        for i in range(count):
            out[i] = codes[i]
    elif width == 2:
        halves = out.view(np.int16)
        for i in range(count):
            halves[i] = codes[i]
    else:
        words = out.view(np.int32)
        for i in range(count):
            words[i] = codes[i]


@njit(nogil=True, cache=True, error_model="numpy")
def _invert(
    scale: Any, count: Any, headroom: Any, step: Any, of_zeros: Any, inverse: Any, factor: Any
) -> None:  # pragma: no cover - compiled
    """What values are multiplied by, in turn: as ``encoders.steps_of``."""
    for i in range(count):
        s = scale[i]
        beside = headroom if s > np.float32(1) else np.float32(1)
        inverse[i], factor[i] = np.float32(1) / (s * beside), beside * step
        if s == np.float32(0) and of_zeros == np.float32(0):
            inverse[i] = np.float32(0)


@njit(nogil=True, cache=True)
def quantize(
    x: Any, size: Any, kind: Any, bits: Any, parameters: Any, rule: Any, kept: Any, scale: Any, out: Any
) -> Any:  # pragma: no cover - compiled
    """Scales and codes of rows of groups, some groups at a time; False where a group has no scale that can be used.

    It has NaN then. ``rule``: what the largest magnitude is multiplied by, the magnitude that counts as 0, the least
    scale, the scale of zeros, two powers of two that values are multiplied by beside the reciprocal, the first where
    the scale is above 1, and the zero point. ``kept``, how scales are kept: bytes of one, and unless these are the
    float's own what ``_keep`` is told. ``scale`` and ``out`` are bytes, a row of them for each row of x. ``bits`` of 0
    asks for scales and no codes.

    What the loop inside makes no views of, since a view's owner is counted: that took a tenth of the time.
    """
    headroom, step, of_zeros, told = rule[4], rule[5], rule[3], parameters.ctypes.data
    rows, length = x.shape
    if length == size and 8 * out.shape[1] == length * bits:  # rows of one group are groups of one row
        rows, length = 1, x.size
    groups, together, width = (length + size - 1) // size, max(1, TOGETHER // size), kept[0]
    scales, most = scale.reshape(rows, groups * width), np.empty(together, dtype=np.float32)
    chosen, codes = np.empty(together, dtype=np.float32), np.empty(together, dtype=np.int32)
    inverse, factor, usable = np.empty_like(chosen), np.empty_like(chosen), True
    patterns, at_most, at_inverse, at_factor = (
        chosen.view(np.int32),
        most.ctypes.data,
        inverse.ctypes.data,
        factor.ctypes.data,
    )
    zero = rule.ctypes.data + 24
    for r in range(rows):
        start, at = x.ctypes.data + 4 * r * length, out.ctypes.data + r * out.strides[0]
        for g in range(0, groups, together):
            count = min(together, groups - g)
            here, some = start + 4 * g * size, min(count * size, length - g * size)
            _largest_magnitude(here, size, some, at_most)
            usable &= _choose(most, count, rule, chosen)
            if width < 4:
                usable &= _keep(kept, patterns, count, codes)
            _store(codes if width < 4 else patterns, count, width, scales[r, width * g : width * (g + count)])
            if bits == 0:
                continue
            _invert(chosen, count, headroom, step, of_zeros, inverse, factor)
            _encode_apart((
                kind, bits, here, size, some, at_inverse, at_factor, zero, 4, 4, 0, told,
                at + ((g * size * bits) >> 3), 4 * some,
            ))  # fmt: skip
    return usable


quantize_apart = apart(
    quantize,
    "boolean(float32[:,::1], int64, int64, int64, int32[::1], float32[::1], int32[::1], uint8[:,::1], uint8[:,::1])",
)


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    x, size, kind, bits, parameters, rule, kept, scale, out, usable = given
    if not quantize_apart((
        x[start:stop], size, kind, bits, parameters, rule, kept, scale[start:stop], out[start:stop]
    )):  # fmt: skip
        usable[0] = False


_task = task_of(_part)


@njit(nogil=True, cache=True)
def quantize_in_parts(
    pool: Any, ends: Any, x: Any, size: Any, kind: Any, bits: Any, parameters: Any, rule: Any, kept: Any, scale: Any,
    out: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``quantize`` for rows from each of ``ends`` to the next, on the threads of a pool."""
    usable = np.ones(1, dtype=np.bool_)
    in_parts(pool, ends, _task((x, size, kind, bits, parameters, rule, kept, scale, out, usable)))
    return usable[0]


# ---- scales first, and codes once all of them are known


@njit(nogil=True, cache=True)
def _look_up(codes: Any, steps: Any, inverse: Any, factor: Any) -> None:  # pragma: no cover - compiled
    for i in range(codes.shape[0]):
        code = np.intp(codes[i])
        inverse[i], factor[i] = steps[0, code], steps[1, code]


@njit(nogil=True, cache=True)
def encode_kept(
    x: Any, size: Any, kind: Any, bits: Any, parameters: Any, beside: Any, steps: Any, scale: Any, zero: Any, out: Any
) -> None:  # pragma: no cover - compiled
    """As ``encode``, from scales as they are kept, which become reciprocals some groups at a time.

    ``scale`` is bytes, a row of them for each row of x. ``steps`` has reciprocal and power of two of each code of one
    byte or two; there are none for scales that are float32, whose powers of two and scale of zeros are ``beside``.
    """
    rows, length = x.shape
    width, told = scale.shape[1] // ((length + size - 1) // size), parameters.ctypes.data
    by_zero = 4 if zero.size > 1 else 0
    if length == size and 8 * out.shape[1] == length * bits:
        rows, length = 1, x.size
    groups, together = (length + size - 1) // size, max(1, TOGETHER // size)
    scales = scale.reshape(rows, groups * width)
    inverse, factor = np.empty(together, dtype=np.float32), np.empty(together, dtype=np.float32)
    for r in range(rows):
        start, at = x.ctypes.data + 4 * r * length, out.ctypes.data + r * out.strides[0]
        for g in range(0, groups, together):
            count = min(together, groups - g)
            some, own = min(count * size, length - g * size), scales[r, width * g : width * (g + count)]
            if width == 1:
                _look_up(own, steps, inverse, factor)
            elif width == 2:
                _look_up(own.view(np.uint16), steps, inverse, factor)
            else:
                _invert(own.view(np.float32), count, beside[0], beside[1], beside[2], inverse, factor)
            _encode_apart((
                kind, bits, start + 4 * g * size, size, some, inverse.ctypes.data, factor.ctypes.data,
                zero.ctypes.data + (r * groups + g) * by_zero, 4, 4, by_zero, told, at + ((g * size * bits) >> 3),
                4 * some,
            ))  # fmt: skip
