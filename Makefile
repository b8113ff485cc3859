# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up

.PHONY: setup test-packages azurite demo train-demo quick test fuzz client-tests public-grpc vllm chaos train-chaos simulate attack e2e lint proto docs bench clean
setup: $(STAMP)

# Tests start some hundred processes. Each would compile every module, and each pytest rewrite every test, where it is set.
unexport PYTHONDONTWRITEBYTECODE

# One shared, idempotent step. Every requirement is pinned and nothing is resolved (--no-deps): torchrec names the CUDA
# build of fbgemm-gpu, which a resolver would fetch beside the CPU build.
$(STAMP): requirements/all.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or say make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --no-deps -r requirements/all.txt
	$(BIN)/pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup
	$(BIN)/python examples/demo/run.py

# What the C++ example is built with. Where they cannot be installed, its test says so and is skipped.
CPP_PACKAGES := g++ libgrpc++-dev libprotobuf-dev pkgconf protobuf-compiler-grpc
# What looks at the page and at metrics. Where it cannot be installed, its tests are skipped too.
SEEING_PACKAGES := chromium prometheus
test-packages:
	@dpkg --status $(CPP_PACKAGES) >/dev/null 2>&1 || test "$$(id -u)" -ne 0 \
	    || { apt-get update && apt-get install --yes --no-install-recommends $(CPP_PACKAGES); } \
	    || echo "no packages for the C++ example: $(CPP_PACKAGES)"
	@dpkg --status $(SEEING_PACKAGES) >/dev/null 2>&1 || test "$$(id -u)" -ne 0 \
	    || { apt-get update && apt-get install --yes --no-install-recommends $(SEEING_PACKAGES); } \
	    || echo "no packages for the tests of the page and of boards: $(SEEING_PACKAGES)"

# Azure's emulator, for tests of az:// alone: 360 MB of npm's packages. Without it they are skipped.
azurite:
	npm install --silent --no-audit --no-fund --prefix .azurite azurite@3.37.0

# Workers of pytest-xdist: many tests wait more than they compute.
TEST_WORKERS ?= 3
SIDE_BY_SIDE = --numprocesses=$(TEST_WORKERS) --dist=loadfile --no-loadscope-reorder
test: setup test-packages
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) $(PYTEST_ARGS)

# A small LongCat whose tables are trained in two shards, one of them killed on the way; about two minutes.
train-demo: setup
	$(BIN)/python examples/train/train_tables.py

# The tests that start no service, in less than a minute.
quick: setup
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m "not service and not slow" $(PYTEST_ARGS)

# Inputs that hypothesis draws, so many for each test that has them.
EXAMPLES ?= 10000
fuzz: setup
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest $(SIDE_BY_SIDE) -m fuzz --timeout=0 $(PYTEST_ARGS)

# vLLM with its tables in the service, in an environment of its own that holds the client's side; 10 minutes for the tests on 2 cores.
VLLM := .venv-vllm
$(VLLM)/.set-up: requirements/vllm.txt pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -qq --no-deps -r requirements/vllm.txt
	$(VLLM)/bin/pip install -qq --no-deps --no-build-isolation --editable .
	@touch $@

# Whether the core of another grpcio can be used, and the client's side with it: in an environment of its own, against
# the service of `make setup`.
GRPCIO ?= 1.74.0
CLIENT := .venv-client
client-tests: setup
	test -x $(CLIENT)/bin/python || $(PYTHON) -m venv $(CLIENT)
	$(CLIENT)/bin/pip install -qq --editable . torch==2.13.0 grpcio==$(GRPCIO)
	$(CLIENT)/bin/pip install -qq pytest pytest-timeout hypothesis psutil safetensors tokenizers pydantic fsspec xxhash \
	    grpcio-health-checking==$(GRPCIO) grpcio-reflection==$(GRPCIO)
	$(CLIENT)/bin/python -m embedding_service.grpc_core
	EMBEDDING_SERVICE_PYTHON=$(BIN)/python $(CLIENT)/bin/python -m pytest tests/client tests/wire tests/ngram/test_longcat.py \
	    --ignore tests/client/test_torchrec.py $(PYTEST_ARGS)

# Rooms that speak gRPC, where grpc's public API serves in place of its core (embedding_service/grpc_core.py).
public-grpc: setup
	EMBEDDING_SERVICE_GRPC=public $(BIN)/python -m pytest tests/test_front.py tests/test_floods.py tests/test_drains.py \
	    tests/test_budget.py tests/client tests/shard tests/controller $(PYTEST_ARGS)

vllm: setup $(VLLM)/.set-up
	EMBEDDING_SERVICE_PYTHON=$(BIN)/python $(VLLM)/bin/python -m pytest tests/vllm_plugin $(PYTEST_ARGS)

# Shards and the controller come, go, die and hang for SECONDS, in the order of SEED. SECURE=1: they speak TLS, and
# certificates, keys, a token and the policy are replaced every second.
SECONDS ?= 120
SEED ?= 1
SECURE ?=
chaos: setup
	PYTHONPATH=tests $(BIN)/python -m support.chaos --seconds $(SECONDS) --seed $(SEED) $(if $(SECURE),--secure --rotate)

# The same while two branches are trained, with a trainer that dies too. Many die at named points of their code, and it is
# told how often at which: 10 minutes come to nearly all of them. Then a share dies at each of its operations on a file.
COPIES ?= 2
train-chaos: setup
	folder=$$(mktemp -d) && PYTHONPATH=tests $(BIN)/python -m support.training_chaos $$folder --seconds $(SECONDS) --seed $(SEED) --copies $(COPIES) && \
	  PYTHONPATH=tests $(BIN)/python -m support.crashes $$folder/files && rm -r $$folder

# Controller, shards, routers, network and store in one thread, each seed another run of 500 events: 1,000 take about a
# minute of two cores. A failing seed is made short and told step by step.
SEEDS ?= 1000
FIRST ?= 0
simulate: setup
	PYTHONPATH=tests $(BIN)/python -m simulation --seeds $(SEEDS) --first $(FIRST)

# Every class of attack on a running service, with values drawn from SEED, in 5 minutes at most.
# CLASSES="a,b": those alone; CLASSES=worker: those on a model worker, which takes a minute to start. SECURE=1: on a
# service that speaks TLS, by who has a client's token and another shard's certificate.
CLASSES ?=
attack: setup
	PYTHONPATH=tests $(BIN)/python -m support.attack --seed $(SEED) --only "$(CLASSES)" $(if $(SECURE),--secure)

# The Kubernetes overlay on podman containers, from the images' build on: 30 minutes at most. Needs root and a kubectl.
PODMAN_PACKAGES := podman runc netavark aardvark-dns catatonit iptables debootstrap
e2e: setup
	@dpkg --status $(PODMAN_PACKAGES) >/dev/null 2>&1 || { apt-get update && apt-get install --yes --no-install-recommends $(PODMAN_PACKAGES); }
	$(BIN)/python tests/e2e/run.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy tests benchmarks examples
	$(BIN)/lint-imports --no-cache

proto: setup
	$(BIN)/python protos/generate.py

# The documentation's site, in build/site. What builds it has an environment of its own.
DOCS := .venv-docs
$(DOCS)/.set-up: requirements/docs.txt
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install -qq --no-deps -r requirements/docs.txt
	@touch $@

docs: setup $(DOCS)/.set-up
	$(BIN)/python docs/generate build/docs
	PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

# With the peers to compare with: what of them is not there is skipped and named. They are no part of `make setup`.
bench: setup
	$(BIN)/pip install -qq --no-deps -r requirements/bench.txt
	$(BIN)/python -m benchmarks

clean:
	rm -rf .azurite $(VENV) $(VLLM) $(CLIENT) $(DOCS) .demo .e2e build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
