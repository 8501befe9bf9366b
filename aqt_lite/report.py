"""Numbers that say what quantization cost.

Owns: ``ErrorReport``. Imports: the container, granularity, the registry. Everything is computed in float64 on NumPy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from aqt_lite._arguments import as_float_array
from aqt_lite.elements import float_type
from aqt_lite.granularity import Granularity
from aqt_lite.qarray import QArray

__all__ = ["BlockError", "ErrorReport", "error_report"]


@dataclass(frozen=True)
class BlockError:
    """One block's error."""

    index: tuple[int, ...]
    """Position in the grid of blocks, as in ``q.scale[index]``."""
    mse: float
    """Mean squared error of the block, in squared units of ``x``."""
    max_abs_error: float
    """Largest absolute error in the block, in units of ``x``."""
    scale: float
    """The block's scale."""


@dataclass(frozen=True)
class ErrorReport:
    """What :func:`error_report` found; prints as a table."""

    shape: tuple[int, ...]
    dtype: str
    granularity: Granularity
    mse: float
    """Mean squared error, in squared units of ``x``."""
    max_abs_error: float
    """Largest absolute error, in units of ``x``."""
    sqnr_db: float
    """Signal-to-quantization-noise ratio, ``10 log10(sum x^2 / sum e^2)``, in dB; infinite without error."""
    clipped: int
    """Values more than half a scale off, before rounding to their own type: they lay outside the range of the codes."""
    nbytes: int
    """Bytes of codes, scales and zero points."""
    source_nbytes: int
    """Bytes of the array that was quantized."""
    worst_blocks: tuple[BlockError, ...]
    """Blocks with the largest mean squared error, worst first."""

    def __str__(self) -> str:
        ratio = f" ({self.source_nbytes / self.nbytes:.2f}x smaller)" if self.nbytes else ""
        rows = [
            ("array", f"{self.shape} as {self.dtype}, {self.granularity}"),
            ("bytes", f"{self.source_nbytes} -> {self.nbytes}{ratio}"),
            ("SQNR", f"{self.sqnr_db:.2f} dB"),
            ("mean squared error", f"{self.mse:.6g}"),
            ("largest error", f"{self.max_abs_error:.6g}"),
            ("clipped values", f"{self.clipped}"),
        ]
        rows += [
            (
                f"worst block {i}",
                f"{block.index}: mse {block.mse:.6g}, max {block.max_abs_error:.6g}, scale {block.scale:.6g}",
            )
            for i, block in enumerate(self.worst_blocks, 1)
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def error_report(x: Any, q: QArray, *, worst: int = 3) -> ErrorReport:
    """How far ``q`` is from the array ``x`` that it stands for.

    Parameters
    ----------
    x : array of any backend, or list
        The original, of the shape of ``q``. It may live on another backend than ``q``.
    q : QArray
    worst : int
        How many blocks to name.

    Raises
    ------
    TypeError, ValueError
        ``q`` is no QArray; shapes differ; the values are being traced by a compiler and not known yet.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> x = np.asarray([[191.6, -13.5, 728.6], [92.14, 295.5, -184], [0, 684.6, 245.5]], "float32")
    >>> print(aqt_lite.error_report(x, aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0)), worst=1))
    array               (3, 3) as int8, PerChannel(axis=0)
    bytes               36 -> 21 (1.71x smaller)
    SQNR                48.77 dB
    mean squared error  1.80844
    largest error       2.46535
    clipped values      0
    worst block 1       (0, 0): mse 3.0991, max 2.27875, scale 5.73701
    """
    if not isinstance(q, QArray):
        raise TypeError(f"q is a {type(q).__name__}, not a QArray")
    array, b = as_float_array(x, "x")
    if b.is_traced(array) or q._backend.is_traced(q.storage):
        raise TypeError("error_report needs values, but x or q is being traced: call it outside the compiled function")
    if tuple(array.shape) != q.shape:
        raise ValueError(f"x has shape {tuple(array.shape)} but q {q.shape}: give the array that was quantized")
    values = b.to_numpy(array)
    source_nbytes = values.nbytes
    q = q.to_backend("numpy")._aligned()
    compute = float_type(q.float_dtype).compute
    with np.errstate(over="ignore", invalid="ignore"):
        values = values.astype(np.float64)
        error = values - np.asarray(q.dequantize()).astype(np.float64)
        square, exponent = _squares(error)
        signal, signal_exponent = _squares(values)
        unrounded = values - np.asarray(q.dequantize(compute)).astype(np.float64)
    index = _block_index(q)
    grid = q.scale.shape
    count = np.bincount(index.ravel(), minlength=math.prod(grid))
    block_square = np.bincount(index.ravel(), weights=square.ravel(), minlength=math.prod(grid))
    with np.errstate(over="ignore", under="ignore"):
        block_mse = np.ldexp(np.divide(block_square, count, out=np.zeros(count.shape), where=count > 0), exponent)
        mse = float(np.ldexp(square.sum() / max(error.size, 1), exponent))
    block_max = np.zeros(count.shape)
    np.maximum.at(block_max, index.ravel(), np.abs(error).ravel())
    scales = np.asarray(q.scale, dtype=np.float64).ravel()
    half = (scales[index] if index.size else np.zeros(q.shape)) * 0.5
    slack = np.abs(values) * float(np.finfo(compute).eps) * 4  # of the scale's reciprocal and of two products
    order = np.argsort(-block_mse, kind="stable")[: max(worst, 0)]
    return ErrorReport(
        shape=q.shape,
        dtype=q.dtype,
        granularity=q.granularity,
        mse=mse,
        max_abs_error=float(np.abs(error).max(initial=0.0)),
        sqnr_db=_decibel(float(signal.sum()), float(square.sum()), signal_exponent - exponent),
        clipped=int((np.isinf(values) | (np.abs(unrounded) > half + slack)).sum()),
        nbytes=q.nbytes,
        source_nbytes=source_nbytes,
        worst_blocks=tuple(
            BlockError(
                index=tuple(int(i) for i in np.unravel_index(int(flat), grid)),
                mse=float(block_mse[flat]),
                max_abs_error=float(block_max[flat]),
                scale=float(scales[flat]),
            )
            for flat in order
        ),
    )


def _squares(values: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int]:
    """Squares divided by a power of two, and its exponent: those of 1e-170 would be 0, and those of 1e170 infinite."""
    finite = np.abs(values[np.isfinite(values)])
    exponent = int(np.frexp(finite.max(initial=0.0))[1])
    with np.errstate(under="ignore"):
        return np.ldexp(values, -exponent) ** 2, 2 * exponent


def _decibel(signal: float, noise: float, exponent: int) -> float:
    """Of ``signal * 2^exponent`` to ``noise``."""
    if noise == 0 or signal == 0:
        return -math.inf if noise else math.inf
    return 10 * (math.log10(signal) - math.log10(noise) + exponent * math.log10(2))


def _block_index(q: QArray) -> np.ndarray[Any, Any]:
    """For every element, the flat index of its block."""
    index = np.zeros(q.shape, dtype=np.int64)
    for axis, (length, size, blocks) in enumerate(zip(q.shape, q.block, q.scale.shape, strict=True)):
        along = np.arange(length) // (length if size is None else size) if length else np.arange(0)
        along = along.reshape([-1 if d == axis else 1 for d in range(q.ndim)])
        index = index * blocks + along
    return index
