"""`remit status`: what a run does, how far it is and why it was restarted, from the files of its folder alone.

`python -m launch.status RUN --failed REASON` is for job scripts: it writes into status.json why a job gives up.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from remit_megatron.data.files import write_atomically
from remit_megatron.errors import RemitError, UserError

NUMBERS = (
    *("step", "total_steps", "tokens", "loss", "tokens_per_s", "checkpoint_step", "eta_s", "exit_code"),
    *("started_unix_s", "updated_unix_s"),
)
OUTCOMES = {"end": "ended", "requeue": "queued again", "preempted": "preempted"}
SILENT_S = 300
"""A run that says it runs and has not written for so long gets a remark."""


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
    """In order of time; none where no job script has run. Lines that a full disk has cut are left out."""
    try:
        lines = (run / "logs" / "events.tsv").read_text(errors="replace").splitlines()
    except OSError:
        return []
    events = []
    for line in lines:
        parts = line.split("\t")
        if len(parts) == 5 and parts[0].isdigit() and parts[3].removeprefix("-").isdigit():
            events.append(Event(int(parts[0]), parts[1], parts[2], int(parts[3]), parts[4]))
    return events


def end_of(jobs: Sequence[str], events: list[Event]) -> int | None:
    """The exit code with which the last of these jobs ended; None where none has said."""
    for event in reversed(events):
        found = re.search(r"\(exit code (\d+)\)$", event.detail)
        if event.name == "end" and found and event.start.partition(".")[0] in jobs:
            return int(found[1])
    return None


def read_status(run: Path) -> dict[str, Any] | None:
    """status.json; None where there is none yet. Raises UserError for one that cannot be read."""
    path = run / "status.json"
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict) or not all(
        isinstance(content.get(name, 0), int | float | None) for name in NUMBERS
    ):
        raise UserError(f"{path}: holds no status")
    return content


def report(run: Path, now_unix_s: float | None = None) -> str:
    """The text of `remit status`. Raises UserError for a folder that holds no run."""
    if not (run / "recipe.toml").exists() and not (run / "status.json").exists():
        raise UserError(f"{run}: no run here: name the folder that a recipe's `run` names")
    now = time.time() if now_unix_s is None else now_unix_s
    events, remarks = read_events(run), []
    try:
        status = read_status(run)
    except UserError as error:  # a crash of the machine can leave it empty
        status, remarks = None, [f"            {error}"]
    lines = [f"{run}", *_state(run, status, events, now), *remarks]
    if status and status.get("step") is not None:
        lines += _progress(status)
    lines += _restarts(events)
    return "\n".join(lines)


def _state(run: Path, status: dict[str, Any] | None, events: list[Event], now: float) -> list[str]:
    if status is None:
        submitted = "waits for SLURM" if (run / "job.sbatch").exists() and not events else "has not started"
        last = events[-1] if events else None
        if last and last.name != "start":
            return [
                f"state       {_outcome(last)}",
                f"job         {last.start} {last.name}",
            ]
        return [f"state       {f'starting: job {last.start}' if last else submitted}"]
    state = status.get("state", "unknown")
    if _outlived(status, events):
        return [
            f"state       {_outcome(events[-1])}",
            f"job         {events[-1].start} {events[-1].name}; its ranks had last said: {state}",
        ]
    text = f"state       {state}"
    if status.get("exit_code") is not None:
        text += f" (exit code {status['exit_code']})"
    if status.get("reason"):
        text += f": {status['reason']}"
    lines = [text]
    where = status.get("host") or "no rank has got as far as saying where it is"
    if status.get("job"):
        where = f"job {status['job']}.{status.get('restart', 0)} on {where}"
    age = max(0.0, now - (status.get("updated_unix_s") or now))
    lines.append(f"where       {where}, last word {_duration(age)} ago")
    ended = bool(events) and events[-1].name == "end"
    if state in ("starting", "running") and not ended and age > SILENT_S:
        lines.append(f"            no word for {_duration(age)}: see the newest folder of {run / 'logs'}")
    last = events[-1] if events else None
    if last and last.name != "start" and last.unix_s >= (status.get("started_unix_s") or 0):
        lines.append(f"job         {last.start} {last.name}: {last.detail}")
    return lines


def _outcome(event: Event) -> str:
    return f"{OUTCOMES.get(event.name, event.name)}: {event.detail}"


def _outlived(status: dict[str, Any], events: list[Event]) -> bool:
    """Whether the newest start ended without a last word in status.json, which then tells of less."""
    if not events or events[-1].name == "start" or events[-1].unix_s < (status.get("started_unix_s") or 0):
        return False
    of_that_start = f"{status.get('job')}.{status.get('restart', 0)}" == events[-1].start
    return not of_that_start or status.get("state") in ("starting", "running")


def _progress(status: dict[str, Any]) -> list[str]:
    step, total = status["step"], status.get("total_steps") or 0
    share = f" ({step / total:.1%})" if total else ""
    lines = [f"step        {step:,} of {total:,}{share}, {status.get('tokens') or 0:,} tokens"]
    checkpoint = status.get("checkpoint_step")
    lines.append(f"checkpoint  {f'step {checkpoint:,}' if checkpoint is not None else 'none yet'}")
    if status.get("loss") is not None:
        lines.append(f"loss        {status['loss']:.4f}")
    if status.get("tokens_per_s") is not None:
        lines.append(f"speed       {status['tokens_per_s']:,.0f} tokens/s")
    if status.get("eta_s") is not None and status.get("state") == "running":
        lines.append(f"time left   {_duration(status['eta_s'])}")
    return lines


def _restarts(events: list[Event]) -> list[str]:
    """A line for each start after the first, with what ended the one before."""
    lines: list[str] = []
    before: Event | None = None
    for event in events:
        if event.name == "start" and before is not None:
            step = f"from step {event.step:,}" if event.step >= 0 else "from the beginning"
            # A start that wrote no end was ended from outside: its node was lost, or it was killed.
            why = "lost without a word: a node, or killed" if before.name == "start" else before.detail
            when = datetime.fromtimestamp(event.unix_s).strftime("%Y-%m-%d %H:%M:%S")
            lines.append(f"            {when}  {event.start} {step}: {why}")
        before = event
    return [f"restarts    {len(lines)}", *lines] if before else []


def mark_failed(run: Path, reason: str) -> None:
    """Say in status.json that the run has failed, and why. Raises RunError where it cannot be written."""
    try:
        status = read_status(run) or {}
    except UserError:
        status = {}
    status.update(state="failed", exit_code=1, reason=" ".join(reason.split()), eta_s=None, updated_unix_s=time.time())
    write_atomically(run / "status.json", (json.dumps(status, indent=1) + "\n").encode())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.status")
    parser.add_argument("run", type=Path)
    parser.add_argument("--failed", metavar="REASON")
    arguments = parser.parse_args(argv)
    try:
        if arguments.failed:
            mark_failed(arguments.run, arguments.failed)
        print(report(arguments.run))
    except RemitError as error:
        print(f"remit: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
