# make demo [TASK=segmentation]: the whole method on built-in data. make test: lint and tests.
# make test-installs: what the README installs, in fresh environments. All set up .venv first.

PYTHON ?= python3
# `tensorflow` and `tensorflow-cpu` own the same folder: exactly one of them.
TF ?= $(shell command -v nvidia-smi > /dev/null && echo tf || echo tf-cpu)
SEED ?= 0
TASK ?= detection
DEMO_detection := demo
DEMO_segmentation := demo_segmentation
DEMO := $(or $(DEMO_$(TASK)),$(error TASK=$(TASK) is neither detection nor segmentation))
RUN ?= runs/$(DEMO)
VENV := .venv/bin
PYTEST := $(VENV)/python -m pytest --durations=20
PARALLEL := --numprocesses=auto

.PHONY: demo test test-installs lint

demo: .venv/ready
	$(VENV)/python -m official_selftrain.run --experiment=$(DEMO) --model_dir=$(RUN) \
		--params_override=trainer.seed=$(SEED)

test: lint
	@# Parts in processes of their own, for their memory: oneDNN and XLA give none back. All run.
	@failed=0; \
	TF_ENABLE_ONEDNN_OPTS=0 $(PYTEST) $(PARALLEL) -m huge tests/models || failed=1; \
	$(PYTEST) $(PARALLEL) --dist=loadfile -m "not huge" --ignore=tests/runs || failed=1; \
	printf '%s\n' tests/runs/test_*.py | xargs -P $$(nproc) -n 1 $(PYTEST) || failed=1; \
	exit $$failed

test-installs: .venv/ready
	$(PYTEST) --numprocesses=2 .ci/installs.py

lint: .venv/ready
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

.venv/ready: setup.py
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --upgrade pip
	$(VENV)/python -m pip install --quiet --editable ".[$(TF),demo,eval,report,tensorboard,dev]"
	touch $@
