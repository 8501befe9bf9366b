"""The loops that make codes in registers, against the operations of the contract.

What they are told of an element type, every layout in which groups lie side by side, vectors that are not full.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from optional import jax, jnp, needs
from processors import run_without_avx_512

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, affine
from aqt_lite._dispatch import offered
from aqt_lite._into import quantize_stored
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu import encoders, runtime
from aqt_lite.elements import float_type
from aqt_lite.formats import FORMATS, SCALE_FORMATS, Format
from aqt_lite.granularity import block_of
from aqt_lite.packing import pack
from aqt_lite.qarray import QArray
from aqt_lite.testing import assert_same_bits

pytestmark = pytest.mark.skipif(runtime.compiled_loops() is None, reason="numba is not installed")

NUMPY = get_backend("numpy")

LAYOUTS = [
    ((400, 512), PerGroup(32)),
    ((400, 512), PerGroup(16)),
    ((512, 400), PerChannel(0)),
    ((400, 512), PerTensor()),
    ((300, 500), PerGroup(96)),  # a shorter last group, of a row that ends inside a vector
    ((131, 1007), PerGroup(40)),  # streams that end inside a byte
    ((131, 1007), PerChannel(0)),
    ((131, 1007), PerTensor()),
    ((1, 1 << 17), PerGroup(128)),
    ((1 << 17,), PerGroup(64)),
    ((16, 20, 420), PerBlock((1, 20, 420))),
    ((16, 20, 420), PerBlock((1, 1, 60))),
    ((700, 300), PerChannel(1)),  # parts of which the last ends early, columns that fill no vector
    ((9, 100, 170), PerChannel(2)),
    ((70, 2100), PerChannel(1)),
    ((40, 20, 420), PerBlock((40, 20, 1))),
]


def hard(shape):
    """Values of every magnitude, zeros, subnormal ones, and such as lie at ties, group by group."""
    rng = np.random.default_rng(sum(shape))
    x = rng.standard_normal(shape) * np.exp(rng.uniform(-40, 40, (*shape[:-1], 1)))
    x = x.astype(np.float32)
    flat = x.reshape(-1)
    flat[5:900] = 0
    flat[1000:1900] *= np.float32(1e-42)
    flat[2000:2004] = [3.0e38, -3.0e38, 1e-38, -1e-45]
    flat[4096:12288] = rng.integers(-508, 509, 8192) / 4  # quarters, where the largest is 127: ties
    flat[4096:12288:16] = 127
    return x


def expected_of(x, spec, recipe):
    with np.errstate(all="ignore"):
        return affine.quantize(x, spec=spec, recipe=recipe, b=NUMPY)


def served(name, shape, block):
    """Whether the loops are to serve: what the table in ``encoders`` says."""
    element = FORMATS[name].element
    spec = affine.Spec(FORMATS[name], float_type("float32"), block)
    known = element.has_zero and encoders.numbers_of(element, False, False) is not None
    return known and encoders.view_of(shape, spec)


def made_at_once(spec, recipe, shape):
    """Whether scales and codes are to be made in one pass: those from magnitudes, of formats whose scales have none."""
    kept = spec.format.scale
    view = encoders.view_of(shape, spec)
    return recipe.symmetric and (kept is None or not kept.scaled) and not (view.shared or view.of_columns)


def assert_same_trees(mine, theirs):
    """Of the arrays of ``Coded``, scales that are kept as codes among them."""
    assert runtime.on_each(lambda a: None, mine) == runtime.on_each(lambda a: None, theirs)
    for a, b in zip(runtime.arrays_in(mine), runtime.arrays_in(theirs), strict=True):
        assert_same_bits(a, b)


def check(name, scheme, shape, granularity):
    form, x = FORMATS[name], hard(shape)
    if form.scale is not None and form.scale.element.max < 2.0**100:
        x = np.clip(x, np.float32(-1e4), np.float32(1e4))  # their scales hold no others
    spec = affine.Spec(form, float_type("float32"), block_of(granularity, len(shape)))
    recipe = affine.Recipe(scheme == "symmetric")
    with np.errstate(all="ignore"):
        given = affine.choose_qparams(x, spec=spec, recipe=recipe, b=NUMPY)
        codes = affine.encode(x, given, spec=spec, recipe=recipe, b=NUMPY)
    own = encoders.encode(x, given, spec, recipe, packed=False)
    if own is NotImplemented:
        assert not served(name, shape, spec.block)
        return False
    assert_same_bits(own, codes)
    magnitudes = encoders.extrema(x, spec, recipe, True)
    ends = encoders.extrema(x, spec, recipe, False)
    with np.errstate(all="ignore"):
        rows = affine.choose_qparams(
            (magnitudes if recipe.of_magnitudes else ends), recipe=recipe, b=NUMPY,
            spec=affine.Spec(form, spec.source, (None, *(1,) * len(shape))),
        )  # fmt: skip
    if form.scale is None:
        assert_same_bits(rows.scale[0], given.scale)
    at_once, chosen = encoders.quantize(x, spec, recipe, packed=False), encoders.choose(x, spec, recipe)
    if at_once is NotImplemented:
        assert not made_at_once(spec, recipe, shape)
        assert chosen is NotImplemented
    else:
        assert_same_trees(at_once, affine.Coded(codes, *given[:3]))
        assert_same_trees(chosen, given)
    if form.element.bits < 8:
        stream = pack(codes, bits=form.element.bits, b=NUMPY)
        stored = offered(NUMPY, quantize_stored, x, spec=spec, recipe=recipe)
        assert_same_bits(stored.codes, stream)
        out = np.full_like(stream, 255)
        if encoders.encode(x, given, spec, recipe, packed=True, out=out) is not NotImplemented:
            assert_same_bits(out, stream)
    return True


def check_layouts(name):
    form = FORMATS[name]
    served = 0
    for scheme in ("symmetric", "affine") if form.element.zero_points else ("symmetric",):
        for shape, granularity in LAYOUTS:
            if form.group is None or isinstance(granularity, PerGroup):
                served += check(name, scheme, shape, granularity)
    return served


FEW = ["float4_e2m1fn", "int16", "int2", "int8", "mxfp4", "nf4"]


@pytest.mark.exhaustive_unless(name=["int4", "mxfp4"])
@pytest.mark.parametrize("name", FEW)
def test_codes_and_scales_of_every_layout_are_those_of_the_contract(name):
    assert check_layouts(name) >= 6


@pytest.mark.exhaustive
def test_codes_and_scales_of_every_format_are_those_of_the_contract():
    for name in set(FORMATS) - set(FEW):
        served = check_layouts(name)
        element = FORMATS[name].element
        known = element.has_zero and encoders.numbers_of(element, False, False) is not None
        assert served >= 6 or not known, name


ROUNDINGS = ["half_even", "half_away", "half_toward_zero", "toward_zero", "up", 0.75, 1 - 2.0**-7]


def of_magnitudes(most, size):
    """Groups whose largest magnitudes are these, of either sign, anywhere in them."""
    rng = np.random.default_rng(size)
    x = rng.uniform(-1, 1, (*most.shape, size)) * most[..., None]
    at = rng.integers(0, size, most.shape)[..., None]
    np.put_along_axis(x, at, (most * rng.choice([-1, 1], most.shape))[..., None], axis=-1)
    return x.astype(np.float32).reshape(len(most), -1)


@pytest.mark.exhaustive_unless(kept=["float8_e8m0fnu", "float16"])
@pytest.mark.parametrize("kept", SCALE_FORMATS)
def test_loops_keep_scales_in_few_bits_as_the_contract_does(kept):
    """At every exponent that the format has: its numbers, what lies halfway, and what lies next to both."""
    element = SCALE_FORMATS[kept].element
    first, last = (max(math.frexp(n)[1] - 1, -124) for n in (element.smallest, element.max))
    parts = [1 + n * 2.0**-e for e in (element.mantissa, element.mantissa + 1, 7) for n in (0, 1, 2.0**e - 1)]
    near = [(1 + sign * 2.0**-23) * part for part in parts for sign in (-1, 0, 1)]
    scales = np.ldexp(near, np.arange(first, last + 1)[:, None]).reshape(-1)
    for name in ("float4_e2m1fn", "mxint8"):
        for rounding in ROUNDINGS:
            form = Format("kept", FORMATS[name].element, SCALE_FORMATS[kept], 16, True, "power of two", rounding)
            spec = affine.Spec(form, float_type("float32"), (1, 16))
            fits = (scales >= max(element.smallest, spec.least)) & (scales <= element.max)
            most = scales[fits] * form.largest()
            most = np.resize(most[most < 3e38], (256, 40))
            most[7:9] = 0
            x = of_magnitudes(most, 16)
            made = encoders.quantize(x, spec, affine.Recipe(), packed=False)
            assert made is not NotImplemented
            assert_same_trees(made, expected_of(x, spec, affine.Recipe()))
            chosen = encoders.choose(x, spec, affine.Recipe())
            assert_same_trees(chosen[:2], made[1:3])
            assert_same_bits(encoders.encode(x, chosen, spec, affine.Recipe(), packed=False), made.codes)


@pytest.mark.parametrize("kept", ["float8_e4m3fn", "float8_e8m0fnu", "float16"])
def test_codes_from_every_scale_in_few_bits_are_those_of_the_contract(kept):
    """NaN, infinities, subnormal numbers and those below 0 among them."""
    element, x = SCALE_FORMATS[kept].element, np.clip(hard((256, 8192)), np.float32(-1e4), np.float32(1e4))
    storage = np.dtype(element.storage)
    codes = np.arange(1 << (8 * storage.itemsize), dtype=f"u{storage.itemsize}").view(storage)
    codes = np.resize(codes, 256 * 512).reshape(256, 512)
    form = Format("kept", FORMATS["int8"].element, SCALE_FORMATS[kept], 16, True, "largest", "half_even")
    spec = affine.Spec(form, float_type("float32"), (1, 16))
    given = affine.QParams(affine.Coded(codes, None))
    with np.errstate(all="ignore"):
        expected = affine.encode(x, given, spec=spec, recipe=affine.Recipe(), b=NUMPY)
    assert_same_bits(encoders.encode(x, given, spec, affine.Recipe(), packed=False), expected)


def test_scales_that_no_number_stands_for_are_left_to_the_contract():
    x = of_magnitudes(np.full((256, 40), 6.0), 16)
    for change, rounding, kept in [
        (2.0**24, "up", "float16"),  # beyond the largest
        (2.0**-40, "up", "float16"),  # below the smallest
        (1.0, 0.3, "float16"),  # a part of the way that is no number of bits
    ]:
        form = Format("kept", FORMATS["int8"].element, SCALE_FORMATS[kept], 16, True, "largest", rounding)
        spec = affine.Spec(form, float_type("float32"), (1, 16))
        y = x.copy()
        y[3] *= np.float32(change)
        assert encoders.quantize(y, spec, affine.Recipe(), packed=False) is NotImplemented
        assert encoders.choose(y, spec, affine.Recipe()) is NotImplemented
    with pytest.raises(ValueError, match="scale_dtype='float16' cannot hold 40 of the scales"):
        aqt_lite.quantize(x * np.float32(2.0**24) * (np.arange(256) == 3)[:, None], "int8",
                          granularity=PerGroup(16), scale_dtype="float16")  # fmt: skip


EVERY_FLOAT16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@pytest.mark.exhaustive_unless(name=["float6_e3m2fn", "nf4", "uint8"])
@pytest.mark.parametrize("name", ["bnb_fp4", "float4_e2m1fn", "float6_e3m2fn", "float8_e4m3fn", "float8_e4m3fnuz",
                                  "float8_e5m2", "int4", "mxint8", "nf4", "uint8"])  # fmt: skip
def test_every_float16_pattern_and_its_neighbours_get_the_code_of_the_contract(name):
    """NaN and infinities among them; what is next to a tie is next to a pattern that lies on it."""
    form = FORMATS[name]
    bits = EVERY_FLOAT16.view(np.int32)
    x = np.stack([(bits + near).view(np.float32) for near in (-1, 0, 1)])
    for scale in (1.0, 0.75, 3.0):
        spec = affine.Spec(form, float_type("float32"), (1, None))
        if form.scale is not None:
            spec = affine.Spec(form.__class__(form.name, form.element), spec.source, spec.block)
        given = affine.QParams(np.full((3, 1), scale, np.float32))
        with np.errstate(all="ignore"):
            expected = affine.encode(x, given, spec=spec, recipe=affine.Recipe(), b=NUMPY)
        own = encoders.encode(x, given, spec, affine.Recipe(), packed=False)
        assert own is not NotImplemented
        assert_same_bits(own, expected)


@pytest.mark.parametrize("name", ["int16", "int2", "int4", "uint4", "uint8"])
def test_whole_numbers_of_one_zero_point_are_rounded_as_others_are(name):
    element, loops = FORMATS[name].element, runtime.encoding_loops()
    x = np.stack([(EVERY_FLOAT16.view(np.int32) + near).view(np.float32) for near in (-1, 0, 1)])  # with NaN
    usual = encoders.numbers_of(element, False, False)
    fewer, streams = encoders.numbers_of(element, False, False, element.middle), []
    assert fewer.kind == loops.WHOLE_NUMBERS != usual.kind
    one, zero = np.ones((1, 1), np.float32), np.full((1, 1), element.middle, np.float32)
    for kind, bits, parameters, _ in (usual, fewer):
        streams.append(np.full((3, x.shape[1] * bits // 8), 85, np.uint8))
        loops.encode(x, x.shape[1], kind, bits, parameters, one, one, zero, streams[-1])
    assert_same_bits(streams[1], streams[0])


@pytest.mark.exhaustive  # compiles all loops anew, for another processor
def test_processors_without_avx_512():
    tests = [test_codes_and_scales_of_every_layout_are_those_of_the_contract]
    tests += [test_every_float16_pattern_and_its_neighbours_get_the_code_of_the_contract]
    run_without_avx_512(__file__, tests, "runtime.encoding_loops() is not None")


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["int4", "mxfp4", "uint8"])
def test_values_that_are_not_finite_are_found_wherever_they_lie(dtype, value):
    x, granularity = np.ones((512, 512), np.float32), None if dtype == "mxfp4" else PerGroup(64)
    out = np.full_like(aqt_lite.quantize(x, dtype, granularity=granularity).storage, 77)
    for at in ((0, 0), (7, 37), (511, 511)):
        x[at] = value
        for how in ({}, {"scheme": "affine"}) if dtype == "uint8" else ({},):
            for into in (None, out):
                with pytest.raises(
                    ValueError, match=rf"1 non-finite values of 262144, the first at index \({at[0]}, {at[1]}\)"
                ):
                    aqt_lite.quantize(x, dtype, granularity=granularity, out=into, **how)
        x[at] = 1
    assert (out == 77).all()


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4"])
def test_arrays_that_do_not_lie_in_order_and_out_have_the_same_bits(dtype):
    granularity = None if dtype == "mxfp4" else PerGroup(32)
    x = hard((640, 512))
    x = np.clip(x, np.float32(-1e4), np.float32(1e4))
    q = aqt_lite.quantize(x, dtype, granularity=granularity)
    for other in (x.copy(order="F"), np.repeat(x, 2, axis=1)[:, ::2], x.astype(">f4")):
        assert_same_bits(aqt_lite.quantize(other, dtype, granularity=granularity), q)
    wide = np.zeros((640, 2 * q.storage.shape[1]), q.storage.dtype)
    for out in (np.zeros_like(q.storage), wide[:, ::2]):
        assert_same_bits(aqt_lite.quantize(x, dtype, granularity=granularity, out=out), q)
        assert_same_bits(out.copy(), q.storage)
    wide = np.zeros((640, 1024), np.float32)
    for values in (np.zeros_like(x), wide[:, ::2]):
        assert q.dequantize(out=values) is values
        assert_same_bits(values.copy(), q.dequantize())


def in_other_orders(shape):
    """The same values in other orders of memory and other types, and parts of larger arrays."""
    x = hard(shape)
    x = np.clip(x, np.float32(-1e4), np.float32(1e4))
    cut = np.zeros((2 * shape[0], shape[1] + 9), np.float32)
    cut[::2, 5:-4] = x
    yield from (x.copy(order="F"), cut[::2, 5:-4], np.repeat(x, 2, axis=1)[:, ::2], x[::-1, ::-1], x)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        yield from (x.astype(dtype), x.astype(dtype).T)
    deep = x[:336].reshape(12, 28, -1)
    yield from (deep, deep.transpose(1, 2, 0), deep.astype(np.float16).transpose(2, 0, 1))
    yield np.broadcast_to(x[:, None, :200], (shape[0], 3, 200))


ANYWHERE = {
    "groups along the first axis": PerGroup(40, axis=0),
    "groups along the last axis": PerGroup(24),
    "one scale": PerTensor(),
    "a scale an index": PerChannel(1),
    "blocks of rows": None,
}


@pytest.mark.exhaustive_unless(case=[("int4", "groups along the first axis"), ("uint8", "one scale")])
@pytest.mark.parametrize(
    "case",
    [(name, how) for name in ("int4", "int3", "uint8", "int16", "nf4", "float8_e4m3fn") for how in ANYWHERE],
    ids=str,
)
def test_arrays_in_any_order_of_memory_and_of_narrow_types_get_the_codes_of_the_contract(case):
    name, how = case
    symmetric = name != "uint8"
    for x in in_other_orders((360, 400)):
        granularity = ANYWHERE[how] or PerBlock((*(1,) * (x.ndim - 2), 4, x.shape[-1]))
        q = aqt_lite.quantize(
            x, name, scheme="symmetric" if symmetric else "affine", granularity=granularity, on_clip="saturate"
        )
        expected = expected_of(np.ascontiguousarray(x), q._spec, affine.Recipe(symmetric))
        assert_same_bits(q, QArray._of(expected, q._spec))
        assert q.storage.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["mxfp4", "nvfp4"])
def test_arrays_in_any_order_get_scales_of_few_bits_as_the_contract_has_them(dtype):
    for x in itertools.islice(in_other_orders((360, 400)), 1, 8):
        q = aqt_lite.quantize(x, dtype)
        spec = replace(q._spec, format=FORMATS[dtype])  # with its rule for scales, which no QArray keeps
        assert_same_bits(q, QArray._of(expected_of(np.ascontiguousarray(x), spec, affine.Recipe(True)), q._spec))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_found_in_any_order(value):
    x = np.ones((512, 512), np.float16)
    x[7, 37] = value
    for granularity in (PerGroup(64), PerTensor()):
        with pytest.raises(ValueError, match=r"1 non-finite values of 262144, the first at index \(37, 7\)"):
            aqt_lite.quantize(x.T, granularity=granularity)


def test_float16_is_widened_as_numpy_does_it():
    loops = runtime.turning_loops()
    if loops is None:
        pytest.skip("there are no loops that turn")
    halves = np.arange(1 << 16, dtype=np.uint16)
    wide = np.empty(halves.shape, np.uint32)
    loops.widen(halves, wide)
    assert_same_bits(wide.view(np.float32), halves.view(np.float16).astype(np.float32))


def check_traced(name, scheme, shape, granularity, value=None):
    form = FORMATS[name]
    x = hard(shape)
    if form.scale is not None:
        x = np.clip(x, np.float32(-1e4), np.float32(1e4))
    if value is not None:
        x.flat[777] = value
    spec = affine.Spec(form, float_type("float32"), block_of(granularity, x.ndim))
    recipe = affine.Recipe(scheme == "symmetric")
    with np.errstate(all="ignore"):
        w = affine.quantize(x, spec=spec, recipe=recipe, b=NUMPY)

    def quantized(x):
        return aqt_lite.quantize(x, name, scheme=scheme, granularity=granularity)

    lowered = jax.jit(quantized).lower(jnp.asarray(x))
    calls, q = lowered.as_text(), lowered.compile()(jnp.asarray(x))
    assert_same_bits(q.to_backend("numpy"), QArray._of(w, spec))
    return "aqt_lite_quantize" in calls or "aqt_lite_encode" in calls  # of columns, too


@needs("jax")
@pytest.mark.parametrize("name", ["int4", "mxfp4"])
def test_jitted_quantization_calls_the_loops_and_has_their_bits(name):
    assert check_traced(name, "symmetric", *LAYOUTS[0], np.nan)


@needs("jax")
def test_jitted_quantization_with_a_scale_a_column_calls_the_loops():
    assert check_traced("int8", "symmetric", (700, 300), PerChannel(1), np.nan)


@needs("jax")
@pytest.mark.exhaustive
def test_jitted_quantization_of_other_layouts_and_formats_has_the_bits_of_the_contract():
    for name, layout, value in [
        ("int8", 0, None), ("int8", 4, np.inf), ("int8", 3, None), ("uint8", 5, None), ("nf4", 0, np.nan),
        ("nf4", 3, None), ("int16", 0, None), ("float8_e4m3fn", 4, None), ("int2", 5, None), ("int4", 6, None),
        ("int4", 13, None), ("nf4", 12, None), ("int8", 14, -np.inf),
    ]:  # fmt: skip
        assert check_traced(name, "symmetric", *LAYOUTS[layout], value)
    assert check_traced("uint8", "affine", *LAYOUTS[0], np.nan)
    assert check_traced("uint8", "affine", *LAYOUTS[12], -np.nan)
    assert check_traced("nvfp4", "symmetric", *LAYOUTS[1])
    assert check_traced("int3", "symmetric", *LAYOUTS[0])  # packed by XLA


@needs("jax")
def test_jitted_quantization_maps_and_differentiates():
    x = hard((2, 400, 512))
    q = jax.vmap(lambda x: aqt_lite.quantize(x, "int4", granularity=PerGroup(32)))(jnp.asarray(x))
    assert_same_bits(np.asarray(q.storage[1]), aqt_lite.quantize(x[1], "int4", granularity=PerGroup(32)).storage)

    def loss(x):
        return jnp.sum(aqt_lite.quantize(x, "int8", granularity=PerGroup(32)).dequantize() * x[:1])

    gradient = jax.jit(jax.grad(loss))(jnp.ones((400, 512)))
    assert float(gradient[0, 0]) == 400.0
    assert float(gradient[1, 0]) == 0.0
