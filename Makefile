# Each target sets up .venv when it is missing, and uses it as it is when it is there.
PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo test test-slow lint bench install clean

demo: $(INSTALLED)
	sh examples/digits.sh

test: $(INSTALLED)
	OMP_NUM_THREADS=1 python -m pytest -n 2 -m "not slow"

test-slow: $(INSTALLED)
	python -m pytest -m slow

lint: $(INSTALLED)
	ruff check .
	mypy

bench: $(INSTALLED)
	python benchmarks/attention.py

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -e '.[demo,test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
