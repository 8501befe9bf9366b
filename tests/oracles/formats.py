"""The number formats, written down once more: every number that a code stands for, as a fraction.

Written from the definitions (OCP 8-bit floating point and MX 1.0; ml_dtypes' README; bitsandbytes; ggml); no code is
shared with the library.
"""

from __future__ import annotations

import struct
from fractions import Fraction


def power(e):
    """2^e."""
    return Fraction(1 << e) if e >= 0 else Fraction(1, 1 << -e)


def floats(exponent, mantissa, bias, *, signed=True, negative_zero=True, finite=None, leading=False):
    """``{code: number}`` of the finite numbers of a float; ``finite``: how many codes there are of one sign."""
    numbers = {}
    count = 1 << (exponent + mantissa)
    for code in range(count if finite is None else finite):
        field, fraction = code >> mantissa, code % (1 << mantissa)
        if field or leading:
            value = (1 + fraction * power(-mantissa)) * power(field - bias)
        else:
            value = fraction * power(1 - bias - mantissa)
        numbers[code] = value
        if signed and (value or negative_zero):
            numbers[count + code] = -value
    return numbers


def single(value):
    """A decimal rounded to float32."""
    return Fraction(struct.unpack("f", struct.pack("f", value))[0])


def integers(low, high, step=Fraction(1)):
    return {code: code * step for code in range(low, high + 1)}


def codebook(*numbers):
    return dict(enumerate(map(single, numbers)))


_BNB = [0.0, 0.0625 / 12, 8 / 12, 1.0, 4 / 12, 6 / 12, 2 / 12, 3 / 12]

FLOATS = {
    "float8_e4m3fn": floats(4, 3, 7, finite=0x7F),
    "float8_e5m2": floats(5, 2, 15, finite=0x7C),
    "float8_e4m3fnuz": floats(4, 3, 8, negative_zero=False),
    "float8_e5m2fnuz": floats(5, 2, 16, negative_zero=False),
    "float6_e2m3fn": floats(2, 3, 1),
    "float6_e3m2fn": floats(3, 2, 3),
    "float4_e2m1fn": floats(2, 1, 1),
}
CODEBOOKS = {
    "nf4": codebook(
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "bnb_fp4": codebook(*_BNB, *(-n for n in _BNB)),
    "iq4_nl": codebook(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
INTEGERS = {
    **{f"int{n}": integers(-(1 << (n - 1)), (1 << (n - 1)) - 1) for n in (2, 3, 4, 5, 6, 7, 8, 16)},
    **{f"uint{n}": integers(0, (1 << n) - 1) for n in (2, 3, 4, 5, 6, 7, 8, 16)},
    "ternary": integers(-1, 1),
    "mxint8": integers(-127, 127, power(-6)),
}
ELEMENTS = INTEGERS | FLOATS | CODEBOOKS
"""``{name: {code: number}}``; an integer's code is the integer."""

BLOCK_FORMATS = {
    "mxfp8_e4m3": "float8_e4m3fn",
    "mxfp8_e5m2": "float8_e5m2",
    "mxfp6_e2m3": "float6_e2m3fn",
    "mxfp6_e3m2": "float6_e3m2fn",
    "mxfp4": "float4_e2m1fn",
    "mxint8": "mxint8",
}
"""``{MX format: element}``: blocks of 32, scales of type e8m0."""

BITROUND = {f"bitround{keepbits}": keepbits for keepbits in range(24)}
"""``{format: bits after the leading one}``: float32 with so many. There are too many numbers to list."""

MANTISSA = {
    "float8_e4m3fn": 3,
    "float8_e5m2": 2,
    "float6_e2m3fn": 3,
    "float6_e3m2fn": 2,
    "float4_e2m1fn": 1,
    "mxint8": 6,
}

SCALE_NAN = {
    "float16": 0x7E00,
    "bfloat16": 0x7FC0,
    "float8_e8m0fnu": 0xFF,
    "float8_e4m3fn": 0x7F,
    "float8_e5m2": 0x7E,
    "float8_e4m3fnuz": 0x80,
    "float8_e5m2fnuz": 0x80,
}

SCALES = {
    "float16": floats(5, 10, 15, finite=0x7C00, signed=False),
    "bfloat16": floats(8, 7, 127, finite=0x7F80, signed=False),
    "float8_e8m0fnu": floats(8, 0, 127, signed=False, leading=True, finite=0xFF),
    **{name: {c: v for c, v in FLOATS[name].items() if c < 0x80} for name in FLOATS if name in SCALE_NAN},
}
"""Formats that scales are kept in as they are: what is not negative of them."""

BITS = {
    **{name: int(name.lstrip("uint")) for name in INTEGERS if name[-1].isdigit() and name != "mxint8"},
    "ternary": 2,
    "mxint8": 8,
    **{name: int(name[5]) for name in FLOATS},
    **dict.fromkeys(CODEBOOKS, 4),
}
"""Bits of one code."""


def packed(codes, bits):
    """Rows of codes as rows of bytes: code i of a row in the bits [i * bits, (i + 1) * bits) of one long integer."""
    rows = []
    for row in codes:
        stream = sum((int(code) % (1 << bits)) << (i * bits) for i, code in enumerate(row))
        rows.append(list(stream.to_bytes(-(-len(row) * bits // 8), "little")))
    return rows
