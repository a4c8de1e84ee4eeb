# make lab     install into .venv and open the course in JupyterLab
# make test    everything that must hold: lint, unit, parity and doc tests, and every notebook of both editions
# The rest is for those who work on the course: notebooks, oldest, thorough, bench, gpu, sanitize, lint, clean.

PYTHON ?= python3
VENV   ?= .venv
OLDEST ?= .venv-oldest
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
NOTEBOOKS = $(wildcard notebooks/*.ipynb solutions/*.ipynb)
WORKERS ?= 2
PARALLEL = -n $(WORKERS) --dist loadfile
BENCHMARKS = importtime models scaling quantization pruning

.PHONY: lab test lint notebooks oldest thorough machines bench gpu sanitize clean
.DELETE_ON_ERROR:

lab: $(VENV)/.lab
	$(BIN)/python -m vitcourse.course start work
	$(BIN)/jupyter lab --notebook-dir=work

test: lint
	$(BIN)/python -m vitcourse.course check
	$(BIN)/python -m pytest -q $(PARALLEL)
	$(BIN)/python -m pytest -q $(PARALLEL) --nbval $(NOTEBOOKS)

# One thread a worker: two programs whose threads wait for each other on two cores are slower than one after the other.
test: export OMP_NUM_THREADS = 1

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

notebooks: $(VENV)/.dev
	$(BIN)/python -m vitcourse.course build

# The oldest versions that are supported, in an environment of their own: the tests, and the opening lesson.
# (Triton 3.6 interprets kernels with the NumPy of its time only.)
oldest: $(OLDEST)/.dev
	$(OLDEST)/bin/python -m pytest -q -m "not slow and not thorough"
	$(OLDEST)/bin/python -m pytest -q --nbval notebooks/00_vit.ipynb solutions/00_vit.ipynb

# What takes minutes, and seldom is the first to fail.
thorough: $(VENV)/.dev machines
	$(BIN)/python -m pytest -q -m thorough

# The tests on five machines that this one pretends to be: older, without vectors, of many threads, of a stranger.
machines: $(VENV)/.dev
	$(BIN)/python -m tests.thorough

bench: $(VENV)/.dev
	missed=; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || missed="$$missed $$name"; done; \
	$(BIN)/python -m benchmarks.tables && test -z "$$missed" || { echo "missed their targets:$$missed"; exit 1; }

# On a machine with CUDA: in stages that each have a budget, the most valuable first; what was stopped goes on the next
# time. Uses whatever `python3` has torch, triton and pytest; `--list` says what the rest needs.
gpu:
	$(PYTHON) -m benchmarks.gpu

# Whether a kernel touches memory that is not its own. (PyTorch's allocator would hide it: it hands out parts of big blocks.)
sanitize:
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
	$(PYTHON) -m pytest -q tests/gpu/test_flash.py tests/gpu/test_quantize.py -k "half_precision or strides or bias or exact or fused"

clean:
	rm -rf $(VENV) $(OLDEST) build dist

# An environment is made once, and brought up to date when pyproject.toml changes.
$(VENV)/.lab $(VENV)/.dev: $(VENV)/.%: pyproject.toml | $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[$*]"
	touch $@

$(VENV):
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'vitcourse needs Python 3.11 or newer: make PYTHON=python3.12 …')"
	$(PYTHON) -m venv $(VENV)

$(OLDEST)/.dev: pyproject.toml
	test -d $(OLDEST) || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --quiet -e ".[dev]" "torch==2.11.*" "torchvision==0.26.*" "numpy<2.4"
	touch $@
