VENV ?= .venv
VENV_OLDEST ?= .venv-oldest
VENV_NEWEST ?= .venv-newest
VENV_REAL_MODELS ?= .venv-real-models
VENV_DOCS ?= .venv-docs
WORKERS ?= 2
ARGS ?=
COUNT ?= 1000
SEED ?= 0
# Whatever depends on what the versions of JAX, Flax and optax trace to, or keep in their states.
CORE = condition control_flow evaluation export front_doors golden inference origin registry rules_that_fail scanned_stacks spec symmetry transforms transport travel unusual_parameters verify zoo

# The first interpreter that runs (a shim may exist and fail), is new enough and can make a venv.
usable = -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))'
first_usable = $(shell for python in $(1); do \
  "$$python" $(usable) >/dev/null 2>&1 && echo "$$python" && break; done)
# $(1): versions. What pyenv has installed works also where no shim leads to it.
PYENV_ROOT ?= $(HOME)/.pyenv
pythons = $(foreach version,$(1),python$(version) "$(PYENV_ROOT)"/versions/$(version).*/bin/python$(version))
# Those for which JAX and what it needs have wheels.
NEWEST_FIRST = $(call pythons,3.14 3.13 3.12 3.11)
PYTHON ?= $(call first_usable,python3 $(NEWEST_FIRST) python)
PYTHON_OLDEST ?= $(call first_usable,$(call pythons,3.11))
PYTHON_NEWEST ?= $(call first_usable,$(NEWEST_FIRST) python3 python)

# What is never imported need not be compiled.
pip_install = -m pip install --quiet --disable-pip-version-check --no-compile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test studies fuzz lint format typecheck wheel docs notebooks oldest newest real-models bench clean

help:  ## list the commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 18

install: $(VENV)/installed $(VENV_OLDEST)/installed $(VENV_NEWEST)/installed  ## set up the environments of test, oldest and newest

demo: $(VENV)/installed  ## run the demonstration
	$(VENV)/bin/python -m pathcond_jax demo $(ARGS)

test: $(VENV)/installed  ## run the tests; ARGS="-k name" goes to pytest
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m "not study" $(ARGS)

studies: $(VENV)/installed  ## run the notebooks, and every study of `pathcond reproduce` on its small grid, into build/studies
	$(VENV)/bin/python -m pytest -n $(WORKERS) -m study $(ARGS)

fuzz: $(VENV)/installed  ## try COUNT random programs from SEED on; ARGS="--seconds 600" stops earlier
	$(VENV)/bin/python tests/fuzz.py --count $(COUNT) --seed $(SEED) $(ARGS)

lint: $(VENV)/installed  ## check style and formatting
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

format: $(VENV)/installed  ## mend style and formatting
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

typecheck: $(VENV)/installed  ## check types
	$(VENV)/bin/mypy

wheel: $(VENV)/installed  ## build wheel and sdist, check them, try the wheel in an empty environment
	rm -rf dist build/venv
	$(VENV)/bin/python -m build --quiet --outdir dist
	$(VENV)/bin/twine check --strict dist/*
	$(VENV)/bin/python -m venv build/venv
	build/venv/bin/python $(pip_install) dist/*.whl
	cd build && venv/bin/python -W error ../tests/packaging/user_script.py
	cd build && venv/bin/pathcond --version
	cd build && venv/bin/pathcond --help
	cd build && ../$(VENV)/bin/mypy --config-file= --cache-dir=mypy --strict --python-executable venv/bin/python ../tests/packaging/user_script.py

# Not one warning: a broken link, a missing picture or an unknown name fails.
docs: $(VENV_DOCS)/installed  ## build the site, into build/site
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/mkdocs build --strict $(ARGS)
	@echo "built $(CURDIR)/build/site/index.html"

# In the environment that has Qwix; on the CPU, where the tests run them again.
notebooks: $(VENV_REAL_MODELS)/installed  ## run the notebooks, and store what they print; ARGS=FILE: only that one
	JAX_PLATFORMS=cpu $(VENV_REAL_MODELS)/bin/python notebooks/store.py $(ARGS)

# Not all tests: what a version changes shows in these, for a third of the time; the others ask what
# the library computes from a traced program, and `make test PYTHON=... VENV=...` runs them anywhere.
core_tests = -m pytest -n $(WORKERS) -m "not slow" $(foreach name,$(CORE),$(wildcard tests/*/test_$(name).py)) $(ARGS)

oldest: $(VENV_OLDEST)/installed  ## run the core tests on the oldest supported versions
	$(VENV_OLDEST)/bin/python $(core_tests)

newest: $(VENV_NEWEST)/installed  ## run the core tests on the newest Python found, and the newest versions for it
	$(VENV_NEWEST)/bin/python $(core_tests)

real-models: $(VENV_REAL_MODELS)/installed  ## rescale models of public packages, and write docs/real_models.md
	$(VENV_REAL_MODELS)/bin/python -m pytest -n $(WORKERS) tests/real_models/test_real_models.py tests/real_models/test_qwix.py $(ARGS)
	$(VENV_REAL_MODELS)/bin/python tests/real_models/page.py

# What a log of CI should say it tested.
versions = -c 'import platform as p, importlib.metadata as m; print("$(@D): Python " + p.python_version(), *(f"{n} {m.version(n)}" for n in ("jax", "flax", "optax", "numpy", "mkdocs") if [*m.distributions(name=n)]), sep=", ")'

# $(1): interpreter, $(2): what pip installs, $(3), $(4), $(5): what to say without an interpreter.
# An environment that works is kept.
define install
	@test -n "$(1)" || { echo "No $(3) with venv and ensurepip found: install Python $(4) (pyenv install $(4), or the system's python$(4) and python$(4)-venv), or name one: $(5)=/path/to/python" >&2; exit 1; }
	$(@D)/bin/python -m pip --version >/dev/null 2>&1 || "$(1)" -m venv --clear $(@D)
	$(@D)/bin/python $(pip_install) $(2)
	@$(@D)/bin/python $(versions)
	touch $@
endef

$(VENV)/installed: pyproject.toml
	$(call install,$(PYTHON),--editable '.[dev]',Python 3.11 or newer,3.13,PYTHON)

$(VENV_OLDEST)/installed: pyproject.toml .ci/oldest.txt
	$(call install,$(PYTHON_OLDEST),--constraint .ci/oldest.txt --editable '.[test]',Python 3.11,3.11,PYTHON_OLDEST)

$(VENV_NEWEST)/installed: pyproject.toml
	$(call install,$(PYTHON_NEWEST),--upgrade --upgrade-strategy eager --editable '.[test]',Python 3.11 or newer,3.13,PYTHON_NEWEST)

$(VENV_REAL_MODELS)/installed: pyproject.toml tests/real_models/requirements.txt
	$(call install,$(PYTHON_NEWEST),--editable '.[test]' --requirement tests/real_models/requirements.txt,Python 3.11 or newer,3.13,PYTHON_NEWEST)

$(VENV_DOCS)/installed: pyproject.toml
	$(call install,$(PYTHON),--editable '.[docs]',Python 3.11 or newer,3.13,PYTHON)

bench: $(VENV)/installed  ## measure speed and memory; ARGS="--reference DIR" times the authors' code too
	mkdir -p build
	$(VENV)/bin/python benchmarks/conditioning.py --json build/conditioning.json $(ARGS)
	$(VENV)/bin/python benchmarks/lifting.py --json build/lifting.json
	$(VENV)/bin/python benchmarks/transformers.py --json build/transformers.json
	$(VENV)/bin/python benchmarks/tracing.py --json build/tracing.json
	$(VENV)/bin/python benchmarks/gating.py

clean:  ## remove everything that make made
	rm -rf $(VENV) $(VENV_OLDEST) $(VENV_NEWEST) $(VENV_REAL_MODELS) $(VENV_DOCS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
