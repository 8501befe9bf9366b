"""The pages say what is so: tables are the recorded results, code runs, links lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch

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


def test_the_code_of_the_readme_runs():
    rng = np.random.default_rng(0)
    array = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    weight, x = array(20, 16), array(3, 16)
    names = {
        "kernel": array(16, 20),
        "field": array(30, 512),
        "torch_weight": torch.from_numpy(weight),
        "jax_weight": jnp.asarray(weight),
        "torch_x": torch.from_numpy(x),
        "jax_x": jnp.asarray(x),
    }
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["layer"](jnp.asarray(x), names["w"], jnp.zeros(20)).shape == (3, 20)
    assert np.abs(names["field_again"] - names["field"]).max() <= names["q"].scale.max()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
