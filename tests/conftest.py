"""Fixtures: every test that takes ``backend`` runs on every built-in adapter."""

from __future__ import annotations

import pytest

from aqt_lite._registry import _BUILTIN, get_backend

BACKENDS = tuple(_BUILTIN)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The adapter of one backend; ``backend.name`` is what users write."""
    return get_backend(request.param)
