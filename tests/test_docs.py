"""The pages say what is so: tables are the recorded results, code runs, links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from optional import needs
from oracles import formats as written

import aqt_lite
from aqt_lite.formats import FORMATS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def script(name):
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(sys, "path", [str(ROOT / "benchmarks"), *sys.path]):  # scripts import each other
        spec.loader.exec_module(module)
    return module


TABLES = [
    *("README.md", "docs/performance.md", "docs/performance-avx2.md", "docs/performance-intel.md"),
    *("docs/models.md", "docs/formats.md"),
]
"""The pages that benchmarks/tables.py writes to."""


@pytest.mark.parametrize("page", TABLES)
def test_tables_are_those_of_the_recorded_run(page):
    tables = script("tables")
    results = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    text = (ROOT / page).read_text()
    assert re.search(r"<!-- end .*(products|stored|frameworks|jobs)( \w+)? -->", text), "no table in the page"
    assert tables.filled(text, results) == text, "run python benchmarks/tables.py --write"


def test_every_table_of_the_recorded_runs_stands_on_a_page():
    tables = script("tables")
    assert [str(path.relative_to(ROOT)) for path in tables.FILES] == TABLES
    text = "".join(path.read_text() for path in tables.FILES)
    made = tables.tables(json.loads((ROOT / "benchmarks" / "results.json").read_text()))
    assert [name for name in made if f"<!-- {name} -->" not in text] == []


def test_the_other_scripts_find_their_places_on_the_page():
    """benchmarks/processors.py and memory.py write to it themselves, after minutes of measuring."""
    text = (ROOT / "docs" / "performance.md").read_text()
    for name in ("processors", "memory", "large files"):
        assert text.count(f"<!-- {name} -->\n|") == text.count(f"|\n<!-- end {name} -->") == 1, name


@pytest.mark.parametrize("name", ["int8, one scale an output", "int4, groups of 32", "nf4, groups of 32", "nvfp4"])
def test_the_table_of_formats_for_jobs_says_which_modes_serve(name):
    job = (tables := script("tables")).JOBS[name]
    w, x = (np.random.default_rng(0).standard_normal(shape, dtype=np.float32) for shape in ((8, 64), (2, 64)))
    q, of_x = aqt_lite.quantize(w, **job.how), aqt_lite.quantize(x, granularity=aqt_lite.PerChannel(0))
    served = []
    for mode in ("fast", "reproducible", "integer"):
        with contextlib.suppress(ValueError):
            aqt_lite.linear(of_x if mode == "integer" else x, q, mode=mode)
            served.append(mode)
    assert served == tables.modes(job)


def test_tables_of_formats_are_what_the_records_say():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import formats_table as t; t.hold()"
    run_in_a_fresh_interpreter(code)  # other tests register formats


def test_the_contract_lists_the_formats_with_reproducible_products():
    text = (ROOT / "docs" / "numerics.md").read_text()
    listed = re.search(r"\*\*Which formats\*\*(.*?)\n\n", text, flags=re.DOTALL).group(1)
    for name in (*written.FLOATS, *written.CODEBOOKS, "ternary"):
        served = FORMATS[name].element.unit is not None
        assert served == bool(re.search(rf"\b{name}\b", listed)), f"docs/numerics.md, Which formats: {name}"


def test_tables_of_layouts_are_what_the_records_say():
    script("layouts_table").hold()


def test_the_code_of_the_page_of_layouts_runs_and_prints_what_it_says():
    text = (ROOT / "docs" / "layouts.md").read_text()
    printed = run_in_a_fresh_interpreter("".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)))
    assert printed.splitlines() == [
        "(8, 288) q4_0 float16 True",
        "int32 (8, 1) 0x77777777",
        "PerGroup(size=128, axis=0) True True",
        "(512, 1) (4, 1) True True",
        "uint32 (8, 64) True",
        "(4, 8) 0x19",
    ]


CHECKS = [
    "assert quantized['layer0']['kernel'] is params['layer0']['kernel'] and quantized['layer1']['kernel'].bits == 4",
    "assert y.shape == (4, 256) and isinstance(w, aqt_lite.QArray) and w.backend == 'jax'",
    "assert np.nanmax(np.abs(field_again - field)) <= 0.05 and 4 * q.nbytes < field.nbytes and q.mask.any()",
    "assert q.backend == 'torch' and y.shape == (4, 256)",
    "assert tree['layer']['w'].dtype == 'nvfp4' and tree['step'] == 7",
    "assert q.nbytes / w.size == 0.5625 and y.shape == (4, 256) and seven.bits == 3",
]
"""What holds after each block of the README."""


def run_in_a_fresh_interpreter(code, folder=ROOT):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_code_of_the_readme_runs_as_pasted(tmp_path):
    """Each block with names of its own, since a reader pastes the one he needs, and all of them in order."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    parts = [block + check + "\n" for block, check in zip(blocks, CHECKS, strict=True)]
    alone = f"for part in {parts!r}:\n    exec(part, {{'__name__': '__main__'}})\n"
    assert "SQNR" in run_in_a_fresh_interpreter(alone + "".join(parts), tmp_path)


def test_the_code_of_the_page_of_formats_runs_and_prints_what_it_says():
    text = (ROOT / "docs" / "formats.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    printed = run_in_a_fresh_interpreter("".join(blocks))
    assert "float16 4.5 " in printed
    assert "['0xe1', '0x7'] [ 1 -2  7]" in printed
    assert printed.split()[-4:] == ["seven", "float5_e2m2", "int12", "bfloat16"]


def test_the_page_of_dialects_is_what_the_records_say_and_its_code_runs():
    text = (ROOT / "docs" / "dialects.md").read_text()
    assert script("dialects_table").filled(text) == text, "run python benchmarks/dialects_table.py --write"
    printed = run_in_a_fresh_interpreter("".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)))
    assert "`compressed-tensors`" in text
    made = ["float8_e4m3fn", "(64,", "4)", "(128,)"]
    stored = ["(8,", "4)", "True", "(8,", "1,", "16)", "(64,", "128)", "True", "(4,)", "True", "(4,)", "(1,)"]
    assert printed.split() == [
        "True",
        "-127",
        "-128",
        "[[128]]",
        "-3",
        "(4,",
        "36)",
        *made,
        *stored,
        "uint8",
        "(4,",
        "2)",
    ]


@pytest.mark.exhaustive  # a quarter of a minute: three frameworks compile
@needs("jax", "torch")
def test_the_code_of_the_page_of_models_runs(tmp_path):
    for framework in ("equinox", "flax"):
        pytest.importorskip(framework, reason=f"{framework} is not installed: requirements-dev.txt has it")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "models.md").read_text(), flags=re.DOTALL)
    checks = "assert y.shape == (3, 10) and logits.shape == (5, 10) and scores.shape == (7, 10)\n"
    checks += "assert isinstance(small.layers[0].weight, aqt_lite.QArray) and quantized['out'] == params['out']\n"
    checks += "assert found.shape == (2, 7, 10) and (found_again == found).all()\n"
    checks += "assert (again(ids) == encoder(ids)).all() and again.out.kernel[...].shape == (64, 10)\n"
    checks += "assert classes.shape == (2, 7, 10) and len(jax.tree.leaves(trained)) == 6\n"
    printed = run_in_a_fresh_interpreter("".join(blocks) + checks, tmp_path)
    assert "hidden/kernel" in printed
    assert "attention/query/kernel" in printed
    assert "SQNR, dB" in printed


@pytest.mark.exhaustive  # trains and compiles for ten seconds
@needs("jax", "torch")
def test_the_code_of_the_page_of_training_runs_and_what_is_trained_is_better(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), flags=re.DOTALL)
    printed = run_in_a_fresh_interpreter("".join(blocks), tmp_path)
    afterwards, trained, of_codes, torchs, before, adapted = map(float, re.findall(r"\d+\.\d\d\b", printed))
    assert trained < 0.5 * afterwards
    assert of_codes == before == trained
    assert "True" in printed
    assert torchs < 0.5 * afterwards
    assert adapted < 0.9 * before


@needs("jax")
def test_the_code_of_the_page_of_files_runs_and_prints_what_it_says(tmp_path):
    pytest.importorskip("equinox", reason="equinox is not installed: requirements-dev.txt has it")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "files.md").read_text(), flags=re.DOTALL)
    checks = "x = jax.numpy.ones(64)\nassert (mlp_again(x) == mlp(x)).all() and mlp_again is not mlp\n"
    first, second, third = run_in_a_fresh_interpreter("".join(blocks) + checks, tmp_path).splitlines()
    assert first == "PerGroup(size=32, axis=-1) 1000"
    assert second == "['layers.0.kernel', 'step']"
    assert third.startswith(
        "cannot load model.safetensors: leaf 'embed': the file holds nvfp4 of float32 in blocks of (1, 16)"
    )
    assert "and the template mxfp4 of float32" in third


def test_the_code_of_the_page_of_science_runs_and_prints_what_it_says(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "science.md").read_text(), flags=re.DOTALL)
    printed = run_in_a_fresh_interpreter("".join(blocks), tmp_path).splitlines()
    assert printed[0].startswith("uint8 3.99")
    assert printed[0].endswith("True")
    assert "int8 cannot keep max_abs_err=1e-09: it keeps max_abs_err=0.06" in printed[1]
    assert [line.split()[-2] for line in printed[2:4]] == ["uint16", "uint8"]
    assert printed[4].split()[1:] == ["True", "True"]
    assert printed[5].startswith("bitround6 15 2.1")
    kept, last = map(int, printed[6].split())
    assert 5 <= kept <= last < 23
    assert printed[7:9] == ["int8_nan True True", "True"]
    assert printed[-3].startswith("missing values")
    assert printed[-2] == "True (24, 1, 1)"
    assert printed[-1].startswith("x has 1555200 values of 1555200 beyond the numbers that int8 has at this scale")


def blocks_of_fields():
    """The code of docs/fields.md: what make test can run, and what needs pyarrow."""
    text = (ROOT / "docs" / "fields.md").read_text()
    parts = text.split("<!-- needs pyarrow -->")
    return ["".join(re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)) for part in parts]


@pytest.mark.exhaustive  # compresses fields
def test_the_code_of_the_page_of_fields_runs_and_prints_what_it_says(tmp_path):
    code, _ = blocks_of_fields()
    checks = "assert later.sizes['time'] == 2 and codes.dtype == 'int8' and z.nbytes > 3 * z.nbytes_stored()\n"
    printed = run_in_a_fresh_interpreter(code + checks, tmp_path).splitlines()
    assert re.fullmatch(r"0\.0\d+ <= 0\.05, int16", printed[0])
    beyond = printed.pop(1)
    assert re.match(r"x has \d+ values of 64800 beyond the codes of this packing, the first at index", beyond)
    assert printed[1].startswith("{'scale_factor': np.float32(0.0999")


def test_the_code_of_tables_runs(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow takes 170 MB, too much for the development set-up")
    _, of_tables = blocks_of_fields()
    values = "import aqt_lite, numpy as np\nvalues = np.random.default_rng(0).random((4, 90, 180), 'float32')\n"
    run_in_a_fresh_interpreter(values + of_tables, tmp_path)


def test_the_code_of_the_page_of_comparisons_runs_and_prints_what_it_says(tmp_path):
    text = (ROOT / "docs" / "compare.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    printed = run_in_a_fresh_interpreter("".join(blocks), tmp_path)
    shown = re.findall(r"```\n(They .*?)```", text, flags=re.DOTALL)[0]
    assert printed.startswith(shown)
    first, counts, fields, converted, refused = printed.removeprefix(shown).splitlines()
    assert first == "torch ('torch_per_channel', 'torch_per_tensor', 'torchao')"
    assert 0 < int(counts.split()[1]) <= int(counts.split()[0])
    assert fields == "aqt_lite, divides=True"
    assert converted == "-8 (64, 8) uint8"
    way = re.escape("round it first, as NumPy's scale.astype('float16').astype('float32') does")
    assert re.fullmatch(rf"scale_dtype='float16': scale=\S+ is no number of float16, .*: {way}", refused)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target, place in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", page.read_text()):
        if not target.startswith("http"):
            found = page.parent / target if target else page
            assert found.exists(), target
            assert not place or place in places(found), f"{target}#{place}"


def places(page):
    """What stands behind # in links to a page's headings, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
