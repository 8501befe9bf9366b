"""Arithmetic that the contract needs exact and the Array API standard does not promise.

Owns: ``ExactArithmetic``, the part of a ``Backend`` that computes. Imports: nothing of this package.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from aqt_lite._namespace import Array

__all__ = ["ExactArithmetic"]


class ExactArithmetic(ABC):
    """Defaults that are exact on every IEEE machine; adapters override what their library does faster, or not exactly.

    ``aqt_lite.testing.check_backend`` holds each of them against NumPy.
    """

    @property
    @abstractmethod
    def xp(self) -> Any:
        """The library's Array API namespace."""

    def reciprocal(self, x: Array) -> Array:
        """``1/x``, correctly rounded, for normal positive ``x``.

        The default trusts division between two arrays, which IEEE 754 makes correctly rounded on every CPU.
        Override where a compiler may replace it (see ``aqt_lite._exact``).
        """
        return self.xp.ones_like(x) / x

    def quotient(self, x: Array, y: Array) -> Array:
        """``x/y``, correctly rounded, for normal positive ``y`` of the shape of ``x``.

        What is subnormal may count as 0.

        Trusts division as ``reciprocal`` does; to be overridden likewise.
        """
        return x / y

    def largest(self, x: Array, *, axis: Any, keepdims: bool) -> Array:
        """Largest values along ``axis``, of floats; where there is a NaN, that or infinity, never a finite number."""
        return self.xp.max(x, axis=axis, keepdims=keepdims)

    def fraction_and_exponent(self, x: Array) -> tuple[Array, Array]:
        """``x = f * 2^e`` with f in [1, 2) and e int32, for normal positive float32 or float64.

        Zero gives f = 0 and e = -127, for float64 e = -1023.

        By comparisons and products with powers of two, all exact: the standard has no frexp, and log2 is inexact.
        """
        xp = self.xp
        powers = (512, 256, 128, 64, 32, 16, 8, 4, 2, 1)[3 if xp.finfo(x.dtype).bits == 32 else 0 :]
        f, e = x, xp.zeros_like(x, dtype=xp.int32)
        for k in powers:
            large = f >= 2.0**k
            f, e = xp.where(large, f * 2.0**-k, f), xp.where(large, e + k, e)
        for k in powers:
            small = f < 2.0 ** (1 - k)
            f, e = xp.where(small, f * 2.0**k, f), xp.where(small, e - k, e)
        return f, e

    def power_of_two(self, e: Array) -> Array:
        """``2^e`` as float32 for e in [-100, 127], and 0 below."""
        xp = self.xp
        up, down = xp.clip(e, 0, 127), xp.clip(-e, 0, 127)
        p = xp.ones_like(e, dtype=xp.float32)
        for k in (1, 2, 4, 8, 16, 32, 64):
            p = xp.where((up & k) != 0, p * 2.0**k, p)
            p = xp.where((down & k) != 0, p * 2.0**-k, p)
        return xp.where(e < -100, xp.zeros_like(p), p)

    def ordered_sum(self, x: Array) -> Array:
        """``((x[0] + x[1]) + x[2]) + ...`` along the first axis, in exactly that order."""
        total = x[0, ...]
        for i in range(1, int(x.shape[0])):
            total = total + x[i, ...]
        return total
