"""Files that are damaged, hostile, or contradict themselves: refused, with the file, the leaf and what is wrong."""

from __future__ import annotations

import collections
import dataclasses
import io
import json
import pickle
import random
import zipfile

import numpy as np
import pytest
from trees import KINDS, SEVEN, X, either, hugging_face

from aqt_lite import PerGroup, QArray, load, quantize, save


def small_tree():
    """A leaf of every kind."""
    return {
        "w": quantize(X, "int4", granularity=PerGroup(8)),
        "n": quantize(X, "nvfp4"),
        "s": quantize(X, SEVEN),
        "u": quantize(X, "uint8", scheme="affine").for_dense(),
        "a": X,
        "b": X > 0,
        "v": [1, 2.5, "text", None, True, ()],
    }


# ---- layouts


def header_of(raw):
    n = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def with_header(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def changed(function):
    """The bytes of a file whose header went through ``function``."""

    def change(raw):
        header, data = header_of(raw)
        function(header)
        return with_header(header, data)

    return change


def entry(**new):
    return changed(lambda header: header["a"].update(new))


LAYOUT = {
    "empty": (lambda raw: b"", "the file is empty"),
    "short": (lambda raw: raw[:5], "5 bytes, too few"),
    "cut in the header": (lambda raw: raw[:50], "header should have .* the file has 50"),
    "cut": (lambda raw: raw[:-1], "it was cut off or appended to"),
    "appended to": (lambda raw: raw + b"\0", "it was cut off or appended to"),
    "no JSON": (lambda raw: with_header(b"{'a'}   ", b""), "header cannot be read"),
    "a list": (lambda raw: with_header(b"[]      ", b""), "its header is no JSON object"),
    "a bomb": (lambda raw: with_header(b'{"a":' + b"[" * 500_000, b""), "its header is nested too deeply"),
    "digits": (lambda raw: with_header(b'{"a":' + b"9" * 10_000 + b"}", b""), "its header cannot be read"),
    "constants": (lambda raw: with_header(b'{"a":NaN}', b""), "NaN is no JSON"),
    "no UTF-8": (lambda raw: with_header(b'{"\xff":1}', b""), "its header cannot be read"),
    "a name twice": (
        lambda raw: with_header(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            b"\0",
        ),
        "'a' is there twice",
    ),
    "huge header": (lambda raw: (10**12).to_bytes(8, "little") + raw[8:], "header should have 1000000000000 bytes"),
    "dtype": (entry(dtype="I7"), "array 'a' has dtype 'I7'"),
    "no dtype": (changed(lambda h: h["a"].pop("dtype")), "array 'a' must have dtype, shape and data_offsets"),
    "shape": (entry(shape=[3, 40]), r"array 'a' is F32 of shape \(3, 40\), but lies at"),
    "negative": (entry(shape=[-6, -40]), r"array 'a' has shape \[-6, -40\]"),
    "overflow": (entry(shape=[2**62, 2**62, 16]), "array 'a' is F32 of shape"),
    "no number": (entry(shape=["6", 40]), "array 'a' has shape"),
    "a bool": (entry(shape=[True, 240]), "array 'a' has shape"),
    "backwards": (entry(data_offsets=[960, 0]), "array 'a' is F32"),
    "outside": (entry(data_offsets=[10**9, 10**9 + 960]), "nor leave a gap"),
    "overlap": (changed(lambda h: h["c"].update(data_offsets=[0, 960])), "must not overlap"),
    "notes": (changed(lambda h: h["__metadata__"].update(x=3)), "object of texts"),
}


@pytest.mark.parametrize("case", LAYOUT)
def test_broken_files_of_safetensors(case, tmp_path):
    """Each is refused by the package, too."""
    change, words = LAYOUT[case]
    path = tmp_path / "t.safetensors"
    save(path, {"a": X, "c": X + 1})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"cannot load .*t\.safetensors: .*({words})"):
        load(path)
    package = pytest.importorskip("safetensors", reason="safetensors is not installed: requirements-dev.txt has it")
    if case == "a name twice":  # of which the package keeps the last
        return
    with pytest.raises(package.SafetensorError), package.safe_open(path, "np"):
        pass


def document(function):
    """The bytes of a file whose document went through ``function``."""

    def change(raw):
        header, data = header_of(raw)
        found = json.loads(header["__metadata__"]["aqt_lite"])
        function(found)
        header["__metadata__"]["aqt_lite"] = json.dumps(found)
        return with_header(header, data)

    return change


def tree(function):
    return document(lambda d: function(dict(d["tree"]["dict"]), d))


def qarray(**new):
    return tree(lambda t, d: t["w"]["qarray"].update(new))


def deep(d):
    node = {"list": []}
    for _ in range(80):
        node = {"list": [node]}
    d["tree"]["dict"].append(["deep", node])


DOCUMENTS = {
    "version": (
        document(lambda d: d.update(version=2)),
        "the file is of version 2, and this aqt_lite reads 1: upgrade",
    ),
    "more": (document(lambda d: d.update(more=1)), "must have version, formats and tree"),
    "no text": (changed(lambda h: h["__metadata__"].update(aqt_lite="{")), "the document of the file cannot be read"),
    "a bomb": (
        changed(lambda h: h["__metadata__"].update(aqt_lite='{"tree":' + "[" * 100_000)),
        "the document of the file is nested too deeply",
    ),
    "deep": (document(deep), "is nested more than 64 deep"),
    "a missing array": (tree(lambda t, d: t["a"].update(array="z")), "leaf 'a': array 'z' is not in the file"),
    "an array twice": (
        tree(lambda t, d: t["a"].update(array="b")),
        "leaf 'b': array 'b' has another place in the tree",
    ),
    "an array without a place": (
        document(lambda d: d["tree"]["dict"].pop(0)),
        "array 'w.s.*' is in the file, but has no place in its tree",
    ),
    "a key twice": (document(lambda d: d["tree"]["dict"].append(["a", {"value": None}])), "has a key twice"),
    "a key": (document(lambda d: d["tree"]["dict"].append([None, {"value": None}])), "keys are strings or integers"),
    "a node": (document(lambda d: d["tree"]["dict"].append(["z", {"set": []}])), "leaf 'z': the document has {'set'"),
    "a value": (document(lambda d: d["tree"]["dict"].append(["z", {"value": {}}])), "leaf 'z': value {} is no string"),
    "an int": (
        document(lambda d: d["tree"]["dict"].append(["z", {"int": "0x1"}])),
        "leaf 'z': int '0x1' is no integer",
    ),
    "contract": (qarray(version=3), "leaf 'w': this QArray follows version 3 of the contract.*upgrade aqt_lite"),
    "fields": (qarray(layout="tiled"), "leaf 'w': a QArray is described by .* upgrade"),
    "field": (qarray(transposed=1), "leaf 'w': a QArray has transposed=1"),
    "runs of no axis": (qarray(transposed=[0, 2]), r"leaf 'w': a QArray has transposed=\[0, 2\]"),
    "runs of one": (qarray(transposed=[1, 1]), r"leaf 'w': a QArray has transposed=\[1, 1\]"),
    "runs of many": (qarray(transposed=[1, 2]), "leaf 'w': a QArray's storage has shape .*too few axes"),
    "format": (qarray(dtype="log4"), "leaf 'w': format 'log4' is not among the formats of the document"),
    "unknown format": (
        tree(lambda t, d: (t["w"]["qarray"].update(dtype="log4"), d["formats"].update(log4=None))),
        r"leaf 'w': dtype='log4' is not known here: register its format first, with aqt_lite.register_format",
    ),
    "another format": (
        tree(lambda t, d: (t["w"]["qarray"].update(dtype="int8"), d["formats"].update(int8=None))),
        "leaf 'w': a QArray has packed_length=40, but codes of int8 take whole bytes",
    ),
    "block": (qarray(block=[1, 16]), r"leaf 'w': .* its scale should have shape \(6, 3\), not \(6, 5\)"),
    "block of as many scales": (qarray(block=[1, 9]), "leaf 'w': a QArray of shape .* has ragged"),
    "block 0": (qarray(block=[1, 0]), r"leaf 'w': a QArray has block=\[1, 0\]"),
    "packing": (qarray(packed_length=42), "leaf 'w': .* 42 codes of 4 bits.* should have 21 bytes there, not 20"),
    "not packed": (qarray(packed_length=None), "leaf 'w': this QArray has codes of shape"),
    "layout": (qarray(transposed=True), "leaf 'w': this QArray has codes of shape"),
    "ragged": (qarray(ragged=[None, 40]), "leaf 'w': a QArray of shape .* has ragged"),
    "source": (qarray(float_dtype="float64"), "leaf 'w': this QArray's scale has dtype float32, but .* float64"),
    "no scale": (tree(lambda t, d: d["tree"]["dict"].append(["z", t["w"]["parts"].pop("scale")])), "has no scale"),
    "no storage": (tree(lambda t, d: t["w"]["parts"].pop("storage")), "leaf 'w': a QArray has the part storage"),
    "parts": (tree(lambda t, d: t["w"]["parts"].update(bias={"value": None})), "leaf 'w': a QArray has the part"),
    "a part": (
        tree(lambda t, d: t["w"]["parts"].update(offset={"value": None})),
        "leaf 'w': parts of a QArray are arrays",
    ),
    "other numbers": (
        document(lambda d: d["formats"]["int4"]["element"].update(narrow=True)),
        "leaf 'w': format 'int4' has other numbers in the file than here",
    ),
    "a record": (
        document(lambda d: d["formats"]["int4"].pop("group")),
        "leaf 'w': a record of Format has other fields",
    ),
    "a wrong record": (
        document(lambda d: d["formats"]["int4"]["element"].update(bits="4")),
        "leaf 'w': a record of Integer has bits='4'",
    ),
    "a kind": (document(lambda d: d["formats"]["int4"]["element"].update(kind="Log")), "element type is of kind 'Log'"),
    "bits": (tree(lambda t, d: t["a"].update(dtype="bfloat16")), "leaf 'a': an array of float32 is not how 'bfloat16'"),
}


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_that_contradict_their_arrays(case, tmp_path):
    change, words = DOCUMENTS[case]
    path = tmp_path / "t.safetensors"
    save(path, {"w": quantize(X, "int4", granularity=PerGroup(8)), "a": X, "b": X[0]})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises((ValueError, TypeError), match=rf"cannot load .*t\.safetensors: .*{words}"):
        load(path)


def ternary_in_parts():
    """A wrong code far behind."""
    q = quantize(np.ones((3, 3 << 20), "float32"), "ternary")
    storage = np.array(q.storage)
    storage[2, -1] = 0b10_00_00_00
    return dataclasses.replace(q, storage=storage)


def with_values(q, part, value):
    old = getattr(q, part)
    return dataclasses.replace(q, **{part: np.full(old.shape, value, old.dtype)})


def nan_of_e8m0():
    q = quantize(X, "mxfp4")
    return dataclasses.replace(q, scale=with_values(q.scale, "storage", 255))


VALUES = {
    "NaN": (lambda: with_values(quantize(X), "scale", np.nan), "scale=nan: every scale must be finite and not 0"),
    "zero": (lambda: with_values(quantize(X), "scale", 0.0), "scale=0.0: every scale must be finite and not 0"),
    "zero point": (
        lambda: with_values(quantize(X, "uint4", scheme="affine"), "zero_point", 16),
        "zero_point=16: must be a code of uint4",
    ),
    "offset": (lambda: with_values(KINDS["offsets"](), "offset", np.inf), "offset=inf: every offset must be finite"),
    "NaN of few bits": (nan_of_e8m0, "float8_e8m0fnu has no finite number of that code"),
    "NaN code": (lambda: with_values(quantize(X, "float8_e5m2"), "storage", 0x7C), "has no finite number of that code"),
    "ternary": (
        ternary_in_parts,
        rf"1 unusable codes, the first at \(2, {(3 << 20) - 1}\): -2; codes of ternary are -1",
    ),
    "codebook": (lambda: with_values(quantize(X, SEVEN), "storage", 255), "codes of seven_of_test_files are 0 to 6"),
    "unpacked": (lambda: with_values(quantize(X, "int5").unpacked(), "storage", 16), "codes of int5 are -16 to 15"),
}


@pytest.mark.parametrize("case", VALUES)
def test_values_that_from_codes_refuses(case, tmp_path):
    """On both ways, with its words; unless nobody wants to know."""
    make, words = VALUES[case]
    path, tree = tmp_path / "t.safetensors", {"q": make()}
    with pytest.raises(ValueError, match=f"cannot save .*: leaf 'q': .*{words}"):
        save(path, tree)
    assert not path.exists()
    save(path, tree, check_values=False)
    with pytest.raises(ValueError, match=f"cannot load .*: leaf 'q': .*{words}"):
        load(path)
    same_arrays(load(path, check_values=False), tree)


def same_arrays(found, expected):
    for name in ("storage", "scale", "zero_point", "offset"):
        one, other = (getattr(tree["q"], name) for tree in (found, expected))
        one, other = (a.storage if isinstance(a, QArray) else a for a in (one, other))
        assert (one is None and other is None) or one.tobytes() == other.tobytes()


def test_bools_that_are_none(tmp_path):
    path = tmp_path / "t.safetensors"
    save(path, {"a": X > 0})
    path.write_bytes(path.read_bytes()[:-1] + b"\2")
    with pytest.raises(ValueError, match="leaf 'a': an array of bool has bytes that are neither 0 nor 1"):
        load(path)


def zipped(*members, **how):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **how) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return file.getvalue()


def npy(array, **how):
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


class Trap:
    """What runs if it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


ZEROS = npy(np.zeros(3))
ARCHIVES = {
    "no zip": lambda: b"not a zip archive",
    "cut": lambda: zipped(("a.npy", ZEROS))[:-10],
    "pickle": lambda: zipped(("a.npy", npy(np.asarray([Trap()], object), allow_pickle=True))),
    "structure": lambda: zipped(("a.npy", npy(np.zeros(3, "i4,f4")))),
    "text": lambda: zipped(("a.npy", npy(np.asarray(["x"])))),
    "complex": lambda: zipped(("a.npy", npy(np.zeros(3, complex)))),
    "evaluated": lambda: zipped(("a.npy", ZEROS.replace(b"(3,)", b"(2**9**9,)"))),
    "shape": lambda: zipped(("a.npy", ZEROS.replace(b"(3,), }", b"(4,), }"))),
    "huge shape": lambda: zipped(("a.npy", ZEROS.replace(b"(3,), }           ", b"(3333333333,), }  "))),
    "header": lambda: zipped(("a.npy", ZEROS[:8] + b"\xff\xff" + ZEROS[10:])),
    "no header": lambda: zipped(("a.npy", b"")),
    "bomb": lambda: zipped(("a.npy", npy(np.zeros(10**6))), compression=zipfile.ZIP_DEFLATED),
    "a path": lambda: zipped(("../a.npy", ZEROS)),
    "an absolute path": lambda: zipped(("/a.npy", ZEROS)),
    "no array": lambda: zipped(("a.pkl", pickle.dumps(Trap()))),
    "no document": lambda: zipped(("aqt_lite.npy", npy(np.frombuffer(b"\xff{}", "uint8")))),
}


@pytest.mark.parametrize("case", ARCHIVES)
def test_broken_archives(case, tmp_path):
    (tmp_path / "t.npz").write_bytes(ARCHIVES[case]())
    words = {"pickle": "never unpickled", "bomb": "compressed", "a path": "is a path", "no array": "is no array"}
    with pytest.raises(ValueError, match=rf"cannot load .*t\.npz: .*{words.get(case, '')}"):
        load(tmp_path / "t.npz")


def test_an_archive_with_a_member_twice(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        (tmp_path / "t.npz").write_bytes(zipped(("a.npy", ZEROS), ("a.npy", ZEROS)))
    with pytest.raises(ValueError, match="array 'a' is there twice"):
        load(tmp_path / "t.npz")


def test_an_archive_whose_members_overlap(tmp_path):
    raw = bytearray(zipped(("a.npy", ZEROS), ("b.npy", ZEROS)))
    second = raw.rindex(b"PK\1\2")
    raw[second + 42 : second + 46] = (0).to_bytes(4, "little")
    (tmp_path / "t.npz").write_bytes(raw)
    with pytest.raises(ValueError, match=r"t\.npz: .*(overlap|not where)"):
        load(tmp_path / "t.npz")


@either
def test_files_with_random_damage(suffix, tmp_path):
    """Refused by name, or read as a tree whose arrays can be used; nothing else."""
    path, rng, outcomes = tmp_path / f"t{suffix}", random.Random(5), collections.Counter()
    save(path, small_tree())
    raw = path.read_bytes()
    most = 8 + int.from_bytes(raw[:8], "little") if suffix == ".safetensors" else len(raw)
    for _ in range(500):
        data = bytearray(raw)
        for _ in range(rng.choice((1, 1, 3))):
            at = rng.randrange(min(most, len(data)))
            if rng.random() < 0.3:
                del data[at : at + rng.choice((1, 8, 100))]
            else:
                data[at] = rng.choice(b'0123456789[]{},:"ntf-.\0\xff')
        path.write_bytes(data)
        try:
            tree = load(path)
        except (ValueError, TypeError) as error:
            outcomes["refused" if str(error).startswith(f"cannot load {path}: ") else str(error)] += 1
            continue
        outcomes["read"] += 1
        for leaf in tree.values():
            if isinstance(leaf, QArray):
                assert np.isfinite(leaf.dequantize()).all()
    assert set(outcomes) == {"refused", "read"}
    assert outcomes["refused"] > 300


# ---- indices


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda i: i["weight_map"].update(a="../1.safetensors"), "plain names"),
        (lambda i: i["weight_map"].update(a="/etc/1.safetensors"), "plain names"),
        (lambda i: i["weight_map"].update(a="C:1.safetensors"), "plain names"),
        (lambda i: i["weight_map"].update(a="passwd"), "plain names"),
        (lambda i: i["weight_map"].update(a=3), "plain names"),
        (lambda i: i["weight_map"].update(a="2.safetensors"), "array 'a' must be both|array 'c'"),
        (lambda i: i["weight_map"].pop("b"), "2.safetensors|^$"),
        (lambda i: i["weight_map"].update(d="1.safetensors"), "array 'd' must be both"),
        (lambda i: i.update(weight_map=[]), "weight_map"),
        (lambda i: i.update(metadata=[]), "metadata of the index"),
        (lambda i: i["metadata"].update(aqt_lite=3), "metadata of the index"),
    ],
)
def test_an_index_that_leads_elsewhere(tmp_path, change, words):
    path = hugging_face(tmp_path, change)
    if words.endswith("^$"):  # a file that no array names is none of its business
        assert set(load(path)) == {"a", "c"}
        return
    with pytest.raises(ValueError, match=f"m.safetensors.index.json: .*({words})"):
        load(path)
