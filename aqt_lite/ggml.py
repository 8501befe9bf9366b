"""How ggml chooses the codes of its block types: its reference encoders, with the same bits on every backend.

Owns: those rules, as functions of arrays in blocks, and ``quantize_blocks``. Imports: formats, the container, the
registry, checks of arguments. Which bytes codes become is said in ``layouts``.

The rules are those of ggml's ``quantize_row_*_ref`` (ggml-org/ggml, src/ggml-quants.c), all in float32:

- codes are made with the scale ``d`` before that is rounded to float16, by a product with ``1/d``;
- ``q4_0`` and ``q5_0`` take ``d`` from the entry of largest magnitude with its sign (the first of several), so that it
  gets the lowest code exactly; codes are ``floor(x * (1/d) + 8.5)``;
- ``q4_1`` and ``q5_1`` cover [min x, max x]: ``floor((x - min) * (1/d) + 0.5)``;
- ``q8_0`` and the ternary types round ``x * (1/d)``, halves away from zero;
- ``mxfp4`` takes the power of two two binades below the largest magnitude, whose logarithm it rounds to float32 first;
  ``nvfp4`` a sixth of the largest magnitude, halves up to e4m3, and 448 for whatever lies above 248; both take the
  nearest number, the smaller magnitude at a tie, and never -0;
- ``iq4_nl`` tries scales near the largest entry's and takes that of the least squared error weighted by x squared.

Two traits that C leaves open are settled here. Products that meet a sum are clipped in between, so that no compiler
fuses the two. What is subnormal counts as 0: a block of nothing else gets the codes of zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._arguments import as_float_array, one_of
from aqt_lite._dispatch import run
from aqt_lite._namespace import Array, Numbers
from aqt_lite._protocol import Backend
from aqt_lite.elements import rounded
from aqt_lite.formats import BLOCK_TYPES, FORMATS, SCALE_FORMATS, Format
from aqt_lite.granularity import PerGroup
from aqt_lite.qarray import QArray

__all__ = ["ENCODERS", "encode_blocks", "quantize_blocks"]

_NORMAL = 2.0**-126
_LEAST = 2.0**-125
_LARGEST = 2.0**126
_HALF = SCALE_FORMATS["float16"].element
_E4M3 = SCALE_FORMATS["float8_e4m3fn"].element
_TOO_LARGE = 65520.0
"""The least number that float16 rounds to infinity."""


class Coded(NamedTuple):
    """What an encoder makes of (..., blocks, elements): codes, and those of scales and offsets, (..., blocks, 1)."""

    codes: Array
    scale: Array
    offset: Array | None = None


def quantize_blocks(x: Numbers, dtype: str, *, backend: str | None = None) -> QArray:
    """Quantize along the last axis as ggml does, so that ``to_bytes("gguf")`` gives the bytes that ggml writes.

    Parameters
    ----------
    x : array or list
        float16, bfloat16 or float32; the length of the last axis a multiple of the block.
    dtype : str
        "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "iq4_nl", "mxfp4" or "nvfp4".
    backend : str, optional
        Move ``x`` to this backend first.

    Returns
    -------
    QArray
        On the backend of ``x``. Its scales are kept in few bits, and may be negative.

    Raises
    ------
    ValueError
        Another type; a length that the block does not divide; values that are not finite, or so large that a block's
        scale overflows float16, where ggml would write infinity (under a tracing compiler: NaN for the block).
    TypeError
        ``x`` is no array of floats, or float64, which ggml has no encoder for.

    Examples
    --------
    >>> import numpy as np
    >>> q = quantize_blocks(np.linspace(-2, 1, 32, dtype="float32"), "q4_0")
    >>> q.scales.tolist(), q.qvalue[:5].tolist()
    ([0.25], [-8, -8, -7, -7, -6])
    >>> q.to_bytes("gguf").tobytes().hex()[:8]
    '00348080'
    """
    one_of("dtype", dtype, tuple(ENCODERS))
    x, b = as_float_array(x, "x", backend)
    source = b.dtype_name(x)
    if source == "float64":
        raise TypeError(f"x is float64, and ggml makes {dtype} from float32: convert it first, with astype")
    encoder = ENCODERS[dtype]
    if not x.ndim or x.shape[-1] % encoder.stored:
        raise ValueError(
            f"x has shape {tuple(x.shape)}: {dtype} takes {encoder.stored} elements at a time along the last axis, so its "
            f"length must be a multiple of {encoder.stored}: fill it up, or choose a type with smaller blocks"
        )
    if b.is_deferred(x):
        raise TypeError(f"x is computed when it is looked at ({b.name}): compute it first")
    constant = b.stop_gradient(x)
    coded = Coded(*run(b, encode_blocks, constant, name=dtype))
    _check(x, coded, dtype, b)
    offset = None if coded.offset is None else _kept(coded.offset, encoder.scale, source)
    scale = _kept(coded.scale, encoder.scale, source)
    return QArray.from_codes(
        coded.codes, scale, offset=offset, dtype=dtype, granularity=PerGroup(encoder.block), float_dtype=source
    )


def _kept(codes: Array, scale: Format, source: str) -> QArray:
    """Scales, or offsets, that have been checked."""
    return QArray(codes, None, dtype=scale.name, block=(None,) * codes.ndim, float_dtype="float32")


def encode_blocks(x: Array, *, name: str, b: Backend) -> Coded:
    """Codes of ``x``, and of scales and offsets on the grid of blocks; NaN for the scales of blocks that have none."""
    xp, encoder = b.xp, ENCODERS[name]
    shape = tuple(x.shape)
    grid = (*shape[:-1], shape[-1] // encoder.block)
    blocks = xp.reshape(xp.astype(x, xp.float32), (*grid, encoder.block))
    zeros = xp.where(xp.signbit(blocks), xp.full_like(blocks, -0.0), xp.zeros_like(blocks))
    blocks = xp.where(xp.abs(blocks) < _NORMAL, zeros, blocks)
    codes, scale, offset = encoder.rule(blocks, b)
    usable = xp.isfinite(b.largest(xp.abs(blocks), axis=-1, keepdims=True)) if 0 not in shape else scale == scale
    nan = encoder.scale.element.nan
    scale = xp.where(usable, scale, xp.full_like(scale, nan))
    return Coded(
        xp.reshape(codes, shape), xp.reshape(scale, grid), None if offset is None else xp.reshape(offset, grid)
    )


def _check(x: Array, coded: Coded, dtype: str, b: Backend) -> None:
    """ValueError where a block has no scale, and why."""
    nan = ENCODERS[dtype].scale.element.nan
    if not b.has_values(coded.scale):
        return
    bad = np.asarray(b.to_numpy(coded.scale)) == nan
    if coded.offset is not None:
        bad |= np.asarray(b.to_numpy(coded.offset)) == nan
    if not bad.any():
        return
    block = tuple(int(i) for i in np.argwhere(bad)[0])
    values = np.asarray(b.to_numpy(x)).astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        first = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise ValueError(
            f"x has {int((~finite).sum())} non-finite values of {finite.size}, the first at index {first}: mend them, "
            f"since {dtype} has no code for them"
        )
    size = ENCODERS[dtype].block
    largest = float(np.abs(values[(*block[:-1], slice(block[-1] * size, (block[-1] + 1) * size))]).max())
    raise ValueError(
        f"{int(bad.sum())} blocks of x have values too large for {dtype}, whose scales are float16: the first is block "
        f"{block} of {size}, with largest magnitude {largest:g}; multiply x by a power of two, or choose another format"
    )


# ---- the rules


def _signed_largest(x: Array, b: Backend, bits: int) -> Coded:
    xp, low = b.xp, 1 << (bits - 1)
    size = xp.abs(x)
    amax = b.largest(size, axis=-1, keepdims=True)
    negative = xp.any(_first(size == amax, b) & (x < 0), axis=-1, keepdims=True)
    d = xp.where(negative, -amax, amax) * (-1 / low)
    code = xp.floor(_bounded(x * _inverse(d, b), xp) + (low + 0.5))
    code = xp.clip(code, 0.0, 2.0 * low - 1) - low
    return Coded(_as_integers(code, "int8", b), _in_float16(d, b))


def _range(x: Array, b: Backend, bits: int) -> Coded:
    xp, most = b.xp, (1 << bits) - 1
    low, high = xp.min(x, axis=-1, keepdims=True), xp.max(x, axis=-1, keepdims=True)
    d = _divided(high - low, most, b)
    code = xp.clip(xp.floor(_bounded((x - low) * _inverse(d, b), xp) + 0.5), 0.0, float(most))
    # a minimum does not say which of two zeros it is; ggml keeps the one that it meets first
    negative = xp.any(_first(x == low, b) & xp.signbit(x), axis=-1, keepdims=True)
    low = xp.where(low == 0, xp.where(negative, xp.full_like(low, -0.0), xp.zeros_like(low)), low)
    return Coded(_as_integers(code, "uint8", b), _in_float16(d, b), _in_float16(low, b))


def _largest(x: Array, b: Backend, most: int) -> Coded:
    xp = b.xp
    amax = b.largest(xp.abs(x), axis=-1, keepdims=True)
    d = amax if most == 1 else _divided(amax, most, b)
    code = xp.clip(rounded(x * _inverse(d, b), "half_away", xp), -float(most), float(most))
    return Coded(_as_integers(code, "int8", b), _in_float16(d, b))


def _power_of_two(x: Array, b: Backend) -> Coded:
    xp = b.xp
    amax = b.largest(xp.abs(x), axis=-1, keepdims=True)
    fraction, e = b.fraction_and_exponent(xp.where(xp.isfinite(amax), amax, xp.ones_like(amax)))
    carries = b.constant(_carries(), "float32", like=x)
    flat = xp.reshape(xp.clip(e + 126, 0, 253), (-1,))
    at = xp.reshape(xp.take(carries, flat, axis=0), tuple(e.shape))
    e = e + xp.astype(fraction >= at, xp.int32) - 2
    e = xp.where(amax == 0, xp.full_like(e, -127), xp.clip(e, -127, 127))
    half = (-e) >> 1
    steps = x * b.power_of_two(half) * b.power_of_two(-e - half)
    return Coded(_nearest(steps, xp.ones_like(amax), b), xp.astype(e + 127, xp.uint8))


def _sixth(x: Array, b: Backend) -> Coded:
    xp = b.xp
    amax = b.largest(xp.abs(x), axis=-1, keepdims=True)
    s = _divided(amax, 3, b) * 0.5
    fraction, e = b.fraction_and_exponent(xp.where(s < 2.0**-20, xp.full_like(s, 2.0**-20), s))
    sixteenths = xp.astype(xp.floor(fraction * 16), xp.int32)  # 16 to 31
    code = ((e + 7) << 3) + (sixteenths >> 1) - 8 + (sixteenths & 1)
    small = xp.astype(xp.clip(xp.floor(_bounded(s * 512, xp) + 0.5), 0.0, 7.0), xp.int32)
    code = xp.where(e < -6, small, code)
    code = xp.astype(xp.where(code >= 0x78, xp.full_like(code, 0x7E), code), xp.uint8)
    return Coded(_nearest(x, _E4M3.decode(code, b), b), code)


def _nearest(x: Array, scale: Array, b: Backend) -> Array:
    """The code of e2m1 whose number times ``scale`` is nearest; of two the smaller magnitude, and never -0."""
    xp = b.xp
    size, code = xp.abs(x), xp.zeros_like(x, dtype=xp.int32)
    for middle in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0):
        code = code + xp.astype((size > scale * middle) & (scale > 0), xp.int32)
    return xp.astype(xp.where((x < 0) & (code > 0), code + 8, code), xp.uint8)


@functools.cache
def _carries() -> tuple[float, ...]:
    """For each exponent from -126 to 127, the least fraction whose logarithm to base 2 float32 rounds up to the next.

    ``log2(f * 2^e)`` as float32 is e + 1 for f just below 2: as many of them as half a unit in its last place takes.
    """
    found = []
    for e in range(-126, 128):
        below = np.nextafter(np.float32(e + 1), np.float32(-np.inf))
        middle = (float(below) + (e + 1)) / 2
        exact = 2.0 ** (middle - e)  # a float64, within 2^-50; a float32 lies at least 2^-45 away
        least = np.float32(exact)
        found.append(float(least if least >= exact else np.nextafter(least, np.float32(2))))
    return tuple(found)


# ---- steps of them


def _first(these: Array, b: Backend) -> Array:
    """The first of ``these`` in each block."""
    xp, length = b.xp, int(these.shape[-1])
    index = xp.broadcast_to(b.arange(0, length, like=these), tuple(these.shape))
    at = xp.where(these, index, xp.full_like(index, length))
    return index == xp.min(at, axis=-1, keepdims=True)


def _bounded(product: Array, xp: Any) -> Array:
    """A product that something is added to: the clip, far outside, keeps a compiler from fusing the two."""
    return xp.clip(product, -1024.0, 1024.0)


def _inverse(d: Array, b: Backend) -> Array:
    """``1/d``, 0 for 0."""
    xp = b.xp
    size = xp.abs(d)
    there = size >= _LEAST
    inverse = b.reciprocal(xp.clip(size, _LEAST, _LARGEST))
    inverse = xp.where(there, inverse, xp.zeros_like(inverse))
    return xp.where(d < 0, -inverse, inverse)


def _divided(x: Array, by: int, b: Backend) -> Array:
    """``x / by``, correctly rounded, for ``x`` not negative and an odd integer below 128.

    Compilers replace divisions by constants. With ``x = M * 2^(e-23)`` the 24 bits of the quotient are those of the
    integer division of ``M * 2^s``, which int32 holds; no remainder is half of an odd number.
    """
    xp = b.xp
    fraction, e = b.fraction_and_exponent(xp.where(xp.isfinite(x), x, xp.zeros_like(x)))
    whole = xp.astype(fraction * 2.0**23, xp.int32)
    fewer = by.bit_length() - 1
    enough = (whole << fewer) >= (by << 23)
    whole = xp.where(enough, whole << fewer, whole << (fewer + 1))
    quotient = whole // by
    quotient = quotient + xp.astype(2 * (whole - quotient * by) > by, xp.int32)
    e = e - xp.where(enough, xp.full_like(e, fewer), xp.full_like(e, fewer + 1))
    half = e >> 1
    found = xp.astype(quotient, xp.float32) * 2.0**-23 * b.power_of_two(half) * b.power_of_two(e - half)
    return xp.where(xp.isfinite(x), found, x)


def _in_float16(d: Array, b: Backend) -> Array:
    """Bit patterns of float16, halves to even; NaN for what it has no number for."""
    xp = b.xp
    codes = _HALF.encode(d, None, True, "half_even", None, b)[0]
    return xp.where(xp.abs(d) < _TOO_LARGE, codes, xp.full_like(codes, _HALF.nan))


def _as_integers(codes: Array, dtype: str, b: Backend) -> Array:
    """Whole numbers as integers; what is NaN, in a block that is refused, as 0."""
    xp = b.xp
    return xp.astype(xp.where(xp.isnan(codes), xp.zeros_like(codes), codes), b.dtype(dtype))


class Encoder(NamedTuple):
    """How the codes of a block type are made."""

    rule: Callable[[Array, Backend], Coded]
    block: int
    """Elements that share a scale."""
    stored: int
    """Elements that are stored together."""
    scale: Format
    """Format of the scales, and of the offsets."""


def _encoder(name: str, rule: Callable[..., Coded], **how: int) -> Encoder:
    form = BLOCK_TYPES[name]
    assert form.group is not None
    assert form.scale is not None
    return Encoder(functools.partial(rule, **how), form.group, form.group, form.scale)


_E8M0 = FORMATS["mxfp4"].scale
assert _E8M0 is not None

ENCODERS = {
    "q4_0": _encoder("q4_0", _signed_largest, bits=4),
    "q4_1": _encoder("q4_1", _range, bits=4),
    "q5_0": _encoder("q5_0", _signed_largest, bits=5),
    "q5_1": _encoder("q5_1", _range, bits=5),
    "q8_0": _encoder("q8_0", _largest, most=127),
    "tq1_0": _encoder("tq1_0", _largest, most=1),
    "tq2_0": _encoder("tq2_0", _largest, most=1),
    "mxfp4": Encoder(_power_of_two, 32, 32, _E8M0),
    "nvfp4": Encoder(_sixth, 16, 64, SCALE_FORMATS["float8_e4m3fn"]),
}
"""The block types that have an encoder."""
