"""Arrays over several devices: the bits of one device, results that stay where they are, and no hidden gathering."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("sharding_checks.py")


@pytest.mark.exhaustive  # each takes half a minute
@pytest.mark.parametrize(("kind", "mesh"), [("Auto", "one axis"), ("Explicit", "two axes")])
def test_eight_devices(kind, mesh):
    """In a process of its own: the number of simulated devices is fixed when JAX starts."""
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(CHECKS), kind, mesh]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    failures = json.loads(done.stdout)
    assert not failures, "\n\n".join(f"{label}:\n{trace}" for label, trace in failures.items())


@pytest.mark.exhaustive  # two processes that compile
def test_two_processes_of_two_devices():
    """An array of which no process has the whole: the bits of one device, in each part."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    script = CHECKS.with_name("process_checks.py")
    commands = [[sys.executable, str(script), str(port), str(number)] for number in range(2)]
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for command in commands
    ]
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (said, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
        assert said.endswith("held\n")
