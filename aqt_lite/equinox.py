"""Quantized Equinox models: ``quantize`` and the layers that it puts into them.

Owns: nothing; it is the public name of ``aqt_lite.backends.jax.equinox``. Imports: that, and so JAX and Equinox. Import
it as ``import aqt_lite.equinox``: ``import aqt_lite`` alone imports no framework.
"""

from aqt_lite._extras import installed_by

with installed_by("pip install 'aqt_lite[jax]' equinox", __name__):
    from aqt_lite.backends.jax.equinox import (
        QuantizedConv,
        QuantizedConvTranspose,
        QuantizedEmbedding,
        QuantizedLinear,
        plan,
        quantize,
    )

__all__ = ["QuantizedConv", "QuantizedConvTranspose", "QuantizedEmbedding", "QuantizedLinear", "plan", "quantize"]
