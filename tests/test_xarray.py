"""xarray: what xarray, netCDF4 and h5netcdf write and read of a packing equals what is computed here, bit for bit."""

from __future__ import annotations

import subprocess
import sys

import dask
import netCDF4
import numpy as np
import pytest
import xarray as xr

from aqt_lite import cf
from aqt_lite.testing import assert_same_bits
from aqt_lite.xarray import cf_encoding

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


def test_attributes_that_would_speak_of_codes_are_refused():
    for name in ("valid_range", "missing_value", "scale_factor"):
        with pytest.raises(ValueError, match=f"variable 't' has the attribute {name}=1.0"):
            cf_encoding(field(**{name: 1.0}), max_abs_err=0.5)


def test_import_brings_no_xarray():
    code = "import sys, aqt_lite, aqt_lite.cf; assert not {'xarray', 'pandas', 'zarr'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
