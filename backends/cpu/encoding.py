"""Loops that make codes of float32 values, in registers: statistics of groups, scales, numbers of any kind, packing.

Owns: the loops, and the numba intrinsics in them. One file, because what numba caches of a function is renewed when its
own file changes, and not when another does; what the contract's constants are comes in as arguments. The loops hold no
lock and start no thread. ``encoders`` calls them, and says what they are for; so does what XLA calls.

An array is rows of ``size`` values that share a scale, the last of a row perhaps fewer. Four pieces combine, each a few
instructions on a vector of 16 values, which LLVM cuts into what the processor has:

- **statistics**: the largest magnitude, or the smallest and the largest value, as integers: patterns of floats order as
  the floats do, once those below zero are turned over, and NaN lies beyond infinity;
- **the scale of a group** from its largest magnitude, where scales are kept as they are;
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

__all__ = ["BITS", "CODEBOOK", "FLOAT", "INTEGER", "LANES", "MOST_CUTS", "encode", "magnitudes", "quantize", "ranges"]

LANES = 16

INTEGER, FLOAT, CODEBOOK = 0, 1, 2
"""Kinds of numbers; ``encoders`` says what each is told of."""

BITS = {INTEGER: (2, 4, 8, 16), FLOAT: (4, 8), CODEBOOK: (4, 8)}
"""Of a code in memory."""

MOST_CUTS = 15
"""Cuts of a codebook, which a loop compares with one after the other: fewer are filled up with infinity."""

_BYTE, _INT, _ADDRESS, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)


def _all(number: float, vector: Any = _INTS) -> Any:
    return ir.Constant(vector, [number] * LANES)


def _function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    found = builder.module.globals.get(name)
    return ir.Function(builder.module, ir.FunctionType(result, arguments), name) if found is None else found


def _place(builder: Any, base: Any, index: Any, size: int, its_type: Any) -> Any:
    address = builder.add(base, builder.mul(index, _ADDRESS(size)))
    return builder.inttoptr(address, its_type.as_pointer())


def _parameter(builder: Any, base: Any, i: int, vector: Any) -> Any:
    """One of the numbers at ``base``, in all lanes."""
    item = _FLOAT if vector is _FLOATS else _INT
    return _in_all_lanes(builder, builder.load(_place(builder, base, _ADDRESS(i), 4, item), align=4), vector)


def _in_all_lanes(builder: Any, value: Any, vector: Any = _FLOATS) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, [0] * LANES))


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


def _statistic(of: Any, relation: str, first: int) -> Any:
    """The extreme of ``of(builder, patterns)`` of ``count`` floats at an address, an integer."""

    @intrinsic  # type: ignore[untyped-decorator]
    def statistic(_: Any, x: Any, count: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, count = arguments
            found = cgutils.alloca_once_value(builder, _all(first))

            def work(_: Any, values: Any, there: Any) -> None:
                keys = of(builder, builder.bitcast(values, _INTS))
                if there is not None:
                    lanes = ir.Constant(_INTS, list(range(LANES)))
                    within = builder.icmp_signed("<", lanes, _in_all_lanes(builder, builder.trunc(there, _INT), _INTS))
                    keys = builder.select(within, keys, _all(first))
                builder.store(_extreme(builder, builder.load(found), keys, relation), found)

            _for_vectors(builder, x, count, _all(0.0, _FLOATS), work)
            lanes, width = builder.load(found), LANES
            while width > 1:  # halves against each other
                width //= 2
                order = [(i + width) % LANES for i in range(LANES)]
                lanes = _extreme(
                    builder, lanes, builder.shuffle_vector(lanes, lanes, ir.Constant(_INTS, order)), relation
                )
            return builder.extract_element(lanes, _INT(0))

        return types.int32(types.intp, types.intp), generate

    return statistic


def _magnitude(builder: Any, bits: Any) -> Any:
    return builder.and_(bits, _all(0x7FFFFFFF))


_largest_magnitude = _statistic(_magnitude, ">", 0)
_smallest, _largest = _statistic(_ordered, "<", 0x7FFFFFFF), _statistic(_ordered, ">", -0x80000000)


@njit(nogil=True, cache=True)
def magnitudes(x: Any, size: Any, most: Any) -> None:  # pragma: no cover - compiled
    """The pattern of the largest magnitude of each group, an int32; beyond infinity's where NaN is among them."""
    start, by, length = x.ctypes.data, x.strides[0], x.shape[1]
    for r in range(x.shape[0]):
        for g in range(most.shape[1]):
            most[r, g] = _largest_magnitude(start + r * by + 4 * g * size, min(size, length - g * size))


@njit(nogil=True, cache=True)
def ranges(x: Any, size: Any, low: Any, high: Any) -> None:  # pragma: no cover - compiled
    """The patterns of the smallest and the largest value of each group; NaN is one of them where it is among them."""
    start, by, length = x.ctypes.data, x.strides[0], x.shape[1]
    for r in range(x.shape[0]):
        for g in range(low.shape[1]):
            at, count = start + r * by + 4 * g * size, min(size, length - g * size)
            for ends, key in ((low, _smallest(at, count)), (high, _largest(at, count))):
                ends[r, g] = key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))


# ---- numbers: ``v`` as lanes of codes


def _integers(builder: Any, v: Any, zero: Any, parameters: Any) -> Any:
    """Smallest and largest code. Halves to even; the zero point is added to what is whole already."""
    least, most = (_parameter(builder, parameters, i, _FLOATS) for i in range(2))
    code = builder.fadd(builder.call(_function(builder, "llvm.rint.v16f32", _FLOATS, [_FLOATS]), [v]), zero)
    clipped = builder.select(builder.fcmp_ordered(">", code, least), code, least)
    clipped = builder.select(builder.fcmp_ordered("<", clipped, most), clipped, most)
    return builder.fptosi(builder.select(builder.fcmp_unordered("uno", code, code), zero, clipped), _INTS)


def _floats(builder: Any, v: Any, zero: Any, parameters: Any) -> Any:
    """By bit patterns: see ``twins._Float``, whose numbers these are, in the order of ``encoders``."""
    drop, half, bias, most, lowest, magic, sign_bit, keeps_sign = (
        _parameter(builder, parameters, i, _INTS) for i in range(8)
    )
    bits = builder.bitcast(v, _INTS)
    u = builder.and_(bits, _all(0x7FFFFFFF))
    number = builder.icmp_signed("<=", u, _all(0x7F800000))
    u = _extreme(builder, builder.select(number, u, _all(0)), most, "<")
    code = builder.add(builder.and_(builder.ashr(u, drop), _all(1)), builder.add(u, half))
    code = builder.sub(builder.ashr(code, drop), bias)
    small = builder.bitcast(builder.fadd(builder.bitcast(u, _FLOATS), builder.bitcast(magic, _FLOATS)), _INTS)
    code = builder.select(builder.icmp_signed("<", u, lowest), builder.sub(small, magic), code)
    signed = builder.select(
        builder.icmp_signed("!=", keeps_sign, _all(0)), number, builder.icmp_signed(">", code, _all(0))
    )
    sign = builder.and_(builder.ashr(bits, _all(31)), sign_bit)
    return builder.or_(code, builder.select(signed, sign, _all(0)))


def _places(builder: Any, v: Any, zero: Any, parameters: Any) -> Any:
    """How many cuts lie below, and which code that is: two words of 8 codes of 4 bits; then the code of NaN."""
    place = _all(0)
    for i in range(MOST_CUTS):
        above = builder.fcmp_ordered(">", v, _parameter(builder, parameters, i, _FLOATS))
        place = builder.sub(place, builder.sext(above, _INTS))
    shift = builder.shl(builder.and_(place, _all(7)), _all(2))
    low, high, of_nan = (_parameter(builder, parameters, MOST_CUTS + i, _INTS) for i in range(3))
    word = builder.select(builder.icmp_signed("<", place, _all(8)), low, high)
    code = builder.and_(builder.lshr(word, shift), _all(15))
    return builder.select(builder.fcmp_unordered("uno", v, v), of_nan, code)


# ---- packing


def _packed(builder: Any, lanes: Any, bits: int) -> Any:
    """16 codes as the fewest bytes: a vector of integers whose bytes are the stream."""
    if bits >= 8:
        return builder.trunc(lanes, ir.VectorType(ir.IntType(bits), LANES))
    codes, count = builder.trunc(builder.and_(lanes, _all((1 << bits) - 1)), ir.VectorType(_BYTE, LANES)), LANES
    while bits < 8:
        count //= 2
        pairs = ir.VectorType(ir.IntType(16), count)
        both = builder.bitcast(codes, pairs)
        both = builder.or_(both, builder.lshr(both, ir.Constant(pairs, [8 - bits] * count)))
        bits *= 2
        codes = builder.trunc(both, ir.VectorType(_BYTE, count))
        if bits < 8:
            codes = builder.and_(codes, ir.Constant(ir.VectorType(_BYTE, count), [(1 << bits) - 1] * count))
    return codes


def _encoder(numbers: Any, bits: int) -> Any:
    """Codes of ``x * inverse * factor``, ``zero`` further on, of ``bits`` bits each, into memory.

    Arguments: the addresses of ``count`` floats, of what ``numbers`` is told of, and of the stream.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def encode(_: Any, x: Any, count: Any, inverse: Any, factor: Any, zero: Any, parameters: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, count, *of_group, parameters, out = arguments
            inverse, factor, zero = (_in_all_lanes(builder, number) for number in of_group)

            def work(i: Any, values: Any, there: Any) -> None:
                v = builder.fmul(builder.fmul(values, inverse), factor)
                lanes = numbers(builder, v, zero, parameters)
                if there is None:
                    stream = _packed(builder, lanes, bits)
                    builder.store(stream, _place(builder, out, i, 2 * bits, stream.type), align=1)
                    return
                number = ir.Constant(_INTS, list(range(LANES)))  # a stream is filled up with zeros
                within = builder.icmp_signed("<", number, _in_all_lanes(builder, builder.trunc(there, _INT), _INTS))
                stream = _packed(builder, builder.select(within, lanes, _all(0)), bits)
                buffer = cgutils.alloca_once(builder, stream.type)
                builder.store(stream, buffer, align=1)
                own, first = builder.ptrtoint(buffer, _ADDRESS), builder.mul(i, _ADDRESS(2 * bits))
                last = builder.ashr(builder.add(builder.mul(there, _ADDRESS(bits)), _ADDRESS(7)), _ADDRESS(3))
                with cgutils.for_range(builder, last) as loop:
                    byte = builder.load(_place(builder, own, loop.index, 1, _BYTE), align=1)
                    builder.store(byte, _place(builder, out, builder.add(first, loop.index), 1, _BYTE), align=1)

            _for_vectors(builder, x, count, _all(0.0, _FLOATS), work)
            return context.get_dummy_value()

        number = types.float32
        return types.void(types.intp, types.intp, number, number, number, types.intp, types.intp), generate

    return encode


_integers_of_2, _integers_of_4, _integers_of_8, _integers_of_16 = (_encoder(_integers, bits) for bits in (2, 4, 8, 16))
_floats_of_4, _floats_of_8 = (_encoder(_floats, bits) for bits in (4, 8))
_places_of_4, _places_of_8 = (_encoder(_places, bits) for bits in (4, 8))


@njit(nogil=True, cache=True)
def _encode(
    kind: Any, bits: Any, x: Any, count: Any, inverse: Any, factor: Any, zero: Any, parameters: Any, out: Any
) -> None:  # pragma: no cover - compiled
    if kind == INTEGER:
        if bits == 8:
            _integers_of_8(x, count, inverse, factor, zero, parameters, out)
        elif bits == 4:
            _integers_of_4(x, count, inverse, factor, zero, parameters, out)
        elif bits == 2:
            _integers_of_2(x, count, inverse, factor, zero, parameters, out)
        else:
            _integers_of_16(x, count, inverse, factor, zero, parameters, out)
    elif kind == FLOAT:
        if bits == 8:
            _floats_of_8(x, count, inverse, factor, zero, parameters, out)
        else:
            _floats_of_4(x, count, inverse, factor, zero, parameters, out)
    elif bits == 8:
        _places_of_8(x, count, inverse, factor, zero, parameters, out)
    else:
        _places_of_4(x, count, inverse, factor, zero, parameters, out)


@njit(nogil=True, cache=True)
def encode(
    x: Any, size: Any, kind: Any, bits: Any, parameters: Any, inverse: Any, factor: Any, zero: Any, out: Any
) -> None:  # pragma: no cover - compiled
    """Codes of rows of groups, each with a reciprocal of its scale, a power of two beside it, and a zero point.

    Those three are (rows, groups) or (1, 1), or (0, 0) for a factor of 1 and a zero point of 0. ``out`` is bytes, a row
    of them for each row of x.
    """
    start, by, length, at, step = x.ctypes.data, x.strides[0], x.shape[1], out.ctypes.data, out.strides[0]
    several, told = inverse.shape[0] > 1, parameters.ctypes.data
    for r in range(x.shape[0]):
        i = r if several else 0
        for g in range((length + size - 1) // size):
            j = g if inverse.shape[1] > 1 else 0
            f = factor[i, j] if factor.shape[0] > 0 else np.float32(1)
            z = np.float32(zero[i, j]) if zero.shape[0] > 0 else np.float32(0)
            count = min(size, length - g * size)
            _encode(
                kind, bits, start + r * by + 4 * g * size, count, inverse[i, j], f, z, told,
                at + r * step + g * size * bits // 8,
            )  # fmt: skip


@njit(nogil=True, cache=True)
def quantize(
    x: Any, size: Any, kind: Any, bits: Any, parameters: Any, rule: Any, scale: Any, out: Any
) -> Any:  # pragma: no cover - compiled
    """Scales and codes of rows of groups, each while it is in the cache; False where a value is not finite.

    ``rule``: what the largest magnitude is multiplied by, the magnitude that counts as 0, the least scale, the scale of
    zeros, a power of two that values are multiplied by beside the reciprocal, and the zero point.
    """
    start, by, length, at, step = x.ctypes.data, x.strides[0], x.shape[1], out.ctypes.data, out.strides[0]
    told, by_most, tiny, least, of_zeros = parameters.ctypes.data, rule[0], rule[1], rule[2], rule[3]
    pattern, finite = np.empty(1, dtype=np.int32), True
    value = pattern.view(np.float32)
    for r in range(x.shape[0]):
        for g in range(scale.shape[1]):
            here, count = start + r * by + 4 * g * size, min(size, length - g * size)
            pattern[0] = _largest_magnitude(here, count)
            finite = finite and pattern[0] < np.int32(0x7F800000)
            s = np.float32((value[0] if value[0] >= tiny else np.float32(0)) * by_most)
            s = of_zeros if s < tiny else max(s, least)
            scale[r, g] = s
            inverse = np.float32(1) / s
            _encode(
                kind, bits, here, count, inverse, rule[4], rule[5], told, at + r * step + g * size * bits // 8
            )  # fmt: skip
    return finite
