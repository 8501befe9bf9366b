"""JAX: its adapter, and its products, which the registry loads when the first is asked for."""

from aqt_lite.backends.jax.adapter import JaxBackend

__all__ = ["JaxBackend"]
