"""Exact products with int8 weights, by the processor's dot products of bytes.

Owns: what the instruction sets call a dot product, the layout of the operands that it wants, the loops around it, and
around those the product of floats in fixed point. One file, because what numba caches of a function is renewed when its
own file changes, and not when another does: what the contract's constants are is written here once more. The loops hold
no lock and start no thread. ``integers``, ``fixed_point`` and JAX's ``dots`` call them, and have other forms with the
same results for processors without any of the instructions (``AVAILABLE``).

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

from aqt_lite.backends.cpu.lines import on_lines
from aqt_lite.backends.cpu.native import apart, task_of
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


def _function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    found = builder.module.globals.get(name)
    return ir.Function(builder.module, ir.FunctionType(result, arguments), name) if found is None else found


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
        return builder.call(_function(builder, name, vector, [vector] * 3), [total, planes, codes])

    return dot


def _by_pairs_of_shorts(builder: Any, total: Any, planes: Any, codes: Any) -> Any:
    """``vpmaddwd`` adds two products of 16 bits to 32, exactly."""
    vector, shorts = ir.VectorType(_INT, 8), ir.VectorType(_SHORT, 16)
    multiply = _function(builder, "llvm.x86.avx2.pmadd.wd", vector, [shorts] * 2)
    pairs = [builder.bitcast(operand, shorts) for operand in (planes, codes)]
    return builder.add(total, builder.call(multiply, pairs))


def _by_signed_bytes(builder: Any, total: Any, planes: Any, codes: Any) -> Any:
    """``sdot``."""
    vector, bytes_ = ir.VectorType(_INT, 4), ir.VectorType(_BYTE, 16)
    dot = _function(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", vector, [vector, bytes_, bytes_])
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
_ONE_DIGIT = np.uint32((1 << _BITS) - 1)

STRIP = 96
"""Rows of the weight whose sums are kept until K is done: whole tiles."""

DEPTH_OF_ONE_ROW = _AT_A_TIME * _RUN
"""The same for one row of x, where runs end."""

DEPTH = CODES * _RUN or 2048
"""Codes of a row that meet one panel of x before the next: such a panel (128 KB) and a strip of the weight fit L2."""


def _load(builder: Any, address: Any, its_type: Any) -> Any:
    return builder.load(builder.inttoptr(address, its_type.as_pointer()), align=1)


def _rows_of_tile(builder: Any, w: Any, stride: Any, rows: Any, height: int) -> list[Any]:
    """Addresses of ``height`` rows from ``w`` on; after the last of ``rows`` that one again, sums that go unread."""
    last = builder.sub(rows, _ADDRESS(1))
    indices = [_ADDRESS(r) for r in range(height)]
    inside = [builder.select(builder.icmp_signed("<", r, last), r, last) for r in indices]
    return [builder.add(w, builder.mul(r, stride)) for r in inside]


def _loop(builder: Any, count: Any, totals: list[Any], step: Any) -> list[Any]:
    """``totals = step(builder, i, totals)`` for i from 0 to count - 1, the totals in registers; count is at least 1."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(_ADDRESS)
    carried = [builder.phi(total.type) for total in totals]
    new = step(builder, i, carried)
    following = builder.add(i, _ADDRESS(1))
    for phi, first, next_one in zip([i, *carried], [_ADDRESS(0), *totals], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(next_one, loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return new


def _codes_at(builder: Any, address: Any, its: InstructionSet) -> Any:
    """A vector of codes from there on."""
    if its.bits == 8:
        return _load(builder, address, its.vector)
    codes = _load(builder, address, ir.VectorType(_BYTE, its.lanes * its.codes))
    return builder.bitcast(builder.sext(codes, ir.VectorType(_SHORT, its.lanes * its.codes)), its.vector)


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
    reduce = _function(builder, name, sum_of.element, [sum_of])
    starts = _rows_of_tile(builder, w, stride, rows, height)
    lines = [builder.add(plane, builder.mul(length, _ADDRESS(c))) for c in range(planes)]

    def step(builder: Any, i: Any, totals: list[Any]) -> list[Any]:
        at = builder.mul(i, _ADDRESS(4 * its.lanes))
        x = [_load(builder, builder.add(line, at), its.vector) for line in lines]
        of_codes = builder.mul(i, _ADDRESS(its.codes * its.lanes))
        codes = [_codes_at(builder, builder.add(start, of_codes), its) for start in starts]
        pairs = [(u, q) for q in codes for u in x]
        return [its.dot(builder, t, u, q) for t, (u, q) in zip(totals, pairs, strict=True)]

    zeros = [its.vector([0] * its.lanes)] * (height * planes)
    for i, total in enumerate(_loop(builder, steps, zeros, step)):
        place = builder.add(out, _ADDRESS(sum_of.element.width // 8 * i))
        found = builder.call(reduce, [_widened(builder, total, its)])
        builder.store(found, builder.inttoptr(place, sum_of.element.as_pointer()))


def dots_across_planes(builder: Any, arguments: Any, its: InstructionSet, height: int, vectors: int) -> None:
    """``out[r, lane] += sum_k panel[k, lane] w[r, k]`` over ``steps`` of a lane's codes, of lanes of ``vectors``.

    Arguments are the address of w, the distance of its rows, how many there are, the address of the panel, the steps,
    and the address of out; where w is a copy, its codes of as many bits as digits, also the address of the weight's
    tile below and the distance of its rows. Meanwhile the tile below is fetched: it is read once for the sums of its
    codes, or to be copied, at the speed of memory, before it comes to this loop, and those two would wait for each
    other. Prefetching past the weight's end is harmless.
    """
    w, stride, rows, panel, steps, out, *of_weight = arguments
    size = 4 * its.lanes
    fetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), [ir.PointerType(_BYTE), _INT, _INT, _INT])
    starts = _rows_of_tile(builder, w, stride, rows, height)
    below, distance = of_weight if its.bits == 16 else (builder.add(w, builder.mul(stride, _ADDRESS(height))), stride)
    sums = ir.VectorType(_ADDRESS if its.run else _INT, its.lanes)
    places = [builder.add(out, _ADDRESS(size * (2 if its.run else 1) * i)) for i in range(height * vectors)]
    undefined, to_all = ir.Constant(its.vector, ir.Undefined), ir.Constant(its.vector, [0] * its.lanes)

    def step(builder: Any, i: Any, totals: list[Any]) -> list[Any]:
        lanes = builder.add(panel, builder.mul(i, _ADDRESS(size * vectors)))
        x = [_load(builder, builder.add(lanes, _ADDRESS(size * c)), its.vector) for c in range(vectors)]
        at, new = builder.mul(i, _ADDRESS(4)), []
        if vectors < 4:  # with more, arithmetic takes longer than memory
            # a line of 64 bytes holds the codes of 16 steps or 32: in each of them one line of one of the 8 rows below
            row = builder.add(below, builder.mul(builder.and_(i, _ADDRESS(7)), distance))
            line = builder.add(row, builder.and_(builder.mul(i, _ADDRESS(its.codes)), _ADDRESS(-64)))
            to_all_caches = [_INT(0), _INT(3), _INT(1)]
            builder.call(fetch, [builder.inttoptr(line, ir.PointerType(_BYTE)), *to_all_caches])
        for r, start in enumerate(starts):
            four = builder.insert_element(undefined, _load(builder, builder.add(start, at), _INT), _INT(0))
            codes = builder.shuffle_vector(four, undefined, to_all)
            new += [its.dot(builder, totals[r * vectors + c], x[c], codes) for c in range(vectors)]
        return new

    kept = [_load(builder, place, sums) for place in places] if not its.run else []
    totals = _loop(builder, steps, kept or [its.vector([0] * its.lanes)] * len(places), step)
    if its.run:
        totals = [
            builder.add(_load(builder, at, sums), _widened(builder, total, its))
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


def _across_planes(height: int, vectors: int) -> Any:
    """``dots_across_planes`` for numba."""

    @intrinsic  # type: ignore[untyped-decorator]
    def tile(
        _: Any, w: Any, stride: Any, rows: Any, panel: Any, steps: Any, out: Any, below: Any, distance: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            dots_across_planes(builder, arguments, INSTRUCTIONS, height, vectors)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), generate

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
    """``y[n] = sum_k w[n, k] x[k]``: int8 rows, int32 x and its planes, int64 y."""
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
    return (0, 0, 0) if rows == 1 and digits == DIGITS else (-(-rows // height), inner // CODES, digits * height)


def parts_of_rows(rows: int, digits: int) -> list[slice]:
    """The rows of x in one part, or in two where the last panel would be half empty or more."""
    most = 4 * _LANES // digits
    rest = rows % most
    cut = rows - rest if rows > most and 0 < rest <= most // 2 else rows
    return [part for part in (slice(0, cut), slice(cut, rows)) if part.start < part.stop]


@njit(nogil=True, cache=True)
def pack_rows(x: Any, digits: int, height: int, panels: Any) -> None:  # pragma: no cover - compiled
    """Rows of integers into ``panels`` (panel, K // CODES, digit * height + row): digits of CODES codes in each uint32.

    Rows that only fill up the last panel are not written: their sums are not read.
    """
    rows, groups = x.shape[0], panels.shape[1]
    carry, flip = _CARRIES[digits - 1], _FLIPS[digits - 1]
    for m in range(rows):
        panel, lane, values = panels[m // height], m % height, x[m]
        for g in range(groups):
            for plane in range(digits):
                shift, word = np.uint32(_BITS * plane), np.uint32(0)
                for i in range(CODES):
                    bits = np.uint32(np.uint32(values[CODES * g + i]) + carry) ^ flip
                    word |= ((bits >> shift) & _ONE_DIGIT) << np.uint32(_BITS * i)
                panel[g, plane * height + lane] = word


_AT_ONCE = 8
_tile_of_ones = _along_k(_AT_ONCE, 1)
_HEIGHT_1, _HEIGHT_2, _HEIGHT_4 = INSTRUCTIONS.heights
_tile_1, _tile_2, _tile_4 = _across_planes(_HEIGHT_1, 1), _across_planes(_HEIGHT_2, 2), _across_planes(_HEIGHT_4, 4)


@njit(nogil=True, cache=True)
def _add_codes(w: Any, ones: Any, total: Any) -> None:  # pragma: no cover - compiled
    """Add the sum of each of up to 8 rows of codes to ``total``."""
    rows, whole = w.shape[0], w.shape[1] & ~(_AT_A_TIME - 1)
    sums = np.zeros(_AT_ONCE, dtype=_SUM)
    if whole:
        _tile_of_ones(w.ctypes.data, w.strides[0], rows, ones.ctypes.data, 0, whole // _AT_A_TIME, sums.ctypes.data)
    for r in range(rows):
        rest = np.int32(0)
        for k in range(whole, w.shape[1]):
            rest += w[r, k]
        total[r] += sums[r] + rest


@njit(nogil=True, cache=True)
def _widen(w: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Codes as shorts."""
    for r in range(w.shape[0]):
        row, shorts = w[r], out[r]
        for k in range(row.shape[0]):
            shorts[k] = row[k]


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
def multiply_rows(w: Any, tail: Any, panels: Any, digits: int, height: int, y: Any) -> None:  # pragma: no cover
    """``y[m, n] = sum_k w[n, k] x[m, k]``: int8 w, x as panels and its last columns, which they lack, int64 y."""
    rows, inner = w.shape
    stride, lanes = w.strides[0], panels.shape[2]
    whole = panels.shape[1] * CODES
    depth = DEPTH if _RUN or panels.shape[0] > 1 else max(whole, CODES)
    tile = _HEIGHT_4 if lanes == 4 * _LANES else _HEIGHT_2 if lanes == 2 * _LANES else _HEIGHT_1
    of_panels = panels.shape[0]
    sums = on_lines(of_panels, STRIP * lanes, _SUM).reshape(of_panels, STRIP, lanes)
    of_codes = np.zeros(STRIP, dtype=np.int32)
    ones = np.ones(depth if _OFFSET else 0, dtype=_DIGIT)
    wide = np.empty((STRIP if _BITS == 16 else 0, depth), dtype=np.int16)
    joined = on_lines(STRIP, height, np.int64)
    for first in range(0, rows, STRIP):
        stop = min(first + STRIP, rows)
        sums[:] = 0
        of_codes[:] = 0
        for k in range(0, whole, depth):
            steps = min(depth, whole - k) // CODES
            for p in range(panels.shape[0]):
                panel = panels[p].ctypes.data + (k // CODES) * lanes * 4
                for n in range(first, stop, tile):
                    start, by, out = w.ctypes.data + n * stride + k, stride, sums[p, n - first :].ctypes.data
                    below = start + tile * stride
                    if _OFFSET and p == 0:
                        _add_codes(w[n : min(n + tile, stop), k : k + CODES * steps], ones, of_codes[n - first :])
                    if _BITS == 16:
                        if p == 0:
                            _widen(w[n : min(n + tile, stop), k : k + CODES * steps], wide[n - first :])
                        start, by = wide[n - first :].ctypes.data, wide.strides[0]
                    if lanes == 4 * _LANES:
                        _tile_4(start, by, stop - n, panel, steps, out, below, stride)
                    elif lanes == 2 * _LANES:
                        _tile_2(start, by, stop - n, panel, steps, out, below, stride)
                    else:
                        _tile_1(start, by, stop - n, panel, steps, out, below, stride)
        for p in range(panels.shape[0]):
            _join_digits(sums[p, : stop - first], of_codes, digits, height, joined)
            for m in range(p * height, min(p * height + height, tail.shape[0])):
                lane, out = m % height, y[m, first:stop]
                for n in range(stop - first):
                    out[n] = joined[n, lane]
                for k in range(whole, inner):
                    for n in range(stop - first):
                        out[n] += np.int64(w[first + n, k]) * np.int64(tail[m, k - whole])


_multiply_rows_apart = apart(
    multiply_rows, "void(int8[:,::1], int32[:,::1], uint32[:,:,::1], int64, int64, int64[:,:])"
)


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
def _put_in_panel(
    integers: Any, first: Any, height: Any, panels: Any, tail: Any
) -> None:  # pragma: no cover - compiled
    """Rows from ``first`` on, which begin a panel, into it, and into ``tail`` what it does not hold."""
    whole = CODES * panels.shape[1]
    if whole:
        pack_rows(integers, DIGITS, height, panels[first // height : first // height + 1])
    for m in range(integers.shape[0]):
        for k in range(whole, integers.shape[1]):
            tail[first + m, k - whole] = integers[m, k]


@njit(nogil=True, cache=True)
def prepare_rows(
    x: Any, powers: Any, exponent: Any, total: Any, flags: Any, panels: Any, tail: Any
) -> None:  # pragma: no cover - compiled
    """Rows of x, the first of which begins a panel: their exponents, sums and flags, and their integers as panels.

    ``tail`` gets the integers that no panel holds: those beyond a multiple of CODES, or all where there are no panels.
    """
    rows, inner = x.shape
    height = max(1, panels.shape[2] // DIGITS)
    integers = np.empty((min(height, rows), inner), dtype=np.int32)
    for first in range(0, rows, height):
        last = min(first + height, rows)
        some = integers[: last - first]
        to_fixed_point(x[first:last], powers, some, exponent[first:last], total[first:last], flags[first:last])
        _put_in_panel(some, first, height, panels, tail)


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
    x: Any, powers: Any, exponent: Any, flags: Any, total: Any, panels: Any, tail: Any
) -> None:  # pragma: no cover - compiled
    """What ``prepare_rows`` makes, for a second pass; panels that no row asks it for are left as they are."""
    rows, inner = x.shape
    height = max(1, panels.shape[2] // DIGITS)
    integers = np.empty((min(height, rows), inner), dtype=np.int32)
    for first in range(0, rows, height):
        last = min(first + height, rows)
        if _want_a_second_pass(flags[first:last]):
            some = integers[: last - first]
            to_finer(x[first:last], powers, exponent[first:last], flags[first:last], some, total[first:last])
            _put_in_panel(some, first, height, panels, tail)


refine_rows_apart = apart(
    refine_rows,
    "void(float32[:,::1], float32[::1], int32[::1], int32[::1], int64[::1], uint32[:,:,::1], int32[:,::1])",
)


@njit(nogil=True, cache=True)
def finish_columns(
    w: Any, unsigned: Any, panels: Any, tail: Any, row_exponent: Any, total: Any, flags: Any, finer: Any,
    finer_tail: Any, finer_total: Any, fraction: Any, exponent: Any, zero: Any, bias: Any, powers: Any, y: Any,
) -> None:  # pragma: no cover - compiled  # fmt: skip
    """Columns of the result for rows of the weight ``w``; ``unsigned`` says that its bytes are uint8, 128 too large.

    ``finer``, ``finer_tail`` and ``finer_total`` are as ``refine_rows`` leaves them; empty where there is no second
    pass.
    """
    rows, (columns, inner) = y.shape[0], w.shape
    height = max(1, panels.shape[2] // DIGITS)
    as_it_lies = w.strides[1] == 1 and not unsigned
    strip = np.empty((0 if as_it_lies else STRIP, inner), dtype=np.int8)
    sums = np.empty((min(rows, ROWS_AT_ONCE), STRIP), dtype=np.int64)
    again = finer_total.shape[0] > 0 and _want_a_second_pass(flags)
    finer_sums = np.empty((height if again else 0, STRIP), dtype=np.int64)
    planes = pack_one_row(tail[0]) if rows == 1 else np.empty((0, 0), dtype=_DIGIT)
    finer_planes = pack_one_row(finer_tail[0]) if rows == 1 and again else planes
    step = ROWS_READ_TWICE if rows == 1 and again else STRIP
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        if as_it_lies:
            codes = w[start:stop]
        else:
            codes = strip[: stop - start]
            for n in range(stop - start):
                for k in range(inner):
                    codes[n, k] = w[start + n, k] ^ np.int8(-128) if unsigned else w[start + n, k]
        these = slice(start, stop)
        for first in range(0, rows, ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, rows)
            found = sums[: last - first, : stop - start]
            if rows == 1:
                _multiply_one_row_apart((codes, tail[0], planes, found[0]))
            else:
                of_rows = panels[first // height : (last + height - 1) // height]
                _multiply_rows_apart((codes, tail[first:last], of_rows, DIGITS, height, found))
            for top in range(first, last, height):
                end = min(top + height, last)
                of_panel, second = slice(top, end), finer_sums[:0, : stop - start]
                if again and _want_a_second_pass(flags[of_panel]):
                    second = finer_sums[: end - top, : stop - start]
                    if rows == 1:
                        _multiply_one_row_apart((codes, finer_tail[0], finer_planes, second[0]))
                    else:
                        one = finer[top // height : top // height + 1]
                        _multiply_rows_apart((codes, finer_tail[of_panel], one, DIGITS, height, second))
                from_fixed_point(
                    found[top - first : end - first], total[of_panel], second, finer_total[of_panel], flags[of_panel],
                    zero[these], fraction[these], row_exponent[of_panel], exponent[these], powers, bias[these],
                    y[of_panel, these],
                )  # fmt: skip
            for m in range(first, last):
                if flags[m] & NOT_FINITE:
                    y[m, these] = np.float32(np.nan)


_OF_ROWS = "uint32[:,:,::1], int32[:,::1]"
finish_columns_apart = apart(
    finish_columns,
    f"void(int8[:,::1], boolean, {_OF_ROWS}, int32[::1], int64[::1], int32[::1], {_OF_ROWS}, int64[::1], "
    "float32[::1], int32[::1], int32[::1], float32[::1], float32[::1], float32[:,:])",
)


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    (
        w, unsigned, panels, tail, row_exponent, total, flags, finer, finer_tail, finer_total, fraction, exponent, zero,
        bias, powers, y,
    ) = given  # fmt: skip
    finish_columns_apart((
        w[start:stop], unsigned, panels, tail, row_exponent, total, flags, finer, finer_tail, finer_total,
        fraction[start:stop], exponent[start:stop], zero[start:stop], bias[start:stop], powers, y[:, start:stop],
    ))  # fmt: skip


_task = task_of(_part)


@njit(nogil=True, cache=True)
def finish_in_parts(
    pool: Any, ends: Any, w: Any, unsigned: Any, panels: Any, tail: Any, row_exponent: Any, total: Any, flags: Any,
    finer: Any, finer_tail: Any, finer_total: Any, fraction: Any, exponent: Any, zero: Any, bias: Any, powers: Any,
    y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``finish_columns`` for rows of the weight from each of ``ends`` to the next, on the threads of a pool."""
    given = (
        w, unsigned, panels, tail, row_exponent, total, flags, finer, finer_tail, finer_total, fraction, exponent, zero,
        bias, powers, y,
    )  # fmt: skip
    in_parts(pool, ends, _task(given))
    return True
