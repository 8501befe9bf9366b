"""Bit-exact comparison, and what an adapter must pass.

Owns: ``mismatches``, ``assert_same_bits`` and the conformance suite ``check_backend``. Imports: the public package.
Whoever writes an adapter subclasses ``Backend``, registers it under the entry-point group ``aqt_lite.backends``, and
runs ``check_backend(name)``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from aqt_lite._protocol import Backend, IntLimits
from aqt_lite._registry import backend_of
from aqt_lite.qarray import QArray

__all__ = ["Backend", "IntLimits", "assert_same_bits", "mismatches"]


def mismatches(actual: Any, expected: Any) -> int:
    """How many elements differ in their bits, between arrays of any backends.

    A NaN equals any NaN, whatever its payload: hardware differs there, and no promise covers it.

    Raises
    ------
    AssertionError
        Shapes or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from aqt_lite.testing import mismatches
    >>> mismatches(np.asarray([1.0, 0.0], "float32"), np.asarray([1.0, -0.0], "float32"))
    1
    """
    return int(_differing(_as_numpy(actual), _as_numpy(expected)).sum())


def assert_same_bits(actual: Any, expected: Any) -> None:
    """AssertionError unless both have the same shape, dtype and bits; QArrays in codes, scale and zero point.

    Examples
    --------
    >>> import aqt_lite
    >>> from aqt_lite.testing import assert_same_bits
    >>> q = aqt_lite.quantize([1.0, 2.0])
    >>> assert_same_bits(q.to_backend("array_api_strict"), q)
    """
    if isinstance(actual, QArray) and isinstance(expected, QArray):
        for name in ("dtype", "float_dtype", "granularity"):
            a, e = getattr(actual, name), getattr(expected, name)
            if a != e:
                raise AssertionError(f"{name} is {a}, not {e}")
        parts = [(name, getattr(actual, name), getattr(expected, name)) for name in ("qvalue", "scale", "zero_point")]
    else:
        parts = [("array", actual, expected)]
    for name, a, e in parts:
        if (a is None) != (e is None):
            raise AssertionError(f"{name} is {a}, not {e}")
        if a is None:
            continue
        first, second = _as_numpy(a), _as_numpy(e)
        differ = _differing(first, second)
        if differ.any():
            at = tuple(int(i) for i in np.unravel_index(int(np.argmax(differ)), differ.shape))
            raise AssertionError(
                f"{name}: {int(differ.sum())} of {differ.size} elements differ, "
                f"the first at {at}: {first[at]!r}, not {second[at]!r}"
            )


def _differing(a: np.ndarray[Any, Any], e: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where the bits differ and not both are NaN."""
    if a.shape != e.shape or a.dtype.name != e.dtype.name:
        raise AssertionError(f"{a.dtype.name}{a.shape} is compared with {e.dtype.name}{e.shape}")
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    a, e = (np.array(v, dtype=v.dtype.newbyteorder("="), order="C") for v in (a, e))
    both_nan = (a != a) & (e != e)
    differ: np.ndarray[Any, Any] = (a.view(unsigned) != e.view(unsigned)) & ~both_nan
    return differ


def _as_numpy(x: Any) -> np.ndarray[Any, Any]:
    b = backend_of(x)
    if b is None:
        raise TypeError(f"{type(x).__name__} is no array")
    return np.asarray(b.to_numpy(x))
