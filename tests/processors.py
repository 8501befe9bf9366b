"""Tests once more, in a process whose compiled loops are for a processor without AVX-512."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run_without_avx_512(file, tests, check):
    """Run tests of a file, functions or names, where ``check``, a statement about the loops, holds."""
    if "+avx512f" not in _features():
        pytest.skip("the processor has no AVX-512, and so all tests are of such loops")
    run_without(("+avx512", "+avx10"), file, tests, check, NUMBA_CPU_NAME="haswell")


def run_without(features, file, tests, check, also=(), **variables):
    """The same without those features of the processor whose names begin so, and with others."""
    without = ",".join([*("-" + f[1:] if f.startswith(features) else f for f in _features()), *also])
    environment = {**os.environ, "NUMBA_CPU_FEATURES": without, **variables}
    names = [f"{file}::{test if isinstance(test, str) else test.__name__}" for test in tests]
    code = f"""
import sys, pytest
from aqt_lite.backends.cpu import runtime
assert {check}
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *{names}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def _features():
    """Of the processor that numba compiles for, each with a sign."""
    from numba.core.registry import cpu_target

    return str(cpu_target.target_context.codegen().magic_tuple()[-1]).split(",")
