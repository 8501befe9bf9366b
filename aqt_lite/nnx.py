"""Quantized Flax NNX models: ``quantize_`` and what it makes.

Owns: nothing; it is the public name of ``aqt_lite.backends.jax.nnx``. Imports: that, and so JAX and Flax. Import it as
``import aqt_lite.nnx``: ``import aqt_lite`` alone imports no framework.
"""

from aqt_lite._extras import installed_by

with installed_by("pip install 'aqt_lite[jax]' flax", __name__):
    from aqt_lite.backends.jax.nnx import QuantizedEmbed, QuantizedParam, plan, quantize_, quantized_weights

__all__ = ["QuantizedEmbed", "QuantizedParam", "plan", "quantize_", "quantized_weights"]
