"""Quantization and back: a part at a time, while it is in cache, on every core.

Owns: the forms of the operations of ``affine`` for NumPy arrays, whose bits are those of ``affine``. Imports:
``affine``, the runtime, ``packed``, and ``serve``, which says what each is for.

Two kinds: loops for plain integers and the commonest layouts, which pass over memory once or twice; and, for every
other format, scheme and layout, the operations themselves on *tiles* of the array, in two passes: extrema of each
block, from which scales are chosen as from the array itself, then the codes. Either needs no memory to speak of beside
its result.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from aqt_lite import _clipping, _given, _into, _statistics, affine
from aqt_lite._blocks import reduced
from aqt_lite._kernels import plain_integers
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, QParams, Recipe, Spec
from aqt_lite.backends.cpu import boxes, decoders, encoders, runtime, serve
from aqt_lite.backends.cpu.packed import FORMS as OF_STREAMS
from aqt_lite.backends.cpu.packed import pack, packed_rows, unpacked_rows
from aqt_lite.backends.cpu.runtime import BLOCK, CHUNKS_PER_CORE, LARGE, aligned_empty, ends_of_parts, map_ranges
from aqt_lite.backends.cpu.twins import with_twins
from aqt_lite.elements import Float
from aqt_lite.granularity import Block, grid_of
from aqt_lite.packing import bytes_of

__all__ = [
    "FORMS",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "for_tiles",
    "quantize",
    "quantize_with",
    "reaches_an_end",
    "scales_can_be_cut",
]

TILE = BLOCK // 4
"""Elements of a tile: several arrays of it, which an operation makes on its way, fit a core's cache."""


def quantize(x: Array, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    """``affine.quantize`` with every core: one pass over memory, or two where a scale spans parts of it."""
    if 0 in x.shape or recipe.dialect.together is not None:
        return NotImplemented
    coded = encoders.quantize(x, spec, recipe, packed=False)
    if coded is not NotImplemented:
        return coded
    result = NotImplemented
    if plain_integers({"spec": spec, "recipe": recipe}) and serve.float32_as_it_lies(x, recipe):
        grid = grid_of(x.shape, spec.block)
        rows, fixed_zero = serve.rows_of_one_scale(x, grid, spec.block), serve.has_fixed_zero(spec, recipe)
        if rows is not None and rows[0] == 1 and not (fixed_zero and x.size <= BLOCK):
            result = _quantize_spanning(x.reshape(-1), grid, spec, recipe)
        elif serve.one_scale_an_index_of_the_last_axis(x.shape, grid) and not encoders.serves(x, spec):
            result = _quantize_spanning(x.reshape(-1, x.shape[-1]), grid, spec, recipe)
        elif rows is not None and rows[1] >= serve.SHORTEST_ROW and fixed_zero:
            result = _quantize_rows(x.reshape(rows), grid, spec, recipe)
    if result is not NotImplemented:
        return Coded(result[0].reshape(x.shape), *result[1:])
    coded = boxes.quantize(x, spec, recipe, packed=False)
    if coded is not NotImplemented:
        return coded
    if not _worth_tiles(x, spec):
        return NotImplemented
    spec = with_twins(spec)
    qparams = _of_extrema(x, spec, recipe, affine.choose_qparams)
    return qparams.beside(_encoded(x, qparams, key, spec, recipe))


def quantize_stored(x: Array, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    """``_into.quantize_stored``: packed as they are made, or part by part."""
    if 0 in x.shape or recipe.dialect.together is not None or not _worth_tiles(x, spec):
        return NotImplemented
    for form in (encoders.quantize, boxes.quantize):
        coded = form(x, spec, recipe, packed=True)
        if coded is not NotImplemented:
            return coded
    spec = with_twins(spec)
    qparams = _of_extrema(x, spec, recipe, affine.choose_qparams)
    codes = _encoded_by_loops(x, qparams, spec, recipe, packed=True)
    if codes is NotImplemented:
        codes = pack(_encoded(x, qparams, key, spec, recipe), bits=spec.element.bits)
    return codes if codes is NotImplemented else qparams.beside(codes)


def choose_qparams(x: Array, *, spec: Spec, recipe: Recipe) -> Any:
    """``affine.choose_qparams`` by a loop that makes scales, or from the extrema of tiles."""
    if not _worth_tiles(x, spec) or recipe.dialect.together is not None:
        return NotImplemented
    chosen = encoders.choose(x, spec, recipe)
    if chosen is not NotImplemented:
        return chosen
    chosen = boxes.quantize(x, spec, recipe, packed=None)
    if chosen is not NotImplemented:
        return QParams(*chosen[1:])
    return _of_extrema(x, with_twins(spec), recipe, affine.choose_qparams)


def quantize_with(x: Array, given: QParams, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    """``_given.quantize_with`` on tiles."""
    if not _worth_tiles(x, spec):
        return NotImplemented
    spec = with_twins(spec)
    qparams = _usable(x, given, spec, recipe)
    return qparams.beside(_encoded(x, qparams, key, spec, recipe))


def fake_quantize(
    x: Array, given: QParams | None = None, key: Array | None = None, *, spec: Spec, recipe: Recipe
) -> Any:
    """``_given.fake_quantize`` on tiles, without derivatives."""
    if not _worth_tiles(x, spec) or (given is None and recipe.dialect.together is not None):
        return NotImplemented
    spec = with_twins(spec)
    qparams = choose_qparams(x, spec=spec, recipe=recipe) if given is None else _usable(x, given, spec, recipe)
    values = aligned_empty(x.shape, _numpy().dtype(spec.source.name))

    def work(tile: Tile) -> None:
        own = _cut(qparams, tile)
        codes = affine.encode(x[tile.at], own, key, spec=spec, recipe=recipe, first=tile.first, b=_numpy())
        values[tile.at] = affine.dequantize(own.beside(codes), spec=spec, b=_numpy())

    for_tiles(work, x.shape, spec.block)
    with np.errstate(all="ignore"):
        return values, affine.scales(qparams.scale, spec, _numpy())


def clipped(x: Array, qparams: QParams | None, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    """``_clipping.clipped`` on tiles."""
    if qparams is None or not _worth_tiles(x, spec):
        return NotImplemented
    spec = with_twins(spec)
    outside = aligned_empty(x.shape, np.bool_)

    def work(tile: Tile) -> None:
        own = _cut(QParams(*qparams), tile)
        outside[tile.at] = _clipping.clipped(
            x[tile.at], own, key, spec=spec, recipe=recipe, first=tile.first, b=_numpy()
        )

    for_tiles(work, x.shape, spec.block)
    return outside


def count_clipped(x: Array, qparams: QParams | None, key: Array | None = None, *, spec: Spec, recipe: Recipe) -> Any:
    """``_clipping.count_clipped`` on tiles."""
    if qparams is None or not _worth_tiles(x, spec):
        return NotImplemented
    spec = with_twins(spec)

    def flags(tile: Tile) -> Array:
        own = _cut(QParams(*qparams), tile)
        return _clipping.clipped(x[tile.at], own, key, spec=spec, recipe=recipe, first=tile.first, b=_numpy())

    return _counted(flags, x.shape, spec.block)


def count_beyond(x: Array, low: Array, high: Array, *, spec: Spec) -> Any:
    """``_clipping.count_beyond`` on tiles."""
    if x.size < LARGE:
        return NotImplemented

    def flags(tile: Tile) -> Array:
        ends = (end if end.size == 1 else end[tile.on_grid] for end in (low, high))
        return _clipping.beyond(x[tile.at], *ends, spec=spec, b=_numpy())

    return _counted(flags, x.shape, spec.block)


def usable_qparams(x: Array, given: QParams, *, spec: Spec, recipe: Recipe) -> Any:
    """``_given.usable_qparams`` from the largest magnitudes of tiles."""
    if not _worth_tiles(x, spec):
        return NotImplemented
    return _usable(x, given, with_twins(spec), recipe)


def reaches_an_end(codes: Array, *, spec: Spec, recipe: Recipe) -> Any:
    """``_clipping.reaches_an_end``, without arrays of bools as large as the codes."""
    ends = spec.element.end_codes(recipe.centred(spec))
    if ends is None:
        return NotImplemented
    flat = codes.reshape(-1)
    parts = (flat[n : n + BLOCK] for n in range(0, flat.size, BLOCK))
    return np.asarray(any(bool((part == end).any()) for part in parts for end in ends))


def dequantize(w: Coded, *, spec: Spec, out: str | None = None) -> Any:
    """``affine.dequantize``: a compiled loop where blocks of plain integers are contiguous, else tiles."""
    values = NotImplemented
    if plain_integers({"spec": spec}) and w.offset is None:
        values = _dequantize_rows(w, spec, out or spec.source.name)
    if values is NotImplemented:
        values = decoders.dequantize(w, spec, None, out or spec.source.name)
    if values is not NotImplemented:
        return values
    if w.codes.size < LARGE or not scales_can_be_cut(spec):
        return NotImplemented
    spec = with_twins(spec)
    values = aligned_empty(w.codes.shape, _numpy().dtype(out or spec.source.name))

    def work(tile: Tile) -> None:
        own = _cut(QParams(*w[1:]), tile)
        values[tile.at] = affine.dequantize(own.beside(w.codes[tile.at]), spec=spec, out=out, b=_numpy())

    for_tiles(work, w.codes.shape, spec.block)
    return values


def dequantize_stored(w: Coded, *, spec: Spec, length: int, out: str | None = None) -> Any:
    """``_into.dequantize_stored`` by a compiled loop, where it serves."""
    return decoders.dequantize(w, spec, length, out or spec.source.name)


def any_unusable(kept: Coded, *, spec: Spec) -> Any:
    """``affine.any_unusable``, an array of one value: codes of floats up to that of the largest number are numbers."""
    codes, element = kept.codes, spec.of_scales.element
    largest = element.largest_code if isinstance(element, Float) and kept.scale is None else -1
    if codes.view(f"u{codes.itemsize}").max(initial=0) <= largest:
        return np.asarray(False)
    numbers = scales_of(kept, spec=spec)
    return numbers if numbers is NotImplemented else np.asarray(np.isnan(numbers).any())


def scales_of(kept: Coded, *, spec: Spec) -> Any:
    """``affine.scales_of``: the scales dequantized."""
    return dequantize(Coded(*kept), spec=spec.of_scales)


# ---- into memory that exists


def extrema(x: Array, *, spec: Spec, recipe: Recipe) -> Any:
    """``_into.extrema`` from tiles."""
    if not (_worth_tiles(x, spec) and spec.format.scaled) or recipe.dialect.together is not None:
        return None
    return _extrema_of(x, with_twins(spec), recipe, recipe.of_magnitudes)


def choose_of_extrema(ends: Array, *, spec: Spec, recipe: Recipe) -> QParams:
    """``_into.choose_of_extrema``, block by block."""
    return _chosen(ends, with_twins(spec), recipe, affine.choose_qparams)


def encode_into(
    x: Array,
    qparams: QParams,
    key: Array | None,
    storage: Array,
    look: Callable[..., bool] | None,
    *,
    spec: Spec,
    recipe: Recipe,
) -> None:
    """``_into.encode_into`` on tiles."""
    if 0 in x.shape:
        return
    twins, bits = with_twins(spec), spec.element.bits
    packs = _into.is_packed(spec, x.ndim)
    done = _encoded_by_loops(x, QParams(*qparams), twins, recipe, packs, storage) is not NotImplemented
    if done and look is None:
        return

    def work(tile: Tile) -> None:
        own, part = _cut(QParams(*qparams), tile), x[tile.at]
        if not done:
            codes = affine.encode(part, own, key, spec=twins, recipe=recipe, first=tile.first, b=_numpy())
            if packs:
                storage[_of_stream(tile, bits)] = packed_rows(codes, bits)
            else:
                storage[tile.at] = codes
        if look is not None:
            look(part, *_values_of(_codes_of_tile(storage, tile, spec, packs), own, spec, twins))

    for_tiles(work, x.shape, _block_to_cut(spec), 8 if packs else 1)


def look_at_values(
    x: Array,
    qparams: QParams,
    key: Array | None,
    look: Callable[..., bool],
    first: int,
    *,
    spec: Spec,
    recipe: Recipe,
) -> int:
    """``_into.look_at_values`` on tiles."""
    twins = with_twins(spec)

    def codes_of(tile: Tile, part: Array, own: QParams) -> Array:
        return affine.encode(part, own, key, spec=twins, recipe=recipe, first=tile.first, b=_numpy())

    return _look(x, qparams, codes_of, look, spec, first)


def _values_of(codes: Array, qparams: QParams, spec: Spec, twins: Spec) -> list[Array]:
    """In the type of the array, and in that of the arithmetic if it is another."""
    names = dict.fromkeys((spec.source.name, spec.source.compute))
    w = qparams.beside(codes)
    return [affine.dequantize(w, spec=twins, out=name, b=_numpy()) for name in names]


def look_at_codes(
    x: Array, codes: Array, qparams: QParams, look: Callable[..., bool], *, spec: Spec, packed: bool
) -> None:
    """``_into.look_at_codes`` on tiles."""
    _look(x, qparams, lambda tile, *_: _codes_of_tile(codes, tile, spec, packed), look, spec)


def _look(
    x: Array, qparams: QParams, codes_of: Callable[..., Array], look: Callable[..., bool], spec: Spec, first: int = 0
) -> int:
    """Where ``look`` ended it; 0 where it did not, or at the beginning. Where that was last time is looked at first."""
    if 0 in x.shape:
        return 0
    twins, ended = with_twins(spec), list[int]()

    def work(tile: Tile) -> None:
        if ended:
            return
        own, part = _cut(QParams(*qparams), tile), x[tile.at]
        if not look(part, *_values_of(codes_of(tile, part, own), own, spec, twins)):
            ended.append(tile.first)  # atomic

    how = x.shape, _block_to_cut(spec), 8 if _into.is_packed(spec, x.ndim) else 1
    if first and how[1] is not None:
        work(next(tile for tile in reversed(_tiles(*how)) if tile.first <= first))  # type: ignore[arg-type]
    for_tiles(work, *how)
    return ended[0] if ended else 0


def decode_into(codes: Array, qparams: QParams, values: Array, *, spec: Spec, fill: float | None, packed: bool) -> None:
    """``_into.decode_into`` on tiles."""
    if 0 in values.shape:
        return
    twins, element = with_twins(spec), spec.element
    name = values.dtype.name
    w = QParams(*qparams).beside(codes)
    if encoders.lies_in_order(values):
        admitted, plain = Coded(*runtime.admitted(tuple(w))), plain_integers({"spec": spec}) and w.offset is None
        if plain and not packed and _dequantize_rows(admitted, spec, name, values) is not NotImplemented:
            return
        length = values.shape[-1] if packed else None
        if decoders.dequantize(admitted, spec, length, name, values) is not NotImplemented:
            return

    def work(tile: Tile) -> None:
        part = _codes_of_tile(codes, tile, spec, packed)
        own = _cut(QParams(*qparams), tile)
        found = affine.dequantize(own.beside(part), spec=twins, out=name, b=_numpy())
        if fill is not None and element.missing is not None:
            found = np.where(part == element.missing, found.dtype.type(fill), found)
        values[tile.at] = found

    for_tiles(work, values.shape, _block_to_cut(spec), 8 if packed else 1)


def _codes_of_tile(codes: Array, tile: Tile, spec: Spec, packed: bool) -> Array:
    """A tile of codes, one an item; streams of short rows have as many bytes as codes, so that no shape tells."""
    if not packed:
        return codes[tile.at]
    bits, length = spec.element.bits, tile.at[-1].stop - tile.at[-1].start
    signed = not spec.element.storage.startswith("u")
    return unpacked_rows(codes[_of_stream(tile, bits)], bits, length, signed)


def _block_to_cut(spec: Spec) -> Block | None:
    """The blocks that tiles go along; None where the array cannot be cut."""
    return spec.block if scales_can_be_cut(spec) else None


def _of_stream(tile: Tile, bits: int) -> tuple[slice, ...]:
    """The bytes of a tile in the array of packed codes."""
    *lead, last = tile.at
    return (*lead, slice(last.start * bits // 8, bytes_of(last.stop, bits)))


# ---- tiles


def _numpy() -> Any:
    return get_backend("numpy")


def _worth_tiles(x: Array, spec: Spec) -> bool:
    return x.size >= LARGE and scales_can_be_cut(spec)


def scales_can_be_cut(spec: Spec) -> bool:
    """Whether a part of the kept scales means what it does in the whole."""
    while spec.format.scale is not None:
        spec = spec.of_scales
        if any(n is not None for n in spec.block):
            return False
    return True


class Tile(NamedTuple):
    """A part of an array that lies side by side in the order of C."""

    at: tuple[slice, ...]
    on_grid: tuple[slice, ...]
    """Its blocks, of which the first and the last may be cut where there is one along an axis."""
    first: int
    """The position of its first element."""


def _tiles(shape: tuple[int, ...], block: Block, multiple: int = 1) -> list[Tile]:
    """Tiles that make up the array: one index of the first axes, a range of one axis, and the whole of the rest.

    Along that axis a tile is some whole blocks or a part of one, so that its parameters meet it as the array's do.
    Along the last axis tiles begin at multiples of ``multiple``; where blocks do not, one tile takes all of it.
    """
    axis, row = len(shape), 1
    while axis and row * shape[axis - 1] <= TILE:
        axis, row = axis - 1, row * shape[axis - 1]
    if axis == 0:
        return [Tile(tuple(slice(0, n) for n in shape), tuple(slice(0, n) for n in grid_of(shape, block)), 0)]
    axis -= 1
    length, size, most = shape[axis], block[axis], max(1, TILE // row)
    unit = length if size is None else min(size, length)
    last = multiple if axis == len(shape) - 1 else 1
    step = unit * (most // unit)
    if unit < length and unit % last:  # so many blocks end at a multiple
        unit *= last // math.gcd(unit, last)
        step = unit * max(1, most // unit)
    whole = [(n, min(n + (step or unit), length)) for n in range(0, length, step or unit)]
    parts = [] if step else [-(-(stop - start) // most) for start, stop in whole]  # of blocks that are too large
    cuts = (
        whole
        if step
        else [
            (start + (stop - start) * i // count // last * last, end)
            for (start, stop), count in zip(whole, parts, strict=True)
            for i in range(count)
            for end in [stop if i == count - 1 else start + (stop - start) * (i + 1) // count // last * last]
        ]
    )
    rest = shape[axis + 1 :]
    found = []
    for number, index in enumerate(np.ndindex(*shape[:axis])):
        for start, stop in cuts:
            at = *(slice(i, i + 1) for i in index), slice(start, stop), *(slice(0, n) for n in rest)
            on_grid = tuple(
                slice(0, 1) if n is None else slice(s.start // n, -(-s.stop // n))
                for s, n in zip(at, block, strict=True)
            )
            found.append(Tile(at, on_grid, (number * length + start) * row))
    return found


def for_tiles(work: Callable[[Tile], None], shape: tuple[int, ...], block: Block | None, multiple: int = 1) -> None:
    """Have ``work`` done for each tile of an array, on every core; for all at once where there are no blocks to cut."""
    if block is None:
        everything = tuple(slice(0, n) for n in shape)
        tiles = [Tile(everything, (slice(None),) * len(shape), 0)]
    else:
        tiles = _tiles(shape, block, multiple)

    def some(start: int, stop: int) -> None:
        for tile in tiles[start:stop]:
            work(tile)

    map_ranges(some, len(tiles), 1, chunks_per_core=CHUNKS_PER_CORE)


def _counted(flags: Callable[[Tile], Array], shape: tuple[int, ...], block: Block) -> tuple[Array, Array]:
    """How many there are in all tiles, and the position of the first."""
    found: list[tuple[int, int]] = []  # appending is atomic

    def work(tile: Tile) -> None:
        here = flags(tile)
        count = int(np.count_nonzero(here))
        if count:
            found.append((tile.first + int(np.argmax(here)), count))

    for_tiles(work, shape, block)
    first, _ = min(found, default=(0, 0))
    return np.asarray(sum(count for _, count in found)), np.asarray(first)


def _of_extrema(x: Array, spec: Spec, recipe: Recipe, choose: Callable[..., QParams], *given: Any) -> QParams:
    """What ``choose`` gives for the smallest and the largest value of each block: all that scales are chosen from."""
    if not spec.format.scaled:
        return QParams(None)
    magnitudes = recipe.of_magnitudes or choose is _given.usable_qparams  # all that these look at
    return _chosen(_extrema_of(x, spec, recipe, magnitudes), spec, recipe, choose, *given)


def _extrema_of(x: Array, spec: Spec, recipe: Recipe, magnitudes: bool) -> Array:
    """The smallest and the largest value of each block, or its largest magnitude alone."""
    for form in (encoders.extrema, boxes.extrema):
        ends = form(x, spec, recipe, magnitudes)
        if ends is not None:
            return ends
    return _extrema_of_tiles(x, spec, recipe, magnitudes)


def _extrema_of_tiles(x: Array, spec: Spec, recipe: Recipe, magnitudes: bool) -> Array:
    """As ``encoders.extrema``, of any array."""
    grid, source = grid_of(x.shape, spec.block), _numpy().dtype(spec.source.compute)
    ends = np.zeros((1, *grid), source) if magnitudes else np.full((2, *grid), np.inf, source)
    if not magnitudes:
        ends[1] = -np.inf
    one_at_a_time = threading.Lock()  # tiles may be parts of one block

    def extrema(tile: Tile) -> None:
        part = x[tile.at].astype(source)
        low = None
        known = _statistics.counted(part, spec, recipe, np)
        if known is not None:
            fill = (
                (math.inf, -math.inf) if recipe.may_lack_zero and not magnitudes else (0, 0)
            )  # as affine leaves them out
            if not magnitudes:
                low = reduced(np.where(known, part, source.type(fill[0])), spec.block, np.min, np)
            part = np.where(known, part, source.type(fill[1]))
        if magnitudes:
            np.abs(part, out=part)
        elif low is None:
            low = reduced(part, spec.block, np.min, np)
        high = reduced(part, spec.block, np.max, np)
        with one_at_a_time:
            if low is not None:
                np.minimum(ends[0][tile.on_grid], low, out=ends[0][tile.on_grid])
            np.maximum(ends[-1][tile.on_grid], high, out=ends[-1][tile.on_grid])

    for_tiles(extrema, x.shape, spec.block)
    if not magnitudes and spec.element.missing is not None:
        ends[:, ends[0] > ends[1]] = np.nan  # of blocks in which all is missing
    return ends


def _chosen(ends: Array, spec: Spec, recipe: Recipe, choose: Callable[..., QParams], *given: Any) -> QParams:
    """What ``choose`` gives for blocks with these ends."""
    grid = ends.shape[1:]
    kept, rows = spec.format.scale, replace(spec, block=(None, *((1,) * len(grid))))
    if kept is None or not kept.scaled:  # each block by itself
        parts = _tiles(grid, (1,) * len(grid))
    else:
        parts = [Tile(tuple(slice(0, n) for n in grid), (), 0)]

    def chosen(part: Tile) -> Any:
        own = runtime.on_each(lambda a: a[None], tuple(_cut(g, Tile((), part.at, 0)) for g in given))
        with np.errstate(all="ignore"):
            qparams: Any = choose(ends[:, *part.at], *own, spec=rows, recipe=recipe, b=_numpy())
        return runtime.on_each(lambda a: a[0], qparams)

    found = chosen(parts[0])
    if len(parts) == 1:
        return QParams(*found)
    whole = runtime.on_each(lambda a: np.empty(grid, a.dtype), found)

    def some(start: int, stop: int) -> None:
        for part in parts[start:stop]:
            for all_of, here in zip(runtime.arrays_in(whole), runtime.arrays_in(chosen(part)), strict=True):
                all_of[part.at] = here

    map_ranges(some, len(parts), 1, chunks_per_core=CHUNKS_PER_CORE)
    return QParams(*whole)


def _usable(x: Array, given: QParams, spec: Spec, recipe: Recipe) -> QParams:
    return _of_extrema(x, spec, recipe, _given.usable_qparams, QParams(*given))


def _encoded(x: Array, qparams: QParams, key: Array | None, spec: Spec, recipe: Recipe) -> Array:
    codes = _encoded_by_loops(x, qparams, spec, recipe, packed=False)
    if codes is not NotImplemented:
        return codes
    codes = aligned_empty(x.shape, spec.element.storage)

    def work(tile: Tile) -> None:
        own = _cut(qparams, tile)
        codes[tile.at] = affine.encode(x[tile.at], own, key, spec=spec, recipe=recipe, first=tile.first, b=_numpy())

    for_tiles(work, x.shape, spec.block)
    return codes


def _encoded_by_loops(
    x: Array, qparams: QParams, spec: Spec, recipe: Recipe, packed: bool, out: Array | None = None
) -> Any:
    """Codes, into ``out`` if it is given; NotImplemented where no loop serves."""
    codes = encoders.encode(x, qparams, spec, recipe, packed, out)
    return boxes.encode(x, qparams, spec, recipe, packed, out) if codes is NotImplemented else codes


def _cut(qparams: QParams, tile: Tile) -> QParams:
    """The parameters of a tile: those of its blocks; a number that all scales share is no part of the grid."""
    found: QParams = runtime.on_each(lambda a: a if a.size == 1 else a[tile.on_grid], qparams)
    return found


# ---- loops for plain integers


def _quantize_rows(x: Array, grid: tuple[int, ...], spec: Spec, recipe: Recipe) -> Any:
    """A scale for each row, symmetric, without compiled loops."""
    rows, width = x.shape
    codes = aligned_empty(x.shape, spec.element.storage)
    scale = aligned_empty((rows, 1), np.float32)
    factor = np.float32(_statistics.inverse_of_largest(spec, recipe))

    def work(start: int, stop: int) -> bool:
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

    if not all(map_ranges(work, rows, 1, x.size)):
        return NotImplemented  # the reference knows what becomes of NaN and infinities
    return codes, scale.reshape(grid), None


def _quantize_spanning(x: Array, grid: tuple[int, ...], spec: Spec, recipe: Recipe) -> Any:
    """A scale for each column, or one for all of a vector: extrema of blocks of rows, then calibration, then codes."""
    height = max(1, BLOCK // math.prod(x.shape[1:]))

    def extrema(start: int, stop: int) -> tuple[Array, Array]:
        low, high = (end(x[start : min(start + height, stop)], axis=0) for end in (np.min, np.max))
        for n in range(start + height, stop, height):
            part = x[n : min(n + height, stop)]
            low, high = np.minimum(low, part.min(axis=0)), np.maximum(high, part.max(axis=0))
        return low, high

    found = map_ranges(extrema, len(x), 1, x.size)
    ends = np.stack([np.min([lo for lo, _ in found], axis=0), np.max([hi for _, hi in found], axis=0)])
    ends = ends.reshape(2, -1)
    if not np.isfinite(ends).all():
        return NotImplemented
    with np.errstate(all="ignore"):
        a_column = replace(spec, block=(None, 1))
        scale, zero_point, *_ = affine.choose_qparams(ends, spec=a_column, recipe=recipe, b=_numpy())
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


def _dequantize_rows(w: Coded, spec: Spec, out: str, into: Array | None = None) -> Any:
    """To float32, where every row of a view of the codes has one scale; into memory that exists if it is given."""
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
    values = aligned_empty(rows, np.float32) if into is None else np.asarray(into).reshape(rows)
    s = np.broadcast_to(scale.reshape(-1, 1), (rows[0], 1))
    z = None if zero_point is None else np.broadcast_to(zero_point.reshape(-1, 1), (rows[0], 1))
    # (q - z) * s is at most 65535 * s: beyond float32 only for scales that are not usual
    may_overflow = bool((np.abs(scale) > spec.source.max / (1 << 17)).any())
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
        steps = runtime.steps_of_elements(codes.size)
        ends = ends_of_parts(rows[0], 1, steps)
        runtime.in_parts(loops.decode_rows_in_parts, steps, ends, flat, scales, zeros, values)
    else:
        map_ranges(work, rows[0])
    return values.reshape(codes.shape)


FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    affine.quantize: quantize,
    _given.quantize_with: quantize_with,
    affine.choose_qparams: choose_qparams,
    _given.usable_qparams: usable_qparams,
    _clipping.clipped: clipped,
    _clipping.count_clipped: count_clipped,
    _clipping.count_beyond: count_beyond,
    _clipping.reaches_an_end: reaches_an_end,
    _given.fake_quantize: fake_quantize,
    affine.dequantize: dequantize,
    affine.any_unusable: any_unusable,
    affine.scales_of: scales_of,
    _into.quantize_stored: quantize_stored,
    _into.dequantize_stored: dequantize_stored,
    **OF_STREAMS,
}
"""The forms, each under its operation: they know every format."""

INTO: dict[Callable[..., Any], Callable[..., Any]] = {
    _into.extrema: extrema,
    _into.choose_of_extrema: choose_of_extrema,
    _into.encode_into: encode_into,
    _into.decode_into: decode_into,
    _into.look_at_codes: look_at_codes,
    _into.look_at_values: look_at_values,
}
"""Those that need no memory for a result."""
