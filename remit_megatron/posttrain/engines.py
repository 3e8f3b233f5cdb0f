"""Engines as processes: how one is started, watched, asked to stop, and what its end means."""

import functools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO

from remit_megatron.data.files import writing
from remit_megatron.errors import RunError, StopRequested, UserError
from remit_megatron.posttrain.contract import WORK, StageSpec
from remit_megatron.posttrain.progress import StageProgress
from remit_megatron.processes import STOP_SIGNALS, die_with_parent

LOG, OUTCOME = "log.txt", "outcome.json"
PROGRAM = "remit_megatron.posttrain.worker"
POLL_S = 0.1
STOPPED = "stopped; the same command goes on"


def run_engine(folder: Path, spec: StageSpec, workers: "Workers | None") -> None:
    """Run the engine of a stage to its end. Raises UserError, RunError or StopRequested as it ended."""
    log = folder / WORK / LOG
    with StageProgress(folder, spec) as progress:
        if spec.engine.name == "trl" and not spec.engine.launch:
            with _one_worker(workers) as pool:
                code, message = pool.run(folder, spec.engine.python or sys.executable, progress)
        else:
            code, message = _run_process(_command(folder, spec), folder, progress)
    if code == StopRequested.exit_code:
        raise StopRequested(STOPPED)
    if code:
        said = f"{spec.name}: {message or _last_line(log)}"
        raise UserError(said) if code == UserError.exit_code else RunError(f"{said} (exit code {code}, log in {log})")


def _command(folder: Path, spec: StageSpec) -> list[str]:
    engine = spec.engine
    if engine.name == "command":
        return [part.replace("{stage}", str(folder.absolute())) for part in engine.command]
    return [engine.python or sys.executable, *engine.launch, "-m", PROGRAM, str(folder.absolute())]


def _run_process(line: list[str], folder: Path, progress: StageProgress) -> tuple[int, str | None]:
    """(exit code, message) of a command whose output goes to the log; 75 where a signal to this process stopped it."""
    (folder / WORK / OUTCOME).unlink(missing_ok=True)
    with _log(folder) as log:
        log.write(f"$ {shlex.join(line)}\n".encode())
        log.flush()
        child = _start(line, log, stdin=subprocess.DEVNULL, stdout=log)
        with _ended(child), _stopping(child.pid) as asked:
            while child.poll() is None:
                progress.look()
                time.sleep(POLL_S)
    if asked and child.returncode:
        return StopRequested.exit_code, None
    outcome = folder / WORK / OUTCOME  # a launcher has an exit code of its own whatever a rank ended with
    if child.returncode and outcome.exists():
        said = json.loads(outcome.read_text())
        return said["code"], said["message"]
    return child.returncode, None


class Workers:
    """Processes that run one stage of the engine `trl` after another: the import of trl alone takes seconds.

    Use as a context: they end with it. One worker an interpreter.
    """

    def __init__(self) -> None:
        self._known: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exc: object) -> None:
        for child in self._known.values():
            _kill(child)
        self._known.clear()

    def run(self, folder: Path, python: str, progress: StageProgress) -> tuple[int, str | None]:
        """(exit code, message) of one stage."""
        child = self._known.get(python)
        if child is None or child.poll() is not None:
            with _log(folder) as log:
                child = _start([python, "-m", PROGRAM], log, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._known[python] = child
        assert child.stdin is not None
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        answer = b""
        try:
            with _stopping(child.pid) as asked:
                child.stdin.write(f"{folder.absolute()}\n".encode())
                child.stdin.flush()
                while not answer.endswith(b"\n") and child.poll() is None:
                    progress.look()
                    time.sleep(POLL_S)
                    answer += child.stdout.read() or b""
                answer += child.stdout.read() or b""
        except BrokenPipeError:
            child.wait()
        except BaseException:
            _kill(child)  # it may be in the middle of the stage
            raise
        if answer.endswith(b"\n"):
            outcome = json.loads(answer)
            return outcome["code"], outcome["message"]
        del self._known[python]
        return (StopRequested.exit_code if asked else child.wait() or 1), None


@contextmanager
def _one_worker(workers: Workers | None) -> Iterator[Workers]:
    if workers is not None:
        yield workers
    else:
        with Workers() as own:
            yield own


def _start(line: list[str], log: IO[bytes], *, stdin: int, stdout: int | IO[bytes]) -> "subprocess.Popen[bytes]":
    root = str(Path(__file__).parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),  # another interpreter has this package from here
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    try:
        return subprocess.Popen(
            line,
            env=environment,
            stdin=stdin,
            stdout=stdout,
            stderr=log,
            start_new_session=True,  # so that what it starts can be ended with it
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
    except OSError as error:
        raise UserError(f"engine: {line[0]}: cannot be started: {error.strerror or error}") from None


@contextmanager
def _ended(child: "subprocess.Popen[bytes]") -> Iterator[None]:
    try:
        yield
    finally:
        _kill(child)


def _kill(child: "subprocess.Popen[bytes]") -> None:
    """End a process and all that it started."""
    if child.poll() is None:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextmanager
def _stopping(group: int) -> Iterator[list[int]]:
    """Signals that ask this process to stop go to an engine's processes as SIGTERM; a third one kills them.

    Yields the list of those that came.
    """
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL if len(asked) > 2 else signal.SIGTERM)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _log(folder: Path) -> Iterator[IO[bytes]]:
    path = folder / WORK / LOG
    with writing(path), path.open("ab") as stream:
        yield stream


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
