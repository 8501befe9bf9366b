"""Holds dialects against the libraries that they are named after, and records golden vectors of them.

    python tests/oracles/dialects.py [name ...]        fresh random data through the originals, and every form of ours
    python tests/oracles/dialects.py --write           write tests/golden/dialects.npz anew

Needs the originals, of the versions in VERSIONS: ``make test-oracles`` installs them, and runs the first. Prints a
table; ends with 1 where a number differs.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import warnings
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from forms import ALL_FORMS, COMPILED, JIT, NUMPY, TORCH, Bits, Call, Problem, compared, differing
from hard_inputs import rows_for_dialects
from oracles.originals import ORIGINALS, Original

from aqt_lite import PerChannel
from aqt_lite.dialects import DIALECTS
from aqt_lite.formats import FORMATS

FILE = Path(__file__).parent.parent / "golden" / "dialects.npz"
LIVE = (NUMPY, TORCH, JIT, COMPILED)


def cases(name: str) -> list[tuple[str, str]]:
    """(format, scheme) of everything that a dialect has scales for."""
    d = DIALECTS[name]
    return [(f, scheme) for scheme in ("symmetric", "affine") for f in d.formats(scheme) or ()]


def rows(dtype: str, seed: int) -> np.ndarray:
    """float32, a block each."""
    return rows_for_dialects(FORMATS[dtype].element.bits, seed)


def problem(name: str, dtype: str, scheme: str, x: np.ndarray) -> Problem:
    """Our call."""
    return Problem(x, Call(dtype, scheme, PerChannel(0), dialect=name))


def expected(original: Original, dtype: str, scheme: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes, scales and zero points of the original, in the dtypes that ours have."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        codes, scale, zero = original.quantize(x, dtype, scheme)
    storage = np.dtype(FORMATS[dtype].element.storage)
    codes = codes.view(storage) if dtype.startswith("float8") else codes.astype(storage)
    zeros = np.zeros(len(x), np.int32) if zero is None else zero.astype(np.int32)
    return codes, scale.astype(np.float32), zeros


def unusable(found: tuple[np.ndarray, ...]) -> np.ndarray:
    """Rows for which an original has no scale: it gives 0 for a block of zeros, and NaN for its values."""
    return found[1] == 0


def as_bits(found: tuple[np.ndarray, ...], mine: Bits) -> Bits:
    """The original's numbers in the shapes that ours have; of rows that it has no scale for, scale 1 and code 0."""
    codes, scale, zero = (a.copy() for a in found)
    none = unusable(found)
    codes[none], scale[none] = 0, 1.0
    if mine.zero_point is None:
        assert not zero.any()
    return Bits(codes, scale[:, None], None if mine.zero_point is None else zero[:, None], mine.values)


def live(names: list[str], seed: int) -> int:
    """Numbers that differ, on fresh random data; prints a line for each dialect and form."""
    wrong = 0
    for name in names:
        original = ORIGINALS[name]
        print(name, original.versions(), f"seed {seed}", flush=True)
        problems = [problem(name, *case, rows(case[0], seed)) for case in cases(name)]
        found = [expected(original, *case, p.x) for case, p in zip(cases(name), problems, strict=True)]
        for form in LIVE:
            results = ALL_FORMS[form](problems)
            wanted = [as_bits(f, mine) for f, mine in zip(found, results, strict=True)]
            count = sum(differing(mine, w) for mine, w in zip(results, wanted, strict=True))
            numbers = sum(compared(w._replace(values=np.empty(0))) for w in wanted)
            print(f"  {form}: {numbers} numbers of {len(problems)} kinds, {count} differ", flush=True)
            wrong += count
    return wrong


def write() -> None:
    """The golden vectors: the originals' numbers for seed 0."""
    arrays, versions = {}, {}
    for name, original in ORIGINALS.items():
        versions[name] = original.versions()
        for case in cases(name):
            x = rows(case[0], 0)
            bits = FORMATS[case[0]].element.bits
            arrays[f"x/{bits}"] = x
            key = "/".join((name, *case))
            arrays[f"{key}/codes"], arrays[f"{key}/scale"], arrays[f"{key}/zero_point"] = expected(original, *case, x)
    made = json.dumps(versions, sort_keys=True)
    np.savez_compressed(FILE, allow_pickle=False, made_by=np.asarray(made), **arrays)
    print(f"{FILE}: {FILE.stat().st_size} bytes, {len(arrays)} arrays")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(ORIGINALS), help="dialects; by default all")
    parser.add_argument("--write", action="store_true", help="write the golden vectors")
    parser.add_argument("--seed", type=int, default=secrets.randbits(31))
    arguments = parser.parse_args()
    if arguments.write:
        write()
    else:
        sys.exit(live(arguments.names, arguments.seed) > 0)
