"""Fixtures: every test that takes ``backend`` runs on every built-in adapter."""

from __future__ import annotations

import re

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from optional import WITHOUT, check_installed, needs

from aqt_lite._registry import _BUILTIN, get_backend
from aqt_lite.backends.cpu import runtime

BACKENDS = tuple(name for name in _BUILTIN if name not in WITHOUT)


def pytest_configure(config):
    """Refuse to test less than was asked for, and let small arrays be cut into parts as large ones are."""
    check_installed()
    hypothesis.settings.register_profile("untimed", deadline=None)  # how long an example takes is the machine's affair
    hypothesis.settings.load_profile("untimed")
    runtime.LARGE_LOOPS = runtime.LARGE_PARTS = 2 * runtime.LARGE


def pytest_report_header():
    """Say what this run goes without."""
    return [f"without {', '.join(WITHOUT)}, as AQT_LITE_TESTS_WITHOUT says"] if WITHOUT else []


@pytest.hookimpl(tryfirst=True)  # before pytest's own choice by -m
def pytest_collection_modifyitems(items):
    """Skip what is parametrized with the name of a library that this run goes without; mark what is exhaustive."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        strings = [value.lower() for value in parameters.values() if isinstance(value, str)]
        absent = [name for name in WITHOUT if any(name in re.findall(r"\w+", string) for string in strings)]
        if absent:
            item.add_marker(needs(*absent))
        for marker in item.iter_markers():
            if marker.name not in ("exhaustive_where", "exhaustive_unless"):
                continue
            if unknown := set(marker.kwargs) - set(parameters):
                raise pytest.UsageError(f"{item.nodeid}: {marker.name} names no parameter {sorted(unknown)}")
            if marker.name == "exhaustive_where":
                matches = all(parameters[name] == value for name, value in marker.kwargs.items())
            else:
                matches = any(parameters[name] not in values for name, values in marker.kwargs.items())
            if matches:
                item.add_marker("exhaustive")


@pytest.fixture(params=BACKENDS)
def backend(request):
    """The adapter of one backend; ``backend.name`` is what users write."""
    return get_backend(request.param)


def lacks(backend, dtype):
    """Whether the library has no such dtype, as its adapter says."""
    try:
        backend.asarray(np.zeros(1, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype))
    except ValueError:
        return True
    return False
