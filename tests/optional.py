"""Optional libraries, each there unless the run says that it goes without: ``AQT_LITE_TESTS_WITHOUT=torch,numba``.

Said, a library is not imported, its backend and forms are left out, and a test that touches it is skipped. Not said, it
has to be there: no run tests less than it seems to.
"""

from __future__ import annotations

import importlib
import importlib.util
import os

import pytest

LIBRARIES = ("jax", "torch", "numba", "matplotlib")
WITHOUT = tuple(filter(None, os.environ.get("AQT_LITE_TESTS_WITHOUT", "").split(",")))


def check_installed():
    """UsageError where a library is missing unsaid, or the variable names none."""
    if unknown := set(WITHOUT) - set(LIBRARIES):
        raise pytest.UsageError(f"AQT_LITE_TESTS_WITHOUT names {sorted(unknown)}: known are {', '.join(LIBRARIES)}")
    missing = [name for name in LIBRARIES if name not in WITHOUT and importlib.util.find_spec(name) is None]
    if missing:
        raise pytest.UsageError(
            f"not installed: {', '.join(missing)}. Install requirements-dev.txt, or set "
            f"AQT_LITE_TESTS_WITHOUT={','.join([*WITHOUT, *missing])} to test without"
        )


def needs(*names):
    """Mark of a test that starts a program with these libraries."""
    absent = [name for name in names if name in WITHOUT]
    return pytest.mark.skipif(bool(absent), reason=f"runs without {' and '.join(absent)}")


class _Absent:
    """Stands for a module; whichever test touches it is skipped."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith(("_", "pytest")):  # what pytest asks of everything in a test module
            raise AttributeError(attribute)
        pytest.skip(f"runs without {self._name}")


def _module(name):
    library = name.partition(".")[0]
    return _Absent(library) if library in WITHOUT else importlib.import_module(name)


def __getattr__(name):
    """``from optional import jax, jnp, torch``, each imported on first use."""
    if name in ("jnp", *LIBRARIES):
        return _module("jax.numpy" if name == "jnp" else name)
    raise AttributeError(name)
