"""How HQQ chooses scales and zero points, before it optimizes them, with the same bits on every backend.

Owns: that rule, as a function of a range, and the dialects ``hqq`` and ``hqq_round_zero``. Imports: dialects alone, and
the ``Backend`` interface as an argument's type.

HQQ (mobiusml/hqq, hqq/core/quantize.py) computes the inverse of a scale, ``steps`` times that of ``max - min``, at most
2e4, and 1 where the range is 1e-4 or less; its zero point is a real number, ``-min`` times that, rounded with
``round_zero=True``. Codes are ``round(x * inverse + zero)``. Here the zero point becomes an offset, ``-zero * scale``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend
from aqt_lite.dialects import DIALECTS, Dialect

__all__ = ["over_range"]

_NARROW = float(np.float32(1e-4))
_MOST = 2e4
_NORMAL = 2.0**-126
_LARGEST = 2.0**126
"""Its reciprocal is normal."""


def over_range(
    low: Array, high: Array, steps: int, b: Backend, *, round_zero: bool = False
) -> tuple[Array, Array, Array, Array]:
    """Scale, offset, and the inverse of the scale and the zero point that codes are made with.

    Parameters
    ----------
    low, high : array
        Smallest and largest values of blocks: float32 or float64, of any shape.
    steps : int
        From the lowest code to the highest.
    b : Backend
    round_zero : bool
        Whether the zero point is a whole number.

    Returns
    -------
    scale, offset, inverse, zero : array
        Of the same shape; NaN for the scale where the range is beyond 2^126.

    Examples
    --------
    >>> import numpy as np
    >>> from aqt_lite.testing import get_backend
    >>> low, high = np.asarray([-1.0, 4.0], "float32"), np.asarray([2.0, 5.0], "float32")
    >>> scale, offset, inverse, zero = over_range(low, high, 15, get_backend("numpy"))
    >>> scale.round(6).tolist(), offset.tolist(), inverse.tolist(), zero.tolist()
    ([0.20000000298023224, 0.06666699796915054], [-1.0, 4.0], [5.0, 15.0], [5.0, -60.0])
    """
    xp = b.xp
    extent = high - low
    known = extent <= _LARGEST
    wide = known & (extent > _NARROW)
    ones = xp.ones_like(extent)
    inverse = xp.where(wide, b.quotient(ones, xp.where(wide, extent, ones)) * float(steps), ones)
    inverse = xp.where(inverse > _MOST, xp.full_like(inverse, _MOST), inverse)
    scale = b.quotient(ones, inverse)
    zero = -low * inverse
    zero = xp.round(zero) if round_zero else xp.where(xp.abs(zero) < _NORMAL, zero * 0.0, zero)
    return xp.where(known, scale, xp.full_like(scale, float("nan"))), -zero * scale, inverse, zero


DIALECTS["hqq"] = Dialect(
    "hqq",
    symmetric=(),
    affine=(),
    offsets=tuple(f"uint{bits}" for bits in (2, 3, 4, 5, 6, 8)),
    of_range=over_range,
    source="hqq 0.2.8.post1: Quantizer.quantize with optimize=False",
)
DIALECTS["hqq_round_zero"] = replace(
    DIALECTS["hqq"],
    name="hqq_round_zero",
    of_range=partial(over_range, round_zero=True),
    source="hqq 0.2.8.post1: Quantizer.quantize with optimize=False and round_zero=True",
)
