"""Every number format: the same bits on every form, those of exact arithmetic, and those that others define."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from forms import (
    COMPILED,
    CONSTANT,
    CONSTANT_QPARAMS,
    FORMS,
    JAX,
    JIT,
    NUMPY,
    STRICT,
    TORCH,
    Bits,
    Call,
    Problem,
    compared,
    differing,
    disagreements,
)
from hard_inputs import dtype_of, ends, every_finite, neighbours, random_magnitudes, random_scales
from optional import needs, torch
from oracles import exact
from oracles import formats as written

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup
from aqt_lite._noise import encipher
from aqt_lite._registry import get_backend
from aqt_lite.formats import FORMATS, SCALE_FORMATS, Format
from aqt_lite.testing import assert_same_bits, check_backend

ROWS = PerChannel(0)
PLAIN = [name for name, form in FORMATS.items() if form.scale is None]
MX = [*written.BLOCK_FORMATS]
BUILT_IN = tuple(FORMATS)
MODES = ("floor", "ceil", "even", "rceil")


# ---- problems


def near_ties_of(name, scales, dtype, reach=2, most=40):
    """Midpoints between the format's own numbers, and those, times each scale, with neighbours: a row for each."""
    numbers = np.unique([float(v) for v in written.ELEMENTS[written.BLOCK_FORMATS.get(name, name)].values()])
    if numbers.size > most:
        chosen = np.random.default_rng(0).choice(numbers.size - 1, most, replace=False)
        numbers = np.unique(numbers[np.concatenate([[0, 1, numbers.size - 2, numbers.size - 1], chosen, chosen + 1])])
    ties = np.concatenate([numbers[1:] / 2 + numbers[:-1] / 2, numbers, numbers[[0, -1]] * 1.01])
    limit = float(ml_dtypes.finfo(dtype_of(dtype)).max) * 0.99
    x = np.clip(ties * np.asarray(scales, dtype=np.float64)[:, None], -limit, limit).astype(dtype_of(dtype))
    return neighbours(x, reach).reshape(len(scales), -1)


def problems_of(name, dtype="float32"):
    """Calls that between them use all that a format can be asked for."""
    compute = "float64" if dtype == "float64" else "float32"
    low, high = (-6, 6) if dtype == "float16" else (-90, 80)
    scales = random_scales(3, len(name), low, high)
    column = scales[:, None].astype(compute)
    hard = np.concatenate([ends(21, dtype)[:30], random_magnitudes(12, 21, dtype)])
    mild = np.random.default_rng(1).normal(size=(5, 42)).astype(dtype_of(dtype))
    mild[1], mild[2, ::2] = 0, -0.0
    if name in MX:
        x = near_ties_of(name, 2.0 ** np.asarray([-3, 0, 5]), dtype)
        calls = [Problem(x, Call(name, granularity=None, scale_mode=mode)) for mode in MODES]
        calls.append(Problem(mild, Call(name, granularity=PerBlock((3, 7)))))
        return [*calls, *([] if dtype == "float64" else [Problem(hard, Call(name, granularity=PerGroup(5)))])]
    if name == "nvfp4":
        return [Problem(hard, Call(name, granularity=None)), Problem(mild, Call(name, granularity=PerGroup(4, axis=0)))]
    x = near_ties_of(name, scales, dtype)
    middle = FORMATS[name].element.middle
    zero = np.full((3, 1), middle, "int32") if middle else None
    calls = [Problem(x, Call(name, granularity=ROWS), column, zero)]
    for how in ("half_away", "toward_zero", "stochastic"):
        key = 0x0123456789ABCDEF if how == "stochastic" else None
        calls.append(Problem(x, Call(name, granularity=ROWS, rounding=how, key=key), column, zero))
    calls.append(Problem(hard, Call(name, granularity=PerGroup(5))))
    calls.append(Problem(mild, Call(name, "affine", PerGroup(9), offset="data")))
    calls.append(Problem(x, Call(name, "affine", ROWS), column, offset=column * 3))
    if FORMATS[name].element.zero_points:
        calls.append(Problem(hard, Call(name, "affine", PerBlock((4, 5)))))
    for scale_dtype in ("bfloat16", "float8_e8m0fnu", "int8", "nf4"):
        calls.append(Problem(mild, Call(name, granularity=PerGroup(5), scale_dtype=scale_dtype)))
    return calls


def thinned(problems, columns, rows=3):
    """Some rows and columns, for what takes long; rows of given scales keep theirs."""
    step = max(1, problems.x.shape[1] // columns)
    cut = {name: getattr(problems, name) for name in ("scale", "zero_point", "offset")}
    cut = {name: None if value is None else value[:rows] for name, value in cut.items()}
    x = (
        problems.x[:rows, ::step]
        if problems.scale is not None
        else problems.x[:: max(1, len(problems.x) // rows), ::step]
    )
    return problems._replace(x=x, **cut)


def as_bits(e):
    """Results of the oracle as those of a form."""
    scale = as_bits(e.scale) if isinstance(e.scale, exact.Exact) else e.scale
    return Bits(e.codes, scale, e.zero_point, e.values, e.offset, e.storage)


def oracle(problem):
    x, call, scale, zero_point, offset = problem
    block = None if call.granularity is None else aqt_lite.granularity.block_of(call.granularity, x.ndim)
    settings = {name: getattr(call, name) for name in ("scale_dtype", "scale_mode", "rounding", "key")}
    offset = call.offset if offset is None else offset
    return as_bits(exact.quantize(x, call.dtype, call.scheme, block, scale, zero_point, offset=offset, **settings))


# ---- the same bits


@pytest.mark.exhaustive_where(dtype="bfloat16")
@pytest.mark.exhaustive_where(step=1)
@pytest.mark.parametrize(
    ("dtype", "step"), [("bfloat16", 8), ("float32", 6), ("float64", 8), ("float32", 1), ("float64", 1)]
)
def test_every_format_has_the_bits_of_exact_arithmetic(dtype, step):
    compared_numbers = 0
    for at, name in enumerate(BUILT_IN):
        for problem in problems_of(name, dtype)[at % step :: step]:
            if problem.call.rounding == "stochastic" and name in written.CODEBOOKS:
                continue  # a table of 256 thresholds a gap: held to its probabilities below
            problem = thinned(problem, 10)
            expected = oracle(problem)
            (found,) = FORMS[NUMPY]([problem])
            assert differing(found, expected) == 0, problem.call
            compared_numbers += compared(expected)
    assert compared_numbers * step > 40_000


def on_numpy(problems):
    return FORMS[NUMPY](problems)


@pytest.mark.exhaustive_where(dtype="float32", form=STRICT)
@pytest.mark.exhaustive_where(dtype="float16")  # of the kind of bfloat16
@pytest.mark.exhaustive_where(dtype="float64", form=STRICT)  # seconds
@pytest.mark.parametrize("form", [STRICT, TORCH])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_format_has_the_same_bits_eagerly(form, dtype):
    problems = [p for name in BUILT_IN for p in problems_of(name, dtype)]
    assert not disagreements(problems, on_numpy(problems), [form])


def some_of(step, dtype, first=0):
    """Every ``step``-th problem, so chosen that each format is among them."""
    found = []
    for at, name in enumerate(BUILT_IN):
        problems = problems_of(name, dtype)
        found += problems[(at + first) % min(step, len(problems)) :: step]
    return found


@pytest.mark.exhaustive_where(form=CONSTANT)  # test_golden has some
@pytest.mark.exhaustive_where(dtype="float64")
@pytest.mark.exhaustive_where(form=CONSTANT_QPARAMS)
@pytest.mark.parametrize(
    ("form", "step", "dtype"),
    [(JIT, 110, "float32"), (JIT, 40, "float64"), (CONSTANT, 40, "float32"), (CONSTANT_QPARAMS, 40, "bfloat16")],
)
def test_every_format_has_the_same_bits_jitted(form, step, dtype):
    problems = some_of(step, dtype)[:: 1 if step == 64 else 3]
    assert not disagreements(problems, on_numpy(problems), [form])


@pytest.mark.exhaustive  # compiling takes half a minute; test_golden has some of them
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_formats_have_the_same_bits_in_compiled_torch(dtype):
    problems = some_of(40, dtype)[:: 15 if dtype == "float32" else 30]
    assert not disagreements(problems, on_numpy(problems), [COMPILED])


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("form", "dtype", "step"),
    [
        (JIT, "float32", 4),
        (JIT, "bfloat16", 12),
        (JIT, "float64", 16),
        *((form, "float32", 16) for form in (JAX, CONSTANT, CONSTANT_QPARAMS)),
    ],
)
@pytest.mark.parametrize("first", range(6))
def test_every_format_has_the_same_bits_on_every_form(form, dtype, step, first):
    """Values become float32 or float64 before anything else, so that few dtypes say all; torch compiled: see above."""
    problems = [p for name in BUILT_IN[first::6] for p in problems_of(name, dtype)][first % step :: step]
    assert not disagreements(problems, on_numpy(problems), [form])


@pytest.mark.exhaustive_where(dtype="float16")
@pytest.mark.parametrize("form", [TORCH, JIT])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_finite_16_bit_value_has_the_same_code_in_every_format(form, dtype):
    x = every_finite(dtype)
    names = PLAIN if form == TORCH else PLAIN[::7]
    problems = []
    for name in names:
        middle = FORMATS[name].element.middle
        zero = np.full((1, 1), middle, "int32") if middle else None
        problems.append(Problem(x, Call(name), np.ones((1, 1), "float32"), zero))
    assert not disagreements(problems, on_numpy(problems), [form])


# ---- what others define


def cast(x, name, kind):
    """ml_dtypes' cast of x, saturated first, as codes."""
    info = ml_dtypes.finfo(kind) if not name.startswith(("int", "uint")) else ml_dtypes.iinfo(kind)
    with np.errstate(all="ignore"):
        wide = np.clip(x.astype(np.float64), float(info.min), float(info.max))
        if name.startswith(("int", "uint")):
            return np.rint(wide).astype(kind)
        return wide.astype(np.float32).astype(kind)


CASTS = [name for name in PLAIN if hasattr(ml_dtypes, name)]


def sixteen_bit_and_near_ties(name):
    yield every_finite("float16").ravel()
    yield every_finite("bfloat16").ravel()
    yield near_ties_of(name, [1.0], "float32", most=300).ravel()


@pytest.mark.parametrize("name", CASTS)
def test_a_scale_of_1_is_the_saturating_cast_of_ml_dtypes(name):
    kind = getattr(ml_dtypes, name)
    assert len(CASTS) >= 11
    middle = FORMATS[name].element.middle
    for x in sixteen_bit_and_near_ties(name):
        q = aqt_lite.quantize(x, name, scale=1.0, zero_point=0 if middle else None, on_clip="saturate")
        wanted = cast(x, name, kind)
        if name.startswith("int"):  # a symmetric scheme leaves the smallest integer out
            wanted = np.maximum(wanted.astype(np.int8), -FORMATS[name].element.codes[1]).astype(kind)
        if not name.startswith(("int", "uint")):
            codes = wanted.view(np.uint8)
            tiny = np.abs(x.astype(np.float64)) < 2.0**-126  # subnormal float32 counts as zero
            assert np.array_equal(q.qvalue[~tiny], codes[~tiny])
            assert not (q.qvalue[tiny] & ((1 << (FORMATS[name].element.bits - 1)) - 1)).any()
        else:
            assert np.array_equal(q.qvalue, wanted.astype(q.qvalue.dtype))
        limit = float(ml_dtypes.finfo(x.dtype).max)
        values = np.clip(wanted.astype(np.float32), -limit, limit).astype(x.dtype)
        assert np.array_equal(q.dequantize().astype(np.float32), values.astype(np.float32))


@pytest.mark.parametrize("name", [*CASTS, *SCALE_FORMATS])
def test_every_code_decodes_as_in_ml_dtypes(name):
    if name in ("int2", "int4", "uint2", "uint4"):
        low, high = FORMATS[name].element.codes
        codes = np.arange(low, high + 1)
        wanted = codes.astype(getattr(ml_dtypes, name)).astype(np.float64)
        element = FORMATS[name].element
    else:
        element = (FORMATS.get(name) or SCALE_FORMATS[name]).element
        codes = np.arange(1 << element.bits).astype(element.storage)
        kind = np.dtype(name) if name == "float16" else np.dtype(getattr(ml_dtypes, name))
        with np.errstate(all="ignore"):
            wanted = codes.view(kind).astype(np.float64)
    found = np.asarray(element.decode(codes.astype(element.storage), get_backend("numpy"), "float64"), dtype=np.float64)
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(
        np.signbit(found), np.signbit(wanted) & ~np.isnan(wanted) | np.isnan(wanted) & np.signbit(found)
    )


@pytest.mark.parametrize(
    "name", [n for n in SCALE_FORMATS if n in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")]
)
def test_kept_scales_are_casts_of_ml_dtypes(name):
    """Half to even by the format's own rounding, which is nearest where a format says so."""
    form = replace(FORMATS["int8"], scale=SCALE_FORMATS[name], scale_rounding="half_even", name="int8")
    spec = aqt_lite.affine.Spec(form, aqt_lite.elements.FLOAT_TYPES["float32"], (1,))
    smallest = max(form.scale.element.smallest, 2.0**-124)
    scales = np.abs(near_ties_of_floats(name))
    scales = scales[(scales >= smallest) & (scales <= form.scale.element.max)]
    kept = aqt_lite.affine.keep(scales, spec, get_backend("numpy"))
    kind = np.dtype(name) if name == "float16" else np.dtype(getattr(ml_dtypes, name))
    assert np.array_equal(kept.codes, scales.astype(kind).view(kept.codes.dtype))


def near_ties_of_floats(name):
    numbers = np.asarray([float(v) for v in written.SCALES[name].values()])
    return neighbours((numbers[1:] / 2 + numbers[:-1] / 2).astype(np.float32), 1).ravel()


@needs("torch")
@pytest.mark.parametrize("name", [n for n in PLAIN if n.startswith("float8")])
def test_float8_codes_are_those_of_torch(name):
    largest = FORMATS[name].element.max
    for x in sixteen_bit_and_near_ties(name):
        x = x.astype("float32")
        x = np.where(np.abs(x) < 2.0**-126, 0 * x, x)  # subnormal float32 counts as zero
        wanted = torch.from_numpy(np.clip(x, -largest, largest)).to(getattr(torch, name)).view(torch.uint8).numpy()
        assert np.array_equal(aqt_lite.quantize(x, name, scale=1.0, on_clip="saturate").qvalue, wanted)


def test_nf4_and_bnb_fp4_go_to_the_nearer_number_and_at_a_midpoint_to_the_smaller():
    for name in written.CODEBOOKS:
        numbers = written.CODEBOOKS[name]
        order = np.unique(np.asarray([float(v) for v in numbers.values()], dtype=np.float32))
        cuts = (order[1:].astype(np.float64) / 2 + order[:-1].astype(np.float64) / 2).astype(np.float32)
        narrow = [every_finite(dtype).ravel().astype(np.float32) for dtype in ("float16", "bfloat16")]
        x = np.concatenate([neighbours(cuts, 3).ravel(), *narrow])
        wanted = order[np.searchsorted(cuts, x)]  # at a cut, the number below it
        assert np.array_equal(aqt_lite.quantize(x, name, scale=1.0, on_clip="saturate").dequantize(), wanted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MX)
def test_mx_scales_follow_the_rules_by_name(name, mode):
    """E of every block from its amax, by arithmetic on fractions; near powers of two and near carries."""
    element = written.BLOCK_FORMATS[name]
    top, m = max(written.ELEMENTS[element].values()), written.MANTISSA[element]
    starts = np.concatenate([2.0 ** np.arange(-90, 90, 9), 1.5 * 2.0 ** np.arange(-90, 90, 9)])
    carries = (2 - 2.0 ** -(m + 1)) * 2.0 ** np.arange(-90, 90, 9)
    amax = neighbours(np.concatenate([starts, carries, carries * float(top)]).astype(np.float32), 2).ravel()
    x = np.zeros((amax.size, 32), np.float32)
    x[:, 3] = amax
    q = aqt_lite.quantize(x, name, scale_mode=mode)
    for value, code in zip(exact.exactly(amax), q.scale.qvalue.ravel().tolist(), strict=True):
        e = exact.floor_log2(value)
        if mode == "rceil":
            d = exact.nearest(value * exact.nearest(1 / written.Fraction(top), "float32"), "float32")
            wanted = exact.floor_log2(d) + (d != exact.power(exact.floor_log2(d)))
        else:
            f = value / exact.power(e)
            up = {"floor": False, "ceil": f > 1, "even": f >= 2 - exact.power(-m - 1)}[mode]
            wanted = e - exact.floor_log2(written.Fraction(top)) + up
        assert code - 127 == wanted


def finite_float_of_gfloat(e):
    """gfloat's record of a float that it has no name for, without infinities and NaN."""
    import gfloat

    assert e.infinity is None, f"{e.name} is not finite: write gfloat's name of it down in the test below"
    assert e.nan is None, f"{e.name} is not finite: write gfloat's name of it down in the test below"
    return gfloat.FormatInfo(
        e.name, e.bits, e.mantissa + 1, bias=e.bias, is_signed=e.signed, domain=gfloat.Domain.Finite, has_nz=True,
        num_high_nans=0, has_subnormals=e.subnormal, is_twos_complement=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", [n for n in (*PLAIN, *MX) if n in (*written.FLOATS, *MX) and not n.endswith("fnuz")])
def test_codes_are_those_of_gfloat(name):  # which has no fnuz format
    gfloat = pytest.importorskip("gfloat", reason="gfloat is not installed")
    from gfloat import formats as theirs

    infos = {
        "float8_e4m3fn": "format_info_ocp_e4m3",
        "float8_e5m2": "format_info_ocp_e5m2",
        "float6_e2m3fn": "format_info_ocp_e2m3",
        "float6_e3m2fn": "format_info_ocp_e3m2",
        "float4_e2m1fn": "format_info_ocp_e2m1",
        "mxint8": "format_info_ocp_int8",
    }
    element = written.BLOCK_FORMATS.get(name, name)
    named = infos.get(element)
    info = getattr(theirs, named) if named else finite_float_of_gfloat(FORMATS[name].element)
    if name in MX:
        x = near_ties_of(name, 2.0 ** np.arange(-20, 20), "float32")[:, :96]
        q = aqt_lite.quantize(x, name)
        scales = np.repeat(q.scales, 32, axis=1)[:, : x.shape[1]]
        rounded = gfloat.round_ndarray(info, x.astype(np.float64) / scales, sat=True)
        assert np.array_equal(q.dequantize(), rounded * scales)
        return
    for x in sixteen_bit_and_near_ties(name):
        wide = x.astype(np.float64)
        wide = np.where(np.abs(wide) < 2.0**-126, 0 * wide, wide)
        rounded = gfloat.round_ndarray(info, wide, sat=True)
        codes = gfloat.encode_ndarray(info, rounded)
        assert np.array_equal(aqt_lite.quantize(x, name, scale=1.0, on_clip="saturate").qvalue, codes)


# ---- stochastic rounding


def test_the_cipher_has_its_published_test_vector():
    """Speck32/64: Beaulieu et al. 2013, ePrint 2013/404, appendix C."""
    key = [np.int32(word) for word in (0x0100, 0x0908, 0x1110, 0x1918)]
    x, y = encipher(np.int32(0x6574), np.int32(0x694C), key, get_backend("numpy"))
    assert (int(x), int(y)) == (0xA868, 0x42F2)
    assert exact.speck(0x6574, 0x694C, [0x0100, 0x0908, 0x1110, 0x1918]) == (0xA868, 0x42F2)


def test_noise_moves_nothing_subnormal():
    """XLA would flush it first."""
    tiny = np.float32(2.0**-126)
    rows = np.asarray([tiny, -tiny, 1.5 * tiny, *(tiny * np.linspace(-0.99, 0.99, 60))], np.float32)
    largest = {"int4": 32, "uint4": 32, "float8_e4m3fn": 2.0**19, "float4_e2m1fn": 64, "nf4": 32}  # steps of some tiny
    problems = [
        Problem(
            np.concatenate([[[most * tiny]], np.tile(rows, 5)[None]], axis=1).astype(np.float32),
            Call(name, rounding="stochastic", key=11),
        )
        for name, most in largest.items()
    ]
    expected = on_numpy(problems)
    for name, (x, *_), bits in zip(largest, problems, expected, strict=True):
        assert (bits.values[np.abs(x) < tiny] == 0).all(), name
        assert len(np.unique(bits.values)) > 2, f"{name}: normal numbers it does move"
        if name != "nf4":  # the oracle has no noise for codebooks
            e = exact.quantize(x, name, rounding="stochastic", key=11)
            assert differing(bits, Bits(e.codes, e.scale, e.zero_point, e.values, e.offset, e.storage)) == 0
    assert not disagreements(problems, expected, [STRICT, TORCH, JAX, JIT])


@pytest.mark.parametrize("name", ["int8", "int4", "float8_e4m3fn", "float4_e2m1fn", "nf4"])
def test_stochastic_rounding_is_unbiased(name):
    n = 1 << 16
    numbers = np.unique([float(v) for v in written.ELEMENTS[name].values()])
    low, high = (numbers[i] for i in (numbers.size // 2 + 1, numbers.size // 2 + 2))
    for part in (0.125, 0.5, 0.8125):
        x = np.full(n, low + part * (high - low), np.float32)
        values = aqt_lite.quantize(x, name, scale=1.0, rounding="stochastic", key=7, on_clip="saturate").dequantize()
        assert set(np.unique(values)) == {np.float32(low), np.float32(high)}
        up = np.mean(values == np.float32(high))
        exactly = (float(x[0]) - low) / (high - low)
        assert abs(up - exactly) < 5 * np.sqrt(0.25 / n) + 2.0**-8 * (name == "nf4")


def test_a_key_is_an_integer_or_its_two_halves(backend):
    x = backend.asarray(np.random.default_rng(0).normal(size=(9, 31)).astype("float32"))
    key = 0xFEDCBA9876543210
    halves = np.asarray([key >> 32, key & 0xFFFFFFFF], dtype="uint32")
    one = aqt_lite.quantize(x, "int4", rounding="stochastic", key=key)
    same = aqt_lite.quantize(x, "int4", rounding="stochastic", key=backend.asarray(halves))
    other = aqt_lite.quantize(x, "int4", rounding="stochastic", key=key + 1)
    assert_same_bits(one, same)
    assert not np.array_equal(backend.to_numpy(one.storage), backend.to_numpy(other.storage))


# ---- a new format is one record


@pytest.fixture
def new_formats(monkeypatch):
    """Three that nobody has, known while a test runs."""
    import aqt_lite.formats as table

    monkeypatch.setattr(table, "FORMATS", table.FORMATS)
    made = [
        aqt_lite.Codebook("seven", (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0)),
        aqt_lite.Float("float5_e2m2_test", 2, 2, bias=1, max=7.0),
        aqt_lite.Integer("int3_in_quarters", 3, True, step=0.25, narrow=True),
    ]
    yield [aqt_lite.register_format(record).name for record in made]
    for record in made:
        del FORMATS[record.name]


def test_a_new_format_is_one_record(backend, new_formats):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 13)).astype("float32")
    for name in new_formats:
        bits = FORMATS[name].element.bits
        for settings in (
            {},
            {"granularity": PerGroup(4)},
            {"granularity": PerGroup(4, axis=0), "scale_dtype": "float8_e4m3fn"},
            {"rounding": "stochastic", "key": 5, "granularity": ROWS},
            {"scheme": "affine", "offset": "data", "granularity": ROWS},
        ):
            q, wanted = (aqt_lite.quantize(a, name, **settings) for a in (backend.asarray(x), x))
            assert_same_bits(q, wanted)
            assert_same_bits(q.storage, wanted.storage)
            assert tuple(q.storage.shape) == (6, -(-13 * bits // 8))
            assert_same_bits(q.dequantize(), wanted.dequantize())
            assert_same_bits(q[:4], wanted[:4])
            assert_same_bits(aqt_lite.fake_quantize(backend.asarray(x), name, **settings), wanted.dequantize())
        w = aqt_lite.quantize(x, name, granularity=ROWS)
        y = aqt_lite.linear(backend.asarray(x), w.to_backend(backend.name))
        wanted = x.astype(np.float64) @ w.dequantize().astype(np.float64).T
        np.testing.assert_allclose(backend.to_numpy(y), wanted, atol=1e-4)


def test_the_conformance_suite_covers_new_formats(new_formats):
    before = check_backend("array_api_strict")
    row = next(count for name, count, _ in before.rows if name == "formats")
    del FORMATS[new_formats[0]]
    after = next(count for name, count, _ in check_backend("array_api_strict").rows if name == "formats")
    aqt_lite.register_format(aqt_lite.Codebook("seven", (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0)))
    assert after < row


def test_nothing_outside_the_table_asks_for_the_name_of_a_format():
    """Comparisons with the names of formats, in the whole package. Names of storage types are NumPy's, too."""
    package = Path(aqt_lite.__file__).parent
    storage = {form.element.storage for form in FORMATS.values()}
    names = {*BUILT_IN, *SCALE_FORMATS, "fp4", "fp8"} - storage - {"float16", "bfloat16"}
    found = []
    for file in [*package.glob("**/*.py"), *(package / "backends").glob("**/*.py")]:
        if file.name == "formats.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare | ast.MatchValue):
                words = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                found += (
                    [f"{file.name}:{node.lineno if hasattr(node, 'lineno') else 0}: {words & names}"]
                    if words & names
                    else []
                )
    assert not found


def test_formats_are_hashable_and_their_records_compare():
    assert len({*FORMATS.values()}) == len(FORMATS)
    assert all(isinstance(form, Format) for form in FORMATS.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aqt_lite.Integer("int1", 1, True), "bits=1"),
        (lambda: aqt_lite.Integer("int40", 40, True), "bits=40"),
        (lambda: aqt_lite.Integer("thirds", 4, True, step=0.3), "step=0.3"),
        (lambda: aqt_lite.Integer("halves", 4, False, step=0.5), "step=0.5 of codes without a sign"),
        (lambda: aqt_lite.Float("fixed", 0, 3, bias=1, max=1.0), "exponent=0"),
        (lambda: aqt_lite.Float("wide", 5, 6, bias=15, max=1.0), "exponent=5, mantissa=6"),
        (lambda: aqt_lite.Float("beyond", 2, 2, bias=1, max=100.0), "max=100.0"),
        (lambda: aqt_lite.Float("between", 2, 2, bias=1, max=6.5), "max=6.5"),
        (lambda: aqt_lite.Float("none", 2, 2, bias=1, max=0.0), "max=0.0"),
        (lambda: aqt_lite.Format("nothing", "int4"), "element='int4'"),
        (lambda: aqt_lite.Format("scales", FORMATS["int4"].element, scale="float16"), "scale='float16'"),
        (lambda: aqt_lite.Format("groups", FORMATS["int4"].element, group=0), "group=0"),
        (lambda: aqt_lite.Format("lone", FORMATS["float4_e2m1fn"].element, scaled=False), "without a code of NaN"),
        (
            lambda: aqt_lite.register_format(Format("tiny", SCALE_FORMATS["float8_e8m0fnu"].element)),
            "between 2\\^-100 and 2\\^100",
        ),
        (lambda: aqt_lite.register_format(aqt_lite.Codebook("aside", (-0.01, 0.5, 1.0))), "more than 8 times as far"),
        (lambda: aqt_lite.Float("nan", 4, 3, bias=7, max=448.0, nan=0x7E), "nan=0x7e is the code of a number"),
        (lambda: aqt_lite.Float("inf", 2, 2, bias=1, max=7.0, infinity=0x80), "infinity=0x80"),
        (lambda: aqt_lite.register_format(aqt_lite.Float("float16", 2, 2, bias=1, max=7.0)), "'float16' exists"),
        (lambda: aqt_lite.register_format(aqt_lite.Float("float32", 2, 2, bias=1, max=7.0)), "name of a dtype"),
        (lambda: aqt_lite.register_format(aqt_lite.Integer("float4_e2m1fn_x2", 4, True)), "name of a dtype"),
    ],
)
def test_records_that_are_no_formats_are_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_the_format_of_scales_is_registered_with_its_own(new_formats):
    """So that both are found in another process, and by the arrays that others hold."""
    scale = Format(
        "float6_e3m2_scales", aqt_lite.Float("float6_e3m2_scales", 3, 2, bias=3, max=24.0, nan=0x1F), scaled=False
    )
    form = Format("seven_in_fours", FORMATS["seven"].element, scale=scale, group=4)
    try:
        q = aqt_lite.quantize(np.asarray([[1.0, -2.0, 0.5, 3.0]], "float32"), form)
        assert SCALE_FORMATS[scale.name] == scale
        assert q.scale.dtype == scale.name
        assert_same_bits(q.dequantize(), np.asarray([[0.6, -1.5, 0.6, 3.0]], "float32"))
        assert aqt_lite.quantize([1.0, 2.0], "int4", scale_dtype=scale.element).scale.dtype == scale.name
    finally:
        FORMATS.pop(form.name, None)
        SCALE_FORMATS.pop(scale.name, None)


def test_floats_without_a_sign(backend):
    """Numbers below zero lie outside; they are not read as their magnitudes."""
    form = aqt_lite.register_format(aqt_lite.Float("ufloat5_e3m2", 3, 2, bias=3, max=28.0, signed=False))
    try:
        x = backend.asarray(np.asarray([-3.0, -0.0, 0.1, 2.0, 50.0], "float32"))
        q = aqt_lite.quantize(x, form.name, scale=1.0, on_clip="saturate")
        assert backend.to_numpy(q.dequantize()).tolist() == [0.0, 0.0, 0.125, 2.0, 28.0]
        with pytest.raises(ValueError, match=r"2 values of 5 beyond the numbers"):
            aqt_lite.quantize(x, form.name, scale=1.0, on_clip="raise")
        with pytest.raises(ValueError, match=r"ufloat5_e3m2 has no number below zero: give offset='data'"):
            aqt_lite.quantize(x, form.name)
        whole = aqt_lite.quantize(x, form.name, offset="data")
        np.testing.assert_allclose(backend.to_numpy(whole.dequantize()), backend.to_numpy(x), atol=4)
    finally:
        del FORMATS[form.name]


def test_given_scales_of_blocks_go_up_to_their_format(backend):
    x = np.asarray([[0.6, -0.3, 0.1, 0.0]], "float32")
    q = aqt_lite.quantize(backend.asarray(x), "mxfp4", scale=0.1)
    assert backend.to_numpy(q.scales).tolist() == [[0.125]]
    zeros = aqt_lite.quantize(backend.asarray(0 * x), "iq4_nl", granularity=PerGroup(2))
    assert not np.any(np.abs(backend.to_numpy(zeros.dequantize())) > 1.1)


@pytest.mark.parametrize("kept", ["int8", "uint4", "float4_e2m1fn"])
def test_scales_that_are_not_zero_are_not_kept_as_zero(backend, kept):
    """Rounded half to even, as nvfp4 has it, they might be; a block of values would read as zeros."""
    x = np.asarray([[1000.0, -3.0, 2.0, 0.5], [1.0, -3e-4, 0.0, 1e-3], [0.0, 0.0, 0.0, -0.0]], "float32")
    how = {"granularity": PerChannel(0), "scale_dtype": kept}
    here = aqt_lite.quantize(x, "nvfp4", **how)
    assert_same_bits(aqt_lite.quantize(backend.asarray(x), "nvfp4", **how), here)
    assert [bool(scale) for scale in here.scales.ravel()] == [True, True, False]
    large = aqt_lite.quantize(backend.asarray(np.repeat(x, 700, axis=0)), "nvfp4", **how)
    assert_same_bits(large[::700].dequantize(), here.dequantize())


def test_missing_values_beside_an_offset(backend):
    x = np.asarray([[5.0, np.nan, 7.0, 6.0]], "float32")
    q = aqt_lite.quantize(backend.asarray(x), "uint8", offset="data", nonfinite="ignore")
    found = backend.to_numpy(q.dequantize())
    np.testing.assert_allclose(found[0, [0, 2, 3]], [5, 7, 6], atol=2 / 255)
