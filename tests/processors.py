"""Tests once more, in a process whose compiled loops are for a processor without AVX-512."""

from __future__ import annotations

import os
import subprocess
import sys


def run_without_avx_512(file, tests, check):
    """Run tests of a file where ``check``, a statement about the loops, holds."""
    from numba.core.registry import cpu_target

    features = str(cpu_target.target_context.codegen().magic_tuple()[-1]).split(",")
    without = ",".join("-" + f[1:] if f.startswith(("+avx512", "+avx10")) else f for f in features)
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": without}
    code = f"from aqt_lite.backends.cpu import runtime; assert {check}"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    names = [f"{file}::{test.__name__}" for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *names]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
