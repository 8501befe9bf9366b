"""Fixtures: every test that takes ``backend`` runs on every built-in adapter."""

from __future__ import annotations

import pytest

from aqt_lite._registry import get_backend

BACKENDS = ("numpy", "array_api_strict", "torch", "jax")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The adapter of one backend; ``backend.name`` is what users write."""
    return get_backend(request.param)
