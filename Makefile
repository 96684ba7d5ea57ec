# make demo    set up, run the embedded example end to end, print the table
# make test    set up, run the tests (under 5 minutes on 2 cores)
# make test-slow, lint, typecheck, clean   (test-slow adds lm-evaluation-harness to the environment)

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
DEMO ?= runs/tiny
STAMP := $(VENV)/.installed
HARNESS := $(VENV)/.harness-installed

.PHONY: setup demo test test-slow lint typecheck clean

setup: $(STAMP)

# A CPU build of torch is enough here and is much smaller than the default on Linux; an
# installation that is there already is kept.
$(STAMP): pyproject.toml CMakeLists.txt $(wildcard backends/kernels/*)
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null || \
	  { echo "bitdistill needs a C++17 compiler: apt-get install g++, or xcode-select --install"; exit 1; }
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -c "import torch" 2>/dev/null || $(RUN)/python -m pip install --quiet torch==2.13.0
	$(RUN)/python -m pip install --quiet --editable ".[dev]"
	@touch $(STAMP)

demo: setup
	$(RUN)/bitdistill train --recipe tiny --out $(DEMO)
	$(RUN)/bitdistill export $(DEMO)/student --target onnx --out $(DEMO)/onnx --force
	$(RUN)/bitdistill export $(DEMO)/student --target mlx --out $(DEMO)/mlx --force
	$(RUN)/bitdistill eval $(DEMO)/teacher $(DEMO)/bitnet-sft $(DEMO)/student $(DEMO)/onnx $(DEMO)/mlx \
	  --out $(DEMO)/results.jsonl

test: setup lint typecheck
	$(RUN)/pytest -rs --numprocesses auto --maxprocesses 4

$(HARNESS): $(STAMP)
	$(RUN)/python -m pip install --quiet --editable ".[dev,lm-eval]"
	@touch $(HARNESS)

test-slow: setup $(HARNESS)
	$(RUN)/pytest -m slow -rs --timeout 900

lint: setup
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/clang-format --dry-run -Werror $(wildcard backends/kernels/*.cpp backends/kernels/*.h tests/backends/*.cpp tests/backends/*.h benchmarks/*.cpp)

# The packages under one roof, as they are installed.
typecheck: setup
	@rm -rf build/typecheck && mkdir -p build/typecheck/bitdistill
	@ln -sfn $(CURDIR)/bitdistill/* build/typecheck/bitdistill/
	@for room in backends exporters evals; do \
	  ln -sfn $(CURDIR)/$$room build/typecheck/bitdistill/$$room; done
	$(RUN)/mypy

clean:
	rm -rf build dist runs $(VENV)
