"""torch: its adapter, and its products, which the registry loads when the first is asked for."""

from aqt_lite._registry import get_backend
from aqt_lite.backends.torch.adapter import TorchBackend

__all__ = ["TorchBackend"]

get_backend("torch")  # whoever imports this first has trees of torch from here on, before any array is seen
