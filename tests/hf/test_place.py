"""Folders that a conversion makes: whole or absent, whatever kills it, and by one process at a time."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from remit_megatron.convert.place import claimed, finish
from remit_megatron.errors import RunError, UserError
from tests import disks
from tests.hf import tiny

REMIT = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli"]
KILLED = """
import os, signal, sys
from pathlib import Path
from remit_megatron.convert.place import claimed, finish
target, when = Path(sys.argv[1]), sys.argv[2]
with claimed(target) as partial:
    partial.mkdir()
    (partial / "weights").write_bytes(bytes(1 << 20))
    if when == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
    finish(partial, target)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["writing", "finished"])
def test_what_a_killed_process_leaves(when: str, tmp_path: Path) -> None:
    target = tmp_path / "model"
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), when])
    assert done.returncode == -signal.SIGKILL
    assert target.is_dir() == (when == "finished")
    with claimed(target) as partial:
        assert not partial.exists(), "cleared"
        if not target.exists():
            partial.mkdir()
            finish(partial, target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing else is left"


def test_a_block_that_raises_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with claimed(tmp_path / "model") as partial:
            partial.mkdir()
            raise UserError("no good")

    with pytest.raises(UserError, match="no good"):
        fail()
    assert not list(tmp_path.iterdir())


def test_a_second_process_waits_for_the_first(tmp_path: Path) -> None:
    target, order = tmp_path / "model", []

    def second() -> None:
        with claimed(target):
            order.append("second" if target.exists() else "too early")

    with claimed(target) as partial:
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.2)
        partial.mkdir()
        order.append("first")
        finish(partial, target)
    thread.join(timeout=20)
    assert order == ["first", "second"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    with disks.small_disk(tmp_path / "disk", "1m") as disk:
        yield disk


def test_full_disk_is_one_line(tmp_path: Path, small_disk: Path) -> None:
    """Import and export: the exit code of a failure, what to do, and nothing left."""
    source, checkpoint = tmp_path / "hf", tmp_path / "checkpoint"
    tiny.save(tiny.make_model("llama", vocab_size=6000), source)
    for command in (
        ["convert", "import", str(source), str(small_disk / "checkpoint")],
        ["convert", "import", str(source), str(checkpoint)],
        ["convert", "export", str(checkpoint), str(small_disk / "out"), "--like", str(source)],
    ):
        done = subprocess.run([*REMIT, *command], capture_output=True, text=True, env={**os.environ})
        if command[-1] == str(checkpoint):
            assert done.returncode == 0, done.stderr
            continue
        assert done.returncode == RunError.exit_code
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert "space" in done.stderr
        assert not list(small_disk.iterdir())
