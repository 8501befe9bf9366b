"""One model, trained on handwritten digits, in every framework: quantized in three lines each, to the same codes.

The first layer is a convolution with a window as large as the image where a framework has one, and a matrix in NumPy;
its codes are the same numbers in another order of axes.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed: requirements-dev.txt has it")
pytest.importorskip("equinox", reason="equinox is not installed: requirements-dev.txt has it")

import equinox as eqx
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from optional import torch

import aqt_lite
import aqt_lite.equinox
import aqt_lite.linen
import aqt_lite.nnx
from aqt_lite import PerGroup
from aqt_lite.testing import assert_same_bits

MARGIN = 0.01
"""Share of the images by which accuracy may fall below that of float32."""

OF_OUT = {"dtype": "int4", "granularity": PerGroup(32)}


@functools.cache
def trained():
    """Images, labels and the network in float32."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    try:
        import _digits
    finally:
        sys.path.pop(0)
    data = _digits.load()
    return data.test_images.reshape(-1, 8, 8), data.test_labels, _digits.train(data)


# ---- the model in each framework: quantized weights by name, and logits of images


def of_numpy(images, net):
    rules = [("out", OF_OUT), ("hidden", {})]
    weights = aqt_lite.quantize_tree({"hidden": net.weight1, "out": net.weight2}, rules, layout="linear")
    hidden = np.maximum(aqt_lite.linear(images.reshape(-1, 64), weights["hidden"], net.bias1), 0)
    return weights, aqt_lite.linear(hidden, weights["out"], net.bias2)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Conv(1, 64, (8, 8), strides=8, padding="VALID", rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.out(nnx.relu(self.hidden(images[..., None])[:, 0, 0]))


def of_nnx(images, net):
    model = Nnx(nnx.Rngs(0))
    model.hidden.kernel[...], model.hidden.bias[...] = net.weight1.T.reshape(8, 8, 1, 64), net.bias1
    model.out.kernel[...], model.out.bias[...] = net.weight2.T, net.bias2
    aqt_lite.nnx.quantize_(model, [("out/*", OF_OUT), ("*", {})])
    weights = {path.split("/")[0]: q for path, q in aqt_lite.nnx.quantized_weights(model).items()}
    return weights, nnx.jit(lambda model, x: model(x))(model, jnp.asarray(images))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, images):
        hidden = nn.Conv(64, (8, 8), strides=8, padding="VALID", name="hidden")(images[..., None])
        return nn.Dense(10, name="out")(nn.relu(hidden[:, 0, 0]))


def of_linen(images, net):
    hidden = {"kernel": jnp.asarray(net.weight1.T.reshape(8, 8, 1, 64)), "bias": jnp.asarray(net.bias1)}
    out = {"kernel": jnp.asarray(net.weight2.T), "bias": jnp.asarray(net.bias2)}
    variables, images = {"params": {"hidden": hidden, "out": out}}, jnp.asarray(images)
    small = aqt_lite.linen.quantize(Linen(), variables, images, rules=[("out/*", OF_OUT), ("*", {})])
    weights = {name: layer["kernel"] for name, layer in small["params"].items()}
    return weights, jax.jit(aqt_lite.linen.with_quantized_layers(Linen().apply))(small, images)


class Equinox(eqx.Module):
    hidden: eqx.nn.Conv2d
    out: eqx.nn.Linear

    def __call__(self, image):
        return self.out(jax.nn.relu(self.hidden(image[None])[:, 0, 0]))


def of_equinox(images, net):
    keys = jax.random.split(jax.random.key(0))
    model = Equinox(eqx.nn.Conv2d(1, 64, 8, stride=8, key=keys[0]), eqx.nn.Linear(64, 10, key=keys[1]))
    parts = [net.weight1.reshape(64, 1, 8, 8), net.bias1.reshape(64, 1, 1), net.weight2, net.bias2]
    model = eqx.tree_at(
        lambda m: [m.hidden.weight, m.hidden.bias, m.out.weight, m.out.bias], model, [jnp.asarray(a) for a in parts]
    )
    small = aqt_lite.equinox.quantize(model, [("out/*", OF_OUT), ("*", {})])
    weights = {"hidden": small.hidden.weight, "out": small.out.weight}
    return weights, eqx.filter_jit(lambda m, x: jax.vmap(lambda image: m(image))(x))(small, jnp.asarray(images))


def of_torch(images, net):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 64, 8, stride=8), torch.nn.Flatten(), torch.nn.ReLU(), torch.nn.Linear(64, 10)
    )
    parts = (net.weight1.reshape(64, 1, 8, 8), net.bias1, net.weight2, net.bias2)
    for parameter, values in zip(model.parameters(), parts, strict=True):
        parameter.data = torch.from_numpy(values.copy())
    aqt_lite.torch.quantize_(model, [("3.*", OF_OUT), ("*", {})])
    first, last = aqt_lite.torch.quantized_weights(model).values()
    with torch.no_grad():
        return {"hidden": first, "out": last}, model(torch.from_numpy(images)[:, None])


FRAMEWORKS = {"numpy": of_numpy, "nnx": of_nnx, "linen": of_linen, "equinox": of_equinox, "torch": of_torch}


@functools.cache
def made(framework):
    images, _, net = trained()
    return FRAMEWORKS[framework](images, net)


def as_matrices(weights):
    """Codes and scales as NumPy's, in the order (out, in) of matrices."""
    found = {}
    for name, q in weights.items():
        q = q.to_backend("numpy")
        is_dense = q.transposed or q.shape[:2] == (8, 8)
        codes, scale = (np.moveaxis(a, -1, 0) if is_dense else a for a in (q.qvalue, q.scale))
        found[name] = (codes.reshape(len(codes), -1), scale.reshape(len(codes), -1))
    return found


@pytest.mark.exhaustive_where(framework="equinox")
@pytest.mark.parametrize("framework", list(FRAMEWORKS)[1:])
def test_the_codes_are_the_same(framework, tmp_path):
    weights = made(framework)[0]
    path = tmp_path / "weights.safetensors"
    aqt_lite.save(path, weights)
    expected = as_matrices(made("numpy")[0])
    for found in (as_matrices(weights), as_matrices(aqt_lite.load(path))):
        for name in ("hidden", "out"):
            for part, of_numpy in zip(found[name], expected[name], strict=True):
                assert_same_bits(np.ascontiguousarray(part), of_numpy)


@pytest.mark.exhaustive_where(framework="nnx")  # layers that are called eagerly compile one by one
@pytest.mark.exhaustive_where(framework="equinox")
@pytest.mark.parametrize("framework", list(FRAMEWORKS)[1:])
def test_products_have_the_same_bits(framework, tmp_path):
    """Of weights that went through a file, in the framework's own library."""
    images, net = trained()[0][:32], trained()[2]
    weights, reference = made(framework)[0], made("numpy")[0]
    path = tmp_path / "weights.safetensors"
    aqt_lite.save(path, weights)
    library = weights["out"].backend
    first, last = aqt_lite.load(path, backend=library).values()

    def here(a):
        return torch.from_numpy(a) if library == "torch" else jnp.asarray(a)

    subscripts, x = ("bchw,ochw->bo", images[:, None]) if first.shape[0] == 64 else ("bhwc,hwco->bo", images[..., None])
    hidden = aqt_lite.einsum(subscripts, here(x), first, mode="reproducible")
    expected = aqt_lite.linear(images.reshape(-1, 64), reference["hidden"], mode="reproducible")
    assert_same_bits(hidden, here(expected))
    rows = np.maximum(expected + net.bias1, 0)
    product = aqt_lite.dense if last.shape == (64, 10) else aqt_lite.linear
    logits = product(here(rows), last, here(net.bias2), mode="reproducible")
    assert_same_bits(logits, here(aqt_lite.linear(rows, reference["out"], net.bias2, mode="reproducible")))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_model_reads_digits_as_well(framework):
    images, labels, net = trained()
    plain = net.logits(images.reshape(-1, 64))
    logits = np.asarray(made(framework)[1])
    np.testing.assert_allclose(logits, made("numpy")[1], atol=1e-4 * np.abs(plain).max())
    accuracy = (logits.argmax(1) == labels).mean()
    assert accuracy >= (plain.argmax(1) == labels).mean() - MARGIN > 0.95
