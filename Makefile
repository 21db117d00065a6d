# Two commands on a fresh machine: `make demo` runs the whole way, `make test` proves it.
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BIN    := $(VENV)/bin

# What needs nothing exclusive runs in two processes, a file in one of them; `cluster` one by one.
PYTEST := $(BIN)/python -m pytest
# The longest files come first: the last to begin is waited for by one process alone.
LONG   := $(addprefix tests/,test_task.py stages/test_resume.py cli/test_predict.py test_docs.py)
APART  := -n 2 --dist loadfile --no-loadscope-reorder -m "not cluster and not slow" $(LONG) tests

.PHONY: demo test test-quick test-all test-sites mutants system lint docs bench cluster cluster-down lock audit release clean

# Installs what the lock names. A machine without the CPU build of torch takes the CUDA set.
$(VENV)/installed: containers/cpu.lock containers/cuda.lock containers/install.py pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python containers/install.py
	touch $@

demo: $(VENV)/installed  ## everything on SmolLM2-135M and real review sentences
	$(BIN)/yelp-hpc demo --run $(RUN)

test: $(VENV)/installed lint system  ## ruff, mypy, the manual and the tests, on a real Slurm and Apptainer (Debian, root)
	$(PYTEST) $(APART) --cov --cov-report= --durations=15
	$(PYTEST) -m "cluster and not slow" --cov --cov-append --cov-report=term:skip-covered --durations=15

test-quick: $(VENV)/installed lint  ## without the cluster
	$(PYTEST) $(APART)

test-all: test mutants  ## and the long forms: tests of minutes, and whether tests notice a changed program
	$(PYTEST) -m slow || [ $$? = 5 ]  # 5: there is none

mutants: $(VENV)/installed  ## 300 changes of the pure rooms, one at a time: do the tests notice?
	$(BIN)/python tests/mutants/run.py

system:  # what tests open beside Python
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then bash tests/system_install.sh; fi

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(VENV)/installed  ## the manual, into build/site; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed  ## the README's measurements, each from nothing (hours; BENCH="train_efficiency gpu" for some)
	PYTHONPATH=. $(BIN)/python benchmarks/bench.py $(BENCH)

test-sites: $(VENV)/installed  ## the table of sites on this machine's Slurm and on that of Debian 13 (root)
	$(BIN)/python -m pytest tests/cluster/test_sites.py
	bash tests/cluster/trixie.sh

cluster:  ## a private Slurm of four virtual nodes on this machine (Debian, root)
	bash tests/cluster/slurm_install.sh
	bash tests/cluster/slurm_up.sh

cluster-down:
	bash tests/cluster/slurm_down.sh wipe

audit:  ## how old the locks are, and the known vulnerabilities of what they name (needs pip-audit and the network)
	@for lock in containers/*.lock; do git log -1 --format="$$lock is of %cs (%cr)" -- $$lock; done
	@command -v pip-audit >/dev/null || { echo "pip-audit is not installed: pipx install pip-audit"; exit 1; }
	for lock in containers/*.lock; do pip-audit --strict --require-hashes --disable-pip -r $$lock || exit 1; done

lock:  ## write the lock files anew from pyproject.toml
	bash containers/lock.sh

release:  ## build, check and tag the version of pyproject.toml; pushes and uploads nothing
	@[ -z "$$(git status --porcelain)" ] || { echo "release: commit or remove these first:"; git status --short; exit 2; }
	@$(MAKE) --no-print-directory $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist  # with the setuptools of the lock
	$(BIN)/python -m twine check --strict dist/*
	@version=$$($(BIN)/python -m yelp_hpc --version | sed 's/.* //'); \
	grep -q "^## \[$$version\]" CHANGELOG.md || { echo "release: CHANGELOG.md has no section $$version"; exit 2; }; \
	git tag -a "v$$version" -m "yelp_hpc $$version" && echo "tagged v$$version; next: git push --tags, twine upload dist/*"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .coverage
