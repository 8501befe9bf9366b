"""The libraries whose dialects this one speaks, each as one function: float32 rows in, codes, scales, zero points out.

Owns: which functions of which version are meant, in one place. Each package is imported where it is used, so that the
golden vectors can be made where their pins fight. Rows are blocks: an original that knows no groups is given them so.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from oracles.pieces import definition

Found = tuple[np.ndarray, np.ndarray, "np.ndarray | None"]
"""Codes of (rows, columns); float32 scales and int32 zero points, or float32 offsets, one a row; of block formats the
codes of scales."""


@dataclass(frozen=True)
class Original:
    """A library, and what it makes of rows that each share a scale."""

    packages: tuple[str, ...]
    quantize: Callable[[np.ndarray, str, str], Found]
    """(x, dtype, scheme): a scale for each row."""
    limits: tuple[tuple[str, float], ...] = ()
    """Magnitudes from which on it makes no sense of values, by format."""

    def versions(self) -> dict[str, str]:
        """Raises PackageNotFoundError where one is not installed."""
        return {name: importlib.metadata.version(name).partition("+")[0] for name in self.packages}


def _bits(dtype: str) -> tuple[bool, int]:
    return not dtype.startswith("u"), int(dtype.lstrip("uint"))


# ---- torch


def _decomposed(rows: Any, scale: Any, zero: Any, kind: Any) -> np.ndarray:
    """What exports hold; fake_quantize gives the same codes, as values."""
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operators

    low, high, plain = (-128, 127, torch.int8) if kind == torch.qint8 else (0, 255, torch.uint8)
    codes = torch.ops.quantized_decomposed.quantize_per_channel(rows, scale, zero, 0, low, high, plain)
    faked = torch.fake_quantize_per_channel_affine(rows, scale, zero.int(), 0, low, high)
    assert torch.equal(faked, (codes.float() - zero[:, None]) * scale[:, None])
    for row, s, z, found in zip(rows, scale.tolist(), zero.tolist(), codes, strict=True):  # the same, tensor by tensor
        alone = torch.ops.quantized_decomposed.quantize_per_tensor(row, s, z, low, high, plain)
        faked = torch.fake_quantize_per_tensor_affine(row, s, z, low, high)
        assert torch.equal(alone, found)
        assert torch.equal(faked, (found.float() - z) * torch.tensor(s))
    return codes.numpy()


def _quantized_tensor(rows: Any, scale: Any, zero: Any, kind: Any) -> np.ndarray:
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operators

    codes = torch.quantize_per_channel(rows, scale, zero, 0, kind).int_repr()
    low, high, plain = (-128, 127, torch.int8) if kind == torch.qint8 else (0, 255, torch.uint8)
    groups = torch.ops.quantized_decomposed.quantize_per_channel_group(
        rows, scale.float()[:, None], zero.int()[:, None], low, high, plain, rows.shape[1]
    )
    assert torch.equal(groups, codes)
    return codes.numpy()


def _one_tensor_each(rows: Any, scale: Any, zero: Any, kind: Any) -> np.ndarray:
    """With AVX2 and FMA, as torch (fbgemm) compiles it on x86."""
    import torch

    found = [
        torch.quantize_per_tensor(row, s, z, kind).int_repr()
        for row, s, z in zip(rows, scale.tolist(), zero.tolist(), strict=True)
    ]
    return torch.stack(found).numpy()


def _torch_per_token(x: np.ndarray, dtype: str, scheme: str) -> Found:
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operators

    rows, ops = torch.from_numpy(x), torch.ops.quantized_decomposed
    scale, zero = ops.choose_qparams_per_token(rows, torch.int8)
    codes = ops.quantize_per_token(rows, scale, zero, -128, 127, torch.int8)
    return codes.numpy(), scale.numpy().reshape(-1), zero.numpy().reshape(-1).astype(np.int32)


def _torch(x: np.ndarray, dtype: str, scheme: str, encode: Callable[..., np.ndarray] = _decomposed) -> Found:
    import torch
    import torch.ao.quantization.fx._decomposed  # registers the operators
    from torch.ao.quantization.observer import PerChannelMinMaxObserver

    how = torch.per_channel_symmetric if scheme == "symmetric" else torch.per_channel_affine
    kind = getattr(torch, f"q{dtype}")
    observer = PerChannelMinMaxObserver(ch_axis=0, dtype=kind, qscheme=how)
    rows = torch.from_numpy(x)
    observer(rows)
    scale, zero = observer.calculate_qparams()
    choose = "choose_qparams_symmetric" if scheme == "symmetric" else "choose_qparams"
    for row, s, z in zip(rows, scale, zero, strict=True):  # what exports of dynamic quantization hold
        low, high = (-128, 127) if dtype == "int8" else (0, 255)
        found = getattr(torch.ops.quantized_decomposed, choose).tensor(row, low, high, 2.0**-23, getattr(torch, dtype))
        assert found[0].float() == s
        assert found[1] == z
    codes = encode(rows, scale, zero, kind)
    return codes, scale.numpy(), zero.numpy().astype(np.int32)


# ---- ONNX


@functools.cache
def _dynamic_quantize_linear() -> Any:
    import onnx
    import onnxruntime

    graph = onnx.parser.parse_graph(
        "g (float[n] x) => (uint8[n] y, float s, uint8 z) { y, s, z = DynamicQuantizeLinear(x) }"
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _onnx(x: np.ndarray, dtype: str, scheme: str) -> Found:
    from onnxruntime.quantization import quant_utils

    if scheme == "affine":
        found = [_dynamic_quantize_linear().run(None, {"x": row}) for row in x]
        codes, scale, zero = (np.stack([f[i] for f in found]) for i in range(3))
        return codes, scale.reshape(-1), zero.reshape(-1).astype(np.int32)
    import onnx

    kind = getattr(onnx.TensorProto, dtype.upper())
    found = [quant_utils.quantize_data(row, kind, symmetric=True) for row in x]
    zero, scale, codes = (np.stack([np.asarray(f[i]) for f in found]) for i in range(3))
    return codes, scale.astype(np.float32), zero.astype(np.int32)


# ---- ONNX Runtime's MatMulNBits


def _unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes of some bits along the last axis, as a dense stream of bits from the lowest on."""
    whole = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*packed.shape[:-1], -1, bits)
    return (whole * (1 << np.arange(bits))).sum(-1)


def _matmul_nbits(x: np.ndarray, dtype: str, scheme: str) -> Found:
    from onnxruntime.capi import _pybind_state as ort

    (signed, bits), (rows, columns), symmetric = _bits(dtype), x.shape, scheme == "symmetric"
    scale, weight = np.zeros((rows, 1), np.float32), np.ascontiguousarray(x.T)  # a column is a block
    if signed:
        packed, zero = np.zeros(x.size // 2, np.uint8), np.zeros(-(-rows // 2), np.uint8)
        ort.quantize_qdq_matmul_4bits(packed, weight, scale.reshape(1, -1), zero, columns, rows, columns, True)
        codes = _unpacked(packed, 4).reshape(columns, rows).T
        return np.where(codes > 7, codes - 16, codes), scale.reshape(-1), None
    packed, zero = np.zeros((rows, 1, columns * bits // 8), np.uint8), np.zeros((rows, 1), np.uint8)
    quantize = getattr(ort, f"quantize_matmul_{bits}bits")
    quantize(packed, weight, scale, zero, columns, rows, columns, symmetric)
    zeros = np.full(rows, 1 << (bits - 1)) if symmetric else zero.reshape(-1) & ((1 << bits) - 1)
    return _unpacked(packed.reshape(rows, -1), bits), scale.reshape(-1), zeros


# ---- MLX


def _widened(a: Any) -> np.ndarray:
    import mlx.core as mx

    return np.array(a.astype(mx.float32) if a.dtype == mx.bfloat16 else a)


def _mlx(x: np.ndarray, dtype: str, scheme: str) -> Found:
    import mlx.core as mx

    bits = 8 if dtype == "mxfp8_e4m3" else 4 if scheme == "symmetric" else _bits(dtype)[1]
    mode = "affine" if scheme == "offsets" else dtype.partition("_")[0]
    group = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16, "affine": x.shape[1]}[mode]
    with mx.stream(mx.cpu):
        packed, *rest = (_widened(a) for a in mx.quantize(mx.array(x), group_size=group, bits=bits, mode=mode))
    codes = _unpacked(packed.view(np.uint8), bits)
    if mode == "affine":
        return codes, rest[0].reshape(-1), rest[1].reshape(-1)
    return codes.astype(np.uint8), rest[0], None


# ---- GPTQ and AWQ, without their calibration


def _gptq(x: np.ndarray, dtype: str, scheme: str) -> Found:
    from types import SimpleNamespace

    import torch

    names = {"torch": torch, "nn": torch.nn, "BaseQuantizeConfig": None, "HF_OPTIMUM": ""}
    for name in ("_replace_zero_scale", "quantize", "Quantizer"):
        names[name] = definition("gptqmodel", "gptqmodel/quantization/quantizer.py", name, **names)
    quantizer = names["Quantizer"](SimpleNamespace(sym=scheme == "symmetric", mse=0.0, bits=_bits(dtype)[1]))
    quantizer.configure(perchannel=True)
    rows = torch.from_numpy(x)
    quantizer.find_params(rows, weight=True)
    values = quantizer.quantize(rows)
    scale, zero = quantizer.scale.double(), quantizer.zero
    codes = torch.round(values.double() / scale) + zero  # it gives codes times scales, each product rounded once
    return codes.numpy(), quantizer.scale.numpy().reshape(-1), zero.numpy().reshape(-1)


def _awq(x: np.ndarray, dtype: str, scheme: str) -> Found:
    from types import SimpleNamespace

    import torch

    quantize = definition("autoawq", "awq/quantize/quantizer.py", "AwqQuantizer.pseudo_quantize_tensor", torch=torch)
    settings = SimpleNamespace(w_bit=_bits(dtype)[1], group_size=x.shape[1], zero_point=scheme == "affine")
    values, scale, zero = quantize(settings, torch.from_numpy(x))
    codes = torch.round(values.double() / scale.double()) + (0 if zero is None else zero)  # as above
    return codes.numpy(), scale.numpy().reshape(-1), None if zero is None else zero.numpy().reshape(-1)


# ---- HQQ


def _hqq(x: np.ndarray, dtype: str, scheme: str, round_zero: bool = False) -> Found:
    import torch
    from hqq.core.quantize import Quantizer

    codes, said = Quantizer.quantize(
        torch.from_numpy(x), nbits=_bits(dtype)[1], group_size=x.shape[1], optimize=False, round_zero=round_zero,
        axis=1, bitpack=False, device="cpu",
    )  # fmt: skip
    offset = -said["zero"] * said["scale"]
    return codes.numpy(), said["scale"].numpy().reshape(-1), offset.numpy().reshape(-1)


# ---- Keras


def _keras(x: np.ndarray, dtype: str, scheme: str) -> Found:
    os.environ.setdefault("KERAS_BACKEND", "numpy")
    import keras

    ends = {"int4": (-8, 7), "int8": (-127, 127)}[dtype]  # those of its layers
    codes, inverse = keras.quantizers.abs_max_quantize(x, axis=1, value_range=ends, dtype="int8")
    return np.asarray(codes), np.float32(1) / np.asarray(inverse).reshape(-1), None


# ---- ModelOpt


def _modelopt(x: np.ndarray, dtype: str, scheme: str) -> Found:
    import torch
    from modelopt.torch.quantization import qtensor

    rows = torch.from_numpy(x)
    if dtype == "nvfp4":
        return modelopt_nvfp4(x)[:3]
    if dtype == "int4":
        made, inverse = qtensor.INT4QTensor.quantize(rows, block_size=x.shape[1])
        codes = _nibbles(made._quantized_data.numpy().reshape(len(x), -1), low_first=False).astype(np.int8) - 8
        return codes, 1 / inverse.numpy().reshape(-1), None
    kind = {"int8": qtensor.INT8QTensor, "float8_e4m3fn": qtensor.FP8QTensor}[dtype]
    made, scale = kind.quantize(rows, axis=0)
    codes = made._quantized_data
    return (codes if dtype == "int8" else codes.view(torch.uint8)).numpy(), scale.numpy().reshape(-1), None


def modelopt_nvfp4(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes, those of scales, None, the tensor scale, values."""
    import torch
    from modelopt.torch.quantization import qtensor

    made, scale, tensor = qtensor.NVFP4QTensor.quantize(torch.from_numpy(np.array(x)), 16)
    values = made.dequantize(scale=scale, double_scale=tensor, block_sizes={-1: 16})
    codes = _nibbles(made._quantized_data.numpy(), low_first=True)
    values = np.where(codes == 8, np.float32(-0.0), values.numpy())  # which it reads as 0
    return codes, scale.view(torch.uint8).numpy(), None, tensor.numpy(), values


# ---- torchao


def _nibbles(packed: np.ndarray, low_first: bool) -> np.ndarray:
    """Codes of 4 bits along the last axis."""
    parts = (packed & 15, packed >> 4) if low_first else (packed >> 4, packed & 15)
    return np.stack(parts, -1).reshape(*packed.shape[:-1], -1)


def torchao_nvfp4(x: np.ndarray, *, with_tensor_scale: bool = True) -> tuple[np.ndarray, ...]:
    """Codes, those of scales, None, the tensor scale, values."""
    import torch
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    rows = torch.from_numpy(np.ascontiguousarray(x))
    tensor = per_tensor_amax_to_scale(rows.abs().max()) if with_tensor_scale else None
    made = NVFP4Tensor.to_nvfp4(rows, per_tensor_scale=tensor)
    codes = _nibbles(made.qdata.view(torch.uint8).numpy(), low_first=True)
    tensor = np.float32(1) if tensor is None else tensor.numpy()
    return codes, made.scale.view(torch.uint8).numpy(), None, tensor, made.dequantize().numpy()


def _torchao_no_tensor_scale(x: np.ndarray, dtype: str, scheme: str) -> Found:
    return torchao_nvfp4(x, with_tensor_scale=False)[:3]


def _torchao_tinygemm(x: np.ndarray, dtype: str, scheme: str) -> Found:
    """Its unsigned codes less half their number: then what it calls a zero point is the offset.

    The least scale, 2^-126 by default, is an argument there; constant blocks have it.
    """
    import torch
    from torchao.quantization import quant_primitives as ao

    bits = _bits(dtype)[1]
    rows, block, codes = torch.from_numpy(x), (1, x.shape[1]), (torch.uint8, 0, (1 << bits) - 1)
    scale, middle = ao._choose_qparams_affine_tinygemm(rows, ao.MappingType.ASYMMETRIC, block, *codes, eps=2.0**-100)
    found = ao._quantize_affine_tinygemm(rows, block, scale, middle, *codes).numpy().astype(np.int16) - (
        1 << (bits - 1)
    )
    return found, scale.numpy().reshape(-1), middle.numpy().reshape(-1)


def _torchao_no_zero(x: np.ndarray, dtype: str, scheme: str) -> Found:
    """Ranges without zero, and integer zero points."""
    import torch
    from torchao.quantization import quant_primitives as ao

    rows, block, codes = torch.from_numpy(x), (1, x.shape[1]), _torchao_codes(dtype)
    scale, zero = ao._choose_qparams_affine_dont_preserve_zero(rows, ao.MappingType.ASYMMETRIC, block, *codes)
    found = ao.quantize_affine(rows, block, scale, zero, *codes)
    return found.numpy(), scale.numpy().reshape(-1), zero.numpy().reshape(-1).astype(np.int32)


def _torchao_codes(dtype: str) -> tuple[Any, int, int]:
    import torch

    signed, bits = _bits(dtype)
    if signed:
        return torch.int8, -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return torch.uint8, 0, (1 << bits) - 1


def _torchao_mx(x: np.ndarray, dtype: str) -> Found:
    import torch
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    if dtype == "nvfp4":
        return torchao_nvfp4(x)[:3]
    kinds = {"mxfp8_e4m3": "float8_e4m3fn", "mxfp8_e5m2": "float8_e5m2", "mxfp4": "float4_e2m1fn_x2"}
    scale, codes = to_mx(torch.from_numpy(x), getattr(torch, kinds[dtype]), 32)
    codes = codes.view(torch.uint8).numpy()
    return _nibbles(codes, low_first=True) if dtype == "mxfp4" else codes, scale.view(torch.uint8).numpy(), None


def _torchao(x: np.ndarray, dtype: str, scheme: str, mapping: str | None = None) -> Found:
    if dtype.startswith(("mx", "nv")):
        return _torchao_mx(x, dtype)
    import torch
    from torchao.quantization import quant_primitives as ao

    rows = torch.from_numpy(x)
    block = (1, x.shape[1])
    if dtype.startswith("float8"):
        scale = ao._choose_scale_float8(rows, block, getattr(torch, dtype))
        codes = ao._quantize_affine_float8(rows, scale, getattr(torch, dtype))
        return codes.view(torch.uint8).numpy(), scale.numpy().reshape(-1), None
    kind, low, high = _torchao_codes(dtype)
    how = getattr(ao.MappingType, mapping or ("SYMMETRIC" if scheme == "symmetric" else "ASYMMETRIC"))
    scale, zero = ao.choose_qparams_affine(rows, how, block, kind, low, high)
    codes = ao.quantize_affine(rows, block, scale, zero, kind, low, high)
    if low < 0 and scheme == "symmetric":  # ZeroPointDomain.NONE
        assert torch.equal(codes, ao._quantize_affine_no_zero_point(rows, block, scale, None, kind, low, high))
    return codes.numpy(), scale.numpy().reshape(-1), zero.numpy().reshape(-1).astype(np.int32)


# ---- qwix


def _qwix(x: np.ndarray, dtype: str, scheme: str) -> Found:
    import jax.numpy as jnp
    import qwix

    if dtype.startswith(("mx", "nv")):
        return _qwix_blocks(x, dtype)
    method = "absmax" if scheme == "symmetric" else "minmax"
    kind = dtype if dtype in ("int2", "int3", "int5", "int6", "int7", "nf4") else getattr(jnp, dtype)
    found = qwix.quantize(jnp.asarray(x), kind, channelwise_axes=(0,), calibration_method=method)
    codes = _bits_of_codes(np.asarray(found.qvalue))
    zero = None if found.zero_point is None else np.asarray(found.zero_point).astype(np.int32).reshape(-1)
    return codes, np.asarray(found.scale).reshape(-1), zero


def _bits_of_codes(codes: np.ndarray) -> np.ndarray:
    if not codes.dtype.name.startswith("float"):
        return codes.astype(np.int16)
    return codes.view(np.uint8) & (15 if codes.dtype.name.startswith("float4") else 255)


def _qwix_blocks(x: np.ndarray, dtype: str) -> Found:
    """A scale that e4m3 rounds to 0, by which it then divides, makes zeros here."""
    import jax.numpy as jnp
    import ml_dtypes
    import qwix

    group = 16 if dtype == "nvfp4" else 32
    found = qwix.quantize(
        jnp.asarray(x), dtype.removesuffix("_e4m3"), channelwise_axes=(0,), tiled_axes={1: group}
    )  # fmt: skip
    codes, scale = _bits_of_codes(np.asarray(found.qvalue)), np.asarray(found.scale)
    if dtype != "nvfp4":
        return codes, (np.log2(scale.astype(np.float64)) + 127).astype(np.uint8), None
    nothing = np.repeat(scale == 0, group, axis=1)
    return (
        np.where(nothing, np.signbit(x) * np.uint8(8), codes),
        scale.astype(ml_dtypes.float8_e4m3fn).view(np.uint8),
        None,
    )


# ---- compressed-tensors


def compressed_nvfp4(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes, those of scales, None, the global scale, values."""
    import torch
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    rows, kept = torch.from_numpy(np.ascontiguousarray(x)), torch.float8_e4m3fn
    args = QuantizationArgs(
        num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16, scale_dtype=kept,
        zp_dtype=kept,
    )  # fmt: skip
    overall = generate_gparam(rows.min(), rows.max())
    groups = rows.reshape(len(rows), -1, 16)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=overall)
    found = quantize(rows, scale, None, args, global_scale=overall)
    values = dequantize(found, scale, None, args, global_scale=overall).numpy()
    codes = _nibbles(pack_fp4_to_uint8(found).numpy(), low_first=True)
    return codes, scale.to(kept).view(torch.uint8).numpy(), None, overall.numpy(), values


def _compressed_mx(rows: Any, dtype: str) -> Found:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    bits = 4 if dtype == "mxfp4" else 8
    args = QuantizationArgs(
        num_bits=bits, type="float", symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8,
        zp_dtype=torch.uint8,
    )  # fmt: skip
    groups = rows.reshape(len(rows), -1, 32)
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    values = quantize(rows, scale, None, args)
    if bits == 8:
        codes = values.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    else:
        import ml_dtypes

        codes = values.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    return codes, (np.log2(scale.numpy().astype(np.float64)) + 127).astype(np.uint8), None


def _compressed_tensors(x: np.ndarray, dtype: str, scheme: str) -> Found:
    import torch
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    rows = torch.from_numpy(x)
    if dtype.startswith("mx"):
        return _compressed_mx(rows, dtype)
    if dtype == "nvfp4":
        return compressed_nvfp4(x)[:3]
    is_float = dtype.startswith("float8")
    bits = 8 if is_float else _bits(dtype)[1]
    args = QuantizationArgs(
        num_bits=bits, type="float" if is_float else "int", symmetric=scheme == "symmetric", strategy="channel"
    )
    scale, zero = calculate_qparams(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), args)
    kind = torch.float8_e4m3fn if is_float else torch.int8
    codes = quantize(rows, scale, zero, args, dtype=kind)
    codes = codes.view(torch.uint8).numpy() if is_float else codes.numpy()
    return codes, scale.numpy().reshape(-1), None if is_float else zero.numpy().reshape(-1).astype(np.int32)


# ---- quanto


def _quanto(x: np.ndarray, dtype: str, scheme: str) -> Found:
    import torch
    from optimum.quanto import AbsmaxOptimizer, qfloat8_e4m3fn, qfloat8_e5m2, qint8

    rows = torch.from_numpy(x)
    kind = {"int8": qint8, "float8_e4m3fn": qfloat8_e4m3fn, "float8_e5m2": qfloat8_e5m2}[dtype]
    scale = AbsmaxOptimizer()(rows, kind, axis=0)
    codes = torch.ops.quanto.quantize_symmetric(rows, kind.dtype, 0, scale)
    codes = codes.numpy() if dtype == "int8" else codes.view(torch.uint8).numpy()
    return codes, scale.numpy().reshape(-1), None


# ---- bitsandbytes


def _bitsandbytes(x: np.ndarray, dtype: str, scheme: str) -> Found:
    import torch
    from bitsandbytes import functional

    if dtype == "int8":
        codes, largest, _ = functional.int8_vectorwise_quant(torch.from_numpy(x))
        return codes.numpy(), largest.numpy() * np.float32(1 / 127), None
    codes, scale = bitsandbytes_blocks(x, dtype, x.shape[1])
    return codes.reshape(x.shape), scale, None


def bitsandbytes_blocks(x: np.ndarray, dtype: Any, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes of all elements in their order, and a scale for each block of ``size`` of them."""
    import torch
    from bitsandbytes import functional

    if not isinstance(dtype, str):  # a codebook
        table = torch.tensor(dtype.numbers, dtype=torch.float32)
        codes, state = functional.quantize_blockwise(torch.from_numpy(x), code=table, blocksize=size)
        return codes.numpy().reshape(-1), state.absmax.numpy()
    kind = dtype.removeprefix("bnb_")
    packed, state = functional.quantize_4bit(torch.from_numpy(x), blocksize=size, quant_type=kind)
    return _nibbles(packed.numpy().reshape(-1), low_first=False)[: x.size], state.absmax.numpy()


# ---- TFLite


def _tflite(x: np.ndarray, dtype: str, scheme: str) -> Found:
    from ai_edge_quantizer import qtyping
    from ai_edge_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as u

    bits, symmetric = _bits(dtype)[1], scheme == "symmetric"
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    zero, scale = u.tensor_zp_scale_from_min_max(low, high, bits, symmetric, qtyping.QuantGranularity.CHANNELWISE)
    made = qtyping.UniformQuantParams(
        scale=scale, zero_point=zero, num_bits=bits, symmetric=symmetric, quantized_dimension=0
    )
    codes = u.uniform_quantize(x, made)
    return codes, scale.reshape(-1), zero.reshape(-1).astype(np.int32)


# ---- AQT


def _aqt(x: np.ndarray, dtype: str, scheme: str) -> Found:
    import jax.numpy as jnp
    from aqt.jax.v2 import aqt_quantizer

    quantizer = aqt_quantizer.quantizer_make(_bits(dtype)[1], initialize_calibration=True)
    found, _ = quantizer.quant(jnp.asarray(x), calibration_axes=(1,))
    return np.asarray(found.qvalue).astype(np.int16), np.asarray(found.scale[0]).reshape(-1), None


ORIGINALS: dict[str, Original] = {
    "torch": Original(("torch",), _torch),
    "torch_per_channel": Original(("torch",), functools.partial(_torch, encode=_quantized_tensor)),
    "torch_per_tensor": Original(("torch",), functools.partial(_torch, encode=_one_tensor_each)),
    "torch_per_token": Original(("torch",), _torch_per_token),
    "onnx": Original(("onnxruntime", "onnx"), _onnx),
    "onnxruntime": Original(("onnxruntime",), _matmul_nbits),
    "mlx": Original(("mlx",), _mlx, limits=(("nvfp4", 2.0**33),)),
    "gptq": Original(("gptqmodel", "torch"), _gptq),
    "awq": Original(("autoawq", "torch"), _awq),
    "hqq": Original(("hqq", "torch"), _hqq),
    "hqq_round_zero": Original(("hqq", "torch"), functools.partial(_hqq, round_zero=True)),
    "keras": Original(("keras", "numpy"), _keras),
    "modelopt": Original(("nvidia-modelopt", "torch"), _modelopt),
    "torchao": Original(("torchao", "torch"), _torchao),
    "torchao_no_clipping": Original(
        ("torchao", "torch"), functools.partial(_torchao, mapping="SYMMETRIC_NO_CLIPPING_ERR")
    ),
    "torchao_no_zero": Original(("torchao", "torch"), _torchao_no_zero),
    "torchao_no_tensor_scale": Original(("torchao", "torch"), _torchao_no_tensor_scale),
    "torchao_tinygemm": Original(("torchao", "torch"), _torchao_tinygemm),
    "qwix": Original(("qwix", "jax"), _qwix),
    "compressed-tensors": Original(("compressed-tensors", "torch"), _compressed_tensors),
    "quanto": Original(("optimum-quanto", "torch"), _quanto),
    "bitsandbytes": Original(("bitsandbytes", "torch"), _bitsandbytes),
    "tflite": Original(("ai-edge-quantizer", "numpy"), _tflite),
    "aqt": Original(("aqtp", "jax"), _aqt),
}
