"""What the originals make of float16 and bfloat16 values, beside ours, which compute in float32 whatever the type.

    python tests/oracles/sixteen.py [name ...]    in the environment that .ci/oracles.py makes

Prints a table for docs/dialects.md. Differences are no failures: the page says where they are.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from forms import bits_of
from oracles.dialects import asked, cases, expected, granularity_of, rows, within
from oracles.originals import ORIGINALS

from aqt_lite import quantize

PROSE = ("torch", "torch_per_channel", "torch_per_tensor", "onnx", "onnxruntime", "keras", "tflite")
"""Originals that refuse such values, or widen them: the page says so."""

KINDS = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


@contextlib.contextmanager
def given_in(kind: str) -> Iterator[None]:
    """The originals get their arrays in a type of 16 bits, and what they return is widened."""
    import jax.numpy as jnp
    import mlx.core as mx
    import torch

    from_numpy, to_numpy, asarray, array = torch.from_numpy, torch.Tensor.numpy, jnp.asarray, mx.array

    def tensor(x: Any) -> Any:
        made = from_numpy(x)
        return made.to(getattr(torch, kind)) if made.dtype == torch.float32 else made

    def numbers(t: Any) -> Any:
        return to_numpy(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t)

    def of_jax(x: Any, *rest: Any, **how: Any) -> Any:
        made = asarray(x, *rest, **how)
        return made.astype(kind) if isinstance(x, np.ndarray) and x.dtype == np.float32 else made

    def of_mlx(x: Any) -> Any:
        return array(x).astype(getattr(mx, kind))

    with (
        mock.patch.object(torch, "from_numpy", tensor),
        mock.patch.object(torch.Tensor, "numpy", numbers),
        mock.patch.object(jnp, "asarray", of_jax),
        mock.patch.object(mx, "array", of_mlx),
    ):
        yield


def held(name: str, kind: str, seed: int) -> dict[str, str]:
    """Kinds of formats, and what of codes and scales is another."""
    found: dict[str, list[tuple[int, int, int, int]]] = {}
    refused: dict[str, str] = {}
    for dtype, scheme in cases(name):
        x = within(name, dtype, rows(dtype, seed))
        x = x[(np.abs(x).max(1) < 1e4) & (np.abs(x).max(1) > 1e-3)]  # what float16 holds
        x = x.astype(KINDS[kind]).astype(np.float32)
        group = dtype.rstrip("0123456789") if "int" in dtype else dtype
        how = {"granularity": granularity_of(dtype), "dialect": name, **asked(scheme)}
        mine = bits_of(quantize(x, dtype, **how))
        try:
            with given_in(kind):
                codes, scale, _ = expected(ORIGINALS[name], dtype, scheme, x)
        except Exception as error:  # whatever the original says to the type
            refused[group] = type(error).__name__
            continue
        own = mine.scale if isinstance(mine.scale, np.ndarray) else mine.scale.codes
        differing = (codes.reshape(mine.codes.shape) != mine.codes).sum(), (scale.reshape(own.shape) != own).sum()
        found.setdefault(group, []).append((int(differing[0]), codes.size, int(differing[1]), own.size))
    said = {}
    for group, counts in found.items():
        codes, of, scales, of_scales = (sum(c[i] for c in counts) for i in range(4))
        same = not (codes or scales)
        said[group] = "equal" if same else f"{part(codes, of)} of codes, {part(scales, of_scales)} of scales"
    return said | {group: f"refused ({why})" for group, why in refused.items() if group not in said}


def part(count: int, of: int) -> str:
    share = 100 * count / of
    return f"{share:.0f} %" if share >= 10 or count == 0 else f"{share:.1g} %"


def main(names: list[str]) -> None:
    print("| dialect | float16 values | bfloat16 values |")
    print("|---|---|---|")
    for name in names:
        cells = []
        for kind in KINDS:
            said: dict[str, list[str]] = {}
            for group, words in held(name, kind, 1).items():
                said.setdefault(words, []).append(group)
            one = len(said) == 1
            cells.append("; ".join(words if one else f"{', '.join(groups)}: {words}" for words, groups in said.items()))
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[n for n in ORIGINALS if n not in PROSE])
    main(parser.parse_args().names)
