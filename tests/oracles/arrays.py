"""Holds dialects whose rules are about whole arrays against the originals: tensor scales, blocks of flattened arrays.

    python tests/oracles/arrays.py [--seeds N]    fresh random data through the originals and ours
    python tests/oracles/arrays.py --write        write tests/golden/dialect_arrays.npz anew

``make test-oracles`` runs the first. Prints a table; ends with 1 where a number differs.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from forms import ALL_FORMS, Bits, Call, Problem, differing
from oracles.dialects import LIVE
from oracles.originals import ORIGINALS, bitsandbytes_blocks, compressed_nvfp4, modelopt_nvfp4, torchao_nvfp4

from aqt_lite import Codebook, PerGroup, QArray
from aqt_lite._registry import get_backend
from aqt_lite.testing import Backend, mismatches

FILE = Path(__file__).parent.parent / "golden" / "dialect_arrays.npz"


class Case(NamedTuple):
    """One array, and how it is asked for."""

    key: str
    dialect: str
    dtype: str | Codebook
    x: np.ndarray
    size: int
    """Elements of a block."""

    def problem(self) -> Problem:
        """Our call."""
        return Problem(self.x, Call(self.dtype, granularity=PerGroup(self.size), dialect=self.dialect))


def cases(seed: int) -> Iterator[Case]:
    """Tensors of several magnitudes for NVFP4, and arrays that blocks do not divide for bitsandbytes."""
    rng = np.random.default_rng(seed)
    for magnitude in (1e-29, 1e-3, 1.0, 1e30, 7e37):
        for name in ("torchao", "compressed-tensors", "modelopt"):
            yield Case(f"{name}/nvfp4/{magnitude:g}", name, "nvfp4", tensor(rng, magnitude), 16)
    for dtype in ("nf4", "bnb_fp4"):
        for size, length in ((32, 130), (64, 64), (64, 1000), (128, 300), (256, 700), (4096, 4100), (64, 65), (64, 37)):
            yield Case(f"bitsandbytes/{dtype}/{size}/{length}", "bitsandbytes", dtype, flat(rng, length, size), size)
    for size, length in ((256, 1000), (256, 200), (64, 1024), (4096, 5000)):
        x = near_places(rng, length, size)
        yield Case(f"bitsandbytes/dynamic/{size}/{length}", "bitsandbytes", dynamic(), x, size)


def dynamic() -> Codebook:
    """The table of absmax, as bitsandbytes stores it beside its codes."""
    with np.load(FILE) as recorded:
        return Codebook("bnb_dynamic", tuple(recorded["double quantized/table"].tolist()))


def tensor(rng: np.random.Generator, magnitude: float) -> np.ndarray:
    """Rows of other magnitudes than the largest, near ties of the largest block, of zeros and of constants."""
    x = rng.standard_normal((12, 64)) * np.exp(rng.standard_normal((12, 1)) * 2)
    x[1], x[2, :16], x[3], x[4, ::3] = 0, 0.3, x[3, 0], -0.0
    ties = rng.choice([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], (3, 64)) * rng.choice([-1, 1], (3, 64))
    x[5:8] = ties * (1 + rng.integers(-2, 3, ties.shape) * 2.0**-23) / 6
    x[5:8, ::16] = np.exp(rng.standard_normal((3, 4)))
    x /= np.abs(x).max()
    return (x * magnitude).astype(np.float32)


def flat(rng: np.random.Generator, length: int, size: int) -> np.ndarray:
    """Of one axis: midpoints of both tables among the values, small numbers of either sign, zeros in a block."""
    from aqt_lite.formats import FORMATS

    x = rng.standard_normal(length)
    tables = [np.sort(FORMATS[name].element.numbers) for name in ("nf4", "bnb_fp4")]
    middles = np.concatenate([(t[1:] + t[:-1]) / 2 for t in tables]).astype(np.float32)
    some = rng.integers(0, length, length // 2)
    x[some] = rng.choice(middles, len(some)) * (1 + rng.integers(-1, 2, len(some)) * 2.0**-24) * 3.0
    x[rng.integers(0, length, length // 8)] = 1e-4
    x[rng.integers(0, length, length // 8)] = -1e-4
    x[::size] = 3.0
    x[-1] = 3.0 * rng.uniform(0.5, 1)
    if length > 4 * size:
        x[size : 2 * size] = 0
    return x.astype(np.float32)


def near_places(rng: np.random.Generator, length: int, size: int) -> np.ndarray:
    """Of one axis: values next to the steps between the 65,536 places of bitsandbytes, zeros, a block of them."""
    numbers = np.asarray(dynamic().numbers)
    places = np.round(((numbers[1:] + numbers[:-1]) / 2 + 1) * 32767.5)
    x = rng.standard_normal(length)
    some = rng.integers(0, length, length // 2)
    steps = (rng.choice(places, len(some)) + rng.choice([-0.5, 0.5], len(some))) / 32767.5 - 1
    x[some] = np.clip(steps * 3.0 * (1 + rng.integers(-3, 4, len(some)) * 2.0**-24), -3, 3)
    x[rng.integers(0, length, length // 16)] = 0
    x[::size] = rng.choice([-3.0, 3.0], len(x[::size]))
    if length > 4 * size:
        x[size : 2 * size] = 0
    return x.astype(np.float32)


def expected(case: Case) -> tuple[np.ndarray, ...]:
    """Codes, scales (or their codes), the tensor scale (or 1), values (or none) of the original."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if case.dtype != "nvfp4":
            codes, scale = bitsandbytes_blocks(case.x, case.dtype, case.size)
            if isinstance(case.dtype, Codebook):  # a block of zeros has the first code there
                none = np.repeat(scale == 0, case.size)[: codes.size]
                codes = np.where(none, case.dtype.numbers.index(0.0), codes).astype(np.uint8)
            return codes, np.where(scale == 0, np.float32(1), scale), np.float32(1), np.zeros(0, np.float32)
        if case.dialect != "compressed-tensors":
            made = torchao_nvfp4(case.x) if case.dialect == "torchao" else modelopt_nvfp4(case.x)
            codes, scale, _, tensor, values = made
            return codes, scale, tensor, values
        codes, scale, _, overall, _ = compressed_nvfp4(case.x)
        inverse = np.float32(1) / overall[0]  # of it; the values are those of its quotient with scales
        return codes, scale, inverse, np.zeros(0, np.float32)


def double_quantized(seed: int) -> dict[str, np.ndarray]:
    """What bitsandbytes stores where absmax is quantized, too, and the values that it reads: two groups of absmax."""
    import torch
    from bitsandbytes import functional

    x = flat(np.random.default_rng(seed), 64 * 300, 64)
    packed, state = functional.quantize_4bit(
        torch.from_numpy(x), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    high = packed.numpy().reshape(-1) >> 4
    return {
        "codes": np.stack([high, packed.numpy().reshape(-1) & 15], -1).reshape(-1),
        "absmax": state.absmax.numpy(),
        "absmax2": state.state2.absmax.numpy(),
        "table": state.state2.code.numpy(),
        "mean": state.offset.numpy(),
        "values": functional.dequantize_4bit(packed, state).numpy().reshape(-1),
    }


def read_double_quantized(parts: dict[str, np.ndarray], b: Backend) -> QArray:
    """The same in our terms: codes of absmax less its mean, the table as a codebook, the mean as an offset."""
    table, there = Codebook("bnb_dynamic", tuple(parts["table"].tolist())), b.asarray
    offset, size = float(parts["mean"]), PerGroup(256)
    absmax = QArray.from_codes(
        there(parts["absmax"]), there(parts["absmax2"]), offset=offset, dtype=table, granularity=size
    )
    return QArray.from_codes(there(parts["codes"]), absmax, dtype="nf4", granularity=PerGroup(64))


def as_bits(found: tuple[np.ndarray, ...], mine: Bits) -> Bits:
    """The original's numbers in the shapes of ours."""
    codes, scale, tensor, values = found
    values = values if values.size else mine.values
    if not isinstance(mine.scale, Bits):
        return Bits(codes, scale.reshape(mine.scale.shape), None, values)
    kept = Bits(scale, np.reshape(tensor, mine.scale.scale.shape), None, None)
    return Bits(codes, kept, None, values)


def live(seeds: list[int]) -> int:
    """Numbers that differ, on fresh random data; prints a line of a table for each dialect."""
    made = [(case, expected(case)) for seed in seeds for case in cases(seed)]
    problems = [case.problem() for case, _ in made]
    wrong = {form: dict.fromkeys((case.dialect for case, _ in made), 0) for form in LIVE}
    for form in LIVE:
        for (case, found), mine in zip(made, ALL_FORMS[form](problems), strict=True):
            wrong[form][case.dialect] += differing(mine, as_bits(found, mine))
    print("seeds", *seeds)
    print(f"| dialect, whole arrays | original | arrays | numbers compared | {' | '.join(LIVE)} |")
    print("|---|---|---:|---:|" + "---:|" * len(LIVE))
    for name in wrong[LIVE[0]]:
        by = ", ".join(f"{package} {version}" for package, version in ORIGINALS[name].versions().items())
        parts = [found for case, found in made if case.dialect == name]
        numbers = sum(sum(np.size(a) for a in found) for found in parts)
        print(
            f"| `{name}` | {by} | {len(parts)} | {numbers:,} | " + " | ".join(str(wrong[f][name]) for f in LIVE) + " |"
        )
    nested = 0
    for seed in seeds:
        parts = double_quantized(seed)
        nested += mismatches(read_double_quantized(parts, get_backend("numpy")).dequantize(), parts["values"])
    print(f"values of double-quantized nf4 that differ: {nested}")
    return nested + sum(sum(counts.values()) for counts in wrong.values())


def write() -> None:
    """The golden vectors: the originals' numbers for seed 0."""
    arrays: dict[str, np.ndarray] = {}
    for case in cases(0):
        arrays[f"{case.key}/x"] = case.x
        for part, found in zip(("codes", "scale", "tensor_scale", "values"), expected(case), strict=True):
            arrays[f"{case.key}/{part}"] = np.asarray(found)
    arrays.update({f"double quantized/{part}": found for part, found in double_quantized(0).items()})
    names = dict.fromkeys(case.dialect for case in cases(0))
    made = json.dumps({name: ORIGINALS[name].versions() for name in names}, sort_keys=True)
    np.savez_compressed(FILE, allow_pickle=False, made_by=np.asarray(made), **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the golden vectors")
    parser.add_argument("--seeds", type=int, default=3, help="how many random sets of arrays")
    arguments = parser.parse_args()
    if arguments.write:
        write()
    else:
        sys.exit(live([secrets.randbits(31) for _ in range(arguments.seeds)]) > 0)
