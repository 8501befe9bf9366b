"""Flax Linen models with quantized parameters.

Owns: which of Linen's layers can have one and what runs in their place, and what their kernels' axes are for. Imports:
the rules, trees, the hooks of layers, Flax. ``aqt_lite.linen`` is where users find it.

Parameters stay a tree, with QArrays in the place of kernels. Where Flax is about to run a method of one of its own
layers, an interceptor (``nn.intercept_methods``) looks whether the layer's kernel is a QArray, and runs the method of a
layer that is made alike but for ``promote_dtype``, ``dot_general`` and the like, which Linen has for such purposes. By
the method it is known, not by the layer's class: so subclasses that call it, and what ``nn.scan`` and ``nn.remat`` make
of layers, are served where they call it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict, freeze, lift
from flax.core.scope import in_filter
from flax.linen import dtypes

from aqt_lite._keywords import in_a_spec, naming_the_argument
from aqt_lite._namespace import Array
from aqt_lite._rules import Axes, Leaf, Planned, Rules, check_activations, named, specs, to_quantize
from aqt_lite.backends.jax import flax_state, functions, layers
from aqt_lite.ops import dense
from aqt_lite.qarray import QArray
from aqt_lite.trees import Progress, TreePlan, leaves_of, places_of, quantized_already, quantized_as_planned

__all__ = ["plan", "quantize", "with_quantized_layers"]

flax_state.register()


def quantize(
    model: Any, variables: Any, *args: Any, rules: Rules | None = None, progress: Progress = None, **kwargs: Any
) -> Any:
    """Quantize parameters of a Flax Linen model: those of its layers that rules choose.

    Parameters
    ----------
    model : nn.Module
    variables : tree
        As ``model.apply`` takes them, with the collection ``"params"``.
    *args, **kwargs
        What ``model.apply`` takes after the variables: from a call with them, of which nothing is computed, it is seen
        what each layer does with its kernel. Shapes matter, values do not: ``jax.ShapeDtypeStruct`` will do.
    rules : list of (pattern, spec), optional
        As for :func:`aqt_lite.quantize_tree`; paths are those below ``"params"``, ``"encoder/Dense_0/kernel"``. A spec
        may have ``activations="int8"`` for Dense, DenseGeneral and Einsum, which :func:`with_quantized_layers` reads.
        Without rules, the kernel of every Dense, DenseGeneral (those of attention among them), Einsum, Embed, Conv,
        ConvLocal and ConvTranspose becomes int8 with a scale for each output.
    progress : bool or function, optional
        As for :func:`aqt_lite.quantize_tree`.

    Returns
    -------
    tree
        The variables, with a :class:`~aqt_lite.QArray` in the place of each kernel, for ``with_quantized_layers(
        model.apply)``.

    Raises
    ------
    ValueError, TypeError
        As :func:`aqt_lite.quantize_tree`; a rule for a parameter that no such layer uses in this call, or that its
        layer cannot use quantized, since it has a mask, or a ``dot_general`` or ``promote_dtype`` of its own, or is
        inside ``nn.WeightNorm`` or ``nn.SpectralNorm``.

    Notes
    -----
    What the axes of a kernel are for is not said: groups run along the inputs, over heads as well, and each output has
    a scale. Leading axes that ``nn.scan`` or ``nn.vmap`` gave a layer have scales of their own each.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, aqt_lite.linen
    >>> from flax import linen as nn
    >>> model, x = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)]), jnp.ones((2, 64))
    >>> variables = model.init(jax.random.key(0), x)
    >>> rules = [("layers_0/kernel", dict(dtype="int4", granularity=aqt_lite.PerGroup(32)))]
    >>> small = aqt_lite.linen.quantize(model, variables, x, rules=rules)
    >>> jax.jit(aqt_lite.linen.with_quantized_layers(model.apply))(small, x).shape
    (2, 10)
    """
    boxed = _params_of(variables)
    params = nn.meta.unbox(boxed)
    plans = _plans(model, variables, params, args, kwargs, rules)
    made = quantized_as_planned(params, to_quantize(plans, rules), progress)
    found = {**variables, "params": nn.meta.replace_boxed(boxed, made)}
    return freeze(found) if isinstance(variables, FrozenDict) else found


def plan(model: Any, variables: Any, *args: Any, rules: Rules | None = None, **kwargs: Any) -> TreePlan:
    """What :func:`quantize` would do, as a table of the parameters; see :func:`aqt_lite.plan_tree`.

    ``variables`` may be shapes, as ``jax.eval_shape(model.init, ...)`` has them.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, aqt_lite.linen
    >>> from flax import linen as nn
    >>> model, x = nn.Dense(32), jnp.ones((2, 64))
    >>> print(aqt_lite.linen.plan(model, jax.eval_shape(model.init, jax.random.key(0), x), x))
    leaf      shape     of       becomes                              bytes  after
    bias      (32,)     float32  as it is                               128    128
    kernel    (64, 32)  float32  int8, PerChannel(axis=1), for dense   8192   2176
    2 leaves                                                           8320   2304  (3.61x smaller)
    """
    params = nn.meta.unbox(_params_of(variables))
    return TreePlan(tuple(_plans(model, variables, params, args, kwargs, rules)))


@naming_the_argument
def with_quantized_layers(function: Callable[..., Any], rules: Rules | None = None) -> Callable[..., Any]:
    """``function``, in which Flax's layers take QArrays as parameters: for ``model.apply`` and what calls it.

    Parameters
    ----------
    function : callable
        It is called with Flax's method interception switched on, inside ``jax.jit`` or outside.
    rules : list of (pattern, spec), optional
        Those of :func:`quantize`, where specs have ``activations``: each row of the input of such a layer is quantized,
        too. What else they say is not read.

    Returns
    -------
    callable
        Layers without a quantized parameter run as they always do.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, aqt_lite.linen
    >>> from flax import linen as nn
    >>> model, ids = nn.Embed(50, 8), jnp.arange(7)
    >>> small = aqt_lite.linen.quantize(model, model.init(jax.random.key(0), ids), ids)
    >>> aqt_lite.linen.with_quantized_layers(model.apply)(small, ids).shape
    (7, 8)
    """
    spec_of = specs(rules or (), ("activations",))

    def interceptor(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, _AROUND):
            _check_around(context.module)
        method = _METHODS.get(getattr(context.orig_method, "func", None))
        if method is None or context.module.scope is None:
            return run(*args, **kwargs)
        params = nn.meta.unbox(context.module.variables.get("params", {}))
        if not layers.has_quantized(tuple(params.values())):
            return run(*args, **kwargs)
        _check(context.module)
        if _is_inside_map_variables():
            raise ValueError(f"{'/'.join(context.module.scope.path)} has a quantized parameter, but {_WHY_NOT_MAPPED}")
        path = "/".join((*context.module.scope.path, method.weight))
        activations = (spec_of(path) or {}).get("activations")
        return method.compute(context.module, params, activations, *args, **kwargs)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(interceptor):
            return function(*args, **kwargs)

    return call


# ---- what runs in the place of a method


class _Held:
    """A QArray on its way through a layer: to Flax, which looks at shapes of leaves, one leaf of the kernel's shape."""

    def __init__(self, q: QArray) -> None:
        self.q, self.shape = q, q.shape


def _promote(*args: Any, dtype: Any = None, inexact: bool = True) -> Any:
    return layers.promoted([a.q if isinstance(a, _Held) else a for a in args], dtype, inexact)


def _promote_values(*args: Any, dtype: Any = None, inexact: bool = True) -> Any:
    values = layers.with_values([a.q if isinstance(a, _Held) else a for a in args])
    return dtypes.promote_dtype(*values, dtype=dtype, inexact=inexact)


def _run_alike(module: Any, params: Any, hooks: dict[str, Any], args: Any, kwargs: Any) -> Any:
    """The method of a layer that is made as ``module`` is, but for these attributes."""
    layer = next(c for c in type(module).__mro__ if c.__module__ == nn.Dense.__module__)  # without its transformations
    fields = [f.name for f in dataclasses.fields(layer) if f.init and f.name not in ("parent", "name")]
    made = layer(**{**{name: getattr(module, name) for name in fields}, **hooks}, parent=None)
    held = {name: _Held(value) if isinstance(value, QArray) else value for name, value in params.items()}
    return made.apply({"params": held}, *args, **kwargs)


def _hook(function: Any, activations: str | None) -> Any:
    return function if activations is None else layers.Hook(function, activations)


def _dense(module: Any, params: Any, activations: str | None, *args: Any, **kwargs: Any) -> Any:
    hooks = {"promote_dtype": _promote, "dot_general": _hook(functions.dot_general, activations)}
    return _run_alike(module, params, hooks, args, kwargs)


def _conv(module: Any, params: Any, activations: str | None, *args: Any, **kwargs: Any) -> Any:
    hooks: dict[str, Any] = {"promote_dtype": _promote, "conv_general_dilated": functions.conv_general_dilated}
    return _run_alike(module, params, hooks if module.shared_weights else _OF_VALUES, args, kwargs)


_OF_VALUES: dict[str, Any] = {"promote_dtype": _promote_values}


def _conv_transpose(module: Any, params: Any, activations: str | None, *args: Any, **kwargs: Any) -> Any:
    return _run_alike(module, params, _OF_VALUES, args, kwargs)


def _einsum(module: Any, params: Any, activations: str | None, inputs: Any, einsum_str: str | None = None) -> Array:
    subscripts = _subscripts(module, einsum_str)
    inputs, kernel, bias = layers.promoted((inputs, params["kernel"], params.get("bias")), module.dtype)
    y = functions.einsum(
        subscripts, inputs, kernel, preferred_element_type=module.preferred_element_type, activations=activations
    )
    if bias is None:
        return y
    of_kernel, out = subscripts.partition(",")[2].split("->")
    lead, _, tail = out.partition("...")

    def lengths(letters: str) -> list[int]:
        return [kernel.shape[of_kernel.index(c)] if c in of_kernel else 1 for c in letters]

    shape = (*lengths(lead), *(1,) * (y.ndim - len(lead) - len(tail)), *lengths(tail))
    return y + jnp.reshape(bias, shape)


def _subscripts(module: Any, einsum_str: str | None) -> str:
    return str(nn.module.merge_param("einsum_str", module.einsum_str, einsum_str)).replace(" ", "")


def _embed_setup(module: Any, params: Any, activations: str | None) -> None:
    object.__setattr__(module, "embedding", params["embedding"])  # without Flax's look at the shapes of its leaves


def _embed(module: Any, params: Any, activations: str | None, inputs: Any) -> Array:
    return layers.embedded(params["embedding"], inputs, module.dtype)


def _attend(module: Any, params: Any, activations: str | None, query: Any) -> Array:
    query, table = layers.promoted((query, params["embedding"]), module.dtype)
    return dense(query, table.T)


# ---- what axes are for, as seen in a call


def _axes_of_dense(module: Any, ndim: int, *_: Any, **__: Any) -> Axes:
    return Axes((1,), (0,))


def _axes_of_dense_general(module: Any, ndim: int, *_: Any, **__: Any) -> Axes:
    counts = [1 if isinstance(of, int) else len(of) for of in (module.batch_dims, module.axis)]
    first, second = counts[0], sum(counts)
    return Axes(tuple(range(second, ndim)), tuple(range(first, second)), tuple(range(first)))


def _axes_of_einsum(module: Any, ndim: int, inputs: Any, einsum_str: str | None = None) -> Axes | None:
    return layers.axes_of_einsum(_subscripts(module, einsum_str))


def _axes_of_conv(module: Any, ndim: int, *_: Any, **__: Any) -> Axes:
    return Axes((ndim - 1,), (ndim - 2,), () if module.shared_weights else tuple(range(ndim - 2)))


def _axes_of_conv_transpose(module: Any, ndim: int, *_: Any, **__: Any) -> Axes:
    out, inside = (ndim - 2, ndim - 1) if module.transpose_kernel else (ndim - 1, ndim - 2)
    return Axes((out,), (inside,))


def _axes_of_table(module: Any, ndim: int, *_: Any, **__: Any) -> Axes:
    return Axes((0,), (1,))


@dataclasses.dataclass(frozen=True)
class _Method:
    """A method of one of Flax's layers, and what runs in its place."""

    weight: str
    compute: Callable[..., Any]
    axes: Callable[..., Axes | None]
    of_products: bool = False
    """Whether ``activations`` are for it."""


def _raw(layer: type, name: str) -> Any:
    """The method as Flax runs it: without what wraps it, and without transformations."""
    return vars(layer)[name].__wrapped__


_METHODS = {
    _raw(nn.Dense, "__call__"): _Method("kernel", _dense, _axes_of_dense, True),
    _raw(nn.DenseGeneral, "__call__"): _Method("kernel", _dense, _axes_of_dense_general, True),
    _raw(nn.Einsum, "__call__"): _Method("kernel", _einsum, _axes_of_einsum, True),
    _raw(nn.Conv.__mro__[1], "__call__"): _Method("kernel", _conv, _axes_of_conv),
    _raw(nn.ConvTranspose, "__call__"): _Method("kernel", _conv_transpose, _axes_of_conv_transpose),
    _raw(nn.Embed, "setup"): _Method("embedding", _embed_setup, _axes_of_table),
    _raw(nn.Embed, "__call__"): _Method("embedding", _embed, _axes_of_table),
    _raw(nn.Embed, "attend"): _Method("embedding", _attend, _axes_of_table),
}

_HOOKS = {
    "promote_dtype": (dtypes.promote_dtype,),
    "dot_general": (None, jax.lax.dot_general),
    "dot_general_cls": (None,),
    "conv_general_dilated": (None, jax.lax.conv_general_dilated),
    "conv_general_dilated_cls": (None,),
    "mask": (None,),
}
"""Attributes of layers that are to be as Flax has them."""

_AROUND = (nn.WeightNorm, nn.SpectralNorm)
"""Layers that compute with the parameters of the layer that they are around, before it does."""


def _why_not_inside(around: Any) -> str:
    return f"it is inside {type(around).__name__}, which makes another one of it at each call"


_WHY_NOT_MAPPED = (
    "it is inside nn.map_variables, whose function would compute with its codes as if they were values: leave it as it "
    "is, or quantize what that function makes of it"
)


def _is_inside_map_variables() -> bool:
    """Whether parameters are seen through a function of ``nn.map_variables``: the stack alone says so.

    What other transformations make of parameters are their slices; this one may make anything of the leaves.
    """
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        if code.co_filename == lift.__file__ and code.co_qualname.startswith(f"{lift.map_variables.__name__}."):
            mapped = frame.f_locals.get("mapped_collections", True)  # all, where Flax calls them otherwise
            if in_filter(mapped, "params"):
                return True
        frame = frame.f_back
    return False


def _why_not(module: Any) -> str:
    """Why a layer cannot use a quantized parameter; empty where it can."""
    for attribute, known in _HOOKS.items():
        if not any(getattr(module, attribute, None) is value for value in known) and hasattr(module, attribute):
            return f"its {type(module).__name__} has a {attribute} of its own"
    return ""


def _check(module: Any) -> None:
    if why := _why_not(module):
        raise ValueError(f"{'/'.join(module.scope.path)} has a quantized parameter, but {why}")


def _check_around(module: Any) -> None:
    inside = module.layer_instance
    params = {} if inside.scope is None else nn.meta.unbox(inside.variables.get("params", {}))
    if layers.has_quantized(jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QArray))):
        raise ValueError(f"{'/'.join(inside.scope.path)} has a quantized parameter, but {_why_not_inside(module)}")


@dataclasses.dataclass
class _Seen:
    """What was seen of a parameter in a call."""

    layer: str
    shape: tuple[int, ...]
    axes: Axes | None
    of_products: bool
    why_not: str


def _seen_in_a_call(model: Any, variables: Any, args: Any, kwargs: Any) -> dict[str, list[_Seen]]:
    found: dict[str, list[_Seen]] = {}
    around: list[Any] = []

    def interceptor(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        method, module = _METHODS.get(getattr(context.orig_method, "func", None)), context.module
        outer = isinstance(module, _AROUND)
        around.extend([module] * outer)
        try:
            y = run(*args, **kwargs)
        finally:
            del around[len(around) - outer :]
        if method is not None and context.method_name != "setup":
            weight = nn.meta.unbox(module.variables["params"])[method.weight]
            shape = tuple(weight.shape)
            seen = _Seen(
                type(module).__name__,
                shape,
                method.axes(module, len(shape), *args, **kwargs),
                method.of_products,
                _why_not_inside(around[-1])
                if around
                else _WHY_NOT_MAPPED
                if _is_inside_map_variables()
                else _why_not(module),
            )
            found.setdefault("/".join((*module.scope.path, method.weight)), []).append(seen)
        return y

    leaves, structure = jax.tree.flatten((args, kwargs))
    shapes = {at: leaf for at, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)}

    def call(variables: Any, given: Any) -> Any:
        args, kwargs = jax.tree.unflatten(structure, [given.get(at, leaf) for at, leaf in enumerate(leaves)])
        with nn.intercept_methods(interceptor):
            return model.apply(variables, *args, **kwargs)

    jax.eval_shape(call, variables, shapes)
    return found


# ---- the plan

_ADDED = ("bias", "scale")
"""What layers of Flax call parameters that are no weights of products, which heads or a scan may give two axes."""


def _params_of(variables: Any) -> Any:
    try:
        return variables["params"]
    except (KeyError, TypeError, IndexError):
        raise TypeError(
            "variables has no collection 'params': give what model.apply takes, {'params': params}"
        ) from None


def _plans(model: Any, variables: Any, params: Any, args: Any, kwargs: Any, rules: Rules | None) -> list[Planned]:
    already = quantized_already(leaves_of(params))
    if already:
        raise TypeError(f"variables has {already[0]} quantized already: give those that model.init made")
    _check_keywords(model, kwargs)
    seen = _seen_in_a_call(model, variables, args, kwargs)
    leaves = [_leaf(paths, array, seen) for paths, array in places_of(leaves_of(params))]
    plans = layers.planned_layers(leaves, rules)
    for found in named(plans):
        users = [use for path in found.leaf.paths for use in seen.get(path, ())]
        check_activations(found, [use.layer for use in users if not use.of_products])
    return plans


def _check_keywords(model: Any, kwargs: dict[str, Any]) -> None:
    """Those that rules are to have would reach the model, which does not know them."""
    takes = inspect.signature(type(model).__call__).parameters
    if "method" in kwargs or any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return
    for name in kwargs:
        if name not in takes and (way := in_a_spec(name)):
            raise TypeError(f"{type(model).__name__} has no argument {name!r}: {way}")


def _leaf(paths: list[str], array: Any, seen: dict[str, list[_Seen]]) -> Leaf:
    uses = [use for path in paths for use in seen.get(path, ())]
    name = paths[0].rpartition("/")[2]
    shape, others = tuple(array.shape), tuple(paths[1:])
    if name in _ADDED:
        return Leaf(paths[0], array, None, others, f"it is a {name}, and no weight of a product", is_added=True)
    if not uses:
        why = "no Dense, DenseGeneral, Einsum, Embed, Conv or ConvTranspose uses it in a call with these arguments"
        return Leaf(paths[0], array, None, others, why)
    said, why = [], ""
    for use in uses:
        lead = len(shape) - len(use.shape)
        if lead < 0 or shape[lead:] != use.shape:
            why = f"it has shape {shape}, and its {use.layer} uses {use.shape}: axes that are mapped over come first"
        elif use.axes is not None:
            said.append(layers.behind(use.axes, lead))
        why = use.why_not or why
    if any(axes != said[0] for axes in said):
        why = why or "layers that share it use its axes in different ways"
    return Leaf(paths[0], array, None, others, why, said[0] if said else None)
