"""How MLX chooses scales and offsets: its ``quantize``, with the same bits on every backend.

Owns: that rule, as a function of a range, and the dialect ``mlx``. Imports: dialects alone, and the ``Backend``
interface as an argument's type.

The affine rule (ml-explore/mlx, mlx/ops.cpp) begins with steps of (max - min) / (2^bits - 1), at least 1e-7, and counts
how many of them the end of larger magnitude is away from zero. The scale is that end divided by their number, so that a
whole number of steps leads back to zero, and the offset is that end. Scales are negative where it is the upper one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite.dialects import DIALECTS, Dialect

__all__ = ["from_larger_end"]

_LEAST = 14073749 * 2.0**-47
"""1e-7 in float32."""


def from_larger_end(low: Array, high: Array, steps: int, b: Backend) -> tuple[Array, Array]:
    """Scale and offset of blocks with values from ``low`` to ``high``; NaN where float32 has none.

    Parameters
    ----------
    low, high : array
        float32 or float64, of any shape.
    steps : int
        From the lowest code to the highest.
    b : Backend

    Returns
    -------
    scale, offset : array
        Of the same shape: ``offset`` is the end of larger magnitude, or 0 where that is less than half a step.

    Examples
    --------
    >>> import numpy as np
    >>> from aqt_lite.testing import get_backend
    >>> low, high = np.asarray([-1.0, -4.0], "float32"), np.asarray([2.0, 1.0], "float32")
    >>> from_larger_end(low, high, 15, get_backend("numpy"))
    (array([-0.2       ,  0.33333334], dtype=float32), array([ 2., -4.], dtype=float32))
    """
    xp = b.xp
    lower = xp.abs(low) > xp.abs(high)
    size = b.quotient(high - low, xp.full_like(low, float(steps)))
    size = xp.where(size < _LEAST, xp.full_like(size, _LEAST), size)
    end = xp.where(lower, low, high)
    known = xp.isfinite(size)
    count = xp.round(b.quotient(xp.abs(end), xp.where(known, size, xp.ones_like(size))))
    known = known & xp.isfinite(count)
    counted = known & (count > 0)
    fitted = b.quotient(xp.abs(end), xp.where(counted, count, xp.ones_like(count)))
    size = xp.where(counted, fitted, size)
    # the count has the sign of the end divided by the scale, which begins with that of the end turned round, and so the
    # fitted scale has the sign that it began with
    scale = xp.where(lower, size, -size)
    return xp.where(known, scale, xp.full_like(scale, float("nan"))), xp.where(counted, end, xp.zeros_like(end))


_OF_MX = Dialect("mlx", divides_range=True, divides=True, scale_mode="rceil", kept_of_zeros=127)
_OF_FLOAT4: dict[str, Any] = {
    "rounding": "half_toward_zero",
    "minus_zero": False,
}  # the first of the nearest numbers, from 0 up

DIALECTS["mlx"] = Dialect(
    "mlx",
    symmetric=("mxfp4", "mxfp8_e4m3", "nvfp4"),
    affine=(),
    offsets=tuple(f"uint{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    divides=True,
    of_range=from_larger_end,
    of_formats=(
        ("mxfp4", replace(_OF_MX, **_OF_FLOAT4)),
        ("mxfp8_e4m3", _OF_MX),
        ("nvfp4", Dialect("mlx", divides_range=True, divides=True, plain_scales=True, **_OF_FLOAT4)),
    ),
    source="mlx 0.32.4 on a CPU: quantize, in the modes affine, mxfp4, mxfp8 and nvfp4",
)
