"""``aqt_lite.jax``: JAX's functions of arrays that may be quantized, held against JAX's own with the values."""

from __future__ import annotations

import numpy as np
import pytest
from optional import jax, jnp

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, quantize
from aqt_lite.testing import assert_same_bits


def data(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def assert_close(y, expected):
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    expected = np.asarray(expected, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


# ---- products


@pytest.mark.parametrize("quantized", ["lhs", "rhs", "neither"])
def test_dot_general_of_either_side(quantized):
    lhs, rhs = data(2, 3, 16, 4), data(16, 2, 5, 4, seed=1)
    dims = (((2, 3), (0, 3)), ((0,), (1,)))
    expected = jax.lax.dot_general(lhs, rhs, dims, preferred_element_type=jnp.float32)
    if quantized == "lhs":
        lhs = quantize(lhs, granularity=PerBlock((1, 1, -1, -1)))
        expected = jax.lax.dot_general(lhs.dequantize(), rhs, dims)
    elif quantized == "rhs":
        rhs = quantize(rhs, granularity=PerBlock((-1, 1, 1, -1)))
        expected = jax.lax.dot_general(lhs, rhs.dequantize(), dims)
    product = jax.jit(lambda lhs, rhs: aqt_lite.jax.dot_general(lhs, rhs, dims, precision="highest"))
    assert_close(product(lhs, rhs), expected)


def test_einsum_and_its_options():
    x, w = data(3, 16), quantize(data(16, 2, 5), granularity=PerBlock((-1, 1, 1)))
    expected = jnp.einsum("bi,ihd->bhd", x, w.dequantize())
    assert_close(aqt_lite.jax.einsum("bi,ihd->bhd", x, w, precision="highest"), expected)
    assert aqt_lite.jax.einsum("bi,ihd->bhd", x, w, preferred_element_type="bfloat16").dtype == "bfloat16"
    assert_same_bits(aqt_lite.jax.einsum("bi,ij,jk->bk", x, x.T, x), jnp.einsum("bi,ij,jk->bk", x, x.T, x))
    with pytest.raises(TypeError, match="takes two operands, not 3"):
        aqt_lite.jax.einsum("bi,ihd,x->bhd", x, w, x[0])
    with pytest.raises(TypeError, match="has no argument 'optimize'"):
        aqt_lite.jax.einsum("bi,ihd->bhd", x, w, optimize=True)
    with pytest.raises(ValueError, match="has no out_sharding"):
        aqt_lite.jax.einsum("bi,ihd->bhd", x, w, out_sharding=jax.sharding.PartitionSpec("x"))


def test_arrays_of_numpy_are_taken_as_jax_takes_them():
    x, w = data(4, 6), quantize(data(6, 8), granularity=PerChannel(1))
    dims = (((1,), (0,)), ((), ()))
    assert_same_bits(aqt_lite.jax.dot_general(np.asarray(x), w, dims), aqt_lite.jax.dot_general(x, w, dims))
    assert_same_bits(aqt_lite.jax.einsum("bi,io->bo", np.asarray(x), w), aqt_lite.dense(x, w))
    assert_same_bits(aqt_lite.jax.dot_general(w, np.asarray(x), (((0,), (1,)), ((), ()))), aqt_lite.dense(x, w).T)
    kernel = quantize(data(8, 6, 2), granularity=PerChannel(0))
    images = data(3, 6, 4)
    y = aqt_lite.jax.conv_general_dilated(np.asarray(images), kernel, (2,), "VALID")
    assert_same_bits(y, aqt_lite.jax.conv_general_dilated(images, kernel, (2,), "VALID"))


def test_two_quantized_sides_are_refused():
    q = quantize(data(4, 4))
    with pytest.raises(TypeError, match="dot_general of two QArrays"):
        aqt_lite.jax.dot_general(q, q, (((1,), (0,)), ((), ())))


# ---- rows of a table

TABLES = {
    "int8": {"granularity": PerChannel(0)},
    "int4 in groups": {"dtype": "int4", "granularity": PerGroup(16)},
    "uint3 affine": {"dtype": "uint3", "scheme": "affine", "granularity": PerGroup(16)},
    "nvfp4": {"dtype": "nvfp4"},
}


@pytest.mark.parametrize("kind", TABLES)
def test_rows_of_a_table(kind):
    table = quantize(data(50, 32), **TABLES[kind])
    ids = jnp.asarray([[3, 49, -1], [0, -50, 3]])
    expected = jnp.take(table.dequantize(), ids, axis=0)
    assert_same_bits(aqt_lite.jax.take(table, ids, axis=0), expected)
    assert_same_bits(jax.jit(lambda t, i: aqt_lite.jax.take(t, i, axis=0))(table, ids), expected)
    assert_same_bits(jax.jit(lambda t, i: t[i].dequantize())(table, ids), expected)
    one_by_one = jax.jit(jax.vmap(lambda i: aqt_lite.jax.take(table, i, axis=0)))(ids.reshape(-1))
    assert_same_bits(one_by_one, expected.reshape(6, 32))
    assert_same_bits(aqt_lite.jax.take(table.dequantize(), ids, 0), expected)


def test_a_look_up_dequantizes_its_rows_alone():
    table = quantize(data(5000, 32), "int4", granularity=PerGroup(16))
    program = jax.jit(lambda t, i: aqt_lite.jax.take(t, i, axis=0)).lower(table, jnp.arange(3)).as_text()
    assert "5000x16xui8" in program  # the packed codes
    assert "5000x32xf32" not in program
    assert "5000x32xi8" not in program


def test_rows_outside_the_table():
    table, outside = quantize(data(50, 32), granularity=PerChannel(0)), jnp.asarray([3, 50, -51])
    with pytest.raises(IndexError, match="index 50 is out of range"):
        aqt_lite.jax.take(table, outside, axis=0)
    rows = jax.jit(lambda i: aqt_lite.jax.take(table, i, axis=0))(outside)
    assert_same_bits(rows, jax.jit(lambda i: jnp.take(table.dequantize(), i, axis=0))(outside))
    assert np.isnan(rows[1:]).all()
    columns = jax.jit(lambda i: aqt_lite.jax.take(table, i, axis=-1))(jnp.asarray([[3, 32]]))
    assert columns.shape == (50, 1, 2)
    assert (np.isnan(columns) == np.asarray([False, True])).all()
    with pytest.raises(ValueError, match="say axis="):
        aqt_lite.jax.take(table, outside)


# ---- convolutions

CONVOLUTIONS = {
    "padded": {"padding": "SAME", "window_strides": (1, 1)},
    "strided": {"padding": ((1, 0), (0, 2)), "window_strides": (2, 1)},
    "dilated": {"padding": "VALID", "window_strides": (1, 1), "rhs_dilation": (2, 1)},
    "transposed": {"padding": ((1, 1), (0, 1)), "window_strides": (1, 1), "lhs_dilation": (2, 2)},
    "patches": {"padding": "VALID", "window_strides": (2, 3)},
    "patches, padded by nothing": {"padding": "SAME", "window_strides": (2, 3)},
    "patches, padded": {"padding": ((1, 0), (0, 0)), "window_strides": (2, 3)},
}
LAYOUTS = {
    "torch": (None, (4, 6, 8, 9), (5, 6, 2, 3), PerChannel(0)),
    "flax": (((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)), (4, 8, 9, 6), (2, 3, 6, 5), PerChannel(3)),
    "others": (("HNCW", "OHIW", "WCNH"), (8, 4, 6, 9), (5, 2, 6, 3), PerGroup(2, 2)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind, layout):
    numbers, of_x, of_w, granularity = LAYOUTS[layout]
    if numbers is not None and not isinstance(numbers[0], str):
        numbers = jax.lax.ConvDimensionNumbers(*numbers)
    x, w = data(*of_x), quantize(data(*of_w, seed=1), granularity=granularity)
    settings = {**CONVOLUTIONS[kind], "dimension_numbers": numbers}
    expected = jax.lax.conv_general_dilated(x, w.dequantize(), **settings)
    convolution = jax.jit(lambda x, w: aqt_lite.jax.conv_general_dilated(x, w, **settings))
    assert_close(convolution(x, w), expected)
    is_product = " convolution(" not in convolution.lower(x, w).compile().as_text()
    assert is_product == (kind in ("patches", "patches, padded by nothing"))


def test_convolutions_of_groups_and_of_patches_that_do_not_divide():
    x, w = data(4, 6, 9, 10), quantize(data(8, 3, 2, 3, seed=1), granularity=PerChannel(0))
    settings = {"window_strides": (2, 3), "padding": "VALID", "feature_group_count": 2}
    expected = jax.lax.conv_general_dilated(x, w.dequantize(), **settings)
    assert_close(aqt_lite.jax.conv_general_dilated(x, w, **settings), expected)
    w = quantize(data(8, 6, 2, 3, seed=1), granularity=PerChannel(0))
    expected = jax.lax.conv_general_dilated(x, w.dequantize(), (2, 3), "VALID")
    assert_close(aqt_lite.jax.conv_general_dilated(x, w, (2, 3), "VALID"), expected)
    assert expected.shape == (4, 8, 4, 3)
    assert_close(aqt_lite.jax.conv_general_dilated(x, w.dequantize(), (2, 3), "VALID"), expected)


def test_a_convolution_has_the_dtype_of_its_input_and_a_derivative():
    x, w = data(4, 6, 9), quantize(data(8, 6, 3, seed=1), granularity=PerChannel(0))

    def total(convolution, w, strides):
        return lambda x: convolution(x, w, strides, "VALID").sum()

    for strides in ((1,), (3,)):
        y = aqt_lite.jax.conv_general_dilated(x.astype("bfloat16"), w, strides, "VALID")
        assert y.dtype == "bfloat16"
        dx = jax.grad(total(aqt_lite.jax.conv_general_dilated, w, strides))(x)
        assert_close(dx, jax.grad(total(jax.lax.conv_general_dilated, w.dequantize(), strides))(x))


def test_what_convolutions_refuse():
    x, w = data(4, 6, 9), quantize(data(8, 6, 3), granularity=PerChannel(0))
    with pytest.raises(TypeError, match="lhs is a QArray"):
        aqt_lite.jax.conv_general_dilated(w, w, (1,), "VALID")
    with pytest.raises(ValueError, match="its windows overlap"):
        aqt_lite.jax.conv_general_dilated(x, w, (1,), "VALID", activations="int8")
    y = aqt_lite.jax.conv_general_dilated(x, w, (3,), "VALID", activations="int8")
    np.testing.assert_allclose(y, jax.lax.conv_general_dilated(x, w.dequantize(), (3,), "VALID"), atol=0.3)


# ---- mapped over


def test_dense_of_stacked_matrices_under_vmap_and_map():
    """Batched kernels in their fast form, one for each of the leading axis."""
    x, w = data(3, 2, 32), data(3, 32, 8, seed=1)
    for settings in ({"granularity": PerBlock((1, -1, 1))}, {"dtype": "int4", "granularity": PerGroup(16, 1)}):
        q = quantize(w, **settings).for_dense()
        expected = jnp.einsum("ebi,eio->ebo", x, q.dequantize())
        assert_close(jax.jit(jax.vmap(aqt_lite.dense))(x, q), expected)
        assert_close(jax.jit(lambda x, q: jax.lax.map(lambda pair: aqt_lite.dense(*pair), (x, q)))(x, q), expected)
        assert_close(jax.jit(lambda x, q: aqt_lite.einsum("ebi,eio->ebo", x, q))(x, q), expected)


def test_the_whole_array_is_the_array_itself():
    q = quantize(data(16, 8), "int4", granularity=PerGroup(8, 0)).for_dense()
    assert q[...] is q
    assert q[:] is q
    assert q[:, :] is q
    with pytest.raises(IndexError, match="too many entries"):
        q[:, :, :]
    scalar = quantize(jnp.asarray(1.0), granularity=PerTensor())
    assert scalar[...] is scalar
