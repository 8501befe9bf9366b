"""Loops for products of float32 with a weight that lies (in, out): sums of outer products with its rows, in a cache.

Owns: those loops, and the numba intrinsic in them. Imports: ``decoding``, which makes the floats, and ``pool``.
``in_out`` calls them, and says what they are for.

A row of such a weight is what one entry of each row of x meets. A *block* is some rows as floats, which the second
cache holds. A tile of the result is up to ``ROWS`` rows of x by ``VECTORS`` vectors of columns: for each row of the
block its vectors are loaded, an entry of each row of x fills a vector, and a fused step adds their products to the
tile's sums, which stay in registers until the block ends::

    sum[m, lane]  +=  block[k, lane]  *  x[m, k]

Few rows of x do not wait for a block: codes of 8 bits and of 4 become numbers in registers, for every few rows anew
(``decoding``: ``bytes_across`` and others). In both, nothing is turned, codes are read in the order in which they lie,
and no sum crosses lanes. Parts of K have sums of their own, which are added up at the end: threads take one part after
the other, and how many parts there are, and with that every bit of the result, is a matter of shapes alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from aqt_lite.backends.cpu.decoding import (
    HALVES,
    IN_A_TILE,
    LANES,
    LARGE,
    as_floats,
    bytes_across,
    bytes_of_columns,
    dequantize_apart,
    dequantize_columns_apart,
    doubling_of,
    halves_across,
    halves_of_columns,
    largest,
    looked_up,
)
from aqt_lite.backends.cpu.decoding import ROWS as MOST_IN_REGISTERS
from aqt_lite.backends.cpu.emit import counted_loop, in_all_lanes
from aqt_lite.backends.cpu.lines import on_lines
from aqt_lite.backends.cpu.native import apart, task_of
from aqt_lite.backends.cpu.pool import in_parts

__all__ = ["MOST_IN_REGISTERS", "add_few_apart", "add_many_apart", "add_up", "multiply_in_parts", "width_of_sums"]

VECTORS = IN_A_TILE // LANES
"""Of a tile, for each k."""

ROWS = 6
"""Rows of x in a tile, at most: its sums, a row's vectors and an entry of x fit the registers."""

BLOCK = 1 << 16
"""Floats of a block, at most: 256 KB."""

DEPTH = 32
"""Rows of the weight, or fewer, whose products are added up before their sum joins those of others in memory."""

_INT, _ADDRESS, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS: Any = ir.VectorType(_FLOAT, LANES)  # type: ignore[no-untyped-call]


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    _: Any, rows: Any, block: Any, block_stride: Any, depth: Any, x: Any, x_stride: Any, out: Any, out_stride: Any
) -> Any:
    """``out[m, lane] += sum_k block[k, lane] x[m, k]`` of ``depth`` terms, one at least, for ``rows`` rows of x.

    Addresses, and strides in bytes.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        there, *others = arguments
        for rows in range(1, ROWS + 1):
            with builder.if_then(builder.icmp_signed("==", there, _ADDRESS(rows))):
                _tile_of(rows, builder, *others)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 8), generate


def _tile_of(
    rows: int, builder: Any, block: Any, block_stride: Any, depth: Any, x: Any, x_stride: Any, out: Any, out_stride: Any
) -> None:
    of_fma = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    fma = cgutils.get_or_insert_function(builder.module, of_fma, f"llvm.fma.v{LANES}f32")

    def place(base: Any, offset: Any, kind: Any) -> Any:
        return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

    def vectors(base: Any) -> list[Any]:
        return [place(base, _ADDRESS(4 * LANES * v), _FLOATS) for v in range(VECTORS)]

    of_x, of_out = (
        [builder.add(base, builder.mul(_ADDRESS(m), stride)) for m in range(rows)]
        for base, stride in ((x, x_stride), (out, out_stride))
    )

    def step(k: Any, sums: list[Any]) -> list[Any]:
        values = [builder.load(p, align=4) for p in vectors(builder.add(block, builder.mul(k, block_stride)))]
        new = list[Any]()
        for m, row in enumerate(of_x):
            one = builder.load(place(row, builder.mul(k, _ADDRESS(4)), _FLOAT), align=4)
            entries = in_all_lanes(builder, one, _FLOATS)
            new += [builder.call(fma, [value, entries, sums[m * VECTORS + v]]) for v, value in enumerate(values)]
        return new

    sums = counted_loop(builder, depth, [ir.Constant(_FLOATS, None)] * (rows * VECTORS), step)
    for total, p in zip(sums, [p for start in of_out for p in vectors(start)], strict=True):
        builder.store(builder.fadd(builder.load(p, align=4), total), p, align=4)


@njit(nogil=True, cache=True)
def width_of_sums(columns: Any) -> Any:
    """Floats of a row of sums, or of a block: whole tiles, and an odd number of vectors, so that a cache holds all."""
    tiles = (columns + VECTORS * LANES - 1) // (VECTORS * LANES)  # pragma: no cover - compiled
    return (tiles * VECTORS + 1) * LANES


@njit(nogil=True, cache=True)
def _add(block: Any, count: Any, x: Any, first: Any, columns: Any, sums: Any) -> None:  # pragma: no cover - compiled
    """What ``count`` rows of a block add, of which entry ``first`` of rows of x meets the first."""
    rows, by, to_next = x.shape[0], x.strides[0], sums.strides[0]
    for n in range(0, columns, VECTORS * LANES):
        for m in range(0, rows, ROWS):
            _tile(
                min(ROWS, rows - m), block.ctypes.data + 4 * n, block.strides[0], count,
                x.ctypes.data + m * by + 4 * first, by, sums.ctypes.data + m * to_next + 4 * n, to_next,
            )  # fmt: skip


@njit(nogil=True, cache=True)
def _in_order_of_values(of_columns: Any, kind: Any, out: Any) -> None:  # pragma: no cover - compiled
    """What columns have, in the order of a tile's: of ``HALVES`` a vector of those at even positions, one of others."""
    columns = of_columns.shape[0]
    if kind != HALVES:
        for n in range(columns):
            out[n] = of_columns[n]
        return
    whole = columns - columns % (2 * LANES)
    for n in range(0, whole, 2 * LANES):
        for i in range(LANES):
            out[n + i] = of_columns[n + 2 * i]
            out[n + LANES + i] = of_columns[n + 2 * i + 1]
    for n in range(whole, columns):
        out[whole + n % 2 * LANES + (n - whole) // 2] = of_columns[n]


@njit(nogil=True, cache=True)
def _add_few(
    w: Any, x: Any, columns: Any, kind: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any, of_scales: Any,
    zero: Any, size: Any, by_columns: Any, start: Any, stop: Any, sums: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """What rows ``start`` to ``stop`` - 1 of the weight add to the sums of few rows of x, numbers made in registers.

    The answer is that of ``dequantize``.
    """
    coded, shifted, rows, width = of_scales.shape[0] > 0, zero.shape[0] > 0, x.shape[0], sums.shape[1]
    groups, high = (columns, 1) if by_columns else ((columns + size - 1) // size, DEPTH)
    numbers, zeros = np.empty((high, groups), dtype=np.float32), np.zeros((high, groups), dtype=np.float32)
    factors, points = np.zeros(width, dtype=np.float32), np.zeros(width, dtype=np.float32)
    bits, whole = 4 if kind == HALVES else 8, columns - columns % IN_A_TILE
    rest = np.zeros((DEPTH if whole < columns else 0, IN_A_TILE * bits // 8), dtype=np.uint8)
    kept = codes_of_scales.shape[0] if coded else scale.shape[0]
    doubling, most, group = doubling_of(of_scales), np.uint32(0), -1
    s, s_by, z, z_by = numbers.ctypes.data, 0, zeros.ctypes.data, 0
    k = start
    while k < stop:
        last = min(k + DEPTH, stop)
        first, count = k, last - k
        if by_columns:
            first, count = k // size, 1
            last = min(last, (first + 1) * size)
        if first != group:
            group, several = first, kept > 1
            a, b = (first, first + count) if several else (0, 1)
            s, s_by = numbers.ctypes.data, numbers.strides[0] if several else 0
            if coded:
                looked_up(codes_of_scales[a:b], of_scales, doubling, numbers[: b - a])
                most = max(most, largest(numbers[: b - a].view(np.uint32), np.uint32(1 << 31), np.uint32(0)))
            else:
                most = max(most, largest(scale[a:b].view(np.uint32), np.uint32(1 << 31), np.uint32(1)))
                s, s_by = scale.ctypes.data + a * scale.strides[0], scale.strides[0] if several else 0
            if by_columns and not coded:
                numbers[0] = scale[a]
            if shifted:
                a, b = (first, first + count) if zero.shape[0] > 1 else (0, 1)
                if not as_floats(zero[a:b], np.int32(flip), zeros[: b - a]):
                    return False
                z_by = zeros.strides[0] if zero.shape[0] > 1 else 0
            if by_columns:
                _in_order_of_values(numbers[0], kind, factors)
                if shifted:
                    _in_order_of_values(zeros[0], kind, points)
                s, s_by, z, z_by = factors.ctypes.data, 0, points.ctypes.data, 0
        for r in range(last - k if whole < columns else 0):
            codes, out = w[k + r, whole * bits // 8 :], rest[r]
            for i in range(codes.shape[0]):
                out[i] = codes[i]
        for n in range(0, columns, IN_A_TILE):
            at, by = w.ctypes.data + k * w.strides[0] + n * bits // 8, w.strides[0]
            if n == whole:
                at, by = rest.ctypes.data, rest.strides[0]
            for m in range(0, rows, MOST_IN_REGISTERS):
                there, to_next = min(MOST_IN_REGISTERS, rows - m), sums.strides[0]
                entries, out_at = x.ctypes.data + m * x.strides[0] + 4 * k, sums.ctypes.data + m * to_next + 4 * n
                if kind == HALVES and by_columns:
                    halves_of_columns(
                        there, at, by, last - k, entries, x.strides[0], s, s_by, z, z_by, table.ctypes.data, flip, n,
                        size, groups, out_at, to_next,
                    )  # fmt: skip
                elif kind == HALVES:
                    halves_across(
                        there, at, by, last - k, entries, x.strides[0], s, s_by, z, z_by, table.ctypes.data, flip, n,
                        size, groups, out_at, to_next,
                    )  # fmt: skip
                elif by_columns:
                    bytes_of_columns(
                        there, at, by, last - k, entries, x.strides[0], s, s_by, z, z_by, table.ctypes.data, flip, n,
                        size, groups, out_at, to_next,
                    )  # fmt: skip
                else:
                    bytes_across(
                        there, at, by, last - k, entries, x.strides[0], s, s_by, z, z_by, table.ctypes.data, flip, n,
                        size, groups, out_at, to_next,
                    )  # fmt: skip
        k = last
    return most < LARGE


@njit(nogil=True, cache=True)
def _add_many(
    w: Any, x: Any, columns: Any, kind: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any, of_scales: Any,
    zero: Any, size: Any, by_columns: Any, start: Any, stop: Any, sums: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """The same of any number of rows of x, by blocks of floats."""
    served, height = True, min(max(BLOCK // sums.shape[1], 1), DEPTH)
    block = on_lines(height, sums.shape[1], np.float32)
    block[:] = 0
    for k in range(start, stop, height):
        last = min(k + height, stop)
        told = (
            w[k:last], columns, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, k, block[: last - k]
        )  # fmt: skip
        served &= dequantize_columns_apart(told) if by_columns else dequantize_apart(told)
        _add(block, last - k, x, k, columns, sums)
    return served


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """Rows ``start`` to ``stop`` - 1 of the weight, whose sums are some of many: one for ``each`` of them."""
    (
        w, x, columns, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, by_columns, few, each, served,
        sums,
    ) = given  # fmt: skip
    for first in range(start, stop, each):
        own = sums[first // each]
        own[:] = 0
        told = (
            w, x, columns, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, by_columns, first,
            min(first + each, stop), own,
        )  # fmt: skip
        small = True
        if table.ndim == 1:  # by itself, as numba asks for: what does not hold is not compiled  # noqa: SIM102
            if few:
                small = add_few_apart(told)
        if not few:
            small = add_many_apart(told)
        if not small:
            served[0] = False


_OPERANDS = (
    "uint8[:,::1], float32[:,::1], int64, int64, int64, float32[{}], float32[:,::1], uint8[:,::1], float32[::1], "
    "int32[:,::1], int64, boolean, int64, int64, float32[:,::1]"
)
add_few_apart = apart(_add_few, f"boolean({_OPERANDS.format('::1')})")
add_many_apart = apart(_add_many, *(f"boolean({_OPERANDS.format(table)})" for table in ("::1", ":,::1")))
_task = task_of(_part)


@njit(nogil=True, cache=True)
def multiply_in_parts(
    pool: Any, ends: Any, w: Any, x: Any, columns: Any, kind: Any, flip: Any, table: Any, scale: Any,
    codes_of_scales: Any, of_scales: Any, zero: Any, size: Any, by_columns: Any, few: Any, each: Any, sums: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``sum over p of sums[p, m, n] = sum_k value[k, n] x[m, k]``; whether that holds.

    Operands and answer are those of ``decoding.dequantize``, or, ``by_columns``, of ``dequantize_columns``. ``few``:
    whether numbers are made in registers, for each ``MOST_IN_REGISTERS`` rows of x anew; columns lie in the order of
    values then. ``ends`` are those of rows of the weight that one thread takes, ``each`` of them, but for the last.
    """
    served = np.ones(1, dtype=np.bool_)
    given = (
        w, x, columns, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, by_columns, few, each, served,
        sums,
    )  # fmt: skip
    in_parts(pool, ends, _task(given))
    return served[0]


@njit(nogil=True, cache=True)
def add_up(sums: Any, first: Any, kind: Any, few: Any, bias: Any, y: Any) -> None:  # pragma: no cover - compiled
    """``y[m, n] = sum over p of sums[p, first + m, n] + bias[n]``, in the order of columns again."""
    columns = y.shape[1]
    for m in range(y.shape[0]):
        total, row = sums[0, first + m], y[m]
        for p in range(1, sums.shape[0]):
            for n in range(total.shape[0]):
                total[n] += sums[p, first + m, n]
        if few and kind == HALVES:
            whole = columns - columns % (2 * LANES)
            for n in range(0, whole, 2 * LANES):
                for i in range(LANES):
                    row[n + 2 * i] = total[n + i] + bias[n + 2 * i]
                    row[n + 2 * i + 1] = total[n + LANES + i] + bias[n + 2 * i + 1]
            for n in range(whole, columns):
                row[n] = total[whole + n % 2 * LANES + (n - whole) // 2] + bias[n]
        else:
            for n in range(columns):
                row[n] = total[n] + bias[n]
