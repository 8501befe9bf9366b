"""The container: invariants, indexing, copies, printing, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import io
import itertools
import pickle
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from optional import jax, jnp

import aqt_lite
from aqt_lite import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QArray,
    _ways,
    concatenate,
    dense,
    dequantize,
    linear,
    quantize,
)
from aqt_lite.granularity import grid_of
from aqt_lite.testing import assert_same_bits

GRANULARITIES = [
    PerTensor(),
    PerChannel(0),
    PerChannel(1),
    PerGroup(4),
    PerGroup(5, axis=1),
    PerBlock((1, 3, -1)),
    PerBlock((2, 3, 4)),
]
X = np.random.default_rng(0).standard_normal((4, 6, 10)).astype("float32")
FORMS = [("int8", "symmetric"), ("uint8", "symmetric"), ("int16", "affine"), ("uint16", "affine")]


@pytest.mark.parametrize(("dtype", "scheme"), FORMS)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_invariants(backend, granularity, dtype, scheme):
    q = quantize(backend.asarray(X), dtype, scheme=scheme, granularity=granularity)
    assert (q.shape, q.ndim, q.size, len(q), q.dtype, q.backend) == ((4, 6, 10), 3, 240, 4, dtype, backend.name)
    assert backend.dtype_name(q.qvalue) == dtype
    assert backend.dtype_name(q.scale) == q.float_dtype == "float32"
    assert tuple(q.scale.shape) == grid_of(q.shape, q.block)
    if (dtype, scheme) == ("int8", "symmetric"):
        assert q.zero_point is None
    else:
        assert backend.dtype_name(q.zero_point) == "int32"
        assert tuple(q.zero_point.shape) == tuple(q.scale.shape)
    blocks = int(np.prod(q.scale.shape))
    assert q.nbytes == 240 * np.dtype(dtype).itemsize + blocks * (4 if q.zero_point is None else 8)
    assert quantize(backend.asarray(X), dtype, scheme=scheme, granularity=q.granularity).block == q.block


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_the_granularity_is_told_in_the_plainest_words(granularity):
    plain = {PerGroup(5, axis=1): PerGroup(5, axis=1), PerBlock((1, 3, -1)): PerBlock((1, 3, -1))}
    assert quantize(X, granularity=granularity).granularity == plain.get(granularity, granularity)


def test_granularities_that_say_the_same():
    assert quantize(X, granularity=PerBlock((-1, -1, -1))).granularity == PerTensor()
    assert quantize(X, granularity=PerBlock((-1, 1, -1))).granularity == PerChannel(1)
    assert quantize(X, granularity=PerBlock((1, 1, 5))).granularity == PerGroup(5)
    assert quantize(X, granularity=PerChannel(-1)).granularity == PerChannel(2)
    assert quantize(X, granularity=PerGroup(5, axis=2)).granularity == PerGroup(5)


# ---- indexing

INDICES = [
    0,
    -1,
    np.int64(2),
    slice(1, 3),
    slice(None, None, 2),
    ...,
    (),
    (slice(None), 3),
    (..., slice(2, 8)),
    (1, ..., slice(0, 4)),
    (1, 2, 3),
    (slice(3, 1),),
    (slice(-2, None), slice(None), slice(0, 10)),
]


@pytest.mark.exhaustive_where(granularity=PerTensor())
@pytest.mark.exhaustive_where(granularity=PerChannel(1))
@pytest.mark.parametrize("index", INDICES, ids=str)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerBlock((1, 1, -1))], ids=str)
def test_a_slice_stands_for_the_sliced_values(backend, granularity, index):
    q = quantize(backend.asarray(X), "uint8", scheme="affine", granularity=granularity)
    part = q[index]
    assert_same_bits(part.dequantize(), backend.to_numpy(q.dequantize())[index])
    assert tuple(part.scale.shape) == grid_of(part.shape, part.block)
    assert part.backend == backend.name


def test_groups_are_sliced_between_groups(backend):
    q = quantize(backend.asarray(X), granularity=PerGroup(4))
    for index in [(0,), (..., slice(0, 4)), (..., slice(4, 10)), (..., slice(8, None)), (1, 2), (..., slice(4, 4))]:
        assert_same_bits(q[index].dequantize(), backend.to_numpy(q.dequantize())[index])
    assert q[..., 4:].scale.shape == (4, 6, 2)  # a shorter last group keeps its own scale
    assert q[..., 0:4].scale.shape == (4, 6, 1)
    for inside in (slice(1, 5), slice(0, 6), slice(0, 8, 2), slice(None, None, -1)):
        with pytest.raises(IndexError, match="cuts through the groups of 4 along axis 2: use multiples of 4"):
            q[..., inside]
    for one in (3, 9, -1):  # with the scale of its group
        assert_same_bits(q[..., one].dequantize(), backend.to_numpy(q.dequantize())[..., one])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (4, "index 4 is out of range for axis 0 of length 4"),
        (-5, "index -5 is out of range"),
        ((0, 0, 10), "index 10 is out of range for axis 2 of length 10"),
        ((0, 0, 0, 0), "too many entries for 3 dimensions"),
        ((..., ...), "too many entries"),
        (True, "takes integers, slices, '...' and None"),
        (1.0, "takes integers, slices, '...' and None"),
        ("a", "takes integers, slices, '...' and None"),
        ([True, False], "takes integers, slices, '...' and None"),
        (([0, 1],), "q.take.ids, axis. for another"),
        ((slice(None), np.asarray([0, 1])), "an array of shape .2,.: a QArray takes"),
        (np.asarray([0.5, 1.0]), "takes integers, slices, '...' and None"),
        (np.asarray([True, False, True, False]), "takes integers, slices, '...' and None"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_other_indices_are_refused(index, message):
    with pytest.raises(IndexError, match=message):
        quantize(X)[index]


def test_iteration_and_length():
    q = quantize(X, granularity=PerChannel(1))
    assert len(list(q)) == 4
    for part, values in zip(q, q.dequantize(), strict=True):
        assert_same_bits(part.dequantize(), values)
    with pytest.raises(TypeError, match="0-dimensional"):
        len(quantize(1.0))
    for nothing in (q, quantize([[0.0]]), quantize(1.0), quantize(np.zeros((0, 3), "float32"))):
        with pytest.raises(TypeError, match="neither true nor false"):
            bool(nothing)


# ---- NumPy, copies, equality, printing


def test_it_becomes_no_array_unasked(backend):
    """Whatever asks for an array hears what it holds and how its values are asked for, instead of a copy of floats."""
    q = quantize(backend.asarray(X), "int4", granularity=PerGroup(4))
    way = r"a QArray \(int4, shape \(4, 6, 10\)\) does not become an array by itself.*8 times.*q.dequantize\(\)"
    for ask in (
        np.asarray,
        np.array,
        lambda q: np.asarray(q, dtype="float64"),
        lambda q: np.asarray(q, copy=False),
        lambda q: np.save(io.BytesIO(), q),
        lambda q: np.savez(io.BytesIO(), q=q),
        lambda q: np.concatenate([q, q]),
        lambda q: np.dot(X[0, 0], q),
    ):
        with pytest.raises(TypeError, match=way):
            ask(q)


def test_numpy_compares_the_values(backend):
    """``np.array_equal`` takes any error for "not equal", so that it would answer False to equal arrays."""
    values = quantize(X, "int4", granularity=PerGroup(4)).dequantize()
    q = quantize(backend.asarray(X), "int4", granularity=PerGroup(4))
    for equal in (np.array_equal, partial(np.array_equal, equal_nan=True), np.array_equiv):
        assert [equal(q, q), equal(q, values), equal(values, q)] == [True] * 3
        assert [equal(q, values + 1), equal(q[0], q[1])] == [False] * 2


@pytest.mark.parametrize("symbol", ["+", "-", "*", "/", "//", "%", "**", "<", "<=", ">", ">="])
def test_arithmetic_is_refused_with_the_way(backend, symbol):
    q, x = quantize(backend.asarray(X)), backend.asarray(X)
    for left, right in ((q, x), (x, q), (q, q), (q, 2.0), (2.0, q)):
        own = "|Expected Array or Python scalar" if backend.name == "array_api_strict" else ""  # it asks no other type
        with pytest.raises(TypeError, match=rf"would dequantize all of it at every call: write q.dequantize\(\){own}"):
            eval(f"left {symbol} right", {"left": left, "right": right})


def test_the_matrix_product_stays_quantized(backend):
    x, w = backend.asarray(X[0]), quantize(backend.asarray(X[1].T.copy()), granularity=PerChannel(1))
    if backend.name != "array_api_strict":  # whose operators ask no other type
        assert_same_bits(x @ w, dense(x, w))
    assert_same_bits(w.T @ w, dense(w.T, w))
    assert_same_bits(w.T @ x[0, ...], linear(x[0, ...], w.T))
    assert_same_bits(w.T @ backend.xp.permute_dims(x, (1, 0)), backend.xp.permute_dims(linear(x, w.T), (1, 0)))
    square = quantize(backend.asarray(np.eye(4, dtype=np.float32) * 3), granularity=PerChannel(1)).for_dense()
    assert backend.to_numpy(square @ backend.xp.ones_like(x[0, :4])).tolist() == [3.0] * 4  # no warning: @ says it all
    with pytest.raises(ValueError, match=r"x has shape \(1, \d+, \d+\): give a vector or a matrix"):
        w @ x[None, ...]


def test_what_it_has_not_says_what_it_is():
    q = quantize(X)
    for name in ("detach", "numpy", "tobytes", "astype_", "sum", "values"):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}': it is a container of codes and scales"):
            getattr(q, name)
    for name, way in {
        "half": r"q\.dequantize\(dtype\)",
        "to": r"q\.to_device\(device\)",
        "numpy": r"q\.to_backend\('numpy'\)",
        "squeeze": r"q\[:, 0\]",
        "tofile": r"aqt_lite\.save\(path, q\)",
        "dot": r"x @ q",
    }.items():
        with pytest.raises(AttributeError, match=f"; .*{way}"):
            getattr(q, name)
    assert not hasattr(q, "_repr_html_")


def test_every_way_that_errors_name_exists():
    q = quantize(X)
    for way in (*_ways._WAYS, _ways.no_array_of("any", q, "a function")):
        found = re.findall(r"\b(q|aqt_lite)\.(\w+)", way)
        assert found, way
        for owner, name in found:
            if (
                owner == "q" or importlib.util.find_spec(f"aqt_lite.{name}") is None
            ):  # a module may want what is not here
                assert hasattr(q if owner == "q" else aqt_lite, name), way
    assert not any(hasattr(q, name) for name in _ways._WAY_OF)  # what came to exist needs no way


def test_functions_of_numpy_multiply_or_name_the_way():
    q = quantize(X[0].T.copy())
    assert_same_bits(np.matmul(X[0], q), dense(X[0], q))
    assert_same_bits(np.matmul(q.T, X[0].T), q.T @ X[0].T)
    for call in (lambda: np.add(X[0].T, q), lambda: np.float32(2) * q, lambda: np.add.reduce(q), lambda: np.isnan(q)):
        with pytest.raises(TypeError, match=r"arithmetic with a QArray \(np\.\w+.*\).*q\.dequantize\(\)"):
            call()
    with pytest.raises(TypeError, match=r"write y = x @ q, without out="):
        np.matmul(X[0], q, out=np.empty((4, 4), "float32"))
    for call in (lambda: np.equal(X[0].T, q), lambda: np.not_equal(X[0].T, q)):
        with pytest.raises(TypeError, match="not compared by =="):
            call()


def test_copies_and_pickles(backend):
    q = quantize(backend.asarray(X), scheme="affine", granularity=PerGroup(4))
    for other in (copy.copy(q), copy.deepcopy(q)):
        assert_same_bits(other, q)
        assert other.block == q.block
    assert copy.copy(q).storage is q.storage
    if backend.name == "array_api_strict":
        return  # its arrays' dtypes and devices do not survive pickling
    assert_same_bits(pickle.loads(pickle.dumps(q)), q)


def test_it_is_frozen_and_not_compared_by_values(backend):
    q, same = quantize(backend.asarray(X)), quantize(backend.asarray(X))
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.dtype = "int16"
    assert q in [q]
    assert len({q, same}) == 2
    for other in (same, backend.asarray(X), 0, 1.0, np.float32(1)):
        with pytest.raises(TypeError, match=r"not compared by ==: compare their values, q.dequantize\(\)"):
            _ = q == other
        with pytest.raises(TypeError, match=r"not compared by ==: compare their values, q.dequantize\(\)"):
            _ = q != other
    with pytest.raises(TypeError, match=r"in q.dequantize\(\)"):
        _ = 1.0 in q
    assert q != "int8"  # what is no array is another thing
    assert q is not None
    assert_same_bits(q, same)


def test_printing(backend):
    q = quantize(backend.asarray(np.asarray([[0.5, -127], [2, 254]], "float32")), "uint8", granularity=PerChannel(0))
    assert repr(q) == (
        f"QArray(uint8, shape=(2, 2), PerChannel(axis=0), of float32, {backend.name})\n"
        "qvalue: [[128   1]\n [129 255]]\nscale: [[1.]\n [2.]]\nzero_point: [[128]\n [128]]"
    )
    assert len(repr(quantize(backend.asarray(np.zeros((1000, 1000), "float32"))))) < 400
    assert "storage='codes'" in repr(QArray("codes", 1, None))  # leaves that a tree utility has put there


# ---- from_codes


def test_from_codes_round_trip(backend):
    for dtype, scheme in FORMS:
        q = quantize(backend.asarray(X), dtype, scheme=scheme, granularity=PerGroup(4))
        again = QArray.from_codes(q.qvalue, q.scale, q.zero_point, granularity=PerGroup(4))
        assert_same_bits(again, q)
        assert_same_bits(dequantize(again), dequantize(q))


def test_from_codes_checks_every_invariant(backend):
    def array(values, dtype):
        return backend.asarray(np.asarray(values, dtype))

    codes, scale, zero = array([[1, 2], [3, 4]], "int8"), array([[0.5]], "float32"), array([[1]], "int32")
    assert QArray.from_codes(codes, scale, zero).dequantize().shape == (2, 2)
    cases = [
        (TypeError, "qvalue is a list: give an array of integer codes", ([[1]], scale)),
        (TypeError, "qvalue is a NoneType", (None, scale)),
        (ValueError, "qvalue has dtype float32: give an array of integer codes", (scale, scale)),
        (ValueError, "dtype='int32' is not a quantized type", (zero, scale)),
        (TypeError, "scale is None: codes of int8 need one; give 1.0", (codes, None)),
        (TypeError, "scale is a str: give a number or an array", (codes, "0.5")),
        (
            ValueError,
            r"scale has shape \(2, 1\): PerTensor\(\) of an array of shape \(2, 2\) needs \(1, 1\)",
            (codes, array([[1], [2]], "float32")),
        ),
        (ValueError, r"zero_point has shape \(2, 1\)", (codes, scale, array([[1], [2]], "int32"))),
        (TypeError, "zero_point=1.0 is a float", (codes, scale, 1.0)),
    ]
    unsigned = array([[1, 2], [3, 4]], "uint8")
    cases += [
        (ValueError, "qvalue has dtype uint8 but no zero_point .*or dtype=", (unsigned, scale)),
        (ValueError, "zero_point=-1: must be a code of uint8, 0 to 255", (unsigned, scale, array([[-1]], "int32"))),
        (ValueError, "zero_point=128: must be a code of int8", (codes, scale, array([[128]], "int32"))),
        *(
            (ValueError, "every scale must be finite and not 0", (codes, array([[bad]], "float32")))
            for bad in (np.nan, np.inf, -np.inf, 1e-40, -1e-40, 3e38)
        ),
        (ValueError, "for a block of zeros give scale 1 and the code of zero", (codes, array([[0.0]], "float32"))),
        (ValueError, r"scale=-3e\+38: it must be finite and not 0", (codes, -3e38)),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            QArray.from_codes(*arguments)
    with pytest.raises(ValueError, match="float_dtype='int8' is not a floating-point type"):
        QArray.from_codes(codes, scale, float_dtype="int8")
    with pytest.raises(ValueError, match=r"PerGroup\(size=2, axis=3\): axis 3 is out of range"):
        QArray.from_codes(codes, scale, granularity=PerGroup(2, axis=3))
    with pytest.raises(TypeError, match="granularity='tensor'"):
        QArray.from_codes(codes, scale, granularity="tensor")
    with pytest.raises(ValueError, match="zero_point and offset are both given"):
        QArray.from_codes(codes, scale, zero, offset=1.0)


def test_from_codes_takes_what_quantize_takes(backend):
    """Numbers, lists, a scale for each channel in one dimension, other types where no bit is lost."""
    codes = backend.asarray(np.asarray([[1, -2, 3], [4, 5, -6]], "int8"))
    wide = np.asarray([0.5, 0.25])

    def values(scale, zero_point=None, granularity=None):
        granularity = granularity or PerChannel(0)
        q = QArray.from_codes(codes, scale, zero_point, granularity=granularity)
        assert backend.dtype_name(q.scale) == "float32"
        assert q.zero_point is None or backend.dtype_name(q.zero_point) == "int32"
        return backend.to_numpy(q.dequantize()).tolist()

    expected = [[0.5, -1.0, 1.5], [1.0, 1.25, -1.5]]
    assert values([0.5, 0.25]) == values([[0.5], [0.25]]) == values(wide.tolist()) == expected
    assert values(0.5, 1, PerTensor()) == [[0.0, -1.5, 1.0], [1.5, 2.0, -3.5]]
    assert values([0.5, 0.25], backend.asarray(np.asarray([0, 0], "int8"))) == expected
    if backend.name != "jax":  # which has no float64 unless it is told so
        assert values(backend.asarray(wide)) == expected
        with pytest.raises(ValueError, match="scale has dtype float64, and float32, in which it is kept, cannot hold"):
            values(backend.asarray(wide / 3))
    if backend.name != "array_api_strict":
        assert values(backend.asarray(wide.astype("float16"))) == expected


def test_from_codes_is_told_the_format(backend):
    """The array's type says nothing where several formats are kept in it."""
    codes = np.asarray([0, 7, 9, 15], "uint8")
    for dtype, numbers in (
        ("float4_e2m1fn", [0.0, 6.0, -0.5, -6.0]),
        ("uint4", [-8.0, -1.0, 1.0, 7.0]),
        ("iq4_nl", [-127.0, -10.0, 13.0, 113.0]),
    ):
        zero_point = 8 if dtype == "uint4" else None
        q = QArray.from_codes(backend.asarray(codes), 1.0, zero_point, dtype=dtype)
        assert (q.dtype, q.bits, q.packed_length, tuple(q.storage.shape)) == (dtype, 4, 4, (2,))
        assert backend.to_numpy(q.dequantize()).tolist() == numbers
        assert_same_bits(q.qvalue, codes)
        with pytest.raises(ValueError, match=rf"the first at \(3,\): 16; codes of {dtype} are 0 to 15"):
            QArray.from_codes(backend.asarray(np.asarray([0, 7, 9, 16], "uint8")), 1.0, zero_point, dtype=dtype)
    with pytest.raises(ValueError, match=r"the first at \(1,\): 9; codes of int4 are -8 to 7"):
        QArray.from_codes(backend.asarray(np.asarray([0, 9], "int8")), 1.0, dtype="int4")
    with pytest.raises(ValueError, match=r"127; float8_e4m3fn has no finite number of that code"):
        QArray.from_codes(backend.asarray(np.asarray([0, 127], "uint8")), 1.0, dtype="float8_e4m3fn")
    with pytest.raises(TypeError, match="qvalue has dtype float32: codes of int8 are kept as int8"):
        QArray.from_codes(backend.asarray(np.asarray([0, 9], "float32")), 1.0, dtype="int8")


def test_from_codes_keeps_scales_of_few_bits(backend):
    bits = backend.asarray(np.asarray([[0x3C00], [0x3800]], "int16"))  # 1 and 0.5 as float16
    scale = QArray.from_codes(bits, None, dtype="float16")
    codes = backend.asarray(np.asarray([[1, 2], [3, -4]], "int8"))
    q = QArray.from_codes(codes, scale, dtype="int4", granularity=PerChannel(0))
    assert backend.to_numpy(q.dequantize()).tolist() == [[1.0, 2.0], [1.5, -2.0]]
    assert q.nbytes == 2 * 1 + 2 * 2
    assert_same_bits(q.scales, np.asarray([[1.0], [0.5]], "float32"))
    with pytest.raises(ValueError, match=r"scale has shape \(2, 1\): with this granularity it must be \(1, 1\)"):
        QArray.from_codes(codes, scale)


def test_from_codes_is_on_one_device():
    import array_api_strict as strict

    codes = strict.asarray([[1, 2]], dtype=strict.int8)
    scale = strict.ones((1, 1), dtype=strict.float32, device=strict.Device("device1"))
    with pytest.raises(ValueError, match=r"scale is on device .*device1.* but qvalue on .*CPU_DEVICE"):
        QArray.from_codes(codes, scale)


def test_from_codes_takes_what_is_traced():
    codes = jnp.asarray([[1, 2]], "int8")
    q = jax.jit(QArray.from_codes)(codes, jnp.full((1, 1), jnp.nan), jnp.full((1, 1), 500))
    assert np.isnan(np.asarray(q.scale)).all()


# ---- what it has in common with arrays

KINDS = [
    ("int8", {}),
    ("uint8", {"scheme": "affine"}),
    ("int4", {}),
    ("int3", {"scheme": "affine", "offset": "data"}),
    ("nf4", {"scale_dtype": "float16"}),
    ("float8_e4m3fn", {"scale_dtype": "float8_e8m0fnu"}),
]
KIND = pytest.mark.parametrize(("dtype", "how"), KINDS, ids=str)
LAYOUTS = {"packed": lambda q: q, "for dense": QArray.for_dense, "unpacked": QArray.unpacked}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def of_every_layout(test):
    """Each kind in each layout; what is exhaustive of JAX compiles for every shape."""
    for where in (
        *({"backend": name, "layout": QArray.for_dense} for name in ("jax", "torch", "array_api_strict")),
        *({"backend": "jax", "dtype": dtype} for dtype in ("uint8", "nf4")),
    ):
        test = pytest.mark.exhaustive_where(**where)(test)
    return KIND(LAYOUT(test))


def array_of(q):
    """Its values, on NumPy."""
    return np.array(q._backend.to_numpy(q.dequantize()))


def check(part, values):
    """Right values, and an array whose parts fit each other."""
    assert_same_bits(array_of(part), values)
    assert part._checked().shape == values.shape
    assert all(len(e) in (0, values.ndim) for e in (part.block, part.ragged))


@of_every_layout
def test_layouts_survive_indexing(backend, dtype, how, layout):
    """After ``for_dense()`` and packing, ``q[...]``, ``q[:]``, ``q[i]`` and iteration keep what was laid out."""
    q = layout(quantize(backend.asarray(X), dtype, granularity=PerGroup(4), **how))
    values = array_of(q)
    whole = [
        (),
        ...,
        slice(None),
        slice(1, 3),
        2,
        (0, ...),
        None,
        (slice(None), slice(2, 5)),
        (1, slice(None), slice(4, 8)),
    ]
    for index in whole:
        part = q[index]
        check(part, values[index])
        assert part.transposed == q.transposed
        assert (part.packed_length is None) == (q.packed_length is None)
    for part, expected in zip(q, values, strict=True):
        check(part, expected)
        assert part.transposed == q.transposed
    for index in [(..., 0, slice(None)), (slice(None), None, 3), (..., slice(4, 10)), (0, 0), (slice(None, None, -1),)]:
        check(q[index], values[index])


@of_every_layout
def test_streams_are_sliced_anywhere(backend, dtype, how, layout):
    q = layout(quantize(backend.asarray(X), dtype, granularity=PerChannel(1), **how))
    values = array_of(q)
    for start, stop, step in [
        (0, 10, 1),
        (3, 10, 1),
        (9, 10, 1),
        (1, 8, 3),
        (9, None, -1),
        (8, 2, -2),
        (5, 5, 1),
        (2, 9, 1),
    ]:
        check(q[..., start:stop:step], values[..., start:stop:step])
        check(q[1, :, start:stop:step], values[1, :, start:stop:step])
        check(q[:, start:stop:step], values[:, start:stop:step])


@of_every_layout
def test_shapes(backend, dtype, how, layout):
    q = layout(quantize(backend.asarray(X), dtype, granularity=PerGroup(4), **how))
    values = array_of(q)
    check(q.mT, values.swapaxes(-1, -2))
    check(q.mT.mT, values)
    check(q[1].T, values[1].T)
    for order in [(2, 0, 1), (0, 2, 1), (1, 0, 2), (2, 1, 0)]:
        check(q.transpose(order), values.transpose(order))
    check(q.transpose(), values.T)
    for shape in [(24, 10), (2, 2, 6, 10), (2, 12, 10), (1, 4, 6, 10), (-1, 10), (4, 3, 2, 10)]:
        check(q.reshape(shape), values.reshape(shape))
    check(q[0].broadcast_to((3, 6, 10)), np.broadcast_to(values[0], (3, 6, 10)))
    check(q[:1].broadcast_to((5, 6, 10)), np.broadcast_to(values[:1], (5, 6, 10)))
    check(q[:, None], values[:, None])
    check(q[..., None], values[..., None])
    check(q.copy(), values)
    check(q.to_device(q.device), values)
    assert_same_bits(q.astype("float32"), values)
    with pytest.raises(ValueError, match="would tear blocks apart"):
        q.reshape(4, 60)
    with pytest.raises(ValueError, match="does not broadcast"):
        q.broadcast_to((4, 7, 10))
    with pytest.raises(ValueError, match="the array has 240 elements"):
        q.reshape(7, 10)


@KIND
@pytest.mark.parametrize("runs", [(1, 2), (2, 1), (3, 1)])
def test_runs_of_axes_that_are_swapped(dtype, how, runs):
    """Heads of attention: (in, heads, width) stored as (heads, width, in), and all that arrays can do kept true."""
    shape, granularity = (2, 6, 4, 10), PerBlock((1, 3, 1, 5))
    values = np.resize(X, shape) * np.arange(1, 13, dtype="float32").reshape(2, 6, 1, 1)
    q = quantize(values, dtype, granularity=granularity, **how)
    turned, expected = q.for_dense(*runs), array_of(q)
    lead = 4 - sum(runs)
    assert turned.transposed == runs
    assert turned.shape == shape
    assert turned._stored_codes().shape == (*shape[:lead], *shape[lead + runs[0] :], *shape[lead : lead + runs[0]])
    assert turned.for_dense(*runs) is turned
    assert_same_bits(turned.unpacked().for_dense().for_dense(*runs).packed(), turned)
    for index in (0, (..., 2, slice(None)), slice(1, 2), (slice(None), slice(3, 6)), (1, slice(0, 3), 1), (..., None)):
        check(turned[index], expected[index])
    assert turned[:, 3:, 1:].transposed == runs
    for order in itertools.permutations(range(4)):
        check(turned.transpose(order), expected.transpose(order))
    check(turned.mT, expected.swapaxes(-1, -2))
    check(turned.take([1, 0, 1]), expected[[1, 0, 1]])
    check(turned.take([2, 0], 2), expected[:, :, [2, 0]])
    check(turned.reshape(1, 2, 6, 4, 10), expected[None])
    check(concatenate([turned, turned], 1), np.concatenate([expected] * 2, 1))


def test_runs_that_cannot_be():
    q = quantize(X)
    for arguments, words in [((2, 2), "at least 4 dimensions, 2 of inputs and 2 of outputs"), ((0, 1), "inputs=0"), (
        (1, 5), "outputs=5: give a number of axes from 1 to 4"
    ), ((True, 1), "inputs=True")]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            q.for_dense(*arguments)


@of_every_layout
def test_rows_by_index(backend, dtype, how, layout):
    q = layout(quantize(backend.asarray(X), dtype, granularity=PerGroup(4), **how))
    values = array_of(q)
    for ids in ([3, 0, 0], [-1], [[0, 1], [2, 3]], []):
        own = np.asarray(ids, "int32")
        check(q[backend.asarray(own)], values[own])
        check(q.take(ids), values[own]) if ids else None
        check(q.take(backend.asarray(own), 1), values.take(own, 1))
    check(q[[2, 1]], values[[2, 1]])
    table = layout(quantize(backend.asarray(X[0]), dtype, **how))  # one scale for all
    check(table[[4, 5, -6]], array_of(table)[[4, 5, -6]])
    with pytest.raises(IndexError, match="index 4 is out of range for axis 0 of length 4"):
        q[[0, 4]]
    for far in (np.asarray([2**32 + 1]), np.asarray([2**64 - 1], "uint64")):  # which wrap to rows that there are
        with pytest.raises(IndexError, match=f"index {far[0]} is out of range"):
            q.take(far)
    check(q.take([9, 0, -4, 4], axis=2), values.take([9, 0, -4, 4], 2))  # each with the scale of its group
    check(q.take([[3, 4], [7, 8]], axis=2), values.take([[3, 4], [7, 8]], 2))
    with pytest.raises(IndexError, match="indices have dtype float32: give integers"):
        q.take(backend.asarray(np.ones(2, "float32")))


@of_every_layout
def test_joined(backend, dtype, how, layout):
    q = layout(quantize(backend.asarray(X[..., :8]), dtype, granularity=PerGroup(4), **how))
    values = array_of(q)
    for axis in (0, 1, 2, -1):
        joined = aqt_lite.concatenate([q, q[...], q], axis)
        check(joined, np.concatenate([values] * 3, axis))
        assert (joined.packed_length is None) == (q.packed_length is None)
    for axis in (0, 1):
        check(aqt_lite.stack([q, q], axis), np.stack([values] * 2, axis))


def test_what_cannot_be_joined(backend):
    def make(dtype="int8", granularity=PerGroup(4), x=X, **how):  # noqa: B008 - frozen
        return quantize(backend.asarray(x), dtype, granularity=granularity, **how)

    for arrays, axis, message in [
        ([make(), make()], 2, "a last group shorter than 4 would come to lie inside"),
        ([make(granularity=PerTensor())] * 2, 0, "all of which shares a scale"),
        ([make(), make("int16")], 0, "bring them to one format first"),
        ([make(), make(granularity=PerGroup(5))], 0, "bring them to one format first"),
        ([make(), make(x=X[:, :3])], 0, r"shapes \(4, 6, 10\) and \(4, 3, 10\) along axis 0"),
        ([make("nvfp4", PerGroup(16, axis=2))] * 2, 0, "whose scales share a scale themselves"),
    ]:
        with pytest.raises(ValueError, match=message):
            aqt_lite.concatenate(arrays, axis)
    with pytest.raises(TypeError, match="give a sequence of one QArray or more"):
        aqt_lite.concatenate([make(), X])
    check(
        aqt_lite.concatenate([make()[..., :8], make()], 2),
        np.concatenate([array_of(make())[..., :8], array_of(make())], 2),
    )


# ---- parts that do not fit each other


def test_parts_that_were_joined_or_converted_apart(backend):
    """What a tree utility does to the leaves alone is noticed at the first use."""
    xp = backend.xp
    q = quantize(backend.asarray(X[..., :10]), "int4", granularity=PerGroup(4))
    twice = {name: xp.concat([getattr(q, name)] * 2, axis=-1) for name in ("storage", "scale")}
    with pytest.raises(ValueError, match="joined or cut without a view to the packing"):
        dataclasses.replace(q, **twice).dequantize()
    loose = q.unpacked()
    twice = {name: xp.concat([getattr(loose, name)] * 2, axis=-1) for name in ("storage", "scale")}
    with pytest.raises(
        ValueError, match=r"groups of 4 along an axis of 10, the last one shorter.*use aqt_lite.concatenate"
    ):
        dataclasses.replace(loose, **twice).dequantize()
    half = quantize(backend.asarray(X), granularity=PerChannel(0))
    narrow = xp.astype(half.scale, xp.int32)
    with pytest.raises(TypeError, match="scale has dtype int32, but it is kept as float32: it was converted together"):
        dataclasses.replace(half, scale=narrow).dequantize()
    with pytest.raises(TypeError, match="storage has dtype int32, but codes of int8 are kept as int8"):
        dataclasses.replace(half, storage=xp.astype(half.storage, xp.int32)).dequantize()


def test_a_version_that_is_not_known_yet():
    q = quantize(X)
    assert q.version == 2
    with pytest.raises(ValueError, match="version 3 of the contract, and this library version 2: upgrade"):
        dataclasses.replace(q, version=3).dequantize()
    state = q.__getstate__()
    del state["version"]  # as the first version stored it
    old = QArray.__new__(QArray)
    old.__setstate__(state)
    assert old.version == 1
    assert_same_bits(old.dequantize(), q.dequantize())


def test_a_format_of_ones_own_is_pickled_with_the_array():
    book = aqt_lite.Codebook("thirds_of_test_qarray", (-1.0, -1 / 3, 0.0, 1 / 3, 1.0))
    stored = pickle.dumps(quantize(X, book))
    program = (
        "import pickle, sys, numpy as np, aqt_lite\n"
        "q = pickle.loads(sys.stdin.buffer.read())\n"
        "sys.stdout.buffer.write(q.dequantize().tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", program], input=stored, capture_output=True, check=True)
    assert done.stdout == quantize(X, book).dequantize().tobytes()
    with pytest.raises(ValueError, match="a format named 'thirds_of_test_qarray' exists and is another one"):
        quantize(X, aqt_lite.Codebook("thirds_of_test_qarray", (-1.0, 1.0)))


def test_printing_never_raises():
    q = quantize(jax.numpy.asarray(X))
    q.storage.delete()
    assert "deleted" in repr(q)
    assert "QArray(int8" in repr(dataclasses.replace(quantize(X), block=(1, 2, 3)))


def test_square_weights_know_what_they_were_stored_for(backend):
    w = quantize(backend.asarray(np.random.default_rng(0).standard_normal((6, 6)).astype("float32"))).for_dense()
    x = backend.asarray(X[0, :, :6].copy())
    with pytest.warns(UserWarning, match=r"stored as for_dense\(\) does, as \(out, in\).*dense\(x, w\) reads it as"):
        aqt_lite.linear(x, w)
    dense(x, w)
    for turned in (w.T, w.T.T, w.for_dense().T, w.T.transpose()):  # written out: nobody is in doubt
        values = backend.to_numpy(turned.dequantize())
        y = backend.to_numpy(aqt_lite.linear(x, turned))
        np.testing.assert_allclose(y, X[0, :, :6] @ values.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "axis"), [("dense", 1), ("linear", 0)])
def test_square_weights_with_groups_along_their_outputs_are_questioned(backend, name, axis):
    made = np.random.default_rng(0).standard_normal((6, 6)).astype("float32")
    x, w = backend.asarray(X[0, :, :6].copy()), quantize(backend.asarray(made), granularity=PerGroup(3, axis))
    with pytest.warns(UserWarning, match=rf"^{name} reads w, which then has groups of 3 along its outputs"):
        y = backend.to_numpy({"dense": dense, "linear": aqt_lite.linear}[name](x, w))
    values = backend.to_numpy(w.dequantize())  # what is asked for is done
    np.testing.assert_allclose(y, X[0, :, :6] @ (values if name == "dense" else values.T), rtol=1e-5, atol=1e-5)
    if name == "dense":
        dense(x, w.for_dense())  # which says for whom it is


@pytest.mark.exhaustive_where(backend="jax", made={"dtype": "uint8"})  # each compiles
@pytest.mark.exhaustive_where(backend="jax", made={"dtype": "mxfp4"})
@pytest.mark.parametrize("made", [{}, {"dtype": "int4"}, {"dtype": "uint8"}, {"dtype": "mxfp4"}], ids=str)
@pytest.mark.parametrize(("name", "axis"), [("dense", 0), ("linear", 1)])
def test_square_weights_with_a_scale_for_each_input_are_questioned(backend, name, axis, made):
    values = np.random.default_rng(0).standard_normal((6, 6)).astype("float32")
    x, w = backend.asarray(X[0, :, :6].copy()), quantize(backend.asarray(values), granularity=PerChannel(axis), **made)
    says, plainly, there = {
        "dense": ("x @ w", lambda x, w: w.__rmatmul__(x), "linear(x, w) reads it as (out, in)"),
        "linear": ("x @ w.T", lambda x, w: w.T.__rmatmul__(x), "dense(x, w) reads it as (in, out)"),
    }[name]
    words = f"{name} reads w, which then has a scale for each input, and none for each output, as "
    with pytest.warns(UserWarning, match=f"^{words}.*{re.escape(there)}, and {re.escape(says)} leaves no doubt"):
        y = backend.to_numpy({"dense": dense, "linear": aqt_lite.linear}[name](x, w))
    dequantized = backend.to_numpy(w.dequantize())
    np.testing.assert_allclose(
        y, X[0, :, :6] @ (dequantized if name == "dense" else dequantized.T), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(backend.to_numpy(plainly(x, w)), y, rtol=1e-5, atol=1e-6)


def test_weights_whose_orientation_is_known_are_not_questioned(backend):
    square = backend.asarray(np.random.default_rng(0).standard_normal((6, 6)).astype("float32"))
    x = backend.asarray(X[0, :, :6].copy())
    each_row, each_column = (quantize(square, granularity=PerChannel(axis)) for axis in (0, 1))
    for right in (each_row, each_column.T, quantize(square), quantize(square, "bitround7"), each_row[:1, :1]):
        aqt_lite.linear(x[:, : right.shape[1]], right)
    for right in (each_column, each_row.T, quantize(square), each_row.for_dense(), each_row[:, :5]):
        dense(x[:, : right.shape[0]], right)
    for either in (each_row, each_column):
        either.__rmatmul__(x), either @ x, quantize(x) @ either, aqt_lite.einsum("bi,io->bo", x, either)


@pytest.mark.parametrize("how", [{"dtype": "mxfp4"}, {"dtype": "nvfp4"}, {"scale_dtype": "bfloat16"}], ids=str)
def test_scales_in_few_bits_do_not_train(backend, how):
    q = quantize(backend.asarray(X), **how)
    assert not q.with_trainable_scales(False).trainable
    with pytest.raises(ValueError, match=rf"every scale of this {q.dtype} is kept as {q.scale.dtype}.*'float32'"):
        q.with_trainable_scales()
    assert quantize(backend.asarray(X), **{**how, "scale_dtype": "float32"}).with_trainable_scales().trainable
    numbers = aqt_lite.convert(q, scale_dtype="float32")
    assert numbers.with_trainable_scales().trainable
    how = {"dtype": q.dtype, "granularity": q.granularity, "scale_dtype": "float32"}
    kept = QArray.from_codes(numbers.qvalue, numbers.scale, offset=q.scale, **how)
    with pytest.raises(ValueError, match=rf"every offset of this {q.dtype} is kept as {q.scale.dtype}"):
        kept.with_trainable_scales()
    with pytest.raises(ValueError, match="bitround7 has no scales, and its codes have no derivative"):
        quantize(backend.asarray(X), "bitround7").with_trainable_scales()


def test_scales_that_training_has_moved_are_not_used(backend):
    """Trained ones, where they have become negative, either; others may be: libraries store such."""
    q = quantize(backend.asarray(X[0]), granularity=PerChannel(0))
    trained = quantize(backend.asarray(X[0]), "int4", granularity=PerGroup(4)).with_trainable_scales()
    turned = dataclasses.replace(trained, scale=-trained.scale)
    for use in (dequantize, lambda q: aqt_lite.linear(backend.asarray(X[1]), q)):
        with pytest.raises(ValueError, match=r"scales of \d+ that are not positive: they were changed"):
            use(turned)
        if backend.name == "jax":
            assert np.isnan(np.asarray(jax.jit(use)(turned))).all()
    for bad, words in ((np.inf, "infinite"), (-0.0, "0"), (0.0, "0")):
        scale = np.array(backend.to_numpy(q.scale))
        scale[1] = bad
        moved = dataclasses.replace(q, scale=backend.asarray(scale))
        for use in (dequantize, lambda q: aqt_lite.linear(backend.asarray(X[1]), q), lambda q: q[0:2].dequantize()):
            with pytest.raises(ValueError, match=rf"has 1 scales of \d that are {words}: they were changed"):
                use(moved)
        if backend.name == "jax":  # which cannot raise inside a compiled function
            values = jax.jit(dequantize)(moved)
            assert np.isnan(np.asarray(values)).all(axis=1).tolist() == [False, True, False, False, False, False]


@pytest.mark.exhaustive_where(mode="reproducible")  # compiles for long
@pytest.mark.parametrize(("dtype", "mode"), [("int8", "fast"), ("int4", "reproducible")])
def test_products_of_programs_say_nan_where_a_scale_is_of_no_use(dtype, mode):
    """Large enough for compiled loops, which look for such scales themselves."""
    q = quantize(
        jnp.asarray(np.random.default_rng(1).standard_normal((400, 512), np.float32)), dtype, granularity=PerGroup(32)
    )
    x = jnp.zeros((3, 512)).at[1:].set(1)
    product = jax.jit(lambda x, w: aqt_lite.linear(x, w, mode=mode))
    for bad in (np.inf, np.nan, 0.0):
        y = np.asarray(product(x, dataclasses.replace(q, scale=q.scale.at[7, 3].set(bad))))
        assert np.isnan(y[:, 7]).all()
        assert np.isfinite(np.delete(y, 7, axis=1)).all()


@pytest.mark.exhaustive_where(backend="jax", dtypes=("uint8", "int4"))
@pytest.mark.parametrize(
    "dtypes", [("int8", "int8"), ("uint8", "int4"), ("int4", "uint4"), ("float4_e2m1fn", "int8")], ids=str
)
def test_exact_sums_of_codes(backend, dtypes):
    """``mode="integer"``: what is left of a product before any scale."""
    rng = np.random.default_rng(5)
    sides = [(rng.standard_normal(s) * 9).astype("float32") for s in ((5, 40), (7, 40))]
    hows = [{"scheme": "affine"} if d.startswith("uint") else {} for d in dtypes]
    x, w = (
        quantize(backend.asarray(v), d, granularity=PerChannel(0), **how)
        for v, d, how in zip(sides, dtypes, hows, strict=True)
    )

    def steps(q):
        whole = backend.to_numpy(q.dequantize("float32")).astype(np.float64) / backend.to_numpy(q.scale)
        return np.rint(whole / q._element.unit).astype(np.int64)

    expected = (steps(x) @ steps(w).T).astype(np.int32)
    assert_same_bits(aqt_lite.linear(x, w, mode="integer"), expected)
    assert_same_bits(dense(x, w.T, mode="integer"), expected)
    assert_same_bits(dense(x, w.T.copy().for_dense(), mode="integer"), expected)
    with pytest.raises(ValueError, match="of the codes of two QArrays, without a bias: x is an array of floats"):
        aqt_lite.linear(backend.asarray(sides[0]), w, mode="integer")
    with pytest.raises(ValueError, match="mode='integer' is not possible: x is int8 with PerGroup"):
        aqt_lite.linear(quantize(backend.asarray(sides[0]), granularity=PerGroup(8)), w, mode="integer")


# ---- what others have stored


def test_from_codes_reads_packed_codes_and_scales_of_few_bits(backend):
    """A checkpoint's arrays as they are: a stream of codes, scales as bit patterns, as typed arrays, as numbers."""
    import ml_dtypes

    rng = np.random.default_rng(3)
    x = rng.normal(size=(6, 64)).astype("float32")
    q = quantize(backend.asarray(x), "mxfp4")
    bits = backend.to_numpy(q.scale.storage)
    scales = [backend.asarray(bits), backend.asarray(backend.to_numpy(q.scales))]
    if backend.name in ("numpy", "jax"):
        scales.append(backend.asarray(bits.view(ml_dtypes.float8_e8m0fnu)))
    for scale in scales:
        again = QArray.from_codes(q.storage, scale, dtype="mxfp4", packed_length=64, scale_dtype="float8_e8m0fnu")
        assert_same_bits(again, q)
        assert_same_bits(again.storage, q.storage)
    with pytest.raises(TypeError, match="scale has dtype uint8, but mxfp4 keeps its scales as float8_e8m0fnu"):
        QArray.from_codes(q.storage, scales[0], dtype="mxfp4", packed_length=64)
    with pytest.raises(ValueError, match="is no number of float8_e8m0fnu"):
        QArray.from_codes(q.qvalue, 0.3, dtype="mxfp4")
    with pytest.raises(ValueError, match=r"packed_length=66: 66 codes of mxfp4 take 33 bytes"):
        QArray.from_codes(q.storage, scales[0], dtype="mxfp4", packed_length=66, scale_dtype="float8_e8m0fnu")


@pytest.mark.exhaustive_where(backend="jax", dtype="mxint8")
@pytest.mark.exhaustive_where(backend="jax", dtype="mxfp6_e2m3")
@pytest.mark.parametrize(("dtype", "first_usable"), [("mxfp4", 2), ("mxint8", 7), ("mxfp6_e2m3", 4)])
def test_kept_scales_that_are_too_small_are_zero_everywhere(backend, dtype, first_usable):
    """Codes of e8m0 from 2^-127 on, with which half a step may be subnormal: flushed to zero by some compilers."""
    rng = np.random.default_rng(5)
    codes, small = rng.integers(1, 8, (10, 32)), np.arange(10)[:, None].astype("uint8")
    codes = codes.astype("int8" if dtype == "mxint8" else "uint8")
    there = [backend.asarray(a) for a in (codes, small)]
    q = QArray.from_codes(*there, dtype=dtype, scale_dtype="float8_e8m0fnu")
    x = backend.asarray(np.full((2, 32), 2.0**40, "float32"))

    def used(x, q):
        return q.dequantize(), aqt_lite.linear(x, q, mode="reproducible")

    for values, sums in [used(x, q), *([jax.jit(used)(x, q)] if backend.name == "jax" else [])]:
        values, sums = backend.to_numpy(values), backend.to_numpy(sums)
        assert not values[:first_usable].any()
        assert np.abs(values[first_usable:]).min() >= 2.0**-126
        assert_same_bits(sums, np.broadcast_to(values.astype("float64").sum(1) * 2.0**40, (2, 10)).astype("float32"))


def test_scales_and_offsets_that_are_quantized_in_groups(backend):
    """Double quantization: blocks of scales of their own, which every layout keeps."""
    x = np.random.default_rng(4).normal(size=(4, 256)).astype("float32") + 3
    q = quantize(backend.asarray(x), "uint4", scheme="affine", granularity=PerGroup(8), offset="data")
    top = np.max(backend.to_numpy(q.scale).reshape(4, 8, 4), -1) / 255
    scale = quantize(q.scale, "uint8", granularity=PerGroup(4), scale=backend.asarray(top), zero_point=0)
    offset = quantize(q.offset, "int8", granularity=PerGroup(4), scale_dtype="bfloat16")
    nested = QArray.from_codes(q.qvalue, scale, offset=offset, dtype="uint4", granularity=PerGroup(8))
    codes, scales, offsets = (backend.to_numpy(a) for a in (q.qvalue, scale.dequantize(), offset.dequantize()))
    values = codes.astype("float64").reshape(4, 32, 8) * scales[..., None] + offsets[..., None]
    found = backend.to_numpy(nested.dequantize())
    np.testing.assert_allclose(found, values.reshape(4, 256), rtol=1e-6)
    for same in (nested.mT.mT, nested.T.T.copy(), aqt_lite.stack([nested, nested])[1], nested.to_backend("numpy")):
        assert_same_bits(same.dequantize(), found)
    assert_same_bits(nested.T.dequantize(), found.T)
    assert_same_bits(nested[1:3, 64:].dequantize(), found[1:3, 64:])
    assert_same_bits(nested.take([2, 0]).dequantize(), found[[2, 0]])
    y = aqt_lite.linear(backend.asarray(x), nested)
    np.testing.assert_allclose(backend.to_numpy(y), x.astype("float64") @ found.T.astype("float64"), rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [("int16", "bfloat16"), ("uint16", "bfloat16"), ("uint8", "bfloat16"), ("nvfp4", None), ("int4", "nf4")],
)
def test_products_with_scales_of_few_bits(backend, dtype, kept):
    x, w = (np.random.default_rng(6).normal(size=s).astype("float32") for s in ((3, 64), (8, 64)))
    how = {} if kept is None else {"granularity": PerChannel(0), "scale_dtype": kept}
    q = quantize(backend.asarray(w), dtype, **how)
    y = backend.to_numpy(aqt_lite.linear(backend.asarray(x), q))
    wanted = x.astype("float64") @ backend.to_numpy(q.dequantize()).astype("float64").T
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-4)


def test_arrays_with_two_scales_are_stacked(backend):
    """nvfp4's outer scale becomes one for each array."""
    xs = [np.random.default_rng(n).normal(size=(2, 32)).astype("float32") * 10**n for n in range(3)]
    qs = [quantize(backend.asarray(x), "nvfp4") for x in xs]
    stacked = aqt_lite.stack(qs)
    assert stacked.scale.scale.shape == (3, 1, 1)
    for n, q in enumerate(qs):
        assert_same_bits(stacked[n].dequantize(), q.dequantize())
    assert_same_bits(stacked.dequantize(), np.stack([backend.to_numpy(q.dequantize()) for q in qs]))


@pytest.mark.exhaustive_where(backend="jax", dtype="mxfp4")
@pytest.mark.exhaustive_where(backend="jax", dtype="int8")
@pytest.mark.exhaustive_where(backend="jax", dtype="uint3")
@pytest.mark.exhaustive_where(backend="array_api_strict", dtype="int8")
@pytest.mark.exhaustive_where(backend="array_api_strict", dtype="nvfp4")
@pytest.mark.parametrize("dtype", ["int8", "int4", "uint3", "mxfp4", "nvfp4"])
def test_axes_with_groups_are_split_and_merged_where_groups_stay_runs(dtype, backend):
    """Against the values, for every way to write 96 in up to four factors."""
    x = np.random.default_rng(0).normal(size=(4, 96)).astype("float32")
    cut = 16 if dtype == "nvfp4" else 32
    q = quantize(backend.asarray(x), dtype, granularity=PerGroup(cut))
    values, right = backend.to_numpy(q.dequantize()), 0
    factors = [n for n in range(1, 97) if 96 % n == 0]
    shapes = [(4, a, b, 96 // (a * b)) for a in factors for b in factors if 96 % (a * b) == 0]
    for shape in [*shapes, (2, 2, 96), (384,), (192, 2), (24, 16), (8, 48), (12, 32), (6, 64)]:
        whole = all(n % cut == 0 or cut % n == 0 for n in np.cumprod(shape[::-1]) if n < 96)
        whole = whole and (len(shape) != 2 or shape[-1] % cut == 0 or cut % shape[-1] == 0)
        if not whole:
            with pytest.raises(ValueError, match="would tear blocks apart"):
                q.reshape(shape)
            continue
        r = q.reshape(shape)
        right += 1
        assert r.shape == shape
        assert_same_bits(backend.to_numpy(r.dequantize()), values.reshape(shape))
        assert_same_bits(backend.to_numpy(r.reshape(4, 96).dequantize()), values)
    assert right > 20


@pytest.mark.parametrize("shape", [(0, 64), (4, 0), (0,), (2, 0, 64)])
@pytest.mark.parametrize("dtype", ["int8", "int4", "nvfp4"])
def test_arrays_without_elements_keep_their_shape(shape, dtype):
    q = quantize(np.zeros(shape, "float32"), dtype, granularity=PerGroup(32))
    for part in (q, q[..., 0:0], q[0:0], q[::-1], q[..., :]):
        assert part.dequantize().shape == part.shape
    if len(shape) == 1:
        assert q.take([]).shape == (0,)
    else:
        assert q.take([]).shape == (0, *shape[1:])
        assert q.mT.dequantize().shape == q.mT.shape
        with pytest.raises(ValueError, match="would tear blocks apart"):
            q.reshape(shape[::-1])


def test_an_index_may_be_traced():
    q = quantize(jnp.asarray(X[0]), granularity=PerChannel(0))
    row = jax.jit(lambda q, i: q[i].dequantize())(q, jnp.asarray(2))
    assert_same_bits(row, q[2].dequantize())


@pytest.mark.parametrize("kept_as", [None, "float16"])
def test_scales_of_weights_for_dense_lie_as_their_codes_do(kept_as, backend):
    """In memory, where there is a choice: turned back at each product, they would be copied."""
    values = backend.asarray(np.random.default_rng(0).standard_normal((96, 40)).astype(np.float32))
    q = quantize(values, "uint4", scheme="affine", granularity=PerGroup(32, 0), scale_dtype=kept_as)
    turned = q.for_dense()
    assert_same_bits(turned.dequantize(), q.dequantize())
    for blocks in (turned.scale if kept_as is None else turned.scale.storage, turned.zero_point):
        assert tuple(blocks.shape) == (3, 40)
        assert backend.is_by_columns(blocks) == (backend.name in ("numpy", "torch"))
    if kept_as is None:  # whoever trains scales has them
        trained = q.with_trainable_scales()
        assert trained.for_dense().scale is trained.scale
