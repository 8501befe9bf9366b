"""Values of codes by compiled loops: the same bits as the operations of the contract, in every layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from optional import WITHOUT, jax
from processors import run_without_avx_512

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, affine
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import decoders, runtime
from aqt_lite.packing import pack

pytestmark = pytest.mark.skipif(runtime.decoding_loops() is None, reason="there are no loops without numba or AVX2")

FORMATS = ["int2", "int3", "int4", "uint4", "int5", "int6", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
           "float6_e2m3fn", "float4_e2m1fn", "nf4", "mxfp4", "mxfp6_e3m2", "mxfp8_e5m2", "mxint8",
           "nvfp4"]  # fmt: skip
OF_BLOCKS = "mx", "nv"
"""Formats whose names begin so have blocks of 16 or 32 along the last axis."""
LAYOUTS = {
    "one scale": ((300, 517), PerTensor()),
    "one for each row": ((300, 517), PerChannel(0)),
    "groups of 32": ((260, 544), PerGroup(32)),
    "groups of 16, the last of each row cut": ((259, 600), PerGroup(16)),
    "groups of 24": ((300, 480), PerGroup(24)),
    "blocks": ((256, 640), PerBlock((64, 128))),
    "blocks of whole rows": ((2000, 100), PerBlock((4, -1))),
    "blocks of rows that are shorter": ((2000, 100), PerBlock((2, 128))),
    "a scale for each column": ((600, 330), PerChannel(1)),
    "groups along the first axis": ((600, 330), PerGroup(32, 0)),
    "more axes": ((4, 5, 31, 256), PerGroup(64)),
    "one for each index of the second axis": ((6, 40, 9, 96), PerChannel(1)),
    "a convolution's kernels": ((512, 32, 3, 3), PerChannel(0)),
    "short rows": ((1 << 13, 32), PerGroup(32)),
    "short rows of several groups": ((24, 210, 3, 40), PerGroup(8)),
    "short rows, one scale": ((999, 5, 72), PerTensor()),
    "short rows, a scale for each": ((9999, 48), PerChannel(0)),
    "one axis": ((3 << 17,), PerGroup(32)),
    "one axis, one scale": ((1 << 18,), PerTensor()),
    "one row": ((1, 3 << 17), PerGroup(64)),
}
OF_LAYOUTS = [
    (dtype, layout)
    for i, dtype in enumerate(FORMATS)
    for j, (layout, (shape, _)) in enumerate(LAYOUTS.items())
    if (i + j) % 2 and not (dtype.startswith(OF_BLOCKS) and shape[-1] % 32)
]


def by_operations(q):
    """As the contract says it, with nothing of this machine's own."""
    q = q.to_backend("numpy").unpacked()
    with np.errstate(all="ignore"):
        return affine.dequantize(q._coded(), spec=q._spec, b=get_backend("numpy"))


def same_bits(a, b):
    a, b = (np.asarray(each).view(np.uint32) for each in (a, b))
    nan = [np.isnan(each.view(np.float32)) for each in (a, b)]
    return bool(((a == b) | (nan[0] & nan[1])).all())


@pytest.fixture
def served(monkeypatch):
    """Whether the loop served each call."""
    answers, form = [], decoders.dequantize

    def told(*arguments):
        answers.append((found := form(*arguments)) is not NotImplemented)
        return found

    monkeypatch.setattr(decoders, "dequantize", told)
    return answers


@pytest.mark.parametrize(("dtype", "layout"), OF_LAYOUTS)
def test_values_are_those_of_the_operations(dtype, layout, served):
    shape, granularity = LAYOUTS[layout]
    if dtype.startswith(OF_BLOCKS):
        granularity = None
    rng = np.random.default_rng(7)
    x = rng.standard_normal(shape, dtype=np.float32) * np.exp(rng.standard_normal((*shape[:-1], 1), dtype=np.float32))
    scheme = "affine" if dtype.startswith(("uint", "int4")) else "symmetric"
    q = aqt_lite.quantize(x, dtype, granularity=granularity, scheme=scheme)
    expected, out = by_operations(q), np.empty(shape, np.float32)
    for each in (q, q.unpacked()):
        assert same_bits(each.dequantize(), expected)
        each.dequantize(out=out)
        assert same_bits(out, expected)
    integers = q._spec.element.zero_points  # whose values another loop makes where every row has one scale
    short = layout == "a convolution's kernels" or dtype == "int8"
    assert any(served) or (integers and short)


@pytest.mark.parametrize("dtype", ["mxfp4", "mxfp8_e4m3", "nvfp4", "float8_e5m2", "float8_e4m3fn"])
def test_every_code_and_every_scale(dtype, served):
    """Infinities, NaN, scales that are 0, subnormal or too large: the loop has the bits, or leaves them to others."""
    q = aqt_lite.quantize(np.ones((1 << 9, 1 << 10), np.float32), dtype, granularity=None)
    rng = np.random.default_rng(3)
    storage = rng.integers(0, 256, q.storage.shape, dtype=np.uint8).view(q.storage.dtype)
    scales = [np.full_like(q.scale, s) for s in (1.2e-38, 1.0, -2.0, 3e34)] if dtype.startswith("float8") else []
    if not scales:  # in a format of their own, without NaN
        kept = q.scale.storage
        every = np.arange(kept.size, dtype=np.uint8).reshape(kept.shape)
        every[np.isnan(replace(q.scale, storage=every.view(kept.dtype)).dequantize())] = 1
        scales = [replace(q.scale, storage=each.view(kept.dtype)) for each in (every, np.clip(every, 90, 120))]
    for scale in scales:
        given = replace(q, storage=storage, scale=scale)
        assert same_bits(given.dequantize(), by_operations(given))
    assert any(served) == (dtype != "float8_e5m2")  # whose infinities are clipped


FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CODEBOOKS = {
    "halves": (-1.0, -0.5, -0.0, 0.5),
    "integers": (*range(-8, 0), -0.0, *range(1, 8)),
    "fp4 without -0": (*FP4, 0.0, *(-n for n in FP4[1:])),
    "as many bits as bytes": (*range(-128, 0), -0.0, *range(1, 128)),
}


@pytest.mark.parametrize("name", CODEBOOKS)
def test_zeros_keep_their_sign(name, served):
    """Moving bits makes 0.0 of integers, and -0.0 of the floats' other zero, whatever a codebook has there."""
    book = aqt_lite.Codebook(name, CODEBOOKS[name])
    codes = np.random.default_rng(1).integers(0, len(CODEBOOKS[name]), (512, 512)).astype(np.uint8)
    q = aqt_lite.QArray.from_codes(codes, np.ones((512, 16), np.float32), dtype=book, granularity=PerGroup(32))
    for each in (q, q.unpacked()):
        assert same_bits(each.dequantize(), by_operations(q))
    assert all(served)


def test_packed_infinities_are_clipped(served):
    element = aqt_lite.Float("fp4_inf", 2, 1, 1, 3.0, infinity=6)
    codes = np.random.default_rng(1).integers(0, 16, (512, 512), dtype=np.uint8)
    q = aqt_lite.quantize(np.ones((512, 512), np.float32), element, granularity=PerGroup(32))
    stored = pack(codes, bits=4, b=get_backend("numpy"))
    q = replace(q, storage=stored, scale=np.ones_like(q.scale))
    assert same_bits(q.dequantize(), by_operations(q))
    assert served == [False, False]  # nor as codes one a byte
    x = np.zeros((3, 512), np.float32)
    x[:, 0] = 1
    assert np.isfinite(aqt_lite.linear(x, q)).all()


@pytest.mark.parametrize("library", ["jax", "torch"])
def test_other_libraries(library, served):
    if library in WITHOUT:
        pytest.skip(f"{library} is not installed")
    x = np.random.default_rng(5).standard_normal((512, 512), dtype=np.float32)
    for dtype in ("int4", "mxfp4", "nf4"):
        q = aqt_lite.quantize(x, dtype, granularity=None if dtype == "mxfp4" else PerGroup(32))
        there = q.to_backend(library)
        assert same_bits(there.dequantize(), by_operations(q)), dtype
        if library == "jax":  # what XLA makes of the operations
            assert same_bits(jax.jit(lambda q: q.dequantize())(there), by_operations(q)), dtype
        elif dtype != "mxfp4":
            there = there.with_trainable_scales()
            there.scale.requires_grad_(dtype == "int4")
            values = there.dequantize()
            assert same_bits(values.detach(), by_operations(q))
            assert values.requires_grad == (dtype == "int4")
    assert served[0]


def test_memory_that_is_no_whole_is_left_to_others(served):
    q = aqt_lite.quantize(np.random.default_rng(2).standard_normal((512, 600), dtype=np.float32), "int4",
                          granularity=PerGroup(8))  # fmt: skip
    room = np.full((512, 1200), 7, np.float32)
    q.dequantize(out=room[:, ::2])
    assert same_bits(np.ascontiguousarray(room[:, ::2]), by_operations(q))
    assert (room[:, 1::2] == 7).all()
    assert not any(served)
    for cut in (q[100:300], q[:, 8:520], q[::3], q.T):
        assert same_bits(np.ascontiguousarray(cut.dequantize()), by_operations(cut))
    for dtype in ("float16", "bfloat16", "float64"):
        assert q.dequantize(dtype).dtype.name == dtype


@pytest.mark.exhaustive
def test_processors_without_avx_512():
    of_values = test_values_are_those_of_the_operations.__name__
    dtypes, layouts = ("int3", "int4", "nf4", "mxfp4"), ("groups", "blocks", "more axes", "one axis")
    tests = [f"{of_values}[{d}-{layout}]" for d, layout in OF_LAYOUTS if d in dtypes and layout.startswith(layouts)]
    tests.append(test_every_code_and_every_scale)
    run_without_avx_512(__file__, tests, "runtime.decoding_loops().LANES == 8")


@pytest.mark.parametrize("dtype", ["int4", "int8", "mxfp4"])
def test_arrays_whose_axes_are_swapped_are_read_as_they_lie(dtype, served):
    granularity = None if dtype == "mxfp4" else PerGroup(32)
    q = aqt_lite.quantize(np.random.default_rng(1).random((512, 640), np.float32), dtype, granularity=granularity)
    values = q.T.dequantize()
    assert any(served) or dtype == "int8"
    assert values.flags.f_contiguous  # a view of what the loop has made
    assert same_bits(values, q.dequantize().T)
    heads = q.reshape(4, 128, 640).for_dense(1, 2) if dtype == "int8" else q.T.for_dense()
    assert same_bits(heads.dequantize(), by_operations(heads))
    assert same_bits(q.T.dequantize("float16").astype(np.float32), q.dequantize("float16").T.astype(np.float32))
    out = np.empty((640, 512), np.float32)
    q.T.dequantize(out=out)
    assert same_bits(out, values)


OF_OFFSETS = ["one scale", "one for each row", "groups of 32", "groups of 16, the last of each row cut", "groups of 24",
              "blocks", "a scale for each column"]  # fmt: skip


@pytest.mark.parametrize("magnitude", [1.0, 3e-39, 1e38])  # of subnormal values, and near the largest
@pytest.mark.parametrize("layout", OF_OFFSETS)
@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint4"])
def test_offsets_are_added_as_the_contract_says(dtype, layout, magnitude):
    (shape, granularity), rng = LAYOUTS[layout], np.random.default_rng(4)
    x = np.clip(rng.standard_normal(shape), -3, 3).astype(np.float32) * np.float32(magnitude)
    q = aqt_lite.quantize(x, dtype, scheme="affine", offset="data", granularity=granularity)
    wanted = by_operations(q)
    assert same_bits(q.dequantize(), wanted)
    assert same_bits(q.dequantize(out=np.empty(shape, np.float32)), wanted)
    if "torch" not in WITHOUT:
        assert same_bits(q.to_backend("torch").dequantize(), wanted)


def test_values_beyond_the_largest_float_are_clipped_with_offsets():
    codes, scale = np.full((400, 400), 255, np.uint8), np.full((400, 1), 1e30, np.float32)
    offset = np.where(np.arange(400) % 2, 3.4e38, -3.4e38).astype(np.float32)[:, None]
    q = aqt_lite.QArray.from_codes(codes, scale, offset=offset, granularity=PerChannel(0))
    assert same_bits(q.dequantize(), by_operations(q))
