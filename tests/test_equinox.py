"""Equinox models with quantized weights: what their layers compute, and what is trained beside them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("equinox", reason="equinox is not installed: requirements-dev.txt has it")

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, QArray, dequantize_tree
from aqt_lite.equinox import QuantizedConv, QuantizedConvTranspose, QuantizedEmbedding, QuantizedLinear, plan, quantize
from aqt_lite.jax import combine, partition
from aqt_lite.testing import assert_same_bits

KEY = jax.random.key(0)
INT4 = {"dtype": "int4", "granularity": PerGroup(8)}
X = jnp.asarray(np.random.default_rng(0).standard_normal((18, 16)).astype(np.float32))
IMAGE = jnp.asarray(np.random.default_rng(0).standard_normal((4, 6, 8)).astype(np.float32))


def assert_close(y, expected):
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2e-5, atol=2e-5 * abs(expected).max())


@eqx.filter_jit
def mapped(model, x):
    return jax.vmap(lambda row: model(row))(x)


LAYERS = {
    "Linear": (eqx.nn.Linear(16, 6, key=KEY), X, eqx.nn.Linear),
    "Linear to a scalar": (eqx.nn.Linear(16, "scalar", key=KEY), X, eqx.nn.Linear),
    "Embedding": (eqx.nn.Embedding(50, 16, key=KEY), jnp.arange(0, 50, 3), QuantizedEmbedding),
    "Conv1d": (eqx.nn.Conv1d(4, 6, 3, padding=1, key=KEY), IMAGE.swapaxes(0, 1), QuantizedConv),
    "Conv2d": (eqx.nn.Conv2d(4, 6, 3, padding="SAME", groups=2, key=KEY), IMAGE[None], QuantizedConv),
    "Conv2d, circular": (
        eqx.nn.Conv2d(4, 6, 3, padding=1, padding_mode="CIRCULAR", use_bias=False, key=KEY),
        IMAGE[None],
        QuantizedConv,
    ),
    "Conv2d of patches": (eqx.nn.Conv2d(4, 6, 2, stride=2, key=KEY), IMAGE[None], QuantizedConv),
    "ConvTranspose2d": (eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, key=KEY), IMAGE[None], QuantizedConvTranspose),
    "LSTMCell": (eqx.nn.LSTMCell(16, 8, key=KEY), X, eqx.nn.LSTMCell),
    "GRUCell": (eqx.nn.GRUCell(16, 8, key=KEY), X, eqx.nn.GRUCell),
}


QUICK = ("Linear", "Embedding", "Conv2d", "Conv2d of patches", "LSTMCell")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in LAYERS]
)
def test_layers_compute_with_the_values_of_their_weights(name):
    layer, x, kind = LAYERS[name]
    small = quantize(layer)
    assert type(small) is kind
    assert isinstance(small, type(layer).__mro__[1] if "Conv" in name else type(layer))
    weights = [leaf for leaf in jax.tree.leaves(small, is_leaf=lambda a: isinstance(a, QArray)) if leaf is not None]
    quantized = [leaf for leaf in weights if isinstance(leaf, QArray)]
    assert len(quantized) == (2 if "Cell" in name else 1)
    assert {q.granularity for q in quantized} <= {PerChannel(0)}
    states = {"LSTMCell": (jnp.ones(8), jnp.ones(8)), "GRUCell": jnp.ones(8)}
    if name in states:
        expected = jax.vmap(lambda row: dequantize_tree(small)(row, states[name]))(x)
        y = mapped(lambda row: small(row, states[name]), x)
        assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-5), y, expected))
    else:
        assert_close(mapped(small, x), mapped(dequantize_tree(small), x))


def test_the_kernel_of_patches_stays_quantized():
    small = quantize(LAYERS["Conv2d of patches"][0])
    program = jax.jit(lambda layer, x: layer(x)).lower(small, IMAGE).as_text()
    assert "stablehlo.convolution" not in program
    with pytest.raises(ValueError, match="needs to have rank 3"):
        small(IMAGE[None])


class Model(eqx.Module):
    embed: eqx.nn.Embedding
    attention: eqx.nn.MultiheadAttention
    norm: eqx.nn.LayerNorm
    mlp: eqx.nn.MLP
    own: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(50, 16, key=keys[0])
        self.attention = eqx.nn.MultiheadAttention(4, 16, use_output_bias=True, key=keys[1])
        self.norm = eqx.nn.LayerNorm((7, 16))
        self.mlp = eqx.nn.MLP(16, 10, 32, 1, key=keys[2])
        self.own = jax.random.normal(keys[3], (16, 16))

    def __call__(self, ids):
        x = jax.vmap(self.embed)(ids)
        x = self.norm(x + self.attention(x, x, x))
        return jax.vmap(self.mlp)(x @ self.own)


IDS = jnp.asarray([[3, 49, 7, 0, 1, 2, 3], [0, 7, 3, 1, 1, 8, 9], [5] * 7])
RULES = [("*/query_proj/*", None), ("own", {"layout": "dense"}), ("embed/*", {}), ("*", INT4)]


def test_a_model_in_three_lines():
    model = Model(KEY)
    assert "attention/key_proj/weight" in str(plan(eqx.filter_eval_shape(Model, KEY), RULES))
    small = quantize(model, RULES)
    assert isinstance(model.embed.weight, jax.Array)
    assert isinstance(small.attention.query_proj.weight, jax.Array)
    assert isinstance(small.norm.weight, jax.Array)
    assert small.mlp.layers[0].weight.granularity == PerGroup(8)
    assert small.own.transposed
    assert_close(mapped(eqx.filter_checkpoint(small), IDS), mapped(dequantize_tree(small), IDS))
    assert isinstance(quantize(model).own, jax.Array)


def test_a_model_without_layers_to_quantize_is_told_of():
    with pytest.warns(UserWarning, match=r"nothing was quantized; of 2 arrays the largest is '(weight|bias)' of shape"):
        quantize(eqx.nn.LayerNorm(4))


def test_rows_outside_the_table():
    small = quantize(eqx.nn.Embedding(50, 16, key=KEY))
    plain = dequantize_tree(small)
    ids = jnp.asarray([0, -1, 49, 70, -60])
    assert_same_bits(mapped(small, ids), mapped(plain, ids))  # clipped by JAX
    assert_same_bits(small(3), plain(3))
    with pytest.raises(ValueError, match="scalar index"):
        small(ids)
    with pytest.raises(IndexError, match="index 70 is out of range"):
        small(70)


def test_weights_are_exchanged_by_tree_at():
    """Without the helper: ``weight @ x`` is all that Linear asks of its weight."""
    layer = eqx.nn.Linear(16, 6, key=KEY)
    q = aqt_lite.quantize(layer.weight, granularity=PerChannel(0))
    small = eqx.tree_at(lambda layer: layer.weight, layer, q)
    assert_close(mapped(small, X), mapped(dequantize_tree(small), X))
    assert_same_bits(quantize(layer).weight, q)


@pytest.mark.exhaustive  # compiles; test_nnx has one
def test_layers_of_a_scan():
    blocks = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 16, key=key))(jax.random.split(KEY, 3))

    @eqx.filter_jit
    def run(blocks, x):
        dynamic, static = eqx.partition(blocks, eqx.is_array)
        return jax.lax.scan(lambda x, d: (jnp.tanh(jax.vmap(eqx.combine(d, static))(x)), None), x, dynamic)[0]

    small = quantize(blocks, [("*", INT4)])
    assert small.weight.shape == (3, 16, 16)
    assert small.bias is blocks.bias
    assert_close(run(small, X), run(dequantize_tree(small), X))
    assert quantize(blocks).weight.granularity == PerBlock((1, 1, -1))


@pytest.mark.exhaustive_where(trainable=True)  # each compiles for a quarter of a minute
@pytest.mark.parametrize("trainable", [False, True])
def test_filter_grad_trains_no_scales_unless_asked(trainable):
    small = quantize(eqx.nn.MLP(16, 4, 8, 1, key=KEY))
    small = eqx.tree_at(
        lambda m: [layer.weight for layer in m.layers],
        small,
        [layer.weight.with_trainable_scales(trainable) for layer in small.layers],
        is_leaf=lambda node: isinstance(node, QArray),
    )
    grads = eqx.filter_jit(eqx.filter_grad(lambda model: (jax.vmap(model)(X) ** 2).sum()))(small)
    assert grads.layers[0].weight.storage is None
    assert np.any(grads.layers[0].bias)
    for layer in grads.layers:
        assert bool(np.any(layer.weight.scale)) == trainable
    updates, _ = optax.adam(0.1).update(grads, optax.adam(0.1).init(eqx.filter(small, eqx.is_inexact_array)))
    after = eqx.apply_updates(small, updates)
    moved = [np.any(a.weight.scale != b.weight.scale) for a, b in zip(after.layers, small.layers, strict=True)]
    assert moved == [trainable] * 2
    trained, rest = partition(small)
    assert (trained.layers[0].weight.scale is not None) == trainable
    assert_same_bits(mapped(combine(trained, rest), X), mapped(small, X))


def test_weights_that_were_shared_stay_shared():
    a, b = (eqx.nn.Linear(16, 16, key=KEY) for _ in range(2))
    model = eqx.nn.Sequential([a, eqx.tree_at(lambda layer: layer.weight, b, a.weight)])
    small = quantize(model)
    assert small.layers[0].weight is small.layers[1].weight
    with pytest.raises(ValueError, match="are one array, but there is rule 1"):
        quantize(model, [("layers/0/weight", {})])


def test_activations_of_8_bits():
    layer = eqx.nn.Linear(16, 6, key=KEY)
    small = quantize(layer, [("weight", {"activations": "int8"})])
    assert type(small) is QuantizedLinear
    rows = aqt_lite.quantize(X, granularity=PerGroup(16))
    assert_same_bits(mapped(small, X), aqt_lite.linear(rows, small.weight, small.bias))
    dx = jax.grad(lambda x: small(x).sum())(X[0])
    assert_close(dx, small.weight.dequantize().sum(0))
    assert_close(small(X[0]), mapped(small, X)[0])


def test_what_is_refused():
    class Mine(eqx.nn.Conv1d):
        pass

    conv = Mine(4, 6, 3, key=KEY)
    with pytest.raises(ValueError, match="it is the weight of a Mine, a subclass that may use it in other ways"):
        quantize(conv, [("*", {})])
    with pytest.warns(UserWarning, match="nothing was quantized.*it is the weight of a Mine"):
        assert quantize(conv).weight is conv.weight
    with pytest.raises(ValueError, match="this is the weight of Embedding"):
        quantize(eqx.nn.Embedding(5, 4, key=KEY), [("*", {"activations": "int8"})])
    with pytest.raises(ValueError, match="this is the weight of no layer"):
        quantize(Model(KEY), [("own", {"layout": "dense", "activations": "int8"})])
    with pytest.raises(ValueError, match="matches no leaf of two dimensions"):
        quantize(eqx.nn.Conv1d(4, 6, 3, key=KEY), [("bias", {})])
    with pytest.raises(ValueError, match="it is no weight of a product"):
        quantize(eqx.nn.Conv1d(4, 6, 3, key=KEY), [("bias", {"layout": None})])
    turned = eqx.tree_at(lambda layer: layer.weight, eqx.nn.Linear(16, 6, key=KEY), jnp.ones((6, 3, 16)))
    with pytest.raises(ValueError, match=r"has shape \(6, 3, 16\), and its Linear was made with \(6, 16\)"):
        quantize(turned, [("weight", {})])
    with pytest.raises(TypeError, match="neither an array nor a tree"):
        quantize("a model")


def test_arguments_of_other_libraries_are_named():
    for function in (quantize, plan):
        with pytest.raises(TypeError, match=r"has no argument 'bits': use rules=.* with dtype='int4'"):
            function(None, bits=4)
