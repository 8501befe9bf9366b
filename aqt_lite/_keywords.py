"""What other libraries call arguments, and what says the same here.

Owns: that table, and the errors of functions and specs that are given such a name. Imports: nothing of this package.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection
from typing import ParamSpec, TypeVar

__all__ = ["in_a_spec", "naming_the_argument", "naming_the_fields", "said_here"]

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
    """``function``, whose TypeError for an argument that other libraries have says what it is called here."""
    known = tuple(name for name in inspect.signature(function).parameters if name not in ("self", "cls"))

    called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if kwargs:
            for name in kwargs:
                if name not in known:
                    raise TypeError(_no_such_argument(called, name, known))
        return function(*args, **kwargs)

    return call


def naming_the_fields(cls: _C) -> _C:
    """A class whose constructor does so."""
    cls.__init__ = naming_the_argument(cls.__init__)  # type: ignore[misc]
    return cls


def _no_such_argument(function: str, name: str, known: tuple[str, ...]) -> str:
    words = f"{function}() has no argument {name!r}: "
    if way := said_here(name, known):
        return words + f"use {way}"
    has = f"it has {', '.join(known)}" if known else "it has none"
    if "rules" in known and (way := in_a_spec(name)):
        return words + way
    way = said_here(name, _OF_QUANTIZE)
    return words + has + (f"; aqt_lite.quantize says that with {way}" if way else "")
