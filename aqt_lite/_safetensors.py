"""The file layout of safetensors: eight bytes, a header in JSON, and the arrays' bytes.

Owns: reading and writing it. Imports: what layouts have in common.

https://github.com/huggingface/safetensors describes it: the length of the header, little-endian; for each array its
dtype, shape and place ``[begin, end)`` after the header; the places fill the rest of the file without a gap. The
package of that name is not used, since for NumPy it has no bfloat16 and no float8, and copies what it reads. The tests
hold both against each other: what is written here is what the package writes, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import partial
from typing import Any, BinaryIO, NoReturn

from aqt_lite._stored import (
    DTYPES,
    Contents,
    Entry,
    Memory,
    Stored,
    little_endian,
    numpy_dtype,
    parsed_json,
    view_of,
    write_bytes,
)

__all__ = ["DIGEST", "read", "write"]

DIGEST = "aqt_lite.sha256"
"""Note of a file that is one of several: what its arrays' bytes hash to."""

_NOTES = "__metadata__"
_LONGEST_HEADER = 100_000_000
_ORDER = list(DTYPES)
_NAMES = {theirs: ours for ours, theirs in DTYPES.items()}


def write(file: BinaryIO, entries: list[Entry], notes: dict[str, str], *, with_digest: bool = False) -> str:
    """Write a file; with a digest, note it and return it."""
    entries = sorted(entries, key=lambda e: (-_ORDER.index(e.dtype), e.name))  # so that all are aligned
    blank = "0" * 64
    header: dict[str, Any] = {_NOTES: {**notes, DIGEST: blank} if with_digest else notes}
    begin = 0
    for entry in entries:
        end = begin + entry.nbytes
        header[entry.name] = {"dtype": DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": (begin, end)}
        begin = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST_HEADER:
        raise ValueError(f"names and structure take {len(text)} bytes, more than the {_LONGEST_HEADER} of a header")
    file.write(len(text).to_bytes(8, "little") + text)
    if not with_digest:
        for entry in entries:
            write_bytes(file, entry)
        return ""
    digest = hashlib.sha256()
    for entry in entries:
        write_bytes(file, entry, digest.update)
    said = f'"{DIGEST}":"'.encode()
    file.seek(8 + text.index(said + blank.encode()) + len(said))
    file.write(digest.hexdigest().encode())
    return digest.hexdigest()


def read(memory: Memory) -> Contents:
    """What a file holds; ValueError where it is not laid out as it has to be."""
    if memory.size < 8:
        raise ValueError(f"it has {memory.size} bytes, too few for a file of safetensors: it was cut off")
    length = int.from_bytes(memory[:8].tobytes(), "little")
    if length > min(memory.size - 8, _LONGEST_HEADER):
        raise ValueError(
            f"its header should have {length} bytes, but the file has {memory.size} and a header at most "
            f"{_LONGEST_HEADER}: it was cut off, or is no file of safetensors"
        )
    data = memory[8 + length :]
    header = parsed_json(memory[8 : 8 + length].tobytes(), "its header")
    notes = header.pop(_NOTES, {})
    if not isinstance(notes, dict) or not all(isinstance(text, str) for text in notes.values()):
        raise ValueError(f"{_NOTES} of its header has to be an object of texts")
    places = [(name, *_place(name, said)) for name, said in header.items()]
    at = 0
    for name, _, _, begin, end in sorted(places, key=lambda place: place[3:]):
        if begin != at:
            raise ValueError(
                f"array {name!r:.80} begins at {begin}, but the array before it ends at {at}: arrays must not overlap, "
                "nor leave a gap"
            )
        at = end
    if at != data.size:
        raise ValueError(
            f"its arrays take {at} bytes, but {data.size} follow the header: it was cut off or appended to"
        )
    arrays = {}
    for name, theirs, shape, begin, end in places:
        ours = _NAMES.get(theirs)
        view = partial(_refuse, name, theirs) if ours is None else partial(_view, data, begin, end, ours, shape)
        arrays[name] = Stored(ours or theirs, shape, view)
    return Contents(arrays, notes)


_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "C64": 64}  # of what no array here holds
_BITS |= {theirs: 8 * numpy_dtype(ours).itemsize for ours, theirs in DTYPES.items()}


def _place(name: str, said: Any) -> tuple[str, tuple[int, ...], int, int]:
    """dtype, shape and place of an array, after checking that they fit each other."""
    if not isinstance(said, dict) or set(said) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"array {name!r:.80} must have dtype, shape and data_offsets in the header, and nothing else")
    dtype, shape, place = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"array {name!r:.80} has dtype {dtype!r:.40}: known are {', '.join(_BITS)}")
    for what, numbers in (("shape", shape), ("data_offsets", place)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers):
            raise ValueError(f"array {name!r:.80} has {what} {numbers!r:.80}: give integers from 0 on")
    if len(shape) > 64 or len(place) != 2:
        raise ValueError(f"array {name!r:.80} has {len(shape)} axes and {len(place)} data_offsets: at most 64, and 2")
    begin, end = place
    if 8 * (end - begin) != math.prod(shape) * _BITS[dtype]:
        raise ValueError(
            f"array {name!r:.80} is {dtype} of shape {tuple(shape)!s:.80}, but lies at {begin} to {end}, which is not "
            f"{_BITS[dtype]} bits an element"
        )
    return dtype, tuple(shape), begin, end


def _view(data: Memory, begin: int, end: int, dtype: str, shape: tuple[int, ...]) -> Any:
    return view_of(data[begin:end], little_endian(numpy_dtype(dtype)), shape)


def _refuse(name: str, dtype: str) -> NoReturn:
    raise ValueError(
        f"array {name!r:.80} has dtype {dtype}, of which no library here has arrays: leave it out with only="
    )
