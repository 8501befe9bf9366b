"""The formats that users name: which element type, how its scales are kept, and how those are chosen.

Owns: ``Format``, the table of formats, their look-up by name, and their records in JSON's types. Imports: elements,
granularity.

A new format is one record in the tables below (or a call of ``register_format``) and its golden vectors. Nothing else
in the library asks for a format's name.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from aqt_lite._keywords import naming_the_fields
from aqt_lite._near import did_you_mean, one_of, shown
from aqt_lite.elements import (
    FLOAT_TYPES,
    INTEGER_TYPES,
    BitRound,
    Codebook,
    ElementType,
    Float,
    FloatOrMissing,
    Integer,
    IntegerOrMissing,
    Rounding,
    dtype_name,
)
from aqt_lite.granularity import Granularity, PerGroup, PerTensor

__all__ = [
    "BITROUND",
    "BLOCK_TYPES",
    "DERIVED",
    "FAMILIES",
    "FORMATS",
    "SCALE_FORMATS",
    "SCALE_MODES",
    "WITH_MISSING",
    "Format",
    "described",
    "family_of",
    "format_of",
    "known_format",
    "rebuilt",
    "register_format",
    "scale_format_of",
    "with_missing",
]

Top = Literal["largest", "power of two"]

_LEAST = 2.0**-100
_LOPSIDED = 8


_ROUNDINGS = ("half_even", "half_away", "half_toward_zero", "toward_zero", "up")
"""How values, and scales that are kept, are rounded."""


def check_rounding(argument: str, value: Any) -> None:
    """ValueError where it is none."""
    if not _is_rounding(value):
        one_of(argument, value, _ROUNDINGS, "a part between 0.0 and 1.0")


def _is_rounding(said: Any) -> bool:
    if isinstance(said, str):
        return said in _ROUNDINGS
    return isinstance(said, float) and 0 < said < 1


@naming_the_fields
@dataclass(frozen=True)
class Format:
    """An element type, and how the scales of its blocks are kept.

    Parameters
    ----------
    name : str
        What users write as ``dtype=``, and what ``QArray.dtype`` says.
    element : ElementType
        Which numbers codes stand for.
    scale : Format, optional
        Format of the scales themselves; None where they are kept in float32 (float64 for float64 values).
    group : int, optional
        Neighbours along the last axis that share a scale where no granularity is asked for; None: all elements.
    scaled : bool
        Whether there are scales. Numbers with the range of floats have none; scales that are kept in a format of few
        bits need not have any themselves.
    top : {"largest", "power of two"}
        What the largest magnitude of a block becomes: the largest number, or the largest power of two (OCP MX).
    scale_rounding : Rounding
        How a scale is rounded to its format. "up" keeps the largest magnitude inside the range of the numbers.

    Examples
    --------
    >>> from aqt_lite.formats import FORMATS
    >>> f = FORMATS["nvfp4"]
    >>> f.element.name, f.group, f.scale.name, f.scale.scaled
    ('float4_e2m1fn', 16, 'float8_e4m3fn', True)
    >>> import aqt_lite
    >>> aqt_lite.Format("int9_groups", aqt_lite.Integer("int9", 9, signed=True), group=32).granularity
    PerGroup(size=32, axis=-1)
    """

    name: str
    element: ElementType
    scale: Format | None = None
    group: int | None = None
    scaled: bool = True
    top: Top = "largest"
    scale_rounding: Rounding = "up"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"Format(name={shown(self.name)}): give a name, which dtype= takes")
        if not isinstance(self.element, ElementType):
            raise TypeError(
                f"Format({self.name!r}): element={self.element!r}: give an Integer, a Float, a Codebook or a BitRound"
            )
        if not (self.scale is None or isinstance(self.scale, Format)):
            raise TypeError(f"Format({self.name!r}): scale={self.scale!r}: give a Format, or None for plain numbers")
        if self.element.own_range and (self.scaled or self.scale is not None):
            raise ValueError(
                f"Format({self.name!r}): numbers of {self.element.name} have the range of floats: give scaled=False"
            )
        if not self.scaled and self.element.nan is None:
            raise ValueError(
                f"Format({self.name!r}): scaled=False with an element type without a code of NaN, which marks blocks "
                "that cannot be used: give it one, or scaled=True"
            )
        one_of(f"Format({self.name!r}): top", self.top, ("largest", "power of two"))
        check_rounding(f"Format({self.name!r}): scale_rounding", self.scale_rounding)
        if not isinstance(self.scaled, bool):
            raise TypeError(f"Format({self.name!r}): scaled={shown(self.scaled)}: give True or False")
        if self.group is not None and (isinstance(self.group, bool) or not isinstance(self.group, int)):
            raise TypeError(f"Format({self.name!r}): group={self.group!r}: give an integer, or None for all elements")
        if self.group is not None and self.group < 1:
            raise ValueError(f"Format({self.name!r}): group={self.group}: give 1 or more, or None for all elements")

    @property
    def granularity(self) -> Granularity:
        """Which elements share a scale where nothing else is asked for."""
        return PerTensor() if self.group is None else PerGroup(self.group)

    def with_mode(self, mode: str) -> Format:
        """The same format, its power-of-two scales chosen by another rule of the OCP's MX family."""
        top, rounding = SCALE_MODES[mode](self.element)
        return replace(self, top=top, scale_rounding=rounding)

    def largest(self, symmetric: bool = True) -> float:
        """What the largest magnitude of a block becomes; not symmetric: half of what its range becomes."""
        low, high = self.element.range_of(symmetric)
        if not symmetric:
            return (high - low) / 2
        top = self.element.top
        return 2.0 ** math.floor(math.log2(top)) if self.top == "power of two" else top


def _mantissa(element: ElementType) -> int:
    """Bits after the leading one of an element's largest numbers."""
    return element.mantissa if isinstance(element, Float) else element.bits - 2


SCALE_MODES: dict[str, Callable[[ElementType], tuple[Top, Rounding]]] = {
    "floor": lambda element: ("power of two", "toward_zero"),
    "ceil": lambda element: ("power of two", "up"),
    # up where rounding to the element's mantissa, halves up, would carry into the next power of two
    "even": lambda element: ("power of two", 1 - 2.0 ** -(_mantissa(element) + 1)),
    "rceil": lambda element: ("largest", "up"),
}
"""Rules for power-of-two scales, by the names that torchao gives them: (top, scale_rounding) for an element type."""

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # quantiles of a normal distribution: bitsandbytes, functional.py, get_4bit_type
_BNB_FP4 = tuple(n / 12 for n in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))  # not e2m1; same source
_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)  # ggml-common.h, kvalues_iq4nl

_E8M0 = Float("float8_e8m0fnu", 8, 0, bias=127, max=2.0**127, signed=False, subnormal=False, nan=0xFF)
_FLOATS = {
    e.name: e
    for e in [
        Float("float8_e4m3fn", 4, 3, bias=7, max=448.0, nan=0x7F),
        Float("float8_e5m2", 5, 2, bias=15, max=57344.0, infinity=0x7C, nan=0x7E),
        Float("float8_e4m3fnuz", 4, 3, bias=8, max=240.0, negative_zero=False, nan=0x80),
        Float("float8_e5m2fnuz", 5, 2, bias=16, max=57344.0, negative_zero=False, nan=0x80),
        Float("float6_e2m3fn", 2, 3, bias=1, max=7.5),
        Float("float6_e3m2fn", 3, 2, bias=3, max=28.0),
        Float("float4_e2m1fn", 2, 1, bias=1, max=6.0),
    ]
}
_MX = [
    ("mxfp8_e4m3", _FLOATS["float8_e4m3fn"]),
    ("mxfp8_e5m2", _FLOATS["float8_e5m2"]),
    ("mxfp6_e2m3", _FLOATS["float6_e2m3fn"]),
    ("mxfp6_e3m2", _FLOATS["float6_e3m2fn"]),
    ("mxfp4", _FLOATS["float4_e2m1fn"]),
    ("mxint8", Integer("mxint8", 8, True, step=2.0**-6, narrow=True)),
]

SCALE_FORMATS = {
    e.name: Format(e.name, e, scaled=False)
    for e in [
        Float("float16", 5, 10, bias=15, max=65504.0, infinity=0x7C00, nan=0x7E00),
        Float("bfloat16", 8, 7, bias=127, max=(2 - 2.0**-7) * 2.0**127, infinity=0x7F80, nan=0x7FC0),
        _E8M0,
        *(e for e in _FLOATS.values() if e.nan is not None),  # which marks a block that cannot be used
    ]
}
"""Formats that scales may be kept in without a scale of their own."""

FORMATS = {
    f.name: f
    for f in [
        *(Format(f"int{n}", Integer(f"int{n}", n, True)) for n in (2, 3, 4, 5, 6, 7, 8, 16)),
        *(Format(f"uint{n}", Integer(f"uint{n}", n, False)) for n in (2, 3, 4, 5, 6, 7, 8, 16)),
        Format("ternary", Integer("ternary", 2, True, narrow=True)),
        *(Format(e.name, e) for e in _FLOATS.values()),
        Format("nf4", Codebook("nf4", _NF4)),
        Format("bnb_fp4", Codebook("bnb_fp4", (*_BNB_FP4, *(-n for n in _BNB_FP4)))),
        Format("iq4_nl", Codebook("iq4_nl", _IQ4_NL)),
        *(Format(n, e, SCALE_FORMATS["float8_e8m0fnu"], 32).with_mode("floor") for n, e in _MX),
        Format(
            "nvfp4",
            _FLOATS["float4_e2m1fn"],
            scale=Format("float8_e4m3fn", _FLOATS["float8_e4m3fn"]),
            group=16,
            scale_rounding="half_even",
        ),
    ]
}
"""Every format that ``dtype=`` may name."""


def _blocks_of(name: str, element: str, group: int, kept: str | None = None, groups: int | None = None) -> Format:
    """Scales in float16, or in ``groups`` of codes that have such a scale themselves."""
    scale = SCALE_FORMATS["float16"]
    if kept is not None:
        scale = Format(kept, FORMATS[kept].element, scale, groups)
    return Format(name, FORMATS[element].element, scale, group)


BLOCK_TYPES = {
    f.name: f
    for f in [
        *(_blocks_of(n, e, 32) for n, e in [("q4_0", "int4"), ("q4_1", "uint4"), ("q5_0", "int5"), ("q5_1", "uint5")]),
        _blocks_of("q8_0", "int8", 32),
        _blocks_of("tq1_0", "ternary", 256),
        _blocks_of("tq2_0", "ternary", 256),
        _blocks_of("q2_k", "uint2", 16, "int5", 16),
        _blocks_of("q3_k", "int3", 16, "int6", 16),
        _blocks_of("q4_k", "uint4", 32, "int7", 8),
        _blocks_of("q5_k", "uint5", 32, "int7", 8),
        _blocks_of("q6_k", "int6", 16, "int8", 16),
        _blocks_of("iq4_xs", "iq4_nl", 32, "int6", 8),
    ]
}
"""ggml's block types, formats made of those above under the names that they have there; ``dtype=`` takes them, too."""


BITROUND = {
    name: Format(name, BitRound(name, keepbits), scaled=False)
    for keepbits in range(24)
    for name in [f"bitround{keepbits}"]
}
"""float32 with so many bits after the leading one: the numbers of ``aqt_lite.bitround``. They have no scales."""

FAMILIES = {"bitround": tuple(BITROUND.values())}
"""Formats that differ by how many bits they keep, from the narrowest on; which one, ``keepbits`` or a bound says."""


def family_of(form: Format) -> str | None:
    """The family that a format is one of, with a code of missing values or without; None where there is none."""
    return next((name for name, forms in FAMILIES.items() if type(forms[0].element) is type(form.element)), None)


MISSING = "_nan"
"""What the name of a format ends with that has a code of missing values."""


def _with_missing(form: Format) -> Format | None:
    """The format with a code of missing values beside its numbers; None where every code is a number."""
    e, name = form.element, f"{form.element.name}{MISSING}"
    element: ElementType | None = None
    if type(e) is Integer:
        element = IntegerOrMissing(name, e.bits, e.signed, e.step)
    elif type(e) is Float and e.nan is not None:
        said = {f.name: getattr(e, f.name) for f in fields(e)}
        element = FloatOrMissing(**{**said, "name": name})
    elif type(e) is BitRound and not e.may_miss:
        element = replace(e, name=name, may_miss=True)
    return None if element is None else replace(form, name=f"{form.name}{MISSING}", element=element)


WITH_MISSING = {
    made.name: made for form in [*FORMATS.values(), *BITROUND.values()] if (made := _with_missing(form)) is not None
}
"""The formats of the tables that have a code to spare, with it: the lowest of integers, NaN of floats."""

DERIVED = {**BLOCK_TYPES, **BITROUND, **WITH_MISSING}
"""Formats that are made of others, or by rule; ``dtype=`` takes their names, too."""

_DTYPES = frozenset({"bool", "complex64", "complex128", *FLOAT_TYPES, *INTEGER_TYPES})
_ALIASES = {"float4_e2m1fn_x2": "float4_e2m1fn"}
_ELSEWHERE = {
    "fp8": "float8_e4m3fn", "float8": "float8_e4m3fn", "f8e4m3": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2", "fp6": "float6_e2m3fn", "fp4": "float4_e2m1fn", "float4": "float4_e2m1fn",
    "e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2", "e2m1": "float4_e2m1fn", "normalfloat4": "nf4", "nvfp": "nvfp4",
    "mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3",
    "4": "int4", "8": "int8", "w4": "int4", "w8": "int8", "qint8": "int8", "quint8": "uint8", "qint4": "int4",
    "quint4x2": "uint4", "i4": "int4", "i8": "int8", "u4": "uint4", "u8": "uint8",
}  # fmt: skip
"""What other libraries call formats."""
_SCALES_ELSEWHERE = {"e8m0": "float8_e8m0fnu", "ue8m0": "float8_e8m0fnu", "fp16": "float16", "half": "float16"} | {
    "bf16": "bfloat16", "fp32": "float32", "float": "float32",
}  # fmt: skip
"""The same of scales."""
_lock = threading.Lock()


def register_format(form: Format | BitRound | Codebook | Float | Integer) -> Format:
    """Make a format known by its name, for ``dtype=`` and for arrays that are loaded in another process.

    Parameters
    ----------
    form : Format, or an element type
        An element type is a format whose scales are kept as they are.

    Raises
    ------
    TypeError
        It is neither.
    ValueError
        Another format, or a library's dtype, has that name; or its scales' format cannot be registered.

    Examples
    --------
    >>> import aqt_lite
    >>> five = aqt_lite.register_format(aqt_lite.Float("float5_e2m2", 2, 2, bias=1, max=7.0))
    >>> aqt_lite.quantize([1.0, -7.0, 0.3], "float5_e2m2").dequantize().tolist()
    [1.0, -7.0, 0.25]
    """
    if not isinstance(form, Format | ElementType):
        raise TypeError(
            f"form={shown(form)}: give a Format, or an element type: an Integer, a Float or a Codebook, such as "
            "aqt_lite.Codebook('three', (-1.0, 0.0, 1.0))"
        )
    made = form if isinstance(form, Format) else Format(form.name, form, scaled=not form.own_range)
    for_values = made.scaled or made.element.own_range
    table = FORMATS if for_values else SCALE_FORMATS
    known = table.get(made.name) or (DERIVED.get(made.name) if for_values else None)
    if known is None:  # what is known is looked up without a lock, which compilers that trace do not follow
        _check_name(made)
        if made.scaled:
            _check_that_scales_can_serve(made)
        if made.scale is not None:
            register_format(made.scale)
        with _lock:
            known = table.setdefault(made.name, made)
    if known != made:
        raise ValueError(f"a format named {made.name!r} exists and is another one: choose another name")
    return known


def _check_that_scales_can_serve(made: Format) -> None:
    """Whether values of float32 divided by a scale reach all of the element type's numbers."""
    e = made.element
    most = max(e.max, -e.min)
    if not (e.smallest >= _LEAST and most <= 1 / _LEAST):
        raise ValueError(
            f"format {made.name!r}: the magnitudes of its numbers, {e.smallest:g} to {most:g}, must lie between 2^-100 "
            "and 2^100, so that scales for float32 exist: multiply all by a power of two"
        )
    if e.signed and most > _LOPSIDED * e.top:
        raise ValueError(
            f"format {made.name!r}: numbers from {e.min:g} to {e.max:g} reach more than {_LOPSIDED} times as far on "
            "one side as on the other, where one scale serves both: add numbers on the shorter side"
        )


def _check_name(made: Format) -> None:
    same = [f for table in (FORMATS, SCALE_FORMATS, BITROUND, WITH_MISSING) if (f := table.get(made.name)) is not None]
    if any(f.element != made.element for f in same):
        raise ValueError(f"a format named {made.name!r} exists and is another one: choose another name")
    if made.name in _ALIASES or made.name in _DTYPES or made.name in FAMILIES:
        raise ValueError(f"{made.name!r} is the name of a dtype, or of a family of formats: choose another name")


def format_of(dtype: Any, argument: str = "dtype") -> Format:
    """The format that users mean: by name, by any library's dtype object of that name, or the record itself."""
    if isinstance(dtype, Format | ElementType):
        return register_format(dtype)  # type: ignore[arg-type]
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    found = FORMATS.get(_ALIASES.get(name, name)) or DERIVED.get(name)
    if found is None:
        if isinstance(dtype, Granularity):
            raise TypeError(f"{argument}={dtype!r} is a granularity: give it by name, granularity={dtype!r}")
        family = FAMILIES.get(name)
        if family is not None:
            raise ValueError(
                f"{argument}={name!r} is a family of formats: name one, {family[0].name} to {family[-1].name}, or give "
                "quantize keepbits, max_rel_err or max_abs_err"
            )
        known = ", ".join([*FORMATS, *BLOCK_TYPES, *(f"{f[0].name} to {f[-1].name}" for f in FAMILIES.values())])
        near = "" if name in _DTYPES else did_you_mean(name, [*FORMATS, *DERIVED], _ELSEWHERE)
        raise ValueError(f"{argument}={shown(dtype)} is not a quantized type{near}: use one of {known}")
    return found


def with_missing(form: Format) -> Format:
    """The format with a code of missing values beside its numbers, known by its name; ValueError where it has none."""
    if form.element.missing is not None:
        return form
    made = WITH_MISSING.get(f"{form.name}{MISSING}") or FORMATS.get(f"{form.name}{MISSING}")
    if made is None:
        made = _with_missing(form)
        if made is None:
            raise ValueError(
                f"{form.name} has no code to spare for values that are missing: use an integer type, or float8_e4m3fn"
            )
        register_format(made)
    return replace(form, name=made.name, element=made.element)


def scale_format_of(dtype: Any, argument: str = "scale_dtype") -> Format:
    """The format that scales are to be kept in: a float of few bits as it is, any other with a scale of its own."""
    if isinstance(dtype, Format | ElementType):
        alone = SCALE_FORMATS.get(dtype.name)
        if alone is not None and alone.element == dtype:
            return alone
        return register_format(dtype)  # type: ignore[arg-type]
    name = dtype if isinstance(dtype, str) else dtype_name(dtype)
    found = SCALE_FORMATS.get(name) or FORMATS.get(name)
    if found is None:
        known = ", ".join(dict.fromkeys(["float32", *SCALE_FORMATS, *FORMATS]))
        near = did_you_mean(name, [*SCALE_FORMATS, *FORMATS], _SCALES_ELSEWHERE | _ELSEWHERE)
        raise ValueError(f"{argument}={shown(dtype)} is not a format of scales{near}: use one of {known}")
    return found


def known_format(dtype: str) -> Format | None:
    """The format of a stored array, of those that users name or of scales; None where it is not known here."""
    return FORMATS.get(dtype) or SCALE_FORMATS.get(dtype) or DERIVED.get(dtype)


def element_type(dtype: str) -> ElementType:
    """The element type of a stored array: of a format that users name, or of scales."""
    found = known_format(dtype)
    if found is None:
        raise ValueError(f"dtype={dtype!r} is not known here: register its format first, with aqt_lite.register_format")
    return found.element


# ---- records in a file


_KINDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Integer, Float, Codebook, BitRound, IntegerOrMissing, FloatOrMissing)
}
_TYPES: dict[str, tuple[type, ...]] = {  # of a field, by its annotation: what JSON gives
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (float, int),
    "int | None": (int, type(None)),
    "tuple[float, ...]": (list,),
    "ElementType": (dict,),
    "Format | None": (dict, type(None)),
    "Top": (str,),
    "Rounding": (str, float),
}


def described(form: Format) -> dict[str, Any] | None:
    """The record in JSON's types; None where its element type is of a class that only the user's program knows."""
    element, scale = form.element, None if form.scale is None else described(form.scale)
    kind = type(element).__name__
    if _KINDS.get(kind) is not type(element) or (scale is None) != (form.scale is None):
        return None
    said = {f.name: getattr(element, f.name) for f in fields(element) if f.init}  # type: ignore[arg-type]
    rest = {f.name: getattr(form, f.name) for f in fields(form)}
    return {**rest, "element": {"kind": kind, **said}, "scale": scale}


def rebuilt(said: Any) -> Format:
    """The inverse of ``described``, of what a file says; ValueError or TypeError where it is no record of a format."""
    values = _fields_of(Format, said)
    element = dict(values["element"])
    kind = element.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"a format's element type is of kind {kind!r}: known are {', '.join(_KINDS)}")
    if values["top"] not in ("largest", "power of two") or not _is_rounding(values["scale_rounding"]):
        raise ValueError(f"a format has top={values['top']!r} and scale_rounding={values['scale_rounding']!r}")
    values["element"] = _KINDS[kind](**_fields_of(_KINDS[kind], element))
    values["scale"] = None if values["scale"] is None else rebuilt(values["scale"])
    return Format(**values)


def _fields_of(cls: type[Any], said: Any) -> dict[str, Any]:
    types = {f.name: _TYPES[str(f.type)] for f in fields(cls) if f.init}
    if not isinstance(said, dict) or set(said) != set(types):
        raise ValueError(f"a record of {cls.__name__} has other fields than {', '.join(types)}")
    for name, value in said.items():
        if type(value) not in types[name]:
            raise TypeError(f"a record of {cls.__name__} has {name}={value!r:.60}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in said.items()}
