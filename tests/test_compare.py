"""Pairs that were made wrong on purpose are told apart by name; what no convention explains is not explained."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from optional import jax, jnp, needs, torch
from oracles import dialects as golden

import aqt_lite
from aqt_lite import Dialect, PerChannel, PerGroup, PerTensor, QArray, compare, convert, quantize
from aqt_lite._registry import get_backend
from aqt_lite.dialects import DIALECTS
from aqt_lite.formats import FORMATS
from aqt_lite.hypotheses import HYPOTHESES
from aqt_lite.packing import unpack
from aqt_lite.testing import assert_same

NUMPY = get_backend("numpy")
RNG = np.random.default_rng(7)
X = (RNG.standard_normal((64, 96)) * np.exp(RNG.standard_normal((64, 1)))).astype(np.float32)
SQUARE = np.ascontiguousarray(X[:, :64])
ROWS = PerChannel(0)


def codes(*shape, low=0, high=16, seed=0):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.uint8)


def of_codes(array, dtype="uint4", granularity=ROWS, scale=None, zero_point=None, **how):
    """A QArray with scales and zero points of all kinds."""
    rng = np.random.default_rng(1)
    grid = aqt_lite.granularity.grid_of(array.shape, aqt_lite.granularity.block_of(granularity, array.ndim))
    scale = rng.uniform(0.01, 0.2, grid).astype(np.float32) if scale is None else scale
    zero = rng.integers(3, 12, grid).astype(np.int32) if zero_point is None else zero_point
    return QArray.from_codes(array, scale, zero, dtype=dtype, granularity=granularity, **how)


def awq_read(a, axis=-1):
    """What a reader that does not know AWQ's order gets of eight codes in a word."""
    a = np.moveaxis(a, axis, -1)
    words = a.reshape(*a.shape[:-1], -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return np.ascontiguousarray(np.moveaxis(words.reshape(a.shape), -1, axis))


def through_bytes(a):
    """4-bit codes packed with the first in the upper half of a byte, read with the first in the lower."""
    stored = (a[..., ::2].astype(np.int64) << 4 | a[..., 1::2]).astype(np.uint8)
    return unpack(stored, bits=4, length=a.shape[-1], signed=False, b=NUMPY)


def halves_read(a, block=32):
    """ggml's blocks: byte j holds codes j and j + block/2; read as if they were neighbours."""
    parts = a.reshape(*a.shape[:-1], -1, block)
    stored = parts[..., : block // 2] | (parts[..., block // 2 :].astype(np.int64) << 4)
    stored = stored.astype(np.uint8).reshape(*a.shape[:-1], -1)
    return unpack(stored, bits=4, length=a.shape[-1], signed=False, b=NUMPY)


def words_read(a, bits):
    """32 // bits codes in a word, as GPTQ-like writers have them; read as a dense stream."""
    count = 32 // bits
    filled = np.pad(a.astype(np.uint64), ((0, 0), (0, -a.shape[-1] % count))).reshape(len(a), -1, count)
    words = (filled << (np.arange(count, dtype=np.uint64) * np.uint64(bits))).sum(-1).astype("<u4")
    return unpack(words.view(np.uint8), bits=bits, length=a.shape[-1], signed=False, b=NUMPY)


def read_as(q, array):
    """The same scales and zero points with other codes."""
    return QArray.from_codes(
        array.astype(q.qvalue.dtype), q.scale, q.zero_point, dtype=q.dtype, granularity=q.granularity
    )


def with_scale(q, scale):
    """The same codes with other scales."""
    return QArray.from_codes(q.qvalue, scale, q.zero_point, dtype=q.dtype, granularity=q.granularity)


def wrong_axes():
    q, square = quantize(X, granularity=ROWS), quantize(SQUARE, granularity=ROWS)
    yield "transposed", q, quantize(X.T.copy(), granularity=PerChannel(1))
    yield "codes transposed", square, read_as(square, square.qvalue.T)
    cube = X.reshape(4, 16, 96)
    yield "axes reversed", quantize(cube), quantize(cube.transpose(2, 1, 0).copy())
    kernel = X.reshape(2, 4, 8, 96)
    for name, order in (("HWIO for OIHW", (3, 2, 0, 1)), ("HWIO for OHWI", (3, 0, 1, 2))):
        other = quantize(kernel.transpose(order).copy(), granularity=PerChannel(0))
        yield f"kernel axes {name}", quantize(kernel, granularity=PerChannel(3)), other
    first = quantize(kernel.transpose(3, 2, 0, 1).copy(), granularity=PerChannel(0))
    yield "reshaped", first, quantize(kernel.transpose(3, 2, 0, 1).reshape(96, 64), granularity=PerChannel(0))
    rows = quantize(kernel.transpose(3, 0, 1, 2).reshape(96, 64), granularity=PerChannel(0))
    yield "kernel axes OIHW for OHWI and reshaped", rows, first
    columns = QArray.from_codes(square.qvalue, square.scale.reshape(1, 64), granularity=PerChannel(1))
    yield "axis of scales", square, columns
    groups = quantize(SQUARE, granularity=PerGroup(32))
    turned = QArray.from_codes(groups.qvalue, groups.scale.T.copy(), granularity=PerGroup(32, 0))
    yield "axis of scales, transposed", groups, turned
    repeated = QArray.from_codes(groups.qvalue, groups.scale.repeat(2, axis=1), granularity=PerGroup(16))
    yield "size of groups", groups, repeated
    yield "size of groups", repeated, groups


def wrong_codes():
    u = quantize(X, "uint8", scheme="affine", granularity=ROWS)
    u = replace(u, zero_point=np.clip(u.zero_point, 100, 150))
    signed = (u.qvalue.astype(int) - 128).astype(np.int8)
    yield "signed and unsigned codes", u, QArray.from_codes(signed, u.scale, u.zero_point - 128, granularity=ROWS)
    q4 = of_codes(codes(64, 96))
    yield (
        "signed and unsigned codes",
        of_codes((q4.qvalue.astype(int) - 8).astype(np.int8), "int4", zero_point=q4.zero_point - 8),
        q4,
    )
    zeros = np.zeros((64, 1), np.int32)
    yield (
        "signed and unsigned codes, zero points as they are",
        QArray.from_codes(u.qvalue, u.scale, zeros, granularity=ROWS),
        QArray.from_codes(signed, u.scale, granularity=ROWS),
    )
    q = quantize(X, granularity=ROWS)
    yield (
        "bits of signed codes read as unsigned",
        q,
        QArray.from_codes(q.qvalue.view(np.uint8), q.scale, zeros, granularity=ROWS),
    )
    yield "zero points moved", u, replace(u, zero_point=u.zero_point + 1)
    yield "zero points moved", replace(u, zero_point=u.zero_point - 5), u
    low = of_codes(codes(64, 96, low=1, high=14))
    moved = of_codes(low.qvalue + np.uint8(1), zero_point=low.zero_point + 1)
    yield "codes and zero points moved", low, moved
    yield "codes moved by one", low, read_as(low, low.qvalue + 1)
    yield "zero points left out", u, replace(u, zero_point=zeros)
    offset = (-u.zero_point * u.scale).astype(np.float32)
    yield "offset for zero point", u, QArray.from_codes(u.qvalue, u.scale, offset=offset, granularity=ROWS)
    yield "sign of codes", q, read_as(q, -q.qvalue)
    yield "sign of codes and scales", q, (-q.qvalue, -q.scale)
    e4m3 = quantize(X, "float8_e4m3fn", granularity=ROWS)
    fnuz = QArray.from_codes(
        np.where(e4m3.qvalue == 0x80, 0, e4m3.qvalue), e4m3.scale, dtype="float8_e4m3fnuz", granularity=ROWS
    )
    plain = QArray.from_codes(fnuz.qvalue, e4m3.scale, dtype="float8_e4m3fn", granularity=ROWS)
    yield "format", plain, fnuz


def wrong_scales():
    q, nv = quantize(X, granularity=ROWS), quantize(X, "nvfp4")
    yield "inverse scale", q, with_scale(q, 1 / q.scale)
    yield "scales in float16", q, with_scale(q, q.scale.astype(np.float16))
    yield "scales in bfloat16", q, with_scale(q, q.scale.astype(ml_dtypes.bfloat16))
    cut = (q.scale.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    yield "scales cut to bfloat16", q, with_scale(q, cut)
    numbers = nv.scale.qvalue.view(ml_dtypes.float8_e4m3fn)
    yield "factor of scales", nv, (nv.qvalue, numbers)
    yield "factor of scales", nv, (nv.qvalue, numbers.astype(np.float32) / nv.scale.scale)
    yield "factor of scales", q, with_scale(q, q.scale * np.float32(127) / np.float32(127.5))
    yield "factor of scales", q, with_scale(q, q.scale * np.float32(0.3))


def wrong_orders():
    q = of_codes(codes(64, 96))
    yield "order of codes in a byte, along the last axis", q, read_as(q, through_bytes(q.qvalue))
    columns = read_as(q, through_bytes(q.qvalue.T).T)
    yield "order of codes in a byte, along the last axis but one", q, columns
    yield "halves of blocks of 32, along the last axis", q, read_as(q, halves_read(q.qvalue))
    yield "halves of blocks of 32, along the last axis", read_as(q, halves_read(q.qvalue)), q
    yield "halves of the whole axis, along the last axis", q, read_as(q, halves_read(q.qvalue, 96))
    yield "order of AWQ, codes, along the last axis", q, read_as(q, awq_read(q.qvalue))
    groups = of_codes(codes(64, 96), granularity=PerGroup(32, 0))
    both = of_codes(
        awq_read(groups.qvalue), granularity=PerGroup(32, 0), scale=groups.scale, zero_point=awq_read(groups.zero_point)
    )
    yield "order of AWQ, codes and zero points, along the last axis", groups, both
    for bits in (3, 5, 6, 7):
        q = of_codes(codes(64, 100, high=1 << bits), f"uint{bits}", zero_point=np.full((64, 1), 2, np.int32))
        yield "codes across words, along the last axis", q, read_as(q, words_read(q.qvalue, bits))
        yield "codes across words, along the last axis", read_as(q, words_read(q.qvalue, bits)), q
    for name, bits in (("gptq_p", 3), ("gptq_p", 6), ("hqq", 3), ("hqq", 4)):
        q = of_codes(codes(60, 96, high=1 << bits).T, f"uint{bits}", zero_point=np.full((96, 1), 2, np.int32))
        rows = np.moveaxis(q.to_bytes(name), 0, -1).copy().view(np.uint8)[:, : 96 * bits // 8]
        read = unpack(rows, bits=bits, length=96, signed=False, b=NUMPY)
        yield f"layout {name}", q, read_as(q, read.T)
    three = of_codes(codes(64, 96, high=8), "uint3", zero_point=np.full((64, 1), 2, np.int32))
    stream = np.unpackbits(three.storage, axis=-1, bitorder="big").reshape(64, 96, 3) @ [4, 2, 1]
    yield "order of bits, along the last axis", three, read_as(three, stream)


def wrong_rows():
    q = quantize(SQUARE, granularity=PerGroup(32))
    index = np.arange(64).reshape(2, 32).T.ravel()  # what is converted for ggml
    turns = QArray.from_codes(q.qvalue[index], q.scale[index], granularity=PerGroup(32))
    yield "rotary rows, heads of 64", q, turns
    yield "rotary rows, heads of 64", turns, q


def wrong_in_two_ways():
    q, square = of_codes(codes(64, 96)), of_codes(codes(64, 64))
    nibbles = "order of codes in a byte, along the last axis"
    yield f"transposed and {nibbles} but one", of_codes(codes(64, 96).T, granularity=PerChannel(1), scale=q.scale.T,
        zero_point=q.zero_point.T), read_as(q, through_bytes(q.qvalue))  # fmt: skip
    turned = QArray.from_codes(
        np.ascontiguousarray(awq_read(square.qvalue).T), square.scale.T, square.zero_point.T, dtype="uint4",
        granularity=PerChannel(1),
    )  # fmt: skip
    yield "transposed and order of AWQ, codes, along the last axis", square, turned
    as_signed = (awq_read(q.qvalue).astype(int) - 8).astype(np.int8)
    yield (
        "signed and unsigned codes and order of AWQ, codes, along the last axis",
        q,
        of_codes(as_signed, "int4", zero_point=q.zero_point - 8),
    )
    off = of_codes(q.qvalue, scale=q.scale.astype(np.float16), zero_point=q.zero_point + 1)
    yield "zero points moved and scales in float16", q, off


PAIRS = [
    pair
    for made in (wrong_axes, wrong_codes, wrong_scales, wrong_orders, wrong_rows, wrong_in_two_ways)
    for pair in made()
]


@pytest.mark.parametrize(("name", "a", "b"), PAIRS, ids=[f"{i}-{name}" for i, (name, _, _) in enumerate(PAIRS)])
def test_what_was_made_wrong_is_named(name, a, b):
    found = compare(a, b)
    assert not found.equal
    assert found.explanation is not None, str(found)
    assert found.explanation.name == name, str(found)
    assert found.explanation.complete
    assert found.explanation.leaves == "nothing"
    assert found.nearest == ()
    again = compare(b, a)  # the other way round it is the same
    assert again.explanation is not None, str(again)
    assert again.codes_that_differ == found.codes_that_differ


def test_every_hypothesis_is_met_by_a_pair():
    """But for records of the same functions: another axis, another length of words and blocks."""
    met = " and ".join(name for name, _, _ in PAIRS)
    same = (
        "order of codes in a word",
        *(f"halves of blocks of {n}" for n in (64, 128, 256)),
        "order of AWQ, codes, zero",
        "kernel axes",
        "rotary rows",
    )
    for h in HYPOTHESES:
        assert h.name.removesuffix(" but one") in met or h.name.startswith((*same, "layout ")), h.name


# ---- from floats


def scheme_of(q):
    return "symmetric" if q.zero_point is None or (q.zero_point == q._element.middle).all() else "affine"


def of_dialects():
    """(name of a dialect, what it makes of X), in either scheme."""
    for d in DIALECTS.values():
        for scheme, granularity, otherwise in (("symmetric", ROWS, "int8"), ("affine", PerGroup(32), "uint8")):
            known = d.formats(scheme)
            how = {"scheme": scheme, "granularity": granularity} if d.whole is None else {}
            if known != ():
                form = otherwise if known is None or otherwise in known else known[0]
                yield d.name, quantize(X, form, **how, dialect=d)


@pytest.mark.parametrize(("name", "q"), list(of_dialects()), ids=lambda v: v if isinstance(v, str) else v.dtype)
def test_a_dialect_is_recognized(name, q):
    found = compare(q, X)
    if found.equal:  # on these numbers
        assert_same(quantize(X, q.dtype, scheme=scheme_of(q), granularity=q.granularity), q)
    else:
        assert found.explanation is not None, str(found)
        assert name in (found.explanation.name, *found.explanation.also), str(found)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("torchao", "nvfp4"), ("compressed-tensors", "nvfp4"), ("qwix", "nvfp4"), ("qwix", "mxfp4"), ("qwix", "nf4"),
     ("bitsandbytes", "bnb_fp4"), ("torchao_tinygemm", "int4")],
)  # fmt: skip
def test_a_dialect_that_makes_codes_and_scales_together_is_recognized(name, dtype):
    how = {"offset": "data", "granularity": PerGroup(32)} if DIALECTS[name].offsets else {}
    x = X if FORMATS[dtype].scale or how else X.reshape(-1)[:1000]
    how = how or {} if FORMATS[dtype].scale else {"granularity": PerGroup(64), **how}
    q = quantize(x, dtype, dialect=name, **how)
    found = compare(q, x)
    if name == "qwix" and dtype == "nf4":  # other codes at midpoints alone
        assert found.equal
    else:
        assert found.explanation is not None, str(found)
        assert name in (found.explanation.name, *found.explanation.also), str(found)


def test_a_dialect_is_recognized_in_codes_of_other_libraries():
    """Golden vectors that the originals made."""
    vectors = np.load(golden.FILE)
    known = {n: [c for c in golden.cases(n) if c[1] != "offsets"] for n in DIALECTS if n in golden.ORIGINALS}
    cases = {n: [c for c in found if c[0] in ("int8", "uint8")] for n, found in known.items()}
    assert sum(map(bool, cases.values())) >= 9
    for name, (dtype, scheme) in ((name, found[0]) for name, found in cases.items() if found):
        x = vectors["x/8"]
        c, scale, zero = (vectors[f"{name}/{dtype}/{scheme}/{part}"] for part in ("codes", "scale", "zero_point"))
        usable = scale != 0  # where the original has no scale for zeros, it has no value for them
        parts = (c[usable], scale[usable][:, None], zero[usable][:, None])
        found = compare(parts, x[usable])
        if found.equal:  # its codes differ from this library's at few ties, and at none of these
            assert name == "bitsandbytes"
            continue
        assert found.explanation is not None, str(found)
        assert name in (found.explanation.name, *found.explanation.also), str(found)


def test_negative_scales_and_offsets_of_a_dialect_are_recognized():
    for name, how in (("onnxruntime", {}), ("mlx", {"offset": "data"})):
        q = quantize(X, "uint4", granularity=PerGroup(32), dialect=name, **how)
        assert (q.scale < 0).any()
        found = compare(q, X)
        assert found.explanation is not None, str(found)
        assert name in (found.explanation.name, *found.explanation.also), str(found)
        assert_same(convert(q, dialect=name), q)


FIELDS = {  # what is said of a dialect that is as this library's but for these fields
    "aqt": {"reach": "half range"},
    "torchao_no_clipping, divides_range=False": {"reach": "each side", "narrow_from": None},
    "qwix": {"narrow_from": None, "reach": "half range"},
    "torch_per_token": {"divides_range": True},
    "aqt_lite, divides=True": {"divides": True},
    "aqt_lite, zero_first=True": {"zero_first": True},
    "aqt_lite, divides=True, zero_first=True": {"zero_first": True, "divides": True},
}


@pytest.mark.parametrize("said", FIELDS)
def test_a_dialect_that_differs_in_a_field_is_recognized(said):
    x = golden.rows("int8", 11)  # with values next to ties of each convention
    x = x[np.abs(x).max(1) > 1e-20]
    fields = FIELDS[said]
    scheme, form = ("affine", "uint8") if "zero_first" in fields else ("symmetric", "int8")
    q = quantize(x, form, scheme=scheme, granularity=ROWS, dialect=Dialect("mine", **fields))
    found = compare(q, x)
    assert not found.equal
    assert found.explanation is not None, str(found)
    assert found.explanation.name == said


@pytest.mark.parametrize("rounding", ["half_away", "toward_zero"])
def test_a_rounding_is_recognized(rounding):
    x = (np.arange(-254, 255) / 2).astype(np.float32)  # the scale is 1
    q = quantize(x, rounding=rounding)
    found = compare(q, x)
    assert found.explanation.name == f"aqt_lite, rounding='{rounding}'", str(found)
    assert found.at_ties == (found.codes_that_differ if rounding == "half_away" else found.at_ties) > 0


def test_two_changes_of_rules_are_recognized():
    x = golden.rows("int8", 11)
    x = x[np.abs(x).max(1) > 1e-20]
    q = quantize(x, granularity=ROWS, rounding="toward_zero", dialect=Dialect("mine", divides_range=True))
    assert compare(q, x).explanation.name == "torch_per_token, rounding='toward_zero'"


@pytest.mark.parametrize("mode", ["ceil", "even", "rceil"])
@pytest.mark.parametrize("dtype", ["mxfp4", "mxfp8_e4m3"])
def test_a_mode_of_scales_is_recognized(mode, dtype):
    found = compare(quantize(X, dtype, scale_mode=mode), X)
    assert f"scale_mode {mode}" in (found.explanation.name, *found.explanation.also), str(found)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e8m0fnu"])
def test_scales_that_this_library_keeps_in_few_bits_are_recognized(dtype):
    q = quantize(X, granularity=PerGroup(32), scale_dtype=dtype)
    assert compare(q, X).equal
    assert compare((q.qvalue, q.scales), X).explanation.name == f"scale_dtype {dtype}"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("first", [True, False])
def test_scales_of_sixteen_bits_are_recognized(dtype, first):
    q = quantize(X, granularity=PerGroup(32))
    scale = q.scale.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)
    made = quantize(X, granularity=PerGroup(32), scale=scale) if first else with_scale(q, scale)
    found = compare(made, X)
    when = "before codes are made" if first else "after codes were made"
    assert found.explanation.name == f"aqt_lite, scales in {dtype} {when}", str(found)


def test_both_arrays_are_explained_by_the_floats():
    a, b = (quantize(X, granularity=ROWS, dialect=d) for d in ("torch", "onnx"))
    assert compare(a, b).explanation is None
    found = compare(a, b, x=X)
    assert found.explanation.name == "a: torch, b: onnx", str(found)
    assert "a is what dialect 'torch' makes of x; b is what dialect 'onnx' makes of x" in str(found)
    assert "b: quanto" in found.explanation.also
    blocks = compare(quantize(X, granularity=PerGroup(32)), quantize(X, granularity=PerGroup(48)), x=X)
    assert blocks.explanation.says.endswith("each in blocks of its own")
    assert compare(a, a, x=X).equal
    half = compare(a, of_codes(codes(64, 96, high=200), "uint8"), x=X)  # only one of them is explained
    assert half.explanation is None
    assert half.nearest[0].name == "torch"
    assert half.nearest[0].leaves == "how b was made"


def test_floats_of_another_layout():
    """A weight (out, in), and codes of a library that keeps (in, out)."""
    x = X[:48]
    q = quantize(x.T.copy(), granularity=PerChannel(1), dialect="torch")
    found = compare((q.qvalue, q.scale), x)
    assert found.explanation.name == "transposed and torch", str(found)
    assert found.codes_that_differ is None
    torch_like = quantize(x.T.copy(), granularity=PerChannel(1), dialect="onnx")
    both = compare(q, torch_like, x=x)  # neither of its shape
    assert both.explanation.name == "a: transposed and torch, b: transposed and onnx", str(both)
    square = quantize(SQUARE.T.copy(), granularity=PerChannel(1), dialect="tflite")
    assert compare(square, SQUARE).explanation.name.startswith("transposed and "), str(compare(square, SQUARE))
    off = QArray.from_codes(square.qvalue, square.scale.reshape(64, 1), granularity=ROWS)
    assert compare(off, SQUARE.T.copy()).explanation.name.startswith("axis of scales and "), str(compare(off, SQUARE.T))


def test_codes_in_another_order_than_the_floats():
    q = quantize(X, "uint4", scheme="affine", granularity=ROWS, dialect="torchao")
    found = compare(read_as(q, awq_read(q.qvalue)), X)
    assert "order of AWQ, codes, along the last axis" in found.explanation.name, str(found)
    signed = QArray.from_codes((q.qvalue.astype(int) - 8).astype(np.int8), q.scale, q.zero_point - 8, dtype="int4",
                               granularity=ROWS)  # fmt: skip
    assert compare(signed, X).explanation.complete


def test_codes_of_scales_that_no_rule_chose():
    scale = RNG.uniform(0.02, 0.1, (64, 1)).astype(np.float32)
    found = compare(quantize(X, granularity=ROWS, scale=scale, on_clip="saturate"), X)
    assert found.explanation is None
    assert found.nearest[0].name.startswith("codes of given scales: x * (1 / scale), rounded half_even")
    assert found.nearest[0].leaves == "which rule chose the scales"
    assert found.nearest[0].codes_that_differ == 0


# ---- what is equal, and what is not explained


@pytest.mark.parametrize("dtype", ["int8", "int4", "uint3", "nf4", "float8_e4m3fn", "mxfp4", "nvfp4", "ternary"])
def test_equal_arrays_are_equal(dtype, backend):
    q = quantize(X, dtype, **({"scheme": "affine"} if dtype[0] == "u" else {}))
    found = compare(q.to_backend(backend.name), q.copy())
    assert found.equal
    assert found.explanation is None
    assert str(found).startswith("Equal: the same codes")
    assert (found.codes_that_differ, found.values_that_differ, found.largest_scale_difference) == (0, 0, 0.0)
    assert compare(q.to_backend(backend.name), backend.asarray(X)).equal or dtype[0] == "u"
    assert compare(q.for_dense().unpacked(), q).equal  # layouts in memory do not count


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_random_pairs_are_not_explained(seed):
    rng = np.random.default_rng(seed)
    a = of_codes(codes(64, 96, seed=seed), granularity=PerGroup(32))
    b = of_codes(
        codes(64, 96, seed=seed + 10), granularity=PerGroup(32), scale=rng.uniform(0.1, 1, (64, 3)).astype("float32")
    )
    found = compare(a, b)
    assert not found.equal
    assert found.explanation is None
    assert "nothing that was tried explains all of it" in str(found)
    assert compare(a, b, x=X).explanation is None
    assert compare(a, X).explanation is None
    square = compare(of_codes(codes(8, 8, seed=seed)), of_codes(codes(8, 8, seed=seed + 5)))
    assert square.explanation is None


def test_one_number_is_explained_by_no_factor():
    """Of one scale any factor is true, of one zero point any shift."""
    q = quantize(X, granularity=PerTensor())
    assert compare(q, with_scale(q, q.scale * np.float32(1.7))).explanation is None
    assert compare(q, with_scale(q, q.scale * np.float32(2))).explanation.name == "factor of scales"
    u = quantize(X, "uint8", scheme="affine")
    assert compare(u, replace(u, zero_point=u.zero_point - 7)).explanation is None


def test_a_dialect_that_lacks_the_format_is_not_named():
    scale = np.abs(X).max(1, keepdims=True) / np.float32(127)
    found = compare((np.trunc(X / scale).astype(np.int8), scale), X)
    named = {name.split(",")[0] for name in (found.explanation.name, *found.explanation.also)}
    assert named <= {name for name, d in DIALECTS.items() if "int8" in (d.symmetric or ("int8",))}, named


def test_scales_that_differ_in_their_last_places_alone():
    q = quantize(X, granularity=ROWS)
    found = compare(with_scale(q, np.nextafter(q.scale, np.float32(9))), q)
    assert "but for their last places" in str(found)
    assert "times" not in str(found)


def test_floats_are_asked_for_where_they_would_tell_more():
    few = quantize(X[:2, :4], granularity=ROWS)
    other = with_scale(few, few.scale * np.float32(1.7))
    assert "Give the floats, x=, to tell more." in str(compare(other, few))
    assert "Give the floats" not in str(compare(other, few, x=X[:2, :4]))
    assert "Give the floats" not in str(compare(few, few))
    many = quantize(X, granularity=ROWS)
    assert "Give the floats" in str(compare(many, quantize(X, granularity=ROWS, dialect="torch")))
    assert not compare(many, read_as(many, -many.qvalue)).advice


def test_axes_of_kernels_are_found_beside_a_dialect():
    kernel = X[:48, :16].reshape(3, 2, 8, 16)
    theirs = quantize(kernel.transpose(3, 2, 0, 1).copy(), granularity=PerChannel(0), dialect="torch")
    found = compare(theirs, kernel)
    assert found.explanation.name.startswith("kernel axes OIHW for HWIO and torch"), str(found)


def test_what_is_nearly_explained_is_named_with_what_is_left():
    q = of_codes(codes(64, 96))
    wrong = np.array(awq_read(q.qvalue))
    wrong[3, :5] ^= 1
    found = compare(q, read_as(q, wrong))
    assert found.explanation is None
    assert found.nearest[0].name == "order of AWQ, codes, along the last axis"
    assert found.nearest[0].codes_that_differ == 5
    assert "what is left: 5 codes." in str(found)


def test_a_range_is_named_where_floats_are_not_known():
    ours, theirs = quantize(X, granularity=ROWS), quantize(X, granularity=ROWS, dialect="torch")
    found = compare(ours, theirs)
    assert found.explanation is None
    assert found.nearest[0].name == "factor of scales"
    assert found.nearest[0].says == "scales of a are those of b for a range to 127 instead of 127.5"
    assert found.nearest[0].leaves == f"{found.codes_that_differ} codes"


def test_numbers_are_counted():
    q = quantize(X, granularity=ROWS)
    other = np.array(q.qvalue)
    other[0, :3] -= 2
    scale = np.array(q.scale)
    scale[5] *= np.float32(1.5)
    found = compare(q, QArray.from_codes(other, scale, granularity=ROWS))
    assert (found.codes_that_differ, found.largest_code_difference, found.codes) == (3, 2, 64 * 96)
    assert (found.scales_that_differ, found.scales) == (1, 64)
    assert found.largest_scale_difference == pytest.approx(1 / 3)
    assert found.values_that_differ == 3 + np.count_nonzero(other[5])
    assert (found.zero_points_that_differ, found.offsets_that_differ, found.at_ties) == (0, 0, None)


def test_values_may_be_the_same_where_codes_are_not():
    q = of_codes(codes(64, 96, low=2, high=6))
    doubled = of_codes((2 * q.qvalue).astype(np.uint8), scale=q.scale / 2, zero_point=q.zero_point * 0)
    same = of_codes(q.qvalue, scale=q.scale, zero_point=q.zero_point * 0)
    found = compare(same, doubled)
    assert found.values_that_differ == 0
    assert found.explanation.name == "same values"


# ---- what is given


def test_codes_and_scales_of_any_library(backend):
    q = quantize(X, granularity=ROWS)
    parts = (backend.asarray(np.array(q.qvalue)), backend.asarray(np.array(q.scale)))
    assert compare(parts, q).equal
    assert compare(q, parts).equal
    assert compare((parts[0], q.scale.reshape(-1)), parts).equal  # a scale for each row, from two libraries
    assert compare((*parts, 0), q).equal
    assert compare((*parts, None), q).equal


def test_formats_of_codes_without_a_name():
    c = codes(64, 96)
    found = compare((c, 0.5), (awq_read(c), 0.5))
    assert found.explanation.name == "order of AWQ, codes, along the last axis"
    assert found.a.startswith("uint4, ")
    assert compare((c.astype(np.int64), 0.5), (c, 0.5)).equal
    for dtype, name in ((np.int8, "int8"), (np.uint16, "uint16"), (np.int64, "uint16")):
        assert compare((np.full((9, 9), 100 if dtype != np.int64 else 500, dtype), 1), (c[:9, :9], 1)).a.startswith(
            name
        )
    q = quantize(X, "float8_e4m3fn")
    assert compare((q.qvalue.view(ml_dtypes.float8_e4m3fn), q.scale), q).equal
    four = quantize(X, "int4", granularity=ROWS)
    assert compare((four.qvalue.astype(ml_dtypes.int4), four.scale), four).equal
    nf4 = quantize(X, "nf4", granularity=ROWS)
    assert compare((nf4.qvalue, nf4.scale), nf4).equal


def test_granularity_is_read_from_the_shape_of_scales():
    for granularity in (PerTensor(), ROWS, PerChannel(1), PerGroup(32), PerGroup(16, 0)):
        q = quantize(X, "int4", granularity=granularity)
        assert compare((q.qvalue, q.scale), (q.qvalue, q.scale)).equal
        assert compare((q.qvalue, q.scale), q).equal, granularity
    assert compare((np.ones(4, np.int8), 0.5), (np.ones(4, np.int8), [0.5])).equal
    assert compare((np.ones((2, 4), np.int8), np.float32(0.5)), (np.ones((2, 4), np.int8), 0.5)).equal


@pytest.mark.parametrize("x", [np.float32(3.5), np.zeros((0, 4), np.float32), np.zeros((3, 0), np.float32),
                               np.zeros((3, 4), np.float32), np.full((2, 8), -0.0, np.float32)], ids=str)  # fmt: skip
def test_no_dimensions_no_elements_zeros(x):
    x = np.asarray(x)
    q = quantize(x)
    assert compare(q, q.copy()).equal
    assert compare(q, x).equal
    assert compare((q.qvalue, q.scale), q).equal
    found = compare(q, QArray.from_codes(q.qvalue, q.scale * np.float32(2)))
    assert not found.equal
    assert found.explanation.name == "factor of scales"


def test_values_that_are_not_finite():
    x = X.copy()
    x[0, 0], x[1, 1] = np.nan, np.inf
    q = quantize(x, granularity=ROWS, nonfinite="ignore", dialect="torch")
    assert compare(q, x).explanation.name == "torch"
    nan = replace(q, scale=np.full_like(q.scale, np.nan))
    assert compare(nan, nan).equal
    assert not compare(nan, q).equal
    nothing = compare(q, np.full_like(x, np.nan))
    assert nothing.explanation is None
    assert nothing.nearest == ()
    assert compare(nan, q).explanation is None


def test_shapes_that_differ():
    a, b = quantize(X), quantize(X[:, :50])
    found = compare(a, b)
    assert not found.equal
    assert found.explanation is None
    assert found.codes_that_differ is found.values_that_differ is None
    assert str(found).startswith("Their shapes differ, and nothing that was tried makes one of the other.")
    assert "(64, 96)" in str(found)
    assert "(64, 50)" in str(found)
    assert compare(a, X[:, :50]).codes_that_differ is None
    assert compare(quantize(X[0]), quantize(X)).explanation is None
    with pytest.raises(ValueError, match=r"x has shape \(64, 50\), a and b \(64, 96\): give the array"):
        compare(a, quantize(X, "int4"), x=X[:, :50])


def test_types_that_differ():
    wide = X.astype(np.float64)
    assert compare(quantize(wide, granularity=ROWS), wide).equal
    found = compare(quantize(X, granularity=ROWS), quantize(wide, granularity=ROWS))
    assert found.scales_that_differ > 0
    assert compare(quantize(X, granularity=ROWS), wide).equal  # of float64 that float32 holds
    half = X.astype(ml_dtypes.bfloat16)
    assert compare(quantize(half, granularity=ROWS), half).equal
    for a, b in (("int8", "int4"), ("nf4", "float4_e2m1fn"), ("int8", "mxfp4")):
        found = compare(quantize(X, a), quantize(X, b))
        assert not found.equal
        assert a in found.a
        assert b in found.b


def test_what_is_refused():
    q = quantize(X)
    for words, a, b in [
        (r"a is a ndarray: give a QArray, or a tuple \(codes, scale\)", X, q),
        (r"a is a tuple of 1: give \(codes, scale\)", (q.qvalue,), q),
        (r"b has dtype int8: give the floats that were quantized, or codes with their scale", q, q.qvalue),
        (r"a\[0\] has dtype float32: give integer codes", (X, 1.0), q),
        (r"b\[2\] has dtype float32: zero points are integers", q, (q.qvalue, q.scale, np.zeros(1, "float32"))),
        (r"b is a str: give an array", q, "q"),
        (r"b is an array of floats, and x is given too", q, X),
    ]:
        with pytest.raises(TypeError, match=words):
            compare(a, b, **({"x": X} if "x is given" in words else {}))
    for words, a in [
        (r"a\[1\] has shape \(5,\), which is no grid of blocks of codes of shape \(64, 96\)", (q.qvalue, np.ones(5))),
        (r"a\[2\] has shape \(2, 1\): give a zero point for each scale", (q.qvalue, q.scale, np.zeros((2, 1), "int8"))),
        (r"a\[0\] has codes 0 to 70000: more than 16 bits", (np.asarray([0, 70000]), 1.0)),
    ]:
        with pytest.raises(ValueError, match=words):
            compare(a, q)


@needs("torch")
def test_a_layer_of_torch_is_told_where_its_codes_are():
    import aqt_lite.torch as of_torch

    layer = of_torch.quantize_(torch.nn.Linear(32, 8))
    q = layer.weight.qarray
    assert compare(q, q).equal
    for a, b, words in [(layer.weight, q, "pass a.qarray"), (q, layer.weight, "pass b.qarray")]:
        with pytest.raises(TypeError, match=f"which holds a QArray: {words}"):
            compare(a, b)


@needs("jax")
def test_a_layer_of_nnx_is_told_where_its_codes_are():
    nnx = pytest.importorskip("flax.nnx", reason="flax is not installed: requirements-dev.txt has it")
    import aqt_lite.nnx as of_nnx

    layer = of_nnx.quantize_(nnx.Linear(32, 8, rngs=nnx.Rngs(0)))
    q = layer.kernel.get_value()
    assert compare(q, layer.kernel[...]).equal
    for a, b, words in [(layer.kernel, q, "pass a.get_value"), (q, layer.kernel, "pass b.get_value")]:
        with pytest.raises(TypeError, match=f"which holds a QArray: {words}"):
            compare(a, b)


def test_traced_arrays_are_refused():
    q = quantize(jnp.asarray(X))
    with pytest.raises(TypeError, match="compare needs values, but b is being traced: call it outside the compiled"):
        jax.jit(lambda q: compare(quantize(X), q))(q)
    with pytest.raises(TypeError, match="compare needs values, but b is being traced"):
        jax.jit(lambda x: compare(q, x))(jnp.asarray(X))


def test_arrays_that_are_read_only_or_no_views_of_memory():
    q = quantize(X, granularity=ROWS)
    strided = np.zeros((64, 192), np.int8)
    strided[:, ::2] = q.qvalue
    frozen = np.array(q.scale)
    frozen.flags.writeable = False
    assert compare((strided[:, ::2], frozen), q).equal
    leaf = torch.tensor(X, requires_grad=True)
    assert compare(quantize(leaf, granularity=ROWS), leaf).equal


def test_arrays_that_are_computed_when_they_are_asked_for():
    da = pytest.importorskip("dask.array", reason="dask is not installed: requirements-dev.txt has it")
    x = da.from_array(X, chunks=(32, 96))
    q = quantize(x, granularity=ROWS, dialect="torch")
    assert compare(q, x).explanation.name == "torch"
    assert compare((q.qvalue, q.scale), quantize(X, granularity=ROWS, dialect="torch")).equal


def test_the_tensor_scale_is_named():
    nv = quantize(X, "nvfp4")
    numbers = nv.scale.qvalue.view(ml_dtypes.float8_e4m3fn)
    tensor = float(nv.scale.scale.reshape(()))
    says = compare(nv, (nv.qvalue, numbers)).explanation.says
    assert says == f"scales of a are those of b times the tensor scale, {tensor:.6g}"
    divided = numbers.astype(np.float32) / nv.scale.scale
    says = compare((nv.qvalue, divided), nv).explanation.says
    assert says == f"scales of a are those of b divided by the tensor scale instead of multiplied, {tensor:.6g}"


def test_large_arrays_are_looked_at_in_parts():
    """A sample finds the convention, and all of the array confirms it, or does not."""
    c = codes(512, 1024, seed=3)
    q = of_codes(c, granularity=PerGroup(64))
    wrong = read_as(q, awq_read(c))
    assert compare(q, wrong).explanation.name == "order of AWQ, codes, along the last axis"
    last = np.array(awq_read(c))
    last[100, 500] ^= 1  # in no sample
    found = compare(q, read_as(q, last))
    assert found.explanation is None
    assert found.nearest[0].codes_that_differ == 1
    x = np.random.default_rng(0).standard_normal((400, 512)).astype(np.float32)
    assert compare(quantize(x, granularity=ROWS, dialect="torch"), x).explanation.name == "torch"
    tensor = np.random.default_rng(0).standard_normal(200_000).astype(np.float32)
    assert compare(quantize(tensor, dialect="torch"), tensor).explanation.name == "torch"


def test_codes_of_a_long_axis_are_looked_at_in_parts():
    c = codes(1 << 18, seed=3)
    q = of_codes(c, granularity=PerGroup(64))
    assert compare(q, read_as(q, awq_read(c))).explanation.name == "order of AWQ, codes, along the last axis"
    assert compare(q, read_as(q, halves_read(c))).explanation.name == "halves of blocks of 32, along the last axis"


def test_progress_is_said_where_it_is_asked_for(capsys):
    a, b = of_codes(codes(8, 8)), of_codes(codes(8, 8, seed=1))
    compare(a, b)
    assert capsys.readouterr().err == ""
    compare(a, b, progress=True)
    assert "transposed" in capsys.readouterr().err


def test_assert_same_says_why():
    a, b = quantize(X, granularity=ROWS), quantize(X, granularity=ROWS, dialect="torch")
    assert_same(a, a.to_backend("array_api_strict"))
    assert_same(a, X)
    with pytest.raises(AssertionError, match="this explains all of it: a is what dialect 'torch' makes of b"):
        assert_same(b, X)
    with pytest.raises(AssertionError, match=r"codes +\d+ of 6144 differ, by up to 1"):
        assert_same(a, b)
