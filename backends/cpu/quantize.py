"""Quantization and back: a block at a time, while it is in cache, on every core.

Owns: the forms of ``affine.quantize`` and ``affine.dequantize`` for NumPy arrays, whose bits are those of ``affine``.
Imports: ``affine``, the runtime, and ``serve``, which says what each is for.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from aqt_lite import affine
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Spec
from aqt_lite.backends.cpu import runtime, serve
from aqt_lite.backends.cpu.runtime import BLOCK, CHUNKS_PER_CORE, LARGE, aligned_empty, map_ranges
from aqt_lite.granularity import grid_of

__all__ = ["dequantize", "quantize"]


def quantize(x: Array, *, spec: Spec) -> Any:
    """``affine.quantize`` with every core, block by block: one pass over memory, or two where a scale spans blocks."""
    if 0 in x.shape:
        return NotImplemented
    grid, result = grid_of(x.shape, spec.block), NotImplemented
    if serve.float32_as_it_lies(x, spec):
        rows, fixed_zero = serve.rows_of_one_scale(x, grid, spec.block), serve.has_fixed_zero(spec)
        if rows is not None and rows[0] == 1 and not (fixed_zero and x.size <= BLOCK):
            result = _quantize_spanning(x.reshape(-1), grid, spec)
        elif serve.one_scale_an_index_of_the_last_axis(x.shape, grid):
            result = _quantize_spanning(x.reshape(-1, x.shape[-1]), grid, spec)
        elif rows is not None and rows[1] >= serve.SHORTEST_ROW and fixed_zero:
            result = _quantize_rows(x.reshape(rows), grid, spec)
    if result is NotImplemented and x.size >= LARGE and grid[0] > 1:
        result = _quantize_slabs(x, grid, spec)
    if result is NotImplemented:
        return result
    codes, scale, zero_point = result
    return codes.reshape(x.shape), scale, zero_point


def _quantize_rows(x: Array, grid: tuple[int, ...], spec: Spec) -> Any:
    """A scale for each row, symmetric."""
    rows, width = x.shape
    codes = aligned_empty(x.shape, spec.element.storage)
    scale = aligned_empty((rows, 1), np.float32)
    factor = np.float32(affine.inverse_of_range(spec))
    loops = runtime.compiled_loops() if x.size >= LARGE else None

    def work(start: int, stop: int) -> bool:
        if loops is not None:
            return bool(loops.quantize_rows(x[start:stop], factor, codes[start:stop], scale[start:stop, 0]))
        height = max(1, BLOCK // width)
        scratch = np.empty((min(height, stop - start), width), dtype=np.float32)
        finite = True
        for n in range(start, stop, height):
            e = min(n + height, stop)
            buffer, values, s = scratch[: e - n], x[n:e], scale[n:e]
            np.abs(values, out=buffer)
            np.maximum.reduce(buffer, axis=1, keepdims=True, out=s)
            finite = finite and bool(np.isfinite(s).all())
            s[s < spec.source.tiny] = 0
            s *= factor
            s[s < spec.source.tiny] = 1
            np.multiply(values, np.float32(1) / s, out=buffer)
            np.rint(buffer, out=buffer)
            np.copyto(codes[n:e], buffer, casting="unsafe")
        return finite

    if not all(map_ranges(work, rows, 1, x.size, 1 if loops is None else CHUNKS_PER_CORE)):
        return NotImplemented  # the reference knows what becomes of NaN and infinities
    return codes, scale.reshape(grid), None


def _quantize_spanning(x: Array, grid: tuple[int, ...], spec: Spec) -> Any:
    """A scale for each column, or one for all of a vector: extrema of blocks of rows, then calibration, then codes."""
    height = max(1, BLOCK // math.prod(x.shape[1:]))

    def extrema(start: int, stop: int) -> tuple[Array, Array]:
        lows, highs = [], []
        for n in range(start, stop, height):
            part = x[n : min(n + height, stop)]
            lows.append(part.min(axis=0))
            highs.append(part.max(axis=0))
        return np.min(lows, axis=0), np.max(highs, axis=0)

    found = map_ranges(extrema, len(x), 1, x.size)
    ends = np.stack([np.min([lo for lo, _ in found], axis=0), np.max([hi for _, hi in found], axis=0)])
    ends = ends.reshape(2, -1)
    if not np.isfinite(ends).all():
        return NotImplemented
    a_column = affine.Spec(spec.element, spec.source, spec.symmetric, (None, 1))
    with np.errstate(all="ignore"):
        scale, zero_point = affine.choose_qparams(ends, spec=a_column, b=get_backend("numpy"))
        inverse = np.float32(1) / scale[0]
    zero = None if zero_point is None else zero_point[0].astype(np.float32)
    codes = aligned_empty(x.shape, spec.element.storage)
    qmin, qmax = (np.float32(q) for q in spec.code_range)

    loops = runtime.compiled_loops() if x.size >= LARGE else None
    width = x.shape[1] if x.ndim == 2 else math.gcd(x.size, 1 << 12)  # one scale in all: any cut into rows will do
    if loops is not None and width >= serve.SHORTEST_ROW_TO_ENCODE:
        table, out = x.reshape(-1, width), codes.reshape(-1, width)
        inverses = np.ascontiguousarray(np.broadcast_to(inverse, (width,)))
        zeros = np.ascontiguousarray(np.broadcast_to(np.float32(0) if zero is None else zero, (width,)))
        map_ranges(
            lambda lo, hi: loops.encode_columns(table[lo:hi], inverses, zeros, qmin, qmax, out[lo:hi]),
            len(table),
            chunks_per_core=CHUNKS_PER_CORE,
        )
        return codes, scale.reshape(grid), None if zero_point is None else zero_point.reshape(grid)

    def encode(start: int, stop: int) -> None:
        scratch = np.empty((min(height, stop - start), *x.shape[1:]), dtype=np.float32)
        for n in range(start, stop, height):
            e = min(n + height, stop)
            buffer = scratch[: e - n]
            np.multiply(x[n:e], inverse, out=buffer)
            np.rint(buffer, out=buffer)
            if zero is not None:
                np.add(buffer, zero, out=buffer)
                np.clip(buffer, qmin, qmax, out=buffer)
            np.copyto(codes[n:e], buffer, casting="unsafe")

    map_ranges(encode, len(x), 1, x.size)
    zero_point = None if zero_point is None else zero_point.reshape(grid)
    return codes, scale.reshape(grid), zero_point


def _quantize_slabs(x: Array, grid: tuple[int, ...], spec: Spec) -> Any:
    """The reference itself on slabs of the first axis, none cutting a block: for every type, scheme and layout."""
    group = spec.block[0] or 1
    height = -(-max(1, BLOCK // 4 * x.shape[0] // x.size) // group) * group
    codes = aligned_empty(x.shape, spec.element.storage)
    scale = aligned_empty(grid, spec.source.compute)
    zero_point = None if serve.has_fixed_zero(spec) else aligned_empty(grid, np.int32)

    def work(start: int, stop: int) -> None:
        for n in range(start, stop, height):
            e = min(n + height, stop)
            g = slice(n // group, -(-e // group))
            codes[n:e], scale[g], zeros = affine.quantize(x[n:e], spec=spec, b=get_backend("numpy"))
            if zero_point is not None:
                zero_point[g] = zeros

    map_ranges(work, x.shape[0], group)
    return codes, scale, zero_point


def dequantize(codes: Array, scale: Array, zero_point: Array | None, *, spec: Spec, out: str) -> Any:
    """``affine.dequantize`` to float32 where blocks are contiguous."""
    if not (spec.source.name == out == "float32"):
        return NotImplemented
    rows = serve.rows_of_one_scale(codes, scale.shape, spec.block)
    if rows is None or codes.size < LARGE:
        return NotImplemented
    if rows[0] == 1:  # any cut will do
        width = 1 << 12
        if codes.size % width:
            return NotImplemented
        rows = codes.size // width, width
    flat = codes.reshape(rows)
    values = aligned_empty(rows, np.float32)
    s = np.broadcast_to(scale.reshape(-1, 1), (rows[0], 1))
    z = None if zero_point is None else np.broadcast_to(zero_point.reshape(-1, 1), (rows[0], 1))
    # (q - z) * s is at most 65535 * s: beyond float32 only for scales that are not usual
    may_overflow = bool((scale > spec.source.max / (1 << 17)).any())
    height = max(1, BLOCK // rows[1])

    def work(start: int, stop: int) -> None:
        for n in range(start, stop, height):
            e = min(n + height, stop)
            part = values[n:e]
            if z is None:
                np.copyto(part, flat[n:e])
            else:
                np.subtract(flat[n:e], z[n:e], out=part, casting="unsafe")
            np.multiply(part, s[n:e], out=part)
            if may_overflow:
                np.clip(part, -spec.source.max, spec.source.max, out=part)

    loops = runtime.compiled_loops()
    if loops is not None and not may_overflow and rows[1] >= serve.SHORTEST_ROW_TO_DECODE:
        scales = np.ascontiguousarray(s[:, 0])
        zeros = np.zeros(rows[0], np.int32) if z is None else np.ascontiguousarray(z[:, 0])
        map_ranges(
            lambda lo, hi: loops.decode_rows(flat[lo:hi], scales[lo:hi], zeros[lo:hi], values[lo:hi]),
            rows[0],
            chunks_per_core=CHUNKS_PER_CORE,
        )
    else:
        map_ranges(work, rows[0])
    return values.reshape(codes.shape)
