"""Flax Linen models with quantized parameters: what their layers compute, under Linen's transformations as well."""

from __future__ import annotations

import functools

import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed: requirements-dev.txt has it")

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, QArray, dequantize_tree
from aqt_lite.backends.jax import combine, partition
from aqt_lite.linen import plan, quantize, with_quantized_layers
from aqt_lite.testing import assert_same_bits

INT4 = {"dtype": "int4", "granularity": PerGroup(8)}
# more rows than those for which XLA has to compile a second form of each product
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 16)).astype(np.float32))
IDS = jnp.asarray(np.arange(20).reshape(4, 5) * 7 % 50)


def assert_close(y, expected):
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    expected = np.asarray(expected, np.float64)
    rounding = 2e-5 if y.dtype == np.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=rounding, atol=rounding * abs(expected).max())


def made(model, *args, **kwargs):
    """Variables, with numbers of NumPy's: JAX would compile a generator for each shape."""
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *args, **kwargs))
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.map(lambda a: jnp.asarray(0.3 * draw(a.shape), a.dtype), shapes)


def check(model, variables, *args, **kwargs):
    """Quantized parameters give what their values give; returns the former."""
    apply = jax.jit(with_quantized_layers(functools.partial(model.apply, **kwargs)))
    y = apply(variables, *args)
    assert_close(y, jax.jit(functools.partial(model.apply, **kwargs))(dequantize_tree(variables), *args))
    return y


LAYERS = {
    "Dense": (functools.partial(nn.Dense, 6), PerChannel(1)),
    "Dense, no bias": (functools.partial(nn.Dense, 6, use_bias=False), PerChannel(1)),
    "DenseGeneral": (functools.partial(nn.DenseGeneral, (4, 2)), PerBlock((-1, 1, 1))),
    "DenseGeneral, two axes": (functools.partial(nn.DenseGeneral, 6, axis=(1, -1)), PerChannel(2)),
    "DenseGeneral, batched": (functools.partial(nn.DenseGeneral, 6, batch_dims=(0,)), PerBlock((1, -1, 1))),
    "Einsum": (functools.partial(nn.Einsum, (16, 4, 2), "bti,ihd->bthd"), PerBlock((-1, 1, 1))),
    "Einsum with dots": (functools.partial(nn.Einsum, (16, 4, 2), "...i,ihd->h...d"), PerBlock((-1, 1, 1))),
    "Conv": (functools.partial(nn.Conv, 6, (3,)), PerChannel(2)),
    "Conv of patches": (functools.partial(nn.Conv, 6, (2,), strides=2), PerChannel(2)),
    "Conv, circular, in groups": (
        functools.partial(nn.Conv, 6, (3,), padding="CIRCULAR", feature_group_count=2),
        PerChannel(2),
    ),
    "ConvLocal": (functools.partial(nn.ConvLocal, 6, (3,)), PerBlock((1, -1, 1))),
    "ConvTranspose": (functools.partial(nn.ConvTranspose, 6, (3,), strides=(2,)), PerChannel(2)),
    "ConvTranspose, transposed": (functools.partial(nn.ConvTranspose, 6, (3,), transpose_kernel=True), PerChannel(1)),
}


QUICK = ("Dense", "DenseGeneral, two axes", "Einsum with dots", "Conv of patches", "ConvTranspose")
every_layer = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in LAYERS]
)


@every_layer
def test_layers_compute_with_the_values_of_their_kernels(name):
    make, granularity = LAYERS[name]
    layer = make()
    variables = made(layer, X)
    small = quantize(layer, variables, X)
    q = small["params"]["kernel"]
    assert q.granularity == granularity
    assert_same_bits(q.qvalue, aqt_lite.quantize(variables["params"]["kernel"], granularity=granularity).qvalue)
    assert small["params"].get("bias") is variables["params"].get("bias")
    check(layer, small, X)


@pytest.mark.parametrize(
    "name", ["Dense", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in LAYERS if n != "Dense")]
)
def test_layers_compute_in_few_bits(name):
    half = LAYERS[name][0](dtype=jnp.bfloat16)
    assert check(half, quantize(half, made(half, X), X), X).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("Conv")])
def test_groups_run_along_the_inputs(name):
    layer = LAYERS[name][0]()
    small = quantize(layer, made(layer, X), X, rules=[("kernel", INT4)])
    q = small["params"]["kernel"]
    assert q.scale.size == q.size // 8
    runs = {"DenseGeneral": (1, 2), "DenseGeneral, two axes": (2, 1), "Einsum": (1, 2), "Einsum with dots": (1, 2)}
    assert q.transposed == runs.get(name, True)
    assert q.packed_length == 16
    check(layer, small, X)


def test_an_einsum_that_is_said_when_called():
    layer = nn.Einsum((16, 6))
    small = quantize(layer, made(layer, X, "bti,io->bto"), X, "bti,io->bto")
    assert small["params"]["kernel"].granularity == PerChannel(1)
    y = with_quantized_layers(layer.apply)(small, X, "bti,io->bto")
    assert_close(y, layer.apply(dequantize_tree(small), X, "bti,io->bto"))


def test_an_embedding_looks_up_rows():
    class Tied(nn.Module):
        def setup(self):
            self.embed = nn.Embed(50, 16)

        def __call__(self, ids):
            return self.embed.attend(self.embed(ids))

        def rows(self, ids):
            return self.embed(ids)

    model = Tied()
    small = quantize(model, made(model, IDS), IDS, rules=[("embed/embedding", INT4)])
    assert small["params"]["embed"]["embedding"].granularity == PerGroup(8)
    check(model, small, IDS)
    program = jax.jit(with_quantized_layers(functools.partial(model.apply, method="rows")))
    assert_same_bits(program(small, IDS), model.apply(dequantize_tree(small), IDS, method="rows"))
    assert "50x16xf32" not in program.lower(small, IDS).as_text()
    with pytest.raises(ValueError, match="Input type must be an integer"):
        program(small, X)


# ---- models


class Block(nn.Module):
    width: int = 16

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
        return x + nn.Dense(self.width)(nn.relu(nn.Dense(2 * self.width)(x))), None


class Model(nn.Module):
    layers: int = 0
    remat: bool = False

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(50, 16)
        x = embed(ids)
        block = nn.remat(Block) if self.remat else Block
        if self.layers:
            block = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        return embed.attend(block(name="block")(x)[0])


RULES = [("*/query/kernel", None), ("*/embedding", {}), ("*kernel", INT4)]


@pytest.mark.parametrize(
    "settings",
    [{"layers": 2, "remat": True}, *(pytest.param(s, marks=pytest.mark.exhaustive) for s in ({}, {"layers": 3}))],
    ids=str,
)
def test_a_model_in_three_lines(settings):
    model = Model(**settings)
    variables = made(model, IDS)
    small = quantize(model, variables, IDS, rules=RULES)
    apply = jax.jit(with_quantized_layers(model.apply))
    assert_close(apply(small, IDS), jax.jit(model.apply)(dequantize_tree(small), IDS))
    block = small["params"]["block"]
    assert isinstance(block["MultiHeadDotProductAttention_0"]["query"]["kernel"], jax.Array)
    kernel = block["Dense_1"]["kernel"]
    assert kernel.shape == ((settings["layers"],) if "layers" in settings else ()) + (16, 32)
    assert kernel.transposed
    leaves = jax.tree.leaves(small, is_leaf=lambda leaf: isinstance(leaf, QArray))
    assert sum(isinstance(leaf, QArray) for leaf in leaves) == 6
    assert "block/Dense_1/kernel" in str(plan(model, jax.eval_shape(lambda: variables), IDS, rules=RULES))


def test_without_rules_every_kernel_of_known_layers():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(6)(x @ self.param("kernel", nn.initializers.ones, (16, 16)))

    model = Own()
    small = quantize(model, made(model, X), X)
    assert isinstance(small["params"]["kernel"], jax.Array)
    assert isinstance(small["params"]["Dense_0"]["kernel"], QArray)
    check(model, small, X)
    with pytest.raises(ValueError, match=r"kernel cannot be quantized.*no Dense, DenseGeneral.* uses it"):
        quantize(model, made(model, X), X, rules=[("kernel", {})])


def test_other_collections_and_arguments():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
            return nn.Dense(6)(nn.Dropout(0.5, deterministic=not train)(x))

    model = Net()
    variables = jax.tree.map(jnp.abs, made(model, X, train=False))
    small = quantize(model, variables, X, train=True, rngs={"dropout": jax.random.key(1)}, mutable=["batch_stats"])
    assert small["batch_stats"] is variables["batch_stats"]
    check(model, small, X, train=False)
    train = functools.partial(model.apply, train=True, mutable=["batch_stats"])
    y, changed = jax.jit(with_quantized_layers(train))(small, X, rngs={"dropout": jax.random.key(1)})
    assert y.shape == (3, 6, 6)
    assert list(changed) == ["batch_stats"]


def test_subclasses_are_served_where_they_call_the_layer():
    class Scaled(nn.Dense):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = Scaled(6)
    small = quantize(model, made(model, X), X)
    check(model, small, X)


def test_a_dense_that_is_transformed_itself():
    model = nn.remat(nn.Dense)(6)
    small = quantize(model, made(model, X), X)
    assert isinstance(small["params"]["kernel"], QArray)
    check(model, small, X)


def test_through_a_file(tmp_path):
    model = nn.Sequential([nn.Embed(50, 16), nn.DenseGeneral((4, 8)), nn.DenseGeneral(6, axis=(-2, -1))])
    small = quantize(model, made(model, IDS), IDS, rules=[("*", INT4)])
    aqt_lite.save(tmp_path / "model.safetensors", small)
    again = aqt_lite.load(tmp_path / "model.safetensors", backend="jax")
    assert jax.tree.structure(again) == jax.tree.structure(small)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(small)))
    apply = jax.jit(with_quantized_layers(model.apply))
    assert_same_bits(apply(again, IDS), apply(small, IDS))


def test_through_bytes_of_flax():
    """flax.serialization: every bit, and no template of another kind."""
    model = nn.Sequential([nn.Embed(50, 16), nn.DenseGeneral((4, 8)), nn.DenseGeneral(6, axis=(-2, -1))])
    rules = [("layers_0/*", {"dtype": "nvfp4"}), ("layers_1/*", INT4), ("*", {"scheme": "affine"})]
    variables = made(model, IDS)
    small = quantize(model, variables, IDS, rules=rules)
    data = flax.serialization.to_bytes(small)
    again = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, small), data)
    assert jax.tree.structure(again) == jax.tree.structure(small)
    assert all(map(np.array_equal, jax.tree.leaves(again), jax.tree.leaves(small)))
    apply = jax.jit(with_quantized_layers(model.apply))
    assert_same_bits(apply(again, IDS), apply(small, IDS))
    assert len(data) < 1.3 * sum(leaf.nbytes for leaf in jax.tree.leaves(small)) + 3 * 400
    others = [
        ([("layers_1/*", {**INT4, "dtype": "nf4"}), *rules], "layers_1/kernel: .* dtype int4 and nf4"),
        (
            [("layers_1/*", {**INT4, "granularity": PerGroup(4)}), *rules],
            "layers_1/kernel: .* block .8, 1, 1. and .4, 1, 1.",
        ),
        ([("layers_2/*", {}), *rules], "layers_2/kernel: the template has no zero_point"),
        ([("layers_0/*", {"dtype": "mxfp4"}), *rules], "layers_0/embedding: .* dtype nvfp4 and mxfp4"),
    ]
    for changed, words in others:
        template = quantize(model, variables, IDS, rules=changed[:1] + [r for r in rules if r[0] != changed[0][0]])
        with pytest.raises(ValueError, match=words):
            flax.serialization.from_bytes(template, data)
    with pytest.raises(ValueError, match=r"the template is a QArray, .* and the state has a ndarray there"):
        flax.serialization.from_bytes(small, flax.serialization.to_bytes(variables))
    kernel = small["params"]["layers_1"]["kernel"]
    plain = {
        "w": jax.tree.map(
            jnp.asarray, aqt_lite.quantize(np.asarray(kernel.dequantize()), "int4", granularity=PerGroup(8, 0))
        )
    }
    with pytest.raises(ValueError, match=r"transposed .1, 2. and False"):
        flax.serialization.from_bytes(plain, flax.serialization.to_bytes({"w": kernel}))


def test_training_beside():
    model = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(6)])
    small = quantize(model, made(model, X), X, rules=[("layers_0/*", {})])
    trained, rest = partition(small)
    assert len(jax.tree.leaves(trained)) == 3
    apply, optimizer = with_quantized_layers(model.apply), optax.adamw(0.05)

    @jax.jit
    def step(trained, state):
        loss, grads = jax.value_and_grad(lambda t: (apply(combine(t, rest), X) ** 2).mean())(trained)
        updates, state = optimizer.update(grads, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    state, losses = optimizer.init(trained), []
    for _ in range(5):
        trained, state, loss = step(trained, state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]


def test_activations_of_8_bits():
    model = nn.Sequential([nn.DenseGeneral((4, 2)), nn.DenseGeneral(6, axis=(-2, -1))])
    rules = [("layers_1/*", {"activations": "int8"}), ("*", {})]
    variables = made(model, X)
    small = quantize(model, variables, X, rules=rules)
    y, plain = (with_quantized_layers(model.apply, r)(small, X) for r in (rules, None))
    h = nn.DenseGeneral((4, 2)).apply({"params": dequantize_tree(small["params"]["layers_0"])}, X)
    q = small["params"]["layers_1"]
    rows = aqt_lite.quantize(h.reshape(18, 8), granularity=PerGroup(8))
    matrix = aqt_lite.quantize(variables["params"]["layers_1"]["kernel"].reshape(8, 6), granularity=PerChannel(1))
    assert_close(y, (aqt_lite.dense(rows, matrix) + q["bias"]).reshape(3, 6, 6))
    assert 0 < np.abs(y - plain).max() < 0.02 * np.abs(plain).max()
    with pytest.raises(ValueError, match="this is the weight of Embed"):
        quantize(nn.Embed(50, 8), made(nn.Embed(50, 8), IDS), IDS, rules=[("*", {"activations": "int8"})])


def test_rules_pass_by_what_is_added():
    model = Model(layers=3)
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), IDS))
    planned = {p.leaf.path: p for p in plan(model, variables, IDS, rules=[("*", {})]).plans}
    scale = planned["block/LayerNorm_0/scale"]
    assert scale.arguments is None
    assert scale.leaf.array.shape == (3, 16)
    assert planned["block/Dense_0/kernel"].arguments == {"granularity": PerBlock((1, -1, 1))}


# ---- what is refused

REFUSED = {
    "mask": (nn.Conv(6, (3,), mask=jnp.ones((3, 16, 6))), "its Conv has a mask"),
    "dot_general": (nn.Dense(6, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k)), "has a dot_general"),
    "promote_dtype": (nn.Dense(6, promote_dtype=lambda *a, dtype: a), "its Dense has a promote_dtype of its own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_could_not_use_it(name):
    layer, message = REFUSED[name]
    variables = made(layer, X)
    with pytest.raises(ValueError, match=message):
        quantize(layer, variables, X, rules=[("*", {})])
    with pytest.warns(UserWarning, match=f"nothing was quantized; .*{message}"):
        assert isinstance(quantize(layer, variables, X)["params"]["kernel"], jax.Array)
    q = aqt_lite.quantize(variables["params"]["kernel"])
    with pytest.raises(ValueError, match="has a quantized parameter, but its"):
        with_quantized_layers(layer.apply)({"params": {**variables["params"], "kernel": q}}, X)


NORMS = {
    "WeightNorm": (lambda: nn.WeightNorm(nn.Dense(6)), {}),
    "SpectralNorm": (lambda: nn.SpectralNorm(nn.Dense(6)), {"update_stats": False}),
}


@pytest.mark.parametrize("name", NORMS)
def test_layers_whose_kernel_is_made_anew_at_each_call(name):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, **how):
            return nn.Dense(4)(NORMS[name][0]()(x, **how))

    how = NORMS[name][1]
    model, variables = Model(), made(Model(), X, **how)
    table = plan(model, variables, X, **how)
    refused = [str(row.leaf.path) for row in table.plans if row.leaf.why_not.startswith("it is inside")]
    assert refused
    for path in refused:
        with pytest.raises(ValueError, match=f"{path} cannot be quantized: it is inside {name}, which"):
            quantize(model, variables, X, rules=[(path, {})], **how)
    small = quantize(model, variables, X, **how)  # what it can have
    assert [type(a) for a in jax.tree.leaves(small, is_leaf=lambda a: isinstance(a, QArray))].count(QArray) == 1
    assert with_quantized_layers(model.apply)(small, X, **how).shape == (3, 6, 4)
    by_hand = {**variables, "params": aqt_lite.quantize_tree(variables["params"], [(refused[0], {})])}
    with pytest.raises(ValueError, match=f"has a quantized parameter, but it is inside {name}"):
        with_quantized_layers(model.apply)(by_hand, X, **how)


class Doubled(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.map_variables(nn.Dense, "params", lambda p: jax.tree.map(lambda a: 2 * a, p), init=True)
        return layer(6)(x)


class DoubledStatistics(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.map_variables(nn.Dense, "batch_stats", lambda p: jax.tree.map(lambda a: 2 * a, p), init=True)
        return layer(6)(x)


def test_parameters_that_a_function_maps_are_left_alone_or_refused():
    """It would double codes, as int8, and scales, too."""
    model, variables = Doubled(), made(Doubled(), X)
    (name,) = variables["params"]
    with pytest.warns(UserWarning, match="nothing was quantized; .* it is inside nn.map_variables"):
        assert isinstance(quantize(model, variables, X)["params"][name]["kernel"], jax.Array)
    with pytest.raises(ValueError, match=r"kernel cannot be quantized.*: it is inside nn.map_variables"):
        quantize(model, variables, X, rules=[("*", {})])
    kernel = aqt_lite.quantize(variables["params"][name]["kernel"], granularity=PerChannel(1))
    by_hand = {"params": {name: {**variables["params"][name], "kernel": kernel}}}
    for apply in (with_quantized_layers(model.apply), jax.jit(with_quantized_layers(model.apply))):
        with pytest.raises(ValueError, match=f"{name} has a quantized parameter, but it is inside nn.map_variables"):
            apply(by_hand, X)
    model = DoubledStatistics()
    check(model, quantize(model, made(model, X), X), X)


@pytest.mark.parametrize("shared", [False, True])
def test_layers_under_vmap_and_jit(shared):
    class Many(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"variable_axes": {"params": None if shared else 0}, "split_rngs": {"params": not shared}}
            return nn.jit(nn.Dense)(4)(nn.vmap(nn.DenseGeneral, in_axes=0, **axes)((4, 2)).__call__(x).reshape(3, 6, 8))

    model = Many()
    small = quantize(model, made(model, X), X, rules=[("*kernel", INT4)])
    kernels = [q for q in jax.tree.leaves(small, is_leaf=lambda a: isinstance(a, QArray)) if isinstance(q, QArray)]
    assert sorted(q.shape for q in kernels) == sorted([(8, 4), (16, 4, 2) if shared else (3, 16, 4, 2)])
    check(model, small, X)


def test_boxes_stay_around_what_they_hold():
    """Names of axes for partitioning, which Flax keeps around parameters."""
    named = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Sequential([nn.Dense(8, kernel_init=named), nn.Dense(6)])
    variables = made(model, X)
    assert "layers_0/kernel  " in str(plan(model, variables, X, rules=[("*/kernel", INT4)]))
    small = quantize(model, variables, X, rules=[("*/kernel", INT4)])
    box = small["params"]["layers_0"]["kernel"]
    assert isinstance(box, nn.Partitioned)
    assert box.names == ("in", "out")
    assert_same_bits(
        box.value,
        aqt_lite.quantize(
            variables["params"]["layers_0"]["kernel"].value, "int4", granularity=PerGroup(8, 0)
        ).for_dense(),
    )
    y = jax.jit(with_quantized_layers(model.apply))(small, X)
    assert_close(y, jax.jit(model.apply)(dequantize_tree(nn.meta.unbox(small)), X))


def test_shapes_will_do_as_arguments():
    model, shape = nn.Dense(6), jax.ShapeDtypeStruct(X.shape, X.dtype)
    variables = made(model, X)
    assert_same_bits(
        quantize(model, variables, shape)["params"]["kernel"], quantize(model, variables, X)["params"]["kernel"]
    )


def test_layers_along_another_axis():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            step = nn.scan(
                lambda dense, x, _: (dense(x), None), variable_axes={"params": 1}, split_rngs={"params": True}, length=3
            )
            return step(nn.Dense(16), x, None)[0]

    model = Stack()
    with pytest.raises(ValueError, match=r"has shape \(16, 3, 16\), and its Dense uses \(16, 16\)"):
        quantize(model, made(model, X), X, rules=[("*kernel", {})])


def test_frozen_variables_stay_frozen():
    frozen = flax.core.freeze(made(nn.Dense(6), X))
    small = quantize(nn.Dense(6), frozen, X)
    assert type(small) is type(frozen)
    check(nn.Dense(6), small, X)


def test_what_makes_no_sense():
    model = nn.Dense(6)
    variables = made(model, X)
    with pytest.raises(TypeError, match="no collection 'params'"):
        quantize(model, variables["params"], X)
    with pytest.raises(ValueError, match="its layer says what its axes are for"):
        quantize(model, variables, X, rules=[("kernel", {"layout": "linear"})])
    with pytest.raises(ValueError, match="matches no leaf"):
        quantize(model, variables, X, rules=[("params/kernel", {})])
    with pytest.raises(TypeError, match="variables has kernel quantized already"):
        quantize(model, quantize(model, variables, X), X)
    with pytest.raises(TypeError, match="there is no 'activation': did you mean 'activations'"):
        with_quantized_layers(model.apply, [("*", {"activation": "int8"})])
    with pytest.raises(TypeError, match=r"and a QArray .*layers of a model take it"):  # without with_quantized_layers
        model.apply({"params": {"kernel": aqt_lite.quantize(variables["params"]["kernel"]), "bias": X[0, 0, :6]}}, X)


def test_arguments_that_are_for_rules_are_named():
    with pytest.raises(TypeError, match=r"has no argument 'bits': use rules=.* with dtype='int4'"):
        with_quantized_layers(None, bits=4)
    model = nn.Dense(6)
    variables = made(model, X)
    for function in (quantize, plan):
        for name, way in (("bits", "dtype='int4'"), ("granularity", "granularity=$"), ("group_size", "granularity=")):
            with pytest.raises(TypeError, match=rf"^Dense has no argument '{name}': use rules=.* with {way}"):
                function(model, variables, X, **{name: 4})
        with pytest.raises(TypeError, match="unexpected keyword argument 'deterministic'"):  # a model's own
            function(model, variables, X, deterministic=True)


class Masked(nn.Module):
    @nn.compact
    def __call__(self, x, mask=None):
        return nn.Dense(6)(x if mask is None else x * mask)


def test_arguments_of_a_model_may_have_names_of_specs():
    model = Masked()
    variables = made(model, X)
    found = quantize(model, variables, X, mask=X > 0)
    assert isinstance(found["params"]["Dense_0"]["kernel"], aqt_lite.QArray)
