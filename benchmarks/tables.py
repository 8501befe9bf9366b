"""Writes the tables of the last full benchmark run into README.md and pages of docs/.

    python benchmarks/tables.py            print them
    python benchmarks/tables.py --write    replace what stands between the markers of each file

A test holds the files against the recorded runs in benchmarks/*.json, so that no figure is older than the results.
Bits and errors of the table of formats are measured here, on the numbers of ``formats_table.py``.
"""

from __future__ import annotations

import argparse
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import formats_table

import aqt_lite
from aqt_lite import PerChannel, PerGroup

ROOT = Path(__file__).resolve().parent.parent
SHOWN = ("int8, groups of 32", "int4, groups of 32", "int4, groups of 32, reproducible", "mxfp4")
"""Of the products with groups, those in README."""
PAGES = ("performance", "performance-avx2", "performance-intel", "models", "formats")
FILES = (ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES))


class Job(NamedTuple):
    """A row of "which format for which job"."""

    how: dict[str, Any]
    """Arguments of ``quantize`` for a weight (out, in)."""
    timed: str | None
    """As what the recorded runs know it: a name in ``stored.py``, or ``linear`` in ``run.py``."""
    when: str


JOBS = {
    "int8, one scale an output": Job(
        {"granularity": PerChannel(0)}, "linear", "start here: four times smaller than float32, and every mode"
    ),
    "int8, groups of 32": Job(
        {"granularity": PerGroup(32)}, "int8, groups of 32", "weights with outliers: a group pays for its own alone"
    ),
    "uint8 with zero points, groups of 128": Job(
        {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(128)},
        "uint8 with zero points, groups of 128",
        "groups that lie to one side of 0; codes that were made so elsewhere",
    ),
    "int6, one scale an output": Job(
        {"dtype": "int6", "granularity": PerChannel(0)}, "int6, one scale an output", "less memory than 8 bits"
    ),
    "int4, groups of 32": Job(
        {"dtype": "int4", "granularity": PerGroup(32)}, "int4, groups of 32", "start here for 4 bits"
    ),
    "int4, groups of 16": Job(
        {"dtype": "int4", "granularity": PerGroup(16)}, "int4, groups of 16", "groups of 32 lose too much"
    ),
    "uint4 with zero points, groups of 128": Job(
        {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(128)},
        "uint4 with zero points, groups of 128",
        "what GPTQ and AWQ made",
    ),
    "nf4, groups of 32": Job(
        {"dtype": "nf4", "granularity": PerGroup(32)},
        "nf4, groups of 32",
        "normal weights, and no need of the same bits everywhere",
    ),
    "float4_e2m1fn, groups of 128": Job(
        {"dtype": "float4_e2m1fn", "granularity": PerGroup(128)},
        "float4_e2m1fn, groups of 128",
        "4 bits in long groups: few bytes, and fast",
    ),
    "mxfp4": Job({"dtype": "mxfp4"}, "mxfp4", "checkpoints of the OCP standard"),
    "nvfp4": Job({"dtype": "nvfp4"}, "nvfp4", "checkpoints made for NVIDIA's format"),
    "int3, groups of 32": Job(
        {"dtype": "int3", "granularity": PerGroup(32)},
        "int3, groups of 32",
        "less memory than 4 bits; look at the error first",
    ),
    "int2, groups of 32": Job(
        {"dtype": "int2", "granularity": PerGroup(32)},
        "int2, groups of 32",
        "least memory: for weights that are trained so",
    ),
    "float8_e4m3fn, one scale an output": Job(
        {"dtype": "float8_e4m3fn", "granularity": PerChannel(0)},
        "float8_e4m3fn, one scale an output",
        "checkpoints in fp8; many magnitudes under one scale",
    ),
    "float8_e4m3fn, groups of 32": Job(
        {"dtype": "float8_e4m3fn", "granularity": PerGroup(32)},
        "float8_e4m3fn, groups of 32",
        "the same, in groups",
    ),
    "mxfp8_e4m3": Job({"dtype": "mxfp8_e4m3"}, "mxfp8_e4m3", "checkpoints of the OCP standard"),
    "mxfp6_e2m3": Job({"dtype": "mxfp6_e2m3"}, "mxfp6_e2m3", "about the error of mxfp8 in 6 bits, and reproducible"),
    "mxint8": Job({"dtype": "mxint8"}, "mxint8", "8 bits whose scales are powers of two"),
    "int16, one scale an output": Job(
        {"dtype": "int16", "granularity": PerChannel(0)}, None, "fields and measurements, more than products"
    ),
}

FRAMEWORKS = ("numpy", "torch", "jax")
EIGHT_BITS = ("int8, groups of 32", "uint8 with zero points, groups of 128")
FOUR_BITS = (
    "int4, groups of 32", "uint4 with zero points, groups of 128", "nf4, groups of 32", "float4_e2m1fn, groups of 128",
    "mxfp4",
)  # fmt: skip

REPRODUCIBLE = ("int4, groups of 32", "uint8 with zero points, groups of 128")
SHARE = "share of a product's time that reading its weight takes"
OF_FAST = 'in groups, `mode="reproducible"`, of the speed of `fast`'

GOALS: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[int, float]]] = {
    "one scale an output": (FRAMEWORKS, ("linear",), {1: 2.7, 8: 3.0, 64: 1.2, 512: 0.9}),
    "8 bits in groups": (FRAMEWORKS, EIGHT_BITS, {1: 2.5, 8: 2.0, 64: 1.0, 512: 0.85}),
    "4 bits in groups": (FRAMEWORKS, FOUR_BITS, {1: 4.0, 8: 2.5, 64: 1.0, 512: 0.85}),
    "NumPy alone, one scale an output": (("numpy alone",), ("linear",), {1: 0.6, 8: 0.8, 64: 0.9, 512: 0.9}),
    "NumPy alone, in groups": (("numpy alone",), EIGHT_BITS + FOUR_BITS, {1: 0.5, 8: 0.7, 64: 0.8, 512: 0.9}),
    SHARE: (FRAMEWORKS, FOUR_BITS, {1: 0.75}),
    OF_FAST: (FRAMEWORKS, REPRODUCIBLE, {1: 0.7, 8: 0.7}),
}
"""Whose products, by the backends and names of the recorded runs, and how many times as fast as float32 they are to be
by the number of rows; of the last two, what their names say, by the number of rows as well."""

GOALS_OF_AVX2 = {
    name: (*GOALS[name][:2], {1: 2.0, 8: 1.5})
    for name in ("one scale an output", "8 bits in groups", "4 bits in groups")
} | {OF_FAST: GOALS[OF_FAST]}
"""The same on processors without AVX-512."""

GOALS_OF_QUANTIZING = {
    "quantize per channel (axis 0)": 0.8,
    "quantize per channel (axis 1)": 0.7,
    "quantize per tensor": 0.7,
    "quantize per group of 128": 0.7,
    "quantize per group of 32": 0.7,
    "quantize, int4, groups of 32, packed": 0.5,
    "quantize, mxfp4, packed": 0.4,
    "dequantize per channel": 0.6,
    "dequantize, int4, groups of 32, packed": 0.6,
    "dequantize, mxfp4, packed": 0.6,
    "dequantize, float8_e4m3fn, groups of 32": 0.6,
}
"""Of the speed that copying allows, on NumPy."""


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
            assert end in text, f"{begin} without {end}"
            before, _, rest = text.partition(begin)
            text = f"{before}{begin}\n{table}\n{end}{rest.partition(end)[2]}"
    return text


def tables(results: dict) -> dict[str, str]:
    """Every table, by the name of its marker."""
    stored = json.loads((ROOT / "benchmarks" / "stored.json").read_text())
    layers = json.loads((ROOT / "benchmarks" / "frameworks.json").read_text())
    return (
        of_stored(stored, "")
        | of_results(results, "")
        | of_other_processors()
        | {
            "frameworks": frameworks(layers["rows"]),
            "machine of frameworks": machine(layers, copying=False),
            "jobs": jobs(results, stored),
            "goals": goals(results["products"] + stored["rows"], GOALS),
            "some stored": products_stored(stored, SHOWN),
            "products": products(results, ("linear", "linear, reproducible")),
            "small": small(results),
        }
    )


def of_stored(stored: dict, processor: str) -> dict[str, str]:
    """Tables of ``stored.py`` by their markers, which end in the processor's name unless it is the first one."""
    found = {
        "stored": products_stored(stored, None),
        "machine of stored": f"{machine(stored, copying=False)} It reads {stored['read_gb_s']:.0f} GB/s.",
    }
    parts = {
        "formats": ("formats stored", formats_stored),
        "shapes": ("shapes", shapes),
        "in_out": ("in out", products_in_out),
        "detours": ("detours", products_in_out),
    }
    found |= {name: table(stored[part]) for part, (name, table) in parts.items() if part in stored}
    return {name + processor: table for name, table in found.items()}


def of_results(results: dict, processor: str) -> dict[str, str]:
    """The same of ``run.py``."""
    found = {
        "machine": machine(results),
        "all products": products(results, None),
        **({"quantization": quantization(results)} if "quantization" in results else {}),
    }
    return {name + processor: table for name, table in found.items()}


def of_other_processors() -> dict[str, str]:
    """Of every processor whose results are kept in files with its name."""
    found: dict[str, str] = {}
    for path in sorted((ROOT / "benchmarks").glob("stored-*.json")):
        named = path.stem.removeprefix("stored-")
        stored = json.loads(path.read_text())
        beside = path.parent / f"results-{named}.json"
        if not beside.exists():
            raise SystemExit(
                f"{path.name} has no {beside.name} beside it: run benchmarks/run.py --only products --splice"
            )
        results = json.loads(beside.read_text())
        found |= of_stored(stored, f" {named}") | of_results(results, f" {named}")
        wanted = GOALS if "avx512_vnni" in stored["machine"]["processor"] else GOALS_OF_AVX2
        found[f"goals {named}"] = goals(results["products"] + stored["rows"], wanted)
    return found


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


def jobs(results: dict, stored: dict) -> str:
    """What a weight of each format takes, loses and gains, and which modes serve it."""
    rows = [*results["products"], *stored["rows"], *stored.get("formats", ())]
    found = {(r["backend"], r["who"], r["m"]): r["times_as_fast"] for r in rows if r["size"] == 4096}
    lines = ["| | bits | SQNR, dB | M=1 | M=8 | modes | take it for |", "|---|---:|---:|---|---|---|---|"]
    for name, job in JOBS.items():
        speeds = [[found.get((b, job.timed, m)) for b in FRAMEWORKS] for m in (1, 8)]
        shown = (", ".join("" if s is None else f"{s:.1f}" for s in of_m) if any(of_m) else "" for of_m in speeds)
        cost = cost_of(name)
        cells = [f"{8 * cost.bytes:.2f}", f"{cost.sqnr_db:.1f}", *shown, ", ".join(modes(job)), job.when]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def modes(job: Job) -> list[str]:
    """Of ``linear`` and ``dense``, those that take such a weight."""
    element = aqt_lite.formats.format_of(job.how.get("dtype", "int8")).element
    whole = element.unit is not None and element.bits <= 8
    alone = isinstance(job.how.get("granularity"), PerChannel)
    return ["fast", *(["reproducible"] if whole else []), *(["integer"] if whole and alone else [])]


@functools.cache
def cost_of(name: str) -> formats_table.Measured:
    x = formats_table.normal_numbers()
    return formats_table.cost(aqt_lite.quantize(x, **JOBS[name].how), x)


def goals(rows: list[dict], wanted: dict) -> str:
    """For every goal, whether all sizes and formats reach it on every backend, and which is the farthest from it."""
    ms = sorted({m for _, _, aims in wanted.values() for m in aims})
    found = {(r["backend"], r["size"], r["m"], r["who"]): r for r in rows}
    speeds = {at: r["times_as_fast"] for at, r in found.items()}
    others = {
        SHARE: {at: r["read_share"] for at, r in found.items() if r.get("read_share")},
        OF_FAST: {
            at: speeds[again] / speed
            for at, speed in speeds.items()
            if (again := (*at[:3], f"{at[3]}, reproducible")) in speeds
        },
    }
    lines = ["| | " + " | ".join(f"M={m}" for m in ms) + " |", "|---|" + "---|" * len(ms)]
    for name, (backends, who, aims) in wanted.items():
        cells = []
        for m in ms:
            values = others.get(name, speeds).items()
            of_m = [(value, at) for at, value in values if at[0] in backends and at[2] == m and at[3] in who]
            cells.append(_reached(of_m, aims[m], "" if name in others else "x") if m in aims else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _reached(found: list[tuple[float, tuple]], aim: float, unit: str) -> str:
    missed = [one for one in found if one[0] < aim]
    if not missed:
        return f"{aim:g}{unit}: " + (f"reached by all {len(found)}" if found else "not measured")
    least, (backend, size, _, who) = min(missed)
    what = f"{backend}, {size}²" if who == "linear" else f"{who}, {backend}, {size}²"
    digits = 3 if round(least, 2) == aim else 2
    return f"{aim:g}{unit}: missed by {len(missed)} of {len(found)}, the farthest {least:.{digits}f}{unit} ({what})"


def formats_stored(rows: list[dict]) -> str:
    """Of formats, times as fast as the float32 product, and milliseconds."""
    found = {(r["who"], r["backend"], r["m"]): r for r in rows}
    columns = list(dict.fromkeys((backend, m) for _, backend, m in found))
    lines = ["| | " + " | ".join(f"{backend}, M={m}" for backend, m in columns) + " |", "|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(name for name, *_ in found):
        cells = (found[name, *column] for column in columns)
        lines.append(f"| {name} | " + " | ".join(f"{c['times_as_fast']:.2f}x ({c['ms']:.2f})" for c in cells) + " |")
    return "\n".join(lines)


def products_in_out(rows: list[dict]) -> str:
    """Each in a line for a backend: times as fast as the best float32 product, and milliseconds."""
    found = {(r["backend"], r["who"], r["size"], r["m"]): r for r in rows}
    columns = sorted({(r["size"], r["m"]) for r in rows})
    lines = ["| | " + " | ".join(f"{size}², M={m}" for size, m in columns) + " |", "|---|" + "---|" * len(columns)]
    for backend, name in dict.fromkeys((r["backend"], r["who"]) for r in rows):
        cells = (found[backend, name, *column] for column in columns)
        shown = " | ".join(f"{c['times_as_fast']:.2f}x ({c['ms']:.2f})" for c in cells)
        lines.append(f"| {backend}: {name} | {shown} |")
    return "\n".join(lines)


def shapes(rows: list[dict]) -> str:
    """Times as fast as the float32 product, and milliseconds, for shapes of real networks."""
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
    lines = ["| 8192 x 8192 | " + " | ".join(names) + " | goal on NumPy |", "|---|" + "---|" * len(names) + "---|"]
    for what in dict.fromkeys(r["what"] for r in rows):
        found = {r["who"]: r for r in rows if r["what"] == what}
        cells = [f"{found[n]['gelt_s']:.2f} ({found[n]['of_limit']:.2f})" if n in found else "" for n in names]
        lines.append(
            f"| {what} | "
            + " | ".join([*cells, f"({GOALS_OF_QUANTIZING[what]:g})" if what in GOALS_OF_QUANTIZING else ""])
            + " |"
        )
    return "\n".join(lines)


def small(results: dict) -> str:
    lines = ["| one call | microseconds |", "|---|---|"]
    return "\n".join(lines + [f"| {r['who']} | {r['us']:.1f} |" for r in results["small"]])


if __name__ == "__main__":
    main()
