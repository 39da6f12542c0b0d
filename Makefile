# make ablation  set up, then train the three strategies on real text and compare them (about 5 minutes on 2 cores)
# make study     the same with three seeds, both orders of the data, the recall task, and the noise of the gradient (about 40 minutes)
# make test      set up, then all tests (8 to 20 minutes on 2 cores of a shared machine)
# make parity    the model and optimisers against PyTorch, which this installs
# make hub       data sets and tokenizers by name, against a server on this machine
# make lint      ruff
# make clean     remove .venv and what tools have kept
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help ablation study test parity hub lint clean
help:
	@sed -n 's/^# \(make [a-z].*\)/\1/p' $(firstword $(MAKEFILE_LIST))

ablation: $(VENV)/ready
	$(BIN)/python -m experiments.ablation --scale=cpu --workdir=runs/ablation

study: $(VENV)/ready
	$(BIN)/python -m experiments.ablation --scale=cpu --workdir=runs/study --seeds=42,43,44 \
		--settings=independent,paired,recall
	$(BIN)/python -m experiments.noise --workdir=runs/study

test: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Against the independent PyTorch implementation in tests/parity/, and against transformers' Mixtral; the benchmark's peers.
parity: $(VENV)/ready
	$(BIN)/python -c "import torch, transformers" 2>/dev/null || $(BIN)/pip install -q "torch==2.13.0" "transformers==5.23.0"
	$(BIN)/python -m pytest --override-ini=addopts= -q tests/parity

# Data sets and tokenizers by name: the Hub's own clients against a server on this machine.
hub: $(VENV)/ready
	$(BIN)/python -c "import datasets" 2>/dev/null || $(BIN)/pip install -q "datasets>=5.2,<6"
	$(BIN)/python -m pytest --override-ini=addopts= -q tests/hub

lint: $(VENV)/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -r requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
