# Two commands matter: `make demo` and `make test`. Both set everything up by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-models test exhaustive pythons test-oracles check bench bench-quick bench-formats bench-cluster bench-memory formats mismatches clean

$(READY): requirements-dev.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or later is needed: make PYTHON=python3.11 ..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(READY)

demo: $(READY)  ## the main job on real data: pictures and tables under out/
	$(BIN)/python examples/demo.py

demo-models: $(READY)  ## a sentence encoder of 22.7 million weights in four frameworks; downloads 122 MB once
	$(BIN)/python examples/models.py

test: $(READY)  ## tests and doctests, without the exhaustive ones
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not exhaustive" --doctest-modules tests aqt_lite

exhaustive: $(READY)  ## the others: every value or combination there is
	$(BIN)/python -m pytest -n 2 --dist loadfile --durations 20 -m exhaustive tests

pythons: $(READY)  ## core tests on other Pythons, on the lowest declared versions, and with NumPy alone
	$(BIN)/python .ci/other_pythons.py

test-oracles: $(READY)  ## dialects against the libraries that they are named after, live, on fresh random data
	$(BIN)/python .ci/oracles.py

check: $(READY)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mismatches: $(READY)  ## the table of mismatching bits, backends across, cases down
	$(BIN)/python benchmarks/mismatches.py

formats: $(READY)  ## tables and pictures of number formats and dialects, written into README.md and docs/
	$(BIN)/python benchmarks/formats_table.py --write
	$(BIN)/python benchmarks/dialects_table.py --write
	$(BIN)/python benchmarks/layouts_table.py --write

bench: $(READY)  ## speed against the plain product and the plain code, in one run
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/stored.py
	$(BIN)/python benchmarks/tables.py --write

bench-quick: $(READY)  ## products in groups, of 8 bits and of 4, in a minute or two
	$(BIN)/python benchmarks/stored.py --quick

bench-formats: $(READY)  ## speed of every kind of format on NumPy, beside int8
	$(BIN)/python benchmarks/formats.py

bench-memory: $(READY)  ## peak memory beside the result, and speed, of every path on NumPy
	$(BIN)/python benchmarks/memory.py --write

bench-cluster: $(READY)  ## an array larger than a worker's memory on one worker, on two, and one of them killed
	$(BIN)/python benchmarks/cluster.py

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
