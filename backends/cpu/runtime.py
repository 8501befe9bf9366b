"""What every form of the CPU library stands on: threads, memory and caches, and the loading of compiled loops.

Owns: the thread pool, and whether there are compiled loops here. Imports: nothing of this package but those loops.
ufuncs, BLAS and the loops release the interpreter's lock, so plain threads serve. docs/performance-tried.md says what
was tried and what each gave.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from aqt_lite._namespace import Array
from aqt_lite._progress import told

LARGE = 1 << 17
"""Arrays of fewer elements are not worth threads, nor the time that loading compiled loops takes."""

BLOCK = 1 << 18
"""Elements that a thread works on at a time: 1 MB of float32, half of a usual second-level cache."""

EINSUM_BUFFER = 1 << 15
"""Codes that einsum converts at a time: 128 KB of float32, well inside a core's own cache."""

CHUNKS_PER_CORE = 8
"""For work that is cheap to cut: with one chunk for each core, all would wait for a core that another program has."""


LARGE_LOOPS = 3 << 22
"""Steps of compiled loops for which Python starts other threads: some tenths of a millisecond, as starting takes."""

LARGE_PARTS = 1 << 21
"""The same for threads that wait in compiled code (``in_parts``): some hundredths of a millisecond."""


LONG = 1 << 35
"""Steps of which a call takes a second and longer."""


def steps_of_product(codes: int, rows: int) -> int:
    """Steps of a product's loops: each row of x takes as long as reading the codes."""
    return codes * (rows + 1)


def loops_of_product(codes: int, rows: int) -> int:
    """What ``map_ranges`` is to count as elements of a product."""
    return steps_of_product(codes, rows) * LARGE // LARGE_LOOPS


def steps_of_elements(count: int) -> int:
    """Steps of loops that turn numbers into codes, or codes into numbers: eight an element."""
    return count * 8


def loops_of_elements(count: int) -> int:
    """What ``map_ranges`` is to count as elements of them."""
    return steps_of_elements(count) * LARGE // LARGE_LOOPS


class _Pool:
    """Threads beside the caller's for work that Python does, kept off its core from when one has been found there.

    A virtual machine that was idle may wake a thread on the core of the one that wakes it, and leave both there for 40
    ms though another core is idle: each call then takes as long as with one thread. Elsewhere nothing is asked of the
    system but the number of a core.
    """

    address = 0

    def __init__(self) -> None:
        self._threads = list[int]()  # their numbers in the system
        self._met, self._kept_off = False, -1
        self._executor = ThreadPoolExecutor(max(1, cores() - 1), "aqt_lite", initializer=self._enter)

    def stop(self) -> None:
        """End the threads."""
        self._executor.shutdown(wait=False)

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Let a thread call Python, when one comes to it; RuntimeError where none will."""
        core = _core()
        if self._met and core != self._kept_off:
            self._keep_off(core)
        return self._executor.submit(self._beside, core, work)

    def _enter(self) -> None:
        self._threads.append(threading.get_native_id())
        self._kept_off = -1  # is asked for again, of this thread, too

    def _beside(self, core: int, work: Callable[[], Any]) -> Any:
        self._met |= core >= 0 and core == _core()
        return work()

    def _keep_off(self, core: int) -> None:
        allowed = os.sched_getaffinity(0)
        if 1 < cores() <= len(allowed):  # a caller that is confined to fewer is not to confine the others
            with contextlib.suppress(OSError):  # not permitted
                for thread in self._threads:
                    os.sched_setaffinity(thread, allowed - {core})
        self._kept_off = core


_pools = list[Any]()


def _pool() -> Any:
    """The one pool of this process: the first that one of perhaps several callers at once has made.

    None waits for another: it may be a signal's handler, and the other what the signal came between.
    """
    if not _pools:
        pool = _new_pool()
        _pools.append(pool)
        if _pools[0] is not pool:
            pool.stop()
        elif pool.address:
            _announce(pool.address)
    return _pools[0]


def _new_pool() -> Any:
    """Threads that wait in compiled code (``pool.Pool``), where there is such code and the system has theirs."""
    if compiled_loops() is None or os.name == "nt":
        return _Pool()
    from aqt_lite.backends.cpu import pool

    try:
        pool.prepared()
    except RuntimeError:  # numba finds no folder that it may write its cache to
        return _Pool()
    return pool.Pool(cores() - 1)


def _announce(pool: int) -> None:
    from aqt_lite.backends.cpu.native import announce_pool

    announce_pool(pool)


def _forget_pool() -> None:
    if _pools and _pools[0].address:
        _announce(0)
    _pools.clear()


def _no_core() -> int:
    return -1


def _teller_of_cores() -> Callable[[], int]:
    """What tells the core that a thread is running on, or -1 where threads cannot be told where to run."""
    if sys.platform != "linux":
        return _no_core
    return getattr(ctypes.PyDLL(None), "sched_getcpu", _no_core)


_core = _teller_of_cores()


if hasattr(os, "register_at_fork"):  # threads do not survive a fork: let the child make its own
    os.register_at_fork(after_in_child=_forget_pool)


not_compiled: list[BaseException] = []
"""Why functions that are compiled at their first call, inside that of another, were not: Control-C, or an error."""


def compiled_pool() -> int:
    """What loops are given that run on the threads which wait in compiled code; 0 where these wait in Python."""
    return int(_pool().address)


def worth_parts() -> int:
    """Steps from which ``in_parts`` is to have several parts."""
    return LARGE_LOOPS if os.name == "nt" else LARGE_PARTS


def in_parts(loop: Callable[..., bool], steps: int, ends: Array, *given: Any) -> bool:
    """``loop(pool, ends, *given)``, which numba compiled as ``pool`` says, on every core; its answer.

    Where there is no such pool, this module's threads call it for one part at a time, without one. So they do where
    somebody wants to be told of parts that are done, and of products that take so many ``steps`` that a program is to
    hear signals meanwhile.
    """
    if told() is None and steps < LONG:
        pool = compiled_pool() if len(ends) > 2 and cores() > 1 else 0
        if pool or len(ends) == 2:
            before = len(not_compiled)
            try:
                return loop(pool, ends, *given)
            except (MemoryError, RuntimeError):  # which is all that threads in compiled code say
                if len(not_compiled) > before:
                    raise not_compiled[-1] from None
                raise
    return all(map_ranges(lambda a, b: loop(0, ends[a : b + 1], *given), len(ends) - 1, chunks_per_core=len(ends)))


def ends_of_parts(length: int, multiple: int, steps: int) -> Array:
    """Where parts of ``range(length)`` end that threads take one after the other, large ones first; all begin at 0.

    Each is half of a thread's share of what is left: long stretches, for memory is read ahead in order, and all end at
    about the same time. None is so short that taking it would be felt, and all is one part where there are too few
    ``steps`` of loops for several threads.
    """
    return ends_of_shares(length, multiple, steps, worth_parts(), cores())


@functools.lru_cache(maxsize=64)
def ends_of_shares(length: int, multiple: int, steps: int, worth: int, cores: int) -> Array:
    """The same where so many steps are ``worth`` several parts, and so many ``cores`` share them."""
    ends, least = [0], length * worth // max(4 * steps, 1) if steps >= worth else length
    while ends[-1] < length:
        share = max((length - ends[-1]) // (2 * cores), least)
        ends.append(min(ends[-1] + max(share // multiple, 1) * multiple, length))
    return np.array(ends)


def map_ranges(
    work: Callable[[int, int], Any], length: int, multiple: int = 1, elements: int = LARGE, chunks_per_core: int = 1
) -> list[Any]:
    """``work(start, stop)`` on ranges that together make up ``range(length)``, on every core; its results in order.

    There are ``chunks_per_core`` ranges for each core, which begin at multiples of ``multiple``; or a single one, on
    this thread, where there are few ``elements`` in all: starting threads would cost more than it gains.

    This thread claims ranges as the pool's do, and waits for those that others have begun, but for no thread that has
    not: another library's threads, BLAS's for instance, go on spinning for a tenth of a second after their work is
    done, and may keep the pool's from a core.

    Without warnings, which NumPy counts for each thread: the contract says what overflow and NaN become.
    """
    if elements < LARGE:
        with np.errstate(all="ignore"):
            return [work(0, length)]
    units, listener = -(-length // multiple), told()
    chunks = min(cores() * chunks_per_core if listener is None else max(100, cores()), units)
    bounds = [min(units * i // chunks * multiple, length) for i in range(chunks + 1)]
    results: list[Any] = [None] * chunks
    job = [work]  # let go at the end, or a thread that has not come to its turn yet would keep arrays
    changed, begun, ended, failures = threading.Condition(), 0, 0, list[BaseException]()
    telling, done = threading.Lock(), 0

    def tell(part: int) -> None:
        nonlocal done
        if listener is not None:
            with telling:
                done += part
                listener(done, length)

    def claim() -> None:
        nonlocal begun, ended
        with np.errstate(all="ignore"):
            while True:
                with changed:
                    if begun == chunks or failures:
                        return
                    i, begun = begun, begun + 1
                try:
                    results[i] = job[0](bounds[i], bounds[i + 1])
                    tell(bounds[i + 1] - bounds[i])
                except BaseException as failure:
                    failures.append(failure)
                finally:
                    with changed:
                        ended += 1
                        changed.notify_all()

    # no thread can be started, perhaps because the interpreter is shutting down
    with contextlib.suppress(RuntimeError):
        for _ in range(min(cores(), chunks) - 1):
            _pool().submit(claim)
    claim()
    with changed:
        changed.wait_for(lambda: ended == begun)
    job.clear()
    if failures:
        raise failures[0]
    return results


@functools.cache
def cores() -> int:
    """Threads that work at once, the caller's among them: the least of what the system and its user allow.

    That is: the cores this process may run on, the processor time its control group has, rounded up, and
    ``OMP_NUM_THREADS`` and ``NUMBA_NUM_THREADS`` where they are set. Asked once a process.
    """
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = (os.environ.get(name, "").partition(",")[0].strip() for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"))
    return min([there, *(int(n) for n in asked if n.isdecimal() and int(n)), *_cores_of_control_group()])


def _cores_of_control_group(root: str = "/sys/fs/cgroup", process: str = "/proc/self/cgroup") -> list[int]:
    """What containers limit: Linux's control groups of either version, this process's and those that it lies in.

    Nothing where there is no limit, or no such group. Inside a container the root is often the process's own group, and
    the path that the system tells leads nowhere; then the root is all that is asked.
    """
    try:
        with open(process) as file:
            lines = [line.rstrip("\n").split(":", 2) for line in file]
    except OSError:
        lines = []
    paths = {kind: line[2] for line in lines if len(line) == 3 for kind in line[1].split(",")}
    of_second = _quotas(root, paths.get("", "/"), "cpu.max")
    return of_second or _quotas(
        os.path.join(root, "cpu"), paths.get("cpu", "/"), "cpu.cfs_quota_us", "cpu.cfs_period_us"
    )


def _quotas(root: str, path: str, *names: str) -> list[int]:
    """Cores of every limit from a control group up to the root: quotas over periods, rounded up."""
    found, parts = [], [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts) + 1):
        words = []
        try:
            for name in names:
                with open(os.path.join(root, *parts[:depth], name)) as file:
                    words += file.read().split()
            quota, period = (int(word) for word in words)  # "max" is no number, and -1 no limit
        except (OSError, ValueError):
            continue
        if quota > 0 < period:
            found.append(-(-quota // period))
    return found


HUGE = 2 << 20
"""Bytes of a huge page, of what processors usually have."""


LOADED = 1 << 13
"""Elements from which on what loops load again and again is worth the time that beginning on a cache line takes."""


def aligned_empty(shape: tuple[int, ...], dtype: Any, fewest: int = LARGE) -> Array:
    """An uninitialized array that begins on a cache line, so that other libraries can take it over without a copy.

    Those of fewer elements begin anywhere: copying them takes less time than finding out where that is. Large ones
    begin where a huge page does, for which NumPy asks from 4 MB on: those that begin or end inside of one come in pages
    of 4 KB there, hundreds of faults. What lies before them is never touched, and so is no memory but addresses.
    """
    count = math.prod(shape)
    if count < fewest:
        return np.empty(shape, dtype)
    size = count * np.dtype(dtype).itemsize
    line = HUGE if size >= 2 * HUGE else 64
    raw = np.empty(size + line, dtype=np.uint8)
    start = -raw.__array_interface__["data"][0] % line  # in a fourth of the time of ``ctypes.data``
    return raw[start : start + size].view(dtype).reshape(shape)


def tiles(start: int, stop: int, width: int) -> Iterator[slice]:
    """Slices of a range of rows, each of few enough codes to stay in a core's own cache while every row of x passes."""
    height = max(4, (BLOCK // width) & ~3)
    return (slice(n, min(n + height, stop)) for n in range(start, stop, height))


def einsum(codes: Array, row: Array, out: Array) -> Array:
    """``codes @ row`` in the dtype of ``row``, into ``out``: einsum converts codes as it goes, a buffer at a time."""
    usual = np.setbufsize(EINSUM_BUFFER)
    try:
        return np.einsum("nk,k->n", codes, row, out=out)
    finally:
        np.setbufsize(usual)


@functools.cache
def compiled_loops() -> Any:
    """The loops that numba compiles, or None where numba is not installed (``pip install 'aqt_lite[fast]'``).

    None, too, where it is switched off (``NUMBA_DISABLE_JIT=1``): Python runs no loop around an instruction.
    """
    try:
        from numba import config

        if config.DISABLE_JIT:  # type: ignore[attr-defined]
            return None
        from aqt_lite.backends.cpu import loops
    except ImportError:
        return None
    except RuntimeError as error:
        warnings.warn(
            "aqt_lite: large arrays take several times as long as they need, since numba finds no folder that it may "
            f"write compiled loops to: set NUMBA_CACHE_DIR to one ({error})",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    from aqt_lite.backends.cpu import telling

    telling.begin()
    return loops


def integer_dots() -> Any:
    """The loops around the processor's int8 dot product, or None where it or numba is missing."""
    return None if compiled_loops() is None else _loaded_dots()


def across_loops() -> Any:
    """The loops of such dot products for a weight that lies (in, out), or None where there are none."""
    return None if integer_dots() is None else _loaded_across()


def decoding_loops() -> Any:
    """The loops whose codes become numbers in registers, or None without numba or such a processor."""
    return None if compiled_loops() is None else _loaded_decoding()


def encoding_loops() -> Any:
    """The loops that make codes in registers, or None without numba."""
    return None if compiled_loops() is None else _loaded_encoding()


def group_loops() -> Any:
    """The loops for exact sums of groups, or None without numba."""
    return None if compiled_loops() is None else _loaded_groups()


def turning_loops() -> Any:
    """The loop that turns scales, or None where there are no vectors to turn them in."""
    return None if decoding_loops() is None else _loaded_turning()


def whole_loops() -> Any:
    """The loops that make whole numbers of codes, and turn them, or None where there are none that decode."""
    return None if decoding_loops() is None else _loaded_whole()


def strip_loops() -> Any:
    """The loops for exact sums of groups of a weight that lies (in, out), or None without dot products for them."""
    return None if group_loops() is None or not group_loops().DOTS else _loaded_strips()


def panel_loops() -> Any:
    """The loops for many rows of x and a small weight, or None where there are none that decode."""
    return None if decoding_loops() is None else _loaded_panels()


def outer_loops() -> Any:
    """The loops for a weight that lies (in, out), or None where there are none that decode."""
    return None if decoding_loops() is None else _loaded_outer()


@functools.cache
def _loaded_strips() -> Any:
    from aqt_lite.backends.cpu import strips

    return strips


@functools.cache
def _loaded_outer() -> Any:
    from aqt_lite.backends.cpu import outer

    return outer


@functools.cache
def _loaded_whole() -> Any:
    from aqt_lite.backends.cpu import whole

    return whole


@functools.cache
def _loaded_panels() -> Any:
    from aqt_lite.backends.cpu import panels

    return panels


@functools.cache
def _loaded_turning() -> Any:
    from aqt_lite.backends.cpu import turning

    return turning


@functools.cache
def _loaded_encoding() -> Any:
    from aqt_lite.backends.cpu import encoding

    return encoding


@functools.cache
def _loaded_groups() -> Any:
    from aqt_lite.backends.cpu import groups

    return groups


@functools.cache
def _loaded_decoding() -> Any:
    from aqt_lite.backends.cpu import decoding

    return decoding if decoding.AVAILABLE else None


@functools.cache
def _loaded_across() -> Any:
    from aqt_lite.backends.cpu import across

    return across if across.SERVES else None


@functools.cache
def _loaded_dots() -> Any:
    from aqt_lite.backends.cpu import dots

    return dots if dots.AVAILABLE else None


# ---- the gate: what may reach a compiled loop


def gated(form: Callable[..., Any]) -> Callable[..., Any]:
    """A form that gets its arrays as compiled loops may read them: in this machine's byte order, aligned.

    A loop reads memory as the types say that it was compiled for, and numba's dispatch takes arrays of the other byte
    order for native ones. Whatever takes an array's address stands behind this. Memory that nobody may write to looks
    as if one might, for which loops would otherwise be compiled anew: none writes to what it is given to read.
    """

    @functools.wraps(form)
    def call(*arrays: Any, **static: Any) -> Any:
        given = admitted(arrays)
        result = form(*given, **static)
        return result if given is arrays else _kept_from_writing(result, arrays)

    return call


def _kept_from_writing(result: Any, arrays: Any) -> Any:
    """``result``, whose arrays may not be written to where they lie in memory of ``arrays`` that may not be, either."""
    given = arrays_in(arrays)
    fixed, own = [a for a in given if not a.flags.writeable], {id(a) for a in given}
    for made in arrays_in((result,)):
        if isinstance(made, np.ndarray) and id(made) not in own and any(np.may_share_memory(made, a) for a in fixed):
            made.flags.writeable = False
    return result


def gated_of_weight(of_weight: Callable[..., Callable[..., Any]]) -> Callable[..., Callable[..., Any]]:
    """The same of what a kernel gives for one weight."""
    return functools.wraps(of_weight)(lambda w, **static: gated(of_weight(w, **static)))


def admitted(arrays: Any) -> Any:
    """The same arrays, copied where they are not plain, and seen through others where they may not be written to."""
    return arrays if _all_plain(arrays) else on_each(_plain, tuple(arrays))


def _all_plain(arrays: Any) -> bool:
    for a in arrays:
        if a is None:
            continue
        if isinstance(a, tuple):
            if not _all_plain(a):
                return False
        elif not (a.dtype.isnative and a.flags.behaved):  # aligned, and to be written to
            return False
    return True


def _plain(a: Array) -> Array:
    if _all_plain((a,)):
        return a
    if a.dtype.isnative and a.flags.aligned:
        return np.asarray(_Memory(a)).view(a.dtype)
    return np.array(a, dtype=a.dtype.newbyteorder("="), order="C")


class _Memory:
    """An array's memory as such that may be written to; it lives as long as what is made of this."""

    __slots__ = ("__array_interface__", "array")

    def __init__(self, array: Array) -> None:
        self.array, self.__array_interface__ = array, array.__array_interface__
        self.__array_interface__["data"] = self.__array_interface__["data"][0], False


def on_each(function: Callable[[Array], Array], tree: Any) -> Any:
    """Nested tuples of arrays and None, with ``function`` applied to each array."""
    if tree is None:
        return None
    if isinstance(tree, tuple):
        parts = (on_each(function, part) for part in tree)
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return function(tree)


def arrays_in(tree: Any) -> list[Array]:
    """The arrays of nested tuples."""
    found: list[Array] = []
    for part in tree:
        if isinstance(part, tuple):
            found += arrays_in(part)
        elif part is not None:
            found.append(part)
    return found
