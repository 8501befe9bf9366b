"""Products with weights that lie (in, out), by loops that read them so: each value as dequantizing gives it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from optional import jax, jnp, needs, torch
from processors import run_without_avx_512

from aqt_lite import Codebook, PerBlock, PerChannel, PerGroup, PerTensor, QArray, dense, quantize
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import in_out, runtime, serve, stored
from aqt_lite.ops.matmul import as_stored

LOOPS = runtime.outer_loops()
needs_loops = pytest.mark.skipif(LOOPS is None, reason="the processor has no AVX2: other forms serve, tested there")

NINE = Codebook("nine levels", (-1.0, -0.6, -0.3, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0))
KINDS = [
    {"dtype": "int8"},
    {"dtype": "uint8", "scheme": "affine"},
    {"dtype": "int8", "scale_dtype": "float16"},
    {"dtype": "int4"},
    {"dtype": "uint4", "scheme": "affine"},
    {"dtype": "int4", "scale_dtype": "float8_e8m0fnu"},
    {"dtype": "int4", "scale_dtype": "float8_e4m3fn"},
    {"dtype": "nf4"},
    {"dtype": NINE},
    {"dtype": "int3"},
    {"dtype": "float8_e5m2"},
    {"dtype": "float6_e2m3fn"},
]
GRANULARITIES = [
    PerGroup(32),
    PerGroup(40),
    PerGroup(32, 0),
    PerGroup(5, 0),
    PerChannel(0),
    PerChannel(1),
    PerTensor(),
    PerBlock((3, 64)),
    PerBlock((16, 24)),
    PerBlock((1, 1)),
]


def weight(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def name_of(how):
    return " ".join(str(getattr(v, "name", v)) for v in how.values())


of_each_kind = pytest.mark.parametrize("how", KINDS, ids=name_of)


def served_product(x, q, bias=None):
    """What the loops answer, which take on every such weight, small ones, too."""
    w, spec = as_stored(q, packed=True)
    assert serve.decodes_in_out("float32", w, spec, 0, q.packed_length is not None)
    columns = q.shape[1]
    y = in_out.matmul_in_out(x, w, bias, spec=spec, columns=columns, packed=q.packed_length is not None)
    assert y is not NotImplemented
    return y


@needs_loops
@of_each_kind
def test_rows_with_a_single_one_give_the_values_of_dequantize(how):
    """Each of the weight's values by itself: in tiles that columns end within, and past the last whole vector."""
    of_its_own = how.get("scale_dtype") == "float8_e4m3fn"  # which has no scales for single numbers near 0
    for nth, granularity in enumerate(GRANULARITIES[: -1 if of_its_own else None]):
        for rows, columns in ((37, 203) if nth % 2 else (70, 128), (5, 9)):
            q = quantize(weight(rows, columns), **how, granularity=granularity)
            ones, values = np.eye(rows, dtype=np.float32), np.asarray(q.dequantize())
            np.testing.assert_array_equal(served_product(ones, q), values)
            for few in (1, 2, 3, 4, 5):
                for first in (0, rows - few):
                    some = served_product(ones[first : first + few], q)
                    np.testing.assert_array_equal(some, values[first : first + few])


@needs_loops
@of_each_kind
@pytest.mark.parametrize("granularity", [PerGroup(32), PerGroup(128, 0), PerChannel(1)], ids=str)
def test_sums_are_as_exact_as_a_float32_product(how, granularity):
    """Also where terms cancel, beside outliers, and of numbers that are all positive."""
    rng, bias = np.random.default_rng(1), weight(1, 210, 3)[0]
    for rows in (1, 7, 40):
        q, x = quantize(weight(1027, 210), **how, granularity=granularity), weight(rows, 1027, rows)
        values = np.asarray(q.dequantize())
        for given in (x, np.abs(x), np.where(rng.random(x.shape) < 0.01, x * 1e5, x), x * np.float32(2.0**-140)):
            exact = given.astype(np.float64) @ values.astype(np.float64) + bias
            own, off = (np.mean((y - exact) ** 2) for y in (given @ values + bias, served_product(given, q, bias)))
            assert off <= 2 * own, rows


@needs_loops
@pytest.mark.parametrize("how", [{"dtype": "int8"}, {"dtype": "nf4"}, {"dtype": "int3"}], ids=name_of)
def test_bits_are_those_of_one_thread(how, monkeypatch):
    """However many threads take parts of the weight, and in whatever order."""
    q, x = quantize(weight(1500, 300), **how, granularity=PerGroup(32)), weight(9, 1500)
    assert len(in_out.parts_of_rows(1500, 9, 300, LOOPS.width_of_sums(300))[0]) > 3
    several = served_product(x, q)
    monkeypatch.setattr(in_out, "in_parts", lambda loop, steps, ends, *given: loop(0, ends, *given))
    np.testing.assert_array_equal(served_product(x, q), several)


@needs_loops
def test_parts_make_up_the_weight():
    for length in (1, 31, 32, 33, 1000, 100_000):
        for rows, columns in ((1, 1), (1, 4096), (128, 50_000)):
            ends, each = in_out.parts_of_rows(length, rows, columns, LOOPS.width_of_sums(columns))
            assert ends[0] == 0
            assert ends[-1] == length
            assert (np.diff(ends)[:-1] == each).all()
            assert 0 < ends[-1] - ends[-2] <= each
            assert len(ends) <= in_out.MOST_PARTS + 1


@needs_loops
def test_which_products_are_left_to_blas():
    """Many rows, few columns, and results so large that eight of them would not be worth their memory."""
    assert serve.are_in_out(128, 8192)
    assert serve.are_in_out(4, 1 << 18)
    assert not any(serve.are_in_out(*told) for told in ((0, 64), (129, 64), (128, 8193), (5, 1 << 18), (2, 15)))


@needs_loops
@pytest.mark.parametrize("rows", [1, 6, 40])
def test_an_infinity_or_nan_stays_in_its_row(rows):
    q, x = quantize(weight(200, 70), "int4", granularity=PerGroup(32)), weight(rows, 200)
    clean = served_product(x, q)
    for bad in (np.inf, np.nan):
        given = x.copy()
        given[0, 7] = bad
        y = served_product(given, q)
        assert not np.isfinite(y[0]).any()
        np.testing.assert_array_equal(y[1:], clean[1:])


@needs_loops
@pytest.mark.parametrize("granularity", [PerGroup(32), PerGroup(32, 0)], ids=str)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, 2.0**120])
@pytest.mark.parametrize("rows", [1, 20])
def test_scales_of_no_use_are_left_to_the_operations(granularity, bad, rows):
    q, x = quantize(weight(96, 64), "int8", granularity=granularity), weight(rows, 96)
    scale = np.asarray(q.scale).copy()
    scale[-1, -1] = bad
    w, spec = as_stored(q, packed=True)
    w = w._replace(scale=scale)
    assert in_out.matmul_in_out(x, w, None, spec=spec, columns=64, packed=False) is NotImplemented


@needs_loops
@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=needs("torch"))])
@of_each_kind
def test_dense_goes_by_them(backend, how, monkeypatch):
    """Of large weights, of all that are packed or look numbers up, and with any floats."""
    b, calls = get_backend(backend), []
    own = stored.matmul_in_out
    monkeypatch.setattr(stored, "matmul_in_out", lambda *given, **told: calls.append(1) or own(*given, **told))
    q, x, bias = quantize(weight(520, 260), **how, granularity=PerGroup(40, 0)), weight(3, 520, 1), weight(1, 260, 2)[0]
    for dtype, tolerance in (("float32", 0), ("float16", 2e-3)):
        given = b.xp.astype(b.asarray(x), b.dtype(dtype))
        y = dense(given, q.to_backend(backend), b.asarray(bias))
        assert calls.pop()
        assert not calls
        assert b.dtype_name(y) == dtype
        expected = served_product(np.asarray(b.to_numpy(given), np.float32), q, bias)
        np.testing.assert_allclose(b.to_numpy(y), expected, rtol=tolerance, atol=10 * tolerance)


@needs_loops
@needs("torch")
@pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("how", KINDS[::3], ids=name_of)
def test_programs_of_torch_have_the_bits_of_numpy(how):
    """One operator, as an eager call; of a weight that a program is given, and with no graph broken."""
    q, x, bias = quantize(weight(800, 260), **how, granularity=PerGroup(40)), weight(5, 800, 1), weight(1, 260, 2)[0]
    moved = q.to_backend("torch")
    torch.compiler.reset()
    y = torch.compile(dense, fullgraph=True)(torch.from_numpy(x), moved, torch.from_numpy(bias))
    np.testing.assert_array_equal(y.numpy(), served_product(x, q, bias))


@needs_loops
@needs("torch")
def test_derivatives_of_torch():
    q = quantize(weight(520, 260), "int4", granularity=PerGroup(32, 0)).to_backend("torch")
    x = torch.from_numpy(weight(3, 520)).requires_grad_()
    dense(x, q).sum().backward()
    expected = np.broadcast_to(np.asarray(q.to_backend("numpy").dequantize()).sum(axis=1), (3, 520))
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-4, atol=1e-4)


@needs_loops
@needs("jax")
@pytest.mark.parametrize(
    ("how", "granularity"),
    [(how, (PerGroup(40), PerGroup(64, 0))[i % 2]) for i, how in enumerate(KINDS[1::3])],
    ids=map(name_of, KINDS[1::3]),
)
def test_programs_of_jax_have_the_bits_of_numpy(how, granularity):
    """Compiled, mapped over, differentiated, and with a scale that the loops do not serve."""
    q, x, bias = quantize(weight(800, 260), **how, granularity=granularity), weight(5, 800, 1), weight(1, 260, 2)[0]
    moved, given, own = q.to_backend("jax"), jnp.asarray(x), jax.jit(dense)
    y = own(given, moved, jnp.asarray(bias))
    np.testing.assert_array_equal(y, served_product(x, q, bias))
    assert "aqt_lite_in_out_product" in own.lower(given, moved).as_text()
    of_rows = jax.jit(jax.vmap(lambda row: dense(row, moved)))(given)
    np.testing.assert_array_equal(of_rows, served_product(x, q))
    of_x = jax.jit(jax.grad(lambda a: dense(a, moved).sum()))(given)
    expected = np.broadcast_to(np.asarray(q.dequantize(), np.float64).sum(axis=1), x.shape)
    np.testing.assert_allclose(of_x, expected, rtol=1e-3, atol=1e-3)
    if not isinstance(q.scale, QArray):
        without = replace(moved, scale=moved.scale.at[0, 0].set(0))
        assert np.isnan(jax.jit(dense)(given, without)).any()  # as an eager product would refuse


@needs("jax")
@pytest.mark.parametrize("told", [{"granularity": PerGroup(32, 0)}, {"granularity": PerChannel(1)}, {"dtype": "nf4"}])
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_programs_of_jax_add_up_blocks_where_the_loops_do_not_serve(told, kind):
    q, x = quantize(weight(700, 260), **{"dtype": "int4", **told}), jnp.asarray(weight(5, 700, 1)).astype(kind)
    bias, moved = weight(1, 260, 2)[0], q.to_backend("jax")
    without = replace(moved, scale=moved.scale.at[0, 7 % q.scale.shape[1]].set(0))
    y = np.asarray(jax.jit(dense)(x, without, jnp.asarray(bias)).astype(jnp.float32))
    expected = np.asarray(x.astype(jnp.float32), np.float64) @ np.asarray(q.dequantize(), np.float64) + bias
    bad = np.isnan(y)
    assert bad.any(axis=0).sum() == (1 if q.scale.shape[1] == 260 else 260)
    tolerance = {"float32": 1e-5, "bfloat16": 2.0**-8}[kind]
    np.testing.assert_allclose(y[~bad], expected[~bad], rtol=tolerance, atol=tolerance * np.abs(expected).max())


@needs("jax")
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_inside_shard_map_over_one_device(dtype):
    """Where no loop serves, and blocks of a weight large enough to be several add up."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    rows = jax.sharding.PartitionSpec("rows")
    q = quantize(weight(1100, 300), dtype, granularity=PerGroup(32, 0)).to_backend("jax")
    x = jnp.asarray(weight(4, 1100, 1))
    product = jax.jit(jax.shard_map(lambda a: dense(a, q), mesh=mesh, in_specs=rows, out_specs=rows))
    np.testing.assert_allclose(product(x), dense(x, q), rtol=1e-4, atol=1e-4)


@needs_loops
def test_memory_beside_the_loops_own_is_not_written_to():
    """Results, and codes, in the middle of arrays whose other entries are looked at afterwards."""
    rng = np.random.default_rng(0)
    for how in ({"dtype": "int8"}, {"dtype": "int4"}, {"dtype": "int3"}):
        for rows, columns in ((1, 203), (5, 64), (20, 65)):
            q, x = quantize(weight(50, columns), **how, granularity=PerGroup(32)), weight(rows, 50)
            w, spec = as_stored(q, packed=True)
            around = rng.integers(0, 255, w.codes.nbytes + 256).astype(np.uint8)
            around[128 : 128 + w.codes.nbytes] = w.codes.view(np.uint8).reshape(-1)
            codes = around[128 : 128 + w.codes.nbytes].view(w.codes.dtype).reshape(w.codes.shape)
            before = around.copy()
            told = {"spec": spec, "columns": columns, "packed": q.packed_length is not None}
            y = in_out.matmul_in_out(x, w._replace(codes=codes), None, **told)
            np.testing.assert_array_equal(y, in_out.matmul_in_out(x, w, None, **told))
            np.testing.assert_array_equal(around, before)


@needs_loops
@pytest.mark.exhaustive  # compiles all loops anew, for another processor
def test_processors_without_avx_512():
    tests = [
        test_rows_with_a_single_one_give_the_values_of_dequantize,
        test_sums_are_as_exact_as_a_float32_product,
        test_an_infinity_or_nan_stays_in_its_row,
    ]
    run_without_avx_512(__file__, tests, "runtime.outer_loops().LANES == 8")
