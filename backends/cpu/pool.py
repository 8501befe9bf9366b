"""Threads that wait in compiled code, and so begin without the interpreter's lock.

Owns: the words that they and their callers share, and the threads. Imports: ``native``. A loop is cut so::

    @njit(nogil=True)
    def _part(given, start, stop):
        x, y = given
        y[start:stop] = -x[start:stop]

    _task = task_of(_part)

    @njit(nogil=True, cache=True)
    def negate(pool, ends, x, y):
        in_parts(pool, ends, _task((x, y)))
        return True

    runtime.in_parts(negate, steps, ends, x, y)  # from Python, ``ends`` as ``stored.ends_of_parts`` makes them: int64

A pool works on one job at a time: a caller that finds it taken does all its parts itself, for then there are as many
callers as cores already. Callers claim parts as the pool's threads do. At the end they wait for threads that have begun
a part, but for none that has not: another library's threads may keep it from a core.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from numba import cfunc, njit, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from aqt_lite.backends.cpu.native import (
    MASK,
    atomic_add,
    atomic_load,
    atomic_store,
    call3,
    call5,
    compare_and_swap,
    condition_init,
    condition_signal,
    condition_wait,
    float_mode,
    leave_core,
    load64,
    mutex_init,
    mutex_lock,
    mutex_unlock,
    set_float_mode,
    store64,
    this_core,
    yield_core,
)

# What callers and threads share is a block of int64 words. Those that several threads write are a cache line apart.
RUN = 0  # the address of ``_run``: what is compiled elsewhere knows no more of this file than where this is
TAKEN = 64  # whether a caller has the pool
GENERATION = 128  # how many jobs there have been; threads wait for it to change
OPEN = 192  # whether there is a job to take part in
NEXT = 256  # the first part that nobody has claimed
INSIDE = 320  # threads that may be at work on a part
ASLEEP = 384  # threads that have to be woken
TASK, GIVEN, ENDS, PARTS = 448, 456, 464, 472  # the job
CORE = 480  # where the last caller was, of a job or for Python
MODE = 488  # how its caller rounds floats
STOPPED = 496  # whether threads are to end
FAILED = 512  # parts that raised an exception
SUMMONS = 576  # calls of Python that nobody has begun
MODE_OF_SUMMONER = 584  # how who last asked for Python rounds floats
MUTEX, CONDITION = 640, 704  # the largest of any system have 64 bytes
LEAST = 768  # cores that a thread is allowed where it may leave one of them
SIZE = 832

LOOKS = 400
"""How often a thread that is done looks for the next job before it sleeps: for some 200 microseconds."""


@njit
def _work(pool: Any) -> Any:  # pragma: no cover - compiled
    """Do parts until all are claimed; return how many failed."""
    task, given, ends, parts = load64(pool + TASK), load64(pool + GIVEN), load64(pool + ENDS), load64(pool + PARTS)
    failed = 0
    while True:
        i = atomic_add(pool + NEXT, 1)
        if i >= parts:
            return failed
        failed += call3(task, (given, load64(ends + 8 * i), load64(ends + 8 * i + 8)))


@njit
def _wake(pool: Any, most: Any) -> None:  # pragma: no cover - compiled
    asleep = min(atomic_load(pool + ASLEEP), most)
    if asleep > 0:
        mutex_lock(pool + MUTEX)  # who has looked before GENERATION changed sleeps from now on, and hears the signal
        mutex_unlock(pool + MUTEX)
        for _ in range(asleep):
            condition_signal(pool + CONDITION)


@njit
def _stay_apart(pool: Any, core: Any, own: Any) -> None:  # pragma: no cover - compiled
    """Leave the core that a caller runs on."""
    if core == this_core():
        leave_core(core, load64(pool + LEAST), own)


def _run(pool: Any, task: Any, given: Any, ends: Any, parts: Any) -> Any:  # pragma: no cover - compiled
    """Do a job of so many parts; return how many failed."""
    if parts == 1 or not compare_and_swap(pool + TAKEN, 0, 1):
        return call3(task, (given, load64(ends), load64(ends + 8 * parts)))
    store64(pool + TASK, task)
    store64(pool + GIVEN, given)
    store64(pool + ENDS, ends)
    store64(pool + PARTS, parts)
    atomic_store(pool + CORE, this_core())
    store64(pool + MODE, float_mode())
    atomic_store(pool + NEXT, 0)
    atomic_store(pool + FAILED, 0)
    atomic_store(pool + OPEN, 1)
    atomic_add(pool + GENERATION, 1)
    _wake(pool, parts - 1)
    failed = _work(pool)
    # A thread counts itself in before it looks whether a job is open. So either it sees that this one is not, or it is
    # waited for here.
    atomic_store(pool + OPEN, 0)
    while atomic_load(pool + INSIDE) != 0:
        yield_core()
    failed += atomic_load(pool + FAILED)
    atomic_store(pool + TAKEN, 0)
    return failed


@njit(nogil=True, cache=True)
def _serve(pool: Any, own: Any) -> None:  # pragma: no cover - compiled
    """Take part in jobs until Python is asked for, or the pool is stopped; ``own`` is for ``leave_core``.

    A thread rounds floats as whom it works for, and so a part has the bits that its caller would make: threads of XLA,
    and of who asks for that, take subnormal numbers for 0.
    """
    seen = 0
    while True:
        for _ in range(LOOKS):
            if atomic_load(pool + GENERATION) != seen:
                break
            yield_core()
        if atomic_load(pool + GENERATION) == seen:
            mutex_lock(pool + MUTEX)
            atomic_add(pool + ASLEEP, 1)
            while atomic_load(pool + GENERATION) == seen:
                condition_wait(pool + CONDITION, pool + MUTEX)
            atomic_add(pool + ASLEEP, -1)
            mutex_unlock(pool + MUTEX)
        seen = atomic_load(pool + GENERATION)
        if atomic_load(pool + STOPPED) != 0:
            return
        # Also where what was asked for is done: this thread may have waited for its caller's core, and would so again.
        _stay_apart(pool, atomic_load(pool + CORE), own)
        if atomic_load(pool + SUMMONS) > 0:
            set_float_mode(atomic_load(pool + MODE_OF_SUMMONER))
            return
        atomic_add(pool + INSIDE, 1)
        if atomic_load(pool + OPEN) != 0:
            set_float_mode(load64(pool + MODE))
            atomic_add(pool + FAILED, _work(pool))
        atomic_add(pool + INSIDE, -1)


@functools.cache
def prepared() -> Any:
    """``_run`` for C, which has to outlive all pools; compiled before threads are, which a signal may come between."""
    return cfunc(types.int64(*[types.int64] * 5), cache=True)(_run)


@njit(cache=True)
def _prepare(pool: Any, run: Any, least: Any) -> None:  # pragma: no cover - compiled
    store64(pool + RUN, run)
    store64(pool + LEAST, least)
    store64(pool + CORE, -1)
    mutex_init(pool + MUTEX, 0)
    condition_init(pool + CONDITION, 0)


@njit(nogil=True, cache=True)
def _summon(pool: Any, summons: Any) -> None:  # pragma: no cover - compiled
    """Ask for Python so many times more, or less."""
    if summons > 0:
        atomic_store(pool + CORE, this_core())
        atomic_store(pool + MODE_OF_SUMMONER, float_mode())
    atomic_add(pool + SUMMONS, summons)
    if summons > 0:
        atomic_add(pool + GENERATION, 1)
        _wake(pool, summons)


@njit(nogil=True, cache=True)
def _stop(pool: Any) -> None:  # pragma: no cover - compiled
    atomic_store(pool + STOPPED, 1)
    atomic_add(pool + GENERATION, 1)
    _wake(pool, atomic_load(pool + ASLEEP))


@intrinsic
def check_ends(typingctx: Any, ends: Any) -> Any:
    """Refuse, where a loop is compiled, what is no contiguous array of int64."""
    if not isinstance(ends, types.Array) or ends.dtype != types.int64 or ends.layout != "C":
        raise TypingError(f"ends: {ends} is no contiguous array of int64")
    return types.void(ends), lambda context, *_: context.get_dummy_value()


@njit
def in_parts(pool: Any, ends: Any, task: Any) -> None:  # pragma: no cover - compiled
    """Do parts ``[ends[i], ends[i + 1])`` of a task, with the threads of a pool where ``pool`` is no 0.

    ``ends`` are contiguous int64: threads read them as they lie. Raises MemoryError where a part raised anything, for
    want of memory is all that loops know.
    """
    check_ends(ends)
    function, given = task
    if pool == 0:
        failed = call3(function, (given, ends[0], ends[-1]))
    else:
        failed = call5(load64(pool + RUN), (pool, function, given, ends.ctypes.data, len(ends) - 1))
    if failed != 0:
        raise MemoryError("there is no memory for what a compiled loop keeps")


class Pool:
    """``threads`` threads beside the callers', for loops and for Python; they end when the process does.

    A virtual machine that was idle may wake a thread on the core of the one that wakes it, and leave both there for 40
    ms though another core is idle: each call then takes as long as with one thread. So a thread that finds itself there
    leaves, and stays away from that core until it meets a caller on another one.
    """

    def __init__(self, threads: int) -> None:
        memory = np.zeros(SIZE + 64, np.uint8)
        start = -memory.ctypes.data % 64
        self._memory = memory[start : start + SIZE]
        self.address = int(self._memory.ctypes.data)
        self._process = os.getpid()
        # a caller that is confined to fewer cores is not to confine the threads
        _prepare(self.address, prepared().address, max(threads + 1, 2))
        self._calls, self._stopped = SimpleQueue[Callable[[], Any]](), False
        self._threads = [threading.Thread(target=self._work, name=f"aqt_lite_{i}", daemon=True) for i in range(threads)]
        # none can be started, perhaps because the interpreter is shutting down: callers do all by themselves
        with contextlib.suppress(RuntimeError):
            for thread in self._threads:
                thread.start()
        atexit.register(self.stop)  # before what is compiled goes

    def submit(self, call: Callable[[], Any]) -> None:
        """Let a thread call Python, when one comes to it; RuntimeError where none will."""
        if self._stopped:
            raise RuntimeError("the interpreter is shutting down")
        self._calls.put(call)
        _summon(self.address, 1)

    def _work(self) -> None:
        own = np.zeros(2 * MASK, np.int64)
        while not self._stopped:
            _serve(self.address, own.ctypes.data)
            with contextlib.suppress(Empty):
                while not self._stopped:
                    call = self._calls.get_nowait()
                    _summon(self.address, -1)
                    call()
                    del call  # and what it keeps

    def stop(self) -> None:
        """End the threads; callers do all by themselves from now on."""
        self._stopped = True
        atexit.unregister(self.stop)
        if os.getpid() == self._process:  # a child that was forked has none, and perhaps a mutex that was locked
            _stop(self.address)
            for thread in self._threads:
                if thread.ident is not None:
                    thread.join()
