"""Products by the processor's int8 dot products: exact, and the reference's bits on every way that leads to them."""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import emulated
import numpy as np
import pytest
from optional import WITHOUT as LEFT_OUT
from optional import jax, jnp, needs, torch
from processors import run_without, run_without_avx_512

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerTensor, affine
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import fixed_point, integers, runtime
from aqt_lite.backends.jax import products as jax_products
from aqt_lite.elements import float_type
from aqt_lite.formats import FORMATS
from aqt_lite.ops import reference
from aqt_lite.testing import assert_same_bits

HAS_DOTS = runtime.integer_dots() is not None
needs_dots = pytest.mark.skipif(not HAS_DOTS, reason="no numba, or no dot products: other forms serve, tested there")

ROWS = [1, 2, 4, 5, 8, 9, 16, 17, 30, 33, 70]


@needs_dots
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("kind", ["int32", "int8"])
def test_integer_products_are_exact(rows, kind):
    rng = np.random.default_rng(rows)
    least, most = np.iinfo(kind).min, min(np.iinfo(kind).max, runtime.integer_dots().LARGEST)
    for n, k in itertools.product([1, 5, 6, 97, 200], [1, 3, 4, 63, 64, 65, 129, 4100]):
        x = rng.integers(least, most, (rows, k), endpoint=True).astype(kind)
        w = rng.integers(-128, 128, (n, k)).astype(np.int8)
        exact = x.astype(np.int64) @ w.astype(np.int64).T
        for codes in (w, np.asfortranarray(w), w.view(np.uint8) ^ 128):  # uint8 codes count as 128 less
            np.testing.assert_array_equal(integers.exact_matmul(x, codes), exact)


@needs_dots
@pytest.mark.parametrize("rows", [1, 3, 7, 20])
def test_the_longest_sums_of_the_largest_products_do_not_overflow(rows):
    """Of either digit, of 8 bits or of 16; and integers that have no two signed digits of 16."""
    k, largest = reference.LONGEST_PIECE, runtime.integer_dots().LARGEST
    assert largest >= 127 / 64 * 2**reference.BITS  # those of fixed point
    extremes = [largest, -(2**31), (1 << 15) - 1, 1 << 15, -(1 << 15), -(1 << 15) - 1, (1 << 30) - (1 << 15), 2**31 - 1]
    for x, w in itertools.product(extremes, [-128, 127]):
        y = integers.exact_matmul(np.full((rows, k), x, np.int32), np.full((7, k), w, np.int8))
        assert (y == x * w * k).all()


@needs_dots
def test_more_rows_than_are_in_memory_at_a_time():
    rng = np.random.default_rng(0)
    x = rng.integers(-(2**31), 2**31, (1043, 70)).astype(np.int32)
    w = rng.integers(-128, 128, (9, 70)).astype(np.int8)
    np.testing.assert_array_equal(integers.exact_matmul(x, w), x.astype(np.int64) @ w.astype(np.int64).T)


def hard_rows(rng, m, k):
    """Rows of every kind that the fixed-point form tells apart."""
    x = rng.standard_normal((m, k)).astype(np.float32)
    for row, change in zip(
        itertools.islice(itertools.cycle(range(m)), 12),
        [
            lambda r: r * 0,
            lambda r: np.full_like(r, 1e-42),  # subnormal
            lambda r: np.where(np.arange(k) == 0, 1e-40, r),
            lambda r: np.where(np.arange(k) == 1, np.nextafter(np.float32(2), np.float32(0)), r / 8),
            lambda r: np.where(np.arange(k) == 1, np.float32(127 / 64), r / 8),
            lambda r: np.where(np.arange(k) == 1, np.nextafter(np.float32(127 / 64), np.float32(2)), r / 8),
            lambda r: r * np.float32(1e37),
            lambda r: r * np.float32(1e-37),
            lambda r: np.where(np.arange(k) == 2, np.float32(1e6), r),  # wants a second pass
            lambda r: np.where(np.arange(k) == 2, np.float32(1e30), r),  # does not fit
            lambda r: np.where(np.arange(k) == 3, np.float32("nan"), r),
            lambda r: np.where(np.arange(k) == 3, np.float32("-inf"), r),
        ],
        strict=True,
    ):
        x[row] = change(x[row])
    return x.astype(np.float32)


def by_the_reference(x, q, bias, contract=1):
    """The same product without any kernel."""
    spec = affine.Spec(FORMATS[q.dtype], float_type(q.float_dtype), q.block)
    arguments = (x, q.qvalue, q.scale, q.zero_point, bias)
    b = get_backend("array_api_strict")
    x, *weight, bias = [None if a is None else b.asarray(np.ascontiguousarray(a)) for a in arguments]
    with np.errstate(all="ignore"):
        y = reference.matmul_reproducible(x, affine.Coded(*weight), bias, spec=spec, contract=contract, b=b)
    return b.to_numpy(y)


FORMS = {
    "numpy": lambda x, q, bias: aqt_lite.linear(x, q, bias, mode="reproducible"),
    "torch": lambda x, q, bias: aqt_lite.linear(
        torch.from_numpy(x), q.to_backend("torch"), torch.from_numpy(bias), mode="reproducible"
    ),
    "jax": lambda x, q, bias: aqt_lite.linear(
        jnp.asarray(x), q.to_backend("jax"), jnp.asarray(bias), mode="reproducible"
    ),
}


@pytest.fixture(params=["with dots", "without"])
def dots(request, monkeypatch):
    """Every kernel with and without the instruction; compiled functions of JAX remember which, and are dropped."""
    if request.param == "without":
        if "torch" not in LEFT_OUT:
            importlib.import_module("aqt_lite.backends.torch.products")  # which asks once, for its operators
        monkeypatch.setattr(runtime, "integer_dots", lambda: None)
        monkeypatch.setattr(jax_products, "integer_dots", lambda: None)
    elif not HAS_DOTS:
        pytest.skip("the processor has no dot products of bytes")
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


@pytest.mark.exhaustive_where(dots="without", form="torch")
@pytest.mark.exhaustive_where(form="jax", dtype="int8")  # each compiles for seconds
@pytest.mark.exhaustive_where(form="jax", granularity=PerBlock((7, -1)))
@pytest.mark.exhaustive_where(dots="without", form="jax")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "scheme", "granularity"),
    [
        ("int8", "symmetric", PerChannel(0)),
        ("uint8", "affine", PerChannel(0)),
        ("int8", "affine", PerTensor()),
        ("uint8", "symmetric", PerBlock((7, -1))),
    ],
    ids=str,
)
def test_every_form_has_the_bits_of_the_reference(form, dots, dtype, scheme, granularity):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((260, 330)).astype(np.float32) * np.exp2(rng.integers(-30, 30, (260, 1)))
    q = aqt_lite.quantize(w.astype(np.float32), dtype, scheme=scheme, granularity=granularity)
    bias = (rng.standard_normal(260) * np.exp2(rng.integers(-130, 30, 260))).astype(np.float32)
    for m in (1, 3, 8, 21) if form != "jax" else (1, 3, 21):
        x = hard_rows(rng, 12, 330)
        for rows in (x[i : i + m] for i in range(0, 12, m)):
            assert_same_bits(np.asarray(FORMS[form](rows, q, bias)), by_the_reference(rows, q, bias))


@needs_dots
@pytest.mark.parametrize("form", FORMS)
def test_rows_with_an_outlier_get_their_second_pass_from_the_loops(form, monkeypatch):
    """Of 530 rows 515 are in the second half of what is in memory at a time; five panels of 34 have such a row."""
    rng = np.random.default_rng(11)
    w = (rng.standard_normal((230, 300)) * np.exp2(rng.integers(-20, 20, (230, 1)))).astype(np.float32)
    q = aqt_lite.quantize(w, "uint8", scheme="affine", granularity=PerChannel(0))
    x = rng.standard_normal((530, 300)).astype(np.float32)
    outlying, bias = [3, 20, 21, 40, 515, 529], np.zeros(230, np.float32)
    x[outlying, np.arange(6)] = [1e5, -1e6, 3e7, 1e4, 1e5, 1e5]
    x[[20, 21], 7] = np.nan, 1e-40
    expected = by_the_reference(x, q, bias)
    if form != "jax":  # which is traced with both
        monkeypatch.setattr(reference, "_times_columns", None)
    assert_same_bits(np.asarray(FORMS[form](x, q, bias)), expected)
    if form != "jax":
        for rows in (slice(3, 4), slice(20, 21), slice(38, 43)):
            assert_same_bits(np.asarray(FORMS[form](x[rows], q, bias)), expected[rows])


@pytest.mark.exhaustive_where(form="jax", mode="fast")  # each compiles for seconds
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["fast", "reproducible"])
def test_nan_and_infinities_of_the_bias_are_seen(form, dots, mode):
    rng, b = np.random.default_rng(7), get_backend(form)
    q = aqt_lite.quantize(rng.standard_normal((450, 320)).astype(np.float32), granularity=PerChannel(0))
    bias = np.zeros(450, np.float32)
    bias[:3] = np.nan, np.inf, -np.inf
    for m in (1, 4, 20):
        x = b.asarray(rng.standard_normal((m, 320)).astype(np.float32))
        y = b.to_numpy(aqt_lite.linear(x, q.to_backend(form), b.asarray(bias), mode=mode))
        assert np.isnan(y[:, 0]).all()
        assert (y[:, 1] == np.inf).all()
        assert (y[:, 2] == -np.inf).all()
        assert np.isfinite(y[:, 3:]).all()


def test_a_traced_scale_that_is_nan_is_loud_in_products(weight, dots):
    nan = jnp.where(jnp.arange(300)[:, None] == 5, jnp.nan, weight.scale)
    bad = aqt_lite.QArray(weight.storage, nan, None, "int8", weight.block)
    for mode in ("fast", "reproducible"):
        y = np.asarray(jax.jit(lambda x, q, mode=mode: aqt_lite.linear(x, q, mode=mode))(activations(3, 320), bad))
        assert np.isnan(y[:, 5]).all()
        assert np.isfinite(np.delete(y, 5, axis=1)).all()


def test_exported_programs_keep_the_smallest_scales(weight):
    tiny = aqt_lite.QArray(weight.storage, jnp.full((300, 1), 2.0**-120, jnp.float32), None, "int8", weight.block)
    x = activations(3, 320) * jnp.float32(2.0**60)
    function = jax.jit(lambda x: aqt_lite.linear(x, tiny, mode="reproducible"))
    assert_same_bits(jax.export.export(function)(x).call(x), function(x))
    assert np.abs(np.asarray(function(x))).max() > 0


@pytest.mark.exhaustive_where(form="jax", dtype="float16")  # compiles
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_activations(form, dots, dtype):
    rng, b = np.random.default_rng(2), get_backend(form)
    q = aqt_lite.quantize(rng.standard_normal((270, 320)).astype(np.float32), granularity=PerChannel(0))
    x = rng.standard_normal((5, 320)).astype(get_backend("numpy").dtype(dtype))
    here, bias = q.to_backend(form), b.asarray(rng.standard_normal(270).astype(x.dtype))
    exact = by_the_reference(x.astype(np.float32), q, b.to_numpy(bias).astype(np.float32))
    for mode in ("fast", "reproducible"):
        y = b.to_numpy(aqt_lite.linear(b.asarray(x), here, bias, mode=mode))
        assert y.dtype == x.dtype
        if mode == "reproducible":
            assert_same_bits(y, exact.astype(x.dtype))
        np.testing.assert_allclose(y.astype(np.float64), exact, rtol=2.0**-7, atol=0.02)


# ---- inside JAX's programs


@pytest.fixture
def weight():
    rng = np.random.default_rng(3)
    w = rng.standard_normal((300, 320)).astype(np.float32)
    return aqt_lite.quantize(w, granularity=PerChannel(0)).to_backend("jax")


def activations(*shape):
    return jnp.asarray(np.random.default_rng(4).standard_normal(shape).astype(np.float32))


@needs_dots
def test_a_jitted_product_calls_the_compiled_loops_and_an_exported_one_does_not(weight):
    x = activations(3, 320)
    function = jax.jit(lambda x, w: aqt_lite.linear(x, w, mode="reproducible"))
    assert "@aqt_lite_fixed_point_product" in function.lower(x, weight).as_text()
    exported = jax.export.export(jax.jit(lambda x: function(x, weight)))(x)
    assert "@aqt_lite_fixed_point_product" not in exported.mlir_module()
    assert_same_bits(exported.call(x), function(x, weight))


@pytest.mark.exhaustive  # a quarter of a minute; test_jax and test_decoding have some of either mode
@pytest.mark.parametrize(("dots", "mode"), [("with", "reproducible"), ("without", "fast")], indirect=["dots"])
def test_transformations_of_jax(weight, dots, mode):
    x = activations(4, 3, 320)

    def product(x, w=weight):
        return aqt_lite.linear(x, w, mode=mode)

    expected = jnp.stack([product(row) for row in x])
    assert_same_bits(jax.vmap(product)(x), expected)
    assert_same_bits(jax.vmap(product, in_axes=2, out_axes=2)(jnp.moveaxis(x, 0, 2)), jnp.moveaxis(expected, 0, 2))
    assert_same_bits(jax.lax.map(product, x), expected)
    assert_same_bits(jax.lax.scan(lambda c, row: (c, product(row)), 0, x)[1], expected)
    layers = jax.tree.map(lambda *a: jnp.stack(a), *[weight] * 4)
    assert_same_bits(jax.vmap(product)(x, layers), expected)
    assert_same_bits(jax.vmap(product, in_axes=(None, 0))(x[0], layers), jnp.stack([expected[0]] * 4))
    scanned = jax.lax.scan(lambda c, both: (c, product(*both)), 0, (x, layers))[1]
    assert_same_bits(scanned, expected)
    dy = activations(3, 300)
    gradient = jax.grad(lambda x: (product(x) * dy).sum())(x[0])
    np.testing.assert_allclose(gradient, dy @ weight.dequantize(), rtol=1e-4, atol=1e-4)
    with jax.disable_jit():
        assert_same_bits(product(x[0]), expected[0])


@needs_dots
def test_many_products_at_once(weight):
    """In one program, whose parts XLA may run side by side, and from several threads: no thread waits for another."""
    x = activations(16, 2, 320)

    @jax.jit
    def many(x, w):
        return [aqt_lite.linear(row, w, mode="reproducible") for row in x]

    expected = [np.asarray(y) for y in many(x, weight)]

    def work(seed):
        return all(np.array_equal(a, b) for _ in range(20) for a, b in zip(many(x, weight), expected, strict=True))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8), timeout=300))
    for one, y in zip(x, expected, strict=True):
        assert_same_bits(aqt_lite.linear(one, weight, mode="reproducible"), y)


WITHOUT = """
import sys
sys.modules["numba"] = None
import numpy as np, jax, aqt_lite
from aqt_lite import PerChannel
from aqt_lite.backends.cpu import runtime
assert runtime.compiled_loops() is None and runtime.integer_dots() is None
w = np.random.default_rng(0).standard_normal((400, 500)).astype("float32")
x = np.random.default_rng(1).standard_normal((3, 500)).astype("float32")
q = aqt_lite.quantize(w, granularity=PerChannel(0))
y = aqt_lite.linear(x, q, mode="reproducible")
for name in ("jax", "torch"):
    b = __import__("aqt_lite._registry", fromlist=["x"]).get_backend(name)
    z = b.to_numpy(aqt_lite.linear(b.asarray(x), q.to_backend(name), mode="reproducible"))
    assert (z.view("int32") == y.view("int32")).all(), name
print(y.tobytes().hex()[:4000])
"""


@pytest.mark.exhaustive  # in a process of its own
@needs("torch")
def test_without_numba_the_bits_are_the_same():
    runs = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            check=True,
            capture_output=True,
            text=True,
            env=dict(os.environ),
        ).stdout
        for code in (
            WITHOUT,
            WITHOUT.replace('sys.modules["numba"] = None\n', "").replace("assert runtime", "0 and runtime"),
        )
    ]
    assert runs[0] == runs[1] != ""


def test_a_processor_that_numba_takes_for_another_has_no_such_instruction():
    code = "from aqt_lite.backends.cpu import runtime as k; assert k.compiled_loops() and k.integer_dots() is None"
    environment = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# ---- inside what torch.compile makes


@pytest.fixture(scope="module")
def large_weight():
    """Large enough for the operator."""
    return aqt_lite.quantize(
        torch.from_numpy(hard_rows(np.random.default_rng(5), 1100, 1000)[12:]), granularity=PerChannel(0)
    )


@pytest.mark.exhaustive  # ten seconds; test_torch has a compiled product
@pytest.mark.exhaustive_where(mode="fast")
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"
)  # dynamo's
@pytest.mark.parametrize("mode", ["fast", "reproducible"])
def test_compiled_torch_products_are_one_call_with_the_same_bits(large_weight, mode):
    q, bias = large_weight, torch.randn(large_weight.shape[0])
    compiled = torch.compile(lambda x: 2 * aqt_lite.linear(x, q, bias, mode=mode), fullgraph=True)
    x = torch.from_numpy(hard_rows(np.random.default_rng(6), 12, 1000)[:10])
    for rows in (x[:1], x[:4], x):
        assert_same_bits(compiled(rows), 2 * aqt_lite.linear(rows, q, bias, mode=mode))
    narrow = torch.randn(3, 1000, dtype=torch.bfloat16)
    assert_same_bits(compiled(narrow), 2 * aqt_lite.linear(narrow, q, bias, mode=mode))
    x = torch.randn(3, 1000, requires_grad=True)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * q.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-3)
    mapped = torch.compile(torch.func.vmap(lambda x: aqt_lite.linear(x, q, mode=mode)), fullgraph=True)
    x = torch.randn(4, 2, 1000)
    assert_same_bits(mapped(x), torch.stack([aqt_lite.linear(rows, q, mode=mode) for rows in x]))


def test_exported_torch_programs_hold_no_operator_of_ours(large_weight):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return aqt_lite.linear(x, large_weight, mode="reproducible")

    x = torch.randn(3, 1000)
    exported = torch.export.export(Layer(), (x,))
    assert not [n for n in exported.graph.nodes if "aqt_lite" in str(n.target)]
    assert_same_bits(exported.module()(x), Layer()(x))


# ---- what went wrong once


@pytest.mark.parametrize("mode", ["fast", "reproducible"])
@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_codes_may_lie_in_any_order(kind, mode):
    """By columns, a column apart, from the last one on, in rows of more, or all of them the first."""
    rng = np.random.default_rng(9)
    scheme = "affine" if kind == "uint8" else "symmetric"
    q = aqt_lite.quantize(
        rng.standard_normal((400, 330)).astype(np.float32), kind, scheme=scheme, granularity=PerChannel(0)
    )
    x, codes = rng.standard_normal((9, 330)).astype(np.float32), np.asarray(q.qvalue)
    wide = np.repeat(codes, 2, axis=1)
    orders = [np.asfortranarray(codes), wide[:, ::2], codes[:, ::-1].copy()[:, ::-1], np.pad(codes, 3)[3:-3, 3:-3]]
    orders += [codes[::-1].copy()[::-1], np.broadcast_to(codes[:1], codes.shape)]
    for given in orders:
        told = {"dtype": kind, "granularity": PerChannel(0)}
        p, plain = (aqt_lite.QArray.from_codes(c, q.scale, q.zero_point, **told) for c in (given, given.copy()))
        for rows in (x[:1], x[:4], x):
            assert_same_bits(aqt_lite.linear(rows, p, mode=mode), aqt_lite.linear(rows, plain, mode=mode))
        there = aqt_lite.QArray.from_codes(
            torch.from_numpy(given.copy()).t().contiguous().t(),
            torch.from_numpy(q.scale),
            None if q.zero_point is None else torch.from_numpy(q.zero_point),
            **told,
        )
        y = aqt_lite.linear(torch.from_numpy(x), there, mode="reproducible")
        assert_same_bits(y, aqt_lite.linear(x, plain, mode="reproducible"))
    y = aqt_lite.linear(x, q[:, ::-1], np.zeros(400, np.float32), mode="reproducible")
    assert_same_bits(y, by_the_reference(x, q[:, ::-1], np.zeros(400, np.float32)))


@needs_dots
def test_loops_refuse_codes_that_lie_otherwise():
    dots = runtime.integer_dots()
    w, panels = np.zeros((3, 8), np.int8, order="F"), np.zeros(dots.shape_of_panels(2, 8, dots.DIGITS), np.uint32)
    with pytest.raises(ValueError, match="do not lie side by side"):
        dots.multiply_rows(w, panels, dots.DIGITS, panels.shape[2] // dots.DIGITS, np.zeros((2, 3), np.int64))


def test_more_rows_than_sums_are_kept_for():
    rng = np.random.default_rng(8)
    q = aqt_lite.quantize(rng.standard_normal((400, 330)).astype(np.float32), granularity=PerChannel(0))
    x, bias = rng.standard_normal((1043, 330)).astype(np.float32), np.zeros(400, np.float32)
    expected = by_the_reference(x, q, bias)
    for form in FORMS.values():
        assert_same_bits(np.asarray(form(x, q, bias)), expected)


def test_fast_products_keep_subnormal_activations_where_the_backend_does(dots):
    q = aqt_lite.quantize(np.full((400, 330), 1e10, np.float32), granularity=PerChannel(0))
    for x in (
        np.full((2, 330), 1e-40, np.float32),
        np.where(np.arange(330) < 9, 1e-38, 1e-40)[None].astype(np.float32),
    ):
        exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
        np.testing.assert_allclose(aqt_lite.linear(x, q), exact, rtol=1e-5)
        np.testing.assert_allclose(aqt_lite.linear(torch.from_numpy(x), q.to_backend("torch")), exact, rtol=1e-5)


def test_large_products_raise_no_warnings_of_numpy(dots):
    q = aqt_lite.quantize(np.full((400, 330), 100, np.float32), granularity=PerChannel(0))
    with np.errstate(all="raise"):
        fixed_point.powers_of_two.cache_clear()
        y = aqt_lite.linear(np.full((2, 330), 3e37, np.float32), q, mode="reproducible")
    assert np.isinf(y).all()


def test_a_weight_of_big_endian_numbers_of_double_width_is_not_narrowed(dots):
    w = np.random.default_rng(9).standard_normal((400, 330))
    q, x = aqt_lite.quantize(w, granularity=PerChannel(0)), np.full((2, 330), 1e200).astype(">f8")
    np.testing.assert_allclose(aqt_lite.linear(x, q), x.astype("f8") @ q.dequantize().T, rtol=1e-11)


def test_inside_shard_map_over_one_device(weight):
    mesh = jax.make_mesh((1,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, everywhere = jax.sharding.PartitionSpec("a"), jax.sharding.PartitionSpec()
    x = activations(4, 320)
    for mode in ("fast", "reproducible"):
        product = jax.shard_map(
            lambda x, w, mode=mode: aqt_lite.linear(x, w, mode=mode),
            mesh=mesh,
            in_specs=(spec, everywhere),
            out_specs=spec,
        )
        assert_same_bits(jax.jit(product)(x, weight), aqt_lite.linear(x, weight, mode="reproducible"))


def test_vmap_over_the_bias_alone(weight):
    x, bias = activations(3, 320), activations(4, 300)
    mapped = jax.vmap(lambda b: aqt_lite.linear(x, weight, b))(bias)
    assert_same_bits(mapped, jnp.stack([aqt_lite.linear(x, weight, b) for b in bias]))


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_traced_torch_programs_depend_on_their_input(large_weight):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # checks of shapes become constants
        traced = torch.jit.trace(lambda x: aqt_lite.linear(x, large_weight), torch.randn(3, 1000))
    x = torch.randn(3, 1000)
    torch.testing.assert_close(traced(x), aqt_lite.linear(x, large_weight), rtol=1e-4, atol=1e-2)


def test_map_ranges_waits_for_what_has_begun_and_passes_errors_on(monkeypatch):
    class Starved:
        def submit(self, claim):
            raise RuntimeError("can't start new thread")

    def fail(start, stop):
        if start <= 50 < stop:
            raise ValueError("here")

    for _ in range(20):
        with pytest.raises(ValueError, match="here"):
            runtime.map_ranges(fail, 100, chunks_per_core=8)
    monkeypatch.setattr(runtime, "_pool", Starved)
    parts = runtime.map_ranges(lambda lo, hi: (lo, hi), 100, chunks_per_core=8)
    assert (parts[0][0], parts[-1][1]) == (0, 100)


# ---- other instruction sets: each of x86 as a whole where the processor has it, that of Arm in an emulator


OF_NUMPY = [
    test_integer_products_are_exact,
    test_the_longest_sums_of_the_largest_products_do_not_overflow,
    "test_every_form_has_the_bits_of_the_reference[with dots-uint8-affine-PerChannel(axis=0)-numpy]",
]


@needs_dots
@pytest.mark.exhaustive
def test_processors_with_avx2_alone():
    run_without_avx_512(__file__, OF_NUMPY, "runtime.integer_dots().INSTRUCTIONS is runtime.integer_dots().AVX2")


@needs_dots
@pytest.mark.exhaustive
def test_dot_products_of_256_bits():
    if runtime.integer_dots().INSTRUCTIONS is not runtime.integer_dots().AVX512_VNNI:
        pytest.skip("the processor has no AVX-512 VNNI, of whose instructions there are narrower ones")
    narrow = "runtime.integer_dots().INSTRUCTIONS is runtime.integer_dots().AVX_VNNI"
    run_without("+no feature", __file__, OF_NUMPY, narrow, also=["+prefer-256-bit"])


@needs("numba")
def test_processors_with_avx_vnni_have_the_instruction_in_its_own_encoding():
    from aqt_lite.backends.cpu import dots

    its = dots.AVX_VNNI
    for vectors, height in zip((1, 2, 4), its.heights, strict=True):

        def tile(builder, arguments, vectors=vectors, height=height):
            dots.dots_across_planes(builder, arguments, its, height, vectors)

        text = emulated.assembly(tile, 7, "x86_64-unknown-linux-gnu", "alderlake", "+avx2,+avxvnni,-avx512f")
        assert text.count("{vex}\tvpdpbusd") == vectors * height
        assert "zmm" not in text


@needs("numba")
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_arm_processors_have_exact_sums(rows):
    pytest.importorskip("unicorn", reason="the emulator is a part of the development set-up alone")
    from aqt_lite.backends.cpu import dots

    its, rng, inner = dots.NEON, np.random.default_rng(rows), 96
    height, digits = (its.height_of_one_row, 4) if rows == 1 else (its.heights[rows // 2], 4)
    x = rng.integers(-(2**31), 2**31, (rows, inner)).astype(np.int32)
    x[:, :3], x[:, 3:5] = -(2**31), 2**31 - 1
    w = rng.integers(-128, 128, (height - 1, inner)).astype(np.int8)  # one row less than the loop takes at a time
    w[:, 0], w[:, 3] = -128, 127
    planes = (x.view(np.uint32) ^ its.flips[3])[..., None].view(
        np.int8
    )  # (rows, inner, digits): bytes from the lowest on
    of_codes = w.sum(axis=1, dtype=np.int64)
    if rows == 1:
        lines = np.concatenate([planes[0].T, np.ones((1, inner), np.int8)])
        sums = np.zeros((height, 5), np.int32)
        code = emulated.arm_code(lambda b, a: dots.dots_along_k(b, a, its, height, 5), 7)
        emulated.run_on_arm(code, w, inner, len(w), lines, inner, inner // 16, sums)
        assert (sums[: len(w), 4] == of_codes).all()
        sums = sums[: len(w), None, :4]
    else:
        lanes = planes.reshape(rows, inner // 4, 4, digits).transpose(1, 3, 0, 2)  # four codes of a row in each lane
        sums = np.zeros((height, digits, rows), np.int32)
        copies, copied_sums = np.zeros((height, inner + 16), np.int8), np.zeros(height, np.int32)
        unsigned = w.view(np.uint8) ^ 128  # bits that are to be turned over again
        code = emulated.arm_code(lambda b, a: dots.copy_tile(b, a, its, height), 8)
        emulated.run_on_arm(code, unsigned, inner, len(w), 128, inner // 16, copies, inner + 16, copied_sums)
        assert (copies[: len(w), :inner] == w).all()
        assert (copied_sums[: len(w)] == of_codes).all()
        code = emulated.arm_code(lambda b, a: dots.dots_across_planes(b, a, its, height, rows), 7)
        emulated.run_on_arm(code, copies, inner + 16, np.ascontiguousarray(lanes), inner // 4, sums, w, inner)
        sums = sums[: len(w)].transpose(0, 2, 1)
    total = (sums.astype(np.int64) << (8 * np.arange(digits))).sum(axis=-1) - its.offsets[3] * of_codes[:, None]
    np.testing.assert_array_equal(total, w.astype(np.int64) @ x.T.astype(np.int64))
