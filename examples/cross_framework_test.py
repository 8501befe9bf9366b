"""What to test when a quantized model moves from torch to JAX: the same codes, and the same output bits.

    pytest examples/cross_framework_test.py

A tolerance wide enough for another order of summation also lets real mistakes pass: another rounding, another code
range. With exact results there is nothing to tolerate, and a bit that differs is a mistake.
"""

from __future__ import annotations

import numpy as np
import pytest

import aqt_lite
from aqt_lite import PerChannel, PerGroup, PerTensor
from aqt_lite.testing import assert_same_bits

jax = pytest.importorskip("jax")
torch = pytest.importorskip("torch")

GRANULARITIES = [PerTensor(), PerChannel(0), PerGroup(32), PerGroup(48)]  # 48 leaves a shorter last group


@pytest.fixture(scope="module")
def model():
    """What is ported: two layers of torch, weights of shape (out, in)."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)).requires_grad_(
        False
    )


@pytest.fixture(scope="module")
def inputs():
    return np.random.default_rng(0).normal(size=(32, 256)).astype(np.float32)


def in_torch(model, x, granularity, mode):
    """The original: quantized and run in torch."""
    for layer in model:
        if isinstance(layer, torch.nn.Linear):
            w = aqt_lite.quantize(layer.weight, granularity=granularity)
            x = aqt_lite.linear(x, w, layer.bias, mode=mode)
        else:
            x = layer(x)
    return x


def in_jax(params, x, granularity, mode):
    """The port: quantized and run in JAX, with weights of shape (in, out) as is usual there, so transposed."""
    for i, (kernel, bias) in enumerate(params):
        if i:
            x = jax.nn.relu(x)
        w = aqt_lite.quantize(kernel, granularity=transposed(granularity))
        x = aqt_lite.dense(x, w, bias, mode=mode)
    return x


def transposed(granularity):
    if isinstance(granularity, PerChannel):
        return PerChannel(1 - granularity.axis)
    return PerGroup(granularity.size, axis=0) if isinstance(granularity, PerGroup) else granularity


@pytest.fixture(scope="module")
def params(model):
    layers = [layer for layer in model if isinstance(layer, torch.nn.Linear)]
    return [(jax.numpy.asarray(layer.weight.numpy().T), jax.numpy.asarray(layer.bias.numpy())) for layer in layers]


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_same_codes(model, granularity, scheme):
    weight = model[0].weight
    original = aqt_lite.quantize(weight, scheme=scheme, granularity=granularity)
    ported = aqt_lite.quantize(weight, scheme=scheme, granularity=granularity, backend="jax")
    assert_same_bits(ported, original)
    assert_same_bits(ported.dequantize(), original.dequantize())


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_same_outputs(model, params, inputs, granularity, jit):
    original = in_torch(model, torch.from_numpy(inputs), granularity, "reproducible")
    ported = jax.jit(in_jax, static_argnums=(2, 3)) if jit else in_jax
    assert_same_bits(ported(params, jax.numpy.asarray(inputs), granularity, "reproducible"), original)


def test_fast_mode_is_close(model, params, inputs):
    """The fast mode promises the accuracy of a float32 product, not its bits."""
    original = in_torch(model, torch.from_numpy(inputs), PerChannel(0), "fast")
    ported = in_jax(params, jax.numpy.asarray(inputs), PerChannel(0), "fast")
    np.testing.assert_allclose(ported, original.numpy(), rtol=1e-4, atol=1e-5)


def test_quantized_once_and_moved(model, params, inputs):
    """Or quantize in one framework and move the codes: nothing changes on the way."""
    q = aqt_lite.quantize(model[0].weight, granularity=PerChannel(0))
    assert_same_bits(q.to_backend("jax").to_backend("numpy").to_backend("torch"), q)
    x, bias = torch.from_numpy(inputs), model[0].bias
    original = aqt_lite.linear(x, q, bias, mode="reproducible")
    ported = aqt_lite.linear(jax.numpy.asarray(inputs), q.to_backend("jax"), params[0][1], mode="reproducible")
    assert_same_bits(ported, original)


def test_another_convention_is_found(model):
    """A port that spreads 255 codes over the range where the original spreads 254: close enough for any tolerance."""
    weight = model[0].weight.numpy()
    original = aqt_lite.quantize(weight)
    ported = aqt_lite.quantize(weight, scale=float(np.abs(weight).max() / 127.5))
    np.testing.assert_allclose(ported.dequantize(), original.dequantize(), atol=1e-3)
    with pytest.raises(AssertionError, match="elements differ"):
        assert_same_bits(ported, original)
