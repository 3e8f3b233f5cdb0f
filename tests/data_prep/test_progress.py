"""What a user sees while `tokenize` runs: bytes done, tokens a second and the time left, on a terminal and in a log."""

import io
import re
import sys

import pytest

from data_prep import progress
from data_prep.progress import Meter
from data_prep.worker import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_in_a_log(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every ten seconds. A quarter was done before: 10 s for the next quarter leave 20 s for the rest."""
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    with Meter(400_000_000, done=100_000_000) as meter:
        clock[0] += 5
        meter.add(Progress(size=90, disk_bytes=50_000_000, tokens=10_000_000))
        assert log.getvalue() == ""
        clock[0] += 5
        meter.add(Progress(size=10, disk_bytes=50_000_000, tokens=15_000_000))
    assert log.getvalue() == "50.0% of 400 MB, 2.50 Mtok/s, 20 s left\n"
    assert meter.summary() == "0.0 MB of text in 10.0 s, 2.50 Mtok/s"


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """rich draws bytes done of all bytes and the time left; the rate is ours."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with Meter(400_000_000) as meter:
        for _ in range(3):
            meter.add(Progress(size=1, disk_bytes=100_000_000, tokens=1_000_000))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "300.0/400.0 MB" in shown
    assert re.search(r"\d Mtok/s \d:\d\d:\d\d|\d Mtok/s -:--:--", shown), shown
