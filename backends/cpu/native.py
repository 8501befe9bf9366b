"""What compiled loops say to the machine: memory by its address, atomic words, functions of the C library and of numba.

Owns: intrinsics of one instruction or call each, the C address of a jitted function, and calls of jitted functions that
are compiled apart from their callers. Imports: numba, the runtime. ``pool`` and JAX's ``ffi`` are written with them.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from typing import Any

import llvmlite.binding
import llvmlite.ir as ir
import numba
from numba import types
from numba.core import cgutils, sigutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from aqt_lite.backends.cpu.runtime import not_compiled

INT64 = ir.IntType(64)


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


@intrinsic
def atomic_store(typingctx, address, value):
    """Write an integer that other threads read."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], INT64.as_pointer())
        builder.store_atomic(args[1], pointer, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def check_c_order(typingctx, array):
    """Refuse, where a loop is compiled, an array that it reads by addresses and that does not lie in the order of C."""
    if not isinstance(array, types.Array) or array.layout != "C":
        raise TypingError(f"{array} does not lie in the order of C")
    return types.void(array), lambda context, *_: context.get_dummy_value()


@intrinsic
def compare_and_swap(typingctx, address, expected, value):
    """Write an integer where this one is ``expected``; return whether it was."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], INT64.as_pointer())
        return builder.extract_value(builder.cmpxchg(pointer, args[1], args[2], "seq_cst", "seq_cst"), 1)

    return types.boolean(types.int64, types.int64, types.int64), codegen


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


call1, call3, call5 = _call(1), _call(3), _call(5)


@intrinsic(prefer_literal=True)
def local_words(typingctx, count):
    """The address of this many integers that live until the caller returns."""

    def codegen(context, builder, signature, args):
        words = ir.ArrayType(INT64, count.literal_value)
        return builder.ptrtoint(cgutils.alloca_once(builder, words), INT64)

    return types.int64(count), codegen


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


@intrinsic
def _sched_getcpu(typingctx):
    return _libc("sched_getcpu", types.int64())


@numba.njit
def _core_of_linux():
    return _sched_getcpu() & 0x7FFFFFFF  # an int, whose upper half in a register is undefined


@numba.njit
def _no_core():
    return -1


this_core = _core_of_linux if sys.platform == "linux" else _no_core
"""The number of the core that the caller runs on, or -1 where that cannot be asked."""


@intrinsic
def _sched_getaffinity(typingctx, thread, size, mask):
    return _libc("sched_getaffinity", types.int64(types.int64, types.int64, types.int64))


@intrinsic
def _sched_setaffinity(typingctx, thread, size, mask):
    return _libc("sched_setaffinity", types.int64(types.int64, types.int64, types.int64))


MASK = 16
"""Words of a mask of cores, for 1024 of them."""


@numba.njit
def _leave_core_of_linux(core, least, own):
    allowed, last, now = own, own + 8 * MASK, local_words(MASK)
    for i in range(MASK):
        store64(now + 8 * i, 0)
    if not 0 <= core < 64 * MASK or _sched_getaffinity(0, 8 * MASK, now) & 0x80000000:  # an int, below 0
        return
    told = False  # by somebody else, since this thread was here
    for i in range(MASK):
        told |= load64(now + 8 * i) != load64(last + 8 * i)
    cores = 0
    for i in range(MASK):
        if told:
            store64(allowed + 8 * i, load64(now + 8 * i))
        word = load64(allowed + 8 * i)
        store64(last + 8 * i, word & ~(1 << (core & 63)) if i == core >> 6 else word)
        for bit in range(64):
            cores += (word >> bit) & 1
    if cores >= least:
        _sched_setaffinity(0, 8 * MASK, last)
    else:
        for i in range(MASK):
            store64(last + 8 * i, load64(now + 8 * i))


@numba.njit
def _leave_no_core(core, least, own):
    pass


leave_core = _leave_core_of_linux if sys.platform == "linux" else _leave_no_core
"""Let this thread run on all of its cores but this one, if there are ``least``, until it is here again.

``own`` are two masks of this thread's, zeros at first: what somebody allowed it, and what it has told the system.
"""


# ---- how floats are rounded, and whether subnormal ones count: a word of each thread's, which the processor keeps


@intrinsic
def _float_mode_of_x86(typingctx):
    """The word MXCSR."""

    def codegen(context, builder, signature, args):
        place = cgutils.alloca_once(builder, ir.IntType(32))
        pointer = builder.bitcast(place, cgutils.voidptr_t)
        function = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse.stmxcsr"), [pointer])
        return builder.zext(builder.load(place), INT64)

    return types.int64(), codegen


@intrinsic
def _set_float_mode_of_x86(typingctx, mode):
    """Write the word MXCSR."""

    def codegen(context, builder, signature, args):
        place = cgutils.alloca_once(builder, ir.IntType(32))
        builder.store(builder.trunc(args[0], ir.IntType(32)), place)
        pointer = builder.bitcast(place, cgutils.voidptr_t)
        function = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse.ldmxcsr"), [pointer])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def _float_mode_of_arm(typingctx):
    """The register FPCR."""
    return _libc("llvm.aarch64.get.fpcr", types.int64())


@intrinsic
def _set_float_mode_of_arm(typingctx, mode):
    """Write the register FPCR."""

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [INT64])
        builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.aarch64.set.fpcr"), args)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@numba.njit
def _no_float_mode():
    return 0


@numba.njit
def _set_no_float_mode(mode):
    pass


_MACHINE = platform.machine().lower()
if _MACHINE in ("x86_64", "amd64"):
    float_mode, set_float_mode = _float_mode_of_x86, _set_float_mode_of_x86
elif _MACHINE in ("aarch64", "arm64"):
    float_mode, set_float_mode = _float_mode_of_arm, _set_float_mode_of_arm
else:
    float_mode, set_float_mode = _no_float_mode, _set_no_float_mode


@intrinsic
def mutex_init(typingctx, mutex, nothing):
    """Make a mutex of memory."""
    return _libc("pthread_mutex_init", types.int64(types.int64, types.int64))


@intrinsic
def mutex_lock(typingctx, mutex):
    """Wait for a mutex."""
    return _libc("pthread_mutex_lock", types.int64(types.int64))


@intrinsic
def mutex_unlock(typingctx, mutex):
    """Let another thread have a mutex."""
    return _libc("pthread_mutex_unlock", types.int64(types.int64))


@intrinsic
def condition_init(typingctx, condition, nothing):
    """Make a condition variable of memory."""
    return _libc("pthread_cond_init", types.int64(types.int64, types.int64))


@intrinsic
def condition_wait(typingctx, condition, mutex):
    """Sleep until woken, perhaps for no reason; the mutex is another's meanwhile."""
    return _libc("pthread_cond_wait", types.int64(types.int64, types.int64))


@intrinsic
def condition_signal(typingctx, condition):
    """Wake a thread that sleeps there."""
    return _libc("pthread_cond_signal", types.int64(types.int64))


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


_pool_of_process = ctypes.c_int64(0)
_POOL = "aqt_lite_pool_of_process"
llvmlite.binding.add_symbol(_POOL, ctypes.addressof(_pool_of_process))


def announce_pool(pool: int) -> None:
    """Say what ``pool_of_process`` is from now on."""
    _pool_of_process.value = pool


@intrinsic
def pool_of_process(typingctx):
    """The address of the pool (``pool``) for functions that C calls, which nobody can tell; 0 where there is none.

    It is read where a symbol lies that each process defines: what numba caches holds no address.
    """

    def codegen(context, builder, signature, args):
        word = builder.module.globals.get(_POOL) or ir.GlobalVariable(builder.module, INT64, _POOL)
        return builder.load(word)

    return types.int64(), codegen


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


def _borrowed(context: Any, builder: Any, its_type: Any, values: Any) -> Any:
    """A tuple whose arrays nobody owns."""
    for i, part in enumerate(its_type.types):
        if isinstance(part, types.Array):
            array = context.make_array(part)(context, builder, builder.extract_value(values, i))
            array.meminfo, array.parent = (cgutils.get_null_value(v.type) for v in (array.meminfo, array.parent))
            values = builder.insert_value(values, array._getvalue(), i)
    return values


def task_of(function: Any) -> Any:
    """Make an intrinsic of a jitted ``function(given, start, stop)`` with a tuple ``given``: what C needs to call it.

    In a jitted function ``task_of(f)(given)`` is two integers, the address of a C function and of where ``given`` lies
    until the caller returns. The C function takes the latter, start and stop, and returns whether ``f`` raised.

    Its arrays are borrowed: numba counts nothing of them, as every function that they are passed to would. Counts that
    threads share travel from core to core. The caller keeps the arrays.
    """

    @intrinsic
    def task(typingctx, given):
        signature = types.void(given, types.int64, types.int64)
        compiled = function.get_compile_result(signature)

        def codegen(context, builder, _, args):
            wrapper = ir.Function(
                builder.module, ir.FunctionType(INT64, [INT64] * 3), f"{compiled.fndesc.mangled_name}.task"
            )
            wrapper.linkage = "internal"
            body = ir.IRBuilder(wrapper.append_basic_block())
            context.add_linking_libs([compiled.library])
            place = cgutils.alloca_once_value(builder, _borrowed(context, builder, given, args[0]))
            at, start, stop = wrapper.args
            values = [body.load(body.inttoptr(at, place.type)), start, stop]
            status, _ = context.call_internal_no_propagate(body, compiled.fndesc, signature, values)
            body.ret(body.zext(status.is_error, INT64))
            return cgutils.pack_array(builder, [builder.ptrtoint(wrapper, INT64), builder.ptrtoint(place, INT64)])

        return types.UniTuple(types.int64, 2)(given), codegen

    return task


_finders: list[Any] = []
"""What compiled code calls, for as long as the process lives."""

_known: dict[str, tuple[Any, Any]] = {}
"""By symbol: what compiled code reads there, and what finds it out."""


def _where(function: Any, arguments: tuple[Any, ...], returned: Any, symbol: str) -> None:
    """Define a symbol: the address of a jitted function, or 0, and that of a C function that finds it out."""
    words = (ctypes.c_int64 * 2)()

    def find() -> None:
        try:
            function.compile(arguments)  # or loaded: the cache knows it by these, as Python's calls look it up
            compiled = function.overloads[arguments]
            if compiled.signature.return_type != returned:
                raise TypeError(f"{symbol} returns {compiled.signature.return_type}, not {returned}, as apart() says")
            address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
            find_reached(compiled.library)
            words[0] = address  # last: who sees it sees all that is called from there
        except BaseException as error:
            not_compiled.append(error)
            raise  # which ctypes prints

    finder = ctypes.CFUNCTYPE(None)(find)
    words[1] = ctypes.cast(finder, ctypes.c_void_p).value
    _finders.append(finder)
    _known[symbol] = words, find
    llvmlite.binding.add_symbol(symbol, ctypes.addressof(words))


def find_reached(library: Any) -> None:
    """Find all functions that compiled code calls apart, and what these call, so that no thread has to call Python.

    Threads of XLA must not: they are ended where they ask for the interpreter while it finalizes, and XLA waits for
    them.
    """
    for variable in library._get_module_for_linking().global_variables:
        words, find = _known.get(variable.name, (None, None))
        if words is not None and words[0] == 0:
            find()


def _is_taken_as(wanted: Any, given: Any) -> bool:
    if isinstance(given, types.Array) and isinstance(wanted, types.Array):
        return bool(given.copy(readonly=False) == wanted)
    given = types.unliteral(given)
    return bool(given == wanted) or (wanted == types.int64 and isinstance(given, types.Integer))


def _inside(function: Any, given: Any) -> Any:
    """What an intrinsic answers that calls a jitted function with a tuple, and has it compiled into the caller."""
    function.compile(tuple(map(types.unliteral, given.types)))
    compiled = function.overloads[tuple(map(types.unliteral, given.types))]

    def codegen(context, builder, _, args):
        context.add_linking_libs([compiled.library])
        values = cgutils.unpack_tuple(builder, args[0])
        return context.call_internal(builder, compiled.fndesc, compiled.signature, values)

    return compiled.signature.return_type(given), codegen


def apart(function: Any, *signatures: str) -> Any:
    """Make an intrinsic of a jitted function, for others to call with a tuple: it is not compiled into its callers.

    numba puts all that a function calls into the function's own library, and optimizes it there once more. A loop below
    two others, in a form for NumPy and in one for XLA, would be compiled six times. What is called through here is
    compiled once, at its first call, for NumPy, torch and JAX::

        @njit(nogil=True, cache=True)
        def total(x, first): ...

        total_apart = apart(total, "float32(float32[:,::1], int64)")  # "::1": contiguous, as numba writes types

        @njit(nogil=True)
        def caller(x):
            return total_apart((x, 0))

    Integers are passed as int64, and arrays that may not be written as those that may. The type that is returned has to
    be the one that the function returns. With arguments of other types, as arrays in another order of memory, the
    function is compiled into the caller, as usual.

    The address is read where a symbol lies that each process defines: what numba caches holds none. The first call
    finds it by calling Python, from whatever thread it is on. What goes wrong then, or Control-C, is printed, and
    raised: by ``runtime.in_parts`` as it is, otherwise as RuntimeError. For XLA, ``ffi.register`` finds all there are.
    """
    known = []
    for nth, text in enumerate(signatures):
        arguments, returned = sigutils.normalize_signature(text)
        symbol = f"{function.py_func.__module__}.{function.py_func.__qualname__}.{nth}"
        _where(function, arguments, returned, symbol)
        known.append((arguments, returned, symbol))

    @intrinsic
    def call(typingctx, given):
        fitting = [
            one for one in known if len(one[0]) == len(given.types) and all(map(_is_taken_as, one[0], given.types))
        ]
        if not fitting:
            return _inside(function, given)
        arguments, returned, symbol = fitting[0]

        def codegen(context, builder, _, args):
            values = [
                context.cast(builder, value, its_own, wanted) if wanted == types.int64 else value
                for its_own, wanted, value in zip(
                    given.types, arguments, cgutils.unpack_tuple(builder, args[0]), strict=True
                )
            ]
            module, convention = builder.module, context.call_conv
            words = module.globals.get(symbol) or ir.GlobalVariable(module, ir.ArrayType(INT64, 2), symbol)
            where, finder = (cgutils.gep_inbounds(builder, words, 0, i) for i in (0, 1))
            with builder.if_then(cgutils.is_null(builder, builder.load(where)), likely=False):
                find = ir.FunctionType(ir.VoidType(), []).as_pointer()
                builder.call(builder.inttoptr(builder.load(finder), find), [])
                with builder.if_then(cgutils.is_null(builder, builder.load(where)), likely=False):
                    text = f"{symbol.rpartition('.')[0]} was not compiled, for the reason that is printed above"
                    convention.return_user_exc(builder, RuntimeError, (text,))
            its_type = convention.get_function_type(returned, arguments)
            there = module.globals.get(f"{symbol}.call")
            if there is None:
                there = ir.Function(module, its_type, f"{symbol}.call")
                there.linkage = "internal"
                body = ir.IRBuilder(there.append_basic_block())
                target = body.load(cgutils.gep_inbounds(body, words, 0, 0))
                body.ret(body.call(body.inttoptr(target, its_type.as_pointer()), there.args))
            status, result = convention.call_function(builder, there, returned, arguments, values)
            with cgutils.if_unlikely(builder, status.is_error):
                convention.return_status_propagate(builder, status)
            return result

        return returned(given), codegen

    return call
