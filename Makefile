# `make train` and `make test` set up everything they need in .venv; the second call finds it done.
#   PYTHON=...  the interpreter to build .venv with, 3.11 or newer
#   PARITY=0    leaves out torch, transformers, sentencepiece, lm_eval and Ray, and the tests that need them
#               (torch as PyPI has it brings 2.5 GB of CUDA on Linux; pip takes a CPU wheel where it is told of one)

PYTHON ?= python3
PARITY ?= 1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The lock constrains rather than requires: each set-up takes the part of it that it needs.
INSTALL := $(PIP) install -qq --progress-bar off --constraint requirements.lock
PINS := setup.py requirements.lock
TEST_EXTRAS := report,release,$(if $(filter 0,$(PARITY)),test,test,parity,eval,ray,sentencepiece)
BASE_DONE := $(VENV)/.installed
TEST_DONE := $(VENV)/.installed-$(if $(filter 0,$(PARITY)),test,test-parity)

.PHONY: train release test test-browser test-compilers test-processes test-seqio test-slow test-thorough plan-65b lint lock clean

train: $(BASE_DONE)
	$(BIN)/python tools/prepare_data.py --config=experiments/data/smoke.py --out=data/smoke
	$(BIN)/python -m k2jax.train --config=experiments/smoke.py --workdir=runs/smoke
	$(BIN)/python tools/report.py --workdir=runs/smoke

# The run of `make train`, evaluated, handed over, and checked as a stranger would.
release: train
	$(BIN)/python -m k2jax.evaluate --workdir=runs/smoke --tasks=validation,memorization
	$(BIN)/python -m k2jax.gallery --workdir=runs/smoke
	rm -rf releases/smoke
	$(BIN)/python tools/release.py --workdir=runs/smoke --out=releases/smoke --checkpoints=last --exports=last --data=tokens
	$(BIN)/python tools/verify_release.py releases/smoke --steps=all

test: lint
	$(BIN)/python -m pytest -n 2

# seqio brings TensorFlow: 2.4 GB, in an environment of its own, so that nothing else can come to need it.
test-seqio:
	$(MAKE) VENV=.venv-seqio .venv-seqio/.installed-seqio
	.venv-seqio/bin/python -m pytest tests/test_seqio.py

# The TPU's and the GPU's compilers, which run without either: for who changes kernels, sharding or the plan. CUDA is 4 GB.
test-compilers: $(VENV)/.installed-compilers
	$(BIN)/python -m pytest -n 2 -m "compilers and not slow"

# Pages in a real browser: Debian's chromium and chromedriver, which no package index has.
test-browser: $(TEST_DONE)
	$(BIN)/python -m pytest -n 0 -m browser

# Each process of a run failing in turn: for who changes the control plane, checkpoints or the run directory.
test-processes: $(TEST_DONE)
	$(BIN)/python -m pytest -n 2 --dist load -m "processes and not slow and not thorough"

# More cases of what the tests above show by a few: tests/thorough.py says which those few are. With TEST_MINUTES=10 and
# TEST_FROM=3/8 any of these begins with the third eighth of its tests, and with none after ten minutes.
test-thorough: $(TEST_DONE)
	$(BIN)/python -m pytest -n 2 --dist load -m "thorough and not slow and not compilers"

test-slow: $(TEST_DONE)
	$(BIN)/python -m pytest -m slow

# Compiles the whole of K2-65B and K2-7B for the pods of their experiments: half an hour and some GB.
plan-65b: $(TEST_DONE)
	$(BIN)/python -m pytest -m slow tests/test_plan.py

lint: $(TEST_DONE)
	$(BIN)/python -m ruff check .

# Takes the newest versions that setup.py allows. torch's CUDA packages are left out: torch pins them itself, and a
# CPU wheel of torch needs none of them.
LOCK := uv pip compile --universal --python-version 3.11 --extra test --extra parity --extra report --extra release --extra eval --extra tpu --extra data --extra langid --extra ray --extra sentencepiece --extra seqio --no-emit-index-url \
	--no-header --annotation-style line --quiet
lock: $(BIN)/pip
	$(PIP) install --quiet "uv>=0.9,<1"
	rm -f $(VENV)/resolved
	$(BIN)/$(LOCK) --output-file $(VENV)/resolved setup.py
	{ echo '# Exact versions for Python 3.11 and newer, used as constraints by the Makefile. `make lock` makes it:'; \
	  echo '# $(LOCK) setup.py'; \
	  echo '# less the CUDA packages of torch.'; \
	  grep -vE '^(nvidia-|cuda-|triton)' $(VENV)/resolved; } > requirements.lock

# data/ and runs/ are yours and stay.
clean:
	rm -rf $(VENV) .venv-seqio build dist k2jax.egg-info .pytest_cache .ruff_cache .hypothesis .jax_cache
	find k2jax experiments tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(BASE_DONE): $(PINS) | $(BIN)/pip
	@echo "installing k2jax into $(VENV)"
	@$(INSTALL) setuptools
	@$(INSTALL) --no-build-isolation --editable ".[data,report]"
	@touch $@

$(TEST_DONE): $(PINS) $(BASE_DONE)
	@echo "installing what the tests need into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable ".[data,$(TEST_EXTRAS)]"
	@touch $@

$(VENV)/.installed-compilers: $(PINS) $(TEST_DONE)
	@echo "installing the TPU's and the GPU's compilers into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable ".[data,$(TEST_EXTRAS),tpu,gpu]"
	@touch $@

$(VENV)/.installed-seqio: $(PINS) $(BASE_DONE)
	@echo "installing seqio into $(VENV)"
	@$(INSTALL) --no-build-isolation --editable ".[data,seqio,test]"
	@touch $@

$(BIN)/pip:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" 2>/dev/null || { \
	  echo "error: $(PYTHON) is not Python 3.11 or newer: name one that is, as in make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)
