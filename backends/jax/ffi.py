"""Loops that numba compiles, called by XLA itself on a CPU: its foreign-function interface, written with numba.

Owns: the layout of that interface's structs (xla/ffi/api/c_api.h of jaxlib) and a parallel loop on XLA's own threads;
nothing about products. No Python runs in a call and no lock is held. A kernel is a loop body and a handler around it::

    @njit
    def negate_rows(frame, start, stop):
        x, y = operand(frame, 0), result(frame, 0)
        ...

    negate_rows_address = address_of(negate_rows, 3)

    def negate(frame):
        if describe(frame):  # XLA asks what the handler is
            return OK
        return parallel_for(frame, negate_rows_address(), dim(operand(frame, 0), 0), 64)

    register("negate", negate)  # in a lowering rule

What numba caches holds no address, so processes may share it.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from typing import Any

import jax
import llvmlite.ir as ir
import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# Layout of the structs in xla/ffi/api/c_api.h, FFI API version 0.2 (what is used of
# it is the same in 0.3, and XLA serves handlers of older versions), on 64-bit
# machines.  Every struct begins with {size_t struct_size; void* extension}.
API_MAJOR, API_MINOR = 0, 2

FRAME_EXTENSION = 8  # XLA_FFI_CallFrame: extension_start
FRAME_API = 16  # XLA_FFI_CallFrame: api
FRAME_CONTEXT = 24  # XLA_FFI_CallFrame: ctx
FRAME_OPERANDS = 40 + 32  # XLA_FFI_CallFrame: args, XLA_FFI_Args: args
FRAME_RESULTS = 80 + 32  # XLA_FFI_CallFrame: rets, XLA_FFI_Rets: rets
FRAME_ATTRIBUTES = 120 + 40  # XLA_FFI_CallFrame: attrs, XLA_FFI_Attrs: attrs

BUFFER_DATA = 24  # XLA_FFI_Buffer: data
BUFFER_DIMS = 40  # XLA_FFI_Buffer: dims

SCALAR_VALUE = 8  # XLA_FFI_Scalar: value

EXTENSION_TYPE = 8  # XLA_FFI_Extension_Base: type
EXTENSION_METADATA = 24  # XLA_FFI_Metadata_Extension: metadata
METADATA_MAJOR = 8 + 16  # XLA_FFI_Metadata: api_version.major_version
METADATA_MINOR = 8 + 20  # XLA_FFI_Metadata: api_version.minor_version
METADATA_TRAITS = 32  # XLA_FFI_Metadata: traits
METADATA_STATE = 40  # XLA_FFI_Metadata: state_type_id

API_ERROR_CREATE = 48  # XLA_FFI_Api: XLA_FFI_Error_Create
API_ERROR_DESTROY = 64  # XLA_FFI_Api: XLA_FFI_Error_Destroy
API_POOL_SCHEDULE = 136  # XLA_FFI_Api: XLA_FFI_ThreadPool_Schedule
API_POOL_THREADS = 144  # XLA_FFI_Api: XLA_FFI_ThreadPool_NumThreads

METADATA_EXTENSION = 1  # XLA_FFI_Extension_Metadata
INTERNAL_ERROR = 13  # XLA_FFI_Error_Code_INTERNAL

# What parallel_for shares with its helpers is a block of int64 words.  Those
# that several threads write are a cache line apart.
STATE_NEXT = 0  # the first item that nobody has claimed
STATE_FINISHED = 64  # how many items the helpers have finished
STATE_FAILED = 72  # how many chunks have raised an exception
STATE_OWNERS = 80  # how many threads may still look at the block
STATE_CHUNK = 128
STATE_FRAME = 136
STATE_TOTAL = 144
STATE_MOST = 152
STATE_SIZE = 192

HANDLER = types.int64(types.int64)  # XLA_FFI_Error* (XLA_FFI_CallFrame*)
OK = 0

INT64 = ir.IntType(64)


# -------------------------------------------------------------- instructions


def _load(word):
    @intrinsic
    def load(typingctx, address):
        """Read an integer."""

        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], word.as_pointer())
            return builder.sext(builder.load(pointer), INT64)

        return types.int64(types.int64), codegen

    return load


def _store(word):
    @intrinsic
    def store(typingctx, address, value):
        """Write an integer."""

        def codegen(context, builder, signature, args):
            pointer = builder.inttoptr(args[0], word.as_pointer())
            builder.store(builder.trunc(args[1], word), pointer)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), codegen

    return store


load32, load64 = _load(ir.IntType(32)), _load(INT64)
store32, store64 = _store(ir.IntType(32)), _store(INT64)


@intrinsic
def atomic_load(typingctx, address):
    """Read an integer that other threads write."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], INT64.as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.int64), codegen


@intrinsic
def atomic_add(typingctx, address, value):
    """Add to an integer that other threads write; return its old value."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


def _call(arity):
    @intrinsic
    def call(typingctx, address, args):
        """Call a C function of integers, which returns one; args is a tuple."""

        def codegen(context, builder, signature, values):
            address, args = values
            function = ir.FunctionType(INT64, [INT64] * arity).as_pointer()
            return builder.call(builder.inttoptr(address, function), cgutils.unpack_tuple(builder, args))

        return types.int64(types.int64, types.UniTuple(types.int64, arity)), codegen

    return call


call1, call3 = _call(1), _call(3)


@intrinsic(prefer_literal=True)
def local_words(typingctx, count):
    """The address of this many integers that live until the caller returns."""

    def codegen(context, builder, signature, args):
        words = ir.ArrayType(INT64, count.literal_value)
        return builder.ptrtoint(cgutils.alloca_once(builder, words), INT64)

    return types.int64(count), codegen


@intrinsic
def failure_text(typingctx):
    """The address of a C string: what went wrong if a chunk raised."""

    def codegen(context, builder, signature, args):
        text = context.insert_const_string(builder.module, "a numba kernel raised an exception")
        return builder.ptrtoint(text, INT64)

    return types.int64(), codegen


def _libc(name, signature):
    """Call a function of the C library."""

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(INT64, [INT64] * len(args))
        return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)

    return signature, codegen


@intrinsic
def malloc(typingctx, size):
    """Memory of the C library; 0 where there is none."""
    return _libc("malloc", types.int64(types.int64))


@intrinsic
def free(typingctx, address):
    """Give memory of the C library back."""
    return _libc("free", types.int64(types.int64))


@intrinsic
def yield_core(typingctx):
    """Let another thread have this core for now."""
    return _libc("SwitchToThread" if os.name == "nt" else "sched_yield", types.int64())


@intrinsic
def _madvise(typingctx, address, size, advice):
    """Tell Linux what memory is for."""
    return _libc("madvise", types.int64(types.int64, types.int64, types.int64))


PAGE, HUGE, WILL_BE_HUGE = 4096, 1 << 22, 14  # MADV_HUGEPAGE


@numba.njit
def _in_huge_pages(address, size):
    first = (address + PAGE - 1) & ~(PAGE - 1)
    last = (address + size) & ~(PAGE - 1)
    if size >= HUGE:
        _madvise(first, last - first, WILL_BE_HUGE)


@numba.njit
def _in_usual_pages(address, size):
    pass


in_huge_pages = _in_huge_pages if sys.platform == "linux" else _in_usual_pages
"""Ask for huge pages, where results are large, before they are touched: XLA's memory is fresh, and comes in pages of
4 KB unless somebody asks, as NumPy does."""


def address_of(function: Any, arity: int) -> Any:
    """Make an intrinsic: the C address of a jitted function of integers.

    The C function returns whether the jitted one raised an exception, which goes
    no further.  It is compiled into the code that asks for its address.  (A
    jitted function that is passed as an argument, instead, would put an address
    of this process into the code, which numba then refuses to cache.)
    """
    signature = types.void(*[types.int64] * arity)

    @intrinsic
    def address(typingctx):
        compiled = function.get_compile_result(signature)
        name = f"{compiled.fndesc.mangled_name}.c"

        def codegen(context, builder, _, args):
            if name in builder.module.globals:
                return builder.ptrtoint(builder.module.globals[name], INT64)
            wrapper = ir.Function(builder.module, ir.FunctionType(INT64, [INT64] * arity), name)
            wrapper.linkage = "internal"
            body = ir.IRBuilder(wrapper.append_basic_block())
            context.add_linking_libs([compiled.library])
            status, _ = context.call_internal_no_propagate(body, compiled.fndesc, signature, wrapper.args)
            body.ret(body.zext(status.is_error, INT64))
            return builder.ptrtoint(wrapper, INT64)

        return types.int64(), codegen

    return address


# ---------------------------------------------------------- the call's frame


@numba.njit
def operand(frame: Any, i: Any) -> Any:  # pragma: no cover - compiled
    """The i-th operand, for data() and dim()."""
    return load64(load64(frame + FRAME_OPERANDS) + 8 * i)


@numba.njit
def result(frame: Any, i: Any) -> Any:  # pragma: no cover - compiled
    """The i-th result, for data() and dim()."""
    return load64(load64(frame + FRAME_RESULTS) + 8 * i)


@numba.njit
def attribute(frame: Any, i: Any) -> Any:  # pragma: no cover - compiled
    """The i-th attribute in the order of their names, an np.int64."""
    return load64(load64(load64(load64(frame + FRAME_ATTRIBUTES) + 8 * i) + SCALAR_VALUE))


@numba.njit
def data(buffer: Any) -> Any:  # pragma: no cover - compiled
    """The address of an operand's or result's elements."""
    return load64(buffer + BUFFER_DATA)


@numba.njit
def dim(buffer: Any, i: Any) -> Any:  # pragma: no cover - compiled
    """The length of an operand's or result's i-th axis."""
    return load64(load64(buffer + BUFFER_DIMS) + 8 * i)


@intrinsic
def _pointer(typingctx, address):
    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@numba.njit
def array(buffer: Any, shape: Any, dtype: Any) -> Any:  # pragma: no cover - compiled
    """An operand or result as an array; shape is a tuple."""
    return numba.carray(_pointer(data(buffer)), shape, dtype)


@numba.njit
def describe(frame: Any) -> Any:  # pragma: no cover - compiled
    """If XLA only asks what this handler is, answer and return True."""
    extension = load64(frame + FRAME_EXTENSION)
    if extension == 0 or load32(extension + EXTENSION_TYPE) != METADATA_EXTENSION:
        return False
    metadata = load64(extension + EXTENSION_METADATA)
    store32(metadata + METADATA_MAJOR, API_MAJOR)
    store32(metadata + METADATA_MINOR, API_MINOR)
    store32(metadata + METADATA_TRAITS, 0)
    if load64(metadata) > METADATA_STATE:  # its size: older versions end before
        store64(metadata + METADATA_STATE, 0)
    return True


@numba.njit
def _call_api(frame, function, word2, word3, word4):
    """Call one of XLA's functions with {size, extension, word2, word3, word4}."""
    args = local_words(5)
    store64(args, 40)
    store64(args + 8, 0)
    store64(args + 16, word2)
    store64(args + 24, word3)
    store64(args + 32, word4)
    return call1(load64(load64(frame + FRAME_API) + function), (args,))


@numba.njit
def _succeeds(frame, error):
    if error != 0:
        _call_api(frame, API_ERROR_DESTROY, error, 0, 0)
    return error == 0


@numba.njit
def _pool_threads(frame):
    count = local_words(1)
    context = load64(frame + FRAME_CONTEXT)
    if _succeeds(frame, _call_api(frame, API_POOL_THREADS, context, count, 0)):
        return load64(count)
    return 0


@numba.njit
def _schedule(frame, task, state):
    context = load64(frame + FRAME_CONTEXT)
    return _succeeds(frame, _call_api(frame, API_POOL_SCHEDULE, context, task, state))


@numba.njit
def _outcome(frame, failed):
    """What a handler returns."""
    if failed == 0:
        return OK
    return _call_api(frame, API_ERROR_CREATE, failure_text(), INTERNAL_ERROR, 0)


# ------------------------------------------------------------- parallel loops


@numba.njit
def _work(state):
    """Run chunks until none is left; return how many items that was."""
    chunk = load64(state + STATE_CHUNK)
    frame = load64(state + STATE_FRAME)
    total = load64(state + STATE_TOTAL)
    most = load64(state + STATE_MOST)
    finished = 0
    while True:
        start = atomic_add(state + STATE_NEXT, most)
        if start >= total:
            return finished
        stop = min(start + most, total)
        atomic_add(state + STATE_FAILED, call3(chunk, (frame, start, stop)))
        finished += stop - start


@numba.njit
def _disown(state):
    """One owner less; the last frees the state."""
    if atomic_add(state + STATE_OWNERS, -1) == 1:
        free(state)


@numba.njit
def _help(state):
    """What a helper does, whenever the pool comes to run it."""
    atomic_add(state + STATE_FINISHED, _work(state))
    _disown(state)


_help_address = address_of(_help, 1)


@numba.njit
def parallel_for(frame: Any, chunk: Any, total: Any, most: Any) -> Any:  # pragma: no cover - compiled
    """Call chunk(frame, start, stop) for all of total items, at most so many at a time.

    chunk is an address from address_of().  The chunks run in this thread and in
    helpers on XLA's thread pool, which all claim one after another.

    All the pool's threads may be busy, or waiting just here, so this thread does
    not wait for helpers to begin.  It works until all chunks are claimed, then
    waits for those that helpers are running: these end by themselves.  A helper
    that begins later finds nothing to claim.  By then the frame may be gone, so
    it does not touch it, and whoever is last frees the state.
    """
    helpers = (total - 1) // most
    if helpers > 0:
        helpers = min(helpers, _pool_threads(frame) - 1)
    state = 0
    if helpers > 0:
        state = malloc(STATE_SIZE)
    if state == 0:
        return _outcome(frame, call3(chunk, (frame, 0, total)))

    store64(state + STATE_NEXT, 0)
    store64(state + STATE_FINISHED, 0)
    store64(state + STATE_FAILED, 0)
    store64(state + STATE_OWNERS, 1 + helpers)
    store64(state + STATE_CHUNK, chunk)
    store64(state + STATE_FRAME, frame)
    store64(state + STATE_TOTAL, total)
    store64(state + STATE_MOST, most)
    for _ in range(helpers):
        if not _schedule(frame, _help_address(), state):
            _disown(state)

    helped = total - _work(state)
    while atomic_load(state + STATE_FINISHED) != helped:
        yield_core()
    failed = load64(state + STATE_FAILED)
    _disown(state)
    return _outcome(frame, failed)


_handlers = {}  # XLA keeps their addresses for good, so they must stay
_lock = threading.Lock()


def register(name: str, function: Any) -> bool:
    """Compile a handler and offer it to XLA; return whether XLA accepts it.

    XLA refuses a version of its interface that it does not know before it ever calls the handler for a product; then
    the caller has to do without. To be called when the handler is about to be used, that is, in a lowering rule: before
    there is a CPU backend, XLA keeps a handler unasked, and one that it refuses later keeps that backend from starting.

    Where numba caches handlers, the function should be a closure over something that changes with the sources of all
    that it calls: numba looks at closures, and at the one file that the function is in.
    """
    with _lock:
        if name not in _handlers:
            try:
                jax.devices("cpu")
                handler = numba.cfunc(HANDLER, cache=True)(function)
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler.address), platform="cpu")
            except Exception as error:
                warnings.warn(
                    f"aqt_lite: products under jax.jit are slower here ({error})", RuntimeWarning, stacklevel=2
                )
                handler = None
            _handlers[name] = handler
        return _handlers[name] is not None
