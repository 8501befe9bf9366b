"""The file layout of NumPy's .npz: a zip archive of .npy members, none of them compressed.

Owns: reading and writing it. Imports: what layouts have in common.

``np.load`` reads these files. Here members are looked at in the memory of the file, which is why none may be
compressed; so no member is larger than the file, and nothing is unpacked. Types that NumPy has only through ml_dtypes
are kept as bit patterns, unsigned integers. Notes are arrays of UTF-8 bytes.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from functools import partial
from typing import Any, BinaryIO

import numpy as np

from aqt_lite._stored import (
    DOCUMENT,
    DTYPES,
    Contents,
    Entry,
    Memory,
    Stored,
    check_name,
    little_endian,
    view_of,
    write_bytes,
)

__all__ = ["read", "write"]

_SUFFIX = ".npy"
_LOCAL_HEADER = 30  # bytes, before the name and the extra field, whose lengths are its last four bytes


def write(file: BinaryIO, entries: list[Entry], notes: dict[str, str]) -> None:
    """Write a file: the same bytes whenever and wherever."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in notes.items():
            _write_member(archive, Entry(name, "uint8", (len(text.encode()),), partial(_bytes_of, text)))
        for entry in entries:
            _write_member(archive, entry)


def _bytes_of(text: str) -> np.ndarray[Any, Any]:
    return np.frombuffer(text.encode(), np.uint8)


def _write_member(archive: zipfile.ZipFile, entry: Entry) -> None:
    info = zipfile.ZipInfo(entry.name + _SUFFIX, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, 0o644 << 16
    descr = little_endian(np.dtype(entry.dtype)).str
    with archive.open(info, "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": entry.shape})
        write_bytes(member, entry)


def read(memory: Memory) -> Contents:
    """What a file holds; ValueError where it is not laid out as it has to be."""
    try:
        with zipfile.ZipFile(io.BufferedReader(_Reader(memory))) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError) as error:
        raise ValueError(f"it cannot be read as a zip archive: {error}") from None
    arrays: dict[str, Stored] = {}
    at = 0
    for info in sorted(members, key=lambda info: info.header_offset):
        name = info.filename.removesuffix(_SUFFIX)
        if name == info.filename:
            raise ValueError(f"member {info.filename!r:.80} is no array: members of .npz end in {_SUFFIX}")
        check_name(name)
        if name in arrays:
            raise ValueError(f"array {name!r:.80} is there twice")
        begin, end = _place(memory, info)
        if info.header_offset < at:
            raise ValueError(f"array {name!r:.80} overlaps the one before it")
        at = end
        arrays[name] = _parsed(memory[begin:end], name)
    return Contents(arrays, {DOCUMENT: _text_of(arrays.pop(DOCUMENT))} if DOCUMENT in arrays else {})


def _text_of(stored: Stored) -> str:
    try:
        return stored.view().tobytes().decode()
    except UnicodeDecodeError:
        raise ValueError(f"array {DOCUMENT!r}, the document of the file, is no text in UTF-8") from None


def _place(memory: Memory, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Where a member's bytes lie."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
        raise ValueError(
            f"member {info.filename!r:.80} is compressed or encrypted, to be {info.file_size} bytes: np.load reads "
            "such files; np.savez writes files that are read here"
        )
    local = memory[info.header_offset : info.header_offset + _LOCAL_HEADER].tobytes()
    if len(local) < _LOCAL_HEADER or local[:4] != b"PK\3\4":
        raise ValueError(f"member {info.filename!r:.80} is not where the archive says")
    begin = info.header_offset + _LOCAL_HEADER + sum(int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    if begin + info.file_size > memory.size:
        raise ValueError(f"member {info.filename!r:.80} reaches beyond the end of the file: it was cut off")
    return begin, begin + info.file_size


_MAGIC = b"\x93NUMPY"
_HEADER = re.compile(
    r"\{'descr': '(?P<descr>[<>|=][a-zA-Z]\d{1,2})', 'fortran_order': (?P<order>True|False), "
    r"'shape': \((?P<shape>(?:\d{1,19}, ?)*(?:\d{1,19})?)\),? ?\}\s*"
)
"""As NumPy writes it for what is no structure: never evaluated."""


def _parsed(member: Memory, name: str) -> Stored:
    """The array that a .npy member holds."""
    start = member[:12].tobytes()
    wide = start[6:7] != b"\1"  # from version 2 on, four bytes say the length
    begin = 12 if wide else 10
    end = begin + int.from_bytes(start[8:begin], "little")
    if start[:6] != _MAGIC or start[6:7] not in (b"\1", b"\2", b"\3") or not begin < end <= min(member.size, 16_384):
        raise ValueError(f"array {name!r:.80} does not begin as a .npy file does")
    header = _HEADER.fullmatch(member[begin:end].tobytes().decode("latin-1"))
    dtype = None if header is None else _dtype_of(header["descr"])
    if header is None or dtype is None:
        raise ValueError(
            f"array {name!r:.80} has a header of another form, or a dtype that is none of {', '.join(DTYPES)}: objects "
            "are never unpickled, text and structures not read; np.load reads such arrays"
        )
    shape = tuple(int(n) for n in header["shape"].replace(" ", "").split(",") if n)
    data = member[end:]
    if len(shape) > 64 or math.prod(shape) * dtype.itemsize != data.size:
        raise ValueError(f"array {name!r:.80} is {dtype.name} of shape {shape!s:.80}, but has {data.size} bytes")
    return Stored(dtype.name, shape, partial(view_of, data, dtype, shape, "F" if header["order"] == "True" else "C"))


def _dtype_of(descr: str) -> np.dtype[Any] | None:
    try:
        found = np.dtype(descr)
    except TypeError:
        return None
    return found if found.name in DTYPES else None


class _Reader(io.RawIOBase):
    """The memory of a file as a stream, for what only knows streams."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._at = memory, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._memory.size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._memory[self._at : self._at + len(buffer)].tobytes()
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
