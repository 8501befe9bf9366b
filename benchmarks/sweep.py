"""Codes of all 2^32 float32 bit patterns, infinities and NaN included: NumPy against jitted JAX against torch.

python benchmarks/sweep.py --scales 0.0371 --step 97      # every 97th pattern: seconds
python benchmarks/sweep.py --write                        # all of them, recorded in docs/sweep.md
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import jax
import numpy as np
import torch

import aqt_lite

PATTERNS = 1 << 32
CHUNK = 1 << 22
PAGE = Path(__file__).parent.parent / "docs" / "sweep.md"


def codes_of(x, scale):
    return aqt_lite.quantize(x, scale=scale, nonfinite="ignore").qvalue


jitted = jax.jit(codes_of)

FORMS = {
    "NumPy": lambda x, scale: codes_of(x, float(scale)),
    "JAX jit": lambda x, scale: np.asarray(jitted(jax.numpy.asarray(x), jax.numpy.asarray(scale))),
    "torch": lambda x, scale: codes_of(torch.from_numpy(x), float(scale)).numpy(),
}


def sweep(scale, step):
    """Numbers compared, mismatches with NumPy and seconds of each form."""
    mismatches, seconds = dict.fromkeys(FORMS, 0), dict.fromkeys(FORMS, 0.0)
    compared = distinct = 0
    for start in range(0, PATTERNS, CHUNK * step):
        stop = min(start + CHUNK * step, PATTERNS)
        x = np.arange(start, stop, step, dtype=np.uint64).astype(np.uint32).view(np.float32)
        reference = None
        for name, form in FORMS.items():
            begin = time.perf_counter()
            codes = form(x, scale)
            seconds[name] += time.perf_counter() - begin
            if reference is None:
                reference = codes
            mismatches[name] += int(np.count_nonzero(codes != reference))
        compared += x.size
        distinct |= sum(1 << (int(code) + 128) for code in np.unique(reference))
    assert distinct.bit_count() == 255 or step > 1, "a sweep that never saw some code proves nothing"
    return compared, mismatches, seconds


def table(scales, step):
    names = list(FORMS)
    lines = [
        "| scale | patterns | " + " | ".join(f"{name}, mismatches" for name in names[1:]) + " | seconds: "
        "" + ", ".join(names) + " |",
        "|---|---" + "|---" * len(names) + "|",
    ]
    for scale in scales:
        compared, mismatches, seconds = sweep(np.float32(scale), step)
        counts = " | ".join(f"{mismatches[name]:,}" for name in names[1:])
        times = ", ".join(f"{seconds[name]:.0f}" for name in names)
        lines.append(f"| {scale:.6g} | {compared:,} | {counts} | {times} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0371, 2.0**-125, 1.1 * 2.0**120])
    parser.add_argument("--step", type=int, default=1, help="take every STEP-th pattern")
    parser.add_argument("--write", action="store_true", help=f"record the result in docs/{PAGE.name}")
    arguments = parser.parse_args()
    begin = time.perf_counter()
    result = table(arguments.scales, arguments.step)
    minutes = (time.perf_counter() - begin) / 60
    taken = "Every pattern" if arguments.step == 1 else f"Every {arguments.step}th pattern"
    page = f"""# Every float32

The int8 codes of all 2^32 bit patterns of float32 (infinities saturate, NaN has code 0), for given scales: how many
differ from NumPy's. Every code occurs among them, and so does every
number next to a tie. Made by `python benchmarks/sweep.py --write`.

{result}

{taken}, in {minutes:.0f} minutes. NumPy {np.__version__}, JAX {jax.__version__}, torch {torch.__version__}, \
{platform.machine()} CPU.
"""
    print(page)
    if arguments.write:
        PAGE.write_text(page)


if __name__ == "__main__":
    main()
