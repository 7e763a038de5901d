# Two commands do all the set-up: `make run` and `make test`. Bring your own environment with VENV=path.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: run test gpu lint types clean

run: $(VENV)/.installed
	$(BIN)/fedsim run strategy=fedld

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal

# The checks and benchmarks of an accelerator; without one they run small on the CPU. Writes gpu.json and docs/gpu.md.
gpu: $(VENV)/.installed-dev
	$(BIN)/pytest -q tests/test_gpu.py tests/test_precision.py
	$(BIN)/python -m benchmarks gpu --json gpu.json

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed-dev
	$(BIN)/pip install --quiet --no-deps --force-reinstall --target $(VENV)/typed .
	cd $(VENV)/typed && MYPYPATH=. ../bin/mypy --strict --config-file $(CURDIR)/pyproject.toml -p fedsim

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
