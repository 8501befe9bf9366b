"""QArrays as trees: what their leaves say of their structure, and what checkpoints and transformations make of them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optional import jax, jnp

import aqt_lite
from aqt_lite import PerChannel, PerGroup, QArray, dense, dequantize, linear, quantize
from aqt_lite.backends.jax import combine, partition
from aqt_lite.testing import assert_same_bits

P = PartitionSpec


def data(*shape, seed=0):
    """Values of both signs whose blocks differ in range."""
    rng = np.random.default_rng(seed)
    return jnp.asarray((rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, shape)).astype(np.float32))


SQUARE = data(64, 64)
KINDS = {
    "int8": lambda x: quantize(x, granularity=PerChannel(0)),
    "int4": lambda x: quantize(x, "int4", granularity=PerGroup(32)),
    "int4, groups of 5": lambda x: quantize(x, "int4", granularity=PerGroup(5)),
    "uint4 affine": lambda x: quantize(x, "uint4", scheme="affine", granularity=PerGroup(16)),
    "int8 with offsets": lambda x: quantize(x, scheme="affine", offset="data", granularity=PerGroup(16)),
    "int4, float16 scales": lambda x: quantize(x, "int4", granularity=PerGroup(16), scale_dtype="float16"),
    "nf4": lambda x: quantize(x, "nf4", granularity=PerGroup(32)),
    "float8": lambda x: quantize(x, "float8_e4m3fn", granularity=PerChannel(1)),
    "mxfp4": lambda x: quantize(x, "mxfp4"),
    "nvfp4": lambda x: quantize(x, "nvfp4"),
    "for_dense": lambda x: quantize(x, "int4", granularity=PerGroup(32, axis=0)).for_dense(),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
half_of_kinds = pytest.mark.parametrize("kind", sorted({*[*KINDS][::2], "uint4 affine", "nvfp4", "for_dense"}))

# Pairs whose leaves have the same shapes and dtypes, and words of the error that names both.
CONFUSIONS = {
    "layout": (lambda: quantize(SQUARE), lambda: quantize(SQUARE).for_dense(), "int8.*as for_dense"),
    "groups of 32 and 40": (
        lambda: quantize(data(4, 96), granularity=PerGroup(32)),
        lambda: quantize(data(4, 96), granularity=PerGroup(40)),
        r"1, 32\).*1, 40\)",
    ),
    "groups of 5 and 4": (
        lambda: quantize(data(4, 8), granularity=PerGroup(5)),
        lambda: quantize(data(4, 8), granularity=PerGroup(4)),
        r"1, 5\).*1, 4\)",
    ),
    "formats": (
        lambda: quantize(SQUARE, "int4", granularity=PerGroup(32)),
        lambda: quantize(SQUARE, "nf4", granularity=PerGroup(32)),
        "int4 of float32.*nf4 of float32",
    ),
    "floats": (
        lambda: quantize(SQUARE, "float8_e4m3fn"),
        lambda: quantize(SQUARE, "float8_e5m2"),
        "float8_e4m3fn.*float8_e5m2",
    ),
    "scales": (
        lambda: quantize(SQUARE, "int4", granularity=PerGroup(32), scale_dtype="float16"),
        lambda: quantize(SQUARE, "int4", granularity=PerGroup(32), scale_dtype="bfloat16"),
        "float16 of float32.*bfloat16 of float32",
    ),
    "values": (lambda: quantize(SQUARE), lambda: quantize(SQUARE.astype("bfloat16")), "float32.*bfloat16"),
    "runs": (
        lambda: quantize(SQUARE.reshape(16, 16, 16)).for_dense(1, 2),
        lambda: quantize(SQUARE.reshape(16, 16, 16)).for_dense(2, 1),
        r"stored as for_dense\(1, 2\).*stored as for_dense\(2, 1\)",
    ),
    "runs and a matrix": (
        lambda: quantize(SQUARE.reshape(16, 16, 16)).for_dense(1, 2),
        lambda: quantize(SQUARE.reshape(16, 16, 16)).for_dense(),
        r"stored as for_dense\(1, 2\).*stored as for_dense\(\)",
    ),
    "lengths": (
        lambda: quantize(data(4, 63), "int4"),
        lambda: quantize(data(4, 64), "int4"),
        "63 codes packed.*64 codes packed",
    ),
}
confusions = pytest.mark.parametrize("pair", CONFUSIONS)


# ---- leaves without their structure


@confusions
def test_leaves_are_not_read_as_another_structure(pair):
    saved, template, words = (CONFUSIONS[pair][0](), CONFUSIONS[pair][1](), CONFUSIONS[pair][2])
    leaves, structure = jax.tree.leaves({"w": saved}), jax.tree.structure({"w": template})
    assert [(a.shape, a.dtype) for a in leaves] == [(a.shape, a.dtype) for a in jax.tree.leaves({"w": template})]
    with pytest.raises(ValueError, match=f"saved as .*{words}"):
        jax.tree.unflatten(structure, leaves)
    with pytest.raises(ValueError, match=f"saved as .*{words}"):
        jax.tree.unflatten(structure, [np.asarray(leaf) for leaf in leaves])


@every_kind
def test_the_same_structure_is_read_back(kind):
    q = KINDS[kind](SQUARE)
    leaves, structure = jax.tree.flatten(q)
    for moved in (leaves, [np.asarray(leaf) for leaf in leaves], [leaf + 0 for leaf in leaves]):
        assert_same_bits(jax.tree.unflatten(structure, moved), q)
    assert_same_bits(jax.tree.map(jnp.copy, q), q)
    assert_same_bits(pickle.loads(pickle.dumps(q)), q)
    assert "mark" not in pickle.loads(pickle.dumps(q)).__dict__
    assert q.nbytes == KINDS[kind](SQUARE).nbytes  # before any mark was made


@confusions
def test_equinox(pair):
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: requirements-dev.txt has it")
    saved, template, words = CONFUSIONS[pair][0](), CONFUSIONS[pair][1](), CONFUSIONS[pair][2]
    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, {"w": saved})
    file.seek(0)
    assert_same_bits(eqx.tree_deserialise_leaves(file, {"w": jax.tree.map(jnp.zeros_like, saved)})["w"], saved)
    file.seek(0)
    with pytest.raises(RuntimeError) as caught:  # Equinox's own error, which says where
        eqx.tree_deserialise_leaves(file, {"w": template})
    assert re.search(f"saved as .*{words}", str(caught.value.__cause__))


@pytest.mark.parametrize("pair", ["layout", "groups of 5 and 4", "formats"])
def test_orbax(pair, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed: requirements-dev.txt has it")
    saved, template, words = CONFUSIONS[pair][0](), CONFUSIONS[pair][1](), CONFUSIONS[pair][2]
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "q", {"w": saved})
        checkpointer.wait_until_finished()
        for like in (saved, jax.eval_shape(lambda: saved)):
            assert_same_bits(checkpointer.restore(tmp_path / "q", {"w": like})["w"], saved)
        for like in (template, jax.eval_shape(lambda: template)):
            with pytest.raises(ValueError, match=f"saved as .*{words}"):
                checkpointer.restore(tmp_path / "q", {"w": like})


def _equinox(saved, template, path):
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: requirements-dev.txt has it")
    eqx.tree_serialise_leaves(path, saved)
    return eqx.tree_deserialise_leaves(path, template)


def _orbax(saved, template, path):
    ocp = pytest.importorskip("orbax.checkpoint", reason="orbax is not installed: requirements-dev.txt has it")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, template)


def _msgpack(saved, template, path):
    pytest.importorskip("aqt_lite.linen", reason="flax is not installed: requirements-dev.txt has it")
    flax = pytest.importorskip("flax.serialization", reason="flax is not installed: requirements-dev.txt has it")
    return flax.from_bytes(template, flax.to_bytes(saved))


def _own_file(saved, template, path):
    aqt_lite.save(path.with_suffix(".safetensors"), saved)
    return aqt_lite.load(path.with_suffix(".safetensors"), like=template)


def _exported(saved, template, path):
    """A program for arguments like the template is given what was saved."""
    program = jax.export.export(jax.jit(lambda q: q))(template)
    return jax.export.deserialize(program.serialize()).call(saved)


PRESENT = {  # what lies beside the codes of one and not of the other
    "zero points": (lambda: quantize(SQUARE, scheme="affine"), lambda: quantize(SQUARE)),
    "offsets": (lambda: quantize(SQUARE, scheme="affine", offset="data"), lambda: quantize(SQUARE)),
    "offsets and zero points": (
        lambda: quantize(SQUARE, scheme="affine", offset="data"),
        lambda: quantize(SQUARE, scheme="affine"),
    ),
    "kept scales": (lambda: quantize(SQUARE, scale_dtype="float16"), lambda: quantize(SQUARE)),
    "scales": (
        lambda: quantize(SQUARE, "float8_e4m3fn"),
        lambda: replace(quantize(SQUARE, "float8_e4m3fn"), scale=None),
    ),
}
PAIRS = [*CONFUSIONS, *(f"with and without {name}" for name in PRESENT)]
SAVERS = {f.__name__[1:]: f for f in (_equinox, _orbax, _msgpack, _own_file, _exported)}


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax leaves reads behind that failed
@pytest.mark.parametrize(
    ("pair", "saver"), [(p, s) for i, p in enumerate(PAIRS) for j, s in enumerate(SAVERS) if (i // 2 + j) % 2]
)
def test_every_saver_gives_what_was_saved_or_an_error(saver, pair, tmp_path):
    turned = (list(SAVERS).index(saver) + PAIRS.index(pair)) % 2  # every pair with some, and every saver with some
    saved, template = (make() for make in (CONFUSIONS.get(pair) or PRESENT[pair.removeprefix("with and without ")])[:2])
    if turned:
        saved, template = template, saved
    assert_same_bits(SAVERS[saver]({"w": saved}, {"w": saved}, tmp_path / "same")["w"], saved)
    try:
        found = SAVERS[saver]({"w": saved}, {"w": template}, tmp_path / "other")["w"]
    except (ValueError, TypeError, RuntimeError):
        found = None
    gc.collect()  # of the reads that orbax leaves behind where one of them fails: here they may be ignored
    if found is not None:
        assert_same_bits(found, saved)  # orbax leaves out what the file has not


@pytest.mark.parametrize("pair", ["zero points", "offsets", "scales"])
def test_parts_that_are_missing_are_told_at_first_use(pair):
    whole, less = (make() for make in PRESENT[pair])
    names = [name for name in ("scale", "zero_point", "offset") if getattr(whole, name) is not None]
    kept = [
        leaf for leaf, name in zip(jax.tree.leaves(whole)[1:], names, strict=False) if getattr(less, name) is not None
    ]
    leaves = [whole.storage, *kept, jax.tree.leaves(whole)[-1]]
    read = jax.tree.unflatten(jax.tree.structure(less), leaves)
    for use in (
        dequantize,
        jax.jit(dequantize),
        lambda q: linear(SQUARE, q),
        lambda q: q.to_backend("numpy"),
        lambda q: q[0],
    ):
        for q in (read, jax.jit(lambda q: q)(read), pickle.loads(pickle.dumps(read)), copy.deepcopy(read)):
            with pytest.raises(ValueError, match=r"holds no (scale|zero_point|offset).*template"):
                use(q)
    assert replace(read).shape == whole.shape


# ---- what becomes of the leaf


@every_kind
def test_zeros_say_nothing(kind):
    q = KINDS[kind](SQUARE)
    zeros = jax.tree.map(jnp.zeros_like, q)
    assert jax.tree.structure(zeros) == jax.tree.structure(
        q
    )  # once computed, what is stored of them says what they are
    assert_same_bits(jax.tree.leaves(jax.block_until_ready(zeros))[-1], jax.tree.leaves(q)[-1])


@pytest.mark.parametrize("kind", ["int8", "uint4 affine", "int8 with offsets", "mxfp4"])
def test_arrays_of_which_all_leaves_were_computed_with_are_not_used(kind):
    q = KINDS[kind](SQUARE)
    for function in (lambda a: a * 2, lambda a: a + 1, lambda a: -a, lambda a: a // 3):
        of_leaves = lambda q, function=function: jax.tree.map(lambda a: function(a).astype(a.dtype), q)
        for wrong in (of_leaves(q), jax.jit(of_leaves)(q), jax.tree.map(jnp.copy, of_leaves(q))):
            assert isinstance(wrong, QArray)
            with pytest.raises(ValueError, match="something was computed with all leaves"):
                dequantize(wrong)
            with pytest.raises(ValueError, match="something was computed with all leaves"):
                wrong.to_backend("numpy")
    for right in (jax.tree.map(lambda a: a * 1, q), jax.jit(lambda q: jax.tree.map(lambda a: a + 0, q))(q)):
        assert_same_bits(dequantize(right), dequantize(q))


def test_parts_come_together_again_through_all_that_keeps_them():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: requirements-dev.txt has it")
    for kind in ("uint4 affine", "int8 with offsets"):
        for q in (KINDS[kind](SQUARE), KINDS[kind](SQUARE).with_trainable_scales()):
            for parts in (eqx.partition(q, eqx.is_inexact_array), eqx.partition(q, eqx.is_array), partition(q)):
                for a, b in (
                    parts,
                    jax.jit(lambda *p: p)(*parts),
                    pickle.loads(pickle.dumps(parts)),
                    copy.deepcopy(parts),
                ):
                    assert_same_bits(combine(a, b), q)
                    assert_same_bits(jax.jit(lambda a, b: dequantize(combine(a, b)))(a, b), dequantize(q))
                    assert_same_bits(dequantize(eqx.combine(a, b)), dequantize(q))


def test_trees_of_what_is_no_array():
    q = quantize(SQUARE, "int4", granularity=PerGroup(32))
    mesh = jax.make_mesh((1,), ("m",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, P("m", None))
    shapes = jax.eval_shape(lambda: q)
    for value in (0, None, P("m"), place, object()):
        tree = jax.tree.map(lambda _, value=value: value, q)
        children = [leaf for _, leaf in jax.tree_util.default_registry.flatten_one_level_with_keys(tree)[0]]
        assert children == [value, value, None, None, value]
    assert [leaf.shape for leaf in jax.tree.leaves(shapes)] == [leaf.shape for leaf in jax.tree.leaves(q)]
    assert jax.tree.structure(shapes) == jax.tree.structure(q)
    by_hand = QArray(P("m", None), P("m", None), None, "int4", q.block, packed_length=64)
    assert jax.tree.leaves(by_hand, is_leaf=lambda leaf: isinstance(leaf, P))[-1] == P("m")
    placed = jax.device_put(q, jax.tree.map(lambda _: place, q))
    assert_same_bits(placed, q)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, placed)
    assert_same_bits(jax.jit(lambda q: q, out_shardings=shardings)(q), q)
    assert_same_bits(jax.jit(lambda q: q, in_shardings=(shardings,))(q), q)
    assert_same_bits(jax.jit(lambda q: q, in_shardings=place, out_shardings=place)(q), q)


@every_kind
def test_donation(kind):
    q = KINDS[kind](SQUARE)
    expected = dequantize(q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = jax.jit(lambda q: q, donate_argnums=0)(q)
        assert q.storage.is_deleted()
        again = jax.jit(lambda q: jax.tree.map(lambda a: a, q), donate_argnums=0)(kept)
    assert_same_bits(dequantize(again), expected)
    assert repr(q).startswith(f"QArray({again.dtype}, storage=")
    assert len(jax.tree.leaves(q)) == len(jax.tree.leaves(again))  # of a donated one, too
    copies = [jax.tree.map(jnp.copy, again) for _ in range(2)]
    assert_same_bits(jax.jit(lambda a, b: (b, a), donate_argnums=(0, 1))(*copies)[0].dequantize(), expected)


# ---- transformations, each kind of format


@pytest.mark.exhaustive_unless(kind=["for_dense"])  # seconds each
@half_of_kinds
def test_jit_scan_vmap_cond_and_remat(kind):
    layers = [KINDS[kind](data(64, 64, seed=s)) for s in range(3)]
    values = [dequantize(q) for q in layers]
    for got, expected in zip(layers, values, strict=True):
        assert_same_bits(jax.jit(dequantize)(got), expected)  # argument
        assert_same_bits(jax.jit(lambda got=got: dequantize(got))(), expected)  # constant
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    for got in (jax.vmap(dequantize)(stacked), jax.lax.map(dequantize, stacked), dequantize(stacked)):
        assert_same_bits(got, jnp.stack(values))
    _, got = jax.lax.scan(lambda carry, q: (q, dequantize(q)), layers[0], stacked)
    assert_same_bits(got, jnp.stack(values))
    last, _ = jax.lax.scan(lambda carry, q: (q, None), layers[0], stacked)
    assert_same_bits(last, layers[2])
    made = jax.vmap(KINDS[kind])(jnp.stack([data(64, 64, seed=s) for s in range(3)]))
    assert_same_bits(dequantize(made), jnp.stack(values))
    assert_same_bits(made[1].dequantize(), values[1])
    chosen = jax.jit(lambda p, a, b: jax.lax.cond(p, lambda: a, lambda: b))(False, layers[0], layers[1])
    assert_same_bits(chosen, layers[1])
    looped = jax.lax.fori_loop(0, 3, lambda i, q: jax.tree.map(lambda a: a, q), layers[0])
    assert_same_bits(looped, layers[0])
    x = data(5, 64, seed=9)
    product = dense if kind in ("for_dense", "float8") else linear  # the one that it was made for

    def loss(x, w):
        return jnp.tanh(product(x, w) / 1e4).sum()

    plain, saved = (f(x, layers[0]) for f in (jax.grad(loss), jax.grad(jax.checkpoint(loss))))
    np.testing.assert_allclose(plain, saved, rtol=1e-5, atol=1e-6 * np.abs(plain).max())
    by_values = jax.grad(lambda x: jnp.tanh(x @ (values[0] if product is dense else values[0].T) / 1e4).sum())(x)
    np.testing.assert_allclose(plain, by_values, rtol=1e-3, atol=1e-5 * np.abs(by_values).max())


@pytest.mark.exhaustive_unless(kind=["int8", "uint4 affine", "nvfp4", "int8 with offsets"])  # a second each
@every_kind
def test_gradient_of_scales_where_they_are_trained(kind):
    q = KINDS[kind](SQUARE)
    upstream = data(64, 64, seed=3)
    gradient = jax.grad(lambda q: (dequantize(q) * upstream).sum(), allow_int=True)
    constant = gradient(q)
    assert jax.tree.structure(constant) == jax.tree.structure(q)
    if isinstance(q.scale, QArray):
        assert not any(leaf.any() for leaf in jax.tree.leaves(constant) if leaf.dtype == "float32")
        with pytest.raises(ValueError, match="codes have no derivative: scales of float32 train"):
            q.with_trainable_scales()
        return
    trained = gradient(q.with_trainable_scales())
    floats = [
        (c, t) for c, t in zip(jax.tree.leaves(constant), jax.tree.leaves(trained), strict=True) if t.dtype == "float32"
    ]
    assert all(not c.any() for c, _ in floats)
    assert all(t.any() for _, t in floats)
    assert len(floats) == 1 + (q.offset is not None)


@pytest.mark.exhaustive_unless(kind=["uint4 affine"])
@half_of_kinds
def test_shard_map_and_devices(kind):
    mesh = jax.make_mesh((1,), ("m",), axis_types=(AxisType.Auto,))
    q = KINDS[kind](SQUARE)
    spec = P() if isinstance(q.scale, QArray) and q.scale.scale is not None else P("m")
    inside = jax.shard_map(dequantize, mesh=mesh, in_specs=spec, out_specs=spec)
    assert_same_bits(inside(q), dequantize(q))
    made = jax.shard_map(KINDS[kind], mesh=mesh, in_specs=P(), out_specs=P())
    assert_same_bits(made(SQUARE), q)
    there = q.to_device(jax.devices()[0])
    assert_same_bits(jax.jit(dequantize)(there), dequantize(q))


@pytest.mark.exhaustive_unless(kind=["nvfp4"])  # compiles
@pytest.mark.parametrize("kind", ["int4, groups of 5", "int8 with offsets", "nvfp4", "for_dense"])
def test_loops_over_arrays_placed_leaf_by_leaf(kind):
    """Where shardings are part of types, a loop's carry comes out as it went in, wherever somebody put the mark."""
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    one = KINDS[kind](SQUARE)

    def over(q):
        return jax.lax.scan(lambda carry, _: (jax.tree.map(lambda leaf: leaf, carry), dequantize(carry)), q, length=2)

    placed = jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, P("a", "b"))), one)
    with jax.set_mesh(mesh):
        last, values = over(placed)
    assert_same_bits(last, one)
    assert_same_bits(values[1], dequantize(one))


@pytest.mark.parametrize("kind", ["int4, groups of 5", "nvfp4"])
def test_a_mark_that_is_not_mapped_over(kind):
    """It is made anew for each of the arrays, so that what comes out has the leaves of what went in."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(KINDS[kind](data(64, 64, seed=s)) for s in range(2)))
    axes = jax.tree_util.tree_map_with_path(lambda path, _: None if path[-1].name == "mark" else 0, stacked)
    made = jax.vmap(lambda q: q, in_axes=(axes,))(stacked)
    assert [leaf.shape for leaf in jax.tree.leaves(made)] == [leaf.shape for leaf in jax.tree.leaves(stacked)]
    assert_same_bits(made[1], stacked[1])


@pytest.mark.exhaustive_unless(kind=["for_dense"])
@every_kind
def test_shapes_under_jit(kind):
    q = KINDS[kind](SQUARE)
    ids = jnp.asarray([3, 0, 63, 3])
    ways = [lambda q: q.T, lambda q: q[None], lambda q: q[...], lambda q: q.copy(), lambda q: q.T.T.dequantize()]
    if kind != "for_dense":  # whose groups run along the first axis
        ways += [lambda q: q[ids], lambda q: q.take(ids), lambda q: q[8:24], lambda q: q[5]]
    if not isinstance(q.scale, QArray) or q.scale.scale is None:
        ways += [lambda q: aqt_lite.stack([q, q]), lambda q: aqt_lite.concatenate([q, q], axis=int(kind == "float8"))]
    for way in ways:
        eager = way(q)
        assert_same_bits(jax.jit(way)(q), eager)
        assert_same_bits(jax.jit(lambda way=way: way(q))(), eager)
    if kind != "for_dense":
        assert_same_bits(jax.jit(lambda q, ids: q[ids].dequantize())(q, ids), dequantize(q)[ids])
        assert_same_bits(jax.jit(lambda ids: q[ids].dequantize())(ids), dequantize(q)[ids])


# ---- leaves that were changed one by one


@pytest.mark.parametrize("size", [5, 32])
def test_joined_without_a_view_to_groups(size):
    q = quantize(data(4, 72), granularity=PerGroup(size))
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), q, q)
    with pytest.raises(ValueError, match="joined or cut"):
        joined.dequantize()


@every_kind
def test_floats_cast_tree_wide(kind):
    q = KINDS[kind](SQUARE)

    def cast(leaf):
        return leaf.astype("float16") if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    for changed in (jax.tree.map(cast, q), jax.tree.map(lambda leaf: leaf.astype("float16"), q)):
        if [leaf.dtype for leaf in jax.tree.leaves(changed)] == [leaf.dtype for leaf in jax.tree.leaves(q)]:
            continue  # whose scales are no floats
        with pytest.raises(TypeError, match="kept as"):
            changed.dequantize()
        with pytest.raises(TypeError, match="kept as"):
            jax.jit(dequantize)(changed)


# ---- training


def test_partition_and_combine():
    w = quantize(SQUARE, "int4", granularity=PerGroup(32))
    tree = {"w": w, "t": w.with_trainable_scales(), "m": quantize(SQUARE, "nvfp4"), "b": jnp.ones(64), "n": 3}
    trainable, rest = partition(tree)
    assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [(64,), (64, 2)]
    together = combine(trainable, rest)
    assert jax.tree.structure(together) == jax.tree.structure(tree)
    assert all(a is b for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(tree), strict=True))
    assert_same_bits(jax.jit(lambda t: dequantize(combine(t, rest)["t"]))(trainable), dequantize(tree["t"]))


def test_optax_trains_beside_quantized_weights():
    optax = pytest.importorskip("optax", reason="optax is not installed: requirements-dev.txt has it")
    w = quantize(SQUARE / 100, "int4", granularity=PerGroup(32))
    params = {"w": w, "t": w.with_trainable_scales(), "bias": jnp.zeros(64)}
    x = data(5, 64) / 100
    optimizer = optax.adamw(1e-3)
    assert jax.tree.structure(optimizer.init(params)[0].mu) == jax.tree.structure(params)  # of the whole tree, too
    trainable, rest = partition(params)
    state = optimizer.init(trainable)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            p = combine(trainable, rest)
            return ((linear(x, p["w"]) + linear(x, p["t"], p["bias"]) - 1) ** 2).mean()

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(gradient, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    losses = []
    for _ in range(5):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    trained = combine(trainable, rest)
    assert_same_bits(trained["w"], w)
    assert_same_bits(trained["t"].storage, w.storage)
    assert not np.array_equal(trained["t"].scale, w.scale)


def test_leaves_that_were_cut_alike_are_read_whether_they_are_computed_yet_or_not():
    q = quantize(SQUARE, granularity=PerChannel(0))
    cut = jax.jit(lambda q: jax.tree.map(lambda leaf: leaf[..., :8], q))
    for found in (cut(q), jax.block_until_ready(cut(q))):
        assert_same_bits(dequantize(found), dequantize(q)[:, :8])
