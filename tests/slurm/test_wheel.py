"""A wheel as jobs: a chain of stages, a requeue in its middle, a cancel that stays dead."""

import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.profiles import SHIPPED
from tests.flywheel import wheels
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import QUIET, profile_text

pytestmark = pytest.mark.slurm

Submit = Callable[..., dict[str, str]]


@pytest.fixture
def submit(cluster: Cluster, pair: int, tmp_path: Path) -> Iterator[Submit]:
    """`remit flywheel run WHEEL --on slurm:PROFILE`: the job of each stage, by name. They do not outlive the test."""
    profile = tmp_path / "profile.toml"
    shipped = tomllib.loads((SHIPPED / "loopback.toml").read_text())
    shipped["environment"]["set"] |= {"PYTHONWARNINGS": "ignore", "PYTHONPATH": str(wheels.ROOT)}
    shipped["slurm"] |= {"partition": f"pair{pair}", "preflight": False}
    profile.write_text(profile_text(shipped))

    def run(file: Path, *more: str) -> dict[str, str]:
        command = wheels.command(file, "run", "--on", f"slurm:{profile}", *more)
        done = subprocess.run(command, env={**cluster.environment, **QUIET}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "--dry-run" in more:
            return {"script": done.stdout}
        return {line.partition(":")[0]: line.split()[2] for line in done.stdout.splitlines()}

    yield run
    jobs = cluster.ask("squeue", "-h", "-o", "%i", "-p", f"pair{pair}", check=False).split()
    if jobs:
        cluster.ask("scancel", *jobs, check=False)


def wait(condition: Callable[[], Any], story: Path, timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        logs = [f"--- {log}\n{log.read_text(errors='replace')[-2000:]}" for log in story.rglob("*.log")]
        assert time.monotonic() < deadline, "\n".join(logs)
        time.sleep(0.2)


def test_a_wheel(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    """Each stage waits for its parents; one that is asked to stop goes on by itself; nothing is submitted twice."""
    root = tmp_path / "files"
    wheels.make_files(root)
    content = wheels.settings(root)
    content["rl"]["steps"] = 100
    file = wheels.write_wheel(root, content)
    script = submit(file, "--until", "r0-rl", "--dry-run")["script"]
    assert script.count("#!/bin/bash\n") == 3
    assert not (root / "wheel").exists()
    jobs = submit(file, "--until", "r0-rl")
    assert list(jobs) == ["r0-mid", "r0-sft", "r0-rl"]
    assert submit(file, "--until", "r0-rl") == jobs, "they are there already"
    assert f"afterok:{jobs['r0-mid']}" in cluster.job(jobs["r0-sft"])["Dependency"]
    folder = root / "wheel"
    metrics = wheels.nodes(file)["r0-rl"].folder / "metrics.jsonl"
    wait(lambda: metrics.exists() and metrics.read_text().count("\n") > 10, folder)
    cluster.ask("scancel", "--signal=USR1", "--batch", jobs["r0-rl"])
    wait(lambda: cluster.ended(jobs["r0-rl"]), folder)
    assert set(wheels.states(file)[name].word for name in jobs) == {"done"}
    log = next((folder / "jobs" / wheels.nodes(file)["r0-rl"].folder.name / "logs").glob("*.log")).read_text()
    assert "time limit; the job queues itself again" in log
    assert metrics.read_text().count("\n") == 100
    assert submit(file, "--until", "r0-rl") == {}


def test_a_cancelled_wheel(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    """Stays dead, and takes what waits for it along; the same command submits it again."""
    root = tmp_path / "files"
    file = wheels.make_files(root)
    jobs = submit(file, "--until", "r0-sft")
    folder = wheels.nodes(file)["r0-mid"].folder
    wait(lambda: (folder / "stage.json").exists(), root / "wheel")
    cluster.ask("scancel", jobs["r0-mid"])
    wait(lambda: all(cluster.ended(job) for job in jobs.values()), root / "wheel")
    assert cluster.job(jobs["r0-mid"])["JobState"] == "CANCELLED"
    assert cluster.job(jobs["r0-mid"])["Restarts"] == "0"
    again = submit(file, "--until", "r0-sft")
    assert not set(again.values()) & set(jobs.values())
    wait(lambda: all(cluster.ended(job) for job in again.values()), root / "wheel")
    assert {wheels.states(file)[name].word for name in again} == {"done"}
