"""Exact products with weights of integers of a byte that lie (in, out), as they lie: the reference's bits."""

from __future__ import annotations

import numpy as np
import pytest
from optional import torch
from processors import run_without
from programs import check_dense, check_transformations
from test_dots import hard_rows
from test_rows import weight, without_kernels

from aqt_lite import PerChannel, PerGroup, PerTensor, dense, quantize
from aqt_lite.backends.cpu import fixed_point, runtime, serve
from aqt_lite.testing import assert_same_bits

LOOPS = runtime.across_loops()
needs_loops = pytest.mark.skipif(
    LOOPS is None, reason="the processor has no dot product of unsigned with signed bytes, or numba is missing"
)

KINDS = {
    "int8": {"granularity": PerChannel(1)},
    "int8, one scale": {"granularity": PerTensor()},
    "int8, zero points": {"scheme": "affine", "granularity": PerChannel(1)},
    "uint8, zero points": {"dtype": "uint8", "scheme": "affine", "granularity": PerChannel(1)},
}

SHAPES = [(397, 329), (3, 5), (2051, 64), (129, 1011), (16_387, 9), (65_536, 2)]
"""Of weights: not whole words, tiles, strips or parts, fewer columns than a tile, and the longest piece."""

CASES = [(shape, "int8") for shape in SHAPES] + [(SHAPES[0], kind) for kind in KINDS if kind != "int8"]


def counted(monkeypatch):
    """How often the form was asked."""
    calls, form = [], fixed_point._across
    monkeypatch.setattr(fixed_point, "_across", lambda *given: calls.append(1) or form(*given))
    return calls


@needs_loops
@pytest.mark.parametrize(
    ("shape", "kind"), CASES, ids=[f"{inner}x{outputs}-{kind}" for (inner, outputs), kind in CASES]
)
def test_bits_of_the_reference(kind, shape, monkeypatch):
    rng, calls = np.random.default_rng(1), counted(monkeypatch)
    q = quantize(weight(*shape), **KINDS[kind])
    x, bias = hard_rows(rng, 13, shape[0]), rng.standard_normal(shape[1]).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    for m in (1, 2, 3, 5, 13):
        found = [dense(x[i : i + m], q, bias, mode="reproducible") for i in range(0, 13, m)]
        assert_same_bits(np.concatenate(found), wanted)
    assert len(calls) == 13 + 7 + 5 + 3 + 1


@needs_loops
def test_the_largest_sums():
    """Of as many codes and digits as int32 holds the products of."""
    ones = np.ones((1, 1), np.float32)
    q = quantize(np.full((65_536, 2), 255, np.float32), "uint8", scale=ones, zero_point=np.zeros((1, 1), np.int32))
    assert (q.qvalue == 255).all()
    for entry in (np.float32(127 / 64), -np.float32(127 / 64), np.float32(-1.0039), np.float32(1 / 3)):
        x = np.full((2, 65_536), entry)
        assert_same_bits(dense(x, q, mode="reproducible"), without_kernels(dense, x, q))


@needs_loops
@pytest.mark.parametrize("kind", ["int8", "uint8, zero points"])
def test_programs_of_jax(kind):
    rng = np.random.default_rng(1)
    q = quantize(weight(397, 329), **KINDS[kind])
    x, bias = hard_rows(rng, 13, 397), rng.standard_normal(329).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    check_dense(q, x, bias, wanted, "aqt_lite_exact_in_out_product")
    check_transformations(q, x, bias, wanted)


@needs_loops
def test_torch(monkeypatch):
    rng, calls = np.random.default_rng(1), counted(monkeypatch)
    q = quantize(weight(397, 329), **KINDS["uint8, zero points"])
    x, bias = hard_rows(rng, 13, 397), rng.standard_normal(329).astype(np.float32)
    given = torch.from_numpy(x), q.to_backend("torch"), torch.from_numpy(bias)
    assert_same_bits(dense(*given, mode="reproducible"), without_kernels(dense, x, q, bias))
    assert calls


@needs_loops
def test_which_products(monkeypatch):
    """Few rows of x by weights of plain integers: others go by other forms, and have the same bits."""
    calls, x = counted(monkeypatch), weight(serve.MOST_ROWS_ACROSS + 1, 397)
    q = quantize(weight(397, 329), **KINDS["int8"])
    groups = quantize(weight(397, 329), granularity=PerGroup(32, 0))
    for given in ((x, q), (x[:3], groups), (x[:3], q.for_dense())):
        assert_same_bits(dense(*given, mode="reproducible"), without_kernels(dense, *given))
    short = quantize(weight(256, 520), **KINDS["int8"])  # whose columns are short for so many sums
    assert_same_bits(dense(x[:5, :256], short, mode="reproducible"), without_kernels(dense, x[:5, :256], short))
    assert not calls
    halves = x[1:].astype(np.float16)
    wanted = without_kernels(dense, halves.astype(np.float32), q).astype(np.float16)
    assert_same_bits(dense(halves, q, mode="reproducible"), wanted)
    turned = quantize(np.asfortranarray(weight(397, 329)), **KINDS["int8"])
    assert_same_bits(dense(x[:2], turned, mode="reproducible"), without_kernels(dense, x[:2], turned))
    assert_same_bits(dense(x[:4, :256], short, mode="reproducible"), without_kernels(dense, x[:4, :256], short))
    assert len(calls) == 3


@needs_loops
@pytest.mark.exhaustive
def test_vectors_of_256_bits():
    tests = [f"{test_bits_of_the_reference.__name__}[{shape[0]}x{shape[1]}-int8]" for shape in SHAPES]
    run_without("+no feature", __file__, tests, "runtime.across_loops().LANES == 8", also=["+prefer-256-bit"])
