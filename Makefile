# Two commands on a fresh machine: `make demo` runs the whole way, `make test` proves it.
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BIN    := $(VENV)/bin

.PHONY: demo test test-quick lint docs cluster cluster-down lock clean

# Installs what the lock names. A machine without the CPU build of torch takes the CUDA set.
$(VENV)/installed: containers/cpu.lock containers/cuda.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes -r containers/cpu.lock \
		|| $(BIN)/pip install --quiet --require-hashes -r containers/cuda.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

demo: $(VENV)/installed  ## everything on SmolLM2-135M and real review sentences
	$(BIN)/python -m yelp_hpc submit all --config configs/demo.yaml --executor local --run $(RUN) --wait

test: $(VENV)/installed lint  ## ruff, mypy, the manual and every test, on a real Slurm and Apptainer (Debian, root)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then bash tests/system_install.sh; fi
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered --durations=15

test-quick: $(VENV)/installed lint  ## without the cluster
	$(BIN)/python -m pytest --ignore tests/cluster

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/installed  ## the manual, into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

cluster:  ## a private Slurm of four virtual nodes on this machine (Debian, root)
	bash tests/cluster/slurm_install.sh
	bash tests/cluster/slurm_up.sh

cluster-down:
	bash tests/cluster/slurm_down.sh wipe

lock:  ## write the lock files anew from pyproject.toml
	bash containers/lock.sh

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
