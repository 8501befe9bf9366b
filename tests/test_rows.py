"""Weights whose codes become rows of bytes before exact products sum along them: the reference's bits, on every way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from optional import jax, jnp, torch
from processors import run_without_avx_512
from programs import check_dense
from test_dots import hard_rows

from aqt_lite import Codebook, PerBlock, PerChannel, PerGroup, PerTensor, QArray, dense, linear, packing, quantize
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import rows, runtime
from aqt_lite.formats import element_type
from aqt_lite.testing import assert_same_bits

LOOPS = runtime.whole_loops()
needs_loops = pytest.mark.skipif(
    LOOPS is None, reason="numba or vectors are missing: the reference serves, tested there"
)

IN, OUT = 397, 339
"""Of weights that are just large enough for the loops, and no multiple of anything that they do at a time."""

KINDS = {
    "int8": {"granularity": PerChannel(1)},
    "int8, one scale": {"granularity": PerTensor()},
    "uint8, zero points": {"dtype": "uint8", "scheme": "affine", "granularity": PerChannel(1)},
    "uint8, zero points, groups": {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(33, 0)},
    "int8, zero points, shared by columns": {"scheme": "affine", "granularity": PerBlock((48, 3))},
    "int8, a scale an input": {"granularity": PerChannel(0)},
    "int8, zero points, a scale an input": {"scheme": "affine", "granularity": PerChannel(0)},
    "int4": {"dtype": "int4", "granularity": PerChannel(1)},
    "int4, groups": {"dtype": "int4", "granularity": PerGroup(32, 0)},
    "int4, a scale an input": {"dtype": "int4", "granularity": PerChannel(0)},
    "uint4, zero points, groups of 7": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(7, 0)},
    "int3": {"dtype": "int3", "granularity": PerChannel(1)},
    "uint6, zero points": {"dtype": "uint6", "scheme": "affine", "granularity": PerChannel(1)},
    "e2m1, scales of 16 bits": {"dtype": "float4_e2m1fn", "granularity": PerGroup(16, 0), "scale_dtype": "bfloat16"},
    "e2m1, one scale": {"dtype": "float4_e2m1fn", "granularity": PerTensor()},
    "iq4_nl": {"dtype": "iq4_nl", "granularity": PerChannel(1)},
    "integers looked up": {"dtype": Codebook("wholes", tuple(range(-100, 100))), "granularity": PerGroup(32, 0)},
    "int8, scales of 16 bits": {"granularity": PerGroup(16, 0), "scale_dtype": "float16"},
    "mxint8": {"dtype": "mxint8", "granularity": PerGroup(32, 0)},
    "groups longer than the loops'": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(350, 0)},
}


def weight(*shape):
    rng = np.random.default_rng(0)
    return (rng.standard_normal(shape) * np.exp2(rng.integers(-3, 3, shape))).astype(np.float32)


def without_kernels(product, x, q, bias=None):
    there = q.to_backend("array_api_strict")
    b = there._backend
    with np.errstate(all="ignore"):
        bias = None if bias is None else b.asarray(bias)
        return b.to_numpy(product(b.asarray(x), there, bias, mode="reproducible"))


@needs_loops
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_out_have_the_bits_of_the_reference(kind):
    rng = np.random.default_rng(1)
    q = quantize(weight(IN, OUT), **KINDS[kind])
    x, bias = hard_rows(rng, 19, IN), rng.standard_normal(OUT).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    for m in (1, 5, 19):
        found = [dense(x[i : i + m], q, bias, mode="reproducible") for i in range(0, 19, m)]
        assert_same_bits(np.concatenate(found), wanted)
    assert_same_bits(linear(x, q.T, bias, mode="reproducible"), wanted)
    assert_same_bits(dense(x, q.for_dense(), bias, mode="reproducible"), wanted)


OF_PROGRAMS = [
    "int8",
    "uint8, zero points, groups",
    "int4",
    "int8, a scale an input",
    "uint4, zero points, groups of 7",
    "e2m1, one scale",
]


of_every_run = pytest.mark.exhaustive_unless(kind=OF_PROGRAMS[:3])  # others compile for seconds


@needs_loops
@of_every_run
@pytest.mark.parametrize("kind", OF_PROGRAMS)
def test_programs_of_jax(kind):
    rng = np.random.default_rng(1)
    q = quantize(weight(IN, OUT), **KINDS[kind])
    x, bias = hard_rows(rng, 9, IN), rng.standard_normal(OUT).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    check_dense(q, x, bias, wanted, "aqt_lite_whole_numbers")


@needs_loops
@of_every_run
@pytest.mark.parametrize("kind", OF_PROGRAMS)
def test_torch_eager_and_compiled(kind):
    rng = np.random.default_rng(1)
    q = quantize(weight(IN, OUT), **KINDS[kind])
    x, bias = hard_rows(rng, 9, IN), rng.standard_normal(OUT).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    there, x, bias = q.to_backend("torch"), torch.from_numpy(x), torch.from_numpy(bias)

    def product(x, q, bias):
        return dense(x, q, bias, mode="reproducible")

    assert_same_bits(product(x, there, bias), wanted)
    assert_same_bits(torch.compile(product, fullgraph=True, backend="aot_eager")(x, there, bias), wanted)
    x.requires_grad_(True)
    y = product(x, there, bias)
    assert_same_bits(y.detach(), wanted)
    y.sum().backward()
    np.testing.assert_allclose(x.grad[0], q.dequantize().sum(axis=1), rtol=1e-4, atol=1e-4)


# ---- fast products of weights that have a scale for each input, and of codes that no loop multiplies

SINGLE = {
    "int8": {"granularity": PerChannel(1)},
    "int8, zero points": {"scheme": "affine", "granularity": PerChannel(1)},
    "int8, groups of outputs": {"granularity": PerGroup(32, 0)},
    "uint8, zero points, groups of outputs": {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(7, 0)},
    "int4": {"dtype": "int4", "granularity": PerChannel(1)},
    "uint4, zero points": {"dtype": "uint4", "scheme": "affine", "granularity": PerChannel(1)},
    "nf4, groups of outputs": {"dtype": "nf4", "granularity": PerGroup(50, 0)},
    "float8": {"dtype": "float8_e4m3fn", "granularity": PerChannel(1)},
    "scales that are codes": {
        "dtype": "float4_e2m1fn",
        "granularity": PerGroup(16, 0),
        "scale_dtype": "float8_e8m0fnu",
    },
    "int16": {"dtype": "int16", "granularity": PerGroup(8)},
    "int16, columns": {"dtype": "int16", "granularity": PerChannel(1)},
    "uint16, zero points, columns in groups": {"dtype": "uint16", "scheme": "affine", "granularity": PerGroup(9, 0)},
}


def products(x, q, bias, backend, product):
    """Eager and compiled."""
    b = q.to_backend(backend)._backend
    given = b.asarray(x), q.to_backend(backend), b.asarray(bias)
    yield b.to_numpy(product(*given))
    if backend == "jax":
        yield b.to_numpy(jax.jit(product)(*given))


def root_mean_square(x):
    return np.sqrt(np.mean(np.square(x)))


@needs_loops
@pytest.mark.exhaustive_unless(kind=["int8", "uint4, zero points", "nf4, groups of outputs", "int16, columns"])
@pytest.mark.parametrize("backend", ["numpy", "jax", "torch"])
@pytest.mark.parametrize("kind", SINGLE)
def test_fast_products_err_as_float32_does(kind, backend):
    rng = np.random.default_rng(2)
    q = quantize(weight(OUT, IN), **SINGLE[kind])
    bias = rng.standard_normal(OUT).astype(np.float32)
    for m in (1, 3, 20):
        x = (rng.standard_normal((m, IN)) * np.exp2(rng.integers(-6, 6, (m, IN)))).astype(np.float32)
        x[0, :5] = 0, 1e-42, 1e5, -1e-12, 0  # subnormal: scales do not meet it in x
        values = q.dequantize()
        wanted = x.astype(np.float64) @ values.T.astype(np.float64) + bias
        b = q.to_backend(backend)._backend
        room = 2 * root_mean_square(b.to_numpy(b.asarray(x) @ b.asarray(values.T)) + bias - wanted)
        for y in [*products(x, q, bias, backend, linear), *products(x, q.T, bias, backend, dense)]:
            assert y.dtype == np.float32
            assert root_mean_square(y - wanted) <= room


@needs_loops
@pytest.mark.parametrize("backend", ["numpy", "jax", "torch"])
@pytest.mark.parametrize(("of_x", "of_scales"), [(1e30, 1e30), (1e-30, 1e-20), (1e-30, 1e34), (1e35, 1e-37)])
def test_scales_that_x_cannot_take_are_not_multiplied_into_it(of_x, of_scales, backend):
    """``x * scale`` would be infinite, or lose bits, where what it stands for is neither."""
    rng = np.random.default_rng(3)
    codes = rng.integers(-127, 128, (OUT, IN)).astype(np.int8)
    codes[:, 0] = 0
    scale = np.full((1, IN), 1.0, np.float32)
    scale[0, :1] = of_scales
    x = rng.standard_normal((3, IN)).astype(np.float32)
    x[:, :1] = of_x
    q = QArray.from_codes(codes, scale, granularity=PerChannel(1))
    wanted = x.astype(np.float64) @ q.dequantize().T.astype(np.float64)
    for y in products(x, q, np.zeros(OUT, np.float32), backend, linear):
        np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-2)


@needs_loops
@pytest.mark.exhaustive_unless(dtype=["int8", "float8_e5m2"])
@pytest.mark.parametrize("backend", ["numpy", "jax", "torch"])
@pytest.mark.parametrize(
    ("dtype", "code"), [("int8", 127), ("int4", 7), ("float8_e4m3fn", 0x7E), ("float8_e5m2", 0x7B), ("int16", 32767)]
)
def test_values_that_dequantizing_clips_are_clipped_in_products(dtype, code, backend):
    """Of a scale so large that codes stand for more than float32 has; x is so small that the product is not."""
    codes = np.full((OUT, IN), code, np.int16 if dtype == "int16" else np.uint8 if "float" in dtype else np.int8)
    scale = np.full((1, IN), 1e-3, np.float32)
    scale[0, 0] = 8e37
    x = np.full((2, IN), 1e-3, np.float32)
    x[:, 0] = 1e-20
    q = QArray.from_codes(codes, scale, dtype=dtype, granularity=PerChannel(1))
    wanted = x.astype(np.float64) @ q.dequantize().T.astype(np.float64)
    for y in [
        *products(x, q, np.zeros(OUT, np.float32), backend, linear),
        *products(x, q.T, np.zeros(OUT, np.float32), backend, dense),
    ]:
        np.testing.assert_allclose(y, wanted, rtol=1e-5)


@needs_loops
@pytest.mark.parametrize("backend", ["numpy", "jax", "torch"])
def test_infinite_codes_with_a_scale_for_each_input(backend):
    codes = np.full((OUT, IN), 0x3C, np.uint8)
    codes[0, 0], codes[1, 1] = 0x7C, 0xFC  # of e5m2, infinities, which dequantizing clips
    q = quantize(np.ones((OUT, IN), np.float32), "float8_e5m2", granularity=PerChannel(1))
    q = replace(q, storage=codes.view(q.storage.dtype), scale=np.full((1, IN), 0.25, np.float32))
    x = np.full((1, IN), 0.125, np.float32)
    wanted = x.astype(np.float64) @ q.dequantize().T.astype(np.float64)
    for y in products(x, q, np.zeros(OUT, np.float32), backend, linear):
        np.testing.assert_allclose(y, wanted, rtol=1e-5)


@needs_loops
def test_streams_that_are_too_short_are_refused_and_not_read_beyond():
    q = replace(quantize(weight(1000, 2000), "int4"), packed_length=64_000)
    for unpack in (lambda: q.qvalue, q.unpacked, q.dequantize):
        with pytest.raises(ValueError, match="should have 32000 bytes there, not 1000"):
            unpack()
    assert rows.unpacked(q.storage, 4, 64_000, True) is NotImplemented


@needs_loops
@pytest.mark.parametrize(
    "shape", [(IN, OUT), (1 << 18,), (3, 1 << 17), ((1 << 18) + 3,), (2, 70_001), (1 << 15, 8), (5, 3, 9999)]
)
@pytest.mark.exhaustive_unless(bits=[3, 4])
@pytest.mark.parametrize("bits", range(2, 8))
def test_streams_are_unpacked_by_loops(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint8)
    half = 1 << (bits - 1)
    b = get_backend("numpy")
    stream = packing.pack(codes, bits=bits, b=b)
    assert_same_bits(rows.unpacked(stream, bits, shape[-1], False), codes)
    signed = ((codes ^ half).astype(np.int16) - half).astype(np.int8)
    assert_same_bits(rows.unpacked(stream, bits, shape[-1], True), signed)
    assert_same_bits(packing.unpack(stream, bits=bits, length=shape[-1], signed=True, b=b), signed)


@needs_loops
@pytest.mark.exhaustive_unless(kind=["int8", "int4"])
@pytest.mark.parametrize("shape", [(2, 70_001), (70_001, 2), (131_073, 1), (1, 131_073)])
@pytest.mark.parametrize("kind", ["int8", "int4", "int3", "e2m1, one scale"])
def test_long_rows_and_columns(kind, shape):
    """Of more codes than become floats at a time, and of more than a piece of a product has."""
    rng = np.random.default_rng(5)
    q = quantize(weight(*shape), **KINDS[kind] | {"granularity": PerTensor()})
    for product, inner in ((dense, shape[0]), (linear, shape[1])):
        x = rng.standard_normal((2, inner)).astype(np.float32)
        assert_same_bits(product(x, q, mode="reproducible"), without_kernels(product, x, q))


@needs_loops
def test_integers_of_a_byte_in_rows_are_not_copied():
    """Fast products of JAX with a scale for each input read them where they are."""
    q = quantize(weight(OUT, IN), granularity=PerChannel(1))
    x = jnp.asarray(np.random.default_rng(3).standard_normal((2, IN)).astype(np.float32))
    text = jax.jit(linear).lower(x, q.to_backend("jax")).as_text()
    assert "aqt_lite_whole_numbers" not in text
    assert rows.in_bytes(q.qvalue, element_type("int8"), IN, packed=False) is q.qvalue


@needs_loops
@pytest.mark.exhaustive
def test_processors_without_avx_512():
    some = [f"{test_weights_in_out_have_the_bits_of_the_reference.__name__}[{kind}]" for kind in OF_PROGRAMS]
    tests = [*some, test_streams_are_unpacked_by_loops]
    run_without_avx_512(__file__, tests, "runtime.whole_loops().LANES == 8")
