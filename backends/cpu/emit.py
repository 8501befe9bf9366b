"""What intrinsics write of LLVM's instructions: calls by name, loops, and vectors from memory and back.

Owns: those words, for all loops. Imports: llvmlite alone. Addresses are integers, as numba hands them on; what is read
or written there need not begin on a multiple of anything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

__all__ = [
    "byte_turns",
    "counted_loop",
    "function",
    "in_all_lanes",
    "item_at",
    "load",
    "read_ahead",
    "shuffled",
    "store",
]

_BYTE, _INT, _ADDRESS = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_POINTER: Any = ir.PointerType(_BYTE)

FIRST_CACHE, SECOND_CACHE = 3, 2
"""Where ``read_ahead`` brings a line to."""


def function(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """One of LLVM's functions, told of once in a module."""
    found = builder.module.globals.get(name)
    return ir.Function(builder.module, ir.FunctionType(result, arguments), name) if found is None else found


def load(builder: Any, address: Any, its_type: Any) -> Any:
    """What lies at an address."""
    return builder.load(builder.inttoptr(address, its_type.as_pointer()), align=1)


def store(builder: Any, value: Any, address: Any) -> None:
    """Write a value to an address."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


def item_at(builder: Any, base: Any, index: Any, size: int) -> Any:
    """The address of one of the items of ``size`` bytes from ``base`` on."""
    return builder.add(base, builder.mul(index, _ADDRESS(size)))


def read_ahead(builder: Any, address: Any, cache: int = SECOND_CACHE) -> None:
    """Have a line of memory brought into a cache; past an array's end that is harmless."""
    fetch = function(builder, "llvm.prefetch.p0", ir.VoidType(), [_POINTER, _INT, _INT, _INT])
    builder.call(fetch, [builder.inttoptr(address, _POINTER), _INT(0), _INT(cache), _INT(1)])


def shuffled(builder: Any, a: Any, b: Any, places: list[int]) -> Any:
    """The lanes of ``a``, and then of ``b``, at these places."""
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_INT, len(places)), places))


def in_all_lanes(builder: Any, value: Any, vector: Any) -> Any:
    """A vector of one value."""
    undefined = ir.Constant(vector, ir.Undefined)
    return shuffled(builder, builder.insert_element(undefined, value, _INT(0)), undefined, [0] * vector.count)


def byte_turns(builder: Any, a: Any, b: Any, item: int, upper: bool) -> Any:
    """Items of so many bytes of ``a`` and ``b`` by turns, from the lower or the upper half of every 16 bytes."""
    count: int = a.type.count
    starts = [start + 8 * upper + i for start in range(0, count, 16) for i in range(0, 8, item)]
    return shuffled(builder, a, b, [of + start + i for start in starts for of in (0, count) for i in range(item)])


def counted_loop(
    builder: Any, count: Any, totals: list[Any], step: Callable[[Any, list[Any]], list[Any]], least: int = 1
) -> list[Any]:
    """``totals = step(i, totals)`` for i from 0 to count - 1, the totals in registers; count is at least ``least``."""
    before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
    if least:
        builder.branch(loop)
    else:
        builder.cbranch(builder.icmp_signed(">", count, _ADDRESS(0)), loop, after)
    builder.position_at_end(loop)
    i = builder.phi(_ADDRESS)
    carried = [builder.phi(total.type) for total in totals]
    new = step(i, carried)
    following, end = builder.add(i, _ADDRESS(1)), builder.block  # another block where a loop inside has ended
    for phi, first, next_one in zip([i, *carried], [_ADDRESS(0), *totals], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(next_one, end)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    if least:
        return new
    results = [builder.phi(total.type) for total in totals]
    for result, first, last in zip(results, totals, new, strict=True):
        result.add_incoming(first, before)
        result.add_incoming(last, end)
    return results
