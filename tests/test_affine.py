"""The numeric contract: the same bits from every form of every backend, and those that exact arithmetic gives."""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from conftest import lacks
from forms import (
    COMPILED,
    CONSTANT,
    CONSTANT_QPARAMS,
    EAGER,
    FORMS,
    JIT,
    NUMPY,
    STRICT,
    TORCH,
    Bits,
    Call,
    Problem,
    compared,
    differing,
    disagreements,
)
from hard_inputs import (
    calibrated_near_ties,
    ends,
    every_finite,
    every_pattern,
    near_ties,
    neighbours,
    random_magnitudes,
    random_scales,
)
from optional import jax, jnp, torch
from oracles import exact

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, _exact
from aqt_lite._registry import get_backend
from aqt_lite.testing import assert_same_bits

ELEMENTS = ("int8", "uint8", "int16", "uint16")
SCHEMES = ("symmetric", "affine")
ROWS = PerChannel(0)
ALL_BUT_CONSTANTS = tuple(form for form in FORMS if form not in (CONSTANT, CONSTANT_QPARAMS))


def oracle(problem, block=None):
    """Exact results of a problem whose rows, unless said otherwise, are blocks."""
    x, call, scale, zero_point, *_ = problem
    block = (1, *[None] * (x.ndim - 1)) if block is None else block
    e = exact.quantize(x, call.dtype, call.scheme, block, scale, zero_point)
    return Bits(e.codes, e.scale, e.zero_point, e.values)


def on_numpy(problems):
    """The NumPy backend's results: what the others are compared with where exact arithmetic would take too long."""
    return FORMS[NUMPY](problems)


# ---- the teaching notebook's numbers

X = np.asarray([[191.6, -13.5, 728.6], [92.14, 295.5, -184], [0, 684.6, 245.5]], dtype="float32")
W = np.asarray([[-2, -1.13, 0.42], [-1.51, 0.25, 1.62], [0.23, 1.35, 2.15]], dtype="float32")

NOTEBOOK = {
    "given scale and zero point": (
        Problem(X, Call(), np.full((1, 1), 3.5, "float32"), np.full((1, 1), -70, "int32")),
        {"codes": [[-15, -74, 127], [-44, 14, -123], [-70, 126, 0]], "error": 170.8753},
    ),
    "affine": (Problem(X, Call(scheme="affine")), {"scale": [[3.578823]], "zero_point": [[-77]], "error": 1.5730}),
    "symmetric, a scale a row": (
        Problem(X, Call(granularity=PerChannel(0))),
        {
            "scale": [[5.7370], [2.3268], [5.3906]],
            "codes": [[33, -2, 127], [40, 127, -79], [0, 127, 46]],
            "error": 1.8084,
        },
    ),
    "symmetric, a scale a column": (Problem(X, Call(granularity=PerChannel(1))), {"error": 1.0781}),
    "symmetric weight": (
        Problem(W),
        {"scale": [[0.0169291]], "codes": [[-118, -67, 25], [-89, 15, 96], [14, 80, 127]]},
    ),
}


@pytest.mark.exhaustive_where(form=COMPILED)
@pytest.mark.parametrize("form", FORMS)
def test_notebook_values(form):
    results = FORMS[form]([problem for problem, _ in NOTEBOOK.values()])
    for bits, (name, (problem, known)) in zip(results, NOTEBOOK.items(), strict=True):
        if "codes" in known:
            assert bits.codes.tolist() == known["codes"], name
        if "scale" in known:
            np.testing.assert_allclose(bits.scale, known["scale"], rtol=2e-5, err_msg=name)
        if "zero_point" in known:
            assert bits.zero_point.tolist() == known["zero_point"], name
        if "error" in known:
            error = np.mean((bits.values.astype("float64") - problem.x) ** 2)
            assert error == pytest.approx(known["error"], abs=5e-5), name


@pytest.mark.parametrize("mode", ["fast", "reproducible"])
def test_notebook_product(backend, mode):
    q = aqt_lite.quantize(W, backend=backend.name)
    x = backend.asarray(np.asarray([1, 2, 3], dtype="float32"))
    wanted = [-2.9965, 3.8768, 9.3957]
    np.testing.assert_allclose(backend.to_numpy(aqt_lite.linear(x, q, mode=mode)), wanted, atol=5e-5)
    if backend.name == "jax":
        np.testing.assert_allclose(jax.jit(partial(aqt_lite.linear, mode=mode))(x, q), wanted, atol=5e-5)


# ---- exact arithmetic


@pytest.mark.exhaustive_where(dtype="float16")
@pytest.mark.exhaustive_where(dtype="float64")
@pytest.mark.exhaustive_where(compiled=True)  # for seconds each
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])  # every number of bfloat16: below
def test_calibrated_blocks_are_exact_on_every_form(dtype, compiled):
    rows = [ends(24, dtype), random_magnitudes(60, 24, dtype), calibrated_near_ties(40, 24, dtype)]
    rows.append(calibrated_near_ties(20, 24, dtype, most=32767, seed=1))
    x = np.concatenate(rows)
    assert x.dtype.name == dtype
    problems = [Problem(x, Call(element, scheme, ROWS)) for element in ELEMENTS for scheme in SCHEMES]
    if compiled:
        problems = problems[::5]
    forms = [form for form in FORMS if form != CONSTANT_QPARAMS and (form == COMPILED) == compiled]
    assert not disagreements(problems, [oracle(p) for p in problems], forms)


@pytest.mark.exhaustive_where(dtype="float32")
@pytest.mark.exhaustive_where(dtype="float64")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_given_scales_are_exact_near_ties_on_every_form(dtype):
    few = {"float16": (-6, 8)}.get(dtype, (-110, 110))
    bytes_ = random_scales(6, 0, *few).astype("float64" if dtype == "float64" else "float32")
    words = bytes_ / 256 if dtype == "float16" else bytes_
    rng = np.random.default_rng(0)
    problems = []
    for element, scales, codes in [
        ("int8", bytes_, np.arange(-129, 128, 4)),
        ("uint8", bytes_, np.arange(-129, 128, 4)),
        ("int16", words, rng.integers(-32769, 32768, 60)),
        ("uint16", words, rng.integers(-32769, 32768, 60)),
    ]:
        x, column = near_ties(scales, codes, dtype), scales[:, None]
        odd = np.full(column.shape, 77, dtype="int32")  # at an odd zero point, adding before rounding shows
        problems.append(Problem(x, Call(element, "affine", ROWS), column, odd))
        if element.startswith("int"):
            problems.append(Problem(x, Call(element, "symmetric", ROWS), column))
    assert not disagreements(problems, [oracle(p) for p in problems])


@pytest.mark.parametrize("scale", [2.0**-125, 1.7 * 2.0**-125, 1.99 * 2.0**125, 2.0**126])
def test_given_scales_at_their_limits(scale):
    k = np.asarray([*np.arange(-3, 3) + 0.5, *np.arange(-4, 5)])
    x = np.clip(k * np.float32(scale), -3.4e38, 3.4e38).astype("float32")[None]
    column = np.full((1, 1), scale, dtype="float32")
    problems = [
        Problem(x, Call("int8", granularity=ROWS), column),
        Problem(x, Call("uint8", "affine", ROWS), column, np.full((1, 1), 255, dtype="int32")),
    ]
    assert not disagreements(problems, [oracle(p) for p in problems], (*EAGER, JIT, CONSTANT, CONSTANT_QPARAMS))


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_sixteen_bits_is_exact_on_every_form(dtype):
    finite, patterns = every_finite(dtype), every_pattern(dtype).reshape(256, 256)
    mixed = np.random.default_rng(0).permutation(finite.ravel())[:16384].reshape(-1, 16)
    one = np.full((1, 1), 0.0371, dtype="float32")
    rows = [
        Problem(finite, Call("int8", granularity=ROWS)),
        Problem(finite, Call("uint8", "affine", ROWS)),
        Problem(mixed, Call("int16", "affine", ROWS)),
    ]
    whole = [
        Problem(patterns, Call("uint8", "affine", nonfinite="ignore")),
        Problem(patterns, Call("int8", nonfinite="ignore"), one, np.full((1, 1), -70, dtype="int32")),
    ]
    expected = [oracle(p) for p in rows] + [oracle(p, (None, None)) for p in whole]
    forms = [form for form in ALL_BUT_CONSTANTS if form != COMPILED or dtype == "float16"]
    assert not disagreements(rows + whole, expected, forms)


# ---- many numbers, one form against another


@pytest.mark.exhaustive  # a quarter of a minute each
@pytest.mark.parametrize("compiled_by_torch", [False, True])
def test_large_arrays_agree_on_every_form(compiled_by_torch):
    """Large enough for kernels that small arrays never reach: 131,072 numbers and more."""
    wide = random_magnitudes(512, 600, "float32", seed=3)
    tied = calibrated_near_ties(512, 600, "float32", seed=4)
    normal = np.random.default_rng(5).normal(size=(512, 600)).astype("float32")
    problems = [
        *(Problem(x, Call("int8", granularity=ROWS)) for x in (wide, tied)),
        *(Problem(x, Call("uint8", "affine", PerGroup(24))) for x in (wide, tied)),
        Problem(tied, Call("int16", granularity=PerGroup(100))),
        Problem(tied, Call("int8", granularity=PerChannel(1))),
        Problem(normal, Call("int8")),
        Problem(normal, Call("int8", "affine")),
        Problem(normal, Call("uint8")),
        Problem(normal, Call("int8", granularity=PerBlock((512, -1)))),
        Problem(normal, Call("int8", granularity=ROWS), np.full((512, 1), 0.03, "float32")),
    ]
    forms = [form for form in ALL_BUT_CONSTANTS if (form == COMPILED) == compiled_by_torch]
    assert not disagreements(problems, on_numpy(problems), forms)
    some = [0, 7, 100, 255, 256, 400, 511]  # rows are blocks: a few are enough to hold NumPy itself to the oracle
    for problem, bits in zip(problems[:2], on_numpy(problems[:2]), strict=True):
        cut = Bits(bits.codes[some], bits.scale[some], None, bits.values[some])
        assert differing(cut, oracle(problem._replace(x=problem.x[some]))) == 0


@pytest.mark.exhaustive
def test_every_tie_of_sixteen_bits_agrees_on_every_form():
    x = near_ties(random_scales(3, 6), np.arange(-32769, 32768), reach=2)
    scales = random_scales(3, 6)[:, None]
    problems = [
        Problem(x, Call("int16", granularity=ROWS), scales),
        Problem(x, Call("int16", "affine", ROWS), scales, np.full((3, 1), -1001, dtype="int32")),
        Problem(x, Call("uint16", "affine", ROWS), scales, np.full((3, 1), 32769, dtype="int32")),
    ]
    expected = on_numpy(problems)
    assert not disagreements(problems, expected, (STRICT, "torch", COMPILED, "JAX", JIT))
    assert sum(map(compared, expected)) > 5_000_000


@pytest.mark.exhaustive
def test_every_tie_of_eight_bits_agrees_on_every_form():
    scales = random_scales(300, 7, -110, 110)
    x, column = near_ties(scales, np.arange(-129, 128)), scales[:, None]
    problems = [
        Problem(x, Call("int8", granularity=ROWS), column),
        Problem(x, Call("int8", "affine", ROWS), column, np.full((300, 1), 13, dtype="int32")),
        Problem(x, Call("uint8", "affine", ROWS), column, np.full((300, 1), 128, dtype="int32")),
    ]
    assert not disagreements(problems, on_numpy(problems), (STRICT, "torch", COMPILED, "JAX", JIT))


# ---- granularities: (shape, granularity, block); blocks are written out, so that the oracle shares no code

GRANULARITIES = [
    ((), PerTensor(), ()),
    ((1,), PerTensor(), (None,)),
    ((7,), PerChannel(0), (1,)),
    ((7,), PerGroup(3), (3,)),
    ((7,), PerGroup(100), (100,)),
    ((6, 10), PerTensor(), (None, None)),
    ((6, 10), PerChannel(0), (1, None)),
    ((6, 10), PerChannel(1), (None, 1)),
    ((6, 10), PerChannel(-2), (1, None)),
    ((6, 10), PerGroup(5), (1, 5)),
    ((6, 10), PerGroup(4), (1, 4)),
    ((6, 10), PerGroup(4, axis=0), (4, 1)),
    ((6, 10), PerGroup(1), (1, 1)),
    ((6, 10), PerBlock((2, 5)), (2, 5)),
    ((6, 10), PerBlock((4, 3)), (4, 3)),
    ((6, 10), PerBlock((-1, 4)), (None, 4)),
    ((1, 10), PerGroup(4, axis=0), (4, 1)),
    ((4, 3, 5), PerChannel(1), (None, 1, None)),
    ((4, 3, 5), PerChannel(-1), (None, None, 1)),
    ((4, 3, 5), PerGroup(2, axis=0), (2, 1, 1)),
    ((4, 3, 5), PerGroup(2, axis=1), (1, 2, 1)),
    ((4, 3, 5), PerBlock((3, 2, 2)), (3, 2, 2)),
    ((3, 4, 2, 5), PerBlock((1, 3, -1, 2)), (1, 3, None, 2)),
    ((3, 4, 2, 5), PerGroup(3, axis=-3), (1, 3, 1, 1)),
    ((2, 3, 2, 3, 4), PerBlock((2, 2, 1, 2, 3)), (2, 2, 1, 2, 3)),
    ((2, 3, 2, 3, 4), PerChannel(3), (None, None, None, 1, None)),
    ((0,), PerTensor(), (None,)),
    ((0, 4), PerChannel(1), (None, 1)),
    ((3, 0), PerChannel(0), (1, None)),
    ((3, 0), PerGroup(2), (1, 2)),
    ((3, 0, 5), PerBlock((2, -1, 2)), (2, None, 2)),
]
"""Blocks that divide and do not, every axis from both ends, 0 to 5 dimensions, and arrays of no elements."""


def granular_problems(dtype, which=slice(None)):
    """Problems and what exact arithmetic gives, with alternating schemes."""
    rng = np.random.default_rng(0)
    problems, expected = [], []
    for (shape, granularity, block), (element, scheme) in zip(
        GRANULARITIES, itertools.cycle([("int8", "symmetric"), ("uint8", "affine")]), strict=False
    ):
        x = (rng.normal(size=shape) * np.exp(3 * rng.normal(size=shape))).astype(dtype)
        problem = Problem(np.asarray(x), Call(element, scheme, granularity))
        problems.append(problem)
        expected.append(oracle(problem, block))
    return problems[which], expected[which]


@pytest.mark.exhaustive_where(form=CONSTANT)
@pytest.mark.parametrize("form", [form for form in FORMS if form not in (COMPILED, CONSTANT_QPARAMS)])
def test_granularities(form):
    assert not disagreements(*granular_problems("float32"), [form])


@pytest.mark.exhaustive  # compiles for a quarter of a minute
def test_ragged_groups_in_compiled_torch():
    """Groups longer than a vector register, whose last is shorter: inductor drops a loop's remainder (torch 2.13)."""
    rng = np.random.default_rng(1)
    problems, expected = [], []
    for shape, granularity, block in [
        ((64, 96), PerGroup(25), (1, 25)),
        ((33,), PerGroup(16), (16,)),
        ((35, 20), PerGroup(12, axis=0), (12, 1)),
        ((20, 35), PerBlock((9, 16)), (9, 16)),
        ((4, 30, 6), PerBlock((1, 13, -1)), (1, 13, None)),
        ((3, 4, 50), PerBlock((2, 3, 20)), (2, 3, 20)),
    ]:
        problems.append(Problem(rng.normal(size=shape).astype("float32"), Call("uint8", "affine", granularity)))
        expected.append(oracle(problems[-1], block))
    assert not disagreements(problems, expected, [COMPILED, TORCH, NUMPY, JIT])


def test_granularities_of_float64():
    assert not disagreements(*granular_problems("float64", slice(None, None, 3)), EAGER)


# ---- non-finite values

BROKEN = np.asarray([[1, 2, -3], [np.nan, 2, 3], [4, -np.inf, 1], [np.inf, np.nan, 0], [5, 0, 1]], dtype="float32")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.exhaustive_where(form=COMPILED, scheme="symmetric")
@pytest.mark.exhaustive_where(form=CONSTANT)
@pytest.mark.parametrize("form", [COMPILED, JIT, CONSTANT])
def test_a_traced_block_with_a_non_finite_value_becomes_nan_and_no_other(form, scheme):
    problem = Problem(BROKEN, Call("int8", scheme, ROWS))
    (bits,) = FORMS[form]([problem])
    good, bad = [0, 4], [1, 2, 3]
    assert np.isnan(bits.values[bad]).all()
    assert np.isnan(bits.scale[bad]).all()
    e = oracle(problem._replace(x=BROKEN[good]))
    assert bits.values[good].tolist() == e.values.tolist()
    assert bits.codes[good].tolist() == e.codes.tolist()


@pytest.mark.parametrize("scale", [None, 0.5])
def test_eager_calls_refuse_non_finite_values(backend, scale):
    with pytest.raises(ValueError, match=r"4 non-finite values of 15, the first at index \(1, 0\)"):
        aqt_lite.quantize(backend.asarray(BROKEN), granularity=ROWS, scale=scale)


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 0x7D01), ("bfloat16", 0x7F81), ("float32", 0x7F800001)])
def test_signalling_nan_is_refused_as_any_nan(dtype, bits):
    kind = get_backend("numpy").dtype(dtype)
    x = np.asarray([0, bits], dtype=f"uint{8 * kind.itemsize}").view(kind)
    with pytest.raises(ValueError, match="1 non-finite values of 2"):
        aqt_lite.quantize(x)


@pytest.mark.exhaustive  # test_formats and test_missing have such values
def test_ignored_non_finite_values_are_exact_on_every_form():
    x = np.concatenate([BROKEN, [[np.nan] * 3, [np.inf, -np.inf, np.inf], [3e38, -3e38, np.nan]]]).astype("float32")
    column = np.full((len(x), 1), 0.25, dtype="float32")
    problems = [
        Problem(x, Call(element, scheme, ROWS, "ignore"), *given)
        for element, scheme, given in [
            ("int8", "symmetric", ()),
            ("uint8", "symmetric", ()),
            ("int16", "affine", ()),
            ("int8", "symmetric", (column,)),
            ("uint8", "affine", (column, np.full((len(x), 1), 3, dtype="int32"))),
        ]
    ]
    assert not disagreements(problems, [oracle(p) for p in problems])


# ---- layouts


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(7), PerBlock((3, 5))])
@pytest.mark.parametrize("size", [(12, 20), (512, 700)])
def test_numpy_layouts_have_the_same_bits(size, granularity):
    x = np.random.default_rng(0).normal(size=size).astype("float32")
    call = Call("int8", "affine" if granularity == PerTensor() else "symmetric", granularity)
    expected = call(x)
    spaced = np.zeros((size[0] * 2, size[1] * 3), dtype="float32")
    spaced[::2, ::3] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    layouts = {
        "strided": spaced[::2, ::3],
        "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        "Fortran": np.asfortranarray(x),
        "transposed": x.T.copy().T,
        "read-only": frozen,
        "big-endian": x.astype(">f4"),
    }
    assert {name: differing(call(y), expected) for name, y in layouts.items()} == dict.fromkeys(layouts, 0)
    assert call(layouts["big-endian"]).scale.dtype.isnative


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_big_endian_arrays_move_to_every_backend(backend, dtype):
    if dtype == "float16" and lacks(backend, dtype):
        pytest.skip(f"{backend.name} has no float16")
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        q = aqt_lite.quantize(x.astype(x.dtype.newbyteorder(">")), backend=backend.name)
        found = Bits(backend.to_numpy(q.qvalue), backend.to_numpy(q.scale), None, backend.to_numpy(q.dequantize()))
    assert differing(found, Call()(x)) == 0


def test_torch_layouts_have_the_same_bits():
    x = np.random.default_rng(0).normal(size=(12, 20)).astype("float32")
    t, call = torch.from_numpy(x), Call("uint8", "affine", PerGroup(7))
    wide = torch.zeros(24, 60)
    wide[::2, ::3] = t
    column = torch.from_numpy(x[:, :1].copy()).expand(12, 20)
    for layout, same in [(t.T.contiguous().T, x), (wide[::2, ::3], x), (column, np.repeat(x[:, :1], 20, axis=1))]:
        assert differing(call(layout).each(lambda part: part.numpy()), call(same)) == 0


def test_a_broadcast_array_is_an_array():
    x = np.broadcast_to(np.float32([[1.5], [-2.25]]), (2, 5))
    assert differing(Call("int8", granularity=ROWS)(x), oracle(Problem(x, Call(granularity=ROWS)))) == 0


# ---- the correctly rounded reciprocal


def off_by(ulps):
    """A division that is wrong by that many units in the last place."""

    def divide(m):
        wrong = (np.float32(1) / m).view(np.int32) + np.int32(ulps)
        return wrong.view(np.float32)

    return divide


def as_bits(x, dtype):
    return x.view(dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("integer", [np.int32, np.int64])
def test_reciprocal_of_every_float32_significand(integer, ulps):
    """Every significand, from a quotient as wrong as an accelerator's: int32 wraps, int64 does not have to."""
    expected_exponent = 37
    for start in range(0, 1 << 23, 1 << 21):
        bits = np.arange(start, start + (1 << 21), dtype=np.int32)
        x = (bits | np.int32((127 + expected_exponent) << 23)).view(np.float32)
        inverse = _exact.reciprocal(
            x, xp=get_backend("numpy").xp, bitcast=as_bits, integer=integer, bits=np.int32, divide=off_by(ulps)
        )
        assert np.array_equal(inverse, np.float32(1) / x)


@pytest.mark.exhaustive
@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
def test_reciprocal_of_every_float32_significand_in_jax(ulps):
    bitcast = jax.lax.bitcast_convert_type

    @jax.jit
    def reciprocal(x):
        def divide(m):
            return bitcast(bitcast(1 / m, jnp.int32) + ulps, jnp.float32)

        return _exact.reciprocal(x, xp=jnp, bitcast=bitcast, integer=jnp.int32, bits=jnp.int32, divide=divide)

    x = (np.arange(1 << 23, dtype=np.int32) | np.int32((127 - 90) << 23)).view(np.float32)
    assert np.array_equal(np.asarray(reciprocal(x)), np.float32(1) / x)


def test_reciprocal_over_all_exponents(backend):
    rng = np.random.default_rng(0)
    exponents = np.arange(-125, 126)
    x = np.ldexp(1 + rng.random((2000, exponents.size)), exponents).astype("float32")
    x = np.concatenate([x.ravel(), np.float32([2.0**126, 2.0**-125]), neighbours(np.float32([1.0, 2.0]), 3).ravel()])
    inverse = backend.to_numpy(backend.reciprocal(backend.asarray(x)))
    assert np.array_equal(inverse, np.float32(1) / x)


def test_reciprocal_of_float64(backend):
    rng = np.random.default_rng(0)
    x = np.ldexp(1 + rng.random(200_000), rng.integers(-1021, 1022, 200_000))
    x = np.concatenate([x, [2.0**1022, 2.0**-1021], neighbours(np.float64([1.0, 2.0]), 3).ravel()])
    with jax.enable_x64(True):
        inverse = backend.to_numpy(backend.reciprocal(backend.asarray(x)))
    assert np.array_equal(inverse, 1 / x)
    for value, found in zip(x[:500].tolist(), inverse[:500].tolist(), strict=True):
        assert exact.nearest(1 / Fraction(value), "float64") == Fraction(found)


# ---- the comparison itself


def test_the_harness_sees_a_wrong_quantizer(monkeypatch):
    """Dividing by the scale in place of multiplying with its reciprocal is noticed on these inputs."""
    scales = random_scales(20, 8)
    x = near_ties(scales, np.arange(-127, 127))
    problem = Problem(x, Call("int8", granularity=ROWS), scales[:, None])
    (good,) = on_numpy([problem])
    careless = np.clip(np.rint(x / scales[:, None]), -127, 127).astype("int8")
    assert differing(good._replace(codes=careless), good) > x.size // 1000
    monkeypatch.setitem(FORMS, NUMPY, lambda problems: [good._replace(codes=careless)])
    assert NUMPY in disagreements([problem], [good], [NUMPY])


def test_ranges_whose_ends_add_up_to_more_than_a_float(backend):
    """XLA makes ``(hi + lo) * 0.5`` of two halves with one constant."""
    for low, high in ((2e38, 3e38), (-3e38, -2e38), (-3e38, 3e38)):
        x = np.linspace(low, high, 64, dtype=np.float32).reshape(2, 32)
        for dtype in ("int8", "float8_e4m3fn", "nf4"):
            expected = aqt_lite.quantize(x, dtype, offset="data", granularity=PerGroup(16))
            calls = [lambda a, d=dtype: aqt_lite.quantize(a, d, offset="data", granularity=PerGroup(16))]
            calls += [jax.jit(calls[0])] if backend.name == "jax" else []
            for call in calls:
                assert_same_bits(call(backend.asarray(x)), expected)


def test_codebooks_without_zero_count_subnormal_values_as_zero(backend):
    codebook = aqt_lite.Codebook("around_zero", (-1.0, -0.05, 0.047, 1.0))
    x = (np.linspace(-1.2e-38, 1.2e-38, 64, dtype=np.float32) * 3).reshape(2, 32)
    expected = aqt_lite.quantize(np.where(np.abs(x) < 2.0**-126, np.float32(0), x), codebook)
    calls = [lambda a: aqt_lite.quantize(a, codebook)]
    calls += [jax.jit(calls[0])] if backend.name == "jax" else []
    for call in calls:
        assert_same_bits(call(backend.asarray(x)), expected)
