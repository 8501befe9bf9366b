"""Bounds: what is kept is checked in fractions, on the values themselves."""

from __future__ import annotations

import logging
import math
import re
import warnings
from fractions import Fraction

import dask.array as da
import numpy as np
import pytest
from hard_inputs import dtype_of, every_finite, random_magnitudes
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import jax, jnp, needs, torch

from aqt_lite import (
    ClippingWarning,
    Dialect,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    choose_qparams,
    error_report,
    plan_tree,
    quantize,
    quantize_tree,
)
from aqt_lite._registry import get_backend
from aqt_lite.bounds import bound_of, candidates, largest_error
from aqt_lite.formats import FORMATS
from aqt_lite.testing import assert_same_bits

KELVIN = np.random.default_rng(0).uniform(270, 305, (4, 30, 50)).astype("float32")
FLOATS = ("float16", "bfloat16", "float32", "float64")
GRANULARITIES = [PerTensor(), PerChannel(0), PerGroup(5), PerBlock((2, 3))]


def errors(x, q, relative=False):
    """Exact errors of the finite values, in the own type of ``q`` and in the type of the arithmetic."""
    found = []
    for dtype in {q.float_dtype, "float64" if q.float_dtype == "float64" else "float32"}:
        y = np.asarray(q.dequantize(dtype)).astype("float64").ravel()
        for a, v in zip(np.asarray(x).astype("float64").ravel(), y, strict=True):
            if math.isfinite(a):
                error = abs(Fraction(a) - Fraction(v))
                found.append(error / abs(Fraction(a)) if relative and error else error)
    return found


def kept_by(x, dtype, **how):
    """The least bound of the message that refuses 0; None where 0 is kept."""
    try:
        quantize(x, dtype, **how)
    except ValueError as error:
        return float(re.search(r"keeps max_\w+=(\S+) here", str(error))[1])
    return None


@st.composite
def arrays(draw, dtype):
    """Matrices of any bit patterns, 0 in place of what is not finite; some with magnitudes that are close."""
    shape, kind = draw(st.tuples(st.integers(1, 5), st.integers(1, 7))), dtype_of(dtype)
    count = math.prod(shape) * kind.itemsize
    pattern = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), kind).reshape(shape)
    close = draw(st.booleans())
    with np.errstate(invalid="ignore"):  # signalling NaN
        x = pattern.astype("float64")
        return np.nan_to_num(280 + 5 * np.sin(x) if close else x, posinf=0, neginf=0).astype(kind)


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=60)
@given(data=st.data())
def test_every_value_keeps_the_bound_and_the_least_one_is_told(dtype, data):
    x = data.draw(arrays(dtype))
    blocks = [] if dtype == "float64" else ["mxint8"]  # whose scales do not reach as far
    form = data.draw(st.sampled_from(["int8", "uint5", "uint16", "float8_e4m3fn", "nf4", *blocks]))
    how = {"granularity": data.draw(st.sampled_from(GRANULARITIES))}
    if data.draw(st.booleans()) and FORMATS[form].element.zero_points:
        how["scheme"] = "affine"
    least = kept_by(x, form, max_abs_err=0.0, **how)
    if least is None:
        assert not any(errors(x, quantize(x, form, max_abs_err=0.0, **how)))
        return
    q = quantize(x, form, max_abs_err=least, **how)
    assert q.dtype == form
    assert max(errors(x, q)) <= Fraction(least)
    assert max(errors(x, q)) > Fraction(math.nextafter(least, 0))  # no rounding up but the last
    with pytest.raises(ValueError, match="cannot keep"):
        quantize(x, form, max_abs_err=math.nextafter(least, 0), **how)


@pytest.mark.parametrize("dtype", FLOATS)
@settings(max_examples=30)
@given(data=st.data())
def test_relative_errors_are_kept_and_zero_is_exact(dtype, data):
    x = data.draw(arrays(dtype))
    bound = data.draw(st.sampled_from([0.5, 0.07, 0.04, 1e-3]))
    form = data.draw(st.sampled_from(["auto", "float8_e4m3fn", "int8", "uint16"]))
    how = {"granularity": data.draw(st.sampled_from(GRANULARITIES))}
    q, words = None, ""
    try:
        q = quantize(x, form, max_rel_err=bound, **how)
    except ValueError as error:
        words = str(error)
    if q is not None:
        assert max(errors(x, q, relative=True)) <= Fraction(bound)
        return
    told = re.search(r"keeps max_rel_err=(\S+) here", words)
    if told is None:
        assert "keeps no bound at all" in words
        return
    assert float(told[1]) > bound
    q = quantize(x, form, max_rel_err=float(told[1]), **how)
    worst = max(errors(x, q, relative=True))
    assert Fraction(told[1]) * (1 - Fraction(1, 2**48)) <= worst <= Fraction(float(told[1]))


@pytest.mark.exhaustive
@pytest.mark.parametrize("form", ["uint2", "uint8", "int8", "uint16", "float8_e5m2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits_keeps_its_bound(dtype, form):
    x = every_finite(dtype)
    for granularity in (PerTensor(), PerChannel(0)):
        least = kept_by(x, form, max_abs_err=0.0, granularity=granularity)
        if least is not None:
            worst = max(errors(x, quantize(x, form, max_abs_err=least, granularity=granularity)))
            assert Fraction(math.nextafter(least, 0)) < worst <= Fraction(least)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_number_of_16_bits_keeps_a_relative_bound(dtype):
    kept = 0
    for row in every_finite(dtype):
        try:
            q = quantize(row, "auto", max_rel_err=2.0**-4)
        except ValueError:  # numbers next to subnormal ones, for which there are no scales
            assert np.abs(row.astype("float64")).min() < (2.0**-14 if dtype == "float16" else 2.0**-115)
            continue
        assert max(errors(row, q, relative=True)) <= Fraction(1, 16)
        kept += 1
    assert kept > 50


def test_magnitudes_of_every_size():
    for dtype in FLOATS:
        x = random_magnitudes(40, 7, dtype)
        q = quantize(x, "auto", max_abs_err=float(np.abs(x.astype("float64")).max()) / 1e4)
        assert q.dtype == "uint16"
        assert max(errors(x, q)) <= Fraction(float(np.abs(x.astype("float64")).max()) / 1e4)


def test_a_difference_that_rounds_to_the_bound_is_above_it():
    x, b = np.asarray([1 + 2.0**-52]), get_backend("numpy")
    q = quantize(np.asarray([-(2.0**-60)]), "float8_e5m2", scale=2.0**-60)
    assert x[0] - q.dequantize()[0] == x[0]
    assert largest_error(x, q, b) == math.nextafter(x[0], 2)  # the sum is larger by 2^-60
    assert largest_error(np.asarray([1.7e308]), quantize(np.asarray([-1.7e308])), b) == math.inf


@pytest.mark.parametrize(
    ("bound", "dtype"), [(12, "uint2"), (3, "uint3"), (1.2, "uint4"), (0.3, "uint6"), (0.1, "uint8"), (0.01, "uint16")]
)
def test_the_narrowest_type_is_taken(bound, dtype):
    q = quantize(KELVIN, "auto", max_abs_err=bound)
    assert q.dtype == dtype
    assert error_report(KELVIN, q).max_abs_error <= bound
    assert q.nbytes == math.ceil(50 * q.bits / 8) * 120 + 8
    narrower = [f.name for f in candidates(bound_of(bound, None)) if f.element.bits < q.bits]
    for other in narrower:
        with pytest.raises(ValueError, match=f"{other} cannot keep max_abs_err={bound}.*dtype='{dtype}' does"):
            quantize(KELVIN, other, max_abs_err=bound)


def test_values_of_few_kinds_need_few_codes():
    x = np.random.default_rng(1).choice(np.asarray([0, 7, 14, 21], "float32"), (40, 50))
    assert quantize(x, "auto", max_abs_err=0).dtype == "uint2"


@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (3, 0, 2)])
def test_empty_and_scalar(shape):
    q = quantize(np.full(shape, 3.5, "float32"), "auto", max_abs_err=1e-6)
    assert (q.dtype, q.shape) == ("uint2", shape)
    assert np.array_equal(q.dequantize(), np.full(shape, 3.5, "float32"))


def test_the_same_bits_on_every_backend(backend):
    for how in ({"max_abs_err": 0.05}, {"max_rel_err": 1e-4, "granularity": PerChannel(0)}):
        expected = quantize(KELVIN, "auto", **how)
        assert_same_bits(quantize(backend.asarray(KELVIN), "auto", **how), expected)
        assert_same_bits(quantize(KELVIN, "auto", backend=backend.name, **how), expected)


def test_other_layouts_are_measured_in_place():
    x = KELVIN.astype(">f4").transpose(2, 0, 1)[::-2]
    x.flags.writeable = False
    q = quantize(x, "auto", max_abs_err=0.1, granularity=PerGroup(7, 0), scale_dtype="float16")
    assert max(errors(x, q)) <= Fraction(0.1)


def test_what_is_not_finite_has_no_bound():
    x = KELVIN.copy()
    x[0, 0, :3] = np.nan, np.inf, -np.inf
    with pytest.raises(ValueError, match="3 non-finite values"):
        quantize(x, "auto", max_abs_err=0.1)
    q = quantize(x, "auto", max_abs_err=0.1, nonfinite="ignore")
    assert max(errors(x, q)) <= Fraction(0.1)


def test_the_choice_is_logged(caplog):
    with caplog.at_level(logging.INFO, "aqt_lite"):
        q = quantize(KELVIN, "auto", max_abs_err=0.1)
    assert caplog.messages == [f"max_abs_err=0.1: uint8 keeps it, in {q.nbytes} bytes"]


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"max_abs_err": "0.1"}, TypeError, "max_abs_err is a str: give a number"),
        ({"max_abs_err": True}, TypeError, "max_abs_err is a bool"),
        ({"max_rel_err": -1.0}, ValueError, "max_rel_err=-1.0: a bound is finite and not negative"),
        ({"max_abs_err": math.nan}, ValueError, "max_abs_err=nan"),
        ({"max_abs_err": 1, "max_rel_err": 1}, ValueError, "both given"),
        ({"keepbits": 7}, ValueError, "keepbits=7 is given with dtype='int8', .* it goes with dtype='bitround'"),
        ({"max_abs_err": 1, "scale": 1.0}, ValueError, "scale and max_abs_err are both given"),
        ({"max_abs_err": 1, "zero_point": 1}, ValueError, "zero_point and max_abs_err"),
        ({"max_abs_err": 1, "offset": 1.0}, ValueError, "offset and max_abs_err"),
        ({"max_abs_err": 1, "dtype": "int9"}, ValueError, "dtype='int9' is not a quantized type"),
        ({"dtype": "auto"}, ValueError, "give max_abs_err or max_rel_err"),
        (
            {"max_abs_err": 1e-9},
            ValueError,
            "int8 cannot keep max_abs_err=1e-09: it keeps max_abs_err=0.0.*smaller blocks",
        ),
        (
            {"max_abs_err": 1e-9, "dtype": "auto"},
            ValueError,
            "none of uint2, .*uint16 can keep .*: uint16 keeps max_abs_err=0.0002",
        ),
        ({"max_rel_err": 1e-9, "dtype": "nf4"}, ValueError, "nf4 cannot keep .*: it keeps max_rel_err="),
    ],
)
def test_what_is_refused(how, error, message):
    with pytest.raises(error, match=message):
        quantize(KELVIN, **how)


def test_types_that_cannot_serve_are_passed_by():
    large = np.linspace(0, 2e5, 64, dtype="float32")  # in few steps, scales overflow float16
    q = quantize(large, "auto", max_abs_err=600.0, scale_dtype="float16")
    assert q.dtype == "uint6"
    assert max(errors(large, q)) <= 600
    x = np.linspace(0, 2, 64, dtype="float32")
    q = quantize(x, "auto", max_rel_err=0.1, scheme="affine")  # which floats do not have
    assert q.zero_point is not None
    assert max(errors(x, q, relative=True)) <= Fraction(0.1)
    with pytest.raises(ValueError, match=r"none of uint2, .*, uint16 can keep max_rel_err=1e-09"):
        quantize(x, "auto", max_rel_err=1e-9, scheme="affine")
    with pytest.raises(ValueError, match=r"dtype='auto': none of uint2, .* can be had as asked; of int16: dialect="):
        quantize(x, "auto", max_abs_err=1.0, dialect=Dialect("nf4 alone", symmetric=("nf4",), affine=()))
    with pytest.raises(ValueError, match=r"^scale_dtype='float16' cannot hold 1 of the scales"):
        quantize(x * np.float32(1e30), "auto", max_abs_err=1.0, scale_dtype="float16")


@pytest.mark.parametrize(
    ("dialect", "dtype", "becomes"),
    [("torch", "int8", "int8"), ("torch", "uint8", "uint8"), ("onnx", "auto", "uint8"), ("qwix", "auto", "int6")],
)
def test_dialects_without_offsets(dialect, dtype, becomes):
    x = np.linspace(4, 6, 64, dtype="float32")
    q = quantize(x, dtype, max_abs_err=0.1, dialect=dialect)
    assert q.dtype == becomes
    assert q.offset is None
    assert max(errors(x, q)) <= Fraction(0.1)
    with pytest.raises(ValueError, match="no offsets: leave offset out"):
        quantize(x, dtype, max_abs_err=0.1, dialect=dialect, offset="data")
    with pytest.raises(ValueError, match="dialect='torch' has no symmetric nf4"):
        quantize(x, "nf4", max_abs_err=0.1, dialect="torch")


def test_missing_values_of_unsigned_types():
    """Whose lowest code is theirs, and cannot be an offset's."""
    q = quantize(KELVIN, "uint8", max_abs_err=1.0, mask=KELVIN > 300)
    assert q.dtype == "uint8_nan"
    values = np.asarray(q.dequantize())
    assert np.array_equal(np.isnan(values), KELVIN > 300)
    assert np.nanmax(np.abs(values - KELVIN)) <= 1.0


def test_zero_that_cannot_stay_zero():
    x = np.asarray([-1.0, 0.0, 5.0, 3.0], "float32")
    with pytest.raises(ValueError, match=r"int2 cannot keep .*: it keeps no bound at all, since 0 does not stay 0"):
        quantize(x, "int2", max_rel_err=1e-3, offset="data")


@needs("jax")
def test_under_a_compiler_there_are_no_values():
    with pytest.raises(TypeError, match=r"max_abs_err=0\.1 is checked on values.*outside the compiled function"):
        jax.jit(lambda x: quantize(x, "uint8", max_abs_err=0.1).dequantize())(jnp.asarray(KELVIN))


@needs("torch")
def test_nor_where_torch_has_none():
    with pytest.raises(TypeError, match="outside the compiled function"):
        quantize(torch.empty(3, device="meta"), "auto", max_abs_err=0.1)


def test_models_by_rules():
    tree = {"sst": KELVIN, "rain": np.abs(KELVIN - 290)}
    whole = {"granularity": PerTensor()}
    rules = [
        ("sst", {"dtype": "uint8", "max_abs_err": 0.1, **whole}),
        ("rain", {"max_abs_err": 0.1, "mask": KELVIN > 300, **whole}),
    ]
    assert "uint8" in str(plan_tree(tree, rules))
    quantized = quantize_tree(tree, rules)
    assert (quantized["sst"].dtype, quantized["rain"].dtype) == ("uint8", "int8_nan")
    assert max(errors(KELVIN, quantized["sst"])) <= Fraction(0.1)
    with pytest.raises(ValueError, match="sst: dtype='auto' depends on values, at which no plan looks"):
        plan_tree(tree, [("sst", {"dtype": "auto", "max_abs_err": 0.1, **whole}), ("*", None)])
    with pytest.raises(ValueError, match=r"sst: int4 cannot keep max_abs_err=0\.1"):
        quantize_tree(tree, [("sst", {"dtype": "int4", "max_abs_err": 0.1, **whole}), ("*", None)])


# ---- clipping


def test_clipping_is_reported_where_a_scale_is_given(backend):
    x = backend.asarray(KELVIN)
    count = int((KELVIN > 283).sum())
    first = tuple(int(i) for i in np.argwhere(KELVIN > 283)[0])
    with pytest.warns(
        ClippingWarning, match=rf"x has {count} values of 6000 .* int8 .*first at index \({first[0]}, .*"
    ) as w:
        q = quantize(x, scale=2.0, offset=28.0)
    assert len(w) == 1
    assert w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(quantize(x, scale=2.0, offset=28.0, on_clip="saturate"), q)
        quantize(x, scale=2.0, offset=52.0)  # reaches 306
    with pytest.raises(ValueError, match="beyond the numbers"):
        quantize(x, scale=2.0, offset=28.0, on_clip="raise")
    with pytest.warns(ClippingWarning, match="3 values of 3"):
        quantize(backend.asarray(np.asarray([7.0, -9.0, 6.6], "float32")), "float4_e2m1fn", scale=0.5, on_clip="warn")
    with pytest.raises(ValueError, match="on_clip='ignore' is not known"):
        quantize(x, on_clip="ignore")


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int3", "int8_nan", "float8_e4m3fn", "float6_e3m2fn", "nf4", "mxfp4"]
)
def test_a_scale_of_the_array_itself_clips_nothing(backend, dtype):
    """Though the largest number may come out a little beyond the end, as products round."""
    x = np.random.default_rng(4).standard_normal((40, 70)).astype("float32")
    how = {"granularity": PerChannel(0)}
    if FORMATS.get(dtype) is not None and FORMATS[dtype].element.middle:
        how["scheme"] = "affine"
    if dtype == "mxfp4":
        how["scale_mode"] = "ceil"  # whose scales cover every value
    for _ in range(3):
        scale, zero_point = choose_qparams(backend.asarray(x), dtype, **how)
        how.pop("scheme", None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            q = quantize(backend.asarray(x), dtype, scale=scale, zero_point=zero_point, **how)
        assert_same_bits(q.scale, scale)
        x = x * np.float32(1.37)
        how = {**how, "scheme": "affine"} if zero_point is not None else how


def test_nobody_is_warned_of_what_was_asked_for():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(np.asarray([np.inf, np.nan, 3.0], "float32"), scale=1.0, nonfinite="ignore")
        quantize(
            np.asarray([1.0, 1.9, 7.9], "float32"), "mxfp4", granularity=PerTensor()
        )  # which clips by its own rule
        quantize(da.from_array(KELVIN), scale=0.1)  # whose values nobody knows
        quantize(np.zeros((0, 3), "float32"), scale=1.0)
    with pytest.warns(ClippingWarning, match="x has 1 values of 3"):
        quantize(np.asarray([np.inf, 200.0, 3.0], "float32"), scale=1.0, nonfinite="ignore")


@needs("jax")
def test_a_compiler_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda x: quantize(x, scale=0.1).dequantize())(jnp.asarray(KELVIN))


@pytest.mark.parametrize("dtype", list(FORMATS))
def test_clipped_values_have_the_codes_of_the_ends(dtype):
    """So that arrays without one need no second look."""
    element = FORMATS[dtype].element
    for symmetric in (True, False):
        low, high = element.range_of(symmetric)
        levels = element.levels(get_backend("numpy"))
        codes = np.arange(element.codes[0], element.codes[1] + 1).astype(element.storage)
        numbers = np.asarray(element.decode(codes, get_backend("numpy"), "float64"), dtype="float64")
        ends = [float(numbers[codes == code][0]) for code in element.end_codes(symmetric)]
        assert ends == [low, high]
        assert low >= levels[0]


def test_a_large_array_is_looked_at_once():
    x = np.zeros((1000, 700), "float32")
    x[999, 699] = 400
    with pytest.warns(ClippingWarning, match=r"x has 1 values of 700000 .*\(999, 699\): 400\.0"):
        quantize(x, scale=2.0, granularity=PerChannel(0))


@pytest.mark.parametrize("dtype", ["uint4", "uint8", "uint8_nan", "uint16"])
def test_unsigned_types_with_missing_values_keep_bounds_by_a_zero_point(dtype):
    """Their code 0 is what is missing, which an offset cannot stand for."""
    x = KELVIN.copy()
    x[0, 1, 2:5] = np.nan
    least = kept_by(x, dtype, max_abs_err=0, missing="nan")
    q = quantize(x, dtype, max_abs_err=least, missing="nan")
    assert (q.offset is None, q.zero_point is None) == (True, False)
    assert max(errors(x, q)) == Fraction(least)
    assert np.array_equal(np.isnan(q.dequantize()), np.isnan(x))
    assert_same_bits(q, quantize(x, dtype, scheme="affine", missing="nan"))


@pytest.mark.parametrize(
    ("dtype", "how", "better"),
    [("uint8", {}, "int8_nan"), ("uint8", {"scheme": "affine"}, "int16_nan"), ("uint4", {}, "int8_nan")],
)
def test_what_a_zero_point_cannot_keep_is_refused_with_what_can(dtype, how, better):
    x = np.where(KELVIN > 304, np.float32(np.nan), KELVIN)
    with pytest.raises(ValueError, match=rf"{dtype}_nan cannot keep max_abs_err=0\.1: .*dtype='{better}' does"):
        quantize(x, dtype, max_abs_err=0.1, missing="nan", **how)
    assert max(errors(x, quantize(x, better, max_abs_err=0.1, missing="nan", **how))) <= Fraction(0.1)
