"""What the leaves of a quantized array say of its structure.

Owns: the mark, a few bytes that travel beside the leaves, and their words. Imports: the table of formats, for names.

Compilers and checkpoints see a ``QArray`` as leaves and a static structure. Whatever keeps the leaves alone (a file
that is read into a template) would let the template's structure, another block length or layout, say what the codes
mean. So the leaves say it themselves.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Collection
from typing import Any

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite.elements import FLOAT_TYPES
from aqt_lite.formats import DERIVED, FORMATS, SCALE_FORMATS
from aqt_lite.granularity import Block

__all__ = ["LENGTH", "encoded", "in_words", "of", "parts_of", "parts_said", "repeated", "shape_of", "surplus"]

LENGTH = 16
"""Bytes: 2 of a checksum, 3 of the format's name, 1 of flags, 2 of the packed length, 8 of four block lengths.

What lies beside the codes is said by the length of the leaf alone (see ``surplus``), which compilers see, too.
"""

_AXES = 4
_WHOLE_AXIS = 0
_LONGEST = (1 << 16) - 1
_RUNS = tuple((first, second) for first in range(1, 5) for second in range(1, 5) if (first, second) != (1, 1))
_TRANSPOSED, _PACKED = 1, 2  # flags; two more bits are the type of the values, the upper four the contract's version


@functools.lru_cache(maxsize=4096)
def encoded(
    dtype: str,
    block: Block,
    float_dtype: str,
    transposed: bool | tuple[int, int],
    packed_length: int | None,
    version: int,
) -> bytes:
    """The mark of a structure. What is longer than 16 bits is kept modulo that, block lengths up to that."""
    lengths = [_WHOLE_AXIS if n is None else min(n, _LONGEST) for n in block[-_AXES:]]
    lengths = [_WHOLE_AXIS] * (_AXES - len(lengths)) + lengths
    flags = _TRANSPOSED * bool(transposed) + _PACKED * (packed_length is not None)
    flags += (list(FLOAT_TYPES).index(float_dtype) << 2) + ((version & 15) << 4)
    numbers = [(packed_length or 0) & _LONGEST, *lengths]
    body = _name_as_bytes(dtype) + bytes([flags]) + b"".join(n.to_bytes(2, "little") for n in numbers)
    return _checksum(body, transposed) + body


def of(q: Any) -> bytes:
    """The mark of a container's structure."""
    return encoded(q.dtype, q.block, q.float_dtype, q.transposed, q.packed_length, q.version)


def parts_of(q: Any) -> tuple[str, ...]:
    """What lies beside a container's codes."""
    return tuple(name for name in ("scale", "zero_point", "offset") if getattr(q, name) is not None)


def layout_in_words(transposed: bool | tuple[int, int]) -> str:
    """How codes are stored that are not in the order of their axes."""
    return f"stored as for_dense({', '.join(map(str, transposed)) if isinstance(transposed, tuple) else ''}) does"


def in_words(mark: bytes) -> str | None:
    """The structure that a mark says; None where these bytes are no mark."""
    if len(mark) != LENGTH:
        return None
    layouts: tuple[bool | tuple[int, int], ...] = (True, *_RUNS) if mark[5] & _TRANSPOSED else (False,)
    layout = next((each for each in layouts if _checksum(mark[2:], each) == mark[:2]), None)
    if layout is None:
        return None
    known = {_name_as_bytes(name): name for name in (*SCALE_FORMATS, *FORMATS, *DERIVED)}
    name, flags = known.get(mark[2:5], "an unknown format"), mark[5]
    packed, *lengths = (int.from_bytes(mark[i : i + 2], "little") for i in range(6, LENGTH, 2))
    while len(lengths) > 1 and lengths[0] == _WHOLE_AXIS:
        lengths = lengths[1:]
    block = ", ".join("whole axis" if n == _WHOLE_AXIS else str(n) for n in lengths)
    words = f"{name} of {list(FLOAT_TYPES)[flags >> 2 & 3]} in blocks of (..., {block})"
    if flags & _TRANSPOSED:
        words += f", {layout_in_words(layout)}"
    if flags & _PACKED:
        words += f", {packed} codes packed"
    return words + f", contract {flags >> 4}"


def surplus(parts: Collection[str]) -> int:
    """Bytes of a leaf beyond ``LENGTH``, by what lies beside the codes: none where that is scales alone."""
    return ("scale" not in parts) + 2 * ("zero_point" in parts) + 4 * ("offset" in parts)


_PARTS_OF = {
    LENGTH + surplus(parts): parts
    for count in range(4)
    for parts in itertools.combinations(("scale", "zero_point", "offset"), count)
}


def parts_said(length: int) -> tuple[str, ...] | None:
    """What lies beside the codes of a leaf of so many bytes; None where no leaf has so many."""
    return _PARTS_OF.get(length)


def shape_of(grid: tuple[int, ...], block: Block, length: int = LENGTH) -> tuple[int, ...]:
    """Shape of the leaf: a mark for each leading index, so that it may be mapped over as codes and scales are."""
    each = len(grid) == 1 and (not block or block[-1] == 1)  # one axis, which may be mapped over itself
    return (*(grid if each else grid[:-1]), length)


@functools.lru_cache(maxsize=1024)
def repeated(mark: bytes, shape: tuple[int, ...]) -> Array:
    """The leaf as a NumPy array, read-only, of no more memory than one mark, which bytes of 0 make long enough."""
    return np.broadcast_to(np.frombuffer(mark.ljust(shape[-1], b"\0"), np.uint8), shape)


def _name_as_bytes(name: str) -> bytes:
    return zlib.crc32(name.encode()).to_bytes(4, "little")[:3]


def _checksum(body: bytes, transposed: bool | tuple[int, int]) -> bytes:
    """It differs with the runs of axes that are swapped, for which there is no room beside it."""
    runs = bytes(transposed) if isinstance(transposed, tuple) else b""
    return (zlib.crc32(body + runs) & _LONGEST).to_bytes(2, "little")
