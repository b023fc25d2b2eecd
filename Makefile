# One command each; every one sets up .venv first (a second run skips that).
export OMP_WAIT_POLICY ?= PASSIVE
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test test-all lint format bench pictures screenshots icon samples train-lite train-fusion \
	train-text-guided train-zero-shot train-spectral evaluate clean

help:
	@echo "make demo        segment the simulated sample, picture in freqseg-demo/"
	@echo "make test        the tests (make test-all: the slow ones too)"
	@echo "make lint        ruff and mypy"
	@echo "make bench       speed and memory, as ratios of one run"
	@echo "make evaluate    accuracy on the real test sets (../shared/data or FREQSEG_DATA)"
	@echo "make train-lite  train the lite preset's aligner again"
	@echo "make train-text-guided  train the text-guided model again"
	@echo "make train-zero-shot  train the zero-shot path's own modules (after train-lite)"
	@echo "make train-spectral  train the spectral models"
	@echo "make train-fusion  train the CT/MR fusion networks again"
	@echo "make screenshots the panel's pictures in Resources/Screenshots"
	@echo "make pictures    make the README's pictures again (after make demo and make evaluate)"
	@echo "make samples     make the simulated sample volumes again"

setup:
	@PYTHON="$(PYTHON)" $(PYTHON) scripts/set_up.py

demo: setup
	$(BIN)/freqseg demo -o freqseg-demo

test: setup
	$(BIN)/python -m pytest

test-all: setup
	$(BIN)/python -m pytest -m "slow or not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python -m Testing.benchmarks

evaluate: setup
	$(BIN)/freqseg evaluate --wordings canonical --wordings held-out --markdown build/evaluation.md --csv build/evaluation.csv \
		--html build/evaluation.html --overwrite

pictures: setup
	$(BIN)/python scripts/make_pictures.py

screenshots: setup
	$(BIN)/python scripts/make_screenshots.py

icon: setup
	$(BIN)/python scripts/make_icon.py

samples: setup
	$(BIN)/python -m pip install --quiet "nilearn>=0.11"
	$(BIN)/python Resources/Samples/make_samples.py

train-lite: setup
	$(BIN)/freqseg train-lite

train-fusion: setup
	$(BIN)/freqseg train-fusion

train-text-guided: setup
	$(BIN)/freqseg train text-guided

train-zero-shot: setup
	$(BIN)/freqseg train zero-shot --test

train-spectral: setup
	for config in Resources/Configs/spectral-*.json; do $(BIN)/freqseg train-spectral $$config --overwrite --data "$${FREQSEG_DATA:-../shared/data}" || exit 1; done

clean:
	rm -rf build freqseg-demo .pytest_cache .mypy_cache .ruff_cache
