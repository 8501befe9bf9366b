"""Compiling ahead of time what the first calls of a program would wait for.

Owns: ``warm_up``. Imports: the public functions, the registry.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import numpy as np

from aqt_lite._keywords import naming_the_argument
from aqt_lite._near import one_of
from aqt_lite._registry import get_backend
from aqt_lite.api import Scheme, quantize
from aqt_lite.elements import float_type
from aqt_lite.formats import format_of
from aqt_lite.granularity import Granularity, PerChannel
from aqt_lite.ops import dense, linear
from aqt_lite.qarray import QArray

__all__ = ["warm_up"]

_Mode = Literal["fast", "reproducible"]
_MODES: tuple[_Mode, ...] = ("fast", "reproducible")
_PRODUCTS: dict[str, tuple[Callable[..., Any], int]] = {"linear": (linear, 1), "dense": (dense, 0)}
"""Functions, and the axis of a weight that they sum over."""


@naming_the_argument
def warm_up(
    dtype: Any = "int8",
    *,
    shape: Sequence[int] = (512, 512),
    rows: Sequence[int] = (1, 4, 64),
    granularity: Granularity | None = None,
    scheme: Scheme = "symmetric",
    scale_dtype: Any = None,
    float_dtype: Any = "float32",
    modes: Sequence[_Mode] | _Mode | None = None,
    product: Literal["linear", "dense"] = "linear",
    backend: str = "numpy",
) -> dict[str, float]:
    """Quantize, dequantize and multiply an array of ``shape``, so that what is compiled on first use is compiled now.

    The loops of numba, those that XLA calls among them, serve every shape and are cached on disk: call this once after
    an installation, as the user that will run the program, and each process loads them. XLA's own programs are compiled
    for each shape and belong to the process, unless JAX's persistent cache is switched on: give the shapes that you
    have, in the process that has them. docs/performance.md has times, cold and warm.

    Parameters
    ----------
    dtype, granularity, scheme, scale_dtype
        As in :func:`aqt_lite.quantize`; by default a scale for each output, or the groups of a block format.
    shape : tuple of int
        Of a weight (out, in), or (in, out) for ``product="dense"``. Small ones reach fewer loops than large ones: give
        the least that you have, too.
    rows : sequence of int
        Numbers of rows of the activations: few and many of them have forms of their own.
    float_dtype : str
        Type of weight and activations.
    modes : {"fast", "reproducible"} or sequence of them, optional
        Of products. By default "fast", and "reproducible" where the array has such products.
    product : {"linear", "dense"}
        Which function multiplies: weights that lie (in, out) have loops of their own. Those of ``for_dense()`` are read
        by the loops of ``linear``, in groups along the last axis.
    backend : str

    Returns
    -------
    dict
        Seconds that each step took.

    Raises
    ------
    ValueError, TypeError
        A shape that is not two lengths, rows that are no numbers from 1 on, a mode that is not known; what ``quantize``
        or the product refuse.

    Examples
    --------
    >>> import aqt_lite
    >>> list(aqt_lite.warm_up(shape=(8, 16), rows=[2]))
    ['quantize', 'dequantize', 'linear, 2 rows, fast', 'linear, 2 rows, reproducible']
    """
    shape = _lengths("shape", shape, "two lengths (out, in), shape=(512, 512)")
    if len(shape) != 2:
        raise ValueError(f"shape={shape!r}: give two lengths (out, in), shape=(512, 512)")
    rows = _lengths("rows", rows, "a sequence of numbers from 1 on, rows=(1, 4, 64)")
    if isinstance(modes, str):
        modes = (modes,)
    elif modes is not None:
        try:
            modes = tuple(modes)
        except TypeError:
            raise TypeError(f"modes={modes!r}: give a mode or a sequence of modes, modes={_MODES!r}") from None
    for mode in modes or ():
        one_of("modes", mode, _MODES)
    one_of("product", product, tuple(_PRODUCTS))
    multiply, inputs = _PRODUCTS[product]
    b, compute, values = get_backend(backend), float_type(float_dtype, "float_dtype").name, np.random.default_rng(0)
    taken: dict[str, float] = {}

    def made(*shape: int) -> Any:
        return b.xp.astype(b.asarray(values.standard_normal(shape, dtype=np.float32)), b.dtype(compute))

    def timed(what: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        b.to_numpy(result.storage if isinstance(result, QArray) else result)  # compilers may go on beside
        taken[what] = time.perf_counter() - start
        return result

    form = format_of(dtype)
    if granularity is None and form.group is None and form.scaled:
        granularity = PerChannel(1 - inputs)
    w = made(*shape)
    how: dict[str, Any] = {"granularity": granularity, "scheme": scheme, "scale_dtype": scale_dtype}
    q = timed("quantize", lambda: quantize(w, dtype, **how))
    timed("dequantize", q.dequantize)

    def multiplied(x: Any, mode: _Mode) -> Any:
        y = multiply(x, q, mode=mode)
        if b.name != "jax":
            return y
        return b.compiled(multiply)(x, q, mode=mode)  # programs call loops of their own, also where arrays are small

    for count in rows:
        x = made(count, shape[inputs])
        x = b.xp.concat([x[:, :-1], x[:, -1:] * 2.0**14], axis=1)  # an outlier, so that rows have their second pass
        for mode in _MODES if modes is None else modes:
            try:
                timed(f"{product}, {count} rows, {mode}", partial(multiplied, x, mode))
            except ValueError:
                if modes is not None or mode == "fast":  # reproducible was only a default, and not every format has it
                    raise
    return taken


def _lengths(argument: str, given: Any, wanted: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, or an error that says what is wanted."""
    try:
        found = tuple(operator.index(n) for n in given)
    except TypeError:
        raise TypeError(f"{argument}={given!r}: give {wanted}") from None
    if min(found, default=1) < 1:
        raise ValueError(f"{argument}={given!r}: give {wanted}")
    return found
