"""Products by NumPy alone with a weight as it is stored: values as dequantizing gives them, sums as exact as any."""

from __future__ import annotations

import numpy as np
import pytest
from test_decoding import KINDS, assert_exact_to_float32, name_of

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, QArray, dense, linear, quantize
from aqt_lite.backends.cpu import runtime, tiles
from aqt_lite.formats import FORMATS
from aqt_lite.ops.matmul import as_stored

OTHERS = [
    {"dtype": "float8_e4m3fn"},
    {"dtype": "int4", "scheme": "affine"},
    {"dtype": "int8", "scheme": "affine"},
    {"dtype": "uint8", "scheme": "affine", "scale_dtype": "bfloat16"},
    {"dtype": "mxint8"},
    {"dtype": "nvfp4"},
    {"dtype": "mxfp4"},
    {"dtype": "int3"},
    {"dtype": "int3", "scheme": "affine"},
    {"dtype": "uint5", "scheme": "affine"},
    {"dtype": "int2"},
    {"dtype": "float6_e2m3fn"},
    {"dtype": "mxfp6_e3m2"},
]
GRANULARITIES = [PerGroup(32), PerGroup(1), PerGroup(17), PerGroup(384), PerChannel(0), PerTensor(), PerBlock((3, 64)),
                 PerBlock((-1, 32)), PerGroup(5, 0)]  # fmt: skip


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """As where numba is not installed; tiles of few rows, so that small weights have several."""
    monkeypatch.setattr(runtime, "compiled_loops", lambda: None)
    monkeypatch.setattr(tiles, "TILE", 3000)
    monkeypatch.setattr(tiles, "BLOCK", 7000)


def of_tiles(x, q, bias=None, contract=1):
    """What the form itself answers."""
    w, spec = as_stored(q, packed=True)
    contract = 1 - contract if q.transposed else contract
    return tiles.matmul_of_tiles(x, w, bias, spec=spec, contract=contract, packed_length=q.packed_length)


def weight(rows, columns, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def quantized(w, how, granularity):
    fixed = how["dtype"] in ("mxfp4", "mxfp6_e3m2", "mxint8", "nvfp4")
    return quantize(w, **how, **({} if fixed else {"granularity": granularity}))


USUAL = ["nf4", "uint4 affine", "int4 float16", "int8 affine", "mxfp4", "int3 affine", "float6_e2m3fn"]
of_each_kind = pytest.mark.parametrize(
    "how",
    [pytest.param(k, marks=() if name_of(k) in USUAL else pytest.mark.exhaustive) for k in (*KINDS, *OTHERS)],
    ids=name_of,
)


@of_each_kind
def test_a_row_with_a_single_one_gives_the_values_of_dequantize(how):
    """Of few rows of x, of some, and of many; of groups of any length, whole or not; in both orders of axes."""
    kept = how.get("scale_dtype")
    for granularity in GRANULARITIES[: {"int8": 3, "float8_e4m3fn": 1}.get(kept)]:
        for rows, columns in ((7, 203), (13, 128)):
            q = quantized(weight(rows, columns), how, granularity)
            ones, values = np.eye(columns, dtype=np.float32), np.asarray(q.dequantize()).T
            np.testing.assert_array_equal(of_tiles(ones, q), values)
            np.testing.assert_array_equal(of_tiles(ones[:40], q), values[:40])
            np.testing.assert_array_equal(of_tiles(ones[-1:], q), values[-1:])
            np.testing.assert_array_equal(of_tiles(np.eye(rows, dtype=np.float32), q, contract=0), values.T)


def assert_as_exact_as_a_float32_product(y, x, values):
    """Row by row, twice the error of NumPy's own product at most, or of the rounding of sums of such terms."""
    exact, terms = x.astype(np.float64) @ values, np.abs(x).astype(np.float64) @ np.abs(values)

    def off(y):
        return np.sqrt(np.mean(((y - exact) / terms) ** 2, axis=1))

    assert (off(y) <= np.maximum(2 * off(x @ values), 2.0**-23)).all()


@pytest.mark.parametrize("rows", [1, 4, 8, 40, 65])
@pytest.mark.parametrize(
    "how",
    [
        {"dtype": "nf4"},
        {"dtype": "uint8", "scheme": "affine"},
    ],
    ids=name_of,
)
def test_sums_are_exact_to_float32(how, rows):
    """Of outliers, of rows that cancel, and of numbers of all sizes; with a bias; in both orders of axes."""
    rng, bias = np.random.default_rng(rows), weight(1, 60)[0]
    for size in (32, 128, 1000):
        q = quantize(weight(60, 700), **how, granularity=PerGroup(size))
        x = rng.standard_normal((rows, 700)).astype(np.float32)
        x[0, 5] = 1e5
        x[-1, 1::2] = -x[-1, ::2]
        x[rows // 2] *= np.exp2(rng.integers(-40, 40, 700)).astype(np.float32)
        values = q.dequantize()
        assert_as_exact_as_a_float32_product(of_tiles(x, q, bias) - bias, x, values.T)
        assert_as_exact_as_a_float32_product(of_tiles(x[:, :60], q, contract=0), x[:, :60], values)


@pytest.mark.parametrize("bits", [3, 6, 8])
def test_signed_codes_that_are_looked_up(bits):
    """With numbers that are no integers, as whoever adds a format may have them."""
    name = aqt_lite.register_format(aqt_lite.Integer(f"int{bits}_in_quarters", bits, True, step=0.25)).name
    try:
        q = quantize(weight(60, 150), name, granularity=PerGroup(50))
        np.testing.assert_array_equal(of_tiles(np.eye(150, dtype=np.float32), q), q.dequantize().T)
    finally:
        del FORMATS[name]


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 1e-40])
def test_values_of_x_that_are_none_of_the_usual(value):
    q = quantize(weight(20, 96), granularity=PerGroup(32))
    for rows in (1, 9, 70):
        x = np.zeros((rows, 96), np.float32)
        x[0, 3] = value
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(of_tiles(x, q), x @ q.dequantize().T, rtol=1e-6, atol=1e-38)


@pytest.mark.parametrize("scale", [np.nan, 1e33, 2.0**-120])
@pytest.mark.parametrize("how", [{"dtype": "int4"}, {"dtype": "int8"}], ids=name_of)
def test_scales_that_are_none_of_the_usual_are_left_to_the_operations(how, scale):
    q = quantize(weight(20, 96), **how, granularity=PerGroup(32))
    q.scale[3, 1] = scale
    for rows in (1, 9, 70):
        assert of_tiles(np.ones((rows, 96), np.float32), q) is NotImplemented
        y = linear(np.ones((rows, 96), np.float32), q)
        assert np.isnan(y[:, 3]).all() == (not scale > 0)
        assert np.isfinite(np.delete(y, 3, axis=1)).all()


def test_negative_scales_and_zero_points_beyond_the_codes():
    rng = np.random.default_rng(0)
    codes, x = rng.integers(0, 256, (9, 96)).astype(np.uint8), rng.standard_normal((3, 96)).astype(np.float32)
    scale = rng.standard_normal((9, 3)).astype(np.float32)
    q = QArray.from_codes(codes, scale, np.full((9, 3), 128, np.int32), dtype="uint8", granularity=PerGroup(32))
    assert_exact_to_float32(of_tiles(x, q), x, q.dequantize())
    w, spec = as_stored(q, packed=True)
    far = w._replace(zero_point=np.full((9, 3), 1 << 20, np.int32))
    assert tiles.matmul_of_tiles(x, far, None, spec=spec, contract=1, packed_length=None) is NotImplemented


@pytest.mark.parametrize(
    "how", [{"dtype": "int4"}, {"dtype": "nf4"}, {"dtype": "mxfp4"}, {"dtype": "int8"}], ids=name_of
)
def test_linear_and_dense_come_here(how, monkeypatch):
    """Packed or not, whichever way a weight lies."""
    asked = []
    weight_of = tiles._weight_of
    monkeypatch.setattr(tiles, "_weight_of", lambda *given: asked.append(1) or weight_of(*given))
    monkeypatch.setattr(runtime, "LARGE", 1 << 10)
    q, x = quantized(weight(512, 768), how, PerGroup(32)), weight(3, 768, 1)
    assert_exact_to_float32(linear(x, q), x, q.dequantize())
    for turned in (False, True):
        q = quantized(weight(768, 512), how, PerGroup(32, -1 if how["dtype"] == "int4" else 0))
        q = q.for_dense() if turned else q
        assert_exact_to_float32(dense(x, q), x, q.dequantize().T)
    assert len(asked) == 3
