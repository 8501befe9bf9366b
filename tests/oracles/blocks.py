"""Holds ggml's block types against libgguf (ggml's C code) and gguf, live: the bytes of encoders, values of decoders.

    python tests/oracles/blocks.py [--seeds N]    fresh random data through the originals and ours

``make test-oracles`` runs it. Prints a table; ends with 1 where a byte or a value differs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from forms import JIT, NUMPY, TORCH
from optional import jax
from oracles.libraries import ENCODED, inputs, meant, to_decode, type_of

from aqt_lite import QArray, quantize
from aqt_lite._registry import get_backend

FORMS = {NUMPY: "numpy", TORCH: "torch", JIT: "jax"}


def called(form: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Under jit where the form says so."""
    return (jax.jit(function) if form == JIT else function)(*arguments)


def bytes_of(form: str, name: str, x: np.ndarray) -> np.ndarray:
    """Those of our encoder."""
    there = get_backend(FORMS[form]).asarray(x)
    return np.asarray(called(form, lambda v: quantize(v, name, dialect="gguf"), there).to_bytes("gguf"))


def values_of(form: str, name: str, data: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Those of our decoder."""
    b = get_backend(FORMS[form])
    q = QArray.from_bytes(data, name, shape, backend=b.name)
    return b.to_numpy(called(form, lambda v: v.dequantize(), q))


def live(seeds: list[int]) -> int:
    """Bytes and values that differ; prints a line of a table for each type."""
    import libgguf

    made_by = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("libgguf", "gguf"))
    counts: dict[str, dict[str, int]] = {}
    numbers: dict[str, list[int]] = {}
    for seed in seeds:
        x = inputs(seed)
        for name in ENCODED:
            wanted = libgguf.quantize_rows(x, type_of(name))
            numbers.setdefault(name, [0, 0])[0] += wanted.size
            for form in FORMS:
                row = counts.setdefault(name, dict.fromkeys(FORMS, 0))
                found = meant(name, bytes_of(form, name, x), wanted)
                row[form] += int((found != meant(name, wanted, wanted)).sum())
        for name, data, values in to_decode(seed, seed):
            numbers.setdefault(name, [0, 0])[1] += values.size
            for form in FORMS:
                row = counts.setdefault(name, dict.fromkeys(FORMS, 0))
                row[form] += int((values_of(form, name, data, values.shape) != values).sum())
    print("seeds", *seeds)
    print(f"| block type | original | bytes made | values read | {' | '.join(FORMS)} |")
    print("|---|---|---:|---:|" + "---:|" * len(FORMS))
    for name, row in counts.items():
        made, read = (f"{n:,}" if n else "—" for n in numbers[name])
        print(f"| `{name}` | {made_by} | {made} | {read} | " + " | ".join(map(str, row.values())) + " |")
    return sum(sum(row.values()) for row in counts.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many random sets of arrays")
    arguments = parser.parse_args()
    sys.exit(live([secrets.randbits(31) for _ in range(arguments.seeds)]) > 0)
