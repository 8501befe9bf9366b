"""Element types: finite sets of numbers, each with a code. And the float types that values come in.

Owns: ``Integer``, ``Float``, ``Codebook`` and ``BitRound``, those with a code of values that are missing, how numbers
are rounded to each, and ``FloatType``. Imports: the ``Backend`` interface, as an argument's type alone.

Blocks, scales and zero points know an element type only through ``encode`` and ``decode``, which are each other's
inverse on its numbers. Which element types there are, by name, is said in ``formats``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np

from aqt_lite._keywords import naming_the_fields
from aqt_lite._namespace import Array
from aqt_lite._near import of_these, shown
from aqt_lite._protocol import Backend

__all__ = [
    "FLOAT_TYPES",
    "INTEGER_TYPES",
    "NOISE_BITS",
    "BitRound",
    "Codebook",
    "ElementType",
    "Float",
    "FloatOrMissing",
    "FloatType",
    "Integer",
    "IntegerOrMissing",
    "Rounding",
    "dtype_name",
    "float_type",
    "integer_type",
    "rounded",
    "without_last_bits",
]

Rounding = Literal["half_even", "half_away", "half_toward_zero", "toward_zero", "up", "stochastic"] | float
"""How a number between two neighbours is rounded. "up" is away from zero wherever anything is left; a fraction t in
(0, 1) rounds away from zero from that part of the way on."""

NOISE_BITS = 16
"""Bits of the noise that stochastic rounding compares with."""


def _check_kinds(record: Any, **kinds: type) -> None:
    """TypeError where the name is none, or a field of another type; where floats go, integers do, too."""
    if not isinstance(record.name, str) or not record.name:
        raise TypeError(f"{type(record).__name__}(name={shown(record.name)}): give a name, which dtype= takes")
    for name, kind in kinds.items():
        value = getattr(record, name)
        number = Integral if kind is int else Real
        if isinstance(value, bool) != (kind is bool) or not isinstance(value, bool | number):
            wanted = {bool: "True or False", int: "an integer", float: "a number"}[kind]
            raise TypeError(f"{type(record).__name__}({record.name!r}): {name}={shown(value)}: give {wanted}")


class ElementType(ABC):
    """A finite set of numbers, and the code that each of them has."""

    name: str
    """What users write as ``dtype=``."""
    bits: int
    """Bits of one code."""
    storage: str
    """dtype of an array with one code an item."""
    min: float
    """Smallest number."""
    max: float
    """Largest number."""
    smallest: float
    """Smallest number above zero."""
    unit: float | None = None
    """A power of two of which every number is a whole multiple that fits 8 bits, so that products are sums of integers;
    None where there is none."""
    signed: bool
    """Whether numbers lie on both sides of zero."""
    has_zero: bool = True
    """Whether 0 is one of the numbers."""
    nan: int | None = None
    """A code of NaN, where there is one."""
    minus_zero: int | None = None
    """The code of -0, where zero has two."""
    missing: int | None = None
    """The code of values that are missing, where there is one: NaN is given it, and it reads back as NaN."""
    middle: int = 0
    """The code that a symmetric scheme gives to zero, where a zero point has to say so."""
    zero_points: bool = False
    """Whether a zero point may be added to codes."""
    own_range: bool = False
    """Whether its numbers reach as far as the floats that they stand for, so that they have no scale."""
    codes: tuple[int, int]
    """Smallest and largest code."""

    @property
    def packs(self) -> bool:
        """Whether codes are kept as a dense stream of bits, and not one an item of ``storage``."""
        return self.bits < 8

    def refusal(self, source: str) -> str | None:
        """Why values of a float type cannot become these numbers, and the way; None where they can."""
        return None

    def end_codes(self, symmetric: bool) -> tuple[int, int] | None:
        """The codes of the smallest and the largest number that quantization gives, those of all that is clipped.

        None where they are not known.
        """
        return None

    @property
    def zero_codes(self) -> tuple[int, int]:
        """Smallest and largest code that a zero point may be."""
        return self.codes

    @property
    def top(self) -> float:
        """What the largest magnitude of a block becomes: the farthest number that lies on both sides."""
        return min(-self.min, self.max) if self.signed else self.max

    def range_of(self, symmetric: bool) -> tuple[float, float]:
        """Smallest and largest number that quantization gives."""
        return self.min, self.max

    @abstractmethod
    def encode(
        self, v: Array, zero: Array | None, symmetric: bool, rounding: Rounding, noise: Array | None, b: Backend
    ) -> tuple[Array, Array]:
        """Codes of the numbers next to ``v``, ``zero`` codes further on, and where ``v`` lies inside their range.

        NaN gets the code of zero, or that of missing values. ``v`` is a product that has been rounded once: nothing may
        be added to it before it is rounded to a number of this type, or a compiler would fuse the two.
        """

    @abstractmethod
    def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
        """The numbers that codes stand for: integers of any width, or floats of dtype ``compute``; exact either way.

        A number that is subnormal there may be flushed to zero: bfloat16 and float8_e8m0fnu, whose smallest are below
        2^-126, are complete in float64 only.
        """

    def outermost(self, b: Backend) -> tuple[float, float, float, float]:
        """The two smallest numbers and the two largest, in increasing order."""
        low, after_low, *_, before_high, high = (float(n) for n in self.levels(b)[[0, 1, -2, -1]])
        return low, after_low, before_high, high

    def levels(self, b: Backend) -> np.ndarray[Any, Any]:
        """Every number, in increasing order, as float64; ``b`` does the arithmetic."""
        low, high = self.codes
        codes = b.asarray(np.arange(low, high + 1).astype(self.storage))
        numbers = np.asarray(b.to_numpy(self.decode(codes, b, "float64")), dtype=np.float64)
        return np.unique(numbers[np.isfinite(numbers)])


def rounded(v: Array, rounding: Rounding, xp: Any, noise: Array | None = None) -> Array:
    """``v`` as whole numbers. Every rule but the first compares with a threshold, and adds nothing to ``v``.

    ``noise`` holds whole numbers, uniform in [0, 2^NOISE_BITS): a part ``f`` rounds away from zero where
    ``f >= 1 - noise / 2^NOISE_BITS``, which happens with probability ``f`` to as many bits as the whole part leaves.
    """
    if rounding == "half_even":
        return xp.round(v)
    size = xp.abs(v)
    whole = xp.floor(size)
    if rounding == "toward_zero":
        away = xp.zeros_like(whole)
    elif rounding == "up":
        away = xp.astype(size > whole, whole.dtype)
    elif rounding == "half_toward_zero":
        away = xp.astype(size > whole + 0.5, whole.dtype)
    elif rounding == "stochastic":
        assert noise is not None
        away = xp.astype(size >= whole + (1 - xp.astype(noise, whole.dtype) * 2.0**-NOISE_BITS), whole.dtype)
    else:
        away = xp.astype(size >= whole + (0.5 if rounding == "half_away" else float(rounding)), whole.dtype)
    size = whole + away
    return xp.where(v < 0, -size, size)


def without_last_bits(size: Array, drop: int, rounding: Rounding, xp: Any, noise: Array | None = None) -> Array:
    """Bit patterns of magnitudes, the last ``drop`` bits of which are rounded away and become zeros.

    Magnitudes lie in the order of their bits, so that a carry moves into the exponent as it should. By default that is
    so for floats of any width; other roundings than half to even are for 32 bits.
    """
    if not drop:
        return size
    kept = (1 << drop) - 1
    if rounding == "half_even":
        return (size + ((size >> drop) & 1) + ((1 << (drop - 1)) - 1)) & ~kept
    part = xp.astype(size & kept, xp.float32) * 2.0**-drop  # exact
    return (size & ~kept) + (xp.astype(rounded(part, rounding, xp, noise), size.dtype) << drop)


@naming_the_fields
@dataclass(frozen=True)
class Integer(ElementType):
    """All integers of some bits, times a step: two's complement where they are signed.

    Examples
    --------
    >>> import aqt_lite
    >>> aqt_lite.Integer("int9", 9, signed=True).codes
    (-256, 255)
    """

    name: str
    bits: int
    signed: bool
    step: float = 1.0
    """A power of two: the number of code 1. Other than 1 with a sign alone."""
    narrow: bool = False
    """Whether the smallest code of a signed type, which has no opposite, is left out."""

    def __post_init__(self) -> None:
        _check_kinds(self, bits=int, signed=bool, step=float, narrow=bool)
        if not 2 <= self.bits <= 16:
            raise ValueError(f"Integer({self.name!r}): bits={self.bits}: give 2 to 16")
        if not (0 < self.step < math.inf and math.frexp(self.step)[0] == 0.5):
            raise ValueError(f"Integer({self.name!r}): step={self.step}: give a power of two; a scale does the rest")
        if not self.signed and self.step != 1:  # 0 lies in the middle of its codes, and zero points are codes
            raise ValueError(
                f"Integer({self.name!r}): step={self.step} of codes without a sign: give signed=True, or leave "
                "the step out; a scale does the rest"
            )

    @property
    def storage(self) -> str:  # type: ignore[override]
        return f"{'' if self.signed else 'u'}int{8 if self.bits <= 8 else 16}"

    @property
    def codes(self) -> tuple[int, int]:  # type: ignore[override]
        if not self.signed:
            return 0, (1 << self.bits) - 1
        most = (1 << (self.bits - 1)) - 1
        return -most - (not self.narrow), most

    @property
    def min(self) -> float:  # type: ignore[override]
        return self.codes[0] * self.step

    @property
    def max(self) -> float:  # type: ignore[override]
        return self.codes[1] * self.step

    @property
    def smallest(self) -> float:  # type: ignore[override]
        return self.step

    @property
    def unit(self) -> float | None:  # type: ignore[override]
        return self.step if self.bits <= 8 else None

    @property
    def middle(self) -> int:  # type: ignore[override]
        return 0 if self.signed else 1 << (self.bits - 1)

    @property
    def zero_points(self) -> bool:  # type: ignore[override]
        return self.step == 1.0

    @property
    def top(self) -> float:
        return (self.codes[1] - self.middle) * self.step

    def code_range(self, symmetric: bool) -> tuple[int, int]:
        """Smallest and largest code that quantization gives. Symmetric: as far below zero's code as above."""
        low, high = self.codes
        return (2 * self.middle - high, high) if symmetric else (low, high)

    def range_of(self, symmetric: bool) -> tuple[float, float]:
        low, high = self.code_range(symmetric)
        return low * self.step, high * self.step

    def end_codes(self, symmetric: bool) -> tuple[int, int]:
        return self.code_range(symmetric)

    def encode(
        self, v: Array, zero: Array | None, symmetric: bool, rounding: Rounding, noise: Array | None, b: Backend
    ) -> tuple[Array, Array]:
        xp = b.xp
        least, most = self.code_range(symmetric)
        code = rounded(v if self.step == 1.0 else v * (1 / self.step), rounding, xp, noise)
        if zero is None:
            zero = xp.zeros_like(code)
        else:  # an integer plus an integer, both far below 2^24: exact where it is not clipped
            code = code + zero
        clipped = xp.clip(code, float(least), float(most))
        return xp.astype(xp.where(xp.isnan(code), zero, clipped), b.dtype(self.storage)), clipped == code

    def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
        return codes if self.step == 1.0 else b.xp.astype(codes, b.dtype(compute)) * self.step


@naming_the_fields
@dataclass(frozen=True)
class Float(ElementType):
    """Sign, exponent, mantissa, from the highest bit down. Larger magnitudes saturate; infinities are never made.

    Examples
    --------
    >>> import aqt_lite
    >>> aqt_lite.Float("float5_e2m2", 2, 2, bias=1, max=7.0).bits
    5
    """

    name: str
    exponent: int
    mantissa: int
    bias: int
    max: float
    signed: bool = True
    subnormal: bool = True
    """Whether exponent 0 means numbers without a leading 1, and so zero; else there is no zero."""
    negative_zero: bool = True
    """Whether zero has a second code, with the sign bit set."""
    infinity: int | None = None
    """The code of infinity, where there is one. It is read, never made."""
    nan: int | None = None
    """A code of NaN. It is made where these numbers are scales, of blocks that cannot be used."""

    def __post_init__(self) -> None:
        _check_kinds(self, exponent=int, mantissa=int, bias=int, max=float, signed=bool, subnormal=bool)
        if self.exponent < 1 or self.mantissa < 0 or not (2 <= self.bits <= 8 or self.bits == 16):
            raise ValueError(
                f"Float({self.name!r}): exponent={self.exponent}, mantissa={self.mantissa}: give one bit of exponent "
                f"or more, and with the sign 2 to 8 bits, or 16"
            )
        fraction, e = math.frexp(self.max) if 0 < self.max < math.inf else (0.0, 0)
        whole = math.ldexp(fraction, self.mantissa + 1)
        if not fraction or whole != int(whole) or not self.lowest <= e - 1 < (1 << self.exponent) - self.bias:
            raise ValueError(
                f"Float({self.name!r}): max={self.max} is no number of {self.exponent} bits of exponent with bias "
                f"{self.bias} and {self.mantissa} of mantissa: give its largest, (1 + fraction) * 2^exponent"
            )

        for what, code in (("infinity", self.infinity), ("nan", self.nan)):
            sign = 1 << (self.bits - 1)
            alone = what == "nan" and self.signed and not self.negative_zero and code == sign  # where -0 would be
            if code is not None and not alone and not self.largest_code < code < (sign if self.signed else 2 * sign):
                raise ValueError(
                    f"Float({self.name!r}): {what}={code:#x} is the code of a number, or has more than {self.bits} "
                    f"bits: give one above that of max, {self.largest_code:#x}, without the sign"
                )

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.signed + self.exponent + self.mantissa

    @property
    def storage(self) -> str:  # type: ignore[override]
        return "uint8" if self.bits <= 8 else "int16"  # bit patterns; torch does next to nothing with uint16

    @property
    def codes(self) -> tuple[int, int]:  # type: ignore[override]
        return (0, (1 << self.bits) - 1) if self.bits <= 8 else (-(1 << 15), (1 << 15) - 1)

    @property
    def min(self) -> float:  # type: ignore[override]
        return -self.max if self.signed else 0.0

    @property
    def has_zero(self) -> bool:  # type: ignore[override]
        return self.subnormal

    @property
    def minus_zero(self) -> int | None:  # type: ignore[override]
        return (-(1 << 15) if self.bits == 16 else 1 << (self.bits - 1)) if self.signed and self.negative_zero else None

    @property
    def lowest(self) -> int:
        """Exponent of the smallest number with a leading 1."""
        return 1 - self.bias if self.subnormal else -self.bias

    @property
    def smallest(self) -> float:  # type: ignore[override]
        return math.ldexp(1.0, self.lowest - (self.mantissa if self.subnormal else 0))

    @property
    def unit(self) -> float | None:  # type: ignore[override]
        return self.smallest if self.subnormal and self.max / self.smallest <= 127 else None

    @property
    def largest_code(self) -> int:
        """Code of ``max``."""
        fraction, exponent = math.frexp(self.max)
        hidden = 0 if self.subnormal else 1 << self.mantissa
        return ((exponent - 1 - self.lowest) << self.mantissa) + int(math.ldexp(fraction, self.mantissa + 1)) - hidden

    def end_codes(self, symmetric: bool) -> tuple[int, int]:
        if not self.signed:
            return 0, self.largest_code
        return self.largest_code + (1 << (self.bits - 1)) - (1 << 16 if self.bits == 16 else 0), self.largest_code

    def encode(
        self, v: Array, zero: Array | None, symmetric: bool, rounding: Rounding, noise: Array | None, b: Backend
    ) -> tuple[Array, Array]:
        """A size is ``whole * 2^(binade + lowest - mantissa)``, and its code lies ``binade`` binades above ``whole``.

        A whole part that rounding carries into the next binade gives that binade's first code by itself.
        """
        xp, m, lowest = b.xp, self.mantissa, self.lowest
        normal = FLOAT_TYPES[b.dtype_name(v)].tiny / 2
        size = xp.clip(xp.abs(v) if self.signed else v, 0.0, self.max)
        size = xp.where(size >= normal, size, xp.zeros_like(size))  # subnormal, or NaN, for which >= is False
        fraction, e = b.fraction_and_exponent(size)
        whole = fraction * 2.0**m
        if 2.0**lowest > normal:  # what lies below the smallest number with a leading 1 counts in steps of ``smallest``
            whole = xp.where(e < lowest, size * math.ldexp(1.0, m - lowest), whole)
        code = xp.astype(rounded(whole, rounding, xp, noise), xp.int32)
        code = code + (xp.clip(e - lowest, 0, 255) << m) - (0 if self.subnormal else 1 << m)
        code = xp.clip(code, 0, self.largest_code)
        if self.signed:
            negative = xp.signbit(v) & ~xp.isnan(v)
            if not self.negative_zero:
                negative = negative & (code > 0)
            code = xp.where(negative, code + (1 << (self.bits - 1)) - (1 << 16 if self.bits == 16 else 0), code)
        return xp.astype(code, b.dtype(self.storage)), (xp.abs(v) <= self.max) & (v >= self.min)

    def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
        xp, m = b.xp, self.mantissa
        code = xp.astype(codes, xp.int32)
        size = code & ((1 << (self.exponent + m)) - 1)
        field_, fraction = size >> m, size & ((1 << m) - 1)
        if self.subnormal:
            whole = xp.where(field_ > 0, fraction + (1 << m), fraction)
            e = xp.clip(field_ - 1, 0, 255) + (self.lowest - m)
        else:
            whole, e = fraction + (1 << m), field_ + (self.lowest - m)
        half = e >> 1  # in two steps: the smallest scales lie below the smallest power that there is
        powers = [xp.astype(b.power_of_two(part), b.dtype(compute)) for part in (half, e - half)]
        value = xp.astype(whole, b.dtype(compute)) * powers[0] * powers[1]
        value = xp.where(size > self.largest_code, xp.full_like(value, float("nan")), value)
        if self.infinity is not None:
            value = xp.where(size == self.infinity, xp.full_like(value, float("inf")), value)
        if self.signed:
            value = xp.where(code >> (self.bits - 1) != 0, -value, value)
        if self.nan is not None and not self.negative_zero:
            value = xp.where(code == self.nan, xp.full_like(value, float("nan")), value)
        return value


@naming_the_fields
@dataclass(frozen=True)
class Codebook(ElementType):
    """Any numbers, listed by code.

    Parameters
    ----------
    name : str
        What ``QArray.dtype`` says.
    numbers : sequence of float
        2 to 256 finite numbers on both sides of zero; rounded to float32. Code ``i`` stands for ``numbers[i]``.

    Notes
    -----
    A number between two neighbours goes to the nearer one: above the midpoint (rounded to the dtype of the arithmetic)
    to the larger, at it or below to the smaller, as bitsandbytes does.

    Examples
    --------
    >>> import aqt_lite
    >>> seven = aqt_lite.Codebook("seven", (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0))
    >>> q = aqt_lite.quantize([0.1, -0.4, 2.0, -1.2], seven)
    >>> q.qvalue, q.bits
    (array([3, 2, 6, 1], dtype=uint8), 3)
    """

    name: str
    numbers: tuple[float, ...] = field(repr=False)
    signed = True

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"Codebook(name={self.name!r}): give a name, which QArray.dtype will say")
        try:
            numbers = tuple(float(np.float32(n)) for n in self.numbers)
        except (TypeError, ValueError):
            raise TypeError(f"Codebook({self.name!r}): numbers must be a sequence of real numbers") from None
        if not 2 <= len(numbers) <= 256:
            raise ValueError(f"Codebook({self.name!r}): has {len(numbers)} numbers: give 2 to 256")
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"Codebook({self.name!r}): every number must be finite, and so in float32")
        if not (min(numbers) < 0 < max(numbers)):
            raise ValueError(f"Codebook({self.name!r}): numbers must lie on both sides of zero")
        object.__setattr__(self, "numbers", numbers)
        # here, not in properties: compilers that trace follow no NumPy
        order = sorted(range(len(numbers)), key=lambda c: (numbers[c], c))
        kept = [c for i, c in enumerate(order) if i == 0 or numbers[c] != numbers[order[i - 1]]]
        object.__setattr__(self, "_order", tuple(kept))
        object.__setattr__(self, "_nearest_zero", min(range(len(kept)), key=lambda i: abs(numbers[kept[i]])))
        ordered = np.asarray([numbers[c] for c in kept])
        object.__setattr__(self, "_cuts", {key: _cuts(ordered, *key) for key in _WAYS_TO_CUT})
        positive = [abs(n) for n in numbers if n != 0]
        object.__setattr__(self, "smallest", min(positive))
        steps = [2.0**-e for e in range(8)]
        whole = [u for u in steps if all(n / u == int(n / u) and abs(n / u) <= 127 for n in numbers)]
        object.__setattr__(self, "unit", whole[0] if whole else None)

    @property
    def bits(self) -> int:  # type: ignore[override]
        return (len(self.numbers) - 1).bit_length()

    @property
    def storage(self) -> str:  # type: ignore[override]
        return "uint8"

    @property
    def codes(self) -> tuple[int, int]:  # type: ignore[override]
        return 0, len(self.numbers) - 1

    @property
    def min(self) -> float:  # type: ignore[override]
        return min(self.numbers)

    @property
    def max(self) -> float:  # type: ignore[override]
        return max(self.numbers)

    def cuts(self, dtype: str, rounding: Rounding) -> tuple[float, ...]:
        """For each gap between neighbours (stochastic: and each noise), above which number the larger one is taken."""
        found: tuple[float, ...] | None = self._cuts.get((dtype, rounding))
        if found is None:
            raise ValueError(f"rounding={rounding!r} is not possible for {self.name}, whose numbers have unequal steps")
        return found

    @property
    def has_zero(self) -> bool:  # type: ignore[override]
        return 0.0 in self.numbers

    def end_codes(self, symmetric: bool) -> tuple[int, int]:
        return self._order[0], self._order[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        return Codebook, (self.name, self.numbers)  # what is read from a file is checked, too

    _order: Any = field(init=False, repr=False, compare=False, default=())
    _nearest_zero: int = field(init=False, repr=False, compare=False, default=0)
    _cuts: Any = field(init=False, repr=False, compare=False, default=None)
    smallest: float = field(init=False, repr=False, compare=False, default=0.0)
    unit: float | None = field(init=False, repr=False, compare=False, default=None)

    def encode(
        self, v: Array, zero: Array | None, symmetric: bool, rounding: Rounding, noise: Array | None, b: Backend
    ) -> tuple[Array, Array]:
        xp, shape, dtype = b.xp, tuple(v.shape), b.dtype_name(v)
        flat = xp.reshape(v, (-1,))
        if rounding == "stochastic":
            assert noise is not None
            ends = tuple(self.numbers[c] for c in self._order)
            below = xp.searchsorted(b.constant(ends[1:-1], dtype, like=v), flat, side="right")  # the gap it lies in
            below = xp.astype(below, xp.int32)
            table = b.constant(self.cuts(dtype, rounding), dtype, like=v)
            at = below * (1 << _CODEBOOK_NOISE_BITS) + (xp.reshape(noise, (-1,)) >> (NOISE_BITS - _CODEBOOK_NOISE_BITS))
            position = below + xp.astype(flat > xp.take(table, at, axis=0), xp.int32)
        else:
            cuts = b.constant(self.cuts(dtype, rounding), dtype, like=v)
            position = xp.searchsorted(cuts, flat, side="left")
        position = xp.where(xp.isnan(flat), xp.full_like(position, self._nearest_zero), position)
        if self._order != tuple(range(len(self._order))):
            order = b.constant(self._order, "int32", like=v)
            position = xp.take(order, xp.astype(position, xp.int32), axis=0)
        codes = xp.reshape(xp.astype(position, b.dtype(self.storage)), shape)
        return codes, (v >= self.min) & (v <= self.max)

    def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
        xp = b.xp
        table = b.constant(self.numbers, compute, like=codes)
        flat = xp.reshape(xp.astype(codes, xp.int32), (-1,))
        return xp.reshape(xp.take(table, flat, axis=0), tuple(codes.shape))


@dataclass(frozen=True)
class IntegerOrMissing(Integer):
    """Integers, whose lowest code is no number but stands for a value that is missing.

    Two's complement has no opposite of that code, so that a symmetric scheme goes without it as it is.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.narrow:
            raise ValueError(f"IntegerOrMissing({self.name!r}): narrow=True leaves out the code of what is missing")

    @property
    def missing(self) -> int:  # type: ignore[override]
        return self.codes[0]

    @property
    def nan(self) -> int:  # type: ignore[override]
        return self.missing

    @property
    def zero_codes(self) -> tuple[int, int]:
        return self.code_range(False)

    @property
    def min(self) -> float:  # type: ignore[override]
        return self.zero_codes[0] * self.step

    @property
    def unit(self) -> float | None:  # type: ignore[override]
        return None  # no sum of integers has a NaN

    def code_range(self, symmetric: bool) -> tuple[int, int]:
        low, high = super().code_range(symmetric)
        return max(low, self.codes[0] + 1), high

    def encode(
        self, v: Array, zero: Array | None, symmetric: bool, rounding: Rounding, noise: Array | None, b: Backend
    ) -> tuple[Array, Array]:
        codes, inside = super().encode(v, zero, symmetric, rounding, noise, b)
        return _with_missing(codes, v, self.missing, b), inside

    def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
        numbers = b.xp.astype(codes, b.dtype(compute)) * self.step
        return b.xp.where(codes == self.missing, b.xp.full_like(numbers, float("nan")), numbers)


@dataclass(frozen=True)
class FloatOrMissing(Float):
    """Floats, whose code of NaN stands for a value that is missing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nan is None:
            raise ValueError(f"FloatOrMissing({self.name!r}): nan=None: give a code of NaN")

    @property
    def missing(self) -> int | None:  # type: ignore[override]
        return self.nan

    def encode(
        self, v: Array, zero: Array | None, symmetric: bool, rounding: Rounding, noise: Array | None, b: Backend
    ) -> tuple[Array, Array]:
        codes, inside = super().encode(v, zero, symmetric, rounding, noise, b)
        assert self.nan is not None
        return _with_missing(codes, v, self.nan, b), inside


@dataclass(frozen=True)
class BitRound(ElementType):
    """Floats of 32 bits without the last bits of their significand.

    They have its sign, its exponents, those of subnormal numbers among them, and no scale.

    Codes are the upper bits of the patterns, as signed integers; no arithmetic but that of integers comes near them.

    Parameters
    ----------
    name : str
        What ``QArray.dtype`` says.
    keepbits : int
        Bits after the leading one: 0 to 23.
    may_miss : bool
        Whether the code of NaN stands for values that are missing.

    Examples
    --------
    >>> import aqt_lite
    >>> q = aqt_lite.quantize([3.14159, -273.15], "bitround7")
    >>> q.dequantize().tolist(), q.bits, [hex(code & 0xFFFF) for code in q.qvalue.tolist()]
    ([3.140625, -274.0], 16, ['0x4049', '0xc389'])
    """

    name: str
    keepbits: int
    may_miss: bool = False
    signed = True
    own_range = True

    def __post_init__(self) -> None:
        if type(self.keepbits) is not int or not 0 <= self.keepbits <= _SIGNIFICAND:
            raise ValueError(f"BitRound({self.name!r}): keepbits={self.keepbits!r}: give 0 to {_SIGNIFICAND}")

    @property
    def bits(self) -> int:  # type: ignore[override]
        return 32 - self.dropped

    @property
    def dropped(self) -> int:
        """Bits of float32 that are not kept."""
        return _SIGNIFICAND - self.keepbits

    @property
    def storage(self) -> str:  # type: ignore[override]
        return "int16" if self.bits <= 16 else "int32"

    @property
    def packs(self) -> bool:
        return self.bits not in (16, 32)

    @property
    def codes(self) -> tuple[int, int]:  # type: ignore[override]
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    @property
    def largest_code(self) -> int:
        """Code of ``max``: all below are finite, all above are not."""
        return (_INFINITE >> self.dropped) - 1

    @property
    def max(self) -> float:  # type: ignore[override]
        return (2 - 2.0**-self.keepbits) * 2.0**127

    @property
    def min(self) -> float:  # type: ignore[override]
        return -self.max

    @property
    def smallest(self) -> float:  # type: ignore[override]
        return 2.0 ** (-126 - self.keepbits)

    @property
    def nan(self) -> int:  # type: ignore[override]
        return (_INFINITE | _QUIET) >> self.dropped  # of no bits: that of infinity, which has none

    @property
    def minus_zero(self) -> int:  # type: ignore[override]
        return self.codes[0]

    @property
    def missing(self) -> int | None:  # type: ignore[override]
        return self.nan if self.may_miss else None

    def refusal(self, source: str) -> str | None:
        if source in ("float16", "float64"):
            return (
                f"{self.name} has the exponents of float32, and values of {source} have others: give float32 values, "
                "or round with aqt_lite.bitround(x, keepbits), whose result are floats of the type of x"
            )
        if source == "bfloat16" and self.keepbits > _BFLOAT16:
            return f"{self.name} keeps {self.keepbits} bits, and bfloat16 has {_BFLOAT16}: give 0 to {_BFLOAT16}"
        return None

    def outermost(self, b: Backend) -> tuple[float, float, float, float]:
        step = math.ldexp(1.0, 127 - self.keepbits)
        return self.min, self.min + step, self.max - step, self.max

    def end_codes(self, symmetric: bool) -> tuple[int, int]:
        return self.largest_code + self.codes[0], self.largest_code

    def encode(
        self, v: Array, zero: Array | None, symmetric: bool, rounding: Rounding, noise: Array | None, b: Backend
    ) -> tuple[Array, Array]:
        xp, pattern = b.xp, b.bits_of(v)
        size = pattern & ~_SIGN
        known = size <= _INFINITE
        size = xp.where(known, size, xp.zeros_like(size))
        inside = known & (size <= self.largest_code << self.dropped)
        code = without_last_bits(size, self.dropped, rounding, xp, noise) >> self.dropped
        code = xp.clip(code, 0, self.largest_code)
        code = xp.where((pattern < 0) & known, code + self.codes[0], code)
        if self.missing is not None:
            code = xp.where(known, code, xp.full_like(code, self.missing))
        return xp.astype(code, b.dtype(self.storage)), inside

    def decode(self, codes: Array, b: Backend, compute: str = "float32") -> Array:
        """As for other types; infinities have no code, and subnormal numbers are as they were."""
        xp = b.xp
        code = xp.astype(codes, xp.int32)
        pattern = code << self.dropped
        known = (code & self.codes[1]) <= self.largest_code
        pattern = xp.where(known, pattern, b.constant(_INFINITE | _QUIET, "int32", like=pattern))
        return xp.astype(b.floats_of(pattern, "float32"), b.dtype(compute))


_SIGNIFICAND, _BFLOAT16 = 23, 7
"""Explicit bits of the significands of float32 and bfloat16."""

_SIGN, _INFINITE, _QUIET = -(1 << 31), 0x7F800000, 0x00400000
"""Bit patterns of float32: -0, infinity, and what tells NaN from it."""


def _with_missing(codes: Array, v: Array, missing: int, b: Backend) -> Array:
    return b.xp.where(b.xp.isnan(v), b.xp.full_like(codes, missing), codes)


_CODEBOOK_NOISE_BITS = 8
"""Bits of noise that a codebook uses: its cuts are a table with a row for each gap, since no gap is like another."""

_WAYS_TO_CUT: list[tuple[str, Rounding]] = [
    (dtype, rounding)
    for dtype in ("float32", "float64")
    for rounding in ("half_even", "half_away", "toward_zero", "up", "stochastic")
]


@np.errstate(all="ignore")  # subnormal cuts are mended below
def _cuts(numbers: np.ndarray[Any, Any], dtype: str, rounding: Rounding) -> tuple[float, ...]:
    low, high = numbers[:-1], numbers[1:]

    def at_least(t: Any) -> Any:  # v > at_least(t) is v >= t
        return np.nextafter(t.astype(dtype), np.asarray(-np.inf, dtype))

    middle, outward = low / 2 + high / 2, low + high > 0
    if rounding == "half_even":
        cuts = middle
    elif rounding == "half_away":
        cuts = np.where(outward, at_least(middle), middle)
    elif rounding == "toward_zero":
        cuts = np.where((low < 0) & (high > 0), middle, np.where(low >= 0, at_least(high), low))
    elif rounding == "up":  # between numbers on both sides of zero: to that on the same side
        zero = np.where(outward, np.float64(0), at_least(np.zeros_like(low)))
        cuts = np.where(low >= 0, low, np.where(high <= 0, at_least(high), zero))
    else:  # the part of the way to the farther number from which on that one is taken, as ``rounded`` has it
        part = 1 - np.arange(1 << _CODEBOOK_NOISE_BITS) * 2.0**-_CODEBOOK_NOISE_BITS
        low, high, outward = low[:, None], high[:, None], outward[:, None]
        cuts = np.where(outward | (low + high == 0), at_least(low + (high - low) * part), high - (high - low) * part)
    cuts, normal = cuts.astype(dtype), np.finfo(dtype).smallest_normal
    # subnormal numbers count as 0, flushed or not: 0 lies above -normal, and not above the number before normal
    cuts = np.where(
        np.abs(cuts) >= normal, cuts, np.where(cuts < 0, -normal, np.nextafter(normal, np.asarray(0, dtype)))
    )
    return tuple(cuts.astype(np.float64).ravel().tolist())


# ---- float types of values


@dataclass(frozen=True)
class FloatType:
    """A floating-point type that values may come in, and how the contract computes with it."""

    name: str
    """dtype name."""
    bits: int
    """Bits of one value."""
    compute: str
    """dtype in which scales are chosen and every rounding of the contract happens."""
    max: float
    """Largest finite value."""
    tiny: float
    """Statistics and scales below this count as zero: half of a number this large is still normal in ``compute``."""
    huge: float
    """Largest scale whose reciprocal is still normal in ``compute``."""


INTEGER_TYPES = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))

_SINGLE = {"compute": "float32", "tiny": 2.0**-125, "huge": 2.0**126}
_FLOATS = [
    FloatType("float16", 16, max=65504.0, **_SINGLE),  # type: ignore[arg-type]
    FloatType("bfloat16", 16, max=(2 - 2.0**-7) * 2.0**127, **_SINGLE),  # type: ignore[arg-type]
    FloatType("float32", 32, max=(2 - 2.0**-23) * 2.0**127, **_SINGLE),  # type: ignore[arg-type]
    FloatType("float64", 64, "float64", (2 - 2.0**-52) * 2.0**1023, 2.0**-1021, 2.0**1022),
]
FLOAT_TYPES = {f.name: f for f in _FLOATS}


def float_type(dtype: object, argument: str = "dtype") -> FloatType:
    """The record of a floating-point type, from its name or from any library's dtype object of that name."""
    found = FLOAT_TYPES.get(dtype_name(dtype))
    if found is None:
        near = of_these(dtype_name(dtype), FLOAT_TYPES)
        raise ValueError(
            f"{argument}={shown(dtype)} is not a floating-point type{near}: use one of {', '.join(FLOAT_TYPES)}"
        )
    return found


def integer_type(dtype: object) -> str:
    """The name of an integer type of any width, from its name or from any library's dtype object of that name."""
    name = dtype_name(dtype)
    if name not in INTEGER_TYPES:
        near = of_these(name, INTEGER_TYPES)
        raise ValueError(f"dtype={shown(dtype)} is not an integer type{near}: use one of {', '.join(INTEGER_TYPES)}")
    return name


def dtype_name(dtype: object) -> str:
    """'int8' of 'int8', numpy.int8, numpy.dtype('>i1'), jax.numpy.int8, torch.int8."""
    if isinstance(dtype, str):
        return dtype
    name = getattr(dtype, "name", None) or getattr(dtype, "__name__", None) or str(dtype)
    return str(name).rsplit(".", 1)[-1]
