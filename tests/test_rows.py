"""Weights whose codes become rows of bytes before exact products sum along them: the reference's bits, on every way."""

from __future__ import annotations

import numpy as np
import pytest
from optional import jax, jnp, torch
from test_dots import hard_rows

from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, dense, linear, quantize
from aqt_lite.backends.cpu import runtime
from aqt_lite.testing import assert_same_bits

LOOPS = runtime.whole_loops()
needs_loops = pytest.mark.skipif(
    LOOPS is None, reason="numba or vectors are missing: the reference serves, tested there"
)

IN, OUT = 397, 339
"""Of weights that are just large enough for the loops, and no multiple of anything that they do at a time."""

KINDS = {
    "int8": {"granularity": PerChannel(1)},
    "int8, one scale": {"granularity": PerTensor()},
    "uint8, zero points": {"dtype": "uint8", "scheme": "affine", "granularity": PerChannel(1)},
    "uint8, zero points, groups": {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(32, 0)},
    "int8, zero points, shared by columns": {"scheme": "affine", "granularity": PerBlock((48, 3))},
    "int8, a scale an input": {"granularity": PerChannel(0)},
    "int8, zero points, a scale an input": {"scheme": "affine", "granularity": PerChannel(0)},
    "int4": {"dtype": "int4", "granularity": PerChannel(1)},
    "int4, groups": {"dtype": "int4", "granularity": PerGroup(32, 0)},
    "int4, a scale an input": {"dtype": "int4", "granularity": PerChannel(0)},
    "uint4, zero points, groups of 7": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(7, 0)},
    "int3": {"dtype": "int3", "granularity": PerChannel(1)},
    "uint6, zero points": {"dtype": "uint6", "scheme": "affine", "granularity": PerChannel(1)},
    "e2m1, scales of 16 bits": {"dtype": "float4_e2m1fn", "granularity": PerGroup(16, 0), "scale_dtype": "bfloat16"},
    "e2m1, one scale": {"dtype": "float4_e2m1fn", "granularity": PerTensor()},
    "iq4_nl": {"dtype": "iq4_nl", "granularity": PerChannel(1)},
    "groups longer than the loops'": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(350, 0)},
}


def weight(*shape):
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, shape))).astype(np.float32)


def without_kernels(product, x, q, bias=None):
    there = q.to_backend("array_api_strict")
    b = there._backend
    with np.errstate(all="ignore"):
        bias = None if bias is None else b.asarray(bias)
        return b.to_numpy(product(b.asarray(x), there, bias, mode="reproducible"))


@needs_loops
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_out_have_the_bits_of_the_reference(kind):
    rng = np.random.default_rng(1)
    q = quantize(weight(IN, OUT), **KINDS[kind])
    x, bias = hard_rows(rng, 13, IN), rng.standard_normal(OUT).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    for m in (1, 5, 13):
        found = [dense(x[i : i + m], q, bias, mode="reproducible") for i in range(0, 13, m)]
        assert_same_bits(np.concatenate(found), wanted)
    assert_same_bits(linear(x, q.T, bias, mode="reproducible"), wanted)
    assert_same_bits(dense(x, q.for_dense(), bias, mode="reproducible"), wanted)


OF_PROGRAMS = [
    "int8",
    "uint8, zero points, groups",
    "int8, a scale an input",
    "int4",
    "uint4, zero points, groups of 7",
    "e2m1, one scale",
]


@needs_loops
@pytest.mark.parametrize("kind", OF_PROGRAMS)
def test_programs_of_jax(kind):
    rng = np.random.default_rng(1)
    q = quantize(weight(IN, OUT), **KINDS[kind])
    x, bias = hard_rows(rng, 9, IN), rng.standard_normal(OUT).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    there, x, bias = q.to_backend("jax"), jnp.asarray(x), jnp.asarray(bias)

    def product(x, q, bias):
        return dense(x, q, bias, mode="reproducible")

    assert_same_bits(product(x, there, bias), wanted)
    assert_same_bits(jax.jit(product)(x, there, bias), wanted)
    text = jax.jit(product).lower(x, there, bias).as_text()
    assert ("aqt_lite_whole_numbers" in text) == (jax.device_count() == 1)
    exported = jax.export.export(jax.jit(product))(x, there, bias)
    assert "@aqt_lite_whole_numbers" not in exported.mlir_module()
    assert_same_bits(exported.call(x, there, bias), wanted)


@needs_loops
@pytest.mark.parametrize("kind", OF_PROGRAMS)
def test_torch_eager_and_compiled(kind):
    rng = np.random.default_rng(1)
    q = quantize(weight(IN, OUT), **KINDS[kind])
    x, bias = hard_rows(rng, 9, IN), rng.standard_normal(OUT).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    there, x, bias = q.to_backend("torch"), torch.from_numpy(x), torch.from_numpy(bias)

    def product(x, q, bias):
        return dense(x, q, bias, mode="reproducible")

    assert_same_bits(product(x, there, bias), wanted)
    assert_same_bits(torch.compile(product, fullgraph=True, backend="aot_eager")(x, there, bias), wanted)
    x.requires_grad_(True)
    y = product(x, there, bias)
    assert_same_bits(y.detach(), wanted)
    y.sum().backward()
    np.testing.assert_allclose(x.grad[0], q.dequantize().sum(axis=1), rtol=1e-4, atol=1e-4)
