"""Writes the tables of the last full benchmark run into README.md, docs/performance.md and docs/models.md.

    python benchmarks/tables.py            print them
    python benchmarks/tables.py --write    replace what stands between the markers of each file

A test holds the files against benchmarks/results.json, so that no figure is older than the results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("int8, groups of 32", "int4, groups of 32", "int4, groups of 32, reproducible", "mxfp4")
"""Of the products with groups, those in README."""
FILES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "models.md")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true")
    write = parser.parse_args().write
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    for name, table in tables(results).items():
        print(f"## {name}\n\n{table}\n")
    if write:
        for path in FILES:
            path.write_text(filled(path.read_text(), results))


def filled(text: str, results: dict) -> str:
    """``text`` with every marked table replaced."""
    for name, table in tables(results).items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin in text:
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def tables(results: dict) -> dict[str, str]:
    """Every table, by the name of its marker."""
    stored = json.loads((ROOT / "benchmarks" / "stored.json").read_text())
    of_shapes = {"shapes": shapes(stored)} if "shapes" in stored else {}  # recorded from the next full run on
    layers = json.loads((ROOT / "benchmarks" / "frameworks.json").read_text())
    of_formats = {"formats stored": formats_stored(stored)} if "formats" in stored else {}
    return (
        of_shapes
        | of_formats
        | {
            "frameworks": frameworks(layers["rows"]),
            "machine of frameworks": machine(layers, copying=False),
            "stored": products_stored(stored, None),
            "some stored": products_stored(stored, SHOWN),
            "machine of stored": f"{machine(stored, copying=False)} It reads {stored['read_gb_s']:.0f} GB/s.",
            "machine": machine(results),
            "products": products(results, ("linear", "linear, reproducible")),
            "all products": products(results, None),
            "quantization": quantization(results),
            "small": small(results),
        }
    )


def machine(results: dict, copying: bool = True) -> str:
    m = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    told = f"Measured on {m['cores']} cores ({m['processor']}), {m['memory_gib']} GiB, Python {m['python']}, {versions}"
    told += f"; BLAS: {m['blas']}" if "blas" in m else ""
    return f"{told}; copying reads and writes {results['copy_gb_s']:.0f} GB/s." if copying else f"{told}."


def products_stored(results: dict, who: tuple[str, ...] | None) -> str:
    """Of all, or of some and the peers, times as fast as the best float32 product; for one row the share of reading."""
    found = {(r["backend"], r["who"], r["size"], r["m"]): r for r in results["rows"]}
    columns = sorted({(r["size"], r["m"]) for r in results["rows"]})
    lines = ["| | " + " | ".join(f"{size}², M={m}" for size, m in columns) + " |", "|---|" + "---|" * len(columns)]
    for backend in ("jax", "torch", "numpy", "numpy alone"):
        for name in dict.fromkeys(r["who"] for r in results["rows"]):
            cells = [found.get((backend, name, *column)) for column in columns]
            if not any(cells) or (who is not None and name not in who and not name.startswith("peer")):
                continue
            shown = [_ratio_and_share(c) for c in cells]
            lines.append(f"| {backend}: {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _ratio_and_share(c: dict | None) -> str:
    if c is None:
        return ""
    return f"{c['times_as_fast']:.2f}x" + (f" ({c['read_share']:.2f})" if c["m"] == 1 and c.get("read_share") else "")


def formats_stored(results: dict) -> str:
    """Of formats, times as fast as the float32 product, and milliseconds."""
    found = {(r["who"], r["backend"], r["m"]): r for r in results["formats"]}
    columns = list(dict.fromkeys((backend, m) for _, backend, m in found))
    lines = ["| | " + " | ".join(f"{backend}, M={m}" for backend, m in columns) + " |", "|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(name for name, *_ in found):
        cells = (found[name, *column] for column in columns)
        lines.append(f"| {name} | " + " | ".join(f"{c['times_as_fast']:.2f}x ({c['ms']:.2f})" for c in cells) + " |")
    return "\n".join(lines)


def shapes(results: dict) -> str:
    """Times as fast as the float32 product, and milliseconds, for shapes of real networks."""
    rows = results["shapes"]
    names = list(dict.fromkeys(r["shape"] for r in rows))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for backend, who in dict.fromkeys((r["backend"], r["who"]) for r in rows):
        cells = {r["shape"]: r for r in rows if (r["backend"], r["who"]) == (backend, who)}
        shown = [f"{cells[n]['times_as_fast']:.2f}x ({cells[n]['ms']:.2f})" for n in names]
        lines.append(f"| {backend}: {who} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def products(results: dict, who: tuple[str, ...] | None) -> str:
    """Times as fast as the backend's own float32 product; for one row the share of reading."""
    rows = results["products"]
    sizes, ms = sorted({r["size"] for r in rows}), sorted({r["m"] for r in rows})
    head = [f"{size}², M={m}" for size in sizes for m in ms]
    lines = ["| | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
    by_row = {(r["backend"], r["who"], r["size"], r["m"]): r for r in rows}
    for backend in ("jax", "torch", "numpy", "numpy alone"):
        names = list(dict.fromkeys(r["who"] for r in rows if r["backend"] == backend))
        for name in names:
            if name == "float32" or (who is not None and name not in who and not name.startswith("peer")):
                continue
            cells = [by_row.get((backend, name, size, m)) for size in sizes for m in ms]
            shown = [_ratio_and_share(c) for c in cells]
            label = name if name.startswith("peer") else f"**{name}**" if who else name
            lines.append(f"| {backend}: {label} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def frameworks(rows: list[dict]) -> str:
    """Of each framework's step, how many times as long it takes as the products alone, and milliseconds."""
    columns = list(dict.fromkeys((r["kind"], r["m"], r["size"]) for r in rows))
    named = [f"{size}², {kind}, M={m}" for kind, m, size in columns]
    lines = ["| | " + " | ".join(named) + " |", "|---|" + "---:|" * len(columns)]
    for library, who in dict.fromkeys((r["library"], r["who"]) for r in rows):
        cells = {(r["kind"], r["m"], r["size"]): r for r in rows if (r["library"], r["who"]) == (library, who)}
        shown = [f"{c['of_linear']:.2f} ({c['ms']:.2f})" if (c := cells.get(column)) else "" for column in columns]
        name = f"{library}: `linear` alone" if who == "linear" else who
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def quantization(results: dict) -> str:
    rows = results["quantization"]
    names = list(dict.fromkeys(r["who"] for r in rows))
    lines = ["| 8192 x 8192 | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for what in dict.fromkeys(r["what"] for r in rows):
        found = {r["who"]: r for r in rows if r["what"] == what}
        cells = [f"{found[n]['gelt_s']:.2f} ({found[n]['of_limit']:.2f})" if n in found else "" for n in names]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def small(results: dict) -> str:
    lines = ["| one call | microseconds |", "|---|---|"]
    return "\n".join(lines + [f"| {r['who']} | {r['us']:.1f} |" for r in results["small"]])


if __name__ == "__main__":
    main()
