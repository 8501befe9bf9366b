"""Writes the table of dialects into docs/dialects.md, from the records in ``aqt_lite.dialects``.

    python benchmarks/dialects_table.py            print it
    python benchmarks/dialects_table.py --write    replace what stands between the page's markers

A test holds the page against them.
"""

from __future__ import annotations

import argparse
import math
import re
from itertools import groupby
from pathlib import Path

import aqt_lite.api  # noqa: F401 - knows every dialect
from aqt_lite.dialects import DIALECTS, Dialect
from aqt_lite.formats import FORMATS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "dialects.md"
HEAD = (
    "dialect", "symmetric", "affine", "largest becomes", "lowest code left out", "scale", "code", "zero point added",
    "small blocks", "held against",
)  # fmt: skip


def row(d: Dialect) -> list[str]:
    """A dialect's line; of floats, where their rules are others, a second one."""
    if d.together is not None:
        offsets = f"{names(d.offsets)}, with offsets" if d.offsets else names(d.affine)
        return [f"`{d.name}`", names(d.symmetric), offsets, *["its own rule"] * 6, d.source]
    scale = "divided" if d.divides_range else "times the reciprocal"
    code = "x / scale" if d.divides else "x · (1/scale)"
    if d.of_range is not None:
        scale = "a rule of its own"
    if d.inverse:
        scale, code = f"its inverse is {scale}", "x · inverse"
    code += _ROUNDINGS.get(d.rounding, "")
    added = "before rounding" if d.zero_first else "after rounding"
    if d.fused:
        added += ", fused"
    return [
        f"`{d.name}`", names(d.symmetric), affine(d), largest(d), left_out(d), scale, code, added, small(d),
        d.source,
    ]  # fmt: skip


_ROUNDINGS = {"half_away": ", halves away from zero"}


def affine(d: Dialect) -> str:
    """Formats with zero points, or with offsets."""
    return f"{names(d.offsets)}, with offsets" if d.offsets else names(d.affine)


def names(formats: tuple[str, ...] | None) -> str:
    """Formats, those of successive bits as a range."""
    if formats is None:
        return "all"
    found = []
    for stem, group in groupby(sorted(formats, key=_stem), key=_stem):
        several = list(group)
        bits = [FORMATS[f].element.bits for f in several]
        successive = len(several) > 2 and stem.endswith("int") and bits == list(range(bits[0], bits[-1] + 1))
        found.append(f"{stem}{bits[0]}–{bits[-1]}" if successive else ", ".join(several))
    return ", ".join(found) or "—"


def _stem(name: str) -> str:
    return re.sub(r"(int)\d+$", r"\1", name)


def largest(d: Dialect) -> str:
    said = {
        "top": "127",
        "half range": "127.5",
        "each side": "−128 or 127, whichever asks for more",
        "lowest": "−128, by a scale of either sign",
    }[d.reach]
    return "; ".join([said, *(f"{name}: {number:g}" for name, number in d.reaches)])


def left_out(d: Dialect) -> str:
    if d.narrow_from is None:
        return "no"
    return "yes" if d.narrow_from <= 2 else f"from {d.narrow_from} bits on"


def small(d: Dialect) -> str:
    """What becomes of blocks that are zero or nearly so."""
    if d.range_of_zeros is not None:
        return f"zeros have range {d.range_of_zeros[0]:g} to {d.range_of_zeros[1]:g}"
    if d.added:
        return f"{d.added:g} is added to the statistic"
    if d.least_range:
        instead = "" if d.range_instead is None else f" as {d.range_instead:g}"
        return f"a range below {_power(d.least_range)} counts{instead or ' as that'}"
    if not d.least_scale:
        return "scale 1"
    return f"a scale below {_power(d.least_scale)} becomes {_power(d.least_scale if d.instead is None else d.instead)}"


def _power(value: float) -> str:
    exponent = math.log2(value)
    return f"2^{exponent:.0f}" if exponent == int(exponent) and value != 1 else f"{value:g}"


def table() -> str:
    """In Markdown."""
    lines = [HEAD, ["---"] * len(HEAD), *(row(d) for d in DIALECTS.values() if d.whole is None)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def filled(text: str) -> str:
    """The page with the table between its markers."""
    found, count = re.subn(
        r"(<!-- dialects -->\n).*?(<!-- end dialects -->)",
        lambda m: f"{m[1]}{table()}\n{m[2]}",
        text,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"{PAGE} has {count} places for the table of dialects: it needs one pair of markers")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text()))
    else:
        print(table())
