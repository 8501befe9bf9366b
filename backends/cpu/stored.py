"""Products in float32 with a weight as it is stored: codes packed or not, scales in whatever format they are kept.

Owns: the form of ``reference.matmul_stored`` for NumPy arrays. Imports: the operations, the runtime, ``serve``, which
says what it is for, ``operands``, for what loops are told, ``in_out``, for a weight that lies the other way, and
``tiles``, for what no loop serves. The loops are ``decoding``'s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from aqt_lite import affine
from aqt_lite._dispatch import run
from aqt_lite._namespace import Array
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded, Spec
from aqt_lite.backends.cpu import decoders, runtime, serve
from aqt_lite.backends.cpu.in_out import matmul_in_out
from aqt_lite.backends.cpu.operands import NO_CODES, NO_SCALES, NO_ZEROS, Operands, adds_nothing, operands_of
from aqt_lite.backends.cpu.runtime import (
    LOADED,
    aligned_empty,
    ends_of_parts,
    ends_of_shares,
    in_parts,
    map_ranges,
    steps_of_product,
)
from aqt_lite.backends.cpu.tiles import matmul_of_tiles
from aqt_lite.ops import reference

__all__ = [
    "ByLoops",
    "matmul_by_values",
    "matmul_stored",
    "stored_of_weight",
    "with_scales_in_x",
]

ROWS_OF_A_PANEL = 12
"""Rows of x that take as long to multiply by a panel as its floats take to be made."""

_FLOAT32 = np.dtype(np.float32)


class ByLoops:
    """Products with a weight of these types, shapes and format: what these alone say of the loops is decided once.

    Nothing of the weight's arrays is kept. Each call is given them, and they may lie elsewhere by then, or hold other
    numbers.
    """

    def __init__(self, w: Coded, spec: Spec, contract: int, packed_length: int | None) -> None:
        self._spec, self._packed = spec, packed_length is not None
        told = "float32", w, spec, contract, self._packed
        self._length, self._inner = w.codes.shape[0], w.codes.shape[1] if packed_length is None else packed_length
        self.decodes = serve.decodes(*told) and not serve.sums_single_codes(w, spec, contract)
        """Whether loops serve whose codes become numbers."""
        self._lies_in_out = serve.decodes_in_out(*told)
        self._loops = runtime.decoding_loops()
        plain_bytes = self.decodes and not self._packed and spec.element.zero_points and w.zero_point is None
        self.leaves_one_row = plain_bytes and (spec.block[1] or 0) % self._loops.LANES != 0
        """Whether ``floats`` has a faster loop for one row: bytes without zero points in groups that are no vectors."""
        self._by_digits = serve.by_digits(serve.MOST_ROWS_FOR_LOOPS + 1, w, contract, self._packed)
        self._constants: tuple[int, int, Array, Array, int] | None = None
        self._cuts = dict[int, tuple[int, Array, int] | None]()

    def serve(self, rows: int) -> bool:
        """Whether loops serve so many rows of x, whichever way the weight lies."""
        return self.decodes or (self._lies_in_out and serve.are_in_out(rows, self._inner))

    def are_there(self) -> bool:
        """Whether what was decided still holds: tests and benchmarks do without loops that others had before."""
        return self._loops is runtime.decoding_loops()

    def take(self, x: Array, bias: Array | None) -> bool:
        """Whether loops read both as they are."""
        return x.dtype == _FLOAT32 and (bias is None or bias.dtype == _FLOAT32) and self.are_there()

    def __call__(self, x: Array, w: Coded, bias: Array | None) -> Any:
        """``x @ w.T + bias`` in float32; x and the bias are no float64."""
        if self._lies_in_out and self.serve(len(x)):
            return matmul_in_out(x, w, bias, spec=self._spec, columns=self._inner, packed=self._packed)
        if not (self.decodes and len(x)) or (len(x) == 1 and self.leaves_one_row):
            return NotImplemented
        y = self.by_floats_in_cache(x, w, bias)
        return self.by_decoding(x, w, bias) if y is NotImplemented else y

    def by_floats_in_cache(self, x: Array, w: Coded, bias: Array | None) -> Any:
        """The product where many rows of x meet floats that stay in a cache, all or some; else NotImplemented."""
        rows = len(x)
        cut = self.cut_in_panels(rows)
        if cut is not None:
            return self._by_panels(x, w, bias, *cut)
        return self.by_floats(x, w, bias) if self.are_worth_floats(rows) else NotImplemented

    def cut_in_panels(self, rows: int) -> tuple[int, Array, int] | None:
        """How so many rows of x are multiplied by panels of floats, which loops make and keep in a cache; None if not.

        Steps, where parts of the product end, and how many stretches of rows there are for each panel.
        """
        if rows <= serve.MOST_ROWS_FOR_LOOPS or not self.decodes:
            return None
        if rows > serve.MOST_ROWS_FOR_PANELS:
            return self._new_cut(rows)
        if rows not in self._cuts:
            self._cuts[rows] = self._new_cut(rows)
        return self._cuts[rows]

    def _new_cut(self, rows: int) -> tuple[int, Array, int] | None:
        length, inner = self._length, self._inner
        loops = runtime.panel_loops()
        depth = loops.depth_of.py_func(inner, self._spec.block[1] or inner)
        if not serve.is_worth_panels(rows, length, inner, loops.WIDTH, depth, self._by_digits):
            return None
        steps = steps_of_product(length * inner, rows)
        return steps, *ends_of_panels(rows, length, steps)

    def _by_panels(self, x: Array, w: Coded, bias: Array | None, steps: int, ends: Array, cuts: int) -> Any:
        """The product by those, for groups of any length: ``serve.decodes``."""
        loops, operands, length = runtime.panel_loops(), self.operands(w), self._length
        x = np.ascontiguousarray(x, dtype=np.float32)
        codes = np.ascontiguousarray(w.codes).view(np.uint8)
        bias = adds_nothing(length) if bias is None else np.ascontiguousarray(bias, dtype=np.float32)
        y = np.empty((len(x), length), dtype=np.float32)
        small = in_parts(loops.multiply_in_parts, steps, ends, codes, x, self._inner, *operands, bias, cuts, y)
        return y if small else NotImplemented

    def are_worth_floats(self, rows: int) -> bool:
        """Whether so many rows of x are multiplied by BLAS, for the weight's floats stay in a cache."""
        return self.decodes and serve.is_worth_floats(rows, self._length * self._inner, self._by_digits)

    def by_floats(self, x: Array, w: Coded, bias: Array | None) -> Any:
        """The product by BLAS, for groups of any length: ``serve.decodes``."""
        y: Any = None
        with np.errstate(all="ignore"):
            x = np.ascontiguousarray(x, dtype=np.float32)
            for columns, values in self.blocks_of_values(w):
                if values is None:
                    return NotImplemented
                if len(values) == self._length:
                    y = np.matmul(x, values.T)
                else:
                    y = np.empty((len(x), self._length), dtype=np.float32) if y is None else y
                    np.matmul(x, values.T, out=y[:, columns])
            if bias is not None:
                y += bias
        return y

    def blocks_of_values(self, w: Coded) -> Iterator[tuple[slice, Array | None]]:
        """The weight's values as products use them: blocks of rows that a cache holds.

        Each lies in the memory of the one before. None where a scale is 0, NaN, or so large that values might have to
        be clipped. All on this thread: on the other cores those of BLAS go on spinning, and a thread of the pool would
        wait for a core longer than the loop takes.
        """
        loops, operands, inner = self._loops, self.operands(w), self._inner
        codes, height = np.ascontiguousarray(w.codes).view(np.uint8), max(1, serve.MOST_CODES_AT_ONCE // inner)
        scratch = np.empty((min(height, self._length), inner), dtype=np.float32)
        for first in range(0, self._length, height):
            last = min(first + height, self._length)
            values = scratch[: last - first]
            served = loops.dequantize(codes[first:last], inner, *operands, first, values)
            yield slice(first, last), values if served else None

    def by_decoding(self, x: Array, w: Coded, bias: Array | None) -> Any:
        """The product by loops whose codes become numbers in registers, or in a cache: ``serve.decodes``."""
        loops, operands, length = self._loops, self.operands(w), self._length
        x = np.ascontiguousarray(x, dtype=np.float32)
        codes = np.ascontiguousarray(w.codes).view(np.uint8)
        bias = adds_nothing(length) if bias is None else np.ascontiguousarray(bias, dtype=np.float32)
        y = np.empty((len(x), length), dtype=np.float32)
        arranged = _arranged(x, operands)
        steps = steps_of_product(length * self._inner, len(x))
        ends = ends_of_parts(length, loops.STRIP, steps)
        small = in_parts(loops.multiply_in_parts, steps, ends, codes, arranged, self._inner, *operands, bias, y)
        return y if small else NotImplemented

    def operands(self, w: Coded) -> Operands:
        """``operands_of`` a weight of these types and shapes: once, but for those that are arrays of the weight."""
        kept, zero = w.scale.codes if isinstance(w.scale, Coded) else w.scale, w.zero_point
        zero = NO_ZEROS if zero is None else zero
        in_order = kept.flags.c_contiguous and zero.flags.c_contiguous
        if self._constants is not None and in_order:
            kind, flip, table, of_scales, size = self._constants
            scale, codes = (NO_SCALES, kept) if len(of_scales) else (kept, NO_CODES)
            return Operands(kind, flip, table, scale, codes, of_scales, zero, size)
        found = operands_of(w, self._spec, self._inner, self._packed, get_backend("numpy"))
        kind, flip, table, scale, codes, of_scales, of_zero, size = found
        no_more = not isinstance(w.scale, Coded) or all(part is None for part in w.scale[1:])
        if no_more and (scale is kept or codes is kept) and of_zero is zero:
            self._constants = kind, flip, table, of_scales, size
        return found


@np.errstate(all="ignore")
def matmul_stored(
    x: Array,
    w: Coded,
    bias: Array | None,
    *,
    spec: Spec,
    contract: int,
    packed_length: int | None,
    swapped: bool = False,
    loops: ByLoops | None = None,
) -> Any:
    """``reference.matmul_stored``, at no more than twice the error of a float32 product.

    ``loops``: those of such a weight, where they have been made already.
    """
    b, packed = get_backend("numpy"), packed_length is not None
    w, rows, x_name = reference.in_order(w, swapped, b), len(x), b.dtype_name(x)
    if serve.sums_single_codes(w, spec, contract):
        static: dict[str, Any] = {"spec": spec, "contract": contract, "packed_length": packed_length}
        scaled = with_scales_in_x(x, w, spec, contract)
        if scaled is not None:
            own, w, static["spec"] = scaled
            return run(b, reference.matmul_stored, own, w, bias, **static).astype(x.dtype, copy=False)
        y = matmul_by_values(x, reference.with_usable_scales(w, b), bias, **static)
        if y is not NotImplemented:
            return y
    told = x_name, w, spec, contract, packed
    if serve.are_in_out(rows, packed_length or w.codes.shape[1]) and serve.decodes_in_out(*told):
        y = (loops or ByLoops(w, spec, contract, packed_length))(x, w, bias)
        if y is not NotImplemented:
            return y.astype(x.dtype, copy=False)
    if not (rows and serve.decodes(*told)):
        if not serve.is_worth_tiles(rows, w, spec, contract, packed):
            return NotImplemented
        return matmul_of_tiles(x, w, bias, spec=spec, contract=contract, packed_length=packed_length)
    y = (loops or ByLoops(w, spec, contract, packed_length))(x, w, bias)
    return y if y is NotImplemented else y.astype(x.dtype, copy=False)


def with_scales_in_x(x: Array, w: Coded, spec: Spec, contract: int) -> tuple[Array, Coded, Spec] | None:
    """The same product of ``x`` times its own scales, and of a weight whose scale is 1.

    None where the weight has other scales, or products of these with x are so large or so small that what they are
    multiplied with next decides what is lost.
    """
    if not serve.scales_may_meet_x(w, spec, contract) or "float64" in (x.dtype.name, w.scale.dtype.name):
        return None
    with np.errstate(all="ignore"):
        own = x.astype(np.float32, copy=False) * w.scale.reshape(1, -1)
        size = np.abs(own)
        fits = (size < serve.LARGEST_UNSCALED) & ((size >= serve.SMALLEST_SCALED) | (x == 0))
        small = np.abs(w.scale) <= serve.largest_scale_to_meet_x(spec)
    if not (fits.all() and small.all()):
        return None
    return own, w._replace(scale=np.ones((1, 1), np.float32)), replace(spec, block=(None, None))


@np.errstate(all="ignore")
def matmul_by_values(
    x: Array, w: Coded, bias: Array | None, *, spec: Spec, contract: int, packed_length: int | None
) -> Any:
    """The product by BLAS with values that the loops of dequantizing make, some rows of the weight at a time.

    For what no loop multiplies; NotImplemented where these do not serve either.
    """
    b, length, inner = get_backend("numpy"), len(w.codes), packed_length or w.codes.shape[1]
    kept = isinstance(w.scale, tuple)
    if length * inner < runtime.LARGE or "float64" in (x.dtype.name, spec.source.compute) or not len(x):
        return NotImplemented
    if runtime.decoding_loops() is None:
        return NotImplemented
    if kept and any(part is not None for part in w.scale[1:]):
        return NotImplemented
    group = spec.block[0] or 1
    height = -(-max(serve.MOST_CODES_AT_ONCE // inner, 1) // group) * group
    plain, x_dtype, x = reference.unrounded(spec), x.dtype, np.ascontiguousarray(x, dtype=np.float32)
    y = np.zeros((len(x), inner), np.float32) if contract == 0 else np.empty((len(x), length), np.float32)
    scratch = aligned_empty((min(height, length), inner), np.float32)
    for n in range(0, length, height):
        e = min(n + height, length)

        def cut(a: Array | None, n: int = n, e: int = e) -> Array | None:
            return a if a is None or a.shape[0] == 1 else a[n // group : -(-e // group)]

        scale = Coded(cut(Coded(*w.scale).codes), None, None) if kept else cut(w.scale)
        own = Coded(w.codes[n:e], scale, cut(w.zero_point), cut(w.offset))
        values = decoders.dequantize(own, plain, packed_length, "float32", into=scratch[: e - n])
        if values is NotImplemented:
            own = reference.unpacked(own, spec, packed_length, b)
            values = run(b, affine.dequantize, own, spec=plain, out="float32")
        if contract == 0:
            y += x[:, n:e] @ values
        elif len(x) <= serve.MOST_ROWS_ON_THE_RIGHT:
            y[:, n:e] = (values @ x.T).T
        else:
            np.matmul(x, values.T, out=y[:, n:e])
    if bias is not None:
        y += bias
    return y.astype(x_dtype, copy=False)


def stored_of_weight(
    w: Coded, *, spec: Spec, contract: int, packed_length: int | None, swapped: bool = False
) -> Callable[[Array, Coded, Array | None], Any]:
    """``matmul_stored`` for a weight of these types and shapes."""
    static: dict[str, Any] = {"spec": spec, "contract": contract, "packed_length": packed_length, "swapped": swapped}
    at_once = not swapped and not serve.sums_single_codes(w, spec, contract)
    loops = ByLoops(w, spec, contract, packed_length) if at_once else None  # those swapped are turned at each call

    def call(x: Array, w: Coded, bias: Array | None) -> Any:
        y = loops(x, w, bias) if loops is not None and loops.take(x, bias) else NotImplemented
        return matmul_stored(x, w, bias, **static) if y is NotImplemented else y

    return call


def ends_of_panels(rows: int, length: int, steps: int) -> tuple[Array, int]:
    """The same of the stretches of rows of x that panels meet, and how many of these there are for each panel.

    More than one where there are too few panels for all threads; then each makes the floats of a panel anew, which
    takes as long as multiplying ``ROWS_OF_A_PANEL`` rows. Half of other loops' steps are worth several threads here,
    where nothing but the product is left to do.
    """
    return _ends_of_panels(rows, length, steps, runtime.worth_parts() // 2, runtime.cores())


@functools.lru_cache(maxsize=64)
def _ends_of_panels(rows: int, length: int, steps: int, worth: int, cores: int) -> tuple[Array, int]:
    loops = runtime.panel_loops()
    width: int = loops.WIDTH
    height: int = loops.ROWS
    panels, tiles = -(-length // width), -(-rows // height)

    def longest(cuts: int) -> int:
        """Rows of x that the thread with the most stretches multiplies."""
        stretches, tiles_of_each = -(-panels * cuts // cores), -(-tiles // cuts)
        return stretches * (tiles_of_each * height + ROWS_OF_A_PANEL)

    cuts = min(range(1, min(cores, tiles) + 1), key=longest) if steps >= worth else 1
    return ends_of_shares(panels * cuts, 1, steps, worth, cores), cuts


@functools.lru_cache(maxsize=64)
def _shape_of_arranged(rows: int, inner: int, kind: int) -> tuple[int, int]:
    return runtime.decoding_loops().shape_of_arranged(rows, inner, kind)  # type: ignore[no-any-return]


def _arranged(x: Array, of_weight: Operands) -> Array:
    """Rows of x as the loops read them."""
    loops, kind = runtime.decoding_loops(), of_weight.kind
    arranged = aligned_empty(_shape_of_arranged(*x.shape, kind), np.float32, LOADED)
    static = kind, of_weight.size, of_weight.table, of_weight.zero.shape[0] > 0
    if x.size < runtime.LARGE:
        loops.arrange(x, *static, arranged)
        return arranged

    def some(start: int, stop: int) -> None:
        loops.arrange(x[start:stop], *static, arranged[start : len(arranged) if stop == len(x) else stop])

    map_ranges(some, len(x), 1, x.size)
    return arranged
