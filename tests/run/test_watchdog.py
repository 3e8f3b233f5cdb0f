"""The watchdog alone, in a process that does nothing else: what no exception and no thread of Python could end."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import ctypes, os, sys, threading, time
from pathlib import Path
from remit_megatron.config import Watchdog as Limits
from remit_megatron.run import watchdog
from remit_megatron.run.status import Status

watchdog.GRACE_S = watchdog.REPORT_S = 0.2
status = Status(Path(sys.argv[1]))
status.claimed()
with watchdog.Watchdog(Limits(step_timeout_s=1, slow_timeout_s=2), status) as dog:
    CASE
"""


def run(case: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = SCRIPT.replace("CASE", case.replace("\n", "\n    "))
    return subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=60)


def test_the_main_thread_is_stuck(tmp_path: Path) -> None:
    """In C code, as in a collective; every thread's stack is written, and a rank's name is on the file."""
    case = """
def busy_elsewhere(): time.sleep(100)
threading.Thread(target=busy_elsewhere, daemon=True).start()
dog.stepped(41)
threading.Lock().acquire() and threading.Event().wait()
"""
    result = run(case, tmp_path)
    assert result.returncode == 86, result.stderr
    assert "rank 0 hangs: no step for 1 s (watchdog.step_timeout_s), since step 41" in result.stderr
    stacks = (tmp_path / "logs" / "rank-0.stacks.txt").read_text()
    assert "since step 41" in stacks
    assert "in busy_elsewhere" in stacks
    assert '"state": "hung"' in (tmp_path / "status.json").read_text()


def test_python_cannot_run_at_all(tmp_path: Path) -> None:
    """A call into C that keeps the interpreter's lock: the alarm ends it, and leaves the stacks in the log."""
    result = run("dog.stepped(1)\nctypes.PyDLL(None).sleep(100)", tmp_path)
    assert result.returncode == -14, result.stderr
    assert 'File "<string>", line' in result.stderr


@pytest.mark.parametrize("limit", ["step", "slow"])
def test_progress_is_left_alone(tmp_path: Path, limit: str) -> None:
    """Steps that come in time, and slow work after a step that has the longer limit."""
    step = "for n in range(4): time.sleep(0.5); dog.stepped(n)"
    slow = "dog.stepped(1)\nwith dog.slow('a checkpoint'): time.sleep(1.6)"
    assert run(step if limit == "step" else slow, tmp_path).returncode == 0
    assert not (tmp_path / "logs").exists()


def test_slow_work_has_a_limit_too(tmp_path: Path) -> None:
    result = run("with dog.slow('a checkpoint'): time.sleep(100)", tmp_path)
    assert result.returncode == 86
    assert "a checkpoint took more than 2 s (watchdog.slow_timeout_s), and no step was complete" in result.stderr
