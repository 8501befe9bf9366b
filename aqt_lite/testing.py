"""Bit-exact comparison, and what an adapter must pass.

Owns: ``mismatches``, ``assert_same_bits``, ``assert_same`` and the conformance suite ``check_backend``. Imports: the
public package. Whoever writes an adapter subclasses ``Backend``, makes it known with ``aqt_lite.register_backend`` (or
by an entry point in the group ``aqt_lite.backends``), and runs ``check_backend(name)``.

Golden vectors, for implementations in any language: docs/golden.md says what is in tests/golden, under CC0, and has a
test of a port that holds it against another library's numbers with ``assert_same``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from aqt_lite._dispatch import run
from aqt_lite._kernels import Kernel
from aqt_lite._namespace import AnyArray
from aqt_lite._protocol import Backend, IntLimits
from aqt_lite._registry import backend_of, get_backend
from aqt_lite.api import choose_qparams, dequantize, fake_quantize, int_limits, quantize
from aqt_lite.comparison import compare
from aqt_lite.elements import FLOAT_TYPES
from aqt_lite.formats import FORMATS, format_of
from aqt_lite.granularity import Granularity, PerBlock, PerChannel, PerGroup, PerTensor
from aqt_lite.ops import dense, linear, reference
from aqt_lite.qarray import QArray

__all__ = [
    "Backend",
    "Conformance",
    "IntLimits",
    "Kernel",
    "assert_same",
    "assert_same_bits",
    "check_backend",
    "mismatches",
]


def mismatches(actual: Any, expected: Any) -> int:
    """How many elements differ in their bits, between arrays of any backends.

    A NaN equals any NaN, whatever its payload: hardware differs there, and no promise covers it.

    Raises
    ------
    AssertionError
        Shapes or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> from aqt_lite.testing import mismatches
    >>> mismatches(np.asarray([1.0, 0.0], "float32"), np.asarray([1.0, -0.0], "float32"))
    1
    """
    return int(_differing(_as_numpy(actual), _as_numpy(expected)).sum())


def assert_same_bits(actual: Any, expected: Any) -> None:
    """AssertionError unless both have the same shape, dtype and bits; QArrays in codes, scale, zero point and offset.

    Examples
    --------
    >>> import aqt_lite
    >>> from aqt_lite.testing import assert_same_bits
    >>> q = aqt_lite.quantize([1.0, 2.0])
    >>> assert_same_bits(q.to_backend("array_api_strict"), q)
    """
    if isinstance(actual, QArray) and isinstance(expected, QArray):
        for name in ("dtype", "float_dtype", "granularity"):
            a, e = getattr(actual, name), getattr(expected, name)
            if a != e:
                raise AssertionError(f"{name} is {a}, not {e}")
        names = ("qvalue", "scale", "zero_point", "offset")
        parts = [(name, getattr(actual, name), getattr(expected, name)) for name in names]
    else:
        parts = [("array", actual, expected)]
    for name, a, e in parts:
        if (a is None) != (e is None):
            raise AssertionError(f"{name} is {a}, not {e}")
        if a is None:
            continue
        if isinstance(a, QArray) and isinstance(e, QArray):
            try:
                assert_same_bits(a, e)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None
            continue
        first, second = _as_numpy(a), _as_numpy(e)
        differ = _differing(first, second)
        if differ.any():
            at = tuple(int(i) for i in np.unravel_index(int(np.argmax(differ)), differ.shape))
            raise AssertionError(
                f"{name}: {int(differ.sum())} of {differ.size} elements differ, "
                f"the first at {at}: {first[at]!r}, not {second[at]!r}"
            )


def assert_same(a: Any, b: Any, *, x: Any = None) -> None:
    """AssertionError with what :func:`aqt_lite.compare` found, unless ``a`` and ``b`` are equal.

    Where :func:`assert_same_bits` says at which element two arrays differ first, this says why.

    Parameters
    ----------
    a, b, x
        As of :func:`aqt_lite.compare`.

    Examples
    --------
    >>> import numpy as np, aqt_lite
    >>> from aqt_lite.testing import assert_same
    >>> x = np.random.default_rng(0).standard_normal((4, 32)).astype("float32")
    >>> q = aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0))
    >>> assert_same((q.qvalue, q.scale), q)
    >>> theirs = aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0), dialect="torch")
    >>> assert_same(theirs, q, x=x)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: They differ, and this explains all of it: a is what dialect 'torch' makes of x; b is what dialect
    'aqt_lite' makes of x.
    ...
    """
    found = compare(a, b, x=x, progress=False)
    if not found.equal:
        raise AssertionError(str(found))


def _differing(a: np.ndarray[Any, Any], e: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Where the bits differ and not both are NaN."""
    if a.shape != e.shape or a.dtype.name != e.dtype.name:
        raise AssertionError(f"{a.dtype.name}{a.shape} is compared with {e.dtype.name}{e.shape}")
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    a, e = (np.array(v, dtype=v.dtype.newbyteorder("="), order="C") for v in (a, e))
    both_nan = (a != a) & (e != e)
    differ: np.ndarray[Any, Any] = (a.view(unsigned) != e.view(unsigned)) & ~both_nan
    return differ


def _as_numpy(x: Any) -> np.ndarray[Any, Any]:
    b = backend_of(x)
    if b is None:
        raise TypeError(f"{type(x).__name__} is no array")
    return np.asarray(b.to_numpy(x))


# ---- conformance of an adapter


@dataclass(frozen=True)
class Conformance:
    """What :func:`check_backend` found; prints as a table."""

    backend: str
    rows: tuple[tuple[str, int, str], ...]
    """Check, elements compared, and what failed ("" where nothing did)."""

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not any(failure for _, _, failure in self.rows)

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.rows)
        lines = [f"{name:<{width}}  {count:>9,}  {failure or 'same bits'}" for name, count, failure in self.rows]
        return "\n".join([f"{'backend ' + self.backend:<{width}}  {'elements':>9}", *lines])


def check_backend(backend: str | Backend | AnyArray) -> Conformance:
    """Hold an adapter against the contract: everything it does must have the bits of the NumPy reference.

    Takes about a second for an eager library. It covers what goes wrong in practice (docs/numerics.md): values near
    ties, the ends of the range, subnormal numbers, ragged groups, approximate division, integer products.

    Parameters
    ----------
    backend : str, Backend or array
        The name of a backend that is built in or registered; an adapter, whose name and arrays must lead to it; or any
        array of a library, for the adapter that serves it: the generic one where nobody has written another.

    Returns
    -------
    Conformance
        ``passed`` is true; ``rows`` and ``str`` have the table of what was compared, a row a check.

    Raises
    ------
    AssertionError
        With the table, where anything failed: all checks run, and each failed row says what it met first.
    TypeError
        ``backend`` is none of these.

    Examples
    --------
    >>> from aqt_lite.testing import check_backend
    >>> report = check_backend("array_api_strict")
    >>> report.passed, len(report.rows)
    (True, 14)
    """
    b = _adapter_of(backend)
    floats = tuple(_floats_of(b))
    rows = []
    for name, check in _CHECKS.items():
        count, failure = 0, ""
        try:
            for actual, expected in check(b, floats):
                assert_same_bits(actual, expected)
                count += int(np.prod(tuple(expected.shape), dtype=np.int64))
        except Exception as error:  # whatever an adapter raises is a finding, and the other checks still run
            failure = f"{type(error).__name__}: {error}"
        rows.append((name, count, failure))
    report = Conformance(b.name, tuple(rows))
    if not report.passed:
        raise AssertionError(f"backend {b.name!r} does not keep the contract:\n{report}")
    return report


def _adapter_of(backend: Any) -> Backend:
    if isinstance(backend, Backend):
        return backend
    if isinstance(backend, str):
        return get_backend(backend)
    found = backend_of(backend)
    if found is None:
        raise TypeError(
            f"backend={backend!r}: give a backend's name (aqt_lite.register_backend makes that of a class known), an "
            "instance of an adapter, or an array of the library to check"
        )
    return found


_Pairs = Iterator[tuple[Any, Any]]
_GRANULARITIES: tuple[Granularity, ...] = (PerTensor(), PerChannel(0), PerChannel(-1), PerGroup(32), PerBlock((2, 50)))


_STORAGE = tuple(dict.fromkeys(f.element.storage for f in FORMATS.values()))
"""The integer types that codes are kept in, which are formats themselves."""


def _numpy_dtype(name: str) -> Any:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _floats_of(b: Backend) -> Iterator[str]:
    """The float types that the library says it can hold; float32 is not optional."""
    for name in FLOAT_TYPES:
        try:
            b.asarray(np.zeros(1, _numpy_dtype(name)))
        except ValueError:
            if name == "float32":
                raise
        else:
            yield name


def _awkward(name: str) -> Iterator[np.ndarray[Any, Any]]:
    """Matrices with all magnitudes of a float type, the ends of its range, and values next to ties.

    All of one shape, so that a compiler has each case to compile once.
    """
    dtype, rng, shape = _numpy_dtype(name), np.random.default_rng(1), (11, 70)
    largest, smallest = FLOAT_TYPES[name].max, float(np.nextafter(dtype.type(0), dtype.type(1)))
    exponents = rng.uniform(np.log2(smallest), np.log2(largest) - 1, shape)
    with np.errstate(all="ignore"):
        yield (rng.standard_normal(shape) * 2.0**exponents).clip(-largest, largest).astype(dtype)
    ends = [largest, -largest, smallest, -smallest, 0.0, -0.0, 1.0, -1.0, 2.0**-14, 1e-30, 3.0]
    yield np.resize(np.asarray(ends).astype(dtype), shape)
    yield np.repeat(np.asarray([0.0, 100.5, -0.0, -1e-3, *[smallest] * 7]).astype(dtype), 70).reshape(shape)
    for seed in range(3):
        step = np.random.default_rng(seed).uniform(0.5, 1) * 2.0 ** (3 * seed - 5)
        top = np.asarray(step * 127).astype(dtype)
        ties = ((np.arange(-127, 127) + 0.5) * (float(top) / 127)).astype(dtype)
        neighbours = [ties, np.nextafter(ties, dtype.type(np.inf)), np.nextafter(ties, dtype.type(-np.inf))]
        yield np.concatenate([np.repeat([top, -top], 4), *neighbours]).reshape(shape)


def _check_transport(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    for name in (*floats, *_STORAGE, "int32"):
        dtype = _numpy_dtype(name)
        bits = np.random.default_rng(0).integers(0, 256, 24 * dtype.itemsize, dtype=np.uint8)
        values = bits.view(dtype)
        values = np.where(values != values, dtype.type(0), values)  # NaN payloads are not promised
        for v in (values.reshape(4, 6), values.reshape(4, 6).T, values[:0], values[0].reshape(()), values[::-2]):
            x = b.asarray(v)
            if b.dtype_name(x) != name or tuple(x.shape) != v.shape:
                raise AssertionError(f"{name} of shape {v.shape} became {b.dtype_name(x)} of shape {tuple(x.shape)}")
            if backend_of(x) is not b:
                raise AssertionError(
                    f"an array of {type(x)} is not recognized as {b.name}: register its adapter, check array_modules"
                )
            back = b.to_numpy(x)
            if not isinstance(back, np.ndarray | np.generic):
                raise AssertionError(f"to_numpy gives a {type(back).__name__}, not a numpy.ndarray")
            yield back, v
        given, expected = values.copy(), values.copy()
        x = b.asarray(given)
        given[...] = dtype.type(1)
        if mismatches(b.to_numpy(x), expected):
            raise AssertionError(f"asarray shares the memory of what it is given, {name}: it has to copy")
        if dtype.kind in "iuf" and name != "bfloat16":
            yield b.to_numpy(b.asarray(values.astype(dtype.newbyteorder(">")))), values


def _check_int_limits(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    for name in _STORAGE:
        own, wanted = b.int_limits(name), int_limits(name)
        yield np.asarray([own.bits, own.min, own.max]), np.asarray([wanted.bits, wanted.min, wanted.max])


def _check_reciprocal(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    rng = np.random.default_rng(2)
    for compute in sorted({FLOAT_TYPES[name].compute for name in floats}):
        low, high = np.log2(FLOAT_TYPES[compute].tiny), np.log2(FLOAT_TYPES[compute].huge)
        x = np.concatenate(
            [2.0 ** rng.uniform(low, high, 20000), 1 + np.arange(500) / 500, 2.0 ** np.asarray([low, high])]
        )
        scales = x.astype(compute)
        yield b.compiled(_reciprocal)(b.asarray(scales), b=b), np.asarray(1, compute) / scales
        yield b.compiled(_reciprocal)(b.asarray(np.asarray([np.nan], compute)), b=b), np.asarray([np.nan], compute)


def _check_quotient(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    rng = np.random.default_rng(6)
    for compute in sorted({FLOAT_TYPES[name].compute for name in floats}):
        width = np.finfo(compute).maxexp / 2 - 2
        y = (2.0 ** rng.uniform(-width, width, 20000)).astype(compute)
        x = (rng.standard_normal(20000) * 2.0 ** rng.uniform(-width, width, 20000)).astype(compute)
        whole = rng.integers(1, 1 << 11, (2, 2000)).astype(compute)  # quotients near the middle between two numbers
        odd = (
            np.asarray([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0], compute),
            np.asarray([3.0, 3.0, 3.0, 3.0, 3.0, np.nan], compute),
        )
        for above, below in ((x, y), (whole[0], whole[1]), odd):
            yield b.compiled(_quotient)(b.asarray(above), b.asarray(below), b=b), above / below


def _check_powers(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    for compute in sorted({FLOAT_TYPES[name].compute for name in floats}):
        low, high = (-126, 128) if compute == "float32" else (-1022, 1024)
        exponents = np.random.default_rng(4).uniform(low, high - 1e-9, 2000)
        normal = np.concatenate([np.ldexp(1.0, np.arange(low, high)), 2.0**exponents])
        x = np.concatenate([normal.clip(2.0**low, FLOAT_TYPES[compute].max), np.zeros(1)]).astype(compute)
        fraction, exponent = np.frexp(x)
        own = b.compiled(_fraction_and_exponent)(b.asarray(x), b=b)
        yield own[0], fraction * x.dtype.type(2)
        yield own[1], np.where(x == 0, low - 1, exponent - 1).astype(np.int32)
    e = np.arange(-1000, 128, dtype=np.int32)
    powers = np.where(e < -100, 0, np.ldexp(1.0, e)).astype(np.float32)
    yield b.compiled(_power_of_two)(b.asarray(e), b=b), powers


def _check_integer_matmul(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    rng = np.random.default_rng(5)
    for rows, width, columns in ((1, 1, 1), (1, 70, 11), (5, 33, 7), (4, 4096, 3)):
        for batch in ((), (3,)):
            x = rng.integers(-128, 128, (*batch, rows, width)).astype(np.int8)
            w = rng.integers(-128, 128, (*batch, columns, width)).astype(np.int8)
            x[..., 0, :], w[..., 0, :] = -128, -128  # the largest sums
            exact = (x.astype(np.int64) @ np.swapaxes(w, -1, -2).astype(np.int64)).astype(np.int32)
            yield b.compiled(_integer_matmul)(b.asarray(x), b.asarray(w), b=b), exact


# The adapter's methods the way the contract runs them: compiled, where the backend compiles.


def _reciprocal(x: Any, *, b: Backend) -> Any:
    return b.reciprocal(x)


def _quotient(x: Any, y: Any, *, b: Backend) -> Any:
    return b.quotient(x, y)


def _fraction_and_exponent(x: Any, *, b: Backend) -> Any:
    return b.fraction_and_exponent(x)


def _power_of_two(e: Any, *, b: Backend) -> Any:
    return b.power_of_two(e)


def _integer_matmul(x: Any, w: Any, *, b: Backend) -> Any:
    return run(b, reference.integer_matmul, x, w)


def _check_quantize(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    for name in floats:
        for x in _awkward(name):
            for dtype in _STORAGE if name == "float32" else ("int8", "uint16"):
                for i, granularity in enumerate(_GRANULARITIES if dtype == "int8" else _GRANULARITIES[-2:]):
                    scheme = ("symmetric", "affine")[(i + (dtype == "int8")) % 2]
                    how: dict[str, Any] = {"dtype": dtype, "scheme": scheme, "granularity": granularity}
                    q, wanted = quantize(b.asarray(x), **how), quantize(x, **how)
                    yield q, wanted
                    yield dequantize(q), dequantize(wanted)


def _check_formats(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    """Every registered format: calibrated in short groups, and near the ends of its grid with a given scale."""
    x = np.random.default_rng(6).standard_normal((3, 21)).astype(np.float32)
    x[1], x[2, ::2] = 0, -0.0
    for name in [*FORMATS, *_FLOATS_WITHOUT_SCALE]:
        form = format_of(name)
        settings: list[dict[str, Any]] = [{"granularity": PerGroup(8)}]
        if not form.scaled:
            settings = [{}, {"rounding": "stochastic", "key": 1}]
        elif form.scale is None and not form.element.middle:
            settings.append({"scale": 0.25, "rounding": "stochastic", "key": 1, "on_clip": "saturate"})
        for how in settings:
            q, wanted = quantize(b.asarray(x), name, **how), quantize(x, name, **how)
            yield q, wanted
            yield q.storage, wanted.storage
            yield dequantize(q), dequantize(wanted)


_FLOATS_WITHOUT_SCALE = ("bitround3", "bitround7", "bitround12")
"""Of a family, since others differ by a shift: a stream of bits, items of 16 bits, and a stream of wide codes."""


def _check_given_scale(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    for name in floats:
        for x in _awkward(name):
            for scale in (0.5, 0.0123, 2.0**-100, 1e30):
                for zero_point in (None, 7):
                    how: dict[str, Any] = {"scale": scale, "zero_point": zero_point, "on_clip": "saturate"}
                    q, wanted = quantize(b.asarray(x), **how), quantize(x, **how)
                    yield q, wanted
                    yield dequantize(q), dequantize(wanted)


def _check_other_functions(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    for name in floats:
        for x in _awkward(name):
            how: dict[str, Any] = {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(16)}
            before = x.copy()
            mine = b.asarray(x)
            pairs = zip(choose_qparams(mine, **how), choose_qparams(x, **how), strict=True)
            yield from pairs
            yield fake_quantize(mine, **how), fake_quantize(x, **how)
            yield mine, before  # untouched


def _check_nonfinite(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    for name in floats:
        for bad in (np.nan, np.inf, -np.inf):
            x = np.ones((3, 8), _numpy_dtype(name))
            x[1, 5] = bad
            for how in ({"scheme": "symmetric"}, {"scheme": "affine"}, {"scale": 0.5}):
                mine, settings = b.asarray(x), {"granularity": PerChannel(0), **how}
                try:
                    q = quantize(mine, **settings)  # type: ignore[arg-type]
                except ValueError:
                    pass
                else:  # only a library that defers its computations may be silent until values are computed
                    if not (b.is_deferred(q.scale) and _second_row_is_loud(q, b)):
                        raise AssertionError(f"{bad} in {name} values was not noticed with {how}")
                settings["nonfinite"] = "ignore"
                yield quantize(mine, **settings), quantize(x, **settings)  # type: ignore[arg-type]


def _second_row_is_loud(q: QArray, b: Backend) -> bool:
    try:
        values = b.to_numpy(dequantize(q)).astype(np.float64)
    except ValueError:
        return True
    return bool(np.isnan(values).any(axis=1).tolist() == [False, True, False])


def _check_products(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((5, 70)) * 10.0 ** rng.uniform(-6, 6, (5, 70))).astype(np.float32)
    x[0, :3] = [0, 1e-42, 3e38]
    w, bias = rng.standard_normal((11, 70)).astype(np.float32), rng.standard_normal(11).astype(np.float32)
    for name in floats:
        if name == "float64":  # not every backend has it, so it has no reproducible products
            continue
        dtype = _numpy_dtype(name)
        rows = x.clip(-1000, 1000).astype(dtype)
        for scheme in ("symmetric", "affine"):
            for granularity in (PerChannel(0), PerChannel(1), PerGroup(32)) if name == "float32" else (PerTensor(),):
                q = quantize(w, scheme=scheme, granularity=granularity)
                mine = [b.asarray(v) for v in (rows, bias.astype(dtype))]
                yield (
                    linear(mine[0], q.to_backend(b.name), mine[1], mode="reproducible"),
                    linear(rows, q, bias.astype(dtype), mode="reproducible"),
                )
        q = quantize(w.T, granularity=PerGroup(16, axis=0))
        yield dense(b.asarray(rows), q.to_backend(b.name), mode="reproducible"), dense(rows, q, mode="reproducible")
    for scheme in ("symmetric", "affine"):
        left = quantize(x[1:], "uint8", scheme=scheme, granularity=PerChannel(0))  # type: ignore[arg-type]
        right = quantize(w, scheme=scheme, granularity=PerChannel(0))  # type: ignore[arg-type]
        yield linear(left.to_backend(b.name), right.to_backend(b.name)), linear(left, right)


def _check_straight_through(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    for name in floats:
        x = np.linspace(-3, 3, 50).astype(_numpy_dtype(name))
        y = np.round(x)
        y[0] = -0.0
        yield b.straight_through(b.asarray(x), b.asarray(y), b.asarray(x) > 0), y
        yield b.stop_gradient(b.asarray(x)), x


def _check_container(b: Backend, floats: tuple[str, ...]) -> _Pairs:
    x = next(_awkward("float32"))
    for granularity in _GRANULARITIES:
        there = quantize(x, scheme="affine", granularity=granularity)
        q = there.to_backend(b.name)
        yield q, there
        yield q.to_backend("numpy"), there
        yield q[2:4], there[2:4]
        if (q.nbytes, q.backend) != (there.nbytes, b.name):
            raise AssertionError(f"nbytes {q.nbytes}, backend {q.backend}: expected {there.nbytes}, {b.name}")


_CHECKS: dict[str, Callable[[Backend, tuple[str, ...]], _Pairs]] = {
    "asarray and to_numpy": _check_transport,
    "int_limits": _check_int_limits,
    "reciprocal": _check_reciprocal,
    "quotient": _check_quotient,
    "powers of two": _check_powers,
    "integer_matmul": _check_integer_matmul,
    "quantize and dequantize": _check_quantize,
    "formats": _check_formats,
    "given scale and zero point": _check_given_scale,
    "choose_qparams, fake_quantize": _check_other_functions,
    "non-finite values": _check_nonfinite,
    "reproducible products": _check_products,
    "straight-through values": _check_straight_through,
    "QArray": _check_container,
}
