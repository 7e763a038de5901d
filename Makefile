# Two commands do all the set-up: `make run` and `make test`. Bring your own environment with VENV=path.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)

# A folder of wheels to install from, on a machine that has torch and no package index.
WHEELS ?=

.PHONY: run test gpu wheels lint types clean

run: $(VENV)/.installed
	$(BIN)/fedsim run strategy=fedld

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal

# The checks and benchmarks of an accelerator; without one they run small on the CPU. Writes gpu.json and docs/gpu.md.
# Neither hangs: tests that fail or take ten minutes leave the benchmarks to run, and are said at the end.
gpu: $(VENV)/.installed-gpu
	CUBLAS_WORKSPACE_CONFIG=:4096:8 timeout 600 $(BIN)/python -m pytest -q tests/test_gpu.py tests/test_graphs.py \
		tests/test_precision.py; status=$$?; \
	timeout 900 $(BIN)/python -m benchmarks gpu --json gpu.json && exit $$status

# What a machine without a package index needs, all but torch: docs/engines.md.
wheels: $(VENV)/bin/python
	$(BIN)/python -m benchmarks.wheels wheels --python $(or $(PYTHON_VERSION),3.12)

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

ifeq ($(WHEELS),)
$(VENV)/.installed-gpu: $(VENV)/.installed-dev
	touch $@
else
$(VENV)/.installed-gpu: pyproject.toml
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(BIN)/pip install --quiet --no-index --find-links $(WHEELS) setuptools pytest
	$(BIN)/pip install --quiet --no-index --find-links $(WHEELS) --no-build-isolation -e .
	touch $@
endif

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
