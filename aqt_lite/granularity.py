"""From a granularity to a block shape to a grid of blocks: pure integers, no arrays.

Owns: ``PerTensor``, ``PerChannel``, ``PerGroup``, ``PerBlock`` and the block arithmetic. Imports: words.

Every granularity is a *block shape*: along each axis, how many neighbours share one scale, or None for the whole
axis. The *grid* has ``ceil(length / block)`` entries along each axis (one, where the block is the whole axis), and
``scale`` and ``zero_point`` are arrays of the grid's shape.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from aqt_lite._keywords import naming_the_fields
from aqt_lite._near import nearest, shown

__all__ = ["Block", "Granularity", "PerBlock", "PerChannel", "PerGroup", "PerTensor"]

Block = tuple["int | None", ...]


def _integer(value: Any, name: str, owner: str, least: int | None = None) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{owner}({name}={value!r}): {name} must be an integer, not a bool")
    try:
        number = operator.index(value)
    except TypeError:
        several = isinstance(value, Sequence) and not isinstance(value, str) and name == "axis"
        hint = ": for several axes PerBlock, 1 for each of them and -1 for the others" if several else ""
        raise TypeError(f"{owner}({name}={value!r}): {name} must be an integer{hint}") from None
    if least is not None and number < least:
        raise ValueError(f"{owner}({name}={number}): {name} must be at least {least}")
    return number


@naming_the_fields
@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole array: shape ``(1, ..., 1)``.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> aqt_lite.quantize(np.ones((4, 6), "float32"), granularity=aqt_lite.PerTensor()).scale.shape
    (1, 1)
    """


@naming_the_fields
@dataclass(frozen=True)
class PerChannel:
    """One scale for each index along ``axis`` (which may be negative): ``(N, 1)`` for axis 0 of an (N, K) array.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> aqt_lite.quantize(np.ones((4, 6), "float32"), granularity=aqt_lite.PerChannel(0)).scale.shape
    (4, 1)
    """

    axis: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", _integer(self.axis, "axis", "PerChannel"))


@naming_the_fields
@dataclass(frozen=True)
class PerGroup:
    """One scale for every ``size`` neighbours along ``axis`` and each index of the other axes.

    ``(N, ceil(K / size))`` for an (N, K) array; a last group that is shorter has its own statistics.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> aqt_lite.quantize(np.ones((4, 100), "float32"), granularity=aqt_lite.PerGroup(32)).scale.shape
    (4, 4)
    """

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        if self.size == -1:
            raise ValueError(
                "PerGroup(size=-1): size must be at least 1; where all of an axis shares a scale, use PerChannel(axis) "
                "of the other axis, or PerBlock with -1"
            )
        object.__setattr__(self, "size", _integer(self.size, "size", "PerGroup", least=1))
        object.__setattr__(self, "axis", _integer(self.axis, "axis", "PerGroup"))


@naming_the_fields
@dataclass(frozen=True)
class PerBlock:
    """One scale for every block of the given shape: one length for each axis, -1 or None for the whole axis.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> aqt_lite.quantize(np.ones((4, 100), "float32"), granularity=aqt_lite.PerBlock((2, 64))).scale.shape
    (2, 2)
    """

    shape: tuple[int | None, ...] = field()

    def __post_init__(self) -> None:
        if isinstance(self.shape, str) or not isinstance(self.shape, Sequence):
            raise TypeError(f"PerBlock(shape={self.shape!r}): shape must be a tuple with one length for each axis")
        lengths = tuple(-1 if n is None else _integer(n, "shape", "PerBlock", least=-1) for n in self.shape)
        if 0 in lengths:
            raise ValueError(f"PerBlock(shape={lengths}): every length must be at least 1, or -1 for the whole axis")
        object.__setattr__(self, "shape", lengths)


Granularity = PerTensor | PerChannel | PerGroup | PerBlock


def _axis(granularity: PerChannel | PerGroup, ndim: int) -> int:
    if not -ndim <= granularity.axis < ndim:
        valid = f"use {-ndim} to {ndim - 1}" if ndim else "a 0-dimensional array has no axis; use PerTensor()"
        raise ValueError(f"{granularity}: axis {granularity.axis} is out of range for {ndim} dimensions: {valid}")
    return granularity.axis % ndim


def block_of(granularity: Granularity, ndim: int) -> Block:
    """The block shape that a granularity means for an array of ``ndim`` dimensions."""
    if isinstance(granularity, PerTensor):
        return (None,) * ndim
    if isinstance(granularity, PerChannel):
        axis = _axis(granularity, ndim)
        return tuple(1 if d == axis else None for d in range(ndim))
    if isinstance(granularity, PerGroup):
        axis = _axis(granularity, ndim)
        return tuple(granularity.size if d == axis else 1 for d in range(ndim))
    if isinstance(granularity, PerBlock):
        if len(granularity.shape) != ndim:
            raise ValueError(
                f"{granularity}: has {len(granularity.shape)} lengths for an array of {ndim} dimensions: give one each"
            )
        return tuple(None if n == -1 else n for n in granularity.shape)
    raise TypeError(
        f"granularity={shown(granularity)}: use PerTensor(), PerChannel(axis), PerGroup(size, axis) or PerBlock(shape)"
        f"{_meant(granularity)}"
    )


def _meant(given: Any) -> str:
    """Which granularity something else may have been meant as."""
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return f", here PerGroup({given})"
    name = given.__name__ if isinstance(given, type) else given if isinstance(given, str) else ""
    bare = re.sub("[^a-z]|wise", "", name.lower()).removeprefix("per")
    examples = {"tensor": PerTensor(), "channel": PerChannel(0), "group": PerGroup(32), "block": PerBlock((1, 32))}
    near = nearest(bare, examples, {"axis": "channel", "row": "channel", "token": "channel", "column": "channel"})
    return f", here {examples[near]}" if bare and near else ""


def granularity_of(block: Block) -> Granularity:
    """The plainest granularity that means this block shape (axes counted from 0; the last axis of a group is -1)."""
    ndim = len(block)
    bounded = [d for d, n in enumerate(block) if n is not None]
    if not bounded:
        return PerTensor()
    if len(bounded) == 1 and block[bounded[0]] == 1:
        return PerChannel(bounded[0])
    wide = [d for d, n in enumerate(block) if n != 1]
    if len(bounded) == ndim and len(wide) <= 1:
        axis = wide[0] if wide else ndim - 1
        size = block[axis]
        assert size is not None
        return PerGroup(size, -1 if axis == ndim - 1 else axis)
    return PerBlock(tuple(-1 if n is None else n for n in block))


def grid_of(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """How many blocks lie along each axis: the shape of ``scale``."""
    return tuple(map(_blocks_along, shape, block))


def _blocks_along(length: int, block: int | None) -> int:
    return 1 if block is None else -(-length // block)


def group_axes(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """Axes along which a block is neither one element nor the whole axis, so that broadcasting alone cannot serve."""
    return tuple(d for d, (n, b) in enumerate(zip(shape, block, strict=True)) if b is not None and 1 < b < n)
