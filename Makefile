# make demo: the whole pipeline on built-in phantoms     make test: everything that must hold
# make lab: the notebooks in JupyterLab                  make docs: the website (needs Quarto)
# make readme sidebar: what is written from notebooks    make mutants: do the tests notice broken code? (slow)
# make kills: is a run that is killed and taken up, again and again, the same to the last bit? (slow)
PYTHON ?= python3
VENV ?= .venv
OUT ?= demo
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
ON_PATH := PATH="$(abspath $(BIN)):$$PATH"

.PHONY: demo test readme sidebar lab docs bench mutants kills clean

# torch comes first and alone, so that nothing later replaces it with another build
$(VENV)/.core: settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3,10) <= sys.version_info[:2])' || \
	  { echo "medsketch needs Python 3.10 or newer: make PYTHON=/path/to/python3 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "could not make a virtual environment; on Debian or Ubuntu: apt install python3-venv"; exit 1; }
	$(PIP) -c constraints.txt torch
	$(PIP) -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) -c constraints.txt -e '.[dev,lab,volumes,seg,hub,onnx,data,retrieve,diffusion]'
	@touch $@

demo: $(VENV)/.core
	$(BIN)/medsketch demo --out $(OUT)

test: $(VENV)/.dev
	$(ON_PATH) $(BIN)/python tools/check_notebooks.py
	$(BIN)/ruff check .
	$(ON_PATH) MEDSKETCH_SCALE=tour $(BIN)/python tools/run_tests.py

readme: $(VENV)/.dev
	$(ON_PATH) $(BIN)/python tools/readme.py

sidebar: $(VENV)/.dev
	$(BIN)/python tools/sidebar.py

lab: $(VENV)/.dev
	$(ON_PATH) $(BIN)/jupyter lab --notebook-dir=nbs

docs: $(VENV)/.dev
	$(ON_PATH) PYTHONPATH=tools $(BIN)/nbdev_docs

bench: $(VENV)/.dev
	$(ON_PATH) $(BIN)/python -m benchmarks

mutants: $(VENV)/.dev
	$(ON_PATH) $(BIN)/python tools/mutants.py

kills: $(VENV)/.dev
	$(ON_PATH) OMP_NUM_THREADS=1 $(BIN)/python tools/kills.py

clean:
	rm -rf _proc _docs build dist *.egg-info demo
