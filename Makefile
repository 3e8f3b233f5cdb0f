# Every target sets up .venv first if it has to. PYTHON is any Python 3.11.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup smoke flywheel docker-smoke test test-slow fuzz test-slurm test-image golden lint docs bench
.PHONY: bench-gpu clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

smoke: setup
	$(BIN)/python -m examples.smoke --out runs/smoke

flywheel: setup
	$(BIN)/python -c "import trl" 2>/dev/null || $(BIN)/python -m pip install --quiet -e ".[post]"
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
