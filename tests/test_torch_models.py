"""torch models with quantized layers: what they compute, save, load, move, compile and export."""

from __future__ import annotations

import copy
import io
import math
import pickle
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import aqt_lite
from aqt_lite import Codebook, PerChannel, PerGroup, QArray, linear, quantize, quantize_tree, tree_report
from aqt_lite.backends.torch import modules, products
from aqt_lite.testing import assert_same_bits
from aqt_lite.torch import (
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    plan,
    quantize_,
    quantized_weights,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"),
]

IDS = torch.arange(42).reshape(6, 7) % 50


class Model(nn.Module):
    """An embedding tied to the last layer, a convolution, and layers between."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(50, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1, padding_mode="circular", groups=2)
        self.up = nn.Linear(16, 32)
        self.norm = nn.LayerNorm(32)
        self.down = nn.Linear(32, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.of_vectors(self.embed(ids))

    def of_vectors(self, x):
        x = self.conv(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.down(torch.relu(self.norm(self.up(x)))))


RULES = {
    "default": None,
    "groups": [("up.*", {"dtype": "int4", "granularity": PerGroup(6)}), ("*", {})],
    "mx": [("conv.*", {"dtype": "mxint8"}), ("*", {"dtype": "mxfp4"})],
    "nvfp4": [("*", {"dtype": "nvfp4"})],
    "affine": [("*", {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(4)})],
    "offset": [("*", {"dtype": "int5", "scheme": "affine", "offset": "data", "scale_dtype": "bfloat16"})],
    "codebook": [("*", {"dtype": Codebook("torch_models_7", (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0))})],
    "activations": [("up.*", {"activations": "int8"}), ("down.*", {"activations": "int8"}), ("*", {})],
}
each = pytest.mark.parametrize("kind", RULES)
some = pytest.mark.parametrize(
    "kind",
    [k if k in ("default", "mx", "activations") else pytest.param(k, marks=pytest.mark.exhaustive) for k in RULES],
)
WEIGHTS = {"embed.weight", "conv.weight", "up.weight", "down.weight", "head.weight"}


def made(rules=None, seed=0):
    return quantize_(Model(seed), rules)


def with_values(rules):
    """A float model with the values that the quantized one's codes stand for."""
    model = Model()
    for name, q in quantized_weights(made(rules)).items():
        layer = model.get_submodule(name.rpartition(".")[0])
        layer.weight.data = q.dequantize()
    return model


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.fixture(autouse=True)
def _no_gradients_by_default():
    with torch.no_grad():
        yield


# ---- what they compute


@each
def test_a_quantized_model_computes_with_the_values_of_its_codes(kind):
    rules = RULES[kind]
    model = made(rules)
    expected = with_values(rules)(IDS)
    close(model(IDS), expected, 0.03 if rules == RULES["activations"] else 1e-5)
    rows = model.embed(IDS)
    assert_same_bits(rows, quantized_weights(model)["embed.weight"].dequantize()[IDS])
    assert model.embed(torch.tensor(3)).shape == (16,)


def test_codes_are_those_of_quantize_and_of_the_state_dict():
    rules = [("up.*", {"dtype": "int4", "granularity": PerGroup(6)}), ("conv.*", None), ("*", {})]
    state, found = Model().state_dict(), quantized_weights(made(rules))
    assert_same_bits(found["up.weight"], quantize(state["up.weight"], "int4", granularity=PerGroup(6)))
    assert_same_bits(found["down.weight"], quantize(state["down.weight"], granularity=PerChannel(0)))
    of_state = quantize_tree(state, rules)
    assert set(found) == {path for path, leaf in of_state.items() if isinstance(leaf, QArray)}
    for path, q in found.items():
        assert_same_bits(q, of_state[path])


def test_activations_are_quantized_by_rows():
    layer = nn.Linear(24, 10)
    x = torch.randn(5, 3, 24)
    quantized = quantize_(copy.deepcopy(layer), [("weight", {"activations": "int8"})])
    w = quantize(layer.weight, granularity=PerChannel(0))
    rows = quantize(x.reshape(15, 24), granularity=PerChannel(0))
    assert_same_bits(quantized(x), linear(rows, w, layer.bias).reshape(5, 3, 10))
    assert not torch.equal(quantized(x), linear(x, w, layer.bias))
    assert_same_bits(quantized(x.half()), linear(quantize(x.half(), granularity=PerGroup(24)), w, layer.bias))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions(dimensions):
    kinds = [(nn.Conv1d, QuantizedConv1d), (nn.Conv2d, QuantizedConv2d), (nn.Conv3d, QuantizedConv3d)]
    kind, quantized = kinds[dimensions - 1]
    layer = kind(4, 6, 3, stride=2, padding=1, dilation=1)
    x, weight = torch.randn(2, 4, *(7,) * dimensions), layer.weight.clone()
    quantize_(layer, [("weight", {"dtype": "int4", "granularity": PerGroup(2)})])
    assert type(layer) is quantized
    q = quantize(weight, "int4", granularity=PerGroup(2, axis=1))
    assert_same_bits(layer.weight.qarray, q)
    function = getattr(nn.functional, f"conv{dimensions}d")
    assert_same_bits(layer(x), function(x, q.dequantize(), layer.bias, stride=2, padding=1))
    assert layer.half()(x.half()).dtype == torch.float16


def test_kernels_of_few_bits_lie_in_rows_of_inputs_where_these_are_shorter():
    int4 = [("weight", {"dtype": "int4", "granularity": PerGroup(32)})]
    for layer, stored in (
        (nn.Conv2d(64, 8, 3), (8, 3, 3, 32)),  # 3 codes would take 2 bytes
        (nn.Conv2d(64, 8, 1), (8, 1, 1, 32)),
        (nn.Conv2d(8, 8, 3, groups=8), (8, 1, 3, 2)),
        (nn.ConvTranspose1d(64, 8, 3), (8, 3, 32)),
        (nn.Conv2d(64, 8, 4), (8, 64, 4, 2)),
    ):
        planned = plan(layer, int4).nbytes
        q = quantize_(layer, int4).weight.qarray
        assert q.storage.shape == stored
        assert planned - 4 * layer.bias.numel() == q.nbytes
        assert q.nbytes <= quantize(q.dequantize(), "int4", granularity=q.granularity).nbytes
    assert not quantize_(nn.Conv2d(64, 8, 3)).weight.qarray.transposed  # of whole bytes


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_and_groups_are_those_of_the_float_layer(mode):
    layer = nn.Conv2d(4, 6, (3, 2), padding=(2, 1), dilation=(1, 2), groups=2, padding_mode=mode)
    plain, x = copy.deepcopy(layer), torch.randn(2, 4, 7, 8)
    q = quantized_weights(quantize_(layer))["weight"]
    plain.weight.data = q.dequantize()
    assert_same_bits(layer(x), plain(x))


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_transposed_convolutions(dimensions):
    kind = getattr(nn, f"ConvTranspose{dimensions}d")
    layer = kind(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=2)
    x, weight = torch.randn(2, 4, *(5,) * dimensions), layer.weight.clone()
    plain = copy.deepcopy(layer)
    quantize_(layer, [("weight", {"dtype": "int4", "granularity": PerGroup(2)})])
    assert type(layer) is getattr(aqt_lite.torch, f"QuantizedConvTranspose{dimensions}d")
    assert_same_bits(layer.weight.qarray, quantize(weight, "int4", granularity=PerGroup(2, axis=0)))
    plain.weight.data = layer.weight.qarray.dequantize()
    assert_same_bits(layer(x), plain(x))
    size = [n - 1 for n in plain(x).shape[2:]]
    assert_same_bits(layer(x, output_size=size), plain(x, output_size=size))
    each_output = quantized_weights(quantize_(kind(4, 6, 3)))["weight"]
    assert each_output.granularity == PerChannel(1)
    with pytest.raises(ValueError, match="its layer says what its axes are for"):
        quantize_(kind(4, 6, 3), [("weight", {"layout": "linear"})])


# ---- the rest of a model stays


def test_a_dialect_that_makes_whole_arrays_chooses_their_blocks():
    layer = nn.Linear(64, 6)
    expected = quantize(layer.weight.detach(), "q4_0", dialect="gguf")
    x, bias = torch.ones(3, 64), layer.bias.detach()
    quantize_(layer, [("weight", {"dtype": "q4_0", "dialect": "gguf"})])
    assert_same_bits(layer.weight.qarray, expected)
    torch.testing.assert_close(layer(x).detach(), x @ expected.dequantize().T + bias)


def test_everything_else_stays_what_it_was():
    model = Model()
    called = []
    layers, up, bias = dict(model.named_modules()), model.up, model.up.bias
    up.register_forward_hook(lambda *_: called.append("hook"))
    up.attribute = "kept"
    norm = model.norm.weight
    assert quantize_(model.eval()) is model
    assert model.up is up
    assert (up.bias is bias, up.attribute, model.norm.weight is norm) == (True, "kept", True)
    assert isinstance(up, nn.Linear)
    assert not any(module.training for module in model.modules())
    assert [name for name, _ in model.named_parameters()] == [
        "conv.bias",
        "up.bias",
        "norm.weight",
        "norm.bias",
        "down.bias",
    ]
    assert {name for name in dict(model.named_modules()) if not name.endswith("weight")} == set(layers)
    model(IDS)
    assert called == ["hook"]
    before = model.state_dict()
    assert quantize_(model).state_dict().keys() == before.keys()  # nothing is left to be done


def test_a_model_without_layers_to_quantize_is_told_of():
    model = torch.nn.GRU(8, 4)
    words = "nothing was quantized; of 4 arrays the largest is 'weight_ih_l0' of shape (12, 8): it is the weight_ih_l0 "
    with pytest.warns(UserWarning, match=f"{re.escape(words)}of a GRU, and quantized are weights of Linear"):
        quantize_(model)
    quantize_(quantize_(torch.nn.Linear(3, 2)))  # the second time there is nothing left, which is as it should be


def test_tied_weights_stay_tied():
    model = made()
    assert model.embed.weight is model.head.weight
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.half()):
        assert other.embed.weight is other.head.weight
    assert type(model.embed) is QuantizedEmbedding
    assert type(model.head) is QuantizedLinear
    layer = nn.Linear(4, 4)
    twice = quantize_(nn.Sequential(layer, nn.ReLU(), layer))
    assert twice[0] is twice[2]
    assert isinstance(twice[0].weight, QuantizedWeight)


def test_plan_is_what_happens():
    model, rules = Model(), [("up.*", {"activations": "int8"}), ("*", {"dtype": "int4"})]
    planned = plan(model, rules)
    assert "embed.weight = head.weight" in str(planned)
    assert "int8, PerChannel(axis=0), activations int8" in str(planned)
    quantize_(model, rules)
    marks_and_likes = 16 * 4
    total = sum(t.nbytes for t in {id(t): t for t in model.state_dict().values()}.values())
    tied = model.head.weight.storage.nbytes + model.head.weight.scale.nbytes + 16
    assert planned.nbytes == total - marks_and_likes - tied


def test_report_of_a_model():
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    after = quantized_weights(quantize_(model, [("up.*", {"dtype": "int2"}), ("*", {})]))
    assert set(after) == WEIGHTS
    report = tree_report({name: before[name] for name in after}, after)
    assert report.leaves[0].path == "up.weight"
    assert len(report.leaves) == 4  # the tied one once


# ---- errors


def test_what_is_refused_leaves_the_model_as_it_was():
    def spoiled():
        model = Model()
        model.down.weight.data[3, 4] = torch.nan
        return model

    cases = [
        (spoiled, None, ValueError, r"^down.weight: x has 1 non-finite values of 512.* \(3, 4\)"),
        (Model, [("up.wight", {})], ValueError, r"rule 1 \('up.wight'\) matches no leaf: there are up.weight"),
        (Model, [("*", {"dtpe": 1})], TypeError, "did you mean 'dtype'"),
        (Model, [("norm.*", {})], ValueError, "'norm.*'.* matches norm.weight, and a rule is about weights"),
        (Model, [("*bias", {"layout": None})], ValueError, r"^conv.bias cannot be quantized \(and 3 more: up.bias"),
        (Model, [("embed.*", {})], ValueError, "embed.weight and head.weight are one array"),
        (Model, [("*", {"activations": "int8"})], ValueError, "^embed.weight: activations='int8' is for Linear layers"),
        (Model, [("up.*", {"activations": "int88"})], ValueError, "^up.weight: activations='int88'"),
        (Model, [("up.*", {"activations": True})], TypeError, "^up.weight: activations=True"),
        (Model, [("up.*", {"backend": "numpy"})], ValueError, "^up.weight: backend='numpy': a torch model"),
        (Model, [("up.*", {"layout": "dense"})], ValueError, r"^up.weight: .* are \(out, in\)"),
        (lambda: nn.MultiheadAttention(8, 2), [("*", {})], ValueError, "^in_proj_weight cannot .* out_proj.weight"),
        (lambda: nn.Embedding(8, 4, max_norm=1.0), [("*", {})], ValueError, "^weight cannot .* max_norm"),
        (lambda: nn.LazyLinear(4), None, ValueError, "^weight has no shape yet"),
        (lambda: nn.Linear(4, 4, dtype=torch.complex64), None, TypeError, "^weight: it has dtype complex64"),
    ]
    for make, rules, error, words in cases:
        model = make()
        before = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(error, match=words):
            quantize_(model, rules)
        assert {name: type(module) for name, module in model.named_modules()} == before
    with pytest.raises(TypeError, match=r"model is a dict, not a torch.nn.Module: for arrays, aqt_lite.quantize_tree"):
        quantize_({})


def test_rules_may_have_slashes():
    for pattern in ("down.weight", "down/weight", "do*/weight"):
        assert list(quantized_weights(quantize_(Model(), [(pattern, {})]))) == ["down.weight"]
    with pytest.raises(ValueError, match="matches no leaf"):
        quantize_(Model(), [("norm/norm", {})])


def test_what_is_quantized_already_is_said():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantize_(model, [("0.weight", {})])
    quantize_(model, [("*", {"dtype": "int4"})])
    for pattern in ("*", "1.weight"):
        with pytest.raises(ValueError, match=r"matches [01].weight.* quantized already, and no other weight"):
            quantize_(model, [(pattern, {})])
    assert [q.dtype for q in quantized_weights(model).values()] == ["int8", "int4"]
    half = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    rules = [("1*", None), ("*", {"dtype": "int4"})]
    quantize_(half, rules)
    with pytest.raises(ValueError, match=r"rule 2.* matches 0.weight, .* no other weight that no rule before it"):
        quantize_(half, [rules[0], ("*", {})])  # which matches another, but that is left to the rule before
    with pytest.raises(ValueError, match=r"rule 1.* matches 0.weight, which is quantized already, and no other weight"):
        quantize_(half, [("0.weight", None), ("*", {})])
    assert list(quantized_weights(quantize_(half, [("0*", None), ("*", {})]))) == ["0.weight", "1.weight"]


def test_a_quantized_weight_says_what_a_parameter_would():
    layer = quantize_(nn.Linear(16, 6, dtype=torch.bfloat16))
    assert layer.weight.shape == (6, 16)
    assert isinstance(layer.weight.shape, torch.Size)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.half().weight.dtype == torch.float16
    assert layer.weight.device == torch.device("cpu")
    assert layer.to("meta").weight.device == torch.device("meta")
    layer.weight.requires_grad = False
    assert layer.weight.requires_grad is False
    with pytest.raises(ValueError, match="quantized weights get no derivative"):
        layer.weight.requires_grad = True


def test_a_quantized_layer_takes_another_qarray_for_its_weight():
    layer = quantize_(nn.Linear(64, 32), [("weight", {})])
    q = quantize(torch.linspace(-1, 1, 64 * 32).reshape(32, 64), "int4", granularity=PerGroup(32))
    layer.weight = q
    x = torch.linspace(-1, 1, 64).reshape(1, 64)
    assert_same_bits(layer(x), aqt_lite.linear(x, q, layer.bias))
    assert layer.state_dict()["weight.storage"].shape == (32, 32)
    with pytest.raises(ValueError, match=r"weight has shape \(32, 32\), and the layer's \(32, 64\)"):
        layer.weight = quantize(torch.ones(32, 32))
    with pytest.raises(TypeError, match="to_backend"):
        layer.weight = q.to_backend("numpy")
    with pytest.raises(AttributeError, match=r"no attribute 'data': .*\.qarray\.dequantize\(\)"):
        _ = layer.weight.data
    with pytest.raises(AttributeError, match=r"no attribute 'something'$"):
        _ = layer.weight.something


@pytest.mark.parametrize("way", ["eager", "export", pytest.param("compile", marks=pytest.mark.exhaustive)])
def test_ids_that_an_embedding_has_not_are_refused(way):
    """Also where values are not known while a program is made, and those below 0, as ``nn.Embedding`` does."""
    model = quantize_(nn.Sequential(nn.Embedding(60, 64)), [("*", {"dtype": "int4", "granularity": PerGroup(32)})])
    ids = torch.tensor([[0, 59], [3, 4]])
    want = model(ids)
    call = {"eager": lambda: model, "compile": lambda: torch.compile(model, fullgraph=True)}.get(
        way, lambda: torch.export.export(model, (ids,)).module()
    )()
    assert_same_bits(call(ids), want)
    for bad in (60, 99, -1, -61):
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            call(torch.tensor([[bad, 0], [0, 0]]))


@pytest.mark.exhaustive  # a compiler for each
@pytest.mark.parametrize("layer", [nn.Conv1d(64, 32, 3), nn.Conv2d(64, 8, 3), nn.ConvTranspose2d(64, 8, 3)], ids=type)
def test_kernels_in_groups_are_compiled(layer):
    sides = (8,) * (layer.weight.ndim - 2)
    x = torch.linspace(-1, 1, 2 * 64 * math.prod(sides)).reshape(2, 64, *sides)
    model = quantize_(nn.Sequential(layer), [("*weight", {"dtype": "int4", "granularity": PerGroup(32)})])
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(x), model(x))


def test_an_operator_s_result_lies_as_the_compiler_is_told():
    scales = torch.tensor([[[1.0, 0.0], [2.0, torch.inf]]]).mT
    found = torch.ops.aqt_lite.unusable_as_nan(scales, False)
    assert found.stride() == (4, 2, 1)
    torch.testing.assert_close(found, torch.tensor([[[1.0, 2.0], [torch.nan, torch.nan]]]), equal_nan=True)


def test_functions_of_torch_take_a_quantized_weight_as_they_take_its_qarray():
    weight = made().head.weight
    x = torch.randn(2, weight.shape[0])
    for y in (torch.matmul(x, weight), x.mm(weight), x @ weight):
        assert_same_bits(y, x @ weight.qarray)
    with pytest.raises(ValueError, match="shape"):
        torch.matmul(torch.ones(2, weight.shape[0] + 1), weight)
    with pytest.raises(TypeError, match=r"functions of torch take arrays.*q\.dequantize\(\)"):
        torch.add(weight, 1)
    with pytest.raises(TypeError, match=r"not a QArray"):
        nn.functional.linear(weight, torch.ones(2, 16))
    assert_same_bits(torch.ones(2, weight.shape[1]) @ weight.T, linear(torch.ones(2, weight.shape[1]), weight.qarray))


def test_what_is_no_qarray_of_torch_is_told_what_to_give(tmp_path):
    for given, words in (
        (torch.ones(2, 3), r"q is a Tensor, not a QArray: quantize it first"),
        (quantize(np.ones((2, 3), "float32")), r"q is a numpy QArray: .* q\.to_backend\('torch'\)"),
    ):
        with pytest.raises(TypeError, match=words):
            QuantizedWeight(given)
    weight = QuantizedWeight(quantize(torch.ones(2, 3)))
    with pytest.raises(TypeError, match=r"leaf 'w': it is a QuantizedWeight: give the \.qarray"):
        aqt_lite.save(tmp_path / "w.npz", {"w": weight})
    with pytest.raises(TypeError, match=r"einsum of .*a layer's weight holds one, \.qarray"):
        aqt_lite.einsum("ab,cb->ac", torch.ones(2, 3), weight)


def test_a_module_of_ones_own_keeps_a_qarray_as_it_keeps_parameters(tmp_path):
    class Scores(nn.Module):
        def __init__(self, q):
            super().__init__()
            self.weight = QuantizedWeight(q)

        def forward(self, x):
            return nn.functional.linear(x, self.weight)

    w = [torch.randn(12, 32, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    made = [Scores(aqt_lite.quantize(values, "int4", granularity=PerGroup(16))) for values in w]
    x = torch.randn(3, 32)
    assert_same_bits(made[0](x), aqt_lite.linear(x, made[0].weight.qarray))
    torch.save(made[1].state_dict(), tmp_path / "scores.pt")
    made[0].load_state_dict(torch.load(tmp_path / "scores.pt", weights_only=True))
    assert_same_bits(made[0](x), made[1](x))
    assert_same_bits(copy.deepcopy(made[0]).half()(x), made[1](x))
    assert_same_bits(torch.compile(made[0], fullgraph=True)(x), torch.compile(made[1], fullgraph=True)(x))
    torch.testing.assert_close(torch.compile(made[0], fullgraph=True)(x), made[1](x), rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="Missing key"):
        made[0].load_state_dict({})


def test_layers_that_hand_a_weight_to_linear_get_its_product():
    """As the attention of torchvision's Swin does, which gives ``qkv.weight`` to a function."""
    layer = quantize_(nn.Linear(16, 8))
    x = torch.randn(2, 16)
    for call in (nn.functional.linear, whole(nn.functional.linear)):
        close(call(x, layer.weight, layer.bias), layer(x))
        close(call(x, weight=layer.weight), linear(x, layer.weight.qarray))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype:UserWarning")  # once a process
def test_fused_layers_of_torch_take_their_other_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.arange(5).expand(2, 5) > 3
    expected = model(x, src_key_padding_mask=padding)
    quantize_(model)
    assert type(model.layers[1].linear2) is QuantizedLinear
    assert type(model.layers[1].self_attn.out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear
    close(model(x, src_key_padding_mask=padding)[:, :4], expected[:, :4], 0.02)


# ---- state dicts


@each
def test_state_dicts_go_through_files(kind):
    rules = RULES[kind]
    model, other = made(rules), made(rules, seed=1)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert not torch.equal(other(IDS), model(IDS))
    result = other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert str(result) == "<All keys matched successfully>"
    assert_same_bits(other(IDS), model(IDS))
    for path, q in quantized_weights(other).items():
        assert_same_bits(q, quantized_weights(model)[path])
    empty = made(rules, seed=2).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert_same_bits(empty(IDS), model(IDS))


def test_state_dicts_of_other_layouts_are_refused():
    def refused(saved, template, words, change=lambda state: None):
        state, model = made(saved).state_dict(), made(template, seed=1)
        change(state)
        before = model.up.weight.qarray.copy()
        with pytest.raises(RuntimeError, match=words):
            model.load_state_dict(state)
        assert_same_bits(model.up.weight.qarray, before)

    def spec(**how):
        return [("up.*", how)]

    refused(
        spec(dtype="int4"),
        spec(dtype="int8"),
        "up.weight was saved as int4 of float32 .* and the model's is int8 of float32",
    )
    groups = [spec(dtype="int4", granularity=PerGroup(n)) for n in (5, 4)]
    refused(*groups, r"up.weight was saved as .*\(..., 1, 5\).* and the model's is .*\(..., 1, 4\)")
    of_affine = "up.weight was saved with storage, scale, and the model's has storage, scale, zero_point"
    refused(spec(), spec(scheme="affine"), of_affine)
    refused(spec(), spec(dtype="mxint8"), "up.weight was saved as int8 .* and the model's is mxint8")
    refused(spec(scale_dtype="float16"), spec(scale_dtype="bfloat16"), "up.weight was saved as .* scales as float16")
    as_floats = lambda state: state.update({"up.weight.storage": state["up.weight.storage"].float()})
    refused(
        None, None, "up.weight.storage was saved with dtype torch.float32, and the model's has torch.int8", as_floats
    )
    as_half = lambda state: state.update({"up.weight.scale": state["up.weight.scale"].half()})
    refused(
        None, None, "up.weight.scale was saved with dtype torch.float16, and the model's has torch.float32", as_half
    )
    refused(None, None, "up.weight.mark is missing", lambda state: state.pop("up.weight.mark"))
    with pytest.raises(RuntimeError, match=r"Missing key.*up.weight.storage[\s\S]*Unexpected key.*up.weight"):
        made().load_state_dict(Model().state_dict())
    with pytest.raises(RuntimeError, match=r"up.weight.mark is missing"):
        made().load_state_dict({"up.weight.storage": torch.zeros(32, 16, dtype=torch.int8)}, strict=False)


def test_scales_that_were_loaded_are_looked_at():
    model, state = made(), made().state_dict()
    expected = model(IDS)  # whose scales were found good
    state["up.weight.scale"] = 0 * state["up.weight.scale"]
    with pytest.raises(RuntimeError, match=r"up.weight.scale has 32 scales of 32 that are 0: it was changed"):
        model.load_state_dict(state)
    assert_same_bits(model(IDS), expected)


# ---- conversions and copies


@some
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversions_leave_codes_and_scales_as_they_are(kind, dtype):
    rules = RULES[kind]
    model = made(rules)
    before = {path: q.copy() for path, q in quantized_weights(model).items()}
    expected = model(IDS)
    for convert in (lambda m: m.to(dtype), lambda m: m.type(dtype), lambda m: m.to("cpu", dtype)):
        converted = convert(copy.deepcopy(model))
        assert converted.up.bias.dtype == converted.embed(IDS).dtype == converted(IDS).dtype == dtype
        for path, q in quantized_weights(converted).items():
            assert_same_bits(q, before[path])
    close(converted.float()(IDS), expected, 0.03 if dtype == torch.bfloat16 else 0.01)
    moved = model.to("meta")
    assert moved(IDS.to("meta")).shape == (6, 7, 50)


@some
def test_copies_and_pickles(kind):
    rules = RULES[kind]
    model = made(rules)
    expected = model(IDS)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model)), again):
        assert_same_bits(other(IDS), expected)
        assert other.up.weight.qarray.storage is other.up.weight.storage
    assert copy.deepcopy(model).up.weight.storage is not model.up.weight.storage


def test_a_pickle_tells_another_process_the_format():
    layer = quantize_(nn.Linear(4, 3), RULES["codebook"])
    code = "import pickle, sys, torch; print(pickle.load(sys.stdin.buffer)(torch.ones(4)).tolist())"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(layer), capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().strip() == str(layer(torch.ones(4)).tolist())


def test_functional_calls():
    model, other = made(), made(seed=1)
    arrays = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    # without tie_weights=False torch (2.13) leaves the new tensors in a module that a model has twice
    assert_same_bits(torch.func.functional_call(model, arrays, (IDS,), tie_weights=False), other(IDS))
    assert_same_bits(model(IDS), made()(IDS))


# ---- derivatives


@some
def test_gradients_reach_the_inputs_and_biases_and_no_scale(kind):
    rules = RULES[kind]
    x = torch.linspace(-2, 2, 6 * 7 * 16).reshape(6, 7, 16)

    def gradients(model):
        with torch.enable_grad():
            v = x.clone().requires_grad_()
            model.of_vectors(v).square().sum().backward()
        return v.grad, model.up.bias.grad

    model = made(rules)
    loose = rules == RULES["activations"]
    for got, expected in zip(gradients(model), gradients(with_values(rules)), strict=True):
        if loose:  # the hidden units that are zero are others
            assert nn.functional.cosine_similarity(got.flatten(), expected.flatten(), dim=0) > 0.98
        else:
            close(got, expected, 1e-4)
    assert not any(buffer.requires_grad for buffer in model.buffers())


# ---- compile, export


def whole(f):
    torch.compiler.reset()
    return torch.compile(f, fullgraph=True, backend="aot_eager")


@pytest.mark.exhaustive_where(kind="activations")
@some
def test_compiled_in_one_graph(kind):
    rules = RULES[kind]
    model = made(rules)
    close(whole(model)(IDS), model(IDS))


@pytest.mark.exhaustive_where(kind="activations")
@some
def test_exported_for_any_batch(kind):
    rules = RULES[kind]
    model = made(rules)
    program = torch.export.export(model, (IDS,), dynamic_shapes=({0: torch.export.Dim("n", min=2, max=512)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    many = IDS.repeat(4, 1)
    close(torch.export.load(file).module()(many), model(many))
    assert "up.weight.storage" in program.state_dict


def test_compiled_gradients():
    model = made()

    def gradient(f):
        with torch.enable_grad():
            v = torch.linspace(-2, 2, 6 * 7 * 16).reshape(6, 7, 16).requires_grad_()
            f(v).square().sum().backward()
        return v.grad

    close(gradient(whole(model.of_vectors)), gradient(model.of_vectors), 1e-4)


LAYERS = {  # what a compiler is to see of a large layer
    "int8": ({}, "product"),
    "affine": ({"dtype": "uint8", "scheme": "affine"}, "product"),
    "groups": ({"granularity": PerGroup(32)}, "stored_product"),
    "packed": ({"dtype": "int4", "granularity": PerGroup(32)}, "stored_product"),
    "kept scales": ({"dtype": "mxfp4"}, "stored_product"),
    "kept in two": ({"dtype": "nvfp4"}, "stored_product"),
}


@pytest.mark.parametrize("how", [{"granularity": PerGroup(32)}, {"dtype": "mxfp4"}], ids=str)
def test_one_graph_serves_any_number_of_rows(how):
    """Though a batch of 2 is as long as the scales of 2 groups, which torch would take for the same length."""
    model = quantize_(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 48)), [("*", how)])
    counted = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend=counted)
    for rows in (2, 3, 8, 9, 40):
        x = torch.randn(rows, 64)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    assert counted.frame_count == 1


@pytest.mark.skipif(not (products.HAS_DOTS and products.DECODES), reason="needs numba, and the operators of torch 2.7")
@pytest.mark.exhaustive_unless(kind=["packed"])  # seconds each
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_a_compiler_sees_one_operator_of_a_large_layer(kind, monkeypatch):
    """And so guards next to nothing: guards took a tenth of the time of four layers."""
    how, operator = LAYERS[kind]
    torch.manual_seed(0)
    layer = quantize_(nn.Linear(1040, 1024, bias=kind == "int8"), [("*", how)])
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op.startswith("call")])
        return graph

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = torch.randn(3, 1040)
    expected = layer(x)
    with monkeypatch.context() as patch:
        patch.setattr(modules, "linear", None)
        assert_same_bits(compiled(x), expected)
    assert len(graphs[0]) == 1
    assert f"aqt_lite.{operator}" in graphs[0][0]
    for rows in (x[0], x.reshape(3, 1, 1040), x[:0], x.to(torch.bfloat16), x.double()):
        torch.compiler.reset()
        y = compiled(rows)
        assert y.shape == (*rows.shape[:-1], 1024)
        torch.testing.assert_close(y, layer(rows), rtol=1e-2 if rows.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"the last axis of x must have length 1040"):
        compiled(torch.randn(3, 1024))
    with torch.enable_grad():
        v = x.clone().requires_grad_()
        torch.compiler.reset()
        compiled(v).sum().backward()
        torch.testing.assert_close(v.grad, layer.weight.qarray.dequantize().sum(0).expand(3, -1), rtol=1e-4, atol=1e-3)


# ---- several processes


@pytest.fixture
def _one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel_takes_a_quantized_model():
    model = made(RULES["groups"])
    expected, before = model(IDS), {path: q.copy() for path, q in quantized_weights(model).items()}
    parallel = nn.parallel.DistributedDataParallel(model)
    with torch.enable_grad():
        y = parallel(IDS)
        y.square().mean().backward()
    assert_same_bits(y.detach(), expected)
    for path, q in quantized_weights(model).items():
        assert_same_bits(q, before[path])
    assert model.up.bias.grad is not None
    again = nn.parallel.DistributedDataParallel(made(RULES["groups"], seed=1))
    again.load_state_dict(parallel.state_dict())
    assert_same_bits(again(IDS), expected)


IN_EACH_PROCESS = """
import sys, torch
from torch import nn
import aqt_lite.torch
from aqt_lite import PerGroup

rank, path = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
torch.manual_seed(rank)  # so that they differ but for what is sent
model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
aqt_lite.torch.quantize_(model, [("1.*", dict(dtype="int4", granularity=PerGroup(32))), ("0.*", {}), ("3.*", None)])
own = model[1].weight.qarray.copy()
parallel = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(parallel.parameters(), 0.1)
ids = torch.arange(16).reshape(2, 8)[rank]
for _ in range(3):
    optimizer.zero_grad()
    parallel(ids).square().mean().backward()
    optimizer.step()
sums = [sum(float(t.double().sum()) for t in tensors) for tensors in (model.parameters(), model.buffers())]
changed = bool((own.storage != model[1].weight.qarray.storage).any())
print(changed, *sums, float(parallel(torch.arange(50)).double().sum()))
torch.distributed.destroy_process_group()
"""


@pytest.mark.exhaustive  # two interpreters
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_two_processes_train_the_model_of_the_first(tmp_path):
    """Codes, scales and parameters are those of the first process in both, and stay alike."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", IN_EACH_PROCESS, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate(timeout=200)[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert [words[0] for words in said] == ["False", "True"]
    assert said[0][1:] == said[1][1:]


# ---- what is not done


def test_the_embedding_table_is_not_dequantized():
    table = quantize_(nn.Embedding(1 << 16, 64), [("weight", {"dtype": "int4", "granularity": PerGroup(32)})])
    ids = torch.arange(64)
    table(ids)
    with torch.profiler.profile(profile_memory=True) as profile:
        table(ids)
    largest = max(event.self_cpu_memory_usage for event in profile.key_averages())
    assert 0 < largest < 64 * 64 * 4 * 8, largest
    tracemalloc.start()  # what NumPy takes
    table(ids)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_the_module_is_imported_when_it_is_asked_for():
    code = (
        "import sys, aqt_lite; assert 'torch' not in sys.modules; import aqt_lite.torch as t;"
        "import torch; assert torch is not t and aqt_lite.torch is t;"
        "assert all(hasattr(t, name) for name in t.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert aqt_lite.torch.quantize_ is quantize_
    assert np.all([getattr(aqt_lite.torch, name).__doc__ for name in aqt_lite.torch.__all__])


def test_arguments_of_other_libraries_are_named():
    for function in (quantize_, aqt_lite.torch.plan):
        with pytest.raises(TypeError, match=r"has no argument 'bits': use rules=.* with dtype='int4'"):
            function(None, bits=4)


# ---- state dicts with QArrays, or with floats for them


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_a_qarray_in_a_state_dict_is_loaded_where_the_model_is_quantized(strict, assign):
    def model():
        return nn.Sequential(nn.Linear(20, 12), nn.Embedding(7, 20), nn.Conv2d(2, 3, 3))

    floats = model()
    saved = {**floats.state_dict(), **quantized_weights(quantize_(copy.deepcopy(floats)))}
    loaded = quantize_(model())
    assert not any(loaded.load_state_dict(saved, strict, assign))
    for name, q in quantized_weights(loaded).items():
        assert_same_bits(q, saved[name])
    for weight, message in (
        (quantize(torch.ones(12, 20), "int4"), r"0.weight was saved as int4.*, and the model's is int8 "),
        (saved["0.weight"].to_backend("numpy"), r"0.weight is a numpy QArray: give its .to_backend\('torch'\)"),
        (torch.ones(12, 20), r"0.weight is a Tensor, and the model's is quantized: load it before"),
    ):
        with pytest.raises(RuntimeError, match=message):
            loaded.load_state_dict({**saved, "0.weight": weight}, strict, assign)
    with pytest.raises(RuntimeError, match=r'named "0.weight".*a QArray .*aqt_lite\.torch\.(QuantizedW|quantize_)'):
        floats.load_state_dict(saved, strict, assign)


def test_sizes_as_torch_asks_for_them():
    q = quantize(torch.ones(12, 20))
    assert q.size == 240
    assert (q.size(), q.size(0), q.size(-1)) == (torch.Size([12, 20]), 12, 20)
    assert type(pickle.loads(pickle.dumps(q.size))) is int
    assert len(torch.utils.data.TensorDataset(q, torch.ones(12))) == 12


# ---- traces of TorchScript


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # shapes are compared, and a trace has one shape
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_traces_of_layers_have_their_derivatives(dtype):
    model = quantize_(nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 5)), [("*.weight", {"dtype": dtype})])
    x = torch.randn(3, 20, requires_grad=True)
    with torch.enable_grad():
        traced, file = torch.jit.trace(model, x), io.BytesIO()
        torch.jit.save(traced, file)
        file.seek(0)
        for again in (traced, torch.jit.load(file)):
            torch.testing.assert_close(again(x + 1), model(x + 1), rtol=1e-5, atol=1e-5)
            (dx,), (expected,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (again, model))
            torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traces_of_other_layers_and_scripts():
    model, x = quantize_(nn.Conv2d(2, 3, 3)), torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(torch.jit.trace(model, x)(x + 1), model(x + 1))
    assert not hasattr(model.weight, "T")
    with pytest.raises(NotImplementedError, match=r"torch.jit.script knows no quantized arrays: use torch.export"):
        torch.jit.script(nn.Sequential(model))
