VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
WORKERS ?= 2
ARGS ?=
# Whatever depends on what the versions of JAX, Flax and optax trace to, or keep in their states.
CORE = condition front_doors golden spec symmetry transforms transport zoo

# The first interpreter that runs (a shim may exist and fail), is new enough and can make a venv.
usable = -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'
first_usable = $(firstword $(foreach p,$(1),$(shell $(p) $(usable) >/dev/null 2>&1 && echo $(p))))
PYTHON ?= $(call first_usable,python3 python3.13 python3.12 python3.11 python)
# The oldest numpy and scipy have wheels for these two only.
PYTHON_OLDEST ?= $(call first_usable,python3.11 python3.12)

# What is never imported need not be compiled.
pip_install = -m pip install --quiet --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test studies lint format typecheck wheel oldest bench clean

help:  ## list the commands
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 18

install: $(VENV)/installed $(VENV_OLDEST)/installed  ## set up both environments, of the newest and of the oldest versions

demo: $(VENV)/installed  ## run the demonstration
	$(VENV)/bin/python -m pathcond_jax demo $(ARGS)

test: $(VENV)/installed  ## run the tests; ARGS="-k name" goes to pytest
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m "not study" $(ARGS)

studies: $(VENV)/installed  ## run every study of `pathcond reproduce` on its small grid, into build/studies
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m study $(ARGS)

lint: $(VENV)/installed  ## check style and formatting
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: $(VENV)/installed  ## mend style and formatting
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

typecheck: $(VENV)/installed  ## check types
	$(VENV)/bin/mypy

wheel: $(VENV)/installed  ## build the wheel and try it in an empty environment
	rm -rf dist build/venv
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(VENV)/bin/python -m venv build/venv
	build/venv/bin/python $(pip_install) dist/*.whl
	cd build && venv/bin/python -W error -c 'import pathcond_jax; print("imported", pathcond_jax.__file__)'
	cd build && venv/bin/pathcond --help

oldest: $(VENV_OLDEST)/installed  ## run the core tests on the oldest supported versions
	$(VENV_OLDEST)/bin/python -m pytest -n $(WORKERS) -m "not slow" $(foreach name,$(CORE),$(wildcard tests/*/test_$(name).py)) $(ARGS)

# $(1): interpreter, $(2): what pip installs, $(3) and $(4): what to say when there is no interpreter.
# An environment that works is kept.
define install
	@test -n "$(1)" || { echo "No $(3) with venv and ensurepip found; name one: $(4)=/path/to/python" >&2; exit 1; }
	$(@D)/bin/python -m pip --version >/dev/null 2>&1 || "$(1)" -m venv --clear $(@D)
	$(@D)/bin/python $(pip_install) $(2)
	touch $@
endef

$(VENV)/installed: pyproject.toml
	$(call install,$(PYTHON),--editable '.[dev]',Python >= 3.11,PYTHON)

$(VENV_OLDEST)/installed: pyproject.toml .ci/oldest.txt
	$(call install,$(PYTHON_OLDEST),--constraint .ci/oldest.txt --editable '.[test]',Python 3.11 or 3.12,PYTHON_OLDEST)

bench: $(VENV)/installed  ## measure speed and memory; ARGS="--reference DIR" times the authors' code too
	mkdir -p build
	$(VENV)/bin/python benchmarks/conditioning.py --json build/conditioning.json $(ARGS)
	$(VENV)/bin/python benchmarks/lifting.py --json build/lifting.json
	$(VENV)/bin/python benchmarks/tracing.py
	$(VENV)/bin/python benchmarks/gating.py

clean:  ## remove everything that make made
	rm -rf $(VENV) $(VENV_OLDEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
