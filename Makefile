# One command each: demo, test, test-all, check, bench, clean. Everything lives in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# An installed torch is used; TORCH_INDEX_URL names another wheel index for it (e.g. a CPU or CUDA one).
SYSTEM_TORCH := $(shell $(PYTHON) -c "import torch" 2>/dev/null && echo yes)
TORCH_INDEX := $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL),)
CONSTRAINTS := $(if $(SYSTEM_TORCH),$(VENV)/constraints.txt,constraints.txt)
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-all check bench install clean

install: $(VENV)/.ready

$(VENV)/bin/python:
	$(PYTHON) -m venv $(if $(SYSTEM_TORCH),--system-site-packages,) $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) (a few minutes the first time)"
	$(if $(SYSTEM_TORCH),grep -v '^torch==' constraints.txt > $(CONSTRAINTS),$(BIN)/python -m pip install -q -c constraints.txt $(TORCH_INDEX) torch)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e .
	@touch $@

$(VENV)/.ready: $(VENV)/.installed
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/tunesmith demo --overwrite

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.ready
	OMP_NUM_THREADS=1 TUNESMITH_TRIALS=60 $(BIN)/python -m pytest -n 2

check: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
