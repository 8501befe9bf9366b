"""Loops for products of float32 with a small weight: its codes become floats once, which many rows of x meet.

Owns: those loops, and the numba intrinsic in them. Imports: ``decoding``, which makes the floats, ``turning``, and
``pool``. ``stored`` calls them, and says what they are for.

A *panel* is ``WIDTH`` rows of the weight as floats, turned so that those of one k lie side by side: two vectors. A tile
of the result is ``ROWS`` rows of x by a panel. For each k its two vectors are loaded, an entry of each row of x fills a
vector, and a fused step adds the products to the tile's sums, which stay in registers::

    sum[m, lane]  +=  panel[k, lane]  *  x[m, k]

So x is read as it lies, K may have any length, nothing is added across lanes, and a load meets several products, as in
BLAS. Terms are added up in chunks, and chunks in stretches: no term meets more than ``CHUNK`` + ``DEPTH`` / ``CHUNK`` +
K / ``DEPTH`` roundings. Of small products BLAS keeps many sums side by side, each of few terms: beside those a chain of
all K terms errs more than twice as much, and one of 32 at a time now and then.

What several threads do is cut by panels, and, where there are few of them, by rows of x, too: each thread makes the
panels it needs by itself, so that none fetches what another one wrote.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from aqt_lite.backends.cpu.decoding import LANES, counted_loop, dequantize_apart
from aqt_lite.backends.cpu.lines import on_lines
from aqt_lite.backends.cpu.native import task_of
from aqt_lite.backends.cpu.pool import in_parts
from aqt_lite.backends.cpu.turning import turn_apart

__all__ = ["ROWS", "WIDTH", "multiply_in_parts"]

VECTORS = 2
"""Of a panel, for each k."""

WIDTH = VECTORS * LANES
"""Rows of the weight in a panel."""

ROWS = 6
"""Rows of x in a tile: two sums for each vector of the result, those of a chunk and all before, fit 32 registers."""

CHUNK = 8
"""Terms that are added up before their sum joins those before it, in registers."""

DEPTH = 128
"""Terms whose sum joins those before it in memory."""

_INT, _ADDRESS, _FLOAT = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS: Any = ir.VectorType(_FLOAT, LANES)  # type: ignore[no-untyped-call]


@intrinsic  # type: ignore[untyped-decorator]
def _tile(
    _: Any, panel: Any, x: Any, x_stride: Any, there: Any, depth: Any, before: Any, before_stride: Any, added: Any,
    out: Any, out_stride: Any,
) -> Any:  # fmt: skip
    """``out[m, lane] = before[m, lane] + sum_k panel[k, lane] x[m, k] + added[lane]`` of ``depth`` terms, one at least.

    Addresses, strides in bytes, and how many rows of x there are: after the last of these that one again, which is
    written once more.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        panel, x, x_stride, there, depth, before, before_stride, added, out, out_stride = arguments
        of_fma = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
        fma = cgutils.get_or_insert_function(builder.module, of_fma, f"llvm.fma.v{LANES}f32")
        undefined, lanes = ir.Constant(_FLOATS, ir.Undefined), ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
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
            first = builder.mul(c, _ADDRESS(CHUNK))
            rest = builder.sub(depth, first)
            count = builder.select(builder.icmp_signed("<", rest, _ADDRESS(CHUNK)), rest, _ADDRESS(CHUNK))

            def step(i: Any, sums: list[Any]) -> list[Any]:
                k, new = builder.add(first, i), list[Any]()
                of_k = vectors(builder.add(panel, builder.mul(k, _ADDRESS(4 * WIDTH))))
                values = [builder.load(p, align=4) for p in of_k]
                for m, row in enumerate(rows):
                    one = builder.load(place(row, builder.mul(k, _ADDRESS(4)), _FLOAT), align=4)
                    entries = builder.shuffle_vector(builder.insert_element(undefined, one, _INT(0)), undefined, lanes)
                    new += [
                        builder.call(fma, [value, entries, sums[m * VECTORS + v]]) for v, value in enumerate(values)
                    ]
                return new

            sums = counted_loop(builder, count, [none] * len(totals), step)
            return [builder.fadd(total, of_chunk) for total, of_chunk in zip(totals, sums, strict=True)]

        chunks = builder.udiv(builder.add(depth, _ADDRESS(CHUNK - 1)), _ADDRESS(CHUNK))
        new = counted_loop(builder, chunks, [none] * (ROWS * VECTORS), chunk)
        sums_before = [p for start in of_rows(before, before_stride) for p in vectors(start)]
        new = [builder.fadd(builder.load(p, align=4), total) for p, total in zip(sums_before, new, strict=True)]
        more = [builder.load(p, align=4) for p in vectors(added)]  # no row is written before all have been read
        new = [builder.fadd(total, more[i % VECTORS]) for i, total in enumerate(new)]
        places = [p for start in of_rows(out, out_stride) for p in vectors(start)]
        for total, p in zip(new, places, strict=True):
            builder.store(total, p, align=4)
        return context.get_dummy_value()

    return types.void(*[types.intp] * 10), generate


@njit(nogil=True, cache=True)
def _multiply_rows(panel: Any, x: Any, first: Any, last: Any, bias: Any, y: Any) -> None:  # pragma: no cover - compiled
    """Rows ``first`` to ``last`` - 1 of x by a panel, into the columns of y: as many as the panel has, or fewer."""
    inner, by, here = x.shape[1], x.strides[0], y.shape[1]
    none, nothing, added = np.zeros(WIDTH, np.float32), np.full(WIDTH, np.float32(-0.0)), np.zeros(WIDTH, np.float32)
    added[:here] = bias
    aside = np.empty((ROWS if here < WIDTH else 0, WIDTH), dtype=np.float32)
    for m in range(first, last, ROWS):
        there = min(ROWS, last - m)
        out, out_stride = (
            (aside.ctypes.data, aside.strides[0]) if here < WIDTH else (y.ctypes.data + m * y.strides[0], y.strides[0])
        )
        before, before_stride = none.ctypes.data, 0
        for k in range(0, inner, DEPTH):
            ends = k + DEPTH >= inner
            _tile(
                panel.ctypes.data + 4 * WIDTH * k, x.ctypes.data + m * by + 4 * k, by, there, min(DEPTH, inner - k),
                before, before_stride, added.ctypes.data if ends else nothing.ctypes.data, out, out_stride,
            )  # fmt: skip
            before, before_stride = out, out_stride
        for r in range(there if here < WIDTH else 0):
            for n in range(here):
                y[m + r, n] = aside[r, n]


@njit(nogil=True)
def _part(given: Any, start: Any, stop: Any) -> None:  # pragma: no cover - compiled
    """Of every panel ``cuts`` stretches of rows of x, one after the other: those from ``start`` to ``stop`` - 1."""
    w, x, inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, bias, cuts, served, y = given
    length, rows, made = w.shape[0], x.shape[0], -1
    values, panel = on_lines(WIDTH, inner, np.float32), on_lines(inner, WIDTH, np.float32)
    tiles = (rows + ROWS - 1) // ROWS
    for unit in range(start, stop):
        nth, cut = unit // cuts, unit % cuts
        first = nth * WIDTH
        last = min(first + WIDTH, length)
        if nth != made:
            made = nth
            if not dequantize_apart((
                w[first:last], inner, kind, flip, table, scale, codes_of_scales, of_scales, zero, size, first,
                values[: last - first],
            )):  # fmt: skip
                served[0] = False
            values[last - first :] = 0
            turn_apart((values, 0, inner, panel))
        begin, end = tiles * cut // cuts * ROWS, min(tiles * (cut + 1) // cuts * ROWS, rows)
        _multiply_rows(panel, x, begin, end, bias[first:last], y[:, first:last])


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
