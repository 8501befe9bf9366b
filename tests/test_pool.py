"""Threads that wait in compiled code."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from aqt_lite.backends.cpu import runtime

pytestmark = pytest.mark.skipif(
    runtime.compiled_loops() is None or os.name == "nt", reason="threads wait in Python without numba or POSIX threads"
)

if runtime.compiled_loops() is not None:
    from numba import njit

    from aqt_lite.backends.cpu.native import MASK, float_mode, leave_core, set_float_mode, task_of
    from aqt_lite.backends.cpu.pool import Pool, _serve, in_parts

    @njit(nogil=True)
    def _count(given, start, stop):  # pragma: no cover - compiled
        times, bad = given
        if start <= bad < stop:
            raise ValueError
        times[start:stop] += 1

    _task = task_of(_count)

    @njit(nogil=True)
    def count(pool, ends, times, bad):  # pragma: no cover - compiled
        in_parts(pool, ends, _task((times, bad)))
        return True

    @njit
    def leave(core, least, own):  # pragma: no cover - compiled
        leave_core(core, least, own)

    @njit
    def mode():  # pragma: no cover - compiled
        return float_mode()

    @njit
    def set_mode(mode):  # pragma: no cover - compiled
        set_float_mode(mode)

    @njit(nogil=True)
    def _double(given, start, stop):  # pragma: no cover - compiled
        x, y = given
        for i in range(start, stop):
            y[i] = x[i] * np.float32(2)

    _task_of_double = task_of(_double)

    @njit(nogil=True)
    def double(pool, ends, x, y):  # pragma: no cover - compiled
        in_parts(pool, ends, _task_of_double((x, y)))

    FLUSHES = 0x8040 if platform.machine().lower() in ("x86_64", "amd64") else 1 << 24


@pytest.fixture(scope="module")
def pool():
    """Three threads, more than there may be cores: they are to take turns."""
    made = Pool(3)
    yield made
    made.stop()
    assert not any(thread.is_alive() for thread in made._threads)


def test_every_part_is_done_once(pool):
    times = np.zeros(1000, np.int64)
    for parts in (1, 2, 3, 7, 100):
        ends = np.linspace(0, 1000, parts + 1).astype(np.int64)
        for address in (pool.address, 0):
            for _ in range(200):
                times[:] = 0
                count(address, ends, times, -1)
                assert (times == 1).all()


def test_callers_that_come_together_get_all_of_theirs_done(pool):
    ends, failures = np.arange(0, 65, 4), []

    def call():
        times = np.zeros(64, np.int64)
        for n in range(1, 501):
            count(pool.address, ends, times, -1)
            if not (times == n).all():
                failures.append(times.copy())

    callers = [threading.Thread(target=call) for _ in range(6)]
    [t.start() for t in callers], [t.join() for t in callers]
    assert not failures


def test_a_part_that_fails_fails_the_call_and_no_other(pool):
    ends, times = np.arange(0, 65, 4), np.zeros(64, np.int64)
    for bad in (0, 33, 63):
        for address in (pool.address, 0):
            with pytest.raises(MemoryError, match="a compiled loop"):
                count(address, ends, times, bad)
            times[:] = 0
            count(address, ends, times, -1)
            assert (times == 1).all()


def test_python_is_called_beside_loops(pool):
    ends, times, called = np.arange(0, 65, 4), np.zeros(64, np.int64), []
    for n in range(1, 301):
        pool.submit(lambda n=n: called.append((n, threading.current_thread().name)))
        count(pool.address, ends, times, -1)
        assert (times == n).all()
    until = time.monotonic() + 60
    while len(called) < 300 and time.monotonic() < until:
        time.sleep(0.001)
    assert sorted(n for n, _ in called) == list(range(1, 301))
    assert all(name.startswith("aqt_lite") for _, name in called)


def test_a_pool_that_has_stopped_leaves_all_to_its_callers():
    ended, times = Pool(2), np.zeros(64, np.int64)
    ended.stop()
    ended.stop()
    count(ended.address, np.arange(0, 65, 4), times, -1)
    assert (times == 1).all()
    with pytest.raises(RuntimeError, match="shutting down"):
        ended.submit(print)


FORKED = """
import os, sys, numpy as np, aqt_lite
rng = np.random.default_rng(0)
q = aqt_lite.quantize(rng.standard_normal((1024, 2048), dtype="float32"), "int4", granularity=aqt_lite.PerGroup(32))
x = rng.standard_normal((1, 2048), dtype="float32")
y = aqt_lite.linear(x, q)
child = os.fork()
if child == 0 and os.getuid() == 0:  # as servers do, which then may not write into numba's cache
    os.setuid(65534)
same = (aqt_lite.linear(x, q) == y).all()
if child == 0:
    sys.exit(0 if same else 1)
assert same
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_makes_a_pool_of_its_own_and_ends():
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout == "0\n", done.stderr


def test_a_thread_leaves_a_core_and_comes_back_for_another():
    if not hasattr(os, "sched_getaffinity") or len(allowed := os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core, or the system does not tell")
    own, seen, (one, other) = np.zeros(2 * MASK, np.int64), [], sorted(allowed)[:2]

    def moves():
        for core in (one, other):
            leave(core, 2, own.ctypes.data)
            seen.append(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {other})  # somebody confines it
        leave(other, 2, own.ctypes.data)
        seen.append(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed)
        leave(one, len(allowed) + 1, own.ctypes.data)  # there are more threads than cores
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=moves)
    thread.start(), thread.join()
    assert seen == [allowed - {one}, allowed - {other}, {other}, allowed]


def test_a_thread_that_waited_for_its_callers_core_leaves_it():
    """It may be kept off the other one since an earlier caller was there, and would come late to every job."""
    if not hasattr(os, "sched_getaffinity") or len(allowed := os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core, or the system does not tell")
    pool, own, (one, other) = Pool(0), np.zeros(2 * MASK, np.int64), sorted(allowed)[:2]

    def served():
        os.sched_setaffinity(0, {one, other})
        leave(one, 2, own.ctypes.data)
        _serve(pool.address, own.ctypes.data)

    thread = threading.Thread(target=served)
    x, ends = np.ones(2, np.float32), np.arange(3)
    try:
        thread.start()
        os.sched_setaffinity(0, {other})
        for _ in range(2000):
            double(pool.address, ends, x, np.empty_like(x))
            time.sleep(0.001)
            if os.sched_getaffinity(thread.native_id) == {one}:
                break
        assert os.sched_getaffinity(thread.native_id) == {one}
    finally:
        os.sched_setaffinity(0, allowed)
        pool.stop()
        thread.join()


def test_parts_round_floats_as_their_caller_does(pool):
    """Threads of XLA take subnormal numbers for 0."""
    x = np.full(1 << 14, 1e-39, np.float32)
    y, ends, usual = np.empty_like(x), np.arange(0, x.size + 1, 64), mode()
    try:
        for kept in (True, False, True):
            set_mode(usual if kept else usual | FLUSHES)
            for _ in range(50):
                double(pool.address, ends, x, y)
                assert len(np.unique(y.view(np.int32))) == 1
                assert (y.view(np.int32)[0] != 0) == kept
    finally:
        set_mode(usual)
