"""BitRound as a format: the numbers of ``bitround`` in codes, packed, whatever they go through."""

from functools import partial
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from optional import jax, jnp, needs, torch

import aqt_lite
from aqt_lite import QArray, bitround, quantize
from aqt_lite._registry import get_backend
from aqt_lite.elements import BitRound
from aqt_lite.formats import BITROUND, Format
from aqt_lite.testing import _check_formats, assert_same_bits

RNG = np.random.default_rng(14)
X = RNG.standard_normal((4, 37)).astype("float32")
X[1] *= np.float32(1e30)
X[2, ::3] = 0

saturating = partial(quantize, on_clip="saturate")


def upper_halves():
    """Every finite upper half of a float32, subnormal ones among them, before, at and after a tie."""
    upper = np.arange(1 << 16, dtype=np.uint32) << 16
    every = (upper[:, None] | np.asarray([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)).view("float32")
    return every[np.isfinite(every).all(axis=1)]


def kinds(x):
    yield x
    if jax is not None:
        yield jnp.asarray(x)
    if torch is not None:
        yield torch.from_numpy(x.copy())


@pytest.mark.exhaustive_unless(keepbits=[0, 7, 12])
@pytest.mark.parametrize("keepbits", [0, 1, 6, 7, 8, 12, 15, 22, 23])
def test_the_numbers_are_those_of_bitround(keepbits):
    x = upper_halves()[:: 1 if keepbits == 7 else 64]
    wanted, name = bitround(x, keepbits), f"bitround{keepbits}"
    q = saturating(x, name)
    assert q.bits == 9 + keepbits
    assert q.nbytes == x.shape[0] * -(-x.shape[1] * q.bits // 8)
    for a in kinds(x):
        found = saturating(a, name)
        assert_same_bits(found, q)
        assert_same_bits(found.dequantize(), wanted)
        assert_same_bits(aqt_lite.fake_quantize(a, name), wanted)


@pytest.mark.exhaustive_unless(keepbits=[3])
@needs("jax")
@pytest.mark.parametrize("keepbits", [3, 12])
def test_jitted_and_mapped(keepbits):
    x, name = upper_halves()[::64], f"bitround{keepbits}"
    wanted = saturating(x, name)
    q = jax.jit(lambda v: quantize(v, name))(x)
    assert_same_bits(q, wanted)
    assert_same_bits(jax.jit(lambda w: w.dequantize())(q), bitround(x, keepbits))
    assert_same_bits(jax.vmap(lambda v: quantize(v, name).dequantize())(jnp.asarray(x)), bitround(x, keepbits))
    bad = jax.jit(lambda v: quantize(v, name).dequantize())(jnp.asarray([1.0, np.nan, -np.inf, 2.0]))
    assert np.isnan(np.asarray(bad)).tolist() == [False, True, True, False]
    slopes = jax.grad(lambda v: aqt_lite.fake_quantize(v, name).sum())(jnp.asarray([1.0, -3.402e38]))
    assert slopes.tolist() == [1.0, 1.0 if keepbits == 12 else 0.0]


@pytest.mark.exhaustive  # seconds to compile
@needs("torch")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("keepbits", [3, 12])
def test_compiled_by_torch(keepbits):
    x, name = upper_halves()[::64], f"bitround{keepbits}"
    torch._dynamo.reset()
    made = torch.compile(lambda v: quantize(v, name).dequantize(), fullgraph=True)
    assert_same_bits(made(torch.from_numpy(x.copy())), bitround(x, keepbits))


@pytest.mark.parametrize("keepbits", [0, 5, 7])
def test_bfloat16_values(keepbits):
    x = upper_halves()[::8, :1].astype(ml_dtypes.bfloat16)
    wanted = bitround(x, keepbits)
    others = [jnp.asarray(x)] if jax is not None else []
    if torch is not None:
        others.append(torch.from_numpy(x.view("int16").copy()).view(torch.bfloat16))
    for a in (x, *others):
        assert_same_bits(saturating(a, f"bitround{keepbits}").dequantize(), wanted)


def test_keepbits_or_a_bound_choose_the_format():
    assert_same_bits(quantize(X, "bitround", keepbits=np.int64(5)), quantize(X, "bitround5"))
    for how in ({"max_rel_err": 1e-3}, {"max_abs_err": 1e24}, {"max_rel_err": 0}):
        q = quantize(X, "bitround", **how)
        assert q.dtype == f"bitround{aqt_lite.keepbits_for(X, **how)}"
        assert_same_bits(quantize(X, "bitround", out=np.empty_like(q.storage), **how), q)
    assert quantize(np.float32([1.5, np.nan]), "bitround", max_rel_err=0.1, missing="nan").dtype == "bitround1_nan"
    with pytest.raises(
        ValueError, match=r"bitround3 cannot keep .*; dtype='bitround9' does, and dtype='bitround' finds"
    ):
        quantize(X, "bitround3", max_rel_err=1e-3)


@pytest.mark.parametrize("name", ["bitround0", "bitround3", "bitround7", "bitround12", "bitround23"])
def test_missing_values_and_files(name, tmp_path):
    x = X.copy()
    x[0, 3] = x[3, 36] = np.nan
    gaps = np.isnan(x)
    q = quantize(x, name, missing="nan")
    assert q.dtype == f"{name}_nan"
    assert (q.mask == gaps).all()
    assert_same_bits(q.dequantize(fill_value=-9.0)[gaps], np.full(2, -9, "float32"))
    assert_same_bits(np.where(gaps, 0, q.dequantize()), bitround(np.where(gaps, 0, x), q._element.keepbits))
    tree = {"gaps": q, "whole": quantize(X, name)}
    for ending in ("safetensors", "npz"):
        aqt_lite.save(tmp_path / f"f.{ending}", tree)
        again = aqt_lite.load(tmp_path / f"f.{ending}")
        for key in tree:
            assert_same_bits(again[key], tree[key])


@pytest.mark.parametrize("name", ["bitround3", "bitround7", "bitround12"])
def test_an_array_as_others(name):
    q = quantize(X, name)
    values = q.dequantize()
    packed = None if q.packed_length is None else 37
    assert_same_bits(QArray.from_codes(q.storage, None, dtype=name, packed_length=packed), q)
    assert_same_bits(QArray.from_codes(q.qvalue, None, dtype=name), q)
    assert_same_bits(q.unpacked().packed(), q)
    for index in ((slice(1, 3), slice(3, 30, 2)), 0, (slice(None), 5), (slice(None, None, -1), slice(None, None, -3))):
        assert_same_bits(q[index].dequantize(), values[index])
    assert_same_bits(q.T.dequantize(), values.T.copy())
    assert_same_bits(aqt_lite.concatenate([q, q], axis=1).dequantize(), np.concatenate([values, values], axis=1))
    assert_same_bits(aqt_lite.stack([q, q]).dequantize(), np.stack([values, values]))
    out = np.empty_like(X)
    assert_same_bits(q.dequantize(out=out), values)
    assert str(aqt_lite.compare(q, q)).startswith("Equal")
    assert "bitround" in str(aqt_lite.compare(q, quantize(X, "bitround5"), x=X))
    assert aqt_lite.error_report(X, q).max_abs_error == np.abs(X.astype("f8") - values).max()


def test_products_are_those_of_its_values(backend):
    x = backend.asarray(RNG.standard_normal((3, 4)).astype("float32"))
    for q in (quantize(X, "bitround3"), quantize(X, "bitround12")):
        w = q.to_backend(backend.name)
        wanted = backend.to_numpy(x) @ q.dequantize()
        for y in (aqt_lite.dense(x, w), aqt_lite.linear(x, w.T), aqt_lite.einsum("ij,jk->ik", x, w.for_dense())):
            np.testing.assert_allclose(backend.to_numpy(y), wanted, rtol=1e-4, atol=1e24)
    with pytest.raises(ValueError, match="codes: sums of products with more than 8 bits"):
        aqt_lite.dense(x, w, mode="reproducible")


def test_models_take_it_without_a_granularity():
    params = {"kernel": X[:, :32]}
    rules = [("kernel", {"dtype": "bitround5", "layout": "dense"})]
    q = aqt_lite.quantize_tree(params, rules)["kernel"]
    assert_same_bits(q.dequantize(), bitround(params["kernel"], 5))
    assert aqt_lite.plan_tree(params, rules).nbytes == q.nbytes
    with pytest.raises(ValueError, match="kernel: granularity is given, but"):
        aqt_lite.plan_tree(params, [("kernel", rules[0][1] | {"granularity": aqt_lite.PerGroup(32)})])


@pytest.mark.exhaustive  # importing Dask takes seconds
def test_dask_stays_lazy():
    dask = pytest.importorskip("dask.array", reason="Dask is optional")
    lazy = quantize(dask.from_array(X, chunks=(2, 11)), "bitround3")
    assert_same_bits(lazy.to_backend("numpy"), quantize(X, "bitround3"))
    assert_same_bits(lazy.dequantize().compute(), bitround(X, 3))


def test_nothing_is_silent():
    largest = np.float32([1.0, 3.4e38])
    with pytest.warns(aqt_lite.ClippingWarning, match=r"x has 1 values of 2 beyond .* bitround3 has, .*more bits"):
        assert_same_bits(quantize(largest, "bitround3").dequantize(), bitround(largest, 3))
    with pytest.raises(ValueError, match=r"x has 1 values of 2 beyond .*on_clip='saturate'"):
        quantize(largest, "bitround3", on_clip="raise")
    odd = np.float32([[1, np.nan], [np.inf, -np.inf]])
    for a in kinds(odd):
        with pytest.raises(ValueError, match="x has 3 non-finite values of 4, the first at index \\(0, 1\\)"):
            quantize(a, "bitround7")
    most = (2 - 2.0**-7) * 2.0**127
    assert saturating(odd, "bitround7", nonfinite="ignore").dequantize().tolist() == [[1, 0], [most, -most]]
    with pytest.raises(ValueError, match="infinite, or NaN and not said to be missing"):
        quantize(odd, "bitround7", missing="nan")


@pytest.mark.parametrize(
    ("how", "error", "match"),
    [
        (
            {"dtype": "bitround"},
            ValueError,
            "family of formats: name one, bitround0 to bitround23, or give .* keepbits",
        ),
        ({"dtype": "bitround", "keepbits": 24}, ValueError, "keepbits=24: float32 has 23"),
        ({"dtype": "bitround", "keepbits": 7.0}, TypeError, "keepbits is a float"),
        ({"dtype": "bitround7", "keepbits": 7}, ValueError, "goes with dtype='bitround'"),
        ({"scale": 1.0}, ValueError, "scale is given, but numbers of bitround7 are floats without a scale"),
        ({"scale_dtype": "float16"}, ValueError, "scale_dtype is given, but"),
        ({"offset": "data"}, ValueError, "offset is given, but"),
        ({"zero_point": 3}, ValueError, "zero_point is given, but"),
        ({"granularity": aqt_lite.PerChannel(0)}, ValueError, "granularity is given, but"),
        ({"dialect": "torch"}, ValueError, "dialect is given, but"),
        ({"scheme": "affine"}, ValueError, "bitround7 has no zero points"),
        ({"x": np.ones(3, "float16")}, ValueError, "bitround7 has the exponents of float32, .* aqt_lite.bitround"),
        ({"x": X.astype("float64"), "dtype": "bitround", "max_rel_err": 0.1}, ValueError, "exponents of float32"),
        ({"x": X.astype(ml_dtypes.bfloat16), "dtype": "bitround8"}, ValueError, "bfloat16 has 7"),
    ],
)
def test_what_is_refused(how, error, match):
    with pytest.raises(error, match=match):
        quantize(**{"x": X, "dtype": "bitround7"} | how)


@pytest.mark.parametrize(
    ("codes", "how", "match"),
    [
        (np.int16([0, 0x7F80]), {"dtype": "bitround7"}, "unusable codes, the first at .*no finite number"),
        (np.int32([0, -1]), {"dtype": "bitround12"}, "unusable codes, the first at"),
        (np.int16([300]), {"dtype": "bitround0"}, "codes of bitround0 are -256 to 255"),
        (np.int16([3]), {"dtype": "bitround0", "scale": 1.0}, "scale is given"),
        (np.int16([3]), {"dtype": "bitround0", "float_dtype": "float64"}, "exponents of float32"),
    ],
)
def test_codes_that_are_refused(codes, how, match):
    with pytest.raises(ValueError, match=match):
        QArray.from_codes(codes, **{"scale": None} | how)


def test_a_format_of_your_own():
    mine = aqt_lite.register_format(BitRound("mine_of_bitround", 4))
    assert_same_bits(quantize(X, "mine_of_bitround").dequantize(), bitround(X, 4))
    checked = [q.dtype for q, _ in _check_formats(get_backend("numpy"), ()) if isinstance(q, QArray)]
    assert "mine_of_bitround" in checked  # by the conformance suite, as any that is registered
    assert aqt_lite.formats.rebuilt(aqt_lite.formats.described(mine)) == mine
    with pytest.raises(ValueError, match="range of floats: give scaled=False"):
        Format("scaled", mine.element)
    for bad in (24, -1, 2.0, True):
        with pytest.raises(ValueError, match="give 0 to 23"):
            BitRound("bad", bad)


def test_more_bits_are_closer():
    errors = [aqt_lite.error_report(X, quantize(X, name)).max_abs_error for name in list(BITROUND)[::4]]
    assert all(after < before for before, after in pairwise(errors))
