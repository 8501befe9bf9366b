"""Flax NNX models with quantized weights: what their layers compute, and what NNX's transformations make of them."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("flax", reason="flax is not installed: requirements-dev.txt has it")

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, QArray
from aqt_lite.backends.jax.products import decoding_loops
from aqt_lite.nnx import QuantizedEmbed, QuantizedParam, plan, quantize_, quantized_weights
from aqt_lite.testing import assert_same_bits

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated.*:DeprecationWarning:flax")

INT4 = {"dtype": "int4", "granularity": PerGroup(8)}
# more rows than those for which XLA has to compile a second form of each product
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 6, 16)).astype(np.float32))


@nnx.jit
def called(model, *args):
    """A compiled call, for which eager ones would compile each operation alone."""
    return model(*args)


def rngs(seed=0):
    return nnx.Rngs(seed)


def drawn(make):
    """What ``make`` makes, with numbers of NumPy's: JAX would compile a generator for each shape."""
    graph, state = nnx.split(nnx.eval_shape(make))
    draw = np.random.default_rng(0).standard_normal
    return nnx.merge(graph, jax.tree.map(lambda a: jnp.asarray(0.3 * draw(a.shape), a.dtype), state))


def with_values(model):
    """A copy of a quantized model with the values of its weights as parameters: what it has to compute."""
    copy = nnx.clone(model)
    for _, node in nnx.iter_graph(copy):
        for name, value in list(vars(node).items()) if isinstance(node, nnx.Module) else ():
            if isinstance(value, QuantizedParam):
                setattr(node, name, nnx.Param(value[...].dequantize()))
    return copy


def assert_close(y, expected):
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    expected = np.asarray(expected, np.float64)
    rounding = 2e-5 if y.dtype == np.float32 else 1e-2
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=rounding, atol=rounding * abs(expected).max())


LAYERS = {
    "Linear": (lambda **k: nnx.Linear(16, 6, rngs=rngs(), **k), "kernel", PerChannel(1)),
    "LinearGeneral": (lambda **k: nnx.LinearGeneral(16, (4, 2), rngs=rngs(), **k), "kernel", PerBlock((-1, 1, 1))),
    "LinearGeneral, two axes": (
        lambda **k: nnx.LinearGeneral((6, 16), 6, axis=(1, -1), rngs=rngs(), **k),
        "kernel",
        PerChannel(2),
    ),
    "LinearGeneral, batched": (
        lambda **k: nnx.LinearGeneral(16, 6, batch_axis={0: 3}, rngs=rngs(), **k),
        "kernel",
        PerBlock((1, -1, 1)),
    ),
    "Einsum": (
        lambda **k: nnx.Einsum("bti,ihd->bthd", (16, 4, 2), (4, 2), rngs=rngs(), **k),
        "kernel",
        PerBlock((-1, 1, 1)),
    ),
    "Conv": (lambda **k: nnx.Conv(16, 6, (3,), rngs=rngs(), **k), "kernel", PerChannel(2)),
    "Conv of patches": (lambda **k: nnx.Conv(16, 6, (2,), strides=2, rngs=rngs(), **k), "kernel", PerChannel(2)),
    "Conv, causal, in groups": (
        lambda **k: nnx.Conv(16, 6, (3,), padding="CAUSAL", feature_group_count=2, rngs=rngs(), **k),
        "kernel",
        PerChannel(2),
    ),
    "ConvTranspose": (lambda **k: nnx.ConvTranspose(16, 6, (3,), strides=2, rngs=rngs(), **k), "kernel", PerChannel(2)),
    "ConvTranspose, transposed": (
        lambda **k: nnx.ConvTranspose(16, 6, (3,), transpose_kernel=True, rngs=rngs(), **k),
        "kernel",
        PerChannel(1),
    ),
}


QUICK = ("Linear", "LinearGeneral, two axes", "Einsum", "Conv of patches")
every_layer = pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.exhaustive) for name in LAYERS]
)


@every_layer
def test_layers_compute_with_the_values_of_their_weights(name):
    make, weight, granularity = LAYERS[name]
    layer = drawn(make)
    kind = type(layer)
    before = layer.kernel[...]
    assert quantize_(layer) is layer
    assert type(layer) is kind
    assert isinstance(getattr(layer, weight), QuantizedParam)
    q = layer.kernel[...]
    assert q.granularity == granularity
    assert_same_bits(q.qvalue, aqt_lite.quantize(before, granularity=granularity).qvalue)
    assert_close(called(layer, X), called(with_values(layer), X))


@pytest.mark.parametrize(
    "name", ["Linear", *(pytest.param(n, marks=pytest.mark.exhaustive) for n in LAYERS if n != "Linear")]
)
def test_layers_compute_in_few_bits(name):
    half = quantize_(drawn(lambda: LAYERS[name][0](dtype=jnp.bfloat16)))
    assert_close(called(half, X), called(with_values(half), X))


@pytest.mark.parametrize("name", [name for name in LAYERS if not name.startswith("Conv")])
def test_groups_run_along_the_inputs(name):
    layer = drawn(LAYERS[name][0])
    quantize_(layer, [("kernel", INT4)])
    q = layer.kernel[...]
    assert q.dtype == "int4"
    assert q.scale.size == q.size // 8
    assert_close(called(layer, X), called(with_values(layer), X))


def test_groups_over_heads_are_those_of_the_flat_matrix():
    layer = drawn(lambda: nnx.LinearGeneral((4, 8), 6, axis=(-2, -1), rngs=rngs()))
    flat = layer.kernel[...].reshape(32, 6)
    for size in (2, 8, 16, 32):
        copy = nnx.clone(layer)
        quantize_(copy, [("kernel", {"dtype": "int4", "granularity": PerGroup(size)})])
        expected = aqt_lite.quantize(flat, "int4", granularity=PerGroup(size, 0))
        assert_same_bits(copy.kernel[...].qvalue.reshape(32, 6), expected.qvalue)
        assert_same_bits(copy.kernel[...].scale.reshape(-1, 6), expected.scale)
    with pytest.raises(ValueError, match="groups of 12 along inputs of 4 x 8 would begin inside a row of 8"):
        quantize_(layer, [("kernel", {"granularity": PerGroup(12)})])


def test_linear_layers_keep_the_fast_form():
    layer = quantize_(drawn(lambda: nnx.Linear(16, 6, rngs=rngs())), [("kernel", INT4)])
    assert layer.kernel[...].transposed
    assert layer.kernel[...].packed_length == 16
    assert layer.kernel.shape == (16, 6)
    assert_close(layer(X), aqt_lite.dense(X, layer.kernel[...], layer.bias[...]))


# ---- look-ups


def test_attention_reads_its_kernels_as_they_are_stored():
    """Codes of (in, heads, width) and (heads, width, out) lie input after input, and no product unpacks them."""
    attention = drawn(lambda: nnx.MultiHeadAttention(4, 64, decode=False, rngs=rngs()))
    quantize_(attention, [("*", {"dtype": "int4", "granularity": PerGroup(16)})])
    kernels = [getattr(attention, name).kernel[...] for name in ("query", "out")]
    assert [(q.shape, q.storage.shape, q.transposed) for q in kernels] == [
        ((64, 4, 16), (4, 16, 32), (1, 2)),
        ((4, 16, 64), (64, 4, 8), (2, 1)),
    ]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 64)).astype(np.float32))
    assert_close(called(attention, x), called(with_values(attention), x))
    if decoding_loops() is not None:  # which packed codes are handed to; else XLA's own operations decode them
        for made in (
            lambda: nnx.LinearGeneral(256, (8, 32), rngs=rngs()),
            lambda: nnx.LinearGeneral((8, 32), 256, axis=(-2, -1), rngs=rngs()),
        ):
            large = quantize_(drawn(made), [("kernel", {"dtype": "int4", "granularity": PerGroup(32)})])
            program = str(jax.make_jaxpr(lambda x, layer=large: layer(x))(jnp.ones((1, *large.in_features))))
            loops = [f"aqt_lite_{name}[" for name in ("decoding_product", "decoded_values")]
            assert sum(map(program.count, loops)) == 1
            assert "u8[256,128]" in program


def test_an_embedding_looks_up_rows():
    table = drawn(lambda: nnx.Embed(50, 16, rngs=rngs()))
    quantize_(table, [("embedding", INT4)])
    assert type(table) is QuantizedEmbed
    assert isinstance(table, nnx.Embed)
    assert table.embedding[...].granularity == PerGroup(8)
    ids = jnp.asarray([[3, 49], [0, 7]])
    plain = with_values(table)
    assert_same_bits(table(ids), plain(ids))
    program = jax.jit(lambda state, ids: nnx.merge(nnx.split(table)[0], state)(ids))
    assert_same_bits(program(nnx.state(table), ids), plain(ids))
    assert "50x16xf32" not in program.lower(nnx.state(table), ids).as_text()
    assert_close(table.attend(X), plain.attend(X))
    with pytest.raises(ValueError, match="Input type must be an integer"):
        table(X)
    half = quantize_(drawn(lambda: nnx.Embed(50, 16, dtype=jnp.bfloat16, rngs=rngs())))
    assert_same_bits(half(ids), with_values(half)(ids))
    assert half.attend(X).dtype == jnp.bfloat16
    one = quantize_(drawn(lambda: nnx.Embed(1, 16, rngs=rngs())), [("embedding", {})])
    assert_same_bits(one(jnp.asarray([0, 3])), with_values(one)(jnp.asarray([0, 3])))


# ---- models


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(x)
        return x + self.down(nnx.relu(self.up(self.norm(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(50, 16, rngs=rngs)
        self.blocks = nnx.List([Block(16, rngs) for _ in range(1)])
        self.own = nnx.Param(jax.random.normal(rngs.params(), (16, 16)))

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(x @ self.own)


IDS = jnp.asarray(np.arange(20).reshape(4, 5) * 7 % 50)
RULES = [("*/query/kernel", None), ("own", {"layout": "dense"}), ("embed/*", {}), ("*/kernel", INT4)]


def test_a_model_in_three_lines():
    model = drawn(lambda: Model(rngs()))
    planned = str(plan(model, RULES)).splitlines()
    assert [line.split()[0] for line in planned if "int4" in line][1] == "blocks/0/attention/out/kernel"
    quantize_(model, RULES)
    weights = quantized_weights(model)
    assert sorted(weights)[:4] == [f"blocks/0/{name}/kernel" for name in (
        "attention/key", "attention/out", "attention/value", "down"
    )]  # fmt: skip
    assert len(weights) == 5 + 2
    assert isinstance(model.blocks[0].attention.query.kernel, nnx.Param)
    remat = nnx.jit(nnx.remat(lambda model, ids: model(ids)))
    assert_close(remat(model, IDS), called(with_values(model), IDS))


def test_jit_without_graph_updates_returns_no_weight():
    layer = quantize_(drawn(lambda: nnx.Linear(16, 6, rngs=rngs())), [("kernel", INT4)])
    before = jax.tree.leaves(nnx.state(layer))
    step = nnx.jit(lambda layer, x: layer(x), graph_updates=False)
    assert_close(step(layer, X), layer(X))
    assert all(a is b for a, b in zip(jax.tree.leaves(nnx.state(layer)), before, strict=True))


def test_what_shows_a_model_and_what_maps_over_its_rows(capsys):
    model = quantize_(drawn(lambda: nnx.Linear(16, 6, rngs=rngs())), [("kernel", INT4)])
    nnx.display(model)
    shown = capsys.readouterr().out
    assert "QuantizedParam" in shown
    assert "int4" in shown
    mapped = nnx.vmap(lambda model, x: model(x), in_axes=(None, 0))
    assert_close(nnx.jit(mapped)(model, X), called(model, X))
    with pytest.raises(ValueError, match="Could not convert QArray"):  # as docs/models.md says, with the way
        nnx.tabulate(model, X)
    assert_close(called(model, X), called(with_values(model), X))


def test_without_rules_every_weight_of_known_layers():
    model = quantize_(drawn(lambda: Model(rngs())))
    assert len(quantized_weights(model)) == 6 + 1
    assert isinstance(model.own, nnx.Param)


def test_a_model_without_layers_to_quantize_is_told_of():
    with pytest.warns(UserWarning, match=r"nothing was quantized; of 2 arrays the largest is '(scale|bias)' of shape"):
        quantize_(nnx.LayerNorm(4, rngs=rngs()))


def test_split_merge_state_update_and_clone():
    model = quantize_(drawn(lambda: Model(rngs())), RULES)
    graph, state = nnx.split(model)
    y = called(model, IDS)
    assert_close(called(nnx.merge(graph, state), IDS), y)
    assert hash(graph) == hash(nnx.split(nnx.clone(model))[0])
    assert graph == nnx.split(nnx.clone(model))[0]
    graph, weights, rest = nnx.split(model, QuantizedParam, ...)
    assert len(jax.tree.leaves(weights, is_leaf=lambda leaf: isinstance(leaf, QArray))) == 7
    assert_close(called(nnx.merge(graph, weights, rest), IDS), y)
    other = quantize_(jax.tree.map(lambda a: -a, drawn(lambda: Model(rngs()))), RULES)
    assert np.abs(called(other, IDS) - y).max() > 0.1
    nnx.update(other, state)
    assert_close(called(other, IDS), y)


def test_through_a_file_into_a_model_made_alike(tmp_path):
    model = quantize_(drawn(lambda: Model(rngs())), RULES)
    path = tmp_path / "model.safetensors"
    aqt_lite.save(path, nnx.to_pure_dict(nnx.state(model)))
    other = quantize_(jax.tree.map(lambda a: -a, drawn(lambda: Model(rngs()))), RULES)
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, aqt_lite.load(path, like=nnx.to_pure_dict(state)))
    nnx.update(other, state)
    for path, q in quantized_weights(model).items():
        assert_same_bits(quantized_weights(other)[path], q)
    assert_same_bits(called(other, IDS), called(model, IDS))


def test_layers_of_a_scan():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stacked(rngs):
        return Block(16, rngs)

    blocks = drawn(lambda: stacked(rngs()))

    @nnx.jit
    def run(blocks, x):
        step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, blocks)

    assert quantize_(nnx.clone(blocks)).up.kernel[...].granularity == PerBlock((1, -1, 1))
    small = quantize_(nnx.clone(blocks), [("*/kernel", INT4)])
    assert small.up.kernel[...].shape == (3, 16, 32)
    assert small.up.kernel[...].transposed
    assert_close(run(small, X), run(with_values(small), X))
    with pytest.raises(ValueError, match="shares scales along axis 0"):
        quantize_(blocks, [("up/kernel", {"granularity": PerChannel(2)})])


def test_what_is_trained_are_the_parameters_that_are_left():
    model = quantize_(drawn(lambda: Model(rngs())), RULES)
    before = jax.tree.map(np.asarray, nnx.state(model))
    optimizer = nnx.Optimizer(model, optax.adamw(0.1, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: (model(IDS) ** 2).mean())(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(3)]
    assert losses[-1] < losses[0]
    after = nnx.state(model)
    for (path, old), (_, new) in zip(nnx.to_flat_state(before), nnx.to_flat_state(after), strict=True):
        moved = not all(map(np.array_equal, jax.tree.leaves(old), jax.tree.leaves(new)))
        assert moved == isinstance(old, nnx.Param), path


def test_adapters_beside_a_quantized_layer():
    layer = drawn(lambda: nnx.LoRA(16, 2, 6, base_module=nnx.Linear(16, 6, rngs=rngs()), rngs=rngs()))
    quantize_(layer)
    assert list(quantized_weights(layer)) == ["base_module/kernel"]
    grads = nnx.grad(lambda layer: (layer(X) ** 2).sum(), argnums=nnx.DiffState(0, nnx.LoRAParam))(layer)
    assert len(jax.tree.leaves(grads)) == 2
    layer = quantize_(drawn(lambda: nnx.LoRALinear(16, 6, lora_rank=2, rngs=rngs())))
    assert list(quantized_weights(layer)) == ["kernel"]
    assert_close(called(layer, X), called(with_values(layer), X))


def test_shared_layers_and_arrays_stay_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(16, 16, rngs=rngs)
            self.b = self.a
            self.c = nnx.Linear(16, 16, rngs=rngs)
            self.c.kernel = self.a.kernel
            self.d = nnx.Linear(16, 16, rngs=rngs)
            self.d.kernel = nnx.Param(self.a.kernel[...])

        def __call__(self, x):
            return self.d(self.c(self.b(self.a(x))))

    model = quantize_(Tied(rngs()))
    assert model.a is model.b
    assert model.a.kernel is model.c.kernel
    assert model.d.kernel.get_raw_value().storage is model.a.kernel.get_raw_value().storage
    assert len(quantized_weights(model)) >= 3
    assert_close(model(X), with_values(model)(X))
    with pytest.raises(ValueError, match="are one array, but there is rule 1"):
        quantize_(Tied(rngs()), [("a/kernel", {})])


def test_activations_of_8_bits():
    model = drawn(
        lambda: nnx.Sequential(
            nnx.LinearGeneral(16, (4, 2), rngs=rngs()), nnx.LinearGeneral((4, 2), 6, axis=(-2, -1), rngs=rngs())
        )
    )
    w = aqt_lite.quantize(model.layers[0].kernel[...].reshape(16, 8), granularity=PerChannel(1))
    quantize_(model, [("*/kernel", {"activations": "int8"})])
    first, last = model.layers
    assert hash(nnx.split(model)[0]) == hash(nnx.split(nnx.clone(model))[0])
    rows = aqt_lite.quantize(X, granularity=PerGroup(16))
    assert_same_bits(first(X), (aqt_lite.dense(rows, w)).reshape(3, 6, 4, 2) + first.bias[...])
    y = with_values(model)(X)
    assert 0 < np.abs(model(X) - y).max() < 0.02 * np.abs(y).max()
    dx = jax.grad(lambda x: last(x).sum())(jnp.ones((3, 4, 2)))
    assert_close(dx, jnp.broadcast_to(last.kernel[...].dequantize().sum(-1), (3, 4, 2)))
    einsum = quantize_(
        drawn(lambda: nnx.Einsum("bti,io->bto", (16, 6), rngs=rngs())), [("kernel", {"activations": "int8"})]
    )
    assert 0 < np.abs(einsum(X) - with_values(einsum)(X)).max() < 0.1


def test_rules_pass_by_what_is_added():
    """Biases of heads, and those of several layers, have two axes, and are no weights all the same."""
    model = drawn(lambda: nnx.vmap(lambda rngs: Block(16, rngs), in_axes=0)(rngs().split(3)))
    quantize_(model, [("*", {})])
    assert len(quantized_weights(model)) == 6
    assert model.attention.query.bias.shape == (3, 4, 4)
    assert model.norm.scale.shape == (3, 16)
    with pytest.raises(ValueError, match="it is the scale of a LayerNorm"):
        quantize_(model, [("norm/scale", {"layout": None})])


def test_metadata_stays():
    kernel = nnx.with_metadata(nnx.initializers.lecun_normal(), note="mine")
    layer = quantize_(nnx.Linear(16, 6, kernel_init=kernel, rngs=rngs()))
    assert layer.kernel.note == "mine"


# ---- what is refused


class Stacked(nnx.Module):
    """A layer whose kernels were put one after the other along their second axis."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(16, 6, rngs=rngs)
        self.layer.kernel = nnx.Param(jnp.ones((16, 2, 6)))


REFUSED = {
    "mask": (lambda: nnx.Conv(16, 6, (3,), mask=jnp.ones((3, 16, 6)), rngs=rngs()), "its Conv has a mask"),
    "dot_general": (
        lambda: nnx.Linear(16, 6, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k), rngs=rngs()),
        "its Linear has a dot_general of its own",
    ),
    "dot_general_cls": (
        lambda: nnx.LinearGeneral(16, 6, dot_general_cls=lambda: jax.lax.dot_general, rngs=rngs()),
        "its LinearGeneral has a dot_general_cls",
    ),
    "promote_dtype": (
        lambda: nnx.Embed(16, 6, promote_dtype=lambda args, **_: args, rngs=rngs()),
        "its Embed has a promote_dtype of its own",
    ),
    "layers along another axis": (lambda: Stacked(rngs()), r"has shape \(16, 2, 6\), and its Linear was made with"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layers_that_could_not_use_it(name):
    make, message = REFUSED[name]
    model = drawn(make)
    with pytest.raises(ValueError, match=message):
        quantize_(model, [("*", {})])
    with pytest.warns(UserWarning, match=f"nothing was quantized; .*{message}"):
        assert not quantized_weights(quantize_(model))


def test_specs_that_make_no_sense():
    linear, embed = (drawn(lambda kind=kind: kind(16, 6, rngs=rngs())) for kind in (nnx.Linear, nnx.Embed))
    for model, spec, error, message in (
        (linear, {"layout": "linear"}, ValueError, "its layer says what its axes are for"),
        (linear, {"granularity": PerChannel(0)}, ValueError, "gives each input a scale of its own"),
        (linear, {"activations": 8}, TypeError, "give the name of a format"),
        (linear, {"activations": "int99"}, ValueError, "int99"),
        (embed, {"activations": "int8"}, ValueError, "is for Linear layers, and this is the weight of Embed"),
        (linear, {"bits": 4}, TypeError, "there is no 'bits'"),
    ):
        with pytest.raises(error, match=message):
            quantize_(model, [("*", spec)])
        assert not quantized_weights(model)
    assert quantize_(linear, [("kernel", {"layout": None})]).kernel[...].granularity == PerTensor()
    with pytest.raises(ValueError, match="matches kernel, which is quantized already, and no other weight"):
        quantize_(linear, [("*", {})])  # a second time: what is left is the bias
    with pytest.raises(TypeError, match=r"not an nnx\.Module"):
        quantize_({"kernel": X})
    own = nnx.Dict(w=nnx.Param(jnp.ones((16, 6))))
    with pytest.raises(ValueError, match="its path does not tell"):
        quantize_(own, [("w", {})])
    with pytest.raises(ValueError, match="this is the weight of no layer"):
        quantize_(own, [("w", {"layout": "dense", "activations": "int8"})])


def test_functions_of_trees_name_the_way_of_models(tmp_path):
    model = drawn(lambda: nnx.Linear(16, 6, rngs=rngs()))
    for tree in (model, nnx.state(model), {"a": model}):
        for function in (aqt_lite.quantize_tree, aqt_lite.plan_tree):
            with pytest.raises(TypeError, match=r"(params|a) is a (Linear|State), .*: aqt_lite.nnx.quantize_\(model\)"):
                function(tree)
    way = r"save nnx.to_pure_dict\(nnx.state\(model, nnx.Not\(nnx.RngState\)\)\)"
    for tree in (model, nnx.state(quantize_(model))):
        with pytest.raises(TypeError, match=way):
            aqt_lite.save(tmp_path / "t.safetensors", tree)
    with pytest.raises(TypeError, match=r"Not\(nnx.RngState\)"):
        aqt_lite.save(tmp_path / "t.safetensors", nnx.to_pure_dict(nnx.state(nnx.Dropout(0.5, rngs=rngs()))))


def test_references_are_refused():
    with nnx.var_defaults(ref=True):
        layer = nnx.Linear(16, 6, rngs=rngs())
    with pytest.raises(ValueError, match="it is a reference"):
        quantize_(layer, [("kernel", {})])


def test_sharding_of_the_result_is_said_otherwise():
    layer = quantize_(drawn(lambda: nnx.Linear(16, 6, rngs=rngs())))
    with pytest.raises(ValueError, match="has no out_sharding"):
        layer(X, out_sharding=jax.sharding.PartitionSpec("x"))


def test_arguments_of_other_libraries_are_named():
    for function in (quantize_, plan):
        with pytest.raises(TypeError, match=r"has no argument 'bits': use rules=.* with dtype='int4'"):
            function(None, bits=4)
