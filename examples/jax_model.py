"""A small JAX model with quantized weights: jit, a pytree of parameters, lax.scan over layers, and training.

    python examples/jax_model.py

The parameters are a tree of arrays. Quantizing puts QArrays in the place of the weights, and the same jitted function
runs it: no module system is needed, none is in the way.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import _digits
import jax
import jax.numpy as jnp
import numpy as np

import aqt_lite
from aqt_lite import PerChannel, QArray

LAYERS, WIDTH, CLASSES = 4, 64, 10
PER_OUTPUT = PerChannel(1)  # weights are (in, out), so every output has a scale


# ---- the model: in, LAYERS residual layers of one shape, out


def init(key: jax.Array) -> dict[str, Any]:
    keys = jax.random.split(key, 3)
    return {
        "first": {"w": 0.15 * jax.random.normal(keys[0], (WIDTH, WIDTH)), "b": jnp.zeros(WIDTH)},
        "layers": {"w": 0.08 * jax.random.normal(keys[1], (LAYERS, WIDTH, WIDTH)), "b": jnp.zeros((LAYERS, WIDTH))},
        "last": {"w": 0.15 * jax.random.normal(keys[2], (WIDTH, CLASSES)), "b": jnp.zeros(CLASSES)},
    }


def affine(x: jax.Array, layer: dict[str, Any]) -> jax.Array:
    if isinstance(layer["w"], QArray):
        return aqt_lite.dense(x, layer["w"], layer["b"])
    return x @ layer["w"] + layer["b"]


@jax.jit
def predict(params: dict[str, Any], images: jax.Array) -> jax.Array:
    """Logits. The weights may be arrays or QArrays."""

    def residual(x: jax.Array, layer: dict[str, Any]) -> tuple[jax.Array, None]:
        return x + jax.nn.relu(affine(x, layer)), None

    x = jax.nn.relu(affine(images, params["first"]))
    x, _ = jax.lax.scan(residual, x, params["layers"])  # slices the QArray's codes and scales layer by layer
    return affine(x, params["last"])


# ---- quantization of the tree


def scale_of(w: jax.Array, codes: int) -> jax.Array:
    """The scale of every output for which the codes run from -codes to codes."""
    return jnp.maximum(jnp.max(jnp.abs(w), axis=0), 1e-6) / codes


def map_weights(function: Any, params: dict[str, Any]) -> dict[str, Any]:
    """``function`` over every (in, out) weight; over the stacked ones with vmap."""
    return {
        name: {"w": (jax.vmap(function) if layer["w"].ndim == 3 else function)(layer["w"]), "b": layer["b"]}
        for name, layer in params.items()
    }


@partial(jax.jit, static_argnames="codes")
def quantized(params: dict[str, Any], codes: int = 127) -> dict[str, Any]:
    """QArrays for weights, with the codes -codes to codes of int8."""
    return map_weights(
        lambda w: aqt_lite.quantize(w, granularity=PER_OUTPUT, scale=scale_of(w, codes)),
        params,
    )


def fake_quantized(params: dict[str, Any], codes: int) -> dict[str, Any]:
    """The values that :func:`quantized` stands for, through which gradients flow to ``params``."""
    return map_weights(
        lambda w: aqt_lite.fake_quantize(w, granularity=PER_OUTPUT, scale=jax.lax.stop_gradient(scale_of(w, codes))),
        params,
    )


# ---- training, with or without quantization in the loop


def loss(params: dict[str, Any], images: jax.Array, labels: jax.Array, codes: int | None) -> jax.Array:
    logits = predict(params if codes is None else fake_quantized(params, codes), images)
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


@partial(jax.jit, static_argnames=("codes", "epochs"))
def train(
    params: dict[str, Any], images: jax.Array, labels: jax.Array, rate: float, codes: int | None, epochs: int
) -> dict[str, Any]:
    """Gradient descent with momentum over batches of 32, all of it one compiled loop."""
    batches = len(labels) // 32

    def step(state: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, speed = state
        gradient = jax.grad(loss)(params, images[rows], labels[rows], codes)
        speed = jax.tree.map(lambda s, g: 0.9 * s - rate * g, speed, gradient)
        return (jax.tree.map(jnp.add, params, speed), speed), None

    def epoch(state: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        order = jax.random.permutation(key, len(labels))[: batches * 32]
        return jax.lax.scan(step, state, order.reshape(batches, 32))

    start = (params, jax.tree.map(jnp.zeros_like, params))
    (params, _), _ = jax.lax.scan(epoch, start, jax.random.split(jax.random.key(2), epochs))
    return params


# ---- the story


def weight_bytes(params: dict[str, Any]) -> int:
    return sum(layer["w"].nbytes for layer in params.values())


def main() -> None:
    digits = _digits.load()
    images, labels = jnp.asarray(digits.train_images), jnp.asarray(digits.train_labels)
    test = jnp.asarray(digits.test_images)

    print(f"{'weights':<46}{'accuracy':>9}{'bytes':>8}")

    def row(name: str, params: dict[str, Any]) -> float:
        accuracy = _digits.accuracy(np.asarray(predict(params, test)), digits.test_labels)
        print(f"{name:<46}{accuracy:>9.2%}{weight_bytes(params):>8}")
        return accuracy

    params = train(init(jax.random.key(0)), images, labels, 0.03, codes=None, epochs=20)
    row("float32", params)
    row("int8, a scale per output", quantized(params))

    # Three codes of the 255, as a ternary format has them (stored as int8 all the same). This is where training with
    # quantization pays.
    few = 1
    rounded = row(f"{2 * few + 1} codes of int8, rounded after training", quantized(params, codes=few))
    tuned = train(params, images, labels, 0.01, codes=few, epochs=20)
    adapted = row(f"{2 * few + 1} codes of int8, fine-tuned in training", quantized(tuned, codes=few))
    print(f"\nTraining through fake_quantize won back {adapted - rounded:.1%} of the test images.")

    same = jax.tree.map(
        lambda fake, real: bool((fake == real).all()),
        fake_quantized(tuned, few),
        map_weights(lambda q: q.dequantize(), quantized(tuned, codes=few)),
    )
    print("What was trained is what is deployed:", "yes" if all(jax.tree.leaves(same)) else "NO")


if __name__ == "__main__":
    main()
