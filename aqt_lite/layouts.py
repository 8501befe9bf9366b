"""In which order other libraries keep bits: layouts as records, and the two functions that follow them.

Owns: ``Layout`` and its parts, the table of layouts, packing and unpacking codes by them. Imports: packing, for dense
streams, the registry, and formats, for what a pattern of bits stands for.

A layout says where every bit of a block goes. A block is a run of elements along one axis and what is kept beside
them: the codes of its scales, of their scales, of offsets, each a *leaf*. It is stored as *fields*, one after the
other. A field is a run of little-endian words without gaps; each of its words takes bits from the same places. So the
table below is all that is known of a library's order, and nothing asks for a layout's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from aqt_lite._dispatch import run
from aqt_lite._near import of_these, one_of, shown
from aqt_lite._registry import get_backend
from aqt_lite.packing import pack, unpack

__all__ = [
    "LAYOUTS",
    "Family",
    "Field",
    "Layout",
    "Leaf",
    "Part",
    "dense",
    "in_words",
    "layout_of",
    "planes",
    "strided",
]

_Codes = np.ndarray[Any, Any]
_TRITS = 5
"""Digits of base 3 in a byte."""
_MOST_ELEMENTS = 1 << 56
"""More than any array has; what is made of so many on the way can still be counted in 63 bits."""


@dataclass(frozen=True)
class Part:
    """Some bits of one code in each word of a field.

    Parameters
    ----------
    leaf : str
        Which codes: "codes", "scale", "offset", "scale.scale", ...; "" for bits that are 0.
    run : int
        The leaf's codes are taken in runs as long as the field has words: word ``i`` takes code ``run * count + i``.
    bits : int
        How many bits.
    shift : int
        The lowest of them.
    """

    leaf: str
    run: int
    bits: int
    shift: int = 0


@dataclass(frozen=True)
class Field:
    """Words of one kind, one after the other.

    Parameters
    ----------
    count : int or None
        How many words; None, where the block is the whole axis: as many as its parts need.
    parts : tuple of Part
        What a word holds, from its lowest bit up.
    base : {2, 3}
        3: each part is a digit 0, 1 or 2, and the word a byte whose 256th part is the fraction 0.abcde in base 3,
        rounded up: how ggml keeps five trits in a byte.
    """

    count: int | None
    parts: tuple[Part, ...]
    base: int = 2

    @property
    def width(self) -> int:
        """Bits of a word."""
        return 8 if self.base == 3 else sum(part.bits for part in self.parts)


@dataclass(frozen=True)
class Leaf:
    """Codes of a block: those of its elements, or of scales or offsets beside them.

    Parameters
    ----------
    name : str
        "codes", "scale" (the codes of ``q.scale``), "offset", "scale.scale" (those of ``q.scale.scale``), ...
    length : int or None
        How many there are in a block; None: as many as the axis is long.
    bits : int
        Bits of each.
    low : int or None
        The smallest code that the layout can hold. None: a code's own bits are stored, whatever they stand for.
    add : int
        What is added to a code to give the pattern that is stored, modulo 2^bits.
    dtype : str, optional
        Format of the codes, where the layout says it.
    """

    name: str
    length: int | None
    bits: int
    low: int | None = None
    add: int = 0
    dtype: str | None = None

    def patterns(self, codes: _Codes) -> _Codes:
        """What is stored of codes, as uint32; ValueError where the layout has no room for one."""
        codes = codes.astype(np.int32)
        count = 1 << self.bits
        low, high = (-count // 2, count - 1) if self.low is None else (self.low, self.low + count - 1)
        bad = (codes < low) | (codes > high)
        if bad.any():
            first = tuple(int(i) for i in np.argwhere(bad)[0])
            raise ValueError(
                f"{self.name} has code {codes[first]} at {first}, and this layout room for {low} to {high}"
            )
        return ((codes + self.add) & (count - 1)).astype(np.uint32)

    def codes(self, patterns: _Codes, signed: bool = False) -> _Codes:
        """The inverse, as int32; ``signed``: where the layout does not say it, in two's complement."""
        count = 1 << self.bits
        low = self.low if self.low is not None else -count // 2 if signed else 0
        return ((patterns.astype(np.int32) - (self.add + low)) & (count - 1)) + np.int32(low)


@dataclass(frozen=True)
class Layout:
    r"""Where every bit of an array's blocks goes.

    Parameters
    ----------
    name : str
    leaves : tuple of Leaf
        What a block holds. With more than "codes", the stored blocks are complete: scales are in them.
    fields : tuple of Field
        In which order, and in which words.
    axis : {-1, 0}
        Along which axis blocks run.
    word : {"uint8", "int32"}
        dtype of the stored array.
    dtype : str, optional
        The format that ``QArray.from_bytes`` gives the array.
    pads : bool
        Whether a last block may be shorter: it is filled up with zero bits, and words that hold nothing else left out.
        Where the block is the whole axis, it is filled up so that its parts are of one length.
    flat : bool
        Whether the array is stored as if it had one axis only.

    Raises
    ------
    ValueError
        A bit of a leaf is stored twice or not at all; a field ends inside a byte.

    Examples
    --------
    Two codes in a byte, the first in the upper half, and an array stored so:

    >>> import numpy as np, aqt_lite
    >>> from aqt_lite.layouts import Field, Layout, Leaf, Part
    >>> mine = Layout(
    ...     "upper_half_first",
    ...     leaves=(Leaf("codes", length=2, bits=4),),
    ...     fields=(Field(1, (Part("codes", run=1, bits=4), Part("codes", run=0, bits=4))),),
    ... )
    >>> q = aqt_lite.QArray.from_bytes(b"\x12\x3f", mine, (4,), dtype="uint4", scale=1.0, zero_point=0)
    >>> q.dequantize().tolist()
    [1.0, 2.0, 3.0, 15.0]
    >>> q.to_bytes(mine).tobytes().hex()
    '123f'
    """

    name: str
    leaves: tuple[Leaf, ...]
    fields: tuple[Field, ...]
    axis: int = -1
    word: str = "uint8"
    dtype: str | None = None
    pads: bool = False
    flat: bool = False

    def __post_init__(self) -> None:
        if not self.leaves or self.leaves[0].name != "codes" or self.axis not in (-1, 0):
            raise ValueError(f"Layout({self.name!r}): leaves begin with 'codes', and axis is -1 or 0")
        one_of(f"Layout({self.name!r}): word", self.word, ("uint8", "int32"))
        if len(self.leaves) > 1:
            complete = self.axis == -1 and not (self.pads or self.flat) and self.dtype is not None
            if not complete or any(leaf.dtype is None or leaf.length is None for leaf in self.leaves[1:]):
                raise ValueError(
                    f"Layout({self.name!r}): complete blocks, of several leaves, run along the last axis, are not "
                    "filled up, and say dtype= of the array and of each of the other leaves"
                )
        lengths = {leaf.name: leaf.length or self._runs(leaf.name) for leaf in self.leaves}
        stored = {leaf.name: np.zeros((lengths[leaf.name], leaf.bits), np.int64) for leaf in self.leaves}
        for field in self.fields:
            self._check(field)
            for part in field.parts:
                count = field.count or 1
                if part.leaf and part.leaf not in stored:
                    raise ValueError(
                        f"Layout({self.name!r}): no leaf is called {part.leaf!r}, of which a field has bits"
                    )
                if part.leaf:
                    first, bits = part.run * count, slice(part.shift, part.shift + part.bits)
                    length, width = stored[part.leaf].shape
                    if first < 0 or first + count > length or part.shift < 0 or bits.stop > width:
                        raise ValueError(
                            f"Layout({self.name!r}): {part} of a field of {field.count} words lies outside of the "
                            f"leaf, which has {length} codes of {width} bits"
                        )
                    stored[part.leaf][first : first + count, bits] += 1
        for name, times in stored.items():
            if (times != 1).any():
                at, bit = np.argwhere(times != 1)[0]
                raise ValueError(
                    f"Layout({self.name!r}): bit {bit} of {name}[{at}] is stored {times[at, bit]} times: say once where"
                )

    def _check(self, field: Field) -> None:
        width = field.width
        whole = field.count is None or (field.count > 0 and field.count * width % 8 == 0)
        trits = field.base == 3 and 0 < len(field.parts) <= _TRITS and all(part.bits == 2 for part in field.parts)
        if not (trits or (field.base == 2 and 0 < width <= 32)) or not whole or (width > 8 and width % 8):
            raise ValueError(
                f"Layout({self.name!r}): a field of {field.count} words of {width} bits: words have 1 to 8, 16, 24 or "
                "32 bits and a field whole bytes; in base 3 up to five parts of 2 bits"
            )

    def _runs(self, name: str) -> int:
        """How many runs fields take of a leaf that is the whole axis."""
        return 1 + max((part.run for field in self.fields for part in field.parts if part.leaf == name), default=0)

    @property
    def block(self) -> int | None:
        """Elements of a block; None where it is the whole axis."""
        return self.leaves[0].length

    @property
    def bits(self) -> int:
        """Bits of an element's code."""
        return self.leaves[0].bits

    def holds(self, dtype: str, bits: int) -> bool:
        """Whether codes of this format, of so many bits, are what the layout is about."""
        return dtype == self.dtype if self.dtype is not None else bits == self.bits

    def stored_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the stored array of an array of ``shape``; ValueError where blocks do not divide its axis."""
        if self.flat:
            shape = (math.prod(shape),)
        if not shape:
            raise ValueError(f"layout {self.name!r} runs along an axis: an array of shape () has none")
        length = shape[self.axis]
        blocks, _ = self._blocks_of(length)
        size = self._bytes_of(length) * (1 if self.block is None else blocks)
        width = np.dtype(self.word).itemsize
        if self.pads and [len(field.parts) for field in self.fields] == [1]:  # a stream, which may end anywhere
            size = min(size, -(-length * self.bits // 8))
        words = -(-size // width)
        return (*shape[:-1], words) if self.axis == -1 else (words, *shape[1:])

    def _blocks_of(self, length: int) -> tuple[int, int]:
        """How many blocks an axis has, and how many elements they hold with what fills them up."""
        unit = self._runs("codes") if self.block is None else self.block
        if length % unit and not self.pads:
            raise ValueError(
                f"layout {self.name!r} takes {unit} elements at a time, and axis {self.axis} of length {length} is no "
                f"multiple of {unit}: fill it up, or choose another layout"
            )
        units = -(-length // unit)
        return (units, units * unit) if self.block is not None else (1, units * unit)

    def _bytes_of(self, length: int) -> int:
        """Bytes of a block."""
        filled = self._blocks_of(length)[1]
        return sum(-(-(field.count or filled // self._runs("codes")) * field.width // 8) for field in self.fields)

    def packed(self, leaves: Mapping[str, _Codes]) -> _Codes:
        """The stored array of codes, given for each leaf as an array of integers along the blocks' axis.

        Examples
        --------
        >>> from aqt_lite.layouts import LAYOUTS
        >>> LAYOUTS["high_nibble_first"].packed({"codes": np.asarray([1, 2, 3, 15])})
        array([18, 63], dtype=uint8)
        """
        codes = np.asarray(leaves["codes"])
        shape = codes.shape
        stored = self.stored_shape(shape)
        length = codes.size if self.flat else shape[self.axis]
        blocks, filled = self._blocks_of(length)
        patterns = {}
        for leaf in self.leaves:
            u = leaf.patterns(np.asarray(leaves[leaf.name]))
            u = u.reshape(1, -1) if self.flat else np.moveaxis(u, self.axis, -1)
            u = u.reshape(math.prod(u.shape[:-1]), u.shape[-1])
            if leaf.name == "codes" and filled > length:
                u = np.concatenate([u, np.zeros((len(u), filled - length), np.uint32)], axis=-1)
            patterns[leaf.name] = u.reshape(len(u), blocks, leaf.length or filled)
        fields = [_stored_field(field, patterns) for field in self.fields]
        whole = np.concatenate(fields, axis=-1)
        whole = whole.reshape(whole.shape[0], blocks * whole.shape[2])
        words = stored[self.axis]
        size = words * np.dtype(self.word).itemsize
        if whole.shape[1] < size:
            whole = np.concatenate([whole, np.zeros((len(whole), size - whole.shape[1]), np.uint8)], axis=-1)
        data = np.ascontiguousarray(whole[:, :size]).view(np.dtype(self.word).newbyteorder("<"))
        if self.axis == -1:
            return data.reshape(stored).astype(self.word, copy=False)
        return np.ascontiguousarray(np.moveaxis(data.reshape(*shape[1:], words), -1, 0)).astype(self.word, copy=False)

    def unpacked(self, data: Any, shape: tuple[int, ...], *, signed: bool = False) -> dict[str, _Codes]:
        """The inverse: int32 codes of every leaf of an array of ``shape``.

        Parameters
        ----------
        data : bytes, or array
            Of the shape of ``stored_shape``, or of one axis and the same size: words of ``word`` or of its unsigned or
            signed twin; bytes and uint8 are read as little-endian words.
        shape : tuple of int
        signed : bool
            Whether codes whose own bits are stored are in two's complement.

        Raises
        ------
        ValueError, TypeError
            Another length or dtype; axes longer than any array has; bits that are not 0 where the layout keeps nothing.

        Examples
        --------
        >>> LAYOUTS["high_nibble_first"].unpacked(bytes([0x12, 0x3F]), (4,))
        {'codes': array([ 1,  2,  3, 15], dtype=int32)}
        """
        if math.prod(n for n in shape if n) >= _MOST_ELEMENTS:  # NumPy counts them so, though one length may be 0
            raise ValueError(f"shape={tuple(shape)}: no array has axes so long, even beside one of length 0")
        stored = self.stored_shape(shape)
        words = _as_bytes(data, self, stored)
        flat = (math.prod(shape),) if self.flat else tuple(shape)
        length = flat[self.axis]
        blocks, filled = self._blocks_of(length)
        lead = flat[:-1] if self.axis == -1 else flat[1:]
        if self.axis == 0:
            words = np.moveaxis(words, 0, -2)
        rows = math.prod(lead)
        whole = np.ascontiguousarray(words).reshape(rows, math.prod(words.shape[len(lead) :]))
        size = self._bytes_of(length) * blocks
        if whole.shape[1] < size:
            whole = np.concatenate([whole, np.zeros((rows, size - whole.shape[1]), np.uint8)], axis=-1)
        if whole[:, size:].any():
            raise ValueError(f"data has bits beyond the last code of layout {self.name!r} that are not 0")
        bytes_of_blocks = whole[:, :size].reshape(rows, blocks, self._bytes_of(length))
        lengths = {leaf.name: leaf.length or filled for leaf in self.leaves}
        patterns = {name: np.zeros((rows, blocks, n), np.uint32) for name, n in lengths.items()}
        start = 0
        for field in self.fields:
            count = field.count or filled // self._runs("codes")
            stop = start + -(-count * field.width // 8)
            if not _read_field(field, bytes_of_blocks[:, :, start:stop], count, patterns):
                raise ValueError(f"data has bits that are not 0 where layout {self.name!r} keeps nothing")
            start = stop
        found = {}
        for leaf in self.leaves:
            u = patterns[leaf.name].reshape(rows, blocks * lengths[leaf.name])
            if leaf.name == "codes" and filled > length:
                if u[:, length:].any():
                    raise ValueError(f"data has bits beyond the last code of layout {self.name!r} that are not 0")
                u = u[:, :length]
            codes = leaf.codes(u, signed)
            if self.flat:
                found[leaf.name] = codes.reshape(shape)
            else:
                found[leaf.name] = np.moveaxis(codes.reshape(*lead, codes.shape[-1]), -1, self.axis)
        return found


def _stored_field(field: Field, patterns: Mapping[str, _Codes]) -> _Codes:
    """The bytes of a field, of (rows, blocks) blocks."""
    first = next(part for part in field.parts if part.leaf)
    of_first = patterns[first.leaf]
    count = field.count or of_first.shape[-1] // (1 + max(part.run for part in field.parts))
    word = np.zeros((*of_first.shape[:2], count), np.uint32)
    at = 0
    for i, part in enumerate(field.parts):
        if part.leaf:
            taken = patterns[part.leaf][:, :, part.run * count : (part.run + 1) * count]
            taken = (taken >> np.uint32(part.shift)) & np.uint32((1 << part.bits) - 1)
            if field.base == 3:
                word += taken * np.uint32(3 ** (_TRITS - 1 - i))
            else:
                word |= taken << np.uint32(at)
        at += part.bits
    if field.base == 3:
        return ((word * np.uint32(256) + np.uint32(242)) // np.uint32(243)).astype(np.uint8)
    if field.width < 8:
        stream: _Codes = run(get_backend("numpy"), pack, word, bits=field.width)
        return stream
    of_word = np.ascontiguousarray(word.astype("<u4")).view(np.uint8).reshape(*word.shape, 4)
    return of_word[..., : field.width // 8].reshape(*word.shape[:2], count * field.width // 8)


def _read_field(field: Field, stored: _Codes, count: int, patterns: Mapping[str, _Codes]) -> bool:
    """Write what a field's bytes say into ``patterns``; whether bits that are to be 0 are."""
    if field.base == 3:
        for i, part in enumerate(field.parts):
            shifted = (stored.astype(np.uint32) * np.uint32(3**i)) & np.uint32(255)
            patterns[part.leaf][:, :, part.run * count : (part.run + 1) * count] = (shifted * np.uint32(3)) >> 8
        return True
    if field.width < 8:
        word = run(get_backend("numpy"), unpack, stored, bits=field.width, length=count, signed=False)
        word = word.astype(np.uint32)
    else:
        parts = stored.reshape(*stored.shape[:2], count, field.width // 8).astype(np.uint32)
        word = np.zeros(parts.shape[:3], np.uint32)
        for j in range(field.width // 8):
            word |= parts[..., j] << np.uint32(8 * j)
    at = 0
    for part in field.parts:
        taken = (word >> np.uint32(at)) & np.uint32((1 << part.bits) - 1)
        at += part.bits
        if part.leaf:
            patterns[part.leaf][:, :, part.run * count : (part.run + 1) * count] |= taken << np.uint32(part.shift)
        elif taken.any():
            return False
    return True


def _as_bytes(data: Any, layout: Layout, stored: tuple[int, ...]) -> _Codes:
    """``data`` as (*stored, bytes of a word); ValueError or TypeError where it is another array."""
    width = np.dtype(layout.word).itemsize
    if isinstance(data, bytes | bytearray | memoryview):
        data = np.frombuffer(data, np.uint8)
    array = np.asarray(data)
    if array.dtype.kind not in "iu" or array.dtype.itemsize not in (1, width):
        raise TypeError(f"data has dtype {array.dtype}: layout {layout.name!r} is stored as {layout.word}, or as bytes")
    array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False))
    whole = math.prod(stored) * width
    if array.nbytes != whole or not (array.shape == stored or array.ndim <= 1 or layout.flat):
        raise ValueError(
            f"data has shape {array.shape} of {array.dtype}: layout {layout.name!r} needs {stored} of {layout.word} "
            f"({whole} bytes), or the same in one axis"
        )
    return array.reshape(-1).view(np.uint8).reshape(*stored, width)


@dataclass(frozen=True)
class Family:
    """Several layouts under one name: the one that holds an array's codes is taken.

    Examples
    --------
    >>> from aqt_lite.layouts import LAYOUTS
    >>> LAYOUTS["dense"].holding("int3", 3).name
    'dense3'
    """

    name: str
    layouts: tuple[Layout, ...]

    def holding(self, dtype: str, bits: int) -> Layout:
        """The layout for codes of a format; ValueError where there is none."""
        for layout in self.layouts:
            if layout.holds(dtype, bits):
                return layout
        known = ", ".join(dict.fromkeys(f"{a.bits} bits" if a.dtype is None else a.dtype for a in self.layouts))
        raise ValueError(f"layout {self.name!r} has no place for {dtype} ({bits} bits): it is for {known}")


def layout_of(layout: Any, dtype: str, bits: int) -> Layout:
    """The layout that users mean, by name or the record itself, for codes of a format; ValueError where none is."""
    found = LAYOUTS.get(layout) if isinstance(layout, str) else layout
    if isinstance(found, Family):
        return found.holding(dtype, bits)
    if not isinstance(found, Layout):
        near = of_these(layout, LAYOUTS) if isinstance(layout, str) else ""
        raise ValueError(f"layout={shown(layout)} is not known{near}: give a Layout, or one of {', '.join(LAYOUTS)}")
    if not found.holds(dtype, bits):
        wanted = f"{found.bits} bits" if found.dtype is None else f"format {found.dtype}"
        raise ValueError(f"layout {found.name!r} is for codes of {wanted}, and this array has {dtype} ({bits} bits)")
    return found


# ---- kinds of layouts


def dense(
    name: str,
    bits: int,
    word: str = "uint8",
    axis: int = -1,
    *,
    pads: bool = True,
    low: int | None = None,
    add: int = 0,
) -> Layout:
    """A little-endian stream of bits: code ``i`` in bits ``[i * bits, (i + 1) * bits)``, across bytes and words."""
    count = math.lcm(bits, np.dtype(word).itemsize * 8) // bits
    field = Field(count, (Part("codes", 0, bits),))
    return Layout(name, (Leaf("codes", count, bits, low, add),), (field,), axis, word, pads=pads)


def in_words(
    name: str, bits: int, word: str = "int32", axis: int = -1, *, low: int | None = None, add: int = 0
) -> Layout:
    """As many codes in each word as fit, the first in its lowest bits; none crosses into the next."""
    width = np.dtype(word).itemsize * 8
    count = width // bits
    parts = tuple(Part("codes", i, bits) for i in range(count))
    parts += (Part("", 0, width - count * bits),) if width % bits else ()
    return Layout(name, (Leaf("codes", count, bits, low, add),), (Field(1, parts),), axis, word, pads=True)


def strided(
    name: str, bits: int, *, highest_first: bool, word: str = "uint8", add: int = 0, pads: bool = False
) -> Layout:
    """The first axis in equal parts: word ``i`` has code ``i`` of each, in a place for each part.

    With ``pads`` the last part may be shorter.
    """
    width = np.dtype(word).itemsize * 8
    runs = range(width // bits)
    parts = tuple(Part("codes", run, bits) for run in (reversed(runs) if highest_first else runs))
    unused = width - len(parts) * bits
    parts += (Part("", 0, unused),) if unused else ()
    leaf = Leaf("codes", None, bits, low=-add if add else None, add=add)
    return Layout(name, (leaf,), (Field(None, parts),), 0, word, pads=pads)


def planes(name: str, bits: int, of_planes: tuple[int, ...], count: int = 32, axis: int = 0) -> Layout:
    """For each ``count`` codes, their lowest bits, then the next ones, each a dense stream in words of 32 bits."""
    fields, shift = [], 0
    for width in of_planes:
        fields.append(Field(count, (Part("codes", 0, width, shift),)))
        shift += width
    return Layout(name, (Leaf("codes", count, bits),), tuple(fields), axis, "int32")


def _in_order(name: str, order: tuple[int, ...], bits: int, word: str, **how: Any) -> Layout:
    """A few codes in each word: place ``i``, from the lowest, holds code ``order[i]`` of them."""
    parts = tuple(Part("codes", code, bits) for code in order)
    return Layout(name, (Leaf("codes", len(order), bits),), (Field(1, parts),), word=word, **how)


# ---- the table


def _halves(first: int, count: int, bits: int = 4, runs: int = 2) -> Field:
    """Words of several runs of codes, the first in the lowest bits."""
    return Field(count, tuple(Part("codes", first + i, bits) for i in range(runs)))


def _whole(leaf: str, count: int, bits: int, shift: int = 0) -> Field:
    """So many bits of each of a leaf's codes, one after the other."""
    return Field(count, (Part(leaf, 0, bits, shift),))


def _half_floats(leaf: str, add: int = 0) -> tuple[Leaf, Field]:
    """A leaf of one float16, as its pattern of bits in int16, and its field."""
    return Leaf(leaf, 1, 16, -(1 << 15), add, "float16"), _whole(leaf, 1, 16)


_D, _F_D = _half_floats("scale")
_M, _F_M = _half_floats("offset")
_DD, _F_DD = _half_floats("scale.scale")
_DM, _F_DM = _half_floats("offset.scale", add=1 << 15)  # what is subtracted there is added here: the sign differs


def _signed(length: int, bits: int) -> Leaf:
    """Codes that are stored from 0 up."""
    return Leaf("codes", length, bits, low=-(1 << (bits - 1)), add=1 << (bits - 1))


_HIGH = _whole("codes", 32, 1, shift=4)
_SIX_BITS = (  # of eight scales and eight minima, the first four of each in one piece
    Field(4, (Part("scale", 0, 6), Part("scale", 1, 2, 4))),
    Field(4, (Part("offset", 0, 6), Part("offset", 1, 2, 4))),
    Field(4, (Part("scale", 1, 4), Part("offset", 1, 4))),
)
_SCALES_AND_MINIMA = (Leaf("scale", 8, 6, low=0, dtype="int7"), Leaf("offset", 8, 6, low=0, dtype="int7"))
_PAIRS = tuple(Field(32, (Part("codes", 2 * c, 4), Part("codes", 2 * c + 1, 4))) for c in range(4))
_FOURTHS = tuple(_halves(4 * h, 32, 2, 4) for h in range(2))
_TRITS_OF_A_BLOCK = tuple(
    Field(count, tuple(Part("codes", first + n, 2) for n in range(runs)), base=3)
    for count, first, runs in ((32, 0, 5), (16, 10, 5), (4, 60, 4))
)

_GGML = {  # ggml's src/ggml-common.h; the leaves in the order of the fields
    "q4_0": ((_signed(32, 4), _D), (_F_D, _halves(0, 16))),
    "q4_1": ((Leaf("codes", 32, 4, low=0), _D, _M), (_F_D, _F_M, _halves(0, 16))),
    "q5_0": ((_signed(32, 5), _D), (_F_D, _HIGH, _halves(0, 16))),
    "q5_1": ((Leaf("codes", 32, 5, low=0), _D, _M), (_F_D, _F_M, _HIGH, _halves(0, 16))),
    "q8_0": ((Leaf("codes", 32, 8, low=-128), _D), (_F_D, _whole("codes", 32, 8))),
    "q2_k": (
        (
            *(Leaf("codes", 256, 2, low=0), Leaf("scale", 16, 4, low=0, dtype="int5"), _DD),
            *(Leaf("offset", 16, 4, low=0, dtype="int5"), _DM),
        ),
        (Field(16, (Part("scale", 0, 4), Part("offset", 0, 4))), *_FOURTHS, _F_DD, _F_DM),
    ),
    "q3_k": (
        (_signed(256, 3), Leaf("scale", 16, 6, low=-32, add=32, dtype="int6"), _DD),
        (
            Field(32, tuple(Part("codes", run, 1, 2) for run in range(8))),
            *_FOURTHS,
            Field(8, (Part("scale", 0, 4), Part("scale", 1, 4))),
            Field(4, tuple(Part("scale", run, 2, 4) for run in range(4))),
            _F_DD,
        ),
    ),
    "q4_k": ((Leaf("codes", 256, 4, low=0), *_SCALES_AND_MINIMA, _DD, _DM), (_F_DD, _F_DM, *_SIX_BITS, *_PAIRS)),
    "q5_k": (
        (Leaf("codes", 256, 5, low=0), *_SCALES_AND_MINIMA, _DD, _DM),
        (_F_DD, _F_DM, *_SIX_BITS, Field(32, tuple(Part("codes", run, 1, 4) for run in range(8))), *_PAIRS),
    ),
    "q6_k": (
        (_signed(256, 6), Leaf("scale", 16, 8, low=-128, dtype="int8"), _DD),
        (
            *(Field(32, (Part("codes", r, 4), Part("codes", r + 2, 4))) for r in (0, 1, 4, 5)),
            *(Field(32, tuple(Part("codes", 4 * h + k, 2, 4) for k in range(4))) for h in range(2)),
            *(_whole("scale", 16, 8), _F_DD),
        ),
    ),
    "tq1_0": ((Leaf("codes", 256, 2, low=-1, add=1), _D), (*_TRITS_OF_A_BLOCK, _F_D)),
    "tq2_0": ((Leaf("codes", 256, 2, low=-1, add=1), _D), (*_FOURTHS, _F_D)),
    "iq4_nl": ((Leaf("codes", 32, 4, low=0), _D), (_F_D, _halves(0, 16))),
    "iq4_xs": (
        (Leaf("codes", 256, 4, low=0), Leaf("scale", 8, 6, low=-32, add=32, dtype="int6"), _DD),
        (_F_DD, _whole("scale", 8, 2, 4), _whole("scale", 8, 4), *(_halves(2 * k, 16) for k in range(8))),
    ),
    "mxfp4": (
        (Leaf("codes", 32, 4, low=0), Leaf("scale", 1, 8, low=0, dtype="float8_e8m0fnu")),
        (_whole("scale", 1, 8), _halves(0, 16)),
    ),
    "nvfp4": (
        (Leaf("codes", 64, 4, low=0), Leaf("scale", 4, 7, low=0, dtype="float8_e4m3fn")),
        (Field(4, (Part("scale", 0, 7), Part("", 0, 1))), *(_halves(2 * s, 8) for s in range(4))),
    ),
}
_GGUF = tuple(Layout(name, leaves, fields, dtype=name) for name, (leaves, fields) in _GGML.items())
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def _each(name: str, bits: tuple[int, ...], made: Any) -> Family:
    return Family(name, tuple(made(f"{name}{n}", n) for n in bits))


_FEW, _ALL = (2, 3, 4, 8), (2, 3, 4, 5, 6, 7, 8)

_TABLE: list[Layout | Family] = [
    _each("dense", (*_ALL, 16), dense),
    _each("dense_int32", _ALL, lambda name, n: dense(name, n, "int32", pads=False)),
    _in_order("low_nibble_first", (0, 1), 4, "uint8", pads=True),
    _in_order("high_nibble_first", (1, 0), 4, "uint8", pads=True),
    _in_order("bitsandbytes", (1, 0), 4, "uint8", pads=True, flat=True),
    _in_order("awq", (0, 2, 4, 6, 1, 3, 5, 7), 4, "int32"),
    _each("gptq", _FEW, lambda name, n: dense(name, n, "int32", axis=0, pads=False)),
    _each("gptq_p", _ALL, lambda name, n: planes(name, n, _PLANES[n])),
    _each("gptq_zeros", _FEW, lambda name, n: dense(name, n, "int32", pads=False, low=0, add=-1)),
    _each("compressed_tensors", _ALL, lambda name, n: dense(name, n, "int32", low=-(1 << n - 1), add=1 << n - 1)),
    _each("compressed_tensors_0.16", _ALL, lambda name, n: in_words(name, n, low=-(1 << n - 1), add=1 << n - 1)),
    Family(
        "hqq",
        (
            strided("hqq4", 4, highest_first=True),
            strided("hqq3", 3, highest_first=True, word="int32", pads=True),
            strided("hqq2", 2, highest_first=True),
            *(in_words(f"hqq{n}", n, "uint8", axis=0) for n in (5, 6, 8)),
        ),
    ),
    _each("quanto", (2, 4), lambda name, n: strided(name, n, highest_first=False, pads=True)),
    strided("bitnet", 2, highest_first=False, add=1, pads=True),
    _each("keras", (2, 4), lambda name, n: dense(name, n, axis=0)),
    *_GGUF,
    Family("gguf", _GGUF),
]

LAYOUTS = {layout.name: layout for layout in _TABLE}
"""Every layout that ``to_bytes`` and ``from_bytes`` know by name."""
