"""Whole models as trees: which leaves rules choose, what becomes of them, and what is refused."""

from __future__ import annotations

import collections
import io
import re
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from optional import jax, jnp, needs, torch

import aqt_lite
from aqt_lite import (
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    QArray,
    dequantize_tree,
    error_report,
    plan_tree,
    quantize,
    quantize_tree,
    tree_nbytes,
    tree_report,
)
from aqt_lite.formats import FORMATS
from aqt_lite.testing import assert_same_bits


def data(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, "float32")


def model():
    """A tied embedding, leaves of every kind, and things that are no arrays."""
    table = data(50, 16)
    return {
        "embed": {"embedding": table},
        "encoder": {
            "layer0": {"kernel": data(16, 32), "bias": data(32)},
            "layer1": {"kernel": data(32, 16), "bias": data(16)},
            "norm": {"scale": data(16)},
        },
        "head": {"weight": table},
        "step": np.int64(3),
        "more": (data(3), [data(2, 2, 2), None, "text", 7, max]),
    }


def quantized_paths(tree):
    """The paths of QArrays, by JAX's own walk where it knows the tree."""
    return {p for p, leaf in flat(tree).items() if isinstance(leaf, QArray)}


def flat(tree, path=""):
    if isinstance(tree, dict):
        pairs = tree.items()
    elif isinstance(tree, list | tuple):
        pairs = enumerate(tree)
    else:
        return {path: tree}
    return {p: leaf for key, child in pairs for p, leaf in flat(child, f"{path}/{key}" if path else str(key)).items()}


# ---- which leaves


KERNELS = {"encoder/layer0/kernel", "encoder/layer1/kernel"}
MATRICES = {*KERNELS, "embed/embedding", "head/weight"}


def test_without_rules_matrices_become_int8_with_a_scale_for_each_output():
    tree = model()
    q = quantize_tree(tree)
    assert quantized_paths(q) == MATRICES
    kernel, table = q["encoder"]["layer0"]["kernel"], q["embed"]["embedding"]
    assert_same_bits(kernel, quantize(tree["encoder"]["layer0"]["kernel"], granularity=PerChannel(1)).for_dense())
    assert_same_bits(table, quantize(tree["embed"]["embedding"], granularity=PerChannel(0)))
    for path, leaf in flat(tree).items():
        assert path in MATRICES or flat(q)[path] is leaf, path


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        (["*"], None),
        (["encoder/*/kernel"], KERNELS),
        (["encoder/layer?/*"], KERNELS),
        (["*kernel"], KERNELS),
        (["encoder/*", "embed/*", "head/*"], MATRICES),
        ([re.compile(r"encoder/\w+0/.*")], {"encoder/layer0/kernel"}),
        (["[!h]*/kernel"], KERNELS),
    ],
    ids=lambda value: "some" if isinstance(value, (set, frozenset)) else str(value),  # a set has no order
)
def test_patterns(patterns, chosen):
    rules = [(pattern, {}) for pattern in patterns]
    if chosen is None:
        rules, chosen = [("more/1/0", None), *rules], MATRICES
    assert quantized_paths(quantize_tree(model(), rules)) == chosen


def test_a_regular_expression_has_to_match_the_whole_path():
    with pytest.raises(ValueError, match=r"rule 1 \('kernel'\) matches no leaf"):
        quantize_tree(model(), [(re.compile("kernel"), {})])


def test_a_rule_after_a_wider_one_is_told_of():
    with pytest.warns(
        UserWarning, match=r"rule 2 \('\*layer0\*'\) decides nothing: .*encoder/layer0/kernel.* rule 1"
    ) as told:
        quantize_tree(model(), [("encoder/*", {}), ("*layer0*", None)])
    assert len(told) == 1
    assert told[0].filename == __file__
    with pytest.warns(UserWarning, match="narrower rule first"):
        aqt_lite.plan_tree(model(), [("encoder/*", {}), ("*layer0*", None)])
    quantize_tree(model(), [("*/kernel", {}), ("encoder/*", {})])  # all that is left, and nothing is


def test_the_first_rule_that_matches_wins_and_none_leaves_alone():
    rules = [("*layer0*", {"dtype": "int4"}), ("*layer1*", None), ("encoder/*", {"dtype": "nf4"}), ("more/1/0", None)]
    q = quantize_tree(model(), [*rules, ("*", {"dtype": "uint8", "scheme": "affine"})])
    kinds = {p: leaf.dtype for p, leaf in flat(q).items() if isinstance(leaf, QArray)}
    assert kinds == {"encoder/layer0/kernel": "int4", "embed/embedding": "uint8", "head/weight": "uint8"}


def test_a_tree_of_which_nothing_is_quantized_is_told_of():
    tree = {"norm": {"scale": data(16), "bias": data(3)}, "step": np.arange(3)}
    words = r"nothing was quantized; of 3 arrays the largest is 'norm/scale' of shape \(16,\): without rules only"
    with pytest.warns(UserWarning, match=words) as told:
        same = quantize_tree(tree)
    assert same["norm"]["scale"] is tree["norm"]["scale"]
    assert [warning.filename for warning in told] == [__file__]
    quantize_tree(tree, [("*", None)])  # asked for: no warning, which would be an error here
    quantize_tree({"kernel": quantize_tree({"kernel": data(4, 4)})["kernel"], "bias": data(4)})  # done before
    quantize_tree({})


def test_small_leaves_are_quantized_where_a_rule_says_that_they_are_no_weights():
    tree = model()
    q = quantize_tree(tree, [("*bias", {"layout": None}), ("*norm*", {"layout": None, "granularity": PerGroup(4)})])
    assert_same_bits(q["encoder"]["layer0"]["bias"], quantize(tree["encoder"]["layer0"]["bias"]))
    assert q["encoder"]["norm"]["scale"].granularity == PerGroup(4)
    with pytest.raises(ValueError, match=r"'\*bias'.* matches encoder/layer0/bias, and .* say that to quantize it"):
        quantize_tree(tree, [("*bias", {"granularity": PerTensor()})])


# ---- layouts


@pytest.mark.parametrize("dtype", sorted(FORMATS))
def test_scales_lie_along_what_products_sum_over(dtype):
    """A kernel (in, out) has the codes and scales of its transpose (out, in), whatever the format."""
    if FORMATS[dtype].element.middle and not FORMATS[dtype].element.signed:
        spec = {"dtype": dtype, "scheme": "affine"}
    else:
        spec = {"dtype": dtype}
    weight = data(24, 70)
    groups = FORMATS[dtype].group or 10
    for more in ({}, {"granularity": PerGroup(groups)}):
        q = quantize_tree({"kernel": weight.T, "weight": weight}, [("*", spec | more)])
        assert q["kernel"].transposed
        assert_same_bits(np.ascontiguousarray(q["kernel"].qvalue.T), q["weight"].qvalue)
        if dtype != "nvfp4":  # whose scales have one scale, of all of them
            assert_same_bits(np.ascontiguousarray(q["kernel"].scales.T), q["weight"].scales)
        x = data(3, 70)
        dense, linear = aqt_lite.dense(x, q["kernel"]), aqt_lite.linear(x, q["weight"])
        np.testing.assert_allclose(dense, linear, rtol=1e-5, atol=1e-4)


def test_the_layout_is_said_by_the_spec_the_call_the_library_or_the_name():
    w = data(6, 8)
    for name, given in (("kernel", PerChannel(1)), ("weight", PerChannel(0)), ("embedding", PerChannel(0))):
        assert quantize_tree({name: w})[name].granularity == given
    with pytest.raises(ValueError, match=r"^w: .* does not tell \(in, out\) from \(out, in\): give layout='dense'"):
        quantize_tree({"w": w})
    assert quantize_tree({"w": w}, layout="dense")["w"].granularity == PerChannel(1)
    assert quantize_tree({"kernel": w}, layout="linear")["kernel"].granularity == PerChannel(0)
    assert quantize_tree({"kernel": w}, [("*", {"layout": "linear"})], layout="dense")["kernel"].block == (1, None)
    assert quantize_tree({"w": w}, [("*", {"layout": None})])["w"].granularity == PerTensor()
    assert quantize_tree({"w": torch.asarray(w)})["w"].granularity == PerChannel(0)
    for wrong in ({"rules": [("*", {"layout": "rows"})]}, {"layout": "rows"}):
        with pytest.raises(ValueError, match="layout='rows' is not known: use 'linear', 'dense' or None"):
            quantize_tree({"w": w}, **wrong)


def test_a_granularity_that_does_not_fit_the_layout_is_refused():
    tree = {"kernel": data(64, 32)}
    for wrong in (PerChannel(0), PerGroup(8, 1), PerBlock((1, 8))):
        with pytest.raises(ValueError, match=r"^kernel: .* each input a scale of its own in layout='dense'"):
            quantize_tree(tree, [("*", {"granularity": wrong})])
        q = quantize_tree(tree, [("*", {"granularity": wrong, "layout": None})])["kernel"]
        assert_same_bits(q, quantize(tree["kernel"], granularity=wrong))
    for right in (PerTensor(), PerChannel(1), PerGroup(16, 0), PerBlock((8, 8))):
        q = quantize_tree(tree, [("*", {"granularity": right})])["kernel"]
        assert_same_bits(q, quantize(tree["kernel"], granularity=right).for_dense())


def test_a_dialect_that_makes_whole_arrays_chooses_their_blocks():
    rules, w = [("*", {"dtype": "q4_0", "dialect": "gguf"})], data(6, 64)
    expected = quantize(w, "q4_0", dialect="gguf")
    plan = plan_tree({"weight": w}, rules)
    assert plan.plans[0].becomes == "q4_0, PerGroup(size=32, axis=-1), scales float16"
    assert plan.nbytes == expected.nbytes == 6 * 36
    stack = data(2, 6, 64)
    for array, rule in (
        (stack, [("*", {**rules[0][1], "layout": None})]),
        (w, [("*", {**rules[0][1], "layout": None})]),
    ):
        assert_same_bits(quantize_tree({"w": array}, rule)["w"], quantize(array, "q4_0", dialect="gguf"))
    for tree, more, words in [
        ({"kernel": w}, {}, "^kernel: dialect='gguf', which makes PerGroup.*, gives each input a scale of its own"),
        ({"w": w}, {}, "^w: .* its path does not tell"),
        ({"weight": w}, {"granularity": PerGroup(32)}, "^weight: granularity is given, but dialect='gguf'"),
        ({"weight": data(64, 6)}, {}, r"^weight: x has shape \(1, 6\): q4_0 takes 32"),
        ({"weight": w}, {"dialect": "gguff"}, "^weight: dialect='gguff' is not known"),
    ]:
        for function in (quantize_tree, plan_tree):
            with pytest.raises(ValueError, match=words):
                function(tree, [("*", {**rules[0][1], **more})])
    for array in (w, torch.asarray(w), jnp.asarray(w)):
        assert_same_bits(quantize_tree({"weight": array}, rules)["weight"], expected)


def test_more_dimensions_need_a_granularity_or_a_layout():
    tree = {"conv": {"kernel": data(3, 3, 8, 16)}}
    with pytest.raises(ValueError, match=r"^conv/kernel: .* give a granularity"):
        quantize_tree(tree, [("*", {})])
    with pytest.raises(ValueError, match=r"^conv/kernel: .* give a granularity"):
        quantize_tree(tree, [("*", {})], layout="dense")
    by_layout = quantize_tree(tree, [("*", {"layout": "dense"})])["conv"]["kernel"]
    assert by_layout.granularity == PerChannel(3)
    grouped = quantize_tree(tree, [("*", {"layout": "dense", "granularity": PerGroup(4)})])["conv"]["kernel"]
    assert grouped.granularity == PerGroup(4, 2)
    stack = quantize_tree({"kernel": data(4, 8, 8)}, [("*", {"granularity": PerBlock((1, -1, 1))})])["kernel"]
    assert stack[2].granularity == PerChannel(1)
    with pytest.warns(UserWarning, match="the largest is 'conv/kernel'"):
        assert quantize_tree(tree) == tree


# ---- what is refused, and where


@pytest.mark.parametrize(
    ("rules", "error", "words"),
    [
        (
            [("encoder/*/kernal", {})],
            ValueError,
            r"rule 1 \('encoder/\*/kernal'\) matches no leaf: .*encoder/layer0/kernel",
        ),
        ([("kernel", {})], ValueError, r"a pattern is about the whole path: '\*/kernel' matches encoder/layer0/kernel"),
        ([("encoder.layer0", {})], ValueError, r"'encoder/layer0/\*' matches encoder/layer0/"),
        ([("layer1", {})], ValueError, r"'\*/layer1/\*' matches encoder/layer1/"),
        (
            [(r"encoder/\w+/kernel", {})],
            ValueError,
            r"as a regular expression, re.compile\(.*\), it matches encoder/layer0/kernel",
        ),
        (
            [("*", {"granularty": 1})],
            TypeError,
            r"rule 1 \('\*'\): there is no 'granularty': did you mean 'granularity'",
        ),
        ([("*", {"Dtype": "int8"})], TypeError, "did you mean 'dtype'"),
        ([("*", {"bits": 4})], TypeError, "there is no 'bits': use dtype='int4'"),
        ([("*", {"qqq": 4})], TypeError, "there is no 'qqq'; a spec has dtype, scheme, granularity"),
        ([("*", {"activations": "int8"})], TypeError, "there is no 'activations'"),
        ([("*kernel", {"dtype": "int99"})], ValueError, "^encoder/layer0/kernel: dtype='int99'"),
        ([("*kernel", {"granularity": PerChannel(5)})], ValueError, "^encoder/layer0/kernel: PerChannel"),
        ([("*kernel", {"scheme": "sym"})], ValueError, "^encoder/layer0/kernel: scheme='sym'"),
        ([("*kernel", {"backend": "nope"})], ValueError, "^encoder/layer0/kernel: backend='nope'"),
        ([("step", {"layout": None})], TypeError, "^step: it has dtype int64"),
        ([("embed/*", {})], ValueError, "embed/embedding and head/weight are one array, but there is rule 1"),
        ([("embed/*", {}), ("head/*", {"dtype": "int4"})], ValueError, "rule 1 .* and rule 2 .* for head/weight"),
        ([("embed/*", None), ("*", {})], ValueError, "embed/embedding and head/weight are one array"),
        ({"*": {}}, TypeError, "rules is a dict"),
        ("*", TypeError, "rules is a str"),
        (["*"], TypeError, r"rule 1 is '\*': give a pair"),
        ([("*", "int4")], TypeError, r"rule 1 \('\*'\): the spec is a str"),
        ([(5, {})], TypeError, "rule 1: the pattern is a int"),
        ([(re.compile(b"x"), {})], TypeError, "rule 1: the pattern"),
    ],
    ids=str,
)
def test_mistakes_in_rules(rules, error, words):
    for function in (quantize_tree, plan_tree):
        if "nope" in words and function is plan_tree:
            continue
        with pytest.raises(error, match=words):
            function(model(), rules)


def test_rules_that_say_the_same_of_tied_leaves_agree():
    q = quantize_tree(model(), [("embed/*", {"dtype": "int4"}), ("head/*", {"dtype": "int4"})])
    assert q["embed"]["embedding"] is q["head"]["weight"]
    assert quantized_paths(quantize_tree(model(), [("embed/*", None), ("*kernel", {})])) == KERNELS


@pytest.mark.parametrize(
    ("leaf", "error", "words"),
    [
        (np.asarray([[1.0, np.nan]], "float32"), ValueError, r"^a/weight: x has 1 non-finite values of 2.* \(0, 1\)"),
        (np.ones((2, 2), int), TypeError, "^a/weight: it has dtype int64"),
        (np.ones((2, 2), object), TypeError, "^a/weight: "),
        (quantize(np.ones((2, 2), "float32")), TypeError, "^a/weight: it is a QArray already"),
    ],
    ids=["NaN", "integers", "objects", "QArray"],
)
def test_a_leaf_that_cannot_be_quantized_is_named_and_nothing_is_done(leaf, error, words):
    tree = {"first": {"weight": data(4, 4)}, "a": {"weight": leaf}}
    before = tree["first"]["weight"].copy()
    with pytest.raises(error, match=words):
        quantize_tree(tree, [("*", {})])
    assert tree["a"]["weight"] is leaf
    assert_same_bits(tree["first"]["weight"], before)


@pytest.mark.parametrize(
    ("flat", "words"), [("a", ""), ("ac", " (and 1 more: c)"), ("abdfg", " (and 4 more: b, d, f, ...)")]
)
def test_every_leaf_that_a_rule_does_not_fit_is_named(flat, words):
    tree = {name: data(4, 8) if name in flat else data(4, 8, 3) for name in "abcdefgh"}
    for function in (quantize_tree, plan_tree):
        with pytest.raises(ValueError, match=rf"^a: PerChannel\(axis=2\): .*{re.escape(words)}$") as raised:
            function(tree, [("*", {"granularity": PerChannel(2), "layout": None})])
        assert str(raised.value).count(" more: ") == bool(words)


def test_array_likes_that_are_refused_say_what_to_pass():
    pd = type("Frame", (), {"__module__": "pandas", "shape": (2, 2), "dtype": None})()
    with pytest.raises(TypeError, match=r"^weight: it is of type pandas.Frame, .*\.to_numpy\(\)"):
        quantize_tree({"weight": pd}, [("*", {})])


def test_what_is_no_tree():
    loop = [data(2, 2)]
    loop.append({"again": loop})
    for function in (quantize_tree, plan_tree, dequantize_tree, tree_nbytes):
        with pytest.raises(ValueError, match=r"^1/again: this list contains itself"):
            function(loop)
        for wrong in (object(), "text", 5, None):
            with pytest.raises(TypeError, match="neither an array nor a tree of arrays"):
                function(wrong)


# ---- containers


Pair = collections.namedtuple("Pair", ["weight", "rest"])


class ReadOnly(collections.abc.Mapping):
    def __init__(self, pairs=()):
        self._known = dict(pairs)

    def __getitem__(self, key):
        return self._known[key]

    def __iter__(self):
        return iter(self._known)

    def __len__(self):
        return len(self._known)


def test_containers_stay_what_they_are():
    default = collections.defaultdict(list, weight=data(4, 4))
    ordered = collections.OrderedDict(weight=data(4, 4))
    ordered.attribute = "kept"
    tree = [Pair(data(4, 4), ()), default, ordered, ReadOnly({"weight": data(4, 4)}), {3: {"weight": data(2, 2)}}]
    q = quantize_tree(tree)
    assert [type(node) for node in q] == [type(node) for node in tree]
    assert isinstance(q[0].weight, QArray)
    assert q[1].default_factory is list
    assert q[2].attribute == "kept"
    assert all(isinstance(node["weight"], QArray) for node in q[1:4])
    assert [plan.leaf.path for plan in plan_tree(tree).plans][-1] == "4/3/weight"
    assert not isinstance(default["weight"], QArray)
    assert isinstance(quantize_tree(data(4, 4), layout="linear"), QArray)  # the smallest tree


def test_backends(backend):
    """The same codes wherever the leaves are."""
    tree = {"a": {"kernel": data(16, 8)}, "b": [data(8)]}
    moved = {"a": {"kernel": backend.asarray(tree["a"]["kernel"])}, "b": [backend.asarray(tree["b"][0])]}
    spec = [("*", {"dtype": "int4", "layout": "dense", "granularity": PerGroup(4)})]
    q, expected = quantize_tree(moved, spec), quantize_tree(tree, spec)
    assert q["a"]["kernel"].backend == backend.name
    assert_same_bits(q["a"]["kernel"], expected["a"]["kernel"])
    assert q["b"][0] is moved["b"][0]
    assert_same_bits(dequantize_tree(q)["a"]["kernel"], expected["a"]["kernel"].dequantize())
    assert plan_tree(moved, spec).nbytes == tree_nbytes(q) == tree_nbytes(expected)
    assert tree_nbytes(moved) == tree_nbytes(tree) == 4 * (16 * 8 + 8)
    assert str(tree_report(moved, q)) == str(tree_report(tree, expected))
    elsewhere = quantize_tree(moved, [("*kernel", {"backend": "numpy"})])
    assert elsewhere["a"]["kernel"].backend == "numpy"


def test_pytrees_of_jax():
    @jax.tree_util.register_pytree_with_keys_class
    class Layer:
        def __init__(self, *leaves):
            self.leaves = leaves

        def tree_flatten_with_keys(self):
            names = ("kernel", "bias", "nothing")
            return tuple(zip(map(jax.tree_util.GetAttrKey, names), self.leaves, strict=True)), "static"

        @classmethod
        def tree_unflatten(cls, static, leaves):
            assert static == "static"
            return cls(*leaves)

    kernel = jnp.asarray(data(8, 4))
    tree = {"layers": [Layer(kernel, jnp.zeros(4), None), Layer(kernel, jnp.ones(4), None)]}
    plans = plan_tree(tree).plans
    assert plans[0].leaf.paths == ("layers/0/kernel", "layers/1/kernel")
    q = quantize_tree(tree)
    first, second = q["layers"]
    assert type(first) is Layer
    assert first.leaves[0] is second.leaves[0]
    assert_same_bits(first.leaves[0], quantize(kernel, granularity=PerChannel(1)).for_dense())
    assert second.leaves[1] is tree["layers"][1].leaves[1]
    shapes = jax.eval_shape(lambda: tree)
    assert str(plan_tree(shapes, layout="dense")).count("kernel") == 2  # shapes are not known to be tied
    in_jit = jax.jit(quantize_tree)({"kernel": kernel})["kernel"]
    assert_same_bits(in_jit, quantize_tree({"kernel": kernel})["kernel"])


def test_leaves_of_jax_that_are_no_numbers_stay():
    tree = {"kernel": jnp.ones((4, 4)), "key": jax.random.key(0), "shape": jax.ShapeDtypeStruct((3,), "float32")}
    q = quantize_tree(tree)
    assert q["key"] is tree["key"]
    assert q["shape"] is tree["shape"]
    assert tree_nbytes({"key": tree["key"]}) == 8


def test_a_state_dict_of_torch():
    layer = torch.nn.Linear(8, 4)
    tied = torch.nn.ModuleDict({"a": layer, "b": torch.nn.Linear(8, 4), "bn": torch.nn.BatchNorm1d(4)})
    tied["b"].weight = layer.weight
    state = tied.state_dict()
    assert state["a.weight"] is not state["b.weight"]  # torch makes a tensor for each
    q = quantize_tree(state)
    assert q["a.weight"] is q["b.weight"]
    assert type(q) is type(state)
    assert q._metadata == state._metadata
    assert_same_bits(q["a.weight"], quantize(layer.weight.detach(), granularity=PerChannel(0)))
    back = dequantize_tree(q)
    assert back["a.weight"] is back["b.weight"]
    meta = torch.nn.Linear(8, 4, device="meta").state_dict()
    assert plan_tree(meta).nbytes == 4 * 8 + 4 * 4 + 4 * 4


# ---- numbers


SPECS = [
    {},
    {"dtype": "uint4", "scheme": "affine"},
    {"dtype": "int3", "scheme": "affine", "offset": "data"},
    {"dtype": "int4", "granularity": PerGroup(5), "scale_dtype": "float16"},
    {"dtype": "nf4", "granularity": PerGroup(8), "scale_dtype": "int8"},
    {"dtype": "mxfp4"},
    {"dtype": "nvfp4"},
    {"dtype": "int16", "scale": 0.01, "zero_point": 3},
    {"rounding": "stochastic", "key": 3, "on_clip": "raise"},
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_plan_is_what_happens(spec, dtype):
    tree = {"kernel": data(33, 17).astype(dtype), "weight": data(33, 17).astype(dtype), "bias": data(33)}
    plan, q = plan_tree(tree, [("*", spec)]), quantize_tree(tree, [("*", spec)])
    assert plan.nbytes == tree_nbytes(q)
    assert plan.source_nbytes == tree_nbytes(tree) == sum(a.nbytes for a in tree.values())
    by_path = {p.leaf.path: p for p in plan.plans}
    for name in ("kernel", "weight"):
        assert by_path[name].nbytes() == q[name].nbytes
        assert by_path[name].becomes.startswith(f"{q[name].dtype}, {q[name].granularity}")
    lines = str(plan).splitlines()
    assert [line.split()[0] for line in lines] == ["leaf", "kernel", "weight", "bias", "3"]
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[3].split()[2:6] == ["float32", "as", "it", "is"]


def test_a_report_has_the_worst_leaf_first():
    tree = model()
    q = quantize_tree(
        tree, [("*layer1*", {"dtype": "int2"}), ("*layer0*", {"dtype": "int4"}), ("more/1/0", None), ("*", {})]
    )
    report = tree_report(tree, q)
    assert [leaf.path for leaf in report.leaves] == [
        "encoder/layer1/kernel",
        "encoder/layer0/kernel",
        "embed/embedding",  # once, though it stands twice
    ]
    for leaf in report.leaves:
        assert leaf.error == error_report(flat(tree)[leaf.path], flat(q)[leaf.path], worst=1)
    assert report.nbytes == sum(leaf.error.nbytes for leaf in report.leaves)
    assert str(report).splitlines()[-1].startswith("3 leaves")
    assert "encoder/layer1/kernel  (32, 16)  int2, PerChannel(axis=1)" in str(report)


def test_a_report_on_other_trees_is_refused():
    tree = {"a": {"weight": data(4, 4)}, "b": data(3)}
    q = quantize_tree(tree)
    with pytest.raises(ValueError, match="different structures: one has c, the other b"):
        tree_report({"a": tree["a"], "c": tree["b"]}, q)
    with pytest.raises(ValueError, match="different structures: one has b, the other None"):
        tree_report(tree, {"a": q["a"]})
    with pytest.raises(ValueError, match=r"^a/weight: x has shape \(5, 4\)"):
        tree_report({"a": {"weight": data(5, 4)}, "b": tree["b"]}, q)


def test_quantized_trees_dequantize_to_another_type_and_name_what_overflows():
    q = quantize_tree({"weight": np.full((2, 2), 1e30, "float32")})
    assert dequantize_tree(q, "float64")["weight"].dtype == np.float64
    with pytest.raises(ValueError, match=r"^weight: "):
        dequantize_tree(q, "float16")


# ---- memory, progress


def test_beside_the_result_there_is_room_for_one_leaf():
    leaf = 4 * 512 * 1024
    tree = {f"layer{i}": {"kernel": data(512, 1024, seed=i)} for i in range(12)}
    quantize_tree({"kernel": data(512, 1024)})  # whatever is loaded on first use
    tracemalloc.start()
    try:
        q = quantize_tree(tree)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tree_nbytes(q) <= kept < tree_nbytes(q) + leaf / 8
    assert peak < kept + leaf, (peak - kept) / leaf


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_said_on_terminals_where_it_takes_long(monkeypatch):
    def said(to, **arguments):
        monkeypatch.setattr(sys, "stderr", to)
        quantize_tree(model(), **arguments)
        return to.getvalue()

    assert said(Terminal()) == ""  # done before anyone wonders
    assert said(io.StringIO()) == ""
    line = said(io.StringIO(), progress=True)
    assert "1/3 embed/embedding" in line
    assert "3/3 encoder/layer1/kernel" in line
    assert line.endswith("\r\x1b[K")  # nothing is left of it
    monkeypatch.setattr(aqt_lite.trees, "_SILENT_SECONDS", 0.0)
    assert "2/3" in said(Terminal())
    assert said(Terminal(), progress=False) == ""
    assert said(io.StringIO()) == ""
    seen = []
    assert said(Terminal(), progress=lambda leaves: seen.append(len(leaves)) or leaves) == ""
    assert seen == [3]


@needs("jax", "torch")
def test_no_framework_is_imported_for_trees_of_numpy():
    code = (
        "import sys, numpy as np, aqt_lite\n"
        "q = aqt_lite.quantize_tree({'a': [{'kernel': np.ones((4, 4), 'float32')}], 'b': object()})\n"
        "aqt_lite.dequantize_tree(q)\n"
        "assert not {'jax', 'torch', 'matplotlib', 'equinox'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
