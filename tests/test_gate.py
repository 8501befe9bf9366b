"""Arrays whose memory is not as a compiled loop would read it: what is computed from them is right all the same."""

from __future__ import annotations

import numpy as np
import pytest

import aqt_lite
from aqt_lite import PerChannel, PerGroup, linear, quantize
from aqt_lite.backends.cpu import runtime
from aqt_lite.testing import assert_same_bits

RNG = np.random.default_rng(0)


def big_endian(a):
    return a.astype(a.dtype.newbyteorder(">"))


def misaligned(a):
    there = np.ndarray(a.shape, a.dtype, np.empty(a.nbytes + 1, np.uint8)[1:].data)
    there[...] = a
    return there


def reversed_in_memory(a):
    return np.ascontiguousarray(a[::-1])[::-1]


def read_only(a):
    a = a.copy()
    a.flags.writeable = False
    return a


@pytest.mark.exhaustive_where(place=np.asfortranarray, shape=(600, 512))
@pytest.mark.parametrize("shape", [(24, 40), (600, 512)], ids=str)  # the latter reaches the loops for large arrays
@pytest.mark.parametrize("place", [big_endian, misaligned, reversed_in_memory, np.asfortranarray, read_only])
@pytest.mark.parametrize(
    "how",
    [
        {"granularity": PerChannel(0)},
        {"granularity": PerGroup(8)},
        {"dtype": "uint8", "scheme": "affine", "granularity": PerChannel(0)},
        {"dtype": "int4", "granularity": PerGroup(8), "scale_dtype": "float16"},
    ],
    ids=["int8", "groups", "uint8", "int4"],
)
def test_memory_of_every_kind(how, place, shape):
    w, x = (RNG.standard_normal(s).astype(np.float32) for s in (shape, (3, shape[1])))
    bias = RNG.standard_normal(shape[0]).astype(np.float32)
    q = quantize(w, **how)
    expected = {mode: linear(x, q, bias, mode=mode) for mode in ("fast", "reproducible")}  # loops are compiled by now
    values = q.dequantize()
    np.testing.assert_array_equal(quantize(place(w), **how).dequantize(), values)
    odd = q._with_each(place)
    np.testing.assert_array_equal(odd.dequantize(), values)
    np.testing.assert_allclose(linear(place(x), odd, place(bias)), expected["fast"], rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(linear(place(x), odd, place(bias), mode="reproducible"), expected["reproducible"])


@pytest.mark.skipif(runtime.decoding_loops() is None, reason="there are no such loops here")
def test_loops_are_not_compiled_anew_for_memory_that_nobody_may_write_to():
    loops = runtime.decoding_loops()
    w, x = (RNG.standard_normal(s).astype(np.float32) for s in ((700, 512), (3, 512)))
    q = quantize(w, "int4", granularity=PerGroup(32))
    expected = linear(x, q), q.dequantize()
    counted = [f for f in vars(loops).values() if hasattr(f, "signatures")]
    before = [len(f.signatures) for f in counted]
    assert sum(before) > 3
    fixed = q._with_each(read_only)
    assert_same_bits(linear(read_only(x), fixed), expected[0])
    assert_same_bits(fixed.dequantize(), expected[1])
    assert [len(f.signatures) for f in counted] == before


@pytest.mark.parametrize("shape", [(4, 40), (700, 512)], ids=str)
def test_what_is_returned_as_it_was_given_may_be_written_to_no_more_than_before(shape):
    """Loops see it through arrays that may be written to."""
    x, scale = (
        read_only(RNG.standard_normal(shape).astype(np.float32)),
        read_only(np.full((shape[0], 1), np.float32(0.1))),
    )
    kept = [a.copy() for a in (x, scale)]
    q = quantize(x, granularity=PerChannel(0), scale=scale)
    for made in (
        q.scale,
        q.storage,
        q.dequantize(),
        aqt_lite.bitround(x, 23),
        aqt_lite.fake_quantize(x, scale=scale, granularity=PerChannel(0)),
    ):
        if np.shares_memory(made, x) or np.shares_memory(made, scale):
            assert not made.flags.writeable
        else:
            made[...] = 0
    assert_same_bits(x, kept[0])
    assert_same_bits(scale, kept[1])


def test_axes_without_steps():
    row = RNG.standard_normal((1, 2048)).astype(np.float32)
    w, x = np.broadcast_to(row, (300, 2048)), np.broadcast_to(np.float32(0.5), (3, 2048))
    q, copied = (quantize(a, granularity=PerChannel(0)) for a in (w, w.copy()))
    np.testing.assert_array_equal(q.qvalue, copied.qvalue)
    for mode in ("fast", "reproducible"):
        np.testing.assert_array_equal(linear(x, q, mode=mode), linear(x.copy(), copied, mode=mode))
