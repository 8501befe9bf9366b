"""Codes and values that are written into memory that exists: ``out=``, a file's pages for instance.

Owns: the checks of ``out``, and the operations that need no memory beside it, which libraries have whose arrays can be
written to. Imports: ``affine``, packing, dispatch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from aqt_lite._dispatch import kernel_for
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite.affine import Coded, QParams, Recipe, Spec
from aqt_lite.packing import bytes_of

__all__ = ["can_write", "check_out", "choose_of_extrema", "decode_into", "dequantize_at_once", "dequantize_stored",
           "encode_into", "extrema", "extrema_are_of", "is_packed", "look_at_codes", "look_at_values",
           "quantize_stored", "storage_of"]  # fmt: skip


def extrema(x: Array, *, spec: Spec, recipe: Recipe, b: Backend) -> Array | None:
    """All that scales are chosen from: the ends of each block; None where they are not all, or not worth keeping.

    They are those of every format whose ``extrema_are_of`` is the same.
    """
    return None


def extrema_are_of(spec: Spec, recipe: Recipe) -> tuple[Any, ...]:
    """What ends of blocks depend on, beside the array."""
    element = spec.element
    looks_at = (recipe.of_magnitudes, recipe.may_lack_zero, recipe.ignore_nonfinite, element.missing is None)
    return spec.block, spec.source.name, *looks_at


def choose_of_extrema(ends: Array, *, spec: Spec, recipe: Recipe, b: Backend) -> QParams:
    """``affine.choose_qparams`` of an array whose blocks have these ends."""
    raise TypeError(_refusal(b))


def encode_into(
    x: Array,
    qparams: QParams,
    key: Array | None,
    storage: Array,
    look: Callable[..., bool] | None,
    *,
    spec: Spec,
    recipe: Recipe,
    b: Backend,
) -> None:
    """The codes of ``x`` in ``storage``, packed where the format has them so.

    ``look(x, values, ...)`` hears of each part, as of ``look_at_values``, what is read of it once it is written.
    """
    raise TypeError(_refusal(b))


def quantize_stored(x: Array, key: Array | None = None, *, spec: Spec, recipe: Recipe, b: Backend) -> Any:
    """``affine.quantize`` with codes as they are kept, packed: for libraries that need not have them unpacked before.

    Others answer NotImplemented.
    """
    return NotImplemented


def dequantize_stored(w: Coded, *, spec: Spec, length: int, out: str, b: Backend) -> Any:
    """``affine.dequantize`` of codes as they are kept, packed, ``length`` along the last axis.

    Where codes need not be unpacked before; others answer NotImplemented.
    """
    return NotImplemented


def dequantize_at_once(w: Coded, *, spec: Spec, length: int | None, out: str, b: Backend) -> Any:
    """The same of codes packed or, without a ``length``, one an item, where a program wants all of their values.

    What makes them then need not fuse with what follows; others answer NotImplemented.
    """
    return NotImplemented


def decode_into(
    codes: Array, qparams: QParams, values: Array, *, spec: Spec, fill: float | None, packed: bool, b: Backend
) -> None:
    """What codes, one an item or ``packed``, stand for in ``values``; ``fill`` where they are missing."""
    raise TypeError(_refusal(b))


def look_at_values(
    x: Array,
    qparams: QParams,
    key: Array | None,
    look: Callable[..., bool],
    first: int,
    *,
    spec: Spec,
    recipe: Recipe,
    b: Backend,
) -> int:
    """What the codes of ``x`` would stand for, without the codes: ``look(x, values, ...)`` of each part of both.

    Values are of the type of ``x``, and of that of the arithmetic if it is another. It ends where ``look`` says False:
    the position of that part is the result, else 0. The part at position ``first`` is looked at first.
    """
    raise TypeError(_refusal(b))


def look_at_codes(
    x: Array, codes: Array, qparams: QParams, look: Callable[..., bool], *, spec: Spec, packed: bool, b: Backend
) -> None:
    """What ``codes``, one an item or ``packed``, stand for: as ``look_at_values``."""
    raise TypeError(_refusal(b))


def can_write(b: Backend) -> bool:
    """Whether the operations above are there."""
    return kernel_for(b, encode_into, {}) is not None


def _refusal(b: Backend) -> str:
    return f"out is given, but arrays of {b.name} are not written to here: leave it out, or pass arrays of NumPy"


def is_packed(spec: Spec, ndim: int) -> bool:
    """Whether codes are kept as a dense stream of bits."""
    return spec.element.packs and ndim > 0


def storage_of(shape: tuple[int, ...], spec: Spec) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of the codes as they are kept."""
    if not is_packed(spec, len(shape)):
        return shape, spec.element.storage
    return (*shape[:-1], bytes_of(shape[-1], spec.element.bits)), "uint8"


def check_out(out: Any, shape: tuple[int, ...], name: str, what: str, b: Backend, *sources: Any) -> None:
    """An error where ``out`` is no array that ``what``, of that shape and type, can be written into.

    It must not overlap with ``sources``, which are read meanwhile.
    """
    if not can_write(b):
        raise TypeError(_refusal(b))
    if not isinstance(out, np.ndarray) or isinstance(out, np.ma.MaskedArray):
        raise TypeError(f"out is a {type(out).__name__}: give an array of NumPy, or a memory map")
    dtype = np.dtype(b.dtype(name))
    if out.shape != shape or out.dtype != dtype:
        raise ValueError(f"out is {out.dtype}{out.shape}: it must be {dtype}{shape}, which {what} take")
    if not out.flags.writeable:
        raise ValueError("out is read-only: open its file with mode='r+' or 'w+', or give a copy")
    if out.size and any(step == 0 and n > 1 for step, n in zip(out.strides, out.shape, strict=True)):
        raise ValueError("out is broadcast: several of its elements lie in the same memory; give memory of its own")
    for source in sources:
        if isinstance(source, np.ndarray) and np.may_share_memory(out, source):
            raise ValueError("out overlaps in memory with what is read: give memory of its own")
