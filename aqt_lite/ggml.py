"""How ggml chooses the codes of its block types: its reference encoders, with the same bits on every backend.

Owns: those rules that are no search, as functions of arrays in blocks, ``quantize_blocks``, and the dialect ``gguf``.
Imports: the searches, formats, dialects, the container, the registry, checks of arguments. Which bytes codes become is
said in ``layouts``.

The rules are those of ggml's ``quantize_row_*_ref`` (ggml-org/ggml, src/ggml-quants.c), all in float32:

- codes are made with the scale ``d`` before that is rounded to float16, by a product with ``1/d``;
- ``q4_0`` and ``q5_0`` take ``d`` from the entry of largest magnitude with its sign (the first of several), so that it
  gets the lowest code exactly; codes are ``floor(x * (1/d) + 8.5)``;
- ``q4_1`` and ``q5_1`` cover [min x, max x]: ``floor((x - min) * (1/d) + 0.5)``;
- ``q8_0`` and the ternary types round ``x * (1/d)``, halves away from zero;
- ``mxfp4`` takes the power of two two binades below the largest magnitude, whose logarithm it rounds to float32 first;
  ``nvfp4`` a sixth of the largest magnitude, halves up to e4m3, and 448 for whatever lies above 248; both take the
  nearest number, the smaller magnitude at a tie, and never -0;
- the K-quants, ``iq4_nl`` and ``iq4_xs`` search, as ggml does without an importance matrix (``_ggml_searches``).

Two traits that C leaves open are settled here. Products that meet a sum are clipped in between, so that no compiler
fuses the two. What is subnormal counts as 0: a block of nothing else gets the codes of zeros; so does a block of iq4_nl
with no entry above 2^-20, whose scale is 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._arguments import as_float_array
from aqt_lite._dispatch import run
from aqt_lite._ggml_searches import codebook, codebook_parts, descended_parts, parts_with_minima, signed_parts
from aqt_lite._ggml_steps import Coded, as_integers, bounded, first, in_float16, inverse, quotient
from aqt_lite._namespace import Array, Numbers
from aqt_lite._protocol import Backend
from aqt_lite.dialects import DIALECTS, Dialect
from aqt_lite.elements import rounded
from aqt_lite.formats import BLOCK_TYPES, FORMATS, SCALE_FORMATS, Format
from aqt_lite.granularity import PerGroup
from aqt_lite.qarray import QArray

__all__ = ["ENCODERS", "encode_blocks", "quantize_blocks"]

_NORMAL = 2.0**-126
_E4M3 = SCALE_FORMATS["float8_e4m3fn"].element
_LARGEST_NVFP4 = 2.0**33
"""From here on ggml gives values of nvfp4 the code of 0: their distances to all of its numbers are alike in float32."""


def quantize_blocks(x: Numbers, dtype: str, *, backend: str | None = None) -> QArray:
    """Quantize along the last axis as ggml does, so that ``to_bytes("gguf")`` gives the bytes that ggml writes.

    Parameters
    ----------
    x : array or list
        float16, bfloat16 or float32; the length of the last axis a multiple of the block.
    dtype : str
        "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k" to "q6_k", "tq1_0", "tq2_0", "iq4_nl", "iq4_xs", "mxfp4" or
        "nvfp4".
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
    '00346070'
    """
    if dtype not in ENCODERS:
        raise ValueError(f"dtype={dtype!r}: dialect='gguf' makes ggml's own types alone, {', '.join(ENCODERS)}")
    array, b = as_float_array(x, "x", backend)
    source, shape = b.dtype_name(array), tuple(array.shape)
    if source == "float64":
        raise TypeError(f"x is float64, and ggml makes {dtype} from float32: convert it first, with astype")
    encoder = ENCODERS[dtype]
    if not shape or shape[-1] % encoder.stored:
        raise ValueError(
            f"x has shape {shape}: {dtype} takes {encoder.stored} elements at a time along the last axis, of which its "
            "length must be a multiple: fill it up, or choose a type with smaller blocks"
        )
    if b.is_deferred(array):
        raise TypeError(f"x is computed when it is looked at ({b.name}): compute it first")
    coded = Coded(*run(b, encode_blocks, b.stop_gradient(array), name=dtype))
    _check(array, coded, dtype, b)
    scale = _kept(coded.scale, coded.scales, encoder)
    offset = None if coded.offset is None else _kept(coded.offset, coded.offsets, encoder)
    granularity = PerGroup(encoder.block // encoder.parts)
    return QArray.from_codes(
        coded.codes, scale, offset=offset, dtype=dtype, granularity=granularity, float_dtype=source
    )


def _kept(codes: Array, of_parts: Array | None, encoder: Encoder) -> QArray:
    """Scales, or offsets, that have been checked; those of parts have their block's as a scale."""
    kept = QArray(codes, None, dtype=encoder.scale.name, block=(None,) * codes.ndim, float_dtype="float32")
    if of_parts is None:
        return kept
    assert encoder.of_parts is not None
    return QArray.from_codes(of_parts, kept, dtype=encoder.of_parts.name, granularity=PerGroup(encoder.parts))


def encode_blocks(x: Array, *, name: str, b: Backend) -> Coded:
    """Codes of ``x``, and of scales and offsets on the grid of blocks; NaN for the scales of blocks that have none."""
    xp, encoder = b.xp, ENCODERS[name]
    shape = tuple(x.shape)
    grid = (*shape[:-1], shape[-1] // encoder.block)
    blocks = xp.reshape(xp.astype(x, xp.float32), (*grid, encoder.block))
    blocks = xp.where(xp.abs(blocks) < _NORMAL, blocks * 0.0, blocks)  # a zero of the same sign
    codes, scale, offset, scales, offsets = encoder.rule(blocks, b)
    usable = xp.isfinite(b.largest(xp.abs(blocks), axis=-1, keepdims=True)) if 0 not in shape else scale == scale
    nan = encoder.scale.element.nan
    scale = xp.where(usable, scale, xp.full_like(scale, nan))
    of_parts = (*shape[:-1], grid[-1] * encoder.parts)
    return Coded(
        xp.reshape(codes, shape),
        xp.reshape(scale, grid),
        *(
            None if a is None else xp.reshape(a, as_shape)
            for a, as_shape in ((offset, grid), (scales, of_parts), (offsets, of_parts))
        ),
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
    largest = float(np.abs(values.reshape(*bad.shape, size)[block]).max())
    kept = ENCODERS[dtype].scale.name
    raise ValueError(
        f"{int(bad.sum())} blocks of x have values too large for {dtype}, whose scales are {kept}: the first is block "
        f"{block} of {size}, with largest magnitude {largest:g}; divide x by a power of two, or choose another format"
    )


# ---- the rules


def _signed_largest(x: Array, b: Backend, bits: int) -> Coded:
    xp, low = b.xp, 1 << (bits - 1)
    size = xp.abs(x)
    amax = b.largest(size, axis=-1, keepdims=True)
    negative = xp.any(first(size == amax, b) & (x < 0), axis=-1, keepdims=True)
    d = xp.where(negative, -amax, amax) * (-1 / low)
    code = xp.floor(bounded(x * inverse(d, b), xp) + (low + 0.5))
    code = xp.clip(code, 0.0, 2.0 * low - 1) - low
    return Coded(as_integers(code, "int8", b), in_float16(d, b))


def _range(x: Array, b: Backend, bits: int) -> Coded:
    xp, most = b.xp, (1 << bits) - 1
    low, high = xp.min(x, axis=-1, keepdims=True), xp.max(x, axis=-1, keepdims=True)
    d = quotient(high - low, xp.full_like(low, float(most)), b)
    code = xp.clip(xp.floor(bounded((x - low) * inverse(d, b), xp) + 0.5), 0.0, float(most))
    # a minimum does not say which of two zeros it is; ggml keeps the one that it meets first
    negative = xp.any(first(x == low, b) & xp.signbit(x), axis=-1, keepdims=True)
    low = xp.where(low == 0, xp.where(negative, xp.full_like(low, -0.0), xp.zeros_like(low)), low)
    return Coded(as_integers(code, "uint8", b), in_float16(d, b), in_float16(low, b))


def _largest(x: Array, b: Backend, most: int) -> Coded:
    xp = b.xp
    amax = b.largest(xp.abs(x), axis=-1, keepdims=True)
    d = quotient(amax, xp.full_like(amax, float(most)), b)
    code = xp.clip(rounded(x * inverse(d, b), "half_away", xp), -float(most), float(most))
    return Coded(as_integers(code, "int8", b), in_float16(d, b))


def _power_of_two(x: Array, b: Backend) -> Coded:
    xp = b.xp
    amax = b.largest(xp.abs(x), axis=-1, keepdims=True)
    fraction, e = b.fraction_and_exponent(xp.where(xp.isfinite(amax), amax, xp.ones_like(amax)))
    carries = b.constant(_CARRIES, "float32", like=x)
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
    s = quotient(amax, xp.full_like(amax, 6.0), b)
    fraction, e = b.fraction_and_exponent(xp.where(s < 2.0**-20, xp.full_like(s, 2.0**-20), s))
    sixteenths = xp.astype(xp.floor(fraction * 16), xp.int32)  # 16 to 31
    code = ((e + 7) << 3) + (sixteenths >> 1) - 8 + (sixteenths & 1)
    small = xp.astype(xp.clip(xp.floor(bounded(s * 512, xp) + 0.5), 0.0, 7.0), xp.int32)
    code = xp.where(e < -6, small, code)
    code = xp.astype(xp.where(code >= 0x78, xp.full_like(code, 0x7E), code), xp.uint8)
    codes = _nearest(x, _E4M3.decode(code, b), b)
    return Coded(codes, xp.where(amax < _LARGEST_NVFP4, code, xp.full_like(code, _E4M3.nan)))


def _nearest(x: Array, scale: Array, b: Backend) -> Array:
    """The code of e2m1 whose number times ``scale`` is nearest; of two the smaller magnitude, and never -0.

    Distances are rounded to float32, as ggml's are: far beyond the largest number they are all alike, and the code 0.
    """
    xp = b.xp
    size = xp.abs(x)
    least, code = size, xp.zeros_like(x, dtype=xp.int32)
    for i, number in enumerate((0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), start=1):
        distance = xp.abs(size - scale * number)  # of an exact product: fused or not
        nearer = distance < least
        least, code = xp.where(nearer, distance, least), xp.where(nearer, xp.full_like(code, i), code)
    return xp.astype(xp.where((x < 0) & (code > 0), code + 8, code), xp.uint8)


def _carry(e: int) -> float:
    """The least fraction f for which ``log2(f * 2^e)``, rounded to float32, is ``e + 1``: as ggml takes logarithms."""
    below = float(np.nextafter(np.float32(e + 1), np.float32(-np.inf)))
    exact = 2.0 ** ((below + (e + 1)) / 2 - e)  # no float32 is as near to it as float64's errors
    least = float(np.float32(exact))
    return least if least >= exact else float(np.nextafter(np.float32(least), np.float32(2)))


_CARRIES = tuple(map(_carry, range(-126, 128)))  # made at import: compilers cannot trace calls of NumPy


class Encoder(NamedTuple):
    """How the codes of a block type are made."""

    rule: Callable[[Array, Backend], Coded]
    block: int
    """Elements that share a scale, or the scale of scales."""
    stored: int
    """Elements that are stored together."""
    scale: Format
    """Format of the scales, and of the offsets, that are floats."""
    parts: int = 1
    """Parts of a block, which have scales of their own."""
    of_parts: Format | None = None
    """Format of these."""


def _encoder(name: str, rule: Callable[..., Coded], **how: Any) -> Encoder:
    form = BLOCK_TYPES[name]
    assert form.group is not None
    assert form.scale is not None
    if form.scale.scale is None:
        return Encoder(functools.partial(rule, **how), form.group, form.group, form.scale)
    assert form.scale.group is not None
    block, rule = form.group * form.scale.group, functools.partial(rule, size=form.group, **how)
    return Encoder(rule, block, block, form.scale.scale, form.scale.group, form.scale)


_E8M0, _IQ4_NL = FORMATS["mxfp4"].scale, getattr(FORMATS["iq4_nl"].element, "numbers", ())
assert _E8M0 is not None

ENCODERS = {
    "q4_0": _encoder("q4_0", _signed_largest, bits=4),
    "q4_1": _encoder("q4_1", _range, bits=4),
    "q5_0": _encoder("q5_0", _signed_largest, bits=5),
    "q5_1": _encoder("q5_1", _range, bits=5),
    "q8_0": _encoder("q8_0", _largest, most=127),
    "tq1_0": _encoder("tq1_0", _largest, most=1),
    "tq2_0": _encoder("tq2_0", _largest, most=1),
    "q2_k": _encoder("q2_k", parts_with_minima, top=3, most=15, start=-0.5, tries=16, absolute=True),
    "q3_k": _encoder("q3_k", descended_parts, top=4, lowest=-32),
    "q4_k": _encoder("q4_k", parts_with_minima, top=15, most=63, start=-1.0, tries=21, absolute=False),
    "q5_k": _encoder("q5_k", parts_with_minima, top=31, most=63, start=-0.5, tries=16, absolute=False),
    "q6_k": _encoder("q6_k", signed_parts, top=32, lowest=-128),
    "iq4_nl": Encoder(functools.partial(codebook, numbers=_IQ4_NL), 32, 32, SCALE_FORMATS["float16"]),
    "iq4_xs": _encoder("iq4_xs", codebook_parts, numbers=_IQ4_NL, lowest=-32),
    "mxfp4": Encoder(_power_of_two, 32, 32, _E8M0),
    "nvfp4": Encoder(_sixth, 16, 64, SCALE_FORMATS["float8_e4m3fn"]),
}
"""The block types that have an encoder: all that this library reads."""

DIALECTS["gguf"] = Dialect(
    "gguf",
    symmetric=tuple(ENCODERS),
    affine=(),
    whole=quantize_blocks,
    source="libgguf 0.2.2: ggml's reference encoders",
)
