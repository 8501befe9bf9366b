"""zarr: codecs keep their bounds and bits through chunks, shards and parts; packbits is the specification's."""

from __future__ import annotations

import asyncio
import json
import tomllib
import warnings
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numcodecs import PackBits

from aqt_lite import PerBlock, bitround, cf, dequantize, keepbits_for, quantize
from aqt_lite._bits import stream_of, words_of
from aqt_lite.testing import assert_same_bits
from aqt_lite.zarr import BoundCodec, PackBitsCodec, QuantizeCodec, standard_codecs

RNG = np.random.default_rng(0)
X = (280 + RNG.standard_normal((40, 50)).cumsum(0).cumsum(1)).astype("float32")
X[3, 4] = np.nan


def stored(codec, x=X, chunks=(16, 25), **how):
    z = zarr.create_array({}, shape=x.shape, chunks=chunks, dtype=x.dtype, serializer=codec, fill_value=0, **how)
    z[...] = x
    return z


CODECS = [
    BoundCodec(max_abs_err=0.05),
    BoundCodec(max_abs_err=0.05, packed=False),
    QuantizeCodec(),
    QuantizeCodec("int4", block=(1, 5)),
    QuantizeCodec("mxfp4"),
    QuantizeCodec("nvfp4"),
    QuantizeCodec("uint8", block=(-1, 1), scheme="affine", scale_dtype="float16"),
]


@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("source", ["float32", "float64"])
def test_whole_parts_shards_and_async(codec, source):
    x = X.astype(source)
    whole = stored(codec, x)[...]
    assert whole.dtype == source
    assert np.array_equal(np.isnan(whole), np.isnan(x))
    sharded = stored(codec, x, chunks=(16, 25), shards=(32, 50))
    bare = stored(codec, x, compressors=None)
    for z in (sharded, bare):
        assert_same_bits(z[...], whole)
        assert_same_bits(z[5:20, ::3], whole[5:20, ::3])
        assert_same_bits(z[7, 8], whole[7, 8])
        assert_same_bits(z.oindex[[3, 30], :], whole[[3, 30]])

    async def read():
        a = await zarr.api.asynchronous.open_array(store=bare.store, mode="r")
        return await a.getitem((slice(2, 19), slice(20, 30)))

    assert_same_bits(asyncio.run(read()), whole[2:19, 20:30])
    again = zarr.open_array(bare.store, mode="r")
    assert again.metadata == bare.metadata
    assert again.serializer == codec


@pytest.mark.parametrize("codec", [*CODECS[2:], QuantizeCodec("bitround5")], ids=str)
def test_chunks_hold_what_quantize_makes_of_them(codec):
    z = stored(codec)
    block = None if codec.block is None else PerBlock(codec.block)
    chunk = X[16:32, 25:50]
    wanted = dequantize(quantize(chunk, codec.dtype, **codec._how()))
    assert codec._how().get("granularity") == block
    assert_same_bits(z[16:32, 25:50], wanted)


def test_the_metadata_says_everything():
    store = {}
    z = zarr.create_array(
        store, shape=(4, 6), chunks=(2, 3), dtype="float32", serializer=QuantizeCodec("int4", (1, -1))
    )
    z[...] = 1.0
    said = json.loads(store["zarr.json"].to_bytes())["codecs"][0]
    assert said == {
        "name": "aqt_lite.quantize",
        "configuration": {"dtype": "int4", "block": [1, -1], "scheme": "symmetric"},
    }
    assert QuantizeCodec.from_dict(said) == QuantizeCodec("int4", (1, -1))
    assert BoundCodec(0.5).to_dict() == {
        "name": "aqt_lite.bound",
        "configuration": {"max_abs_err": 0.5, "packed": True},
    }
    assert PackBitsCodec().to_dict() == {"name": "packbits"}
    assert PackBitsCodec("first_byte", 1, 3).to_dict()["configuration"] == {
        "padding_encoding": "first_byte",
        "first_bit": 1,
        "last_bit": 3,
    }


def test_entry_points_lead_to_the_codecs():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    found = project["entry-points"]["zarr.codecs"]
    assert found == {
        codec.name: f"aqt_lite.zarr:{codec.__name__}" for codec in (BoundCodec, QuantizeCodec, PackBitsCodec)
    }


# ---- the bound


@settings(max_examples=150)
@given(
    x=hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.integers(0, 9),
        elements=st.one_of(st.floats(width=32), st.floats(-1, 1, width=32), st.just(np.nan), st.integers(-9, 9)),
    ),
    bound=st.one_of(st.floats(1e-12, 1e3), st.floats(1e-300, 1e300)),
    packed=st.booleans(),
)
def test_every_value_is_within_the_bound(x, bound, packed):
    codec = BoundCodec(bound, packed)
    data = codec.to_bytes(x)
    found = codec.to_values(data, x.shape, x.dtype)
    assert found.dtype == x.dtype
    for a, b in zip(x.tolist(), found.tolist(), strict=True):
        if np.isfinite(a):
            assert abs(Fraction(a) - Fraction(b)) <= Fraction(bound)
        else:
            assert a == b or (np.isnan(a) and np.isnan(b))


def test_bits_are_as_few_as_the_range_asks_for():
    x = np.linspace(0, 10, 1000, dtype="float32")
    for bound, bits in ((0.005, 10), (0.05, 7), (0.5, 4), (11, 0)):
        data = BoundCodec(bound).to_bytes(x)
        assert data[1] == bits
        assert data.size == 24 + -(-bits * 1000 // 8)
    assert BoundCodec(0.5, packed=False).to_bytes(x)[1] == 8
    x[0] = np.nan
    assert BoundCodec(11).to_bytes(x)[1] == 1  # a code for what is missing
    x[1] = np.inf
    assert BoundCodec(6).to_bytes(x)[1] == 255  # as they are
    assert BoundCodec(1e-9).to_bytes(np.linspace(0, 1e9, 9, dtype="float32"))[1] == 255
    assert_same_bits(BoundCodec(6).to_values(BoundCodec(6).to_bytes(x), x.shape, x.dtype), x)


def test_damaged_chunks_are_refused():
    codec, shape, kind = BoundCodec(0.05), X.shape, X.dtype
    good = codec.to_bytes(X)
    for at, value, message in ((0, 2, "version 2"), (1, 40, "damaged"), (2, 2, "damaged"), (15, 255, "damaged")):
        bad = good.copy()
        bad[at] = value
        with pytest.raises(ValueError, match=message):
            codec.to_values(bad, shape, kind)
    with pytest.raises(ValueError, match="fewer than its header"):
        codec.to_values(good[:20], shape, kind)
    with pytest.raises(ValueError, match="bytes of codes, and"):
        codec.to_values(good[:-1], shape, kind)
    codec = QuantizeCodec()
    good = codec.to_bytes(X)
    for bad in (good[:-1], good[:0], np.concatenate([good, good[:1]]), np.where(np.arange(good.size) == 0, 7, good)):
        with pytest.raises(ValueError, match=r"a chunk of aqt_lite.quantize has"):
            codec.to_values(bad.astype("uint8"), shape, kind)
    with pytest.raises(ValueError, match="2 infinite values"):
        codec.to_bytes(np.asarray([1, np.inf, -np.inf], "float32"))


def test_what_is_refused_when_an_array_is_made():
    for codec, message in ((BoundCodec(1.0), "is for float32 and float64"), (QuantizeCodec(), "is for float32")):
        with pytest.raises(TypeError, match=message):
            stored(codec, np.arange(6), chunks=(3,))
    with pytest.raises(ValueError, match="bitround7 has the exponents of float32"):
        stored(QuantizeCodec("bitround7"), X.astype("float64"))
    with pytest.raises(ValueError, match=r"block=\[1, 2\] has 2 lengths, and the array 1 axes"):
        stored(QuantizeCodec(block=(1, 2)), X[0], chunks=(3,))
    for bad in (lambda: BoundCodec(0), lambda: QuantizeCodec("int99"), lambda: PackBitsCodec("middle")):
        with pytest.raises(ValueError, match=r"max_abs_err|int99|padding_encoding"):
            bad()
    with pytest.raises(TypeError, match="packed='no'"):
        BoundCodec(1.0, "no")
    with pytest.raises(ValueError, match=r"the codec 'packbits' is not aqt_lite.bound"):
        BoundCodec.from_dict({"name": "packbits"})


# ---- packbits


TYPES = [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float32", "float64", "complex64", "complex128", "bfloat16"),
    *("int2", "uint2", "int4", "uint4", "float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn"),
]
NARROW = {
    "bool": 1,
    "int2": 2,
    "uint2": 2,
    "int4": 4,
    "uint4": 4,
    "float4_e2m1fn": 4,
    "float6_e2m3fn": 6,
    "float6_e3m2fn": 6,
}


def type_of(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def by_the_book(x, name, first, last):
    """Bits of every component, one by one, as the specification has it."""
    bits = []
    parts = 2 if name.startswith("complex") else 1
    width = NARROW.get(name, 8 * x.dtype.itemsize // parts)
    for word in np.ascontiguousarray(x).reshape(-1).view(f"u{x.dtype.itemsize // parts}").tolist():
        bits += [word >> i & 1 for i in range(first or 0, (width - 1 if last is None else last) + 1)]
    padding = -len(bits) % 8
    bits += [0] * padding
    return padding, bytes(sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_packbits_by_the_book(name, count):
    dtype = type_of(name)
    raw = RNG.integers(0, 256, count * dtype.itemsize, dtype="uint8")
    if name in NARROW:
        low = raw & ((1 << NARROW[name]) - 1)
        half = 1 << (NARROW[name] - 1)
        raw = ((low.astype("int8") ^ half) - half).view("uint8") if name.startswith("int") else low
    x = raw.view(dtype)
    padding, stream = by_the_book(x, name, None, None)
    for where, wanted in (
        ("none", stream),
        ("first_byte", bytes([padding]) + stream),
        ("last_byte", stream + bytes([padding])),
    ):
        codec = PackBitsCodec(where)
        data = codec.to_bytes(x)
        assert data.tobytes() == wanted
        again = codec.to_values(data, x.shape, dtype)
        assert again.dtype == dtype
        assert again.tobytes() == x.tobytes()


@settings(max_examples=60)
@given(data=st.data(), dtype=st.sampled_from(["int8", "uint8", "int16", "uint32", "int64", ">i4", "float32"]))
def test_packbits_of_some_bits(data, dtype):
    x = data.draw(hnp.arrays(dtype, st.integers(0, 9)))
    width = 8 * x.dtype.itemsize
    first = data.draw(st.integers(0, width - 1))
    last = data.draw(st.integers(first, width - 1))
    codec = PackBitsCodec("none", first, last)
    name = x.dtype.name
    packed = codec.to_bytes(x)
    assert packed.tobytes() == by_the_book(x.astype(x.dtype.newbyteorder("=")), name, first, last)[1]
    found = codec.to_values(packed, x.shape, x.dtype)
    words = x.astype(x.dtype.newbyteorder("=")).view(f"u{x.dtype.itemsize}").tolist()
    kept = [w >> first & ((1 << (last - first + 1)) - 1) for w in words]
    signed = name.startswith("int")
    kept = [k - (1 << (last - first + 1)) if signed and k >> (last - first) else k for k in kept]
    wanted = [(k << first) % (1 << width) for k in kept]
    assert found.astype(x.dtype.newbyteorder("=")).view(f"u{x.dtype.itemsize}").tolist() == wanted


def test_packbits_in_an_array_and_as_numcodecs_has_it():
    mask = RNG.random((13, 9)) < 0.5
    z = stored(PackBitsCodec("first_byte"), mask, chunks=(13, 9), compressors=None)
    assert_same_bits(z[...], mask)
    (chunk,) = [value.to_bytes() for key, value in z.store._store_dict.items() if key.startswith("c/")]
    padded = PackBits().decode(chunk[:1] + np.packbits(mask, bitorder="big").tobytes())
    assert np.array_equal(np.ravel(padded)[: mask.size].astype(bool), mask.ravel())  # the count of padding agrees
    codes = RNG.integers(-8, 8, (7, 5)).astype("int8")
    z = stored(PackBitsCodec(last_bit=3), codes, chunks=(2, 5), compressors=None)
    assert_same_bits(z[...], codes)
    assert z.nbytes_stored() < codes.size + 700
    q = quantize(np.nan_to_num(X[:, :48]), "int4")  # rows of whole bytes are the same stream as that of a QArray
    assert PackBitsCodec(last_bit=3).to_bytes(q.qvalue).tobytes() == q.storage.tobytes()


def test_packbits_refuses_what_it_cannot_mean():
    for how, message in (({"last_bit": 8}, "has the bits 0 to 7"), ({"first_bit": 9}, "has the bits 0 to 7")):
        with pytest.raises(ValueError, match=message):
            stored(PackBitsCodec(**how), np.zeros(4, "int8"), chunks=(2,))
    with pytest.raises(ValueError, match="last_bit=1 is less than first_bit=2"):
        PackBitsCodec(first_bit=2, last_bit=1)
    with pytest.raises(ValueError, match="first_bit=True"):
        PackBitsCodec(first_bit=True)
    with pytest.raises(TypeError, match="packbits has no bits for elements of"):
        stored(PackBitsCodec(), np.zeros(4, "datetime64[s]"), chunks=(2,))
    codec = PackBitsCodec("last_byte")
    data = codec.to_bytes(np.ones(9, bool))
    with pytest.raises(ValueError, match="has 2 bytes, and 3 belong"):
        codec.to_values(data[:-1], (9,), np.dtype(bool))
    data[-1] = 5
    with pytest.raises(ValueError, match="says 5 bits of padding, and has 7"):
        codec.to_values(data, (9,), np.dtype(bool))


@pytest.mark.parametrize("bits", [1, 3, 7, 8, 13, 31, 32])
def test_long_streams_are_made_in_parts(bits):
    words = RNG.integers(0, 1 << bits, 70001, dtype="uint64").astype("uint32")
    stream = stream_of(words, 0, bits)
    assert stream.size == -(-words.size * bits // 8)
    assert_same_bits(words_of(stream, words.size, 0, bits, "uint32"), words)


# ---- codecs that others have


@pytest.mark.parametrize("source", ["float32", "float64"])
def test_standard_codecs_decode_exactly_what_is_within_the_bound(source):
    """The specification's arithmetic, in the type of the array: differences, products, quotients."""
    x = X.astype(source)
    scale, cast = standard_codecs(x, max_abs_err=0.05, dtype="int16")
    kind, said = np.dtype(source).type, scale["configuration"]
    offset, factor = kind(said["offset"]), kind(said["scale"])
    assert (float(offset), float(factor)) == (said["offset"], said["scale"])
    codes = np.rint((x - offset) * factor)
    values = codes / factor + offset
    ((nan, fill),) = cast["configuration"]["scalar_map"]["encode"]
    assert (nan, fill) == ("NaN", -32768)
    finite = np.isfinite(x)
    assert np.abs(codes[finite]).max() <= 32767
    assert np.abs(values.astype(float) - x)[finite].max() <= 0.05
    exact = [Fraction(float(c)) / Fraction(float(factor)) + Fraction(float(offset)) for c in codes[finite]]
    assert exact == [Fraction(float(v)) for v in values[finite]]


def test_standard_codecs_are_read_without_this_library():
    pytest.importorskip("zarr.codecs.cast_value", reason="zarr-python before 3.4 has no cast_value")
    pytest.importorskip("cast_value_rs", reason="zarr's cast_value needs cast-value-rs")
    z = zarr.create_array(
        {},
        shape=X.shape,
        chunks=(16, 25),
        dtype="float32",
        filters=standard_codecs(X, max_abs_err=0.05),
        fill_value=280,
    )
    z[...] = X
    assert np.nanmax(np.abs(z[...].astype(float) - X)) <= 0.05
    assert np.array_equal(np.isnan(z[...]), np.isnan(X))


def test_standard_codecs_refuse_what_float32_cannot_keep():
    with pytest.raises(ValueError, match=r"int16 cannot keep max_abs_err=0.0001"):
        standard_codecs(X, max_abs_err=1e-4)
    with pytest.raises(ValueError, match="float32 cannot keep"):
        standard_codecs(X, max_abs_err=1e-3, dtype="int32")
    assert cf.choose_packing(X, max_abs_err=0.05, powers_of_two=True).scale_factor == 0.0625


def test_the_codec_that_everybody_has_rounds_to_our_bits(tmp_path):
    """``bitround`` of numcodecs, with the bits that keepbits_for chooses."""
    from zarr.codecs.numcodecs import BitRound

    x = (280 + np.random.default_rng(0).standard_normal((30, 40)).cumsum(1)).astype("float32")
    bits = keepbits_for(x, information=0.99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that numcodecs' codecs are not in the specification
        z = zarr.create_array(
            tmp_path / "a.zarr", shape=x.shape, chunks=(10, 40), dtype="float32", filters=[BitRound(keepbits=bits)]
        )
        z[:] = x
        again = zarr.open_array(tmp_path / "a.zarr", mode="r")[:]
    assert_same_bits(again, bitround(x, bits))
