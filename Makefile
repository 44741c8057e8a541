# PYTHON=python3.12 picks the interpreter, VENV=path the environment, ARGS="key=value" is handed to the quickstart.
# TORCH_INDEX=url installs torch, and only torch, from another index: a CPU-only or a certain CUDA build.
PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
ARGS ?=
BIN := $(VENV)/bin
CODE := fedpipe_ray actors tuning clusters

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-services debian lint docs format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## make the environment (every other target does so when it is needed)

# The stamp comes last, so that a half-finished install is never taken for a finished one.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "fedpipe-ray needs Python 3.11 or newer; $(PYTHON) gives: $$($(PYTHON) --version 2>&1 | head -n 1)." \
			"Name another: make PYTHON=python3.11" >&2; exit 1; }
	@rm -f $@
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),-c constraints.txt) torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,minilm,hf,tune,tracking,lm-eval,docs]'
	@touch $@

quickstart: $(VENV)/.installed ## a whole federation on this machine, in a few minutes
	$(BIN)/fedpipe run examples/quickstart.yaml $(ARGS)

test: $(VENV)/.installed ## all tests that need nothing but this machine
	$(BIN)/python -m pytest tests -m "not services"

# The S3 server of the tests has an environment of its own: its dependencies are not ours to pin.
$(VENV)/s3-server/.installed: $(VENV)/.installed tests/s3-server.txt
	$(PYTHON) -m venv $(VENV)/s3-server
	$(VENV)/s3-server/bin/python -m pip install -r tests/s3-server.txt
	@touch $@

# Debian's servers and browser, where we may install them; elsewhere their tests are skipped and say so.
DEBIAN := postgresql mariadb-server-core chromium chromium-driver
debian:
	@{ ls -d /usr/lib/postgresql/*/bin && ls /usr/sbin/mariadbd /usr/bin/chromium /usr/bin/chromedriver; } >/dev/null 2>&1 || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -q && \
		DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends $(DEBIAN); } || \
		echo "install Debian's packages $(DEBIAN) to test campaigns on servers and pages in a browser" >&2

test-services: $(VENV)/.installed $(VENV)/s3-server/.installed debian ## the tests that start a cluster or another service
	$(BIN)/python -m pytest tests -m services

lint: $(VENV)/.installed ## ruff and mypy, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(CODE) benchmarks

docs: $(VENV)/.installed ## the documentation, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: $(VENV)/.installed ## let ruff sort imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches and build outputs; the environment and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(CODE) benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +
