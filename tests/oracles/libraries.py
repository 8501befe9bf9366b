"""Writes tests/golden/layouts.json: bytes that other libraries made, and what they read in them.

    pip install libgguf==0.2.2 gguf==0.19.0
    pip install --no-deps bitsandbytes==0.50.2 hqq==0.2.8.post1 compressed-tensors==0.20.0 optimum-quanto==0.2.7 \
        autoawq==0.2.9
    python tests/oracles/libraries.py

No part of aqt_lite takes part. libgguf is ggml's own C code; gguf's Python decodes the same bytes once more. Of the
other libraries the functions that pack codes are called, some from their files alone, since the packages want more.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from golden.generate import encoded

FILE = Path(__file__).parent.parent / "golden" / "layouts.json"
PACKAGES = ("libgguf", "gguf", "bitsandbytes", "hqq", "compressed-tensors", "optimum-quanto", "autoawq")

ENCODED = (
    *("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "tq1_0", "tq2_0", "iq4_nl", "mxfp4", "nvfp4"),
    *("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"),
)
SEARCHED = {"q3_k": 110, "q6_k": 210, "iq4_nl": 18, "iq4_xs": 136}
"""Types whose codes are of a search where a block's scale is 0 in float16, so that they mean nothing; bytes a block."""
DECODED = {  # where a block has its float16 scales: random bytes elsewhere are codes
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "tq1_0": (52,), "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip


def inputs(seed=2611):
    """Rows of 256 float32: random, near ties of every rule, zeros, constants, and the ends of what scales can be."""
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal(256) * 2.0**e for e in (0, -3, 7, -12, -30)]
    for steps in (8, 16):  # near (k + 1/2) d, with the largest entry that says d
        d = np.float32(rng.uniform(0.5, 2))
        near = ((rng.integers(-steps, steps, 256) + 0.5) * d).astype("float32")
        near = np.nextafter(near, rng.choice(np.asarray([-np.inf, np.inf, 0], "float32"), 256))
        near[::32] = -steps * d
        rows.append(near)
    for steps in (15, 31, 127):
        d = np.float32(rng.uniform(0.5, 2))
        near = ((rng.integers(0, steps, 256) + 0.5) * d).astype("float32")
        near[::32], near[1::32] = 0, steps * d
        rows.append(near if steps < 127 else np.where(rng.integers(0, 2, 256) > 0, near, -near))
    halves = np.arange(-12, 13) / 4
    rows.append(rng.choice([*halves, 3.5, 5, -5, 6, -6], 256) * 2.0 ** np.repeat(rng.integers(-5, 5, 8), 32))
    ends = np.zeros(256)
    ends[32:64], ends[64:96], ends[96:128], ends[128] = -0.0, 1.0, -3.3, 1e-30
    ends[160:192:2], ends[193], ends[225] = -0.0, 2.0**-24, -(2.0**-22)
    rows.append(ends)
    below = np.nextafter(np.float32(2), np.float32(0)) - np.arange(8) * np.float32(2.0**-22)
    powers = rng.uniform(-0.5, 0.5, (8, 32)) * 2.0 ** np.arange(-16, 16, 4)[:, None]
    powers[:, 5] = below * 2.0 ** np.arange(-16, 16, 4)
    rows.append(powers.ravel())
    largest = rng.uniform(-1, 1, (8, 32)) * 60000.0
    largest[:, 0] = 65519.0
    rows.append(largest.ravel())
    equal = rng.choice([-1.0, 1.0, 0.25], 256)
    rows.append(equal)
    return np.stack(rows).astype("float32")


def meant(name, data, wanted):
    """The bytes that are compared: of blocks whose scale is 0 in ``wanted`` the scale alone."""
    if name not in SEARCHED:
        return data
    blocks, at = data.reshape(-1, SEARCHED[name]).copy(), DECODED[name][0]
    zeros = (wanted.reshape(blocks.shape)[:, at : at + 2].copy().view("<u2") & 0x7FFF == 0)[:, 0]
    scales = blocks[zeros, at : at + 2] & np.asarray([255, 127], "uint8")
    blocks[zeros] = 0
    blocks[zeros, at : at + 2] = scales
    return blocks


def type_of(name):
    """ggml's number of a block type."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name.upper()]


def of_ggml():
    """Bytes of every encoder, and values of every decoder."""
    import libgguf

    x = inputs()
    encoders = [{"type": name, "bytes": encoded(libgguf.quantize_rows(x, type_of(name)))} for name in ENCODED]
    decoders = [{"type": n, "bytes": encoded(data), "values": encoded(values)} for n, data, values in to_decode()]
    too_large = np.full((1, 32), 1e7, "float32")
    overflow = libgguf.quantize_rows(too_large, type_of("q4_0"))
    return {"x": encoded(x), "encoders": encoders, "decoders": decoders, "overflow_of_q4_0": encoded(overflow)}


def to_decode(first=4, second=5):
    """Types, bytes, and the values that ggml and gguf's Python read in them."""
    import libgguf
    from gguf import quants
    from gguf.constants import GGML_QUANT_SIZES

    small = np.random.default_rng(first).standard_normal((2, 256)).astype("float32")
    small[1] *= 2.0**-14
    for name in dict.fromkeys([*DECODED, *ENCODED]):
        kind, rng = type_of(name), np.random.default_rng([second, *name.encode()])
        data = libgguf.quantize_rows(small, kind)
        if name in DECODED:
            size = GGML_QUANT_SIZES[kind][1]
            random = rng.integers(0, 256, data.reshape(-1, size).shape, dtype=np.uint8)
            for i, at in enumerate(DECODED[name]):
                scale = rng.uniform(0.001, 4, len(random)) * (
                    1 if len(DECODED[name]) > 1 and i == 0 else rng.choice([-1, 1], len(random))
                )
                random[:, at : at + 2] = scale.astype("<f2")[:, None].view(np.uint8)
            data[1] = random.reshape(data.shape)[1]
        values = libgguf.dequantize_rows(data, kind)
        assert values.tobytes() == np.asarray(quants.dequantize(data, kind)).tobytes(), name
        yield name, data, values


def by_path(package, *path):
    """A module by its file, without what its package imports."""
    file = Path(importlib.util.find_spec(package).submodule_search_locations[0]).joinpath(*path)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def of_packers():
    """Codes, and what a library's own function packs them to."""
    import torch

    cases = []

    def case(layout, dtype, codes, stored, **beside):
        said = {name: encoded(np.asarray(value)) for name, value in beside.items()}
        cases.append({"layout": layout, "dtype": dtype, "codes": encoded(codes), "stored": encoded(stored), **said})

    def draw(seed, low, high, shape, dtype="uint8"):
        return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)

    from bitsandbytes import functional

    x = torch.from_numpy(np.random.default_rng(1).standard_normal((4, 128)).astype("float32"))
    for kind, dtype in (("nf4", "nf4"), ("fp4", "bnb_fp4")):
        packed, state = functional.quantize_4bit(x, blocksize=64, quant_type=kind)
        values = functional.dequantize_4bit(packed, state).numpy()
        codes = np.stack([packed.numpy() >> 4, packed.numpy() & 15], axis=-1).reshape(x.shape)
        case("bitsandbytes", dtype, codes, packed.numpy().ravel(), absmax=state.absmax.numpy(), values=values)

    hqq = by_path("hqq", "core", "bitpack.py").BitPack
    for bits, pack, rows in ((4, hqq.pack_4bit_u8, 6), (2, hqq.pack_2bit_u8, 8), (3, hqq.pack_3bit_32, 13)):
        codes = draw(bits, 0, 1 << bits, (rows, 5))
        case("hqq", f"uint{bits}", codes, pack(torch.from_numpy(codes)).numpy())

    quanto = by_path("optimum.quanto", "tensor", "packed.py")
    for bits, rows in ((4, 6), (2, 8), (2, 7)):
        codes = draw(10 + bits + rows, 0, 1 << bits, (rows, 5))
        case("quanto", f"uint{bits}", codes, quanto.pack_weights(torch.from_numpy(codes), bits).numpy())

    tensors = by_path("compressed_tensors", "compressors", "pack_quantized", "helpers.py")
    for bits in range(2, 9):
        codes = draw(20 + bits, -(1 << (bits - 1)), 1 << (bits - 1), (3, 37), "int8")
        case("compressed_tensors", f"int{bits}", codes, tensors.pack_to_int32(torch.from_numpy(codes), bits).numpy())

    awq = by_path("awq", "utils", "packing_utils.py")
    words = np.random.default_rng(40).integers(-(1 << 31), 1 << 31, (6, 3)).astype("int32")
    unpacked = awq.unpack_awq(torch.from_numpy(words), torch.from_numpy(words), 4)
    codes = awq.reverse_awq_order(*unpacked, 4)[0].numpy() & 15
    case("awq", "uint4", codes.astype("uint8"), words)
    codes = draw(41, 0, 16, (16, 8), "int32")  # what AutoAWQ gives GPTQ's kernel
    exllama = awq.pack_exllama(torch.from_numpy(codes), torch.from_numpy(codes), 4)[0]
    case("gptq", "uint4", codes.astype("uint8"), exllama.numpy())
    return cases


def main():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ggml, packers = of_ggml(), of_packers()
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    made = {"header": {"made_by": "tests/oracles/libraries.py", "versions": versions}, "ggml": ggml, "packers": packers}
    FILE.write_text(json.dumps(made, separators=(",", ":")).replace('},{"', '},\n{"') + "\n")
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
