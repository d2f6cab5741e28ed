# make demo is the main job, make test the tests; both set themselves up. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help setup demo test nightly lint bench chaos image clean
.DEFAULT_GOAL := help

help:
	@echo "make setup               a virtual environment in .venv with the command 'moviola'"
	@echo "make demo [VIDEOS=DIR]   the main job: pack, train, survive a kill, evaluate, look"
	@echo "make test                lint, types and all tests but the longest"
	@echo "make nightly             the tests that take minutes each"
	@echo "make chaos [ROUNDS=50 SEED=1 PLACES='disk s3 ray']   faults over smoke runs, with a table"
	@echo "make bench [BENCH='overhead telemetry']   measures, into benchmarks/results"
	@echo "make lint | image | clean"

$(VENV)/.runtime: pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) (one to three minutes)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@$(PIP) -e '.[dev]'
	@touch $@

setup: $(VENV)/.runtime

demo: setup
	@$(BIN)/python -m cluster.demo $(if $(VIDEOS),--videos "$(VIDEOS)")

lint: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint
	@$(BIN)/python -m pytest $(TESTS)

ROUNDS := 50
SEED := 1
PLACES := disk s3 ray

chaos: $(VENV)/.dev
	@$(BIN)/python -m tests.chaos.rounds --rounds $(ROUNDS) --seed $(SEED) --places $(PLACES)

nightly: $(VENV)/.dev
	@$(BIN)/python -m pytest -n 0 -m nightly $(TESTS)
	@MOVIOLA_FUZZ=30 $(BIN)/python -m pytest tests/trainer/test_fuzz.py tests/cluster/test_any_submission.py

BENCH := overhead telemetry checkpoint recovery simulate

bench: $(VENV)/.dev
	@for name in $(BENCH); do $(BIN)/python -m benchmarks.$$name || exit; done

image:
	docker build -t moviola .

clean:
	rm -rf $(VENV) runs demo_data build *.egg-info
