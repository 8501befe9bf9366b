"""Arrays over several devices: the bits of one device, results that stay where they are, and no hidden gathering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("sharding_checks.py")


@pytest.mark.exhaustive  # each takes half a minute
@pytest.mark.parametrize(("kind", "mesh"), [("Auto", "one axis"), ("Auto", "two axes"), ("Explicit", "two axes")])
def test_eight_devices(kind, mesh):
    """In a process of its own: the number of simulated devices is fixed when JAX starts."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(CHECKS), kind, mesh]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    failures = json.loads(done.stdout)
    assert not failures, "\n\n".join(f"{label}:\n{trace}" for label, trace in failures.items())
