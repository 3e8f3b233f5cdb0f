"""One cluster for all workers of a test session: the first brings it up, the last takes it down."""

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import PAIRS, Cluster, missing
from tests.slurm.jobs import Run
from tests.train.runs import make_data


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of this session have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cluster(shared: Path) -> Iterator[Cluster]:
    lacking = missing()
    if lacking:
        pytest.fail(f"no SLURM can be brought up here, missing: {', '.join(lacking)}; see `make test-slurm`")
    root, users = shared / "slurm", shared / "slurm-users"
    cluster = Cluster(root)
    with (shared / "slurm-lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            root.mkdir()
            cluster.up()
            (root / "data").mkdir()
            make_data(root / "data")
        count = int(users.read_text()) if users.exists() else 0
        users.write_text(str(count + 1))
        fcntl.flock(lock, fcntl.LOCK_UN)
        yield cluster
        fcntl.flock(lock, fcntl.LOCK_EX)
        count = int(users.read_text()) - 1
        users.write_text(str(count))
        if not count:
            cluster.down()


@pytest.fixture
def new_run(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Makes a run of a name in a partition; its jobs do not outlive the test."""
    made: list[Run] = []

    def make(name: str, partition: str = PAIRS[0], **recipe: object) -> Run:
        run = Run(cluster, cluster.root / "data", tmp_path / name, partition)
        run.write_recipe(**recipe)  # type: ignore[arg-type]
        made.append(run)
        return run

    yield make
    for run in made:
        jobs = {event.start.partition(".")[0] for event in run.events}
        if jobs:
            cluster.ask("scancel", *jobs, check=False)
