"""A run and its scorer as a user starts them: one stops, hangs, is killed or comes late, and the numbers stay."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from remit_megatron.config import dump_toml, parse_recipe
from tests.ranks import run_ranks
from tests.train.runs import SAMPLES, SEQUENCE, metrics, remit, start, train_all, wait_for, weights

pytestmark = pytest.mark.slow

STEPS = 150


def recipe_of(folder: Path, run: str, queue: bool = True) -> dict[str, Any]:
    schedule = {"train_tokens": STEPS * SEQUENCE * SAMPLES, "warmup_tokens": 0}
    recipe = remit(folder, run, schedule=schedule, checkpoint={"every_steps": 10}, evaluation={"every_steps": 0})
    if queue:
        recipe["reference"] = {**recipe["reference"], "queue": {"ahead_steps": 4, "timeout_s": 1.0}}
    return recipe


def write(folder: Path, run: str) -> Path:
    path = folder / f"{run}.toml"
    path.write_text(dump_toml(parse_recipe(recipe_of(folder, run))))
    return path


def spawn(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A command of `remit` as one process."""
    command = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli", *arguments]
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})


def online_flags(folder: Path, run: str) -> list[int]:
    """Of each step so far: 1 where the run scored online."""
    path = folder / run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["scored_online"] for line in lines if line.endswith("\n")]


@pytest.fixture(scope="module")
def online(folder: Path) -> list[dict[str, Any]]:
    assert run_ranks(1, train_all, [recipe_of(folder, "no queue", queue=False)]) == [[(0, "")]]
    return metrics(folder, "no queue")


def check_same(folder: Path, run: str, online: list[dict[str, Any]]) -> None:
    assert metrics(folder, run) == online
    assert weights(folder, run) == weights(folder, "no queue")


def test_a_scorer_that_hangs_comes_back_and_is_killed(folder: Path, online: list[dict[str, Any]]) -> None:
    run = "hanging"
    recipe, log = write(folder, run), folder / f"{run}.log"
    scorer = spawn(log, "score", str(recipe), "--follow")
    try:
        assert wait_for(lambda: (folder / run / "queue" / "scorer.json").exists(), scorer), log.read_text()
        trainer = spawn(log, "train", str(recipe))
        assert wait_for(lambda: len(online_flags(folder, run)) >= 10, trainer), log.read_text()
        scorer.send_signal(signal.SIGSTOP)
        assert wait_for(lambda: online_flags(folder, run)[-1] == 1, trainer), log.read_text()
        hung = len(online_flags(folder, run))
        scorer.send_signal(signal.SIGCONT)
        assert wait_for(lambda: 0 in online_flags(folder, run)[hung:], trainer), log.read_text()
        scorer.kill()
        assert trainer.wait(300) == 0, log.read_text()
    finally:
        scorer.kill()
        scorer.wait()
    flags = online_flags(folder, run)
    assert not any(flags[:10])
    assert flags[-1] == 1
    said = (folder / run / "log.txt").read_text()
    assert said.count("the scorer has not moved for 1 s: scores are made online") == 2
    assert said.count("a scorer is at work: its scores are used again") == 1
    waits = [json.loads(line)["wait_ms"] for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
    assert 0 < max(waits) < 10_000, "it waited for the scorer, and no longer than the recipe says"
    check_same(folder, run, online)


def test_a_late_scorer_and_a_run_killed_twice(folder: Path, online: list[dict[str, Any]]) -> None:
    run = "late"
    recipe, log = write(folder, run), folder / f"{run}.log"
    trainer = spawn(log, "train", str(recipe))
    assert wait_for(lambda: len(online_flags(folder, run)) >= 3, trainer), log.read_text()
    trainer.send_signal(signal.SIGSTOP)
    scorer = spawn(log, "score", str(recipe), "--follow")
    try:
        assert wait_for(lambda: (folder / run / "queue" / "scorer.json").exists(), scorer), log.read_text()
        trainer.send_signal(signal.SIGCONT)
        for steps in (35, 65):  # each time it goes on from an earlier step than the scorer has come to
            assert wait_for(lambda at=steps: len(online_flags(folder, run)) >= at, trainer), log.read_text()
            trainer.kill()
            trainer.wait()
            trainer = spawn(log, "train", str(recipe))
        second = spawn(folder / "second scorer.log", "score", str(recipe), "--follow")
        assert second.wait(300) == 2
        assert "another scorer follows the run" in (folder / "second scorer.log").read_text()
        assert trainer.wait(300) == 0, log.read_text()
        assert scorer.wait(60) == 0, log.read_text()  # the run is done
    finally:
        scorer.kill()
        scorer.wait()
    flags = online_flags(folder, run)
    assert flags[:3] == [1, 1, 1]
    assert not any(flags[40:])
    assert not list((folder / run / "queue").glob("step-*.scores")), "a scorer leaves no scores behind"
    check_same(folder, run, online)


def test_one_command_starts_both(folder: Path) -> None:
    """Two data-parallel ranks train, one scores; `[reference.queue]` may be left out."""
    recipe = folder / "both.toml"
    recipe.write_text(dump_toml(parse_recipe(recipe_of(folder, "both", queue=False))))
    log = folder / "both.log"
    alone = [f"run={folder / 'both online'}"]
    assert start(recipe, 2, log, *alone).wait(300) == 0, log.read_text()
    command = ["train", str(recipe), "--nproc", "2", "--scorers", "1", "--set", "reference.queue.fallback=stop"]
    assert spawn(log, *command).wait(300) == 0, log.read_text()
    assert "the scorer ends" in log.read_text()
    assert online_flags(folder, "both") == [0] * STEPS
    assert metrics(folder, "both") == metrics(folder, "both online")
    assert weights(folder, "both") == weights(folder, "both online")
