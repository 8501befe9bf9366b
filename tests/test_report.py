"""Error numbers against plain NumPy."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from optional import needs

import aqt_lite.report
from aqt_lite import ErrorReport, PerBlock, PerChannel, PerGroup, PerTensor, QArray, error_report, quantize
from aqt_lite._parts import boxes
from aqt_lite._registry import get_backend
from aqt_lite.report import representable_range

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
    report = error_report(X, quantize(X, scale=0.01, on_clip="saturate"))
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
    q = quantize(x, scale=7.8, on_clip="saturate")  # codes reach 990.6, and half a scale is 3.9
    assert error_report(x, q).clipped == 1
    for seed in range(5):
        x = (np.random.default_rng(seed).standard_normal((20, 30)) * 100).astype(x.dtype)
        for how in ({"dtype": "int8"}, {"dtype": "int16"}, {"dtype": "uint8", "scheme": "affine"}):
            assert error_report(x, quantize(x, **how)).clipped == 0


def test_infinities_are_clipped():
    x = np.asarray([1.0, np.inf, -2.0], "float32")
    assert error_report(x, quantize(x, nonfinite="ignore")).clipped == 1


# ---- part by part

SHAPES_AND_GRANULARITIES = [
    ((), PerTensor()),
    ((37,), PerTensor()),
    ((37,), PerGroup(5)),
    ((37,), PerGroup(1)),
    ((37,), PerGroup(30)),  # a group larger than a part
    ((1, 50), PerTensor()),
    ((1, 50), PerGroup(8)),
    ((50, 1), PerChannel(0)),
    ((13, 17), PerChannel(0)),
    ((13, 17), PerChannel(1)),
    ((13, 17), PerGroup(4)),
    ((13, 17), PerGroup(4, 0)),
    ((13, 17), PerBlock((5, -1))),
    ((13, 17), PerBlock((6, 7))),
    ((3, 8, 11), PerBlock((2, 4, 3))),
    ((3, 8, 11), PerBlock((1, -1, 30))),
    ((3, 8, 11), PerChannel(1)),
]


def plain(x, q):
    """The numbers of a report from whole arrays, and the mean squared errors by block."""
    wide = x.astype("float64")
    finite = np.isfinite(wide)
    error = np.where(finite, np.where(finite, wide, 0.0) - np.asarray(q.dequantize()).astype("float64"), 0.0)
    grid = q.scale.shape
    sizes = [n if b is None else b for n, b in zip(x.shape, q._checked().block, strict=True)]
    blocks = {}
    for index in itertools.product(*map(range, grid)):
        at = tuple(slice(i * n, (i + 1) * n) for i, n in zip(index, sizes, strict=True))
        kept = error[at][finite[at]]
        blocks[index] = (np.mean(kept**2) if kept.size else 0.0, np.abs(kept).max(initial=0.0))
    signal, noise = np.sum(wide[finite] ** 2), np.sum(error**2)
    return np.mean(error[finite] ** 2), np.abs(error).max(), 10 * math.log10(signal / noise), blocks


@pytest.mark.exhaustive_unless(parts=[(10, 4), (1000, 3)])
@pytest.mark.parametrize("parts", [(1, 1), (10, 4), (24, 1000), (1000, 3)], ids=str)
@pytest.mark.exhaustive_where(order="F")
@pytest.mark.parametrize("order", ["C", "F", "reversed"])
@pytest.mark.parametrize(("shape", "granularity"), SHAPES_AND_GRANULARITIES, ids=str)
def test_parts_make_the_whole(monkeypatch, shape, granularity, order, parts):
    x = np.asarray(np.random.default_rng(2).standard_normal(shape) * 9 + 0.01, "float32")
    x = np.array(x, order="F") if order == "F" else x[..., ::-1] if order == "reversed" and shape else x
    q = quantize(x, scheme="affine", granularity=granularity)
    x[np.arange(x.size).reshape(shape) % 11 == 3] = np.nan
    monkeypatch.setattr(aqt_lite.report, "MOST_ELEMENTS", parts[0])
    monkeypatch.setattr(aqt_lite.report, "_MOST_BLOCKS", parts[1])
    mse, largest, sqnr, blocks = plain(x, q)
    for stored in (q, q.for_dense()) if len(shape) > 1 else (q,):
        report = error_report(x, stored, worst=1000)
        assert report.mse == pytest.approx(mse, rel=1e-12)
        assert report.max_abs_error == largest
        assert report.sqnr_db == pytest.approx(sqnr, rel=1e-12)
        assert (report.nonfinite, report.clipped) == (np.isnan(x).sum(), 0)
        assert {b.index: b.scale for b in report.worst_blocks} == dict(np.ndenumerate(q.scale))
        for block in report.worst_blocks:
            assert block.mse == pytest.approx(blocks[block.index][0], rel=1e-12)
            assert block.max_abs_error == blocks[block.index][1]
        keys = [(-block.mse, block.index) for block in report.worst_blocks]
        assert keys == sorted(keys)
        assert error_report(x, stored, worst=2).worst_blocks == report.worst_blocks[:2]


@pytest.mark.parametrize("most", [1, 7, 16, 1000])
@pytest.mark.parametrize("block", [None, (4, None), (1, 3), (5, 12), (20, 2)])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_boxes_cover_an_array_once_and_cut_few_blocks(most, block, order):
    shape = (13, 11)
    seen = np.zeros(shape, int)
    for box in boxes(shape, most, order, block):
        assert 1 <= math.prod(stop - start for start, stop in box) <= 2 * most
        seen[tuple(slice(start, stop) for start, stop in box)] += 1
        for (start, stop), size, length in zip(box, block or (None, None), shape, strict=True):
            size = length if size is None else size
            whole = start % size == 0 and (stop % size == 0 or stop == length)
            assert whole or start // size == (stop - 1) // size
    assert (seen == 1).all()


@pytest.mark.parametrize(("tiny", "first"), [(1e-170, True), (1e-170, False), (1e-3, True)])
def test_magnitudes_may_differ_between_parts(monkeypatch, tiny, first):
    monkeypatch.setattr(aqt_lite.report, "MOST_ELEMENTS", 8)
    x = np.random.default_rng(3).standard_normal((4, 8))
    x[:2] *= tiny if first else 1e170
    x[2:] *= 1e170 if first else tiny
    q = quantize(x, granularity=PerChannel(0))
    report = error_report(x, q, worst=4)
    half = x[2:] if first else x[:2]
    expected = error_report(half * 1e-170, quantize(half * 1e-170, granularity=PerChannel(0)))
    assert report.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-9)
    assert {block.index[0] for block in report.worst_blocks[:2]} == ({2, 3} if first else {0, 1})
    whole = error_report(x, quantize(x), worst=1).worst_blocks[0]  # one block over parts of every magnitude
    assert whole.max_abs_error > 1e165


@pytest.mark.exhaustive_unless(granularity=[PerGroup(16)])  # of 32 MB each
@pytest.mark.parametrize(
    ("shape", "granularity"),
    [
        ((1 << 12, 1 << 13), PerChannel(0)),
        ((1 << 12, 1 << 13), PerChannel(1)),
        ((1 << 12, 1 << 13), PerGroup(16)),
        ((1, 1 << 25), PerTensor()),
        ((1 << 25,), PerGroup(1 << 24)),
        ((1 << 23, 4), PerChannel(0)),
    ],
    ids=str,
)
def test_memory_does_not_grow_with_the_array(shape, granularity):
    x = np.resize(np.random.default_rng(4).standard_normal(99991).astype("float32"), shape)
    q = quantize(x, granularity=granularity)
    assert peak(x, q) < 64e6 < x.nbytes / 2


@pytest.mark.exhaustive_where(order="F")
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_memory_map_is_not_held_whole(tmp_path, order):
    shape = (1 << 12, 1 << 13)
    x = np.memmap(tmp_path / "x", np.float32, "w+", shape=shape, order=order)
    x[:] = np.resize(np.random.default_rng(4).standard_normal(99991).astype("float32"), shape)
    x.flush()
    x = np.memmap(tmp_path / "x", np.float32, "r", shape=shape, order=order)
    q = quantize(np.asarray(x), granularity=PerChannel(0))
    assert peak(x, q) < 32e6
    assert error_report(x, q).sqnr_db == pytest.approx(error_report(np.array(x, order="C"), q).sqnr_db, rel=1e-12)


def peak(x, q):
    """Bytes that a report allocates."""
    tracemalloc.start()
    try:
        error_report(x, q)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- what x may be


def forms_of(x):
    yield "big-endian", x.astype(x.dtype.newbyteorder(">"))
    frozen = x.copy()
    frozen.flags.writeable = False
    yield "read-only", frozen
    yield "strided", np.repeat(x, 2, axis=1)[:, ::2]
    yield "reversed", np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1]
    yield "Fortran order", np.asfortranarray(x)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_layout_and_byte_order_make_no_difference(dtype):
    x = X.astype(dtype)
    q = quantize(x, granularity=PerGroup(4))
    expected = error_report(x, q)
    for form, other in forms_of(x):
        before = other.copy()
        report = error_report(other, q)
        assert report.mse == pytest.approx(expected.mse, rel=1e-13), form
        assert report.sqnr_db == pytest.approx(expected.sqnr_db, rel=1e-13), form
        assert (report.max_abs_error, report.clipped) == (expected.max_abs_error, 0), form
        assert report.source_nbytes == x.nbytes
        np.testing.assert_array_equal(other, before)


def test_the_same_value_everywhere():
    x = np.broadcast_to(np.float32(0.3), (6, 10))
    q = quantize(x.copy(), scale=0.2, on_clip="saturate")
    assert error_report(x, q).mse == error_report(x.copy(), q).mse > 0


def test_a_number():
    assert error_report(2.0, quantize(2.0)).max_abs_error < 1e-6
    assert error_report(np.float32(2.0), quantize(2.0, scale=1.0)).sqnr_db == math.inf


# ---- what is not finite


def test_what_is_not_finite_is_left_out_and_counted(backend):
    x = X.copy()
    q = quantize(x, granularity=PerChannel(0))
    x[2, 3], x[4, 1], x[5, :] = np.nan, -np.inf, np.nan
    report = error_report(backend.asarray(x), q, worst=6)
    mse, largest, sqnr, blocks = plain(x, q)
    assert (report.nonfinite, report.clipped) == (12, 1)
    assert report.mse == pytest.approx(mse, rel=1e-12)
    assert (report.max_abs_error, report.sqnr_db) == (largest, pytest.approx(sqnr, rel=1e-12))
    for block in report.worst_blocks:
        assert block.mse == pytest.approx(blocks[block.index][0], rel=1e-12)
    assert report.worst_blocks[-1].index == (5, 0)  # nothing of it is left
    assert "\nnon-finite values   12\n" in str(report)
    assert "non-finite" not in str(error_report(X, q))


def test_nothing_finite():
    report = error_report(np.full((2, 3), np.nan, "float32"), quantize(np.ones((2, 3), "float32")))
    assert (report.nonfinite, report.mse, report.max_abs_error, report.sqnr_db) == (6, 0.0, 0.0, math.inf)


@needs("jax")
def test_codes_that_stand_for_nan_are_an_error_that_shows():
    import jax

    x = X.copy()
    x[3, 3] = np.nan
    q = jax.jit(lambda x: quantize(x, granularity=PerChannel(0)))(x)  # the scale of row 3 is NaN
    report = error_report(x, q)
    assert math.isnan(report.mse)
    assert math.isnan(report.max_abs_error)
    assert math.isnan(report.sqnr_db)
    assert report.worst_blocks[0].index == (3, 0)
    assert math.isnan(report.worst_blocks[0].mse)
    assert (report.nonfinite, report.clipped) == (1, 0)


# ---- what is clipped


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_the_range_is_that_of_the_outermost_codes(backend, dtype, scheme):
    q = quantize(backend.asarray(X), dtype, scheme=scheme, granularity=PerGroup(4))
    limits = np.iinfo(dtype)
    for end, values in zip((limits.min, limits.max), representable_range(q), strict=True):
        outermost = QArray.from_codes(
            np.full(X.shape, end, dtype),
            backend.to_numpy(q.scale),
            np.zeros(q.scale.shape, "int32") if q.zero_point is None else backend.to_numpy(q.zero_point),
            granularity=PerGroup(4),
        )
        assert values.shape == tuple(q.scale.shape)
        np.testing.assert_allclose(values, outermost.dequantize()[:, ::4], rtol=1e-6)
    scale = backend.to_numpy(q.scale).astype("float64")
    for exact, wide, sign in zip(representable_range(q), representable_range(q, slack=True), (-1, 1), strict=True):
        np.testing.assert_allclose(wide - exact, sign * scale / 2, rtol=1e-6)


def test_values_that_round_to_the_outermost_code_are_not_clipped():
    scale = np.float32(0.5)
    x = np.asarray([-64.26, -64.25, -64.0, -63.5, 63.5, 63.75, 63.76], "float32")
    assert error_report(x, quantize(x, scale=scale, zero_point=0, on_clip="saturate")).clipped == 2
    affine = quantize(x + 10, scale=scale, zero_point=-20, on_clip="saturate")
    assert error_report(x + 10, affine).clipped == 2


def test_coarse_numbers_are_not_clipping(monkeypatch):
    levels = np.asarray([0, 1, 2, 3, 4, 6, 8, 12], "int8")  # twice those of a float of 4 bits
    levels = np.unique(np.concatenate([-levels, levels]))
    x = np.random.default_rng(5).uniform(-1, 1, (70, 3000)).astype("float32")
    x[0, :5] = [1.1, 1.2, -1.2, -1.1, 5.0]
    codes = levels[np.abs(x[..., None] * 12 - levels).argmin(-1)]
    q = QArray.from_codes(codes, np.full((70, 1), 1 / 12, "float32"), granularity=PerChannel(0))
    assert error_report(x, q).clipped == 0

    def of_levels(q, *, slack=False):
        top = (12 + 2 * slack) * q.scale.astype("float64")
        return -top, top

    monkeypatch.setattr(aqt_lite.report, "representable_range", of_levels)
    assert error_report(x, q).clipped == 3  # beyond 14 / 12


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
