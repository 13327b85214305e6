# `make demo` and `make test` need nothing but Python 3.11 or newer: each makes its own environment and installs into it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BACKENDS ?= torch,tf,flax
WORKERS ?= 2
MINUTES ?= 10

.PHONY: demo test test-slow gpu lint clean

# Converts the embedded checkpoint, proves that the three frameworks agree on it, and generates with each.
demo: $(INSTALLED)
	$(BIN)/opt-zoo inspect
	$(BIN)/opt-zoo convert opt-tiny build/demo/opt-tiny --dtype float32 --overwrite
	$(BIN)/opt-zoo parity build/demo/opt-tiny --json build/demo/parity.json --html build/demo/parity.html --png build/demo/parity.png
	$(BIN)/opt-zoo generate build/demo/opt-tiny "ROMEO:" --backend all --max-new-tokens 60

# Two processes: each compiles on one core most of the time. WORKERS=0 runs all in one. In two parts, since what
# TensorFlow and JAX have compiled stays in memory, for all tests together 10 GB in each process.
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --backends $(BACKENDS) tests/backends
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --backends $(BACKENDS) tests --ignore tests/backends

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest --backends $(BACKENDS) -m "slow and not hub and not gpu"

# With the frameworks that PYTHON has: installs nothing. Results go to benchmarks/results/gpu-DATE.
gpu:
	$(PYTHON) benchmarks/gpu_suite.py --minutes $(MINUTES)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Triton apart from the rest: in one process with TensorFlow it crashes. tests/torch/test_torch_triton_decode.py finds it.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	[ "$$(uname -sm)" != "Linux x86_64" ] || $(BIN)/pip install --quiet --no-deps --constraint constraints.txt --target $(VENV)/triton triton
	touch $@

clean:
	rm -rf $(VENV) build
