# Two commands: `make lab` opens the notebooks, `make test` runs the whole suite. Each sets up .venv by itself, once.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: lab test tour lint bench

lab: $(READY)
	$(BIN)/jupyter lab --ServerApp.root_dir="$(CURDIR)" 01_recurrent/01_recurrent.ipynb $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n auto

tour: $(READY)
	$(BIN)/python -m tfla_lab.tour $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# On a machine with a GPU. Others' kernels that cannot be installed are rows that say so.
bench: $(READY) .venv/.peers
	$(BIN)/python -m tfla_lab.bench $(ARGS)

.venv/.peers: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]' || echo "not all peers installed"
	touch $@

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[notebooks,test]'
	touch $@
