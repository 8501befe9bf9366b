"""Flax NNX models with quantized weights.

Owns: which of NNX's layers can have one and what they call then, the type of such a variable, and the walk through a
model. Imports: the rules, the hooks of layers, Flax. ``aqt_lite.nnx`` is where users find it.

A layer stays the object that it is, and so does its variable, whose value becomes a QArray, and whose type one that is
no ``Param``: what trains parameters passes it by. What a layer calls, ``promote_dtype`` and ``dot_general`` and the
like, are attributes of it, which NNX has for such purposes. ``Embed`` has none for its look-up, and becomes a subclass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from jax import lax

from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Array
from aqt_lite._rules import Axes, Leaf, Planned, Rules, check_activations, named, quantized, to_quantize
from aqt_lite.backends.jax import flax_state, functions, layers
from aqt_lite.ops import dense
from aqt_lite.qarray import QArray
from aqt_lite.trees import Progress, TreePlan, layout_of, with_progress

__all__ = ["QuantizedEmbed", "QuantizedParam", "plan", "quantize_", "quantized_weights"]

flax_state.register()


class QuantizedParam(nnx.Variable[QArray]):
    """A variable whose value is a :class:`~aqt_lite.QArray`. It is no ``nnx.Param``, and so is not trained.

    ``nnx.state(model)`` has it, ``nnx.state(model, nnx.Param)`` what is left to train, ``nnx.state(model,
    QuantizedParam)`` the quantized weights.
    """


# ---- what layers call


def promote_dtype(args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Flax's own, which leaves QArrays as they are."""
    if not layers.has_quantized(args):
        return dtypes.promote_dtype(args, dtype=dtype, inexact=inexact)
    return layers.promoted(args, dtype, inexact)


def promote_values(args: Any, /, *, dtype: Any = None, inexact: bool = True) -> Any:
    """Flax's own, of values in the place of QArrays."""
    return dtypes.promote_dtype(layers.with_values(args), dtype=dtype, inexact=inexact)


class QuantizedEmbed(nnx.Embed):
    """``nnx.Embed`` with a quantized table, of which only the rows that are looked up are dequantized."""

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Rows of the table."""
        table = self.embedding[...]
        if not isinstance(table, QArray):
            return super().__call__(inputs, out_sharding)
        functions.check_no_sharding("Embed", out_sharding)
        return layers.embedded(table, inputs, self.dtype)

    def attend(self, query: Array, out_sharding: Any = None) -> Array:
        """Products with all rows of the table."""
        table = self.embedding[...]
        if not isinstance(table, QArray):
            return super().attend(query, out_sharding)
        functions.check_no_sharding("Embed.attend", out_sharding)
        query, table = self.promote_dtype((query, table), dtype=self.dtype)
        return dense(query, table.T)


# ---- layers


class _Shape(NamedTuple):
    """A weight as its layer made it: its shape, and what its axes are for."""

    shape: tuple[int, ...]
    axes: Axes | None


def _linear(layer: Any) -> _Shape:
    return _Shape((layer.in_features, layer.out_features), Axes((1,), (0,)))


def _linear_general(layer: Any) -> _Shape:
    parts = tuple(layer.batch_axis.values()), layer.in_features, layer.out_features
    each, inputs, outputs = _consecutive(map(len, parts))
    return _Shape(tuple(n for part in parts for n in part), Axes(outputs, inputs, each))


def _consecutive(counts: Any) -> Iterator[tuple[int, ...]]:
    start = 0
    for count in counts:
        yield tuple(range(start, start + count))
        start += count


def _einsum(layer: Any) -> _Shape:
    shape = tuple(layer.kernel_shape)
    return _Shape(shape, layers.axes_of_einsum(layer.einsum_str))


def _conv(layer: Any) -> _Shape:
    n = len(layer.kernel_shape)
    return _Shape(tuple(layer.kernel_shape), Axes((n - 1,), (n - 2,)))


def _conv_transpose(layer: Any) -> _Shape:
    n = len(layer.kernel_shape)
    out, inside = (n - 2, n - 1) if layer.transpose_kernel else (n - 1, n - 2)
    return _Shape(tuple(layer.kernel_shape), Axes((out,), (inside,)))


def _embed(layer: Any) -> _Shape:
    return _Shape((layer.num_embeddings, layer.features), Axes((0,), (1,)))


@dataclass(frozen=True)
class _Kind:
    """A layer of NNX: its weight, and what it calls where that is quantized."""

    layer: type
    weight: str
    made: Callable[[Any], _Shape]
    hooks: Mapping[str, tuple[tuple[Any, ...], Any]]
    """For each attribute, what Flax has there, and what takes its place."""
    of_products: str | None = None
    """The hook that takes ``activations``."""
    becomes: type | None = None
    refused: Mapping[str, Any] = field(default_factory=dict)
    """Attributes that must be of these values."""


_PROMOTE = {"promote_dtype": ((dtypes.promote_dtype,), promote_dtype)}
_KINDS = (
    _Kind(
        nnx.Linear,
        "kernel",
        _linear,
        {**_PROMOTE, "dot_general": ((lax.dot_general,), functions.dot_general)},
        "dot_general",
    ),
    _Kind(
        nnx.LinearGeneral,
        "kernel",
        _linear_general,
        {**_PROMOTE, "dot_general": ((None, lax.dot_general), functions.dot_general)},
        "dot_general",
        refused={"dot_general_cls": None},
    ),
    _Kind(
        nnx.Einsum,
        "kernel",
        _einsum,
        {**_PROMOTE, "einsum_op": ((jnp.einsum,), functions.einsum)},
        "einsum_op",
    ),
    _Kind(
        nnx.Conv,
        "kernel",
        _conv,
        {**_PROMOTE, "conv_general_dilated": ((lax.conv_general_dilated,), functions.conv_general_dilated)},
        refused={"mask": None},
    ),
    _Kind(
        nnx.ConvTranspose,
        "kernel",
        _conv_transpose,
        {"promote_dtype": ((dtypes.promote_dtype,), promote_values)},
        refused={"mask": None},
    ),
    _Kind(nnx.Embed, "embedding", _embed, _PROMOTE, becomes=QuantizedEmbed),
)


_ADDED = ("bias", "scale")
"""What layers of Flax call parameters that are no weights of products, which heads or a scan may give two axes."""


@dataclass
class _Slot:
    """An array of a model: the variables that hold it, where they stand, and the layers whose weight it is."""

    array: Any
    variables: list[Any] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    users: list[tuple[Any, _Kind]] = field(default_factory=list)
    why_not: str = ""
    axes: Axes | None = None
    is_added: bool = False


@naming_the_argument
def quantize_(model: Any, rules: Rules | None = None, *, progress: Progress = None) -> Any:
    """Quantize weights of a Flax NNX model in place: those of its layers that rules choose.

    Parameters
    ----------
    model : nnx.Module
    rules : list of (pattern, spec), optional
        As for :func:`aqt_lite.quantize_tree`; paths are those of the model's variables, ``"encoder/layers/0/kernel"``.
        A spec may have ``activations="int8"`` for Linear, LinearGeneral and Einsum: then each row of their input is
        quantized, too. Without rules, the weight of every Linear, LinearGeneral (those of MultiHeadAttention among
        them), Einsum, Embed, Conv and ConvTranspose becomes int8 with a scale for each output.
    progress : bool or function, optional
        As for :func:`aqt_lite.quantize_tree`.

    Returns
    -------
    nnx.Module
        ``model`` itself. Layers that shared a variable share the quantized one.

    Raises
    ------
    ValueError, TypeError
        As :func:`aqt_lite.quantize_tree`; a rule for a weight that its layer cannot use quantized, since the layer has
        a mask, or a ``dot_general`` or ``promote_dtype`` of its own. The model is then as it was.

    Notes
    -----
    Layers know what the axes of their weights are for, so that ``layout`` is not said: groups run along the inputs,
    over heads as well, and each output has a scale. Leading axes that ``nnx.vmap`` gave a layer, for ``nnx.scan``, have
    scales of their own each. Parameters of modules of your own are quantized where a rule says so, for ``x @ param``
    and :func:`aqt_lite.jax.einsum`.

    Convolutions whose windows overlap, and ConvTranspose, dequantize their kernel at each call: that saves memory, not
    time. ``precision`` is of no effect on products with quantized weights, which are as exact as those of float32.

    The variables are no ``nnx.Param`` any more: ``nnx.grad`` and ``nnx.Optimizer`` train what is left, biases, norms
    and adapters.

    Examples
    --------
    >>> import jax.numpy as jnp, aqt_lite.nnx
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(32, 10, rngs=nnx.Rngs(1)))
    >>> rules = [("layers/0/kernel", dict(dtype="int4", granularity=aqt_lite.PerGroup(32)))]
    >>> model = aqt_lite.nnx.quantize_(model, rules)
    >>> nnx.jit(lambda model, x: model(x))(model, jnp.ones((2, 64))).shape
    (2, 10)
    >>> model.layers[0].kernel[...].granularity
    PerGroup(size=32, axis=0)
    """
    slots = _slots(model)
    already = [*quantized_weights(model)]
    chosen = to_quantize(_plans(slots, rules, already), rules, already)
    made = [quantized(found) for found in with_progress(chosen, progress, lambda found: found.leaf.path)]
    for found, q in zip(chosen, made, strict=True):  # nothing here can fail
        _exchange(slots[id(found.leaf.array)], q, found.extra.get("activations"))
    return model


@naming_the_argument
def plan(model: Any, rules: Rules | None = None) -> TreePlan:
    """What :func:`quantize_` would do, as a table of the model's parameters; see :func:`aqt_lite.plan_tree`.

    ``model`` may be an abstract one, of ``nnx.eval_shape``.

    Examples
    --------
    >>> import aqt_lite.nnx
    >>> from flax import nnx
    >>> print(aqt_lite.nnx.plan(nnx.eval_shape(lambda: nnx.Linear(64, 32, rngs=nnx.Rngs(0)))))
    leaf    shape     of       becomes                               bytes  after
    bias    (32,)     float32  as it is                                128    128
    kernel  (64, 32)  float32  int8, PerChannel(axis=1), for dense    8192   2176
    2 leaves                                                          8320   2304  (3.61x smaller)
    """
    return TreePlan(tuple(_plans(_slots(model), rules, [*quantized_weights(model)])))


@naming_the_argument
def quantized_weights(model: Any) -> dict[str, QArray]:
    """The quantized weights of a model by the paths of their variables, shared ones under each of their paths.

    Those of a module that stands in several places are under the first of them.

    Examples
    --------
    >>> import aqt_lite.nnx
    >>> from flax import nnx
    >>> model = aqt_lite.nnx.quantize_(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    >>> aqt_lite.nnx.quantized_weights(model)["kernel"].shape
    (64, 32)
    """
    found = {}
    for path, variable in _variables(model):
        if isinstance(variable, nnx.Variable) and isinstance(variable.get_raw_value(), QArray):
            found[path] = variable.get_raw_value()
    return found


# ---- the walk


def _variables(model: Any) -> Iterator[tuple[str, Any]]:
    """Every place at which a variable stands, with its path."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}, not an nnx.Module: for arrays, aqt_lite.quantize_tree")
    seen: set[int] = set()
    for parts, node in nnx.iter_graph(model):
        prefix = "/".join(map(str, parts))
        if isinstance(node, nnx.Module):
            for name, value in sorted(vars(node).items()):
                if isinstance(value, nnx.Variable):
                    seen.add(id(value))
                    yield f"{prefix}/{name}" if prefix else name, value
    for parts, node in nnx.iter_graph(model):  # those in containers
        if isinstance(node, nnx.Variable) and id(node) not in seen:
            yield "/".join(map(str, parts)), node


def _slots(model: Any) -> dict[int, _Slot]:
    """The parameters of a model, by the identity of their arrays."""
    found: dict[int, _Slot] = {}
    of_variables: dict[int, _Slot] = {}
    for path, variable in _variables(model):
        if not isinstance(variable, nnx.Param):
            continue
        array = variable.get_raw_value()
        slot = found.setdefault(id(array), _Slot(array))
        slot.paths.append(path)
        if id(variable) not in of_variables:
            slot.variables.append(variable)
            of_variables[id(variable)] = slot
    for _, node in nnx.iter_graph(model):
        if type(node).__module__.startswith("flax."):
            for name in _ADDED:
                if id(getattr(node, name, None)) in of_variables:
                    slot = of_variables[id(getattr(node, name))]
                    slot.is_added, slot.why_not = True, f"it is the {name} of a {type(node).__name__}"
        for kind in _KINDS:
            if isinstance(node, kind.layer) and id(getattr(node, kind.weight)) in of_variables:
                of_variables[id(getattr(node, kind.weight))].users.append((node, kind))
    for slot in found.values():
        _look_at(slot)
    return found


def _look_at(slot: _Slot) -> None:
    """What the layers say of their weight."""
    said = []
    if any(variable.hijax or variable.ref for variable in slot.variables):
        slot.why_not = "it is a reference, of which QArrays are none: make the model without hijax or ref variables"
        return
    shape = tuple(slot.array.shape)
    for layer, kind in slot.users:
        name = type(layer).__name__
        for attribute, (known, ours) in kind.hooks.items():
            its = getattr(layer, attribute)
            if its not in (*known, ours) and not isinstance(its, layers.Hook):
                slot.why_not = f"its {name} has a {attribute} of its own"
        for attribute, value in kind.refused.items():
            if getattr(layer, attribute) is not value:
                slot.why_not = f"its {name} has a {attribute}"
        made = kind.made(layer)
        lead = len(shape) - len(made.shape)
        if lead < 0 or shape[lead:] != made.shape:
            slot.why_not = (
                f"it has shape {shape}, and its {name} was made with {made.shape}: axes that are mapped over are to "
                "come first"
            )
        elif made.axes is not None:
            said.append(layers.behind(made.axes, lead))
    if any(axes != said[0] for axes in said):
        slot.why_not = slot.why_not or "layers that share it use its axes in different ways"
    slot.axes = said[0] if said else None


def _plans(slots: dict[int, _Slot], rules: Rules | None, already: Sequence[str]) -> list[Planned]:
    leaves = [
        Leaf(
            slot.paths[0],
            slot.array,
            None if slot.users else layout_of(slot.paths, slot.array),
            tuple(slot.paths[1:]),
            slot.why_not,
            slot.axes,
            slot.is_added,
        )
        for slot in slots.values()
    ]
    plans = layers.planned_layers(leaves, rules, already)
    for found in named(plans):
        users = slots[id(found.leaf.array)].users
        without = [type(layer).__name__ for layer, kind in users if kind.of_products is None]
        check_activations(found, without or ([] if users else ["no layer"]))
    return plans


def _exchange(slot: _Slot, q: QArray, activations: str | None) -> None:
    for variable in slot.variables:
        variable.set_raw_value(q)
        object.__setattr__(variable, "__class__", QuantizedParam)
    for layer, kind in slot.users:
        for attribute, (_, ours) in kind.hooks.items():
            quantizes = activations is not None and attribute == kind.of_products
            setattr(layer, attribute, layers.Hook(ours, str(activations)) if quantizes else ours)
        if kind.becomes is not None:
            object.__setattr__(layer, "__class__", kind.becomes)
