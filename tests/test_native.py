"""Functions that are compiled apart from their callers."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from optional import needs

pytestmark = needs("numba")


def test_what_is_compiled_apart_is_called_and_not_copied():
    from numba import njit

    from aqt_lite.backends.cpu.native import apart

    @njit
    def _total(x, more):
        total = np.float32(0)
        for i in range(x.size):
            total += x[i]
        return total + more

    total = apart(_total, "float64(float32[::1], int64)")

    @njit
    def doubled(x):
        return 2 * total((x, x.size))

    x = np.arange(4, dtype=np.float32)
    assert doubled(x) == 2 * (6 + 4)
    assert [str(s) for s in _total.signatures] == ["(Array(float32, 1, 'C', False, aligned=True), int64)"]
    (compiled,) = _total.overloads.values()
    (text,) = doubled.inspect_llvm().values()
    assert compiled.fndesc.mangled_name not in text
    assert "_total.0" in text  # the symbol of where it is
    x.flags.writeable = False
    assert doubled(x) == 2 * (6 + 4)
    assert len(_total.signatures) == 1  # an array that may not be written lies in memory as any other
    assert doubled(np.arange(8, dtype=np.float32)[::2]) == 2 * (12 + 4)  # other types are compiled into the caller
    assert len(_total.signatures) == 2


def test_what_cannot_be_compiled_apart_is_told(monkeypatch):
    from numba import njit

    from aqt_lite.backends.cpu.native import apart, task_of
    from aqt_lite.backends.cpu.pool import in_parts
    from aqt_lite.backends.cpu.runtime import in_parts as in_parts_of_python
    from aqt_lite.backends.cpu.runtime import not_compiled

    @njit
    def _negated(x):
        return -x

    negated = apart(_negated, "boolean(int64)")

    @njit
    def caller(x):
        return negated((x,))

    @njit(nogil=True)
    def _part(given, start, stop):
        given[0][start:stop] = negated((1,))

    task = task_of(_part)

    @njit(nogil=True)
    def loop(pool, ends, y):
        in_parts(pool, ends, task((y, y)))
        return True

    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda of: printed.append(of.exc_value))
    with pytest.raises(RuntimeError, match=r"_negated was not compiled"):
        caller(1)
    assert "returns int64, not bool" in str(printed[0])
    with pytest.raises(TypeError, match=r"returns int64, not bool"):
        in_parts_of_python(loop, 1, np.array([0, 4]), np.zeros(4))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_negated, "compile", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_parts_of_python(loop, 1, np.array([0, 4]), np.zeros(4))
    del not_compiled[:]
