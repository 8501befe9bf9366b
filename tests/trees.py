"""Trees for the tests of files, and what it is that two of them are the same."""

from __future__ import annotations

import dataclasses
import json

import ml_dtypes
import numpy as np
import pytest

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, QArray, quantize
from aqt_lite.testing import assert_same_bits

SUFFIXES = (".safetensors", ".npz")
either = pytest.mark.parametrize("suffix", SUFFIXES)
X = (np.random.default_rng(0).standard_normal((6, 40)) * 3).astype("float32")
SEVEN = aqt_lite.Codebook("seven_of_test_files", (-1.0, -0.5, -0.2, 0.0, 0.2, 0.5, 1.0))


def double_quantized():
    """Scales in groups that have scales themselves, and offsets in few bits."""
    q = quantize(X, "uint4", scheme="affine", granularity=PerGroup(8), offset="data")
    top = np.max(q.scale, axis=-1, keepdims=True) / 255
    scale = quantize(q.scale, "uint8", granularity=PerGroup(5), scale=top, zero_point=0)
    offset = quantize(q.offset, "int8", granularity=PerGroup(5), scale_dtype="bfloat16")
    return QArray.from_codes(q.qvalue, scale, offset=offset, dtype="uint4", granularity=PerGroup(8))


KINDS = {
    "int8": lambda: quantize(X, granularity=PerChannel(0)),
    "int4, groups of 7": lambda: quantize(X, "int4", granularity=PerGroup(7)),
    "int3, unpacked": lambda: quantize(X, "int3").unpacked(),
    "uint6, affine": lambda: quantize(X, "uint6", scheme="affine", granularity=PerBlock((2, 16))),
    "offsets": lambda: quantize(X, "int4", scheme="affine", offset="data", granularity=PerGroup(8)),
    "float16 scales": lambda: quantize(X, "int4", granularity=PerGroup(8), scale_dtype="float16"),
    "nvfp4": lambda: quantize(X, "nvfp4"),
    "mxfp6": lambda: quantize(X, "mxfp6_e2m3"),
    "own codebook": lambda: quantize(X, SEVEN),
    "double": double_quantized,
    "for_dense": lambda: quantize(X, "int4", granularity=PerGroup(3, axis=0)).for_dense(),
    "heads": lambda: quantize(X.reshape(6, 4, 10), "int4", granularity=PerGroup(3, axis=0)).for_dense(1, 2),
    "trainable": lambda: quantize(X).with_trainable_scales(),
    "bfloat16": lambda: quantize(X.astype(ml_dtypes.bfloat16), "nf4"),
    "float64": lambda: quantize(X.astype("float64"), granularity=PerChannel(1)),
    "one number": lambda: quantize(np.float32(3)),
    "nothing": lambda: quantize(X[:0], "int4", granularity=PerGroup(8)),
}
FOR_EVERY_LIBRARY = [name for name in KINDS if name not in ("bfloat16", "float64")]  # which not every one has


def same(found, expected):
    """The same trees, down to types and bits."""
    assert type(found) is type(expected), (type(found), type(expected))
    if isinstance(expected, QArray):
        assert_same_bits(found, expected)
        for field in dataclasses.fields(QArray):
            if field.name not in ("storage", "scale", "zero_point", "offset"):
                assert getattr(found, field.name) == getattr(expected, field.name), field.name
        assert_same_bits(found.storage, expected.storage)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        assert [type(key) for key in found] == [type(key) for key in expected]
        for key, value in expected.items():
            same(found[key], value)
    elif isinstance(expected, list | tuple):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    elif hasattr(expected, "shape"):
        assert_same_bits(found, expected)
        assert str(found.dtype) == str(expected.dtype)
    else:
        assert repr(found) == repr(expected)


def moved(tree, backend):
    """A tree with its arrays on a backend."""
    if isinstance(tree, dict):
        return {key: moved(value, backend) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(moved(value, backend) for value in tree)
    if isinstance(tree, QArray):
        return tree.to_backend(backend.name)
    return backend.asarray(tree) if isinstance(tree, np.ndarray) else tree


def hugging_face(folder, change=lambda index: None):
    """A model in two files, by another program."""
    package = pytest.importorskip(
        "safetensors.numpy", reason="safetensors is not installed: requirements-dev.txt has it"
    )
    package.save_file({"a": X, "c": X[0]}, folder / "1.safetensors")
    package.save_file({"b": X[1]}, folder / "2.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}
    change(index)
    (folder / "m.safetensors.index.json").write_text(json.dumps(index))
    return folder / "m.safetensors.index.json"
