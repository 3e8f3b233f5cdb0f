"""The command as a user runs it: killed at random moments, asked to stop, hung, started twice."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from remit_megatron.config import dump_toml, parse_recipe
from tests.train.runs import SAMPLES, SEQUENCE, metrics, remit, start, wait_for

STEPS = 24


def recipe_file(folder: Path, run: str, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "schedule": {"train_tokens": STEPS * SEQUENCE * SAMPLES, "warmup_tokens": 0},
        "checkpoint": {"every_steps": 3, "keep": 2},
        "parallel": {"tensor": 2},
        **changes,
    }
    path = folder / f"{run}.toml"
    path.write_text(dump_toml(parse_recipe(remit(folder, run, **values))))
    return path


def last_step(folder: Path, run: str) -> int:
    path = folder / run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith("}") else 0


def saving(folder: Path, run: str) -> bool:
    return any((folder / run / "checkpoints").glob(".partial-*"))


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> list[dict[str, Any]]:
    """The same recipe without interruption, with two signals instead: each stop costs nothing either."""
    recipe, log = recipe_file(folder, "stopped"), folder / "stopped.log"
    for number, after in ((signal.SIGTERM, 2), (signal.SIGUSR1, 7)):
        process = start(recipe, 2, log)
        assert wait_for(lambda at=after: last_step(folder, "stopped") >= at, process), log.read_text()
        process.send_signal(number)
        assert process.wait(60) == 75, log.read_text()
        stopped = last_step(folder, "stopped")
        assert (folder / "stopped" / "checkpoints" / "latest").read_text() == f"step-{stopped:08d}\n"
        assert f"stopped on request after step {stopped}" in log.read_text()
        status = json.loads((folder / "stopped" / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("stopped", 75)
        assert status["step"] == status["checkpoint_step"] == stopped
        assert not (folder / "stopped" / "DONE").exists()
    assert start(recipe, 2, log).wait(120) == 0, log.read_text()
    status = json.loads((folder / "stopped" / "status.json").read_text())
    assert (status["state"], status["checkpoint_step"], status["total_steps"]) == ("done", STEPS, STEPS)
    assert (folder / "stopped" / "DONE").exists()

    recipe = recipe_file(folder, "undisturbed")
    assert start(recipe, 2, log).wait(120) == 0, log.read_text()
    return metrics(folder, "undisturbed")


def test_signals_save_and_stop(folder: Path, undisturbed: list[dict[str, Any]]) -> None:
    assert metrics(folder, "stopped") == undisturbed


def test_a_signal_while_ranks_start(folder: Path) -> None:
    """They still import, and keep it: they train one step, save and stop."""
    recipe, log, run = recipe_file(folder, "early"), folder / "early.log", folder / "early"
    process = start(recipe, 2, log)
    assert wait_for(lambda: len(psutil.Process(process.pid).children()) == 2, process), log.read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75, log.read_text()
    assert (run / "checkpoints" / "latest").read_text() == "step-00000001\n"


@pytest.mark.parametrize("times", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(folder: Path, undisturbed: list[dict[str, Any]], times: int) -> None:
    """Odd kills wait for a save to be under way, even ones for a random step; all ranks die at once."""
    run = f"killed {times} times"
    recipe, log = recipe_file(folder, run), folder / f"{run}.log"
    checkpoints = folder / run / "checkpoints"
    chance = random.Random(5)
    during_save = kills = 0
    while kills < times:
        in_background = ["checkpoint.asynchronous=true"] if kills % 3 == 2 else []
        process = start(recipe, 2, log, *in_background)
        begun = last_step(folder, run)
        target = min(begun + chance.randint(1, 4), STEPS - 1)
        if kills % 2:
            reached = wait_for(lambda: saving(folder, run), process)
        else:
            reached = wait_for(lambda at=target: last_step(folder, run) >= at, process)
        time.sleep(chance.uniform(0, 0.05))
        if not reached:
            break  # it ended before the moment came
        during_save += saving(folder, run)
        process.kill()
        process.wait()
        kills += 1
        if (checkpoints / "latest").exists():
            name = (checkpoints / "latest").read_text().strip()
            assert (checkpoints / name / "meta.json").exists(), "the pointer names a partial checkpoint"
    assert kills == times, f"only {kills} kills: {log.read_text()}"
    assert during_save >= times // 4, "no save was hit: the test tests nothing"
    assert start(recipe, 2, log).wait(180) == 0, log.read_text()
    assert metrics(folder, run) == undisturbed
    assert not saving(folder, run)


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of its ranks, in their order."""
    children = psutil.Process(launcher.pid).children()
    return [child.pid for child in sorted(children, key=lambda child: int(child.environ()["RANK"]))]


def test_a_rank_that_hangs_or_dies(folder: Path, undisturbed: list[dict[str, Any]]) -> None:
    """A stopped rank is found by the watchdog, then by a collective's timeout; then one is killed; then all goes on."""
    recipe, log, run = recipe_file(folder, "hung"), folder / "hung.log", folder / "hung"
    cases = (
        (2, signal.SIGSTOP, 1, 86, "watchdog.step_timeout_s=8", "no step for 8 s (watchdog.step_timeout_s), since "),
        (7, signal.SIGSTOP, 0, 86, "compute.collective_timeout_s=8", "ranks do not answer"),
        (12, signal.SIGKILL, 1, 137, "compute.threads=1", "another rank is gone, its own log says why"),
    )
    for after, number, victim, code, override, message in cases:
        # Two steps at least lie between the moment chosen and the next save, which would have a longer limit.
        process = start(recipe, 2, log, "checkpoint.every_steps=5", override)
        assert wait_for(lambda at=after: last_step(folder, "hung") >= at, process), log.read_text()
        os.kill(ranks_of(process)[victim], number)
        assert process.wait(60) == code, log.read_text()
        stacks = run / "logs" / f"rank-{1 - victim}.stacks.txt"
        assert message in stacks.read_text()
        assert "remit_megatron/train/step.py" in stacks.read_text().partition(message)[2], "where it was, by name"
        assert message in log.read_text()
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == ("hung" if code == 86 else "failed")
        assert status["exit_code"] == (86 if code == 86 else 1)
        assert message in status["reason"]
    assert start(recipe, 2, log).wait(120) == 0, log.read_text()
    assert metrics(folder, "hung") == undisturbed


def test_a_second_process_on_one_run_is_refused(folder: Path) -> None:
    # Long enough that the first still runs, however fast the machine, when the second has started.
    schedule = {"train_tokens": 10_000 * SEQUENCE * SAMPLES, "warmup_tokens": 0}
    recipe = recipe_file(folder, "twice", parallel={"tensor": 1}, schedule=schedule)
    log = folder / "twice.log"
    first = start(recipe, 1, log)
    try:
        assert wait_for(lambda: last_step(folder, "twice") >= 1, first), log.read_text()
        before = (folder / "twice" / "metrics.jsonl").read_text()
        second_log = folder / "second.log"
        first.send_signal(signal.SIGSTOP)  # the launcher only: its rank goes on and holds the lock
        assert start(recipe, 1, second_log).wait(120) == 2
        assert "is being trained by another process" in second_log.read_text()
        assert (folder / "twice" / "metrics.jsonl").read_text().startswith(before)
    finally:
        first.kill()
        first.wait()
