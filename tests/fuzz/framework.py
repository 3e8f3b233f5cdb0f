"""Broken inputs for every reader, from a seed: each ends with a documented exit code, one line, and nothing lost.

A target makes a valid input, names the command that reads it, and judges what came out by means of its own. The
framework breaks a copy of the input and runs the command in a forked process with a limit of time and memory. Where no
quick command has a reader, the target calls the reader itself.
"""

import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from remit_megatron.cli import main
from remit_megatron.errors import RemitError
from tests.fuzz.mutate import mutate

TIMEOUT_S = 60.0
"""Of one input. A command on these inputs takes well under a second on an idle machine."""
MEMORY_BYTES = 8 << 30
"""Of address space that an input may ask for."""
ACCEPTED, REFUSED = 0, 2
LINE_CHARACTERS = 2000
"""Of an error message: a long value in it would be shown in place of the reason."""


@dataclass(frozen=True)
class Target:
    """One reader of the project."""

    name: str
    prepare: Callable[[Path], None]
    """Write a valid input and what goes with it into an empty folder. Called once."""
    files: Sequence[str]
    """Those of its files that are broken, one of them at a time; globs."""
    command: Sequence[str] | Callable[[], int | None]
    """Arguments of `remit`, run inside of the folder; or a function in their place, called there."""
    judge: Callable[[Path, Path], str | None] = lambda folder, valid: None
    """After an exit code of 0: what is wrong with the result in a folder, beside `valid`, the unbroken one. None: it is
    right. It must not use the code that was run."""
    kept: Sequence[str] = ()
    """Files of the user that no command may change, besides `files`; globs."""
    also: Sequence[int] = ()
    """Exit codes allowed beside ACCEPTED and REFUSED, with a line that says why."""
    own: bool = False
    """Whether the files that are broken are the program's, so that it may mend or remove them."""
    share: float = 1.0
    """Of the inputs: less than 1 for a slow reader."""


@dataclass(frozen=True)
class Outcome:
    """What became of one broken input."""

    target: str
    seed: int
    code: int
    said: str
    wrong: str | None
    """None: answered as it should be."""


TARGETS: dict[str, Target] = {}


def register(target: Target) -> None:
    """Add a reader. A module that calls it is named in `tests.fuzz.targets`."""
    assert target.name not in TARGETS, f"two targets {target.name}"
    TARGETS[target.name] = target


def ready(target: Target, folder: Path) -> Path:
    """The target's unbroken input, in a new folder; it must be accepted. Raises AssertionError where it is not."""
    valid, copy = folder / target.name, folder / f"{target.name}-sound"
    valid.mkdir(parents=True)
    target.prepare(valid)
    shutil.copytree(valid, copy, symlinks=True)
    code, said = _command(target, copy)
    assert code == ACCEPTED, f"{target.name}: the unbroken input ends with {code}: {said}"
    assert (found := target.judge(copy, valid)) is None, f"{target.name}: the unbroken input: {found}"
    return valid


def run(target: Target, seeds: Sequence[int], valid: Path, scratch: Path) -> Iterator[Outcome]:
    """Break the target's input once for each seed."""
    for seed in seeds:
        folder = scratch / f"{target.name}-{seed}"
        shutil.copytree(valid, folder, symlinks=True)
        _break(target, folder, random.Random(f"{target.name} {seed}"))
        yield _try(target, seed, folder, valid)
        shutil.rmtree(folder)


def break_into(target: Target, seed: int, folder: Path) -> None:
    """Write the broken input of a seed into an empty folder, to look at it."""
    target.prepare(folder)
    _break(target, folder, random.Random(f"{target.name} {seed}"))


def _break(target: Target, folder: Path, generator: random.Random) -> None:
    paths = sorted(path for pattern in target.files for path in folder.glob(pattern))
    path = generator.choice(paths)
    path.write_bytes(mutate(path.read_bytes(), generator))


def _try(target: Target, seed: int, folder: Path, valid: Path) -> Outcome:
    before = _contents(target, folder)
    started = time.monotonic()
    code, said = _command(target, folder)
    wrong = None
    if time.monotonic() - started >= TIMEOUT_S:
        wrong = "hangs"
    elif "Traceback" in said:
        wrong = "a traceback"
    elif code not in (ACCEPTED, REFUSED, *target.also):
        wrong = f"exit code {code}"
    elif code != ACCEPTED and not _is_one_line(said):
        wrong = "no single line that says what is wrong"
    elif _contents(target, folder) != before:
        wrong = "a file of the user was changed"
    elif code == ACCEPTED:
        wrong = target.judge(folder, valid)
    return Outcome(target.name, seed, code, said, wrong)


def _is_one_line(said: str) -> bool:
    last = said.splitlines()[-1] if said else ""
    return last.startswith(("remit: ", "usage: ")) and len(last) <= LINE_CHARACTERS and last.isprintable()


def _contents(target: Target, folder: Path) -> dict[str, bytes]:
    patterns = target.kept if target.own else (*target.files, *target.kept)
    paths = (path for pattern in patterns for path in folder.glob(pattern))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()}


def _command(target: Target, folder: Path) -> tuple[int, str]:
    """(exit code, stderr) of the command in a fork of this process, which has imported what it needs."""
    said = folder.with_name(f"{folder.name}.said")
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            output = os.open(said, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600)
            os.dup2(output, 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            os.chdir(folder)
            code = target.command() or 0 if callable(target.command) else main(list(target.command))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except RemitError as error:
            print(f"remit: {error}", file=sys.stderr)
            code = error.exit_code
        except BaseException:  # noqa: BLE001 - as the interpreter prints it
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + TIMEOUT_S
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    text = said.read_text(errors="replace") if said.exists() else ""
    said.unlink(missing_ok=True)
    return os.waitstatus_to_exitcode(ended[1]), text
