"""Quantized torch models: ``quantize_`` and the layers that it makes.

Owns: nothing; it is the public name of ``aqt_lite.backends.torch.modules``. Imports: that, and so torch. Import it as
``import aqt_lite.torch``: ``import aqt_lite`` alone imports no framework.
"""

from aqt_lite._extras import installed_by

with installed_by("pip install 'aqt_lite[torch]'", __name__):
    from aqt_lite.backends.torch.modules import (
        QuantizedConv1d,
        QuantizedConv2d,
        QuantizedConv3d,
        QuantizedConvTranspose1d,
        QuantizedConvTranspose2d,
        QuantizedConvTranspose3d,
        QuantizedEmbedding,
        QuantizedLinear,
        QuantizedWeight,
        plan,
        quantize_,
        quantized_weights,
    )

__all__ = [
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose1d",
    "QuantizedConvTranspose2d",
    "QuantizedConvTranspose3d",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedWeight",
    "plan",
    "quantize_",
    "quantized_weights",
]
