"""Laws of quantization that hold for any input, looked for with hypothesis on several backends."""

from __future__ import annotations

import math

import numpy as np
import pytest
from forms import Bits, Call, Problem, bits_of, differing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracles import exact
from oracles.formats import packed

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor
from aqt_lite._registry import get_backend
from aqt_lite.formats import FORMATS
from aqt_lite.packing import pack, unpack

pytestmark = pytest.mark.filterwarnings("ignore::aqt_lite.SuspectValueWarning")  # any values are fine here

INTEGERS = ("int8", "uint8", "int16", "uint16")
"""Formats with zero points whose scales, for a 16-bit code, are not far from the rounding of the product itself."""

EXAMPLES = {"numpy": 120, "torch": 40, "jax": 8}
SHAPE = (4, 12)
TINY = 2.0**-125
GRANULARITIES = {PerTensor(): (None, None), PerChannel(0): (1, None), PerGroup(5): (1, 5), PerBlock((3, 7)): (3, 7)}
"""With the block shape that each means."""

every_backend = pytest.mark.parametrize("name", EXAMPLES)


def holds_for(name, *strategies, times=1.0):
    """Run a law on as many examples as the backend has time for, or some times as many."""

    def run(law):
        relaxed = settings(
            max_examples=int(EXAMPLES[name] * times),
            derandomize=True,
            database=None,
            suppress_health_check=[*HealthCheck],
        )
        relaxed(given(*strategies)(law))()

    return run


@st.composite
def arrays(draw, low=-140, high=127):
    """float32 rows, each of a magnitude of its own, down to subnormal and up to the largest."""
    numbers = st.one_of(st.floats(-1, 1, width=32), st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5]))
    unit = draw(hnp.arrays(np.float32, SHAPE, elements=numbers)).astype(np.float64)
    exponents = draw(hnp.arrays(np.int64, (SHAPE[0], 1), elements=st.integers(low, high)))
    limit = float(np.finfo(np.float32).max)
    return np.clip(np.ldexp(unit, exponents + draw(st.integers(0, 1))), -limit, limit).astype(np.float32)


calls = st.builds(
    Call,
    st.sampled_from(INTEGERS),
    st.sampled_from(["symmetric", "affine"]),
    st.sampled_from([*GRANULARITIES]),
)
symmetric_calls = st.builds(
    Call, st.sampled_from(["int8", "int16"]), st.just("symmetric"), st.sampled_from([*GRANULARITIES])
)


def on(name, call, x, scale=None, zero_point=None):
    """The call on a backend, its results back as NumPy arrays."""
    b = get_backend(name)
    moved = [None if a is None else b.asarray(np.asarray(a)) for a in (x, scale, zero_point)]
    return call(*moved).each(lambda part: np.array(b.to_numpy(part)))


def spread(blocks, granularity):
    """A scale for each element."""
    for axis, size in enumerate(GRANULARITIES[granularity]):
        blocks = np.repeat(blocks, SHAPE[axis] if size is None else size, axis=axis)
    return blocks[: SHAPE[0], : SHAPE[1]]


@every_backend
def test_the_error_is_at_most_half_a_step(name):
    """Plus roundings: 2 units in the last place of the quotient, half of one of the value; and *tiny* counts as 0."""

    @holds_for(name, arrays(), calls)
    def law(x, call):
        bits = on(name, call, x)
        scale, x, back = (a.astype(np.float64) for a in (spread(bits.scale, call.granularity), x, bits.values))
        roundings = np.abs(x) * 2.0**-22.9 + np.abs(back) * 2.0**-24 + TINY
        assert (np.abs(x - back) <= scale / 2 + roundings).all()


@every_backend
def test_zero_is_exact(name):
    @holds_for(name, arrays(), calls)
    def law(x, call):
        bits = on(name, call, x)
        assert (bits.values[x == 0] == 0).all()


@every_backend
def test_quantizing_again_with_the_same_parameters_changes_nothing(name):
    @holds_for(name, arrays(), calls)
    def law(x, call):
        once = on(name, call, x)
        given_scale = Call(call.dtype, call.scheme, call.granularity)
        if once.zero_point is not None:  # a zero point opens the whole range of codes, which is not needed here
            given_scale = Call(call.dtype, "affine", call.granularity)
        assert differing(on(name, given_scale, once.values, once.scale, once.zero_point), once) == 0


@every_backend
def test_symmetric_codes_survive_calibration_on_their_own_values(name):
    @holds_for(name, arrays(), symmetric_calls)
    def law(x, call):
        once = on(name, call, x)
        again = on(name, call, once.values)
        assert np.array_equal(again.codes, once.codes)
        np.testing.assert_allclose(again.scale, once.scale, rtol=2.0**-22)


@every_backend
def test_codes_are_monotone(name):
    @holds_for(name, arrays(), calls)
    def law(x, call):
        bits = on(name, Call(call.dtype, call.scheme, PerTensor()), x)
        order = np.argsort(x, axis=None, kind="stable")
        assert (np.diff(bits.codes.ravel()[order].astype(np.int64)) >= 0).all()
        assert (np.diff(bits.values.ravel()[order].astype(np.float64)) >= 0).all()


@every_backend
def test_negating_the_values_negates_symmetric_codes(name):
    @holds_for(name, arrays(), symmetric_calls)
    def law(x, call):
        bits, mirrored = on(name, call, x), on(name, call, -x)
        assert np.array_equal(mirrored.codes, -bits.codes)
        assert np.array_equal(mirrored.scale, bits.scale)


@every_backend
def test_a_power_of_two_moves_into_the_scale(name):
    @holds_for(name, arrays(-40, 40), calls, st.integers(-50, 50))
    def law(x, call, e):
        x = np.where(np.abs(x) < 2.0**-58, np.float32(0), x)  # what counts as zero must do so before and after
        bits, moved = on(name, call, x), on(name, call, np.ldexp(x, e).astype(np.float32))
        zero_block = bits.scale == 1
        assert np.array_equal(moved.codes, bits.codes)
        assert np.array_equal(moved.scale[~zero_block], np.ldexp(bits.scale, e)[~zero_block])
        assert bits.zero_point is None or np.array_equal(moved.zero_point, bits.zero_point)


@every_backend
def test_blocks_are_independent(name):
    @holds_for(name, arrays(), calls)
    def law(x, call):
        bits = on(name, call, x)
        whole = Call(call.dtype, call.scheme)
        sizes = [length if s is None else s for s, length in zip(GRANULARITIES[call.granularity], SHAPE, strict=True)]
        for at in np.ndindex(bits.scale.shape):
            block = tuple(slice(i * s, (i + 1) * s) for i, s in zip(at, sizes, strict=True))
            own = np.index_exp[at[0] : at[0] + 1, at[1] : at[1] + 1]
            zero_point = None if bits.zero_point is None else bits.zero_point[own]
            part = Bits(bits.codes[block], bits.scale[own], zero_point, bits.values[block])
            assert differing(on("numpy", whole, x[block]), part) == 0


@every_backend
def test_fake_quantization_gives_the_dequantized_values(name):
    b = get_backend(name)

    @holds_for(name, arrays(), calls)
    def law(x, call):
        fake = aqt_lite.fake_quantize(b.asarray(x), call.dtype, scheme=call.scheme, granularity=call.granularity)
        assert np.array_equal(b.to_numpy(fake).view(np.int32), on(name, call, x).values.view(np.int32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_backend
def test_eight_bit_codes_survive_a_narrow_type(name, dtype):
    """Values of float16 and bfloat16 are precise enough to carry 8-bit codes, though not 16-bit ones."""
    kind = get_backend("numpy").dtype(dtype)
    low, high = (-24, 15) if dtype == "float16" else (-120, 126)

    @holds_for(name, arrays(low, high), st.sampled_from(["int8", "uint8"]), st.sampled_from(["symmetric", "affine"]))
    def law(x, element, scheme):
        limit = 65504 if dtype == "float16" else 3.38e38
        x = np.clip(x, -limit, limit).astype(kind)
        once = on(name, Call(element, scheme, PerChannel(0)), x)
        again = Call(element, "symmetric" if once.zero_point is None else "affine", PerChannel(0))
        assert np.array_equal(on(name, again, once.values, once.scale, once.zero_point).codes, once.codes)


@st.composite
def products(draw):
    """Activations, a weight, how it is quantized, a bias or none, and the contracted axis."""
    m, k, n = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 32)))

    def numbers(*shape):
        spread = draw(st.sampled_from([0, 5, 40]))
        return np.ldexp(rng.normal(size=shape), rng.integers(-spread, spread + 1, shape)).astype(np.float32)

    contract = draw(st.sampled_from([0, 1]))
    block = draw(st.sampled_from([(None, None), (1, None), (1, 8), (1, 2), (2, 11)]))
    call = Call(
        draw(st.sampled_from(["int8", "uint8"])),
        draw(st.sampled_from(["symmetric", "affine"])),
        PerBlock(tuple(-1 if size is None else size for size in (block if contract else block[::-1]))),
    )
    w = numbers(n, k) if contract else numbers(k, n)
    return numbers(m, k), w, call, numbers(n) if draw(st.booleans()) else None, contract


@every_backend
def test_reproducible_products_are_exact(name):
    b = get_backend(name)

    @holds_for(name, products())
    def law(problem):
        x, w, call, bias, contract = problem
        q = aqt_lite.quantize(w, call.dtype, scheme=call.scheme, granularity=call.granularity)
        op = aqt_lite.linear if contract else aqt_lite.dense
        bias_there = None if bias is None else b.asarray(bias)
        y = op(b.asarray(x), q.to_backend(name), bias_there, mode="reproducible")
        block = tuple(None if size == -1 else size for size in call.granularity.shape)
        expected = exact.linear(x, q.qvalue, q.scale, q.zero_point, block, bias, contract)
        assert np.array_equal(b.to_numpy(y).view(np.int32), expected.view(np.int32))


# ---- every format


KEPT = ("float16", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn", "int8")
"""How scales are kept; the last has a scale itself."""


@st.composite
def quantizations(draw):
    """Values, and a call: any format, with scales as they are, kept in few bits, or beside a real offset.

    Values are few multiples of a power of two where scales have to be numbers of few bits.
    """
    name = draw(st.sampled_from([*FORMATS]))
    form, granularity = FORMATS[name], draw(st.sampled_from([*GRANULARITIES]))
    zero_points = form.element.zero_points
    scheme = draw(st.sampled_from(["symmetric", "affine"])) if zero_points else "symmetric"
    kept = draw(st.sampled_from(["plain", "offset", *KEPT])) if form.scale is None else "plain"
    if kept == "plain" and form.scale is None:
        return draw(arrays(-60, 60)), Call(name, scheme, granularity)
    units = draw(hnp.arrays(np.int64, SHAPE, elements=st.integers(-64, 64)))
    exponents = draw(hnp.arrays(np.int64, (SHAPE[0], 1), elements=st.integers(-7, -2)))
    x = np.ldexp(units, exponents + math.frexp(form.largest())[1]).astype(np.float32)
    if kept == "offset":
        return x, Call(name, "affine" if zero_points else "symmetric", granularity, offset="data")
    return x, Call(name, scheme, granularity, scale_dtype=None if kept == "plain" else kept)


def numbers_of(kept):
    """Scales as numbers, in float64."""
    return (kept.values if isinstance(kept, Bits) else kept).astype(np.float64)


def errs_by_at_most_half_the_gap(x, call, bits):
    """The gap between the numbers on both sides, times the scale as it is kept; where a value is not clipped."""
    element = FORMATS[call.dtype].element
    numbers = element.levels(get_backend("numpy"))
    scale, back = spread(numbers_of(bits.scale), call.granularity), bits.values.astype(np.float64)
    offset = 0.0 if bits.offset is None else spread(bits.offset, call.granularity).astype(np.float64)
    nothing = scale == 0  # of zeros alone
    assert not back[nothing].any()
    steps = (x - offset) / np.where(nothing, 1, scale)
    if bits.zero_point is not None:
        steps += spread(bits.zero_point, call.granularity)
    else:
        steps += element.middle
    low, high = numbers[0], numbers[-1]
    if element.zero_points and (call.scheme == "symmetric" or (call.offset and element.signed)):
        low = 2 * element.middle - high  # what has no opposite is left out
    at = np.clip(np.searchsorted(numbers, steps), 1, numbers.size - 1)
    half = (numbers[at] - numbers[at - 1]) / 2 * scale
    inside = (steps >= low) & (steps <= high) & ~nothing
    roundings = (np.abs(x) + np.abs(offset)) * 2.0**-22 + np.abs(back) * 2.0**-23 + TINY
    assert (np.abs(x - back)[inside] <= (half + roundings)[inside]).all()
    return inside.sum()


def keeps_its_own_numbers(name, call, q):
    """With the same scales and zero points or offsets; beside an offset where a step is much more than a rounding."""
    element = FORMATS[call.dtype].element
    if call.offset and element.bits > (8 if element.zero_points else 6):
        return
    values = q.dequantize()
    said = {"offset": q.offset} if call.offset else {"zero_point": q.zero_point}
    again = aqt_lite.quantize(
        values,
        call.dtype,
        scheme="affine" if q.zero_point is not None else call.scheme,
        granularity=call.granularity,
        scale=q.scale,
        scale_dtype=call.scale_dtype,
        **said,
    )
    b = get_backend(name)
    assert np.array_equal(b.to_numpy(again.dequantize()), b.to_numpy(values))


def packs_and_slices(name, q, row, start, stop):
    """Bytes, codes and bytes again are the same; a part has the values of that part."""
    b = get_backend(name)
    assert q.bits >= 8 or q.storage.shape[-1] == -(-SHAPE[1] * q.bits // 8)
    loose = q.unpacked()
    for mine, its in ((loose.qvalue, q.qvalue), (loose.packed().storage, q.storage)):
        assert np.array_equal(b.to_numpy(mine), b.to_numpy(its))
    part, values = q[row:, start:stop], b.to_numpy(q.dequantize())[row:, start:stop]
    assert np.array_equal(b.to_numpy(part.dequantize()), values)
    assert part.bits >= 8 or not values.size or part.storage.shape[-1] == -(-values.shape[1] * part.bits // 8)


@pytest.mark.exhaustive_where(times=4)
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_with_scales_and_offsets_of_every_kind(name, times):
    """The bound, idempotence, order, layouts, packing."""
    b, seen = get_backend(name), []

    @holds_for(name, quantizations(), st.integers(0, 4), st.integers(0, 12), st.integers(0, 12), times=times / 2)
    def law(problem, row, start, stop):
        x, call = problem
        bits = on(name, call, x)
        seen.append(errs_by_at_most_half_the_gap(x, call, bits))
        settings = {"granularity": call.granularity, "scale_dtype": call.scale_dtype, "offset": call.offset}
        q = aqt_lite.quantize(b.asarray(x.T.copy()).T, call.dtype, scheme=call.scheme, **settings)  # another layout
        assert differing(bits_of(q).each(lambda part: np.array(b.to_numpy(part))), bits) == 0
        keeps_its_own_numbers(name, call, q)
        if call.granularity == PerChannel(0):
            packs_and_slices(name, q, row, start, stop)
        elif call.granularity == PerTensor():
            order = np.argsort(x, axis=None, kind="stable")
            assert (np.diff(bits.values.ravel()[order].astype(np.float64)) >= 0).all()

    assert sum(seen) > 20 * len(seen)


@every_backend
def test_unpacking_undoes_packing(name):
    b = get_backend(name)

    lengths = st.integers(0, 41) if name != "jax" else st.sampled_from([0, 1, 8, 13, 41])  # each compiles

    @holds_for(name, st.integers(1, 7), lengths, st.booleans(), st.integers(0, 1 << 32))
    def law(bits, length, signed, seed):
        low, high = (-(1 << (bits - 1)), 1 << (bits - 1)) if signed else (0, 1 << bits)
        codes = np.random.default_rng(seed).integers(low, high, (3, length)).astype("int8" if signed else "uint8")
        stream = pack(b.asarray(codes), bits=bits, b=b)
        assert np.array_equal(b.to_numpy(unpack(stream, bits=bits, length=length, signed=signed, b=b)), codes)
        wanted = np.asarray(packed(codes.tolist(), bits), dtype="uint8").reshape(3, -(-length * bits // 8))
        assert np.array_equal(b.to_numpy(stream), wanted)


# ---- NumPy alone: any shape and type against exact arithmetic, any layout


@st.composite
def problems(draw):
    """Any float type, 0 to 4 dimensions, any block shape."""
    dtype = draw(st.sampled_from(["float16", "float32", "float64"]))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    block = tuple(draw(st.one_of(st.none(), st.integers(1, 6))) for _ in shape)
    x = draw(hnp.arrays(dtype, shape, elements={"allow_nan": False, "allow_infinity": False}))
    call = draw(calls)
    granularity = PerBlock(tuple(-1 if size is None else size for size in block))
    return Problem(x, Call(call.dtype, call.scheme, granularity)), block


def test_any_problem_is_exact():
    @holds_for("numpy", problems())
    def law(problem_and_block):
        (x, call, *_), block = problem_and_block
        e = exact.quantize(x, call.dtype, call.scheme, block)
        assert differing(call(x), Bits(e.codes, e.scale, e.zero_point, e.values)) == 0


def test_layout_does_not_matter():
    @holds_for("numpy", problems(), st.randoms(use_true_random=False))
    def law(problem_and_block, random):
        (x, call, *_), _ = problem_and_block
        axes = random.sample(range(x.ndim), x.ndim)
        steps = [random.choice([-2, -1, 1, 3]) for _ in axes]
        room = np.zeros(
            [x.shape[a] * abs(s) for a, s in zip(axes, steps, strict=True)], dtype=x.dtype.newbyteorder(">")
        )
        view = room[(*(slice(None, None, s) for s in steps), ...)].transpose(np.argsort(axes))
        view[...] = x
        assert math.prod(view.shape) == x.size
        assert differing(call(view), call(x)) == 0
