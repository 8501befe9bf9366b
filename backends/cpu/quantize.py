"""Quantization and back: a part at a time, while it is in cache, on every core.

Owns: the forms of the operations of ``affine`` for NumPy arrays, whose bits are those of ``affine``. Imports: ``affine``,
the runtime, and ``serve``, which says what each is for.

Two kinds: loops for plain integers and the commonest layouts, which pass over memory once or twice; and, for every other
format, scheme and layout, the operations themselves on *tiles* of the array, in two passes: extrema of each block, from
which scales are chosen as from the array itself, then the codes. Either needs no memory to speak of beside its result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from aqt_lite import affine
from aqt_lite._blocks import reduced
from aqt_lite._kernels import plain_integers
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, QParams, Recipe, Spec
from aqt_lite.backends.cpu import runtime, serve
from aqt_lite.backends.cpu.runtime import BLOCK, CHUNKS_PER_CORE, LARGE, aligned_empty, map_ranges
from aqt_lite.granularity import Block, grid_of

__all__ = ["FORMS", "choose_qparams", "dequantize", "fake_quantize", "quantize", "quantize_with"]

TILE = BLOCK // 4
"""Elements of a tile: several arrays of it, which an operation makes on its way, fit a core's cache."""


def quantize(x: Array, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    """``affine.quantize`` with every core: one pass over memory, or two where a scale spans parts of it."""
    if 0 in x.shape:
        return NotImplemented
    result = NotImplemented
    if plain_integers({"spec": spec, "recipe": recipe}) and serve.float32_as_it_lies(x, recipe):
        grid = grid_of(x.shape, spec.block)
        rows, fixed_zero = serve.rows_of_one_scale(x, grid, spec.block), serve.has_fixed_zero(spec, recipe)
        if rows is not None and rows[0] == 1 and not (fixed_zero and x.size <= BLOCK):
            result = _quantize_spanning(x.reshape(-1), grid, spec, recipe)
        elif serve.one_scale_an_index_of_the_last_axis(x.shape, grid):
            result = _quantize_spanning(x.reshape(-1, x.shape[-1]), grid, spec, recipe)
        elif rows is not None and rows[1] >= serve.SHORTEST_ROW and fixed_zero:
            result = _quantize_rows(x.reshape(rows), grid, spec, recipe)
    if result is not NotImplemented:
        return Coded(result[0].reshape(x.shape), *result[1:])
    if not _worth_tiles(x, spec, recipe):
        return NotImplemented
    qparams = _of_extrema(
        x, spec, recipe, lambda ends, s: affine.choose_qparams(ends, spec=s, recipe=recipe, b=_numpy())
    )
    return Coded(_encoded(x, qparams, spec, recipe), *qparams)


def choose_qparams(x: Array, *, spec: Spec, recipe: Recipe) -> Any:
    """``affine.choose_qparams`` from the extrema of tiles."""
    if not _worth_tiles(x, spec, recipe):
        return NotImplemented
    return _of_extrema(x, spec, recipe, lambda ends, s: affine.choose_qparams(ends, spec=s, recipe=recipe, b=_numpy()))


def quantize_with(x: Array, given: QParams, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    """``affine.quantize_with`` on tiles."""
    if not _worth_tiles(x, spec, recipe):
        return NotImplemented
    qparams = _usable(x, given, spec, recipe)
    return Coded(_encoded(x, qparams, spec, recipe), *qparams)


def fake_quantize(
    x: Array, given: QParams | None = None, key: Array | None = None, *, spec: Spec, recipe: Recipe
) -> Any:
    """``affine.fake_quantize`` on tiles, without derivatives."""
    if not _worth_tiles(x, spec, recipe):
        return NotImplemented
    qparams = choose_qparams(x, spec=spec, recipe=recipe) if given is None else _usable(x, given, spec, recipe)
    values = aligned_empty(x.shape, _numpy().dtype(spec.source.name))

    def work(at: tuple[slice, ...], on_grid: tuple[slice, ...]) -> None:
        own = _cut(qparams, on_grid)
        codes = affine.encode(x[at], own, spec=spec, recipe=recipe, b=_numpy())
        values[at] = affine.dequantize(Coded(codes, *own), spec=spec, b=_numpy())

    _for_tiles(work, x.shape, spec.block)
    return values, affine.scales(qparams.scale, spec, _numpy())


def dequantize(w: Coded, *, spec: Spec, out: str | None = None) -> Any:
    """``affine.dequantize``: a compiled loop where blocks of plain integers are contiguous, else tiles."""
    if plain_integers({"spec": spec}) and w.offset is None:
        values = _dequantize_rows(w, spec, out or spec.source.name)
        if values is not NotImplemented:
            return values
    if w.codes.size < LARGE or not _scales_can_be_cut(spec):
        return NotImplemented
    values = aligned_empty(w.codes.shape, _numpy().dtype(out or spec.source.name))

    def work(at: tuple[slice, ...], on_grid: tuple[slice, ...]) -> None:
        own = _cut(QParams(*w[1:]), on_grid)
        values[at] = affine.dequantize(Coded(w.codes[at], *own), spec=spec, out=out, b=_numpy())

    _for_tiles(work, w.codes.shape, spec.block)
    return values


# ---- tiles


def _numpy() -> Any:
    return get_backend("numpy")


def _worth_tiles(x: Array, spec: Spec, recipe: Recipe) -> bool:
    """Stochastic rounding numbers the elements of the whole array, which no tile knows."""
    return x.size >= LARGE and recipe.rounding != "stochastic" and _scales_can_be_cut(spec)


def _scales_can_be_cut(spec: Spec) -> bool:
    """Whether a part of the kept scales means what it does in the whole."""
    while spec.format.scale is not None:
        spec = spec.of_scales
        if any(n is not None for n in spec.block):
            return False
    return True


def _tiles(shape: tuple[int, ...], block: Block) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Slices of the array, none cutting a block of bounded length, and of the grid of its blocks."""
    least = [1 if n is None else min(n, length) for n, length in zip(block, shape, strict=True)]
    room, steps = max(1, TILE // math.prod(least)), list(least)
    for axis in reversed(range(len(shape))):  # the last axes whole, as far as there is room
        times = min(room, -(-shape[axis] // least[axis]))
        steps[axis] = least[axis] * times
        room //= times
    cuts = [
        [slice(n, min(n + step, length)) for n in range(0, length, step)]
        for length, step in zip(shape, steps, strict=True)
    ]
    found = []
    for at in itertools.product(*cuts):
        on_grid = tuple(
            slice(0, 1) if size is None else slice(s.start // size, -(-s.stop // size))
            for s, size in zip(at, block, strict=True)
        )
        found.append((at, on_grid))
    return found


def _for_tiles(work: Callable[..., Any], shape: tuple[int, ...], block: Block) -> list[Any]:
    tiles = _tiles(shape, block)

    def some(start: int, stop: int) -> list[Any]:
        return [work(*tile) for tile in tiles[start:stop]]

    parts = map_ranges(some, len(tiles), 1, chunks_per_core=CHUNKS_PER_CORE)
    return [found for part in parts for found in part]


def _of_extrema(x: Array, spec: Spec, recipe: Recipe, choose: Callable[[Array, Spec], QParams]) -> QParams:
    """What ``choose`` gives for the smallest and the largest value of each block: all that scales are chosen from."""
    grid, source = grid_of(x.shape, spec.block), _numpy().dtype(spec.source.compute)

    def extrema(at: tuple[slice, ...], on_grid: tuple[slice, ...]) -> tuple[Any, Array, Array]:
        part = x[at].astype(source)
        if recipe.ignore_nonfinite:
            part = np.where(np.isfinite(part), part, source.type(0))
        return on_grid, reduced(part, spec.block, np.min, np), reduced(part, spec.block, np.max, np)

    ends = np.empty((2, *grid), source)
    ends[0], ends[1] = np.inf, -np.inf
    with np.errstate(all="ignore"):
        for on_grid, low, high in _for_tiles(extrema, x.shape, spec.block):
            np.minimum(ends[0][on_grid], low, out=ends[0][on_grid])
            np.maximum(ends[1][on_grid], high, out=ends[1][on_grid])
        found = choose(ends, replace(spec, block=(None, *((1,) * len(grid)))))
    qparams: QParams = runtime.on_each(lambda a: a[0], found)
    return qparams


def _usable(x: Array, given: QParams, spec: Spec, recipe: Recipe) -> QParams:
    lifted = runtime.on_each(lambda a: a[None], QParams(*given))
    return _of_extrema(
        x, spec, recipe, lambda ends, s: affine.usable_qparams(ends, lifted, spec=s, recipe=recipe, b=_numpy())
    )


def _encoded(x: Array, qparams: QParams, spec: Spec, recipe: Recipe) -> Array:
    codes = aligned_empty(x.shape, spec.element.storage)

    def work(at: tuple[slice, ...], on_grid: tuple[slice, ...]) -> None:
        codes[at] = affine.encode(x[at], _cut(qparams, on_grid), spec=spec, recipe=recipe, b=_numpy())

    _for_tiles(work, x.shape, spec.block)
    return codes


def _cut(qparams: QParams, on_grid: tuple[slice, ...]) -> QParams:
    """The parameters of a tile: those of its blocks; a number that all scales share is no part of the grid."""

    def cut(a: Array) -> Array:
        return a if a.size == 1 else a[on_grid]

    found: QParams = runtime.on_each(cut, qparams)
    return found


# ---- loops for plain integers


def _quantize_rows(x: Array, grid: tuple[int, ...], spec: Spec, recipe: Recipe) -> Any:
    """A scale for each row, symmetric."""
    rows, width = x.shape
    codes = aligned_empty(x.shape, spec.element.storage)
    scale = aligned_empty((rows, 1), np.float32)
    factor = np.float32(affine.inverse_of_largest(spec, recipe))
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


def _quantize_spanning(x: Array, grid: tuple[int, ...], spec: Spec, recipe: Recipe) -> Any:
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
    with np.errstate(all="ignore"):
        a_column = replace(spec, block=(None, 1))
        scale, zero_point, _ = affine.choose_qparams(ends, spec=a_column, recipe=recipe, b=_numpy())
        inverse = np.float32(1) / scale[0]
    zero = None if zero_point is None else zero_point[0].astype(np.float32)
    codes = aligned_empty(x.shape, spec.element.storage)
    qmin, qmax = (np.float32(q) for q in spec.element.range_of(recipe.symmetric))

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


def _dequantize_rows(w: Coded, spec: Spec, out: str) -> Any:
    """To float32, where every row of a view of the codes has one scale."""
    codes, scale, zero_point, _ = w
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


FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    affine.quantize: quantize,
    affine.quantize_with: quantize_with,
    affine.choose_qparams: choose_qparams,
    affine.fake_quantize: fake_quantize,
    affine.dequantize: dequantize,
}
"""The forms, each under its operation: they know every format."""
