# make demo   set up, then run the library on real input (GPU if there is one, else CPU)
# make test   set up, then lint, type-check and run every test
# make bench  set up, then time products beside torch's; more: .venv/bin/python -m bitblas bench -h
# make compat set up, then compile the GPU kernels, without a GPU, for each Triton in TRITONS
# make check  the same tests in the current Python environment, without setting anything up

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# what the library is tested with; any index options go here too, e.g.
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
# for a torch that brings no Triton (CPU builds); kernels compile and are interpreted without a GPU
TRITON ?= triton==3.6.0

# test processes: many where GPU kernels are compiled, one (0: in pytest itself) elsewhere
WORKERS ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo auto || echo 0)

# what torch 2.11, 2.13 and later ones bring
TRITONS ?= 3.6.0 3.7.1 3.8.0 3.9.0

.PHONY: demo test check lint bench compat clean

demo: $(VENV)/.demo
	$(BIN)/python examples/quickstart.py
	HF_HUB_OFFLINE=1 $(BIN)/python examples/minilm.py

test: $(VENV)/.test
	$(MAKE) check PYTHON=$(BIN)/python

check: lint
	$(PYTHON) -m pytest -n $(WORKERS)

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(VENV)/.test $(VENV)/.bench
	$(BIN)/python -m bitblas bench

compat: $(TRITONS:%=.compat/%/.done)
	$(BIN)/python tests/compat.py $(TRITONS:%=.compat/%)

.compat/%/.done: | $(VENV)/.test
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .compat/$* triton==$*
	touch $@

$(VENV)/.torch: Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.bench: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON)
	touch $@

clean:
	rm -rf $(VENV) .compat build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
