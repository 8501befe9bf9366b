"""Codes that other libraries make of more than the scales that they keep.

Owns: those rules, as functions of arrays that ``Dialect.together`` names. Imports: arrays in blocks, elements.

A rule is called by ``affine.quantize`` as ``rule(x, known, encode, spec, b)``: values in the type of the arithmetic,
what is subnormal being 0; the same with 0 for what does not count for statistics; ``encode(v)``, which gives the codes
of the numbers next to ``v`` and where ``v`` lies inside their range; what codes mean; the backend. It gives codes,
where values were inside, scales (codes and scales of their own where the format keeps them so), zero points, offsets.
As in ``affine``, nothing is added to a product that a compiler could fuse with it.

NVFP4 has a float32 scale for the tensor and scales in e4m3 for groups of 16. Where codes come from a product or a
quotient of the two, that is not one with their product. A tensor whose largest magnitude lies below 2^-105 counts as
zeros, so that all of these are normal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from aqt_lite._blocks import reduced, spread

if TYPE_CHECKING:
    from aqt_lite._namespace import Array
    from aqt_lite._protocol import Backend

__all__ = [
    "by_distance",
    "by_inverse_of_quotient",
    "by_places",
    "by_product",
    "by_quotient",
    "by_range",
    "ceil_of_logarithm",
    "four_bits",
    "one_level",
    "two_levels",
]

Encode = Callable[..., tuple[Any, Any]]
Made = tuple[Any, Any, Any, Any, Any]
"""Codes, where values were inside, scales, zero points, offsets."""

_LEAST_TENSOR = 2.0**-105
_LEAST_BLOCK = 2.0**-119
_LEAST_E4M3 = 2.0**-6
"""The smallest e4m3 with a leading 1, below which torchao has no scale."""
_E4M3_OF_NOTHING = 0.125
_LEAST_OF_MODELOPT = 2.0**-9
_PLACES = 1 << 16
_LEAST_OF_QWIX = 2.0**-63
"""Scales below it become 1 there."""


def two_levels(x: Array, known: Array, encode: Encode, spec: Any, b: Backend) -> Made:
    """NVFP4 of torchao: x times ``(1 / tensor scale) / block scale``, the latter at least 2^-6."""
    blocks, tensor = _largest(known, spec, b)
    usable, tensor = _usable(tensor, b)
    tensor = b.quotient(tensor, b.xp.full_like(tensor, spec.format.scale.element.max * spec.element.max))
    tensor = _or_one(tensor, usable, b)
    steps = b.quotient(_sixths(blocks, spec, b), _like(tensor, blocks, b))
    scale, numbers = _kept(steps, spec, b, least=_LEAST_E4M3)
    inverse = b.quotient(_like(b.reciprocal(tensor), numbers, b), numbers)
    codes, inside = encode(x * _over(inverse, usable, x, spec, b))
    return codes, inside, (scale, _marked(tensor, known, b)), None, None


def by_quotient(x: Array, known: Array, encode: Encode, spec: Any, b: Backend) -> Made:
    """NVFP4 of compressed-tensors: a global scale by which scales are multiplied; x over ``block scale / global``.

    The tensor scale kept is the reciprocal of the global one. A scale that is rounded to 0 becomes 1/8.
    """
    blocks, tensor = _largest(known, spec, b)
    usable, tensor = _usable(tensor, b)
    most = spec.format.scale.element.max * spec.element.max
    overall = _or_one(_times_inverse(most, tensor, b), usable, b)
    scale, numbers = _kept(_sixths(blocks, spec, b) * _like(overall, blocks, b), spec, b, of_zeros=_E4M3_OF_NOTHING)
    divisor = b.quotient(numbers, _like(overall, numbers, b))
    codes, inside = encode(_negatives_kept(x, divisor, spec, b))
    return codes, inside, (scale, _marked(b.reciprocal(overall), known, b)), None, None


def by_product(x: Array, known: Array, encode: Encode, spec: Any, b: Backend) -> Made:
    """NVFP4 of ModelOpt: x over ``block scale * tensor scale``, the former at least 2^-9, and 1 for zeros."""
    xp = b.xp
    blocks, tensor = _largest(known, spec, b)
    usable, tensor = _usable(tensor, b)
    tensor = b.quotient(tensor, xp.full_like(tensor, spec.format.scale.element.max * spec.element.max))
    tensor = _or_one(tensor, usable, b)
    whole = _like(tensor * spec.element.max, blocks, b)
    finite = xp.where(xp.isfinite(blocks), blocks, xp.zeros_like(blocks))
    steps = b.quotient(finite, whole)
    nothing = finite * 2.0**75 <= whole * 2.0**-75  # a quotient of 0, or one that float32 rounds to 0
    scale, numbers = _kept(xp.where(nothing, xp.ones_like(steps), steps), spec, b, least=_LEAST_OF_MODELOPT)
    codes, inside = encode(_negatives_kept(x, numbers * _like(tensor, numbers, b), spec, b))
    return codes, inside, (scale, _marked(tensor, known, b)), None, None


def one_level(x: Array, known: Array, encode: Encode, spec: Any, b: Backend, *, divides: bool, least: float) -> Made:
    """NVFP4 without a tensor scale, of torchao and qwix: a sixth of the largest magnitude in e4m3, at most 448."""
    xp = b.xp
    blocks = reduced(xp.abs(known), spec.block, b.largest, xp)
    if divides:
        steps = _sixths(blocks, spec, b)
    else:
        steps = blocks * _rounded(1 / spec.element.max, spec)
        steps = xp.where(steps < _LEAST_OF_QWIX, xp.ones_like(steps), steps)
    scale, numbers = _kept(steps, spec, b, least=least)
    there = numbers > 0
    inverse = b.reciprocal(xp.where(there, numbers, xp.ones_like(numbers)))
    inverse = xp.where(there, inverse, xp.zeros_like(inverse))
    codes, inside = encode(x * spread(inverse, tuple(x.shape), spec.block, xp))
    nothing = xp.full_like(scale, spec.format.scale.element.nan)
    return codes, inside, (xp.where(xp.isfinite(blocks), scale, nothing), None), None, None


def ceil_of_logarithm(x: Array, known: Array, encode: Encode, spec: Any, b: Backend) -> Made:
    """MX of qwix: the power of two above the largest magnitude over the largest number, by a rounded logarithm."""
    xp = b.xp
    amax = reduced(xp.abs(known), spec.block, b.largest, xp)
    finite = xp.isfinite(amax)
    scale = _or_one(amax, finite, b) * _rounded(1 / spec.element.max, spec)
    scale = xp.where(scale < _LEAST_OF_QWIX, xp.ones_like(scale), scale)
    e = b.fraction_and_exponent(scale)[1]
    steps = b.constant(_STEPS, "float32", like=x)
    for _ in range(2):  # the steps at 2^e and at the next power of two may lie on either side of these
        at = xp.reshape(xp.take(steps, xp.reshape(xp.clip(e + 126, 0, 253), (-1,)), axis=0), tuple(e.shape))
        e = e + xp.astype(scale >= xp.astype(at, scale.dtype), e.dtype)
    v, half = x, (-e) >> 1
    for part in (half, -e - half):  # the powers of two that there are on every backend end at 2^-100
        v = v * spread(xp.astype(b.power_of_two(part), x.dtype), tuple(x.shape), spec.block, xp)
    codes, inside = encode(v)
    kept = xp.astype(e + 127, xp.uint8)
    nothing = xp.full_like(kept, spec.format.scale.element.nan)
    return codes, inside, (xp.where(finite, kept, nothing), None), None, None


def _where_logarithms_step() -> tuple[float, ...]:
    """For each power of two from 2^-126 on, the least float32 whose logarithm in XLA lies above the exponent.

    That is the natural logarithm times 1/ln 2, both rounded to float32.
    """
    exponents = np.arange(-126, 128)
    near = (np.ldexp(np.float32(1), exponents).view(np.int32)[:, None] + np.arange(-64, 65)).astype(np.int32)
    floats = np.clip(near, 1 << 23, 0x7F7FFFFF).astype(np.int32).view(np.float32)
    logarithms = np.log(floats.astype(np.float64)).astype(np.float32) * np.float32(1 / math.log(2))
    least = np.where(logarithms > exponents[:, None], floats, np.float32(np.inf)).min(1)
    return tuple(least.tolist())


_STEPS = _where_logarithms_step()  # made at import: compilers cannot trace calls of NumPy


def by_distance(x: Array, known: Array, encode: Encode, spec: Any, b: Backend) -> Made:
    """nf4 of qwix: the first of the numbers at the least distance, which is rounded."""
    xp, shape, numbers = b.xp, tuple(x.shape), spec.element.numbers
    amax = reduced(xp.abs(known), spec.block, b.largest, xp)
    finite = xp.isfinite(amax)
    scale = _or_one(amax, finite & (amax >= _LEAST_OF_QWIX), b)
    quarter = xp.where(scale > 1, xp.full_like(scale, 0.25), xp.ones_like(scale))
    inverse = b.reciprocal(scale * quarter)
    v = x * spread(inverse, shape, spec.block, xp) * spread(quarter, shape, spec.block, xp)
    v = xp.clip(v, -2.0, 2.0)  # far outside: keeps the product from being fused with what follows
    codes, inside = encode(v)
    table = b.constant((*numbers, numbers[-1]), b.dtype_name(v), like=v)
    at = xp.reshape(xp.astype(codes, xp.int32), (-1,))
    below, above = (xp.reshape(xp.take(table, at + step, axis=0), shape) for step in (0, 1))
    codes = xp.where(xp.abs(above - v) < xp.abs(below - v), codes + xp.ones_like(codes), codes)
    return codes, inside, xp.where(finite, scale, xp.full_like(scale, float("nan"))), None, None


def by_inverse_of_quotient(x: Array, known: Array, encode: Encode, spec: Any, b: Backend) -> Made:
    """int8 of bitsandbytes, row by row: x times ``127 / largest magnitude``; what is kept is that over 127."""
    xp = b.xp
    amax = reduced(xp.abs(known), spec.block, b.largest, xp)
    there = (amax >= _LEAST_BLOCK) & xp.isfinite(amax)
    inverse = _times_inverse(spec.element.top, _or_one(amax, there, b), b)
    codes, inside = encode(x * spread(xp.where(there, inverse, xp.zeros_like(inverse)), tuple(x.shape), spec.block, xp))
    scale = _or_one(amax * _rounded(1 / spec.element.top, spec), there, b)
    return codes, inside, xp.where(xp.isfinite(amax), scale, xp.full_like(scale, float("nan"))), None, None


def four_bits(x: Array, known: Array, encode: Encode, spec: Any, b: Backend) -> Made:
    """nf4 and fp4 of bitsandbytes: times the reciprocal of the largest magnitude, in a short last block divided by it.

    The second code that fp4 has for zero is that of small numbers above zero.
    """
    xp, shape = b.xp, tuple(x.shape)
    amax = reduced(xp.abs(known), spec.block, b.largest, xp)
    there = (amax >= spec.source.tiny) & xp.isfinite(amax)
    scale = _or_one(amax, there, b)
    wide = spread(scale, shape, spec.block, xp)
    v = x * spread(_or_one(b.reciprocal(scale), scale < spec.source.huge, b), shape, spec.block, xp)
    if any(size is not None and n % size for n, size in zip(shape, spec.block, strict=True)):
        short = spread(_short(tuple(amax.shape), shape, spec, x, b), shape, spec.block, xp)
        v = xp.where(short, b.quotient(x, xp.broadcast_to(wide, shape)), v)
    v = xp.where(spread(there, shape, spec.block, xp), v, v * 0.0)
    codes, inside = encode(v)
    zero, *second = (code for code, number in enumerate(spec.element.numbers) if number == 0)
    if second:
        codes = xp.where((codes == zero) & (v > 0), xp.full_like(codes, second[0]), codes)
    return codes, inside, xp.where(xp.isfinite(amax), scale, xp.full_like(scale, float("nan"))), None, None


def by_places(x: Array, known: Array, encode: Encode, spec: Any, b: Backend) -> Made:
    """Codebooks of bitsandbytes: x over the largest magnitude, by way of 65,536 places from -1 to 1.

    Each place has the code of the number next to it.
    """
    xp, shape = b.xp, tuple(x.shape)
    amax = reduced(xp.abs(known), spec.block, b.largest, xp)
    there = (amax >= spec.source.tiny) & (amax < spec.source.huge)
    scale = _or_one(amax, there, b)
    v = x * spread(b.reciprocal(scale), shape, spec.block, xp)
    from_one = xp.clip(v, -1.0, 1.0) + 1.0  # clipped: keeps the product from being fused with the addition
    steps = b.constant(_where_places_step(spec.element.numbers), b.dtype_name(v), like=v)
    found = xp.searchsorted(steps, xp.reshape(from_one, (-1,)), side="right")
    codes = xp.reshape(xp.astype(found, b.dtype(spec.element.storage)), shape)
    nothing, _ = encode(xp.zeros_like(v))
    codes = xp.where(spread(there, shape, spec.block, xp) & (v == v), codes, nothing)
    scale = xp.where(amax < spec.source.huge, scale, xp.full_like(scale, float("nan")))
    return codes, (v >= spec.element.min) & (v <= spec.element.max), scale, None, None


@lru_cache(maxsize=16)
def _where_places_step(numbers: tuple[float, ...]) -> tuple[float, ...]:
    """For each code but the first, the least float32 of ``1 + v`` that has it, or a larger one."""
    if numbers[0] < -1 or numbers[-1] > 1 or any(a >= b for a, b in pairwise(numbers)):
        raise ValueError("dtype: codebooks of 8 bits of this dialect have increasing numbers from -1 to 1")
    ordered = np.asarray(numbers)
    middles = (ordered[1:] + ordered[:-1]) / 2
    codes = np.searchsorted(middles, np.arange(_PLACES) * (2 / (_PLACES - 1)) - 1, side="left")
    first = np.searchsorted(codes, np.arange(1, len(numbers)), side="left")  # the first place of each code
    half = np.float32((_PLACES - 1) / 2)
    near = ((first - 0.5) / float(half)).astype(np.float32).view(np.int32)[:, None] + np.arange(-8, 9, dtype=np.int32)
    floats = near.astype(np.int32).view(np.float32)
    places = (floats * half + np.float32(0.5)).astype(np.int64)
    return tuple(np.where(places >= first[:, None], floats, np.float32(np.inf)).min(1).tolist())


def by_range(x: Array, known: Array, encode: Encode, spec: Any, b: Backend) -> Made:
    """TinyGEMM of torchao: codes cover [min x, max x]; beside the scale the value of the middle code is kept.

    Original codes are unsigned: those here, which are signed, lie half their number lower.
    """
    xp, shape = b.xp, tuple(x.shape)
    low, high = (reduced(known, spec.block, end, xp) for end in (xp.min, b.largest))
    span = high - low
    finite = xp.isfinite(span)
    least, most = spec.element.codes
    scale = b.quotient(_or_one(span, finite, b), xp.full_like(span, float(most - least)))
    scale = xp.where(scale < spec.least_with_offset, xp.full_like(scale, spec.least_with_offset), scale)
    half = scale * float(-least)  # a power of two: exact
    middle = _or_one(low, finite, b) + half
    start = middle - half
    v = b.quotient(
        x - spread(start, shape, spec.block, xp), xp.broadcast_to(spread(scale, shape, spec.block, xp), shape)
    )
    codes, inside = encode(xp.round(xp.clip(v, 0.0, float(most - least))) + float(least))
    return codes, inside, xp.where(finite, scale, xp.full_like(scale, float("nan"))), None, middle


# ---- steps of them


def _largest(x: Array, spec: Any, b: Backend) -> tuple[Array, Array]:
    """The largest magnitude of every block, and of all."""
    blocks = reduced(b.xp.abs(x), spec.block, b.largest, b.xp)
    return blocks, reduced(blocks, (None,) * blocks.ndim, b.largest, b.xp)


def _usable(tensor: Array, b: Backend) -> tuple[Array, Array]:
    """Whether a tensor's largest magnitude makes it more than zeros, and that; 1 where not."""
    usable = (tensor >= _LEAST_TENSOR) & b.xp.isfinite(tensor)
    return usable, _or_one(tensor, usable, b)


def _or_one(a: Array, usable: Array, b: Backend) -> Array:
    return b.xp.where(usable, a, b.xp.ones_like(a))


def _negatives_kept(x: Array, divisor: Array, spec: Any, b: Backend) -> Array:
    """``x / divisor``, a number for each block; what becomes -0 is below zero, and -0 itself is 0."""
    xp, shape = b.xp, tuple(x.shape)
    divisor = xp.broadcast_to(spread(divisor, shape, spec.block, xp), shape)
    v = b.quotient(x, divisor)
    subnormal = (x < 0) & (v == 0) & (xp.abs(x) * 2.0**75 > divisor * 2.0**-75)  # a quotient above 2^-150
    v = xp.where(subnormal, xp.full_like(v, -_LEAST_E4M3), v)  # which becomes -0
    return xp.where(v == 0, xp.zeros_like(v), v)


def _times_inverse(number: float, a: Array, b: Backend) -> Array:
    """What torch makes of ``number / a``: a product with the reciprocal, of a quarter where that would be subnormal."""
    quarter = b.xp.where(a > 1, b.xp.full_like(a, 0.25), b.xp.ones_like(a))
    return b.reciprocal(a * quarter) * (quarter * number)


def _like(a: Array, blocks: Array, b: Backend) -> Array:
    """One number for each block, as ``b.quotient`` takes it."""
    return b.xp.broadcast_to(a, tuple(blocks.shape))


def _sixths(blocks: Array, spec: Any, b: Backend) -> Array:
    known = b.xp.where(b.xp.isfinite(blocks), blocks, b.xp.zeros_like(blocks))
    return b.quotient(known, b.xp.full_like(known, spec.element.max))


def _kept(
    steps: Array, spec: Any, b: Backend, *, least: float = 0.0, of_zeros: float | None = None
) -> tuple[Array, Array]:
    """Codes of scales, rounded half to even, and their numbers."""
    xp, element = b.xp, spec.format.scale.element

    def encode(a: Array) -> Array:
        return element.encode(a, None, False, "half_even", None, b)[0]

    codes = encode(xp.clip(steps, least, element.max))
    if of_zeros is not None:
        codes = xp.where(codes == 0, encode(xp.full_like(steps, of_zeros)), codes)
    return codes, element.decode(codes, b, spec.source.compute)


def _rounded(number: float, spec: Any) -> float:
    """A constant in the type of the arithmetic: rounded here, not by a compiler."""
    return float(np.dtype(spec.source.compute).type(number))


def _over(inverse: Array, usable: Array, x: Array, spec: Any, b: Backend) -> Array:
    inverse = b.xp.where(usable, inverse, b.xp.zeros_like(inverse))
    return spread(inverse, tuple(x.shape), spec.block, b.xp)


def _marked(tensor: Array, known: Array, b: Backend) -> Array:
    """The tensor scale; NaN where a value is not finite."""
    xp = b.xp
    largest = reduced(xp.abs(known), (None,) * known.ndim, b.largest, xp)
    return xp.where(xp.isfinite(largest), tensor, xp.full_like(tensor, float("nan")))


def _short(grid: tuple[int, ...], shape: tuple[int, ...], spec: Any, x: Array, b: Backend) -> Array:
    """Which blocks are shorter than they might be."""
    xp = b.xp
    found = xp.zeros_like(xp.broadcast_to(xp.sum(x[(slice(0, 0),) * x.ndim]), grid), dtype=xp.bool)
    for axis, (n, size) in enumerate(zip(shape, spec.block, strict=True)):
        if size is not None and n % size:
            last = b.arange(0, grid[axis], like=x) == grid[axis] - 1
            found = found | xp.reshape(last, tuple(-1 if a == axis else 1 for a in range(len(shape))))
    return found
