"""CF packing: the bound holds exactly, decoding rounds nothing, and what cannot be kept is refused with what can."""

from __future__ import annotations

import re
from fractions import Fraction

import dask.array as da
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from aqt_lite import cf, dequantize, quantize
from aqt_lite.cf import Packing, choose_packing
from aqt_lite.testing import assert_same_bits

X = (np.random.default_rng(0).standard_normal((3, 20, 30)) * 20 + 280).astype("float32")


def exactly(x):
    return [Fraction(float(v)) for v in np.ravel(x)]


def check_within(x, packing, bound):
    """In fractions: readers make exactly what the attributes say, and it is within the bound."""
    codes = packing.pack(x)
    values = packing.unpack(codes)
    assert codes.dtype == packing.dtype
    assert np.array_equal(codes == packing.fill_value, np.isnan(x))
    scale, offset = Fraction(float(packing.scale_factor)), Fraction(float(packing.add_offset))
    for v, code, value in zip(exactly(np.nan_to_num(x)), codes.ravel().tolist(), values.ravel(), strict=True):
        if code == packing.fill_value:
            assert np.isnan(value)
            continue
        assert Fraction(float(value)) == code * scale + offset
        assert abs(v - Fraction(float(value))) <= Fraction(bound)


def tried(x, **how):
    """A packing, or why there is none."""
    try:
        return choose_packing(x, **how), None
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("source", ["float32", "float64", ">f4", ">f8"])
@pytest.mark.parametrize("dtype", cf.DTYPES)
def test_every_type(source, dtype):
    x = X.astype(source)
    x[0, 1, 2] = np.nan
    packing = choose_packing(x, max_abs_err=1.5, dtype=dtype)
    check_within(x, packing, 1.5)
    wide = source.endswith(("64", "8")) or dtype == "int32"
    assert packing.scale_factor.dtype == packing.add_offset.dtype == ("float64" if wide else "float32")
    assert packing.scale_factor > 2.9  # the largest step that will do, or nearly
    assert packing.encoding == {
        "dtype": np.dtype(dtype),
        "scale_factor": packing.scale_factor,
        "add_offset": packing.add_offset,
        "_FillValue": packing.fill_value,
    }


RANGES = st.sampled_from([(-1.0, 1.0), (0.0, 0.02), (180.0, 330.0), (98000.0, 104000.0), (-3e-9, 1e-9), (-1e30, 1e30)])


@settings(max_examples=80)
@given(data=st.data(), limits=RANGES, source=st.sampled_from(["float32", "float64"]), dtype=st.sampled_from(cf.DTYPES))
def test_the_bound_holds_exactly(data, limits, source, dtype):
    low, high = limits
    unit = st.floats(0, 1, width=32)
    x = np.asarray([low + u * (high - low) for u in data.draw(st.lists(unit, min_size=1, max_size=12))], source)
    bound = (high - low) * 2.0 ** -data.draw(st.floats(1, 40))
    packing, why = tried(x, max_abs_err=bound, dtype=dtype)
    if packing is None:
        least = float(re.search(r"the smallest is ([0-9.e+-]+)", why)[1])
        assert least > bound
        packing, bound = choose_packing(x, max_abs_err=least, dtype=dtype), least
        with pytest.raises(ValueError, match="the smallest is"):
            choose_packing(x, max_abs_err=least * (1 - 1e-4), dtype=dtype)
    check_within(x, packing, bound)


@settings(max_examples=70)
@given(
    x=hnp.arrays(st.sampled_from([np.float32, np.float64]), st.integers(0, 5), elements={"allow_infinity": False}),
    bound=st.floats(1e-300, 1e300),
)
def test_any_numbers_are_within_the_bound_or_refused(x, bound):
    packing, why = tried(x, max_abs_err=bound)
    if packing is None:
        assert re.search(r"cannot keep .*: (the smallest is [0-9.e+-]+|it keeps none)", why)
    else:
        check_within(x, packing, bound)


def test_zero_stays_zero_and_the_grid_does_not_depend_on_the_data():
    rain = np.asarray([0.0, -0.0, 0.3, 17.25, 130.0], "float32")
    some, all_ = choose_packing(rain[:3], max_abs_err=0.05, dtype="int16"), choose_packing(rain, max_abs_err=0.05)
    assert (all_.unpack(all_.pack(rain))[:2] == 0).all()
    for packing in (some, all_):
        assert float(packing.add_offset / packing.scale_factor).is_integer()


@pytest.mark.parametrize("x", [np.empty((0, 3), "f4"), np.full((2, 2), np.nan, "f8"), np.float32(3.25), np.zeros(3)])
def test_nothing_missing_and_alone(x):
    packing = choose_packing(np.asarray(x), max_abs_err=0.5)
    check_within(np.asarray(x), packing, 0.5)


def test_masked_elements_are_missing():
    x = np.ma.masked_less(X, 270)
    packing = choose_packing(x, max_abs_err=0.5)
    assert np.array_equal(packing.pack(x) == packing.fill_value, x.mask)
    assert packing.add_offset > choose_packing(X, max_abs_err=0.5).add_offset


class Watched:
    """An array on a disk, which says how much of it is read at once."""

    def __init__(self, values, chunks):
        self.values, self.chunks, self.most, self.read = values, chunks, 0, 0
        self.shape, self.dtype, self.ndim = values.shape, values.dtype, values.ndim

    def __getitem__(self, key):
        part = self.values[key]
        self.most, self.read = max(self.most, part.size), self.read + part.size
        return part


def test_arrays_are_read_part_by_part(tmp_path):
    x = np.memmap(tmp_path / "x", "float32", "w+", shape=(40, 200, 250))
    x[:] = np.random.default_rng(0).random(x.shape, "float32")
    whole = choose_packing(np.asarray(x), max_abs_err=0.01)
    for stored in (Watched(x, None), Watched(x, (1, 200, 250)), Watched(x, (40, 20, 25))):
        assert choose_packing(stored, max_abs_err=0.01) == whole
        assert stored.most <= 1 << 18
        assert stored.read == 2 * x.size
    assert choose_packing(x[::-1, :, ::2], max_abs_err=0.01) == whole  # a view that is not contiguous


def test_chunks_of_dask_are_looked_at_alone():
    sizes = []
    x = da.from_array(X, chunks=(1, 7, 30)).map_blocks(lambda part: sizes.append(part.size) or part, meta=X[:0])
    assert choose_packing(x, max_abs_err=0.05) == choose_packing(X, max_abs_err=0.05)
    assert max(sizes) == 7 * 30
    bad = X.copy()
    bad[2, 9, 4] = -np.inf
    with pytest.raises(ValueError, match=r"x has 1 infinite values, the first at index \(2, 9, 4\)"):
        choose_packing(da.from_array(bad, chunks=(1, 7, 30)), max_abs_err=0.05)


def test_values_that_change_while_they_are_read_are_noticed():
    class Restless(Watched):
        def __getitem__(self, key):
            self.values = self.values + 100
            return super().__getitem__(key)

    with pytest.raises(ValueError, match=r"\d+ values of 1800 are further than 0.5 .* Did x change"):
        choose_packing(Restless(X, None), max_abs_err=0.5, dtype="int8")


@pytest.mark.parametrize("top", [1e-45, 1e-42, 1e-40, 1e-38])
@pytest.mark.parametrize("bound", [1e-46, 1e-45, 3e-45, 1e-44, 1e-42])
def test_subnormal_numbers_are_within_the_bound_or_refused(top, bound):
    """Differences of theirs are rounded to whole multiples of the smallest one."""
    x = (np.linspace(0, 1, 64) * top).astype("float32")
    for dtype in ("auto", "int16", "uint8"):
        for powers_of_two in (False, True):
            how = {"dtype": dtype, "powers_of_two": powers_of_two}
            try:
                packing = choose_packing(x, max_abs_err=bound, **how)
            except ValueError as error:
                least = float(re.search(r"cannot keep max_abs_err=.*: the smallest is ([^;]+)", str(error))[1])
                assert least > bound
                packing, limit = choose_packing(x, max_abs_err=least, **how), least
            else:
                limit = bound
            assert np.abs(packing.unpack(packing.pack(x)).astype("float64") - x.astype("float64")).max() <= limit


def test_a_difference_that_rounds_to_the_bound_is_looked_at_closely():
    """1 - -2^-60 rounds to 1: it is further away than 1, while 1 - 2^-60 is not."""
    a, b = np.asarray([1.0, 1.0, 1.0]), np.asarray([-(2.0**-60), 2.0**-60, 0.0])
    assert cf._further(a, b, 1.0).tolist() == [True, False, False]
    assert cf._further(-a, -b, 1.0).tolist() == [True, False, False]


def test_what_is_refused():
    for bad, message in (
        (0, "positive"),
        (-1.0, "positive"),
        (np.nan, "positive"),
        (np.inf, "finite"),
        (True, "max_abs"),
    ):
        with pytest.raises(
            ValueError, match=f"max_abs_err={bad!r}: give a .*{message if message != 'max_abs' else ''}"
        ):
            choose_packing(X, max_abs_err=bad)
    with pytest.raises(TypeError, match=r"max_abs_err='0\.1 K': give a number"):
        choose_packing(X, max_abs_err="0.1 K")
    with pytest.raises(ValueError, match="dtype='int4' is not known: use one of 'auto', 'int8', 'uint8', 'int16'"):
        choose_packing(X, max_abs_err=1, dtype="int4")
    for x in (X.astype("float16"), np.arange(3), [1.0, 2.0], X.astype("complex64"), quantize(X), "x"):
        with pytest.raises(TypeError, match="arrays of NumPy of float32 or float64 are packed"):
            choose_packing(x, max_abs_err=1)
    with pytest.raises(TypeError, match=r"x is of type pandas.Series, and its labels would be lost"):
        choose_packing(pd.Series(X[0, 0]), max_abs_err=1)
    unknown = da.from_array(X, chunks=1)
    with pytest.raises(TypeError, match=r"call x.compute_chunk_sizes\(\) first"):
        choose_packing(unknown[unknown[:, 0, 0] > 0], max_abs_err=1)
    packing = choose_packing(X, max_abs_err=1)
    with pytest.raises(
        ValueError, match=r"x has 1 values of 2 beyond the codes of this packing, the first at .*\(1,\)"
    ):
        packing.pack(np.asarray([280, 1e9], "float32"))
    with pytest.raises(ValueError, match="infinite"):
        packing.pack(np.asarray([280, np.inf], "float32"))
    with pytest.raises(TypeError, match="codes have dtype int16, and the packing is of int8"):
        packing.unpack(np.zeros(3, "int16"))


def test_read_from_attributes():
    packing = choose_packing(X, max_abs_err=0.05)
    assert Packing.from_attributes(packing.attributes, "int16") == packing
    assert Packing.from_attributes({k: np.asarray([v]) for k, v in packing.attributes.items()}, "<i2") == packing
    for change, message in (
        ({"add_offset": np.float64(3)}, "scale_factor is float32 and add_offset float64"),
        ({"scale_factor": 1, "add_offset": 2}, "scale_factor is int64"),
        ({"_FillValue": 40000}, "_FillValue=.*40000.* is no code of int16"),
    ):
        with pytest.raises(ValueError, match=message):
            Packing.from_attributes({**packing.attributes, **change}, "int16")
    with pytest.raises(ValueError, match="the variable has no add_offset, _FillValue"):
        Packing.from_attributes({"scale_factor": 1.0}, "int16")


@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "uint16"])
def test_a_qarray_of_packed_codes_has_the_same_values(source, dtype):
    x = X.astype(source)
    packing = choose_packing(x, max_abs_err=1.5, dtype=dtype)
    codes = packing.pack(x)
    assert_same_bits(dequantize(packing.to_qarray(codes)), packing.unpack(codes))
    codes[0, 0, 0] = packing.fill_value
    if dtype.startswith("u"):
        with pytest.raises(ValueError, match=r"1 of 1800 values are missing, and uint.* keeps code 0"):
            packing.to_qarray(codes)
    else:
        q = packing.to_qarray(codes)
        assert_same_bits(dequantize(q), packing.unpack(codes))
        assert np.array_equal(q.mask, np.isnan(packing.unpack(codes)))


def test_codes_of_32_bits_are_no_qarray():
    packing = choose_packing(X, max_abs_err=1e-4)
    assert packing.dtype == "int32"
    with pytest.raises((TypeError, ValueError), match="int32"):
        packing.to_qarray(packing.pack(X))


@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("value", [3.3, 0.0, -1e20, np.nan])
@pytest.mark.parametrize("dtype", ["auto", "int8", "uint16", "int32"])
def test_an_array_without_axes(source, value, dtype):
    """As files have them: a reference pressure, for instance."""
    x = np.asarray(value, source)
    for wrap in (lambda x: x, np.ma.masked_invalid, da.from_array):
        packing = choose_packing(wrap(x), max_abs_err=1e18 if abs(value) > 1e18 else 0.05, dtype=dtype)
        check_within(x, packing, 1e18 if abs(value) > 1e18 else 0.05)
        assert packing.pack(x).shape == packing.unpack(packing.pack(x)).shape == ()
    cf.check_within(x, x.copy(), 0.0)
    found = cf.codes_within(x, 1e18)
    assert (found.codes.shape, found.missing) == ((), bool(np.isnan(x)))
    q = packing.to_qarray(packing.pack(x)) if dtype == "int8" else None
    assert q is None or q.shape == ()


def test_what_is_wrong_with_an_array_without_axes():
    one = np.asarray(1.0, "float32")
    with pytest.raises(ValueError, match=r"1 values of 1 are further than 0.5 .* at index \(\): 1.0 becomes 2.0"):
        cf.check_within(one, np.asarray(2.0, "float32"), 0.5)
    cf.check_within(one, np.asarray(1.5, "float32"), 0.5)  # a difference that is equal to the bound
    with pytest.raises(ValueError, match=r"1 infinite values, the first at index \(\)"):
        choose_packing(np.asarray(np.inf, "float32"), max_abs_err=1.0)
    with pytest.raises(ValueError, match=r"1 values of 1 beyond the codes .* at index \(\): 1000.0"):
        choose_packing(one, max_abs_err=0.05, dtype="int8").pack(np.asarray(1e3, "float32"))


@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["auto", "int16", "uint16"])
def test_a_stated_range_is_covered(source, dtype):
    later = np.concatenate([np.linspace(180.1, 360.7, 2001), np.full(1, np.nan)]).astype(source)
    later = np.clip(later, np.asarray(180.1, source), np.asarray(360.7, source))
    for x in (X[:1, :2].astype(source), np.zeros(0, source), np.full(2, np.nan, source)):
        check_within(later, choose_packing(x, max_abs_err=0.003, dtype=dtype, value_range=(180.1, 360.7)), 0.003)
    other = np.full(2, 300 if dtype == "uint16" else 0, source)  # without it, there are no codes
    with pytest.raises(ValueError, match="beyond the codes of this packing"):
        choose_packing(other, max_abs_err=0.003, dtype=dtype).pack(later)
    wide = np.asarray([0, 500.0], source)  # and what x has beyond the range is covered, too
    packing = choose_packing(wide, max_abs_err=0.05, dtype=dtype, value_range=(180.1, 360.7))
    assert packing == choose_packing(wide, max_abs_err=0.05, dtype=dtype)
    with pytest.raises(ValueError, match=r"int8 cannot keep max_abs_err=0.05 over \[180\.1\d*, 360\.7\d*\]"):
        choose_packing(np.zeros(0, source), max_abs_err=0.05, dtype="int8", value_range=(180.1, 360.7))


@pytest.mark.parametrize("bad", [(2, 1), (0, np.inf), (np.nan, 1), (0, 1e39)])
def test_ranges_that_are_none(bad):
    with pytest.raises(ValueError, match=r"value_range=.*: give the least and the greatest value, finite in float32"):
        choose_packing(X, max_abs_err=0.05, value_range=bad)
    for shape in (1.0, (1, 2, 3), ("a", "b")):
        with pytest.raises(TypeError, match=r"value_range=.*: give two numbers"):
            choose_packing(X, max_abs_err=0.05, value_range=shape)
