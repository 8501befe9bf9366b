"""torch's transformations: compile, export, autograd, functorch, trees and files, with the bits of the eager call."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import operator
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from aqt_lite import (
    Codebook,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QArray,
    dense,
    dequantize,
    einsum,
    fake_quantize,
    linear,
    quantize,
)
from aqt_lite.backends.torch import products
from aqt_lite.testing import assert_same_bits
from aqt_lite.torch import QuantizedWeight, quantize_

pytestmark = [
    # torch.compile's own code generator and forward-mode AD load parts of torch.jit, which torch has deprecated
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    # Dynamo makes an instance of every autograd.Function that it traces
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"),
]
GRANULARITIES = [PerTensor(), PerChannel(1), PerGroup(3), PerBlock((2, 4))]


def data(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return torch.asarray((rng.standard_normal(shape) * 10.0 ** rng.uniform(-1, 1, shape)).astype(np.float32))


X = data(6, 8)
W = quantize(data(5, 8, seed=1), scheme="affine", granularity=PerGroup(4))


def whole(f, backend="aot_eager"):
    """Compiled in one graph, by a compiler that keeps the operations (or by Inductor, which makes C++ of them)."""
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend=backend)


# ---- compile


@pytest.mark.exhaustive_unless(granularity=GRANULARITIES[2:3])  # seconds each
@pytest.mark.exhaustive_where(scheme="symmetric")  # of which the other has all but the zero points
@pytest.mark.parametrize("scheme", ["symmetric", "affine"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_compiled_calls_have_the_bits_of_eager_ones(granularity, scheme):
    def everything(x):
        q = quantize(x, scheme=scheme, granularity=granularity)
        return q, dequantize(q), fake_quantize(x, scheme=scheme, granularity=granularity)

    for got, expected in zip(whole(everything)(X), everything(X), strict=True):
        assert_same_bits(got, expected)
    q = quantize(X, scheme=scheme, granularity=granularity)
    assert_same_bits(whole(dequantize)(q), dequantize(q))  # as an argument


def test_inductor():
    """One function of everything, because generating C++ takes seconds."""

    def everything(x, w):
        q = quantize(x, granularity=PerGroup(3))
        y = linear(x, w, mode="reproducible")
        return q, dequantize(q), fake_quantize(x, scheme="affine"), y, linear(x, W), dequantize(w)

    got, expected = whole(everything, "inductor")(X, W), everything(X, W)
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        if i == 4:  # a float sum, in an order of its own
            torch.testing.assert_close(g, e, rtol=1e-5, atol=1e-5)
        else:
            assert_same_bits(g, e)


@pytest.mark.parametrize("mode", ["fast", "reproducible"])
def test_compiled_linear_of_arguments_and_constants(mode):
    expected = linear(X, W, mode=mode)
    as_argument = whole(lambda x, w: linear(x, w, mode=mode))(X, W)
    as_constant = whole(lambda x: linear(x, W, mode=mode))(X)
    for y in (as_argument, as_constant):
        if mode == "reproducible":
            assert_same_bits(y, expected)
        else:
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


STORED = [
    {"dtype": "int4", "granularity": PerGroup(32)},
    {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(64)},
    {"dtype": "nf4", "granularity": PerGroup(64), "scale_dtype": "float16"},
    {"dtype": "mxfp4"},
]


@pytest.mark.skipif(not products.DECODES, reason="no compiled loops here, which need numba and AVX2")
@pytest.mark.parametrize("how", [STORED[0], *(pytest.param(how, marks=pytest.mark.exhaustive) for how in STORED[1:])])
def test_weights_in_groups_are_one_operator_of_what_is_compiled(how):
    """They stay packed, and have the bits of an eager call."""
    graphs = []

    def recording(graph, _):
        graphs.append(str(graph.graph))
        return graph.forward

    x, w = torch.randn(3, 256), quantize(torch.randn(4096, 256), **how)
    with torch.no_grad():
        torch.compiler.reset()
        for bias in (None, torch.randn(4096)):
            for given in (x, x.to(torch.bfloat16)):
                compiled = torch.compile(linear, fullgraph=True, backend=recording)
                assert_same_bits(compiled(given, w, bias), linear(given, w, bias))
    assert all("aqt_lite.stored_product" in graph for graph in graphs)
    turned = torch.compile(
        lambda x: torch.vmap(lambda row: linear(row[None], w)[0])(x), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert_same_bits(turned(x), torch.cat([linear(row[None], w) for row in x]))


def test_nan_among_many_scales_is_found():
    x = torch.ones(2048, 1024)
    assert quantize(x, granularity=PerGroup(8)).scale.min() > 0
    x[1024, 77] = torch.nan
    with pytest.raises(ValueError, match=r"the first at index \(1024, 77\)"):
        quantize(x, granularity=PerGroup(8))


def test_compiled_non_finite_values_are_loud():
    x = X.clone()
    x[2, 3], x[4, 1] = torch.nan, torch.inf
    values = whole(lambda v: dequantize(quantize(v, granularity=PerChannel(0))))(x)
    assert torch.isnan(values).all(1).tolist() == [False, False, True, False, True, False]
    assert torch.isnan(values).any(1).tolist() == [False, False, True, False, True, False]


# ---- export


class Layer(torch.nn.Module):
    """A QArray as an attribute, and its parts as buffers."""

    def __init__(self):
        super().__init__()
        self.attribute = W
        self.register_buffer("codes", W.qvalue)
        self.register_buffer("scale", W.scale)
        self.register_buffer("zero_point", W.zero_point)
        self.bias = torch.nn.Parameter(torch.ones(5))

    def forward(self, x):
        own = QArray.from_codes(self.codes, self.scale, self.zero_point, granularity=PerGroup(4))
        return linear(x, self.attribute, self.bias), linear(x, own, self.bias)


def told_of_layer():
    """Such a layer, of whose attribute there is a warning."""
    with pytest.warns(UserWarning, match="Layer.attribute is a QArray, which no state_dict holds"):
        return Layer()


class Apply(torch.nn.Module):
    def forward(self, x, w):
        return linear(x, w), quantize(x, granularity=PerGroup(4))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_module_that_holds_a_qarray(strict):
    layer = told_of_layer()
    for got, expected in zip(torch.export.export(layer, (X,), strict=strict).module()(X), layer(X), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_export_with_qarrays_as_arguments_and_results():
    file = io.BytesIO()
    torch.export.save(torch.export.export(Apply(), (X, W)), file)
    file.seek(0)
    y, q = torch.export.load(file).module()(X + 1, W)
    torch.testing.assert_close(y, linear(X + 1, W), rtol=1e-6, atol=1e-6)
    assert_same_bits(q, quantize(X + 1, granularity=PerGroup(4)))
    assert q.zero_point is None


# ---- derivatives


@pytest.mark.parametrize("compile_", [False, True])
@pytest.mark.parametrize(("scale", "zero_point"), [(0.01, 0), (0.02, 60), (0.013, -100)])
def test_straight_through_gradient_is_that_of_torch(scale, zero_point, compile_):
    upstream = torch.linspace(1, 2, 401)

    def gradient(f):
        v = torch.linspace(-3, 3, 401).requires_grad_()
        (f(v) * upstream).sum().backward()
        return v.grad

    def ours(v):
        return fake_quantize(v, scale=scale, zero_point=zero_point)

    def theirs(v):
        return torch.fake_quantize_per_tensor_affine(v, scale, zero_point, -128, 127)

    assert_same_bits(gradient(whole(ours) if compile_ else ours), gradient(theirs))


def test_straight_through_under_functorch():
    assert_same_bits(torch.func.grad(lambda v: fake_quantize(v).sum())(X), torch.ones_like(X))
    assert_same_bits(whole(torch.func.grad(lambda v: fake_quantize(v).sum()))(X), torch.ones_like(X))
    value, tangent = torch.func.jvp(lambda v: fake_quantize(v, scale=0.01), (X,), (torch.ones_like(X),))
    assert_same_bits(value, fake_quantize(X, scale=0.01))
    assert_same_bits(tangent, (X.abs() <= 1.275).float())
    each = torch.func.vmap(torch.func.grad(lambda v: fake_quantize(v, scale=0.01).sum()))(X)
    assert_same_bits(each, (X.abs() <= 1.275).float())


def test_calibrated_fake_quantize_is_the_identity_to_gradients():
    for granularity in GRANULARITIES:
        v = torch.nn.Parameter(X.clone())
        fake_quantize(v, granularity=granularity).sum().backward()
        assert_same_bits(v.grad, torch.ones_like(X))


@pytest.mark.parametrize("compile_", [False, True])
@pytest.mark.parametrize("mode", ["fast", "reproducible"])
def test_gradients_of_linear_are_those_of_the_dequantized_weight(mode, compile_):
    upstream = data(6, 5, seed=3)

    def gradients(f):
        x, bias, scale = (
            X.clone().requires_grad_(),
            torch.zeros(5, requires_grad=True),
            W.scale.clone().requires_grad_(),
        )
        (
            f(x, QArray(W.storage, scale, W.zero_point, W.dtype, W.block, trainable=True), bias) * upstream
        ).sum().backward()
        return x.grad, bias.grad, scale.grad

    def ours(x, w, bias):
        return linear(x, w, bias, mode=mode)

    def plain(x, w, bias):
        return x @ dequantize(w).T + bias

    for got, expected in zip(gradients(whole(ours) if compile_ else ours), gradients(plain), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        assert expected.any()


@pytest.mark.parametrize("compile_", [False, True])
def test_gradients_of_two_quantized_sides(compile_):
    x, w = quantize(X, granularity=PerChannel(0)), quantize(data(5, 8, seed=1), granularity=PerChannel(0))

    def gradients(f):
        leaves = [
            x.scale.clone().requires_grad_(),
            w.scale.clone().requires_grad_(),
            torch.zeros(5, requires_grad=True),
        ]
        qx, qw = (
            QArray(q.storage, s, None, q.dtype, q.block, trainable=True) for q, s in ((x, leaves[0]), (w, leaves[1]))
        )
        f(qx, qw, leaves[2]).sum().backward()
        return [leaf.grad for leaf in leaves]

    expected = gradients(lambda x, w, b: dequantize(x) @ dequantize(w).T + b)
    for got, e in zip(gradients(whole(linear) if compile_ else linear), expected, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-4, atol=1e-4 * float(e.abs().max()))


def test_gradient_of_dequantize_with_respect_to_scale():
    q = quantize(X, scheme="affine", granularity=PerChannel(1))
    scale = q.scale.clone().requires_grad_()
    (dequantize(QArray(q.storage, scale, q.zero_point, q.dtype, q.block, trainable=True)) * 2).sum().backward()
    expected = 2 * (q.qvalue.int() - q.zero_point).sum(0, keepdim=True).float()
    assert_same_bits(scale.grad, expected)


def test_derivatives_do_not_leave_silently():
    x = X.clone().requires_grad_()
    with pytest.raises(TypeError, match=r"backend='jax': x tracks derivatives, .* leave torch: pass x.detach\(\)"):
        fake_quantize(x, backend="jax")
    assert_same_bits(fake_quantize(x.detach(), backend="jax"), fake_quantize(X))
    assert fake_quantize(x, backend="torch").requires_grad
    assert quantize(x, backend="jax").backend == "jax"  # codes are constants anyway
    with torch.no_grad():
        fake_quantize(x, backend="jax")


def test_no_gradient_flows_through_codes_or_into_given_scales():
    q = quantize(torch.nn.Parameter(X.clone()))
    assert not q.scale.requires_grad
    assert not dequantize(q).requires_grad
    scale = torch.tensor(0.5, requires_grad=True)
    assert not fake_quantize(X, scale=scale).requires_grad
    with torch.no_grad():
        assert not fake_quantize(torch.nn.Parameter(X.clone())).requires_grad
        assert not linear(torch.nn.Parameter(X.clone()), W).requires_grad


def test_inference_mode_and_its_tensors():
    with torch.inference_mode():
        q, y = quantize(X), linear(X, W, mode="reproducible")
    assert_same_bits(q, quantize(X))
    assert_same_bits(y, linear(X, W, mode="reproducible"))
    assert_same_bits(dequantize(q), dequantize(quantize(X)))  # outside, a tensor that was made inside


def test_parameters_and_views():
    expected = quantize(X, granularity=PerGroup(4))
    assert_same_bits(quantize(torch.nn.Parameter(X.clone()), granularity=PerGroup(4)), expected)
    assert_same_bits(quantize(X.T.contiguous().T, granularity=PerGroup(4)), expected)
    assert_same_bits(quantize(X.repeat(1, 2)[:, :8], granularity=PerGroup(4)), expected)
    assert_same_bits(quantize(torch.complex(X, X).conj().imag, scale=0.5), quantize(-X, scale=0.5))  # a lazy negation
    assert_same_bits(quantize(X[:1].expand(3, 8)), quantize(X[:1].repeat(3, 1)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype):
    x = X.to(dtype)
    q = quantize(x, granularity=PerGroup(4))
    assert_same_bits(whole(lambda v: quantize(v, granularity=PerGroup(4)))(x), q)
    assert q.scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert q.dequantize().dtype == dtype
    v = x.clone().requires_grad_()
    linear(fake_quantize(v), quantize(data(5, 8).to(dtype))).sum().backward()
    assert v.grad.dtype == dtype


# ---- functorch, trees, files


def test_vmap():
    xs = torch.stack([X, X * 3])
    stacked = torch.func.vmap(lambda v: quantize(v, granularity=PerGroup(4)))(xs)
    assert isinstance(stacked, QArray)
    assert_same_bits(stacked[1], quantize(xs[1], granularity=PerGroup(4)))
    assert_same_bits(torch.func.vmap(dequantize)(stacked), dequantize(stacked))
    for mode in ("fast", "reproducible"):
        y = torch.func.vmap(lambda v, mode=mode: linear(v, W, mode=mode))(xs)
        torch.testing.assert_close(y[1], linear(xs[1], W, mode=mode), rtol=1e-5, atol=1e-5)


def test_trees():
    symmetric = quantize(X)
    assert len(pytree.tree_leaves({"a": W, "b": symmetric})) == 5  # no leaf for the missing zero point
    keys = [pytree.keystr(path) for path, _ in pytree.tree_flatten_with_path(W)[0]]
    assert keys == [".storage", ".scale", ".zero_point"]
    assert_same_bits(pytree.tree_map(torch.clone, symmetric), symmetric)
    leaves, structure = pytree.tree_flatten(W)
    again = pytree.treespec_loads(pytree.treespec_dumps(structure))
    assert_same_bits(pytree.tree_unflatten(leaves, again), W)
    assert again == structure


ANOTHER_STRUCTURE = {  # whose leaves have the same shapes and types
    "block": ({"granularity": PerGroup(9)}, {"granularity": PerGroup(10)}),
    "layout": ({}, {}),
    "format": ({"dtype": "int4"}, {"dtype": "nf4"}),
    "scales": ({"scale_dtype": "float8_e4m3fn"}, {"scale_dtype": "float8_e5m2"}),
}


@pytest.mark.parametrize("kept", ["in memory", "in a file"])
@pytest.mark.parametrize("case", ANOTHER_STRUCTURE)
def test_leaves_are_not_read_as_another_array(case, kept):
    x, (first, second) = data(36, 36, seed=1), ANOTHER_STRUCTURE[case]
    a, b = quantize(x, **first), quantize(x, **second)
    b = b.for_dense() if case == "layout" else b
    (leaves, own), (others, structure) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    assert [(leaf.shape, leaf.dtype) for leaf in leaves] == [(leaf.shape, leaf.dtype) for leaf in others]
    if kept == "in a file":
        file = io.BytesIO()
        torch.save(leaves, file)
        file.seek(0)
        leaves = torch.load(file, weights_only=True)
    with pytest.raises(ValueError, match=r"was taken apart as .*, are put together as .*: its codes would stand"):
        pytree.tree_unflatten(leaves, structure)
    assert_same_bits(pytree.tree_unflatten(leaves, own), a)


def test_codes_may_be_part_of_several_structures():
    q = quantize(X, granularity=PerGroup(4))
    other = dataclasses.replace(q, float_dtype="bfloat16")  # of the same tensors
    for each in (q, other, q):
        assert_same_bits(pytree.tree_unflatten(*pytree.tree_flatten(each)), each)
    leaves, _ = pytree.tree_flatten(W)
    _, structure = pytree.tree_flatten(
        dataclasses.replace(quantize(X, scheme="affine"), zero_point=None, offset=W.scale)
    )
    with pytest.raises(ValueError, match=r"with scale and zero_point, are put together as .*, with scale and offset:"):
        pytree.tree_unflatten(leaves, structure)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_maps_over_any_axis_take_and_give_leaves_of_their_own(axis):
    """Whole arrays along it, of which the axes' order is the caller's business: what vmap gives back, vmap takes."""
    xs, how = torch.stack([X, X * 3]), {"granularity": PerChannel(0)}
    stacked = torch.func.vmap(lambda v: quantize(v, **how), out_dims=axis)(xs)
    values = torch.func.vmap(dequantize, in_dims=axis)(stacked)
    assert_same_bits(values, torch.stack([dequantize(quantize(x, **how)) for x in xs]))
    assert_same_bits(pytree.tree_map(lambda t: t.flip(0), W), W[torch.tensor([4, 3, 2, 1, 0])])


def test_compiled_maps_over_leading_axes():
    q = quantize(data(3, 6, 32), "mxfp4")
    assert_same_bits(whole(lambda q: torch.func.vmap(lambda row: row.dequantize())(q))(q), q.dequantize())


def test_trees_of_what_is_no_array_are_kept_as_they_are():
    axes = pytree.tree_map(lambda _: 0, W)
    assert pytree.tree_leaves(axes) == [0, 0, 0]
    assert_same_bits(torch.func.vmap(lambda q: q.dequantize(), in_dims=(axes,))(W), W.dequantize())


@pytest.mark.parametrize("weights_only", [True, False])
def test_saving(weights_only):
    file = io.BytesIO()
    torch.save({"w": W, "b": quantize(X)}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=weights_only)
    assert_same_bits(loaded["w"], W)
    assert_same_bits(loaded["b"], quantize(X))


def test_pickle_and_copies():
    for other in (pickle.loads(pickle.dumps(W)), copy.deepcopy(W), copy.copy(W)):
        assert_same_bits(other, W)
    assert copy.copy(W).storage is W.storage
    q = quantize(X, "uint16", scheme="affine")  # torch cannot read its own pickles of uint16
    again = pickle.loads(pickle.dumps(q))
    assert again.storage.dtype == torch.uint16
    assert_same_bits(again, q)
    assert copy.deepcopy(W).storage is not W.storage


def test_meta_tensors_have_shapes_and_no_values():
    q = quantize(torch.empty(4, 10, device="meta"), scheme="affine", granularity=PerGroup(4))
    assert (q.shape, tuple(q.scale.shape), q.scale.device.type) == ((4, 10), (4, 3), "meta")
    assert repr(q).endswith("torch, traced)")
    with pytest.raises(TypeError, match="inside a traced function"):
        q.to_backend("numpy")


# ---- autocast


AUTOCAST_FORMATS = [
    {"granularity": PerChannel(0)},
    {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(4)},
]


@pytest.mark.exhaustive_unless(how=AUTOCAST_FORMATS[:1], backend=[None])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("how", AUTOCAST_FORMATS, ids=lambda how: how.get("dtype", "int8"))
def test_products_under_autocast_compute_as_without_it(how, backend):
    w = quantize(data(24, 40, seed=1), **how)

    def results(enabled, inside):
        x, scale = data(16, 40).requires_grad_(), w.scale.clone().requires_grad_()
        q = dataclasses.replace(w, scale=scale, trainable=True)
        f = linear if backend is None else whole(linear, backend)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = f(x, q)
            if inside:
                y.square().sum().backward()
        if not inside:
            y.square().sum().backward()
        return y.detach(), x.grad, scale.grad

    for inside in (False, True):
        for got, expected in zip(results(True, inside), results(False, inside), strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# ---- any number of rows


FORMATS = {
    "int8": {"granularity": PerChannel(0)},
    "groups": {"granularity": PerGroup(8)},
    "ragged": {"granularity": PerGroup(12)},
    "uint8": {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(8)},
    "int4": {"dtype": "int4", "granularity": PerGroup(8)},
    "uint4": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(8)},
    "nf4": {"dtype": "nf4", "granularity": PerGroup(8)},
    "fp8": {"dtype": "float8_e4m3fn", "granularity": PerChannel(0)},
    "mxfp4": {"dtype": "mxfp4"},
    "nvfp4": {"dtype": "nvfp4"},
    "float16 scales": {"dtype": "int4", "granularity": PerGroup(8), "scale_dtype": "float16"},
    "offset": {"dtype": "int4", "scheme": "affine", "offset": "data", "granularity": PerGroup(8)},
    "codebook": {"dtype": Codebook("torch_test_7", (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0)), "granularity": PerGroup(8)},
}
of_each_format = pytest.mark.parametrize("how", FORMATS.values(), ids=FORMATS)


class Calls(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def modes_of(w):
    for mode in ("fast", "reproducible"):
        with contextlib.suppress(ValueError):  # reproducible products are not of every format
            linear(torch.ones(1, w.shape[1]), w, mode=mode)
            yield mode


@pytest.mark.exhaustive_unless(how=[FORMATS["ragged"]])  # seconds each
@of_each_format
def test_one_exported_program_serves_any_number_of_rows(how):
    w, x = quantize(data(24, 40, seed=1), **how), data(6, 40)
    functions = [lambda x, mode=mode: linear(x, w, mode=mode) for mode in modes_of(w)]
    functions.append(lambda x: quantize(x, **how).dequantize())
    for f in functions:
        n = torch.export.Dim("n", min=2, max=1 << 16)
        run = torch.export.export(Calls(f), (x,), dynamic_shapes={"x": {0: n}}).module()
        for rows in (2, 7, 9, 70):
            torch.testing.assert_close(run(data(rows, 40)), f(data(rows, 40)), rtol=1e-5, atol=1e-4)


def test_export_finds_out_by_itself_that_any_number_of_rows_will_do():
    f = Calls(lambda x: linear(x, W, mode="reproducible") + linear(x, W) + quantize(x).dequantize()[:, :5])
    auto = {"x": {0: torch.export.Dim.AUTO}}
    (limits,) = torch.export.export(f, (X,), dynamic_shapes=auto).range_constraints.values()
    assert limits.lower <= 2
    assert limits.upper > 1 << 20


def test_group_weights_of_two_shapes_in_one_compiled_function():
    small, large = (quantize(data(n, 40, seed=n), granularity=PerGroup(12)) for n in (5, 9))
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = whole(lambda x, a, b: (linear(x, a), linear(x, b)), backend=graphs)
    middle = quantize(data(7, 40), granularity=PerGroup(12))
    pairs = (((small, large), 1), ((large, small), 2), ((small, middle), 2), ((middle, middle), 3))
    for (a, b), so_many in pairs:  # from the second on lengths are symbols, of which torch takes equal ones to be one
        x = data(6, 40)
        for got, expected in zip(compiled(x, a, b), (linear(x, a), linear(x, b)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert graphs.frame_count == so_many


# ---- formats


@pytest.mark.exhaustive_unless(how=[FORMATS["mxfp4"]])  # seconds each
@of_each_format
def test_every_format_compiled(how):
    x = data(24, 40, seed=1)
    q = quantize(x, **how)
    modes = tuple(modes_of(q))

    def all_of(x, q, a):
        return quantize(x, **how), (fake_quantize(x, **how), dequantize(q)), [linear(a, q, mode=mode) for mode in modes]

    again, values, products = whole(all_of)(x, q, data(6, 40))
    assert_same_bits(again, q)
    for found in values:
        assert_same_bits(found, q.dequantize())
    for mode, y in zip(modes, products, strict=True):
        torch.testing.assert_close(y, linear(data(6, 40), q, mode=mode), rtol=1e-5, atol=1e-5)


KINDS_OF_NUMBERS = ("float8_e4m3fn", "int4", "nvfp4")


@pytest.mark.exhaustive  # eight seconds and more each
@pytest.mark.parametrize("dtype", KINDS_OF_NUMBERS)
def test_numbers_of_records_are_symbols_where_lengths_are(dtype):
    """With ``dynamic=True``; and they have the bits of numbers."""
    how = {} if dtype in ("float8_e4m3fn", "mxfp4", "nvfp4") else {"granularity": PerGroup(32)}

    def all_of(a, w):
        return w.dequantize(), quantize(a, dtype, **how).dequantize(), linear(a, w)

    torch.compiler.reset()
    compiled = torch.compile(all_of, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows, length in ((3, 64), (5, 128), (9, 128)):
        given = data(rows, length), quantize(data(16, length, seed=2), dtype, **how)
        (*values, y), (*expected, product) = compiled(*given), all_of(*given)
        for found, wanted in zip(values, expected, strict=True):
            assert_same_bits(found, wanted)
        torch.testing.assert_close(y, product, rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive  # eight seconds
def test_stochastic_rounding_compiles():
    """Inlined into one another, the rounds of its noise took the compiler hours."""
    x = data(6, 40)
    how = {"dtype": "int4", "scale": 0.1, "rounding": "stochastic", "on_clip": "saturate"}
    assert_same_bits(whole(lambda x: quantize(x, **how, key=7))(x), quantize(x, **how, key=7))
    mapped = whole(lambda x: torch.func.vmap(lambda v: quantize(v, "mxfp4").dequantize())(x))
    assert_same_bits(mapped(x), quantize(x, "mxfp4").dequantize())


@pytest.mark.exhaustive  # test_inductor compiles, too
@pytest.mark.parametrize(
    "how", [{"dtype": "uint8", "scheme": "affine"}, {"dtype": "nf4", "granularity": PerChannel(0)}], ids=str
)
def test_one_compiled_program_quantizes_any_shape(how):
    """And at most one or two more, for lengths that its guards exclude."""
    counted = CompileCounterWithBackend("inductor")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quantize(x, **how), fullgraph=True, dynamic=True, backend=counted)
    for shape in ((5, 64), (9, 96), (17, 128), (3, 33)):
        x = data(*shape)
        assert_same_bits(compiled(x), quantize(x, **how))
    assert counted.frame_count <= (3 if "granularity" in how else 2)


@of_each_format
def test_every_format_has_gradients(how):
    w = quantize(data(24, 40, seed=1), **how)
    for mode in modes_of(w):
        x = data(6, 40).requires_grad_()
        linear(x, w, mode=mode).sum().backward()
        torch.testing.assert_close(x.grad, torch.ones(6, 24) @ w.dequantize(), rtol=1e-4, atol=1e-4)
    v = data(24, 40, seed=1).requires_grad_()
    fake_quantize(v, **how).sum().backward()
    assert set(v.grad.unique().tolist()) <= {0.0, 1.0}
    assert v.grad.mean() > 0.8


@of_each_format
def test_every_format_is_mapped_over_saved_and_taken_apart(how):
    x = data(24, 40, seed=1)
    q, xs = quantize(x, **how), torch.stack([x, x * 3])
    stacked = torch.func.vmap(lambda v: quantize(v, **how))(xs)
    assert_same_bits(stacked[1], quantize(xs[1], **how))
    assert_same_bits(torch.func.vmap(dequantize)(stacked)[1], stacked[1].dequantize())
    for weights_only in (True, False):
        file = io.BytesIO()
        torch.save({"w": q}, file)
        file.seek(0)
        assert_same_bits(torch.load(file, weights_only=weights_only)["w"], q)
    assert_same_bits(copy.deepcopy(q), q)
    leaves, structure = pytree.tree_flatten(q)
    again = pytree.treespec_loads(pytree.treespec_dumps(structure))
    assert again == structure
    assert_same_bits(pytree.tree_unflatten(leaves, again), q)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_large_tensors_of_narrow_types_get_the_codes_of_their_values(dtype):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((400, 512)).astype(np.float32)).to(dtype)
    q = quantize(x, "int4", granularity=PerGroup(32))
    for other in (x.to(torch.float32), x.T.contiguous().T):
        found = quantize(other, "int4", granularity=PerGroup(32))
        assert_same_bits(q.storage, found.storage)
        assert_same_bits(q.scale, found.scale)
    assert q.dequantize().dtype == dtype


@of_each_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_leaves_that_were_converted_are_refused_by_name(how, dtype):
    q = quantize(data(24, 40, seed=1), **how)
    all_converted = pytree.tree_map(lambda t: t.to(dtype), q)
    for use in (dequantize, lambda q: linear(data(6, 40), q)):
        with pytest.raises(TypeError, match=r"dtype b?float16"):
            use(all_converted)
        if not isinstance(q.scale, QArray):
            floats = pytree.tree_map(lambda t: t.to(dtype) if t.is_floating_point() else t, q)
            with pytest.raises(TypeError, match=r"this QArray's scale has dtype b?float16, but it is kept as float32"):
                use(floats)


def test_a_weight_that_changes_after_its_first_product_is_looked_at_again():
    q = quantize(data(5, 8), granularity=PerChannel(0))
    linear(X, q)
    q.scale.data = q.scale.half()
    with pytest.raises(TypeError, match="this QArray's scale has dtype float16"):
        linear(X, q)
    q = quantize(data(5, 64), "mxfp4")
    assert_same_bits(linear(data(1, 64), q), linear(data(1, 64), q))
    q.scale.storage.data = q.scale.storage.to(torch.int16)
    with pytest.raises(TypeError, match="this QArray's storage has dtype int16"):
        linear(data(1, 64), q)
    q = quantize(data(5, 8), granularity=PerChannel(0))
    linear(X, q)
    q.scale.requires_grad_()
    assert not linear(X, q).requires_grad  # scales are constants unless they are said to be trainable


def test_what_torch_would_make_of_a_qarray_says_what_to_do_or_works():
    q, module = quantize(data(8, 5), "int4", granularity=PerGroup(5)), torch.nn.Module()
    torch.testing.assert_close(X @ q, X @ q.dequantize(), rtol=1e-5, atol=1e-5)
    with pytest.raises(
        TypeError,
        match=r"cannot assign .*QArray|'w' is a QArray.*self.w = aqt_lite.torch.QuantizedWeight.*quantize_",
    ):
        module.register_buffer("w", q)
    module.register_buffer("b", torch.ones(2))
    with pytest.raises(
        TypeError, match=r"cannot assign .*QArray|buffer 'b' is a QArray.*QuantizedWeight\(q\) keeps it"
    ):
        module.b = q
    assert "w" not in module.state_dict()
    module.register_buffer("none", None)
    with pytest.raises(AttributeError, match=r"it is a constant of derivatives.*QuantizedWeight\(q\)"):
        torch.nn.Parameter(q)


class Holding(torch.nn.Module):
    """A module with an attribute and nothing else."""

    def __init__(self, w):
        super().__init__()
        self.w = w

    def forward(self, x):
        return torch.nn.functional.linear(x, self.w)


def test_qarrays_as_attributes_of_modules_are_told_of():
    q = quantize(data(5, 8))
    telling = r"Holding.w is a QArray, which no state_dict holds.*self.w = aqt_lite.torch.QuantizedWeight\(q\) keeps it"
    with pytest.warns(UserWarning, match=telling) as told:
        holding = Holding(q)
    assert {(warning.filename, warning.lineno) for warning in told} == {
        (__file__, Holding.__init__.__code__.co_firstlineno + 2)
    }
    y = torch.nn.Sequential(holding)(X)  # that was all: warnings are errors here
    kept = torch.nn.Sequential(Holding(QuantizedWeight(q)))
    assert "0.w.storage" in kept.state_dict()
    assert_same_bits(kept(X), y)
    kept.register_buffer("b", None)
    with pytest.raises(TypeError, match="buffer 'b' is a QArray"):
        kept.b = q
    layer = torch.nn.Linear(8, 5, bias=False)
    with pytest.raises(TypeError, match=r"Linear.weight is a parameter.*: del self.weight, and then self.weight = "):
        layer.weight = q
    del layer.weight
    layer.weight = QuantizedWeight(q)
    assert_same_bits(layer(X), y)
    with pytest.warns(
        UserWarning, match=r"ParameterList.0 is a QArray.*module: aqt_lite.torch.QuantizedWeight\(q\) keeps"
    ):
        torch.nn.ParameterList([q])
    with pytest.warns(UserWarning, match="Holding.later is a QArray"):
        holding.later = q.to_backend("numpy")
    assert isinstance(holding, torch.nn.Module)
    assert not isinstance(q, torch.nn.Module)
    assert q.__class__ is QArray


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("granularity", [None, PerChannel(0), PerGroup(32)], ids=str)
def test_constructors_of_tensors_name_the_way(dtype, granularity):
    for x in (torch.ones(2, 64), np.ones((2, 64), "float32")):
        q = quantize(x, dtype, granularity=granularity)
        for make in (torch.as_tensor, torch.tensor, torch.asarray, torch.from_dlpack, np.from_dlpack):
            with pytest.raises(TypeError, match=r"a QArray becomes no tensor.*q\.dequantize\(\).*QuantizedWeight\(q\)"):
                make(q)


def test_products_of_torch_are_those_of_a_qarray():
    w = W.T
    y = X @ w
    for f in (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__):
        assert_same_bits(f(X, w), y)
    assert_same_bits(torch.matmul(input=X, other=w), y)
    assert_same_bits(torch.matmul(X[0], w), X[0] @ w)
    assert_same_bits(torch.matmul(W, X.T), W @ X.T)
    b = data(5)
    assert_same_bits(torch.nn.functional.linear(X, W), linear(X, W))
    assert_same_bits(torch.nn.functional.linear(input=X, weight=W, bias=b), linear(X, W, b))
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(torch.nn.functional.linear(X, W), linear(X, W))
    with pytest.raises(TypeError, match="write y = x @ q, without out="):
        torch.matmul(X, w, out=torch.empty(6, 5))
    with pytest.raises(ValueError, match=r"mm has operands of shapes \(8,\) and \(8, 5\)"):
        torch.mm(X[0], w)
    with pytest.raises(TypeError, match=r"x is a torch array but w is a numpy QArray: move one of them"):
        torch.nn.functional.linear(X, W.to_backend("numpy"))


@pytest.mark.exhaustive
def test_products_of_torch_are_those_of_a_qarray_in_transformations():
    def f(x):
        return torch.nn.functional.linear(x, W) + torch.matmul(x, W.T) + torch.mm(x, W.T) + x @ W.T

    expected = 4 * linear(X, W)
    torch.testing.assert_close(whole(f, backend="eager")(X), expected)
    torch.testing.assert_close(torch.func.vmap(lambda x: torch.nn.functional.linear(x, W))(X), linear(X, W))
    torch.testing.assert_close(torch.func.grad(lambda x: f(x).sum())(X), 4 * W.dequantize().sum(0).expand(X.shape))

    class Model(torch.nn.Module):
        def forward(self, x):
            return f(x)

    exported = torch.export.export(Model(), (X,), dynamic_shapes=({0: torch.export.Dim("n")},)).module()
    torch.testing.assert_close(exported(torch.cat([X, X])), torch.cat([expected, expected]))


def test_other_functions_of_torch_name_the_way_and_operators_their_own():
    q = quantize(X)
    calls = (
        lambda: torch.mul(X, q),
        lambda: torch.stack([q]),
        lambda: torch.cat([X, q]),
        lambda: torch.einsum("ab,cb->ac", X, q),
        lambda: torch.addmm(X, X, q),
        lambda: torch.nn.functional.embedding(torch.tensor([0]), q),
        lambda: X.copy_(q),
        lambda: X.to(q),
        lambda: X[q],
        lambda: torch.add(input=X, other=q),
    )
    for call in calls:
        with pytest.raises(TypeError, match=r"functions of torch take arrays, and a QArray \(int8.*q\.dequantize\(\)"):
            call()
    for operate in (operator.mul, operator.add, operator.sub, operator.truediv, operator.pow, operator.lt):
        for args in ((X, q), (q, X)):
            with pytest.raises(TypeError, match=r"arithmetic with a QArray .*write q\.dequantize\(\)"):
                operate(*args)
    for operate in (operator.eq, operator.ne):
        with pytest.raises(TypeError, match="not compared by =="):
            operate(X, q)


def test_make_fx_takes_no_result_for_a_constant():
    for size in (8, 512):  # as NumPy does it, and by the CPU library
        with pytest.raises(RuntimeError, match="tracing tensor"):  # which is looked at for NaN
            make_fx(lambda x: fake_quantize(x))(torch.ones(size, size))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are compared, and a trace has one shape
def test_a_trace_records_fast_products_and_refuses_what_reads_bits():
    traced = torch.jit.trace(lambda x: linear(x, W), X)
    torch.testing.assert_close(traced(X + 1), linear(X + 1, W), rtol=1e-5, atol=1e-5)
    for f in (lambda x: linear(x, W, mode="reproducible"), lambda x: quantize(x).dequantize()):
        with pytest.raises(NotImplementedError, match=r"torch.jit.trace cannot record this.* Use torch.export.export"):
            torch.jit.trace(f, X)


# ---- memory


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def cut(t):
    t = t.clone()
    t.untyped_storage().resize_(t.nbytes // 2)
    return t


@pytest.mark.parametrize("take_away", [freed, cut])
@pytest.mark.parametrize("shape", [(24, 40), (600, 512)], ids=str)
def test_tensors_that_lost_their_storage_are_refused(shape, take_away):
    w, x, bias = data(*shape), data(3, shape[1]), data(shape[0])
    q = quantize(w, "uint8", scheme="affine", granularity=PerChannel(0))
    for name in ("storage", "scale", "zero_point"):
        bad = dataclasses.replace(q, **{name: take_away(getattr(q, name))})
        for use in (dequantize, lambda q: linear(x, q), lambda q: linear(x, q, mode="reproducible"), lambda q: q[:8]):
            with pytest.raises(TypeError, match=f"this QArray's {name} has shape .* its storage was freed or cut"):
                use(bad)
        assert "freed or cut" in repr(bad)
    bad = dataclasses.replace(quantize(w, "int4"), storage=take_away(quantize(w, "int4").storage))
    with pytest.raises(TypeError, match="freed or cut"):
        bad.unpacked()
    refused = [
        lambda: quantize(take_away(w)),
        lambda: fake_quantize(take_away(w)),
        lambda: linear(take_away(x), q),
        lambda: linear(x, q, take_away(bias)),
        lambda: QArray.from_codes(take_away(q.qvalue.view(torch.int8)), 1.0),
    ]
    for f in refused:
        with pytest.raises(TypeError, match="freed or cut"):
            f()
    with pytest.raises(ValueError, match="freed or cut"):
        quantize(w, scale=freed(torch.full((1, 1), 0.5)))


@pytest.mark.parametrize("rows", [1, 24])
@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4"])
def test_storage_that_is_freed_after_a_first_product(dtype, rows):
    q, x = quantize(data(24, 64), dtype), data(rows, 64)
    q = q._with_each(torch.clone)
    expected = linear(x, q)
    for t in q._arrays():
        kept = t.clone()
        t.data = freed(t)
        with pytest.raises(ValueError, match="freed or cut"):
            linear(x, q)
        t.data = kept.T.contiguous().T  # elsewhere, and in another order
        torch.testing.assert_close(linear(x, q), expected)
    with pytest.raises(TypeError, match="freed or cut"):
        linear(freed(x), q)


class Subclass(torch.Tensor):
    pass


def misaligned(t):
    raw = torch.empty(t.nbytes + 1, dtype=torch.uint8)
    there = torch.frombuffer(memoryview(raw.numpy())[1:], dtype=t.dtype).reshape(t.shape)
    return there.copy_(t)


@pytest.mark.parametrize("shape", [(24, 40), (600, 512)], ids=str)
@pytest.mark.parametrize(
    "place",
    [
        misaligned,
        lambda t: t.clone().share_memory_(),
        lambda t: torch.nn.Parameter(t.clone(), requires_grad=False),
        lambda t: t.T.contiguous().T,
        lambda t: t.as_subclass(Subclass),
    ],
    ids=["misaligned", "shared", "parameter", "transposed", "subclass"],
)
def test_wherever_tensors_lie(place, shape):
    w, x = data(*shape), data(3, shape[1])
    q = quantize(w, "uint8", scheme="affine", granularity=PerChannel(0))
    assert_same_bits(quantize(place(w), "uint8", scheme="affine", granularity=PerChannel(0)), q)
    moved = q._with_each(place)
    assert_same_bits(dequantize(moved), dequantize(q))
    torch.testing.assert_close(linear(place(x), moved).as_subclass(torch.Tensor), linear(x, q), rtol=1e-5, atol=1e-3)
    assert_same_bits(linear(place(x), moved, mode="reproducible"), linear(x, q, mode="reproducible"))


def test_modules_forget_a_qarray_that_is_a_plain_attribute():
    """What torch does, and what does keep it: its parts as buffers. ``Layer`` above shows the whole."""
    module = torch.nn.Module()
    with pytest.warns(UserWarning, match="Module.w is a QArray, which no state_dict holds"):
        module.w = W
    assert module.state_dict() == {}  # torch knows tensors alone
    again = told_of_layer()
    assert [name for name, _ in again.named_buffers()] == ["codes", "scale", "zero_point"]
    again.codes.zero_()
    again.load_state_dict(told_of_layer().state_dict())
    assert_same_bits(again.codes, W.qvalue)


# ---- ONNX


IN_ONNX = {
    "int8": {"granularity": PerChannel(0)},
    "a tensor": {"dtype": "uint8", "scheme": "affine"},
    "groups": {"dtype": "int8", "granularity": PerGroup(32)},
    "int4": {"dtype": "int4", "granularity": PerGroup(32)},
    "uint4": {"dtype": "uint4", "scheme": "affine", "granularity": PerChannel(0)},
    "zero points": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(32)},
    "a shorter last group": {"dtype": "int4", "granularity": PerGroup(48)},
    "blocks": {"dtype": "int4", "granularity": PerBlock((16, 32))},
    "int16": {"dtype": "int16", "granularity": PerChannel(0)},
    "uint16": {"dtype": "uint16", "scheme": "affine", "granularity": PerChannel(0)},
    "nf4": {"dtype": "nf4", "granularity": PerChannel(0)},
    "groups of nf4": {"dtype": "nf4", "granularity": PerGroup(32)},
    "float8": {"dtype": "float8_e4m3fn", "granularity": PerGroup(32)},
    "float6": {"dtype": "float6_e3m2fn", "granularity": PerTensor()},
    "float4": {"dtype": "float4_e2m1fn", "granularity": PerGroup(32)},
    "scales of 16 bits": {"dtype": "int4", "granularity": PerGroup(32), "scale_dtype": "float16"},
    **{name: {"dtype": name} for name in ("mxfp4", "mxfp6_e3m2", "mxint8", "nvfp4")},
    **{name: {"dtype": name} for name in ("bitround0", "bitround7")},
}


class InOnnx(torch.nn.Module):
    """With every one of these weights: a product, one of codes as ``for_dense`` stores them, values, rows."""

    def __init__(self, names):
        super().__init__()
        rows = torch.randn(16, 192, generator=torch.Generator().manual_seed(0))
        self.weights = [quantize(rows, **IN_ONNX[name]) for name in names]

    def forward(self, x, ids):
        return [
            (linear(x, q), dense(x, q.T.for_dense()), torch.nn.functional.linear(x, dequantize(q)), q[ids].dequantize())
            for q in self.weights
        ]


SOME = ("zero points", "mxfp4", "bitround7")
OTHERS = tuple(name for name in IN_ONNX if name not in SOME)
AT_ONCE = [SOME, *(pytest.param(OTHERS[i::3], marks=pytest.mark.exhaustive) for i in range(3))]


@pytest.fixture(scope="module", params=AT_ONCE, ids=", ".join)
def in_onnx(request):
    """Names of weights, their model, its inputs, and the program that the exporter makes of it with all defaults."""
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: requirements-dev.txt has it")
    model, batch = InOnnx(request.param), torch.export.Dim("batch", min=2, max=64)
    inputs = torch.linspace(-1, 1, 3 * 192).reshape(3, 192), torch.tensor([3, 0, 15])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        how = {"dynamo": True, "verbose": False, "dynamic_shapes": ({0: batch}, {0: batch})}
        return request.param, model, inputs, torch.onnx.export(model, inputs, **how).model_proto


def test_onnx_holds_codes(in_onnx):
    """No float of the program is as long as a weight."""
    program = in_onnx[-1]
    codes = 2, 3, 4, 5  # uint8, int8, uint16, int16
    assert max(int(np.prod(i.dims)) for i in program.graph.initializer if i.data_type not in codes) <= 512


@pytest.mark.parametrize("evaluator", ["onnxruntime", "onnx.reference"])
def test_onnx_computes_the_same(in_onnx, evaluator):
    module = pytest.importorskip(evaluator, reason=f"{evaluator} is not installed: requirements-dev.txt has it")
    names, model, inputs, program = in_onnx
    if evaluator == "onnxruntime":
        exact = module.SessionOptions()  # optimized, the runtime rounds activations to 8 bits of its own accord
        exact.graph_optimization_level = module.GraphOptimizationLevel.ORT_DISABLE_ALL
        run = module.InferenceSession(program.SerializeToString(), exact, providers=["CPUExecutionProvider"]).run
    else:
        run = module.ReferenceEvaluator(program).run
    twice = [torch.cat([a, a]) for a in inputs]
    found = run(None, {i.name: a.numpy() for i, a in zip(program.graph.input, twice, strict=True)})
    expected = [y.detach().numpy() for of_weight in model(*twice) for y in of_weight]
    for at, (y, of_model) in enumerate(zip(found, expected, strict=True)):
        np.testing.assert_allclose(y, of_model, rtol=1e-5, atol=1e-5, err_msg=f"{names[at // 4]}, {at % 4}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of this exporter
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", ["int8", "zero points", "groups of nf4", "mxfp4", "bitround7"])
def test_the_exporter_of_traces_is_refused(name):
    """It would make float32 of the weight without a word."""
    pytest.importorskip("onnx", reason="onnx is not installed: requirements-dev.txt has it")
    how = IN_ONNX.get(name, {"granularity": PerChannel(0)})
    for rows in (8, 1100):  # small, and large enough for compiled loops
        layer = quantize_(torch.nn.Linear(1024, rows), [("weight", how)]).eval()
        x, q = torch.ones(2, 1024), layer.weight.qarray
        for use in (layer, lambda x: x @ dequantize(q).T, lambda x: dense(x, q.T)):  # noqa: B023 - called at once
            with pytest.raises(NotImplementedError, match=r"dynamo=False.* say torch.onnx.export\(.*dynamo=True\)"):
                torch.onnx.export(AsModule(use), (x,), io.BytesIO(), dynamo=False)
            if name == "int8":
                with torch.no_grad():
                    torch.testing.assert_close(torch.jit.trace(use, x)(x), use(x), rtol=1e-4, atol=1e-4)


class AsModule(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.exhaustive  # seconds
@pytest.mark.parametrize("what", ["mode", "activations"])
def test_what_onnx_cannot_say_is_told(what):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: requirements-dev.txt has it")
    layer = quantize_(torch.nn.Linear(64, 8), [("weight", {"activations": "int8"})])
    q = layer.weight.qarray

    class Layer(torch.nn.Module):
        def forward(self, x):
            return linear(x, q, mode="reproducible") if what == "mode" else layer(x)

    with warnings.catch_warnings(record=True) as told, contextlib.suppress(torch.onnx.errors.OnnxExporterError):
        warnings.simplefilter("always")
        torch.onnx.export(Layer().eval(), (torch.ones(2, 64),), dynamo=True, verbose=False)
    assert any("ONNX has no operator that reads a float's bits" in str(warning.message) for warning in told)


# ---- torch.func


@pytest.mark.parametrize("how", [{}, {"dtype": "int4", "granularity": PerGroup(32)}], ids=str)
def test_torch_func_of_a_weight_that_was_not_used_before(how):
    w, x = data(512, 640, seed=3), data(4, 640)  # large enough for compiled loops
    for mode in ("fast", "reproducible"):
        q = quantize(w, **how)
        dx = torch.func.grad(lambda x, q=q, mode=mode: linear(x, q, mode=mode).sum())(x)
        torch.testing.assert_close(dx, dequantize(q).sum(0).expand(4, -1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "how",
    [
        FORMATS["int8"],
        *(
            pytest.param(FORMATS[n], marks=pytest.mark.exhaustive)
            for n in ("groups", "uint8", "int4", "nf4", "mxfp4", "fp8")
        ),
    ],
    ids=str,
)
def test_torch_func_inside_what_is_compiled(how):
    """Dynamo leaves the derivatives of an autograd.Function out there: a gradient of zeros would be silent."""
    w, x = quantize(data(24, 40, seed=1), **how), data(3, 40)
    for mode in modes_of(w):

        def loss(x, w, mode=mode):
            return linear(x, w, mode=mode).square().sum()

        expected = torch.func.grad(loss)(x, w)
        assert expected.any()
        as_argument = mode == "fast"
        f = loss if as_argument else lambda x, loss=loss: loss(x, w)
        dx, value = whole(torch.func.grad_and_value(f), "eager")(*((x, w) if as_argument else (x,)))
        torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(value, loss(x, w), rtol=1e-5, atol=1e-5)


def test_torch_func_of_quantized_activations_inside_what_is_compiled():
    w, x = quantize(data(24, 40, seed=1), granularity=PerChannel(0)), data(3, 40)

    def loss(x):
        return einsum("bi,oi->bo", x, w, activations="int8").square().sum()

    expected = torch.func.grad(loss)(x)
    assert expected.any()
    torch.testing.assert_close(whole(torch.func.grad(loss), "eager")(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("index", [slice(3, 9), (slice(3, 9), slice(0, 32)), 3], ids=str)
def test_programs_take_parts_of_arrays(index):
    """A slice alone has no ``ndim`` that a compiler may ask for."""
    q = quantize(torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), "int4", granularity=PerGroup(32))
    compiled = torch.compile(lambda q: q[index].dequantize(), fullgraph=True, backend="eager")
    assert_same_bits(compiled(q), q[index].dequantize())


@pytest.mark.exhaustive
def test_the_first_use_may_be_inside_a_transformation():
    """What torch's kernels find out of the processor, they find out when they are loaded."""
    code = """
import numpy, torch
from aqt_lite import PerGroup, linear, quantize
q = quantize(numpy.ones((64, 64), "float32"), "int4", granularity=PerGroup(32)).to_backend("torch")
print(torch.func.grad(lambda x: linear(x, q).sum())(torch.ones(3, 64)).sum().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 3 * 64 * 64


@pytest.mark.parametrize("turned", [QArray.for_dense, lambda q: q.T], ids=["for_dense", "T"])
def test_buffers_of_weights_lie_in_order(turned, tmp_path):
    """As ``safetensors.torch`` wants them, whatever order the weight's own arrays have."""
    save_file = pytest.importorskip("safetensors.torch", reason="requirements-dev.txt has it").save_file
    q = turned(quantize(torch.randn(96, 40), "int4", granularity=PerGroup(32, 0)))
    layer = QuantizedWeight(q)
    save_file(layer.state_dict(), tmp_path / "weights.safetensors")
    assert_same_bits(layer.qarray.dequantize(), q.dequantize())
