"""``out=``: codes and values written into memory that exists have the bits of those that are returned."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from optional import jnp, torch

import aqt_lite
from aqt_lite import ClippingWarning, PerBlock, PerChannel, PerGroup, PerTensor, bounds, dequantize, qarray, quantize
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import quantize as forms
from aqt_lite.testing import assert_same_bits

RNG = np.random.default_rng(0)
X = RNG.standard_normal((37, 203)).astype("float32")


@pytest.fixture(params=["few tiles", "many tiles"])
def _tiles(request, monkeypatch):
    if request.param == "many tiles":
        monkeypatch.setattr(forms, "TILE", 48)
        monkeypatch.setattr(forms, "LARGE", 2)


CALLS = [
    ("int8", {}),
    ("int8", {"granularity": PerGroup(32), "scheme": "affine"}),
    ("uint8", {"scheme": "affine", "granularity": PerBlock((5, 7))}),
    ("int16", {"granularity": PerChannel(1)}),
    ("int4", {"granularity": PerGroup(32)}),
    ("int3", {"granularity": PerGroup(5)}),
    ("int5", {}),
    ("int8", {"scheme": "affine", "offset": "data"}),
    ("nf4", {"granularity": PerGroup(64), "scale_dtype": "int8"}),
    ("float8_e4m3fn", {"scale_dtype": "bfloat16"}),
    ("mxfp4", {}),
    ("nvfp4", {}),
    ("int8", {"rounding": "stochastic", "key": 3}),
    ("int8", {"scale": 0.02, "on_clip": "saturate"}),
    ("int4", {"scale": np.full((37, 1), 0.5), "granularity": PerChannel(0), "on_clip": "saturate"}),
    ("int8", {"mask": X[0] > 1}),
    ("int4", {"missing": "nan", "granularity": PerGroup(8)}),
    ("int8", {"dialect": "torchao"}),
]


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("dtype", "how"), CALLS, ids=str)
def test_the_bits_of_what_is_returned(dtype, how):
    for x in (X, X.T.copy().T, X[:, ::2], X.astype(">f4")[:3], X[:0]):
        if x.shape != X.shape and ("mask" in how or "scale" in how):
            continue
        wanted = quantize(x, dtype, **how)
        out = np.full(wanted.storage.shape, 77, wanted.storage.dtype)
        q = quantize(x, dtype, out=out, **how)
        assert q.storage is out
        assert_same_bits(q, wanted)
        values = np.empty(x.shape, "float32")
        assert q.dequantize(out=values) is values
        assert_same_bits(values, wanted.dequantize())
        if wanted.mask is not None:
            assert_same_bits(dequantize(q, fill_value=-9.0, out=values), wanted.dequantize(fill_value=-9.0))


@pytest.mark.parametrize("ndim", [0, 1, 3])
def test_every_number_of_dimensions(ndim):
    x = X.ravel()[: 7**ndim].reshape((7,) * ndim)
    for dtype in ("int8", "int4"):
        wanted = quantize(x, dtype)
        out = np.empty_like(wanted.storage)
        assert_same_bits(quantize(x, dtype, out=out), wanted)
        assert_same_bits(wanted.dequantize("float64", out=np.empty(x.shape)), wanted.dequantize("float64"))


@pytest.mark.parametrize("dtype", ["int3", "int6", "uint6", "int7", "ternary", "nf4"])
def test_streams_with_as_many_bytes_as_codes(dtype, monkeypatch):
    """Rows of few codes fill their last bytes up; no shape tells them from codes that are not packed."""
    monkeypatch.setattr(bounds, "MOST_ELEMENTS", 16)  # as large arrays: looked at part by part
    monkeypatch.setattr(qarray, "_TOGETHER", 0)
    rng = np.random.default_rng(0)
    for length in range(1, 9):
        x = rng.standard_normal((40, length)).astype("float32")
        q = quantize(x, dtype)
        for each in (q, q.unpacked(), q.for_dense()):
            out = np.full(x.shape, 7, "float32")
            each.dequantize(out=out)
            assert_same_bits(out, q.unpacked().dequantize())
            assert_same_bits(each.dequantize(), out)
            assert bounds.largest_error(x, each, get_backend("numpy")) == np.abs(out.astype("float64") - x).max()


def test_memory_maps(tmp_path):
    out = np.lib.format.open_memmap(tmp_path / "codes.npy", "w+", "u1", (37, 102))
    q = quantize(X, "int4", out=out, granularity=PerChannel(0))
    out.flush()
    assert_same_bits(np.load(tmp_path / "codes.npy"), quantize(X, "int4", granularity=PerChannel(0)).storage)
    values = np.lib.format.open_memmap(tmp_path / "values.npy", "w+", "f4", X.shape)
    q.dequantize(out=values)
    assert_same_bits(np.load(tmp_path / "values.npy"), q.dequantize())


def test_what_cannot_be_written_into_is_refused():
    q = quantize(X)
    read_only = np.empty(X.shape, "i1")
    read_only.flags.writeable = False
    for out, words in [
        (np.empty((37, 202), "i1"), r"out is int8\(37, 202\): it must be int8\(37, 203\), which codes of int8 take"),
        (np.empty(X.shape, "u1"), "out is uint8"),
        (np.empty(X.shape, ">i2"), "out is >i2"),
        (read_only, "read-only"),
        (X.view("i1")[:, : X.shape[1]], "overlaps"),
    ]:
        with pytest.raises(ValueError, match=words):
            quantize(X, out=out)
    with pytest.raises(ValueError, match=r"it must be uint8\(37, 102\)"):
        quantize(X, "int4", out=np.empty(X.shape, "i1"))
    with pytest.raises(TypeError, match="out is a list"):
        quantize(X, out=[1])
    with pytest.raises(ValueError, match="out is given, but dialect='gguf'"):
        quantize(X[:32, :32], "q8_0", dialect="gguf", out=np.empty((32, 32), "i1"))
    with pytest.raises(ValueError, match="it must be float64"):
        q.dequantize("float64", out=np.empty(X.shape, "f4"))
    codes = np.zeros((4, 40), "i1")
    with pytest.raises(ValueError, match="overlaps"):
        aqt_lite.QArray.from_codes(codes[:, ::4], 1.0).dequantize(out=codes.view("f4"))


def test_other_libraries_are_refused():
    for x in (jnp.asarray(X), torch.from_numpy(X)):
        with pytest.raises(TypeError, match="out is given, but arrays of"):
            quantize(x, out=np.empty(X.shape, "i1"))
        with pytest.raises(TypeError, match="out is given, but arrays of"):
            quantize(x).dequantize(out=np.empty(X.shape, "f4"))


def test_nothing_is_written_where_a_call_is_refused():
    out = np.full(X.shape, 5, "i1")
    bad = X.copy()
    bad[3, 4] = np.nan
    with pytest.raises(ValueError, match=r"non-finite values of 7511, the first at index \(3, 4\)"):
        quantize(bad, out=out)
    with pytest.raises(ValueError, match="beyond the numbers that int8 has"):
        quantize(X, scale=0.001, on_clip="raise", out=out)
    assert (out == 5).all()
    with pytest.warns(ClippingWarning, match="beyond the numbers") as found:
        quantize(X, scale=0.001, out=out)
    assert found[0].filename == __file__
    with pytest.warns(ClippingWarning) as plain:
        quantize(X, scale=0.001)
    assert str(found[0].message) == str(plain[0].message)
    assert plain[0].filename == __file__


@pytest.mark.usefixtures("_tiles")
def test_clipped_values_are_counted_part_by_part():
    x = X.copy()
    x[20, 150] = 100
    x[30, 1] = -100
    for granularity in (PerTensor(), PerChannel(0), PerBlock((5, 20))):
        grid = quantize(x, granularity=granularity).scale.shape
        with pytest.warns(ClippingWarning, match=r"2 values of 7511 .* first at index \(20, 150\): 100.0"):
            quantize(x, scale=np.full(grid, 0.1), granularity=granularity)
        with pytest.raises(ValueError, match=r"2 values of 7511 .* first at index \(20, 150\): 100.0"):
            quantize(x, scale=np.full(grid, 0.1), granularity=granularity, on_clip="raise")


def test_large_masked_arrays_are_marked_part_by_part(monkeypatch):
    from aqt_lite import _missing

    x = np.tile(X, (8, 3))
    x[5, 7], x[0, 7], x[0, 9] = 1e20, 2, 0
    calls = [
        {"mask": x[0] > 1},
        {"mask": x > 1, "granularity": PerGroup(32)},
        {"fill_value": [1e20, float(x[0, 0])]},
        {"fill_value": 1e20, "scale": 0.03, "on_clip": "saturate"},
        {"mask": x > 1, "max_abs_err": 0.1, "dtype": "auto"},
        {"mask": x > 1, "dtype": "float8_e4m3fn"},
        {"mask": x > 1, "dtype": "int8", "scale_dtype": "int8", "granularity": PerGroup(32)},
    ]
    wanted = [quantize(x, **how) for how in calls]
    monkeypatch.setattr(_missing, "_TOGETHER", 1000)
    for how, q in zip(calls, wanted, strict=True):
        assert_same_bits(quantize(x, **how), q)
        assert_same_bits(quantize(x.astype(">f4"), **how), q)
        assert_same_bits(quantize(x, backend="torch", **how), q)
    x[9, 9] = np.inf
    with pytest.raises(ValueError, match=r"infinite, or NaN .* first at index \(9, 9\)"):
        quantize(x, mask=x[0] > 1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        x[9, 9] = 1e20
        quantize(x, mask=x[0] > 1)
    assert [w.category.__name__ for w in found] == ["SuspectValueWarning"]
    assert found[0].filename == __file__


BOUNDS = [
    ("int8", {"max_abs_err": 0.1}),
    ("int8", {"max_abs_err": 0.1, "scheme": "affine", "granularity": PerBlock((5, 7))}),
    ("auto", {"max_abs_err": 0.1, "granularity": PerGroup(32)}),
    ("auto", {"max_abs_err": 2e-4}),
    ("int4", {"max_abs_err": 0.4, "missing": "nan"}),
    ("auto", {"max_rel_err": 0.07}),
    ("mxfp8_e4m3", {"max_abs_err": 0.3}),
    ("auto", {"max_abs_err": 0.1, "mask": X > 1, "granularity": PerChannel(0)}),
    ("int8", {"max_abs_err": 0.1, "rounding": "stochastic", "key": 3}),
    ("auto", {"max_abs_err": 0.1, "dialect": "keras"}),
    ("nf4", {"max_abs_err": 1.0, "granularity": PerGroup(64), "scale_dtype": "int8"}),
]


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("dtype", "how"), BOUNDS, ids=str)
def test_bounds_have_the_bits_of_what_is_returned(dtype, how, monkeypatch):
    from aqt_lite import _missing

    wanted = quantize(X, dtype, **how)
    monkeypatch.setattr(_missing, "_TOGETHER", 1000)  # masks are marked part by part
    out = np.full(wanted.storage.shape, 77, wanted.storage.dtype)
    q = quantize(X, wanted.dtype, out=out, **how)
    assert q.storage is out
    assert_same_bits(q, wanted)
    monkeypatch.setattr(aqt_lite.api, "_LOOKED_AT", 100)  # types that do not keep it leave no codes
    assert_same_bits(quantize(X, dtype, **how), wanted)
    if dtype == "auto" and how.get("max_abs_err"):
        again = quantize(X, "auto", out=np.empty_like(out), **how)
        assert (again.bits, again.storage.dtype) == (q.bits, out.dtype)


def test_nothing_is_written_where_a_bound_is_not_kept():
    out = np.full(X.shape, 5, "i1")
    for how, words in [
        ({"max_abs_err": 1e-3}, "int8 cannot keep max_abs_err=0.001: it keeps max_abs_err=0.01.* smaller blocks"),
        ({"max_rel_err": 1e-3, "dtype": "auto"}, "none of .*int8 can keep max_rel_err=0.001"),
        ({"max_abs_err": 0.1, "dtype": "uint8"}, r"out is int8\(37, 203\): it must be uint8"),
        ({"max_abs_err": 0.1, "dtype": "auto", "x": X[:3]}, "out is int8"),
    ]:
        with pytest.raises(ValueError, match=words):
            quantize(how.pop("x", X), out=out, **how)
        assert (out == 5).all()
    with pytest.raises(ValueError, match=r"out is an array for codes of none of int2_nan, .* which dtype='auto' tries"):
        quantize(X, "auto", max_abs_err=0.1, mask=X > 1, out=out.view("u1"))
    assert quantize(X, "auto", max_abs_err=0.1, out=np.empty(X.shape, "i2")).dtype == "int16"  # as out is


def test_what_changes_while_it_is_written_is_noticed(monkeypatch):
    from aqt_lite import bounds

    x = X.copy()

    def encoded(out, x, *rest):
        x[3, 4] += 1000
        return encode(out, x, *rest)

    encode = aqt_lite.api._quantized_into
    monkeypatch.setattr(aqt_lite.api, "_quantized_into", encoded)
    with pytest.raises(RuntimeError, match=r"out has codes that do not keep max_abs_err=0\.1: an error is .* change"):
        quantize(x, max_abs_err=0.1, out=np.empty(X.shape, "i1"))
    assert bounds.Largest(relative=False)(X, X)


@pytest.mark.parametrize(("bound", "ways"), [({"max_abs_err": 0.01}, 1), ({"max_rel_err": 0.004}, 3)], ids=str)
def test_the_narrowest_type_is_found_in_few_passes(bound, ways, monkeypatch):
    """Ends of blocks once for each way of choosing scales; values twice, and a part for each type that will not do."""
    x = np.zeros((64, 203), "f4")
    x[40:] = 1 + np.abs(X[:24])  # too narrow types are only found out here
    wanted = quantize(x, "auto", **bound)
    monkeypatch.setattr(forms, "TILE", 203)
    monkeypatch.setattr(forms, "LARGE", 2)
    monkeypatch.setattr(aqt_lite.api, "_LOOKED_AT", 100)
    found, looked = [], []
    ends, look = forms._extrema_of, aqt_lite.bounds.Largest.__call__
    monkeypatch.setattr(forms, "_extrema_of", lambda *of: found.append(1) or ends(*of))
    monkeypatch.setattr(aqt_lite.bounds.Largest, "__call__", lambda *of: looked.append(of[1].size) or look(*of))
    assert_same_bits(quantize(x, "auto", **bound), wanted)
    assert len(found) <= ways
    assert wanted.bits >= 8
    assert sum(looked) < 3.5 * x.size


def test_bad_values_of_large_arrays_are_found_part_by_part(monkeypatch):
    from aqt_lite import _missing

    monkeypatch.setattr(aqt_lite.api, "_LOOKED_AT", 50)
    monkeypatch.setattr(_missing, "_TOGETHER", 50)
    x = X.copy()
    x[30, 1] = x[20, 150] = x[20, 151] = np.nan
    with pytest.raises(
        ValueError, match=r"3 non-finite values of 7511, the first at index \(20, 150\): .*missing='nan'"
    ):
        quantize(x)
    x[3, 3] = np.inf
    with pytest.raises(ValueError, match=r"1 values that are infinite, or NaN .* first at index \(3, 3\)"):
        quantize(x, missing="nan")
    x[3, 3] = x[30, 3] = 1e20
    with pytest.warns(aqt_lite.SuspectValueWarning, match=r"2 values of 1e\+20, 1e\+20 times the median"):
        quantize(x, missing="nan")
    x[30, 3] = -1e20
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(x, missing="nan")  # two kinds of them


def test_memory_that_is_read_or_shared():
    for n in (4, 1 << 21):  # marked in a copy, and part by part
        mask = np.zeros(n, bool)
        x = np.ones(n, "float32")
        with pytest.raises(ValueError, match="out overlaps in memory"):
            quantize(x, mask=mask, out=mask.view("int8"))
        masked = np.ma.MaskedArray(x, mask)
        with pytest.raises(ValueError, match="out overlaps in memory"):
            quantize(masked, out=np.ma.getmask(masked).view("int8"))
    shared = np.lib.stride_tricks.as_strided(np.zeros(10, "int8"), (6, 10), (0, 1))
    with pytest.raises(ValueError, match="out is broadcast"):
        quantize(X[:6, :10], out=shared)
