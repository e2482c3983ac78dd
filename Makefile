# `make demo` and `make test` work alone on a machine with Python 3.11 and pip: each installs what it needs into .venv.
# PYTHON=python3 skips the virtual environment and uses what that Python has.
VENV := .venv
PYTHON ?= $(VENV)/bin/python
ifeq ($(PYTHON),$(VENV)/bin/python)
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
endif

.PHONY: demo test test-gpu lint
demo: $(RUN)
	$(PYTHON) -m pretrain.demo

test: $(DEV)
	$(PYTHON) -m pytest -n 2 --dist worksteal tests

test-gpu:
	$(PYTHON) -m pytest -m gpu tests

lint: $(DEV)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[corpus]"
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[dev]"
	touch $@
