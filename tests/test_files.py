"""Files: every bit comes back, whoever wrote and whoever reads; what is no such file is refused, by its name."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from optional import jax, needs, torch
from oracles import files as oracle
from trees import FOR_EVERY_LIBRARY, KINDS, SEVEN, SUFFIXES, X, double_quantized, either, hugging_face, moved, same

import aqt_lite
from aqt_lite import PerChannel, PerGroup, QArray, load, quantize, save
from aqt_lite._registry import get_backend
from aqt_lite._stored import DTYPES, numpy_dtype
from aqt_lite.formats import FORMATS
from aqt_lite.testing import assert_same_bits

# ---- every bit comes back


@either
@pytest.mark.parametrize("dtype", FORMATS)
def test_every_format(dtype, suffix, tmp_path):
    path = tmp_path / f"q{suffix}"
    for how in ({}, {"granularity": PerGroup(5)}, {"granularity": PerGroup(16, axis=0), "scale_dtype": "bfloat16"}):
        packed = quantize(X, dtype, **how)
        for q in (packed, packed.unpacked(), packed.for_dense()):
            save(path, {"q": q})
            same(load(path), {"q": q})


@either
def test_the_same_bytes_from_every_library(backend, suffix, tmp_path):
    names = [n for n in DTYPES if _has(backend, n)]
    arrays = {n: np.arange(-6, 6).reshape(3, 4).astype(numpy_dtype(n)) for n in names}
    tree = {"q": {k: KINDS[k]() for k in FOR_EVERY_LIBRARY}, "a": arrays, "0-d": np.ones(()), "0": [np.ones((0, 3))]}
    if backend.name == "jax":
        tree = {**tree, "0-d": np.ones((), "float32"), "0": [np.ones((0, 3), "float32")]}
    here, there = tmp_path / f"numpy{suffix}", tmp_path / f"other{suffix}"
    save(here, tree)
    save(there, moved(tree, backend))
    assert here.read_bytes() == there.read_bytes()
    same(load(there), tree)
    found = load(here, backend=backend.name)
    same(found, moved(tree, backend))
    assert found["q"]["nvfp4"].backend == backend.name


def _has(backend, name):
    try:
        backend.asarray(np.ones(1, numpy_dtype(name)))
    except ValueError:
        return False
    return True


@either
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_quantized_array(kind, suffix, tmp_path):
    q = KINDS[kind]()
    save(tmp_path / f"q{suffix}", q)
    same(load(tmp_path / f"q{suffix}"), q)


@pytest.mark.parametrize("library", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"])
def test_types_that_few_libraries_have(name, library, tmp_path):
    values = np.arange(256).astype("uint8").view(numpy_dtype(name)).reshape(-1, 2)
    save(tmp_path / "a.safetensors", [values])
    (found,) = load(tmp_path / "a.safetensors", backend=library)
    back = np.asarray(get_backend(library).to_numpy(found))
    assert back.dtype == values.dtype
    assert back.tobytes() == values.tobytes()
    save(tmp_path / "b.safetensors", [found])
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@either
def test_structures_are_exact(suffix, tmp_path):
    tree = {
        "a.b": X,
        "a": {"b": X[0], 3: [X[1], (X[2],), [], (), {}], "3": None},
        -7: {
            "../../etc/passwd": X[3],
            "/root": X[4],
            "a\\b\0\n": X[5],
            "": X,
            ".": X,
            "__metadata__": X,
            "aqt_lite": X,
        },
        "w": KINDS["int8"](),
        "w.storage": X,
        "\ud800 é": "\udfff ü\0",
        "numbers": [0, -1, 10**40, 2.5, -0.0, float("inf"), float("nan"), 5e-324, True, False, None, "", "None"],
        "ordered": collections.OrderedDict(z=X, a={"b": 1}),
        "strided": [np.asfortranarray(X), X[::-1, ::3], X.astype(">f4"), np.broadcast_to(X[0], (3, 40))],
    }
    path = tmp_path / f"t{suffix}"
    save(path, tree)
    expected = {**tree, "strided": [np.array(a, "<f4") for a in tree["strided"]]}
    same(load(path), expected)
    for alone in (X, 3, "text", None, [], {}, ((),), np.float32(2)):
        save(path, alone)
        same(load(path), np.asarray(alone) if isinstance(alone, np.generic) else alone)


@needs("jax")
def test_a_tree_of_jax_has_its_structure_again(tmp_path):
    tree = {"w": KINDS["for_dense"]().to_backend("jax"), "n": [quantize(jax.numpy.asarray(X), "nvfp4")]}
    mapped = jax.tree.map(lambda *a: jax.numpy.stack(a), tree, tree)
    for one in (tree, mapped):
        save(tmp_path / "t.safetensors", one)
        found = load(tmp_path / "t.safetensors", backend="jax")
        assert jax.tree.structure(found) == jax.tree.structure(one)
        jax.tree.map(assert_same_bits, found, one)


def test_what_is_loaded_computes_the_same(backend, tmp_path):
    """Views of a file are read-only, and need not be aligned."""
    x, qs = X[:, :40], {k: KINDS[k]() for k in ("int8", "int4, groups of 7", "nvfp4", "own codebook")}
    wide = quantize(np.random.default_rng(1).standard_normal((300, 512)).astype("float32"), granularity=PerChannel(0))
    for suffix in SUFFIXES:
        save(tmp_path / f"q{suffix}", {"q": qs, "wide": wide})
        found = load(tmp_path / f"q{suffix}", backend=backend.name)
        for name, q in qs.items():
            there = q.to_backend(backend.name)
            assert_same_bits(found["q"][name].dequantize(), there.dequantize())
            assert_same_bits(
                aqt_lite.linear(backend.asarray(x), found["q"][name]), aqt_lite.linear(backend.asarray(x), there)
            )
        many = backend.asarray(np.ones((9, 512), "float32"))
        assert_same_bits(
            aqt_lite.linear(many, found["wide"], mode="reproducible"),
            aqt_lite.linear(many, wide.to_backend(backend.name), mode="reproducible"),
        )


# ---- the layout, held against others'


def test_a_reader_written_from_the_specification(tmp_path):
    tree = {"q": [KINDS[k]() for k in KINDS if k != "one number"], "a": X, "v": [1, 0.5, "t", None]}
    save(tmp_path / "t.safetensors", tree)
    found = oracle.read(tmp_path / "t.safetensors")
    for values, q in zip(found["q"], tree["q"], strict=True):
        assert_same_bits(values, q.dequantize())
    same({"a": found["a"], "v": found["v"]}, {"a": tree["a"], "v": tree["v"]})


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_format_is_described(dtype, tmp_path):
    q = quantize(X, dtype)
    save(tmp_path / "q.safetensors", q)
    np.testing.assert_array_equal(oracle.read(tmp_path / "q.safetensors"), q.dequantize())


FROZEN = Path(__file__).parent / "golden" / "files_v1.safetensors"


def frozen_tree():
    x = np.asarray([[0.5, -1.0, 3.0], [0.0, 7.0, -7.5]], "float32")
    return {
        "w": quantize(x, "int4", granularity=PerGroup(2)),
        "n": [quantize(x, "nvfp4").for_dense(), (quantize(x, "uint8", scheme="affine"), None)],
        7: quantize(x, SEVEN),
        "a.b": np.arange(3, dtype="int64"),
        "step": 1000,
        "rate": 0.1,
    }


def test_files_of_the_first_version_are_written_and_read_as_ever(tmp_path):
    save(tmp_path / "t.safetensors", frozen_tree())
    assert (tmp_path / "t.safetensors").read_bytes() == FROZEN.read_bytes()
    same(load(FROZEN), frozen_tree())


def test_safetensors_reads_it_and_writes_the_same_bytes(tmp_path):
    package = pytest.importorskip(
        "safetensors.numpy", reason="safetensors is not installed: requirements-dev.txt has it"
    )
    native = [n for n in DTYPES if not hasattr(ml_dtypes, n)]
    tree = {
        "é/": {n: np.arange(24).astype(n) for n in native},
        "q": quantize(X, "int4"),
        "0": np.ones((0, 4)),
        1: X[0, 0],
    }
    path = tmp_path / "t.safetensors"
    save(path, tree)
    found = package.load_file(path)
    for n in native:
        assert_same_bits(found[f"é/.{n}"], tree["é/"][n])
    assert_same_bits(found["q.storage"], tree["q"].storage)
    header = json.loads(path.read_bytes()[8:].split(b"\n")[0][: int.from_bytes(path.read_bytes()[:8], "little")])
    assert package.save(found, header["__metadata__"]) == path.read_bytes()


def test_files_of_safetensors_load_as_a_flat_dict(tmp_path):
    package = pytest.importorskip(
        "safetensors.torch", reason="safetensors is not installed: requirements-dev.txt has it"
    )
    kinds = ["float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float64", "int64", "bool", "uint8"]
    tensors = {f"layers.{i}/{k}": torch.arange(12).reshape(3, 4).to(getattr(torch, k)) for i, k in enumerate(kinds)}
    package.save_file(tensors, tmp_path / "t.safetensors", {"format": "pt"})
    found = load(tmp_path / "t.safetensors", backend="torch")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.float())
    assert list(load(tmp_path / "t.safetensors", only="*/bool")) == ["layers.6/bool"]
    same(load(tmp_path / "t.safetensors", like=found), found)


def test_numpy_reads_an_npz(tmp_path):
    tree = {"q": quantize(X, "int4"), "a": [X.astype(ml_dtypes.bfloat16), X.astype("float64")]}
    save(tmp_path / "t.npz", tree)
    with np.load(tmp_path / "t.npz", allow_pickle=False) as found:
        assert set(found.files) == {"aqt_lite", "q.storage", "q.scale", "a.0", "a.1"}
        assert_same_bits(found["q.storage"], tree["q"].storage)
        assert_same_bits(found["a.1"], tree["a"][1])
        assert_same_bits(found["a.0"].view(ml_dtypes.bfloat16), tree["a"][0])
        assert json.loads(found["aqt_lite"].tobytes())["version"] == 1


def test_files_of_numpy_load_as_a_flat_dict(tmp_path):
    arrays = {
        "a": X,
        "f": np.asfortranarray(X),
        "n": np.arange(3),
        "e": np.ones((0, 2)),
        "s": np.asarray(2.5),
        "b": X > 0,
    }
    np.savez(tmp_path / "t.npz", **arrays, big=X.astype(">f4"))
    found = load(tmp_path / "t.npz")
    same({k: found[k] for k in arrays}, arrays)
    assert_same_bits(found["big"], X)
    np.savez_compressed(tmp_path / "t.npz", zeros=np.zeros(10**6))
    with pytest.raises(ValueError, match=r"t.npz: member 'zeros.npy' is compressed.*8000128 bytes.*np.savez writes"):
        load(tmp_path / "t.npz")


# ---- lazily


def test_nothing_is_read_before_it_is_looked_at(tmp_path):
    """A file of 64 GiB, of which the disk holds a page."""
    path = tmp_path / "large.safetensors"
    save(path, {"w": quantize(np.ones((2, 8), "float32")), "b": np.zeros(4, "int8")})
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    rows = 1 << 33
    header["w.storage"] = {"dtype": "I8", "shape": [rows, 8], "data_offsets": [8, 8 + rows * 8]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + np.float32(0.5).tobytes() + raw[-20:-16])
        file.truncate(8 + len(text) + 8 + rows * 8)
    assert header["w.scale"]["data_offsets"] == [0, 4]
    assert header["b"]["data_offsets"] == [4, 8]
    tracemalloc.start()
    tree = load(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert tree["w"].shape == (rows, 8)
    assert tree["w"].storage[-1].tolist() == [0] * 8
    for array in (tree["w"].storage, tree["w"].scale, tree["b"]):
        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_an_open_file_may_be_replaced(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, {"a": X})
    first = load(path)
    save(path, {"a": -X})
    assert_same_bits(first["a"], X)
    save(path, load(path))
    assert_same_bits(load(path)["a"], -X)


def test_some_leaves(tmp_path):
    layers = [{"w": KINDS["int8"](), "b": X[i]} for i in range(3)]
    tree = {"layers": layers, "a.b": X, "a": {"b": X[0]}, "n[0]": 3}
    save(tmp_path / "t.safetensors", tree)

    def some(only):
        return load(tmp_path / "t.safetensors", only=only)

    same(some("layers.*.b"), {f"layers.{i}.b": X[i] for i in range(3)})
    same(some(["n[0]", "layers.[02].w"]), {"layers.0.w": layers[0]["w"], "layers.2.w": layers[2]["w"], "n[0]": 3})
    same(some("a.b"), {"a.b": X, "a.b~2": X[0]})
    with pytest.raises(
        ValueError, match=r"t.safetensors: only='layers.1.ww' names no leaf: the nearest of 8 are layers.1.w,"
    ):
        some(["n*", "layers.1.ww"])
    with pytest.raises(TypeError, match="only="):
        some([3])


# ---- whole or not there


@pytest.fixture
def _explodes(monkeypatch):
    """The third array that is written fails."""
    from aqt_lite import _safetensors

    written = []
    original = _safetensors.write_bytes

    def write_bytes(file, entry, *more):
        written.append(entry)
        if len(written) == 3:
            raise KeyboardInterrupt
        original(file, entry, *more)

    monkeypatch.setattr(_safetensors, "write_bytes", write_bytes)


@pytest.mark.usefixtures("_explodes")
@pytest.mark.parametrize("limit", [None, 1000])
@pytest.mark.parametrize("has_names", [True, False])
def test_an_interrupted_save_leaves_the_old_file_alone(tmp_path, monkeypatch, limit, has_names):
    if has_names:  # as where the system knows no files without one
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    path = tmp_path / "t.safetensors"
    path.write_bytes(FROZEN.read_bytes())
    with pytest.raises(KeyboardInterrupt):
        save(path, [X, X, X, X], max_shard_bytes=limit)
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert path.read_bytes() == FROZEN.read_bytes()


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*t\.safetensors"):
        save(tmp_path / "t.safetensors", X)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"absent/t\.safetensors'"):
        save(tmp_path / "absent" / "t.safetensors", X)


@pytest.mark.skipif(not hasattr(os, "O_TMPFILE"), reason="the system has no files without a name")
def test_a_killed_process_leaves_nothing(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(FROZEN.read_bytes())
    program = """
import os, signal, sys, numpy as np, aqt_lite
from aqt_lite import _safetensors
_safetensors.write_bytes = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
aqt_lite.save(sys.argv[1], np.ones(3))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "t.safetensors")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]
    assert (tmp_path / "t.safetensors").read_bytes() == FROZEN.read_bytes()


def test_links_and_permissions_are_those_of_any_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    (tmp_path / "link.safetensors").symlink_to("real.safetensors")
    save(tmp_path / "link.safetensors", X)
    assert (tmp_path / "link.safetensors").is_symlink()
    assert_same_bits(load(tmp_path / "real.safetensors"), X)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "real.safetensors")]
    assert modes[0] == modes[1]


# ---- several files


def shards_in(folder):
    return sorted(p.name for p in folder.iterdir())


def test_shards_as_hugging_face_has_them(tmp_path):
    package = pytest.importorskip(
        "safetensors.numpy", reason="safetensors is not installed: requirements-dev.txt has it"
    )
    tree = {"a": [X] * 4, "w": KINDS["nvfp4"](), "n": 3}
    path = tmp_path / "model.safetensors"
    save(path, tree, max_shard_bytes=2 * X.nbytes)
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert shards_in(tmp_path) == [*names, "model.safetensors.index.json"]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * X.nbytes + tree["w"].nbytes
    found = {}
    for name in names:
        here = package.load_file(tmp_path / name)
        assert {index["weight_map"][key] for key in here} == {name}
        found |= here
    assert set(found) == set(index["weight_map"])
    assert_same_bits(found["w.storage"], tree["w"].storage)
    for place in (path, tmp_path / "model.safetensors.index.json"):
        same(load(place), tree)
        assert list(load(place, only="a.?")) == [f"a.{i}" for i in range(4)]
    with pytest.raises(ValueError, match=r"of-00003.safetensors: it is one of several files: load the index"):
        load(tmp_path / names[0])


def test_nothing_stale_is_left_or_read(tmp_path):
    path = tmp_path / "m.safetensors"
    save(path, [X] * 5, max_shard_bytes=X.nbytes)
    other = tmp_path / "m-extra.safetensors"
    save(other, X)
    save(path, [-X] * 5, max_shard_bytes=3 * X.nbytes)
    shards = [f"m-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert shards_in(tmp_path) == [*shards, other.name, "m.safetensors.index.json"]
    same(load(path), [-X] * 5)
    save(path, [X], max_shard_bytes=3 * X.nbytes)  # which needs one file
    assert shards_in(tmp_path) == [other.name, "m.safetensors"]
    save(path, [X] * 5, max_shard_bytes=3 * X.nbytes)
    assert shards_in(tmp_path) == [*shards, other.name, "m.safetensors.index.json"]


def test_files_of_different_saves_are_not_mixed(tmp_path):
    path = tmp_path / "m.safetensors"
    save(path, [X] * 2, max_shard_bytes=X.nbytes)
    old = (tmp_path / "m-00002-of-00002.safetensors").read_bytes()
    save(path, [X, -X], max_shard_bytes=X.nbytes)
    (tmp_path / "m-00002-of-00002.safetensors").write_bytes(old)
    with pytest.raises(ValueError, match=r"m.safetensors: m-00002-of-00002.safetensors: .* of different saves"):
        load(path)


def test_a_save_that_stops_between_two_files_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    save(path, [X] * 3, max_shard_bytes=X.nbytes)
    moves = []

    def replace(source, target):
        moves.append(target)
        if len(moves) == 3:
            raise OSError(5, "Input/output error")
        original(source, target)

    original = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"):
        save(path, [-X] * 3, max_shard_bytes=X.nbytes)
    assert len(shards_in(tmp_path)) == 4
    with pytest.raises(ValueError, match=r"m-00001-of-00003.safetensors: .* of different saves"):
        load(path)
    monkeypatch.undo()
    save(path, [-X] * 3, max_shard_bytes=X.nbytes)
    same(load(path), [-X] * 3)


def test_an_index_of_another_program(tmp_path):
    same(load(hugging_face(tmp_path)), {"a": X, "b": X[1], "c": X[0]})


# ---- formats of one's own


def test_a_format_of_ones_own_in_another_process(tmp_path):
    book = aqt_lite.Codebook("halves_of_test_files", (-1.0, -0.5, 0.0, 0.5, 1.0))
    few = aqt_lite.Float("e5m3_of_test_files", 5, 3, bias=15, max=57344.0, signed=False, nan=255)
    scales = aqt_lite.Format(few.name, few, scaled=False)
    aqt_lite.register_format(scales)
    tree = {"a": quantize(X, book), "b": quantize(X, "int4", granularity=PerGroup(8), scale_dtype=scales.name)}
    save(tmp_path / "t.safetensors", tree)
    (tmp_path / "t.pickle").write_bytes(pickle.dumps(tree))
    read = {"load": "aqt_lite.load(sys.argv[1])", "pickle": "pickle.load(open(sys.argv[1][:-11] + 'pickle', 'rb'))"}
    for how in read.values():
        program = (
            f"import pickle, sys, aqt_lite\ntree = {how}\n"
            "sys.stdout.buffer.write(b''.join(q.dequantize().tobytes() for q in tree.values()))"
        )
        command = [sys.executable, "-c", program, str(tmp_path / "t.safetensors")]
        done = subprocess.run(command, capture_output=True, check=False)
        assert done.stdout == b"".join(q.dequantize().tobytes() for q in tree.values()), done.stderr
    raw = (tmp_path / "t.safetensors").read_bytes()
    (tmp_path / "t.safetensors").write_bytes(raw.replace(b"-0.5,0.0,0.5,", b"-0.5,0.0,0.7,"))
    with pytest.raises(ValueError, match=f"leaf 'a': format '{book.name}' has other numbers in the file than here"):
        load(tmp_path / "t.safetensors")
    same(load(tmp_path / "t.safetensors", only="b"), {"b": tree["b"]})


class Signs(aqt_lite.elements.ElementType):
    """An element type that only this program knows."""

    name, bits, storage = "signs_of_test_files", 2, "uint8"
    min, max, smallest, signed, codes = -1.0, 1.0, 1.0, True, (0, 2)

    def encode(self, v, zero, symmetric, rounding, noise, b):
        code = b.xp.clip(b.xp.round(v), -1.0, 1.0) + 1
        return b.xp.astype(code, b.dtype("uint8")), b.xp.abs(v) <= 1

    def decode(self, codes, b, compute="float32"):
        return b.xp.astype(codes, b.dtype(compute)) - 1


def test_a_kind_of_numbers_that_only_a_program_knows(tmp_path):
    aqt_lite.register_format(aqt_lite.Format(Signs.name, Signs()))
    q = quantize(X, Signs.name)
    save(tmp_path / "q.safetensors", q)
    same(load(tmp_path / "q.safetensors"), q)
    program = (
        f"import aqt_lite\ntry: aqt_lite.load({str(tmp_path / 'q.safetensors')!r})\nexcept ValueError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True, text=True)
    assert f"dtype='{Signs.name}' is not known here: register its format first" in done.stdout


# ---- templates


CONFUSIONS = {
    "layout": (quantize(X[:, :6]), quantize(X[:, :6]).for_dense(), "stored as for_dense"),
    "runs": (
        quantize(X.reshape(6, 4, 10)[:4, :, :4]).for_dense(1, 2),
        quantize(X.reshape(6, 4, 10)[:4, :, :4]).for_dense(2, 1),
        r"stored as for_dense\(1, 2\) does.*stored as for_dense\(2, 1\) does",
    ),
    "block": (quantize(X, granularity=PerGroup(8)), quantize(X, granularity=PerGroup(9)), r"\(1, 8\).*\(1, 9\)"),
    "format": (quantize(X, "int4"), quantize(X, "nf4"), "int4 of.*nf4 of"),
    "source": (quantize(X), quantize(X.astype(ml_dtypes.bfloat16)), "of float32.*of bfloat16"),
    "scales": (
        quantize(X, "int4", granularity=PerGroup(8), scale_dtype="float16"),
        quantize(X, "int4", granularity=PerGroup(8), scale_dtype="bfloat16"),
        "float16 scales.*bfloat16 scales",
    ),
    "packing": (quantize(X, "int4"), quantize(X, "int4").unpacked(), "40 codes packed.*storage"),
    "zero points": (quantize(X, scheme="affine"), quantize(X), "zero_point.*the template"),
    "trainable": (quantize(X), quantize(X).with_trainable_scales(), "trainable"),
    "shape": (quantize(X), quantize(X[:5]), r"shape \(6, 40\).*shape \(5, 40\)"),
    "dtype of an array": (X, X.astype("float64"), "holds float32.*template float64"),
    "shape of an array": (X, X[0], r"float32 of shape \(6, 40\).*float32 of shape \(40,\)"),
    "an array and a QArray": (X, quantize(X), "holds float32.*template int8"),
    "type of a number": (3, 3.0, "holds a int, and the template a float"),
    "containers": ([X], (X,), "leaf 'a' is a list in the file, and a tuple in the template"),
    "keys": ({"b": X}, {"c": X}, r"leaf 'a' lacks \['c'\] of the template in the file, and has \['b'\]"),
    "length": ([X], [X, X], r"leaf 'a' lacks \[1\]"),
    "leaves and containers": (X, {"b": X}, "leaf 'a' is a leaf in the file, and a dict in the template"),
}


@pytest.mark.parametrize("case", CONFUSIONS)
def test_a_template_of_another_kind_is_refused(case, tmp_path):
    saved, template, words = CONFUSIONS[case]
    path = tmp_path / "t.safetensors"
    save(path, {"a": saved})
    same(load(path, like={"a": saved}), {"a": saved})
    with pytest.raises(ValueError, match=rf"cannot load .*t\.safetensors: .*{words}"):
        load(path, like={"a": template})


def test_a_template_says_where_leaves_come_to(backend, tmp_path):
    tree = {"w": [KINDS["for_dense"](), KINDS["nvfp4"]()], "a": X, "n": 3}
    save(tmp_path / "t.safetensors", tree)
    there = moved(tree, backend)
    shuffled = {key: there[key] for key in ("n", "a", "w")}
    same(load(tmp_path / "t.safetensors", like=shuffled), shuffled)
    with pytest.raises(ValueError, match="leave only= and backend= out"):
        load(tmp_path / "t.safetensors", like=there, backend="numpy")


@needs("jax")
def test_templates_of_jax_without_values(tmp_path):
    tree = {"a": X, "w": KINDS["nvfp4"]()}
    save(tmp_path / "t.safetensors", tree)
    of_jax = moved(tree, get_backend("jax"))
    found = load(tmp_path / "t.safetensors", like=jax.eval_shape(lambda: of_jax))
    same(found, of_jax)
    placed = jax.device_put(of_jax, jax.devices()[0])
    assert load(tmp_path / "t.safetensors", like=placed)["a"].committed


@needs("torch")
def test_templates_of_torch_without_values(tmp_path):
    tree = {"a": X, "w": KINDS["nvfp4"]()}
    save(tmp_path / "t.safetensors", tree)
    of_torch = moved(tree, get_backend("torch"))
    of_shapes = {"a": of_torch["a"].to("meta"), "w": of_torch["w"].to_device("meta")}
    same(load(tmp_path / "t.safetensors", like=of_shapes), of_torch)


# ---- what no file holds, and the way


Point = collections.namedtuple("Point", "x y")


@dataclasses.dataclass
class Layer:
    w: object
    b: object


def test_what_is_no_tree_says_the_way(tmp_path):
    path = tmp_path / "t.safetensors"
    cycle = []
    cycle.append(cycle)
    for leaf, words in [
        (
            Point(X, X),
            r"leaf 'a': it is a .*Point, a namedtuple: save x._asdict\(\), and make it anew as Point\(\*\*tree\)",
        ),
        (Layer(X, X), r"leaf 'a': it is a .*Layer, a dataclass: save {f.name: getattr\(x, f.name\)"),
        (collections.defaultdict(int), r"leaf 'a': it is a collections.defaultdict: save dict\(x\)"),
        ({1.5: X}, "leaf 'a' has the key 1.5: keys are strings or integers"),
        ({True: X}, "leaf 'a' has the key True"),
        ({"b": [object()]}, "leaf 'a.b.0': it is a builtins.object: files hold dicts, lists and tuples"),
        (1j, "leaf 'a': it is a builtins.complex"),
        (b"bytes", "leaf 'a': it is a builtins.bytes"),
        (X.astype("complex64"), "leaf 'a': it has dtype complex64.*their real and imaginary parts"),
        (np.asarray(["x"]), "leaf 'a': it has dtype str.*text belongs into the tree as str"),
        (np.asarray([None]), "leaf 'a': it has dtype object"),
        (np.asarray([1], "datetime64[s]"), "leaf 'a': it has dtype datetime64"),
        (np.longdouble(1), "leaf 'a': it has dtype (float128|longdouble|float96)"),
        (np.ma.masked_array(X, X > 0), "leaf 'a': it is a masked array"),
        (dataclasses.replace(quantize(X), storage=None), "leaf 'a': "),
        (cycle, "nested more than 64 deep: flatten it, or break its cycle"),
        (10**5000, "leaf 'a': .*digits"),
    ]:
        with pytest.raises((TypeError, ValueError), match=rf"cannot save .*t\.safetensors: .*{words}"):
            save(path, {"a": leaf})
        assert not list(tmp_path.iterdir())
    for wrong in ("t.bin", "t", "t.safetensors.gz"):
        for use in (lambda p: save(p, X), load):
            with pytest.raises(ValueError, match=r"must end in .safetensors or .npz"):
                use(tmp_path / wrong)
    for limit, place in ((0, path), (True, path), ("1GB", path), (10, tmp_path / "t.npz")):
        with pytest.raises(ValueError, match="max_shard_bytes"):
            save(place, X, max_shard_bytes=limit)
    with pytest.raises(FileNotFoundError):
        load(path)
    with pytest.raises(ValueError, match="backend='nump' is not known"):
        load(path, backend="nump")


def test_arrays_of_frameworks_that_have_no_values(tmp_path):
    path = tmp_path / "t.safetensors"
    q = quantize(jax.numpy.asarray(X))
    for tree in (jax.eval_shape(lambda: q), [jax.eval_shape(lambda: q.scale)]):
        with pytest.raises(TypeError, match="which has no values: save arrays"):
            save(path, tree)
    with pytest.raises(TypeError, match="a compiler is tracing it"):
        jax.jit(lambda x: save(path, x))(X)
    with pytest.raises(TypeError, match="dtype key<"):
        save(path, jax.random.key(0))
    deleted = jax.numpy.ones(3)
    deleted.delete()
    with pytest.raises(ValueError, match="leaf 'a': Array has been deleted"):
        save(path, {"a": deleted})
    for tensor in (torch.ones(3, device="meta"), torch.ones(3).to_sparse(), quantize(torch.ones(3)).to_device("meta")):
        with pytest.raises(TypeError, match="leaf 'a': it "):
            save(path, {"a": tensor})
    with pytest.raises(TypeError, match="its arrays are of several libraries"):
        save(path, dataclasses.replace(q, scale=np.ones((1, 1), "float32")))
    save(path, {"a": np.ones(3)})
    with pytest.raises(ValueError, match="leaf 'a': JAX would narrow float64"):
        load(path, backend="jax")
    assert shards_in(tmp_path) == ["t.safetensors"]


def test_the_ways_work(tmp_path):
    """What the errors and docs/files.md say to do."""
    path = tmp_path / "t.safetensors"
    save(path, Point(X, 3)._asdict())
    same(Point(**load(path)), Point(X, 3))
    layer = Layer(KINDS["nvfp4"](), X)
    save(path, {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)})
    same(Layer(**load(path)).w, layer.w)
    module = torch.nn.Linear(3, 4)
    with pytest.raises(TypeError, match=r"of a module of torch save x.state_dict\(\)"):
        save(path, module)
    save(path, module.state_dict())
    again = torch.nn.Linear(3, 4)
    again.load_state_dict(load(path, backend="torch"))
    assert torch.equal(again.weight, module.weight)


def test_the_way_of_pytrees_works(tmp_path):
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: requirements-dev.txt has it")
    optax = pytest.importorskip("optax", reason="optax is not installed: requirements-dev.txt has it")
    path = tmp_path / "t.safetensors"
    model = eqx.nn.Linear(40, 6, key=jax.random.key(0))
    model = eqx.tree_at(lambda m: m.weight, model, quantize(model.weight, "int4", granularity=PerGroup(8)))
    state = optax.adam(1e-3).init(eqx.filter(model, eqx.is_inexact_array))
    for tree in (model, optax.adam(1e-3).init({"b": jax.numpy.ones(3)})):
        way = r"(eqx.partition.*)?jax.tree.leaves\(tree, is_leaf=lambda leaf: isinstance\(leaf, aqt_lite.QArray\)\)"
        with pytest.raises(TypeError, match=way):
            save(path, tree)
        leaves, structure = jax.tree.flatten(tree, is_leaf=lambda leaf: isinstance(leaf, QArray))
        save(path, leaves)
        found = jax.tree.unflatten(structure, load(path, like=leaves))
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        jax.tree.map(assert_same_bits, found, tree)
    mlp = eqx.nn.MLP(40, 6, 16, 1, key=jax.random.key(0))
    for tree in (mlp, jax.tree.leaves(mlp), [len], [lambda x: x]):
        with pytest.raises(TypeError, match=r"tree, static = eqx.partition\(model, eqx.is_array\), .* eqx.combine"):
            save(path, tree)
    with pytest.raises(TypeError, match=r"a QArray without its codes, .* jax.tree.leaves\(tree\)"):
        save(path, jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, QArray)))
    save(path, jax.tree.leaves(state))
    found = jax.tree.unflatten(jax.tree.structure(state), load(path, like=jax.tree.leaves(state)))
    jax.tree.map(assert_same_bits, found, state)


@pytest.mark.parametrize("kind", KINDS)
def test_other_ways_to_save_keep_every_bit_or_name_this_one(kind, tmp_path):
    q = KINDS[kind]()
    same(pickle.loads(pickle.dumps(q)), q)
    for refused in (lambda: np.save(tmp_path / "q", q), lambda: np.savez(tmp_path / "q", q=q)):
        with pytest.raises(TypeError, match=r"to store it, take aqt_lite.save\(path, q\)"):
            refused()


SAVERS = {
    "h5py": lambda m, path, q: m.File(path, "w").create_dataset("w", data=q),
    "xarray": lambda m, path, q: m.Dataset({"w": (("x", "y"), q)}).to_netcdf(path),
    "zarr": lambda m, path, q: m.save(path, q),
    "safetensors.numpy": lambda m, path, q: m.save_file({"w": q}, path),
    "safetensors.torch": lambda m, path, q: m.save_file({"w": q.to_backend("torch")}, path),
    "safetensors.flax": lambda m, path, q: m.save_file({"w": q.to_backend("jax")}, path),
    "json": lambda m, path, q: Path(path).write_text(m.dumps({"w": q})),
}


@pytest.mark.parametrize("library", SAVERS)
def test_savers_of_others_do_not_write_floats_in_silence(library, tmp_path):
    module = pytest.importorskip(library, reason=f"{library} is not installed: requirements-dev.txt has it")
    path, q = tmp_path / "file", quantize(np.ones((64, 64), "float32"))
    with pytest.raises((TypeError, ValueError, AttributeError)):
        SAVERS[library](module, str(path), q)
    written = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert written < q.nbytes


@pytest.mark.parametrize("dtype", ["int8", "int4", "mxfp4", "nvfp4", "bitround7"])
def test_savers_that_ask_for_a_dtype_are_told_what_stores_it(backend, dtype):
    if backend.name == "torch":
        pytest.skip("its compiler takes plain strings alone")
    q = quantize(backend.asarray(X), dtype)
    safetensors, zarr = (pytest.importorskip(m, reason=f"{m} comes with requirements-dev.txt")
                         for m in ("safetensors.numpy", "zarr"))  # fmt: skip
    written = zarr.zeros(X.shape)
    calls = [lambda: safetensors.save({"w": q}), lambda: written.__setitem__(slice(None), q)]
    for call in calls + [lambda: zarr.array(q)] * (dtype == "int8"):  # a name that NumPy does not know is asked nothing
        with pytest.raises(AttributeError, match=rf"'{dtype}'.*aqt_lite.save\(path, q\) stores it"):
            call()
    assert (str(q.dtype), hash(q.dtype), type(pickle.loads(pickle.dumps(q)).dtype)) == (
        dtype,
        hash(dtype),
        type(q.dtype),
    )


@needs("torch")
def test_torch_loads_formats_of_ones_own_without_trusting_the_file(tmp_path):
    q = quantize(torch.as_tensor(X), SEVEN)
    torch.save({"q": q, "d": double_quantized().to_backend("torch")}, tmp_path / "q.pt")
    found = torch.load(tmp_path / "q.pt", weights_only=True)
    assert_same_bits(found["q"], q)
    assert_same_bits(found["d"], double_quantized())


def test_arrays_of_dask_are_computed_one_by_one(tmp_path):
    dask = pytest.importorskip("dask.array", reason="dask is not installed: requirements-dev.txt has it")
    lazy = dask.from_array(X, chunks=(2, 40))
    save(tmp_path / "a.safetensors", {"a": lazy, "q": quantize(lazy, "int4", granularity=PerGroup(8))})
    save(tmp_path / "b.safetensors", {"a": X, "q": quantize(X, "int4", granularity=PerGroup(8))})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_memory_is_one_leaf(tmp_path):
    """Beside a tree of ten strided arrays, each of which has to be copied, there is one copy."""
    wide = np.zeros((10, 1 << 18, 2), "float32")
    tree = [a[:, 0] for a in wide]
    tracemalloc.start()
    save(tmp_path / "t.safetensors", tree)
    assert tracemalloc.get_traced_memory()[1] < 1.5 * tree[0].nbytes
    tracemalloc.stop()
