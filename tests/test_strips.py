"""Exact products in groups with weights that lie (in, out), as they lie: the reference's bits."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from optional import jax, jnp, torch
from processors import run_without, run_without_avx_512
from programs import check_dense, check_transformations
from test_dots import hard_rows
from test_rows import weight, without_kernels

from aqt_lite import Codebook, Format, PerBlock, PerGroup, dense, linear, quantize
from aqt_lite.backends.cpu import fixed_point, runtime
from aqt_lite.formats import SCALE_FORMATS, element_type
from aqt_lite.testing import assert_same_bits

LOOPS = runtime.strip_loops()
needs_loops = pytest.mark.skipif(
    LOOPS is None, reason="the processor adds up no products of bytes, or numba is missing"
)

KINDS = {
    "int8": {"granularity": PerGroup(32, 0)},
    "uint8, zero points": {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(128, 0)},
    "int8, one scale for all columns": {"granularity": PerBlock((64, -1))},
    "int8, short groups": {"granularity": PerGroup(12, 0)},
    "int8, long groups": {"granularity": PerGroup(200, 0)},
    "int4": {"dtype": "int4", "granularity": PerGroup(32, 0)},
    "uint4, zero points": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(64, 0)},
    "float4_e2m1fn": {"dtype": "float4_e2m1fn", "granularity": PerGroup(32, 0)},
    "uint8, zero points, float16 scales": {
        "dtype": "uint8",
        "scheme": "affine",
        "granularity": PerGroup(32, 0),
        "scale_dtype": "float16",
    },
    "int4, bfloat16 scales": {"dtype": "int4", "granularity": PerGroup(32, 0), "scale_dtype": "bfloat16"},
    "mxint8": {"dtype": "mxint8", "granularity": PerGroup(32, 0)},
    "mxfp4": {"dtype": "mxfp4", "granularity": PerGroup(32, 0)},
    "nvfp4": {"dtype": "nvfp4", "granularity": PerGroup(16, 0)},
}

SHAPES = [(397, 829), (130, 2047), (2051, 130), (30_004, 11), (1024, 512)]
"""Of weights: not whole words, groups, blocks, tiles, strips or bytes, fewer columns than a tile; and all whole."""

CASES = [(shape, kind) for shape in SHAPES for kind in ("int8", "int4")]
CASES += [(SHAPES[0], kind) for kind in KINDS if kind not in ("int8", "int4")]


def counted(monkeypatch):
    """How often the loops have made a product."""
    calls, form = [], fixed_point._groups_of_columns

    def count(*given, **named):
        y = form(*given, **named)
        calls.append(y is not NotImplemented)
        return y

    monkeypatch.setattr(fixed_point, "_groups_of_columns", count)
    return calls


@needs_loops
@pytest.mark.parametrize(
    ("shape", "kind"), CASES, ids=[f"{inner}x{outputs}-{kind}" for (inner, outputs), kind in CASES]
)
def test_bits_of_the_reference(kind, shape, monkeypatch):
    rng, calls = np.random.default_rng(1), counted(monkeypatch)
    q = quantize(weight(*shape), **KINDS[kind])
    x, bias = hard_rows(rng, 13, shape[0]), rng.standard_normal(shape[1]).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    for m in (1, 2, 3, 13):
        found = [dense(x[i : i + m], q, bias, mode="reproducible") for i in range(0, 13, m)]
        assert_same_bits(np.concatenate(found), wanted)
    assert calls == [True] * (13 + 7 + 5 + 1)


@needs_loops
def test_more_rows_than_are_in_fixed_point_at_a_time():
    rng, q = np.random.default_rng(2), quantize(weight(200, 400), **KINDS["int4"])
    x = hard_rows(rng, 270, 200)
    assert_same_bits(dense(x, q, mode="reproducible"), without_kernels(dense, x, q))


@needs_loops
def test_the_largest_sums():
    """Of groups as long, with numbers as large, and entries of x as large as any that int32 might not hold."""
    for length, zero in itertools.product((128, 256, 512), (-128, 0, 127)):
        scale, zeros = np.ones((1024 // length, 128), np.float32), np.full((1024 // length, 128), zero, np.int32)
        told = {"granularity": PerGroup(length, 0), "scale": scale, "zero_point": zeros}
        q = quantize(np.full((1024, 128), 127 - zero, np.float32), "int8", **told)
        for entry in (np.float32(127 / 64), -np.float32(127 / 64), np.float32(-1.0039)):
            x = np.full((3, 1024), entry)
            assert_same_bits(dense(x, q, mode="reproducible"), without_kernels(dense, x, q))


def with_scale(q, odd):
    """The same with another scale somewhere."""
    scale = q.scale.copy()
    scale[3, 7] = odd
    return replace(q, scale=scale)


@needs_loops
def test_scales_that_loops_do_not_serve():
    """Subnormal or NaN; and those that they do: far apart in one column, or negative."""
    rng = np.random.default_rng(3)
    x = hard_rows(rng, 3, 256)
    for kind, odd in itertools.product(("int8", "int4"), (1e-40, np.nan, 2.0**-90, 2.0**90, -0.25)):
        q = with_scale(quantize(weight(256, 600), **KINDS[kind]), odd)
        assert_same_bits(dense(x, q, mode="reproducible"), without_kernels(dense, x, q))


@needs_loops
@pytest.mark.parametrize(
    "kind",
    [
        "int8",
        "uint8, zero points",
        "uint8, zero points, float16 scales",
        "uint4, zero points",
        "float4_e2m1fn",
        "mxfp4",
        "nvfp4",
    ],
)
def test_programs_of_jax(kind):
    rng = np.random.default_rng(1)
    q = quantize(weight(397, 829), **KINDS[kind])
    x, bias = hard_rows(rng, 13, 397), rng.standard_normal(829).astype(np.float32)
    wanted = without_kernels(dense, x, q, bias)
    check_dense(q, x, bias, wanted, "aqt_lite_group_product_in_out")
    check_transformations(q, x, bias, wanted)


SCALES_OF_SCALES = Format(
    "int8 with scales of scales",
    element_type("int8"),
    Format("their scales", element_type("int6"), SCALE_FORMATS["float16"], 8),
    32,
)

WITH_KEPT_SCALES = {
    "int8": ("int8", "float16"),
    "integers looked up": (Codebook("wholes", tuple(range(-100, 100))), "float16"),
    "int4": ("int4", "bfloat16"),
    "scales of scales": (SCALES_OF_SCALES, None),
}


@needs_loops
@pytest.mark.parametrize("kind", WITH_KEPT_SCALES)
@pytest.mark.parametrize("op", [dense, linear], ids=lambda op: op.__name__)
def test_kept_scales_of_zero_are_zero_everywhere(op, kind):
    """As blocks of zeros have them: these are of use, as a plain scale of 0 is not."""
    dtype, scale_dtype = WITH_KEPT_SCALES[kind]
    granularity, x = PerGroup(32, int(op is linear)), weight(3, 512)
    q = quantize(weight(512, 512), dtype, granularity=granularity, scale_dtype=scale_dtype)
    codes = np.array(q.scale.storage)
    codes[3] = 0
    q = replace(q, scale=replace(q.scale, storage=codes))
    wanted = without_kernels(op, x, q)
    assert np.isfinite(wanted).all()
    assert_same_bits(op(x, q, mode="reproducible"), wanted)
    x, there = jnp.asarray(x), q.to_backend("jax")
    assert_same_bits(op(x, there, mode="reproducible"), wanted)
    assert_same_bits(jax.jit(lambda x, q: op(x, q, mode="reproducible"))(x, there), wanted)


@needs_loops
def test_programs_of_jax_with_scales_that_loops_do_not_serve():
    for kind in ("int8", "int4"):
        x, q = weight(3, 397), with_scale(quantize(weight(397, 829), **KINDS[kind]), 2.0**-140)
        found = jax.jit(lambda x, q: dense(x, q, mode="reproducible"))(jnp.asarray(x), q.to_backend("jax"))
        assert_same_bits(found, without_kernels(dense, x, q))
        program = jax.jit(lambda s, x, q: dense(x, replace(q, scale=s), mode="reproducible"))
        for bad in (0.0, np.inf):
            y = program(jnp.asarray(with_scale(q, bad).scale), jnp.asarray(x), q.to_backend("jax"))
            assert np.isnan(y[:, 7]).all()
            assert np.isfinite(np.delete(np.asarray(y), 7, axis=1)).all()


@needs_loops
@pytest.mark.parametrize("kind", ["uint8, zero points", "int4", "nvfp4"])
def test_torch(kind, monkeypatch):
    rng, calls = np.random.default_rng(1), counted(monkeypatch)
    q = quantize(weight(397, 829), **KINDS[kind])
    x, bias = hard_rows(rng, 13, 397), rng.standard_normal(829).astype(np.float32)
    given = torch.from_numpy(x), q.to_backend("torch"), torch.from_numpy(bias)
    assert_same_bits(dense(*given, mode="reproducible"), without_kernels(dense, x, q, bias))
    assert calls == [True]


@needs_loops
def test_which_products(monkeypatch):
    """Weights in groups of whole words: others go by other forms, and have the same bits."""
    calls, x = counted(monkeypatch), weight(5, 397)
    for told in ({"granularity": PerGroup(30, 0)}, {"granularity": PerGroup(1024, 0)}):
        q = quantize(weight(397, 832), **told)
        assert_same_bits(dense(x, q, mode="reproducible"), without_kernels(dense, x, q))
    assert not any(calls)
    q = quantize(weight(397, 829), **KINDS["int4"])
    halves = x.astype(np.float16)
    wanted = without_kernels(dense, halves.astype(np.float32), q).astype(np.float16)
    assert_same_bits(dense(halves, q, mode="reproducible"), wanted)
    turned = quantize(np.asfortranarray(weight(397, 829)), **KINDS["int8"])
    assert_same_bits(dense(x, turned, mode="reproducible"), without_kernels(dense, x, turned))
    assert calls[-2:] == [True] * 2


BITS = [f"{test_bits_of_the_reference.__name__}[{shape[0]}x{shape[1]}-{kind}]" for shape, kind in CASES]


@needs_loops
@pytest.mark.exhaustive
def test_vectors_of_256_bits():
    run_without("+no feature", __file__, BITS, "runtime.group_loops().LANES == 8", also=["+prefer-256-bit"])


@needs_loops
@pytest.mark.exhaustive
def test_processors_with_avx2_alone():
    run_without_avx_512(__file__, BITS, "runtime.group_loops().BITS_OF_DIGIT == 16")
