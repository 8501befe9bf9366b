"""Block arithmetic against counting by hand: every element of every small shape."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, quantize
from aqt_lite.granularity import block_of, granularity_of, grid_of, group_axes

shapes = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@st.composite
def shape_and_granularity(draw):
    shape = draw(shapes)
    choices = [
        st.just(PerTensor()),
        st.builds(PerBlock, st.tuples(*[st.sampled_from([-1, 1, 2, 3, 9]) for _ in shape])),
    ]
    if shape:
        axes = st.integers(-len(shape), len(shape) - 1)
        choices += [st.builds(PerChannel, axes), st.builds(PerGroup, st.integers(1, 9), axes)]
    return shape, draw(st.one_of(choices))


def key(granularity, shape, index):
    """Which block an element belongs to, from the definition of each granularity."""
    n = len(shape)
    if isinstance(granularity, PerTensor):
        return (0,) * n
    if isinstance(granularity, PerChannel):
        return tuple(i if d == granularity.axis % n else 0 for d, i in enumerate(index))
    if isinstance(granularity, PerGroup):
        return tuple(i // granularity.size if d == granularity.axis % n else i for d, i in enumerate(index))
    return tuple(0 if b == -1 else i // b for i, b in zip(index, granularity.shape, strict=True))


@given(shape_and_granularity())
def test_the_grid_has_one_entry_for_each_block(case):
    shape, granularity = case
    block = block_of(granularity, len(shape))
    grid = grid_of(shape, block)
    keys = {key(granularity, shape, index) for index in itertools.product(*map(range, shape))}
    if 0 not in shape:
        assert keys == set(itertools.product(*map(range, grid)))
    assert len(grid) == len(shape)


@given(shape_and_granularity())
def test_elements_share_a_scale_exactly_when_they_share_a_block(case):
    """Every element its own magnitude: the scale of a block is that of its largest."""
    shape, granularity = case
    if 0 in shape:
        return
    x = (1.0 + np.arange(math.prod(shape), dtype=np.float32)).reshape(shape)
    q = quantize(x, granularity=granularity)
    largest: dict[tuple[int, ...], float] = {}
    for index in itertools.product(*map(range, shape)):
        k = key(granularity, shape, index)
        largest[k] = max(largest.get(k, 0.0), float(x[index]))
    for k, amax in largest.items():
        assert q.scale[k] == np.float32(amax) * np.float32(1 / 127)


@given(shape_and_granularity())
def test_the_plainest_granularity_means_the_same_block(case):
    shape, granularity = case
    block = block_of(granularity, len(shape))
    assert block_of(granularity_of(block), len(shape)) == block


def test_group_axes_are_those_that_broadcasting_cannot_serve():
    assert group_axes((4, 10, 6, 1), (1, 4, None, 1)) == (1,)
    assert group_axes((4, 10), (4, 10)) == ()  # one block is the whole axis
    assert group_axes((4, 10), (3, 11)) == (0,)


def test_whole_axes_are_minus_one_or_none():
    assert PerBlock((1, None, 3)) == PerBlock((1, -1, 3))
    assert block_of(PerBlock((None, 2)), 2) == (None, 2)
    with pytest.raises(TypeError, match=r"PerChannel\(axis=\(0, 1\)\): .*for several axes PerBlock"):
        PerChannel((0, 1))


def test_integers_of_numpy_are_integers():
    assert PerGroup(np.int64(4), np.int8(-1)) == PerGroup(4)
    assert PerBlock([2, np.int16(3)]) == PerBlock((2, 3))
    assert hash(PerBlock([2, 3])) == hash(PerBlock((2, 3)))
    assert PerChannel(np.uint8(1)).axis == 1
    with pytest.raises(TypeError, match="axis must be an integer"):
        PerChannel(np.float32(1))
    with pytest.raises(TypeError, match="not a bool"):
        PerChannel(True)
