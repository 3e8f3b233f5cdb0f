"""One cluster for all workers of a test session: the first brings it up, the last takes it down."""

import contextlib
import fcntl
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.slurm.cluster import PAIRS, Cluster, missing
from tests.slurm.jobs import QUIET, Run, recipe_text
from tests.train.runs import command, make_data, metrics


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of this session have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    folder = shared / "data"
    with locked(shared / "data-lock"):
        if not folder.exists():
            folder.mkdir()
            make_data(folder)
    return folder


@pytest.fixture(scope="session")
def cluster(shared: Path) -> Iterator[Cluster]:
    lacking = missing()
    if lacking:
        pytest.fail(f"no SLURM can be brought up here, missing: {', '.join(lacking)}; see `make test-slurm`")
    root, users, lock = shared / "slurm", shared / "slurm-users", shared / "slurm-lock"
    cluster = Cluster(root)
    with locked(lock):
        if not root.exists():
            root.mkdir()
            cluster.up()
        count = int(users.read_text()) if users.exists() else 0
        users.write_text(str(count + 1))
    yield cluster
    with locked(lock):
        count = int(users.read_text()) - 1
        users.write_text(str(count))
        if not count:
            cluster.down()


@pytest.fixture
def pair(cluster: Cluster, shared: Path) -> Iterator[int]:
    """The number of a pair of nodes that is this test's alone."""
    with contextlib.ExitStack() as stack:
        locks = [stack.enter_context((shared / f"pair{i}-lock").open("w")) for i in range(PAIRS)]
        while True:
            for number, lock in enumerate(locks):
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    cluster.revive(number)
                    cluster.wait(lambda n=number: cluster.idle(n), "the pair's nodes did not become idle")  # type: ignore[misc]
                    yield number
                    return
            time.sleep(0.2)


@pytest.fixture
def new_run(cluster: Cluster, pair: int, data: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Makes a run of a name; its jobs do not outlive the test."""

    def make(name: str = "run", nproc: int = 1, **recipe: Any) -> Run:
        run = Run(cluster, tmp_path / name, pair, nproc)
        run.recipe.parent.mkdir(parents=True, exist_ok=True)
        run.recipe.write_text(recipe_text(data, run.folder, **recipe))
        return run

    yield make
    jobs = cluster.ask("squeue", "-h", "-o", "%i", "-p", f"pair{pair},abrupt{pair},urgent{pair}", check=False).split()
    if jobs:
        cluster.ask("scancel", *jobs, check=False)


@pytest.fixture
def undisturbed(shared: Path, data: Path) -> Callable[[int], list[dict[str, Any]]]:
    """Metrics of the same recipe on so many local ranks, started with `remit train` and left alone."""

    def run(ranks: int) -> list[dict[str, Any]]:
        folder = shared / f"undisturbed-{ranks}"
        with locked(shared / f"undisturbed-{ranks}-lock"):
            if not folder.exists():
                recipe = folder.with_suffix(".toml")
                recipe.write_text(recipe_text(data, folder))
                result = subprocess.run(command(recipe, ranks), env=os.environ | QUIET, capture_output=True, text=True)
                assert result.returncode == 0, result.stderr
        return metrics(shared, folder.name)

    return run
