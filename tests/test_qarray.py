"""The container: invariants, indexing, copies, printing, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from optional import jax, jnp

from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, QArray, dequantize, quantize
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
    with pytest.raises(IndexError, match="axis 2 has groups of 4: slice it at multiples of 4, or dequantize first"):
        q[..., 3]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (4, "index 4 is out of range for axis 0 of length 4"),
        (-5, "index -5 is out of range"),
        ((0, 0, 10), "index 10 is out of range for axis 2 of length 10"),
        ((0, 0, 0, 0), "too many entries for 3 dimensions"),
        ((..., ...), "too many entries"),
        (None, "takes integers, slices and"),
        (True, "takes integers, slices and"),
        (1.0, "takes integers, slices and"),
        ("a", "takes integers, slices and"),
        ([0, 1], "takes integers, slices and"),
        (np.asarray([0, 1]), "takes integers, slices and"),
        (np.asarray([True, False, True, False]), "takes integers, slices and"),
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


# ---- NumPy, copies, equality, printing


def test_numpy_sees_the_values(backend):
    q = quantize(backend.asarray(X), scheme="affine", granularity=PerGroup(4))
    assert_same_bits(np.asarray(q), q.dequantize())
    assert np.asarray(q, dtype="float64").dtype == np.float64
    assert np.max(np.abs(np.asarray(q) - X)) < 0.1
    with pytest.raises(ValueError, match="copy=False is not possible"):
        np.asarray(q, copy=False)


def test_copies_and_pickles(backend):
    q = quantize(backend.asarray(X), scheme="affine", granularity=PerGroup(4))
    for other in (copy.copy(q), copy.deepcopy(q)):
        assert_same_bits(other, q)
        assert other.block == q.block
    assert copy.copy(q).storage is q.storage
    if backend.name == "array_api_strict":
        return  # its arrays' dtypes and devices do not survive pickling
    assert_same_bits(pickle.loads(pickle.dumps(q)), q)


def test_it_is_frozen_and_compared_by_identity():
    q = quantize(X)
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.dtype = "int16"
    same = quantize(X)
    assert q in [q]
    assert q != same  # elementwise comparison would have to return an array: compare values or use assert_same_bits
    assert len({q, same}) == 2
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
        (ValueError, "dtype='float32' is not a quantized type", (scale, scale)),
        (ValueError, "dtype='int32' is not a quantized type", (zero, scale)),
        (TypeError, "scale is float but qvalue is", (codes, 0.5)),
        (TypeError, "scale is NoneType but qvalue is", (codes, None)),
        (
            ValueError,
            r"scale has shape \(2, 1\): PerTensor\(\) of \(2, 2\) is \(1, 1\)",
            (codes, array([[1], [2]], "float32")),
        ),
        (ValueError, r"scale has shape \(\)", (codes, array(1, "float32"))),
        (TypeError, "scale has dtype int32: it must be float32", (codes, zero)),
        (ValueError, r"zero_point has shape \(2, 1\)", (codes, scale, array([[1], [2]], "int32"))),
        (TypeError, "zero_point has dtype int8: it must be int32", (codes, scale, array([[1]], "int8"))),
    ]
    unsigned = array([[1, 2], [3, 4]], "uint8")
    cases += [
        (ValueError, "qvalue has dtype uint8 but no zero_point", (unsigned, scale)),
        (ValueError, "zero_point=-1: must be a code of uint8, 0 to 255", (unsigned, scale, array([[-1]], "int32"))),
        (ValueError, "zero_point=128: must be a code of int8", (codes, scale, array([[128]], "int32"))),
        *(
            (ValueError, "every scale must be positive and finite", (codes, array([[bad]], "float32")))
            for bad in (np.nan, np.inf, -0.5, 0.0, 1e-40, 3e38)
        ),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            QArray.from_codes(*arguments)
    with pytest.raises(ValueError, match="float_dtype='int8' is not a floating-point type"):
        QArray.from_codes(codes, scale, float_dtype="int8")
    with pytest.raises(TypeError, match="scale has dtype float32: it must be float64"):
        QArray.from_codes(codes, scale, float_dtype="float64")
    with pytest.raises(ValueError, match=r"PerGroup\(size=2, axis=3\): axis 3 is out of range"):
        QArray.from_codes(codes, scale, granularity=PerGroup(2, axis=3))
    with pytest.raises(TypeError, match="granularity='tensor'"):
        QArray.from_codes(codes, scale, granularity="tensor")


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
