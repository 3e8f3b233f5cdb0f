"""What a run folder tells of its run: status.json, the events of its jobs, and how it was launched.

All of it is text that a full disk may have cut and that anybody may have edited: what is read is of its type and shape,
or refused in one line.
"""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from remit_megatron.data.files import write_atomically
from remit_megatron.errors import UserError

LONGEST = 600
"""Characters of a text of a run folder that are shown."""
EVENT = re.compile(r"([0-9]{1,11})\t([^\t]*)\t([^\t]*)\t(-?[0-9]{1,15})\t([^\t]*)")

Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Figure = Annotated[float, Field(allow_inf_nan=False)]
Seconds = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1e11)]


class _File(BaseModel):
    # Further keys stay: a newer version of this program may have written them.
    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class StatusFile(_File):
    """status.json, as `remit_megatron.run.status` writes it; null or absent: not known (yet)."""

    state: str | None = None
    step: Count | None = None
    total_steps: Count | None = None
    tokens: Count | None = None
    loss: Figure | None = None
    tokens_per_s: Figure | None = None
    checkpoint_step: Count | None = None
    exit_code: Annotated[int, Field(ge=-255, le=255)] | None = None
    reason: str | None = None
    started_unix_s: Seconds | None = None
    updated_unix_s: Seconds | None = None
    eta_s: Seconds | None = None
    host: str | None = None
    job: str | None = None
    restart: Count | None = None


class LaunchFile(_File):
    """launch.json: where `remit launch` has put the run."""

    backend: str
    jobs: list[str] = []
    launched_unix_s: Seconds


class CodeFile(_File):
    """code.json: what the run was launched from."""

    commit: Annotated[str, Field(max_length=64)] | None = None
    launched_unix_s: Seconds = 0.0


F = TypeVar("F", bound=_File)


def read_file(path: Path, model: type[F]) -> F | None:
    """A JSON file of a run folder; None where there is none. Raises UserError for one that is not what it should be."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"{path}: is damaged: {shown(f'{where}: ' if where else '')}{problem['msg']}") from None


def read_status(run: Path) -> StatusFile | None:
    return read_file(run / "status.json", StatusFile)


def mark_failed(run: Path, reason: str) -> None:
    """Say in status.json that the run has failed, and why. Raises RunError where it cannot be written."""
    try:
        status = read_status(run) or StatusFile()
    except UserError:
        status = StatusFile()
    changes = {"state": "failed", "exit_code": 1, "reason": shown(reason), "eta_s": None, "updated_unix_s": time.time()}
    content = status.model_copy(update=changes).model_dump(exclude_unset=True)
    write_atomically(run / "status.json", (json.dumps(content, indent=1) + "\n").encode())


@dataclass(frozen=True, slots=True)
class Event:
    """A line of logs/events.tsv, which job scripts write."""

    unix_s: int
    start: str
    """job.restart"""
    name: str
    """start, preempted, requeue or end"""
    step: int
    """Newest checkpoint then; -1: none."""
    detail: str


def read_events(run: Path) -> list[Event]:
    """In order of time; none where no job script has run. Lines that a full disk has cut are left out.

    Raises UserError where the file is there and cannot be read.
    """
    path = run / "logs" / "events.tsv"
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    found = [match.groups() for line in lines if (match := EVENT.fullmatch(line))]
    return [Event(int(when), start, name, int(step), detail) for when, start, name, step, detail in found]


def end_of(jobs: Sequence[str], events: list[Event]) -> int | None:
    """The exit code with which the last of these jobs ended; None where none has said."""
    for event in reversed(events):
        found = re.search(r"\(exit code ([0-9]{1,3})\)$", event.detail)
        if event.name == "end" and found and event.start.partition(".")[0] in jobs:
            return int(found[1])
    return None


def shown(text: str) -> str:
    """On one line, without what a terminal would take for a command, and no longer than LONGEST."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
