"""How many numbers differ in a bit from NumPy's: this library, and the code one would write instead.

python benchmarks/mismatches.py            # print the tables
python benchmarks/mismatches.py --write    # and record them in docs/mismatches.md
"""

from __future__ import annotations

import argparse
import platform
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor
from aqt_lite._registry import get_backend
from aqt_lite.testing import mismatches

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))  # the inputs and the forms are those of the tests

from forms import COMPILED, FORMS, JAX, JIT, NUMPY, STRICT, TORCH, Call, Problem, compared, differing, serves  # noqa: E402
from hard_inputs import (  # noqa: E402
    calibrated_near_ties,
    ends,
    every_finite,
    near_ties,
    random_magnitudes,
    random_scales,
)

PAGE = ROOT / "docs" / "mismatches.md"
COLUMNS = (NUMPY, STRICT, TORCH, COMPILED, JAX, JIT)
ROWS = PerChannel(0)
NARROW = ("float16", "bfloat16")


def inputs():
    """``{case: [(x, given scales or None)]}``: a row of x is a block, unless a case says otherwise."""
    rng = np.random.default_rng(0)
    scales, few = random_scales(200, 1, -60, 60), random_scales(2, 2)
    return {
        "random, normal": [(rng.normal(size=(256, 512)).astype("float32"), None)],
        "random, of many magnitudes": [(random_magnitudes(400, 256, "float32"), None)],
        "near ties, calibrated": [(calibrated_near_ties(400, 256, "float32"), None)],
        "near ties, given scales": [(near_ties(scales, np.arange(-129, 128)), scales[:, None])],
        "near ties, given scales, int16": [(near_ties(few, np.arange(-32769, 32768), reach=1), few[:, None])],
        "all finite float16": [(every_finite("float16"), None)],
        "all finite bfloat16": [(every_finite("bfloat16"), None)],
        "ends of the range": [(ends(16, "float32"), None)],
        "float64, near ties": [(calibrated_near_ties(200, 64, "float64"), None)],
    }


def element_of(case):
    return "int16" if case.endswith("int16") else "int8"


def affine_zero_point(scale):
    """Odd, so that adding before rounding shows."""
    return np.full(scale.shape, 13, dtype="int32")


# ---- this library


def problems_of(case, arrays):
    """Both schemes for each array."""
    problems = []
    for x, scale in arrays:
        for scheme in ("symmetric", "affine"):
            zero_point = affine_zero_point(scale) if scale is not None and scheme == "affine" else None
            problems.append(Problem(x, Call(element_of(case), scheme, ROWS), scale, zero_point))
    return problems


def granularity_problems():
    rng = np.random.default_rng(3)
    kinds = [
        ((64, 96), PerTensor()),
        ((64, 96), PerChannel(0)),
        ((64, 96), PerChannel(-1)),
        ((64, 96), PerGroup(32)),
        ((64, 96), PerGroup(25)),
        ((64, 96), PerGroup(7, axis=0)),
        ((8, 9, 10), PerBlock((3, -1, 4))),
        ((2, 3, 4, 5, 6), PerBlock((2, 2, 1, 2, 4))),
    ]
    return [
        Problem(rng.normal(size=shape).astype("float32"), Call(element, scheme, granularity))
        for shape, granularity in kinds
        for element, scheme in [("int8", "symmetric"), ("uint8", "affine")]
    ]


def row_of(problems):
    """Numbers compared, then mismatches of each column."""
    reference = FORMS[NUMPY](problems)
    cells = [f"{sum(map(compared, reference)):,}"]
    for form in COLUMNS[1:]:
        if not all(serves(form, p) for p in problems):
            cells.append("no such dtype")
            continue
        results = FORMS[form](problems)
        cells.append(f"{sum(differing(a, e) for a, e in zip(results, reference, strict=True)):,}")
    return cells


# ---- the code one would write


def naive(xp, x, scale, scheme, most):
    """Codes, scale and zero point, as most tutorials have them."""
    if scheme == "symmetric":
        scale = xp.max(xp.abs(x), 1, True) / most if scale is None else scale
        return xp.clip(xp.round(x / scale), -most, most), scale, scale * 0
    if scale is None:
        lo, hi = xp.min(x, 1, True), xp.max(x, 1, True)
        scale = (hi - lo) / (2 * most + 1)
        zero_point = xp.round(-most - 1 - lo / scale)
    else:
        zero_point = scale * 0 + 13
    return xp.clip(xp.round(x / scale + zero_point), -most - 1, most), scale, zero_point


class Torch:
    """torch, by the names that NumPy and JAX have."""

    abs, round, clip = torch.abs, torch.round, torch.clamp
    max = staticmethod(torch.amax)
    min = staticmethod(torch.amin)


class Numpy:
    """NumPy, with the arguments in the same places."""

    abs, round, clip = np.abs, np.rint, np.clip
    max = staticmethod(lambda x, axis, keepdims: np.max(x, axis=axis, keepdims=keepdims))
    min = staticmethod(lambda x, axis, keepdims: np.min(x, axis=axis, keepdims=keepdims))


class Jax:
    """jax.numpy, likewise."""

    abs, round, clip = jnp.abs, jnp.round, jnp.clip
    max = staticmethod(lambda x, axis, keepdims: jnp.max(x, axis=axis, keepdims=keepdims))
    min = staticmethod(lambda x, axis, keepdims: jnp.min(x, axis=axis, keepdims=keepdims))


def naive_forms():
    def on_numpy(*arguments):
        with np.errstate(all="ignore"):
            return naive(Numpy, *arguments)

    def on_torch(x, scale, scheme, most, function=naive):
        to = get_backend("torch").asarray
        result = function(Torch, to(x), None if scale is None else to(scale), scheme, most)
        return [get_backend("torch").to_numpy(part) for part in result]

    def on_compiled(*arguments):
        torch._dynamo.reset()
        return on_torch(*arguments, function=torch.compile(naive, fullgraph=True))

    jitted = jax.jit(naive, static_argnums=(0, 3, 4))

    def on_jax(x, scale, scheme, most, function=naive):
        with jax.enable_x64(x.dtype == np.float64):
            x, scale = jnp.asarray(x), None if scale is None else jnp.asarray(scale)
            return [np.asarray(part) for part in function(Jax, x, scale, scheme, most)]

    def on_jit(*arguments):
        return on_jax(*arguments, function=jitted)

    return {NUMPY: on_numpy, TORCH: on_torch, COMPILED: on_compiled, JAX: on_jax, JIT: on_jit}


def naive_rows(arrays, most):
    """For either scheme, the row's cells: how many codes, scales and zero points, and how many of them differ."""
    forms = naive_forms()
    for scheme in ("symmetric", "affine"):
        cells = []
        references = [forms[NUMPY](x, scale, scheme, most) for x, scale in arrays]
        count = sum(sum(part.size for part in reference) for reference in references)
        cells.append(f"{count:,}")
        for form in COLUMNS[1:]:
            if form == STRICT:  # a thin layer over NumPy, whose operations these are
                cells.append("as NumPy")
                continue
            wrong = 0
            for (x, scale), reference in zip(arrays, references, strict=True):
                results = forms[form](x, scale, scheme, most)
                for found, wanted in zip(results, reference, strict=True):
                    found, wanted = (np.asarray(a).astype(np.float64) + 0.0 for a in (found, wanted))  # -0 is 0
                    wrong += mismatches(found, wanted)
            cells.append(f"{wrong:,}" + (f" ({100 * wrong / count:.2g} %)" if wrong else ""))
        yield scheme, cells


# ---- products


def product_rows():
    """``linear`` in either mode, for one scale an output, groups, and zero points."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(16, 512)).astype("float32")
    w = rng.normal(size=(64, 512)).astype("float32")
    bias = rng.normal(size=64).astype("float32")
    weights = {
        "a scale an output": {"granularity": PerChannel(0)},
        "groups of 32": {"granularity": PerGroup(32)},
        "groups of 32, zero points": {"granularity": PerGroup(32), "scheme": "affine"},
    }

    def all_of(x, ws, bias, mode):
        return [aqt_lite.linear(x, w, bias, mode=mode) for w in ws]

    qs = [aqt_lite.quantize(w, **options) for options in weights.values()]
    for mode in ("reproducible", "fast"):
        reference = all_of(x, qs, bias, mode)
        found = {}
        for form, name in zip(COLUMNS[1:], ("array_api_strict", "torch", "torch", "jax", "jax"), strict=True):
            b = get_backend(name)
            function = all_of
            if form == COMPILED:
                torch._dynamo.reset()
                function = torch.compile(all_of, fullgraph=True)
            elif form == JIT:
                function = jax.jit(all_of, static_argnames="mode")
            ys = function(b.asarray(x), [q.to_backend(name) for q in qs], b.asarray(bias), mode)
            found[form] = [b.to_numpy(y) for y in ys]
        for i, name in enumerate(weights):
            counts = [mismatches(found[form][i], reference[i]) for form in COLUMNS[1:]]
            yield f"linear, {mode}: {name}", [f"{reference[i].size:,}", *(f"{n:,}" for n in counts)]


# ---- tables


def header():
    return [
        "| case | values compared (NumPy) | " + " | ".join(COLUMNS[1:]) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]


def line(name, cells):
    text = f"| {name} | " + " | ".join(cells) + " |"
    print(text, flush=True)
    return text


def tables():
    cases = inputs()
    print("\naqt_lite\n", *header(), sep="\n")
    ours = header() + [line(name, row_of(problems_of(name, arrays))) for name, arrays in cases.items()]
    ours.append(line("every granularity, ragged too", row_of(granularity_problems())))
    ours += [line(name, cells) for name, cells in product_rows()]

    print("\nordinary code\n", *header(), sep="\n")
    theirs = header()
    for name, arrays in cases.items():
        most = 32767 if element_of(name) == "int16" else 127
        theirs += [line(f"{name}: {scheme}", cells) for scheme, cells in naive_rows(arrays, most)]
    return "\n".join(ours), "\n".join(theirs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"record the tables in docs/{PAGE.name}")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # inductor's own, about torch.jit
    ours, theirs = tables()
    if arguments.write:
        PAGE.write_text(f"""# Mismatches

How many numbers differ from NumPy's in a bit: array-api-strict, torch, torch.compile (one graph), JAX, jitted JAX.
Made by `make mismatches` (`python benchmarks/mismatches.py --write`). The tests assert the zeros on more inputs than
these, against exact arithmetic too.

## aqt_lite

Codes, scales, zero points and dequantized values, in both schemes; for `linear`, outputs. `mode="fast"` is each
library's own sum and makes no promise: it stands here to show what `mode="reproducible"` gives.

{ours}

## Ordinary code

The same inputs, quantized by the same few lines in each library:

```python
scale = max(abs(x)) / 127
q = clip(round(x / scale), -127, 127)  # symmetric

scale = (max(x) - min(x)) / 255
zero_point = round(-128 - min(x) / scale)
q = clip(round(x / scale + zero_point), -128, 127)  # affine
```

Codes (before the cast to integers), scales and zero points are compared, -0 equal to 0 and NaN to NaN.

{theirs}

NumPy {np.__version__}, JAX {jax.__version__}, torch {torch.__version__}, {platform.machine()} CPU. "Near ties" are
inputs within three units in the last place of `(k + 0.5) * scale`, where one wrong bit flips a code; in "all finite
float16" (and bfloat16) a row has one exponent.
""")


if __name__ == "__main__":
    main()
