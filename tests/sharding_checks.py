"""Run by test_sharding.py in a process of its own, with eight simulated devices; prints one JSON object of failures."""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, dense, dequantize, fake_quantize, linear, quantize
from aqt_lite.testing import assert_same_bits

P = PartitionSpec
MESHES = {"one axis": ((8,), ("a",)), "two axes": ((4, 2), ("a", "b"))}
SPECS = {
    "one axis": [P("a", None), P(None, "a")],
    "two axes": [P("a", "b"), P(None, ("b", "a"))],
}
SPANNING = (PerBlock((4, 8)),)
CASES = [
    (PerTensor(), "affine"),
    (PerChannel(1), "symmetric"),
    (PerGroup(4), "symmetric"),
    (PerBlock((4, 8)), "affine"),
]

rng = np.random.default_rng(0)
X = (rng.standard_normal((16, 32)) * 10.0 ** rng.uniform(-2, 2, (16, 32))).astype(np.float32)
W = rng.standard_normal((32, 64)).astype(np.float32)
BIAS = rng.standard_normal(64).astype(np.float32)


def spec_of(a: jax.Array) -> tuple:
    """The spec with every axis written out, so that P('a') and P('a', None) are equal."""
    spec = tuple((s,) if isinstance(s, str) else tuple(s or ()) for s in a.sharding.spec)
    return spec + ((),) * (a.ndim - len(spec))


def compiled(f: Callable, *args: object) -> tuple[Any, int]:
    """What the compiled ``f`` gives, and the largest array that it collects on one device by an all-gather."""
    program = jax.jit(f).lower(*args).compile()
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? all-gather(?:-start)?\(", program.as_text())
    gathered = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
    return program(*args), max(gathered, default=0)


def check_quantize(put: Callable, spec: PartitionSpec, mesh_shape: dict) -> None:
    x, one = put(X, spec), jnp.asarray(X)
    for granularity, scheme in CASES:

        def round_trip(v: jax.Array, granularity: object = granularity, scheme: str = scheme) -> tuple:
            q = quantize(v, scheme=scheme, granularity=granularity)
            return q, dequantize(q)

        expected, expected_values = round_trip(one)
        jitted, gathered = compiled(round_trip, x)
        for q, values in (round_trip(x), jitted):
            assert_same_bits(q, expected)
            assert_same_bits(values, expected_values)
            assert spec_of(q.qvalue) == spec_of(values) == spec_of(x), (granularity, spec_of(q.qvalue))
            for blocks in (q.scale, q.zero_point):
                if blocks is not None:
                    check_blocks(blocks, x, mesh_shape)
        # statistics are reduced where the values lie; of groups that span devices, partial maxima travel
        assert gathered <= (X.size // 8 if granularity in SPANNING else 0), granularity
    y = fake_quantize(x, granularity=PerGroup(4))
    assert_same_bits(y, fake_quantize(one, granularity=PerGroup(4)))
    assert spec_of(y) == spec_of(x)


def check_blocks(blocks: jax.Array, x: jax.Array, mesh_shape: dict) -> None:
    """Scales lie where their values do, as far as the number of blocks allows."""
    for length, own, of_x in zip(blocks.shape, spec_of(blocks), spec_of(x), strict=True):
        assert own == of_x[: len(own)], (blocks.shape, own, of_x)
        shards = int(np.prod([mesh_shape[name] for name in of_x]))
        if length % shards == 0:
            assert own == of_x, (blocks.shape, own, of_x)


def check_non_finite(put: Callable, spec: PartitionSpec) -> None:
    for bad in (np.nan, -np.inf):
        spoilt = X.copy()
        spoilt[5, 17] = bad
        x = put(spoilt, spec)
        for how in ({"scheme": "symmetric"}, {"scheme": "affine"}, {"scale": 0.5, "zero_point": 3}):
            try:
                quantize(x, **how)
            except ValueError as error:
                message = str(error)
            else:
                message = "nothing was noticed"
            assert "1 non-finite values of 512, the first at index (5, 17)" in message, (bad, how, message)
            values = jax.jit(lambda v, how=how: dequantize(quantize(v, granularity=PerChannel(0), **how)))(x)
            assert np.flatnonzero(np.isnan(values).all(axis=1)).tolist() == [5]
            assert np.flatnonzero(np.isnan(values).any(axis=1)).tolist() == [5]
        w = quantize(put(W, P()))
        for mode in ("fast", "reproducible"):
            y = dense(x, w, mode=mode)
            assert np.flatnonzero(~np.isfinite(y).all(axis=1)).tolist() == [5], mode


def check_parameters(put: Callable, spec: PartitionSpec) -> None:
    """Scales and biases that nobody has placed may join arrays that are sharded."""
    x, one = put(X, spec), jnp.asarray(X)
    for scale in (0.5, jnp.float32(0.5), jnp.full((16, 1), 0.5)):
        q = quantize(x, scale=scale, granularity=PerChannel(0))
        assert_same_bits(q, quantize(one, scale=0.5, granularity=PerChannel(0)))
        assert spec_of(q.qvalue) == spec_of(x)
    w = quantize(put(W, P()))
    expected = dense(one, quantize(jnp.asarray(W)), jnp.asarray(BIAS), mode="reproducible")
    for bias in (BIAS.tolist(), jnp.asarray(BIAS)):
        assert_same_bits(dense(x, w, bias, mode="reproducible"), expected)
    far = jax.device_put(jnp.asarray(BIAS), jax.devices()[3])
    try:
        dense(x, w, far)
    except ValueError as error:
        message = str(error)
    else:
        message = "nothing was noticed"
    assert "bias is on device" in message, message


def check_products(put: Callable, spec: PartitionSpec, column_parallel: bool) -> None:
    """Weights split along their columns (each device makes its outputs) or their rows (devices add up)."""
    names = spec[0] if spec[0] is not None else spec[1]
    x_spec, w_spec = (P(), P(None, names)) if column_parallel else (P(None, names), P(names, None))
    if spec[0] is not None and spec[1] is not None:  # two axes: the batch is split as well
        x_spec, w_spec = (
            (P(spec[0], None), P(None, spec[1])) if column_parallel else (P(spec[0], spec[1]), P(spec[1], None))
        )
    x, bias = put(X, x_spec), put(BIAS, P())
    bound = (np.abs(X) @ np.abs(W)) * 1e-6 + 1e-6
    for product, granularity in ((dense, PerChannel(1)), (linear, PerGroup(4))):
        transposed = product is linear
        weight, own = (W.T, P(*reversed(w_spec))) if transposed else (W, w_spec)
        w_one, w = (quantize(v, granularity=granularity) for v in (jnp.asarray(weight), put(weight, own)))
        assert_same_bits(w, w_one)
        for mode in ("fast", "reproducible"):

            def f(x: object, w: object, b: object, mode: str = mode, product: Callable = product) -> jax.Array:
                return product(x, w, b, mode=mode)

            expected = f(jnp.asarray(X), w_one, jnp.asarray(BIAS))
            jitted, gathered = compiled(f, x, w, bias)
            if mode == "fast":
                assert gathered == 0, (product, granularity)  # neither the weight nor the activations
            for y in (f(x, w, bias), jitted):
                assert spec_of(y) == (spec_of(x)[0], spec_of(put(W, w_spec))[1]), (product, granularity, mode)
                if mode == "reproducible":
                    assert_same_bits(y, expected)
                else:
                    assert (np.abs(np.asarray(y) - np.asarray(expected)) <= bound).all()


KINDS = {
    "int4": lambda x: quantize(x, "int4", granularity=PerGroup(8)),
    "uint4 affine": lambda x: quantize(x, "uint4", scheme="affine", granularity=PerGroup(8)),
    "int8 with offsets": lambda x: quantize(x, scheme="affine", offset="data", granularity=PerChannel(0)),
    "int4, float16 scales": lambda x: quantize(x, "int4", granularity=PerGroup(8), scale_dtype="float16"),
    "nf4": lambda x: quantize(x, "nf4", granularity=PerGroup(16)),
    "float8": lambda x: quantize(x, "float8_e4m3fn", granularity=PerChannel(0)),
    "mxfp4": lambda x: quantize(x, "mxfp4"),
    "nvfp4": lambda x: quantize(x, "nvfp4"),
}


def check_kinds(place: Callable, names: tuple[str, ...]) -> None:
    """Rows of a weight of every kind over all devices: made there, moved there, used there."""
    rows, one = W.T, jnp.asarray(W.T)  # (64, 32)
    for make in KINDS.values():
        expected = make(one)
        values, product = dequantize(expected), linear(jnp.asarray(X), expected)

        def put_leaf(leaf: jax.Array) -> jax.Array:
            return place(leaf, P(names) if leaf.shape[0] == 64 else P())

        moved = jax.tree.map(put_leaf, expected)
        for q in (moved, make(place(rows, P(names))), jax.jit(make)(place(rows, P(names)))):
            assert_same_bits(q, expected)
            assert_same_bits(jax.jit(lambda q: q)(q), expected)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, q)
            assert_same_bits(jax.jit(lambda q: q, out_shardings=shardings)(q), expected)
            for got in (dequantize(q), jax.jit(dequantize)(q)):
                assert_same_bits(got, values)
            for got in (linear(place(X, P()), q), jax.jit(linear)(place(X, P()), q)):
                np.testing.assert_allclose(got, product, rtol=1e-4, atol=1e-4)
            gradient = jax.jit(jax.grad(lambda x, q: linear(x, q).sum()))(place(X, P()), q)
            np.testing.assert_allclose(gradient, np.tile(values.sum(axis=0), (len(X), 1)), rtol=1e-4, atol=1e-3)
        carried, got = jax.lax.scan(lambda q, _: (jax.tree.map(lambda leaf: leaf, q), dequantize(q)), moved, length=2)
        assert_same_bits(carried, expected)
        assert_same_bits(got[1], values)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), expected, expected)
        sliced = jax.lax.map(dequantize, jax.tree.map(lambda leaf: place(leaf, P()), stacked))
        assert_same_bits(sliced[1], values)


def check_cuts(mesh: Any, axis: str, devices: int) -> None:
    """A group or a contracted axis that shard_map cuts without a view to it: refused when it is used."""
    length = 16 * devices
    x = jnp.asarray(rng.standard_normal((length, length)).astype(np.float32))
    columns, cut = P(None, axis), "joined or cut|should have shape"
    size = length // devices + 1  # as many groups as devices, the last one shorter: no device has the codes of a group
    ragged = quantize(x, granularity=PerGroup(size))
    assert ragged.scale.shape[1] == devices
    for q, spec in (
        (ragged, columns),
        (quantize(x, "int4", granularity=PerGroup(16)), columns),  # packed
        (quantize(x, granularity=PerChannel(1)).for_dense(), columns),
        (quantize(x, granularity=PerGroup(16, axis=0)).for_dense(), columns),
    ):
        places = jax.tree.map(lambda leaf, spec=spec: jax.device_put(leaf, NamedSharding(mesh, spec)), q)
        try:
            jax.shard_map(dequantize, mesh=mesh, in_specs=spec, out_specs=spec)(places)
        except ValueError as error:
            message = str(error)
        else:
            message = "nothing was noticed"
        assert re.search(cut, message), (q.dtype, q.block, message)
    whole = quantize(x, granularity=PerGroup(16))
    values = jax.shard_map(dequantize, mesh=mesh, in_specs=columns, out_specs=columns)(
        jax.tree.map(lambda leaf: jax.device_put(leaf, NamedSharding(mesh, columns)), whole)
    )
    assert_same_bits(values, dequantize(whole))


def run(kind: AxisType, name: str) -> dict[str, str]:
    shape, axes = MESHES[name]
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))
    first, second = SPECS[name]

    def put(value: np.ndarray, spec: PartitionSpec) -> jax.Array:
        return jax.device_put(jnp.asarray(value), NamedSharding(mesh, spec))

    checks = {
        f"quantize {first}": lambda: check_quantize(put, first, mesh.shape),
        f"quantize {second}": lambda: check_quantize(put, second, mesh.shape),
        "non-finite": lambda: check_non_finite(put, second),
        "parameters": lambda: check_parameters(put, first),
        "column-parallel products": lambda: check_products(put, first, column_parallel=True),
        "kinds": lambda: check_kinds(put, axes),
        "cuts": lambda: check_cuts(mesh, axes[0], shape[0]),
        "row-parallel products": lambda: check_products(put, first, column_parallel=False),
    }
    failures = {}
    for label, check in checks.items():
        try:
            check()
        except Exception:
            failures[label] = traceback.format_exc(limit=-3)
    return failures


if __name__ == "__main__":
    assert len(jax.devices()) == 8, jax.devices()
    json.dump(run(AxisType[sys.argv[1]], sys.argv[2]), sys.stdout)
