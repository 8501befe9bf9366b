"""torch's transformations: compile, export, autograd, functorch, trees and files, with the bits of the eager call."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree

from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, QArray, dequantize, fake_quantize, linear, quantize
from aqt_lite.testing import assert_same_bits

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


class Apply(torch.nn.Module):
    def forward(self, x, w):
        return linear(x, w), quantize(x, granularity=PerGroup(4))


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_module_that_holds_a_qarray(strict):
    layer = Layer()
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
    assert_same_bits(quantize(torch.complex(X, X).conj().imag, scale=0.1), quantize(-X, scale=0.1))  # a lazy negation
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
    assert copy.deepcopy(W).storage is not W.storage


def test_meta_tensors_have_shapes_and_no_values():
    q = quantize(torch.empty(4, 10, device="meta"), scheme="affine", granularity=PerGroup(4))
    assert (q.shape, tuple(q.scale.shape), q.scale.device.type) == ((4, 10), (4, 3), "meta")
    assert repr(q).endswith("torch, traced)")
    with pytest.raises(TypeError, match="inside a traced function"):
        q.to_backend("numpy")
