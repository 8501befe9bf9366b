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
    return q.dequantize()


def loops_of_program(q, function=dequantize):
    return LOOP in jax.jit(function).lower(q).compile().as_text()


def quantized(shape, dtype, granularity=None, scheme="symmetric", seed=7):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape, dtype=np.float32) * np.exp(rng.standard_normal((*shape[:-1], 1), dtype=np.float32))
    return aqt_lite.quantize(jnp.asarray(x), dtype, granularity=granularity, scheme=scheme)


@pytest.fixture
def few_bytes(monkeypatch):
    """Codes of a byte, too, go by loops, which else only millions of them do."""
    if runtime.decoding_loops() is not None:
        from aqt_lite.backends.jax import decoding

        monkeypatch.setattr(decoding, "FEWEST_BYTES", 1 << 16)


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
def test_programs_have_the_bits_of_the_operations(dtype, layout, served, few_bytes):
    shape, granularity = LAYOUTS[layout]
    granularity = None if dtype.startswith(("mx", "nv")) else granularity
    q = quantized(shape, dtype, granularity, "affine" if dtype.startswith("u") else "symmetric")
    expected = by_operations(q)
    for each in (q, q.unpacked()):
        assert loops_of_program(each) == served
        assert same_bits(jax.jit(dequantize)(each), expected)
        assert same_bits(each.dequantize(), expected)


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
        scales = [jnp.full_like(q.scale, s) for s in (0.0, 1.2e-38, -2.0, 3e34)]
    program = jax.jit(lambda storage, scale: replace(q, storage=storage, scale=scale).dequantize())
    assert LOOP in program.lower(storage, scales[0]).compile().as_text()
    operations = jax.jit(lambda storage, scale: plain(replace(q, storage=storage, scale=scale)))
    for scale in scales:
        assert same_bits(program(storage, scale), operations(storage, scale))


def plain(q):
    q = q.unpacked()
    return affine.dequantize(q._coded(), spec=q._spec, b=get_backend("jax"))


@pytest.mark.parametrize(("dtype", "granularity"), [("int4", PerGroup(32)), ("float8_e4m3fn", PerChannel(0))])
def test_transformations_are_those_of_the_operations(dtype, granularity):
    q, seen = quantized((512, 544), dtype, granularity), jnp.asarray(np.random.default_rng(0).random((512, 544)))
    seen = seen.astype(jnp.float32)

    def of(values):
        return lambda s: values(replace(q, scale=s))

    for way in (
        lambda f: jax.grad(lambda s: (f(s) * seen).sum())(q.scale),
        lambda f: jax.jvp(f, (q.scale,), (jnp.ones_like(q.scale),))[1],
        lambda f: jax.vmap(f)(jnp.stack([q.scale, 2 * q.scale])),
        lambda f: jax.checkpoint(f)(q.scale),
        lambda f: jax.lax.map(f, jnp.stack([q.scale, 2 * q.scale])),
        lambda f: jax.linearize(f, q.scale)[1](q.scale),
        lambda f: jax.vmap(jax.grad(lambda s: f(s).sum()))(jnp.stack([q.scale, 2 * q.scale])),
    ):
        got, expected = (jax.jit(way, static_argnums=0)(of(values)) for values in (dequantize, plain))
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert loops_of_program(q.scale, lambda s: jax.value_and_grad(lambda s: of(dequantize)(s).max())(s)[0])


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


def test_few_codes_of_a_byte_are_left_to_xla():
    """It makes floats of them on the way; of packed ones it does not."""
    assert not loops_of_program(quantized((512, 512), "int8", PerGroup(32)))
    assert not loops_of_program(quantized((64, 512), "int4", PerGroup(32)))
    for granularity in (PerTensor(), PerBlock((64, 64))):
        assert loops_of_program(quantized((512, 576), "uint4", granularity, "affine"))


def test_large_arrays_outside_programs(few_bytes, monkeypatch):
    from aqt_lite.backends.jax import decoding, products

    made, form = [], decoding.dequantized
    monkeypatch.setattr(decoding, "dequantized", lambda *a, **k: made.append(form(*a, **k)) or made[-1])
    monkeypatch.setattr(products, "SMALLEST_FOR_XLA", 1 << 16)
    q = quantized((512, 512), "int4", PerGroup(32))
    assert same_bits(q.dequantize(), by_operations(q))
    assert same_bits(q.unpacked().dequantize(), by_operations(q))
    large = replace(q, scale=q.scale.at[3, 3].set(3e38))
    assert same_bits(large.dequantize(), by_operations(large))
    served, not_served = made[:2], made[2:]
    assert not any(unserved for _, unserved in served)
    assert not_served
    assert all(unserved for _, unserved in not_served)
