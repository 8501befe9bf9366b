"""What primitives around compiled loops share: all but their operands, and what they become.

Owns: how one is made, lowered, mapped over (vmap) and, where another function stands in for it, differentiated; and the
version of what numba caches of it. Imports: nothing of this package.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir

__all__ = ["instead_on_cpu", "primitive", "version_of"]


def primitive(
    target: str, plain: Callable[..., Any], results: Callable[..., Any], is_registered: Callable[[], bool]
) -> Callable[..., Any]:
    """Bind operands to a primitive that calls ``target`` on a CPU; elsewhere, and exported, it is ``plain``.

    ``results`` says shapes and dtypes for the operands'. Keywords, which are integers, are handed to all three. Whoever
    maps over rows of x alone has them multiplied at once (``products``); what is mapped over here goes one by one.
    """
    made = core.Primitive(target)
    made.multiple_results = True
    lower_plain, lower_call = mlir.lower_fun(plain, multiple_results=True), jax.ffi.ffi_lowering(target)

    def on_cpu(context: Any, *operands: Any, **static: int) -> Any:
        # what is exported may run where XLA does not know the call's target
        exporting = context.module_context.lowering_parameters.for_export
        if exporting or not is_registered():
            return lower_plain(context, *operands, **static)
        return lower_call(context, *operands, **{name: np.int64(number) for name, number in static.items()})

    def batch(arrays: Any, axes: Any, **static: int) -> Any:
        return _one_after_the_other(functools.partial(made.bind, **static), arrays, axes)

    made.def_abstract_eval(results)  # type: ignore[no-untyped-call]
    made.def_impl(plain)  # type: ignore[no-untyped-call] # which jax.disable_jit alone evaluates
    batching.primitive_batchers[made] = batch
    mlir.register_lowering(made, lower_plain)
    mlir.register_lowering(made, on_cpu, platform="cpu")
    bind: Callable[..., Any] = made.bind
    return bind


def instead_on_cpu(name: str, plain: Callable[..., Any], by_loops: Callable[..., Any]) -> Callable[..., Any]:
    """``plain``, an array of arrays and of static keywords; in programs that run on this CPU, ``by_loops``.

    Transformations and exports see ``plain`` alone.
    """
    made = core.Primitive(name)

    @functools.cache
    def compiled(function: Callable[..., Any], static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return jax.jit(functools.partial(function, **dict(static)))

    def at_once(function: Callable[..., Any], static: dict[str, Any]) -> Callable[..., Any]:
        """As one program where no other is being made: each step would be one, with results in memory of its own."""
        return compiled(function, tuple(sorted(static.items(), key=lambda item: item[0])))

    lower_plain = mlir.lower_fun(plain, multiple_results=False)
    lower_loops = mlir.lower_fun(by_loops, multiple_results=False)

    def on_cpu(context: Any, *operands: Any, **static: Any) -> Any:
        exporting = context.module_context.lowering_parameters.for_export
        return (lower_plain if exporting else lower_loops)(context, *operands, **static)

    def result(*operands: Any, **static: Any) -> Any:
        found = jax.eval_shape(functools.partial(plain, **static), *operands)
        return jax.core.ShapedArray(found.shape, found.dtype)

    def evaluate(*operands: Any, **static: Any) -> Any:
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            return plain(*operands, **static)
        return at_once(made.bind, static)(*operands)

    def batch(arrays: Any, axes: Any, **static: Any) -> Any:
        return jax.vmap(at_once(plain, static), in_axes=axes)(*arrays), 0

    def jvp(primals: Any, tangents: Any, **static: Any) -> Any:
        known = tuple(ad.instantiate_zeros(t) for t in tangents)  # type: ignore[no-untyped-call]
        return jax.jvp(at_once(plain, static), tuple(primals), known)

    made.def_abstract_eval(result)  # type: ignore[no-untyped-call]
    made.def_impl(evaluate)  # type: ignore[no-untyped-call]
    batching.primitive_batchers[made] = batch
    ad.primitive_jvps[made] = jvp
    mlir.register_lowering(made, lower_plain)
    mlir.register_lowering(made, on_cpu, platform="cpu")
    bind: Callable[..., Any] = made.bind
    return bind


def _one_after_the_other(bind: Any, arrays: Any, axes: Any) -> tuple[Any, list[int]]:
    """The rule for ``bind``, mapped over; what is not mapped over is not copied either."""
    every = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes, strict=True)]
    mapped = tuple(a for a, axis in zip(every, axes, strict=True) if axis is not None)

    def one(slices: Any) -> Any:
        found = iter(slices)
        return bind(*(a if axis is None else next(found) for a, axis in zip(every, axes, strict=True)))

    results = jax.lax.map(one, mapped)
    return results, [0] * len(results)


def version_of(*modules: Any) -> int:
    """A number that changes with their sources: numba looks at one file alone when it reads what it has cached."""
    try:
        return zlib.crc32(b"".join(Path(str(module.__file__)).read_bytes() for module in modules))
    except OSError:  # no sources, and then numba caches nothing
        return 0
