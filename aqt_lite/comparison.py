"""Why two quantized arrays differ: which numbers, and which convention explains it.

Owns: ``compare``, ``Comparison``, and the search through hypotheses. Imports: sides, hypotheses, and what says how far
long work is (trees).

The search looks at a sample of a large array first, and at all of it before it says that something explains everything.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import lt
from typing import Any, NamedTuple

import numpy as np

from aqt_lite._keywords import naming_the_argument
from aqt_lite._namespace import Numbers
from aqt_lite._sides import (
    Differences,
    Side,
    differences,
    differences_at_ties,
    read_floats,
    read_side,
    some_blocks,
    values_that_differ,
)
from aqt_lite.elements import float_type
from aqt_lite.granularity import grid_of
from aqt_lite.hypotheses import HYPOTHESES, Hypothesis, Rule, given_rules, named_rules, nearby_rules
from aqt_lite.qarray import QArray
from aqt_lite.trees import Progress, with_progress

__all__ = ["Comparison", "Explanation", "compare"]

_SAMPLED = 1 << 17
"""Elements of a larger array that rules are tried on first."""
_FEW = 3
"""Hypotheses that are named where none explains everything."""

_FEW_CODES = 64
"""Of fewer several explanations may be true."""

_GOOD_PART = 0.9
"""What may be left of the differences for a hypothesis to be worth a word."""

Codes = tuple[Any, ...]
"""(codes, scale) or (codes, scale, zero_point)."""

_Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Explanation:
    """A convention, or two, and what differs under it."""

    name: str
    """A few words."""
    says: str
    """A sentence without its full stop."""
    leaves: str
    """What it does not explain, in words."""
    codes_that_differ: int
    scales_that_differ: int
    zero_points_that_differ: int
    offsets_that_differ: int
    complete: bool
    """Whether it explains everything."""
    also: tuple[str, ...] = ()
    """Names of other rules that give the same numbers here."""


@dataclass(frozen=True)
class Comparison:
    """What :func:`compare` found; prints as a sentence and a table."""

    equal: bool
    """Whether formats, blocks, codes, scales, zero points and offsets are the same. Layouts in memory do not count."""
    explanation: Explanation | None
    """The convention under which nothing differs; None where they are equal, or nothing that was tried explains it."""
    nearest: tuple[Explanation, ...]
    """Where nothing explains all of it: what explains most, best first."""
    a: str
    """Format, shape and granularity."""
    b: str
    codes: int
    """How many codes were compared."""
    codes_that_differ: int | None
    """None, here and below, where shapes differ."""
    largest_code_difference: int | None
    scales: int
    """How many scales; where blocks have other sizes, on the coarsest grid that both fit."""
    scales_that_differ: int | None
    largest_scale_difference: float | None
    """Largest ratio of two scales, less 1."""
    zero_points_that_differ: int | None
    largest_zero_point_difference: int | None
    offsets_that_differ: int | None
    largest_offset_difference: float | None
    values_that_differ: int | None
    """How many values differ as real numbers, ``(number - zero_point) * scale + offset`` without rounding."""
    largest_value_difference: float | None
    advice: str = ""
    """What would tell more; empty where nothing would."""
    at_ties: int | None = None
    """How many of the codes that differ belong to values next to a tie, halfway between two codes; None without x."""

    def __str__(self) -> str:
        return f"{' '.join(filter(None, (self._sentence(), self.advice)))}\n\n{self._table()}"

    def _sentence(self) -> str:
        if self.equal:
            return "Equal: the same codes, scales, zero points and offsets."
        if self.explanation is not None:
            return f"They differ, and this explains all of it: {self.explanation.says}."
        if self.codes_that_differ is None:
            start = "Their shapes differ, and nothing that was tried makes one of the other"
        else:
            start = "They differ, and nothing that was tried explains all of it"
        if not self.nearest:
            return f"{start}."
        best = self.nearest[0]
        return f"{start}. Nearest: {best.says}; what is left: {best.leaves}."

    def _table(self) -> str:
        rows = [("a", self.a), ("b", self.b)]
        if self.codes_that_differ is not None:
            ties = f", {self.at_ties} of them at ties" if self.at_ties is not None and self.codes_that_differ else ""
            rows += [
                ("codes", _of(self.codes_that_differ, self.codes, f"up to {self.largest_code_difference}") + ties),
                (
                    "scales",
                    _of(self.scales_that_differ, self.scales, f"up to {self.largest_scale_difference:.3g} of it"),
                ),
            ]
            for what, count, most in (
                ("zero points", self.zero_points_that_differ, self.largest_zero_point_difference),
                ("offsets", self.offsets_that_differ, self.largest_offset_difference),
            ):
                if count:
                    rows.append((what, _of(count, self.scales, f"up to {most:.6g}")))
            rows.append(
                ("values", _of(self.values_that_differ, self.codes, f"up to {self.largest_value_difference:.6g}"))
            )
        if self.explanation is not None:
            rows.append(("explanation", self.explanation.name))
            if self.explanation.also:
                rows.append(("or as well", ", ".join(self.explanation.also)))
        rows += [(f"nearest {i}", f"{e.name}; left: {e.leaves}") for i, e in enumerate(self.nearest, 1)]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _of(count: int | None, of: int, much: str) -> str:
    return f"{count} of {of} differ, by {much}" if count else f"all {of} the same"


@naming_the_argument
def compare(
    a: QArray | Codes,
    b: QArray | Codes | Numbers,
    *,
    x: Numbers | None = None,
    progress: Progress = None,
) -> Comparison:
    """Say how two quantized arrays differ, and which convention explains it; or whose conventions made one from floats.

    Tried are the records of :mod:`aqt_lite.hypotheses`, alone and in pairs: axes and blocks, signed and unsigned codes,
    zero points, scales times a factor, inverse or of 16 bits, orders of codes in bytes and words. Where the floats are
    known, also how codes and scales may have been chosen from them: every dialect of :mod:`aqt_lite.dialects`, these
    with a field or the rounding changed, modes of power-of-two scales, scales of 16 bits.

    Parameters
    ----------
    a : QArray, or tuple (codes, scale) or (codes, scale, zero_point)
        Arrays of a tuple may be of any library, codes one an item. The shape of ``scale`` says which elements share
        one: as many dimensions as the codes, one of its own for every block; or one number; or a 1-dimensional array
        with one for each index of an axis. Codes are taken to be of the format of the other side if they can be. Where
        neither says it, they are integers of 2 to 4 bits if none of at least 64 codes needs more, else of their type:
        codes of floats and codebooks are said with ``QArray.from_codes(dtype=)``.
    b : the same, or an array of floats
        On any library. An array of floats is what ``a`` should stand for: it is then compared with what
        :func:`aqt_lite.quantize` makes of it in the format and blocks of ``a``.
    x : array, optional
        The floats that ``a`` and ``b`` were made from.
    progress : bool or function, optional
        As for :func:`aqt_lite.quantize_tree`.

    Returns
    -------
    Comparison
        Prints as a sentence and a table.

    Raises
    ------
    TypeError
        Neither a QArray nor such a tuple; arrays that a compiler is tracing.
    ValueError
        Scales that fit no grid of blocks; codes that the format does not have.

    Notes
    -----
    What explains everything leaves no code, scale, zero point or offset that differs, of all there are. It is the first
    such record: arrays of few elements may be explained by several. A factor of all scales, or a shift of all zero
    points, that no known convention has explains nothing unless there are four different ones that it is true of.

    Large arrays are looked at part by part; where ``x`` is given, memory is needed for its codes once more.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> x = np.random.default_rng(0).standard_normal((8, 64)).astype("float32")
    >>> q = aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0))
    >>> print(aqt_lite.compare((np.asarray(q.qvalue).view("uint8") ^ 128, q.scale, np.full((8, 1), 128)), q))
    They differ, and this explains all of it: codes and zero points of b lie 2^(bits-1) apart from those of a: the same
    numbers in codes of the other sign.
    <BLANKLINE>
    a            uint8, shape (8, 64), PerChannel(axis=0)
    b            int8, shape (8, 64), PerChannel(axis=0)
    codes        512 of 512 differ, by up to 128
    scales       all 8 the same
    zero points  8 of 8 differ, by up to 128
    values       all 512 the same
    explanation  signed and unsigned codes
    >>> theirs = aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0), dialect="torch")
    >>> aqt_lite.compare(theirs, x).explanation.name
    'torch'
    """
    first, second, values = _read(a, b, x)
    if second is None:
        assert values is not None
        return _compared_with_floats(first, values, progress)
    found = _Found(differences(first, second))
    if found.base is None or not found.base.none:
        _search(_State(first, second), found, progress)
        if found.complete is None and values is not None:
            _explain_by_origins(first, second, values, found, progress)
        if found.complete is None and found.base is not None and not values_that_differ(first, second)[0]:
            says = "codes, scales or zero points differ, and stand for the same numbers"
            found.complete = _explanation("same values", says, found.base, complete=True)
    return _comparison(first, second, values, found)


def _read(a: Any, b: Any, x: Any) -> tuple[Side, Side | None, _Numbers | None]:
    """The two sides, or one and None, and the floats."""
    if not isinstance(b, QArray | tuple):
        if x is not None:
            raise TypeError("b is an array of floats, and x is given too: give the floats once")
        return read_side(a, "a"), None, read_floats(b, "b")
    if isinstance(a, tuple):  # codes and scales alone: the format may have to be read off the other side
        second = read_side(b, "b", read_side(a, "a") if isinstance(b, tuple) else None)
        first = read_side(a, "a", second)
    else:
        first = read_side(a, "a")
        second = read_side(b, "b", first)
    if x is None:
        return first, second, None
    values = read_floats(x, "x")
    if sorted(values.shape) not in (sorted(first.shape), sorted(second.shape)):
        shapes = " and ".join(dict.fromkeys(map(str, (first.shape, second.shape))))
        raise ValueError(f"x has shape {values.shape}, a and b {shapes}: give the array that was quantized")
    return first, second, values


class _Candidate(NamedTuple):
    """Hypotheses that may explain all or a part."""

    name: str
    says: str
    left: Differences
    """What is left, by what was looked at."""
    of_all: Callable[[], Differences | None]
    """What is left of all numbers."""
    missing: str = ""
    """What it leaves open in any case."""

    @property
    def weight(self) -> float:
        """How much is left; what a candidate leaves open in any case counts less where it explains all codes."""
        return self.left.weight + (0.5 if not self.left.codes else 1.0) * bool(self.missing)

    def explanation(self) -> Explanation | None:
        """After looking at all numbers."""
        left = self.of_all()
        if left is None:
            return None
        return _explanation(self.name, self.says, left, self.missing, complete=left.none and not self.missing)


def _explanation(name: str, says: str, left: Differences, leaves: str = "", *, complete: bool) -> Explanation:
    counts = zip(left[:4], ("codes", "scales", "zero points", "offsets"), strict=True)
    words = [f"{count} {what}" for count, what in counts if count and not complete]
    words += [what for differs, what in ((left.formats, "the format"), (left.blocks, "the size of blocks")) if differs]
    leaves = ", ".join([*words, leaves] if leaves else words)
    return Explanation(name, says, leaves or "nothing", *left[:4], complete=complete)


class _Found:
    """What a search has found so far."""

    def __init__(self, base: Differences | None) -> None:
        self.base = base
        self.complete: Explanation | None = None
        self.of_one_side: list[Explanation] = []
        self.candidates: list[_Candidate] = []

    def add(self, candidate: _Candidate) -> bool:
        """Whether the candidate explains everything."""
        if candidate.left.none and not candidate.missing:
            explanation = candidate.explanation()
            if explanation is not None and explanation.complete:
                first = self.complete or explanation
                also = () if first is explanation else (*first.also, explanation.name)
                self.complete = replace(first, also=also)
                return True
        self.candidates.append(candidate)
        return False

    def nearest(self) -> tuple[Explanation, ...]:
        """The best few that explain a good part."""
        if self.complete is not None:
            return ()
        most = float("inf") if self.base is None else _GOOD_PART * self.base.weight
        best = sorted((c for c in self.candidates if c.weight < most), key=lambda c: c.weight)
        counted = [e for c in best[:_FEW] if (e := c.explanation()) is not None]
        return (*self.of_one_side, *counted)[:_FEW]


# ---- what may have been done to codes and scales


_Step = tuple[Hypothesis, bool]
"""A hypothesis, and whether it is about b."""
_STEPS = tuple((h, about_b) for h in HYPOTHESES for about_b in ((True, False) if h.both_ways else (True,)))


class _State(NamedTuple):
    """Two sides after hypotheses were applied, and what these say."""

    a: Side
    b: Side
    called: tuple[str, str] = ("a", "b")
    """What words call them."""
    steps: tuple[_Step, ...] = ()
    says: tuple[str, ...] = ()

    def after(self, step: _Step) -> _State | None:
        """The state after one more; None where it does not apply."""
        h, about_b = step
        one, other = (self.b, self.a) if about_b else (self.a, self.b)
        made = None if any(h is before for before, _ in self.steps) else h.apply(one, other)
        if made is None:
            return None
        words = h.in_words(*(self.called[::-1] if about_b else self.called), one, other)
        a, b = (self.a, made) if about_b else (made, self.b)
        return _State(a, b, self.called, (*self.steps, step), (*self.says, words))

    def candidate(self, left: Differences, start: _State) -> _Candidate:
        """The state as an explanation, which holds none of its arrays but those of the start."""
        steps = self.steps[len(start.steps) :]
        return _Candidate(_name(self.steps), "; and ".join(self.says), left, partial(_left_after, start, steps))


def _name(steps: tuple[_Step, ...]) -> str:
    return " and ".join(h.name for h, _ in steps)


def _left_after(start: _State, steps: tuple[_Step, ...]) -> Differences | None:
    state: _State | None = start
    for step in steps:
        state = None if state is None else state.after(step)
    return None if state is None else differences(state.a, state.b)


def _search(start: _State, found: _Found, progress: Progress) -> None:
    """Try every hypothesis, then pairs that begin with one that helps."""
    base, helpful = differences(start.a, start.b, sample=True), []
    for step in with_progress(_STEPS, progress, lambda step: step[0].name):
        state = start.after(step)
        left = None if state is None else differences(state.a, state.b, sample=True)
        if state is None or left is None:
            if state is not None and step[0].opens:
                helpful.append(step)  # another one may bring it to the other's shape
            continue
        if found.add(state.candidate(left, start)):
            return
        if base is None or step[0].opens or _helps(left, base):
            helpful.append(step)
    for first in with_progress(helpful, progress, lambda step: step[0].name):
        once = start.after(first)
        for step in _STEPS if once is not None else ():
            state = once.after(step)  # type: ignore[union-attr]
            left = None if state is None else differences(state.a, state.b, sample=True)
            if state is not None and left is not None and found.add(state.candidate(left, start)):
                return


def _helps(left: Differences, base: Differences) -> bool:
    """Whether a good part of the codes, or any of the rest, is explained."""
    after, before = left.shares, base.shares
    return (after[0] < before[0] and after[0] <= _GOOD_PART * before[0]) or any(map(lt, after[1:], before[1:]))


# ---- how codes and scales may have been chosen


def _compared_with_floats(side: Side, x: _Numbers, progress: Progress) -> Comparison:
    """A side against what this library makes of floats."""
    reference = _made(next(named_rules()), side, x) if side.shape == x.shape else None
    found = _Found(None if reference is None else differences(side, reference))
    if found.base is None or not found.base.none:
        _search_origin(side, x, ("a", "b"), found, progress)
    floats = f"floats, {x.dtype.name}, shape {x.shape}"
    if reference is None:
        return _comparison(side, None, x, found, floats)
    return _comparison(side, reference, x, found, f"{floats}, as this library quantizes them")


def _explain_by_origins(a: Side, b: Side, x: _Numbers, found: _Found, progress: Progress) -> None:
    """How each side may have been made of floats; both together explain why they differ."""
    both = [_Found(None), _Found(None)]
    for own, side, name in zip(both, (a, b), "ab", strict=True):
        _search_origin(side, x, (name, "x"), own, progress)
    first, second = (own.complete for own in both)
    if first is not None and second is not None:
        name = first.name if first.name == second.name else f"a: {first.name}, b: {second.name}"
        says = f"{first.says}; {second.says}" + (", each in blocks of its own" if a.sizes != b.sizes else "")
        also = (*(f"a: {other}" for other in first.also), *(f"b: {other}" for other in second.also))
        found.complete = replace(first, name=name, says=says, also=also)
        return
    for own, left in zip(both, "ba", strict=True):
        if own.complete is not None:
            found.of_one_side.append(replace(own.complete, leaves=f"how {left} was made", complete=False))
        else:
            found.of_one_side += own.nearest()[:1]


def _search_origin(side: Side, x: _Numbers, called: tuple[str, str], found: _Found, progress: Progress) -> None:
    """Rules that may have made a side of floats; then the same with codes reordered or moved."""
    weights, readings = [], list(_readings(side, x.shape, called))
    for state in readings:
        weights.append(_try_rules(named_rules(), state, x, found, progress, every=True))
        if found.complete is not None:
            return
    if readings:
        state = readings[weights.index(min(weights))]
        _try_rules(nearby_rules(), state, x, found, progress)
        if found.complete is None:
            _try_orders(state, x, found, progress)
        if found.complete is None:
            _try_rules(given_rules(), state, x, found, progress)


def _readings(side: Side, shape: tuple[int, ...], called: tuple[str, str]) -> Iterator[_State]:
    """The side, and what it is with its axes or its blocks in another order, where it has the shape of the floats."""
    start = _State(side, side, called)
    if side.shape == shape:
        yield start
    for h in HYPOTHESES:
        for template in _with_other_axes(side) if h.opens else ():
            made = h.apply(side, template)
            if made is not None and made.shape == shape:
                words = h.in_words(*called, side, template)
                yield start._replace(a=made, steps=((h, False),), says=(words,))


def _with_other_axes(side: Side) -> Iterator[Side]:
    """The side, and with its blocks along other axes, for which its scales may have been meant."""
    order = list(range(len(side.shape)))
    yield side
    for axis in order[:-1]:
        swapped = [order[-1] if i == axis else axis if i == order[-1] else i for i in order]
        turned = side.with_axes(swapped, codes=False)
        if grid_of(side.shape, turned.block) == turned.grid:
            yield turned


def _made(rule: Rule, side: Side, x: _Numbers) -> Side | None:
    """What a rule makes of floats in the format and blocks of a side; None where it has no such thing."""
    if side.source is not None and float_type(side.source).compute != float_type(x.dtype.name).compute:
        x = x.astype(side.source)
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the floats, which whoever quantized them was told
            return read_side(rule.made(x, side), rule.name)
    except ValueError:  # a dialect without that format, scales that it cannot have, ...
        return None


def _try_rules(
    rules: Iterable[Rule], state: _State, x: _Numbers, found: _Found, progress: Progress, *, every: bool = False
) -> float:
    """Try rules until one made the side, or ``every`` one for all their names; how much the nearest leaves."""
    side, least = state.a, float("inf")
    part, some = some_blocks(side, x)
    for rule in with_progress(list(rules), progress, lambda r: r.name):
        seen, floats = (side, x) if rule.of_all else (part, some)
        made = _made(rule, seen, floats)
        left = None if made is None else differences(seen, made)
        if left is None:
            continue
        name = " and ".join(filter(None, (_name(state.steps), rule.name)))
        says = "; and ".join((*state.says, rule.says.format(one=state.called[0], x=state.called[1])))
        candidate = _Candidate(name, says, left, partial(_left_of_all, rule, side, x), rule.missing)
        least = min(least, candidate.weight)
        if (found.add(candidate) or left.none) and not every:
            break
    return least


def _left_of_all(rule: Rule, side: Side, x: _Numbers) -> Differences | None:
    made = _made(rule, side, x)
    return None if made is None else differences(side, made)


def _try_orders(state: _State, x: _Numbers, found: _Found, progress: Progress) -> None:
    """Try whether what a named rule makes of the floats was reordered, or moved, to give the side."""
    part, some = some_blocks(state.a, x)
    likely: list[tuple[float, int, Rule]] = []
    for i, rule in enumerate(named_rules()):
        seen, floats = (state.a, x) if rule.of_all else (part, some)
        made = _made(rule, seen, floats)
        left = None if made is None else differences(seen, made)
        if left is not None:
            likely.append((left.shares[1], i, rule))
    for _, _, rule in sorted(likely, key=lambda entry: entry[:2])[:_FEW]:
        made = _made(rule, state.a, x)
        if made is None:
            continue
        start = state._replace(b=made, called=(state.called[0], f"what {rule.name} makes of {state.called[1]}"))
        for step in with_progress(_STEPS, progress, lambda step: step[0].name):
            further = start.after(step)
            left = None if further is None else differences(further.a, further.b, sample=True)
            if further is None or left is None:
                continue
            candidate = further.candidate(left, start)
            if found.add(candidate._replace(name=f"{rule.name} and {candidate.name}")):
                return


# ---- the result


def _comparison(a: Side, b: Side | None, x: _Numbers | None, found: _Found, called: str | None = None) -> Comparison:
    d = found.base
    told_by_floats = x is None and (found.complete is None or 0 < a.size < _FEW_CODES)
    values: tuple[int | None, float | None] = (None, None)
    ties = None
    if d is not None and b is not None:
        values = (0, 0.0) if d.none else values_that_differ(a, b)
        ties = differences_at_ties(a, b, x) if x is not None and x.shape == a.shape else None
    return Comparison(
        equal=d is not None and d.none,
        explanation=found.complete,
        nearest=() if d is not None and d.none else found.nearest(),
        a=a.in_words(),
        b=called or (b.in_words() if b is not None else ""),
        codes=a.size if d is None else d.all_codes,
        codes_that_differ=None if d is None else d.codes,
        largest_code_difference=None if d is None else d.largest_code,
        scales=a.scale.size if d is None else d.all_scales,
        scales_that_differ=None if d is None else d.scales,
        largest_scale_difference=None if d is None else d.largest_scale,
        zero_points_that_differ=None if d is None else d.zero_points,
        largest_zero_point_difference=None if d is None else d.largest_zero_point,
        offsets_that_differ=None if d is None else d.offsets,
        largest_offset_difference=None if d is None else d.largest_offset,
        values_that_differ=values[0],
        largest_value_difference=values[1],
        advice="Give the floats, x=, to tell more." if told_by_floats and not (d is not None and d.none) else "",
        at_ties=ties,
    )
