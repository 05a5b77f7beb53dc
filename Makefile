# Two commands need nothing but Python, make and git: `make demo` and `make test`. Each makes .venv itself when it is
# missing or when the pins have changed.

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
SEED   ?= 0
CLEVR  ?=

.PHONY: demo demo-tools demo-real test study latent fault soak gpu clean

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,report]'
	touch $@

demo: $(VENV)/ready            ## the whole method on the tiny base, with a report: runs/demo/report.html
	$(PY) -m tiny.demo --out runs/demo --seed $(SEED) --overwrite

demo-tools: $(VENV)/ready      ## the same on a policy of tools, with dialogues: runs/demo-tools/report.html
	$(PY) -m tiny.demo --out runs/demo-tools --world tools --seed $(SEED) --overwrite

demo-real: $(VENV)/ready       ## the same path on a folder in the official CLEVR layout: make demo-real CLEVR=FOLDER
	$(PY) -m tiny.demo --out runs/demo-real --seed $(SEED) --clevr-root '$(CLEVR)' --overwrite

test: $(VENV)/ready            ## format, lint and all tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pytest

study: $(VENV)/ready           ## the paper's ablation and more on the tiny base; hours, resumable: results/
	$(PY) -m tiny.study --out runs/study

latent: $(VENV)/ready          ## RL over latent actions against words, one seed on the tiny base: runs/latent/seedN
	$(PY) -m variants.latent.study --out runs/latent --seed $(SEED)

fault: $(VENV)/ready           ## kill training at random moments, compare with an undisturbed run
	$(PY) tests/fault.py

soak: $(VENV)/ready            ## 2,000 RL steps of a tiny model: no memory, thread or file may leak
	$(PY) tests/soak.py

gpu:                           ## the first thing to run on a CUDA machine; installs nothing: benchmarks/results/gpu.md
	$(PYTHON) -m benchmarks.gpu

clean:
	rm -rf $(VENV) runs *.egg-info
