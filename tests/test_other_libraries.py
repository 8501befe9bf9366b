"""Libraries without an adapter of their own: Dask, MLX and ndonnx through the generic one, others refused by name."""

from __future__ import annotations

import warnings
from itertools import islice

import array_api_compat.torch
import array_api_strict
import dask
import dask.array as da
import ml_dtypes
import numpy as np
import pytest
import torch

import aqt_lite
from aqt_lite import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QArray,
    choose_qparams,
    error_report,
    fake_quantize,
    linear,
    plots,
    quantize,
)
from aqt_lite import testing as conformance
from aqt_lite._generic import GenericBackend
from aqt_lite._registry import backend_of
from aqt_lite.ops import reference
from aqt_lite.testing import assert_same_bits, check_backend

GRANULARITIES = (
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerGroup(4),
    PerGroup(5),
    PerBlock((2, 4)),
    PerBlock((4, -1)),
)
X = np.random.default_rng(0).standard_normal((6, 8)).astype("float32")


@pytest.fixture(autouse=True)
def _in_this_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


# ---- Dask


@pytest.mark.exhaustive  # a minute; README says so
def test_dask_passes_the_conformance_suite():
    b = backend_of(da.zeros(1))
    with np.errstate(all="ignore"):  # what a task warns of is Dask's to decide
        assert check_backend(b).passed
    assert (type(b).__mro__[1], b.name) == (GenericBackend, "dask")


@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_chunks_change_no_bit(granularity, scheme):
    how = {"granularity": granularity, "scheme": scheme}
    for chunks in (3, (4, 3), -1):
        x, here = da.from_array(X, chunks=chunks), quantize(X, **how)
        q = quantize(x, **how)
        assert all(isinstance(leaf, da.Array) for leaf in q._leaves() if leaf is not None)
        assert_same_bits(q, here)
        assert_same_bits(q.to_backend("numpy"), here)
        assert_same_bits(q.dequantize(), here.dequantize())
        assert_same_bits(fake_quantize(x, **how), here.dequantize())
        assert error_report(x, q) == error_report(X, here)


@pytest.mark.parametrize("float_dtype", ["float16", ml_dtypes.bfloat16, "float64", ">f4", ">f8"])
def test_every_float_type_of_numpy(float_dtype):
    x = X.astype(float_dtype)
    q, here = quantize(da.from_array(x, chunks=3), granularity=PerGroup(4)), quantize(x, granularity=PerGroup(4))
    assert_same_bits(q, here)
    assert_same_bits(q.dequantize(), here.dequantize())


class Counted:
    """A Dask array of six chunks that counts how many of them have been made."""

    def __init__(self):
        self.count = 0
        self.array = da.map_blocks(
            self._chunk, chunks=((4, 4, 4), (8, 8)), dtype="float32", meta=np.empty((0, 0), "f4")
        )

    def _chunk(self, block_info=None):
        self.count += 1
        where = block_info[None]["array-location"]
        return np.arange(32, dtype="float32").reshape(4, 8) - 3 * where[0][0] - where[1][0]


@pytest.mark.exhaustive_where(granularity=PerChannel(0))
@pytest.mark.exhaustive_where(granularity=PerChannel(1))
@pytest.mark.parametrize(
    ("granularity", "needed"), [(PerTensor(), 6), (PerChannel(0), 2), (PerChannel(1), 3), (PerGroup(4), 1)], ids=str
)
def test_nothing_is_computed_before_values_are_asked_for(granularity, needed):
    x = Counted()
    q = quantize(x.array, granularity=granularity)
    q.dequantize(), q.dequantize("float16"), fake_quantize(x.array, granularity=granularity)
    quantize(x.array, granularity=granularity, scale=choose_qparams(x.array, granularity=granularity)[0])
    QArray.from_codes(q.qvalue, q.scale, granularity=granularity)
    linear(x.array, q), linear(x.array, q, mode="reproducible"), linear(q, q)
    shown = repr(q)
    assert x.count == 0
    assert shown == f"QArray(int8, shape=(12, 16), {granularity}, of float32, dask, deferred)"
    q.qvalue[:4, :8].compute()
    assert x.count == needed  # a chunk of codes needs the chunks that share its scales
    x.count = 0
    q.to_backend("numpy")
    assert x.count == 6  # codes, scales and zero points in one go


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_raise_when_their_chunk_is_computed(bad):
    x = X.copy()
    x[4, 5] = bad
    there = da.from_array(x, chunks=(3, 4))
    message = r"x has 1 non-finite values of 12 in the chunk at \(3, 4\), the first at index \(4, 5\): mend them"
    for how in ({}, {"scheme": "affine"}, {"granularity": PerGroup(4)}, {"scale": 0.5}):
        q = quantize(there, **how)
        for compute in (q.qvalue.compute, q.dequantize().compute, lambda q=q: q.to_backend("numpy")):
            with pytest.raises(ValueError, match=message):
                compute()
        with pytest.raises(ValueError, match=message):
            fake_quantize(there, **how).compute()
    scale, _ = choose_qparams(there)
    with pytest.raises(ValueError, match=message):
        scale.compute()
    q = quantize(there, granularity=PerGroup(4))
    assert_same_bits(q[:3], quantize(x[:3], granularity=PerGroup(4)))  # the other chunks are fine
    assert_same_bits(quantize(there, nonfinite="ignore"), quantize(x, nonfinite="ignore"))


def test_given_scales_are_checked_when_they_are_computed():
    x, scale = da.from_array(X, chunks=3), da.from_array(np.asarray([[0.0]], "float32"))
    q = quantize(x, scale=scale)
    with pytest.raises(ValueError, match=r"scale=0.0: every scale must be positive and finite"):
        q.qvalue.compute()
    assert_same_bits(quantize(x, scale=scale + 0.25), quantize(X, scale=0.25))
    q = quantize(x, scale=scale + 0.25, zero_point=da.asarray(np.asarray(200)))
    with pytest.raises(ValueError, match=r"zero_point=200: must be a code of int8"):
        q.qvalue.compute()
    with pytest.raises(TypeError, match="zero_point has dtype float32: it must convert to int32"):
        quantize(x, scale=0.25, zero_point=scale)
    codes = quantize(x).qvalue
    with pytest.raises(ValueError, match=r"scale=0.0: every scale must be finite and not 0"):
        QArray.from_codes(codes, scale).dequantize().compute()


def test_overflow_raises_when_it_is_computed():
    x = da.from_array(X, chunks=3)
    message = "float16 cannot hold every result"
    with np.errstate(all="ignore"):
        with pytest.raises(ValueError, match=message):
            quantize(x * 1e6).dequantize("float16").compute()
        with pytest.raises(ValueError, match=message):
            linear((x * 1e4).astype("float16"), quantize(x * 100)).compute()


@pytest.mark.parametrize("mode", ["fast", "reproducible"])
def test_products(mode):
    w = np.random.default_rng(1).standard_normal((5, 8)).astype("float32")
    x, bias = da.from_array(X, chunks=(4, 3)), da.from_array(w[:, 0], chunks=2)
    for granularity in (PerTensor(), PerChannel(0), PerGroup(4)):
        q, here = quantize(da.from_array(w, chunks=3), granularity=granularity), quantize(w, granularity=granularity)
        y, wanted = linear(x, q, bias, mode=mode), linear(X, here, w[:, 0], mode=mode)
        assert isinstance(y, da.Array)
        if mode == "reproducible":
            assert_same_bits(y, wanted)
        else:  # sums of floats
            np.testing.assert_allclose(y.compute(), wanted, rtol=1e-5, atol=1e-6)


def test_unknown_chunk_sizes_are_named():
    x = da.from_array(X, chunks=3)
    positive = x[x[:, 0] > 0]
    for call in (quantize, choose_qparams, fake_quantize, lambda v: linear(v, quantize(x)), plots.plot_matrix):
        with pytest.raises(TypeError, match=r"x has chunks of unknown size .*: call x.compute_chunk_sizes\(\) first"):
            call(positive)
    positive.compute_chunk_sizes()
    assert_same_bits(quantize(positive), quantize(X[X[:, 0] > 0]))


def test_chunks_that_are_not_plain_arrays():
    with pytest.raises(TypeError, match="x has masked chunks, and codes have no mask: fill them first"):
        quantize(da.from_array(np.ma.masked_greater(X, 0), chunks=3))
    meta = stand_in("sparse._coo.core", "COO", shape=(0, 0), dtype=np.dtype("float32"), ndim=2)
    x = da.from_array(X, chunks=3)
    x._meta = meta
    with pytest.raises(TypeError, match=r"x has chunks of another library \(a chunk is of type sparse.COO, which is"):
        quantize(x)


# ---- MLX, ndonnx


@pytest.fixture(scope="module")
def mx():
    return pytest.importorskip("mlx.core", reason="MLX has wheels for recent Linux on x86-64 and for macOS only")


def test_mlx_passes_the_conformance_suite(mx):
    assert check_backend(backend_of(mx.zeros(1))).passed
    q = quantize(mx.array(X), granularity=PerGroup(4))
    assert isinstance(q.storage, mx.array)
    assert_same_bits(q, quantize(X, granularity=PerGroup(4)))


def test_mlx_gradients_go_straight_through(mx):
    x, weight = mx.array(np.asarray([0.26, 1.0, -90.0, 0.3], "float32")), mx.array([1.0, 2.0, 3.0, 4.0])

    def loss(x, **how):
        return (fake_quantize(x, **how) * weight).sum()

    assert mx.grad(lambda x: loss(x, scale=0.5))(x).tolist() == [1.0, 2.0, 0.0, 4.0]  # the third is clipped
    assert mx.grad(loss)(x).tolist() == [1.0, 2.0, 3.0, 4.0]  # nothing flows into the scale
    assert_same_bits(mx.compile(lambda x: quantize(x).qvalue)(x), quantize(np.asarray(x)).qvalue)


@pytest.fixture(scope="module")
def ndonnx():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        pytest.importorskip("onnxruntime", reason="without onnxruntime, ndonnx loses values on the way")
        return pytest.importorskip("ndonnx", reason="ndonnx needs onnx, which has no wheel for every interpreter")


@pytest.mark.exhaustive_where(check="reproducible products")  # seconds each
@pytest.mark.exhaustive_where(check="non-finite values")
@pytest.mark.exhaustive_where(check="integer_matmul")
@pytest.mark.exhaustive_where(check="formats")
@pytest.mark.exhaustive_where(check="quantize and dequantize")
@pytest.mark.parametrize("check", conformance._CHECKS)
def test_ndonnx_conforms(ndonnx, check):
    """The first comparisons of each check, in float32: every operation starts a runtime, and all take minutes."""
    b = backend_of(ndonnx.asarray(X))
    compared, most = 0, 2 if check == "reproducible products" else 6
    for actual, expected in islice(conformance._CHECKS[check](b, ("float32",)), most):
        assert_same_bits(actual, expected)
        compared += 1
    assert compared >= 2


def test_ndonnx_graphs_keep_the_contract(ndonnx):
    """An input of a graph has no values: what is built from it is an ONNX model with the bits of the contract."""
    from onnxruntime import InferenceSession

    x = ndonnx.argument(shape=X.shape, dtype=ndonnx.float32)
    how = {"scheme": "affine", "granularity": PerGroup(5)}
    q, here = quantize(x, **how), quantize(X, **how)
    assert repr(q) == "QArray(int8, shape=(6, 8), PerGroup(size=5, axis=-1), of float32, ndonnx, traced)"
    outputs = {"codes": q.qvalue, "scale": q.scale, "zero_point": q.zero_point, "values": q.dequantize()}
    model = InferenceSession(ndonnx.build({"x": x}, outputs).SerializeToString())
    wanted = (here.qvalue, here.scale, here.zero_point, here.dequantize())
    for actual, expected in zip(model.run(None, {"x": X}), wanted, strict=True):
        assert_same_bits(actual, expected)
    with pytest.raises(TypeError, match="inside a traced function"):
        q.to_backend("numpy")
    with pytest.raises(TypeError, match="error_report needs values"):
        error_report(x, q)
    with pytest.raises(TypeError, match=r"x has shape \(None, 8\): the length of every axis must be known"):
        quantize(ndonnx.argument(shape=("N", 8), dtype=ndonnx.float32))


# ---- what a library may lack


class Without:
    """A namespace with some names taken away."""

    def __init__(self, xp, *names):
        self._xp, self._names = xp, names

    def __getattr__(self, name):
        if name in self._names:
            raise AttributeError(name)
        return getattr(self._xp, name)


def test_a_library_without_float64():
    b = GenericBackend(Without(array_api_strict, "float64"))
    with pytest.raises(ValueError, match="array_api_strict has no dtype float64"):
        b.asarray(np.zeros(2))
    rng = np.random.default_rng(0)
    for width in (1, 512, 513, 5000):
        x = rng.integers(-128, 128, (3, width)).astype("int8")
        w = rng.integers(-255, 256, (4, width)).astype("int16")
        x[0], w[0] = -128, -255  # the largest sums
        exact = (x.astype("int64") @ w.T.astype("int64")).astype("int32")
        x, w = array_api_strict.asarray(x), array_api_strict.asarray(w)
        assert_same_bits(reference.integer_matmul(x, w, b=b), exact)


def test_a_library_without_devices():
    class OfOneMemory:
        shape, dtype = (2,), np.dtype("float32")

    b = GenericBackend(array_api_strict)
    assert b.device(OfOneMemory()) is None
    assert b.asarray(np.ones(2, "float32"), like=OfOneMemory()).shape == (2,)


def test_arrays_stay_on_their_device():
    b = GenericBackend(array_api_strict)
    device = array_api_strict.Device("device1")
    x = b.asarray(np.ones(3, "float32"), like=array_api_strict.zeros(1, device=device))
    assert x.device == device
    assert b.to_numpy(x).tolist() == [1.0, 1.0, 1.0]


def test_a_library_that_numpy_does_not_know():
    """np.asarray makes an object array of it; DLPack has the values."""

    class Opaque:
        dtype = np.dtype("float32")

        def __dlpack__(self, **how):
            return X.__dlpack__(**how)

        def __dlpack_device__(self):
            return X.__dlpack_device__()

    assert np.asarray(Opaque()).dtype == object
    assert_same_bits(GenericBackend(array_api_strict).to_numpy(Opaque()), X)


def test_bfloat16_that_no_exchange_format_knows():
    b = GenericBackend(array_api_compat.torch)
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits[(bits & 0x7FFF) <= 0x7F80].view(ml_dtypes.bfloat16)  # all but NaN
    x = b.asarray(values)
    assert (x.dtype, b.dtype_name(x)) == (torch.bfloat16, "bfloat16")
    assert_same_bits(b.to_numpy(x), values)


# ---- refused by name


def stand_in(module, name, base=object, **attributes):
    """An object whose type says that it is of that library."""
    cls = type(name, (base,), {"__module__": module, **attributes})
    return np.ones(3, "float32").view(cls) if base is np.ndarray else cls()


def namespaced(self, api_version=None):
    return array_api_strict


REFUSED = {
    "astropy": (stand_in("astropy.units.quantity", "Quantity", np.ndarray), "lost: pass x.value"),
    "awkward": (stand_in("awkward.highlevel", "Array"), r"which may be ragged: pass awkward.to_numpy\(x\)"),
    "blosc2": (
        stand_in("blosc2.ndarray", "NDArray", __array_namespace__=namespaced),
        r"which is compressed: pass x\[...\]",
    ),
    "cupyx": (stand_in("cupyx.scipy.sparse._csr", "csr_matrix"), r"which is sparse, .*: pass x.toarray\(\)"),
    "dask dataframe": (stand_in("dask.dataframe.core", "Series"), r"labels .*: pass x.to_dask_array\(lengths=True\)"),
    "h5py": (stand_in("h5py._hl.dataset", "Dataset"), r"which is read from storage .*: pass x\[...\]"),
    "paddle": (stand_in("paddle", "Tensor"), r"which does not follow the Array API .*: pass x.numpy\(\)"),
    "pandas": (stand_in("pandas.core.frame", "DataFrame"), r"and its labels would be lost: pass x.to_numpy\(\)"),
    "pint": (
        stand_in("pint", "Quantity", __array_namespace__=namespaced),
        "and its unit would be lost: pass x.magnitude",
    ),
    "polars": (stand_in("polars.series.series", "Series"), r"pass x.to_numpy\(\)"),
    "pyarrow": (stand_in("pyarrow.lib", "FloatArray"), r"pass np.asarray\(x\)"),
    "scipy": (stand_in("scipy.sparse._csr", "csr_array"), r"which is sparse, .*: pass x.toarray\(\)"),
    "sparse": (
        stand_in("sparse.numba_backend._coo.core", "COO", __array_namespace__=namespaced),
        r"pass x.todense\(\)",
    ),
    "tensorflow": (stand_in("tensorflow.python.framework.ops", "EagerTensor"), r"pass x.numpy\(\)"),
    "unyt": (stand_in("unyt.array", "unyt_array", np.ndarray), "and its unit would be lost: pass x.value"),
    "xarray": (stand_in("xarray.core.dataarray", "DataArray"), r"labels .*: pass x.values \(or x.data, to keep"),
    "zarr": (stand_in("zarr.core.array", "Array"), r"which is read from storage .*: pass x\[...\]"),
}


@pytest.mark.parametrize("library", REFUSED)
def test_refused_by_name(library):
    x, way = REFUSED[library]
    message = rf"x is of type {library.partition(' ')[0]}\.{type(x).__name__}, .*{way}"
    w = quantize(np.ones((2, 3), "float32"))
    calls = (quantize, choose_qparams, fake_quantize, lambda v: error_report(v, w), lambda v: linear(v, w))
    for call in (*calls, plots.plot_matrix):
        with pytest.raises(TypeError, match=message):
            call(x)


def test_refused_by_name_wherever_arrays_are_taken():
    x, codes = np.ones(3, "float32"), np.ones(3, "int8")
    quantity = REFUSED["astropy"][0]
    with pytest.raises(
        TypeError, match=r"scale is of type astropy\.Quantity, and its unit would be lost: pass scale\.value"
    ):
        quantize(x, scale=quantity)
    with pytest.raises(TypeError, match=r"qvalue is of type astropy\.Quantity"):
        QArray.from_codes(quantity, np.ones((1,), "float32"))
    with pytest.raises(TypeError, match=r"bias is of type astropy\.Quantity"):
        linear(x, quantize(np.ones((3, 3), "float32")), quantity)
    with pytest.raises(TypeError, match=r"scale is of type astropy\.Quantity"):
        QArray.from_codes(codes, quantity)


def test_subclasses_that_bend_nothing_are_taken():
    class Mine(np.ndarray):
        pass

    assert aqt_lite.quantize(X.view(Mine)).backend == "numpy"
