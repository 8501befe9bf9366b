"""What compiled loops are told of a weight, beside its codes.

Owns: scales and zero points as the loops read them, whatever they are kept in. Imports: the runtime, ``kinds``, and how
scales are decoded. ``stored``, ``in_out``, ``decoders`` and JAX's products call it.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from aqt_lite import affine
from aqt_lite._blocks import spread
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import runtime
from aqt_lite.backends.cpu.kinds import kind_of
from aqt_lite.backends.cpu.runtime import map_ranges

__all__ = [
    "NO_CODES",
    "NO_SCALES",
    "NO_ZEROS",
    "Operands",
    "adds_nothing",
    "blocks_of_rows",
    "in_c_order",
    "operands_of",
    "operands_of_columns",
    "plain_scales",
    "scales_in",
]

FEWEST_TO_LOOK_UP = 1 << 12
"""Scales of 16 bits from which on looking them up takes less time than decoding them."""

FEWEST_TO_TURN = 1 << 12
"""Scales that lie in the other order from which on a loop turns them in less time than a copy takes."""

_NO_NUMBERS = np.empty(0, dtype=np.float32)
NO_SCALES, NO_CODES, NO_ZEROS = (np.empty((0, 0), dtype=kind) for kind in (np.float32, np.uint8, np.int32))
"""What takes the place of operands that a weight has none of."""


class Operands(NamedTuple):
    """What the loops read of a weight, beside its codes."""

    kind: int
    flip: int
    table: Array
    """What codes are, these three: ``kinds.Kind``."""
    scale: Array
    """For each row of the weight, or for all, and each group."""
    codes_of_scales: Array
    """The same, where scales are kept as codes."""
    of_scales: Array
    """The numbers of such codes."""
    zero: Array
    """Zero points likewise, int32; empty where all are 0."""
    size: int
    """Codes in a group."""


@functools.lru_cache(maxsize=16)
def adds_nothing(length: int) -> Array:
    """A bias that leaves every sum as it is: 0.0 would turn -0.0 to 0.0."""
    return np.full(length, -0.0, np.float32)


def operands_of(w: Coded, spec: Spec, inner: int, packed: bool, b: Backend, swapped: bool = False) -> Operands:
    """The loops' operands of a weight (N, ``inner``), whose codes are packed or lie one a byte.

    ``swapped``: scales and zero points have their axes in the other order, and so have the operands.
    """
    loops, rows = runtime.decoding_loops(), w.codes.shape[0]
    vector, kind = loops.LANES * (2 if packed else 1), kind_of(spec.element, packed, spec.block[1])
    size = spec.block[1] or max(-(-inner // vector), 1) * vector
    scale, codes_of_scales, of_scales = plain_scales(w.scale, spec, b)
    zero = _as_array(NO_ZEROS, b) if w.zero_point is None else w.zero_point

    def of_rows(blocks: Array) -> Array:
        # those of nothing are as they should be: to find that out anew takes time that small products feel
        return blocks if blocks is NO_CODES or blocks is NO_ZEROS else blocks_of_rows(blocks, rows, spec, b, swapped)

    return Operands(*kind, of_rows(scale), of_rows(codes_of_scales), of_scales, of_rows(zero), size)


def operands_of_columns(w: Coded, spec: Spec, packed: bool, b: Backend) -> Operands:
    """The operands of a weight in which every column has scales of its own: as they are kept.

    ``size`` is how many codes of a column share one.
    """
    zero = _as_array(NO_ZEROS, b) if w.zero_point is None else w.zero_point
    scale, codes, of_scales = plain_scales(w.scale, spec, b)
    in_order = np.ascontiguousarray if b.name == "numpy" else b.contiguous
    scale, codes, zero = map(in_order, (scale, codes, zero))
    return Operands(*kind_of(spec.element, packed, None), scale, codes, of_scales, zero, spec.block[0] or len(w.codes))


def blocks_of_rows(blocks: Array, rows: int, spec: Spec, b: Backend, swapped: bool = False) -> Array:
    """Scales or zero points for each row of a weight, or for all, and each group; ``swapped``: groups come first."""
    shared, axis = spec.block[0] or 1, int(swapped)
    if shared > 1 and blocks.shape[axis] > 1:
        shape, block = [blocks.shape[0], blocks.shape[1]], [1, 1]
        shape[axis], block[axis] = rows, shared
        blocks = spread(blocks, tuple(shape), tuple(block), b.xp)
    return in_c_order(blocks) if b.name == "numpy" else b.contiguous(blocks)


def in_c_order(blocks: Array) -> Array:
    """The same in the order of C: by a loop where many lie in the other order, for a copy takes ten times as long."""
    lies_so = blocks.ndim == 2 and blocks.flags.f_contiguous and not blocks.flags.c_contiguous
    loops = runtime.turning_loops() if lies_so and blocks.size > FEWEST_TO_TURN else None
    if loops is None or blocks.dtype.itemsize not in (1, 4):
        return np.ascontiguousarray(blocks)
    out = np.empty(blocks.shape, blocks.dtype)
    loops.turn(blocks.T, 0, len(blocks), out)
    return out


def plain_scales(kept: Any, spec: Spec, b: Backend) -> tuple[Array, Array, Array]:
    """Scales as numbers; or as codes, and the numbers of all codes. What is not needed is empty."""
    xp = b.xp
    if not isinstance(kept, tuple):
        return xp.astype(kept, xp.float32, copy=False), _as_array(NO_CODES, b), _as_array(_NO_NUMBERS, b)
    kept = Coded(*kept)
    codes, numbers = kept.codes, _numbers_to_look_up(kept, spec, b)
    if numbers is None or codes.dtype.itemsize > 1:
        scale = xp.astype(affine.scales(kept, spec, b), xp.float32) if numbers is None else _looked_up(codes, numbers)
        return scale, _as_array(NO_CODES, b), _as_array(_NO_NUMBERS, b)
    if b.dtype_name(codes) == "int8":
        codes = xp.astype(xp.astype(codes, xp.int16) & 255, xp.uint8)
    return _as_array(NO_SCALES, b), codes, numbers


def scales_in(unit: float, kept: Any, spec: Spec, b: Backend) -> Array:
    """Scales of multiples of ``unit``, a power of two: ``affine.usable_scales`` times it.

    Codes of scales are looked up where that takes no compiler.
    """
    if b.name == "numpy" and isinstance(kept, tuple):
        numbers = _numbers_to_look_up(Coded(*kept), spec, b, unit)
        if numbers is not None:
            return _looked_up(Coded(*kept).codes, numbers)
    scale = affine.usable_scales(kept, spec, b)
    return scale if unit == 1 else scale * unit


def _numbers_to_look_up(kept: Coded, spec: Spec, b: Backend, unit: float | None = None) -> Array | None:
    """The numbers of all codes of scales, where these are few, or NumPy's loops look up many; else None.

    ``unit``: scales of multiples of it, that are usable.
    """
    codes, kind, inner = kept.codes, b.dtype_name(kept.codes), kept.scale
    plain, size = b.name == "numpy" and all(part is None for part in kept[1:]), np.dtype(kind).itemsize
    if size == 2 and plain and math.prod(codes.shape) > FEWEST_TO_LOOK_UP and runtime.decoding_loops() is not None:
        return _numbers_of_scales(spec, kind, unit)
    several = inner is not None and (isinstance(inner, tuple) or math.prod(inner.shape) > 1)
    if several or size > 1 or codes.ndim != 2:
        return None
    return _numbers_of_scales(spec, kind, unit) if plain else _numbers_of_every_code(kept, spec, kind, b, unit)


def _numbers_of_every_code(kept: Coded, spec: Spec, kind: str, b: Backend, unit: float | None) -> Array:
    """What scales would be if their codes were these, one after the other."""
    assert spec.format.scale is not None
    size, (least, most) = np.dtype(kind).itemsize, spec.format.scale.element.codes
    bits = np.arange(256**size, dtype=f"u{size}").view(kind)
    every = np.where((bits >= least) & (bits <= most), bits, bits[:1]).reshape(1, -1)  # 0 is a code of them all
    with np.errstate(all="ignore"):  # of every number that a scale's codes have, some are too large
        numbers = affine.scales(kept._replace(codes=b.asarray(every, like=kept.codes)), spec, b)
        if unit is not None:
            numbers = affine.without_too_small(numbers, spec, b) * unit
    return b.xp.reshape(b.xp.astype(numbers, b.xp.float32), (-1,))


@functools.lru_cache(maxsize=64)
def _numbers_of_scales(spec: Spec, kind: str, unit: float | None) -> Array:
    """The same where nothing else is kept: for a small product they would take longer than all of the loops."""
    kept = Coded(np.empty((1, 1), kind), None, None)
    return _numbers_of_every_code(kept, spec, kind, get_backend("numpy"), unit)


def _looked_up(codes: Array, numbers: Array) -> Array:
    """The numbers of codes, which lie as the codes do."""
    turned = codes.flags.f_contiguous and not codes.flags.c_contiguous
    given = codes.T if turned else np.ascontiguousarray(codes)
    found = np.empty(given.shape, np.float32)
    places, flat = given.view(f"u{codes.dtype.itemsize}").reshape(-1), found.reshape(-1)
    loops = runtime.decoding_loops()

    def some(start: int, stop: int) -> None:
        if loops is None:
            numbers.take(places[start:stop], mode="clip", out=flat[start:stop])  # there are as many as places
        else:
            loops.look_up(places[start:stop], numbers, flat[start:stop])

    map_ranges(some, len(flat), 1, len(flat))
    return found.T if turned else found


def _as_array(nothing: np.ndarray[Any, Any], b: Backend) -> Array:
    """One of the empty arrays above; NumPy's as it is, for a copy takes a good part of what a small product may."""
    return nothing if b.name == "numpy" else b.asarray(nothing)
