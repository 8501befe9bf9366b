"""Values of codes inside programs of JAX: by compiled loops, with the bits of the operations, however transformed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from optional import jax, jnp
from test_decoders import LAYOUTS, by_operations, same_bits

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, affine
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import runtime

pytestmark = pytest.mark.skipif(runtime.decoding_loops() is None, reason="there are no loops without numba or AVX2")

LOOP = "aqt_lite_decoded_values"


def dequantize(q):
    from aqt_lite.jax import dequantize

    return dequantize(q)


def loops_of_program(q, function=dequantize):
    return LOOP in jax.jit(function).lower(q).compile().as_text()


def quantized(shape, dtype, granularity=None, scheme="symmetric", seed=7):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, dtype=np.float32) * np.exp(rng.standard_normal((*shape[:-1], 1), dtype=np.float32))
    return aqt_lite.quantize(jnp.asarray(x), dtype, granularity=granularity, scheme=scheme)


@pytest.mark.parametrize(
    ("dtype", "layout", "served"),
    [
        *[("int4", "groups of 32", True), ("uint4", "groups of 16, the last of each row cut", True)],
        *[("int8", "one scale", True), ("int8", "one for each row", True), ("uint8", "blocks", True)],
        *[("mxfp4", "groups of 32", True), ("nvfp4", "blocks", True), ("mxfp6_e3m2", "more axes", True)],
        *[("float8_e4m3fn", "groups of 24", True), ("nf4", "more axes", True), ("int3", "one for each row", True)],
        *[("int5", "one row", True), ("int4", "one axis", False), ("int8", "short rows", False)],
        ("int4", "one for each index of the second axis", False),
    ],
)
def test_programs_have_the_bits_of_the_operations(dtype, layout, served):
    shape, granularity = LAYOUTS[layout]
    granularity = None if dtype.startswith(("mx", "nv")) else granularity
    q = quantized(shape, dtype, granularity, "affine" if dtype.startswith("u") else "symmetric")
    expected = by_operations(q)
    for each in (q, q.unpacked()):
        assert loops_of_program(each) == served
        assert same_bits(jax.jit(dequantize)(each), expected)
        assert same_bits(dequantize(each), expected)


@pytest.mark.parametrize("dtype", ["mxfp4", "float8_e5m2", "float8_e4m3fn", "int4"])
def test_scales_that_loops_leave_to_the_operations(dtype):
    q = quantized((512, 1024), dtype, None if dtype == "mxfp4" else PerGroup(32))
    rng = np.random.default_rng(3)
    storage = jnp.asarray(rng.integers(0, 256, q.storage.shape, dtype=np.uint8).view(q.storage.dtype))
    if dtype == "mxfp4":
        every = np.arange(q.scale.size, dtype=np.uint8).reshape(q.scale.shape)
        every[np.isnan(replace(q.scale, storage=jnp.asarray(every.view(q.scale.storage.dtype))).dequantize())] = 1
        scales = [replace(q.scale, storage=jnp.asarray(every.view(q.scale.storage.dtype)))]
    else:
        scales = [jnp.full_like(q.scale, s) for s in (0.0, 1e-40, 1.2e-38, -2.0, 3e34)]
    program = jax.jit(lambda storage, scale: dequantize(replace(q, storage=storage, scale=scale)))
    assert LOOP in program.lower(storage, scales[0]).compile().as_text()
    operations = jax.jit(lambda storage, scale: plain(replace(q, storage=storage, scale=scale)))
    for scale in scales:
        assert same_bits(program(storage, scale), operations(storage, scale))


def plain(q):
    q = q.unpacked()
    return affine.dequantize(q._coded(), spec=q._spec, b=get_backend("jax"))


WAYS = {
    "grad": lambda f, s: jax.grad(lambda s: (f(s) * jnp.arange(f(s).shape[-1])).sum())(s),
    "grad of grad": lambda f, s: jax.grad(lambda s: jax.grad(lambda t: (f(t) ** 3).sum())(s).sum())(s),
    "jvp": lambda f, s: jax.jvp(f, (s,), (2 * s,))[1],
    "linearize": lambda f, s: jax.linearize(f, s)[1](s),
    "grad of a checkpoint": lambda f, s: jax.grad(lambda s: (jax.checkpoint(f)(s) ** 2).sum())(s),
    "vmap": lambda f, s: jax.vmap(f)(jnp.stack([s, 2 * s])),
    "vmap of grad": lambda f, s: jax.vmap(jax.grad(lambda s: f(s).sum()))(jnp.stack([s, 2 * s])),
    "map": lambda f, s: jax.lax.map(f, jnp.stack([s, 2 * s])),
    "grad through scan": lambda f, s: jax.grad(
        lambda s: jax.lax.scan(lambda c, _: (c + f(s).sum(), None), 0.0, None, length=2)[0]
    )(s),
}


@pytest.mark.exhaustive_unless(way=["grad", "vmap", "vmap of grad", "grad through scan"])
@pytest.mark.exhaustive_where(dtype="uint4")
@pytest.mark.parametrize(
    ("way", "dtype", "shape", "granularity"),
    [
        *[(way, "int4", (512, 544), PerGroup(32)) for way in WAYS],
        ("vmap of grad", "uint4", (4, 130, 512), PerGroup(64)),
    ],
)
def test_transformations_are_those_of_the_operations(way, dtype, shape, granularity):
    q = quantized(shape, dtype, granularity, "affine" if dtype[0] == "u" else "symmetric").with_trainable_scales()
    by_loops, operations = (lambda s, v=values: v(replace(q, scale=s)) for values in (dequantize, plain))
    assert loops_of_program(q.scale, by_loops)
    expected = WAYS[way](operations, q.scale)
    assert np.any(expected)
    for got in (WAYS[way](by_loops, q.scale), jax.jit(lambda s: WAYS[way](by_loops, s))(q.scale)):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_derivatives_of_what_meets_the_values_leave_them_to_loops():
    q, x = quantized((512, 544), "int4", PerGroup(32)), jnp.ones((3, 512))
    assert loops_of_program(x, jax.grad(lambda x: (x @ dequantize(q)).sum()))
    expected = jnp.broadcast_to(plain(q).sum(axis=1), x.shape)
    np.testing.assert_allclose(jax.grad(lambda x: (x @ dequantize(q)).sum())(x), expected, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(jax.vmap(lambda x: x @ dequantize(q))(x), x @ plain(q), rtol=1e-4, atol=1e-3)


def test_exports_hold_operations_alone():
    q = quantized((512, 512), "int4", PerGroup(32))
    exported = jax.export.export(jax.jit(dequantize))(q)
    assert LOOP not in exported.mlir_module()
    assert same_bits(jax.export.deserialize(exported.serialize()).call(q), by_operations(q))
    with jax.disable_jit():
        assert same_bits(jax.jit(dequantize)(q), by_operations(q))


def test_any_number_of_rows():
    (rows,) = jax.export.symbolic_shape("rows")
    q = quantized((512, 512), "int4", PerGroup(32))
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((rows, *a.shape[1:]), a.dtype), q)
    exported = jax.export.export(jax.jit(dequantize))(shapes)
    assert same_bits(exported.call(q), by_operations(q))


def test_what_loops_do_not_serve():
    assert not loops_of_program(quantized((64, 512), "int4", PerGroup(32)))
    assert not loops_of_program(quantized((512, 512), "int4", PerGroup(32)).T)
    assert not loops_of_program(quantized((512, 512), "int4", PerGroup(32)), lambda q: q.dequantize("bfloat16"))
    half = aqt_lite.quantize(jnp.ones((512, 512), "bfloat16"), "int4", granularity=PerGroup(32))
    assert not loops_of_program(half)
    assert dequantize(half).dtype == jnp.bfloat16
    assert loops_of_program(quantized((512, 576), "uint4", PerBlock((64, 64)), "affine"))


def test_what_fuses_is_left_to_xla():
    """A look-up makes the values that are looked up: ``q.dequantize()`` is XLA's own code in programs."""
    q = quantized((4096, 512), "int4", PerGroup(32))
    program = jax.jit(lambda q, ids: q.dequantize()[ids]).lower(q, jnp.arange(3)).compile()
    assert LOOP not in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 1 << 20
    assert same_bits(program(q, jnp.arange(3)), by_operations(q)[:3])


def test_convolutions_have_their_kernels_made_by_loops():
    import aqt_lite.jax

    kernel = quantized((3, 3, 128, 256), "int4", PerGroup(32))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 8, 8, 128), dtype=np.float32))

    def conv(x, kernel):
        return aqt_lite.jax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert LOOP in jax.jit(conv).lower(x, kernel).compile().as_text()
    np.testing.assert_allclose(jax.jit(conv)(x, kernel), conv(x, kernel), rtol=1e-4, atol=1e-3)


def test_large_arrays_outside_programs(monkeypatch):
    from aqt_lite.backends.jax import decoding, products

    made, form = [], decoding.dequantized
    monkeypatch.setattr(decoding, "dequantized", lambda *a, **k: made.append(form(*a, **k)) or made[-1])
    monkeypatch.setattr(products, "SMALLEST_FOR_XLA", 1 << 16)
    q = quantized((512, 512), "int4", PerGroup(32))
    assert same_bits(q.dequantize(), by_operations(q))
    assert same_bits(q.unpacked().dequantize(), by_operations(q))
    assert [bool(unserved) for _, unserved in made] == [False, False]
    for scale in (3e38, 1e-40, 1e-38):  # on XLA's threads the last two are 0
        other = replace(q, scale=q.scale.at[3, 3].set(scale))
        made.clear()
        assert same_bits(other.dequantize(), by_operations(other))
        assert made
        assert all(unserved for _, unserved in made)


def test_arguments():
    with pytest.raises(TypeError, match=r"dequantize: q is a \w+: give a QArray, as aqt_lite.quantize makes it"):
        dequantize(jnp.ones(3))
    assert dequantize(aqt_lite.quantize(np.ones(3))).dtype == np.float64
    assert dequantize(quantized((4, 64), "int8", PerTensor())).shape == (4, 64)
    assert dequantize(quantized((4, 64), "int8", PerChannel(0))).shape == (4, 64)
