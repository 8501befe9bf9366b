"""Another convention, the same numbers: exactly, or not at all."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from optional import jax, jnp

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, QArray, compare, convert, quantize
from aqt_lite.dialects import DIALECTS
from aqt_lite.formats import FORMATS
from aqt_lite.testing import assert_same_bits

X = np.random.default_rng(3).standard_normal((16, 64)).astype(np.float32)
ROWS = PerChannel(0)


def exact_values(q):
    """Real numbers, in fractions: an oracle that shares no arithmetic with what is tested."""
    q = q.to_backend("numpy")
    numbers = q._element.decode(q.qvalue, q._backend, "float64")
    grid = aqt_lite.granularity.grid_of(q.shape, q.block)

    def of_blocks(leaf):
        leaf = leaf.dequantize() if isinstance(leaf, QArray) else leaf
        leaf = np.zeros(grid) if leaf is None else np.asarray(leaf)
        for axis, (n, size) in enumerate(zip(q.shape, q.block, strict=True)):
            leaf = leaf.repeat(n if size is None else size, axis=axis).take(range(n), axis=axis)
        return leaf

    parts = (numbers, of_blocks(q.zero_point), of_blocks(q.scales), of_blocks(q.offset))
    return [
        (Fraction(float(n)) - Fraction(float(z))) * Fraction(float(s)) + Fraction(float(o))
        for n, z, s, o in zip(*(part.ravel().tolist() for part in parts), strict=True)
    ]


def held(made, q):
    """``made``, which stands for the same numbers."""
    assert exact_values(made) == exact_values(q)
    assert made.backend == q.backend
    return made


@pytest.mark.parametrize("bits", [3, 4, 8, 16])
def test_signed_and_unsigned_integers(bits, backend):
    q = quantize(backend.asarray(X), f"uint{bits}", scheme="affine", granularity=ROWS)
    signed = held(convert(q, f"int{bits}"), q)
    np.testing.assert_array_equal(
        backend.to_numpy(signed.qvalue).astype(int), backend.to_numpy(q.qvalue).astype(int) - (1 << (bits - 1))
    )
    assert_same_bits(convert(signed, f"uint{bits}"), q)
    assert_same_bits(signed.dequantize(), q.dequantize())
    symmetric = quantize(backend.asarray(X), f"int{bits}", granularity=ROWS)
    assert_same_bits(convert(symmetric, f"uint{bits}").dequantize(), symmetric.dequantize())


def test_integers_of_another_width():
    q = quantize(X, "int4", granularity=ROWS)
    assert held(convert(q, "int8"), q).nbytes > q.nbytes
    assert_same_bits(convert(convert(q, "int8"), "int4"), q)
    held(convert(q, "uint16"), q)
    with pytest.raises(
        ValueError, match=r"dtype='int3': \d+ of the 15 codes of int4 that occur have no code in it, the fir"
    ):
        convert(q, "int3")
    u = QArray.from_codes(np.asarray([1, 2], "uint8"), 0.5, 200)
    with pytest.raises(ValueError, match="dtype='uint4': 1 of 1 zero points have no code in it, the first 200"):
        convert(u, "uint4")


@pytest.mark.parametrize(
    ("old", "new"),
    [("float4_e2m1fn", "int8"), ("mxfp4", "int8"), ("mxint8", "int8"), ("iq4_nl", "int8"), ("float6_e2m3fn", "uint8"),
     ("ternary", "int2"), ("float4_e2m1fn", "float8_e4m3fn"), ("float6_e3m2fn", "float8_e5m2"),
     ("int4", "float8_e4m3fn"), ("mxfp4", "float4_e2m1fn"), ("nvfp4", "float4_e2m1fn"),
     ("float8_e4m3fnuz", "float8_e5m2fnuz")],
)  # fmt: skip
def test_formats_whose_numbers_another_has(old, new, backend):
    if old.startswith("float8"):  # numbers that are in both
        q = quantize(backend.asarray((2.0 ** np.round(X)).astype(np.float32)), old, scale=1.0)
    else:
        q = quantize(backend.asarray(X), old)
    made = held(convert(q, new), q)
    assert made.dtype == new
    np.testing.assert_array_equal(backend.to_numpy(made.dequantize()), backend.to_numpy(q.dequantize()))


def test_formats_whose_numbers_another_has_not():
    for old, new in (("nf4", "int8"), ("float8_e4m3fn", "int8"), ("float8_e4m3fn", "float4_e2m1fn"), ("int8", "nf4")):
        with pytest.raises(ValueError, match=f"dtype='{new}': .* codes of {old} that occur have no code in it"):
            convert(quantize(X, old), new)
    with pytest.raises(ValueError, match="int8 has zero points here, which float8_e4m3fn has not"):
        convert(quantize(X + 1, "int8", scheme="affine"), "float8_e4m3fn")
    with pytest.raises(ValueError, match="kept in float8_e4m3fn, with scales of their own, and would change: give"):
        convert(quantize(X, "nvfp4"), "int8")
    q = quantize(X, "nvfp4")
    held(convert(q, "int8", scale_dtype="float32"), q)


def test_blocks_of_another_size(backend):
    q = quantize(backend.asarray(X), "int4", granularity=PerGroup(32))
    for granularity in (PerGroup(16), PerGroup(8), PerBlock((1, 32)), PerGroup(32)):
        made = held(convert(q, granularity=granularity), q)
        assert made.granularity in (granularity, PerGroup(32))
        assert_same_bits(made.dequantize(), q.dequantize())
        assert_same_bits(convert(made, granularity=PerGroup(32)), q)  # where all are equal they can be joined again
    with pytest.raises(
        ValueError, match=r"granularity=PerChannel\(axis=0\): \d+ scales of PerGroup\(size=32, axis=-1\) differ"
    ):
        convert(q, granularity=ROWS)
    columns = quantize(backend.asarray(X), granularity=PerTensor())
    held(convert(columns, granularity=PerChannel(1)), columns)
    ragged = quantize(backend.asarray(X[:, :50]), "uint4", scheme="affine", granularity=PerGroup(32))
    held(convert(ragged, granularity=PerGroup(16)), ragged)
    kept = quantize(backend.asarray(X), "mxfp4")
    assert held(convert(kept, granularity=PerGroup(16)), kept).scale.dtype == "float8_e8m0fnu"


def test_scales_of_fewer_bits(backend):
    q = quantize(backend.asarray(X), "int8", granularity=ROWS, scale_dtype="bfloat16")
    plain = held(convert(q, scale_dtype="float32"), q)
    assert not isinstance(plain.scale, QArray)
    assert_same_bits(convert(plain, scale_dtype="bfloat16"), q)
    with pytest.raises(ValueError, match=r"scale_dtype='float8_e8m0fnu': scale=.* is no number of float8_e8m0fnu"):
        convert(plain, scale_dtype="float8_e8m0fnu")
    with pytest.raises(ValueError, match=r"scale_dtype='int8': .* need a scale themselves"):
        convert(plain, scale_dtype="int8")


def test_offsets_and_zero_points(backend):
    scale = np.asarray([[0.5], [0.25]], np.float32)  # few bits: products with zero points are exact
    q = QArray.from_codes(
        backend.asarray(np.asarray([[0, 7, 15], [3, 4, 5]], np.uint8)), backend.asarray(scale),
        backend.asarray(np.asarray([[8], [3]], np.int32)), dtype="uint4", granularity=ROWS,
    )  # fmt: skip
    made = held(convert(q, offset=True), q)
    assert made.zero_point is None
    np.testing.assert_array_equal(backend.to_numpy(made.offset), [[-4.0], [-0.75]])
    assert_same_bits(made.dequantize(), q.dequantize())
    assert_same_bits(convert(made, offset=False), q)
    with pytest.raises(ValueError, match="dtype='int4': uint4 has offsets here, and would need zero points as well"):
        convert(made, "int4")
    four = quantize(backend.asarray(X), "float4_e2m1fn", offset="data", granularity=ROWS)
    held(convert(four, "int8"), four)
    with pytest.raises(ValueError, match="float4_e2m1fn has offsets here, and would need zero points as well"):
        convert(four, "uint8")
    data = quantize(backend.asarray(X), "uint4", offset="data", granularity=ROWS)
    with pytest.raises(ValueError, match="offset=False: 16 of 16 offsets are no code of uint4 times their scale"):
        convert(data, offset=False)
    third = quantize(backend.asarray(X), "uint16", scheme="affine", granularity=ROWS)
    with pytest.raises(ValueError, match=r"offset=True: \d+ of 16 offsets are no numbers of float32, the first"):
        convert(third, offset=True)
    with pytest.raises(ValueError, match="offset=False: nf4 has no zero points"):
        convert(quantize(backend.asarray(X), "nf4", offset="data"), offset=False)


def test_what_a_library_stores():
    u4 = quantize(X, "uint4", scheme="affine", granularity=ROWS)
    for name, dtype in (
        ("tflite", "int4"),
        ("torch", "uint8"),
        ("onnx", "uint4"),
        ("aqt_lite", "uint4"),
        ("qwix", "int4"),
    ):
        made = held(convert(u4, dialect=name), u4)
        assert made.dtype == dtype, name
    symmetric = quantize(X, "uint8", granularity=ROWS)
    assert held(convert(symmetric, dialect="tflite"), symmetric).zero_point is None
    assert held(convert(quantize(X, "mxfp4"), dialect="onnx"), quantize(X, "mxfp4")).dtype == "float4_e2m1fn"
    with pytest.raises(ValueError, match=r"dialect='quanto' stores .*, and none holds this nf4 exactly; dtype="):
        convert(quantize(X, "nf4"), dialect="quanto")
    with pytest.raises(ValueError, match="dialect='aqt' stores no such formats"):
        convert(u4, dialect="aqt")
    with pytest.raises(ValueError, match="dialect='quanto' does not store int4: it has int8"):
        convert(quantize(X, "int8"), "int4", dialect="quanto")
    with pytest.raises(ValueError, match="keeps plain scales and zero points: leave scale_dtype and offset out"):
        convert(u4, dialect="onnx", offset=True)
    with pytest.raises(ValueError, match="dialect='gguf' stores blocks of its own: quantize the floats with it"):
        convert(u4, dialect="gguf")
    stored = quantize(X, "q8_0", dialect="gguf")
    assert convert(stored, dialect="gguf") is stored


def test_layouts_in_memory_are_kept():
    q = quantize(X, "int4", granularity=ROWS)
    assert convert(q, "uint4").packed_length == 64
    assert convert(q.unpacked(), "uint4").packed_length is None
    turned = convert(q.for_dense(), "uint4")
    assert turned.transposed
    held(turned, q)
    assert convert(q.with_trainable_scales(), "uint4").trainable


@pytest.mark.parametrize("x", [np.float32(3.5), np.zeros((0, 4), np.float32), np.zeros((2, 8), np.float32)], ids=str)
def test_no_dimensions_no_elements_zeros(x):
    q = quantize(np.asarray(x), "int4")
    made = held(convert(q, "uint8"), q)
    assert_same_bits(made.dequantize(), q.dequantize())
    held(convert(q, granularity=PerTensor(), scale_dtype="float32"), q)


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_every_pair_of_formats_is_exact_or_refused(every):
    """No pair gives other numbers in silence, and none breaks."""
    refused = []
    for old, new in list(itertools.product(FORMATS, FORMATS))[::every]:
        q = quantize(X[:2, :32], old, **({"scheme": "affine"} if old.startswith("uint") else {}))
        try:
            held(convert(q, new), q)
        except ValueError as error:
            refused.append(str(error))
    assert 0 < len(refused) < (len(FORMATS) ** 2 - len(FORMATS)) // every
    assert all("dtype=" in words or "scale" in words for words in refused)


def test_what_is_refused():
    with pytest.raises(TypeError, match="q is a ndarray, not a QArray"):
        convert(X, "int8")
    with pytest.raises(ValueError, match="dialect='torchy' is not known"):
        convert(quantize(X), dialect="torchy")
    with pytest.raises(ValueError, match="q is an array of float8_e8m0fnu, whose numbers have no scale"):
        convert(quantize(X, "mxfp4").scale, "int8")
    with pytest.raises(TypeError, match="convert needs values, but q is being traced"):
        jax.jit(lambda q: convert(q, "uint8"))(quantize(jnp.asarray(X)))


def test_dialects_store_what_they_make():
    for d in (d for d in DIALECTS.values() if d.whole is None):
        known = d.formats("symmetric")
        for form in ("int8",) if known is None else (*known[:3], *known[-1:]):
            q = quantize(X, form, granularity=None if FORMATS[form].scale else ROWS, dialect=d)
            assert_same_bits(convert(q, dialect=d).dequantize(), q.dequantize())
            assert compare(convert(q, dialect=d), q).equal
        for form in d.offsets[:1]:
            q = quantize(X, form, granularity=ROWS, offset="data", dialect=d)
            assert compare(convert(q, dialect=d), q).equal


def test_the_conventions_of_stored_weights_with_each_other():
    """What files of one library are in another's terms: exact, or refused with the reason."""
    for block_type, plain in (("q4_0", "int4"), ("q8_0", "int8")):  # ggml's blocks and integers in groups of 32
        q = quantize(X, block_type, dialect="gguf")
        made = held(convert(q, plain), q)
        assert (made.dtype, made.granularity, made.scale.dtype) == (plain, PerGroup(32), "float16")
        again = convert(made, block_type)
        assert bytes(again.to_bytes("gguf")) == bytes(q.to_bytes("gguf"))
    for block_type, plain in (("q6_k", "int6"), ("q4_k", "uint4"), ("iq4_xs", "iq4_nl")):  # scales of scales
        q = quantize(X.reshape(4, 256), block_type, dialect="gguf")
        again = convert(held(convert(q, plain), q), block_type)
        assert bytes(again.to_bytes("gguf")) == bytes(q.to_bytes("gguf"))
        assert held(convert(q, plain, scale_dtype="float32"), q).scale.dtype == np.float32
    four = quantize(X, "int4", granularity=PerGroup(32), scale_dtype="float16")
    assert held(convert(four, "q4_0"), four).to_bytes("q4_0").shape == (16, 36)

    columns = quantize(X, "uint4", scheme="affine", granularity=PerGroup(16, 0))  # as GPTQ and AWQ have them: (in, out)
    second = columns.to_bytes("gptq")  # codes are the same in both versions of GPTQ, zero points 1 less in the first
    zeros = QArray.from_codes(
        np.asarray(columns.zero_point).astype(np.uint8), 1.0, 0, dtype="uint4", granularity=PerTensor()
    )
    first = np.asarray(zeros.to_bytes("gptq_zeros"))
    read = QArray.from_bytes(first, "gptq_zeros", zeros.shape, scale=1.0, zero_point=0, dtype="uint4")
    np.testing.assert_array_equal(read.qvalue, zeros.qvalue)
    assert (np.asarray(first)[0, 0] & 15) == zeros.qvalue[0, 0] - 1
    awq = columns.to_bytes("awq")
    how = {"scale": columns.scale, "zero_point": columns.zero_point, "granularity": PerGroup(16, 0), "dtype": "uint4"}
    for data, layout in ((second, "gptq"), (awq, "awq")):
        assert_same_bits(QArray.from_bytes(data, layout, columns.shape, **how), columns)

    scale = np.full((16, 2), 0.25, np.float32)  # MLX: an offset for each group, here a whole number of scales
    mlx = QArray.from_codes(
        np.random.default_rng(0).integers(0, 16, (16, 64)).astype(np.uint8), scale, offset=scale * -7, dtype="uint4",
        granularity=PerGroup(32),
    )  # fmt: skip
    affine = held(convert(mlx, offset=False), mlx)
    assert (affine.zero_point == 7).all()
    assert_same_bits(convert(affine, offset=True), mlx)


def test_nvfp4_of_libraries_with_each_other():
    two = quantize(X, "nvfp4", dialect="torchao")
    plain = held(convert(two, scale_dtype="float32"), two)
    assert_same_bits(plain.dequantize(), two.dequantize())
    with pytest.raises(ValueError, match="scale_dtype='float8_e4m3fn'"):  # products with the tensor scale are no e4m3
        convert(two, scale_dtype="float8_e4m3fn")
    one = quantize(X, "nvfp4", dialect="torchao_no_tensor_scale")
    with_one = QArray.from_codes(one.qvalue, one.scale.qvalue, tensor_scale=1.0, dtype="nvfp4")
    assert_same_bits(with_one.dequantize(), one.dequantize())
    assert_same_bits(convert(with_one, scale_dtype="float8_e4m3fn"), one)
    inverse = QArray.from_codes(  # a power of two: its reciprocal is exact
        one.qvalue, one.scale.qvalue, tensor_scale=4.0, dtype="nvfp4", dialect="compressed-tensors"
    )
    assert_same_bits(inverse.dequantize(), one.dequantize() / 4)
