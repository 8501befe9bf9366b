"""Several files of safetensors and an index, as Hugging Face lays out large models.

Owns: which array lies in which file, and that all files are of one save. Imports: the layout of one file, the replacing
of files.

The index comes last. Each file notes a digest of its bytes, and the index the digests of all, so that files of two
saves are told apart where something stopped the second between one file and the next.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from typing import Any

from aqt_lite import _safetensors
from aqt_lite._atomic import replacing
from aqt_lite._document import about
from aqt_lite._safetensors import DIGEST
from aqt_lite._stored import DOCUMENT, Contents, Entry, Stored, memory_of, parsed_json

__all__ = ["INDEX", "SUFFIX", "in_shards", "read", "remove", "write"]

SUFFIX = ".safetensors"
INDEX = ".index.json"


def in_shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Entries in their order, as many to a file as take no more than ``limit`` bytes, but one at least."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def write(name: str, shards: list[list[Entry]], document: str) -> None:
    """Write files beside ``name``, and their index; what an earlier save left there goes."""
    stem = name.removesuffix(SUFFIX)
    digests: dict[str, str] = {}
    places: dict[str, str] = {}
    before = _of_an_earlier_save(name)
    with replacing() as begin:
        for i, shard in enumerate(shards):
            path = f"{stem}-{i + 1:05}-of-{len(shards):05}{SUFFIX}"
            plain = os.path.basename(path)
            digests[plain] = _safetensors.write(begin(path), shard, {}, with_digest=True)
            places |= dict.fromkeys((entry.name for entry in shard), plain)
        total = sum(entry.nbytes for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total, DOCUMENT: document, DIGEST: digests}, "weight_map": places}
        begin(name + INDEX).write((json.dumps(index, indent=2, sort_keys=True) + "\n").encode())
    _unlink(name, before - set(digests))
    _unlink(name, {os.path.basename(name)})  # which would be read instead


def read(path: str) -> Contents:
    """The contents of all files that the index at ``path`` names."""
    with open(path, "rb") as file:
        index = parsed_json(file.read(), "the index")
    places, notes = index.get("weight_map"), index.get("metadata", {})
    if not isinstance(places, dict) or not all(map(_is_plain, places.values())):
        raise ValueError(f"weight_map of the index must give plain names of files beside it, ending in {SUFFIX}")
    digests = notes.get(DIGEST, {}) if isinstance(notes, dict) else None
    if not isinstance(digests, dict) or not isinstance(notes.get(DOCUMENT, ""), str):
        raise ValueError(f"metadata of the index is an object, {DOCUMENT} in it a text, and {DIGEST} an object")
    of_file: dict[str, set[str]] = {}
    for array, plain in places.items():
        of_file.setdefault(plain, set()).add(array)
    for plain in digests:
        of_file.setdefault(plain, set())
    found: dict[str, Stored] = {}
    for plain, wanted in of_file.items():
        with about(plain[:200]):
            shard = _safetensors.read(memory_of(os.path.join(os.path.dirname(path), plain)))
            if shard.notes.get(DIGEST) != digests.get(plain):
                raise ValueError(
                    "this file and the index are of different saves, one of which was stopped: save again, or copy all "
                    "files anew"
                )
            if wanted != set(shard.arrays):
                other = min(wanted ^ set(shard.arrays))
                raise ValueError(f"array {other!r:.80} must be both in the index and in this file")
            found |= shard.arrays
    document = {DOCUMENT: notes[DOCUMENT]} if DOCUMENT in notes else {}
    return Contents({array: found[array] for array in places}, document)


def remove(name: str) -> None:
    """Take away the index and the files of an earlier save to ``name``."""
    before = _of_an_earlier_save(name)
    if before:
        _unlink(name, {os.path.basename(name) + INDEX, *before})


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"[^/\\\0:]+\.safetensors", name))


def _of_an_earlier_save(name: str) -> set[str]:
    """The files that an index of ours beside ``name`` names; none where there is no such index."""
    try:
        with open(name + INDEX, "rb") as file:
            found = parsed_json(file.read(), "the index")["metadata"][DIGEST]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    own = re.escape(os.path.basename(name).removesuffix(SUFFIX)) + r"-\d{5,}-of-\d{5,}" + re.escape(SUFFIX)
    return {plain for plain in found if re.fullmatch(own, plain)}


def _unlink(name: str, files: set[str]) -> None:
    for plain in files:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(os.path.dirname(name), plain))
