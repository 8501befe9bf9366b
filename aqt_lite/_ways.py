"""What other arrays have and a ``QArray`` has not, and what does the same: words for errors.

Owns: that table, each way beside the names that people try, and the name of a format that says so, too. Imports:
nothing of this package.
"""

from __future__ import annotations

from typing import Any, NoReturn

__all__ = ["FormatName", "no_array_of", "not_a_qarray", "way_to"]

_WAYS = {
    "q.to_device(device) moves it, q.to_backend(name) makes it another library's, q.dequantize(dtype) is its values": (
        "to cpu cuda device_put"
    ),
    "q.dequantize(dtype) is its values in that type": "float half double bfloat16 type view values dequant",
    "q.to_backend('numpy') has the same bits in arrays of NumPy, and its dequantize() the values": "numpy",
    "q.dequantize().tolist() lists its values": "tolist item",
    "q.transpose(...) orders its axes, and q.mT swaps the last two": "swapaxes moveaxis permute permute_dims t",
    "q.reshape(shape) where blocks stay whole, q[None] and q[:, 0] add and drop axes": (
        "ravel flatten squeeze unsqueeze expand_dims"
    ),
    "aqt_lite.concatenate and aqt_lite.stack join several, q.broadcast_to(shape) repeats": "repeat tile expand",
    "x @ q, aqt_lite.dense(x, q), aqt_lite.linear(x, q) and aqt_lite.einsum are its products": (
        "dot matmul mm bmm einsum"
    ),
    "q.copy() has arrays of its own": "clone contiguous",
    "it is a constant of derivatives, but for scales of q.with_trainable_scales(), and modules of torch hold it as "
    "aqt_lite.torch.QuantizedWeight(q)": "requires_grad requires_grad_ grad detach backward",
    "q.ndim, q.size, q.nbytes and q.bits say how large it is": "dim numel itemsize element_size strides stride",
    "aqt_lite.save(path, q) writes it, pickle, too, and q.to_bytes(layout) has bytes that other libraries read": (
        "save dump tofile tobytes data ctypes data_ptr"
    ),
    "q.storage, q.scale and q.zero_point are its arrays, and q.qvalue has its codes, one an element": (
        "int_repr q_scale q_zero_point codes zero_points block_until_ready sharding devices"
    ),
}
_WAY_OF = {name: way for way, names in _WAYS.items() for name in names.split()}


def way_to(name: str) -> str:
    """What to do where other arrays would be asked for the attribute ``name``."""
    parts = "q.dequantize() is the array of its values, and q.storage, q.scale, q.zero_point are its parts"
    return _WAY_OF.get(name, parts)


def not_a_qarray(name: str, value: Any) -> str:
    """What to do with ``value``, an argument that is no quantized array, but may hold one as weights of layers do."""
    words = f"{name} is a {type(value).__name__}, not a QArray: "
    if hasattr(getattr(value, "qarray", None), "packed_length"):
        return words + f"give {name}.qarray, which it holds"
    if callable(getattr(value, "get_value", None)) and hasattr(value.get_value(), "packed_length"):
        return words + f"give {name}[...], which it holds"
    return words + "quantize it first with aqt_lite.quantize"


def no_array_of(library: str, node: Any, of_models: str) -> str:
    """What to do where a function of ``library`` was given a quantized array for one of its arrays."""
    return (
        f"functions of {library} take arrays, and a QArray ({node.dtype}, shape {node.shape}) does not become one by "
        "itself: x @ q, aqt_lite.dense(x, q), aqt_lite.linear(x, q) and aqt_lite.einsum are its products and keep it "
        "quantized, q.dequantize() is the array of its values, aqt_lite.concatenate and aqt_lite.stack join several; "
        f"{of_models} makes layers of a model take it"
    )


class FormatName(str):
    """A ``QArray.dtype``, which other libraries ask as they ask an array's, before they ask anything else."""

    __slots__ = ()

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # protocols ask
            raise AttributeError(name)
        raise AttributeError(
            f"the dtype of a QArray is the name of its format, {str(self)!r}, without {name!r}: a QArray is no array. "
            "aqt_lite.save(path, q) stores it, aqt_lite.files.to_arrays(tree) gives arrays that anything stores, and "
            "q.dequantize() its values"
        )
