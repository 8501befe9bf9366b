"""JAX's functions for arrays that may be quantized, and training beside those that are.

Owns: nothing; it is the public name of what ``aqt_lite.backends.jax`` has for users. Imports: that, and so JAX. Import
it as ``import aqt_lite.jax``: ``import aqt_lite`` alone imports no framework.

>>> import jax, jax.numpy as jnp, aqt_lite.jax
>>> table = aqt_lite.quantize(jnp.ones((50, 64)), granularity=aqt_lite.PerChannel(0))
>>> jax.jit(aqt_lite.jax.take, static_argnames="axis")(table, jnp.arange(7), axis=0).shape
(7, 64)
"""

from aqt_lite._extras import installed_by

with installed_by("pip install 'aqt_lite[jax]'", __name__):
    from aqt_lite.backends.jax import combine, partition, register_loops
    from aqt_lite.backends.jax.functions import conv_general_dilated, dequantize, dot_general, einsum, take

__all__ = [
    "combine",
    "conv_general_dilated",
    "dequantize",
    "dot_general",
    "einsum",
    "partition",
    "register_loops",
    "take",
]
