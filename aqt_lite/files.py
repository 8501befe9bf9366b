"""Trees of arrays and quantized arrays in files, and back, without losing a bit. docs/files.md describes the files.

Owns: ``save`` and ``load``: which layout a path means, some leaves of many, and templates; ``to_arrays`` and
``from_arrays``, for files that others write. Imports: the layouts, the
document of a file, the replacing of files, the container's words, the registry.
"""

from __future__ import annotations

import difflib
import fnmatch
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from aqt_lite import _npz, _safetensors, _shards
from aqt_lite._atomic import replacing
from aqt_lite._document import PARTS, Branch, Leaf, Reader, Writer, about, joined, kind_of, said, unique
from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Array
from aqt_lite._registry import backend_of, get_backend
from aqt_lite._stored import DOCUMENT, Contents, Memory, Stored, bits_of, memory_of
from aqt_lite.qarray import QArray, in_words

__all__ = ["from_arrays", "load", "save", "to_arrays"]


@dataclass(frozen=True)
class _Layout:
    """How arrays and notes lie in a file."""

    kept_as: Callable[[str], str]
    write: Callable[..., Any]
    read: Callable[[Memory], Contents]


def _check_path(path: Any, way: str) -> None:
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"path is a {type(path).__name__}: {way}")


_SHARDED = _shards.SUFFIX
_LAYOUTS = {
    _SHARDED: _Layout(lambda dtype: dtype, _safetensors.write, _safetensors.read),
    ".npz": _Layout(bits_of, _npz.write, _npz.read),
}


@naming_the_argument
def save(
    path: str | os.PathLike[str], tree: Any, *, max_shard_bytes: int | None = None, check_values: bool = True
) -> None:
    """Write a tree of arrays and QArrays to a file, without losing a bit.

    The same bytes whichever library holds the arrays, and codes packed as they are. The file is whole or not there: an
    error or a crash leaves what was there before. docs/files.md describes the files.

    Parameters
    ----------
    path : str or path
        Ends in ".safetensors", or in ".npz", which ``numpy.load`` reads.
    tree : dict, list, tuple, array, QArray, number, str, bool or None
        Nested in any way. Keys of dicts are strings and integers. Arrays are of any library, and of bool, integers of 8
        to 64 bits, or floats of 8 to 64; whether derivatives are tracked is not kept. Scalars of NumPy come back as
        0-dimensional arrays.
    max_shard_bytes : int, optional
        Where the arrays take more: several files "model-00001-of-00003.safetensors", and an index
        "model.safetensors.index.json", as Hugging Face has them.
    check_values : bool
        Refuse a QArray with scales or codes that :meth:`QArray.from_codes` refuses, since :func:`load` does.

    Raises
    ------
    TypeError, ValueError
        Naming the leaf that a file cannot hold, and the way.

    Examples
    --------
    >>> import aqt_lite, numpy as np, pathlib, tempfile
    >>> w = aqt_lite.quantize(np.ones((4, 64), "float32"), "int4", granularity=aqt_lite.PerGroup(32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "model.safetensors")
    ...     aqt_lite.save(path, {"dense": {"w": w, "bias": np.zeros(4)}, "step": 7})
    ...     tree = aqt_lite.load(path)
    >>> tree["dense"]["w"].granularity, tree["dense"]["bias"].dtype, tree["step"]
    (PerGroup(size=32, axis=-1), dtype('float64'), 7)
    """
    _check_path(path, "the first argument is the file's name, the second the tree")
    name = os.fsdecode(path)
    layout = _layout_of(name)
    if max_shard_bytes is not None:
        if type(max_shard_bytes) is not int or max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={max_shard_bytes!r}: give a number of bytes, or None for one file")
        if not name.endswith(_SHARDED):
            raise ValueError(f"max_shard_bytes is for {_SHARDED}, but path is {name}")
    with about(f"cannot save {name}"):
        writer = Writer(tree, layout.kept_as, check_values=check_values)
        if max_shard_bytes is not None:
            shards = _shards.in_shards(writer.entries, max_shard_bytes)
            if len(shards) > 1:
                _shards.write(name, shards, writer.document)
                return
        with replacing() as begin:
            layout.write(begin(name), writer.entries, {DOCUMENT: writer.document})
        _shards.remove(name)


@naming_the_argument
def load(
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    only: str | list[str] | tuple[str, ...] | None = None,
    like: Any = None,
    check_values: bool = True,
) -> Any:
    """Read a tree that :func:`save` wrote; of another program's safetensors or npz, a flat dict of its arrays.

    Parameters
    ----------
    path : str or path
        Of the file, or of the index of several.
    backend : str, optional
        Which library's arrays; by default NumPy's, which are read-only views of the file: what is not looked at is not
        read. (So never write into the file. ``save`` puts another in its place.)
    only : str or list of str, optional
        Names of leaves, which are keys joined by ".", or patterns such as "layers.*.w". The result is a flat dict of
        those leaves by their names.
    like : tree, optional
        A tree of arrays, or of shapes as ``jax.eval_shape`` gives them. Leaves come to the library and device of its
        leaves; one that differs in structure, dtype, shape, format, blocks or layout is an error that names both.
    check_values : bool
        Look at scales, zero points and offsets, and at codes of the formats that have bits of no number (8-bit floats,
        and a few others), as :meth:`QArray.from_codes` does. Without it nothing is looked at, and what codes of a
        damaged file stand for is not defined.

    Raises
    ------
    ValueError, TypeError
        Naming the file, the leaf and the way.

    Examples
    --------
    >>> import aqt_lite, numpy as np, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder, "model.npz")
    ...     aqt_lite.save(path, {"layers": [{"w": np.ones(3)}, {"w": np.zeros(3), "b": np.ones(1)}]})
    ...     found = aqt_lite.load(path, backend="array_api_strict", only="layers.*.w")
    >>> list(found)
    ['layers.0.w', 'layers.1.w']
    """
    _check_path(path, "give the file's name")
    name = os.fsdecode(path)
    if like is not None and (only is not None or backend is not None):
        raise ValueError("like= says which leaves and which library: leave only= and backend= out")
    target = get_backend("numpy" if backend is None else backend).name
    with about(f"cannot load {name}"):
        reader = Reader(_contents_of(name), check_values=check_values)
        if like is not None:
            return _matched(reader, reader.tree, like, ())

        def made(leaf: Leaf) -> Any:
            with about(said(leaf.keys)):
                return _moved(reader.built(leaf.words), target)

        if only is not None:
            return {key: made(leaf) for key, leaf in _chosen(reader.tree, only).items()}
        return _with_leaves(reader.tree, made)


@naming_the_argument
def to_arrays(tree: Any, *, check_values: bool = True) -> tuple[dict[str, np.ndarray[Any, Any]], str]:
    """A tree as arrays of NumPy by name, and a text that says what they are: for HDF5 and other containers.

    Parameters
    ----------
    tree, check_values
        As for :func:`save`.

    Returns
    -------
    arrays : dict
        Of types that NumPy has itself: float8 and bfloat16 are bit patterns, as in ``.npz``.
    document : str
        JSON, which :func:`from_arrays` reads.

    Examples
    --------
    >>> import aqt_lite, numpy as np
    >>> from aqt_lite.files import from_arrays, to_arrays
    >>> arrays, document = to_arrays({"w": aqt_lite.quantize(np.ones((2, 64), "float32"), "mxfp4")})
    >>> {name: (array.dtype.name, array.shape) for name, array in arrays.items()}
    {'w.storage': ('uint8', (2, 32)), 'w.scale.storage': ('uint8', (2, 2))}
    >>> from_arrays(arrays, document)["w"].dtype
    'mxfp4'
    """
    with about("cannot take the tree apart"):
        writer = Writer(tree, bits_of, check_values=check_values)
        return {entry.name: entry.values() for entry in writer.entries}, writer.document


@naming_the_argument
def from_arrays(arrays: Mapping[str, np.ndarray[Any, Any]], document: str, *, check_values: bool = True) -> Any:
    """The tree that :func:`to_arrays` took apart; its arrays are those given, or views of them.

    Parameters
    ----------
    arrays : mapping of names to arrays
        All of them, and no others.
    document : str
    check_values : bool
        As for :func:`load`.

    Raises
    ------
    ValueError
        Arrays that are missing, too many, or not what the document says.
    """
    stored = {
        str(name): Stored(np.asarray(array).dtype.name, tuple(array.shape), partial(np.asarray, array))
        for name, array in arrays.items()
    }
    with about("cannot put the tree together"):
        reader = Reader(Contents(stored, {DOCUMENT: document}), check_values=check_values)

        def made(leaf: Leaf) -> Any:
            with about(said(leaf.keys)):
                return reader.built(leaf.words)

        return _with_leaves(reader.tree, made)


def _layout_of(name: str) -> _Layout:
    for suffix, layout in _LAYOUTS.items():
        if name.endswith(suffix):
            return layout
    raise ValueError(f"path is {name!r}: it must end in {' or '.join(_LAYOUTS)}, which says how the file is laid out")


def _contents_of(name: str) -> Contents:
    if name.endswith(_SHARDED + _shards.INDEX):
        return _shards.read(name)
    layout = _layout_of(name)
    if name.endswith(_SHARDED) and not os.path.exists(name) and os.path.exists(name + _shards.INDEX):
        return _shards.read(name + _shards.INDEX)
    contents = layout.read(memory_of(name))
    if _safetensors.DIGEST in contents.notes:
        raise ValueError(
            f"it is one of several files: load the index beside it, which ends in {_SHARDED}{_shards.INDEX}"
        )
    return contents


# ---- leaves


def _moved(x: Any, backend: str) -> Any:
    """What was built of a file's memory, on a backend; there it stays where that is NumPy."""
    if isinstance(x, QArray):
        return x.to_backend(backend)
    if not isinstance(x, np.ndarray) or backend == "numpy":
        return x
    return get_backend(backend).asarray(x)


def _with_leaves(node: Branch | Leaf, made: Callable[[Leaf], Any]) -> Any:
    if isinstance(node, Leaf):
        return made(node)
    return joined(node.kind, node.keys, [_with_leaves(child, made) for child in node.children])


def _chosen(tree: Branch | Leaf, only: Any) -> dict[str, Leaf]:
    """The leaves that one of the patterns names."""
    patterns = list(only) if isinstance(only, Iterable) and not isinstance(only, str) else [only]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"only={only!r}: give a name or a pattern, or a list of them")
    leaves = [tree] if isinstance(tree, Leaf) else list(tree.leaves())
    names = list(dict.fromkeys(leaf.name for leaf in leaves))
    wanted: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)}
        if not found:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise ValueError(f"only={pattern!r} names no leaf: the nearest of {len(names)} are {', '.join(near)}")
        wanted |= found
    taken: set[str] = set()
    return {unique(leaf.name, taken): leaf for leaf in leaves if leaf.name in wanted}


# ---- into a template


def _matched(reader: Reader, node: Branch | Leaf, like: Any, keys: tuple[Any, ...]) -> Any:
    """The tree, each leaf where that of the template is."""
    here, there = node.kind if isinstance(node, Branch) else None, kind_of(like)
    if here != there:
        raise ValueError(f"{said(keys)} is a {here or 'leaf'} in the file, and a {there or 'leaf'} in the template")
    if isinstance(node, Leaf):
        with about(said(keys)):
            return _leaf_like(reader.built(node.words), like)
    names = tuple(like) if hasattr(like, "keys") else tuple(range(len(like)))
    if set(names) != set(node.keys):
        lacks = [name for name in names if name not in node.keys]
        more = [name for name in node.keys if name not in names]
        raise ValueError(
            f"{said(keys)} lacks {lacks!r:.120} of the template in the file, and has {more!r:.120} beside it"
        )
    children = dict(zip(node.keys, node.children, strict=True))
    return joined(node.kind, names, [_matched(reader, children[name], like[name], (*keys, name)) for name in names])


def _leaf_like(x: Any, like: Any) -> Any:
    here, there = _in_words(x), _in_words(like)
    if here != there:
        raise ValueError(
            f"the file holds {here}, and the template {there}: make the template as the saved tree was made, and "
            "convert afterwards"
        )
    if isinstance(x, QArray):
        places = iter(like._arrays())
        return x._with_each(lambda a: _beside(a, next(places)))
    return _beside(x, like) if isinstance(x, np.ndarray) else x


def _beside(a: np.ndarray[Any, Any], like: Any) -> Array:
    b = backend_of(like)
    assert b is not None
    if b.name == "numpy":
        return a
    return b.asarray(a, like=None if b.is_traced(like) else like)  # a tensor without values has no place


def _in_words(x: Any) -> str:
    """What has to be the same in a file and in a template."""
    if isinstance(x, QArray):
        parts = [(name, getattr(x, name)) for name in PARTS]
        return in_words(x) + "".join(f", {name} ({_in_words(part)})" for name, part in parts if part is not None)
    b = backend_of(x)
    return f"a {type(x).__name__}" if b is None else f"{b.dtype_name(x)} of shape {tuple(x.shape)}"
