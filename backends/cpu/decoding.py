"""Loops for products of float32 with codes that become numbers in registers: of 8 bits, or of 4 and packed.

Owns: the loops, and the numba intrinsics in them. One file but for the words of ``emit``, because what numba caches of
a function is renewed when its own file changes, and not when another does. The loops hold no lock and start no thread.
``stored`` calls them, and says what they are for.

A weight is (N, K), the sum runs along K, and every ``size`` codes of a row share a scale and a zero point. Two ideas
keep what happens to a code short, and a third is for one row of x:

- **4 bits: a group's table.** All 16 numbers that codes can stand for are one vector (two, where vectors have 8 lanes).
  ``(number - zero) * scale`` is done to the table, once a group, and one permutation of it by 16 codes then gives their
  values, whatever the format is: an integer, a float or a codebook. Of a vector of bytes the lower halves are the codes
  at even positions and the upper halves those at odd ones, so x is laid out that way once (``arrange``).
- **8 bits**: bytes are widened to floats, less the zero point, times the scale.

Either way a value is what dequantizing gives, to the bit. It stays in a register and meets several rows of x, so that
its price is shared. A tile of the result (``HEIGHTS``: rows of the weight, and of x) has one vector of sums for each of
its entries; ``DEPTH`` codes of a row meet a part of x that the first cache holds before the next part comes.

**One row of x, by integer dot products** (``_in_dots``). For one row the price of a value is not shared, so no value
is made. Every ``QUARTER`` bytes of codes, four lanes of a vector of them, their entries of x are integers relative to a
power of two of their own: ``x = X 2^(e - 30)``, where ``|X| <= 127/64 2^30``, which four signed digits of 8 bits hold,
or two of 16. Codes become bytes ``u``, in the order in which they lie: those of 8 bits by turning their highest bit
over, those of 4 by a table, wherever numbers are ``step (u + lowest)``. A lane holds a sum of 4 entries, or of 8 where
codes have 4 bits:

    T  =  sum X (u + lowest)  =  sum_d 2^(8 d) (sum digit_d u)  +  lowest sum X

- ``vpdpbusd`` (AVX-512 VNNI, AVX-VNNI) adds four products of unsigned bytes and digits of 8 bits to each lane. The two
  higher digits make one int32 in each lane, and the two lower ones another, each with its part of the last term: at
  most 2^27, since eight bytes at most meet two digits, below 2^15.
- ``vpmaddwd`` (AVX2, AVX-512 without VNNI) adds two products of shorts. ``lowest`` is 0, bytes are signed, and those at
  even and at odd positions become shorts. Bytes of codes of 4 bits stay where they are, the upper halves of shorts,
  which are ``2^8 u`` at one instruction each. A digit is an int32 in each lane: at most ``8 * 31 * 2^8 * 2^15 < 2^31``
  where numbers are at most ``MOST_NUMBER``, and a float of it has no more than 24 bits to keep.

Two floats of the two int32 and one fused step are ``T``, rounded as a sum of floats is; another one multiplies it by
the scale of its group times ``2^(e - leading)``, spread over lanes by a permutation. Zero points of 4 bits are taken
from bytes, exactly.

What this loses of an entry is 2^-31 of the largest in its quarter, whatever the codes are. So quarters in which one
entry lies far below that, or many somewhat below, and those with infinities, NaN, or no number but subnormal ones, are
multiplied as floats; all are, where many quarters are such. Where scales are so far from 1 that a product with those
powers of two might not be a normal number, all of a strip's rows are multiplied as floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from aqt_lite.backends.cpu.emit import counted_loop, function, in_all_lanes, item_at, load, read_ahead, store
from aqt_lite.backends.cpu.lines import on_lines
from aqt_lite.backends.cpu.native import apart, task_of
from aqt_lite.backends.cpu.pool import in_parts

__all__ = [
    "AVAILABLE",
    "BYTES",
    "HALVES",
    "HEIGHTS",
    "INTEGERS",
    "IN_A_TILE",
    "IN_ORDER",
    "LANES",
    "LARGE",
    "LOOKED_UP",
    "MOVED",
    "MOVED_WIDE",
    "NUMBERS",
    "ROWS",
    "ROWS_AT_ONCE",
    "STRIP",
    "arrange",
    "arrange_apart",
    "as_floats",
    "bytes_across",
    "bytes_of_columns",
    "dequantize",
    "dequantize_apart",
    "dequantize_columns",
    "dequantize_columns_apart",
    "dequantize_in_parts",
    "doubling_of",
    "halves_across",
    "halves_of_columns",
    "has_infinity",
    "largest",
    "look_up",
    "looked_up",
    "multiply",
    "multiply_apart",
    "multiply_in_parts",
    "parts_of",
    "shape_of_arranged",
]


def _features() -> set[str]:
    """Of the processor that numba compiles for; NUMBA_CPU_FEATURES may say another."""
    return set(str(cpu_target.target_context.codegen().magic_tuple()[-1]).split(","))


_WIDE = _features() >= {"+avx512f", "+avx512bw", "+avx512vl"}

AVAILABLE = _WIDE or _features() >= {"+avx2", "+fma", "+f16c"}
"""Whether the processor permutes vectors of floats by other vectors: of 16 lanes, or of 8."""

LANES = 16 if _WIDE else 8

BYTES, HALVES, IN_ORDER, INTEGERS, MOVED, MOVED_WIDE, LOOKED_UP = range(7)
"""Kinds of codes: ``_Bytes``, ``_Halves``, and those that meet x in the order in which they lie, groups of any length:
``_HalvesInOrder``, ``_MovedIntegers``, ``_Moved``, ``_MovedWide``, ``_LookedUp``.

Tables of the latter have two axes, of which the first has length 1: numba compiles loops for the one or for the others.
"""

NUMBERS = 256
"""Of the last four kinds a table lists so many numbers, by the bits of their codes, and then what moves codes."""

_OF_BYTES = _features() >= {"+avx512vl", "+avx512vnni"} or "+avxvnni" in _features()

BITS_OF_DIGIT = 8 if _OF_BYTES else 16
"""Of an entry of x in fixed point: what integer dot products multiply unsigned bytes, or else signed shorts, with."""

HEIGHTS = (0, 4, 4, 4, 4) if _WIDE else (0, 4, 4, 3, 3)
"""Rows of the weight in a tile, by its rows of x: sums, and what is multiplied, fit the registers."""

HEIGHT_OF_ONE = HEIGHTS[1]

ROWS = 4
"""Rows of x in a tile, at most: with more, sums no longer fit the registers."""

STRIP = 96
"""Rows of the weight whose sums are kept until K is done: a multiple of all ``HEIGHTS``."""

DEPTH = 1024
"""Codes of a row that meet a part of x before the next: such a part of ``ROWS`` rows takes 16 KB."""

DEPTH_OF_ONE = 512 * LANES
"""The same where x has one row: 512 terms a lane, as many as BLAS adds up before it begins another block."""

AHEAD = 1 << 15
"""Bytes ahead of those it decodes that a tile of one row of x reads into the second cache."""

MANY_ROWS = 16 if _WIDE else 2
"""Rows of x from which on a part of a strip is decoded to memory, once for all of them, and not once for each tile.

Of 16 registers none are left for what decodes beside a tile's sums.
"""

DEPTH_OF_MANY = 512
"""Codes of a row in such a part, which the second cache holds: 192 KB."""

ROWS_AT_ONCE = 256
"""Rows of x whose sums are in memory at a time: a multiple of ``ROWS``."""

IN_A_TILE = (4 if _WIDE else 2) * LANES
"""Columns of a tile, of a weight that lies (in, out)."""

AHEAD_IN_A_ROW = 512
"""Bytes ahead of those it decodes that such a tile reads into the second cache."""

VECTOR = 4 * LANES
"""Bytes of codes that meet x in fixed point at a time."""

QUARTER = 16
"""Bytes of a row of the weight whose entries of x have an exponent of their own: a quarter of a vector of 64."""

BLOCK = LANES
"""Quarters whose scales are one vector."""

BLOCKS_A_SUM = 32
"""Blocks whose products are added up before they join the sum: 4096 bytes of a row, with vectors of 16 lanes 8192."""

BITS = 30
"""Of an entry of x in fixed point, the leading one of a quarter, without its sign."""

MOST_SHIFT = 16
"""What codes with zero points are more than they mean, as unsigned bytes."""

MOST_NUMBER = 127 if _OF_BYTES else 31
"""Of codes of 4 bits, also less their zero points: 2^8 times as much, times digits, is added up in int32 by shorts."""

MOST_FRACTION = np.int32(0x7E0000)
"""Of 127/64, its bits below the exponent's: what is larger would carry into a further digit."""

FINEST = np.float32(2.0**16)
COARSE, COARSE_ENTRIES = np.float32(2.0**22), 8
"""Fixed point serves no quarter with an entry below the first, or with more than one in so many below the second."""

OF_POWERS, OF_CONSTANTS, MOVES = 32, 64, 128
"""Where in what moves codes parts begin, after an order of bytes, and where it ends, in bytes."""

ONE_AND_NONE = OF_CONSTANTS + 32
"""Where it has 1 and 0, as floats: the scale and the zero point of numbers themselves."""

BYTES_OF_REST = 64
"""Of a row, those and more that are left where 16 are read at a time, and 16 after them."""

NAN = 0x7FE0
"""Bits of a float of 16 bits, and of a bfloat16."""

NOTHING, UNSERVED = -127, -128
"""In place of a quarter's exponent: where all entries are 0, and where fixed point does not serve them."""

FARTHEST = 40
"""Powers of two that a quarter may lie below the largest."""

MOST_IN_FLOATS = 8
"""Where more than one in so many quarters are not served, all are multiplied as floats."""

NEAR_ONE = np.uint32((127 - 60) << 23), np.uint32((127 + 60) << 23)
"""Bits of the scales between which their products with powers of two down to 2^-40 and with sums are normal numbers."""

FARTHEST_ZERO = np.int32(1 << 22)
"""Zero points beyond it are served by no loop: 2^23 more than codes, less the zero point, would be rounded."""

LARGE = np.uint32((100 + 127) << 23)
"""2^100, as its bits: numbers are less than 2^12, so that their products with smaller scales are finite."""

_BYTE, _WORD, _INT, _ADDRESS = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_POINTER: Any = ir.PointerType(_BYTE)  # type: ignore[no-untyped-call]
_FLOATS, _INTS, _BYTES, _WORDS = (ir.VectorType(item, LANES) for item in (_FLOAT, _INT, _BYTE, _WORD))
_PERMUTE = "llvm.x86.avx512.permvar.sf.512" if _WIDE else "llvm.x86.avx2.permps"


@intrinsic  # type: ignore[untyped-decorator]
def _sum_of_lanes(_: Any, address: Any) -> Any:
    """Of the floats of one vector in memory, by halves."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        total, lanes = load(builder, arguments[0], _FLOATS), LANES
        while lanes > 1:
            lanes //= 2
            lower, upper = (
                builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(_INT, lanes), list(range(a, a + lanes))))
                for a in (0, lanes)
            )
            total = builder.fadd(lower, upper)
        return builder.extract_element(total, _INT(0))

    return types.float32(types.intp), generate


class _Bytes:
    """8 bits: signed bytes, or unsigned ones whose highest bit ``flip`` turns over, which makes them 128 less.

    As the last byte of 2^23 they are floats at once, 2^23 + 128 more than they mean.
    """

    lanes, vectors = _BYTES, 1  # a vector of codes, and how many of values it makes
    step = _ADDRESS(LANES)  # from one vector of codes to the next, in bytes

    def __init__(self, builder: Any, table: Any, flip: Any) -> None:
        bits = builder.xor(builder.trunc(flip, _INT), _INT(0x4B000080))
        self.builder, self.bits = builder, in_all_lanes(builder, bits, _INTS)

    def of_group(self, scale: Any, zero: Any) -> Any:
        return scale, self.builder.fadd(zero, ir.Constant(_FLOATS, [2.0**23 + 128] * LANES))

    def values(self, codes: Any, group: Any) -> list[Any]:
        scale, zero = group
        more = self.builder.bitcast(self.builder.xor(self.builder.zext(codes, _INTS), self.bits), _FLOATS)
        return [self.builder.fmul(self.builder.fsub(more, zero), scale)]


class _Halves:
    """4 bits, two codes a byte: positions in a table of 16 numbers."""

    lanes, vectors, step = _BYTES, 2, _ADDRESS(LANES)

    def __init__(self, builder: Any, table: Any, flip: Any) -> None:
        self.builder = builder
        self.table = [load(builder, item_at(builder, table, _ADDRESS(i), 4), _FLOATS) for i in range(0, 16, LANES)]
        self.permute = function(builder, _PERMUTE, _FLOATS, [_FLOATS, _INTS])

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

    lanes, vectors, step = ir.VectorType(_BYTE, LANES // 2), 1, _ADDRESS(LANES // 2)

    def values(self, codes: Any, group: Any) -> list[Any]:
        half = LANES // 2
        upper = self.builder.lshr(codes, ir.Constant(self.lanes, [4] * half))
        places = [i // 2 + half * (i % 2) for i in range(LANES)]
        in_order = self.builder.shuffle_vector(codes, upper, ir.Constant(_INTS, places))
        lower_bits = self.builder.and_(in_order, ir.Constant(_BYTES, [15] * LANES))
        return [self._looked_up(group, self.builder.zext(lower_bits, _INTS))]


class _Floats:
    """Values that have been decoded before."""

    lanes, vectors, step = _FLOATS, 1, _ADDRESS(4 * LANES)

    def __init__(self, builder: Any, table: Any, flip: Any) -> None:
        pass

    def of_group(self, scale: Any, zero: Any) -> Any:
        return None

    def values(self, codes: Any, group: Any) -> list[Any]:
        return [codes]


class _Stream:
    """Codes of 2 to 8 bits that follow each other, ``width`` bits from one to the next: patterns of bits.

    Two bytes hold a code wherever it begins. A permutation brings those of each code into a word of 16 bits, of which
    a multiplication, by a power of two for each lane, makes the code the highest bits. ``moves`` is the address of what
    these take (``_moves_of``).
    """

    lanes, vectors = ir.VectorType(_BYTE, 16), 1  # of which as many are used as codes lie in

    def __init__(self, builder: Any, table: Any, moves: Any) -> None:
        self.builder, self.moves = builder, moves
        self.order = load(builder, moves, ir.VectorType(_BYTE, 2 * LANES))
        self.powers = load(builder, builder.add(moves, _ADDRESS(OF_POWERS)), _WORDS)
        self.step = builder.sext(self._constant(0, _INT), _ADDRESS)
        self.shift, self.mask = self._words(1), self._words(2)
        name = "llvm.x86.avx2.pshuf.b" if LANES == 16 else "llvm.x86.ssse3.pshuf.b.128"
        self.permute = function(builder, name, self.order.type, [self.order.type] * 2)

    def _constant(self, nth: int, kind: Any) -> Any:
        return load(self.builder, self.builder.add(self.moves, _ADDRESS(OF_CONSTANTS + 4 * nth)), kind)

    def _words(self, nth: int) -> Any:
        return in_all_lanes(self.builder, self.builder.trunc(self._constant(nth, _INT), _WORD), _WORDS)

    def patterns(self, codes: Any) -> Any:
        """The bits of codes in the lower ends of words, where those of a kind are to be; nothing above them."""
        builder, places = self.builder, [i % 16 for i in range(2 * LANES)]
        codes = builder.shuffle_vector(codes, codes, ir.Constant(ir.VectorType(_INT, 2 * LANES), places))
        words = builder.bitcast(builder.call(self.permute, [codes, self.order]), _WORDS)
        return builder.and_(builder.ashr(builder.mul(words, self.powers), self.shift), self.mask)


class _MovedIntegers(_Stream):
    """Integers, times a power of two: subnormal floats of 16 bits count so, once the lowest number is added."""

    def __init__(self, builder: Any, table: Any, moves: Any) -> None:
        super().__init__(builder, table, moves)
        self.flip, self.of_nan, self.nan = (self._words(i) for i in (3, 4, 5))
        self.factor, self.low = (in_all_lanes(builder, self._constant(i, _FLOAT), _FLOATS) for i in (6, 7))

    def of_group(self, scale: Any, zero: Any) -> Any:
        builder = self.builder
        return builder.fmul(scale, self.factor), builder.fdiv(builder.fsub(self.low, zero), self.factor)

    def values(self, codes: Any, group: Any) -> list[Any]:
        scale, low = group
        numbers = self._halves(self.builder.xor(self.patterns(codes), self.flip))
        return [self.builder.fmul(self.builder.fadd(numbers, low), scale)]

    def _halves(self, words: Any) -> Any:
        return self.builder.fpext(self.builder.bitcast(words, ir.VectorType(_HALF, LANES)), _FLOATS)


class _Moved(_MovedIntegers):
    """Floats, times a power of two, with up to 5 bits of exponent: the bits of codes are moved to where 16 have them.

    One pattern, or it and the other of its sign, may stand for NaN.
    """

    def of_group(self, scale: Any, zero: Any) -> Any:
        return self.builder.fmul(scale, self.factor)

    def values(self, codes: Any, group: Any) -> list[Any]:
        return [self.builder.fmul(self._halves(self._with_nan(codes)), group)]

    def _with_nan(self, codes: Any) -> Any:
        words = self.patterns(codes)
        is_nan = self.builder.icmp_signed("==", self.builder.and_(words, self.of_nan), self.nan)
        return self.builder.select(is_nan, ir.Constant(_WORDS, [NAN] * LANES), words)


class _MovedWide(_Moved):
    """The same of numbers that bfloat16 has, the upper halves of float32, with whatever power of two.

    Some processors take long to multiply its subnormal numbers, which are few where there are many exponents.
    """

    def of_group(self, scale: Any, zero: Any) -> Any:
        return scale

    def values(self, codes: Any, group: Any) -> list[Any]:
        builder, sixteen = self.builder, ir.Constant(_INTS, [16] * LANES)
        upper = builder.shl(builder.zext(self._with_nan(codes), _INTS), sixteen)
        return [builder.fmul(builder.fmul(builder.bitcast(upper, _FLOATS), self.factor), group)]


class _LookedUp(_Stream):
    """Any numbers: positions in a table of 256, which registers hold where they are long enough."""

    def __init__(self, builder: Any, table: Any, moves: Any) -> None:
        super().__init__(builder, table, moves)
        self.table = table
        parts = NUMBERS // LANES if LANES == 16 else 0
        self.parts = [load(builder, item_at(builder, table, _ADDRESS(LANES * i), 4), _FLOATS) for i in range(parts)]

    def of_group(self, scale: Any, zero: Any) -> Any:
        return scale

    def values(self, codes: Any, group: Any) -> list[Any]:
        positions = self.builder.zext(self.patterns(codes), _INTS)
        numbers = self._permuted(positions) if self.parts else self._gathered(positions)
        return [self.builder.fmul(numbers, group)]

    def _permuted(self, positions: Any) -> Any:
        """The instruction looks at 5 bits of a position; each of the others chooses between two tables."""
        builder, name = self.builder, "llvm.x86.avx512.vpermi2var.ps.512"
        permute = function(builder, name, _FLOATS, [_FLOATS, _INTS, _FLOATS])
        found = [
            builder.call(permute, [a, positions, b]) for a, b in zip(self.parts[::2], self.parts[1::2], strict=True)
        ]
        for bit in (32, 64, 128):
            place = builder.and_(positions, ir.Constant(_INTS, [bit] * LANES))
            upper = builder.icmp_signed("!=", place, ir.Constant(_INTS, None))
            found = [builder.select(upper, b, a) for a, b in zip(found[::2], found[1::2], strict=True)]
        return found[0]

    def _gathered(self, positions: Any) -> Any:
        builder, every = self.builder, self.builder.bitcast(ir.Constant(_INTS, [-1] * LANES), _FLOATS)
        gather = function(builder, "llvm.x86.avx2.gather.d.ps.256", _FLOATS, [_FLOATS, _POINTER, _INTS, _FLOATS, _BYTE])
        table = builder.inttoptr(self.table, _POINTER)
        return builder.call(gather, [ir.Constant(_FLOATS, None), table, positions, every, _BYTE(4)])


_Kind = type[_Bytes] | type[_Halves] | type[_Floats] | type[_Stream]  # others are made of these


def _of_group(builder: Any, decoder: Any, scale: Any, zero: Any, g: Any) -> Any:
    numbers = (load(builder, item_at(builder, a, g, 4), _FLOAT) for a in (scale, zero))
    return decoder.of_group(*(in_all_lanes(builder, v, _FLOATS) for v in numbers))


def _decoder(kind: _Kind) -> Any:
    """Values of ``groups`` of ``steps`` vectors of bytes each, of one row, in the order in which they are made.

    Beside them as many bytes from ``ahead`` on are read into the second cache.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def decode(
        _: Any, w: Any, ahead: Any, scale: Any, zero: Any, table: Any, flip: Any, groups: Any, steps: Any, out: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, ahead, scale, zero, table, flip, groups, steps, out = arguments
            decoder = kind(builder, table, flip)

            def group(g: Any, totals: list[Any]) -> list[Any]:
                of_group, first = _of_group(builder, decoder, scale, zero, g), builder.mul(g, steps)

                def step(i: Any, totals: list[Any]) -> list[Any]:
                    k = builder.add(first, i)
                    at = builder.mul(k, decoder.step)
                    codes = load(builder, builder.add(w, at), kind.lanes)
                    read_ahead(builder, builder.add(ahead, at))
                    values = decoder.values(codes, of_group)
                    for v, value in enumerate(values):
                        place = item_at(builder, builder.add(out, _ADDRESS(4 * LANES * v)), k, 4 * LANES * kind.vectors)
                        builder.store(value, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
                    return totals

                return counted_loop(builder, steps, totals, step)

            counted_loop(builder, groups, [], group)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9), generate

    return decode


def _rows_of_tile(builder: Any, height: int, there: Any, *arrays: tuple[Any, Any]) -> list[list[Any]]:
    """Addresses of a tile's rows in arrays, given by address and stride; after the last that is there, that again."""
    last = builder.sub(there, _ADDRESS(1))
    rows = [builder.select(builder.icmp_signed("<", _ADDRESS(r), last), _ADDRESS(r), last) for r in range(height)]
    return [[builder.add(start, builder.mul(r, by)) for r in rows] for start, by in arrays]


def _tile(kind: _Kind, *shapes: int) -> Any:
    """``out[r, m, lane] += sum of value[r, k] x[m, k]`` over ``groups`` of ``steps`` vectors of bytes each.

    Sums begin at 0 and join those before at their end: of all K in one the error would grow with its root, as that of
    BLAS, which adds up blocks, does not.
    Arguments: rows of x, one of ``shapes``; addresses and strides in bytes of the codes, of x, of scales and of zero
    points (both float32, a row of them for each row of the weight); how many rows of the weight there are: after the
    last of these that one again, sums that go unread.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        _: Any, rows: Any, w: Any, w_stride: Any, there: Any, ahead: Any, x: Any, x_stride: Any, scale: Any,
        s_stride: Any, zero: Any, z_stride: Any, table: Any, flip: Any, groups: Any, steps: Any, out: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            of_x, *others = arguments
            for rows in shapes:
                with builder.if_then(builder.icmp_signed("==", of_x, _ADDRESS(rows))):
                    _tile_of(kind, HEIGHTS[rows], rows, builder, *others)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 16), generate

    return tile


def _tile_of(
    kind: _Kind, height: int, rows: int, builder: Any, w: Any, w_stride: Any, there: Any, ahead: Any, x: Any,
    x_stride: Any, scale: Any, s_stride: Any, zero: Any, z_stride: Any, table: Any, flip: Any, groups: Any, steps: Any,
    out: Any,
) -> None:  # fmt: skip
    """``_tile`` of one shape."""
    decoder = kind(builder, table, flip)
    fma = function(builder, f"llvm.fma.v{LANES}f32", _FLOATS, [_FLOATS] * 3)
    of_codes, of_scales, of_zeros = _rows_of_tile(
        builder, height, there, (w, w_stride), (scale, s_stride), (zero, z_stride)
    )
    of_x = [builder.add(x, builder.mul(x_stride, _ADDRESS(m))) for m in range(rows)]
    places = [builder.add(out, _ADDRESS(4 * LANES * i)) for i in range(height * rows)]

    def group(g: Any, totals: list[Any]) -> list[Any]:
        parameters = [_of_group(builder, decoder, s, z, g) for s, z in zip(of_scales, of_zeros, strict=True)]
        first = builder.mul(g, steps)

        def step(i: Any, totals: list[Any]) -> list[Any]:
            k, totals = builder.add(first, i), list(totals)
            at = builder.mul(k, decoder.step)
            if kind is not _Floats:  # which a cache holds
                row = builder.add(ahead, builder.mul(builder.and_(k, _ADDRESS(3)), w_stride))
                read_ahead(builder, builder.add(row, builder.and_(at, _ADDRESS(-64))))
            values = [
                decoder.values(load(builder, builder.add(start, at), kind.lanes), of_group)
                for start, of_group in zip(of_codes, parameters, strict=True)
            ]
            for m in range(rows):
                of_row = item_at(builder, of_x[m], k, 4 * LANES * kind.vectors)
                for v in range(kind.vectors):
                    entries = load(builder, builder.add(of_row, _ADDRESS(4 * LANES * v)), _FLOATS)
                    for r in range(height):
                        i_out = r * rows + m
                        totals[i_out] = builder.call(fma, [values[r][v], entries, totals[i_out]])
            return totals

        return counted_loop(builder, steps, totals, step)

    none = [ir.Constant(_FLOATS, [0.0] * LANES)] * len(places)
    for place, total in zip(places, counted_loop(builder, groups, none, group), strict=True):
        store(builder, builder.fadd(load(builder, place, _FLOATS), total), place)


# ---- a weight that lies (in, out), which ``outer`` multiplies by


def _columns(kind: _Kind, by_columns: bool) -> Any:
    """``out[m, lane] += sum_k value[k, lane] x[m, k]`` of ``count`` rows of a weight, one at least, and some columns.

    ``IN_A_TILE`` columns, in the order of values: of ``HALVES`` a vector of those at even positions and then one of
    those at odd ones. ``by_columns``: all rows share scales and zero points, of which there are as many as columns, in
    that order, too. Else each row has its own.
    Arguments: rows of x, up to ``ROWS``; addresses, and strides in bytes, of codes, x, scales, zero points (both
    float32) and sums; the first column, the length of groups, and how many there are.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        _: Any, rows: Any, w: Any, w_stride: Any, count: Any, x: Any, x_stride: Any, scale: Any, s_stride: Any,
        zero: Any, z_stride: Any, table: Any, flip: Any, first: Any, size: Any, groups: Any, out: Any, out_stride: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            of_x, w, w_stride, count, x, x_stride, scale, s_stride, zero, z_stride, table, flip, *others = arguments
            first, size, groups, out, out_stride = others
            decoder, loads = kind(builder, table, flip), range(0, IN_A_TILE, LANES * kind.vectors)
            fma = function(builder, f"llvm.fma.v{LANES}f32", _FLOATS, [_FLOATS] * 3)
            last = builder.sub(groups, _ADDRESS(1))

            def group_of(i: int) -> Any:
                g = builder.sdiv(builder.add(first, _ADDRESS(i)), size)
                return builder.select(builder.icmp_signed("<", g, last), g, last)

            def of_vector(base: Any, i: int) -> Any:
                return load(builder, item_at(builder, base, builder.add(first, _ADDRESS(i)), 4), _FLOATS)

            one, none = (ir.Constant(_FLOATS, [v] * LANES) for v in (1.0, 0.0))
            as_they_are = decoder.of_group(one, none)
            nth = [group_of(i) for i in loads] if not by_columns else []
            own = [[of_vector(a, i) for a in (scale, zero)] for i in range(0, IN_A_TILE, LANES)] if by_columns else []

            def values_of(row: Any, k: Any, i: int) -> list[Any]:
                codes = load(builder, builder.add(row, _ADDRESS(LANES * i)), kind.lanes)
                if not by_columns:
                    of_row = (builder.add(a, builder.mul(k, by)) for a, by in ((scale, s_stride), (zero, z_stride)))
                    return decoder.values(codes, _of_group(builder, decoder, *of_row, nth[i]))
                if kind is _Bytes:
                    return decoder.values(codes, decoder.of_group(*own[i]))
                parts = zip(decoder.values(codes, as_they_are), own[i * kind.vectors :], strict=False)
                return [builder.fmul(builder.fsub(number, point), factor) for number, (factor, point) in parts]

            for m in range(1, ROWS + 1):
                with builder.if_then(builder.icmp_signed("==", of_x, _ADDRESS(m))):
                    of_rows = [builder.add(x, builder.mul(x_stride, _ADDRESS(i))) for i in range(m)]

                    def step(k: Any, totals: list[Any], of_rows: list[Any] = of_rows) -> list[Any]:
                        row, totals = builder.add(w, builder.mul(k, w_stride)), list(totals)
                        read_ahead(builder, builder.add(row, _ADDRESS(AHEAD_IN_A_ROW)))
                        values = [value for i in range(len(loads)) for value in values_of(row, k, i)]
                        for i, of_row in enumerate(of_rows):
                            entry = in_all_lanes(
                                builder, load(builder, item_at(builder, of_row, k, 4), _FLOAT), _FLOATS
                            )
                            for v, value in enumerate(values):
                                nth_total = i * len(values) + v
                                totals[nth_total] = builder.call(fma, [value, entry, totals[nth_total]])
                        return totals

                    totals = counted_loop(builder, count, [none] * (m * IN_A_TILE // LANES), step)
                    for i, total in enumerate(totals):
                        r, v = divmod(i, IN_A_TILE // LANES)
                        place = builder.add(out, builder.mul(out_stride, _ADDRESS(r)))
                        place = builder.add(place, _ADDRESS(4 * LANES * v))
                        store(builder, builder.fadd(load(builder, place, _FLOATS), total), place)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 17), generate

    return tile


# ---- one row of x in fixed point, by integer dot products

_VECTOR, _SHORTS = ir.VectorType(_BYTE, VECTOR), ir.VectorType(ir.IntType(16), VECTOR // 2)

PARTS_OF_BYTES = BITS_OF_DIGIT // 8
PARTS_OF_HALVES = 2 * PARTS_OF_BYTES
"""Vectors of numbers that a vector of codes becomes, each of which meets vectors of digits of its own."""

STARTS = 2 if _OF_BYTES else 0
"""Vectors that sums begin with, for numbers as unsigned bytes are more than they mean."""

ENTRY_OF_BYTES, ENTRY_OF_HALVES = (
    VECTOR * (32 // BITS_OF_DIGIT * parts + STARTS) for parts in (PARTS_OF_BYTES, PARTS_OF_HALVES)
)
"""Bytes of what is kept of x for each vector of codes: digits, and what sums begin with."""


class _BytesForDots:
    """Codes of 8 bits, ``flip`` turned over: as unsigned bytes 128 more than they mean, or as signed shorts."""

    parts, shifted = PARTS_OF_BYTES, False

    def __init__(self, builder: Any, table: Any, flip: Any) -> None:
        flip = builder.xor(flip, _ADDRESS(128)) if _OF_BYTES else flip
        word = builder.mul(builder.trunc(flip, _INT), _INT(0x01010101))
        self.builder, self.flip = builder, in_all_lanes(builder, word, _INTS)

    def numbers(self, codes: Any) -> list[Any]:
        return [self.builder.xor(self.builder.bitcast(codes, _INTS), self.flip)]

    def shorts(self, pairs: Any) -> list[Any]:
        """Signed bytes at even and at odd positions."""
        eight = ir.Constant(_SHORTS, [8] * _SHORTS.count)
        return [self.builder.ashr(v, eight) for v in (self.builder.shl(pairs, eight), pairs)]


class _HalvesForDots:
    """Codes of 4 bits as bytes, those at even and those at odd positions, by a table of 16 that each lane has."""

    parts, shifted = PARTS_OF_HALVES, False

    def __init__(self, builder: Any, table: Any, flip: Any) -> None:
        self.builder, self.table = builder, load(builder, table, _VECTOR)
        name = "llvm.x86.avx512.pshuf.b.512" if _WIDE else "llvm.x86.avx2.pshuf.b"
        self.look_up = function(builder, name, _VECTOR, [_VECTOR, _VECTOR])

    def numbers(self, codes: Any) -> list[Any]:
        words, low = self.builder.bitcast(codes, _INTS), ir.Constant(_INTS, [0x0F0F0F0F] * LANES)
        upper = self.builder.lshr(words, ir.Constant(_INTS, [4] * LANES))
        places = [self.builder.bitcast(self.builder.and_(w, low), _VECTOR) for w in (words, upper)]
        return [self.builder.bitcast(self.builder.call(self.look_up, [self.table, p]), _INTS) for p in places]

    def shorts(self, pairs: Any) -> list[Any]:
        """2^8 times signed bytes at even and at odd positions: they are the upper bytes of shorts."""
        upper = ir.Constant(_SHORTS, [-256] * _SHORTS.count)
        return [self.builder.shl(pairs, ir.Constant(_SHORTS, [8] * _SHORTS.count)), self.builder.and_(pairs, upper)]


class _PlainForDots(_HalvesForDots):
    """The same without a table: codes are the numbers, less the lowest, where a bit is turned over in each or in none.

    Which one, is in the first of the table's entries: the lowest number's code, 0, or 8 of integers with a sign.
    """

    def __init__(self, builder: Any, table: Any, flip: Any) -> None:
        bit = builder.and_(load(builder, table, _INT), _INT(8))
        self.builder, self.turned = builder, in_all_lanes(builder, builder.mul(bit, _INT(0x01010101)), _INTS)

    def numbers(self, codes: Any) -> list[Any]:
        words, low = self.builder.bitcast(codes, _INTS), ir.Constant(_INTS, [0x0F0F0F0F] * LANES)
        upper = self.builder.lshr(words, ir.Constant(_INTS, [4] * LANES))
        return [self.builder.and_(self.builder.xor(w, self.turned), low) for w in (words, upper)]


class _ShiftedForDots(_PlainForDots if _OF_BYTES else _HalvesForDots):  # type: ignore[misc]
    """Integers of which zero points are taken, less the lowest number as the table's are."""

    shifted = True


def _dot(builder: Any, total: Any, numbers: Any, digits: Any) -> Any:
    """``vpdpbusd``, of four bytes a lane, or ``vpmaddwd``, of two shorts."""
    if _OF_BYTES:
        dot = function(builder, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", _INTS, [_INTS] * 3)
        return builder.call(dot, [total, numbers, digits])
    name = "llvm.x86.avx512.pmaddw.d.512" if _WIDE else "llvm.x86.avx2.pmadd.wd"
    multiply = function(builder, name, _INTS, [_SHORTS] * 2)
    return builder.add(total, builder.call(multiply, [numbers, builder.bitcast(digits, _SHORTS)]))


def _in_dots(kind: Any) -> Any:
    """``out[r, lane] += sum of value[r, k] x[k]`` over whole rows, x in fixed point as ``_to_fixed_point`` leaves it.

    Arguments: addresses and strides as ``_tile`` has them; the bytes of a row, and the address of copies of those that
    fill no vector, a vector for each row; where the parts of x begin; how many scales a row has; what is taken off zero
    points; and where a vector is kept of the largest that bits of scales are above the first of ``NEAR_ONE``.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        _: Any, w: Any, w_stride: Any, there: Any, length: Any, rest: Any, head: Any, firsts: Any, places: Any,
        powers: Any, digits: Any, scale: Any, s_stride: Any, groups: Any, zero: Any, z_stride: Any, lowest: Any,
        flip: Any, farthest: Any, out: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            w, w_stride, there, length, rest, head, firsts, places, powers, digits, *others = arguments
            scale, s_stride, groups, zero, z_stride, lowest, flip, farthest, out = others
            height = HEIGHT_OF_ONE
            of_codes, of_rest, of_scales, of_zeros = _rows_of_tile(
                builder, height, there, (w, w_stride), (rest, _ADDRESS(VECTOR)), (scale, s_stride), (zero, z_stride)
            )
            decoder = kind(builder, builder.add(head, _ADDRESS(64)), flip)
            low_point = in_all_lanes(builder, builder.trunc(lowest, _INT), _INTS)
            fma = function(builder, f"llvm.fma.v{LANES}f32", _FLOATS, [_FLOATS] * 3)
            permute = function(builder, _PERMUTE, _FLOATS, [_FLOATS, _INTS])
            words = "llvm.x86.avx512.permvar.si.512" if _WIDE else "llvm.x86.avx2.permd"
            permute_words = function(builder, words, _INTS, [_INTS, _INTS])
            entry = VECTOR * (32 // BITS_OF_DIGIT * kind.parts + STARTS)
            byte, none = ir.Constant(_INTS, [8] * LANES), ir.Constant(_INTS, None)

            def block(b: Any, totals: list[Any], whole: bool) -> list[Any]:
                *totals, most = totals
                at = builder.mul(b, _ADDRESS(4 * BLOCK))
                first = builder.sext(load(builder, item_at(builder, firsts, b, 4), _INT), _ADDRESS)
                there, order = builder.sub(groups, first), load(builder, builder.add(places, at), _INTS)
                power, scales, shifts = load(builder, builder.add(powers, at), _FLOATS), [], []
                for start in of_scales:
                    place = item_at(builder, start, first, 4)
                    read_ahead(builder, builder.add(place, _ADDRESS(AHEAD // 4)))
                    numbers = _only(builder, place, there, ir.Constant(_FLOATS, [1.0] * LANES))
                    bits = builder.bitcast(numbers, _INTS)
                    magnitude = builder.and_(bits, ir.Constant(_INTS, [0x7FFFFFFF] * LANES))
                    above = builder.sub(magnitude, ir.Constant(_INTS, [int(NEAR_ONE[0])] * LANES))
                    most = builder.select(builder.icmp_unsigned(">", above, most), above, most)
                    scales.append(builder.fmul(builder.call(permute, [numbers, order]), power))
                for start in of_zeros if kind.shifted else ():
                    points = _only(builder, item_at(builder, start, first, 4), there, none)
                    points = builder.sub(builder.call(permute_words, [points, order]), low_point)
                    points = builder.and_(points, ir.Constant(_INTS, [255] * LANES))
                    shifts.append(builder.mul(points, ir.Constant(_INTS, [0x01010101] * LANES)))
                for v in range(BLOCK * QUARTER // VECTOR):
                    k = builder.add(builder.mul(b, _ADDRESS(QUARTER * BLOCK)), _ADDRESS(VECTOR * v))
                    x = item_at(builder, builder.add(digits, _ADDRESS(entry * v)), b, BLOCK * QUARTER // VECTOR * entry)
                    lanes = ir.Constant(_INTS, [(LANES * v + i) // 4 for i in range(LANES)])  # a quarter is four lanes
                    *of_x, first_high, first_low = [
                        load(builder, builder.add(x, _ADDRESS(i)), _INTS) for i in range(0, entry, VECTOR)
                    ] + [none] * (2 - STARTS)
                    inside = builder.icmp_signed("<=", builder.add(k, _ADDRESS(VECTOR)), length)
                    for r, (start, beyond) in enumerate(zip(of_codes, of_rest, strict=True)):
                        here = builder.add(start, k)
                        if VECTOR * v % 64 == 0:  # a line of the cache
                            read_ahead(builder, builder.add(here, _ADDRESS(AHEAD)))
                        if not whole:  # after the row's end, where digits are 0, codes are anything
                            here = builder.select(inside, here, beyond)
                        numbers = decoder.numbers(load(builder, here, _VECTOR))
                        if kind.shifted:
                            shift = builder.bitcast(builder.call(permute_words, [shifts[r], lanes]), _VECTOR)
                            shifted = [builder.sub(builder.bitcast(n, _VECTOR), shift) for n in numbers]
                            numbers = [builder.bitcast(n, _INTS) for n in shifted]
                        if not _OF_BYTES:
                            numbers = [s for n in numbers for s in decoder.shorts(builder.bitcast(n, _SHORTS))]
                        sums = []
                        for of_half, initial in zip(
                            _in_two(of_x), ((first_high, none), (none, first_low)), strict=True
                        ):
                            total = initial[0]
                            for i, digit in enumerate(of_half):
                                if i == kind.parts:
                                    total = builder.add(builder.shl(total, byte), initial[1])
                                total = _dot(builder, total, numbers[i % kind.parts], digit)
                            sums.append(builder.sitofp(total, _FLOATS))
                        both = builder.call(fma, [sums[0], ir.Constant(_FLOATS, [65536.0] * LANES), sums[1]])
                        totals[r] = builder.call(fma, [both, builder.call(permute, [scales[r], lanes]), totals[r]])
                return [*totals, most]

            totals = [*[ir.Constant(_FLOATS, [0.0] * LANES)] * height, load(builder, farthest, _INTS)]
            blocks, rest = (f(length, _ADDRESS(QUARTER * BLOCK)) for f in (builder.sdiv, builder.srem))

            def whole_blocks(part: Any, totals: list[Any]) -> list[Any]:
                """``BLOCKS_A_SUM`` of them, or the last, whose sums begin at 0 and join those before at their end."""
                first, several = builder.mul(part, _ADDRESS(BLOCKS_A_SUM)), _ADDRESS(BLOCKS_A_SUM)
                left = builder.sub(blocks, first)
                count = builder.select(builder.icmp_signed("<", left, several), left, several)
                new = [*[ir.Constant(_FLOATS, [0.0] * LANES)] * height, *totals[height:]]
                new = counted_loop(builder, count, new, lambda b, new: block(builder.add(first, b), new, True))
                return [*map(builder.fadd, totals[:height], new[:height]), *new[height:]]

            parts = builder.sdiv(builder.add(blocks, _ADDRESS(BLOCKS_A_SUM - 1)), _ADDRESS(BLOCKS_A_SUM))
            totals = counted_loop(builder, parts, totals, whole_blocks, least=0)
            left = builder.zext(builder.icmp_signed(">", rest, _ADDRESS(0)), _ADDRESS)
            totals = counted_loop(builder, left, totals, lambda _, totals: block(blocks, totals, False), least=0)
            half, other = (
                in_all_lanes(builder, load(builder, builder.add(head, _ADDRESS(i)), _FLOAT), _FLOATS) for i in (8, 12)
            )
            for r, total in enumerate(totals[:height]):
                place = builder.add(out, _ADDRESS(4 * LANES * r))
                total = builder.fmul(builder.fmul(total, half), other)
                total = builder.fadd(total, load(builder, place, _FLOATS))
                builder.store(total, builder.inttoptr(place, _FLOATS.as_pointer()), align=4)
            builder.store(totals[height], builder.inttoptr(farthest, _INTS.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 19), generate

    return tile


def _in_two(items: list[Any]) -> tuple[list[Any], list[Any]]:
    return items[: len(items) // 2], items[len(items) // 2 :]


def _first_lanes(builder: Any, count: Any) -> Any:
    """Which lanes are the first ``count``."""
    few = builder.select(builder.icmp_signed("<", count, _ADDRESS(LANES)), count, _ADDRESS(LANES))
    few = in_all_lanes(builder, builder.trunc(few, _INT), _INTS)
    return builder.icmp_signed("<", ir.Constant(_INTS, list(range(LANES))), few)


def _only(builder: Any, address: Any, count: Any, others: Any) -> Any:
    """The first ``count`` words of a vector in memory, and ``others`` after them, where nothing is read."""
    vector = others.type
    pointer, there = vector.as_pointer(), _first_lanes(builder, count)
    name = f"llvm.masked.load.v{LANES}{'f32' if vector == _FLOATS else 'i32'}.p0"
    masked = function(builder, name, vector, [pointer, _INT, there.type, vector])
    return builder.call(masked, [builder.inttoptr(address, pointer), _INT(1), there, others])


_bytes_in_dots, _halves_in_dots, _plain_in_dots, _shifted_in_dots = map(
    _in_dots, (_BytesForDots, _HalvesForDots, _PlainForDots, _ShiftedForDots)
)


_bytes_of_rows, _halves_of_rows = (_tile(kind, *range(1, min(ROWS + 1, MANY_ROWS))) for kind in (_Bytes, _Halves))
_floats_of_rows = _tile(_Floats, *range(1, ROWS + 1))
bytes_of_columns, halves_of_columns = (_columns(kind, by_columns=True) for kind in (_Bytes, _Halves))
bytes_across, halves_across = (_columns(kind, by_columns=False) for kind in (_Bytes, _Halves))
_decode_bytes, _decode_halves = _decoder(_Bytes), _decoder(_Halves)
_IN_ORDER = _HalvesInOrder, _MovedIntegers, _Moved, _MovedWide, _LookedUp
_decode_halves_in_order, _decode_integers, _decode_moved, _decode_moved_wide, _decode_looked_up = map(
    _decoder, _IN_ORDER
)
(
    _halves_in_order_of_one_row, _integers_of_one_row, _moved_of_one_row, _moved_wide_of_one_row,
    _looked_up_of_one_row,
) = (_tile(kind, 1) for kind in _IN_ORDER)  # fmt: skip


@njit(nogil=True, cache=True)
def parts_of(inner: int, halves: bool) -> tuple[int, int, int, int, int, int, int]:
    """Where in one row of arranged x, in bytes, the parts in fixed point begin that follow the floats, and their end.

    A head: whether they are there, how many quarters are not served, two powers of two that the sums are multiplied by,
    and from its 64th byte on the numbers of codes as bytes. Which quarters are not served. For each block, the first of
    its scales; for each quarter which scale after that one it has, and its power of two. For each vector of codes the
    digits of x, from the highest, each of them in the order of the vectors of numbers, and what its sums begin with.
    """
    codes, entry = (2 * QUARTER, ENTRY_OF_HALVES) if halves else (QUARTER, ENTRY_OF_BYTES)
    blocks = (inner + codes * BLOCK - 1) // (codes * BLOCK)
    head = (inner + codes - 1) // codes * codes * 4
    unserved = head + 128
    firsts = unserved + 4 * BLOCK * blocks
    places = firsts + (4 * blocks + 63) // 64 * 64
    powers = places + 4 * BLOCK * blocks
    digits = powers + 4 * BLOCK * blocks
    return head, unserved, firsts, places, powers, digits, digits + entry * (BLOCK * QUARTER // VECTOR) * blocks


def shape_of_arranged(rows: int, inner: int, kind: int) -> tuple[int, int]:
    """Shape of what ``arrange`` fills: rows an odd number of lines apart, so that a cache holds the same of all."""
    head, *_, end = parts_of.py_func(inner, kind == HALVES)
    if rows == 1:
        return 1, (end if kind <= HALVES else head) // 4
    return rows, (-(-head // 64) | 1) * 16


@njit(nogil=True, cache=True)
def _numbers_as_bytes(table: Any, shifted: Any, numbers: Any) -> Any:  # pragma: no cover - compiled
    """Numbers of 4 bits as ``step * (numbers + lowest)``: the step, 0 where there is none, and the lowest.

    Signed bytes, which shorts are made of, are the numbers themselves. With zero points numbers are integers, of which
    the least is taken off, as it then is of zero points: unsigned bytes are ``MOST_SHIFT`` more than they mean.
    """
    for halvings in range(1 if shifted else 5):
        step = np.float32(0.5) ** halvings
        low, most, plain = np.float32(0), np.float32(0), True
        for i in range(16):
            number = table[i] / step
            low, most = min(low, number), max(most, number)
            plain &= abs(number) <= MOST_NUMBER and number == np.rint(number)
        if not plain:
            continue
        if shifted and most - low >= MOST_SHIFT:
            break
        lowest = np.int64(0)
        if _OF_BYTES:
            lowest = np.int64(-MOST_SHIFT if shifted else low)
        taken_off = np.int64(low) if _OF_BYTES or shifted else np.int64(0)
        for i in range(64):
            numbers[i] = (np.int64(table[i % 16] / step) - taken_off) & 255
        plain = numbers[0] in (0, 8)
        for i in range(16):
            plain &= numbers[i] == i ^ numbers[0]
        return step, lowest, plain and _OF_BYTES
    return np.float32(0), np.int64(0), False


@intrinsic  # type: ignore[untyped-decorator]
def _largest_magnitude(_: Any, x: Any, vectors: Any) -> Any:
    """Of ``vectors`` vectors of floats, as its bits, by which NaN is the largest."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        x, vectors = arguments

        def step(i: Any, totals: list[Any]) -> list[Any]:
            bits = load(builder, item_at(builder, x, i, 4 * LANES), _INTS)
            bits = builder.and_(bits, ir.Constant(_INTS, [0x7FFFFFFF] * LANES))
            return [builder.select(builder.icmp_signed(">", bits, totals[0]), bits, totals[0])]

        [most] = counted_loop(builder, vectors, [ir.Constant(_INTS, None)], step)
        reduce = function(builder, f"llvm.vector.reduce.smax.v{LANES}i32", _INT, [_INTS])
        return builder.sext(builder.call(reduce, [most]), _ADDRESS)

    return types.intp(types.intp, types.intp), generate


_SIXTEEN, _SIXTEEN_FLOATS = ir.VectorType(_INT, QUARTER), ir.VectorType(_FLOAT, QUARTER)


def _sixteen_floats(builder: Any, address: Any, distance: int) -> Any:
    """A vector of floats, or two of them and so far apart."""
    parts = [load(builder, builder.add(address, _ADDRESS(distance * i)), _FLOATS) for i in range(QUARTER // LANES)]
    if len(parts) == 1:
        return parts[0]
    return builder.shuffle_vector(*parts, ir.Constant(_SIXTEEN, list(range(QUARTER))))


def _put_starts(builder: Any, integers: list[Any], lowest: Any, starts: Any) -> None:
    """Sums of four entries of each vector, in two halves, which are multiplied by ``lowest`` exactly."""
    low = in_all_lanes(builder, builder.trunc(lowest, _INT), ir.VectorType(_INT, 4))
    halves = []
    for half in (0, 1):
        total = ir.Constant(_SIXTEEN, None)
        for v in integers:
            part = (
                builder.ashr(v, ir.Constant(_SIXTEEN, [16] * QUARTER))
                if half
                else builder.and_(v, ir.Constant(_SIXTEEN, [0xFFFF] * QUARTER))
            )
            total = builder.add(total, part)
        fours = [
            builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(_INT, 4), [a, a + 4, a + 8, a + 12]))
            for a in range(4)
        ]
        total = builder.add(builder.add(fours[0], fours[1]), builder.add(fours[2], fours[3]))
        halves.append(builder.mul(total, low))
    # halves[1] * 2^16 + halves[0] = high * 2^24 + rest
    high = builder.ashr(halves[1], ir.Constant(low.type, [8] * 4))
    rest = builder.shl(builder.and_(halves[1], ir.Constant(low.type, [255] * 4)), ir.Constant(low.type, [16] * 4))
    rest = builder.add(rest, halves[0])
    for i, vector in enumerate((high, rest)):
        store(builder, vector, builder.add(starts, _ADDRESS(VECTOR * i)))


def _quarter(parts: int) -> Any:
    """``QUARTER * parts`` entries of x times two powers of two: their digits, and what sums begin with, if they serve.

    Arguments: addresses of the entries, those at even positions first; of the digits; of what sums begin with; and the
    number that codes are less than meant. The answer is whether the entries are served.
    """

    @intrinsic  # type: ignore[untyped-decorator]
    def split(_: Any, x: Any, first: Any, second: Any, lowest: Any, digits: Any, starts: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            x, first, second, lowest, digits, starts = arguments
            floats, ints, each = _SIXTEEN_FLOATS, _SIXTEEN, PARTS_OF_BYTES
            first, second = (in_all_lanes(builder, v, floats) for v in (first, second))
            places = [builder.add(x, _ADDRESS(4 * LANES * i)) for i in range(parts)]
            entries = [_sixteen_floats(builder, place, 4 * LANES * parts) for place in places]
            scaled = [builder.fmul(builder.fmul(v, first), second) for v in entries]
            magnitude = function(builder, "llvm.fabs.v16f32", floats, [floats])
            bits = ir.IntType(QUARTER)
            population = function(builder, "llvm.ctpop.i16", bits, [bits])

            def counted(order: str, limit: float) -> Any:
                """Entries other than 0 that are below a limit."""
                total = _INT(0)
                for v in scaled:
                    size, zero = builder.call(magnitude, [v]), ir.Constant(floats, [0.0] * QUARTER)
                    there = builder.fcmp_ordered(">", size, zero)
                    below = builder.fcmp_ordered(order, size, ir.Constant(floats, [limit] * QUARTER))
                    found = builder.call(population, [builder.bitcast(builder.and_(there, below), bits)])
                    total = builder.add(total, builder.zext(found, _INT))
                return total

            fine = builder.icmp_signed("==", counted("<", float(FINEST)), _INT(0))
            many = builder.mul(counted("<", float(COARSE)), _INT(COARSE_ENTRIES))
            served = builder.and_(fine, builder.icmp_signed("<=", many, counted("<", float("inf"))))
            rounded = function(builder, "llvm.rint.v16f32", floats, [floats])
            integers = [builder.fptosi(builder.call(rounded, [v]), ints) for v in scaled]
            if STARTS:
                _put_starts(builder, integers, lowest, starts)
            digit_type = ir.VectorType(ir.IntType(BITS_OF_DIGIT), QUARTER)
            for part, vector in enumerate(integers):
                for d in range(32 // BITS_OF_DIGIT - 1, -1, -1):
                    digit = builder.trunc(vector, digit_type)
                    for i in range(each):  # shorts at even positions, and at odd ones
                        some = ir.Constant(ir.VectorType(_INT, QUARTER // each), list(range(i, QUARTER, each)))
                        place = builder.add(digits, _ADDRESS(VECTOR * ((d * parts + part) * each + i)))
                        store(builder, builder.shuffle_vector(digit, digit, some), place)
                    vector = builder.sub(vector, builder.sext(digit, ints))
                    vector = builder.ashr(vector, ir.Constant(ints, [BITS_OF_DIGIT] * QUARTER))
            return builder.zext(served, _ADDRESS)

        return types.intp(types.intp, types.float32, types.float32, *[types.intp] * 3), generate

    return split


_quarter_of_bytes, _quarter_of_halves = _quarter(1), _quarter(2)


@njit(nogil=True, cache=True)
def _to_fixed_point(halves: Any, inner: Any, size: Any, table: Any, shifted: Any, out: Any) -> None:
    """What follows the floats in a row of arranged x (``parts_of``)."""
    head, of_unserved, firsts, places, powers, digits, end = parts_of(inner, halves)  # pragma: no cover - compiled
    words, numbers = out.view(np.int32), out.view(np.uint8)
    words[head // 4] = 0
    step, lowest, plain = np.float32(1), -128, False
    if halves:
        step, lowest, plain = _numbers_as_bytes(table, shifted, numbers[head + 64 : head + 128])
    if step == 0 or (shifted and not halves):
        return
    codes, entry = (2 * QUARTER, ENTRY_OF_HALVES) if halves else (QUARTER, ENTRY_OF_BYTES)
    groups, of_vector = (inner + size - 1) // size, VECTOR // QUARTER
    if groups > 1 and size % codes != 0:
        return
    there, blocks = (inner + codes - 1) // codes, (inner + codes * BLOCK - 1) // (codes * BLOCK)
    exponents, leading = words[powers // 4 : powers // 4 + BLOCK * blocks], -127
    factors = np.empty(2, dtype=np.int32)
    numbers[digits:end] = 0
    start, unserved = out.ctypes.data, 0
    for q in range(there):
        x, most = start + 4 * codes * q, _largest_magnitude(start + 4 * codes * q, codes // LANES)
        at, nth = start + digits + q // of_vector * entry, q % of_vector * QUARTER
        of_digits, of_sums = at + nth, at + entry - 2 * VECTOR + nth
        exponents[q] = NOTHING if most == 0 else UNSERVED
        if most < 0x00800000 or most >= 0x7F800000:
            continue
        e = (most >> 23) - 127
        if (most & 0x7FFFFF) > MOST_FRACTION:
            e += 1
        half = (BITS - e) >> 1
        factors[0], factors[1] = (half + 127) << 23, (BITS - e - half + 127) << 23
        first, second = factors.view(np.float32)[0], factors.view(np.float32)[1]
        if halves:
            served = _quarter_of_halves(x, first, second, lowest, of_digits, of_sums)
        else:
            served = _quarter_of_bytes(x, first, second, lowest, of_digits, of_sums)
        if served != 0:
            exponents[q] = e
            leading = max(leading, e)
    for q in range(BLOCK * blocks):
        e = exponents[q] if q < there else NOTHING
        if e == UNSERVED or NOTHING < e < leading - FARTHEST:
            words[of_unserved // 4 + unserved] = q
            unserved += 1
        served = NOTHING < e >= leading - FARTHEST
        exponents[q] = (e - leading + 127) << 23 if served else 0  # a power of two, or 0
    if unserved * MOST_IN_FLOATS > there:
        return
    for b in range(blocks):
        group = min(b * BLOCK * codes // size, groups - 1)
        words[firsts // 4 + b] = group
        for i in range(BLOCK):
            words[places // 4 + b * BLOCK + i] = min((b * BLOCK + i) * codes // size, groups - 1) - group
    if halves and BITS_OF_DIGIT == 16:
        step *= np.float32(2.0**-8)  # their numbers are the upper bytes of shorts
    e = leading - BITS
    half = e >> 1
    out[head // 4 + 2], out[head // 4 + 3] = np.float32(2.0) ** half * step, np.float32(2.0) ** (e - half)
    words[head // 4], words[head // 4 + 1], words[head // 4 + 4] = 1, unserved, plain


@njit(nogil=True, cache=True)
def arrange(x: Any, kind: Any, size: Any, table: Any, shifted: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Rows of x as loops read them: of ``HALVES`` those beside lower halves of bytes before those beside upper ones.

    ``out`` has whole quarters: what x does not fill is 0. Where it has room for all of ``parts_of``, as for a product
    of one row, and not for one of several rows, that row in fixed point follows: for codes in groups of ``size``, with
    numbers in ``table`` where they are ``HALVES``, and with zero points where they are ``shifted``.
    """
    (rows, inner), halves = x.shape, kind == HALVES
    vector = 2 * LANES if halves else LANES
    whole, width = inner - inner % vector, parts_of(inner, halves)[0] // 4
    for m in range(rows):
        row, arranged = x[m], out[m, :width]
        if not halves:
            for k in range(inner):  # not as one: numba would compile what it says of shapes that differ, for seconds
                arranged[k] = row[k]
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
    if table.ndim == 1:  # noqa: SIM102
        if rows == 1 and 4 * out.shape[1] >= parts_of(inner, halves)[-1]:
            _to_fixed_point(halves, inner, size, table, shifted, out[0])


arrange_apart = apart(arrange, "void(float32[:,::1], int64, int64, float32[::1], boolean, float32[:,::1])")


@njit(nogil=True, cache=True)
def doubling_of(table: Any) -> Any:  # pragma: no cover - compiled
    """Codes about the middle one, the first and the last, of which each has twice the number of the one before."""
    bits = table.view(np.uint32)
    first = last = bits.shape[0] // 2
    while first > 0 and bits[first] - bits[first - 1] == 1 << 23:
        first -= 1
    while last + 1 < bits.shape[0] and bits[last + 1] - bits[last] == 1 << 23:
        last += 1
    return first, last


@njit(nogil=True, cache=True)
def looked_up(codes: Any, table: Any, doubling: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Numbers of scales that are kept as codes; in vectors where ``doubling`` has those of a row.

    Twice a number is one more in its exponent, which the bits from the 23rd on are. So all bits are those of code 0, as
    it would be, and the code's.
    """
    first, last = doubling
    serves = last > first
    of_none = np.uint32(table.view(np.uint32)[first] - (first << 23)) if serves else np.uint32(0)
    for n in range(out.shape[0]):
        row, numbers = codes[n if codes.shape[0] > 1 else 0], out[n]
        bits, least, most = numbers.view(np.uint32), np.uint8(255), np.uint8(0)
        for g in range(bits.shape[0] if serves else 0):
            code = row[g]
            least, most = min(least, code), max(most, code)
            bits[g] = of_none + (np.uint32(code) << np.uint32(23))
        if not serves or least < first or most > last:
            for g in range(numbers.shape[0]):
                numbers[g] = table[np.uint64(row[g])]


@njit(nogil=True, cache=True)
def look_up(codes: Any, table: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Numbers of codes, of which there are as many as codes."""
    for i in range(codes.shape[0]):
        out[i] = table[codes[i]]


@njit(nogil=True, cache=True)
def as_floats(integers: Any, less: Any, out: Any) -> Any:  # pragma: no cover - compiled
    """Zero points, of unsigned bytes as of the signed ones that they are taken for; whether differences are exact."""
    farthest = np.int32(0)
    for n in range(out.shape[0]):
        row, numbers = integers[n if integers.shape[0] > 1 else 0], out[n]
        for g in range(numbers.shape[0]):
            farthest |= row[g] ^ (row[g] >> np.int32(31))
            numbers[g] = row[g] - less
    return farthest < FARTHEST_ZERO


@njit(nogil=True, cache=True)
def largest(patterns: Any, ignored: Any, less: Any) -> Any:  # pragma: no cover - compiled
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
def _are_near_one(patterns: Any, less: Any) -> Any:  # pragma: no cover - compiled
    """Whether bits of some floats are in ``NEAR_ONE``; where ``less`` is 0, those of 0 serve, too."""
    far = False
    for n in range(patterns.shape[0]):
        row = patterns[n]
        for g in range(row.shape[0]):
            bits = row[g] & np.uint32(0x7FFFFFFF)
            far |= bits - NEAR_ONE[0] >= NEAR_ONE[1] - NEAR_ONE[0] and (bits != 0 or less != 0)
    return not far


@njit(nogil=True, cache=True)
def _copy_rest(w: Any, inner: Any, whole: Any, halves: Any, rest: Any) -> None:  # pragma: no cover - compiled
    """Codes from ``whole`` on, which fill no vector: no loop reads beyond the weight."""
    first = whole // 2 if halves else whole
    for n in range(w.shape[0] if whole < inner else 0):
        codes, out = w[n, first:], rest[n]
        for i in range(codes.shape[0]):
            out[i] = codes[i]
        if halves and inner % 2:  # the last upper half pads: whatever it says, no number of it is to meet x
            rest[n, (inner - whole) // 2] &= 15


@njit(nogil=True, cache=True)
def _are_codes(zero: Any, lowest: Any) -> Any:  # pragma: no cover - compiled
    """Whether zero points are codes of 4 bits, of which the lowest is given."""
    most, least = np.int32(-(1 << 30)), np.int32(1 << 30)
    for n in range(zero.shape[0]):
        row = zero[n]
        for g in range(row.shape[0]):
            most, least = max(most, row[g]), min(least, row[g])
    return lowest <= least and most < lowest + MOST_SHIFT


_STRIP, _SUMS = "uint8[:,::1], float32[:,::1]", "float32[:,:,::1]"
_ADDRESSES = "int64, int64, int64, int64"
"""Arguments of what adds to the sums of a strip: its codes and x; sums; scales, zero points, and strides of both."""


@njit(nogil=True, cache=True)
def _add_in_dots(
    w: Any, x: Any, inner: Any, halves: Any, flip: Any, table: Any, scale: Any, s_stride: Any, zero: Any, z_stride: Any,
    lowest: Any, size: Any, sums: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``_add_tiles`` of one row that is in fixed point; ``zero`` is the address of integers, 0 where there are none.

    The answer is whether all scales are near 1.
    """
    here, of_row = w.shape[0], x.ctypes.data
    head, _, firsts, places, powers, digits, _ = parts_of(inner, halves)
    head, firsts, places, powers, digits = (
        of_row + head, of_row + firsts, of_row + places, of_row + powers, of_row + digits
    )  # fmt: skip
    start, by, groups = w.ctypes.data, w.strides[0], (inner + size - 1) // size
    length = (inner + 1) // 2 if halves else inner
    ends_within = length % (QUARTER * BLOCK) != 0  # if not, an upper half may still pad, and meets digits that are 0
    rest = np.zeros((here if ends_within else 0, VECTOR), dtype=np.uint8)
    if ends_within:
        _copy_rest(w, inner, inner - inner % (2 * VECTOR if halves else VECTOR), halves, rest)
    farthest, plain = np.zeros(LANES, dtype=np.uint32), x.view(np.int32)[0, (head - of_row) // 4 + 4] != 0
    off = lowest + MOST_SHIFT if _OF_BYTES else lowest  # unsigned bytes are so much more than they mean
    sums[:] = 0
    for n in range(0, here, HEIGHT_OF_ONE):
        codes, s, z = start + n * by, scale + n * s_stride, zero + n * z_stride
        out, there, beyond = sums.ctypes.data + n * sums.strides[1], here - n, rest.ctypes.data + n * VECTOR
        if not halves:
            _bytes_in_dots(
                codes, by, there, length, beyond, head, firsts, places, powers, digits, s, s_stride, groups, z,
                z_stride, off, flip, farthest.ctypes.data, out,
            )  # fmt: skip
        elif zero != 0:
            _shifted_in_dots(
                codes, by, there, length, beyond, head, firsts, places, powers, digits, s, s_stride, groups, z,
                z_stride, off, flip, farthest.ctypes.data, out,
            )  # fmt: skip
        elif plain:
            _plain_in_dots(
                codes, by, there, length, beyond, head, firsts, places, powers, digits, s, s_stride, groups, z,
                z_stride, off, flip, farthest.ctypes.data, out,
            )  # fmt: skip
        else:
            _halves_in_dots(
                codes, by, there, length, beyond, head, firsts, places, powers, digits, s, s_stride, groups, z,
                z_stride, off, flip, farthest.ctypes.data, out,
            )  # fmt: skip
    return farthest.max() < NEAR_ONE[1] - NEAR_ONE[0]


_add_in_dots_apart = apart(
    _add_in_dots,
    f"boolean({_STRIP}, int64, boolean, int64, float32[::1], {_ADDRESSES}, int64, int64, {_SUMS})",
)


@njit(nogil=True, cache=True)
def _add_unserved(
    w: Any, x: Any, inner: Any, halves: Any, flip: Any, table: Any, scale: Any, s_stride: Any, zero: Any, z_stride: Any,
    size: Any, sums: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """What ``_add_in_dots`` leaves out: quarters of x that fixed point does not serve, as floats."""
    here, codes, steps = w.shape[0], 2 * QUARTER if halves else QUARTER, QUARTER // LANES
    head, unserved, _, _, _, _, _ = parts_of(inner, halves)
    words = x.view(np.int32)[0]
    whole = inner - inner % codes
    rest = np.zeros((here, QUARTER), dtype=np.uint8)
    _copy_rest(w, inner, whole, halves, rest)
    for n in range(0, here, HEIGHT_OF_ONE):
        out, there = sums.ctypes.data + n * sums.strides[1], here - n
        for i in range(words[head // 4 + 1]):
            k = words[unserved // 4 + i] * codes
            g = k // size
            at, by = w.ctypes.data + n * w.strides[0] + (k // 2 if halves else k), w.strides[0]
            if k == whole:
                at, by = rest.ctypes.data + n * QUARTER, QUARTER
            entries, s, z = x.ctypes.data + 4 * k, scale + n * s_stride + 4 * g, zero + n * z_stride + 4 * g
            if halves:
                _halves_of_rows(
                    1, at, by, there, at, entries, 0, s, s_stride, z, z_stride, table.ctypes.data, flip, 1, steps, out
                )
            else:
                _bytes_of_rows(
                    1, at, by, there, at, entries, 0, s, s_stride, z, z_stride, table.ctypes.data, flip, 1, steps, out
                )


_add_unserved_apart = apart(
    _add_unserved, f"void({_STRIP}, int64, boolean, int64, float32[::1], {_ADDRESSES}, int64, {_SUMS})"
)


@njit(nogil=True, cache=True)
def _add_tiles(
    w: Any, x: Any, inner: Any, halves: Any, flip: Any, table: Any, scale: Any, s_stride: Any, zero: Any,
    z_stride: Any, size: Any, sums: Any, rows: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Sums of a strip of the weight and ``rows`` rows of x: of each tile in the order ``[n, m, lane]``.

    ``scale`` and ``zero`` are addresses.
    """
    here, one = w.shape[0], rows == 1
    depth = DEPTH_OF_ONE if one else DEPTH
    many = rows >= MANY_ROWS
    if many:
        depth = DEPTH_OF_MANY
    values = on_lines(here if many else 0, depth, np.float32)
    bits, vector = (4, 2 * LANES) if halves else (8, LANES)
    whole = inner - inner % vector
    start, by, at, a, out = w.ctypes.data, w.strides[0], x.strides[0], table.ctypes.data, sums.ctypes.data
    rest = np.zeros((here, LANES), dtype=np.uint8)
    _copy_rest(w, inner, whole, halves, rest)
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
        to_next = length * bits // 8 if k + length < whole else here * by - k * bits // 8  # what is decoded next
        for n in range(here if many else 0):
            codes, s, z = (
                start + n * by + k * bits // 8,
                scale + n * s_stride + 4 * g,
                zero + n * z_stride + 4 * g,
            )
            o = values.ctypes.data + n * values.strides[0]
            if halves:
                _decode_halves(codes, codes + to_next, s, z, a, flip, groups, steps, o)
            else:
                _decode_bytes(codes, codes + to_next, s, z, a, flip, groups, steps, o)
        m = 0
        while m < rows:
            tile = min(rows - m, ROWS)
            height, entries = HEIGHTS[tile], x.ctypes.data + m * at + 4 * k
            for n in range(0, here, height):
                codes = start + n * by + k * bits // 8
                s, z = scale + n * s_stride + 4 * g, zero + n * z_stride + 4 * g
                o, there = out + m * sums.strides[0] + n * tile * 4 * LANES, here - n
                if one:
                    ahead = codes + AHEAD
                else:  # the tile below, or the first one of the codes that follow
                    ahead = codes + height * by if there > height else start + (k + length) * bits // 8
                if many:
                    codes = values.ctypes.data + n * values.strides[0]
                    _floats_of_rows(
                        tile, codes, values.strides[0], there, codes, entries, at, s, 0, z, 0, a, flip, 1,
                        length // LANES, o,
                    )  # fmt: skip
                elif halves:
                    _halves_of_rows(
                        tile, codes, by, there, ahead, entries, at, s, s_stride, z, z_stride, a, flip, groups, steps, o
                    )
                else:
                    _bytes_of_rows(
                        tile, codes, by, there, ahead, entries, at, s, s_stride, z, z_stride, a, flip, groups, steps, o
                    )
            m += tile
        k += length


_add_tiles_apart = apart(
    _add_tiles, f"void({_STRIP}, int64, boolean, int64, float32[::1], {_ADDRESSES}, int64, {_SUMS}, int64)"
)


@intrinsic  # type: ignore[untyped-decorator]
def _fill(_: Any, one: Any, count: Any, out: Any) -> Any:
    """So many copies of a float, and more up to a whole vector."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one, count, out = arguments
        copies = in_all_lanes(builder, load(builder, one, _FLOAT), _FLOATS)

        def step(i: Any, totals: list[Any]) -> list[Any]:
            store(builder, copies, item_at(builder, out, i, 4 * LANES))
            return totals

        counted_loop(builder, builder.udiv(builder.add(count, _ADDRESS(LANES - 1)), _ADDRESS(LANES)), [], step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 3), generate


@intrinsic  # type: ignore[untyped-decorator]
def _scale_each(_: Any, numbers: Any, count: Any, scale: Any, zero: Any) -> Any:
    """``(number - zero) * scale`` in place, of so many and more up to a whole vector, each with its own."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers, count, scale, zero = arguments

        def step(i: Any, totals: list[Any]) -> list[Any]:
            places = [item_at(builder, a, i, 4 * LANES) for a in (numbers, zero, scale)]
            own, point, factor = (load(builder, place, _FLOATS) for place in places)
            store(builder, builder.fmul(builder.fsub(own, point), factor), places[0])
            return totals

        counted_loop(builder, builder.udiv(builder.add(count, _ADDRESS(LANES - 1)), _ADDRESS(LANES)), [], step)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@njit(nogil=True, cache=True)
def _spread(blocks: Any, size: Any, first: Any, last: Any, out: Any) -> None:  # pragma: no cover - compiled
    """For each of codes ``first`` to ``last`` - 1 what its group has; a vector of room is written to after them.

    By vectors, each of which may begin within the one before: what lies so is read by none until all are written, for
    processors wait where a vector is read of which a part has just been written.
    """
    k, g = first, first // size
    while k < last:
        end = min((g + 1) * size, last)
        _fill(blocks + 4 * g, end - k, out + 4 * (k - first))
        k, g = end, g + 1


@njit(nogil=True, cache=True)
def _moves_of(kind: Any, table: Any) -> Any:  # pragma: no cover - compiled
    """What ``_Stream`` reads, of what a table says after its numbers; of ``_HalvesInOrder`` the step alone."""
    moves = np.zeros(MOVES, dtype=np.uint8)
    words, constants = moves.view(np.uint16), moves.view(np.int32)
    floats = moves.view(np.float32)
    floats[ONE_AND_NONE // 4] = 1
    constants[OF_CONSTANTS // 4] = LANES // 2
    if kind <= IN_ORDER:
        return moves
    width, bits = np.int64(table[NUMBERS]), np.int64(table[NUMBERS + 1])
    for i in range(LANES):
        first = i * width
        moves[2 * i], moves[2 * i + 1] = first // 8, first // 8 + 1
        words[OF_POWERS // 2 + i] = 1 << (16 - bits - first % 8)
    constants[OF_CONSTANTS // 4] = LANES * width // 8
    for i in range(1, 6):
        constants[OF_CONSTANTS // 4 + i] = np.int32(table[NUMBERS + 1 + i])
    for i in range(6, 8):
        floats[OF_CONSTANTS // 4 + i] = table[NUMBERS + 1 + i]
    return moves


@njit(nogil=True, cache=True)
def _in_whole_vectors(width: Any, inner: Any, kind: Any, table: Any, step: Any) -> Any:  # pragma: no cover - compiled
    """How many codes of rows of so many bytes may be read by vectors from where they lie."""
    vectors = inner // LANES
    if kind > IN_ORDER:
        vectors = min(vectors, (width - 16) // step + 1) if width >= 16 else 0
    return vectors * LANES


@njit(nogil=True, cache=True)
def width_of(kind: Any, table: Any) -> Any:  # pragma: no cover - compiled
    """Bits from one code to the next."""
    return 8 if kind == BYTES else 4 if kind <= IN_ORDER else np.int64(table[NUMBERS])


@njit(nogil=True, cache=True)
def _rest_of(
    w: Any, inner: Any, kind: Any, table: Any, step: Any, whole: Any, rest: Any
) -> None:  # pragma: no cover - compiled
    """Copies of what rows have from code ``whole`` on; after that, and in place of what pads its last byte, zeros."""
    width = width_of(kind, table)
    first, stop, left = whole // LANES * step, (inner * width + 7) // 8, inner * width % 8
    rest[:] = 0
    for n in range(w.shape[0]):
        for i in range(first, stop):
            rest[n, i - first] = w[n, i]
        if left and stop > first:
            rest[n, stop - 1 - first] &= (1 << left) - 1


@njit(nogil=True, cache=True)
def _in_order(
    row: Any, rest: Any, whole: Any, kind: Any, table: Any, moves: Any, step: Any, scale: Any, zero: Any, size: Any,
    first: Any, last: Any, each: Any, out: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Values of codes ``first``, which begins a vector, to ``last`` - 1, and more where those end within a vector.

    All are numbers and addresses, for arrays cost what counts who uses them, in both of the callers' loops: numba frees
    an array after its last use, and knows of none by address. ``rest`` has the codes from ``whole`` on, and ``each``
    room for twice so many floats and a vector more.
    """
    fits, k = size % LANES == 0, first
    while k < last:
        codes, end = row + k // LANES * step, min(last, whole)
        if k >= whole:
            codes, end = rest + (k - whole) // LANES * step, last
        g, groups = k // size, 1
        s, z = moves + ONE_AND_NONE, moves + ONE_AND_NONE + 4
        if fits:
            if k == g * size:
                groups = max((end - k) // size, 1)
            end = min((g + groups) * size, end)
            s, z = scale + 4 * g, zero + 4 * g
        steps, there = (end - k + LANES - 1) // LANES // groups, out + 4 * (k - first)
        if kind == IN_ORDER:
            _decode_halves_in_order(codes, codes + AHEAD, s, z, table, moves, groups, steps, there)
        elif kind == INTEGERS:
            _decode_integers(codes, codes + AHEAD, s, z, table, moves, groups, steps, there)
        elif kind == MOVED:
            _decode_moved(codes, codes + AHEAD, s, z, table, moves, groups, steps, there)
        elif kind == MOVED_WIDE:
            _decode_moved_wide(codes, codes + AHEAD, s, z, table, moves, groups, steps, there)
        else:
            _decode_looked_up(codes, codes + AHEAD, s, z, table, moves, groups, steps, there)
        k = end
    if fits or first == last:
        return
    count = last - first
    zeros = each + 4 * (count + LANES)
    _spread(scale, size, first, last, each)
    _spread(zero, size, first, last, zeros)
    _scale_each(out, count, each, zeros)


@njit(nogil=True, cache=True)
def _add_in_order(
    w: Any, x: Any, inner: Any, kind: Any, table: Any, moves: Any, scale: Any, zero: Any, size: Any, sums: Any,
    rows: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """``_add_tiles`` of kinds whose codes meet x in order; scales and zero points are arrays, of one row or of all.

    One row of x meets values in registers, where groups are whole vectors. More rows meet them in the first cache,
    where a tile's are decoded for all rows of x, or in the second, which holds those of a strip.
    """
    here, one = w.shape[0], rows == 1
    rest = np.empty((here, BYTES_OF_REST), dtype=np.uint8)
    step, of_moves, a = np.int64(moves.view(np.int32)[OF_CONSTANTS // 4]), moves.ctypes.data, table.ctypes.data
    whole = _in_whole_vectors(w.shape[1], inner, kind, table, step)
    if whole < inner:
        _rest_of(w, inner, kind, table, step, whole, rest)
    start, by, at, out = w.ctypes.data, w.strides[0], x.strides[0], sums.ctypes.data
    s_stride = scale.strides[0] if scale.shape[0] > 1 else 0
    z_stride = zero.strides[0] if zero.shape[0] > 1 else 0
    sums[:] = 0
    k = 0
    while k < whole and one and size % LANES == 0:
        g = k // size
        groups, end = min(DEPTH_OF_ONE, whole - k) // size, 0
        if k == g * size and groups > 0:
            end = k + groups * size
        else:
            groups, end = 1, min(min(k + DEPTH_OF_ONE, (g + 1) * size), whole)
        steps, entries = (end - k) // LANES // groups, x.ctypes.data + 4 * k
        for n in range(0, here, HEIGHT_OF_ONE):
            codes, o = start + n * by + k // LANES * step, out + n * sums.strides[1]
            s, z = scale.ctypes.data + n * s_stride + 4 * g, zero.ctypes.data + n * z_stride + 4 * g
            told = (
                1,
                codes,
                by,
                here - n,
                codes + AHEAD,
                entries,
                0,
                s,
                s_stride,
                z,
                z_stride,
                a,
                of_moves,
                groups,
                steps,
                o,
            )
            if kind == IN_ORDER:
                _halves_in_order_of_one_row(*told)
            elif kind == INTEGERS:
                _integers_of_one_row(*told)
            elif kind == MOVED:
                _moved_of_one_row(*told)
            elif kind == MOVED_WIDE:
                _moved_wide_of_one_row(*told)
            else:
                _looked_up_of_one_row(*told)
        k = end
    at_once, depth = (STRIP, DEPTH_OF_MANY) if rows >= MANY_ROWS else (HEIGHTS[min(rows, ROWS)], DEPTH)
    values = on_lines(at_once if k < inner else 0, depth, np.float32)
    each = np.empty((2, 0 if size % LANES == 0 else depth + LANES), dtype=np.float32)
    while k < inner:
        last = min(k + depth, inner)
        steps, entries = (last - k + LANES - 1) // LANES, x.ctypes.data + 4 * k
        for first in range(0, here, at_once):
            there = min(at_once, here - first)
            for r in range(there):
                n = first + r
                _in_order(
                    start + n * by, rest.ctypes.data + n * BYTES_OF_REST, whole, kind, a, of_moves, step,
                    scale.ctypes.data + n * s_stride, zero.ctypes.data + n * z_stride, size, k, last,
                    each.ctypes.data, values.ctypes.data + r * values.strides[0],
                )  # fmt: skip
                values[r, last - k : steps * LANES] = 0  # whatever codes of zeros stand for
            m = 0
            while m < rows:
                tile = min(rows - m, ROWS)
                for r in range(0, there, HEIGHTS[tile]):
                    codes, by_values = values.ctypes.data + r * values.strides[0], values.strides[0]
                    o, x_of_tile = out + m * sums.strides[0] + (first + r) * tile * 4 * LANES, entries + m * at
                    _floats_of_rows(
                        tile, codes, by_values, there - r, codes, x_of_tile, at, of_moves, 0, of_moves, 0, a, 0, 1,
                        steps, o,
                    )  # fmt: skip
                m += tile
        k = last


_add_in_order_apart = apart(
    _add_in_order,
    f"void({_STRIP}, int64, int64, float32[::1], uint8[::1], float32[:,::1], float32[:,::1], int64, {_SUMS}, int64)",
)


_WITHOUT_SIGN, _INFINITE = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
"""Bits of a float32."""


@njit(nogil=True, cache=True)
def _have_infinity(numbers: Any) -> Any:  # pragma: no cover - compiled
    """Whether rows of floats have an infinity: dequantizing clips those that codes stand for."""
    patterns = numbers.view(np.uint32)
    for n in range(numbers.shape[0]):
        found, row = np.uint32(0), patterns[n]
        for k in range(row.shape[0]):
            found |= np.uint32((row[k] & _WITHOUT_SIGN) == _INFINITE)
        if found:
            return True
    return False


@njit(nogil=True, cache=True)
def has_infinity(table: Any) -> Any:  # pragma: no cover - compiled
    """The same of a table, of one axis or of two."""
    if table.ndim == 2:
        return _have_infinity(table)
    return np.isinf(table).any()


@njit(nogil=True, cache=True)
def _are_finite(numbers: Any) -> Any:  # pragma: no cover - compiled
    """Whether all of some rows are: an infinity may have met 0, or another one, and be NaN."""
    patterns = numbers.view(np.uint32)
    for n in range(numbers.shape[0]):
        most, row = np.uint32(0), patterns[n]
        for k in range(row.shape[0]):
            most = max(most, row[k] & _WITHOUT_SIGN)
        if most >= _INFINITE:
            return False
    return True


@njit(nogil=True, cache=True)
def multiply(
    w: Any, x: Any, inner: Any, kind: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any, of_scales: Any,
    zero: Any, size: Any, bias: Any, first_row: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``y[m, n] = sum_k (number[n, k] - zero[n, g]) * scale[n, g] x[m, k] + bias[n]``; whether that holds.

    ``x`` is arranged; ``inner`` is K. ``table`` has the numbers of codes, but for those of 8 bits. Scales are numbers,
    or codes of numbers that ``of_scales`` lists; zero points, where there are any, are integers. ``size`` is the length
    of a group, of ``BYTES`` and ``HALVES`` a whole number of vectors, and may be longer than K. ``y`` is (M, N of w);
    ``first_row`` is the row of scales, zero points and bias that w begins with. The answer is False where a value might
    be beyond float32, which dequantizing would clip, and where a scale is NaN or, not being kept as a code, 0; or where
    codes may stand for infinities, and the result is not finite.
    """
    rows, columns, halves = y.shape[0], w.shape[0], kind == HALVES
    one, coded, shifted = rows == 1, of_scales.shape[0] > 0, zero.shape[0] > 0
    groups_of_row = (inner + size - 1) // size
    at_once = min(rows, ROWS_AT_ONCE)
    sums = on_lines(at_once, STRIP * LANES, np.float32).reshape(at_once, STRIP, LANES)
    scales = np.empty((STRIP if coded else 0, groups_of_row), dtype=np.float32)
    zeros = np.zeros((STRIP if shifted else 1, groups_of_row), dtype=np.float32)
    z_stride = zeros.strides[0] if shifted else 0
    s_stride = scales.strides[0] if coded else (scale.strides[0] if scale.shape[0] > 1 else 0)
    head = parts_of(inner, halves)[0] // 4
    fixed = one and kind <= HALVES and x.view(np.int32)[0, head] != 0
    moves = np.empty(0, dtype=np.uint8)
    if table.ndim == 2:
        moves = _moves_of(kind, table[0])
    unserved = np.int64(x.view(np.int32)[0, head + 1]) if fixed else 0
    lowest = np.int64(table.min()) if fixed and halves else 0
    less, doubling = np.uint32(0 if coded else 1), doubling_of(of_scales)
    most = np.uint32(0)
    for first in range(0, columns, STRIP):
        stop = min(first + STRIP, columns)
        here, start, codes = stop - first, first_row + first, w[first:stop]
        if coded:
            several = codes_of_scales.shape[0] > 1
            looked_up(codes_of_scales[start:] if several else codes_of_scales, of_scales, doubling, scales[:here])
        numbers = scales[:here] if coded else scale[start : start + here] if scale.shape[0] > 1 else scale
        points = zero[start : start + here] if zero.shape[0] > 1 else zero
        s_start, in_dots = numbers.ctypes.data, fixed and (not shifted or _are_codes(points, lowest))
        dots = in_dots
        if table.ndim == 1:  # by itself, as numba asks for: what does not hold is not compiled  # noqa: SIM102
            if in_dots:
                of_points = np.int64(points.ctypes.data) if shifted else np.int64(0)
                by_points = points.strides[0] if points.shape[0] > 1 else 0
                near = _add_in_dots_apart((
                    codes, x, inner, halves, flip, table, s_start, s_stride, of_points, by_points, lowest, size, sums
                ))  # fmt: skip
                dots = near or _are_near_one(numbers.view(np.uint32), less)
        if not (in_dots and dots):
            most = max(most, largest(numbers.view(np.uint32), np.uint32(1 << 31), less))
        if shifted and (unserved > 0 or not dots) and not as_floats(points, np.int32(flip), zeros[:here]):
            return False
        if table.ndim == 1:  # noqa: SIM102
            if dots and unserved > 0:
                _add_unserved_apart((
                    codes, x, inner, halves, flip, table, s_start, s_stride, zeros.ctypes.data, z_stride, size, sums
                ))  # fmt: skip
        for at_first in range(0, rows, ROWS_AT_ONCE):
            m, last = at_first, min(at_first + ROWS_AT_ONCE, rows)
            if table.ndim == 2:
                _add_in_order_apart((codes, x[m:], inner, kind, table[0], moves, numbers, zeros, size, sums, last - m))
            if table.ndim == 1:  # noqa: SIM102
                if not dots:
                    _add_tiles_apart((
                        codes, x[m:], inner, halves, flip, table, s_start, s_stride, zeros.ctypes.data, z_stride,
                        size, sums, last - m,
                    ))  # fmt: skip
            while m < last:
                tile = min(last - m, ROWS)
                for i in range(tile):
                    for n in range(here):
                        nth = sums.ctypes.data + ((m - at_first) * STRIP + n * tile + i) * 4 * LANES
                        y[m + i, first + n] = _sum_of_lanes(nth) + bias[start + n]
                m += tile
    return most < LARGE and not (has_infinity(table) and not _are_finite(y))


multiply_apart = apart(
    multiply,
    *(
        f"boolean({_STRIP}, int64, int64, int64, float32[{table}], float32[:,::1], uint8[:,::1], float32[::1], "
        "int32[:,::1], int64, float32[::1], int64, float32[:,:])"
        for table in ("::1", ":,::1")
    ),
)


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    w, x, inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, bias, served, y = given
    if not multiply_apart((
        w[start:stop], x, inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, bias, start,
        y[:, start:stop],
    )):  # fmt: skip
        served[0] = False


_task = task_of(_part)


@njit(nogil=True, cache=True)
def multiply_in_parts(
    pool: Any, ends: Any, w: Any, x: Any, inner: Any, kind: Any, flip: Any, table: Any, scale: Any,
    codes_of_scales: Any, of_scales: Any, zero: Any, size: Any, bias: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``multiply`` for rows of the weight from each of ``ends`` to the next, on the threads of a pool."""
    served = np.ones(1, dtype=np.bool_)
    given = (
        w, x, inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, bias, served, y
    )  # fmt: skip
    in_parts(pool, ends, _task(given))
    return served[0]


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
    w: Any, inner: Any, kind: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any, of_scales: Any,
    zero: Any, size: Any, first_row: Any, out: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``out[n, k] = (number[n, k] - zero[n, g]) * scale[n, g]``, operands and answer as for ``multiply``.

    Groups may have any size here.
    """
    coded, shifted, several, halves = of_scales.shape[0] > 0, zero.shape[0] > 0, zero.shape[0] > 1, kind == HALVES
    kept = codes_of_scales if coded else scale.view(np.uint8)
    groups = (inner + size - 1) // size
    numbers, zeros = np.empty((1, groups), dtype=np.float32), np.zeros((1, groups), dtype=np.float32)
    a = table.ctypes.data
    whole, most = inner // size if size % LANES == 0 else 0, np.uint32(0)
    doubling, moves = doubling_of(of_scales), np.empty(0, dtype=np.uint8)
    rest = np.empty((1, BYTES_OF_REST if table.ndim == 2 else 0), dtype=np.uint8)
    each = np.empty((2, inner + LANES if table.ndim == 2 and size % LANES != 0 else 0), dtype=np.float32)
    last = np.empty(LANES, dtype=np.float32)
    step, from_here, full = 0, 0, inner - inner % LANES
    if table.ndim == 2:
        moves = _moves_of(kind, table[0])
        step = np.int64(moves.view(np.int32)[OF_CONSTANTS // 4])
        from_here = _in_whole_vectors(w.shape[1], inner, kind, table[0], step)
    for n in range(w.shape[0]):
        row = first_row + n if kept.shape[0] > 1 else 0
        if coded:
            looked_up(codes_of_scales[row : row + 1], of_scales, doubling, numbers)
        else:
            numbers[0] = scale[row]
        most = max(most, largest(numbers.view(np.uint32), np.uint32(1 << 31), np.uint32(0 if coded else 1)))
        if shifted and not as_floats(zero[first_row + n if several else 0 :], np.int32(flip), zeros):
            return False
        start, s, z, o = w[n].ctypes.data, numbers.ctypes.data, zeros.ctypes.data, out[n].ctypes.data
        if table.ndim == 2:
            told = start, rest.ctypes.data, from_here, kind, a, moves.ctypes.data, step, s, z, size
            if from_here < inner:
                _rest_of(w[n : n + 1], inner, kind, table[0], step, from_here, rest)
            _in_order(*told, 0, full, each.ctypes.data, o)
            if full < inner:
                _in_order(*told, full, inner, each.ctypes.data, last.ctypes.data)
                for k in range(full, inner):
                    out[n, k] = last[k - full]
        if table.ndim == 1:
            g = 0
            while g < groups:
                k, together = g * size, max(whole - g, 1)  # all groups that are whole vectors at once, others alone
                end = min(k + together * size, inner)
                steps = 0 if halves and k % 2 else (end - k) // together // LANES
                at, there, s_g, z_g = start + (k // 2 if halves else k), o + 4 * k, s + 4 * g, z + 4 * g
                if steps > 0 and halves:
                    _decode_halves_in_order(at, at, s_g, z_g, a, flip, together, steps, there)
                elif steps > 0:
                    _decode_bytes(at, at, s_g, z_g, a, flip, together, steps, there)
                k += together * steps * LANES
                if k < end:
                    _one_by_one(w[n], k, end, halves, flip, table, numbers[0, g], zeros[0, g], out[n])
                g += together
    return most < LARGE and not (has_infinity(table) and _have_infinity(out))


_OF_VALUES = tuple(
    f"boolean(uint8[:,::1], int64, int64, int64, float32[{table}], float32[:,::1], uint8[:,::1], float32[::1], "
    "int32[:,::1], int64, int64, float32[:,::1])"
    for table in ("::1", ":,::1")
)
"""Types of what makes values, for tables of one axis and of two."""

dequantize_apart = apart(dequantize, *_OF_VALUES)


@njit(nogil=True, cache=True)
def dequantize_columns(
    w: Any, inner: Any, kind: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any, of_scales: Any,
    zero: Any, size: Any, first_row: Any, out: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """The same where ``size`` codes of a column share a scale: scales and zero points have as many columns as w."""
    coded, shifted = of_scales.shape[0] > 0, zero.shape[0] > 0
    nothing, no_codes, no_zeros = np.empty(0, np.float32), np.empty((0, 0), np.uint8), np.empty((0, 0), np.int32)
    one, vectors = np.ones((1, 1), np.float32), (inner + 2 * LANES - 1) // (2 * LANES)
    if not dequantize_apart((
        w, inner, kind, flip, table, one, no_codes, nothing, no_zeros, 2 * LANES * vectors, 0, out
    )):  # fmt: skip
        return False
    numbers, zeros = np.empty((1, inner), dtype=np.float32), np.zeros((1, inner), dtype=np.float32)
    doubling, most, group, full = doubling_of(of_scales), np.uint32(0), -1, inner - inner % LANES
    for n in range(w.shape[0]):
        if (first_row + n) // size != group:
            group = (first_row + n) // size
            if coded:
                looked_up(codes_of_scales[group : group + 1], of_scales, doubling, numbers)
            else:
                numbers[0] = scale[group]
            most = max(most, largest(numbers.view(np.uint32), np.uint32(1 << 31), np.uint32(0 if coded else 1)))
            if shifted and not as_floats(zero[group : group + 1], np.int32(flip), zeros):
                return False
        if full > 0:
            _scale_each(out[n].ctypes.data, full, numbers.ctypes.data, zeros.ctypes.data)
        for k in range(full, inner):
            out[n, k] = (out[n, k] - zeros[0, k]) * numbers[0, k]
    return most < LARGE and not (has_infinity(table) and _have_infinity(out))


dequantize_columns_apart = apart(dequantize_columns, *_OF_VALUES)


@njit(nogil=True)
def _part_of_values(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    w, inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, by_columns, served, out = given
    told = (
        w[start:stop], inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, start, out[start:stop]
    )  # fmt: skip
    small = dequantize_columns_apart(told) if by_columns else dequantize_apart(told)
    if not small:
        served[0] = False


_task_of_values = task_of(_part_of_values)


@njit(nogil=True, cache=True)
def dequantize_in_parts(
    pool: Any, ends: Any, w: Any, inner: Any, kind: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any,
    of_scales: Any, zero: Any, size: Any, by_columns: Any, out: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``dequantize``, or ``dequantize_columns``, for rows from each of ``ends`` to the next, on a pool's threads."""
    served = np.ones(1, dtype=np.bool_)
    given = w, inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, by_columns, served, out
    in_parts(pool, ends, _task_of_values(given))
    return served[0]
