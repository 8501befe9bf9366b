"""Products on NumPy for the instruction sets of this processor, as times the float32 product of the same one.

    python benchmarks/processors.py [--write]    # --write: into docs/performance.md
    python benchmarks/processors.py --sets AVX2 --rows 1 8    # a part of it

Each instruction set is a process of its own, in which numba and BLAS are told of no other. Weights take turns with each
other, so that none is left in a cache, and so do products, whose threads come to rest in between; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- processors -->\n", "<!-- end processors -->"

SIZE, WEIGHTS, ROWS = 4096, 6, {1: 21, 8: 15, 64: 9}

SETS = {
    "AVX-512 VNNI": ({}, (), {}),
    "... 256 bits of it": ({}, ("+prefer-256-bit",), {}),
    "AVX2": ({"NUMBA_CPU_NAME": "haswell"}, (), {"without": ("+avx512", "+avx10"), "blas": "Haswell"}),
}

RECORDED = ["AVX-512 VNNI", "... 256 bits of it"]
"""Those of the table. Of AVX2 docs/performance-avx2.md has all tables, measured where there is no more than that."""


def environment(name: str) -> dict[str, str]:
    """Variables under which a process knows of no more than that instruction set."""
    from numba.core.registry import cpu_target

    variables, also, limits = SETS[name]
    features = str(cpu_target.target_context.codegen().magic_tuple()[-1]).split(",")
    wanted = "+avx2" if "without" in limits else "+avx512vnni"
    if wanted not in features:
        raise SystemExit(f"this processor has no {wanted[1:]}: the row {name!r} would be of something else")
    without = limits.get("without", ("nothing",))
    told = [*("-" + f[1:] if f.startswith(without) else f for f in features), *also]
    limited = {"OPENBLAS_CORETYPE": limits["blas"]} if "blas" in limits else {}
    return {**os.environ, **variables, **limited, "NUMBA_CPU_FEATURES": ",".join(told)}


def measured(of_rows: list[int]) -> dict[str, dict[int, float]]:
    """Milliseconds of every product in this process, by the number of rows."""
    import numpy as np

    import aqt_lite
    from aqt_lite import PerChannel, PerGroup

    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((SIZE, SIZE), dtype=np.float32) for _ in range(WEIGHTS)]
    int8 = [aqt_lite.quantize(w, granularity=PerChannel(0)) for w in weights]
    int4 = [aqt_lite.quantize(w, "int4", granularity=PerGroup(32)) for w in weights]
    forms = {
        "float32": lambda x, i: x @ weights[i].T,
        "int8": lambda x, i: aqt_lite.linear(x, int8[i]),
        "int8, reproducible": lambda x, i: aqt_lite.linear(x, int8[i], mode="reproducible"),
        "int4, groups of 32": lambda x, i: aqt_lite.linear(x, int4[i]),
        "int4, groups of 32, reproducible": lambda x, i: aqt_lite.linear(x, int4[i], mode="reproducible"),
    }
    found: dict[str, dict[int, float]] = {name: {} for name in forms}
    for rows in of_rows:
        calls = ROWS[rows]
        x, times = rng.standard_normal((rows, SIZE), dtype=np.float32), {name: [] for name in forms}
        for call in range(calls):
            for name, form in forms.items():
                time.sleep(0.11)  # BLAS's threads go on spinning for 0.1 s, and would take a core away
                awake = time.perf_counter() + 0.05
                while time.perf_counter() < awake:  # brings the product's own threads back
                    form(x, call % WEIGHTS)
                start = time.perf_counter()
                form(x, (call + 1) % WEIGHTS)
                times[name].append(1e3 * (time.perf_counter() - start))
        for name, values in times.items():
            found[name][rows] = statistics.median(values)
    return found


def table(sets: list[str], rows: list[int]) -> str:
    """One row an instruction set and weight."""
    lines = ["| | " + " | ".join(f"M={m}" for m in rows) + " |", "|---|" + "---:|" * len(rows)]
    for name in sets:
        command = [sys.executable, __file__, "--measure", "--rows", *map(str, rows)]
        done = subprocess.run(command, env=environment(name), stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout)
        plain = found.pop("float32")
        for what, times in found.items():
            cells = (f"{plain[m] / times[m]:.2f}x ({times[m]:.2f})" for m in times)
            lines.append(f"| {name}: {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=RECORDED)
    parser.add_argument("--rows", nargs="+", type=int, choices=ROWS, default=list(ROWS))
    parser.add_argument("--write", action="store_true", help="into docs/performance.md; all rows")
    parser.add_argument("--measure", action="store_true", help="in this process, for the table")
    asked = parser.parse_args()
    if asked.measure:
        print(json.dumps(measured(asked.rows)))
        return
    if asked.write and (asked.sets, asked.rows) != (RECORDED, list(ROWS)):
        parser.error("--write takes the sets of the table and all rows")
    made = table(asked.sets, asked.rows)
    print(made, end="")
    if asked.write:
        text = PAGE.read_text()
        start, stop = text.index(BEGIN) + len(BEGIN), text.index(END)
        PAGE.write_text(text[:start] + made + text[stop:])


if __name__ == "__main__":
    main()
