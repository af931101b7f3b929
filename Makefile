# make run: a fine-tuned adapter from nothing.  make quick: tests while working.  make test: everything CI checks.
# All of it lives in .venv.
MAKEFLAGS += -j2
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what it imports, once: of torch and its company that is a small part. Where PYTHONDONTWRITEBYTECODE is set,
# every process would compile it again, which takes longer than all else that it does.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PIP) install -q --no-compile -c constraints.txt
# Without an NVIDIA driver, torch's CPU build is preferred where its index can be reached.
CPU_INDEX := https://download.pytorch.org/whl/cpu
CPU_TORCH = $(shell command -v nvidia-smi >/dev/null 2>&1 || \
	! $(PYTHON) -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null || echo --extra-index-url $(CPU_INDEX))
# Unsloth's own dependency lists pull CUDA packages; on a CPU these alone are enough to run its backend.
UNSLOTH := unsloth==2026.10.9 unsloth_zoo==2026.10.9 cut_cross_entropy==25.1.1

.PHONY: install install-dev install-unsloth run quick test cover containers cluster check lock format clean

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "Python %d.%d: expected 3.11 to 3.13; set PYTHON=python3.12" % v)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) $(CPU_TORCH) torch
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(INSTALL) -e .[dev]
	@touch $@

$(VENV)/.unsloth: $(VENV)/.dev
	$(INSTALL) --no-deps $(UNSLOTH)
	@touch $@

# What tests import is compiled here by one process; those that run tests would each compile it.
$(VENV)/.compiled: $(VENV)/.dev
	$(BIN)/pytest --collect-only >/dev/null
	@touch $@

install: $(VENV)/.base
install-dev: $(VENV)/.dev
install-unsloth: $(VENV)/.unsloth

run: install
	$(BIN)/amazon-ft run demo

check: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

# Four at a time on two cores: much of what a test does is to wait for a server or another process.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -n 4 --dist loadscope --no-loadscope-reorder

quick: $(VENV)/.compiled
	$(PYTEST) -m "not slow and not heavy" tests tasks flows

test: check $(VENV)/.compiled
	$(PYTEST) --durations=10

# With BUILD="--build-arg NAME=VALUE --secret id=ca,src=FILE ...": what the build needs here (docker/README.md).
BUILD ?=
containers: install-dev
	AMAZON_FT_CONTAINERS=1 AMAZON_FT_BUILD_OPTIONS='$(BUILD)' $(BIN)/pytest -m containers tests/e2e/test_containers.py

# On the cluster that kubectl reaches; CLUSTER is a kustomization of deployments/kubernetes with what that cluster needs.
CLUSTER ?= deployments/kubernetes
cluster: install-dev
	AMAZON_FT_CLUSTER=$(CLUSTER) $(BIN)/pytest -m containers tests/e2e/test_cluster.py

cover: $(VENV)/.compiled
	$(PYTEST) --cov --cov-report=term

lock: install-dev
	$(PIP) install -q --dry-run --ignore-installed --report $(VENV)/report.json torch==2.13.0 .[dev]
	$(BIN)/python -c 'import json; rows = json.load(open("$(VENV)/report.json"))["install"]; \
	names = sorted((r["metadata"]["name"].lower().replace("_", "-"), r["metadata"]["version"].split("+")[0]) for r in rows); \
	print("# The versions that CI installs; pip honours this file with -c. Made by: make lock", \
	*("%s==%s" % row for row in names if row[0] != "amazon-ft"), sep="\n")' > constraints.txt

format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) dist build .coverage .hypothesis
