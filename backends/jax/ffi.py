"""Loops that numba compiles, called by XLA itself on a CPU: its foreign-function interface, written with numba.

Owns: the layout of that interface's structs (xla/ffi/api/c_api.h of jaxlib) and a parallel loop; nothing about
products. Imports: the CPU library's ``native`` and its threads. No Python runs in a call and no lock is held. A kernel
is a loop body and a handler around it::

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

import threading
import warnings
from typing import Any

import jax
import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from aqt_lite.backends.cpu.native import (
    INT64,
    call1,
    call3,
    call5,
    find_reached,
    free,
    load32,
    load64,
    local_words,
    malloc,
    pool_of_process,
    store32,
    store64,
)
from aqt_lite.backends.cpu.runtime import compiled_pool

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
API_POOL_THREADS = 144  # XLA_FFI_Api: XLA_FFI_ThreadPool_NumThreads

METADATA_EXTENSION = 1  # XLA_FFI_Extension_Metadata
INTERNAL_ERROR = 13  # XLA_FFI_Error_Code_INTERNAL

HANDLER = types.int64(types.int64)  # XLA_FFI_Error* (XLA_FFI_CallFrame*)
OK = 0


@intrinsic
def failure_text(typingctx):
    """The address of a C string: what went wrong if a chunk raised."""

    def codegen(context, builder, signature, args):
        text = context.insert_const_string(builder.module, "a numba kernel raised an exception")
        return builder.ptrtoint(text, INT64)

    return types.int64(), codegen


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
def _outcome(frame, failed):
    """What a handler returns."""
    if failed == 0:
        return OK
    return _call_api(frame, API_ERROR_CREATE, failure_text(), INTERNAL_ERROR, 0)


# ------------------------------------------------------------- parallel loops


@numba.njit
def parallel_for(frame: Any, chunk: Any, total: Any, most: Any) -> Any:  # pragma: no cover - compiled
    """Call chunk(frame, start, stop) for all of total items, at most so many at a time.

    chunk is an address from address_of().  The chunks run in this thread and in
    those of the CPU library's pool, where XLA has threads of its own, that is,
    where nobody has told it to do without.
    """
    parts = (total - 1) // most + 1
    pool = pool_of_process() if parts > 1 and _pool_threads(frame) > 1 else 0
    ends = malloc(8 * (parts + 1)) if pool != 0 else 0
    if ends == 0:
        return _outcome(frame, call3(chunk, (frame, 0, total)))
    for i in range(parts + 1):
        store64(ends + 8 * i, min(i * most, total))
    failed = call5(load64(pool), (pool, chunk, frame, ends, parts))
    free(ends)
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
                compiled_pool()
                handler = numba.cfunc(HANDLER, cache=True)(function)
                find_reached(handler._library)
                jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler.address), platform="cpu")
            except Exception as error:
                warnings.warn(
                    f"aqt_lite: products under jax.jit are slower here ({error})", RuntimeWarning, stacklevel=2
                )
                handler = None
            _handlers[name] = handler
        return _handlers[name] is not None
