"""Operations on quantized arrays."""

from aqt_lite.ops.contraction import DimensionNumbers, dot_general, einsum
from aqt_lite.ops.matmul import Mode, dense, linear

__all__ = ["DimensionNumbers", "Mode", "dense", "dot_general", "einsum", "linear"]
