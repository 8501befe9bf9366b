"""Run by test_sharding.py in each of two processes, with two simulated devices each; prints "held" at the end.

    python process_checks.py PORT NUMBER

An array is sharded over all four devices, so that no process has the whole of it.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import aqt_lite
from aqt_lite import PerBlock, PerChannel, PerGroup, dequantize, quantize
from aqt_lite.testing import assert_same_bits

P = PartitionSpec
rng = np.random.default_rng(0)
X = (rng.standard_normal((16, 32)) * 10.0 ** rng.uniform(-2, 2, (16, 32))).astype(np.float32)
CASES = [
    ("int8", {}),
    ("int8", {"granularity": PerChannel(0)}),
    ("uint8", {"granularity": PerChannel(1), "scheme": "affine"}),
    ("int4", {"granularity": PerGroup(4), "scale_dtype": "float16"}),
    ("int8", {"granularity": PerBlock((8, 16)), "scheme": "affine", "offset": "data"}),
    ("mxfp4", {}),
    ("int8", {"scale": 0.5, "on_clip": "saturate"}),
    ("int8", {"scale": 0.5}),
    ("int8", {"missing": "nan"}),
]


def over(mesh, spec, values):
    """The parts of ``values`` that belong to this process's devices, of an array over all."""
    return jax.make_array_from_callback(values.shape, NamedSharding(mesh, spec), lambda at: values[at])


def check_parts(found, wanted, name):
    """The parts that are here have the bits of one device's whole."""
    for shard in found.addressable_shards:
        assert_same_bits(np.asarray(shard.data), np.asarray(wanted)[shard.index]), name


def main():
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
    assert jax.process_count() == 2
    assert len(jax.local_devices()) == 2
    assert jax.device_count() == 4
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("a", "b"), axis_types=(kind, kind))
        for spec in (P("a", "b"), P(("a", "b"), None), P(None, ("a", "b"))):
            x = over(mesh, spec, X)
            assert not x.is_fully_addressable
            for dtype, how in CASES:
                here = quantize(X, dtype, **{**how, "on_clip": "saturate"})
                q = quantize(x, dtype, **how)
                for a, b in zip(q._arrays(), here._arrays(), strict=True):
                    check_parts(a, b, (dtype, how))
                values = dequantize(q)
                check_parts(values, here.dequantize(), (dtype, how))
                assert values.sharding.is_equivalent_to(x.sharding, 2), (kind, spec, dtype, how, values.sharding)
            check_parts(aqt_lite.bitround(x, 7), aqt_lite.bitround(X, 7), "bitround")
        bad = X.copy()
        bad[15, 31] = np.nan  # in the part of the other process
        with pytest.raises(ValueError, match="1 non-finite values of 512, the first at index"):
            quantize(over(mesh, P("a", "b"), bad))
    print("held")


if __name__ == "__main__":
    main()
