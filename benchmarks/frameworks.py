"""A step of each framework with quantized layers, against the same products called one after the other.

    python benchmarks/frameworks.py            under two minutes; nothing is written
    python benchmarks/frameworks.py --quick    smaller layers, to see whether it runs

A step is four Linear layers of 4096 x 4096, compiled by the framework's own means; beside it stand four calls of
``aqt_lite.linear``, compiled as well in JAX and plain in torch, with the same codes. "of linear" is how many times as
long a step takes: 1.00 is no cost at all, and 1.10 is what is promised. Candidates of one row take turns.
"""

from __future__ import annotations

import argparse
import functools

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
    "int8, a scale per output": {},
    "int4, groups of 32": {"dtype": "int4", "granularity": PerGroup(32)},
}


def in_a_row(x, weights: list[QArray]):
    for w in weights:
        x = aqt_lite.linear(x, w)
    return x


# ---- the same layers in each framework: weights (out, in) in, a function of x out


def of_nnx(weights: list[np.ndarray], how: dict):
    def layer(w: np.ndarray) -> nnx.Linear:
        sizes = {"in_features": w.shape[1], "out_features": w.shape[0]}
        return nnx.Linear(**sizes, use_bias=False, kernel_init=lambda *_: jnp.asarray(w.T), rngs=nnx.Rngs(0))

    model = aqt_lite.nnx.quantize_(nnx.Sequential(*map(layer, weights)), [("*", how)])
    graph, state = nnx.split(model)  # nnx.jit returns all variables, too, as copies
    return functools.partial(jax.jit(lambda state, x: nnx.merge(graph, state)(x)), state)


def of_linen(weights: list[np.ndarray], how: dict):
    model = linen.Sequential([linen.Dense(len(w), use_bias=False) for w in weights])
    params = {f"layers_{i}": {"kernel": jnp.asarray(w.T)} for i, w in enumerate(weights)}
    x = jax.ShapeDtypeStruct((1, weights[0].shape[1]), jnp.float32)
    small = aqt_lite.linen.quantize(model, {"params": params}, x, rules=[("*", how)])
    return functools.partial(jax.jit(aqt_lite.linen.with_quantized_layers(model.apply)), small)


def of_equinox(weights: list[np.ndarray], how: dict):
    def layer(w: np.ndarray) -> eqx.nn.Linear:
        made = eqx.filter_eval_shape(
            lambda: eqx.nn.Linear(w.shape[1], w.shape[0], use_bias=False, key=jax.random.key(0))
        )
        return eqx.tree_at(lambda m: m.weight, made, jnp.asarray(w))

    model = aqt_lite.equinox.quantize(eqx.nn.Sequential([*map(layer, weights)]), [("*", how)])
    return functools.partial(eqx.filter_jit(lambda model, x: jax.vmap(model)(x)), model)


def of_torch(weights: list[np.ndarray], how: dict):
    model = torch.nn.Sequential(*(torch.nn.Linear(*w.shape[::-1], bias=False) for w in weights))
    for layer, w in zip(model, weights, strict=True):
        layer.weight.data = torch.from_numpy(w)
    return torch.compile(aqt_lite.torch.quantize_(model, [("*", how)]), fullgraph=True)


STEPS = {"Flax NNX": of_nnx, "Flax Linen": of_linen, "Equinox": of_equinox}


def rows(size: int, rows_of_x: list[int]) -> None:
    rng = np.random.default_rng(run.SEED)
    weights = [rng.standard_normal((size, size), dtype=np.float32) / np.float32(size**0.5) for _ in range(LAYERS)]
    for kind, how in WEIGHTS.items():
        quantized = [aqt_lite.quantize(w, **({"granularity": aqt_lite.PerChannel(0)} | how)) for w in weights]
        steps = {name: make(weights, how) for name, make in STEPS.items()}
        torch._dynamo.reset()
        compiled = of_torch(weights, how)
        chained = functools.partial(jax.jit(lambda weights, x: in_a_row(x, weights)), move(quantized, "jax"))
        in_torch = move(quantized, "torch")
        for m in rows_of_x:
            x = rng.standard_normal((m, size), dtype=np.float32)
            of_jax, tensor = jnp.asarray(x), torch.from_numpy(x)
            exact = functools.reduce(lambda y, q: y @ q.dequantize().astype(np.float64).T, quantized, x.astype(float))

            def awaited(function, x=of_jax):
                return lambda _: run.wait(function(x))

            on_jax = {"linear": awaited(chained), **{name: awaited(step) for name, step in steps.items()}}
            on_torch = {
                "linear": lambda _, x=tensor, weights=in_torch: in_a_row(x, weights),
                "torch, compiled": lambda _, x=tensor, step=compiled: step(x),
            }
            for library, candidates in (("jax", on_jax), ("torch", on_torch)):
                told(library, size, m, kind, candidates, exact)


def move(weights: list[QArray], library: str) -> list[QArray]:
    return [q.to_backend(library) for q in weights]


def told(library: str, size: int, m: int, kind: str, candidates: dict, exact: np.ndarray) -> None:
    for name, call in candidates.items():
        assert run.error(call(0), exact) < 1e-5, (library, name, m, kind)
    found = run.take_turns(candidates, seconds=0, least=9)
    base = found["linear"]["ms"]
    for name, its in found.items():
        spread = f"{its['low']:.2f} to {its['high']:.2f}"
        print(
            f"  {library:6}{size} M={m:<4}{kind:26}{name:17}{its['ms']:8.2f} ms ({spread:>16})"
            f"  {its['ms'] / base:5.2f} of linear",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(cores())
    said = run.machine()
    print(f"{said['processor']}; {LAYERS} layers a step, milliseconds a step")
    with torch.no_grad():
        rows(512 if quick else 4096, [1, 8])


if __name__ == "__main__":
    main()
