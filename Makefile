# Everything here works from a clean clone with Python and make: the environment is made first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
STAMP := $(VENV)/.ready

.PHONY: demo test check bench clean setup simulate mutants fuzz crashpoints kill kill-sinks faults proxy outage copies overhead differential ultralytics

# torch by its exact version and on its own: only so is the CPU build found.
$(STAMP): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (a minute or two, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) "torch==2.13.0" >$(VENV)/setup.log 2>&1 || (cat $(VENV)/setup.log; false)
	@$(PIP) -e ".[dev]" >$(VENV)/setup.log 2>&1 || (cat $(VENV)/setup.log; false)
	@touch $@

setup: $(STAMP)

demo: $(STAMP)
	@mkdir -p -m 700 .rankgate
	@PATH="$(abspath $(BIN)):$$PATH" RANKGATE_CONFIG=examples/demo.toml OMP_NUM_THREADS=1 \
	  rankgate run -- torchrun --standalone --nproc-per-node 4 examples/digits.py
	@echo "(the command is $(BIN)/rankgate, or: source $(BIN)/activate)"

# Most tests wait for processes and time-outs: two at once take little more than half the time.
test: $(STAMP)
	@$(BIN)/python -m pytest -q -n 2

check: $(STAMP)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache >$(VENV)/imports.log 2>&1 || (cat $(VENV)/imports.log; false)
	@$(BIN)/codespell

bench: $(STAMP)
	@$(BIN)/python -m bench --out bench/out/bench.json

# A whole job in one process: SEED=n plays one history again, with its trace.
simulate: $(STAMP)
	@$(BIN)/python -m tests.simulator $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),10000))

mutants: $(STAMP)
	@$(BIN)/python -m tests.simulator --mutants

# Trials with real processes; SEED=n plays one again.
overhead kill kill-sinks faults proxy outage copies fuzz crashpoints: $(STAMP)
	@$(BIN)/python -m tests.trials.$(subst -,_,$@) $(if $(SEED),--seed $(SEED))

# Ultralytics' own callbacks against the gateway, on stand-in servers (about ten minutes).
differential: $(STAMP)
	@$(BIN)/python -m tests.differential $(CASES)

# Trainings of every version of Ultralytics that is supported, each in its own environment.
ultralytics: $(STAMP)
	@ULTRALYTICS_VERSIONS="$(or $(VERSIONS),8.2.50 8.3.253 8.4.190)" $(BIN)/python -m pytest -q tests/integrations

clean:
	rm -rf $(VENV) $(VENV)-ultralytics-* bench/.venv-bench .rankgate bench/out build dist *.egg-info .mypy_cache .ruff_cache
