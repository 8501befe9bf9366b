"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear of ONNX, by its reference and by onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
from forms import JIT, NUMPY, TORCH, Call, Problem, disagreements
from oracles import dialects as golden

from aqt_lite import PerBlock, PerChannel, PerGroup, PerTensor, quantize
from aqt_lite._registry import get_backend
from aqt_lite.formats import FORMATS

onnx = pytest.importorskip("onnx", reason="onnx is not installed: requirements-dev.txt has it")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: requirements-dev.txt has it")

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint4", "int4", "uint2", "int2")
FLOATS = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn")
WAYS = {  # granularity, attributes of the operator, shape of x
    "tensor": (PerTensor(), {}, (6, 37)),
    "axis": (PerChannel(0), {"axis": 0}, (6, 37)),
    "last axis": (PerChannel(1), {"axis": 1}, (6, 37)),
    "blocks": (PerGroup(16), {"axis": 1, "block_size": 16}, (6, 48)),
    "blocks of the first axis": (PerBlock((4, 1)), {"axis": 0, "block_size": 4}, (12, 5)),
    "ragged blocks": (PerGroup(16), {"axis": 1, "block_size": 16}, (6, 37)),
}


def kind_of(dtype):
    return getattr(onnx.TensorProto, dtype.upper().replace("_", "").replace("FLOAT4E2M1FN", "FLOAT4E2M1"))


def constant(name, array, dtype):
    """One of the graph: the evaluators take no arrays of few bits as inputs."""
    return onnx.helper.make_tensor(name, kind_of(dtype), np.shape(array), np.asarray(array, np.float32).reshape(-1))


def model(operator, scale, zero, dtype, attributes, of_codes=None):
    """One operator on ``x``, or on codes that are a constant; it gives numbers as floats, which hold them exactly."""
    floats = onnx.TensorProto.FLOAT
    constants = [onnx.numpy_helper.from_array(scale, "s"), constant("z", zero, dtype)]
    nodes = [onnx.helper.make_node(operator, ["x", "s", "z"], ["y"], **attributes)]
    inputs, output = [onnx.helper.make_tensor_value_info("x", floats, None)], "y"
    if of_codes is not None:
        constants.append(constant("x", of_codes, dtype))
        inputs = []
    else:
        nodes.append(onnx.helper.make_node("Cast", ["y"], ["f"], to=floats))
        output = "f"
    outputs = [onnx.helper.make_tensor_value_info(output, floats, None)]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 25)], ir_version=12)


def by_reference(made, feed):
    reference = pytest.importorskip("onnx.reference", reason="a part of onnx")
    return reference.ReferenceEvaluator(made).run(None, feed)[0]


def by_runtime(made, feed):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def problem(dtype, way):
    """x near ties of given scales, and zero points of every parity."""
    granularity, _, shape = WAYS[way]
    rng = np.random.default_rng(len(way))
    element = FORMATS[dtype].element
    grid = quantize(np.ones(shape, np.float32), "int8", granularity=granularity).scale.shape
    scale = rng.uniform(0.01, 0.2, grid).astype(np.float32)
    low, high = element.codes if element.zero_points else (-8, 7)
    x = (rng.integers(low - 2, high + 3, shape) + rng.choice([0.0, 0.5], shape)).astype(np.float32)
    block = quantize(x, "int8", granularity=granularity).block
    wide = scale
    for axis, (n, size) in enumerate(zip(shape, block, strict=True)):
        wide = wide.repeat(n if size is None else size, axis=axis).take(range(n), axis=axis)
    zero = rng.integers(low, high + 1, grid).astype(np.int32) if element.zero_points else None
    return Problem((x * wide).astype(np.float32), Call(dtype, "symmetric", granularity, dialect="onnx"), scale, zero)


def evaluators(dtype):
    """onnxruntime 1.32 has no operators for FLOAT4E2M1 on a CPU."""
    return (by_reference,) if dtype == "float4_e2m1fn" else (by_reference, by_runtime)


@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_given_scales_in_every_granularity(dtype):
    """Codes of QuantizeLinear, values of DequantizeLinear."""
    problems = [problem(dtype, way) for way in WAYS]
    found = [p.call(p.x, p.scale, p.zero_point) for p in problems]
    for p, q, (_, attributes, _) in zip(problems, found, WAYS.values(), strict=True):
        shape = p.scale.shape if "block_size" in attributes else (-1,) if attributes else ()
        scale = p.scale.reshape(shape)
        zero = np.zeros(scale.shape) if p.zero_point is None else p.zero_point.reshape(shape)
        numbers = FORMATS[dtype].element.decode(q.codes, get_backend("numpy"), "float32").astype(np.float32)
        for evaluated in evaluators(dtype):
            codes = evaluated(model("QuantizeLinear", scale, zero, dtype, attributes), {"x": p.x})
            np.testing.assert_array_equal(codes, numbers)
            values = evaluated(model("DequantizeLinear", scale, zero, dtype, attributes, of_codes=numbers), {})
            np.testing.assert_array_equal(values, q.values)
    assert disagreements(problems, found, (NUMPY, TORCH)) == {}
    if dtype in ("int4", "uint8", "float8_e4m3fn"):
        assert disagreements(problems[-1:], found[-1:], (JIT,)) == {}


def test_scales_and_zero_points_of_the_dynamic_operator():
    text = "g (float[n] x) => (uint8[n] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }"
    made = onnx.helper.make_model(
        onnx.parser.parse_graph(text), opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    reference = pytest.importorskip("onnx.reference", reason="a part of onnx").ReferenceEvaluator(made)
    for x in golden.rows("uint8", 8):
        q = quantize(x, "uint8", scheme="affine", dialect="onnx")
        for evaluator in (session, reference) if x.any() else (session,):  # the reference has NaN for zeros
            codes, scale, zero = evaluator.run(None, {"x": x})
            np.testing.assert_array_equal(q.qvalue, codes)
            assert (q.scale[0], q.zero_point[0]) == (scale, zero)
