"""Back ends: a new one is a file and a line, and `remit status` asks the one that has the run."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from launch import backends, run_folder, submit
from launch.backends.base import Backend, Launch, Life, Started
from launch.profiles import Section
from launch.record import LaunchFile, read_file
from launch.status import report
from remit_megatron.cli import main
from remit_megatron.config import dump_toml, parse_recipe
from remit_megatron.run.folder import RunFolder
from tests.train.runs import settings


class CarrierSettings(Section):
    pigeons: int = 1


class Carrier(Backend[CarrierSettings]):
    """What a contributor's file would hold: runs are sent away, with a section of the profile of their own."""

    name = "carrier"
    flags = frozenset({"--follow"})
    settings_model = CarrierSettings
    life: Life | None = Life.WAITS

    def check(self, launch: Launch) -> None:
        pass

    def dry_run(self, launch: Launch) -> int:
        print(f"would send {self.settings.pigeons} with {launch.run.name}")
        return 0

    def submit(self, launch: Launch) -> Started:
        assert (launch.run / "recipe.toml").exists()
        return Started(jobs=tuple(str(n) for n in range(self.settings.pigeons)))

    def follow(self, launch: Launch, started: Started) -> int | None:
        return 75 if len(started.jobs) == 2 else None

    @staticmethod
    def status(run: Path, jobs: Sequence[str], host: str | None) -> Life | None:
        assert list(jobs) == ["0", "1"]
        return Carrier.life


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(dump_toml(parse_recipe(settings(tmp_path, "run"))))
    return path


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What --on names it, with a profile of two pigeons."""
    monkeypatch.setitem(backends.BACKENDS, "carrier", Carrier)  # the line
    profile = tmp_path / "loft.toml"
    profile.write_text("[carrier]\npigeons = 2\n[slurm]\npartition = 'of another back end'\n")
    return f"carrier:{profile}"


def test_a_new_back_end(carrier: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its section, its flags, its dry run, its jobs and its word on a run's life come through."""
    assert main(["launch", str(recipe), "--on", carrier, "--dry-run"]) == 0
    assert capsys.readouterr().out == "would send 2 with run\n"
    assert not (tmp_path / "run").exists()
    assert main(["launch", str(recipe), "--on", carrier, "--follow"]) == 75
    assert "state       has not started" in capsys.readouterr().out
    launched = read_file(tmp_path / "run" / "launch.json", LaunchFile)
    assert launched is not None
    assert (launched.backend, launched.jobs) == ("carrier", ["0", "1"])
    assert main(["launch", str(recipe), "--on", carrier, "--chain", "2"]) == 2
    assert main(["launch", str(recipe), "--follow"]) == 2
    assert "--follow goes with --on slurm or carrier" in capsys.readouterr().err
    assert main(["launch", str(recipe), "--on", "mars"]) == 2
    assert "slurm:PROFILE, carrier or carrier:PROFILE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("life", "says"),
    [
        (Life.LIVES, "running"),
        (Life.WAITS, "waits to start again; it had last said: running"),
        (Life.GONE, "ended without a last word: killed, or its node was lost; it had last said: running"),
        (None, "running"),
    ],
)
def test_status_asks_the_back_end_that_has_the_run(
    life: Life | None, says: str, carrier: str, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit.launch(submit.Request(recipe=str(recipe), target=carrier)) == 0
    (tmp_path / "run" / "status.json").write_text(json.dumps({"state": "running", "step": 3}))
    monkeypatch.setattr(Carrier, "life", life)
    assert report(tmp_path / "run").splitlines()[1] == f"state       {says}"


@pytest.fixture
def training(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the run folder as a trainer does, and says in status.json that it runs here."""
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(dump_toml(parse_recipe(settings(tmp_path, "run"))))
    code = (
        "import sys; from pathlib import Path; from remit_megatron.config import load_recipe\n"
        "from remit_megatron.run.folder import RunFolder\n"
        "folder = RunFolder(Path(sys.argv[2]), load_recipe(sys.argv[1])); folder.claim()\n"
        "print('claimed', flush=True); input()"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(recipe), str(run)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "claimed\n"
    write_status(run, os.uname().nodename)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def write_status(run: Path, host: str) -> None:
    fields = {"state": "running", "step": 3, "host": host, "job": None, "updated_unix_s": time.time()}
    (run / "status.json").write_text(json.dumps(fields))
    (run / "recipe.toml").touch()


def test_a_run_whose_process_was_killed_does_not_run(training: subprocess.Popen[str], tmp_path: Path) -> None:
    """The lock of the run folder goes with the process, and status.json stays."""
    run = tmp_path / "run"
    assert report(run).splitlines()[1] == "state       running"
    training.kill()
    training.wait()
    gone = "ended without a last word: killed, or its node was lost; it had last said: running"
    assert report(run).splitlines()[1] == f"state       {gone}"
    write_status(run, "elsewhere")
    unknown = f"unknown: it had last said: running; nothing here holds {run}/.lock, elsewhere would know"
    assert report(run).splitlines()[1] == f"state       {unknown}"


def test_whether_the_lock_is_held_leaves_no_trace(tmp_path: Path) -> None:
    """A folder without a lock gets none, and one that was looked at can be claimed."""
    assert run_folder.lock_is_held(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    folder = RunFolder(tmp_path / "run", parse_recipe(settings(tmp_path, "run")))
    folder.claim()
    assert run_folder.lock_is_held(folder.path) is True
    folder.release()
    assert run_folder.lock_is_held(folder.path) is False
    folder.claim()
    folder.release()
