"""torch: its adapter, and its products, which the registry loads when the first is asked for."""

from aqt_lite.backends.torch.adapter import TorchBackend

__all__ = ["TorchBackend"]
