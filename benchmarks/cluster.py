"""An array larger than a worker's memory on a cluster of processes: one worker, two, and two of which one is killed.

    python benchmarks/cluster.py [--gigabytes 8] [--megabytes-a-worker 1500]

The array is made chunk by chunk on the workers, quantized with a scale for each row and an int4 code for each value,
and its largest error found: each chunk is looked at twice. Ends with exit status 1 where a run gives another result.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import warnings

import dask
import dask.array as da
import numpy as np

import aqt_lite

ROWS_OF_A_CHUNK, COLUMNS = 1024, 8192  # 32 MB of float32


def chunk(block_id: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(block_id[0]).standard_normal((ROWS_OF_A_CHUNK, COLUMNS), "float32")


def field(gigabytes: float) -> da.Array:
    """An array of that size, which nobody holds."""
    count = max(2, round(gigabytes * 1e9 / (4 * ROWS_OF_A_CHUNK * COLUMNS)))
    chunks = ((ROWS_OF_A_CHUNK,) * count, (COLUMNS,))
    return da.map_blocks(chunk, chunks=chunks, dtype="float32", meta=np.zeros((0, 0), "float32"))


def work(x: da.Array) -> list[da.Array]:
    """What is computed: the largest error, the largest scale, and a sum that tells one code from another."""
    q = aqt_lite.quantize(x, "int4", granularity=aqt_lite.PerChannel(0))
    codes = q.storage.astype("int64")
    return [abs(q.dequantize() - x).max(), q.scale.max(), codes.sum()]


def run(workers: int, gigabytes: float, megabytes: int, kill: bool = False) -> tuple[list[float], float]:
    """The results, and the seconds they took; ``kill``: one worker is killed when a fifth of the time has passed."""
    import distributed

    with (
        dask.config.set({"distributed.worker.memory.spill": 0.7, "distributed.scheduler.allowed-failures": 10}),
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            processes=True,
            memory_limit=megabytes * 10**6,
            dashboard_address=None,
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        client.run(lambda: __import__("aqt_lite").quantize([1.0]))  # imported
        client.gather(client.compute(work(field(0.1))))  # and compiled
        found = client.compute(work(field(gigabytes)))
        start = time.perf_counter()
        if kill:
            time.sleep(max(0.3, gigabytes / 5))
            os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        results = [float(value) for value in client.gather(found)]
        return results, time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--megabytes-a-worker", type=int, default=1500)
    options = parser.parse_args()
    size, room = options.gigabytes, options.megabytes_a_worker
    print(f"{size} GB of float32, {room} MB a worker, {os.cpu_count()} cores")
    expected, one = run(1, size, room)
    print(f"1 worker:                      {one:7.1f} s, {size / one:.3f} GB/s")
    again, two = run(2, size, room)
    print(f"2 workers:                     {two:7.1f} s, {size / two:.3f} GB/s: {one / two:.2f} times as fast")
    after, killed = run(2, size, room, kill=True)
    print(f"2 workers, one of them killed: {killed:7.1f} s, and it is started anew")
    same = expected == again == after
    print(f"largest error {expected[0]:.6g}; the same results: {'yes' if same else 'NO'}")
    return 0 if same else 1


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    threading.excepthook = lambda _: None  # of what watches a worker that was killed
    sys.exit(main())
