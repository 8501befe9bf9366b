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
import ml_dtypes
import numpy as np
import torch

import aqt_lite
from aqt_lite import Codebook, Float, PerBlock, PerChannel, PerGroup, PerTensor, QArray
from aqt_lite._registry import get_backend
from aqt_lite.formats import FORMATS, format_of
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
        "near ties, given scales, uint16": [(near_ties(few, np.arange(-32769, 65536), reach=1), few[:, None])],
        "all finite float16": [(every_finite("float16"), None)],
        "all finite bfloat16": [(every_finite("bfloat16"), None)],
        "ends of the range": [(ends(16, "float32"), None)],
        "float64, near ties": [(calibrated_near_ties(200, 64, "float64"), None)],
    }


def element_of(case):
    return name if (name := case.rpartition(" ")[2]) in FORMATS else "int8"


def affine_zero_point(scale):
    """Odd, so that adding before rounding shows."""
    return np.full(scale.shape, 13, dtype="int32")


# ---- this library


def problems_of(case, arrays):
    """Both schemes for each array; with a given scale, codes without a sign need a zero point."""
    problems = []
    for x, scale in arrays:
        unsigned = FORMATS[element_of(case)].element.min >= 0
        for scheme in ("affine",) if unsigned and scale is not None else ("symmetric", "affine"):
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


def row_of(problems, without=()):
    """Numbers compared, then mismatches of each column."""
    reference = FORMS[NUMPY](problems)
    cells = [f"{sum(map(compared, reference)):,}"]
    for form in COLUMNS[1:]:
        if form in without:
            cells.append("left out")
            continue
        if not all(serves(form, p) for p in problems):
            cells.append("no such dtype")
            continue
        results = FORMS[form](problems)
        cells.append(f"{sum(differing(a, e) for a, e in zip(results, reference, strict=True)):,}")
    return cells


BACKENDS = dict(zip(COLUMNS, ("numpy", "array_api_strict", "torch", "torch", "jax", "jax"), strict=True))


def on_every_form(function, arrays, forms=COLUMNS):
    """What ``function`` of NumPy arrays and QArrays returns, a list of arrays, in each form."""
    for form in forms:
        b, call = get_backend(BACKENDS[form]), function
        if form == COMPILED:
            torch._dynamo.reset()
            call = torch.compile(function, fullgraph=True)
        elif form == JIT:
            call = jax.jit(function)
        moved = [a.to_backend(b.name) if isinstance(a, QArray) else b.asarray(a) for a in arrays]
        yield [b.to_numpy(y) for y in call(*moved)]


# ---- every format


def calls_of_formats():
    """``{row: [(dtype, options)]}``, by the names that the table of formats has."""
    integers, wide = [f"int{k}" for k in range(2, 8)], ("int16", "uint16")
    mx = [name for name in FORMATS if name.startswith("mx")]
    kept = ("float16", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn", "int8")
    four = ("int4", "float8_e4m3fn", "float4_e2m1fn", "nf4")
    own = Codebook("seven", (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0)), Float("float5_e2m2", 2, 2, bias=1, max=7.0)
    rows = {
        "integers of 2 to 7 bits, ternary": [(n, {}) for n in (*integers, "ternary")],
        "the same, unsigned, affine": [(f"u{n}", {"scheme": "affine"}) for n in integers],
        "integers of 16 bits, both schemes": [(n, {"scheme": s}) for n in wide for s in ("symmetric", "affine")],
        "floats of 8 bits": [(n, {}) for n in FORMATS if n.startswith("float8")],
        "floats of 4 and 6 bits": [(n, {}) for n in FORMATS if n.startswith(("float4", "float6"))],
        "codebooks": [(n, {}) for n, form in FORMATS.items() if isinstance(form.element, Codebook)],
        ", ".join(mx): [(n, {}) for n in mx],
        "mxfp4, scales by even, rceil": [("mxfp4", {"scale_mode": m}) for m in ("even", "rceil")],
        "nvfp4": [("nvfp4", {})],
        f"int4, scales in {', '.join(kept)}": [("int4", {"scale_dtype": k}) for k in kept],
        "offsets: int4, uint4, int8": [(n, {"scheme": "affine", "offset": "data"}) for n in ("int4", "uint4", "int8")],
        "one's own: a codebook of 7, a float of 5 bits": [(element, {}) for element in own],
    }
    for rounding, key in [("half_away", None), ("toward_zero", None), ("stochastic", 7)]:
        rows[f"{rounding}: {', '.join(four)}"] = [(n, {"rounding": rounding, "key": key}) for n in four]
    return rows


def own_ties(x, dtype, options, reach=2):
    """``x``, its values but the extremes of each block moved next to midpoints between two numbers of the format."""
    rng = np.random.default_rng(5)
    q = aqt_lite.quantize(x, dtype, granularity=PerGroup(format_of(dtype).group or 32), **options)

    def spread(a):
        return np.repeat(a, x.shape[1] // a.shape[1], axis=1).astype(np.float64)

    levels = format_of(dtype).element.levels(get_backend("numpy"))
    ties = rng.choice((levels[:-1] + levels[1:]) / 2, x.shape)
    if q.zero_point is not None:
        ties = ties - spread(q.zero_point)
    ties = ties * spread(q.scales)
    if q.offset is not None:
        ties = ties + spread(q.offset)
    ties = ties.astype("float32")
    ties = (ties.view("int32") + rng.integers(-reach, reach + 1, x.shape, dtype="int32")).view("float32")
    blocks = x.reshape(x.shape[0], q.scale.shape[1], -1)
    low, high = (spread(f(blocks, axis=2)) for f in (np.min, np.max))
    farthest = np.maximum(-low, high)
    keep = (x == low) | (x == high)
    least, most = (-farthest, farthest) if options.get("scheme") != "affine" else (low, high)
    return np.where(keep | ~(ties > least) | ~(ties < most), x, ties)


def data_for(dtype, options):
    """Normal numbers, numbers of many magnitudes (where scales can be of any), and near ties of the format's own."""
    normal = np.random.default_rng(6).normal(size=(200, 64)).astype("float32")
    wide = random_magnitudes(200, 64, "float32")
    starts = [normal, wide] if "scale_dtype" not in options else [normal]
    return np.concatenate([*starts, *(own_ties(x, dtype, options) for x in starts)])


def format_rows():
    """For every kind of format, the row's cells."""
    for name, calls in calls_of_formats().items():
        problems = [Problem(data_for(dtype, options), call_of(dtype, options)) for dtype, options in calls]
        yield name, row_of(problems)
    few = ("int4", "float8_e4m3fn", "float6_e2m3fn", "float4_e2m1fn", "nf4", "mxfp4", "nvfp4")
    for narrow in NARROW:
        x = every_finite(narrow)
        yield f"all finite {narrow}: {', '.join(few)}", row_of([Problem(x, call_of(n, {})) for n in few])


def call_of(dtype, options):
    """In groups of 32, or those that the format says."""
    form = format_of(dtype)
    return Call(dtype, **{"granularity": PerGroup(form.group or 32), **options})


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


NF4 = FORMATS["nf4"].element.numbers
E2M1 = tuple(FORMATS["mxfp4"].element.levels(get_backend("numpy")).tolist())


def naive_format(xp, x, _scale, kind, _most):
    """Codes or numbers, and scales, of formats; a group is a row. The arguments are those of ``naive``."""
    amax = xp.max(xp.abs(x), 1, True)
    if kind == "float8_e4m3fn":
        return xp.float8(xp.clip(x / (amax / 448), -448, 448)), amax / 448
    if kind == "nf4":
        return xp.nearest(x / amax, NF4), amax
    if kind == "nf4, times the reciprocal":
        return xp.nearest(x * (1 / amax), NF4), amax
    if kind == "mxfp4":
        scale = xp.exp2(xp.floor(xp.log2(amax)) - 2)
        return xp.nearest(x / scale, E2M1), scale
    one = xp.max(amax, 0, True) / (448 * 6)  # nvfp4
    scale = xp.float8(amax / 6 / one) * one
    return xp.nearest(x / scale, E2M1), scale


class Torch:
    """torch, by the names that NumPy and JAX have."""

    abs, round, clip = torch.abs, torch.round, torch.clamp
    max = staticmethod(torch.amax)
    min = staticmethod(torch.amin)
    floor, log2, exp2 = torch.floor, torch.log2, torch.exp2
    nearest = staticmethod(lambda x, table: torch.argmin(abs(x[..., None] - torch.tensor(table)), -1))
    float8 = staticmethod(lambda x: x.to(torch.float8_e4m3fn).to(torch.float32))


class Numpy:
    """NumPy, with the arguments in the same places."""

    abs, round, clip = np.abs, np.rint, np.clip
    max = staticmethod(lambda x, axis, keepdims: np.max(x, axis=axis, keepdims=keepdims))
    min = staticmethod(lambda x, axis, keepdims: np.min(x, axis=axis, keepdims=keepdims))
    floor, log2, exp2 = np.floor, np.log2, np.exp2
    nearest = staticmethod(lambda x, table: np.argmin(abs(x[..., None] - np.float32(table)), -1))
    float8 = staticmethod(lambda x: x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32))


class Jax:
    """jax.numpy, likewise."""

    abs, round, clip = jnp.abs, jnp.round, jnp.clip
    max = staticmethod(lambda x, axis, keepdims: jnp.max(x, axis=axis, keepdims=keepdims))
    min = staticmethod(lambda x, axis, keepdims: jnp.min(x, axis=axis, keepdims=keepdims))
    floor, log2, exp2 = jnp.floor, jnp.log2, jnp.exp2
    nearest = staticmethod(lambda x, table: jnp.argmin(abs(x[..., None] - jnp.float32(table)), -1))
    float8 = staticmethod(lambda x: x.astype(jnp.float8_e4m3fn).astype(jnp.float32))


def naive_forms(naive=naive):
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


def naive_format_rows():
    """The same for formats: numbers of a few magnitudes, their own near ties, and magnitudes next to powers of two."""
    for kind in ("float8_e4m3fn", "nf4", "nf4, times the reciprocal", "mxfp4", "nvfp4"):
        dtype = kind.partition(",")[0]
        x = np.random.default_rng(7).normal(size=(6400, 32)).astype("float32")
        x = np.concatenate([x, own_ties(x, dtype, {})])
        rest = np.ldexp(x[:200] / 16, np.arange(-100, 100)[:, None] // 4).astype("float32")
        rest[:, 0] = np.nextafter(np.float32(1), np.float32(0)) * np.ldexp(np.float32(1), np.arange(-100, 100) // 4)
        yield from naive_rows([(np.concatenate([x, rest]), None)], 0, (kind,), naive_forms(naive_format))


def naive_rows(arrays, most, schemes=("symmetric", "affine"), forms=None):
    """For each scheme, the row's cells: how many codes, scales and zero points, and how many of them differ."""
    forms = forms or naive_forms()
    for scheme in schemes:
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
        "int4, groups of 32, float16 scales": {"dtype": "int4", "granularity": PerGroup(32), "scale_dtype": "float16"},
        "float6_e2m3fn, a scale an output": {"dtype": "float6_e2m3fn", "granularity": PerChannel(0)},
        "mxfp4": {"dtype": "mxfp4"},
        "nvfp4": {"dtype": "nvfp4"},
    }

    qs = [aqt_lite.quantize(w, **options) for options in weights.values()]
    for mode in ("reproducible", "fast"):

        def all_of(x, bias, *ws, mode=mode):
            return [aqt_lite.linear(x, w, bias, mode=mode) for w in ws]

        reference, *found = on_every_form(all_of, [x, bias, *qs])
        for i, name in enumerate(weights):
            cells = [f"{mismatches(ys[i], reference[i]):,}" for ys in found]
            yield f"linear, {mode}: {name}", [f"{reference[i].size:,}", *cells]


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
    ours += [line(name, cells) for name, cells in format_rows()]
    ours += [line(name, cells) for name, cells in product_rows()]

    print("\nordinary code\n", *header(), sep="\n")
    theirs = header()
    for name, arrays in cases.items():
        element = FORMATS[element_of(name)].element
        if element.min >= 0:  # the few lines below are those of signed codes
            continue
        most = int(element.max)
        theirs += [line(f"{name}: {scheme}", cells) for scheme, cells in naive_rows(arrays, most)]
    theirs += [line(name, cells) for name, cells in naive_format_rows()]
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

Codes, scales, zero points and dequantized values, in both schemes; for `linear`, outputs. Of formats
([formats.md](formats.md)), in groups of 32 unless they have their own: normal numbers, numbers of many magnitudes, and
near ties of their own grids; kept scales, offsets and packed bytes are compared, too. `mode="fast"` is each library's
own sum and makes no promise: it stands here to show what `mode="reproducible"` gives.

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

And for formats, in groups of 32:

```python
scale = max(abs(x)) / 448
q = clip(x / scale, -448, 448).astype(float8_e4m3fn)  # each library's own cast

q = argmin(abs(x / max(abs(x)) - nf4_numbers))  # or x * (1 / max(abs(x)))

scale = exp2(floor(log2(max(abs(x)))) - 2)
q = argmin(abs(x / scale - e2m1_numbers))  # mxfp4

one = max(abs(all x)) / (448 * 6)
scale = (max(abs(x)) / 6 / one).astype(float8_e4m3fn) * one
q = argmin(abs(x / scale - e2m1_numbers))  # nvfp4
```

Codes (before the cast to integers), scales and zero points are compared, -0 equal to 0 and NaN to NaN.

{theirs}

NumPy {np.__version__}, JAX {jax.__version__}, torch {torch.__version__}, {platform.machine()} CPU. "Near ties" are
inputs within three units in the last place of `(k + 0.5) * scale`, where one wrong bit flips a code; in "all finite
float16" (and bfloat16) a row has one exponent.
""")


if __name__ == "__main__":
    main()
