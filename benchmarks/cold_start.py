"""How long the first product of a process takes: nothing cached, loops cached on disk, and after ``warm_up``.

    python benchmarks/cold_start.py

Each figure is a process of its own: the seconds of the first ``linear`` (with ``import aqt_lite`` and the backend done
before), of the first after ``aqt_lite.warm_up`` in the same process, and of a later one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

PROGRAM = """
import sys, time
import numpy as np
import aqt_lite
from aqt_lite._registry import get_backend
name, warmed = sys.argv[1], sys.argv[2] == "warm_up"
b = get_backend(name)
values = np.random.default_rng(0)
w, x = (b.asarray(values.standard_normal(shape, dtype=np.float32)) for shape in ((1024, 1024), (4, 1024)))
def product():
    start = time.perf_counter()
    q = aqt_lite.quantize(w, granularity=aqt_lite.PerChannel(0))
    b.to_numpy(aqt_lite.linear(x, q))
    return time.perf_counter() - start
if warmed:
    aqt_lite.warm_up(backend=name, shape=(1024, 1024), rows=[4])
first = product()
print(first, min(product() for _ in range(5)))
"""


def seconds(backend: str, cache: str, how: str = "") -> list[float]:
    environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
    command = [sys.executable, "-c", PROGRAM, backend, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    print("| | nothing cached | loops cached | after `warm_up` | later |")
    print("|---|---:|---:|---:|---:|")
    for backend in ("numpy", "torch", "jax"):
        with tempfile.TemporaryDirectory() as cache:
            (cold, _), (cached, _), (warm, later) = (seconds(backend, cache, how) for how in ("", "", "warm_up"))
        print(f"| {backend} | {cold:.2f} s | {cached:.2f} s | {warm * 1e3:.1f} ms | {later * 1e3:.1f} ms |")


if __name__ == "__main__":
    main()
