# `make demo` and `make test` do all the set-up on a machine that has Python 3.10+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-slow test-comfy test-browser check bench clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: $(VENV)/installed  ## six prompts, plain and steered, on the embedded model
	$(BIN)/diffsteer generate

test: $(VENV)/installed  ## everything but the slow proofs
	$(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile -m "not slow and not comfy and not browser"

test-slow: $(VENV)/installed  ## the slow proofs
	$(BIN)/python -m pytest -q -m slow

test-comfy: $(VENV)/installed  ## with a real ComfyUI: DIFFSTEER_COMFYUI names a checkout, whose Python has diffsteer
	@test -n "$(DIFFSTEER_COMFYUI)" || { echo "set DIFFSTEER_COMFYUI to a checkout of ComfyUI"; exit 2; }
	$(BIN)/python -m pytest -q -m comfy tests/comfy

test-browser: $(VENV)/installed  ## reports in a headless Chromium, which Debian's packages bring
	@command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } >/dev/null 2>&1 || true
	@command -v chromium >/dev/null || { echo "Chromium can be neither found nor installed here"; exit 2; }
	$(BIN)/python -m pip install --quiet playwright
	$(BIN)/python -m pytest -q -m browser tests/report

check: $(VENV)/installed-dev  ## style, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

bench: $(VENV)/installed  ## overhead, then quality (about three hours on one core)
	$(BIN)/python scripts/bench_overhead.py
	$(BIN)/python scripts/bench_quality.py

clean:
	rm -rf $(VENV) build dist *.egg-info outputs multirun
