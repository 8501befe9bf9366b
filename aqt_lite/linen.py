"""Quantized Flax Linen models: ``quantize`` for parameters, ``with_quantized_layers`` for what applies them.

Owns: nothing; it is the public name of ``aqt_lite.backends.jax.linen``. Imports: that, and so JAX and Flax. Import it
as ``import aqt_lite.linen``: ``import aqt_lite`` alone imports no framework.
"""

from aqt_lite._extras import installed_by

with installed_by("pip install 'aqt_lite[jax]' flax", __name__):
    from aqt_lite.backends.jax.linen import plan, quantize, with_quantized_layers

__all__ = ["plan", "quantize", "with_quantized_layers"]
