"""Exact products with int8 weights, by the processor's dot products of bytes.

Owns: what the instruction sets call a dot product, the layout of the operands that it wants, the loops around it, and
around those the product of floats in fixed point. One file but for the words of ``emit``, because what numba caches of
a function is renewed when its own file changes, and not when another does: what the contract's constants are is written
here once more. The loops hold no lock and start no thread. ``integers``, ``fixed_point`` and JAX's ``dots`` call them,
and have other forms with the same results for processors without any of the instructions (``AVAILABLE``).

A dot product adds, in each int32 lane of a vector, four products of an unsigned with a signed byte. The weight is the
signed operand, as it lies in memory. An activation ``X`` of ``8 D`` bits becomes ``U = X + 2^(8D-1)``, which is not
negative, and whose ``D`` bytes are ``D`` unsigned *planes*:

    sum X q  =  sum_d 256^d (sum U_d q)  -  2^(8D-1) sum q

Each inner sum is at most ``K * 255 * 128``, which int32 holds for the ``K <= 2^16`` that callers keep to. So every
digit's sum is exact in any order, and the total is an exact int64. Where the instruction takes two signed bytes, planes
are ``U_d - 128``, and 128 of every digit's ``sum q`` is missing as well (``offsets``).

Where it takes shorts (AVX2: two products a lane), digits are signed and have 16 bits, so that an activation has two:
``X = 2^16 X_1 + X_0``, where ``X_0`` is its lower half as a signed number and ``X_1`` carries what that lacks. No sum
of codes is needed. ``X_1`` is a short up to ``LARGEST``, which fixed point keeps below. Codes are widened to shorts. A
lane's product is at most ``2 * 2^15 * 2^7 = 2^23``, so int32 holds 255 of them; after at most so many *runs* end, and
sums go to int64.

Two shapes of the loop, both with as many accumulators as registers allow, so that the instruction's latency hides:

- **one row of x**: lanes run along K. Rows of the weight meet four planes, and a plane of ones for ``sum q``. Sums
  across lanes cost little at one row, and each vector of the weight is loaded once.
- **several rows**: lanes are planes (of C L / D rows of x, L lanes in each of C vectors, packed once), and four codes
  of a weight's row are broadcast to all of them. No sum across lanes is needed, and the weight is read from memory once
  for all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from aqt_lite.backends.cpu.emit import FIRST_CACHE, counted_loop, function, in_all_lanes, load, read_ahead
from aqt_lite.backends.cpu.lines import LINE, on_lines
from aqt_lite.backends.cpu.native import apart, check_c_order, task_of
from aqt_lite.backends.cpu.pool import in_parts

__all__ = [
    "ANY_FLAG",
    "AVAILABLE",
    "AVX2",
    "AVX512_VNNI",
    "AVX_VNNI",
    "CODES",
    "DIGITS",
    "FASTER_THAN_FLOATS",
    "HEIGHT_FOR_ONE_ROW",
    "INSTRUCTIONS",
    "LARGEST",
    "NEON",
    "NOT_FINITE",
    "OUT_OF_RANGE",
    "ROWS_AT_ONCE",
    "SECOND_PASS",
    "STRIP",
    "copy_tile",
    "dots_across_planes",
    "dots_along_k",
    "finish_columns",
    "finish_columns_apart",
    "finish_in_parts",
    "from_fixed_point",
    "multiply_one_row",
    "multiply_rows",
    "pack_one_row",
    "pack_rows",
    "prepare_rows_apart",
    "refine_rows_apart",
    "parts_of_rows",
    "prepare_rows",
    "refine_rows",
    "shape_of_panels",
    "to_finer",
    "to_fixed_point",
]


_BYTE, _SHORT, _INT, _ADDRESS = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)


class InstructionSet(NamedTuple):
    """What a processor calls a dot product, and the loops that fit its registers."""

    lanes: int
    """Sums of a vector; a vector has four times as many bytes."""
    dot: Callable[[Any, Any, Any, Any], Any]
    """``dot(builder, total, planes, codes)``, vectors of int32 all of them."""
    height_of_one_row: int
    """Rows of the weight that meet the planes of one row of x at a time."""
    heights: tuple[int, int, int]
    """The same for one, two and four vectors of panels: divisors of ``STRIP``, and at most ``_AT_ONCE``."""

    faster_than_floats: bool = True
    """Whether all digits take less time than one product of floats, its codes turned to floats in registers."""
    signed_planes: bool = False
    """Whether planes of bytes are signed, 128 less."""
    bits: int = 8
    """Of a digit, and of a code as it meets one: 8, or 16, and then digits are signed."""
    run: int = 0
    """Steps after which sums go to int64, lest they overflow; 0 where they have no need to."""

    @property
    def vector(self) -> Any:
        """The type of its vectors."""
        return ir.VectorType(_INT, self.lanes)

    @property
    def codes(self) -> int:
        """Codes that meet a lane at a time."""
        return 32 // self.bits

    @property
    def digits(self) -> int:
        """Of an int32."""
        return 32 // self.bits

    @property
    def offsets(self) -> tuple[int, ...]:
        """What is taken off of ``sum q`` times as much, for integers of 1 to all ``digits``."""
        if self.bits == 16:
            return (0, 0)
        of_planes = [self.signed_planes and 128 * ((1 << (8 * d)) - 1) // 255 for d in range(1, 5)]
        return tuple((1 << (8 * d - 1)) - less for d, less in enumerate(of_planes, 1))

    @property
    def carries(self) -> tuple[np.uint32, ...]:
        """What is added to integers of 1 to all ``digits``, before bits of theirs are turned over (``flips``)."""
        return (np.uint32(0), np.uint32(1 << 15)) if self.bits == 16 else (np.uint32(0),) * 4

    @property
    def flips(self) -> tuple[np.uint32, ...]:
        """What turns the bits of integers of 1 to all ``digits`` to those of their planes."""
        if self.bits == 16:  # the carry is in the upper digit then, and the lower one what it was
            return self.carries
        signs = [self.signed_planes and 0x80808080 >> (32 - 8 * d) for d in range(1, 5)]
        return tuple(np.uint32((1 << (8 * d - 1)) ^ sign) for d, sign in enumerate(signs, 1))


def _by_one_instruction(name: str, lanes: int) -> Callable[[Any, Any, Any, Any], Any]:
    vector = ir.VectorType(_INT, lanes)

    def dot(builder: Any, total: Any, planes: Any, codes: Any) -> Any:
        return builder.call(function(builder, name, vector, [vector] * 3), [total, planes, codes])

    return dot


def _by_pairs_of_shorts(builder: Any, total: Any, planes: Any, codes: Any) -> Any:
    """``vpmaddwd`` adds two products of 16 bits to 32, exactly."""
    vector, shorts = ir.VectorType(_INT, 8), ir.VectorType(_SHORT, 16)
    multiply = function(builder, "llvm.x86.avx2.pmadd.wd", vector, [shorts] * 2)
    pairs = [builder.bitcast(operand, shorts) for operand in (planes, codes)]
    return builder.add(total, builder.call(multiply, pairs))


def _by_signed_bytes(builder: Any, total: Any, planes: Any, codes: Any) -> Any:
    """``sdot``."""
    vector, bytes_ = ir.VectorType(_INT, 4), ir.VectorType(_BYTE, 16)
    dot = function(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", vector, [vector, bytes_, bytes_])
    return builder.call(dot, [total, builder.bitcast(planes, bytes_), builder.bitcast(codes, bytes_)])


# Every sum has a register of its own, so that the instruction's latency hides; a vector of codes and those of x have
# the others, of 32 (AVX-512, Arm) or 16.
AVX512_VNNI = InstructionSet(16, _by_one_instruction("llvm.x86.avx512.vpdpbusd.512", 16), 5, (8, 8, 6))
AVX_VNNI = InstructionSet(8, _by_one_instruction("llvm.x86.avx512.vpdpbusd.256", 8), 2, (8, 6, 2))
AVX2 = InstructionSet(8, _by_pairs_of_shorts, 4, (8, 6, 2), bits=16, run=224, faster_than_floats=False)
NEON = InstructionSet(4, _by_signed_bytes, 5, (8, 8, 6), signed_planes=True)


def _instruction_set(features: set[str]) -> InstructionSet | None:
    """The best that a processor with these features has, as LLVM names them."""
    if features >= {"+avx512f", "+avx512bw", "+avx512vl", "+avx512vnni"} and "+prefer-256-bit" not in features:
        return AVX512_VNNI
    if "+avx2" in features:
        return AVX_VNNI if "+avxvnni" in features or features >= {"+avx512vl", "+avx512vnni"} else AVX2
    return NEON if features >= {"+neon", "+dotprod"} else None


# Of the processor that numba compiles for; NUMBA_CPU_FEATURES may say another.
_HAS = _instruction_set(set(str(cpu_target.target_context.codegen().magic_tuple()[-1]).split(",")))

AVAILABLE = _HAS is not None
INSTRUCTIONS = _HAS or AVX512_VNNI
"""Those of the processor; where it has none, the loops around them are never compiled."""
FASTER_THAN_FLOATS = INSTRUCTIONS.faster_than_floats
HEIGHT_FOR_ONE_ROW = INSTRUCTIONS.height_of_one_row

DIGITS = INSTRUCTIONS.digits
"""Of an int32."""

CODES = INSTRUCTIONS.codes
"""Codes of a row of x whose digits share an element of a panel."""

LARGEST = 2**31 - 1 - int(INSTRUCTIONS.carries[-1])
"""The largest integer that has so many digits."""

_LANES, _BITS, _RUN = INSTRUCTIONS.lanes, INSTRUCTIONS.bits, INSTRUCTIONS.run
_AT_A_TIME = _LANES * CODES
_OFFSETS, _CARRIES, _FLIPS = INSTRUCTIONS.offsets, INSTRUCTIONS.carries, INSTRUCTIONS.flips
_DIGIT, _SUM = np.uint16 if _BITS == 16 else np.uint8, np.int64 if _RUN else np.int32
_CODE = np.int16 if _BITS == 16 else np.int8
_ONE_DIGIT = np.uint32((1 << _BITS) - 1)

STRIP = 96
"""Rows of the weight whose sums are kept until K is done: whole tiles."""

MOST_OF_TILE = max(INSTRUCTIONS.heights)
"""Rows of the weight in a tile."""

DEPTH = CODES * _RUN or 2048
"""Codes of a row that meet one panel of x before the next: such a panel (128 KB) and a strip's copy fit L2."""

DEPTH_OF_ONE_PANEL = 1024
"""The same where there is no other panel: a tile's copy (8 KB) stays in the first cache."""

DEPTH_OF_ONE_ROW = _AT_A_TIME * _RUN
"""The same of one row of x: where runs end; 0 where they have no need to."""


def _rows_of_tile(builder: Any, w: Any, stride: Any, rows: Any, height: int) -> list[Any]:
    """Addresses of ``height`` rows from ``w`` on; after the last of ``rows`` that one again, sums that go unread."""
    last = builder.sub(rows, _ADDRESS(1))
    indices = [_ADDRESS(r) for r in range(height)]
    inside = [builder.select(builder.icmp_signed("<", r, last), r, last) for r in indices]
    return [builder.add(w, builder.mul(r, stride)) for r in inside]


def _codes_at(builder: Any, address: Any, its: InstructionSet, flips: Any = None) -> Any:
    """A vector of codes from there on, as they meet digits; ``flips`` turns over bits of each, and is one of bytes."""
    codes = load(builder, address, ir.VectorType(_BYTE, its.lanes * its.codes))
    if flips is not None:
        codes = builder.xor(codes, flips)
    if its.bits == 16:
        codes = builder.sext(codes, ir.VectorType(_SHORT, its.lanes * its.codes))
    return builder.bitcast(codes, its.vector)


def _widened(builder: Any, total: Any, its: InstructionSet) -> Any:
    """Sums as int64 where they are those of a run."""
    return builder.sext(total, ir.VectorType(_ADDRESS, its.lanes)) if its.run else total


def dots_along_k(builder: Any, arguments: Any, its: InstructionSet, height: int, planes: int) -> None:
    """``out[r, c] = sum_k plane[c, k] w[r, k]`` over ``steps`` vectors of codes; the planes lie one after the other.

    Arguments are the address of w, the distance of its rows, how many there are, the address of the planes, the length
    of each, the steps, and the address of out.
    """
    w, stride, rows, plane, length, steps, out = arguments
    sum_of = ir.VectorType(_ADDRESS if its.run else _INT, its.lanes)
    name = f"llvm.vector.reduce.add.v{its.lanes}{sum_of.element}"
    reduce = function(builder, name, sum_of.element, [sum_of])
    starts = _rows_of_tile(builder, w, stride, rows, height)
    lines = [builder.add(plane, builder.mul(length, _ADDRESS(c))) for c in range(planes)]

    def step(i: Any, totals: list[Any]) -> list[Any]:
        at = builder.mul(i, _ADDRESS(4 * its.lanes))
        x = [load(builder, builder.add(line, at), its.vector) for line in lines]
        of_codes = builder.mul(i, _ADDRESS(its.codes * its.lanes))
        codes = [_codes_at(builder, builder.add(start, of_codes), its) for start in starts]
        pairs = [(u, q) for q in codes for u in x]
        return [its.dot(builder, t, u, q) for t, (u, q) in zip(totals, pairs, strict=True)]

    zeros = [its.vector([0] * its.lanes)] * (height * planes)
    for i, total in enumerate(counted_loop(builder, steps, zeros, step)):
        place = builder.add(out, _ADDRESS(sum_of.element.width // 8 * i))
        found = builder.call(reduce, [_widened(builder, total, its)])
        builder.store(found, builder.inttoptr(place, sum_of.element.as_pointer()))


def copy_tile(builder: Any, arguments: Any, its: InstructionSet, height: int) -> None:
    """``out[r] = w[r]``, ``steps`` vectors of each of ``height`` rows, as they meet digits; ``total[r] += sum w[r]``.

    Rows of the weight are often a power of two apart, and their lines then take turns in few places of a cache; those
    of a copy need not be. Sums of codes are wanted with the instruction that takes unsigned bytes, and else not added.
    Arguments are the address of w, the distance of its rows, how many there are, the byte that codes differ by, bit by
    bit, from signed ones, the steps, the address of out, the distance of its rows, and the address of total.
    """
    w, stride, rows, flip, steps, out, distance, total = arguments
    starts = _rows_of_tile(builder, w, stride, rows, height)
    places = [builder.add(out, builder.mul(distance, _ADDRESS(r))) for r in range(height)]
    flips = in_all_lanes(builder, builder.trunc(flip, _BYTE), ir.VectorType(_BYTE, its.lanes * its.codes))
    ones = its.vector([0x01010101] * its.lanes)

    def step(i: Any, totals: list[Any]) -> list[Any]:
        at, to = (builder.mul(i, _ADDRESS(n * its.lanes)) for n in (its.codes, 4))
        new = list[Any]()
        for r, (start, place) in enumerate(zip(starts, places, strict=True)):
            codes = _codes_at(builder, builder.add(start, at), its, flips)
            builder.store(codes, builder.inttoptr(builder.add(place, to), its.vector.as_pointer()), align=4)
            new += [its.dot(builder, total, ones, codes) for total in totals[r : r + 1]]
        return new

    zeros = [its.vector([0] * its.lanes)] * height if its.offsets[-1] else []
    name = f"llvm.vector.reduce.add.v{its.lanes}i32"
    for r, found in enumerate(counted_loop(builder, steps, zeros, step)):
        place = builder.inttoptr(builder.add(total, _ADDRESS(4 * r)), _INT.as_pointer())
        one = builder.call(function(builder, name, _INT, [its.vector]), [found])
        builder.store(builder.add(builder.load(place, align=4), one), place, align=4)


def dots_across_planes(builder: Any, arguments: Any, its: InstructionSet, height: int, vectors: int) -> None:
    """``out[r, lane] += sum_k panel[k, lane] w[r, k]`` over ``steps`` of a lane's codes, of lanes of ``vectors``.

    Arguments are the address of w, a copy as ``copy_tile`` leaves it, the distance of its rows, the address of the
    panel, the steps, and the address of out; and the address of the tile of the weight that will be copied next, with
    the distance of its rows. That is fetched meanwhile: it would be copied at the speed of memory else, and
    multiplication would wait. Prefetching past the weight's end is harmless.
    """
    w, stride, panel, steps, out, coming, distance = arguments
    size = 4 * its.lanes
    starts = [builder.add(w, builder.mul(stride, _ADDRESS(r))) for r in range(height)]
    sums = ir.VectorType(_ADDRESS if its.run else _INT, its.lanes)
    places = [builder.add(out, _ADDRESS(size * (2 if its.run else 1) * i)) for i in range(height * vectors)]

    def step(i: Any, totals: list[Any]) -> list[Any]:
        lanes = builder.add(panel, builder.mul(i, _ADDRESS(size * vectors)))
        x = [load(builder, builder.add(lanes, _ADDRESS(size * c)), its.vector) for c in range(vectors)]
        at, new = builder.mul(i, _ADDRESS(4)), []
        # a line of 64 bytes holds the codes of 16 steps or 32: in each of them one line of one of 8 rows
        row = builder.add(coming, builder.mul(builder.and_(i, _ADDRESS(7)), distance))
        line = builder.add(row, builder.and_(builder.mul(i, _ADDRESS(its.codes)), _ADDRESS(-64)))
        read_ahead(builder, line, FIRST_CACHE)
        for r, start in enumerate(starts):
            codes = in_all_lanes(builder, load(builder, builder.add(start, at), _INT), its.vector)
            new += [its.dot(builder, totals[r * vectors + c], x[c], codes) for c in range(vectors)]
        return new

    kept = [load(builder, place, sums) for place in places] if not its.run else []
    totals = counted_loop(builder, steps, kept or [its.vector([0] * its.lanes)] * len(places), step)
    if its.run:
        totals = [
            builder.add(load(builder, at, sums), _widened(builder, total, its))
            for at, total in zip(places, totals, strict=True)
        ]
    for place, total in zip(places, totals, strict=True):
        builder.store(total, builder.inttoptr(place, sums.as_pointer()), align=4)


def _along_k(height: int, planes: int) -> Any:
    """``dots_along_k`` for numba."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(_: Any, w: Any, stride: Any, rows: Any, plane: Any, length: Any, steps: Any, out: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            dots_along_k(builder, arguments, INSTRUCTIONS, height, planes)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return tile


def _copier(height: int) -> Any:
    """``copy_tile`` for numba."""

    @intrinsic  # type: ignore[untyped-decorator]
    def copy(_: Any, w: Any, stride: Any, rows: Any, flip: Any, steps: Any, out: Any, distance: Any, total: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            copy_tile(builder, arguments, INSTRUCTIONS, height)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

    return copy


def _across_planes(height: int, vectors: int) -> Any:
    """``dots_across_planes`` for numba."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(_: Any, w: Any, stride: Any, panel: Any, steps: Any, out: Any, coming: Any, distance: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            dots_across_planes(builder, arguments, INSTRUCTIONS, height, vectors)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 7), generate

    return tile


# ---- one row of x

_OFFSET, _CARRIED, _FLIP = _OFFSETS[-1], _CARRIES[-1], _FLIPS[-1]
_PLANES = DIGITS + (1 if _OFFSET else 0)  # those of x, and one of ones
_tile_of_one_row = _along_k(HEIGHT_FOR_ONE_ROW, _PLANES)


@njit(nogil=True, cache=True)
def pack_one_row(x: Any) -> Any:  # pragma: no cover - compiled
    """Planes of one row of int32, whole vectors only, and a plane of ones where sums of codes are wanted."""
    length = x.shape[0] & ~(_AT_A_TIME - 1)
    planes = np.ones((_PLANES, length), dtype=_DIGIT)
    for d in range(DIGITS):
        shift, plane = np.uint32(_BITS * d), planes[d]
        for k in range(length):
            plane[k] = (((np.uint32(x[k]) + _CARRIED) ^ _FLIP) >> shift) & _ONE_DIGIT
    return planes


@njit(nogil=True, cache=True)
def multiply_one_row(w: Any, x: Any, planes: Any, y: Any) -> None:  # pragma: no cover - compiled
    """``y[n] = sum_k w[n, k] x[k]``: int8 rows, codes of each side by side, int32 x and its planes, int64 y."""
    rows, inner = w.shape
    whole = planes.shape[1]
    depth = DEPTH_OF_ONE_ROW if _RUN else max(whole, 1)
    sums = np.zeros((HEIGHT_FOR_ONE_ROW, _PLANES), dtype=_SUM)
    for first in range(0, rows, HEIGHT_FOR_ONE_ROW):
        height = min(HEIGHT_FOR_ONE_ROW, rows - first)
        out = y[first : first + height]
        out[:] = 0
        for k in range(0, whole, depth):
            start, steps = w.ctypes.data + first * w.strides[0] + k, min(depth, whole - k) // _AT_A_TIME
            of_x, by = planes[:, k:].ctypes.data, planes.strides[0]
            _tile_of_one_row(start, w.strides[0], height, of_x, by, steps, sums.ctypes.data)
            for r in range(height):
                for d in range(DIGITS):
                    out[r] += np.int64(sums[r, d]) << (_BITS * d)
                if _OFFSET:
                    out[r] -= np.int64(sums[r, DIGITS]) * _OFFSET
        for r in range(height):
            for k in range(whole, inner):
                out[r] += np.int64(w[first + r, k]) * np.int64(x[k])


_multiply_one_row_apart = apart(
    multiply_one_row, f"void(int8[:,::1], int32[::1], {np.dtype(_DIGIT).name}[:,::1], int64[:])"
)


# ---- several rows of x


def rows_of_a_panel(rows: int, digits: int) -> int:
    """Rows of x that one panel packs: what fills 1, 2 or 4 vectors of lanes with ``digits`` planes a row."""
    return next((_LANES * c // digits for c in (1, 2) if rows <= _LANES * c // digits), 4 * _LANES // digits)


def shape_of_panels(rows: int, inner: int, digits: int) -> tuple[int, int, int]:
    """Shape of the uint32 array that ``pack_rows`` fills; empty where one row of all digits has a loop of its own."""
    height = rows_of_a_panel(rows, digits)
    return (0, 0, 0) if rows == 1 and digits == DIGITS else (-(-rows // height), -(-inner // CODES), digits * height)


def parts_of_rows(rows: int, digits: int) -> list[slice]:
    """The rows of x in one part, or in two where the last panel would be half empty or more."""
    most = 4 * _LANES // digits
    rest = rows % most
    cut = rows - rest if rows > most and 0 < rest <= most // 2 else rows
    return [part for part in (slice(0, cut), slice(cut, rows)) if part.start < part.stop]


@njit(nogil=True, cache=True)
def _pack_row(values: Any, digits: int, height: int, panel: Any, lane: Any) -> None:  # pragma: no cover - compiled
    carry, flip = _CARRIES[digits - 1], _FLIPS[digits - 1]
    for g in range(panel.shape[0]):
        for plane in range(digits):
            shift, word = np.uint32(_BITS * plane), np.uint32(0)
            for i in range(CODES):
                bits = np.uint32(np.uint32(values[CODES * g + i]) + carry) ^ flip
                word |= ((bits >> shift) & _ONE_DIGIT) << np.uint32(_BITS * i)
            panel[g, plane * height + lane] = word


@njit(nogil=True, cache=True)
def pack_rows(x: Any, digits: int, height: int, panels: Any) -> None:  # pragma: no cover - compiled
    """Rows of integers into ``panels`` (panel, K / CODES, digit * height + row): digits of CODES codes in each uint32.

    Beyond the last code there are those of 0. Rows that only fill up the last panel are not written: their sums are not
    read.
    """
    (rows, inner), whole = x.shape, x.shape[1] // CODES
    last = np.zeros(CODES, dtype=x.dtype)
    for m in range(rows):
        panel, lane = panels[m // height], m % height
        _pack_row(x[m], digits, height, panel[:whole], lane)
        for k in range(whole * CODES, inner):
            last[k - whole * CODES] = x[m, k]
        _pack_row(last, digits, height, panel[whole:], lane)


_HEIGHT_1, _HEIGHT_2, _HEIGHT_4 = INSTRUCTIONS.heights
_tile_1, _tile_2, _tile_4 = _across_planes(_HEIGHT_1, 1), _across_planes(_HEIGHT_2, 2), _across_planes(_HEIGHT_4, 4)
_copy_1, _copy_2, _copy_4 = _copier(_HEIGHT_1), _copier(_HEIGHT_2), _copier(_HEIGHT_4)


@njit(nogil=True, cache=True)
def _copy(w: Any, flip: Any, lanes: Any, copy: Any, total: Any) -> None:  # pragma: no cover - compiled
    """Codes of a tile for panels of so many lanes, or of the fewer rows there are; and the sum of each row added.

    What they lack to a lane's codes are zeros.
    """
    rows, length = w.shape
    steps = length // _AT_A_TIME
    whole = steps * _AT_A_TIME
    if whole > 0:
        start, by, out, to = w.ctypes.data, w.strides[0], copy.ctypes.data, copy.strides[0]
        if lanes == 4 * _LANES:
            _copy_4(start, by, rows, flip, steps, out, to, total.ctypes.data)
        elif lanes == 2 * _LANES:
            _copy_2(start, by, rows, flip, steps, out, to, total.ctypes.data)
        else:
            _copy_1(start, by, rows, flip, steps, out, to, total.ctypes.data)
    for r in range(rows if whole < length else 0):
        row, out, rest = w[r], copy[r], np.int32(0)
        for k in range(whole, length):
            code = row[k] ^ np.int8(flip)
            out[k] = code
            rest += code
        for k in range(length, (length + CODES - 1) // CODES * CODES):
            out[k] = 0
        total[r] += rest


@njit(nogil=True, cache=True)
def _join_digits(sums: Any, of_codes: Any, digits: int, height: int, joined: Any) -> None:  # pragma: no cover
    """``joined[n, lane] = sum_d 2^(bits d) sums[n, d * height + lane]``, less what the digits' offset added."""
    for n in range(sums.shape[0]):
        row, out = sums[n], joined[n]
        offset = np.int64(of_codes[n]) * _OFFSETS[digits - 1]
        for lane in range(height):
            out[lane] = row[lane] - offset
        for d in range(1, digits):
            digit = row[d * height : (d + 1) * height]
            for lane in range(height):
                out[lane] += np.int64(digit[lane]) << (_BITS * d)


@njit(nogil=True, cache=True)
def _room_for_copies(panels: Any, inner: Any) -> Any:  # pragma: no cover - compiled
    """Of a tile where there is one panel, else of a strip; as wide as sums go on before another panel comes."""
    several = panels.shape[0] > 1
    depth = DEPTH if several else min(DEPTH, DEPTH_OF_ONE_PANEL)
    return on_lines(STRIP if several else MOST_OF_TILE, min(depth, (inner + LINE - 1) // LINE * LINE) + LINE, _CODE)


@njit(nogil=True, cache=True)
def _room_for_sums(panels: Any) -> Any:  # pragma: no cover - compiled
    return on_lines(panels.shape[0], STRIP * panels.shape[2], _SUM).reshape(panels.shape[0], STRIP, panels.shape[2])


@njit(nogil=True, cache=True)
def sums_of_rows(w: Any, flip: Any, panels: Any, copies: Any, sums: Any, of_codes: Any) -> None:  # pragma: no cover
    """``sums[p, n, lane]`` of panels of x and up to STRIP rows of w, and the sum of each row's codes.

    Bytes of w differ from int8 by those of ``flip``.
    """
    (rows, inner), stride, (of_panels, _, lanes) = w.shape, w.strides[0], panels.shape
    tile = _HEIGHT_4 if lanes == 4 * _LANES else _HEIGHT_2 if lanes == 2 * _LANES else _HEIGHT_1
    depth = copies.shape[1] - LINE
    if of_panels == 1:
        depth = min(depth, DEPTH_OF_ONE_PANEL)
    strip = STRIP if of_panels > 1 else tile  # whose copies are kept for other panels, or of which none is
    sums[:of_panels, :rows] = 0
    of_codes[:rows] = 0
    for first in range(0, rows, strip):
        for k in range(0, inner, depth):
            last = min(k + depth, inner)
            steps = (last - k + CODES - 1) // CODES
            for p in range(of_panels):
                panel = panels[p].ctypes.data + (k // CODES) * lanes * 4
                for n in range(first, min(first + strip, rows), tile):
                    at = n - first
                    if p == 0:
                        _copy(w[n : min(n + tile, rows), k:last], flip, lanes, copies[at:], of_codes[n:])
                    coming = w.ctypes.data + (n * stride + last if last < inner else (n + strip) * stride)
                    copy, by, out = copies[at:].ctypes.data, copies.strides[0], sums[p, n:].ctypes.data
                    if lanes == 4 * _LANES:
                        _tile_4(copy, by, panel, steps, out, coming, stride)
                    elif lanes == 2 * _LANES:
                        _tile_2(copy, by, panel, steps, out, coming, stride)
                    else:
                        _tile_1(copy, by, panel, steps, out, coming, stride)


_names = {dtype: np.dtype(dtype).name for dtype in (_CODE, _SUM)}
_sums_of_rows_apart = apart(
    sums_of_rows,
    f"void(int8[:,::1], int64, uint32[:,:,::1], {_names[_CODE]}[:,::1], {_names[_SUM]}[:,:,::1], int32[::1])",
)


@njit(nogil=True, cache=True)
def multiply_rows(w: Any, panels: Any, digits: int, height: int, y: Any) -> None:  # pragma: no cover - compiled
    """``y[m, n] = sum_k w[n, k] x[m, k]``: int8 w, codes of a row side by side, x as panels, int64 y."""
    if w.shape[1] > 1 and w.strides[1] != 1:
        raise ValueError("codes of a row do not lie side by side")
    copies, sums = _room_for_copies(panels, w.shape[1]), _room_for_sums(panels)
    of_codes, joined = np.empty(STRIP, dtype=np.int32), on_lines(STRIP, height, np.int64)
    for first in range(0, w.shape[0], STRIP):
        stop = min(first + STRIP, w.shape[0])
        _sums_of_rows_apart((w[first:stop], 0, panels, copies, sums, of_codes))
        for p in range(panels.shape[0]):
            _join_digits(sums[p, : stop - first], of_codes, digits, height, joined)
            for m in range(p * height, min(p * height + height, y.shape[0])):
                lane, out = m % height, y[m, first:stop]
                for n in range(stop - first):
                    out[n] = joined[n, lane]


# ---- products of floats: aqt_lite.ops.reference.matmul_reproducible for a contracted axis in one piece. The same steps
# in the same order, hence the same bits, but a strip of the result at a time, so that nothing between x and the result
# goes through memory but the packed rows. A second pass is of the panels that have a row that wants it, and reads a
# strip of the weight while it is in a cache. NumPy's kernel and XLA's call share it.

ROWS_AT_ONCE = 512
"""Rows of x whose sums are in memory at a time: a multiple of every panel's height."""

ROWS_READ_TWICE = 8 * HEIGHT_FOR_ONE_ROW
"""Rows of the weight that meet both passes of one row of x, the second from the second cache."""

NOT_FINITE, SECOND_PASS, OUT_OF_RANGE = 1, 2, 4
"""Flags of a row of x, as bits: has a value that is not finite (its integers are 0, its results NaN); wants a second
pass for what was rounded away; has entries that are subnormal or more than 2^37 below its largest."""

ANY_FLAG = NOT_FINITE | SECOND_PASS | OUT_OF_RANGE

# Those of aqt_lite.ops.reference, as the loops' types; the tests hold them against it.
SMALLEST = np.float32(2.0**-126)
SMALL = np.float32(2.0**18)
MANY = 16
FINEST = np.float32(2.0**-37)
MOST_FRACTION = np.int32(0x7E0000)  # of 127/64: its bits below the exponent's
BITS = 30
FINER, ONE_FINER = np.float32(2.0**31), np.float32(2.0**-31)
LOW_BITS, CARRY = 24, np.float32(2.0**24)
LEAST_POWER = -100
"""Of two, as ``Backend.power_of_two``: below, there is 0."""


@njit(nogil=True, cache=True)
def to_fixed_point(
    x: Any, powers: Any, integers: Any, exponent: Any, total: Any, flags: Any
) -> None:  # pragma: no cover
    """Rows of float32 as integers ``rint(x * 2^(30 - exponent))``, their sums and flags.

    ``powers[i]`` is 2^(i - 256), 0 far below.
    """
    bits = x.view(np.int32)
    for m in range(x.shape[0]):
        most, least = np.int32(0), np.int32(0x7FFFFFFF)
        pattern = bits[m]
        for k in range(pattern.shape[0]):
            magnitude = pattern[k] & np.int32(0x7FFFFFFF)
            most = max(most, magnitude)
            least = min(least, magnitude if magnitude > 0 else np.int32(0x7FFFFFFF))
        if most >= np.int32(0x7F800000):
            flags[m], exponent[m], total[m] = NOT_FINITE, 0, 0
            integers[m, :] = 0
            continue
        if most < np.int32(0x00800000):  # nothing but subnormal numbers and zeros, which count as zeros
            flags[m], exponent[m], total[m] = 0 if most == 0 else OUT_OF_RANGE, -127, 0
            integers[m, :] = 0
            continue
        e = (most >> 23) - 127
        if (most & np.int32(0x7FFFFF)) > MOST_FRACTION:  # a larger one would carry into a fifth digit
            e += 1
        half = (BITS - e) >> 1
        first, second = powers[half + 256], powers[BITS - e - half + 256]
        row, out = x[m], integers[m]
        present, small, added = np.int32(0), np.int32(0), np.int64(0)
        for k in range(row.shape[0]):
            v = row[k] if abs(row[k]) >= SMALLEST else np.float32(0)
            scaled = v * first * second
            value = np.int32(np.rint(scaled))
            out[k] = value
            added += value
            there = np.int32(v != 0)
            present += there
            small += there & np.int32(abs(scaled) < SMALL)
        exponent[m], total[m] = e, added
        ends = np.array([most, least], dtype=np.int32).view(np.float32)
        far_below = least < np.int32(0x00800000) or ends[1] < ends[0] * FINEST
        flags[m] = (SECOND_PASS if np.int64(small) * MANY > present else 0) | (OUT_OF_RANGE if far_below else 0)


@njit(nogil=True, cache=True)
def to_finer(
    x: Any, powers: Any, exponent: Any, flags: Any, integers: Any, total: Any
) -> None:  # pragma: no cover - compiled
    """What ``to_fixed_point`` rounded away of rows that want a second pass, times 2^31, and its sums; else zeros."""
    for m in range(x.shape[0]):
        row, out, added = x[m], integers[m], np.int64(0)
        if flags[m] & SECOND_PASS:
            half = (BITS - exponent[m]) >> 1
            first, second = powers[half + 256], powers[BITS - exponent[m] - half + 256]
            for k in range(row.shape[0]):
                v = row[k] if abs(row[k]) >= SMALLEST else np.float32(0)
                scaled = v * first * second
                value = np.int32(np.rint((scaled - np.rint(scaled)) * FINER))
                out[k] = value
                added += value
        else:
            out[:] = 0
        total[m] = added


@njit(nogil=True, cache=True)
def _rounded(s: Any) -> Any:  # pragma: no cover - compiled
    return np.float32(np.int32(s >> LOW_BITS)) * CARRY + np.float32(np.int32(s & 0xFFFFFF))


@njit(nogil=True, cache=True)
def from_fixed_point(
    sums: Any, total: Any, finer: Any, finer_total: Any, flags: Any, zero: Any, fraction: Any, row_exponent: Any,
    exponent: Any, powers: Any, bias: Any, y: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """The last steps: sums (int64, zero points not yet taken off) to float32, times the scales, plus the bias.

    ``finer`` are sums of a second pass, of rows whose ``flags`` ask for it; there are none where it is empty.
    """
    for m in range(y.shape[0]):
        row, out = sums[m], y[m]
        twice = finer.shape[0] > 0 and flags[m] & SECOND_PASS != 0
        for n in range(row.shape[0]):
            t = _rounded(row[n] - total[m] * zero[n])
            if twice:
                t += _rounded(finer[m, n] - finer_total[m] * zero[n]) * ONE_FINER
            e = row_exponent[m] + exponent[n] - BITS
            half = e >> 1
            v = t * fraction[n] * powers[half + 256] * powers[e - half + 256]
            v = (np.float32(0) if abs(v) < SMALLEST else v) + bias[n]  # NaN < t is False, so this order keeps NaN
            out[n] = np.float32(0) if abs(v) < SMALLEST else v


@njit(nogil=True, cache=True)
def prepare_rows(
    x: Any, powers: Any, exponent: Any, total: Any, flags: Any, panels: Any, one: Any
) -> None:  # pragma: no cover - compiled
    """Rows of x, the first of which begins a panel: their exponents, sums and flags, and their integers as panels.

    Where there are no panels, ``one`` gets those of the only row.
    """
    if panels.shape[2] == 0:
        to_fixed_point(x, powers, one, exponent, total, flags)
        return
    (rows, inner), height = x.shape, panels.shape[2] // DIGITS
    integers = np.empty((min(height, rows), inner), dtype=np.int32)
    for first in range(0, rows, height):
        last = min(first + height, rows)
        some = integers[: last - first]
        to_fixed_point(x[first:last], powers, some, exponent[first:last], total[first:last], flags[first:last])
        pack_rows(some, DIGITS, height, panels[first // height :])


prepare_rows_apart = apart(
    prepare_rows,
    "void(float32[:,::1], float32[::1], int32[::1], int64[::1], int32[::1], uint32[:,:,::1], int32[:,::1])",
)


@njit(nogil=True, cache=True)
def _want_a_second_pass(flags: Any) -> Any:  # pragma: no cover - compiled
    found = np.int32(0)
    for m in range(flags.shape[0]):
        found |= flags[m] & SECOND_PASS
    return found != 0


@njit(nogil=True, cache=True)
def refine_rows(
    x: Any, powers: Any, exponent: Any, flags: Any, total: Any, panels: Any, one: Any
) -> None:  # pragma: no cover - compiled
    """What ``prepare_rows`` makes, for a second pass; panels that no row asks it for are left as they are."""
    if panels.shape[2] == 0:
        to_finer(x, powers, exponent, flags, one, total)
        return
    (rows, inner), height = x.shape, panels.shape[2] // DIGITS
    integers = np.empty((min(height, rows), inner), dtype=np.int32)
    for first in range(0, rows, height):
        last = min(first + height, rows)
        if _want_a_second_pass(flags[first:last]):
            some = integers[: last - first]
            to_finer(x[first:last], powers, exponent[first:last], flags[first:last], some, total[first:last])
            pack_rows(some, DIGITS, height, panels[first // height :])


refine_rows_apart = apart(
    refine_rows,
    "void(float32[:,::1], float32[::1], int32[::1], int32[::1], int64[::1], uint32[:,:,::1], int32[:,::1])",
)


def _finisher(vectors: int) -> Any:
    """``from_fixed_point`` of the sums of a panel of so many vectors with ``rows`` rows of the weight.

    All by addresses: of the sums and those of a second pass, which count where ``twice`` is not 0, in lanes with a mask
    that is not 0; of sums of codes; of sums of entries of x in either pass, exponents and masks, a lane each; of what
    belongs to rows of the weight; and of the results, lanes side by side.
    """
    height = vectors * _LANES // DIGITS
    longs, ints, floats = (ir.VectorType(item, height) for item in (_ADDRESS, _INT, ir.FloatType()))
    in_memory = ir.VectorType(_ADDRESS if _RUN else _INT, height)
    size = height * (8 if _RUN else 4)

    def same(vector: Any, number: Any) -> Any:
        return ir.Constant(vector, [number] * height)

    @intrinsic  # type: ignore[untyped-decorator]
    def finish(
        _: Any, rows: Any, sums: Any, finer: Any, twice: Any, of_codes: Any, total: Any, finer_total: Any,
        row_exponent: Any, wanted: Any, zero: Any, fraction: Any, exponent: Any, bias: Any, out: Any,
    ) -> Any:  # fmt: skip
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            rows, sums, finer, twice, of_codes, total, finer_total, row_exponent, wanted, *of_columns, out = arguments
            zero, fraction, exponent, bias = of_columns
            absolute = function(builder, f"llvm.fabs.v{height}f32", floats, [floats])
            of_x, of_finer = (load(builder, place, longs) for place in (total, finer_total))
            exponents, mask = (load(builder, place, ints) for place in (row_exponent, wanted))
            again = builder.icmp_signed("!=", mask, same(ints, 0))

            def of_row(start: Any, n: Any, kind: Any) -> Any:
                place = builder.add(start, builder.mul(n, _ADDRESS(4)))
                return in_all_lanes(builder, load(builder, place, kind.element), kind)

            def rounded(start: Any, entries: Any, n: Any) -> Any:
                place = builder.add(start, builder.mul(n, _ADDRESS(DIGITS * size)))
                less = builder.mul(builder.sext(of_row(of_codes, n, ints), longs), same(longs, _OFFSETS[-1]))
                shift = builder.mul(entries, builder.sext(of_row(zero, n, ints), longs))
                found = builder.neg(builder.add(less, shift))
                for d in range(DIGITS):
                    digit = load(builder, builder.add(place, _ADDRESS(d * size)), in_memory)
                    digit = digit if _RUN else builder.sext(digit, longs)
                    found = builder.add(found, builder.shl(digit, same(longs, _BITS * d)))
                high = builder.trunc(builder.ashr(found, same(longs, LOW_BITS)), ints)
                low = builder.and_(builder.trunc(found, ints), same(ints, (1 << LOW_BITS) - 1))
                carried = builder.fmul(builder.sitofp(high, floats), same(floats, float(CARRY)))
                return builder.fadd(carried, builder.sitofp(low, floats))

            def power(e: Any) -> Any:
                """2^e, 0 below 2^-100."""
                bits = builder.shl(builder.add(e, same(ints, 127)), same(ints, 23))
                there = builder.icmp_signed(">=", e, same(ints, LEAST_POWER))
                return builder.bitcast(builder.select(there, bits, same(ints, 0)), floats)

            def flushed(value: Any) -> Any:
                below = builder.fcmp_ordered("<", builder.call(absolute, [value]), same(floats, float(SMALLEST)))
                return builder.select(below, same(floats, 0), value)

            def row(n: Any, none: list[Any]) -> list[Any]:
                t = rounded(sums, of_x, n)
                before, second, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
                builder.cbranch(builder.icmp_signed("!=", twice, _ADDRESS(0)), second, after)
                builder.position_at_end(second)
                small = builder.fmul(rounded(finer, of_finer, n), same(floats, float(ONE_FINER)))
                both = builder.select(again, builder.fadd(t, small), t)
                builder.branch(after)
                builder.position_at_end(after)
                v = builder.phi(floats)
                v.add_incoming(t, before)
                v.add_incoming(both, second)
                e = builder.sub(builder.add(exponents, of_row(exponent, n, ints)), same(ints, BITS))
                half = builder.ashr(e, same(ints, 1))
                v = builder.fmul(v, of_row(fraction, n, floats))
                v = builder.fmul(builder.fmul(v, power(half)), power(builder.sub(e, half)))
                v = flushed(builder.fadd(flushed(v), of_row(bias, n, floats)))
                place = builder.inttoptr(builder.add(out, builder.mul(n, _ADDRESS(4 * height))), floats.as_pointer())
                builder.store(v, place, align=4)
                return none

            counted_loop(builder, rows, [], row)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 14), generate

    return finish


_finish_1, _finish_2, _finish_4 = _finisher(1), _finisher(2), _finisher(4)


@njit(nogil=True, cache=True)
def _finish_one_row(
    w: Any, unsigned: Any, integers: Any, row_exponent: Any, total: Any, flags: Any, finer: Any, finer_total: Any,
    fraction: Any, exponent: Any, zero: Any, bias: Any, powers: Any, y: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """``finish_columns`` of one row of x: its integers, and those of a second pass."""
    columns, inner = w.shape
    again = finer_total.shape[0] > 0 and _want_a_second_pass(flags)
    strip = np.empty((STRIP if unsigned else 0, inner), dtype=np.int8)
    sums, finer_sums = np.empty((1, STRIP), dtype=np.int64), np.empty((1 if again else 0, STRIP), dtype=np.int64)
    planes = pack_one_row(integers[0])
    finer_planes = pack_one_row(finer[0]) if again else planes
    step = ROWS_READ_TWICE if again else STRIP
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        codes, these, here = w[start:stop], slice(start, stop), slice(0, stop - start)
        if unsigned:
            codes = strip[: stop - start]
            for n in range(stop - start):
                for k in range(inner):
                    codes[n, k] = w[start + n, k] ^ np.int8(-128)
        _multiply_one_row_apart((codes, integers[0], planes, sums[0, here]))
        if again:
            _multiply_one_row_apart((codes, finer[0], finer_planes, finer_sums[0, here]))
        from_fixed_point(
            sums[:, here], total, finer_sums[:, here], finer_total, flags, zero[these], fraction[these], row_exponent,
            exponent[these], powers, bias[these], y[:, these],
        )  # fmt: skip


@njit(nogil=True, cache=True)
def _finish_rows(
    w: Any, unsigned: Any, panels: Any, row_exponent: Any, total: Any, flags: Any, finer: Any, finer_total: Any,
    fraction: Any, exponent: Any, zero: Any, bias: Any, y: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """``finish_columns`` of several rows of x, as panels."""
    (rows, columns), of_panels, lanes = y.shape, panels.shape[0], panels.shape[2]
    height, flip = lanes // DIGITS, 128 if unsigned else 0
    again = finer_total.shape[0] > 0 and _want_a_second_pass(flags)
    at_once = min(of_panels, ROWS_AT_ONCE // height)
    copies, sums = _room_for_copies(panels, w.shape[1]), _room_for_sums(panels[:at_once])
    finer_sums, of_codes = _room_for_sums(panels[: 1 if again else 0]), np.empty(STRIP, dtype=np.int32)
    out = on_lines(STRIP, height, np.float32)
    # what belongs to rows of x, a lane each, also where the last panel is not full
    totals, finer_totals = np.zeros(of_panels * height, dtype=np.int64), np.zeros(of_panels * height, dtype=np.int64)
    exponents, wanted = np.zeros(of_panels * height, dtype=np.int32), np.zeros(of_panels * height, dtype=np.int32)
    for m in range(rows):
        totals[m], exponents[m] = total[m], row_exponent[m]
        if again and flags[m] & SECOND_PASS:
            finer_totals[m], wanted[m] = finer_total[m], 1
    for start in range(0, columns, STRIP):
        here = min(STRIP, columns - start)
        codes, these = w[start : start + here], slice(start, start + here)
        z, f = zero.ctypes.data + 4 * start, fraction.ctypes.data + 4 * start
        e, b = exponent.ctypes.data + 4 * start, bias.ctypes.data + 4 * start
        for first in range(0, of_panels, at_once):
            some = panels[first : first + at_once]
            _sums_of_rows_apart((codes, flip, some, copies, sums, of_codes))
            for p in range(some.shape[0]):
                panel, top = first + p, (first + p) * height
                end = min(top + height, rows)
                twice = again and _want_a_second_pass(flags[top:end])
                if twice:
                    one = finer[panel : panel + 1]
                    _sums_of_rows_apart((codes, flip, one, copies, finer_sums, of_codes))
                found, second, c, o = sums[p].ctypes.data, finer_sums.ctypes.data, of_codes.ctypes.data, out.ctypes.data
                t, u = totals.ctypes.data + 8 * top, finer_totals.ctypes.data + 8 * top
                r, a = exponents.ctypes.data + 4 * top, wanted.ctypes.data + 4 * top
                if lanes == 4 * _LANES:
                    _finish_4(here, found, second, twice, c, t, u, r, a, z, f, e, b, o)
                elif lanes == 2 * _LANES:
                    _finish_2(here, found, second, twice, c, t, u, r, a, z, f, e, b, o)
                else:
                    _finish_1(here, found, second, twice, c, t, u, r, a, z, f, e, b, o)
                for m in range(top, end):
                    row, lane = y[m, these], m - top
                    for n in range(here):
                        row[n] = out[n, lane]


@njit(nogil=True, cache=True)
def finish_columns(
    w: Any, unsigned: Any, panels: Any, one: Any, row_exponent: Any, total: Any, flags: Any, finer: Any,
    finer_one: Any, finer_total: Any, fraction: Any, exponent: Any, zero: Any, bias: Any, powers: Any, y: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Columns of the result for rows of the weight ``w``; ``unsigned`` says that its bytes are uint8, 128 too large.

    ``finer``, ``finer_one`` and ``finer_total`` are as ``refine_rows`` leaves them; empty where there is no second
    pass.
    """
    check_c_order(w)
    if y.shape[0] == 1:
        _finish_one_row(
            w, unsigned, one, row_exponent, total, flags, finer_one, finer_total, fraction, exponent, zero, bias,
            powers, y,
        )  # fmt: skip
    else:
        _finish_rows(
            w, unsigned, panels, row_exponent, total, flags, finer, finer_total, fraction, exponent, zero, bias, y
        )
    for m in range(y.shape[0]):
        if flags[m] & NOT_FINITE:
            y[m, :] = np.float32(np.nan)


_OF_ROWS = "uint32[:,:,::1], int32[:,::1]"
finish_columns_apart = apart(
    finish_columns,
    f"void(int8[:,::1], boolean, {_OF_ROWS}, int32[::1], int64[::1], int32[::1], {_OF_ROWS}, int64[::1], "
    "float32[::1], int32[::1], int32[::1], float32[::1], float32[::1], float32[:,:])",
)


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    (
        w, unsigned, panels, one, row_exponent, total, flags, finer, finer_one, finer_total, fraction, exponent, zero,
        bias, powers, y,
    ) = given  # fmt: skip
    finish_columns_apart((
        w[start:stop], unsigned, panels, one, row_exponent, total, flags, finer, finer_one, finer_total,
        fraction[start:stop], exponent[start:stop], zero[start:stop], bias[start:stop], powers, y[:, start:stop],
    ))  # fmt: skip


_task = task_of(_part)


@njit(nogil=True, cache=True)
def finish_in_parts(
    pool: Any, ends: Any, w: Any, unsigned: Any, panels: Any, one: Any, row_exponent: Any, total: Any, flags: Any,
    finer: Any, finer_one: Any, finer_total: Any, fraction: Any, exponent: Any, zero: Any, bias: Any, powers: Any,
    y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``finish_columns`` for rows of the weight from each of ``ends`` to the next, on the threads of a pool."""
    given = (
        w, unsigned, panels, one, row_exponent, total, flags, finer, finer_one, finer_total, fraction, exponent, zero,
        bias, powers, y,
    )  # fmt: skip
    in_parts(pool, ends, _task(given))
    return True
