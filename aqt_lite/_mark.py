"""What a tree of arrays says of its own structure.

Owns: the mark, a few bytes that travel beside a quantized array's leaves, and their comparison. Imports: nothing.

Compilers and checkpoints see a ``QArray`` as leaves and a static structure. Whatever keeps the leaves alone (a file that
is read into a template) would let the template's structure, another block length or layout, say what the codes mean.
So the leaves say it themselves.
"""

from __future__ import annotations

import functools
import zlib
from typing import Any

import numpy as np

__all__ = ["LENGTH", "decoded", "encoded", "of_other_structure"]

LENGTH = 16
"""Bytes of a mark: 2 of a checksum, 4 of the format's name, 1 of flags, 1 of the contract's version, 8 of block lengths."""

_AXES = 4
_WHOLE_AXIS = 0
_LONGEST = (1 << 16) - 1


@functools.lru_cache(maxsize=4096)
def encoded(dtype: str, block: tuple[int | None, ...], transposed: bool, packed: bool, version: int) -> bytes:
    """The mark of a structure. Block lengths are those of the last four axes."""
    lengths = [_WHOLE_AXIS if n is None else min(n, _LONGEST) for n in block[-_AXES:]]
    lengths = [_WHOLE_AXIS] * (_AXES - len(lengths)) + lengths
    body = zlib.crc32(dtype.encode()).to_bytes(4, "little") + bytes([transposed + 2 * packed, version & 0xFF])
    body += b"".join(n.to_bytes(2, "little") for n in lengths)
    return (zlib.crc32(body) & 0xFFFF).to_bytes(2, "little") + body


def decoded(mark: bytes, names: dict[bytes, str]) -> str | None:
    """What a mark says, in words; None where these bytes are no mark."""
    if len(mark) != LENGTH or (zlib.crc32(mark[2:]) & 0xFFFF).to_bytes(2, "little") != mark[:2]:
        return None
    name = names.get(mark[2:6], "another format")
    lengths = [int.from_bytes(mark[8 + 2 * i : 10 + 2 * i], "little") for i in range(_AXES)]
    while lengths and lengths[0] == _WHOLE_AXIS and len(lengths) > 2:
        lengths = lengths[1:]
    block = ", ".join("whole axis" if n == _WHOLE_AXIS else str(n) for n in lengths)
    layout = ", stored as for_dense() does" if mark[6] & 1 else ""
    return f"{name} in blocks of ({block}){layout}{', packed' if mark[6] & 2 else ''}"


def of_other_structure(leaf: Any, mark: bytes, names: Any) -> str | None:
    """What a leaf says where it is a mark, and another than ``mark``; None where it is the same or no mark at all.

    Leaves that are being traced, are not computed yet, or were made into something else by a tree utility say nothing.
    """
    if not isinstance(leaf, np.ndarray):
        ready = getattr(leaf, "is_ready", None)
        if ready is None or leaf.is_deleted() or not leaf.is_fully_addressable or not ready():
            return None
    if leaf.dtype != np.uint8 or leaf.ndim < 1 or leaf.shape[-1] != LENGTH or leaf.size == 0:
        return None
    found = np.asarray(leaf).reshape(-1, LENGTH)[0].tobytes()
    return None if found == mark else decoded(found, names())
