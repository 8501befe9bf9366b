"""QArrays and every public function under JAX's transformations: the bits of the eager call, and right derivatives."""

from __future__ import annotations

import json
import logging
import operator
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from optional import torch

import aqt_lite
from aqt_lite import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QArray,
    choose_qparams,
    dense,
    dequantize,
    fake_quantize,
    linear,
    quantize,
)
from aqt_lite.testing import assert_same_bits

GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(-1),
    PerGroup(4),
    PerGroup(3),
    PerGroup(2, axis=0),
    PerBlock((2, 3)),
]
few_granularities = pytest.mark.exhaustive_unless(granularity=GRANULARITIES[1::4])  # a second each
FORMS = [("int8", "symmetric"), ("uint8", "symmetric"), ("int8", "affine"), ("uint16", "affine")]


def data(*shape, seed=0):
    """Values of both signs whose blocks differ in range."""
    rng = np.random.default_rng(seed)
    return jnp.asarray((rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, shape)).astype(np.float32))


X = data(6, 8)
LAYERS = data(4, 6, 8, seed=1)


def calibrated(dtype, scheme, granularity):
    return lambda x: quantize(x, dtype, scheme=scheme, granularity=granularity)


# ---- jit


@pytest.mark.exhaustive_where(dtype="uint8")  # int8 and uint16 are of its kind
@pytest.mark.exhaustive_unless(granularity=GRANULARITIES[::3])
@pytest.mark.parametrize(("dtype", "scheme"), FORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_jit_gives_the_bits_of_the_eager_call(granularity, dtype, scheme):
    settings = {"dtype": dtype, "scheme": scheme, "granularity": granularity}

    def everything(x):
        q = quantize(x, **settings)
        return q, dequantize(q), fake_quantize(x, **settings), choose_qparams(x, **settings)

    jitted, eager = jax.jit(everything)(X), everything(X)
    assert_same_bits(jitted[0], eager[0])
    for got, expected in zip(jax.tree.leaves(jitted[1:]), jax.tree.leaves(eager[1:]), strict=True):
        assert_same_bits(got, expected)
    assert_same_bits(jax.jit(dequantize)(eager[0]), eager[1])  # as an argument
    assert_same_bits(jax.jit(lambda: dequantize(eager[0]))(), eager[1])  # as a constant


def test_a_given_scale_may_be_traced():
    given = {"scale": jnp.full((6, 1), 0.25), "zero_point": jnp.full((6, 1), 3), "granularity": PerChannel(0)}
    eager = quantize(X, **given, on_clip="saturate")
    jitted = jax.jit(lambda x, s, z: quantize(x, scale=s, zero_point=z, granularity=PerChannel(0)))
    assert_same_bits(jitted(X, jnp.full((6, 1), 0.25), jnp.full((6, 1), 3)), eager)
    assert_same_bits(jitted(X, jnp.full((6,), 0.25), jnp.full((6,), 3)), eager)
    bad = jitted(X, jnp.full((6,), 0.25).at[2].set(-1.0), jnp.full((6,), 3).at[4].set(300))
    assert np.isnan(dequantize(bad)).all(axis=1).tolist() == [False, False, True, False, True, False]


@pytest.mark.exhaustive_where(product=linear, with_bias=False)
@pytest.mark.exhaustive_where(product=dense, with_bias=True)
@pytest.mark.parametrize("mode", ["fast", "reproducible"])
@pytest.mark.parametrize("product", [dense, linear])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_under_jit(product, mode, with_bias):
    x = data(5, 8, seed=2)
    w = quantize(
        data(8, 7, seed=3) if product is dense else data(7, 8, seed=3),
        granularity=PerGroup(4, 0 if product is dense else 1),
    )
    bias = data(7, seed=4) if with_bias else None
    eager = product(x, w, bias, mode=mode)
    as_argument = jax.jit(lambda x, w, b: product(x, w, b, mode=mode))(x, w, bias)
    as_constant = jax.jit(lambda x: product(x, w, bias, mode=mode))(x)
    values = np.asarray(dequantize(w if product is dense else w.T), np.float64)
    exact = np.asarray(x, np.float64) @ values
    exact = exact if bias is None else exact + np.asarray(bias, np.float64)
    magnitude = np.abs(np.asarray(x, np.float64)) @ np.abs(values)
    for got in (eager, as_argument, as_constant):
        assert (np.abs(got - exact) <= magnitude * 1e-6 + np.abs(exact) * 1e-6).all()
        if mode == "reproducible":
            assert_same_bits(got, eager)


def test_two_quantized_sides_under_jit():
    x, w = quantize(data(5, 8), granularity=PerChannel(0)), quantize(X, scheme="affine", granularity=PerChannel(0))
    assert_same_bits(jax.jit(linear)(x, w), linear(x, w))


def test_non_finite_blocks_are_nan_under_jit_and_no_others():
    x = X.at[1, 2].set(jnp.nan).at[4, 0].set(-jnp.inf)
    for scheme in ("symmetric", "affine"):
        q = jax.jit(calibrated("int8", scheme, PerChannel(0)))(x)
        bad = [False, True, False, False, True, False]
        assert np.isnan(q.scale).ravel().tolist() == bad
        assert np.isnan(dequantize(q)).all(axis=1).tolist() == bad
        assert np.isnan(dequantize(q)).any(axis=1).tolist() == bad
        fine = quantize(X, scheme=scheme, granularity=PerChannel(0))
        assert_same_bits(q.qvalue[jnp.asarray([0, 2, 3, 5])], fine.qvalue[jnp.asarray([0, 2, 3, 5])])
    ignoring = jax.jit(lambda x: dequantize(quantize(x, granularity=PerChannel(0), nonfinite="ignore")))(x)
    assert np.isfinite(ignoring).all()
    assert ignoring[1, 2] == 0


def test_numpy_qarray_enters_jit_where_jax_came_after():
    program = """
        import json, sys
        import numpy as np
        import aqt_lite
        assert "jax" not in sys.modules
        x = np.linspace(-2, 3, 24, dtype=np.float32).reshape(4, 6)
        q = aqt_lite.quantize(x, scheme="affine", granularity=aqt_lite.PerChannel(0))
        import jax
        y = jax.jit(lambda q: q.dequantize())(q)
        leaves = len(jax.tree_util.tree_leaves(q))
        print(json.dumps([leaves, type(y).__module__, bool(np.array_equal(np.asarray(y), q.dequantize()))]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    leaves, module, same = json.loads(done.stdout)
    assert (leaves, module.partition(".")[0], same) == (4, "jaxlib", True)


def test_numpy_qarray_and_jax_x_meet_inside_jit_but_not_outside():
    q = quantize(np.asarray(X))
    assert_same_bits(jax.jit(linear)(X, q), jax.jit(linear)(X, q.to_backend("jax")))
    with pytest.raises(TypeError, match="x is a jax array but w is a numpy QArray"):
        linear(X, q)


# ---- vmap, scan, shard_map


@few_granularities
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_vmap_over_layers(granularity):
    one = calibrated("int8", "affine", granularity)
    stacked = jax.vmap(one)(LAYERS)
    assert isinstance(stacked, QArray)
    assert stacked.shape == (4, 6, 8)
    values = jax.vmap(dequantize)(stacked)
    for i in range(4):
        alone = one(LAYERS[i])
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], stacked)
        assert_same_bits(layer, alone)
        assert_same_bits(stacked[i], alone)
        assert_same_bits(values[i], dequantize(alone))
    assert_same_bits(dequantize(stacked), values)  # a leading axis that was mapped over is part of the array


def test_vmap_over_other_axes_of_x():
    q = jax.vmap(lambda v: quantize(v, granularity=PerTensor()), in_axes=1, out_axes=0)(X)
    expected = quantize(X.T, granularity=PerChannel(0))
    assert_same_bits(q.qvalue, expected.qvalue)
    assert_same_bits(q.scale[:, 0], expected.scale[:, 0])


@pytest.mark.parametrize("mode", ["fast", "reproducible"])
def test_vmap_of_products(mode):
    xs, w = data(3, 5, 8), quantize(X, granularity=PerChannel(0))
    over_x = jax.vmap(lambda x: linear(x, w, mode=mode))(xs)
    over_w = jax.vmap(lambda w: linear(xs[0], w, mode=mode))(
        jax.vmap(calibrated("int8", "symmetric", PerChannel(0)))(LAYERS)
    )
    one_w = quantize(LAYERS[2], granularity=PerChannel(0))
    if mode == "reproducible":
        assert_same_bits(over_x[1], linear(xs[1], w, mode=mode))
        assert_same_bits(over_w[2], linear(xs[0], one_w, mode=mode))
    else:
        np.testing.assert_allclose(over_x[1], linear(xs[1], w), rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(over_w[2], linear(xs[0], one_w), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(32)], ids=str)
def test_vmap_over_x_is_one_product_of_all_rows(granularity):
    """A layer that takes one vector, mapped, is not a loop of products of one row (75 times slower)."""
    w, x = quantize(data(600, 128), granularity=granularity), data(40, 128, seed=2)

    def mapped(x):
        return jax.vmap(jax.vmap(lambda row: linear(row, w)))(x.reshape(5, 8, 128)).reshape(40, 600)

    assert_same_bits(jax.jit(mapped)(x), jax.jit(lambda x: linear(x, w))(x))
    np.testing.assert_array_equal(jax.grad(lambda x: mapped(x).sum())(x), jax.grad(lambda x: linear(x, w).sum())(x))
    forward = str(jax.make_jaxpr(mapped)(x)).count("cond[")
    plain = str(jax.make_jaxpr(lambda x: linear(x, w))(x)).count("cond[")
    assert forward == plain


@pytest.mark.exhaustive_where(granularity=PerTensor())
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(3)], ids=str)
def test_scan_over_stacked_layers(granularity):
    square = data(3, 8, 8, seed=5) / 100
    layers = jax.vmap(calibrated("int8", "symmetric", granularity))(square)

    def step(h, w):
        return linear(h, w, mode="reproducible"), None

    scanned, _ = jax.lax.scan(step, jnp.ones((2, 8)), layers)
    h = jnp.ones((2, 8))
    for i in range(3):
        h, _ = step(h, quantize(square[i], granularity=granularity))
    assert_same_bits(scanned, h)


def test_scan_can_stack_qarrays_as_results():
    _, stacked = jax.lax.scan(lambda carry, x: (carry, quantize(x, granularity=PerGroup(4))), 0, LAYERS)
    assert_same_bits(stacked[3], quantize(LAYERS[3], granularity=PerGroup(4)))
    assert stacked.shape == (4, 6, 8)


def test_shard_map():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(AxisType.Auto,))
    rows = PartitionSpec("rows")
    inside = jax.shard_map(calibrated("int8", "affine", PerGroup(4)), mesh=mesh, in_specs=rows, out_specs=rows)
    q = quantize(X, scheme="affine", granularity=PerGroup(4))
    assert_same_bits(inside(X), q)
    for mode in ("fast", "reproducible"):
        product = jax.shard_map(
            lambda x, w, mode=mode: linear(x, w, mode=mode), mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows
        )
        assert_same_bits(product(X, q), linear(X, q, mode=mode))


# ---- derivatives


@pytest.mark.parametrize("compile_", [False, True])
def test_straight_through_gradient_is_that_of_torch(compile_):
    x = np.linspace(-3, 3, 401, dtype=np.float32)
    upstream = np.linspace(1, 2, 401, dtype=np.float32)
    for scale, zero_point in [(0.01, 0), (0.02, 60), (0.013, -100)]:

        def loss(v, scale=scale, zero_point=zero_point):
            return (fake_quantize(v, scale=scale, zero_point=zero_point) * upstream).sum()

        derivative = jax.jit(jax.grad(loss)) if compile_ else jax.grad(loss)
        t = torch.asarray(x).requires_grad_()
        y = torch.fake_quantize_per_tensor_affine(t, scale, zero_point, -128, 127)
        (y * torch.asarray(upstream)).sum().backward()
        assert_same_bits(derivative(jnp.asarray(x)), t.grad)


@few_granularities
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_calibrated_fake_quantize_is_the_identity_to_gradients(granularity):
    upstream = data(6, 8, seed=7)
    gradient = jax.grad(lambda v: (fake_quantize(v, granularity=granularity) * upstream).sum())(X)
    assert_same_bits(gradient, upstream)
    assert_same_bits(
        jax.grad(jax.checkpoint(lambda v: (fake_quantize(v, granularity=granularity) * upstream).sum()))(X), upstream
    )
    value, tangent = jax.jvp(lambda v: fake_quantize(v, granularity=granularity), (X,), (upstream,))
    assert_same_bits(value, fake_quantize(X, granularity=granularity))
    assert_same_bits(tangent, upstream)


def test_nothing_flows_into_scales_or_through_quantize():
    assert (jax.grad(lambda v: dequantize(quantize(v)).sum())(X) == 0).all()
    assert jax.grad(lambda s: fake_quantize(X, scale=s).sum())(jnp.float32(0.5)) == 0


@few_granularities
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_gradient_of_dequantize_with_respect_to_scale(granularity):
    constant = quantize(X, scheme="affine", granularity=granularity)
    q = constant.with_trainable_scales()
    upstream = data(6, 8, seed=7)
    assert not jax.grad(lambda q: (dequantize(q) * upstream).sum(), allow_int=True)(constant).scale.any()
    gradient = jax.grad(lambda q: (dequantize(q) * upstream).sum(), allow_int=True)(q)
    steps = np.asarray(q.qvalue, np.float64) - np.asarray(spread(q.zero_point, q), np.float64)
    expected = np.zeros(q.scale.shape)
    np.add.at(expected, block_index(q), steps * np.asarray(upstream, np.float64))
    np.testing.assert_allclose(gradient.scale, expected, rtol=1e-4, atol=1e-2)
    assert gradient.storage.dtype == jax.dtypes.float0


def block_index(q):
    """Index arrays that send every element to its block."""
    return tuple(
        np.broadcast_to(
            (np.arange(n) * g // n if b is None else np.arange(n) // b).reshape(
                [-1 if d == a else 1 for d in range(q.ndim)]
            ),
            q.shape,
        )
        for a, (n, g, b) in enumerate(zip(q.shape, q.scale.shape, q.block, strict=True))
    )


def spread(blocks, q):
    return np.asarray(blocks)[block_index(q)]


@pytest.mark.parametrize("mode", ["fast", "reproducible"])
@pytest.mark.parametrize("compile_", [False, True])
def test_gradients_of_products_are_those_of_the_dequantized_weight(mode, compile_):
    x, bias, upstream = data(5, 8, seed=2), jnp.zeros(6), data(5, 6, seed=8)
    w = quantize(X, scheme="affine", granularity=PerGroup(4)).with_trainable_scales()

    def quantized(x, w, bias):
        return (linear(x, w, bias, mode=mode) * upstream).sum()

    def plain(x, w, bias):
        return ((x @ dequantize(w).T + bias) * upstream).sum()

    derivative = jax.grad(quantized, argnums=(0, 1, 2), allow_int=True)
    got = (jax.jit(derivative) if compile_ else derivative)(x, w, bias)
    expected = jax.grad(plain, argnums=(0, 1, 2), allow_int=True)(x, w, bias)
    size = np.abs(upstream).sum() * np.abs(X).max()
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-4, atol=1e-6 * size)
    np.testing.assert_allclose(got[1].scale, expected[1].scale, rtol=1e-3, atol=1e-4 * np.abs(expected[1].scale).max())
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-5)
    assert (got[2] != 0).all()  # a bias of zeros, too, must be able to learn


def test_gradients_of_two_quantized_sides():
    x, w = (quantize(v, granularity=PerChannel(0)).with_trainable_scales() for v in (data(5, 8), X))
    bias = jnp.zeros(6)
    got = jax.grad(lambda *a: linear(*a).sum(), argnums=(0, 1, 2), allow_int=True)(x, w, bias)
    expected = jax.grad(lambda x, w, b: (dequantize(x) @ dequantize(w).T + b).sum(), argnums=(0, 1, 2), allow_int=True)(
        x, w, bias
    )
    for g, e in ((got[0].scale, expected[0].scale), (got[1].scale, expected[1].scale), (got[2], expected[2])):
        np.testing.assert_allclose(g, e, rtol=1e-3, atol=1e-3 * np.abs(e).max())
        assert (e != 0).any()


def test_gradient_through_scan_and_checkpoint():
    layers = jax.vmap(quantize)(data(3, 8, 8, seed=5) / 100)

    def loss(h, remat):
        def step(h, w):
            return jnp.tanh(linear(h, w)), None

        return jax.lax.scan(jax.checkpoint(step) if remat else step, h, layers)[0].sum()

    h = data(2, 8, seed=6) / 100
    plain, saved = (jax.grad(loss)(h, remat) for remat in (False, True))
    np.testing.assert_allclose(plain, saved, rtol=1e-5, atol=1e-6)
    assert np.abs(plain).max() > 0


# ---- trees and shapes


def test_tree_of_leaves_paths_and_structure():
    q = quantize(X, "uint8", granularity=PerChannel(0))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"layer": q})]
    assert paths == ["['layer'].storage", "['layer'].scale", "['layer'].zero_point", "['layer'].mark"]
    assert len(jax.tree.leaves(quantize(X))) == 3  # no zero point, no leaf
    same = jax.tree.structure(quantize(X + 1, "uint8", granularity=PerChannel(0)))
    assert jax.tree.structure(q) == same
    assert hash(jax.tree.structure(q)) == hash(same)
    assert jax.tree.structure(q) != jax.tree.structure(quantize(X, "uint8", granularity=PerChannel(1)))
    doubled = jax.tree.map(lambda a: a * 2 if a.dtype == jnp.float32 else a, q)
    assert_same_bits(dequantize(doubled), dequantize(q) * 2)


def test_a_qarray_does_not_recompile_for_new_values():
    compiled = []

    @jax.jit
    def f(q):
        compiled.append(None)
        return q.dequantize()

    f(quantize(X))
    f(quantize(X * 2))
    assert len(compiled) == 1
    f(quantize(X, granularity=PerChannel(0)))
    assert len(compiled) == 2


def test_eval_shape_runs_nothing():
    q = jax.eval_shape(
        lambda x: quantize(x, scheme="affine", granularity=PerGroup(4)), jax.ShapeDtypeStruct((6, 10), "bfloat16")
    )
    assert (q.shape, q.scale.shape, q.zero_point.dtype, q.float_dtype) == ((6, 10), (6, 3), jnp.int32, "bfloat16")
    assert "ShapeDtypeStruct" in repr(q)
    y = jax.eval_shape(linear, jax.ShapeDtypeStruct((2, 10), "float32"), q)
    assert (y.shape, y.dtype) == ((2, 6), jnp.float32)


@pytest.mark.parametrize("home", ["jax", "numpy"])
def test_functions_of_jax_numpy_name_the_way(home):
    q = quantize(X).to_backend(home)
    calls = (
        jnp.asarray,
        jnp.array,
        jnp.sum,
        jnp.copy,
        jnp.linalg.norm,
        jax.nn.relu,
        lambda q: jnp.array([q, q]),
        lambda q: jnp.stack([q]),
        lambda q: jnp.concatenate([X, q]),
        lambda q: jnp.dot(X, q.T),
        lambda q: jnp.matmul(q, X.T),
        lambda q: jnp.multiply(X, q),
        lambda q: jnp.einsum("ab,cb->ac", X, q),
        lambda q: jnp.power(q, 2),
        lambda q: jnp.where(True, q, 0.0),
        lambda q: jnp.take(q, 0, axis=0),
        lambda q: X.at[0].set(q),
        lambda q: X.dot(q),
        lambda q: jnp.float32(q),
        lambda q: jnp.astype(q, "float32"),
    )
    for call in calls:
        for f in (call, jax.jit(call)):
            with pytest.raises(
                TypeError, match=r"functions of jax.numpy take arrays, and a QArray \(int8.*q\.dequantize\(\)"
            ):
                f(q)
    with pytest.raises((TypeError, ValueError), match=r"jax.numpy.array\(\)|QArray"):
        jax.lax.dot(X.T, q)  # which sends to what names the way


def test_operators_of_jax_arrays_ask_the_qarray():
    q = quantize(X, granularity=PerChannel(0))
    for f in (operator.matmul, jax.jit(operator.matmul)):
        np.testing.assert_allclose(f(X.T, q), dense(X.T, q), rtol=2e-6)
    for operate in (operator.mul, operator.add, operator.sub, operator.truediv, operator.pow, operator.lt):
        for args in ((X, q), (q, X)):
            for f in (operate, jax.jit(operate)):
                with pytest.raises(TypeError, match=r"arithmetic with a QArray .*write q\.dequantize\(\)"):
                    f(*args)
    for operate in (operator.eq, operator.ne):
        with pytest.raises(TypeError, match="not compared by =="):
            operate(X, q)


def test_reshape_of_both_libraries_keeps_it_quantized():
    q = quantize(X, granularity=PerGroup(4)).packed()
    assert_same_bits(jnp.reshape(q, (2, 3, 8)), q.reshape(2, 3, 8))
    assert_same_bits(np.reshape(q, (2, 3, 8)), q.reshape(2, 3, 8))
    with pytest.raises(ValueError, match="order='F': elements are read with the last axis fastest"):
        jnp.reshape(q, (2, 3, 8), order="F")


def test_traced_qarrays_print_and_refuse_to_leave():
    seen = []

    @jax.jit
    def f(q):
        seen.append(repr(q))
        with pytest.raises(TypeError, match="inside a traced function"):
            q.to_backend("numpy")
        with pytest.raises(TypeError, match="being traced"):
            aqt_lite.error_report(X, q)
        return q

    assert_same_bits(f(quantize(X)), quantize(X))
    assert seen == ["QArray(int8, shape=(6, 8), PerTensor(), of float32, jax, traced)"]
    with pytest.raises(TypeError, match="backend='numpy': x is being traced by jax"):
        jax.jit(lambda x: quantize(x, backend="numpy"))(X)


def test_mapping_over_codes_alone_is_an_error():
    q = quantize(X, granularity=PerChannel(1))
    spread_out = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    lopsided = QArray(spread_out.storage, q.scale, None, q.dtype, q.block)
    with pytest.raises(ValueError, match="map over leading axes only"):
        dequantize(lopsided)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_floats(dtype):
    x = (X / 100).astype(dtype)
    q = jax.jit(calibrated("int8", "affine", PerGroup(4)))(x)
    assert_same_bits(q, quantize(x, scheme="affine", granularity=PerGroup(4)))
    assert q.scale.dtype == jnp.float32
    assert dequantize(q).dtype == dtype
    assert jax.grad(lambda v: fake_quantize(v).astype(jnp.float32).sum())(x).dtype == dtype


def test_float64_needs_x64():
    program = """
        import jax
        jax.config.update("jax_enable_x64", True)
        import numpy as np, aqt_lite
        from aqt_lite.testing import assert_same_bits
        x = np.random.default_rng(0).standard_normal((5, 70)) * 1e-200
        for scheme in ("symmetric", "affine"):
            q = aqt_lite.quantize(x, "int16", scheme=scheme, granularity=aqt_lite.PerGroup(32))
            j = jax.jit(lambda v: aqt_lite.quantize(v, "int16", scheme=scheme, granularity=aqt_lite.PerGroup(32)))(x)
            assert_same_bits(j, q)
            assert_same_bits(j.dequantize(), q.dequantize())
            assert_same_bits(q.to_backend("jax"), q)
        x32 = x.astype("float32") + np.float32(1)
        assert_same_bits(aqt_lite.quantize(jax.numpy.asarray(x32)), aqt_lite.quantize(x32))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True)
    with pytest.raises(ValueError, match="JAX would narrow float64 silently"):
        quantize(np.ones((2, 2)), backend="jax")


# ---- constants, exports, other processes

LARGE = data(512, 256, seed=4)  # as many elements as the CPU library takes on
LARGE_KINDS = {
    "int8": lambda x: quantize(x, granularity=PerChannel(0)),
    "int4": lambda x: quantize(x, "int4", granularity=PerGroup(32)),
    "nf4": lambda x: quantize(x, "nf4", granularity=PerGroup(32)),
    "mxfp4": lambda x: quantize(x, "mxfp4"),
}


@pytest.mark.exhaustive_unless(kind=["nf4"])
@pytest.mark.parametrize("kind", LARGE_KINDS)
def test_large_constants_inside_a_trace(kind):
    q = LARGE_KINDS[kind](LARGE)
    values = dequantize(q)
    assert_same_bits(jax.jit(lambda: dequantize(q))(), values)
    assert_same_bits(jax.jit(lambda: dequantize(LARGE_KINDS[kind](LARGE)))(), values)
    assert_same_bits(jax.lax.scan(lambda c, _: (c, dequantize(q)), 0, None, length=2)[1][1], values)
    assert_same_bits(jax.jit(lambda p: jax.lax.cond(p, lambda: dequantize(q), lambda: LARGE))(True), values)
    assert_same_bits(jax.vmap(lambda s: dequantize(q) * s)(jnp.ones(2))[1], values)
    assert jax.eval_shape(lambda: dequantize(q)).shape == LARGE.shape
    assert_same_bits(jax.export.export(jax.jit(lambda: dequantize(q)))().call(), values)
    assert jax.grad(lambda s: (dequantize(q) * s).sum())(1.0) == pytest.approx(float(values.sum()), rel=1e-3)


ROWS = data(5, 96, seed=1)
WEIGHT = data(64, 96, seed=2)
WITH_ANY_ROWS = {
    "per tensor": lambda x: quantize(x),
    "per row": lambda x: quantize(x, granularity=PerChannel(0)),
    "per column": lambda x: quantize(x, scheme="affine", granularity=PerChannel(1)),
    "groups": lambda x: quantize(x, "int4", granularity=PerGroup(32)),
    "mxfp4": lambda x: quantize(x, "mxfp4"),
    "nvfp4": lambda x: quantize(x, "nvfp4"),
    "stochastic": lambda x: quantize(x, rounding="stochastic", key=3),
    "given scale": lambda x: quantize(x, scale=0.5, granularity=PerChannel(0)),
    "fake": lambda x: fake_quantize(x, granularity=PerChannel(0)),
    "reproducible": lambda x: linear(x, LARGE_KINDS["int8"](WEIGHT), mode="reproducible"),
    "reproducible groups": lambda x: linear(x, LARGE_KINDS["int4"](WEIGHT), mode="reproducible"),
    "reproducible dense": lambda x: dense(x, LARGE_KINDS["int8"](WEIGHT).T.for_dense(), mode="reproducible"),
    "W8A8": lambda x: linear(quantize(x, granularity=PerChannel(0)), LARGE_KINDS["int8"](WEIGHT)),
    "W8A8 of one scale": lambda x: linear(quantize(x, "uint8", scheme="affine"), LARGE_KINDS["int8"](WEIGHT)),
    "reproducible large": lambda x: linear(x, quantize(data(1024, 96), granularity=PerChannel(0)), mode="reproducible"),
}


@pytest.mark.exhaustive_unless(form=["groups"])  # each compiles for a second and more
@pytest.mark.parametrize("form", WITH_ANY_ROWS)
def test_export_with_any_number_of_rows(form):
    (rows,) = jax.export.symbolic_shape("rows")
    function = jax.jit(WITH_ANY_ROWS[form])
    exported = jax.export.export(function)(jax.ShapeDtypeStruct((rows, 96), jnp.float32))
    read = jax.export.deserialize(exported.serialize())
    for x in (ROWS, ROWS[:1], jnp.concatenate([ROWS] * 5)):
        got, expected = read.call(x), function(x)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert_same_bits(a, b)


@pytest.mark.exhaustive_unless(product=["int8", "mxfp4"])
@pytest.mark.parametrize("product", ["int8", "int4", "nf4", "mxfp4"])
def test_fast_products_export_with_any_number_of_rows(product):
    (rows,) = jax.export.symbolic_shape("rows")
    w = LARGE_KINDS[product](WEIGHT)
    for function in (lambda x: linear(x, w), jax.grad(lambda x: linear(x, w).sum())):
        exported = jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct((rows, 96), jnp.float32))
        np.testing.assert_allclose(
            exported.call(ROWS), function(ROWS), rtol=1e-4, atol=1e-4 * np.abs(function(ROWS)).max()
        )


@pytest.mark.parametrize("kind", [*LARGE_KINDS, "nvfp4"])
def test_export_takes_and_gives_qarrays(kind):
    q = LARGE_KINDS.get(kind, lambda x: quantize(x, "nvfp4"))(WEIGHT)
    exported = jax.export.export(jax.jit(lambda q: (dequantize(q), q.for_dense())))(q)
    values, turned = jax.export.deserialize(exported.serialize()).call(q)
    assert_same_bits(values, dequantize(q))
    assert_same_bits(turned, q.for_dense())
    assert turned.transposed


def in_another_process(program, *arguments, **environment):
    """What a program prints."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_an_exported_format_that_is_unknown_elsewhere(tmp_path):
    aqt_lite.register_format(aqt_lite.Format("three_levels", aqt_lite.Codebook("three_levels", (-1.0, 0.0, 1.0))))
    q = quantize(WEIGHT, "three_levels", granularity=PerGroup(32))
    (tmp_path / "f").write_bytes(jax.export.export(jax.jit(dequantize))(q).serialize())
    said = in_another_process(
        """
        import pathlib, sys, jax, aqt_lite
        try:
            jax.export.deserialize(bytearray(pathlib.Path(sys.argv[1]).read_bytes()))
        except ValueError as error:
            print(error)
        """,
        tmp_path / "f",
    )
    assert "'three_levels' is not known here: register its format first" in said


@pytest.mark.exhaustive  # processes that compile
def test_an_executable_of_another_process(tmp_path):
    common = """
        import pathlib, pickle, sys
        import jax, jax.numpy as jnp, numpy as np, aqt_lite.jax
        from aqt_lite.backends.jax import register_loops
        from jax.experimental import serialize_executable
        file, x = pathlib.Path(sys.argv[1]), jnp.linspace(-1, 1, 2048).reshape(4, 512)
        w = jnp.linspace(-3, 2, 262144).reshape(512, 512)
        q = aqt_lite.quantize(w, granularity=aqt_lite.PerChannel(0))
        grouped = aqt_lite.quantize(w, "int4", granularity=aqt_lite.PerGroup(32))
        def all_kinds(x):
            products = [aqt_lite.linear(x, q, mode="reproducible")]
            products += [aqt_lite.linear(x, grouped, mode=mode) for mode in ("fast", "reproducible")]
            return *products, aqt_lite.jax.dequantize(grouped)
    """
    targets = ["fixed_point_product", "decoding_product", "group_product", "decoded_values"]
    write = f"""
        compiled = jax.jit(all_kinds).lower(x).compile()
        file.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
        print(all("aqt_lite_" + target in compiled.as_text() for target in {targets}))
    """
    read = """
        has_loops = register_loops()
        compiled = serialize_executable.deserialize_and_load(*pickle.loads(file.read_bytes()))
        for made, expected in zip(compiled(x), jax.jit(all_kinds)(x)):
            assert np.array_equal(made, expected)
        print(has_loops)
    """
    assert in_another_process(common + write, tmp_path / "f") == in_another_process(common + read, tmp_path / "f")


@pytest.mark.exhaustive  # half a minute in a process of its own
def test_without_compiled_loops():
    program = """
        import numpy as np, aqt_lite
        from aqt_lite import PerChannel, PerGroup, linear, quantize
        w = np.random.default_rng(0).standard_normal((300, 512)).astype("float32")
        results = []
        for name in ("numpy", "jax", "torch"):
            x = aqt_lite.quantize(w[:3], backend=name).dequantize()
            for granularity in (PerChannel(0), PerGroup(32)):
                q = quantize(w, granularity=granularity, backend=name)
                linear(x, q)
                for rows in (x, quantize(x, granularity=PerChannel(0))):
                    results.append(np.asarray(linear(rows, q, mode="reproducible")).tobytes())
        print(results[:4] == results[4:8] == results[8:])
    """
    assert in_another_process(program, NUMBA_DISABLE_JIT="1") == "True"


# ---- eager calls


@pytest.mark.exhaustive_where(shape=(512, 256))
@pytest.mark.parametrize("shape", [(6, 8), (512, 256)])
def test_no_transfer_that_nobody_asked_for(shape):
    x = data(*shape)
    with jax.transfer_guard("disallow"):
        for q in (
            quantize(x, granularity=PerChannel(0)),
            quantize(x, "uint4", scheme="affine", granularity=PerGroup(4)),
            quantize(x, "nf4"),
            quantize(x, "nvfp4"),
            quantize(x, scale=0.5, zero_point=3, on_clip="saturate"),
            quantize(x, rounding="stochastic", key=3),
            quantize(x, scheme="affine", offset="data"),
        ):
            dequantize(q)
            jax.jit(dequantize)(q)
            linear(x, q)
            linear(x, q, [0.5] * shape[0])
        w = quantize(x, granularity=PerChannel(0))
        linear(x, w, mode="reproducible")
        linear(w, w)
        dense(x, w.T.for_dense())
        w.take([1, 2])
        packed = quantize(x, "int4", granularity=PerGroup(4))
        _ = packed[1:3], packed[2], packed[:, 4:8], w.for_dense()[1:3]
        aqt_lite.error_report(x, packed)
        quantize(x, missing="nan").dequantize(fill_value=1.0)
        aqt_lite.stack([w, w])
        aqt_lite.concatenate([w, w])
        for dtype, scheme in (("int8", "symmetric"), ("int4", "symmetric"), ("uint8", "affine")):
            aqt_lite.convert(quantize(x, dtype, scheme=scheme), "int16")
        aqt_lite.convert(quantize(x, "mxfp4"), "int16")
        aqt_lite.convert(quantize(x, "nvfp4"), "int16", scale_dtype="float32")
        w.to_backend("numpy").to_backend("jax")
        fake_quantize(x)
        choose_qparams(x)


def test_small_eager_arrays_compile_nothing():
    arrays = [data(length, 3 * length) for length in (5, 7, 11, 13)]
    with CountCompilations() as compilations:
        for x in arrays:
            for dtype, granularity in (("int8", PerTensor()), ("int4", PerGroup(4)), ("nf4", PerChannel(0))):
                q = quantize(x, dtype, granularity=granularity)
                assert_same_bits(q, quantize(np.asarray(x), dtype, granularity=granularity))
                dequantize(q)
                q.unpacked().packed()
                fake_quantize(x, dtype, granularity=granularity)
                choose_qparams(x, dtype, granularity=granularity)
            q = quantize(x, granularity=PerChannel(0))
            assert_same_bits(aqt_lite.bitround(x, 7), aqt_lite.bitround(np.asarray(x), 7))
            for rows, mode in ((x, "reproducible"), (q, "fast"), (q, "reproducible"), (q, "integer")):
                on_numpy = (a.to_backend("numpy") if isinstance(a, QArray) else np.asarray(a) for a in (rows, q))
                assert_same_bits(linear(rows, q, mode=mode), linear(*on_numpy, mode=mode))
            for weight in (
                q,
                quantize(x, "int4", granularity=PerGroup(8)),
                quantize(x, "nf4", granularity=PerGroup(8)),
            ):
                row = np.asarray(x)[:1]
                assert_same_bits(linear(jax.device_put(row), weight), linear(row, weight.to_backend("numpy")))
            aqt_lite.error_report(x, q)
    assert compilations.count == 0


def test_small_eager_results_are_arrays_of_their_own():
    x = data(6, 8)
    scale = jnp.full((6, 1), 0.25)
    q = quantize(x, scale=scale, granularity=PerChannel(0), on_clip="saturate")
    values = dequantize(q)
    scale.delete()
    jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(x))
    assert_same_bits(dequantize(q), values)
    assert not q.scale.committed
    there = quantize(jax.device_put(data(6, 8), jax.devices()[0]))
    assert there.storage.committed
    assert dequantize(there).committed


class CountCompilations(logging.Handler):
    """How often XLA compiles."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def emit(self, record):
        self.count += "XLA compilation" in record.getMessage()

    def __enter__(self):
        self.log = logging.getLogger("jax._src.dispatch")
        self.level = self.log.level
        self.log.setLevel(logging.DEBUG)
        self.log.addHandler(self)
        return self

    def __exit__(self, *_):
        self.log.removeHandler(self)
        self.log.setLevel(self.level)
