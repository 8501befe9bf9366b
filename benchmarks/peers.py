"""Products by weights of 4 bits in groups, and of 8, as other libraries make them: what ``stored.py`` has beside ours.

Owns: the functions of each backend from a float32 weight (N, K) and x (M, K) to calls by name, each with the weight in
float64 that it stands for, so that its error is measured against its own quantization. Those whose packages are missing
are left out and said: ONNX Runtime is in the development set-up, the others come with

    pip install --no-deps optimum-quanto==0.2.7 qwix==0.1.8 ai-edge-litert==2.3.0

torchao 0.18's int4 weights ask for a package of kernels for accelerators (mslk), so there is no row of them.

LiteRT multiplies int8 weights with a scale for each output, by XNNPACK, in two ways: with x rounded to 8 bits, and
in float32, by weights of which it makes floats as a model is loaded. That it has a product of float32 with int8 as it
lies, nothing in its answers shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import run
import torch

import aqt_lite
from aqt_lite import PerChannel, PerGroup


class Peer(NamedTuple):
    """A product of another library."""

    call: Callable[[int], Any]
    weight: np.ndarray
    """The weight that it stands for, float64."""
    exact: bool
    """Whether x stays float32; else it loses bits on purpose, and the row is a reference for speed alone."""


def of(backend: str, w: np.ndarray, x: np.ndarray) -> dict[str, Peer]:
    """The peers of a backend by name; what is missing is printed."""
    found: dict[str, Peer] = {}
    for name, made in {"numpy": ON_NUMPY, "torch": ON_TORCH, "jax": ON_JAX}[backend].items():
        try:
            found[f"peer: {name}"] = made(w, x)
        except ImportError as missing:
            print(f"  {backend}: no row for {name}: {missing}")
    return found


def matmul_nbits(size: int, level: int) -> Callable[..., Peer]:
    """ONNX Runtime's operator; level 1 computes in float32, 4 rounds rows of x to 8 bits."""

    def made(w: np.ndarray, x: np.ndarray) -> Peer:
        import onnx
        import onnxruntime

        columns, inner = w.shape
        how = {"granularity": PerGroup(size), "dialect": "onnxruntime"}
        q = aqt_lite.quantize(w, "uint4", scheme="symmetric", **how)

        def session(_: int) -> Any:
            """With the weight as a constant, which the operator packs for itself once."""
            constants = {
                "b": q.to_bytes("dense").reshape(columns, inner // size, size // 2),
                "s": np.ascontiguousarray(q.scale).reshape(-1),
            }
            node = onnx.helper.make_node(
                "MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft",
                K=inner, N=columns, bits=4, block_size=size, accuracy_level=level,
            )  # fmt: skip
            infos = [
                onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["m", k])
                for n, k in (("x", inner), ("y", columns))
            ]
            initializers = [onnx.numpy_helper.from_array(a, n) for n, a in constants.items()]
            graph = onnx.helper.make_graph([node], "g", infos[:1], infos[1:], initializers)
            opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
            model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        some = run.rotating(session, q.nbytes, most=4)
        return Peer(lambda i: some[i % len(some)].run(None, {"x": x})[0], as_wide(q.dequantize()), level == 1)

    return made


def quanto_int4(w: np.ndarray, x: np.ndarray) -> Peer:
    from optimum.quanto import freeze, qint4, quantize

    found = torch.nn.Sequential(layer(w))
    quantize(found, weights=qint4)
    freeze(found)
    given = torch.from_numpy(x)
    return Peer(torch.no_grad()(lambda i: found(given)), as_wide(found[0].weight.dequantize()), True)


def layer(w: np.ndarray) -> torch.nn.Linear:
    made = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    made.weight = torch.nn.Parameter(torch.from_numpy(w.copy()), requires_grad=False)
    return made


def qwix_int4(w: np.ndarray, x: np.ndarray) -> Peer:
    import qwix

    theirs = qwix.quantize(jnp.asarray(w), "int4", channelwise_axes=(0,), tiled_axes={1: 128})
    product = jax.jit(lambda x, q: qwix.dot_general(x, q, (((1,), (1,)), ((), ()))))
    given = jnp.asarray(x)
    return Peer(lambda i: run.wait(product(given, theirs)), as_wide(qwix.dequantize(theirs)), True)


def litert(exact: bool) -> Callable[..., Peer]:
    """LiteRT's FULLY_CONNECTED of int8 weights; ``exact``: after DEQUANTIZE, which leaves x in float32."""

    def made(w: np.ndarray, x: np.ndarray) -> Peer:
        from ai_edge_litert.interpreter import Interpreter

        q = aqt_lite.quantize(w, "int8", scheme="symmetric", granularity=PerChannel(0))
        content = model_of_litert(q, len(x), exact)

        def loaded(_: int) -> Any:
            interpreter = Interpreter(model_content=content, num_threads=torch.get_num_threads())
            interpreter.allocate_tensors()
            interpreter.set_tensor(0, x)
            return interpreter

        some = run.rotating(loaded, q.nbytes * (4 if exact else 1), most=4)

        def call(i: int) -> Any:
            interpreter = some[i % len(some)]
            interpreter.invoke()
            return interpreter.get_tensor(1)

        return Peer(call, as_wide(q.dequantize()), exact)

    return made


def model_of_litert(q: aqt_lite.QuantizedArray, rows: int, exact: bool) -> bytes:
    """A model of one product, ``x`` (tensor 0) to ``y`` (tensor 1), as its schema has it."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    columns, inner = q.shape

    def tensor(name: str, shape: list[int], dtype: str, buffer: int = 0) -> Any:
        made = schema.TensorT()
        made.name, made.shape, made.buffer = name, np.array(shape, np.int32), buffer
        made.type = getattr(schema.TensorType, dtype)
        return made

    def operator(index: int, inputs: list[int], output: int) -> Any:
        made = schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = index, np.array(inputs, np.int32), np.array([output], np.int32)
        return made

    def code(which: int, version: int) -> Any:
        made = schema.OperatorCodeT()
        made.builtinCode = made.deprecatedBuiltinCode = which
        made.version = version
        return made

    weight = tensor("w", [columns, inner], "INT8", buffer=1)
    weight.quantization = schema.QuantizationParametersT()
    weight.quantization.scale = np.asarray(q.scale).reshape(-1)
    weight.quantization.zeroPoint = np.zeros(columns, np.int64)
    constant = schema.BufferT()
    constant.data = np.asarray(q.qvalue).view(np.uint8).reshape(-1)
    of_x, of_y = tensor("x", [rows, inner], "FLOAT32"), tensor("y", [rows, columns], "FLOAT32")
    product = operator(0, [0, 3 if exact else 2, -1], 1)
    product.builtinOptionsType = schema.BuiltinOptions.FullyConnectedOptions
    product.builtinOptions = schema.FullyConnectedOptionsT()

    graph = schema.SubGraphT()
    graph.name, graph.inputs, graph.outputs = "main", [0], [1]
    graph.tensors, graph.operators = [of_x, of_y, weight], [product]
    if exact:
        graph.tensors.append(tensor("of w", [columns, inner], "FLOAT32"))
        graph.operators.insert(0, operator(1, [2], 3))
    model = schema.ModelT()
    model.version, model.buffers, model.subgraphs = 3, [schema.BufferT(), constant], [graph]
    model.operatorCodes = [
        code(schema.BuiltinOperator.FULLY_CONNECTED, 1 if exact else 12),
        code(schema.BuiltinOperator.DEQUANTIZE, 6),
    ]
    builder = flatbuffers.Builder(q.nbytes)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def as_wide(values: Any) -> np.ndarray:
    values = values.detach() if isinstance(values, torch.Tensor) else values
    return np.asarray(values).astype(np.float64)


ON_NUMPY = {
    "onnxruntime MatMulNBits, groups of 32": matmul_nbits(32, 1),
    "onnxruntime MatMulNBits, groups of 128": matmul_nbits(128, 1),
    "onnxruntime MatMulNBits, groups of 32, x in 8 bits": matmul_nbits(32, 4),
    "LiteRT int8, one scale an output, weights as floats": litert(exact=True),
    "LiteRT int8, one scale an output, x in 8 bits": litert(exact=False),
}
ON_TORCH = {"quanto int4, groups of 128": quanto_int4}
ON_JAX = {"qwix int4, groups of 128": qwix_int4}
