"""Quantization with the same bits on NumPy, JAX, torch and every other Array API library.

>>> import numpy as np, aqt_lite
>>> q = aqt_lite.quantize(np.asarray([[0.1, -127.0], [2.0, 254.0]], "float32"), granularity=aqt_lite.PerChannel(0))
>>> aqt_lite.dequantize(q)
array([[   0., -127.],
       [   2.,  254.]], dtype=float32)
"""

from typing import TYPE_CHECKING

from aqt_lite._missing import SuspectValueWarning
from aqt_lite._progress import progress
from aqt_lite._protocol import IntLimits
from aqt_lite._registry import available_backends, register_backend
from aqt_lite._shapes import concatenate, stack
from aqt_lite.api import ClippingWarning, choose_qparams, dequantize, fake_quantize, int_limits, quantize
from aqt_lite.dialects import Dialect
from aqt_lite.elements import Codebook, Float, Integer
from aqt_lite.formats import Format, register_format
from aqt_lite.granularity import PerBlock, PerChannel, PerGroup, PerTensor
from aqt_lite.ops import dense, einsum, linear
from aqt_lite.qarray import QArray
from aqt_lite.report import ErrorReport, error_report
from aqt_lite.trees import dequantize_tree, plan_tree, quantize_tree, tree_nbytes, tree_report

if TYPE_CHECKING:
    from aqt_lite import cf as cf
    from aqt_lite import equinox as equinox
    from aqt_lite import files as files
    from aqt_lite import jax as jax
    from aqt_lite import linen as linen
    from aqt_lite import nnx as nnx
    from aqt_lite import plots as plots
    from aqt_lite import testing as testing
    from aqt_lite import torch as torch
    from aqt_lite import xarray as xarray
    from aqt_lite import zarr as zarr
    from aqt_lite.comparison import Comparison as Comparison
    from aqt_lite.comparison import compare as compare
    from aqt_lite.conversion import convert as convert
    from aqt_lite.files import load as load
    from aqt_lite.files import save as save
    from aqt_lite.significant import bit_information as bit_information
    from aqt_lite.significant import bitround as bitround
    from aqt_lite.significant import keepbits_for as keepbits_for
    from aqt_lite.warming import warm_up as warm_up

__all__ = [
    "ClippingWarning",
    "Codebook",
    "Comparison",
    "Dialect",
    "ErrorReport",
    "Float",
    "Format",
    "IntLimits",
    "Integer",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "QArray",
    "SuspectValueWarning",
    "available_backends",
    "bit_information",
    "bitround",
    "choose_qparams",
    "compare",
    "concatenate",
    "convert",
    "dense",
    "dequantize",
    "dequantize_tree",
    "einsum",
    "error_report",
    "fake_quantize",
    "int_limits",
    "keepbits_for",
    "linear",
    "load",
    "plan_tree",
    "progress",
    "quantize",
    "quantize_tree",
    "register_backend",
    "register_format",
    "save",
    "stack",
    "tree_nbytes",
    "tree_report",
    "warm_up",
]
__version__ = "0.1.0"


_OF_A_LIBRARY = ("equinox", "jax", "linen", "nnx", "torch", "xarray", "zarr")
_ON_FIRST_USE = (*_OF_A_LIBRARY, "cf", "files", "plots", "testing")  # most programs need none of them
_FROM = {
    "Comparison": "comparison",
    "bit_information": "significant",
    "bitround": "significant",
    "compare": "comparison",
    "convert": "conversion",
    "keepbits_for": "significant",
    "load": "files",
    "save": "files",
    "warm_up": "warming",
}

if not TYPE_CHECKING:  # type checkers take a module with __getattr__ to have every name

    def __getattr__(name: str) -> object:
        """Import ``aqt_lite.testing``, ``aqt_lite.xarray`` and the like on first use."""
        import importlib

        if name in _ON_FIRST_USE:
            return importlib.import_module(f"aqt_lite.{name}")
        if name in _FROM:
            return getattr(importlib.import_module(f"aqt_lite.{_FROM[name]}"), name)
        raise AttributeError(f"module 'aqt_lite' has no attribute {name!r}")


def __dir__() -> list[str]:
    names = {*globals(), *_ON_FIRST_USE, *_FROM}
    return sorted(names - {*_OF_A_LIBRARY})  # what looks at every name should not have to import it
