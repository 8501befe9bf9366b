"""Products in float32: ``x @ dequantize(w)`` without ever holding the whole weight in float.

Owns: the forms of ``reference.matmul`` for NumPy arrays, at no more than twice the error of a float32 product. Imports:
the operations, the runtime, and ``serve``, which says what each is for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from aqt_lite._blocks import spread
from aqt_lite._dispatch import run
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import runtime, serve
from aqt_lite.backends.cpu.fixed_point import matmul_by_dots
from aqt_lite.backends.cpu.runtime import CHUNKS_PER_CORE, LARGE, einsum, loops_of_product, map_ranges, tiles
from aqt_lite.backends.cpu.stored import ByLoops, matmul_by_values, matmul_stored, with_scales_in_x
from aqt_lite.granularity import Block
from aqt_lite.ops import reference

__all__ = ["in_whole_groups", "matmul", "matmul_in_one_call", "of_weight", "rows_of_blocks", "shortly"]

ROWS_OF_A_BLOCK = {0: 256, 1: 512}
"""Rows of a weight 8192 wide that are dequantized at a time, by the contracted axis."""

_FLOAT32 = np.dtype(np.float32)

_ADDS_NOTHING = np.asarray(
    [-0.0], dtype=np.float32
)  # a bias that leaves every sum as it is: 0.0 would turn -0.0 to 0.0


def matmul(x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int) -> Any:
    """The form of the product that is fastest for these arguments."""
    scaled = with_scales_in_x(x, w, spec, contract)
    if scaled is not None:
        own, w, spec = scaled
        y = run(get_backend("numpy"), reference.matmul, own, w, bias, spec=spec, contract=contract)
        return y.astype(x.dtype, copy=False)
    worth_floats = serve.is_worth_floats(len(x), w.codes.size, serve.by_digits(len(x), w, contract, packed=False))
    if not worth_floats and w.codes.size < LARGE and w.zero_point is None:
        y = matmul_in_one_call(x, w, bias, contract=contract)
        if y is not NotImplemented:
            return y
    x_name = get_backend("numpy").dtype_name(x)
    if len(x) > serve.MOST_ROWS_FOR_LOOPS and serve.decodes(x_name, w, spec, contract, packed=False):
        y = ByLoops(w, spec, contract, None).by_floats_in_cache(x, w, bias)
        if y is not NotImplemented:
            with np.errstate(all="ignore"):
                return y.astype(x.dtype, copy=False)
    if serve.is_of_wide_codes(x, x_name, w, spec):
        return _of_wide_codes(x, w, bias, spec, contract)
    if not serve.bytes_and_float32(x, x_name, w, spec):
        return NotImplemented
    if serve.sums_single_codes(w, spec, contract):
        y = matmul_by_values(x, w, bias, spec=spec, contract=contract, packed_length=None)
        if y is not NotImplemented:
            return y
    # loops for groups look at scales as they meet them: of many groups, one more look takes a tenth of one row's time
    decodes = serve.decodes_in_out if contract == 0 else serve.decodes
    looked_at = w.scale.shape[contract] > 1 and decodes(x_name, w, spec, contract, packed=False)
    if not looked_at and serve.values_may_overflow(w):
        return NotImplemented
    large = w.codes.size >= LARGE
    if worth_floats or large or serve.is_worth_decoding(len(x), w, contract):
        by_dots = large and not worth_floats
        y = matmul_by_dots(x, w, bias, spec=spec, contract=contract) if by_dots else NotImplemented
        if y is NotImplemented:
            y = matmul_stored(x, w, bias, spec=spec, contract=contract, packed_length=None)
        if y is not NotImplemented:
            return y
    if looked_at and serve.values_may_overflow(w):
        return NotImplemented
    return _by_steps(x, w, bias, spec, contract)


def _of_wide_codes(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Any:
    """The same of codes of more than 8 bits: by values, for which are loops unless columns have scales."""
    if not serve.has_scales_of_columns(w, spec):
        return matmul_by_values(x, w, bias, spec=spec, contract=contract, packed_length=None)
    return NotImplemented if serve.values_may_overflow(w) else _by_steps(x, w, bias, spec, contract)


def _by_steps(x: Array, w: Coded, bias: Array | None, spec: Spec, contract: int) -> Array:
    """The product by NumPy's own steps, and by compiled ones for a few rows of x."""
    x_dtype, x = x.dtype, np.ascontiguousarray(x, dtype=np.float32)
    with np.errstate(all="ignore"):
        scale_last = serve.scale_may_come_last(x, w)
        if spec.element.bits == 8 and scale_last and serve.row_loops(len(x), w, contract):
            y = _by_row_loops(x, w, spec.block, contract)
        elif w.codes.size < LARGE:
            y = _in_one_block(x, w, spec, contract)
        else:
            y = _blockwise(x, w, spec, contract, scale_last)
        if bias is not None:
            y += bias
        return y.astype(x_dtype, copy=False)


def shortly(
    w: Coded, *, spec: Spec, contract: int, loops: ByLoops | None = None
) -> Callable[[Array, Coded, Array | None], Any]:
    """The forms that are known to be fastest for a weight of these types and shapes, as soon as rows of x are counted.

    NotImplemented for what is left to ``matmul``: where more is asked, of numbers or of other forms. ``loops``: where
    they have been made; else they are when they are wanted.
    """
    large, one_scale = w.codes.shape[0] * w.codes.shape[1] >= LARGE, w.scale.shape[contract] == 1
    most = serve.MOST_ROWS_TO_DECODE if one_scale else sys.maxsize  # digits meet more rows where sums have one scale
    by_loops = loops

    def call(x: Array, w: Coded, bias: Array | None) -> Any:
        nonlocal by_loops
        rows = len(x)
        if not large and rows <= serve.MOST_ROWS_FOR_LOOPS:  # not worth the time that loading other loops takes
            return matmul_in_one_call(x, w, bias, contract=contract)
        by_loops = loops = by_loops or ByLoops(w, spec, contract, None)
        if not loops.take(x, bias):
            return NotImplemented
        y = loops.by_floats_in_cache(x, w, bias)
        if y is NotImplemented and large and contract == 0:
            return loops(x, w, bias)
        if y is NotImplemented and large and loops.decodes and 0 < rows <= most:
            return loops.by_decoding(x, w, bias)
        return y

    return call


def of_weight(w: Coded, *, spec: Spec, contract: int) -> Callable[[Array, Coded, Array | None], Any]:
    """``matmul`` for a weight of these types and shapes."""
    short = shortly(w, spec=spec, contract=contract)

    def call(x: Array, w: Coded, bias: Array | None) -> Any:
        y = short(x, w, bias)
        return matmul(x, w, bias, spec=spec, contract=contract) if y is NotImplemented else y

    return call


def matmul_in_one_call(x: Array, w: Coded, bias: Array | None, *, contract: int) -> Any:
    """The whole of a small product in one compiled call.

    Such a product takes a few microseconds, of which every check and every step in Python is a good part.
    """
    outputs = w.codes.shape[1 - contract]
    bias = _ADDS_NOTHING if bias is None else bias
    if not serve.one_compiled_call(x, w, bias, outputs, contract):
        return NotImplemented
    contiguous, y = np.ascontiguousarray, np.empty((len(x), outputs), dtype=_FLOAT32)
    finite = runtime.compiled_loops().small_product(
        contiguous(w.codes), contiguous(w.scale).reshape(-1), contiguous(x), contiguous(bias), contract, y
    )
    return y if finite else NotImplemented  # a sum that overflows may not do so where the scale comes first


def _in_one_block(x: Array, w: Coded, spec: Spec, contract: int) -> Array:
    rows = w.codes.shape[0]
    weight = _dequantized_rows(w, spec, 0, rows, np.empty(w.codes.shape, dtype=np.float32))
    return x @ (weight if contract == 0 else weight.T)


# ---- blocks of rows of the weight


def in_whole_groups(rows: int, block: Block) -> int:
    """So many rows of the weight, or a few more: a multiple of the rows that share a scale."""
    group = block[0] or 1
    return -(-rows // group) * group


def rows_of_blocks(blocks: Array, start: int, stop: int, block: Block) -> Array:
    """The scales or zero points of rows ``start`` to ``stop`` of the weight; ``start`` begins a group of rows."""
    group = block[0] or 1
    return blocks if blocks.shape[0] == 1 else blocks[start // group : -(-stop // group)]


def _dequantized_rows(w: Coded, spec: Spec, start: int, stop: int, out: Array) -> Array:
    """Rows of the dequantized weight, into ``out``."""
    codes, shape = w.codes[start:stop], (stop - start, w.codes.shape[1])
    if w.zero_point is None:
        loops = runtime.compiled_loops() if w.codes.size >= LARGE and w.codes.flags.c_contiguous else None
        np.copyto(out, codes) if loops is None else loops.widen(codes, out)
    else:
        zero_point = rows_of_blocks(w.zero_point, start, stop, spec.block)
        np.subtract(codes, spread(zero_point, shape, spec.block, np), out=out, casting="unsafe")
    if _is_one(w.scale):
        return out
    scale, group = rows_of_blocks(w.scale, start, stop, spec.block), spec.block[0] or 1
    if scale.shape[1] == shape[1] and len(scale) * group == len(out):  # of columns: as they are, and not spread
        np.multiply(out.reshape(len(scale), group, -1), scale[:, None, :], out=out.reshape(len(scale), group, -1))
        return out
    return np.multiply(out, spread(scale, shape, spec.block, np), out=out)


def _is_one(scale: Array) -> bool:
    return bool(scale.size == 1 and scale.flat[0] == 1)


def _blockwise(x: Array, w: Coded, spec: Spec, contract: int, scale_last: bool) -> Array:
    """A block of rows of the weight at a time, so that the float block stays in cache."""
    codes, scale = w.codes, w.scale
    if scale_last and scale.shape[contract] == 1 and scale.size > 1:  # one product a result instead of one a code
        one_a_column = reference.one_per_column(scale, codes.shape, spec.block, contract, np).reshape(1, -1)
        y = _blockwise(x, Coded(codes, np.ones((1, 1), np.float32)), spec, contract, False)
        return np.multiply(y, one_a_column, out=y)
    length, width = codes.shape
    if contract == 1 and len(x) <= serve.MOST_ROWS_FOR_EINSUM and w.zero_point is None and _is_one(scale):
        y = np.empty((len(x), length), dtype=np.float32)

        def columns(start: int, stop: int) -> None:
            for row, out in zip(x, y, strict=True):
                einsum(codes[start:stop], row, out[start:stop])

        map_ranges(columns, length, 1, codes.size, CHUNKS_PER_CORE)
        return y

    group = spec.block[0] or 1
    half = in_whole_groups(-(-max(1, ROWS_OF_A_BLOCK[contract] * 8192 // width) // 2), spec.block)
    height = 2 * half  # one half for each of two threads
    scratch = np.empty((min(height, length), width), dtype=np.float32)
    y = np.zeros((len(x), width), dtype=np.float32) if contract == 0 else np.empty((len(x), length), np.float32)
    for n in range(0, length, height):
        e = min(n + height, length)

        def convert(start: int, stop: int, n: int = n) -> None:
            _dequantized_rows(w, spec, n + start, n + stop, scratch[start:stop])

        map_ranges(convert, e - n, group)
        weight = scratch[: e - n]
        if contract == 0:
            y += x[:, n:e] @ weight
        elif len(x) <= serve.MOST_ROWS_ON_THE_RIGHT:
            y[:, n:e] = (weight @ x.T).T
        else:
            np.matmul(x, weight.T, out=y[:, n:e])
    return y


# ---- few rows of x


def _by_row_loops(x: Array, w: Coded, block: Block, contract: int) -> Array:
    """A compiled loop for each row of x, which converts codes as it goes; sums meet their scale last."""
    loops, codes, scale = runtime.compiled_loops(), np.ascontiguousarray(w.codes), w.scale
    if scale.shape[contract] == 1:  # groups of outputs share a scale: one for each
        scale = reference.one_per_column(scale, codes.shape, block, contract, np)
    if contract == 0:

        def partial(start: int, stop: int) -> Array:
            return np.stack([loops.columns_times(codes[start:stop], row[start:stop]) for row in x])

        return functools.reduce(np.add, map_ranges(partial, len(codes), 8, codes.size)) * scale

    y = np.empty((len(x), len(codes)), dtype=np.float32)
    grouped = scale.shape[1] > 1

    def columns(start: int, stop: int) -> None:
        for part in tiles(start, stop, codes.shape[1]) if len(x) > 1 else [slice(start, stop)]:
            for row, out in zip(x, y, strict=True):
                if grouped:
                    loops.grouped_rows_times(codes[part], scale[part], block[1], row, out[part])
                else:
                    loops.rows_times(codes[part], row, out[part])

    map_ranges(columns, len(codes), 4, loops_of_product(codes.size, len(x)), CHUNKS_PER_CORE)
    return y if grouped else np.multiply(y, scale.T, out=y)
