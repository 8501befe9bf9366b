"""Missing values: a code of their own, left out of statistics, and back as NaN on every backend."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import warnings

import dask.array as da
import ml_dtypes
import numpy as np
import pytest
from forms import COMPILED, CONSTANT, CONSTANT_QPARAMS, FORMS, Call, Problem, bits_of, compared, disagreements
from hard_inputs import every_pattern
from optional import jax, jnp, needs, torch
from oracles import files as oracle

import aqt_lite
from aqt_lite import (
    Codebook,
    Float,
    Format,
    Integer,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QArray,
    SuspectValueWarning,
    dense,
    error_report,
    linear,
    load,
    quantize,
    save,
)
from aqt_lite.elements import BitRound, FloatOrMissing, IntegerOrMissing
from aqt_lite.formats import BITROUND, FORMATS, SCALE_FORMATS, WITH_MISSING, described, rebuilt
from aqt_lite.testing import assert_same_bits

RNG = np.random.default_rng(0)
LAND = RNG.random((6, 40)) < 0.3
SEA = RNG.normal(285, 8, (6, 40)).astype("float32")
WITH_NAN = np.where(LAND, np.float32(np.nan), SEA)
GRANULARITIES = [PerTensor(), PerChannel(0), PerGroup(7), PerBlock((4, 16))]


def same(a, b):
    """Equal, NaN being equal to NaN."""
    return np.array_equal(np.asarray(a), np.asarray(b), equal_nan=True)


# ---- what missing values are, and are not


def test_formats_with_a_code_to_spare():
    assert {"int8_nan", "uint4_nan", "int16_nan", "float8_e4m3fn_nan", "mxfp8_e5m2_nan", "mxint8_nan"} <= set(
        WITH_MISSING
    )
    for name, form in WITH_MISSING.items():
        element, plain = form.element, {**FORMATS, **BITROUND}[name.removesuffix("_nan")].element
        assert form.name == name
        assert (element.bits, element.storage) == (plain.bits, plain.storage)
        assert element.missing == (plain.nan if isinstance(plain, Float | BitRound) else element.codes[0])
        assert name not in FORMATS
        assert name not in SCALE_FORMATS
        assert rebuilt(described(form)) == form


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("dtype", ["int8", "int3", "uint8", "uint5", "int16", "float8_e4m3fn", "float8_e5m2fnuz"])
def test_symmetric_codes_are_those_of_the_type_without(dtype, granularity):
    """As if each missing value were a zero, which changes no largest magnitude."""
    q = quantize(WITH_NAN, dtype, granularity=granularity, missing="nan")
    plain = quantize(np.where(LAND, np.float32(0), SEA), dtype, granularity=granularity)
    assert q.dtype == f"{dtype}_nan"
    assert_same_bits(q.scale, plain.scale)
    assert np.array_equal(q.qvalue[~LAND], plain.qvalue[~LAND])
    assert (q.qvalue[LAND] == WITH_MISSING[q.dtype].element.missing).all()
    assert same(q.dequantize(), np.where(LAND, np.nan, plain.dequantize()))
    assert np.array_equal(q.mask, LAND)
    assert plain.mask is None


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("how", [{"scheme": "affine"}, {"offset": "data"}], ids=str)
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int4", "uint6", "uint16", "float8_e4m3fn"])
def test_ranges_leave_missing_values_out(dtype, how, granularity):
    if (dtype.startswith("float") and "scheme" in how) or (dtype.startswith("uint") and "offset" in how):
        return
    x = np.where(LAND, np.float32(np.nan), SEA - np.float32(280))
    q = quantize(x, dtype, granularity=granularity, missing="nan", **how)
    element = WITH_MISSING[q.dtype].element
    assert np.array_equal(np.isnan(q.dequantize()), LAND)
    steps = 2**element.bits - 2
    if dtype != "float8_e4m3fn":
        part = q.scale * np.float32(0.501 if "offset" in how else 1.001)  # a zero point moves the range by half a step
        assert error_report(x, q, worst=99).max_abs_error <= part.max()
        assert q.qvalue[~LAND].min() > element.missing
        assert q.scale.max() <= 60 / steps
    whole = x[~LAND]
    if granularity == PerTensor():
        assert_same_bits(q.scale.reshape(-1), quantize(whole, q.dtype, **how).scale)


def test_zero_is_exact_beside_missing_values():
    rain = np.asarray([0.0, 0.3, np.nan, 12.5, 0.0, 80.0], "float32")
    q = quantize(rain, "uint8", scheme="affine", missing="nan")
    assert q.zero_point.item() == 1  # the lowest code that is a number
    assert q.qvalue.tolist()[:3] == [1, 2, 0]
    assert same(q.dequantize()[[0, 2, 4]], [0, np.nan, 0])


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (3, 5)])
def test_nothing_but_missing_values(shape):
    x = np.full(shape, np.nan, "float32")
    for how in ({}, {"scheme": "affine"}, {"offset": "data"}, {"dtype": "float8_e5m2"}, {"max_abs_err": 0.0}):
        q = quantize(x, missing="nan", **how)
        assert same(q.dequantize(), x)
        assert q.mask.shape == shape
        assert q.mask.all()
    assert error_report(x, q).missing == x.size


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_type_of_values(dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    x = WITH_NAN.astype(kind)
    q = quantize(x, "int16", missing="nan")
    assert q.dequantize().dtype == x.dtype
    assert np.array_equal(np.isnan(q.dequantize().astype("float32")), LAND)


# ---- ways to say what is missing


@pytest.mark.parametrize("fill", [1e20, -9999, 9.969209968386869e36, np.inf, -32768.0])
def test_fill_values_come_back_exactly(backend, fill):
    x = np.where(LAND, np.float32(fill), SEA)
    q = quantize(backend.asarray(x), fill_value=fill)
    assert_same_bits(q, quantize(WITH_NAN, missing="nan"))
    back = backend.to_numpy(q.dequantize(fill_value=fill))
    assert np.array_equal(back[LAND], x[LAND])
    assert back.dtype == x.dtype
    assert same(backend.to_numpy(aqt_lite.dequantize(q, fill_value=np.nan)), q.to_backend("numpy").dequantize())
    assert np.array_equal(quantize(SEA).dequantize(fill_value=fill), quantize(SEA).dequantize())  # nothing is missing


def test_several_fill_values():
    x = SEA.copy()
    x[0, 0], x[1, 1], x[2, 2] = 1e20, -999, np.nan
    assert np.argwhere(quantize(x, fill_value=[1e20, -999, np.nan]).mask).tolist() == [[0, 0], [1, 1], [2, 2]]
    assert np.argwhere(quantize(x, fill_value=(1e20, -999), missing="nan").mask).tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("under", [0.0, np.nan, 1e20, -np.inf])
def test_masks(backend, under):
    x = np.where(LAND, np.float32(under), SEA)
    expected = quantize(WITH_NAN, "uint4", granularity=PerGroup(7), missing="nan")
    how = {"dtype": "uint4", "granularity": PerGroup(7)}
    given = x.copy()
    assert_same_bits(quantize(backend.asarray(x), mask=backend.asarray(LAND), **how), expected)
    assert_same_bits(quantize(backend.asarray(x), mask=LAND, **how), expected)
    assert_same_bits(quantize(backend.asarray(x), mask=LAND.tolist(), **how), expected)
    assert_same_bits(quantize(np.ma.masked_array(x, LAND), backend=backend.name, **how), expected)
    assert same(x, given)


def test_a_mask_for_all_times():
    land = LAND[0]
    q = quantize(SEA, mask=land)
    assert np.array_equal(q.mask, np.broadcast_to(land, SEA.shape))
    assert np.array_equal(quantize(SEA, mask=LAND[:, :1]).mask, np.broadcast_to(LAND[:, :1], SEA.shape))


def test_a_masked_array_without_a_mask():
    q = quantize(np.ma.masked_array(SEA))
    assert q.dtype == "int8_nan"
    assert not q.mask.any()
    assert quantize(np.ma.masked_array([1.0, 2.0], mask=[False, True])).mask.tolist() == [False, True]


def test_values_that_nobody_calls_missing(backend):
    x = SEA.copy()
    x[3, 4], x[5, 6] = np.nan, np.inf
    for what in ({"mask": LAND & False}, {"fill_value": 7.0}):
        with pytest.raises(ValueError, match=r"x has 2 values .*of 240, the first at index \(3, 4\): .*missing='nan'"):
            quantize(backend.asarray(x), **what)
    with pytest.raises(ValueError, match=r"x has 1 values that are infinite.*first at index \(5, 6\)"):
        quantize(backend.asarray(x), missing="nan")
    with pytest.raises(ValueError, match="2 non-finite values"):
        quantize(backend.asarray(x))
    q = quantize(backend.asarray(x), fill_value=7.0, nonfinite="ignore").to_backend("numpy")
    assert np.argwhere(q.mask).tolist() == [[3, 4]]
    assert q.qvalue[5, 6] == 127
    with pytest.raises(ValueError, match="infinite"):
        quantize(backend.asarray(x), scale=3.0, missing="nan")
    x[5, 6] = 0
    assert_same_bits(quantize(backend.asarray(x), scale=3.0, missing="nan").mask, x != x)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"missing": "NaN"}, ValueError, r"missing='NaN' is not known \(did you mean 'nan'\?\): use 'nan'"),
        (
            {"mask": LAND[:3]},
            ValueError,
            r"mask has shape \(3, 40\): it must be, or broadcast to, that of x, \(6, 40\)",
        ),
        ({"mask": LAND[None]}, ValueError, "mask has shape"),
        ({"mask": LAND.astype("float32")}, TypeError, "mask has dtype float32: give bools"),
        ({"fill_value": "1e20"}, TypeError, "fill_value is a str: give a number"),
        ({"fill_value": 1e300}, ValueError, r"fill_value=1e\+300 is beyond float32"),
        ({"dtype": "nf4", "missing": "nan"}, ValueError, "nf4 has no code to spare"),
        ({"dtype": "float4_e2m1fn", "missing": "nan"}, ValueError, "no code to spare"),
        (
            {"dtype": "uint8", "missing": "nan", "offset": "data"},
            ValueError,
            "of uint8_nan that is what is missing: use int8",
        ),
        ({"dtype": "int8_nan", "scale": 1.0, "zero_point": -128}, ValueError, "zero_point=-128: must be a code"),
    ],
)
def test_what_is_refused(how, error, message):
    with pytest.raises(error, match=message):
        quantize(SEA, **how)


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="mask is given, but x is a masked array"):
        quantize(np.ma.masked_array(SEA, LAND), mask=LAND)
    for call in (aqt_lite.choose_qparams, aqt_lite.fake_quantize):
        with pytest.raises(TypeError, match="x is a masked array, which only quantize and error_report take"):
            call(np.ma.masked_array(SEA, LAND))
    with pytest.raises(ValueError, match="beyond float16"):
        quantize(WITH_NAN.astype("float16"), missing="nan").dequantize(fill_value=1e20)
    with pytest.raises(ValueError, match="narrow=True"):
        IntegerOrMissing("seven", 8, True, narrow=True)
    with pytest.raises(ValueError, match="give a code of NaN"):
        FloatOrMissing("five", 2, 2, bias=1, max=7.0)


@needs("jax", "torch")
def test_a_mask_of_another_library():
    with pytest.raises(TypeError, match="mask is a jax array but x is torch"):
        quantize(torch.asarray(SEA), mask=jnp.asarray(LAND))


# ---- the same bits everywhere

PROBLEMS = [
    Problem(WITH_NAN, Call("int8_nan")),
    Problem(WITH_NAN, Call("uint4_nan", "affine", PerGroup(7))),
    Problem(WITH_NAN, Call("int16_nan", offset="data", granularity=PerChannel(1))),
    Problem(WITH_NAN, Call("float8_e4m3fn_nan", granularity=PerBlock((4, 16)))),
    Problem(WITH_NAN, Call("int5_nan", granularity=PerGroup(9), scale_dtype="float16", rounding="stochastic", key=3)),
    Problem(WITH_NAN, Call("mxfp8_e4m3_nan", granularity=None)),
    Problem(WITH_NAN, Call("int3_nan", "affine"), np.float32(4.0), np.int32(-2)),
]


@pytest.mark.parametrize(
    ("problems", "forms"),
    [
        (PROBLEMS, [form for form in FORMS if form not in (COMPILED, CONSTANT, CONSTANT_QPARAMS)]),
        pytest.param(PROBLEMS, [CONSTANT, CONSTANT_QPARAMS], marks=pytest.mark.exhaustive),
        pytest.param(PROBLEMS[::3], [COMPILED], marks=pytest.mark.exhaustive),  # compiling takes a minute
    ],
    ids=["eager and jit", "constants", "torch.compile"],
)
def test_the_same_bits_in_every_form(problems, forms):
    expected = [bits_of(quantize(p.x, **_arguments(p))) for p in problems]
    assert sum(map(compared, expected)) > 500 * len(problems)
    assert disagreements(problems, expected, tuple(forms)) == {}


def _arguments(p):
    call = {
        name: getattr(p.call, name) for name in ("dtype", "scheme", "granularity", "scale_dtype", "rounding", "key")
    }
    if p.call.offset is not None:
        call["offset"] = p.call.offset
    return {**call, "scale": p.scale, "zero_point": p.zero_point, "on_clip": "saturate"}


@pytest.mark.parametrize(
    "how", [{"dtype": "int8"}, {"dtype": "uint4", "scheme": "affine"}, {"offset": "data"}], ids=str
)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerGroup(64)], ids=str)
def test_large_arrays(backend, how, granularity):
    """Of which the CPU library takes tiles, or columns, or rows."""
    x = RNG.standard_normal((300, 1024)).astype("float32")
    mask = x > 1
    small = [quantize(x[:2], mask=mask[:2], granularity=granularity, **how)] if granularity != PerTensor() else []
    q = quantize(backend.asarray(x), mask=mask, granularity=granularity, **how).to_backend("numpy")
    assert np.array_equal(q.mask, mask)
    assert np.array_equal(np.isnan(q.dequantize()), mask)
    assert_same_bits(
        q, quantize(x, mask=mask, granularity=granularity, backend="array_api_strict", **how).to_backend("numpy")
    )
    for part in small:
        assert_same_bits(q[:2], part)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_pattern_of_16_bits(backend, dtype):
    if backend.name == "array_api_strict":
        return  # which has neither type
    x = every_pattern(dtype)
    with np.errstate(invalid="ignore"):
        nan, infinite = np.isnan(x), np.isinf(x)
    x = x[~infinite]
    for form in ("int8", "float8_e5m2"):
        q = quantize(backend.asarray(x), form, missing="nan").to_backend("numpy")
        assert np.array_equal(q.mask, nan[~infinite])
        assert np.array_equal(np.isnan(q.dequantize().astype("float32")), nan[~infinite])


def test_dask_stays_lazy():
    x = da.from_array(np.where(LAND, np.float32(1e20), SEA), chunks=(3, 16))
    q = quantize(x, fill_value=1e20)
    assert_same_bits(q.to_backend("numpy"), quantize(WITH_NAN, missing="nan"))
    assert_same_bits(
        quantize(da.from_array(SEA, chunks=(3, 16)), mask=LAND).to_backend("numpy"), quantize(SEA, mask=LAND)
    )
    with pytest.raises(ValueError, match=r"NaN and not said to be missing.*in the chunk at"):
        quantize(da.from_array(WITH_NAN, chunks=(3, 16)), fill_value=1e20).dequantize().compute()


@needs("jax")
def test_a_compiler_marks_what_it_cannot_raise():
    @jax.jit
    def values(x, mask):
        return quantize(x, mask=mask, granularity=PerChannel(0)).dequantize()

    x = SEA.copy()
    x[2, 3] = np.nan
    mask = LAND & (np.arange(6) != 2)[:, None]
    found = np.asarray(values(jnp.asarray(x), jnp.asarray(mask)))
    assert np.isnan(found[2]).all()  # NaN that nobody called missing: the whole block
    expected = quantize(SEA, mask=mask, granularity=PerChannel(0)).dequantize()
    others = np.arange(6) != 2
    assert same(found[others], expected[others])


# ---- what keeps them


KEPT = [
    quantize(WITH_NAN, dtype, granularity=PerGroup(8), missing="nan") for dtype in ("int8", "int4", "float8_e4m3fn")
]


@pytest.mark.parametrize("q", KEPT, ids=lambda q: q.dtype)
def test_shapes_and_layouts_keep_them(q):
    values = q.dequantize()
    assert same(q[1:3, 8:24].dequantize(), values[1:3, 8:24])
    assert same(q[[4, 0]].mask, LAND[[4, 0]])
    assert same(q.T.dequantize(), values.T)
    assert same(q.for_dense().dequantize(), values)
    assert same(q.for_dense().mask, LAND)
    assert same(q.unpacked().packed().mask, LAND)
    assert same(q.copy().dequantize(), values)
    assert same(aqt_lite.concatenate([q, q[:2]]).mask, np.concatenate([LAND, LAND[:2]]))
    assert same(aqt_lite.stack([q, q]).mask, np.stack([LAND, LAND]))
    assert same(q.reshape(3, 2, 40).mask, LAND.reshape(3, 2, 40))
    assert same(pickle.loads(pickle.dumps(q)).dequantize(), values)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("q", KEPT, ids=lambda q: q.dtype)
def test_files_keep_them(q, suffix, tmp_path, backend):
    path = tmp_path / f"sea{suffix}"
    save(path, {"sea": q.to_backend(backend.name)})
    assert_same_bits(load(path)["sea"], q)
    if suffix == ".safetensors":
        assert_same_bits(oracle.read(path)["sea"], q.dequantize())
    assert_same_bits(load(path, like={"sea": q.to_backend(backend.name)})["sea"], q)


def test_files_and_pickles_tell_another_process(tmp_path):
    twelve = quantize(WITH_NAN, Integer("int12_of_sea", 12, True), missing="nan")
    assert twelve.dtype == "int12_of_sea_nan"
    tree = {"eight": KEPT[0], "twelve": twelve}
    save(tmp_path / "sea.safetensors", tree)
    (tmp_path / "sea.pickle").write_bytes(pickle.dumps(tree))
    np.save(tmp_path / "mask.npy", LAND)
    code = """
import pickle, aqt_lite, numpy as np
mask = np.load("mask.npy")
for tree in (pickle.load(open("sea.pickle", "rb")), aqt_lite.load("sea.safetensors")):
    for q in tree.values():
        assert np.array_equal(q.mask, mask) and np.array_equal(np.isnan(q.dequantize()), mask), q
print(aqt_lite.quantize([1.0, float("nan")], "int8_nan").mask)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[False  True]", done.stderr


def test_formats_of_ones_own():
    five = Float("float5_of_sea", 2, 2, bias=1, max=3.5, subnormal=True, nan=0x0F)
    blocks = Format("blocks_of_sea", five, scale=SCALE_FORMATS["bfloat16"], group=10)
    q = quantize(WITH_NAN, blocks, missing="nan")
    assert (q.dtype, q.scale.dtype, q.granularity) == ("blocks_of_sea_nan", "bfloat16", PerGroup(10))
    assert same(q.mask, LAND)
    with pytest.raises(ValueError, match="no code to spare"):
        quantize(WITH_NAN, Codebook("three_of_sea", (-1.0, 0.0, 1.0)), missing="nan")
    with pytest.raises(ValueError, match="a format named 'int8_nan' exists and is another one"):
        aqt_lite.register_format(Integer("int8_nan", 8, True))
    assert aqt_lite.register_format(WITH_MISSING["int8_nan"]) is WITH_MISSING["int8_nan"]
    assert "int8_nan" not in FORMATS


def test_codes_made_elsewhere():
    codes = np.asarray([-128, -127, 0, 127], "int8")
    q = QArray.from_codes(codes, 0.5, dtype="int8_nan")
    assert same(q.dequantize(), np.asarray([np.nan, -63.5, 0, 63.5], "float32"))
    eight = QArray.from_codes(np.asarray([0x7F, 0x38], "uint8"), 1.0, dtype="float8_e4m3fn_nan")
    assert same(eight.dequantize(), [np.nan, 1.0])
    with pytest.raises(ValueError, match="unusable codes"):
        QArray.from_codes(np.asarray([0xFF], "uint8"), 1.0, dtype="float8_e4m3fn_nan")
    with pytest.raises(ValueError, match="unusable codes"):
        QArray.from_codes(np.asarray([0x7F], "uint8"), 1.0, dtype="float8_e4m3fn")
    with pytest.raises(ValueError, match="zero_point=0: must be a code of uint8_nan, 1 to 255"):
        QArray.from_codes(codes.view("uint8"), 0.5, 0, dtype="uint8_nan")


@needs("jax")
def test_through_jit():
    q = KEPT[1].to_backend("jax")
    found, mask = jax.jit(lambda q: (q.dequantize(), q.mask))(q)
    assert same(found, KEPT[1].dequantize())
    assert same(mask, LAND)


@needs("torch")
def test_torch_reads_them_without_trusting_the_file():
    file = io.BytesIO()
    q = quantize(torch.asarray(WITH_NAN), Integer("int9_of_sea", 9, True), missing="nan")
    torch.save({"q": q}, file)
    file.seek(0)
    assert_same_bits(torch.load(file, weights_only=True)["q"], q)


# ---- products, reports, pictures

PRODUCTS = [
    {"dtype": "int8", "granularity": PerChannel(0)},
    {"dtype": "int4", "granularity": PerGroup(32)},
    {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(64)},
    {"dtype": "float8_e4m3fn", "granularity": PerChannel(0)},
]


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize("how", PRODUCTS, ids=str)
def test_a_sum_that_meets_a_missing_value_is_nan(backend, how, rows):
    w = RNG.standard_normal((48, 128)).astype("float32")
    mask = np.zeros(w.shape, bool)
    mask[5, 7] = mask[40] = True
    x = RNG.standard_normal((rows, 128)).astype("float32")
    x[0, 7] = 0  # which is no reason for 0 * NaN to be 0
    q = quantize(backend.asarray(w), mask=mask, **how)
    values = backend.to_numpy(q.dequantize())
    expected = x @ values.T
    bad = mask.any(axis=1)
    for y in (
        linear(backend.asarray(x), q),
        dense(backend.asarray(x), quantize(backend.asarray(w), mask=mask, **how).T.for_dense()),
    ):
        y = backend.to_numpy(y)
        assert np.isnan(y[:, bad]).all()
        np.testing.assert_allclose(y[:, ~bad], expected[:, ~bad], rtol=1e-3, atol=1e-3)


def test_products_of_integers_have_no_missing_values():
    w = quantize(WITH_NAN, granularity=PerChannel(0), missing="nan")
    with pytest.raises(ValueError, match=r"w has int8_nan codes, one of which is a missing value"):
        linear(np.ones((2, 40), "float32"), w, mode="reproducible")
    x = quantize(np.ones((2, 40), "float32"))
    with pytest.raises(ValueError, match="mode='integer' is not possible"):
        linear(x, w, mode="integer")
    assert np.isnan(linear(x, w)).all()


@pytest.mark.parametrize("under", [np.nan, 1e20, 0.0])
def test_reports_leave_them_out(under):
    x = np.where(LAND, np.float32(under), SEA)
    q = quantize(x, mask=LAND, granularity=PerGroup(7))
    report = error_report(x, q, worst=2)
    there = q.dequantize()[~LAND].astype("float64")
    error = SEA[~LAND].astype("float64") - there
    assert report.missing == LAND.sum()
    assert (report.nonfinite, report.clipped) == (0, 0)
    assert report.max_abs_error == np.abs(error).max()
    assert report.mse == pytest.approx(np.mean(error**2), rel=1e-12)
    expected = 10 * np.log10(np.sum(SEA[~LAND].astype("float64") ** 2) / np.sum(error**2))
    assert report.sqnr_db == pytest.approx(expected, rel=1e-12)
    assert "missing values" in str(report)
    assert report == error_report(np.ma.masked_array(x, LAND), q, worst=2)
    assert "missing" not in str(error_report(SEA, quantize(SEA)))


def test_a_report_tells_missing_values_from_others():
    x = WITH_NAN.copy()
    x[0, 0] = np.inf
    q = quantize(np.where(np.isinf(x), np.float32(300), x), missing="nan")
    report = error_report(x, q)
    assert (report.missing, report.nonfinite) == (np.isnan(x).sum(), 1)


@needs("matplotlib")
def test_pictures_leave_them_white():
    from aqt_lite import plots

    x = np.where(LAND, np.float32(1e20), SEA)[:, :9]
    q = quantize(x, fill_value=1e20)
    figure = plots.plot_quantization(x, q)
    for ax in [ax for ax in figure.axes if ax.get_title()]:
        drawn = np.ma.filled(ax.images[0].get_array().astype("float64"), np.nan)
        assert np.array_equal(np.isnan(drawn), LAND[:, :9]), ax.get_title()
    assert f"{LAND[:, :9].sum()} missing" in figure.get_suptitle()
    for form in ("int8", "float8_e4m3fn"):
        found = plots.plot_codes(quantize(x, form, fill_value=1e20))
        assert f"{LAND[:, :9].sum()} missing" in found.axes[0].get_title()
        shown = [int(text.get_text().split(":")[1].split()[0]) for text in found.axes[0].get_legend().get_texts()]
        assert shown[0] <= (~LAND[:, :9]).sum()
    assert plots.plot_codes(quantize(np.full((2, 2), np.nan, "float32"), missing="nan"))


# ---- fill values that nobody named


def test_a_bound_that_a_fill_value_makes_impossible_is_refused_with_a_word_of_it():
    x = np.random.default_rng(0).normal(285, 1, (40, 50)).astype("float32")
    x[:10] = 9.96921e36
    for how in ({"dtype": "auto"}, {"dtype": "auto", "fill_value": 9.969e36}, {"dtype": "int8"}):
        with (
            pytest.warns(SuspectValueWarning, match=r"x has 500 values of 9.96921e\+36.*pass fill_value="),
            pytest.raises(ValueError, match="max_abs_err"),
        ):
            quantize(x, max_abs_err=0.1, **how)


@pytest.mark.parametrize("fill", [1e20, -1e30, 9.969209968386869e36])
def test_a_fill_value_left_in_is_a_warning(backend, fill):
    x = np.where(LAND, np.float32(fill), SEA)
    with pytest.warns(SuspectValueWarning, match=r"x has \d+ values of .*fill_value=") as found:
        quantize(backend.asarray(x))
    assert len(found) == 1
    assert found[0].filename == __file__
    named = float(str(found[0].message).rpartition("=")[2])
    assert np.float32(named) == np.float32(fill)
    assert quantize(backend.asarray(x), fill_value=named).dequantize().shape == x.shape
    with pytest.warns(SuspectValueWarning):
        quantize(backend.asarray(x), "auto", max_abs_err=1e38)


def test_values_that_belong_to_the_data_are_none():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(SEA * np.float32(1e30))
        quantize(np.geomspace(1e-30, 1e30, 500).astype("float32"))
        quantize(np.asarray([1e30, -1e30, 1.0, 2.0, 3.0, 4.0], "float32"))
        quantize(np.asarray([0] * 200 + [1e30], "float32"))
        quantize(np.asarray([1.0, 2.0, 3.0, 1e30], "float32"))  # too few to tell
        quantize(np.asarray([1e30, -1e30] + [1.0] * 200, "float32"))
        quantize(np.where(LAND, np.float32(1e20), SEA), scale=1.0, on_clip="saturate")


@needs("jax")
def test_nothing_is_looked_at_while_tracing():
    x = jnp.asarray(np.where(LAND, np.float32(1e20), SEA))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda x: quantize(x).dequantize())(x)


@pytest.mark.parametrize("rows", [40, 4096])
def test_blocks_in_which_all_is_missing(backend, rows):
    x = np.random.default_rng(0).standard_normal((rows, 32)).astype("float32")
    x[::5] = np.nan
    for how in ({"offset": "data"}, {"scheme": "affine"}, {}):
        q = quantize(backend.asarray(x), "int4_nan", granularity=PerGroup(32), **how)
        assert (backend.to_numpy(q.scale)[::5] == 1).all()
        np.testing.assert_array_equal(np.isnan(backend.to_numpy(q.dequantize())), np.isnan(x))
