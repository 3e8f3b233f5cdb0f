"""Signals to a launcher of local ranks, while the ranks start: nothing is lost, and nothing lives for ever."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from launch import local
from launch.local import run_local
from remit_megatron.cli import main
from remit_megatron.config import dump_toml, parse_recipe
from remit_megatron.processes import STOP_SIGNALS
from tests.train.runs import settings

STARTED = """
import os, pathlib, signal, sys, time
pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
time.sleep(0.5)  # as an interpreter that imports
"""
LISTENS = f"""{STARTED}
requested = []
for number in {[int(n) for n in STOP_SIGNALS]}:
    signal.signal(number, lambda number, frame: requested.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
sys.exit(75 if requested == [int(sys.argv[2])] else 3)
"""
HANGS = f"{STARTED}\ntime.sleep(600)"
RANKS = 2


def run(script: str, folder: Path, *numbers: signal.Signals, listens: bool) -> int:
    """The launcher's exit code, when it gets these signals as soon as all its ranks have started."""
    command = [sys.executable, "-c", script, str(folder), str(int(numbers[0])) if numbers else "0"]

    def send() -> None:
        deadline = time.monotonic() + 60
        while len(list(folder.iterdir())) < RANKS and time.monotonic() < deadline:
            time.sleep(0.01)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        return run_local(command, RANKS, listens=listens)
    finally:
        sender.join()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_kept_until_ranks_listen(number: signal.Signals, tmp_path: Path) -> None:
    assert run(LISTENS, tmp_path, number, listens=True) == 75


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_command_that_never_listens_dies_of_one_signal(number: signal.Signals, tmp_path: Path) -> None:
    script = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n{HANGS}"
    assert run(script, tmp_path, number, listens=False) == 128 + number


def test_ranks_that_hang_before_they_listen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C ends them."""
    monkeypatch.setattr(local, "GRACE_S", 0.5)
    assert run(HANGS, tmp_path, signal.SIGINT, signal.SIGINT, listens=True) == 128 + signal.SIGKILL


def test_a_signal_between_the_starts_of_two_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = subprocess.Popen, []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if started:
            os.kill(os.getpid(), signal.SIGTERM)
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(local.subprocess, "Popen", interrupted)
    command = [sys.executable, "-c", LISTENS, str(tmp_path), str(int(signal.SIGTERM))]
    assert run_local(command, RANKS, listens=True) == 75
    assert [rank.returncode for rank in started] == [75, 75]


@pytest.mark.parametrize(
    ("command", "listens"),
    [
        ("train", True),
        ("launch", True),
        ("score --follow", True),
        ("score", False),
        ("eval --checkpoint x", False),
    ],
)
def test_which_commands_listen(
    command: str, listens: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that come to StopSignals: in another one a kept signal would be kept for ever."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_toml(parse_recipe(settings(tmp_path, "run"))))
    asked: list[bool] = []

    def record(command: list[str], nproc: int, *, listens: bool = False) -> int:
        asked.append(listens)
        return 0

    monkeypatch.setattr(local, "run_local", record)
    name, *more = command.split()
    assert main([name, str(recipe), *more, "--nproc", "2"]) == 0, capsys.readouterr().err
    assert asked == [listens]
