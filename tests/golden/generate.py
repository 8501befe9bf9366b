"""Writes v2.json, golden vectors of every format, and says how v1.json was made.

    python tests/golden/generate.py

All come from exact arithmetic, in which no part of the library takes part; but those whose "made_by" says "reference"
(stochastic rounding to a codebook) come from the library itself, on NumPy. v1.json is frozen. What is
in v2.json stays as it is, too: run this to add the cases of a new format, and look that nothing else changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from hard_inputs import calibrated_near_ties, dtype_of, ends, near_ties, neighbours, random_magnitudes, random_scales
from oracles import exact, formats

FILE = Path(__file__).parent / "v1.json"
FORMATS_FILE = Path(__file__).parent / "v2.json"

FORMATS_SCHEMA = {
    "array": "{dtype, shape, hex}: elements in C order, each the hexadecimal digits of its bits, highest first",
    "formats": {
        "name": "what the case is about",
        "made_by": "exact: fractions and integers alone; reference: this library on NumPy",
        "x": "array to quantize: float16, bfloat16, float32 or float64",
        "format": "name of the format",
        "scheme": "symmetric or affine",
        "block": "length of a block along every axis, null for the whole axis; the last block may be shorter",
        "given": "true: scale, zero_point and offset are inputs; false: they are results",
        "offset_from_data": "true: an affine scheme whose blocks have a real offset, not a zero point",
        "scale_dtype": "format of kept scales, null: the format's own, or float32 (float64 for float64 values)",
        "scale_mode": "floor, ceil, even or rceil for scales that are powers of two, null: the format's own",
        "rounding": "half_even, half_away, toward_zero or stochastic",
        "key": "of stochastic rounding: 16 hexadecimal digits, or null",
        "scale": "array on the grid of blocks; or {codes, scale, values} of kept scales, scale null if they have none; "
        "null for formats without",
        "zero_point": "int32 array on the same grid, or null",
        "offset": "array on the same grid, or null",
        "codes": "result, one an item: integers, or bit patterns of floats, or places in a codebook",
        "storage": "the same codes as stored: bytes of a stream of bits along the last axis for less than 8 bits, and "
        "for bitround formats of other than 16 and 32",
        "values": "result: codes dequantized, in the dtype of x",
    },
    "codebooks": "numbers of each codebook, by code",
}

SCHEMA = {
    "array": "{dtype, shape, hex}: elements in C order, each the hexadecimal digits of its bits, highest first",
    "quantize": {
        "name": "what the case is about",
        "x": "array to quantize: float16, bfloat16, float32 or float64",
        "element": "type of the codes: int8, uint8, int16 or uint16",
        "scheme": "symmetric or affine",
        "block": "length of a block along every axis, null for the whole axis; the last block may be shorter",
        "given": "true: scale and zero_point are inputs; false: they are results",
        "nonfinite": "raise: x is finite; ignore: it is not, and statistics are over its finite values",
        "scale": "array on the grid of blocks, ceil(shape / block)",
        "zero_point": "int32 array on the same grid, or null for zero",
        "codes": "result",
        "values": "result: codes dequantized, in the dtype of x",
    },
    "products": {
        "name": "what the case is about",
        "op": "linear: y = x @ w.T + bias; dense: y = x @ w + bias; both in the reproducible mode",
        "x": "array (M, K), or {codes, scale, zero_point, dtype} of a quantized one with one scale a row",
        "w": "{codes, scale, zero_point, block}: the quantized weight, (N, K) for linear and (K, N) for dense",
        "bias": "array (N,) or null",
        "y": "result (M, N)",
    },
}


def encoded(x):
    """An array as the schema says; None as it is."""
    if x is None:
        return None
    x = np.asarray(x)
    bits = np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}").astype(f">u{x.dtype.itemsize}")
    return {"dtype": x.dtype.name, "shape": list(x.shape), "hex": bits.tobytes().hex()}


def decoded(field):
    """Its inverse."""
    if field is None:
        return None
    kind = dtype_of(field["dtype"])
    bits = np.frombuffer(bytes.fromhex(field["hex"]), dtype=f">u{kind.itemsize}")
    return bits.astype(f"u{kind.itemsize}").view(kind).reshape(field["shape"])


def quantize(name, x, element="int8", scheme="symmetric", block=None, scale=None, zero_point=None):
    """One case, computed."""
    block = (1, *[None] * (x.ndim - 1)) if block is None else block
    e = exact.quantize(x, element, scheme, block, scale, zero_point)
    finite = bool(np.isfinite(x).all())
    return {
        "name": name,
        "x": encoded(x),
        "element": element,
        "scheme": scheme,
        "block": list(block),
        "given": scale is not None,
        "nonfinite": "raise" if finite else "ignore",
        "scale": encoded(e.scale),
        "zero_point": encoded(e.zero_point),
        "codes": encoded(e.codes),
        "values": encoded(e.values),
    }


def quantize_cases():
    """Every source type, element type and scheme; near ties; granularities; the ends; values that are not finite."""
    rng = np.random.default_rng(20)
    cases = []
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        x = np.concatenate([random_magnitudes(5, 6, dtype, seed=1), calibrated_near_ties(3, 6, dtype, seed=2)])
        cases += [
            quantize(f"{dtype}, a block a row", x, element, scheme)
            for element in ("int8", "uint8", "int16", "uint16")
            for scheme in ("symmetric", "affine")
        ]
        edges = ends(4, dtype)
        cases += [
            quantize(f"{dtype}, ends of the range", edges[:22], "int8", scheme) for scheme in ("symmetric", "affine")
        ]
        cases.append(quantize(f"{dtype}, where a block starts to count as zero", edges[22::3], "uint8", "affine"))

        strange = np.asarray([[1, -3, np.nan, 2], [np.inf, 1, -2, -np.inf], [np.nan] * 4], dtype=dtype_of(dtype))
        cases += [quantize(f"{dtype}, not finite", strange, "int8", scheme) for scheme in ("symmetric", "affine")]

        low, high = (-6, 6) if dtype == "float16" else (-100, 100)
        scale = random_scales(4, 3, low, high)[:, None].astype("float64" if dtype == "float64" else "float32")
        ties = near_ties(scale[:, 0], np.asarray([-129, -128, -127, -71, -2, -1, 0, 1, 2, 53, 126, 127, 254]), dtype, 1)
        odd = np.asarray([[-127], [-1], [13], [77]], dtype="int32")
        cases.append(quantize(f"{dtype}, near ties of a given scale", ties, scale=scale))
        cases.append(
            quantize(f"{dtype}, near ties, odd zero points", ties, "int8", "affine", scale=scale, zero_point=odd)
        )

    shapes = [
        ((), ()),
        ((5,), (2,)),
        ((4, 6), (None, None)),
        ((4, 6), (None, 1)),
        ((4, 6), (1, 4)),
        ((4, 6), (3, 4)),
        ((3, 2, 5), (2, None, 3)),
        ((2, 2, 2, 2, 3), (None, 1, 2, 1, 2)),
        ((0, 3), (1, None)),
        ((3, 0), (1, None)),
    ]
    for shape, block in shapes:
        x = np.asarray(rng.normal(size=shape), dtype="float32")
        cases += [
            quantize(f"shape {shape} in blocks {block}", x, element, scheme, block)
            for element, scheme in [("int8", "symmetric"), ("uint8", "affine")]
        ]
    return cases


def quantized(x, scheme="symmetric", element="int8", block=(None, None)):
    e = exact.quantize(x, element, scheme, block)
    return e.codes, e.scale, e.zero_point, block


def product(name, x, w, bias=None, op="linear"):
    """One product of floats with a quantized weight."""
    codes, scale, zero_point, block = w
    y = exact.linear(x, codes, scale, zero_point, block, bias, contract=1 if op == "linear" else 0)
    weight = {"codes": encoded(codes), "scale": encoded(scale), "zero_point": encoded(zero_point), "block": list(block)}
    return {"name": name, "op": op, "x": encoded(x), "w": weight, "bias": encoded(bias), "y": encoded(y)}


def integer_product(name, x, w, bias=None):
    """One product of a quantized array with a quantized weight."""
    left, right = quantized(*x), quantized(*w)
    y = exact.integer_product(*left[:3], *right[:3], bias, x[0].dtype.name)
    keys = ("codes", "scale", "zero_point")
    return {
        "name": name,
        "op": "linear",
        "x": {k: encoded(v) for k, v in zip(keys, left, strict=False)} | {"dtype": x[0].dtype.name},
        "w": {k: encoded(v) for k, v in zip(keys, right, strict=False)} | {"block": list(right[3])},
        "bias": encoded(bias),
        "y": encoded(y),
    }


def product_cases():
    """Granularities, pieces, activations of many magnitudes, subnormal and non-finite ones, bias, narrow types."""
    rng = np.random.default_rng(21)
    normal = lambda *shape: rng.normal(size=shape).astype("float32")
    wide = (rng.normal(size=(3, 24)) * np.exp2(rng.integers(-40, 40, (3, 24)))).astype("float32")
    rows = (1, None)
    w = normal(4, 24)
    grouped = (w * np.exp2(rng.integers(-20, 20, (4, 24)) // 5)).astype("float32")
    x = normal(3, 24)
    special = np.zeros((6, 24), dtype="float32")
    special[0, :3] = [1e-40, -1e-39, 1e-38]
    special[1, :2] = [np.nan, 1]
    special[2, :2] = [np.inf, 1]
    special[3, :3] = [3e38, -3e38, 3e38]
    special[4] = 127 / 64 * np.float32(2.0**20) * (1 + np.arange(24) * np.float32(2.0**-22))
    outlying, beside = normal(3, 23), normal(4, 23)
    outlying[:, 4] = [1e5, -3e8, 2e12]
    beside[:2, 4] = 0
    return [
        product("one scale", x, quantized(w)),
        product("a scale an output, with bias", x, quantized(w, block=rows), normal(4)),
        product("zero points", x, quantized(w, "affine", "uint8", rows), normal(4)),
        product("activations of many magnitudes", wide, quantized(w, block=rows)),
        product("an outlier a row, some beside small weights", outlying, quantized(beside, block=rows), normal(4)),
        product("an outlier and groups of 5", outlying, quantized(beside, block=(1, 5))),
        product("groups of 5, the last shorter", x, quantized(grouped, block=(1, 5)), normal(4)),
        product("groups of 5 with zero points", wide, quantized(grouped, "affine", "int8", (1, 5))),
        product("more than 16 groups", normal(2, 80), quantized(normal(2, 80), block=(1, 4))),
        product("more than 256 groups", normal(1, 540), quantized(normal(1, 540), block=(1, 2))),
        product("blocks of outputs and inputs", x, quantized(grouped, "affine", "uint8", (3, 7))),
        product("a scale for each input", x, quantized(grouped, block=(None, 1)), normal(4)),
        product("a scale for each input, zero points", x, quantized(grouped, "affine", "int8", (None, 1))),
        product("subnormal, non-finite, largest, and carries", special, quantized(w, block=rows)),
        product("results too small and too large", wide[:1] * 2.0**-100, quantized(w * np.float32(2.0**-40))),
        product("float16", x.astype("float16"), quantized(w, block=rows), normal(4)),
        product("bfloat16", x.astype(dtype_of("bfloat16")), quantized(w, block=rows), normal(4)),
        product("dense: a scale an output", x, quantized(w.T.copy(), block=(None, 1)), normal(4), op="dense"),
        product("dense: groups along the inputs", x, quantized(grouped.T.copy(), "affine", "int8", (5, 1)), op="dense"),
        integer_product("integers times integers", (x, "symmetric", "int8", rows), (w, "symmetric", "int8", rows)),
        integer_product(
            "with zero points and bias", (x, "affine", "uint8", rows), (w, "affine", "int8", rows), normal(4)
        ),
    ]


def kept(e):
    """Scales as the schema says."""
    if not isinstance(e, exact.Exact):
        return encoded(e)
    return {"codes": encoded(e.codes), "scale": kept(e.scale), "values": encoded(e.values)}


def case_of_format(
    name,
    x,
    form,
    scheme="symmetric",
    block=None,
    scale=None,
    zero_point=None,
    offset=None,
    made_by=exact.quantize,
    **how,
):
    """One case, computed."""
    block = exact.own_block(form, x.shape) if block is None else block
    how = {"scale_dtype": None, "scale_mode": None, "rounding": "half_even", "key": None} | how
    e = made_by(x, form, scheme, block, scale, zero_point, offset=offset, **how)
    key = how.pop("key")
    return {
        "name": name,
        "made_by": "exact" if made_by is exact.quantize else "reference",
        "x": encoded(x),
        "format": form,
        "scheme": scheme,
        "block": list(block),
        "given": scale is not None,
        "offset_from_data": isinstance(offset, str),
        **how,
        "key": None if key is None else f"{key:016x}",
        "scale": kept(e.scale),
        "zero_point": encoded(e.zero_point),
        "offset": encoded(e.offset),
        "codes": encoded(e.codes),
        "storage": encoded(e.storage),
        "values": encoded(e.values),
    }


def by_the_library(x, form, scheme, block, scale, zero_point, *, offset, scale_dtype, scale_mode, rounding, key):
    """What exact arithmetic has no rule for."""
    import aqt_lite

    granularity = aqt_lite.PerBlock(tuple(-1 if size is None else size for size in block))
    q = aqt_lite.quantize(x, form, granularity=granularity, scale=scale, rounding=rounding, key=key)
    return exact.Exact(q.qvalue, q.scale, q.zero_point, q.dequantize(), storage=q.storage)


def format_cases():
    """Every format: calibrated, near ties of a given scale, every rounding, kept scales, offsets; float64 values."""
    import aqt_lite

    cases = []
    names = tuple(dict.fromkeys((*formats.ELEMENTS, *formats.BLOCK_FORMATS, "nvfp4")))
    if set(names) != set(aqt_lite.formats.FORMATS):
        raise SystemExit("tests/oracles/formats.py and aqt_lite.formats know different formats: write both down")
    for name in names:
        rng = np.random.default_rng([22, *name.encode()])  # so that a new format changes no other's vectors
        x = rng.normal(size=(3, 11)).astype("float32")
        x[1, :6] *= 1e-6
        x[2, 6:] = 0
        x[0, 3] = -0.0
        mild = np.where(x == 0, x, rng.normal(size=x.shape)).astype("float32")
        if name in (*formats.BLOCK_FORMATS, "nvfp4"):
            wide = rng.normal(size=(2, 39)).astype("float32")
            modes = ("floor", "ceil", "even", "rceil") if name != "nvfp4" else (None,)
            cases += [
                case_of_format(f"{name}, {mode or 'its own groups'}", wide, name, scale_mode=mode) for mode in modes
            ]
            cases.append(case_of_format(f"{name}, groups of 4", x, name, block=(1, 4)))
            cases.append(case_of_format(f"{name}, bfloat16", x.astype(dtype_of("bfloat16")), name, block=(2, 5)))
            continue
        numbers = np.unique([float(v) for v in formats.ELEMENTS[name].values()])
        some = numbers[np.unique(np.linspace(0, numbers.size - 1, 9).astype(int))]
        gaps = np.searchsorted(numbers, some[:-1])
        ties = numbers[gaps] / 2 + numbers[gaps + 1] / 2
        scale = random_scales(1, 5, -3, 3)
        near = neighbours((np.concatenate([ties, some, [numbers[-1] * 1.5]]) * scale).astype("float32"), 1).reshape(
            1, -1
        )
        column = scale[:, None]
        zero = np.full((1, 1), 1 << (formats.BITS[name] - 1), "int32") if name.startswith("uint") else None
        for how in ("half_even", "half_away", "toward_zero", "stochastic"):
            own = by_the_library if how == "stochastic" and name in formats.CODEBOOKS else exact.quantize
            key = 0x0123456789ABCDEF if how == "stochastic" else None
            given = {"scale": column, "zero_point": zero, "rounding": how, "key": key, "block": (1, None)}
            cases.append(case_of_format(f"{name}, near ties, {how}", near, name, made_by=own, **given))
        cases.append(case_of_format(f"{name}, groups of 4", x, name, block=(1, 4)))
        cases.append(case_of_format(f"{name}, float64", x.astype("float64"), name, block=(2, 5)))
        cases.append(case_of_format(f"{name}, float16", x.astype("float16"), name, block=(None, 1)))
        cases.append(case_of_format(f"{name}, offsets", x + 3, name, "affine", (1, 4), offset="data"))
        if name in formats.INTEGERS:
            cases.append(case_of_format(f"{name}, zero points", x, name, "affine", (1, 4)))
        every = ("int8", "nf4", "float16", "bfloat16", "float8_e8m0fnu", "float8_e4m3fn")
        for kept_as in every if name == "int4" else every[:1]:
            cases.append(case_of_format(f"{name}, scales as {kept_as}", mild, name, block=(1, 4), scale_dtype=kept_as))
        if name == "int4":
            cases.append(case_of_format(f"{name}, two axes", x, name, block=(2, 4)))
    return cases


def bitround_cases():
    """Every number of bits: near ties, carries, and the ends of the range; every rounding; bfloat16 values."""
    cases = []
    for name, keepbits in formats.BITROUND.items():
        rng = np.random.default_rng([22, *name.encode()])
        drop = 23 - keepbits
        upper = rng.integers(0, 255 << keepbits, 5, dtype="int32")
        upper[:2] = 1, (255 << keepbits) - 1  # subnormal, and the largest
        ties = (upper << drop) + ((1 << drop) >> 1)
        finite = np.minimum(ties[:, None] + np.arange(-1, 2, dtype="int32"), 0x7F7FFFFF).astype("int32")
        near = finite.view("float32") * np.where(np.arange(5) % 2, -1, 1)[:, None].astype("float32")
        ends = np.asarray([0.0, -0.0, 1.5, -1.0, 3.4028235e38, -3.4028235e38, 1e-45, 2.0**-126], "float32")
        x = np.concatenate([near.ravel(), ends]).reshape(1, -1)
        cases.append(case_of_format(f"{name}, near ties and ends", x, name))
        if keepbits in (0, 3, 7, 12):
            for how in ("half_away", "toward_zero", "stochastic"):
                key = 0x0123456789ABCDEF if how == "stochastic" else None
                cases.append(case_of_format(f"{name}, near ties, {how}", x, name, rounding=how, key=key))
        if keepbits in (0, 3, 7):
            some = rng.normal(size=(2, 3, 5)).astype(dtype_of("bfloat16"))
            cases.append(case_of_format(f"{name}, bfloat16", some, name))
    return cases


def build_formats():
    """The whole second file."""
    header = {
        "format": "aqt_lite golden vectors",
        "version": 2,
        "contract": "docs/numerics.md",
        "schema": FORMATS_SCHEMA,
    }
    books = {n: encoded(np.asarray([float(v) for v in b.values()], "float32")) for n, b in formats.CODEBOOKS.items()}
    return {"header": header, "codebooks": books, "formats": [*format_cases(), *bitround_cases()]}


def build():
    """The whole first file, as it was made."""
    header = {"format": "aqt_lite golden vectors", "version": 1, "contract": "docs/numerics.md", "schema": SCHEMA}
    return {"header": header, "quantize": quantize_cases(), "products": product_cases()}


def write(file, made, lists):
    """One case a line."""
    parts = [f'"{key}": {json.dumps(value, indent=1)}' for key, value in made.items() if key not in lists]
    for key in lists:
        lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in made[key])
        parts.append(f'"{key}": [\n{lines}\n]')
    file.write_text("{" + ",\n".join(parts) + "}\n")
    counts = ", ".join(f"{len(made[key])} {key}" for key in lists)
    print(f"{file.name}: {counts}, {file.stat().st_size} bytes")


if __name__ == "__main__":
    write(FORMATS_FILE, build_formats(), ["formats"])
