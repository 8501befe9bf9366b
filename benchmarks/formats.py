"""Speed of every kind of format on NumPy, beside int8, and of the plain operations beside the CPU forms.

    make bench-formats                      8192 x 2048 float32, medians, in billions of elements a second
    python benchmarks/formats.py --rows 512     a smaller array

The codes and values of both are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

import aqt_lite
from aqt_lite import PerChannel, PerGroup, affine
from aqt_lite._registry import get_backend
from aqt_lite.elements import float_type
from aqt_lite.formats import format_of, scale_format_of
from aqt_lite.testing import assert_same_bits

CASES = [
    ("int8", {"granularity": PerChannel(0)}),
    ("int8", {"granularity": PerGroup(32)}),
    ("int8", {"granularity": PerGroup(32), "scheme": "affine"}),
    ("int4", {"granularity": PerGroup(32)}),
    ("int3", {"granularity": PerGroup(32)}),
    ("int4", {"granularity": PerGroup(32), "scheme": "affine", "offset": "data"}),
    ("float8_e4m3fn", {"granularity": PerChannel(0)}),
    ("float8_e5m2", {"granularity": PerChannel(0)}),
    ("float6_e3m2fn", {"granularity": PerGroup(32)}),
    ("float4_e2m1fn", {"granularity": PerGroup(32)}),
    ("nf4", {"granularity": PerGroup(64)}),
    ("nf4", {"granularity": PerGroup(64), "scale_dtype": "int8"}),
    ("mxfp8_e4m3", {}),
    ("mxfp4", {}),
    ("nvfp4", {}),
]


def seconds(call: Callable[[], object], turns: int) -> float:
    call()
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args()
    x = np.random.default_rng(0).standard_normal((given.rows, given.columns), dtype=np.float32)
    b = get_backend("numpy")
    print("| format | granularity and the like | quantize | plain | dequantize | plain |")
    print("|---|---|---|---|---|---|")
    for dtype, options in CASES:
        q = aqt_lite.quantize(x, dtype, **options)
        form, kept = format_of(dtype), options.get("scale_dtype")
        form = form if kept is None else replace(form, scale=scale_format_of(kept))
        w, spec = q.unpacked()._coded(), affine.Spec(form, float_type("float32"), q.block)
        recipe = affine.Recipe(symmetric=options.get("scheme") != "affine", offset="offset" in options)

        def plain_quantize(spec: affine.Spec = spec, recipe: affine.Recipe = recipe) -> affine.Coded:
            return b.compiled(affine.quantize)(x, spec=spec, recipe=recipe, b=b)

        def plain_dequantize(w: affine.Coded = w, spec: affine.Spec = spec) -> np.ndarray:
            return b.compiled(affine.dequantize)(w, spec=spec, b=b)

        assert_same_bits(q.qvalue, plain_quantize().codes)
        assert_same_bits(q.dequantize(), plain_dequantize())
        taken = [
            seconds(call, turns)
            for call, turns in [
                (lambda dtype=dtype, options=options: aqt_lite.quantize(x, dtype, **options), given.turns),
                (plain_quantize, 3),
                (q.dequantize, given.turns),
                (plain_dequantize, 3),
            ]
        ]
        said = ", ".join(str(v) for v in options.values())
        print(f"| {dtype} | {said} | " + " | ".join(f"{x.size / t / 1e9:.3f}" for t in taken) + " |", flush=True)


if __name__ == "__main__":
    main()
