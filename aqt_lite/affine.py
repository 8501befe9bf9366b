"""The numeric contract: scale, zero point, codes, and back. docs/numerics.md says it in words.

Owns: the arithmetic of linear quantization, and nothing else: no validation, no containers, no framework. Imports:
elements, granularity, and the ``Backend`` interface for the namespace and the exact reciprocal.

Reading aid. Every function takes arrays of one backend ``b`` and a static ``Spec``, branches on no value, and so runs
eagerly and under any tracing compiler. Bits are the same everywhere because of four rules kept throughout:

- maxima and minima are exact in any order; no sum is ever taken;
- constants are multiplied by, never divided by; the one division is ``b.reciprocal``, correctly rounded;
- a product is rounded to an integer (or is the result) before anything is added to it, so no fused multiply-add
  can form and skip a rounding;
- nothing that matters is ever subnormal, so flushing subnormals to zero changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite.elements import ElementType, FloatType
from aqt_lite.granularity import Block, grid_of, group_axes

__all__ = [
    "Coded",
    "Spec",
    "choose_qparams",
    "dequantize",
    "encode",
    "fake_quantize",
    "inverse_of_range",
    "quantize",
    "quantize_with",
    "spread",
    "usable_qparams",
]


class Coded(NamedTuple):
    """The arrays of a quantized array: what compilers see as a tree of leaves."""

    codes: Array
    """One code an element."""
    scale: Array
    """A number for each block, on the grid of blocks."""
    zero_point: Array | None = None
    """int32 on the same grid: the code of 0.0, where that is not 0."""


@dataclass(frozen=True)
class Spec:
    """Everything about a quantization that is not an array: hashable, so compilers can specialize on it."""

    element: ElementType
    """Format of the codes."""
    source: FloatType
    """Type of the values; its ``compute`` is the dtype of all arithmetic."""
    symmetric: bool
    """Codes as far below zero's code as above it, the zero point fixed."""
    block: Block
    """Block shape, one entry for each axis."""
    ignore_nonfinite: bool = False
    """Take statistics over finite values only, instead of marking a block that has others with a NaN scale."""

    @property
    def code_range(self) -> tuple[int, int]:
        """Smallest and largest code."""
        return self.element.code_range(self.symmetric)


def choose_qparams(x: Array, *, spec: Spec, b: Backend) -> tuple[Array, Array | None]:
    """Scale and zero point (None where it is always 0) of every block: two arrays of the grid's shape."""
    xp, source = b.xp, spec.source
    qmin, qmax = spec.code_range
    x = _computable(x, spec, b)
    if spec.ignore_nonfinite:
        x = xp.where(xp.isfinite(x), x, xp.zeros_like(x))

    if spec.symmetric:
        amax = _reduce(xp.abs(x), spec.block, b.largest, xp)
        amax = xp.where(amax < source.tiny, xp.zeros_like(amax), amax)
        scale = amax * inverse_of_range(spec)
    else:  # zero belongs to every range: it is then represented exactly
        lo = _reduce(x, spec.block, xp.min, xp)
        hi = _reduce(x, spec.block, b.largest, xp)
        lo = xp.where(lo > -source.tiny, xp.zeros_like(lo), lo)
        hi = xp.where(hi < source.tiny, xp.zeros_like(hi), hi)
        scale = (hi * 0.5 - lo * 0.5) * inverse_of_range(spec)  # halved first: cannot overflow

    finite = xp.isfinite(scale)
    scale = xp.where(scale < source.tiny, xp.ones_like(scale), scale)  # a zero block
    scale = xp.where(finite, scale, xp.full_like(scale, float("nan")))  # loud: dequantizes to NaN

    if spec.symmetric:
        middle = spec.element.middle
        return scale, xp.full_like(scale, middle, dtype=xp.int32) if middle else None
    shift = xp.clip(qmin - xp.round(lo * b.reciprocal(scale)), float(qmin), float(qmax))
    return scale, xp.astype(xp.where(finite, shift, xp.zeros_like(shift)), xp.int32)


def inverse_of_range(spec: Spec) -> float:
    """What a statistic is multiplied by to give the scale: rounded to the compute dtype here, not by a compiler.

    Symmetric: 1 / (codes above the middle), for amax. Affine: 2 / (all steps), for half of hi - lo.
    """
    qmin, qmax = spec.code_range
    quotient = 1 / (qmax - spec.element.middle) if spec.symmetric else 2 / (qmax - qmin)
    return float(np.dtype(spec.source.compute).type(quotient))


def quantize(x: Array, *, spec: Spec, b: Backend) -> tuple[Array, Array, Array | None]:
    """Codes, scale and zero point, calibrated on ``x`` itself."""
    scale, zero_point = choose_qparams(x, spec=spec, b=b)
    return encode(x, scale, zero_point, spec=spec, b=b), scale, zero_point


def usable_qparams(
    x: Array, scale: Array, zero_point: Array | None, *, spec: Spec, b: Backend
) -> tuple[Array, Array | None]:
    """A given scale and zero point, the scale NaN in blocks where they cannot be used.

    Unusable are a scale outside [tiny, huge], a zero point that is no code, and a block with a non-finite value.
    """
    xp, source = b.xp, spec.source
    usable = (scale >= source.tiny) & (scale <= source.huge)
    if zero_point is not None:
        usable = usable & (zero_point >= spec.element.min) & (zero_point <= spec.element.max)
        zero_point = xp.clip(zero_point, spec.element.min, spec.element.max)
    if not spec.ignore_nonfinite:
        usable = usable & xp.isfinite(_reduce(xp.abs(_computable(x, spec, b)), spec.block, b.largest, xp))
    return xp.where(usable, scale, xp.full_like(scale, float("nan"))), zero_point


def quantize_with(
    x: Array, scale: Array, zero_point: Array | None, *, spec: Spec, b: Backend
) -> tuple[Array, Array, Array | None]:
    """Codes for a given scale and zero point."""
    scale, zero_point = usable_qparams(x, scale, zero_point, spec=spec, b=b)
    return encode(x, scale, zero_point, spec=spec, b=b), scale, zero_point


def encode(x: Array, scale: Array, zero_point: Array | None, *, spec: Spec, b: Backend) -> Array:
    """``clip(rint(x / scale) + zero_point)`` as codes; NaN becomes the zero point."""
    return b.xp.astype(_rounded(x, scale, zero_point, spec, b)[0], b.dtype(spec.element.storage))


def dequantize(
    codes: Array, scale: Array, zero_point: Array | None, *, spec: Spec, out: str | None = None, b: Backend
) -> Array:
    """``(codes - zero_point) * scale`` in dtype ``out`` (default: the source's).

    It saturates at the source type's largest value: rounding the zero point can put the outermost code half a step
    beyond it, where the product, or its conversion to a narrow source type, would overflow.
    """
    xp, source, shape = b.xp, spec.source, tuple(codes.shape)
    steps = codes
    if zero_point is not None:  # as integers: exact, and the codes' own type would overflow
        steps = xp.astype(codes, xp.int32) - spread(zero_point, shape, spec.block, xp)
    x = xp.astype(steps, b.dtype(source.compute)) * spread(scale, shape, spec.block, xp)
    return xp.astype(xp.clip(x, -source.max, source.max), b.dtype(out or source.name))


def fake_quantize(
    x: Array, scale: Array | None = None, zero_point: Array | None = None, *, spec: Spec, b: Backend
) -> tuple[Array, Array]:
    """Quantize and dequantize with the given or the calibrated parameters; also the scale, NaN for a bad block.

    The gradient goes straight through where ``x`` lies inside the range of the codes, and is 0 where it is clipped.
    """
    constant = b.stop_gradient(x)
    if scale is None:
        scale, zero_point = choose_qparams(constant, spec=spec, b=b)
    else:
        scale, zero_point = usable_qparams(constant, scale, zero_point, spec=spec, b=b)
    rounded, inside = _rounded(constant, scale, zero_point, spec, b)
    codes = b.xp.astype(rounded, b.dtype(spec.element.storage))
    return b.straight_through(x, dequantize(codes, scale, zero_point, spec=spec, b=b), inside), scale


def spread(blocks: Array, shape: tuple[int, ...], block: Block, xp: Any) -> Array:
    """An array of the grid's shape, repeated so that it broadcasts against an array of ``shape``."""
    for axis in group_axes(shape, block):
        size = block[axis]
        assert size is not None
        before, after = tuple(blocks.shape[:axis]), tuple(blocks.shape[axis + 1 :])
        whole, rest = divmod(shape[axis], size)
        last = blocks[(slice(None),) * axis + (slice(whole, None), ...)]
        if rest:
            blocks = blocks[(slice(None),) * axis + (slice(0, whole), ...)]
        wide = xp.broadcast_to(xp.expand_dims(blocks, axis=axis + 1), (*before, whole, size, *after))
        blocks = xp.reshape(wide, (*before, whole * size, *after))
        if rest:
            # A shorter last group is joined on. Repeating it in full and cutting the surplus off is what torch's
            # compiler gets wrong: 2.13 leaves the elements after the last whole group unset (inductor's cpp.py,
            # try_loop_split, divides the length of a loop by the group's without regard to a remainder).
            blocks = xp.concat([blocks, xp.broadcast_to(last, (*before, rest, *after))], axis=axis)
    return blocks


def _rounded(x: Array, scale: Array, zero_point: Array | None, spec: Spec, b: Backend) -> tuple[Array, Array]:
    """Codes as floats in the compute dtype, and where clipping left them unchanged."""
    xp, shape = b.xp, tuple(x.shape)
    qmin, qmax = spec.code_range
    code = xp.round(_computable(x, spec, b) * spread(b.reciprocal(scale), shape, spec.block, xp))
    zero = xp.zeros_like(code)
    if zero_point is not None:  # an integer plus an integer, both far below 2^24: exact where it is not clipped
        zero = zero + spread(xp.astype(zero_point, code.dtype), shape, spec.block, xp)
        code = code + zero
    clipped = xp.clip(code, float(qmin), float(qmax))
    return xp.where(xp.isnan(code), zero, clipped), clipped == code


def _computable(x: Array, spec: Spec, b: Backend) -> Array:
    return b.xp.astype(x, b.dtype(spec.source.compute))


def _reduce(x: Array, block: Block, reduction: Any, xp: Any) -> Array:
    """``reduction`` (largest or smallest) over every block: an array of the grid's shape. Empty blocks give 0."""
    shape = tuple(x.shape)
    if 0 in shape:
        return xp.broadcast_to(xp.sum(x), grid_of(shape, block))
    grouped = group_axes(shape, block)
    for axis in grouped:  # a shorter last group is filled up with its own last value, which no extremum notices
        size = block[axis]
        assert size is not None
        missing = -shape[axis] % size
        if missing:
            last = x[(slice(None),) * axis + (slice(-1, None), ...)]
            filled = (*last.shape[:axis], missing, *last.shape[axis + 1 :])
            x = xp.concat([x, xp.broadcast_to(last, filled)], axis=axis)
    split: list[int] = []
    reduced: list[int] = []
    for axis, (length, size) in enumerate(zip(x.shape, block, strict=True)):
        if axis in grouped:
            assert size is not None
            split += [length // size, size]
            reduced.append(len(split) - 1)
        else:
            split.append(length)
            if size is None or size >= shape[axis] > 1:
                reduced.append(len(split) - 1)
    if not reduced:
        return x
    x = reduction(xp.reshape(x, tuple(split)), axis=tuple(reduced), keepdims=True)
    return xp.reshape(x, grid_of(shape, block))
