"""BitRound: the bits of numcodecs, of exact rounding and of every backend; the number of bits, and xbitinfo's."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from hard_inputs import dtype_of
from numcodecs import BitRound
from optional import jax, jnp, torch

import aqt_lite
from aqt_lite import bit_information, bitround, keepbits_for
from aqt_lite._registry import get_backend
from aqt_lite.significant import significand_bits
from aqt_lite.testing import assert_same_bits

FLOATS = ("float16", "bfloat16", "float32", "float64")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "bit_information.json").read_text())
FIELD = (280 + np.random.default_rng(0).standard_normal((60, 90)).cumsum(0).cumsum(1) / 40).astype("float32")


def any_bits(dtype, count=4000):
    """Floats of random bit patterns, NaN, infinities, zeros and subnormal numbers among them."""
    kind = dtype_of(dtype)
    rng = np.random.default_rng(count)
    x = np.frombuffer(rng.bytes(count * kind.itemsize), kind).copy()
    info = ml_dtypes.finfo(kind)
    if kind.itemsize == 2:  # comparisons of signalling NaN warn
        with np.errstate(invalid="ignore"):
            nan = np.isnan(x)
        x.view("i2")[nan] |= 1 << (int(info.nmant) - 1)
    with np.errstate(all="ignore"):
        ends = [0.0, -0.0, np.inf, -np.inf, np.nan, info.max, -info.max, info.smallest_subnormal, info.tiny, 1.0]
        x[: len(ends)] = np.asarray(ends, np.float64).astype(kind)
    return x


def by_fractions(value, keepbits, dtype):
    """A finite number rounded to a multiple of the step that its binade has, half to even, kept in range."""
    info = ml_dtypes.finfo(dtype_of(dtype))
    exact = Fraction(float(value))
    if not exact:
        return 0.0
    exponent = max(math.frexp(float(abs(exact)))[1] - 1, int(info.minexp))
    step = Fraction(2) ** (exponent - keepbits)
    if not keepbits and abs(exact / step) == Fraction(3, 2):  # halfway between two powers: an even exponent
        up = (exponent + int(info.maxexp)) % 2 == 0
        exact = math.copysign(1, exact) * step * (2 if up else 1)
    largest = (2 - Fraction(1, 2**keepbits)) * Fraction(2) ** (int(info.maxexp) - 1)
    return float(min(max(round(exact / step) * step, -largest), largest))


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_of_bits_rounds_exactly(dtype):
    x = any_bits(dtype, 500)
    most = significand_bits(dtype)
    for keepbits in {0, 1, most // 2, most - 1, most}:
        y = bitround(x, keepbits)
        assert y.dtype == x.dtype
        for before, after in zip(x, y, strict=True):
            if np.isfinite(before):
                assert float(after) == by_fractions(before, keepbits, dtype)
                assert np.signbit(before) == np.signbit(after)
            else:
                assert after.tobytes() == before.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_bits_of_numcodecs(dtype):
    """Where it has them: it makes -0.0 of some NaN, and infinities of numbers that no number follows."""
    x = any_bits(dtype)
    for keepbits in range(significand_bits(dtype) + 1):
        with np.errstate(all="ignore"):
            theirs = np.asarray(BitRound(keepbits=keepbits).encode(x)).view(x.dtype)
        ours = bitround(x, keepbits)
        same = np.isfinite(x) & np.isfinite(theirs)
        assert same.sum() > 0.9 * np.isfinite(x).sum()
        assert_same_bits(ours[same], theirs[same])
        assert np.isfinite(ours[np.isfinite(x)]).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_same_bits_on_every_backend(backend, dtype):
    x = any_bits(dtype)
    if backend.name == "jax" and dtype == "float64":
        with jax.enable_x64(True):
            assert_same_bits(bitround(jnp.asarray(x), 20), bitround(x, 20))
        return
    if backend.name == "array_api_strict" and dtype not in ("float32", "float64"):
        with pytest.raises(ValueError, match="no dtype"):
            backend.asarray(x)
        return
    for keepbits in (0, 3, significand_bits(dtype)):
        y = bitround(backend.asarray(x), keepbits)
        assert_same_bits(y, bitround(x, keepbits))


def test_compilers_and_derivatives():
    x = any_bits("float32")
    wanted = bitround(x, 7)
    assert_same_bits(jax.jit(lambda v: bitround(v, 7))(jnp.asarray(x)), wanted)
    assert not np.asarray(jax.grad(lambda v: bitround(v, 7).sum())(jnp.ones(3))).any()
    with pytest.raises(TypeError, match="being traced"):
        jax.jit(lambda v: keepbits_for(v, max_rel_err=0.1))(jnp.ones(3))


@pytest.mark.exhaustive  # torch's compiler takes seconds to load
def test_the_compiler_of_torch():
    x = any_bits("float32")
    found = torch.compile(lambda v: bitround(v, 7), fullgraph=True, backend="aot_eager")(torch.from_numpy(x.copy()))
    assert_same_bits(found, bitround(x, 7))


def test_layouts_and_byte_orders():
    x = np.tile(FIELD, (12, 5))
    wanted = bitround(x.copy(), 5)
    for other in (np.asfortranarray(x), np.repeat(x, 2, axis=1)[:, ::2], x.astype(">f4")):
        other.flags.writeable = False
        assert_same_bits(bitround(other, 5), wanted)
    small = x[:3, :5]
    assert_same_bits(bitround(small.astype(">f4"), 5), wanted[:3, :5])
    assert_same_bits(bitround(np.float32(3.14159), 3), np.asarray(3.25, "float32"))
    assert bitround(np.zeros((0, 3), "float32"), 5).shape == (0, 3)
    assert bitround([1.0, 1.9], 0).tolist() == [1.0, 2.0]
    assert keepbits_for(np.float32(1.25), max_rel_err=0) == 2
    for whole in (small, torch.from_numpy(small.copy())):
        same = bitround(whole, 23)
        same[0, 0] = 7
        assert whole[0, 0] == FIELD[0, 0], "the result has memory of its own"


def test_arrays_of_dask_stay_lazy():
    x = da.from_array(FIELD, chunks=(17, 40))
    y = bitround(x, 6)
    assert isinstance(y, da.Array)
    assert_same_bits(y.compute(scheduler="synchronous"), bitround(FIELD, 6))
    for how in ({"max_abs_err": 0.1}, {"max_rel_err": 1e-4}, {"information": 0.99}, {"information": 0.9, "axis": 0}):
        assert keepbits_for(x, **how) == keepbits_for(FIELD, **how)
    assert (bit_information(x, 1) == bit_information(FIELD, 1)).all()


def exact_errors(x, y, relative):
    for a, b in zip(x.ravel(), y.ravel(), strict=True):
        if np.isfinite(a):
            error = abs(Fraction(float(a)) - Fraction(float(b)))
            yield error / abs(Fraction(float(a))) if relative and error else error


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("argument", ["max_abs_err", "max_rel_err"])
def test_bounds_are_kept_and_one_bit_less_does_not(dtype, argument):
    relative = argument == "max_rel_err"
    for x in (any_bits(dtype, 300), (np.linspace(270, 305, 300)).astype(dtype_of(dtype))):
        for bound in (0.0, 1e-5, 0.01, 0.7, 1e9):
            keepbits = keepbits_for(x, **{argument: bound})
            if keepbits < significand_bits(dtype):
                assert max(exact_errors(x, bitround(x, keepbits), relative)) <= Fraction(bound)
            if keepbits:
                assert max(exact_errors(x, bitround(x, keepbits - 1), relative)) > Fraction(bound)


def test_a_value_in_the_last_part_counts():
    x = np.ones((900, 500), "float32")
    x[-1, -1] = 1 + 2**-20
    assert keepbits_for(x, max_abs_err=0) == 20
    assert keepbits_for(np.full(5, np.nan), max_abs_err=0) == 0
    assert keepbits_for(np.zeros(0), max_rel_err=0) == 0


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['field']}-{c['dtype']}-{c['axis']}")
def test_the_information_of_xbitinfo(case):
    """Vectors of xbitinfo's own Python implementation, which tests no bit for being more than chance."""
    generate = {}
    exec(GOLDEN["fields"], generate)
    x = generate["field"](case["field"]).astype(case["dtype"])
    ours, theirs = bit_information(x, case["axis"]), np.asarray(case["information"])
    told = ours > 0
    np.testing.assert_allclose(ours[told], theirs[told], rtol=1e-9)
    assert theirs[~told].max() < 2e-2, "information that we take for chance"
    assert told.sum() >= 4
    more = case["keepbits"] - keepbits_for(x, information=0.99, axis=case["axis"])
    # It sums what is chance, too, over 30 more bits of float64, which in one case makes a bit.
    assert more == 0 or (case["dtype"] == "float64" and more == 1)


def test_the_axis_that_needs_most_bits_decides():
    each = [keepbits_for(FIELD, information=0.99, axis=axis) for axis in (0, 1)]
    assert keepbits_for(FIELD, information=0.99) == max(each)
    holes = np.where(FIELD > 281, np.nan, FIELD)
    assert abs(keepbits_for(holes, information=0.99) - max(each)) <= 1
    whole = keepbits_for(FIELD, information=1.0)
    assert max(each) <= whole <= 23


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "give one of max_abs_err"),
        ({"max_abs_err": 1.0, "information": 0.9}, "give one of"),
        ({"max_abs_err": 1.0, "max_rel_err": 0.9}, "are both given"),
        ({"max_abs_err": 1.0, "axis": 0}, "axis is given without information"),
        ({"information": 0.0}, "a share is above 0"),
        ({"information": 1.5}, "at most 1"),
        ({"information": 0.5, "axis": 7}, "x has 2 dimensions"),
        ({"max_rel_err": -1.0}, "not negative"),
    ],
)
def test_what_cannot_be_chosen_is_refused(how, words):
    with pytest.raises(ValueError, match=words):
        keepbits_for(FIELD, **how)


def test_bad_input():
    with pytest.raises(ValueError, match=r"keepbits=24: float32 has 23, give 0 to 23"):
        bitround(FIELD, 24)
    with pytest.raises(ValueError, match="keepbits=-1"):
        bitround(FIELD, -1)
    for bad in (True, 3.0, "3"):
        with pytest.raises(TypeError, match="give an integer"):
            bitround(FIELD, bad)
    with pytest.raises(TypeError, match="floating-point"):
        bitround(np.arange(3), 3)
    with pytest.raises(TypeError, match="QArray already"):
        bitround(aqt_lite.quantize(FIELD), 3)
    with pytest.raises(ValueError, match="no bit of x shares information"):
        keepbits_for(np.ones((5, 5), "float32"), information=0.99)
    with pytest.raises(ValueError, match="along any axis"):
        keepbits_for(np.float32(1), information=0.99)
    with pytest.raises(TypeError, match="information is a str"):
        keepbits_for(FIELD, information="99%")


def test_libraries_without_bit_patterns_go_through_numpy():
    strict = get_backend("array_api_strict")
    assert_same_bits(bitround(strict.asarray(FIELD), 4), bitround(FIELD, 4))
