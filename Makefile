# make setup | test | demo | lint | docs | bench | lock | clean
# PYTHON names the interpreter, PIP_ARGS adds arguments to pip, PYTEST_ARGS to pytest.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
PYTEST_ARGS ?= --numprocesses logical --dist loadscope

BIN := .venv/bin
STAMP := .venv/.stamp
LOCK := requirements/cpu-py311.txt
NO_DEPS := requirements/no-deps.txt
PIP_INSTALL := -m pip --disable-pip-version-check --no-input install --quiet --progress-bar off $(PIP_ARGS)

# VTK tries an X server first, and crashes where the X libraries are missing; EGL needs no screen.
ifeq ($(DISPLAY),)
export VTK_DEFAULT_OPENGL_WINDOW ?= vtkEGLRenderWindow
endif

.PHONY: setup system test demo lint docs bench lock clean

setup: $(STAMP)

$(STAMP): $(LOCK) $(NO_DEPS) pyproject.toml
	@$(MAKE) --no-print-directory system
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python $(PIP_INSTALL) --requirement $(LOCK)
	$(BIN)/python $(PIP_INSTALL) --no-deps --requirement $(NO_DEPS)
	$(BIN)/python $(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $@

system:
	@sh requirements/debian.sh "$(PYTHON)"

test: setup
	$(BIN)/python -m pytest $(PYTEST_ARGS)

demo: setup
	$(BIN)/latentphys demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy latentphys tests $(wildcard benchmarks/*.py benchmarks/verification/*.py examples/*.py)

docs: setup
	$(BIN)/mkdocs build --strict

bench: setup
	set -e; for script in $(wildcard benchmarks/bench_*.py); do $(BIN)/python $$script; done

# torch stays where the lock has it: newer ones pull several gigabytes of CUDA packages.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/python $(PIP_INSTALL) $$(grep '^torch==' $(LOCK)) '.[viz,export,trackers,soap,sweeps,formats,bench,dev]'
	grep '^#' $(LOCK) > build/lock.txt
	build/lock/bin/python -m pip freeze --all --exclude pip --exclude latentphys | sed 's/+cpu$$//' | LC_ALL=C sort -f >> build/lock.txt
	mv build/lock.txt $(LOCK) && rm -rf build *.egg-info

clean:
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
