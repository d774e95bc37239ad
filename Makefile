# make demo [TASK=segmentation]: the whole method on built-in data.
# make check: lint, types, and the tests that train nothing. make test: lint, types and all tests.
# make coverage: all tests, and which lines they run.
# make test-installs: what the README installs, in fresh environments. All set up .venv first.

PYTHON ?= python3
# `tensorflow` and `tensorflow-cpu` own the same folder: exactly one of them.
TF ?= $(shell command -v nvidia-smi > /dev/null && echo tf || echo tf-cpu)
# Versions to install; `CONSTRAINTS=` takes the newest, as Python 3.10 does, which many have left.
CONSTRAINTS ?= $(shell $(PYTHON) -c \
	'import sys; print("constraints.txt" if sys.version_info >= (3, 11) else "")')
SEED ?= 0
TASK ?= detection
DEMO_detection := demo
DEMO_segmentation := demo_segmentation
DEMO := $(or $(DEMO_$(TASK)),$(error TASK=$(TASK) is neither detection nor segmentation))
RUN ?= runs/$(DEMO)
VENV := .venv/bin
LAUNCH := $(VENV)/python
PYTEST = $(LAUNCH) -m pytest --durations=20
PARALLEL := --numprocesses=auto
# Tests that train nothing and build no large network, for `make check`.
FAST := tests/ops tests/applications/test_layers.py $(addprefix tests/data/, \
	test_augment.py test_digits.py test_image_ops.py) $(addprefix tests/test_, \
	architecture.py config.py experiments.py extras.py losses.py metrics.py optimization.py \
	setup.py visualize.py)

.PHONY: demo check test coverage test-installs lint types tests

demo: .venv/ready
	$(VENV)/python -m official_selftrain.run --experiment=$(DEMO) --model_dir=$(RUN) \
		--params_override=trainer.seed=$(SEED)

check: lint
	$(PYTEST) $(PARALLEL) --dist=loadfile -m "not slow and not huge" $(FAST)

test: lint tests

tests: .venv/ready
	@# Parts in processes of their own, for their memory: oneDNN and XLA give none back. All run.
	@failed=0; \
	TF_ENABLE_ONEDNN_OPTS=0 $(PYTEST) $(PARALLEL) -m huge tests/models || failed=1; \
	$(PYTEST) $(PARALLEL) --dist=loadfile -m "not huge" --ignore=tests/runs || failed=1; \
	printf '%s\n' tests/runs/test_*.py | xargs -P $$(nproc) -n 1 $(PYTEST) || failed=1; \
	exit $$failed

coverage: .venv/ready
	$(VENV)/coverage erase
	$(MAKE) tests LAUNCH="$(VENV)/coverage run"
	$(VENV)/coverage combine --quiet
	$(VENV)/coverage report

test-installs: .venv/ready
	$(PYTEST) --numprocesses=2 .ci/installs.py

lint: types
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/codespell

types: .venv/ready
	$(VENV)/mypy

.venv/ready: setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --upgrade pip
	$(VENV)/python -m pip install --quiet $(addprefix --constraint ,$(CONSTRAINTS)) \
		--editable ".[$(TF),demo,eval,report,tensorboard,dev]"
	touch $@
