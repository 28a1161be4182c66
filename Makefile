# make demo: set-up, then images to samples on real digits.   make test: set-up, then the tests.
VENV := .venv
PYTHON ?= python3
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
PIP_INSTALL := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow crash-points crash-points-short mutants lint install docs clean-demo

demo: $(VENV)/.installed
	python examples/digits/make_images.py --out demo/images
	dit-extract --data demo/images --out demo/latents --config examples/digits/extract.yaml
	accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process 2 dit-train --latents demo/latents --out demo/run --config examples/digits/train.yaml
	dit-sample --checkpoint demo/run --out demo/samples.png --config examples/digits/sample.yaml

test: $(VENV)/.installed-test
	python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "not slow and not gpu" -q --durations=10

slow: $(VENV)/.installed-test
	$(if $(shell command -v g++),FAKE_CUDA=required) python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -m "slow and not gpu" -q --durations=10 \
	  --deselect tests/crash_points/test_crash_points.py::test_a_writer_disturbed_at_any_point_leaves_nothing_half_and_is_mended_by_the_next

crash-points: $(VENV)/.installed-test
	python -m tests.crash_points --jobs 2 --table docs/robustness.md $(ARGS)

crash-points-short: $(VENV)/.installed-test
	python -m tests.crash_points --jobs 2 --plan all --modes kill,eio $(ARGS)

mutants: $(VENV)/.installed-test
	$(PIP_INSTALL) -e '.[test,mutants]'
	python tests/mutants.py $(ARGS)

lint: $(VENV)/.installed-test
	ruff format --check .
	ruff check .
	mypy

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 python -m mkdocs build --strict
	@echo "open site/index.html, or with its search: python -m http.server --directory site"

install: $(VENV)/.installed

clean-demo:
	rm -rf demo

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[demo]'
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[test,lint]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[docs]'
	touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed, and $(PYTHON) is older: make PYTHON=python3.12 …" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
