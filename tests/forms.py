"""Every form in which the same quantization can be asked for: each backend, eager and compiled.

A ``Problem`` is one call of ``quantize``; a form takes several, since a compiler takes less time over one function with
many calls than over many functions, and gives what each returned as NumPy arrays.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from optional import WITHOUT, jax, torch

import aqt_lite
from aqt_lite import PerTensor, QArray
from aqt_lite._registry import _BUILTIN, get_backend
from aqt_lite.testing import mismatches


@dataclass(frozen=True)
class Call:
    """Arguments of ``quantize`` that are no arrays."""

    dtype: object = "int8"
    scheme: str = "symmetric"
    granularity: object = PerTensor()
    """None: the format's own."""
    nonfinite: str = "raise"
    offset: str | None = None
    scale_dtype: str | None = None
    scale_mode: str | None = None
    rounding: str = "half_even"
    key: int | None = None
    dialect: str = "aqt_lite"

    def __call__(self, x, scale=None, zero_point=None, offset=None):
        """Codes, scale, zero point, dequantized values, offset, and how the codes are kept."""
        arguments = {field.name: getattr(self, field.name) for field in fields(self)}
        if offset is not None:
            arguments["offset"] = offset
        return bits_of(aqt_lite.quantize(x, scale=scale, zero_point=zero_point, on_clip="saturate", **arguments))


class Problem(NamedTuple):
    """One call on NumPy arrays."""

    x: np.ndarray
    call: Call = Call()
    scale: np.ndarray | None = None
    zero_point: np.ndarray | None = None
    offset: np.ndarray | None = None


class Bits(NamedTuple):
    """What a call returned. Scales that are kept in a format of their own are ``Bits`` themselves."""

    codes: np.ndarray
    scale: np.ndarray | Bits | None
    zero_point: np.ndarray | None
    values: np.ndarray | None
    """None where an oracle does not say what codes are worth."""
    offset: np.ndarray | None = None
    storage: np.ndarray | None = None
    """None where an oracle does not say how codes are packed."""

    def each(self, function):
        """The same with ``function`` applied to every array."""
        parts = (part.each(function) if isinstance(part, Bits) else part for part in self)
        return Bits(*(part if part is None or isinstance(part, Bits) else function(part) for part in parts))


def bits_of(q):
    """The parts of a QArray."""
    scale = bits_of(q.scale) if isinstance(q.scale, QArray) else q.scale
    return Bits(q.qvalue, scale, q.zero_point, q.dequantize(), q.offset, q.storage)


def differing(actual, expected):
    """How many numbers differ in a bit; a shape or dtype that differs raises."""
    count = 0
    for name in Bits._fields:
        mine, wanted = getattr(actual, name), getattr(expected, name)
        if name in ("storage", "values") and (mine is None or wanted is None):
            continue
        assert (mine is None, type(mine) is Bits) == (wanted is None, type(wanted) is Bits), name
        if wanted is not None:
            count += differing(mine, wanted) if isinstance(wanted, Bits) else mismatches(mine, wanted)
    return count


def compared(expected):
    """How many numbers ``differing`` compares."""
    parts = (compared(part) if isinstance(part, Bits) else part.size for part in expected if part is not None)
    return sum(parts)


# ---- forms: list of problems -> list of Bits


def _moved(name, problems):
    """The arrays of every problem on a backend, and the calls."""
    put = get_backend(name).asarray
    arrays = [tuple(None if a is None else put(np.asarray(a)) for a in (p.x, *p[2:])) for p in problems]
    return arrays, tuple(p.call for p in problems)


def _back(name, results):
    get = get_backend(name).to_numpy
    return [Bits(*bits).each(lambda part: np.array(get(part))) for bits in results]


def _all(arrays, calls):
    return [call(*a) for call, a in zip(calls, arrays, strict=True)]


def _eager(name):
    def form(problems):
        with _x64(problems) if name == "jax" else contextlib.nullcontext():
            arrays, calls = _moved(name, problems)
            return _back(name, _all(arrays, calls))

    return form


def _x64(problems):
    """JAX has float64 only where it is asked for."""
    return jax.enable_x64(any(p.x.dtype.name == "float64" for p in problems))


SOON_IN_MEMORY = {"realize_opcount_threshold": 6, "realize_reads_threshold": 1}
"""What inductor writes to memory and does not compute once more for each of those that use it.

By its own thresholds it goes through the same steps so often that some dialects compile for two minutes, and so for a
sixth of that. The steps are the same, in loops of which each has fewer; ``test_torch`` compiles as users do.
"""


def torch_compiled(problems):
    """One graph without a break: of integers by our own rules, which are few steps, as users compile it."""
    arrays, calls = _moved("torch", problems)
    few_steps = all(call.dialect == "aqt_lite" and str(call.dtype).startswith(("int", "uint")) for call in calls)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # inductor's own, about torch.jit
        options = None if few_steps else SOON_IN_MEMORY
        compiled = torch.compile(lambda a: _all(a, calls), fullgraph=True, options=options)
        return _back("torch", compiled(arrays))


@functools.cache
def _jitted():
    return jax.jit(_all, static_argnames="calls")


def jax_jitted(problems):
    """Arrays are arguments."""
    with _x64(problems):
        arrays, calls = _moved("jax", problems)
        return _back("jax", _jitted()(arrays, calls=calls))


def jax_constant(problems):
    """The function closes over its arrays, which XLA then folds."""
    with _x64(problems):
        arrays, calls = _moved("jax", problems)
        return _back("jax", jax.jit(lambda: _all(arrays, calls))())


def jax_constant_qparams(problems):
    """The function closes over scales and zero points; ``x`` is an argument."""
    with _x64(problems):
        arrays, calls = _moved("jax", problems)
        rest = [a[1:] for a in arrays]
        function = jax.jit(lambda xs: _all([(x, *r) for x, r in zip(xs, rest, strict=True)], calls))
        return _back("jax", function([a[0] for a in arrays]))


NUMPY, STRICT, TORCH, COMPILED = "NumPy", "array-api-strict", "torch", "torch.compile"
JAX, JIT, CONSTANT, CONSTANT_QPARAMS = "JAX", "JAX jit", "JAX jit, constants", "JAX jit, constant scale"

_TITLES = {"numpy": NUMPY, "array_api_strict": STRICT, "torch": TORCH, "jax": JAX}
ALL_FORMS = {
    **{_TITLES.get(name, name): _eager(name) for name in _BUILTIN},
    COMPILED: torch_compiled,
    JIT: jax_jitted,
    CONSTANT: jax_constant,
    CONSTANT_QPARAMS: jax_constant_qparams,
}
_OF_TORCH = (TORCH, COMPILED)
_OF_JAX = (JAX, JIT, CONSTANT, CONSTANT_QPARAMS)
FORMS = {
    name: form
    for name, form in ALL_FORMS.items()
    if not (name in _OF_TORCH and "torch" in WITHOUT) and not (name in _OF_JAX and "jax" in WITHOUT)
}
"""Those that this run tests: all of them, unless it says which library it goes without."""

EAGER = tuple(title for name in _BUILTIN if (title := _TITLES.get(name, name)) in FORMS)


def serves(form, problem):
    """Whether a form has the dtype: the standard knows neither float16 nor bfloat16."""
    return form != STRICT or problem.x.dtype.name in ("float32", "float64")


def disagreements(problems, expected, forms=tuple(FORMS)):
    """``{form: numbers that differ from the expected ones}``, without the forms that agree."""
    found = {}
    assert set(forms) <= set(ALL_FORMS)
    for form in filter(FORMS.__contains__, forms):
        served = [i for i, p in enumerate(problems) if serves(form, p)]
        results = FORMS[form]([problems[i] for i in served]) if served else []
        count = sum(differing(bits, expected[i]) for bits, i in zip(results, served, strict=True))
        if count:
            found[form] = count
    return found
