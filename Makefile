# `make study` and `make test` do all the set-up themselves: they make .venv and install into it.
PYTHON ?= python3
BIN := .venv/bin
# Pins for everything installed here; pyproject.toml holds the ranges for users.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT ?= runs/quick

.PHONY: study catalogue overlap models test test-slow bench lint lab notebooks clean

study: .venv/core
	$(BIN)/python -m analysis run studies/quick.toml --out $(OUT)

# On all cores, a process and a thread each; a process that has nothing left takes from the others.
TEST := $(BIN)/python -m pytest -n auto --dist worksteal

test: .venv/dev
	$(TEST)

test-slow: .venv/dev
	$(TEST) -m slow

bench: .venv/core
	$(BIN)/python -m benchmarks

# Every perturbation on all routed families. Models of seed 0 are those of the main study, whose
# decisions are recorded to be replayed in those of seed 1.
ROUTED := smoe smoe_share hash fine_grained top_p cartesian
catalogue: study
	mkdir -p runs/catalogue/models
	for family in $(ROUTED); do \
	  model=runs/quick/models/$$family-s0 trace=runs/traces/$$family/seed-0; \
	  test -d $$trace || \
	    $(BIN)/python -m analysis record $$model --study studies/quick.toml --out $$trace || exit; \
	  test -d runs/catalogue/models/$$family-s0 || cp -R $$model runs/catalogue/models; \
	done
	$(BIN)/python -m analysis run studies/catalogue.toml --out runs/catalogue

# Three training seeds of the routed families and of a parallel Cartesian layer, and whether overlap
# says what dropping an expert costs.
overlap: study
	mkdir -p runs/overlap/models
	for family in $(ROUTED); do \
	  test -d runs/overlap/models/$$family-s0 || \
	    cp -R runs/quick/models/$$family-s0 runs/overlap/models || exit; \
	done
	$(BIN)/python -m analysis run studies/overlap.toml --out runs/overlap
	$(BIN)/python studies/relation.py

# The trained models that come with the project: hours. It goes on where it was stopped, on a CPU of
# the same capability; those that are there stay.
models: .venv/core
	$(BIN)/python -m analysis run studies/models.toml --out runs/models
	$(BIN)/python -m studies.ship runs/models

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lab: .venv/dev
	$(BIN)/jupyter lab notebooks

# The stories, executed on the finished study, with their pictures.
notebooks: .venv/dev study overlap
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
	$(PIP) -e '.[lab,hf,data,dask,dev]'
	touch $@
