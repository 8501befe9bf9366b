"""Threads that wait in compiled code."""

from __future__ import annotations

import os
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

    from aqt_lite.backends.cpu.native import task_of
    from aqt_lite.backends.cpu.pool import Pool, in_parts

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


def test_threads_leave_the_core_of_their_caller():
    """Held there by the test, they move as soon as they take part."""
    if not hasattr(os, "sched_getaffinity") or len(allowed := os.sched_getaffinity(0)) < 2:
        pytest.skip("there is one core, or the system does not tell")
    made, times, ends = Pool(1), np.zeros(1 << 16, np.int64), np.arange(0, (1 << 16) + 1, 1 << 10)
    (thread,), own = made._threads, min(allowed)
    try:
        os.sched_setaffinity(0, {own})
        until, moved = time.monotonic() + 60, False
        while not moved and time.monotonic() < until:
            os.sched_setaffinity(thread.native_id, {own})
            for _ in range(50):
                count(made.address, ends, times, -1)
            moved = own not in os.sched_getaffinity(thread.native_id)
        assert moved
        assert os.sched_getaffinity(thread.native_id) == allowed - {own}
    finally:
        os.sched_setaffinity(0, allowed)
        made.stop()
