"""Number formats as data: what a code may be, and which float types a source may have.

Owns: the ``ElementType`` and ``FloatType`` records and their tables. Imports: nothing.
A new format is a new record here and a golden vector in the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ELEMENT_TYPES",
    "FLOAT_TYPES",
    "INTEGER_TYPES",
    "ElementType",
    "FloatType",
    "element_type",
    "float_type",
    "integer_type",
]


@dataclass(frozen=True)
class ElementType:
    """A format of quantized codes."""

    name: str
    """What users write as ``dtype=``."""
    bits: int
    """Bits of one code."""
    signed: bool
    """Whether codes may be negative."""
    storage: str
    """dtype of the array that holds the codes."""

    @property
    def min(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def max(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code that a symmetric scheme gives to zero: 0, or half the range where codes are unsigned."""
        return 0 if self.signed else 1 << (self.bits - 1)

    def code_range(self, symmetric: bool) -> tuple[int, int]:
        """Smallest and largest code that quantization may produce. Symmetric: as far below zero's code as above."""
        return (2 * self.middle - self.max, self.max) if symmetric else (self.min, self.max)


@dataclass(frozen=True)
class FloatType:
    """A floating-point type that values may come in, and how the contract computes with it."""

    name: str
    """dtype name."""
    bits: int
    """Bits of one value."""
    compute: str
    """dtype in which scales are kept and every rounding of the contract happens."""
    max: float
    """Largest finite value."""
    tiny: float
    """Statistics and scales below this count as zero: half of a number this large is still normal in ``compute``."""
    huge: float
    """Largest scale whose reciprocal is still normal in ``compute``."""


_INTEGERS = [
    ElementType(name, bits, signed, storage=name)
    for name, bits, signed in [("int8", 8, True), ("uint8", 8, False), ("int16", 16, True), ("uint16", 16, False)]
]
ELEMENT_TYPES = {e.name: e for e in _INTEGERS}
INTEGER_TYPES = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))

_SINGLE = {"compute": "float32", "tiny": 2.0**-125, "huge": 2.0**126}
_FLOATS = [
    FloatType("float16", 16, max=65504.0, **_SINGLE),  # type: ignore[arg-type]
    FloatType("bfloat16", 16, max=(2 - 2.0**-7) * 2.0**127, **_SINGLE),  # type: ignore[arg-type]
    FloatType("float32", 32, max=(2 - 2.0**-23) * 2.0**127, **_SINGLE),  # type: ignore[arg-type]
    FloatType("float64", 64, "float64", (2 - 2.0**-52) * 2.0**1023, 2.0**-1021, 2.0**1022),
]
FLOAT_TYPES = {f.name: f for f in _FLOATS}


def element_type(dtype: object) -> ElementType:
    """The record of a format, from its name or from any library's dtype object of that name."""
    if isinstance(dtype, ElementType):
        return dtype
    found = ELEMENT_TYPES.get(dtype if isinstance(dtype, str) else _dtype_name(dtype))
    if found is None:
        raise ValueError(f"dtype={dtype!r} is not a quantized type: use one of {', '.join(ELEMENT_TYPES)}")
    return found


def float_type(dtype: object, argument: str = "dtype") -> FloatType:
    """The record of a floating-point type, from its name or from any library's dtype object of that name."""
    found = FLOAT_TYPES.get(_dtype_name(dtype))
    if found is None:
        raise ValueError(f"{argument}={dtype!r} is not a floating-point type: use one of {', '.join(FLOAT_TYPES)}")
    return found


def integer_type(dtype: object) -> str:
    """The name of an integer type of any width, from its name or from any library's dtype object of that name."""
    name = _dtype_name(dtype)
    if name not in INTEGER_TYPES:
        raise ValueError(f"dtype={dtype!r} is not an integer type: use one of {', '.join(INTEGER_TYPES)}")
    return name


def _dtype_name(dtype: object) -> str:
    """'int8' of 'int8', numpy.int8, numpy.dtype('>i1'), jax.numpy.int8, torch.int8."""
    if isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rsplit(".", 1)[-1]
