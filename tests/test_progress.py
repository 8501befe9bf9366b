"""Progress: who asks is told, in order, up to the end; a bar is drawn on a terminal alone."""

from __future__ import annotations

import io
import itertools
import sys

import dask
import dask.array as da
import numpy as np
import pytest

import aqt_lite
from aqt_lite import cf
from aqt_lite.testing import assert_same_bits

X = np.random.default_rng(0).standard_normal((1500, 1000)).astype("float32")
Q, Q4 = aqt_lite.quantize(X), aqt_lite.quantize(X[:, :992], "int4", granularity=aqt_lite.PerGroup(32))
CALLS = [
    lambda: aqt_lite.quantize(X),
    lambda: aqt_lite.quantize(X, "mxfp4"),
    lambda: aqt_lite.quantize(X, out=np.empty(X.shape, "i1")),
    lambda: aqt_lite.quantize(X, max_abs_err=0.1),
    lambda: Q.dequantize(),
    lambda: aqt_lite.error_report(X, Q),
    lambda: aqt_lite.bitround(X, 5),
    lambda: aqt_lite.keepbits_for(X, max_rel_err=0.01),
    lambda: aqt_lite.linear(X[:8, :992], Q4),
    lambda: aqt_lite.linear(X[:8, :992], Q4, mode="reproducible"),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_every_pass_is_told_to_its_end(number):
    seen = []
    with aqt_lite.progress(lambda done, of: seen.append((done, of))):
        result = CALLS[number]()
    wanted = CALLS[number]()
    if isinstance(result, np.ndarray | aqt_lite.QArray):
        assert_same_bits(result, wanted)
    else:
        assert result == wanted
    starts = [0, *(i + 1 for i, (done, of) in enumerate(seen) if done == of)]
    assert starts[-1] == len(seen), "a pass that did not end"
    assert len(seen) >= 5
    for start, stop in itertools.pairwise(starts):
        done = [d for d, _ in seen[start:stop]]
        assert done == sorted(done)
    before = len(seen)
    CALLS[number]()
    assert len(seen) == before, "it is told no longer"


def test_chunks_of_dask_are_told():
    x = da.from_array(X[:90, :90], chunks=(30, 45))
    for scheduler in ("synchronous", "threads"):
        seen: list[tuple[int, int]] = []
        with dask.config.set(scheduler=scheduler), aqt_lite.progress(lambda *told, seen=seen: seen.append(told)):
            cf.choose_packing(x, max_abs_err=0.1)
            aqt_lite.keepbits_for(x, max_rel_err=0.01)
        assert seen == [(n, 6) for n in range(1, 7)] * (len(seen) // 6)
        assert len(seen) >= 18


def test_what_a_callback_raises_ends_the_call():
    def stop(done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), aqt_lite.progress(stop):
        aqt_lite.quantize(X)
    with pytest.raises(TypeError, match="callback is a int"), aqt_lite.progress(3):
        pass


def test_a_bar_on_a_terminal_alone(monkeypatch):
    for terminal in (True, False):
        stream = io.StringIO()
        stream.isatty = lambda terminal=terminal: terminal
        monkeypatch.setattr(sys, "stderr", stream)
        with aqt_lite.progress():
            aqt_lite.quantize(X)
        drawn = stream.getvalue()
        assert drawn.endswith("#] 100%\n") if terminal else drawn == ""
