"""Products whose codes become numbers in registers: each value as dequantizing gives it, on every way to the loops."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from optional import jax, jnp, needs, torch
from processors import run_without, run_without_avx_512

from aqt_lite import Codebook, Float, PerBlock, PerChannel, PerGroup, PerTensor, QArray, affine, dense, linear, quantize
from aqt_lite._registry import get_backend
from aqt_lite.affine import Coded
from aqt_lite.backends.cpu import floats, operands, runtime, serve, stored
from aqt_lite.backends.cpu.kinds import kind_of
from aqt_lite.backends.cpu.operands import operands_of, plain_scales
from aqt_lite.formats import FORMATS
from aqt_lite.ops import reference
from aqt_lite.ops.matmul import as_stored

LOOPS = runtime.decoding_loops()
needs_loops = pytest.mark.skipif(LOOPS is None, reason="the processor has no AVX2: other forms serve, tested there")

NINE = Codebook("nine levels", (-1.0, -0.6, -0.3, -0.1, 0.0, 0.1, 0.3, 0.6, 1.0))
FOUR_BITS = [{"dtype": form.name} for form in FORMATS.values() if form.element.bits == 4 and not form.group]
KINDS = [
    *FOUR_BITS,
    {"dtype": NINE},
    {"dtype": "uint4", "scheme": "affine"},
    *(
        {"dtype": "int4", "scale_dtype": kept}
        for kept in ("float16", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn", "int8")
    ),
    {"dtype": "int8"},
    {"dtype": "uint8", "scheme": "affine"},
    {"dtype": "int8", "scale_dtype": "float16"},
]
GRANULARITIES = [PerGroup(32), PerGroup(128), PerChannel(0), PerTensor(), PerBlock((3, 64)), PerBlock((-1, 32))]


def weight(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def name_of(how):
    return " ".join(str(getattr(v, "name", v)) for v in how.values())


of_each_kind = pytest.mark.parametrize("how", [*KINDS, {"dtype": "mxfp4"}], ids=name_of)


def decoded_product(x, q, bias=None, contract=1):
    """What the form itself answers."""
    w, spec = as_stored(q, packed=True)
    return stored.matmul_stored(x, w, bias, spec=spec, contract=contract, packed_length=q.packed_length)


def assert_exact_to_float32(y, x, values, bias=0.0):
    """Within what rounding each product and each sum in float32 may do."""
    x, values = np.asarray(x, np.float64), np.asarray(values, np.float64)
    bound = 2.0**-21 * (np.abs(x) @ np.abs(values.T) + np.abs(bias)) + 1e-30
    assert (np.abs(np.asarray(y, np.float64) - (x @ values.T + bias)) <= bound).all()


@needs_loops
@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=needs("torch"))])
@pytest.mark.parametrize("how", [{"granularity": PerGroup(32)}, {"dtype": "uint8", "scheme": "affine"}], ids=name_of)
def test_small_weights_go_by_the_loops_where_rows_pay(backend, how):
    x, q = weight(8, 160, 1), quantize(weight(110, 160), **how)
    x[3, 5] = 1e12
    b, bias = get_backend(backend), weight(1, 110, 2)[0]
    y = b.to_numpy(linear(b.asarray(x), q.to_backend(backend), b.asarray(bias)))
    np.testing.assert_array_equal(y, decoded_product(x, q, bias))
    assert_exact_to_float32(y, x, q.dequantize(), bias)


@needs_loops
@of_each_kind
def test_a_row_with_a_single_one_gives_the_values_of_dequantize(how):
    """Each of the weight's values by itself: those beyond the last whole vector, and in the last group, too."""
    kept = how.get("scale_dtype") == "int8"
    for granularity in [None] if how["dtype"] == "mxfp4" else GRANULARITIES[: 3 if kept else None]:
        for rows, columns in ((7, 203), (101, 128)):
            q = quantize(weight(rows, columns), **how, **({} if granularity is None else {"granularity": granularity}))
            ones, values = np.eye(columns, dtype=np.float32), np.asarray(q.dequantize()).T
            np.testing.assert_array_equal(decoded_product(ones, q), values)  # many rows: by way of memory
            for few in (1, 3):
                for first in (0, columns - few):
                    some = ones[first : first + few]
                    np.testing.assert_array_equal(decoded_product(some, q), values[first : first + few])


@needs_loops
@pytest.mark.parametrize("rows", [1, 2, 4, 5, 15, 16, 21, 530])
@pytest.mark.parametrize("how", [{"dtype": "nf4"}, {"dtype": "uint8", "scheme": "affine"}], ids=name_of)
def test_sums_are_exact_to_float32(how, rows):
    """Rows longer than what meets x at a time, groups longer than that, and more rows than there are sums at a time."""
    rng, outputs = np.random.default_rng(rows), 99 if rows < 500 else 300  # BLAS takes small weights of many rows
    for size, columns in ((32, 1100), (2048, 2500), (96, 8300 if rows == 1 else 1300)):
        q = quantize(weight(outputs, columns), **how, granularity=PerGroup(size))
        x, bias = rng.standard_normal((rows, columns)).astype(np.float32), weight(1, outputs)[0]
        y = decoded_product(x, q, bias)
        assert_exact_to_float32(y, x, q.dequantize(), bias)


@pytest.mark.parametrize("shift", [0, -70, 70])
@pytest.mark.parametrize("kind", ["int4", "uint4", "int4 with zero points", "float4_e2m1fn", "int8", "uint8"])
def test_sums_of_integers_are_exact(kind, shift):
    """Each code at even and odd positions; rows and groups that end anywhere; scales near 1, and far from it."""
    rng, dtype = np.random.default_rng(0), kind.split()[0]
    low, high = FORMATS[dtype].element.codes
    for size, columns, rows in ((32, 1, 1), (64, 95, 3), (96, 700, 5), (128, 513, 7), (160, 1537, 9), (256, 2050, 101)):
        codes = rng.integers(low, high + 1, (rows, columns)).astype(FORMATS[dtype].element.storage)
        groups = -(-columns // size)
        scale = np.ldexp(np.float32(1), shift + rng.integers(-2, 3, (rows, groups))).astype(np.float32)
        zero = rng.integers(low, high + 1, (rows, groups)).astype(np.int32)
        how = {"zero_point": zero} if kind in ("uint4", "uint8", "int4 with zero points") else {}
        q = QArray.from_codes(codes, scale, dtype=dtype, granularity=PerGroup(size), **how)
        x = rng.integers(-20, 21, (1, columns)).astype(np.float32)
        exact = x.astype(np.float64) @ np.asarray(q.dequantize(), np.float64).T
        np.testing.assert_array_equal(decoded_product(x, q) if LOOPS is not None else linear(x, q), exact)


def hard_rows(columns):
    """One row each of what fixed point might spoil, by name."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal(columns)
    powers = np.exp2(rng.integers(-60, 60, -(-columns // 32)).repeat(32)[:columns])
    far = np.where(np.arange(columns) % 5 == 0, 2.0**-20, 1.0)
    rows = {
        "normal": x,
        "positive": np.abs(x),
        "mostly zeros": np.where(rng.random(columns) < 0.9, 0, x),
        "groups of all sizes": x * powers,
        "entries of all sizes": x * np.exp2(rng.integers(-40, 40, columns)),
        "two sizes in a group": x * far,
        "subnormal": x * 2.0**-130,
        "huge": np.clip(x, -3, 3) * 2.0**110,
        "beside subnormal": np.where(np.arange(columns) % 50 == 7, 2.0**-140, x),
        **{f"an outlier of {size:g}": np.where(np.arange(columns) == 41, size, x) for size in (1e3, 1e5, 1e10, 1e20)},
        "outliers everywhere": np.where(np.arange(columns) % 32 == 9, 1e6, x),
    }
    return {name: row.astype(np.float32)[None] for name, row in rows.items()}


@needs_loops
@pytest.mark.parametrize("how", [*KINDS, {"dtype": "mxfp4"}], ids=name_of)
def test_one_row_is_as_exact_as_a_float32_product(how):
    """Where outliers meet no weight, too, so that nothing but the other entries is left of a row."""
    how = how if how["dtype"] == "mxfp4" else {**how, "granularity": PerGroup(32)}
    for columns in (800, 2051):
        w = weight(97, columns)
        for without in (False, True):
            if without:
                w[:, 41] = w[:, 9::32] = 0
            q = quantize(w, **how)
            values = np.asarray(q.dequantize())
            for name, x in hard_rows(columns).items():
                exact = x.astype(np.float64) @ values.astype(np.float64).T
                ours, theirs = (np.sqrt(np.mean((y - exact) ** 2)) for y in (decoded_product(x, q), x @ values.T))
                assert ours <= 2 * max(theirs, 2.0**-25 * np.abs(exact).max(), 2.0**-149), (name, without)


@needs_loops
@pytest.mark.parametrize("how", [{"dtype": "int4"}, {"dtype": "uint4", "scheme": "affine"}, {"dtype": "int8"}])
def test_what_cancels_leaves_what_float32_leaves(how):
    """Products that add up to nearly nothing: all of one size, so that only the last bits of each count."""
    w = weight(60, 1024)
    w[:, 512:] = w[:, :512]
    q = quantize(w, **how, granularity=PerGroup(64))
    x, values = weight(1, 1024, seed=1), np.asarray(q.dequantize(), np.float64)
    x[:, 512:] = -x[:, :512] * np.float32(1 + 2.0**-20)
    exact = x.astype(np.float64) @ values.T
    ours, theirs = (
        np.sqrt(np.mean((y - exact) ** 2)) for y in (decoded_product(x, q), x @ values.astype(np.float32).T)
    )
    assert ours <= 2 * theirs


@needs_loops
def test_fixed_point_serves_what_it_is_for():
    """How many quarters of a row are left to floats; -1 where all are."""

    def left(x, how):
        q = quantize(weight(8, x.shape[1]), **how)
        w, spec = as_stored(q, packed=True)
        with np.errstate(all="ignore"):
            operands = operands_of(w, spec, x.shape[1], q.packed_length is not None, get_backend("numpy"))
        words = stored._arranged(x, operands).view(np.int32)[0]
        head = LOOPS.parts_of(x.shape[1], operands.kind == LOOPS.HALVES)[0] // 4
        return words[head + 1] if words[head] else -1

    rows, int4 = hard_rows(2048), {"dtype": "int4", "granularity": PerGroup(32)}
    for how in (int4, {"dtype": "int8", "granularity": PerGroup(32)}, {"dtype": "mxfp4"}):
        assert left(rows["normal"], how) <= 1
        assert 1 <= left(rows["an outlier of 1e+20"], how) <= 2
        assert left(rows["entries of all sizes"], how) == left(rows["subnormal"], how) == -1
    assert left(rows["normal"], {"dtype": "nf4", "granularity": PerGroup(32)}) == -1
    assert left(rows["normal"], {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(32)}) == -1
    if LOOPS.LANES == 8:  # groups of half a quarter, which vectors of floats serve
        assert left(rows["normal"], {"dtype": "int4", "granularity": PerGroup(16)}) == -1


@needs_loops
@pytest.mark.parametrize("how", [{"dtype": "float4_e2m1fn"}, {"dtype": "int8"}, {"dtype": "uint4"}], ids=name_of)
def test_the_largest_sums_of_digits_do_not_overflow(how):
    """Entries that are the largest there are, or have digits of -128 or -2^15, beside the largest numbers."""
    w = np.asarray([[1.0], [-1.0], [0.5]], np.float32) * np.ones((1, 512), np.float32)
    if how["dtype"] == "uint4":
        codes, zero = np.tile(np.asarray([[15], [0], [8]], np.uint8), (1, 512)), np.asarray([[0], [15], [0]], np.int32)
        q = QArray.from_codes(codes, np.ones((3, 1), np.float32), zero, granularity=PerGroup(512), dtype="uint4")
    else:
        q = quantize(w, **how, granularity=PerGroup(32))
    values = np.asarray(q.dequantize(), np.float64)
    for entry in (
        127 / 64,
        -127 / 64,
        1 + 2.0**-15,
        -1 - 2.0**-15,
        1 + 2.0**-15 + 2.0**-23,
        63 / 64 - 2.0**-15 - 2.0**-23,
    ):
        x = np.full((1, 512), entry, np.float32)
        exact = x.astype(np.float64) @ values.T
        np.testing.assert_allclose(decoded_product(x, q), exact, rtol=2.0**-20)


@needs_loops
@pytest.mark.parametrize("bad", [2.0**-100, 2.0**80, -3.0])
def test_scales_of_any_size_and_sign_in_one_row(bad):
    q, x = quantize(weight(300, 512), "int4", granularity=PerGroup(32)), weight(1, 512, seed=2)
    scale = np.asarray(q.scale).copy()
    scale[7, 3] = bad
    w, spec = as_stored(replace(q, scale=scale), packed=True)
    values = reference.values_stored(w, spec=spec, packed_length=q.packed_length, b=get_backend("numpy"))
    y = stored.matmul_stored(x, w, None, spec=spec, contract=1, packed_length=q.packed_length)
    assert_exact_to_float32(y, x, values)


@needs_loops
@pytest.mark.parametrize("times", [1.0, 0.75])
def test_scales_that_are_codes_are_looked_up_whatever_numbers_these_have(times):
    """Powers of two are made of their codes; what lies beside them, or in another order, is looked up."""
    with np.errstate(over="ignore"):
        powers = np.float32(times) * np.ldexp(np.float32(1), np.arange(256) - 127)
    powers[255] = powers[0]
    others = np.random.default_rng(0).standard_normal(256).astype(np.float32)
    codes = np.random.default_rng(1).integers(1, 255, (4, 37)).astype(np.uint8)
    codes[1, 5], codes[2, 36] = 0, 255
    assert LOOPS.doubling_of(powers) == (1 if times == 1 else 2, 254)
    for table in (powers, others):
        for rows in ([0, 1, 2, 3], [2]):  # one for all
            found = np.empty(codes.shape, np.float32)
            LOOPS.looked_up(codes[rows], table, LOOPS.doubling_of(table), found)
            expected = np.broadcast_to(table[codes[rows]], found.shape)
            assert found.tobytes() == expected.tobytes()


@needs_loops
@pytest.mark.parametrize("zero", [-100, 40, 3])
def test_zero_points_that_are_no_codes(zero):
    q, x = quantize(weight(300, 512), "uint4", scheme="affine", granularity=PerGroup(32)), weight(1, 512, seed=2)
    w, spec = as_stored(q, packed=True)
    points = np.asarray(w.zero_point).copy()
    points[7, 3] = zero
    w = w._replace(zero_point=points)
    values = reference.values_stored(w, spec=spec, packed_length=q.packed_length, b=get_backend("numpy"))
    y = stored.matmul_stored(x, w, None, spec=spec, contract=1, packed_length=q.packed_length)
    assert_exact_to_float32(y, x, values)


@needs_loops
@pytest.mark.parametrize("zero", [(1 << 22) - 1, -(1 << 22), (1 << 24) + 1])
def test_zero_points_far_from_codes(zero):
    """Codes become floats 2^23 more than they mean, which serves zero points up to 2^22: others are declined."""
    q, x = quantize(weight(7, 96), dtype="uint8", scheme="affine", granularity=PerGroup(32)), weight(9, 96, 1)
    q.zero_point[:] = zero
    w, spec = as_stored(q, packed=True)
    values = np.empty((7, 96), np.float32)
    served = LOOPS.dequantize(w.codes, 96, *operands_of(w, spec, 96, False, get_backend("numpy")), 0, values)
    assert served == (abs(zero) < 1 << 22 or zero == -(1 << 22))
    if served:
        np.testing.assert_array_equal(values, q.dequantize())
    for rows in (1, 9):
        assert (decoded_product(x[:rows], q) is NotImplemented) == (not served)
        float64 = x[:rows].astype(float) @ q.dequantize().astype(float).T
        assert np.abs(linear(x[:rows], q) - float64).max() <= 1e-5 * np.abs(float64).max()


@needs_loops
@of_each_kind
def test_floats_of_groups_of_any_length_are_those_of_dequantize(how):
    """Of whole vectors and none, even and odd, that begin in the middle of a byte; and rows that end anywhere."""
    for size in (2, 3, 16, 24, 32, 48, 500):
        if how["dtype"] == "mxfp4" and size != 32:
            continue
        for rows, columns in ((7, 203), (3, 16), (5, 1)):
            granularity = {} if how["dtype"] == "mxfp4" else {"granularity": PerGroup(size)}
            q = quantize(weight(rows, columns), **how, **granularity)
            w, spec = as_stored(q, packed=True)
            [(part, values)] = stored.ByLoops(w, spec, 1, q.packed_length).blocks_of_values(w)
            assert part == slice(0, rows)
            np.testing.assert_array_equal(values, q.dequantize())


def in_panels(x, q, bias=None, cuts=1):
    """The product by panels, whose rows of x are cut so often for each panel, one part a cut."""
    w, spec = as_stored(q, packed=True)
    loops = stored.ByLoops(w, spec, 1, q.packed_length)
    ends = np.arange(-(-len(w.codes) // runtime.panel_loops().WIDTH) * cuts + 1)
    return loops._by_panels(x, w, bias, stored.steps_of_product(w.codes.size, len(x)), ends, cuts)


@needs_loops
@of_each_kind
def test_a_row_with_a_single_one_gives_the_values_of_dequantize_in_panels(how):
    """Whole panels and what is left of one; groups of any length; rows that take more than one panel."""
    for size in (3, 16, 24, 32, 500):
        if how["dtype"] == "mxfp4" and size != 32:
            continue
        granularity = {} if how["dtype"] == "mxfp4" else {"granularity": PerGroup(size)}
        for rows, columns in ((1, 1), (45, 37), (64, 96), (33, 2100)):
            q = quantize(weight(rows, columns), **how, **granularity)
            np.testing.assert_array_equal(in_panels(np.eye(columns, dtype=np.float32), q), np.asarray(q.dequantize()).T)


@needs_loops
@pytest.mark.parametrize("how", [{"dtype": "int8"}, {"dtype": "uint4", "scheme": "affine"}], ids=name_of)
def test_panels_are_the_same_however_they_are_cut(how):
    """By one thread and by several, which make floats anew; and nothing but the result is written to."""
    loops = runtime.panel_loops()
    for rows, outputs, columns in ((1, 1, 1), (9, 31, 33), (33, 45, 70), (70, 96, 384), (13, 75, 4200), (800, 40, 70)):
        q, bias = quantize(weight(outputs, columns), **how, granularity=PerGroup(16)), weight(1, outputs, 3)[0]
        x = np.random.default_rng(rows).integers(-20, 21, (rows, columns)).astype(np.float32)
        w, spec = as_stored(q, packed=True)
        operands = stored.ByLoops(w, spec, 1, q.packed_length).operands(w)
        expected = in_panels(x, q, bias)
        assert_exact_to_float32(expected, x, q.dequantize(), bias)
        for cuts in (1, 2, 3, 7):
            np.testing.assert_array_equal(in_panels(x, q, bias, cuts), expected)
            around = np.full(rows * outputs + 128, np.float32(7))
            y, ends = around[64:-64].reshape(rows, outputs), np.array([0, -(-outputs // loops.WIDTH) * cuts])
            assert loops.multiply_in_parts(0, ends, w.codes.view(np.uint8), x, columns, *operands, bias, cuts, y)
            np.testing.assert_array_equal(y, expected)
            assert (around[:64] == 7).all()
            assert (around[-64:] == 7).all()


@needs_loops
@pytest.mark.parametrize("how", [*KINDS, {"dtype": "mxfp4"}], ids=name_of)
def test_panels_are_as_exact_as_a_float32_product(how):
    """Each row of x by itself, long rows and short ones, of which BLAS adds up few terms in a chain."""
    how = how if how["dtype"] == "mxfp4" else {**how, "granularity": PerGroup(32)}
    for columns in (77, 800, 2051):
        w = weight(97, columns)
        for without in (False, True):
            if without:
                w[:, 41] = w[:, 9::32] = 0
            q = quantize(w, **how)
            values, rows = np.asarray(q.dequantize()), hard_rows(columns)
            x = np.concatenate(list(rows.values()))
            exact = x.astype(np.float64) @ values.astype(np.float64).T
            ours, theirs = (np.sqrt(np.mean((y - exact) ** 2, axis=1)) for y in (in_panels(x, q), x @ values.T))
            bound = 2 * np.maximum(np.maximum(theirs, 2.0**-25 * np.abs(exact).max(axis=1)), 2.0**-149)
            assert (ours <= bound).all(), [name for name, bad in zip(rows, ours > bound, strict=True) if bad]


@needs_loops
def test_sums_in_panels_meet_the_bias_last():
    """As after a float32 product: a bias far larger than sums would else take their last bits, one part at a time."""
    q, x, bias = quantize(weight(40, 1000)), weight(24, 1000, 1), np.full(40, 1e6, np.float32)
    np.testing.assert_array_equal(in_panels(x, q, bias), in_panels(x, q) + bias)
    np.testing.assert_array_equal(in_panels(0 * x, q, np.full(40, -0.0, np.float32)), 0 * x[:, :40])


@needs_loops
@pytest.mark.parametrize("how", [{"dtype": "int8"}, {"dtype": "int4"}], ids=name_of)
def test_an_infinity_or_nan_stays_in_its_row_of_a_panel(how):
    q, x = quantize(weight(45, 330), **how), weight(20, 330, seed=2)
    x[1, 3], x[2, 7], x[19, 329] = np.inf, np.nan, -np.inf
    y = in_panels(x, q)
    assert not np.isfinite(y[[1, 2, 19]]).any()
    others = np.delete(np.arange(20), [1, 2, 19])
    assert_exact_to_float32(y[others], x[others], q.dequantize())


@needs_loops
@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=needs("torch"))])
@pytest.mark.parametrize(
    "how", [{"granularity": PerChannel(0)}, {"dtype": "int4", "granularity": PerGroup(16)}], ids=name_of
)
def test_small_weights_meet_many_rows_in_panels(backend, how, monkeypatch):
    """However x lies; of other types than float32, too; and what scales of no use give is what others make of it."""
    b, calls = get_backend(backend), []
    own = stored.ByLoops._by_panels
    monkeypatch.setattr(stored.ByLoops, "_by_panels", lambda *given: calls.append(1) or own(*given))
    x, bias = weight(40, 384, 1), weight(1, 70)[0]
    q = quantize(weight(70, 384), **how)
    expected, moved = in_panels(x, q, bias), q.to_backend(backend)
    for lies in (x, x.T.copy().T, np.repeat(x, 2, axis=1)[:, ::2], np.repeat(x, 2, axis=0)[::2]):
        given = lies if backend == "numpy" else torch.from_numpy(lies)
        calls.clear()
        np.testing.assert_array_equal(b.to_numpy(linear(given, moved, b.asarray(bias))), expected)
        assert calls
    calls.clear()
    rough = linear(b.asarray(x.astype(np.float16)), moved, b.asarray(bias))
    assert calls
    np.testing.assert_allclose(b.to_numpy(rough).astype(np.float32), expected, rtol=1e-2, atol=5e-2)
    assert b.to_numpy(linear(b.asarray(x[:0]), moved)).shape == (0, 70)
    scale = np.asarray(q.scale).copy()
    scale[5] = 2.0**110
    y = b.to_numpy(linear(b.asarray(x * np.float32(1e-30)), replace(moved, scale=b.asarray(scale))))
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[:, :5], in_panels(x, q)[:, :5] * 1e-30, rtol=1e-3, atol=1e-33)


@needs_loops
@pytest.mark.exhaustive_where(name="jax", how={"dtype": "nvfp4"})  # seconds each; programs are alike
@pytest.mark.exhaustive_where(name="jax", how={"dtype": "int8", "granularity": PerGroup(64)})
@pytest.mark.exhaustive_where(name="jax", how={"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(32)})
@pytest.mark.parametrize(
    "how",
    [
        {"dtype": "int8", "granularity": PerGroup(64)},
        {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(32)},
        {"dtype": "nvfp4"},
        {"dtype": "int5", "granularity": PerGroup(100)},
    ],
    ids=name_of,
)
@pytest.mark.parametrize(
    "name", ["numpy", pytest.param("torch", marks=needs("torch")), pytest.param("jax", marks=needs("jax"))]
)
def test_large_weights_meet_many_rows_in_panels(name, how):
    """Eagerly and in programs; scales that have groups first, too."""
    backend = get_backend(name)
    q, bias = quantize(weight(1100, 1200), **how), weight(1, 1100)[0]
    x = weight(serve.ROWS_FOR_PANELS_OF_LARGE, 1200, 1)
    expected, moved = in_panels(x, q, bias), q.to_backend(backend.name)
    given = backend.asarray(x), moved, backend.asarray(bias)
    np.testing.assert_array_equal(backend.to_numpy(linear(*given)), expected)
    along = {**how, "granularity": replace(q.granularity, axis=0)}
    turned = quantize(weight(1100, 1200).T.copy(), **along).for_dense().to_backend(name)
    np.testing.assert_array_equal(backend.to_numpy(dense(given[0], turned, given[2])), expected)
    if name == "jax":
        np.testing.assert_array_equal(jax.jit(linear)(*given), expected)
        np.testing.assert_array_equal(jax.jit(dense)(given[0], turned, given[2]), expected)


@needs_loops
def test_which_rows_and_weights_meet_in_panels():
    def cut(rows, outputs, inner, dtype="int8", granularity=None):
        q = quantize(np.ones((outputs, inner), np.float32), dtype, granularity=granularity or PerChannel(0))
        w, spec = as_stored(q, packed=True)
        return stored.ByLoops(w, spec, 1, q.packed_length).cut_in_panels(rows)

    width = runtime.panel_loops().WIDTH
    assert cut(8, width, 384) is None  # loops of their own
    assert cut(513, width, 384) is None  # BLAS
    assert cut(128, width // 2 - 1, 384) is None  # most of a panel would be empty
    assert cut(128, 1030, 1024, "int4") is None  # too large for a cache, and too few rows
    assert cut(serve.ROWS_FOR_PANELS_OF_LARGE, 1030, 1024, "int4") is not None
    assert cut(5000, 1030, 1024, "int4") is not None
    assert cut(200, 128, 9000, "int4", PerGroup(3000)) is not None
    assert cut(200, 128, 9000, "int4", PerGroup(3001)) is None  # panels as deep as the row, which no cache holds
    assert cut(200, 64, 9000, "int4", PerGroup(3001)) is None
    assert (cut(512, 1030, 1024) is None) == serve.dots_beat_floats()
    assert cut(10, 384, 1536, "int4") is None  # decoded in registers
    assert cut(24, 384, 1536, "int4") is not None
    steps, ends, cuts = cut(128, width, 384)
    assert steps == 129 * 384 * width
    assert cuts == len(ends) - 1 == min(runtime.cores(), 16) or steps < runtime.worth_parts() // 2
    assert cut(128, 1024, 1024)[2] == 1 or runtime.cores() > 16  # enough panels for all threads
    assert cut(9, width, 40)[1].tolist() == [0, 1]  # not worth a second thread


def written_in_place(q, other):
    """The arrays of ``q``, with what those of ``other`` hold."""
    for a, b in zip(q._arrays(), other._arrays(), strict=True):
        a[...] = b


@needs_loops
@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=needs("torch"))])
@of_each_kind
def test_nothing_is_kept_of_a_weight_that_may_be_written(how, backend, monkeypatch):
    """By the loops and by BLAS, where the second product begins with what the first one found out."""
    monkeypatch.setattr(floats, "LARGE", 1)
    granularity = {} if how["dtype"] == "mxfp4" else {"granularity": PerGroup(32)}
    b = get_backend(backend)
    for rows in (1, 24):
        x = b.asarray(weight(rows, 96, 3))
        q, other = (quantize(weight(40, 96, seed), **how, **granularity).to_backend(backend) for seed in (1, 2))
        first, expected = linear(x, q), b.to_numpy(linear(x, other))
        np.testing.assert_array_equal(b.to_numpy(linear(x, q)), b.to_numpy(first))
        written_in_place(q, other)
        np.testing.assert_array_equal(b.to_numpy(linear(x, q)), expected)
        if isinstance(q.scale, QArray):
            continue
        q.scale[7, 2] = 2.0**110  # no loop multiplies by it
        assert np.isfinite(b.to_numpy(linear(x * 1e-30, q))).all()


@needs_loops
@pytest.mark.parametrize("how", [{"dtype": "int8"}, {"dtype": "int4"}, {"dtype": "mxfp4"}], ids=name_of)
def test_what_is_kept_of_a_weight_goes_with_it(how):
    q = quantize(weight(40, 96), **how)
    before = linear(weight(24, 96), q)
    for same in (copy.copy(q), copy.deepcopy(q), pickle.loads(pickle.dumps(q)), replace(q)):
        assert "_ready" in q.__dict__
        assert "_ready" not in same.__dict__
        np.testing.assert_array_equal(linear(weight(24, 96), same), before)
    alive = [weakref.ref(a) for a in q._arrays()]
    del q, same
    assert not any(ref() is not None for ref in alive)


@needs_loops
@pytest.mark.parametrize("backend", ["numpy", pytest.param("torch", marks=needs("torch"))])
def test_what_was_decided_with_loops_does_not_outlive_them(backend, monkeypatch):
    b = get_backend(backend)
    q, x = quantize(weight(40, 96), "int4").to_backend(backend), b.asarray(weight(24, 96))
    expected = b.to_numpy(linear(x, q))
    monkeypatch.setattr(runtime, "compiled_loops", lambda: None)
    monkeypatch.setattr(stored.ByLoops, "blocks_of_values", lambda *_: pytest.fail("a loop is called"))
    np.testing.assert_allclose(b.to_numpy(linear(x, q)), expected, rtol=1e-4, atol=1e-4)


@needs_loops
@pytest.mark.parametrize("how", [{"dtype": "int8"}, {"dtype": "uint4", "scheme": "affine"}], ids=name_of)
def test_first_products_on_several_threads(how, monkeypatch):
    monkeypatch.setattr(floats, "LARGE", 1)
    q, x, rows = quantize(weight(40, 96), **how, granularity=PerGroup(32)), weight(24, 96), [1, 24, 8, 2] * 4
    expected = [linear(x[:n], replace(q)) for n in rows]
    with ThreadPoolExecutor(4) as threads:
        for y, z in zip(threads.map(lambda n: linear(x[:n], q), rows), expected, strict=True):
            np.testing.assert_array_equal(y, z)


@needs_loops
def test_blocks_of_rows_make_up_the_weight(backend, monkeypatch):
    """Small weights that meet many rows, and packed groups that are no whole vectors, also of few rows."""
    monkeypatch.setattr(serve, "MOST_CODES_AT_ONCE", 3000)
    for rows, how in ((1, 24), (40, 32)):
        q = quantize(weight(70, 96), "int4", granularity=PerGroup(how)).to_backend(backend.name)
        x, bias = weight(rows, 96, seed=1), weight(1, 70)[0]
        y = linear(backend.asarray(x), q, backend.asarray(bias))
        assert_exact_to_float32(backend.to_numpy(y), x, np.asarray(backend.to_numpy(q.dequantize())), bias)


@pytest.mark.exhaustive_where(backend="jax")  # by programs of their own; test_transformations_of_jax has one
@pytest.mark.parametrize("how", KINDS[::2], ids=name_of)
def test_every_backend_multiplies_so(backend, how):
    how = how if how["dtype"] == "mxfp4" else {**how, "granularity": PerGroup(64)}
    q = quantize(weight(520, 330), **how).to_backend(backend.name)  # large enough for XLA's call
    values, bias = np.asarray(backend.to_numpy(q.dequantize())), weight(1, 520)[0]
    for rows in (1, 3, 18):
        x = weight(rows, 330, seed=rows)
        y = linear(backend.asarray(x), q, backend.asarray(bias))
        assert_exact_to_float32(backend.to_numpy(y), x, values, bias)
    turned = quantize(weight(330, 520), "nf4", granularity=PerGroup(32, axis=0)).to_backend(backend.name).for_dense()
    values = np.asarray(backend.to_numpy(turned.dequantize())).T
    assert_exact_to_float32(backend.to_numpy(dense(backend.asarray(x[:, :330]), turned)), x, values)


EITHER_ORDER = [
    {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(32, axis=1)},
    *(
        pytest.param(how, marks=pytest.mark.exhaustive)
        for how in (
            {"dtype": "nf4", "granularity": PerBlock((3, 64)), "scale_dtype": "float8_e4m3fn"},
            {"dtype": "uint8", "scheme": "affine", "granularity": PerBlock((-1, 64))},
        )
    ),
]


def turned_about(how):
    """The same of the transposed weight."""
    granularity = how["granularity"]
    if isinstance(granularity, PerBlock):
        return {**how, "granularity": PerBlock(granularity.shape[::-1])}
    return {**how, "granularity": PerGroup(granularity.size, axis=0)}


@needs(jax)
@needs_loops
@pytest.mark.parametrize("how", EITHER_ORDER, ids=name_of)
def test_scales_of_weights_for_dense_are_read_in_their_own_order(how):
    """The bits of the same weight for ``linear``; whole squares of scales, and what is left of them at each side."""
    values, x = jnp.asarray(weight(243, 550)), jnp.asarray(weight(3, 550, seed=1))
    q, bias = quantize(values, **how), jnp.asarray(weight(1, 243)[0])
    own = quantize(values.T, **turned_about(how)).for_dense()
    for mode in ("fast", "reproducible") if how["dtype"] != "nf4" else ("fast",):
        expected, _ = compiled(lambda x, w, mode=mode: linear(x, w, bias, mode=mode), x, q)
        y, steps = compiled(lambda x, w, mode=mode: dense(x, w, bias, mode=mode), x, own)
        np.testing.assert_array_equal(y, expected)
        assert "_product" in steps
        if q.packed_length is not None:
            assert "transpose" not in steps  # which would be one at each call


def compiled(function, *operands):
    """What a compiled function answers, and its own steps, without those of its conditions."""
    made = jax.jit(function).lower(*operands).compile()
    return np.asarray(made(*operands)), made.as_text().split("ENTRY")[1]


@needs(jax)
@needs_loops
@pytest.mark.parametrize("dtype", ["int4", pytest.param("mxfp4", marks=pytest.mark.exhaustive)])
def test_scales_of_a_transpose_are_turned_by_nobody(dtype):
    """``q.T`` inside a program: its scales are those of ``q`` again."""
    how = {} if dtype == "mxfp4" else {"granularity": PerGroup(32)}
    q, x = quantize(jnp.asarray(weight(243, 544)), dtype, **how), jnp.asarray(weight(3, 544, seed=1))
    expected, _ = compiled(linear, x, q)
    y, steps = compiled(lambda x, q: dense(x, q.T), x, q)
    np.testing.assert_array_equal(y, expected)
    assert "transpose_copy" not in steps


def test_the_operation_itself_is_what_the_form_is_held_against():
    b = get_backend("numpy")
    for how in ({"dtype": "nf4"}, {"dtype": "mxfp4"}, {"dtype": "int8"}, {"dtype": "uint3"}):
        q, x = quantize(weight(40, 70), **how), weight(5, 70, seed=1)
        w, spec = as_stored(q, packed=True)
        y = reference.matmul_stored(x, w, None, spec=spec, contract=1, packed_length=q.packed_length, b=b)
        assert_exact_to_float32(y, x, q.dequantize())


@needs_loops
def test_what_the_form_declines():
    x = weight(2, 200)
    for how in (
        {"dtype": "int6", "granularity": PerGroup(32), "offset": "data"},
        {"dtype": "int8", "offset": "data"},
    ):
        assert decoded_product(x, quantize(weight(50, 200), **how)) is NotImplemented
    q = quantize(weight(50, 200), "int4", granularity=PerGroup(32))
    assert decoded_product(x.astype(np.float64), q) is NotImplemented
    assert decoded_product(x[:0], q) is NotImplemented


@pytest.mark.parametrize("dtype", ["uint4", "uint8"])
def test_values_beyond_float32_are_clipped_as_dequantize_does(backend, dtype):
    w = np.full((300, 512), 1.5 * 2.0**127, np.float32)
    w[:, 0] = 1
    q = quantize(w, dtype, scheme="affine", granularity=PerGroup(32)).to_backend(backend.name)
    x = np.zeros((1, 512), np.float32)
    x[0, 1] = 1
    expected = np.asarray(backend.to_numpy(q.dequantize()))[:, 1]
    np.testing.assert_array_equal(np.asarray(backend.to_numpy(linear(backend.asarray(x), q)))[0], expected)


@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize(
    "how", [{"dtype": "int4", "granularity": PerGroup(7)}, {"granularity": PerChannel(0)}], ids=name_of
)
def test_a_scale_larger_than_any_of_data_leaves_products_finite(backend, how, rows):
    """Its values are clipped, and beside entries of 0 or small ones nothing is NaN."""
    q = quantize(weight(40, 70), **how)
    scale = q.scale.copy()
    scale[3, -1] = 3e38
    q = replace(q, scale=scale)
    x = np.zeros((rows, 70), np.float32)
    x[:, 60] = 1e-3
    y = backend.to_numpy(linear(backend.asarray(x), q.to_backend(backend.name)))
    np.testing.assert_allclose(np.delete(y, 3, axis=1), np.delete(x @ q.dequantize().T, 3, axis=1), rtol=1e-5)
    assert np.isfinite(y).all()


@pytest.mark.parametrize("how", [{"dtype": NINE}, {"dtype": "int4"}], ids=name_of)
@pytest.mark.parametrize("length", [333, 511])  # 511 codes fill whole vectors, but for the half that pads
def test_what_pads_the_last_byte_meets_nothing(backend, length, how):
    """Whoever packed the codes: with an odd number of them, the upper half of a row's last byte is nobody's."""
    q = quantize(weight(520, length), **how, granularity=PerGroup(32))
    dirty = np.asarray(q.storage).copy()
    dirty[:, -1] |= 0xF0
    q, x = replace(q, storage=dirty).to_backend(backend.name), weight(5, length, seed=6)
    for rows in (1, 5):
        y = backend.to_numpy(linear(backend.asarray(x[:rows]), q))
        assert_exact_to_float32(y, x[:rows], backend.to_numpy(q.dequantize()))


def test_memory_beside_the_loops_own_is_not_written_to():
    """Where whole vectors end with half a byte that pads; the allocator finds out, and ends the process."""
    code = """
import numpy as np
from aqt_lite import PerGroup, linear, quantize
for length in (255, 511, 1023):
    q = quantize(np.ones((300, length), np.float32), "int4", granularity=PerGroup(32))
    x = np.ones((1, length), np.float32)
    for _ in range(30):
        y = linear(x, q)
    np.testing.assert_allclose(y, length, rtol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("largest", [4000.0, 5000.0, 1e30])
def test_numbers_of_any_size(backend, largest):
    """Far from 1 they may leave float32 when they are scaled: dequantizing clips them there."""
    far = Codebook(f"to {largest}", (-largest, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, largest))
    w = weight(300, 512) * np.float32(2.0**120)
    q = quantize(
        w, far, granularity=PerGroup(32), scale=np.full((300, 16), 2.0**99, np.float32), on_clip="saturate"
    ).to_backend(backend.name)
    values = np.asarray(backend.to_numpy(q.dequantize()))
    assert np.isfinite(values).all()
    for rows in (1, 5):
        x = np.zeros((rows, 512), np.float32)
        x[:, 1] = 1
        y = np.asarray(backend.to_numpy(linear(backend.asarray(x), q)))
        np.testing.assert_array_equal(y, np.broadcast_to(values[:, 1], y.shape))


@needs_loops
def test_an_infinity_or_nan_stays_in_its_row(backend):
    q = quantize(weight(520, 330), "int4", granularity=PerGroup(32)).to_backend(backend.name)
    x = weight(4, 330, seed=2)
    x[1, 3], x[2, 7] = np.inf, np.nan
    y = np.asarray(backend.to_numpy(linear(backend.asarray(x), q)))
    assert not np.isfinite(y[1:3]).any()
    assert_exact_to_float32(y[[0, 3]], x[[0, 3]], backend.to_numpy(q.dequantize()))


@needs("jax")
def test_transformations_of_jax():
    q = quantize(jnp.asarray(weight(520, 330)), "nf4", granularity=PerGroup(32))
    x, bias, values = jnp.asarray(weight(6, 330, seed=3)), jnp.asarray(weight(1, 520)[0]), q.dequantize()
    expected = x @ values.T + bias

    def same(y, expected):
        np.testing.assert_allclose(np.asarray(y), np.asarray(expected), rtol=1e-4, atol=2e-4)

    same(jax.jit(linear)(x, q, bias), expected)
    by_rows = jax.vmap(lambda row: linear(row, q, bias))
    same(by_rows(x), expected)
    assert "cond[" in str(
        jax.make_jaxpr(by_rows)(x)
    )  # one condition for all rows: mapped, it would be a choice of both
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    same(jax.vmap(lambda w: linear(x, w, bias))(stacked)[1], expected)
    same(jax.lax.scan(lambda c, w: (c, linear(x, w, bias)), 0, stacked)[1][0], expected)
    with jax.disable_jit():
        same(linear(x, q, bias), expected)
    same(jax.export.export(jax.jit(lambda x: linear(x, q, bias)))(x).call(x), expected)
    found = jax.grad(lambda x, bias: (linear(x, q, bias) ** 2).sum(), argnums=(0, 1))(x, bias)
    for got, wanted in zip(found, (2 * expected @ values, 2 * expected.sum(0)), strict=True):
        np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-3, atol=2e-2)
    of_scale = jax.grad(lambda s: linear(x, replace(q, scale=s, trainable=True)).sum())(q.scale)
    wanted = jax.grad(lambda s: (x @ replace(q, scale=s, trainable=True).dequantize().T).sum())(q.scale)
    np.testing.assert_allclose(np.asarray(of_scale), np.asarray(wanted), rtol=1e-3, atol=2e-2)


@needs("jax")
def test_scales_of_zero_give_nan_under_jit():
    q = quantize(jnp.asarray(weight(520, 330)), "int4", granularity=PerGroup(32))
    x = jnp.asarray(weight(3, 330, seed=4))
    for bad in (0.0, -0.0, float("nan")):
        y = jax.jit(lambda s: linear(x, replace(q, scale=s)))(q.scale.at[5, 2].set(bad))
        assert np.isnan(np.asarray(y)[:, 5]).all()
        assert np.isfinite(np.delete(np.asarray(y), 5, axis=1)).all()


@needs("jax")
@needs_loops
@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"dtype": "int4", "granularity": PerGroup(16)}, marks=pytest.mark.exhaustive),
        {"granularity": PerChannel(0)},
        {"scheme": "affine"},
    ],
    ids=name_of,
)
def test_many_rows_meet_values_inside_programs(how):
    """A small weight becomes floats, more than one thread's share, which XLA multiplies; scales of 0 do not."""
    q = quantize(jnp.asarray(weight(230, 400)), **how)
    x, bias = jnp.asarray(weight(70, 400, seed=4)), jnp.asarray(weight(1, 230)[0])
    made = jax.jit(lambda s: linear(x, replace(q, scale=s), bias)).lower(q.scale).compile()
    assert "aqt_lite_decoded_values" in made.as_text()
    assert_exact_to_float32(made(q.scale), x, q.dequantize(), bias)
    if q.scale.size > 1:
        y = np.asarray(made(q.scale.at[5, -1].set(0.0)))
        assert np.isnan(y[:, 5]).all()
        others = np.delete(np.arange(230), 5)
        assert_exact_to_float32(y[:, others], x, q.dequantize()[others], bias[others])


@needs("torch")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_derivatives_of_torch(dtype):
    q = quantize(torch.from_numpy(weight(300, 260)), "nf4", granularity=PerGroup(32))
    x = torch.from_numpy(weight(5, 260, seed=5)).to(getattr(torch, dtype)).requires_grad_()
    bias = torch.from_numpy(weight(1, 300)[0]).to(x.dtype).requires_grad_()
    y = linear(x, q, bias)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == bias.grad.dtype == x.dtype
    rough = {"rtol": 1e-2, "atol": 0.5} if dtype == "bfloat16" else {"rtol": 1e-4, "atol": 1e-3}
    torch.testing.assert_close(x.grad.float(), torch.ones(5, 300) @ q.dequantize(), **rough)
    torch.testing.assert_close(bias.grad.float(), torch.full((300,), 5.0))


@pytest.mark.parametrize("times", [20, 200, 1e5])
@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("int4", {"granularity": PerGroup(128)}),
        ("uint4", {"granularity": PerGroup(64), "scheme": "affine"}),
        ("mxfp4", {}),
        ("int8", {"granularity": PerGroup(128)}),
    ],
)
def test_outliers_that_meet_codes_of_zero_take_nothing_from_their_neighbours(dtype, how, times):
    """In every quarter, as where columns of a weight were pruned: what is rounded is the sum, not the largest entry."""
    rng = np.random.default_rng(0)
    w = rng.standard_normal((256, 2048), dtype=np.float32)
    w[:, ::16] = 0
    x = (rng.choice([-1, 1], (1, 2048)) * rng.uniform(1, 1.01, (1, 2048))).astype(np.float32)
    x[:, ::16] *= np.float32(times)
    q = quantize(w, dtype, **how)
    values = q.dequantize()
    exact = x.astype(np.float64) @ values.astype(np.float64).T
    of_floats, ours = (np.sqrt(np.mean((y - exact) ** 2)) for y in (x @ values.T, linear(x, q)))
    assert ours <= 2 * of_floats


@needs_loops
@pytest.mark.parametrize("inner", [32, 480, 500, 8192])
@pytest.mark.parametrize("kind", ["BYTES", "HALVES"])
def test_a_row_that_is_arranged_by_itself_leaves_the_others_alone(kind, inner):
    """As a thread does that has one of several: only the row of a product of one row has room for fixed point."""
    x = weight(3, inner)
    static = getattr(LOOPS, kind), 32, np.arange(16, dtype=np.float32), False
    shape = LOOPS.shape_of_arranged(3, inner, static[0])
    together, apart = (np.full((shape[0] + 40, shape[1]), 7, np.float32) for _ in range(2))
    LOOPS.arrange(x, *static, together[:3])
    for m in (2, 0, 1):
        LOOPS.arrange(x[m : m + 1], *static, apart[m : m + 1])
    np.testing.assert_array_equal(apart, together)


@pytest.mark.parametrize("how", [{"dtype": "int8"}, {"dtype": "int4"}], ids=str)
@pytest.mark.parametrize(("backend", "rows"), [("numpy", 3), ("torch", 3), ("jax", 65)])
def test_products_of_which_a_thread_arranges_one_row(backend, rows, how):
    inner = 50_000 if rows == 3 else 8192
    x, q = weight(rows, inner, 1), quantize(weight(24, inner), granularity=PerGroup(32), **how)
    exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
    for _ in range(5):
        y = get_backend(backend).to_numpy(linear(get_backend(backend).asarray(x), q.to_backend(backend)))
        np.testing.assert_allclose(y, exact, atol=1e-2)


@pytest.mark.parametrize(
    ("dtype", "how"),
    [
        ("int8", {"granularity": PerGroup(32)}),
        ("uint8", {"scheme": "affine", "granularity": PerGroup(128)}),
        ("int8", {"granularity": PerChannel(0)}),
        ("int4", {"granularity": PerGroup(32)}),
        ("nf4", {"granularity": PerGroup(32)}),
        ("float8_e4m3fn", {"granularity": PerChannel(0)}),
    ],
)
@pytest.mark.parametrize("positive", [False, True])
def test_errors_do_not_grow_with_the_length_of_sums(dtype, how, positive):
    """BLAS adds up blocks of a row, whose sums it adds: a sum of all terms in one errs several times as much."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((24, 50_000), dtype=np.float32), rng.standard_normal((8, 50_000), dtype=np.float32)
    x[5, 3] = 1e5
    if positive:  # whose sums grow as they go
        w, x = rng.random((256, 8192), dtype=np.float32) + 0.5, rng.random((8, 8192), dtype=np.float32)
    q = quantize(w, dtype, **how)
    values = q.dequantize()
    exact, of_floats = x.astype(np.float64) @ values.astype(np.float64).T, x @ values.T
    for rows in (slice(0, 1), slice(5, 6), slice(4, 7), slice(0, 8)):
        ours, theirs = (np.sqrt(np.mean((y - exact[rows]) ** 2, axis=1)) for y in (linear(x[rows], q), of_floats[rows]))
        assert (ours <= 2 * theirs).all()


MANY = Codebook("two hundred levels", tuple(np.sinh(np.linspace(-3, 3, 200)).tolist()))
WIDE = Float("float7_e6m0", 6, 0, bias=47, max=2.0**16)
IN_ORDER = {
    "IN_ORDER": [{"dtype": "nvfp4"}, {"dtype": "nf4", "granularity": PerGroup(24)}],
    "INTEGERS": [
        {"dtype": "int2"},
        {"dtype": "int3", "granularity": PerGroup(16)},
        {"dtype": "uint5", "scheme": "affine", "granularity": PerGroup(32)},
        {"dtype": "uint7", "scheme": "affine", "granularity": PerGroup(17)},
        {"dtype": "int8", "granularity": PerGroup(5)},
        {"dtype": "ternary"},
        {"dtype": "mxint8"},
    ],
    "MOVED": [
        {"dtype": "float8_e4m3fn"},
        {"dtype": "float8_e5m2", "granularity": PerGroup(48)},
        {"dtype": "float8_e4m3fnuz", "granularity": PerBlock((3, 64))},
        {"dtype": "mxfp6_e2m3"},
        {"dtype": "float6_e3m2fn", "granularity": PerGroup(1)},
    ],
    "MOVED_WIDE": [{"dtype": "float8_e5m2fnuz"}, {"dtype": WIDE, "granularity": PerGroup(32)}],
    "LOOKED_UP": [{"dtype": MANY}, {"dtype": MANY, "granularity": PerGroup(40)}],
}
of_each_in_order = pytest.mark.parametrize("how", [how for some in IN_ORDER.values() for how in some], ids=name_of)


@needs_loops
def test_which_codes_meet_x_in_order():
    """By the numbers that they stand for; of the library's own formats none has to be looked up."""
    for kind, some in IN_ORDER.items():
        for how in some:
            q = quantize(weight(3, 96), **how)
            w, spec = as_stored(q, packed=True)
            whole = kind == "IN_ORDER" and spec.block[1] % (2 * LOOPS.LANES) == 0  # vectors of 8 lanes, blocks of 16
            expected = LOOPS.HALVES if whole else getattr(LOOPS, kind)
            assert stored.ByLoops(w, spec, 1, q.packed_length).operands(w).kind == expected, how
    for form in FORMATS.values():
        if form.element.bits <= 8 and not isinstance(form.element, Codebook):
            assert kind_of(form.element, form.element.bits != 8, form.group).kind != LOOPS.LOOKED_UP


@needs_loops
@of_each_in_order
def test_codes_that_meet_x_in_order_are_what_dequantizing_gives(how):
    """One row and several; rows that end within a vector and a byte, within the first bytes, and beyond a part of x."""
    for outputs, columns in ((7, 203), (3, 9), (101, 128), (5, 1301)):
        q = quantize(weight(outputs, columns), **how)
        values, x, bias = np.asarray(q.dequantize()), weight(17, columns, 1), weight(1, outputs, 2)[0]
        for unpacked in (q, q.unpacked()) if q.packed_length is not None else (q,):
            w, spec = as_stored(unpacked, packed=True)
            loops = stored.ByLoops(w, spec, 1, unpacked.packed_length)
            for at in {0, columns // 2, columns - 1}:
                for rows in (1, 2):
                    ones = np.zeros((rows, columns), np.float32)
                    ones[:, at] = 1
                    y = loops.by_decoding(ones, w, None)
                    np.testing.assert_array_equal(y, values[:, at] * np.ones((rows, 1)))
            for rows in (1, 2, 8, 9, 17):
                y = loops.by_decoding(x[:rows], w, bias)
                assert_exact_to_float32(y, x[:rows], values, bias)
            [(_, found)] = loops.blocks_of_values(w)
            np.testing.assert_array_equal(found, values)


@needs_loops
def test_one_row_by_bytes_in_odd_groups_is_left_to_loops_of_rows():
    for how, left in (
        ({"dtype": "int8", "granularity": PerGroup(20)}, True),
        ({"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(20)}, False),
        ({"dtype": "int8", "granularity": PerGroup(32)}, False),
    ):
        q, x = quantize(weight(40, 100), **how), weight(2, 100, 1)
        assert [decoded_product(x[:rows], q) is NotImplemented for rows in (1, 2)] == [left, False]
        assert_exact_to_float32(linear(x[:1], q), x[:1], q.dequantize())


@pytest.mark.parametrize(("dtype", "code"), [("float8_e4m3fn", 0xFF), ("float8_e4m3fnuz", 0x80), ("float8_e5m2", 0x7C)])
def test_codes_of_nan_and_infinity_stay_in_their_row(backend, dtype, code):
    q = quantize(weight(300, 260), dtype, granularity=PerChannel(0))
    codes = q.storage.copy()
    codes[7, 3] = codes[11, 259] = code
    q, x = replace(q, storage=codes).to_backend(backend.name), np.abs(weight(9, 260)) + np.float32(0.1)
    others = np.delete(np.arange(300), [7, 11])
    for rows in (1, 9):
        y = np.asarray(backend.to_numpy(linear(backend.asarray(x[:rows]), q)))
        assert np.isnan(y[:, [7, 11]]).all() or code == 0x7C  # infinities are clipped
        values = np.asarray(backend.to_numpy(q.dequantize()))
        assert_exact_to_float32(y[:, others], x[:rows], values[others])


@pytest.mark.parametrize("rows", [1, 9])
def test_codes_of_infinity_are_clipped_though_they_meet_0_and_each_other(backend, rows):
    q = quantize(weight(40, 64), "float8_e5m2", granularity=PerChannel(0))
    codes = q.storage.copy()
    codes[7, [5, 9]] = 0x7C, 0xFC  # both infinities
    q = replace(q, storage=codes)
    for x in (np.full((rows, 64), 0.25, np.float32), weight(rows, 64) * np.float32(0.01)):
        x[:, [5, 9]] *= x[0, 0] == 0.25
        y = linear(backend.asarray(x), q.to_backend(backend.name))
        assert_exact_to_float32(backend.to_numpy(y), x, q.dequantize())


@needs_loops
@pytest.mark.parametrize(
    "how", [{"dtype": "int4"}, {"dtype": "int3"}, {"dtype": "uint8", "scheme": "affine"}], ids=name_of
)
def test_odd_groups_give_the_same_bits_at_every_call(how):
    """Memory of the loops stays theirs until they are done, whoever else asks for some."""
    q, x = quantize(weight(384, 1536), granularity=PerGroup(100), **how), weight(8, 1536, 1)
    expected = linear(x, q)
    assert_exact_to_float32(expected, x, q.dequantize())

    def work(seed):
        others = [np.full(seed % 7 * 300 + 200, np.nan, np.float32) for _ in range(4)]
        return others and all(np.array_equal(linear(x, q), expected) for _ in range(25))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(work, range(6)))


@needs_loops
@pytest.mark.parametrize("how", [IN_ORDER["INTEGERS"][1], IN_ORDER["MOVED"][0], IN_ORDER["LOOKED_UP"][0]], ids=name_of)
def test_scales_of_no_use_are_left_to_the_operations(how):
    for bad in (2.0**110, np.nan):
        q, x = quantize(weight(40, 96), **{"granularity": PerChannel(0), **how}), weight(3, 96) * np.float32(1e-30)
        q.scale[5] = bad
        assert decoded_product(x, q) is NotImplemented
        if bad > 1:  # NaN stays
            y = linear(x, q)
            assert np.isfinite(y).all()


@needs_loops
@pytest.mark.parametrize(
    "how",
    [
        IN_ORDER["MOVED"][0],
        pytest.param(IN_ORDER["INTEGERS"][1], marks=pytest.mark.exhaustive),
        pytest.param({"dtype": "nvfp4"}, marks=pytest.mark.exhaustive),
    ],
    ids=name_of,
)
def test_codes_that_meet_x_in_order_do_so_on_every_backend(backend, how, monkeypatch):
    """Through the same loops, which give the same bits."""
    monkeypatch.setattr(runtime, "LARGE", 1 << 10)
    q, x, bias = quantize(weight(600, 330), **how), weight(3, 330, 1), weight(1, 600)[0]
    expected, moved = decoded_product(x, q, bias), q.to_backend(backend.name)
    given = backend.asarray(x), backend.asarray(bias)
    y = jax.jit(linear)(given[0], moved, given[1]) if backend.name == "jax" else linear(given[0], moved, given[1])
    if backend.name in ("numpy", "torch", "jax"):
        np.testing.assert_array_equal(backend.to_numpy(y), expected)
    assert_exact_to_float32(backend.to_numpy(y), x, q.dequantize(), bias)


IN_DOTS = [
    test_sums_of_integers_are_exact,
    test_one_row_is_as_exact_as_a_float32_product,
    test_what_cancels_leaves_what_float32_leaves,
    test_fixed_point_serves_what_it_is_for,
    test_the_largest_sums_of_digits_do_not_overflow,
    test_scales_of_any_size_and_sign_in_one_row,
    test_zero_points_that_are_no_codes,
    test_outliers_that_meet_codes_of_zero_take_nothing_from_their_neighbours,
    "test_what_pads_the_last_byte_meets_nothing[numpy-333-int4]",
    "test_what_pads_the_last_byte_meets_nothing[numpy-511-int4]",
    test_memory_beside_the_loops_own_is_not_written_to,
    "test_an_infinity_or_nan_stays_in_its_row[numpy]",
]


def form(lanes, bits):
    return f"(runtime.decoding_loops().LANES, runtime.decoding_loops().BITS_OF_DIGIT) == {(lanes, bits)}"


@needs_loops
@pytest.mark.exhaustive  # compiles all loops anew, for another processor
def test_processors_without_avx_512():
    tests = [test_a_row_with_a_single_one_gives_the_values_of_dequantize]
    tests += [test_floats_of_groups_of_any_length_are_those_of_dequantize]
    tests += [
        test_codes_that_meet_x_in_order_are_what_dequantizing_gives,
        test_scales_of_no_use_are_left_to_the_operations,
    ]
    tests += [test_panels_are_the_same_however_they_are_cut, test_panels_are_as_exact_as_a_float32_product]
    run_without_avx_512(__file__, [*tests, *IN_DOTS], form(8, 16))


@needs_loops
@pytest.mark.exhaustive  # compiles all loops anew, for another processor
@pytest.mark.parametrize("narrow", [False, True], ids=["shorts", "bytes of vectors of 256 bits"])
def test_other_dot_products(narrow):
    if (LOOPS.LANES, LOOPS.BITS_OF_DIGIT) != (16, 8):
        pytest.skip("the processor has no AVX-512 VNNI, whose other forms these are")
    of_bytes = "+avx512bw", "+avx512vbmi", "+avx512bitalg", "+avx512fp16"  # that have vectors of 512 bits of them
    if narrow:
        run_without(of_bytes, __file__, IN_DOTS, form(8, 8))
    else:  # whose vectors and whose digits other forms have, too
        run_without(("+avx512vnni",), __file__, IN_DOTS[:5], form(16, 16))


@needs_loops
@pytest.mark.parametrize("how", [KINDS[0], *KINDS[-8:]], ids=name_of)
def test_many_scales_of_16_bits_or_in_the_other_order_are_those_that_few_are(how):
    """Loops look them up and turn them: the bits of a weight that lies as products read it."""
    x, w = weight(3, 512, 1), weight(512, 400)
    turned = quantize(w, granularity=PerGroup(32, axis=0), **how).for_dense()
    plain = quantize(w.T.copy(), granularity=PerGroup(32), **how)
    assert plain.scale.size > max(operands.FEWEST_TO_LOOK_UP, operands.FEWEST_TO_TURN)
    for mode in ("fast", "reproducible"):
        for rows in (1, 3):
            y = dense(x[:rows], turned, mode=mode)
            np.testing.assert_array_equal(y, linear(x[:rows], plain, mode=mode))
    assert_exact_to_float32(y, x, plain.dequantize())


@needs_loops
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_scale_of_16_bits_is_looked_up_as_it_is_decoded(dtype):
    q = quantize(weight(4, 64), "int4", granularity=PerGroup(32), scale_dtype=dtype)
    _, spec = as_stored(q, packed=True)
    codes = np.arange(1 << 16, dtype=np.uint16).view(np.int16).reshape(256, 256)
    b = get_backend("numpy")
    for lie in (codes, codes.T, codes[:, ::2], codes.reshape(1, -1)):
        kept = Coded(lie, None)
        found, *_ = plain_scales(kept, spec, b)
        with np.errstate(all="ignore"):
            wanted = affine.scales(kept, spec, b).astype(np.float32)
        np.testing.assert_array_equal(found.view(np.int32), wanted.view(np.int32))
