"""Runs the core tests on the wheel: on other Pythons, on the lowest declared versions, and with NumPy alone.

Those of files run with the newest zarr, which is not for every Python, and with pyarrow.

    .venv/bin/python .ci/other_pythons.py [part of an environment's name]

Each environment is a directory of its own under build/pythons. All go without torch: of its many versions and Pythons
few have a build for CPUs on the package index, and the others bring gigabytes of CUDA; the full run has it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOME = ROOT / "build" / "pythons"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

CORE = ["golden", "granularity", "laws", "qarray", "report", "files", "broken_files", "backends.py::test_conformance"]
LIBRARIES = ["plots", "pool"]  # tests that need matplotlib, or numba
OF_FILES = ["zarr", "containers", "docs.py::test_the_code_of_tables_runs"]
MINUTES = 15  # for the tests of one environment: more means that something hangs

TEST_TOOLS = ("array-api-strict", "hypothesis", "pytest", "pytest-xdist", "safetensors")


def names_of(requirements: list[str]) -> list[str]:
    """Names of distributions, without versions."""
    return [re.split(r"[\[<>=!~; ]", line)[0] for line in requirements]


def pinned(names: list[str]) -> list[str]:
    """Distributions in the versions of the development set-up."""
    lines = (ROOT / "requirements-dev.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower(): line for line in lines if "==" in line}
    return [pins[name.lower()] for name in names]


def lowest(*extras: str) -> list[str]:
    """What the package and its extras declare, each in its lowest version."""
    declared = PROJECT["dependencies"] + [r for e in extras for r in PROJECT["optional-dependencies"][e]]
    return [r.replace(">=", "==") for r in declared if not r.startswith("aqt_lite[")]


@dataclass(frozen=True)
class Environment:
    """An interpreter, what is installed, and which of the optional libraries is not."""

    name: str
    python: str
    requirements: list[str]
    without: list[str]
    tests: tuple[str, ...] = tuple(CORE)


REQUIRED = names_of(PROJECT["dependencies"])
OF_ITS_TIME = "pyparsing<3.3"  # later ones warn about the way in which the lowest matplotlib calls them
EVERYTHING = pinned([*REQUIRED, "jax", "jaxlib", "numba", "matplotlib", *TEST_TOOLS])
FILES = pinned(["xarray", "netCDF4", "h5netcdf", "h5py", "dask", "distributed"])
FILES += ["zarr==3.4.2", "cast-value-rs==0.5.1", "pyarrow==26.0.1"]  # for Python 3.12 on; too large for every day
ALL_OF_CORE = (*CORE, *LIBRARIES)
BETWEEN = ("backends.py::test_conformance", "pool")  # an older and a newer Python run the others
OF_NUMPY = ("granularity", "report", "files", "broken_files")  # in which the other libraries play no part
ENVIRONMENTS = [
    Environment("3.12", "3.12", EVERYTHING, ["torch"], BETWEEN),
    Environment("3.13", "3.13", EVERYTHING, ["torch"], ALL_OF_CORE),
    Environment(
        "files",
        "3.12",
        [*pinned([*REQUIRED, *TEST_TOOLS]), *FILES],
        ["jax", "torch", "numba", "matplotlib"],
        (*OF_FILES, *OF_NUMPY),
    ),
    Environment(
        "lowest versions", "3.11", [*lowest("jax", "fast", "plot", "test"), OF_ITS_TIME], ["torch"], ALL_OF_CORE
    ),
    Environment("NumPy alone", "3.11", pinned([*REQUIRED, *TEST_TOOLS]), ["jax", "torch", "numba", "matplotlib"]),
]


def interpreter(version: str) -> str | None:
    """A Python of that version that runs: a name on the path may be a shim for one that is not switched on."""
    name = f"python{version}"
    found = [shutil.which(name, path=folder) for folder in os.get_exec_path()]
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found += sorted(map(str, pyenv.glob(f"versions/{version}.*/bin/{name}")))
    if sys.version_info[:2] == tuple(map(int, version.split("."))):
        found.append(sys.executable)
    ask = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    for python in filter(None, found):
        done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return python
    return None


def installed(python: Path) -> str:
    """What is there, in words."""
    ask = "import json, platform, importlib.metadata as m; print(json.dumps([platform.python_version(), "
    ask += "{d.name: d.version for d in m.distributions()}]))"
    version, found = json.loads(subprocess.check_output([python, "-c", ask], text=True))
    found = {name.lower().replace("_", "-"): v for name, v in found.items()}
    names = ("numpy", "array-api-compat", "array-api-strict", "ml-dtypes", "jax", "numba", "matplotlib")
    names += ("zarr", "cast-value-rs", "pyarrow")
    return f"Python {version}, " + ", ".join(f"{n} {found[n]}" for n in names if n in found)


def prepared(environment: Environment, wheel: Path) -> Path | None:
    """The environment's Python, with the wheel installed; None where no such Python is."""
    base = interpreter(environment.python)
    if base is None:
        return None
    folder = HOME / environment.name.replace(" ", "-")
    python, ready = folder / "bin" / "python", folder / "ready.json"
    wanted = json.dumps([base, environment.requirements])
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    if not ready.exists() or ready.read_text() != wanted:
        subprocess.run([base, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([*pip, *environment.requirements], check=True)
        ready.write_text(wanted)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True, stdout=subprocess.DEVNULL)
    return python


def run(environment: Environment, python: Path | None) -> tuple[bool, str]:
    """Whether the tests passed, and the line that says which, where and how."""
    if python is None:
        return True, f"{environment.name}: NOT RUN, there is no Python {environment.python} here"
    names = environment.tests
    tests = [f"tests/test_{name}" + ("" if ".py" in name else ".py") for name in names]
    variables = {
        **os.environ,
        "AQT_LITE_TESTS_WITHOUT": ",".join(environment.without),
        "PYTHONSAFEPATH": "1",  # the wheel is tested, not the sources in the current directory
    }
    command = [python, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "-p", "no:cacheprovider"]
    command += ["-m", "not exhaustive", *tests]
    start = time.monotonic()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60 * MINUTES, check=False
        )
        output, passed = done.stdout + done.stderr, done.returncode == 0
        result = next((line for line in reversed(done.stdout.splitlines()) if line.strip()), "no output")
    except subprocess.TimeoutExpired as late:
        output, passed, result = (late.stdout or b"").decode(), False, f"not finished in {MINUTES} minutes"
    if not passed:
        print(output, flush=True)
    result = re.sub(r" in [\d.]+s.*", "", result.strip("= ")) + f" in {time.monotonic() - start:.0f} s"
    missing = f", without {' and '.join(environment.without)}"
    return passed, f"{environment.name}: {installed(python)}{missing}; {' '.join(names)}: {result}"


def main() -> int:
    """Run all, or those whose name has the argument in it; 1 if one failed."""
    HOME.mkdir(parents=True, exist_ok=True)
    built = HOME / "dist"
    shutil.rmtree(built, ignore_errors=True)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", built, ROOT]
    subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = built.glob("*.whl")
    results = []
    chosen = [e for e in ENVIRONMENTS if all(part in e.name for part in sys.argv[1:])]
    with ThreadPoolExecutor(1) as installer:  # the next ones are installed while tests run
        for environment, python in zip(chosen, installer.map(lambda e: prepared(e, wheel), chosen), strict=True):
            results.append(run(environment, python))
            print(results[-1][1], flush=True)
    print(f"{sum(ok for ok, _ in results)} of {len(results)} environments are in order")
    return 0 if results and all(ok for ok, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
