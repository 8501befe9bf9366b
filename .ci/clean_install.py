"""Builds the wheel and the sdist, installs the wheel in an empty environment, and uses it there."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USE = """
import re, sys, importlib.metadata
import numpy as np
import aqt_lite
x = np.asarray([[191.6, -13.5, 728.6], [92.14, 295.5, -184.0]], "float32")
q = aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0))
assert q.qvalue.tolist() == [[33, -2, 127], [40, 127, -79]], q
assert aqt_lite.linear([1.0, 0.0, 0.0], q).shape == (2,)
assert aqt_lite.available_backends()["jax"].startswith("not installed")
assert not {"jax", "torch", "matplotlib"} & set(sys.modules)
files = [str(f) for f in importlib.metadata.files("aqt_lite")]
assert not [f for f in files if f.startswith("backends")], "a top-level package called backends was installed"
assert "aqt_lite/py.typed" in files and "aqt_lite/backends/numpy.py" in files, files
about = importlib.metadata.metadata("aqt_lite")
text = about.get_payload()
assert about["Description-Content-Type"] == "text/markdown" and text.lstrip().startswith("# aqt_lite"), text[:99]
links = [to for to in re.findall(r"\\]\\(([^)]*)\\)", text) if not to.startswith("http")]
assert "docs/models.md" in text and not links, f"links in the description that lead nowhere: {links}"
assert "Project-URL" not in about, "there are no addresses unless AQT_LITE_HOME says so"
print("the wheel works:", aqt_lite.__version__, aqt_lite.__file__)
"""
RELEASED = """
import contextlib, email, os, re, sys
from setuptools import build_meta
with contextlib.redirect_stdout(sys.stderr):
    folder = os.path.join(sys.argv[1], build_meta.prepare_metadata_for_build_wheel(sys.argv[1]))
with open(os.path.join(folder, "METADATA"), encoding="utf-8") as file:
    about = email.message_from_string(file.read())
addresses = dict(line.split(", ", 1) for line in about.get_all("Project-URL"))
assert {"Homepage", "Documentation", "Changelog", "Source", "Issues"} == set(addresses), addresses
assert addresses["Issues"] == "https://example.org/some/aqt_lite/issues", addresses
links = re.findall(r"\\]\\(([^)]*)\\)", about.get_payload())
assert "https://example.org/some/aqt_lite/blob/main/docs/models.md" in {link.partition("#")[0] for link in links}
assert all(link.startswith("https://") for link in links), links
print("a release has", len(addresses), "addresses and", len(links), "links, all absolute")
"""


def main() -> None:
    """Run the checks; an exception is a failure."""
    with tempfile.TemporaryDirectory() as scratch:
        built, env = Path(scratch) / "dist", Path(scratch) / "env"
        at_home = {**os.environ, "AQT_LITE_HOME": "https://example.org/some/aqt_lite/"}
        released = [sys.executable, "-c", RELEASED, str(Path(scratch) / "released")]
        (Path(scratch) / "released").mkdir()
        subprocess.run(released, check=True, cwd=ROOT, env=at_home, stderr=subprocess.DEVNULL)
        run = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built), str(ROOT)]
        without = {name: value for name, value in os.environ.items() if name != "AQT_LITE_HOME"}
        subprocess.run(run, check=True, stdout=subprocess.DEVNULL, env=without)
        (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
        in_wheel = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
        sources = {f"aqt_lite/{p.relative_to(ROOT / 'aqt_lite')}" for p in (ROOT / "aqt_lite").glob("**/*.py")}
        sources |= {
            f"aqt_lite/backends/{p.relative_to(ROOT / 'backends')}" for p in (ROOT / "backends").glob("**/*.py")
        }
        assert in_wheel == sources, f"wheel and sources differ: {in_wheel ^ sources}"
        with tarfile.open(sdist) as archive:
            in_sdist = {name.partition("/")[2] for name in archive.getnames()}
        tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        missing = set(tracked.split()) - in_sdist - {".gitignore", "aqt_lite/backends"}  # the latter is a link
        assert not missing, f"not in the sdist: {sorted(missing)}"
        caches = [name for name in in_sdist if "__pycache__" in name or name.endswith(".pyc")]
        assert not caches, f"caches are in the sdist: {caches}"

        venv.create(env, with_pip=True)
        python = str(env / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
        subprocess.run([python, "-W", "error", "-c", USE], check=True, cwd=scratch)


if __name__ == "__main__":
    main()
