"""Operations on quantized arrays."""

from aqt_lite.ops.matmul import dense, linear

__all__ = ["dense", "linear"]
