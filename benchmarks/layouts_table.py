"""Writes the tables of docs/layouts.md from the records in ``aqt_lite.layouts``.

    python benchmarks/layouts_table.py            print them
    python benchmarks/layouts_table.py --write    replace what stands between the markers of the page

A test holds the page against them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from aqt_lite.formats import element_type
from aqt_lite.ggml import ENCODERS
from aqt_lite.layouts import LAYOUTS, Family, Field, Layout, Part

PAGE = Path(__file__).resolve().parent.parent / "docs" / "layouts.md"


def tables() -> dict[str, str]:
    """Every table, by the name of its markers."""
    blocks = [entry for entry in LAYOUTS.values() if isinstance(entry, Layout) and entry.dtype is not None]
    orders = [entry for entry in LAYOUTS.values() if entry.name != "gguf" and entry not in blocks]
    head = ["name", "block", "bytes", "bits an element", "codes", "scales", "offsets", "made here", "fields"]
    return {
        "block types": markdown(head, [of_blocks(layout) for layout in blocks]),
        "orders": markdown(["name", "bits", "axis", "kept in", "words"], [of_order(entry) for entry in orders]),
    }


def of_blocks(layout: Layout) -> list[str]:
    assert layout.block is not None
    assert layout.dtype is not None
    (size,) = layout.stored_shape((layout.block,))
    kinds = {leaf.name: f"{leaf.length} {leaf.dtype}" for leaf in layout.leaves}
    kept = [
        ", ".join(kinds[n] for n in (name, f"{name}.scale") if n in kinds) or "none" for name in ("scale", "offset")
    ]
    return [
        f"`{layout.name}`",
        str(layout.block),
        str(size),
        f"{8 * size / layout.block:g}",
        element_type(layout.dtype).name,
        *kept,
        "as ggml does" if layout.name in ENCODERS else "no",
        "; ".join(words(field) for field in layout.fields),
    ]


def of_order(entry: Layout | Family) -> list[str]:
    layouts = entry.layouts if isinstance(entry, Family) else (entry,)
    first = next((a for a in layouts if a.bits == 4), layouts[0])
    axis = "all, as one" if first.flat else "first" if first.axis == 0 else "last"
    bits = ", ".join(str(a.bits) for a in sorted(layouts, key=lambda a: a.bits))
    return [f"`{entry.name}`", bits, axis, first.word, f"{first.bits} bits: " + "; ".join(map(words, first.fields))]


def words(field: Field) -> str:
    """A field as docs/layouts.md explains it."""
    count = "n" if field.count is None else str(field.count)
    return f"{count}×({' '.join(map(part_in_words, field.parts))}){' in base 3' if field.base == 3 else ''}"


def part_in_words(part: Part) -> str:
    if not part.leaf:
        return f"0:{part.bits}"
    bits = str(part.bits) if not part.shift else f"{part.bits} from {part.shift}"
    return f"{part.leaf}{part.run}:{bits}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def filled(text: str, found: dict[str, str]) -> str:
    """The page with every table between its markers."""
    for name, table in found.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        before, there, rest = text.partition(begin)
        if not there or end not in rest:
            raise SystemExit(f"{PAGE.name} has no markers {begin} and {end}")
        text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def hold() -> None:
    """SystemExit where the page says something else than the records."""
    text = PAGE.read_text()
    if filled(text, tables()) != text:
        raise SystemExit(f"{PAGE} differs from the records: run python benchmarks/layouts_table.py --write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    found = tables()
    for name, table in found.items():
        print(f"## {name}\n\n{table}\n")
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(), found))


if __name__ == "__main__":
    main()
