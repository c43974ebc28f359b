# Each target sets everything up by itself; nothing is installed twice, so both work offline afterwards.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: quickstart test test-slow test-lowest lint format docs clean

quickstart: $(VENV)/installed
	$(BIN)/pdiff-hf quickstart

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

# SLOW="slow and not long" leaves out what takes longest, as CI does.
SLOW ?= slow
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m "$(SLOW)" --dist=loadfile

# The lower bounds of pyproject.toml, on the oldest Python: downloads a torch of several gigabytes.
test-lowest:
	test -x .venv-lowest/bin/python || python3.10 -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[dev]"
	.venv-lowest/bin/python -m pytest -m "not slow"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The documentation, as pages in site/.
docs: $(VENV)/installed
	$(BIN)/mkdocs build --quiet

clean:
	rm -rf $(VENV) runs build site *.egg-info

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
