"""The adapter of JAX: eager calls run as cached jitted functions, and everything works under its transformations."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aqt_lite import _exact
from aqt_lite._namespace import Array
from aqt_lite._protocol import Backend, Node, Ways
from aqt_lite._registry import get_backend
from aqt_lite.backends.cpu.runtime import aligned_empty
from aqt_lite.backends.jax import refusals, trees
from aqt_lite.backends.jax.sharding import keeping_shardings


@jax.custom_jvp
def _straight_through(x: Array, y: Array, inside: Array) -> Array:
    return y


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    x, y, inside = primals
    return _straight_through(x, y, inside), jnp.where(inside, tangents[0], 0).astype(y.dtype)


class JaxBackend(Backend):
    """JAX on CPU, GPU and TPU."""

    name = "jax"
    array_modules = ("jax", "jaxlib")
    xp = jnp

    def __init__(self) -> None:
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}

    def asarray(self, values: np.ndarray[Any, Any], like: Array | None = None) -> Array:
        has_64_bits = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        if values.dtype.itemsize == 8 and values.dtype.kind in "iuf" and not has_64_bits:
            raise ValueError(
                f"JAX would narrow {values.dtype.name} silently: convert it to {values.dtype.name[:-2]}32 first, or "
                f"set jax.config.update('jax_enable_x64', True)"
            )
        # a copy, since JAX would share its memory; as it lies here JAX does so with the copy, and makes none of its own
        native = aligned_empty(values.shape, values.dtype.newbyteorder("="))
        native[...] = values
        device = None
        if isinstance(like, jax.Array) and not self.is_traced(like):  # a ShapeDtypeStruct has no device
            device = like.device if like.committed and len(like.devices()) == 1 else None
        return jax.device_put(native, device)  # transfers that are asked for are always allowed

    def to_numpy(self, x: Array) -> np.ndarray[Any, Any]:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            # Over several processes, all of which run the same program, and so ask for the same.
            gathered = importlib.import_module("jax.experimental.multihost_utils").process_allgather(x, tiled=True)
            return np.asarray(gathered)
        if isinstance(x, jax.Array) and not self.is_traced(x):  # in a tenth of the time of ``device_get``
            with jax.transfer_guard_device_to_host("allow"):
                return np.asarray(x)
        return np.asarray(jax.device_get(x))  # likewise

    def arange(self, start: int, stop: int, like: Array) -> Array:
        return jnp.arange(start, stop, dtype=jnp.int32)

    def part(self, x: Array, index: tuple[Any, ...]) -> Array:
        with jax.transfer_guard_host_to_device("allow"):  # JAX moves the first index of a slice to the device
            return x[index]

    def to_device(self, x: Array, device: Any) -> Array:
        return jax.device_put(x, device)

    def dtype_name(self, x: Array) -> str:
        return _name(x.dtype)

    def device(self, x: Array) -> Any:
        return None if self.is_traced(x) else x.device

    def share_a_device(self, x: Array, y: Array) -> bool:
        if self.is_traced(x) or self.is_traced(y) or not (x.committed and y.committed):
            return True  # uncommitted arrays move to the other operand's device
        return bool(x.devices() == y.devices())

    def is_traced(self, x: Array) -> bool:
        return isinstance(x, jax.core.Tracer)

    def bits_of(self, x: Array) -> Array:
        return jax.lax.bitcast_convert_type(x, jnp.uint8 if x.dtype.itemsize == 1 else f"int{8 * x.dtype.itemsize}")

    def floats_of(self, bits: Array, name: str) -> Array:
        return jax.lax.bitcast_convert_type(bits, name)

    def reciprocal(self, x: Array) -> Array:
        width = x.dtype.itemsize * 8
        integer = jnp.int32 if width == 32 else jnp.int64  # overflow wraps, by XLA's definition
        bitcast = jax.lax.bitcast_convert_type
        return _exact.reciprocal(x, xp=jnp, bitcast=bitcast, integer=integer, bits=integer)

    def quotient(self, x: Array, y: Array) -> Array:
        integer = jnp.int32 if x.dtype.itemsize == 4 else jnp.int64
        bitcast = jax.lax.bitcast_convert_type
        return _exact.quotient(x, y, xp=jnp, bitcast=bitcast, integer=integer, bits=integer)

    def largest(self, x: Array, *, axis: Any, keepdims: bool) -> Array:
        # The maximum over the devices of a sharded axis forgets NaN (XLA's all-reduce on CPU, jax 0.10), not infinity.
        return jnp.max(jnp.where(jnp.isnan(x), jnp.inf, x), axis=axis, keepdims=keepdims)

    def fraction_and_exponent(self, x: Array) -> tuple[Array, Array]:
        # zero and NaN stay what they are
        integer, mantissa, bias = (jnp.int32, 23, 127) if x.dtype.itemsize == 4 else (jnp.int64, 52, 1023)
        bits = jax.lax.bitcast_convert_type(x, integer)
        fraction = jax.lax.bitcast_convert_type((bits & ((1 << mantissa) - 1)) | (bias << mantissa), x.dtype)
        return jnp.where(x > 0, fraction, x), ((bits >> mantissa) - bias).astype(jnp.int32)

    def power_of_two(self, e: Array) -> Array:
        power = jax.lax.bitcast_convert_type((jnp.clip(e, -100, 127) + 127) << 23, jnp.float32)
        return jnp.where(e < -100, 0.0, power)

    def compute_if_any(self, flags: Array, compute: Callable[[], Array], otherwise: Array) -> Array:
        return jax.lax.cond(jnp.any(flags), compute, lambda: otherwise)

    def in_parts(
        self,
        compute: Callable[[Callable[[Array, int], Array]], Array],
        length: int,
        size_of_part: Callable[[], int],
        axis: int,
        like: Array,
    ) -> Array:
        # a part that is cut out of a sharded array would have to be gathered first; exports may not know the length
        if not isinstance(length, int) or jax.device_count() > 1 or (size := size_of_part()) >= length:
            return compute(lambda a, _: a)

        def part(i: Any) -> tuple[Any, Array]:
            start = jnp.minimum(i * size, length - size)  # the last part begins earlier, and gives some numbers again
            return start, compute(lambda a, axis: jax.lax.dynamic_slice_in_dim(a, start, size, axis))

        def step(i: Any, whole: Array) -> Array:
            start, found = part(i)
            return jax.lax.dynamic_update_slice_in_dim(whole, found, start, axis)

        form = jax.eval_shape(lambda: part(0)[1])
        shape = (*form.shape[:axis], length, *form.shape[axis + 1 :])
        return jax.lax.fori_loop(0, -(-length // size), step, jnp.zeros(shape, form.dtype))

    def mapped(self, function: Callable[[Any, Any], Array], x: Array, stack: Any, length: int) -> Array:
        # a loop, not vmap, on a CPU: vmap turns a condition into both of its branches
        if jax.default_backend() == "cpu":
            return jax.lax.map(lambda each: function(*each), (x, stack))
        return jax.vmap(function)(x, stack)

    def repeated(self, times: int, step: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        return jax.lax.fori_loop(0, times, step, state)  # type: ignore[no-any-return]

    def ordered_sum(self, x: Array) -> Array:
        return jax.lax.fori_loop(1, x.shape[0], lambda i, total: total + x[i], x[0])

    def differentiates(self, *arrays: Array | None) -> bool:
        return any(self.is_traced(a) for a in arrays)  # under jit alone XLA drops what only derivatives need

    def stop_gradient(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def straight_through(self, x: Array, y: Array, inside: Array) -> Array:
        return _straight_through(x, y, inside)

    def has_nan(self, x: Array) -> bool:
        if next(iter(x.devices())).platform == "cpu":  # by NumPy, without a copy: XLA would compile for every shape
            return get_backend("numpy").has_nan(self.to_numpy(x))
        return bool(self.to_numpy(jnp.any(jnp.isnan(x))))

    def opened(self, node: Any) -> Node | None:
        return trees.opened(node)

    def ways_of(self, node: Any) -> Ways:
        return trees.ways_of(node)

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        found = self._compiled.get(function)
        if found is None:
            parameters = inspect.signature(function).parameters.values()
            static = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
            jitted = jax.jit(function, static_argnames=static)
            found = self._compiled[function] = keeping_shardings(jitted)
        return found

    def register_container(self, cls: type, flatten: Any, unflatten: Any, names: tuple[str, ...]) -> None:
        trees.register(cls, flatten, unflatten, names)
        refusals.refuse(cls)


@functools.cache
def _name(dtype: Any) -> str:
    return str(dtype)
