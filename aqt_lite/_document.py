"""What a file says of its arrays: the tree that they came from, and what the codes of its QArrays stand for.

Owns: the document, in both directions, and what a tree is. Imports: what layouts have in common, the container,
formats, the registry.

The document is the tree in JSON, with names of arrays in place of its leaves. So a name only has to be unique and
readable: what the keys were is in the document. docs/files.md has all of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from aqt_lite import formats
from aqt_lite._foreign import refusal
from aqt_lite._namespace import Array
from aqt_lite._registry import backend_of, ways_of
from aqt_lite._stored import DOCUMENT, DTYPES, Contents, Entry, Stored, bits_of, check_name, numpy_dtype, parsed_json
from aqt_lite.qarray import QArray, checked_for_a_file, described, rebuilt

__all__ = ["PARTS", "Branch", "Leaf", "Reader", "Writer", "about", "joined", "kind_of", "said", "unique"]

VERSION = 1
"""Version of the document."""

PARTS = ("storage", "scale", "zero_point", "offset")
"""What of a QArray are arrays, or QArrays themselves."""

_DEEPEST = 64
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
_MAPPINGS: dict[str, type[Any]] = {"dict": dict, "OrderedDict": OrderedDict}
_SEQUENCES: dict[str, type[Any]] = {"list": list, "tuple": tuple}
_CONTAINERS = {**_MAPPINGS, **_SEQUENCES}


def kind_of(x: Any) -> str | None:
    """What a container of a tree is called; None for everything else, subclasses included."""
    kind = type(x).__name__
    return kind if _CONTAINERS.get(kind) is type(x) else None


def joined(kind: str, keys: tuple[Any, ...], values: list[Any]) -> Any:
    """A container of that kind."""
    return _CONTAINERS[kind](zip(keys, values, strict=True) if kind in _MAPPINGS else values)


def said(keys: tuple[Any, ...]) -> str:
    """The name of a place in a tree, for errors."""
    return f"leaf {'.'.join(map(str, keys))!r:.200}" if keys else "the tree"


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Errors inside begin with ``what``."""
    try:
        yield
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{what}: {error}") from (error.__cause__ or error)


def unique(name: str, taken: set[str]) -> str:
    """``name``, or one like it that is not taken yet; it is from now on."""
    found, n = name, 1
    while found in taken:
        n += 1
        found = f"{name}~{n}"
    taken.add(found)
    return found


# ---- from a tree to arrays and a document


class Writer:
    """Takes a tree apart: ``entries`` are its arrays, ``document`` says the rest.

    ``kept_as`` gives the dtype in which a file keeps arrays of a dtype. What it holds of a tree are the arrays
    themselves; their values are asked for one by one, when an entry is written.
    """

    def __init__(self, tree: Any, kept_as: Callable[[str], str], *, check_values: bool) -> None:
        self.entries: list[Entry] = []
        self._kept_as, self._check_values = kept_as, check_values
        self._formats: dict[str, Any] = {}
        self._taken = {DOCUMENT, "__metadata__"}
        found = self._node(tree, ())
        whole = {"version": VERSION, "formats": self._formats, "tree": found}
        self.document = json.dumps(whole, separators=(",", ":"), allow_nan=False)

    def _node(self, x: Any, keys: tuple[Any, ...]) -> dict[str, Any]:
        if len(keys) > _DEEPEST:
            raise ValueError(f"the tree is nested more than {_DEEPEST} deep: flatten it, or break its cycle")
        kind = kind_of(x)
        if kind in _MAPPINGS:
            for key in x:
                if type(key) not in (str, int):
                    raise TypeError(f"{said(keys)} has the key {key!r:.80}: keys are strings or integers")
            return {kind: [[key, self._node(value, (*keys, key))] for key, value in x.items()]}
        if kind is not None:
            return {kind: [self._node(value, (*keys, i)) for i, value in enumerate(x)]}
        with about(said(keys)):
            if isinstance(x, QArray):
                arrays = x._arrays()
                if x.storage is None:
                    raise TypeError(
                        "it is a QArray without its codes, as partition and optimizers leave it: save the whole one, "
                        "or leaves that are plain arrays, jax.tree.leaves(tree)"
                    )
                for array in arrays:
                    _check_array(array)
                if len({backend_of(array) for array in arrays}) > 1:
                    raise TypeError("its arrays are of several libraries: move it to one with .to_backend()")
                checked_for_a_file(x._with_each(_numpy_of), check_values=self._check_values)
                return self._of_qarray(x, keys, ())
            if x is None or type(x) in (str, bool):
                return {"value": x}
            if type(x) in (int, float):
                return {type(x).__name__: repr(x)}
            _check_array(x)
            return self._of_array(x, keys, ())

    def _of_qarray(self, q: QArray, keys: tuple[Any, ...], inside: tuple[str, ...]) -> dict[str, Any]:
        if q.dtype not in self._formats:
            known = formats.known_format(q.dtype)
            self._formats[q.dtype] = None if known is None else formats.described(known)
        parts = {}
        for name in PARTS:
            part, here = getattr(q, name), (*inside, name)
            if part is not None:
                of_part = self._of_qarray if isinstance(part, QArray) else self._of_array
                parts[name] = of_part(part, keys, here)
        return {"qarray": described(q), "parts": parts}

    def _of_array(self, x: Any, keys: tuple[Any, ...], inside: tuple[str, ...]) -> dict[str, Any]:
        b = backend_of(x)
        assert b is not None
        dtype = b.dtype_name(x)
        if dtype not in DTYPES:
            raise TypeError(
                f"it has dtype {dtype}, and files hold {', '.join(DTYPES)}: convert it to one of them, complex numbers "
                "to their real and imaginary parts, random keys of JAX by jax.random.key_data (or leave them out, in "
                "NNX with nnx.state(model, nnx.Not(nnx.RngState))); text belongs into the tree as str"
            )
        kept = self._kept_as(dtype)

        def values() -> np.ndarray[Any, Any]:
            with about(said(keys)):
                found = _numpy_of(x)
            return found if kept == dtype else np.asarray(found, order="C").view(kept)

        name = unique(_readable(".".join(map(str, (*keys, *inside)))), self._taken)
        self.entries.append(Entry(name, kept, tuple(map(int, x.shape)), values))
        return {"array": name} if kept == dtype else {"array": name, "dtype": dtype}


def _check_array(x: Any) -> None:
    """TypeError where ``x`` is no array with values."""
    b = backend_of(x)
    if b is None:
        raise TypeError(refusal(x, "it") or _way_of(x))
    problem = b.why_unusable(x)
    if problem:
        raise TypeError(f"it {problem}")
    if b.is_traced(x):
        raise TypeError("it has no values: a compiler is tracing it, or it stands for a shape alone; save real arrays")


def _way_of(x: Any) -> str:
    """What to do with an object that is no part of a tree."""
    what, name = f"it is a {type(x).__module__}.{type(x).__qualname__}", type(x).__name__
    way = ways_of(x).to_save
    if way is not None:
        return f"{what}: {way}"
    if isinstance(x, dict):
        return f"{what}: save dict(x)"
    leaves = "jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, aqt_lite.QArray))"
    of_jax = f"of a whole pytree of JAX save its leaves, {leaves}, with which jax.tree.unflatten makes it anew"
    if isinstance(x, tuple) and hasattr(x, "_asdict"):
        return f"{what}, a namedtuple: save x._asdict(), and make it anew as {name}(**tree); {of_jax}"
    if dataclasses.is_dataclass(x):
        fields = "{f.name: getattr(x, f.name) for f in dataclasses.fields(x)}"
        return f"{what}, a dataclass: save {fields}, and make it anew as {name}(**tree); {of_jax}"
    if isinstance(x, _FUNCTIONS) or (callable(x) and hasattr(x, "__wrapped__")):
        return (
            f"{what}, a function, and files hold arrays: leave it out; of a module of Equinox, whose activations are "
            f"leaves, save the arrays alone: tree, static = eqx.partition(model, eqx.is_array), and {leaves}; then "
            "eqx.combine puts the functions back"
        )
    return (
        f"{what}: files hold dicts, lists and tuples of arrays, QArrays, numbers, strings, bools and None; of a module "
        f"of torch save x.state_dict(); {of_jax}"
    )


def _numpy_of(x: Array) -> np.ndarray[Any, Any]:
    b = backend_of(x)
    assert b is not None
    found = np.asarray(b.to_numpy(x))
    if found.dtype == object:  # what NumPy makes of what is no array after all
        raise TypeError(f"it is a {type(x).__name__}, which has no values: save arrays")
    return found


def _readable(name: str) -> str:
    """A name that every reader can show and no unpacking program takes for a way out of its folder."""
    plain = "".join(c if c.isprintable() and c != "\\" else "_" for c in name) or "_"
    try:
        check_name(plain)
    except ValueError:
        return "_" + plain.replace("/", "_")
    return plain


# ---- from arrays and a document to a tree


class Leaf(NamedTuple):
    """A leaf of a tree, and what the document says of it."""

    keys: tuple[Any, ...]
    words: dict[str, Any]

    @property
    def name(self) -> str:
        """Its keys, joined by "."."""
        return ".".join(map(str, self.keys))


class Branch(NamedTuple):
    """A container of a tree."""

    kind: str
    keys: tuple[Any, ...]
    children: tuple[Branch | Leaf, ...]

    def leaves(self) -> Iterator[Leaf]:
        """All that there are, in order."""
        for child in self.children:
            yield from child.leaves() if isinstance(child, Branch) else (child,)


class Reader:
    """Reads the document of a file: ``tree`` has a ``Leaf`` for each leaf, of which ``built`` makes the leaf.

    Every array of the file has one place in the tree. Where there is no document, the tree is a dict of the arrays.
    """

    def __init__(self, contents: Contents, *, check_values: bool) -> None:
        self._arrays, self._check_values = contents.arrays, check_values
        self._unclaimed = dict.fromkeys(contents.arrays)
        self._formats: dict[str, Any] = {}
        text = contents.notes.get(DOCUMENT)
        self.tree: Branch | Leaf
        if text is None:
            keys = tuple(self._arrays)
            self.tree = Branch("dict", keys, tuple(Leaf((key,), {"array": key}) for key in keys))
            return
        document = parsed_json(text, "the document of the file")
        version = document.get("version")
        if version != VERSION:
            raise ValueError(f"the file is of version {version!r:.40}, and this aqt_lite reads {VERSION}: upgrade it")
        if set(document) != {"version", "formats", "tree"} or not isinstance(document["formats"], dict):
            raise ValueError("the document of the file must have version, formats and tree, and nothing else")
        self._formats = document["formats"]
        self.tree = self._node(document["tree"], ())
        if self._unclaimed:
            raise ValueError(f"array {next(iter(self._unclaimed))!r:.80} is in the file, but has no place in its tree")

    def _node(self, words: Any, keys: tuple[Any, ...]) -> Branch | Leaf:
        kind, value = next(iter(words.items())) if isinstance(words, dict) and len(words) == 1 else ("", None)
        if kind not in _CONTAINERS:
            self._claim(words, keys, len(keys))
            return Leaf(keys, words)
        if len(keys) > _DEEPEST:
            raise ValueError(f"{said(keys)} is nested more than {_DEEPEST} deep")
        if not isinstance(value, list):
            raise ValueError(f"{said(keys)}: a {kind} is an array in the document")
        names = tuple(range(len(value)))
        if kind in _MAPPINGS:
            if not all(isinstance(p, list) and len(p) == 2 and type(p[0]) in (str, int) for p in value):
                raise ValueError(f"{said(keys)}: a {kind} is pairs of a key and a value; keys are strings or integers")
            names, value = tuple(p[0] for p in value), [p[1] for p in value]
            if len(set(names)) != len(names):
                raise ValueError(f"{said(keys)}: a {kind} has a key twice")
        return Branch(kind, names, tuple(self._node(v, (*keys, n)) for n, v in zip(names, value, strict=True)))

    def _claim(self, words: Any, keys: tuple[Any, ...], depth: int) -> None:
        """Take the arrays of a leaf, each of which belongs to one."""
        if depth > _DEEPEST:
            raise ValueError(f"{said(keys)} is nested more than {_DEEPEST} deep")
        what = set(words) if isinstance(words, dict) else set()
        if what == {"qarray", "parts"}:
            parts = words["parts"]
            if not isinstance(parts, dict) or "storage" not in parts or not set(parts) <= set(PARTS):
                raise ValueError(f"{said(keys)}: a QArray has the part storage, and others of {', '.join(PARTS)}")
            for part in parts.values():
                self._claim(part, keys, depth + 1)
        elif what in ({"array"}, {"array", "dtype"}):
            name = words["array"]
            if not isinstance(name, str) or name not in self._arrays:
                raise ValueError(f"{said(keys)}: array {name!r:.80} is not in the file")
            if name not in self._unclaimed:
                raise ValueError(f"{said(keys)}: array {name!r:.80} has another place in the tree already")
            del self._unclaimed[name]
        elif len(what) != 1 or not what <= set(_VALUES):
            raise ValueError(f"{said(keys)}: the document has {words!r:.60}, which is not known here: upgrade aqt_lite")

    def built(self, words: dict[str, Any]) -> Any:
        """A leaf, its arrays views of the file."""
        if "qarray" in words:
            parts = {name: self.built(part) for name, part in words["parts"].items()}
            if not all(isinstance(part, np.ndarray | QArray) for part in parts.values()):
                raise ValueError("parts of a QArray are arrays, or QArrays")
            self._know(words["qarray"])
            return rebuilt(words["qarray"], parts, check_values=self._check_values)
        if "array" in words:
            return self._array(self._arrays[words["array"]], words.get("dtype"))
        ((kind, value),) = words.items()
        return _VALUES[kind](value)

    def _array(self, stored: Stored, dtype: Any) -> np.ndarray[Any, Any]:
        found = stored.view()
        if dtype is not None:
            if not isinstance(dtype, str) or dtype not in DTYPES or bits_of(dtype) != stored.dtype:
                raise ValueError(f"an array of {stored.dtype} is not how {dtype!r:.40} is kept")
            found = found.view(numpy_dtype(dtype))
        if self._check_values and found.dtype == np.bool_ and found.size and found.view(np.uint8).max() > 1:
            raise ValueError("an array of bool has bytes that are neither 0 nor 1")
        return found

    def _know(self, words: Any) -> None:
        """Have the format that the file describes; ValueError where its name is another one's here."""
        name = words.get("dtype") if isinstance(words, dict) else None
        if not isinstance(name, str) or name not in self._formats:
            raise ValueError(f"format {name!r:.80} is not among the formats of the document")
        record = self._formats[name]
        if record is None:
            return  # the container refuses what is not known here
        there, known = formats.rebuilt(record), formats.known_format(name)
        if there.name != name:
            raise ValueError(f"format {name!r:.80} is described as {there.name!r:.80}")
        if known is None:
            formats.register_format(there)
        elif known.element != there.element:
            raise ValueError(f"format {name!r} has other numbers in the file than here: one of them needs another name")


def _plain(value: Any) -> Any:
    if value is not None and not isinstance(value, str | bool):
        raise ValueError(f"value {value!r:.80} is no string, bool or null")
    return value


def _int_of(text: Any) -> int:
    if not isinstance(text, str) or not re.fullmatch("-?[0-9]+", text, re.ASCII):
        raise ValueError(f"int {text!r:.80} is no integer in digits")
    return int(text)


def _float_of(text: Any) -> float:
    if not isinstance(text, str):
        raise ValueError(f"float {text!r:.80} is no text")
    return float(text)


_VALUES: dict[str, Callable[[Any], Any]] = {"value": _plain, "int": _int_of, "float": _float_of}
