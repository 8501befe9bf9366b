"""The pages say what is so: tables are the recorded results, code runs, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_tables_are_those_of_the_recorded_run(page):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    text = (ROOT / page).read_text()
    assert "x | " in text, "no table in the page"
    assert tables.filled(text, results) == text, "run python benchmarks/tables.py --write"


CHECKS = [
    "assert y.shape == (4, 256) and isinstance(w, aqt_lite.QArray) and w.backend == 'jax'",
    "assert np.abs(field_again - field).max() <= q.scale.max() and 4 * q.nbytes < 1.1 * field.nbytes",
    "assert q.backend == 'torch' and y.shape == (4, 256)",
]
"""What holds after each block of the README."""


def run_in_a_fresh_interpreter(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_of_the_readme_runs_as_pasted():
    """Each block alone, since a reader pastes the one he needs, and all of them in order."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    parts = [block + check + "\n" for block, check in zip(blocks, CHECKS, strict=True)]
    for part in parts:
        run_in_a_fresh_interpreter(part)
    assert "SQNR" in run_in_a_fresh_interpreter("".join(parts))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
