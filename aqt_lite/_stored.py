"""What the layouts of files have in common: arrays with a name, on the way to a file and back.

Owns: ``Entry``, ``Stored``, which dtypes files hold, and reading memory and JSON. Imports: nothing of this package.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, NoReturn

import ml_dtypes
import numpy as np

__all__ = [
    "DOCUMENT",
    "DTYPES",
    "Contents",
    "Entry",
    "Memory",
    "Stored",
    "bits_of",
    "check_name",
    "little_endian",
    "memory_of",
    "numpy_dtype",
    "parsed_json",
    "view_of",
    "write_bytes",
]

DOCUMENT = "aqt_lite"
"""Name of the document that says what the arrays of a file are."""

Memory = np.ndarray[Any, Any]
"""The bytes of a file, as uint8; pages of it are read when they are looked at."""

DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}
"""dtypes that files hold, by the names that NumPy and ml_dtypes give them, and what safetensors calls them."""


@dataclass(frozen=True)
class Entry:
    """An array that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    values: Callable[[], np.ndarray[Any, Any]]
    """Its values, computed or fetched when they are asked for."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return int(np.prod(self.shape, dtype=np.int64)) * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Stored:
    """An array in a file."""

    dtype: str
    shape: tuple[int, ...]
    view: Callable[[], np.ndarray[Any, Any]]
    """Its values, read-only, in the memory of the file."""


@dataclass(frozen=True)
class Contents:
    """What a file holds."""

    arrays: dict[str, Stored]
    notes: dict[str, str]
    """Texts by name."""


def numpy_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name of ``DTYPES``."""
    return np.dtype(getattr(ml_dtypes, name, name))


def little_endian(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type with the byte order of files."""
    return dtype.newbyteorder("=") if sys.byteorder == "little" else dtype.newbyteorder("<")


def bits_of(name: str) -> str:
    """The dtype of the bit patterns of a type that NumPy has only through ml_dtypes; others are their own."""
    return f"uint{8 * numpy_dtype(name).itemsize}" if hasattr(ml_dtypes, name) else name


def view_of(part: Memory, dtype: np.dtype[Any], shape: tuple[int, ...], order: Any = "C") -> np.ndarray[Any, Any]:
    """The bytes ``part`` of a file as an array."""
    return part.view(dtype).reshape(shape, order=order)


def write_bytes(file: IO[bytes], entry: Entry, *more: Callable[[Any], Any]) -> None:
    """Write the values of ``entry``, little-endian and in the order of their axes, and tell ``more`` of their bytes."""
    values = entry.values()
    if values.shape != entry.shape or values.dtype.name != entry.dtype:
        raise ValueError(
            f"array {entry.name!r:.80} was {entry.dtype} of shape {entry.shape}, and turned out to be "
            f"{values.dtype.name} of shape {values.shape}"
        )
    plain = np.asarray(values, dtype=little_endian(values.dtype), order="C")
    data = plain.reshape(-1).view(np.uint8).data
    for write in (file.write, *more):
        write(data)


def check_name(name: str) -> None:
    """ValueError where a name in a file would lead out of the folder that somebody unpacks it into."""
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
        raise ValueError(f"array {name!r:.80} has a name that is a path: files with such names are not read")


def memory_of(path: str) -> Memory:
    """A file's bytes, read-only, and read when they are looked at."""
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise ValueError("the file is empty")
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def parsed_json(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object; ValueError where it is none, has a key twice, or what JSON has not."""

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    try:
        found = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{what} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what} is no JSON object")
    return found


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{twice!r:.80} is there twice")
    return found
