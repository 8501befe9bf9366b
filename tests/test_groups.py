"""Reproducible products with groups along the contracted axis, by compiled loops: the reference's bits on every way."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from optional import jax, jnp, needs, torch
from processors import run_without, run_without_avx_512
from test_dots import hard_rows

import aqt_lite
from aqt_lite import PerBlock, PerGroup, linear, quantize
from aqt_lite.backends.cpu import fixed_point, runtime, serve
from aqt_lite.ops import reference
from aqt_lite.testing import assert_same_bits

LOOPS = runtime.group_loops()
needs_loops = pytest.mark.skipif(
    LOOPS is None, reason="numba is missing: the operations themselves serve, tested there"
)

KINDS = {
    "int8": {"granularity": PerGroup(32)},
    "uint8, zero points, groups of 5": {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(5)},
    "int8, zero points, shared by rows": {"scheme": "affine", "granularity": PerBlock((3, 48))},
    "int8, one row of scales": {"granularity": PerBlock((-1, 512))},
    "int4": {"dtype": "int4", "granularity": PerGroup(32)},
    "int4, groups of 7": {"dtype": "int4", "granularity": PerGroup(7)},
    "uint4, zero points": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(128)},
    "e2m1, scales of 16 bits": {"dtype": "float4_e2m1fn", "granularity": PerGroup(16), "scale_dtype": "bfloat16"},
    "iq4_nl": {"dtype": "iq4_nl", "granularity": PerGroup(100)},
    "mxfp4": {"dtype": "mxfp4"},
    "nvfp4": {"dtype": "nvfp4"},
    "mxfp6": {"dtype": "mxfp6_e2m3"},
    "int3": {"dtype": "int3", "granularity": PerGroup(2)},
}


def weight(rows, columns, seed=0):
    """Of magnitudes that differ from group to group, some so much that a group does not count."""
    rng = np.random.default_rng(seed)
    spread = np.exp2(rng.integers(-6, 6, (rows, -(-columns // 16)))).repeat(16, axis=1)[:, :columns]
    spread[: rows // 8] **= 5
    return (rng.standard_normal((rows, columns)) * spread).astype(np.float32)


def without_kernels(x, q, bias):
    there = q.to_backend("array_api_strict")
    b = there._backend
    with np.errstate(all="ignore"):
        bias = None if bias is None else b.asarray(bias)
        return b.to_numpy(linear(b.asarray(x), there, bias, mode="reproducible"))


@pytest.fixture
def calls(monkeypatch):
    """How often the loops have given a product."""
    found, form = [], fixed_point.matmul_in_groups

    def counted(*arrays, **static):
        y = form(*arrays, **static)
        found.append(y is not NotImplemented)
        return y

    monkeypatch.setattr(fixed_point, "matmul_in_groups", counted)
    return found


@needs_loops
@pytest.mark.parametrize("kind", KINDS)
def test_the_loops_have_the_bits_of_the_reference(kind, calls):
    if not LOOPS.TABLES and KINDS[kind].get("dtype", "int8") not in ("int8", "uint8", "int3", "mxfp6_e2m3"):
        pytest.skip("the processor has no AVX2: codes of 4 bits are unpacked")
    q = quantize(weight(83, 330), **KINDS[kind])
    rng = np.random.default_rng(1)
    bias = (rng.standard_normal(83) * np.exp2(rng.integers(-130, 30, 83))).astype(np.float32)
    for m in (1, 2, 5, 13):
        x = hard_rows(rng, 13, 330)
        x[3] = np.where(rng.random(330) < 0.4, 0, x[3]) * np.exp2(rng.integers(-30, 0, 330))
        for rows in (x[i : i + m] for i in range(0, 13, m)):
            assert_same_bits(linear(rows, q, bias, mode="reproducible"), without_kernels(rows, q, bias))
    assert len(calls) > 20
    assert all(calls)


@needs_loops
def test_every_size_of_groups_and_of_rows(calls):
    rng = np.random.default_rng(2)
    for size, (n, k), m, dtype in [
        (2, (1, 3), 4, "int8"),
        (3, (16, 64), 9, "int4"),
        (31, (17, 65), 12, "uint8"),
        (64, (64, 128), 6, "int4"),
        (65, (65, 129), 130, "int4"),
        (511, (33, 1030), 3, "int4"),
        (512, (130, 1536), 8, "int8"),
    ]:
        q = quantize(weight(n, k), dtype, granularity=PerGroup(size))
        x = (rng.standard_normal((m, k)) * np.exp2(rng.integers(-20, 20, (m, k)))).astype(np.float32)
        assert_same_bits(linear(x, q, mode="reproducible"), without_kernels(x, q, None))
    half = rng.standard_normal((3, 256)).astype(np.float16)
    q = quantize(rng.standard_normal((90, 256)).astype(np.float32), "int4", granularity=PerGroup(32))
    y = linear(half, q, mode="reproducible")
    assert_same_bits(y, linear(half.astype(np.float32), q, mode="reproducible").astype(np.float16))
    assert calls == [True] * 9


@needs_loops
@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *[("int4", 32), ("float4_e2m1fn", 64), ("uint4", 128), ("iq4_nl", 256), ("int4", 16)],
        *[("uint8", 16), ("int8", 32), ("uint8", 64), ("uint8", 128), ("int8", 24)],
    ],
)
def test_one_row_and_runs_of_sixteen_groups(dtype, size, calls):
    """33 columns are two tiles and a row; 35 groups and a part of one are two runs and what is left."""
    rng = np.random.default_rng(size)
    k = 35 * size + size // 2
    scheme = "affine" if dtype.startswith("uint") else "symmetric"
    q = quantize(weight(33, k), dtype, scheme=scheme, granularity=PerGroup(size))
    signs = np.where(rng.random(q.scale.shape) < 0.5, -1, 1) * np.exp2(rng.integers(-70, 9, q.scale.shape))
    q = replace(q, scale=q.scale * signs.astype(np.float32))
    x = rng.standard_normal((6, k)).astype(np.float32)
    x[1] *= np.exp2(rng.integers(-12, 0, k)).astype(np.float32)
    x[2] = np.where(rng.random(k) < 0.5, np.float32(-127 / 64), np.float32(1e-41))
    x[3, 17 * size + 3] = 1e6  # a group that wants a second pass, in the second run of three
    x[4, [5, 34 * size, 35 * size]] = -1e5  # and in the others
    expected = without_kernels(x, q, None)
    for i in range(6):
        assert_same_bits(linear(x[i : i + 1], q, mode="reproducible"), expected[i : i + 1])
    assert_same_bits(linear(x, q, mode="reproducible"), expected)
    assert calls == [True] * 7


@needs_loops
@pytest.mark.parametrize("rows_of_scales", [40, 1])
@pytest.mark.parametrize("dtype", ["int4", "iq4_nl", "int8"])
def test_groups_that_just_count_and_groups_that_do_not(dtype, rows_of_scales, calls):
    """A group counts down to 2^-60 of the largest scale and power: loops ask of each group, or of none.

    40 columns are two tiles and a half; of 33 groups, the first has the largest scale and entries, whose sum is 0.
    """
    rng, size, k = np.random.default_rng(7), 32, 33 * 32
    q = quantize(rng.standard_normal((40, k)).astype(np.float32), dtype, granularity=PerGroup(size))
    x = np.where(rng.random((9, k)) < 0.1, 0, rng.uniform(1, 1.9, (9, k))).astype(np.float32)
    x[:, :size], x[:, 0], x[:, 1] = 0, 1.9, -1.9
    codes = np.array(q.qvalue)
    codes[:, 1] = codes[:, 0]
    x[:, 5 * size : 6 * size] = 0  # a group of zeros, which has no power
    x[3, 7 * size :] = 0
    for fall, drop in [(0, 0), (39, 20), (40, 20), (40, 21), (41, 20), (60, 0), (61, 0), (30, 30), (30, 31), (100, 9)]:
        scale = rng.uniform(1, 1.9, (rows_of_scales, 33)) * np.where(rng.random((rows_of_scales, 33)) < 0.5, -1, 1)
        scale[:, 1:] *= np.exp2(-rng.integers(max(fall - 2, 0), fall + 1, (rows_of_scales, 32)))
        blocks = PerGroup(size) if rows_of_scales == 40 else PerBlock((-1, size))
        spread = aqt_lite.QArray.from_codes(codes, scale.astype(np.float32), dtype=dtype, granularity=blocks)
        rows = x.copy()
        rows[:, size:] *= np.exp2(-rng.integers(max(drop - 2, 0), drop + 1, (9, 32)).repeat(size, axis=1))
        expected = without_kernels(rows, spread, None)
        for these in (slice(0, 9), slice(0, 1), slice(3, 4), slice(4, 6)):
            assert_same_bits(linear(rows[these], spread, mode="reproducible"), expected[these])
    assert calls == [True] * 40


@needs_loops
@pytest.mark.parametrize("size", [255, 256, 257, 512])
def test_strips_of_rows_whose_sums_are_wide_by_their_zero_points_alone(size, calls):
    """Beside others: whether two int32 are rounded at once is said strip by strip."""
    rng = np.random.default_rng(size)
    codes = rng.integers(0, 256, (70, 2 * size)).astype(np.uint8)
    codes[18:22], codes[40] = 255, 0
    zero = np.full((70, 2), 128, np.int32)
    zero[16:20], zero[40:44], zero[66] = 0, 255, 0
    scale = np.exp2(rng.integers(-9, 9, (70, 2))).astype(np.float32)
    q = aqt_lite.QArray.from_codes(codes, scale, zero, granularity=PerGroup(size))
    x = hard_rows(rng, 13, 2 * size)
    x[0] = 1.0  # all digits of a row alike, and all sums as far as they go
    for rows in (x[:1], x[1:2], x):
        assert_same_bits(linear(rows, q, mode="reproducible"), without_kernels(rows, q, None))
    assert calls == [True] * 3


@needs_loops
def test_the_largest_sums_are_exact():
    """512 products of the largest numbers there are: below 2^48, of which float32(high) keeps every bit."""
    codes = np.tile(np.asarray([[0], [255], [1]], np.uint8), (1, 512))
    scale, zero_point = np.ones((3, 1), np.float32), np.asarray([[255], [0], [255]], np.int32)
    q = aqt_lite.QArray.from_codes(codes, scale, zero_point, granularity=PerGroup(512))
    for value in (np.float32(127 / 64), np.nextafter(np.float32(127 / 64), np.float32(0)), np.float32(-1.0000001)):
        x = np.full((1, 512), value, np.float32)
        assert_same_bits(linear(x, q, mode="reproducible"), without_kernels(x, q, None))
    for zero in (300, 383, -100):  # no code's: whoever replaces them by others
        moved = replace(q, zero_point=np.full((3, 1), zero, np.int32))
        assert_same_bits(linear(x, moved, mode="reproducible"), without_kernels(x, moved, None))
    assert 127 / 64 * 2.0**reference.BITS * (128 + LOOPS.LARGEST_ZERO) * serve.LONGEST_GROUP < 2.0**48


@needs_loops
def test_the_largest_sums_of_digits_are_exact(calls):
    """Digits of -128 beside codes at the ends: what int32 holds of one digit's sum, and of two in one."""
    entry = np.float32((63 << 24) - (128 << 16) - (128 << 8) - 128)
    assert int(entry) == (63 << 24) - 128 * (1 + 256 + 65536)
    for size in (8, 256, 260, 264, 512):
        x = np.full((3, 1024), entry)
        x[1], x[2, ::2] = -entry, np.nextafter(entry, np.float32(0))
        ends = np.tile(np.asarray([[255], [0], [128]], np.uint8), (6, 1024))
        ends[:9, 1::3] = 0
        zero_point = np.full((18, -(-1024 // size)), 255, np.int32)
        unsigned = aqt_lite.QArray.from_codes(ends, np.ones_like(zero_point, np.float32), zero_point, dtype="uint8",
                                              granularity=PerGroup(size))  # fmt: skip
        wide = quantize(np.where(ends > 100, 1, -1).astype(np.float32), "iq4_nl", granularity=PerGroup(size))
        for q in (unsigned, wide):
            assert_same_bits(linear(x, q, mode="reproducible"), without_kernels(x, q, None))
    assert all(calls)
    assert len(calls) == 10


@needs_loops
def test_what_the_loops_do_not_serve_goes_to_the_reference(calls):
    x, q = weight(3, 64, seed=3), quantize(weight(20, 64), granularity=PerGroup(32))
    small = replace(q, scale=np.where(np.arange(20)[:, None] == 4, np.float32(1e-40), q.scale))
    assert_same_bits(linear(x, small, mode="reproducible"), without_kernels(x, small, None))
    assert calls == [False]
    long = quantize(weight(20, 1100), granularity=PerGroup(513))
    assert_same_bits(linear(weight(3, 1100), long, mode="reproducible"), without_kernels(weight(3, 1100), long, None))
    assert len(calls) == 1


@needs_loops
def test_constants_are_the_reference_s():
    for name in ("RUN", "SMALLEST", "SMALL", "MANY", "BITS"):
        assert getattr(LOOPS, name) == getattr(reference, name)
    assert 2.0**reference.LEAST_DROP == LOOPS.LEAST_DROP
    assert int(np.float32(reference.MOST_FRACTION).view(np.int32)) & 0x7FFFFF == LOOPS.MOST_FRACTION


@needs_loops
@needs("torch")
def test_torch_eager_compiled_and_with_derivatives(calls):
    for kind in ("int4", "uint8, zero points, groups of 5"):
        q, x = quantize(weight(83, 330), **KINDS[kind]), weight(5, 330, seed=4)
        expected = linear(x, q, mode="reproducible")
        there, t = q.to_backend("torch"), torch.from_numpy(x)
        calls.clear()
        assert_same_bits(linear(t, there, mode="reproducible"), expected)
        assert calls == [True]
        narrow = linear(t.to(torch.bfloat16), there, mode="reproducible")
        assert_same_bits(narrow, linear(t.to(torch.bfloat16).float(), there, mode="reproducible").to(torch.bfloat16))
        t.requires_grad_()
        y = linear(t, there, mode="reproducible")
        assert_same_bits(y.detach(), expected)
        y.sum().backward()
        torch.testing.assert_close(t.grad, there.dequantize().sum(0).expand(5, -1), rtol=1e-4, atol=1e-3)


@needs_loops
@needs("torch")
@pytest.mark.exhaustive  # compiles
def test_programs_of_torch_call_the_loops(calls):
    q, x = quantize(weight(420, 330), **KINDS["int4"]), weight(5, 330, seed=4)
    expected, there = linear(x, q, mode="reproducible"), q.to_backend("torch")
    torch.compiler.reset()
    compiled = torch.compile(lambda x, w: linear(x, w, mode="reproducible"), fullgraph=True, backend="aot_eager")
    calls.clear()
    assert_same_bits(compiled(torch.from_numpy(x), there), expected)
    assert calls == [True]

    class Product(torch.nn.Module):
        def forward(self, x):
            return linear(x, there, mode="reproducible")

    exported = torch.export.export(Product(), (torch.from_numpy(x),))
    assert "aqt_lite" not in str(exported.graph)
    assert_same_bits(exported.module()(torch.from_numpy(x)), expected)


@needs_loops
@needs("jax")
@pytest.mark.parametrize(
    "kind",
    ["int4", pytest.param("uint8, zero points, groups of 5", marks=pytest.mark.exhaustive)],  # compiles for long
)
def test_programs_of_jax_call_the_loops(kind):
    w, x = weight(420, 330), hard_rows(np.random.default_rng(5), 4, 330)
    q = quantize(w, **KINDS[kind])
    expected = linear(x, q, mode="reproducible")
    there, x = q.to_backend("jax"), jnp.asarray(x)

    def product(x, w=there):
        return linear(x, w, mode="reproducible")

    jitted = jax.jit(product)
    assert "@aqt_lite_group_product" in jitted.lower(x, there).as_text()
    assert_same_bits(jitted(x, there), expected)
    assert_same_bits(product(x), expected)
    exported = jax.export.export(jax.jit(lambda x: product(x)))(x)
    assert "@aqt_lite_group_product" not in exported.mlir_module()
    assert_same_bits(exported.call(x), expected)
    dx = jax.grad(lambda x: product(x).sum())(jnp.ones_like(x))
    np.testing.assert_allclose(dx, np.broadcast_to(q.dequantize().sum(0), dx.shape), rtol=1e-3, atol=1)


@needs_loops
@needs("jax")
@pytest.mark.exhaustive  # compiles for half a minute
def test_transformations_of_jax():
    w = weight(420, 330)
    q = quantize(jnp.asarray(w), "int4", granularity=PerGroup(32))
    x = jnp.asarray(weight(12, 330, seed=6).reshape(3, 4, 330))
    expected = jnp.stack([linear(part, q, mode="reproducible") for part in x])
    by_parts = jax.vmap(lambda x: linear(x, q, mode="reproducible"))
    assert_same_bits(by_parts(x), expected)
    assert "cond[" in str(jax.make_jaxpr(by_parts)(x))  # one condition for all rows: mapped, it would be both branches
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    assert_same_bits(jax.vmap(lambda w: linear(x[0], w, mode="reproducible"))(stacked)[1], expected[0])
    assert_same_bits(
        jax.lax.scan(lambda c, w: (c, linear(x[0], w, mode="reproducible")), 0, stacked)[1][0], expected[0]
    )
    with jax.disable_jit():
        assert_same_bits(linear(x[0], q, mode="reproducible"), expected[0])
    many = jnp.asarray(weight(300, 330, seed=7))
    y = jax.jit(lambda x: linear(x, q, mode="reproducible"))(many)
    assert_same_bits(y, linear(np.asarray(many), q.to_backend("numpy"), mode="reproducible"))
    for bad in (0.0, -0.0, float("nan")):
        y = jax.jit(lambda s: linear(x[0], replace(q, scale=s), mode="reproducible"))(q.scale.at[5, 2].set(bad))
        assert np.isnan(np.asarray(y)[:, 5]).all()
        assert np.isfinite(np.delete(np.asarray(y), 5, axis=1)).all()
    function = jax.jit(lambda s: linear(x[0], replace(q, scale=s), mode="reproducible"))
    zero = q.scale.at[5, 2].set(0.0)
    assert_same_bits(jax.export.export(function)(zero).call(zero), function(zero))


EXACT = [
    test_the_loops_have_the_bits_of_the_reference,
    test_every_size_of_groups_and_of_rows,
    test_one_row_and_runs_of_sixteen_groups,
    test_the_largest_sums_of_digits_are_exact,
    test_groups_that_just_count_and_groups_that_do_not,
]


@needs_loops
@pytest.mark.exhaustive  # compiles all loops anew, for another processor
def test_processors_without_avx_512():
    run_without_avx_512(
        __file__, EXACT, "(runtime.group_loops().LANES, runtime.group_loops().BITS_OF_DIGIT) == (8, 16)"
    )


@needs_loops
@pytest.mark.exhaustive  # compiles all loops anew, for another processor
def test_dot_products_of_shorts():
    """Those of bytes in vectors of 256 bits: test_dots and test_decoding."""
    if LOOPS.LANES != 16 or LOOPS.BITS_OF_DIGIT != 8:
        pytest.skip("the processor has no AVX-512 VNNI, whose other form this is")
    check = "(runtime.group_loops().LANES, runtime.group_loops().BITS_OF_DIGIT) == (16, 16)"
    run_without(("+avx512vnni",), __file__, EXACT, check)


@needs_loops
@pytest.mark.exhaustive  # compiles all loops anew, for another processor
def test_processors_without_dot_products():
    loops = [test_the_loops_have_the_bits_of_the_reference]
    run_without(("+avx",), __file__, loops, "not runtime.group_loops().DOTS", NUMBA_CPU_NAME="nehalem")
