"""torch models with quantized weights: layers that hold a QArray where they had a parameter.

Owns: the modules, what of them is saved, loaded and moved, and the walk through a model. Imports: the rules, the public
functions, the adapter. ``aqt_lite.torch`` is where users find it.

A layer stays the object that it is: its class becomes one that computes with ``self.weight.qarray``, and its parameter
``weight`` a module of that name, whose buffers are the arrays of the QArray. So hooks, biases, flags and other
references to the layer stay, layers that share a weight share the module, and ``state_dict`` has ``weight.storage``,
``weight.scale`` and so on. ``weight.mark`` says what the codes mean: what is loaded is held against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import nn

from aqt_lite import _mark
from aqt_lite._keywords import naming_the_argument
from aqt_lite._registry import get_backend
from aqt_lite._rules import Axes, Leaf, Planned, Rules, check_activations, naming, planned, quantized, to_quantize
from aqt_lite._shapes import swapped_back, taken_from
from aqt_lite._ways import not_a_qarray
from aqt_lite.api import fake_quantize, quantize
from aqt_lite.backends.torch import products
from aqt_lite.formats import element_type
from aqt_lite.granularity import PerGroup
from aqt_lite.ops import linear
from aqt_lite.ops.matmul import as_stored, in_integers, may_go_as_stored
from aqt_lite.qarray import QArray
from aqt_lite.trees import Progress, TreePlan, with_progress

__all__ = [
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "plan",
    "quantize_",
    "quantized_weights",
]

_PARTS = ("storage", "scale", "zero_point", "offset")
_FIELDS = ("dtype", "block", "float_dtype", "transposed", "packed_length", "ragged", "version")


class _Structure(NamedTuple):
    """What a QArray is beside its arrays."""

    fields: dict[str, Any]
    inner: dict[str, _Structure]
    """Of those of its parts that are QArrays themselves: quantized scales and offsets."""

    @classmethod
    def of(cls, q: QArray) -> _Structure:
        parts = {name: getattr(q, name) for name in _PARTS}
        inner = {name: cls.of(part) for name, part in parts.items() if isinstance(part, QArray)}
        return cls({name: getattr(q, name) for name in _FIELDS}, inner)

    def names(self, prefix: str = "") -> list[str]:
        """What its arrays are called as buffers, where it has all of them."""
        found = []
        for name in _PARTS:
            inner = self.inner.get(name)
            found += [prefix + name] if inner is None else inner.names(f"{prefix}{name}_")
        return found

    def made(self, array: Callable[[str], Any], prefix: str = "") -> QArray:
        """The QArray of ``array(name)``."""
        parts: dict[str, Any] = {
            name: self.inner[name].made(array, f"{prefix}{name}_") if name in self.inner else array(prefix + name)
            for name in _PARTS
        }
        return QArray(**parts, **self.fields)

    def mark(self) -> bytes:
        """It in bytes, its parts' after its own."""
        f = self.fields
        own = _mark.encoded(f["dtype"], f["block"], f["float_dtype"], f["transposed"], f["packed_length"], f["version"])
        return own + b"".join(inner.mark() for inner in self.inner.values())


def _in_words(mark: bytes) -> str:
    pieces = (mark[start : start + _mark.LENGTH] for start in range(0, len(mark), _mark.LENGTH))
    return "; scales as ".join(_mark.in_words(piece) or "something unknown" for piece in pieces)


class QuantizedWeight(nn.Module):
    """The arrays of a :class:`~aqt_lite.QArray` as buffers.

    Conversions (``.half()``, ``.to(dtype)``) leave them as they are: they move between devices only. A state dict with
    codes of another format, block, layout or dtype is refused by ``load_state_dict``.

    In a module of your own it is what a parameter would be. A QArray as a plain attribute is in no state dict, and
    there is a warning.

    >>> import aqt_lite
    >>> class Scores(torch.nn.Module):
    ...     def __init__(self, q):
    ...         super().__init__()
    ...         self.weight = QuantizedWeight(q)
    ...
    ...     def forward(self, x):
    ...         return torch.nn.functional.linear(x, self.weight)
    >>> scores = Scores(aqt_lite.quantize(torch.ones(3, 4)))
    >>> scores(torch.ones(1, 4)), list(scores.state_dict())
    (tensor([[4., 4., 4.]]), ['weight.storage', 'weight.scale', 'weight.mark'])
    """

    like: torch.Tensor

    def __init__(self, q: QArray) -> None:
        if not isinstance(q, QArray):
            raise TypeError(not_a_qarray("q", q))
        if q.backend != "torch":
            raise TypeError(f"q is a {q.backend} QArray: a torch module holds q.to_backend('torch')")
        super().__init__()
        self.structure = _Structure.of(q)
        arrays = (a if a is None else a.contiguous() for a in _arrays_of(q))  # libraries that write files refuse others
        buffers = dict(zip(self.structure.names(), arrays, strict=True))
        for name, array in buffers.items():
            self.register_buffer(name, array)
        mark = torch.from_numpy(np.frombuffer(self.structure.mark(), np.uint8).copy())
        self.register_buffer("mark", mark.to(q.storage.device))
        # takes part in conversions in the place of the values: what is looked up has its dtype
        like = torch.empty(0, dtype=getattr(torch, q.float_dtype), device=q.storage.device)
        self.register_buffer("like", like, persistent=False)
        self.in_one_call = _in_one_call(q, buffers)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if hasattr(torch.Tensor, name):
                way = "a quantized weight is no tensor: .qarray.dequantize() is one of its values"
                raise AttributeError(f"{error}: {way}") from None
            raise

    @property
    def qarray(self) -> QArray:
        """The weight. Its arrays are the buffers, which are not to be written to."""
        if torch.compiler.is_compiling():
            made = self.structure.made(self._buffers.__getitem__)
            object.__setattr__(made, "_has_usable_scales", True)  # as they were made, or loaded: no look at each call
            return made
        known: QArray | None = self.__dict__.get("known")  # the same QArray as before, whose scales were checked then
        if known is None or any(
            self._buffers[name] is not array
            for name, array in zip(self.structure.names(), _arrays_of(known), strict=True)
        ):
            known = self.__dict__["known"] = self.structure.made(self._buffers.__getitem__)
        return known

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """``linear(x, self.qarray, bias)``; in what a compiler makes, by one operator where that serves."""
        if torch.compiler.is_compiling() and self.in_one_call is not None:
            inputs, operator, told, names = self.in_one_call
            if x.ndim and x.shape[-1] == inputs:
                tensors = tuple(None if name is None else self._buffers[name] for name in names)
                y: Any = products.multiply_in_one_call(operator, told, x, tensors, bias)
                if y is not NotImplemented:
                    return y  # type: ignore[no-any-return]
        return linear(x, self.qarray, bias)  # type: ignore[no-any-return]

    @property
    def T(self) -> QArray:  # noqa: N802 - what arrays call it
        """The transpose of the QArray, as in ``x @ self.weight.T``."""
        if len(self.structure.fields["block"]) != 2:  # said so, because torch.jit.trace looks at every name
            raise AttributeError("T is for 2 dimensions")
        return self.qarray.T

    @property
    def shape(self) -> torch.Size:
        """Of the weight, as of the parameter that it stands for; and so are the others."""
        return torch.Size(self.qarray.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, not of the codes."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Where codes and scales are."""
        return self.like.device

    @property
    def requires_grad(self) -> bool:
        """False: no derivative reaches codes and scales."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            raise ValueError("requires_grad=True: quantized weights get no derivative; train what is left, or adapters")

    def extra_repr(self) -> str:
        return _in_words(self.structure.mark())

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> Any:
        def moved(tensor: Any) -> Any:
            new = fn(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        like = fn(self.like)
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self._buffers["like"] = like
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        problem = self._why_not(state_dict, prefix)
        if problem:
            errors.append(problem)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self.__dict__.pop("known", None)  # the checks were of the old numbers

    def _why_not(self, state_dict: Any, prefix: str) -> str | None:
        """Why what is saved under ``prefix`` is not of this structure."""
        found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not found:  # load_state_dict itself says what is missing
            return None
        own, mark = self.structure.mark(), found.pop("mark", None)
        if mark is None:
            return f"{prefix}mark is missing, which says what the codes mean; the model's are {_in_words(own)}"
        saved = mark.detach().cpu().numpy().tobytes()
        if saved != own:
            return f"{prefix[:-1]} was saved as {_in_words(saved)}, and the model's is {_in_words(own)}"
        arrays = {name: array for name in self.structure.names() if (array := self._buffers[name]) is not None}
        if set(found) != set(arrays):
            return f"{prefix[:-1]} was saved with {', '.join(found)}, and the model's has {', '.join(arrays)}"
        for name, array in arrays.items():
            for what in ("dtype", "shape"):
                its, own_one = getattr(found[name], what), getattr(array, what)
                if its != own_one:
                    return f"{prefix}{name} was saved with {what} {its}, and the model's has {own_one}"
        scale = found.get("scale")
        if scale is not None and not scale.is_meta and (zeros := int((scale == 0).sum())):
            return f"{prefix}scale has {zeros} scales of {scale.numel()} that are 0: it was changed since it was saved"
        return None

    def __prepare_scriptable__(self) -> Any:
        raise NotImplementedError(
            "torch.jit.script knows no quantized arrays: use torch.export.export or torch.compile; torch.jit.trace "
            "records layers whose activations are floats"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "known": self.qarray}  # it knows formats that are not built in

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What torch calls where it is given this in the place of a tensor: its QArray answers.

        So layers that hand a weight of another one to ``linear`` get its product (attention of windows does), and fused
        layers take their other path.
        """
        inside, of_options = pytree.tree_map_only(cls, lambda weight: weight.qarray, (args, kwargs or {}))
        return QArray.__torch_function__(function, types, inside, of_options)  # type: ignore[attr-defined]

    def __rmatmul__(self, x: Any) -> Any:
        return x @ self.qarray


def _in_one_call(q: QArray, buffers: dict[str, Any]) -> Any:
    """What ``products.in_one_call`` says, with names of buffers for tensors; None where one is made of them."""
    if len(q.shape) != 2 or q.transposed or q.scale is None or q.offset is not None or q.storage.is_meta:
        return None
    stored = as_stored(q, packed=True) if may_go_as_stored(q, "fast", 1) else None
    as_they_are = stored is None and element_type(q.dtype).zero_points and not isinstance(q.scale, QArray)
    found = products.in_one_call(stored, in_integers(q) if as_they_are else None, q.packed_length)
    if found is None:
        return None
    operator, told, tensors = found
    names = [None if t is None else next((n for n, own in buffers.items() if own is t), "") for t in tensors]
    return None if "" in names else (q.shape[1], operator, told, tuple(names))


def _arrays_of(q: QArray) -> list[Any]:
    """Its arrays in the order of ``_Structure.names``."""
    parts = (getattr(q, name) for name in _PARTS)
    return [array for part in parts for array in (_arrays_of(part) if isinstance(part, QArray) else [part])]


# ---- layers


class _Quantized(nn.Module):
    """What layers have in common: how a weight is given, and read of a state dict that has something else for it."""

    weight: Any

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, QArray):
            if value.shape != tuple(self.weight.shape):
                raise ValueError(f"weight has shape {value.shape}, and the layer's {tuple(self.weight.shape)}")
            value = QuantizedWeight(value)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *how: Any) -> None:
        key, errors = f"{prefix}weight", how[-1]
        given = state_dict.get(key)
        if isinstance(given, QArray) and given.backend == "torch":
            del state_dict[key]  # of a copy that torch made, from which the weight, below, will read
            state_dict.update(QuantizedWeight(given).state_dict(prefix=f"{key}."))
        elif isinstance(given, QArray):
            errors.append(f"{key} is a {given.backend} QArray: give its .to_backend('torch')")
        elif given is not None:
            errors.append(
                f"{key} is a {type(given).__name__}, and the model's is quantized: load it before "
                "aqt_lite.torch.quantize_(model), or quantize it first"
            )
        super()._load_from_state_dict(state_dict, prefix, *how)


class QuantizedLinear(_Quantized, nn.Linear):
    """``nn.Linear`` with a quantized weight (out, in); :func:`aqt_lite.linear` says what it computes.

    With ``activations``, a format, each row of the input is quantized, too: with int8 the sums are of integers.
    """

    weight: QuantizedWeight  # type: ignore[assignment]
    activations: str | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if self.activations is None:
            return self.weight.product(input, self.bias)
        w, bias = self.weight.qarray, self.bias
        per_row: Any = {"dtype": self.activations, "granularity": PerGroup(self.in_features)}
        y: torch.Tensor = linear(quantize(input, **per_row), w, bias)
        if torch.is_grad_enabled() and input.requires_grad:  # straight through, as if the values were multiplied
            values = linear(fake_quantize(input, **per_row), w, bias)
            y = get_backend("torch").straight_through(values, y.detach(), torch.isfinite(values))
        return y


class QuantizedEmbedding(_Quantized, nn.Embedding):
    """``nn.Embedding`` with a quantized table, of which only the rows that are looked up are dequantized."""

    weight: QuantizedWeight  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = taken_from(self.weight.qarray, input.reshape(-1), from_end=False).dequantize()
        return rows.reshape(*input.shape, self.embedding_dim).to(dtype=self.weight.like.dtype)


class QuantizedConv1d(_Quantized, nn.Conv1d):
    """``nn.Conv1d`` with a quantized weight, dequantized at each call: it saves memory, not time."""

    weight: QuantizedWeight  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._conv_forward(input, _values(self.weight, input), self.bias)
        return y


class QuantizedConv2d(_Quantized, nn.Conv2d):
    """``nn.Conv2d`` with a quantized weight, dequantized at each call: it saves memory, not time."""

    weight: QuantizedWeight  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._conv_forward(input, _values(self.weight, input), self.bias)
        return y


class QuantizedConv3d(_Quantized, nn.Conv3d):
    """``nn.Conv3d`` with a quantized weight, dequantized at each call: it saves memory, not time."""

    weight: QuantizedWeight  # type: ignore[assignment]

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self._conv_forward(input, _values(self.weight, input), self.bias)
        return y


class QuantizedConvTranspose1d(_Quantized, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with a quantized weight, dequantized at each call: it saves memory, not time."""

    weight: QuantizedWeight  # type: ignore[assignment]

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return _transposed_convolution(self, input, output_size, nn.functional.conv_transpose1d)


class QuantizedConvTranspose2d(_Quantized, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a quantized weight, dequantized at each call: it saves memory, not time."""

    weight: QuantizedWeight  # type: ignore[assignment]

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return _transposed_convolution(self, input, output_size, nn.functional.conv_transpose2d)


class QuantizedConvTranspose3d(_Quantized, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with a quantized weight, dequantized at each call: it saves memory, not time."""

    weight: QuantizedWeight  # type: ignore[assignment]

    def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        return _transposed_convolution(self, input, output_size, nn.functional.conv_transpose3d)


def _transposed_convolution(
    layer: Any, input: torch.Tensor, output_size: list[int] | None, function: Callable[..., torch.Tensor]
) -> torch.Tensor:
    sizes = (layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size), layer.dilation)
    padding = layer._output_padding(input, output_size, *sizes)
    values = _values(layer.weight, input)
    return function(input, values, layer.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


def _values(weight: QuantizedWeight, like: torch.Tensor) -> torch.Tensor:
    """The values of a kernel, whose codes are read in the order in which they lie."""
    q = weight.qarray
    if not q.transposed:
        values: torch.Tensor = q.dequantize()
    else:  # contiguous: by a kernel in another order torch chooses that of its result
        values = q._as_stored().dequantize().permute(swapped_back(range(q.ndim), q.transposed)).contiguous()
    return values.to(dtype=like.dtype)


_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
    nn.ConvTranspose1d: QuantizedConvTranspose1d,
    nn.ConvTranspose2d: QuantizedConvTranspose2d,
    nn.ConvTranspose3d: QuantizedConvTranspose3d,
}


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


# ---- models


@naming_the_argument
def quantize_(model: nn.Module, rules: Rules | None = None, *, progress: Progress = None) -> nn.Module:
    """Quantize the weights of a model in place: those of Linear, Embedding and Conv layers that rules choose.

    Those are Conv1d to Conv3d and ConvTranspose1d to ConvTranspose3d.

    Parameters
    ----------
    model : torch.nn.Module
    rules : list of (pattern, spec), optional
        As for :func:`aqt_lite.quantize_tree`; paths are the names of parameters, ``"encoder.layers.*.weight"``, which
        may be written with ``/``. The spec of a Linear layer may have ``activations="int8"``: then each row of its
        input is quantized, too. Without rules, the weight of every Linear, Embedding and Conv layer becomes int8 with a
        scale for each output.
    progress : bool or function, optional
        As for :func:`aqt_lite.quantize_tree`.

    Returns
    -------
    torch.nn.Module
        ``model`` itself. Layers that shared a weight share the quantized one.

    Warns
    -----
    UserWarning
        There are no rules, and nothing was quantized.

    Raises
    ------
    ValueError, TypeError
        As :func:`aqt_lite.quantize_tree`; a rule for a parameter that is no weight of these layers. The model is then
        as it was.

    Notes
    -----
    Convolutions dequantize their weight at each call: that saves memory, not time. The weight of a ConvTranspose is
    (in, out, ...), so that its groups and scales lie along other axes; where it has ``groups``, the outputs at the same
    place of each share a scale.

    Buffers are what ``DistributedDataParallel`` sends from the first process to the others before each forward pass,
    codes among them; say ``broadcast_buffers=False`` where every process has quantized or loaded the same model.

    Quantized before anything is exchanged: beside the model, memory is needed for the codes and for one weight.
    Subclasses of these layers (``nn.MultiheadAttention`` has one) may use their weights in other ways, and stay; so do
    layers of other kinds, recurrent ones for instance, and ``transformers``' ``Conv1D``. :func:`plan` shows what stays.

    Examples
    --------
    >>> import torch, aqt_lite.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    >>> model = aqt_lite.torch.quantize_(model, [("0.weight", dict(dtype="int4", granularity=aqt_lite.PerGroup(32)))])
    >>> model(torch.ones(2, 64)).shape, list(model.state_dict())[:4]
    (torch.Size([2, 10]), ['0.bias', '0.weight.storage', '0.weight.scale', '0.weight.mark'])
    """
    slots, already = _slots(model), _already(model)
    chosen = to_quantize(_plans(slots, rules, already), rules, already)
    made = []
    for found in with_progress(chosen, progress, lambda found: found.leaf.path):
        made.append(QuantizedWeight(quantized(found)))
    for found, weight in zip(chosen, made, strict=True):  # nothing here can fail
        for layer in slots[id(found.leaf.array)][1]:
            weight.train(layer.training)
            del layer.weight
            layer.weight = weight
            layer.__class__ = _QUANTIZED[type(layer)]
            if found.extra.get("activations") is not None:
                layer.activations = found.extra["activations"]
    return model


@naming_the_argument
def plan(model: nn.Module, rules: Rules | None = None) -> TreePlan:
    """What :func:`quantize_` would do, as a table of the model's parameters; see :func:`aqt_lite.plan_tree`.

    Examples
    --------
    >>> import torch, aqt_lite.torch
    >>> print(aqt_lite.torch.plan(torch.nn.Linear(64, 32)))
    leaf    shape     of       becomes                   bytes  after
    weight  (32, 64)  float32  int8, PerChannel(axis=0)   8192   2176
    bias    (32,)     float32  as it is                    128    128
    2 leaves                                              8320   2304  (3.61x smaller)
    """
    return TreePlan(tuple(_plans(_slots(model), rules, _already(model))))


@naming_the_argument
def quantized_weights(model: nn.Module) -> dict[str, QArray]:
    """The quantized weights of a model by the names that the parameters had, tied ones under each of their names.

    Examples
    --------
    >>> import torch, aqt_lite.torch
    >>> model = torch.nn.Linear(64, 32)
    >>> before = model.state_dict()
    >>> after = aqt_lite.torch.quantized_weights(aqt_lite.torch.quantize_(model))
    >>> report = aqt_lite.tree_report({name: before[name] for name in after}, after)
    >>> report.leaves[0].path
    'weight'
    """
    named = model.named_modules(remove_duplicate=False)
    return {path: module.qarray for path, module in named if isinstance(module, QuantizedWeight)}


_Slots = dict[int, tuple[list[str], list[nn.Module], torch.Tensor, str]]
"""For each parameter, by identity: its names, the layers whose weight it is, itself, and why it cannot be quantized."""


def _slots(model: nn.Module) -> _Slots:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module: for arrays, aqt_lite.quantize_tree")
    found: _Slots = {}
    for prefix, layer in model.named_modules(remove_duplicate=False):
        for name, parameter in layer._parameters.items():
            if parameter is None:
                continue
            path = f"{prefix}.{name}" if prefix else name
            if nn.parameter.is_lazy(parameter):
                raise ValueError(f"{path} has no shape yet: call the model once before it is quantized")
            paths, layers, _, why = found.get(id(parameter), ([], [], parameter, ""))
            if path in paths:
                continue
            paths.append(path)
            if not any(layer is known for known in layers):
                layers.append(layer)
            found[id(parameter)] = (paths, layers, parameter, why or _why_not(layer, name))
    return found


def _axes(layers: list[nn.Module]) -> Axes | None:
    """What the axes of a weight are for where that is not (out, in, ...)."""
    return Axes((1,), (0,)) if any(isinstance(layer, _TRANSPOSED) for layer in layers) else None


def _why_not(layer: nn.Module, name: str) -> str:
    """Why a parameter of a layer cannot be quantized; empty where it can."""
    kind = type(layer)
    if kind not in _QUANTIZED or name != "weight":
        known = ", ".join(layer.__name__ for layer in _QUANTIZED)
        way = "one's own layer may hold aqt_lite.torch.QuantizedWeight(aqt_lite.quantize(weight))"
        what = f"it is the {name} of a {kind.__name__}"
        return f"{what}, and quantized are weights of {known}, not of their subclasses; {way}"
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return "its Embedding has max_norm, with which looking up writes to the table"
    return ""


def _already(model: nn.Module) -> list[str]:
    """Paths of the weights that are quantized."""
    return [path for path, module in model.named_modules() if isinstance(module, QuantizedWeight)]


def _plans(slots: _Slots, rules: Rules | None, already: list[str]) -> list[Planned]:
    leaves = [
        Leaf(paths[0], parameter, None if why else "linear", tuple(paths[1:]), why, _axes(layers))
        for paths, layers, parameter, why in slots.values()
    ]
    plans = planned(
        leaves,
        rules,
        layout=None,
        by_default=lambda leaf: not leaf.why_not,
        extra=("activations",),
        already=already,
    )
    for found in plans:
        _check_extra(found, slots[id(found.leaf.array)][1])
    return plans


def _check_extra(found: Planned, layers: list[nn.Module]) -> None:
    arguments = found.arguments or {}
    with naming(found.leaf.path):
        if arguments.get("backend", "torch") != "torch":
            raise ValueError(f"backend={arguments['backend']!r}: a torch model holds torch's arrays")
        if found.for_dense:
            raise ValueError("layout='dense': the weights of these layers are (out, in), layout='linear'")
    check_activations(found, [type(layer).__name__ for layer in layers if not isinstance(layer, nn.Linear)])
