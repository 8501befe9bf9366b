"""Products with weights in groups, of 8 bits and of 4 bits packed, against the backend's own float32 product.

    python benchmarks/stored.py            printed, and written to benchmarks/stored.json (stored-avx2.json, ...)
    python benchmarks/stored.py --quick    one size and few formats, nothing written: a minute or two
    python benchmarks/stored.py --formats  the other formats: floats of 8 bits, odd widths, odd groups
    python benchmarks/stored.py --in-out   weights that lie (in, out), by ``dense``
    python benchmarks/stored.py --only "numpy alone" --sizes 4096 --rows 1 8    these rows anew, the others as they are

Each result is checked against float64 first, row by row, with an outlier and without. Peers take part where they are
installed (``peers.py``); a second table has the shapes of real networks. The float32 product is the faster of the
weight's two layouts, on the same turns. "share" is the part of a call's time that reading the weight's bytes takes.
"""

from __future__ import annotations

import argparse
import functools
import json
import warnings
from typing import NamedTuple

import jax
import jax.numpy as jnp
import run

import numpy as np  # isort: skip  # after run, which may start the process again
import peers
import torch

import aqt_lite
from aqt_lite import PerChannel, PerGroup
from aqt_lite.backends.cpu import runtime
from aqt_lite.backends.cpu.runtime import cores

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

OTHERS = {
    "int2, groups of 32": {"dtype": "int2", "granularity": PerGroup(32)},
    "int3, groups of 32": {"dtype": "int3", "granularity": PerGroup(32)},
    "int6, one scale an output": {"dtype": "int6", "granularity": PerChannel(0)},
    "float8_e4m3fn, one scale an output": {"dtype": "float8_e4m3fn", "granularity": PerChannel(0)},
    "float8_e4m3fn, groups of 32": {"dtype": "float8_e4m3fn", "granularity": PerGroup(32)},
    "float8_e5m2fnuz, groups of 32": {"dtype": "float8_e5m2fnuz", "granularity": PerGroup(32)},
    "mxfp8_e4m3": {"dtype": "mxfp8_e4m3"},
    "mxfp6_e2m3": {"dtype": "mxfp6_e2m3"},
    "mxint8": {"dtype": "mxint8"},
    "nvfp4": {"dtype": "nvfp4"},
    "int4, one scale an output": {"dtype": "int4", "granularity": PerChannel(0)},
    "int4, groups of 16": {"dtype": "int4", "granularity": PerGroup(16)},
    "int4, groups of 32, float16 scales": {"dtype": "int4", "granularity": PerGroup(32), "scale_dtype": "float16"},
    "int8, groups of 32, float16 scales": {"granularity": PerGroup(32), "scale_dtype": "float16"},
    "int8, groups of 24": {"granularity": PerGroup(24)},
    "uint8 with zero points, groups of 24": {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(24)},
}
"""One of each kind that loops tell apart, and groups that are no whole vectors."""


def on(kind: str):
    """How the backend takes an array, its float32 products (M, K) x (N, K) and with (K, N), and ours in both modes."""
    ours = aqt_lite.linear, functools.partial(aqt_lite.linear, mode="reproducible")
    if kind == "torch":
        return torch.from_numpy, torch.nn.functional.linear, torch.matmul, *ours
    if kind == "jax":
        return jnp.asarray, *map(awaited, (lambda x, w: x @ w.T, jnp.matmul, *ours))
    if kind == "numpy alone":  # which has no products with the same bits of codes of 4 bits in a time to speak of
        return np.asarray, lambda x, w: x @ w.T, np.matmul, alone(ours[0]), None
    return np.asarray, lambda x, w: x @ w.T, np.matmul, *ours


def alone(function):
    """As where numba is not installed."""

    def quiet(*arguments):
        loops, runtime.compiled_loops = runtime.compiled_loops, lambda: None
        try:
            return function(*arguments)
        finally:
            runtime.compiled_loops = loops

    return quiet


def awaited(function):
    jitted = jax.jit(function)
    return lambda *arguments: run.wait(jitted(*arguments))


KINDS = ["numpy", "numpy alone", "torch", "jax"]
SIZES, ROWS_OF_X = [4096, 8192], [1, 8, 64, 512]


def rows(size: int, rows_of_x: list[int], chosen: dict, read: float, kinds: list[str]) -> list[dict]:
    rng, table = np.random.default_rng(run.SEED), []
    w = rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5)
    weights = {name: aqt_lite.quantize(w, **how) for name, how in chosen.items()}
    for m in rows_of_x:
        x = rng.standard_normal((m, size), dtype=np.float32)
        x[m // 2, 3] = 1e5  # an outlier, which no other row is to pay for
        wide = x.astype(np.float64)
        exact = {name: wide @ q.dequantize().astype(np.float64).T for name, q in weights.items()}
        exact["float32"] = wide @ w.astype(np.float64).T
        for kind in kinds:
            table += on_backend(kind, w, weights, x, exact, read)
    return table


def on_backend(kind: str, w, weights: dict, x, exact: dict, read: float) -> list[dict]:
    put, product, product_of_turned, linear, same_bits = on(kind)
    given, (m, size), table, library = put(x), x.shape, [], kind.split()[0]
    floats, turned = (run.rotating(lambda i, v=v: put(v.copy()), w.nbytes) for v in (w, w.T))
    candidates = {
        "float32": lambda i: product(given, floats[i % len(floats)]),
        "float32, (in, out)": lambda i: product_of_turned(given, turned[i % len(turned)]),
    }
    own = max(run.error(call(0), exact["float32"]) for call in candidates.values())
    measured = {}
    for name, q in weights.items():
        some = run.rotating(
            lambda i, q=q: run.copied(q) if library == "numpy" else q.to_backend(kind), q.nbytes, most=4
        )
        measured[name] = q
        candidates[name] = lambda i, some=some: linear(given, some[i % len(some)])
        if name in REPRODUCIBLE and same_bits:
            measured[again := f"{name}, reproducible"] = q
            candidates[again] = lambda i, some=some: same_bits(given, some[i % len(some)])
    for name in measured:
        assert run.error(candidates[name](0), exact[name.removesuffix(", reproducible")]) <= 2 * own, (kind, name, m)
    check_without_outlier(kind, w, weights, x)
    others = peers.of(kind, w, x) if kind == library and weights.keys() <= WEIGHTS.keys() else {}
    for name, peer in others.items():
        off = run.error(peer.call(0), x.astype(np.float64) @ peer.weight.T)
        print(f"  {kind:6} {size} M={m:<4} {name:40} error {off:.1e}, float32's {own:.1e}")
        assert off < (1e-5 if peer.exact else 0.1), name
        candidates[name] = peer.call
    found = run.take_turns(candidates, seconds=0, least=7)
    base = min(found[name]["ms"] for name in ("float32", "float32, (in, out)"))
    print(f"  {kind:6} {size} M={m:<4} {'float32':40} {base:8.2f} ms")
    for name, q in measured.items():
        ms = found[name]["ms"]
        share = q.nbytes / read / (ms * 1e-3)
        table.append({"backend": kind, "size": size, "m": m, "who": name, **found[name]})
        table[-1] |= {"float32_ms": base, "times_as_fast": base / ms, "read_share": share}
        print(f"  {kind:6} {size} M={m:<4} {name:40} {ms:8.2f} ms  {base / ms:5.2f}x  share {share:.2f}", flush=True)
    for name in others:
        ms = found[name]["ms"]
        table.append({"backend": kind, "size": size, "m": m, "who": name, **found[name]})
        table[-1] |= {"float32_ms": base, "times_as_fast": base / ms, "read_share": None}
        print(f"  {kind:6} {size} M={m:<4} {name:40} {ms:8.2f} ms  {base / ms:5.2f}x", flush=True)
    return table


IN_OUT = {
    "int8, one scale an output": {"granularity": PerChannel(1)},
    "int8, groups of 32": {"granularity": PerGroup(32, 0)},
    "uint8 with zero points, groups of 128": {"dtype": "uint8", "scheme": "affine", "granularity": PerGroup(128, 0)},
    "int4, groups of 32": {"dtype": "int4", "granularity": PerGroup(32, 0)},
    "uint4 with zero points, groups of 128": {"dtype": "uint4", "scheme": "affine", "granularity": PerGroup(128, 0)},
    "nf4, groups of 32": {"dtype": "nf4", "granularity": PerGroup(32, 0)},
    "float8_e4m3fn, one scale an output": {"dtype": "float8_e4m3fn", "granularity": PerChannel(1)},
    "int6, one scale an output": {"dtype": "int6", "granularity": PerChannel(1)},
    "int3, groups of 32": {"dtype": "int3", "granularity": PerGroup(32, 0)},
    "int4, groups of 32 along outputs": {"dtype": "int4", "granularity": PerGroup(32)},
}
"""Of weights that lie (in, out), along their inputs but for the last."""


class Detour(NamedTuple):
    """A product that may go other ways than most: reproducible, or with a weight whose codes no loop multiplies."""

    how: dict
    """Of quantizing it; ``dense`` reads it as (in, out)."""
    linear: bool = False
    mode: str = "reproducible"
    for_dense: bool = False


DETOURS = {
    "dense, reproducible: int8, one scale an output": Detour({"granularity": PerChannel(1)}),
    "dense, reproducible: int8, groups of 32": Detour({"granularity": PerGroup(32, 0)}),
    "dense, reproducible: int4, groups of 32": Detour({"dtype": "int4", "granularity": PerGroup(32, 0)}),
    "dense, reproducible: int8, groups of 32, float16 scales": Detour(
        {"granularity": PerGroup(32, 0), "scale_dtype": "float16"}
    ),
    "dense, reproducible: mxfp4": Detour({"dtype": "mxfp4", "granularity": PerGroup(32, 0)}),
    "dense, reproducible: nvfp4": Detour({"dtype": "nvfp4", "granularity": PerGroup(16, 0)}),
    "dense, reproducible: int8, a scale an input": Detour({"granularity": PerChannel(0)}),
    "dense, reproducible: int4, one scale an output": Detour({"dtype": "int4", "granularity": PerChannel(1)}),
    "dense, reproducible: int3, groups of 32": Detour({"dtype": "int3", "granularity": PerGroup(32, 0)}),
    "dense, reproducible, stored for it: int3, groups of 32": Detour(
        {"dtype": "int3", "granularity": PerGroup(32, 0)}, for_dense=True
    ),
    "linear, reproducible: int8, groups of 32, float16 scales": Detour(
        {"granularity": PerGroup(32), "scale_dtype": "float16"}, True
    ),
    "linear, reproducible: int4, one scale an output": Detour({"dtype": "int4", "granularity": PerChannel(0)}, True),
    "linear, reproducible: int3, groups of 32": Detour({"dtype": "int3", "granularity": PerGroup(32)}, True),
    "linear, reproducible: nvfp4": Detour({"dtype": "nvfp4"}, True),
    "linear, reproducible: mxint8": Detour({"dtype": "mxint8"}, True),
    "linear, reproducible: int4, groups of 1024": Detour({"dtype": "int4", "granularity": PerGroup(1024)}, True),
    "linear: int8, a scale an input": Detour({"granularity": PerChannel(1)}, True, "fast"),
    "linear: int4, groups of 32 along outputs": Detour({"dtype": "int4", "granularity": PerGroup(32, 0)}, True, "fast"),
    "dense, stored for it: mxfp4, along outputs": Detour({"dtype": "mxfp4"}, mode="fast", for_dense=True),
    "linear: int16, one scale an output": Detour({"dtype": "int16", "granularity": PerChannel(0)}, True, "fast"),
    "dense: int16, groups of 32": Detour({"dtype": "int16", "granularity": PerGroup(32, 0)}, mode="fast"),
}


def detours() -> list[dict]:
    rng, table, size = np.random.default_rng(run.SEED), [], 4096
    w = rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5)
    weights = {name: aqt_lite.quantize(w, **detour.how) for name, detour in DETOURS.items()}
    weights = {name: q.for_dense() if DETOURS[name].for_dense else q for name, q in weights.items()}
    ways = {
        name: functools.partial(aqt_lite.linear if detour.linear else aqt_lite.dense, mode=detour.mode)
        for name, detour in DETOURS.items()
    }
    for m in (1, 8, 64):
        x = rng.standard_normal((m, size), dtype=np.float32)
        wide = x.astype(np.float64)
        exact = {"float32": wide @ w.astype(np.float64)}
        for name, q in weights.items():
            values = q.dequantize().astype(np.float64)
            exact[name] = wide @ (values.T if DETOURS[name].linear else values)
        for kind in ("numpy", "torch", "jax"):
            table += of_weights(kind, w, weights, x, exact, ways)
    return table


def in_out() -> list[dict]:
    rng, table = np.random.default_rng(run.SEED), []
    for size, rows_of_x in ((4096, (1, 8, 64)), (8192, (1, 8))):
        w = rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5)
        weights = {name: aqt_lite.quantize(w, **how) for name, how in IN_OUT.items()}
        for m in rows_of_x:
            x = rng.standard_normal((m, size), dtype=np.float32)
            exact = {name: x.astype(np.float64) @ q.dequantize().astype(np.float64) for name, q in weights.items()}
            exact["float32"] = x.astype(np.float64) @ w.astype(np.float64)
            for kind in ("numpy", "torch", "jax"):
                table += of_weights(kind, w, weights, x, exact, dict.fromkeys(weights, aqt_lite.dense))
    return table


def of_weights(kind: str, w, weights: dict, x, exact: dict, ways: dict) -> list[dict]:
    """Times of products, each in a way of its own, and of the float32 product ``x @ w``."""
    put, product_of_turned, product, *_ = on(kind)
    given, (m, size), table = put(x), x.shape, []
    floats, turned = (run.rotating(lambda i, v=v: put(v.copy()), w.nbytes) for v in (w, w.T))
    candidates = {
        "float32": lambda i: product(given, floats[i % len(floats)]),
        "float32, (out, in)": lambda i: product_of_turned(given, turned[i % len(turned)]),
    }
    own = max(run.error(call(0), exact["float32"]) for call in candidates.values())
    for name, q in weights.items():
        some = run.rotating(lambda i, q=q: run.copied(q) if kind == "numpy" else q.to_backend(kind), q.nbytes, most=4)
        multiply = awaited(ways[name]) if kind == "jax" else ways[name]
        candidates[name] = lambda i, some=some, multiply=multiply: multiply(given, some[i % len(some)])
        assert run.error(candidates[name](0), exact[name]) <= 2 * own, (kind, name, m)
    found = run.take_turns(candidates, seconds=0, least=7)
    base = min(found[name]["ms"] for name in ("float32", "float32, (out, in)"))
    for name in weights:
        ms = found[name]["ms"]
        table.append({"backend": kind, "size": size, "m": m, "who": name, **found[name], "float32_ms": base})
        table[-1]["times_as_fast"] = base / ms
        print(f"  {kind:6} {size} M={m:<4} {name:48} {ms:8.2f} ms  {base / ms:5.2f}x", flush=True)
    return table


def check_without_outlier(kind: str, w, weights: dict, x) -> None:
    """What an outlier would hide: the same rows without it."""
    put, product, _, *ours = on(kind)
    x = np.clip(x, -100, 100)
    own = run.error(product(put(x), put(w)), x.astype(np.float64) @ w.astype(np.float64).T)
    for name, q in weights.items():
        exact = x.astype(np.float64) @ q.dequantize().astype(np.float64).T
        for linear in filter(None, ours[: 2 if name in REPRODUCIBLE else 1]):
            assert run.error(linear(put(x), q.to_backend(kind.split()[0])), exact) <= 2 * own, (kind, name, len(x))


SHAPES = {
    "tall and thin: 128,000 x 16, 96 outputs": (128_000, 16, 96),
    "MiniLM, 128 tokens: 384 to 1536": (128, 384, 1536),
    "MiniLM, 128 tokens: 1536 to 384": (128, 1536, 384),
    "1x1 convolution: 3136 x 64, 256 outputs": (3136, 64, 256),
    "attention head: 128 x 384, 32 outputs": (128, 384, 32),
}
"""Rows of x, inputs and outputs. None is to take more than 1.5 times as long as the float32 product: 0.67x."""


def shapes() -> list[dict]:
    rng, table = np.random.default_rng(run.SEED), []
    for shape, (m, inner, columns) in SHAPES.items():
        x = np.maximum(rng.standard_normal((m, inner), dtype=np.float32), 0)
        w = rng.standard_normal((columns, inner), dtype=np.float32)
        how = {"int8, per channel": {"granularity": PerChannel(0)}}
        how["int4, groups of 16"] = {"dtype": "int4", "granularity": PerGroup(16)}
        for kind in ("numpy", "torch", "jax"):
            put, product, _, linear, _ = on(kind)
            given, weight = put(x), put(w)
            candidates = {"float32": lambda i: product(given, weight)}  # noqa: B023 - called in this turn
            for name, kwargs in how.items():
                q = aqt_lite.quantize(w, **kwargs)
                exact, q = x.astype(np.float64) @ q.dequantize().astype(np.float64).T, q.to_backend(kind)
                candidates[name] = lambda i, q=q: linear(given, q)  # noqa: B023
                off = candidates[name](0)
                off = np.asarray(off).astype(np.float64) - exact
                assert np.sqrt(np.mean(off**2)) <= 1e-6 * np.sqrt(np.mean(exact**2)), (kind, name, shape)
            found = run.take_turns(candidates, seconds=0, least=7)
            for name in how:
                ratio = found["float32"]["ms"] / found[name]["ms"]
                table.append({"shape": shape, "backend": kind, "who": name, **found[name], "times_as_fast": ratio})
                print(f"  {kind:6} {shape:42} {name:20} {found[name]['ms']:8.2f} ms  {ratio:5.2f}x", flush=True)
    return table


def spliced(before: dict, found: list[dict]) -> dict:
    """Earlier results, with these rows in place of those of the same names."""

    def key(row: dict) -> tuple:
        return row["backend"], row["size"], row["m"], row["who"]

    new = {key(row) for row in found}
    return before | {"rows": [row for row in before["rows"] if key(row) not in new] + found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size and few formats, printed alone")
    parser.add_argument("--only", choices=KINDS, help="one backend's rows anew; the other results stay")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of square weights; other results stay")
    parser.add_argument("--shapes", action="store_true", help="those of real networks alone")
    parser.add_argument("--formats", action="store_true", help="the other formats alone, one row and 8, 4096²")
    parser.add_argument("--in-out", action="store_true", help="weights that lie (in, out) alone")
    parser.add_argument("--detours", action="store_true", help="what loops do not read as it lies alone")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS_OF_X, help="of x; other results stay")
    options = parser.parse_args()
    quick = options.quick
    parts = bool(options.only) or options.sizes != SIZES or options.rows != ROWS_OF_X
    alone = options.shapes or options.formats or options.in_out or options.detours
    if ((quick or alone) and parts) or (quick and alone):
        parser.error("--only, --sizes and --rows are for the main table, and --quick for nothing else beside it")
    torch.set_num_threads(cores())
    warnings.filterwarnings(
        "ignore", message=".* of w, which then has|.* reads w, which then has"
    )  # weights are square
    results: dict = {"machine": run.machine()}
    read = run.read_speed()
    results["read_gb_s"] = read / 1e9
    print(f"{results['machine']['processor']}; reads {read / 1e9:.1f} GB/s")
    chosen = {name: WEIGHTS[name] for name in list(WEIGHTS)[: 3 if quick else None]}
    sizes, rows_of_x = ([4096], [1, 8]) if quick else (options.sizes, options.rows)
    kinds = [options.only] if options.only else KINDS
    path = run.path_of("stored")
    if alone:
        before = {"read_gb_s": results["read_gb_s"], "rows": []} | run.earlier(path, results["machine"])
        if options.shapes:
            before["shapes"] = shapes()
        if options.formats:
            before["formats"] = rows(4096, [1, 8], OTHERS, read, ["numpy", "torch", "jax"])
        if options.in_out:
            before["in_out"] = in_out()
        if options.detours:
            before["detours"] = detours()
        path.write_text(json.dumps(before, indent=1) + "\n")
        return
    results["rows"] = [row for size in sizes for row in rows(size, rows_of_x, chosen, read, kinds)]
    if not quick:
        if parts:
            before = {"read_gb_s": results["read_gb_s"], "rows": []} | run.earlier(path, results["machine"])
            results = spliced(before, results["rows"])
        else:
            results["shapes"] = shapes()
            results["formats"] = rows(4096, [1, 8], OTHERS, read, ["numpy", "torch", "jax"])
            results["in_out"] = in_out()
            results["detours"] = detours()
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written: {path.relative_to(run.ROOT)}; tables: python benchmarks/tables.py --write")


if __name__ == "__main__":
    main()
