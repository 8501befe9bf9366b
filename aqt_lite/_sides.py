"""Quantized arrays in NumPy's memory, whoever made them, and how many of their numbers differ.

Owns: ``Side``, reading one from a ``QArray`` or from codes and scales, and ``differences``. Imports: the container,
granularity, formats, and walking through large arrays (report). Nothing here knows a convention.

A ``Side`` is changed by replacing its parts, and by functions of its codes that are put off: codes are looked at box by
box, and a box of changed codes is made when it is asked for. So a hypothesis about two large arrays costs no memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._foreign import refusal
from aqt_lite._parts import Box, boxes
from aqt_lite._protocol import Backend
from aqt_lite._registry import backend_of, get_backend
from aqt_lite.elements import FLOAT_TYPES, INTEGER_TYPES, ElementType, Integer
from aqt_lite.formats import FORMATS, SCALE_FORMATS, Format, element_type, known_format
from aqt_lite.granularity import Block, granularity_of, grid_of
from aqt_lite.qarray import QArray
from aqt_lite.report import MOST_ELEMENTS

__all__ = [
    "Differences",
    "Side",
    "differences",
    "differences_at_ties",
    "read_floats",
    "read_side",
    "some_blocks",
    "values_that_differ",
]

_Numbers = np.ndarray[Any, Any]
_CodeMap = tuple[Callable[[_Numbers, int], _Numbers], int, int]
"""A function of codes and of an axis, the axis, and the length along it of which the function is given multiples."""

_FEW_ELEMENTS = 1 << 17
"""Elements that rules are tried on before all of them."""
_ENOUGH = 64
"""Codes that together show how many bits they have."""
_SAMPLE = 4
"""Boxes that a sample consists of."""


@dataclass(frozen=True, eq=False)
class Side:
    """One of two arrays that are compared. Numbers of blocks are float64, or int64, on the grid of blocks."""

    codes: _Numbers
    """Integers of any type, one an element."""
    scale: _Numbers
    zero_point: _Numbers
    """Zeros, where there are none."""
    offset: _Numbers
    block: Block
    format: Format
    """Which numbers codes stand for."""
    source: str | None = None
    """Type of the values, where it is known."""
    scale_dtype: str | None = None
    """Name of the format that scales are kept in, where it is another than the format says."""
    outer: float | None = None
    """The scale of the scales, where they have one for all."""
    maps: tuple[_CodeMap, ...] = ()
    """What is still to be done to the codes."""

    @property
    def element(self) -> ElementType:
        """Which numbers codes stand for."""
        return self.format.element

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return tuple(self.codes.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.codes.size)

    @property
    def grid(self) -> tuple[int, ...]:
        """Blocks along each axis."""
        return tuple(self.scale.shape)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Length of a block along each axis, at least 1."""
        return tuple(max(min(b or n, n), 1) for n, b in zip(self.shape, self.block, strict=True))

    def with_grids(self, function: Callable[[_Numbers], _Numbers], block: Block | None = None) -> Side:
        """The same, everything that has an entry for each block changed."""
        made: dict[str, Any] = {name: function(getattr(self, name)) for name in ("scale", "zero_point", "offset")}
        return replace(self, block=self.block if block is None else block, **made)

    def with_codes(self, function: Callable[[_Numbers, int], _Numbers], axis: int = 0, unit: int = 1) -> Side:
        """The same, its codes changed when they are looked at, in multiples of ``unit`` along an axis."""
        return replace(self, maps=(*self.maps, (function, axis % max(len(self.shape), 1), unit)))

    def with_axes(self, order: Sequence[int], *, codes: bool = True, grids: bool = True) -> Side:
        """The same, its axes in another order."""
        at = {old: new for new, old in enumerate(order)}
        made = self
        if codes:
            maps = tuple((f, at.get(axis, axis), unit) for f, axis, unit in self.maps)
            made = replace(made, codes=np.transpose(made.codes, order), maps=maps)
        if grids:
            made = made.with_grids(lambda g: np.transpose(g, order), tuple(self.block[i] for i in order))
        return made

    def codes_in(self, box: Box) -> _Numbers:
        """The codes of a box that is cut at multiples of the units that ``maps`` have."""
        codes = np.asarray(self.codes[tuple(slice(*limits) for limits in box)])
        for function, axis, _ in self.maps:
            codes = function(codes, axis)
        return codes

    def cells(self, name: str, box: Box, sizes: tuple[int, ...]) -> _Numbers:
        """The numbers of blocks in a box of another grid, the blocks of which have these sizes."""
        pairs = zip(box, sizes, self.sizes, strict=True)
        index = [np.arange(start, stop) * size // own for (start, stop), size, own in pairs]
        return np.asarray(getattr(self, name)[np.ix_(*index)])

    def values_in(self, box: Box) -> _Numbers:
        """What the codes of a box stand for, in float64, which holds all but the sum with an offset exactly."""
        ones = (1,) * len(self.shape)
        numbers = self.element.decode(self.codes_in(box), get_backend("numpy"), "float64").astype(np.float64)
        scale, zero, offset = (self.cells(name, box, ones) for name in ("scale", "zero_point", "offset"))
        return np.asarray((numbers - zero) * scale + offset)

    def in_words(self) -> str:
        """Format, shape and granularity."""
        kept = self.scale_dtype or (self.format.scale.name if self.format.scale else None)
        scales = f", scales in {kept}" if kept else ""
        return f"{self.format.name}, shape {self.shape}, {granularity_of(self.block)}{scales}"


# ---- reading


def read_side(given: Any, argument: str, like: Side | None = None) -> Side:
    """A side from a QArray, or from codes, scale and perhaps zero point; ``like`` says what these do not."""
    if isinstance(given, QArray):
        return _of_qarray(given, argument)
    if not isinstance(given, tuple):
        raise TypeError(
            _of_layer(given, argument)
            or refusal(given, argument)
            or f"{argument} is a {type(given).__name__}: give a QArray, or a tuple (codes, scale) or (codes, scale, "
            "zero_point)"
        )
    if not 2 <= len(given) <= 3:
        raise TypeError(f"{argument} is a tuple of {len(given)}: give (codes, scale) or (codes, scale, zero_point)")
    codes, scale = (_host(part, f"{argument}[{i}]") for i, part in enumerate(given[:2]))
    zero = None if len(given) < 3 or given[2] is None else _host(given[2], f"{argument}[2]")
    return _of_parts(codes, scale, zero, argument, like)


def read_floats(x: Any, argument: str) -> _Numbers:
    """Floats in NumPy's memory."""
    values = _host(x, argument)
    if values.dtype.name not in FLOAT_TYPES:
        raise TypeError(
            f"{argument} has dtype {values.dtype.name}: give the floats that were quantized, or codes with their scale "
            f"as a tuple ({argument}, scale)"
        )
    return values


def _host(x: Any, argument: str) -> _Numbers:
    if isinstance(x, int | float | list) and not isinstance(x, bool):  # text: floats are rounded to float32
        values = np.asarray(x)
        return values.astype(np.float32) if values.dtype.kind == "f" else values
    if layers := _of_layer(x, argument):  # a layer of torch or NNX, which holds arrays but is none
        raise TypeError(layers)
    b = backend_of(x)
    if b is None:
        raise TypeError(refusal(x, argument) or f"{argument} is a {type(x).__name__}: give an array")
    _check_known(b, x, argument)
    return np.asarray(b.to_numpy(x))


def _of_layer(given: Any, argument: str) -> str | None:
    """What to pass in place of a layer's quantized weight, of torch or Flax NNX; None where it is none."""
    read = getattr(given, "get_value", None)
    ways = {"qarray": lambda: getattr(given, "qarray", None), "get_value()": read if callable(read) else lambda: None}
    for way, value in ways.items():
        try:
            held = value()
        except TypeError:  # another library's, with arguments of its own
            continue
        if isinstance(held, QArray):
            return f"{argument} is a layer's {type(given).__name__}, which holds a QArray: pass {argument}.{way}"
    return None


def _check_known(b: Backend, x: Any, argument: str) -> None:
    if b.is_traced(x):
        raise TypeError(f"compare needs values, but {argument} is being traced: call it outside the compiled function")
    if problem := b.why_unusable(x):
        raise TypeError(f"{argument} {problem}")


def _of_qarray(q: QArray, argument: str) -> Side:
    for array in q._arrays():
        _check_known(q._backend, array, argument)
    q = q._checked().to_backend("numpy")
    grid = grid_of(q.shape, q.block)
    kept = q.scale.dtype if isinstance(q.scale, QArray) else None
    form = known_format(q.dtype) or Format(q.dtype, element_type(q.dtype))
    outer = q.scale.scales if isinstance(q.scale, QArray) else None
    offset = q.offset.dequantize() if isinstance(q.offset, QArray) else q.offset
    return Side(
        codes=np.asarray(q.qvalue),
        scale=_on_grid(1.0 if q.scale is None else q.scales, grid, np.float64),
        zero_point=_on_grid(0 if q.zero_point is None else q.zero_point, grid, np.int64),
        offset=_on_grid(0.0 if offset is None else offset, grid, np.float64),
        block=q.block,
        format=form,
        source=q.float_dtype,
        scale_dtype=None if kept is None or (form.scale and form.scale.name == kept) else kept,
        outer=float(outer.reshape(-1)[0]) if outer is not None and outer.size == 1 else None,
    )


def _on_grid(numbers: Any, grid: tuple[int, ...], dtype: Any) -> _Numbers:
    return np.broadcast_to(np.asarray(numbers).astype(dtype), grid)


def _of_parts(codes: _Numbers, scale: _Numbers, zero: _Numbers | None, argument: str, like: Side | None) -> Side:
    form = _format_of_codes(codes, argument, like)
    if codes.dtype.name in FORMATS and codes.dtype.name not in INTEGER_TYPES:  # float8, int4: types of one code an item
        is_float = not codes.dtype.name.lstrip("u").startswith("int")
        codes = codes.view("uint8") if is_float else codes.astype(form.element.storage)
    low, high = form.element.codes
    bad = (codes < low) | (codes > high)
    if bad.any():
        raise ValueError(f"{argument}[0] has {codes[bad][0]}: codes of {form.name} are {low} to {high}")
    if scale.dtype.name not in (*FLOAT_TYPES, *INTEGER_TYPES, *SCALE_FORMATS):
        raise TypeError(f"{argument}[1] has dtype {scale.dtype.name}: scales are real numbers")
    if zero is not None and zero.dtype.name not in (
        *INTEGER_TYPES,
        *(f.name for f in FORMATS.values() if f.element.zero_points),
    ):
        raise TypeError(f"{argument}[2] has dtype {zero.dtype.name}: zero points are integers, codes of 0.0")
    block = _block_of(codes.shape, scale.shape, f"{argument}[1]", like)
    grid = grid_of(codes.shape, block)
    if zero is not None and zero.size != 1 and zero.shape not in (scale.shape, (scale.size,)):
        raise ValueError(
            f"{argument}[2] has shape {zero.shape}: give a zero point for each scale, {scale.shape}, or one"
        )
    return Side(
        codes=codes,
        scale=_placed(scale, grid).astype(np.float64),
        zero_point=_placed(np.zeros((), np.int64) if zero is None else zero, grid).astype(np.int64),
        offset=np.broadcast_to(np.zeros(()), grid),
        block=block,
        format=form,
    )


def _placed(numbers: _Numbers, grid: tuple[int, ...]) -> _Numbers:
    return np.broadcast_to(numbers.reshape(()), grid) if numbers.size == 1 else numbers.reshape(grid)


def _format_of_codes(codes: _Numbers, argument: str, like: Side | None) -> Format:
    """What codes without a name are of: the other side's format, if they can be; else of the integers they fit."""
    name = codes.dtype.name
    if name in FORMATS and name not in INTEGER_TYPES:
        return FORMATS[name]
    if name not in INTEGER_TYPES:
        raise TypeError(f"{argument}[0] has dtype {name}: give integer codes")
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    likely = [FORMATS[name]] if name in FORMATS else [FORMATS[n] for n in ("int8", "int16", "uint16")]
    if like is None and codes.size >= _ENOUGH:  # arrays of bytes that hold codes of fewer bits
        sign = "u" if name.startswith("u") else ""
        likely = [*(FORMATS[f"{sign}int{bits}"] for bits in (2, 3, 4)), *likely]
    if like is not None:
        e = like.element
        other = [f for f in FORMATS.values() if f.element.zero_points and e.zero_points and f.element.bits == e.bits]
        other = [f for f in other if f.element.signed != e.signed]
        same_sign = name in FORMATS and name.startswith("u") == e.storage.startswith("u")
        likely = [like.format, *other, *likely] if same_sign or name not in FORMATS else [*other, like.format, *likely]
        if name in FORMATS and not (e.zero_points or name == e.storage):
            likely = [FORMATS[name], like.format]
    for form in likely:
        if form.element.codes[0] <= low and high <= form.element.codes[1]:
            return form
    raise ValueError(f"{argument}[0] has codes {low} to {high}: more than 16 bits")


def _block_of(shape: tuple[int, ...], scales: tuple[int, ...], argument: str, like: Side | None) -> Block:
    """The blocks that a scale's shape means; those of ``like`` where it could mean them."""
    if all(n == 1 for n in scales):
        return (None,) * len(shape) if like is None or like.shape != shape or like.scale.size > 1 else like.block
    if like is not None and like.shape == shape and like.grid == scales:
        return like.block
    if len(scales) == 1 and len(shape) > 1:
        axes = [axis for axis, n in enumerate(shape) if n == scales[0]]
        if like is not None and len(like.block) == len(shape):
            axes.sort(key=lambda axis: like.block[axis] != 1)
        if axes:
            return tuple(1 if axis == axes[0] else None for axis in range(len(shape)))
    if len(scales) == len(shape):
        block = [_size_of_block(n, s) for n, s in zip(shape, scales, strict=True)]
        if grid_of(shape, tuple(block)) == scales:
            return tuple(block)
    raise ValueError(
        f"{argument} has shape {scales}, which is no grid of blocks of codes of shape {shape}: give as many "
        "dimensions, 1 where all of an axis shares a scale, or a QArray made with QArray.from_codes(granularity=)"
    )


def _size_of_block(length: int, scales: int) -> int | None:
    return None if scales == 1 else max(-(-length // max(scales, 1)), 1)


# ---- counting


class Differences(NamedTuple):
    """How many numbers of two sides differ."""

    codes: int
    scales: int
    zero_points: int
    offsets: int
    formats: bool
    """Whether codes stand for other numbers."""
    blocks: bool
    """Whether blocks have other sizes. Numbers of blocks are then counted on the coarsest grid that both fit."""
    all_codes: int
    all_scales: int
    largest_code: int = 0
    """Largest difference of two codes."""
    largest_scale: float = 0.0
    """Largest ratio of two scales, less 1."""
    largest_zero_point: int = 0
    largest_offset: float = 0.0

    @property
    def none(self) -> bool:
        """Whether nothing differs."""
        return not any(self[:6])

    @property
    def shares(self) -> tuple[float, ...]:
        """The part that differs of codes, scales, zero points, offsets, formats and block sizes."""
        of = (self.all_codes, *(self.all_scales,) * 3, 1, 1)
        return tuple(count / max(all_, 1) for count, all_ in zip(self[:6], of, strict=True))

    @property
    def weight(self) -> float:
        """The larger, the more is different."""
        return sum(self.shares[:4]) + 0.01 * sum(self.shares[4:])


def differences(a: Side, b: Side, *, sample: bool = False) -> Differences | None:
    """How many numbers differ, of all or of a sample of boxes; None where shapes do."""
    if a.shape != b.shape:
        return None
    codes, largest, seen = 0, 0, 0
    for box in _boxes(a, b, sample):
        first, second = a.codes_in(box), b.codes_in(box)
        differ = first != second
        seen += first.size
        count = int(np.count_nonzero(differ))
        if count:
            codes += count
            apart = first[differ].astype(np.int64) - second[differ].astype(np.int64)
            largest = max(largest, int(np.abs(apart).max()))
    of_grids = _differences_of_grids(a, b, sample)
    return Differences(
        codes=codes,
        scales=of_grids["scale"][0],
        zero_points=of_grids["zero_point"][0],
        offsets=of_grids["offset"][0],
        formats=a.element != b.element,
        blocks=a.sizes != b.sizes,
        all_codes=seen,
        all_scales=of_grids["scale"][2],
        largest_code=largest,
        largest_scale=of_grids["scale"][1],
        largest_zero_point=int(of_grids["zero_point"][1]),
        largest_offset=of_grids["offset"][1],
    )


def _differences_of_grids(a: Side, b: Side, sample: bool) -> dict[str, tuple[int, float, int]]:
    """For everything that blocks have: how many differ, by how much at most, of how many."""
    sizes = tuple(int(np.gcd(i, j)) for i, j in zip(a.sizes, b.sizes, strict=True))
    grid = tuple(-(-n // size) for n, size in zip(a.shape, sizes, strict=True))
    if 0 in a.shape and a.grid == b.grid:
        grid = a.grid  # scales of blocks that have no elements
    every = boxes(grid, MOST_ELEMENTS, range(len(grid))) if 0 not in grid else iter(())
    walked = list(_a_few(every) if sample and 0 not in grid else every)
    found = {}
    for name in ("scale", "zero_point", "offset"):
        count, largest, seen = 0, 0.0, 0
        for box in walked:
            first, second = a.cells(name, box, sizes), b.cells(name, box, sizes)
            differ = (first != second) & ~((first != first) & (second != second))
            seen += first.size
            if differ.any():
                count += int(np.count_nonzero(differ))
                with np.errstate(all="ignore"):
                    i, j = first[differ].astype(np.float64), second[differ].astype(np.float64)
                    apart = np.abs(i / j - 1) if name == "scale" else np.abs(i - j)
                    largest = float(np.maximum(largest, np.nan_to_num(apart, nan=np.inf).max()))
        found[name] = (count, largest, seen)
    return found


def values_that_differ(a: Side, b: Side) -> tuple[int, float]:
    """How many values differ as real numbers, whatever codes and scales make them; and by how much at most."""
    count, largest = 0, 0.0
    with np.errstate(all="ignore"):
        for box in _boxes(a, b, False):
            first, second = a.values_in(box), b.values_in(box)
            differ = (first != second) & ~((first != first) & (second != second))
            if differ.any():
                count += int(np.count_nonzero(differ))
                apart = np.abs(first[differ] - second[differ])
                largest = float(np.maximum(largest, np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max()))
    return count, largest


def differences_at_ties(a: Side, b: Side, x: _Numbers) -> int | None:
    """How many codes that differ belong to values halfway between two codes, but for roundings of float32.

    None where codes are no whole numbers of steps.
    """
    if not isinstance(a.element, Integer):
        return None
    count, ones = 0, (1,) * len(a.shape)
    for box in _boxes(a, b, False):
        differ = a.codes_in(box) != b.codes_in(box)
        if differ.any():
            values = np.asarray(x[tuple(slice(*limits) for limits in box)]).astype(np.float64)
            with np.errstate(all="ignore"):
                steps = (values - a.cells("offset", box, ones)) / (a.cells("scale", box, ones) * a.element.step)
                apart = np.abs(steps - np.floor(steps) - 0.5)
                count += int(np.count_nonzero(differ & (apart <= np.maximum(np.abs(steps), 1) * 2.0**-22)))
    return count


def some_blocks(side: Side, x: _Numbers) -> tuple[Side, _Numbers]:
    """Of a large array whole blocks, evenly spaced along the axis that has most of them; of a small one all.

    Of one block alone some elements, those among them that its scale is chosen from.
    """
    if side.size <= _FEW_ELEMENTS:
        return side, x
    if side.scale.size == 1:
        flat = np.reshape(x, -1)
        finite = np.isfinite(flat)
        ends = (np.argmin(np.where(finite, flat, np.inf)), np.argmax(np.where(finite, flat, -np.inf)))
        chosen = np.unique([*np.linspace(0, side.size - 1, _FEW_ELEMENTS).astype(np.int64), *ends])
        alone = side.with_grids(lambda g: g.reshape(1), (None,))
        return replace(alone, codes=np.reshape(side.codes, -1)[chosen]), flat[chosen]
    axis = int(np.argmax(side.grid))
    number, size = side.grid[axis], side.sizes[axis]
    chosen = np.unique(np.linspace(0, number - 1, max(number * _FEW_ELEMENTS // side.size, 1)).astype(np.int64))
    inside = (chosen[:, None] * size + np.arange(size)).reshape(-1)
    inside = inside[inside < side.shape[axis]]
    part = side.with_grids(lambda g: np.take(g, chosen, axis))
    return replace(part, codes=np.take(side.codes, inside, axis)), np.take(x, inside, axis)


def _boxes(a: Side, b: Side, sample: bool) -> Iterator[Box]:
    """Boxes that are cut where functions of codes may be."""
    if not a.size:
        return iter(())
    shape, block = a.shape, [1] * len(a.shape)
    for side in (a, b):
        for _, axis, unit in side.maps:
            if unit > 1:
                block[axis] = min(math.lcm(block[axis], unit), shape[axis])
    order = sorted(range(len(shape)), key=lambda axis: block[axis])
    least = math.prod(block)
    if not sample:
        return boxes(shape, max(MOST_ELEMENTS, least), order, tuple(block))
    return _a_few(boxes(shape, max(MOST_ELEMENTS // _SAMPLE, least), order, tuple(block)))


def _a_few(every: Iterator[Box]) -> Iterator[Box]:
    """Evenly spaced."""
    known = list(every)
    return iter([known[i] for i in np.unique(np.linspace(0, len(known) - 1, _SAMPLE).astype(int))])
