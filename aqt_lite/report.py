"""Numbers that say what quantization cost.

Owns: ``ErrorReport``. Imports: the container, granularity, parts and blocks of arrays, the range of codes. Everything
is computed in float64 on NumPy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._arguments import as_float_array
from aqt_lite._blocks import spread
from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Numbers
from aqt_lite._near import check_integer
from aqt_lite._parts import Box, boxes, memory_order, part_of, part_of_array, touched
from aqt_lite._progress import over, untold
from aqt_lite._range import representable_range, scales_of_blocks, with_margin
from aqt_lite._ways import not_a_qarray
from aqt_lite.elements import float_type
from aqt_lite.granularity import Block, Granularity, grid_of
from aqt_lite.qarray import QArray

__all__ = ["BlockError", "ErrorReport", "error_report"]

MOST_ELEMENTS = 1 << 16
"""Elements looked at together: 512 KB of float64, so that the arrays made of them stay in a core's cache."""

_AT_ONCE = 1 << 18
"""The same for a report, which decodes them: kernels leave fewer to the plain operations, which take longer."""

_MOST_BLOCKS = 1 << 17
"""Blocks whose sums are kept together, where they span several parts: 6 MB."""

_Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class BlockError:
    """One block's error."""

    index: tuple[int, ...]
    """Position in the grid of blocks, as in ``q.scale[index]``."""
    mse: float
    """Mean squared error of the block, in squared units of ``x``."""
    max_abs_error: float
    """Largest absolute error in the block, in units of ``x``."""
    scale: float
    """The block's scale."""


@dataclass(frozen=True)
class ErrorReport:
    """What :func:`error_report` found; prints as a table."""

    shape: tuple[int, ...]
    dtype: str
    granularity: Granularity
    mse: float
    """Mean squared error, in squared units of ``x``."""
    max_abs_error: float
    """Largest absolute error, in units of ``x``."""
    sqnr_db: float
    """Signal-to-quantization-noise ratio, ``10 log10(sum x^2 / sum e^2)``, in dB; infinite without error."""
    clipped: int
    """Values outside the range of the codes by more than half the step at its end. Infinities are; NaN is not."""
    nbytes: int
    """Bytes of codes, scales and zero points."""
    source_nbytes: int
    """Bytes of the array that was quantized."""
    worst_blocks: tuple[BlockError, ...]
    """Blocks with the largest mean squared error, worst first."""
    nonfinite: int = 0
    """Values of ``x`` that are NaN or infinite: no other number but ``clipped`` counts them."""
    missing: int = 0
    """Values that are missing in ``q``: no other number counts them."""

    def __str__(self) -> str:
        ratio = f" ({self.source_nbytes / self.nbytes:.2f}x smaller)" if self.nbytes else ""
        rows = [
            ("array", f"{self.shape} as {self.dtype}, {self.granularity}"),
            ("bytes", f"{self.source_nbytes} -> {self.nbytes}{ratio}"),
            ("SQNR", f"{self.sqnr_db:.2f} dB"),
            ("mean squared error", f"{self.mse:.6g}"),
            ("largest error", f"{self.max_abs_error:.6g}"),
            ("clipped values", f"{self.clipped}"),
        ]
        if self.nonfinite:
            rows.append(("non-finite values", f"{self.nonfinite}"))
        if self.missing:
            rows.append(("missing values", f"{self.missing}"))
        rows += [
            (
                f"worst block {i}",
                f"{block.index}: mse {block.mse:.6g}, max {block.max_abs_error:.6g}, scale {block.scale:.6g}",
            )
            for i, block in enumerate(self.worst_blocks, 1)
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


@naming_the_argument
def error_report(x: Numbers, q: QArray, *, worst: int = 3) -> ErrorReport:
    """How far ``q`` is from the array ``x`` that it stands for.

    Both are read part by part, so a memory-mapped file is never held whole: some 20 MB are needed beside the input.
    Numbers are sums of float64, part by part in the order in which ``x`` lies in memory: another layout of the same
    values may change their last digits.

    Values of ``x`` that are NaN or infinite are counted and left out of every other number, except that infinities lie
    outside the range of the codes and so are among the clipped ones. Values that ``q`` says are missing are counted and
    left out, too, whatever ``x`` has in their places. Where ``q`` stands for NaN otherwise and ``x`` does not, errors
    are NaN, and such blocks come first among the worst.

    Parameters
    ----------
    x : array of any backend, or list
        The original, of the shape of ``q``. It may live on another backend than ``q``. Of a masked array the values.
    q : QArray
    worst : int
        How many blocks to name.

    Raises
    ------
    TypeError, ValueError
        ``q`` is no QArray; shapes differ; the values are being traced by a compiler and not known yet.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> x = np.asarray([[191.6, -13.5, 728.6], [92.14, 295.5, -184], [0, 684.6, 245.5]], "float32")
    >>> print(aqt_lite.error_report(x, aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0)), worst=1))
    array               (3, 3) as int8, PerChannel(axis=0)
    bytes               36 -> 21 (1.71x smaller)
    SQNR                48.77 dB
    mean squared error  1.80844
    largest error       2.46535
    clipped values      0
    worst block 1       (0, 0): mse 3.0991, max 2.27875, scale 5.73701
    """
    if not isinstance(q, QArray):
        raise TypeError(not_a_qarray("q", q))
    check_integer("worst", worst)
    if worst < 0:
        raise ValueError(f"worst={worst}: give how many blocks to name, from 0 on")
    array, b = as_float_array(x.data if isinstance(x, np.ma.MaskedArray) else x, "x")
    if b.is_traced(array) or q._backend.is_traced(q.storage):
        raise TypeError("error_report needs values, but x or q is being traced: call it outside the compiled function")
    if tuple(array.shape) != q.shape:
        raise ValueError(f"x has shape {tuple(array.shape)} but q {q.shape}: give the array that was quantized")
    bits = float_type(b.dtype_name(array)).bits
    walked = q._checked()
    if walked.transposed:
        walked = walked[...]  # the codes in the order of their axes once, not for every part
    block, order = q._checked().block, memory_order(array)
    scratch = _Scratch(), _Scratch()
    total, worst_blocks = _Totals(), _Worst(worst, grid_of(q.shape, block))
    with np.errstate(all="ignore"):
        for region in boxes(worst_blocks.grid, _MOST_BLOCKS, order) if q.size else ():
            box = tuple(
                (start * (size or 1), length if size is None else min(stop * size, length))
                for (start, stop), size, length in zip(region, block, q.shape, strict=True)
            )
            blocks = _Blocks(tuple(stop - start for start, stop in box), block)
            for inside in over(boxes(blocks.shape, _AT_ONCE, order, block), math.prod(blocks.shape)):
                part = tuple((first + i, first + j) for (first, _), (i, j) in zip(box, inside, strict=True))
                with untold():
                    cost = _cost(b.to_numpy(part_of_array(array, part)), part_of(walked, part), scratch)
                blocks.add(inside, cost)
                total.add(cost)
            worst_blocks.add(region, blocks)
    return ErrorReport(
        shape=q.shape,
        dtype=q.dtype,
        granularity=q.granularity,
        mse=total.mse(),
        max_abs_error=total.largest,
        sqnr_db=_decibel(float(total.signal.value), float(total.noise.value), total.signal.power - total.noise.power),
        clipped=total.clipped,
        nbytes=q.nbytes,
        source_nbytes=q.size * bits // 8,
        worst_blocks=tuple(worst_blocks.named()),
        nonfinite=total.nonfinite,
        missing=total.missing,
    )


# ---- one part


class _Cost(NamedTuple):
    """What one part of an array lost. Arrays are on its grid of blocks."""

    square: _Numbers
    """Sums of squared errors, divided by ``2^power``."""
    power: int
    largest: _Numbers
    """Largest absolute errors."""
    scale: _Numbers
    signal: _Numbers
    """Sum of squared values, divided by ``2^signal_power``."""
    signal_power: int
    clipped: int
    left_out: _Numbers | None
    """How many values are missing or not finite; None where none are."""
    missing: int
    """How many are missing."""
    size: int


class _Scratch:
    """Memory for one part in float64, used again for the next: fresh pages would take longer than all arithmetic."""

    def __init__(self) -> None:
        self.memory = np.empty(0)

    def float64(self, values: _Numbers) -> _Numbers:
        if self.memory.size < values.size:
            self.memory = np.empty(values.size)
        copy = self.memory[: values.size].reshape(values.shape)
        np.copyto(copy, values)
        return copy


def _cost(given: _Numbers, q: QArray, scratch: tuple[_Scratch, _Scratch]) -> _Cost:
    q = q.to_backend("numpy")
    block = q._checked().block
    values = scratch[0].float64(given)
    everything = (None,) * values.ndim
    signal, signal_power = _squares(values, everything)
    kept, left_out, mask = values, None, q.mask
    missing = 0 if mask is None else int(np.count_nonzero(mask))
    if mask is not None and missing:
        values = np.where(mask, np.nan, values)
    if missing or not np.isfinite(signal).all():
        finite = np.isfinite(values)
        left_out = by_block(np.add, (~finite).astype(np.int64), block)
        kept = np.where(finite, values, 0.0)
        signal, signal_power = _squares(kept, everything)
    error = scratch[1].float64(np.asarray(q.dequantize()))
    np.subtract(kept, error, out=error)
    if left_out is not None:
        error = np.where(finite, error, 0.0)
    square, power = _squares(error, block)
    largest = by_block(np.maximum, np.abs(error, out=error), block)
    clipped = _clipped(values, q, None if left_out is not None else largest)
    return _Cost(
        square, power, largest, scales_of_blocks(q), signal, signal_power, clipped, left_out, missing, values.size
    )


def _clipped(values: _Numbers, q: QArray, largest: _Numbers | None) -> int:
    """How many values are outside the range; ``largest`` are the blocks' largest errors where all are finite."""
    source, block = float_type(q.float_dtype), q._checked().block
    bottom, top = representable_range(q)
    low, high = representable_range(q, slack=True)
    # What is clipped is further than half a step from every number of its block, and mostly nothing is.
    comparable = largest is not None and source.name == source.compute
    if comparable and (largest <= np.minimum(bottom - low, high - top)).all():
        return 0
    low, high = (spread(limit, values.shape, block, np) for limit in with_margin(low, high, source.compute))
    return int(np.count_nonzero(values < low) + np.count_nonzero(values > high))


def _squares(values: _Numbers, block: Block) -> tuple[_Numbers, int]:
    """Sums of squares by block divided by a power of two, and its exponent.

    The exponent is 0 unless squares overflow, as those of 1e170 do, or are lost, as those of 1e-170 are.
    """
    sums = _sums_of_squares(values, block)
    if 2.0**-900 < sums.sum() < math.inf:
        return sums, 0
    finite = np.abs(values[np.isfinite(values)])
    exponent = int(np.frexp(finite.max(initial=0.0))[1])
    return _sums_of_squares(np.ldexp(values, -exponent), block), 2 * exponent


def _sums_of_squares(values: _Numbers, block: Block) -> _Numbers:
    grid, split, summed = grid_of(values.shape, block), list[int](), list[bool]()
    for length, size in zip(values.shape, block, strict=True):
        inside = min(size or length, length)
        if length % inside:  # a shorter last block
            return by_block(np.add, values * values, block)
        split += [length // inside, inside]
        summed += [False, True]
    axes = [axis for axis, length in enumerate(split) if length > 1]
    kept = [axis for axis in axes if not summed[axis]]
    values = values.reshape([split[axis] for axis in axes])
    return np.asarray(np.einsum(values, axes, values, axes, kept)).reshape(grid)  # without an array of the squares


def _decibel(signal: float, noise: float, exponent: int) -> float:
    """Of ``signal * 2^exponent`` to ``noise``."""
    if noise == 0 or signal == 0:
        return -math.inf if noise else math.inf
    return 10 * (math.log10(signal) - math.log10(noise) + exponent * math.log10(2))


# ---- all parts


class _Sum:
    """A running sum of numbers that come divided by powers of two."""

    def __init__(self, shape: tuple[int, ...] = ()) -> None:
        self.value, self.power = np.zeros(shape), 0

    def add(self, value: _Numbers, power: int, at: Any = ...) -> None:
        if power != self.power:
            if not np.any(value):
                return
            common = max(power, self.power) if self.value.any() else power
            self.value, value = np.ldexp(self.value, self.power - common), np.ldexp(value, power - common)
            self.value, self.power = np.asarray(self.value), common
        self.value[at] += value


class _Totals:
    """Numbers of the whole array."""

    def __init__(self) -> None:
        self.signal, self.noise, self.largest = _Sum(), _Sum(), 0.0
        self.clipped = self.nonfinite = self.missing = self.size = 0

    def add(self, cost: _Cost) -> None:
        self.signal.add(cost.signal.sum(), cost.signal_power)
        self.noise.add(cost.square.sum(), cost.power)
        self.largest = float(np.maximum(self.largest, cost.largest.max()))
        self.clipped += cost.clipped
        self.size += cost.size
        self.missing += cost.missing
        if cost.left_out is not None:
            self.nonfinite += int(cost.left_out.sum()) - cost.missing

    def mse(self) -> float:
        with np.errstate(over="ignore", under="ignore"):
            return float(
                np.ldexp(self.noise.value / max(self.size - self.nonfinite - self.missing, 1), self.noise.power)
            )


class _Blocks:
    """Numbers of the blocks in a region of the array, which are summed over several parts."""

    def __init__(self, shape: tuple[int, ...], block: Block) -> None:
        self.shape, self.block, grid = shape, block, grid_of(shape, block)
        self.square, self.largest, self.scale = _Sum(grid), np.zeros(grid), np.zeros(grid)
        self.count = np.ones(grid, dtype=np.int64)
        for axis, (length, size, number) in enumerate(zip(shape, block, grid, strict=True)):
            ends = np.minimum(np.arange(1, number + 1) * (size or length), length)
            self.count *= np.diff(ends, prepend=0).reshape([-1 if d == axis else 1 for d in range(len(shape))])

    def add(self, part: Box, cost: _Cost) -> None:
        at = touched(part, tuple(size or length for size, length in zip(self.block, self.shape, strict=True)))
        self.square.add(cost.square, cost.power, at)
        self.largest[at] = np.maximum(self.largest[at], cost.largest)
        self.scale[at] = cost.scale
        if cost.left_out is not None:
            self.count[at] -= cost.left_out

    def mse(self) -> _Numbers:
        mean = self.square.value / np.maximum(self.count, 1)
        return np.asarray(np.ldexp(mean, self.square.power))


class _Worst:
    """The blocks with the largest errors so far; among equal ones those that come first in the grid."""

    def __init__(self, most: int, grid: tuple[int, ...]) -> None:
        self.most, self.grid = most, grid
        self.found: list[tuple[float, tuple[int, ...], BlockError]] = []

    def add(self, region: Box, blocks: _Blocks) -> None:
        mse = blocks.mse()
        flat = np.where(np.isnan(mse), math.inf, mse).ravel()
        most = min(self.most, flat.size)
        if not most:
            return
        least = np.partition(flat, flat.size - most)[flat.size - most]
        chosen = [*np.flatnonzero(flat > least), *np.flatnonzero(flat == least)[:most]]
        for i in chosen:
            at = np.unravel_index(int(i), mse.shape)
            index = tuple(int(j) + start for j, (start, _) in zip(at, region, strict=True))
            numbers = (float(number[at]) for number in (mse, blocks.largest, blocks.scale))
            self.found.append((-float(flat[i]), index, BlockError(index, *numbers)))
        self.found = sorted(self.found, key=lambda entry: entry[:2])[: self.most]

    def named(self) -> Iterator[BlockError]:
        return (block for _, _, block in self.found)


def by_block(ufunc: np.ufunc, values: _Numbers, block: Block) -> _Numbers:
    """``ufunc`` over each block: an array of the grid's shape."""
    values = np.asarray(values)
    for axis in reversed(range(values.ndim)):
        length, size = values.shape[axis], block[axis]
        if size is None or size >= length:
            values = ufunc.reduce(values, axis=axis, keepdims=True)
        elif size > 1:
            values = ufunc.reduceat(values, np.arange(0, length, size), axis=axis)
    return values
