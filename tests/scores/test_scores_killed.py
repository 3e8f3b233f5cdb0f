"""`remit score` killed at random moments."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from remit_megatron.config import dump_toml, parse_recipe
from tests.scores.test_scores import SMALL_BLOCKS, content
from tests.train.runs import remit, wait_for

SCRIPT = f"""
import sys
from remit_megatron.scores import cache
cache.BLOCK_BYTES = {SMALL_BLOCKS // 5}
from remit_megatron.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("moments", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_scorer_leaves_the_same_bytes(folder: Path, tmp_path: Path, moments: int) -> None:
    """kill -9 at random moments of the work; the cache is then byte for byte that of an undisturbed scorer."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(parse_recipe(remit(folder, "killed"))))
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, "score", str(recipe), "--output"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(path: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*command, str(path)], stderr=subprocess.DEVNULL, env=environment)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait() == 0
    generator = random.Random(0)
    kills = 0
    for goal in sorted(generator.sample(range(1, 36), moments)):
        process = start(killed)
        if wait_for(lambda goal=goal: len(list(killed.rglob("*.scores"))) >= goal, process):
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills == moments
    assert len(list(killed.rglob("*.scores"))) < 48
    assert start(killed).wait() == 0
    assert content(killed) == content(whole)
    assert len(content(whole)) == 48 + 1  # blocks and manifest
