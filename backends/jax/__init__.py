"""JAX: its adapter, what it offers beside the common functions, and its products, which the registry loads when used.

Owns: ``register_loops``. Imports: the registry, the adapter, the trees.
"""

from aqt_lite._registry import get_backend
from aqt_lite.backends.jax.adapter import JaxBackend
from aqt_lite.backends.jax.trees import combine, partition

__all__ = ["JaxBackend", "combine", "partition", "register_loops"]

get_backend("jax")  # whoever imports this first has trees of JAX from here on, before any array is seen


def register_loops() -> bool:
    """Offer XLA the compiled loops that it calls on a CPU, all of them, and say whether it has taken them.

    They are offered when the first product, quantization or the like is compiled. Only a process that loads an
    executable which another one has compiled (``jax.experimental.serialize_executable``) calls this before, or XLA
    finds "No FFI handler registered". It starts JAX's CPU backend, and takes some seconds where numba's cache is warm,
    a minute where it is not.

    Returns
    -------
    bool
        False where programs do without some of them: no numba, another processor or platform, several devices.

    Examples
    --------
    >>> from aqt_lite.backends.jax import register_loops
    >>> register_loops() in (True, False)
    True
    """
    from aqt_lite.backends.jax import products

    encoding, dots = products.encoding_loops(), products.integer_dots()
    decoding, groups, in_out = products.decoding_loops(), products.group_loops(), products.in_out_loops()
    whole, across = products.whole_loops(), products.across_loops()
    return all(
        [
            encoding is not None and encoding.register(),
            dots is not None and dots.is_registered(),
            decoding is not None and decoding.register(),
            groups is not None and groups.register(),
            in_out is not None and in_out.register(),
            whole is not None and whole.register(),
            across is None or across.register(),  # others are there where these are not for the processor
        ]
    )
