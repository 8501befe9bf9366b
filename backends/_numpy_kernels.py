"""Quantization and products for NumPy: a block at a time, while it is in cache, on every core.

Owns: the forms that NumPy alone runs fast, and the choice of compiled loops where numba is installed. ufuncs and BLAS
release the interpreter's lock, so plain threads serve. docs/performance.md says what was tried and what each gave.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from aqt_lite import affine
from aqt_lite._namespace import Array
from aqt_lite.affine import Spec
from aqt_lite.granularity import grid_of
from aqt_lite.ops import reference

LARGE = 1 << 17
"""Arrays of fewer elements are not worth threads, nor the time that loading compiled loops takes."""

BLOCK = 1 << 18
"""Elements that a thread works on at a time: 1 MB of float32, half of a usual second-level cache."""


MOST_ROWS_FOR_LOOPS = 8
"""Rows of x for which compiled loops beat BLAS on a dequantized block."""

MOST_ROWS_FOR_EINSUM = 2
"""Rows of x for which einsum, which converts codes as it goes, beats BLAS on a dequantized block."""

EINSUM_BUFFER = 1 << 15
"""Codes that einsum converts at a time: 128 KB of float32, well inside a core's own cache."""

MOST_ROWS_ON_THE_RIGHT = 64
"""Rows of x up to which BLAS is faster with the weight on the left, though its result has to be transposed then."""

ROWS_OF_A_BLOCK = {0: 256, 1: 512}
"""Rows of a weight 8192 wide that are dequantized at a time, by the contracted axis."""

LARGEST_UNSCALED = 2.0**100
"""Magnitude of x below which sums of ``x * q`` stay finite for every length that memory can hold."""


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(1, cores() - 1), thread_name_prefix="aqt_lite")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: let the child make its own
    os.register_at_fork(after_in_child=_pool.cache_clear)


PIECES = 8
"""Parts for each core of work that is cheap to cut: where a core is taken by somebody else, the others do its share."""


def in_parallel(
    work: Callable[[int, int], Any], length: int, grain: int = 1, elements: int = LARGE, pieces: int = 1
) -> list[Any]:
    """``work(start, stop)`` over a range, cut into ``pieces`` for each core at multiples of ``grain``; its results.

    In one part where there are few ``elements`` in all: starting threads would cost more than it gains. Threads claim
    part after part, this one too, which does not wait for one that has not begun: another library's threads, BLAS's
    for instance, go on spinning for a tenth of a second after their work is done, and may keep it from a core.

    Without warnings, which NumPy counts for each thread: the contract says what overflow and NaN become.
    """
    if elements < LARGE:
        with np.errstate(all="ignore"):
            return [work(0, length)]
    units = -(-length // grain)
    parts = min(cores() * pieces, units)
    bounds = [min(units * i // parts * grain, length) for i in range(parts + 1)]
    results: list[Any] = [None] * parts
    changed, begun, ended, failures = threading.Condition(), 0, 0, list[BaseException]()

    def claim() -> None:
        nonlocal begun, ended
        with np.errstate(all="ignore"):
            while True:
                with changed:
                    if begun == parts or failures:
                        return
                    i, begun = begun, begun + 1
                try:
                    results[i] = work(bounds[i], bounds[i + 1])
                except BaseException as failure:
                    failures.append(failure)
                finally:
                    with changed:
                        ended += 1
                        changed.notify_all()

    # no thread can be started, perhaps because the interpreter is shutting down
    with contextlib.suppress(RuntimeError):
        for _ in range(min(cores(), parts) - 1):
            _pool().submit(claim)
    claim()
    with changed:
        changed.wait_for(lambda: ended == begun)
    if failures:
        raise failures[0]
    return results


@functools.cache
def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def compiled_loops() -> Any:
    """The loops that numba compiles, or None where numba is not installed (``pip install 'aqt_lite[fast]'``)."""
    try:
        from aqt_lite.backends import _numba_loops
    except (ImportError, RuntimeError):  # RuntimeError: numba finds no folder that it may write its cache to
        return None
    return _numba_loops


# ---- quantize and dequantize


def _as_rows(x: Array, scale_shape: tuple[int, ...], block: Any) -> tuple[int, int] | None:
    """(rows, columns) of the view of ``x`` in which every row has one scale, or None where there is no such view."""
    shape = x.shape
    if not (x.size and x.flags.c_contiguous and x.dtype.isnative):
        return None
    lead = 0
    while lead < x.ndim and (scale_shape[lead] == shape[lead]):  # axes with a scale for each index
        lead += 1
    if lead < x.ndim and all(n == 1 for n in scale_shape[lead + 1 :]):
        groups = scale_shape[lead]
        if groups == 1 or (block[lead] is not None and shape[lead] % block[lead] == 0):
            return math.prod(shape[:lead]) * groups, x.size // (math.prod(shape[:lead]) * groups)
    return (x.size, 1) if lead == x.ndim else None


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> Array:
    """An uninitialized array that begins on a cache line, so that other libraries can take it over without a copy."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def quantize(x: Array, *, spec: Spec) -> Any:
    """``affine.quantize`` with every core, block by block: one pass over memory, or two where a scale spans blocks."""
    if 0 in x.shape:
        return NotImplemented
    grid, result = grid_of(x.shape, spec.block), NotImplemented
    if x.dtype == np.float32 and x.flags.c_contiguous and x.dtype.isnative and not spec.ignore_nonfinite:
        rows = _as_rows(x, grid, spec.block)
        columns = x.ndim > 0 and grid[-1] == x.shape[-1] > 1 and math.prod(grid) == grid[-1]
        simple = spec.symmetric and not spec.element.middle
        if rows is not None and rows[0] == 1 and not (simple and x.size <= BLOCK):
            result = _quantize_spanning(x.reshape(-1), grid, spec)
        elif columns:
            result = _quantize_spanning(x.reshape(-1, x.shape[-1]), grid, spec)
        elif rows is not None and rows[1] >= 8 and simple:
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
    loops = compiled_loops() if x.size >= LARGE else None

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

    if not all(in_parallel(work, rows, 1, x.size, 1 if loops is None else PIECES)):
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

    found = in_parallel(extrema, len(x), 1, x.size)
    ends = np.stack([np.min([lo for lo, _ in found], axis=0), np.max([hi for _, hi in found], axis=0)])
    ends = ends.reshape(2, -1)
    if not np.isfinite(ends).all():
        return NotImplemented
    a_column = affine.Spec(spec.element, spec.source, spec.symmetric, (None, 1))
    with np.errstate(all="ignore"):
        scale, zero_point = affine.choose_qparams(ends, spec=a_column, b=_backend())
        inverse = np.float32(1) / scale[0]
    zero = None if zero_point is None else zero_point[0].astype(np.float32)
    codes = aligned_empty(x.shape, spec.element.storage)
    qmin, qmax = (np.float32(q) for q in spec.code_range)

    loops = compiled_loops() if x.size >= LARGE else None
    width = x.shape[1] if x.ndim == 2 else math.gcd(x.size, 1 << 12)  # one scale in all: any cut into rows will do
    if loops is not None and width >= 64:
        table, out = x.reshape(-1, width), codes.reshape(-1, width)
        inverses = np.ascontiguousarray(np.broadcast_to(inverse, (width,)))
        zeros = np.ascontiguousarray(np.broadcast_to(np.float32(0) if zero is None else zero, (width,)))
        in_parallel(
            lambda lo, hi: loops.encode_columns(table[lo:hi], inverses, zeros, qmin, qmax, out[lo:hi]),
            len(table),
            pieces=PIECES,
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

    in_parallel(encode, len(x), 1, x.size)
    zero_point = None if zero_point is None else zero_point.reshape(grid)
    return codes, scale.reshape(grid), zero_point


def _quantize_slabs(x: Array, grid: tuple[int, ...], spec: Spec) -> Any:
    """The reference itself on slabs of the first axis, none cutting a block: for every type, scheme and layout."""
    grain = spec.block[0] or 1
    height = -(-max(1, BLOCK // 4 * x.shape[0] // x.size) // grain) * grain
    codes = aligned_empty(x.shape, spec.element.storage)
    scale = aligned_empty(grid, spec.source.compute)
    zero_point = None if spec.symmetric and not spec.element.middle else aligned_empty(grid, np.int32)

    def work(start: int, stop: int) -> None:
        for n in range(start, stop, height):
            e = min(n + height, stop)
            g = slice(n // grain, -(-e // grain))
            codes[n:e], scale[g], zeros = affine.quantize(x[n:e], spec=spec, b=_backend())
            if zero_point is not None:
                zero_point[g] = zeros

    in_parallel(work, x.shape[0], grain)
    return codes, scale, zero_point


def dequantize(codes: Array, scale: Array, zero_point: Array | None, *, spec: Spec, out: str) -> Any:
    """``affine.dequantize`` to float32 where blocks are contiguous."""
    if not (spec.source.name == out == "float32"):
        return NotImplemented
    rows = _as_rows(codes, scale.shape, spec.block)
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

    loops = compiled_loops()
    if loops is not None and not may_overflow and rows[1] >= 16:
        own = np.ascontiguousarray(s[:, 0])
        zeros = np.zeros(rows[0], np.int32) if z is None else np.ascontiguousarray(z[:, 0])
        in_parallel(
            lambda lo, hi: loops.decode_rows(flat[lo:hi], own[lo:hi], zeros[lo:hi], values[lo:hi]),
            rows[0],
            pieces=PIECES,
        )
    else:
        in_parallel(work, rows[0])
    return values.reshape(codes.shape)


# ---- products


def matmul(
    x: Array,
    codes: Array,
    scale: Array,
    zero_point: Array | None,
    bias: Array | None,
    *,
    spec: Spec,
    contract: int,
) -> Any:
    """``x @ dequantize(w)``, a block of rows of the weight at a time, so that the float block stays in cache."""
    if codes.size < LARGE and zero_point is None:
        y = small_matmul(x, codes, scale, bias, contract=contract)
        if y is not NotImplemented:
            return y
    if codes.dtype.itemsize != 1 or "float64" in (x.dtype.name, scale.dtype.name) or 0 in (*x.shape, *codes.shape):
        return NotImplemented
    if zero_point is not None and not bool(np.maximum.reduce(scale, axis=None) < LARGEST_UNSCALED):
        return NotImplemented  # the outermost value may lie beyond float32, where the reference clips it
    if codes.size >= LARGE:
        y = matmul_by_dots(x, codes, scale, zero_point, bias, spec=spec, contract=contract)
        if y is not NotImplemented:
            return y
    wide = np.ascontiguousarray(x, dtype=np.float32)
    with np.errstate(all="ignore"):
        # sums of x * q whose scale comes last must not overflow before it does
        scaled_last = zero_point is None and bool(np.maximum.reduce(np.abs(wide), axis=None) < LARGEST_UNSCALED)
        if scaled_last and loops_serve(len(x), codes, scale, zero_point, contract):
            y = _compiled_product(wide, codes, scale, spec.block, contract)
        elif codes.size < LARGE:
            y = _small_product(wide, codes, scale, zero_point, spec, contract)
        else:
            y = _blockwise(wide, codes, scale, zero_point, spec, contract, scaled_last)
        if bias is not None:
            y += bias
        return y.astype(x.dtype, copy=False)


def loops_serve(rows: int, codes: Array, scale: Array, zero_point: Array | None, contract: int) -> bool:
    """Whether there is a compiled loop for this product: no zero points, few rows of x, scales that a row can share."""
    return (
        zero_point is None
        and rows <= MOST_ROWS_FOR_LOOPS
        and (scale.shape[contract] == 1 or (contract == 1 and scale.shape[0] == codes.shape[0]))
        and compiled_loops() is not None
    )


_FLOAT32, _INT8 = np.dtype(np.float32), np.dtype(np.int8)

_NO_BIAS = np.asarray([-0.0], dtype=np.float32)  # what leaves every sum as it is, -0.0 as well


def small_matmul(x: Array, codes: Array, scale: Array, bias: Array | None, *, contract: int) -> Any:
    """The whole of a small product in one compiled call, of float32 and with a scale for each output or one in all.

    Such a product takes a few microseconds, of which every check and every step in Python is a good part.
    """
    outputs = codes.shape[1 - contract]
    bias = _NO_BIAS if bias is None else bias
    if not (
        x.dtype == scale.dtype == bias.dtype == _FLOAT32
        and codes.dtype == _INT8
        and scale.shape[contract] == 1
        and (scale.size == outputs or scale.size == 1)
        and loops_serve(len(x), codes, scale, None, contract)
    ):
        return NotImplemented
    contiguous, y = np.ascontiguousarray, np.empty((len(x), outputs), dtype=_FLOAT32)
    finite = compiled_loops().small_product(
        contiguous(codes), contiguous(scale).reshape(-1), contiguous(x), contiguous(bias), contract, y
    )
    return y if finite else NotImplemented  # a sum that overflows may not do so where the scale comes first


def _small_product(x: Array, codes: Array, scale: Array, zero_point: Array | None, spec: Spec, contract: int) -> Array:
    w = _weight(codes, scale, zero_point, spec, 0, codes.shape[0], np.empty(codes.shape, dtype=np.float32))
    return x @ (w if contract == 0 else w.T)


def _weight(
    codes: Array, scale: Array, zero_point: Array | None, spec: Spec, start: int, stop: int, out: Array
) -> Array:
    """Rows of the dequantized weight, into ``out``."""
    grain = spec.block[0] or 1

    def part(a: Array) -> Array:
        own = a if a.shape[0] == 1 else a[start // grain : -(-stop // grain)]
        return affine.spread(own, (stop - start, codes.shape[1]), spec.block, np)

    if zero_point is None:
        loops = compiled_loops() if codes.size >= LARGE and codes.flags.c_contiguous else None
        np.copyto(out, codes[start:stop]) if loops is None else loops.widen(codes[start:stop], out)
    else:
        np.subtract(codes[start:stop], part(zero_point), out=out, casting="unsafe")
    return out if _is_one(scale) else np.multiply(out, part(scale), out=out)


def _is_one(scale: Array) -> bool:
    return bool(scale.size == 1 and scale.flat[0] == 1)


def _einsum(codes: Array, row: Array, out: Array) -> Array:
    """``codes @ row`` in the dtype of ``row``, into ``out``: einsum converts codes as it goes, a buffer at a time."""
    usual = np.setbufsize(EINSUM_BUFFER)
    try:
        return np.einsum("nk,k->n", codes, row, out=out)
    finally:
        np.setbufsize(usual)


def _blockwise(
    x: Array, codes: Array, scale: Array, zero_point: Array | None, spec: Spec, contract: int, scaled_last: bool
) -> Array:
    if scaled_last and scale.shape[contract] == 1 and scale.size > 1:  # one product a result instead of one a code
        columns_of_scale = affine.spread(scale, codes.shape, spec.block, np).reshape(1, -1)
        y = _blockwise(x, codes, np.ones((1, 1), np.float32), None, spec, contract, False)
        return np.multiply(y, columns_of_scale, out=y)
    length, width = codes.shape
    grain = spec.block[0] or 1  # blocks begin where a group begins
    if contract == 1 and len(x) <= MOST_ROWS_FOR_EINSUM and zero_point is None and _is_one(scale):
        y = np.empty((len(x), length), dtype=np.float32)

        def columns(start: int, stop: int) -> None:
            for row, out in zip(x, y, strict=True):
                _einsum(codes[start:stop], row, out[start:stop])

        in_parallel(columns, length, 1, codes.size, PIECES)
        return y

    height = -(-max(1, ROWS_OF_A_BLOCK[contract] * 8192 // width) // (2 * grain)) * 2 * grain
    scratch = np.empty((min(height, length), width), dtype=np.float32)
    y = np.zeros((len(x), width), dtype=np.float32) if contract == 0 else np.empty((len(x), length), np.float32)
    for n in range(0, length, height):
        e = min(n + height, length)

        def convert(start: int, stop: int, n: int = n) -> None:
            _weight(codes, scale, zero_point, spec, n + start, n + stop, scratch[start:stop])

        in_parallel(convert, e - n, grain)
        w = scratch[: e - n]
        if contract == 0:
            y += x[:, n:e] @ w
        elif len(x) <= MOST_ROWS_ON_THE_RIGHT:
            y[:, n:e] = (w @ x.T).T
        else:
            np.matmul(x, w.T, out=y[:, n:e])
    return y


def _tiles(start: int, stop: int, width: int) -> Any:
    """Slices of a range of rows, each of few enough codes to stay in a core's own cache while every row of x passes."""
    height = max(4, (BLOCK // width) & ~3)
    return (slice(n, min(n + height, stop)) for n in range(start, stop, height))


def _compiled_product(x: Array, codes: Array, scale: Array, block: Any, contract: int) -> Array:
    loops, codes = compiled_loops(), np.ascontiguousarray(codes)
    if scale.shape[contract] == 1:  # groups of outputs share a scale: one for each
        scale = affine.spread(scale, codes.shape, (block[0], None) if contract == 1 else (None, block[1]), np)
    if contract == 0:

        def partial(start: int, stop: int) -> Array:
            return np.stack([loops.columns_times(codes[start:stop], row[start:stop]) for row in x])

        return functools.reduce(np.add, in_parallel(partial, len(codes), 8, codes.size)) * scale

    y = np.empty((len(x), len(codes)), dtype=np.float32)
    grouped = scale.shape[1] > 1

    def columns(start: int, stop: int) -> None:
        for part in _tiles(start, stop, codes.shape[1]) if len(x) > 1 else [slice(start, stop)]:
            for row, out in zip(x, y, strict=True):
                if grouped:
                    loops.grouped_rows_times(codes[part], scale[part], block[1], row, out[part])
                else:
                    loops.rows_times(codes[part], row, out[part])

    if codes.size < LARGE:
        columns(0, len(codes))
    else:
        in_parallel(columns, len(codes), 4, codes.size, PIECES)
    return y if grouped else np.multiply(y, scale.T, out=y)


LONGEST_EXACT = 1 << 13
"""Products of 31 bits and 9 whose sum float64 holds in any order."""


def integer_dots() -> Any:
    """The loops around the processor's int8 dot product, or None where it or numba is missing."""
    return None if compiled_loops() is None else _loaded_dots()


@functools.cache
def _loaded_dots() -> Any:
    from aqt_lite.backends import _numba_dots

    return _numba_dots if _numba_dots.AVAILABLE else None


def _exact_matmul(x: Array, w: Array) -> Array:
    """``x @ w.T`` of integers below 2^31 and 2^9 as int64. A uint8 ``w`` counts as 128 less."""
    y = np.empty((len(x), len(w)), dtype=np.int64)
    if integer_dots() is None or w.dtype.itemsize != 1 or w.shape[1] > reference.LONGEST_PIECE:
        _exact_by_floats(x, _less_128(w, None) if w.dtype == np.uint8 else w, y)
        return y
    dots, digits = integer_dots(), 1 if x.dtype == np.int8 else 4
    most = dots.ROWS_AT_ONCE
    for some in (slice(first, first + most) for first in range(0, len(x), most)):
        rows, sums = x[some], y[some]
        for part in dots.parts_of_rows(len(rows), digits):
            _exact_by_dots(rows[part], w, sums[part], digits)
    return y


def _exact_by_dots(x: Array, w: Array, y: Array, digits: int) -> None:
    dots, (rows, inner) = integer_dots(), x.shape
    if rows == 1 and digits == 4:
        planes = dots.pack_one_row(x[0])

        def multiply(w: Array, y: Array) -> None:
            dots.multiply_one_row(w, x[0], planes, y[0])

    else:
        panels = aligned_empty(dots.shape_of_panels(rows, inner, digits), np.uint32)
        height = panels.shape[2] // digits
        tail = np.ascontiguousarray(x[:, inner // 4 * 4 :])

        def pack(start: int, stop: int) -> None:
            dots.pack_rows(x[start:stop], digits, height, panels[start // height :])

        in_parallel(pack, rows, height, x.size)

        def multiply(w: Array, y: Array) -> None:
            dots.multiply_rows(w, tail, panels, digits, height, y)

    def columns(start: int, stop: int) -> None:
        if w.dtype == np.int8 and w.strides[1] == 1:
            multiply(w[start:stop], y[:, start:stop])
            return
        scratch = np.empty((min(dots.STRIP, stop - start), inner), dtype=np.int8)
        for n in range(start, stop, dots.STRIP):
            e = min(n + dots.STRIP, stop)
            multiply(_less_128(w[n:e], scratch[: e - n]), y[:, n:e])

    in_parallel(columns, len(w), dots.STRIP if rows > 1 else 5, w.size, PIECES)


def _less_128(w: Array, out: Array | None) -> Array:
    """Codes of one byte as int8, those of uint8 128 less, in the order of C."""
    out = np.empty(w.shape, dtype=np.int8) if out is None else out
    if w.dtype == np.uint8:
        np.bitwise_xor(w, np.uint8(128), out=out.view(np.uint8))
    else:
        np.copyto(out, w)
    return out


def _exact_by_floats(x: Array, w: Array, y: Array) -> None:
    """In float64 sums, each short enough to be exact."""
    wide = np.ascontiguousarray(x, dtype=np.float64)
    rows, inner = w.shape
    y[:] = 0
    runs = [slice(k, k + LONGEST_EXACT) for k in range(0, inner, LONGEST_EXACT)]
    few = len(x) <= MOST_ROWS_FOR_EINSUM
    loops = compiled_loops() if w.flags.c_contiguous and len(x) <= MOST_ROWS_FOR_LOOPS else None

    def columns(start: int, stop: int) -> None:
        if loops is not None:
            for part in _tiles(start, stop, inner):
                for row, out in zip(wide, y, strict=True):
                    loops.exact_rows_times(w[part], row, LONGEST_EXACT, out[part])
            return
        if few:
            for row, out in zip(wide, y[:, start:stop], strict=True):
                for near in runs:
                    out += _einsum(w[start:stop, near], row[near], np.empty(stop - start)).astype(np.int64)
            return
        for part in _tiles(start, stop, 2 * inner):
            codes = w[part].astype(np.float64)
            for near in runs:
                y[:, part] += (wide[:, near] @ codes[:, near].T).astype(np.int64)

    if w.size < LARGE or (loops is None and not few):  # BLAS has threads of its own
        columns(0, rows)
    else:
        in_parallel(columns, rows, 4)


@functools.cache
def powers_of_two() -> Array:
    """``2^(i - 256)`` for i in [0, 512), as ``Backend.power_of_two``: 0 below 2^-100."""
    return _backend().power_of_two(np.clip(np.arange(-256, 256, dtype=np.int32), None, 127))


@np.errstate(all="ignore")
def _product_in_fixed_point(
    x: Array,
    codes: Array,
    scale: Array,
    zero_point: Array | None,
    bias: Array | None,
    *,
    spec: Spec,
    contract: int,
    fast: bool,
) -> Any:
    """``reference.matmul_reproducible`` where the contracted axis is one piece and no row wants a second pass.

    What the reference does to whole arrays in some thirty steps happens here in two loops around the integer product.
    ``fast``: only rows of which fixed point loses nothing that a float32 product keeps.
    """
    (rows, inner), columns = x.shape, len(codes)
    single = codes.dtype.itemsize == 1 and "float64" not in (x.dtype.name, scale.dtype.name)
    one_piece = contract == 1 and scale.shape[1] == 1 and inner <= reference.LONGEST_PIECE
    if not (single and one_piece) or integer_dots() is None or 0 in (*x.shape, *codes.shape):
        return NotImplemented
    dots, powers = integer_dots(), powers_of_two()
    wide = np.ascontiguousarray(x, dtype=np.float32)
    parts = []
    for part in dots.parts_of_rows(rows, 4):
        prepared = _prepared(wide[part], powers)
        if (prepared[2] & (dots.ANY_KIND if fast else dots.SECOND_PASS)).any():
            return NotImplemented
        parts.append((part, *prepared))
    # compiled loops check no bounds, and are compiled anew for another layout
    vectors = [
        np.ascontiguousarray(v) for v in reference.of_columns(codes, scale, zero_point, bias, spec=spec, b=_backend())
    ]
    w, unsigned = codes.view(np.int8), codes.dtype == np.uint8
    y = np.empty((rows, columns), dtype=np.float32)

    def finish(start: int, stop: int) -> None:
        fraction, exponent, zero, shift = (v[start:stop] for v in vectors)
        for part, row_exponent, total, kind, panels, tail in parts:
            of_rows = (panels, tail, row_exponent, total, kind)
            own = w[start:stop], unsigned, *of_rows, fraction, exponent, zero, shift, powers
            dots.finish_columns(*own, y[part, start:stop])

    in_parallel(finish, columns, 5 if rows == 1 else dots.STRIP, codes.size, PIECES)
    return y.astype(x.dtype, copy=False)


matmul_reproducible = functools.partial(_product_in_fixed_point, fast=False)
matmul_by_dots = functools.partial(_product_in_fixed_point, fast=True)


def _prepared(x: Array, powers: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Exponents, sums and kinds of the rows of x, their panels, and the integers that no panel holds."""
    loops, (rows, inner) = integer_dots(), x.shape
    exponent, total, kind = np.empty(rows, np.int32), np.empty(rows, np.int64), np.empty(rows, np.int32)
    panels = aligned_empty(loops.shape_of_panels(rows, inner, 4), np.uint32)
    tail = np.empty((rows, inner - 4 * panels.shape[1]), dtype=np.int32)
    height = max(1, panels.shape[2] // 4)

    def prepare(a: int, b: int) -> None:
        own = panels[a // height : -(-b // height)]
        loops.prepare_rows(x[a:b], powers, exponent[a:b], total[a:b], kind[a:b], own, tail[a:b])

    in_parallel(prepare, rows, height, x.size)
    return exponent, total, kind, panels, tail


def integer_matmul(x: Array, w: Array) -> Array:
    """``x @ w.T`` over the last axes, in int32."""
    if x.ndim == 2:
        return _exact_matmul(x, w).astype(np.int32)
    return np.stack([_exact_matmul(a, c).astype(np.int32) for a, c in zip(x, w, strict=True)])


def fixed_point_matmul(x: Array, w: Array, zero_point: Array | None) -> tuple[Array, Array]:
    """``reference.fixed_point_matmul`` without digits: an int64 holds the whole sum."""
    total = np.stack([_exact_matmul(a, c) for a, c in zip(x, w, strict=True)])
    if zero_point is not None:
        total -= x.sum(axis=2, keepdims=True, dtype=np.int64) * zero_point
    return (total >> 24).astype(np.int32), (total & 0xFFFFFF).astype(np.int32)


def _backend() -> Any:
    from aqt_lite._registry import get_backend

    return get_backend("numpy")


KERNELS: dict[str, Callable[..., Any]] = {
    "quantize": quantize,
    "dequantize": dequantize,
    "matmul": matmul,
    "small_matmul": small_matmul,
    "matmul_by_dots": matmul_by_dots,
    "matmul_reproducible": matmul_reproducible,
    "fixed_point_matmul": fixed_point_matmul,
}
