"""Writes the tables of number formats into README.md and docs/formats.md, and draws docs/grids.png and docs/sqnr.png.

    python benchmarks/formats_table.py            print the tables
    python benchmarks/formats_table.py --write    replace what stands between the markers of each file, and draw

Every entry comes from the records in ``aqt_lite.formats`` or is measured here. A test holds the files against them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import aqt_lite
from aqt_lite import PerChannel, PerGroup
from aqt_lite._registry import get_backend
from aqt_lite.elements import Codebook, Float, Integer
from aqt_lite.formats import BITROUND, FAMILIES, FORMATS, SCALE_FORMATS, Format

ROOT = Path(__file__).resolve().parent.parent
FILES = (ROOT / "README.md", ROOT / "docs" / "formats.md")
BUILT_IN = tuple(FORMATS.values())
GROUP, SCALE = 32, "float16"
"""Granularity and format of scales where a format has none of its own."""
SHOWN = ("int8", "int4", "int2", "float8_e4m3fn", "float4_e2m1fn", "nf4", "mxfp8_e4m3", "mxfp4", "nvfp4")
"""Formats in the short table."""
WITHOUT_SCALES = tuple(BITROUND[name] for name in ("bitround3", "bitround7", "bitround10"))
"""Of the formats without scales, those in the long table. Pictures, which are of numbers times scales, have none."""


class Measured(NamedTuple):
    """What storing normal numbers in a format takes, and how well it does."""

    bytes: float
    """Bytes an element, scales and zero points among them."""
    sqnr_db: float


def normal_numbers() -> np.ndarray[Any, Any]:
    """10^6 of them, the same each time."""
    return np.random.default_rng(0).standard_normal((125, 8000), dtype=np.float32)


def measured(form: Format, x: np.ndarray[Any, Any], group: int | None = GROUP) -> Measured:
    """``x`` in groups along its rows (None: a scale a row); a format with blocks of its own keeps them."""
    options: dict[str, Any] = {}
    if form.scaled and form.scale is None:
        options |= {"granularity": PerGroup(group) if group else PerChannel(0), "scale_dtype": SCALE}
    if not form.element.signed:
        options |= {"scheme": "affine"}
    return cost(aqt_lite.quantize(x, form, **options), x)


def cost(q: aqt_lite.QArray, x: np.ndarray[Any, Any]) -> Measured:
    """Of ``x``, quantized as ``q``."""
    values = x.astype(np.float64)
    noise = values - q.dequantize("float64")
    return Measured(q.nbytes / q.size, float(10 * np.log10(np.sum(values**2) / np.sum(noise**2))))


# ---- tables


def tables() -> dict[str, str]:
    """Every table, by the name of its marker."""
    x = normal_numbers()
    rows = {form.name: row(form, measured(form, x)) for form in (*BUILT_IN, *WITHOUT_SCALES)}
    names = [f"- {family}: {', '.join(names)}" for family, names in families().items()]
    names += [f"- floats without scales: `{forms[0].name}` to `{forms[-1].name}`" for forms in FAMILIES.values()]
    head = [
        "format", "bits", "numbers", "smallest > 0", "smallest, largest", "scales", "group", "bytes an element",
        "SQNR, dB", "reproducible products",
    ]  # fmt: skip
    short = [0, 1, 2, 5, 6, 7, 8, 9]
    return {
        "formats": markdown(head, list(rows.values())),
        "floats": markdown(["", "exponent", "mantissa", "bias", "infinity", "NaN", "−0"], float_rows()),
        "some formats": markdown([head[i] for i in short], [[rows[name][i] for i in short] for name in SHOWN]),
        "names of formats": "\n".join(names),
    }


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def row(form: Format, cost: Measured) -> list[str]:
    element, kept = form.element, form.scale
    free = "any" if form.scaled else "none"
    scales = (
        free if kept is None else kept.element.name + (", with a float32 scale of their own" if kept.scaled else "")
    )
    return [
        f"`{form.name}`",
        str(element.bits),
        f"{len(element.levels(get_backend('numpy'))):,}",
        number(element.smallest),
        f"{number(element.min)}, {number(element.max)}",
        scales,
        free if form.group is None else str(form.group),
        f"{cost.bytes:.5f}".rstrip("0").rstrip("."),
        f"{cost.sqnr_db:.1f}",
        yes(element.unit is not None and element.bits <= 8),
    ]


def float_rows() -> list[list[str]]:
    """What distinguishes the floats of few bits, and those that scales are kept in."""
    forms = [*BUILT_IN, *SCALE_FORMATS.values()]
    floats = {form.element.name: form.element for form in forms if isinstance(form.element, Float)}
    return [
        [
            f"`{e.name}`",
            *map(str, (e.exponent, e.mantissa, e.bias)),
            code(e.infinity),
            code(e.nan),
            yes(e.negative_zero and e.signed),
        ]
        for e in floats.values()
    ]


def yes(so: bool) -> str:
    return "yes" if so else "no"


def code(value: int | None) -> str:
    return "no" if value is None else f"{value:#x}"


def number(value: float) -> str:
    """Powers of two as such where decimals would be long."""
    short = f"{value:.7g}"
    exponent = np.log2(abs(value)) if value else 0.0
    return f"2^{int(exponent)}" if exponent < -4 and exponent == int(exponent) else short


def families() -> dict[str, list[str]]:
    """Names of formats, by what they are."""
    found: dict[str, list[str]] = {"integers": [], "floats": [], "codebooks": [], "block formats": []}
    for form in BUILT_IN:
        kind = {Integer: "integers", Float: "floats", Codebook: "codebooks"}[type(form.element)]
        found["block formats" if form.scale else kind].append(f"`{form.name}`")
    return found


def filled(text: str, found: dict[str, str]) -> str:
    """``text`` with every marked table replaced."""
    for name, table in found.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def hold() -> None:
    """AssertionError where a file has other tables, or lacks one or a format."""
    found = tables()
    for path in FILES:
        text = path.read_text()
        assert "| `nvfp4` |" in text, f"no table in {path.name}"
        assert filled(text, found) == text, f"{path.name} is not what the records say: run make formats"
    for form in BUILT_IN:
        assert f"| `{form.name}` |" in found["formats"], form.name
        assert f"`{form.name}`" in found["names of formats"], form.name


# ---- pictures

COLOURS = {"integers": "tab:blue", "floats": "tab:orange", "codebooks": "tab:green", "block formats": "tab:red"}


def family_of(form: Format) -> str:
    return next(family for family, names in families().items() if f"`{form.name}`" in names)


def draw_grids(path: Path) -> None:
    """The numbers of every element type: all of them, and the positive ones by their logarithm."""
    from matplotlib.figure import Figure

    users: dict[Any, list[Format]] = {}
    for form in BUILT_IN:
        users.setdefault(form.element, []).append(form)
    figure = Figure(figsize=(13, 0.27 * len(users) + 1.5), layout="constrained")
    linear, logarithmic = figure.subplots(1, 2, sharey=True, width_ratios=[1.25, 1])
    for at, (element, forms) in enumerate(users.items()):
        levels = element.levels(get_backend("numpy"))
        levels = levels / np.abs(levels).max()
        colour = COLOURS[family_of(forms[0])]
        for ax, values in ((linear, levels), (logarithmic, np.log2(levels[levels > 0]))):
            if len(values) > 1 << 10:
                values = np.linspace(values.min(), values.max(), 1 << 12)  # as dense as the picture can show
            few = len(values) <= 64
            ax.vlines(values, at - 0.36, at + 0.36, color=colour, linewidth=1.1 if few else 0.35)
    linear.set_yticks(
        range(len(users)), [", ".join(form.name for form in forms) for forms in users.values()], fontsize=8
    )
    linear.set_ylim(len(users) - 0.4, -0.6)
    linear.set_xlim(-1.03, 1.03)
    logarithmic.set_xlim(-17, 0.3)
    linear.set_title("all numbers, the farthest at 1", fontsize=10)
    logarithmic.set_title("positive numbers: powers of two below the farthest", fontsize=10)
    for ax in (linear, logarithmic):
        ax.tick_params(axis="y", length=0)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.grid(axis="x", linewidth=0.3)
        ax.set_axisbelow(True)
    figure.savefig(path, dpi=110)


def draw_sqnr(path: Path) -> None:
    """SQNR against bits an element: every format at several granularities."""
    from matplotlib.figure import Figure

    x = normal_numbers()
    figure = Figure(figsize=(13, 6.2), layout="constrained")
    every, four = panels = figure.subplots(1, 2)
    for family, colour in COLOURS.items():
        for ax in panels:
            ax.plot([], [], "o", color=colour, markersize=5, label=family)
    for form in BUILT_IN:
        groups = (None, 128, 64, 32, 16) if form.scale is None else (None,)
        points = [measured(form, x, group) for group in groups]
        bits, db = [8 * p.bytes for p in points], [p.sqnr_db for p in points]
        colour, signed = COLOURS[family_of(form)], form.element.signed
        style = {"color": colour, "mfc": colour if signed else "white", "linewidth": 0.8 if signed else 0.4}
        every.plot(bits, db, "o-", markersize=3, **style)
        if form.element.bits == 4:
            four.plot(bits, db, "o-", markersize=5, **style)
        for ax, labels, at in (
            (every, LABELS, len(bits) // 2),
            (four, LABELS_OF_FOUR, max(i for i, n in enumerate(bits) if n < 5.6 or i == 0)),
        ):
            if form.name in labels:
                ax.annotate(form.name, (bits[at], db[at]), labels[form.name], textcoords="offset points", fontsize=9)
    for ax in panels:
        line = np.linspace(1.5, 20.0, 100)
        ax.plot(line, 20 * np.log10(2) * line, "--", color="0.6", linewidth=1, label="limit for normal numbers")
        ax.set_xlabel("bits an element, scales and zero points among them")
        ax.set_ylabel("SQNR, dB")
        ax.grid(linewidth=0.3)
        ax.legend(loc="upper left" if ax is every else "lower right", fontsize=9)
    every.set_xscale("log")
    every.set_xticks([2, 3, 4, 5, 6, 8, 10, 16], ["2", "3", "4", "5", "6", "8", "10", "16"])
    every.minorticks_off()
    every.set(xlim=(1.8, 20), ylim=(0, 102))
    four.set(xlim=(3.92, 5.62), ylim=(14.5, 25))
    every.set_title("every format: float16 scales for rows of 8000, and groups of 128, 64, 32 and 16", fontsize=10)
    four.set_title("formats of 4 bits; hollow: unsigned, with zero points of 32 bits", fontsize=10)
    figure.savefig(path, dpi=110)


LABELS = {
    "int2": (6, -10), "int3": (6, -12), "int5": (-26, 4), "int6": (-26, 4), "int7": (-26, 4), "int8": (-26, 4),
    "int16": (-34, 2), "float6_e2m3fn": (16, -16), "float6_e3m2fn": (16, -16), "float8_e4m3fn": (16, -8),
    "float8_e5m2": (16, -10), "mxint8": (10, -12),
}  # fmt: skip
LABELS_OF_FOUR = {
    "nf4": (7, 0), "iq4_nl": (7, -5), "int4": (7, -5), "nvfp4": (-36, 3), "float4_e2m1fn": (7, -4), "bnb_fp4": (7, -4),
    "mxfp4": (8, -3), "uint4": (-10, 8),
}  # fmt: skip
"""Where labels stand, in points from a point of the format."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    found = tables()
    for name, table in found.items():
        print(f"## {name}\n\n{table}\n")
    if write:
        for path in FILES:
            path.write_text(filled(path.read_text(), found))
        draw_grids(ROOT / "docs" / "grids.png")
        draw_sqnr(ROOT / "docs" / "sqnr.png")


if __name__ == "__main__":
    main()
