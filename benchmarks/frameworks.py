"""A step of each framework with quantized layers, against the same products called one after the other.

    python benchmarks/frameworks.py                        three minutes; written to benchmarks/frameworks.json
    python benchmarks/frameworks.py --part jax 4 1 4096    one library, width, number of rows and size alone
    python benchmarks/frameworks.py --quick                smaller layers, nothing written: does it run here?

A step is four Linear layers of 4096 x 4096, compiled by the framework's own means; beside it stand four calls of
``aqt_lite.linear``, compiled as well in JAX and plain in torch, with the same codes. "of linear" is how many times as
long a step takes: 1.00 is no cost at all, and 1.10 is what is promised. Layers of 64 x 64 show what a call costs whose
products take no time. Candidates of one row take turns. The table is written into docs/models.md by ``tables.py``.
"""

from __future__ import annotations

import argparse
import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import run
import torch
from flax import linen, nnx

import aqt_lite
import aqt_lite.equinox
import aqt_lite.linen
import aqt_lite.nnx
import aqt_lite.torch
from aqt_lite import PerGroup, QArray
from aqt_lite.backends.cpu.runtime import cores

LAYERS = 4
WEIGHTS = {
    8: ("int8, a scale per output", {}),
    4: ("int4, groups of 32", {"dtype": "int4", "granularity": PerGroup(32)}),
}
PATH = run.ROOT / "benchmarks" / "frameworks.json"


def in_a_row(x, weights: list[QArray]):
    for w in weights:
        x = aqt_lite.linear(x, w)
    return x


# ---- the same layers in each framework: weights (out, in) in, a function of x out


def of_nnx(weights: list[np.ndarray], how: dict) -> dict:
    def layer(w: np.ndarray) -> nnx.Linear:
        sizes = {"in_features": w.shape[1], "out_features": w.shape[0]}
        return nnx.Linear(**sizes, use_bias=False, kernel_init=lambda *_: jnp.asarray(w.T), rngs=nnx.Rngs(0))

    model = aqt_lite.nnx.quantize_(nnx.Sequential(*map(layer, weights)), [("*", how)])
    graph, state = nnx.split(model)
    return {
        "Flax NNX, split and jax.jit": functools.partial(jax.jit(lambda state, x: nnx.merge(graph, state)(x)), state),
        "Flax NNX, nnx.jit without graph updates": functools.partial(
            nnx.jit(lambda model, x: model(x), graph_updates=False), model
        ),
        "Flax NNX, nnx.jit": functools.partial(nnx.jit(lambda model, x: model(x)), nnx.clone(model)),
    }


def of_linen(weights: list[np.ndarray], how: dict) -> dict:
    model = linen.Sequential([linen.Dense(len(w), use_bias=False) for w in weights])
    params = {f"layers_{i}": {"kernel": jnp.asarray(w.T)} for i, w in enumerate(weights)}
    x = jax.ShapeDtypeStruct((1, weights[0].shape[1]), jnp.float32)
    small = aqt_lite.linen.quantize(model, {"params": params}, x, rules=[("*", how)])
    return {"Flax Linen": functools.partial(jax.jit(aqt_lite.linen.with_quantized_layers(model.apply)), small)}


def of_equinox(weights: list[np.ndarray], how: dict) -> dict:
    def layer(w: np.ndarray) -> eqx.nn.Linear:
        made = eqx.filter_eval_shape(
            lambda: eqx.nn.Linear(w.shape[1], w.shape[0], use_bias=False, key=jax.random.key(0))
        )
        return eqx.tree_at(lambda m: m.weight, made, jnp.asarray(w))

    model = aqt_lite.equinox.quantize(eqx.nn.Sequential([*map(layer, weights)]), [("*", how)])
    arrays, rest = eqx.partition(model, eqx.is_array)
    step = jax.jit(lambda arrays, x: jax.vmap(eqx.combine(arrays, rest))(x))
    return {
        "Equinox, partition and jax.jit": functools.partial(step, arrays),
        "Equinox, filter_jit": functools.partial(eqx.filter_jit(lambda model, x: jax.vmap(model)(x)), model),
    }


def of_torch(weights: list[np.ndarray], how: dict) -> dict:
    model = torch.nn.Sequential(*(torch.nn.Linear(*w.shape[::-1], bias=False) for w in weights))
    for layer, w in zip(model, weights, strict=True):
        layer.weight.data = torch.from_numpy(w)
    step = torch.compile(aqt_lite.torch.quantize_(model, [("*", how)]), fullgraph=True)

    def unguarded(x):  # as torch has it for programs that do not change any more
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            return step(x)

    return {"torch.compile": step, "torch.compile, guards skipped": unguarded}


def rows(library: str, bits: int, m: int, size: int) -> list[dict]:
    rng = np.random.default_rng(run.SEED)
    weights = [rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5) for _ in range(LAYERS)]
    kind, how = WEIGHTS[bits]
    quantized = [aqt_lite.quantize(w, **({"granularity": aqt_lite.PerChannel(0)} | how)) for w in weights]
    steps = of_library(library, weights, how, [q.to_backend(library) for q in quantized])
    x = rng.standard_normal((m, size), dtype=np.float32)
    exact = functools.reduce(lambda y, q: y @ q.dequantize().astype(np.float64).T, quantized, x.astype(float))
    put = jnp.asarray(x) if library == "jax" else torch.from_numpy(x)
    candidates = {who: lambda _, step=step: run.wait(step(put)) for who, step in steps.items()}
    for who, call in candidates.items():
        assert run.error(call(0), exact) < 1e-5, (library, who, m, kind)
    table = []
    for who, its in run.take_turns(candidates, seconds=2.5, least=9).items():
        row = {"library": library, "bits": bits, "kind": kind, "m": m, "size": size, "who": who, **its}
        table.append({**row, "of_linear": its["ms"] / (table[0]["ms"] if table else its["ms"])})
        told(table[-1])
    return table


def of_library(library: str, weights: list[np.ndarray], how: dict, quantized: list[QArray]) -> dict:
    """The steps of the library, and the plain products, each a function of x."""
    if library == "jax":
        plain = functools.partial(jax.jit(lambda weights, x: in_a_row(x, weights)), quantized)
        return {"linear": plain, **of_nnx(weights, how), **of_linen(weights, how), **of_equinox(weights, how)}
    plain = functools.partial(in_a_row, weights=quantized)
    compiled = torch.compile(lambda x: in_a_row(x, quantized), fullgraph=True)
    return {"linear": plain, "linear, torch.compile": compiled, **of_torch(weights, how)}


def told(row: dict) -> None:
    spread = f"{row['low']:.2f} to {row['high']:.2f}"
    print(
        f"  {row['library']:6}{row['size']:<5}M={row['m']:<4}{row['kind']:26}{row['who']:40}{row['ms']:8.2f} ms"
        f" ({spread:>16})  {row['of_linear']:5.2f} of linear",
        flush=True,
    )


def part_of(row: dict) -> tuple[str, int, int, int]:
    return row["library"], row["bits"], row["m"], row["size"]


def written(new: list[dict]) -> None:
    """``new`` in the file, in the place of what was measured of the same parts."""
    known = json.loads(PATH.read_text())["rows"] if PATH.exists() else []
    parts = {part_of(row) for row in new}
    kept = [row for row in known if part_of(row) not in parts]
    found = sorted(kept + new, key=lambda row: (row["library"], -row["size"], -row["bits"], row["m"]))
    PATH.write_text(json.dumps({"machine": run.machine(), "rows": found}, indent=1) + "\n")
    print(f"written: {PATH.relative_to(run.ROOT)}; tables: python benchmarks/tables.py --write")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--part", nargs=4, metavar=("LIBRARY", "BITS", "ROWS", "SIZE"), help="jax 8 1 4096, for instance"
    )
    given = parser.parse_args()
    size = 512 if given.quick else 4096
    kinds = [*((bits, m, size) for bits in WEIGHTS for m in (1, 8)), (8, 1, 64)]
    parts = [(library, *kind) for library in ("jax", "torch") for kind in kinds]
    if given.part:
        parts = [part for part in parts if [*map(str, part)] == given.part]
    if not parts:
        parser.error(f"--part {' '.join(given.part)} is none of those that are measured")
    torch.set_num_threads(cores())
    print(f"{run.machine()['processor']}; {LAYERS} layers a step, milliseconds a step")
    with torch.no_grad():
        new = [row for part in parts for row in rows(*part)]
    if not given.quick:
        written(new)


if __name__ == "__main__":
    main()
