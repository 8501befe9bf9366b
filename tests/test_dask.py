"""Dask: chunks change no bit, whatever they are; the forms that users write; a cluster of processes."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqt_lite import (
    ClippingWarning,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    choose_qparams,
    dense,
    error_report,
    fake_quantize,
    quantize,
)
from aqt_lite.testing import assert_same_bits

RNG = np.random.default_rng(0)
X = RNG.standard_normal((12, 20)).astype("float32")


@pytest.fixture(autouse=True)
def _in_this_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


@st.composite
def chunkings(draw, shape):
    """Any way to cut an array: lengths along each axis that add up."""
    found = []
    for length in shape:
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
        found.append(tuple(np.diff([0, *cuts, length]).tolist()))
    return tuple(found)


WAYS = st.sampled_from([PerTensor(), PerChannel(0), PerChannel(1), PerGroup(4), PerGroup(7, 0), PerBlock((5, -1))])
HOW = st.sampled_from(
    [
        ("int8", {}),
        ("int16", {}),
        ("uint8", {"scheme": "affine"}),
        ("int4", {"scale_dtype": "float16"}),
        ("nf4", {}),
        ("int8", {"missing": "nan"}),
        ("int8", {"dialect": "onnx"}),
    ]
)


@settings(max_examples=12)
@given(chunks=chunkings(X.shape), granularity=WAYS, how=HOW)
def test_any_chunks_have_the_bits_of_the_whole(chunks, granularity, how):
    dtype, options = how
    there = quantize(da.from_array(X, chunks=chunks), dtype, granularity=granularity, **options)
    here = quantize(X, dtype, granularity=granularity, **options)
    assert all(isinstance(array, da.Array) for array in there._arrays())
    assert_same_bits(there.to_backend("numpy"), here)
    assert_same_bits(there.dequantize().compute(), here.dequantize())


RECIPES = [
    {"offset": "data", "scheme": "affine"},
    pytest.param({"rounding": "stochastic", "key": 7}, marks=pytest.mark.exhaustive),  # by the operations themselves
    {"rounding": "half_away"},
    {"scale": 0.25},
    {"scale": 0.25, "zero_point": 3},
    {"scale_dtype": "int8"},
    {"nonfinite": "ignore"},
]


@pytest.mark.parametrize("how", RECIPES, ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), pytest.param(PerBlock((3, 5)), marks=pytest.mark.exhaustive)])
def test_every_recipe(how, granularity):
    """In chunks that no block fits, one of them empty."""
    for dtype in ("int8", "int3"):
        x = da.from_array(X, chunks=((5, 0, 7), (8, 12) if "key" in how else (20,)))
        there, here = (quantize(a, dtype, granularity=granularity, on_clip="saturate", **how) for a in (x, X))
        assert_same_bits(there.to_backend("numpy"), here)
        assert_same_bits(there.dequantize().compute(), here.dequantize())
        assert_same_bits(there[3:9].to_backend("numpy"), here[3:9])
        if "key" not in how:
            assert_same_bits(fake_quantize(x, dtype, granularity=granularity, **how).compute(), here.dequantize())


@pytest.mark.parametrize("dtype", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("chunks", [(5, 20), (12, 16), (12, 7)], ids=str)
def test_block_formats(dtype, chunks):
    there, here = quantize(da.from_array(X, chunks=chunks), dtype), quantize(X, dtype)
    assert_same_bits(there.to_backend("numpy"), here)
    assert_same_bits(there.dequantize().compute(), here.dequantize())


NOISE = {"rounding": "stochastic", "key": 3}


@pytest.mark.parametrize("how", [NOISE, {**NOISE, "scale": 0.5}])
@pytest.mark.parametrize("granularity", [PerTensor(), PerGroup(5)])
def test_chunks_of_length_zero(how, granularity):
    x = da.from_array(X, chunks=((0, 5, 0, 7), (12, 0, 8)))
    there, here = (quantize(a, "int8", granularity=granularity, on_clip="saturate", **how) for a in (x, X))
    assert_same_bits(there.to_backend("numpy"), here)
    assert_same_bits(there.dequantize().compute(), here.dequantize())
    scale, _ = choose_qparams(x, granularity=granularity)
    assert_same_bits(scale.compute(), choose_qparams(X, granularity=granularity)[0])


def test_products_and_reports():
    x = da.from_array(X, chunks=(5, 20))
    w = RNG.standard_normal((20, 6)).astype("float32")
    here = quantize(w, granularity=PerChannel(1))
    there = quantize(da.from_array(w, chunks=(20, 4)), granularity=PerChannel(1))
    wanted = dense(X, here, mode="reproducible")
    rows = x.map_blocks(
        lambda part: dense(part, here, mode="reproducible"), chunks=(x.chunks[0], 6), meta=np.zeros((0, 0), "f4")
    )
    for y in (dense(x, there, mode="reproducible"), rows):
        assert isinstance(y, da.Array)
        assert_same_bits(y.compute(), wanted)
    assert error_report(x, quantize(x)) == error_report(X, quantize(X))


def test_map_blocks_with_one_scale_has_the_codes_of_the_whole():
    """Two passes: the scale of all, then chunks by themselves, on whatever machine they are."""
    x, here = da.from_array(X, chunks=(5, 7)), quantize(X)
    scale = np.asarray(abs(x).max().compute() * np.float32(1 / 127)).reshape(1, 1)
    assert_same_bits(scale, here.scale)
    codes = x.map_blocks(lambda chunk: quantize(chunk, scale=scale).qvalue, dtype="int8", meta=np.zeros((0, 0), "int8"))
    assert_same_bits(codes.compute(), here.qvalue)


@pytest.mark.parametrize(
    "how", [{}, {"granularity": PerChannel(0)}, {"granularity": PerGroup(4)}, {"scale": 0.5}], ids=str
)
def test_bad_values_are_named_by_their_chunk(how):
    bad = X.copy()
    bad[7, 13] = np.nan
    q = quantize(da.from_array(bad, chunks=(5, 10)), **how)
    with pytest.raises(ValueError, match=r"in the chunk at \(5, 10\), the first at index \(7, 13\)"):
        q.dequantize().compute()


@pytest.mark.exhaustive  # two processes are started
@pytest.mark.filterwarnings("ignore")  # theirs are for distributed to say
def test_a_cluster_of_two_processes():
    import distributed  # takes a second, which the other tests need not wait for

    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        dask.config.set(scheduler=client),
    ):
        x = da.from_array(X, chunks=(5, 7))
        for dtype, how in (("int8", {"granularity": PerChannel(0)}), ("uint8", {"scheme": "affine"}), ("mxfp4", {})):
            there, here = quantize(x, dtype, **how), quantize(X, dtype, **how)
            assert_same_bits(there.to_backend("numpy"), here)
            assert_same_bits(there.dequantize().compute(), here.dequantize())
            assert error_report(x, there) == error_report(X, here)
        bad = X.copy()
        bad[7, 13] = np.inf
        with pytest.raises(ValueError, match=r"in the chunk at \(5, 7\), the first at index \(7, 13\)"):
            quantize(da.from_array(bad, chunks=(5, 7))).dequantize().compute()


@pytest.mark.exhaustive  # three clusters are started
def test_an_array_larger_than_a_worker_is_quantized_whoever_dies():
    """0.8 GB where a worker has 600 MB; a worker is killed on the way, and the result is the same."""
    script = Path(__file__).parent.parent / "benchmarks" / "cluster.py"
    command = [sys.executable, str(script), "--gigabytes", "0.8", "--megabytes-a-worker", "600"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "the same results: yes" in done.stdout


def count_chunks(x):
    """``x``, and how many of its chunks have been computed."""
    seen = []

    def one(chunk):
        seen.append(1)
        return chunk

    return x.map_blocks(one, dtype=x.dtype, meta=x._meta), seen


ONE_WAY = [
    ("int8", {"max_abs_err": 0.1}),
    ("int4", {"max_abs_err": 0.3, "granularity": PerGroup(7), "missing": "nan"}),
    ("mxfp8_e4m3", {"max_abs_err": 0.3}),
    ("uint16", {"max_rel_err": 0.5, "scheme": "affine"}),
]
SEVERAL_WAYS = [
    ("auto", {"max_abs_err": 0.1}),
    ("auto", {"max_abs_err": 0.1, "granularity": PerChannel(0), "mask": X > 1}),
    ("auto", {"max_rel_err": 0.07}),
    ("uint16", {"max_rel_err": 0.5}),
    ("auto", {"max_abs_err": 0.1, "dialect": "onnx"}),
]


@settings(max_examples=10)
@given(chunks=chunkings(X.shape), how=st.sampled_from(ONE_WAY + SEVERAL_WAYS))
def test_bounds_have_the_bits_of_the_whole(chunks, how):
    """Lazily where one way is left to try; else by one computation of the array, for all of them together."""
    dtype, options = how
    x, seen = count_chunks(da.from_array(X, chunks=chunks))
    there, here = quantize(x, dtype, **options), quantize(X, dtype, **options)
    assert len(seen) == (0 if how in ONE_WAY else x.npartitions)
    assert all(isinstance(array, da.Array) for array in there._arrays())
    assert_same_bits(there.to_backend("numpy"), here)
    assert_same_bits(there.dequantize().compute(), here.dequantize())


SCALES = np.full((12, 5), 0.01, "f4")
CLIPPING = [
    ("int8", {"scale": 0.01}),
    ("int8", {"scale": 0.01, "zero_point": 3}),
    ("uint8", {"scale": 0.01, "offset": -0.5}),
    ("int8", {"scale": 0.02, "missing": "nan"}),
    ("int4", {"scale": SCALES, "granularity": PerGroup(4)}),
    ("int4", {"scale": 0.1, **NOISE}),
    ("mxfp4", {"granularity": PerGroup(4)}),
    ("int4", {"scale": -0.1, "dialect": "onnxruntime"}),
]


@pytest.mark.exhaustive_where(chunks=(12, 20))
@pytest.mark.exhaustive_where(chunks=(5, 20))
@pytest.mark.parametrize("chunks", [(12, 20), (5, 20), ((5, 0, 7), (12, 8))], ids=str)
@pytest.mark.parametrize(("dtype", "how"), CLIPPING, ids=lambda v: v if isinstance(v, str) else ",".join(v))
def test_clipping_is_told_when_a_chunk_is_computed(dtype, how, chunks):
    """As many values as NumPy tells of all at once."""
    x = da.from_array(X, chunks=chunks)
    there = {**how, "scale": da.from_array(SCALES, chunks=5)} if how.get("scale") is SCALES else how
    with pytest.warns(ClippingWarning) as of_all:
        here = quantize(X, dtype, on_clip="warn", **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ClippingWarning)
        q = quantize(x, dtype, on_clip="warn", **there)
    with pytest.warns(ClippingWarning, match=r"in the chunk at \(\d+, \d+\) beyond the numbers that") as of_chunks:
        assert_same_bits(q.to_backend("numpy"), here)
    assert sum(int(str(w.message).split()[2]) for w in of_chunks) == int(str(of_all[0].message).split()[2])

    with pytest.raises(ValueError, match="x has") as of_all:
        quantize(X, dtype, on_clip="raise", **how)
    q = quantize(x, dtype, on_clip="raise", **there)
    with pytest.raises(ValueError, match=r"in the chunk at .*on_clip='saturate'") as of_chunk:
        q.dequantize().compute()
    if x.npartitions == 1:
        assert str(of_chunk.value).replace(" in the chunk at (0, 0)", "") == str(of_all.value)
    first = re.search(r"first at index \((\d+), (\d+)\): (\S+);", str(of_chunk.value))
    assert np.float32(first[3]) == X[int(first[1]), int(first[2])]


def test_nothing_is_told_where_nothing_is_clipped():
    x = da.from_array(X, chunks=(5, 7))
    for on_clip in ("warn", "raise"):
        for dtype, how in (("int8", {"scale": 0.05}), ("bitround7", {}), ("int4", {"granularity": PerGroup(4)})):
            with warnings.catch_warnings():
                warnings.simplefilter("error", ClippingWarning)
                q = quantize(x, dtype, on_clip=on_clip, **how).to_backend("numpy")
            assert_same_bits(q, quantize(X, dtype, **how))
    empty = quantize(da.zeros((0, 4), dtype="f4"), scale=0.5, on_clip="raise")
    assert empty.to_backend("numpy").shape == (0, 4)


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
def test_no_row_stands_for_one_that_there_is_not(granularity):
    """Indices that are known are an error at once, others when they are computed."""
    q, here = (quantize(a, granularity=granularity) for a in (da.from_array(X, chunks=5), X))
    for bad in (12, -13, 99, 2**32 + 1):
        message = f"index {bad} is out of range for axis 0 of length 12"
        for known in (np.asarray([3, bad]), [3, bad], np.asarray([[bad, 0]])):
            with pytest.raises(IndexError, match=message):
                q.take(known)
        for later in (da.from_array(np.asarray([3, 0, bad]), chunks=2), da.asarray(np.asarray(bad))):
            for rows in (q[later], q.take(later)):
                with pytest.raises(IndexError, match=message):
                    rows.dequantize().compute()
            with pytest.raises(IndexError, match=message):
                here[later]
    with pytest.raises(IndexError, match="index 20 is out of range for axis 1 of length 20"):
        q.take([20], axis=1)
    for good in ([3, -12, 11], np.asarray([[5]], np.uint8), da.from_array(np.asarray([3, -12, 11, 11]), chunks=3)):
        assert_same_bits(q.take(good).to_backend("numpy"), here.take(np.asarray(good)))


def test_bounds_that_are_not_kept():
    x = da.from_array(X, chunks=(5, 10))
    worst = np.unravel_index(np.argmax(np.abs(X - quantize(X, scheme="affine", offset="data").dequantize())), X.shape)
    q = quantize(x, "int8", max_abs_err=1e-6, granularity=PerChannel(0))
    with pytest.raises(ValueError, match=r"int8 cannot keep max_abs_err=1e-06: in the chunk at \(\d+, \d+\) an error"):
        q.dequantize().compute()
    e = error_report(X, quantize(X, offset="data", scheme="affine")).max_abs_error * 0.999
    with pytest.raises(ValueError, match=rf"in the chunk at \({worst[0] // 5 * 5}, {worst[1] // 10 * 10}\) an error"):
        quantize(x, "int8", max_abs_err=e).dequantize().compute()
    x, seen = count_chunks(x)
    with pytest.raises(ValueError, match=r"none of uint2, .* can keep") as there:
        quantize(x, "auto", max_abs_err=1e-9)
    with pytest.raises(ValueError, match=r"none of uint2, .* can keep") as here:
        quantize(X, "auto", max_abs_err=1e-9)
    assert str(there.value) == str(here.value)
    assert len(seen) == x.npartitions
    bad = X.copy()
    bad[7, 13] = np.nan
    with pytest.raises(ValueError, match=r"in the chunk at \(5, 10\), the first at index \(7, 13\)"):
        quantize(da.from_array(bad, chunks=(5, 10)), "auto", max_abs_err=0.1)


@pytest.mark.parametrize("shape", [(), (0, 4), (3, 0)])
def test_bounds_of_empty_arrays_and_of_one_number(shape):
    for dtype in ("auto", "int8"):
        q = quantize(da.full(shape, 3.5, dtype="f4"), dtype, max_abs_err=0.1)
        assert_same_bits(q.to_backend("numpy"), quantize(np.full(shape, 3.5, "f4"), dtype, max_abs_err=0.1))


def test_masks_stay_lazy():
    x, land = da.from_array(X, chunks=(5, 7)), X[0] > 0.5
    here = quantize(X, mask=land)
    for mask in (land, da.from_array(land, chunks=4)):
        there = quantize(x, mask=mask)
        assert all(isinstance(array, da.Array) for array in there._arrays())
        assert_same_bits(there.to_backend("numpy"), here)
        assert_same_bits(there.dequantize().compute(), here.dequantize())
    there = quantize(x, fill_value=float(X[3, 3]), granularity=PerChannel(1))
    assert_same_bits(there.to_backend("numpy"), quantize(X, fill_value=float(X[3, 3]), granularity=PerChannel(1)))
    with pytest.raises(TypeError, match="out is given, but arrays of dask"):
        quantize(x, out=np.empty(X.shape, "i1"))
