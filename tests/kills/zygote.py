"""Real `remit` commands forked from one process that has imported everything: a start for the price of a fork.

A command runs as it would from a shell, in a session of its own, in a folder of its own, and can be killed at any
moment, or by itself before a chosen call that changes a folder.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Before the forks, so that none of them imports it.
import remit_megatron.check
import remit_megatron.convert.exporter
import remit_megatron.convert.hub
import remit_megatron.convert.importer
import remit_megatron.scores.follow
import remit_megatron.scores.score
import remit_megatron.train.loop  # noqa: F401
from remit_megatron.cli import main
from remit_megatron.processes import die_with_parent

CALLS = ("rename", "replace", "unlink", "remove", "rmdir", "mkdir")
"""What changes a folder; a crash between two of them is a state that a restart may find."""
TIMEOUT_S = 300.0
KILLED = -signal.SIGKILL


@dataclass
class Process:
    """A command under way."""

    pid: int
    said: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        """Its exit code. Raises AssertionError where it takes longer than TIMEOUT_S, and kills it."""
        deadline = time.monotonic() + TIMEOUT_S
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"hangs: {self.text()}")
            time.sleep(0.002)
        return code

    def kill(self) -> None:
        """The whole session, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # also where it is not yet the leader of its session
            os.killpg(self.pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.001)

    def text(self) -> str:
        return self.said.read_text(errors="replace") if self.said.exists() else ""


def start(
    command: Sequence[str], folder: Path, said: Path, ranks: int = 1, before: Callable[[], None] = lambda: None
) -> Process:
    """Start `remit COMMAND` in `folder`; what it says is added to `said`. before: called in the new process first."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return Process(pid, said)
    code = 70
    try:
        os.setsid()
        die_with_parent(parent)
        output = os.open(said, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        torch.set_num_threads(1)
        sys.modules["__main__"] = ModuleType("__main__")  # what multiprocessing spawns need not import this program
        os.chdir(folder)
        before()
        code = _main(command) if ranks == 1 else _on_ranks(command, said.with_suffix(".store"), ranks)
    except BaseException:  # noqa: BLE001 - as the interpreter prints it
        traceback.print_exc()
    finally:
        os._exit(code)


def _main(command: Sequence[str]) -> int:
    try:
        code = main(list(command))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _on_ranks(command: Sequence[str], store: Path, ranks: int) -> int:
    """The command on so many ranks, forked from here; the largest of their exit codes, where none has been killed."""
    store.unlink(missing_ok=True)
    parent, pids = os.getpid(), []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                die_with_parent(parent)
                os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank))
                _meet_in(store)
                code = _main(command)
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return max(codes, key=abs)


def _meet_in(store: Path) -> None:
    """Ranks find each other by a file, so that no port can be taken."""
    import torch.distributed as dist

    real = dist.init_process_group

    def init(backend: str, *, rank: int, world_size: int, **more: Any) -> None:
        real(backend, rank=rank, world_size=world_size, **{**more, "store": dist.FileStore(str(store), world_size)})

    dist.init_process_group = init


def crash_points(folder: Path, number: int | None, listed: Path | None = None) -> Callable[[], None]:
    """For `start`: die before the call with that number, counted from 1, that changes something in `folder`.

    listed: a file that gets a line for each call, where none is to die.
    """
    inside = str(folder) + os.sep

    def install() -> None:
        count, session = itertools.count(1), os.getpid()
        for name in CALLS:
            setattr(os, name, _watched(getattr(os, name), name, inside, count, number, session, listed))

    return install


def _watched(
    real: Any, name: str, inside: str, count: Iterator[int], number: int | None, session: int, listed: Path | None
) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        path = os.fsdecode(os.path.abspath(arguments[0])) if not options.get("dir_fd") else inside + "..."
        if path.startswith(inside):
            n = next(count)
            if n == number:
                os.killpg(session, signal.SIGKILL)
            if listed is not None:
                with listed.open("a") as stream:
                    stream.write(f"{n} {name} {path.removeprefix(inside)}\n")
        return real(*arguments, **options)

    return call


def random_moment(process: Process, generator: random.Random, duration_s: float) -> bool:
    """Kill it at a moment up to a little after its usual end; whether it was still there."""
    deadline = time.monotonic() + generator.uniform(0.02, 1.05) * duration_s
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    alive = process.poll() is None
    process.kill()
    return alive and process.code == KILLED


def fresh(valid: Path, folder: Path) -> None:
    """Make `folder` a copy of what a command starts from."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(valid, folder, symlinks=True)
