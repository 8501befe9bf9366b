"""Numbers of any width, 1 to 64 bits, as a dense stream of bits. NumPy alone.

Owns: ``stream_of`` and ``words_of``. Imports: nothing of this package. (``packing`` does the same to codes of fewer
than 8 bits, row by row and on every backend.)

Word ``i`` takes the bits ``[i * bits, (i + 1) * bits)`` of the stream, the least significant first; bit ``j`` of the
stream is bit ``j % 8`` of byte ``j // 8``; the stream is filled up with zeros to whole bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["bytes_of_stream", "stream_of", "words_of"]

_Words = np.ndarray[Any, Any]

_TOGETHER = 1 << 15
"""Words looked at together, a multiple of 8: each run of them ends with a whole byte, and takes a few MB as bits."""


def bytes_of_stream(count: int, bits: int) -> int:
    """Bytes that ``count`` words take."""
    return -(-count * bits // 8)


def stream_of(words: _Words, first: int, bits: int) -> _Words:
    """The bits ``first`` to ``first + bits - 1`` of unsigned words, of any shape in the order of C, as uint8.

    Examples
    --------
    >>> import numpy as np
    >>> from aqt_lite._bits import stream_of
    >>> stream_of(np.asarray([1, 2, 3], "uint8"), 0, 4).tolist()
    [33, 3]
    """
    flat = np.ravel(words)
    little = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    parts = []
    for start in range(0, flat.size if bits else 0, _TOGETHER):
        run = np.ascontiguousarray(little[start : start + _TOGETHER])
        all_bits = np.unpackbits(run.view(np.uint8).reshape(run.size, -1), axis=1, bitorder="little")
        parts.append(np.packbits(all_bits[:, first : first + bits], bitorder="little"))
    return np.concatenate(parts) if parts else np.zeros(0, np.uint8)


def words_of(stream: _Words, count: int, first: int, bits: int, dtype: Any, *, signed: bool = False) -> _Words:
    """The inverse: ``count`` words of the unsigned type ``dtype``; beyond their bits zeros, where ``signed`` the sign.

    Examples
    --------
    >>> import numpy as np
    >>> from aqt_lite._bits import words_of
    >>> words_of(np.asarray([33, 3], "uint8"), 3, 0, 4, "uint8").tolist()
    [1, 2, 3]
    """
    kind = np.dtype(dtype).newbyteorder("<")
    found = np.zeros(count, kind)
    for start in range(0, count if bits else 0, _TOGETHER):
        run = found[start : start + _TOGETHER]
        part = stream[start * bits // 8 : bytes_of_stream(start + run.size, bits)]
        bits_of_words = np.unpackbits(part, count=run.size * bits, bitorder="little").reshape(run.size, bits)
        all_bits = np.zeros((run.size, 8 * kind.itemsize), np.uint8)
        all_bits[:, first : first + bits] = bits_of_words
        if signed:
            all_bits[:, first + bits :] = bits_of_words[:, -1:]
        run[:] = np.packbits(all_bits, axis=1, bitorder="little").reshape(-1).view(kind)
    return found.astype(np.dtype(dtype), copy=False)
