"""Codes of fewer bits than an integer type has as a dense stream of bits: 2 to 7, and 9 to 31.

Owns: ``pack`` and ``unpack`` along the last axis. Imports: the ``Backend`` interface. Only the container knows that
codes are packed, and products that read them so: everything else sees one code an item.

Code ``i`` of a row takes the bits ``[i * bits, (i + 1) * bits)`` of the row's stream; bit ``j`` of the stream is bit
``j % 8`` of byte ``j // 8``, the least significant being bit 0. A row is filled up with zeros to whole bytes. So two
codes of 4 bits lie in a byte, the first in its lower half, and eight of 3 bits in three bytes. It is what numcodecs and
zarr call ``packbits``, and what safetensors, GGUF-like and ONNX files hold for 4 bits.
"""

from __future__ import annotations

from typing import Any

from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend

__all__ = ["bytes_of", "pack", "type_of_codes", "unpack"]


def bytes_of(length: int, bits: int) -> int:
    """Bytes that a row of ``length`` codes takes."""
    return -(-length * bits // 8)


def pack(codes: Array, *, bits: int, b: Backend) -> Array:
    """(..., n) codes of fewer than 32 bits, of any integer type, as (..., bytes_of(n, bits)) uint8.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> q = aqt_lite.quantize(np.asarray([1, -2, 7], "float32"), "int4", scale=1.0)
    >>> [hex(byte) for byte in q.storage]
    ['0xe1', '0x7']
    """
    xp, length = b.xp, int(codes.shape[-1])
    period = _period(bits)
    u = xp.astype(codes, xp.int32) & ((1 << bits) - 1)
    u = _in_periods(u, period, xp)
    columns = [u[..., i] for i in range(period)]
    packed = []
    for j in range(period * bits // 8):
        byte = None
        for i in range(8 * j // bits, min(-(-8 * (j + 1) // bits), period)):
            shift = i * bits - 8 * j
            part = columns[i] << shift if shift >= 0 else columns[i] >> -shift
            byte = part if byte is None else byte | part
        packed.append(byte & 0xFF)  # type: ignore[operator]
    stream = _joined(packed, xp)
    return xp.astype(stream[..., : bytes_of(length, bits)], xp.uint8)


def unpack(stream: Array, *, bits: int, length: int, signed: bool, b: Backend) -> Array:
    """The inverse: (..., length) codes of ``type_of_codes``, in two's complement where they are ``signed``."""
    xp, period = b.xp, _period(bits)
    width = period * bits // 8
    byte = _in_periods(xp.astype(stream, xp.int32), width, xp)
    columns = [byte[..., j] for j in range(width)]
    codes = []
    for i in range(period):
        first, last = i * bits // 8, (i * bits + bits - 1) // 8
        code = columns[first] >> (i * bits - 8 * first)
        for j in range(first + 1, last + 1):
            code = code | columns[j] << (8 * j - i * bits)
        codes.append(code & ((1 << bits) - 1))
    u = _joined(codes, xp)[..., :length]
    if signed:
        half = 1 << (bits - 1)
        return xp.astype((u ^ half) - half, b.dtype(type_of_codes(bits, signed)))
    return xp.astype(u, b.dtype(type_of_codes(bits, signed)))


def type_of_codes(bits: int, signed: bool) -> str:
    """The narrowest integer type of codes of so many bits."""
    return f"{'' if signed else 'u'}int{next(n for n in (8, 16, 32) if n >= bits)}"


def _period(bits: int) -> int:
    """Codes after which the stream is at the beginning of a byte again."""
    return next(n for n in (1, 2, 4, 8) if n * bits % 8 == 0)


def _in_periods(u: Array, width: int, xp: Any) -> Array:
    """(..., n) as (..., ceil(n / width), width), filled up with zeros."""
    lead, n = tuple(u.shape[:-1]), int(u.shape[-1])
    missing = -n % width
    if missing:
        zeros = xp.zeros_like(u[..., :1]) if n else xp.zeros_like(u)
        u = xp.concat([u, xp.broadcast_to(zeros, (*lead, missing))], axis=-1)
    return xp.reshape(u, (*lead, (n + missing) // width, width))


def _joined(columns: list[Array], xp: Any) -> Array:
    """The inverse of ``_in_periods`` for its last axis given as a list."""
    wide = xp.stack(columns, axis=-1)
    lead, periods, width = tuple(wide.shape[:-2]), int(wide.shape[-2]), int(wide.shape[-1])
    return xp.reshape(wide, (*lead, periods * width))
