"""Peak memory beside the result, and speed, of every path on a large NumPy array; each in a fresh process.

    python benchmarks/memory.py [--write] [--megabytes 512] [words of the rows to run]
    python benchmarks/memory.py --large [--write] [--gigabytes 20] [--folder DIR]
    python benchmarks/memory.py --passes

``--large`` is a file of float32 as large as the machine's memory, a third of it NaN: quantized within a bound, read
back and reported on, each in a fresh process, from file to file. It needs 2.3 times as much room on the disk of the
folder, and deletes all that it wrote.

``--passes`` holds the time of ``error_report`` against that of plain NumPy, which makes the errors of the whole array
in float64 and sums them up, and against copying the array three times.

Peak memory is that of private pages (RssAnon of Linux, looked at every 2 ms), above what there was before the call,
less the result: pages of files that are mapped come and go as the system likes. ``--write`` puts the tables into
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- {} -->\n", "<!-- end {} -->"

PREPARED = """
import gc, json, re, sys, threading, time, warnings
import numpy as np
import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, cf
warnings.simplefilter("ignore")
path, shape, setup, call = sys.argv[1], tuple(json.loads(sys.argv[2])), sys.argv[3], sys.argv[4]
mapped = np.load(path, mmap_mode="r")
x = mapped if "mapped" in setup + call else np.array(mapped)
small = x[:64, :256].copy()
scope = dict(globals())
exec(setup, scope)
def nbytes(r):
    if isinstance(r, tuple):
        return sum(map(nbytes, r))
    return int(r.nbytes) if isinstance(r, (np.ndarray, aqt_lite.QArray)) and "out=" not in call else 0
if "open_memmap" not in setup:  # imported, and compiled
    warm = dict(scope, x=small, mapped=small)
    exec(setup, warm)
    eval(call, warm)
gc.collect()
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
start = time.perf_counter()
result = eval(call, scope)
seconds = time.perf_counter() - start
peak[0] = max(peak[0], anonymous())
done.set()
watcher.join()
print(json.dumps([max(0, peak[0] - before - nbytes(result)) / 1e6, x.size / seconds / 1e9]))
"""

INT8, INT4 = "q = aqt_lite.quantize(x)", "q = aqt_lite.quantize(x, 'int4', granularity=PerGroup(32))"
MISSING = "q = aqt_lite.quantize(x, mask=x > 2)"
GIVEN = "scale = aqt_lite.choose_qparams(x)[0]"
OUT = "import os; out = np.lib.format.open_memmap(path + '.out', 'w+', {}, {})"

ROWS = [
    ("quantize, int8", "", "aqt_lite.quantize(x)"),
    ("quantize, int8, a scale per row", "", "aqt_lite.quantize(x, granularity=PerChannel(0))"),
    ("quantize, int8, a scale per column", "", "aqt_lite.quantize(x, granularity=PerChannel(1))"),
    ("quantize, int8, groups of 32", "", "aqt_lite.quantize(x, granularity=PerGroup(32))"),
    ("quantize, int8, blocks of 32 x 32", "", "aqt_lite.quantize(x, granularity=PerBlock((32, 32)))"),
    ("quantize, uint8, affine", "", "aqt_lite.quantize(x, 'uint8', scheme='affine')"),
    ("quantize, int8, offset='data'", "", "aqt_lite.quantize(x, scheme='affine', offset='data')"),
    ("quantize, int16", "", "aqt_lite.quantize(x, 'int16')"),
    ("quantize, int4, groups of 32", "", "aqt_lite.quantize(x, 'int4', granularity=PerGroup(32))"),
    ("quantize, float8_e4m3fn", "", "aqt_lite.quantize(x, 'float8_e4m3fn')"),
    ("quantize, mxfp4", "", "aqt_lite.quantize(x, 'mxfp4')"),
    ("quantize, stochastic rounding", "", "aqt_lite.quantize(x, rounding='stochastic', key=1)"),
    ("quantize, scale given", GIVEN, "aqt_lite.quantize(x, scale=scale)"),
    ("quantize, scale given, on_clip='raise'", GIVEN, "aqt_lite.quantize(x, scale=scale * 2, on_clip='raise')"),
    ("quantize, nonfinite='ignore'", "", "aqt_lite.quantize(x, nonfinite='ignore')"),
    ("quantize, missing='nan'", "", "aqt_lite.quantize(x, missing='nan')"),
    ("quantize, mask=", "mask = x[0] > 1", "aqt_lite.quantize(x, mask=mask)"),
    ("quantize, fill_value=", "", "aqt_lite.quantize(x, fill_value=1e20)"),
    ("quantize, int8, max_abs_err=", "", "aqt_lite.quantize(x, 'int8', max_abs_err=0.05)"),
    ("quantize, 'auto', max_abs_err=", "", "aqt_lite.quantize(x, 'auto', max_abs_err=0.05)"),
    (
        "quantize, int8, max_abs_err=, mask=",
        "mask = x[0] > 1",
        "aqt_lite.quantize(x, 'int8', max_abs_err=0.05, mask=mask)",
    ),
    ("quantize, int8, from a memory map", "", "aqt_lite.quantize(mapped)"),
    ("fake_quantize, int8", "", "aqt_lite.fake_quantize(x)"),
    ("fake_quantize, mxfp4", "", "aqt_lite.fake_quantize(x, 'mxfp4')"),
    ("choose_qparams", "", "aqt_lite.choose_qparams(x)"),
    ("dequantize, int8", INT8, "q.dequantize()"),
    ("dequantize, int4, groups of 32", INT4, "q.dequantize()"),
    ("dequantize, fill_value=", MISSING, "q.dequantize(fill_value=1e20)"),
    ("error_report", INT8, "aqt_lite.error_report(x, q)"),
    ("bitround", "", "aqt_lite.bitround(x, 9)"),
    ("keepbits_for, max_rel_err=", "", "aqt_lite.keepbits_for(x, max_rel_err=1e-3)"),
    ("keepbits_for, information=", "", "aqt_lite.keepbits_for(x, information=0.99)"),
    ("cf.choose_packing", "", "cf.choose_packing(x, max_abs_err=0.01)"),
    (
        "quantize, int8, memory map in, out= a memory map",
        OUT.format("'i1'", "x.shape"),
        "aqt_lite.quantize(mapped, out=out)",
    ),
    (
        "quantize, int4, memory map in, out= a memory map",
        OUT.format("'u1'", "(x.shape[0], x.shape[1] // 2)"),
        "aqt_lite.quantize(mapped, 'int4', granularity=PerGroup(32), out=out)",
    ),
    (
        "quantize, int8, max_abs_err=, memory map in, out= a memory map",
        OUT.format("'i1'", "x.shape"),
        "aqt_lite.quantize(mapped, max_abs_err=0.05, out=out)",
    ),
    (
        "quantize, 'auto', max_abs_err=, missing='nan', memory map in, out= a memory map",
        OUT.format("'i1'", "x.shape"),
        "aqt_lite.quantize(mapped, 'auto', max_abs_err=0.05, missing='nan', out=out)",
    ),
    (
        "dequantize, int8, out= a memory map",
        f"{INT8}; {OUT.format(repr('f4'), 'x.shape')}",
        "q.dequantize(out=out)",
    ),
]
"""Name, what is made before, and what is measured: of ``x`` in memory, or of ``mapped``, which is a file."""


def measured(megabytes: int, words: list[str]) -> list[tuple[str, float, float]]:
    import numpy as np

    shape = (megabytes * 1_000_000 // 4 // 16384, 16384)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        whole = np.lib.format.open_memmap(path, "w+", "f4", shape)
        rng = np.random.default_rng(0)
        for start in range(0, shape[0], 256):
            part = whole[start : start + 256]
            part[...] = rng.standard_normal(part.shape, "float32")
            part[:, 1::2] += part[:, ::2]  # neighbours have something in common
        whole.flush()
        del whole
        for name, setup, call in ROWS:
            if all(word in name for word in words):
                command = [sys.executable, "-c", PREPARED, str(path), json.dumps(shape), setup, call]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{name}: {done.stderr}")
                found.append((name, *json.loads(done.stdout)))
                print(f"{found[-1][1]:8.0f} MB  {found[-1][2]:6.3f} Gelt/s  {name}", flush=True)
    return found


PASSES = """
import json, time
import numpy as np
import aqt_lite
from aqt_lite import PerChannel, PerGroup
x = np.random.default_rng(0).standard_normal((4096, 4096), dtype="float32")
other = np.empty_like(x)
def best(f):
    def once():
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    once()
    return min(once() for _ in range(3))
def copies():
    for _ in range(3):
        np.copyto(other, x)
def plainly(q):
    error = np.subtract(x, q.dequantize(), dtype=np.float64)
    return np.abs(error).max(), np.square(error).sum(), np.square(x, dtype=np.float64).sum()
three = best(copies)
for how in [
    {}, {"granularity": PerChannel(0)}, {"dtype": "int4", "granularity": PerGroup(32)}, {"dtype": "nf4"},
    {"dtype": "float8_e4m3fn"}, {"dtype": "mxfp4"},
]:
    q = aqt_lite.quantize(x, **how)
    seconds = best(lambda: aqt_lite.error_report(x, q))
    print(f"{seconds:.3f} s, {seconds / best(lambda: plainly(q)):.2f} of plain NumPy's, "
          f"{seconds / three:.1f} of three copies'  {how or 'int8'}", flush=True)
"""

STORED = "out = np.lib.format.open_memmap(path + {!r}, {!r}, {!r}, mapped.shape); "
CODES = STORED.format(".codes", "r+", "i1")
AGAIN = "q = aqt_lite.QArray.from_codes(out, np.load(path + '.scale.npy'), offset=np.load(path + '.offset.npy'), "
LARGE = [
    (
        "quantize, int8, max_abs_err=0.05, missing='nan', out=",
        STORED.format(".codes", "w+", "i1"),
        "(q := aqt_lite.quantize(mapped, max_abs_err=0.05, missing='nan', out=out)), "
        "np.save(path + '.scale', q.scale), np.save(path + '.offset', q.offset)",
    ),
    (
        "dequantize, out=",
        CODES + AGAIN + "dtype='int8_nan'); " + STORED.format(".values", "w+", "f4"),
        "q.dequantize(out=out)",
    ),
    ("error_report", CODES + AGAIN + "dtype='int8_nan')", "aqt_lite.error_report(mapped, q)"),
]
"""Of a large file, the first makes what the others read."""


def written_large(path: Path, shape: tuple[int, int]) -> None:
    """Values of 64 rows at a time, no two alike, a third of them missing."""
    import numpy as np

    whole = np.lib.format.open_memmap(path, "w+", "f4", shape)
    block = np.random.default_rng(0).standard_normal((64, shape[1]), "float32")
    block[:, ::3] = np.nan
    for start in range(0, shape[0], 64):
        whole[start : start + 64] = block[: shape[0] - start] + np.float32(280 + 3 * np.sin(start))
    whole.flush()


def measured_large(gigabytes: float, folder: str | None) -> Iterator[tuple[str, float, float, float]]:
    shape = (round(gigabytes * 1e9 / 4 / 16384), 16384)
    with tempfile.TemporaryDirectory(dir=folder) as inside:
        room, needed = shutil.disk_usage(inside).free, 2.3e9 * gigabytes
        if room < needed:
            raise SystemExit(f"{inside} has room for {room / 1e9:.1f} GB, and {needed / 1e9:.1f} GB are needed")
        path = Path(inside) / "x.npy"
        start = time.perf_counter()
        written_large(path, shape)
        print(f"{path.stat().st_size / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        for name, setup, call in LARGE:
            command = [sys.executable, "-c", PREPARED, str(path), json.dumps(shape), setup, call]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            peak, speed = json.loads(done.stdout)
            seconds = shape[0] * shape[1] / speed / 1e9
            print(f"{peak:8.0f} MB  {seconds:6.0f} s  {speed:6.3f} Gelt/s  {name}", flush=True)
            yield name, peak, seconds, speed


def table_large(rows: list[tuple[str, float, float, float]], gigabytes: float) -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    head = f"| {gigabytes:g} GB of float32, where memory is {total:.0f} GB | beside the files, MB | seconds |"
    head += " 10^9 elements/s |\n| --- | ---: | ---: | ---: |\n"
    return head + "".join(f"| {name} | {peak:.0f} | {s:.0f} | {speed:.2f} |\n" for name, peak, s, speed in rows)


def table(rows: list[tuple[str, float, float]], megabytes: int) -> str:
    head = f"| of {megabytes} MB of float32 | beside the result, MB | 10^9 elements/s |\n| --- | ---: | ---: |\n"
    return head + "".join(f"| {name} | {peak:.0f} | {speed:.2f} |\n" for name, peak, speed in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only rows with all of them in their names")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--large", action="store_true", help="a file as large as memory, instead")
    parser.add_argument("--gigabytes", type=float, default=20.0)
    parser.add_argument("--folder", help="where the large files are written; that for temporary files by default")
    parser.add_argument("--passes", action="store_true", help="the time of error_report, instead")
    options = parser.parse_args()
    if options.passes:
        return subprocess.run([sys.executable, "-c", PASSES], check=False).returncode
    if options.write and options.words:
        parser.error("--write is for the whole table")
    if options.large:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the files are deleted
        large: list[tuple[str, float, float, float]] = []
        for row in measured_large(options.gigabytes, options.folder):
            large.append(row)
            if options.write:  # each takes minutes
                write("large files", table_large(large, options.gigabytes))
        return 0 if all(peak < 200 for _, peak, *_ in large) else 1
    rows = measured(options.megabytes, options.words)
    if options.write:
        write("memory", table(rows, options.megabytes))
    return 0 if all(peak < 200 for _, peak, _ in rows) else 1


def write(name: str, table: str) -> None:
    """The table into its place on the page."""
    text, begin, end = PAGE.read_text(), BEGIN.format(name), END.format(name)
    if begin not in text or end not in text:
        raise SystemExit(f"{PAGE.name} has no {begin.strip()} ... {end}")
    start, stop = text.index(begin) + len(begin), text.index(end)
    PAGE.write_text(text[:start] + table + text[stop:])


if __name__ == "__main__":
    sys.exit(main())
