"""Large arrays: whatever is done a part at a time has the bits of the whole, and takes next to no memory beside it."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, _clipping, _given, affine, packing
from aqt_lite._registry import get_backend
from aqt_lite.affine import QParams, Recipe, Spec
from aqt_lite.backends.cpu import packed, quantize, runtime
from aqt_lite.elements import FLOAT_TYPES
from aqt_lite.formats import FORMATS, scale_format_of
from aqt_lite.granularity import grid_of
from aqt_lite.ops import reference
from aqt_lite.testing import assert_same_bits

numpy = get_backend("numpy")
SHARED = ("numpy", "torch", "jax")
"""Adapters whose kernels work on NumPy's memory."""
KEPT = [("int8", "bfloat16"), ("nf4", "int8"), ("int4", "float8_e8m0fnu"), ("uint8", "float16"), ("int8", "nf4")]
EVERY = [*FORMATS.values(), *(replace(FORMATS[name], scale=scale_format_of(kept)) for name, kept in KEPT)]
KEY = np.asarray([1, 20, 300, 4000], np.int32)


def title(form):
    return form.name if form in FORMATS.values() else f"{form.name} with {form.scale.name} scales"


def plainly(operation, *arrays, **static):
    with np.errstate(all="ignore"):
        return operation(*arrays, **static, b=numpy)


def assert_same(found, expected):
    if expected is None:
        assert found is None
    elif isinstance(expected, tuple):
        for a, b in zip(found, expected, strict=True):
            assert_same(a, b)
    else:
        assert_same_bits(found, expected)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of a few elements for arrays of a few hundred."""
    monkeypatch.setattr(quantize, "TILE", 48)
    monkeypatch.setattr(quantize, "LARGE", 2)


LAYOUTS = [
    lambda x: x,
    lambda x: np.ascontiguousarray(x.T).T,
    lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    lambda x: x.astype(x.dtype.newbyteorder(">")) if x.dtype.name != "bfloat16" else x,
]
SHAPES = [(1, 1, 200), (200, 1), (13, 29), (3, 5, 7, 2), (4, 100)]
BLOCKS = [(None, None), (1, None), (None, 1), (1, 32), (5, 1), (3, 7), (60, None), (1, 5000)]


def schemes(form):
    yield Recipe()
    yield Recipe(rounding="stochastic")
    yield Recipe(ignore_nonfinite=True, rounding="half_away")
    yield Recipe(symmetric=False, offset=True)
    if form.element.zero_points:
        yield Recipe(symmetric=False)


@pytest.mark.exhaustive_unless(form=EVERY[::3])
@pytest.mark.parametrize("form", EVERY, ids=title)
def test_tiles_have_the_bits_of_the_whole(form, small_tiles):
    rng, served = np.random.default_rng(0), 0
    problems = list(itertools.product(SHAPES, BLOCKS, schemes(form)))
    for number, (shape, block, recipe) in enumerate(problems[form.element.bits % 7 :: 7]):
        name = ("float32", "float32", "float16", "bfloat16", "float64")[number % 5]
        block = tuple(block[:1] + (1,) * (len(shape) - 2) + block[1:])
        x = rng.standard_normal(shape) * np.exp2(rng.integers(-8, 8, shape))
        x[rng.random(shape) < 0.1] = 0
        if number % 3 == 0:
            x.flat[[1, 30, 77]] = np.nan, np.inf, -np.inf
        with np.errstate(all="ignore"):
            x = LAYOUTS[number % 4](x.astype(numpy.dtype(name)))
        x.flags.writeable = False
        static = {"spec": Spec(form, FLOAT_TYPES[name], block), "recipe": recipe}
        key = KEY if recipe.rounding == "stochastic" else None
        scale = np.exp2(rng.standard_normal(grid_of(shape, block))).astype(FLOAT_TYPES[name].compute)
        scale.flat[0] = np.nan
        zero_point = np.full(scale.shape, form.element.middle, np.int32) if form.element.middle else None
        offset = np.ones_like(scale) if recipe.offset else None
        given = QParams(scale, None if recipe.offset else zero_point, offset)
        w = plainly(affine.quantize, x, key, **static)
        for operation, arrays in [
            (affine.quantize, (x, key)),
            (affine.choose_qparams, (x,)),
            (_given.quantize_with, (x, given, key)),
            (_given.fake_quantize, (x, None, key)),
            (_given.fake_quantize, (x, given, key)),
            (_clipping.clipped, (x, QParams(*w[1:]), key)),
            (_clipping.clipped, (x, plainly(_given.usable_qparams, x, given, **static), key)),
        ]:
            with np.errstate(all="raise"):  # nor does any of it warn
                found = quantize.FORMS[operation](*arrays, **static)
            if found is not NotImplemented:
                served += 1
                assert_same(found, plainly(operation, *arrays, **static))
        for out in (None, "float64", "bfloat16"):
            found = quantize.dequantize(w, spec=static["spec"], out=out)
            if found is not NotImplemented:
                served += 1
                assert_same(found, plainly(affine.dequantize, w, spec=static["spec"], out=out))
    assert served > 0.6 * 10 * (number + 1), "tiles did not serve"


@pytest.mark.parametrize("bits", range(1, 8))
def test_codes_are_packed_by_words_as_by_columns(bits, monkeypatch):
    monkeypatch.setattr(packed, "LARGE", 1)
    monkeypatch.setattr(packed, "TILE", 64)
    rng = np.random.default_rng(bits)
    for shape in [(1,), (7,), (200,), (3, 5), (5, 16), (2, 3, 9), (1, 1, 77), (100, 3)]:
        codes = rng.integers(0, 1 << bits, shape, dtype=np.uint8)
        signed = ((codes ^ (1 << (bits - 1))) - np.uint8(1 << (bits - 1))).view(np.int8)
        for c in (codes, signed, np.ascontiguousarray(signed.T).T, np.repeat(codes, 2, axis=-1)[..., ::2]):
            stream = packing.pack(c, bits=bits, b=numpy)
            assert_same_bits(packed.pack(c, bits=bits), stream)
            back = packed.unpack(stream, bits=bits, length=shape[-1], signed=c.dtype == np.int8)
            if back is not NotImplemented:
                assert_same_bits(back, np.ascontiguousarray(c))


@pytest.mark.parametrize("library", SHARED)
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])  # scales that tell by their codes what they are, and two levels
def test_scales_can_be_large_arrays_themselves(name, library):
    """Those of 2^17 groups pass through the loops that look at codes, too."""
    form, backend = FORMATS[name], get_backend(library)
    x = np.random.default_rng(1).standard_normal((runtime.LARGE // 16, 16 * form.group), dtype=np.float32)
    q = aqt_lite.quantize(backend.asarray(x), name)
    w = plainly(affine.quantize, x, spec=Spec(form, FLOAT_TYPES["float32"], q.block), recipe=Recipe())
    assert_same_bits(q.qvalue, w.codes)
    assert_same_bits(q.scale.qvalue, w.scale.codes)
    x[5, 7] = np.inf
    with pytest.raises(ValueError, match="has 1 non-finite"):
        aqt_lite.quantize(backend.asarray(x), name)


@pytest.mark.exhaustive_unless(form=[*FORMATS.values()][::3])
@pytest.mark.exhaustive_where(library="jax")  # half a second each
@pytest.mark.parametrize(
    ("form", "library"),
    [
        (form, library)
        for i, form in enumerate(FORMATS.values())
        for library, served in zip(SHARED, (True, i % 3 == 0, i % 3 == 1), strict=True)
        if served  # the same kernels, on the same memory, whose it is
    ],
    ids=lambda value: value if isinstance(value, str) else title(value),
)
def test_large_arrays_of_every_format_have_the_bits_of_the_plain_operations(form, library):
    """Codes of all formats lie in the same few dtypes, of which a kernel for integers must not take the others."""
    backend = get_backend(library)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 512)).astype(np.float32)
    a, bias = rng.standard_normal((3, 512)).astype(np.float32), rng.standard_normal(300).astype(np.float32)
    for granularity in [PerTensor(), PerChannel(0), PerGroup(32)] if form.group is None else [None, PerBlock((2, 16))]:
        q = aqt_lite.quantize(backend.asarray(x), form.name, granularity=granularity)
        static = {"spec": Spec(form, FLOAT_TYPES["float32"], q.block)}
        w = plainly(affine.quantize, x, **static, recipe=Recipe())
        values = plainly(affine.dequantize, w, **static)
        assert_same_bits(q.qvalue, w.codes)
        assert_same_bits(q.unpacked().packed().storage, q.storage)
        assert_same_bits(q.dequantize(), values)
        assert_same_bits(aqt_lite.fake_quantize(backend.asarray(x), form.name, granularity=granularity), values)
        exact = a.astype(np.float64) @ values.astype(np.float64).T + bias
        operands = backend.asarray(a), q, backend.asarray(bias)
        most = 2e-6 * np.abs(exact).max()
        np.testing.assert_allclose(backend.to_numpy(aqt_lite.linear(*operands)), exact, rtol=0, atol=most)
        if granularity == PerTensor():
            y = aqt_lite.dense(backend.asarray(np.ascontiguousarray(a[:, :300])), q.for_dense())
            want = a[:, :300].astype(np.float64) @ values.astype(np.float64)
            np.testing.assert_allclose(backend.to_numpy(y), want, rtol=0, atol=2e-6 * np.abs(want).max())
        if form.element.unit is not None and form.element.bits <= 8:
            y = aqt_lite.linear(*operands, mode="reproducible")
            np.testing.assert_allclose(backend.to_numpy(y), exact, rtol=0, atol=most)
            here = aqt_lite.quantize(x, form.name, granularity=granularity)
            assert_same_bits(y, aqt_lite.linear(a, here, bias, mode="reproducible"))


@pytest.mark.exhaustive_where(backend="jax", scheme="symmetric")  # each compiles for seconds
@pytest.mark.exhaustive_where(backend="jax", granularity=PerChannel(1))
@pytest.mark.parametrize("granularity", [PerGroup(32), PerBlock((6, 30)), PerChannel(1), PerChannel(0)], ids=str)
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
def test_reproducible_products_in_parts_have_the_same_bits(granularity, scheme, backend, monkeypatch):
    rng = np.random.default_rng(2)
    x, w = rng.standard_normal((23, 200)).astype(np.float32), rng.standard_normal((50, 200)).astype(np.float32)
    x[:, ::50] *= 1e6
    x[3, 7] = np.nan
    bias = rng.standard_normal(50).astype(np.float32)
    q = aqt_lite.quantize(w, scheme=scheme, granularity=granularity)
    turned = aqt_lite.quantize(np.ascontiguousarray(w.T), scheme=scheme, granularity=granularity)
    expected = [
        aqt_lite.linear(x, q, bias, mode="reproducible"),
        aqt_lite.dense(x[:, :50], turned[:50], mode="reproducible") if granularity == PerChannel(1) else None,
    ]
    monkeypatch.setattr(reference, "parts_of_product", lambda *_: (10, 7))
    if backend.name == "jax":
        import jax

        jax.clear_caches()
    y = aqt_lite.linear(backend.asarray(x), q.to_backend(backend.name), backend.asarray(bias), mode="reproducible")
    assert_same_bits(y, expected[0])
    if expected[1] is not None:
        y = aqt_lite.dense(backend.asarray(x[:, :50]), turned[:50].to_backend(backend.name), mode="reproducible")
        assert_same_bits(y, expected[1])
    if backend.name == "jax":
        jax.clear_caches()  # what was compiled in parts


PEAK = """
import gc, re, sys
import numpy as np
import aqt_lite
from aqt_lite import PerChannel, PerGroup, PerTensor
from aqt_lite._registry import get_backend
backend, call = get_backend(sys.argv[1]), sys.argv[2]
x = backend.asarray(np.random.default_rng(0).standard_normal((4096, 4096), dtype=np.float32))
if call.startswith("q."):
    q = eval(sys.argv[3])
def run():
    result = eval(call)
    if backend.name == "jax":
        import jax
        jax.block_until_ready(result)
    return result
def nbytes(r):
    return sum(map(nbytes, r)) if isinstance(r, tuple) else 0 if r is None else int(r.nbytes)
run()
gc.collect()
status = lambda name: int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = status("VmRSS")
result = run()
print((status("VmHWM") - before - nbytes(result)) / x.nbytes)
"""

CALLS = [
    "aqt_lite.quantize(x, granularity=PerGroup(32, 0), scheme='affine')",
    "aqt_lite.quantize(x, nonfinite='ignore', granularity=PerChannel(0))",
    "aqt_lite.quantize(x, scale=0.1, on_clip='raise')",
    "aqt_lite.quantize(x, rounding='stochastic', key=1)",
    "aqt_lite.quantize(x, 'int4', granularity=PerGroup(32))",
    "aqt_lite.quantize(x, 'nf4', granularity=PerGroup(64), scale_dtype='int8')",
    "aqt_lite.quantize(x, 'mxfp4')",
    "aqt_lite.quantize(x, 'nvfp4')",
    "aqt_lite.quantize(x, 'int4', granularity=PerGroup(32), scheme='affine', offset='data')",
    "aqt_lite.fake_quantize(x, 'mxfp4')",
    "aqt_lite.choose_qparams(x, 'uint8', scheme='affine', granularity=PerChannel(-1))",
]
ON_QARRAYS = ["q.dequantize()", "q.packed()", "q.unpacked()"]


def peak(*arguments):
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "0",
    }  # freed is given back
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", PEAK, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


linux = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux to measure peak memory")


@pytest.mark.exhaustive_unless(call=[CALLS[i] for i in (0, 7, 9)])  # a process each
@linux
@pytest.mark.parametrize("call", CALLS)
def test_memory_beside_the_result_of_numpy(call):
    assert peak("numpy", call) < 0.5


@pytest.mark.exhaustive  # seven seconds each; both have NumPy's memory
@linux
@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("call", ["aqt_lite.quantize(x, 'nvfp4')", "aqt_lite.fake_quantize(x, nonfinite='ignore')"])
def test_memory_beside_the_result_of_libraries_that_share_memory(library, call):
    assert peak(library, call) < 0.5


@pytest.mark.exhaustive_unless(dtype=["int3"], call=ON_QARRAYS[:2])
@linux
@pytest.mark.parametrize("call", ON_QARRAYS)
@pytest.mark.parametrize("dtype", ["int4", "int3"])
def test_memory_of_packed_codes(call, dtype):
    made = f"aqt_lite.quantize(x, {dtype!r}, granularity=PerGroup(32))"
    assert peak("numpy", call, made + (".unpacked()" if call == "q.packed()" else "")) < 0.5


LIMITED = """
import resource, re, sys
import numpy as np
import aqt_lite
from aqt_lite import PerChannel, PerGroup
folder, rows, room = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) << 20
x = np.lib.format.open_memmap(folder + "/x.npy", "w+", "f4", (rows, 4096))  # sparse: zeros take no room on the disk
x[:: rows // 8] = np.linspace(-3, 3, 4096, dtype="f4")
x = np.load(folder + "/x.npy", mmap_mode="r")
def file(name, dtype, columns):
    return np.lib.format.open_memmap(folder + "/" + name, "w+", dtype, (rows, columns))
def all_of(x, files):
    int8, int4, values = files
    q = aqt_lite.quantize(x, out=int8)
    q.dequantize(out=values)
    assert (values[0] == q[0].dequantize()).all()
    report = aqt_lite.error_report(x, q)
    assert report.max_abs_error <= float(q.scale.max()) / 2 * 1.001
    aqt_lite.quantize(x, granularity=PerChannel(0), mask=np.arange(4096) < 9, out=int8)
    aqt_lite.quantize(x, "int8", max_abs_err=0.05, mask=np.arange(4096) < 9, out=int8)
    q = aqt_lite.quantize(x, "int4", granularity=PerGroup(32), out=int4)
    q.dequantize(out=values)
    assert abs(values[-1] - x[-1]).max() <= float(q.scale.max()) / 2 * 1.001
small = np.array(x[:64])
all_of(small, (np.empty((64, 4096), "i1"), np.empty((64, 2048), "u1"), np.empty((64, 4096), "f4")))
files = file("8.npy", "i1", 4096), file("4.npy", "u1", 2048), file("v.npy", "f4", 4096)
used = int(re.search(r"VmData:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))
try:
    np.ones(x.nbytes // 4 + room, "u1")
except MemoryError:
    all_of(x, files)
else:
    sys.exit("the limit does not hold")
"""


@linux
@pytest.mark.parametrize(
    ("rows", "room"),
    [(4096, 40), pytest.param(1 << 15, 120, marks=pytest.mark.exhaustive)],  # 64 MB; 512
)
def test_arrays_larger_than_memory(tmp_path, rows, room):
    """Anonymous memory is limited to far less than the array, the codes or the values take."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(rows), str(room)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@linux
@pytest.mark.exhaustive  # seconds each
@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
def test_memory_of_reproducible_products_with_groups(library):
    """Sums of every group at once would take 128 times the result: 128 MB."""
    made = "aqt_lite.quantize(x[:1024, :1024], granularity=PerGroup(8)).to_backend(backend.name)"
    share = peak(library, "q.version and aqt_lite.linear(x[:256, :1024], q, mode='reproducible')", made)
    assert share * 4 * 4096**2 < 48 * 2**20
