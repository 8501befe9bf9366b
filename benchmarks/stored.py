"""Products with weights in groups, of 8 bits and of 4 bits packed, against the backend's own float32 product.

    python benchmarks/stored.py            printed, and written to benchmarks/stored.json
    python benchmarks/stored.py --quick    one size and few formats, nothing written: under a minute

Each result is checked against float64 first, rows with an outlier too. The float32 product is the faster of the
weight's two layouts, on the same turns. "share" is the part of a call's time that reading the weight's bytes takes.
"""

from __future__ import annotations

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import run
import torch

import aqt_lite
from aqt_lite import PerGroup
from aqt_lite.backends.cpu.runtime import cores, map_ranges

WEIGHTS = {
    "int8, groups of 32": {"granularity": PerGroup(32)},
    "uint8 with zero points, groups of 128": {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(128)},
    "int4, groups of 32": {"dtype": "int4", "granularity": PerGroup(32)},
    "uint4 with zero points, groups of 128": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(128)},
    "nf4, groups of 32": {"dtype": "nf4", "granularity": PerGroup(32)},
    "float4_e2m1fn, groups of 128": {"dtype": "float4_e2m1fn", "granularity": PerGroup(128)},
    "mxfp4": {"dtype": "mxfp4"},
}
REPRODUCIBLE = ["int4, groups of 32", "uint8 with zero points, groups of 128"]
"""Of these, products with the same bits everywhere, too."""


def on(kind: str):
    """How the backend takes an array, its float32 products (M, K) x (N, K) and with (K, N), and ours in both modes."""
    ours = aqt_lite.linear, functools.partial(aqt_lite.linear, mode="reproducible")
    if kind == "torch":
        return torch.from_numpy, torch.nn.functional.linear, torch.matmul, *ours
    if kind == "jax":
        return jnp.asarray, *map(awaited, (lambda x, w: x @ w.T, jnp.matmul, *ours))
    return np.asarray, lambda x, w: x @ w.T, np.matmul, *ours


def awaited(function):
    jitted = jax.jit(function)
    return lambda *arguments: run.wait(jitted(*arguments))


def read_speed() -> float:
    """Bytes a second that all cores read of an array larger than the cache."""
    x = np.ones(1 << 26, np.float32)
    call = {"read": lambda _: map_ranges(lambda lo, hi: x[lo:hi].max(), x.size, 1 << 16, x.size, 8)}
    return x.nbytes / (run.take_turns(call, seconds=2)["read"]["ms"] * 1e-3)


def rows(size: int, rows_of_x: list[int], chosen: dict, read: float) -> list[dict]:
    rng, table = np.random.default_rng(run.SEED), []
    w = rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5)
    weights = {name: aqt_lite.quantize(w, **how) for name, how in chosen.items()}
    for m in rows_of_x:
        x = rng.standard_normal((m, size), dtype=np.float32)
        x[m // 2, 3] = 1e5  # an outlier, which no other row is to pay for
        wide = x.astype(np.float64)
        exact = {name: wide @ q.dequantize().astype(np.float64).T for name, q in weights.items()}
        exact["float32"] = wide @ w.astype(np.float64).T
        for kind in ("numpy", "torch", "jax"):
            table += on_backend(kind, w, weights, x, exact, read)
    return table


def on_backend(kind: str, w, weights: dict, x, exact: dict, read: float) -> list[dict]:
    put, product, product_of_turned, linear, same_bits = on(kind)
    given, (m, size), table = put(x), x.shape, []
    floats, turned = (run.rotating(lambda i, v=v: put(v.copy()), w.nbytes) for v in (w, w.T))
    candidates = {
        "float32": lambda i: product(given, floats[i % len(floats)]),
        "float32, (in, out)": lambda i: product_of_turned(given, turned[i % len(turned)]),
    }
    own = max(run.error(call(0), exact["float32"]) for call in candidates.values())
    measured = {}
    for name, q in weights.items():
        some = run.rotating(lambda i, q=q: q.to_backend(kind), q.nbytes, most=4)
        measured[name] = q
        candidates[name] = lambda i, some=some: linear(given, some[i % len(some)])
        if name in REPRODUCIBLE:
            measured[again := f"{name}, reproducible"] = q
            candidates[again] = lambda i, some=some: same_bits(given, some[i % len(some)])
    for name in measured:
        assert run.error(candidates[name](0), exact[name.removesuffix(", reproducible")]) <= 2 * own, (kind, name, m)
    found = run.take_turns(candidates, seconds=0, least=7)
    base = min(found[name]["ms"] for name in ("float32", "float32, (in, out)"))
    for name, q in measured.items():
        ms = found[name]["ms"]
        share = q.nbytes / read / (ms * 1e-3)
        table.append({"backend": kind, "size": size, "m": m, "who": name, **found[name]})
        table[-1] |= {"float32_ms": base, "times_as_fast": base / ms, "read_share": share}
        print(f"  {kind:6} {size} M={m:<4} {name:40} {ms:8.2f} ms  {base / ms:5.2f}x  share {share:.2f}", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(cores())
    results: dict = {"machine": run.machine()}
    read = read_speed()
    results["read_gb_s"] = read / 1e9
    print(f"{results['machine']['processor']}; reads {read / 1e9:.1f} GB/s")
    chosen = {name: WEIGHTS[name] for name in list(WEIGHTS)[: 3 if quick else None]}
    sizes = [4096] if quick else [4096, 8192]
    results["rows"] = [row for size in sizes for row in rows(size, [1, 8] if quick else [1, 8, 64, 512], chosen, read)]
    if not quick:
        path = run.ROOT / "benchmarks" / "stored.json"
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written: {path.relative_to(run.ROOT)}; tables: python benchmarks/tables.py --write")


if __name__ == "__main__":
    main()
