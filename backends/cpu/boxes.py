"""Quantization of arrays that no loop reads as they lie: in boxes that fit a cache, each laid out as loops want it.

Owns: in which order the axes of an array are taken, the boxes, how values come into one and codes out of it, and the
forms made of that: scales and codes at once, extrema, codes. Imports: ``encoders``, which says what the loops are told,
the runtime, ``serve``'s rules through both. ``quantize`` calls it, and has tiles of NumPy's steps for what is not
served here.

An array may be transposed, a part of another, float16 or bfloat16, or its groups may lie along another axis than
memory does. One thing is done about all of these. The axes are taken in the order in which groups lie last: first those
along which every index has a scale of its own, then that which is cut into groups, then those that lie in one block,
and each kind as memory has it. A box of the array in that order becomes contiguous float32 (``_gathered``), which is
what the loops of ``encoding`` read, and its codes go to their places in the order of C (``moved``). Where an axis that
is not the last has neighbours in memory, the box is turned in registers on its way: NumPy's copy would take 14 times as
long, more than all loops together.
"""

from __future__ import annotations

import itertools
import math
import threading
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, QParams, Recipe, Spec, scales
from aqt_lite.backends.cpu import encoders, runtime
from aqt_lite.backends.cpu.packed import packed_rows
from aqt_lite.backends.cpu.runtime import CHUNKS_PER_CORE, LARGE, aligned_empty, map_ranges
from aqt_lite.granularity import grid_of
from aqt_lite.packing import bytes_of

__all__ = ["encode", "extrema", "moved", "quantize"]

BOX = 1 << 17
"""Elements of a box: half a megabyte of float32, which the second cache holds beside its codes."""

LONGEST_RUN = 1 << 11
"""Of the last axis in a box, unless a group is longer."""

SHORTEST_RUN = 64
"""Of an axis that has its neighbours in memory: a line of the cache, of codes of a byte."""

LONGEST_GROUP = 1 << 14
"""Elements of a group up to which boxes have whole ones. Of longer ones extrema are found first, part by part."""

FEWEST_TO_TURN = 1 << 8
"""Items of a plane that are worth a call of the loop that turns them."""

_HALF, _FLOAT32 = np.dtype(np.float16), np.dtype(np.float32)


class _Box(NamedTuple):
    """A part of an array whose axes are in the order of ``_Boxes``."""

    at: tuple[slice, ...]
    on_grid: tuple[slice, ...]


class _Boxes(NamedTuple):
    """An array as boxes."""

    axes: tuple[int, ...]
    """In the order in which they are taken."""
    leading: int
    """How many of them have a scale for each index."""
    block: tuple[int, ...]
    """In that order; along an axis that lies in one block its length."""
    boxes: list[_Box]
    whole: bool
    """Whether groups are."""

    def in_order(self, array: Array) -> Array:
        """A view of the array, or of one on its grid."""
        return array.transpose(self.axes)

    def rows(self, box: _Box) -> tuple[int, int, int]:
        """Rows, their length, and that of a group in them."""
        shape, n = _shape_of(box), self.leading
        length = math.prod(shape[n:])
        size = min(self.block[n], shape[n]) * math.prod(shape[n + 1 :])
        return math.prod(shape[:n]), length, size


def _shape_of(box: _Box) -> tuple[int, ...]:
    return tuple(s.stop - s.start for s in box.at)


def _is_readable(x: Any, spec: Spec) -> bool:
    """Whether boxes of it can be made float32, and are worth loops being loaded."""
    if not isinstance(x, np.ndarray) or x.size < LARGE or spec.source.compute != "float32":
        return False
    if x.dtype.name not in ("float32", "float16", "bfloat16") or not x.dtype.isnative:
        return False
    return runtime.encoding_loops() is not None and runtime.turning_loops() is not None


def _boxes_of(x: Array, spec: Spec, multiple: int = 1) -> _Boxes | None:
    """None where the loops do not serve, or need no boxes.

    Boxes begin at a ``multiple`` along the last axis of the array.
    """
    if encoders.serves(x, spec):
        return None
    shape = x.shape
    block = tuple(n if size is None else min(size, n) for n, size in zip(shape, spec.block, strict=True))
    kinds: list[list[int]] = [[], [], []]
    for axis in sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis])):
        kinds[0 if block[axis] == 1 else 2 if block[axis] == shape[axis] else 1].append(axis)
    leading, cut, within = kinds
    if len(cut) > 1 or not cut + within:
        return None
    axes = (*leading, *cut, *within)
    n, size = len(leading), math.prod(block)
    whole = size <= LONGEST_GROUP
    lengths, blocks = [shape[a] for a in axes], [block[a] for a in axes]
    extents = [1] * len(axes) if not whole else [*([1] * n), *blocks[n:]]
    units = [1] * n + [blocks[n] if cut and whole else 1] + [1] * len(within[0 if cut else 1 :])

    def grow(place: int, extent: int) -> None:
        unit = units[place]
        if axes[place] == x.ndim - 1:
            unit = math.lcm(unit, multiple)
        extents[place] = min(max(extents[place], extent // unit * unit, unit), lengths[place])

    neighbours = x.ndim - 1, min(range(x.ndim), key=lambda axis: (abs(x.strides[axis]), -axis))
    grow(len(axes) - 1, LONGEST_RUN)
    for axis in neighbours:
        grow(axes.index(axis), SHORTEST_RUN)
    for place in reversed(range(len(axes))):
        grow(place, extents[place] * (BOX // math.prod(extents)))
    if math.prod(extents) > 8 * BOX:
        return None
    parts = [
        _parts(lengths[i], blocks[i] if cut and i == n and not whole else lengths[i], extents[i], blocks[i])
        for i in range(len(axes))
    ]
    starts = {s.start % multiple for s, _ in parts[axes.index(x.ndim - 1)]}
    if starts != {0}:
        return None
    boxes = [_Box(*zip(*box, strict=True)) for box in itertools.product(*parts)]
    return _Boxes(axes, n, tuple(blocks), boxes, whole)


def _parts(length: int, within: int, extent: int, block: int) -> list[tuple[slice, slice]]:
    """Ranges of so many indices, none across an end of what they lie ``within``, each with that of its blocks."""
    ranges = [
        (start, min(start + extent, first + within, length))
        for first in range(0, length, within)
        for start in range(first, min(first + within, length), extent)
    ]
    return [(slice(start, stop), slice(start // block, -(-stop // block))) for start, stop in ranges]


# ---- into a box, and out of it


def moved(source: Array, out: Array) -> None:
    """``out[...] = source`` of the same type, by a loop where neighbours of the one are none of the other."""
    item = source.itemsize
    from_axis, to_axis = _axis_of_neighbours(source), _axis_of_neighbours(out)
    small = from_axis is None or to_axis is None or from_axis == to_axis or item not in (1, 4)
    if small or source.shape[from_axis] * source.shape[to_axis] < FEWEST_TO_TURN:
        np.copyto(out, source)
        return
    height, width = source.shape[to_axis], source.shape[from_axis]
    turn, by, to = runtime.turning_loops().turn_plane, source.strides[to_axis], out.strides[from_axis]
    others = [axis for axis in range(source.ndim) if axis not in (from_axis, to_axis)]
    first, there = source.ctypes.data, out.ctypes.data
    for index in np.ndindex(*(source.shape[axis] for axis in others)):
        start = first + sum(i * source.strides[axis] for i, axis in zip(index, others, strict=True))
        end = there + sum(i * out.strides[axis] for i, axis in zip(index, others, strict=True))
        turn(start, by, height, width, end, to, item)


def _axis_of_neighbours(a: Array) -> int | None:
    """The axis whose neighbours are those in memory."""
    found = (axis for axis in range(a.ndim) if a.shape[axis] > 1 and a.strides[axis] == a.itemsize)
    return next(found, None)


class _Memory(threading.local):
    """A thread's own for what becomes of a box, kept from one to the next: fresh memory costs more than the loops."""

    def __init__(self) -> None:
        self._kept: dict[str, Array] = {}

    def of(self, what: str, shape: tuple[int, ...], dtype: Any) -> Array:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if what not in self._kept or self._kept[what].size < size:
            self._kept[what] = np.empty(size, np.uint8)
        return self._kept[what][:size].view(dtype).reshape(shape)


def _gathered(part: Array, memory: _Memory) -> Array:
    """A part of an array, of whatever type and order, as contiguous float32."""
    values = memory.of("values", part.shape, np.float32)
    order = sorted(range(part.ndim), key=lambda axis: -abs(part.strides[axis]))
    in_order = order == list(range(part.ndim))
    if part.dtype == _FLOAT32 and (in_order or _axis_of_neighbours(part) is not None):
        moved(part, values)
        return values
    lies = part.transpose(order)
    wide = values if in_order else memory.of("as it lies", lies.shape, np.float32)
    if part.dtype == _HALF:
        halves = memory.of("halves", lies.shape, np.float16)
        np.copyto(halves, lies)
        runtime.turning_loops().widen(halves.view(np.uint16).reshape(-1), wide.view(np.uint32).reshape(-1))
    else:
        np.copyto(wide, lies, casting="same_kind")
    if not in_order:
        moved(wide.transpose(np.argsort(order)), values)
    return values


class _Codes(NamedTuple):
    """Where the codes of an array go, as they are kept."""

    kept: Array
    axes: tuple[int, ...]
    bits: int
    """Of a code in a stream of them; 0 where each has an item."""
    made: int
    """Of a code as loops make it."""

    def put(self, codes: Array, box: _Box, memory: _Memory) -> None:
        """Codes of a box, in its order of axes, as ``memory`` has them."""
        shape, last = _shape_of(box), self.kept.ndim - 1
        if not self.bits:
            moved(codes.view(self.kept.dtype).reshape(shape), self.kept.transpose(self.axes)[box.at])
            return
        place = self.axes.index(last)
        along = box.at[place]
        stream = slice(along.start * self.bits // 8, bytes_of(along.stop, self.bits))
        at = *box.at[:place], stream, *box.at[place + 1 :]
        kept = self.kept.transpose(self.axes)[at]
        if self.made < 8:
            kept[...] = codes.reshape(kept.shape)
        elif place == last:
            kept[...] = packed_rows(codes.reshape(shape), self.bits)
        else:
            before, after = math.prod(shape[:place]), math.prod(shape[place + 1 :])
            packed = memory.of("packed", kept.shape, np.uint8)
            pack = runtime.turning_loops().pack_across
            pack(codes.reshape(before, -1, after), self.bits, packed.reshape(before, -1, after))
            moved(packed, kept)


def _codes_of(
    found: _Boxes, shape: tuple[int, ...], numbers: encoders.Numbers, spec: Spec, packed: bool, out: Array | None = None
) -> _Codes:
    """``out`` if it is given, else new memory."""
    if out is not None:
        kept = np.asarray(out)
    elif packed:
        kept = aligned_empty((*shape[:-1], bytes_of(shape[-1], spec.element.bits)), np.uint8)
    else:
        kept = aligned_empty(shape, spec.element.storage)
    return _Codes(kept, found.axes, spec.element.bits if packed else 0, numbers.bits)


def _packs(found: _Boxes, spec: Spec) -> bool:
    """Whether loops may pack the codes of boxes: their rows are those of streams, where groups are whole bytes."""
    axis = len(found.axes) - 1
    if found.axes[-1] != axis or found.leading != axis:
        return False
    return found.block[-1] * spec.element.bits % 8 == 0 or spec.block[-1] is None


def _multiple(packed: bool) -> int:
    """Codes whose streams are whole bytes, whatever their bits."""
    return 8 if packed else 1


# ---- forms


@np.errstate(all="ignore")
def quantize(x: Array, spec: Spec, recipe: Recipe, packed: bool | None) -> Any:
    """Scales and codes at once, as ``encoders.quantize``: codes are None where ``packed`` is."""
    known = encoders.numbers_at_once(spec, recipe, packed=False) if _is_readable(x, spec) else None
    found = None if known is None else _boxes_of(x, spec, _multiple(bool(packed)))
    if known is None or found is None or not found.whole:
        return NotImplemented
    numbers = (_packs(found, spec) and packed and encoders.numbers_at_once(spec, recipe, packed=True)) or known
    loops, source, memory = runtime.encoding_loops(), found.in_order(x), _Memory()
    scale = aligned_empty(grid_of(x.shape, spec.block), encoders.dtype_of_scales(spec))
    scales_in_order = found.in_order(scale)
    codes = None if packed is None else _codes_of(found, x.shape, numbers, spec, packed)
    bits = 0 if codes is None else numbers.bits
    how = numbers.kind, bits, numbers.parameters, encoders.rule_of(spec, recipe, numbers), encoders.kept_as(spec)

    def work(start: int, stop: int) -> bool:
        for box in found.boxes[start:stop]:
            rows, length, size = found.rows(box)
            values = _gathered(source[box.at], memory).reshape(rows, length)
            own = memory.of("scales", (rows, -(-length // size)), scale.dtype)
            made = memory.of("codes", (rows, bytes_of(length, bits)), np.uint8)
            if not loops.quantize(values, size, *how, own.view(np.uint8), made):
                return False
            place = scales_in_order[box.on_grid]
            place[...] = own.reshape(place.shape)
            if codes is not None:
                codes.put(made, box, memory)
        return True

    if not all(map_ranges(work, len(found.boxes), 1, chunks_per_core=CHUNKS_PER_CORE)):
        return NotImplemented  # whoever knows what becomes of NaN and infinities does it again
    middles = np.full(scale.shape, spec.element.middle, np.int32) if spec.element.middle else None
    return Coded(None if codes is None else codes.kept, encoders.kept_of(scale, spec), middles)


def extrema(x: Array, spec: Spec, recipe: Recipe, magnitudes: bool) -> Array | None:
    """As ``encoders.extrema``."""
    counts_all = not recipe.ignore_nonfinite and spec.element.missing is None
    found = _boxes_of(x, spec) if counts_all and _is_readable(x, spec) else None
    if found is None:
        return None
    loops, source, memory, grid = runtime.encoding_loops(), found.in_order(x), _Memory(), grid_of(x.shape, spec.block)
    ends = np.zeros((1, *grid), np.float32) if magnitudes else np.full((2, *grid), np.inf, np.float32)
    if not magnitudes:
        ends[1] = -np.inf
    in_order = [found.in_order(end) for end in ends]
    one_at_a_time = threading.Lock()  # boxes may be parts of one group

    def work(start: int, stop: int) -> None:
        for box in found.boxes[start:stop]:
            rows, length, size = found.rows(box)
            values = _gathered(source[box.at], memory).reshape(rows, length)
            own = memory.of("extrema", (len(ends), rows, -(-length // size)), np.int32)
            (loops.magnitudes if magnitudes else loops.ranges)(values, size, *own)
            places = [end[box.on_grid] for end in in_order]
            numbers = [a.reshape(place.shape) for a, place in zip(own.view(np.float32), places, strict=True)]
            with one_at_a_time:
                if not magnitudes:
                    np.minimum(places[0], numbers[0], out=places[0])
                np.maximum(places[-1], numbers[-1], out=places[-1])

    map_ranges(work, len(found.boxes), 1, chunks_per_core=CHUNKS_PER_CORE)
    return ends


@np.errstate(all="ignore")
def encode(x: Array, qparams: QParams, spec: Spec, recipe: Recipe, packed: bool, out: Array | None = None) -> Any:
    """As ``encoders.encode``."""
    zero_point = 0 if qparams.zero_point is None else None
    known = encoders.numbers_for(qparams, spec, recipe, False, zero_point) if _is_readable(x, spec) else None
    found = None if known is None else _boxes_of(x, spec, _multiple(packed))
    if known is None or found is None:
        return NotImplemented
    packs = packed and _packs(found, spec)
    numbers = (packs and encoders.numbers_for(qparams, spec, recipe, True, zero_point)) or known
    b, loops, source, memory = get_backend("numpy"), runtime.encoding_loops(), found.in_order(x), _Memory()
    codes, grid = _codes_of(found, x.shape, numbers, spec, packed, out), grid_of(x.shape, spec.block)
    inverse, factor = encoders.steps_of(scales(qparams.scale, spec, b), spec, numbers.step, b)
    of_groups = [
        np.full((1, 1), absent, np.float32)
        if a is None
        else found.in_order(np.broadcast_to(np.asarray(a, np.float32), grid))
        for a, absent in ((inverse, 1), (factor, 1), (qparams.zero_point, 0))
    ]

    def work(start: int, stop: int) -> None:
        for box in found.boxes[start:stop]:
            rows, length, size = found.rows(box)
            values = _gathered(source[box.at], memory).reshape(rows, length)
            own = (
                a if a.shape == (1, 1) else np.ascontiguousarray(a[box.on_grid]).reshape(rows, -1) for a in of_groups
            )
            made = memory.of("codes", (rows, bytes_of(length, numbers.bits)), np.uint8)
            loops.encode(values, size, *numbers[:3], *own, made)
            codes.put(made, box, memory)

    map_ranges(work, len(found.boxes), 1, chunks_per_core=CHUNKS_PER_CORE)
    return codes.kept
