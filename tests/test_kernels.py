"""Kernels have the reference's bits where the contract says so, and at most a float32 product's error elsewhere."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from optional import needs, torch

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, QArray, affine
from aqt_lite._blocks import spread
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import quantize, runtime, stored
from aqt_lite.elements import float_type
from aqt_lite.formats import FORMATS
from aqt_lite.ops import reference
from aqt_lite.testing import assert_same_bits

CONFIGURATIONS = ["numpy with numba", "numpy alone", "torch", "jax"]


@pytest.fixture(params=CONFIGURATIONS)
def with_loops(request, monkeypatch):
    """Every adapter that has kernels; NumPy's twice, with and without compiled loops."""
    if request.param == "numpy alone":
        monkeypatch.setattr(runtime, "compiled_loops", lambda: None)
    return get_backend(request.param.split()[0])


SHAPES = [(600, 700), (64, 50, 96), (1 << 18,), (3, 100000), (100000, 3), (4, 64, 32, 32)]
GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(-1), PerGroup(32), PerGroup(100), PerGroup(50, 0)]


@pytest.fixture(params=["numba", "numpy alone"])
def loops(request, monkeypatch):
    """NumPy's kernels with and without compiled loops."""
    if request.param == "numba":
        assert runtime.compiled_loops() is not None, "numba belongs to the test set-up"
    else:
        monkeypatch.setattr(runtime, "compiled_loops", lambda: None)
    return request.param


def reference_quantize(x, dtype, scheme, block):
    spec, recipe = affine.Spec(FORMATS[dtype], float_type("float32"), block), affine.Recipe(scheme == "symmetric")
    b = get_backend("numpy")
    with np.errstate(all="ignore"):
        w = affine.quantize(x, spec=spec, recipe=recipe, b=b)
        values = affine.dequantize(w, spec=spec, b=b)
    return QArray._of(w, spec), values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numpy_quantization_kernels_have_the_bits_of_the_reference(shape, loops):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-30, 30, shape[:1] + (1,) * (len(shape) - 1)))
    x = x.astype(np.float32)
    x.flat[5:900] = 0
    x.flat[1000:1900] *= np.float32(1e-42)
    x.flat[2000:2004] = [3.4e38, -3.4e38, 1e-38, -1e-45]
    served = 0
    for granularity in GRANULARITIES:
        for dtype in ("int8", "uint8", "int16"):
            for scheme in ("symmetric", "affine"):
                q = aqt_lite.quantize(x, dtype, scheme=scheme, granularity=granularity)
                expected, values = reference_quantize(x, dtype, scheme, q.block)
                assert_same_bits(q, expected)
                assert_same_bits(q.dequantize(), values)
                spec = affine.Spec(FORMATS[dtype], float_type("float32"), q.block)
                served += (
                    quantize.quantize(x, spec=spec, recipe=affine.Recipe(scheme == "symmetric")) is not NotImplemented
                )
    assert served >= 6, "the kernels did not run"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
def test_numpy_quantization_kernels_see_values_that_are_not_finite(value, granularity, loops):
    x = np.ones((600, 700), np.float32)
    x[3, 4] = value
    with pytest.raises(ValueError, match=r"1 non-finite values of 420000, the first at index \(3, 4\)"):
        aqt_lite.quantize(x, granularity=granularity)


def weights(rng, n, k, kind):
    w = rng.standard_normal((n, k)).astype(np.float32)
    return w * np.exp(rng.uniform(-6, 6, (n, 1))).astype(np.float32) if kind == "rows of all sizes" else w


def activations(rng, m, k, kind):
    x = rng.standard_normal((m, k)).astype(np.float32)
    if kind == "outliers":
        x[:, ::97] *= np.float32(1000)
    if kind == "rows of all sizes":
        x *= np.exp2(rng.integers(-60, 60, (m, 1))).astype(np.float32)
    return x


def exact_values(q):
    """The weight in float64: what the codes mean, before any rounding to float32."""
    codes = q.qvalue.astype(np.float64)
    if q.zero_point is not None:
        codes -= spread(q.zero_point, q.shape, q.block, np)
    return codes * spread(q.scale, q.shape, q.block, np).astype(np.float64)


def error_of_a_row(y, exact):
    """Root mean square over the columns, each relative to the row's largest: one number a row."""
    return np.sqrt(np.mean((y - exact) ** 2, axis=1)) / np.abs(exact).max(axis=1)


@pytest.mark.exhaustive_where(mode="reproducible", granularity=PerBlock((30, 64)))
@pytest.mark.exhaustive_where(mode="reproducible", granularity=PerGroup(100))
@pytest.mark.exhaustive_where(mode="fast", granularity=PerChannel(1))
@pytest.mark.exhaustive_where(with_loops="jax", granularity=PerChannel(1))
@pytest.mark.exhaustive_where(with_loops="jax", mode="fast")  # programs of all shapes
@pytest.mark.exhaustive_where(with_loops="torch", granularity=PerChannel(1))
@pytest.mark.exhaustive_where(with_loops="jax", granularity=PerGroup(100))
@pytest.mark.exhaustive_where(with_loops="jax", granularity=PerBlock((30, 64)))
@pytest.mark.parametrize("mode", ["fast", "reproducible"])
@pytest.mark.parametrize(
    ("dtype", "scheme", "granularity"),
    [
        ("int8", "symmetric", PerChannel(0)),
        ("uint8", "affine", PerGroup(100)),
        ("int8", "affine", PerChannel(1)),
        ("int8", "symmetric", PerBlock((30, 64))),
    ],
    ids=str,
)
def test_products_are_as_exact_as_a_float32_product(with_loops, mode, dtype, scheme, granularity):
    backend, rng = with_loops, np.random.default_rng(1)
    n, k = 300, 1100  # large enough for the blockwise kernels
    for kind, linear in itertools.product(["normal", "outliers", "rows of all sizes"], [True, False]):
        w = weights(rng, n, k, kind)
        q = aqt_lite.quantize(w if linear else w.T, dtype, scheme=scheme, granularity=granularity)
        if mode == "reproducible" and not reference.has_integer_sums(q.scale, int(linear), q.block[int(linear)]):
            continue
        exact_w = exact_values(q)
        moved = q.to_backend(backend.name)
        float_w = moved.dequantize()
        product = aqt_lite.linear if linear else aqt_lite.dense
        for m in (1, 8, 130) if backend.name == "numpy" else (1, 130):
            x = activations(rng, m, k, kind)
            exact = x.astype(np.float64) @ (exact_w.T if linear else exact_w)
            plain = backend.xp.matmul(backend.asarray(x), float_w.T if linear else float_w)
            y = product(backend.asarray(x), moved, mode=mode)
            ours, theirs = (error_of_a_row(backend.to_numpy(v), exact) for v in (y, plain))
            floor = 2.0**-25  # half a unit in the last place of the largest: no result can be expected to be nearer
            assert np.sqrt(np.mean(ours**2)) <= 2 * max(np.sqrt(np.mean(theirs**2)), floor), (kind, linear, m)


@pytest.mark.exhaustive_where(backend="jax", granularity=PerChannel(0))  # each compiles for seconds
@pytest.mark.exhaustive_where(backend="jax", granularity=PerChannel(1))
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(64)], ids=str)
def test_reproducible_products_have_the_same_bits_everywhere(granularity, backend):
    rng = np.random.default_rng(2)
    for m, n, k in [(1, 40, 64), (3, 20, 1100)] + [(2, 5, 70000)] * (granularity == PerChannel(0)):
        x = activations(rng, m, k, "outliers")
        x[0, : k // 2] *= np.float32(1e-30)
        bias = rng.standard_normal(n).astype(np.float32)
        for dtype, scheme in [("int8", "symmetric"), ("int8", "affine"), ("uint8", "symmetric")]:
            q = aqt_lite.quantize(
                weights(rng, n, k, "rows of all sizes"), dtype, scheme=scheme, granularity=granularity
            )
            expected = aqt_lite.linear(x, q, bias, mode="reproducible")
            moved = q.to_backend(backend.name)
            y = aqt_lite.linear(backend.asarray(x), moved, backend.asarray(bias), mode="reproducible")
            assert_same_bits(y, expected)


@pytest.mark.parametrize("dtypes", [("int8", "int8"), ("uint8", "int8"), ("int8", "uint8")], ids=str)
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_quantized_activations_are_multiplied_as_integers(backend, dtypes, scheme):
    rng = np.random.default_rng(3)
    a, w = rng.standard_normal((2, 4, 300)).astype(np.float32), rng.standard_normal((50, 300)).astype(np.float32)
    qa = aqt_lite.quantize(a, dtypes[0], scheme=scheme, granularity=PerGroup(300))
    qw = aqt_lite.quantize(w, dtypes[1], scheme=scheme, granularity=PerChannel(0))
    bias = rng.standard_normal(50).astype(np.float32)
    exact = exact_values(qa) @ exact_values(qw).T + bias
    expected = aqt_lite.linear(qa, qw, bias)
    np.testing.assert_allclose(expected, exact, rtol=0, atol=4 * 2.0**-24 * np.abs(exact).max())
    y = aqt_lite.linear(qa.to_backend(backend.name), qw.to_backend(backend.name), backend.asarray(bias))
    assert_same_bits(y, expected)


SATURATION = """
import numpy as np
from aqt_lite._dispatch import run
from aqt_lite._registry import get_backend
from aqt_lite.ops import reference
rng = np.random.default_rng(0)
for name in ("torch", "jax"):
    b = get_backend(name)
    for n, k, m in ((64, 96, 4), (1000, 700, 32), (33, 65, 8), (512, 4096, 4)):
        w = rng.choice(np.asarray([-128, 127, 0, 5], np.int8), (n, k))
        x = rng.choice(np.asarray([-128, 127], np.int8), (m, k))
        exact = x.astype(np.int64) @ w.astype(np.int64).T
        y = b.to_numpy(run(b, reference.integer_matmul, b.asarray(x), b.asarray(w)))
        print(name, n, k, m, int((y != exact).sum()))
"""


@pytest.mark.exhaustive_where(isa="SSE41")
@pytest.mark.exhaustive_where(isa="")
@needs("torch", "jax")
@pytest.mark.parametrize("isa", ["AVX2", "SSE41", ""])
def test_integer_products_do_not_saturate_on_processors_without_dot_product_instructions(isa):
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": isa, "XLA_FLAGS": f"--xla_cpu_max_isa={isa}" if isa else ""}
    if isa == "SSE41":
        environment["XLA_FLAGS"] = "--xla_cpu_max_isa=SSE4_2"
    run = [sys.executable, "-c", SATURATION]
    lines = subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stdout.split("\n")
    assert [line.split()[-1] for line in lines if line] == ["0"] * 8, lines


def test_threads_are_started_where_loops_take_longer_than_that(monkeypatch):
    started = []

    class Pool:
        def submit(self, work):
            started.append(work)

    monkeypatch.setattr(runtime, "_pool", Pool)
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    monkeypatch.setattr(runtime, "LARGE_LOOPS", 3 << 22)
    for codes, rows, several in ((1536 * 384, 8, False), (4096 * 4096, 1, True)):
        started.clear()
        runtime.map_ranges(lambda a, b: None, 1536, 8, runtime.loops_of_product(codes, rows), 8)
        assert bool(started) == several


def test_parts_are_no_shorter_than_a_quarter_of_what_is_worth_a_thread(monkeypatch):
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    monkeypatch.setattr(runtime, "LARGE_PARTS", 1 << 21)
    assert stored.ends_of_parts(1024, 8, runtime.steps_of_product(1000 * 1024, 1)).tolist() == [0, 1024]
    for length, codes in ((1024, 1 << 20), (1536, 4096 * 4096)):
        steps = runtime.steps_of_product(codes, 1)
        ends = stored.ends_of_parts(length, 8, steps)
        assert (ends[0], ends[-1]) == (0, length)
        assert len(ends) > 2
        assert min(np.diff(ends)[:-1]) >= length * (1 << 19) // steps
        assert not any(e % 8 for e in ends)


def test_map_ranges_covers_a_range_once_at_multiples():
    for length in (1, 2, 7, 64, 100):
        for multiple in (1, 3, 8, 200):
            parts = sorted(runtime.map_ranges(lambda lo, hi: (lo, hi), length, multiple))
            assert parts[0][0] == 0
            assert parts[-1][1] == length
            assert all(a[1] == b[0] and b[0] % multiple == 0 for a, b in itertools.pairwise(parts))


@pytest.mark.exhaustive_where(backend="jax", granularity=PerTensor())
@pytest.mark.exhaustive_where(backend="jax", granularity=PerChannel(0))
@pytest.mark.exhaustive_where(backend="jax", granularity=PerBlock((40, 20)))
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerChannel(1), PerChannel(0), PerGroup(32, 0), PerBlock((40, 20))]
)
def test_a_weight_stored_for_dense_is_the_same_weight(backend, granularity):
    rng = np.random.default_rng(4)
    w, x = rng.standard_normal((100, 60)).astype(np.float32), rng.standard_normal((5, 100)).astype(np.float32)
    q = aqt_lite.quantize(backend.asarray(w), scheme="affine", granularity=granularity)
    stored = q.for_dense()
    assert stored.storage.shape == (60, 100)
    assert (stored.shape, stored.granularity) == (q.shape, q.granularity)
    assert_same_bits(stored, q)
    assert_same_bits(stored.dequantize(), q.dequantize())
    assert_same_bits(stored[:, :20], q[:, :20])
    assert_same_bits(stored.to_backend("numpy"), q)
    x = backend.asarray(x)
    arguments = (x, q), (x, stored)
    assert_same_bits(*[aqt_lite.dense(*a, mode="reproducible") for a in arguments])
    plain, fast = [backend.to_numpy(aqt_lite.dense(*a)) for a in arguments]
    np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-6 * np.abs(plain).max())


@pytest.mark.exhaustive_where(dtype="float16")  # bfloat16 is of its kind
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_large_arrays_have_the_bits_of_the_reference_whatever_their_layout(backend, dtype):
    """Large enough for kernels, threads and slabs, on the adapters that share NumPy's memory."""
    if backend.name == "array_api_strict" and dtype in ("float16", "bfloat16"):
        pytest.skip("array-api-strict has no 16-bit floats")
    if backend.name == "jax" and dtype == "float64":
        pytest.skip("JAX has float64 only where x64 is switched on, which test_affine does")
    numpy = get_backend("numpy")
    rng = np.random.default_rng(5)
    wide = rng.standard_normal((700, 400)) * np.exp2(rng.integers(-10, 10, (700, 1)))
    x = wide.astype(numpy.dtype(dtype))
    granularities = [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(64), PerGroup(33, 0), PerBlock((30, 50))]
    for granularity, scheme in itertools.product(granularities, ["symmetric", "affine"]):
        moved = aqt_lite.quantize(backend.asarray(x), scheme=scheme, granularity=granularity)
        block = moved.block
        spec = affine.Spec(FORMATS["int8"], float_type(dtype), block)
        recipe = affine.Recipe(scheme == "symmetric")
        with np.errstate(all="ignore"):
            w = affine.quantize(x, spec=spec, recipe=recipe, b=numpy)
            values = affine.dequantize(w, spec=spec, b=numpy)
        assert_same_bits(moved, QArray._of(w, spec))
        assert_same_bits(moved.dequantize(), values)
        if backend.name in ("numpy", "torch") and not (backend.name == "torch" and dtype == "bfloat16"):
            turned = backend.asarray(np.ascontiguousarray(x.T)).T
            assert_same_bits(aqt_lite.quantize(turned, scheme=scheme, granularity=granularity), moved)


def test_products_of_huge_activations_overflow_no_sooner_than_a_float32_product(with_loops):
    backend = with_loops
    w = np.asarray([[0.5, -0.5] * 300, [0.25, 0.25] * 300], np.float32)
    x = np.zeros((1, 600), np.float32)
    x[0, :2] = 3e38, 1e38
    q = aqt_lite.quantize(backend.asarray(w), granularity=PerChannel(0))
    for mode in ("fast", "reproducible"):
        y = backend.to_numpy(aqt_lite.linear(backend.asarray(x), q, mode=mode))
        np.testing.assert_allclose(y, [[1e38, 1e38]], rtol=0.01)
        turned = aqt_lite.quantize(backend.asarray(np.ascontiguousarray(w.T)), granularity=PerChannel(1))
        y = backend.to_numpy(aqt_lite.dense(backend.asarray(x), turned, mode=mode))
        np.testing.assert_allclose(y, [[1e38, 1e38]], rtol=0.01)


@pytest.mark.parametrize("outlier", [1e3, 1e5, 1e10, 1e20])
def test_an_outlier_that_meets_no_weight_does_not_spoil_the_rest_of_its_row(with_loops, outlier):
    backend, rng = with_loops, np.random.default_rng(6)
    w = rng.standard_normal((2100, 1024)).astype(np.float32)  # large enough for digits
    w[:, 0] = 0
    q = aqt_lite.quantize(w, granularity=PerChannel(0))
    exact_w, moved = exact_values(q), q.to_backend(backend.name)
    for m in (1, 9):
        x = rng.standard_normal((m, 1024)).astype(np.float32)
        x[:, 0] = outlier
        exact = x.astype(np.float64) @ exact_w.T
        plain = np.sqrt(np.mean((x @ q.dequantize().T - exact) ** 2))
        for mode in ("fast", "reproducible"):
            if mode == "reproducible" and outlier > 1e10:
                continue  # more than 62 bits below the largest: docs/numerics.md says so
            y = backend.to_numpy(aqt_lite.linear(backend.asarray(x), moved, mode=mode))
            assert np.sqrt(np.mean((y - exact) ** 2)) <= 2 * plain, (m, mode)


@pytest.mark.parametrize("granularity", [PerBlock((-1, 8)), PerBlock((2, -1)), PerBlock((3, -1)), PerBlock((6, 59))])
@pytest.mark.parametrize("n", [16, 400])
def test_groups_of_outputs(with_loops, granularity, n):
    backend, rng = with_loops, np.random.default_rng(7)
    w, x = rng.standard_normal((33, n)).astype(np.float32), rng.standard_normal((3, 33)).astype(np.float32)
    w *= np.exp2(rng.integers(-5, 5, (1, n))).astype(np.float32)
    for weight, product, other in ((w, aqt_lite.dense, 0), (np.ascontiguousarray(w.T), aqt_lite.linear, 1)):
        q = aqt_lite.quantize(backend.asarray(weight), granularity=granularity)
        exact = x.astype(np.float64) @ (
            exact_values(q.to_backend("numpy")).T if other else exact_values(q.to_backend("numpy"))
        )
        y = backend.to_numpy(product(backend.asarray(x), q))
        np.testing.assert_allclose(y, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


@pytest.mark.exhaustive_where(with_loops="jax", granularity=PerTensor())
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
def test_small_products_of_any_layout_with_any_values(with_loops, granularity):
    backend, rng = with_loops, np.random.default_rng(9)
    w = aqt_lite.quantize(rng.standard_normal((40, 66)).astype(np.float32), granularity=granularity)
    half = w[::2] if granularity == PerChannel(0) else w[:, ::2]  # neither codes nor scales lie side by side
    for q in (w.to_backend(backend.name), half if backend.name == "numpy" else half.to_backend(backend.name)):
        out, inner = q.shape
        bias = rng.standard_normal(out).astype(np.float32)
        for m in (0, 1, 5, 20):
            x = rng.standard_normal((m, 2 * inner)).astype(np.float32)[:, ::2]
            if m == 5:
                x[1, 3], x[2, 4] = np.nan, np.inf
            weight = exact_values(q.to_backend("numpy"))
            with np.errstate(invalid="ignore"):
                exact = x.astype(np.float64) @ weight.T + bias
            exact[~np.isfinite(exact)] = np.nan
            y = backend.to_numpy(aqt_lite.linear(backend.asarray(x), q, backend.asarray(bias))).copy()
            y[~np.isfinite(y)] = np.nan
            np.testing.assert_allclose(y, exact, rtol=0, atol=2e-6 * max(1, np.nanmax(np.abs(exact), initial=0)))


def test_small_products_never_warn():
    q = aqt_lite.quantize(np.full((4, 8), 1e30, np.float32), granularity=PerChannel(0))
    x, bias = np.full((1, 8), 1e10, np.float32), np.full(4, 3e38, np.float32)
    with np.errstate(all="raise"):
        assert np.isinf(aqt_lite.linear(x, q)).all()
        assert np.isinf(aqt_lite.linear(x / 100, q, bias)).all()


def test_one_output_or_one_input(backend):
    rng = np.random.default_rng(8)
    for m, k, n in [(1, 3, 1), (5, 33, 1), (4, 1, 7), (1, 1, 1), (70, 17, 1)]:
        x, w = (rng.standard_normal(s).astype(np.float32) for s in [(m, k), (k, n)])
        qx, qw = aqt_lite.quantize(x), aqt_lite.quantize(w)
        here = qx.to_backend(backend.name), qw.to_backend(backend.name)
        for mode in ("fast", "reproducible"):
            assert_same_bits(aqt_lite.dense(*here, mode=mode), aqt_lite.dense(qx, qw, mode="reproducible"))
            assert_same_bits(aqt_lite.dense(here[0], here[1].for_dense()), aqt_lite.dense(qx, qw))


def test_torch_products_do_not_follow_the_defaults_of_the_user():
    w, x = torch.randn(300, 500), torch.randn(20, 500)
    q = aqt_lite.quantize(w, granularity=PerGroup(100))
    expected = aqt_lite.linear(x, q)
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert_same_bits(aqt_lite.linear(x, q), expected)
        finally:
            torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert_same_bits(aqt_lite.linear(x, q), expected)


@pytest.mark.parametrize("size", [(20, 16), (2000, 1024)])
@pytest.mark.parametrize("granularity", [PerChannel(0), PerGroup(16)], ids=str)
def test_torch_products_under_vmap(size, granularity):
    q = aqt_lite.quantize(torch.randn(size), granularity=granularity)
    x = torch.randn(4, 3, size[1])
    mapped = torch.func.vmap(lambda x: aqt_lite.linear(x, q))(x)
    torch.testing.assert_close(mapped, aqt_lite.linear(x, q), rtol=1e-4, atol=1e-4)
    gradient = torch.func.vmap(torch.func.grad(lambda x: aqt_lite.linear(x, q).sum()))(x)
    torch.testing.assert_close(gradient, q.dequantize().sum(0).expand(4, 3, size[1]), rtol=1e-3, atol=1e-3)


def test_large_torch_tensors_with_the_negative_bit():
    z = torch.complex(torch.randn(500, 500), torch.randn(500, 500)).conj().imag
    assert z.is_neg()
    assert_same_bits(
        aqt_lite.quantize(z, granularity=PerChannel(0)), aqt_lite.quantize(z.resolve_neg(), granularity=PerChannel(0))
    )


FRESH = """
import torch, aqt_lite
w = torch.randn(64, 32)
class Layer(torch.nn.Module):
    def forward(self, x):
        return aqt_lite.linear(x, aqt_lite.quantize(w), mode="reproducible")
with torch.device("meta"):
    pass
exported = torch.export.export(Layer(), (torch.randn(3, 32),))
print(tuple(exported.module()(torch.randn(3, 32)).shape))
"""

AT_EXIT = """
import threading, time, numpy as np, aqt_lite
def late():
    threading.main_thread().join()
    q = aqt_lite.quantize(np.ones((600, 700), "float32"), granularity=aqt_lite.PerChannel(0))
    print(q.shape, flush=True)
aqt_lite.quantize(np.ones((6, 7), "float32"))
threading.Thread(target=late).start()
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(FRESH, id="first use inside export", marks=[needs("torch"), pytest.mark.exhaustive]),
        pytest.param(AT_EXIT, id="after the main thread"),
    ],
)
def test_in_a_fresh_process(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("("), done.stderr


MEMORY = """
import gc, re, sys
import numpy as np
kind, rows = sys.argv[1], int(sys.argv[2])
if kind == "numpy alone":
    sys.modules["numba"] = None
import aqt_lite
from aqt_lite import PerChannel
from aqt_lite._registry import get_backend
b = get_backend(kind.split()[0])
n = 4096
codes = np.random.default_rng(0).integers(-127, 128, (n, n), dtype=np.int8)
q = aqt_lite.QArray.from_codes(codes, np.full((n, 1), 0.01, np.float32), granularity=PerChannel(0)).to_backend(b.name)
x = b.asarray(np.ones((rows, n), np.float32))
call = lambda: b.to_numpy(aqt_lite.linear(x, q)).sum()
if kind == "jax":
    import jax
    product = jax.jit(aqt_lite.linear)
    call = lambda: product(x, q).block_until_ready()
call(), call()
gc.collect()
status = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
call()
print(status("VmHWM") - before)
"""


@pytest.mark.exhaustive_where(kind="jax")  # a process each
@pytest.mark.exhaustive_where(kind="torch")
@pytest.mark.exhaustive_where(rows=64)
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure peak memory")
@pytest.mark.parametrize("kind", ["numpy", "numpy alone", "torch", "jax"])
@pytest.mark.parametrize(("rows", "most"), [(1, 4 << 20), (64, 32 << 20)])
def test_no_float_copy_of_the_weight_is_made(kind, rows, most):
    """The weight has 16 MB as int8 and would have 64 MB as float32."""
    run = [sys.executable, "-c", MEMORY, kind, str(rows)]
    extra = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert extra <= most, f"{extra / 2**20:.1f} MB"


@pytest.mark.parametrize("kind", ["numpy", pytest.param("torch", marks=needs("torch"))])
@pytest.mark.parametrize("how", [{"granularity": PerChannel(0)}, {"dtype": "int4", "granularity": PerGroup(32)}])
def test_what_reproducible_products_of_a_weight_need_is_decided_once(kind, how, monkeypatch):
    """From its second product on nothing is asked of a weight, whose arrays may be written to between two."""
    from aqt_lite.ops import matmul

    rng = np.random.default_rng(0)
    q, x = aqt_lite.quantize(rng.standard_normal((32, 96)).astype(np.float32), **how), rng.standard_normal((2, 96))
    b, x = get_backend("numpy"), x.astype(np.float32)
    given, taken = (x, q) if kind == "numpy" else (torch.from_numpy(x), q.to_backend(kind))
    aqt_lite.linear(given, taken, mode="reproducible")
    taken.scale[3, 0] = -0.5
    q.scale[3, 0] = -0.5
    w, spec = matmul.in_integers(q)
    exact = reference.matmul_reproducible(x, w, None, spec=spec, contract=1, b=b)
    if runtime.compiled_loops() is not None and runtime.integer_dots() is not None:
        for name in ("in_integers", "as_stored"):
            monkeypatch.setattr(matmul, name, None)
    assert_same_bits(np.asarray(aqt_lite.linear(given, taken, mode="reproducible")), exact)
