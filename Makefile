# Two commands on a fresh machine with nothing but Python, make and a compiler:
#   make train   sets up .venv and runs the main job on text that is already here
#   make test    the same set-up, then the whole suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Files of tests at a time; many tests start several processes.
SIDE_BY_SIDE ?= 2

.PHONY: train test check lint setup clean

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,peers]'
	touch $@

train: setup
	$(BIN)/manyhands train $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(SIDE_BY_SIDE) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

check: lint
	$(BIN)/python -m pytest -q tests/test_architecture.py tests/test_docs.py

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build *.egg-info
