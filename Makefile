# make demo [TASK=segmentation]: the whole method on embedded data. make test: lint and tests.
# Both set up .venv first.

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
# TensorFlow keeps memory of every training in a process: those of tests/runs get processes of their own.
PYTEST := $(VENV)/python -m pytest -q --numprocesses=auto --dist=loadfile

.PHONY: demo test lint

demo: .venv/ready
	$(VENV)/python -m official_selftrain.run --experiment=$(DEMO) --model_dir=$(RUN) \
		--params_override=trainer.seed=$(SEED)

test: lint
	$(PYTEST) --ignore=tests/runs
	$(PYTEST) tests/runs

lint: .venv/ready
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .

.venv/ready: setup.py
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --upgrade pip
	$(VENV)/python -m pip install --quiet --editable ".[$(TF),demo,eval,report,tensorboard,dev]"
	touch $@
