"""Values by compiled loops, of codes of up to 8 bits, packed or not, and of every layout in which groups follow rows.

Owns: the view of codes as rows with scales of their own, and the form that is made of the loop. Imports: the runtime,
``serve``, and ``stored``, for the loop is that of products, ``decoding.dequantize``. ``quantize`` calls it, and has
other forms for what is not served here.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from aqt_lite import affine
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import runtime, serve
from aqt_lite.backends.cpu.encoders import lies_in_order
from aqt_lite.backends.cpu.kinds import kind_of
from aqt_lite.backends.cpu.operands import Operands, blocks_of_rows, operands_of_columns, plain_scales
from aqt_lite.backends.cpu.runtime import LARGE, aligned_empty, ends_of_parts, in_parts, steps_of_elements

__all__ = ["dequantize"]

SHORTEST_ROW = 64
"""Codes of a row from which on the loop pays: what it does for each takes as long as some dozens of codes."""

SHORTEST_GROUP = 8
"""The same of a group within a row."""

LONG_ROW = 1 << 10
"""Codes of a row up to which several are taken for one, and that one row is cut into at least."""

MOST_ROWS_OF_ONE = 1 << 12
"""Rows that one long row is cut into, for several threads."""


class _Rows(NamedTuple):
    """A view of codes as rows."""

    rows: int
    inner: int
    """Codes of each."""
    size: int | None
    """Codes of a group; None: one for each row."""
    grid: tuple[int, int]
    """The shape of scales: of all rows or for all, by groups."""
    spread: tuple[int, ...]
    """The shape that scales are spread to first."""


def dequantize(w: Coded, spec: Spec, length: int | None, out: str, into: Array | None = None) -> Any:
    """``affine.dequantize``, into memory that exists if it is given; ``length``: of the last axis, if codes are packed.

    NotImplemented where other forms serve.
    """
    if w.offset is not None:
        return _with_offsets(w, spec, length, out, into)
    codes, packed = w.codes, length is not None
    shape = (*codes.shape[:-1], codes.shape[-1] if length is None else length) if codes.ndim else ()
    if not (spec.source.name == out == "float32" and math.prod(shape) >= LARGE and codes.flags.c_contiguous):
        return NotImplemented
    if not serve.decodes("float32", w, spec, 1, packed):
        return NotImplemented
    if _has_columns(w, spec, shape):
        return _of_columns(w, spec, shape, packed, into)
    found = _as_rows(w, spec, shape, packed)
    if found is None or found.inner < SHORTEST_ROW or (found.size or SHORTEST_GROUP) < SHORTEST_GROUP:
        return NotImplemented
    operands = _operands_of(w, spec, found, packed)
    return _by_loops(codes, (found.rows, found.inner), operands, False, shape, into)


def _with_offsets(w: Coded, spec: Spec, length: int | None, out: str, into: Array | None) -> Any:
    """The same of codes with offsets: halves, to which halves of these are added, as ``affine.dequantize`` does."""
    plain = isinstance(w.scale, np.ndarray) and w.scale.dtype == np.float32 and w.zero_point is None
    size = spec.block[-1] if w.codes.ndim == 2 else 1
    if not plain or (size or SHORTEST_GROUP) < SHORTEST_GROUP:
        return NotImplemented
    zero = np.zeros(w.scale.shape, np.int32) if spec.element.storage == "uint8" else None  # loops take 128 off else
    own = Coded(w.codes, w.scale * np.float32(0.5), zero)
    halves = dequantize(own, spec, length, out, into)
    if halves is NotImplemented:
        return NotImplemented
    rows, inner = halves.shape
    offsets = blocks_of_rows(w.offset * np.float32(0.5), rows, spec, get_backend("numpy"))
    told = offsets, size or inner, np.float32(spec.source.tiny), np.float32(spec.source.max)
    steps = steps_of_elements(halves.size)
    in_parts(runtime.compiled_loops().add_offsets_in_parts, steps, ends_of_parts(rows, 1, steps), halves, *told)
    return halves


def _by_loops(
    codes: Array,
    view: tuple[int, int],
    operands: Operands,
    by_columns: bool,
    shape: tuple[int, ...],
    into: Array | None,
) -> Any:
    """Values of codes that are seen as rows, in their own shape."""
    if into is None:
        values = aligned_empty(view, np.float32)
    elif lies_in_order(into):
        values = np.asarray(into).reshape(view)
    else:
        return NotImplemented
    streams, steps = codes.view(np.uint8).reshape(view[0], -1), steps_of_elements(values.size)
    loop, ends = runtime.decoding_loops().dequantize_in_parts, ends_of_parts(view[0], 1, steps)
    served = in_parts(loop, steps, ends, streams, view[1], *operands, by_columns, values)
    return values.reshape(shape) if served else NotImplemented


def _has_columns(w: Coded, spec: Spec, shape: tuple[int, ...]) -> bool:
    """Whether all columns of a matrix have scales of their own, for so many codes each that one look at them pays."""
    if len(shape) != 2 or spec.block[1] != 1 or _kept(w).shape[1] != shape[1]:
        return False
    return shape[1] >= SHORTEST_ROW and (spec.block[0] or shape[0]) >= SHORTEST_GROUP


def _of_columns(w: Coded, spec: Spec, shape: tuple[int, ...], packed: bool, into: Array | None) -> Any:
    operands = _without_too_small(operands_of_columns(w, spec, packed, get_backend("numpy")), w, spec)
    return _by_loops(w.codes, (shape[0], shape[1]), operands, True, shape, into)


def _without_too_small(operands: Operands, w: Coded, spec: Spec) -> Operands:
    """Scales as dequantizing takes them, which are 0 where they are smaller than any that it keeps."""
    if not isinstance(w.scale, tuple):
        return operands
    b = get_backend("numpy")
    scale, of_scales = (affine.without_too_small(a, spec, b) for a in (operands.scale, operands.of_scales))
    return operands._replace(scale=scale, of_scales=of_scales)


def _as_rows(w: Coded, spec: Spec, shape: tuple[int, ...], packed: bool) -> _Rows | None:
    """None where scales do not follow rows."""
    grid, block = _kept(w).shape, spec.block
    view = serve.rows_of_blocks(shape, grid, block) if grid[-1] == 1 and not packed else None
    if view is not None:
        return _cut(_Rows(*view, None, (view[0], 1), grid), spec, packed)
    if len(shape) != 2 and any(n not in (1, of) for n, of in zip(grid[:-1], shape[:-1], strict=True)):
        return None
    rows = math.prod(shape[:-1])
    if all(n == 1 for n in grid[:-1]):
        return _cut(_Rows(rows, shape[-1], block[-1], (1, grid[-1]), grid), spec, packed)
    return _cut(_Rows(rows, shape[-1], block[-1], (rows, grid[-1]), (*shape[:-1], grid[-1])), spec, packed)


def _cut(found: _Rows, spec: Spec, packed: bool) -> _Rows:
    """One long row as several, and several short ones as one, where groups and bytes end with them."""
    rows, inner, size, grid, spread = found
    if rows == 1:
        whole = math.lcm(size or 1, 8)  # streams of eight codes end with a byte
        parts = 1 if inner % whole else _largest_part(inner // whole, min(MOST_ROWS_OF_ONE, inner // LONG_ROW))
        return _Rows(parts, inner // parts, size, (1, 1) if size is None else (parts, grid[1] // parts), spread)
    shared, bits = grid[0] == 1, spec.element.bits if packed else 8
    if inner % (size or 1) or inner * bits % 8 or (shared and grid[1] > 1):
        return found
    together = max(LONG_ROW // inner, 1)
    while rows % together:
        together -= 1
    of_rows = (1, 1) if shared else (rows // together, grid[1] * together)
    return _Rows(rows // together, inner * together, None if shared else size or inner, of_rows, spread)


@functools.lru_cache(maxsize=64)
def _largest_part(count: int, most: int) -> int:
    """The largest number up to ``most`` that ``count`` is a multiple of."""
    return next(n for n in range(max(most, 1), 0, -1) if count % n == 0)


def _operands_of(w: Coded, spec: Spec, found: _Rows, packed: bool) -> Operands:
    """What the loop reads beside codes."""
    b, shape = get_backend("numpy"), w.codes.shape
    scale, codes_of_scales, of_scales = plain_scales(w.scale, spec, b)

    def of_rows(blocks: Array) -> Array:
        if not blocks.size:
            return blocks
        if len(blocks) in (1, found.spread[0]) or len(shape) != 2:
            blocks = np.broadcast_to(blocks, found.spread)
        else:
            blocks = blocks_of_rows(blocks, shape[0], spec, b)
        return np.ascontiguousarray(blocks).reshape(found.grid)

    zero = np.empty((0, 0), np.int32) if w.zero_point is None else w.zero_point
    kind = kind_of(spec.element, packed, found.size)
    size = found.size or found.inner + -found.inner % (2 * runtime.decoding_loops().LANES)
    operands = Operands(*kind, of_rows(scale), of_rows(codes_of_scales), of_scales, of_rows(zero), size)
    return _without_too_small(operands, w, spec)


def _kept(w: Coded) -> Array:
    return Coded(*w.scale).codes if isinstance(w.scale, tuple) else w.scale
