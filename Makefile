# Every target sets up .venv first if it has to. PYTHON is any Python from 3.11 on.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RUN_STAMP := $(VENV)/.installed-train
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
NEWEST := build/newest

.PHONY: setup smoke smoke-wheel flywheel docker-smoke test test-newest test-python matrix test-slow fuzz test-slurm
.PHONY: test-image golden lint docs bench bench-gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(INSTALL) -e ".[dev]"
	touch $(RUN_STAMP) $(STAMP)

# What a run needs: no linter, type checker or test tool.
$(RUN_STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(INSTALL) -e ".[train]"
	touch $(RUN_STAMP)

smoke: $(RUN_STAMP)
	$(BIN)/python -m examples.smoke --out runs/smoke

# The same from an installed wheel: of this folder only the example is imported. SMOKE="--quick" for a few steps.
smoke-wheel:
	rm -rf build/wheel && mkdir -p build/wheel dist
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --upgrade "pip>=24"
	build/wheel/venv/bin/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	build/wheel/venv/bin/python -m pip install --quiet --constraint constraints.txt \
		"$$(ls -t dist/remit_megatron-*.whl | head -n 1)[train]"
	cp -r examples build/wheel/
	cd build/wheel && venv/bin/python -m examples.smoke --out runs/smoke $(SMOKE)

flywheel: setup
	$(BIN)/python -c "import trl" 2>/dev/null || $(INSTALL) -e ".[post]"
	$(BIN)/python examples/flywheel/prepare.py
	$(BIN)/remit flywheel run examples/flywheel/wheel.toml --until r2-remit-mid
	$(BIN)/remit flywheel status examples/flywheel/wheel.toml
	$(BIN)/remit flywheel report examples/flywheel/wheel.toml

docker-smoke:
	examples/smoke/container.sh

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile

# Megatron-Core 0.19.2 under the Python at hand, beside .venv's 0.16.1.
test-newest: setup
	bash tests/versions/newest.sh $(BIN)/python $(NEWEST)
	OMP_NUM_THREADS=1 OTHER_PYTHON=$(abspath $(BIN)/python) $(NEWEST)/bin/python -m pytest -rs -n 2 --dist loadfile \
		$(or $(TESTS),$(shell cat tests/versions/newest.txt))

# The suite under a newer Python with Megatron-Core 0.19.2: OTHER is that Python; default: the newest that is here.
test-python: setup
	OTHER_PYTHON=$(abspath $(BIN)/python) bash tests/versions/python.sh build/python "$(OTHER)" $(TESTS)

# The README's table of versions, from what `make test` and the two targets above kept where RECORD=1 was set.
matrix: setup
	$(BIN)/python -m tests.versions.matrix

test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# 25,000 broken inputs; FUZZ="--seed N --inputs M --only NAME ..." for others
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz $(or $(FUZZ),--inputs 25000)

test-slurm: setup
	bash tests/packages.sh "slurmctld slurmd sbatch munged gcc shellcheck /usr/include/slurm/spank.h" \
		slurmctld slurmd slurm-client munge libslurm-dev gcc shellcheck
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm -m slurm -n 3 --dist worksteal

test-image: setup
	bash tests/packages.sh "buildah debootstrap" buildah debootstrap || true  # the test says why it is skipped
	$(BIN)/python -m pytest -rs -m image tests/image

# The same short runs by a revision and by the working tree, compared bit for bit: make golden BASE=HEAD~3
golden: setup
	rm -rf build/golden && git worktree prune && git worktree add --detach build/golden $(BASE)
	$(BIN)/python -m tests.golden build/golden . ; code=$$?; git worktree remove --force build/golden; exit $$code

docs: setup
	$(BIN)/zensical build --strict --clean

bench: setup
	$(BIN)/python -m benchmarks.step --output benchmarks/results/step-$$(hostname -s).json

bench-gpu: setup
	PYTHON=$(BIN)/python benchmarks/gpu.sh

clean:
	rm -rf $(VENV) runs build dist *.egg-info
