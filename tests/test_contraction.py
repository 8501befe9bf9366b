"""``einsum`` and ``dot_general`` of a quantized array: held against products with its values and its matrix."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from optional import jax, jnp, torch

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, einsum, linear, quantize
from aqt_lite.ops import contraction, dot_general
from aqt_lite.testing import assert_same_bits

RNG = np.random.default_rng(0)


def data(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def of_values(subscripts, x, w):
    """The product in float64 with the values of whichever side is quantized."""
    sides = [np.asarray(a.dequantize() if isinstance(a, aqt_lite.QArray) else a, np.float64) for a in (x, w)]
    return np.einsum(subscripts, *sides)


def assert_close(y, expected):
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


PRODUCTS = {
    "a matrix": ("...i,io->...o", (2, 3, 64), (64, 5), [PerChannel(1), PerGroup(32, 0), PerTensor(), PerGroup(4, 1)]),
    "its transpose": ("bi,oi->bo", (3, 64), (5, 64), [PerChannel(0), PerGroup(16), PerTensor()]),
    "no rows": ("i,io->o", (64,), (64, 5), [PerChannel(1)]),
    "heads": ("...i,ihd->...hd", (2, 3, 64), (64, 4, 6), [PerBlock((-1, 1, 1)), PerGroup(32, 0), PerTensor()]),
    "heads share a scale": ("bi,ihd->bhd", (3, 64), (64, 4, 6), [PerBlock((-1, -1, 1)), PerBlock((-1, 1, 4))]),
    "out of heads": (
        "bthd,hdo->bto",
        (2, 3, 4, 32),
        (4, 32, 5),
        [PerChannel(2), PerGroup(16, 1), PerBlock((2, -1, 1)), PerTensor(), PerChannel(1), PerBlock((3, -1, 1))],
    ),
    "axes in another order": ("hbdt,dho->bto", (4, 2, 16, 3), (16, 4, 5), [PerChannel(2), PerGroup(8, 0)]),
    "batched": ("bti,bio->bto", (3, 2, 32), (3, 32, 5), [PerBlock((1, -1, 1)), PerChannel(2), PerGroup(16, 1)]),
    "batched in groups": ("bti,bio->bto", (4, 2, 8), (4, 8, 5), [PerGroup(2, 0)]),
    "experts": ("...i,eio->...eo", (3, 32), (4, 32, 5), [PerBlock((1, -1, 1)), PerGroup(16, 1)]),
    "batched, last": ("it,iob->bto", (32, 2), (32, 5, 3), [PerBlock((-1, 1, 1)), PerTensor()]),
    "two batch axes": ("abti,abio->tabo", (2, 3, 2, 32), (2, 3, 32, 5), [PerBlock((1, 1, -1, 1)), PerTensor()]),
    "two batch axes of heads": ("abtgi,abgio->abto", (2, 3, 2, 2, 8), (2, 3, 2, 8, 5), [PerBlock((1, 1, -1, -1, 1))]),
    "outer": ("b,io->bio", (3,), (4, 5), [PerTensor(), PerChannel(0)]),
    "all of it": ("io,io->", (8, 5), (8, 5), [PerTensor(), PerChannel(1)]),
    "a sum of x alone": ("bzi,io->bo", (3, 2, 16), (16, 5), [PerChannel(1)]),
    "dots on both sides": ("...ti,...io->...to", (3, 2, 16), (3, 16, 5), [PerBlock((1, -1, 1))]),
    "dots of the weight alone": ("ti,...io->...to", (2, 16), (3, 16, 5), [PerBlock((1, -1, 1)), PerTensor()]),
    "no axes": (",io->io", (), (4, 5), [PerTensor()]),
    "implicit": ("bi,io", (3, 16), (16, 5), [PerChannel(1)]),
}


@pytest.mark.exhaustive_where(backend="jax")  # compiled below
@pytest.mark.parametrize("name", PRODUCTS)
def test_einsum_is_the_product_with_the_values(backend, name):
    subscripts, of_x, of_w, granularities = PRODUCTS[name]
    x, w = data(*of_x), data(*of_w, seed=1)
    for granularity in granularities if backend.name == "numpy" else granularities[:2]:
        q = quantize(w, granularity=granularity)
        y = einsum(subscripts, backend.asarray(x), q.to_backend(backend.name))
        expected = of_values(subscripts, x, q)
        assert tuple(y.shape) == expected.shape
        assert_close(backend.to_numpy(y), expected)


KINDS = {
    "int8": {},
    "uint8 affine": {"dtype": "uint8", "scheme": "affine"},
    "int8 with offsets": {"dtype": "int8", "scheme": "affine", "offset": "data"},
    "int4": {"dtype": "int4"},
    "nf4, float16 scales": {"dtype": "nf4", "scale_dtype": "float16"},
    "nvfp4": {"dtype": "nvfp4"},
    "float64": {},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("subscripts", "of_x", "of_w", "granularity"),
    [
        ("bi,ihd->bhd", (3, 32), (32, 4, 6), PerGroup(16, 0)),
        ("bhd,hdo->bo", (3, 4, 16), (4, 16, 6), PerGroup(16, 1)),
        ("bi,oi->bo", (3, 32), (6, 32), PerGroup(16)),
        ("ebi,eio->ebo", (3, 2, 32), (3, 32, 6), PerGroup(16, 1)),
        ("bhd,hdo->bo", (3, 4, 16), (4, 16, 6), PerBlock((-1, 1, 1))),  # torn
    ],
)
def test_every_kind_of_format(kind, subscripts, of_x, of_w, granularity):
    kind_of_float = np.float64 if kind == "float64" else np.float32
    x, w = data(*of_x).astype(kind_of_float), data(*of_w, seed=1).astype(kind_of_float)
    q = quantize(w, **KINDS[kind], granularity=granularity)
    for each in (q, q.unpacked(), q.for_dense()):
        y = einsum(subscripts, x, each)
        assert y.dtype == kind_of_float
        assert_close(y, of_values(subscripts, x, q))


@pytest.mark.parametrize(
    ("subscripts", "of_x", "of_w", "how"),
    [
        ("cb,db->bcd", (3, 4), (5, 4), {"dtype": "int8"}),
        ("bc,cb->b", (4, 3), (3, 4), {"dtype": "uint8", "scheme": "affine"}),
        ("ae,a->ae", (3, 4), (3,), {"dtype": "int4"}),
        ("ae,a->ae", (3, 4), (3,), {"dtype": "int8", "scale_dtype": "float16", "granularity": PerChannel(0)}),
        ("ab,ba->ba", (3, 4), (4, 3), {"dtype": "nf4"}),
        ("fe,fa->fea", (2, 3), (2, 4), {"dtype": "int4", "scale_dtype": "int8", "granularity": PerChannel(0)}),
        ("dfb,df->db", (3, 4, 2), (3, 4), {"dtype": "nvfp4"}),
    ],
)
def test_batch_axes_that_storage_does_not_have_in_front(backend, subscripts, of_x, of_w, how):
    x, q = data(*of_x), quantize(data(*of_w, seed=1), **how)
    y = einsum(subscripts, backend.asarray(x), q.to_backend(backend.name))
    assert_close(backend.to_numpy(y), of_values(subscripts, x, q))


@pytest.mark.exhaustive_where(backend="jax", subscripts="bk,hnk->bhn")
@pytest.mark.parametrize(
    "how", [{"dtype": "nvfp4"}, {"dtype": "q4_0", "dialect": "gguf"}], ids=lambda how: how["dtype"]
)
@pytest.mark.parametrize("subscripts", ["bk,hnk->bhn", "hk,hnk->hn"])
def test_kept_scales_may_be_zero_or_negative(backend, how, subscripts):
    """Of a block of zeros, or as ggml has them; they are no plain scales that training has moved."""
    w = data(3, 6, 64, seed=1)
    w[:, :, :32], w[1] = 0, 0
    q, x = quantize(w, **how), data(*(2, 64) if subscripts[0] == "b" else (3, 64))
    assert (q.scales <= 0).any()
    moved, there, expected = q.to_backend(backend.name), backend.asarray(x), of_values(subscripts, x, q)
    if backend.name == "jax":
        assert_close(jax.jit(lambda x, q: einsum(subscripts, x, q))(there, moved), expected)
        return
    for mode in ("fast", "reproducible"):
        assert_close(backend.to_numpy(einsum(subscripts, there, moved, mode=mode)), expected)


def test_the_quantized_side_may_come_first(backend):
    x, q = data(3, 16), quantize(data(16, 2, 5, seed=1), granularity=PerBlock((-1, 1, 1))).to_backend(backend.name)
    y = einsum("ihd,bi->hbd", q, backend.asarray(x))
    assert_close(backend.to_numpy(y), of_values("ihd,bi->hbd", q.to_backend("numpy"), x))


@pytest.mark.exhaustive_where(backend="jax")  # tests/test_same_model.py has such products, compiled
def test_products_with_merged_axes_are_those_of_the_matrix(backend):
    """In bits: codes of a kernel in heads are those of the flat one, and so are its products."""
    w, x = data(64, 4, 6, seed=1), backend.asarray(data(2, 3, 64))
    for granularity, flat in ((PerBlock((-1, 1, 1)), PerChannel(1)), (PerGroup(32, 0), PerGroup(32, 0))):
        q, matrix = quantize(w, granularity=granularity), quantize(w.reshape(64, 24), granularity=flat)
        assert_same_bits(q.qvalue.reshape(64, 24), matrix.qvalue)
        y = einsum("...i,ihd->...hd", x, q.to_backend(backend.name), mode="reproducible")
        expected = aqt_lite.dense(x, matrix.to_backend(backend.name), mode="reproducible")
        assert_same_bits(backend.to_numpy(y).reshape(2, 3, 24), backend.to_numpy(expected))
    out = data(4, 16, 6, seed=2)
    heads = backend.asarray(data(2, 3, 4, 16))
    for granularity, flat in (
        (PerChannel(2), PerChannel(1)),
        (PerGroup(8, 1), PerGroup(8, 0)),
        (PerBlock((2, -1, 1)), PerGroup(32, 0)),
    ):
        q, matrix = quantize(out, granularity=granularity), quantize(out.reshape(64, 6), granularity=flat)
        assert_same_bits(q.qvalue.reshape(64, 6), matrix.qvalue)
        y = einsum("bthd,hdo->bto", heads, q.to_backend(backend.name), mode="reproducible")
        flat_x = backend.xp.reshape(heads, (2, 3, 64))
        expected = aqt_lite.dense(flat_x, matrix.to_backend(backend.name), mode="reproducible")
        assert_same_bits(backend.to_numpy(y), backend.to_numpy(expected))


def test_reproducible_products_have_the_same_bits_on_every_backend(backend):
    x, w = data(3, 2, 32), data(3, 32, 6, seed=1)
    q = quantize(w, "int4", granularity=PerGroup(16, 1))
    expected = einsum("ebi,eio->ebo", x, q, mode="reproducible")
    y = einsum("ebi,eio->ebo", backend.asarray(x), q.to_backend(backend.name), mode="reproducible")
    assert_same_bits(backend.to_numpy(y), expected)


def test_activations_of_8_bits(backend):
    """Each row of what is summed over has its scale, whichever axes it lies along."""
    x, w = data(2, 4, 16), data(4, 16, 6, seed=1)
    q = quantize(w, granularity=PerChannel(2))
    y = einsum("bhd,hdo->bo", backend.asarray(x), q.to_backend(backend.name), activations="int8")
    rows = quantize(x.reshape(2, 64), granularity=PerGroup(64))
    expected = aqt_lite.dense(rows, quantize(w.reshape(64, 6), granularity=PerChannel(1)))
    assert_same_bits(backend.to_numpy(y), expected)


def test_dot_general_has_the_axes_of_lax():
    x, w = data(3, 2, 32, 4), data(32, 5, 3, 4, seed=1)
    dims = (((3, 2), (3, 0)), ((0,), (2,)))
    for granularity in (PerTensor(), PerBlock((-1, 1, 1, -1)), PerGroup(2, 3)):
        q = quantize(w, granularity=granularity)
        expected = jax.lax.dot_general(jnp.asarray(x), jnp.asarray(q.dequantize()), dims, precision="highest")
        for backend in ("numpy", "jax"):
            y = dot_general(x if backend == "numpy" else jnp.asarray(x), q.to_backend(backend), dims)
            assert y.shape == expected.shape == (3, 2, 5)
            assert_close(y, np.asarray(expected, np.float64))


def same_parts(a, b):
    """Whether two labellings part the same elements from each other."""
    both = len(np.unique(a * 1000 + b))
    return both == len(np.unique(a)) == len(np.unique(b))


def test_what_merges():
    """Every way in which two axes can be cut: merged blocks say which elements share a scale, and the rest is torn."""
    n = (4, 6)
    blocks = [None, 1, 2, 3, 4, 6]
    for block in itertools.product(blocks, blocks):
        q = quantize(data(*n, 2), granularity=PerBlock((*(-1 if k is None else k for k in block), 1)))
        own = [np.arange(m) // (k or m) for m, k in zip(n, block, strict=True)]
        shared = (own[0][:, None] * 100 + own[1][None]).ravel()
        merged = contraction._merged_block(q, (0, 1))
        if merged == contraction._TORN:
            assert not any(same_parts(shared, np.arange(24) // k) for k in range(1, 25))
        else:
            assert same_parts(shared, np.arange(24) // (merged or 24))


@pytest.mark.parametrize(
    ("shape", "runs", "how"),
    [
        ((64, 4, 16), (1, 2), {"dtype": "int4", "granularity": PerGroup(32, 0)}),
        ((4, 64, 48), (2, 1), {"dtype": "int4", "granularity": PerGroup(32, 1), "scale_dtype": "float16"}),
        ((4, 64, 48), (2, 1), {"granularity": PerBlock((-1, -1, 1))}),
        ((3, 4, 64, 48), (3, 1), {"dtype": "nvfp4", "granularity": PerGroup(16, 2)}),
        ((48, 4, 64), None, {"dtype": "nf4", "granularity": PerGroup(32)}),
    ],
)
def test_codes_that_are_stored_run_after_run_are_read_as_they_lie(shape, runs, how):
    """Neither unpacked nor copied; so are scales of few bits."""
    q = quantize(data(*shape), **how)
    q = q if runs is None else q.for_dense(*runs)
    inputs, outputs = runs or (2, 1)
    axes = tuple(range(inputs)), tuple(range(inputs, inputs + outputs))
    matrix, contract = contraction._as_matrix(q, *(((1, 2), (0,)) if runs is None else axes))
    assert np.shares_memory(matrix.storage, q.storage)
    assert (matrix.packed_length is None) == (q.packed_length is None)
    assert contract == (1 if runs is None else 0)
    assert matrix.transposed == (runs is not None)
    assert_same_bits(matrix.dequantize(), q.dequantize().reshape(matrix.shape))
    assert type(matrix.scale) is type(q.scale) or q.dtype == "nvfp4"


def test_rows_that_fill_up_their_last_byte_are_no_rows_of_the_matrix():
    q = quantize(data(4, 5, 6), "int4", granularity=PerBlock((-1, -1, 1))).for_dense(2, 1)
    matrix, _ = contraction._as_matrix(q, (0, 1), (2,))
    assert matrix.packed_length is None
    assert_same_bits(matrix.dequantize(), q.dequantize().reshape(20, 6))


def test_a_weight_that_would_be_torn_has_no_reproducible_product():
    q = quantize(data(4, 16, 6), granularity=PerBlock((-1, 1, 1)))
    with pytest.raises(ValueError, match="would tear apart its blocks"):
        einsum("bhd,hdo->bo", data(3, 4, 16), q, mode="reproducible")


@pytest.mark.parametrize(
    ("subscripts", "message"),
    [
        ("bi,io,oz->bz", "3 operands"),
        ("bi->b", "1 operands"),
        ("bii,io->bo", "'bii' is not made of letters"),
        ("b1,io->bo", "'b1' is not made of letters"),
        ("bi,ioz->bo", "'ioz' is said of an operand of 2 dimensions"),
        ("bi,io->bz", "'z' is in the result"),
        ("bi,io->b", "'o' is of the QArray alone"),
        ("oi,io->o", "'o' has length 3 and 5"),
        ("i,io->o", "'i' is said of an operand of 2 dimensions"),
    ],
)
def test_subscripts_that_are_no_product(subscripts, message):
    with pytest.raises(ValueError, match=message):
        einsum(subscripts, data(3, 16), quantize(data(16, 5)))


def test_operands_that_are_no_pair():
    x, q = data(3, 16), quantize(data(16, 5))
    with pytest.raises(TypeError, match="ndarray and a ndarray: give one array and one QArray"):
        einsum("bi,io->bo", x, x)
    with pytest.raises(TypeError, match="QArray and a QArray"):
        einsum("bi,io->bo", q, q)
    with pytest.raises(TypeError, match="subscripts is a list"):
        einsum(["bi"], x, q)
    with pytest.raises(TypeError, match="not a QArray"):
        dot_general(x, x, (((1,), (0,)), ((), ())))
    with pytest.raises(ValueError, match="differ in length"):
        dot_general(x, q, (((1,), (1,)), ((), ())))
    with pytest.raises(ValueError, match="are no axes of w"):
        dot_general(x, q, (((1,), (2,)), ((), ())))
    with pytest.raises(ValueError, match="contracting and batch at once"):
        dot_general(data(16, 16), q, (((1,), (0,)), ((1,), (0,))))
    with pytest.raises(ValueError, match="mode='integer' is not known"):
        einsum("bi,io->bo", x, q, mode="integer")
    with pytest.raises(TypeError, match="x has dtype int64"):
        einsum("bi,io->bo", np.ones((3, 16), np.int64), q)
    assert einsum("bi,io->bo", [[1.0] * 16], q).shape == (1, 5)


def test_nothing_to_sum_and_nothing_to_do(backend):
    q = quantize(np.zeros((0, 4, 5), "float32"), granularity=PerBlock((-1, 1, 1))).to_backend(backend.name)
    y = einsum("bi,ihd->bhd", backend.asarray(np.zeros((3, 0), "float32")), q)
    assert_same_bits(backend.to_numpy(y), np.zeros((3, 4, 5), "float32"))
    q = quantize(np.zeros((0, 4, 5), "float32"), granularity=PerBlock((1, -1, 1))).to_backend(backend.name)
    y = einsum("ebi,eio->ebo", backend.asarray(np.zeros((0, 3, 4), "float32")), q)
    assert tuple(y.shape) == (0, 3, 5)


def test_nan_reaches_its_row_alone():
    x = data(3, 16)
    x[1, 4] = np.nan
    y = einsum("bi,ihd->bhd", x, quantize(data(16, 2, 5), granularity=PerBlock((-1, 1, 1))))
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


# ---- frameworks


@pytest.mark.exhaustive_unless(name=["heads", "batched"])
@pytest.mark.parametrize("name", ["a matrix", "heads", "out of heads", "batched", "two batch axes of heads"])
def test_under_jit_vmap_and_with_derivatives(name):
    subscripts, of_x, of_w, granularities = PRODUCTS[name]
    x, w = jnp.asarray(data(*of_x)), data(*of_w, seed=1)
    q = quantize(jnp.asarray(w), granularity=granularities[0])

    def squares(product, w):
        return lambda x: (product(subscripts, x, w) ** 2).sum()

    y = einsum(subscripts, x, q)
    assert_close(jax.jit(einsum, static_argnums=0)(subscripts, x, q), np.asarray(y, np.float64))
    mapped = jax.jit(jax.vmap(lambda x: einsum(subscripts, x, q)))(jnp.stack([x, 2 * x]))
    assert_close(mapped, np.stack([y, 2 * y]))
    dx = jax.jit(jax.grad(squares(einsum, q)))(x)
    assert_close(dx, np.asarray(jax.grad(squares(jnp.einsum, q.dequantize()))(x), np.float64))


def test_layers_one_after_the_other_in_a_scan():
    kernels = quantize(jnp.asarray(data(5, 8, 2, 4)), granularity=PerBlock((1, -1, 1, 1)))

    def layer(x, kernel):
        return jnp.tanh(einsum("bi,ihd->bhd", x, kernel).reshape(3, 8)), None

    x = jnp.asarray(data(3, 8, seed=1))
    y = jax.lax.scan(layer, x, kernels)[0]
    for i in range(5):
        x = layer(x, kernels[i])[0]
    assert_close(y, np.asarray(x, np.float64))


def test_activations_pass_derivatives_straight_through():
    x, q = jnp.asarray(data(3, 16)), quantize(jnp.asarray(data(16, 5)), granularity=PerChannel(1))
    dx = jax.grad(lambda x: einsum("bi,io->bo", x, q, activations="int8").sum())(x)
    assert_close(dx, np.broadcast_to(np.asarray(q.dequantize(), np.float64).sum(1), (3, 16)))


@pytest.mark.exhaustive  # compiles for a quarter of a minute
def test_torch_has_derivatives_and_compiles():
    q = quantize(torch.from_numpy(data(4, 16, 6)), granularity=PerChannel(2))
    x = torch.from_numpy(data(2, 3, 4, 16)).requires_grad_()
    y = einsum("bthd,hdo->bto", x, q)
    y.sum().backward()
    expected = torch.einsum("hdo->hd", q.dequantize()).expand(2, 3, 4, 16)
    assert_close(x.grad, expected.double().numpy())
    compiled = torch.compile(lambda x: einsum("bthd,hdo->bto", x, q), fullgraph=True, backend="aot_eager")
    assert_close(compiled(x.detach()), y.detach().double().numpy())


def test_the_result_has_the_dtype_of_x():
    q = quantize(jnp.asarray(data(16, 2, 5)), granularity=PerBlock((-1, 1, 1)))
    for dtype in ("float16", "bfloat16", "float32"):
        y = einsum("bi,ihd->bhd", jnp.ones((3, 16), dtype), q)
        assert y.dtype == dtype
        torn = einsum("bhi,ihd->bd", jnp.ones((3, 2, 16), dtype), quantize(q.dequantize(), granularity=PerChannel(1)))
        assert torn.dtype == dtype


def test_a_flat_product_keeps_its_fast_form():
    """No axes to merge: the codes are read as ``for_dense`` stores them, and as ``linear`` wants them."""
    w = data(16, 5)
    q = quantize(w, "int4", granularity=PerGroup(8, 0)).for_dense()
    assert contraction._as_matrix(q, (0,), (1,)) == (q, 0)
    x = data(3, 16)
    assert_same_bits(einsum("bi,io->bo", x, q), aqt_lite.dense(x, q))
    assert_same_bits(einsum("bi,oi->bo", x, q.T), linear(x, q.T))
