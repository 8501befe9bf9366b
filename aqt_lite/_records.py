"""What the contract computes with: parameters and codes, what codes mean, and how they are chosen.

Owns: these records, and the bounds that follow from them alone. Imports: formats, elements, dialects, granularity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from aqt_lite._namespace import Array
from aqt_lite.dialects import AQT_LITE, Dialect
from aqt_lite.elements import ElementType, FloatType, Rounding, float_type
from aqt_lite.formats import Format
from aqt_lite.granularity import Block, block_of

__all__ = ["Coded", "Kept", "QParams", "Recipe", "Spec", "Steps"]

Kept = Any
"""Numbers as they are kept: an array, or ``Coded`` where they are quantized themselves; None where there are none."""


class Coded(NamedTuple):
    """The arrays of a quantized array: what compilers see as a tree of leaves."""

    codes: Array
    """One code an element."""
    scale: Kept
    """A number for each block, on the grid of blocks; coded itself where the format says so; None where it has none."""
    zero_point: Array | None = None
    """int32 on the same grid: the code of 0.0, where that is not 0."""
    offset: Kept = None
    """A number for each block, added to the block's values."""


class Steps(NamedTuple):
    """``x * factor + shift``: what libraries round that compute the inverse of a scale first."""

    factor: Array
    shift: Array | None = None


class QParams(NamedTuple):
    """All of ``Coded`` but the codes."""

    scale: Kept
    zero_point: Array | None = None
    offset: Kept = None
    steps: Steps | None = None
    """How codes are made, where that is not from the others."""

    def beside(self, codes: Array) -> Coded:
        """With codes that were made by them."""
        return Coded(codes, *self[:3])


@dataclass(frozen=True)
class Spec:
    """What codes mean: all of a quantized array that is not an array. Hashable, so that compilers specialize on it."""

    format: Format
    """Element type, and how scales are kept."""
    source: FloatType
    """Type of the values; its ``compute`` is the dtype of all arithmetic."""
    block: Block
    """Block shape, one entry for each axis."""
    floor: float = 0.0
    """Where the numbers are scales themselves: the least scale that is of use."""

    @property
    def element(self) -> ElementType:
        """Which numbers codes stand for."""
        return self.format.element

    @property
    def headroom(self) -> float:
        """What scales are multiplied by before their reciprocal is taken: it would be subnormal for the largest."""
        return 1.0 if self.format.largest() >= 4 else 0.25

    @property
    def least(self) -> float:
        """Least scale whose products with the numbers, and whose reciprocal, are normal; of scales: of use, too."""
        smallest = min(self.element.smallest, self.headroom, 1.0)
        least = self.source.tiny * 2.0 ** -math.floor(math.log2(smallest))
        return max(least, self.floor / self.element.smallest)

    @property
    def least_with_offset(self) -> float:
        """The same where an offset is added: what is lost of subnormal numbers is then less than 2^-24 of a step."""
        return max(self.least, self.source.tiny * 2.0**25)

    def least_to_choose(self, with_offset: bool) -> float:
        """The least scale that is chosen, or may be given."""
        return self.least_with_offset if with_offset else self.least

    def least_to_keep(self, with_offset: bool) -> float:
        """The least scale that may come with codes: other libraries go down to the smallest normal number."""
        kept = max(self.source.tiny / 2 / min(self.element.smallest, 1.0), self.floor / self.element.smallest)
        return self.least_with_offset if with_offset else min(self.least, kept)

    @property
    def greatest(self) -> float:
        """Largest scale whose reciprocal is normal."""
        return min(self.source.huge / self.headroom, float_type(self.source.compute).max)

    @property
    def zero_scale(self) -> float:
        """Scale of a block of zeros: 0 where scales are kept in a format that has it, since 1 might be out of place."""
        kept = self.format.scale
        return 1.0 if kept is None or not kept.element.has_zero else 0.0

    @property
    def first_too_large_scale(self) -> float:
        """The least scale that is not rounded to a number of its format any more, where those have no scale."""
        kept, rounding = self.format.scale, self.format.scale_rounding
        assert isinstance(kept, Format)
        part = {"up": 0.0, "toward_zero": 1.0}.get(rounding, 0.5) if isinstance(rounding, str) else rounding
        largest = kept.element.max
        step = math.ldexp(1.0, math.frexp(largest)[1] - 1 - getattr(kept.element, "mantissa", 0))
        return largest + part * step

    @property
    def of_scales(self) -> Spec:
        """What the codes of the scales mean: one block in all, or groups along the last axis."""
        kept, ndim = self.format.scale, len(self.block)
        assert kept is not None
        block = block_of(kept.granularity, ndim) if ndim else ()
        return Spec(kept, float_type(self.source.compute), block, floor=self.least)


@dataclass(frozen=True)
class Recipe:
    """How codes are chosen. It is forgotten once they are."""

    symmetric: bool = True
    """Numbers as far below zero as above it, the zero point fixed."""
    offset: bool = False
    """A real offset for each block, so that its numbers cover [min x, max x], with or without zero."""
    rounding: Rounding = "half_even"
    """How values are rounded to numbers."""
    ignore_nonfinite: bool = False
    """Take statistics over finite values only, instead of marking a block that has others with a NaN scale."""
    dialect: Dialect = AQT_LITE
    """Whose rules."""

    @property
    def plain(self) -> bool:
        """Whether the rules are the plain ones, which compiled loops know."""
        return self.rounding == "half_even" and not self.offset and self.dialect is AQT_LITE

    @property
    def keeps_tiny(self) -> bool:
        """Whether what is subnormal may be rounded to another number than 0: then it is flushed, on every backend."""
        return self.rounding == "stochastic" or self.dialect is not AQT_LITE

    @property
    def of_magnitudes(self) -> bool:
        """Whether scales are chosen from magnitudes alone."""
        return self.symmetric and self.dialect.reach not in ("each side", "lowest") and not self.dialect.one_sided

    @property
    def may_lack_zero(self) -> bool:
        """Whether a range is that of the values alone, which may all lie on one side of zero."""
        return self.offset or not (self.symmetric or self.dialect.zero_in_range)

    def centred(self, spec: Spec) -> bool:
        """Whether numbers reach as far below zero (or the offset) as above it."""
        return self.symmetric or (self.offset and spec.element.signed)

    def narrow(self, spec: Spec) -> bool:
        """Whether codes leave out what has no opposite."""
        return self.centred(spec) and self.dialect.narrow(spec.element)
