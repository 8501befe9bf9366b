"""Holds dialects against the libraries that they are named after, and records golden vectors of them.

    make test-oracles                                     the first, in an environment that has the originals
    python tests/oracles/dialects.py [--seeds N] [name ...]   fresh random data through the originals and ours
    python tests/oracles/dialects.py --write [name ...]   write what tests/golden/dialects.npz holds of them anew

Prints a table; ends with 1 where a number differs.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from forms import ALL_FORMS, JIT, NUMPY, TORCH, Bits, Call, Problem, differing
from hard_inputs import rows_for_dialects
from oracles.originals import ORIGINALS, Original

from aqt_lite import PerChannel
from aqt_lite.dialects import DIALECTS
from aqt_lite.elements import Codebook, Float
from aqt_lite.formats import FORMATS

FILE = Path(__file__).parent.parent / "golden" / "dialects.npz"
LIVE = (NUMPY, TORCH, JIT)


def cases(name: str) -> list[tuple[str, str]]:
    """(format, scheme) of everything that a dialect has scales for."""
    d = DIALECTS[name]
    return [(f, scheme) for scheme in ("symmetric", "affine", "offsets") for f in d.formats(scheme) or ()]


def asked(scheme: str) -> dict[str, str]:
    """What says so to ``quantize``."""
    return {"offset": "data"} if scheme == "offsets" else {"scheme": scheme}


def rows(dtype: str, seed: int) -> np.ndarray:
    """float32, a block each."""
    return rows_for_dialects(FORMATS[dtype].element.bits, seed)


def within(name: str, dtype: str, x: np.ndarray) -> np.ndarray:
    """Rows that the original can follow, zeros in place of the others."""
    limit = dict(ORIGINALS[name].limits).get(dtype, np.inf)
    return np.where(np.abs(x).max(1, keepdims=True) < limit, x, np.float32(0))


def problem(name: str, dtype: str, scheme: str, x: np.ndarray) -> Problem:
    """Our call."""
    call = Call(dtype, **asked(scheme), granularity=granularity_of(dtype), dialect=name)
    return Problem(within(name, dtype, x), call)


def granularity_of(dtype: str) -> Any:
    """A row is a block; block formats have their own."""
    return None if FORMATS[dtype].scale else PerChannel(0)


def expected(original: Original, dtype: str, scheme: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes, scales and zero points (or offsets) of the original, in the dtypes that ours have."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        codes, scale, zero = original.quantize(x, dtype, scheme)
    kind = np.float32 if scheme == "offsets" else np.int32
    storage = np.dtype(FORMATS[dtype].element.storage)
    element = FORMATS[dtype].element
    codes = codes.view(storage) if isinstance(element, Float) else codes.astype(storage)
    if element.bits < 8 and storage.kind == "i" and isinstance(element, Float):  # the sign is the highest bit
        codes = np.where(codes >= 1 << (element.bits - 1), codes - (1 << element.bits), codes).astype(storage)
    zeros = np.zeros(len(x), kind) if zero is None else zero.astype(kind)
    return codes, scale if FORMATS[dtype].scale else scale.astype(np.float32), zeros


def unusable(found: tuple[np.ndarray, ...]) -> np.ndarray:
    """Rows for which an original has no scale: it gives 0 for a block of zeros, and NaN for its values."""
    return found[1] == 0 if found[1].dtype == np.float32 else np.zeros(len(found[0]), dtype=bool)


def as_bits(found: tuple[np.ndarray, ...], mine: Bits, dtype: str) -> Bits:
    """The original's numbers in the shapes of ours; of rows that it has no scale for, scale 1 and the code of zero."""
    codes, scale, zero = (a.copy() for a in found)
    if isinstance(mine.scale, Bits):
        kept = mine.scale._replace(codes=scale.reshape(mine.scale.codes.shape), values=None, storage=None)
        return Bits(codes, kept, None, mine.values)
    element, none = FORMATS[dtype].element, unusable(found)
    codes[none] = element.numbers.index(0.0) if isinstance(element, Codebook) else zero[none, None]
    scale[none] = 1.0
    if mine.offset is not None:
        return Bits(codes, scale[:, None], None, mine.values, zero[:, None])
    if mine.zero_point is None:
        assert not zero.any()
    return Bits(codes, scale[:, None], None if mine.zero_point is None else zero[:, None], mine.values)


def live(names: list[str], seeds: list[int]) -> int:
    """Numbers that differ, on fresh random data; prints a line of a table for each dialect."""
    wrong = 0
    print("seeds", *seeds)
    print(f"| dialect | original | formats and schemes | numbers compared | {' | '.join(LIVE)} |")
    print("|---|---|---:|---:|" + "---:|" * len(LIVE))
    for name in names:
        original = ORIGINALS[name]
        counts, numbers = dict.fromkeys(LIVE, 0), 0
        for seed in seeds:
            problems = [problem(name, *case, rows(case[0], seed)) for case in cases(name)]
            found = [expected(original, *case, p.x) for case, p in zip(cases(name), problems, strict=True)]
            for form in LIVE:
                results = ALL_FORMS[form](problems)
                wanted = [as_bits(f, mine, case[0]) for f, mine, case in zip(found, results, cases(name), strict=True)]
                counts[form] += sum(differing(mine, w) for mine, w in zip(results, wanted, strict=True))
            numbers += sum(sum(a.size for a in f) for f in found)
        made_by = ", ".join(f"{package} {version}" for package, version in original.versions().items())
        cells = [f"`{name}`", made_by, str(len(cases(name))), f"{numbers:,}", *map(str, counts.values())]
        print("| " + " | ".join(cells) + " |", flush=True)
        wrong += sum(counts.values())
    return wrong


def write(names: list[str]) -> None:
    """The golden vectors of some dialects: the originals' numbers for seed 0. What the file has of others stays."""
    arrays, versions = {}, {}
    if FILE.exists():
        with np.load(FILE) as known:
            versions = json.loads(str(known["made_by"]))
            arrays = {key: known[key] for key in known.files if key != "made_by" and key.split("/")[0] not in names}
    for name in names:
        original = ORIGINALS[name]
        versions[name] = original.versions()
        for case in cases(name):
            x = rows(case[0], 0)
            made = expected(original, *case, within(name, case[0], x))
            same = arrays.setdefault(f"x/{FORMATS[case[0]].element.bits}", x)
            assert np.array_equal(same, x), "other rows than those of the dialects that are not written: write all"
            key = "/".join((name, *case))
            arrays[f"{key}/codes"], arrays[f"{key}/scale"], arrays[f"{key}/zero_point"] = made
    said = json.dumps(versions, sort_keys=True)
    np.savez_compressed(FILE, allow_pickle=False, made_by=np.asarray(said), **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ORIGINALS), help="dialects; by default all")
    parser.add_argument("--write", action="store_true", help="write the golden vectors")
    parser.add_argument("--seeds", type=int, default=3, help="how many random sets of rows")
    arguments = parser.parse_args()
    if arguments.write:
        write(arguments.names)
    else:
        sys.exit(live(arguments.names, [secrets.randbits(31) for _ in range(arguments.seeds)]) > 0)
