"""Commands killed at any moment, and two of each at once: the same command ends well and with the same bytes.

One process imports everything and forks every command (tests/kills/__main__.py). Seeds are drawn anew each time, and
printed; every moment is one that must do.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kills(*arguments: str) -> dict[str, int]:
    """Counts by kind; the run is as it should be."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.kills", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-4000:]}"
    counts = re.findall(r"(\d+) (random kills|crash points|pairs|hangs|wrong)", done.stdout.splitlines()[-1])
    return {name: int(count) for count, name in counts}


@pytest.mark.slow
def test_killed() -> None:
    """40 random kills of all commands, the crash points of the quick ones, two scorers that hang, and some pairs."""
    found = kills("--random", "40", "--points", "cheap", "--hangs")
    assert found["random kills"] == 40
    assert found["crash points"] > 60, "points were not found: nothing is tested"
    assert found["hangs"] == 2
    assert found["wrong"] == 0


@pytest.mark.slow
def test_two_at_once() -> None:
    found = kills("--pairs", "1")
    assert found["pairs"] >= 19
    assert found["wrong"] == 0


@pytest.mark.slow
def test_killed_everywhere() -> None:
    found = kills("--random", "300", "--points", "all")
    assert found["random kills"] == 300
    assert found["crash points"] > 600
    assert found["wrong"] == 0


@pytest.mark.slow
def test_two_at_once_fifty_times() -> None:
    found = kills("--pairs", "50")
    assert found["pairs"] >= 950
    assert found["wrong"] == 0
