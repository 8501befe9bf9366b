"""Bytes of other libraries: layouts against what the libraries themselves wrote and read, and hostile bytes."""

from __future__ import annotations

import contextlib
import json
import pickle
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from forms import SOON_IN_MEMORY
from golden.generate import decoded
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import jax, torch
from oracles import layouts as written
from oracles import libraries

import aqt_lite
from aqt_lite import PerGroup, QArray, _ggml_steps, layouts
from aqt_lite._dispatch import run
from aqt_lite.formats import BLOCK_TYPES, FORMATS, element_type
from aqt_lite.ggml import ENCODERS, quantize_blocks
from aqt_lite.layouts import LAYOUTS, Family, Field, Layout, Leaf, Part
from aqt_lite.testing import assert_same_bits, mismatches

GOLDEN_FILE = Path(__file__).parent / "golden" / "layouts.json"
GOLDEN = json.loads(GOLDEN_FILE.read_text())
OF_GGML = {case["type"]: case for case in GOLDEN["ggml"]["decoders"]}
X = decoded(GOLDEN["ggml"]["x"])
TYPES = tuple(OF_GGML)
WITH_OFFSETS = ("q4_1", "q5_1", "q2_k", "q4_k", "q5_k")


def few_that_compile(test):
    """Of JAX, for which every kind of codes compiles for seconds, two types; the others are exhaustive."""
    for name in set(TYPES) - {"q4_1", "q6_k"}:
        test = pytest.mark.exhaustive_where(backend="jax", name=name)(test)
    return test


def stored(name):
    """Bytes that ggml wrote, and the values that it reads in them."""
    case = OF_GGML[name]
    return decoded(case["bytes"]), decoded(case["values"])


def read(name, backend="numpy"):
    data, values = stored(name)
    return QArray.from_bytes(data, name, values.shape, backend=backend)


def compiled_by_torch(function, *arguments, options=SOON_IN_MEMORY):
    """One graph without a break."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inductor's own, about torch.jit
        return torch.compile(function, fullgraph=True, options=options)(*arguments)


# ---- ggml's block types, held against bytes and values of libgguf and gguf (tests/oracles/libraries.py)


def test_the_golden_vectors_are_few_and_say_who_made_them():
    assert GOLDEN_FILE.stat().st_size < 300_000
    assert GOLDEN["header"]["versions"]["libgguf"] == "0.2.2"
    assert {a.name for a in LAYOUTS["gguf"].layouts} == {*TYPES}
    assert {case["type"] for case in GOLDEN["ggml"]["encoders"]} == {*ENCODERS}


@pytest.mark.parametrize("name", TYPES)
def test_values_are_those_that_ggml_reads(backend, name):
    values = stored(name)[1]
    q = read(name, backend.name)
    assert mismatches(backend.to_numpy(q.dequantize()), values) == 0
    assert q.backend == backend.name


def test_values_under_jit():
    data = [read(name, "jax") for name in TYPES]
    for name, value in zip(TYPES, jax.jit(lambda qs: [q.dequantize() for q in qs])(data), strict=True):
        assert mismatches(np.asarray(value), stored(name)[1]) == 0, name


@pytest.mark.exhaustive  # compilers fold what a function closes over: a program each
def test_values_of_constants_under_jit():
    data = [read(name, "jax") for name in TYPES]
    for name, value in zip(TYPES, jax.jit(lambda: [q.dequantize() for q in data])(), strict=True):
        assert mismatches(np.asarray(value), stored(name)[1]) == 0, name


@pytest.mark.exhaustive  # half a minute
def test_values_under_torch_compile():
    data = [read(name, "torch") for name in TYPES]
    found = compiled_by_torch(lambda qs: [q.dequantize() for q in qs], data)
    for name, value in zip(TYPES, found, strict=True):
        assert mismatches(value.numpy(), stored(name)[1]) == 0, name


@pytest.mark.parametrize("name", TYPES)
def test_bytes_come_back(name):
    data = stored(name)[0]
    q = read(name)
    again = q.to_bytes(name)
    if name == "tq1_0":  # of several bytes with the same trits ggml writes one
        again, data = (QArray.from_bytes(d, name, q.shape).qvalue for d in (again, data))
    np.testing.assert_array_equal(again, data)
    np.testing.assert_array_equal(q.to_bytes("gguf"), q.to_bytes(name))
    if name != "tq1_0":
        for same in (bytes(data), bytearray(data), memoryview(data), data.ravel(), np.asfortranarray(data)):
            assert_same_bits(QArray.from_bytes(same, name, q.shape), q)


@pytest.mark.parametrize("name", TYPES)
def test_memory_is_little_more_than_the_bytes(name):
    data = stored(name)[0]
    assert read(name).nbytes <= (1.25 if name == "tq1_0" else 1.05) * data.nbytes  # ternary codes take two bits here


@pytest.mark.exhaustive_where(backend="jax", name="q5_0")  # the rules of q4_0, q4_1 and q8_0, compiled once more
@pytest.mark.exhaustive_where(backend="jax", name="q5_1")
@pytest.mark.exhaustive_where(backend="jax", name="tq1_0")
@pytest.mark.exhaustive_where(backend="jax", name="tq2_0")
@pytest.mark.exhaustive_where(backend="jax", name="iq4_nl")  # this and what follows: seconds
@pytest.mark.exhaustive_where(backend="jax", name="iq4_xs")
@pytest.mark.exhaustive_where(backend="jax", name="q2_k")
@pytest.mark.exhaustive_where(backend="jax", name="q3_k")
@pytest.mark.exhaustive_where(backend="jax", name="q4_k")
@pytest.mark.exhaustive_where(backend="jax", name="q5_k")
@pytest.mark.exhaustive_where(backend="jax", name="q6_k")
@pytest.mark.parametrize("name", [case["type"] for case in GOLDEN["ggml"]["encoders"]])
def test_encoders_write_the_bytes_of_ggml(backend, name):
    wanted = next(decoded(case["bytes"]) for case in GOLDEN["ggml"]["encoders"] if case["type"] == name)
    q = aqt_lite.quantize(backend.asarray(X), name, dialect="gguf")
    found = q.to_bytes("gguf")
    np.testing.assert_array_equal(libraries.meant(name, found, wanted), libraries.meant(name, wanted, wanted))
    assert q.backend == backend.name


@pytest.mark.exhaustive  # as above; and every encoder by its own, eagerly, is compiled there already
def test_encoders_under_jit():
    names = [name for name in ENCODERS if ENCODERS[name].parts == 1] + ["q6_k"]  # one of those that take seconds
    found = jax.jit(lambda x: [quantize_blocks(x, name) for name in names])(X)
    constants = jax.jit(lambda: [quantize_blocks(jax.numpy.asarray(X), name) for name in names])()
    for name, q, other in zip(names, found, constants, strict=True):
        wanted = quantize_blocks(X, name).to_bytes("gguf")
        np.testing.assert_array_equal(q.to_bytes("gguf"), wanted, err_msg=name)
        np.testing.assert_array_equal(other.to_bytes("gguf"), wanted, err_msg=name)


@pytest.mark.exhaustive  # seconds each
@pytest.mark.parametrize("names", [("q4_0", "q4_1", "q8_0", "mxfp4"), ("iq4_nl",)])
def test_encoders_under_torch_compile(names):
    """One of them as users compile it."""
    options = None if names == ("iq4_nl",) else SOON_IN_MEMORY
    x = torch.from_numpy(X)
    found = compiled_by_torch(lambda x: [quantize_blocks(x, name) for name in names], x, options=options)
    for name, q in zip(names, found, strict=True):
        np.testing.assert_array_equal(q.to_bytes("gguf"), quantize_blocks(X, name).to_bytes("gguf"), err_msg=name)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_encoders_take_narrow_floats(kind):
    x = torch.randn(2, 256, generator=torch.Generator().manual_seed(3)).to(getattr(torch, kind))
    for name in ENCODERS:
        q, wide = quantize_blocks(x, name), quantize_blocks(x.to(torch.float32), name)
        assert q.float_dtype == kind
        assert q.dequantize().dtype == x.dtype
        np.testing.assert_array_equal(q.to_bytes("gguf"), wide.to_bytes("gguf"))


def quotient(x, by, *, b):
    """Of two arrays, as an operation of a backend."""
    return _ggml_steps.quotient(x, by, b)


def test_quotients_are_those_of_ieee_arithmetic(backend):
    rng = np.random.default_rng(6)
    x = (rng.standard_normal(20000) * 2.0 ** rng.integers(-60, 60, 20000)).astype("float32")
    by = np.abs(rng.standard_normal(20000) * 2.0 ** rng.integers(-40, 40, 20000)).astype("float32")
    by[:3000] = rng.integers(1, 300, 3000)
    x[::7], x[5] = by[::7] * np.float32(3), 0
    found = run(backend, quotient, backend.asarray(x), backend.asarray(by))
    assert mismatches(backend.to_numpy(found), x / by) == 0


def root(x, *, b):
    """Of an array, as an operation of a backend."""
    return _ggml_steps.square_root(x, b)


def test_square_roots_are_those_of_ieee_arithmetic(backend):
    rng = np.random.default_rng(7)
    x = (rng.uniform(1, 4, 20000) * 4.0 ** rng.integers(-40, 40, 20000)).astype("float32")
    odd = (rng.integers(1 << 23, 1 << 24, 20000) + 0.5) * 2.0**-23  # next to the square of what lies halfway
    near = (odd * odd).astype("float32")
    x = np.concatenate([x, near, np.nextafter(near, np.float32(9)), np.arange(100, dtype="float32")])
    assert_same_bits(backend.to_numpy(run(backend, root, backend.asarray(x))), np.sqrt(x))


# ---- what ggml does silently is an error here


def test_scales_beyond_float16_are_an_error_that_names_the_block():
    assert decoded(GOLDEN["ggml"]["overflow_of_q4_0"])[0, 1] & 0x7C == 0x7C  # ggml writes an infinite scale
    x = np.ones((2, 512), "float32")
    x[1, 300] = 1e7
    for name in ("q4_0", "q4_1", "q5_0", "q5_1", "tq1_0", "tq2_0", "iq4_nl"):
        size = ENCODERS[name].block
        with pytest.raises(ValueError, match=rf"1 blocks .* {name}, whose .* block \(1, {300 // size}\) .* 1e\+07"):
            quantize_blocks(x, name)
    x[1, 300] = -9e6
    with pytest.raises(ValueError, match=r"q8_0.*block \(1, 9\) of 32, with largest magnitude 9e\+06"):
        quantize_blocks(x, "q8_0")
    x[1, 300] = 1e10
    with pytest.raises(ValueError, match=r"nvfp4, whose scales are float8_e4m3fn: the first is block \(1, 18\) of 16"):
        quantize_blocks(x, "nvfp4")
    x[1, 300] = 1e12
    for name in (name for name, encoder in ENCODERS.items() if encoder.parts > 1):
        with pytest.raises(ValueError, match=rf"1 blocks .* {name}, whose .* block \(1, 1\) of 256, .* 1e\+12"):
            quantize_blocks(x, name)
    x[1, 300] = 1e10
    assert quantize_blocks(x, "mxfp4").dequantize()[1, 300] == 2.0**31 * 4  # 1e10 / 2^31 lies between 4 and 5


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(name, bad):
    x = np.ones((2, 256), "float32")
    x[1, 70] = bad
    with pytest.raises(ValueError, match=r"1 non-finite values of 512, the first at index \(1, 70\)"):
        quantize_blocks(x, name)


def test_what_is_not_finite_is_refused_everywhere(backend):
    x = np.ones((2, 256), "float32")
    x[0, 1] = np.inf
    with pytest.raises(ValueError, match=r"1 non-finite values of 512, the first at index \(0, 1\)"):
        quantize_blocks(backend.asarray(x), "q4_0")


@pytest.mark.parametrize("name", ["q4_1", "mxfp4", pytest.param("q4_k", marks=pytest.mark.exhaustive)])
def test_a_block_without_a_scale_is_nan_under_a_compiler(name):
    x = np.ones((1, 512), "float32")
    x[0, 300] = np.nan
    values = np.asarray(jax.jit(lambda a: quantize_blocks(a, name).dequantize())(x))
    size = ENCODERS[name].block
    block = slice(300 // size * size, 300 // size * size + size)
    assert np.isnan(values[0, block]).all()
    assert np.isfinite(np.delete(values, np.s_[block], axis=1)).all()


def test_bad_arguments_of_the_encoders_are_named():
    with pytest.raises(ValueError, match=r"x has shape \(2, 40\): q4_0 takes 32 elements at a time"):
        quantize_blocks(np.zeros((2, 40), "float32"), "q4_0")
    with pytest.raises(ValueError, match=r"x has shape \(\)"):
        quantize_blocks(np.float32(1), "q8_0")
    with pytest.raises(TypeError, match="x is float64, and ggml makes q8_0 from float32"):
        quantize_blocks(np.zeros(32), "q8_0")
    with pytest.raises(ValueError, match="dtype='q4_2': dialect='gguf' makes ggml's own types alone, q4_0"):
        quantize_blocks(np.zeros(256, "float32"), "q4_2")


@pytest.mark.parametrize("name", ENCODERS)
def test_arrays_without_elements(name):
    q = quantize_blocks(np.zeros((0, 256), "float32"), name)
    assert q.shape == (0, 256)
    data = q.to_bytes("gguf")
    assert data.shape == (0, data.shape[1])
    assert QArray.from_bytes(data, name, (0, 256)).shape == (0, 256)
    assert quantize_blocks(np.zeros((3, 0), "float32"), name).to_bytes(name).shape == (3, 0)


def test_arrays_without_elements_everywhere(backend):
    q = quantize_blocks(backend.asarray(np.zeros((0, 64), "float32")), "q4_1")
    assert q.shape == tuple(q.dequantize().shape) == (0, 64)


# ---- block types are arrays like all others


@few_that_compile
@pytest.mark.parametrize("name", TYPES)
def test_products_slices_and_files(backend, name, tmp_path):
    values = stored(name)[1]
    q = read(name, backend.name)
    x = np.random.default_rng(8).standard_normal((3, 256)).astype("float32")
    wanted = x.astype("float64") @ values.T.astype("float64")
    size = np.abs(x) @ np.abs(values.T)
    y = backend.to_numpy(aqt_lite.linear(backend.asarray(x), q))
    assert (np.abs(y - wanted) <= 1e-5 * size).all()
    turned = q.T.for_dense()
    y = backend.to_numpy(aqt_lite.dense(backend.asarray(x), turned))
    assert (np.abs(y - wanted) <= 1e-5 * size).all()
    assert mismatches(backend.to_numpy(q[1:].dequantize()), values[1:]) == 0
    assert mismatches(backend.to_numpy(q[np.asarray([1, 0])].dequantize()), values[::-1]) == 0
    assert q[1:].to_bytes("gguf").tobytes() == q.to_bytes("gguf")[1:].tobytes()
    assert turned.T.to_bytes("gguf").tobytes() == q.to_bytes("gguf").tobytes()
    aqt_lite.save(tmp_path / "q.safetensors", {"w": q})
    assert_same_bits(aqt_lite.load(tmp_path / "q.safetensors", backend=backend.name)["w"], q)
    assert_same_bits(pickle.loads(pickle.dumps(q)).to_backend("numpy"), q.to_backend("numpy"))


@few_that_compile
@pytest.mark.parametrize("name", [name for name in TYPES if name not in WITH_OFFSETS])
def test_reproducible_products_with_negative_scales(backend, name):
    x = np.random.default_rng(9).standard_normal((3, 256)).astype("float32")
    y = aqt_lite.linear(backend.asarray(x), read(name, backend.name), mode="reproducible")
    assert_same_bits(backend.to_numpy(y), aqt_lite.linear(x, read(name), mode="reproducible"))
    exact = x.astype("float64") @ stored(name)[1].T.astype("float64")
    assert np.abs(backend.to_numpy(y) - exact).max() <= 1e-5 * (np.abs(x) @ np.abs(stored(name)[1].T)).max()


@pytest.mark.exhaustive_unless(backend=["numpy"])
def test_large_products_with_negative_scales(backend):
    values = np.random.default_rng(10).standard_normal((512, 512)).astype("float32")
    x = np.random.default_rng(11).standard_normal((2, 512)).astype("float32")
    blocks = {name: quantize_blocks(values, name).to_bytes("gguf") for name in ("q4_0", "iq4_nl")}
    for name, data in (blocks | {"iq4_xs": np.tile(stored("iq4_xs")[0], (256, 2))}).items():
        q = QArray.from_bytes(data, name, values.shape, backend=backend.name)
        y = backend.to_numpy(aqt_lite.linear(backend.asarray(x), q))
        wanted = x.astype("float64") @ backend.to_numpy(q.dequantize()).T.astype("float64")
        assert np.abs(y - wanted).max() < 1e-4 * np.abs(wanted).max(), name


@pytest.mark.parametrize("name", sorted({*BLOCK_TYPES, "iq4_nl", "mxfp4"} - {"q2_k", "q4_k", "q5_k", "q4_1", "q5_1"}))
def test_quantize_by_the_rules_of_this_library_gives_blocks_that_ggml_reads(name):
    """Scales and their scales fit; where ggml has minima, this library would choose other offsets."""
    x = np.random.default_rng(12).standard_normal((2, 512)).astype("float32")
    how = {"scale_dtype": "float16", "granularity": PerGroup(32)} if name == "iq4_nl" else {}
    q = aqt_lite.quantize(x, name, **how)
    again = QArray.from_bytes(q.to_bytes("gguf"), name, x.shape)
    assert mismatches(again.dequantize(), q.dequantize()) == 0
    assert np.abs(q.dequantize() - x).max() < 4


def test_a_block_type_is_its_element_type_with_scales_of_its_own():
    x = np.random.default_rng(13).standard_normal((2, 64)).astype("float32")
    named = aqt_lite.quantize(x, "q4_0")
    plain = aqt_lite.quantize(x, "int4", granularity=PerGroup(32), scale_dtype="float16")
    assert named.dtype == "q4_0"
    assert mismatches(named.qvalue, plain.qvalue) == mismatches(named.scales, plain.scales) == 0
    assert not {*BLOCK_TYPES} & {*FORMATS}


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_values_of_narrow_floats_are_rounded_once(kind):
    """Scales of scales are not: a product of two of them would lose bits."""
    for name in TYPES:
        data, values = stored(name)
        q = QArray.from_bytes(data, name, values.shape, float_dtype=kind, backend="torch")
        largest = torch.finfo(getattr(torch, kind)).max
        wanted = torch.from_numpy(values).clamp(-largest, largest).to(getattr(torch, kind))
        assert q.float_dtype == kind
        assert bool((q.dequantize() == wanted).all()), name


def test_a_slice_through_scales_that_share_one_says_so():
    with pytest.raises(IndexError, match=r"scales of q4_k have groups themselves.*use multiples of 8"):
        quantize_blocks(np.ones((2, 512), "float32"), "q4_k")[:, :128]
    assert read("q4_k")[1].to_bytes("gguf").shape == (144,)


def test_reports_and_maps_and_products_of_two_with_negative_scales():
    q = read("q6_k")
    assert aqt_lite.error_report(stored("q6_k")[1], q).max_abs_error == 0
    by_row = jax.vmap(lambda x: quantize_blocks(x, "q5_1").dequantize())(X)
    assert mismatches(np.asarray(by_row), quantize_blocks(X, "q5_1").dequantize()) == 0
    x = aqt_lite.quantize(np.eye(32, dtype="float32")[:3], granularity=aqt_lite.PerChannel(0))
    small = quantize_blocks(X[:, :32], "q4_0")  # one scale a row: a product of integers
    np.testing.assert_allclose(aqt_lite.linear(x, small), x.dequantize() @ small.dequantize().T, rtol=1e-6)


# ---- orders of codes, held against the libraries' own functions


@pytest.mark.parametrize("case", GOLDEN["packers"], ids=lambda c: f"{c['layout']} {c['dtype']} {c['codes']['shape']}")
def test_orders_are_those_of_the_libraries(backend, case):
    codes, data = decoded(case["codes"]), decoded(case["stored"])
    given = {"scale": 1.0, "dtype": case["dtype"]}
    if element_type(case["dtype"]).middle:
        given["zero_point"] = 0
    if "absmax" in case:
        given |= {"granularity": PerGroup(64), "scale": decoded(case["absmax"]).reshape(4, 2)}
    given["scale"] = np.asarray(given["scale"], "float32")
    if backend.name != "numpy":
        given["scale"] = backend.asarray(given["scale"])
    q = QArray.from_bytes(data, case["layout"], codes.shape, backend=backend.name, **given)
    np.testing.assert_array_equal(backend.to_numpy(q.qvalue), codes)
    again = q.to_bytes(case["layout"])
    assert again.dtype == data.dtype
    np.testing.assert_array_equal(again, data)
    if "values" in case:  # as bitsandbytes computes them; code 8 of its fp4 is 0 there, and -0 here
        np.testing.assert_array_equal(backend.to_numpy(q.dequantize()), decoded(case["values"]))


def patterns(bits, shape, low=0):
    codes = np.random.default_rng([bits, *shape]).integers(low, low + (1 << bits), shape)
    return codes, (codes - low).tolist()


PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
ORDERS = [
    *((f"dense{n}", (3, 37), 0, lambda c, n=n: written.stream(c, n, 8)) for n in range(2, 9)),
    *((f"dense_int32{n}", (3, 64), 0, lambda c, n=n: written.stream(c, n, 32)) for n in range(2, 9)),
    ("low_nibble_first", (3, 7), 0, lambda c: written.nibbles(c, False)),
    ("high_nibble_first", (3, 7), 0, lambda c: written.nibbles(c, True)),
    ("awq", (5, 24), 0, written.awq),
    *((f"gptq{n}", (64, 5), 0, lambda c, n=n: written.down(written.stream, c, n, 32)) for n in (2, 3, 4, 8)),
    *((f"gptq_p{n}", (64, 5), 0, lambda c, n=n: written.down(written.bit_planes, c, PLANES[n])) for n in PLANES),
    *(
        (
            f"gptq_zeros{n}",
            (3, 32),
            0,
            lambda c, n=n: written.stream([[(v - 1) % (1 << n) for v in r] for r in c], n, 32),
        )
        for n in (2, 3, 4, 8)
    ),
    *(
        (f"compressed_tensors{n}", (3, 37), -(1 << (n - 1)), lambda c, n=n: written.stream(c, n, 32))
        for n in range(2, 9)
    ),
    *(
        (f"compressed_tensors_0.16{n}", (3, 37), -(1 << (n - 1)), lambda c, n=n: written.whole_words(c, n, 32))
        for n in range(2, 9)
    ),
    ("hqq4", (6, 5), 0, lambda c: written.parts(c, 4, 8, True, 2)),
    ("hqq2", (8, 5), 0, lambda c: written.parts(c, 2, 8, True, 4)),
    ("hqq3", (13, 5), 0, lambda c: written.parts(c, 3, 32, True, 10)),
    *((f"hqq{n}", (6, 5), 0, lambda c: c) for n in (5, 6, 8)),
    *((f"quanto{n}", (7, 5), 0, lambda c, n=n: written.parts(c, n, 8, False, 8 // n)) for n in (2, 4)),
    ("bitnet", (8, 5), -1, lambda c: written.parts(c, 2, 8, False, 4)),
    *((f"keras{n}", (9, 5), 0, lambda c, n=n: written.down(written.stream, c, n, 8)) for n in (2, 4)),
]


@pytest.mark.parametrize(("name", "shape", "low", "order"), ORDERS, ids=[case[0] for case in ORDERS])
def test_orders_bit_by_bit(name, shape, low, order):
    every = [a for entry in LAYOUTS.values() for a in (entry.layouts if isinstance(entry, Family) else [entry])]
    layout = next(a for a in every if a.name == name)
    codes, unsigned = patterns(layout.bits, shape, low)
    wanted = np.asarray(order(unsigned), "uint32").astype(layout.word)
    found = layout.packed({"codes": codes})
    assert found.dtype == layout.word
    np.testing.assert_array_equal(found, wanted)
    for data in (
        found,
        found.view(f"uint{8 * found.itemsize}"),
        found.tobytes(),
        found.ravel().astype(f">{found.dtype.str[1:]}"),
    ):
        np.testing.assert_array_equal(layout.unpacked(data, shape)["codes"], codes)


def test_every_layout_of_codes_is_tried_bit_by_bit():
    every = {a.name for e in LAYOUTS.values() for a in (e.layouts if isinstance(e, Family) else [e]) if a.dtype is None}
    assert every - {case[0] for case in ORDERS} == {"dense16", "bitsandbytes"}  # below, and above


@settings(max_examples=60)
@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 3), st.integers(1, 5), st.data())
def test_any_codes_come_back(name, rows, units, data):
    entry = LAYOUTS[name]
    layout = data.draw(st.sampled_from(entry.layouts)) if isinstance(entry, Family) else entry
    length = units * (layout.block or 40) if not layout.pads else data.draw(st.integers(0, 70))
    shape = (rows, length) if layout.axis == -1 else (length, rows)
    leaves, rng = {}, np.random.default_rng(zlib.crc32(name.encode()) + units)
    for leaf in layout.leaves:
        low, count = leaf.low or 0, 3 if leaf.low == -1 and leaf.bits == 2 else 1 << leaf.bits
        here = shape if leaf.name == "codes" else (rows, units * leaf.length)
        leaves[leaf.name] = rng.integers(low, low + count, here)
    found = layout.packed(leaves)
    assert found.shape == layout.stored_shape(shape)
    again = layout.unpacked(found, shape)
    for leaf_name, codes in leaves.items():
        np.testing.assert_array_equal(again[leaf_name], codes, err_msg=leaf_name)


@pytest.mark.parametrize(
    "dtype", ["int2", "int3", "int4", "int7", "int8", "uint5", "int16", "ternary", "nf4", "float6_e3m2fn"]
)
def test_the_stream_of_this_library_is_the_layout_dense(backend, dtype):
    x = np.random.default_rng(14).standard_normal((3, 37)).astype("float32")
    q = aqt_lite.quantize(backend.asarray(x), dtype)
    data = q.to_bytes("dense")
    np.testing.assert_array_equal(data, np.ascontiguousarray(backend.to_numpy(q.storage)).view("uint8"))
    again = QArray.from_bytes(
        data, "dense", x.shape, dtype=dtype, scale=q.scale, zero_point=q.zero_point, backend=backend.name
    )
    assert_same_bits(again, q)


def test_scales_of_a_dialect_beside_bytes_are_read_as_beside_codes():
    w = np.random.default_rng(0).standard_normal((4, 64)).astype("float32")
    q = aqt_lite.quantize(w, "nvfp4", dialect="compressed-tensors")
    kept = {"scale": q.scale.qvalue, "tensor_scale": 1 / q.scale.scale, "dialect": "compressed-tensors"}
    again = QArray.from_bytes(q.to_bytes("dense"), "dense", q.shape, dtype="nvfp4", **kept)
    of_codes = QArray.from_codes(q.qvalue, dtype="nvfp4", **kept)
    assert_same_bits(again, of_codes)
    assert not np.array_equal(
        again.dequantize(),
        QArray.from_bytes(
            q.to_bytes("dense"), "dense", q.shape, dtype="nvfp4", **kept | {"dialect": None}
        ).dequantize(),
    )
    for name, value in [("tensor_scale", 1.0), ("dialect", "gptq")]:
        with pytest.raises(ValueError, match=f"{name} is given, but the bytes of layout 'q4_0' say it themselves"):
            QArray.from_bytes(bytes(18), "q4_0", (1, 32), **{name: value})


def test_a_layout_of_ones_own():
    columns = Layout(
        "in_columns",
        leaves=(Leaf("codes", length=4, bits=2),),
        fields=(Field(1, tuple(Part("codes", run=i, bits=2) for i in (3, 1, 2, 0))),),
        axis=0,
    )
    codes = np.asarray([[0, 1], [1, 1], [2, 3], [3, 0]], "uint8")
    q = QArray.from_codes(codes, 1.0, 0, dtype="uint2")
    assert q.to_bytes(columns).tolist() == [[3 + (1 << 2) + (2 << 4), (1 << 2) + (3 << 4) + (1 << 6)]]
    assert_same_bits(QArray.from_bytes(q.to_bytes(columns), columns, (4, 2), dtype="uint2", scale=1.0, zero_point=0), q)
    assert (
        QArray.from_bytes(b"\x12", Family("mine", (columns,)), (4, 1), dtype="uint2", scale=1.0, zero_point=0).size == 4
    )


# ---- hostile bytes, and arrays that a layout has no place for


def with_bytes(name, at, *values):
    data = stored(name)[0].copy()
    data[0, at : at + len(values)] = values
    return data


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: QArray.from_bytes(b"123", "q4_0", (1, 32)),
            r"data has shape \(3,\) .*\(1, 18\) of uint8 \(18 bytes\)",
        ),
        (
            lambda: QArray.from_bytes(bytes(18), "q4_0", (1, 33)),
            "takes 32 elements at a time, and axis -1 of length 33",
        ),
        (lambda: QArray.from_bytes(bytes(18), "q4_k", (1, 32)), "takes 256 elements at a time"),
        (lambda: QArray.from_bytes(bytes(18), "q4_0", ()), r"an array of shape \(\) has none"),
        (lambda: QArray.from_bytes(bytes(18), "q4_0", (1, -32)), r"shape=\(1, -32\): give a tuple of lengths"),
        (lambda: QArray.from_bytes(bytes(18), "q4_0", 32), "shape=32: give a tuple"),
        (lambda: QArray.from_bytes(bytes(18), "q4_0", (1, 32.5)), r"shape=\(1, 32.5\): give a tuple"),
        (
            lambda: QArray.from_bytes(bytes(18), "q4_9", (1, 32)),
            "layout='q4_9' is not known \\(did you mean 'q4_.'\\?\\): give a Layout, or one of",
        ),
        (lambda: QArray.from_bytes(bytes(18), 4, (1, 32)), "layout=4 is not known"),
        (
            lambda: QArray.from_bytes(bytes(18), "gguf", (1, 32)),
            "'gguf' does not say what its codes stand for: give dtype",
        ),
        (lambda: QArray.from_bytes(bytes(18), "gguf", (1, 32), dtype="int3"), "has no place for int3"),
        (lambda: QArray.from_bytes(bytes(16), "awq", (1, 32)), "'awq' does not say what its codes stand for"),
        (
            lambda: QArray.from_bytes(bytes(16), "awq", (1, 32), dtype="int3"),
            "is for codes of 4 bits, and this array has int3",
        ),
        (lambda: QArray.from_bytes(bytes(18), "q4_0", (1, 32), dtype="q4_1"), "is for codes of format q4_0"),
        (
            lambda: QArray.from_bytes(bytes(18), "q4_0", (1, 32), scale=1.0),
            "scale is given, but the bytes of layout 'q4_0'",
        ),
        (lambda: QArray.from_bytes(np.zeros((1, 18)), "q4_0", (1, 32)), "data has dtype float64"),
        (lambda: QArray.from_bytes(np.zeros((1, 9), "int16"), "q4_0", (1, 32)), "data has dtype int16"),
        (lambda: QArray.from_bytes(np.zeros((18, 1), "uint8"), "q4_0", (1, 32)), r"data has shape \(18, 1\)"),
        (
            lambda: QArray.from_bytes(with_bytes("q4_0", 18, 0, 0x7E), "q4_0", (2, 256)),
            r"codes of scale .* block \(0, 1\) .* 0x7e00",
        ),
        (
            lambda: QArray.from_bytes(with_bytes("q8_0", 0, 0, 0xFC), "q8_0", (2, 256)),
            r"no finite number of float16.* 0xfc00",
        ),
        (lambda: QArray.from_bytes(with_bytes("q4_1", 2, 0, 0x7C), "q4_1", (2, 256)), r"codes of offset .* 0x7c00"),
        (
            lambda: QArray.from_bytes(with_bytes("q4_k", 2, 0, 0x7C), "q4_k", (2, 256)),
            r"codes of offset.scale .* 0x7c00",
        ),
        (
            lambda: QArray.from_bytes(with_bytes("q6_k", 208, 1, 0x7C), "q6_k", (2, 256)),
            r"codes of scale.scale .* 0x7c01",
        ),
        (
            lambda: QArray.from_bytes(with_bytes("tq2_0", 3, 3), "tq2_0", (2, 256)),
            r"codes of codes .* tq2_0, .* stored as 0x3",
        ),
        (
            lambda: QArray.from_bytes(with_bytes("mxfp4", 17, 255), "mxfp4", (2, 256)),
            r"float8_e8m0fnu.* block \(0, 1\) .* 0xff",
        ),
        (lambda: QArray.from_bytes(with_bytes("nvfp4", 1, 0x7F), "nvfp4", (2, 256)), r"float8_e4m3fn.* 0x7f"),
        (
            lambda: QArray.from_bytes(with_bytes("nvfp4", 1, 0x81), "nvfp4", (2, 256)),
            "bits that are not 0 where layout 'nvfp4'",
        ),
        (
            lambda: QArray.from_bytes(b"\x11\xf1", "dense", (3,), dtype="uint4", scale=1.0, zero_point=0),
            "bits beyond the last code",
        ),
        (
            lambda: QArray.from_bytes(b"\x03", "bitnet", (4, 1), dtype="ternary", scale=1.0),
            "qvalue has 1 unusable codes",
        ),
        (lambda: QArray.from_bytes(b"\x03", "bitnet", (4, 1), dtype="ternary"), "scale is None"),
        (
            lambda: QArray.from_bytes(b"", "q4_0", (0, 1 << 62)),
            r"shape=\(0, 4611686018427387904\): no array has axes so",
        ),
        (
            lambda: QArray.from_bytes(b"", "dense", (0, 1 << 70), dtype="int4", scale=1.0),
            "no array has axes so long",
        ),
        (lambda: QArray.from_bytes(b"", "q8_0", (1 << 62, 1 << 62, 0)), "no array has axes so long"),
    ],
)
def test_hostile_bytes_are_refused_by_name(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def q4(x=None, **how):
    x = np.random.default_rng(15).standard_normal((2, 64)).astype("float32") if x is None else x
    return aqt_lite.quantize(x, "q4_0", **how)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: q4(granularity=PerGroup(16)).to_bytes("gguf"), r"a scale for every 32 .* PerGroup\(size=16.*"),
        (
            lambda: q4(scale_dtype="float32").to_bytes("gguf"),
            "keeps the scale as float16, and this array has it as float32",
        ),
        (lambda: q4(scale_dtype="bfloat16").to_bytes("q4_0"), "has it as bfloat16"),
        (lambda: q4(np.ones((2, 48), "float32")).to_bytes("gguf"), "axis -1 of length 48 is no multiple of 32"),
        (lambda: q4(np.ones((2, 32), "float32")).T.to_bytes("gguf"), "axis -1 of length 2"),
        (lambda: q4().to_bytes("q4_1"), "'q4_1' is for codes of format q4_1, and this array has q4_0"),
        (lambda: aqt_lite.quantize(np.ones(32, "float32"), "int4").to_bytes("gguf"), "'gguf' has no place for int4"),
        (
            lambda: aqt_lite.quantize(np.ones(32, "float32"), "q4_1").to_bytes("gguf"),
            "has no zero_point there, and this array has one",
        ),
        (
            lambda: aqt_lite.quantize(np.ones(32, "float32"), "q4_1", offset="data").to_bytes("gguf"),
            "keeps the offset as float16, and this array has it as float32",
        ),
        (
            lambda: aqt_lite.quantize(np.ones(()), "q4_0", granularity=aqt_lite.PerTensor()).to_bytes("gguf"),
            r"shape \(\)",
        ),
        (lambda: LAYOUTS["awq"].packed({"codes": np.full((1, 8), 16)}), r"codes has code 16 at \(0, 0\)"),
        (lambda: LAYOUTS["bitnet"].packed({"codes": np.full((4, 1), 3)}), "room for -1 to 2"),
    ],
)
def test_what_a_layout_has_no_place_for(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_traced_arrays_have_no_bytes():
    q = read("q4_0", "jax")
    with pytest.raises(TypeError, match="to_bytes inside a traced function"):
        jax.jit(lambda a: a.to_bytes("gguf"))(q)
    with pytest.raises(TypeError, match="data is being traced"):
        jax.jit(lambda a: QArray.from_bytes(a, "q4_0", (2, 256)))(stored("q4_0")[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda c, f: Layout("bad", (), f), "leaves begin with 'codes'"),
        (lambda c, f: Layout("bad", (c,), f, axis=1), "axis is -1 or 0"),
        (lambda c, f: Layout("bad", (c,), f, word="int64"), "word='int64'"),
        (lambda c, f: Layout("bad", (c,), (*f, *f)), r"bit 0 of codes\[0\] is stored 2 times"),
        (lambda c, f: Layout("bad", (c,), f[:0]), r"bit 0 of codes\[0\] is stored 0 times"),
        (lambda c, f: Layout("bad", (c,), (Field(1, (Part("codes", 0, 4),)),)), "a field of 1 words of 4 bits"),
        (
            lambda c, f: Layout("bad", (c,), (Field(2, (Part("codes", 0, 4, 2),)),)),
            "lies outside of the leaf, which has 2",
        ),
        (lambda c, f: Layout("bad", (c,), (Field(2, (Part("codes", 1, 4),)),)), "lies outside of the leaf"),
        (lambda c, f: Layout("bad", (c,), (Field(0, (Part("codes", 0, 8),)),)), "a field of 0 words"),
        (lambda c, f: Layout("bad", (c, Leaf("scale", 1, 8)), f), "complete blocks, of several leaves"),
        (lambda c, f: Layout("bad", (c,), (Field(2, (Part("codes", 0, 4), Part("", 0, 8))),)), "words of 12 bits"),
        (lambda c, f: Layout("bad", (c,), (Field(2, (Part("codes", 0, 4),), base=3),)), "in base 3 up to five parts"),
        (lambda c, f: Layout("bad", (c,), (Field(2, (Part("scale", 0, 4),)),)), "no leaf is called 'scale'"),
    ],
)
def test_layouts_that_lose_bits_are_refused(make, message):
    codes = Leaf("codes", 2, 4)
    with pytest.raises(ValueError, match=message):
        make(codes, (Field(2, (Part("codes", 0, 4),)),))


@settings(max_examples=200)
@given(st.sampled_from(TYPES), st.binary(min_size=0, max_size=600))
def test_any_bytes_are_read_or_refused(name, data):
    """Never another error, and never a value that is not finite."""
    block = LAYOUTS[name].block
    size = LAYOUTS[name].stored_shape((block,))[0]
    data = data[: len(data) // size * size]
    with contextlib.suppress(ValueError):
        q = QArray.from_bytes(data, name, (len(data) // size * block,))
        assert np.isfinite(q.dequantize()).all()
        assert name == "tq1_0" or q.to_bytes(name).tobytes() == data


def test_the_module_names_what_it_has():
    assert {*layouts.__all__} <= {*dir(layouts)}
    assert all(entry.name == name for name, entry in LAYOUTS.items())
