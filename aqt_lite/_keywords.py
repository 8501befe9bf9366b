"""What other libraries call arguments, and what says the same here.

Owns: that table, and the errors of functions and specs that are given such a name, too few arguments, too many by
position, or something else for True or False. Imports: how values are shown, near names.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from aqt_lite._near import did_you_mean, shown

__all__ = ["in_a_spec", "naming_the_argument", "naming_the_fields", "said_here"]

_VARIED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_P = ParamSpec("_P")
_R = TypeVar("_R")
_C = TypeVar("_C", bound=type)

_WAYS = {  # each begins with the argument that it names; of several, the first that a function has is its way
    "dtype='int4', 'int8', ...": (
        "bits num_bits nbits n_bits w_bit wbits weight_bits qtype qdtype quant_type quant_dtype weights weight_dtype "
        "target_dtype out_type output_dtype signed unsigned quant_min quant_max"
    ),
    "keepbits=7 and the like": "bits num_bits nbits n_bits",
    "dtype= of dequantize": "out_dtype",
    "dtype='bitround7' and the like": "keepbits",
    "size=": "group_size groupsize q_group_size block_size blocksize group",
    "shape=": "block_size blocksize",
    "axis=": "dim ch_axis channel_axis",
    "granularity=PerGroup(size)": "group groups groupsize group_size q_group_size",
    "granularity=PerGroup(size), or PerBlock(shape)": "block_size blocksize",
    "granularity=PerChannel(axis), or PerGroup(size, axis) for groups": "axis dim",
    "granularity=PerChannel(axis)": "ch_axis channel_axis channel_dim per_channel channelwise per_row per_token",
    "granularity=PerTensor()": "per_tensor",
    "scheme='symmetric' or 'affine'": "symmetric sym symmetric_quant is_symmetric asymmetric qscheme zero_point zeros",
    "zero_point=": "zero zeros zero_points quant_zero",
    "scale=": "scales step delta",
    "rounding=": "round_mode rounding_mode stochastic",
    "key= with rounding='stochastic'": "seed rng generator",
    "w= as for_dense() stores it, or linear": "transpose",
    "max_abs_err=": "max_error max_abs_error atol abs_tol abs_err abs_error tolerance tol error_bound bound eps",
    "max_rel_err=": "max_rel_error rtol rel_tol rel_err rel_error",
    "modes=": "mode",
}
_OF_QUANTIZE = frozenset({"dtype", "granularity", "scheme", "scale", "zero_point", "rounding", "key"})
_OF_SPECS = _OF_QUANTIZE | frozenset(
    [
        "offset",
        "scale_dtype",
        "scale_mode",
        "dialect",
        "nonfinite",
        "mask",
        "fill_value",
        "missing",
        "on_clip",
        "max_abs_err",
        "max_rel_err",
    ]
)
_BESIDE_FORMATS = frozenset({"granularity", "scheme"})  # what functions have whose dtype is a format, and no float type


def said_here(name: str, arguments: Collection[str]) -> str:
    """Which of ``arguments`` says what other libraries call ``name``; empty where none does, or it means nothing."""
    has_formats = not _BESIDE_FORMATS.isdisjoint(arguments)
    for way, names in _WAYS.items():
        if name in names.split() and way.partition("=")[0] in arguments and (has_formats or way[:6] != "dtype="):
            return way
    return ""


def in_a_spec(name: str) -> str:
    """How rules say what ``quantize``, or another library, calls ``name``; empty where neither has such a name."""
    way = f"{name}=" if name in _OF_SPECS else said_here(name, _OF_QUANTIZE)
    return f"use rules=[(pattern, spec)], where a spec is a dict of quantize's keywords, with {way}" if way else ""


def naming_the_argument(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function``, whose TypeErrors say what an argument that other libraries have is called here.

    They also say what is missing, and by which name goes what is too much by position; and refuse what is neither True
    nor False where one of them is wanted. (Classes check their fields, and say of what.)
    """
    parameters = inspect.signature(function).parameters
    known = tuple(name for name in parameters if name not in ("self", "cls"))
    called = _called(function)
    by_name = {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    most: float = len(parameters) - len(by_name)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters.values()):
        most = math.inf
    needed = tuple(
        name for name, p in parameters.items() if p.default is p.empty and name not in by_name and p.kind not in _VARIED
    )
    needed_by_name = tuple(name for name, p in by_name.items() if p.default is p.empty)
    least = most + 1 if needed_by_name else len(needed)  # fewer by position: look whether the others go by name
    is_class = function.__name__ == "__init__"
    flags = {n: i for i, (n, p) in enumerate(parameters.items()) if p.annotation in ("bool", bool) and not is_class}
    first_flag: float = min((i for name, i in flags.items() if name not in by_name), default=math.inf)

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if kwargs:
            for name in kwargs:
                if name not in known:
                    raise TypeError(_no_such_argument(called, name, known))
                if name in flags and not isinstance(kwargs[name], (bool, np.bool_)):
                    raise TypeError(_no_flag(called, name, kwargs[name]))
        if len(args) > first_flag:
            for name, i in flags.items():
                if i < len(args) and not isinstance(args[i], (bool, np.bool_)):
                    raise TypeError(_no_flag(called, name, args[i]))
        if not least <= len(args) <= most:
            missing = [name for name in needed[len(args) :] + needed_by_name if name not in kwargs]
            if missing or len(args) > most:
                _check_number(function, args, kwargs)
        return function(*args, **kwargs)

    return call


def naming_the_fields(cls: _C) -> _C:
    """A class whose constructor does so."""
    made = cls.__init__  # type: ignore[misc]
    made.__doc__ = cls.__doc__  # which has an example
    cls.__init__ = naming_the_argument(made)  # type: ignore[misc]
    return cls


def _no_flag(called: str, name: str, value: Any) -> str:
    """What to say of a value that Python would take by its truth, as it takes "no"."""
    return f"{called}(): {name}={shown(value)} is neither True nor False: give one of them"


def _called(function: Callable[..., Any]) -> str:
    return function.__qualname__.removesuffix(".__init__").rpartition(".")[2]


def _check_number(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """TypeError where arguments are missing, or more than those that go by position."""
    called, parameters = _called(function), inspect.signature(function).parameters
    by_name = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    by_position = [name for name in parameters if name not in by_name]
    missing = [
        name
        for i, (name, p) in enumerate(parameters.items())
        if p.default is p.empty and p.kind not in _VARIED and name not in kwargs and (i >= len(args) or name in by_name)
    ]
    too_many = args[len(by_position) :]
    if too_many:
        takes = _listed([name for name in by_position if name not in ("self", "cls")])
        likely = missing if len(missing) == 1 else by_name
        meant = meant_by(function, too_many[0]) or (likely[0] if len(likely) == 1 else None)
        value = shown(too_many[0])
        way = f"; by name go {_listed(by_name)}" if by_name else ""
        way = f": give {meant}={value}" if meant else way
        raise TypeError(f"{called}() takes {takes or 'nothing'} by position, and {value} is one too many{way}")
    if missing:
        raise TypeError(f"{called}() needs {_listed(missing)}{_example(called, function.__doc__)}")


def meant_by(function: Callable[..., Any], value: Any) -> str | None:
    """Which keyword of ``function`` takes ``value``, by their annotations; None where none or several do."""
    try:
        hints = get_type_hints(function)
    except NameError:  # of names that type checkers alone import
        return None
    named = [name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    found = [name for name in named if _takes(hints.get(name, Any), value)]
    return found[0] if len(found) == 1 else None


def _takes(hint: Any, value: Any) -> bool:
    """Whether an annotation has that class, or that text."""
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if isinstance(hint, type) and hint is not Any:
        told_apart = hint not in (str, int, float, object) and not getattr(hint, "_is_protocol", False)
        return told_apart and isinstance(value, hint)
    return any(_takes(part, value) for part in get_args(hint) if get_origin(hint) in (Union, UnionType))


def _example(called: str, doc: str | None) -> str:
    """``", as in PerGroup(32)"``, from the examples of the documentation; nothing where Python has thrown them away."""
    for line in (doc or "").splitlines():
        at = re.search(rf"\b{called}\(", line) if line.lstrip().startswith((">>>", "...")) else None
        depth = 0
        for end in range(at.end() - 1 if at else len(line), len(line)):
            depth += {"(": 1, ")": -1}.get(line[end], 0)
            if not depth:
                assert at is not None
                return f", as in {line[at.start() : end + 1]}"
    return ""


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _no_such_argument(function: str, name: str, known: tuple[str, ...]) -> str:
    words = f"{function}() has no argument {name!r}: "
    if way := said_here(name, known):
        return words + f"use {way}"
    has = f"it has {', '.join(known)}{did_you_mean(name, known)}" if known else "it has none"
    if "rules" in known and (way := in_a_spec(name)):
        return words + way
    way = said_here(name, _OF_QUANTIZE)
    return words + has + (f"; aqt_lite.quantize says that with {way}" if way else "")
