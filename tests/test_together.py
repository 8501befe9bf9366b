"""Codes that a dialect makes together with scales: of large arrays, into memory, and in chunks as of small ones."""

from __future__ import annotations

import dask.array as da
import numpy as np
import pytest
from optional import torch

import aqt_lite
from aqt_lite import PerChannel, PerGroup, affine, quantize
from aqt_lite.api import _prepare
from aqt_lite.backends.cpu.runtime import LARGE
from aqt_lite.dialects import DIALECTS
from aqt_lite.testing import assert_same_bits

WHOLE = PerChannel(0)
CASES = [
    ("torchao", "nvfp4", {}),
    ("torchao_no_tensor_scale", "nvfp4", {}),
    ("compressed-tensors", "nvfp4", {}),
    ("qwix", "nvfp4", {}),
    ("qwix", "mxfp4", {}),
    ("qwix", "mxfp8_e4m3", {}),
    ("qwix", "nf4", {"granularity": PerGroup(32)}),
    ("torchao_tinygemm", "int4", {"offset": "data", "granularity": PerGroup(32)}),
    ("bitsandbytes", "int8", {"granularity": WHOLE}),
    ("bitsandbytes", "nf4", {"granularity": PerGroup(64)}),
    ("bitsandbytes", "bnb_fp4", {"granularity": PerGroup(64)}),
    ("modelopt", "nvfp4", {}),
]
RNG = np.random.default_rng(0)
X = RNG.integers(-64, 65, (LARGE // 64 + 1, 64)).astype("float32")  # ties, and values beside them
X[::2] /= 3
X *= 2.0 ** RNG.integers(-9, 9, (len(X), 1)).astype("float32")
X[5] = 0


def test_every_such_rule_is_here():
    there = set()
    for name, rules in DIALECTS.items():
        for dtype in aqt_lite.formats.FORMATS:
            form = aqt_lite.formats.format_of(dtype)
            known = (rules.symmetric, rules.affine, rules.offsets)
            if rules.for_format(form).together is not None and any(k is None or dtype in k for k in known):
                there.add((name, dtype))
    of_bits = {("torchao_tinygemm", f"int{bits}") for bits in range(2, 9)}  # one rule
    assert there - of_bits == {(name, dtype) for name, dtype, _ in CASES} - of_bits


@pytest.mark.parametrize(("dialect", "dtype", "how"), CASES, ids=str)
def test_large_arrays_and_memory_that_exists(dialect, dtype, how, monkeypatch):
    call = _prepare(X, dtype, dialect=dialect, scheme="symmetric", **how)
    with np.errstate(all="ignore"):
        wanted = affine.quantize(X, spec=call.spec, recipe=call.recipe, b=call.b)  # the rule itself, on all of it
    q = quantize(X, dtype, dialect=dialect, **how)
    assert_same_bits(q, aqt_lite.QArray._of(wanted, call.spec))
    if not (dtype == "nvfp4" and isinstance(q.scale.scale, np.ndarray)):
        assert_same_bits(quantize(X[:64], dtype, dialect=dialect, **how).qvalue, q.qvalue[:64])
    out = np.full(q.storage.shape, 77, q.storage.dtype)
    into = quantize(X, dtype, dialect=dialect, out=out, **how)
    assert into.storage is out
    assert_same_bits(into, q)
    monkeypatch.setattr(aqt_lite.api, "_MOST_UNPACKED", 0)
    assert_same_bits(quantize(X, dtype, dialect=dialect, **how), q)
    assert_same_bits(aqt_lite.fake_quantize(X, dtype, dialect=dialect, **how), q.dequantize())
    if torch is not None:
        there = quantize(torch.from_numpy(X), dtype, dialect=dialect, **how)
        assert_same_bits(there.to_backend("numpy"), q)


def test_values_that_do_not_fit_are_counted_by_the_same_rule():
    x = X[:4].copy()
    x[1, 3] = 1e6  # beyond 6 * 448, where there is no scale of the tensor
    scales = quantize(x, "nvfp4", dialect="torchao_no_tensor_scale").scales
    beyond = abs(x * np.repeat(np.float32(1) / scales, 16, 1)) > 6
    first, out = np.argwhere(beyond)[0], np.full((4, 32), 77, "uint8")
    for memory in (None, out):
        with pytest.raises(
            ValueError, match=rf"x has {beyond.sum()} values of 256 beyond .*index .{first[0]}, {first[1]}"
        ):
            quantize(x, "nvfp4", dialect="torchao_no_tensor_scale", on_clip="raise", out=memory)
    assert (out == 77).all()


@pytest.mark.parametrize(
    ("dialect", "dtype", "how"),
    [
        pytest.param(*case, marks=[pytest.mark.exhaustive] * (case[0] in ("torchao", "compressed-tensors")))
        for case in CASES
    ],
    ids=str,
)  # those with a scale for the tensor make large graphs
def test_arrays_of_dask(dialect, dtype, how):
    x = X[:20, :32]
    q = quantize(da.from_array(x, chunks=(20, 20)), dtype, dialect=dialect, **how)
    assert_same_bits(q.to_backend("numpy"), quantize(x, dtype, dialect=dialect, **how))
