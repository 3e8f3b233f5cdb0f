"""Saves that are cut off: by kill -9 at any moment, and by a full disk. What was saved before stays usable."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.data import checksums
from tests import disks
from tests.ranks import run_ranks
from tests.train.runs import SAMPLES, SEQUENCE, metrics, remit, settings, train_all

ROOT = Path(__file__).parents[2]


def killed(folder: Path, kills: int) -> tuple[dict[str, Any], Path]:
    schedule = {"train_tokens": (3 * kills + 4) * SEQUENCE * SAMPLES, "warmup_tokens": 0}
    more = {"schedule": schedule, "evaluation": {"every_steps": 0}, "parallel": {"tensor": 2}}
    often = {"checkpoint": {"every_steps": 1, "keep": 2}}
    recipe = settings(folder, f"killed {kills}", **more, **often)
    straight = settings(folder, f"not killed {kills}", **more)
    assert run_ranks(2, train_all, [straight]) == [[(0, "")]] * 2
    file = folder / f"killed {kills}.json"
    file.write_text(json.dumps(recipe))
    command = [sys.executable, "-W", "ignore", "-m", "tests.train.forked", str(file), str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert found["codes"] == [0, 0], done.stderr[-3000:]
    assert metrics(folder, f"killed {kills}") == metrics(folder, f"not killed {kills}")
    checkpoints = folder / f"killed {kills}" / "checkpoints"
    assert len(list(checkpoints.glob("step-*"))) == 2
    return found, checkpoints


def test_killed_while_saving(folder: Path) -> None:
    found, _ = killed(folder, 6)
    assert found["kills"] == 6
    assert found["during_saves"] >= 2, "no save was hit: the test tests nothing"


@pytest.mark.slow
def test_killed_forty_times_while_saving(folder: Path) -> None:
    found, _ = killed(folder, 40)
    assert found["kills"] == 40
    assert found["during_saves"] >= 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 1 MB, and a quarter: room for one checkpoint of these runs."""
    with disks.small_disk(tmp_path / "disk", "1280k") as disk:
        yield disk


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_full_disk(folder: Path, small_disk: Path) -> None:
    """In the second checkpoint; then in the logs, from the first step on. With room again the run goes on."""
    # So many that their lines take more than what is left of a page.
    schedule = {"train_tokens": 40 * SEQUENCE * SAMPLES, "warmup_tokens": 0}
    in_save = settings(folder, "x", checkpoint={"every_steps": 4, "keep": 3}, schedule=schedule)
    in_save["run"] = str(small_disk / "run")
    (outcome,) = run_ranks(1, train_all, [in_save])[0]
    code, message = outcome
    assert code == 1
    assert "step-00000008" in message or ".partial-00000008" in message
    assert "No space left on device" in message
    checkpoints = small_disk / "run" / "checkpoints"
    assert (checkpoints / "latest").read_text() == "step-00000004\n"
    first = checkpoints / "step-00000004"
    assert checksums.problems(first, checksums.read(first), content=True) == []

    # Nothing left at all: steps go on without their lines, up to the checkpoint that wants them.
    resize(small_disk, "2304k")
    filler = small_disk / "filler"
    in_logs = {**in_save, "logging": {"tensorboard": True, "wandb": "offline"}, "checkpoint": {"every_steps": 0}}
    queue = {"folder": str(small_disk / "queue"), "timeout_s": 30}
    queued = remit(folder, "queue", reference={"path": str(folder / "base"), "queue": queue})
    ((outcome, beside),) = run_ranks(1, fill_then_train, in_logs, filler, queued)
    code, message = outcome
    assert code == 1
    assert "metrics.jsonl: cannot be written: No space left on device: free space there, then start the same" in message
    assert (checkpoints / "latest").read_text() == "step-00000004\n"
    # A queue whose disk is full is done without, and nothing is waited for.
    assert beside == (0, "")
    said = (folder / "queue" / "log.txt").read_text()
    assert f"step 1: {small_disk}/queue" in said
    assert "No space left on device: free space there" in said
    assert "scores are made online until a scorer comes" in said
    filler.unlink()
    resize(small_disk, "16m")
    straight = settings(folder, "enough room", schedule=schedule)
    assert run_ranks(1, train_all, [in_save, straight]) == [[(0, "")] * 2]
    assert metrics(small_disk, "run") == metrics(folder, "enough room")


def fill_then_train(rank: int, recipe: dict[str, Any], filler: Path, other: dict[str, Any]) -> list[tuple[int, str]]:
    """Fill the disk once the run has started, and train to the end; then the other, while the disk is full."""
    from remit_megatron.train.loop import Trainer

    original = Trainer.run

    def run(self: Trainer, signals: Any) -> None:
        with filler.open("wb", buffering=0) as stream:
            try:
                while stream.write(bytes(4096)):
                    pass
            except OSError:
                pass
        original(self, signals)
        raise AssertionError("it came to its end on a full disk")

    Trainer.run = run  # type: ignore[method-assign]
    first = train_all(rank, [recipe])
    Trainer.run = original  # type: ignore[method-assign]
    return first + train_all(rank, [other])


WRITER = """
import os, time
from remit_megatron.mcore.platform import activate
activate("cpu")
from remit_megatron.mcore.dist_checkpoint import BackgroundSave
BackgroundSave()
if os.fork() == 0:
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_no_writer_outlives_its_rank() -> None:
    """A rank that is killed takes the process with it that writes its checkpoint in the background."""
    rank = subprocess.Popen([sys.executable, "-W", "ignore", "-c", WRITER], stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout is not None
        writer = int(rank.stdout.readline())
        status = Path(f"/proc/{writer}/stat")
        assert status.exists()
    finally:
        rank.kill()
        rank.wait()
    deadline = time.monotonic() + 20
    while status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline, "the writer goes on without its rank"
        time.sleep(0.05)
