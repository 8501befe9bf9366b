"""zarr v3: codecs that quantize, and ``packbits``.

Owns: the three codecs, their JSON, and how a chunk lies in bytes. Imports: zarr; the public functions, the table of
formats, the CF grid, streams of bits. ``import aqt_lite.zarr`` registers them; an installed aqt_lite is found by zarr
itself, through entry points.

Each is the codec that turns an array into bytes, in place of ``bytes``: compressors follow it, and it may stand inside
of shards. A chunk is decoded from its own bytes and the JSON alone.

``aqt_lite.bound``: every value within ``max_abs_err``, in as few bits as the range of the chunk asks for. A chunk is 24
bytes, then a stream of codes: bytes 0 and 1 are the version (1) and the bits of a code, byte 2 is 1 where the largest
code means *missing* (NaN), bytes 3 to 7 are zero, bytes 8 to 15 and 16 to 23 are the step and the offset, float64,
little-endian. ``value = code * step + offset``, which rounds nothing (see :mod:`aqt_lite.cf`). Of 255 bits are chunks
that no code serves, with infinities for instance: their values follow as they are.

``aqt_lite.quantize``: codes of any format, with scales of the chunk's own blocks. A chunk is one byte, 1 where values
are missing; then, if so, a bit for each value, 1 where it is; then the arrays of the QArray, in the order of storage,
scale, zero point, offset, of a quantized scale its own in that order; all little-endian. Their shapes follow from the
chunk's.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import ml_dtypes
import numpy as np

from aqt_lite import api, cf
from aqt_lite._bits import bytes_of_stream, stream_of, words_of
from aqt_lite._extras import installed_by
from aqt_lite._keywords import naming_the_argument, naming_the_fields
from aqt_lite._near import one_of
from aqt_lite.formats import FORMATS
from aqt_lite.granularity import PerBlock
from aqt_lite.qarray import QArray

with installed_by("pip install 'aqt_lite[science]'", __name__):
    from zarr.abc.codec import ArrayBytesCodec
    from zarr.core.array_spec import ArraySpec
    from zarr.core.buffer import Buffer, NDBuffer
    from zarr.registry import register_codec

__all__ = ["BoundCodec", "PackBitsCodec", "QuantizeCodec", "standard_codecs"]

_Numbers = np.ndarray[Any, Any]


class _Codec(ArrayBytesCodec):
    """What the codecs share: a name, a JSON configuration, and arrays of NumPy on the way to bytes and back."""

    is_fixed_size = False
    name: ClassVar[str]

    def configuration(self) -> dict[str, Any]:
        raise NotImplementedError

    def to_bytes(self, x: _Numbers) -> _Numbers:
        raise NotImplementedError

    def to_values(self, data: _Numbers, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Numbers:
        raise NotImplementedError

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """From the JSON of an array's metadata."""
        if data.get("name") != cls.name:
            raise ValueError(f"the codec {data.get('name')!r} is not {cls.name}")
        return cls(**(data.get("configuration") or {}))

    def to_dict(self) -> dict[str, Any]:
        """The JSON of an array's metadata."""
        said = self.configuration()
        return {"name": self.name, **({"configuration": said} if said else {})}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """TypeError where arrays of that type are not for this codec."""
        self.check_type(dtype.to_native_dtype())

    def check_type(self, dtype: np.dtype[Any]) -> None:
        if dtype.name not in ("float32", "float64"):
            raise TypeError(f"{self.name} is for float32 and float64, and the array is of {dtype}")

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Not known before the values are."""
        raise NotImplementedError

    def _encode_sync(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        x = np.asarray(chunk_data.as_numpy_array())
        return chunk_spec.prototype.buffer.from_bytes(self.to_bytes(x).tobytes())

    def _decode_sync(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        data = np.frombuffer(chunk_data.to_bytes(), np.uint8)
        values = self.to_values(data, chunk_spec.shape, chunk_spec.dtype.to_native_dtype())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(values)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return self._encode_sync(chunk_data, chunk_spec)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return self._decode_sync(chunk_data, chunk_spec)


# ---- a bound


@naming_the_fields
@dataclass(frozen=True)
class BoundCodec(_Codec):
    """``aqt_lite.bound``: every value within a bound, each chunk in as few bits as its range asks for.

    Parameters
    ----------
    max_abs_err : float
        Largest error of a value, in units of the data. It holds exactly; NaN stays NaN, and infinities stay.
    packed : bool
        Codes of any number of bits, one after the other; else of 8, 16 or 32, which compressors with a shuffle like.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> from aqt_lite.zarr import BoundCodec
    >>> z = zarr.create_array({}, shape=(100,), chunks=(50,), dtype="float32", serializer=BoundCodec(max_abs_err=0.05))
    >>> z[:] = np.linspace(250, 300, 100)
    >>> bool(abs(z[:] - np.linspace(250, 300, 100, dtype="float32")).max() <= 0.05)
    True
    """

    name: ClassVar[str] = "aqt_lite.bound"
    max_abs_err: float
    packed: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_abs_err", cf.check_bound(self.max_abs_err))
        if not isinstance(self.packed, bool):
            raise TypeError(f"packed={self.packed!r}: give True or False")

    def configuration(self) -> dict[str, Any]:
        """Of the JSON."""
        return {"max_abs_err": self.max_abs_err, "packed": self.packed}

    def to_bytes(self, x: _Numbers) -> _Numbers:
        """A chunk."""
        found = cf.codes_within(x, self.max_abs_err)
        if found is None or found.bits >= 8 * x.itemsize:
            plain = x.astype(x.dtype.newbyteorder("<"))
            return np.concatenate([_header(_PLAIN, False, 1.0, 0.0), np.frombuffer(plain.tobytes(), np.uint8)])
        codes, bits, missing, step, offset = found
        if not self.packed and bits:
            bits = next(n for n in (8, 16, 32) if n >= bits)
            if missing:
                codes = np.where(np.isnan(x), (1 << bits) - 1, codes)
        return np.concatenate([_header(bits, missing, step, offset), stream_of(codes.astype(np.uint32), 0, bits)])

    def to_values(self, data: _Numbers, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Numbers:
        """The values of a chunk."""
        bits, missing, step, offset = _parsed(data)
        rest, count = data[_HEADER.size :], math.prod(shape)
        expected = count * dtype.itemsize if bits == _PLAIN else bytes_of_stream(count, bits)
        if rest.size != expected:
            raise ValueError(f"a chunk of {self.name} has {rest.size} bytes of codes, and {expected} belong to {shape}")
        if bits == _PLAIN:
            return np.frombuffer(rest.tobytes(), dtype.newbyteorder("<")).astype(dtype).reshape(shape)
        codes = words_of(rest, count, 0, bits, np.uint32)
        values = codes * step + offset  # exact, so that float32 has the same numbers
        if missing:
            values[codes == (1 << bits) - 1] = np.nan
        return values.astype(dtype).reshape(shape)


_HEADER = struct.Struct("<BBB5xdd")
_PLAIN = 255


def _header(bits: int, missing: bool, step: float, offset: float) -> _Numbers:
    return np.frombuffer(_HEADER.pack(1, bits, missing, step, offset), np.uint8)


def _parsed(data: _Numbers) -> tuple[int, bool, float, float]:
    if data.size < _HEADER.size:
        raise ValueError(f"a chunk of {BoundCodec.name} has {data.size} bytes, fewer than its header of {_HEADER.size}")
    version, bits, missing, step, offset = _HEADER.unpack_from(data[: _HEADER.size].tobytes())
    if version != 1:
        raise ValueError(f"a chunk of {BoundCodec.name} is of version {version}: upgrade aqt_lite to read it")
    if (
        (bits > 32 and bits != _PLAIN)
        or missing > 1
        or not (math.isfinite(step) and step > 0 and math.isfinite(offset))
    ):
        raise ValueError(f"a chunk of {BoundCodec.name} is damaged: bits={bits}, step={step}, offset={offset}")
    return bits, bool(missing), step, offset


# ---- any format


@naming_the_fields
@dataclass(frozen=True)
class QuantizeCodec(_Codec):
    """``aqt_lite.quantize``: codes of any format, with scales for blocks of each chunk.

    Parameters
    ----------
    dtype : str
        Name of the format: "int8", "int4", "mxfp4".
    block : list of int, optional
        How many neighbours share a scale along each axis of a chunk, -1 for all; by default what the format has.
    scheme, scale_dtype, scale_mode
        As for :func:`aqt_lite.quantize`.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> from aqt_lite.zarr import QuantizeCodec
    >>> codec = QuantizeCodec("int4", block=[1, 32])
    >>> z = zarr.create_array({}, shape=(8, 64), chunks=(4, 64), dtype="float32", serializer=codec)
    >>> z[:] = np.ones((8, 64))
    >>> float(z[5, 7])
    1.0
    """

    name: ClassVar[str] = "aqt_lite.quantize"
    dtype: str = "int8"
    block: tuple[int, ...] | None = None
    scheme: Any = "symmetric"
    scale_dtype: str | None = None
    scale_mode: Any = None

    def __post_init__(self) -> None:
        if self.block is not None:
            object.__setattr__(self, "block", PerBlock(tuple(self.block)).shape)
        api.choose_qparams(np.zeros((1,) * len(self.block or (1,)), np.float32), self.dtype, **self._how())

    def _how(self) -> dict[str, Any]:
        how: dict[str, Any] = {"scheme": self.scheme, "scale_dtype": self.scale_dtype, "scale_mode": self.scale_mode}
        return how if self.block is None else {**how, "granularity": PerBlock(self.block)}

    def configuration(self) -> dict[str, Any]:
        """Of the JSON."""
        said = {
            "dtype": self.dtype,
            "block": None if self.block is None else list(self.block),
            "scheme": self.scheme,
            "scale_dtype": self.scale_dtype,
            "scale_mode": self.scale_mode,
        }
        return {name: value for name, value in said.items() if value is not None}

    def validate(self, *, shape: tuple[int, ...], dtype: Any, chunk_grid: Any) -> None:
        """TypeError or ValueError where such arrays are not for this codec."""
        super().validate(shape=shape, dtype=dtype, chunk_grid=chunk_grid)
        one = np.zeros((1,) * len(self.block or (1,)), dtype.to_native_dtype())
        api.choose_qparams(one, self.dtype, **self._how())
        if self.block is not None and len(self.block) != len(shape):
            raise ValueError(f"block={list(self.block)} has {len(self.block)} lengths, and the array {len(shape)} axes")

    def to_bytes(self, x: _Numbers) -> _Numbers:
        """A chunk."""
        missing = np.isnan(x)
        if np.isinf(x).any():
            raise ValueError(
                f"a chunk has {int(np.isinf(x).sum())} infinite values, which {self.dtype} has no codes for: mend "
                "them, make them NaN, or use aqt_lite.bound"
            )
        q = api.quantize(x, self.dtype, nonfinite="ignore", **self._how())
        parts = [np.asarray([missing.any()], np.uint8)]
        if missing.any():
            parts.append(np.packbits(missing, bitorder="little"))
        parts += [np.frombuffer(a.astype(a.dtype.newbyteorder("<")).tobytes(), np.uint8) for a in q._arrays()]
        return np.concatenate(parts)

    def to_values(self, data: _Numbers, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Numbers:
        """The values of a chunk."""
        template = _template(self, shape, dtype.name)
        count, missing = math.prod(shape), None
        at = 1
        if data.size and data[0] == 1:
            missing = np.unpackbits(data[at : at + bytes_of_stream(count, 1)], count=count, bitorder="little")
            at += bytes_of_stream(count, 1)
        wanted = at + sum(a.nbytes for a in template._arrays())
        if data.size != wanted or data[0] > 1:
            raise ValueError(f"a chunk of {self.name} has {data.size} bytes, and {wanted} belong to {shape}")

        def arrays(position: int) -> Iterator[_Numbers]:
            for a in template._arrays():
                raw = data[position : position + a.nbytes].tobytes()
                yield np.frombuffer(raw, a.dtype.newbyteorder("<")).astype(a.dtype).reshape(a.shape)
                position += a.nbytes

        stored = arrays(at)
        q = template._with_each(lambda _: next(stored))
        values = np.array(q.dequantize(), dtype)
        if missing is not None:
            values[missing.reshape(shape).astype(bool)] = np.nan
        return values


@functools.lru_cache(maxsize=256)
def _template(codec: QuantizeCodec, shape: tuple[int, ...], dtype: str) -> QArray:
    """A QArray of a chunk's shape: what the arrays of the others look like."""
    return api.quantize(np.zeros(shape, dtype), codec.dtype, **codec._how())


# ---- packbits


@naming_the_fields
@dataclass(frozen=True)
class PackBitsCodec(_Codec):
    """``packbits`` of the zarr extensions: some bits of each element, one element after the other.

    https://github.com/zarr-developers/zarr-extensions/tree/main/codecs/packbits

    Parameters
    ----------
    padding_encoding : {"none", "first_byte", "last_byte"}
        Where it is said how many bits the last byte was filled up with.
    first_bit, last_bit : int, optional
        The bits that are kept, counted from the least significant; by default all. Signed integers are extended by the
        sign of the last.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> from aqt_lite.zarr import PackBitsCodec
    >>> codec = PackBitsCodec(last_bit=3)  # int4, in an array of int8
    >>> z = zarr.create_array({}, shape=(5,), chunks=(5,), dtype="int8", serializer=codec, compressors=None)
    >>> z[:] = [-8, 7, 0, 3, -1]
    >>> z[:]
    array([-8,  7,  0,  3, -1], dtype=int8)
    """

    name: ClassVar[str] = "packbits"
    padding_encoding: str = "none"
    first_bit: int | None = None
    last_bit: int | None = None

    def __post_init__(self) -> None:
        one_of("padding_encoding", self.padding_encoding, ("none", "first_byte", "last_byte"))
        for name in ("first_bit", "last_bit"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name}={value!r}: give an integer from 0 on, or None")
        if self.last_bit is not None and self.last_bit < (self.first_bit or 0):
            raise ValueError(f"last_bit={self.last_bit} is less than first_bit={self.first_bit or 0}")

    def configuration(self) -> dict[str, Any]:
        """Of the JSON."""
        said = {"padding_encoding": self.padding_encoding, "first_bit": self.first_bit, "last_bit": self.last_bit}
        return {name: value for name, value in said.items() if value not in (None, "none")}

    def check_type(self, dtype: np.dtype[Any]) -> None:
        """TypeError or ValueError where elements of that type have no such bits."""
        self._bits(_component(dtype))

    def _bits(self, component: _Component) -> tuple[int, int]:
        """The first bit, and how many, of a component."""
        first = self.first_bit or 0
        last = component.bits - 1 if self.last_bit is None else self.last_bit
        if max(first, last) >= component.bits:
            raise ValueError(f"first_bit={first}, last_bit={last}: an element has the bits 0 to {component.bits - 1}")
        return first, last - first + 1

    def to_bytes(self, x: _Numbers) -> _Numbers:
        """A chunk."""
        component = _component(x.dtype)
        first, bits = self._bits(component)
        plain = np.ascontiguousarray(x).astype(x.dtype.newbyteorder("="), copy=False)
        words = plain.reshape(-1).view(component.word)
        stream = stream_of(words, first, bits)
        padding = np.asarray([8 * stream.size - words.size * bits], np.uint8)
        ends = {"none": [stream], "first_byte": [padding, stream], "last_byte": [stream, padding]}
        return np.concatenate(ends[self.padding_encoding])

    def to_values(self, data: _Numbers, shape: tuple[int, ...], dtype: np.dtype[Any]) -> _Numbers:
        """The values of a chunk."""
        component = _component(dtype)
        first, bits = self._bits(component)
        count = math.prod(shape) * component.number
        wanted, said = bytes_of_stream(count, bits), self.padding_encoding != "none"
        if data.size != wanted + said:
            raise ValueError(f"a chunk of packbits has {data.size} bytes, and {wanted + said} belong to {shape}")
        if said:
            front = self.padding_encoding == "first_byte"
            padding, data = (data[0], data[1:]) if front else (data[-1], data[:-1])
            if padding != 8 * wanted - count * bits:
                raise ValueError(
                    f"a chunk of packbits says {padding} bits of padding, and has {8 * wanted - count * bits}"
                )
        words = words_of(data, count, first, bits, component.word, signed=component.signed)
        return words.view(dtype.newbyteorder("=")).astype(dtype, copy=False).reshape(shape)


@dataclass(frozen=True)
class _Component:
    """A part of an element that is packed by itself."""

    word: np.dtype[Any]
    """Unsigned integer of its size in memory."""
    bits: int
    number: int
    signed: bool


_NARROW = [f for f in FORMATS.values() if f.element.bits < 8 and hasattr(ml_dtypes, f.name)]
_BITS = {"bool": 1, **{f.name: f.element.bits for f in _NARROW}}
"""Of types that take a byte each in memory."""


def _component(dtype: np.dtype[Any]) -> _Component:
    known = dtype.name in _BITS or dtype.name == "bfloat16" or dtype.kind in "iufc"
    if not known or dtype.itemsize > 16 or dtype.name == "float16":
        raise TypeError(f"packbits has no bits for elements of {dtype}")
    number = 2 if dtype.kind == "c" else 1
    word = np.dtype(f"u{dtype.itemsize // number}")
    return _Component(word, _BITS.get(dtype.name, 8 * word.itemsize), number, dtype.name.startswith("int"))


# ---- codecs that others have


@naming_the_argument
def standard_codecs(x: Any, *, max_abs_err: float, dtype: str = "int16") -> list[dict[str, Any]]:
    """The bound in the words of the zarr extensions, ``scale_offset`` and ``cast_value``: no reader needs this library.

    The step is a power of two, so that every decoder has the same values: up to a bit more than
    :func:`aqt_lite.cf.choose_packing` needs. Readers must have both codecs; zarr-python 3.4 has, with
    ``cast-value-rs``.

    Parameters
    ----------
    x : array
        All that is to be stored, as for :func:`aqt_lite.cf.choose_packing`.
    max_abs_err : float
    dtype : str
        Of the codes: an integer type of 8, 16 or 32 bits.

    Returns
    -------
    list of dict
        JSON for ``filters=`` of ``zarr.create_array``. NaN is mapped to the code that no number has.

    Examples
    --------
    >>> import numpy as np
    >>> from aqt_lite.zarr import standard_codecs
    >>> first, second = standard_codecs(np.asarray([250.0, 300.0], "float32"), max_abs_err=0.05)
    >>> first["configuration"]
    {'offset': 275.0, 'scale': 16.0}
    >>> second["configuration"]["data_type"]
    'int16'
    """
    packing = cf.choose_packing(x, max_abs_err=max_abs_err, dtype=dtype, powers_of_two=True)
    if packing.scale_factor.dtype != x.dtype.newbyteorder("="):
        raise ValueError(
            f"float32 cannot keep max_abs_err={max_abs_err!r} here, and codecs compute in the array's type"
        )
    fill = int(packing.fill_value)
    scale = {"offset": float(packing.add_offset), "scale": 1 / float(packing.scale_factor)}
    cast = {"data_type": packing.dtype.name, "scalar_map": {"encode": [["NaN", fill]], "decode": [[fill, "NaN"]]}}
    return [{"name": "scale_offset", "configuration": scale}, {"name": "cast_value", "configuration": cast}]


for _codec in (BoundCodec, QuantizeCodec, PackBitsCodec):
    register_codec(_codec.name, _codec)
