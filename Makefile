# Every target creates the virtual environment if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXTRAS := dev,watch,optuna,mnist5k,audio
STAMP := $(VENV)/.installed
SELFFL := $(BIN)/selffl
# Nothing reports to anybody, and Ray stays on loopback.
export RAY_USAGE_STATS_ENABLED = 0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER = 0
export MLFLOW_DISABLE_TELEMETRY = true
export DO_NOT_TRACK = true

.PHONY: help run comparison test test-fast check format smoke lowest clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $(STAMP)

run: $(STAMP)  ## Self-FL beside FedAvg and local training, 14 writers, an actor each (about a minute)
	$(SELFFL) compare --methods selffl:two_tap,selffl:as_described,fedavg,local

comparison: $(STAMP)  ## Self-FL and every baseline, tuned alike, fresh seeds, two image sets (about an hour)
# Ends at a sweep that fails or in which a trial diverged: then look, and run the rest by hand.
	$(SELFFL) tune tune_configs/baselines.yaml
	$(SELFFL) tune tune_configs/baselines_fashion.yaml
	$(BIN)/python -m analysis.compare --experiment baselines --experiment baselines_fashion \
		--output analysis/results/comparison

test: $(STAMP)  ## everything that CI must pass
	$(BIN)/python -m pip check
	$(BIN)/python -m pytest -m "not ray" -n 2
	$(BIN)/python -m pytest -m "ray"

test-fast: $(STAMP)  ## without Ray and slow tests, under 5 minutes
	$(BIN)/python -m pytest -m "not ray and not slow" -n 2

check: $(STAMP)  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

format: $(STAMP)  ## format and mend what can be mended
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

smoke: $(STAMP)  ## doctor, data describe, run --dry-run, compare, verify: small, on a real Ray
	$(SELFFL) doctor
	$(SELFFL) data describe digits --output $(VENV)/digits.png
	$(SELFFL) run --dry-run > /dev/null
	$(SELFFL) compare --methods selffl,fedavg,local --set training.num_rounds=2 \
		--set placement.clients_per_actor=7 --set tracking.enabled=false \
		--output $(VENV)/smoke
	$(SELFFL) verify $(VENV)/smoke/selffl-two_tap-s0

lowest: $(STAMP)  ## the tests without Ray on the oldest versions that pyproject.toml allows
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet -c constraints-lowest.txt -e '.[watch,optuna]' \
		pytest pytest-xdist hypothesis
	$(VENV)-lowest/bin/python -m pytest -m "not ray" -n 2 -o filterwarnings=default

clean:  ## remove the environment and caches (not runs/ and the MLflow store)
	rm -rf $(VENV) $(VENV)-lowest .mypy_cache .ruff_cache .pytest_cache .hypothesis
