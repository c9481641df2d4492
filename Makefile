# The commands that people use; `make` alone lists them. Each runs in .venv if there is one, otherwise
# in the active environment, and prints the command that it runs.
#
#     make setup
#     make run FLAGS="--steps=100 --method='d_psgd(sgd(0.1), gossip(ring()))'"
#     make test ARGS="-k compress"

PYTHON ?= python3
BIN := $(if $(wildcard .venv/bin/python),.venv/bin/)
FLAGS ?=
ARGS ?=
.DEFAULT_GOAL := help

.PHONY: help
help: ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Creates .venv with all that development needs; PYTHON=python3.12 selects the interpreter.
	$(PYTHON) -m venv .venv
	.venv/bin/pip install -e ".[dev,docs]"

.PHONY: hooks
hooks: ## Makes git run the style checks before each commit.
	$(BIN)pre-commit install

.PHONY: run
run: ## Trains; FLAGS="..." are the flags of experiments/run.py.
	$(BIN)python experiments/run.py $(FLAGS)

.PHONY: test
test: ## Runs the tests; ARGS="..." are arguments of pytest.
	$(BIN)pytest $(ARGS)

.PHONY: slow
slow: ## Runs the tests that `make test` leaves out.
	$(BIN)pytest -m slow $(ARGS)

.PHONY: lint
lint: style types ## Checks style and types, as CI does.

.PHONY: style
style: ## Checks style; seconds.
	$(BIN)ruff check .
	$(BIN)ruff format --check .

.PHONY: types
types: ## Checks types; minutes.
	$(BIN)pyright --pythonpath "$$(command -v $(BIN)python)"

.PHONY: format
format: ## Formats the code, and fixes what ruff can fix.
	$(BIN)ruff format .
	$(BIN)ruff check --fix .

.PHONY: docs
docs: ## Builds the documentation into docs/_build/html.
	$(BIN)python -m sphinx -W --keep-going -b html docs docs/_build/html

.PHONY: ci
ci: ## Runs all that CI runs; it replaces .venv.
	bash .ci/run

.PHONY: clean
clean: ## Removes caches and built files; runs, logs and .venv stay.
	rm -rf build docs/_build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find research experiments launch tests docs -name __pycache__ -prune -exec rm -rf {} +
