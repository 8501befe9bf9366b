"""xarray: what xarray, netCDF4 and h5netcdf write and read of a packing equals what is computed here, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from fractions import Fraction

import dask
import netCDF4
import numpy as np
import pytest
import xarray as xr

import aqt_lite.xarray
from aqt_lite import PerBlock, PerChannel, cf, dequantize, quantize
from aqt_lite.testing import assert_same_bits
from aqt_lite.xarray import RepackedWarning, cf_encoding

X = (np.random.default_rng(0).standard_normal((3, 20, 30)) * 20 + 280).astype("float32")
X[0, 3, 4] = np.nan


@pytest.fixture(autouse=True)
def _in_this_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def field(source="float32", **attrs):
    coords = {"time": np.arange(3), "lat": np.linspace(-90, 90, 20), "lon": np.arange(30.0)}
    return xr.DataArray(X.astype(source), coords, name="t", attrs={"units": "K", **attrs})


# ---- CF


@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("dtype", cf.DTYPES)
@pytest.mark.parametrize("engine", ["netcdf4", "h5netcdf"])
@pytest.mark.parametrize("chunks", [None, {"lat": 7}], ids=["numpy", "dask"])
def test_writers_and_readers_of_netcdf_agree(tmp_path, source, dtype, engine, chunks):
    path, t = tmp_path / "t.nc", field(source)
    ds = t.to_dataset() if chunks is None else t.to_dataset().chunk(chunks)
    encoding = cf_encoding(ds, max_abs_err=1.5, dtype=dtype)
    ds.to_netcdf(path, encoding=encoding, engine=engine)

    with xr.open_dataset(path, mask_and_scale=False, engine=engine) as raw:
        packing = cf.Packing.from_attributes(raw.t.attrs, raw.t.dtype)
        codes = raw.t.values
    assert packing.encoding == encoding["t"]
    if chunks is None or source == "float64" or dtype != "int32":
        assert_same_bits(codes, packing.pack(t.values))
    else:  # Dask keeps float64 where xarray writes float32 over float32: seven digits of codes of 32 bits
        np.testing.assert_allclose(codes, packing.pack(t.values), rtol=3e-7, atol=1)
    values = packing.unpack(codes)
    with xr.open_dataset(path, engine=engine) as found:
        assert_same_bits(found.t.values, values)
        assert found.t.attrs == t.attrs
    with netCDF4.Dataset(path) as file:
        assert_same_bits(file["t"][:].filled(np.nan), values)
    assert np.nanmax(np.abs(values.astype(float) - t.values.astype(float))) <= 1.5


@pytest.mark.parametrize("source", ["float32", "float64"])
def test_netcdf4_writes_the_same_codes(tmp_path, source):
    x = X.astype(source)
    packing = cf.choose_packing(x, max_abs_err=0.05)
    with netCDF4.Dataset(tmp_path / "t.nc", "w") as file:
        for name, length in zip("abc", x.shape, strict=True):
            file.createDimension(name, length)
        variable = file.createVariable("t", packing.dtype, ("a", "b", "c"), fill_value=packing.fill_value)
        variable.scale_factor, variable.add_offset = packing.scale_factor, packing.add_offset
        variable[:] = np.ma.masked_array(np.nan_to_num(x, nan=280), mask=np.isnan(x))
        variable.set_auto_maskandscale(False)
        assert_same_bits(variable[:], packing.pack(x))


@pytest.mark.parametrize("source", ["float32", "float64"])
def test_zarr_which_decodes_in_float64_has_the_same_values(tmp_path, source):
    """JSON has one kind of number: float32 attributes come back as float64, and decode to the same numbers."""
    ds = field(source).to_dataset()
    encoding = cf_encoding(ds, max_abs_err=0.05)
    ds.to_zarr(tmp_path / "t.zarr", encoding=encoding, consolidated=False)
    packing = cf.Packing(**{"fill_value" if k == "_FillValue" else k: v for k, v in encoding["t"].items()})
    found = xr.open_zarr(tmp_path / "t.zarr", consolidated=False).t
    assert found.dtype == "float64"
    assert_same_bits(found.values, packing.unpack(packing.pack(ds.t.values)).astype("float64"))


def test_files_before_netcdf_4(tmp_path):
    ds = field().to_dataset()
    for name in ("NETCDF3_CLASSIC", "NETCDF3_64BIT"):
        ds.to_netcdf(tmp_path / name, encoding=cf_encoding(ds, max_abs_err=0.05), format=name)
        with xr.open_dataset(tmp_path / name) as found:
            assert np.nanmax(np.abs(found.t.values.astype(float) - X)) <= 0.05


def test_a_file_is_not_read_whole(tmp_path):
    path, t = tmp_path / "t.nc", field()
    t.to_netcdf(path)
    with xr.open_dataset(path, cache=True) as ds:
        assert cf_encoding(ds, max_abs_err=0.05) == cf_encoding(t.to_dataset(), max_abs_err=0.05)
        assert not ds.t.variable._in_memory


def test_datasets():
    ds = xr.Dataset(
        {"t": field(), "p": field("float64") * 1000, "n": ("time", np.arange(3)), "s": ("time", list("abc"))}
    )
    both = cf_encoding(ds, max_abs_err=0.5)
    assert list(both) == ["t", "p"]
    assert both["t"] == cf_encoding(ds.t, max_abs_err=0.5)
    one = cf_encoding(ds, max_abs_err={"p": 100.0}, dtype="int16")
    assert (list(one), one["p"]["scale_factor"].dtype) == (["p"], "float64")
    with pytest.raises(ValueError, match=r"max_abs_err names 'q'; the Dataset has the variables \['t', 'p'"):
        cf_encoding(ds, max_abs_err={"q": 1.0})
    with pytest.raises(ValueError, match="no floating-point variable"):
        cf_encoding(ds[["n"]], max_abs_err=1.0)
    with pytest.raises(TypeError, match="variable 'n': x has dtype int64"):
        cf_encoding(ds, max_abs_err={"n": 1.0})
    with pytest.raises(TypeError, match="max_abs_err is a mapping"):
        cf_encoding(ds.t, max_abs_err={"t": 1.0})
    with pytest.raises(TypeError, match="obj is a ndarray"):
        cf_encoding(X, max_abs_err=1.0)
    with pytest.raises(ValueError, match=r"variable 't': int8 cannot keep max_abs_err=0\.05"):
        cf_encoding(ds, max_abs_err=0.05, dtype="int8")


def test_an_encoding_covers_a_stated_range(tmp_path):
    """Writers wrap what is beyond the codes, without a word: who writes other data states their range."""
    ds = xr.Dataset({"t": field(), "p": field()})
    later = field() + 150
    ranges = {"t": (float(X.min(where=~np.isnan(X), initial=300)), float(np.nanmax(later)))}
    encoding = cf_encoding(ds, max_abs_err=0.003, value_range=ranges)
    assert encoding["p"] == cf_encoding(ds.p, max_abs_err=0.003)
    assert encoding["t"]["dtype"] == encoding["p"]["dtype"] == "int16"
    assert encoding["t"] == ds.t.aqt.cf_encoding(max_abs_err=0.003, value_range=ranges["t"])
    assert encoding["t"] == ds.aqt.cf_encoding(max_abs_err=0.003, value_range=ranges)["t"]
    for engine in ("netcdf4", "h5netcdf"):
        errors = {}
        for name in ds:
            path = tmp_path / f"{name}_{engine}.nc"
            later.to_netcdf(path, encoding={"t": encoding[name]}, engine=engine)
            with xr.open_dataset(path) as found:
                errors[name] = float(abs(found.t.astype("float64") - later).max())
        assert errors["t"] <= 0.003
        assert errors["p"] > 100
    with pytest.raises(ValueError, match="beyond the codes of this packing"):
        cf.Packing.from_attributes(encoding["p"], "int16").pack(later.values)
    with pytest.raises(ValueError, match=r"value_range names 'q'; \['t', 'p'\] are packed"):
        cf_encoding(ds, max_abs_err=0.05, value_range={"q": (0, 1)})
    with pytest.raises(TypeError, match="give a mapping from names of variables for a Dataset"):
        cf_encoding(ds, max_abs_err=0.05, value_range=(0, 1))
    with pytest.raises(TypeError, match="value_range is a mapping, which is for Datasets"):
        cf_encoding(ds.t, max_abs_err=0.05, value_range=ranges)
    with pytest.raises(ValueError, match=r"variable 't': value_range=\(1, 0\): give the least"):
        cf_encoding(ds.t, max_abs_err=0.05, value_range=(1, 0))


def test_attributes_that_would_speak_of_codes_are_refused():
    for name in ("valid_range", "missing_value", "scale_factor"):
        with pytest.raises(ValueError, match=f"variable 't' has the attribute {name}=1.0"):
            cf_encoding(field(**{name: 1.0}), max_abs_err=0.5)


# ---- the accessor


FORMS = ["int8", "uint8", "int16", "int4", "ternary", "float8_e4m3fn", "nf4", "mxfp4", "nvfp4"]


def full(source="float32"):
    """A field without gaps, whose encoding came from a file."""
    t = field(source).fillna(280)
    t.encoding = {"zlib": True, "scale_factor": 0.5}
    return t


@pytest.mark.parametrize("chunks", [None, pytest.param({"time": 2}, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(("form", "source"), [*((form, "float32") for form in FORMS), ("int8", "float64")])
def test_there_and_back_with_all_labels(tmp_path, form, source, chunks):
    t = full(source)
    how = {"scheme": "affine"} if form == "uint8" else {}
    here = quantize(t.values, form, **how, granularity=None if form == "nvfp4" else PerBlock((1, -1, 8)))
    wanted = t.copy(data=dequantize(here))
    named = None if form == "nvfp4" else {"time": 1, "lon": 8}
    ds = t.to_dataset() if chunks is None else t.to_dataset().chunk(chunks)
    q = ds.aqt.quantize(form, granularity=named, **how)
    back = q.aqt.dequantize()
    assert (back.t.chunks is None) == (chunks is None)
    assert_same_bits(back.t.values, wanted.values)
    assert back.identical(wanted.to_dataset())
    assert back.t.encoding == t.encoding
    assert q.t.encoding.keys() == {"aqt_lite"}  # nothing that would bend codes when they are written
    assert_same_bits(q.aqt.dequantize("float64").t.values, dequantize(here, "float64"))
    q.to_netcdf(tmp_path / "q.nc")
    q.to_zarr(tmp_path / "q.zarr", mode="w", consolidated=False)
    for path, options in (("q.nc", {}), ("q.zarr", {"engine": "zarr", "consolidated": False})):
        with aqt_lite.xarray.open_dataset(tmp_path / path, **options) as found:
            assert found.identical(wanted.to_dataset())


@pytest.mark.parametrize("form", ["int8", "ternary"])
def test_dask_stays_lazy_from_file_to_file(tmp_path, form):
    t = full()
    q = t.chunk(time=2).aqt.quantize(form, granularity={"time": 1})
    assert q.t.chunks is not None
    q.to_zarr(tmp_path / "q.zarr", consolidated=False)
    options = {"engine": "zarr", "consolidated": False}
    with aqt_lite.xarray.open_dataset(tmp_path / "q.zarr", chunks={}, **options) as found:
        assert found.t.chunks is not None
        wanted = dequantize(quantize(t.values, form, granularity=PerChannel(0)))
        assert found.identical(t.copy(data=wanted).to_dataset())


def test_codes_can_be_selected_where_blocks_stay_whole():
    t = full()
    q = t.aqt.quantize("int8", granularity={"time": 1, "lon": 8})
    values = q.aqt.dequantize()
    for at in (
        {"time": slice(1, 3)},
        {"time": [2, 0]},
        {"lat": slice(3, 9)},
        {"time": 1},
        {"lat": 2},
        {"time": 0, "lat": 5},
    ):
        assert q.isel(at).aqt.dequantize().identical(values.isel(at))
    assert q.sel(lat=90.0).aqt.dequantize().identical(values.sel(lat=90.0))
    assert q.transpose().aqt.dequantize().identical(values)
    for at in ({"lon": slice(0, 8)}, {"lon": 0}):
        with pytest.raises(ValueError, match=r"variable 't' has .* of 30 along 'lon', where .*: dequantize before"):
            q.isel(at).aqt.dequantize()
    packed = t.aqt.quantize("int4", granularity={"time": 1})
    assert packed.isel(time=2).aqt.dequantize().identical(packed.aqt.dequantize().isel(time=2))
    for at in ({"lon": slice(0, 8)}, {"lon": 0}, {"t_lon_bytes": slice(0, 4)}):
        with pytest.raises(ValueError, match="variable 't'"):
            packed.isel(at).aqt.dequantize()
    double = t.aqt.quantize("nvfp4")
    assert double.isel(time=[1]).aqt.dequantize().identical(double.aqt.dequantize().isel(time=[1]))
    with pytest.raises(ValueError, match="has quantized scales: dequantize before selecting one index"):
        double.isel(time=1).aqt.dequantize()


REFUSED = {
    "rename": lambda q: q.rename(lat="x"),
    "rename where codes may be packed": lambda q: q.rename(lon="x"),
    "swap_dims": lambda q: q.assign_coords(x=("lat", np.arange(20))).swap_dims(lat="x"),
    "stack": lambda q: q.stack(at=("time", "lat")),
    "expand_dims": lambda q: q.expand_dims(ens=2),
    "expand the codes": lambda q: q.assign(t=q.t.expand_dims(ens=2)),
    "broadcast_like": lambda q: q.broadcast_like(xr.DataArray(np.zeros(2), dims="ens")),
    "concat along a new dimension": lambda q: xr.concat([q, q], "ens", data_vars="all"),
    "concat along what shares": lambda q: xr.concat([q, other(q)], "lat", data_vars="all"),
    "concat but for scales": lambda q: xr.concat(
        [q, q], "lat", data_vars="minimal", coords="minimal", compat="override"
    ),
    "select codes alone": lambda q: q.assign(t=q.t.isel(time=1)),
    "select scales alone": lambda q: q.assign(t_scale=q.t_scale.isel(time=1)),
    "rename the variable": lambda q: q.rename(t="u"),
    "rename two": lambda q: q.assign(t=q.t + 1, u=q.t),
    "times": lambda q: q * 2,
    "times, codes alone": lambda q: q.assign(t=q.t * 2),
    "max": lambda q: q.max("time"),
    "float": lambda q: q.assign(t=q.t.astype("float32")),
    "shift": lambda q: q.shift(time=1),
}


def other(q):
    """The same codes with other scales, as another file has them."""
    scale = q.t_scale.copy(data=q.t_scale.values * 2)
    scale.encoding = q.t_scale.encoding
    return q.assign(t_scale=scale)


@pytest.mark.parametrize("how", REFUSED)
@pytest.mark.parametrize(("form", "granularity"), [("int8", {"time": 1}), ("int4", {"time": 1, "lon": 8})])
def test_what_would_become_other_values_is_refused(how, form, granularity):
    q = full().aqt.quantize(form, granularity=granularity)
    with pytest.raises((TypeError, ValueError), match=r"variable '(t|u|t_scale)'"):
        REFUSED[how](q).aqt.dequantize()


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("granularity", [{"lon": 8}, {"time": 1, "lon": 7}], ids=str)
def test_another_order_is_refused_where_it_matters(form, granularity):
    q = full().aqt.quantize(form, granularity=granularity)
    values = q.aqt.dequantize()
    for changed in (
        q.isel(lon=slice(None, None, -1)),
        q.sortby("lon", ascending=False),
        q.roll(lon=3),
        q.roll(lon=3, roll_coords=True),
        q.isel(t_lon_blocks=slice(None, None, -1)),
        q.isel(lon=np.arange(30) // 2),
        q.isel({str(dim): slice(None, None, -1) for dim in q.dims}),
    ):
        with pytest.raises(ValueError, match=r"variable 't' is in another order along '.*', .*: dequantize before"):
            changed.aqt.dequantize()
    with pytest.raises(ValueError, match=r"variable 't' has lost 't_lon.*_order', which tells the order"):
        q.drop_vars([name for name in q if name.endswith("_order")]).aqt.dequantize()
    for kept in (slice(None, None, -1), [2, 0], slice(1, 2)):
        assert (
            q.isel(time=kept, lat=slice(None, None, -1))
            .aqt.dequantize()
            .identical(values.isel(time=kept, lat=slice(None, None, -1)))
        )


def test_packed_codes_follow_their_labels():
    bare = full().drop_vars("lon").aqt.quantize("int4", granularity={"lon": 1})  # scales alone have the dimension
    with pytest.raises(ValueError, match="in another order along 'lon'"):
        bare.isel(lon=slice(None, None, -1)).aqt.dequantize()
    for granularity in (None, {"time": 1}):
        q = full().aqt.quantize("int4", granularity=granularity)
        for changed in (q.isel(lon=slice(None, None, -1)), q.roll(lon=1), q.isel(t_lon_bytes=slice(None, None, -1))):
            with pytest.raises(ValueError, match="in another order along"):
                changed.aqt.dequantize()


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_files_are_joined_where_each_index_has_its_scale(tmp_path, form):
    t = full()
    quantized = [part.aqt.quantize(form, granularity={"time": 1, "lon": 8}) for part in (t[:2], t[2:])]
    values = xr.concat([q.aqt.dequantize() for q in quantized], "time")
    assert xr.concat(quantized, "time", data_vars="all").aqt.dequantize().identical(values)
    halves = [t.aqt.quantize(form).isel(time=at) for at in (slice(0, 2), slice(2, 3))]
    assert xr.concat(halves, "time", data_vars="all").aqt.dequantize().identical(t.aqt.quantize(form).aqt.dequantize())
    paths = [tmp_path / "0.nc", tmp_path / "1.nc"]
    for path, q in zip(paths, quantized, strict=True):
        q.to_netcdf(path)
    with xr.open_mfdataset(paths, combine="nested", concat_dim="time", data_vars="all") as found:
        assert found.aqt.dequantize().t.identical(values.t)
    for path, part in zip(paths, (t[:2], t[2:] * 3), strict=True):
        part.aqt.quantize(form).to_netcdf(path)
    with (
        xr.open_mfdataset(paths, combine="nested", concat_dim="time", data_vars="all") as found,
        pytest.raises(ValueError, match="variable 't'"),
    ):
        found.aqt.dequantize()


@pytest.mark.parametrize("chunks", [None, {"time": 2}], ids=["numpy", "dask"])
def test_missing_values_and_bounds_of_quantize(tmp_path, chunks):
    t = field() if chunks is None else field().chunk(chunks)
    q = t.aqt.quantize("int8", missing="nan", granularity={"time": 1})
    wanted = dequantize(quantize(X, "int8", missing="nan", granularity=PerChannel(0)))
    q.to_netcdf(tmp_path / "q.nc")
    with aqt_lite.xarray.open_dataset(tmp_path / "q.nc") as found:
        assert found.identical(field().copy(data=wanted).to_dataset())
    if chunks is None:  # a bound depends on values
        bounded = t.aqt.quantize("auto", max_abs_err=0.5, missing="nan").aqt.dequantize().t
        assert np.nanmax(np.abs(bounded - X)) <= 0.5
        assert np.array_equal(np.isnan(bounded), np.isnan(X))


@pytest.mark.parametrize("chunks", [None, {"lat": 2}], ids=["numpy", "dask"])
def test_masks_go_by_names(chunks):
    t = full()[0, :20, :20]  # a square, where positions would fit, too
    t = t if chunks is None else t.chunk(chunks)
    land = t > 290
    wanted = quantize(full().values[0, :20, :20], "int8", mask=land.values).dequantize()
    for mask in (land, land.transpose(), land.values, land.variable.transpose(), xr.Dataset({"t": land.transpose()})):
        assert_same_bits(t.aqt.quantize(mask=mask).aqt.dequantize().t.values, wanted)
    rows = land.any("lon").drop_vars("lat")
    found = t.to_dataset().aqt.quantize(mask=rows).aqt.dequantize().t
    assert np.array_equal(np.isnan(found), np.broadcast_to(rows.values[:, None], (20, 20)))
    for mask, message in (
        (land.rename(lat="y"), r"mask has the dimension 'y'; variable 't' has \['lat', 'lon'\]"),
        (land[::-1], "mask has other labels than variable 't'"),
        (land[:3], "mask has other labels than variable 't'"),
        (xr.Dataset({"u": land}), "mask is a Dataset without 't'"),
    ):
        with pytest.raises(ValueError, match=message):
            t.aqt.quantize(mask=mask)
    with pytest.raises(TypeError, match="scale is a DataArray, whose names are not looked at"):
        t.aqt.quantize(scale=xr.DataArray(0.5))


@pytest.mark.parametrize("chunks", [None, {"time": 2}], ids=["numpy", "dask"])
def test_codes_have_no_attributes_of_values(tmp_path, chunks):
    """Codes are not in kelvin, nor are valid limits and fill values those of codes."""
    attrs = {
        "long_name": "temperature", "standard_name": "air_temperature", "n": 3, "f": 0.1, "of_list": [1, 2],
        "valid_range": np.asarray([0, 1000], "f4"), "big": np.asarray([1.5, -2], ">f8"),
        "missing_value": np.float32(1e20), "gap": np.float32(np.nan),
        "open": np.asarray([-np.inf, 0.1], "f4"), "nan": np.float64(np.nan),
        "flags": np.asarray([1, 2**62 + 1]), "text": "°C “as it is”", "none": np.zeros(0, "f4"),
    }  # fmt: skip
    t = full().assign_attrs(attrs)
    q = (t if chunks is None else t.chunk(chunks)).aqt.quantize("int8", granularity={"time": 1})
    assert q.t.attrs.keys() == {"aqt_lite"}
    q.to_netcdf(tmp_path / "q.nc")
    q.to_zarr(tmp_path / "q.zarr", consolidated=False)
    with netCDF4.Dataset(tmp_path / "q.nc") as file:
        assert set(file["t"].ncattrs()) == {"aqt_lite"}
    for path, options in (("q.nc", {}), ("q.zarr", {"engine": "zarr", "consolidated": False})):
        with aqt_lite.xarray.open_dataset(tmp_path / path, **options) as found:
            assert list(found.t.attrs) == list(t.attrs)
            for name, value in t.attrs.items():
                assert type(found.t.attrs[name]) is type(value)
                np.testing.assert_array_equal(found.t.attrs[name], value)
                assert getattr(found.t.attrs[name], "dtype", None) == getattr(value, "dtype", None)
    said = q.assign(t=q.t.assign_attrs(units="degC", history="checked"))  # what is said of codes later stays
    assert said.aqt.dequantize().t.attrs.keys() == {*t.attrs, "history"}
    assert said.aqt.dequantize().t.attrs["units"] == "degC"
    assert np.isnan(full().assign_attrs(gap=np.nan).aqt.quantize().aqt.dequantize().t.attrs["gap"])
    json.loads(q.t.attrs["aqt_lite"], parse_constant=pytest.fail)  # as others read it
    odd = {"pair": (1, 2), "object": object(), "complex": np.complex64(1j), 5: "five"}  # JSON has no words for them
    there = full().assign_attrs(odd).aqt.quantize()
    assert there.t.attrs.keys() == {"aqt_lite", *odd}
    assert there.aqt.dequantize().t.attrs == {"units": "K", **odd}


def test_what_does_not_belong_to_a_quantized_dataset_is_told():
    q = full().aqt.quantize("int8")
    with pytest.raises(ValueError, match="variable 't' has lost 't_scale'"):
        q.drop_vars("t_scale").aqt.dequantize()
    with pytest.raises(ValueError, match="the attribute aqt_lite is not what quantize wrote"):
        q.assign(t=q.t.assign_attrs(aqt_lite="{}")).aqt.dequantize()
    zero = q.t_scale.copy(data=0 * q.t_scale.values)
    with pytest.raises(ValueError, match=r"variable 't': .*scale"):
        q.assign(t_scale=zero).aqt.dequantize()
    with pytest.raises(ValueError, match="has no quantized variable"):
        full().to_dataset().aqt.dequantize()
    with pytest.raises(TypeError, match="variable 't' is quantized already"):
        q.t.aqt.quantize()
    with pytest.raises(
        ValueError, match=r"granularity names the dimension 'level'; variable 't' has \['time', 'lat', 'lon'\]"
    ):
        full().aqt.quantize(granularity={"level": 1})
    with pytest.raises(ValueError, match="variable 't': x has 1 non-finite values"):
        field().aqt.quantize()
    with pytest.raises(TypeError, match="rename them, so that all are strings"):
        xr.DataArray(X, dims=(0, 1, 2)).aqt.quantize()


def test_variables_of_a_dataset_and_names_that_are_taken():
    t, p = full(), full("float64").rename("p").isel(time=0, drop=True)
    ds = xr.Dataset({"t": t, "p": p, "t_scale": t * 2, "n": ("time", np.arange(3))}, attrs={"title": "Fields"})
    q = ds.aqt.quantize("int8", granularity={"time": 1})
    assert q.n.identical(ds.n)
    back = q.aqt.dequantize()
    assert (set(back), back.attrs) == (set(ds), ds.attrs)
    for name in ("t", "t_scale"):
        assert_same_bits(back[name].values, dequantize(quantize(ds[name].values, granularity=PerChannel(0))))
    assert_same_bits(back.p.values, dequantize(quantize(p.values)))
    nameless = full().rename(None).aqt.quantize()
    assert_same_bits(nameless.aqt.dequantize()["values"].values, dequantize(quantize(t.values)))


# ---- files


def test_a_packed_file_says_its_bound_and_keeps_valid_limits(tmp_path):
    t = field(valid_range=np.asarray([200.0, 350.0]), valid_min=np.float32(200))
    ds = t.to_dataset()
    ds.aqt.to_netcdf(tmp_path / "t.nc", max_abs_err=0.05, encoding={"t": {"zlib": True}})
    with xr.open_dataset(tmp_path / "t.nc", mask_and_scale=False) as raw:
        assert raw.t.dtype == raw.t.attrs["valid_range"].dtype == "int16"
        assert (raw.t.attrs["max_abs_error"], raw.t.encoding["zlib"]) == (0.05, True)
    with netCDF4.Dataset(tmp_path / "t.nc") as file, xr.open_dataset(tmp_path / "t.nc") as found:
        read = file["t"][:]  # which masks what is outside valid_range
        assert np.array_equal(np.ma.getmaskarray(read), np.isnan(X))
        assert_same_bits(read.filled(np.nan), found.t.values)
    assert ds.t.attrs["valid_min"] == 200  # the Dataset itself is as it was
    t.aqt.to_zarr(tmp_path / "t.zarr", max_abs_err=0.05, consolidated=False)
    again = xr.open_zarr(tmp_path / "t.zarr", consolidated=False).t
    assert np.nanmax(np.abs(again - X)) <= 0.05
    with pytest.raises(FileExistsError, match="overwrite=True"):
        t.aqt.to_zarr(tmp_path / "t.zarr", max_abs_err=0.05)
    t.aqt.to_zarr(tmp_path / "t.zarr", max_abs_err=1.0, overwrite=True, consolidated=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.nc", "t.zarr"]


@pytest.mark.parametrize("how", [{}, {"engine": "netcdf4"}, {"engine": "h5netcdf"}], ids=str)
def test_codes_are_deflated_unless_the_caller_says_otherwise(tmp_path, how):
    ds = field().to_dataset().assign(alone=np.float32(1.5))
    said = {"given": {"complevel": 4}, "plain": {"zlib": False}, "whole": {"contiguous": True}}
    for name, of_t in {"default": {}, **said}.items():
        ds.aqt.to_netcdf(tmp_path / name, max_abs_err=0.05, encoding={"t": of_t}, **how)
        with xr.open_dataset(tmp_path / name, engine=how.get("engine")) as found:
            assert found.t.encoding.get("zlib", False) == (name in ("default", "given"))
            assert found.t.encoding.get("complevel", 0) == {"default": 1, "given": 4}.get(name, 0)
            assert np.nanmax(np.abs(found.t.values.astype(float) - X)) <= 0.05
            assert abs(found.alone - 1.5) <= 0.05


@pytest.mark.parametrize("how", [{"engine": "scipy"}, {"format": "NETCDF3_64BIT"}], ids=str)
def test_files_that_cannot_be_compressed_are_written_as_they_can_be(tmp_path, how):
    field().aqt.to_netcdf(tmp_path / "t.nc", max_abs_err=0.05, **how)
    with xr.open_dataset(tmp_path / "t.nc") as found:
        assert np.nanmax(np.abs(found.t.values.astype(float) - X)) <= 0.05


def test_a_file_that_was_packed_before_is_packed_anew(tmp_path):
    field().aqt.to_netcdf(tmp_path / "a.nc", max_abs_err=0.01)
    with xr.open_dataset(tmp_path / "a.nc") as ds:
        with pytest.warns(RepackedWarning, match=r"max_abs_error=0\.01: .* max_abs_err=1\.0\. .* to 1\.01 at most"):
            ds.aqt.to_netcdf(tmp_path / "b.nc", max_abs_err=1.0, dtype="int16")
        with xr.open_dataset(tmp_path / "b.nc") as found:
            assert float(abs(found.t - ds.t).max()) <= 1.0
            assert found.t.encoding["scale_factor"] > 1.9


def test_a_file_that_names_coordinates_is_packed(tmp_path):
    """Fields on a grid of two dimensions are written with an attribute that says where their places are."""
    places = {"lat2": (("lat", "lon"), X[1]), "lon2": (("lat", "lon"), X[2]), "crs": ((), 0)}
    field(grid_mapping="crs").assign_coords(places).to_netcdf(tmp_path / "in.nc")
    for how in (True, "all"):
        with xr.open_dataset(tmp_path / "in.nc", decode_coords=how) as ds:
            assert "lat2" in ds.t.encoding["coordinates"]
            ds.to_netcdf(tmp_path / "mine.nc", encoding=cf_encoding(ds, max_abs_err=1))
            ds.aqt.to_netcdf(tmp_path / "out.nc", max_abs_err=1)
            ds.aqt.to_zarr(tmp_path / "out.zarr", max_abs_err=1, overwrite=True, consolidated=False)
            for name in ("mine.nc", "out.nc", "out.zarr"):
                options = {"engine": "zarr", "consolidated": False} if name == "out.zarr" else {}
                with xr.open_dataset(tmp_path / name, decode_coords="all", **options) as found:
                    assert set(found.t.coords) == {"time", "lat", "lon", "lat2", "lon2", "crs"}
                    assert found.t.encoding["grid_mapping"] == "crs"


def test_integers_of_a_file_are_not_packed_by_a_bound_for_all(tmp_path):
    ds = xr.Dataset({"t": field(), "flag": ("time", np.asarray([1, 2, -9], "i2"), {"_FillValue": np.int16(-9)})})
    ds.to_netcdf(tmp_path / "in.nc")
    with xr.open_dataset(tmp_path / "in.nc") as found:
        found.aqt.to_netcdf(tmp_path / "out.nc", max_abs_err=1)
    with xr.open_dataset(tmp_path / "out.nc", mask_and_scale=False) as raw:
        assert "scale_factor" in raw.t.attrs
        assert raw.flag.identical(ds.flag)


@pytest.mark.parametrize("how", [{"mode": "a"}, {"group": "model"}, {"compute": False}], ids=str)
def test_files_are_made_as_a_whole_or_not_at_all(tmp_path, how):
    """What xarray would add to a file, or write later, would be lost."""
    field().to_netcdf(tmp_path / "t.nc")
    field().to_zarr(tmp_path / "t.zarr", consolidated=False)
    name = next(iter(how))
    with pytest.raises(ValueError, match=f"{name}=.*: what is written here replaces all"):
        field().aqt.to_netcdf(tmp_path / "t.nc", max_abs_err=1, **how)
    with pytest.raises(ValueError, match=f"{name}=.*: what is written here replaces all"):
        field().aqt.to_zarr(tmp_path / "t.zarr", max_abs_err=1, overwrite=True, **how)
    with pytest.raises(ValueError, match="append_dim='time'"):
        field().aqt.to_zarr(tmp_path / "t.zarr", max_abs_err=1, append_dim="time")
    with xr.open_dataset(tmp_path / "t.nc") as found:
        assert_same_bits(found.t.values, X)
    field().aqt.to_netcdf(tmp_path / "t.nc", max_abs_err=1, mode="w", group=None, compute=True)


def test_bounds_add_up(tmp_path):
    """The attribute is never less than what the packings may have done together."""
    first, second = 0.1, 0.7
    assert Fraction(first + second) < Fraction(first) + Fraction(second)  # a sum that is rounded down
    t = field(max_abs_error=first)
    ds = xr.Dataset({"t": t, "p": field()})
    calls = (
        lambda: ds.aqt.to_netcdf(tmp_path / "t.nc", max_abs_err=second),
        lambda: aqt_lite.xarray.to_zarr(ds, tmp_path / "t.zarr", max_abs_err={"t": second}, consolidated=False),
        lambda: t.aqt.to_netcdf(tmp_path / "a.nc", max_abs_err=second),
        lambda: cf_encoding(ds, max_abs_err=second),
        lambda: t.aqt.cf_encoding(max_abs_err=second),
    )
    for call in calls:
        with pytest.warns(RepackedWarning) as found:
            call()
        assert [warning.filename for warning in found] == [__file__]
    for path, options in (("t.nc", {}), ("a.nc", {}), ("t.zarr", {"engine": "zarr", "consolidated": False})):
        with xr.open_dataset(tmp_path / path, **options) as read:
            assert Fraction(float(read.t.attrs["max_abs_error"])) >= Fraction(first) + Fraction(second)
            assert path != "t.nc" or read.p.attrs["max_abs_error"] == second
    assert ds.t.attrs["max_abs_error"] == first
    for one in (np.asarray([first]), [first], np.float32(0.125)):
        with pytest.warns(RepackedWarning, match=r"has the attribute max_abs_error=0\.1(25)?: it was packed before"):
            cf_encoding(field(max_abs_error=one), max_abs_err=second)
    for bad in ("0.1 K", np.asarray([1.0, 2.0]), -1.0, np.nan):
        with pytest.warns(RepackedWarning, match=r"which is no bound: 0\.7 replaces it"):
            field(max_abs_error=bad).aqt.to_netcdf(tmp_path / "b.nc", max_abs_err=second)
        with xr.open_dataset(tmp_path / "b.nc") as read:
            assert read.t.attrs["max_abs_error"] == second


def test_nothing_is_half_written(tmp_path):
    (tmp_path / "t.nc").write_text("what was here")
    bad = field()
    for how in ({"max_abs_err": 1e-9}, {"max_abs_err": 1, "encoding": {"t": {"no_such": 1}}}):
        with pytest.raises(ValueError, match=r"cannot keep|no_such"):
            bad.aqt.to_netcdf(tmp_path / "t.nc", **how)
    with pytest.raises(ValueError, match="encoding of 't' has 'dtype', which max_abs_err chooses"):
        bad.aqt.to_netcdf(tmp_path / "t.nc", max_abs_err=1, encoding={"t": {"dtype": "int8"}})
    assert [path.name for path in tmp_path.iterdir()] == ["t.nc"]
    assert (tmp_path / "t.nc").read_text() == "what was here"


def test_folders_are_not_replaced_but_stores_by_stores(tmp_path, monkeypatch):
    precious, store = tmp_path / "precious", tmp_path / "t.zarr"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    field().to_netcdf(precious / "in.nc")
    with pytest.raises(IsADirectoryError, match="precious is a folder, and a file is to be written"):
        field().aqt.to_netcdf(precious, max_abs_err=1)
    with pytest.raises(FileExistsError, match="precious is a folder that is no store of zarr"):
        field().aqt.to_zarr(precious, max_abs_err=1, overwrite=True)
    with pytest.raises(FileExistsError, match="is a file, and a store of zarr is a folder"):
        field().aqt.to_zarr(precious / "in.nc", max_abs_err=1, overwrite=True)
    field().to_zarr(store, consolidated=False)
    with pytest.raises(ValueError, match=r"which is read, lies in .*, which would be replaced"):
        xr.open_zarr(store, consolidated=False).aqt.to_zarr(store, max_abs_err=1, overwrite=True)

    rename = os.rename

    def fails(a, b):
        if b == str(store) and not a.endswith(".old"):
            raise OSError("no space")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="no space"):
        field().aqt.to_zarr(store, max_abs_err=1, overwrite=True, consolidated=False)
    monkeypatch.undo()
    assert_same_bits(xr.open_zarr(store, consolidated=False).t.values, X)
    field().aqt.to_zarr(store, max_abs_err=1, overwrite=True, consolidated=False)
    assert "max_abs_error" in xr.open_zarr(store, consolidated=False).t.attrs
    assert sorted(path.name for path in tmp_path.rglob("*") if path.parent in (tmp_path, precious)) == [
        "in.nc",
        "precious",
        "t.zarr",
        "thesis.txt",
    ]


def test_import_brings_no_xarray():
    code = "import sys, aqt_lite, aqt_lite.cf; assert not {'xarray', 'pandas', 'zarr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rounding_keeps_labels_and_says_what_it_did():
    rng = np.random.default_rng(0)
    t = xr.DataArray(
        (280 + rng.standard_normal((6, 30, 40)).cumsum(2)).astype("float32"),
        {"time": np.arange(6), "lat": np.linspace(-9, 9, 30)},
        ("time", "lat", "lon"),
        name="t",
        attrs={"units": "K"},
    )
    t.encoding = {"dtype": "int16", "scale_factor": 0.01, "zlib": True}
    for how in ({"keepbits": 6}, {"max_abs_err": 0.3}, {"max_rel_err": 1e-3}, {"information": 0.99, "dim": "lon"}):
        y = t.aqt.bitround(**how)
        if "keepbits" not in how:
            axis = {"axis": 2} if "dim" in how else {}
            bits = aqt_lite.keepbits_for(t.values, **{k: v for k, v in how.items() if k != "dim"}, **axis)
        else:
            bits = 6
        assert_same_bits(y.values, aqt_lite.bitround(t.values, bits))
        assert y.attrs == {"units": "K", "quantization_nsb": bits}, "a DataArray has no variable to refer to"
        assert y.encoding == {"zlib": True}, "it would be packed again"
        assert y.coords.identical(t.coords)
    assert t.encoding["dtype"] == "int16", "the original is as it was"
    ds = xr.Dataset({"t": t, "n": ("time", np.arange(6)), "u": t.chunk({"lat": 7}) * 2})
    rounded = ds.aqt.bitround(5)
    assert_same_bits(rounded.u.values, aqt_lite.bitround(t.values * 2, 5))
    assert rounded.n.identical(ds.n)
    assert rounded.u.chunks is not None
    assert rounded[rounded.t.attrs["quantization"]].attrs["algorithm"] == "bitround"
    assert "quantization" not in rounded.t.aqt.bitround(4).attrs
    one = ds.aqt.bitround(max_rel_err={"u": 0.01})
    assert one.t.identical(ds.t)
    assert one.u.attrs["quantization_nsb"] == 6
    with pytest.raises(ValueError, match="give one of keepbits"):
        t.aqt.bitround()
    with pytest.raises(ValueError, match="a dimension of variable 't'"):
        t.aqt.bitround(information=0.9, dim="x")
    with pytest.raises(ValueError, match="'v' is named"):
        ds.aqt.bitround(keepbits={"v": 3})
    with pytest.raises(TypeError, match="give one number"):
        t.aqt.bitround({"t": 3})
    t.attrs["max_abs_error"] = np.float64(0.1)
    with pytest.warns(aqt_lite.xarray.RepackedWarning, match="max_abs_error=0.1: .* rounding adds to that error"):
        assert "max_abs_error" not in t.aqt.bitround(5).attrs


@pytest.mark.parametrize("how", [{}, {"max_rel_err": 0.01}, {"max_abs_err": 0.1, "max_rel_err": 0.01}], ids=str)
def test_files_of_integers_ask_for_an_absolute_bound(tmp_path, how):
    da = xr.DataArray(np.arange(4.0, dtype="float32"), dims="x", name="t")
    for write in (da.aqt.to_netcdf, da.aqt.to_zarr):
        with pytest.raises(TypeError, match=r"max_abs_err= is the bound to keep.*aqt.bitround\(max_rel_err=...\)"):
            write(tmp_path / "out", **how)
    assert not list(tmp_path.iterdir())
