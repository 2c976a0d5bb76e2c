# `make` alone lists the targets. Everything runs in .venv, which the first target that needs it creates.

PYTHON ?= python3
DATA =
OUT = paper_figures/out
PRESET = quick
PYTEST_WORKERS ?= 2

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help reproduce results test test-fast coverage test-verl bench lint notebooks clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

reproduce: $(INSTALLED) ## train, evaluate, draw: everything into OUT= (DATA=folder, PRESET=quick|small)
	$(BIN)/sapo run --preset $(PRESET) --out "$(OUT)" $(if $(DATA),--data "$(DATA)")
	$(BIN)/sapo figures --out "$(OUT)"

results: $(INSTALLED) ## docs/results and the generated blocks of README.md and docs, from paper_figures/data
	MPLBACKEND=Agg $(BIN)/python paper_figures/make_pages.py

# One thread a worker: more only fight over the cores. No test needs the network.
RUN_TESTS = SAPO_FAST=1 OMP_NUM_THREADS=1 MPLBACKEND=Agg HF_HUB_OFFLINE=1 \
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist worksteal

test: $(INSTALLED) ## all tests (PYTEST_WORKERS=2)
	$(RUN_TESTS)

test-fast: $(INSTALLED) ## the tests that take no training: a minute or two
	$(RUN_TESTS) -q -m "not slow"

coverage: $(INSTALLED) ## all tests, and which lines of sapo/ they reach
	$(RUN_TESTS) --cov=sapo --cov-report=term

# torch alone first: what is built on it would bring another one.
test-verl: ## the tests of sapo.integrations.verl, in an environment of their own (.venv-verl)
	@test -x .venv-verl/bin/python || $(PYTHON) -m venv .venv-verl
	@.venv-verl/bin/python -m pip install -qq --disable-pip-version-check $$(grep ^torch= constraints-verl.txt)
	@.venv-verl/bin/python -m pip install -qq --disable-pip-version-check -r constraints-verl.txt
	@.venv-verl/bin/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv-verl/bin/python -m pytest -q -c /dev/null --rootdir tests \
		-p no:cacheprovider tests/test_verl.py tests/test_step_codes.py

bench: $(INSTALLED) ## speed and memory against what one would run instead: benchmarks/out/bench.json
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks

lint: $(INSTALLED) ## ruff check, ruff format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(INSTALLED) ## the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks/

clean: ## remove caches and build files; .venv and results stay
	rm -rf build dist *.egg-info .coverage .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./.venv -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is taken up again by the next `make`.
# `torch==2.13.0` also admits 2.13.0+cpu, which pip prefers where its own configuration offers it (PIP_FIND_LINKS, say).
$(INSTALLED): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
			echo "sapo needs Python 3.11 to 3.13, and $(PYTHON) is not: make ... PYTHON=python3.12 names another." >&2; exit 1; }; \
		$(PYTHON) -m venv --clear .venv; }
	@echo "Installing sapo into .venv: some minutes the first time."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@
