"""Loops for products of float32 with codes that become numbers in registers: of 8 bits, or of 4 and packed.

Owns: the loops, and the numba intrinsics in them. One file, because what numba caches of a function is renewed when its
own file changes, and not when another does. The loops hold no lock and start no thread. ``stored`` calls them, and says
what they are for.

A weight is (N, K), the sum runs along K, and every ``size`` codes of a row share a scale and a zero point. Two ideas
keep what happens to a code short:

- **4 bits: a group's table.** All 16 numbers that codes can stand for are one vector (two, where vectors have 8 lanes).
  ``(number - zero) * scale`` is done to the table, once a group, and one permutation of it by 16 codes then gives their
  values, whatever the format is: an integer, a float or a codebook. Of a vector of bytes the lower halves are the codes
  at even positions and the upper halves those at odd ones, so x is laid out that way once (``arrange``).
- **8 bits**: bytes are widened to floats, less the zero point, times the scale.

Either way a value is what dequantizing gives, to the bit. It stays in a register and meets several rows of x, so that
its price is shared. A tile of the result (``HEIGHT`` rows of the weight, ``ROWS`` of x) has one vector of sums for each
of its entries; ``DEPTH`` codes of a row meet a part of x that the first cache holds before the next part comes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

__all__ = [
    "AVAILABLE",
    "HEIGHT",
    "LANES",
    "ROWS",
    "ROWS_AT_ONCE",
    "STRIP",
    "arrange",
    "dequantize",
    "multiply",
    "shape_of_arranged",
]


def _features() -> set[str]:
    """Of the processor that numba compiles for; NUMBA_CPU_FEATURES may say another."""
    return set(str(cpu_target.target_context.codegen().magic_tuple()[-1]).split(","))


_WIDE = _features() >= {"+avx512f", "+avx512bw", "+avx512vl"}

AVAILABLE = _WIDE or _features() >= {"+avx2", "+fma"}
"""Whether the processor permutes vectors of floats by other vectors: of 16 lanes, or of 8."""

LANES = 16 if _WIDE else 8

HEIGHT = 4 if _WIDE else 2
"""Rows of the weight in a tile."""

HEIGHT_OF_ONE = 4
"""The same where x has one row."""

ROWS = 4
"""Rows of x in a tile: with more, sums no longer fit the registers."""

STRIP = 96
"""Rows of the weight whose sums are kept until K is done."""

DEPTH = 1024
"""Codes of a row that meet a part of x before the next: such a part of ``ROWS`` rows takes 16 KB."""

DEPTH_OF_ONE = 8192
"""The same where x has one row."""

MANY_ROWS = 16
"""Rows of x from which on a part of a strip is decoded to memory, once for all of them, and not once for each tile."""

DEPTH_OF_MANY = 512
"""Codes of a row in such a part, which the second cache holds: 192 KB."""

ROWS_AT_ONCE = 512
"""Rows of x whose sums are in memory at a time: a multiple of ``ROWS``."""

LARGE = np.uint32((100 + 127) << 23)
"""2^100, as its bits: numbers are less than 2^12, so that their products with smaller scales are finite."""

_BYTE, _INT, _ADDRESS, _FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()
_POINTER: Any = ir.PointerType(_BYTE)  # type: ignore[no-untyped-call]
_FLOATS, _INTS, _BYTES = (ir.VectorType(item, LANES) for item in (_FLOAT, _INT, _BYTE))


def _function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    found = builder.module.globals.get(name)
    return ir.Function(builder.module, ir.FunctionType(result, arguments), name) if found is None else found


def _load(builder: Any, address: Any, its_type: Any) -> Any:
    return builder.load(builder.inttoptr(address, its_type.as_pointer()), align=1)


def _at(builder: Any, base: Any, index: Any, size: int) -> Any:
    return builder.add(base, builder.mul(index, _ADDRESS(size)))


def _in_all_lanes(builder: Any, value: Any, vector: Any) -> Any:
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, _INT(0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_INTS, [0] * LANES))


def _loop(builder: Any, count: Any, totals: list[Any], step: Any) -> list[Any]:
    """``totals = step(i, totals)`` for i from 0 to count - 1, the totals in registers; count is at least 1."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(_ADDRESS)
    carried = [builder.phi(_FLOATS) for _ in totals]
    new = step(i, carried)
    following = builder.add(i, _ADDRESS(1))
    for phi, first, next_one in zip([i, *carried], [_ADDRESS(0), *totals], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(next_one, builder.block)  # where a loop inside has ended
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return new


class _Bytes:
    """8 bits: signed bytes, or unsigned ones whose highest bit ``flip`` turns over, which makes them 128 less."""

    lanes, vectors = _BYTES, 1  # a vector of codes, and how many of values it makes

    def __init__(self, builder: Any, table: Any, flip: Any) -> None:
        self.builder, self.flip = builder, _in_all_lanes(builder, builder.trunc(flip, _BYTE), _BYTES)

    def of_group(self, scale: Any, zero: Any) -> Any:
        return scale, zero

    def values(self, codes: Any, group: Any) -> list[Any]:
        scale, zero = group
        signed = self.builder.sext(self.builder.xor(codes, self.flip), _INTS)
        return [self.builder.fmul(self.builder.fsub(self.builder.sitofp(signed, _FLOATS), zero), scale)]


class _Halves:
    """4 bits, two codes a byte: positions in a table of 16 numbers."""

    lanes, vectors = _BYTES, 2

    def __init__(self, builder: Any, table: Any, flip: Any) -> None:
        self.builder = builder
        self.table = [_load(builder, _at(builder, table, _ADDRESS(i), 4), _FLOATS) for i in range(0, 16, LANES)]
        name = "llvm.x86.avx512.permvar.sf.512" if LANES == 16 else "llvm.x86.avx2.permps"
        self.permute = _function(builder, name, _FLOATS, [_FLOATS, _INTS])

    def of_group(self, scale: Any, zero: Any) -> Any:
        return [self.builder.fmul(self.builder.fsub(part, zero), scale) for part in self.table]

    def values(self, codes: Any, group: Any) -> list[Any]:
        both = self.builder.zext(codes, _INTS)
        upper = self.builder.lshr(both, ir.Constant(_INTS, [4] * LANES))
        return [self._looked_up(group, positions) for positions in (both, upper)]

    def _looked_up(self, table: list[Any], positions: Any) -> Any:
        """The instruction itself looks at no more bits of a position than it has lanes for."""
        found = [self.builder.call(self.permute, [part, positions]) for part in table]
        if len(found) == 1:
            return found[0]
        eighth = self.builder.and_(positions, ir.Constant(_INTS, [8] * LANES))
        return self.builder.select(
            self.builder.icmp_signed("==", eighth, ir.Constant(_INTS, [0] * LANES)), found[0], found[1]
        )


class _HalvesInOrder(_Halves):
    """The same, of half as many bytes: values come in the order of the codes."""

    lanes, vectors = ir.VectorType(_BYTE, LANES // 2), 1

    def values(self, codes: Any, group: Any) -> list[Any]:
        half = LANES // 2
        upper = self.builder.lshr(codes, ir.Constant(self.lanes, [4] * half))
        places = [i // 2 + half * (i % 2) for i in range(LANES)]
        in_order = self.builder.shuffle_vector(codes, upper, ir.Constant(_INTS, places))
        lower_bits = self.builder.and_(in_order, ir.Constant(_BYTES, [15] * LANES))
        return [self._looked_up(group, self.builder.zext(lower_bits, _INTS))]


class _Floats:
    """Values that have been decoded before."""

    lanes, vectors = _FLOATS, 1

    def __init__(self, builder: Any, table: Any, flip: Any) -> None:
        pass

    def of_group(self, scale: Any, zero: Any) -> Any:
        return None

    def values(self, codes: Any, group: Any) -> list[Any]:
        return [codes]


_Kind = type[_Bytes] | type[_Halves] | type[_Floats]  # _HalvesInOrder is one of _Halves


def _of_group(builder: Any, decoder: Any, scale: Any, zero: Any, g: Any) -> Any:
    numbers = (_load(builder, _at(builder, a, g, 4), _FLOAT) for a in (scale, zero))
    return decoder.of_group(*(_in_all_lanes(builder, v, _FLOATS) for v in numbers))


def _decoder(kind: _Kind) -> Any:
    """Values of ``groups`` of ``steps`` vectors of bytes each, of one row, in the order in which they are made."""

    @intrinsic  # type: ignore[untyped-decorator]
    def decode(_: Any, w: Any, scale: Any, zero: Any, table: Any, flip: Any, groups: Any, steps: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, scale, zero, table, flip, groups, steps, out = arguments
            decoder = kind(builder, table, flip)

            def group(g: Any, totals: list[Any]) -> list[Any]:
                of_group, first = _of_group(builder, decoder, scale, zero, g), builder.mul(g, steps)

                def step(i: Any, totals: list[Any]) -> list[Any]:
                    k = builder.add(first, i)
                    codes = _load(builder, _at(builder, w, k, kind.lanes.count), kind.lanes)
                    values = decoder.values(codes, of_group)
                    for v, value in enumerate(values):
                        place = _at(builder, builder.add(out, _ADDRESS(4 * LANES * v)), k, 4 * LANES * kind.vectors)
                        builder.store(value, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
                    return totals

                return _loop(builder, steps, totals, step)

            _loop(builder, groups, [], group)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return decode


def _tile(kind: _Kind, height: int, rows: int) -> Any:
    """``out[r, m, lane] += sum of value[r, k] x[m, k]`` over ``groups`` of ``steps`` vectors of bytes each.

    Arguments: addresses and strides in bytes of the codes, of x, of scales and of zero points (both float32, a row of
    them for each row of the weight); how many rows of the weight there are: after the last of these that one again,
    sums that go unread.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        _: Any, w: Any, w_stride: Any, there: Any, x: Any, x_stride: Any, scale: Any, s_stride: Any, zero: Any,
        z_stride: Any, table: Any, flip: Any, groups: Any, steps: Any, out: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, w_stride, there, x, x_stride, scale, s_stride, zero, z_stride, table, flip, groups, steps, out = (
                arguments
            )
            decoder, size_of_codes = kind(builder, table, flip), LANES * (4 if kind is _Floats else 1)
            fma = _function(builder, f"llvm.fma.v{LANES}f32", _FLOATS, [_FLOATS] * 3)
            last = builder.sub(there, _ADDRESS(1))
            inside = [
                builder.select(builder.icmp_signed("<", _ADDRESS(r), last), _ADDRESS(r), last) for r in range(height)
            ]
            of_codes, of_scales, of_zeros = (
                [builder.add(start, builder.mul(r, by)) for r in inside]
                for start, by in ((w, w_stride), (scale, s_stride), (zero, z_stride))
            )
            below = builder.add(w, builder.mul(w_stride, _ADDRESS(height)))
            fetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), [_POINTER, _INT, _INT, _INT])
            to_all_caches = [_INT(0), _INT(3), _INT(1)]
            of_x = [builder.add(x, builder.mul(x_stride, _ADDRESS(m))) for m in range(rows)]
            places = [builder.add(out, _ADDRESS(4 * LANES * i)) for i in range(height * rows)]

            def group(g: Any, totals: list[Any]) -> list[Any]:
                parameters = [_of_group(builder, decoder, s, z, g) for s, z in zip(of_scales, of_zeros, strict=True)]
                first = builder.mul(g, steps)

                def step(i: Any, totals: list[Any]) -> list[Any]:
                    k, totals = builder.add(first, i), list(totals)
                    if rows == 1:  # with more, arithmetic takes longer than memory
                        row = builder.add(below, builder.mul(builder.and_(k, _ADDRESS(height - 1)), w_stride))
                        line = builder.add(row, builder.and_(builder.mul(k, _ADDRESS(LANES)), _ADDRESS(-64)))
                        builder.call(fetch, [builder.inttoptr(line, _POINTER), *to_all_caches])
                    values = [
                        decoder.values(_load(builder, _at(builder, start, k, size_of_codes), kind.lanes), of_group)
                        for start, of_group in zip(of_codes, parameters, strict=True)
                    ]
                    for m in range(rows):
                        at = _at(builder, of_x[m], k, 4 * LANES * kind.vectors)
                        for v in range(kind.vectors):
                            entries = _load(builder, builder.add(at, _ADDRESS(4 * LANES * v)), _FLOATS)
                            for r in range(height):
                                i_out = r * rows + m
                                totals[i_out] = builder.call(fma, [values[r][v], entries, totals[i_out]])
                    return totals

                return _loop(builder, steps, totals, step)

            totals = [_load(builder, place, _FLOATS) for place in places]
            for place, total in zip(places, _loop(builder, groups, totals, group), strict=True):
                builder.store(total, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 14), generate

    return tile


_bytes_of_one_row, _bytes_of_rows = _tile(_Bytes, HEIGHT_OF_ONE, 1), _tile(_Bytes, HEIGHT, ROWS)
_halves_of_one_row, _halves_of_rows = _tile(_Halves, HEIGHT_OF_ONE, 1), _tile(_Halves, HEIGHT, ROWS)
_decode_bytes, _decode_halves, _floats_of_rows = _decoder(_Bytes), _decoder(_Halves), _tile(_Floats, HEIGHT, ROWS)
_decode_halves_in_order = _decoder(_HalvesInOrder)


def shape_of_arranged(rows: int, inner: int, halves: bool) -> tuple[int, int]:
    """Shape of what ``arrange`` fills."""
    vector = 2 * LANES if halves else LANES
    return 1 if rows == 1 else -(-rows // ROWS) * ROWS, -(-inner // vector) * vector


@njit(nogil=True, cache=True)
def arrange(x: Any, halves: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Rows of x as the loops read them, the entries beside lower halves of bytes before those beside upper halves.

    ``out`` has whole tiles and whole vectors: what x does not fill is 0.
    """
    rows, inner = x.shape
    vector = 2 * LANES if halves else LANES
    whole = inner - inner % vector
    for m in range(rows):
        row, arranged = x[m], out[m]
        if not halves:
            arranged[:inner] = row
            arranged[inner:] = 0
            continue
        for k in range(0, whole, vector):
            for lane in range(LANES):
                arranged[k + lane] = row[k + 2 * lane]
                arranged[k + LANES + lane] = row[k + 2 * lane + 1]
        arranged[whole:] = 0
        for k in range(whole, inner):
            arranged[whole + (k % 2) * LANES + (k - whole) // 2] = row[k]
    out[rows:] = 0


@njit(nogil=True, cache=True)
def _looked_up(codes: Any, table: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Numbers of scales that are kept as codes."""
    for n in range(out.shape[0]):
        row, numbers = codes[n if codes.shape[0] > 1 else 0], out[n]
        for g in range(numbers.shape[0]):
            numbers[g] = table[np.uint64(row[g])]


@njit(nogil=True, cache=True)
def _as_floats(integers: Any, less: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Zero points, of unsigned bytes as of the signed ones that they are taken for."""
    for n in range(out.shape[0]):
        row, numbers = integers[n if integers.shape[0] > 1 else 0], out[n]
        for g in range(numbers.shape[0]):
            numbers[g] = row[g] - less


@njit(nogil=True, cache=True)
def _largest(patterns: Any, ignored: Any, less: Any) -> Any:  # pragma: no cover - compiled
    """The largest of the bits of some floats: they order as the floats do, and put NaN, and negative ones, on top.

    Some bits are ignored, and ``less`` is taken off: 1 puts 0 on top, too.
    """
    most = np.uint32(0)
    for n in range(patterns.shape[0]):
        row = patterns[n]
        for g in range(row.shape[0]):
            most = max(most, np.uint32((row[g] & ~ignored) - less))
    return most


@njit(nogil=True, cache=True)
def _add_tiles(
    w: Any, x: Any, inner: Any, halves: Any, flip: Any, table: Any, scale: Any, s_stride: Any, zero: Any,
    z_stride: Any, size: Any, sums: Any, rows: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """``sums[tile, n, m, lane]`` of a strip of the weight and ``rows`` rows of x.

    ``scale`` and ``zero`` are addresses.
    """
    here, one = w.shape[0], sums.shape[2] == 1
    tile, height, depth = (1, HEIGHT_OF_ONE, DEPTH_OF_ONE) if one else (ROWS, HEIGHT, DEPTH)
    many = rows >= MANY_ROWS
    if many:
        depth = DEPTH_OF_MANY
    values = np.empty((here if many else 0, depth), dtype=np.float32)
    bits, vector = (4, 2 * LANES) if halves else (8, LANES)
    whole = inner - inner % vector
    start, by, at, a, out = w.ctypes.data, w.strides[0], x.strides[0], table.ctypes.data, sums.ctypes.data
    rest = np.zeros((here, LANES), dtype=np.uint8)  # codes that fill no vector: no loop reads beyond the weight
    for n in range(here if whole < inner else 0):
        for i in range(whole * bits // 8, w.shape[1]):
            rest[n, i - whole * bits // 8] = w[n, i]
        if halves and inner % 2:  # the last upper half pads: whatever it says, no number of it is to meet x
            rest[n, (inner - whole) // 2] &= 15
    sums[:] = 0
    k = 0
    while k < inner:
        g = k // size
        groups = min(depth, whole - k) // size
        if k == whole:
            start, by, groups, length = rest.ctypes.data - whole * bits // 8, rest.strides[0], 1, vector
        elif groups > 0:
            length = groups * size
        else:  # a part of a group: it is longer, or the row ends
            groups, length = 1, min(min(depth, size - (k - g * size)), whole - k)
        steps = length // groups // vector
        for n in range(here if many else 0):
            codes, s, z = (
                start + n * by + k * bits // 8,
                scale + n * s_stride + 4 * g,
                zero + n * z_stride + 4 * g,
            )
            o = values.ctypes.data + n * values.strides[0]
            if halves:
                _decode_halves(codes, s, z, a, flip, groups, steps, o)
            else:
                _decode_bytes(codes, s, z, a, flip, groups, steps, o)
        for t in range((rows + tile - 1) // tile):
            entries = x.ctypes.data + t * tile * at + 4 * k
            for n in range(0, here, height):
                codes = start + n * by + k * bits // 8
                s, z = scale + n * s_stride + 4 * g, zero + n * z_stride + 4 * g
                o, there = out + t * sums.strides[0] + n * sums.strides[1], here - n
                if many:
                    codes = values.ctypes.data + n * values.strides[0]
                    _floats_of_rows(
                        codes, values.strides[0], there, entries, at, s, 0, z, 0, a, flip, 1, length // LANES, o
                    )
                elif halves and one:
                    _halves_of_one_row(
                        codes, by, there, entries, at, s, s_stride, z, z_stride, a, flip, groups, steps, o
                    )
                elif halves:
                    _halves_of_rows(codes, by, there, entries, at, s, s_stride, z, z_stride, a, flip, groups, steps, o)
                elif one:
                    _bytes_of_one_row(
                        codes, by, there, entries, at, s, s_stride, z, z_stride, a, flip, groups, steps, o
                    )
                else:
                    _bytes_of_rows(codes, by, there, entries, at, s, s_stride, z, z_stride, a, flip, groups, steps, o)
        k += length


@njit(nogil=True, cache=True)
def multiply(
    w: Any, x: Any, inner: Any, halves: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any, of_scales: Any,
    zero: Any, size: Any, bias: Any, first_row: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``y[m, n] = sum_k (number[n, k] - zero[n, g]) * scale[n, g] x[m, k] + bias[n]``; whether that holds.

    ``x`` is arranged; ``inner`` is K. ``table`` has the numbers of codes of 4 bits. Scales are numbers, or codes of
    numbers that ``of_scales`` lists; zero points, where there are any, are integers. ``size`` is the length of a group,
    a whole number of vectors, and may be longer than K. ``y`` is (M, N of w); ``first_row`` is the row of scales, zero
    points and bias that w begins with. The answer is False where a value might be beyond float32, which dequantizing
    would clip, and where a scale is NaN or, not being kept as a code, 0.
    """
    rows, columns = y.shape[0], w.shape[0]
    one, coded, shifted = rows == 1, of_scales.shape[0] > 0, zero.shape[0] > 0
    tile = 1 if one else ROWS
    groups_of_row = (inner + size - 1) // size
    sums = np.empty(((min(rows, ROWS_AT_ONCE) + tile - 1) // tile, STRIP, tile, LANES), dtype=np.float32)
    scales = np.empty((STRIP if coded else 0, groups_of_row), dtype=np.float32)
    zeros = np.zeros((STRIP if shifted else 1, groups_of_row), dtype=np.float32)
    z_stride = zeros.strides[0] if shifted else 0
    s_stride = scales.strides[0] if coded else (scale.strides[0] if scale.shape[0] > 1 else 0)
    most = np.uint32(0)
    for first in range(0, columns, STRIP):
        stop = min(first + STRIP, columns)
        here, start = stop - first, first_row + first
        if coded:
            several = codes_of_scales.shape[0] > 1
            _looked_up(codes_of_scales[start:] if several else codes_of_scales, of_scales, scales[:here])
            most = max(most, _largest(scales[:here].view(np.uint32), np.uint32(1 << 31), np.uint32(0)))
            s_start = scales.ctypes.data
        else:
            numbers = scale[start : start + here] if scale.shape[0] > 1 else scale
            most = max(most, _largest(numbers.view(np.uint32), np.uint32(1 << 31), np.uint32(1)))
            s_start = numbers.ctypes.data
        if shifted:
            _as_floats(zero[start:] if zero.shape[0] > 1 else zero, np.int32(flip), zeros[:here])
        for m in range(0, rows, ROWS_AT_ONCE):
            last = min(m + ROWS_AT_ONCE, rows)
            _add_tiles(
                w[first:stop], x[m:], inner, halves, flip, table, s_start, s_stride, zeros.ctypes.data, z_stride, size,
                sums, last - m,
            )  # fmt: skip
            for i in range(m, last):
                of_tile, lane_of_tile = sums[(i - m) // tile], (i - m) % tile
                for n in range(here):
                    lanes, total = of_tile[n, lane_of_tile], np.float32(0)
                    for lane in range(LANES):
                        total += lanes[lane]
                    y[i, first + n] = total + bias[start + n]
    return most < LARGE


@njit(nogil=True, cache=True)
def _one_by_one(
    w: Any, first: Any, last: Any, halves: Any, flip: Any, table: Any, scale: Any, zero: Any, out: Any
) -> None:  # pragma: no cover - compiled
    """Values of a row's codes ``first`` to ``last`` - 1, which share a scale."""
    for k in range(first, last):
        if halves:
            code = (w[k >> 1] >> np.uint8(4)) if k & 1 else (w[k >> 1] & np.uint8(15))
            number = table[code]
        else:
            number = np.float32((np.int32(w[k]) ^ flip ^ 128) - 128)
        out[k] = (number - zero) * scale


@njit(nogil=True, cache=True)
def dequantize(
    w: Any, inner: Any, halves: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any, of_scales: Any,
    zero: Any, size: Any, first_row: Any, out: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``out[n, k] = (number[n, k] - zero[n, g]) * scale[n, g]``, operands and answer as for ``multiply``.

    Groups may have any size here.
    """
    coded, shifted, several = of_scales.shape[0] > 0, zero.shape[0] > 0, zero.shape[0] > 1
    kept = codes_of_scales if coded else scale.view(np.uint8)
    groups = (inner + size - 1) // size
    numbers, zeros = np.empty((1, groups), dtype=np.float32), np.zeros((1, groups), dtype=np.float32)
    a = table.ctypes.data
    whole, most = inner // size if size % LANES == 0 else 0, np.uint32(0)
    for n in range(w.shape[0]):
        row = first_row + n if kept.shape[0] > 1 else 0
        if coded:
            _looked_up(codes_of_scales[row : row + 1], of_scales, numbers)
        else:
            numbers[0] = scale[row]
        most = max(most, _largest(numbers.view(np.uint32), np.uint32(1 << 31), np.uint32(0 if coded else 1)))
        if shifted:
            _as_floats(zero[first_row + n if several else 0 :], np.int32(flip), zeros)
        start, s, z, o = w[n].ctypes.data, numbers.ctypes.data, zeros.ctypes.data, out[n].ctypes.data
        g = 0
        while g < groups:
            k, together = g * size, max(whole - g, 1)  # all groups that are whole vectors at once, others one by one
            last = min(k + together * size, inner)
            steps = 0 if halves and k % 2 else (last - k) // together // LANES
            at, there, s_g, z_g = start + (k // 2 if halves else k), o + 4 * k, s + 4 * g, z + 4 * g
            if steps > 0 and halves:
                _decode_halves_in_order(at, s_g, z_g, a, flip, together, steps, there)
            elif steps > 0:
                _decode_bytes(at, s_g, z_g, a, flip, together, steps, there)
            k += together * steps * LANES
            if k < last:
                _one_by_one(w[n], k, last, halves, flip, table, numbers[0, g], zeros[0, g], out[n])
            g += together
    return most < LARGE
