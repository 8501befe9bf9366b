"""Rules: which leaves of a model are quantized, how, and what becomes of each.

Owns: patterns, specs, layouts of weights, and the plan that follows from them. Imports: the container, ``quantize`` and
its checks. It knows leaves by their paths; how they are found in a tree or a module is its callers' business.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from aqt_lite._arguments import check_floats
from aqt_lite._callers import warn
from aqt_lite._foreign import refusal
from aqt_lite._keywords import said_here
from aqt_lite._near import nearest, not_known
from aqt_lite._registry import backend_of
from aqt_lite._shapes import Swapped, swapped_forth
from aqt_lite.api import quantize
from aqt_lite.bounds import AUTO
from aqt_lite.dialects import AQT_LITE, dialect_of
from aqt_lite.elements import FLOAT_TYPES
from aqt_lite.formats import FORMATS, format_of
from aqt_lite.granularity import Block, Granularity, PerGroup, block_of, granularity_of, grid_of
from aqt_lite.packing import bytes_of
from aqt_lite.qarray import MOST_SWAPPED, QArray

__all__ = [
    "LAYOUTS",
    "Axes",
    "Leaf",
    "Planned",
    "Rules",
    "check_activations",
    "naming",
    "planned",
    "quantized",
    "specs",
    "to_quantize",
]

Rules = Sequence[tuple["str | re.Pattern[str]", "dict[str, Any] | None"]]
"""``(pattern, spec)`` pairs, of which the first that matches a path says what becomes of the leaf."""

LAYOUTS = {"linear": (0, 1), "dense": (-1, -2)}
"""Weights of products: the axis of their outputs, and the one that a product sums over.

"linear" is (out, in), with the axes of a kernel after them, as torch and Equinox have it; "dense" is (in, out), with
those axes before, as Flax and Keras have it.
"""

_UNKNOWN = "unknown"


@dataclass(frozen=True)
class Axes:
    """What the axes of a weight are for. Those that are not named are the places of a kernel."""

    outputs: tuple[int, ...]
    inputs: tuple[int, ...]
    """What a product sums over, in the order in which groups run through them."""
    each: tuple[int, ...] = ()
    """Along which there is one weight after the other: layers of a scan, experts."""

    def for_dense(self, ndim: int) -> tuple[int, int] | None:
        """How many of inputs and outputs there are, where all axes follow each other: what ``for_dense`` is told."""
        counts = len(self.inputs), len(self.outputs)
        if (*self.each, *self.inputs, *self.outputs) != tuple(range(ndim)) or not 1 <= min(counts) <= max(
            counts
        ) <= MOST_SWAPPED:
            return None
        return counts

    def places_last(self, ndim: int) -> tuple[int, int] | None:
        """How many inputs there are and how many axes behind them, places of a kernel; what ``for_dense`` is told then.

        Places are few, and fill no whole bytes with codes of few bits: in rows of inputs these lie closer.
        """
        end = max(self.inputs) + 1
        counts = len(self.inputs), ndim - end
        behind = set(range(end, ndim)) - {*self.outputs, *self.each}
        follow_each_other = self.inputs == tuple(range(end - len(self.inputs), end))
        return counts if behind and follow_each_other and max(counts) <= MOST_SWAPPED else None


@dataclass(frozen=True)
class Leaf:
    """An array of a model, and what its place there says of it."""

    path: str
    array: Any
    layout: str | None = None
    """One of ``LAYOUTS``; None where the place does not tell."""
    others: tuple[str, ...] = ()
    """Further paths under which the same array stands: it is tied."""
    why_not: str = ""
    """Why it cannot be quantized where it stands."""
    axes: Axes | None = None
    """Where more is known than a layout: what each axis is for."""
    is_added: bool = False
    """Whether it is known to be a bias or the like: rules about weights pass it by, whatever its shape."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them."""
        return (self.path, *self.others)


@dataclass(frozen=True)
class Planned:
    """What becomes of a leaf."""

    leaf: Leaf
    arguments: dict[str, Any] | None
    """Of ``quantize``; None where the leaf stays as it is."""
    for_dense: tuple[int, int] | None = None
    """How many axes of inputs and of outputs its codes are stored for."""
    places_last: tuple[int, int] | None = None
    """Likewise, of a kernel: how many of inputs, and how many behind them."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Keys of the spec that are not ``quantize``'s."""
    example: QArray | None = None
    """Zeros, one along each axis, quantized by these arguments on NumPy."""

    @property
    def becomes(self) -> str:
        """In words."""
        q = self.example
        if q is None:
            return "as it is"
        kept = f", scales {q.scale.dtype}" if isinstance(q.scale, QArray) else ""
        words = "".join(f", {key} {value}" for key, value in self.extra.items())
        return f"{q.dtype}, {granularity_of(q.block)}{kept}{', for dense' if self.for_dense else ''}{words}"

    def nbytes(self) -> int:
        """Bytes of what it becomes."""
        shape = tuple(self.leaf.array.shape)
        if self.example is None:
            return nbytes_of_array(self.leaf.array)
        return _nbytes_as(self.example, shape, swapped=self.for_dense or self.places_last or False)


def nbytes_of_array(x: Any) -> int:
    """Bytes of an array of any library, also of one that has no values."""
    b = backend_of(x)
    known = getattr(x, "nbytes", None)
    if isinstance(known, int):
        return known
    return 0 if b is None else int(math.prod(x.shape) * np.zeros(0).astype(b.dtype_name(x)).itemsize)


def _nbytes_as(q: QArray, shape: tuple[int, ...], *, swapped: Swapped = False) -> int:
    """Bytes of an array of that shape that is quantized as ``q`` is."""
    stored = swapped_forth(shape, swapped)
    if q._element.packs and stored:
        total = math.prod(stored[:-1]) * bytes_of(stored[-1], q.bits)
    else:
        total = math.prod(stored) * q.storage.dtype.itemsize
    grid = grid_of(shape, q.block)
    for part in (q.scale, q.zero_point, q.offset):
        if part is not None:
            total += _nbytes_as(part, grid) if isinstance(part, QArray) else math.prod(grid) * part.dtype.itemsize
    return total


# ---- rules as users write them

_KEYWORDS = tuple(name for name in inspect.signature(quantize).parameters if name != "x")


class _Rule:
    """A rule that has been read."""

    def __init__(self, number: int, pattern: Any, spec: Any, keys: tuple[str, ...]) -> None:
        shown = pattern if isinstance(pattern, str) else getattr(pattern, "pattern", pattern)
        self.title = f"rule {number} ({shown!r})"
        if not isinstance(pattern, str | re.Pattern) or (isinstance(shown, bytes)):
            raise TypeError(
                f"rule {number}: the pattern is a {type(pattern).__name__}: give a glob or a compiled regex"
            )
        if spec is not None and not isinstance(spec, dict):
            raise TypeError(
                f"{self.title}: the spec is a {type(spec).__name__}: give a dict of quantize's keywords, for instance "
                "dict(dtype='int4'), or None to leave what matches as it is"
            )
        self._full = re.compile(fnmatch.translate(pattern)).match if isinstance(pattern, str) else pattern.fullmatch
        self.pattern, self.spec, self.is_glob = shown, spec, isinstance(pattern, str)
        for key in spec or ():
            if key not in keys:
                raise TypeError(f"{self.title}: {_no_such_key(key, keys)}")
        layout = (spec or {}).get("layout")
        if layout is not None:
            check_layout(f"{self.title}: layout", layout)

    def matches(self, path: str) -> bool:
        """Whether it is about that path; names with dots, as torch has them, are also paths with "/"."""
        return bool(self._full(path) or ("." in path and self._full(path.replace(".", "/"))))

    @property
    def is_about_matrices(self) -> bool:
        """Whether it is about weights of products, and so about no leaf of fewer than two dimensions."""
        return self.spec is not None and self.spec.get("layout", _UNKNOWN) is not None

    def says_what(self, other: _Rule | None) -> bool:
        """Whether another rule says the same."""
        mine, its = self.spec, None if other is None else other.spec
        try:
            return self is other or bool(mine == its)
        except ValueError:  # arrays in them
            return False


def check_layout(argument: str, layout: Any) -> None:
    """ValueError where it is none."""
    if not (isinstance(layout, str) and layout in LAYOUTS):
        words = not_known(argument, layout, LAYOUTS, "None")
        raise ValueError(f"{words}; weights are (out, in) in 'linear', and (in, out) in 'dense'")


def _no_such_key(key: Any, keys: tuple[str, ...]) -> str:
    if way := said_here(str(key), keys):
        return f"there is no {key!r}: use {way}"
    near = nearest(key, keys, likeness=0.6)
    return f"there is no {key!r}" + (f": did you mean {near!r}?" if near else f"; a spec has {', '.join(keys)}")


def _read(rules: Any, extra: tuple[str, ...]) -> list[_Rule]:
    if isinstance(rules, dict):
        raise TypeError(
            "rules is a dict: give a list of (pattern, spec) pairs, list(rules.items()); their order counts"
        )
    if isinstance(rules, str) or not isinstance(rules, Iterable):
        example = {"dtype": rules if rules in FORMATS else "int4"}
        raise TypeError(
            f"rules is a {type(rules).__name__}: give a list of (pattern, spec) pairs, rules=[('*', {example})]"
        )
    found = []
    for number, rule in enumerate(rules, 1):
        if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2:
            raise TypeError(f"rule {number} is {rule!r}: give a pair (pattern, spec)")
        pattern, spec = rule
        found.append(_Rule(number, pattern, spec, (*_KEYWORDS, "layout", *extra)))
    return found


# ---- the plan


def planned(
    leaves: Sequence[Leaf],
    rules: Rules | None,
    *,
    layout: str | None,
    by_default: Callable[[Leaf], bool],
    extra: tuple[str, ...] = (),
    already: Sequence[str] = (),
) -> list[Planned]:
    """What becomes of each leaf; raises where a rule, or what it says of a leaf, makes no sense.

    Without rules, those that ``by_default`` names become int8 with a scale for each output. ``already`` are paths of
    weights that are quantized, and no leaves any more.
    """
    if layout is not None:
        check_layout("layout", layout)
    chosen: list[dict[str, Any] | None]
    if rules is None:
        chosen = [{} if by_default(leaf) else None for leaf in leaves]
    else:
        chosen = _chosen(leaves, rules, extra, already)
    refused = [leaf for leaf, spec in zip(leaves, chosen, strict=True) if spec is not None and leaf.why_not]
    if refused:
        raise ValueError(
            f"{refused[0].path} cannot be quantized{_also([leaf.path for leaf in refused[1:]])}: {refused[0].why_not}; "
            f"a rule ({refused[0].path!r}, None) before the one that matches leaves it as it is"
        )
    plans, failed, at_first = list[Planned](), list[str](), None
    for leaf, spec in zip(leaves, chosen, strict=True):
        try:
            plans.append(_plan(leaf, spec, layout, extra))
        except (TypeError, ValueError) as error:
            failed.append(leaf.path)
            at_first = at_first or error
    if at_first is not None:
        raise type(at_first)(f"{at_first}{_also(failed[1:])}") from at_first
    return plans


def _also(paths: list[str]) -> str:
    """What is said of other leaves, behind what is said of the first."""
    if not paths:
        return ""
    return f" (and {len(paths)} more: {', '.join(paths[:3])}{', ...' if paths[3:] else ''})"


def _chosen(
    leaves: Sequence[Leaf], rules: Any, extra: tuple[str, ...], already: Sequence[str]
) -> list[dict[str, Any] | None]:
    read, passed = _read(rules, extra), dict[_Rule, str]()
    used, deciding, matrices = set[_Rule](), set[_Rule](), dict[_Rule, set[str]]()
    deciding_any = set[_Rule]()  # leaf; those before, a matrix

    def first(path: str, passes_by: bool) -> _Rule | None:
        found = None
        for rule in read:
            if rule.matches(path):
                if passes_by and rule.is_about_matrices:
                    passed.setdefault(rule, path)
                    continue
                used.add(rule)
                found = found or rule
                if not passes_by:
                    matrices.setdefault(rule, set()).add(path)
        if found is not None:
            deciding_any.add(found)
            if not passes_by:
                deciding.add(found)
        return found

    chosen = []
    for leaf in leaves:
        passes_by = leaf.is_added or len(leaf.array.shape) < 2
        of_paths = [first(path, passes_by) for path in leaf.paths]
        rule = of_paths[0]
        for path, other in zip(leaf.others, of_paths[1:], strict=True):
            if not (other.says_what(rule) if other else rule is None or rule.spec is None):
                says = [
                    f"{r.title} for {p}" if r else f"no rule for {p}" for p, r in ((leaf.path, rule), (path, other))
                ]
                raise ValueError(
                    f"{leaf.path} and {path} are one array, but there is {says[0]} and {says[1]}: "
                    "let rules say the same of both, or untie them first"
                )
        chosen.append(None if rule is None else rule.spec)
    for rule in read:
        done: list[str] = []
        if rule not in used:
            done = [path for path in already if rule.matches(path)]
        elif rule.spec is not None and rule not in deciding_any:
            done = [path for path in already if next((r for r in read if r.matches(path)), None) is rule]
        if done:
            more = f" (and {len(done) - 1} more)" if done[1:] else ""
            others = "no other weight that no rule before it matches" if rule in used else "no other weight"
            raise ValueError(
                f"{rule.title} matches {done[0]}{more}, which is quantized already, and {others}: quantize "
                "a model once, with all rules, or make it anew"
            )
        if rule not in used:
            raise ValueError(_matches_nothing(rule, passed.get(rule), [p for leaf in leaves for p in leaf.paths]))
        if rule in matrices and rule not in deciding:  # for all that is left: nothing is; for a part: it comes too late
            its = matrices[rule]
            wider = next((other for other in read[: read.index(rule)] if matrices.get(other, set()) > its), None)
            if wider is not None:
                warn(
                    f"{rule.title} decides nothing: the first rule that matches does, and all that it matches, "
                    f"{min(its)} for one, {wider.title} matches as well: put the narrower rule first",
                    UserWarning,
                )
    return chosen


def specs(rules: Rules, extra: tuple[str, ...]) -> Callable[[str], dict[str, Any] | None]:
    """The spec of the first rule that matches a path, as a function of it; errors where a rule cannot be read."""
    read = _read(rules, extra)
    return lambda path: next((rule.spec for rule in read if rule.matches(path)), None)


def _matches_nothing(rule: _Rule, passed: str | None, paths: list[str]) -> str:
    if passed is not None:
        return (
            f"{rule.title} matches no leaf of two dimensions or more: it matches {passed}, and a rule is about "
            "weights of products unless it says layout=None; say that to quantize it all the same"
        )
    near = difflib.get_close_matches(rule.pattern, paths, 3, 0.3) or paths[:3]
    return (
        f"{rule.title} matches no leaf: there are {', '.join(near) if near else 'none'}"
        + (f", and {len(paths) - len(near)} others" if len(paths) > len(near) else "")
        + (_perhaps_meant(rule.pattern, paths) if rule.is_glob else "")
    )


def _perhaps_meant(pattern: str, paths: list[str]) -> str:
    """A glob is about the whole path: of a part of one, what would match. And of a regular expression how to say so."""
    part = pattern.replace(".", "/").strip("/")
    for whole in (part, f"{part}/*", f"*/{part}", f"*/{part}/*"):
        for path in paths:
            if part and fnmatch.fnmatchcase(path.replace(".", "/"), whole):
                return f"; a pattern is about the whole path: {whole!r} matches {path}"
    with contextlib.suppress(re.error):
        found = next(filter(re.compile(pattern).fullmatch, paths), None)
        if found is not None:
            return f"; as a regular expression, re.compile({pattern!r}), it matches {found}"
    return ""


def _plan(leaf: Leaf, spec: dict[str, Any] | None, layout: str | None, extra: tuple[str, ...]) -> Planned:
    if spec is None:
        return Planned(leaf, None)
    with naming(leaf.path):
        _check_quantizable(leaf.array)
        asked = spec.get("layout", _UNKNOWN)
        if leaf.axes is not None and asked is not None and asked != _UNKNOWN:
            raise ValueError(f"layout={asked!r}: its layer says what its axes are for; leave layout out")
        of_leaf = asked if asked != _UNKNOWN else layout or leaf.layout or _UNKNOWN
        arguments = {key: value for key, value in spec.items() if key in _KEYWORDS}
        if isinstance(arguments.get("dtype"), str) and arguments["dtype"] == AUTO:
            raise ValueError("dtype='auto' depends on values, at which no plan looks: name the dtype beside the bound")
        shape = tuple(leaf.array.shape)
        whole = dialect_of(arguments.get("dialect", AQT_LITE)).whole is not None  # such a dialect chooses the blocks
        if asked == _UNKNOWN and len(shape) != 2 and leaf.layout is None:
            of_leaf = _UNKNOWN  # what is said of all leaves is said of matrices
        axes = None
        if of_leaf is not None and len(shape) >= 2:
            axes = leaf.axes or (None if of_leaf == _UNKNOWN else _axes_of(of_leaf, len(shape)))
            words = f"layout={of_leaf!r}, {_ROLES[of_leaf]}" if leaf.axes is None and axes else "its layer"
            arguments |= _granularity(shape, spec, axes, words, chosen=not whole)
        row = (*(1 for _ in shape[1:]), *shape[-1:]) if whole else (1,) * len(shape)
        example = quantize(np.zeros(row).astype(_dtype_name(leaf.array)), **_without_values(arguments))
        if whole and axes is not None:
            said = f"dialect={dialect_of(spec['dialect']).name!r}, which makes {granularity_of(example.block)},"
            _check_serves(said, example.block, shape, axes, words)
    others = {key: spec[key] for key in extra if key in spec}
    for_dense = None if axes is None else axes.for_dense(len(shape))
    places_last = None if axes is None else _places_last(example, shape, axes)
    return Planned(leaf, arguments, for_dense, places_last, others, example)


def _places_last(example: QArray, shape: tuple[int, ...], axes: Axes) -> tuple[int, int] | None:
    """``Axes.places_last`` where codes of a kernel lie closer then."""
    order = axes.places_last(len(shape))
    if order is None or any(size not in (None, 1) and a not in axes.inputs for a, size in enumerate(example.block)):
        return None
    return order if _nbytes_as(example, shape, swapped=order) < _nbytes_as(example, shape) else None


_ROLES = {"linear": "(out, in, ...)", "dense": "(..., in, out)"}


def _axes_of(layout: str, ndim: int) -> Axes:
    out, inside = (axis % ndim for axis in LAYOUTS[layout])
    return Axes((out,), (inside,))


def _granularity(
    shape: tuple[int, ...], spec: dict[str, Any], axes: Axes | None, words: str, *, chosen: bool
) -> dict[str, Any]:
    """The granularity of a weight with those axes, where the spec does not say it; errors where it does not fit.

    Where none may be ``chosen``, since the dialect does, there are only the errors.
    """
    ndim, given = len(shape), spec.get("granularity")
    group = given.size if isinstance(given, PerGroup) and given.axis == -1 else None  # along inputs, wherever they are
    if axes is None:
        if given is not None and group is None:
            return {}
        if ndim > 2 and given is None and chosen:
            raise ValueError(
                f"shape {shape}: give a granularity, for its {ndim} axes do not tell what a scale is for: a "
                "convolution's, PerChannel(0) for (out, in, ...) or PerChannel(-1) for (..., in, out); that of a stack "
                f"of matrices (n, in, out), PerBlock((1, -1, 1)); or layout='linear' or 'dense' for a convolution"
            )
        raise ValueError(
            f"shape {shape}: its path does not tell (in, out) from (out, in): give layout='dense' if it is multiplied "
            "as x @ w, layout='linear' if as x @ w.T (or looked up by rows), layout=None if neither"
        )
    if not chosen:
        return {}
    if given is None:
        form = format_of(spec.get("dtype", "int8"))
        if not form.scaled:
            return {}
        group = form.group
    if group is not None:
        return {"granularity": granularity_of(_block_of_group(shape, group, axes.inputs))}
    if given is None:
        return {"granularity": _of_outputs(axes, ndim)}
    _check_serves(f"granularity={given}", block_of(given, ndim), shape, axes, words)
    return {}


def _of_outputs(axes: Axes, ndim: int) -> Granularity:
    """A scale for each output."""
    for_each = {*axes.outputs, *axes.each}
    return granularity_of(tuple(1 if a in for_each else None for a in range(ndim)))


def _check_serves(said: str, block: Block, shape: tuple[int, ...], axes: Axes, words: str) -> None:
    """ValueError where products cannot use such blocks; ``said`` is who asked for them."""
    of_outputs = _of_outputs(axes, len(shape))
    if all(block[a] == 1 for a in axes.inputs) and math.prod(shape[a] for a in axes.inputs) > 1:
        raise ValueError(
            f"{said} gives each input a scale of its own in {words} of shape {shape}: products cannot use "
            f"that; {of_outputs} has one for each output and {_group_in_words(axes)} for groups of "
            "inputs. If the layout is another, say layout=; layout=None takes the granularity as it is"
        )
    shared = [a for a in axes.each if block[a] != 1 and shape[a] > 1]
    if shared:
        raise ValueError(
            f"{said} shares scales along axis {shared[0]} of shape {shape}, along which there is one "
            f"weight after the other: give {of_outputs}, or PerGroup(size)"
        )


def _group_in_words(axes: Axes) -> str:
    return f"PerGroup(size, {axes.inputs[0]})" if len(axes.inputs) == 1 else "PerGroup(size)"


def _block_of_group(shape: tuple[int, ...], group: int, inputs: tuple[int, ...]) -> tuple[int | None, ...]:
    """Blocks of ``group`` neighbours along the inputs, which follow each other as if they were one axis."""
    block: list[int | None] = [1] * len(shape)
    left = group
    for at, axis in reversed(list(enumerate(inputs))):
        length = shape[axis]
        if at and length and left % length == 0:
            block[axis], left = None, left // length
        elif length % left == 0 or math.prod(shape[a] for a in inputs[:at]) == 1:
            block[axis], left = left, 1
        else:
            lengths = " x ".join(str(shape[a]) for a in inputs)
            raise ValueError(
                f"groups of {group} along inputs of {lengths} would begin inside a row of {length}: give a size that "
                f"divides {length}, or a multiple of it"
            )
    return tuple(block)


def check_activations(found: Planned, others: list[str]) -> None:
    """Errors where a spec's ``activations`` makes no sense; ``others`` are layers that have none of their own."""
    activations = found.extra.get("activations")
    if activations is None:
        return
    with naming(found.leaf.path):
        if others:
            raise ValueError(f"activations={activations!r} is for Linear layers, and this is the weight of {others[0]}")
        if not isinstance(activations, str):
            raise TypeError(f"activations={activations!r}: give the name of a format, such as 'int8'")
        format_of(activations, "activations")
        quantize([[0.0]], activations, granularity=PerGroup(1))


def _check_quantizable(x: Any) -> None:
    if isinstance(x, QArray):
        raise TypeError("it is a QArray already, quantized before: let no rule match it, or dequantize it first")
    b = backend_of(x)
    if b is None:
        raise TypeError(refusal(x, "it") or f"it is a {type(x).__name__}, not an array")
    check_floats(x, "it", b)


def _dtype_name(x: Any) -> str:
    b = backend_of(x)
    assert b is not None
    return b.dtype_name(x)


def _without_values(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same for an array of one element: numbers in the place of arrays that are given."""
    some = {key: value for key, value in arguments.items() if key not in ("backend", "on_clip")}
    if isinstance(some.get("scale"), QArray):
        del some["scale"]
        if some.pop("zero_point", None) is not None:
            some["scheme"] = "affine"
    for key, number in (("scale", 1.0), ("zero_point", 0), ("offset", 0.0), ("key", 0), ("mask", False)):
        if some.get(key) is not None and not isinstance(some[key], str):
            some[key] = number
    return some


def is_matrix(leaf: Leaf) -> bool:
    """Whether it is quantized where no rules are given: floats of two dimensions, neither of length 1."""
    x = leaf.array
    if isinstance(x, QArray) or len(x.shape) != 2 or leaf.why_not:
        return False
    b = backend_of(x)
    return b is not None and b.dtype_name(x) in FLOAT_TYPES and 1 not in x.shape


def quantized(plan: Planned) -> QArray:
    """The leaf, quantized as planned."""
    assert plan.arguments is not None
    with naming(plan.leaf.path):
        q = quantize(plan.leaf.array, **plan.arguments)
        order = plan.for_dense or plan.places_last
        return q if order is None else q.for_dense(*order)


class naming:  # noqa: N801 - a context manager that reads like a phrase
    """Errors inside say which leaf they are about."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, TypeError | ValueError):
            of_kind = TypeError if isinstance(error, TypeError) else ValueError
            raise of_kind(f"{self.path or 'params'}: {error}") from error


def named(plans: Iterable[Planned]) -> Iterator[Planned]:
    """Those that are quantized."""
    return (plan for plan in plans if plan.arguments is not None)


def to_quantize(plans: Sequence[Planned], rules: Rules | None, already: Sequence[str] = ()) -> list[Planned]:
    """Those that are quantized; a warning where nobody said which, and there are none, nor were before."""
    chosen = list(named(plans))
    if rules is None and plans and not (chosen or already):
        leaf = max((plan.leaf for plan in plans), key=lambda leaf: math.prod(leaf.array.shape))
        why = leaf.why_not or "without rules only floating-point matrices are"
        warn(
            f"nothing was quantized; of {len(plans)} arrays the largest is {leaf.path or 'params'!r} of shape "
            f"{tuple(leaf.array.shape)}: {why}"
        )
    return chosen
