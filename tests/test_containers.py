"""Trees in containers that others write: HDF5, npz, Arrow. Every bit comes back."""

from __future__ import annotations

import json

import h5py
import ml_dtypes
import numpy as np
import pytest

from aqt_lite import PerBlock, PerChannel, PerGroup, QArray, quantize
from aqt_lite.files import from_arrays, to_arrays
from aqt_lite.testing import assert_same_bits

X = np.random.default_rng(0).standard_normal((6, 64)).astype("float32")
TREE = {
    "q": [
        quantize(X, "int8", granularity=PerChannel(0)),
        quantize(X, "uint4", scheme="affine", granularity=PerGroup(16)),
        quantize(X, "int3", granularity=PerBlock((2, -1)), scale_dtype="bfloat16"),
        quantize(X, "mxfp4"),
        quantize(X, "nvfp4"),
        quantize(X, "float8_e4m3fn", offset="data", scheme="affine"),
    ],
    "x": X.astype(ml_dtypes.bfloat16),
    "mask": X > 0,
    "empty": np.zeros((0, 3)),
    "scalar": np.float64(3.5),
    "said": ("a", None, 7, float("inf")),
}


def check_same(found):
    for a, b in zip(found["q"], TREE["q"], strict=True):
        assert_same_bits(a, b)
    for name in ("x", "mask", "empty", "scalar"):
        assert_same_bits(np.asarray(found[name]), np.asarray(TREE[name]))
    assert found["said"] == TREE["said"]


@pytest.mark.parametrize("options", [{}, {"compression": "gzip", "shuffle": True}], ids=str)
def test_hdf5(tmp_path, options):
    arrays, document = to_arrays(TREE)
    with h5py.File(tmp_path / "tree.h5", "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array, **(options if array.ndim and array.size else {}))
        file.attrs["aqt_lite"] = document
    with h5py.File(tmp_path / "tree.h5") as file:
        check_same(from_arrays({name: data[...] for name, data in file.items()}, file.attrs["aqt_lite"]))


def test_npz_of_numpy(tmp_path):
    arrays, document = to_arrays(TREE)
    assert all(not hasattr(ml_dtypes, array.dtype.name) for array in arrays.values())
    np.savez(tmp_path / "tree.npz", document=document, **arrays)
    with np.load(tmp_path / "tree.npz") as file:
        check_same(from_arrays({name: file[name] for name in file if name != "document"}, str(file["document"])))


def test_arrow_and_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow takes 170 MB, too much for the development set-up")
    from pyarrow import parquet

    rows = quantize(X, granularity=PerChannel(0))
    codes = pa.FixedSizeListArray.from_arrays(pa.array(rows.qvalue.ravel()), rows.shape[1])
    parquet.write_table(pa.table({"codes": codes, "scale": rows.scale.ravel()}), tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    codes = table["codes"].combine_chunks().flatten().to_numpy().reshape(-1, rows.shape[1])
    again = QArray.from_codes(codes, table["scale"].to_numpy(), granularity=PerChannel(0))
    assert_same_bits(again, rows)

    arrays, document = to_arrays(TREE)  # a tree: an array a row, as bytes
    table = pa.table(
        {
            "name": list(arrays),
            "dtype": [array.dtype.name for array in arrays.values()],
            "shape": [list(array.shape) for array in arrays.values()],
            "data": [array.tobytes() for array in arrays.values()],
        }
    ).replace_schema_metadata({"aqt_lite": document})
    parquet.write_table(table, tmp_path / "tree.parquet")
    table = parquet.read_table(tmp_path / "tree.parquet")
    found = {r["name"]: np.frombuffer(r["data"], r["dtype"]).reshape(r["shape"]) for r in table.to_pylist()}
    check_same(from_arrays(found, table.schema.metadata[b"aqt_lite"].decode()))


def test_what_does_not_fit_is_told():
    arrays, document = to_arrays({"w": TREE["q"][0]})
    with pytest.raises(ValueError, match=r"array 'w\.scale' is not in the file"):
        from_arrays({"w.storage": arrays["w.storage"]}, document)
    with pytest.raises(ValueError, match="array 'more' is in the file, but has no place"):
        from_arrays({**arrays, "more": X}, document)
    with pytest.raises(ValueError, match="cannot put the tree together: leaf 'w': scale"):
        from_arrays({**arrays, "w.scale": 0 * arrays["w.scale"]}, document)
    with pytest.raises(ValueError, match="leaf 'w'"):
        from_arrays({**arrays, "w.scale": arrays["w.scale"][:2]}, document)
    with pytest.raises(ValueError, match="upgrade it"):
        from_arrays(arrays, json.dumps({**json.loads(document), "version": 9}))
    with pytest.raises(TypeError, match="cannot take the tree apart: leaf 'z': it has dtype complex128"):
        to_arrays({"z": np.zeros(3, complex)})
