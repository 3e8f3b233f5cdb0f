"""A stage's own programs: each in a process of its own, its output in the stage's log."""

import functools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from remit_megatron.benchmark.model import without_ranks
from remit_megatron.data.files import writing
from remit_megatron.errors import RemitError, RunError, StopRequested, UserError
from remit_megatron.processes import STOP_SIGNALS, die_with_parent

TAIL_BYTES = 20_000
REMIT = [sys.executable, "-W", "ignore", "-m", "remit_megatron.cli"]


def run(line: Sequence[str], log: Path, what: str) -> None:
    """Run a program to its end. It dies with this process, and hears the signals that ask this process to stop.

    what: for messages. Raises the error that its exit code means, with its last line: UserError for 2, StopRequested
    for 75, RunError for others with that exit code.
    """
    with writing(log), log.open("ab") as stream:
        stream.write(f"$ {shlex.join(line)}\n".encode())
        stream.flush()
        start = log.stat().st_size
        code = _wait(line, stream.fileno())
    if code == 0:
        return
    if code == StopRequested.exit_code:
        raise StopRequested("stopped; the same command goes on")
    said = f"{what}: {last_line(log, start)}"
    if code == UserError.exit_code:
        raise UserError(said)
    error: RemitError = RunError(f"{said} (exit code {code}, log in {log})")
    error.exit_code = code if code > 0 else 128 - code
    raise error


def remit(arguments: Sequence[str], log: Path, what: str) -> None:
    """Run a command of `remit`."""
    run([*REMIT, *arguments], log, what)


def _wait(line: Sequence[str], output: int) -> int:
    """Exit code; -n for signal n, and 75 where the program died of a signal that this process had passed on."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        child = subprocess.Popen(
            line,
            env={**without_ranks(), "TOKENIZERS_PARALLELISM": "false"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # or a terminal would send Ctrl-C to it a second time
            preexec_fn=functools.partial(_become_child, os.getpid(), held),
        )
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        raise UserError(f"{line[0]}: cannot be started: {error.strerror or error}") from None
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        child.send_signal(number)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_SETMASK, held - set(STOP_SIGNALS))
    try:
        code = child.wait()
        return StopRequested.exit_code if asked and code else code
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _become_child(parent: int, mask: set[int | signal.Signals]) -> None:
    die_with_parent(parent)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def last_line(log: Path, start: int = 0) -> str:
    """Why a program stopped: the last line after `start` bytes that begins with `remit: `, or the last one at all."""
    with log.open("rb") as stream:
        stream.seek(max(start, log.stat().st_size - TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line.removeprefix("remit: ") for line in lines if line.startswith("remit: ")]
    return (said or lines or ["no message"])[-1][:400]
