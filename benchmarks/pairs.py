"""What ``aqt_lite.compare`` says of pairs that were made wrong on purpose, one for each convention.

    python benchmarks/pairs.py    print the table

The pairs are those of tests/test_compare.py, and of its rules for floats. Ends with 1 where one is not explained.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from oracles import dialects as golden
from test_compare import PAIRS

from aqt_lite import Dialect, PerChannel, QArray, compare, quantize

ROWS = PerChannel(0)

OF_CODES = [
    ("transposed", "transposed", 0),
    ("kernels of a convolution, HWIO and OIHW", "kernel axes HWIO for OIHW", 0),
    ("rows of rotary heads, in halves or in turns", "rotary rows, heads of 64", 0),
    ("a group's axis", "axis of scales, transposed", 0),
    ("a group's size", "size of groups", 0),
    ("zero point off by one", "zero points moved", 0),
    ("offset 2^(bits-1)", "signed and unsigned codes", 1),
    ("nibble order", "order of codes in a byte, along the last axis", 0),
    ("half blocks", "halves of blocks of 32, along the last axis", 0),
    ("AWQ's column order", "order of AWQ, codes, along the last axis", 0),
    ("an inverse scale", "inverse scale", 0),
    ("a missing tensor scale", "factor of scales", 0),
    ("divided by the tensor scale", "factor of scales", 1),
    ("scales rounded to float16", "scales in float16", 0),
    ("scales rounded to bfloat16", "scales in bfloat16", 0),
    *((f"layout of {bits} bits, of before and after", "codes across words, along the last axis", 2 * i)
      for i, bits in enumerate((3, 5, 6, 7))),
]  # fmt: skip
"""The convention, the name of a pair, and which of that name."""


def pairs() -> Iterator[tuple[str, Any, Any]]:
    """The convention, and what is compared."""
    for said, name, which in OF_CODES:
        _, a, b = [pair for pair in PAIRS if pair[0] == name][which]
        yield said, a, b
    x = golden.rows("int8", 11)  # with values next to ties
    x = x[np.abs(x).max(1) > 1e-20]

    def made(dtype: str = "int8", scheme: str = "symmetric", rounding: Any = "half_even", **fields: Any) -> QArray:
        mine = Dialect("mine", **fields)
        return quantize(x, dtype, scheme=scheme, granularity=ROWS, rounding=rounding, dialect=mine)

    yield "dialect: scale constant", made(reach="half range"), x
    yield "dialect: divide or reciprocal", made(divides=True), x
    yield "dialect: zero first or last", made("uint8", "affine", zero_first=True), x
    yield "dialect: range", made(reach="each side", narrow_from=None), x
    yield "dialect: rounding", made(rounding="half_away"), x
    yield "MX scale mode", quantize(x, "mxfp4", scale_mode="ceil"), x


def main() -> int:
    """How many are not explained."""
    missed = 0
    print("| made wrong | codes that differ | what `compare` names | in a sentence |")
    print("|---|---:|---|---|")
    for said, a, b in pairs():
        found = compare(a, b)
        missed += found.explanation is None
        name, says = (found.explanation.name, found.explanation.says) if found.explanation else ("nothing", "")
        differing = (
            "shapes differ" if found.codes_that_differ is None else f"{found.codes_that_differ} of {found.codes}"
        )
        print(f"| {said} | {differing} | {name} | {says} |")
    return missed


if __name__ == "__main__":
    sys.exit(main() > 0)
