"""Equinox models with quantized weights.

Owns: which of Equinox's layers can have one, and those that take the place of layers which call JAX's functions.
Imports: the rules, trees, the functions, Equinox. ``aqt_lite.equinox`` is where users find it.

A model stays a tree, with QArrays in the place of weights. ``Linear`` and the recurrent cells write ``weight @ x``,
which a QArray answers. ``Embedding`` and convolutions become subclasses of themselves, put there by ``eqx.tree_at``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Array
from aqt_lite._rules import Axes, Leaf, Planned, Rules, check_activations, named, to_quantize
from aqt_lite.backends.jax import functions, layers
from aqt_lite.ops import dot_general
from aqt_lite.qarray import QArray
from aqt_lite.trees import Progress, TreePlan, layout_of, leaves_of, places_of, quantized_already, quantized_as_planned

__all__ = [
    "QuantizedConv",
    "QuantizedConvTranspose",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "plan",
    "quantize",
]


@naming_the_argument
def quantize(model: Any, rules: Rules | None = None, *, progress: Progress = None) -> Any:
    """Quantize weights of an Equinox model: a new one, with those of its layers quantized that rules choose.

    Parameters
    ----------
    model : eqx.Module
    rules : list of (pattern, spec), optional
        As for :func:`aqt_lite.quantize_tree`; paths are ``"layers/0/weight"``. The spec of a Linear layer may have
        ``activations="int8"``: then its input is quantized, too. Without rules, the weight of every Linear, Embedding,
        Conv and ConvTranspose, and those of GRUCell and LSTMCell, become int8 with a scale for each output.
    progress : bool or function, optional
        As for :func:`aqt_lite.quantize_tree`.

    Returns
    -------
    eqx.Module
        Of the same structure. A weight that stood in several places is quantized once, and stands in all of them.

    Raises
    ------
    ValueError, TypeError
        As :func:`aqt_lite.quantize_tree`; a rule for the weight of a subclass of Embedding or Conv, which may use it in
        other ways.

    Notes
    -----
    Layers know what the axes of their weights are for, so that ``layout`` is not said. Leading axes that
    ``eqx.filter_vmap`` gave a layer, for a scan over layers, have scales of their own each.

    Convolutions whose windows overlap or are padded dequantize their kernel at each call: that saves memory, not time.

    Scales get a derivative of 0 from ``eqx.filter_grad`` unless an array was made ``with_trainable_scales()``. What
    changes parameters without a derivative, weight decay for instance, is kept off by
    :func:`aqt_lite.jax.partition` and ``combine``.

    Examples
    --------
    >>> import equinox as eqx, jax, jax.numpy as jnp, aqt_lite.equinox
    >>> mlp = eqx.nn.MLP(64, 10, 128, 2, key=jax.random.key(0))
    >>> small = aqt_lite.equinox.quantize(mlp, [("*/weight", dict(dtype="int4", granularity=aqt_lite.PerGroup(32)))])
    >>> eqx.filter_jit(lambda model, x: jax.vmap(lambda row: model(row))(x))(small, jnp.ones((5, 64))).shape
    (5, 10)
    """
    plans = _plans(model, rules)
    made = quantized_as_planned(model, to_quantize(plans, rules, quantized_already(leaves_of(model))), progress)
    activations = {path: found.extra.get("activations") for found in plans for path in found.leaf.paths}
    places, replacements = [], []
    for place, (path, layer) in enumerate(_layers(made)):
        asked = activations.get(_joined(path, "weight"))
        kind = _BECOMES.get(type(layer)) or (QuantizedLinear if asked is not None else None)
        if kind is not None and isinstance(layer.weight, QArray):
            places.append(place)
            replacements.append(_exchanged(layer, kind, **({} if asked is None else {"activations": asked})))
    if not places:
        return made

    def chosen(tree: Any) -> list[Any]:
        found = _layers(tree)
        return [found[place][1] for place in places]

    return eqx.tree_at(chosen, made, replacements)


@naming_the_argument
def plan(model: Any, rules: Rules | None = None) -> TreePlan:
    """What :func:`quantize` would do, as a table; see :func:`aqt_lite.plan_tree`.

    ``model`` may be one of shapes, of ``eqx.filter_eval_shape``.

    Examples
    --------
    >>> import equinox as eqx, jax, aqt_lite.equinox
    >>> print(aqt_lite.equinox.plan(eqx.nn.Linear(64, 32, key=jax.random.key(0))))
    leaf    shape     of       becomes                   bytes  after
    weight  (32, 64)  float32  int8, PerChannel(axis=0)   8192   2176
    bias    (32,)     float32  as it is                    128    128
    2 leaves                                              8320   2304  (3.61x smaller)
    """
    return TreePlan(tuple(_plans(model, rules)))


# ---- layers


class QuantizedEmbedding(eqx.nn.Embedding):
    """``eqx.nn.Embedding`` with a quantized table, of which only the row that is looked up is dequantized."""

    def __call__(self, x: Any, *, key: Any = None) -> Array:
        """The row at ``x``, a scalar."""
        if not isinstance(self.weight, QArray) or jnp.shape(x) != ():
            return super().__call__(x, key=key)
        return self.weight.take(jnp.asarray(x)).dequantize()


class QuantizedConv(eqx.nn.Conv):
    """``eqx.nn.Conv`` with a quantized kernel; where windows neither overlap nor are padded, it stays quantized."""

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """The convolution."""
        if self.padding_mode != "ZEROS" or x.ndim != self.num_spatial_dims + 1:
            return eqx.nn.Conv.__call__(_with_values(self), x, key=key)
        y = functions.conv_general_dilated(
            jnp.expand_dims(x, 0),
            self.weight,
            self.stride,
            self.padding,
            rhs_dilation=self.dilation,
            feature_group_count=self.groups,
        )[0]
        return y if self.bias is None else y + self.bias


class QuantizedConvTranspose(eqx.nn.ConvTranspose):
    """``eqx.nn.ConvTranspose`` with a quantized kernel, dequantized at each call: it saves memory, not time."""

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """The transposed convolution."""
        return eqx.nn.ConvTranspose.__call__(_with_values(self), x, key=key)


class QuantizedLinear(eqx.nn.Linear):
    """``eqx.nn.Linear`` with a quantized weight, whose input is quantized as well; with int8, sums are of integers."""

    activations: str = eqx.field(static=True)

    def __call__(self, x: Array, *, key: Any = None) -> Array:
        """The product."""
        weight: Any = _OfQuantized(self.weight, self.activations) if isinstance(self.weight, QArray) else self.weight
        return eqx.nn.Linear.__call__(_exchanged(self, type(self), weight=weight), x, key=key)


@dataclasses.dataclass(frozen=True)
class _OfQuantized:
    """A weight whose ``@`` quantizes the other side first."""

    weight: QArray
    activations: str

    def __matmul__(self, x: Array) -> Array:
        return dot_general(x, self.weight, (((0,), (1,)), ((), ())), activations=self.activations)


def _with_values(layer: Any) -> Any:
    """The same layer with the values of its weight."""
    (weight,) = layers.with_values([layer.weight])
    return _exchanged(layer, type(layer), weight=weight)


def _exchanged(layer: Any, kind: type, **others: Any) -> Any:
    """A layer of that class with the same fields, but for some."""
    made: Any = object.__new__(kind)
    for f in dataclasses.fields(kind):
        object.__setattr__(made, f.name, others[f.name] if f.name in others else getattr(layer, f.name))
    return made


_BECOMES: dict[type, type] = {
    eqx.nn.Embedding: QuantizedEmbedding,
    **dict.fromkeys((eqx.nn.Conv, eqx.nn.Conv1d, eqx.nn.Conv2d, eqx.nn.Conv3d), QuantizedConv),
    **dict.fromkeys(
        (eqx.nn.ConvTranspose, eqx.nn.ConvTranspose1d, eqx.nn.ConvTranspose2d, eqx.nn.ConvTranspose3d),
        QuantizedConvTranspose,
    ),
}


def _length(features: Any) -> int:
    return 1 if features == "scalar" else int(features)


def _kernel(layer: Any) -> tuple[int, ...]:
    return (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)


_SHAPES: dict[type, dict[str, Callable[[Any], tuple[int, ...]]]] = {
    eqx.nn.Linear: {"weight": lambda layer: (_length(layer.out_features), _length(layer.in_features))},
    eqx.nn.Embedding: {"weight": lambda layer: (layer.num_embeddings, layer.embedding_size)},
    eqx.nn.Conv: {"weight": _kernel},
    eqx.nn.ConvTranspose: {"weight": _kernel},
    eqx.nn.GRUCell: {
        "weight_ih": lambda cell: (3 * cell.hidden_size, cell.input_size),
        "weight_hh": lambda cell: (3 * cell.hidden_size, cell.hidden_size),
    },
    eqx.nn.LSTMCell: {
        "weight_ih": lambda cell: (4 * cell.hidden_size, cell.input_size),
        "weight_hh": lambda cell: (4 * cell.hidden_size, cell.hidden_size),
    },
}
"""The weights of layers that can have quantized ones, (out, in, ...) all of them, and the shapes they are made with."""

_REPLACED = (eqx.nn.Embedding, eqx.nn.Conv, eqx.nn.ConvTranspose)


# ---- the plan


def _is_known(node: Any) -> bool:
    return isinstance(node, tuple(_SHAPES))


def _layers(model: Any) -> list[tuple[str, Any]]:
    """The layers of a model that can have quantized weights, with their paths, in order."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_known)
    return [(_in_words(path), node) for path, node in pairs if _is_known(node)]


def _in_words(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _joined(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name


def _added(model: Any) -> set[str]:
    """Paths of parameters of Equinox's layers that are no weights of products: biases, and all that norms have."""
    found = {_joined(path, "bias") for path, _ in _layers(model)}
    norms = (eqx.nn.LayerNorm, eqx.nn.RMSNorm, eqx.nn.GroupNorm, eqx.nn.BatchNorm)
    pairs, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda node: isinstance(node, norms))
    for path, node in pairs:
        if isinstance(node, norms):
            found |= {_joined(_in_words(path), name) for name in ("weight", "bias")}
    return found


def _plans(model: Any, rules: Rules | None) -> list[Planned]:
    known, added = {}, _added(model)
    for path, layer in _layers(model):
        (kind,) = (kind for kind in _SHAPES if isinstance(layer, kind))
        for name, shape_of in _SHAPES[kind].items():
            known[_joined(path, name)] = (layer, shape_of(layer))

    def leaf(paths: list[str], array: Any) -> Leaf:
        users = [known[path] for path in paths if path in known]
        if not users:
            is_added = all(path in added for path in paths)
            why = "it is no weight of a product" if is_added else ""
            return Leaf(paths[0], array, layout_of(paths, array), tuple(paths[1:]), why, is_added=is_added)
        shape, said, why = tuple(array.shape), [], ""
        for layer, own in users:
            name, lead = type(layer).__name__, len(shape) - len(own)
            if isinstance(layer, _REPLACED) and type(layer) not in _BECOMES:
                why = f"it is the weight of a {name}, a subclass that may use it in other ways"
            if lead < 0 or shape[lead:] != own:
                why = f"it has shape {shape}, and its {name} was made with {own}: axes that are mapped over come first"
            said.append(layers.behind(Axes((0,), (1,)), lead))
        if any(axes != said[0] for axes in said):
            why = why or "layers that share it use its axes in different ways"
        return Leaf(paths[0], array, None, tuple(paths[1:]), why, said[0])

    plans = layers.planned_layers([leaf(*place) for place in places_of(leaves_of(model))], rules)
    for found in named(plans):
        users = [known[path][0] for path in found.leaf.paths if path in known]
        without = [type(layer).__name__ for layer in users if not isinstance(layer, eqx.nn.Linear)]
        check_activations(found, without or ([] if users else ["no layer"]))
    return plans
