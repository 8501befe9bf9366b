"""The library in one minute: one matrix, then one network, on every framework installed here, with the same bits.

    python examples/demo.py [folder for the pictures, by default out]

Ends with exit status 1 if a single bit differs between two frameworks.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import _digits
import numpy as np
from array_api_compat import array_namespace

import aqt_lite
from aqt_lite import PerChannel, PerGroup, PerTensor, QArray
from aqt_lite.plots import plot_matrix, plot_quantization
from aqt_lite.testing import mismatches

# ---- the frameworks


@dataclass(frozen=True)
class Framework:
    """One way to run the same code: how arrays get there, and what compiles a function."""

    name: str
    backend: str
    asarray: Callable[[np.ndarray], Any]
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda function: function


def installed_frameworks() -> list[Framework]:
    """NumPy first: it is what the others are compared with."""
    found = [Framework("NumPy", "numpy", np.asarray)]
    state = aqt_lite.available_backends()
    if state["array_api_strict"] == "installed":
        import array_api_strict

        found.append(Framework("array-api-strict", "array_api_strict", array_api_strict.asarray))
    if state["torch"] == "installed":
        import torch

        found.append(Framework("torch", "torch", torch.asarray))
    if state["jax"] == "installed":
        import jax
        import jax.numpy as jnp

        found.append(Framework("JAX", "jax", jnp.asarray))
        found.append(Framework("JAX jit", "jax", jnp.asarray, jax.jit))
    return found


def print_frameworks(frameworks: list[Framework]) -> None:
    packages = {"numpy": "numpy", "array_api_strict": "array-api-strict", "torch": "torch", "jax": "jax"}
    here = {f.backend for f in frameworks}
    print("Runs on:", ", ".join(f"{packages[b]} {version(packages[b])}" for b in packages if b in here))
    for backend, state in aqt_lite.available_backends().items():
        if backend in packages and backend not in here:
            print(f"Left out: {backend}, {state}")
    if len(frameworks) == 1:
        print("With NumPy alone there is nothing to compare its bits with.")


# ---- 1. one matrix

X = np.asarray([[191.6, -13.5, 728.6], [92.14, 295.5, -184], [0, 684.6, 245.5]], np.float32)
WEIGHTS = np.asarray([[-2, -1.13, 0.42], [-1.51, 0.25, 1.62], [0.23, 1.35, 2.15]], np.float32)
INPUTS = np.asarray([1, 2, 3], np.float32)

WALK: list[tuple[str, dict[str, Any], str]] = [
    (
        "scale 3.5 and zero point -70, given",
        {"scale": 3.5, "zero_point": -70, "on_clip": "saturate"},
        "The largest code stands for 689.5, so 728.6 is clipped.",
    ),
    ("affine", {"scheme": "affine"}, "Scale and zero point from the range of the values: nothing is clipped."),
    ("symmetric", {}, "Zero has code 0, and no zero point is needed."),
    (
        "symmetric, a scale per row",
        {"granularity": PerChannel(0)},
        "A row of small values has small steps, and the largest value of each row is met.",
    ),
    ("symmetric, a scale per column", {"granularity": PerChannel(1)}, "The same along the other axis."),
    (
        "symmetric, a scale per group of 2",
        {"granularity": PerGroup(2)},
        "Rows of 3 make a group of 2 and a last group of 1: lengths need not divide.",
    ),
]


def walk(frameworks: list[Framework]) -> dict[str, list[int]]:
    """Every case on every framework; prints NumPy's numbers and returns how many values differ from them."""
    heading("1. One matrix")
    print("A 3 x 3 matrix becomes 8-bit codes and a scale (and zero point); each code stands for")
    print("(code - zero point) * scale. What that loses is the error.\n")
    print("x =", *numbers(X, "9.2f"), sep="\n")

    differing: dict[str, list[int]] = {}
    for name, arguments, note in WALK:

        def quantized(x: Any, arguments: dict[str, Any] = arguments) -> tuple[QArray, Any]:
            q = aqt_lite.quantize(x, **arguments)
            return q, q.dequantize()

        results = [f.compiled(quantized)(f.asarray(X)) for f in frameworks]
        print_case(name, arguments, note, results[0][0])
        differing[name] = [count(result, results[0]) for result in results]

    def product(x: Any, w: QArray) -> Any:
        return aqt_lite.linear(x, w, mode="reproducible")

    w = aqt_lite.quantize(WEIGHTS, granularity=PerChannel(0))
    results = [f.compiled(product)(f.asarray(INPUTS), w.to_backend(f.backend)) for f in frameworks]
    name = "linear: float32 inputs, int8 weights"
    print(f"\n{name}")
    print(f"  aqt_lite.linear(x, w, mode='reproducible') of {INPUTS} and 3 x 3 weights, a scale per row")
    print(f"  with int8 weights  {text(results[0], '9.4f')}")
    print(f"  in float32         {text(INPUTS @ WEIGHTS.T, '9.4f')}")
    differing[name] = [mismatches(result, results[0]) for result in results]

    print("\nThe same calls on every framework. Values whose bits differ from NumPy's")
    print("(codes, scales, zero points, dequantized values, products):\n")
    print_differences(frameworks, differing)
    return differing


def print_case(name: str, arguments: dict[str, Any], note: str, q: QArray) -> None:
    values = q.dequantize()
    call = ", ".join(["x", *(f"{key}={value!r}" for key, value in arguments.items())])
    print(f"\n{name}\n  aqt_lite.quantize({call})\n  {note}")
    print(f"  {'codes':<18}   {'dequantized':<27}   error")
    blocks = zip(numbers(q.qvalue, "5d"), numbers(values, "8.2f"), numbers(X - values, "7.2f"), strict=True)
    for codes, dequantized, error in blocks:
        print(f"  {codes:<18}   {dequantized:<27}  {error}")
    zero_point = "" if q.zero_point is None else f", zero point {text(q.zero_point, 'd')}"
    report = aqt_lite.error_report(X, q)
    error = f"mean squared error {report.mse:.3f}, SQNR {report.sqnr_db:.1f} dB"
    print(f"  scale {text(q.scale, '.4f')}{zero_point}; {error}")


# ---- 2. one network

PRECISIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8, one scale per tensor": ("int8", {"granularity": PerTensor()}),
    "int8, a scale per output": ("int8", {"granularity": PerChannel(0)}),
    "int8, a scale per 32 weights": ("int8", {"granularity": PerGroup(32)}),
    "int4, a scale per output": ("int4", {"granularity": PerChannel(0)}),
    "int4, a float16 scale per 32": ("int4", {"granularity": PerGroup(32), "scale_dtype": "float16"}),
    "nf4, a float16 scale per 32": ("nf4", {"granularity": PerGroup(32), "scale_dtype": "float16"}),
    "mxfp4, a power of two per 32": ("mxfp4", {}),
}


def network(images: Any, layers: list[tuple[QArray, Any]]) -> Any:
    """Logits, in whatever framework ``images`` and the layers live."""
    mode = "fast" if layers[0][0].dtype == "nf4" else "reproducible"  # whose numbers are no whole multiples
    xp = array_namespace(images)
    x = images
    for i, (weight, bias) in enumerate(layers):
        if i:
            x = xp.where(x > 0, x, xp.zeros_like(x))
        x = aqt_lite.linear(x, weight, bias, mode=mode)
    return x


def networks(images: Any, each: list[list[tuple[QArray, Any]]]) -> list[Any]:
    """The logits of several, so that a compiler has one function to compile."""
    return [network(images, layers) for layers in each]


def float_network(images: Any, layers: list[tuple[Any, Any]]) -> Any:
    """The same in float32, with the framework's own matrix product."""
    xp = array_namespace(images)
    x = images
    for i, (weight, bias) in enumerate(layers):
        if i:
            x = xp.where(x > 0, x, xp.zeros_like(x))
        x = x @ weight.T + bias
    return x


def classify(frameworks: list[Framework], folder: Path) -> dict[str, list[int]]:
    """Trains, quantizes, runs and draws; returns how many logits differ from NumPy's."""
    heading("2. A network that reads digits")
    digits = _digits.load()
    start = time.perf_counter()
    model = _digits.train(digits)
    seconds = time.perf_counter() - start
    print("64 inputs, 64 hidden units, 10 classes, trained in float32 with plain NumPy on")
    print(
        f"{len(digits.train_labels)} images of handwritten digits in {seconds:.1f} s. "
        "Its weights then take 8 or 4 bits."
    )
    print(f"How it reads the {len(digits.test_labels)} images that it has never seen:\n")

    expected = model.logits(digits.test_images)
    weights, biases = (model.weight1, model.weight2), (model.bias1, model.bias2)
    size = sum(w.nbytes for w in weights)
    print(f"  {'weights':<30}{'accuracy':>9}{'changed':>9}{'SQNR of the layers':>21}{'bytes':>7}{'smaller':>9}")
    print(f"  {'float32':<30}{_digits.accuracy(expected, digits.test_labels):>9.2%}{'':>30}{size:>7}")
    differing: dict[str, list[int]] = {}
    no_promise: dict[str, list[int]] = {}
    on_each = []  # framework: for every precision, its quantized weights and its logits
    for f in frameworks:
        qs = [[aqt_lite.quantize(f.asarray(w), t, **options) for w in weights] for t, options in PRECISIONS.values()]
        layers = [[(q, f.asarray(b)) for q, b in zip(pair, biases, strict=True)] for pair in qs]
        on_each.append((qs, f.compiled(networks)(f.asarray(digits.test_images), layers)))
    for i, (name, (dtype, _)) in enumerate(PRECISIONS.items()):
        of_each, results = [qs[i] for qs, _ in on_each], [logits[i] for _, logits in on_each]
        logits, quantized = results[0], of_each[0]
        reports = [aqt_lite.error_report(w, q) for w, q in zip(weights, quantized, strict=True)]
        changed = int((logits.argmax(1) != expected.argmax(1)).sum())
        sqnr = " ".join(f"{report.sqnr_db:6.2f} dB" for report in reports)
        small = sum(report.nbytes for report in reports)
        print(
            f"  {name:<30}{_digits.accuracy(logits, digits.test_labels):>9.2%}{changed:>9}{sqnr:>21}"
            f"{small:>7}{size / small:>8.2f}x"
        )
        logits_differing = [mismatches(result, logits) for result in results]
        if dtype == "nf4":  # its products are sums of floats, but its weights have the same bits
            no_promise[f"{dtype}, logits, for comparison"] = logits_differing
            values = [[q.dequantize() for q in qs] for qs in of_each]
            differing[f"{dtype}, weights"] = [sum(map(mismatches, v, values[0])) for v in values]
        else:
            differing[name] = logits_differing
    print("\n  changed: images that are now read as another digit. SQNR: signal to quantization noise.")

    plain = []
    for f in frameworks:
        layers = [(f.asarray(w), f.asarray(b)) for w, b in zip(weights, biases, strict=True)]
        plain.append(f.compiled(float_network)(f.asarray(digits.test_images), layers))
    print(f"\nThe {expected.size} logits on every framework. Logits whose bits differ from NumPy's:\n")
    no_promise["float32, for comparison"] = [mismatches(y, plain[0]) for y in plain]
    print_differences(frameworks, differing, no_promise)
    draw(folder, digits, model, expected)
    return differing


def draw(folder: Path, digits: _digits.Digits, model: _digits.Network, expected: np.ndarray) -> None:
    """The matrix, a layer's weights, and images with what the two networks read in them."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    plot_quantization(X, aqt_lite.quantize(X, granularity=PerChannel(0))).savefig(folder / "matrix.png", dpi=120)
    layers = [aqt_lite.quantize(w, granularity=PerChannel(0)) for w in (model.weight1, model.weight2)]
    plot_quantization(model.weight1, layers[0]).savefig(folder / "digits.png", dpi=120)

    logits = network(digits.test_images, list(zip(layers, (model.bias1, model.bias2), strict=True)))
    read, label = logits.argmax(1), digits.test_labels
    is_label = np.arange(10) == label[:, None]
    lead = logits[is_label] - np.where(is_label, -np.inf, logits).max(1)  # below zero where the digit is misread
    hard = np.argsort(lead, kind="stable")[:10]
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    figure.suptitle("The images that are hardest for the network, and what it reads in float32 and in int8")
    for panel, i in enumerate(hard):
        ax = figure.add_subplot(2, 5, panel + 1)
        ax.set_axis_off()
        title = f"is {label[i]}, float32 {expected[i].argmax()}, int8 {read[i]}"
        plot_matrix(digits.test_images[i].reshape(8, 8), title, ax=ax, fmt=None)
    figure.savefig(folder / "predictions.png", dpi=120)


# ---- printing


def heading(title: str) -> None:
    print(f"\n{title}\n{'=' * len(title)}\n")


def numbers(matrix: Any, fmt: str) -> list[str]:
    return [" ".join(format(value, fmt) for value in row) for row in np.asarray(matrix).tolist()]


def text(array: Any, fmt: str) -> str:
    return " ".join(format(value, fmt) for value in np.asarray(array).ravel().tolist())


def count(actual: tuple[QArray, Any], expected: tuple[QArray, Any]) -> int:
    """Values of different bits among codes, scales, zero points and dequantized values."""
    (q, values), (q0, values0) = actual, expected
    pairs = [(q.qvalue, q0.qvalue), (q.scale, q0.scale), (values, values0)]
    if q0.zero_point is not None:
        pairs.append((q.zero_point, q0.zero_point))
    return sum(mismatches(a, e) for a, e in pairs)


def print_differences(
    frameworks: list[Framework], differing: dict[str, list[int]], comparison: dict[str, list[int]] | None = None
) -> None:
    """A table with a row for each case. Those of ``comparison`` promise nothing and do not count."""
    others = [(i, f.name, max(len(f.name), 5) + 2) for i, f in enumerate(frameworks) if i]
    if not others:
        print("  nothing to compare with")
        return
    print(f"  {'':<36}" + "".join(f"{name:>{width}}" for _, name, width in others))
    for case, counts in ((comparison or {}) | differing).items():
        print(f"  {case:<36}" + "".join(f"{counts[i]:>{width}}" for i, _, width in others))
    print(f"\n  same bits: {'yes' if not total(differing) else 'NO'}")


def total(differing: dict[str, list[int]]) -> int:
    return sum(map(sum, differing.values()))


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    start = time.perf_counter()
    print(f"aqt_lite {aqt_lite.__version__}: quantization written once, the same bits everywhere.")
    frameworks = installed_frameworks()
    print_frameworks(frameworks)
    wrong = total(walk(frameworks)) + total(classify(frameworks, folder))

    heading("3. Pictures")
    for name, what in [
        ("matrix.png", "the matrix of part 1: original, codes, dequantized, error"),
        ("digits.png", "the network's first layer, the same way"),
        ("predictions.png", "the hardest images, as float32 and int8 read them"),
    ]:
        print(f"  {folder / name}: {what}")
    print(
        f"\nDone in {time.perf_counter() - start:.0f} s." + (f" {wrong} values differ: that is a bug." if wrong else "")
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
