"""Whole models: trees of arrays, of which rules say which leaves are quantized.

Owns: walking through trees, and what is done to all of their leaves: quantizing, dequantizing, counting, reporting.
Imports: the rules, the container, the error report, and the registry, for containers of libraries in use.

A tree is nested dicts, lists and tuples (also subclasses of them, named tuples and other mappings), and, where JAX is
in use, whatever is registered with ``jax.tree_util``. Leaves that are no arrays stay what they are.
"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from aqt_lite import _registry
from aqt_lite._foreign import refusal
from aqt_lite._keywords import naming_the_argument
from aqt_lite._near import shown
from aqt_lite._protocol import Node
from aqt_lite._registry import backend_of
from aqt_lite._rules import (
    Leaf,
    Planned,
    Rules,
    is_matrix,
    naming,
    nbytes_of_array,
    planned,
    quantized,
    to_quantize,
)
from aqt_lite.qarray import QArray
from aqt_lite.report import ErrorReport, error_report

__all__ = [
    "LeafReport",
    "TreePlan",
    "TreeReport",
    "dequantize_tree",
    "plan_tree",
    "quantize_tree",
    "tree_nbytes",
    "tree_report",
]

Progress = bool | Callable[[Sequence[Any]], Iterable[Any]] | None

_T = TypeVar("_T")

_LAYOUT_OF_NAMES = {"kernel": "dense", "weight": "linear", "embedding": "linear"}
"""What the last part of a path says of a matrix: Flax and Keras name (in, out) "kernel", torch and Equinox (out, in)
"weight"; of an embedding, rows are looked up."""


@naming_the_argument
def quantize_tree(
    params: Any, rules: Rules | None = None, *, layout: str | None = None, progress: Progress = None
) -> Any:
    """Quantize the leaves of a tree that rules choose: a new tree, with a :class:`QArray` in the place of each.

    Parameters
    ----------
    params : tree of arrays
        Nested dicts, lists and tuples of arrays of any library (a torch ``state_dict``, Flax parameters), or any JAX
        pytree (an Equinox module). It is not changed, and what is not quantized is not copied.
    rules : list of (pattern, spec), optional
        Pattern: a glob on the leaf's path (``"encoder/*/kernel"``), in which ``*`` matches ``/``, too, or a compiled
        regular expression, either for the whole path; names with dots (a torch ``state_dict``) match with ``/`` in
        their place, too. Spec: a dict of :func:`quantize`'s keywords, ``dict(dtype="int4", granularity=PerGroup(32))``,
        and ``layout``; or None, which leaves the leaf as it is. The first rule that matches wins; what none matches
        stays as it is. A rule is about weights of products: leaves of fewer than two dimensions (biases, norms) it
        passes by, unless it says ``layout=None``. Without rules, every floating-point matrix becomes int8 with a scale
        for each output.
    layout : {"dense", "linear"}, optional
        How matrices are multiplied, where the spec does not say: "dense" for weights (in, out) as in Flax, "linear"
        for (out, in) as in torch and for embeddings. By default torch tensors are "linear", and of others the last part
        of the path tells: "kernel" is dense, "weight" and "embedding" are linear; any other raises an error.
    progress : bool or function, optional
        Whether to say on stderr how far it is; by default where that is a terminal and it takes more than a second.
        Or a function that is given the leaves and yields them, such as ``tqdm.tqdm``.

    Returns
    -------
    tree
        Of the same structure. An array that stood in several places (tied weights) is quantized once, and the QArray
        stands in all of them.

    Warns
    -----
    UserWarning
        There are no rules, and nothing was quantized.

    Raises
    ------
    ValueError
        A rule that matches nothing; a granularity that does not fit the layout; NaN; tied leaves of which rules say
        different things. Errors name the path.
    TypeError
        A key that a spec does not have; a leaf that cannot be quantized, of integers for instance.

    Notes
    -----
    The layout says what a scale is for. With ``layout="dense"`` the default granularity is ``PerChannel(1)``, the one
    of "linear" ``PerChannel(0)``: a scale for each output; ``PerGroup(size)`` without an axis, and the groups of block
    formats, lie along the axis that a product sums over; and the codes are stored as :meth:`QArray.for_dense` does.
    Any other granularity is taken as it is, and refused where it would give each input a scale of its own. A spec with
    ``layout=None`` is about arrays that are no weights of products: everything is as :func:`quantize` has it.

    Leaves are quantized one after the other: beside ``params`` and what is returned, memory is needed for one leaf. A
    tree with an error in it is not quantized in part.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> params = {"layer": {"kernel": np.ones((64, 32), "float32"), "bias": np.zeros(32, "float32")}}
    >>> q = aqt_lite.quantize_tree(params)
    >>> q["layer"]["kernel"].granularity, q["layer"]["bias"] is params["layer"]["bias"]
    (PerChannel(axis=1), True)
    >>> q = aqt_lite.quantize_tree(params, [("*/kernel", dict(dtype="int4", granularity=aqt_lite.PerGroup(32)))])
    >>> q["layer"]["kernel"].granularity, aqt_lite.dense(np.ones(64, "float32"), **{"w": q["layer"]["kernel"]}).shape
    (PerGroup(size=32, axis=0), (32,))
    """
    leaves = _quantizable_leaves(params)
    return quantized_as_planned(
        params, to_quantize(_plans(leaves, rules, layout), rules, quantized_already(leaves)), progress
    )


@naming_the_argument
def plan_tree(params: Any, rules: Rules | None = None, *, layout: str | None = None) -> TreePlan:
    """What :func:`quantize_tree` would do, as a table: nothing is quantized, and values are not looked at.

    Leaves may be ``jax.ShapeDtypeStruct`` or meta tensors. Parameters and errors as of :func:`quantize_tree`, NaN
    excepted.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> params = {"kernel": np.ones((64, 32), "float32"), "bias": np.zeros(32, "float32")}
    >>> print(aqt_lite.plan_tree(params, [("kernel", dict(dtype="int4", granularity=aqt_lite.PerGroup(32)))]))
    leaf    shape     of       becomes                                       bytes  after
    kernel  (64, 32)  float32  int4, PerGroup(size=32, axis=0), for dense    8192   1280
    bias    (32,)     float32  as it is                                       128    128
    2 leaves                                                                 8320   1408  (5.91x smaller)
    """
    return TreePlan(tuple(_plans(_quantizable_leaves(params), rules, layout)))


@naming_the_argument
def dequantize_tree(tree: Any, dtype: Any = None) -> Any:
    """The tree with the array of its values in the place of each :class:`QArray`; tied ones are tied again.

    Parameters
    ----------
    tree : tree of arrays and QArrays
    dtype : str, optional
        As for :func:`dequantize`.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> q = aqt_lite.quantize_tree({"weight": np.ones((2, 3), "float32")})
    >>> aqt_lite.dequantize_tree(q)["weight"].dtype
    dtype('float32')
    """
    made: dict[int, Any] = {}
    leaves = leaves_of(tree, "tree")
    for path, leaf in leaves:
        if isinstance(leaf, QArray) and id(leaf) not in made:
            with naming(path):
                made[id(leaf)] = leaf.dequantize(dtype)
    return _rebuilt(tree, [made.get(id(leaf), leaf) for _, leaf in leaves])


@naming_the_argument
def tree_nbytes(tree: Any) -> int:
    """Bytes of all arrays and QArrays of a tree, of tied ones once.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> params = {"weight": np.ones((64, 32), "float32")}
    >>> aqt_lite.tree_nbytes(params), aqt_lite.tree_nbytes(aqt_lite.quantize_tree(params))
    (8192, 2304)
    """
    once = {_key_of(leaf): leaf for _, leaf in leaves_of(tree, "tree") if _is_array(leaf)}
    return sum(nbytes_of_array(leaf) for leaf in once.values())


@naming_the_argument
def tree_report(params: Any, quantized: Any, *, progress: Progress = None) -> TreeReport:
    """How far each QArray of a tree is from the leaf of ``params`` that it stands for; worst first.

    Parameters
    ----------
    params : tree of arrays
        What was quantized.
    quantized : tree
        Of the same structure, as :func:`quantize_tree` returns it. QArrays and arrays may be of different libraries.
    progress
        As for :func:`quantize_tree`.

    Returns
    -------
    TreeReport
        Prints as a table; ``aqt_lite.plots.plot_report`` draws it.

    Raises
    ------
    TypeError
        QArrays are in ``params``, and none in ``quantized``.
    ValueError
        The trees differ in structure or shapes; naming the path.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> params = {"kernel": np.linspace(-1, 1, 2048, dtype="float32").reshape(64, 32), "bias": np.zeros(32, "float32")}
    >>> print(aqt_lite.tree_report(params, aqt_lite.quantize_tree(params)))
    leaf    shape     becomes                   SQNR, dB  largest error  bytes  after
    kernel  (64, 32)  int8, PerChannel(axis=1)     48.80     0.00393128   8192   2176
    1 leaf                                                                 8192   2176  (3.76x smaller)
    """
    before, after = leaves_of(params), leaves_of(quantized, "quantized")
    for (path, _), (other, _) in itertools.zip_longest(before, after, fillvalue=(None, None)):
        if path != other:
            raise ValueError(
                f"params and quantized are trees of different structures: one has {path}, the other {other}"
            )
    if not any(isinstance(q, QArray) for _, q in after) and any(isinstance(x, QArray) for _, x in before):
        raise TypeError("params has QArrays and quantized has none: give what was quantized first, and then the result")
    work: dict[int, tuple[str, Any, QArray]] = {}
    for (path, x), (_, q) in zip(before, after, strict=True):
        if isinstance(q, QArray):
            work.setdefault(id(q), (path, x, q))  # tied ones once
    found = []
    for path, x, q in with_progress([*work.values()], progress, lambda pair: pair[0]):
        with naming(path):
            found.append(LeafReport(path, error_report(x, q, worst=1)))
    return TreeReport(tuple(sorted(found, key=lambda leaf: (leaf.error.sqnr_db, leaf.path))))


# ---- results


@dataclass(frozen=True)
class TreePlan:
    """What :func:`plan_tree` found; prints as a table."""

    plans: tuple[Planned, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays after quantizing."""
        return sum(plan.nbytes() for plan in self.plans)

    @property
    def source_nbytes(self) -> int:
        """Bytes of all arrays before."""
        return sum(nbytes_of_array(plan.leaf.array) for plan in self.plans)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("leaf", "shape", "of", "becomes", "bytes", "after")]
        for plan in self.plans:
            leaf, b = plan.leaf, backend_of(plan.leaf.array)
            kind = leaf.array.dtype if b is None else b.dtype_name(leaf.array)
            path = leaf.path + "".join(f" = {other}" for other in leaf.others)
            sizes = nbytes_of_array(leaf.array), plan.nbytes()
            rows.append((path, str(tuple(leaf.array.shape)), str(kind), plan.becomes, *map(str, sizes)))
        rows.append((_counted(self.plans), "", "", "", str(self.source_nbytes), str(self.nbytes)))
        return _table(rows, right=2) + _ratio(self.source_nbytes, self.nbytes)

    __repr__ = __str__


@dataclass(frozen=True)
class LeafReport:
    """The error of one leaf."""

    path: str
    error: ErrorReport


@dataclass(frozen=True)
class TreeReport:
    """What :func:`tree_report` found; prints as a table, the leaf with the lowest SQNR first."""

    leaves: tuple[LeafReport, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized leaves."""
        return sum(leaf.error.nbytes for leaf in self.leaves)

    @property
    def source_nbytes(self) -> int:
        """Bytes that they had."""
        return sum(leaf.error.source_nbytes for leaf in self.leaves)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("leaf", "shape", "becomes", "SQNR, dB", "largest error", "bytes", "after")]
        for leaf in self.leaves:
            e = leaf.error
            becomes, numbers = f"{e.dtype}, {e.granularity}", (f"{e.sqnr_db:.2f}", f"{e.max_abs_error:.6g}")
            rows.append((leaf.path, str(e.shape), becomes, *numbers, str(e.source_nbytes), str(e.nbytes)))
        rows.append((_counted(self.leaves), "", "", "", "", str(self.source_nbytes), str(self.nbytes)))
        return _table(rows, right=4) + _ratio(self.source_nbytes, self.nbytes)

    __repr__ = __str__


def _counted(things: Sequence[Any]) -> str:
    return f"{len(things)} leaf" if len(things) == 1 else f"{len(things)} leaves"


def _ratio(before: int, after: int) -> str:
    return f"  ({before / after:.2f}x smaller)" if after else ""


def _table(rows: list[tuple[str, ...]], right: int) -> str:
    """Columns side by side, the last ``right`` of them flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = len(widths) - right

    def line(row: tuple[str, ...]) -> str:
        cells = (
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


# ---- leaves and plans


def quantized_as_planned(params: Any, plans: Sequence[Planned], progress: Progress) -> Any:
    """The tree that those plans of leaves that are quantized make."""
    made: dict[Hashable, QArray] = {}
    for plan in with_progress(plans, progress, lambda plan: plan.leaf.path):
        made[_key_of(plan.leaf.array)] = quantized(plan)
    return _rebuilt(params, [made.get(_key_of(leaf), leaf) for _, leaf in leaves_of(params)])


def leaves_of(tree: Any, argument: str = "params") -> list[tuple[str, Any]]:
    """All leaves with their paths, in order."""
    if _opened(tree) is None and not _is_array(tree):
        raise TypeError(
            f"{argument} is a {type(tree).__name__}, neither an array nor a tree of arrays: give nested dicts, lists "
            "and tuples, or a JAX pytree; of a torch model its state_dict(), or use aqt_lite.torch.quantize_(model)"
        )
    return list(_walk(tree, "", ()))


def quantized_already(leaves: list[tuple[str, Any]]) -> list[str]:
    """Paths of the leaves that are quantized."""
    return [path for path, leaf in leaves if isinstance(leaf, QArray)]


def _quantizable_leaves(params: Any) -> list[tuple[str, Any]]:
    """All leaves; TypeError for a model in which a QArray in the place of an array would not serve."""
    for path, node in _nodes(params, "", ()):
        way = _registry.ways_of(node).to_quantize
        if way is not None:
            raise TypeError(f"{path or 'params'} is a {type(node).__name__}, and no tree of arrays: {way}")
    return leaves_of(params)


def layout_of(paths: list[str], array: Any) -> str | None:
    """One of ``LAYOUTS``, where the library or the last part of a matrix's paths tells."""
    if len(getattr(array, "shape", ())) != 2:
        return None
    b = backend_of(array)
    if b is not None and b.weights_are is not None:
        return b.weights_are
    names = {path.replace(".", "/").rpartition("/")[2] for path in paths}
    found = {_LAYOUT_OF_NAMES.get(name) for name in names}
    return found.pop() if len(found) == 1 else None


def _plans(leaves: list[tuple[str, Any]], rules: Rules | None, layout: str | None) -> list[Planned]:
    """What becomes of the arrays of a tree, each once, with the paths of all the places where it stands."""
    found = [Leaf(paths[0], a, layout_of(paths, a), tuple(paths[1:])) for paths, a in places_of(leaves)]
    return planned(found, rules, layout=layout, by_default=is_matrix)


def places_of(leaves: list[tuple[str, Any]]) -> list[tuple[list[str], Any]]:
    """The arrays among leaves, each once, with all of its paths."""
    places: dict[Hashable, tuple[list[str], Any]] = {}
    for path, leaf in leaves:
        if _is_array(leaf):
            places.setdefault(_key_of(leaf), ([], leaf))[0].append(path)
    return list(places.values())


# ---- walking


def _is_array(leaf: Any) -> bool:
    """Whether rules are about it: QArrays and arrays, also those that are refused with a way out."""
    return isinstance(leaf, QArray) or backend_of(leaf) is not None or refusal(leaf, "") is not None


def _key_of(leaf: Any) -> Hashable:
    """The same for a leaf that stands in several places."""
    b = None if isinstance(leaf, QArray) else backend_of(leaf)
    return id(leaf) if b is None else b.memory_of(leaf)


def _opened(node: Any) -> Node | None:
    """What is in a container; None for leaves."""
    if isinstance(node, dict):
        return Node(tuple(map(str, node)), tuple(node.values()), lambda children: _dict_like(node, children))
    if isinstance(node, list | tuple):
        names = getattr(node, "_fields", None) or tuple(map(str, range(len(node))))  # of named tuples, and of others
        return Node(names, tuple(node), lambda children: _sequence_like(node, children))
    if node is None or isinstance(node, str | bytes | int | float | complex) or _is_array(node):
        return None
    found = _registry.opened(node)
    if found is None and isinstance(node, Mapping):
        return Node(tuple(map(str, node)), tuple(node.values()), lambda children: _dict_like(node, children))
    return found


def _dict_like(node: Mapping[Any, Any], children: Sequence[Any]) -> Any:
    pairs = zip(node, children, strict=True)
    if not isinstance(node, MutableMapping):
        return type(node)(pairs)  # type: ignore[call-arg]
    made = copy.copy(node)  # which keeps a default factory, or the attributes of a state_dict
    for key, child in list(pairs):
        made[key] = child
    return made


def _sequence_like(node: Any, children: Sequence[Any]) -> Any:
    return type(node)._make(children) if hasattr(node, "_fields") else type(node)(children)


def _walk(node: Any, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """The leaves with their paths, in order."""
    found = _opened(node)
    if found is None:
        yield path, node
        return
    if id(node) in above:
        raise ValueError(f"{path}: this {type(node).__name__} contains itself")
    for name, child in zip(found.names, found.children, strict=True):
        yield from _walk(child, f"{path}/{name}" if above else name, (*above, id(node)))


def _nodes(node: Any, path: str, above: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """Containers and leaves with their paths, each before what is in it."""
    yield path, node
    found = _opened(node)
    if found is not None and id(node) not in above:
        for name, child in zip(found.names, found.children, strict=True):
            yield from _nodes(child, f"{path}/{name}" if above else name, (*above, id(node)))


def _rebuilt(tree: Any, leaves: Sequence[Any]) -> Any:
    """The tree with other leaves, in the order of ``_walk``."""
    rest = iter(leaves)

    def built(node: Any) -> Any:
        found = _opened(node)
        return next(rest) if found is None else found.rebuilt([built(child) for child in found.children])

    return built(tree)


# ---- progress

_SILENT_SECONDS = 1.0
"""What takes less is not worth a line."""


def with_progress(items: Sequence[_T], progress: Progress, name: Callable[[_T], str]) -> Iterable[_T]:
    """The items, while a line on stderr says how many are done, or whatever ``progress`` makes of them."""
    if callable(progress):
        return progress(items)
    if not (progress is None or isinstance(progress, bool)):
        raise TypeError(f"progress={shown(progress)}: give True, False, None or a function such as tqdm.tqdm")
    wanted = sys.stderr.isatty() if progress is None else progress
    return _told(items, name, 0.0 if progress else _SILENT_SECONDS) if wanted else items


def _told(items: Sequence[_T], name: Callable[[_T], str], after: float) -> Iterator[_T]:
    start, told = time.monotonic(), False
    try:
        for number, item in enumerate(items, 1):
            if time.monotonic() - start >= after:
                told = True
                sys.stderr.write(f"\r\x1b[K{number}/{len(items)} {name(item)}")
                sys.stderr.flush()
            yield item
    finally:
        if told:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
