"""JAX: its adapter, and its products, which the registry loads when the first is asked for."""

from aqt_lite.backends.jax.adapter import JaxBackend
from aqt_lite.backends.jax.trees import combine, partition

__all__ = ["JaxBackend", "combine", "partition"]
