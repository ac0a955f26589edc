# Every target starts from a fresh clone with python3 and make alone: it creates .venv, installs
# the versions of constraints.txt into it, and runs. `make help` lists the targets.
#
#   PYTHON=/path/to/python3.11   the Python to build .venv with (3.11 or newer)
#   WORKERS=4                    processes that run the tests; 0 for none of their own
#   PYTHON312=/path/to/python    the Python for ArviZ 1.x (3.12 or newer)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:

VENV := .venv
BIN := $(VENV)/bin
VENV_ARVIZ1 := .venv-arviz1
VENV_312 := .venv-python312

PYTHON ?=
PYTHON312 ?=
PYTEST_ARGS ?=
# Tests run in two processes of one thread each: small tensors gain nothing from more threads.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

# Figures go to files, never to a window.
export MPLBACKEND := Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Settings of the user's shell that would send an installation elsewhere than into .venv, or other
# packages into it.
unexport PYTHONHOME PYTHONPATH PIP_USER PIP_TARGET PIP_PREFIX PIP_ROOT

.PHONY: help demo test test-slow test-arviz1 test-python312 lint docs bench dist clean

help:
	@echo 'make demo         train on the digits, print gaps and repairs, write demo-output/'
	@echo 'make test         the fast tests'
	@echo 'make test-slow    the slow tests'
	@echo 'make test-arviz1  the ArviZ 1.x tests, where there is a Python 3.12 or newer'
	@echo 'make test-python312  the fast tests on Python 3.12 or newer with ArviZ 1.x'
	@echo 'make lint         ruff and mypy'
	@echo 'make docs         the documentation, into docs/_build/html'
	@echo 'make bench        the shorter scripts of benchmarks/'
	@echo 'make dist         wheel and sdist into dist/, each installed and tried in a clean environment'
	@echo 'make clean        remove the environments and everything that was built'

demo: $(VENV)/installed-plots
	$(BIN)/pyro-vae demo --output demo-output

test: $(VENV)/installed-test
	$(PYTEST) $(PYTEST_ARGS)

test-slow: $(VENV)/installed-test
	$(PYTEST) -m slow $(PYTEST_ARGS)

lint: $(VENV)/installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/installed-docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

# DATA=mnist.npz takes MNIST; without it the digits that come with the package stand in.
bench: $(VENV)/installed-plots
	$(BIN)/python benchmarks/demo_time.py
	$(BIN)/python benchmarks/iwae_evaluation.py $(if $(DATA),--data '$(DATA)')
	$(BIN)/python benchmarks/objective_steps.py $(if $(DATA),--data '$(DATA)')
	$(BIN)/python benchmarks/step_time.py $(if $(DATA),--data '$(DATA)')
	$(BIN)/python benchmarks/time_to_bound.py $(if $(DATA),--data '$(DATA)')
	$(BIN)/python benchmarks/refine_loop.py $(if $(DATA),--data '$(DATA)')
	$(BIN)/python benchmarks/growth.py $(if $(DATA),--data '$(DATA)')
	$(BIN)/python benchmarks/repair.py
	$(BIN)/python benchmarks/chains.py
	$(BIN)/python benchmarks/calibration.py

# Not editable, so that what was left out of an archive is missed.
dist: $(BIN)/python
	rm -rf dist
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build --outdir dist .
	for archive in dist/*.whl dist/*.tar.gz; do tools/try_archive.sh "$$archive" $(BIN)/python; done

# Without torch and Pyro: the only files these tests need are arviz_versions.py and
# diagnostics/psis.py of the package.
test-arviz1:
	@if ! python=$$(tools/find_python.sh 3.12 $(PYTHON312) python3 python3.12 python3.13 python3.14 pyenv); \
	then \
	    echo 'make test-arviz1: skipped. ArviZ 1.x needs Python 3.12 or newer and none was found;' \
	        'name one with PYTHON312=/path/to/python.'; \
	    exit 0; \
	fi; \
	if [ ! -e $(VENV_ARVIZ1)/installed ]; then \
	    "$$python" -m venv --clear $(VENV_ARVIZ1); \
	    $(VENV_ARVIZ1)/bin/python -m pip install --quiet 'arviz[h5netcdf,matplotlib]>=1,<2' pytest; \
	    touch $(VENV_ARVIZ1)/installed; \
	fi; \
	$(VENV_ARVIZ1)/bin/python -m pytest --confcutdir=tests/export \
	    tests/test_arviz_versions.py tests/diagnostics/test_psis.py $(PYTEST_ARGS)

# No part of .ci/run: it installs PyTorch anew, by default with CUDA. For a build without it:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test-python312
test-python312:
	@if ! python=$$(tools/find_python.sh 3.12 $(PYTHON312) python3 python3.12 python3.13 python3.14 pyenv); \
	then \
	    echo 'make test-python312: no Python 3.12 or newer was found; name one with PYTHON312=/path.' >&2; \
	    exit 1; \
	fi; \
	if [ ! -e $(VENV_312)/installed ]; then \
	    "$$python" -m venv --clear $(VENV_312); \
	    grep -v -i -E '^(arviz|xarray-einstats)=' constraints.txt > $(VENV_312)/constraints.txt; \
	    $(VENV_312)/bin/python -m pip install --quiet --constraint $(VENV_312)/constraints.txt \
	        --editable '.[test]' 'arviz>=1,<2'; \
	    touch $(VENV_312)/installed; \
	fi; \
	OMP_NUM_THREADS=1 $(VENV_312)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

clean:
	rm -rf $(VENV) $(VENV_ARVIZ1) $(VENV_312) build dist demo-output docs/_build
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# .venv/installed-test says that .[test] is installed as pyproject.toml and constraints.txt ask now.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$*]'
	touch $@

$(BIN)/python:
	@if [ -n '$(PYTHON)' ]; then \
	    candidates=('$(PYTHON)'); \
	else \
	    candidates=(python3 python3.11 python3.12 python3.13 python3.14 pyenv); \
	fi; \
	if ! python=$$(tools/find_python.sh 3.11 "$${candidates[@]}"); then \
	    echo "pyro_vae needs Python 3.11 or newer with the venv module; tried $${candidates[*]}." \
	        'Name one with make PYTHON=/path/to/python.' >&2; \
	    exit 1; \
	fi; \
	echo "Creating $(VENV) with $$python"; \
	"$$python" -m venv --clear $(VENV)
