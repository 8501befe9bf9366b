"""The command line: packed files keep their bound, nothing is half-written, errors are one line."""

from __future__ import annotations

import re
import subprocess
import sys

import netCDF4
import numpy as np
import pytest
import xarray as xr

import aqt_lite.xarray
from aqt_lite import cli
from aqt_lite.testing import assert_same_bits

X = (280 + np.random.default_rng(0).standard_normal((3, 40, 50)).cumsum(1).cumsum(2)).astype("float32")
X[0, 3, 4] = np.nan


@pytest.fixture
def source(tmp_path):
    """A file as others write them: chunks, unlimited time, limits, an integer variable."""
    ds = xr.Dataset(
        {
            "t": (("time", "lat", "lon"), X, {"units": "K", "valid_range": np.asarray([0, 1000], "f4")}),
            "p": (("time",), np.asarray([1e5, 1.01e5, np.nan]), {"units": "Pa"}),
            "n": ("time", np.arange(3, dtype="int32")),
        },
        {"time": ("time", [0, 6, 12], {"units": "hours since 2000-01-01"}), "lat": np.linspace(-90, 90, 40)},
        {"title": "fields"},
    )
    path = tmp_path / "in.nc"
    ds.to_netcdf(
        path, encoding={"t": {"chunksizes": (1, 20, 50)}, "lat": {"_FillValue": None}}, unlimited_dims=["time"]
    )
    return path


def run(capsys, *arguments):
    """Exit status, output and errors."""
    status = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.filterwarnings("default")
def test_a_bound_that_makes_one_number_of_a_field_is_told(tmp_path, capsys):
    rain = np.asarray([0.0, 4e-4, 1e-4], "f4")
    xr.Dataset({"t": ("x", rain * 1e5), "tp": ("x", rain)}).to_netcdf(tmp_path / "in.nc")
    status, _, errors = run(capsys, "pack", tmp_path / "in.nc", tmp_path / "out.nc", "--max-abs-err", "0.05")
    assert status == 0
    assert "'tp': its values, from 0 to 0.0004, all became" in errors
    assert "'t':" not in errors


@pytest.mark.parametrize(
    ("how", "bits"),
    [
        (["--keepbits", "t=9,p=4"], {"t": 9, "p": 4}),
        (["--max-rel-err", "0.001"], {"t": 9, "p": None}),
        (["--information", "t=0.99"], {"t": None}),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_rounded_floats(how, bits, suffix, source, tmp_path, capsys):
    out = tmp_path / f"out.{suffix}"
    status, said, errors = run(capsys, "pack", source, out, *how)
    assert (status, errors) == (0, "")
    engine = {"engine": "zarr", "consolidated": False} if suffix == "zarr" else {}
    with xr.open_dataset(source, decode_times=False) as a, xr.open_dataset(out, decode_times=False, **engine) as b:
        for name, kept in bits.items():
            kept = int(b[name].attrs["quantization_nsb"]) if kept is None else kept
            assert_same_bits(b[name].values, aqt_lite.bitround(a[name].values, kept))
            assert b[name].attrs["quantization_nsb"] == kept < 15
            assert b[b[name].attrs["quantization"]].attrs["algorithm"] == "bitround"
            assert b[name].attrs["units"] == a[name].attrs["units"]
            assert f"  {kept}" in next(line for line in said.splitlines() if line.startswith(name))
        if "p" not in bits:
            assert b.p.identical(a.p)
        assert b.n.identical(a.n)
    status, listed, _ = run(capsys, "info", out)
    assert status == 0
    assert {line.split()[0] for line in listed.splitlines()[1:-1]} == set(a.data_vars)
    assert "quantization_bitround" not in said


def test_rounding_is_refused_by_name(source, tmp_path, capsys):
    out = tmp_path / "out.nc"
    for how, words in [
        (["--keepbits", "30"], "variable 't': keepbits=30: float32 has 23"),
        (["--keepbits", "u=3"], "in.nc has the variables t, p, n"),
        (["--information", "7"], "information=7.0: a share is above 0"),
        (["--max-rel-err", "0.1", "--dtype", "int8"], "--dtype is for the integers"),
    ]:
        status, _, errors = run(capsys, "pack", source, out, *how)
        assert status == 1
        assert words in errors
    assert names(tmp_path) == ["in.nc"]
    for how in ([], ["--keepbits", "3.5"], ["--keepbits", "3", "--max-abs-err", "1"]):
        with pytest.raises(SystemExit):
            cli.main(["pack", str(source), str(out), *how])


@pytest.mark.filterwarnings("always::aqt_lite.xarray.RepackedWarning")
def test_there_and_back(source, tmp_path, capsys):
    out, back = tmp_path / "out.nc", tmp_path / "back.nc"
    status, said, errors = run(capsys, "pack", source, out, "--max-abs-err", "t=0.05,p=2")
    assert (status, errors) == (0, "")
    assert [line.split() for line in said.splitlines()[1:4]] == [
        ["t", "3", "x", "40", "x", "50", "int16", "float32", "12,000", "0.05"],
        ["p", "3", "int8", "float64", "3", "2"],
        ["n", "3", "int32", "int32", "12"],
    ]
    assert said.splitlines()[-1].endswith("x smaller; read again and compared")
    with xr.open_dataset(source, decode_times=False) as a, xr.open_dataset(out, decode_times=False) as b:
        assert np.nanmax(np.abs(a.t.values.astype(float) - b.t.values)) <= 0.05
        assert np.nanmax(np.abs(a.p.values - b.p.values)) <= 2
        assert np.array_equal(np.isnan(a.t), np.isnan(b.t))
        assert (b.n.identical(a.n), b.time.identical(a.time), b.lat.identical(a.lat), b.attrs) == (
            True,
            True,
            True,
            a.attrs,
        )
        assert "_FillValue" not in b.lat.encoding
        assert b.encoding["unlimited_dims"] == {"time"}
        assert (b.t.encoding["chunksizes"], b.t.encoding["zlib"]) == ((1, 20, 50), True)
        values = b.t.values
    with netCDF4.Dataset(out) as file:
        assert_same_bits(file["t"][:].filled(np.nan), values)

    assert run(capsys, "unpack", out, back)[0] == 0
    with netCDF4.Dataset(back) as file:
        assert file["t"].dtype == "float32"
        assert_same_bits(file["t"][:].filled(np.nan), values)  # netCDF4 masks what is outside valid_range
        np.testing.assert_allclose(file["t"].valid_range, [0, 1000], atol=0.1)
    assert "max abs err" in run(capsys, "info", back)[1]
    again = tmp_path / "again.nc"  # a packed file is packed anew
    for path in (out, back):
        status, said, errors = run(
            capsys, "pack", path, again, "--max-abs-err", "0.5", "--dtype", "int16", "--overwrite"
        )
        assert status == 0
        assert errors.splitlines()[0].startswith(
            "aqt-lite: warning: variable 't' has the attribute max_abs_error=0.05: it was packed before, and is packed "
            "again with max_abs_err=0.5. Errors add up, to 0.55 at most: "
        )
        assert len(errors.splitlines()) == 2  # of t and p
        assert [line.split()[-1] for line in said.splitlines()[1:3]] == ["0.55", "2.5"]
        with netCDF4.Dataset(again) as file:
            np.testing.assert_allclose(file["t"][:].filled(np.nan), values, rtol=0, atol=0.5)
    assert names(tmp_path) == ["again.nc", "back.nc", "in.nc", "out.nc"]


def test_stores_of_zarr(source, tmp_path, capsys):
    out, back = tmp_path / "out.zarr", tmp_path / "back.nc"
    assert run(capsys, "pack", source, out, "--max-abs-err", "t=0.05")[0] == 0
    assert "int16" in run(capsys, "info", out)[1]
    assert run(capsys, "unpack", out, back)[0] == 0
    with xr.open_dataset(back) as found:
        assert np.nanmax(np.abs(found.t.values - X)) <= 0.05
    assert run(capsys, "pack", source, out, "--max-abs-err", "t=0.5", "--overwrite")[0] == 0
    assert names(tmp_path) == ["back.nc", "in.nc", "out.zarr"]


def test_stores_of_zarr_unpack_in_the_type_of_the_fields(source, tmp_path, capsys):
    """JSON has one kind of number, so that xarray decodes all packed variables in float64."""
    out, back = tmp_path / "out.zarr", tmp_path / "back.nc"
    assert run(capsys, "pack", source, out, "--max-abs-err", "t=0.05,p=2")[0] == 0
    with xr.open_dataset(source) as ds:
        ds.t.aqt.to_zarr(tmp_path / "mine.zarr", max_abs_err=0.05, consolidated=False)
        wide = ds.t.load()
    for path in (out, tmp_path / "mine.zarr"):
        assert run(capsys, "unpack", path, back, "--overwrite")[::2] == (0, "")
        with xr.open_zarr(path, consolidated=False) as packed, xr.open_dataset(back) as found:
            assert (packed.t.dtype, found.t.dtype) == ("float64", "float32")
            assert_same_bits(found.t.values.astype("float64"), packed.t.values)
            assert found.get("p", packed.t).dtype == "float64"
            assert found.t.valid_range.dtype == "float32"
            assert "unpacked_dtype" not in found.t.attrs
    assert run(capsys, "unpack", out, tmp_path / "back.zarr")[0] == 0
    assert xr.open_zarr(tmp_path / "back.zarr", consolidated=False).t.dtype == "float32"
    # Codes of 32 bits are decoded in float64, and a step that is no float32 would be rounded: neither is touched.
    wide.aqt.to_zarr(tmp_path / "wide.zarr", max_abs_err=1e-3, dtype="int32", consolidated=False)
    said = {"dtype": "int16", "scale_factor": 0.1, "add_offset": 280.0, "_FillValue": -32768}
    other = wide.drop_attrs().assign_attrs(unpacked_dtype="float32").to_dataset()
    other.to_zarr(tmp_path / "other.zarr", encoding={"t": said}, consolidated=False)
    for name in ("wide.zarr", "other.zarr"):
        assert run(capsys, "unpack", tmp_path / name, back, "--overwrite")[::2] == (0, "")
        with xr.open_zarr(tmp_path / name, consolidated=False) as packed, xr.open_dataset(back) as found:
            assert_same_bits(found.t.values, packed.t.values)


def test_what_describes_the_fields_is_left_as_it_is(tmp_path, capsys):
    """Bounds of cells, a grid mapping without values, times, text, and a variable without elements."""
    ds = xr.Dataset(
        {
            "t": (("time", "lat"), X[:, :, 0], {"grid_mapping": "crs", "cell_methods": "time: mean"}),
            "crs": ((), np.int32(0), {"grid_mapping_name": "latitude_longitude", "semi_major_axis": 6378137.0}),
            "time_bnds": (("time", "nv"), np.asarray([[0.0, 1.1], [1.1, 2.3], [2.3, 3.7]])),
            "lat_bnds": (("lat", "nv"), np.linspace(-90, 90, 80).reshape(40, 2)),
            "start": ("time", np.asarray([0.1, 0.2, 0.3]), {"units": "days since 2000-01-01"}),
            "name": ("time", ["a", "bc", "d"]),
            "none": (("empty",), np.zeros(0, "float32")),
            "n": ("time", np.arange(3, dtype="int32")),
        },
        {
            "time": ("time", [0.5, 1.7, 3.0], {"units": "days since 2000-01-01", "bounds": "time_bnds"}),
            "lat": ("lat", np.linspace(-90, 90, 40), {"bounds": "lat_bnds"}),
            "height": ((), 2.0),
            "zone": ("time", np.arange(3)),
        },
    )
    for name in set(ds.data_vars) - {"t"}:
        ds[name].encoding["coordinates"] = None
    ds["t"].encoding["coordinates"] = "height"
    ds.to_netcdf(tmp_path / "in.nc")
    status, _, errors = run(capsys, "pack", tmp_path / "in.nc", tmp_path / "out.nc", "--max-abs-err", "0.5")
    assert (status, errors) == (0, "")
    with netCDF4.Dataset(tmp_path / "in.nc") as a, netCDF4.Dataset(tmp_path / "out.nc") as b:
        assert set(a.variables) == set(b.variables)
        assert [name for name in b.variables if "coordinates" in b[name].ncattrs()] == ["t"]
        assert b["t"].coordinates == "height"
        assert b.ncattrs() == a.ncattrs() == ["coordinates"]  # of the file: zone, which no variable names
        for name in set(a.variables) - {"t", "none"}:
            assert a[name].dtype == b[name].dtype
            assert np.array_equal(a[name][...], b[name][...])
        assert a["crs"].__dict__ == b["crs"].__dict__
        assert (b["t"].grid_mapping, b["time"].bounds, b["lat"].bounds) == ("crs", "time_bnds", "lat_bnds")
        assert "add_offset" in b["t"].ncattrs()
    assert run(capsys, "unpack", tmp_path / "out.nc", tmp_path / "back.nc")[0] == 0
    with netCDF4.Dataset(tmp_path / "in.nc") as a, netCDF4.Dataset(tmp_path / "back.nc") as b:
        assert set(b["t"].ncattrs()) == {*a["t"].ncattrs(), "max_abs_error"}
        assert np.array_equal(a["time_bnds"][...], b["time_bnds"][...])


@pytest.mark.parametrize("ends", [("in.nc", "out.nc"), ("in.zarr", "out.nc"), ("in.nc", "out.zarr")], ids=str)
def test_what_is_not_packed_is_copied_bit_for_bit(tmp_path, capsys, ends):
    """Integers with a fill value are integers, and floats that are not named keep what stands for missing."""
    few = np.asarray([1.5, -999, np.nan], "f4")
    ds = xr.Dataset(
        {
            "t": ("time", np.asarray([1.5, -999, 3], "f4"), {"missing_value": np.float32(-999)}),
            "p": ("time", few, {"_FillValue": np.float32(-999), "missing_value": np.float32(-999)}),
            "id": ("time", np.asarray([2**60 + 1, -1, 3]), {"_FillValue": np.int64(-1)}),
            "flag": ("time", np.asarray([1, 2, -9], "i2"), {"missing_value": np.int16(-9), "flag_values": [1, 2]}),
            "start": ("time", np.asarray([1, 255, 3], "u1"), {"_FillValue": np.uint8(255), "units": "days since 2000"}),
            "even": ("time", np.asarray([1, -1, 3], "i2"), {"_FillValue": np.int16(-1), "scale_factor": 2}),
        },
        {"time": ("time", [0.5, -5.0, 2.0], {"missing_value": -5.0})},
    )
    source, out, back = tmp_path / ends[0], tmp_path / ends[1], tmp_path / "back.nc"
    of_source = {"engine": "zarr", "consolidated": False} if ends[0].endswith("zarr") else {}
    if of_source:
        ds.to_zarr(source, consolidated=False)
    else:
        ds.to_netcdf(source)
    raw = {"mask_and_scale": False, "decode_times": False}
    for bound, left in (
        ("t=0.1", {"p", "id", "flag", "start", "even", "time"}),
        ("0.1", {"id", "flag", "start", "even", "time"}),
    ):
        status, _, errors = run(capsys, "pack", source, out, "--max-abs-err", bound, "--overwrite")
        assert (status, errors) == (0, "")
        assert run(capsys, "unpack", out, back, "--overwrite")[0] == 0
        for path in (out, back):
            how = {"engine": "zarr", "consolidated": False} if path.suffix == ".zarr" else {}
            with xr.open_dataset(path, **raw, **how) as found, xr.open_dataset(source, **raw, **of_source) as before:
                for name in left:
                    assert_same_bits(found[name].values, ds[name].values)
                    assert found[name].attrs.keys() == before[name].attrs.keys()
            with xr.open_dataset(path, **how) as found:
                np.testing.assert_allclose(found.t.values, [1.5, np.nan, 3], atol=0.1)
    status, _, errors = run(capsys, "pack", source, out, "--max-abs-err", "flag=1", "--overwrite")
    assert (status, "variable 'flag': x has dtype int16" in errors) == (1, True)


def test_what_other_tools_packed_is_packed_anew(tmp_path, capsys):
    """Codes whose sign an attribute tells, and a missing_value without _FillValue, beside float64 attributes."""
    said = {
        "u": ("i1", {"_Unsigned": "true", "scale_factor": np.float32(0.1), "add_offset": np.float32(10)}, np.int8(-1)),
        "n": ("i2", {"scale_factor": 0.001, "add_offset": 290.0, "missing_value": np.int16(-32767)}, None),
    }
    with netCDF4.Dataset(tmp_path / "in.nc", "w") as file:
        file.createDimension("x", 200)
        for name, (kind, attributes, fill) in said.items():
            v = file.createVariable(name, kind, ("x",), fill_value=fill)
            v.set_auto_maskandscale(False)
            v.setncatts(attributes)
            v[:] = np.arange(-100, 100).astype(kind)
            v[3] = attributes.get("missing_value", fill)
    status, _, errors = run(capsys, "pack", tmp_path / "in.nc", tmp_path / "out.nc", "--max-abs-err", "0.01")
    assert (status, errors) == (0, "")
    with netCDF4.Dataset(tmp_path / "in.nc") as a, netCDF4.Dataset(tmp_path / "out.nc") as b:
        assert a["u"][:].max() > 30
        for name in said:
            assert not {"_Unsigned", "missing_value"} & set(b[name].ncattrs())
            x, y = (np.ma.filled(file[name][:].astype("f8"), np.nan) for file in (a, b))
            assert np.isnan(x[3])
            assert np.array_equal(np.isnan(x), np.isnan(y))
            assert (
                np.nanmax(np.abs(x - y)) <= 0.01 + 1e-6
            )  # netCDF4 decodes what others packed with roundings of its own


def test_variables_without_axes(tmp_path, capsys):
    ds = xr.Dataset({"p0": xr.DataArray(np.float32(3.3)), "gap": np.nan, "a": ("x", np.linspace(0, 9, 50, dtype="f4"))})
    ds.to_netcdf(tmp_path / "in.nc")
    for bound, target in (("a=0.05", "some.nc"), ("0.05", "all.nc"), ("0.05", "all.zarr")):
        assert run(capsys, "pack", tmp_path / "in.nc", tmp_path / target, "--max-abs-err", bound)[::2] == (0, "")
        assert run(capsys, "unpack", tmp_path / target, tmp_path / "back.nc", "--overwrite")[::2] == (0, "")
        with xr.open_dataset(tmp_path / "back.nc") as back:
            np.testing.assert_allclose(back.p0, 3.3, rtol=0, atol=0.05)
            assert np.isnan(back.gap)


@pytest.mark.parametrize("version", [2, 3])
def test_stores_of_either_version_are_read(source, tmp_path, capsys, version):
    with xr.open_dataset(source) as ds:
        encoding = {"t": {"chunks": (2, 20, 25)}}
        ds = ds.load().assign_coords(crs=((), 0), label=("time", [7, 8, 9]), level=((), 2.0))
        ds.t.attrs["grid_mapping"] = "crs"
        ds.to_zarr(tmp_path / "in.zarr", zarr_format=version, encoding=encoding, consolidated=False)
    for target in ("out.zarr", "out.nc"):
        status, _, errors = run(capsys, "pack", tmp_path / "in.zarr", tmp_path / target, "--max-abs-err", "t=0.05")
        assert (status, errors) == (0, "")
    with xr.open_zarr(tmp_path / "in.zarr", consolidated=False, decode_coords="all") as found:
        found.aqt.to_zarr(tmp_path / "too.zarr", max_abs_err=0.05, consolidated=False)
    assert run(capsys, "unpack", tmp_path / "out.zarr", tmp_path / "back.zarr")[0] == 0
    for name in ("out.zarr", "too.zarr", "back.zarr"):
        with xr.open_zarr(tmp_path / name, consolidated=False, decode_coords="all") as found:
            assert np.nanmax(np.abs(found.t.values - X)) <= 0.05
            assert set(found.t.coords) == {"time", "lat", "crs", "label", "level"}
            assert found.t.encoding["grid_mapping"] == "crs"


def test_quantized_files_are_unpacked_too(tmp_path, capsys):
    t = xr.DataArray(np.nan_to_num(X, nan=280), dims=("time", "lat", "lon"), name="t", attrs={"units": "K"})
    q = t.aqt.quantize("int4", granularity={"time": 1})
    q.to_netcdf(tmp_path / "q.nc")
    assert "quantized" in run(capsys, "info", tmp_path / "q.nc")[1]
    assert run(capsys, "unpack", tmp_path / "q.nc", tmp_path / "t.nc")[0] == 0
    with xr.open_dataset(tmp_path / "t.nc") as found:
        assert found.t.identical(q.aqt.dequantize().t)


def test_what_is_wrong_is_said_in_a_line_and_nothing_is_written(source, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.nc"
    out.write_text("what was here")
    cases = [
        (["pack", source, out, "--max-abs-err", "1"], "out.nc exists: give another target, or --overwrite"),
        (["pack", source, source, "--max-abs-err", "1", "--overwrite"], "source and target are the same"),
        (["pack", tmp_path / "no.nc", out, "--max-abs-err", "1", "--overwrite"], "no.nc does not exist"),
        (["pack", source, tmp_path / "no" / "out.nc", "--max-abs-err", "1"], "the folder .* does not exist"),
        (["pack", source, out, "--max-abs-err", "x=1", "--overwrite"], "--max-abs-err names 'x'; "),
        (
            ["pack", source, out, "--max-abs-err", "1e-9", "--overwrite"],
            r"variable 't': int32 cannot keep .* the smallest is",
        ),
        (["pack", source, out, "--max-abs-err", "-1", "--overwrite"], "max_abs_err=-1.0: give a positive"),
        (
            ["pack", source, out, "--max-abs-err", "1", "--dtype", "int4", "--overwrite"],
            "dtype='int4' is not known: use one of 'auto', 'int8'",
        ),
        (["info", out], "out.nc is no file of netCDF or store of zarr that can be read: .+"),
    ]
    for arguments, message in cases:
        status, said, errors = run(capsys, *arguments)
        assert (status, said) == (1, "")
        assert errors.startswith("aqt-lite: ")
        assert errors.count("\n") == 1
        assert re.search(message, errors), errors

    def damaged(*_):
        raise ValueError("variable 't': 1 values are further than 1.0 from what is read again")

    monkeypatch.setattr(aqt_lite.xarray, "check_within", damaged)
    status, said, errors = run(capsys, "pack", source, out, "--max-abs-err", "1", "--overwrite")
    assert (status, said) == (1, "")
    assert "from what is read again" in errors
    assert out.read_text() == "what was here"
    assert names(tmp_path) == ["in.nc", "out.nc"]


def test_a_folder_is_replaced_by_a_store_alone_and_never_with_its_source(source, tmp_path, capsys):
    store = tmp_path / "store.zarr"
    assert run(capsys, "pack", source, f"{store}/", "--max-abs-err", "t=0.05")[0] == 0
    assert (store / "zarr.json").is_file()
    inside = source.rename(store / "in.nc")
    (tmp_path / "other.zarr").mkdir()
    (tmp_path / "other.zarr" / "notes.txt").write_text("notes")
    for target, message in (
        (f"{tmp_path}/", "is a folder, and a file is to be written"),
        (store, "which is read, lies in .*, which would be replaced"),
        (tmp_path / "other.zarr", "is no store of zarr, and is not replaced"),
    ):
        for command in (["pack", inside, target, "--max-abs-err", "1"], ["unpack", inside, target]):
            status, _, errors = run(capsys, *command, "--overwrite")
            assert status == 1
            assert re.search(message, errors), errors
    assert names(tmp_path) == ["other.zarr", "store.zarr"]
    assert inside.is_file()
    assert names(tmp_path / "other.zarr") == ["notes.txt"]


@pytest.mark.filterwarnings("always::aqt_lite.xarray.RepackedWarning")
def test_a_file_that_is_packed_again_is_held_against_the_new_bound_alone(source, tmp_path, capsys, monkeypatch):
    assert run(capsys, "pack", source, tmp_path / "a.nc", "--max-abs-err", "t=0.5")[0] == 0
    seen = []
    monkeypatch.setattr(aqt_lite.xarray, "check_within", lambda x, y, bound, progress: seen.append(bound))
    assert run(capsys, "pack", tmp_path / "a.nc", tmp_path / "b.nc", "--max-abs-err", "t=0.05")[0] == 0
    assert seen == [0.05]


def test_a_written_file_that_differs_is_noticed(source, tmp_path):
    with xr.open_dataset(source) as ds:
        aqt_lite.xarray.to_netcdf(ds, tmp_path / "out.nc", max_abs_err={"t": 0.05})
        with xr.open_dataset(tmp_path / "out.nc") as again:
            aqt_lite.xarray.check_within(ds.t, again.t, 0.05)
            with pytest.raises(ValueError, match=r"variable 't': \d+ values of 6000 are further than 0.04 from"):
                aqt_lite.xarray.check_within(ds.t, again.t, 0.04)
            lost = again.t.copy(deep=True)
            lost[1, 2, 3] = np.nan
            with pytest.raises(ValueError, match=r"1 values of 6000 .* the first at index \(1, 2, 3\): .* becomes nan"):
                aqt_lite.xarray.check_within(ds.t, lost, 0.05)
            with pytest.raises(ValueError, match="is read again as"):
                aqt_lite.xarray.check_within(ds.t, again.t[1:], 0.05)


@pytest.mark.parametrize("how", ["--max-abs-err", "--keepbits"])
@pytest.mark.parametrize("suffix", ["nc", "zarr"])
def test_a_packed_file_is_verified(how, suffix, source, tmp_path, capsys):
    out = tmp_path / f"out.{suffix}"
    run(capsys, "pack", source, out, how, "t=1,p=8" if how == "--max-abs-err" else "t=3,p=8")
    status, said, errors = run(capsys, "verify", source, out)
    assert (status, errors) == (0, "")
    assert said.endswith(f"{out} holds {source}: 2 variables as stated, all others exactly\n")
    with netCDF4.Dataset(source, "a") as file:
        file["t"][1, 2, 3] += 100
    status, said, errors = run(capsys, "verify", source, out)
    assert (status, said) == (1, "")
    assert "variable 't': 1 values of 6000 are further than" in errors
    assert "(1, 2, 3)" in errors


def test_what_cannot_be_verified_is_said(source, tmp_path, capsys):
    q, out, other = tmp_path / "q.nc", tmp_path / "out.nc", tmp_path / "other.nc"
    aqt_lite.xarray.quantize(xr.DataArray(X, name="t"), missing="nan").to_netcdf(q)
    run(capsys, "pack", source, out, "--max-abs-err", "p=1")
    xr.Dataset({"n": ("x", [1, 2])}).to_netcdf(other)
    with netCDF4.Dataset(out, "a") as file:
        file["n"][0] = 7
    for a, b, said in [
        (source, source, "states no bound (max_abs_error) and no bits kept (quantization_nsb)"),
        (source, q, "variable 't' is quantized, and states no bound: compare with error_report"),
        (other, out, "other.nc has no variable 'p', of which"),
        (source, out, "variable 'n' is not read again as it was written"),
        (source, tmp_path / "none.nc", "none.nc does not exist"),
    ]:
        status, printed, errors = run(capsys, "verify", a, b)
        assert (status, printed) == (1, "")
        assert said in errors


def with_groups(path, composed=True):
    """A file as models write them: dimensions and axes in the root, fields, text and other types in groups."""
    rng = np.random.default_rng(1)
    with netCDF4.Dataset(path, "w") as file:
        for name, length in (("time", None), ("lat", 6), ("nv", 2), ("nobody", 7)):
            file.createDimension(name, length)
        file.setncatts({"title": "tree", "n": np.int16(3), "authors": ["a", "bé"]})
        sky = file.createEnumType("u1", "sky", {"clear": 0, "cloudy": 1, "none": 255})
        pair = np.dtype([("re", "f4"), ("im", "f4")])
        kinds = (file.createCompoundType(pair, "pair"), file.createVLType("f4", "ragged")) if composed else ()
        time = file.createVariable("time", "f8", ("time",))
        time.setncatts({"units": "days since 2000-01-01", "bounds": "time_bnds"})
        file.createVariable("time_bnds", "f8", ("time", "nv"))[:] = rng.random((3, 2))
        time[:] = np.arange(3)
        model = file.createGroup("model")
        model.source = "a"
        t = model.createVariable("t", "f4", ("time", "lat"), fill_value=1e20, zlib=True, chunksizes=(1, 6))
        t.setncatts(
            {"units": "K", "coordinates": "time lon", "cell_measures": "area: elsewhere", "bounds": "time_bnds"}
        )
        t[:] = np.where(rng.random((3, 6)) < 0.2, 1e20, 280 + rng.standard_normal((3, 6)))
        model.createVariable("sky", sky, ("lat",), fill_value=255)[:] = np.asarray([0, 1, 0, 255, 1, 0], "u1")
        if composed:  # of which zarr has none, and no stable type of text
            model.createVariable("name", str, ("lat",))[:] = np.asarray(list("abcdeé"), object)
            model.createVariable("z", kinds[0], ("lat",))[:] = np.ones(6, pair)
            ragged = model.createVariable("r", kinds[1], ("lat",))
            for i in range(6):
                ragged[i] = np.arange(i % 3, dtype="f4")
        run_of = model.createGroup("run")
        run_of.createDimension("lat", 4)  # another one of this name
        run_of.createVariable("t", "f8", ("time", "lat"))[:] = rng.standard_normal((3, 4))
        packed = run_of.createVariable("p", "i2", ("lat",), fill_value=np.int16(-9))
        packed.setncatts({"scale_factor": 0.01, "add_offset": 5.0})
        packed.set_auto_maskandscale(False)
        packed[:] = [1, -9, 300, 4]
        file.createGroup("empty").createGroup("deep").note = "nothing"


def held(group):
    """All that is in a group, but for what a packed variable says of codes."""
    group.set_auto_maskandscale(False)
    attributes = {name: np.asarray(group.getncattr(name)).tolist() for name in group.ncattrs()}
    dims = {name: (len(dim), dim.isunlimited()) for name, dim in group.dimensions.items()}
    variables = {
        name: (v.dtype, v.dimensions, {key: np.asarray(v.getncattr(key)).tolist() for key in v.ncattrs()}, v[...])
        for name, v in group.variables.items()
    }
    return attributes, dims, variables, {name: held(inner) for name, inner in group.groups.items()}


def in_groups(tree, path=""):
    yield path, tree
    for name, inner in tree[3].items():
        yield from in_groups(inner, f"{path}{name}/")


OF_CODES = {"_FillValue", "scale_factor", "add_offset", "max_abs_error", "quantization", "quantization_nsb"}


@pytest.mark.parametrize(
    ("how", "changed"),
    [
        (["--max-abs-err", "0.05"], {"model/t", "model/run/t", "model/run/p"}),
        pytest.param(["--max-abs-err", "model/t=0.05,p=0.1"], {"model/t", "model/run/p"}, marks=pytest.mark.exhaustive),
        (["--keepbits", "t=5"], {"model/t", "model/run/t"}),
    ],
    ids=["a bound", "bounds by name", "bits"],
)
def test_nothing_in_groups_is_lost(how, changed, tmp_path, capsys):
    source, out, back = (tmp_path / name for name in ("in.nc", "out.nc", "back.nc"))
    with_groups(source)
    assert run(capsys, "pack", source, out, *how)[::2] == (0, "")
    status, said, errors = run(capsys, "verify", source, out)
    assert (status, errors) == (0, "")
    assert f"holds {source}: {len(changed)} variables as stated" in said
    assert "\nmodel/z  " in run(capsys, "info", out)[1]
    assert run(capsys, "unpack", out, back)[::2] == (0, "")
    with netCDF4.Dataset(source) as a, netCDF4.Dataset(out) as b, netCDF4.Dataset(back) as c:
        before = dict(in_groups(held(a)))
        for file, others in ((b, changed), (c, changed | {"model/run/p"})):
            after = dict(in_groups(held(file)))
            assert before.keys() == after.keys()
            for group, (attributes, dims, variables, _) in before.items():
                assert after[group][:2] == (attributes, dims)
                assert after[group][2].keys() - {"quantization_bitround"} == variables.keys()
                for name, (dtype, on, said_of, values) in variables.items():
                    there = after[group][2][name]
                    assert there[1] == on
                    if group + name in others:
                        assert there[2].keys() - OF_CODES == said_of.keys() - OF_CODES
                        assert all(there[2][key] == said_of[key] for key in said_of.keys() - OF_CODES)
                    else:
                        assert (there[0], there[2]) == (dtype, said_of)
                        for x, y in zip(np.ravel(values), np.ravel(there[3]), strict=True):
                            np.testing.assert_array_equal(x, y)
    for group in ("/model", "/model/run"):
        with xr.open_dataset(source, group=group) as x, xr.open_dataset(out, group=group) as y:
            if how[0] == "--max-abs-err":
                assert float(abs(x.t - y.t).max()) <= 0.05 + 1e-9
                assert (np.isnan(x.t) == np.isnan(y.t)).all()


def test_a_group_that_is_damaged_is_noticed_and_named(tmp_path, capsys):
    source, out = tmp_path / "in.nc", tmp_path / "out.nc"
    with_groups(source)
    run(capsys, "pack", source, out, "--max-abs-err", "t=0.05")
    for name, said in (("t", "group /model/run: variable 't': 1 values of 12 are further than"), ("z", "variable 'z'")):
        with netCDF4.Dataset(source, "a") as file:
            if name == "t":
                file["model/run/t"][1, 2] += 1
            else:
                file["model/run/t"][1, 2] -= 1
                file["model/z"][2] = (2, 2)
        status, _, errors = run(capsys, "verify", source, out)
        assert status == 1
        assert said in errors
    for how, said in (
        ("q=1", "--max-abs-err names 'q'; .* has the variables model/t, "),
        ("/t=1", "--max-abs-err names '/t'; "),
        ("sky=1", "group /model: variable 'sky': x has dtype uint8"),
        ("1e-12", "group /model: variable 't': "),
    ):
        status, _, errors = run(capsys, "pack", source, tmp_path / "no.nc", "--max-abs-err", how)
        assert status == 1
        assert re.search(said, errors)
    status, _, errors = run(capsys, "pack", source, tmp_path / "no.zarr", "--max-abs-err", "1")
    assert (status, "variable 'model/z' has elements of several numbers" in errors) == (1, True)
    assert names(tmp_path) == ["in.nc", "out.nc"]


def test_groups_go_to_zarr_and_back(tmp_path, capsys):
    source, store, back = tmp_path / "in.nc", tmp_path / "out.zarr", tmp_path / "back.nc"
    with_groups(source, composed=False)
    assert run(capsys, "pack", source, store, "--max-abs-err", "0.05")[0] == 0
    assert run(capsys, "verify", source, store)[::2] == (0, "")
    assert run(capsys, "unpack", store, back)[0] == 0
    for group, name in (("model", "t"), ("model/run", "t"), ("model/run", "p")):
        with xr.open_dataset(source, group=group) as x, xr.open_dataset(back, group=group) as y:
            assert float(abs(x[name] - y[name]).max()) <= 0.05 + 1e-9
            assert x[name].attrs.items() <= y[name].attrs.items()
    with xr.open_dataset(back, group="empty/deep") as found:
        assert found.attrs["note"] == "nothing"


def test_progress_is_shown_on_a_terminal_only(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    _, _, errors = run(capsys, "pack", source, tmp_path / "out.nc", "--max-abs-err", "1")
    assert "checking t: 100%\n" in errors
    assert "choosing: 100%\n" in errors
    _, _, errors = run(capsys, "pack", source, tmp_path / "out.nc", "--max-rel-err", "1e-3", "--overwrite")
    assert "choosing: 100%\n" in errors


def test_the_command_needs_nothing_for_help_and_says_what_is_missing(tmp_path, capsys):
    for arguments, status, said in (
        (["--help"], 0, "aqt-lite pack in.nc out.nc --max-abs-err 0.05"),
        (["--version"], 0, aqt_lite.__version__),
        (["pack", "a", "b", "--max-abs-err", "t"], 2, "'t' is neither a number nor NAME=NUMBER"),
        (["pack", "a", "b", "--max-abs-err", "t=1,t=2"], 2, "must name each variable once"),
        ([], 2, "required: command"),
    ):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert left.value.code == status
        assert said in "".join(capsys.readouterr())
    (tmp_path / "x.nc").touch()
    hidden = "import sys; sys.modules['xarray'] = None; sys.modules['dask'] = None\nfrom aqt_lite.cli import main\n"
    for code, status, said in (
        ("sys.exit(main(['info', 'x.nc']))", 1, "pip install 'aqt_lite[science]'"),
        ("main(['--help'])", 0, "unpack"),
    ):
        command = [sys.executable, "-c", hidden + code]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == status
        assert said in done.stdout + done.stderr
