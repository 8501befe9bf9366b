"""The package as its users first meet it: what ``dir`` shows, what type checkers see, what is logged."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from optional import needs


def python(code):
    """Standard output and error of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_dir_shows_all_that_there_is_and_imports_none_of_it():
    code = """
import sys, aqt_lite
shown = dir(aqt_lite)
assert not {"aqt_lite.plots", "aqt_lite.testing"} & set(sys.modules)
assert {"plots", "testing", "__version__", *aqt_lite.__all__} <= set(shown), shown
assert shown == sorted(set(shown))
for name in shown:
    getattr(aqt_lite, name)
"""
    assert python(code) == ""


@needs("jax", "torch")
def test_modules_of_frameworks_know_their_trees_from_their_import_on():
    """Where such a module is what imports the framework, nothing else tells it of containers before the first array."""
    known = "import aqt_lite.{0}; from aqt_lite import _registry; assert '{0}' in _registry._instances"
    python("\n".join(known.format(module) for module in ("torch", "jax")))
    pytest.importorskip("flax", reason="flax is not installed: requirements-dev.txt has it")
    code = """
import aqt_lite, numpy as np
q = aqt_lite.quantize(np.ones((4, 4), "float32"))
import flax.serialization as flax
assert (flax.from_bytes({"w": q}, flax.to_bytes({"w": q}))["w"].storage == q.storage).all()
try:
    flax.from_bytes({"w": aqt_lite.quantize(np.ones((4, 4), "float32"), "int4")}, flax.to_bytes({"w": q}))
except ValueError as error:
    assert "the template" in str(error)
else:
    raise AssertionError("read into another format")
"""
    assert python(code) == ""
    pytest.importorskip("equinox", reason="equinox is not installed: requirements-dev.txt has it")
    code = """
import aqt_lite.equinox, equinox, jax
layer = aqt_lite.equinox.quantize(equinox.nn.Linear(4, 3, key=jax.random.key(0)))
assert isinstance(layer.weight, aqt_lite.QArray)
"""
    assert python(code) == ""


@pytest.mark.exhaustive  # half a minute of type checking
def test_type_checkers_see_the_modules_of_first_use(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np\nimport aqt_lite\n"
        "reveal_type(aqt_lite.testing.assert_same_bits)\n"
        "reveal_type(aqt_lite.plots)\n"
        "aqt_lite.no_such_module\n"
        "aqt_lite.quantize('a file')\n"
        "aqt_lite.quantize([1.0, 2.0])\n"
        "aqt_lite.quantize(np.ones(3))\n"
    )
    options = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports", f"--cache-dir={tmp_path}"]
    command = [sys.executable, "-m", "mypy", *options, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    function, module, error, text, *_, last = done.stdout.splitlines()
    assert "def (" in function, done.stdout
    assert "Module" in module, done.stdout
    assert 'has no attribute "no_such_module"' in error, done.stdout
    assert 'Argument 1 to "quantize" has incompatible type "str"' in text, done.stdout
    assert last.startswith("Found 2 errors"), done.stdout


@needs("numba")
def test_each_long_compilation_is_told_in_one_line_while_it_lasts(monkeypatch, caplog):
    import numba

    from aqt_lite.backends.cpu import telling

    def jitted(function):
        function.__module__ = "aqt_lite.of_a_test"
        return numba.njit(function)

    inner = jitted(lambda x: x[0] + 1)

    @jitted
    def outer(x):
        return inner(x) * 2

    telling.begin(), telling.begin()
    with caplog.at_level(logging.INFO, logger="aqt_lite"):
        monkeypatch.setattr(telling, "PATIENCE", 60.0)
        outer(np.ones(1, "int8"))
        assert not any(isinstance(t, threading.Timer) and not t.finished.is_set() for t in threading.enumerate())
        monkeypatch.setattr(telling, "PATIENCE", 0.0)
        for _ in range(3):
            outer(np.ones(1, "float32"))
        until = time.monotonic() + 10
        while not caplog.records and time.monotonic() < until:
            time.sleep(0.01)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("aqt_lite", "INFO")
    words = r"compiling aqt_lite\.of_a_test\..*outer for arrays of float32: this is its first use with such arguments"
    assert re.fullmatch(words, record.getMessage())


LOGGED = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s %(levelname)s")
logging.getLogger("numba").setLevel(logging.WARNING)
import numpy as np
import aqt_lite
from aqt_lite import testing, plots
x = np.ones((600, 700), "float32")
print("imported")
aqt_lite.quantize(x[:2, :3])
print("small")
for _ in range(2):
    aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0))
"""


def test_nothing_is_logged_on_import_and_where_nothing_is_compiled():
    lines = python(LOGGED).splitlines()  # compiles where nothing is cached yet, which may be told
    assert lines[: lines.index("small") + 1] == ["imported", "small"]
    assert python(LOGGED).splitlines() == ["imported", "small"]  # from the cache


def test_a_module_whose_package_is_missing_says_what_installs_it():
    code = """
import importlib, sys
for module, package in {"xarray": "xarray", "zarr": "zarr", "torch": "torch", "nnx": "jax", "equinox": "jax"}.items():
    sys.modules[package] = None
    try:
        importlib.import_module(f"aqt_lite.{module}")
    except ModuleNotFoundError as error:
        print(error)
    del sys.modules[package]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "aqt_lite.xarray needs the package xarray: pip install 'aqt_lite[science]'",
        "aqt_lite.zarr needs the package zarr: pip install 'aqt_lite[science]'",
        "aqt_lite.torch needs the package torch: pip install 'aqt_lite[torch]'",
        "aqt_lite.nnx needs the package jax: pip install 'aqt_lite[jax]' flax",
        "aqt_lite.equinox needs the package jax: pip install 'aqt_lite[jax]' equinox",
    ]
