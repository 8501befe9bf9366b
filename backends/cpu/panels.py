"""Loops for products of float32 with a weight whose codes become floats once, which many rows of x meet.

Owns: those loops, and the numba intrinsic in them. Imports: ``decoding``, which makes the floats, ``turning``, and
``pool``. ``stored`` and JAX's products call them, and say what they are for.

A *panel* is ``WIDTH`` rows of the weight, and of long ones ``MADE`` codes of each, as floats, turned so that those of
one k lie side by side: two vectors. All rows of x meet it before the next is made: it stays in a cache however long a
row is. A tile of the result is ``ROWS`` rows of x by a panel. For each k its two vectors are loaded, an entry of each
row of x fills a vector, and a fused step adds the products to the tile's sums, which stay in registers::

    sum[m, lane]  +=  panel[k, lane]  *  x[m, k]

So x is read as it lies, K may have any length, nothing is added across lanes, and a load meets several products, as in
BLAS.

Terms are added up in chunks, and chunks in stretches: no term meets more than ``CHUNK`` + ``DEPTH`` / ``CHUNK`` +
K / ``DEPTH`` roundings. Of small products BLAS keeps many sums side by side, each of few terms: beside those a chain of
all K terms errs more than twice as much, and one of 32 at a time now and then; beside its long ones 32 do.

What several threads do is cut by panels, and, where there are few of them, by rows of x, too: each thread makes the
panels it needs by itself, so that none fetches what another one wrote. No cut changes a bit of the result.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from aqt_lite.backends.cpu.decoding import LANES, dequantize_apart, width_of
from aqt_lite.backends.cpu.emit import counted_loop, in_all_lanes
from aqt_lite.backends.cpu.lines import on_lines
from aqt_lite.backends.cpu.native import apart, task_of
from aqt_lite.backends.cpu.pool import in_parts
from aqt_lite.backends.cpu.turning import turn_apart

__all__ = ["ROWS", "WIDTH", "depth_of", "multiply_apart", "multiply_in_parts"]

VECTORS = 2
"""Of a panel, for each k."""

WIDTH = VECTORS * LANES
"""Rows of the weight in a panel."""

ROWS = 6
"""Rows of x in a tile: two sums for each vector of the result, those of a chunk and all before, fit 32 registers."""

SHORT = 1024
"""Terms of a sum that BLAS may cut into many short ones."""

CHUNK, CHUNK_OF_MANY = 8, 32
"""Terms that are added up before their sum joins those before it, in registers: of so short a sum, and of others."""

DEPTH, DEPTH_OF_MANY = 128, 512
"""Terms whose sum joins those before it in memory, likewise: after an outlier few are to round its sum."""

MADE = 2048
"""Codes of a row that become floats at a time, where groups allow: a panel of 256 KB, which the second cache holds."""

ROWS_AT_ONCE = 512
"""Rows of x, or half as many more, that meet panels before these are made anew: the third cache is to hold them."""

PAST = 16
"""Bytes that are read after a row's codes, where there are as many: a vector of codes ends beyond them."""

_INT, _ADDRESS, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS: Any = ir.VectorType(_FLOAT, LANES)  # type: ignore[no-untyped-call]


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    _: Any, panel: Any, x: Any, x_stride: Any, there: Any, depth: Any, at_once: Any, before: Any, before_stride: Any,
    added: Any, out: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """``out[m, lane] = before[m, lane] + sum_k panel[k, lane] x[m, k] + added[lane]`` of ``depth`` terms, one at least.

    Addresses, strides in bytes, and how many rows of x there are: after the last of these that one again, which is
    written once more.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, x, x_stride, there, depth, at_once, before, before_stride, added, out, out_stride = arguments
        of_fma = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        fma = cgutils.get_or_insert_function(builder.module, of_fma, f"llvm.fma.v{LANES}f32")
        last = builder.sub(there, _ADDRESS(1))
        nth = [builder.select(builder.icmp_signed("<", _ADDRESS(m), last), _ADDRESS(m), last) for m in range(ROWS)]

        def place(base: Any, offset: Any, kind: Any) -> Any:
            return builder.inttoptr(builder.add(base, offset), kind.as_pointer())

        def vectors(base: Any) -> list[Any]:
            return [place(base, _ADDRESS(4 * LANES * v), _FLOATS) for v in range(VECTORS)]

        def of_rows(base: Any, stride: Any) -> list[Any]:
            return [builder.add(base, builder.mul(m, stride)) for m in nth]

        rows, none = of_rows(x, x_stride), ir.Constant(_FLOATS, None)

        def chunk(c: Any, totals: list[Any]) -> list[Any]:
            first = builder.mul(c, at_once)
            rest = builder.sub(depth, first)
            count = builder.select(builder.icmp_signed("<", rest, at_once), rest, at_once)

            def step(i: Any, sums: list[Any]) -> list[Any]:
                k, new = builder.add(first, i), list[Any]()
                of_k = vectors(builder.add(panel, builder.mul(k, _ADDRESS(4 * WIDTH))))
                values = [builder.load(p, align=4) for p in of_k]
                for m, row in enumerate(rows):
                    one = builder.load(place(row, builder.mul(k, _ADDRESS(4)), _FLOAT), align=4)
                    entries = in_all_lanes(builder, one, _FLOATS)
                    new += [
                        builder.call(fma, [value, entries, sums[m * VECTORS + v]]) for v, value in enumerate(values)
                    ]
                return new

            sums = counted_loop(builder, count, [none] * len(totals), step)
            return [builder.fadd(total, of_chunk) for total, of_chunk in zip(totals, sums, strict=True)]

        chunks = builder.udiv(builder.sub(builder.add(depth, at_once), _ADDRESS(1)), at_once)
        new = counted_loop(builder, chunks, [none] * (ROWS * VECTORS), chunk)
        sums_before = [p for start in of_rows(before, before_stride) for p in vectors(start)]
        new = [builder.fadd(builder.load(p, align=4), total) for p, total in zip(sums_before, new, strict=True)]
        more = [builder.load(p, align=4) for p in vectors(added)]  # no row is written before all have been read
        new = [builder.fadd(total, more[i % VECTORS]) for i, total in enumerate(new)]
        places = [p for start in of_rows(out, out_stride) for p in vectors(start)]
        for total, p in zip(new, places, strict=True):
            builder.store(total, p, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 11), generate


@njit(nogil=True, cache=True)
def depth_of(inner: Any, size: Any) -> Any:  # pragma: no cover - compiled
    """Codes of a row whose floats are made at a time: whole vectors, of whole groups or of a part of one."""
    most, whole = (inner + LANES - 1) // LANES * LANES, size
    if size >= inner or size % MADE == 0:
        return min(MADE, most)
    while whole % LANES:
        whole += size
    return min(max(MADE // whole, 1) * whole, most)


@njit(nogil=True, cache=True)
def _part_of(blocks: Any, start: Any, stop: Any, first: Any, last: Any) -> Any:  # pragma: no cover - compiled
    """A copy of columns ``first`` to ``last`` - 1 of rows ``start`` to ``stop`` - 1, or of what all have."""
    rows, columns = blocks.shape
    if rows == 0:
        return blocks
    if rows == 1:
        start, stop = 0, 1
    if columns == 1:
        first, last = 0, 1
    out = np.empty((stop - start, last - first), dtype=blocks.dtype)
    for n in range(stop - start):
        its_own, row = out[n], blocks[start + n, first:last]  # sliced, or no vectors are copied
        for i in range(its_own.shape[0]):
            its_own[i] = row[i]
    return out


@njit(nogil=True, cache=True)
def _make(
    w: Any, inner: Any, kind: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any, of_scales: Any, zero: Any,
    size: Any, first_row: Any, k: Any, depth: Any, values: Any, panel: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """The panel of codes ``k`` to ``k + depth - 1`` of some rows; whether ``dequantize`` serves them.

    They are a weight of their own, for which they are copied: codes are few bytes beside floats.
    """
    width, rows, count = width_of(kind, table.reshape(-1)), w.shape[0], min(depth, inner - k)
    some = _part_of(w, 0, rows, k * width // 8, min(((k + count) * width + 7) // 8 + PAST, w.shape[1]))
    these = first_row, first_row + rows, k // size, (k + count - 1) // size + 1
    floats = values[: WIDTH * count].reshape(WIDTH, count)
    served = dequantize_apart((
        some, count, kind, flip, table, _part_of(scale, *these), _part_of(codes_of_scales, *these), of_scales,
        _part_of(zero, *these), min(size, depth), 0, floats[:rows],
    ))  # fmt: skip
    floats[rows:] = 0
    turn_apart((floats, 0, count, panel))
    return served


@njit(nogil=True, cache=True)
def _add_panel(
    panel: Any, x: Any, first: Any, count: Any, at_once: Any, begins: Any, added: Any, y: Any
) -> None:  # pragma: no cover - compiled
    """What ``count`` codes of each row, from the ``first`` on, and something at the end, add to y, or begin it with."""
    depth = DEPTH if at_once == CHUNK else DEPTH_OF_MANY
    nothing, none = np.full(WIDTH, np.float32(-0.0)), np.zeros(WIDTH, np.float32)
    for m in range(0, x.shape[0], ROWS):
        out = y.ctypes.data + m * y.strides[0]
        for k in range(0, count, depth):
            before, of_before = (none.ctypes.data, 0) if begins and k == 0 else (out, y.strides[0])
            _tile(
                panel.ctypes.data + 4 * WIDTH * k, x.ctypes.data + m * x.strides[0] + 4 * (first + k), x.strides[0],
                min(ROWS, x.shape[0] - m), min(depth, count - k), at_once, before, of_before,
                added.ctypes.data if k + depth >= count else nothing.ctypes.data, out, y.strides[0],
            )  # fmt: skip


@njit(nogil=True, cache=True)
def multiply(
    w: Any, x: Any, inner: Any, kind: Any, flip: Any, table: Any, scale: Any, codes_of_scales: Any, of_scales: Any,
    zero: Any, size: Any, first_row: Any, bias: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``y[m, n] = sum_k (number[n, k] - zero[n, g]) * scale[n, g] x[m, k] + bias[n]``; whether that holds.

    Operands and answer are those of ``decoding.dequantize``: rows of w are those from ``first_row`` on of the scales.
    """
    length, depth, served = w.shape[0], depth_of(inner, size), True
    at_once = CHUNK if inner <= SHORT else CHUNK_OF_MANY
    panel, values = on_lines(depth, WIDTH, np.float32), on_lines(1, WIDTH * depth, np.float32)[0]
    added = np.empty(WIDTH, dtype=np.float32)
    total, tiles = x.shape[0], (x.shape[0] + ROWS - 1) // ROWS
    stretches = max((total + ROWS_AT_ONCE // 2) // ROWS_AT_ONCE, 1)
    aside = on_lines(min(total, 2 * ROWS_AT_ONCE) if length % WIDTH else 0, WIDTH, np.float32)
    for stretch in range(stretches):
        top, end = tiles * stretch // stretches * ROWS, min(tiles * (stretch + 1) // stretches * ROWS, total)
        for first in range(0, length, WIDTH):
            here, sums = min(WIDTH, length - first), y[top:end, first : first + WIDTH]
            some = sums if here == WIDTH else aside[: end - top]  # of a panel that is not full
            added[:] = np.float32(-0.0)
            for k in range(0, inner, depth):
                count = min(depth, inner - k)
                served &= _make(
                    w[first : first + here], inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size,
                    first_row + first, k, depth, values, panel[:count],
                )  # fmt: skip
                if k + depth >= inner:
                    added[:here] = bias[first : first + here]
                _add_panel(panel, x[top:end], k, count, at_once, k == 0, added, some)
            if here < WIDTH:
                for m in range(sums.shape[0]):
                    for n in range(here):
                        sums[m, n] = some[m, n]
    return served


multiply_apart = apart(
    multiply,
    *(
        f"boolean(uint8[:,::1], float32[:,::1], int64, int64, int64, float32[{table}], float32[:,::1], uint8[:,::1], "
        "float32[::1], int32[:,::1], int64, int64, float32[::1], float32[:,:])"
        for table in ("::1", ":,::1")
    ),
)


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """Of every panel ``cuts`` stretches of rows of x, one after the other: those from ``start`` to ``stop`` - 1."""
    w, x, inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, bias, cuts, served, y = given
    tiles = (x.shape[0] + ROWS - 1) // ROWS
    unit = start
    while unit < stop:
        panel, cut = unit // cuts, unit % cuts
        # stretches of one panel, or, where each is all rows, as many panels as there are
        following = stop if cuts == 1 else min((panel + 1) * cuts, stop)
        stretches = 1 if cuts == 1 else following - unit
        first, last = panel * WIDTH, min(((following - 1) // cuts + 1) * WIDTH, w.shape[0])
        begin, end = tiles * cut // cuts * ROWS, min(tiles * (cut + stretches) // cuts * ROWS, x.shape[0])
        if not multiply_apart((
            w[first:last], x[begin:end], inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, first,
            bias[first:last], y[begin:end, first:last],
        )):  # fmt: skip
            served[0] = False
        unit = following


_task = task_of(_part)


@njit(nogil=True, cache=True)
def multiply_in_parts(
    pool: Any, ends: Any, w: Any, x: Any, inner: Any, kind: Any, flip: Any, table: Any, scale: Any,
    codes_of_scales: Any, of_scales: Any, zero: Any, size: Any, bias: Any, cuts: Any, y: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """``y[m, n] = sum_k (number[n, k] - zero[n, g]) * scale[n, g] x[m, k] + bias[n]``; whether that holds.

    Operands and answer are those of ``decoding.dequantize``. ``ends`` count stretches of rows of x, ``cuts`` for each
    panel, on the threads of a pool.
    """
    served = np.ones(1, dtype=np.bool_)
    given = (
        w, x, inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, bias, cuts, served, y
    )  # fmt: skip
    in_parts(pool, ends, _task(given))
    return served[0]
