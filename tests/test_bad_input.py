"""Hostile input: each call is right or a clear error, on every backend; nothing is silently wrong."""

from __future__ import annotations

import inspect
import re

import array_api_strict
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import lacks

import aqt_lite
from aqt_lite import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QArray,
    bitround,
    choose_qparams,
    convert,
    dense,
    dequantize,
    error_report,
    fake_quantize,
    int_limits,
    linear,
    plan_tree,
    quantize,
    quantize_tree,
)
from aqt_lite._registry import get_backend
from aqt_lite.testing import assert_same_bits

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
W, EIGHT = quantize(X, granularity=PerChannel(0)), aqt_lite.Integer("int8", 8, signed=True)

# The twenty abnormal inputs that were given to other libraries (int8 round trip), by what must become of them.
RIGHT = {
    "a zero row": np.stack([np.zeros(8), np.linspace(-3, 3, 8)]).astype("float32"),
    "all zeros": np.zeros((2, 8), "float32"),
    "subnormal": np.full((2, 8), 1e-40, "float32"),
    "1e-30": np.linspace(-1e-30, 1e-30, 8, dtype="float32").reshape(2, 4),
    "the ends of float32": np.asarray([[3e38, -3e38, 1.0, 0.0]], "float32"),
    "a constant": np.full((2, 8), 100.5, "float32"),
    "a small spread on a large offset": (1e6 + np.linspace(0, 1, 8)).astype("float32"),
    "empty": np.zeros((0, 8), "float32"),
    "empty along the group": np.zeros((8, 0), "float32"),
    "0-dimensional": np.asarray(-2.5, "float32"),
    "not contiguous": np.linspace(-3, 3, 48, dtype="float32").reshape(6, 8)[::-2, ::3],
    "big-endian": np.linspace(-3, 3, 8).astype(">f4"),
    "read-only": np.linspace(-3, 3, 8, dtype="float32"),
    "a length that groups do not divide": np.linspace(-3, 3, 14, dtype="float32").reshape(2, 7),
}
RIGHT["read-only"].setflags(write=False)
WIDE = {"float64 1e300": np.asarray([1e300, -1e299, 0.0]), "float16 6e4": np.asarray([6e4, -6.55e4, 1.0], "float16")}
NON_FINITE = {
    "one NaN": np.asarray([[1.0, np.nan], [2.0, 3.0]], "float32"),
    "one inf": np.asarray([[1.0, 2.0], [np.inf, 3.0]], "float32"),
}
NO_FLOATS = {
    "int32": np.arange(4, dtype="int32"),
    "bool": np.ones(4, bool),
    "complex": np.ones(4, "complex64"),
}
GRANULARITIES = (PerTensor(), PerChannel(-1), PerGroup(3), PerBlock((2, -1)))


def round_trips(x, there):
    """Every scheme, type and granularity: finite, and within half a step of what went in."""
    for granularity in GRANULARITIES:
        if x.ndim < (0 if isinstance(granularity, PerTensor) else 2 if isinstance(granularity, PerBlock) else 1):
            continue
        for dtype, scheme in [("int8", "symmetric"), ("uint8", "affine"), ("int16", "symmetric"), ("uint16", "affine")]:
            q = quantize(there, dtype, scheme=scheme, granularity=granularity).to_backend("numpy")
            values, wide = np.asarray(q.dequantize()).astype("float64"), np.asarray(x).astype("float64")
            assert np.isfinite(values).all()
            report = error_report(x, q)
            assert report.clipped == 0, (granularity, dtype, scheme)
            largest_scale = float(q.scale.max(initial=0))
            assert (np.abs(values - wide) <= largest_scale * 0.5001 + np.abs(wide) * 2.0**-10).all()


@pytest.mark.parametrize("case", RIGHT)
def test_abnormal_values_come_back(backend, case):
    x = RIGHT[case]
    round_trips(x, backend.asarray(x))


@pytest.mark.parametrize("case", WIDE)
def test_other_widths_come_back_or_are_refused(backend, case):
    x = WIDE[case]
    known = {("jax", "float64"), ("array_api_strict", "float16")}
    assert lacks(backend, x.dtype) or (backend.name, x.dtype.name) not in known
    if lacks(backend, x.dtype):
        with pytest.raises(ValueError, match=f"{x.dtype.name}.*convert.* to .*float32"):
            backend.asarray(x)
    else:
        round_trips(x, backend.asarray(x))


@pytest.mark.parametrize("case", NON_FINITE)
def test_non_finite_values_are_counted_and_located(backend, case):
    there = backend.asarray(NON_FINITE[case])
    where = r"\(0, 1\)" if "NaN" in case else r"\(1, 0\)"
    calls = [
        lambda: quantize(there),
        lambda: quantize(there, scheme="affine", granularity=PerChannel(0)),
        lambda: quantize(there, scale=0.1),
        lambda: fake_quantize(there, granularity=PerGroup(2)),
        lambda: choose_qparams(there),
    ]
    for call in calls:
        with pytest.raises(
            ValueError, match=rf"x has 1 non-finite values of 4, the first at index {where}.*nonfinite='ignore'"
        ):
            call()
    kept = backend.to_numpy(dequantize(quantize(there, nonfinite="ignore")))
    assert kept.tolist()[0][1] in (0.0, pytest.approx(2, abs=0.02))
    assert np.isfinite(kept).all()


@pytest.mark.parametrize("case", NO_FLOATS)
def test_what_is_no_float_is_refused(backend, case):
    x = backend.xp.asarray(NO_FLOATS[case])
    w = quantize(backend.asarray(np.ones((2, 4), "float32")))
    for call in (lambda: quantize(x), lambda: choose_qparams(x), lambda: fake_quantize(x), lambda: linear(x, w)):
        with pytest.raises(TypeError, match=r"x has dtype \w+: a floating-point array is needed .*convert it first"):
            call()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "x is a NoneType: give an array"),
        ("abc", "x is a str: give an array"),
        (b"abc", "x is a bytes: give an array"),
        (True, "x is a bool: give an array"),
        (1j, "x is a complex: give an array"),
        ({1.0, 2.0}, "x is a set: give an array"),
        (object(), "x is a object: give an array"),
        (np.float32, "x is a type: give an array"),
        (np.dtype("float32"), "give an array"),
        (torch.float32, "x is a dtype: give an array"),
        (torch.nn.Linear(2, 2), "x is a Linear: give an array"),
        ([[1.0], [1.0, 2.0]], "x is a list that is no array"),
        ([1.0, None], "x is a list of object"),
        (["a"], "x is a list of str"),
        ([1j], "x is a list of complex128"),
        ([True], "x is a list of bool"),
        (np.asarray([1.0, None]), "x has dtype object"),
        (np.asarray(["1.0"]), "x has dtype str"),
        (np.asarray([1], "datetime64[s]"), "x has dtype datetime64"),
        (np.ones(2, [("a", "f4")]), "x has dtype void"),
        (np.ones(3, ml_dtypes.float8_e4m3fn), "x has dtype float8_e4m3fn"),
        (np.ones(3, np.longdouble), "x has dtype"),
        (np.eye(2).view(np.matrix), r"x is a numpy.matrix, .*: use np.asarray\(x\)"),
        (torch.ones(3).to_sparse(), "x is a tensor of layout torch.sparse_coo: make it dense first"),
        (torch.ones(3, dtype=torch.float8_e5m2), "x has dtype float8_e5m2"),
        (quantize([1.0]), r"x is a QArray already: use it as it is, or pass x.dequantize\(\)"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else v[:30],
)
def test_what_is_no_array_is_refused(x, message):
    for call in (quantize, choose_qparams, fake_quantize, lambda x: error_report(x, quantize([1.0]))):
        with pytest.raises(TypeError, match=message):
            call(x)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.*:UserWarning")  # torch retires them
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # torch calls them a prototype
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")  # so does it these
def test_special_torch_tensors():
    with pytest.raises(TypeError, match=r"x is a tensor of layout torch.sparse_csr"):
        quantize(torch.eye(3).to_sparse_csr())
    with pytest.raises(TypeError, match="x has dtype qint8"):
        quantize(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8))
    with pytest.raises(TypeError, match="x is a nested tensor"):
        quantize(torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]))


def test_lists_beyond_float32():
    with pytest.raises(ValueError, match="x is a list with numbers beyond float32: make it a float64 array"):
        quantize([1e300])
    with pytest.raises(ValueError, match="x has 1 non-finite values of 2"):
        quantize([1.0, float("inf")])
    assert_same_bits(quantize([1, 2, 300]), quantize(np.asarray([1, 2, 300], "float32")))
    assert quantize([]).shape == (0,)
    assert quantize(2.5).shape == ()


# ---- arguments


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            ValueError,
            r"dtype='int9' is not a quantized type \(did you mean 'int\d'\?\): use one of int2, .*, nvfp4",
            {"dtype": "int9"},
        ),
        (ValueError, "dtype=None is not a quantized type", {"dtype": None}),
        (ValueError, "dtype='float32' is not", {"dtype": "float32"}),
        (ValueError, "int64.*is not a quantized type", {"dtype": np.int64}),
        (
            ValueError,
            r"scheme='asymmetric' is not known \(did you mean 'affine'\?\): use 'symmetric' or 'affine'",
            {"scheme": "asymmetric"},
        ),
        (ValueError, r"scheme=\['affine'\] is not known", {"scheme": ["affine"]}),
        (
            ValueError,
            r"dialect='qwik' is not known \(did you mean 'qwix'\?\): use one of 'aqt_lite', ",
            {"dialect": "qwik"},
        ),
        (ValueError, "nonfinite='skip' is not known: use 'raise' or 'ignore'", {"nonfinite": "skip"}),
        (ValueError, "backend='mxnet' is not known", {"backend": "mxnet"}),
        (TypeError, "backend=1: give the backend's name", {"backend": 1}),
        (TypeError, r"granularity='PerTensor': use PerTensor\(\)", {"granularity": "PerTensor"}),
        (TypeError, "granularity=<class", {"granularity": PerTensor}),
        (
            ValueError,
            r"PerChannel\(axis=2\): axis 2 is out of range for 2 dimensions: use -2 to 1",
            {"granularity": PerChannel(2)},
        ),
        (ValueError, r"PerChannel\(axis=-3\): axis -3", {"granularity": PerChannel(-3)}),
        (ValueError, r"PerGroup\(size=4, axis=5\): axis 5", {"granularity": PerGroup(4, 5)}),
        (ValueError, "has 3 lengths for an array of 2 dimensions", {"granularity": PerBlock((1, 1, 1))}),
        (ValueError, "zero_point is given without scale", {"zero_point": 3}),
        (ValueError, "scheme='affine' with a given scale needs its zero_point", {"scale": 0.1, "scheme": "affine"}),
        (ValueError, "dtype='uint8', which has no negative codes.*zero_point", {"scale": 0.1, "dtype": "uint8"}),
        *[
            (ValueError, f"scale={re.escape(str(bad))}: it must be positive and finite", {"scale": bad})
            for bad in (0, -1.0, 1e-45, 2.0**127)
        ],
        (ValueError, "scale=nan: it must be positive", {"scale": float("nan")}),
        (ValueError, "scale=inf: it must be positive", {"scale": float("inf")}),
        (TypeError, "scale is a str: give a number or an array", {"scale": "0.1"}),
        (TypeError, "scale is a bool", {"scale": True}),
        (TypeError, "scale has dtype bool", {"scale": np.True_}),
        (TypeError, "scale is a complex", {"scale": 1j}),
        (TypeError, "scale is a dict", {"scale": {}}),
        (TypeError, "scale is a QArray", {"scale": quantize([1.0])}),
        (TypeError, "scale is a list that is no array", {"scale": [1.0, [2.0]]}),
        (TypeError, "scale has dtype object", {"scale": [None]}),
        (
            ValueError,
            r"scale has shape \(3,\): PerTensor\(\) of an array of shape \(3, 4\) needs \(1, 1\)",
            {"scale": [1.0] * 3},
        ),
        (
            ValueError,
            r"scale has shape \(4,\): PerChannel\(axis=0\)",
            {"scale": [1.0] * 4, "granularity": PerChannel(0)},
        ),
        (
            ValueError,
            r"scale=-2.0: every scale must be .*\(2 of 3 are not\)",
            {"scale": [1.0, -2.0, 0.0], "granularity": PerChannel(0)},
        ),
        (ValueError, "zero_point=128: must be a code of int8, -128 to 127", {"scale": 0.1, "zero_point": 128}),
        (ValueError, "zero_point=-1: must be a code of uint8", {"scale": 0.1, "zero_point": -1, "dtype": "uint8"}),
        (ValueError, "zero_point=999", {"scale": 0.1, "zero_point": [[999]]}),
        (TypeError, "zero_point=1.0 is a float: it must be an integer", {"scale": 0.1, "zero_point": 1.0}),
        (TypeError, "zero_point has dtype float32: it must be an integer", {"scale": 0.1, "zero_point": np.float32(1)}),
        (TypeError, "zero_point is a bool", {"scale": 0.1, "zero_point": True}),
        (ValueError, r"zero_point has shape \(2,\)", {"scale": 0.1, "zero_point": [1, 2]}),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_wrong_arguments(backend, error, message, arguments):
    x = backend.asarray(X)
    for function in (quantize, fake_quantize):
        with pytest.raises(error, match=message):
            function(x, **arguments)


def test_arguments_that_other_libraries_have_are_named():
    q, tree = quantize(X), {"w": X}
    for call, words in [
        (lambda: quantize(X, axis=0), r"quantize\(\) has no argument 'axis': use granularity=PerChannel\(axis\)"),
        (lambda: quantize(X, bits=4), "'bits': use dtype='int4'"),
        (lambda: convert(q, "int16", axis=0), r"convert\(\) has no argument 'axis': use granularity=PerChannel"),
        (lambda: convert(q, bits=4), "'bits': use dtype='int4'"),
        (lambda: convert(q, "int16", symmetric=True), r"'symmetric': it has q, .*quantize says that with scheme="),
        (lambda: quantize_tree(tree, bits=4), r"'bits': use rules=\[\(pattern, spec\)\], .*with dtype='int4'"),
        (lambda: quantize_tree(tree, "int4", group_size=32), r"'group_size': use rules.*granularity=PerGroup\(size\)"),
        (
            lambda: quantize_tree(tree, [("*", {"weights": "int8"})]),
            r"rule 1 \('\*'\): there is no 'weights': use dtype=",
        ),
        (lambda: plan_tree(tree, qtype="int4"), r"'qtype': use rules=.*with dtype='int4'"),
        (lambda: error_report(X, q, axis=0), r"error_report\(\) has no argument 'axis': it has x, q, worst"),
        (lambda: bitround(X, bits=7), r"bitround\(\) has no argument 'bits': use keepbits="),
        (
            lambda: QArray.from_codes(q.qvalue, 1.0, axis=0),
            r"from_codes\(\) has no argument 'axis': use granularity=Per",
        ),
        (lambda: QArray.from_codes(q.qvalue, 1.0, scales=1.0), r"'scales': use scale="),
        (
            lambda: linear(X, q, axis=0),
            r"linear\(\) has no argument 'axis': it has x, w, bias, mode; aqt_lite.quantize",
        ),
        (lambda: dense(X, q, transpose=True), r"dense\(\) has no argument 'transpose': use w= .*, or linear"),
        (
            lambda: dequantize(q, bits=4),
            r"'bits': it has q, dtype, fill_value, out; .*quantize says that with dtype='int4'",
        ),
        (
            lambda: q.dequantize(num_bits=4),
            r"dequantize\(\) has no argument 'num_bits': it has dtype, fill_value, out;",
        ),
        (lambda: PerGroup(group_size=32), r"PerGroup\(\) has no argument 'group_size': use size="),
        (lambda: PerGroup(32, dim=0), r"PerGroup\(\) has no argument 'dim': use axis="),
        (lambda: PerBlock(block_size=(1, 32)), r"PerBlock\(\) has no argument 'block_size': use shape="),
        (lambda: PerTensor(0, nonsense=1), r"PerTensor\(\) has no argument 'nonsense': it has none"),
    ]:
        with pytest.raises(TypeError, match=words):
            call()


def test_words_of_quantize_itself_are_for_rules_where_there_are_rules():
    """Each of them but those that no leaf of a tree has."""
    for name in set(inspect.signature(quantize).parameters) - {"x", "keepbits", "out", "backend"}:
        with pytest.raises(
            TypeError, match=rf"has no argument '{name}': use rules=.*quantize's keywords, with {name}=$"
        ):
            quantize_tree({}, **{name: None})


def test_no_public_function_leaves_an_argument_of_other_libraries_to_python():
    """What is no function of arrays has arguments of its own alone: records, registries, and the joining of arrays."""
    others = {"available_backends", "concatenate", "stack", "progress", "register_backend", "register_format"}
    functions = [
        f for name in aqt_lite.__all__ if inspect.isfunction(f := getattr(aqt_lite, name)) and name not in others
    ]
    assert len(functions) > 20
    for function in (*functions, QArray.from_codes, QArray.from_bytes, QArray.dequantize):
        for name in ("num_bits", "qtype", "groupsize", "per_channel", "sym", "no_such_name"):
            with pytest.raises(TypeError, match=rf"\w+\(\) has no argument '{name}': (use|it has) "):
                function(**{name: 4})


def test_wrong_scale_arrays_of_the_backend(backend):
    x = backend.asarray(X)
    for bad in (0.0, -1.0, np.nan, np.inf, 2.0**-126 * 1.5, 2.0**127):
        with pytest.raises(ValueError, match=r"every scale must be positive and finite.*\(1 of 3 are not\)"):
            quantize(x, scale=backend.asarray(np.asarray([1, bad, 1], "float32")), granularity=PerChannel(0))
    with pytest.raises(TypeError, match="zero_point has dtype float32"):
        quantize(x, scale=0.1, zero_point=backend.asarray(np.ones((1, 1), "float32")))
    with pytest.raises(ValueError, match="zero_point=-129"):
        quantize(x, scale=0.1, zero_point=backend.asarray(np.full((1, 1), -129, "int32")))
    last = {"scale": [2.0**-125, 2.0**126, 1.0], "granularity": PerChannel(0)}  # that are good
    ends = quantize(x, **last, on_clip="saturate")
    assert np.isfinite(backend.to_numpy(ends.dequantize())).all()


def test_wrong_granularities():
    for bad, error in [
        (0, ValueError),
        (-1, ValueError),
        (4.0, TypeError),
        (True, TypeError),
        ("4", TypeError),
        (None, TypeError),
    ]:
        with pytest.raises(error, match=rf"PerGroup\(size={bad!r}\): size must be"):
            PerGroup(bad)
    for bad in (1.0, False, "0", None, (0,)):
        with pytest.raises(TypeError, match=r"PerChannel\(axis=.*\): axis must be an integer"):
            PerChannel(bad)
        with pytest.raises(TypeError, match=r"PerGroup\(axis=.*\): axis must be an integer"):
            PerGroup(4, bad)
    for bad, error in [
        ((0, 1), ValueError),
        ((-2, 1), ValueError),
        ((1.5, 1), TypeError),
        ((True, 1), TypeError),
        (4, TypeError),
        ("44", TypeError),
    ]:
        with pytest.raises(error, match=r"PerBlock\(shape="):
            PerBlock(bad)
    with pytest.raises(ValueError, match=r"0-dimensional array has no axis; use PerTensor\(\)"):
        quantize(1.0, granularity=PerGroup(2))


def test_a_group_longer_than_the_axis_is_the_axis(backend):
    q = quantize(backend.asarray(X), granularity=PerGroup(10**12))
    assert_same_bits(q.scale, quantize(X, granularity=PerChannel(0)).scale)
    assert_same_bits(q.dequantize(), quantize(X, granularity=PerChannel(0)).dequantize())


# ---- where QArrays and arrays meet


def test_dequantize_of_other_things(backend):
    for other in (backend.asarray(X), X.tolist(), None, 3):
        with pytest.raises(
            TypeError, match=r"not a QArray: quantize it first with aqt_lite.quantize, or use QArray.from_codes"
        ):
            dequantize(other)
    q = quantize(backend.asarray(X))
    for dtype in ("int8", 3, np.int32):
        with pytest.raises(ValueError, match="is not a floating-point type: use one of float16"):
            dequantize(q, dtype)
    for dtype in ("float", "f4", "fp32", "Float32"):
        with pytest.raises(ValueError, match=r"is not a floating-point type \(did you mean 'float32'\?\): use one of"):
            dequantize(q, dtype)


def test_values_that_a_narrower_type_cannot_hold():
    q = quantize(np.asarray([1e5, -1e6], "float32"))
    with pytest.raises(ValueError, match="float16 cannot hold every result"):
        q.dequantize("float16")
    assert np.isfinite(quantize(np.asarray([1e5, -1e6], "float32")).dequantize("bfloat16").astype("float32")).all()


@pytest.mark.parametrize("product", [dense, linear])
def test_products_refuse_what_does_not_fit(backend, product):
    def array(*shape, dtype="float32"):
        return backend.asarray(np.ones(shape, dtype))

    name = product.__name__
    w = quantize(array(4, 3) if product is dense else array(3, 4))
    assert tuple(product(array(2, 5, 4), w, array(3)).shape) == (2, 5, 3)
    cases = [
        (TypeError, "w is a .*, not a QArray: quantize it first", (array(2, 4), array(4, 3))),
        (TypeError, "w is a NoneType", (array(2, 4), None)),
        (TypeError, "x is a NoneType", (None, w)),
        (TypeError, "x has dtype int32", (array(2, 4, dtype="int32"), w)),
        (ValueError, r"x has shape \(2, 3\).*the last axis of x must have length 4", (array(2, 3), w)),
        (ValueError, r"x has shape \(\)", (array(), w)),
        (ValueError, r"x has shape \(1, 3\)", (quantize(array(1, 3)), w)),
        (ValueError, r"bias has shape \(4,\): .* it must be \(3,\)", (array(2, 4), w, array(4))),
        (ValueError, r"bias has shape \(3, 1\)", (array(2, 4), w, array(3, 1))),
        (ValueError, r"bias has shape \(\)", (array(2, 4), w, 1.0)),
        (TypeError, "bias is a QArray already", (array(2, 4), w, quantize(array(3)))),
        (
            TypeError,
            rf"bias='Fast' is text: the third.* of {name} is the bias.*{name}\(x, w, mode='fast'\)",
            (None, w, "Fast"),
        ),
        (TypeError, "bias has dtype int32", (array(2, 4), w, array(3, dtype="int32"))),
        (ValueError, "takes a 2-dimensional weight", (array(2, 4), quantize(array(2, 4, 3)))),
        (ValueError, "takes a 2-dimensional weight", (array(2, 4), quantize(array(4)))),
    ]
    for error, message, arguments in cases:
        with pytest.raises(error, match=message):
            product(*arguments)
    with pytest.raises(ValueError, match="mode='exact' is not known: use 'fast', 'reproducible' or 'integer'"):
        product(array(2, 4), w, mode="exact")
    wide = quantize(array(4, 3) if product is dense else array(3, 4), "int16")
    with pytest.raises(ValueError, match=r"mode='reproducible' is not possible: w has int16 codes.*Use mode='fast'"):
        product(array(2, 4), wide, mode="reproducible")
    inputs = 0 if product is dense else 1
    across = quantize(array(4, 3) if product is dense else array(3, 4), granularity=PerGroup(2, 1 - inputs))
    with pytest.raises(
        ValueError, match=rf"no sum of integers .* along its inputs, granularity=PerGroup\(2, {inputs}\)"
    ):
        product(array(2, 4), across, mode="reproducible")


def test_empty_products(backend):
    for rows, inside, outside in [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)]:
        x, w = np.ones((rows, inside), "float32"), np.ones((outside, inside), "float32")
        for mode in ("fast", "reproducible"):
            y = backend.to_numpy(linear(backend.asarray(x), quantize(backend.asarray(w)), mode=mode))
            np.testing.assert_array_equal(y, x @ w.T)


def test_float16_products_that_overflow(backend):
    if backend.name == "array_api_strict":
        pytest.skip("it has no float16")
    x = backend.asarray(np.full((1, 4), 6e4, "float16"))
    with pytest.raises(ValueError, match="float16 cannot hold every result, which overflow to infinity"):
        linear(x, quantize(backend.asarray(np.ones((2, 4), "float32"))))
    several = np.ones((3, 4), "float16")
    several[1, 2] = np.inf  # an infinity of x is no overflow, and stays in its row
    w = quantize(backend.asarray(np.ones((2, 4), "float32")))
    y = backend.to_numpy(linear(backend.asarray(several), w))
    np.testing.assert_array_equal(y, [[4, 4], [np.inf, np.inf], [4, 4]])
    several[2] = 6e4
    with pytest.raises(ValueError, match="float16 cannot hold every result"):
        linear(backend.asarray(several), w)


def test_non_finite_activations_give_nan_or_infinity_never_a_number(backend):
    w = quantize(backend.asarray(np.ones((2, 4), "float32")))
    for bad in (np.nan, np.inf):
        x = np.ones((3, 4), "float32")
        x[1, 2] = bad
        for mode in ("fast", "reproducible"):
            y = backend.to_numpy(linear(backend.asarray(x), w, mode=mode))
            assert np.isfinite(y).all(axis=1).tolist() == [True, False, True]
            assert not np.isfinite(y[1]).any()


# ---- backends and devices that do not mix


def test_mixed_backends(backend):
    other = get_backend("torch" if backend.name != "torch" else "numpy")
    x, far = backend.asarray(X), other.asarray(X)
    q = quantize(x)
    with pytest.raises(TypeError, match=f"scale is a {other.name} array but x is {backend.name}"):
        quantize(x, scale=other.asarray(np.ones((1, 1), "float32")))
    with pytest.raises(TypeError, match=f"zero_point is a {other.name} array"):
        quantize(x, scale=0.1, zero_point=other.asarray(np.ones((1, 1), "int32")))
    with pytest.raises(TypeError, match=f"x is a {other.name} array but w is a {backend.name} QArray: move one"):
        linear(far, q)
    with pytest.raises(TypeError, match=f"x is a {other.name} QArray but w is a {backend.name} one"):
        linear(quantize(far), q)
    with pytest.raises(TypeError, match=f"bias is a {other.name} array"):
        linear(x, q, other.asarray(np.ones(3, "float32")))
    with pytest.raises(TypeError, match=f"scale is a {other.name} array but qvalue is {backend.name}"):
        QArray.from_codes(q.qvalue, other.asarray(np.ones((1, 1), "float32")))
    assert error_report(far, q).clipped == 0  # a report may compare backends


def test_mixed_devices():
    device = array_api_strict.Device("device1")
    x, far = array_api_strict.asarray(X), array_api_strict.asarray(X, device=device)
    with pytest.raises(ValueError, match=r"x is on device .*device1.* but w on .*CPU_DEVICE"):
        linear(far, quantize(x))
    with pytest.raises(ValueError, match="scale is on device"):
        quantize(x, scale=array_api_strict.ones((1, 1), dtype=array_api_strict.float32, device=device))
    q = quantize(far, scale=0.5, zero_point=3, granularity=PerGroup(2))  # numbers and results follow x
    assert {leaf.device for leaf in (q.storage, q.scale, q.zero_point, q.dequantize())} == {device}
    assert_same_bits(q.to_backend("numpy"), quantize(X, scale=0.5, zero_point=3, granularity=PerGroup(2)))
    assert linear(far, quantize(far), [1.0, 2.0, 3.0]).device == device

    meta = torch.ones(3, 4, device="meta")
    with pytest.raises(ValueError, match="x is on device meta but w on cpu: move one of them"):
        linear(meta, quantize(torch.ones(3, 4)))
    with pytest.raises(ValueError, match="scale is on device cpu but x on meta"):
        quantize(meta, scale=torch.ones(1, 1))
    assert quantize(meta, scale=0.5).scale.device.type == "meta"


def test_float64_never_narrows_silently():
    x = np.linspace(-1, 1, 4)
    with pytest.raises(ValueError, match="JAX would narrow float64 silently: convert it to float32 first"):
        quantize(x, backend="jax")
    q = quantize(x)
    assert (q.float_dtype, q.scale.dtype.name) == ("float64", "float64")
    with pytest.raises(ValueError, match="JAX would narrow float64"):
        q.to_backend("jax")
    with pytest.raises(ValueError, match="scale=1e-40"):
        quantize(x.astype("float32"), scale=1e-40)
    assert quantize(x, scale=1e-40, on_clip="saturate").scale.dtype == np.float64
    with pytest.raises(ValueError, match="array_api_strict has no dtype float16"):
        quantize(x.astype("float16"), backend="array_api_strict")


def test_int_limits_of_nonsense():
    for bad in ("int", None, 8, "int128", "int4", "bool"):
        with pytest.raises(ValueError, match="is not an integer type: use one of int8, int16, int32, int64, uint8, "):
            int_limits(bad)


def test_inputs_are_never_written_to(backend):
    x = backend.asarray(X.copy())
    before = backend.to_numpy(x).copy()
    scale = backend.asarray(np.full((3, 1), 0.1, "float32"))
    q = quantize(x, scale=scale, granularity=PerChannel(0))
    fake_quantize(x), dequantize(q), linear(x, q, mode="reproducible"), linear(x, q), error_report(x, q)
    assert_same_bits(x, before)
    assert_same_bits(scale, np.full((3, 1), 0.1, "float32"))


def test_wrong_things_inside_jit_are_errors_at_trace_time():
    with pytest.raises(ValueError, match="must have length 4"):
        jax.jit(linear)(jnp.ones((2, 3)), quantize(jnp.asarray(X)))
    with pytest.raises(TypeError, match="x has dtype int32"):
        jax.jit(quantize)(jnp.arange(3))
    with pytest.raises(TypeError, match="zero_point has dtype float32: it must convert to int32"):
        jax.jit(lambda x, z: quantize(x, scale=0.1, zero_point=z))(jnp.ones(3), jnp.ones(1))


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("INT4", "int4"),
        ("fp8", "float8_e4m3fn"),
        ("mxfp5", "mxfp4"),
        (4, "int4"),
        ("int32", None),  # a dtype, and no misspelling
        ("something", None),
    ],
)
def test_a_format_that_is_not_known_is_told_the_nearest(given, meant):
    told = "" if meant is None else rf" \(did you mean '{meant}'\?\)"
    with pytest.raises(ValueError, match=rf"^dtype={given!r} is not a quantized type{told}: use one of int2"):
        quantize(np.ones((4, 64), np.float32), given)


# ---- what is missing, in another place, or nearly right


@pytest.mark.parametrize(
    ("argument", "call", "given", "meant", "among"),
    [
        ("mode", lambda v: linear(X, W, mode=v), "repro", "reproducible", "'fast', 'reproducible' or 'integer'"),
        ("mode", lambda v: aqt_lite.einsum("ij,kj->ik", X, W, mode=v), "Fast", "fast", "'fast' or 'reproducible'"),
        ("modes", lambda v: aqt_lite.warm_up(modes=v), "repro", "reproducible", "'fast' or 'reproducible'"),
        ("product", lambda v: aqt_lite.warm_up(product=v), "Dense", "dense", "'linear' or 'dense'"),
        ("scheme", lambda v: quantize(X, scheme=v), "asym", "affine", "'symmetric' or 'affine'"),
        ("rounding", lambda v: quantize(X, rounding=v), "nearest", "half_even", "'half_even', .* or 'stochastic'"),
        ("nonfinite", lambda v: quantize(X, nonfinite=v), "ignored", "ignore", "'raise' or 'ignore'"),
        ("on_clip", lambda v: quantize(X, on_clip=v), "error", "raise", "'saturate', 'warn' or 'raise'"),
        ("missing", lambda v: quantize(X, missing=v), "NaN", "nan", "'nan'"),
        ("scale_mode", lambda v: quantize(X, "mxfp4", scale_mode=v), "flor", "floor", "'floor', .* or 'rceil'"),
        ("dialect", lambda v: quantize(X, dialect=v), "torch-ao", "torchao", "one of 'aqt_lite', .* or a Dialect"),
        ("backend", lambda v: quantize(X, backend=v), "np", "numpy", "'array_api_strict', 'jax', 'numpy' or 'torch'"),
        ("layout", lambda v: plan_tree({"w": X}, layout=v), "Dense", "dense", "'linear', 'dense' or None"),
        ("offset", lambda v: quantize(X, offset=v), "dat", "data", "'data'"),
        ("Dialect.*reach", lambda v: aqt_lite.Dialect("d", reach=v), "tops", "top", "'top', .* or 'lowest'"),
        ("Dialect.*rounding", lambda v: aqt_lite.Dialect("d", rounding=v), "rne", "half_even", "one of 'half_even', "),
        (
            "Format.*top",
            lambda v: aqt_lite.Format("f", EIGHT, top=v),
            "largst",
            "largest",
            "'largest' or 'power of two'",
        ),
    ],
)
def test_a_name_of_a_closed_list_is_told_all_of_them_and_the_one_that_was_meant(argument, call, given, meant, among):
    for value, near in ((given, rf" \(did you mean '{meant}'\?\)"), ("xyz", ""), (7, "")):
        if isinstance(value, str) or argument not in ("modes", "dialect", "backend", "offset", "Dialect.*rounding"):
            with pytest.raises(ValueError, match=rf"^{argument}={value!r} is not known{near}: use {among}"):
                call(value)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (r"PerGroup\(\) needs size, as in PerGroup\(32\)", lambda: PerGroup()),
        (r"PerChannel\(\) needs axis, as in PerChannel\(0\)", lambda: PerChannel()),
        (r"PerBlock\(\) needs shape, as in PerBlock\(\(2, 64\)\)", lambda: PerBlock()),
        (r"PerBlock\(\) takes shape by position, and 64 is one too many$", lambda: PerBlock(2, 64)),
        (r"PerTensor\(\) takes nothing by position, and 0 is one too many$", lambda: PerTensor(0)),
        (r"linear\(\) needs x and w, as in linear\(\[1, 2, 3\], w\)", lambda: linear()),
        (r"linear\(\) takes x, w and bias by position, .*: give mode='fast'", lambda: linear(X, W, None, "fast")),
        (r"takes x and dtype by .* 'affine' is one .*: give scheme='affine'", lambda: quantize(X, "int8", "affine")),
        (r"give granularity=PerGroup\(size=2, axis=-1\)", lambda: quantize(X, "int4", PerGroup(2))),
        (r"dtype=PerGroup.* is a granularity: give it by name, granularity=", lambda: quantize(X, PerGroup(2))),
        (r"<ndarray of shape \(3, 4\)> is one too many; by name go x and", lambda: aqt_lite.compare(W, W, X)),
        (r"choose_packing\(\) takes x .*: give max_abs_err=0.1", lambda: aqt_lite.cf.choose_packing(X, 0.1)),
        (r"choose_packing\(\) needs max_abs_err, as in", lambda: aqt_lite.cf.choose_packing(X)),
        (r"to_backend\(\) needs name, as in to_backend\(\"", lambda: W.to_backend()),
        (r"Integer\(\) needs bits and signed, as in Integer\(\"int9\", 9, ", lambda: aqt_lite.Integer("i")),
        (r"granularity='channel': use .*, here PerChannel\(", lambda: quantize(X, granularity="channel")),
        (r"granularity=<class .*: use .*, here PerGroup\(size=32", lambda: quantize(X, granularity=PerGroup)),
        (r"granularity=32: use .*, here PerGroup\(32\)", lambda: quantize(X, granularity=32)),
        (r"Integer\('i'\): signed='x': give True or False", lambda: aqt_lite.Integer("i", 4, "x")),
        (r"Float\('f'\): exponent='2': give an integer", lambda: aqt_lite.Float("f", "2", 2, 1, 7.0)),
        (r"Format\('f'\): group='32': give an integer", lambda: aqt_lite.Format("f", EIGHT, group="32")),
        (r"form='int9': give a Format, or an element type", lambda: aqt_lite.register_format("int9")),
        (r"worst is a str: give an integer", lambda: error_report(X, W, worst="3")),
        (r"q is a ndarray, not a QArray: quantize it first", lambda: error_report(W, X)),
        (r"params has QArrays and quantized has none", lambda: aqt_lite.tree_report({"w": W}, {"w": X})),
        (r"path is a int: give the file's name", lambda: aqt_lite.load(3)),
        (r"rules=\[\('\*', {'dtype': 'int4'}\)\]", lambda: quantize_tree({"w": X}, "int4")),
        (r"progress='yes': give True, False, None or a function", lambda: quantize_tree({"kernel": X}, progress="yes")),
        (r"save\(\): check_values='no' is neither True nor", lambda: aqt_lite.save("a", {}, check_values="no")),
        (r"powers_of_two='no' is neither", lambda: aqt_lite.cf.choose_packing(X, max_abs_err=1, powers_of_two="no")),
        (r"Format\('f'\): scaled=1: give True or False", lambda: aqt_lite.Format("f", EIGHT, scaled=1)),
        (r"Dialect\('d'\): divides=1: give True or False", lambda: aqt_lite.Dialect("d", divides=1)),
        (r"symmetric='int8': give a tuple of names .*, or None", lambda: aqt_lite.Dialect("d", symmetric="int8")),
        (r"narrow_from=2.5: give an integer, or None", lambda: aqt_lite.Dialect("d", narrow_from=2.5)),
        (r"divides_zero='no': give True or False, or None", lambda: aqt_lite.Dialect("d", divides_zero="no")),
        (r"no argument 'divide_range': .* mean 'divides_range'\?", lambda: aqt_lite.Dialect("", divide_range=1)),
        (r"of_floats=3: give a Dialect, or None", lambda: aqt_lite.Dialect("d", of_floats=3)),
        (r"reaches=.*: give a tuple of pairs", lambda: aqt_lite.Dialect("d", reaches=(("int8", "most"),))),
        (r"whole='torch': give a function, or None", lambda: aqt_lite.Dialect("d", whole="torch")),
        (r"axis is a str: give an integer", lambda: aqt_lite.concatenate([W], axis="0")),
        (r"length='a': give an integer", lambda: W.reshape("a")),
        (r"packed_length='4': give an integer", lambda: QArray.from_codes(W.qvalue, 1.0, packed_length="4")),
        (r"dimension_numbers=\(1, 1\): give \(\(x contracting", lambda: aqt_lite.ops.dot_general(X, W, (1, 1))),
    ],
)  # fmt: skip
def test_what_is_missing_or_misplaced_is_told_the_way(words, call):
    with pytest.raises(TypeError, match=words):
        call()


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (r"mode=<ndarray of shape \(3, 4\)> is not known", lambda: linear(X, W, mode=X)),
        (r"dtype=<ndarray of shape \(3, 4\)> is not a quantized type", lambda: quantize("int8", X)),
        (r"offset=<ndarray of shape \(3, 4\)>: it is chosen here", lambda: choose_qparams(X, offset=X)),
        (r"activations='int9' is not a quantized type", lambda: aqt_lite.einsum("ij,kj", X, W, activations="int9")),
        (r"scale_mode='up' is not known: use 'floor',", lambda: aqt_lite.Dialect("d", scale_mode="up")),
        (r"range_instead=nan: give a normal float32", lambda: aqt_lite.Dialect("d", range_instead=float("nan"))),
        (r"power_rounding=1.5: give a part of 1", lambda: aqt_lite.Dialect("d", power_rounding=1.5)),
        (r"narrow_from=-3: give bits, 1 and more", lambda: aqt_lite.Dialect("d", narrow_from=-3)),
        (r"scale_rounding='half' is not known", lambda: aqt_lite.Format("f", EIGHT, scale_rounding="half")),
        (r"scale_rounding=3 is not known", lambda: aqt_lite.Format("f", EIGHT, scale_rounding=3)),
        (r"worst=-1: give how many", lambda: error_report(X, W, worst=-1)),
        (r"axes \(5, 6\) are no order of the 2 axes: give each once, 0 to 1", lambda: W.transpose(5, 6)),
        (r"dtype='INT4' is not a quantized type \(did you mean 'int4'\?\)", lambda: quantize(X, "INT4")),
        (r"offset is given without scale: .* offset='data' has it chosen", lambda: quantize(X, offset=0.5)),
    ],
)
def test_values_that_cannot_be_are_told_so(words, call):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("words", "call"),
    [
        (r"Integer\(name=None\): give a name", lambda: aqt_lite.Integer(None, 8, signed=True)),
        (r"Float\(name=3\): give a name", lambda: aqt_lite.Float(3, 2, 2, bias=1, max=7.0)),
        (r"Format\(name=''\): give a name", lambda: aqt_lite.Format("", aqt_lite.Integer("seven", 7, signed=True))),
        (r"offset='bogus': give True, False or None", lambda: aqt_lite.convert(W, "int16", offset="bogus")),
        (r"backend=\['numpy'\]: give the backend's name", lambda: quantize(X, backend=["numpy"])),
        (r"quantize\(\) has no argument 'max_error': use max_abs_err=", lambda: quantize(X, "auto", max_error=0.1)),
    ],
)
def test_values_of_another_type_are_told_so(words, call):
    with pytest.raises(TypeError, match=words):
        call()


def test_mode_reproducible_names_what_is_float64():
    wide, bias = X.astype("float64"), np.zeros(3)
    convert_it = "which not every backend has. Use mode='fast', or convert"
    for words, x, w, b in [
        (rf"x has dtype float64, {convert_it} x to float32 first", wide, W, None),
        (rf"bias has dtype float64, {convert_it} bias to float32", X, W, bias),
        (rf"x and bias have dtype float64, {convert_it} x and bias to float32", wide, W, bias),
        (r"w was quantized from float64, .* or quantize w from float32", X, quantize(wide), None),
        (rf"x has dtype float64, {convert_it} x", quantize(wide), W, None),
    ]:
        with pytest.raises(ValueError, match=rf"mode='reproducible' is not possible: {words}"):
            linear(x, w, b, mode="reproducible")
