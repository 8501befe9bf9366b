"""Error numbers against plain NumPy."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from optional import needs

from aqt_lite import ErrorReport, PerBlock, PerChannel, PerGroup, PerTensor, QArray, error_report, quantize
from aqt_lite._registry import get_backend

X = (np.random.default_rng(0).standard_normal((6, 10)) * 5).astype("float32")


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(1), PerGroup(4), PerBlock((4, 3))], ids=str)
def test_numbers_are_those_of_plain_numpy(backend, granularity):
    q = quantize(backend.asarray(X), scheme="affine", granularity=granularity)
    report = error_report(backend.asarray(X), q, worst=1000)
    values = backend.to_numpy(q.dequantize()).astype("float64")
    error = X.astype("float64") - values
    assert report.mse == pytest.approx(np.mean(error**2), rel=1e-12)
    assert report.max_abs_error == np.abs(error).max()
    assert report.sqnr_db == pytest.approx(
        10 * math.log10(np.sum(X.astype("float64") ** 2) / np.sum(error**2)), rel=1e-12
    )
    assert (report.shape, report.dtype, report.granularity) == ((6, 10), "int8", granularity)
    assert (report.nbytes, report.source_nbytes, report.clipped) == (q.nbytes, X.nbytes, 0)

    scale = backend.to_numpy(q.scale)
    assert len(report.worst_blocks) == scale.size
    heights, widths = (-(-n // g) if b is None else b for n, g, b in zip(X.shape, scale.shape, q.block, strict=True))
    for block in report.worst_blocks:
        i, j = block.index
        rows, columns = slice(i * heights, (i + 1) * heights), slice(j * widths, (j + 1) * widths)
        assert block.mse == pytest.approx(np.mean(error[rows, columns] ** 2), rel=1e-12)
        assert block.max_abs_error == np.abs(error[rows, columns]).max()
        assert block.scale == scale[i, j]
    order = [block.mse for block in report.worst_blocks]
    assert order == sorted(order, reverse=True)
    assert len(error_report(X, q).worst_blocks) == min(3, scale.size)
    assert error_report(X, q, worst=0).worst_blocks == ()


def test_x_may_live_elsewhere(backend):
    q = quantize(X, granularity=PerGroup(4))
    expected = error_report(X, q)
    assert error_report(backend.asarray(X), q) == expected
    assert error_report(X, q.to_backend(backend.name)) == expected
    assert error_report(X.tolist(), q) == expected


def test_clipped_values_are_counted():
    report = error_report(X, quantize(X, scale=0.01))
    assert report.clipped == int((np.abs(X) > 1.285).sum())
    assert report.sqnr_db < 10


def test_no_error_and_no_signal():
    zeros = np.zeros((2, 3), "float32")
    perfect = error_report(zeros, quantize(zeros))
    assert (perfect.sqnr_db, perfect.mse, perfect.max_abs_error) == (math.inf, 0.0, 0.0)
    noise = QArray.from_codes(np.ones((2, 3), "int8"), np.ones((1, 1), "float32"))
    assert error_report(zeros, noise).sqnr_db == -math.inf


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), ()])
def test_empty_and_scalar(shape):
    x = np.ones(shape, "float32")
    report = error_report(x, quantize(x, granularity=PerGroup(3) if shape else PerTensor()))
    assert report.mse == report.clipped == 0
    assert str(report)


@pytest.mark.parametrize("dtype", ["float16", "float64", ml_dtypes.bfloat16])
def test_other_types(dtype):
    x = X.astype(dtype)
    report = error_report(x, quantize(x))
    assert report.source_nbytes == x.nbytes
    assert 30 < report.sqnr_db < 60
    assert report.clipped == 0


def test_huge_values_do_not_overflow():
    report = error_report([[3e38, -1e38]], quantize([[3e38, -1e38]]))
    assert math.isfinite(report.sqnr_db)
    assert math.isfinite(report.mse)


@pytest.mark.parametrize("power", [-560, 0, 500])
def test_float64_is_measured_at_every_magnitude(power):
    x = np.random.default_rng(1).standard_normal((4, 8))
    expected = error_report(x, quantize(x))
    scaled = np.ldexp(x, power)  # squares of 2^-560 are 0, those of 2^512 infinite
    report = error_report(scaled, quantize(scaled))
    assert report.max_abs_error == math.ldexp(expected.max_abs_error, power) > 0
    assert report.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-12)
    assert report.clipped == 0
    assert [block.index for block in report.worst_blocks] == [block.index for block in expected.worst_blocks]


def test_a_ratio_beyond_the_range_of_floats():
    coarse = QArray.from_codes(np.ones((1, 2), "int8"), np.full((1, 1), 1e100), float_dtype="float64")
    assert error_report(np.full((1, 2), 1e-150), coarse).sqnr_db == pytest.approx(-5000)
    x = np.asarray([1.0, 1e-170])
    assert error_report(x, quantize(x)).sqnr_db == pytest.approx(3400)
    huge = np.asarray([1.7e308, -1e300])
    assert math.isfinite(error_report(huge, quantize(huge)).sqnr_db)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_clipping_is_told_from_rounding_in_every_type(dtype):
    x = np.asarray([1000.0, -3.0, 990.0, 500.0]).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    q = quantize(x, scale=7.8)  # codes reach 990.6, and half a scale is 3.9
    assert error_report(x, q).clipped == 1
    for seed in range(5):
        x = (np.random.default_rng(seed).standard_normal((20, 30)) * 100).astype(x.dtype)
        for how in ({"dtype": "int8"}, {"dtype": "int16"}, {"dtype": "uint8", "scheme": "affine"}):
            assert error_report(x, quantize(x, **how)).clipped == 0


def test_infinities_are_clipped():
    x = np.asarray([1.0, np.inf, -2.0], "float32")
    assert error_report(x, quantize(x, nonfinite="ignore")).clipped == 1


def test_printing():
    x = np.asarray([[1.0, 2.0], [30.0, -4.0]], "float32")
    text = str(error_report(x, quantize(x, granularity=PerChannel(0)), worst=1))
    lines = dict(line.split("  ", 1) for line in text.splitlines())
    assert lines["array"].strip() == "(2, 2) as int8, PerChannel(axis=0)"
    assert lines["bytes"].strip() == "16 -> 12 (1.33x smaller)"
    assert lines["worst block 1"].strip().startswith("(1, 0): mse ")
    assert isinstance(error_report(x, quantize(x)), ErrorReport)


def test_what_does_not_fit():
    q = quantize(X)
    with pytest.raises(ValueError, match=r"x has shape \(10, 6\) but q \(6, 10\): give the array that was quantized"):
        error_report(X.T, q)
    with pytest.raises(TypeError, match="q is a ndarray, not a QArray"):
        error_report(X, X)
    with pytest.raises(TypeError, match="x is a QArray already"):
        error_report(q, q)
    with pytest.raises(TypeError, match="x is a NoneType"):
        error_report(None, q)


@needs("torch")
def test_what_has_no_values_is_refused():
    meta = get_backend("torch").xp.ones((6, 10), device="meta")
    with pytest.raises(TypeError, match="error_report needs values"):
        error_report(meta, quantize(X))
