# Each target makes .venv when it is missing, and installs the project and its tools into it once.
PYTHON ?= python3
VENV ?= .venv
INSTALLED = $(VENV)/.installed
export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: demo demo-data-free docs test test-slow check test-integrations lint bench gpu-check gpu-check-toy
.PHONY: gpu-check-wheels reproduction-report install clean

demo: $(INSTALLED)
	sh examples/digits.sh

demo-data-free: $(INSTALLED)
	sh examples/data_free_digits.sh

PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

test: $(INSTALLED)
	$(PYTEST)

test-slow: $(INSTALLED)
	$(PYTEST) -m slow

# What has to pass before a change is merged
check: lint docs
	$(PYTEST) -m 'not integrations'

test-integrations: $(INSTALLED)
	$(VENV)/bin/python -m pip install --quiet -e '.[app]' playwright transformers
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -m integrations

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# The site, in build/site; a broken link fails
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(VENV)/bin/mkdocs build --quiet

bench: $(INSTALLED)
	$(VENV)/bin/python benchmarks/attention.py
	$(VENV)/bin/python benchmarks/train_step.py
	$(VENV)/bin/python benchmarks/inversion.py

# Without the install step: the machine with the GPU has torch and may have no network
GPU_CHECK = $(or $(wildcard $(VENV)/bin/python),$(PYTHON)) benchmarks/gpu_check.py
OUT ?= build/gpu-check

gpu-check:
	$(GPU_CHECK) --out $(OUT) $(if $(wildcard build/gpu-wheels/*.whl),--wheels build/gpu-wheels)

gpu-check-toy: $(INSTALLED)
	$(GPU_CHECK) --toy --out build/gpu-check-toy

# What an installation of PyTorch may lack. timm and filelock are pure Python; SciPy is for the GPU machine's Python
GPU_PYTHON ?= 3.12
gpu-check-wheels: $(INSTALLED)
	$(VENV)/bin/python -m pip download --quiet --no-deps --only-binary :all: --python-version $(GPU_PYTHON) \
	    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform any --dest build/gpu-wheels \
	    'timm>=1.0.31,<1.1' 'filelock>=3.30' 'scipy>=1.10' 'pillow<13'

reproduction-report: $(INSTALLED)
	$(VENV)/bin/python reproduction/report.py

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml
	$(VENV)/bin/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --no-compile -e '.[demo,docs,test]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
