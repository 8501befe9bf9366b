"""The CPU library: what its compiled loops hold twice, and what it says it serves."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest

import aqt_lite
from aqt_lite import PerChannel, affine
from aqt_lite._dispatch import run
from aqt_lite._kernels import Kernel, anything, plain_integers
from aqt_lite._registry import get_backend, kernels_of
from aqt_lite.backends.cpu import fixed_point, integers, runtime, serve
from aqt_lite.elements import float_type
from aqt_lite.formats import FORMATS
from aqt_lite.ops import reference

dots = pytest.importorskip("aqt_lite.backends.cpu.dots")


# ---- constants of the contract that numba compiles in: it caches by file, so each file has its own


@pytest.mark.parametrize("name", ["SMALLEST", "SMALL", "MANY", "FINEST", "BITS"])
def test_constants_of_the_fixed_point_loops_are_the_reference_s(name):
    assert getattr(dots, name) == getattr(reference, name)


def test_the_largest_fraction_of_the_loops_is_the_reference_s():
    bits = np.float32(reference.MOST_FRACTION).view(np.int32)
    assert int(bits) & 0x7FFFFF == dots.MOST_FRACTION
    digits = 4
    largest = 127 * sum(256**i for i in range(digits))  # of so many balanced digits of 8 bits
    assert reference.MOST_FRACTION * 2.0**reference.BITS <= largest < 2 * 2.0**reference.BITS


def test_high_and_low_parts_of_the_loops_are_the_reference_s():
    b, total = get_backend("numpy"), 5 * (1 << dots.LOW_BITS) + 7
    x, w = np.full((1, 1, 1), total, np.int32), np.ones((1, 1, 1), np.int8)
    high, low = reference.fixed_point_matmul(x, w, None, b=b)
    assert (int(high[0, 0, 0]), int(low[0, 0, 0])) == (5, 7)
    assert [int(part[0, 0, 0]) for part in fixed_point.fixed_point_matmul(x, w, None)] == [5, 7]
    assert 2.0**dots.LOW_BITS == dots.CARRY


def test_the_table_of_powers_is_what_the_loops_index():
    table = fixed_point.powers_of_two()
    assert table.shape == (512,)
    for e in (-100, -1, 0, 30, 127):
        assert table[e + 256] == 2.0**e
    assert table[-101 + 256] == 0


def test_the_longest_sums_fit_the_lanes_that_add_them():
    """Unsigned digits of 8 bits times codes of 8 bits, in int32; 31 bits times 9, in the 53 bits of float64."""
    assert reference.LONGEST_PIECE * 255 * 128 < 2**31
    assert (1 << 31) * (1 << 8) * integers.LONGEST_EXACT <= 2**53


# ---- what is served


def spec_of(name):
    return affine.Spec(FORMATS[name], float_type("float32"), (1, None))


PLAIN = [f"{sign}int{n}" for sign in ("", "u") for n in (4, 5, 6, 7, 8, 16)]


@pytest.mark.parametrize("name", FORMATS)
def test_plain_integers_are_those_whose_codes_are_the_numbers(name):
    """Of fewer than 4 bits the largest scales want headroom, which loops do not know."""
    assert plain_integers({"spec": spec_of(name)}) == (name in PLAIN)
    recipes = [affine.Recipe(rounding="half_away"), affine.Recipe(symmetric=False, offset=True)]
    assert not any(plain_integers({"spec": spec_of(name), "recipe": recipe}) for recipe in recipes)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "nf4", "float6_e2m3fn", "int2"])
def test_codes_that_are_kept_in_bytes_but_mean_something_else_reach_no_kernel(name, backend):
    """Large enough for every kernel: no product is offered them, whatever their arrays look like."""
    element = FORMATS[name].element
    codes = np.random.default_rng(0).integers(0, 8, (600, 700)).astype(element.storage)
    zero = np.zeros((600, 1), np.int32) if element.storage == "uint8" else None
    parts = (codes, np.ones((600, 1), np.float32), zero)
    w = affine.Coded(*(None if a is None else backend.asarray(a) for a in parts))
    called = []

    def watched(*arrays, **static):
        called.append(static)
        return NotImplemented

    x = backend.asarray(np.ones((2, 700), np.float32))
    for operation, arguments, static in [
        (reference.matmul, (x, w, None), {"contract": 1}),
        (reference.matmul_reproducible, (x, w, None), {"contract": 1}),
    ]:
        kernel = kernels_of(backend.name).get(operation)
        if kernel is None:
            continue
        table = {**kernels_of(backend.name), operation: Kernel(watched, kernel.serves)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(aqt_lite._registry._loaded_kernels, backend.name, table)
            if operation is reference.matmul:
                run(backend, operation, *arguments, spec=spec_of(name), **static)
            else:
                assert not kernel.serves({"spec": spec_of(name), **static})
            assert not called
            run(backend, operation, *arguments, spec=spec_of(element.storage), **static)
            assert called, "and a plain integer is offered"
            called.clear()


def test_an_adapter_from_elsewhere_may_bring_kernels():
    class Outside(type(get_backend("numpy"))):
        name = "outside"

        def kernel(self, operation):
            return Kernel(lambda x, w: "mine", anything) if operation is reference.integer_matmul else None

    x = np.ones((1, 1), np.int8)
    assert run(Outside(), reference.integer_matmul, x, x) == "mine"
    assert run(get_backend("numpy"), reference.integer_matmul, x, x) == 1


def test_rows_of_one_scale():
    x = np.zeros((6, 4, 10), np.float32)
    for block, grid, expected in [
        ((None, None, None), (1, 1, 1), (1, 240)),
        ((1, None, None), (6, 1, 1), (6, 40)),
        ((1, 2, None), (6, 2, 1), (12, 20)),
        ((1, 1, 5), (6, 4, 2), (48, 5)),
        ((1, 1, 1), (6, 4, 10), (240, 1)),
        ((1, 3, None), (6, 2, 1), None),  # a shorter last group
        ((None, 1, None), (1, 4, 1), None),  # a scale for each index of an axis in the middle
    ]:
        assert serve.rows_of_one_scale(x, grid, block) == expected, block
    assert serve.rows_of_one_scale(np.asfortranarray(x), (6, 1, 1), (1, None, None)) is None


def test_dots_serve_only_what_their_sums_hold(monkeypatch):
    monkeypatch.setattr(runtime, "integer_dots", lambda: dots)
    q = aqt_lite.quantize(np.ones((3, 64), np.float32), granularity=PerChannel(0))
    w, x = affine.Coded(q.qvalue, q.scale), np.ones((1, 64), np.float32)
    spec = spec_of("int8")
    assert serve.dots(x, "float32", w, spec, 1)
    assert not serve.dots(x, "float64", w, spec, 1)
    assert not serve.dots(x, "float32", w, spec, 0)
    assert not serve.dots(x, "float32", w, spec_of("int16"), 1)
    long = affine.Coded(np.zeros((1, reference.LONGEST_PIECE + 1), np.int8), q.scale[:1])
    assert not serve.dots(np.ones(long.codes.shape, np.float32), "float32", long, spec, 1)
    monkeypatch.setattr(runtime, "integer_dots", lambda: None)
    assert not serve.dots(x, "float32", w, spec, 1)


# ---- threads, and what is compiled ahead of time


def test_cores_are_the_least_of_what_is_allowed(monkeypatch):
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    monkeypatch.setattr(runtime, "_cores_of_control_group", list)
    for said, cores in [({}, there), ({"OMP_NUM_THREADS": "1"}, 1), ({"NUMBA_NUM_THREADS": "1"}, 1),
                        ({"OMP_NUM_THREADS": "1,4"}, 1), ({"OMP_NUM_THREADS": "many"}, there),
                        ({"OMP_NUM_THREADS": "0"}, there), ({"OMP_NUM_THREADS": "9999"}, there)]:  # fmt: skip
        for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in said.items():
            monkeypatch.setenv(name, value)
        assert runtime.cores.__wrapped__() == cores
    monkeypatch.setattr(runtime, "_cores_of_control_group", lambda: [1])
    assert runtime.cores.__wrapped__() == 1


def test_control_groups_of_both_versions(tmp_path):
    of_first, of_second = tmp_path / "first", tmp_path / "second"
    (of_first / "cpu").mkdir(parents=True)
    of_second.mkdir()
    (of_first / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    of_group = runtime._cores_of_control_group
    for quota, cores in (("150000", [2]), ("-1", []), ("5000", [1]), ("", [])):
        (of_first / "cpu" / "cpu.cfs_quota_us").write_text(quota + "\n")
        assert of_group(str(of_first)) == cores
    for line, cores in (("300000 100000", [3]), ("max 100000", []), ("nonsense", [])):
        (of_second / "cpu.max").write_text(line + "\n")
        assert of_group(str(of_second)) == cores
    assert of_group(str(tmp_path / "nowhere")) == []


def test_control_groups_that_lie_in_others(tmp_path):
    second, first, process = tmp_path / "second", tmp_path / "first", tmp_path / "cgroup"
    inner = second / "user.slice" / "job"
    inner.mkdir(parents=True)
    (second / "user.slice" / "cpu.max").write_text("400000 100000\n")
    (inner / "cpu.max").write_text("max 100000\n")
    process.write_text("4:memory:/elsewhere\n3:cpu,cpuacct:/a/b\n0::/user.slice/job\n")
    assert runtime._cores_of_control_group(str(second), str(process)) == [4]
    (inner / "cpu.max").write_text("150000 100000\n")
    assert sorted(runtime._cores_of_control_group(str(second), str(process))) == [2, 4]
    (first / "cpu" / "a" / "b").mkdir(parents=True)
    for name, text in (("cpu.cfs_quota_us", "200000"), ("cpu.cfs_period_us", "100000")):
        (first / "cpu" / "a" / "b" / name).write_text(text + "\n")
    assert runtime._cores_of_control_group(str(first), str(process)) == [2]
    process.write_text("nonsense\n")
    assert runtime._cores_of_control_group(str(first), str(process)) == []


THREADS = """
import sys, threading
import numpy as np, aqt_lite
from aqt_lite.backends.cpu import runtime
x = np.ones((600, 700), "float32")
w = aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0))
def work():
    for _ in range(3):
        aqt_lite.linear(x[:4], w), aqt_lite.quantize(x), w.dequantize()
callers = [threading.Thread(target=work) for _ in range(8)]
[t.start() for t in callers], [t.join() for t in callers]
print(runtime.cores(), sum(t.name.startswith("aqt_lite") for t in threading.enumerate()))
"""


@pytest.mark.parametrize("said", ["", "1"])
def test_many_callers_share_one_pool_of_threads(said):
    environment = {**os.environ, "OMP_NUM_THREADS": said}
    done = subprocess.run([sys.executable, "-c", THREADS], env=environment, capture_output=True, text=True, check=True)
    cores, started = map(int, done.stdout.split())
    assert started < cores
    assert cores == 1 or not said


def test_warming_up_compiles_what_large_arrays_reach(backend):
    taken = aqt_lite.warm_up(shape=(512, 512), rows=[1, 4], backend=backend.name)
    steps = [f"linear, {rows} rows, {mode}" for rows in (1, 4) for mode in ("fast", "reproducible")]
    assert list(taken) == ["quantize", "dequantize", *steps]
    assert all(seconds > 0 for seconds in taken.values())
    loops = runtime.integer_dots() or runtime.compiled_loops()
    if loops is not None and backend.name in ("numpy", "torch"):
        assert any(getattr(f, "signatures", None) for f in vars(loops).values())
    with pytest.raises(ValueError, match="modes='slow' is not known: use 'fast' or 'reproducible'"):
        aqt_lite.warm_up(modes=["slow"], backend=backend.name)


def test_warming_up_takes_the_modes_that_an_array_has_and_names_what_is_wrong():
    small = {"shape": (8, 64), "rows": [2]}
    assert "linear, 2 rows, reproducible" in aqt_lite.warm_up("int4", granularity=aqt_lite.PerGroup(32), **small)
    assert list(aqt_lite.warm_up("nf4", **small)) == ["quantize", "dequantize", "linear, 2 rows, fast"]
    assert list(aqt_lite.warm_up(modes="fast", **small)) == ["quantize", "dequantize", "linear, 2 rows, fast"]
    of_dense = aqt_lite.warm_up("int4", granularity=aqt_lite.PerGroup(8, 0), product="dense", modes="fast", **small)
    assert list(of_dense) == ["quantize", "dequantize", "dense, 2 rows, fast"]
    for kind, words, how in [
        (ValueError, "mode='reproducible' is not possible", {"dtype": "nf4", "modes": ["reproducible"], **small}),
        (ValueError, r"shape=\(3,\): give two lengths \(out, in\)", {"shape": (3,)}),
        (ValueError, r"shape=\(0, 8\): give two lengths", {"shape": (0, 8)}),
        (TypeError, "shape=8: give two lengths", {"shape": 8}),
        (TypeError, "rows=3: give a sequence", {"rows": 3}),
        (ValueError, r"rows=\[0\]: give a sequence of numbers from 1 on", {"rows": [0]}),
        (
            ValueError,
            r"modes='repro' is not known \(did you mean 'reproducible'\?\): use 'fast' or",
            {"modes": "repro"},
        ),
        (TypeError, r"modes=1: give a mode or a sequence of modes, modes=\('fast', 'reproducible'\)", {"modes": 1}),
    ]:
        with pytest.raises(kind, match=words):
            aqt_lite.warm_up(**how)


@pytest.mark.skipif(runtime.cores() < 2, reason="there are no threads beside the caller's")
def test_threads_that_never_came_to_their_turn_keep_no_arrays():
    """The pool is busy with something else: what is queued there must not hold on to what is done."""
    wait, ended, given = threading.Event(), threading.Semaphore(0), np.zeros(8)
    for _ in range(runtime.cores() - 1):
        runtime._pool().submit(lambda: (wait.wait(), ended.release()))
    seen = weakref.ref(given)
    try:
        runtime.map_ranges(lambda start, stop, given=given: given[start:stop].sum(), 8, elements=runtime.LARGE)
        del given
        assert seen() is None
    finally:
        wait.set()
        for _ in range(runtime.cores() - 1):
            assert ended.acquire(timeout=60)


def test_threads_found_on_their_caller_s_core_are_kept_off_it(monkeypatch):
    told, core, allowed, caller = [], {"caller": 0, "other": 1}, {0, 1, 2}, threading.get_ident()
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    monkeypatch.setattr(runtime, "_core", lambda: core["caller" if threading.get_ident() == caller else "other"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(allowed), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *of_thread: told.append(of_thread), raising=False)
    pool = runtime._Pool()

    def told_in_a_call():
        told.clear()
        thread = pool.submit(threading.get_native_id).result()
        return [cores for number, cores in told if number == thread]

    try:
        assert [told_in_a_call() for _ in range(3)] == [[], [], []], "where threads are apart nothing is told"
        core["caller"] = 1
        assert told_in_a_call() == []
        assert told_in_a_call() == [{0, 2}], "found there in the call before"
        core["other"] = 0
        assert told_in_a_call() == [], "as long as the caller stays"
        core["caller"] = 2
        assert told_in_a_call() == [{0, 1}]
        allowed, core["caller"] = {1}, 1
        assert told_in_a_call() == [], "a caller that is confined confines nobody"
    finally:
        pool._executor.shutdown()


@pytest.mark.skipif(runtime.compiled_loops() is None, reason="numba is not installed")
def test_numba_without_a_folder_for_its_cache_is_told_of_once():
    code = """
import warnings, numpy as np
from numba.core import caching
def refuse(*_): raise RuntimeError("cannot cache function: no locator available")
(getattr(caching, 'CacheImpl', None) or caching._CacheImpl).__init__ = refuse
import aqt_lite
w = np.ones((512, 512), "float32")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    q = aqt_lite.quantize(w, "int4", granularity=aqt_lite.PerGroup(32))
    assert (aqt_lite.linear(w[:1], q) == 512).all() and (aqt_lite.linear(w[:9], q) == 512).all()
told = [str(c.message) for c in caught if c.category is RuntimeWarning]
assert len(told) == 1 and "set NUMBA_CACHE_DIR" in told[0], told
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("size", "place"), [(runtime.LARGE, 64), (4 << 20, runtime.HUGE)])
def test_results_begin_on_a_line_of_cache_and_large_ones_on_a_huge_page(size, place):
    kept = [runtime.aligned_empty((size >> 10, 1 << 10), np.uint8) for _ in range(3)]
    assert all(a.ctypes.data % place == 0 and a.flags.c_contiguous and a.flags.writeable for a in kept)


@pytest.mark.skipif(runtime.compiled_loops() is None, reason="there are no loops without numba")
@pytest.mark.parametrize("dtype", ["uint8", "float32", "int64"])
def test_what_loops_compute_in_begins_on_a_line_of_cache(dtype):
    from aqt_lite.backends.cpu.lines import on_lines

    kept = [on_lines(3, width, getattr(np, dtype)) for width in range(1, 40)]
    assert all(a.ctypes.data % 64 == 0 and a.shape == (3, i + 1) for i, a in enumerate(kept))
    for i, a in enumerate(kept):
        a[:] = i
    assert all((a == i).all() for i, a in enumerate(kept))


def used_by_address_alone(function):
    """Arrays that a compiled function makes and whose address is the last that it asks of them, outside of loops."""
    names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
    made = {n.id: n.lineno for n in reversed(names) if isinstance(n.ctx, ast.Store)}
    last = {n.id: max(m.lineno for m in names if m.id == n.id) for n in names if n.id in made}
    loops = [n for n in ast.walk(function) if isinstance(n, ast.For | ast.While)]
    addresses = [n for n in ast.walk(function) if isinstance(n, ast.Attribute) and n.attr == "ctypes"]
    for name in made:
        in_loop = any(made[name] < loop.lineno <= last[name] <= loop.end_lineno for loop in loops)
        asked = [n.lineno for n in addresses if ast.unparse(n.value).partition("[")[0] == name]
        if last[name] in asked and not in_loop:
            yield name


def test_no_array_of_a_loop_is_freed_while_its_address_is_used():
    """numba frees an array after its last use, and an address is none."""
    found = ast.parse("@njit()\ndef f():\n    a = np.empty(3)\n    p = a.ctypes.data\n    g(p)").body[0]
    assert list(used_by_address_alone(found)) == ["a"]
    files = (Path(aqt_lite.backends.cpu.__file__).parent.parent).glob("*/*.py")
    functions = [n for file in files for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.FunctionDef)]
    compiled = [f for f in functions if any("njit" in ast.unparse(d) for d in f.decorator_list)]
    assert len(compiled) > 100
    assert [(f.name, *used_by_address_alone(f)) for f in compiled if any(used_by_address_alone(f))] == []
