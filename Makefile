# Two commands do all set-up from nothing: `make demo` and `make test`.
#
#   make demo    the wizard writes a project into demo/, and the tiny model goes through every stage
#   make check   linters, types, import contracts, and the fast tests
#   make test    all tests but those that need a GPU or hours
#   make gpu     the tests that need a CUDA device, then the benchmark of it: about ten minutes each
#                (`make gpu BIN=/usr/bin` takes a Python that has everything already)
#   make soak    long counts of kills and fuzzing
#   make bench   the benchmarks; each prints the record that it would add to benchmarks/records/
#   make generated  what is made from the code: config/, examples/seal
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Most tests wait for processes that they start: two at a time take half as long on two cores. A
# file's tests stay together, for what they share.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: setup demo test check lint soak bench gpu generated

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 13); sys.exit(None if ok else "ms4 needs Python 3.11 or 3.12; this is %d.%d. Set PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	@# torch first and pinned: a resolver left to itself may fetch several GB of another build
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[data,train,dev]'
	touch $@

demo: setup
	$(BIN)/ms4-wizard --answers examples/answers.yaml demo
	@# `snakemake --profile local`, after what a killed one may have left there
	$(BIN)/ms4 resume demo
	cd demo && ../$(BIN)/ms4 summary

# The tests of Slurm skip where no controller answers, but not where CI is set: see .ci/run.
test: setup
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu and not soak"

# A tenth of the examples of each property: see tests/examples.py.
check: lint
	$(BIN)/python -m pytest $(PARALLEL) --hypothesis-profile check -m "not slow and not slurm and not gpu and not soak"

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/snakefmt --check Snakefile rules
	@# without a configuration of Slurm: its plugin would wait for a controller that is gone
	SLURM_CONF=/dev/null $(BIN)/snakemake --lint

soak: setup
	$(BIN)/python -m pytest -m soak --timeout=0

# Another BIN is an environment that is there: nothing is installed into it. Older versions of torch
# want cuBLAS's workspace named before they call its products deterministic.
gpu: export CUBLAS_WORKSPACE_CONFIG := :4096:8
gpu: export PYTHONPATH := workflow:tui
gpu: $(if $(filter $(VENV)/bin,$(BIN)),setup)
	$(BIN)/python -m pytest -m gpu tests/parity
	$(BIN)/python benchmarks/gpu.py

# Not what the benchmarks share.
bench: setup
	set -e; for script in $(filter-out benchmarks/gpu.py,$(shell grep -l __main__ benchmarks/*.py)); do echo "== $$script"; $(BIN)/python "$$script"; done

# By way of another file: a failing command must not leave an empty one.
generated: setup
	$(BIN)/python -m ms4.tiny_text
	$(BIN)/ms4 schema > config/schema.json.new
	mv config/schema.json.new config/schema.json
	$(BIN)/ms4-wizard --answers examples/answers.yaml --print-config > config/config.yaml.new
	mv config/config.yaml.new config/config.yaml
