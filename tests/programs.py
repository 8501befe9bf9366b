"""What is asked of every reproducible product in programs of JAX."""

from __future__ import annotations

import numpy as np
from optional import jax, jnp

from aqt_lite import dense
from aqt_lite.testing import assert_same_bits


def check_dense(q, x, bias, wanted, target):
    """``dense`` of NumPy's arrays, eager, compiled and exported, has these bits; on one CPU by what XLA calls so."""
    there, x, bias = q.to_backend("jax"), jnp.asarray(x), jnp.asarray(bias)
    assert_same_bits(product(x, there, bias), wanted)
    assert_same_bits(jax.jit(product)(x, there, bias), wanted)
    assert_same_bits(jax.jit(product)(x[8:9], there, bias), wanted[8:9])
    text = jax.jit(product).lower(x, there, bias).as_text()
    assert (target in text) == (jax.device_count() == 1)
    exported = jax.export.export(jax.jit(product))(x, there, bias)
    assert "@aqt_lite" not in exported.mlir_module()
    assert_same_bits(exported.call(x, there, bias), wanted)


def check_transformations(q, x, bias, wanted):
    """The same mapped over weights, and its slope in x."""
    there, x, bias = q.to_backend("jax"), jnp.asarray(x), jnp.asarray(bias)
    weights = jax.tree.map(lambda *arrays: jnp.stack(arrays), there, there)
    mapped = jax.vmap(product, in_axes=(None, 0, None))(x, weights, bias)
    assert_same_bits(mapped, np.stack([wanted] * 2))
    slope = jax.grad(lambda x: product(x, there, bias).sum())(jnp.ones((2, q.shape[0])))
    np.testing.assert_allclose(slope[0], np.asarray(q.dequantize()).sum(axis=1), rtol=1e-4, atol=1e-4)


def product(x, q, bias):
    """The product that is checked."""
    return dense(x, q, bias, mode="reproducible")
