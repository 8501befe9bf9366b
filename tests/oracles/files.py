"""Files of trees, read as docs/files.md says and with nothing else: the header, the document, and every number.

No code is shared with the library.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

NAMES = {"F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool"}
NAMES |= {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}
NAMES |= {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}


def read(path):
    """The tree of a .safetensors file, values in place of QArrays."""
    data = Path(path).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header.pop("__metadata__")["aqt_lite"])
    assert document["version"] == 1
    arrays = {}
    for name, said in header.items():
        begin, end = (8 + length + at for at in said["data_offsets"])
        arrays[name] = np.frombuffer(data[begin:end], NAMES[said["dtype"]]).reshape(said["shape"])
    return tree_of(document["tree"], arrays, document["formats"])


def tree_of(node, arrays, formats):
    if "qarray" in node:
        said, parts = node["qarray"], {k: tree_of(v, arrays, formats) for k, v in node["parts"].items()}
        return values_of(said, parts, formats[said["dtype"]]["element"])
    if "array" in node:
        return arrays[node["array"]]
    ((kind, value),) = node.items()
    if kind in ("dict", "OrderedDict"):
        return {key: tree_of(v, arrays, formats) for key, v in value}
    if kind in ("list", "tuple"):
        return [tree_of(v, arrays, formats) for v in value]
    return {"value": lambda v: v, "int": int, "float": float}[kind](value)


def values_of(said, parts, element):
    codes = parts["storage"]
    if said["packed_length"] is not None:
        stream = np.unpackbits(codes, axis=-1, bitorder="little")
        bits = bits_of(element)
        each = stream[..., : said["packed_length"] * bits].reshape(*codes.shape[:-1], said["packed_length"], bits)
        codes = (each.astype(int) << np.arange(bits)).sum(axis=-1)
    if said["transposed"]:
        first, second = (1, 1) if said["transposed"] is True else said["transposed"]
        lead = codes.ndim - first - second
        codes = np.moveaxis(codes, range(lead + second, codes.ndim), range(lead, lead + first))
    table = np.asarray([number_of(code, element) for code in range(1 << bits_of(element))])
    values = table[codes.astype(int) & (len(table) - 1)]
    compute = "float64" if said["float_dtype"] == "float64" else "float32"
    for name, apply in (("zero_point", np.subtract), ("scale", np.multiply), ("offset", np.add)):
        if name in parts:
            of_block = parts[name].astype("float64")
            for axis, (n, block) in enumerate(zip(codes.shape, said["block"], strict=True)):
                of_block = np.repeat(of_block, n if block is None else block, axis=axis)
                of_block = np.take(of_block, np.arange(n), axis=axis)
            values = apply(values, of_block)
            if name == "scale":  # the product is rounded before anything is added to it
                values = values.astype(compute)
    return values.astype(compute).astype(NAMES["BF16"] if said["float_dtype"] == "bfloat16" else said["float_dtype"])


def bits_of(element):
    if element["kind"] in ("Float", "FloatOrMissing"):
        return element["signed"] + element["exponent"] + element["mantissa"]
    is_integer = element["kind"] in ("Integer", "IntegerOrMissing")
    return element["bits"] if is_integer else (len(element["numbers"]) - 1).bit_length()


def number_of(code, element):
    if element["kind"] == "Codebook":
        return element["numbers"][code] if code < len(element["numbers"]) else math.nan
    if element["kind"] in ("Integer", "IntegerOrMissing"):
        half = 1 << (element["bits"] - 1)
        if element["kind"] == "IntegerOrMissing" and code == (half if element["signed"] else 0):
            return math.nan
        return (code - 2 * half if element["signed"] and code >= half else code) * element["step"]
    m = element["mantissa"]
    sign, e = code >> (element["exponent"] + m), (code >> m) & ((1 << element["exponent"]) - 1)
    fraction = (code & ((1 << m) - 1)) / (1 << m)
    is_small = element["subnormal"] and e == 0
    size = math.ldexp(fraction, 1 - element["bias"]) if is_small else math.ldexp(1 + fraction, e - element["bias"])
    return math.nan if size > element["max"] else -size if sign else size
