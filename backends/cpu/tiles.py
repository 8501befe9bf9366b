"""Products in float32 with a weight as it is stored, by NumPy's ufuncs and BLAS: what serves without compiled loops.

Owns: the form, how tiles of codes, packed or not, become floats, and the tables of numbers that codes are looked up in.
Imports: the operations, the runtime, and ``serve``, which says what it is for. ``stored`` and ``floats`` call it last.

A tile is some rows of the weight, in memory that a cache holds. Between two of NumPy's steps a thread wants Python's
lock, which another may hold: steps are few, and tiles large. Two forms:

- **few rows of x**: a thread turns a tile to numbers and multiplies pieces of its rows by pieces of x, as a batch of
  products so small that BLAS does them on the thread that asks. Where a piece has one scale, its sum meets the scale
  afterwards: one product for each piece, and not for each code;
- **many rows**: threads turn a block of tiles to values, scaled, and BLAS multiplies it on all cores.
"""

from __future__ import annotations

import functools
import math
import threading
from typing import Any, NamedTuple

import numpy as np

from aqt_lite import affine
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import serve
from aqt_lite.backends.cpu.kinds import numbers_of_codes
from aqt_lite.backends.cpu.packed import unpacked_rows
from aqt_lite.backends.cpu.runtime import CHUNKS_PER_CORE, map_ranges
from aqt_lite.elements import ElementType

__all__ = ["matmul_of_tiles"]

TILE = 1 << 20
"""Codes that a thread turns to floats at a time: 4 MB of those."""

BLOCK = 1 << 21
"""Codes of a block that BLAS multiplies: 8 MB of floats."""

LONGEST_SUM = 128
"""Codes with one scale whose products are summed before they meet it, at most."""

PIECE = 256
"""Codes of a row that are multiplied at a time where they are scaled already."""

HIGHEST = 256, 128
"""Rows of a tile whose pieces are a batch of products, at most: for one row of x, and for more."""

APART = 16
"""Floats between two rows of a tile whose sums are scaled afterwards: where rows lie a power of two apart, a cache
keeps them in the same few places."""

ROWS_OF_A_STRIP = 16
"""Rows of x in one of the small products, at most."""

SHORTEST_LOOP = 32
"""Codes with one scale from which on a ufunc takes what blocks have as it is; for shorter ones it is repeated first."""

MOST_RESULTS = 1 << 10
"""Results of a small product up to which OpenBLAS has a kernel that copies no operand."""

MOST_OF_ONE_ROW = 1 << 13
"""Products of one row of x and a matrix up to which OpenBLAS does not start its own threads."""


class _Weight(NamedTuple):
    """What tiles are made from."""

    codes: Array
    """Rows of bytes, of pairs of bytes, of streams, or of the integers that numbers are."""
    table: Array | None
    """The numbers of an item of ``codes``, as one item: of a code of 8 bits, or of 2 or 4 codes of 4 bits.

    None where codes are the numbers.
    """
    halves: bool
    """Whether a byte is two codes."""
    signed: bool
    """Whether codes of a stream, or of pairs, are integers with a sign; of pairs these become 16 times as large."""
    scale: Array
    """On the grid; or codes, of which ``of_scales`` has the numbers."""
    of_scales: Array | None
    zero: Array | None
    stream: int
    """Bits of a code, where rows of ``codes`` are streams of neither 4 nor 8."""
    columns: int
    block: tuple[int, int]
    """Rows and columns with one scale."""


@np.errstate(all="ignore")
def matmul_of_tiles(
    x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int, packed_length: int | None
) -> Any:
    """``reference.matmul_stored``, at no more than twice the error of a float32 product."""
    packed = packed_length is not None
    if not (len(x) and serve.tiles(x.dtype.name, w, spec, packed)):
        return NotImplemented
    if w.zero_point is not None and not serve.fits_16_bits(w.zero_point):
        return NotImplemented
    columns = w.codes.shape[1] if packed_length is None else packed_length
    weight, x_dtype = _weight_of(w, spec, columns, packed), x.dtype
    x = np.ascontiguousarray(x, dtype=np.float32)
    in_pieces = contract == 1 and len(x) <= serve.MOST_ROWS_FOR_PIECES
    y = _of_pieces(x, weight) if in_pieces else _of_blocks(x, weight, contract)
    if y is None:
        return NotImplemented
    if bias is not None:
        y += bias
    return y.astype(x_dtype, copy=False)


def _weight_of(w: Coded, spec: Spec, columns: int, packed: bool) -> _Weight:
    b, element, codes = get_backend("numpy"), spec.element, np.ascontiguousarray(w.codes)
    scale, of_scales = _scales_of(w.scale, spec, b)
    rows, table, signed, zero = len(codes), None, False, w.zero_point
    stream = element.bits if packed and element.bits != 4 else 0
    if stream:
        table = None if element.zero_points else _numbers_of_items(element, 1)
    elif not element.zero_points:
        in_pairs = packed and codes.shape[1] % 2 == 0 and codes.ctypes.data % 2 == 0
        codes = codes.view(np.uint16 if in_pairs else np.uint8)
        table = _numbers_of_items(element, 2 * codes.itemsize if packed else 1)
    elif packed:
        codes, signed = codes.view(np.uint8), not element.storage.startswith("u")
    block = (spec.block[0] or rows, spec.block[1] or columns)
    if (
        signed and zero is not None
    ):  # as integers without a sign: 16 bits hold no zero points that are 16 times as large
        codes, zero, signed = codes ^ np.uint8(0x88), zero + np.int32(8), False
    if signed:  # the numbers are 16 times as large
        scale, of_scales = (scale * np.float32(1 / 16), None) if of_scales is None else (scale, of_scales / 16)
    halves, signed = packed and not stream, signed or (stream > 0 and not element.storage.startswith("u"))
    return _Weight(codes, table, halves, signed, scale, of_scales, zero, stream, columns, block)


def _scales_of(kept: Any, spec: Spec, b: Backend) -> tuple[Array, Array | None]:
    """Scales as numbers, or as the codes that they are kept in, and the numbers of all such codes."""
    if not isinstance(kept, tuple):
        return np.asarray(kept, dtype=np.float32), None
    kept = Coded(*kept)
    plain = kept.codes.dtype.itemsize == 1 and not isinstance(kept.scale, tuple)
    if not plain or (kept.scale is not None and kept.scale.size > 1):
        return np.asarray(affine.usable_scales(kept, spec, b), dtype=np.float32), None
    assert spec.format.scale is not None
    every = _every_code(spec.format.scale.element, kept.codes.dtype)
    numbers = affine.usable_scales(kept._replace(codes=every.reshape(1, -1)), spec, b)
    return np.ascontiguousarray(kept.codes).view(np.uint8), np.asarray(numbers, dtype=np.float32).reshape(-1)


def _every_code(element: ElementType, dtype: Any) -> Array:
    """Codes of 8 bits by their patterns; 0, which is a code of them all, in place of those that are none."""
    bits, (least, most) = np.arange(256, dtype=np.uint8).view(dtype), element.codes
    return np.where((bits >= least) & (bits <= most), bits, bits[:1])


@functools.lru_cache(maxsize=16)
def _numbers_of_items(element: ElementType, codes: int) -> Array:
    """The numbers of each pattern of so many codes, as one item of 4, 8 or 16 bytes. NaN for those that are none."""
    if codes == 1:
        bits, dtype = np.arange(256, dtype=np.uint8), np.dtype(element.storage)
        every = _every_code(element, dtype)
        numbers = np.asarray(element.decode(every, get_backend("numpy")), dtype=np.float32)
        return np.where(bits.view(dtype) == every, numbers, np.float32(np.nan))
    pattern, one = np.arange(1 << (4 * codes)), numbers_of_codes(element)
    numbers = np.stack([one[(pattern >> (4 * i)) & 15] for i in range(codes)], axis=1)
    return numbers.view(np.complex64 if codes == 2 else np.complex128).reshape(-1)


# ---- tiles


def _scales_of_rows(w: _Weight, first: int, last: int) -> Array:
    """The scales of some rows, one row of them for each, or one for all."""
    scale = _rows_of(w.scale, w, first, last)
    return scale if w.of_scales is None else np.take(w.of_scales, scale, mode="clip")


def _rows_of(blocks: Array, w: _Weight, first: int, last: int) -> Array:
    if len(blocks) == 1:
        return blocks
    size = w.block[0]
    return blocks[first:last] if size == 1 else blocks[np.arange(first, last) // size]


def _are_usual(w: _Weight, first: int, last: int) -> bool:
    """Whether products with the scales of some rows are neither infinite nor subnormal, and no plain scale is 0."""
    scale = _rows_of(w.scale, w, first, last)
    low, high = np.min(scale), np.max(scale)
    if w.of_scales is not None:
        some = np.abs(w.of_scales[low : int(high) + 1])
        some = some[some != 0]  # the scale of a block of zeros
        low, high = (np.min(some), np.max(some)) if some.size else (1, 1)
    elif not low > 0:
        low, high = np.min(np.abs(scale)), np.max(np.abs(scale))
    return bool(low > 1 / serve.LARGEST_UNSCALED) and bool(high < serve.LARGEST_UNSCALED)


class _Tile:
    """Memory for the numbers of so many rows of a weight, ``apart`` floats between two, and for the steps to them."""

    def __init__(self, w: _Weight, height: int, width: int, apart: int = 0) -> None:
        self._w, self._width = w, width
        self._memory, self._spare = np.empty((height, width + apart), np.float32), _spare(w, height)
        codes = 1 if w.table is None else w.table.itemsize // 4
        looked_up = w.table is not None and not w.stream and width == w.columns and width % codes == 0
        self._items = np.zeros((height, (width + apart) // codes), np.intp) if looked_up else None

    def numbers(self, first: int, last: int) -> Array:
        """The numbers of these rows, less their zero points; zeros beyond the weight's columns."""
        w, memory = self._w, self._memory[: last - first]
        if self._items is None or w.table is None:
            _numbers(w, first, last, memory[:, : self._width], self._spare)
        else:  # what lies between rows is looked up, too: so the memory is written from end to end
            items = self._items[: last - first]
            np.copyto(items[:, : w.codes.shape[1]], w.codes[first:last])
            np.take(w.table, items, out=memory.view(w.table.dtype), mode="wrap")
        return memory[:, : self._width]


def _numbers(w: _Weight, first: int, last: int, out: Array, spare: Array) -> None:
    """Numbers of rows of codes, less their zero points, into ``out``, whose rows may be longer: zeros then."""
    codes, values = w.codes[first:last], out[:, : w.columns]
    if w.stream:
        codes = unpacked_rows(codes, w.stream, w.columns, w.signed)
        codes = codes if w.table is None else codes.view(np.uint8)  # its places are patterns
    if w.table is None:
        integers = (_halves(codes, w.signed, spare) if w.halves else codes)[:, : w.columns]
        if w.zero is not None:  # 16 bits hold the difference, and are twice as fast as floats
            own = spare[-values.size :].view(np.int16).reshape(values.shape)
            np.copyto(own, integers)
            _apply(np.subtract, own, _rows_of(w.zero, w, first, last), w)
            integers = own
        np.copyto(values, integers)
    elif out.flags.c_contiguous and out.nbytes == codes.size * w.table.itemsize:
        np.take(w.table, codes, out=out.view(w.table.dtype), mode="clip")
    else:
        np.copyto(values, np.take(w.table, codes, mode="clip").view(np.float32)[:, : w.columns])
    if out.shape[1] > w.columns:
        out[:, w.columns :] = 0


def _halves(codes: Array, signed: bool, spare: Array) -> Array:
    """Integers of 4 bits, two a byte, as a byte each; those with a sign in its upper half, so that it is the byte's.

    By products with powers of two: NumPy has vectors for those, and none for shifts.
    """
    pairs, others = (spare[i * codes.size : (i + 1) * codes.size].reshape(codes.shape) for i in range(2))
    np.copyto(pairs, codes)
    np.multiply(pairs, np.uint16(16), out=others)
    if signed:
        np.multiply(pairs, np.uint16(256), out=pairs)
    np.bitwise_or(pairs, others, out=pairs)
    np.bitwise_and(pairs, np.uint16(0xF0F0 if signed else 0x0F0F), out=pairs)
    return pairs.view(np.int8 if signed else np.uint8)


def _spare(w: _Weight, rows: int) -> Array:
    """Memory of 16-bit integers for ``_numbers`` of so many rows."""
    of_halves = 2 * w.codes.shape[1] if w.halves and w.table is None else 0
    return np.empty(rows * (of_halves + (0 if w.zero is None else w.columns)), np.uint16)


def _apply(ufunc: Any, values: Array, blocks: Array, w: _Weight) -> None:
    """``ufunc`` of values and of what their blocks have."""
    (rows, columns), size = values.shape, w.block[1]
    whole = columns // size * size if blocks.shape[1] > 1 else 0
    blocks = blocks.astype(values.dtype, copy=False)
    if size >= SHORTEST_LOOP and whole:
        some = values[:, :whole].reshape(rows, -1, size)  # a view: of an axis that is cut in two
        ufunc(some, blocks[:, : whole // size, None], out=some)
    elif whole:
        some = values[:, :whole]
        ufunc(some, blocks[:, :whole] if size == 1 else np.repeat(blocks[:, : whole // size], size, axis=1), out=some)
    if whole < columns:
        ufunc(values[:, whole:], blocks[:, -1:], out=values[:, whole:])


# ---- few rows of x


def _of_pieces(x: Array, w: _Weight) -> Array | None:
    """``x @ w.T``; None where scales are not usual."""
    groups, rows, length = w.scale.shape[1], len(x), len(w.codes)
    size = w.block[1] if groups > 1 else -(-w.columns // LONGEST_SUM) * LONGEST_SUM
    piece = size if size <= LONGEST_SUM else math.gcd(size, LONGEST_SUM)
    sums_first = piece >= serve.shortest_sum(rows) and serve.is_not_huge(x)
    piece = piece if sums_first else PIECE
    width = groups * size if sums_first else -(-w.columns // PIECE) * PIECE
    x = _in_strips(x, width, piece)
    strips, count, strip, _ = x.shape
    height = max(1, min(HIGHEST[rows > 1], TILE // width, length))
    part = min(height, MOST_OF_ONE_ROW // piece if rows == 1 else 1 << (MOST_RESULTS // strip).bit_length() - 1)
    y, memory = np.empty((strips, strip, length), np.float32), threading.local()

    def multiply(tile: Array, scale: Array, first: int) -> None:
        """Some rows of the weight, whole parts or less than one, by all of x."""
        high = min(part, len(tile))
        some = tile.reshape(-1, 1, high, count, piece).transpose(0, 1, 3, 4, 2)
        shape = len(some), strips, count, strip, high
        sums = memory.sums[: math.prod(shape)].reshape(shape)
        if sums_first:
            scale = np.repeat(scale, count // groups, axis=1) if groups not in (1, count) else scale
            scale = scale.reshape(-1, 1, min(high, len(scale)), scale.shape[1], 1)
            scale = np.ascontiguousarray(scale.transpose(0, 1, 3, 4, 2))
        np.matmul(x, some, out=sums)
        if sums_first:
            np.multiply(sums, scale, out=sums)
        own = y[:, :, first : first + len(tile)].reshape(strips, strip, -1, high)
        np.add.reduce(sums, axis=2, out=own.transpose(2, 0, 1, 3))

    def columns(start: int, stop: int) -> bool:
        if not _are_usual(w, start, stop):
            return False
        if not hasattr(memory, "tile"):
            memory.tile = _Tile(w, height, width, APART if sums_first else 0)
            memory.sums = np.empty(strips * strip * count * height, np.float32)
        for first in range(start, stop, height):
            last = min(first + height, stop)
            tile, scale = memory.tile.numbers(first, last), _scales_of_rows(w, first, last)
            if not sums_first:
                _apply(np.multiply, tile[:, : w.columns], scale, w)
            whole = len(tile) // part * part
            for some in (slice(whole), slice(whole, len(tile))):
                if len(tile[some]):
                    multiply(tile[some], scale if len(scale) == 1 else scale[some], first + (some.start or 0))
        return True

    served = all(map_ranges(columns, length, height, length * width, CHUNKS_PER_CORE))
    return y.reshape(-1, length)[:rows] if served else None


def _in_strips(x: Array, width: int, piece: int) -> Array:
    """Rows of x cut in pieces: (strips, pieces, rows of a strip, ``piece``). With zeros, which make them whole."""
    rows, columns = x.shape
    strips = -(-rows // ROWS_OF_A_STRIP)
    strip = -(-rows // strips)
    if (strips * strip, width) != x.shape:
        given, x = x, np.zeros((strips * strip, width), np.float32)
        x[:rows, :columns] = given
    return np.ascontiguousarray(x.reshape(strips, strip, -1, piece).transpose(0, 2, 1, 3))


# ---- many rows of x


def _of_blocks(x: Array, w: _Weight, contract: int) -> Array | None:
    """``x @ w.T``, or ``x @ w``, by blocks of rows of the weight; None where scales are not usual."""
    length, width = len(w.codes), w.columns
    step = max(1, TILE // width)
    height = min(max(1, BLOCK // width), length)
    y = np.zeros((len(x), width if contract == 0 else length), np.float32)
    block, memory = np.empty((height, width), np.float32), threading.local()
    for first in range(0, length, height):
        last = min(first + height, length)

        def values(start: int, stop: int, first: int = first) -> bool:
            if not hasattr(memory, "spare"):
                memory.spare = _spare(w, step)
            for n in range(start, stop, step):
                e = min(n + step, stop)
                if not _are_usual(w, first + n, first + e):
                    return False
                _numbers(w, first + n, first + e, block[n:e], memory.spare)
                _apply(np.multiply, block[n:e], _scales_of_rows(w, first + n, first + e), w)
            return True

        part = block[: last - first]
        if not all(map_ranges(values, last - first, 1, part.size, 2)):
            return None
        if contract == 0:
            y += x[:, first:last] @ part
        elif len(x) <= serve.MOST_ROWS_ON_THE_RIGHT:
            y[:, first:last] = (part @ x.T).T
        else:
            np.matmul(x, part.T, out=y[:, first:last])
    return y
