"""Dialects: how other libraries choose scales, zero points and codes.

Owns: ``Dialect``, the table of dialects, and their look-up. Imports: elements and formats, as types of arguments alone;
rules that no fields say.

A dialect is one record below, or one that a user writes and hands to ``dialect=``; ``affine`` reads its fields, and
nothing in the library asks for its name. Each is held against its original (tests/test_dialects.py); docs/dialects.md
is made from the table. All compute in float32 (in float64 for float64 values), whatever the type of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

from aqt_lite import _together
from aqt_lite._keywords import naming_the_fields
from aqt_lite._near import not_known, one_of, shown
from aqt_lite.elements import Codebook, ElementType, Rounding
from aqt_lite.formats import SCALE_MODES, Format, check_rounding

__all__ = ["AQT_LITE", "DIALECTS", "Dialect", "dialect_of"]

Reach = Literal["top", "half range", "each side", "lowest"]

_FLOAT8 = ("float8_e4m3fn", "float8_e5m2")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _are_pairs(value: Any, kind: Callable[[Any], bool]) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) and kind(p[1]) for p in value
    )


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "str": ("a text", lambda v: isinstance(v, str)),
    "bool": ("True or False", lambda v: isinstance(v, bool)),
    "int": ("an integer", lambda v: isinstance(v, Integral) and not isinstance(v, bool)),
    "float": ("a number", _is_number),
    "tuple[str, ...]": (
        "a tuple of names of formats",
        lambda v: isinstance(v, tuple) and all(isinstance(name, str) for name in v),
    ),
    "tuple[tuple[str, float], ...]": (
        "a tuple of pairs, the name of a format and a number",
        lambda v: _are_pairs(v, _is_number),
    ),
    "tuple[tuple[str, Dialect], ...]": (
        "a tuple of pairs, the name of a format and a Dialect",
        lambda v: _are_pairs(v, lambda rules: isinstance(rules, Dialect)),
    ),
    "tuple[float, float]": (
        "a pair of numbers",
        lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_number, v)),
    ),
    "Dialect": ("a Dialect", lambda v: isinstance(v, Dialect)),
    "Callable[..., Any]": ("a function", callable),
}
"""What fields take, by their annotations: words, and a test."""


@naming_the_fields
@dataclass(frozen=True)
class Dialect:
    """Rules by which a library chooses scales, zero points and codes. The defaults are this library's own.

    Parameters
    ----------
    name : str
        What ``dialect=`` names.
    symmetric, affine : tuple of str, optional
        Formats whose scales the original chooses in either scheme; None: all.
    given : tuple of str, optional
        Formats that it has with given scales; None: the same.
    reach : {"top", "half range", "each side", "lowest"}
        What the largest magnitude of a block becomes, where the scheme is symmetric: the largest number that has an
        opposite (127 of int8); half the range of the numbers (127.5); that on its own side, whichever side asks for
        the larger scale (-128 or 127); or the lowest number (-128), whatever its sign, by a scale that is negative
        where the entry is positive. Of two such entries the negative one counts.
    reaches : tuple of (str, float)
        What it becomes in formats that are exceptions.
    narrow_from : int, optional
        Bits of a code from which on symmetric codes leave out the lowest of signed types (-128 of int8), which has no
        opposite; None: they never do.
    divides_range : bool
        Whether a statistic is divided by what it becomes; else it is multiplied by the rounded reciprocal of that.
    divides : bool
        Whether values are divided by the scale; else they are multiplied by its rounded reciprocal.
    zero_first : bool
        Whether the zero point is added before rounding. At ties an odd zero point then tells the two apart.
    fused : bool
        Whether ``x * (1 / scale)`` and the addition of the zero point are rounded once, as by a processor's fused
        multiply-add; with ``zero_first``, without ``divides``. In float64 they are rounded one after the other.
    divides_zero : bool, optional
        Whether the zero point is found by dividing by the scale; None: as ``divides_range``.
    zero_of_zeros : int, optional
        The zero point of blocks of zeros, where the rules give it no value.
    least_range : float
        Statistics below it count as ``range_instead``, by default as this.
    least_scale : float, optional
        A scale below it is replaced by ``instead``; None: by this library's rules, under which blocks of zeros have
        scale 1, and no number that matters is subnormal.
    instead : float, optional
        By default ``least_scale``.
    of_floats, of_blocks : Dialect, optional
        Rules for element types that are floats, and for block formats, where they are others.
    of_formats : tuple of (str, Dialect)
        Rules for formats that are exceptions.
    of_codebooks : Dialect, optional
        Rules for codebooks of 8 bits, which come with the data.
    power_rounding : float, optional
        Where scales are powers of two, the part of the way to the next one from which on they are rounded up; None: as
        the format or ``scale_mode=`` says.
    kept_of_zeros : int, optional
        The code of the scale of a block of zeros, where scales are kept in a format without 0.
    rounding : str or float
        How values, and zero points, are rounded where ``rounding=`` asks for nothing else.
    zero_in_range : bool
        Whether ranges are widened to hold zero, in the affine scheme.
    range_of_zeros : tuple of two floats, optional
        The range that a block of zeros counts as.
    one_sided : bool
        Whether, where the scheme is symmetric, the range of a block without values below zero has none either, and so
        half the scale: its larger half saturates.
    minus_zero : bool
        Whether -0 is made, of element types that have it.
    offsets : tuple of str
        Formats for which it has ``offset="data"``.
    of_range : callable, optional
        ``of_range(low, high, steps, b)`` gives scale and offset of blocks with values from ``low`` to ``high``, for
        ``steps`` steps from the lowest code to the highest, where no field says the rule. Scales may be negative.
        Where codes are ``x * factor + shift``, rounded, it gives these two as well.
    inverse : bool
        Whether what is computed, and multiplied by, is the inverse of a scale, which is its reciprocal then: the number
        that a statistic becomes divided by it, or (without ``divides_range``) times its reciprocal. So it is in the
        symmetric scheme with ``reach`` "top" or "half range" alone.
    added : float
        What is added to statistics.
    scale_mode : str, optional
        Where scales are powers of two, what ``scale_mode=`` is by default.
    plain_scales : bool
        Whether scales that are kept in few bits have no scale of their own, in formats in which they otherwise do:
        larger ones become the largest that there is, and small ones 0.
    together : callable, optional
        A rule that makes codes and scales together (:mod:`aqt_lite._together`), for a library whose codes are made of
        more than the scales that it keeps. Other fields then say what it serves.
    keeps_largest, inverse_tensor_scale : bool
        What it stores as the scales of given codes (``QArray.from_codes(dialect=)``): the largest magnitude of a block,
        which is the scale times the largest number; as the scale of all scales what they are divided by.
    whole : callable, optional
        ``whole(x, dtype, backend=)`` makes the whole array, for a library that searches, or whose rules no field says.
        Nothing but the dtype can then be chosen.
    source : str
        Package and version that it was held against, and the functions.

    Examples
    --------
    >>> import aqt_lite
    >>> aqt_lite.quantize([1.0, -2.0, 0.5], "int8", dialect="torch")
    QArray(int8, shape=(3,), PerTensor(), of float32, numpy)
    qvalue: [  64 -127   32]
    scale: [0.01568628]
    >>> mine = aqt_lite.Dialect("mine", reach="half range", narrow_from=8, divides=True)
    >>> aqt_lite.quantize([1.0, -2.0, 0.5], "int8", dialect=mine).qvalue.tolist()
    [64, -127, 32]
    """

    name: str
    symmetric: tuple[str, ...] | None = None
    affine: tuple[str, ...] | None = None
    given: tuple[str, ...] | None = None
    reach: Reach = "top"
    reaches: tuple[tuple[str, float], ...] = ()
    narrow_from: int | None = 2
    divides_range: bool = False
    divides: bool = False
    zero_first: bool = False
    fused: bool = False
    divides_zero: bool | None = None
    zero_of_zeros: int | None = None
    least_range: float = 0.0
    range_instead: float | None = None
    least_scale: float | None = None
    instead: float | None = None
    of_floats: Dialect | None = None
    of_blocks: Dialect | None = None
    power_rounding: float | None = None
    kept_of_zeros: int | None = None
    rounding: Rounding = "half_even"
    zero_in_range: bool = True
    range_of_zeros: tuple[float, float] | None = None
    one_sided: bool = False
    minus_zero: bool = True
    offsets: tuple[str, ...] = ()
    of_range: Callable[..., Any] | None = None
    inverse: bool = False
    added: float = 0.0
    scale_mode: str | None = None
    plain_scales: bool = False
    of_formats: tuple[tuple[str, Dialect], ...] = ()
    of_codebooks: Dialect | None = None
    together: Callable[..., Any] | None = None
    keeps_largest: bool = False
    inverse_tensor_scale: bool = False
    whole: Callable[..., Any] | None = None
    source: str = ""

    def __post_init__(self) -> None:
        for of in fields(self):
            kind = str(of.type).removesuffix(" | None")
            words, takes = _FIELDS.get(kind, ("", None))
            value, may_lack = getattr(self, of.name), kind != of.type
            if takes is not None and not takes(value) and not (value is None and may_lack):
                words += ", or None" if may_lack else ""
                raise TypeError(f"Dialect({self.name!r}): {of.name}={shown(value)}: give {words}")
        if self.scale_mode is not None:
            one_of(f"Dialect({self.name!r}): scale_mode", self.scale_mode, tuple(SCALE_MODES))
        if self.power_rounding is not None and not 0 < self.power_rounding <= 1:
            raise ValueError(f"Dialect({self.name!r}): power_rounding={self.power_rounding}: give a part of 1, above 0")
        if self.narrow_from is not None and self.narrow_from < 1:
            raise ValueError(f"Dialect({self.name!r}): narrow_from={self.narrow_from}: give bits, 1 and more, or None")
        one_of(f"Dialect({self.name!r}): reach", self.reach, ("top", "half range", "each side", "lowest"))
        check_rounding(f"Dialect({self.name!r}): rounding", self.rounding)
        for field, value in (
            ("least_range", self.least_range),
            ("range_instead", self.range_instead),
            ("least_scale", self.least_scale),
            ("instead", self.instead),
            ("added", self.added),
        ):
            if value is not None and not (value == 0 or 2.0**-126 <= value <= 2.0**126):
                raise ValueError(f"Dialect({self.name!r}): {field}={value}: give a normal float32, up to 2^126")
        if self.instead is not None and self.least_scale is None:
            raise ValueError(f"Dialect({self.name!r}): instead={self.instead} without least_scale, which says of what")
        if self.inverse and not (self.added or self.least_range):
            raise ValueError(f"Dialect({self.name!r}): inverse=True needs added or least_range: zeros have no inverse")
        low, high = self.range_of_zeros or (-1.0, 1.0)
        if not (low <= 0 <= high and low < high):
            raise ValueError(f"Dialect({self.name!r}): range_of_zeros={self.range_of_zeros}: give a range that holds 0")

    def for_format(self, form: Format) -> Dialect:
        """The rules for a format."""
        for name, rules in self.of_formats:
            if name == form.name:
                return rules
        if self.of_codebooks is not None and self.takes_codebook(form):
            return self.of_codebooks
        if form.scale is not None:
            return self.of_blocks or self
        return self if form.element.zero_points else self.of_floats or self

    def formats(self, scheme: str) -> tuple[str, ...] | None:
        """Those of "symmetric", "affine" or "given" scales; None: all."""
        chosen: tuple[str, ...] | None = getattr(self, scheme)
        if chosen is not None or scheme != "given" or self.symmetric is None or self.affine is None:
            return chosen
        return tuple(dict.fromkeys(self.symmetric + self.affine))

    def takes_codebook(self, form: Format) -> bool:
        """Whether a format is a codebook of 8 bits, which comes with the data, and there are rules for those."""
        return self.of_codebooks is not None and isinstance(form.element, Codebook) and form.element.bits == 8

    @property
    def signed_scales(self) -> bool:
        """Whether scales may be negative."""
        return self.reach == "lowest" or self.of_range is not None

    def narrow(self, element: ElementType) -> bool:
        """Whether symmetric codes reach no farther below zero than above it."""
        return self.narrow_from is not None and element.bits >= self.narrow_from

    def largest(self, element: ElementType) -> float | None:
        """What the largest magnitude of a block becomes; None: what the format says."""
        for name, number in self.reaches:
            if name == element.name:
                return number
        if self.reach == "lowest":
            return -element.min if element.middle == 0 else float(element.middle - element.codes[0])
        return (element.max - element.min) / 2 if self.reach == "half range" else None


AQT_LITE = Dialect("aqt_lite", source="this library: docs/numerics.md")

_EPS, _NORMAL = 2.0**-23, 2.0**-126  # of float32


def _of_bits(*bits: int, unsigned: bool = True) -> tuple[str, ...]:
    return tuple(f"{sign}int{n}" for sign in ("", "u")[: 1 + unsigned] for n in bits)


_UNSIGNED = tuple(f"uint{bits}" for bits in range(2, 9))

DIALECTS = {
    d.name: d
    for d in [
        AQT_LITE,
        Dialect(
            "onnx",
            symmetric=("int4", "int8", "int16"),
            affine=("uint8",),
            given=(*_of_bits(2, 4, 8, 16), *_FLOAT8, "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn"),
            reach="half range",
            reaches=(("int8", 127.0), ("int16", 32767.0)),
            narrow_from=None,
            divides_range=True,
            divides=True,
            least_scale=_NORMAL,
            instead=1.0,
            source="onnxruntime 1.32.0: QuantizeLinear, DynamicQuantizeLinear; symmetric: quantization.quantize_data",
        ),
        Dialect(
            "onnxruntime",
            symmetric=("int4", "uint2", "uint4", "uint8"),
            affine=("uint2", "uint4", "uint8"),
            reach="lowest",
            narrow_from=None,
            divides_range=True,
            zero_first=True,
            rounding="half_away",
            zero_of_zeros=0,
            least_scale=_NORMAL,
            instead=1.0,
            source="onnxruntime 1.32.0: quantize_matmul_2bits, _4bits, _8bits; int4: quantize_qdq_matmul_4bits",
        ),
        Dialect(
            "torch",
            symmetric=("int8", "uint8"),
            affine=("int8", "uint8"),
            given=_of_bits(8, 16),
            reach="half range",
            narrow_from=None,
            divides_range=True,
            least_scale=_EPS,
            source="torch 2.13.0: MinMaxObserver; quantized_decomposed.quantize_per_tensor, quantize_per_channel, "
            "choose_qparams, choose_qparams_symmetric; fake_quantize",
        ),
        Dialect(
            "torch_per_channel",
            symmetric=("int8", "uint8"),
            affine=("int8", "uint8"),
            reach="half range",
            narrow_from=None,
            divides_range=True,
            zero_first=True,
            least_scale=_EPS,
            source="torch 2.13.0: PerChannelMinMaxObserver, quantize_per_channel (quantized tensors); "
            "quantized_decomposed.quantize_per_channel_group",
        ),
        Dialect(
            "torch_per_tensor",
            symmetric=("int8", "uint8"),
            affine=("int8", "uint8"),
            reach="half range",
            narrow_from=None,
            divides_range=True,
            zero_first=True,
            fused=True,
            least_scale=_EPS,
            source="torch 2.13.0 on a CPU with AVX2 and FMA: MinMaxObserver, quantize_per_tensor (quantized tensors)",
        ),
        Dialect(
            "torch_per_token",
            symmetric=("int8",),
            affine=(),
            narrow_from=None,
            divides_range=True,
            least_range=1e-5,
            least_scale=_NORMAL,
            source="torch 2.13.0: quantized_decomposed.choose_qparams_per_token, quantize_per_token",
        ),
        Dialect(
            "torchao",
            symmetric=(*_of_bits(2, 3, 4, 5, 6, 7, 8), *_FLOAT8, "mxfp8_e4m3", "mxfp8_e5m2", "mxfp4", "nvfp4"),
            affine=_of_bits(2, 3, 4, 5, 6, 7, 8),
            reach="half range",
            narrow_from=None,
            divides_range=True,
            least_scale=_NORMAL,
            of_floats=Dialect("torchao", divides_range=True, divides=True),
            of_blocks=Dialect("torchao", kept_of_zeros=0),
            of_formats=(("nvfp4", Dialect("torchao", together=_together.two_levels)),),
            source="torchao 0.18.0: choose_qparams_affine, quantize_affine; float8: _choose_scale_float8; MX: to_mx; "
            "NVFP4: NVFP4Tensor.to_nvfp4 with per_tensor_amax_to_scale",
        ),
        Dialect(
            "torchao_no_tensor_scale",
            symmetric=("nvfp4",),
            affine=(),
            plain_scales=True,
            together=partial(_together.one_level, divides=True, least=2.0**-6),
            source="torchao 0.18.0: NVFP4Tensor.to_nvfp4 without per_tensor_scale",
        ),
        Dialect(
            "torchao_tinygemm",
            symmetric=(),
            affine=(),
            offsets=_of_bits(2, 3, 4, 5, 6, 7, 8, unsigned=False),
            narrow_from=None,
            together=_together.by_range,
            source="torchao 0.18.0: _choose_qparams_affine_tinygemm, _quantize_affine_tinygemm",
        ),
        Dialect(
            "torchao_no_zero",
            symmetric=(),
            affine=_of_bits(2, 3, 4, 5, 6, 7, 8),
            narrow_from=None,
            divides_range=True,
            zero_in_range=False,
            least_scale=_NORMAL,
            source="torchao 0.18.0: _choose_qparams_affine_dont_preserve_zero, quantize_affine",
        ),
        Dialect(
            "torchao_no_clipping",
            symmetric=_of_bits(2, 3, 4, 5, 6, 7, 8, unsigned=False),
            affine=(),
            reach="each side",
            narrow_from=None,
            divides_range=True,
            least_scale=_NORMAL,
            source="torchao 0.18.0: choose_qparams_affine with SYMMETRIC_NO_CLIPPING_ERR, quantize_affine",
        ),
        Dialect(
            "qwix",
            symmetric=(
                *_of_bits(2, 3, 4, 5, 6, 7, 8, unsigned=False),
                *_FLOAT8,
                "float8_e4m3fnuz",
                "float8_e5m2fnuz",
                "float4_e2m1fn",
                "nf4",
                "mxfp8_e4m3",
                "mxfp4",
                "nvfp4",
            ),
            affine=_of_bits(4, 8, unsigned=False),
            reach="half range",
            narrow_from=None,
            zero_first=True,
            divides_zero=True,
            least_scale=2.0**-63,
            instead=1.0,
            of_formats=(
                ("nf4", Dialect("qwix", together=_together.by_distance)),
                ("mxfp8_e4m3", Dialect("qwix", together=_together.ceil_of_logarithm)),
                ("mxfp4", Dialect("qwix", together=_together.ceil_of_logarithm)),
                (
                    "nvfp4",
                    Dialect("qwix", plain_scales=True, together=partial(_together.one_level, divides=False, least=0.0)),
                ),
            ),
            source="qwix 0.1.8 with jax 0.10.2 on a CPU: quantize with absmax or minmax",
        ),
        Dialect(
            "compressed-tensors",
            symmetric=(*_of_bits(2, 3, 4, 5, 6, 7, 8, unsigned=False), "float8_e4m3fn", "mxfp8_e4m3", "mxfp4", "nvfp4"),
            affine=_of_bits(2, 3, 4, 5, 6, 7, 8, unsigned=False),
            reach="half range",
            narrow_from=None,
            divides_range=True,
            divides=True,
            zero_first=True,
            zero_of_zeros=0,
            least_scale=_NORMAL,
            instead=_EPS,
            of_blocks=Dialect("compressed-tensors", power_rounding=0.75, kept_of_zeros=0),
            of_formats=(
                ("nvfp4", Dialect("compressed-tensors", together=_together.by_quotient, inverse_tensor_scale=True)),
            ),
            source="compressed-tensors 0.20.0: calculate_qparams, quantize; NVFP4: generate_gparam",
        ),
        Dialect(
            "gptq",
            symmetric=_UNSIGNED,
            affine=_UNSIGNED,
            reach="half range",
            narrow_from=None,
            divides_range=True,
            divides=True,
            range_of_zeros=(-1.0, 1.0),
            one_sided=True,
            least_scale=_NORMAL,
            source="gptqmodel 7.7.0: Quantizer.find_params and quantize, without a search (mse=0)",
        ),
        Dialect(
            "awq",
            symmetric=_of_bits(2, 3, 4, 5, 6, 7, 8, unsigned=False),
            affine=_UNSIGNED,
            narrow_from=None,
            divides_range=True,
            divides=True,
            zero_in_range=False,
            least_range=1e-5,
            least_scale=_NORMAL,
            source="autoawq 0.2.9: AwqQuantizer.pseudo_quantize_tensor of float32",
        ),
        Dialect(
            "keras",
            symmetric=("int4", "int8"),
            affine=(),
            divides_range=True,
            inverse=True,
            added=1e-7,
            least_scale=_NORMAL,
            source="keras 3.15.1 with NumPy: quantizers.abs_max_quantize",
        ),
        Dialect(
            "modelopt",
            symmetric=("int4", "int8", "float8_e4m3fn", "nvfp4"),
            affine=(),
            narrow_from=None,
            divides_range=True,
            divides=True,
            of_formats=(
                ("nvfp4", Dialect("modelopt", together=_together.by_product)),
                (
                    "int4",
                    Dialect(
                        "modelopt", affine=(), narrow_from=None, inverse=True, least_range=_NORMAL, range_instead=7.0
                    ),
                ),
            ),
            source="nvidia-modelopt 0.47.0 on a CPU: INT8QTensor, INT4QTensor, FP8QTensor, NVFP4QTensor",
        ),
        Dialect(
            "quanto",
            symmetric=("int8", *_FLOAT8),
            affine=(),
            narrow_from=None,
            divides_range=True,
            divides=True,
            source="optimum-quanto 0.2.7: AbsmaxOptimizer, quantize_symmetric",
        ),
        Dialect(
            "bitsandbytes",
            symmetric=("nf4", "bnb_fp4", "int8"),
            affine=(),
            given=("nf4",),
            of_formats=(
                ("nf4", Dialect("bitsandbytes", together=_together.four_bits)),
                ("bnb_fp4", Dialect("bitsandbytes", together=_together.four_bits)),
                (
                    "int8",
                    Dialect(
                        "bitsandbytes",
                        narrow_from=None,
                        together=_together.by_inverse_of_quotient,
                        keeps_largest=True,
                    ),
                ),
            ),
            of_codebooks=Dialect("bitsandbytes", together=_together.by_places),
            source="bitsandbytes 0.50.2 on a CPU: functional.quantize_4bit; int8: int8_vectorwise_quant; codebooks: "
            "quantize_blockwise",
        ),
        Dialect(
            "tflite",
            symmetric=_of_bits(2, 4, 8, 16, unsigned=False),
            affine=_of_bits(4, 8, 16, unsigned=False),
            narrow_from=8,
            divides_range=True,
            divides=True,
            zero_first=True,
            least_range=1e-9,
            least_scale=0.0,
            source="ai-edge-quantizer 0.10.0: tensor_zp_scale_from_min_max, uniform_quantize",
        ),
        Dialect(
            "aqt",
            symmetric=_of_bits(4, 8, unsigned=False),
            affine=(),
            reach="half range",
            least_range=_NORMAL,
            range_instead=1.0,
            source="aqtp 0.9.0 with jax 0.10.2 on a CPU: quantizer_make",
        ),
    ]
}
"""Every dialect that ``dialect=`` may name. Modules that own rules of a library's own, such as ``ggml``, add theirs."""


def dialect_of(dialect: Any) -> Dialect:
    """The dialect that users mean: by name, or the record itself."""
    if isinstance(dialect, Dialect):
        return dialect
    if not isinstance(dialect, str):
        raise TypeError(f"dialect is a {type(dialect).__name__}: give a name, or an aqt_lite.Dialect")
    found = DIALECTS.get(dialect)
    if found is None:
        raise ValueError(not_known("dialect", dialect, DIALECTS, "a Dialect"))
    return found
