"""Floats with fewer significant bits, which compressors make small: BitRound, and how many bits to keep.

Owns: the rounding, in integers alone; the choice of the number of bits from an error or from the information that bits
share with those of neighbours. Imports: the checks of arguments, the errors of ``bounds``, walking through arrays.

The result is an array of the same floats, whose last bits are zeros: every program reads it as it is. (A
:class:`aqt_lite.QArray` has codes and scales, and is small without a compressor.) The error is relative: at most
``2^-(keepbits + 1)`` of each normal number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from aqt_lite._arguments import as_float_array
from aqt_lite._dispatch import run
from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Array, Numbers
from aqt_lite._near import check_integer
from aqt_lite._parts import boxes, memory_order, part_of_array
from aqt_lite._progress import over
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.bounds import Bound, bound_of, error_of
from aqt_lite.elements import without_last_bits

__all__ = ["bit_information", "bitround", "bitrounded", "keepbits_for", "significand_bits"]

_MOST_ELEMENTS = 1 << 18
"""Elements looked at together: a few MB with all that is made of them."""

_CONFIDENCE = 2.5758293035489004
"""How many standard deviations a coin thrown often stays within, 99 times of 100."""

_Numbers = np.ndarray[Any, Any]
_R = TypeVar("_R")


@naming_the_argument
def bitround(x: Numbers, keepbits: int, *, backend: str | None = None) -> Array:
    """Round floats to ``keepbits`` bits after the leading one, half to even; the other bits become zeros.

    Even is the last bit that is kept; with ``keepbits=0``, when none is, that of the exponent.

    Parameters
    ----------
    x : array of any backend, or nested list of numbers
        float16, bfloat16, float32 or float64, of any shape.
    keepbits : int
        Explicit bits of the significand that are kept: 0 to 10 of float16, 7 of bfloat16, 23 of float32, 52 of float64.
        :func:`keepbits_for` chooses them.
    backend : str, optional
        Move ``x`` to this backend first.

    Returns
    -------
    array
        Of the shape and dtype of ``x``, the same bits on every backend. NaN and infinities stay what they are, and
        finite numbers stay finite: what would round beyond the type becomes its largest number of so many bits.
        Subnormal numbers keep the bits that the smallest normal number keeps. Its derivative is zero.

    Raises
    ------
    TypeError
        ``x`` is no floating-point array; ``keepbits`` no integer.
    ValueError
        ``keepbits`` is negative, or more than the type has.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> aqt_lite.bitround(np.asarray([3.14159, -273.15, np.nan], "float32"), 7)
    array([   3.140625, -274.      ,         nan], dtype=float32)
    """
    array, b = as_float_array(x, "x", backend)
    name = b.dtype_name(array)
    most = significand_bits(name)
    check_integer("keepbits", keepbits)
    if not 0 <= keepbits <= most:
        raise ValueError(f"keepbits={keepbits}: {name} has {most}, give 0 to {most}")
    return run(b, bitrounded, b.stop_gradient(array), keepbits=int(keepbits))


def bitrounded(x: Array, *, keepbits: int, b: Backend) -> Array:
    """``bitround`` as an operation."""
    name = b.dtype_name(x)
    bits, fraction = _WIDTHS[name], significand_bits(name)
    drop = fraction - keepbits
    xp, pattern, whole = b.xp, b.bits_of(x), (1 << (bits - 1)) - 1
    size = pattern & whole
    sign = pattern ^ size
    if drop:
        infinite = whole - ((1 << fraction) - 1)
        carried = without_last_bits(size, drop, "half_even", xp)
        size = xp.where(size < infinite, xp.clip(carried, 0, infinite - (1 << drop)), size)
    return b.floats_of(size | sign, name)


_WIDTHS = {"float16": 16, "bfloat16": 16, "float32": 32, "float64": 64}


def significand_bits(dtype: str) -> int:
    """Explicit bits of the significand."""
    return int((ml_dtypes if dtype == "bfloat16" else np).finfo(dtype).nmant)


# ---- how many bits


@naming_the_argument
def keepbits_for(
    x: Numbers,
    *,
    max_abs_err: float | None = None,
    max_rel_err: float | None = None,
    information: float | None = None,
    axis: int | None = None,
    backend: str | None = None,
) -> int:
    """The fewest bits of :func:`bitround` that keep a bound on errors, or a share of the information.

    Parameters
    ----------
    x : array
        As for :func:`bitround`; its values are looked at a part at a time.
    max_abs_err, max_rel_err : float, optional
        A bound on the error of every finite element, in units of ``x`` or relative to the element; checked on each,
        exactly.
    information : float, optional
        The share of the *bitwise real information* that is kept, in (0, 1]; Klöwer et al. 2021, doi:10.1038/
        s43588-021-00156-2, advise 0.99. See :func:`bit_information`.
    axis : int, optional
        For ``information``: neighbours along it are compared. By default those along each axis, and most bits win.
    backend : str, optional
        Move ``x`` to this backend first.

    Returns
    -------
    int

    Raises
    ------
    TypeError
        Values are not known, as under a compiler.
    ValueError
        None, or several, of the three; no axis with neighbours; no bit that shares information with its neighbours.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> x = np.linspace(270, 305, 1000, dtype="float32")
    >>> aqt_lite.keepbits_for(x, max_abs_err=0.1), aqt_lite.keepbits_for(x, max_rel_err=1e-3)
    (11, 9)
    >>> noisy = x + np.random.default_rng(0).normal(0, 0.1, 1000).astype("float32")
    >>> aqt_lite.keepbits_for(noisy, information=0.99)
    9
    """
    bound = bound_of(max_abs_err, max_rel_err)
    if (bound is None) == (information is None):
        raise ValueError("give one of max_abs_err, max_rel_err and information, by which the bits are chosen")
    if information is None and axis is not None:
        raise ValueError("axis is given without information: errors have no neighbours")
    array, b = as_float_array(x, "x", backend)
    if b.is_traced(array):
        raise TypeError(
            "the bits are chosen from values, and x is being traced: choose them outside, and pass keepbits"
        )
    if bound is not None:
        return max(_each(partial(_least_within, bound=bound), b, array), default=0)
    return _informative(array, b, _share(information), axis)


def _share(information: Any) -> float:
    if isinstance(information, bool) or not isinstance(information, int | float | np.integer | np.floating):
        raise TypeError(f"information is a {type(information).__name__}: give a number, such as 0.99")
    if not 0 < information <= 1:
        raise ValueError(f"information={information}: a share is above 0, and at most 1")
    return float(information)


def _each(look: Callable[..., _R], b: Backend, *arrays: Array) -> list[_R]:
    """What ``look`` says of each part of arrays of one shape, as arrays of NumPy."""
    first, *_ = arrays
    if 0 in first.shape:
        return []
    if b.is_deferred(first):
        found: list[_R] = b.on_chunks(look, *arrays)
        return found
    parts = over(boxes(tuple(first.shape), _MOST_ELEMENTS, memory_order(first)), math.prod(first.shape))
    return [look(*(np.asarray(b.to_numpy(part_of_array(x, box))) for x in arrays)) for box in parts]


def _least_within(x: _Numbers, *, bound: Bound) -> int:
    """The fewest bits at which all of ``x`` keep the bound. More bits have the numbers of fewer: errors only shrink."""
    numpy = get_backend("numpy")
    left = x[np.isfinite(x)]
    most = significand_bits(x.dtype.name)
    for keepbits in range(most):
        with np.errstate(all="ignore"):
            values = bitrounded(left, keepbits=keepbits, b=numpy)
            error = error_of(left.astype(np.float64), values.astype(np.float64), relative=bound.relative)
        left = left[~(error <= bound.value)]
        if not left.size:
            return keepbits
    return most


# ---- information


@naming_the_argument
def bit_information(x: Numbers, axis: int = -1, *, backend: str | None = None) -> np.ndarray[Any, Any]:
    """The information that each bit of a float shares with that of its neighbour, in bits.

    The *bitwise real information* of Klöwer et al. 2021 (doi:10.1038/s43588-021-00156-2): the mutual information of one
    bit at neighbouring places, 0 where a coin would show as much, 99 times of 100. Exponents are taken as a sign and a
    magnitude, so that few of their bits change around 1. Pairs with NaN or infinities are left out.

    Parameters
    ----------
    x : array
        As for :func:`bitround`.
    axis : int
        Neighbours along it are compared.
    backend : str, optional
        Move ``x`` to this backend first.

    Returns
    -------
    numpy.ndarray
        float64, from the sign and the exponent to the last bit of the significand.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> x = np.linspace(1, 2, 1000, endpoint=False, dtype="float32")
    >>> aqt_lite.bit_information(x)[9:13].round(2)  # the first bits of the significand
    array([0.99, 0.97, 0.94, 0.89])
    """
    array, b = as_float_array(x, "x", backend)
    if b.is_traced(array):
        raise TypeError("information is that of values, and x is being traced: ask outside the compiled function")
    check_integer("axis", axis)
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"axis={axis}: x has {array.ndim} dimensions")
    return _information(array, b, int(axis) % array.ndim)


def _informative(x: Array, b: Backend, share: float, axis: int | None) -> int:
    """The fewest bits that have the share of what there is, along the axis that needs most."""
    axes = [n for n, length in enumerate(x.shape) if length > 1] if axis is None else [axis]
    non_significand = _WIDTHS[b.dtype_name(x)] - significand_bits(b.dtype_name(x))
    found = []
    for one in axes:
        together = np.cumsum(bit_information(x, one))
        if together[-1] > 0:
            found.append(int(np.argmax(together >= share * together[-1])) + 1 - non_significand)
    if not found:
        raise ValueError(
            "no bit of x shares information with its neighbours along "
            f"{'any axis' if axis is None else f'axis {axis}'}: give a bound, or keepbits"
        )
    return max(0, *found)


def _information(x: Array, b: Backend, axis: int) -> _Numbers:
    before, after = (
        x[(slice(None),) * axis + (part,) + (slice(None),) * (x.ndim - axis - 1)]
        for part in (slice(None, -1), slice(1, None))
    )
    bits = _WIDTHS[b.dtype_name(x)]
    pairs = sum(_each(_pairs_of_bits, b, before, after), start=np.zeros((bits, 2, 2), np.int64))
    count = int(pairs[0].sum())
    if not count:
        return np.zeros(bits)
    p = pairs / count
    alone = p.sum(axis=2, keepdims=True) * p.sum(axis=1, keepdims=True)
    terms = p * np.log2(np.divide(p, alone, out=np.ones_like(p), where=p > 0))
    information = np.maximum(terms.sum(axis=(1, 2)), 0.0)
    return np.where(information > _of_a_coin(count), information, 0.0)


def _of_a_coin(count: int) -> float:
    """The information that so many throws of a coin show 99 times of 100."""
    p = min(1.0, 0.5 + _CONFIDENCE / (2 * math.sqrt(count)))
    return 1.0 if p == 1 else 1 + p * math.log2(p) + (1 - p) * math.log2(1 - p)


_BITS_OF_BYTES = (np.arange(256) >> np.arange(7, -1, -1)[:, None] & 1 == np.arange(2)[:, None, None]).astype(np.int64)
"""Whether bit j of a byte, from the most significant on, is v: at [v, j, byte]."""


def _pairs_of_bits(a: _Numbers, b: _Numbers) -> _Numbers:
    """How often each bit, from the most significant on, is i in ``a`` and j in ``b``: at [bit, i, j]."""
    both = np.isfinite(a) & np.isfinite(b)
    words = [_with_signed_exponents(part[both]) for part in (a, b)]
    first, second = (word.view(np.uint8).reshape(word.size, -1).T.astype(np.uint16) for word in words)
    found = []
    for one, other in zip(first, second, strict=True):
        seen = np.bincount((one << 8) | other, minlength=1 << 16).reshape(256, 256)
        found.append(np.einsum("ijk,kl,ujl->jiu", _BITS_OF_BYTES, seen, _BITS_OF_BYTES, optimize=True))
    return np.concatenate(found)


def _with_signed_exponents(x: _Numbers) -> _Numbers:
    """The bits of finite floats, big-endian, exponents as a sign and a magnitude."""
    bits, fraction = _WIDTHS[x.dtype.name], significand_bits(x.dtype.name)
    words = x.view(np.dtype(f"i{x.itemsize}").newbyteorder(x.dtype.byteorder)).astype(np.int64)
    bias = (1 << (bits - fraction - 2)) - 1
    exponent = ((words >> fraction) & (2 * bias + 1)) - bias
    signed = np.where(exponent < 0, bias + 1, 0) | np.abs(exponent)
    rest = words & ~((2 * bias + 1) << fraction)
    found: _Numbers = (rest | (signed << fraction)).astype(f">i{x.itemsize}")
    return found
