# `make study` and `make test` do all the set-up themselves: they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin
# Pins for everything installed here; pyproject.toml holds the ranges for users.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= runs/quick

.PHONY: study study-from-scratch trained pretrained catalogue overlap models test test-slow test-browser bench lint lab notebooks clean

study: .venv/core
	$(BIN)/python -m analysis run studies/quick.toml --out $(OUT)

# On all cores, a process and a thread each; a process that has nothing left takes from the others.
TEST := $(BIN)/python -m pytest -n auto --dist worksteal

test: .venv/dev
	$(TEST)

test-slow: .venv/dev
	$(TEST) -m slow

# In a real browser: Debian has it as chromium and chromium-driver; axe-core comes by npm.
test-browser: .venv/dev
	$(PIP) -e '.[browser]'
	npm install --silent --no-audit --no-fund --prefix .venv/share/axe axe-core@4.10.3
	$(BIN)/python -m pytest -m browser

bench: .venv/dev
	$(BIN)/python -m benchmarks

# All families trained first, from nothing.
study-from-scratch: .venv/core
	$(BIN)/python -m analysis run studies/scratch.toml --out runs/scratch

# What the trained models show, at length: README's Table 4, and why.
trained: .venv/core
	$(BIN)/python -m analysis run studies/trained.toml --out runs/trained

# A model of the transformers library beside compact ones.
pretrained: .venv/dev
	$(BIN)/python -m analysis run studies/pretrained.toml --out runs/pretrained

# Every perturbation on all routed models that come with the project. The routing of two of them is
# recorded to be replayed in others.
catalogue: .venv/core
	for model in smoe_share cartesian; do \
	  test -d runs/traces/$$model || $(BIN)/python -m analysis record $$model \
	    --study studies/quick.toml --out runs/traces/$$model || exit; \
	done
	$(BIN)/python -m analysis run studies/catalogue.toml --out runs/catalogue

# What their experts have in common, and whether it says what dropping one costs.
overlap: .venv/dev
	$(BIN)/python -m studies.findings overlap --out runs/findings

# The trained models that come with the project: hours. It goes on where it was stopped, on a CPU of
# the same capability; those that are there stay.
models: .venv/core
	$(BIN)/python -m analysis run studies/models.toml --out runs/models
	$(BIN)/python -m studies.ship runs/models

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On the tour.
lab: .venv/dev
	$(BIN)/jupyter lab notebooks/00_tour.ipynb

# The stories with their pictures, on as much text as they are meant for; in tests it is little.
notebooks: .venv/dev
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb

clean:
	rm -rf .venv build *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

# What the study needs, then what the tests need as well; a stamp for each.
.venv/core: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e .
	touch $@

.venv/dev: .venv/core
	$(PIP) -e '.[lab,hf,eval,data,dask,dev]'
	touch $@
